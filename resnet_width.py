"""Does SAM's gain over SGD grow with a ResNet's width? The CIFAR-10 and ImageNet panels of the paper's Figure 1.

    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2
    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2 \\
        --sam --rho 0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1
    python plot.py

A run of SGD at 64 filters takes about 7 minutes on an A100 (estimate), SAM twice that, and twice the filters 4 times
that. The paper's gains grow from 0.4 points at 4 filters to about 1 from 64 on; on ImageNet (README) from 0 to 0.5.
"""

import math
import os
import signal

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from common import (
    LOSSES,
    SAM,
    Data,
    Recorder,
    ResNet18,
    Scores,
    average_gradients,
    batches,
    bounded_number,
    build_model,
    convolution,
    drop_gradients,
    evaluate,
    exit_with_error,
    flags,
    from_main,
    frozen_bn_stats,
    last_layer_share,
    learning_rate,
    lecun_normal_,
    load_data,
    main,
    measure_sharpness,
    open_image,
    scan_folder,
    split_sizes,
)

CIFAR10 = {"dataset": "cifar10", "epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
CIFAR10 |= {"loss": "ce", "schedule": "step", "milestones": (0.5, 0.75), "warmup": 0}
IMAGENET = CIFAR10 | {"epochs": 90, "batch_size": 512, "weight_decay": 1e-4}
IMAGENET |= {"schedule": "cosine", "milestones": (0.25, 0.5, 0.75), "warmup": 5000}  # milestones: its code's
SETTINGS = {18: CIFAR10, 50: IMAGENET}  # the paper's, by depth


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride):
        super().__init__()
        first, second = convolution(inputs, width, 1), convolution(width, width, 3, stride)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *convolution(width, outputs, 1))
        nn.init.zeros_(self.branch[-1].weight)  # so that a block begins as its shortcut
        self.shortcut = nn.Sequential(*(convolution(inputs, outputs, 1, stride) if inputs != outputs else ()))

    def forward(self, x):
        return torch.relu(self.branch(x) + self.shortcut(x))


def ResNet50(filters=64, channels=3, classes=1000):
    """The ImageNet ResNet-50 with `filters` channels after its stem: (B, channels, H, W) -> (B, classes) logits."""
    layers, inputs = [*convolution(channels, filters, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)], filters
    for width, blocks in ((filters, 3), (2 * filters, 4), (4 * filters, 6), (8 * filters, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 4 * width, 2 if block == 0 and width > filters else 1))
            inputs = 4 * width
    return lecun_normal_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)))


class Decoder:
    """Reads, crops and, if seeded, augments a batch of images, in a DataLoader's worker: (B, size, size, 3) uint8."""

    def __init__(self, size):
        from torchvision.transforms import v2  # here, since it takes a while

        how = {"interpolation": v2.InterpolationMode.BICUBIC, "antialias": True}
        self.augment = v2.Compose([v2.RandomResizedCrop(size, (0.08, 1), **how), v2.RandomHorizontalFlip()])
        self.crop = v2.Compose([v2.Resize(round(size * 8 / 7), **how), v2.CenterCrop(size)])

    def __getitem__(self, batch):
        (paths, indices, seed), images = batch, []
        with torch.random.fork_rng(devices=[]):  # without workers, this is the main process
            for path, index in zip(paths, indices):
                try:
                    image = open_image(os.fsdecode(path)).convert("RGB")
                except ValueError as error:
                    return str(error)  # for the user; an exception would come with the worker's traceback
                if seed:
                    torch.default_generator.manual_seed(int(np.random.default_rng((*seed, index)).integers(2**63)))
                images.append(np.asarray(self.augment(image) if seed else self.crop(image)))
        return torch.from_numpy(np.stack(images))


class Files:
    """A Split of images of any size: their paths, and the loader that all of a run's splits share, in turn."""

    def __init__(self, paths, targets, loader):
        self.inputs, self.targets, self.loader = paths, targets, loader
        stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels
        self.mean, self.std = (255 * torch.tensor(x, device=targets.device).view(3, 1, 1) for x in stats)

    def select(self, indices, seed=None):
        """Yields (B, 3, S, S) normalized images; an image's augmentation is a function of seed and its index."""
        indices = [index.cpu().numpy() for index in indices]  # all now: later it would wait for the GPU's queue
        self.loader.sampler[:] = [(self.inputs[i], i, seed) for i in indices]  # filled anew, so that the workers stay
        for images in self.loader:
            if isinstance(images, str):
                exit_with_error(images, everywhere=False)
            images = images.to(self.mean.device, non_blocking=True).permute(0, 3, 1, 2)
            yield (images.contiguous() - self.mean) / self.std  # NHWC strides under 4 filters crash torch on some CPUs


def ignore_interrupts(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the main process ends them


def load_images(config):
    if not os.path.isdir(config.dataset):
        exit_with_error(f"--image-size {config.image_size}: needs a folder of images, which {config.dataset} is not")
    (paths, labels), test, classes = scan_folder(config.dataset)
    size, rest = split_sizes(config, len(paths), len(test[1]))
    how = {"pin_memory": "cuda" in config.device, "worker_init_fn": ignore_interrupts, "num_workers": config.workers}
    loader = DataLoader(Decoder(config.image_size), None, sampler=[], persistent_workers=config.workers > 0, **how)
    parts = (paths[:size], labels[:size]), (paths[rest:], labels[rest:]), test
    splits = (Files(paths, labels.to(config.device), loader) for paths, labels in parts)
    return Data(*splits, (3, config.image_size, config.image_size), classes, augment=False)


def train(config):
    data = load_images(config) if config.image_size else load_data(config)
    fewest = (len(data.train.targets) % config.batch_size or config.batch_size) // config.processes
    if config.depth == 50 and max(data.shape[1:]) <= 32 and fewest < 2:
        exit_with_error("--depth 50: BatchNorm needs 2 images of 32x32 in the last batch; change --train-size")
    model = build_model(config, data, ResNet50 if config.depth == 50 else ResNet18)
    if config.depth == 50 and config.processes > 1 and "cuda" in config.device:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as in the paper's code; a CPU has none
    loss_fn = LOSSES[config.loss]
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)
    at_once = math.ceil(config.batch_size / config.processes) if config.image_size else 1000  # in evaluation

    for epoch in recorder.epochs():
        model.train()
        scores, share = Scores(loss_fn), 0  # share: of the last layer in |g|^2
        for step, (x, y) in enumerate(batches(data, config, epoch), start=(epoch - 1) * steps_per_epoch):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            outputs = model(x)
            loss_fn(outputs, y).backward()
            if sam:
                share += last_layer_share(model)
                drop_gradients(model, config.perturb)
                sam.perturb()
                with frozen_bn_stats(model):  # the statistics are those of the first pass alone
                    loss_fn(model(x), y).backward()
            if config.processes > 1:
                average_gradients(model, len(y))
            if sam:
                sam.step()  # restores w, then takes the optimizer's step
            else:
                optimizer.step()
            scores.add(outputs, y)
        row = {"epoch": epoch, "lr": lr, **scores.means("train_loss", "train_acc")}
        row |= evaluate(model, loss_fn, data.test, "test", at_once) | evaluate(model, loss_fn, data.val, "val", at_once)
        if sam:
            row["last_layer_share"] = from_main((share / steps_per_epoch).item())
        recorder.end_epoch(row)

    curvature = measure_sharpness(recorder, loss_fn, data.train, data.train.targets)
    recorder.finish(num_test=len(data.test.targets), sharpness=curvature)


if __name__ == "__main__":
    parser = flags(__doc__, SETTINGS, "filters")
    parser.add_argument("--depth", type=int, default=18, choices=[*SETTINGS], help="50: the ResNet for large images")
    text = "read a folder's images, of any size, when they are needed, and crop them to S x S"
    parser.add_argument("--image-size", type=bounded_number(int, 32), metavar="S", help=text)
    workers, text = min(4, os.cpu_count()), "processes that read them, for each GPU (default: %(default)s)"
    parser.add_argument("--workers", type=bounded_number(int, 0), default=workers, metavar="N", help=text)
    main(parser, train, lambda args: SETTINGS[args.depth])

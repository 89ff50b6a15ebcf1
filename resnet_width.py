r"""Does SAM's gain over SGD grow with a ResNet's width? The CIFAR-10 and ImageNet panels of the paper's Figure 1.

    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2
    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2 \
        --sam --rho 0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1
    python plot.py

A run of SGD at 64 filters takes about 7 minutes on an A100 (estimate), SAM twice that, and twice the filters 4 times
that. The paper's gains grow from 0.4 points at 4 filters to about 1 from 64 on; on ImageNet (README) from 0 to 0.5.
"""

import datetime
import math
import os
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from common import SAM, Recorder, Scores, batches, build_model, evaluate, frozen_bn_stats, learning_rate, load_data
from common import DATASETS, LOSSES, Data, ResNet18, convolution, lecun_normal_, open_image, scan_folder, split_sizes
from common import bounded_number, exit_with_error, flags, launched_by_torchrun, main

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the paper's, by --depth; all but the milestones have a flag of their own
# ----------------------------------------------------------------------------------------------------------------------

CIFAR10 = {
    "dataset": "cifar10",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,  # not Nesterov's
    "weight_decay": 5e-4,
    "loss": "ce",
    "schedule": "step",
    "milestones": (0.5, 0.75),
    "warmup": 0,
}

IMAGENET = {
    "dataset": "cifar10",  # until --dataset names a folder
    "epochs": 90,
    "batch_size": 512,
    "lr": 0.1,  # the paper's text; its code has 0.2
    "momentum": 0.9,
    "weight_decay": 1e-4,  # on all parameters
    "loss": "ce",
    "schedule": "cosine",  # the paper's text; its code has "step"
    "milestones": (0.25, 0.5, 0.75),  # of the code
    "warmup": 5000,  # which the code ignores
}

# ----------------------------------------------------------------------------------------------------------------------
# ResNet-50
# ----------------------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, inputs, width, outputs, stride):
        super().__init__()
        first = convolution(inputs, width, 1)
        second = convolution(width, width, 3, stride)
        third = convolution(width, outputs, 1)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU(), *third)
        nn.init.zeros_(self.branch[-1].weight)  # so that a block begins as its shortcut
        self.shortcut = nn.Sequential()

        if inputs != outputs:
            self.shortcut.extend(convolution(inputs, outputs, 1, stride))

    def forward(self, x):
        return torch.relu(self.branch(x) + self.shortcut(x))


def ResNet50(filters=64, channels=3, classes=1000):
    """The ImageNet ResNet-50 with `filters` channels after its stem: (B, channels, H, W) -> (B, classes) logits."""
    layers = [*convolution(channels, filters, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    inputs = filters

    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = filters * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(inputs, width, 4 * width, stride))
            inputs = 4 * width

    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return lecun_normal_(nn.Sequential(*layers))


# ----------------------------------------------------------------------------------------------------------------------
# Images of any size (--image-size), read from a folder when they are needed
# ----------------------------------------------------------------------------------------------------------------------


class Decoder:
    """Reads, crops and, if seeded, augments a batch of images, in a DataLoader's worker: (B, 3, size, size) uint8.

    A data set whose index is a whole batch, (paths, indices, seed), which Files.select puts into the loader's sampler;
    seed: the run's and the epoch, (seed, epoch), or None.
    """

    def __init__(self, size):
        from torchvision.transforms import v2  # here, since it takes a while

        bicubic = v2.InterpolationMode.BICUBIC
        random_crop = v2.RandomResizedCrop(size, (0.08, 1), interpolation=bicubic, antialias=True)
        self.augment = v2.Compose([random_crop, v2.RandomHorizontalFlip()])
        resize = v2.Resize(round(size * 8 / 7), interpolation=bicubic, antialias=True)
        self.crop = v2.Compose([resize, v2.CenterCrop(size)])

    def read(self, path, index, seed):
        image = open_image(os.fsdecode(path)).convert("RGB")
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # as tensors, crops and resizing are faster

        if not seed:
            return self.crop(image)

        key = np.random.default_rng((*seed, index)).integers(2**63)
        torch.default_generator.manual_seed(int(key))
        return self.augment(image)

    def __getitem__(self, batch):
        paths, indices, seed = batch
        try:
            with torch.random.fork_rng(devices=[]):  # without workers, this is the main process
                return torch.stack([self.read(path, index, seed) for path, index in zip(paths, indices)])
        except ValueError as error:
            return str(error)  # for the user; an exception would come with the worker's traceback


class Files:
    """A Split of images of any size: their paths, and the loader that all of a run's splits share, in turn."""

    def __init__(self, paths, targets, loader):
        self.inputs = paths
        self.targets = targets
        self.loader = loader
        mean = torch.tensor((0.485, 0.456, 0.406), device=targets.device)  # of ImageNet's channels
        std = torch.tensor((0.229, 0.224, 0.225), device=targets.device)
        self.mean = 255 * mean.view(3, 1, 1)
        self.std = 255 * std.view(3, 1, 1)

    def select(self, indices, seed=None):
        """Yields (B, 3, S, S) normalized images; an image's augmentation is a function of seed and its index."""
        indices = [index.cpu().numpy() for index in indices]  # all now: later it would wait for the GPU's queue
        self.loader.sampler[:] = [(self.inputs[i], i, seed) for i in indices]  # filled anew, so that the workers stay

        for images in self.loader:
            if isinstance(images, str):
                exit_with_error(images, everywhere=True)
            images = images.to(self.mean.device, non_blocking=True)
            yield (images - self.mean) / self.std


def leave_signals_to_the_main_process(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the main process ends them
    signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(0))
    # multiprocessing's thread that hands over a batch reports by this hook that the main process has gone.
    sys.excepthook = lambda *error: None


def load_images(config):
    if config.dataset in DATASETS:
        exit_with_error(f"--image-size {config.image_size}: needs --dataset FOLDER, not {config.dataset}")

    (paths, labels), (test_paths, test_labels), classes = scan_folder(config.dataset)
    size, rest = split_sizes(config, len(paths), len(test_paths))
    loader = DataLoader(
        Decoder(config.image_size),
        batch_size=None,
        sampler=[],
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        worker_init_fn=leave_signals_to_the_main_process,
        pin_memory="cuda" in config.device,
    )

    def split(paths, labels):
        return Files(paths, labels.to(config.device), loader)

    return Data(
        train=split(paths[:size], labels[:size]),
        val=split(paths[rest:], labels[rest:]),
        test=split(test_paths, test_labels),
        shape=(3, config.image_size, config.image_size),
        outputs=classes,
        augment=False,
        loss_fn=LOSSES[config.loss],
    )


# ----------------------------------------------------------------------------------------------------------------------
# Several processes (torchrun), each with a GPU and its share of every batch
# ----------------------------------------------------------------------------------------------------------------------


def start_processes():
    if not launched_by_torchrun():
        return

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())

    hours = datetime.timedelta(hours=2)  # while the main process downloads, or measures sharpness
    try:
        dist.init_process_group(backend, timeout=hours)
    except ValueError as error:
        exit_with_error(f"RANK and WORLD_SIZE are set, but not as torchrun sets them; unset RANK ({error})")


def average_gradients(model, size):
    """Makes each gradient its mean over the batch, of which this process had `size` images.

    A 1 goes along with the gradients, which the sum turns into the number of images in the batch.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_ones(1)])
    flat *= size
    dist.all_reduce(flat)
    *means, _ = (flat / flat[-1]).split([g.numel() for g in grads] + [1])

    for grad, mean in zip(grads, means):
        grad.copy_(mean.view_as(grad))


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def build(config, data):
    """The network of --depth. On several GPUs ResNet-50's BatchNorm is synchronized, as in the paper's code."""
    last_batch = len(data.train.targets) % config.batch_size or config.batch_size
    if config.depth == 50 and max(data.shape[1:]) <= 32 and last_batch // config.processes < 2:
        exit_with_error("--depth 50: BatchNorm needs 2 images of 32x32 in the last batch; change --train-size")

    model = build_model(config, data, ResNet50 if config.depth == 50 else ResNet18)
    if config.depth == 18 or config.processes == 1 or "cuda" not in config.device:  # a CPU has no SyncBatchNorm
        return model

    if config.compile:
        exit_with_error("--compile: can't be used with --depth 50 on several GPUs, whose BatchNorm is synchronized")
    # Slow: each of its 53 layers waits for the GPU 6 times a step of SAM.
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def train(config):
    """One run: config has one value of every flag."""
    data = load_images(config) if config.image_size else load_data(config)
    loss_fn = data.loss_fn
    model = build(config, data)
    optimizer = SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, data, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)

    at_once = 1000  # images, in evaluation
    if config.image_size:
        at_once = math.ceil(config.batch_size / config.processes)

    for epoch in recorder.epochs():
        model.train()
        scores = Scores(loss_fn)
        first_step = (epoch - 1) * steps_per_epoch

        for step, (x, y) in enumerate(batches(data, config, epoch), first_step):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            optimizer.zero_grad()
            outputs = model(x)
            loss_fn(outputs, y).backward()

            if sam:
                sam.perturb()  # w becomes w + e; each process has its own e, by the gradient of its share
                with frozen_bn_stats(model):  # the statistics are those of the first pass alone
                    loss_fn(model(x), y).backward()
                sam.restore()  # w again

            if config.processes > 1:
                average_gradients(model, len(y))
            optimizer.step()
            scores.add(outputs, y)

        row = {"epoch": epoch, "lr": lr}
        row.update(scores.means("train_loss", "train_acc"))
        row.update(evaluate(model, loss_fn, data.test, "test", at_once))
        row.update(evaluate(model, loss_fn, data.val, "val", at_once))
        recorder.end_epoch(row)

    recorder.finish()


if __name__ == "__main__":
    parser = flags(__doc__, "filters")
    text = "50: the ResNet for large images (default: 18)"
    parser.add_argument("--depth", type=int, default=18, choices=[18, 50], help=text)
    text = "read a folder's images, of any size, when they are needed, and crop them to S x S"
    parser.add_argument("--image-size", type=bounded_number(int, 32), metavar="S", help=text)
    text = "processes that read them, for each GPU (default: 4, or the number of cores where that is smaller)"
    workers = min(4, os.cpu_count())
    parser.add_argument("--workers", type=bounded_number(int, 0), default=workers, metavar="N", help=text)

    start_processes()
    main(parser, train, lambda args: IMAGENET if args.depth == 50 else CIFAR10)
    if dist.is_initialized():
        dist.destroy_process_group()

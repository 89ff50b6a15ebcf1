"""What the four experiment scripts share, chapter by chapter:

SAM and frozen_bn_stats (copy them out) · models · data and batches · loss, learning rate, evaluation · command line ·
a run's files and its resuming · sharpness

"The paper" is Shin, Lee, Andriushchenko, Lee: "Critical Influence of Overparameterization on Sharpness-aware
Minimization", UAI 2025, arXiv 2311.17539. SAM is Foret et al., ICLR 2021; its adaptive form Kwon et al., ICML 2021.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributed as dist
from torch import nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# SAM, and BatchNorm's running statistics during its second pass: copy them out
# ----------------------------------------------------------------------------------------------------------------------


class SAM:
    """Sharpness-aware minimization (Foret et al., ICLR 2021) around a torch optimizer, which alone holds state to save.

    After a backward pass, `perturb()` moves w to w + e and clears the gradients: e = rho g / |g|, with one L2 norm over
    all parameters that have a gradient (adaptive: e = rho w^2 g / |w g|, as in ASAM, Kwon et al., ICML 2021). After
    another backward pass, `step()` restores w bit for bit and takes the optimizer's step; `restore()` alone only
    restores. `step(closure)` does it all, where the closure clears the gradients, calls backward and returns the loss,
    and returns the loss at w.

    Parameters that FSDP2 shards have one norm over all shards; each process has to call `perturb()`. TypeError, with w
    as it was, for what has no param_groups and for sparse gradients; ValueError for a rho that is negative or not
    finite; RuntimeError for perturbing what is perturbed.
    """

    def __init__(self, optimizer, rho=0.05, adaptive=False):
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"SAM wraps an optimizer, such as torch.optim.SGD(...), not a {type(optimizer).__name__}")
        if not 0 <= float(rho) < float("inf"):
            raise ValueError(f"rho must be finite and not negative, but is {rho}")

        self.optimizer = optimizer
        self.rho = float(rho)
        self.adaptive = adaptive
        self.perturbed = []  # the weights that stand at w + e; of sharded ones this process's part
        self.copies = []  # of them at w; kept from step to step, since fresh memory costs page faults

    @torch.no_grad()
    def perturb(self):
        if self.perturbed:
            raise RuntimeError("the weights are perturbed already: call step() or restore() first")
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return
        if any(p.grad.layout != torch.strided for p in params):
            raise TypeError("SAM takes no sparse gradients: make them dense, as nn.Embedding(sparse=False) does")

        grads = [p.grad.to(torch.promote_types(p.dtype, torch.float32)) for p in params]  # float16 overflows
        scaled = torch._foreach_mul(grads, params) if self.adaptive else grads
        norms = [norm.to(params[0].device) for norm in torch._foreach_norm(scaled)]
        scale = self.rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
        if self.adaptive:
            torch._foreach_mul_(scaled, [p.conj() for p in params])  # |w|^2 where w is complex

        weights = [p.to_local() if hasattr(p, "to_local") else p for p in params]
        if [(c.shape, c.dtype, c.device) for c in self.copies] != [(w.shape, w.dtype, w.device) for w in weights]:
            self.copies = [torch.empty_like(w) for w in weights]
        torch._foreach_copy_(self.copies, weights)

        self.perturbed = weights
        torch._foreach_addcmul_(params, scaled, [scale.to(p.device) for p in params])
        for p in params:
            p.grad = None  # here, since the zero_grad() of a wrapper may do nothing

    @torch.no_grad()
    def restore(self):
        if self.perturbed:
            torch._foreach_copy_(self.perturbed, self.copies)
        self.perturbed = []

    def step(self, closure=None):
        loss = None
        try:
            if closure is not None:
                loss = closure()
                self.perturb()
                closure()
        finally:
            self.restore()

        self.optimizer.step()
        return loss


@contextlib.contextmanager
def frozen_bn_stats(model):
    """Running statistics stand still inside: for SAM's second pass, which is at w + e and not at the model's weights.

    BatchNorm and InstanceNorm in training mode go on normalizing with the batch's own statistics. spectral_norm keeps
    its singular vectors, fake quantization its range. On leaving, by an error too, each layer is as it was.
    """
    held = []  # (owner, name of the attribute, its value before)

    def hold(owner, name, value):
        held.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for m in model.modules():
            if isinstance(m, nn.modules.instancenorm._InstanceNorm):
                if m.training:  # in training, it updates whatever statistics it has
                    hold(m, "running_mean", None)
                    hold(m, "running_var", None)
            elif vars(m).get("track_running_stats"):  # a module's getattr is slow where there is nothing
                hold(m, "track_running_stats", False)

            if "n_power_iterations" in vars(m):  # of spectral_norm
                hold(m, "n_power_iterations", 0)
            for hook in m._forward_pre_hooks.values():  # and of the old one, which is a hook
                if hasattr(hook, "n_power_iterations"):
                    hold(hook, "n_power_iterations", 0)

            if "observer_enabled" in m._buffers:  # of fake quantization
                hold(m, "observer_enabled", torch.zeros_like(m.observer_enabled))
        yield
    finally:
        for owner, name, value in reversed(held):
            setattr(owner, name, value)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def lecun_normal_(model):
    """Draws the kernels from a normal truncated at two deviations, of variance 1 / fan_in; biases become 0."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            std = fan_in**-0.5 / 0.87962566103423978  # the deviation that truncation leaves of 1
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

            if module.bias is not None:
                nn.init.zeros_(module.bias)

    return model


def MLP(hidden=(300, 100), inputs=784, classes=10):
    """ReLU layers of the widths `hidden`: (B, ...) with `inputs` values each -> (B, classes) logits."""
    layers = [nn.Flatten()]

    for width in hidden:
        layers.append(nn.Linear(inputs, width))
        layers.append(nn.ReLU())
        inputs = width

    layers.append(nn.Linear(inputs, classes))
    return lecun_normal_(nn.Sequential(*layers))


def convolution(inputs, outputs, size, stride=1):
    """A convolution without bias, and the BatchNorm that follows it."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        first = convolution(inputs, outputs, 3, stride)
        second = convolution(outputs, outputs, 3)
        self.branch = nn.Sequential(*first, nn.ReLU(), *second)
        self.shortcut = nn.Sequential()

        if inputs != outputs:
            self.shortcut.extend(convolution(inputs, outputs, 1, stride))

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


def ResNet18(filters=64, channels=3, classes=10):
    """The CIFAR ResNet-18 with `filters` channels in its first stage: (B, channels, H, W) -> (B, classes) logits."""
    layers = [*convolution(channels, filters, 3), nn.ReLU()]
    inputs = filters

    for width in (filters, 2 * filters, 4 * filters, 8 * filters):
        stride = 1 if width == filters else 2
        layers.append(BasicBlock(inputs, width, stride))
        layers.append(BasicBlock(width, width, 1))
        inputs = width

    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return lecun_normal_(nn.Sequential(*layers))


def build_model(config, data, resnet=ResNet18):
    """The network that --hidden or --filters asks for, its initial weights a function of the seed alone."""
    torch.manual_seed(config.seed)

    if config.filters:
        return prepare(resnet(config.filters, data.shape[0], data.outputs), config)

    hidden = map(int, config.hidden.split("-"))
    return prepare(MLP(hidden, math.prod(data.shape), data.outputs), config)


def float32_outputs(module, inputs, outputs):
    return outputs.float() if outputs.dtype == torch.bfloat16 else outputs


def prepare(model, config):
    """The model on the run's device, in the memory format that suits it, with --amp and --compile as asked."""
    model = model.to(config.device)
    on_gpu = "cuda" in config.device

    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = not config.fp32
        torch.backends.cudnn.allow_tf32 = not config.fp32
        torch.backends.cudnn.benchmark = True

    kernels = [p for p in model.parameters() if p.ndim == 4]
    if kernels and (on_gpu or len(kernels[0]) >= 8):  # with fewer filters it is slower on a CPU
        model = model.to(memory_format=torch.channels_last)

    if config.amp:
        device_type = torch.device(config.device).type
        model.forward = torch.autocast(device_type, torch.bfloat16)(model.forward)
        model.register_forward_hook(float32_outputs)

    if config.compile:
        torch.compiler.reset()  # or the graphs of a sweep's earlier runs count, too
        # A graph for each batch size, mode and state of BatchNorm: two or three sizes in training, four in evaluation.
        torch._dynamo.config.cache_size_limit = 64
        model.compile(dynamic=False)

    return model


# ----------------------------------------------------------------------------------------------------------------------
# Data and batches
# ----------------------------------------------------------------------------------------------------------------------

TORCHVISION = {  # a data set's name on the command line, and torchvision's class
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
}

# train, val, test: a Split each; shape: of one input; outputs: how many the network has, one a class where targets are
# labels; augment: whether to crop and flip; loss_fn: of (B, outputs) and the targets of a batch, the mean over it
Data = namedtuple("Data", "train val test shape outputs augment loss_fn")


class Split(namedtuple("Split", "inputs targets")):
    """inputs: (N, C, H, W) uint8 images, or floats, which the model gets as they are; targets: (N,) int64 or (N, D)."""

    def select(self, indices, seed=None):
        """Yields the inputs of each tensor of indices. seed, (seed, epoch) in training, is for resnet_width.py's
        Files, which augment by themselves."""
        for index in indices:
            yield self.inputs.index_select(0, index)  # 15 times as fast as [] on a CPU


def torchvision_split(name, data_dir, train):
    """torchvision's images, (N, C, H, W) uint8, and labels, (N,) int64, downloaded where they are missing."""
    from torchvision import datasets  # here, since it takes seconds

    dataset_class = getattr(datasets, TORCHVISION[name])

    if name == "svhn":
        data = dataset_class(data_dir, split="train" if train else "test", download=True)
        return torch.as_tensor(data.data), torch.as_tensor(data.labels)

    data = dataset_class(data_dir, train=train, download=True)
    images = torch.as_tensor(data.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(data.targets)


@functools.lru_cache(maxsize=1)  # for the other runs of a sweep
def read_torchvision(name, data_dir):
    """torchvision's data set as ((images, labels), (test images, test labels)) in CPU memory."""

    def read():
        return torchvision_split(name, data_dir, train=True), torchvision_split(name, data_dir, train=False)

    try:
        parts = read() if is_main() else None
        from_main(None)  # the others wait until it has downloaded
        return parts or read()
    except Exception as error:  # torchvision raises all kinds: network, checksum, torn file, missing package
        exit_with_error(f"--dataset {name}: no download, or torn files to remove in --data-dir {data_dir} ({error!r})")


# A name, and a function of the config that returns ((inputs, targets), (test inputs, test targets)): tensors on the
# CPU. Scripts add their own.
DATASETS = {name: lambda config: read_torchvision(config.dataset, config.data_dir) for name in TORCHVISION}


def open_image(path):
    """The file's image, of mode L where it is grey, else RGB. ValueError, with its path, where it can't be taken."""
    try:
        with Image.open(path) as image:
            deep_colour = re.search(r";16[BLN]", str(image.tile[:1]))  # Pillow would keep the upper 8 bits alone
            if deep_colour or image.mode[0] in "IF":
                raise ValueError("its pixels have more than 8 bits; convert it to 8 bits")

            if image.mode == "P":
                image = image.convert("RGBA")  # or a transparent palette raises a warning

            grey = image.mode in ("1", "L", "LA", "La")
            return image.convert("L" if grey else "RGB")
    except Exception as error:  # Pillow raises all kinds over broken files
        raise ValueError(f"{path}: is not an image that can be read; replace or remove it ({error})") from error


def class_folder(folder):
    """(paths as bytes, labels (N,) int64, names of the classes) of a folder with a folder of images for each class."""
    from torchvision import datasets

    class Folder(datasets.ImageFolder):
        def find_classes(self, directory):
            names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
            names = [name for name in names if not name.startswith(".")]  # such as .ipynb_checkpoints

            if not names:
                raise FileNotFoundError(f"no folder of a class in {directory}")

            return names, {name: label for label, name in enumerate(names)}

    data = Folder(folder)
    order = np.random.default_rng(0).permutation(len(data.samples))  # the first N, and the last, have every class
    paths = np.array([os.fsencode(path) for path, _ in data.samples])
    return paths[order], torch.tensor(data.targets)[order], data.classes


@functools.lru_cache(maxsize=1)
def scan_folder(root):
    """((paths as bytes, labels), (test paths, test labels), number of classes) of a folder of class folders."""
    part = "test" if Path(root, "test").is_dir() else "val"
    if part == "test" and Path(root, "val").is_dir():
        tell(f"--dataset {root}: has test/ and val/; test/ is taken for testing")

    try:
        paths, labels, classes = class_folder(Path(root, "train"))
        test_paths, test_labels, test_classes = class_folder(Path(root, part))
    except OSError as error:  # no such folder, or none in it, or one without images
        needed = f"one of {', '.join(DATASETS)}, or a folder with train/ and test/, a folder of images for each class"
        exit_with_error(f"--dataset {root}: is not {needed} ({error})")

    differing = sorted({*classes} ^ {*test_classes})
    if differing:
        named = ", ".join(differing[:5])
        exit_with_error(f"--dataset {root}: train/ and {part}/ need the same classes; in one of them alone: {named}")

    if len(classes) < 2:
        exit_with_error(f"--dataset {root}: needs two or more classes, but train/ has {classes[0]} alone")

    return (paths, labels), (test_paths, test_labels), len(classes)


@functools.lru_cache(maxsize=1)
def read_folder(root):
    """The images of a folder of class folders, all of one size, as read_torchvision returns them."""
    (train, labels), (test, test_labels), _ = scan_folder(root)
    paths = [os.fsdecode(path) for path in (*train, *test)]
    images = []

    for path in tqdm(paths, f"reading {root}", disable=None, leave=False):
        try:
            pixels = np.asarray(open_image(path))
        except ValueError as error:
            exit_with_error(str(error))

        height, width = pixels.shape[:2]
        images.append(pixels.reshape(height, width, -1))
        if images[-1].shape != images[0].shape:
            exit_with_error(f"{path}: is {images[-1].shape}, not {images[0].shape}; try resnet_width.py --image-size")

    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (images[: len(train)], labels), (images[len(train) :], test_labels)


def split_sizes(config, images, tests):
    """(How many of the first training images are trained on, from which one on they are held out)."""
    rest = images - config.val_size
    size = config.train_size or rest

    if not max(1, config.sharpness) <= size <= rest:
        asked = f"--sharpness {config.sharpness}, --train-size {config.train_size or 'all'}"
        asked += f", --val-size {config.val_size}"
        exit_with_error(f"{asked}: too many for {images} training images, or the first larger than the second")

    last_batch = size % config.batch_size or config.batch_size
    if min(last_batch, config.val_size or tests, tests) < config.processes:
        exit_with_error(f"--batch-size, --val-size or {tests} test images: too few for {config.processes} processes")

    return size, rest


def pad_to_32(images):
    """(N, C, H, W) images with zeros around them, so that H and W are 32 or more."""
    height, width = images.shape[2:]
    rows = max(32 - height, 0)
    columns = max(32 - width, 0)
    return F.pad(images, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])


def load_data(config):
    """The run's Data on its device: the last val_size training images held out, the first train_size of the rest."""
    if config.dataset in DATASETS:
        (inputs, targets), (test_inputs, test_targets) = DATASETS[config.dataset](config)
    else:
        (inputs, targets), (test_inputs, test_targets) = read_folder(config.dataset)

    size, rest = split_sizes(config, len(targets), len(test_targets))
    regression = targets.is_floating_point()
    if regression and config.loss != "mse":
        exit_with_error(f"--loss {config.loss}: the targets of {config.dataset} are numbers, which need --loss mse")

    def split(inputs, targets):
        if config.filters and inputs.dtype == torch.uint8:
            inputs = pad_to_32(inputs)
        return Split(inputs.to(config.device).contiguous(), targets.to(config.device))

    train = split(inputs[:size], targets[:size])
    return Data(
        train=train,
        val=split(inputs[rest:], targets[rest:]),
        test=split(test_inputs, test_targets),
        shape=train.inputs.shape[1:],
        outputs=targets.shape[1] if regression else int(targets.max()) + 1,
        augment=config.dataset not in DATASETS or config.dataset.startswith("cifar"),
        loss_fn=LOSSES[config.loss],
    )


def crop_and_flip(images, moves, pad=4):
    """Pads (B, C, H, W) images and crops each to H x W; moves (B, 3): row and column, 0 to 2 pad, and 1 to flip."""
    batch, channels, height, width = images.shape
    rows = moves[:, :1] + torch.arange(height, device=images.device)
    columns = moves[:, 1:2] + torch.arange(width, device=images.device)
    columns = torch.where(moves[:, 2:] > 0, columns.flip(1), columns)

    pixels = rows[:, :, None] * (width + 2 * pad) + columns[:, None]
    pixels = pixels.view(batch, 1, -1).expand(-1, channels, -1)
    return F.pad(images, [pad] * 4).flatten(2).gather(2, pixels).view_as(images)


@functools.cache
def channel_stats(device, dtype):
    """Mean and deviation of CIFAR-10's channels, as (3, 1, 1) tensors."""
    mean = torch.tensor((0.4914, 0.4822, 0.4465), device=device, dtype=dtype)
    std = torch.tensor((0.2023, 0.1994, 0.2010), device=device, dtype=dtype)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def normalize(inputs):
    """uint8 images as the models take them: x / 255, and for three channels CIFAR-10's mean and deviation."""
    if inputs.dtype != torch.uint8:
        return inputs

    x = inputs / 255
    if inputs.shape[1] != 3:
        return x

    mean, std = channel_stats(x.device, x.dtype)
    return (x - mean) / std


def batches(data, config, epoch, *targets):
    """Yields an epoch's batches: the inputs, and their rows of each of `targets`, tensors of all training images'
    targets, which replace the data's own.

    Order and augmentation are functions of (seed, epoch): the same for SGD and SAM. The last, smaller batch is kept.
    """
    n = len(data.train.targets)
    rng = np.random.default_rng((config.seed, epoch))
    order = torch.from_numpy(rng.permutation(n)).to(config.device)
    if data.augment:
        moves = torch.from_numpy(rng.integers(0, (9, 9, 2), (n, 3))).to(config.device)

    ordered = [tensor[order] for tensor in targets or [data.train.targets]]
    rank, world = processes()
    shares = [slice(start + rank, start + config.batch_size, world) for start in range(0, n, config.batch_size)]
    indices = [order[share] for share in shares]

    for share, inputs in zip(shares, data.train.select(indices, (config.seed, epoch))):
        if data.augment:
            inputs = crop_and_flip(inputs, moves[share])
        yield normalize(inputs), *(tensor[share] for tensor in ordered)


# ----------------------------------------------------------------------------------------------------------------------
# Loss, learning rate, evaluation
# ----------------------------------------------------------------------------------------------------------------------


def squared_error(outputs, targets):
    """Summed over the outputs, mean over the batch; labels (B,) count as one-hot rows."""
    if not targets.is_floating_point():
        targets = targets[:, None] == torch.arange(outputs.shape[1], device=outputs.device)
    return ((outputs - targets.to(outputs.dtype)) ** 2).sum(1).mean()


LOSSES = {"ce": F.cross_entropy, "mse": squared_error}


def learning_rate(config, step, steps_per_epoch):
    """Of update `step`, from 0: linear warm-up to config.lr, then the schedule's course."""
    steps = config.epochs * steps_per_epoch

    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup

    if config.schedule == "cosine":
        angle = math.pi * (step - config.warmup) / (steps - config.warmup)
        return config.lr * (1 + math.cos(angle)) / 2

    if config.schedule == "step":
        passed = sum(step >= int(fraction * steps) for fraction in config.milestones)
        return config.lr * 0.1**passed

    return config.lr


class Scores:
    """Mean loss and accuracies over an epoch's batches, or a data set, without a wait for the device on the way."""

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn
        self.kept = []
        self.sums = 0

    def add(self, outputs, *targets):
        """A batch's outputs (B, D) and targets (B, ...): a loss on the first, an accuracy on each that are labels."""
        self.kept.append((outputs.detach(), *targets))
        if len(self.kept) == 64:  # a small network would take a fifth longer if each were scored
            self.reduce()

    def reduce(self):
        outputs, *targets = map(torch.cat, zip(*self.kept))
        guesses = outputs.argmax(1)
        count = outputs.new_full((), len(outputs))

        sums = [self.loss_fn(outputs, targets[0]) * count]
        for labels in targets:
            if not labels.is_floating_point():
                sums.append((guesses == labels).sum())

        self.sums = self.sums + torch.stack([*sums, count])
        self.kept = []

    def means(self, *names):
        """{name: mean} over all processes: first the loss's name, then one for the accuracy on each of the targets that
        were added; no accuracies where targets are numbers."""
        if self.kept:
            self.reduce()
        if dist.is_initialized():
            dist.all_reduce(self.sums)

        *sums, count = self.sums.tolist()
        return {name: total / count for name, total in zip(names, sums)}


@torch.inference_mode()
def evaluate(model, loss_fn, split, name, batch_size=1000):
    """{name_loss, name_acc} of the model in eval mode, each process scoring its share; {} of an empty split."""
    if not len(split.targets):
        return {}

    if dist.is_initialized():
        for buffer in model.buffers():  # BatchNorm's running statistics: the main process's
            dist.broadcast(buffer, 0)

    model.eval()
    scores = Scores(loss_fn)
    rank, world = processes()
    rows = torch.arange(rank, len(split.targets), world, device=split.targets.device).split(batch_size)

    for index, inputs in zip(rows, split.select(rows)):
        outputs = model(normalize(inputs))
        scores.add(outputs, split.targets[index])

    return scores.means(f"{name}_loss", f"{name}_acc")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def launched_by_torchrun():
    return all(name in os.environ for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"))


def processes():
    """This process's rank and their number: under torchrun (resnet_width.py) each has its share of every batch."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main():
    return not launched_by_torchrun() or os.environ["RANK"] == "0"


def from_main(value):
    """The main process's value, in every process; where it has ended over an error, and said so, all end."""
    box = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(box)
        except RuntimeError:
            sys.exit(2)
    return box[0]


def tell(message, everywhere=False):
    """One line on stderr, of the main process alone where all of them have it to say."""
    if everywhere or is_main():
        line = " ".join(f"{Path(sys.argv[0]).name}: {message}".split())
        tqdm.write(line, file=sys.stderr)


def exit_with_error(message, everywhere=False):
    """Ends the program over something the user can mend: one line on stderr, status 2."""
    tell(message, everywhere)
    sys.exit(2)


def bounded_number(kind, low, high=math.inf, closed=False):
    """An argparse type: an int or a float, at least `low` and below `high`; if closed, at most `high`."""

    def number(text):
        value = kind(text)
        below = value < high or (closed and value == high)
        if not (low <= value and below):
            limit = f"{'at most' if closed else 'below'} {high}" if high < math.inf else "finite"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and {limit}")
        return value

    number.__name__ = kind.__name__  # as argparse calls it
    return number


def hidden_layers(text):
    if not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})*", text):
        raise argparse.ArgumentTypeError(f"{text} must be widths of one or more layers, as in 100 or 300-100")
    return text


def dataset_name(text):
    """A known data set's name in lower case; else a folder, of which two spellings are one."""
    if text.lower() in DATASETS:
        return text.lower()

    folder = os.path.normpath(text)
    return os.path.abspath(folder) if folder in DATASETS else folder  # ./mnist is a folder, not the data set


def flags(doc, *models):
    """The parser of the flags that scripts share; models: `hidden` and `filters`, what picks the network's width.

    Where a default depends on the workload it is None here: the script's settings fill it in.
    """
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: exit_with_error(f"{message} (--help lists the flags)")
    parser.set_defaults(hidden=None, filters=None)

    count = bounded_number(int, 0)
    positive = bounded_number(int, 1)
    real = bounded_number(float, 0)

    either = len(models) == 2
    width = parser.add_mutually_exclusive_group(required=either)
    if "hidden" in models:
        default = None if either else "300-100"
        text = "widths of the MLP's hidden layers (default in mlp_width.py: 300-100)"
        width.add_argument("--hidden", type=hidden_layers, nargs="+", default=default, metavar="H[-H...]", help=text)
    if "filters" in models:
        default = None if either else 64
        text = "filters of the ResNet's first stage (default in resnet_width.py: 64)"
        filters = bounded_number(int, 1, 10**6)
        width.add_argument("--filters", type=filters, nargs="+", default=default, metavar="K", help=text)

    add = parser.add_argument
    add("--sam", action="store_true", help="SAM around SGD, instead of SGD alone")
    add("--rho", type=real, nargs="+", metavar="R", help="SAM's radius (default: 0.05)")
    add("--adaptive", action="store_true", help="ASAM's scaling of the perturbation")

    text = "passes over the training images (default: 100; CIFAR-10 200, ImageNet 90, curves 60)"
    add("--epochs", type=positive, metavar="N", help=text)
    text = "images a step, over all processes (default: 128; ImageNet 512, curves 6)"
    add("--batch-size", type=positive, metavar="N", help=text)
    text = "learning rate (default: 0.1; teacher 0.01, curves 1.5e-4)"
    add("--lr", type=bounded_number(float, 1e-12), metavar="X", help=text)
    text = "SGD's momentum (default: 0.9; teacher and curves 0)"
    add("--momentum", type=bounded_number(float, 0, 1), metavar="X", help=text)
    text = "L2 penalty, outside SAM's perturbation (default: 1e-4; CIFAR-10 5e-4, teacher and curves 0)"
    add("--weight-decay", type=real, metavar="X", help=text)
    text = "the learning rate's course (default: step; ImageNet cosine, curves constant). step: x0.1 after a quarter, "
    text += "half and three quarters; CIFAR-10 and teacher after half and three quarters"
    add("--schedule", choices=["step", "cosine", "constant"], help=text)
    text = "updates of linear warm-up of the learning rate (default: 0; ImageNet 5000)"
    add("--warmup", type=count, metavar="STEPS", help=text)
    text = "cross-entropy, or squared error summed over the outputs (default: ce; teacher and curves mse)"
    add("--loss", choices=[*LOSSES], help=text)
    text = "after training, measure the Hessian on the first N training images (default: 0, not at all)"
    add("--sharpness", type=count, default=0, metavar="N", help=text)

    text = "weights, data order, augmentation, flipped labels, pruning (default: 0)"
    add("--seed", type=bounded_number(int, 0, 2**63), nargs="+", default=[0], metavar="N", help=text)
    text = (
        f"{', '.join(DATASETS)}, or a folder with train/ and test/ class folders (default: mnist; a ResNet's cifar10)"
    )
    add("--dataset", type=dataset_name, metavar="NAME", help=text)
    text = "where torchvision finds its data, or downloads it to (default: data)"
    add("--data-dir", type=os.path.normpath, default="data", metavar="DIR", help=text)
    text = "only the first N training images (default: all that are not held out)"
    add("--train-size", type=positive, metavar="N", help=text)
    text = "hold the last N training images out and score them (default: 0)"
    add("--val-size", type=count, default=0, metavar="N", help=text)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, metavar="D", help="cuda, cuda:1, cpu ... (default: cuda where there is one)")
    text = "bfloat16 autocast: for rho from 0.05 on, since it blurs SAM's correction at smaller ones"
    add("--amp", action="store_true", help=text)
    add("--compile", action="store_true", help="torch.compile the model")
    text = "strict float32 on CUDA, no TF32: for rho below 0.01"
    add("--fp32", action="store_true", help=text)
    add("--results", default="results", metavar="DIR", help="where result files go (default: results)")
    add("--force", action="store_true", help="start anew although a result or a checkpoint exists")
    add("--save", action="store_true", help="leave the trained weights beside the result, as NAME.pt")
    return parser


def check(parser, args):
    """Ends the program over flags that do not go together, or a device that can't be used."""
    if not args.sam and (args.rho or args.adaptive):
        parser.error("--rho and --adaptive need --sam")

    if args.schedule == "step" and not args.milestones:
        parser.error("--schedule step: this training has no milestones; give it some, in the script's settings")

    if args.processes > 1 and re.fullmatch(r"cuda:\d+", args.device):
        parser.error(f"--device {args.device}: under torchrun each process takes a GPU of its own; give --device cuda")

    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        exit_with_error(f"--device {args.device}: cannot be used here ({reason})")


def parse(parser, settings_of):
    """Every run that the command line asks for, as a namespace of single values, with its name and its defaults."""
    args = parser.parse_args()
    settings = {**settings_of(args), "script": Path(sys.argv[0]).stem, "processes": processes()[1]}
    for flag, default in settings.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, default)

    defaults = {flag: parser.get_default(flag) for flag in vars(args)}
    defaults.update(settings)
    defaults["processes"] = 1  # so that a run on several has them in its name
    for flag, default in defaults.items():
        if isinstance(default, list):
            defaults[flag] = default[0]

    check(parser, args)
    if args.sam and args.rho is None:
        args.rho = 0.05

    several = {flag: dict.fromkeys(values) for flag, values in vars(args).items() if isinstance(values, list)}
    configs = []
    for values in itertools.product(*several.values()):
        config = argparse.Namespace(**vars(args))
        vars(config).update(zip(several, values))
        config.defaults = defaults
        config.name = run_name(config)
        configs.append(config)

    return configs


# ----------------------------------------------------------------------------------------------------------------------
# A run's files, and its resuming
# ----------------------------------------------------------------------------------------------------------------------

# Where and how a run happens, not what it computes: left out of its name, and of `difference`. (data_dir is not:
# another folder may hold other data.)
WHERE_AND_HOW = {"device", "results", "force", "save", "workers", "name", "defaults"}

# What stands in a run's name in a place of its own; any other flag, one of your own too, is added to it where it is
# not at its default.
NAMED_FIRST = {"script", "dataset", "hidden", "filters", "noise", "pruner", "sparsity"}
NAMED_FIRST |= {"sam", "rho", "adaptive", "seed", "perturb"}


def run_name(config):
    """Whatever differs from run to run, so that no two share a file: the sweep's flags first, then the unusual ones."""
    parts = [config.dataset]

    if config.hidden:
        parts.append(f"mlp{config.hidden}")
    elif config.filters:
        parts.append(f"resnet{config.filters}")
    else:
        parts.append(config.script)

    if "noise" in config:
        parts.append(f"noise{config.noise}")
    if "sparsity" in config:
        parts.append(f"{config.pruner}{config.sparsity}")

    if config.sam:
        method = "asam" if config.adaptive else "sam"
        parts.append(f"{method}-rho{config.rho}")
    else:
        parts.append("sgd")  # without SAM; another base optimizer's flag is named below, where not at its default
    parts.append(f"seed{config.seed}")

    if "perturb" in config and config.perturb != "all":  # here, and not in the loop, since shipped files have it here
        parts.append(f"perturb={config.perturb}")

    for flag, value in vars(config).items():
        if flag not in NAMED_FIRST | WHERE_AND_HOW and value != config.defaults[flag]:
            flag = flag.replace("_", "-")
            parts.append(flag if value is True else f"{flag}={value}")

    name = quote(os.fsencode("_".join(parts)), safe="=")
    if len(name) < 180:
        return name
    return f"{name[:160]}-{uuid.uuid5(uuid.NAMESPACE_URL, name).hex[:16]}"


def result_path(config):
    return Path(config.results, config.script, config.name + ".json")


def write(path, content):
    """A file with these bytes: it appears whole or not at all, whoever else writes it and if the power goes."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        exit_with_error(f"--results: can't write to {path.parent} ({error.strerror}); what was there is intact")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_tensors(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def set_aside(path, reason):
    """Renames a file that is not this run's, to a name of its own, and says so."""
    for number in itertools.count():
        aside = path.with_name(f"{path.name}.bad{number or ''}")
        if not aside.exists():
            break

    tell(f"{path}: not this run's, or torn ({reason}); now {aside.name}; the run starts anew")
    with contextlib.suppress(FileNotFoundError):  # another process has moved it
        path.replace(aside)


def load_file(path):
    """The object in a result file or a checkpoint; anything may be raised over a damaged one."""
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))

    if zipfile.ZipFile(path).testzip():  # torch's format; checks every byte
        raise ValueError("damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def as_json(value):
    """As it is after its way through a file: tuples are lists."""
    return json.loads(json.dumps(value))


def difference(content, config):
    """In which settings a file's run is another one; a flag that it lacks has its default."""
    theirs = as_json({**config.defaults, **content["config"]})
    differing = []

    for flag, value in as_json(vars(config)).items():
        if flag not in WHERE_AND_HOW and theirs[flag] != value:
            differing.append(f"{flag} {theirs[flag]}, not {value}")

    return ", ".join(differing)


def read_own(path, config):
    """The result or checkpoint at `path` where it is this run's, else None; one torn or of another run is set aside."""
    try:
        content = load_file(path)
        reason = difference(content, config)
    except FileNotFoundError:
        return None
    except OSError as error:  # the disk's, not the file's
        exit_with_error(f"--results: {path} can't be read ({error.strerror}); it is left as it is")
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise
        reason = f"{type(error).__name__} {error}".splitlines()[0]

    if not reason:
        return content
    set_aside(path, reason)
    return None


@functools.cache
def environment(device):
    """Versions and machine, as result files hold them."""
    command = "git rev-parse HEAD"
    git = subprocess.run(command, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)

    if "cuda" in device:
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # rounding depends on AVX512 or not

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": version("torchvision"),
        "device": name,
        "threads": torch.get_num_threads(),
        "commit": git.stdout.strip() or None,
    }


def describe(row):
    if "test_acc" in row:
        return f"test {row['test_acc']:.2%}"
    return f"test loss {row['test_loss']:.4f}"


class Recorder:
    """A run's way to disk: goes on from its checkpoint, keeps the history, writes the result file at the end."""

    def __init__(self, config, data, model, optimizer):
        self.config = config
        self.data = data
        self.model = model
        self.optimizer = optimizer
        self.path = result_path(config)
        self.checkpoint = self.path.with_suffix(".ckpt")
        self.history = []
        self.status = "done"
        self.env = environment(config.device)
        self.resume()

        now = time.perf_counter()
        self.epoch_began = now
        self.saved = now
        self.printed = now
        self.save_cost = 0.0
        self.bar = tqdm(
            total=config.epochs,
            initial=len(self.history),
            bar_format="{n}/{total} |{bar:20}| {remaining} left{postfix}",
            disable=None if is_main() else True,
            leave=False,
        )

    def resume(self):
        """Loads the run's checkpoint, if there is one; the main process alone reads it."""
        if is_main() and self.config.force:
            self.checkpoint.unlink(missing_ok=True)

        state = from_main(read_own(self.checkpoint, self.config) if is_main() else None)
        if state is None:
            return

        try:
            self.load(state)
        except (ValueError, KeyError, TypeError) as error:  # a whole file, but its script was another
            if is_main():
                set_aside(self.checkpoint, error)

    def load(self, state):
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        saved_shapes = {name: tensor.shape for name, tensor in state["model"].items()}
        if shapes != saved_shapes:
            raise ValueError("another model")

        history = state["history"]  # what can raise comes before any change
        env = state["env"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        self.history = history
        self.env = env  # of the run's beginning: the commit may be another now

        for parameter, buffers in self.optimizer.state.items():
            for key, value in buffers.items():
                # A fused kernel needs a state of w's shape to have w's strides; another device may have saved others.
                if getattr(value, "shape", None) == parameter.shape:
                    buffers[key] = torch.empty_like(parameter, requires_grad=False).copy_(value)

    def save(self):
        began = time.perf_counter()
        state = {
            "config": as_json(vars(self.config)),
            "history": self.history,
            "env": self.env,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_tensors(self.checkpoint, state)
        self.saved = time.perf_counter()
        self.save_cost = self.saved - began

    def epochs(self):
        """Yields the epochs still to do, from 1, and none after one that diverged; end each with end_epoch."""
        while len(self.history) < self.config.epochs and self.status == "done":
            yield len(self.history) + 1

    def end_epoch(self, row):
        """Adds an epoch's numbers to the history, or ends the run over one not finite; saves a checkpoint if due."""
        now = time.perf_counter()
        row["seconds"] = round(now - self.epoch_began, 4)
        not_finite = [name for name, value in row.items() if not math.isfinite(value)]
        if not_finite:
            tell(f"{self.config.name}: ends as diverged in epoch {row['epoch']}: {', '.join(not_finite)} not finite")
            self.status = "diverged"
            return

        self.history.append(row)
        left = self.config.epochs - row["epoch"]
        numbers = f"loss {row['train_loss']:.4f}, {describe(row)}"
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()

        if is_main() and self.bar.disable and left and now - self.printed >= 30:  # no terminal: a line now and then
            wait = datetime.timedelta(seconds=round(left * row["seconds"]))
            print(f"epoch {row['epoch']} of {self.config.name}: {numbers}, {wait} left", flush=True)
            self.printed = now

        due = now - self.saved >= max(1, 50 * self.save_cost)  # at most 2% of the time goes into checkpoints
        more_to_come = self.config.sharpness or self.config.save  # after the last epoch, which may fail
        if is_main() and (due or (more_to_come and not left)):
            self.save()
        self.epoch_began = time.perf_counter()

    def finish(self, targets=None, masks=None, **more):
        """Writes the result file, with whatever `more` is not None, and removes the checkpoint.

        Before, measures --sharpness: on `targets`, the labels trained on, where they are not data.train's, and where
        masks are given, one for each parameter, under them.
        """
        self.bar.close()
        if not is_main():
            return

        last = self.history[-1] if self.history else {}
        accuracies = [row["test_acc"] for row in self.history if "test_acc" in row]
        num_params = sum(p.numel() for p in self.model.parameters())
        seconds = sum(row["seconds"] for row in self.history)

        result = {
            "config": {flag: value for flag, value in vars(self.config).items() if flag not in ("name", "defaults")},
            "defaults": self.config.defaults,
            "num_params": num_params,
            "num_nonzero": num_params,
            "status": self.status,
            "test_acc": last.get("test_acc"),
            "test_loss": last.get("test_loss"),
            "train_loss": last.get("train_loss"),
            "best_test_acc": max(accuracies, default=None),
            "env": {**self.env, "seconds": round(seconds, 3)},
            "num_test": len(self.data.test.targets),
        }
        if self.config.save and self.status == "done":
            save_tensors(self.path.with_suffix(".pt"), self.model.state_dict())
        if self.config.sharpness and self.status == "done":
            result["sharpness"] = self.measure_sharpness(targets, masks)
        for key, value in more.items():
            if value is not None:
                result[key] = value

        head = json.dumps(result, allow_nan=False)[:-1]
        history = json.dumps(self.history, allow_nan=False).replace("}, {", "},\n{")  # a line an epoch
        write(self.path, f'{head},\n"history": {history}}}\n'.encode())
        self.clean_up()

        outcome = describe(last) if last else "no finite epoch"
        if accuracies:
            outcome += f" (best {max(accuracies):.2%})"
        print(f"{self.status}: {self.config.name}: {outcome}, {seconds:.0f} s", flush=True)

    def measure_sharpness(self, targets, masks):
        """`sharpness` on the run's first training images, in float32, and without torch.compile, which copies lack."""
        train = self.data.train
        targets = train.targets if targets is None else targets
        first = torch.arange(self.config.sharpness, device=targets.device)

        torch.backends.cuda.matmul.allow_tf32 = False  # the next run sets them anew
        torch.backends.cudnn.allow_tf32 = False
        vars(self.model).pop("forward", None)  # without --amp

        images = normalize(*train.select([first]))
        numbers = sharpness(self.model, self.data.loss_fn, images, targets[first], masks)
        return {key: value if math.isfinite(value) else None for key, value in numbers.items()}  # JSON has no infinity

    def clean_up(self):
        """Removes the checkpoint, and what a killed process left of a file it was writing."""
        self.checkpoint.unlink(missing_ok=True)
        for path in self.path.parent.glob(f"{self.config.name}.*.tmp"):  # the name is quoted: no * nor ?
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 60:
                    path.unlink()


def stop(signum, frame):
    tell("stopped; the same command goes on from the last checkpoint")
    sys.exit(128 + signum)


def unfinished(configs):
    """The runs that have no result yet, by the main process's word; a folder that can't be written to ends it here."""
    if not is_main():
        return from_main(None)

    todo = []
    for config in configs:
        path = result_path(config)
        result = None if config.force else read_own(path, config)
        if not result:
            todo.append(config)
        elif config.save and result["status"] == "done" and not path.with_suffix(".pt").exists():
            tell(f"{config.name}: is finished, but without --save; --force trains it again")

    print(f"{len(configs)} runs, {len(configs) - len(todo)} already finished", flush=True)
    if todo:
        probe = result_path(todo[0]).with_name(".probe")
        write(probe, b"")
        probe.unlink(missing_ok=True)

    return from_main(todo)


def warn_about_precision(configs):
    """Says once where rounding hides what SAM adds, g(w + e) - g(w)."""
    for config in configs:
        if not config.sam or config.adaptive or config.rho == 0:
            continue

        if config.amp and config.rho < 0.05:
            tell(f"--amp: bfloat16 blurs SAM's correction at --rho {config.rho}; it is for 0.05 and more")
            return

        tf32 = "cuda" in config.device and not config.fp32
        if tf32 and config.rho < 0.01:
            tell(f"TF32 blurs SAM's correction at --rho {config.rho}; give --fp32 below 0.01")
            return


def main(parser, train, settings_of):
    """Calls train(config) for each run asked for that has no result.

    settings_of: a function of the parsed flags, a script's own too, that returns the workload's {flag: default}. Flags
    that were not given are None, and get these.
    """
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

    if launched_by_torchrun() and os.environ["WORLD_SIZE"] != "1" and not dist.is_initialized():
        exit_with_error("several processes are for resnet_width.py alone; without torchrun, start one command a run")

    todo = unfinished(parse(parser, settings_of))
    warn_about_precision(todo)

    for number, config in enumerate(todo, start=1):
        if is_main() and sys.stderr.isatty():
            print(f"run {number} of {len(todo)}: {config.name}")

        try:
            train(config)
        except (RuntimeError, MemoryError) as error:
            out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "alloc" in str(error).lower()
            if not out_of_memory:
                raise
            exit_with_error(f"{config.name}: needs more memory: try a smaller --batch-size or width", everywhere=True)

        gc.collect()  # models under --amp and --compile hold themselves


# ----------------------------------------------------------------------------------------------------------------------
# Sharpness
# ----------------------------------------------------------------------------------------------------------------------


def largest_eigenpair(product, vector, tolerance=1e-4, basis=24, restarts=40):
    """Largest eigenvalue of a symmetric matrix, known by `product` (n,) -> (n,), and |Av - cv| / |c| of its vector."""
    for _ in range(restarts):  # of Lanczos iteration, orthogonalized in full, from the best vector so far
        vectors = []
        images = []

        while len(images) < basis and vector.norm() > 1e-6 * (images[-1].norm() if images else 0):
            vectors.append(vector / vector.norm())
            images.append(product(vectors[-1]))

            vector = images[-1]
            for v in 2 * vectors:  # going over them once would leave rounding errors that grow
                vector = vector - (v @ vector) * v

        vectors = torch.stack(vectors)
        images = torch.stack(images)
        projected = (vectors @ images.T).double()
        values, combinations = torch.linalg.eigh((projected + projected.T) / 2)

        value = values[-1].item()
        combination = combinations[:, -1].to(vectors.dtype)
        vector = combination @ vectors
        residual = (combination @ images - value * vector).norm().item() / max(abs(value), 1e-30)
        if residual <= tolerance:
            break

    return value, residual


def sharpness(model, loss, images, targets, masks=None, probes=100):
    """Curvature of the mean of loss(model(images), targets) at the model's weights, in eval mode; moves nothing.

    loss: the mean over its batch, of (B, D) outputs and (B, ...) targets. masks: for each parameter a tensor like it, 0
    where a weight is pruned: such directions do not count. A dict of numbers, of Section 6 of the paper:
    `images`, how many; `lambda_max`, the Hessian's largest eigenvalue, and `trace`; `s2`, the root of the largest
    eigenvalue of mean_i H_i^2 - H^2 over the images' Hessians; `*_residual`, |Av - cv| / |c| of the eigenvector found;
    `trace_se`, the standard error over random probes, 0 where the network is so small that the trace is computed whole.
    """
    model = copy.deepcopy(model).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if masks is None:
        masks = [torch.ones_like(w) for w in weights.values()]

    mask = torch.cat([m.flatten() for m in masks])
    count = len(mask)
    sizes = [w.numel() for w in weights.values()]
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own, at the first jvp

    def hessian_product(vector, x, y):
        """The Hessian of the mean loss of this batch, times a vector (count,)."""

        def loss_of(weights):
            return loss(torch.func.functional_call(model, weights, (x,)), y)

        parts = (mask * vector).split(sizes)
        tangents = {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}
        _, product = torch.func.jvp(torch.func.grad(loss_of), (weights,), (tangents,))
        return mask * torch.cat([p.flatten() for p in product.values()])

    def image_product(vector, x, y):
        """One image's Hessian, twice, times a vector."""
        once = hessian_product(vector, x[None], y[None])
        return hessian_product(once, x[None], y[None])

    def mean_product(vector):
        """H v."""
        total = 0
        for x, y in zip(images.split(250), targets.split(250)):
            total = total + len(x) * hessian_product(vector, x, y)
        return total / len(images)

    def spread_product(vector):
        """(mean_i H_i^2 - H^2) v."""
        chunk = max(1, min(64, 2**23 // count))
        total = 0
        for x, y in zip(images.split(chunk), targets.split(chunk)):
            total = total + torch.vmap(image_product, (None, 0, 0))(vector, x, y).sum(0)
        return total / len(images) - mean_product(mean_product(vector))

    rng = torch.Generator().manual_seed(0)
    start = mask * torch.randn(count, generator=rng).to(mask)
    lambda_max, residual = largest_eigenpair(mean_product, start)
    spread, spread_residual = largest_eigenpair(spread_product, start)

    if count <= 4096:
        trace = sum(v @ mean_product(v) for v in torch.eye(count).to(mask)).item()
        trace_se = 0.0
    else:
        traces = []
        for _ in range(probes):
            signs = 2 * torch.randint(2, (count,), generator=rng).to(mask) - 1
            traces.append(signs @ mean_product(signs))
        traces = torch.stack(traces)
        trace = traces.mean().item()
        trace_se = traces.std().item() / probes**0.5

    return {
        "images": len(images),
        "lambda_max": lambda_max,
        "lambda_max_residual": residual,
        "trace": trace,
        "trace_se": trace_se,
        "s2": max(spread, 0) ** 0.5,
        "s2_residual": spread_residual,
    }

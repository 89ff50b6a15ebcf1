"""What the four experiment scripts share, in this order: `SAM` (copy it out), `frozen_bn_stats`, `MLP`, `ResNet18`;
data and its batches; loss, learning rate, evaluation, sharpness; several processes; flags; a run's way to disk.

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


def lecun_normal_(model):
    """Kernels ~ normal, truncated at two deviations and rescaled to variance 1 / fan_in; biases 0."""
    for m in model.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            std = m.weight[0].numel() ** -0.5 / 0.87962566103423978  # the deviation that truncation leaves of 1
            nn.init.trunc_normal_(m.weight, std=std, a=-2 * std, b=2 * std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return model


def MLP(hidden=(300, 100), inputs=784, classes=10):
    """ReLU layers of the widths `hidden`: (B, ...) with `inputs` values each -> (B, classes) logits."""
    widths = (inputs, *hidden)
    layers = [m for pair in zip(widths, widths[1:]) for m in (nn.Linear(*pair), nn.ReLU())]
    return lecun_normal_(nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], classes)))


def convolution(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        first = convolution(inputs, outputs, 3, stride)
        self.branch = nn.Sequential(*first, nn.ReLU(), *convolution(outputs, outputs, 3))
        self.shortcut = nn.Sequential(*(convolution(inputs, outputs, 1, stride) if inputs != outputs else ()))

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x))


def ResNet18(filters=64, channels=3, classes=10):
    """The CIFAR ResNet-18 with `filters` channels in its first stage: (B, channels, H, W) -> (B, classes) logits."""
    layers = [*convolution(channels, filters, 3), nn.ReLU()]
    widths = [filters, filters, 2 * filters, 4 * filters, 8 * filters]
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [BasicBlock(inputs, outputs, 1 if inputs == outputs else 2), BasicBlock(outputs, outputs, 1)]
    return lecun_normal_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * filters, classes)))


class Split(namedtuple("Split", "inputs targets")):
    """inputs: (N, C, H, W) uint8 images, or floats, which the model gets as they are; targets: (N,) int64 or (N, D)."""

    def select(self, indices, seed=None):
        """Yields the inputs of each tensor of indices. seed, (seed, epoch) in training: for inputs that augment."""
        for index in indices:
            yield self.inputs.index_select(0, index)  # 15 times as fast as [] on a CPU


Data = namedtuple("Data", "train val test shape outputs augment")  # shape: of an input; outputs: how many


@functools.lru_cache(maxsize=1)
def read_torchvision(name, data_dir):
    """torchvision's data set as ((images, labels), (test images, test labels)) in CPU memory, downloaded if need be."""
    from torchvision import datasets  # here, since it takes seconds

    def read(train):
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        data = getattr(datasets, TORCHVISION[name])(data_dir, download=True, **which)
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.labels if name == "svhn" else data.targets)
        return images[:, None] if images.ndim == 3 else images if name == "svhn" else images.permute(0, 3, 1, 2), labels

    try:
        parts = (read(True), read(False)) if is_main() else None
        from_main(None)  # the others wait until it has downloaded
        return parts or (read(True), read(False))
    except Exception as error:  # torchvision raises all kinds: network, checksum, torn file, missing package
        exit_with_error(f"--dataset {name}: no download, or torn files to remove in --data-dir {data_dir} ({error!r})")


TORCHVISION = {name.lower(): name for name in ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN")}
# Name -> function of the config: ((inputs, targets), (test inputs, test targets)), CPU tensors; scripts add their own
DATASETS = {name: lambda config: read_torchvision(config.dataset, config.data_dir) for name in TORCHVISION}


def open_image(path):
    """The file's image, 8 bits deep: of mode L where it is grey, else RGB. ValueError, with its path, if it is none."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 bits, which convert() would cut off at 255; bytes() refuses more than them
                image = Image.frombytes("L", image.size, bytes((np.asarray(image) >> 8).ravel().tolist()))
            opaque = image.convert("RGBA") if image.mode == "P" else image  # or a transparent palette raises a warning
            return opaque.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    except Exception as error:  # Pillow raises all kinds over broken files
        raise ValueError(f"{path}: is not an image that can be read; replace or remove it ({error})") from error


@functools.lru_cache(maxsize=1)
def scan_folder(root):
    """((paths as bytes, labels), (test paths, test labels), number of classes) of a folder of class folders."""
    from torchvision import datasets

    def shuffled(data):  # in one order for all: the first N images, and the last N, have every class
        order = np.random.default_rng(0).permutation(len(data.samples))
        return np.array([os.fsencode(path) for path, _ in data.samples])[order], torch.tensor(data.targets)[order]

    parts = "train", "test" if Path(root, "test").is_dir() else "val"
    try:
        train, test = (datasets.ImageFolder(Path(root, part)) for part in parts)
    except OSError as error:  # no such folder, or none in it, or one without images
        needed = f"one of {', '.join(DATASETS)}, or a folder with train/ and test/, a folder of images for each class"
        exit_with_error(f"--dataset {root}: is not {needed} ({error})")
    if len(train.classes) < 2 or train.classes != test.classes:
        exit_with_error(f"--dataset {root}: needs two or more classes, the same for training and for test images")
    return shuffled(train), shuffled(test), len(train.classes)


@functools.lru_cache(maxsize=1)
def read_folder(root):
    """The images of a folder of class folders, all of one size, as read_torchvision returns them."""
    (train, labels), (test, test_labels), _ = scan_folder(root)
    images = []
    for path in map(os.fsdecode, tqdm([*train, *test], f"reading {root}", disable=None, leave=False)):
        try:
            pixels = np.asarray(open_image(path))
        except ValueError as error:
            exit_with_error(str(error))
        images.append(pixels.reshape(*pixels.shape[:2], -1))
        if images[-1].shape != images[0].shape:
            exit_with_error(f"{path}: is {images[-1].shape}, not {images[0].shape}; try resnet_width.py --image-size")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (images[: len(train)], labels), (images[len(train) :], test_labels)


def split_sizes(config, images, tests):
    """(How many of the first training images are trained on, from which one on they are held out)."""
    rest = images - config.val_size
    size = config.train_size or rest
    if not max(1, config.sharpness) <= size <= rest:
        got = f"--sharpness {config.sharpness}, --train-size {config.train_size or 'all'}, --val-size {config.val_size}"
        exit_with_error(f"{got}: too many for {images} training images, or the first larger than the second")
    fewest = min(config.batch_size, size % config.batch_size or config.batch_size, config.val_size or tests, tests)
    if fewest < config.processes:
        exit_with_error(f"--batch-size, --val-size or {tests} test images: too few for {config.processes} processes")
    return size, rest


def load_data(config):
    """The run's Data on its device: the last val_size training images held out, the first train_size of the rest."""
    (inputs, targets), test = DATASETS.get(config.dataset, lambda config: read_folder(config.dataset))(config)
    size, rest = split_sizes(config, len(targets), len(test[1]))
    if targets.is_floating_point() and config.loss != "mse":
        exit_with_error(f"--loss {config.loss}: the targets of {config.dataset} are numbers, which need --loss mse")

    def split(inputs, targets):
        if config.filters and inputs.dtype == torch.uint8:  # a ResNet takes 32 x 32 or more
            gaps = [max(32 - side, 0) for side in (inputs.shape[3], inputs.shape[2])]
            inputs = F.pad(inputs, [pad for gap in gaps for pad in (gap // 2, gap - gap // 2)])
        return Split(inputs.to(config.device).contiguous(), targets.to(config.device))

    train, val = split(inputs[:size], targets[:size]), split(inputs[rest:], targets[rest:])
    outputs = targets.shape[1] if targets.is_floating_point() else int(targets.max()) + 1
    augment = config.dataset not in DATASETS or config.dataset.startswith("cifar")
    return Data(train, val, split(*test), train.inputs.shape[1:], outputs, augment)


def crop_and_flip(images, moves, pad=4):
    """Pads (B, C, H, W) images and crops each to H x W; moves (B, 3): row and column, 0 to 2 pad, and 1 to flip."""
    height, width = images.shape[2:]
    rows = moves[:, :1] + torch.arange(height, device=images.device)
    cols = moves[:, 1:2] + torch.arange(width, device=images.device)
    cols = torch.where(moves[:, 2:] > 0, cols.flip(1), cols)
    pixels = (rows[:, :, None] * (width + 2 * pad) + cols[:, None]).view(len(images), 1, -1)
    return F.pad(images, [pad] * 4).flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).view_as(images)


@functools.cache
def channel_stats(device, dtype):
    stats = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # mean and deviation of CIFAR-10's channels
    return [torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1) for values in stats]


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
    """Yields an epoch's batches, this process's share of each: inputs, their rows of every `targets` (train's own)."""
    rng, n = np.random.default_rng((config.seed, epoch)), len(data.train.targets)  # the same for SGD and SAM
    order = torch.from_numpy(rng.permutation(n)).to(config.device)
    targets = [tensor[order] for tensor in targets or [data.train.targets]]
    if data.augment:
        moves = torch.from_numpy(rng.integers(0, (9, 9, 2), (n, 3))).to(config.device)
    rank, world = processes()
    shares = [slice(start + rank, start + config.batch_size, world) for start in range(0, n, config.batch_size)]
    inputs_of = data.train.select([order[share] for share in shares], (config.seed, epoch))
    for share, inputs in zip(shares, inputs_of):
        if data.augment:
            inputs = crop_and_flip(inputs, moves[share])
        yield normalize(inputs), *(tensor[share] for tensor in targets)


def build_model(config, data, resnet=ResNet18):
    """The network that --hidden or --filters asks for, its initial weights a function of the seed alone."""
    torch.manual_seed(config.seed)
    if config.filters:
        return prepare(resnet(config.filters, data.shape[0], data.outputs), config)
    return prepare(MLP(map(int, config.hidden.split("-")), math.prod(data.shape), data.outputs), config)


def prepare(model, config):
    """A model on the run's device, in the memory format that suits it, with --amp and --compile as asked."""
    model = model.to(config.device)
    if "cuda" in config.device:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not config.fp32
        torch.backends.cudnn.benchmark = True
    filters = next((len(p) for p in model.parameters() if p.ndim == 4), 0)
    if filters and ("cuda" in config.device or filters >= 8):  # on a CPU it is slower for fewer
        model = model.to(memory_format=torch.channels_last)
    if config.amp:
        model.forward = torch.autocast(torch.device(config.device).type, torch.bfloat16)(model.forward)
        model.register_forward_hook(lambda model, inputs, outputs: outputs.float())
    if config.compile:
        torch.compiler.reset()  # or the graphs of a sweep's earlier runs exhaust its limit
        model.compile()
    return model


def squared_error(outputs, targets):
    """Summed over the outputs, mean over the batch; labels (B,) count as one-hot rows."""
    if not targets.is_floating_point():
        targets = targets[:, None] == torch.arange(outputs.shape[1], device=outputs.device)
    return ((outputs - targets.to(outputs.dtype)) ** 2).sum(1).mean()


LOSSES = {"ce": F.cross_entropy, "mse": squared_error}
PLACE = {"device", "results", "force", "workers", "name", "defaults"}  # not what a run computes, but where and how


def learning_rate(config, step, steps_per_epoch):
    """Of update `step`, from 0: linear warm-up to config.lr, then the schedule's course."""
    steps = config.epochs * steps_per_epoch
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * (step - config.warmup) / (steps - config.warmup))) / 2
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(step >= int(fraction * steps) for fraction in config.milestones)
    return config.lr


class Scores:
    """Mean loss and accuracies over an epoch's batches, or a data set, without a wait for the device on the way."""

    def __init__(self, loss_fn):
        self.loss_fn, self.kept, self.sums = loss_fn, [], 0

    def add(self, outputs, *targets):
        """A batch's outputs (B, D); the loss is that of the first targets (B, ...), the accuracies of each labels."""
        self.kept.append((outputs.detach(), *targets))
        if len(self.kept) == 64:  # a small network would take a fifth longer if each were scored
            self.reduce()

    def reduce(self):
        outputs, *targets = map(torch.cat, zip(*self.kept))
        guesses = outputs.argmax(1)
        hits = [(guesses == y).sum() for y in targets if not y.is_floating_point()]
        count = outputs.new_full((), len(outputs))
        self.sums = self.sums + torch.stack([self.loss_fn(outputs, targets[0]) * count, *hits, count])
        self.kept = []

    def means(self, *names):
        """{name: mean}, the loss first, over all processes; accuracies only where targets are labels."""
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
        scores.add(model(normalize(inputs)), split.targets[index])
    return scores.means(f"{name}_loss", f"{name}_acc")


def last_layer(model):
    """The parameters with gradients of the last module that has any."""
    last_first = reversed([*model.modules()])  # at every step of SAM, so the others' are not listed
    return next(filter(None, ([p for p in m.parameters(recurse=False) if p.grad is not None] for m in last_first)))


def last_layer_share(model):
    """The last layer's share of |g|^2, a tensor, 0 where g is 0."""
    squares = torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])) ** 2
    return squares[-len(last_layer(model)) :].sum() / squares.sum().clamp(min=1e-38)  # parameters() lists it last


def drop_gradients(model, perturb):
    """Clears the gradients of the parameters that SAM is not to perturb: --perturb last or rest."""
    if perturb != "all":
        last = set(last_layer(model))
        for p in model.parameters():
            if (p in last) != (perturb == "last"):
                p.grad = None


def largest_eigenpair(product, vector, tolerance=1e-4, basis=24, restarts=40):
    """Largest eigenvalue of a symmetric matrix, known by `product` (n,) -> (n,), and |Av - cv| / |c| of its vector."""
    for _ in range(restarts):  # of Lanczos iteration, orthogonalized in full, from the best vector so far
        vectors, images = [], []
        while len(images) < basis and vector.norm() > 1e-6 * (images[-1].norm() if images else 0):
            vectors.append(vector / vector.norm())
            images.append(product(vectors[-1]))
            vector = images[-1]
            for v in 2 * vectors:  # going over them once would leave rounding errors that grow
                vector = vector - (v @ vector) * v
        vectors, images = torch.stack(vectors), torch.stack(images)
        projected = (vectors @ images.T).double()
        values, combinations = torch.linalg.eigh((projected + projected.T) / 2)
        value, combination = values[-1].item(), combinations[:, -1].to(vectors.dtype)
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
    weights = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [w.numel() for w in weights.values()]
    mask, count = torch.cat([m.flatten() for m in masks or map(torch.ones_like, weights.values())]), sum(sizes)

    def hessian_product(vector, x, y):
        gradient = torch.func.grad(lambda weights: loss(torch.func.functional_call(model, weights, (x,)), y))
        parts = (mask * vector).split(sizes)
        tangents = {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}
        product = torch.func.jvp(gradient, (weights,), (tangents,))[1]
        return mask * torch.cat([p.flatten() for p in product.values()])

    def mean(product, chunk):
        return sum(product(x, y) for x, y in zip(images.split(chunk), targets.split(chunk))) / len(images)

    def product(v):
        return mean(lambda x, y: len(x) * hessian_product(v, x, y), 250)

    def spread_product(v):
        def squared(x, y):
            return hessian_product(hessian_product(v, x[None], y[None]), x[None], y[None])

        squares = mean(lambda x, y: torch.vmap(squared)(x, y).sum(0), max(1, min(64, 2**23 // count)))
        return squares - product(product(v))

    rng, model = torch.Generator().manual_seed(0), copy.deepcopy(model).eval()
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own, at the first jvp
    start = mask * torch.randn(count, generator=rng).to(mask)
    value, residual = largest_eigenpair(product, start)
    spread, spread_residual = largest_eigenpair(spread_product, start)
    if count <= 4096:
        trace, error = sum(v @ product(v) for v in torch.eye(count).to(mask)).item(), 0.0
    else:
        signs = (2 * torch.randint(2, (count,), generator=rng).to(mask) - 1 for _ in range(probes))
        traces = torch.stack([v @ product(v) for v in signs])
        trace, error = traces.mean().item(), traces.std().item() / probes**0.5
    found = {"images": len(images), "lambda_max": value, "lambda_max_residual": residual}
    return found | {"trace": trace, "trace_se": error, "s2": max(spread, 0) ** 0.5, "s2_residual": spread_residual}


def measure_sharpness(recorder, loss_fn, split, targets, masks=None):
    """`sharpness` of a run's loss on its first --sharpness training images; None if not asked for or diverged."""
    config, model = recorder.config, recorder.model
    if not config.sharpness or not is_main() or recorder.status != "done":
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the next run sets them anew
    vars(model).pop("forward", None)  # without --amp
    model._compiled_call_impl = None  # and --compile: second derivatives fail under it, or are wrong
    first = torch.arange(config.sharpness, device=targets.device)
    found = sharpness(model, loss_fn, normalize(*split.select([first])), targets[first], masks)
    return {key: n if math.isfinite(n) else None for key, n in found.items()}  # JSON has no infinity


def processes():
    """This process's rank and their number: under torchrun, each has its share of every batch."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return processes()[0] == 0


def from_main(value):
    """The main process's value."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def average_gradients(model, size):
    """Makes each gradient its mean over the batch, of which this process had `size` images."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_ones(1)]) * size
    dist.all_reduce(flat)
    for grad, mean in zip(grads, (flat[:-1] / flat[-1]).split([g.numel() for g in grads])):
        grad.copy_(mean.view_as(grad))


def exit_with_error(message, everywhere=True):
    """Ends the program over something the user can mend, seen by all processes or not: one line on stderr, status 2."""
    if not everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def bounded_number(kind, low, high=math.inf, closed=False):
    """An argparse type: an int or a float, at least `low` and below `high`; if closed, at most `high`."""

    def number(text):
        if not (low <= (value := kind(text)) < high or (closed and value == high)):
            limit = f"{'at most' if closed else 'below'} {high}" if high < math.inf else "finite"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and {limit}")
        return value

    number.__name__ = kind.__name__  # as argparse calls it
    return number


def hidden_layers(text):
    if not re.fullmatch(r"[1-9]\d{0,8}(-[1-9]\d{0,8})*", text):
        raise argparse.ArgumentTypeError(f"{text} must be widths of one or more layers, as in 100 or 300-100")
    return text


def flags(doc, settings, *models):
    """The parser of the shared flags. settings: workload -> {flag: default}, for the help; models: hidden, filters."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)
    parser.set_defaults(hidden=None, filters=None)
    parser.error = lambda message: exit_with_error(f"{message} (--help lists the flags)")
    group = parser.add_mutually_exclusive_group(required=True) if len(models) > 1 else parser

    def add(flag, text, default=None, to=parser, **more):
        values = [one[flag] for one in settings.values() if flag in one] or [default]
        shown = " or ".join(dict.fromkeys(str(v).strip("[]") for v in values if v is not None and v is not False))
        text += f" (default: {shown})" if shown else ""
        to.add_argument("--" + flag.replace("_", "-"), default=default, help=text, **more)

    some, positive, switch = bounded_number(int, 0), bounded_number(int, 1), {"action": "store_true", "default": False}
    if "hidden" in models:
        more = {"to": group, "type": hidden_layers, "nargs": "+", "metavar": "H[-H...]"}
        add("hidden", "widths of the MLP's hidden layers", None if models[1:] else "300-100", **more)
    if "filters" in models:
        more = {"to": group, "type": bounded_number(int, 1, 10**6), "nargs": "+", "metavar": "K"}
        add("filters", "filters of the ResNet's first stage", None if models[1:] else 64, **more)
    add("sam", "SAM around SGD, instead of SGD alone", **switch)
    add("rho", "SAM's radius (default: 0.05)", type=bounded_number(float, 0), nargs="+", metavar="R")
    add("adaptive", "ASAM's scaling of the perturbation", **switch)
    add("perturb", "the layers that SAM perturbs", "all", choices=["all", "last", "rest"])
    add("epochs", "passes over the training images", type=positive, metavar="N")
    add("batch_size", "images a step, over all processes", type=positive, metavar="N")
    add("lr", "learning rate", type=bounded_number(float, 1e-12), metavar="X")
    add("momentum", "SGD's momentum", type=bounded_number(float, 0, 1), metavar="X")
    add("weight_decay", "L2 penalty, outside SAM's perturbation", type=bounded_number(float, 0), metavar="X")
    add("schedule", "the learning rate's course; step: x0.1 at milestones", choices=["step", "cosine", "constant"])
    add("warmup", "linear warm-up of the learning rate", 0, type=some, metavar="STEPS")
    add("loss", "cross-entropy, or squared error summed over the outputs", choices=list(LOSSES))
    add("sharpness", "after training, measure the Hessian on the first N training images", 0, type=some, metavar="N")
    seed = bounded_number(int, 0, 2**63)
    add("seed", "of weights, order, augmentation, noise, pruning", [0], type=seed, nargs="+", metavar="N")
    names = f"{', '.join(DATASETS)}, or a folder with train/ and test/ class folders"
    add("dataset", names, type=lambda name: name.lower() if name.lower() in DATASETS else name, metavar="NAME")
    add("data_dir", "where torchvision finds its data or downloads it to", "data", metavar="DIR")
    add("train_size", "only the first N training images", type=positive, metavar="N")
    add("val_size", "the last N training images are held out and scored", 0, type=some, metavar="N")
    add("device", "cuda, cuda:1, cpu ...", "cuda" if torch.cuda.is_available() else "cpu", metavar="D")
    add("amp", "bfloat16 autocast", **switch)
    add("compile", "torch.compile the model", **switch)
    add("fp32", "strict float32 on CUDA, no TF32", **switch)
    add("results", "where result files go", "results", metavar="DIR")
    add("force", "start anew although a result or a checkpoint exists", **switch)
    return parser


def parse(parser, settings_of):
    """Every run that the command line asks for, as a namespace of single values, with its name and its defaults."""
    processes = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1
    parser.set_defaults(**settings_of(parser.parse_args()), script=Path(sys.argv[0]).stem, processes=processes)
    args = parser.parse_args()
    defaults = {k: v[0] if isinstance(v := parser.get_default(k), list) else v for k in vars(args)} | {"processes": 1}
    if not args.sam and (args.rho or args.adaptive or args.perturb != "all"):
        parser.error("--rho, --adaptive and --perturb need --sam")
    if args.schedule == "step" and not args.milestones:
        parser.error("--schedule step: this training has no milestones; give it some, in the script's SETTINGS")
    args.rho = args.rho or ([0.05] if args.sam else [None])
    if processes > 1 and re.fullmatch(r"cuda:\d+", args.device):
        parser.error(f"--device {args.device}: under torchrun each process takes a GPU of its own; give --device cuda")
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        exit_with_error(f"--device {args.device}: cannot be used here ({str(error).splitlines()[0][:100]})")
    lists = {key: dict.fromkeys(value) for key, value in vars(args).items() if isinstance(value, list)}
    combinations = (dict(zip(lists, values)) for values in itertools.product(*lists.values()))
    runs = (argparse.Namespace(**vars(args) | values, defaults=defaults) for values in combinations)
    return [argparse.Namespace(**vars(config), name=run_name(config)) for config in runs]


def run_name(config):
    """Whatever differs from run to run, so that no two share a file: the sweep's flags first, then the unusual ones."""
    named = {"script", "dataset", "hidden", "filters", "noise", "pruner", "sparsity", "sam", "rho", "adaptive", "seed"}
    model = f"mlp{config.hidden}" if config.hidden else f"resnet{config.filters}" if config.filters else config.script
    parts = [config.dataset, model] + ([f"noise{config.noise}"] if "noise" in config else [])
    parts += [f"{config.pruner}{config.sparsity}"] if "sparsity" in config else []
    parts += [f"{'a' * config.adaptive}sam-rho{config.rho}" if config.sam else "sgd", f"seed{config.seed}"]
    for key, value in vars(config).items():
        if key not in named | PLACE and value != config.defaults[key]:
            parts.append(key.replace("_", "-") + ("" if value is True else f"={value}"))
    name = quote(os.fsencode("_".join(parts)), safe="=")
    return name if len(name) < 180 else f"{name[:160]}-{uuid.uuid5(uuid.NAMESPACE_URL, name).hex[:16]}"


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


def set_aside(path, reason):
    """Renames a file that is not this run's, to a name of its own, and says so."""
    aside = next(p for n in itertools.count() if not (p := path.with_name(f"{path.name}.bad{n or ''}")).exists())
    tqdm.write(f"{path}: not this run's, or torn ({reason}); now {aside.name}; the run starts anew", file=sys.stderr)
    with contextlib.suppress(FileNotFoundError):  # another process has moved it
        path.replace(aside)


def result_path(config):
    return Path(config.results, config.script, config.name + ".json")


def read_own(path, config):
    """The result or checkpoint at `path` where it is this run's, else None; one torn or of another run is set aside."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            if zipfile.ZipFile(path).testzip():  # torch's format; checks every byte
                raise ValueError("damaged")
            content = torch.load(path, map_location="cpu", weights_only=True)
        found, settings = json.loads(json.dumps([config.defaults | content["config"], vars(config)]))  # no tuples
        differing = (key for key in settings if key not in PLACE and found[key] != settings[key])
        reason = ", ".join(f"{key} {found[key]}, not {settings[key]}" for key in differing)
    except FileNotFoundError:
        return None
    except OSError as error:  # the disk's, not the file's
        exit_with_error(f"--results: {path} can't be read ({error.strerror}); it is left as it is")
    except Exception as error:  # a damaged file may raise anything
        if isinstance(error, MemoryError) or "allocate" in str(error):
            raise
        reason = f"{type(error).__name__} {error}".splitlines()[0]
    if reason:
        set_aside(path, reason)
    return None if reason else content


@functools.cache
def environment(device):
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"  # such as AVX512: rounding depends on it
    name = torch.cuda.get_device_name(device) if "cuda" in device else cpu
    env = {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": version("torchvision")}
    return env | {"device": name, "threads": torch.get_num_threads(), "commit": git.stdout.strip() or None}


def tested(row):
    return f"test {row['test_acc']:.2%}" if "test_acc" in row else f"test loss {row['test_loss']:.4f}"


class Recorder:
    """A run's way to disk: goes on from its checkpoint, keeps the history, writes the result file at the end."""

    def __init__(self, config, model, optimizer):
        self.config, self.model, self.optimizer = config, model, optimizer
        self.path = result_path(config)
        self.checkpoint = self.path.with_suffix(".ckpt")
        self.history, self.status, self.save_cost, self.env = [], "done", 0.0, environment(config.device)
        if config.force and is_main():
            self.checkpoint.unlink(missing_ok=True)
        state = from_main(read_own(self.checkpoint, config) if is_main() else None)
        try:
            if state:
                self.restore(state)
        except (ValueError, KeyError, TypeError) as error:  # a whole file, but its script was another
            if is_main():
                set_aside(self.checkpoint, error)
        where = {"initial": len(self.history), "disable": None if is_main() else True, "leave": False}
        self.bar = tqdm(total=config.epochs, bar_format="{n}/{total} |{bar:20}| {remaining} left{postfix}", **where)
        self.clock = self.saved = self.spoke = time.perf_counter()

    def restore(self, state):
        shapes = [{name: w.shape for name, w in one.items()} for one in (state["model"], self.model.state_dict())]
        if shapes[0] != shapes[1]:
            raise ValueError("another model")
        history, env = state["history"], state.get("env", self.env)  # what can raise comes before any change
        self.optimizer.load_state_dict(state["optimizer"])
        self.model.load_state_dict(state["model"])
        self.history, self.env = history, env  # of the run's beginning: the commit may be another now
        for p, buffers in self.optimizer.state.items():  # fused kernels assume that they lie in memory as p does
            alike = {key: value for key, value in buffers.items() if getattr(value, "shape", None) == p.shape}
            buffers.update((key, torch.empty_like(p, requires_grad=False).copy_(v)) for key, v in alike.items())

    def save(self):
        state = {"config": json.loads(json.dumps(vars(self.config))), "history": self.history, "env": self.env}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        began, buffer = time.perf_counter(), io.BytesIO()
        torch.save(state, buffer)
        write(self.checkpoint, buffer.getbuffer())
        self.saved = time.perf_counter()
        self.save_cost = self.saved - began

    def epochs(self):
        """Yields the epochs still to do, from 1, and none after one that diverged; end each with end_epoch."""
        while len(self.history) < self.config.epochs and self.status == "done":
            yield len(self.history) + 1

    def end_epoch(self, row):
        """Adds an epoch's numbers to the history, or ends the run where one isn't finite; saves a checkpoint if due."""
        now = time.perf_counter()
        row["seconds"] = round(now - self.clock, 4)
        if not all(map(math.isfinite, row.values())):
            self.status = "diverged"
            return
        self.history.append(row)
        left, numbers = self.config.epochs - row["epoch"], f"loss {row['train_loss']:.4f}, {tested(row)}"
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update()
        if is_main() and self.bar.disable and left and now - self.spoke >= 30:  # no terminal: a line now and then
            self.spoke, wait = now, datetime.timedelta(seconds=round(left * row["seconds"]))
            print(f"epoch {row['epoch']} of {self.config.name}: {numbers}, {wait} left", flush=True)
        due = now - self.saved >= max(1, 50 * self.save_cost)  # at most 2% of the time goes into checkpoints
        if is_main() and (due or (self.config.sharpness and not left)):
            self.save()
        self.clock = time.perf_counter()

    def finish(self, **more):
        """Writes the result file, with whatever more is to be in it that is not None."""
        self.bar.close()
        params, seconds = sum(p.numel() for p in self.model.parameters()), sum(row["seconds"] for row in self.history)
        last = self.history[-1] if self.history else {}
        accuracies = [row["test_acc"] for row in self.history if "test_acc" in row]
        result = {
            "config": {key: value for key, value in vars(self.config).items() if key not in ("name", "defaults")},
            "defaults": self.config.defaults,  # which plot.py takes for a flag that older files lack
            **{"num_params": params, "num_nonzero": params, "status": self.status},
            **{key: last.get(key) for key in ("test_acc", "test_loss", "train_loss")},
            **{"best_test_acc": max(accuracies, default=None), "env": self.env | {"seconds": round(seconds, 3)}},
            **{key: value for key, value in more.items() if value is not None},
        }
        if not is_main():
            return
        history = json.dumps(self.history, allow_nan=False).replace("}, {", "},\n{")  # a line an epoch
        write(self.path, f'{json.dumps(result, allow_nan=False)[:-1]},\n"history": {history}}}\n'.encode())
        self.checkpoint.unlink(missing_ok=True)
        for left in self.path.parent.glob("*.tmp"):
            with contextlib.suppress(OSError):  # one that was killed has left it, if it isn't being written to
                if left.name.startswith(f"{self.config.name}.") and time.time() - left.stat().st_mtime > 60:
                    left.unlink()
        outcome = tested(last) if last else "no finite epoch"
        outcome += f" (best {max(accuracies):.2%})" if accuracies else ""
        print(f"{self.status}: {self.config.name}: {outcome}, {seconds:.0f} s", flush=True)


def stop(signum, frame):
    if is_main():
        tqdm.write("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(128 + signum)


def main(parser, train, settings_of):
    """Calls train(config) for each run asked for that has no result; settings_of(parsed flags): {flag: default}."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    torchrun = "LOCAL_RANK" in os.environ
    if torchrun and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    runs = parse(parser, settings_of)
    if torchrun:  # with hours to wait: the main process may have to download, and measures sharpness
        device = torch.device("cuda", torch.cuda.current_device()) if "cuda" in runs[0].device else None
        dist.init_process_group("nccl" if device else "gloo", timeout=datetime.timedelta(hours=2), device_id=device)
    todo, probe = None, result_path(runs[0]).with_name(from_main(f".{uuid.uuid4().hex}"))
    if is_main():
        todo = [c for c in runs if c.force or not read_own(result_path(c), c)]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} already finished", flush=True)
        if todo:  # a folder that can't be written to is better noticed before training
            write(probe, b"")
    todo = from_main(todo)
    told = [([c.name for c in runs], probe.exists())] * processes()[1]
    if torchrun:
        dist.all_gather_object(told, told[0])
    if is_main() and todo:
        probe.unlink()
    if any(one != told[0] for one in told):
        exit_with_error(f"the processes have different flags, or --results {runs[0].results} is not one folder for all")
    for number, config in enumerate(todo, start=1):
        if is_main() and sys.stderr.isatty():
            print(f"run {number} of {len(todo)}: {config.name}")
        try:
            train(config)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "alloc" not in str(error).lower():
                raise
            exit_with_error(f"{config.name}: needs more memory: try a smaller --batch-size or width", everywhere=False)
        gc.collect()  # models under --amp and --compile hold themselves
    if torchrun:
        dist.destroy_process_group()

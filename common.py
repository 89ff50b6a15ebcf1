"""What the four experiment scripts share: SAM, the two models, data on the device, flags and result files.

In this order: `SAM` (needs nothing but `import torch`: copy it out), `frozen_bn_stats`, `MLP`, `ResNet18`, data and
batches, learning rate and evaluation, several processes, flags, and a run's way to disk.

"The paper" is Shin, Lee, Andriushchenko, Lee: "Critical Influence of Overparameterization on Sharpness-aware
Minimization", UAI 2025, arXiv 2311.17539. SAM is Foret et al., ICLR 2021; its adaptive form Kwon et al., ICML 2021.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
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
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm


class SAM:
    """Sharpness-aware minimization around any torch optimizer, which alone holds state to save.

    After a backward pass, `perturb()` moves w to w + e, e = rho g / |g|, one L2 norm over all parameters (adaptive, as
    in ASAM: e = rho w^2 g / |w g|), and clears the gradients. After another, `step()` restores w bit for bit and steps.
    """

    def __init__(self, optimizer, rho=0.05, adaptive=False):
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho must be finite and not negative, but is {rho}")
        self.optimizer, self.rho, self.adaptive = optimizer, rho, adaptive
        self.copies = {}  # of w, by parameter; allocated once: fresh memory at every step costs page faults
        self.perturbed = []  # the parameters that stand at w + e

    @torch.no_grad()
    def perturb(self):
        if self.perturbed:
            raise RuntimeError("the weights are perturbed already: call step() or restore() first")
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if params:
            grads = [p.grad for p in params]
            scaled = torch._foreach_mul(grads, params) if self.adaptive else grads
            norms = [norm.to(params[0].device) for norm in torch._foreach_norm(scaled)]
            scale = self.rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)
            if self.adaptive:
                torch._foreach_mul_(scaled, params)
            self.copies.update((p, torch.empty_like(p)) for p in params if p not in self.copies)
            torch._foreach_copy_([self.copies[p] for p in params], params)
            self.perturbed = params
            torch._foreach_addcmul_(params, scaled, [scale.to(p.device) for p in params])
        self.optimizer.zero_grad()

    @torch.no_grad()
    def restore(self):
        if self.perturbed:
            torch._foreach_copy_(self.perturbed, [self.copies[p] for p in self.perturbed])
            self.perturbed = []

    def step(self, closure=None):
        """Restores w and steps; with a closure (clear, backward, return the loss), all of it; returns the loss at w."""
        try:
            loss = closure and closure()
            if closure:
                self.perturb()
                closure()
        finally:
            self.restore()
        self.optimizer.step()
        return loss


@contextlib.contextmanager
def frozen_bn_stats(model):
    """Inside, BatchNorm normalizes with its batch's statistics, but its running ones and its counter stand still.

    For SAM's second pass: statistics at w + e do not belong to w, and each batch counts once.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [m for m in norms if m.track_running_stats]
    try:
        for m in tracking:
            m.track_running_stats = False
        yield
    finally:
        for m in tracking:
            m.track_running_stats = True


def lecun_normal_(model):
    """Kernels ~ normal, truncated at two deviations and rescaled to variance 1 / fan_in; biases 0; BN at 1 and 0."""
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


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def ResNet18(filters=64, channels=3, classes=10):
    """The CIFAR ResNet-18 with `filters` channels in its first stage: (B, channels, H, W) -> (B, classes) logits."""
    layers = [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    widths = [filters, filters, 2 * filters, 4 * filters, 8 * filters]
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [BasicBlock(inputs, outputs, 1 if inputs == outputs else 2), BasicBlock(outputs, outputs, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * filters, classes)]
    return lecun_normal_(nn.Sequential(*layers))


DATASETS = {name.lower(): name for name in ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN")}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10's channels


class Split(NamedTuple):
    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor  # (N,) int64


class Data(NamedTuple):
    train: Split
    val: Split
    test: Split
    classes: int
    augment: bool  # crop and flip the training images


def torchvision_split(name, root, train):
    from torchvision import datasets

    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    data = getattr(datasets, DATASETS[name])(root, download=True, **which)
    images = torch.as_tensor(data.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(data.labels if name == "svhn" else data.targets)


def folder_split(root, train):
    """Images and labels of a folder of class folders, in one fixed shuffled order, so that a part has every class."""
    from PIL import Image
    from torchvision.datasets import ImageFolder

    names = ["train"] if train else ["test", "val"]
    folder = next((Path(root, n) for n in names if Path(root, n).is_dir()), None)
    if folder is None:
        fail(f"--dataset {root}: has no folder {' or '.join(names)}, with a folder of images for each class")
    try:
        data = ImageFolder(folder)
    except FileNotFoundError as error:  # no class folders, or one without images
        fail(f"--dataset {root}: {error}")
    order = np.random.default_rng(0).permutation(len(data.samples))
    images = []
    for path, _ in (data.samples[i] for i in tqdm(order, f"reading {folder}", disable=None, leave=False)):
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
        except OSError as error:
            fail(f"{path}: is not a whole image; replace or remove it ({error})")
        images.append(pixels.reshape(*pixels.shape[:2], -1))
        if images[-1].shape != images[0].shape:
            fail(f"{path}: is {images[-1].shape}, the first image {images[0].shape} (H, W, C); make them alike")
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images, torch.tensor(data.targets)[order], data.classes


@functools.lru_cache(maxsize=1)
def read_dataset(dataset, data_dir):
    """The training and test sets, whole and in CPU memory, of a name in DATASETS or a folder of images."""
    if dataset not in DATASETS:
        if not Path(dataset).is_dir():
            fail(f"--dataset {dataset}: neither a folder of images nor one of {', '.join(DATASETS)}")
        *train, names = folder_split(dataset, True)
        *test, test_names = folder_split(dataset, False)
        if names != test_names or train[0].shape[1:] != test[0].shape[1:]:
            fail(f"--dataset {dataset}: its training and test images differ in classes, size or channels")
        if len(names) < 2:
            fail(f"--dataset {dataset}: has one class of images, but needs two or more")
        return train, test, len(names)
    try:
        train, test = (torchvision_split(dataset, data_dir, train) for train in (True, False))
    except Exception as error:  # torchvision raises all kinds: network, checksum, torn file, missing package
        fail(
            f"--dataset {dataset}: could not be read from --data-dir {data_dir}, nor downloaded to it; "
            f"remove damaged files there or put whole ones in their place ({type(error).__name__}: {error})"
        )
    return train, test, int(train[1].max()) + 1


def load_data(config):
    """The run's Data on its device: the last val_size training images held out, the first train_size of the rest."""
    *splits, classes = read_dataset(config.dataset, config.data_dir)
    (images, labels), test = splits
    rest = len(labels) - config.val_size
    size = config.train_size or rest
    if not 1 <= size <= rest:
        fail(f"--train-size, --val-size: {config.dataset} has {len(labels)} training images, too few for these")
    if 0 < size % config.batch_size < processes()[1]:
        fail(f"--batch-size {config.batch_size}: leaves a last batch of fewer images than there are processes")
    gaps = [max(32 - side, 0) if config.filters else 0 for side in (images.shape[3], images.shape[2])]

    def split(images, labels):
        images = F.pad(images, [pad for gap in gaps for pad in (gap // 2, gap - gap // 2)])
        return Split(images.to(config.device).contiguous(), labels.to(config.device))

    augment = config.dataset.startswith("cifar") or config.dataset not in DATASETS
    train, val = split(images[:size], labels[:size]), split(images[rest:], labels[rest:])
    return Data(train, val, split(*test), classes, augment)


def crop_and_flip(images, moves, pad=4):
    """Pads (B, C, H, W) images with zeros, crops each to H x W at its own offset, flips where told.

    moves: (B, 3) integers, for each image the crop's row and column, 0 to 2 pad, and 1 to flip left and right.
    """
    height, width = images.shape[2:]
    rows = moves[:, :1] + torch.arange(height, device=images.device)
    cols = moves[:, 1:2] + torch.arange(width, device=images.device)
    cols = torch.where(moves[:, 2:] > 0, cols.flip(1), cols)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=images.device).view(-1, 1, 1)
    # all four axes are indexed: with slices among them the result would have NHWC strides, slow on a CPU
    return F.pad(images, [pad] * 4)[image, channel, rows[:, None, :, None], cols[:, None, None, :]]


@functools.cache
def channel_stats(device, dtype):
    return [torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD)]


def normalize(images):
    """uint8 images as the models take them: x / 255, and for three channels CIFAR-10's mean and deviation."""
    x = images / 255
    if images.shape[1] == 3:
        mean, std = channel_stats(x.device, x.dtype)
        x = (x - mean) / std
    return x


def batches(data, config, epoch, *labels):
    """Yields an epoch's training batches: normalized images, and their rows of each tensor in `labels`.

    Order and augmentation are functions of (seed, epoch) alone. Under torchrun each process gets its share.
    """
    rng, n = np.random.default_rng((config.seed, epoch)), len(data.train.labels)
    order = torch.from_numpy(rng.permutation(n)).to(config.device)
    labels = [tensor[order] for tensor in labels]
    if data.augment:
        moves = torch.from_numpy(rng.integers(0, (9, 9, 2), (n, 3))).to(config.device)
    rank, world = processes()
    for start in range(0, n, config.batch_size):
        share = slice(start + rank, min(start + config.batch_size, n), world)
        images = data.train.images.index_select(0, order[share])  # 15 times as fast as [] on a CPU
        if data.augment:
            images = crop_and_flip(images, moves[share])
        yield normalize(images), *(tensor[share] for tensor in labels)


def build_model(config, data):
    """The run's network on its device, the same initial weights for every optimizer and device at one seed."""
    torch.manual_seed(config.seed)
    channels, height, width = data.train.images.shape[1:]
    if config.filters:
        model = ResNet18(config.filters, channels, data.classes)
    else:
        model = MLP(map(int, config.hidden.split("-")), channels * height * width, data.classes)
    model = model.to(config.device)
    if "cuda" in config.device:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not config.fp32
        torch.backends.cudnn.benchmark = True
        if config.filters:
            model = model.to(memory_format=torch.channels_last)
    if config.amp:
        model.forward = torch.autocast(torch.device(config.device).type, torch.bfloat16)(model.forward)
        model.register_forward_hook(lambda model, images, logits: logits.float())
    if config.compile:
        torch.compiler.reset()  # or the graphs of a sweep's earlier runs exhaust its limit
        model.compile()
    return model


def set_learning_rate(config, optimizer, step, steps):
    """Divides the rate by 10 from each of the model's milestones on; step counts updates, from 0, of `steps` in all."""
    milestones = (0.5, 0.75) if config.filters else (0.25, 0.5, 0.75)
    lr = config.lr * 0.1 ** sum(step >= int(fraction * steps) for fraction in milestones)
    for group in optimizer.param_groups:
        group["lr"] = lr


def score(logits, *labels):
    """Sums over (N, classes) logits: of the cross-entropy with the first labels (N,), and of the hits on each."""
    guess = logits.argmax(1)
    return torch.stack([F.cross_entropy(logits, labels[0], reduction="sum"), *((guess == y).sum() for y in labels)])


@torch.inference_mode()
def evaluate(model, split, batch_size=1000):
    """Mean cross-entropy and accuracy of the model in eval mode."""
    model.eval()
    logits = torch.cat([model(normalize(images)) for images in split.images.split(batch_size)])
    return [total / len(split.labels) for total in score(logits, split.labels).tolist()]


def processes():
    """This process's rank and their number: under torchrun, each has its share of every batch."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    return processes()[0] == 0


def average_gradients(model, size):
    """Under torchrun, each gradient's mean over the batch, of which this process had `size` images; alone, nothing."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters()]
        flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_ones(1)]) * size
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat[:-1] / flat[-1]).split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


def fail(message):
    """Ends the program over something the user can mend: one line on stderr, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def note(message):
    if is_main():
        tqdm.write(message, file=sys.stderr)


def number(kind, low, high=math.inf, below=False):
    """An argparse type: a finite int or float from low to high, or below high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (below and value == high) or not math.isfinite(value):
            limit = f" and {'below' if below else 'at most'} {high}" if high < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def widths(text):
    if not re.fullmatch(r"[1-9]\d{0,8}-[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text} must be two widths, as in 300-100")
    return text


PAPER = {  # the defaults that depend on the model
    "hidden": {"dataset": "mnist", "epochs": 100, "weight_decay": 1e-4},
    "filters": {"dataset": "cifar10", "epochs": 200, "weight_decay": 5e-4},
}


def flags(doc, hidden=None, filters=None):
    """The parser of the flags that all scripts share, its widths at these defaults; without any, one must be given."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    both = not hidden and not filters
    group = parser.add_mutually_exclusive_group(required=True) if both else parser
    if hidden or both:
        text = "widths of the MLP's hidden layers"
        group.add_argument("--hidden", type=widths, nargs="+", default=hidden, metavar="H1-H2", help=text)
    if filters or both:
        text = "filters of ResNet-18's first stage"
        group.add_argument("--filters", type=number(int, 1, 10**6), nargs="+", default=filters, metavar="K", help=text)

    def add(flag, kind, default, text, **more):
        paper = " or ".join(str(values[flag]) for values in PAPER.values()) if flag in PAPER["hidden"] else default
        help = f"{text} (default: {paper})"
        parser.add_argument("--" + flag.replace("_", "-"), type=kind, default=default, help=help, **more)

    parser.add_argument("--sam", action="store_true", help="SAM around SGD, instead of SGD alone")
    parser.add_argument("--rho", type=number(float, 0), nargs="+", metavar="R", help="SAM's radius (default: 0.05)")
    parser.add_argument("--adaptive", action="store_true", help="adaptive SAM")
    add("epochs", number(int, 1), None, "passes over the training images", metavar="N")
    add("batch_size", number(int, 1), 128, "images a step, over all processes", metavar="N")
    add("lr", number(float, 1e-12), 0.1, "initial learning rate", metavar="X")
    add("momentum", number(float, 0, 1, below=True), 0.9, "SGD's momentum", metavar="X")
    add("weight_decay", number(float, 0), None, "L2 penalty, outside SAM's perturbation", metavar="X")
    text = "initialization, data order, augmentation, flipped labels, pruning"
    add("seed", number(int, 0, 2**63, below=True), [0], text, nargs="+", metavar="N")
    add("dataset", str, None, f"one of {', '.join(DATASETS)}, or a folder with train/ and test/ class folders")
    add("data_dir", str, "data", "where torchvision finds its data or downloads it to", metavar="DIR")
    add("train_size", number(int, 1), None, "only the first N training images", metavar="N")
    add("val_size", number(int, 0), 0, "the last N training images are held out and scored", metavar="N")
    add("device", str, "cuda" if torch.cuda.is_available() else "cpu", "cuda, cuda:1, cpu ...")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--fp32", action="store_true", help="strict float32 on CUDA, no TF32")
    add("results", str, "results", "where result files go", metavar="DIR")
    parser.add_argument("--force", action="store_true", help="run again although a finished result exists")
    return parser


NOT_THE_RUN = {"name", "device", "results", "force"}  # where a run happens, not what it computes


def parse(parser):
    """Every run that the command line asks for, as a namespace of single values, with its name."""
    args = parser.parse_args()
    if not args.sam and (args.rho or args.adaptive):
        parser.error("--rho and --adaptive need --sam")
    args.rho = args.rho or ([0.05] if args.sam else [None])
    args.script = Path(sys.argv[0]).stem
    args.hidden, args.filters = getattr(args, "hidden", None), getattr(args, "filters", None)
    defaults = {key: parser.get_default(key) for key in vars(args)} | PAPER["hidden" if args.hidden else "filters"]
    for key, value in vars(args).items():
        if value is None:
            setattr(args, key, defaults[key])
    try:
        torch.empty(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device}: cannot be used here ({str(error).splitlines()[0]})")

    lists = {key: value for key, value in vars(args).items() if isinstance(value, list)}
    combinations = itertools.product(*lists.values())
    runs = [argparse.Namespace(**vars(args) | dict(zip(lists, values))) for values in combinations]
    for config in runs:
        config.name = run_name(config, defaults)
    return runs


def run_name(config, defaults):
    """Whatever differs from run to run, so that no two share a file: the sweep's flags first, then the unusual ones."""
    named = {"script", "dataset", "hidden", "filters", "noise", "pruner", "sparsity", "sam", "rho", "adaptive", "seed"}
    parts = [config.dataset, f"mlp{config.hidden}" if config.hidden else f"resnet{config.filters}"]
    parts += [f"noise{config.noise}"] if "noise" in config else []
    parts += [f"{config.pruner}{config.sparsity}"] if "sparsity" in config else []
    parts += [f"{'a' * config.adaptive}sam-rho{config.rho}" if config.sam else "sgd", f"seed{config.seed}"]
    for key, value in vars(config).items():
        if key not in named | {"results", "force"} and value != defaults[key]:
            parts.append(key.replace("_", "-") + ("" if value is True else f"={value}"))
    name = quote("_".join(parts), safe="=")
    return name if len(name) < 180 else f"{name[:160]}-{hashlib.sha1(name.encode()).hexdigest()[:16]}"


def write(path, data):
    """Bytes to a file that appears whole or not at all, whoever else writes it at the same time."""
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        fail(f"--results: {path.parent} can't be written to ({error.strerror}); what was written before is intact")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def identity(settings):
    """The settings that a result file or checkpoint must agree on to belong to the run."""
    return {key: value for key, value in settings.items() if key not in NOT_THE_RUN}


def is_finished(config):
    path = Run.path_of(config)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if identity(result["config"]) == identity(vars(config)) and result["status"] in ("done", "diverged"):
            return True
        raise ValueError("another configuration")
    except OSError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        note(f"{path}: not a finished result of this run ({error}); running it again")
        return False


@functools.cache
def environment(device):
    git, commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], None
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "device": torch.cuda.get_device_name(device) if "cuda" in device else platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit or None,
    }


class Run:
    """One run on disk: goes on from its checkpoint, ends epochs, writes the result file."""

    def __init__(self, config, model, optimizer):
        self.config, self.model, self.optimizer = config, model, optimizer
        self.path = self.path_of(config)
        self.checkpoint = self.path.with_suffix(".ckpt")
        self.history, self.seconds, self.status = [], 0.0, "done"
        self.saved = time.perf_counter()
        self.load()
        if dist.is_initialized():
            dist.barrier()  # or rank 0 may finish, and remove the checkpoint, before another has read it

    @staticmethod
    def path_of(config):
        return Path(config.results, config.script, config.name + ".json")

    def load(self):
        try:
            state = torch.load(self.checkpoint, map_location=self.config.device, weights_only=True)
            if state["config"] != identity(vars(self.config)):
                raise ValueError("another configuration")
            model, optimizer, history, seconds = (state[key] for key in ("model", "optimizer", "history", "seconds"))
            if {k: w.shape for k, w in model.items()} != {k: w.shape for k, w in self.model.state_dict().items()}:
                raise ValueError("another model")
            self.optimizer.load_state_dict(optimizer)  # raises before it changes anything; the model's would not
            self.model.load_state_dict(model)
            self.history, self.seconds = history, seconds
        except FileNotFoundError:
            pass
        except Exception as error:  # a torn file raises anything from EOFError to UnpicklingError
            aside = self.checkpoint.with_suffix(".ckpt.bad")
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            note(f"{self.checkpoint}: torn or of another run ({reason}); set aside as {aside.name}, starting anew")
            with contextlib.suppress(FileNotFoundError):  # another process has moved it
                self.checkpoint.replace(aside)

    def save(self):
        state = {"config": identity(vars(self.config)), "history": self.history, "seconds": self.seconds}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, buffer := io.BytesIO())
        write(self.checkpoint, buffer.getbuffer())
        self.saved = time.perf_counter()

    def epochs(self):
        """Yields the epochs still to do, with a progress bar; end each with end_epoch."""
        todo = range(len(self.history) + 1, self.config.epochs + 1)
        quiet = None if is_main() else True
        with tqdm(todo, self.config.name, self.config.epochs, initial=len(self.history), disable=quiet) as self.bar:
            for epoch in self.bar:
                self.began = time.perf_counter()
                yield epoch
                if self.status == "diverged":
                    break

    def end_epoch(self, outputs, data):
        """Adds an epoch to the history; outputs: each step's logits, labels and, with label noise, clean labels."""
        sums = score(*map(torch.cat, zip(*outputs)))
        if dist.is_initialized():
            dist.all_reduce(sums)
            for buffer in self.model.buffers():  # BN's running statistics are those of rank 0
                dist.broadcast(buffer, 0)
        row = {"epoch": len(self.history) + 1, "lr": self.optimizer.param_groups[0]["lr"]}
        names = ("train_loss", "train_acc", "train_clean_acc")
        row.update(zip(names, (total / len(data.train.labels) for total in sums.tolist())))
        for name in ("test", "val"):
            split = getattr(data, name)
            if len(split.labels):
                row[f"{name}_loss"], row[f"{name}_acc"] = evaluate(self.model, split)
        row["seconds"] = round(time.perf_counter() - self.began, 4)
        self.seconds += row["seconds"]
        if not all(map(math.isfinite, row.values())):
            self.status = "diverged"
            return
        self.history.append(row)
        self.bar.set_postfix(loss=f"{row['train_loss']:.4f}", test=f"{row['test_acc']:.2%}")
        if is_main() and time.perf_counter() - self.saved >= 1:  # so that short epochs don't pay for it
            self.save()

    def finish(self, removed=0):
        """Writes the result file; removed: the number of pruned weights."""
        params = sum(p.numel() for p in self.model.parameters())
        last = self.history[-1] if self.history else {}
        result = {
            "config": {key: value for key, value in vars(self.config).items() if key != "name"},
            "num_params": params,
            "num_nonzero": params - removed,
            "status": self.status,
            **{key: last.get(key) for key in ("test_acc", "test_loss", "train_loss")},
            "best_test_acc": max((row["test_acc"] for row in self.history), default=None),
            "env": {**environment(self.config.device), "seconds": round(self.seconds, 3)},
            "history": self.history,
        }
        if is_main():
            write(self.path, json.dumps(result, indent=1, allow_nan=False).encode())
            self.checkpoint.unlink(missing_ok=True)
            outcome = f"test {last['test_acc']:.2%} (best {result['best_test_acc']:.2%})" if last else "no finite epoch"
            print(f"{self.status}: {self.config.name}: {outcome}, {self.seconds:.0f} s", flush=True)


def keep_freed_memory():
    """Has glibc keep what a step frees for the next one, not return it: page faults take a third of a ResNet's step."""
    with contextlib.suppress(AttributeError, TypeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never map


def stop(signum, frame):
    note("stopped; give the same command again to go on from the last checkpoint")
    sys.exit(128 + signum)


def main(parser, train):
    """Calls train(config) for each of the command line's runs that has no finished result yet."""
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    keep_freed_memory()
    torchrun = "LOCAL_RANK" in os.environ
    if torchrun and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    runs = parse(parser)
    todo = [config for config in runs if config.force or not is_finished(config)]
    if torchrun:
        dist.init_process_group("nccl" if "cuda" in runs[0].device else "gloo")
    if is_main():
        print(f"{len(runs)} runs, of which {len(runs) - len(todo)} are finished", flush=True)
    if todo and is_main():  # a folder that can't be written to is better noticed before training
        probe = Run.path_of(todo[0]).with_name(f".{platform.node()}.{os.getpid()}")
        write(probe, b"")
        probe.unlink()
        read_dataset(todo[0].dataset, todo[0].data_dir)  # which may download it: the other processes wait
    if torchrun:
        dist.barrier()
    for config in todo:
        try:
            train(config)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
                raise
            fail(f"{config.name}: does not fit into memory; use a smaller width or --batch-size, or another --device")
    if torchrun:
        dist.destroy_process_group()

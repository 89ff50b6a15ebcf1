"""What SAM costs on this machine, as tables to paste into an issue.

    python tests/benchmark.py                           # a minute on 2 cores, at most three with a GPU
    python tests/benchmark.py --dry-run --device cpu    # every part at tiny sizes, in seconds: no number means anything

On a CPU: a step of SAM, and the scripts' loop, beside the bare minimum. On a GPU also: milliseconds, kernels and memory
of a step by width, the hours of `bash run.sh`, several processes on one card, ResNet-50, waits for the device inside
the loop, how far SAM's correction is that of float32, and --compile. Each part has its seconds; what they do not
suffice for is left out and said.
"""

import argparse
import collections
import functools
import gc
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "6"  # or the profiler tells of its starts and stops
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader
from torchvision import datasets, transforms

import mlp_width
import resnet_width
from common import MLP, SAM, Data, ResNet18, Scores, Split, batches, build_model, evaluate, frozen_bn_stats

ROOT = Path(__file__).resolve().parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

FULL = Namespace(
    filters=(4, 16, 64, 256),
    hidden=("300-100", "3000-1000"),
    batch_size=128,
    images=12_800,  # an epoch of 100 steps
    seconds=0.6,  # that one number is measured for
    processes=(1, 4, 8),
    processes_filters=16,
    imagenet_filters=(16, 64, 80),
    imagenet_batch_size=64,  # what each of 8 GPUs has of the paper's 512
    imagenet_size=224,
    waits_filters=16,
    cosine_filters=32,
    radii=(0.001, 0.01, 0.05, 0.1),
    compiled=({"filters": 16}, {"filters": 64}),
    compiler_stance="default",
    step_repeats=(300, 15),  # of the MLP's step and the ResNet's, beside the bare one
    loop_images=(20_000, 512),
    loop_repeats=5,
    recipe_repeats=3,
)

DRY = Namespace(
    filters=(1, 2),
    hidden=("4", "8-4"),
    batch_size=4,
    images=400,
    seconds=0,
    processes=(1, 2),
    processes_filters=1,
    imagenet_filters=(1,),
    imagenet_batch_size=2,
    imagenet_size=64,
    waits_filters=1,
    cosine_filters=2,
    radii=(0.05, 0.1),
    compiled=({"filters": 1}, {"hidden": "4"}),
    compiler_stance="force_eager",  # as if compiled: it would take a minute on a CPU
    step_repeats=(1, 1),
    loop_images=(128, 64),
    loop_repeats=1,
    recipe_repeats=1,
)

# Seconds that a part may take, and all together. One number more may be under way when they are over.
BUDGET = {"networks": 60, "processes": 30, "imagenet": 30, "compile": 60}
ALL = 165
START = time.monotonic()

# ----------------------------------------------------------------------------------------------------------------------
# What all parts share: random data, the scripts' loop, its time
# ----------------------------------------------------------------------------------------------------------------------


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def config_of(device, filters=None, hidden=None, batch_size=128, amp=False, fp32=False, compile=False):
    """What common.py asks about a run of a script."""
    return Namespace(
        device=device,
        filters=filters,
        hidden=hidden,
        batch_size=batch_size,
        amp=amp,
        fp32=fp32,
        compile=compile,
        seed=0,
    )


def random_data(device, images, shape, augment):
    """Random uint8 images on the device, in training and (at most 1,000 of them) in testing, with labels of 10."""
    inputs = torch.randint(256, (images, *shape), dtype=torch.uint8, device=device)
    targets = torch.randint(10, (images,), device=device)
    train = Split(inputs, targets)
    test = Split(inputs[:1000], targets[:1000])
    return Data(train, test, test, shape, 10, augment, F.cross_entropy)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)


class Training:
    """A network on random data or others, and the scripts' loop, whose optimizer is SGD or SAM as asked."""

    def __init__(self, config, data, model=None):
        self.config = config
        self.data = data
        self.model = build_model(config, data) if model is None else model
        self.optimizer = sgd(self.model)
        self.sam = SAM(self.optimizer, rho=0.05)
        self.stream = self.endless_batches()

    def endless_batches(self):
        for epoch in itertools.count(1):
            yield from batches(self.data, self.config, epoch)

    def run(self, steps, sam=None):
        self.model.train()
        scores = Scores(F.cross_entropy)

        for x, y in itertools.islice(self.stream, steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01

            self.optimizer.zero_grad()
            outputs = self.model(x)
            F.cross_entropy(outputs, y).backward()

            if sam:
                sam.perturb()
                with frozen_bn_stats(self.model):
                    F.cross_entropy(self.model(x), y).backward()
                sam.step()
            else:
                self.optimizer.step()

            scores.add(outputs, y)

    def ms_a_step(self, seconds, sam=None):
        """Milliseconds a step, the mean over as many steps as fit into the seconds, after four others."""
        device = self.config.device
        self.run(3, sam)  # cuDNN chooses its algorithms in the first
        synchronize(device)
        began = time.perf_counter()
        self.run(1, sam)
        synchronize(device)
        one = time.perf_counter() - began

        steps = max(1, round(seconds / one))
        began = time.perf_counter()
        self.run(steps, sam)
        synchronize(device)
        return 1e3 * (time.perf_counter() - began) / steps


def interleaved(functions, repeats, device):
    """{name: median seconds} of functions without arguments, called in turn; up to two rounds before don't count."""
    times = {name: [] for name in functions}
    uncounted = min(2, repeats - 1)

    for repeat in range(uncounted + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            synchronize(device)
            if repeat >= uncounted:
                times[name].append(time.perf_counter() - began)

    return {name: statistics.median(values) for name, values in times.items()}


def table(title, *columns):
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def deadline_of(part):
    return min(time.monotonic() + BUDGET[part], START + ALL)


def time_is_up(deadline, *cells):
    """Whether a part's seconds are over; if so, says it in a row that begins with these cells."""
    if time.monotonic() < deadline:
        return False
    row(*cells, "not measured: no time left")
    return True


# ----------------------------------------------------------------------------------------------------------------------
# SAM's step beside two bare passes, and beside SAM as it is often written
# ----------------------------------------------------------------------------------------------------------------------


class LoopSAM:
    """SAM as it is often written: a loop over parameters, fresh clones."""

    def __init__(self, optimizer, rho=0.05):
        self.optimizer = optimizer
        self.rho = rho
        self.old = {}

    @torch.no_grad()
    def perturb(self):
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.old[p] = p.clone()
            p.add_(p.grad * (self.rho / (norm + 1e-12)))
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        for p, old in self.old.items():
            p.copy_(old)
        self.optimizer.step()


def bare_step(model, optimizer, x, y, sam=None, passes=2):
    """Forward and backward passes and one step; SAM's moves between them where it is given."""
    for remaining in reversed(range(passes)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if sam and remaining:
            sam.perturb()

    (sam or optimizer).step()


def compare_steps(size, device):
    cases = (
        ("MLP 300-100, batch 128", MLP, (128, 784), size.step_repeats[0]),
        ("ResNet-18, 8 filters, batch 64", lambda: ResNet18(8), (64, 3, 32, 32), size.step_repeats[1]),
    )

    for name, make_model, shape, repeats in cases:
        x = torch.rand(shape, device=device)
        y = torch.randint(10, shape[:1], device=device)
        functions = {}

        for method in (None, SAM, LoopSAM):
            model = make_model().to(device)
            optimizer = sgd(model)
            sam = method(optimizer) if method else None
            functions[method] = functools.partial(bare_step, model, optimizer, x, y, sam)

        seconds = interleaved(functions, repeats, device)
        compare(f"SAM step, {name}", seconds[SAM], "2 passes and an SGD step", seconds[None])
        compare(f"SAM step, {name}", seconds[SAM], "SAM as a loop over parameters", seconds[LoopSAM])


def compare(what, ours, of, theirs):
    row(what, f"{1e3 * ours:.2f}", f"{of}, {1e3 * theirs:.2f} ms", f"{ours / theirs:.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# The scripts' loop beside a bare one, and beside the usual recipe
# ----------------------------------------------------------------------------------------------------------------------


def mini_mnist(config, images):
    """The training images that the repository has, as often as it takes to make `images` of them."""
    mnist = datasets.MNIST(ROOT / "data" / "mini")
    rows = torch.arange(images) % len(mnist)
    inputs = mnist.data[rows, None].to(config.device)
    if config.filters:
        inputs = F.pad(inputs, [2] * 4)

    train = Split(inputs, mnist.targets[rows].to(config.device))
    return Data(train, train, train, inputs.shape[1:], 10, False, F.cross_entropy)


def bare_loop(model, optimizer, preloaded, sam, passes):
    for x, y in preloaded:
        bare_step(model, optimizer, x, y, sam, passes)


def compare_loops(size, device):
    cases = (
        ("MLP 300-100", config_of(device, hidden="300-100"), size.loop_images[0]),
        ("ResNet-18, 8 filters", config_of(device, filters=8), size.loop_images[1]),
    )

    for name, config, images in cases:
        data = mini_mnist(config, images)
        preloaded = list(batches(data, config, epoch=1))

        for method in ("SGD", "SAM"):
            training = Training(config, data)
            ours_sam = training.sam if method == "SAM" else None
            ours = functools.partial(training.run, len(preloaded), ours_sam)

            model = build_model(config, data).train()
            optimizer = sgd(model)
            bare_sam = SAM(optimizer) if method == "SAM" else None
            passes = 2 if method == "SAM" else 1
            bare = functools.partial(bare_loop, model, optimizer, preloaded, bare_sam, passes)

            seconds = interleaved({"ours": ours, "bare": bare}, size.loop_repeats, device)
            compare(f"epoch, {name}, {method}", seconds["ours"], "bare loop, preloaded batches", seconds["bare"])


def compare_recipe(size, device):
    """An epoch of SAM at 300-100: the loop that most people would write beside the scripts'."""
    images = datasets.MNIST(ROOT / "data" / "mini", transform=transforms.ToTensor())
    times = max(1, size.loop_images[0] // len(images))
    loader = DataLoader(ConcatDataset([images] * times), batch_size=128, shuffle=True, num_workers=2)
    model = MLP().to(device)
    sam = LoopSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))

    def usual():
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            sam.perturb()
            F.cross_entropy(model(x), y).backward()
            sam.step()
            sam.optimizer.zero_grad()
            loss.item()

    config = config_of(device, hidden="300-100")
    training = Training(config, mini_mnist(config, times * len(images)))
    ours = functools.partial(training.run, len(loader), training.sam)

    seconds = interleaved({"ours": ours, "usual": usual}, size.recipe_repeats, device)
    usual_loop = "DataLoader, transforms, loop SAM, .item()"
    compare("epoch, MLP 300-100, SAM", seconds["ours"], usual_loop, seconds["usual"])


def compare_with_bare(size, device):
    table("SAM's step, and the scripts' loop, beside the bare minimum.", "what", "ms", "of what", "ratio")
    compare_steps(size, device)
    compare_loops(size, device)
    compare_recipe(size, device)


# ----------------------------------------------------------------------------------------------------------------------
# A step by width: milliseconds, kernels, how long they keep the GPU busy, memory
# ----------------------------------------------------------------------------------------------------------------------


def profile(training, sam, steps=4):
    """(Kernels launched a step, milliseconds a step that they run); on a CPU, of its operators instead."""
    activity, category = torch.profiler.ProfilerActivity.CPU, "cpu_op"
    if training.config.device == "cuda":
        activity, category = torch.profiler.ProfilerActivity.CUDA, "kernel"

    with torch.profiler.profile(activities=[activity]) as profiler:
        training.run(steps, sam)
        synchronize(training.config.device)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]

    durations = [event["dur"] for event in events if event.get("cat") == category]  # microseconds
    return len(durations) / steps, sum(durations) / steps / 1e3


def start_memory(device):
    gc.collect()  # models under --amp hold themselves
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device):
    """In MiB."""
    return f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device == "cuda" else "-"


def ms_of_evaluation(training):
    """Of the test images, up to 1,000, the second time."""
    for _ in range(2):
        synchronize(training.config.device)
        began = time.perf_counter()
        evaluate(training.model, F.cross_entropy, training.data.test, "test")
    return 1e3 * (time.perf_counter() - began)


def measure_network(size, device, filters=None, hidden=None):
    """A row for SGD and one for SAM; {(method, amp): ms a step, "evaluation": ms} for the estimate of the hours."""
    name = f"ResNet-18, {filters}" if filters else f"MLP {hidden}"
    shape = (3, 32, 32) if filters else (1, 28, 28)
    data = random_data(device, size.images, shape, augment=bool(filters))
    found = {}
    cells = {}

    training = Training(config_of(device, filters, hidden, size.batch_size), data)
    found["evaluation"] = ms_of_evaluation(training)
    for method in ("SGD", "SAM"):
        sam = training.sam if method == "SAM" else None
        start_memory(device)
        ms = training.ms_a_step(size.seconds, sam)
        memory = peak_memory(device)
        kernels, busy = profile(training, sam)
        found[method, False] = ms
        cells[method] = f"{kernels:.0f}", f"{busy:.2f}", f"{busy / ms:.0%}", memory

    training = Training(config_of(device, filters, hidden, size.batch_size, amp=True), data)
    for method in ("SGD", "SAM"):
        sam = training.sam if method == "SAM" else None
        found[method, True] = training.ms_a_step(size.seconds, sam)
        row(name, method, f"{found[method, False]:.2f}", f"{found[method, True]:.2f}", *cells[method])

    return found


def measure_networks(size, device):
    """{filters or hidden layers: what measure_network returns}."""
    title = (
        f"A step of {size.batch_size} images: ms, and, as is, kernels launched, ms that they run, peak memory in MiB."
    )
    table(title, "network", "method", "as is", "--amp", "kernels", "they run", "GPU busy", "memory")
    deadline = deadline_of("networks")
    found = {}

    for width in (*size.filters, *size.hidden):
        kind = "filters" if width in size.filters else "hidden"
        if time_is_up(deadline, width):
            continue

        try:
            found[width] = measure_network(size, device, **{kind: width})
        except torch.OutOfMemoryError:
            row(width, "not measured: out of memory")

    return found


# ----------------------------------------------------------------------------------------------------------------------
# The hours of `bash run.sh`
# ----------------------------------------------------------------------------------------------------------------------

IMAGES = {  # in training and in testing
    "mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "teacher": (20_400, 5_100),
    "curve": (6_000, 12),
    "curve-scaled": (6_000, 12),
}


def flags_of(line):
    """A line of `bash run.sh list` as {flag: list of values}."""
    _, *parts = line.split(" --")
    flags = {}
    for part in parts:
        flag, *values = part.split()
        flags[flag] = values
    return flags


def weights(hidden, inputs=784, outputs=10):
    """How many an MLP's layers have."""
    layers = [inputs, *map(int, hidden.split("-")), outputs]
    return sum(a * b for a, b in itertools.pairwise(layers))


def between(x, known):
    """The value at x of the line through `known`, {x: y}, on logarithmic axes; beyond its ends, that of the end."""
    xs = sorted(known)
    ys = [known[x] for x in xs]
    return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(ys))))


def hours_of(line, found, amp):
    """(A line's network, its runs, their hours one after the other), without --sharpness."""
    flags = flags_of(line)
    runs = math.prod(max(1, len(values)) for values in flags.values())
    method = "SAM" if "sam" in flags else "SGD"

    if "filters" in flags:
        settings = resnet_width.CIFAR10
        network = int(flags["filters"][0])
        width = network
        measured = {filters: numbers for filters, numbers in found.items() if isinstance(filters, int)}
    else:
        settings = mlp_width.SETTINGS.get(flags.get("dataset", [""])[0], mlp_width.MNIST)
        network = "MLPs"
        width = weights(flags["hidden"][0])
        measured = {weights(hidden): numbers for hidden, numbers in found.items() if isinstance(hidden, str)}

    dataset = flags.get("dataset", [settings["dataset"]])[0]
    train, test = IMAGES.get(dataset, IMAGES["cifar10"])
    held_out = int(flags.get("val-size", ["0"])[0])
    epochs = int(flags.get("epochs", [settings["epochs"]])[0])
    steps = math.ceil((train - held_out) / settings["batch_size"])

    step = between(width, {width: numbers[method, amp] for width, numbers in measured.items()})
    evaluation = between(width, {width: numbers["evaluation"] for width, numbers in measured.items()})
    epoch = steps * step + (test + held_out) / 1000 * evaluation
    return network, runs, runs * epochs * epoch / 3.6e6


def estimate_hours(found):
    if not {type(width) for width in found} == {int, str}:
        print("\nHours of `bash run.sh`: no estimate, since no ResNet or no MLP was measured")
        return

    listed = subprocess.run(["bash", ROOT / "run.sh", "list"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if "--depth 50" not in line]
    runs = collections.Counter()
    hours = collections.Counter()
    amp_hours = collections.Counter()

    for line in lines:
        network, count, time_as_is = hours_of(line, found, amp=False)
        runs[network] += count
        hours[network] += time_as_is
        amp_hours[network] += hours_of(line, found, amp=True)[2]

    title = "Hours of `bash run.sh`, one run at a time, from these numbers; without ImageNet and --sharpness."
    table(title, "networks", "runs", "as is", "--amp")
    resnets = sorted(network for network in runs if network != "MLPs")
    for network in (*resnets, "MLPs"):
        name = network if network == "MLPs" else f"ResNet-18, {network}"
        row(name, runs[network], f"{hours[network]:.1f}", f"{amp_hours[network]:.1f}")
    row("all", runs.total(), f"{hours.total():.1f}", f"{amp_hours.total():.1f}")


def measure_networks_and_hours(size, device):
    estimate_hours(measure_networks(size, device))


# ----------------------------------------------------------------------------------------------------------------------
# Several processes on one card
# ----------------------------------------------------------------------------------------------------------------------


def worker(connection, size, device):
    """Trains for as many seconds as it is told, and answers with steps a second, until it is told None."""
    torch.set_num_threads(1)
    config = config_of(device, size.processes_filters, batch_size=size.batch_size)
    training = Training(config, random_data(device, size.images, (3, 32, 32), augment=True))
    training.run(3, training.sam)
    synchronize(device)
    connection.send("ready")

    for seconds in iter(connection.recv, None):
        began = time.perf_counter()
        steps = 0
        while not steps or time.perf_counter() - began < seconds:
            training.run(8, training.sam)
            synchronize(device)
            steps += 8
        connection.send(steps / (time.perf_counter() - began))


def answers(connections, deadline):
    """What each worker sends; None if one of them is not heard from in time, or has ended."""
    found = []

    for connection in connections:
        if not connection.poll(max(0, deadline - time.monotonic())):
            return None
        try:
            found.append(connection.recv())
        except EOFError:
            return None

    return found


def measure_processes(size, device):
    title = f"SAM, {size.processes_filters} filters, several processes on one device."
    table(title, "processes", "steps a second, all together", "one's beside alone")
    deadline = deadline_of("processes")
    spawn = multiprocessing.get_context("spawn")
    connections, workers = [], []

    for _ in range(max(size.processes)):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=worker, args=(theirs, size, device), daemon=True)
        process.start()
        theirs.close()  # or its end would not be seen
        connections.append(ours)
        workers.append(process)

    alone = None
    ready = answers(connections, deadline)
    for count in size.processes:
        rates = None
        if ready:
            for connection in connections[:count]:
                connection.send(5 * size.seconds)
            rates = answers(connections[:count], deadline)
        if not rates:
            row(count, "not measured: no time left, or no memory")
            break

        alone = alone or sum(rates)
        row(count, f"{sum(rates):.1f}", f"{sum(rates) / count / alone:.2f}")

    for process in workers:
        process.kill()
        process.join()


# ----------------------------------------------------------------------------------------------------------------------
# ResNet-50
# ----------------------------------------------------------------------------------------------------------------------


def measure_imagenet(size, device):
    pixels, batch_size = size.imagenet_size, size.imagenet_batch_size
    title = f"ResNet-50, images of {pixels}x{pixels} a second at batch {batch_size}, without decoding; memory in MiB."
    table(title, "filters", "SGD", "SAM", "SGD --amp", "SAM --amp", "memory", "memory --amp")
    deadline = deadline_of("imagenet")
    data = random_data(device, 4 * batch_size, (3, pixels, pixels), augment=False)

    for filters in size.imagenet_filters:
        if time_is_up(deadline, filters):
            continue

        rates, memory = [], []
        try:
            for amp in (False, True):
                config = config_of(device, filters, batch_size=batch_size, amp=amp)
                start_memory(device)
                training = Training(config, data, build_model(config, data, resnet_width.ResNet50))
                for sam in (None, training.sam):
                    rates.append(f"{1e3 * batch_size / training.ms_a_step(size.seconds, sam):.0f}")
                memory.append(peak_memory(device))
                del training
        except torch.OutOfMemoryError:
            row(filters, "not measured: out of memory")
            continue

        row(filters, *rates, *memory)


# ----------------------------------------------------------------------------------------------------------------------
# Waits for the device inside the loop
# ----------------------------------------------------------------------------------------------------------------------


def waits(training, sam, steps=80):
    """The lines that wait for the GPU in these steps, each as often as it does; an epoch has more steps."""
    training.run(3, sam)  # the copies at an epoch's beginning
    if training.config.device != "cuda":
        training.run(steps, sam)
        return []

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        training.run(steps, sam)
        torch.cuda.set_sync_debug_mode("default")

    caught = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught]


def count_waits(size, device):
    table("Waits for the GPU in 80 steps; none is right.", "loop", "waits", "where")
    networks = (
        ("MLP", config_of(device, hidden=size.hidden[0], batch_size=size.batch_size), (1, 28, 28)),
        ("ResNet-18", config_of(device, size.waits_filters, batch_size=size.batch_size), (3, 32, 32)),
        ("ResNet-18 --amp", config_of(device, size.waits_filters, batch_size=size.batch_size, amp=True), (3, 32, 32)),
    )

    for name, config, shape in networks:
        data = random_data(device, size.images, shape, augment=bool(config.filters))
        for method in ("SGD", "SAM"):
            training = Training(config, data)
            places = waits(training, training.sam if method == "SAM" else None)
            row(f"{name}, {method}", len(places) if device == "cuda" else "-", ", ".join(dict.fromkeys(places)))


# ----------------------------------------------------------------------------------------------------------------------
# SAM's correction, g(w + e) - g(w), beside float32's
# ----------------------------------------------------------------------------------------------------------------------


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def correction(config, data, rho):
    """g(w + e) - g(w) of the first batch, at the initial weights, as one vector."""
    model = build_model(config, data).train()
    optimizer = sgd(model)
    sam = SAM(optimizer, rho)
    x, y = next(batches(data, config, epoch=1))

    F.cross_entropy(model(x), y).backward()
    first = gradient(model)
    sam.perturb()
    F.cross_entropy(model(x), y).backward()
    return gradient(model) - first


def measure_cosines(size, device):
    title = f"Cosine of SAM's correction, g(w + e) - g(w), with float32's: ResNet-18, {size.cosine_filters} filters."
    table(title, "rho", "as is (TF32 on a GPU)", "--amp (bfloat16)")
    data = random_data(device, size.images, (3, 32, 32), augment=True)

    for rho in size.radii:
        vectors = []
        for flags in ({"fp32": True}, {}, {"amp": True}):
            config = config_of(device, size.cosine_filters, batch_size=size.batch_size, **flags)
            vectors.append(correction(config, data, rho))

        float32, as_is, amp = vectors
        cosines = [F.cosine_similarity(float32, other, dim=0).item() for other in (as_is, amp)]
        row(rho, *[f"{cosine:.3f}" for cosine in cosines])


# ----------------------------------------------------------------------------------------------------------------------
# --compile, in processes of their own, which can be ended when they take too long
# ----------------------------------------------------------------------------------------------------------------------


def compiled(connection, lock, size, device, width):
    """Sends (seconds that compiling took, ms a step of SGD, of SAM). width: {"filters": K} or {"hidden": H}."""
    torch.compiler.set_stance(size.compiler_stance)
    config = config_of(device, batch_size=size.batch_size, compile=True, **width)
    shape = (3, 32, 32) if config.filters else (1, 28, 28)
    training = Training(config, random_data(device, size.images, shape, augment=bool(config.filters)))

    began = time.perf_counter()
    training.run(1, training.sam)  # both passes, so also SGD's
    synchronize(device)
    seconds = time.perf_counter() - began

    with lock:  # one at a time
        sgd_ms = training.ms_a_step(size.seconds)
        sam_ms = training.ms_a_step(size.seconds, training.sam)
    connection.send((seconds, sgd_ms, sam_ms))


def measure_compiled(size, device):
    table("--compile, ms a step.", "network", "SGD", "SAM", "s until compiled")
    deadline = deadline_of("compile")
    spawn = multiprocessing.get_context("spawn")
    lock = spawn.Lock()
    started = []

    for width in size.compiled:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=compiled, args=(theirs, lock, size, device, width))
        process.start()
        theirs.close()
        started.append((width, ours, process))

    for width, connection, process in started:
        name = " ".join(f"{kind} {value}" for kind, value in width.items())
        found = answers([connection], deadline)
        if found:
            seconds, sgd_ms, sam_ms = found[0]
            row(name, f"{sgd_ms:.2f}", f"{sam_ms:.2f}", f"{seconds:.0f}")
        else:
            row(name, "not measured: no time left, or no compiler")
        process.kill()
        process.join()


# ----------------------------------------------------------------------------------------------------------------------
# All of it
# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default, help=f"(default: {default})")
    parser.add_argument("--dry-run", action="store_true", help="every part, also a GPU's on a CPU, at tiny sizes")
    args = parser.parse_args()

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use here")

    size = DRY if args.dry_run else FULL
    device = args.device
    name = platform.machine()
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"

    print(f"torch {torch.__version__}, {device}: {name}, {torch.get_num_threads()} threads")
    if args.dry_run:
        print("\nA dry run: these numbers mean nothing.")

    parts = [compare_with_bare]
    if device == "cuda" or args.dry_run:
        parts += [measure_networks_and_hours, measure_processes, measure_imagenet, count_waits, measure_cosines]
        parts += [measure_compiled]

    failed = False
    for part in parts:
        try:
            part(size, device)
        except Exception:  # what the others measure is not lost
            traceback.print_exc()
            print(f"\n{part.__name__} failed", flush=True)
            failed = True

    print(f"\n{time.monotonic() - START:.0f} s in all")
    sys.exit(failed)


if __name__ == "__main__":
    main()

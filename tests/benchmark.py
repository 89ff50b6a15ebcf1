"""What SAM and the scripts' loops cost beside the bare minimum, as ratios of medians: a minute on 2 cores.

    python tests/benchmark.py [--device cuda]

Everything that is compared runs interleaved in one process.
"""

import argparse
import json
import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import MLP, SAM, ResNet18, Split, batches, build_model, load_data, result_path

MINI = str(Path(__file__).parent.parent / "data" / "mini")


class LoopSAM:
    """SAM as it is often written: a loop over parameters, fresh clones."""

    def __init__(self, optimizer, rho=0.05):
        self.optimizer, self.rho, self.old = optimizer, rho, {}

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


def interleaved(functions, repeats, device):
    """Median seconds of each function, called in turn."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)


def bare(model, optimizer, batch, sam=None, passes=2):
    """Forward and backward passes and one step; SAM's moves between them where it is given."""
    for images, y in batch:
        for last in range(passes)[::-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(images), y).backward()
            if sam and last:
                sam.perturb()
        (sam or optimizer).step()


def sam_step(make, images, device, repeats):
    batch = [(images, torch.randint(10, (len(images),), device=device))]
    functions = {}
    for name, kind in {"bare": None, "SAM": SAM, "loop": LoopSAM}.items():
        model = make().to(device)
        optimizer = sgd(model)
        sam = kind and kind(optimizer)
        functions[name] = lambda m=model, o=optimizer, s=sam: bare(m, o, batch, s)
    return interleaved(functions, repeats, device)


def config_of(script, results, device, *argv):
    """The run of a script's command line, its parser taken from the script's last lines."""
    sys.argv = [
        f"{script}.py",
        "--data-dir",
        MINI,
        "--dataset",
        "mnist",
        "--device",
        device,
        "--results",
        results,
        *argv,
    ]
    parsers, main = [], common.main
    common.main = lambda parser, train, settings_of: parsers.extend([parser, settings_of])
    runpy.run_path(str(Path(common.__file__).with_name(f"{script}.py")), run_name="__main__")
    common.main = main
    return common.parse(*parsers)[0]


def repeated(data, times):
    """The training images several times over, and one test image, so that an epoch is all training."""
    train = Split(data.train.inputs.repeat(times, 1, 1, 1), data.train.targets.repeat(times))
    return data._replace(train=train, test=Split(data.test.inputs[:1], data.test.targets[:1]))


def loops(device, repeats=5):
    """(name, an epoch of the script's loop, an epoch of the bare loop on preloaded batches), in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for script, size in ((mlp_width, 4000), (label_noise, 4000), (sparsity, 4000), (resnet_width, 512)):
            width = ["--filters", "8"] if script is resnet_width else ["--hidden", "300-100"]
            for optimizer in ([], ["--sam"]):
                argv = ["--epochs", "1", "--train-size", f"{size}", *optimizer, *width]
                config = config_of(script.__name__, folder, device, *argv)
                data = repeated(load_data(config), 1 if script is resnet_width else 5)
                script.load_data = lambda config, data=data: data
                model = build_model(config, data)
                steps, base = list(batches(data, config, 1)), sgd(model)
                sam = SAM(base) if config.sam else None

                def ours(script=script, config=config):
                    script.train(config)

                def minimum(model=model, base=base, steps=steps, sam=sam):
                    bare(model.train(), base, steps, sam, 2 if sam else 1)

                seconds, plain = [], []
                for _ in range(repeats):
                    ours()
                    seconds.append(json.loads(result_path(config).read_text())["history"][0]["seconds"])
                    start = time.perf_counter()
                    minimum()
                    plain.append(time.perf_counter() - start)
                name = f"{script.__name__} {config.hidden or config.filters} {'SAM' if config.sam else 'SGD'}"
                yield name, statistics.median(seconds), statistics.median(plain)


def recipe(device):
    """An epoch of SAM at 300-100 on 20,000 images: the usual recipe beside mlp_width.py's loop."""
    from torchvision import datasets, transforms

    data_set = ConcatDataset([datasets.MNIST(MINI, transform=transforms.ToTensor())] * 5)
    loader = DataLoader(data_set, batch_size=128, shuffle=True, num_workers=2)
    model = MLP().to(device)
    sam = LoopSAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))

    def usual():
        for images, y in loader:
            images, y = images.to(device), y.to(device)
            loss = F.cross_entropy(model(images), y)
            loss.backward()
            sam.perturb()
            F.cross_entropy(model(images), y).backward()
            sam.step()
            sam.optimizer.zero_grad()
            loss.item()

    with tempfile.TemporaryDirectory() as folder:
        config = config_of("mlp_width", folder, device, "--sam", "--epochs", "1", "--hidden", "300-100")
        data = repeated(load_data(config), 5)
        mlp_width.load_data = lambda config: data
        return interleaved({"usual": usual, "ours": lambda: mlp_width.train(config)}, 3, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads\n\n| what | ms | of what | ratio |")
    print("| --- | --- | --- | --- |")

    def row(what, ours, of, theirs):
        print(f"| {what} | {1e3 * ours:.2f} | {of}, {1e3 * theirs:.2f} ms | {ours / theirs:.2f} |", flush=True)

    for name, make, images, repeats in (
        ("MLP 300-100, batch 128", MLP, torch.rand(128, 784), 300),
        ("ResNet-18, 8 filters, batch 64", lambda: ResNet18(8), torch.rand(64, 3, 32, 32), 15),
    ):
        times = sam_step(make, images.to(device), device, repeats)
        row(f"SAM step, {name}", times["SAM"], "2 passes and an SGD step", times["bare"])
        row(f"SAM step, {name}", times["SAM"], "SAM as a loop over parameters", times["loop"])
    printed, sys.stdout = sys.stdout, sys.stderr  # the runs' own lines aside
    found = list(loops(device))
    times = recipe(device)
    sys.stdout = printed
    for name, ours, plain in found:
        row(f"epoch, {name}", ours, "bare loop, preloaded batches", plain)
    row("epoch, mlp_width 300-100 SAM", times["ours"], "DataLoader, transforms, loop SAM, .item()", times["usual"])


if __name__ == "__main__":
    main()

"""What several test files share: command lines, runs in this process and in processes of their own, a plain loop."""

import functools
import json
import math
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common

ROOT = Path(__file__).parent.parent
MINI = ["--data-dir", "data/mini", "--dataset", "mnist", "--device", "cpu"]


@functools.cache
def small_mnist():
    """A --data-dir with the first 200 training and 60 test images of data/mini."""
    folder = Path(tempfile.mkdtemp())
    for path in (ROOT / "data" / "mini" / "MNIST" / "raw").iterdir():
        header, size = (16, 28 * 28) if "images" in path.name else (8, 1)
        count, data = 200 if path.name.startswith("train") else 60, path.read_bytes()
        (folder / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        small = data[:4] + count.to_bytes(4, "big") + data[8 : header + count * size]
        (folder / "MNIST" / "raw" / path.name).write_bytes(small)
    return folder


@functools.cache
def program(script):
    """The parser and settings_of that a script's last lines hand to main()."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "main", lambda parser, train, settings_of: found.extend([parser, settings_of]))
        runpy.run_path(str(ROOT / f"{script.__name__}.py"), run_name="__main__")
    return found


def runs(script, results, *argv):
    """The runs of a script's command line, on data/mini where argv names no other data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *MINI, "--results", str(results), *map(str, argv)])
        return common.parse(*program(script))


def train(script, config):
    """Trains in this process; returns the result file's object."""
    script.train(config)
    return strict(common.result_path(config))


def call_main(script, results, *argv):
    """A script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *MINI, "--results", str(results), *map(str, argv)])
        parser, settings_of = program(script)
        common.main(parser, script.train, settings_of)


class Stopped(Exception):
    pass


def interrupt(script, config, epoch):
    """Trains as far as this epoch and leaves the checkpoint of a run that was killed then; returns its path."""
    end_epoch = common.Recorder.end_epoch

    def stop(recorder, row):
        end_epoch(recorder, row)
        if row["epoch"] == epoch:
            recorder.save()
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common.Recorder, "end_epoch", stop)
        script.train(config)
    return common.result_path(config).with_suffix(".ckpt")


def strict(path):
    """A result file's object; NaN and Infinity, which JSON lacks, raise."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: pytest.fail(f"{text} in {path}"))


def timeless(result):
    """A result's history but for its seconds."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result["history"]]


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def result_of(folder):
    """The one result below the folder, and no checkpoint, temporary or probe."""
    (path,) = files(folder)
    return strict(path)


# Processes of a script's own, forked from one that has imported torch already: a tenth of a second each, not three.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision.datasets", "torch.distributed", "tqdm"])


def be_script(command, output, errors, env, prepare):
    os.environ.update(env)
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    if prepare:
        prepare()
    runpy.run_path(command[0], run_name="__main__")


class Script:
    """A script that runs in a process of its own. prepare: a function without arguments that this process calls first,
    to kill or to hold up the script at some point of its course."""

    def __init__(self, command, results, prepare=None, **env):
        folder = Path(tempfile.mkdtemp())
        self.output, self.errors = folder / "output", folder / "errors"
        command = [*(command.split() if isinstance(command, str) else map(str, command)), "--results", str(results)]
        env = {"PYTHONDONTWRITEBYTECODE": "1", **{key: str(value) for key, value in env.items()}}
        self.process = FORKS.Process(target=be_script, args=(command, self.output, self.errors, env, prepare))
        self.process.start()

    def end(self, status=0, lines=0):
        """Waits for it to end with this status and this many lines on stderr, which are returned."""
        self.process.join(120)
        errors = self.errors.read_text() if self.errors.exists() else ""
        assert self.process.exitcode == status, errors
        assert "Traceback" not in errors and len(errors.splitlines()) == lines, errors
        return errors


def run(command, results, status=0, lines=0, prepare=None):
    return Script(command, results, prepare).end(status, lines)


def start_pair(command, results, prepares=(None, None)):
    """A script as torchrun starts it in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    return [Script(command, results, prepares[rank], RANK=rank, LOCAL_RANK=rank, **env) for rank in (0, 1)]


def squared(outputs, y):
    """The contract's squared error, written out: summed over the outputs, mean over the batch, labels one-hot."""
    goal = y if y.is_floating_point() else F.one_hot(y, outputs.shape[1])
    return sum(((row - target) ** 2).sum() for row, target in zip(outputs, goal)) / len(y)


def shift(image, top, left, flip):
    crop = F.pad(image, [4] * 4)[:, top : top + 32, left : left + 32]
    return crop.flip(2) if flip else crop


def prepared(images, moves=None):
    if moves is not None:
        images = torch.stack([shift(image, *move) for image, move in zip(images, moves.tolist())])
    if images.dtype != torch.uint8:
        return images
    x = images / 255
    if x.shape[1] == 3:
        x = (x - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / torch.tensor([0.2023, 0.1994, 0.2010]).view(
            3, 1, 1
        )
    return x


def plain_run(model, data, config, rate, targets=None, masks=()):
    """The training loop as a textbook has it: no shared code, per-parameter SAM, `.item()` at every step.

    rate: function of the update, from 0, and of their number. targets: labels in place of data's, which then are the
    clean ones. masks: of the kernels. Each of config.processes perturbs by its own share's gradient.
    """
    error = F.cross_entropy if config.loss == "ce" else squared
    params = list(model.parameters())
    last = {id(p) for p in model[-1].parameters()}
    masks = dict(zip([id(p) for p in params if p.ndim > 1], masks))
    momenta = [torch.zeros_like(p) for p in params]
    clean, y_all = data.train.targets, data.train.targets if targets is None else targets
    perturb = getattr(config, "perturb", "all")
    n, size, rows = len(y_all), config.batch_size, []
    updates = math.ceil(n / size)

    def gradient(x, y):
        outputs = model(x)
        loss = error(outputs, y)
        grads = torch.autograd.grad(loss, params)
        return loss.item(), outputs, [g * masks.get(id(p), 1) for g, p in zip(grads, params)]

    def score(split, name):
        with torch.no_grad():
            outputs = model(prepared(split.inputs))
        found = {f"{name}_loss": error(outputs, split.targets).item()}
        if not split.targets.is_floating_point():
            found[f"{name}_acc"] = (outputs.argmax(1) == split.targets).double().mean().item()
        return found

    for epoch in range(1, config.epochs + 1):
        rng = np.random.default_rng((config.seed, epoch))
        order = torch.from_numpy(rng.permutation(n))
        moves = rng.integers(0, (9, 9, 2), (n, 3)) if data.augment else None
        model.train()
        losses, hits, clean_hits, shares = 0.0, 0, 0, 0.0
        for i in range(updates):
            whole = np.arange(i * size, min((i + 1) * size, n))
            means = [torch.zeros_like(p) for p in params]
            for rank in range(config.processes):
                mine = whole[rank :: config.processes]
                x = prepared(data.train.inputs[order[mine]], None if moves is None else moves[mine])
                y = y_all[order[mine]]
                loss, outputs, grads = gradient(x, y)
                if rank == 0:  # BatchNorm's statistics are the main process's, of the first pass
                    state = [b.clone() for b in model.buffers()]
                losses += loss * len(y)
                hits += (outputs.argmax(1) == y).sum().item()
                clean_hits += (outputs.argmax(1) == clean[order[mine]]).sum().item()
                if config.sam:
                    squares = [(g**2).sum().item() for g in grads]
                    in_last = sum(s for s, p in zip(squares, params) if id(p) in last)
                    shares += in_last / sum(squares)
                    moves_too = [perturb == "all" or (id(p) in last) == (perturb == "last") for p in params]
                    grads = [g * moved for g, moved in zip(grads, moves_too)]
                    kept = [p.detach().clone() for p in params]
                    scale = [p.detach() if config.adaptive else torch.ones_like(p) for p in params]
                    norm = math.sqrt(sum(((s * g) ** 2).sum().item() for s, g in zip(scale, grads)))
                    with torch.no_grad():
                        for p, g, s in zip(params, grads, scale):
                            p += config.rho * s * s * g / norm
                    *_, grads = gradient(x, y)
                    with torch.no_grad():
                        for p, old in zip(params, kept):
                            p.copy_(old)
                means = [mean + g * len(y) / len(whole) for mean, g in zip(means, grads)]
            lr = rate((epoch - 1) * updates + i, config.epochs * updates)
            with torch.no_grad():
                for buffer, old in zip(model.buffers(), state):
                    buffer.copy_(old)
                for p, g, b in zip(params, means, momenta):
                    b.mul_(config.momentum).add_(g + config.weight_decay * p)
                    p.sub_(lr * b)
        model.eval()
        row = {"epoch": epoch, "lr": lr, "train_loss": losses / n}
        if not y_all.is_floating_point():
            row["train_acc"] = hits / n
            row |= {} if targets is None else {"train_clean_acc": clean_hits / n}
        row |= score(data.test, "test") | (score(data.val, "val") if len(data.val.targets) else {})
        rows.append(row | ({"last_layer_share": shares / updates} if config.sam and targets is not None else {}))
    return rows


def assert_close(history, expected, tolerance=1e-10):
    assert [row.keys() for row in history] == [row.keys() for row in expected]
    for row, values in zip(history, expected):
        for key, value in values.items():
            assert math.isclose(row[key], value, rel_tol=tolerance, abs_tol=tolerance), (key, row[key], value)

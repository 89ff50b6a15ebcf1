"""Several processes on a CPU: SAM under DistributedDataParallel both ways, and the scripts under torchrun."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import SAM, frozen_bn_stats

ROOT = Path(__file__).parent.parent
MINI = ["--data-dir", "data/mini", "--dataset", "mnist", "--train-size", "256", "--epochs", "1", "--device", "cpu"]
STEPS, WORLD = 3, 2


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def network(batchnorm=False):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(7) if batchnorm else nn.Identity()
    return nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Linear(7, 3)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (16,), generator=generator)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def backward(model, x, y):
    F.cross_entropy(model(x), y).backward()


def train(model, sam, x, y, first_pass):
    """The README's loop."""
    sam.optimizer.zero_grad()
    with first_pass():
        backward(model, x, y)
    sam.perturb()
    with frozen_bn_stats(model):
        backward(model, x, y)
    sam.step()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    states = {}
    for way, batchnorm in (("plain", False), ("no_sync", False), ("no_sync", True)):
        ddp = DistributedDataParallel(network(batchnorm))
        sam = SAM(optimizer_of(ddp), rho=0.5)
        for step in range(STEPS):
            x, y = (part.chunk(WORLD)[rank] for part in batch(step))
            train(ddp, sam, x, y, ddp.no_sync if way == "no_sync" else torch.enable_grad)
        states[way + "_batchnorm" * batchnorm] = ddp.module.state_dict()
    torch.save(states, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_equal(states, way, model):
    for rank in range(WORLD):
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(states[rank][way][name], expected, rtol=0, atol=1e-12)


def test_ddp_equals_one_process_on_the_whole_batch(states):
    model = network()
    sam = SAM(optimizer_of(model), rho=0.5)
    for step in range(STEPS):
        train(model, sam, *batch(step), torch.enable_grad)
    assert_equal(states, "plain", model)


def test_no_sync_averages_the_sam_gradients_of_the_halves(states):
    """The reference takes torch.autograd.grad at w and at w + e, with e written out, for each half."""
    model = network()
    optimizer, params = optimizer_of(model), list(model.parameters())
    for step in range(STEPS):
        means = [torch.zeros_like(p) for p in params]
        for x, y in zip(*(part.chunk(WORLD) for part in batch(step))):
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            moved = {n: p + 0.5 * g / norm for (n, p), g in zip(model.named_parameters(), grads)}
            loss = F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
            for mean, g in zip(means, torch.autograd.grad(loss, list(moved.values()))):
                mean += g / WORLD
        for p, mean in zip(params, means):
            p.grad = mean
        optimizer.step()
    assert_equal(states, "no_sync", model)
    assert not torch.equal(states[0]["no_sync"]["0.weight"], states[0]["plain"]["0.weight"])


def test_batchnorm_under_ddp_counts_every_batch_once(states):
    first, second = (state["no_sync_batchnorm"] for state in states)
    assert first["1.num_batches_tracked"] == second["1.num_batches_tracked"] == STEPS
    for name in ("0.weight", "1.weight", "3.weight"):
        assert torch.equal(first[name], second[name])


def script(folder, *argv, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, *argv, *MINI, "--results", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr
    return done


def result_of(folder):
    """The one result, and nothing else in the folder."""
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_resnet_under_torchrun_writes_one_sane_result(tmp_path):
    done = script(tmp_path, "resnet_width.py", "--filters", "2", "--sam", processes=WORLD)
    assert done.stdout.count("done:") == 1  # only the first process speaks
    result = result_of(tmp_path)
    (row,) = result["history"]
    assert result["status"] == "done" and row["epoch"] == 1
    assert all(math.isfinite(value) for value in row.values())
    assert 1.5 < row["train_loss"] < 4 and 0 < row["train_acc"] < 1 and 0 < row["test_acc"] < 1


@pytest.mark.parametrize("argv", [["mlp_width.py"], ["sparsity.py", "--pruner", "snip", "--sparsity", "0.5"]])
def test_sgd_under_torchrun_equals_one_process(tmp_path, argv):
    for processes in (1, WORLD):
        script(tmp_path / str(processes), *argv, "--hidden", "30-20", processes=processes)
    one, two = (result_of(tmp_path / str(processes))["history"][0] for processes in (1, WORLD))
    assert one.keys() == two.keys()
    for key in one.keys() - {"seconds"}:
        assert math.isclose(one[key], two[key], abs_tol=1e-4), key

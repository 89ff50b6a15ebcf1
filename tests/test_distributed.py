"""Several processes on a CPU: SAM under DistributedDataParallel both ways, and the scripts as torchrun starts them."""

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    FORKS,
    ROOT,
    Script,
    assert_close,
    files,
    interrupt,
    plain_run,
    result_of,
    runs,
    small_mnist,
    start_pair,
    strict,
    timeless,
)
from torch.nn.parallel import DistributedDataParallel

import common
import resnet_width
from common import SAM, ResNet18, frozen_bn_stats

SMALL = f"--data-dir {small_mnist()} --dataset mnist --device cpu --batch-size 25 --epochs 2"
STEPS, WORLD = 3, 2


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
    workers = [FORKS.Process(target=worker, args=(rank, str(folder))) for rank in range(WORLD)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
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


def end_pair(pair, statuses=(0, 0), lines=(0, 0)):
    return "".join([script.end(*expected) for script, *expected in zip(pair, statuses, lines)])


def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    "argv",
    [
        "--train-size 40 --val-size 33",  # 25 and 15 images a step: 13 and 12, 8 and 7
        "--train-size 53 --sam --rho 0.1",
        "--train-size 40 --sam --rho 0.1 --adaptive --loss mse --lr 0.002",
    ],
)
def test_each_process_perturbs_by_its_share_and_the_sam_gradients_are_averaged(float64, tmp_path, argv):
    command = f"resnet_width.py {SMALL} --filters 1 {argv}"
    pair = start_pair(command, tmp_path, prepares=(double, double))
    (config,) = runs(resnet_width, tmp_path, *command.split()[1:])
    data = common.load_data(config)
    torch.manual_seed(0)
    model = ResNet18(config.filters, 1)
    config.processes = WORLD
    updates = config.epochs * math.ceil(len(data.train.targets) / 25)
    drops = [int(fraction * updates) for fraction in (0.5, 0.75)]
    rate = lambda step, steps: config.lr / 10 ** sum(step >= drop for drop in drops)  # noqa: E731
    expected = plain_run(model, data, config, rate)
    end_pair(pair)
    result = result_of(tmp_path)
    assert result["config"]["processes"] == WORLD
    assert_close(timeless(result), expected)


def stop_after(epoch):
    """Ends this process, one of a pair, after this epoch and a checkpoint."""
    end_epoch = common.Recorder.end_epoch

    def end(recorder, row):
        end_epoch(recorder, row)
        if row["epoch"] == epoch:
            if common.is_main():
                recorder.save()
            sys.exit(0)

    common.Recorder.end_epoch = end


def keep_state(folder):
    """Saves what this process has in the end."""
    finish = common.Recorder.finish

    def keep(recorder, **more):
        torch.save(recorder.model.state_dict(), folder / f"{common.processes()[0]}.pt")
        finish(recorder, **more)

    common.Recorder.finish = keep


def blind(folder):
    """This process can read no result and no checkpoint."""
    keep_state(folder)
    common.read_own = None


RESNET = f"resnet_width.py {SMALL} --filters 1 --train-size 15 --batch-size 6 --epochs 3 --sam --rho 0.1"


def test_the_main_process_decides_what_is_finished_and_where_to_go_on(tmp_path):
    """Two seeds: one is finished, the other has a checkpoint, and only the main process can read."""
    end_pair(start_pair(RESNET + " --seed 0 1", tmp_path / "whole"))
    end_pair(start_pair(RESNET, tmp_path / "parts"))
    stop = functools.partial(stop_after, 2)
    end_pair(start_pair(RESNET + " --seed 1", tmp_path / "parts", prepares=(stop, stop)))
    assert len(list((tmp_path / "parts").rglob("*.ckpt"))) == 1
    prepares = [functools.partial(prepare, tmp_path) for prepare in (keep_state, blind)]
    pair = start_pair(RESNET + " --seed 0 1", tmp_path / "parts", prepares)
    end_pair(pair)
    assert "2 runs, 1 already finished" in pair[0].output.read_text() and pair[1].output.read_text() == ""
    whole, parts = (files(tmp_path / name) for name in ("whole", "parts"))
    assert [path.name for path in whole] == [path.name for path in parts] and len(whole) == 2
    for one, other in zip(whole, parts):
        assert timeless(strict(one)) == timeless(strict(other))
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])  # running statistics too


def count_images():
    """Stands in for the curvature, which takes minutes for a ResNet."""
    common.sharpness = lambda model, loss, images, targets, masks: {"images": len(images)}


def test_one_process_and_two_are_two_runs(tmp_path):
    command = f"{RESNET} --sharpness 3"
    counts = (count_images, count_images)
    end_pair(start_pair(command, tmp_path / "alone", counts))
    (config,) = runs(resnet_width, tmp_path / "both", *command.split()[1:])
    interrupt(resnet_width, config, 1)  # whose checkpoint is not for two processes
    pair = start_pair(command, tmp_path / "both", counts)
    end_pair(pair)
    assert "1 runs, 0 already finished" in pair[0].output.read_text()
    single = Script(command, tmp_path / "both", count_images)
    single.end()
    assert "1 runs, 0 already finished" in single.output.read_text()
    results = {strict(path)["config"]["processes"]: strict(path) for path in files(tmp_path / "both")}
    assert results.keys() == {1, 2} and len(files(tmp_path / "both")) == 2
    assert timeless(results[2]) == timeless(result_of(tmp_path / "alone")) != timeless(results[1])
    assert results[2]["sharpness"]["images"] == 3


@pytest.mark.parametrize(
    "command", ["mlp_width.py --hidden 9", "label_noise.py --hidden 9", "sparsity.py --hidden 9 --sparsity 0.5"]
)
def test_the_other_scripts_refuse_several_processes_in_one_line(tmp_path, command):
    pair = start_pair(f"{command} {SMALL}", tmp_path)
    assert "several processes are for resnet_width.py alone" in end_pair(pair, (2, 2), (1, 0))
    assert files(tmp_path) == []


@pytest.mark.parametrize("left", [{"RANK": 1}, {"WORLD_SIZE": 2}, {"RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "x"}])
@pytest.mark.parametrize("script", ["mlp_width.py --hidden 9", "resnet_width.py --filters 1 --train-size 20"])
def test_a_launchers_variables_left_behind_are_no_torchrun(tmp_path, script, left):
    Script(f"{script} {SMALL} --epochs 1", tmp_path, **left).end()
    assert result_of(tmp_path)["config"]["processes"] == 1
    bad = Script(f"{script} --hiden 20", tmp_path / "bad", **left).end(status=2, lines=1)
    assert "--hiden" in bad


@pytest.mark.parametrize("script", ["mlp_width.py --hidden 9", "resnet_width.py --filters 1"])
def test_variables_that_no_torchrun_has_set_are_one_line(tmp_path, script):
    left = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": "two"}
    Script(f"{script} {SMALL}", tmp_path, **left).end(status=2, lines=1)
    assert files(tmp_path) == []


def test_a_world_of_one_without_a_master_is_one_line(tmp_path):
    left = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    assert "MASTER_ADDR" in Script(f"resnet_width.py {SMALL}", tmp_path, **left).end(status=2, lines=1)


def test_torchrun_with_one_process_starts_any_script(tmp_path):
    Script(f"mlp_width.py {SMALL} --hidden 9", tmp_path, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).end()
    assert result_of(tmp_path)["config"]["processes"] == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [("--batch-size 1", "--batch-size"), ("--epochs 0", "--epochs"), ("--device cuda:1", "--device cuda:1")]
    + [
        ("--train-size 26", "--batch-size"),
        ("--val-size 1", "--val-size or 60 test images: too few for 2"),
        ("--dataset nowhere", "--dataset nowhere"),
        ("--dataset kmnist --data-dir README.md", "README.md"),  # met by the main process alone
    ],
)
def test_what_a_user_can_mend_is_said_once_by_all_processes_together(tmp_path, argv, named):
    pair = start_pair(f"resnet_width.py {SMALL} --filters 1 {argv}", tmp_path)
    assert named in end_pair(pair, (2, 2), (1, 0))
    assert files(tmp_path) == []


def test_a_results_folder_that_cant_be_written_to_ends_both(tmp_path):
    pair = start_pair(f"resnet_width.py {SMALL} --filters 1", "README.md/inside")
    assert "--results" in end_pair(pair, (2, 2), (1, 0))


def test_torchrun_starts_a_script(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
    command = [*launch, "resnet_width.py", *SMALL.split(), *"--filters 1 --train-size 50 --sam --results".split()]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done:") == 1  # only the first process speaks
    result = result_of(tmp_path)
    assert result["status"] == "done" and [row["epoch"] for row in result["history"]] == [1, 2]
    for row in result["history"]:
        assert all(math.isfinite(value) for value in row.values())
        assert 1 < row["train_loss"] < 10 and 0 <= row["train_acc"] < 1

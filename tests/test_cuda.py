"""What CUDA must do, on a GPU where there is one; the same on the CPU where that is cheap, so that the tests are tried.

    python -m pytest tests/test_cuda.py           # on GPU 0
    GPU=1 python -m pytest tests/test_cuda.py     # on another

The other tests see no GPU (conftest.py). These start processes that do.
"""

import argparse
import functools
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image

import common
import label_noise
import mlp_width
import resnet_width
import sparsity

ROOT = Path(__file__).resolve().parent.parent
MINI = "--data-dir data/mini --dataset mnist"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("GPU", "0"), "PYTHONDONTWRITEBYTECODE": "1"}

# ----------------------------------------------------------------------------------------------------------------------
# The device, and processes that use it
# ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def gpu_found():
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if not any(os.path.exists(path) for path in drivers):  # asking torch takes seconds
        return False

    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True).stdout.strip() == "True"


@pytest.fixture
def device(request):
    if request.param == "cuda" and not gpu_found():
        pytest.skip("needs a GPU, and torch finds none that it can use here")
    return request.param


on_gpu = pytest.mark.parametrize("device", ["cuda"], indirect=True)
on_both = pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)


def start(command, *arguments, **env):
    """A Python program in a process of its own; `arguments` go to it as they are."""
    command = [sys.executable, *command.split(), *map(str, arguments)]
    env = {**ENVIRONMENT, **{name: str(value) for name, value in env.items()}}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process, seconds=600):
    """Waits for it to end well; what it printed."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors
    assert "Traceback" not in errors, errors
    return output


def result_of(results):
    (path,) = results.rglob("*.json")
    return json.loads(path.read_text())


def run(command, results, device):
    """The result of a script's run on this device."""
    end(start(command, "--device", device, "--results", results))
    return result_of(results)


# ----------------------------------------------------------------------------------------------------------------------
# The scripts
# ----------------------------------------------------------------------------------------------------------------------

SMALL = f"{MINI} --epochs 2 --train-size 600"  # batches of 128, the last of 88


@on_gpu
@pytest.mark.parametrize(
    "command",
    [
        f"mlp_width.py --hidden 30 {SMALL} --sam --amp",
        f"resnet_width.py --filters 8 {SMALL} --sam --amp",
        f"label_noise.py --filters 8 {SMALL} --sam --perturb random",
        f"label_noise.py --hidden 30 {SMALL} --sam --adaptive --perturb last",
        f"resnet_width.py --filters 8 {SMALL} --sam --compile",
    ],
)
def test_a_script_learns(device, command, tmp_path):
    result = run(command, tmp_path, device)
    first, second = result["history"]
    assert result["status"] == "done" and math.isfinite(result["test_loss"])
    assert second["train_loss"] < first["train_loss"]


@on_gpu
def test_images_of_any_size_go_to_the_device_from_workers(device, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(2):
            folder = tmp_path / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(128 * label, 128 * (label + 1), (50, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")

    command = "resnet_width.py --depth 50 --filters 4 --image-size 64 --workers 2 --batch-size 8 --epochs 2 --sam"
    end(start(command, "--dataset", tmp_path / "images", "--device", device, "--results", tmp_path / "results"))
    assert len(result_of(tmp_path / "results")["history"]) == 2


@on_gpu
def test_torchrun_of_one_process_over_nccl(device, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=1"
    script = f"resnet_width.py --filters 1 {MINI} --epochs 1 --train-size 64 --batch-size 32 --sam"
    end(start(f"{torchrun} {script}", "--device", device, "--results", tmp_path))
    (row,) = result_of(tmp_path)["history"]
    assert math.isfinite(row["train_loss"])


@on_both
def test_a_killed_run_goes_on(device, tmp_path):
    command = f"mlp_width.py --hidden 30 {MINI} --train-size 600 --epochs 150 --sam"
    killed = start(command, "--device", device, "--results", tmp_path)

    give_up = time.monotonic() + 100
    while not list(tmp_path.rglob("*.ckpt")):  # it appears whole
        assert killed.poll() is None and time.monotonic() < give_up
        time.sleep(0.05)

    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    before = torch.load(checkpoint, map_location="cpu", weights_only=True)["history"]

    history = run(command, tmp_path, device)["history"]
    assert 0 < len(before) < 150
    assert history[: len(before)] == before  # the seconds, too
    assert [row["epoch"] for row in history] == list(range(1, 151))


# ----------------------------------------------------------------------------------------------------------------------
# CUDA beside the CPU
# ----------------------------------------------------------------------------------------------------------------------

TWENTY_STEPS = f"{MINI} --epochs 1 --train-size 640 --batch-size 32 --fp32 --save"


@pytest.mark.parametrize(
    "device, command, tolerance",
    [
        ("cpu", f"mlp_width.py --hidden 300-100 {TWENTY_STEPS} --sam", 1e-4),
        ("cuda", f"mlp_width.py --hidden 300-100 {TWENTY_STEPS}", 1e-4),
        ("cuda", f"mlp_width.py --hidden 300-100 {TWENTY_STEPS} --sam --sharpness 20", 1e-4),
        # In a ResNet rounding turns ReLUs on and off: two of a CPU's own convolutions differ by up to 8e-4 here.
        ("cuda", f"resnet_width.py --filters 8 {TWENTY_STEPS} --lr 0.001", 3e-3),
        ("cuda", f"resnet_width.py --filters 8 {TWENTY_STEPS} --lr 0.001 --sam", 3e-3),
        ("cuda", f"sparsity.py --hidden 300-100 --pruner snip --sparsity 0.95 {TWENTY_STEPS} --sam", 1e-4),
    ],
    indirect=["device"],
)
def test_twenty_steps_beside_the_cpus(device, command, tolerance, tmp_path):
    here = start(command, "--device", device, "--results", tmp_path / "device")
    there = start(command, "--device", "cpu", "--results", tmp_path / "cpu")
    end(here)
    end(there)

    def weights(results):
        (path,) = results.rglob("*.pt")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: tensor for name, tensor in state.items() if name.endswith(("weight", "bias"))}
        return torch.cat([tensor.double().flatten() for tensor in state.values()])

    ours, theirs = weights(tmp_path / "device"), weights(tmp_path / "cpu")
    assert torch.equal(ours == 0, theirs == 0)  # masks
    assert (ours - theirs).norm() / theirs.norm() < tolerance

    result, expected = result_of(tmp_path / "device"), result_of(tmp_path / "cpu")
    assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=tolerance)
    assert result["num_nonzero"] == expected["num_nonzero"]
    if "sharpness" in result:
        for key in ("lambda_max", "trace", "s2"):
            assert result["sharpness"][key] == pytest.approx(expected["sharpness"][key], rel=1e-2)


# ----------------------------------------------------------------------------------------------------------------------
# SyncBatchNorm under frozen statistics
# ----------------------------------------------------------------------------------------------------------------------

# Each of two processes has half of a batch; together they must be one BatchNorm over all of it. On a CPU, which has no
# SyncBatchNorm, each has all of it.
SYNCHRONIZED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from common import frozen_bn_stats

device = sys.argv[1]
dist.init_process_group("gloo")
torch.manual_seed(0)
x = torch.randn(8, 3, 6, 6).to(device)
plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
model.load_state_dict(plain.state_dict())
share = x
if device == "cuda":
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    share = x[dist.get_rank() :: 2]

model(share)
moved = [buffer.clone() for buffer in model.buffers()]
assert moved[0].abs().max() > 0 and moved[2] == 1

with frozen_bn_stats(model):
    outputs = model(share)
    (outputs**2).sum().backward()

expected = plain(x)
(expected**2).sum().backward()
for buffer, before in zip(model.buffers(), moved):
    assert torch.equal(buffer, before)

gradient = model[0].weight.grad.clone()
if device == "cuda":
    expected = expected[dist.get_rank() :: 2]
    dist.all_reduce(gradient)
torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(gradient, plain[0].weight.grad, rtol=1e-3, atol=1e-3)
dist.destroy_process_group()
print("right")
"""


@on_both
def test_synchronized_batch_norm_with_frozen_statistics(device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}
    pair = [start("-c", SYNCHRONIZED, device, RANK=rank, **env) for rank in range(2)]
    assert [end(process) for process in pair] == ["right\n", "right\n"]


# ----------------------------------------------------------------------------------------------------------------------
# Nothing in the loop waits for the device
# ----------------------------------------------------------------------------------------------------------------------

# A script, whose steps after an epoch's first raise where they wait for the GPU, until Scores.means reads the sums.
NO_WAITS = """
import runpy
import sys
import torch
from common import Scores

add, means = Scores.add, Scores.means

def guarded_add(*args):
    add(*args)
    torch.cuda.set_sync_debug_mode("error")

def unguarded_means(*args):
    torch.cuda.set_sync_debug_mode("default")
    return means(*args)

Scores.add, Scores.means = guarded_add, unguarded_means
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

LOOPS = [  # 70 steps: scores are summed at every 64th
    "mlp_width.py --hidden 30",
    "mlp_width.py --hidden 30 --sam --adaptive",
    "resnet_width.py --filters 4 --sam --amp",
    "label_noise.py --hidden 30 --sam --perturb last",
    "label_noise.py --hidden 30 --sam --perturb random",
    "sparsity.py --filters 4 --sam",
]


@on_gpu
def test_no_step_waits_for_the_gpu(device, tmp_path):
    flags = f"{MINI} --epochs 2 --train-size 560 --batch-size 8"
    processes = []

    for number, command in enumerate(LOOPS):
        script, *arguments = f"{command} {flags}".split()
        arguments += ["--device", device, "--results", tmp_path / str(number)]
        processes.append(start("-c", NO_WAITS, script, *arguments))

    for process in processes:
        end(process)


class Stop(Exception):
    pass


def flags_of(script, command, monkeypatch):
    """The one run of a script's command line."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(common, "main", lambda parser, train, settings_of: found.extend([parser, settings_of]))
        runpy.run_path(script.__file__, run_name="__main__")

    monkeypatch.setattr(sys, "argv", [script.__file__, *command.split()])
    (config,) = common.parse(*found)
    return config


MANY_STEPS = "--hidden 30 --train-size 140 --batch-size 2"  # scores are summed at every 64th


@pytest.mark.parametrize(
    "script, flags",
    [
        (mlp_width, f"{MANY_STEPS}"),
        (mlp_width, f"{MANY_STEPS} --sam"),
        (mlp_width, f"{MANY_STEPS} --sam --adaptive --loss mse"),
        (label_noise, f"{MANY_STEPS} --sam --perturb last"),
        (label_noise, f"{MANY_STEPS} --sam --perturb rest"),
        (sparsity, f"{MANY_STEPS} --sam"),
        (resnet_width, "--filters 1 --train-size 10 --batch-size 4"),
        (resnet_width, "--filters 1 --train-size 10 --batch-size 4 --sam"),
    ],
)
def test_no_step_reads_a_value_from_the_device(script, flags, tmp_path, monkeypatch):
    """On tensors without data (device meta): there, what would wait for a GPU raises."""
    monkeypatch.chdir(ROOT)
    config = flags_of(script, f"{MINI} {flags} --device cpu --results {tmp_path}", monkeypatch)
    config.device = "meta"
    summed = []

    def means(scores, *names):
        scores.reduce()
        summed.append(scores.sums)
        if len(summed) == 2:  # of the training and the test images
            raise Stop
        return dict.fromkeys(names, 0.0)

    def plain_sgd(*args, fused, **kwargs):  # there are no fused kernels for the device
        return torch.optim.SGD(*args, **kwargs)

    monkeypatch.setattr(common.Scores, "means", means)
    monkeypatch.setattr(script, "SGD", plain_sgd)
    if script is sparsity:
        monkeypatch.setattr(sparsity, "tell_of_empty_layers", lambda *args: None)  # before the loop it may read

    with pytest.raises(Stop):
        script.train(config)
    assert [sums.device.type for sums in summed] == ["meta", "meta"]
    with pytest.raises(RuntimeError):  # so would a read before
        summed[0][0].item()


# ----------------------------------------------------------------------------------------------------------------------
# TF32
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32(monkeypatch):
    """What says whether TF32 is allowed, put back afterwards; a model that is asked to move to CUDA stays."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
    yield lambda: [cudnn.allow_tf32, matmul.allow_tf32]
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@pytest.mark.parametrize("fp32", [False, True])
def test_tf32_is_used_unless_fp32_is_asked_for(tf32, fp32):
    config = argparse.Namespace(device="cuda", fp32=fp32, amp=False, compile=False)
    common.prepare(torch.nn.Linear(1, 1), config)
    assert tf32() == [not fp32, not fp32]


def test_curvature_is_measured_without_tf32(tf32, monkeypatch):
    during = []
    monkeypatch.setattr(common, "sharpness", lambda *args: during.extend(tf32()) or {})
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True

    train = common.Split(torch.randn(5, 4), torch.arange(5) % 2)
    data = common.Data(train, train, train, (4,), 2, False, common.LOSSES["ce"])
    config = argparse.Namespace(sharpness=3)
    recorder = argparse.Namespace(config=config, data=data, model=torch.nn.Linear(4, 2))
    common.Recorder.measure_sharpness(recorder, targets=None, masks=None)
    assert during == [False, False]


# ----------------------------------------------------------------------------------------------------------------------
# benchmark.py
# ----------------------------------------------------------------------------------------------------------------------


def test_benchmark_dry_run():
    output = end(start("tests/benchmark.py --dry-run --device cpu", OMP_NUM_THREADS=1), seconds=300)
    tables = [line for line in output.splitlines() if line.startswith("| ---")]
    assert len(tables) == 8
    assert "failed" not in output
    for table in output.split("\n\n"):
        rows = [line.count("|") for line in table.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, table  # as many cells in each row: all was measured


def test_hours_are_the_steps_of_all_runs():
    numbers = {("SGD", False): 1, ("SAM", False): 2, "evaluation": 1e-9}
    found = {4: numbers, "300-100": numbers}

    line = "python resnet_width.py --filters 8 --epochs 10 --val-size 5000 --seed 0 1 2 --sam --rho 0.1 0.2"
    network, runs, hours = benchmark.hours_of(line, found, amp=False)
    steps = 6 * 10 * math.ceil(45_000 / 128)
    assert (network, runs) == (8, 6)
    assert hours == pytest.approx(steps * 2 / 1000 / 3600)

    line = "python mlp_width.py --dataset curve --hidden 5 --seed 0"
    network, runs, hours = benchmark.hours_of(line, found, amp=False)
    assert (network, runs) == ("MLPs", 1)
    assert hours == pytest.approx(60 * 1000 / 1000 / 3600)


def test_a_width_between_two_measured_ones_lies_on_a_power_law():
    assert benchmark.between(32, {16: 3, 64: 48}) == pytest.approx(12)
    assert benchmark.between(4, {16: 3, 64: 48}) == pytest.approx(3)

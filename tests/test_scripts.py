"""The scripts as a user starts them: what they write, say and cost."""

import ctypes
import functools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, Script, files, result_of, small_mnist, strict, timeless

import common

SMALL = f"--data-dir {small_mnist()} --dataset mnist --device cpu --val-size 50 --epochs 2 --batch-size 50".split()
SCRIPTS = {
    "mlp_width": "--hidden 30-20 30",
    "resnet_width": "--filters 1",
    "label_noise": "--hidden 30-20 --noise 0.25 0.5",
    "sparsity": "--hidden 30-20 --pruner snip --sparsity 0 0.9",
}
COMMANDS = [[f"{name}.py", *SMALL, *argv.split()] for name, argv in SCRIPTS.items()]
COMMANDS += [[*command, "--sam", "--rho", "0.05", "0.1"] for command in COMMANDS]
CURVE = "mlp_width.py --dataset curve --hidden 6 --train-size 600 --epochs 2 --device cpu --sam --rho 0.2".split()


def call(*command, **options):
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of every script, for SGD and SAM; one of them started by a shell's own python, the others forked."""
    folder = tmp_path_factory.mktemp("results")
    forked = [Script(command, folder) for command in [*COMMANDS[1:], CURVE]]
    done = call(sys.executable, *COMMANDS[0], "--results", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "2 runs, 0 already finished" and done.stdout.count("\ndone: ") == 2
    assert re.search(r"\ndone: \S+: test \d+\.\d\d% ", done.stdout)
    for script in forked:
        script.end()
    return folder


def results(folder):
    return [strict(path) for path in files(folder)]


ROW = {"epoch", "lr", "seconds", "train_loss", "train_acc", "test_loss", "test_acc", "val_loss", "val_acc"}
KEYS = {
    "config",
    "defaults",
    "status",
    "env",
    "num_params",
    "num_nonzero",
    "num_test",
    "history",
    "test_acc",
    "best_test_acc",
    "test_loss",
    "train_loss",
}
FLAGS = {
    *"sam rho adaptive epochs batch_size lr momentum weight_decay schedule warmup milestones loss sharpness".split(),
    *"seed dataset data_dir train_size val_size device amp compile fp32 results force save script processes".split(),
    *"hidden filters".split(),
}
OWN_FLAGS = {
    "mlp_width": set(),
    "resnet_width": {"depth", "image_size", "workers"},
    "label_noise": {"noise", "perturb"},
    "sparsity": {"sparsity", "pruner"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_files_have_what_the_contract_says(folder, script):
    found = [r for r in results(folder / script) if r["config"]["dataset"] == "mnist"]
    assert len(found) == (3 if script == "resnet_width" else 6)
    for result in found:
        config, history = result["config"], result["history"]
        assert config["script"] == script and config["epochs"] == 2 and config["val_size"] == 50
        assert config.keys() == result["defaults"].keys() == FLAGS | OWN_FLAGS[script] and config["processes"] == 1
        assert (result["defaults"]["epochs"], result["defaults"]["val_size"]) == (config["filters"] and 200 or 100, 0)
        assert result.keys() == KEYS
        assert result["status"] == "done" and [row["epoch"] for row in history] == [1, 2]
        for row in history:
            more = {"train_clean_acc"} if script == "label_noise" else set()
            more |= {"last_layer_share"} if script == "label_noise" and config["sam"] else set()
            assert row.keys() == ROW | more
            assert all(0 <= row[key] <= 1 for key in row if key.endswith("acc") or key == "last_layer_share")
            assert row["seconds"] > 0
        for key in ("test_acc", "test_loss", "train_loss"):
            assert result[key] == history[-1][key]
        assert result["best_test_acc"] == max(row["test_acc"] for row in history)
        assert result["num_test"] == 60  # of small_mnist
        removed = result["num_params"] - result["num_nonzero"]
        assert removed == round(config.get("sparsity", 0) * (784 * 30 + 30 * 20 + 20 * 10))
        assert result["env"].keys() == {"python", "torch", "torchvision", "device", "threads", "commit", "seconds"}
        assert result["env"]["python"] == platform.python_version()
        assert result["env"]["commit"] == (call("git", "rev-parse", "HEAD").stdout.strip() or None)
        assert result["env"]["device"].split() == [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        assert math.isclose(result["env"]["seconds"], sum(row["seconds"] for row in history), abs_tol=0.01)


def test_a_curves_result_has_its_function_and_no_accuracy(folder):
    (result,) = [r for r in results(folder / "mlp_width") if r["config"]["dataset"] == "curve"]
    assert result.keys() == KEYS | {"function"}
    assert result["function"].keys() == {"x", "y", "y_initial"}
    assert all(len(values) == 311 for values in result["function"].values())
    losses = {"epoch", "lr", "seconds", "train_loss", "test_loss"}
    assert [row.keys() for row in result["history"]] == [losses, losses]


def test_every_script_learns(folder):
    for result in results(folder):
        losses = [row["train_loss"] for row in result["history"]]
        assert losses[-1] < losses[0], result["config"]


def test_the_same_command_gives_the_same_history(folder, tmp_path):
    Script(COMMANDS[5][:-1], tmp_path).end()
    (first,) = [r for r in results(folder / "resnet_width") if r["config"]["rho"] == 0.05]
    assert timeless(result_of(tmp_path)) == timeless(first)


def compile_without_compiler():
    """The model's graphs are taken, forward and backward, but run as they are: C++ code for them takes a minute."""
    compile_model = torch.nn.Module.compile
    torch.nn.Module.compile = lambda model, **more: compile_model(model, backend="aot_eager", **more)


@pytest.mark.parametrize("flag", ["--amp", "--compile"])
def test_amp_and_compile_train_to_nearly_the_same(folder, tmp_path, flag):
    Script([*COMMANDS[4][:-1], "--hidden", "30-20", flag], tmp_path, compile_without_compiler).end()
    (first,) = [r for r in results(folder / "mlp_width") if (r["num_params"], r["config"]["rho"]) == (24_380, 0.05)]
    assert math.isclose(result_of(tmp_path)["train_loss"], first["train_loss"], rel_tol=0.05)


def test_without_git_the_commit_is_unknown(tmp_path):
    Script(["mlp_width.py", *SMALL, "--hidden", "5"], tmp_path, PATH="").end()
    assert result_of(tmp_path)["env"]["commit"] is None


def test_plot_reads_what_the_scripts_write(folder, tmp_path):
    done = call(sys.executable, "plot.py", "--results", folder, "--figures", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "summary.md").stat().st_size > 0
    assert all(path.stat().st_size > 10_000 for path in tmp_path.glob("*.png")) and list(tmp_path.glob("*.png"))


def note_peak(path):
    """Has this process write the peak of its memory, in bytes; what is freed goes back at once, and doesn't count."""
    ctypes.CDLL(None).mallopt(-3, 1_000_000)  # M_MMAP_THRESHOLD
    finish = common.Recorder.finish

    def note(recorder, **more):
        finish(recorder, **more)
        (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        path.write_text(str(1024 * int(peak)))

    common.Recorder.finish = note


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, and tells glibc to return memory")
def test_sam_takes_the_memory_of_one_more_copy_of_the_parameters(tmp_path):
    peaks = []
    for name, more in (("sgd", []), ("sam", ["--sam"])):
        command = ["mlp_width.py", *SMALL, "--hidden", "3000-1000", "--epochs", 1, *more]
        Script(command, tmp_path / "results", functools.partial(note_peak, tmp_path / name)).end()
        peaks.append(int((tmp_path / name).read_text()))
    parameters = 4 * results(tmp_path / "results")[0]["num_params"]
    assert 0.6 < (peaks[1] - peaks[0]) / parameters < 1.4


COUNT_FAULTS = """
import resource, torch
torch.set_num_threads(1)
for _ in range(12):
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_run_sh_has_freed_memory_kept_for_the_next_step():
    settings = dict(re.findall(r"(MALLOC_\w+)=(\d+)", (ROOT / "run.sh").read_text()))
    counts = call(sys.executable, "-c", COUNT_FAULTS, env=os.environ | settings).stdout.split()
    assert int(counts[-1]) - int(counts[1]) < 5000  # else 200,000, where pages have 4 KB

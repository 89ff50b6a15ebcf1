"""The scripts as a user starts them: what they write, say and cost."""

import argparse
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
from helpers import ROOT, Script, call_main, files, result_of, small_mnist, strict, timeless

import common
import mlp_width
import sparsity

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


def test_amp_trains_to_nearly_the_same(folder, tmp_path):
    Script([*COMMANDS[4][:-1], "--hidden", "30-20", "--amp"], tmp_path).end()
    (first,) = [r for r in results(folder / "mlp_width") if (r["num_params"], r["config"]["rho"]) == (24_380, 0.05)]
    assert math.isclose(result_of(tmp_path)["train_loss"], first["train_loss"], rel_tol=0.05)


def test_compiled_graphs_are_for_one_size_each_and_all_taken_in_the_first_epoch(monkeypatch, tmp_path):
    """A smaller last batch, else, makes the sizes of all later graphs symbols. The graphs are taken, but run as they
    are: C++ code for them takes a minute."""
    graphs = []
    grown = []
    compile_model = torch.nn.Module.compile

    def keep(graph, inputs):
        graphs.append([*map(type, inputs)])
        return graph.forward

    def count(recorder, row):
        end_epoch(recorder, row)
        grown.append(len(graphs))

    end_epoch = common.Recorder.end_epoch
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, **more: compile_model(model, backend=keep, **more))
    monkeypatch.setattr(common.Recorder, "end_epoch", count)
    argv = [*SMALL, "--hidden", 9, "--epochs", 3, "--train-size", 140, "--sam"]  # batches of 50, 50, 40
    call_main(mlp_width, tmp_path / "plain", *argv)
    grown.clear()
    call_main(mlp_width, tmp_path / "compiled", *argv, "--compile")
    assert grown == [grown[0]] * 3 and grown[0] >= 4  # two sizes in training, test and held-out images
    assert not any(torch.SymInt in inputs or int in inputs for inputs in graphs)
    plain, compiled = (result_of(tmp_path / name)["train_loss"] for name in ("plain", "compiled"))
    assert math.isclose(plain, compiled, rel_tol=1e-5)


# ------------------------------------------------------------ --save


def accuracy(model, images, labels):
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize(
    ("script", "argv", "make"),
    [
        ("mlp_width", "--hidden 30-20", lambda: common.MLP((30, 20))),
        ("resnet_width", "--filters 1", lambda: common.ResNet18(1, 1)),
        ("label_noise", "--hidden 30-20 --noise 0.5", lambda: common.MLP((30, 20))),
        ("sparsity", "--hidden 30-20 --pruner snip --sparsity 0.9", lambda: common.MLP((30, 20))),
    ],
)
def test_saved_weights_score_as_the_history_says_and_are_not_part_of_the_name(folder, tmp_path, script, argv, make):
    Script([f"{script}.py", *SMALL, *argv.split(), "--sam", "--save"], tmp_path).end()
    weights, result = sorted(files(tmp_path), key=lambda path: path.suffix == ".json")
    assert weights.suffix == ".pt" and weights.stem == result.stem
    assert (folder / script / result.name).exists()  # of the run without --save
    model = make()
    model.load_state_dict(torch.load(weights, weights_only=True))
    _, (images, labels) = common.read_torchvision("mnist", str(small_mnist()))
    images = common.pad_to_32(images) if script == "resnet_width" else images
    found = accuracy(model, images / 255, labels)
    assert math.isclose(found, strict(result)["history"][-1]["test_acc"], rel_tol=1e-6)
    if script == "sparsity":
        zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
        assert zeros == strict(result)["num_params"] - strict(result)["num_nonzero"]


def test_a_finished_run_without_weights_says_so(tmp_path, capsys):
    argv = [*SMALL, "--hidden", 9, "--epochs", 1]
    call_main(mlp_width, tmp_path, *argv)
    call_main(mlp_width, tmp_path, *argv)
    assert capsys.readouterr().err == ""
    call_main(mlp_width, tmp_path, *argv, "--save")
    (line,) = capsys.readouterr().err.splitlines()
    assert "without --save" in line and "--force" in line and len(files(tmp_path)) == 1
    call_main(mlp_width, tmp_path, *argv, "--save", "--force")
    call_main(mlp_width, tmp_path, *argv, "--save")
    assert capsys.readouterr().err == "" and len(files(tmp_path)) == 2


# ------------------------------------------------------------ what a run says at its start


def test_a_mask_that_leaves_a_layer_empty_is_told(tmp_path, capsys):
    argv = [*SMALL, "--epochs", 1, "--hidden", "30-20"]
    call_main(sparsity, tmp_path, *argv, "--sparsity", 0.9, 0.998)  # of 23520, 600 and 200 weights 47, 1 and none stay
    (line,) = capsys.readouterr().err.splitlines()
    assert "--sparsity 0.998" in line and "no weight is left in 5.weight;" in line
    call_main(sparsity, tmp_path, *argv, "--sparsity", 0.99999)
    (line,) = capsys.readouterr().err.splitlines()
    assert "1.weight, 3.weight, 5.weight" in line
    assert [strict(path)["status"] for path in files(tmp_path)] == ["done"] * 3


@pytest.mark.parametrize(
    ("rhos", "flags", "device", "told"),
    [
        ([0.04, 0.01], {"amp": True}, "cpu", "--amp: .*0.04"),
        ([0.05], {"amp": True}, "cpu", None),
        ([0.009], {}, "cpu", None),
        ([0.05, 0.009, 0.001], {}, "cuda", "TF32 .*0.009"),
        ([0.01], {}, "cuda:1", None),
        ([0.009], {"fp32": True}, "cuda", None),
        ([0.009], {"sam": False}, "cuda", None),
    ],
)
def test_rounding_that_hides_sams_correction_is_told_once(capsys, rhos, flags, device, told):
    defaults = {"sam": True, "adaptive": False, "amp": False, "fp32": False, "device": device}
    common.warn_about_precision([argparse.Namespace(**{**defaults, **flags, "rho": rho}) for rho in rhos])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told)
    assert not told or re.search(told, lines[0])


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

"""The scripts and a copied SAM class, each as a user starts it, on data/mini."""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MINI = ["--data-dir", "data/mini", "--dataset", "mnist", "--train-size", "400", "--val-size", "100", "--epochs", "2"]
SCRIPTS = {
    "mlp_width": ["--hidden", "30-20"],
    "resnet_width": ["--filters", "2"],
    "label_noise": ["--hidden", "30-20", "--noise", "0.25", "0.5"],
    "sparsity": ["--hidden", "30-20", "--pruner", "snip", "--sparsity", "0", "0.9"],
}


def call(*command):
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)


def results(folder):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).rglob("*.json"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of every script, for SGD and SAM."""
    folder = tmp_path_factory.mktemp("results")
    for script, argv in SCRIPTS.items():
        for optimizer in ([], ["--sam", "--rho", "0.05", "0.1"]):
            done = call(sys.executable, f"{script}.py", *argv, *MINI, *optimizer, "--results", folder)
            assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_result_files_have_what_the_contract_says(folder, script):
    found = results(folder / script)
    assert len(found) == (6 if script in ("label_noise", "sparsity") else 3)
    for result in found:
        config, history = result["config"], result["history"]
        assert config["script"] == script and config["epochs"] == 2 and config["train_size"] == 400
        assert result["status"] == "done" and [row["epoch"] for row in history] == [1, 2]
        for row in history:
            expected = {
                "epoch",
                "lr",
                "seconds",
                *(f"{s}_{m}" for s in ("train", "test", "val") for m in ("loss", "acc")),
            }
            assert row.keys() == expected | ({"train_clean_acc"} if script == "label_noise" else set())
            assert all(0 <= row[key] <= 1 for key in row if key.endswith("acc"))
        assert result["test_acc"] == history[-1]["test_acc"] and result["train_loss"] == history[-1]["train_loss"]
        assert result["best_test_acc"] == max(row["test_acc"] for row in history)
        removed = result["num_params"] - result["num_nonzero"]
        assert removed == round(config.get("sparsity", 0) * (784 * 30 + 30 * 20 + 20 * 10))
        assert {"python", "torch", "torchvision", "device", "commit", "seconds"} <= result["env"].keys()


def test_every_script_learns(folder):
    for result in results(folder):
        losses = [row["train_loss"] for row in result["history"]]
        assert losses[-1] < losses[0], result["config"]


def test_the_same_command_gives_the_same_history(folder, tmp_path):
    call(sys.executable, "resnet_width.py", "--filters", 2, *MINI, "--sam", "--rho", 0.1, "--results", tmp_path)
    (again,) = results(tmp_path)
    (first,) = [r for r in results(folder / "resnet_width") if r["config"]["rho"] == 0.1]
    for ours, theirs in zip(first["history"], again["history"]):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_amp_and_compile_train_to_nearly_the_same(folder, tmp_path):
    argv = [*SCRIPTS["mlp_width"], *MINI, "--sam", "--results", tmp_path]
    for flag in ("--amp", "--compile"):
        done = call(sys.executable, "mlp_width.py", *argv, flag)
        assert done.returncode == 0, done.stderr
    (first,) = [r for r in results(folder / "mlp_width") if r["config"]["rho"] == 0.05]
    for result in results(tmp_path):
        assert math.isclose(result["train_loss"], first["train_loss"], rel_tol=0.05)


def test_without_git_the_commit_is_unknown(tmp_path):
    argv = [sys.executable, "mlp_width.py", "--hidden", "5-5", *MINI, "--results", str(tmp_path)]
    subprocess.run(argv, cwd=ROOT, check=True, env={**os.environ, "PATH": ""})
    assert results(tmp_path)[0]["env"]["commit"] is None


def test_a_folder_of_images_is_a_data_set(tmp_path):
    from PIL import Image

    for part, count in (("train", 40), ("val", 8)):
        for label in range(2):
            place = tmp_path / "images" / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count // 2):
                shade = 40 * label + 100 + i
                Image.new("RGB", (32, 32), (shade, 255 * label, 0)).save(place / f"{i}.png")
    argv = ["--filters", 2, "--dataset", tmp_path / "images", "--epochs", 6, "--batch-size", 8, "--lr", 0.02]
    done = call(sys.executable, "resnet_width.py", *argv, "--train-size", 32, "--results", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    (result,) = results(tmp_path / "results")
    assert result["history"][-1]["train_acc"] > 0.9  # green is one class, red the other


def test_plot_draws_every_figure(folder, tmp_path):
    done = call(sys.executable, "plot.py", "--results", folder, "--figures", tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    names = ("gain_by_width", "accuracy_by_width", "rho", "label_noise", "sparsity", "curves")
    assert {p.name for p in tmp_path.iterdir()} == {"summary.md", *(f"{name}.png" for name in names)}
    assert all((tmp_path / f"{name}.png").stat().st_size > 20_000 for name in names)


def test_help_names_every_flag():
    done = call(sys.executable, "sparsity.py", "--help")
    flags = "hidden filters sparsity pruner sam rho adaptive epochs batch-size lr momentum weight-decay seed dataset"
    for flag in [*flags.split(), *"data-dir train-size val-size device results force amp compile fp32".split()]:
        assert f"--{flag}" in done.stdout


PEAK = r"""
import re, runpy, sys, common
common.keep_freed_memory = lambda: None  # what is freed does not count
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory in /proc")
def test_sam_takes_the_memory_of_one_more_copy_of_the_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    argv = ["mlp_width.py", *MINI, "--hidden", "3000-1000", "--epochs", 1, "--results", tmp_path]
    sgd, sam = (call(sys.executable, "-c", PEAK, *argv, *more).stdout.split()[-1] for more in ([], ["--sam"]))
    parameters = 4 * results(tmp_path)[0]["num_params"]
    assert 0.6 < 1024 * (int(sam) - int(sgd)) / parameters < 1.4


FAULTS = """
import resource, sys, torch, common
if sys.argv[1] == "keep":
    common.keep_freed_memory()
counts = []
for _ in range(12):
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(counts[-1] - counts[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_kept_for_the_next_step():
    returned, kept = (int(call(sys.executable, "-c", FAULTS, how).stdout) for how in ("return", "keep"))
    assert kept < 0.1 * returned

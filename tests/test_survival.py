"""What kills, signals, torn files, a full disk, divergence and a second process do to a run.

KILLS=24 python -m pytest tests/test_survival.py -k killed    the full form of the first test; in the suite 4 kills
"""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common import NOT_THE_RUN

ROOT = Path(__file__).parent.parent
MINI = "--data-dir data/mini --dataset mnist"
# one thread: with as many as cores, a busy machine makes each epoch ten times as slow
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
RUNS = {  # a few seconds each, since checkpoints are a second apart
    "mlp": f"mlp_width.py {MINI} --hidden 60-20 --epochs 150",
    "resnet-sam": f"resnet_width.py {MINI} --filters 2 --train-size 200 --batch-size 32 --epochs 8 --sam",
    "noise-sam": f"label_noise.py {MINI} --hidden 60-20 --noise 0.5 --val-size 500 --epochs 100 --sam --rho 0.1",
    "sparsity-sam": f"sparsity.py {MINI} --hidden 60-20 --pruner snip --sparsity 0.9 --epochs 80 --sam",
    "mlp-sam": f"mlp_width.py {MINI} --hidden 60-20 --epochs 100 --sam --adaptive --seed 1",
    "resnet": f"resnet_width.py {MINI} --filters 2 --train-size 200 --batch-size 32 --epochs 8",
}
KILLS = int(os.environ.get("KILLS", 4))
SHARE = {run: KILLS // len(RUNS) + (i < KILLS % len(RUNS)) for i, run in enumerate(RUNS)}
TINY = f"mlp_width.py {MINI} --hidden 9-7 --train-size 200 --epochs 2 --seed 0 1 2 3 4 5"


def start(command, results, **options):
    argv = [sys.executable, *command.split(), "--results", str(results)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env=ENV, **pipes, **options)


def end(process, status=0, lines=0):
    """Waits; the process must end with this exit status and this many lines on stderr, which are returned."""
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, len(errors.splitlines())) == (status, lines), errors
    assert "Traceback" not in errors
    return errors


def run(command, results, status=0, lines=0, **options):
    return end(start(command, results, **options), status, lines)


def wait_for_training(process):
    assert "0 are finished" in process.stdout.readline()  # printed once torch is imported


def wait_for_checkpoint(process, folder, pattern):
    while not list(folder.rglob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return next(folder.rglob(pattern))


def written(folder):
    """When the checkpoint below the folder was written."""
    return [path.stat().st_mtime_ns for path in folder.rglob("*.ckpt")]


def strict(path):
    """A result file's object; NaN and Infinity, which JSON lacks, raise."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda text: pytest.fail(f"{text} in {path}"))


def history(path):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in strict(path)["history"]]


def only(folder):
    """The only file below the folder: no checkpoint, temporary or probe is left."""
    (path,) = [path for path in folder.rglob("*") if path.is_file()]
    return path


@functools.cache
def never_stopped(name):
    """The history of a run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        run(RUNS[name], folder)
        return history(only(Path(folder)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The results of six tiny runs."""
    folder = tmp_path_factory.mktemp("tiny")
    run(TINY, folder)
    return sorted(folder.rglob("*.json"))


@pytest.fixture
def copy(tiny, tmp_path):
    """Copies of the tiny results, at the same places below tmp_path."""
    shutil.copytree(tiny[0].parent, tmp_path / "mlp_width")
    return sorted(tmp_path.rglob("*.json"))


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("state")
    process = start(TINY.replace("epochs 2", "epochs 4000"), folder)
    path = wait_for_checkpoint(process, folder, "*.ckpt")
    process.kill()
    process.communicate()
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", [name for name, kills in SHARE.items() if kills])
def test_a_run_killed_again_and_again_has_the_history_of_one_never_killed(tmp_path, name):
    rng, kills = random.Random(name), SHARE[name]
    landed, went_on, ended, saved = 0, 0, 0, []
    with ThreadPoolExecutor() as pool:
        lone = pool.submit(never_stopped, name)
        while landed < kills:
            folder = tmp_path / str(ended)
            before = written(folder)
            process = start(RUNS[name], folder)
            wait_for_training(process)
            while landed % 3 < 2 and process.poll() is None and written(folder) == before:
                time.sleep(0.02)  # a third of the kills come whenever they may, the others after a new checkpoint
            time.sleep(rng.uniform(0, 0.8))
            process.kill()
            process.communicate()
            if list(folder.rglob("*.json")):  # it ended before its kill: begun anew, elsewhere
                ended, saved = ended + 1, []
                assert ended < 2 + kills
                continue
            landed += 1
            for path in folder.rglob("*.ckpt"):
                saved = torch.load(path, weights_only=True)["history"]
                went_on += 1
        run(RUNS[name], folder)
    (path,) = folder.rglob("*.json")
    assert history(path) == lone.result()
    assert strict(path)["history"][: len(saved)] == saved  # seconds too: these epochs weren't trained again
    assert went_on and not list(folder.rglob("*.ckpt"))
    print(f"\n{name}: {landed} kills, {went_on} with a checkpoint to go on from, the last at {len(saved)} epochs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_in_one_line_and_the_same_command_goes_on(tmp_path, number):
    process = start(RUNS["mlp"], tmp_path)
    checkpoint = wait_for_checkpoint(process, tmp_path, "*.ckpt")
    process.send_signal(number)
    process.wait(timeout=5)
    assert "the same command" in end(process, status=128 + number, lines=1)
    assert only(tmp_path) == checkpoint
    saved = torch.load(checkpoint, weights_only=True)["history"]
    run(RUNS["mlp"], tmp_path)
    assert strict(only(tmp_path))["history"][: len(saved)] == saved != []
    assert history(only(tmp_path)) == never_stopped("mlp")


def test_finished_runs_are_skipped_and_forced_ones_run_again(copy, tiny, tmp_path):
    run(TINY, tmp_path)
    assert [path.read_bytes() for path in copy] == [path.read_bytes() for path in tiny]
    run(TINY.replace("0 1 2 3 4 5", "0 1") + " --force", tmp_path)
    again = [strict(path)["config"]["force"] for path in copy]
    assert again == [True, True, False, False, False, False]
    assert list(map(history, copy)) == list(map(history, tiny))


def test_result_files_that_are_torn_or_of_another_run_are_named_and_run_again(copy, tiny, tmp_path):
    whole = copy[0].read_bytes()
    other = strict(copy[3])
    other["config"]["lr"] = 0.2
    bad = [whole[: len(whole) // 2], b"", b"\xff\x00", json.dumps(other).encode(), b"[]"]
    for path, data in zip(copy, bad):
        path.write_bytes(data)
    lines = run(TINY, tmp_path, lines=len(bad)).splitlines()
    assert all(str(path) in line and "again" in line for path, line in zip(copy, lines))
    assert list(map(history, copy)) == list(map(history, tiny))
    assert copy[5].read_bytes() == tiny[5].read_bytes()


def test_checkpoints_that_are_torn_or_of_another_run_are_named_set_aside_and_not_used(copy, tiny, state, tmp_path):
    paths = [path.with_suffix(".ckpt") for path in copy]
    for path, result in zip(paths, copy):
        config = {key: value for key, value in strict(result)["config"].items() if key not in NOT_THE_RUN}
        torch.save({**state, "config": config}, path)
        result.unlink()
    torch.save(state, paths[0])  # another configuration
    paths[1].write_bytes(paths[1].read_bytes()[:-5000])
    paths[2].write_bytes(b"")
    config = torch.load(paths[3])["config"]
    torch.save({**state, "config": config, "optimizer": {}}, paths[3])  # after the model is loaded, this fails
    torch.save({**state, "config": config | {"seed": 4}, "model": dict(list(state["model"].items())[:-1])}, paths[4])
    torch.save([], paths[5])
    lines = run(TINY, tmp_path, lines=6).splitlines()
    assert all(str(path) in line and path.name + ".bad" in line for path, line in zip(paths, lines)), lines
    assert all(Path(f"{path}.bad").is_file() and not path.exists() for path in paths)
    assert list(map(history, copy)) == list(map(history, tiny))


def test_two_processes_at_the_same_run(tmp_path):
    pair = [start(RUNS["mlp"], tmp_path) for _ in range(2)]
    for process in pair:
        wait_for_training(process)
    for process in pair:
        end(process)
    assert history(only(tmp_path)) == never_stopped("mlp")


def test_a_diverged_run_keeps_its_epochs_and_the_sweep_goes_on(tmp_path):
    sweep = f"mlp_width.py {MINI} --hidden 9-7 --train-size 200 --epochs 2 --sam --rho 1e30 0.05"
    run(sweep, tmp_path / "rho")
    status = {strict(path)["config"]["rho"]: strict(path)["status"] for path in (tmp_path / "rho").rglob("*.json")}
    assert status == {1e30: "diverged", 0.05: "done"}
    # lr x weight decay > 2: the weights grow with each update, until they overflow after some epochs
    run(f"mlp_width.py {MINI} --hidden 9-7 --train-size 200 --epochs 200 --weight-decay 100", tmp_path / "late")
    result = strict(only(tmp_path / "late"))
    rows = result["history"]
    assert result["status"] == "diverged" and 0 < len(rows) < 200 and result["test_acc"] == rows[-1]["test_acc"]
    assert all(abs(value) < float("inf") for row in rows for value in row.values())
    run(sweep, tmp_path / "rho")  # a diverged run is a finished one
    assert len(list((tmp_path / "rho").rglob("*"))) == 3


@pytest.mark.parametrize("command, limit", [(RUNS["mlp"], 20_000), (TINY + " --force", 300)], ids=["ckpt", "result"])
def test_a_full_disk_is_one_line_and_what_was_written_before_is_intact(copy, tiny, tmp_path, command, limit):
    def nearly_full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert "--results" in run(command, tmp_path, status=2, lines=1, preexec_fn=nearly_full)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == copy
    assert [path.read_bytes() for path in copy] == [path.read_bytes() for path in tiny]

"""What kills, signals, torn and foreign files, a full disk, divergence and a second process do to a run.

KILLS=60 python -m pytest tests/test_survival.py -k killed    the full form of the first test; in the suite 12 kills

No test waits for a machine: a script that is to be killed kills itself at a step or in the middle of a file, and one
that is to be stopped waits for it.
"""

import copy
import errno
import functools
import gc
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    Script,
    call_main,
    files,
    interrupt,
    result_of,
    run,
    runs,
    small_mnist,
    strict,
    timeless,
    train,
)

import common
import mlp_width
import resnet_width

DATA = f"--data-dir {small_mnist()} --dataset mnist --device cpu --batch-size 64"
RUNS = {
    "mlp": f"mlp_width.py {DATA} --hidden 12-9 --epochs 8",
    "resnet-sam": f"resnet_width.py {DATA} --filters 1 --train-size 40 --batch-size 16 --epochs 4 --sam",
    "noise-sam": f"label_noise.py {DATA} --hidden 12-9 --noise 0.5 --val-size 50 --epochs 8 --sam --perturb random",
    "sparsity-sam": f"sparsity.py {DATA} --hidden 12-9 --pruner snip --sparsity 0.9 --epochs 8 --sam",
    "mlp-asam": f"mlp_width.py {DATA} --hidden 12-9 --epochs 8 --sam --adaptive --seed 1 --schedule cosine --warmup 3",
    "curve": "mlp_width.py --dataset curve --hidden 8 --train-size 600 --batch-size 60 --epochs 4 --device cpu",
}
KILLS = int(os.environ.get("KILLS", 12))
SHARE = {run: KILLS // len(RUNS) + (i < KILLS % len(RUNS)) for i, run in enumerate(RUNS)}
SMALL = DATA.split()
TINY = f"mlp_width.py {DATA} --hidden 9-7 --epochs 2 --seed 0 1 2 3 4 5"


# ------------------------------------------------------------ what a script's process does to itself


def save_always():
    """A checkpoint after every epoch, however short."""
    end_epoch = common.Recorder.end_epoch

    def end(recorder, row):
        end_epoch(recorder, row)
        if common.is_main() and recorder.status == "done":
            recorder.save()

    common.Recorder.end_epoch = end


def at_step(number, act):
    """Calls act before this process's update of that number, from 1."""
    save_always()
    learning_rate, count = common.learning_rate, 0

    def rate(*args):
        nonlocal count
        count += 1
        if count == number:
            act()
        return learning_rate(*args)

    common.learning_rate = rate


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_file(number, moment):
    """Kills the process at this one of its checkpoints and results: half written, before or after the renaming."""
    save_always()
    replace, write, count = Path.replace, common.write, 0

    def counted_write(path, content):
        nonlocal count
        count += path.suffix in (".ckpt", ".json")
        dies = count == number

        def half(file):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            die()

        def replaced(temporary, target):
            if dies and moment == "before":
                die()
            replace(temporary, target)
            if dies:
                die()

        Path.replace = replaced
        if dies and moment == "half":
            os.fsync = half
        write(path, content)

    common.write = counted_write


def wait_at_step(number, marker, others=0):
    """Makes the marker's file at this step, then waits: for as many such files, or else a minute."""

    def wait():
        marker.with_name(f"{marker.name}-{os.getpid()}").touch()
        for _ in range(6000):
            if others and len(list(marker.parent.glob(f"{marker.name}-*"))) > others:
                break
            time.sleep(0.01)

    at_step(number, wait)


def fill_disk(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if limit > 1000:  # a result has room, a checkpoint hasn't
        save_always()


# ------------------------------------------------------------ kills, signals, two at once


@functools.cache
def never_stopped(name):
    """The history of a run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        run(RUNS[name], folder)
        return timeless(result_of(Path(folder)))


@pytest.mark.parametrize("name", [name for name, kills in SHARE.items() if kills])
def test_a_run_killed_again_and_again_has_the_history_of_one_never_killed(tmp_path, name):
    rng, saved, went_on, landed = random.Random(name), [], 0, 0
    while landed < SHARE[name]:
        moments = [functools.partial(die_in_file, rng.randint(1, 2), how) for how in ("half", "before", "after")]
        prepare = rng.choice([*moments, functools.partial(at_step, rng.randint(1, 9), die)])
        if not saved:  # so that there is something to go on from
            prepare = functools.partial(die_in_file, 1, "after")
        script = Script(RUNS[name], tmp_path, prepare)
        script.process.join(120)
        if list(tmp_path.rglob("*.json")):  # it ended, or was killed as it ended: begun anew
            shutil.rmtree(tmp_path)
            saved = []
            continue
        assert script.process.exitcode == -signal.SIGKILL
        landed += 1
        for path in tmp_path.rglob("*.ckpt"):
            saved = torch.load(path, weights_only=True)["history"]
            went_on += 1
    for path in tmp_path.rglob("*.tmp"):
        os.utime(path, (0, 0))  # long ago, so that the last run clears them away
    run(RUNS[name], tmp_path)
    result = result_of(tmp_path)
    assert timeless(result) == never_stopped(name)
    assert (
        went_on == landed and result["history"][: len(saved)] == saved != []
    )  # seconds too: these epochs weren't trained again
    print(f"\n{name}: {landed} kills, {went_on} with a checkpoint to go on from, the last at {len(saved)} epochs")


def test_a_run_killed_between_its_result_and_the_removal_of_its_checkpoint_is_finished(tmp_path):
    name, epochs = "mlp", 8
    Script(RUNS[name], tmp_path, functools.partial(die_in_file, epochs + 1, "after")).end(-signal.SIGKILL)
    (path,) = tmp_path.rglob("*.json")
    before = path.read_bytes()
    script = Script(RUNS[name], tmp_path)
    script.end()
    assert "1 already finished" in script.output.read_text() and path.read_bytes() == before
    assert timeless(strict(path)) == never_stopped(name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_in_one_line_and_the_same_command_goes_on(tmp_path, number):
    marker = tmp_path / "waits"
    script = Script(RUNS["mlp"], tmp_path / "results", functools.partial(wait_at_step, 10, marker))
    while not list(tmp_path.glob("waits-*")):
        assert script.process.is_alive()
        time.sleep(0.01)
    os.kill(script.process.pid, number)
    assert "the same command" in script.end(status=128 + number, lines=1)
    (checkpoint,) = files(tmp_path / "results")
    saved = torch.load(checkpoint, weights_only=True)["history"]
    run(RUNS["mlp"], tmp_path / "results")
    result = result_of(tmp_path / "results")
    assert result["history"][: len(saved)] == saved != []
    assert timeless(result) == never_stopped("mlp")


def test_two_processes_at_the_same_run(tmp_path):
    prepare = functools.partial(wait_at_step, 5, tmp_path / "waits", 1)
    for script in [Script(RUNS["mlp"], tmp_path / "results", prepare) for _ in range(2)]:
        script.end()
    assert len(list(tmp_path.glob("waits-*"))) == 2
    assert timeless(result_of(tmp_path / "results")) == never_stopped("mlp")


# ------------------------------------------------------------ results


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The results of six tiny runs."""
    folder = tmp_path_factory.mktemp("tiny")
    run(TINY, folder)
    return sorted(folder.rglob("*.json"))


@pytest.fixture
def twins(tiny, tmp_path):
    """Copies of the tiny results, at the same places below tmp_path."""
    shutil.copytree(tiny[0].parent, tmp_path / "mlp_width")
    return sorted(tmp_path.rglob("*.json"))


def same_histories(paths, others):
    return list(map(timeless, map(strict, paths))) == list(map(timeless, map(strict, others)))


def test_finished_runs_are_skipped_and_forced_ones_run_again(twins, tiny, tmp_path):
    run(TINY, tmp_path)
    assert [path.read_bytes() for path in twins] == [path.read_bytes() for path in tiny]
    run(TINY.replace("0 1 2 3 4 5", "0 1") + " --force", tmp_path)
    again = [strict(path)["config"]["force"] for path in twins]
    assert again == [True, True, False, False, False, False]
    assert same_histories(twins, tiny)


def edited(path, **config):
    """A result as one that differs in these settings; one that is ... is missing, as in files of an older version."""
    result = strict(path)
    result["config"] = {key: value for key, value in (result["config"] | config).items() if value is not ...}
    return json.dumps(result).encode()


def test_a_result_that_lacks_a_newer_flag_is_finished(twins, tmp_path):
    newer = ("save", "loss", "schedule", "warmup", "sharpness")
    for key, path in zip(newer, twins):
        path.write_bytes(edited(path, **{key: ...}))
    twins[5].write_bytes(edited(twins[5], **{key: ... for key in (*newer, "processes", "milestones", "adaptive")}))
    before = [path.read_bytes() for path in twins]
    script = Script(TINY, tmp_path)
    script.end()
    assert "6 runs, 6 already finished" in script.output.read_text()
    assert [path.read_bytes() for path in twins] == before


def test_results_that_are_torn_or_of_another_run_are_named_set_aside_and_run_again(twins, tiny, tmp_path):
    whole = twins[0].read_bytes()
    bad = [whole[: len(whole) // 2], b"", b"\xff\x00", edited(twins[3], lr=0.2), b"[]"]
    for path, data in zip(twins, bad):
        path.write_bytes(data)
    lines = run(TINY, tmp_path, lines=len(bad)).splitlines()
    for path, line, data in zip(twins, lines, bad):
        assert str(path) in line and f"{path.name}.bad" in line and "anew" in line
        assert path.with_name(f"{path.name}.bad").read_bytes() == data
    assert "lr 0.2, not 0.1" in lines[3]
    assert same_histories(twins, tiny)
    assert twins[5].read_bytes() == tiny[5].read_bytes()


def test_a_result_with_another_value_is_never_overwritten(tmp_path, capsys):
    argv = [*SMALL, "--hidden", 9, "--epochs", 1]
    (config,) = runs(mlp_width, tmp_path, *argv)
    path = common.result_path(config)
    call_main(mlp_width, tmp_path, *argv)
    files_before = []
    for key, value in (("data_dir", "x"), ("milestones", "y"), ("processes", "z")):
        path.write_bytes(edited(path, **{key: value}))
        files_before.append(path.read_bytes())
        capsys.readouterr()
        call_main(mlp_width, tmp_path, *argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{key} {value}, not " in line
    aside = [path.with_name(path.name + end).read_bytes() for end in (".bad", ".bad1", ".bad2")]
    assert aside == files_before and common.read_own(path, config)["config"]["processes"] == 1


def test_a_file_that_cant_be_read_ends_the_program_and_stays(monkeypatch, tmp_path, capsys):
    argv = [*SMALL, "--hidden", 9, "--epochs", 1]
    call_main(mlp_width, tmp_path, *argv)
    (path,) = files(tmp_path)
    before = path.read_bytes()

    def fail(*args, **more):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fail)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call_main(mlp_width, tmp_path, *argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and str(path) in line and "Input/output" in line
    assert files(tmp_path) == [path] and path.read_bytes() == before


# ------------------------------------------------------------ checkpoints


def one(tmp_path, script=mlp_width, *argv):
    """A run of three epochs, and its history when it is never stopped."""
    argv = argv or ("--hidden", "9-7")
    (lone,) = runs(script, tmp_path / "lone", *SMALL, "--epochs", 3, *argv)
    (config,) = runs(script, tmp_path / "results", *SMALL, "--epochs", 3, *argv)
    return config, timeless(train(script, lone))


def unlike(tensor):
    """The tensor, laid out in memory as another device's run may have left it."""
    if tensor.ndim != 4:
        return tensor
    is_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return tensor.contiguous(memory_format=torch.contiguous_format if is_last else torch.channels_last)


@pytest.mark.parametrize("filters", [2, 8])
def test_a_checkpoint_of_another_memory_layout_goes_on_as_if_never_stopped(tmp_path, filters):
    config, history = one(tmp_path, resnet_width, "--filters", filters, "--train-size", 20, "--batch-size", 8)
    path = interrupt(resnet_width, config, 1)
    state = torch.load(path, weights_only=True)
    moved = 0
    for buffers in state["optimizer"]["state"].values():
        before = buffers["momentum_buffer"]
        buffers["momentum_buffer"] = unlike(before)
        moved += before.stride() != buffers["momentum_buffer"].stride()
    state["model"] = {name: unlike(w) for name, w in state["model"].items()}
    torch.save(state, path)
    assert moved > 5
    assert timeless(train(resnet_width, config)) == history


def test_every_torn_checkpoint_is_set_aside_and_none_is_used(tmp_path, capsys):
    config, history = one(tmp_path)
    path = interrupt(mlp_width, config, 2)
    whole = path.read_bytes()
    rng, n = random.Random(0), len(whole)
    torn = [whole[: rng.randrange(n)] for _ in range(8)] + [b"", whole[:-1], b"not a checkpoint"]
    for start in [0, *(rng.randrange(n) for _ in range(8)), n - 600]:  # blocks that never reached the disk
        torn.append(whole[:start] + bytes(min(512, n - start)) + whole[start + 512 :])
    directory = whole.rindex(b"PK\1\2")  # of the zip file: its last entry's flags, then how it is compressed
    torn += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in (directory + 8, directory + 10)]
    for data in torn:
        path.write_bytes(data)
        if data == whole:
            continue
        assert common.read_own(path, config) is None
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line and not path.exists()
    aside = sorted(path.parent.glob("*.bad*"))
    assert sorted(p.read_bytes() for p in aside) == sorted(data for data in torn if data != whole)
    assert timeless(train(mlp_width, config)) == history


def foreign(state):
    """(what the line names, a checkpoint that is whole but not one of this run)."""
    yield "lr 0.2, not 0.1", {**state, "config": state["config"] | {"lr": 0.2}}
    yield "another model", {**state, "model": dict(list(state["model"].items())[:-1])}
    yield "another model", {**state, "model": {k: w[:1] for k, w in state["model"].items()}}
    yield "", {**state, "optimizer": {}}
    yield "", {**state, "optimizer": copy.deepcopy(state["optimizer"]) | {"param_groups": []}}
    yield "", []
    for key in state:
        yield key, {k: value for k, value in state.items() if k != key}


def test_every_foreign_checkpoint_is_named_set_aside_and_not_used(tmp_path, capsys):
    config, history = one(tmp_path)
    path = interrupt(mlp_width, config, 2)
    state = torch.load(path, weights_only=True)
    for number, (named, other) in enumerate(foreign(state)):
        torch.save(other, path)
        capsys.readouterr()
        assert timeless(train(mlp_width, config)) == history, named
        (line,) = capsys.readouterr().err.splitlines()
        aside = path.with_name(f"{path.name}.bad{number or ''}")
        assert str(path) in line and aside.name in line and named in line and aside.exists(), line
        common.result_path(config).unlink()


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2), (MemoryError(), 2)]
    + [(OSError(errno.EIO, "Input/output error"), 2), (PermissionError(errno.EACCES, "Permission denied"), 2)],
)
def test_an_error_that_passes_leaves_the_checkpoint_for_the_next_try(tmp_path, monkeypatch, capsys, error, status):
    config, history = one(tmp_path)
    path = interrupt(mlp_width, config, 2)
    saved = path.read_bytes()

    def fail(*args, **more):
        raise error

    argv = [*SMALL, "--epochs", 3, "--hidden", "9-7"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(torch, "load", fail)
        call_main(mlp_width, tmp_path / "results", *argv)
    assert exit.value.code == status and len(capsys.readouterr().err.splitlines()) == 1
    assert files(tmp_path / "results") == [path] and path.read_bytes() == saved
    call_main(mlp_width, tmp_path / "results", *argv)
    result = result_of(tmp_path / "results")
    assert timeless(result) == history and capsys.readouterr().err == ""


def test_a_checkpoint_is_loaded_to_the_cpu_first(tmp_path, monkeypatch):
    config, _ = one(tmp_path)
    path = interrupt(mlp_width, config, 2)
    places, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **more: places.append(more["map_location"]) or load(*a, **more))
    common.read_own(path, config)
    assert places == ["cpu"]


def test_a_name_that_looks_like_the_end_of_a_row_leaves_the_file_whole(tmp_path):
    (config,) = runs(mlp_width, tmp_path, *SMALL, "--hidden", 9, "--epochs", 2)
    config.mine = config.defaults["mine"] = "}, {"
    assert train(mlp_width, config)["config"]["mine"] == "}, {"


def test_a_folder_of_results_that_cannot_be_written_to_is_noticed_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "mlp_width").write_text("a file where the folder should be")
    monkeypatch.setattr(mlp_width, "train", lambda config: pytest.fail("trained"))
    with pytest.raises(SystemExit) as exit:
        call_main(mlp_width, tmp_path, *SMALL, "--hidden", 9)
    assert exit.value.code == 2 and "--results" in capsys.readouterr().err


def test_force_begins_anew_whatever_checkpoint_there_is(tmp_path):
    config, history = one(tmp_path)
    path = interrupt(mlp_width, config, 2)
    state = torch.load(path, weights_only=True)
    state["history"][0]["train_loss"] = 123.0
    state["model"] = {name: torch.zeros_like(w) for name, w in state["model"].items()}
    torch.save(state, path)
    call_main(mlp_width, tmp_path / "results", *SMALL, "--epochs", 3, "--hidden", "9-7", "--force")
    assert timeless(result_of(tmp_path / "results")) == history


def test_a_runs_commit_is_that_of_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "environment", lambda device: {"commit": commit})
    argv = [*SMALL, "--epochs", 3, "--hidden", "9-7"]
    (config,) = runs(mlp_width, tmp_path, *argv)
    commit = "first"
    interrupt(mlp_width, config, 1)
    commit = "second"
    end_epoch = common.Recorder.end_epoch

    def pull(recorder, row):
        nonlocal commit
        commit = "third"
        end_epoch(recorder, row)

    monkeypatch.setattr(common.Recorder, "end_epoch", pull)
    assert train(mlp_width, config)["env"]["commit"] == "first"
    commit = "second"
    (config,) = runs(mlp_width, tmp_path / "other", *argv)
    assert train(mlp_width, config)["env"]["commit"] == "second"


class Clock:
    """Stands in for the module `time`: a second passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    time = staticmethod(time.time)


@pytest.mark.parametrize(("cost", "epoch_takes"), [(0.001, 0.3), (0.1, 0.4), (2.0, 10.0), (30.0, 60.0)])
def test_checkpoints_take_at_most_two_per_cent_of_the_time_and_are_no_rarer_than_that(
    tmp_path, monkeypatch, cost, epoch_takes
):
    clock, saves = Clock(), []
    monkeypatch.setattr(common, "time", clock)

    def write(path, content):
        saves.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(common, "write", write)
    (config,) = runs(mlp_width, tmp_path, "--hidden", 9, "--epochs", 1000)
    model = torch.nn.Linear(1, 1)
    recorder = common.Recorder(config, None, model, torch.optim.SGD(model.parameters(), lr=0.1))
    for epoch in recorder.epochs():
        clock.now += epoch_takes
        recorder.end_epoch({"epoch": epoch, "train_loss": 1.0, "test_acc": 0.5})
    gaps = [b - a - cost for a, b in zip(saves, saves[1:])]
    assert len(gaps) >= 10
    shortest = max(1, 50 * cost)
    assert all(shortest <= gap + 1e-9 and gap < shortest + epoch_takes + 1e-9 for gap in gaps)
    seconds = sum(row["seconds"] for row in recorder.history)
    assert abs(seconds - 1000 * epoch_takes) < 1e-6  # what checkpoints take isn't an epoch's


# ------------------------------------------------------------ files


def test_a_file_is_on_the_disk_in_full_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(number):
        events.append(("fsync", os.fstat(number).st_ino, os.fstat(number).st_size))
        fsync(number)

    def record_replace(path, target):
        events.append(("rename", path.stat().st_ino, path.stat().st_size))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    common.write(tmp_path / "new" / "file", b"x" * 1000)
    assert [kind for kind, *_ in events] == ["fsync", "rename"]
    assert events[0][1:] == events[1][1:] and events[0][2] == 1000
    assert files(tmp_path) == [tmp_path / "new" / "file"]


def test_a_checkpoint_stays_until_the_result_is_there(tmp_path, monkeypatch, capsys):
    config, history = one(tmp_path)
    path, replace = interrupt(mlp_width, config, 3), Path.replace

    def no_room(temporary, target):
        if Path(target).suffix == ".json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(temporary, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(Path, "replace", no_room)
        mlp_width.train(config)
    assert exit.value.code == 2 and "No space" in capsys.readouterr().err
    assert files(tmp_path / "results") == [path]
    saved = torch.load(path, weights_only=True)["history"]
    assert train(mlp_width, config)["history"] == saved and timeless({"history": saved}) == history


def test_temporary_files_of_killed_processes_go_and_fresh_ones_stay(tmp_path):
    (config,) = runs(mlp_width, tmp_path, *SMALL, "--hidden", 9, "--epochs", 1, "--seed", 1)
    path = common.result_path(config)
    path.parent.mkdir(parents=True)
    stale, fresh, another = (
        [path.with_name(f"{name}.{end}.0123abcd.tmp") for end in ("json", "ckpt")]
        for name in (config.name, config.name, f"{config.name}_warmup=9")
    )
    fresh = [p.with_name(p.name.replace("0123", "4567")) for p in fresh]
    for temporary in (*stale, *fresh, *another):
        temporary.touch()
    for temporary in (*stale, *another):
        os.utime(temporary, (time.time() - 3600,) * 2)
    mlp_width.train(config)
    assert files(tmp_path) == sorted([path, *fresh, *another])


@pytest.mark.parametrize(("limit", "more"), [(20_000, "--hidden 12-9"), (300, "--hidden 9-7 --force")])
def test_a_full_disk_is_one_line_and_what_was_written_before_is_intact(twins, tiny, tmp_path, limit, more):
    command = TINY.replace("--hidden 9-7", more)
    prepare = functools.partial(fill_disk, limit)
    assert "--results" in run(command, tmp_path, status=2, lines=1, prepare=prepare)
    assert files(tmp_path) == twins
    assert [path.read_bytes() for path in twins] == [path.read_bytes() for path in tiny]


def test_a_long_name_leaves_room_for_the_temporary_ones(tmp_path):
    (config,) = runs(mlp_width, tmp_path, *SMALL, "--hidden", 9, "--epochs", 1, "--data-dir", "x" * 300)
    common.write(common.result_path(config), b"{}")
    assert common.result_path(config).read_bytes() == b"{}"


# ------------------------------------------------------------ sweeps


def test_a_diverged_run_keeps_its_epochs_and_the_sweep_goes_on(tmp_path, capsys):
    sweep = [*SMALL, "--hidden", "9-7", "--epochs", 2, "--sam", "--rho", "1e30", 0.05]
    call_main(mlp_width, tmp_path / "rho", *sweep)
    status = {strict(path)["config"]["rho"]: strict(path)["status"] for path in files(tmp_path / "rho")}
    assert status == {1e30: "diverged", 0.05: "done"}
    (line,) = capsys.readouterr().err.splitlines()
    assert "rho1e%2B30" in line and "in epoch 1: train_loss" in line and line.endswith("not finite")
    # lr x weight decay > 2: the weights grow with each update, until they overflow after some epochs
    late = [*SMALL, "--hidden", "9-7", "--epochs", 200, "--weight-decay", 100]
    call_main(mlp_width, tmp_path / "late", *late)
    result = result_of(tmp_path / "late")
    rows = result["history"]
    assert result["status"] == "diverged" and 0 < len(rows) < 200 and result["test_acc"] == rows[-1]["test_acc"]
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(abs(value) < float("inf") for row in rows for value in row.values())
    capsys.readouterr()
    call_main(mlp_width, tmp_path / "rho", *sweep)  # a diverged run is a finished one
    assert "2 runs, 2 already finished" in capsys.readouterr().out and len(files(tmp_path / "rho")) == 2
    call_main(mlp_width, tmp_path / "rho", *sweep, "--save")  # it has no weights to save, the other one had
    (line,) = capsys.readouterr().err.splitlines()
    assert "rho0.05" in line and "without --save" in line


@pytest.mark.parametrize(
    "data", [[*SMALL, "--sharpness", 20, "--hidden", "9-7"], ["--dataset", "curve", "--train-size", 60, "--hidden", 5]]
)
def test_nothing_is_measured_on_a_diverged_network(tmp_path, data):
    call_main(mlp_width, tmp_path, *data, "--epochs", 1, "--sam", "--rho", "1e30")
    result = result_of(tmp_path)
    assert result["status"] == "diverged" and "sharpness" not in result and "y" not in result.get("function", {})


@pytest.mark.parametrize("flag", ["--amp", "--compile"])
def test_a_sweeps_models_are_freed_one_after_the_other(tmp_path, monkeypatch, flag):
    alive, build = [], common.build_model

    def watched(config, data):
        assert not [reference for reference in alive if reference() is not None]
        model = build(config, data)
        model._compiled_call_impl = None  # what compiling itself takes is not the question
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(mlp_width, "build_model", watched)
    gc.disable()
    try:
        call_main(mlp_width, tmp_path, *SMALL, "--hidden", 9, "--epochs", 1, "--seed", 0, 1, 2, flag)
    finally:
        gc.enable()
    assert len(alive) == 3 and len(files(tmp_path)) == 3


def test_memory_that_does_not_suffice_is_one_line(tmp_path, monkeypatch, capsys):
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory"),
        cublas,
    ):

        def fail(config, error=error):
            raise error

        monkeypatch.setattr(mlp_width, "train", fail)
        with pytest.raises(SystemExit) as exit:
            call_main(mlp_width, tmp_path, *SMALL, "--hidden", 9)
        assert exit.value.code == 2 and "--batch-size" in capsys.readouterr().err
    monkeypatch.setattr(mlp_width, "train", lambda config: [].pop())
    with pytest.raises(IndexError):  # a bug is not called something else
        call_main(mlp_width, tmp_path, *SMALL, "--hidden", 9)


def test_weights_that_cannot_be_written_lose_no_training(tmp_path):
    command = f"mlp_width.py {DATA} --hidden 9 --epochs 2 --save"
    name = "mnist_mlp9_sgd_seed0_epochs=2"
    run(command, tmp_path / "probe")
    (weights,) = (tmp_path / "probe").rglob("*.pt")
    assert name in weights.name

    in_the_way = tmp_path / "results" / weights.relative_to(tmp_path / "probe")
    in_the_way.mkdir(parents=True)
    run(command, tmp_path / "results", status=2, lines=1)
    checkpoint = torch.load(in_the_way.with_suffix(".ckpt"), weights_only=True)
    assert len(checkpoint["history"]) == 2  # so that the same command trains nothing again

    in_the_way.rmdir()
    run(command, tmp_path / "results")
    result = strict(in_the_way.with_suffix(".json"))
    assert result["history"] == checkpoint["history"] and in_the_way.is_file()

"""run.sh: what its lists hold, and what its sweeps do with a Python that only notes what it is told."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers import Script

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCALES = pytest.mark.parametrize("scale", [(), ("quick",), ("overnight",)], ids=["full", "quick", "overnight"])
LISTS = {"hidden", "filters", "noise", "sparsity", "rho", "seed"}  # flags that take several values
VARIABLES = ["SEEDS", "HIDDEN", "FILTERS", "NOISES"]
OTHERS = "RHOS FLAGS ONLY JOBS PYTHON RESULTS FIGURES DATA_DIR CIFAR10 IMAGENET".split()
OTHERS += ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"]
ENV = {key: value for key, value in os.environ.items() if key not in {*VARIABLES, *OTHERS}}
# 9 commands, of which three are of 150-50
SMALL = {"SEEDS": "0", "RHOS": "0.1", "HIDDEN": "75-25 150-50 300-100", "ONLY": "mlp.*(sharpness 100|epochs 200) "}

FAKE = """#!/bin/sh
echo "$*" | head -n 1 >>calls
echo starts $CUDA_VISIBLE_DEVICES >>gpus
echo $OMP_NUM_THREADS >>threads
case "$*" in
    *"/dev/null") ;;
    *importlib*) [ "$LACKS" = "" ] || [ -e installed ] || exit 1;;
    *"-m venv"*) [ "$LACKS" != venv ] || exit 1; mkdir -p .venv/bin; cp fake .venv/bin/python;;
    *"pip install"*) [ "$LACKS" != network ] || { echo noise >&2; echo no network >&2; exit 1; }; touch installed;;
    *read_torchvision*) [ "$LACKS" != data ] || { echo no data >&2; exit 2; };;
    *"$FAILS"*) echo broken >&2; exit 3;;
    *"$SLEEPS"*) echo $$ >>asleep; exec sleep 60;;
    *--sam*) sleep 0.1;;
esac
echo ends $CUDA_VISIBLE_DEVICES >>gpus
"""


def start(folder, *argv, **variables):
    """run.sh, with stdin, stdout and stderr in text, in a process group of its own that signals reach, even where the
    tests run under nohup or in the background, whose children ignore them."""
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    reached = {"start_new_session": True, "preexec_fn": lambda: [signal.signal(n, signal.SIG_DFL) for n in numbers]}
    return subprocess.Popen(
        ["bash", "run.sh", *argv], cwd=folder, env={**ENV, **variables}, text=True, **pipes, **reached
    )


def run(folder, *argv, **variables):
    """The exit status of run.sh and the lines of its stdout and stderr."""
    process = start(folder, *argv, **variables)
    out, errors = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), errors.splitlines()


@functools.cache
def listed(*argv, **variables):
    status, lines, errors = run(ROOT, "list", *argv, **variables)
    assert (status, errors) == (0, [])
    return lines


def parse(line):
    """The script and the values of each flag."""
    python, script, *rest = line.split(" --")[0].split()
    assert python == "python" and not rest
    flags = [part.split() for part in line.split(" --")[1:]]
    assert len(flags) == len({flag for flag, *_ in flags}), f"a flag twice: {line}"
    return script, {flag: values for flag, *values in flags}


def runs(lines):
    """Every run of these commands: (script, flag=value, ...)."""
    found = []
    for line in lines:
        script, flags = parse(line)
        for combination in itertools.product(*(values or ["yes"] for values in flags.values())):
            found.append((script, *sorted(map("=".join, zip(flags, combination)))))
    return found


def count(found, script, *wanted, without=()):
    return sum(r[0] == script and set(wanted) <= set(r) and not any(w in "".join(r) for w in without) for r in found)


@pytest.fixture
def clone(tmp_path):
    """A copy of what run.sh needs, and the Python that takes notes."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("run.sh", "requirements.txt", "tests/requirements.txt", "results/overnight.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


@pytest.fixture
def fake(clone):
    return {"PYTHON": str(clone / "fake"), "LACKS": "", "FAILS": "nothing", "SLEEPS": "nothing"}


def calls(clone):
    """What Python was told, without the questions that set-up asks."""
    lines = (clone / "calls").read_text().splitlines()
    return [line for line in lines if not line.startswith(("-c import sys", "-c if True"))]


@functools.cache
def flags_of(script):
    process = Script([script, "--help"], "results")
    process.end()
    return set(re.findall(r"--([a-z0-9-]+)", process.output.read_text()))


@SCALES
def test_every_command_has_flags_of_its_script_and_no_run_is_listed_twice(scale):
    lines = listed(*scale, IMAGENET="images")
    for line in lines:
        script, flags = parse(line)
        assert flags.keys() <= flags_of(script), line
        assert not {flag for flag, values in flags.items() if len(values) > 1} - LISTS
        assert {flag for flag, values in flags.items() if not values} <= {"amp", "sam"}
        assert ("sam" in flags) == ("rho" in flags)
        assert script in ("mlp_width.py", "resnet_width.py") or len(flags.keys() & {"hidden", "filters"}) == 1
        assert scale or "val-size" in flags or flags["dataset"][0].startswith("curve")
    found = runs(lines)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("scale", [(), ("quick",)], ids=["full", "quick"])
def test_every_run_of_sam_has_its_run_of_sgd(scale):
    found = set(runs(listed(*scale)))
    for one in found:
        assert tuple(part for part in one if not part.startswith(("sam=", "rho=", "perturb="))) in found, one


def test_the_full_run_is_the_papers_and_its_controls():
    found = runs(listed())
    plain = ["schedule", "weight-decay", "epochs"]
    assert count(found, "mlp_width.py", without=[*plain, "dataset", "hidden=1000"]) == 5 * 3 * 7
    assert count(found, "resnet_width.py", without=plain) == 7 * 3 * 10
    assert count(found, "resnet_width.py", "weight-decay=0") == 7 * 3 * 10
    assert count(found, "resnet_width.py", "epochs=400") == 7 * 3
    assert count(found, "mlp_width.py", "epochs=200") == 5 * 3
    assert count(found, "mlp_width.py", "dataset=teacher", "val-size=2000") == 10 * 3 * 12
    for curve in ("curve", "curve-scaled"):
        assert count(found, "mlp_width.py", f"dataset={curve}") == 4 * 3 * 2
    for noise in ("0.25", "0.5", "0.75"):
        assert count(found, "label_noise.py", f"noise={noise}", without=["perturb", "epochs"]) == 5 * 3 * (7 + 10)
        for epochs, networks in {12: 5, 24: 5, 25: 5, 50: 10, 100: 5}.items():  # SGD's; 50 are an MLP's and a ResNet's
            assert count(found, "label_noise.py", f"noise={noise}", f"epochs={epochs}") == networks * 3
    for perturb in ("last", "rest", "random"):
        assert count(found, "label_noise.py", "noise=0.5", f"perturb={perturb}") == 5 * 3 * 6 + 5 * 3 * 9
    assert count(found, "mlp_width.py", "hidden=1000-1000-1000-1000") == 3 * 7
    for pruner in ("random", "snip"):
        assert count(found, "sparsity.py", f"pruner={pruner}") == 3 * 3 * 7 + 3 * 3 * 10
    measured = ["loss=mse", "schedule=constant", "momentum=0", "weight-decay=0", "sharpness=1000"]
    assert count(found, "mlp_width.py", *measured) == 4 * 3 * 6
    assert count(found, "mlp_width.py", "schedule=constant", "epochs=20") == 3 * 3 * 2
    assert count(found, "resnet_width.py", "schedule=constant", "epochs=75") == 3 * 3 * 2
    assert not any("--noise 0 " in line or "--sparsity 0 " in line for line in listed())


@SCALES
def test_a_line_is_one_network_with_all_seeds(scale):
    for line in listed(*scale, IMAGENET="images", SEEDS="3 4 5"):
        _, flags = parse(line)
        several = {flag for flag, values in flags.items() if len(values) > 1}
        if int(flags.get("filters", [0])[0]) >= 128 or "depth" in flags:
            assert not several  # it takes hours
        elif scale == ("quick",):
            assert several <= {"hidden", "filters", "rho", "seed"}  # it takes seconds
        else:
            assert several <= {"seed"} and (scale or flags["seed"] == ["3", "4", "5"])


@pytest.mark.parametrize("scale", [(), ("quick",)], ids=["full", "quick"])
def test_resnets_come_before_mlps_and_wide_before_narrow(scale):
    lines = [parse(line)[1] for line in listed(*scale)]
    for flag in ("filters", "hidden"):
        widths = [int(flags[flag][0].split("-")[0]) for flags in lines if flag in flags]
        assert widths and widths == sorted(widths, reverse=True)
    mlps = ["hidden" in flags for flags in lines]
    assert mlps == sorted(mlps)
    takes_days = ["--depth 50" in line for line in listed(IMAGENET="images")]
    assert any(takes_days) and takes_days == sorted(takes_days, reverse=True)


def test_overnight_is_rows_in_their_order():
    def row(line):
        script, flags = parse(line)
        width, epochs = flags.get("hidden", [""])[0], flags.get("epochs")
        if "cifar" in line or "--amp" in line:
            return {"resnet_width.py": 16}.get(script, 14 if flags["filters"] == ["16"] else 15)
        if flags.get("dataset") == ["fashionmnist"]:
            return 13
        if script == "label_noise.py" and "filters" not in flags:
            if "train-size" not in flags:
                return 12
            if width in ("3000-1000", "30-10"):
                return 11
            decay, lr = flags.get("weight-decay"), flags.get("lr")
            if decay == ["0.006"]:
                return 18
            if flags["seed"][0] == "5" and epochs == ["60"]:
                return 17
            if flags["seed"][0] == "5" or flags.get("perturb") == ["random"]:
                return 10
            return 9 if decay or lr else 1
        if "noise" in flags:
            return 7
        if "dataset" in flags:
            return 2
        if "schedule" in flags:
            return 4
        if width == "3000-1000":
            return 8
        if epochs is None:
            return 3
        return 6 if "weight-decay" in flags or epochs == ["60"] or set(width.split("-")) == {"300"} else 5

    lines = listed("overnight")
    rows = [row(line) for line in lines]
    assert rows == sorted(rows) and set(rows) == set(range(1, 19))
    found = [runs([line for line, at in zip(lines, rows) if at == number]) for number in range(1, 19)]
    sizes = dict(enumerate(map(len, found), start=1))
    assert sizes[1] == 4 * 5 * (6 + 2 * 5 + 2 * 3 + 4 * 3 + 2 * 3 * 3 + 1) + 3 * 5 * 2 * 3  # the last: a lower rho
    assert sizes[2] == 10 * 3 * (5 + 4) + 2 * 4 * 3 * 2
    assert sizes[3] == (3 * 5 + 3) * 5
    assert sizes[4] == 3 * 6 + 3 * 3 * 2
    assert sizes[5] == (4 + 2 * 3) * 3 * 3
    assert sizes[6] == (4 + 4) * 3 * 3 + 4 * 3
    assert sizes[8] == 3 * 3
    assert sizes[9] == 4 * 5 * (2 * 3 * 4 + 2 * (2 + 2) + 2 * 2 * (2 + 2))
    assert sizes[10] >= 4 * (10 + 10 + 5)
    assert sizes[11] == 2 * 3 * (3 + 2 * 2) + 3 * 2 * 2
    assert sizes[12] == 3 * 3 * (3 + 2)
    assert sizes[13] == 4 * 3 * 2 * (3 + 2 * 4)
    assert (sizes[14], sizes[15], sizes[16]) == (6, 6, 2)
    assert sizes[17] == (3 + 4) * 10
    assert sizes[18] == 4 * 3 * (2 + 2)
    assert {part for one in found[6] for part in one if part.startswith("seed")} == {"seed=1", "seed=2", "seed=3"}
    confirming = [one for one in found[9] + found[16] if "perturb=random" not in one]  # on seeds that chose no settings
    assert {part for one in confirming for part in one if part.startswith("seed")} == {
        f"seed={s}" for s in range(5, 15)
    }
    assert all("results=results/overnight" in one for part in found for one in part)
    assert count(found[2], "mlp_width.py", "hidden=300-100", "sharpness=100") == 5 * 5
    cifar = [one for one in runs(listed("overnight", CIFAR10="images")) if "dataset=images" in one]
    assert len(cifar) == 14 and all({"amp=yes", "val-size=5000"} <= set(one) for one in cifar)


def plain(value):
    """0.001, 1e-3 and "1e-3" alike; what a flag without a value holds is True."""
    if isinstance(value, bool):
        return value
    try:
        return float(value)
    except ValueError:
        return value == "yes" or value


def test_no_shipped_result_is_without_its_command_and_the_readme_counts_them():
    always = {"hidden", "filters", "noise", "sparsity", "pruner", "seed"}  # a command names them at their defaults too
    elsewhere = {"results", "device", "workers", "milestones", "script", "processes"}
    found = runs(listed("overnight", CIFAR10="data/cifar10-jpeg"))
    commands = set()
    for script, *parts in found:
        flags = dict(part.replace("-", "_", part.split("=")[0].count("-")).split("=", 1) for part in parts)
        settings = {(flag, plain(value)) for flag, value in flags.items() if flag not in elsewhere}
        commands.add((script, frozenset(settings - {("lr", 0.1), ("weight_decay", 0.0001)})))  # an MLP's defaults

    paths = [*ROOT.glob("results/overnight/*/*.json")]
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        config, defaults = result["config"], result["defaults"]
        settings = set()
        for flag, value in config.items():
            changed = value != defaults.get(flag) and flag not in elsewhere
            if value is not None and (changed or flag in always):
                settings.add((flag, plain(value)))
        assert (f"{config['script']}.py", frozenset(settings)) in commands, path

    evidence = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert paths and f"{len(paths)} of its {len(found)} runs" in " ".join(evidence.split())
    assert f": {len(runs(listed())):,} runs in {len(listed()):,} commands, without ImageNet |" in README


def test_quick_is_every_experiment_on_the_shipped_images():
    found = runs(listed("quick"))
    items = {item for one in found for item in one}
    parts = """noise=0.5 noise=0.75 perturb=last perturb=rest filters= dataset=teacher dataset=curve-scaled
        dataset=curve weight-decay=0 epochs=30 hidden=100-100-100-100 pruner=snip loss=mse sharpness=
        schedule=constant"""
    for part in parts.split():
        assert part in items or part.endswith("=") and any(item.startswith(part) for item in items), part
    for one in found:
        assert {"dataset=mnist", "data-dir=data/mini"} <= set(one) or any("teacher" in p or "curve" in p for p in one)
        assert "results=results/quick" in one


@SCALES
def test_pruned_networks_keep_as_many_weights_as_the_narrow_dense_one(scale):
    def mlp(hidden):
        sizes = [784, *map(int, hidden.split("-")), 10]
        return sum(a * b for a, b in zip(sizes, sizes[1:])), sum(sizes[1:])

    def resnet(k):
        kernels, others, inputs = 27 * k + 80 * k, 2 * k + 10, k
        for out in (k, 2 * k, 4 * k, 8 * k):
            kernels += 9 * inputs * out + 3 * 9 * out * out + (inputs * out if inputs != out else 0)
            others += 8 * out + (2 * out if inputs != out else 0)
            inputs = out
        return kernels, others

    assert sum(mlp("75-25")) == 61_035 and sum(resnet(16)) == 701_466
    pruned = [parse(line)[1] for line in listed(*scale) if "sparsity.py" in line]
    assert {flags["hidden"][0] for flags in pruned if "hidden" in flags} >= {"300-100", "1200-400"}
    for flags in pruned:
        dense = 61_035 if "hidden" in flags else 701_466
        kernels, others = mlp(flags["hidden"][0]) if "hidden" in flags else resnet(int(flags["filters"][0]))
        left = kernels - round(float(flags["sparsity"][0]) * kernels) + others
        assert abs(left / dense - 1) < 0.01, flags


def test_variables_shrink_the_full_run():
    found = runs(listed(SEEDS="7", RHOS="0.3", HIDDEN="20-10", FILTERS="4", NOISES="0.1", FLAGS=" --amp\n --fp32 "))
    values = {(part.split("=")[0], part.split("=")[1]) for one in found for part in one[1:]}
    assert {value for flag, value in values if flag == "seed"} == {"7"}
    assert {value for flag, value in values if flag == "rho"} == {"0.3"}
    assert {value for flag, value in values if flag == "noise"} == {"0.1"}  # perturb is at 0.5 alone
    assert all({"amp=yes", "fp32=yes"} <= set(one) for one in found)
    assert count(found, "resnet_width.py", "filters=4", without=["epochs", "weight-decay", "schedule"]) == 2


@pytest.mark.parametrize(("noises", "half"), [("0.1 0.5", True), ("0.51 0.05", False)])
def test_parts_of_the_weights_are_perturbed_at_half_of_the_labels_alone(noises, half):
    assert half == bool(count(runs(listed(NOISES=noises)), "label_noise.py", "perturb=last"))


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_list_drops_its_experiments_and_no_others(name):
    every, left = (set(runs(listed(IMAGENET="images", **more))) for more in ({}, {name: ""}))
    assert left < every and bool(left) == (name != "SEEDS")


@pytest.mark.parametrize("argv", [(), ("quick",), ("overnight",)])
def test_only_keeps_the_commands_that_match(argv):
    every = listed(*argv)
    found = listed(*argv, ONLY="--filters (4|16) .*--sam")
    assert found == [one for one in every if re.search("--filters (4|16) .*--sam", one)] and len(found) < len(every)


def test_an_empty_grid_leaves_sgd():
    found = runs(listed(RHOS=""))
    assert found and not any("sam=yes" in one for one in found)


def test_folders_of_images_and_of_results():
    assert not any("--results" in line or "--data-dir" in line for line in listed())
    found = runs(listed(CIFAR10="images", RESULTS="runs/a", DATA_DIR="elsewhere"))
    assert all({"results=runs/a", "data-dir=elsewhere"} <= set(one) for one in found)
    filters = [one for one in found if any(part.startswith("filters=") for part in one)]
    assert filters and all("dataset=images" in one for one in filters)
    assert count(found, "mlp_width.py", "dataset=images") == 0
    large = [one for one in runs(listed(IMAGENET="images")) if "dataset=images" in one]
    assert all({"depth=50", "image-size=224", "workers=8", "val-size=5000"} <= set(one) for one in large)
    radii = Counter(part for one in large for part in one if part.startswith("filters="))
    assert radii == {"filters=16": 21, "filters=32": 21, "filters=48": 18, "filters=64": 18, "filters=80": 18}
    small = [one for one in runs(listed(IMAGENET="images", RHOS="0.1")) if "dataset=images" in one]
    assert len(small) == 5 * 3 * 2


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_a_command_that_fails_does_not_stop_the_others(clone, fake, jobs):
    (clone / "results" / "logs").mkdir(parents=True)
    (clone / "results" / "logs" / "failed").write_text("of an earlier sweep")
    status, out, errors = run(clone, **SMALL, **fake | {"FAILS": "150-50"}, JOBS=jobs)
    assert status == 1
    assert [line for line in calls(clone) if "--hidden" in line] and len(calls(clone)) == 11
    assert calls(clone)[-1] == "plot.py --results results --figures figures"
    assert len([line for line in out if line.startswith("command ") and " of 9: python " in line]) == 9
    assert errors[0] == "run.sh: these commands failed:" and len(errors) == 4
    for line in errors[1:]:
        command, log = line.strip().rstrip(")").split(" (its output: ")
        assert command.startswith("python mlp_width.py --hidden 150-50")
        assert (clone / log).read_text().splitlines()[1:] == ["broken"] and command in (clone / log).read_text()


def test_without_failures_the_figures_are_announced(clone, fake):
    status, out, errors = run(clone, **SMALL, **fake, RESULTS="r", FIGURES="f", JOBS="2")
    assert (status, errors) == (0, [])
    assert out[0] == "Every figure at the paper's scale: 9 commands, 2 at a time"
    assert out[-1] == "Figures and summary.md are in f, the results they come from in r."
    download = 'import common, sys; sys.argv[0] = "run.sh"; common.read_torchvision(*sys.argv[1:])'
    assert calls(clone)[0] == f"-c {download} mnist data"
    assert calls(clone)[-1] == "plot.py --results r --figures f"
    assert [path.name for path in (clone / "results").iterdir()] == ["overnight.sh"]
    assert len(list((clone / "r" / "logs").iterdir())) == 10


def test_a_plot_that_fails_is_a_failure(clone, fake):
    assert run(clone, **SMALL, **fake | {"FAILS": "plot.py"})[0] == 1


@pytest.mark.parametrize("scale, downloads", [("quick", 0), ("overnight", 1)])
def test_the_other_sweeps(clone, fake, scale, downloads):
    few = "both mlp_width.py --hidden 9-7 --seed 0 --rho 0.1"
    text = (clone / "run.sh").read_text()
    (clone / "run.sh").write_text(text.replace("\nquick() {", f"\nquick() {{ {few}; return"))
    (clone / "results" / "overnight.sh").write_text(few)
    at_once = 1 if downloads else min(4, os.cpu_count())
    more = {"JOBS": "1"} if downloads else {}
    status, out, errors = run(
        clone, scale, **fake, **more, RESULTS="r", FIGURES="f", DATA_DIR="d", FLAGS="--amp", OMP_NUM_THREADS="3"
    )
    assert (status, errors) == (0, [])
    assert (
        "2 cores" in out[0]
        and ("minutes" in out[0] or "hours" in out[0])
        and f"2 commands, {at_once} at a time" in out[0]
    )
    assert out[-1] == f"Figures and summary.md are in figures/{scale}, the results they come from in results/{scale}."
    told = calls(clone)
    assert [line.split()[-2:] for line in told if "read_torchvision" in line] == [["mnist", "data"]] * downloads
    assert sum("--hidden 9-7 " in line and line.endswith(f"--results results/{scale}") for line in told) == 2
    assert told[-1] == f"plot.py --results results/{scale} --figures figures/{scale}"
    assert not any("--amp" in line for line in told) and not (clone / "r").exists()
    assert set((clone / "threads").read_text().split()[-3:]) == {"1"}


def with_gpus(clone, text, status=0):
    """The variables that put an nvidia-smi which prints this first in PATH."""
    (clone / "bin").mkdir()
    (clone / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
    (clone / "bin" / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.parametrize("gpus, told", [(("3", "GPU-5"), True), (("0", "1"), False)])
def test_commands_side_by_side_use_different_gpus(clone, fake, gpus, told):
    """As many at a time as there are GPUs, if JOBS does not say otherwise."""
    more = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if told else {}
    status, out, _ = run(clone, **SMALL, **fake, **more, **with_gpus(clone, r"0\n1\n"))
    assert status == 0 and "9 commands, 2 at a time" in out[0]
    assert set((clone / "threads").read_text().split()) == {str(-(-os.cpu_count() // 2))}
    events = [line.split() for line in (clone / "gpus").read_text().splitlines()]
    events = [event for event in events if event[1:] and event[1] in gpus]
    assert len(events) == 18 and {gpu for _, gpu in events} == {*gpus}
    if "process-slot-var" in subprocess.run(["xargs", "--help"], capture_output=True, text=True).stdout:
        for gpu in gpus:
            turns = [event for event, of in events if of == gpu]
            assert turns == ["starts", "ends"] * (len(turns) // 2)


@pytest.mark.parametrize("more", [{"CUDA_VISIBLE_DEVICES": ""}, {}], ids=["hidden", "broken driver"])
def test_without_gpus_one_command_runs_at_a_time(clone, fake, more):
    path = with_gpus(clone, "NVIDIA-SMI has failed", status=9)
    status, out, errors = run(clone, **SMALL, **fake, **more, **path)
    assert (status, errors) == (0, []) and "9 commands, 1 at a time" in out[0]
    assert all(not line.split()[1:] for line in (clone / "gpus").read_text().splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_in_one_line(clone, fake, number):
    process = start(clone, **SMALL, **fake | {"SLEEPS": "--hidden"}, JOBS="2")
    asleep = clone / "asleep"
    end = time.monotonic() + 20
    while not asleep.exists() or len(asleep.read_text().split()) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert len(errors.splitlines()) == 1 and "the same command goes on" in errors
    pids = asleep.read_text().split()
    states = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(pids)], capture_output=True, text=True).stdout
    assert len(pids) == 2 and all(state.startswith("Z") for state in states.split())
    assert not any("plot.py" in line for line in calls(clone))


@pytest.mark.parametrize(
    "argv, variables, named",
    [
        (["quik"], {}, "'quik'"),
        (["quick", "twice"], {}, "'quick twice'"),
        (["list", "full"], {}, "'list full'"),
        (["data", "quick"], {}, "'data quick'"),
        ([], {"JOBS": "0"}, "JOBS"),
        ([], {"JOBS": "-1"}, "JOBS"),
        (["quick"], {"JOBS": "two"}, "JOBS"),
        (["overnight"], {"JOBS": "1.5"}, "JOBS"),
        ([], {"SEEDS": ""}, "no command is left"),
        (["quick"], {"ONLY": "--filters 5"}, "no command is left by the lists and by ONLY"),
        ([], {"FLAGS": "--amp --results r2"}, "--results in FLAGS"),
        (["list"], {"FLAGS": "--results=r2"}, "RESULTS"),
        (["list"], {"FLAGS": "--data-dir d"}, "DATA_DIR"),
        (["list"], {"FLAGS": "--dataset svhn"}, "CIFAR10"),
        (["list"], {"FLAGS": "--amp --epochs 10"}, "--epochs in FLAGS"),
        ([], {"FLAGS": "--seed=5"}, "--seed in FLAGS"),
        (["list"], {"FLAGS": "--amp --sam"}, "--sam in FLAGS"),
        (["list"], {"FILTERS": "4,8"}, "no commas"),
        (["list"], {"RHOS": "0.1,0.2"}, "no commas"),
        (["list"], {"FILTERS": "all"}, "FILTERS are whole numbers"),
        (["list"], {"RESULTS": "my results"}, "space"),
        (["list"], {"FIGURES": "my'figures"}, "quote"),
        ([], {"RESULTS": "run.sh"}, "run.sh/logs"),
        ([], {"LACKS": "data"}, "no data"),
        (["data"], {"LACKS": "data"}, "no data"),
        (["quick"], {"PYTHON": "no-such-python"}, "no-such-python is not Python 3.10"),
        (["quick"], {"LACKS": "venv"}, "-m venv .venv fails"),
        (["test"], {"LACKS": "network"}, "cannot install tests/requirements.txt into .venv: no network"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_2(clone, fake, argv, variables, named):
    status, _, errors = run(clone, *argv, **fake | variables)
    assert (status, len(errors)) == (2, 1), errors
    assert errors[0].startswith(("run.sh: ", "no data")) and named in errors[0]
    assert not (clone / "calls").exists() or not any(line.startswith("mlp_width") for line in calls(clone))


def test_the_flags_of_a_line_of_ones_own_are_not_overridden(clone):
    text = (clone / "run.sh").read_text()
    line = "    lines mlp_width.py --hidden 30-10 --optimizer adamw $held_out\n"
    (clone / "run.sh").write_text(text.replace("local cifar=", "local cifar\n" + line + "    cifar=", 1))
    status, _, errors = run(clone, "list", FLAGS="--optimizer sgd")
    assert status == 2 and "no --optimizer in FLAGS" in errors[0]
    assert "--optimizer adamw" in run(clone, "list", FLAGS="--amp", ONLY="optimizer")[1][0]


@pytest.mark.parametrize(
    "argv", [["help"], ["-h"], ["--help"], ["quick", "--help"], ["test", "-h"], ["list", "--help"]]
)
def test_help_names_the_commands_and_installs_nothing(clone, fake, argv):
    status, out, errors = run(clone, *argv, **fake | {"LACKS": "network"})
    assert (status, errors) == (0, []) and not (clone / "calls").exists()
    for word in (
        "quick",
        "overnight",
        "data",
        "list",
        "test",
        "help",
        "JOBS",
        "RESULTS",
        "IMAGENET",
        "FLAGS",
        "ONLY",
        *VARIABLES,
    ):
        assert any(word in line for line in out), word


def test_what_torchvision_has_is_downloaded_first(clone, fake):
    def downloads(*argv, **variables):
        (clone / "calls").unlink(missing_ok=True)
        process = start(clone, *argv, **fake | {"LACKS": "data", **variables})
        process.communicate(timeout=60)
        return [line.split()[-2:] for line in calls(clone) if "read_torchvision" in line]

    assert downloads("data", LACKS="") == [["mnist", "data"], ["cifar10", "data"]]
    variables = {"CIFAR10": "images", "IMAGENET": "more", "DATA_DIR": "there"}
    assert downloads("data", LACKS="", **variables) == [["mnist", "there"]]
    for name in ("svhn", "cifar100"):
        assert downloads("data", LACKS="", CIFAR10=name) == [["mnist", "data"], [name, "data"]]
    assert downloads("data", LACKS="", ONLY="mlp_width") == [["mnist", "data"]]
    assert downloads("data", LACKS="", ONLY="resnet_width") == [["cifar10", "data"]]
    assert downloads("data", LACKS="", ONLY="teacher") == downloads("data", LACKS="", SEEDS="") == []
    assert downloads("overnight", LACKS="", ONLY="--filters .*--dataset mnist ") == [["mnist", "data"]]
    two = downloads("overnight", LACKS="", ONLY="fashionmnist .*--epochs 12 |--filters 4 .*--epochs 25 ")
    assert two == [["cifar10", "data"], ["fashionmnist", "data"]]


def test_test_gives_pytest_its_words(clone, fake):
    assert run(clone, "test", "-k", "a name", **fake)[0] == 0
    assert calls(clone)[-1] == "-m pytest -q -n 2 --dist loadfile -k a name"


def test_set_up_makes_a_venv_once_and_says_how_to_use_it(clone, fake):
    variables = {**fake, "LACKS": "modules", "FAILS": "sparsity.py", "JOBS": "8"}
    status, out, _ = run(clone, **SMALL, **variables)
    assert status == 0 and out[-1] == "next: source .venv/bin/activate"
    assert out[1] == "installing requirements.txt into .venv, which takes some minutes"
    made = [line for line in calls(clone) if "-m " in line]
    assert made[0] == "-m venv --clear .venv" and made[1].endswith("-r requirements.txt")
    (clone / "calls").unlink()
    (clone / "fake").write_text(
        FAKE.replace("[ -e installed ]", "false")
    )  # the first Python has not got them now either
    status, out, _ = run(clone, **SMALL, **variables)
    assert status == 0 and out[-1] == "next: source .venv/bin/activate"
    assert not any("-m " in line for line in calls(clone))


def test_a_venv_that_lacks_packages_is_kept(clone, fake):
    (clone / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(clone / "fake", clone / ".venv" / "bin" / "python")
    assert run(clone, "data", **fake | {"LACKS": "modules"})[0] == 0
    told = [line for line in calls(clone) if "-m " in line]
    assert told[0] == "-m venv .venv" and "pip install" in told[1]


@pytest.mark.parametrize("python", [None, "an old one"])
def test_a_venv_whose_python_is_missing_or_too_old_is_made_again(clone, fake, python):
    (clone / ".venv" / "bin").mkdir(parents=True)
    if python:
        text = FAKE.replace('case "$*" in', 'case "$*" in\n    *version_info*) exit 1;;', 1)
        (clone / ".venv" / "bin" / "python").write_text(text)
        (clone / ".venv" / "bin" / "python").chmod(0o755)
    assert run(clone, "data", **fake | {"LACKS": "modules"})[0] == 0
    assert "-m venv --clear .venv" in calls(clone)


@pytest.mark.parametrize("version, installs", [("2.5.1+cu124", True), ("2.10.0", False), (None, False)])
def test_versions_are_compared_with_the_requirements(clone, fake, version, installs):
    """By the Python that runs the tests, which has what they ask for, but for another torch; it makes no .venv here."""
    if version:
        place = clone / "site" / f"torch-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    (clone / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(clone / "fake", clone / ".venv" / "bin" / "python")
    real = clone / "real"
    real.write_text(f'#!/bin/sh\ncase "$*" in "-m venv"*) exit 0;; esac\nexec {sys.executable} "$@"\n')
    real.chmod(0o755)
    variables = {
        **fake,
        **SMALL,
        "SEEDS": "",
        "PYTHON": str(real),
        "LACKS": "modules",
        "PYTHONPATH": str(clone / "site"),
    }
    status, out, errors = run(clone, "data", **variables)
    assert (status, errors) == (0, [])
    assert out == (["installing requirements.txt into .venv, which takes some minutes"] if installs else [])


def test_run_sh_is_executable_and_has_no_carriage_return():
    assert os.access(ROOT / "run.sh", os.X_OK)
    assert b"\r" not in (ROOT / "run.sh").read_bytes()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git repository, so no checkout")
@pytest.mark.parametrize(
    "path, told",
    [
        ("run.sh", "auto lf"),
        ("common.py", "auto lf"),
        ("figures/overnight/rho.png", "unset lf"),
        ("data/mini/MNIST/raw/t10k-images-idx3-ubyte", "unset lf"),
    ],
)
def test_a_checkout_on_windows_has_the_same_bytes(path, told):
    """text unset: the file's bytes are left alone."""
    done = subprocess.run(["git", "check-attr", "text", "eol", "--", path], cwd=ROOT, capture_output=True, text=True)
    assert [line.split(": ")[-1] for line in done.stdout.splitlines()] == told.split()


def test_ci_tries_the_oldest_versions_that_the_requirements_allow():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (told,) = re.findall(r"packages: (torch==.*)", workflow)
    bounds = [line.split(">=") for line in (ROOT / "requirements.txt").read_text().split()]
    assert told.split() == [f"{name}=={version}.0" for name, version in bounds]


# The job script for SLURM in README.md

TASK = """#!/bin/sh
# In place of Python: what it does is named by $DOES
echo "starts $*" >>events
trap 'sleep 0.2; echo ends >>events; exit 143' TERM
while [ "$DOES" = train ]; do sleep 0.05; done
exit $DOES
"""


@pytest.fixture
def submit(clone):
    """A function that starts README's job script, as SLURM does, with scontrol and Python replaced by note takers."""
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", README, re.DOTALL | re.MULTILINE)
    (clone / "job.sh").write_text(script)
    place = clone / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    for name, text in {"python": TASK, "scontrol": '#!/bin/sh\necho "scontrol $*" >>events\n'}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)

    def start(task, **variables):
        variables |= {"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
        return subprocess.Popen(["bash", "job.sh"], cwd=clone, env={**ENV, **variables}, start_new_session=True)

    return start


def events(clone):
    return (clone / "events").read_text().splitlines() if (clone / "events").exists() else []


def test_a_slurm_task_ends_its_run_and_queues_itself_again_before_its_time_limit(clone, submit):
    process = submit(2, DOES="train")
    end = time.monotonic() + 20
    while not events(clone):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)  # to the script alone, as by --signal=B:USR1
    assert process.wait(20) == 0
    command = run(clone, "list")[1][1].removeprefix("python ")
    assert events(clone) == [f"starts {command}", "ends", "scontrol requeue 77"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_slurm_task_that_is_over_is_not_queued_again(clone, submit, status):
    process = submit(1, DOES=str(status), OFFSET="1")
    assert process.wait(20) == status
    assert events(clone) == ["starts " + run(clone, "list")[1][1].removeprefix("python ")]

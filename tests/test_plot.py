"""plot.py's arithmetic on results made up here, where the right numbers are known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

import plot

ROOT = Path(__file__).parent.parent


def result(sam=False, rho=None, seed=0, acc=0.9, val=None, width="300-100", status="done", **more):
    config = {"script": "mlp_width", "hidden": width, "filters": None, "sam": sam, "rho": rho, "adaptive": False}
    config |= {"seed": seed, "dataset": "mnist", "val_size": 0 if val is None else 100, "epochs": 1, **more}
    row = {"epoch": 1, "train_acc": acc, "test_acc": acc} | ({} if val is None else {"val_acc": val})
    params = {"75-25": 61_035, "300-100": 266_610}[width]
    head = {"config": config, "num_params": params, "num_nonzero": params, "status": status}
    return head | {"test_acc": acc, "best_test_acc": acc, "history": [row]}


def one(runs):
    (load,) = plot.workloads(runs)
    return load


def test_the_band_is_students_interval_of_paired_differences():
    sgd, sam = (0.90, 0.80, 0.70), (0.91, 0.83, 0.72)  # differences 1, 3, 2: mean 2, deviation 1
    runs = [result(seed=s, acc=a) for s, a in enumerate(sgd)] + [result(True, 0.1, s, a) for s, a in enumerate(sam)]
    mean, half = one(runs).cells[0].gain()
    assert math.isclose(mean, 2) and math.isclose(half, 4.303 / math.sqrt(3), rel_tol=1e-3)


def test_seeds_without_a_partner_do_not_count():
    runs = [result(seed=0), result(seed=1, acc=0.1), result(True, 0.1, 0, 0.95), result(True, 0.1, 2, 0.2)]
    mean, half = one(runs).cells[0].gain(0.1)
    assert math.isclose(mean, 5) and math.isnan(half)


@pytest.mark.parametrize(("vals", "best"), [((0.5, 0.6), 0.2), ((0.6, 0.5), 0.1), ((None, None), 0.1)])
def test_the_best_rho_is_chosen_on_held_out_images_where_there_are_some(vals, best):
    runs = [result(val=vals[0]), result(True, 0.1, acc=0.95, val=vals[0]), result(True, 0.2, acc=0.92, val=vals[1])]
    load = one(runs)
    assert load.cells[0].best == best and load.chosen == ("test" if vals[0] is None else "held-out")


def test_a_rho_that_diverged_is_not_best_and_is_told(tmp_path):
    runs = [result(seed=0), result(seed=1), result(True, 0.1, 0, 0.91), result(True, 0.1, 1, 0.91)]
    runs += [result(True, 0.5, 0, 0.99), result(True, 0.5, 1, 0.99, status="diverged")]
    load = one(runs)
    assert load.cells[0].best == 0.1 and [rho for _, rho in load.diverged] == [0.5]
    assert "Diverged: width 300-100, rho 0.5, seeds 1." in plot.summary([load])


def test_runs_with_other_settings_are_not_paired():
    runs = [result(epochs=1), result(True, 0.1, epochs=1), result(epochs=2), result(True, 0.1, epochs=2)]
    assert sorted(load.title for load in plot.workloads(runs)) == ["mnist, MLP, epochs 1", "mnist, MLP, epochs 2"]


def test_clean_and_dense_runs_are_borrowed_from_scripts_with_the_same_settings_only():
    pair = [result(**more) for more in ({}, {"sam": True, "rho": 0.1})]
    noisy = [run | {"config": run["config"] | {"script": "label_noise", "noise": 0.5}} for run in pair]
    other = [run | {"config": run["config"] | {"epochs": 2}} for run in pair]
    for clean, labels in ((pair, ["0%", "50%"]), (other, ["50%"])):
        loads = plot.workloads(clean + noisy)
        figure = plot.label_noise(*([load for load in loads if load.script == s] for s in ("label_noise", "mlp_width")))
        drawn = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert [text.split()[0] for text in drawn] == labels


def test_a_radius_of_zero_is_not_the_best_one():
    load = one([result(), result(True, 0.0, acc=0.9), result(True, 0.1, acc=0.95)])
    assert load.cells[0].best == 0.1 and load.cells[0].gain(0.0)[0] == 0


def test_a_foreign_file_is_named_and_the_rest_is_drawn(tmp_path):
    folder = tmp_path / "results" / "mlp_width"
    folder.mkdir(parents=True)
    for i, run in enumerate([result(), result(True, 0.1), result(width="75-25"), result(True, 0.1, width="75-25")]):
        (folder / f"{i}.json").write_text(json.dumps(run))
    for name, text in {"torn": '{"config": {', "foreign": "[1, 2]", "older": '{"config": {}}'}.items():
        (folder / f"{name}.json").write_text(text)
    command = [sys.executable, "plot.py", "--results", tmp_path / "results", "--figures", tmp_path / "figures"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in ("torn", "foreign", "older"))
    assert (tmp_path / "figures" / "gain_by_width.png").exists()

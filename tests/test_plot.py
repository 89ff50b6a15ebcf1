"""plot.py as users start it, on small result files whose numbers are known, and its statistics against closed forms."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

ROOT = Path(__file__).parent.parent
PARAMS = {"75-25": 61_035, "150-50": 125_810, "300-100": 266_610, "1200-400": 1_426_410}
DEFAULTS = {
    "hidden": None,
    "filters": None,
    "sam": False,
    "rho": None,
    "adaptive": False,
    "epochs": 100,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
    "warmup": 0,
    "loss": "ce",
    "sharpness": 0,
    "seed": 0,
    "dataset": "mnist",
    "data_dir": "data",
    "train_size": None,
    "val_size": 0,
    "device": "cpu",
    "workers": 0,
    "results": "results",
    "force": False,
    "save": False,
    "noise": 0.0,
    "sparsity": 0.0,
    "pruner": "random",
    "milestones": [0.25, 0.5, 0.75],
    "script": "mlp_width",
    "processes": 1,
}
MNIST = "MNIST, MLP 3:1"


# Result files


def run(rho=None, acc=0.9, val=None, seed=0, hidden="300-100", **settings):
    """A result file's object, SAM's where rho is given. acc, val: accuracies, of each epoch or of all."""
    extra = {key: settings.pop(key) for key in ("status", "width", "sharpness_found", "function") if key in settings}
    params = settings.pop("params", PARAMS.get(hidden, 1000))
    nonzero = settings.pop("nonzero", params)
    accs = acc if isinstance(acc, list) else [acc] * settings.get("epochs", 2)
    vals = val if isinstance(val, list) else [val] * len(accs)
    config = DEFAULTS | {"sam": rho is not None, "rho": rho, "seed": seed, "hidden": hidden, "epochs": len(accs)}
    config |= {"val_size": 0 if val is None else 100} | settings

    history = []
    for epoch, (a, v) in enumerate(zip(accs, vals), start=1):
        row = {"epoch": epoch, "lr": 0.1, "train_loss": 1 / epoch, "train_acc": (1 + a) / 2}
        row |= {"test_loss": 1 - a, "test_acc": a}
        row |= {} if v is None else {"val_loss": 1 - v, "val_acc": v}
        history.append(row | {"seconds": 1.0})
    result = {"config": config, "defaults": DEFAULTS, "num_params": params, "num_nonzero": nonzero, "status": "done"}
    if "sharpness_found" in extra:
        extra["sharpness"] = extra.pop("sharpness_found")
    return result | extra | {"history": history}


def loss_run(rho=None, loss=1.0, val=None, seed=0, **settings):
    """A result of a regression: no accuracies."""
    settings = {"dataset": "teacher", "hidden": "100", "params": 10_201, "epochs": 2} | settings
    result = run(rho, seed=seed, val=None if val is None else 0.5, **settings)
    for row in result["history"]:
        for key in [key for key in row if key.endswith("_acc")]:
            del row[key]
        row |= {"test_loss": loss} | ({} if val is None else {"val_loss": val})
    return result


def pair(gain=0.01, rho=0.1, acc=0.9, **settings):
    """SGD and SAM at one seed."""
    return [run(acc=acc, **settings), run(rho, acc=acc + gain, **settings)]


def save(folder, results):
    for i, result in enumerate(results):
        path = folder / "results" / result["config"]["script"] / f"{i:03}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


def start(folder, *flags, **env):
    """plot.py in a process of its own."""
    command = [sys.executable, "plot.py", "--results", folder / "results", "--figures", folder / "figures", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, errors="surrogateescape")


def numbers(folder, results):
    """{(sweep, width, rho, rule, measure): (mean, half interval, seeds)} of results, as summary.csv has them."""
    save(folder, results)
    runs, _ = plot.read_runs(folder / "results")
    plot.write_csv(folder / "summary.csv", plot.summarize(plot.build_sweeps(runs)).rows)
    return read_csv(folder / "summary.csv")


def read_csv(path):
    found = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["sweep"], row["width"], row["rho"], row["rule"], row["measure"]
            assert key not in found
            found[key] = float(row["mean"]), float(row["half_interval"] or "nan"), int(row["seeds"])
    return found


def sweeps_in(found):
    return {key[0] for key in found}


# Statistics


def test_t_is_students():
    known = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 9: 2.26216, 14: 2.14479, 29: 2.04523, 99: 1.98422}
    for freedom, t in known.items():
        assert math.isclose(plot.student_t(freedom), t, abs_tol=6e-6)
    assert math.isclose(plot.student_t(1), math.tan(0.95 * math.pi / 2), rel_tol=1e-6)  # Cauchy's distribution
    assert math.isclose(plot.student_t(2), 0.95 * math.sqrt(2 / (1 - 0.95**2)), rel_tol=1e-6)


def test_an_interval_and_that_of_one_seed():
    mean, half, seeds = plot.interval({0: 1.0, 1: 3.0, 2: 2.0})  # deviation 1
    assert (mean, seeds) == (2, 3) and math.isclose(half, 4.30265 / math.sqrt(3), rel_tol=1e-5)
    mean, half, seeds = plot.interval({4: 5.0})
    assert (mean, seeds) == (5, 1) and math.isnan(half)


def test_a_slope_is_each_seeds_least_squares_line():
    slopes, means = plot.trend([(4, {0: 1.0, 1: 0.0}), (5, {0: 2.0, 1: 0.0}), (6, {0: 6.0, 1: 3.0})])
    assert slopes == pytest.approx({0: 2.5, 1: 1.5}) and means == pytest.approx({0: 3, 1: 1})
    uneven, _ = plot.trend([(x, {0: 7 - 3 * x}) for x in (1, 2, 5, 5.5)])
    assert uneven == pytest.approx({0: -3})


def test_a_slope_is_over_the_most_widths_that_three_seeds_share():
    narrow = {seed: float(seed) for seed in range(5)}
    wide = {seed: seed + 2.0 for seed in range(3)}
    slopes, _ = plot.trend([(1, narrow), (2, narrow), (3, wide), (4, {0: 9.0})])
    assert slopes == pytest.approx({0: 1, 1: 1, 2: 1})
    slopes, _ = plot.trend([(1, narrow), (2, narrow), (3, {0: 5.0, 1: 5.0})])
    assert slopes == pytest.approx(dict.fromkeys(range(5), 0))
    assert plot.trend([(1, narrow)]) == ({}, {}) and plot.trend([]) == ({}, {})


def test_r2_and_the_fit_of_a_loss_end_where_float32_does():
    loss = np.array([3.0] + [2 * math.exp(-0.9 * epoch) for epoch in range(1, 18)] + [1e-8, 3e-8] * 6)
    assert plot.exponential_fit(loss) == pytest.approx({"rate": -0.9, "rate_r2": 1})
    slope, r2 = plot.straight_line([0, 1, 2, 3], [0, 1, 1, 0])
    assert (slope, r2) == pytest.approx((0, 0), abs=1e-12)


def test_the_variation_of_a_slope():
    assert plot.variation_of_slope([0, 1, 2, 4], [0, 1, 0, 4]) == pytest.approx(2 + 3)  # slopes 1 -1 2


# Pairing and choosing


def test_gains_are_paired_by_seed(tmp_path):
    sgd, sam = (0.90, 0.80, 0.70), (0.91, 0.83, 0.72)  # differences 1, 3, 2
    runs = [run(acc=a, seed=s) for s, a in enumerate(sgd)] + [run(0.1, a, seed=s) for s, a in enumerate(sam)]
    found = numbers(tmp_path, [*runs, run(acc=0.1, seed=7), run(0.1, 0.9, seed=8)])
    key = f"{MNIST}, 2 epochs", "300-100", "", "last"
    assert found[(*key, "gain")] == pytest.approx((2, 4.30265 / math.sqrt(3), 3), rel=1e-5)
    assert found[(*key, "SGD")][0] == pytest.approx(80) and found[(*key, "SAM")][0] == pytest.approx(82)


def test_the_three_stopping_rules(tmp_path):
    sgd = run(acc=[0.5, 0.8, 0.7], val=[0.9, 0.8, 0.7])
    sam = run(0.1, acc=[0.9, 0.95, 0.96], val=[0.1, 0.3, 0.2])
    found = numbers(tmp_path, [sgd, sam])
    title = f"{MNIST}, 3 epochs, 100 held out"
    gains = {rule: found[title, "300-100", "", rule, "gain"][0] for rule in ("last", "held-out", "paper")}
    assert gains == pytest.approx({"last": 26, "held-out": 45, "paper": 16})


def test_rho_is_chosen_on_held_out_data_at_the_epoch_that_is_compared(tmp_path):
    vals = {0.1: [0.9, 0.6], 0.2: [0.7, 0.7], 0.5: [0.5, 0.5]}
    accs = {0.1: [0.7, 0.6], 0.2: [0.7, 0.7], 0.5: [0.8, 0.6]}  # which the paper chooses by
    found = numbers(tmp_path, [run(acc=0.5, val=0.5), *(run(rho, accs[rho], vals[rho]) for rho in accs)])
    title = f"{MNIST}, 2 epochs, 100 held out"
    chosen = {rule: found[title, "300-100", "", rule, "best rho"][0] for rule in ("last", "held-out", "paper")}
    assert chosen == {"last": 0.2, "held-out": 0.1, "paper": 0.5}


def test_rho_is_chosen_on_test_data_where_none_are_held_out(tmp_path):
    found = numbers(tmp_path, [run(), run(0.1, 0.92), run(0.2, 0.95), run(0.5, 0.93)])
    assert found[f"{MNIST}, 2 epochs", "300-100", "", "last", "best rho"][0] == 0.2
    assert not any(rule == "held-out" for _, _, _, rule, _ in found)


def test_rho_is_chosen_on_the_seeds_that_all_radii_share(tmp_path):
    runs = [run(seed=s) for s in range(3)] + [run(0.1, a, seed=s) for s, a in enumerate((0.91, 0.99, 0.99))]
    found = numbers(tmp_path, [*runs, run(0.2, 0.92, seed=0)])  # an interrupted sweep
    assert found[f"{MNIST}, 2 epochs", "300-100", "", "last", "best rho"] == pytest.approx(
        (0.2, math.nan, 1), nan_ok=True
    )
    assert "rho is chosen on the seeds that all radii share, [0]" in start(tmp_path).stdout


def test_one_rho_for_all_widths_is_best_in_the_mean(tmp_path):
    best = {"75-25": {0.1: 0.95, 0.2: 0.90, 0.5: 0.99}, "300-100": {0.1: 0.90, 0.2: 0.94, 0.05: 1.0}}
    runs = [run(acc=0.8, hidden=h) for h in best]
    runs += [run(rho, acc, hidden=h) for h, accs in best.items() for rho, acc in accs.items()]
    runs += [
        result | {"config": result["config"] | {"seed": 1}} for result in runs if "75" in result["config"]["hidden"]
    ]
    found = numbers(tmp_path, runs)
    title = f"{MNIST}, 2 epochs"
    best_of_all = found[title, "", "", "last", "best rho of all widths"]
    assert best_of_all[::2] == (0.1, 1)  # 92.5 against 92; others aren't in both
    decades = math.log10(266_610 / 61_035)
    assert found[title, "", "0.1", "last", "slope of the gain"][0] == pytest.approx((10 - 15) / decades, rel=1e-5)
    assert found[title, "", "", "last", "slope of the gain"][0] == pytest.approx((20 - 19) / decades, rel=1e-5)


def test_slopes_of_the_gain_of_sgd_and_of_sam(tmp_path):
    runs = []
    for seed in range(3):
        for hidden, last in (("75-25", 0.80), ("300-100", 0.70)):
            runs.append(run(acc=[0.8, last], val=[0.8, last], seed=seed, hidden=hidden))
            runs.append(run(0.1, [0.8, 0.85 + seed / 100], [0.8, 0.85], seed=seed, hidden=hidden))
    found = numbers(tmp_path, runs)
    title = f"{MNIST}, 2 epochs, 100 held out"
    decades = math.log10(266_610 / 61_035)
    for measure, mean in (("the gain", 10 / decades), ("SGD", -10 / decades), ("SAM", 0)):
        assert found[title, "", "", "last", f"slope of {measure}"][0] == pytest.approx(mean, abs=1e-4)
    assert found[title, "", "", "held-out", "slope of SGD"][0] == pytest.approx(0, abs=1e-9)
    assert found[title, "", "", "last", "mean gain"] == pytest.approx(
        (11, plot.student_t(2) / math.sqrt(3), 3), rel=1e-5
    )


def test_a_score_is_minus_the_loss_where_targets_are_numbers(tmp_path):
    runs = [loss_run(loss=1.3, val=1.0), loss_run(0.1, loss=1.1, val=0.7), loss_run(0.2, loss=1.0, val=0.8)]
    found = numbers(tmp_path, runs)
    key = "teacher, MLP of one layer, 2 epochs, 100 held out", "100", "", "last"
    assert found[(*key, "best rho")][0] == 0.1
    assert found[(*key, "gain")][0] == pytest.approx(0.2) and found[(*key, "SGD")][0] == pytest.approx(-1.3)


def test_the_gain_is_set_beside_the_one_at_the_next_lower_noise(tmp_path):
    runs = []
    for noise, gain in {0.1: 0.09, 0.25: 0.01, 0.5: 0.03}.items():
        for seed in range(3):
            for hidden in ("75-25", "300-100"):
                runs += pair(gain * (1 + seed), noise=noise, seed=seed, hidden=hidden, acc=0.5)
    found = numbers(tmp_path, runs)
    more = {}
    for title, width, rho, rule, measure in found:
        if (width, rho, rule, measure) == ("", "", "last", "mean gain - that at less noise"):
            more[title.split(", ")[2]] = found[title, width, rho, rule, measure][0]
    assert more == pytest.approx({"25% flipped": -16, "50% flipped": 4})


# Settings that are chosen


def test_tuned_numbers_of_epochs(tmp_path):
    runs = []
    for seed in range(2):
        s = {"seed": seed, "noise": 0.5}
        runs += [run(acc=[0.7, 0.6], val=[0.7, 0.6], **s), run(acc=[0.85, 0.8, 0.8], val=[0.9, 0.8, 0.8], **s)]
        runs += [run(0.1, 0.8, 0.8, **s), run(0.2, 0.9, 0.85, **s)]
        runs += [run(0.1, [0.86 + seed / 100] * 3, 0.95, **s), run(0.2, [0.5] * 3, 0.5, **s)]
    runs.append(run(acc=[0.99] * 5, val=0.99, noise=0.5, seed=9))  # of a seed that SAM doesn't have
    found = numbers(tmp_path, runs)
    title = f"{MNIST}, 50% flipped, 100 held out"
    key = title, "300-100", "", "tuned"
    # SGD of 3 epochs: 85. SAM of 3 epochs at rho 0.1: 86 and 87
    assert found[(*key, "gain")] == pytest.approx((1.5, plot.student_t(1) * 0.5, 2), rel=1e-5)
    assert [found[(*key, f"epochs of {optimizer}")][0] for optimizer in ("SGD", "SAM")] == [3, 3]
    assert [found[(*key, f"settings of {optimizer}")][0] for optimizer in ("SGD", "SAM")] == [2, 4]
    assert found[(*key, "best rho")][0] == 0.1


def test_nothing_is_tuned_where_sgd_has_one_number_of_epochs(tmp_path):
    assert not any(rule == "tuned" for _, _, _, rule, _ in numbers(tmp_path, pair(val=0.9)))


def test_the_gain_over_the_fit_to_the_given_labels(tmp_path):
    """run() has a train_acc of (1 + acc) / 2, so that SGD's minus SAM's is minus half of the gain."""
    gains = {"75-25": 0.01, "300-100": 0.04, "1200-400": 0.02}
    runs = []
    for hidden, gain in gains.items():
        runs += pair(gain, hidden=hidden, script="label_noise", noise=0.5)
    found = numbers(tmp_path, runs)
    key = f"{MNIST}, 50% flipped", "", "", "last"
    width = [math.log10(PARAMS[hidden]) for hidden in gains]
    assert found[(*key, "slope of the gain over the difference of training accuracies")][0] == pytest.approx(-2)
    assert found[(*key, "R^2 of the gain and the difference of training accuracies")][0] == pytest.approx(1)
    r2 = np.corrcoef(width, list(gains.values()))[0, 1] ** 2
    assert found[(*key, "R^2 of the gain and the logarithm of the parameters")][0] == pytest.approx(r2, rel=1e-5)
    assert found[(*key, "R^2 of the gain and both")][0] == pytest.approx(1)


@pytest.mark.parametrize(("held_out", "gain"), [(0.85, 5), (0.95, 8)])  # of 4 epochs; of 2 it is 0.9
def test_equal_gradients_are_sgd_of_up_to_twice_the_epochs(tmp_path, held_out, gain):
    runs = []
    for seed in range(3):
        for epochs, acc, val in ((1, 0.80, 0.8), (2, 0.85, 0.9), (4, 0.82, held_out)):
            runs.append(run(acc=[acc] * epochs, val=val, seed=seed))
        runs += [run(acc=[0.99] * 8, val=0.99, seed=seed), run(0.1, [0.9] * 2, 0.9, seed=seed)]
    found = numbers(tmp_path, runs)
    title = f"{MNIST}, 2 epochs, 100 held out"
    assert found[title, "300-100", "", "held-out", "gain at equal gradients"][0] == pytest.approx(gain)
    assert found[title, "300-100", "", "last", "gain over SGD of twice the epochs"][0] == pytest.approx(8)


def fresh_runs(scored):
    """On seeds 0 and 1 SGD is best at lr 0.3, SAM at weight decay 0.001, rho 0.2: these have the scored seeds, too."""
    runs = []
    for seed in (0, 1):
        runs += [run(acc=0.80, val=0.8, seed=seed), run(acc=0.84, val=0.9, lr=0.3, seed=seed)]
        runs += [run(0.1, 0.80, 0.8, seed=seed), run(0.1, 0.80, 0.8, seed=seed, weight_decay=1e-3)]
        runs += [run(0.2, 0.85, 0.9, seed=seed, weight_decay=1e-3)]
    for seed in scored:
        runs.append(run(acc=0.70, val=0.7, lr=0.3, seed=seed))
        runs.append(run(0.2, 0.73 + 0.01 * (seed % 3), 0.7, seed=seed, weight_decay=1e-3))
    return runs


def test_fresh_never_scores_the_seeds_it_chose_on(tmp_path):
    found = numbers(tmp_path, fresh_runs([5, 6, 7]))  # gains of 5, 3, 4 points
    key = f"{MNIST}, 100 held out", "300-100", "", "fresh"
    assert found[(*key, "gain")] == pytest.approx((4, plot.student_t(2) / math.sqrt(3), 3), rel=1e-5)
    assert found[(*key, "lr of SGD")][0] == 0.3 and found[(*key, "weight decay of SAM")][0] == 0.001
    assert found[(*key, "best rho")][0] == 0.2
    assert [found[(*key, f"settings of {optimizer}")][0] for optimizer in ("SGD", "SAM")] == [2, 3]
    assert found[(*key, "gain on the seeds that chose")] == (pytest.approx(1), pytest.approx(0, abs=1e-9), 2)


def test_tuned_tells_apart_the_seeds_that_chose_and_those_that_did_not(tmp_path):
    """Of 1 and 2 epochs and two radii seeds 0 and 1 choose; the others have the chosen settings alone."""
    runs = []
    for seed in (0, 1):
        runs += [*pair(0.01, val=0.7, epochs=1, seed=seed), run(0.2, 0.80, 0.6, seed=seed)]
        runs += pair(0.05, val=0.9, seed=seed)
    for seed in (5, 6, 7):
        runs += [run(acc=[0.90, 0.80], val=[0.5, 0.4], seed=seed), run(0.1, [0.93, 0.89], [0.5, 0.4], seed=seed)]
    found = numbers(tmp_path, runs)
    key = f"{MNIST}, 100 held out", "300-100", "", "tuned"
    assert found[(*key, "gain")][::2] == (pytest.approx(5), 2)
    assert found[(*key, "gain on seeds that chose nothing")][::2] == (pytest.approx(3), 3)


def test_fresh_needs_another_rate_or_another_decay_alone(tmp_path):
    runs = [run(r, seed=seed, val=0.9, weight_decay=d) for r in (None, 0.1) for seed in range(5) for d in (0, 1e-4)]
    runs = [result for result in runs if result["config"]["seed"] < 2 or result["config"]["weight_decay"]]
    found = numbers(tmp_path, runs)
    assert found[f"{MNIST}, 100 held out", "300-100", "", "fresh", "settings of SGD"][::2] == (2, 2)


def test_a_length_that_diverged_leaves_the_others_to_be_tuned(tmp_path):
    runs = []
    for seed in range(3):
        s = {"seed": seed, "val": 0.8}
        runs += [run(acc=0.9, epochs=4, **s), run(acc=0.875, epochs=6, **s), run(0.1, acc=0.9375, epochs=4, **s)]
        runs.append(run(epochs=2, status="diverged", **s) | {"history": []})
    found = numbers(tmp_path, runs)
    assert found[f"{MNIST}, 100 held out", "300-100", "", "tuned", "gain"] == (pytest.approx(3.75), 0, 3)


def test_each_number_of_the_summary_has_its_own_number_of_seeds(tmp_path):
    wide = [run(r, acc=0.9 + 0.1 * (r or 0), seed=seed, hidden="75-25") for r in (None, 0.25) for seed in range(3)]
    save(tmp_path, [*wide, *pair(0.0125, rho=0.25)])
    start(tmp_path)
    summary = (tmp_path / "figures" / "summary.md").read_text()
    assert re.search(r"^\| training accuracy of SAM \| last \| \S+ \(3\) \| \S+ \(1\) \|$", summary, re.MULTILINE)


def test_what_is_chosen_is_told_before_three_seeds_can_be_scored(tmp_path):
    found = numbers(tmp_path, fresh_runs([5, 6]))
    key = f"{MNIST}, 100 held out", "300-100", "", "fresh"
    assert found[(*key, "lr of SGD")][0] == 0.3 and (*key, "gain") not in found
    assert "fresh, width 300-100: no gain, no three seeds beside those that chose" in start(tmp_path).stdout


def test_a_setting_that_lacks_a_seed_is_no_candidate_and_is_named(tmp_path):
    stray = run(acc=0.99, val=0.99, seed=0, lr=0.7)  # would be best, on the one seed it has
    found = numbers(tmp_path, [*fresh_runs([5, 6, 7]), stray])
    assert found[f"{MNIST}, 100 held out", "300-100", "", "fresh", "lr of SGD"][0] == 0.3
    assert "fresh, width 300-100: too few seeds for the choice, ('SGD', 2, 0.0, 0.7, 0.0001)" in start(tmp_path).stdout


# What makes a sweep


@pytest.mark.parametrize("key", ["processes", "lr", "val_size", "amp", "data_dir", "train_size", "optimizer", "loss"])
def test_runs_with_other_settings_are_not_paired(tmp_path, key):
    value = {"data_dir": "elsewhere", "optimizer": "adamw", "loss": "mse", "val_size": 0}.get(key, 7)
    assert len(sweeps_in(numbers(tmp_path, [*pair(val=0.9), run(0.2, val=0.9, seed=3, **{key: value})]))) == 1


def test_where_a_run_happened_does_not_matter(tmp_path):
    elsewhere = {"device": "cuda", "results": "r2", "force": True, "workers": 4, "sharpness": 100, "save": True}
    found = numbers(tmp_path, [run(), run(0.1, 0.92, script="label_noise", **elsewhere)])
    assert found[f"{MNIST}, 2 epochs", "300-100", "", "last", "gain"][0] == pytest.approx(2)


@pytest.mark.parametrize("key", ["data_dir", "dataset"])
def test_two_spellings_of_one_folder_are_one(tmp_path, key):
    found = numbers(tmp_path, [run(**{key: "data/mini/"}), run(0.1, **{key: "./data/mini"})])
    assert len(sweeps_in(found)) == 1 and "data/mini" in sweeps_in(found).pop()


def test_the_default_data_folder_is_not_in_the_title(tmp_path):
    assert sweeps_in(numbers(tmp_path, pair(data_dir="./data/"))) == {f"{MNIST}, 2 epochs"}


def test_the_title_has_all_settings(tmp_path):
    settings = {"noise": 0.25, "epochs": 12, "train_size": 10000, "weight_decay": 0.0, "batch_size": 32}
    (title,) = sweeps_in(numbers(tmp_path, pair(val=0.9, **settings)))
    words = "25% flipped, batch size 32, 12 epochs, 10,000 images, 100 held out, weight decay 0"
    assert sorted(title.split(", ")) == sorted(f"{MNIST}, {words}".split(", "))


def test_mlps_are_told_by_the_proportions_of_their_layers(tmp_path):
    widths = {"75-25": 1, "3000-1000": 2, "100-33": 3, "100-100": 4, "200-200": 5, "400-100": 6, "50": 7, "60": 8}
    runs = [one for hidden, thousands in widths.items() for one in pair(hidden=hidden, params=1000 * thousands)]
    found = numbers(tmp_path, runs)
    models = {}
    for title, width, *_ in found:
        models.setdefault(title.split(", ")[1], set()).add(width)
    assert models == {
        "MLP 3:1": {"75-25", "3000-1000", "100-33", ""},
        "MLP 1:1": {"100-100", "200-200", ""},
        "MLP 4:1": {"400-100"},
        "MLP of one layer": {"50", "60", ""},
    }


def test_equal_layers_are_a_sweep_by_depth(tmp_path):
    params = {"300": 238_510, "300-300": 328_810, "300-300-300": 419_110}
    runs = []
    for i, (hidden, count) in enumerate(params.items(), start=1):
        runs += pair(0.01 * i, hidden=hidden, params=count)
    found = numbers(tmp_path, [*runs, *pair()])
    deep = "MNIST, MLP of layers of 300, 2 epochs"
    assert sweeps_in(found) == {deep, f"{MNIST}, 2 epochs"}
    assert found[deep, "", "", "last", "slope of the gain"][0] == pytest.approx(1)  # per layer


def test_mlps_and_resnets_are_not_one_sweep(tmp_path):
    resnet = pair(hidden=None, filters=16, script="resnet_width")
    assert sweeps_in(numbers(tmp_path, [*pair(), *resnet])) == {f"{MNIST}, 2 epochs", "MNIST, ResNet-18, 2 epochs"}


def test_sgds_runs_are_shared_by_the_variants_of_sam(tmp_path):
    variants = [run(0.1, 0.93, perturb="rest"), run(0.1, 0.94, perturb="last"), run(0.5, 0.95, adaptive=True)]
    found = numbers(tmp_path, [*pair(), *variants])
    gains = {}
    for title, width, rho, rule, measure in found:
        if (width, rho, rule, measure) == ("300-100", "", "last", "gain"):
            gains[title.removeprefix(f"{MNIST}, ")] = found[title, width, rho, rule, measure][0]
    assert gains == pytest.approx(
        {"2 epochs": 1, "2 epochs, perturb rest": 3, "2 epochs, perturb last": 4, "2 epochs, adaptive": 5}
    )


def test_pruned_networks_stand_beside_the_dense_one_of_as_many_weights(tmp_path):
    sparse = pair(0.03, script="sparsity", sparsity=0.77, pruner="snip", nonzero=61_500)
    sparser = pair(script="sparsity", sparsity=0.8, pruner="snip", nonzero=50_000)
    dense = [*pair(0.02, hidden="74-25", params=60_000), *pair(0.005, hidden="75-25"), *pair(0.02)]
    found = numbers(tmp_path, [*dense, *sparse, *sparser, *pair(script="sparsity", hidden="150-50")])
    title = f"{MNIST}, pruned (snip), 2 epochs"
    contrast = "gain - that of dense networks"
    assert found[title, "300-100 at 0.77", "", "last", contrast][0] == pytest.approx(3 - 0.5)
    assert (title, "300-100 at 0.8", "", "last", contrast) not in found
    assert (f"{MNIST}, 2 epochs", "150-50", "", "last", "gain") in found  # sparsity 0 is dense


def test_a_script_of_ones_own_names_its_width(tmp_path):
    runs = []
    for width, params in ((2, 1000), (32, 4000)):
        mine = pair(script="cnn_width", hidden=None, params=params, width=f"{width} channels", kernel=5)
        for result in mine:
            del result["config"]["filters"], result["config"]["weight_decay"]
            result["config"]["width"] = width  # its flag
        runs += mine
    found = numbers(tmp_path, runs)
    assert {key[1] for key in found} == {"2 channels", "32 channels", ""}
    assert sweeps_in(found) == {"MNIST, cnn_width, 2 epochs, kernel 5"}


def test_the_papers_points_are_drawn_where_the_settings_are_its_own(tmp_path):
    def paper(name, runs):
        save(tmp_path / name, runs)
        sweeps = plot.build_sweeps(plot.read_runs(tmp_path / name / "results")[0])
        return [plot.paper_gains(sweep).get(266_610) for sweep in sweeps]

    hundred = {"epochs": 100, "val": 0.9}
    assert paper("own", pair(**hundred)) == [0.18]
    for i, other in enumerate(({"lr": 0.05}, {"warmup": 5}, {"epochs": 30}, {"noise": 0.5}, {"train_size": 10_000})):
        assert paper(str(i), pair(**hundred | other)) == [None]
    assert paper("shallow", pair(**hundred, hidden="300", params=238_510)) == [None]


# Files that can't be used


BROKEN = {
    "torn": '{"config": {',
    "list": "[1, 2]",
    "empty": "",
    "older": json.dumps({key: value for key, value in run().items() if key != "defaults"}),
    "deep": "[" * 100_000,
    "short": json.dumps(run(epochs=3, acc=[0.1, 0.2])),
    "nan": json.dumps(run(acc=math.nan)),
    "text": json.dumps(run(params="many")),
    "latin": "\xff",
    "seed": json.dumps(run(seed=[1])),
    "widthless": json.dumps(run(hidden=None)),
    "unscored": json.dumps(run(val_size=100)),
    "status": json.dumps(run(status="running")),
}


def test_a_foreign_file_is_named_with_the_reason_and_the_rest_is_drawn(tmp_path):
    save(tmp_path, [*pair(), *pair(hidden="75-25")])
    for name, text in BROKEN.items():
        (tmp_path / "results" / "mlp_width" / f"{name}.json").write_text(text, encoding="latin-1")
    (tmp_path / "results" / "mlp_width" / "folder.json").mkdir()
    done = start(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name in [*BROKEN, "folder"]:
        assert f"{name}.json: left out, not a result file (" in done.stdout
    assert "'defaults'" in done.stdout and "has no hidden, no filters and no width" in done.stdout
    assert (tmp_path / "figures" / "gain_by_width.png").exists()
    assert "torn.json" in (tmp_path / "figures" / "summary.md").read_text()


def test_two_different_results_of_one_run_end_it(tmp_path):
    save(tmp_path, [*pair(), run(0.1, acc=0.99, device="cuda")])
    done = start(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "001.json" in done.stderr and "002.json" in done.stderr
    assert not (tmp_path / "figures").exists()


def test_of_two_equal_results_the_one_with_more_curvature_is_used(tmp_path):
    measured = [run(0.1, 0.91, sharpness=n, sharpness_found={"images": n, "lambda_max": n / 3}) for n in (3, 9)]
    found = numbers(tmp_path, [*pair(), *measured])
    assert found[f"{MNIST}, 2 epochs", "300-100", "", "last", "largest eigenvalue of SAM"][0] == 3


def test_a_rho_at_which_a_seed_diverged_is_left_out_and_named(tmp_path):
    runs = [run(seed=0), run(seed=1), run(0.1, 0.91, seed=0), run(0.1, 0.91, seed=1), run(0.5, 0.99, seed=0)]
    diverged = run(0.5, seed=1, status="diverged") | {"history": []}
    found = numbers(tmp_path, [*runs, diverged])
    assert found[f"{MNIST}, 2 epochs", "300-100", "", "last", "best rho"][0] == 0.1
    assert "width 300-100: rho 0.5 left out, 1 of 2 runs diverged" in start(tmp_path).stdout


def test_sgd_that_diverged_has_no_pair(tmp_path):
    diverged = run(status="diverged") | {"history": []}
    found = numbers(tmp_path, [*pair(hidden="75-25"), diverged, run(0.1)])
    assert {key[1] for key in found} == {"75-25"}
    assert "width 300-100: SGD left out at seeds [0], where it diverged" in start(tmp_path).stdout
    assert "width 300-100: rho 0.1 left out at seeds [0], no run of SGD" in start(tmp_path).stdout


def test_seeds_and_widths_that_one_side_lacks_are_named(tmp_path):
    save(tmp_path, [*pair(), run(0.1, seed=2), run(hidden="75-25"), run(0.1, hidden="150-50")])
    told = start(tmp_path).stdout
    for line in (
        "width 300-100: rho 0.1 left out at seeds [2], no run of SGD",
        "width 75-25: SGD left out, no run of SAM",
        "width 150-50: rho 0.1 left out at seeds [0], no run of SGD",
    ):
        assert f"{MNIST}, 2 epochs, {line}\n" in told


def test_sgd_alone_is_named_once_with_all_its_lengths(tmp_path):
    save(tmp_path, [*pair(), *(run(epochs=epochs, noise=0.5) for epochs in (2, 1000))])
    done = start(tmp_path)
    (line,) = [line for line in done.stdout.splitlines() if "no run of SAM" in line]
    assert line.startswith(f"{MNIST}, 50% flipped: ") and line.endswith("(2, 1,000 epochs)")


def test_collapsed_runs_are_counted(tmp_path):
    collapsed = run(0.5, 0.1)
    collapsed["history"][1]["train_loss"] = 0.999
    found = numbers(tmp_path, [*pair(), collapsed])
    title = f"{MNIST}, 2 epochs"
    assert [found[title, "300-100", rho, "last", "collapsed runs"][0] for rho in ("0.1", "0.5")] == [0, 1]


@pytest.mark.parametrize("runs", [[], [run()], [run(0.1), run(0.2)], [run(seed=0), run(0.1, seed=1)]])
def test_where_nothing_can_be_paired_is_one_line_and_status_2(tmp_path, runs):
    save(tmp_path, runs)
    done = start(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--results" in done.stderr


@pytest.mark.parametrize("flags", [["--colour", "red"], ["--fig", "x"], ["--figures", "README.md"]])
def test_bad_flags_are_one_line_and_status_2(tmp_path, flags):
    save(tmp_path, pair())
    done = start(tmp_path, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and flags[0] in done.stderr


# Whole folders


def everything():
    """Every experiment in small, with three seeds and three widths."""
    runs = []
    widths = "75-25", "300-100", "1200-400"
    for seed in range(3):
        for i, hidden in enumerate(widths):
            s = {"seed": seed, "hidden": hidden, "val": 0.8}
            curvature = {"lambda_max": 20.0 + i + seed, "s2": 9.0, "trace": 1.0, "images": 10}
            runs += [run(acc=0.9, sharpness_found=curvature, **s), run(acc=0.91, epochs=4, **s)]
            runs += [run(r, 0.9 + r * (i + 1) / 20, sharpness_found=curvature, **s) for r in (0.1, 0.2, 0.5)]
            runs += pair(weight_decay=0.0, **s)
            for noise in (0.25, 0.5):
                runs += [*pair(0.02, noise=noise, **s), run(acc=0.91, noise=noise, epochs=4, **s)]
            runs += [run(0.1, noise=0.5, perturb=part, **s) for part in ("rest", "last", "random")]
            runs += pair(schedule="constant", epochs=6, **s)
            runs += pair(schedule="constant", epochs=6, loss="mse", momentum=0.0, sharpness_found=curvature, **s)
            runs += pair(sparsity=0.7, pruner="random", nonzero=PARAMS[hidden] // 4, **s)
        for hidden in ("300", "300-300", "300-300-300"):
            runs += pair(seed=seed, hidden=hidden, params=90_000 * len(hidden))
        for width in (10, 100, 1000):
            s = {"seed": seed, "hidden": str(width)}
            runs += [loss_run(r, 1.2, 1.2, params=102 * width + 1, **s) for r in (None, 0.1)]
            function = {"x": list(range(5)), "y": [0, 1, 0, width, 2]}
            s |= {"dataset": "curve", "params": 3 * width, "schedule": "constant", "function": function}
            runs += [loss_run(r, 0.2, **s) for r in (None, 0.2)]
    for filters in (8, 16):
        runs += pair(noise=0.5, hidden=None, filters=filters, params=6250 * filters, dataset="data/cifar10-jpeg")
    return runs


def test_every_figure_and_its_caption(tmp_path):
    save(tmp_path, everything())
    done = start(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    figures = {figure.__name__ for figure in plot.FIGURES}
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"summary.md", "summary.csv", *(f"{name}.png" for name in figures)}
    summary = (tmp_path / "figures" / "summary.md").read_text()
    for figure in plot.FIGURES:
        assert f"![{figure.__name__}]({figure.__name__}.png)\n\n{' '.join(figure.__doc__.split())}\n" in summary
    for line in summary.splitlines():
        assert not line.startswith("|") or line.replace("\\|", "").count("|") <= 9
    assert "CIFAR-10 (JPEG copy), ResNet-18, 50% flipped, 2 epochs" in summary and "nan" not in summary
    header = (tmp_path / "figures" / "summary.csv").read_text().splitlines()[0]
    assert header == "sweep,width,parameters,rho,rule,measure,mean,half_interval,seeds"


def drawn(ax):
    """The points of each labelled line, by its label."""
    return {line.get_label(): line.get_xydata().tolist() for line in ax.lines if line.get_label()[0] != "_"}


@pytest.mark.parametrize("ends", [(0, 0, 1), (1, 1, 0), (0.5, 0.5, 0.5)])
def test_labels_of_lines_stand_apart_and_above_the_axis(ends):
    figure, ((ax,),) = plot.panels(1, 1)
    for end, label in zip(ends, ("SGD", "in two\nlines", "SAM")):
        ax.plot([0, 1], [0.5, end], label=label)
    ax.plot([0, 1], [0, 1])
    plot.label_lines(ax)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 3 and all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:]))
    assert boxes[0].y0 >= ax.get_window_extent().y0 - 1


def test_training_length_has_each_length_at_its_own_best_rho(tmp_path):
    noisy = {"noise": 0.5, "val": 0.8}
    runs = [run(acc=[0.9, 0.875], **noisy), run(acc=[0.8, 0.9, 0.8, 0.75], **noisy)]
    runs += [run(0.1, acc=0.9, epochs=4, **noisy), run(0.2, acc=[0.8, 0.9, 0.8, 0.8125], noise=0.5, val=0.9)]
    runs += pair(0.125, acc=0.5, hidden="75-25", epochs=4, **noisy)
    runs += [*pair(noise=0.5, dataset="kmnist"), run(acc=0.9, epochs=6, noise=0.5, dataset="kmnist")]
    save(tmp_path, [*runs, *pair(), *pair(noise=0.5, dataset="svhn")])  # the last has one number of epochs
    figure, _ = plot.training_length(plot.build_sweeps(plot.read_runs(tmp_path / "results")[0]))
    kmnist, _, narrow, wide = figure.axes
    assert narrow.get_title().endswith("61k parameters") and wide.get_title() == "267k parameters"
    assert [text.get_text() for text in kmnist.get_xticklabels() if text.get_visible()] == ["2", "6"]
    assert drawn(narrow) == {"SGD": [[4, 50]], "SAM": [[4, 62.5]]}
    assert drawn(wide) == {"SGD": [[2, 87.5], [4, 75]], "SAM": [[4, 81.25]]}


def test_sgd_and_sam_are_drawn_at_the_longest_and_at_the_best_length_of_each(tmp_path):
    runs = []
    for epochs, sgd, sam in ((2, 0.875, 0.75), (3, 0.75, 0.8125), (4, 0.5, 0.625)):
        s = {"noise": 0.5, "epochs": epochs}
        runs += [run(acc=sgd, val=sgd, **s), run(0.1, acc=sam, val=sam, **s)]
    save(tmp_path, runs)
    figure, _ = plot.label_noise(plot.build_sweeps(plot.read_runs(tmp_path / "results")[0]))
    found = {label: points[0][1] for label, points in drawn(figure.axes[0]).items()}
    assert found == {"SGD, 2 epochs": 87.5, "SAM, 3 epochs": 81.25, "SGD, 4 epochs": 50, "SAM, 4 epochs": 62.5}


def test_accuracies_by_another_rule_have_its_lengths_and_radii(tmp_path):
    accuracies = {
        (None, 2): [0.875, 0.5],
        (None, 4): [0.9375, 0.5, 0.5, 0.25],
        (0.1, 2): [0.8125, 0.5],
        (0.2, 2): [0.75, 0.75],
        (0.1, 4): [0.625, 0.5, 0.5, 0.5],
        (0.2, 4): [0.5625, 0.5625, 0.5625, 0.5625],
    }
    save(tmp_path, [run(rho, acc, val=acc, noise=0.5) for (rho, _), acc in accuracies.items()])
    sweeps = plot.build_sweeps(plot.read_runs(tmp_path / "results")[0])
    for rule, expected in (
        ("last", {"SGD, 2 epochs": 50, "SGD, 4 epochs": 25, "SAM, 2 epochs": 75, "SAM, 4 epochs": 56.25}),
        ("held-out", {"SGD, 4 epochs": 93.75, "SAM, 2 epochs": 81.25, "SAM, 4 epochs": 62.5}),
    ):
        ax = plot.plt.figure().subplots()
        plot.draw_accuracies(ax, sweeps, sweeps[-1], rule)
        assert {label: points[0][1] for label, points in drawn(ax).items()} == expected


def test_sgd_stands_left_of_the_radii_each_at_its_tick(tmp_path):
    wide = [run(r, acc=0.5 + (r or 0), hidden="1200-400") for r in (None, 0.125, 0.25)]
    save(tmp_path, [*wide, run(acc=0.5), run(0.25, acc=0.625)])
    figure, _ = plot.rho(plot.build_sweeps(plot.read_runs(tmp_path / "results")[0]))
    (ax,) = [ax for ax in figure.axes if ax.get_visible()]
    ticks = dict(zip([text.get_text() for text in ax.get_xticklabels()], ax.get_xticks()))
    assert drawn(ax) == {
        "267k": [[ticks["SGD"], 50], [ticks["0.25"], 62.5]],
        "1.4M": [[ticks["SGD"], 50], [ticks["0.125"], 62.5], [ticks["0.25"], 75]],
    }


def test_the_front_figures_marks_are_of_plain_label_noise_alone(tmp_path):
    plain = [pair(noise=0.25, val=0.8), pair(noise=0.5, val=0.8), pair(noise=0.5, val=0.8, train_size=50)]
    plain.append(pair(noise=0.5, val=0.8, hidden=None, filters=4))
    others = [pair(noise=0.5, val=0.8, flip="next"), pair(noise=0.5, val=0.8, dataset="kmnist"), pair(val=0.8)]
    save(tmp_path, sum(plain + others, []))
    figure, _ = plot.front(plot.build_sweeps(plot.read_runs(tmp_path / "results")[0]))
    assert len(figure.axes[2].collections) == len(plain)


def test_of_a_single_width_the_second_panel_is_left_out(tmp_path):
    longer = run(acc=0.9, epochs=6, noise=0.5)
    save(tmp_path, [*pair(noise=0.5), longer])
    sweeps = plot.build_sweeps(plot.read_runs(tmp_path / "results")[0])
    for draw in (plot.curves, plot.training_length):
        figure, _ = draw(sweeps)
        assert [ax.get_visible() for ax in figure.axes] == [True, False], draw


def test_a_single_width_or_radius_is_no_figure_by_width_or_rho(tmp_path):
    save(tmp_path, pair(noise=0.5, dataset="kmnist"))
    sweeps = plot.build_sweeps(plot.read_runs(tmp_path / "results")[0])
    for figure, what in ((plot.label_noise_elsewhere, "two widths"), (plot.rho, "two radii")):
        with pytest.raises(plot.Missing, match=what):
            figure(sweeps)


ODD = {
    "one seed": pair() + pair(hidden="75-25"),
    "gaps between widths": [r for h in PARAMS for r in pair(hidden=h, seed=h == "150-50")],
    "30 widths": [r for i in range(1, 31) for r in pair(hidden=f"{30 * i}-{10 * i}", params=25_000 * i)],
    "20 radii": [run()] + [run(i / 20) for i in range(20)],
    "no radius in common": [*pair(rho=0.1), *pair(rho=0.2, hidden="75-25")],
    "radii without a common seed": [run(), run(seed=1), run(0.1), run(0.2, seed=1), run(0.3, seed=1)],
    "one epoch": pair(epochs=1, val=0.5),
    "constant rate alone": pair(schedule="constant"),
    "last perturbed alone, and a part of one's own": [run(), *(run(0.1, perturb=p) for p in ("last", "first"))],
    "pruned alone": pair(script="sparsity", sparsity=0.5, pruner="snip"),
    "flipped alone": pair(0, noise=0.5),
    "all diverged but one": [*pair(), *(run(r, status="diverged") | {"history": []} for r in (1.0, 2.0))],
    "a NaN before it diverged": [*pair(), run(0.7, acc=math.nan, status="diverged")],
    "sharpness of SGD alone": [run(sharpness_found={"trace": 1.0, "lambda_max": 2.0}), run(0.1)],
    "a curve whose function one run lacks": [
        loss_run(rho, dataset="curve", hidden="10", params=30, **function)
        for rho, function in ((None, {}), (0.2, {"function": {"x": [0, 1, 2], "y": [0, 1, 0]}}))
    ],
    "mathematics in a name": pair(dataset="data/$x_{$"),
    "two seeds": [*pair(seed=0, noise=0.5), *pair(seed=1, noise=0.5)],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders(tmp_path, name, monkeypatch, capfd):
    save(tmp_path, ODD[name])
    arguments = ["plot.py", "--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", arguments)
    plot.main()
    assert capfd.readouterr().err == "" and read_csv(tmp_path / "figures" / "summary.csv")


def test_it_starts_where_the_named_backend_is_not_installed(tmp_path):
    save(tmp_path, pair())
    for backend in ("module://matplotlib_inline.backend_inline", "no_such_backend"):
        done = start(tmp_path, MPLBACKEND=backend)
        assert (done.returncode, done.stderr) == (0, "")


def test_folders_whose_names_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    save(folder, [*pair(), *pair(dataset=os.fsdecode(b"data/\xe9"), noise=0.5)])
    (folder / "results" / "mlp_width" / os.fsdecode(b"\xe9.json")).write_text("torn")
    done = start(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.fsdecode(b"\xe9.json: left out") in done.stdout
    assert (folder / "figures" / "gain_by_width.png").exists()


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    save(tmp_path, pair())
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "plot.py", "--results", tmp_path / "results", "--figures", tmp_path / "figures"]
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "figures" / "summary.md").exists()


# The shipped results, by plain numpy


def test_the_shipped_summary_of_half_flipped_labels_recomputed():
    folder = ROOT / "results" / "overnight" / "label_noise"
    widths = {"30-10": 23_970, **PARAMS, "3000-1000": 5_366_010}
    gains = {}
    for hidden in widths:
        last = {}
        for path in folder.glob(f"mnist_mlp{hidden}_noise0.5_*_epochs=60_train-size=10000_val-size=5000.json"):
            _, _, _, optimizer, seed, *others = path.stem.split("_")
            if len(others) == 3:  # no --perturb
                row = json.loads(path.read_text())["history"][-1]
                last.setdefault(optimizer, {})[int(seed.removeprefix("seed"))] = row
        sgd = last.pop("sgd")
        assert all(rows.keys() == sgd.keys() for rows in last.values()) and len(last) > 1
        best = max(last.values(), key=lambda rows: np.mean([row["val_acc"] for row in rows.values()]))
        gains[hidden] = {seed: 100 * (best[seed]["test_acc"] - sgd[seed]["test_acc"]) for seed in sgd}
    assert [len(values) for values in gains.values()] == [3, 5, 5, 5, 5, 3]
    x = np.log10(list(widths.values()))
    slopes = [np.polyfit(x, [gains[hidden][seed] for hidden in widths], 1)[0] for seed in range(3)]

    found = read_csv(ROOT / "figures" / "overnight" / "summary.csv")
    title = f"{MNIST}, 50% flipped, 60 epochs, 10,000 images, 5,000 held out"
    half = 4.302653 * np.std(slopes, ddof=1) / math.sqrt(3)
    assert found[title, "", "", "last", "slope of the gain"] == pytest.approx((np.mean(slopes), half, 3), rel=1e-5)
    for hidden, values in gains.items():
        mean = np.mean(list(values.values()))
        assert found[title, hidden, "", "last", "gain"][0] == pytest.approx(mean, rel=1e-5)


def test_a_figure_by_a_rule_that_a_sweep_lacks_says_what_it_needs(tmp_path):
    save(tmp_path, pair())
    runs, _ = plot.read_runs(tmp_path / "results")
    (sweep,) = plot.build_sweeps(runs)
    draws = [plot.draw_gains, plot.draw_scores, lambda ax, *args: plot.draw_accuracies(ax, [sweep], *args)]
    for draw in draws:
        with pytest.raises(plot.Missing, match=f"--val-size for {MNIST}.*not held-out"):
            draw(plot.plt.figure().subplots(), sweep, "held-out")


def test_what_is_over_all_lengths_is_not_titled_as_the_default_length(tmp_path):
    runs = []
    for hidden in ("75-25", "300-100"):
        for epochs in (2, DEFAULTS["epochs"]):
            runs += pair(epochs / 500, hidden=hidden, noise=0.5, epochs=epochs, val=0.8)
    found = numbers(tmp_path, runs)
    default = f"{MNIST}, 50% flipped, {DEFAULTS['epochs']} epochs, 100 held out"
    assert {rule for title, _, _, rule, _ in found if title == default} == {"last", "held-out", "paper"}
    assert not any(measure.startswith("R^2") for title, *_, measure in found if title == default)
    assert (f"{MNIST}, 50% flipped, 100 held out", "300-100", "", "tuned", "gain") in found

"""plot.py on results made up here, where the right numbers are known: its statistics, its pairing, and odd folders."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import plot

ROOT = Path(__file__).parent.parent
PARAMS = {"75-25": 61_035, "150-50": 125_810, "300-100": 266_610, "600-200": 593_210, "1200-400": 1_426_410}
BASE = {"script": "mlp_width", "processes": 1, "hidden": "300-100", "filters": None, "sam": False, "rho": None}
BASE |= {"adaptive": False, "perturb": "all", "epochs": 2, "batch_size": 128, "lr": 0.1, "momentum": 0.9}
BASE |= {"weight_decay": 1e-4, "schedule": "step", "warmup": 0, "milestones": [0.25, 0.5, 0.75], "loss": "ce"}
BASE |= {"sharpness": 0, "seed": 0, "dataset": "mnist", "data_dir": "data", "train_size": None, "val_size": 0}
BASE |= {"device": "cpu", "amp": False, "compile": False, "fp32": False, "results": "results", "force": False}


def run(rho=None, seed=0, acc=0.9, val=None, status="done", params=None, history=None, extra=None, **settings):
    """A result: SAM's where rho is given; acc, val: accuracies of all epochs or a list of each epoch's."""
    config = BASE | {"sam": rho is not None, "rho": rho, "seed": seed} | settings
    config["val_size"] = config["val_size"] if val is None else 100
    accs, vals = ([x] * config["epochs"] if not isinstance(x, list) else x for x in (acc, val))
    rows = []
    for epoch, (a, v) in enumerate(zip(accs, vals), start=1):
        row = {"epoch": epoch, "lr": 0.1 if epoch == 1 else 0.01, "train_loss": 1 / epoch, "train_acc": 0.5 + a / 2}
        row |= {"test_loss": 1 - a, "test_acc": a} | ({} if v is None else {"val_loss": 1 - v, "val_acc": v})
        row |= {"train_clean_acc": a} if config.get("noise") else {}
        rows.append(row | ({} if rho is None else {"last_layer_share": 0.2}))
    params = params or PARAMS.get(config["hidden"], 1000 * (config["filters"] or 1))
    result = {"config": config, "num_params": params, "num_nonzero": params, "status": status}
    return result | {"history": rows if history is None else history} | (extra or {})


def number_run(rho=None, seed=0, loss=1.0, val=None, **settings):
    """A result of a regression: no accuracies."""
    settings = {"dataset": "teacher", "loss": "mse", "hidden": "100"} | settings
    result = run(rho, seed, val=0.5 if val is not None else None, **{"params": 10_201, **settings})
    for row in result["history"]:
        for key in [key for key in row if key.endswith("_acc")]:
            del row[key]
        row |= {"test_loss": loss} | ({} if val is None else {"val_loss": val})
    return result


def save(folder, results):
    for i, result in enumerate(results):
        path = folder / "results" / result["config"]["script"] / f"{i}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return folder / "results"


def read(folder, results):
    return plot.workloads(save(folder, results))


def one(folder, results):
    (load,), _ = read(folder, results)
    return load


def draw(folder, *more):
    command = [sys.executable, "plot.py", "--results", folder / "results", "--figures", folder / "figures", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def pair(gain=0.01, rho=0.1, **settings):
    """SGD and SAM at one seed."""
    acc = settings.pop("acc", 0.9)
    return [run(acc=acc, **settings), run(rho, acc=acc + gain, **settings)]


# Statistics


def test_the_interval_is_students():
    mean, half = plot.interval({0: 1, 1: 3, 2: 2})  # deviation 1
    assert mean == 2 and math.isclose(half, 4.3027 / math.sqrt(3), rel_tol=1e-4)
    mean, half = plot.interval({0: 5})
    assert mean == 5 and math.isnan(half)
    for n in (*range(2, 41), 101):  # P(|T| < t), by the integral of T's density
        df, t = n - 1, plot.interval({i: float(i) for i in range(n)})[1] * math.sqrt(n) / np.std(range(n), ddof=1)
        x, scale = np.linspace(0, t, 100_001), math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
        density = scale / math.sqrt(df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
        assert math.isclose(2 * t * density[1:].mean(), 0.95, abs_tol=3e-4), n


def test_a_trend_is_each_seeds_slope_per_tenfold_parameters():
    points = [(1e4, {0: 1.0, 1: 0.0}), (1e5, {0: 2.0, 1: 0.0}), (1e6, {0: 6.0, 1: 3.0})]
    slopes, contrast, mean = plot.trend(points)  # (6 - 1) / 2, (3 - 0) / 2
    assert slopes == pytest.approx({0: 2.5, 1: 1.5}) and contrast == pytest.approx({0: 5, 1: 3})
    assert mean == pytest.approx({0: 3, 1: 1})
    uneven = plot.trend([(1e4, {0: 0.0}), (1e5, {0: 1.0}), (1e7, {0: 1.0})])[0]  # x - 16/3: -4/3 -1/3 5/3, y - 2/3
    assert uneven[0] == pytest.approx((4 / 3 * 2 / 3 - 1 / 3 * 1 / 3 + 5 / 3 * 1 / 3) / (16 + 1 + 25) * 9)


def test_a_trend_is_over_the_widths_that_all_seeds_have():
    points = [(1e4, {0: 0.0, 1: 0.0}), (1e5, {0: 1.0, 1: 1.0}), (1e6, {0: 9.0})]
    assert plot.trend(points)[0] == pytest.approx({0: 1, 1: 1})
    assert plot.trend([*points, (1e7, {7: 3.0})])[0] == pytest.approx({0: 1, 1: 1})  # one width alone has seed 7
    assert plot.trend(points[:1]) == [{}, {}, {}] and plot.trend([]) == [{}, {}, {}]


def test_gains_are_paired_by_seed(tmp_path):
    sgd, sam = (0.90, 0.80, 0.70), (0.91, 0.83, 0.72)  # differences 1, 3, 2
    results = [run(seed=s, acc=a) for s, a in enumerate(sgd)] + [run(0.1, s, a) for s, a in enumerate(sam)]
    (cell,) = one(tmp_path, results).cells
    assert cell.values("gain") == pytest.approx({0: 1, 1: 3, 2: 2})
    assert cell.values("SGD") == pytest.approx({0: 90, 1: 80, 2: 70})
    assert cell.values("SAM") == pytest.approx({0: 91, 1: 83, 2: 72})


def test_the_three_stopping_rules(tmp_path):
    sgd = run(acc=[0.5, 0.8, 0.7], val=[0.9, 0.8, 0.7], epochs=3)
    sam = run(0.1, acc=[0.9, 0.95, 0.96], val=[0.1, 0.3, 0.2], epochs=3)
    (cell,) = one(tmp_path, [sgd, sam]).cells
    gains = {stop: cell.values("gain", stop)[0] for stop in plot.STOPS}
    assert gains == pytest.approx({"last": 26, "held-out": 45, "paper": 16})


def test_the_rule_that_picks_the_epoch_picks_rho(tmp_path):
    vals = {0.1: [0.9, 0.6], 0.2: [0.7, 0.7], 0.5: [0.5, 0.5]}
    accs = {0.1: [0.7, 0.6], 0.2: [0.7, 0.7], 0.5: [0.8, 0.6]}  # which the paper chooses by
    runs = [run(acc=0.5, val=0.5), *(run(rho, acc=accs[rho], val=vals[rho]) for rho in accs)]
    (cell,) = one(tmp_path, runs).cells
    assert [plot.choose([cell], stop)[0] for stop in ("last", "held-out", "paper")] == [0.2, 0.1, 0.5]


@pytest.mark.parametrize(("vals", "best"), [((0.5, 0.6), 0.2), ((0.6, 0.5), 0.1), ((None, None), 0.1)])
def test_rho_is_chosen_on_held_out_images_where_there_are_some(tmp_path, vals, best):
    runs = [run(val=vals[0]), run(0.1, acc=0.95, val=vals[0]), run(0.2, acc=0.92, val=vals[1])]
    load = one(tmp_path, runs)
    assert (plot.choose(load.cells)[0], load.chosen_on) == (best, "held-out" if vals[0] else "test")


def test_radii_are_compared_on_the_seeds_that_all_share(tmp_path):
    runs = [run(seed=s) for s in range(3)] + [run(0.1, s, a) for s, a in enumerate((0.91, 0.99, 0.99))]
    load = one(tmp_path, [*runs, run(0.2, 0, 0.92)])  # an interrupted sweep
    assert plot.choose(load.cells) == (0.2, [0.2]) and load.cells[0].shared == [0]
    assert "rho of [0.1, 0.2] chosen on shared seeds [0]" in draw(tmp_path).stdout


def test_s2_is_drawn_by_rho_beside_the_papers_bound(tmp_path):
    sharp = [{"lambda_max": 3.0, "s2": s2} for s2 in (40.0, 30.0, 20.0)]
    settings = {"schedule": "constant", "loss": "mse", "lr": 0.1}
    runs = [run(rho, extra={"sharpness": one}, **settings) for rho, one in zip((None, 0.01, 0.2), sharp)]
    (*_, largest, ax), _ = plot.Figures(read(tmp_path, runs)[0]).sharpness().columns[0]
    for a, rho in zip(largest.lines[-1].get_ydata(), (0, 0.01, 0.2)):
        assert math.isclose(a * (1 + rho * a), 2 / 0.1)
    measured, ring, bound = [line.get_ydata() for line in ax.lines]
    assert [*ring] == [30.0]  # both radii are equally good: the smaller one is taken
    assert [*measured] == [40.0, 30.0, 20.0]
    assert math.isclose(bound[0], 10) and math.isclose(bound[1], 0.008**-0.5) and math.isnan(bound[2])


def test_the_range_of_rho_is_within_one_paired_standard_error(tmp_path):
    scores = {0.05: (0.915, 0.91, 0.93), 0.1: (0.90, 0.92, 0.94), 0.2: (0.91, 0.93, 0.95), 0.5: (0.922, 0.91, 0.93)}
    # to 0.2, the best, 0.05 loses -0.5 2 2: 1.17 with an error of 0.83; 0.1 1 1 1; 0.5 -1.2 2 2: 0.93, an error of 1.07
    runs = [run(seed=s) for s in range(3)] + [
        run(rho, s, a) for rho, accs in scores.items() for s, a in enumerate(accs)
    ]
    assert plot.choose(one(tmp_path, runs).cells) == (0.2, [0.2, 0.5])


def test_one_rho_for_all_widths_is_best_in_the_mean(tmp_path):
    best = {"75-25": {0.1: 0.95, 0.2: 0.90, 0.5: 0.99}, "300-100": {0.1: 0.90, 0.2: 0.94, 0.05: 1.0}}
    runs = [run(acc=0.8, hidden=h) for h in best]
    load = one(tmp_path, runs + [run(rho, acc=a, hidden=h) for h, accs in best.items() for rho, a in accs.items()])
    assert plot.choose(load.cells)[0] == 0.1  # 92.5 against 92; the others aren't tried at both
    assert [values[0] for _, values in load.points("one rho")] == pytest.approx([15, 10])
    assert [values[0] for _, values in load.points("gain")] == pytest.approx([19, 20])


def test_rho_of_the_other_seeds(tmp_path):
    runs = [run(seed=s, acc=0.5) for s in range(2)]
    runs += [run(0.1, 0, 0.9), run(0.1, 1, 0.6), run(0.2, 0, 0.7), run(0.2, 1, 0.7)]
    (cell,) = one(tmp_path, runs).cells  # seed 0 would take 0.2, by seed 1, and seed 1 0.1
    assert [plot.choose([cell], without=seed)[0] for seed in (0, 1)] == [0.2, 0.1]
    text = plot.summary([one(tmp_path, runs)])
    header, _, row = (line.split(" | ") for line in text.splitlines()[-3:])
    mean, half = 15, 12.706 * 5  # 20 and 10: deviation 7.07 / sqrt(2)
    assert row[header.index("gain, rho of the other seeds")] == f"+{mean:.2f} ± {half:.2f} unresolved"
    assert "nan" not in text  # where nothing is held out


def test_the_trend_table_has_both_stopping_rules_and_both_optimizers(tmp_path):
    runs = []
    for seed in range(3):
        for hidden, last in (("75-25", 0.80), ("300-100", 0.70)):
            runs.append(run(seed=seed, acc=[0.8, last], val=[0.8, last], hidden=hidden))
            runs.append(run(0.1, seed, acc=[0.8, 0.85 + seed / 100], val=[0.8, 0.85], hidden=hidden))
    load = one(tmp_path, runs)
    decades = math.log10(266_610 / 61_035)
    means = {what: plot.interval(values)[0] for what, values in load.trends().items()}
    expected = {"gain": 10 / decades, "SGD": -10 / decades, "SAM": 0, "one rho": 10 / decades, "widest - narrowest": 10}
    expected |= {"mean gain": 11}  # (6 + 16) / 2: the gains at both widths
    assert means == pytest.approx(expected, abs=1e-9)
    assert plot.interval(load.trends("held-out")["SGD"])[0] == pytest.approx(0)
    assert "| MNIST, MLP, 2 epochs | best held-out epoch | 3 | 2 of 2 | 0.1 | " in plot.summary([load])
    assert "+10.00 ± 0.00 |" in plot.summary([load])


def test_the_gain_is_set_beside_the_one_at_less_noise(tmp_path):
    gains = {0.1: 0.09, 0.25: 0.01, 0.5: 0.03}  # paired by seed, with the next lower rate
    runs = [
        r
        for noise, gain in gains.items()
        for seed in range(3)
        for hidden in ("75-25", "300-100")
        for r in pair(gain * (1 + seed), noise=noise, seed=seed, hidden=hidden, acc=0.5)
    ]
    more = {load.noise: load.trends().get("mean gain - at less noise") for load in read(tmp_path, runs)[0]}
    assert more == {0.1: None, 0.25: pytest.approx({0: -8, 1: -16, 2: -24}), 0.5: pytest.approx({0: 2, 1: 4, 2: 6})}


def test_what_less_noise_has_is_taken_from_the_widths_that_both_have(tmp_path):
    gains = {0.25: (0.01, 0.01), 0.5: (0.01, 0.01, 0.1)}
    sweeps = [
        (noise, h, gain) for noise, all in gains.items() for h, gain in zip(("75-25", "300-100", "1200-400"), all)
    ]
    loads, _ = read(tmp_path, [r for noise, h, gain in sweeps for r in pair(gain, noise=noise, hidden=h, acc=0.5)])
    more = {load.noise: load.trends() for load in loads}[0.5]
    assert more["mean gain"] == pytest.approx({0: 4}) and more["mean gain - at less noise"] == pytest.approx({0: 0})


def test_an_interval_is_drawn_where_it_is_of_three_seeds_or_more():
    for values in ({0: 1, 1: 3, 2: 2}, {0: 1, 1: 3}):
        ax = plot.Figure().add_subplot()
        plot.draw(ax, [(1, values), (10, values)], *plot.LOOK["gain"])
        (low, high), (mean, half) = ax.get_ylim(), plot.interval(values)
        segments = [bar for bar in ax.collections[0].get_segments() if len(bar)]
        assert low < 1 and high > 3 and len(segments) == 2 * (len(values) > 2)
        assert all(bar[:, 1] == pytest.approx([mean - half, mean + half]) for bar in segments)


def test_the_summary_has_curvature_at_every_rho_with_its_interval(tmp_path):
    def sharp(hidden, rho, seed):
        return {"sharpness": {"lambda_max": {None: 20.0, 0.1: 4.0, 0.2: 3.0}[rho] + seed, "s2": 1.0}}

    tried = ("75-25", None), ("75-25", 0.1), ("300-100", None), ("300-100", 0.1), ("300-100", 0.2)
    runs = [run(rho, seed, hidden=h, extra=sharp(h, rho, seed)) for h, rho in tried for seed in (0, 1, 2)]
    half = 4.30265 * 3**-0.5  # of the 95% interval of three numbers of deviation 1
    rows = plot.summary(read(tmp_path, runs)[0]).split("rho is chosen")[1].strip().splitlines()[2:]
    head, _, *cells = [[text.strip() for text in row.strip("|").split("|")] for row in rows]
    narrow, wide = (dict(zip(head, cell)) for cell in cells)
    assert narrow["lambda_max at rho 0.2"] == "" and wide["lambda_max at rho 0.2"] == f"4.0 ± {half:.1f}"
    assert [cell["lambda_max at rho 0.1"] for cell in (narrow, wide)] == [f"5.0 ± {half:.1f}"] * 2
    assert [cell["SGD lambda_max"] for cell in (narrow, wide)] == [f"21.0 ± {half:.1f}"] * 2


def test_curvature_that_was_measured_in_some_runs_alone_is_drawn_and_told(tmp_path):
    sharp = {(None, 0): 20.0, (0.1, 0): 4.0, (0.2, 0): 3.0, (0.1, 1): 5.0}  # 0.3, which is best, was not measured
    runs = [run(rho, seed, acc=0.9 + (rho or 0) / 10) for rho in (None, 0.1, 0.2, 0.3) for seed in (0, 1)]
    for one in runs:
        key = one["config"]["rho"], one["config"]["seed"]
        one |= {"sharpness": {"lambda_max": sharp[key], "s2": 1.0}} if key in sharp else {}
    loads, _ = read(tmp_path, runs)
    (*_, ax, _), _ = plot.Figures(loads).sharpness().columns[0]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines] == [(0, 1, 2, 20, 4, 3)]
    assert "| lambda_max at rho 0.2 |" in plot.summary(loads)


@pytest.mark.parametrize(
    ("values", "text"),
    [((480, 580, 680), "580 ± 248"), ((0.01, 0.02, 0.03), "0.020 ± 0.025"), ((3, 3), "3"), ((2,), "2")],
)
def test_a_number_is_rounded_to_its_intervals_second_digit(values, text):  # half of it: 2.484 deviations
    assert plot.rounded(dict(enumerate(values))) == text


def test_where_targets_are_numbers_a_gain_is_in_test_loss(tmp_path):
    runs = [number_run(loss=1.3, val=1.0), number_run(0.1, loss=1.1, val=0.7), number_run(0.2, loss=1.0, val=0.8)]
    load = one(tmp_path, runs)
    assert load.metric == "loss" and plot.choose(load.cells)[0] == 0.1
    assert load.cells[0].values("gain")[0] == pytest.approx(0.2) and "+0.200" in plot.summary([load])
    (tmp_path / "b").mkdir()
    (cell,) = one(tmp_path / "b", [number_run(loss=1.3), number_run(0.1, loss=1.1), number_run(0.2, loss=1.0)]).cells
    assert plot.choose([cell])[0] == 0.2  # on test loss, where nothing is held out


def test_the_rate_is_fitted_before_float32_ends(tmp_path):
    losses = [3.0] + [2 * math.exp(-0.9 * e) for e in range(1, 18)] + [1e-8, 3e-8] * 6  # the first starts at random
    rows = [{"epoch": e, "lr": 0.1, "train_loss": x, "train_acc": 1, "test_loss": 1, "test_acc": 0.9}
            for e, x in enumerate(losses, start=1)]  # fmt: skip
    runs = [run(rho, history=rows, epochs=30, schedule="constant") for rho in (None, 0.1)]
    numbers = one(tmp_path, runs).cells[0].run.numbers
    assert numbers["rate"] == pytest.approx(-0.9) and numbers["R^2"] == pytest.approx(1)


def test_the_total_variation_of_a_slope(tmp_path):
    function = {"x": [0, 1, 2, 4], "y": [0, 1, 0, 4], "y_initial": [0, 0, 0, 0]}  # slopes 1 -1 2
    run_ = number_run(dataset="curve", hidden="10", extra={"function": function})
    numbers = one(tmp_path, [run_, run_ | {"config": run_["config"] | {"sam": True, "rho": 0.2}}]).cells[0].run.numbers
    assert numbers["bend of y"] == pytest.approx(5) and numbers["bend of y_initial"] == 0


def test_the_papers_values():
    settings, points = plot.PAPER["cifar10"]
    assert points.split()[2:4] == ["176402", ".66"] and settings["weight_decay"] == 5e-4 and settings["epochs"] == 200
    assert [len(points.split()) for _, points in plot.PAPER.values()] == [10, 14, 10, 20]


# What is paired with what


def test_the_data_folder_matters(tmp_path):
    loads, left = read(tmp_path, [run(acc=0.82, data_dir="data/mini"), run(acc=0.98), run(0.1, acc=0.985)])
    assert len(loads) == 1 and loads[0].cells[0].values("gain") == pytest.approx({0: 0.5})
    assert list(left.values()) == ["no run of SAM beside it"]


def test_of_one_run_with_two_results_neither_is_used(tmp_path):
    loads, left = read(tmp_path, [*pair(), run(0.1, acc=0.99, device="cuda")])
    assert not loads and sorted(path.name for path, why in left.items() if "differs" in why) == ["1.json", "2.json"]


def test_of_one_run_with_two_equal_results_one_is_used(tmp_path):
    sharp = run(0.1, acc=0.91, device="cuda", sharpness=9, extra={"sharpness": {"trace": 1.0, "lambda_max": 3.0}})
    loads, left = read(tmp_path, [*pair(), sharp])
    assert not left and loads[0].cells[0].values("SAM", "lambda_max") == {0: 3}


@pytest.mark.parametrize("key", ["processes", "lr", "val_size", "amp", "data_dir", "train_size", "optimizer", "loss"])
def test_runs_with_other_settings_are_not_paired(tmp_path, key):
    value = {"data_dir": "elsewhere", "optimizer": "adamw", "loss": "mse"}.get(key, 7)
    loads, left = read(tmp_path, [run(), run(0.1, **{key: value})])
    assert not loads and len(left) == 2


def test_where_a_run_happened_does_not_matter(tmp_path):
    load = one(tmp_path, [run(), run(0.1, device="cuda", results="r2", force=True, workers=4, sharpness=100)])
    assert len(load.cells) == 1


def test_a_flag_that_an_older_file_lacks_is_at_its_default(tmp_path):
    old = run()
    for key in ("loss", "schedule", "warmup", "perturb", "sharpness", "processes", "milestones"):
        del old["config"][key]
    assert one(tmp_path, [old, run(0.1, acc=0.92)]).cells[0].values("gain") == pytest.approx({0: 2})


def test_mlps_and_resnets_are_not_one_series(tmp_path):
    loads, _ = read(tmp_path, [*pair(), *pair(hidden=None, filters=16, script="resnet_width")])
    assert sorted(load.title for load in loads) == ["MNIST, MLP, 2 epochs", "MNIST, ResNet-18, 2 epochs"]


def test_two_folders_of_one_name_have_two_titles(tmp_path):
    loads, _ = read(tmp_path, [*pair(dataset="/a/birds"), *pair(dataset="/b/birds"), *pair(dataset="/x/cifar10-jpeg")])
    titles = [load.title for load in loads]
    assert (
        len(set(titles)) == 3
        and "CIFAR-10 (JPEG copy), MLP, 2 epochs" in titles
        and any("/a/birds" in t for t in titles)
    )


def test_a_title_names_what_is_not_the_papers(tmp_path):
    load = one(tmp_path, pair(epochs=100, loss="mse", schedule="constant", train_size=1000))
    assert load.title == "MNIST, MLP, mse loss, constant schedule, 1000 images"
    (tmp_path / "b").mkdir()
    teacher = [number_run(lr=0.01, momentum=0.0, weight_decay=0.0, epochs=100, rho=rho) for rho in (None, 0.1)]
    assert one(tmp_path / "b", teacher).title == "teacher, MLP"


def test_the_grids_edges_are_in_sight_where_all_widths_chose_one_rho(tmp_path):
    radii = [
        run(rho, acc=0.95 if rho == 0.2 else 0.9, hidden=h) for rho in (0.1, 0.2, 0.5) for h in ("75-25", "300-100")
    ]
    fig = plot.Figures([one(tmp_path, [run(hidden="75-25"), run(), *radii])]).rho()
    plot.finish(fig, "Caption.", tmp_path / "figure.png")
    low, high = fig.columns[0][0][1].get_ylim()
    assert low < 1 and high > 3


def test_accuracy_on_true_labels_is_drawn_where_labels_are_flipped(tmp_path):
    fig = plot.Figures(read(tmp_path, [*pair(), *pair(noise=0.5)])[0]).accuracy_by_width()
    assert [[ax.get_visible() for ax in axes] for axes, _ in fig.columns] == [[True, True, False], [True] * 3]


def test_the_grids_edges_are_each_widths_own(tmp_path):
    grids = {"75-25": (0.01, 0.02, 0.05), "300-100": (0.02, 0.05, 0.1)}
    radii = [run(rho, acc=0.91, hidden=h) for h, grid in grids.items() for rho in grid]
    (_, ax), _ = plot.Figures([one(tmp_path, [run(hidden=h) for h in grids] + radii)]).rho().columns[0]
    assert [[*line.get_ydata()] for line in ax.lines if line.get_linestyle() == "--"] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "figure, epochs, end",
    [("label_noise", (12, 12, 12), "1000\xa0images\nn=1: +0.00 (one seed)"), ("interpolation", (12, 24, 36), "images")],
)
def test_a_long_title_is_all_in_sight(tmp_path, figure, epochs, end):
    settings = {"script": "label_noise", "hidden": None, "batch_size": 32, "train_size": 1000}
    cells = [{"noise": p, "epochs": e, "filters": k} for p, e in zip((0.25, 0.5, 0.75), epochs) for k in (8, 16)]
    fig = getattr(plot.Figures(read(tmp_path, [r for c in cells for r in pair(**settings, **c)])[0]), figure)()
    plot.finish(fig, "Caption.", tmp_path / "figure.png")
    renderer = FigureCanvasAgg(fig).get_renderer()
    titles = [axes[0].title for axes, _ in fig.columns]
    boxes = [title.get_window_extent(renderer) for title in titles]
    assert len(titles) == 3 and all(end in title.get_text() for title in titles)
    assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    sight = fig.get_tightbbox(renderer)  # in inches: what the picture shows
    assert all(math.ceil(150 * b) <= a for a, b in zip(Image.open(tmp_path / "figure.png").size, sight.size))
    left, right, top = (fig.dpi * edge for edge in (sight.x0, sight.x1, sight.y1))
    assert all(left <= box.x0 and box.x1 <= right and box.y1 <= top for box in boxes)


def test_what_has_no_weight_decay_is_not_set_beside_itself(tmp_path):
    loads, _ = read(tmp_path, [number_run(rho=rho, weight_decay=0.0) for rho in (None, 0.1)])
    assert loads[0].points("gain") and not loads[0].points("no decay")
    assert not plot.Figures(loads).regularization().columns
    other = [number_run(rho=rho, weight_decay=decay) for rho in (None, 0.1) for decay in (0.0, 1e-3)]
    loads, _ = read(tmp_path / "both", other)  # 0 is the default here, so it stays in the main figures
    assert [load.role() for load in loads] == ["clean", "clean"]


def test_several_learning_rates_have_titles_of_their_own(tmp_path):
    loads, _ = read(tmp_path, [r for lr in (0.1, 0.05, 0.2) for r in pair(lr=lr)])
    assert sorted(load.title for load in loads) == ["MNIST, MLP, 2 epochs" + lr for lr in ("", ", lr 0.05", ", lr 0.2")]


def test_noise_rates_are_told_apart(tmp_path):
    loads, _ = read(tmp_path, [r for n in (0.004, 0.015, 0.024) for r in pair(script="label_noise", noise=n)])
    assert sorted(load.title for load in loads) == [
        f"MNIST, MLP, {n}% flipped, 2 epochs" for n in ("0.4", "1.5", "2.4")
    ]


def test_noise_rates_of_one_sweep_stand_side_by_side_and_share_their_axes(tmp_path):
    cells = [{"noise": noise, "train_size": n} for n in (2000, 4000) for noise in (0.05, 0.25, 0.5)]
    runs = [r for cell in cells for r in pair(script="label_noise", **cell)]
    columns = plot.Figures(read(tmp_path, runs)[0]).label_noise().columns
    assert [(load.settings["train_size"], load.noise) for _, load in columns] == [
        (size, noise) for size in (2000, 4000) for noise in (0.05, 0.25, 0.5)
    ]
    shared = [axes[0].get_shared_y_axes().joined(axes[0], columns[0][0][0]) for axes, _ in columns]
    assert shared == [True, True, True, False, False, False]


def test_own_noise_0_cells_stand_beside_the_clean_cells_of_other_widths(tmp_path):
    clean = [*pair(hidden="75-25"), *pair(hidden="600-200")]
    loads, left = read(tmp_path, [*clean, *pair(hidden="300-100", script="label_noise", noise=0.0)])
    assert [c.width for c in loads[0].cells] == ["75-25", "300-100", "600-200"] and len(loads) == 1 and not left


def test_widths_are_sorted_as_numbers(tmp_path):
    load = one(tmp_path, [r for h in ("1200-400", "75-25", "600-200") for r in pair(hidden=h)])
    assert [c.width for c in load.cells] == ["75-25", "600-200", "1200-400"]


def test_equal_layers_are_a_depth_not_a_width(tmp_path):
    params = {"300": 238_510, "300-300": 328_810, "300-300-300": 419_110}
    runs = [r for h, n in params.items() for r in pair(hidden=h, params=n)] + pair(hidden="75-25") + pair()
    loads, _ = read(tmp_path, runs)
    deep, wide = sorted(loads, key=lambda load: load.role() == "clean")
    assert [x for x, _ in deep.points("gain")] == [1, 2, 3] and deep.role() == "depth"
    assert [c.width for c in wide.cells] == ["75-25", "300-100"] and wide.title == "MNIST, MLP, 2 epochs"


def test_equal_layers_are_a_width_series_too(tmp_path):
    runs = [r for h in (100, 300, 1000) for r in pair(hidden=f"{h}-{h}", params=h * h)]
    (load,), _ = read(tmp_path, [*runs, *pair(hidden="300", params=238_510)][:-2])
    assert load.role() == "clean" and [c.width for c in load.cells] == ["100-100", "300-300", "1000-1000"]
    loads, _ = read(tmp_path, [*runs, *pair(hidden="300", params=238_510)])
    assert sorted((load.role(), len(load.cells)) for load in loads) == [("clean", 3), ("depth", 2)]


def test_one_layer_nets_are_a_width_series(tmp_path):
    runs = [r for h in (100, 400, 1000) for r in pair(hidden=str(h), params=102 * h + 1)]
    load = one(tmp_path, runs)
    assert load.role() == "clean" and len(load.cells) == 3


def test_sgd_at_twice_the_epochs_belongs_to_the_workload(tmp_path):
    loads, left = read(tmp_path, [*pair(), run(acc=0.905, epochs=4)])
    assert loads[0].points("twice")[0][1] == pytest.approx({0: 90.5}) and not left and len(loads) == 1
    assert "+0.50 (one seed) |\n" in plot.summary(loads)


def test_where_both_are_tuned_each_has_its_best_number_of_epochs(tmp_path):
    runs = []
    for seed in range(2):
        s = {"seed": seed, "noise": 0.5, "script": "label_noise"}
        runs += [
            run(acc=[0.7, 0.6], val=[0.7, 0.6], **s),
            run(acc=[0.85, 0.8, 0.8], val=[0.9, 0.8, 0.8], epochs=3, **s),
        ]
        runs += [run(0.1, acc=0.8, val=0.8, **s), run(0.2, acc=0.9, val=0.85, **s)]
        runs += [run(0.1, acc=0.86 + seed / 100, val=0.95, epochs=3, **s), run(0.2, acc=0.5, val=0.5, epochs=3, **s)]
        runs.append(run(acc=0.99, val=0.99, epochs=5, **s | {"seed": 9}))  # of a seed that SAM doesn't have
    loads, left = read(tmp_path, runs)
    short, long = sorted(loads, key=lambda load: load.settings["epochs"])
    assert not left and [load.role() for load in (short, long)] == ["short", "noisy"]
    for load in loads:  # SGD of 3 epochs, 85, and SAM of 3 epochs at rho 0.1, 86 and 87
        assert load.points("tuned")[0][1] == pytest.approx({0: 1, 1: 2})
        ((a, b), *_) = load.tuned(load.cells[0])
        assert (a.epochs, b.epochs, b.rho) == (3, 3, 0.1)
    assert short.points("gain", "held-out")[0][1] == pytest.approx({0: 20, 1: 20})
    text = plot.summary([long])
    assert "+1.50 ± 6.35 unresolved" in text and "| 3; 3, rho 0.1 |" in text
    assert not one(tmp_path / "alone", pair(val=0.5)).tuned(one(tmp_path / "alone", pair(val=0.5)).cells[0])


def test_numbers_of_epochs_are_compared_on_the_seeds_that_all_have(tmp_path):
    runs = [r for seed in range(3) for r in pair(seed=seed, val=0.8)]
    runs += [run(seed=seed, acc=0.91 + seed / 100, val=0.9, epochs=4) for seed in range(2)]
    load = one(tmp_path, [*runs, run(seed=7, acc=0.99, val=0.99, epochs=8)])  # SAM 91, SGD of 4 epochs 91 and 92
    assert plot.gains(load.tuned(load.cells[0]), "held-out") == pytest.approx({0: 0, 1: -1})
    apart = [run(seed=2, val=0.9, epochs=6), run(seed=0, val=0.9, epochs=8), *runs]
    load = one(tmp_path / "apart", apart)
    assert not load.tuned(load.cells[0])


def test_training_that_is_neither_the_papers_nor_the_longest_is_short(tmp_path):
    loads, _ = read(tmp_path, [r for epochs in (30, 100, 200) for r in pair(epochs=epochs)])
    assert {load.settings["epochs"]: load.role() for load in loads} == {30: "short", 100: "clean", 200: "clean"}


def test_pairs_without_weight_decay_and_partial_perturbations_belong_to_the_workload(tmp_path):
    runs = [
        *pair(),
        *pair(0.002, weight_decay=0.0),
        run(0.1, acc=0.93, perturb="rest"),
        run(0.1, acc=0.94, perturb="last"),
    ]
    loads, _ = read(tmp_path, runs)
    (load,) = [load for load in loads if load.role() == "clean"]
    gains = {what: load.points(what)[0][1][0] for what in ("gain", "no decay", "rest", "last")}
    assert (
        gains == pytest.approx({"gain": 1, "no decay": 0.2, "rest": 3, "last": 4})
        and load.title == "MNIST, MLP, 2 epochs"
    )
    assert sorted(load.role() for load in loads) == ["clean", "decay", "part", "part"]


def test_a_script_of_ones_own(tmp_path):
    runs = []
    for width, params in ((64, 1000), (128, 4000)):
        for optimizer in ("sgd", "adamw"):
            runs += pair(script="mine", hidden=None, d_model=width, params=params, optimizer=optimizer)
    for result in runs:
        del result["config"]["hidden"], result["config"]["filters"], result["config"]["epochs"]
        if result["config"]["optimizer"] == "sgd":  # files from before the flag
            del result["config"]["optimizer"]
    loads, left = read(tmp_path, runs)
    assert not left and len(loads) == 2 and [[c.width for c in load.cells] for load in loads] == [["1k", "4k"]] * 2
    assert not any(c.twice or len(c.lengths) > 1 for load in loads for c in load.cells)
    assert draw(tmp_path).returncode == 0


def test_a_script_of_ones_own_whose_runs_have_other_numbers_of_epochs(tmp_path):
    runs = [run(script="mine", epochs=3), run(0.1, script="mine", epochs=4)]
    for result in runs:
        del result["config"]["epochs"]
    loads, left = read(tmp_path, runs)
    assert not loads and sorted(path.name for path in left) == ["0.json", "1.json"]


def test_the_papers_points_are_drawn_where_the_settings_are_its_own(tmp_path):
    paper = {"epochs": 100, "val": 0.9}
    loads, _ = read(tmp_path, [*pair(**paper), *pair(**paper, lr=0.05), *pair(epochs=2)])
    assert [len(load.paper) for load in sorted(loads, key=lambda load: -len(load.paper))] == [5, 0, 0]
    assert not one(tmp_path / "warm", pair(**paper, warmup=5000)).paper
    assert not one(tmp_path / "shallow", pair(**paper, hidden="300", params=238_510)).paper
    resnet = {"script": "resnet_width", "hidden": None, "filters": 4, "epochs": 200, "weight_decay": 5e-4}
    (tmp_path / "b").mkdir()
    assert len(one(tmp_path / "b", pair(**resnet, dataset="/data/cifar10-jpeg", milestones=[0.5, 0.75])).paper) == 7


def test_sparse_networks_are_matched_by_their_non_zero_parameters(tmp_path):
    sparse = [r | {"num_nonzero": 61_500} for r in pair(0.03, script="sparsity", sparsity=0.77, pruner="snip")]
    sparser = [r | {"num_nonzero": 50_000} for r in pair(script="sparsity", sparsity=0.8, pruner="snip")]
    dense = [*pair(hidden="74-25", params=60_000, gain=0.02), *pair(hidden="75-25"), *pair(0.02)]
    loads, _ = read(tmp_path, [*dense, *sparse, *sparser])
    fig = plot.Figures(loads).sparsity()
    (bottom,) = [axes[2] for axes, _ in fig.columns]  # 61,500 weights: not beside the 60,000 of a third
    assert [list(line.get_ydata()) for line in bottom.lines if line.get_marker() == "D"] == [pytest.approx([2])]

    assert "| +2.00 (one seed) |" in plot.summary(loads)  # in points, in the table of the sparse networks too


def test_a_caption_gives_the_number_of_test_data(tmp_path):
    load = one(tmp_path, [result | {"num_test": 2500} for result in pair()])
    fig = plot.Figures([load]).gain_by_width()
    plot.finish(fig, "Caption.", tmp_path / "figure.png")
    assert "on these 2,500 test data" in fig.legends[0].get_title().get_text().replace("\n", " ")


def test_a_log_axis_has_plain_numbers(tmp_path, monkeypatch):
    save(tmp_path, pair(schedule="constant", epochs=6))  # of losses from 1 to 1/6
    drawn, finish = {}, plot.finish

    def keep(fig, caption, path):
        finish(fig, caption, path)
        drawn[path.stem] = fig

    monkeypatch.setattr(plot, "finish", keep)
    folders = "--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")
    monkeypatch.setattr(sys, "argv", ["plot.py", *folders])
    plot.main()
    ax = drawn["convergence"].axes[0]
    names = [label.get_text() for label in ax.get_yticklabels(which="both") if label.get_text()]
    assert ax.get_yscale() == "log" and len(names) > 2
    assert all(re.fullmatch(r"\$\\mathdefault{[\d.]+}\$", name) for name in names)


def test_each_line_is_whose_its_label_says(tmp_path):
    def figures(name, **settings):
        sgd, sam = run(acc=[0.5, 0.6], **settings), run(0.1, acc=[0.7, 0.9], **settings)
        for row in sam["history"]:
            row["train_loss"] /= 4
        return plot.Figures(read(tmp_path / name, [sgd, sam])[0])

    def y(ax, label):
        return next([*line.get_ydata()] for line in ax.lines if line.get_label() == label)

    noisy = figures("noisy", noise=0.5)
    (((gain, test, loss), _),) = noisy.curves().columns
    assert y(gain, "SAM - SGD, narrowest") == pytest.approx([20, 30])
    assert y(test, "SGD, narrowest") == pytest.approx([50, 60])
    assert y(test, "SAM, narrowest") == pytest.approx([70, 90])
    assert y(loss, "SAM, narrowest") == pytest.approx([0.25, 0.125])
    (((ax,), load),) = noisy.interpolation().columns
    assert (ax.lines[-1].get_xdata()[0], ax.lines[-1].get_ydata()[0]) == pytest.approx((80, 30))
    assert load.cells[0].values("SAM", "share") == pytest.approx({0: 20})
    (((sam, sgd, *_), _),) = figures("constant", schedule="constant").convergence().columns
    assert y(sam, "the only width") == pytest.approx([0.25, 0.125])
    assert y(sgd, "the only width") == pytest.approx([1, 0.5])


def test_a_curves_functions_are_in_the_colours_of_sgd_and_sam(tmp_path):
    curve = {"dataset": "curve", "hidden": "10", "params": 30, "epochs": 4, "schedule": "constant"}
    extras = [{"function": {"x": [0, 1, 2], "y": [0, y, 0]}} for y in (1, 2)]
    runs = [number_run(rho, extra=extra, **curve) for rho, extra in zip((None, 0.2), extras)]
    ((ax, *_), _) = plot.Figures(read(tmp_path, runs)[0]).functions().columns[0]
    drawn = {line.get_color(): [*line.get_ydata()] for line in ax.lines[:2]}
    assert drawn == {plot.SGD: [0, 1, 0], plot.SAM: [0, 2, 0]}


def test_no_frame_is_empty_where_one_curve_has_fewer_widths(tmp_path):
    extra = {"function": {"x": [0, 1, 2], "y": [0, 1, 0]}}
    widths = [("curve", h) for h in (10, 100, 1000)] + [("curve-scaled", h) for h in (10, 1000)]
    settings = [{"dataset": d, "hidden": str(h), "params": 3 * h, "epochs": 4} for d, h in widths]
    runs = [number_run(rho, extra=extra, **one) for one in settings for rho in (None, 0.2)]
    fig = plot.Figures(read(tmp_path, runs)[0]).functions()
    shown = {load.dataset: [ax.get_visible() for ax in axes] for axes, load in fig.columns}
    assert shown == {"curve": [True] * 5, "curve-scaled": [True, True, False, True, True]}


def test_pruner_and_sparsity_zero_are_dense(tmp_path):
    loads, left = read(tmp_path, [*pair(hidden="75-25"), *pair(script="sparsity", sparsity=0.0, pruner="snip")])
    assert len(loads) == 1 and len(loads[0].cells) == 2 and not left


def test_seeds_that_lack_the_widest_are_left_out_where_three_have_it():
    narrow = {seed: float(seed) for seed in range(5)}
    wide = {seed: seed + 2.0 for seed in range(3)}
    slopes, ends, _ = plot.trend([(10, narrow), (100, narrow), (1000, wide)])
    assert slopes == pytest.approx({0: 1, 1: 1, 2: 1}) and ends == pytest.approx({0: 2, 1: 2, 2: 2})
    assert plot.trend([(10, narrow), (100, narrow), (1000, wide), (10_000, {0: 9.0})])[0] == slopes
    slopes, ends, _ = plot.trend([(10, narrow), (100, narrow), (1000, {0: 5.0, 1: 5.0})])
    assert slopes == pytest.approx(dict.fromkeys(range(5), 0)) and len(ends) == 5


# What is left out is said


def test_a_radius_that_diverged_is_not_best_and_is_said(tmp_path):
    runs = [run(seed=0), run(seed=1), run(0.1, 0, 0.91), run(0.1, 1, 0.91), run(0.5, 0, 0.99)]
    loads, left = read(tmp_path, [*runs, run(0.5, 1, 0.99, status="diverged", history=[])])
    assert plot.choose(loads[0].cells)[0] == 0.1 and loads[0].cells[0].diverged == [0.5]
    assert {path.name: why for path, why in left.items()} == {
        "4.json": "SAM diverged at this rho, or no run of SGD beside it",
        "5.json": "diverged",
    }


def test_sgd_that_diverged_is_said_and_its_width_too(tmp_path):
    runs = [*pair(hidden="75-25"), run(status="diverged", history=[]), run(0.1)]
    loads, left = read(tmp_path, runs)
    assert [c.width for c in loads[0].cells] == ["75-25"]
    assert [left[path] for path in sorted(left)][0] == "diverged" and len(left) == 2
    done = draw(tmp_path)
    assert done.returncode == 0 and "2.json: left out, diverged" in done.stdout and "no run of SGD" in done.stdout


def test_seeds_and_widths_on_one_side_are_said(tmp_path):
    runs = [*pair(), run(seed=1), run(0.1, seed=2), run(hidden="75-25"), run(0.1, hidden="600-200")]
    loads, left = read(tmp_path, runs)
    assert [path.name for path in sorted(left)] == ["2.json", "3.json", "4.json", "5.json"]
    assert loads[0].cells[0].values("gain").keys() == {0}


def test_sgd_of_another_number_of_epochs_is_said_where_nothing_is_tuned(tmp_path):
    other = run(epochs=8)
    _, left = read(tmp_path / "test", [*pair(), other])
    assert [path.name for path in left] == ["2.json"]
    _, left = read(tmp_path / "held-out", [*pair(val=0.9), run(epochs=8, val=0.9)])
    assert not left


def test_radii_that_share_no_seed_with_the_others_are_said(tmp_path):
    save(tmp_path, [run(), run(seed=1), run(0.1), run(0.2, 1), run(0.3, 1)])
    assert "width 300-100: rho of [0.1] chosen on shared seeds [0]" in draw(tmp_path).stdout


def test_reading_a_radius_that_is_not_there_makes_none(tmp_path):
    (cell,) = one(tmp_path, pair()).cells
    assert cell.values("gain", rho=0.7) == {} and list(cell.sam) == [0.1]


BROKEN = {
    "torn": '{"config": {',
    "list": "[1, 2]",
    "empty": "",
    "older": '{"config": {}}',
    "deep": "[" * 100_000,
    "history": json.dumps(run(history=[])),
    "short": json.dumps(run(epochs=3, acc=[0.1, 0.2])),
    "nan": json.dumps(run(acc=math.nan)),
    "text": json.dumps(run(params="many")),
    "latin": "\xff",
    "seed": json.dumps(run(seed=[1])),
    "unscored": json.dumps(run(val=0.9) | {"history": [row | {"val_loss": 1} for row in run()["history"]]}),
}


def test_a_curve_without_its_function_and_held_out_data_without_their_score(tmp_path):
    function = {"x": [0, 1, 2], "y": [0, 1, 0]}
    curve = {"dataset": "curve", "hidden": "10", "params": 30, "epochs": 4}
    runs = [number_run(extra={"function": function}, **curve), number_run(0.2, **curve)]
    unscored = run(0.1, acc=0.95, hidden="75-25")
    unscored["config"]["val_size"] = 100
    save(tmp_path, [*runs, *pair(val=0.5), run(val=0.5, hidden="75-25"), unscored])
    done = draw(tmp_path)
    assert done.returncode == 0 and "5.json: left out, not a result file" in done.stdout
    assert {"functions.png", "gain_by_width.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}


def test_a_foreign_file_is_named_and_the_rest_is_drawn(tmp_path):
    save(tmp_path, [*pair(), *pair(hidden="75-25")])
    for name, text in BROKEN.items():
        (tmp_path / "results" / "mlp_width" / f"{name}.json").write_text(text, encoding="latin-1")
    (tmp_path / "results" / "mlp_width" / "folder.json").mkdir()
    done = draw(tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for name in [*BROKEN, "folder"]:
        assert f"{name}.json: left out, not a result file" in done.stdout
    assert (tmp_path / "figures" / "gain_by_width.png").exists()
    assert "torn.json" in (tmp_path / "figures" / "summary.md").read_text()


# Whole folders


def everything():
    """Every experiment in small, with three seeds and three widths."""
    runs, widths = [], ("75-25", "300-100", "1200-400")
    for seed in range(3):
        for i, hidden in enumerate(widths):
            s = {"seed": seed, "hidden": hidden, "val": 0.8}
            sharp = {"trace": 1.0, "lambda_max": 20.0 + i + seed, "s2": 9.0, "images": 10}
            runs += [run(acc=0.9, extra={"sharpness": sharp}, **s), run(acc=0.91, epochs=4, **s)]
            runs += [run(r, acc=0.9 + r * (i + 1) / 20, extra={"sharpness": sharp}, **s) for r in (0.1, 0.2)]
            runs += pair(weight_decay=0.0, **s)
            runs += [r for noise in (0.25, 0.5) for r in pair(0.02, noise=noise, script="label_noise", **s)]
            runs += [run(0.1, noise=0.5, script="label_noise", perturb=part, **s) for part in ("rest", "last")]
            runs += pair(schedule="constant", loss="mse", momentum=0.0, epochs=6, extra={"sharpness": sharp}, **s)
            sparse = pair(script="sparsity", sparsity=0.7, pruner="random", **s)
            runs += [r | {"num_nonzero": r["num_params"] // 4} for r in sparse]
        for hidden in ("300", "300-300", "300-300-300"):
            runs += pair(seed=seed, hidden=hidden, params=90_000 * len(hidden))
        for width in (10, 100, 1000):
            runs += [number_run(r, seed, 1.2, 1.2, hidden=str(width), params=102 * width + 1) for r in (None, 0.1)]
            function = {"x": list(range(5)), "y": [0, 1, 0, width, 2], "y_initial": [0, 2, 1, 3, 0]}
            s = {"hidden": str(width), "params": 3 * width, "schedule": "constant", "extra": {"function": function}}
            runs += [number_run(r, seed, 0.2, dataset="curve", **s) for r in (None, 0.2)]
    return runs


def test_every_figure_is_drawn_from_a_whole_folder(tmp_path):
    save(tmp_path, everything())
    done = draw(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    figures = "gain_by_width accuracy_by_width rho label_noise sparsity regularization interpolation curves functions"
    figures += " convergence sharpness layers depth"
    assert names == {"summary.md", *(f"{name}.png" for name in figures.split())} and "not drawn" not in done.stdout


def test_a_folder_with_a_missing_piece_is_drawn_and_said(tmp_path):
    runs = everything()
    missing = runs.pop(next(i for i, r in enumerate(runs) if r["config"].get("noise") == 0.5 and r["config"]["sam"]))
    assert missing["config"]["hidden"] == "75-25" and missing["config"]["seed"] == 0
    save(tmp_path, runs)
    done = draw(tmp_path)
    assert (
        done.returncode == 0
        and "| MNIST, MLP, 50% flipped, 2 epochs | last epoch | 3 | 2 of 3 |"
        in (tmp_path / "figures" / "summary.md").read_text()
    )


ODD = {
    "one seed": pair() + pair(hidden="75-25"),
    "one width": [r for seed in range(3) for r in pair(seed=seed)],
    "gaps between widths": [r for h in PARAMS for r in pair(hidden=h, seed=h == "150-50")],
    "several learning rates": [r for lr in (0.1, 0.2, 0.3, 0.4) for r in pair(lr=lr)],
    "30 widths": [r for i in range(1, 31) for r in pair(hidden=f"{30 * i}-{10 * i}", params=25_000 * i)],
    "20 radii": [run()] + [run(i / 20) for i in range(20)],
    "no radius in common": [*pair(rho=0.1), *pair(rho=0.2, hidden="75-25")],
    "radii without a common seed": [run(), run(seed=1), run(0.1), run(0.2, seed=1), run(0.3, seed=1)],
    "no drop of the rate": pair(schedule="cosine"),
    "one epoch": pair(epochs=1),
    "constant rate alone": pair(schedule="constant"),
    "seeds that are words": [*pair(seed="a"), *pair(seed="b"), *pair(seed=3)],
    "ASAM beside SAM": [*pair(), run(0.5, adaptive=True)],
    "last perturbed alone": [run(), run(0.1, perturb="last")],
    "pruned alone": pair(script="sparsity", sparsity=0.5, pruner="snip"),
    "flipped alone": pair(script="label_noise", noise=0.5),
    "all diverged but one": [*pair(), *(run(r, status="diverged", history=[]) for r in (1.0, 2.0))],
    "a NaN before it diverged": [*pair(), run(0.7, acc=math.nan, status="diverged")],
    "sharpness of SAM alone": [run(), run(0.1, extra={"sharpness": {"trace": 1.0, "lambda_max": 2.0}})],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders(tmp_path, name, monkeypatch, capsys):
    save(tmp_path, ODD[name])
    arguments = ["plot.py", "--results", str(tmp_path / "results"), "--figures", str(tmp_path / "figures")]
    monkeypatch.setattr(sys, "argv", arguments)
    plot.main()
    assert capsys.readouterr().err == "" and (tmp_path / "figures" / "summary.md").exists()
    for path in (tmp_path / "figures").glob("*.png"):
        assert max(Image.open(path).size) < 3000


def test_many_settings_give_a_picture_of_bounded_size_and_a_line_for_the_rest(tmp_path):
    save(tmp_path, [r for i in range(20) for r in pair(lr=0.01 * (i + 1))])
    done = draw(tmp_path)
    assert done.returncode == 0 and done.stdout.count("gain_by_width.png: no room for MNIST, MLP") == 8
    assert max(Image.open(tmp_path / "figures" / "gain_by_width.png").size) < 2500


@pytest.mark.parametrize("runs", [[], [run()], [run(0.1)], [run(0.1), run(0.2)], [run(seed=0), run(0.1, seed=1)]])
def test_where_nothing_can_be_drawn_is_one_line_and_status_2(tmp_path, runs):
    save(tmp_path, runs)
    done = draw(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--results" in done.stderr


@pytest.mark.parametrize("flags", [["--colour", "red"], ["--fig", "x"], ["--figures", "README.md"]])
def test_bad_flags_are_one_line_and_status_2(tmp_path, flags):
    save(tmp_path, pair())
    done = draw(tmp_path, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and flags[0] in done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    save(tmp_path, pair())
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "plot.py", "--results", tmp_path / "results", "--figures", tmp_path / "figures"]
    done = subprocess.run(command, cwd=ROOT, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "figures" / "summary.md").exists()

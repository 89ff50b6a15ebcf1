"""Draws the paper's figures, and summary.md, from result files alone: a PNG per claim, in seconds on any machine.

    python plot.py --results results --figures figures

A gain is SAM's test accuracy minus SGD's (SGD's test loss minus SAM's) at one seed, a trend its least-squares slope per
tenfold parameters. rho is chosen on held-out data, on test data where none are held out, at the epoch that is compared.
"""

import argparse
import contextlib
import json
import math
import os
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

SGD, SAM, GREY = "#0072B2", "#D55E00", "#8c8c8c"  # Okabe and Ito: told apart by the colour-blind and in print
# What is drawn by width: label, style, colour, of whom, and which settings of the workload are others
LOOK = {"SGD": ("SGD", "s-", SGD, "SGD", {}), "SAM": ("SAM", "o-", SAM, "SAM", {})}
LOOK |= {"twice": ("SGD, twice the epochs", "^:", SGD, "twice", {}), "paper": ("the paper", "x:", "black", "paper", {})}
LOOK |= {"gain": ("SAM - SGD", "D-", SAM, "gain", {}), "held-out": ("SAM - SGD, held-out epoch", "D:", SAM, "gain", {})}
LOOK["by its rule"] = "SAM - SGD, by the paper's rule", "x:", "#E69F00", "gain", {}
LOOK["one rho"] = "SAM - SGD, one rho for all", "s:", "#56B4E9", "gain", {}
LOOK["tuned"] = "SAM - SGD, epochs tuned", "v:", "#009E73", "tuned", {}
LOOK["no decay"] = "without weight decay", "s--", "black", "gain", {"weight_decay": 0.0}
LOOK["rest"] = "all but the last layer perturbed", "^:", "#CC79A7", "gain", {"perturb": "rest"}
LOOK["last"] = "the last layer alone perturbed", "v:", "#009E73", "gain", {"perturb": "last"}
LOOK["dense"] = "SAM - SGD, dense", "D:", "black", "gain", {"pruner": None}
MNIST = {"model": "MLP", "epochs": 100, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
MNIST |= {"noise": 0, "warmup": 0, "perturb": "all", "loss": "ce", "schedule": "step", "train_size": None}
MNIST |= {"shape": [0, -5], "adaptive": False, "pruner": None}
CIFAR = MNIST | {"model": "ResNet-18", "shape": [], "epochs": 200, "weight_decay": 5e-4}
IMAGENET = CIFAR | {"model": "ResNet-50", "epochs": 90, "batch_size": 512, "weight_decay": 1e-4}
IMAGENET |= {"schedule": "cosine", "warmup": 5000}
TEACHER = MNIST | {"shape": [0], "lr": 0.01, "momentum": 0, "weight_decay": 0, "loss": "mse"}  # lr 0.1 diverges here
PAPER = {  # settings; parameters and gains, in points (teacher: test loss), read off the paper's figures to about 0.01
    "mnist": (MNIST, "61035 .07 125810 .06 266610 .18 1426410 .19 5366010 .19"),
    "cifar10": (CIFAR, "44622 .36 176402 .66 701466 .44 2797610 .85 11173962 .96 44662922 1.23 178585866 1.01"),
    "imagenet": (IMAGENET, "1993976 .03 6917640 .04 14771992 .17 25557032 .35 39272760 .54"),
    "teacher": (TEACHER, "1e4 .026 2e4 .029 3e4 .034 4e4 .047 5e4 .056 6e4 .062 7e4 .063 8e4 .074 9e4 .08 1e5 .083"),
}
CURVE = np.arange(-5.5, 6) / 4 + 0.07, 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])  # its 12 points
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG copy)", "imagenet": "ImageNet"}
WORDS = {"acc": ("gain (points)", "test accuracy (%)", "training accuracy (%)", "acc")}  # by metric
WORDS |= {"loss": ("gain in test loss", "test loss", "training loss", "loss")}
STOPS = {"last": "last epoch", "held-out": "best held-out epoch", "paper": "best test epoch (the paper's)"}
DEFAULTS = dict.fromkeys(("hidden", "filters", "image_size", "train_size", "pruner"))  # of flags that a file may lack
DEFAULTS |= dict.fromkeys(("noise", "sparsity", "epochs", "val_size", "warmup", "weight_decay"), 0)
DEFAULTS |= dict.fromkeys(("adaptive", "amp", "compile", "fp32"), False) | {"depth": 18, "loss": "ce", "processes": 1}
DEFAULTS |= {"schedule": "step", "perturb": "all", "data_dir": "data"}
KNOWN = {*DEFAULTS, *MNIST, "dataset", "script", "shape"}  # others, at their default: as if not there
VARIED = {"hidden", "filters", "sparsity", "sam", "rho", "seed", "device", "results", "force", "workers", "sharpness"}
SCRIPTS = {"mlp_width", "resnet_width", "label_noise", "sparsity"}
T95 = math.nan, 12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.306, 2.26216  # Student's, seeds - 1
NAMED = {"epochs": "{} epochs", "train_size": "{} images", "batch_size": "batches of {}", "loss": "{} loss"}
NAMED["schedule"] = "{} schedule"  # in titles, where not the default
freeze = json.JSONEncoder(sort_keys=True, default=str).encode  # settings as a key


def interval(values):
    """Mean of {seed: value} and half the width of its 95% interval by Student's t, which is nan for one seed."""
    n, values = len(values), np.array([*values.values()], float)
    t = T95[n - 1] if n <= len(T95) else 1.95996 + 2.3722 / (n - 1) + 2.823 / (n - 1) ** 2 + 2.556 / (n - 1) ** 3
    return values.mean(), t * math.sqrt(((values - values.mean()) ** 2).sum() / max(n - 1, 1) / n)


def trend(points):
    """Of points (x, {seed: value}), by seed: least-squares slope per tenfold x, last minus first, mean; over the most x
    that three seeds or more share, or those that fewer share, as many as have two x in common."""
    seeds = sorted({s for _, v in points for s in v}, key=lambda s: (-sum(s in v for _, v in points), str(s)))
    whole = {
        n: [(math.log10(x), [v[s] for s in seeds[:n]]) for x, v in points if v.keys() >= {*seeds[:n]}]
        for n in range(len(seeds), 0, -1)
    }
    for n in sorted(whole, key=lambda n: -len(whole[n]) if n > 2 else 0):
        if len({x for x, _ in whole[n]}) > 1:
            x, values = map(np.array, zip(*whole[n]))
            return [dict(zip(seeds, n)) for n in (np.polyfit(x, values, 1)[0], values[-1] - values[0], values.mean(0))]
    return [{}, {}, {}]


class Run:  # A result file: settings (where it lacks a flag, the default), history as arrays, numbers by name
    def __init__(self, path):
        self.path, result = path, json.loads(path.read_bytes())
        config, rows, self.status = DEFAULTS | result["config"], result["history"], result["status"]
        config["epochs"] = config["epochs"] or max(len(rows), 1)  # a script of one's own may lack the flag
        if len(rows) != {"done": config["epochs"], "diverged": len(rows)}[self.status]:
            raise ValueError(f"{self.status}, but its history has {len(rows)} epochs")
        keys = [key for key in (rows or [{}])[0] if key not in ("epoch", "seconds")]
        arrays = np.array([[row[key] for key in keys] for row in rows], float).T
        self.history = {key: values * (100 if key.endswith("acc") else 1) for key, values in zip(keys, arrays)}
        self.seed, self.rho = config["seed"], float(config["rho"]) if config["sam"] else None
        self.params, sparsity, filters = int(result["num_params"]), float(config["sparsity"]), config["filters"]
        self.nonzero, self.tests = int(result.get("num_nonzero") or self.params), result.get("num_test", 0)
        self.layers = [int(h) for h in str(config["hidden"] or "").split("-") if h]
        self.width = str(config["hidden"] or filters or short(self.params))
        # layers in proportion, such as 75-25 and 3000-1000, are one shape at two widths
        shape = [round(3 * math.log2(h / self.layers[0])) for h in self.layers]
        usual = {"milestones": config.get("milestones")} | result.get("defaults", {})  # which older files lack
        silent = VARIED | {k for k, v in usual.items() if v == config.get(k) and k not in KNOWN}
        settings = {k: float(v) if type(v) is int else v for k, v in config.items() if k not in silent}
        settings["model"] = "MLP" if self.layers else f"ResNet-{config['depth']}" if filters else config["script"]
        settings["shape"], settings["script"] = shape, None if config["script"] in SCRIPTS else config["script"]
        settings["pruner"] = config["pruner"] if sparsity else None
        # a script with neither --hidden nor --filters sets its width by a number of its own
        own = [k for k, v in settings.items() if type(v) is float and not (shape or filters or k in KNOWN)]
        cell = self.width, self.params, sparsity, *map(settings.pop, sorted(own))
        self.key, self.epochs = (freeze(settings), cell, self.rho, self.seed), settings["epochs"]
        self.sgd = freeze(settings | {"epochs": None, "adaptive": False, "perturb": "all"}), cell  # as SGD's runs have
        self.function = {key: np.array(values, float) for key, values in (result.get("function") or {}).items()}
        # numbers: the test metric (% or loss) by stopping rule, last values and more; score: what rho is chosen by
        self.numbers = {k: float(v) for k, v in (result.get("sharpness") or {}).items() if v is not None}
        if self.status == "diverged":
            return
        history, numbers, curve, loss = self.history, self.numbers, self.function, self.history["train_loss"]
        if not all(np.isfinite(values).all() for values in history.values()):
            raise ValueError("done, but not all of its history is finite")
        self.metric, self.sign = ("acc", 1) if "test_acc" in history else ("loss", -1)
        test = self.sign * history[f"test_{self.metric}"]
        held = self.sign * history[f"val_{self.metric}"] if config["val_size"] else np.empty(0)
        ends = {"last": -1, "paper": test.argmax()} | ({"held-out": held.argmax()} if len(held) else {})
        self.score = {s: float((held if len(held) and s != "paper" else test)[end]) for s, end in ends.items()}
        numbers |= {key: float(values[-1]) for key, values in history.items()}
        numbers |= {stop: float(self.sign * test[end]) for stop, end in ends.items()}
        numbers["share"] = 100 * np.mean(history.get("last_layer_share", math.nan))
        bends = {key: np.diff(np.diff(y) / np.diff(curve["x"])) for key, y in curve.items() if key != "x"}
        numbers |= {f"bend of {key}": np.abs(bend).sum() for key, bend in bends.items()}  # the slope's total variation
        end = int(np.argmin([*(loss > 1e-7 * loss[0]), False]))  # below, a sum of float32 losses is rounding
        if config["schedule"] == "constant" and end > 3:  # without the first epoch, which starts at random weights
            fitted = np.arange(1, end), np.log(loss[1:end])
            numbers |= {"rate": np.polyfit(*fitted, 1)[0], "R^2": np.corrcoef(*fitted)[0, 1] ** 2}


class Cell:  # One network: SGD's runs by number of epochs and seed, one kind of SAM's by rho and seed
    def __init__(self, epochs, lengths, sam):
        sgd, self.twice, self.tried = lengths[epochs], lengths.get(2 * epochs, {}), sorted(sam)
        self.run = next(iter(sgd.values()))
        self.width, self.params, self.nonzero = self.same = self.run.width, self.run.params, self.run.nonzero
        self.sgd = {seed: run for seed, run in sgd.items() if any(seed in runs for runs in sam.values())}
        self.lengths = lengths | {epochs: self.sgd}
        self.diverged = [rho for rho in self.tried if any(run.status == "diverged" for run in sam[rho].values())]
        self.sam = {rho: {s: r for s, r in sam[rho].items() if s in sgd} for rho in sam if rho not in self.diverged}
        radii = sorted(self.sam, key=lambda rho: -len(self.sam[rho]))  # those that can be compared: that share seeds
        while radii and not (shared := set.intersection(*({*self.sam[rho]} for rho in radii))):
            radii.pop()
        self.radii, self.shared = sorted(radii), sorted(shared, key=str) if radii else []
        self.chosen = {stop: choose([self], stop) for stop in STOPS}
        self.curved = any(self.values("SAM", "lambda_max", rho) for rho in self.radii)  # its curvature was measured

    def pairs(self, rho=None, stop="last", twice=False):  # [(SGD's run, SAM's)] of each seed, at this rho or the best
        sam, sgd = self.sam.get(self.chosen[stop][0] if rho is None else rho, {}), self.twice if twice else self.sgd
        return [(sgd[seed], run) for seed, run in sam.items() if seed in sgd]

    def values(self, whose, number="last", rho=None):
        """{seed: number} of SGD, of SAM, of SGD at "twice" the epochs; or of SAM's gain over SGD."""
        pairs = self.pairs(rho, number if number in STOPS else "last")
        runs = self.twice.values() if whose == "twice" else [pair[whose == "SAM"] for pair in pairs]
        if whose == "gain":
            return gains(pairs, number)
        return {run.seed: run.numbers[number] for run in runs if math.isfinite(run.numbers.get(number, math.nan))}


def gains(pairs, number):  # SAM's over SGD, by seed
    return {a.seed: a.sign * (b.numbers[number] - a.numbers[number]) for a, b in pairs}


def minus(values, others):  # by seed
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def choose(cells, stop="last", without=None):
    """The rho best in the mean over the cells' shared seeds (nan: none is in all), and those within a paired error."""
    radii = sorted(set.intersection(*({*c.radii} for c in cells))) if all(stop in c.run.score for c in cells) else []
    runs = {rho: [c.sam[rho][seed] for c in cells for seed in c.shared if seed != without] for rho in radii}
    scores = {rho: np.array([run.score[stop] for run in runs[rho]]) for rho in radii}
    best = max(scores, key=lambda rho: scores[rho].mean(), default=math.nan)
    lost = {rho: scores[best] - score for rho, score in scores.items()}
    error = {rho: d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else 0 for rho, d in lost.items()}
    return best, [rho for rho in radii if lost[rho].mean() <= error[rho] + 1e-9]


class Workload:  # Cells that differ in width (sparsity, depth) alone; others: all workloads by frozen settings
    def __init__(self, settings, cells, others):
        self.settings, self.others, self.shape = settings, others, settings["shape"]
        self.deep, self.noise = isinstance(self.shape, str), settings["noise"]  # deep: by depth, not by width
        self.xlabel = "hidden layers" if self.deep else "non-zero parameters" if settings["pruner"] else "parameters"
        self.base, self.cells = freeze(settings | {"noise": 0}), sorted(cells, key=lambda c: (c.params, -c.nonzero))
        self.metric, self.chosen_on = cells[0].run.metric, "held-out" if "held-out" in cells[0].run.score else "test"
        self.dataset, name = str(settings["dataset"]), Path(str(settings["dataset"])).name
        parts = [NAMES.get(name.lower(), name), settings["model"], settings["pruner"], "ASAM" * settings["adaptive"]]
        parts += [self.shape if self.deep else "", f"{100 * self.noise:.4g}% flipped" * (self.noise > 0)]
        self.title = ", ".join(filter(None, [*parts, LOOK.get(settings["perturb"], [""])[0]]))
        paper, gains = PAPER.get(name.lower().replace("-jpeg", ""), (MNIST, ""))
        self.usual, own = DEFAULTS | paper, all(settings[key] == value for key, value in paper.items())
        self.paper = [(x, {0: y}) for x, y in np.array(gains.split(), float).reshape(-1, 2)] if own else []

    def find(self, **changes):  # the workload that differs in these settings alone
        return self.others.get(freeze(self.settings | changes))

    def role(self):  # to which figures it belongs
        roles = {"depth": self.deep, "part": self.settings["perturb"] != "all", "sparse": self.settings["pruner"]}
        roles |= {"curve": self.dataset.startswith("curve"), "constant": self.settings["schedule"] == "constant"}
        alike = [load for load in self.others.values() if load.find(weight_decay=0.0) is self]  # itself, too
        roles["decay"] = len(alike) > 1 and self.usual["weight_decay"] > 0
        longer = [n for n in self.cells[0].lengths if n > self.settings["epochs"] != self.usual["epochs"]]
        roles["short"] = any(self.find(epochs=n) for n in longer)
        return next((role for role, holds in roles.items() if holds), "noisy" if self.noise else "clean")

    def tuned(self, cell):
        """[(SGD's run, SAM's)]: each of the number of epochs, and SAM's of the rho, best at the held-out epoch; by the
        seeds that all of them share, or else none."""
        if len(cell.lengths) < 2 or "held-out" not in cell.run.score:
            return []
        alike = [c for n in cell.lengths if (load := self.find(epochs=n)) for c in load.cells if c.same == cell.same]
        every = [*cell.lengths.values()], [runs for c in alike for runs in c.sam.values()]
        mine = {*cell.shared}
        seeds = sorted(mine.intersection(*(runs for tried in every for runs in tried if runs.keys() & mine)), key=str)
        if not seeds:
            return []
        whole = [[[runs[seed] for seed in seeds] for runs in tried if runs.keys() >= {*seeds}] for tried in every]
        return [*zip(*(max(tried, key=lambda runs: np.mean([r.score["held-out"] for r in runs])) for tried in whole))]

    def points(self, what, number="last"):
        """[(x, {seed: number})] of what LOOK names; x: the number of parameters that are not pruned, or of layers."""
        *_, whose, changes = LOOK[what]
        number = {"by its rule": "paper", "held-out": what}.get(what, number)
        load, rho = self.find(**changes), choose(self.cells, number)[0] if what == "one rho" else None
        if whose == "tuned":
            return [(c.nonzero, gains(self.tuned(c), "held-out")) for c in self.cells]
        if whose == "paper" or not load or (changes and load is self):
            return self.paper if whose == "paper" else []
        return [(len(c.run.layers) if self.deep else c.nonzero, c.values(whose, number, rho)) for c in load.cells]

    def contrast(self, cell):  # the gain of a pruned network minus that of a dense one with as many weights left
        dense = self.find(pruner=None) if self.settings["pruner"] else None
        alike = [d for d in dense.cells if 0.95 < cell.nonzero / d.params < 1.05] if dense else []
        nearest = min(alike, key=lambda d: abs(d.params - cell.nonzero), default=None)
        return minus(cell.values("gain"), nearest.values("gain")) if nearest else {}

    def trends(self, stop="last"):
        """By seed: slopes per tenfold parameters; of the gain also widest - narrowest, its mean, and what that is above
        the one at the next lower noise rate; or {}."""
        if self.deep or self.settings["pruner"] or stop not in self.cells[0].run.score:
            return {}
        whats = ["gain", "SGD", "SAM", "one rho"] + ["tuned"] * (stop == "held-out")
        points = {what: self.points(what, stop) for what in whats}
        fitted = {what: trend(points[what]) for what in whats}
        found = {what: slopes for what, (slopes, *_) in fitted.items()} | {"widest - narrowest": fitted["gain"][1]}
        less = [load for load in self.others.values() if load.base == self.base and load.noise < self.noise]
        for what in whats[::4]:
            found[f"mean {what}"] = fitted[what][2]
            for theirs in [dict(load.points(what, stop)) for load in sorted(less, key=lambda load: load.noise)[-1:]]:
                both = [(x, minus(values, theirs[x])) for x, values in points[what] if x in theirs]
                found[f"mean {what} - at less noise"] = trend(both)[2]
        return found if found["gain"] else {}

    def say(self, values):  # mean and interval of a gain, and where it includes zero, that it does
        (mean, half), n = interval(values) if values else (0, 0), 2 if self.metric == "acc" else 3
        text = f"{round(mean, n) + 0:+.{n}f}" + (f" ± {half:.{n}f}" if len(values) > 1 else " (one seed)")
        return text + " unresolved" * bool(abs(mean) <= half) if values else ""


def workloads(folder):
    """The workloads of the result files below the folder, and {path: why} of those that are in none."""
    found, sgd, sam, cells, depths, loads, left = map(defaultdict, (list, dict, dict, list, list, dict, str))
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            run = Run(path)
            found[run.key].append(run)
        except Exception as error:  # a foreign file may be anything
            left[path] = f"not a result file ({type(error).__name__}: {error})"
    for (settings, _, rho, seed), twins in found.items():
        if len({(run.status, *run.history.get("test_loss", ())) for run in twins}) > 1:
            left |= {run.path: "another result of the same run differs" for run in twins}
            continue
        run = max(twins, key=lambda run: (len(run.numbers), run.numbers.get("images", 0)))
        if rho is not None:
            sam[settings, run.sgd, run.epochs].setdefault(rho, {})[seed] = run
        elif run.status == "done":
            sgd[run.sgd].setdefault(run.epochs, {})[seed] = run
    for (settings, base, epochs), radii in sam.items():
        if epochs in sgd[base] and (made := Cell(epochs, sgd[base], radii)).radii:
            cells[settings].append(made)
    for key, cell in [(key, c) for key, made in cells.items() for c in made if len({*c.run.layers}) == 1]:
        depths[freeze(json.loads(key) | {"shape": f"layers of {cell.run.layers[0]}"})].append(cell)
    depths = {key: made for key, made in depths.items() if len(made) > 1}  # a width and a depth; then the latter alone
    deep = sum(depths.values(), [])
    cells = {key: made for key, made in cells.items() if len(made) > 1 or made[0] not in deep} | depths
    loads |= {key: Workload(json.loads(key), made, loads) for key, made in cells.items()}
    used = set()
    for c in sum(cells.values(), []):  # other numbers of epochs: for tuning, which takes held-out data
        parts = *(c.lengths.values() if "held-out" in c.run.score else (c.sgd, c.twice)), *c.sam.values()
        used |= {run.key for runs in parts for run in runs.values()}
    for run in [twins[0] for key, twins in found.items() if key not in used]:
        why = "SAM diverged at this rho, or no run of SGD" if run.rho is not None else "no run of SAM"
        left.setdefault(run.path, "diverged" if run.status == "diverged" else f"{why} beside it")
    keys = {key for load in loads.values() for key in load.settings}
    for key in sorted(keys, key=lambda key: (key != "dataset", key in KNOWN, key)):
        titles = [title for title, _ in {(load.title, str(load.settings.get(key))) for load in loads.values()}]
        for load in loads.values():  # as few settings as tell the titles apart
            value = load.settings.get(key, default := load.usual.get(key, ""))
            if value != default and (titles.count(load.title) > 1 or key in NAMED and load.metric == "acc"):
                named = NAMED.get(key, key.replace("_", " ") + " {}")
                load.title += ", " + named.format(f"{value:g}" if type(value) is float else value)
    return sorted(loads.values(), key=lambda load: (load.role() != "clean", load.title)), left


def short(n):  # 61035 as 61k, 1426410 as 1.4M
    power = min(3, int(math.log10(n) / 3 + 1e-3))
    return f"{n / 1000**power:.{2 if n / 1000**power < 99.5 else 3}g}" + ("", "k", "M", "G")[power]


def bars(points):  # x, mean, half the interval, at points (x, {seed: value}); of two seeds it is too long to draw
    found = [(x, *interval(values), len(values)) for x, values in points]
    return zip(*[(x, mean, half if n > 2 else math.nan) for x, mean, half, n in found])


def draw(ax, points, label, style, color, *_):
    """A series: mean and interval at each point (x, {seed: value}); thin and grey, if it is solid, a line a seed."""
    points = [(x, values) for x, values in points if values]
    for seed in {s for _, values in points for s in values} if "-" in style else ():
        own = zip(*[(x, values.get(seed, math.nan)) for x, values in points])
        ax.plot(*own, ".-", color=GREY, linewidth=0.5, markersize=2.5, zorder=1, label="a seed")
    if points:
        look = {"color": color, "markerfacecolor": color if "-" in style else "white", "markersize": 4.5}
        ax.errorbar(*bars(points), fmt=style, label=label, elinewidth=1, **look)


def ticks(ax, names, log=True, **more):
    """Ticks {x: name} at what was used, named as far as there is room."""
    place, named = math.log if log else float, []
    room = 0.35 * ax.figure.dpi / ax.bbox.width * (place(max(names)) - place(min(names)))  # 0.35 inches
    for x in sorted(names, key=lambda x: x not in (min(names), max(names))):
        if all(abs(place(x) - place(other)) > room for other in named):
            named.append(x)
    ax.set(xscale="log" if log else "linear", **more)
    ax.set_xticks(named, [names[x] for x in named])
    ax.set_xticks([*names], [""] * len(names), minor=True)


def shade(load, c):  # a line's look by log parameters; up to 0.8 of viridis: no yellow on white
    first, last, own = (math.log(cell.params) for cell in (load.cells[0], load.cells[-1], c))
    at = (own - first) / (last - first) if first < last else 0.5
    names = {0: "narrowest", 1: "widest", 0.5: "the only width"}
    return {"color": matplotlib.colormaps["viridis"](0.8 * at), "label": names[at] if at in names else None}


def by_rho(ax, load, number):
    """A line a cell: means over the seeds that its radii share, evenly spaced from SGD (0) on; returns {rho: x}."""
    at = {rho: x for x, rho in enumerate(sorted({rho for c in load.cells for rho in c.tried}), start=1)}
    for c in load.cells:
        runs, best = {0: c.sgd} | {at[rho]: c.sam[rho] for rho in c.radii}, at[c.chosen["last"][0]]
        having = {x: [s for s in c.shared if number in runs[x][s].numbers] for x in runs}  # curvature: some alone
        seeds = [s for s in c.shared if all(s in own for own in having.values() if own)]
        points = {x: {s: runs[x][s].numbers[number] for s in seeds} for x in runs if having[x] and seeds}
        if points:
            ax.errorbar(*bars(points.items()), fmt=".-", linewidth=1, elinewidth=0.7, **shade(load, c))
        if best in points:
            ax.plot(best, interval(points[best])[0], "o", markerfacecolor="none", color=SAM, markersize=8)
    ticks(ax, {0: "SGD"} | {x: f"{rho:g}" for rho, x in at.items()}, log=False, xlabel="rho")
    return at


def by_epoch(ax, cell, i, key, start=0, **style):  # SGD's (i = 0) or SAM's (1) mean over seeds
    mean = np.mean([pair[i].history[key] for pair in cell.pairs()], axis=0)
    ax.plot(np.arange(start, len(mean)) + 1, mean[start:], linewidth=1, **style)
    ax.set(xscale="linear", xlabel="epoch", yscale="log" if key == "train_loss" else "linear")


def sheet(loads, *rows):
    """A column a workload, up to twelve in rows of four; a row: its name, what of LOOK, which number, or nothing."""
    shown = loads[:12]
    across, wide = {1: (1, 2.7), 2: (2, 1.75)}.get(len(shown), (3 if len(shown) in (3, 5, 6) else 4, 1.15))
    block = 0.65 + 1.75 * len(rows)  # inches: of a column, its title included
    down = math.ceil(len(shown) / across) or 1
    fig = Figure((across * (wide + 0.8), down * block))
    fig.columns, fig.left_out = [], loads[12:]
    grid = {"left": 0, "right": wide / (wide + 0.8), "bottom": 0.6 / block, "top": 1 - 0.65 / block}
    for load, part in zip(shown, fig.subfigures(down, across, squeeze=False).flat):
        axes = [*part.subplots(len(rows), squeeze=False, gridspec_kw=grid | {"hspace": 0.6 / 1.15}).flat]
        title = load.title.replace(" ", "\xa0").replace(",\xa0", ", ")  # to be broken at commas
        axes[0].set_title(textwrap.fill(title, int(15 * wide + 11)))
        for row, ax in zip(rows, axes):
            name, whats, number = (text.format(*WORDS[load.metric]) for text in (*row, *("", "", "last")[len(row) :]))
            series = {what: load.points(what, number) for what in whats.split(", ") if what}
            for what, points in series.items():
                draw(ax, points, *LOOK[what])
            ax.set_visible(not whats or any(values for points in series.values() for _, values in points))
            ax.set_yscale("log" if number in ("train_loss", "bend of y") else "linear")
            if row[0].startswith("{0}"):
                ax.axhline(0, color="black", linewidth=0.7, zorder=0)
                if series and (gain := load.trends(number if number in STOPS else "last").get("gain")):
                    ax.set_title(f"{ax.get_title()}\nn={len(gain)}: {load.say(gain)}".strip())
            ax.title.set_fontsize(7 if across > 2 else 8)
            used = sum(series.values(), load.points("SGD") + load.points("dense"))
            at = {x: x if load.deep else short(x) for x, _ in used}
            ticks(ax, at, not load.deep, xlabel=load.xlabel, ylabel=name)
        fig.columns.append((axes, load))
    return fig


def finish(fig, caption, path):
    """Below the axes the legend and the caption."""
    tests = " or ".join(f"{n:,} " for n in sorted({c.run.tests for _, load in fig.columns for c in load.cells} - {0}))
    tests = f", on these {tests}test data" * any(ax.get_ylabel().startswith(("gain", "test")) for ax in fig.axes)
    bars = f" Bars: 95% intervals (Student's t) over three seeds or more{tests}, pointwise."
    caption += bars * any(ax.containers for ax in fig.axes)
    caption += " n: seeds, the gain's slope per tenfold parameters." * any("n=" in ax.get_title() for ax in fig.axes)
    chosen_on = " or, where there are none, on ".join(sorted({load.chosen_on for _, load in fig.columns}))
    caption += f" rho is chosen on {chosen_on} data."
    width = fig.get_figwidth()
    keys = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    across = max(1, int(14 * width / (max(map(len, keys), default=0) + 6)))
    look = {"title": textwrap.fill(" ".join(caption.split()), int(17 * width)), "alignment": "left", "ncols": across}
    fig.legend(keys.values(), keys, loc="upper left", bbox_to_anchor=(-0.6 / width, 0), **look)
    fig.savefig(path, dpi=150, bbox_inches="tight")  # which has the legend and the caption, below the figure


GAINS = ("{0}, last", "one rho, gain"), ("{0}, held-out", "paper, by its rule, one rho, tuned, gain", "held-out")


class Figures(list):  # All workloads; a method draws a figure, its docstring is the caption: so add yours
    def of(self, *roles):
        return [load for load in self if load.role() in roles]

    def gain_by_width(self):
        """SAM's gain over SGD by width: after the last epoch, and where each run stops at its best held-out epoch;
        tuned: each has its best number of epochs. The paper's rule: best test epoch, and the rho best on test data. The
        paper's points: where the settings are its own (synthetic: but for rate, schedule; held-out data aside)."""
        return sheet(self.of("clean"), *GAINS)

    def label_noise(self):
        """SAM's gain over SGD by width and fraction of flipped labels: after the last epoch, and where each run stops
        at its best held-out epoch (held-out labels are clean); tuned: each has its best number of epochs. The paper's
        rule: best test epoch, and the rho best on test data."""
        order = sorted(self.of("clean", "noisy"), key=lambda load: (load.base, load.noise))
        fig = sheet([load for load in order if any(load.base == other.base for other in self.of("noisy"))], *GAINS)
        for (first, a), (second, b) in zip(fig.columns, fig.columns[1:]):
            for ax, other in zip(second, first) if a.base == b.base else ():
                ax.sharey(other)
                ax.autoscale(axis="y")
        return fig

    def accuracy_by_width(self):
        """SGD and SAM on test data, and SGD of twice the epochs, where it was run; below, on training data, where
        labels are flipped also by their originals. Dashed, synthetic data: the noise floor, and a constant's loss."""
        rows = ("{1}", "SGD, SAM, twice"), ("{2}", "SGD, SAM", "train_{3}")
        fig = sheet(self.of("clean", "noisy"), *rows, ("on true labels (%)", "SGD, SAM", "train_clean_acc"))
        for top in [axes[0] for axes, load in fig.columns if load.dataset == "teacher"]:
            top.hlines([1, 1.306], *top.get_xlim(), "black", "--", label="noise, a constant", linewidth=0.7)
        return fig

    def rho(self):
        """Test metric after the last epoch by rho, means over the seeds that all radii share; ringed: the chosen rho.
        Below, the chosen rho, the range of those within a paired standard error, and the grid's edges (dashed)."""
        fig = sheet(self.of("clean", "noisy"), ("{1}",), ("best rho",))
        for (top, bottom), load in fig.columns:
            at = by_rho(top, load, "last")
            for c, (best, alike) in [(c, c.chosen["last"]) for c in load.cells]:
                bottom.plot([c.params] * 2, [at[alike[0]], at[alike[-1]]], color="black", zorder=1)
                bottom.plot(c.params, at[best], "o", color=SAM)
            edges = [(at[c.tried[0]], at[c.tried[-1]]) for c in load.cells]
            bottom.plot([c.params for c in load.cells], edges, "--", color="black", linewidth=0.7)
            bottom.set_yticks([*at.values()], [f"{rho:g}" for rho in at], fontsize=9 if len(at) < 9 else 5)
        return fig

    def sparsity(self):
        """Networks pruned at initialization: gain by non-zero parameters (dotted: of dense networks). By those before
        pruning: SGD and SAM; the gain minus that of dense networks of as many non-zero ones (within 5%)."""
        fig = sheet(self.of("sparse"), ("{0}", "dense, gain"), ("{1}",), ("{0}, difference",))
        for (_, *below), load in fig.columns:
            draw(below[1], [(c.params, load.contrast(c)) for c in load.cells], "pruned - dense", "D-", "black")
            for what in ("SGD", "SAM"):
                draw(below[0], [(c.params, c.values(what)) for c in load.cells], *LOOK[what])
            for ax in below:
                ticks(ax, {c.params: short(c.params) for c in load.cells}, xlabel="parameters before pruning")
        return fig

    def regularization(self):
        """SAM's gain with weight decay (SAM - SGD) and without."""
        loads = [load for load in self.of("clean", "noisy", "short") if load.points("no decay")]
        return sheet(loads, ("{0}", "gain, no decay"))

    def interpolation(self):
        """SAM's gain against SGD's accuracy on the labels trained on, in its last epoch: a mark a seed and width."""
        fig = sheet([load for load in self.of("noisy") if load.metric == "acc"], ("",))
        for (ax,), load in fig.columns:
            for c in load.cells:
                sgd, gain = c.values("SGD", "train_acc"), c.values("gain")
                ax.plot([sgd[seed] for seed in gain], [*gain.values()], ".", clip_on=False, **shade(load, c))
            ticks(ax, {x: x for x in range(0, 101, 20)}, log=False, xlabel="SGD's accuracy (%)", ylabel="gain (points)")
        return fig

    def curves(self):
        """The narrowest network (dashed) and the widest over the epochs: paired gain, each seed in grey; test data,
        where labels are clean from the first drop of the rate on; training loss. Dotted: where the rate drops."""
        fig = sheet(self.of("clean", "noisy"), ("{0}",), ("{1}",), ("training loss",))
        for axes, load in fig.columns:
            rate, key = load.cells[0].run.history["lr"], f"test_{load.metric}"
            drops = np.flatnonzero((rate[1:] < rate[:-1] / 2) & (load.settings["schedule"] == "step")) + 1
            for cell, style, name in ((load.cells[0], "--", "narrowest"), (load.cells[-1], "-", "widest")):
                gains = np.array([a.sign * (b.history[key] - a.history[key]) for a, b in cell.pairs()]).T
                axes[0].plot(np.arange(len(rate)) + 1, gains, style, color=GREY, linewidth=0.4, label="a seed")
                axes[0].plot(np.arange(len(rate)) + 1, gains.mean(axis=1), style, color=SAM, label=f"SAM - SGD, {name}")
                for i, (what, color) in enumerate((("SGD", SGD), ("SAM", SAM))):
                    look = {"linestyle": style, "color": color, "label": f"{what}, {name}"}
                    by_epoch(axes[1], cell, i, key, 0 if load.noise or not len(drops) else drops[0], **look)
                    by_epoch(axes[2], cell, i, "train_loss", **look)
            for ax in axes:
                ticks(ax, {e: e for e in (1, *drops, len(rate))}, log=False, xlabel="epoch")
                ax.vlines(drops + 0.5, 0, 1, "black", ":", linewidth=0.7, zorder=1, transform=ax.get_xaxis_transform())
        return fig

    def functions(self):
        """One hidden layer on 12 points (black; scaled: smaller output weights). Functions of SGD (blue), SAM (orange)
        at up to four widths, as far as |f| < 5, a line a seed; total variation of the slope, sum of |f''|; loss."""
        loads = [load for load in self.of("curve") if load.cells[0].run.function]
        rows = [("",)] * min(4, max((len(load.cells) for load in loads), default=0))
        rows += ("sum of |f''|", "SGD, SAM", "bend of y"), ("training loss", "SGD, SAM", "train_loss")
        fig = sheet(loads, *rows)
        for (*axes, bend, _), load in fig.columns:
            shown = sorted({*np.linspace(0, len(load.cells) - 1, len(axes)).round().astype(int)})
            for ax, c in zip(axes, [load.cells[i] for i in shown]):
                for run in [run for run in sum(c.pairs(), ()) if "y" in run.function]:
                    y = np.where(abs(run.function["y"]) < 5, run.function["y"], math.nan)
                    ax.plot(run.function["x"], y, color=SGD if run.rho is None else SAM, linewidth=0.7)
                ax.plot(*CURVE, ".", color="black", markersize=4)
                ax.set(xscale="linear", xlabel="x", ylabel=f"width {c.width}", yticks=range(-4, 5, 2))
            for ax in axes[len(shown) :]:  # of a workload of fewer widths
                ax.set_visible(False)
            draw(bend, load.points("SGD", "bend of y_initial"), "at initialization", "^:", "black")
        return fig

    def convergence(self):
        """Training loss at a constant rate, a line a width (mean over seeds): SAM, SGD. Below, the slope of ln(loss)
        per epoch, and its R^2, from the second epoch until the loss is 1e-7 of the first, where float32 ends."""
        rows = ("loss of SAM",), ("loss of SGD",), *[(name, "SGD, SAM", name) for name in ("rate", "R^2")]
        fig = sheet(self.of("constant"), *rows)
        for axes, load in fig.columns:
            axes[0].sharey(axes[1])
            for c, i in [(c, i) for c in load.cells for i in (0, 1)]:
                by_epoch(axes[1 - i], c, i, "train_loss", **shade(load, c))
        return fig

    def sharpness(self):
        """Largest eigenvalue of the Hessian on some training images, its non-uniformity s2, training loss; by rho.
        Dashed: the paper's bounds (squared loss, constant rate; un-normalized SAM at batch 1, so references only)."""
        loads = [load for load in self if any(c.curved for c in load.cells)]
        rows = ("largest\neigenvalue", "lambda_max"), ("s2", "s2"), ("training loss", "train_loss")
        fig = sheet(loads, *[(name, "SGD, SAM", key) for name, key in rows], *[(name,) for name, _ in rows[:2]])
        for (_, _, _, *below), load in fig.columns:
            at = [by_rho(ax, load, key) for ax, key in zip(below, ("lambda_max", "s2"))][0]
            if load.settings["schedule"] == "constant" and load.settings["loss"] == "mse":
                eta, rhos = load.settings["lr"], (0, *at)
                sharp = [4 / eta / (1 + math.sqrt(1 + 8 * rho / eta)) for rho in rhos]
                spread = [(eta * (eta - 2 * rho)) ** -0.5 if 2 * rho < eta else math.nan for rho in rhos]
                for ax, bound in zip(below, (sharp, spread)):
                    ax.plot([0, *at.values()], bound, "--", color="black", label="bounds")
        return fig

    def layers(self):
        """The last layer's share of |g|^2 as SAM perturbs, mean over epochs; gain of perturbing all, or a part."""
        parts = [load for load in self.of("clean", "noisy") if load.points("rest") or load.points("last")]
        return sheet(parts, ("last layer's\nshare (%)", "SAM", "share"), ("{0}", "gain, rest, last"))

    def depth(self):
        """Gain, and SGD and SAM, by the number of hidden layers of one width."""
        return sheet(self.of("depth"), ("{0}", "gain, held-out"), ("{1}", "SGD, SAM"))


def table(rows):  # Markdown, of dicts, without the keys that are empty in all
    keys = dict.fromkeys(key for row in rows for key in row if row[key] != "")
    lines = keys, ["---"] * len(keys), *([row.get(key, "") for key in keys] for row in rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def rounded(values):  # mean and interval to the interval's second digit
    mean, half = interval(values)
    if not half > 0:  # one seed, or all alike
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def summary(loads):  # Markdown: the trends, and a table for each workload
    trends, text = [], ""
    for load in loads:
        for stop, slopes in [(stop, slopes) for stop in STOPS if (slopes := load.trends(stop))]:
            whole = [values for _, values in load.points("gain", stop) if values.keys() >= slopes["gain"].keys()]
            row = {"workload": load.title, "epoch": STOPS[stop], "seeds": len(slopes["gain"])}
            row |= {"widths": f"{len(whole)} of {len(load.cells)}", "that rho": f"{choose(load.cells, stop)[0]:g}"}
            trends.append(row | {what: load.say(values) for what, values in slopes.items()})
        rows = []
        for c in load.cells:
            best, alike = c.chosen["last"]
            edge = ", the grid's edge" * (len(c.tried) > 1 and best in (c.tried[0], c.tried[-1]))
            row = {"width": c.width, "parameters": f"{c.params:,}", "non-zero": f"{c.nonzero:,}"}
            row |= {"seeds": len(c.pairs()), "rho": f"{best:g}{edge}", "as good": f"{alike[0]:g} to {alike[-1]:g}"}
            stops = [stop for stop in ("held-out", "paper") if stop in c.run.score]
            row |= {f"rho, {STOPS[stop]}": f"{c.chosen[stop][0]:g}" for stop in stops}
            row["tuned"] = "".join(f"{a.epochs:g}; {b.epochs:g}, rho {b.rho:g}" for a, b in load.tuned(c)[:1])
            numbers = "last paper train_acc train_loss lambda_max s2 trace rate R^2 share".split() + ["bend of y"]
            found = {f"{who} {number}": c.values(who, number) for number in numbers for who in ("SGD", "SAM")}
            curved = ("lambda_max", "s2", "train_loss") if c.curved else ()
            found |= {f"{name} at rho {rho:g}": c.values("SAM", name, rho) for name in curved for rho in c.tried}
            row |= {name: rounded(values) for name, values in found.items() if values}
            shown = {"gain": c.values("gain")} | {f"gain at rho {rho:g}": c.values("gain", rho=rho) for rho in c.radii}
            others = {seed: choose([c], without=seed)[0] for seed in c.shared if len(c.shared) > 1}
            shown["gain, rho of the other seeds"] = {s: c.values("gain", rho=rho)[s] for s, rho in others.items()}
            shown |= {f"gain, {STOPS[stop]}": c.values("gain", stop) for stop in ("held-out", "paper")}
            shown |= {f"gain over twice the epochs, {STOPS[s]}": gains(c.pairs(None, s, True), s) for s in STOPS}
            shown["tuned gain"] = gains(load.tuned(c), "held-out")
            shown["gain - that of dense networks of as many"] = load.contrast(c)
            rows.append(row | {name: load.say(values) for name, values in shown.items()})
        text += f"\n## {load.title}\n\nrho is chosen on {load.chosen_on} data.\n\n{table(rows)}"
    return f"""# Trends

Slopes per tenfold parameters, SGD's and SAM's of their test metric; ±: half a 95% interval over seeds on these test
data, unresolved if it includes zero. `tuned`: SGD and SAM each at the number of epochs that is best on held-out
data. `as good`: radii within a paired error of the best; `last`, `paper`: last, best test epoch; `rate`, `R^2`: of
ln(training loss) by epoch; `bend of y`: sum of |f''|; `share`: last layer's, of |g|^2.

{table(trends)}{text}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default="results", help="where the scripts put their results (default: results)")
    parser.add_argument("--figures", type=Path, default="figures", help="where the figures go (default: figures)")
    parser.allow_abbrev, parser.error = False, lambda message: parser.exit(2, f"plot.py: {message}\n")
    args = parser.parse_args()
    matplotlib.rcParams |= {"font.size": 8, "grid.alpha": 0.25, "legend.frameon": False, "axes.grid": True}
    matplotlib.rcParams |= {"axes.formatter.useoffset": False, "axes.ymargin": 0.25}
    matplotlib.rcParams |= {"axes.formatter.min_exponent": 4}  # on log axes: 0.2, which is shorter than 2 x 10^-1
    loads, left = workloads(args.results)
    if not loads:
        parser.error(f"--results {args.results}: no run of SAM has one of SGD at the same seed; run a script first")
    try:
        args.figures.mkdir(parents=True, exist_ok=True)
        lines = [f"{path}: left out, {why}" for path, why in left.items()]
        shy = [(a, c) for a in loads for c in a.cells if any({*runs} != {*c.shared} for runs in c.sam.values())]
        lines += [f"{a.title}, width {c.width}: rho of {c.radii} chosen on shared seeds {c.shared}" for a, c in shy]
        for figure in [figure for name, figure in vars(Figures).items() if not name.startswith("_") and figure.__doc__]:
            fig, name = figure(Figures(loads)), f"{figure.__name__}.png"
            lines += [f"{name}: no room for {load.title}" for load in fig.left_out]
            lines += [] if fig.columns else [f"{name}: not drawn, no results for it"]
            if fig.columns:
                finish(fig, figure.__doc__, args.figures / name)
        text = f"{summary(loads)}\n## Left out\n\n" + "".join(f"- {line}\n" for line in lines)
        (args.figures / "summary.md").write_text(text, encoding="utf-8")
    except OSError as error:
        parser.error(f"--figures {args.figures}: cannot be written to ({error.strerror}); name another folder")
    with contextlib.suppress(BrokenPipeError):  # where nobody reads on
        os.write(1, "".join(f"{line}\n" for line in [*lines, f"{args.figures}: figures and summary.md"]).encode())


if __name__ == "__main__":
    main()

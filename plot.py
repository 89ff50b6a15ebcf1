"""Draws the figures and writes summary.md and summary.csv, from result files alone.

    python plot.py --results results --figures figures

A figure is a function, listed in FIGURES; its docstring is its caption in summary.md. The chapters: reading runs;
statistics; pairing; SGD and SAM at their best settings; the numbers of summary.csv; drawing; figures; summary; main.
"""

import argparse
import contextlib
import copy
import csv
import functools
import json
import math
import os
import textwrap
from collections import Counter, namedtuple
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell may name one that is not installed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import FixedLocator  # noqa: E402

DEFINITIONS = """\
A sweep is a set of runs that differ in width, SGD or SAM, rho and seed alone; its title prints the epochs,
and whatever else is not at its default.
MLP 3:1 are two hidden layers, the first three times as wide as the second, such as 300-100.
A score is larger where it is better: test accuracy in per cent, or minus the test loss where targets are numbers.
A gain is SAM's score minus SGD's at the same seed. A slope is per tenfold parameters, in a sweep by depth per layer.
An interval is 95%, by Student's t over seeds.

A rule says at which epoch a run stops. There its test score is taken, and there rho is chosen for each width: by the
score on held-out data, of equals the smallest. Where none are held out, all choices are by test data.
- last: the last epoch
- held-out: each run's best held-out epoch, the first of equals; a sweep that holds none out lacks this rule
- paper: each run's best test epoch; here rho, too, is chosen on test data
- tuned: as held-out, with the number of epochs that is best for each optimizer and width
- fresh: as tuned, with the rate and decay that are best, too; chosen on some seeds and scored on others
"""

# ======================================================================================================================
# Reading runs
# ======================================================================================================================

# Flags that tell no sweeps apart: what varies within a sweep or is in the model's name; where and how a run happened.
NOT_SETTINGS = {"hidden", "filters", "depth", "width", "sparsity", "sam", "rho", "seed", "script", "sharpness"}
NOT_SETTINGS |= {"device", "workers", "results", "force", "save"}
TRAINING = {"lr", "weight_decay", "momentum", "schedule", "warmup", "loss"}
UNITS = {"train_size": "images", "val_size": "held out"}  # what titles call them

Tuning = namedtuple("Tuning", "optimizer, epochs, rho, lr, weight_decay")


class Run:
    """What one result file says. Accuracies are in per cent; test and held_out are scores by epoch."""

    def __init__(self, path):
        result = json.loads(path.read_bytes())
        config = result["config"]
        config.setdefault("epochs", len(result["history"]))  # scripts of one's own may lack the flag

        self.path = path
        self.seed = int(config["seed"])
        self.sam = bool(config["sam"])
        self.rho = float(config["rho"]) if self.sam else 0.0
        self.lr = config.get("lr", 0)
        self.weight_decay = config.get("weight_decay", 0)
        self.sparsity = float(config.get("sparsity") or 0)
        self.params = int(result["num_params"])
        self.nonzero = int(result.get("num_nonzero") or self.params)
        self.function = result.get("function")
        self.set_model(config, result.get("width"))
        self.set_settings(config, result["defaults"])
        self.set_history(config, result)

    def set_model(self, config, own_width):
        """The width, and the models whose sweeps it belongs to: equal layers make one by width and one by depth."""
        self.layers = []
        if own_width is not None:  # a script of one's own
            self.width = str(own_width)
            self.models = [str(config["script"])]
        elif config.get("filters"):
            self.width = str(config["filters"])
            self.models = [f"ResNet-{config.get('depth', 18)}"]
        elif config.get("hidden"):
            self.width = config["hidden"]
            self.layers = [int(units) for units in self.width.split("-")]
            ratios = [round(2 * units / min(self.layers)) / 2 for units in self.layers]  # 75-25 and 300-100: 3:1
            self.models = ["MLP " + ":".join(f"{ratio:g}" for ratio in ratios)]
            if len(self.layers) == 1:
                self.models = ["MLP of one layer"]
            if len(set(self.layers)) == 1:
                self.models.append(f"MLP of layers of {self.layers[0]}")
        else:
            raise ValueError("has no hidden, no filters and no width")

    def set_settings(self, config, defaults):
        """Data set, noise and pruner, and every other flag that is not at its default."""
        self.settings = {
            "dataset": os.path.normpath(config["dataset"]),
            "noise": float(config.get("noise") or 0),
            "pruner": config.get("pruner") if self.sparsity else None,
        }
        for key in sorted(config.keys() - self.settings.keys() - NOT_SETTINGS):
            value = config[key]
            default = defaults.get(key)
            if key == "data_dir":  # ./data/mini and data/mini are one
                value = os.path.normpath(value)
                default = os.path.normpath(str(default))
            if value != default:
                self.settings[key] = tuple(value) if isinstance(value, list) else value
        self.network_key = (self.params, -self.nonzero, self.width, self.sparsity)  # sorts by size, dense ones first
        self.key = (frozenset(self.settings.items()), self.network_key, self.sam, self.rho, self.seed)

    def set_history(self, config, result):
        self.status = result["status"]
        if self.status not in ("done", "diverged"):
            raise ValueError(f"its status is {self.status}")
        rows = result["history"]
        self.epochs = config["epochs"]
        self.optimizer = "SAM" if self.sam else "SGD"
        self.tuning = Tuning(self.optimizer, self.epochs, self.rho, self.lr, self.weight_decay)
        self.history = {}
        for key in rows[0].keys() - {"epoch", "seconds"} if rows else []:
            values = np.array([row[key] for row in rows], float)
            self.history[key] = 100 * values if key.endswith("acc") else values
        self.final = {}
        if self.status == "diverged":
            return

        if len(rows) != self.epochs:
            raise ValueError(f"done, but its history has {len(rows)} epochs of {self.epochs}")
        if not all(np.isfinite(values).all() for values in self.history.values()):
            raise ValueError("done, but not all of its history is finite")
        self.metric = "acc" if "test_acc" in self.history else "loss"
        sign = 1 if self.metric == "acc" else -1
        self.test = sign * self.history[f"test_{self.metric}"]
        self.held_out = self.test
        self.stops = {"last": len(rows) - 1}  # {rule: index of the epoch}; `tuned` and `fresh` choose among runs
        if config.get("val_size"):
            self.held_out = sign * self.history[f"val_{self.metric}"]
            self.stops["held-out"] = int(self.held_out.argmax())
        self.stops["paper"] = int(self.test.argmax())

        loss = self.history["train_loss"]
        self.collapsed = loss[-1] > 0.99 * loss[0] and len(loss) > 1  # has learned nothing
        self.final = {key: float(values[-1]) for key, values in self.history.items()}
        for key, value in (result.get("sharpness") or {}).items():
            if value is not None:
                self.final[key] = float(value)
        if "last_layer_share" in self.history:
            self.final["last_layer_share"] = 100 * self.history["last_layer_share"].mean()
        if config.get("schedule") == "constant":
            self.final.update(exponential_fit(loss))
        if self.function:
            self.final["variation"] = variation_of_slope(self.function["x"], self.function["y"])

    def score(self, rule):
        """The test score where the rule stops."""
        return float(self.test[self.stops[rule]])

    def choice(self, rule):
        """The score by which rho is chosen: on held-out data; on test data where there are none, and by the paper."""
        scores = self.test if rule == "paper" else self.held_out
        return float(scores[self.stops[rule]])


def read_runs(folder):
    """The runs below the folder, and lines about files that can't be used. Two files that disagree end the program."""
    runs = {}
    notes = []
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            run = Run(path)
        except Exception as error:  # a foreign file may hold anything
            notes.append(f"{path}: left out, not a result file ({type(error).__name__}: {error})")
            continue
        known = runs.setdefault(run.key, run)
        if known is not run:
            runs[run.key] = choose_file(known, run)
    return list(runs.values()), notes


def choose_file(one, other):
    """Of two files of one run the one that measured its sharpness on more images."""
    losses = [run.history.get("test_loss", ()) for run in (one, other)]
    if one.status != other.status or not np.array_equal(*losses, equal_nan=True):
        fail(f"{one.path} and {other.path} are different results of the same run; remove one of them")
    return max(one, other, key=lambda run: run.final.get("images", 0))  # of equals the first


def fail(message):
    """Ends the program with one line and status 2."""
    os.write(2, f"plot.py: {message}\n".encode(errors="surrogateescape"))
    raise SystemExit(2)


# ======================================================================================================================
# Statistics
# ======================================================================================================================


@functools.cache
def student_t(freedom):
    """The t between whose negative and itself lie 95% of Student's distribution, by integrating its density."""
    t = np.linspace(0, 13, 100_001)
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(scale - (freedom + 1) / 2 * np.log1p(t * t / freedom))
    below = np.cumsum(density[1:] + density[:-1]) * (t[1] - t[0]) / 2
    return float(np.interp(0.475, below, t[1:]))


def interval(values):
    """Mean of {seed: value}, half the width of its 95% interval (nan of one seed), number of seeds."""
    values = np.array(list(values.values()), float)
    n = len(values)
    half = student_t(n - 1) * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(values.mean()), half, n


def difference(values, others):
    """values - others, by seed."""
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def common_seeds(points):
    """The seeds on which a trend over points (x, {seed: value}) is computed.

    Ranks the seeds by how many x have them, and returns of the first n in this order, n >= 3, those that are all at the
    most x; where no three seeds have two x in common, two seeds, or one.
    """
    count = Counter()
    for _, values in points:
        count.update(values.keys())
    ranked = sorted(count, key=lambda seed: (-count[seed], seed))

    seeds = []
    most = 1
    for n in range(len(ranked), 0, -1):
        if n == 2 and seeds:
            break
        shared = {x for x, values in points if values.keys() >= set(ranked[:n])}
        if len(shared) > most:
            most = len(shared)
            seeds = ranked[:n]
    return seeds


def trend(points):
    """Of points (x, {seed: value}), by seed: the least-squares slope over x, and the mean."""
    seeds = common_seeds(points)
    if not seeds:
        return {}, {}
    complete = [(x, values) for x, values in points if values.keys() >= set(seeds)]
    x = [x for x, _ in complete]
    y = np.array([[values[seed] for seed in seeds] for _, values in complete])
    slopes = np.polyfit(x, y, 1)[0]
    return dict(zip(seeds, slopes)), dict(zip(seeds, y.mean(axis=0)))


def straight_line(x, y):
    """Slope of y over x, and R^2."""
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1] ** 2)


def exponential_fit(loss):
    """Slope of ln(loss) per epoch and R^2, from the second epoch until float32 ends, at 1e-7 of the first loss."""
    ends = np.flatnonzero(loss <= 1e-7 * loss[0])
    end = int(ends[0]) if len(ends) else len(loss)
    if end < 4 or np.ptp(loss[1:end]) == 0:
        return {}
    slope, r2 = straight_line(np.arange(1, end), np.log(loss[1:end]))
    return {"rate": slope, "rate_r2": r2}


def variation_of_slope(x, y):
    """Sum of |f''|: the total variation of the slope of a function on a grid."""
    return float(np.abs(np.diff(np.diff(y) / np.diff(x))).sum())


# ======================================================================================================================
# Pairing
# ======================================================================================================================

VARIANT = {"adaptive", "perturb"}  # settings of SAM alone
DATASETS = {"mnist": "MNIST", "fashionmnist": "Fashion-MNIST", "kmnist": "KMNIST", "svhn": "SVHN"}
DATASETS |= {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "data/cifar10-jpeg": "CIFAR-10 (JPEG copy)"}


class Network:
    """The runs of one width: SGD's by seed, SAM's by rho and seed."""

    def __init__(self, run, by_depth):
        self.key = run.network_key
        self.width = f"{run.width} at {run.sparsity:g}" if run.sparsity else run.width
        self.params = run.params
        self.nonzero = run.nonzero
        self.position = len(run.layers) if by_depth else run.params  # on a figure's axis
        self.x = self.position if by_depth else math.log10(run.params)  # slopes: per layer, or per tenfold parameters
        self.sgd = {}
        self.sam = {}
        self.notes = []

    def pair(self, rules):
        """Leaves out SGD's runs that diverged, and radii at which one did; finds the best rho of each rule."""
        diverged = sorted(seed for seed, run in self.sgd.items() if run.status == "diverged")
        if diverged:
            self.notes.append(f"SGD left out at seeds {diverged}, where it diverged")
        self.sgd = {seed: run for seed, run in self.sgd.items() if run.status == "done"}

        shared = {}
        for rho, runs in sorted(self.sam.items()):
            count = sum(run.status == "diverged" for run in runs.values())
            alone = sorted(runs.keys() - self.sgd.keys())
            if count:
                self.notes.append(f"rho {rho:g} left out, {count} of {len(runs)} runs diverged")
                del self.sam[rho]
                continue
            if alone:
                self.notes.append(f"rho {rho:g} left out at seeds {alone}, no run of SGD")
            shared[rho] = runs.keys() & self.sgd.keys()

        self.radii, self.seeds = comparable(shared)
        for rho, seeds in shared.items():
            if seeds and rho not in self.radii:
                self.notes.append(f"rho {rho:g} left out, no seed in common with the other radii")
        if any(len(shared[rho]) > len(self.seeds) for rho in self.radii):
            self.notes.append(f"rho is chosen on the seeds that all radii share, {self.seeds}")
        self.best_rho = {rule: choose_rho([self], rule) for rule in rules if self.radii}

    def runs(self, optimizer, rule, rho=None):
        """{seed: run} of SGD or of SAM, at all seeds that both have at this rho, by default the rule's best."""
        sam = self.sam.get(self.best_rho.get(rule) if rho is None else rho, {})
        runs = sam if optimizer == "SAM" else self.sgd
        return {seed: runs[seed] for seed in sam if seed in self.sgd}

    def scores(self, what, rule, rho=None):
        """{seed: test score} of SGD or of SAM, or the difference, the gain."""
        if what == "gain":
            return difference(self.scores("SAM", rule, rho), self.scores("SGD", rule, rho))
        return scores_of(self.runs(what, rule, rho), rule)

    def final_values(self, optimizer, name, rho=None):
        """{seed: number after training}, such as train_loss or lambda_max, of the runs that have it."""
        runs = self.runs(optimizer, "last", rho)
        return {seed: run.final[name] for seed, run in runs.items() if name in run.final}


def scores_of(runs, rule):
    """{seed: test score} of {seed: run}."""
    return {seed: run.score(rule) for seed, run in runs.items()}


def comparable(settings):
    """Names of the {name: {seed: run}} that share seeds, and these; those of the fewest seeds are left out first."""
    names = sorted(settings)
    names.sort(key=lambda name: -len(settings[name]))
    while names:
        seeds = set.intersection(*(set(settings[name]) for name in names))
        if seeds:
            return sorted(names), sorted(seeds)
        names.pop()
    return [], []


def choose_rho(networks, rule):
    """The rho that is best in the mean over the networks and the seeds that their radii share, of equals the smallest;
    None where no rho is in all networks.
    """
    means = {}
    in_all = [rho for rho in networks[0].radii if all(rho in network.radii for network in networks)]
    for rho in in_all:
        choices = []
        for network in networks:
            choices += [network.sam[rho][seed].choice(rule) for seed in network.seeds]
        means[rho] = np.mean(choices)
    return max(means, key=means.get, default=None)


class Missing(Exception):
    """What a figure needs and the results lack."""


def need(found, what):
    if not found:
        raise Missing(what)
    return found


class Sweep:
    """Runs that differ in width (or depth, or sparsity), SGD or SAM, rho and seed alone."""

    def __init__(self, settings):
        self.settings = settings
        self.dataset = settings["dataset"]
        self.model = settings["model"]
        self.noise = settings["noise"]
        self.pruner = settings["pruner"]
        self.by_depth = self.model.startswith("MLP of layers of")
        self.networks = {}
        self.metric = "acc"
        self.rules = []

    def add(self, run):
        network = self.networks.setdefault(run.network_key, Network(run, self.by_depth))
        runs = network.sam.setdefault(run.rho, {}) if run.sam else network.sgd
        runs[run.seed] = run
        self.epochs = run.epochs
        if run.status == "done":
            self.metric = run.metric
            self.rules = list(run.stops)

    def pair(self):
        self.networks = dict(sorted(self.networks.items()))
        for network in self.networks.values():
            network.pair(self.rules)
        self.paired = [network for network in self.networks.values() if network.radii]
        self.positions = [network.position for network in self.paired]
        self.radii = sorted(set().union(*(network.radii for network in self.paired)))

    def without(self, *names):
        return {key: value for key, value in self.settings.items() if key not in names}

    def title(self, *without):
        parts = [DATASETS.get(self.dataset, self.dataset), self.model]
        if "noise" in without:
            parts.append("all rates of flipped labels")
        elif self.noise:
            parts.append(f"{100 * self.noise:g}% flipped")
        if self.pruner:
            parts.append(f"pruned ({self.pruner})")
        if "epochs" not in without:
            parts.append(f"{self.epochs:,} epochs")
        for key, value in self.without("dataset", "model", "noise", "pruner", "epochs", *without).items():
            if key in UNITS:
                parts.append(f"{value:,} {UNITS[key]}")
            else:
                text = f"{value:g}" if isinstance(value, float) else str(value)
                parts.append(f"{key.replace('_', ' ')} {text}".removesuffix(" True"))
        return ", ".join(parts).encode(errors="replace").decode()

    # Of each width in turn: {seed: value}

    def scores(self, what, rule, rho=None):
        """Of a rule that the sweep has: last, paper, or held-out; the others' networks are those of `tune_widths`."""
        need(rule in self.rules, f"--val-size for {self.title()}, whose rules are {', '.join(self.rules)}, not {rule}")
        return [network.scores(what, rule, rho) for network in self.paired]

    def final_values(self, optimizer, name):
        return [network.final_values(optimizer, name) for network in self.paired]


def build_sweeps(runs):
    sweeps = {}
    for run in runs:
        for model in run.models:
            settings = {**run.settings, "model": model}
            key = frozenset(settings.items())
            sweeps.setdefault(key, Sweep(settings)).add(run)

    for sweep in sweeps.values():  # SGD's runs are shared by all variants of SAM
        basic = sweeps.get(frozenset(sweep.without(*VARIANT).items()))
        for key, network in sweep.networks.items():
            if basic and key in basic.networks:
                network.sgd = basic.networks[key].sgd
    for sweep in sweeps.values():
        sweep.pair()
    kept = drop_single(sweeps.values())
    return tuple(sorted(kept, key=lambda sweep: (sweep.noise, sweep.title("epochs"), sweep.epochs)))


def drop_single(sweeps):
    """A network of equal layers is in two sweeps, by width and by depth. Those by depth of one network alone are left
    out, and those by width of one alone that is in a sweep by depth.
    """
    deep = set()
    for sweep in sweeps:
        if sweep.by_depth and len(sweep.networks) > 1:
            deep.update(sweep.networks)
    several = [sweep for sweep in sweeps if len(sweep.networks) > 1]
    single = [sweep for sweep in sweeps if len(sweep.networks) == 1 and not sweep.by_depth]
    return several + [sweep for sweep in single if deep.isdisjoint(sweep.networks)]


def families(sweeps, *free):
    """Lists of the sweeps that differ in these settings alone, such as "epochs"."""
    found = {}
    for sweep in sweeps:
        found.setdefault(frozenset(sweep.without(*free).items()), []).append(sweep)
    return list(found.values())


def alike(sweeps, sweep, *free):
    """The sweeps that differ from this one in these settings alone, itself among them, also where they have no SAM."""
    return [other for other in sweeps if other.without(*free) == sweep.without(*free)]


def longest(family):
    """Of sweeps that differ in epochs, the longest that has both SGD and SAM, or None."""
    return max((sweep for sweep in family if sweep.paired), key=lambda sweep: sweep.epochs, default=None)


# ======================================================================================================================
# SGD and SAM, each at its best settings
# ======================================================================================================================

FREE = {"tuned": ("epochs",), "fresh": ("epochs", "lr", "weight_decay")}  # what is chosen, together with rho
OTHER_SEEDS = {"tuned": "gain on seeds that chose nothing", "fresh": "gain on the seeds that chose"}


def runs_tried(sweeps, sweep, key, free):
    """All runs at one width of sweeps that differ in the free settings alone; SGD's are those of plain SAM's sweeps."""
    runs = []
    for other in sweeps:
        if key in other.networks and other.without(*free) == sweep.without(*free, *VARIANT):
            runs += other.networks[key].sgd.values()
        if key in other.networks and other.without(*free) == sweep.without(*free):
            for group in other.networks[key].sam.values():
                runs += group.values()
    return runs


def choose_settings(sweeps, sweep, network, rule, most_epochs=math.inf):
    """A copy of the network with the runs of SGD and SAM at the best settings of each; None where there is no choice.

    tuned: epochs and rho, chosen and scored on the seeds that all settings share. fresh: rate and decay, too; chosen on
    the seeds that more than half of the settings have, among the settings that have all of these, and scored on the
    other seeds, if these are three. other_gain: on the seeds that are not scored. most_epochs: of SAM; SGD, which takes
    one gradient a step, may have twice as many.
    """
    limit = {"SGD": 2 * most_epochs, "SAM": most_epochs}
    tried = {}
    for run in runs_tried(sweeps, sweep, network.key, FREE[rule]):
        if run.epochs <= limit[run.optimizer]:
            tried.setdefault(run.tuning, {})[run.seed] = run

    seeds = seeds_of_most(tried) if rule == "fresh" else comparable(tried)[1]
    complete = {tuning: runs for tuning, runs in sorted(tried.items()) if runs.keys() >= set(seeds)}
    count = Counter(tuning.optimizer for tuning in complete)
    if not seeds or count["SGD"] < 2 or count["SAM"] == 0:
        return None
    if rule == "fresh" and len({(tuning.lr, tuning.weight_decay) for tuning in complete}) == 1:  # as in tuned
        return None

    sgd = best_runs("SGD", complete, seeds)
    sam = best_runs("SAM", complete, seeds)
    fresh = sorted((sgd.keys() & sam.keys()) - set(seeds))  # which chose nothing
    if len(fresh) < 3:
        fresh = []
    if rule == "fresh":
        scored, others = fresh, seeds
    else:
        scored, others = seeds, fresh
    rho = sam[seeds[0]].rho

    best = copy.copy(network)
    best.seeds = seeds  # which chose
    best.tried = count
    best.chosen = {"SGD": sgd[seeds[0]], "SAM": sam[seeds[0]]}
    best.sgd = sgd
    best.sam = {rho: {seed: sam[seed] for seed in scored}}
    best.best_rho = {"held-out": rho, "last": rho}  # chosen at the best held-out epoch, wherever it is scored
    gain = difference(scores_of(sam, "held-out"), scores_of(sgd, "held-out"))
    best.other_gain = {seed: gain[seed] for seed in others}
    best.notes = [f"too few seeds for the choice, {tuple(tuning)}" for tuning in sorted(tried.keys() - complete.keys())]
    if not scored:
        best.notes.append("no gain, no three seeds beside those that chose")
    return best


def best_runs(optimizer, settings, seeds):
    """Of {tuning: {seed: run}} the optimizer's runs whose held-out score, mean over the seeds, is best."""
    means = {}
    for tuning, runs in settings.items():
        if tuning.optimizer == optimizer:
            means[tuning] = np.mean([runs[seed].choice("held-out") for seed in seeds])
    return settings[max(means, key=means.get)]


def seeds_of_most(settings):
    """The seeds that more than half of the {name: {seed: run}} have."""
    count = Counter()
    for runs in settings.values():
        count.update(runs.keys())
    return [seed for seed in sorted(count) if 2 * count[seed] > len(settings)]


@functools.cache
def tune_widths(sweeps, sweep, rule):
    """At all widths of the sweeps that differ in what the rule leaves free: the network with its best settings."""
    free = FREE[rule]
    networks = {}
    for other in alike(sweeps, sweep, *free):
        if "held-out" in other.rules:
            networks.update({network.key: network for network in other.paired})
    best = [choose_settings(sweeps, sweep, networks[key], rule) for key in sorted(networks)]
    return [network for network in best if network]


# ======================================================================================================================
# Numbers: the rows of summary.csv
# ======================================================================================================================

# After the last epoch. Training loss and accuracy: means over that epoch, at the weights before SAM moves them, on the
# labels trained on. The last layer's share: over all epochs. The slope of ln(training loss), and its R^2: from the
# second epoch on.
MEASURES = {
    "train_acc": "training accuracy",
    "train_clean_acc": "accuracy on the original training labels",
    "train_loss": "training loss",
    "lambda_max": "largest eigenvalue",
    "s2": "non-uniformity s2",
    "trace": "trace of the Hessian",
    "last_layer_share": "last layer's share (%)",
    "rate": "slope of ln(training loss) per epoch",
    "rate_r2": "R^2 of ln(training loss) by epoch",
    "variation": "sum of |f''|",
}
COLUMNS = ["sweep", "width", "parameters", "rho", "rule", "measure", "mean", "half_interval", "seeds"]


class Table:
    """The rows of summary.csv, and those over all widths by (sweep, rule, measure)."""

    def __init__(self):
        self.rows = []
        self.trends = {}

    def add(self, title, rule, measure, result, network=None, rho=None):
        """result: {seed: value}, to be averaged, left out where empty; or (number, how many seeds it was chosen on)."""
        if not result:
            return
        mean, half, seeds = interval(result) if isinstance(result, dict) else (result[0], math.nan, result[1])
        width = network.width if network else ""
        params = network.params if network else ""
        row = dict(zip(COLUMNS, [title, width, params, rho, rule, measure, mean, half, seeds]))
        self.rows.append(row)
        if network is None and rho is None:
            self.trends[title, rule, measure] = row

    def add_widths(self, title, rule, measure, networks, values, rho=None):
        """A row for each network, from its {seed: value}, and for the slope and the mean over the widths."""
        for network, one in zip(networks, values):
            self.add(title, rule, measure, one, network, rho)
        slopes, means = trend([(network.x, one) for network, one in zip(networks, values)])
        name = measure.replace("gain", "the gain", 1) if measure.startswith("gain") else measure
        self.add(title, rule, f"slope of {name}", slopes, rho=rho)
        self.add(title, rule, f"mean {measure}", means, rho=rho)


@functools.cache
def summarize(sweeps):
    table = Table()
    for sweep in sweeps:
        for rule in sweep.rules if sweep.paired else []:
            add_scores(table, sweep, rule)
            add_contrasts(table, sweeps, sweep, rule)
        add_training(table, sweep)
        add_equal_gradients(table, sweeps, sweep)
    for rule, free in FREE.items():
        for family in families(sweeps, *free):
            add_tuned(table, sweeps, family[0], rule)
    noisy = [sweep for sweep in sweeps if sweep.noise]
    for family in families(noisy, "epochs"):
        add_label_fit(table, family, family[0].title("epochs"))
    for family in families(noisy, "epochs", "noise"):
        if len(families(family, "epochs")) > 1:
            add_label_fit(table, family, family[0].title("epochs", "noise"))
    return table


def add_scores(table, sweep, rule):
    title = sweep.title()
    for network in sweep.paired:
        table.add(title, rule, "best rho", (network.best_rho[rule], len(network.seeds)), network)
    rho_for_all = choose_rho(sweep.paired, rule)
    if rho_for_all is not None and len(sweep.paired) > 1:
        fewest = min(len(network.seeds) for network in sweep.paired)
        table.add(title, rule, "best rho of all widths", (rho_for_all, fewest))
    for what in ("SGD", "SAM", "gain"):
        table.add_widths(title, rule, what, sweep.paired, sweep.scores(what, rule))
    for rho in sweep.radii:
        table.add_widths(title, rule, "gain", sweep.paired, sweep.scores("gain", rule, rho), rho)


def as_many_weights(network, others):
    """Of other networks the one of as many weights, or None; beside a pruned one: as are left in it, within 5%."""
    slack = 0.05 if network.nonzero < network.params else 0
    near = [other for other in others if abs(network.nonzero / other.nonzero - 1) <= slack]
    return min(near, key=lambda other: abs(other.nonzero - network.nonzero), default=None)


def contrasts(networks, others, rule):
    """Each network's gains minus those of the one of the others that has as many weights."""
    gains = []
    for network in networks:
        other = as_many_weights(network, others)
        beside = other.scores("gain", rule) if other else {}
        gains.append(difference(network.scores("gain", rule), beside))
    return gains


def add_contrasts(table, sweeps, sweep, rule):
    """A sweep's gains beside those at less noise, at the default weight decay, of dense networks of as many weights."""
    others = {}
    for other in sweeps:  # in the order of their noise
        if other.paired and other.noise < sweep.noise and other.without("noise") == sweep.without("noise"):
            others["that at less noise"] = other
        if "weight_decay" in sweep.settings and other.settings == sweep.without("weight_decay"):
            others["that at the default weight decay"] = other
        if sweep.pruner and other.settings == {**sweep.settings, "pruner": None}:
            others["that of dense networks"] = other
    for name, other in others.items():
        gains = contrasts(sweep.paired, other.paired, rule)
        table.add_widths(sweep.title(), rule, f"gain - {name}", sweep.paired, gains)


def add_training(table, sweep):
    """What runs are like after training: at each width's best rho by the last epoch, and SAM's at every rho."""
    title = sweep.title()
    for network in sweep.paired:
        for name, measure in MEASURES.items():
            table.add(title, "last", f"{measure} of SGD", network.final_values("SGD", name), network)
            for rho in [None, *network.radii]:
                table.add(title, "last", f"{measure} of SAM", network.final_values("SAM", name, rho), network, rho)
        for rho in network.radii:
            collapsed = [run.collapsed for run in network.runs("SAM", "last", rho).values()]
            table.add(title, "last", "collapsed runs", (sum(collapsed), len(collapsed)), network, rho)


def add_equal_gradients(table, sweeps, sweep):
    """SAM beside SGD of twice the epochs, and of up to twice the epochs, which takes as many gradients."""
    title = sweep.title()
    for twice in sweeps:
        if twice.epochs != 2 * sweep.epochs or twice.without("epochs") != sweep.without("epochs", *VARIANT):
            continue
        networks = [network for network in sweep.paired if network.key in twice.networks]
        for rule in sweep.rules:
            gains = []
            for network in networks:
                sgd = twice.networks[network.key].sgd
                gains.append(difference(network.scores("SAM", rule), scores_of(sgd, rule)))
            table.add_widths(title, rule, "gain over SGD of twice the epochs", networks, gains)
        if "held-out" in sweep.rules:
            best = [choose_settings(sweeps, sweep, network, "tuned", sweep.epochs) for network in networks]
            gains = [one.scores("gain", "held-out") if one else {} for one in best]
            table.add_widths(title, "held-out", "gain at equal gradients", networks, gains)


def add_tuned(table, sweeps, sweep, rule):
    title = sweep.title(*FREE[rule])
    networks = tune_widths(sweeps, sweep, rule)
    for network in networks:
        seeds = len(network.seeds)
        table.add(title, rule, "best rho", (network.chosen["SAM"].rho, seeds), network)
        for optimizer, run in network.chosen.items():
            table.add(title, rule, f"settings of {optimizer}", (network.tried[optimizer], seeds), network)
            for name in FREE[rule]:
                measure = f"{name.replace('_', ' ')} of {optimizer}"
                table.add(title, rule, measure, (getattr(run, name), seeds), network)
    for what in ("SGD", "SAM", "gain"):
        table.add_widths(title, rule, what, networks, [network.scores(what, "held-out") for network in networks])
    last = [network.scores("gain", "last") for network in networks]
    table.add_widths(title, rule, "gain after the last epoch", networks, last)
    table.add_widths(title, rule, OTHER_SEEDS[rule], networks, [network.other_gain for network in networks])

    less = [other for other in alike(sweeps, sweep, "noise", *FREE[rule]) if other.noise < sweep.noise]
    if less:
        gains = contrasts(networks, tune_widths(sweeps, less[-1], rule), "held-out")
        table.add_widths(title, rule, "gain - that at less noise", networks, gains)


def label_fit(networks):
    """Of each pair of runs after the last epoch: SGD's fit to the given labels minus SAM's; the gain; log width."""
    x = []
    y = []
    width = []
    for network in networks:
        fit = difference(network.final_values("SGD", "train_acc"), network.final_values("SAM", "train_acc"))
        x += fit.values()
        y += network.scores("gain", "last").values()
        width += [math.log10(network.params)] * len(fit)
    return x, y, width


def add_label_fit(table, sweeps, title):
    networks = []
    for sweep in sweeps:
        networks += sweep.paired
    x, y, width = label_fit(networks)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return

    slope, r2 = straight_line(x, y)
    table.add(title, "last", "slope of the gain over the difference of training accuracies", (slope, len(x)))
    table.add(title, "last", "R^2 of the gain and the difference of training accuracies", (r2, len(x)))
    if np.ptp(width) > 0:
        _, r2 = straight_line(width, y)
        table.add(title, "last", "R^2 of the gain and the logarithm of the parameters", (r2, len(x)))
        both = np.column_stack([x, width, np.ones(len(x))])
        residual = y - both @ np.linalg.lstsq(both, y, rcond=None)[0]
        table.add(title, "last", "R^2 of the gain and both", (1 - np.var(residual) / np.var(y), len(x)))


# ======================================================================================================================
# Drawing
# ======================================================================================================================

SGD = "#0072B2"  # Okabe and Ito's colours, told apart by the colour-blind and in print
SAM = "#D55E00"
GREEN = "#009E73"
YELLOW = "#E69F00"
PINK = "#CC79A7"
BLUE = "#56B4E9"
GREY = "#666666"
BOTH = {"SGD": SGD, "SAM": SAM}
SCORE = {"acc": "test accuracy (%)", "loss": "minus the test loss"}
GAIN = {"acc": "gain (points)", "loss": "gain in test loss"}

plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "figure.titlesize": 8, "xtick.labelsize": 7})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "lines.markersize": 4, "savefig.dpi": 200})
plt.rcParams["axes.formatter.min_exponent"] = 4  # 0.2 on a log axis


def usual(sweeps):
    """The sweeps by width of plain SAM (VARIANT) at the default TRAINING, not pruned, not of one-dimensional data."""
    found = []
    for sweep in sweeps:
        changed = sweep.settings.keys() & (TRAINING | VARIANT)
        if not (changed or sweep.pruner or sweep.by_depth or sweep.dataset in ("curve", "curve-scaled")):
            found.append(sweep)
    return found


def main_sweeps(sweeps):
    """Of the usual sweeps that differ in epochs alone the longest that has both SGD and SAM.

    For others, select from `usual(sweeps)` or all sweeps: [s for s in usual(sweeps) if s.paired and s.epochs == 24].
    """
    found = [longest(family) for family in families(usual(sweeps), "epochs")]
    return [sweep for sweep in found if sweep]


def is_mnist_mlp(sweep):
    return sweep.dataset == "mnist" and sweep.model.startswith("MLP")


def noisy_mnist_mlps(sweeps):
    noisy = [sweep for sweep in main_sweeps(sweeps) if sweep.noise and is_mnist_mlp(sweep)]
    what = "SGD and SAM of MLPs on MNIST with flipped labels, at the default rate, decay, schedule and loss"
    return need(noisy, what)


def panels(rows, columns, **sharing):
    """A figure of panels of 7 by 5.5 cm, and its axes, a list of rows."""
    size = (2.75 * columns, 2.2 * rows + 0.2)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **sharing)


def heading(sweep, *without, characters=40):
    """A sweep's title but for what is held out, in lines that a panel has room for; no mathematics in folder names."""
    return textwrap.fill(sweep.title("val_size", *without).replace("$", r"\$"), characters)


def narrow_and_wide(row, sweep, *without):
    """(panel, network) of the narrowest and the widest network, under their titles; of one width one panel alone."""
    networks = dict.fromkeys((sweep.paired[0], sweep.paired[-1]))  # once, where they are one
    pairs = list(zip(row, networks))
    row[1].set_visible(len(pairs) > 1)
    for ax, network in pairs:
        ax.set_title(f"{short(network.params)} parameters")
    row[0].set_title(f"{heading(sweep, *without)}\n{row[0].get_title()}")
    return pairs


def draw_line(ax, x, values, label, color, style="-"):
    """Means and intervals of {seed: value} at each x; fewer than three seeds: hollow, without interval, dotted."""
    drawn = [(place, *interval(one)) for place, one in zip(x, values) if one]
    if not drawn:
        return
    x, means, halves, seeds = np.array(drawn).T
    ax.plot(x, means, "o:", color=color, markerfacecolor="white", linewidth=1, label=label)
    firm = seeds >= 3
    ax.errorbar(x[firm], means[firm], halves[firm], fmt="o" + style, color=color, elinewidth=1)


def draw_gains(ax, sweep, rule, label="gain", color=SAM, style="-"):
    """SAM's gain by width, where the stopping rule says."""
    draw_line(ax, sweep.positions, sweep.scores("gain", rule), label, color, style)
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel(GAIN[sweep.metric])
    width_axis(ax, sweep)


def draw_scores(ax, sweep, rule):
    """SGD's and SAM's scores by width, where the stopping rule says."""
    for optimizer, color in BOTH.items():
        draw_line(ax, sweep.positions, sweep.scores(optimizer, rule), optimizer, color)
    ax.set_ylabel(SCORE[sweep.metric])
    width_axis(ax, sweep)


def draw_final(ax, sweep, name):
    """A number after training, the panel's title, by width: of SGD, and of SAM at its best rho by the last epoch."""
    for optimizer, color in BOTH.items():
        draw_line(ax, sweep.positions, sweep.final_values(optimizer, name), optimizer, color)
    ax.set_title(MEASURES[name])
    width_axis(ax, sweep)


def draw_epochs(ax, network, key):
    """The means over the seeds of a column of the history, by epoch: SGD's, and SAM's at its best rho by the last."""
    for optimizer, color in BOTH.items():
        mean = np.mean([run.history[key] for run in network.runs(optimizer, "last").values()], axis=0)
        ax.plot(np.arange(len(mean)) + 1, mean, color=color, linewidth=1.2, label=optimizer)
    ax.set_xlabel("epoch")


def width_axis(ax, sweep):
    """Names the widths by their parameters, such as 61k; by their layers in a sweep by depth."""
    ax.set_xlabel("hidden layers" if sweep.by_depth else "parameters")
    if not sweep.by_depth:
        ax.set_xscale("log")
    if len(sweep.positions) < 8:
        turned = 45 if len(sweep.positions) > 5 else 0
        ax.set_xticks(sweep.positions, [short(place) for place in sweep.positions], rotation=turned)
        ax.minorticks_off()


def short(count):
    """61035 as 61k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 3}g}{letter}"
    return str(count)


def rho_axis(ax, sweep):
    """SGD at 0, then the radii, evenly spaced."""
    ax.set_xticks(range(1 + len(sweep.radii)), ["SGD", *(f"{radius:g}" for radius in sweep.radii)])
    ax.set_xlabel("rho")


def places_of(sweep, network):
    """Of SGD, and of a network's radii, on a rho axis."""
    return [0, *(1 + sweep.radii.index(radius) for radius in network.radii)]


def width_color(sweep, network):
    """From dark, the narrowest, to light green, the widest; no yellow on white."""
    place = sweep.paired.index(network) / max(1, len(sweep.paired) - 1)
    return plt.colormaps["viridis"](0.75 * place)


def points_axis(axis):
    """Ticks for an axis that is linear up to 1 point of accuracy and logarithmic beyond."""
    axis.set_major_locator(FixedLocator([-10, -1, 0, 0.5, 1, 3, 10, 30]))
    axis.set_major_formatter("{x:g}")


def label_lines(ax):
    """Writes each line's label beside its last point, in its colour; apart from each other, and above the x axis."""
    ax.autoscale_view()  # which sets the limits that the heights are in
    ends = []
    for line in ax.lines:
        if not line.get_label().startswith("_"):
            _, y = ax.transLimits.transform(ax.transScale.transform(line.get_xydata()[-1]))
            ends.append((y, line))
    ends.sort(key=lambda end: -end[0])

    heights = [0.1 * (1 + line.get_label().count("\n")) for _, line in ends]
    ceiling = 1.05
    for number, (y, line) in enumerate(ends):
        floor = sum(heights[number + 1 :])  # room for the labels below it
        middle = max(min(y, ceiling - heights[number] / 2), floor + heights[number] / 2)
        ceiling = middle - heights[number] / 2
        ax.text(1.02, middle, line.get_label(), color=line.get_color(), va="center", transform=ax.transAxes)


# ======================================================================================================================
# The figures. Each takes all sweeps and returns the picture, and sweeps, whose numbers stand in summary.md below the
# first figure that returns them. Lines that have a label get it beside their last point. A short example: depth.
# ======================================================================================================================


def front(sweeps):
    """MNIST, MLPs, half of the training labels flipped to another class; held-out and test labels are clean.

    Left: test accuracy after the last epoch, of SGD and SAM at the longest training, and dashed at the number of epochs
    that is best for each over all widths, on held-out images. Middle: SAM's gain over SGD after the last epoch; where
    each run stops at its best held-out epoch; where, besides, SGD and SAM have at each width the number of epochs that
    is best for them; and where they have the best learning rate and weight decay, too, measured on other seeds. The
    axis is linear up to 1 and logarithmic above. Right: the gain after the last epoch, by how much better SGD fits the
    given, partly wrong training labels than SAM: a mark for each fraction of flipped labels, number of epochs and width
    (the larger, the wider), also of ResNets on MNIST and of other numbers of images. SAM's radius rho is chosen for
    each width on held-out images. Means over seeds, left and middle with 95% intervals.
    """
    mlps = [sweep for sweep in main_sweeps(sweeps) if is_mnist_mlp(sweep) and sweep.noise == 0.5]
    need(mlps, "SGD and SAM of MLPs on MNIST with half of the labels flipped")
    sweep = max(mlps, key=lambda sweep: len(alike(sweeps, sweep, "epochs")))
    figure, (axes,) = panels(1, 3)
    figure.suptitle(heading(sweep, "epochs", characters=1000))
    draw_accuracies(axes[0], sweeps, sweep, "last")
    draw_stops(axes[1], sweeps, sweep)
    pooled = ("noise", "epochs", "model", "batch_size", "train_size", "val_size")
    draw_label_fit(axes[2], [other for other in alike(usual(sweeps), sweep, *pooled) if other.noise])
    axes[0].set_title("Long and short training")
    axes[0].set_ylabel(SCORE["acc"])
    axes[1].set_title("Gain, by when training stops")
    axes[1].set_ylabel("gain (points, log above 1)")
    axes[2].set_title("Gain, by fit to given labels")
    axes[2].set_ylabel("gain, last epoch (points)")
    return figure, []


def draw_accuracies(ax, sweeps, sweep, rule):
    """SGD's and SAM's scores by width; dashed: at the number of epochs that is best for each."""
    for optimizer, color in BOTH.items():
        values = sweep.scores(optimizer, rule)
        best = best_length(sweeps, sweep, optimizer, rule)
        if best is not sweep:
            runs = [runs_of(best.networks[network.key], optimizer, rule) for network in sweep.paired]
            label = f"{optimizer}, {best.epochs} epochs"
            draw_line(ax, sweep.positions, [scores_of(one, rule) for one in runs], label, color, "--")
        draw_line(ax, sweep.positions, values, f"{optimizer}, {sweep.epochs} epochs", color)
    width_axis(ax, sweep)


def best_length(sweeps, sweep, optimizer, rule):
    """Of the sweeps that differ from this one in epochs alone the best on held-out data, mean over the widths."""
    means = {}
    for other in alike(sweeps, sweep, "epochs"):
        choices = []
        for network in sweep.paired:
            if network.key in other.networks:
                runs = runs_of(other.networks[network.key], optimizer, rule)
                if runs:
                    choices.append(np.mean([run.choice(rule) for run in runs.values()]))
        if len(choices) == len(sweep.paired):
            means[other] = np.mean(choices)
    return max(means, key=means.get)


def runs_of(network, optimizer, rule):
    """All of SGD's runs, also where SAM has none; SAM's at the rule's best rho."""
    return network.sgd if optimizer == "SGD" else network.runs("SAM", rule)


def draw_stops(ax, sweeps, sweep):
    """The gain by width, by when training stops and by what else is best for each."""
    draw_gains(ax, sweep, "last", "last epoch")
    if "held-out" in sweep.rules:
        draw_line(ax, sweep.positions, sweep.scores("gain", "held-out"), "best held-\nout epoch", YELLOW)
    for rule, label, color in (
        ("tuned", "each at its best\nnumber of epochs", GREEN),
        ("fresh", "rate and decay, too\n(on other seeds)", GREY),
    ):
        networks = tune_widths(sweeps, sweep, rule)
        gains = [network.scores("gain", "held-out") for network in networks]
        draw_line(ax, [network.position for network in networks], gains, label, color)
    ax.set_ylabel("")
    ax.set_yscale("symlog", linthresh=1)
    points_axis(ax.yaxis)


def draw_label_fit(ax, sweeps):
    """A mark a width: the mean over seeds of the gain, by the difference of accuracies on the given labels."""
    colors = {0.25: BLUE, 0.5: PINK, 0.75: GREY}
    for sweep in sweeps:
        for network in sweep.paired:
            x, y, _ = label_fit([network])
            color = colors.get(sweep.noise, "black")
            face = color if is_mnist_mlp(sweep) else "white"
            size = 8 * max(0.5, math.log10(network.params) - 3.5) ** 2
            ax.scatter(np.mean(x), np.mean(y), size, face, edgecolors=color)
    for line, noise in enumerate(sorted({sweep.noise for sweep in sweeps})):
        place = (1.02, 0.94 - 0.09 * line)
        ax.text(*place, f"{100 * noise:g}% flipped", color=colors.get(noise, "black"), transform=ax.transAxes)
    legend = ["larger: wider"]
    others = {sweep.model for sweep in sweeps if not is_mnist_mlp(sweep)}
    if others:
        legend += ["hollow:", *sorted(others)]
    ax.text(1.02, 0.04, "\n".join(legend), transform=ax.transAxes)
    ax.set_xlabel("SGD's fit to the given labels\nminus SAM's (points)")


def label_noise(sweeps):
    """MNIST, a row a rate of flipped labels. Left: test accuracy after the last epoch, of SGD and SAM at the longest
    training, and dashed at the number of epochs that is best for each over all widths, on held-out data. Right: SAM's
    gain after the last epoch, at each run's best held-out epoch (held-out labels are clean), and where each also has
    its best number of epochs, or on other seeds the best rate and decay, too; the axis is logarithmic above 1. rho is
    chosen for each width on held-out data."""
    return noise_rows(sweeps, noisy_mnist_mlps(sweeps), sharey="col")


def label_noise_elsewhere(sweeps):
    """Flipped labels with other data and models, of two widths or more, drawn as in label_noise.png, but for an axis of
    its own in each panel. Hollow marks and dotted lines: fewer than three seeds, so no interval."""
    rows = [sweep for sweep in main_sweeps(sweeps) if sweep.noise and not is_mnist_mlp(sweep)]
    rows = [sweep for sweep in rows if len(sweep.paired) > 1]
    need(rows, "SGD and SAM of two widths with flipped labels, of other data or models")
    return noise_rows(sweeps, rows, sharey=False)


def noise_rows(sweeps, rows, sharey):
    figure, axes = panels(len(rows), 2, sharey=sharey)
    shown = []
    for (left, right), sweep in zip(axes, rows):
        draw_accuracies(left, sweeps, sweep, "last")
        draw_stops(right, sweeps, sweep)
        left.set_title(heading(sweep, "epochs"), loc="left")
        left.set_ylabel(SCORE["acc"])
        right.set_ylabel(GAIN["acc"])
        shown += alike(sweeps, sweep, "epochs")
    return figure, shown


def training_length(sweeps):
    """Flipped labels: test accuracy after the last epoch by the number of epochs, a whole schedule each, of the
    narrowest and the widest network, a row a workload. SAM has at each length its best rho on held-out data. Where SGD
    falls, it fits the flipped labels. Hollow marks and dotted lines: fewer than three seeds."""
    noisy = families([sweep for sweep in usual(sweeps) if sweep.noise], "epochs")
    rows = [family for family in noisy if longest(family) and len(family) > 1]
    need(rows, "SGD and SAM with flipped labels, at two numbers of epochs")
    figure, axes = panels(len(rows), 2, sharey="row")
    shown = []
    for row, family in zip(axes, rows):
        sweep = longest(family)
        for ax, network in narrow_and_wide(row, sweep, "epochs"):
            draw_lengths(ax, family, network)
        row[0].set_ylabel(SCORE["acc"])
        shown += family
    return figure, shown


def draw_lengths(ax, family, network):
    """One width's scores after the last epoch, by the number of epochs."""
    found = [sweep for sweep in family if network.key in sweep.networks]
    epochs = [sweep.epochs for sweep in found]
    networks = [sweep.networks[network.key] for sweep in found]
    for optimizer, color in BOTH.items():
        runs = [runs_of(one, optimizer, "last") for one in networks]
        draw_line(ax, epochs, [scores_of(one, "last") for one in runs], optimizer, color)
    ax.set_xscale("log")
    ax.set_xticks(epochs, epochs)
    ax.minorticks_off()
    ax.set_xlabel("epochs")


PAPER = {  # {parameters: gain} in points (teacher: in test loss), read off the paper's figures to about 0.01
    ("mnist", "MLP 3:1"): {61035: 0.07, 125810: 0.06, 266610: 0.18, 1426410: 0.19, 5366010: 0.19},
    ("cifar10", "ResNet-18"): {
        44622: 0.36, 176402: 0.66, 701466: 0.44, 2797610: 0.85, 11173962: 0.96, 44662922: 1.23, 178585866: 1.01,
    },
    ("imagenet", "ResNet-50"): {1993976: 0.03, 6917640: 0.04, 14771992: 0.17, 25557032: 0.35, 39272760: 0.54},
    ("teacher", "MLP of one layer"): {
        1e4: 0.026, 2e4: 0.029, 3e4: 0.034, 4e4: 0.047, 5e4: 0.056,
        6e4: 0.062, 7e4: 0.063, 8e4: 0.074, 9e4: 0.080, 1e5: 0.083,
    },
}  # fmt: skip
# Settings that may differ where the paper's points are drawn
PAPER_ALLOWS = {"data_dir", "val_size", "image_size", "amp", "compile", "fp32"}


def paper_gains(sweep):
    """The paper's {parameters: gain}, where the settings are its own but for held-out data and arithmetic."""
    changed = sweep.without("dataset", "model", "noise", "pruner", *PAPER_ALLOWS)
    if changed or sweep.noise or sweep.pruner:
        return {}
    dataset = os.path.basename(sweep.dataset).replace("-jpeg", "")
    return PAPER.get((dataset, sweep.model), {})


def gain_by_width(sweeps):
    """Clean labels, by the paper's rule: each run's best test epoch, and the rho that is best on test data. Above:
    SAM's gain over SGD by width (of a regression: in test loss), beside the paper's gains where the settings are its
    own. Below: the scores; of a regression minus the test loss, where the dashed lines are the noise of the targets and
    the best constant. Bars: 95% intervals, of three seeds or more; hollow marks have fewer, and the bold line leaves
    them out."""
    clean = [sweep for sweep in main_sweeps(sweeps) if not sweep.noise]
    need(clean, "SGD and SAM on clean labels, at the default rate, decay, schedule and loss")
    figure, axes = panels(2, len(clean), sharex="col")
    for above, below, sweep in zip(*axes, clean):
        draw_gains(above, sweep, "paper", "here")
        draw_scores(below, sweep, "paper")
        above.set_xlabel("")
        above.set_title(heading(sweep))
        paper = paper_gains(sweep)
        if paper:
            above.plot(paper.keys(), paper.values(), "x--", color=GREY, linewidth=1, label="paper")
        for constant in (-1, -1.306) if sweep.dataset == "teacher" else ():
            below.axhline(constant, linestyle="--", color=GREY, linewidth=0.8)
    return figure, clean


def rho(sweeps):
    """Score after the last epoch by SAM's rho, a line a width, means over the seeds that all radii share; a ring marks
    the rho that is chosen, on held-out data where there are any, if three or more were tried. Above a rho: how many of
    its runs learned nothing. Lines are labelled at the narrowest and the widest network."""
    shown = [sweep for sweep in main_sweeps(sweeps) if len(sweep.radii) > 1]
    need(shown, "SGD and SAM at two radii, at the default rate, decay, schedule and loss")
    columns = min(3, len(shown))
    figure, axes = panels(math.ceil(len(shown) / columns), columns)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, sweep in zip(axes.flat, shown):
        for network in sweep.paired:
            draw_by_rho(ax, sweep, network)
        for place, radius in enumerate(sweep.radii, start=1):
            count_collapsed(ax, place, [network.sam[radius] for network in sweep.paired if radius in network.radii])
        rho_axis(ax, sweep)
        ax.set_title(heading(sweep, "batch_size"), pad=20)
        ax.set_ylabel(SCORE[sweep.metric])
    return figure, shown


def draw_by_rho(ax, sweep, network):
    """One width's scores, SGD's first."""
    color = width_color(sweep, network)
    x = places_of(sweep, network)
    y = []
    for runs in (network.sgd, *(network.sam[radius] for radius in network.radii)):
        y.append(np.mean([runs[seed].score("last") for seed in network.seeds]))
    labelled = network in (sweep.paired[0], sweep.paired[-1])
    ax.plot(x, y, "o-", color=color, linewidth=1, label=short(network.params) if labelled else "_")
    if len(network.radii) > 2:
        best = 1 + network.radii.index(network.best_rho["last"])
        ax.plot(x[best], y[best], "o", markersize=8, markerfacecolor="none", color=SAM)


def count_collapsed(ax, place, groups):
    """Writes above a rho how many of its runs, {seed: run} a width, learned nothing."""
    collapsed = [run.collapsed for runs in groups for run in runs.values()]
    if any(collapsed):
        text = f"{sum(collapsed)}\nof {len(collapsed)}"
        ax.text(place, 1.01, text, fontsize=6, ha="center", transform=ax.get_xaxis_transform())


def curves(sweeps):
    """MNIST with flipped labels: test accuracy over the epochs at the longest training, mean over seeds; above the
    narrowest network, below the widest. rho is the one that is best after the last epoch, on held-out data."""
    noisy = noisy_mnist_mlps(sweeps)
    figure, axes = panels(2, len(noisy), sharex=True, sharey="row")
    for column, sweep in zip(axes.T, noisy):
        for ax, network in narrow_and_wide(column, sweep):
            draw_epochs(ax, network, "test_acc")
            ax.set_ylabel(SCORE["acc"])
            ax.label_outer()
    return figure, []


def sharpness(sweeps):
    """Largest eigenvalue of the Hessian on some training images, its non-uniformity s2, and the training loss, by SAM's
    rho, a line a width; a row a workload. Dashed, for squared loss at a constant rate: the paper's bounds, which are
    for un-normalized SAM at batch size 1 and so only a reference. Where the training losses differ, two optimizers are
    compared at different distances from a minimum."""
    shown = [sweep for sweep in sweeps if any(sweep.final_values("SGD", "lambda_max"))]
    need(shown, "runs of SGD and SAM with --sharpness")
    figure, axes = panels(len(shown), 3)
    for row, sweep in zip(axes, shown):
        for ax, name in zip(row, ("lambda_max", "s2", "train_loss")):
            for network in sweep.paired:
                if network.final_values("SGD", "lambda_max"):
                    values = [network.final_values("SAM", name, radius) for radius in network.radii]
                    values.insert(0, network.final_values("SGD", name))
                    draw_line(ax, places_of(sweep, network), values, short(network.params), width_color(sweep, network))
            ax.set_title(MEASURES[name])
            rho_axis(ax, sweep)
        row[0].set_title(f"{heading(sweep)}\n{MEASURES['lambda_max']}")
        if sweep.settings.get("schedule") == "constant" and sweep.settings.get("loss") == "mse":
            draw_bounds(row[0], row[1], sweep)
    return figure, shown


def draw_bounds(eigenvalue, spread, sweep):
    """The paper's Theorem 6.3: a (1 + rho a) <= 2 / lr; s2^2 <= 1 / (lr (lr - 2 rho)), void from rho = lr / 2 on."""
    lr = min(run.lr for run in sweep.paired[0].sgd.values())
    radii = np.array([0, *sweep.radii])
    x = np.arange(len(radii))
    eigenvalue.plot(x, 4 / lr / (1 + np.sqrt(1 + 8 * radii / lr)), "--", color=GREY, label="bound")
    valid = 2 * radii < lr
    spread.plot(x[valid], (lr * (lr - 2 * radii[valid])) ** -0.5, "--", color=GREY, label="bound")


def claims(sweeps):
    """One line a claim, in points of test accuracy: the mean over seeds and its 95% interval, filled where the interval
    excludes zero. Slopes are per tenfold parameters, for depth per layer. Stopping rules: the last epoch; each run's
    best held-out epoch; tuned, where SGD and SAM also have the number of epochs that is best for each; fresh, where
    they also have the best rate and decay and are scored on other seeds. The axis is logarithmic beyond 1."""
    shown = [sweep for sweep in sweeps if sweep.paired and sweep.metric == "acc"]
    longest_sweeps = [sweep for sweep in main_sweeps(sweeps) if sweep.metric == "acc"]
    deep = [sweep for sweep in shown if sweep.by_depth]
    clean = [sweep for sweep in shown if not sweep.noise]
    stops = ("last", "held-out")
    rules = ("last", "held-out", "tuned", "fresh")
    noise = "mean gain - that at less noise"
    gradients = "mean gain at equal gradients"
    decay = "slope of the gain - that at the default weight decay"
    dense = "mean gain - that of dense networks"

    trends = summarize(sweeps).trends
    lines = claim(trends, "The gain grows with width: slope", "slope of the gain", longest_sweeps, rules)
    lines += claim(trends, "More flipped labels: mean gain, minus that at less noise", noise, longest_sweeps, rules)
    lines += claim(trends, "Equal gradients: mean gain", gradients, usual(shown), stops)
    lines += claim(trends, "No weight decay: slope, minus that with decay", decay, clean, stops)
    lines += claim(trends, "Pruned: mean gain, minus that of dense networks", dense, shown, stops)
    lines += claim(trends, "The gain grows with depth: slope", "slope of the gain", deep, stops)
    need(lines, "three seeds of SGD and SAM")

    figure, ax = plt.subplots(figsize=(6.5, 0.4 + 0.16 * len(lines)), layout="constrained")
    for y, (text, row) in enumerate(lines):
        weight = "normal" if row else "bold"
        ax.text(-0.02, y, text, weight=weight, ha="right", va="center", transform=ax.get_yaxis_transform())
        if row:
            face = SAM if abs(row["mean"]) > row["half_interval"] else "white"
            ax.errorbar(row["mean"], y, 0, row["half_interval"], "o", color=SAM, markerfacecolor=face, elinewidth=1)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_xscale("symlog", linthresh=1)
    points_axis(ax.xaxis)
    ax.set_xlabel("points")
    ax.set_yticks([])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    return figure, []


def claim(trends, heading, measure, sweeps, rules):
    """[(text, row of the table)] of each sweep and rule that has three seeds; first the heading, which has no row."""
    lines = []
    for sweep in sweeps:
        for rule in rules:
            free = FREE.get(rule, ())
            row = trends.get((sweep.title(*free), rule, measure))
            if row and row["seeds"] > 2:
                lines.append((sweep.title("val_size", "batch_size", *free) + f": {rule}", row))
    return [(heading, None), *lines] if lines else []


def sparsity(sweeps):
    """Networks pruned at initialization to as many weights as the narrow dense one has: SAM's gain after the last
    epoch by parameters before pruning, a panel a pruner. Dashed: the gain of the dense network."""
    pruned = need([sweep for sweep in sweeps if sweep.pruner and sweep.paired], "SGD and SAM of pruned networks")
    figure, (axes,) = panels(1, len(pruned), sharey=True)
    for ax, sweep in zip(axes, pruned):
        draw_gains(ax, sweep, "last", "pruned")
        for dense in sweeps:
            network = as_many_weights(sweep.paired[0], dense.paired)
            if dense.settings == {**sweep.settings, "pruner": None} and network:
                gain, _, _ = interval(network.scores("gain", "last"))
                ax.plot(sweep.positions, [gain] * len(sweep.positions), "--", color=GREY, linewidth=1, label="dense")
        ax.set_title(heading(sweep))
        ax.set_xlabel("parameters before pruning")
        ax.label_outer()
    return figure, pruned


def regularization(sweeps):
    """SAM's gain after the last epoch by width, at the default weight decay and at others. Clean labels."""
    clean = [sweep for sweep in sweeps if sweep.paired and not sweep.noise]
    groups = [group for group in families(clean, "weight_decay") if len(group) > 1]
    need(groups, "SGD and SAM at --weight-decay 0 and at the default")
    figure, (axes,) = panels(1, len(groups))
    for ax, group in zip(axes, groups):
        for sweep in group:
            if "weight_decay" in sweep.settings:
                draw_gains(ax, sweep, "last", f"decay {sweep.settings['weight_decay']:g}", GREY, "--")
            else:
                draw_gains(ax, sweep, "last", "default\ndecay")
        ax.set_title(heading(group[0], "weight_decay"))
    return figure, [sweep for group in groups for sweep in group if "weight_decay" in sweep.settings]


def depth(sweeps):
    """MLPs of equal layers, by the number of hidden layers, after the last epoch: SAM's gain, and the scores."""
    deep = need([sweep for sweep in sweeps if sweep.by_depth and sweep.paired], "SGD and SAM of several depths")
    figure, axes = panels(len(deep), 2)
    for (left, right), sweep in zip(axes, deep):
        draw_gains(left, sweep, "last")
        draw_scores(right, sweep, "last")
        left.set_title(heading(sweep))
    return figure, deep


def layers(sweeps):
    """What SAM perturbs: all parameters, all but the last layer's (rest), the last layer's alone, or all in a random
    direction. Left: the gain after the last epoch. Right: the last layer's share of the squared gradient norm, mean
    over the epochs."""
    parts = need([sweep for sweep in sweeps if "perturb" in sweep.settings and sweep.paired], "SAM with --perturb")
    groups = families([sweep for sweep in sweeps if sweep.paired], "perturb")
    groups = [group for group in groups if any(sweep in parts for sweep in group)]
    figure, axes = panels(len(groups), 2)
    colors = {"all": SAM, "rest": PINK, "last": GREEN, "random": GREY}
    for (left, right), group in zip(axes, groups):
        for sweep in group:
            part = sweep.settings.get("perturb", "all")
            color = colors.get(part, "black")
            draw_gains(left, sweep, "last", part, color)
            draw_line(right, sweep.positions, sweep.final_values("SAM", "last_layer_share"), part, color)
        most_widths = max(group, key=lambda sweep: len(sweep.positions))
        width_axis(left, most_widths)
        width_axis(right, most_widths)
        left.set_title(heading(group[0], "perturb"))
        right.set_ylabel("last layer's share (%)")
    return figure, parts


# The 12 points of the one-dimensional data
CURVE = np.arange(-5.5, 6) / 4 + 0.07, 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])


def functions(sweeps):
    """One hidden layer fitted to 12 points (black): the functions of the narrowest and the widest network, a line a
    seed; and the sum of |f''|, the total variation of the slope, by width. In curve-scaled the initial output weights
    are smaller. Where SAM's training loss is higher, a simpler function is partly a worse fit."""
    rows = [sweep for sweep in sweeps if any(sweep.final_values("SAM", "variation"))]
    need(rows, "SGD and SAM of --dataset curve")
    figure, axes = panels(len(rows), 3, sharex="col")
    for row, sweep in zip(axes, rows):
        for ax, network in zip(row, (sweep.paired[0], sweep.paired[-1])):
            for optimizer, color in BOTH.items():
                for run in network.runs(optimizer, "last").values():
                    if run.function:
                        ax.plot(run.function["x"], run.function["y"], color=color, linewidth=0.7)
            ax.plot(*CURVE, "o", color="black", markersize=3)
            ax.set_ylim(-3.5, 4)
            ax.set_title(f"{sweep.dataset}, {network.width} neurons")
        draw_final(row[2], sweep, "variation")
        row[2].set_yscale("log")
    return figure, rows


def convergence(sweeps):
    """Training loss over the epochs at a constant rate, mean over seeds, of the narrowest and the widest network; and
    how straight ln(loss) is: R^2 of its line over the epochs from the second on, by width."""
    rows = [sweep for sweep in sweeps if sweep.settings.get("schedule") == "constant" and "loss" not in sweep.settings]
    rows = need([sweep for sweep in rows if len(sweep.paired) > 1], "SGD and SAM of two widths at a constant rate")
    figure, axes = panels(len(rows), 3)
    for row, sweep in zip(axes, rows):
        for ax, network in narrow_and_wide(row, sweep):
            draw_epochs(ax, network, "train_loss")
            ax.set_yscale("log")
            ax.set_ylabel("training loss")
        draw_final(row[2], sweep, "rate_r2")
    return figure, rows


FIGURES = [
    front,
    label_noise,
    label_noise_elsewhere,
    training_length,
    gain_by_width,
    rho,
    curves,
    sharpness,
    claims,
    sparsity,
    regularization,
    depth,
    layers,
    functions,
    convergence,
]


# ======================================================================================================================
# The summary
# ======================================================================================================================


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            cells = [f"{value:.6g}" if isinstance(value, float) else value for value in row.values()]
            writer.writerow(["" if cell == "nan" else cell for cell in cells])


def rounded(row):
    """Mean and interval, to the interval's second digit and two decimals at least, and the number of seeds."""
    if not row["half_interval"] > 0:  # of one seed, chosen, or the same at all seeds
        return f"{row['mean']:.4g} ({row['seeds']})"
    digits = max(2, 1 - math.floor(math.log10(row["half_interval"])))
    mean = round(row["mean"], digits) + 0  # no -0.00
    return f"{mean:.{digits}f} ± {row['half_interval']:.{digits}f} ({row['seeds']})"


def pivot(rows, down, across):
    """Markdown tables of eight columns at most: a line for each value of the keys down, a column for each of across."""
    lines = {}
    for row in rows:
        line = lines.setdefault(tuple(str(row[key]) for key in down), {})
        line[str(row[across])] = rounded(row)
    columns = list(dict.fromkeys(str(row[across]) for row in rows))
    room = 8 - len(down)
    text = ""
    for start in range(0, len(columns), room):
        names = columns[start : start + room]
        text += f"\n| {' | '.join([*down, *names])} |\n" + "| --- " * len([*down, *names]) + "|\n"
        for key, line in lines.items():
            text += "| " + " | ".join([*key, *(line.get(name, "") for name in names)]) + " |\n"
    return text.replace("|f''|", "\\|f''\\|")


def tables(rows):
    """One sweep in summary.md: slopes and means; each width; what runs are like; the gain by rho."""
    trends = [row for row in rows if not row["width"] and row["rho"] is None]
    widths = [row for row in rows if row["width"] and row["rho"] is None]
    scores = [row for row in widths if row["measure"] in ("best rho", "SGD", "SAM", "gain")]
    others = [row for row in widths if row not in scores]
    radii = [row for row in rows if row["width"] and row["rho"] is not None]
    gains = [row for row in radii if row["measure"] == "gain" and row["rule"] == "last"]
    text = pivot(trends, ["measure"], "rule")
    text += pivot(scores, ["width", "rule"], "measure")
    text += pivot(others, ["measure", "rule"], "width")
    if gains:
        text += "\nGain after the last epoch, by rho:\n" + pivot(gains, ["width"], "rho")
    return text


def write_summary(path, rows, chapters, notes):
    """chapters: [(name of a figure, its caption, the titles of the sweeps below it)]."""
    sweeps = {}
    for row in rows:
        sweeps.setdefault(row["sweep"], []).append(row)
    text = f"# Summary\n\n{DEFINITIONS}\n"
    text += "In brackets: how many seeds, of R^2 pairs of runs. All numbers, at every rho, are in summary.csv.\n"
    for name, caption, titles in chapters:
        text += f"\n## {name}\n\n![{name}]({name}.png)\n\n{caption}\n"
        for title in titles:
            if title in sweeps:
                text += f"\n### {title}\n{tables(sweeps.pop(title))}"
    text += "\n## Sweeps below no figure\n"
    for title, own in sweeps.items():
        text += f"\n### {title}\n{tables(own)}"
    text += "\n## Left out\n\n" + "".join(f"- {note}\n" for note in notes)
    path.write_bytes(text.encode(errors="replace"))


# ======================================================================================================================
# Main
# ======================================================================================================================


def left_out(sweeps):
    """Lines about what was read and is in no comparison."""
    notes = []
    for sweep in sweeps:
        for network in sweep.networks.values():
            where = f"{sweep.title()}, width {network.width}"
            notes += [f"{where}: {note}" for note in network.notes]
            if sweep.paired and not network.sam:
                notes.append(f"{where}: SGD left out, no run of SAM")
    for family in families(sweeps, "epochs"):
        if not longest(family):
            lengths_tried = ", ".join(f"{sweep.epochs:,}" for sweep in family)
            title = family[0].title("epochs")
            notes.append(f"{title}: no run of SAM has one of SGD at its seed ({lengths_tried} epochs)")
    for family in families(sweeps, *FREE["fresh"]):
        for network in tune_widths(sweeps, family[0], "fresh"):
            where = f"{family[0].title(*FREE['fresh'])}, fresh, width {network.width}"
            notes += [f"{where}: {note}" for note in network.notes]
    return notes


def draw(sweeps, folder):
    """Saves all figures; returns their chapters for the summary, and lines about those that lack something."""
    chapters = []
    notes = []
    for make in FIGURES:
        try:
            figure, below = make(sweeps)
        except Missing as missing:
            notes.append(f"{make.__name__}.png: not drawn, needs {missing}")
            continue
        for ax in figure.axes:
            label_lines(ax)
        figure.savefig(folder / f"{make.__name__}.png")
        plt.close(figure)

        titles = []
        for sweep in below:
            titles += [sweep.title(), *(sweep.title(*free) for free in FREE.values())]
        chapters.append((make.__name__, " ".join(make.__doc__.split()), titles))
    return chapters, notes


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{DEFINITIONS}", formatter_class=formatter, allow_abbrev=False
    )
    parser.add_argument("--results", default="results", help="where the scripts put their results (default: results)")
    parser.add_argument("--figures", type=Path, default="figures", help="where the figures go (default: figures)")
    parser.error = fail
    args = parser.parse_args()

    runs, notes = read_runs(args.results)
    sweeps = build_sweeps(runs)
    if not any(sweep.paired for sweep in sweeps):
        fail(f"--results {args.results}: no run of SAM has one of SGD at the same seed; run a script first")
    notes += left_out(sweeps)
    rows = summarize(sweeps).rows
    try:
        args.figures.mkdir(parents=True, exist_ok=True)
        chapters, missing = draw(sweeps, args.figures)
        notes += missing
        write_csv(args.figures / "summary.csv", rows)
        write_summary(args.figures / "summary.md", rows, chapters, notes)
    except OSError as error:
        fail(f"--figures {args.figures}: cannot be written to ({error.strerror}); name another folder")

    notes.append(f"{args.figures}: {len(chapters)} figures, summary.md and summary.csv, from {len(runs)} runs")
    with contextlib.suppress(BrokenPipeError):  # where nobody reads on
        os.write(1, "".join(f"{note}\n" for note in notes).encode(errors="surrogateescape"))


if __name__ == "__main__":
    main()

"""Draws the figures and writes summary.md and summary.csv, from result files alone.

    python plot.py --results results --figures figures

A sweep is a set of runs that differ in width, optimizer, rho and seed alone; its title prints the other settings.
A score is larger where it is better: test accuracy in per cent, or minus the test loss where targets are numbers.
A gain is SAM's score minus SGD's at the same seed. An interval is 95%, by Student's t over seeds.
A figure is a function, listed in FIGURES at the end; its docstring is its caption in summary.md.
"""

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import textwrap
from collections import Counter
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook's shell may name one that is not installed

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.ticker import FixedLocator  # noqa: E402

# ======================================================================================================================
# Reading runs
# ======================================================================================================================

# Flags that tell no sweeps apart: what varies within a sweep or is in the model's name; where and how a run happened.
NOT_SETTINGS = {"hidden", "filters", "depth", "sparsity", "sam", "rho", "seed", "script", "sharpness"}
NOT_SETTINGS |= {"device", "workers", "results", "force", "save"}
PATHS = {"dataset", "data_dir"}  # of which ./data/mini and data/mini are one

STOPS = {"last": "last epoch", "held-out": "best held-out epoch", "paper": "best test epoch, as in the paper"}


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
        self.lr = config.get("lr")
        self.weight_decay = config.get("weight_decay")
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
            if key in PATHS:
                value = os.path.normpath(value)
                default = os.path.normpath(default)
            if value != default:
                self.settings[key] = tuple(value) if isinstance(value, list) else value
        self.network = (self.params, -self.nonzero, self.width, self.sparsity)
        self.key = (frozenset(self.settings.items()), self.network, self.sam, self.rho, self.seed)

    def set_history(self, config, result):
        self.status = result["status"]
        if self.status not in ("done", "diverged"):
            raise ValueError(f"its status is {self.status}")
        rows = result["history"]
        self.epochs = config["epochs"]
        self.history = {}
        for key in rows[0] if rows else []:
            values = np.array([row[key] for row in rows], float)
            self.history[key] = 100 * values if key.endswith("acc") else values
        if self.status == "diverged":
            return

        if len(rows) != self.epochs:
            raise ValueError(f"done, but its history has {len(rows)} epochs of {self.epochs}")
        if not all(np.isfinite(values).all() for values in self.history.values()):
            raise ValueError("done, but not all of its history is finite")
        self.metric = "acc" if "test_acc" in self.history else "loss"
        sign = 1 if self.metric == "acc" else -1
        self.test = sign * self.history[f"test_{self.metric}"]
        self.held_out = sign * self.history[f"val_{self.metric}"] if config.get("val_size") else None

        loss = self.history["train_loss"]
        self.collapsed = loss[-1] > 0.99 * loss[0] and len(loss) > 1  # has learned nothing
        self.numbers = {key: float(values[-1]) for key, values in self.history.items()}
        for key, value in (result.get("sharpness") or {}).items():
            if value is not None:
                self.numbers[key] = float(value)
        if "last_layer_share" in self.history:
            self.numbers["last_layer_share"] = 100 * self.history["last_layer_share"].mean()
        if config.get("schedule") == "constant":
            self.numbers.update(exponential_fit(loss))
        if self.function:
            self.numbers["variation"] = variation_of_slope(self.function["x"], self.function["y"])

    def epoch(self, rule):
        """Index of the epoch at which a rule stops."""
        if rule == "held-out":
            return int(self.held_out.argmax())
        if rule == "paper":
            return int(self.test.argmax())
        return -1

    def score(self, rule):
        """The test score where the rule stops."""
        return float(self.test[self.epoch(rule)])

    def choice(self, rule):
        """The score by which rho is chosen: on held-out data; on test data where there are none, and in the paper."""
        if rule == "paper" or self.held_out is None:
            return self.score(rule)
        return float(self.held_out[self.epoch(rule)])


def read_runs(folder):
    """The runs below the folder, and lines about files that can't be used; ends the program where two files disagree."""
    runs = {}
    notes = []
    for path in sorted(Path(folder).glob("*/*.json")):
        try:
            run = Run(path)
        except Exception as error:  # a foreign file may hold anything
            notes.append(f"{path}: left out, not a result file ({type(error).__name__}: {error})")
            continue
        twin = runs.setdefault(run.key, run)
        if twin is not run:
            runs[run.key] = same_run(twin, run)
    return list(runs.values()), notes


def same_run(one, other):
    """Of two files of one run the one that says more."""
    losses = [run.history.get("test_loss", ()) for run in (one, other)]
    if one.status != other.status or not np.array_equal(*losses, equal_nan=True):
        fail(f"{one.path} and {other.path} are different results of the same run; remove one of them")
    if one.status == "done" and other.numbers.get("images", 0) > one.numbers.get("images", 0):
        return other
    return one


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
    if n < 2:
        return float(values.mean()), math.nan, n
    return float(values.mean()), student_t(n - 1) * values.std(ddof=1) / math.sqrt(n), n


def difference(values, others):
    """values - others, by seed."""
    return {seed: values[seed] - others[seed] for seed in values if seed in others}


def common_seeds(points):
    """Of points (x, {seed: value}), the seeds of a trend: those that three or more share over the most x."""
    count = Counter()
    for _, values in points:
        count.update(values.keys())
    ranked = sorted(count, key=lambda seed: (-count[seed], seed))
    best = []
    most = 1
    for n in [*range(len(ranked), 2, -1), 2, 1]:
        if n < 3 and best:
            break
        seeds = ranked[:n]
        shared = {x for x, values in points if values.keys() >= set(seeds)}
        if len(shared) > most:
            best = seeds
            most = len(shared)
    return best


def trend(points):
    """Of points (x, {seed: value}), by seed: the least-squares slope over x, and the mean."""
    seeds = common_seeds(points)
    if not seeds:
        return {}, {}
    whole = [(x, values) for x, values in points if values.keys() >= set(seeds)]
    x = [x for x, _ in whole]
    y = np.array([[values[seed] for seed in seeds] for _, values in whole])
    slopes = np.polyfit(x, y, 1)[0]
    return dict(zip(seeds, slopes)), dict(zip(seeds, y.mean(axis=0)))


def straight_line(x, y):
    """Slope of y over x, and R^2."""
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1] ** 2)


def exponential_fit(loss):
    """Slope of ln(loss) per epoch and R^2, from the second epoch until float32 ends, at 1e-7 of the first loss."""
    ends = np.flatnonzero(loss <= 1e-7 * loss[0])
    end = int(ends[0]) if len(ends) else len(loss)
    if end < 4:
        return {}
    slope, r2 = straight_line(np.arange(1, end), np.log(loss[1:end]))
    return {"rate": slope, "rate_r2": r2}


def variation_of_slope(x, y):
    """Sum of |f''|: the total variation of the slope of a function on a grid."""
    return float(np.abs(np.diff(np.diff(y) / np.diff(x))).sum())


# ======================================================================================================================
# Pairing
# ======================================================================================================================

VARIANT = ("adaptive", "perturb")  # settings of SAM alone
TRAINING = {"lr", "weight_decay", "momentum", "schedule", "warmup", "loss"}
DATASETS = {"mnist": "MNIST", "fashionmnist": "Fashion-MNIST", "kmnist": "KMNIST", "svhn": "SVHN"}
DATASETS |= {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "data/cifar10-jpeg": "CIFAR-10 (JPEG copy)"}
UNITS = {"epochs": "epochs", "train_size": "images", "val_size": "held out"}


class Network:
    """The runs of one width: SGD's by seed, SAM's by rho and seed."""

    def __init__(self, run, by_depth):
        self.key = run.network
        self.width = f"{run.width} at {run.sparsity:g}" if run.sparsity else run.width
        self.params = run.params
        self.nonzero = run.nonzero
        self.layers = len(run.layers)
        self.x = self.layers if by_depth else math.log10(self.params)  # a slope is per layer, or per tenfold parameters
        self.sgd = {}
        self.sam = {}

    def add(self, run):
        runs = self.sam.setdefault(run.rho, {}) if run.sam else self.sgd
        runs[run.seed] = run

    def pair(self):
        """Keeps what can be compared: radii at which no seed diverged, at seeds that SGD has, too."""
        self.diverged = {}
        self.whole = {}
        for rho, runs in sorted(self.sam.items()):
            count = sum(run.status == "diverged" for run in runs.values())
            if count:
                self.diverged[rho] = f"{count} of {len(runs)}"
            else:
                self.whole[rho] = runs
        self.sgd = {seed: run for seed, run in self.sgd.items() if run.status == "done"}
        self.sam = {}
        for rho, runs in self.whole.items():
            self.sam[rho] = {seed: run for seed, run in runs.items() if seed in self.sgd}
        self.radii, self.seeds = comparable(self.sam)

    def best_rho(self, rule):
        return best_rho([self], rule)

    def pairs(self, rule, rho=None):
        """(SGD's run, SAM's run) of each seed, at this rho or the best."""
        runs = self.sam.get(self.best_rho(rule) if rho is None else rho, {})
        return [(self.sgd[seed], run) for seed, run in runs.items()]

    def gains(self, rule, rho=None):
        return {sgd.seed: sam.score(rule) - sgd.score(rule) for sgd, sam in self.pairs(rule, rho)}

    def scores(self, optimizer, rule, rho=None):
        return {run.seed: run.score(rule) for run in self.runs(optimizer, rule, rho)}

    def numbers(self, optimizer, name, rho=None):
        """{seed: number after training}, such as train_loss or lambda_max, of the runs that have it."""
        runs = self.runs(optimizer, "last", rho)
        return {run.seed: run.numbers[name] for run in runs if name in run.numbers}

    def runs(self, optimizer, rule, rho=None):
        return [sgd if optimizer == "SGD" else sam for sgd, sam in self.pairs(rule, rho)]


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


def best_rho(networks, rule):
    """The rho that is best in the mean over the networks and the seeds that their radii share; None: none is in all."""
    radii = set.intersection(*(set(network.radii) for network in networks))
    means = {}
    for rho in sorted(radii):
        scores = []
        for network in networks:
            scores += [network.sam[rho][seed].choice(rule) for seed in network.seeds]
        means[rho] = np.mean(scores)
    return max(means, key=means.get, default=None)


class Sweep:
    """Runs that differ in width (or depth, or sparsity), optimizer, rho and seed alone."""

    def __init__(self, settings):
        self.settings = settings
        self.dataset = settings["dataset"]
        self.model = settings["model"]
        self.noise = settings["noise"]
        self.pruner = settings["pruner"]
        self.by_depth = self.model.startswith("MLP of layers of")
        self.standard = not self.by_depth and settings.keys().isdisjoint(TRAINING.union(VARIANT))
        self.networks = {}
        self.metric = "acc"
        self.rules = []

    def add(self, run):
        if run.network not in self.networks:
            self.networks[run.network] = Network(run, self.by_depth)
        self.networks[run.network].add(run)
        self.epochs = run.epochs
        if run.status == "done":
            self.metric = run.metric
            self.rules = ["last", "paper"] if run.held_out is None else ["last", "held-out", "paper"]

    def pair(self):
        self.networks = dict(sorted(self.networks.items()))
        for network in self.networks.values():
            network.pair()
        self.paired = [network for network in self.networks.values() if network.radii]
        self.radii = sorted(set().union(*(network.radii for network in self.paired)))

    def without(self, *names):
        return {key: value for key, value in self.settings.items() if key not in names}

    def title(self, *without):
        settings = self.without("dataset", "model", "noise", "pruner", *without)
        parts = [DATASETS.get(self.dataset, self.dataset), self.model]
        if "noise" in without:
            parts.append("all rates of flipped labels")
        elif self.noise:
            parts.append(f"{100 * self.noise:g}% flipped")
        if self.pruner:
            parts.append(f"pruned ({self.pruner})")
        for key, value in settings.items():
            if key in UNITS:
                parts.append(f"{value:,} {UNITS[key]}")
            else:
                parts.append(f"{key.replace('_', ' ')} {value}")
        return ", ".join(parts).encode(errors="replace").decode()

    def twin(self, network):
        """The network here that has as many weights which are not pruned, within 5%, or None."""
        near = [other for other in self.paired if 0.95 < network.nonzero / other.nonzero < 1.05]
        return min(near, key=lambda other: abs(other.nonzero - network.nonzero), default=None)


def build_sweeps(runs):
    sweeps = {}
    for run in runs:
        for model in run.models:
            settings = {**run.settings, "model": model}
            key = frozenset(settings.items())
            if key not in sweeps:
                sweeps[key] = Sweep(settings)
            sweeps[key].add(run)

    for sweep in sweeps.values():  # SGD's runs are shared by all variants of SAM
        plain = sweeps.get(frozenset(sweep.without(*VARIANT).items()))
        for key, network in sweep.networks.items():
            if plain and key in plain.networks:
                network.sgd = plain.networks[key].sgd
    for sweep in sweeps.values():
        sweep.pair()
    return drop_single(list(sweeps.values()))


def drop_single(sweeps):
    """Without the sweeps of equal layers that have one network, where it has company in another sweep."""
    deep = set()
    for sweep in sweeps:
        if sweep.by_depth and len(sweep.networks) > 1:
            deep.update(sweep.networks)
    kept = []
    for sweep in sweeps:
        single = len(sweep.networks) == 1
        if not (single and (sweep.by_depth or deep.issuperset(sweep.networks))):
            kept.append(sweep)
    return sorted(kept, key=lambda sweep: (sweep.noise, sweep.title("epochs"), sweep.epochs))


def families(sweeps, *free):
    """Lists of the sweeps that differ in these settings alone, such as "epochs"."""
    found = {}
    for sweep in sweeps:
        found.setdefault(frozenset(sweep.without(*free).items()), []).append(sweep)
    return list(found.values())


def longest(family):
    """Of sweeps that differ in epochs, the longest that has both SGD and SAM, or None."""
    return max((sweep for sweep in family if sweep.paired), key=lambda sweep: sweep.epochs, default=None)


# ======================================================================================================================
# SGD and SAM, each at its best settings
# ======================================================================================================================

FREE = {"tuned": ("epochs",), "fresh": ("epochs", "lr", "weight_decay")}


class Tuned:
    """SGD and SAM at one width, each with the settings that are best on held-out data, at its best held-out epoch.

    tried: {(optimizer, epochs, rho, lr, weight decay): {seed: run}}; seeds to choose on; whether to score the others.
    """

    def __init__(self, tried, choosing, fresh=False):
        self.choosing = choosing
        self.tried = Counter(name[0] for name in tried)
        self.chosen = {"SGD": {}, "SAM": {}}
        best = {"SGD": -math.inf, "SAM": -math.inf}
        for name, runs in sorted(tried.items()):
            optimizer = name[0]
            score = np.mean([runs[seed].choice("held-out") for seed in choosing])
            if score > best[optimizer]:
                best[optimizer] = score
                self.chosen[optimizer] = runs
        both = self.chosen["SGD"].keys() & self.chosen["SAM"].keys()
        self.seeds = sorted(both - set(choosing) if fresh else both & set(choosing))

    def scores(self, optimizer):
        return {seed: self.chosen[optimizer][seed].score("held-out") for seed in self.seeds}

    def gains(self):
        return difference(self.scores("SAM"), self.scores("SGD"))

    def run(self, optimizer):
        return self.chosen[optimizer][self.seeds[0]]


def settings_tried(sweeps, sweep, key, free):
    """What was tried at one width, by sweeps that differ from this one in the free settings alone, as Tuned takes it."""
    tried = {}
    for other in sweeps:
        network = other.networks.get(key)
        if network is None:
            continue
        rest = other.without(*free)
        if rest == sweep.without(*free, *VARIANT):
            add_settings(tried, "SGD", 0.0, network.sgd)
        if rest == sweep.without(*free):
            for rho, runs in network.whole.items():
                add_settings(tried, "SAM", rho, runs)
    return tried


def add_settings(tried, optimizer, rho, runs):
    if runs:
        run = next(iter(runs.values()))
        tried[optimizer, run.epochs, rho, run.lr, run.weight_decay] = runs


def tuned(sweeps, sweep, key, sam_epochs=math.inf, sgd_epochs=math.inf):
    """Each at its best number of epochs, SAM at its best rho, on the seeds that all of these share; or None."""
    longest_allowed = {"SGD": sgd_epochs, "SAM": sam_epochs}
    tried = settings_tried(sweeps, sweep, key, FREE["tuned"])
    tried = {name: runs for name, runs in tried.items() if name[1] <= longest_allowed[name[0]]}
    names, seeds = comparable(tried)
    if not seeds or "held-out" not in sweep.rules:
        return None
    found = Tuned({name: tried[name] for name in names}, seeds)
    return found if found.seeds and found.tried["SGD"] > 1 else None


def fresh(sweeps, sweep, key):
    """Each at its best epochs, rate, decay and rho, chosen on the seeds that most settings have, and scored on others.

    Settings that lack one of these seeds are left out of the choice. None where nothing is left to score.
    """
    tried = settings_tried(sweeps, sweep, key, FREE["fresh"])
    count = Counter()
    for runs in tried.values():
        count.update(runs.keys())
    seeds = {seed for seed, settings in count.items() if 2 * settings > len(tried)}
    complete = {name: runs for name, runs in tried.items() if runs.keys() >= seeds}
    if not seeds or not complete or "held-out" not in sweep.rules:
        return None
    found = Tuned(complete, sorted(seeds), fresh=True)
    found.left_out = sorted(tried.keys() - complete.keys())
    return found if found.seeds else None


# ======================================================================================================================
# Numbers: the rows of summary.csv
# ======================================================================================================================

NUMBERS = {
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


class Table(list):
    """Rows of summary.csv."""

    def add(self, title, rule, measure, result, network=None, rho=""):
        """result: {seed: value}, to be averaged, left out where empty; or (number, how many seeds it was chosen on)."""
        if not result:
            return
        mean, half, seeds = interval(result) if isinstance(result, dict) else (result[0], math.nan, result[1])
        width = network.width if network else ""
        params = network.params if network else ""
        self.append(dict(zip(COLUMNS, [title, width, params, rho, rule, measure, mean, half, seeds])))

    def find(self, **wanted):
        """The rows over all widths that have these values."""
        wanted["width"] = ""
        return [row for row in self if all(row[key] == value for key, value in wanted.items())]

    def add_points(self, title, rule, measure, points, rho=""):
        """A row for each (network, {seed: value}), and for the slope and the mean over the widths."""
        for network, values in points:
            self.add(title, rule, measure, values, network, rho)
        slopes, means = trend([(network.x, values) for network, values in points])
        name = "the gain" + measure[4:] if measure.startswith("gain") else measure
        self.add(title, rule, f"slope of {name}", slopes, rho=rho)
        self.add(title, rule, f"mean {measure}", means, rho=rho)


@functools.cache
def all_numbers(sweeps):
    table = Table()
    for sweep in sweeps:
        if sweep.paired:
            add_training(table, sweep)
            add_equal_gradients(table, sweeps, sweep)
            for rule in sweep.rules:
                add_scores(table, sweep, rule)
                add_contrasts(table, sweeps, sweep, rule)
    for rule, free in FREE.items():
        less_noise = {}
        for family in families(sweeps, *free):  # in the order of their noise
            found = tune_widths(sweeps, family, rule)
            add_tuned(table, family[0].title(*free), rule, found)
            rest = frozenset(family[0].without("noise", *free).items())
            add_tuned_contrast(table, family[0].title(*free), rule, found, less_noise.get(rest, []))
            less_noise[rest] = found
    for free in (["epochs"], ["epochs", "noise"]):
        for family in families([sweep for sweep in sweeps if sweep.noise], *free):
            add_label_fit(table, family, family[0].title(*free))
    return table


def add_scores(table, sweep, rule):
    title = sweep.title()
    for network in sweep.paired:
        table.add(title, rule, "best rho", (network.best_rho(rule), len(network.seeds)), network)
    one = best_rho(sweep.paired, rule)
    if one is not None:
        table.add(title, rule, "best rho of all widths", (one, len(sweep.paired[0].seeds)))

    for optimizer in ("SGD", "SAM"):
        points = [(network, network.scores(optimizer, rule)) for network in sweep.paired]
        table.add_points(title, rule, optimizer, points)
    for rho in [None, *sweep.radii]:
        points = [(network, network.gains(rule, rho)) for network in sweep.paired]
        table.add_points(title, rule, "gain", points, "" if rho is None else rho)


def add_training(table, sweep):
    """What runs are like after training: at each width's best rho by the last epoch, and SAM's at every rho."""
    title = sweep.title()
    for network in sweep.paired:
        for name, measure in NUMBERS.items():
            table.add(title, "last", f"{measure} of SGD", network.numbers("SGD", name), network)
            table.add(title, "last", f"{measure} of SAM", network.numbers("SAM", name), network)
            for rho in network.radii:
                table.add(title, "last", f"{measure} of SAM", network.numbers("SAM", name, rho), network, rho)


def add_contrasts(table, sweeps, sweep, rule):
    """A sweep's gains beside those of less noise, of the default weight decay, of dense networks with as many weights."""
    others = {}
    for other in sweeps:  # in the order of their noise
        if other.paired and other.noise < sweep.noise and other.without("noise") == sweep.without("noise"):
            others["that at less noise"] = other
        if "weight_decay" in sweep.settings and other.settings == sweep.without("weight_decay"):
            others["that at the default weight decay"] = other
        if sweep.pruner and other.settings == {**sweep.settings, "pruner": None}:
            others["that of dense networks"] = other
    for name, other in others.items():
        points = []
        for network in sweep.paired:
            twin = other.twin(network)
            if twin:
                points.append((network, difference(network.gains(rule), twin.gains(rule))))
        table.add_points(sweep.title(), rule, f"gain - {name}", points)


def add_equal_gradients(table, sweeps, sweep):
    """SAM beside SGD of up to twice the epochs, which takes as many gradients, where it was run."""
    title = sweep.title()
    for twice in sweeps:
        if twice.epochs != 2 * sweep.epochs or twice.without("epochs") != sweep.without("epochs", *VARIANT):
            continue
        networks = [network for network in sweep.paired if network.key in twice.networks]
        for rule in sweep.rules:
            points = []
            for network in networks:
                sgd = {seed: run.score(rule) for seed, run in twice.networks[network.key].sgd.items()}
                points.append((network, difference(network.scores("SAM", rule), sgd)))
            table.add_points(title, rule, "gain over SGD of twice the epochs", points)
        points = []
        for network in networks:
            best = tuned(sweeps, sweep, network.key, sweep.epochs, twice.epochs)
            if best:
                points.append((network, best.gains()))
        table.add_points(title, "held-out", "gain at equal gradients", points)


def tune_widths(sweeps, family, rule):
    """[(network, Tuned)], of a family of sweeps that differ in what the rule leaves free."""
    networks = {}
    for sweep in family:
        for network in sweep.paired:
            networks[network.key] = network
    found = []
    for key in sorted(networks):
        best = tuned(sweeps, family[0], key) if rule == "tuned" else fresh(sweeps, family[0], key)
        if best:
            found.append((networks[key], best))
    return found


def add_tuned(table, title, rule, found):
    for network, best in found:
        seeds = len(best.choosing)
        table.add(title, rule, "best rho", (best.run("SAM").rho, seeds), network)
        for optimizer in ("SGD", "SAM"):
            run = best.run(optimizer)
            table.add(title, rule, f"settings of {optimizer}", (best.tried[optimizer], seeds), network)
            table.add(title, rule, f"epochs of {optimizer}", (run.epochs, seeds), network)
            if rule == "fresh":
                table.add(title, rule, f"lr of {optimizer}", (run.lr, seeds), network)
                table.add(title, rule, f"weight decay of {optimizer}", (run.weight_decay, seeds), network)
    for optimizer in ("SGD", "SAM"):
        table.add_points(title, rule, optimizer, [(network, best.scores(optimizer)) for network, best in found])
    table.add_points(title, rule, "gain", [(network, best.gains()) for network, best in found])


def add_tuned_contrast(table, title, rule, found, less_noise):
    gains = {network.key: best.gains() for network, best in less_noise}
    points = []
    for network, best in found:
        if network.key in gains:
            points.append((network, difference(best.gains(), gains[network.key])))
    table.add_points(title, rule, "gain - that at less noise", points)


def label_fit(networks):
    """Of each pair of runs after the last epoch: SGD's accuracy on the given labels minus SAM's; the gain."""
    x = []
    y = []
    for network in networks:
        for sgd, sam in network.pairs("last"):
            x.append(sgd.numbers["train_acc"] - sam.numbers["train_acc"])
            y.append(sam.score("last") - sgd.score("last"))
    return x, y


def add_label_fit(table, sweeps, title):
    networks = []
    for sweep in sweeps:
        networks += sweep.paired
    x, y = label_fit(networks)
    if len(x) > 2:
        slope, r2 = straight_line(x, y)
        table.add(title, "last", "slope of the gain over the difference of training accuracies", (slope, len(x)))
        table.add(title, "last", "R^2 of the gain and the difference of training accuracies", (r2, len(x)))


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

plt.rcParams.update(
    {"font.size": 8, "axes.titlesize": 8, "figure.titlesize": 8, "lines.markersize": 4, "xtick.labelsize": 7}
)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 200})


class Missing(Exception):
    """What a figure needs and the results lack."""


def need(found, what):
    if not found:
        raise Missing(what)
    return found


def panels(rows, columns, heading, **sharing):
    """A figure of panels of 7 by 5.5 cm; axes is a list of rows."""
    size = (2.75 * columns, 2.2 * rows + 0.25)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **sharing)
    if heading:
        figure.suptitle(plain(heading))
    return figure, axes


def plain(text):
    """A title of lines that a panel has room for, without mathematics in a folder's name."""
    return textwrap.fill(text.replace("$", r"\$"), 42)


def draw_line(ax, points, label, color, style="-"):
    """Means and intervals of points (x, {seed: value}); fewer than three seeds: hollow, without interval, dotted."""
    points = [(x, values) for x, values in points if values]
    if not points:
        return
    x = [x for x, _ in points]
    means, halves, seeds = zip(*[interval(values) for _, values in points])
    firm = [n >= 3 for n in seeds]
    ax.plot(x, means, ":", color=color, linewidth=1, label=label)
    ax.plot(x, means, "o", color=color, markerfacecolor="white")
    if any(firm):
        x, means, halves = np.compress(firm, [x, means, halves], axis=1)
        ax.errorbar(x, means, halves, fmt="o" + style, color=color, elinewidth=1)


def label_lines(ax):
    """Writes each line's label beside its last point, in its colour, moved apart where labels would overlap."""
    ax.autoscale_view()  # which sets the limits that the heights are in
    ends = []
    for line in ax.lines:
        if not line.get_label().startswith("_"):
            x, y = line.get_xydata()[-1]
            height = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[1]
            ends.append((height, line))

    lowest = -math.inf
    for height, line in sorted(ends, key=lambda end: end[0]):
        half = 0.05 * (1 + line.get_label().count("\n"))
        height = max(height, lowest + half)
        lowest = height + half
        ax.text(1.02, height, line.get_label(), color=line.get_color(), va="center", transform=ax.transAxes)


def width_axis(ax, sweep):
    """Names the widths by their parameters, such as 61k; by their layers in a sweep by depth."""
    if sweep.by_depth:
        ax.set_xticks([network.layers for network in sweep.paired])
        ax.set_xlabel("hidden layers")
        return
    params = [network.params for network in sweep.paired]
    ax.set_xscale("log")
    ax.set_xlabel("parameters")
    if len(params) < 8:
        ax.set_xticks(params, [short(count) for count in params])
        ax.minorticks_off()


def short(count):
    """61035 as 61k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 3}g}{letter}"
    return str(count)


def by_width(sweep, values):
    """Points to draw: (parameters, or layers; values(network)) of each width."""
    points = []
    for network in sweep.paired:
        points.append((network.layers if sweep.by_depth else network.params, values(network)))
    return points


# ======================================================================================================================
# The figures. Each takes all sweeps and returns the picture and the sweeps whose numbers stand below it in summary.md.
# ======================================================================================================================


def front(sweeps):
    """Half of the training labels flipped, MNIST. Left: test accuracy after the last epoch, of SGD and SAM at the
    longest training, and of SGD at the number of epochs that is best for it on held-out data. Middle: SAM's gain after
    the last epoch, where each run stops at its best held-out epoch, and where SGD and SAM also have the number of
    epochs that is best for each (the axis is logarithmic above 1). Right: the gain after the last epoch, by how much
    better SGD fits the given, partly wrong labels than SAM: a mark a rate, length and width (the larger, the wider),
    mean over seeds. Bars: 95% intervals over seeds. rho is chosen for each width on held-out data."""
    noisy = [sweep for sweep in sweeps if sweep.dataset == "mnist" and sweep.noise and sweep.standard and sweep.paired]
    half = [sweep for sweep in sweeps if sweep.dataset == "mnist" and sweep.noise == 0.5 and sweep.standard]
    half = [sweep for sweep in half if sweep.model.startswith("MLP")]
    family = max(families(half, "epochs"), key=len, default=[])
    sweep = need(longest(family), "SGD and SAM of MLPs on MNIST with half of the labels flipped")

    figure, (axes,) = panels(1, 3, sweep.title("epochs", "val_size"))
    draw_accuracy(axes[0], family)
    draw_gains(axes[1], sweeps, family)
    draw_label_fit(axes[2], noisy)
    axes[0].set_title("Test accuracy (%)")
    axes[1].set_title("Gain of SAM over SGD (points)")
    axes[2].set_title("Gain after the last epoch (points)")
    return figure, []


def draw_accuracy(ax, family):
    """Scores by width at the longest training that both have, and SGD's at its best number of epochs."""
    sweep = longest(family)
    short_sgd = best_length(family, sweep)
    sgd = by_width(sweep, lambda network: network.scores("SGD", "last"))
    sam = by_width(sweep, lambda network: network.scores("SAM", "last"))
    draw_line(ax, sgd, f"SGD,\n{sweep.epochs} epochs", SGD)
    draw_line(ax, sam, f"SAM,\n{sweep.epochs} epochs", SAM)
    if short_sgd is not sweep:
        points = []
        for network in sweep.paired:
            runs = short_sgd.networks[network.key].sgd.values()
            points.append((network.params, {run.seed: run.score("last") for run in runs}))
        draw_line(ax, points, f"SGD,\n{short_sgd.epochs} epochs", SGD, "--")
    width_axis(ax, sweep)


def best_length(family, sweep):
    """The sweep of the family at whose number of epochs SGD is best after the last, on held-out data, over the widths."""
    means = {}
    for other in family:
        scores = []
        for network in sweep.paired:
            if network.key in other.networks:
                runs = other.networks[network.key].sgd.values()
                scores.append(np.mean([run.choice("last") for run in runs]))
        if len(scores) == len(sweep.paired):
            means[other] = np.mean(scores)
    return max(means, key=means.get)


def draw_gains(ax, sweeps, family):
    """Gains by width: by when training stops, and with settings that are best for each."""
    sweep = longest(family)
    draw_line(ax, by_width(sweep, lambda network: network.gains("last")), "last epoch", SAM)
    if "held-out" in sweep.rules:
        draw_line(ax, by_width(sweep, lambda network: network.gains("held-out")), "best held-\nout epoch", YELLOW)
    labels = {
        "tuned": ("each at its best\nnumber of epochs", GREEN),
        "fresh": ("also rate and decay,\nfresh seeds", GREY),
    }
    for rule, (label, color) in labels.items():
        found = tune_widths(sweeps, family, rule)
        draw_line(ax, [(network.params, best.gains()) for network, best in found], label, color)
    ax.set_yscale("symlog", linthresh=1)
    ax.yaxis.set_major_locator(FixedLocator([-10, -3, -1, 0, 1, 3, 10, 30]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.axhline(0, color="black", linewidth=0.6)
    width_axis(ax, sweep)


def draw_label_fit(ax, sweeps):
    """Marks: the mean over seeds of the gain, by the difference of SGD's and SAM's accuracies on the given labels."""
    colors = {0.25: BLUE, 0.5: PINK, 0.75: GREY}
    for sweep in sweeps:
        for network in sweep.paired:
            x, y = label_fit([network])
            color = colors.get(sweep.noise, "black")
            face = color if sweep.model.startswith("MLP") else "white"
            size = 8 * (math.log10(network.params) - 3.5) ** 2
            ax.scatter(np.mean(x), np.mean(y), size, face, edgecolors=color, linewidths=0.8)
    for line, noise in enumerate(sorted({sweep.noise for sweep in sweeps})):
        text = f"{100 * noise:g}% flipped"
        ax.text(0.04, 0.94 - 0.09 * line, text, color=colors.get(noise, "black"), transform=ax.transAxes)
    if any(not sweep.model.startswith("MLP") for sweep in sweeps):
        ax.text(0.98, 0.04, "hollow: ResNet-18", ha="right", transform=ax.transAxes)
    ax.set_xlabel("SGD's accuracy on the given labels\nminus SAM's (points)")


def label_noise(sweeps):
    """MNIST, a row a rate of flipped labels. Left: test accuracy after the last epoch, of SGD and SAM at the longest
    training, and of SGD at the number of epochs that is best for it on held-out data. Right: SAM's gain after the last
    epoch, at each run's best held-out epoch (held-out labels are clean), and where each also has its best number of
    epochs; the axis is logarithmic above 1. rho is chosen for each width on held-out data."""
    noisy = [sweep for sweep in sweeps if sweep.noise and sweep.standard]
    return noise_rows(sweeps, [sweep for sweep in noisy if sweep.dataset == "mnist" and sweep.model[:3] == "MLP"])


def label_noise_elsewhere(sweeps):
    """Flipped labels with other data and models, drawn as in label_noise.png. Hollow marks and dotted lines: fewer than
    three seeds, so no interval."""
    noisy = [sweep for sweep in sweeps if sweep.noise and sweep.standard]
    return noise_rows(sweeps, [sweep for sweep in noisy if sweep.dataset != "mnist" or sweep.model[:3] != "MLP"])


def noise_rows(sweeps, noisy):
    rows = [family for family in families(noisy, "epochs") if longest(family)]
    need(rows, "SGD and SAM with flipped labels, at the default rate, decay, schedule and loss")
    figure, axes = panels(len(rows), 2, "", sharey="col")
    for (left, right), family in zip(axes, rows):
        draw_accuracy(left, family)
        draw_gains(right, sweeps, family)
        left.set_title(plain(family[0].title("epochs", "val_size")), loc="left")
        left.set_ylabel("test accuracy (%)")
        right.set_ylabel("gain (points)")
    used = [sweep for family in rows for sweep in family if sweep.paired]
    return figure, used


PAPER = {  # parameters: gain, in points (teacher: in test loss), read off the paper's figures to about 0.01
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
NOT_TRAINING = {"dataset", "model", "noise", "pruner", "data_dir", "val_size", "image_size", "amp", "compile", "fp32"}


def paper_gains(sweep):
    """The paper's {parameters: gain}, where the settings are its own but for held-out data and arithmetic."""
    dataset = os.path.basename(sweep.dataset).replace("-jpeg", "")
    if sweep.noise or sweep.pruner or not sweep.settings.keys() <= NOT_TRAINING:
        return {}
    return PAPER.get((dataset, sweep.model), {})


def gain_by_width(sweeps):
    """Clean labels, after the last epoch. Above: SAM's gain over SGD by width (of a regression: in test loss), beside
    the paper's gains where the settings are its own. Below: the scores; of a regression minus the test loss, where the
    dashed lines are the noise of the targets and the best constant. Bars: 95% intervals, of three seeds or more; hollow
    marks have fewer, and the bold line leaves them out."""
    clean = [sweep for sweep in sweeps if not sweep.noise and not sweep.pruner and sweep.standard]
    clean = [longest(family) for family in families(clean, "epochs") if longest(family)]
    clean = [sweep for sweep in clean if not sweep.dataset.startswith("curve")]
    need(clean, "SGD and SAM on clean labels, at the default rate, decay, schedule and loss")
    figure, axes = panels(2, len(clean), "", sharex="col")
    for gains, scores, sweep in zip(*axes, clean):
        draw_line(gains, by_width(sweep, lambda network: network.gains("last")), "here", SAM)
        paper = paper_gains(sweep)
        gains.plot(paper.keys(), paper.values(), "x--", color=GREY, linewidth=1, label="paper" if paper else "_")
        gains.axhline(0, color="black", linewidth=0.6)
        gains.set_title(plain(sweep.title("val_size")))
        gains.set_ylabel("gain (points)" if sweep.metric == "acc" else "gain in test loss")
        draw_line(scores, by_width(sweep, lambda network: network.scores("SGD", "last")), "SGD", SGD)
        draw_line(scores, by_width(sweep, lambda network: network.scores("SAM", "last")), "SAM", SAM)
        scores.set_ylabel("test accuracy (%)" if sweep.metric == "acc" else "minus the test loss")
        if sweep.dataset == "teacher":
            scores.axhline(-1, linestyle="--", color=GREY, linewidth=0.8)
            scores.axhline(-1.306, linestyle="--", color=GREY, linewidth=0.8)
        width_axis(scores, sweep)
    return figure, clean


def rho(sweeps):
    """Score after the last epoch by SAM's rho (0: SGD), a line a width, means over the seeds that all radii share; a
    ring marks the rho that is chosen on held-out data, where three or more were tried. Above a rho: how many runs
    learned nothing there, by width. Lines are labelled at the narrowest and the widest network."""
    shown = [sweep for sweep in sweeps if sweep.standard and not sweep.pruner and not sweep.dataset.startswith("curve")]
    shown = [longest(family) for family in families(shown, "epochs") if longest(family)]
    need(shown, "SGD and SAM at the default rate, decay, schedule and loss")
    columns = min(3, len(shown))
    figure, axes = panels(math.ceil(len(shown) / columns), columns, "")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, sweep in zip(axes.flat, shown):
        for network in sweep.paired:
            draw_by_rho(ax, sweep, network)
        count_collapsed(ax, sweep)
        ax.set_xticks(range(1 + len(sweep.radii)), ["SGD", *(f"{rho:g}" for rho in sweep.radii)])
        ax.set_xlabel("rho")
        ax.set_title(plain(sweep.title("val_size", "batch_size")), pad=20)
        ax.set_ylabel("test accuracy (%)" if sweep.metric == "acc" else "minus the test loss")
    return figure, shown


def draw_by_rho(ax, sweep, network):
    """One width's scores by the place of rho among the sweep's radii, SGD's at 0."""
    color = width_color(sweep, network)
    x = [0]
    y = [np.mean([network.sgd[seed].score("last") for seed in network.seeds])]
    for rho in network.radii:
        runs = network.sam[rho]
        x.append(1 + sweep.radii.index(rho))
        y.append(np.mean([runs[seed].score("last") for seed in network.seeds]))
        if rho == network.best_rho("last") and len(network.radii) > 2:
            ax.plot(x[-1], y[-1], "o", markersize=8, markerfacecolor="none", color=SAM)
    end = network in (sweep.paired[0], sweep.paired[-1])
    ax.plot(x, y, "o-", color=color, linewidth=1, label=short(network.params) if end else "_")


def count_collapsed(ax, sweep):
    """Above each rho at which runs learned nothing: how many did, by width."""
    for place, rho in enumerate(sweep.radii, start=1):
        groups = [network.sam[rho].values() for network in sweep.paired if rho in network.radii]
        counts = [sum(run.collapsed for run in runs) for runs in groups]
        if any(counts):
            text = " ".join(map(str, counts)) + f"\nof {max(map(len, groups))}"
            ax.text(place, 1.01, text, fontsize=6, ha="center", transform=ax.get_xaxis_transform())


def width_color(sweep, network):
    """From dark, the narrowest, to light green, the widest; no yellow on white."""
    place = sweep.paired.index(network) / max(1, len(sweep.paired) - 1)
    return plt.colormaps["viridis"](0.75 * place)


def curves(sweeps):
    """MNIST with flipped labels: test accuracy over the epochs at the longest training, mean over seeds; above the
    narrowest network, below the widest. rho is the one that is best after the last epoch, on held-out data."""
    noisy = [sweep for sweep in sweeps if sweep.noise and sweep.standard and sweep.dataset == "mnist"]
    noisy = [sweep for sweep in noisy if sweep.model.startswith("MLP")]
    noisy = [longest(family) for family in families(noisy, "epochs") if longest(family)]
    need(noisy, "SGD and SAM of MLPs on MNIST with flipped labels")
    figure, axes = panels(2, len(noisy), "", sharex=True, sharey="row")
    for column, sweep in zip(axes.T, noisy):
        for ax, network in zip(column, (sweep.paired[0], sweep.paired[-1])):
            draw_epochs(ax, network, "test")
            ax.set_title(f"{100 * sweep.noise:g}% flipped, {short(network.params)} parameters")
        column[1].set_xlabel("epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy (%)")
    return figure, []


def draw_epochs(ax, network, key):
    """SGD's and SAM's means over the seeds by epoch: of the test score, or of the training loss."""
    for optimizer, color in (("SGD", SGD), ("SAM", SAM)):
        runs = network.runs(optimizer, "last")
        values = [run.test if key == "test" else run.history[key] for run in runs]
        mean = np.mean(values, axis=0)
        ax.plot(np.arange(len(mean)) + 1, mean, color=color, linewidth=1.2, label=optimizer)


def sharpness(sweeps):
    """Largest eigenvalue of the Hessian on some training images, its non-uniformity s2, and the training loss, by SAM's
    rho (0: SGD), a line a width; a row a workload. Dashed, for squared loss at a constant rate: the paper's bounds,
    which are for un-normalized SAM at batch size 1 and so only a reference. Where the training losses differ, two
    optimizers are compared at different distances from a minimum."""
    shown = [sweep for sweep in sweeps if any(network.numbers("SGD", "lambda_max") for network in sweep.paired)]
    need(shown, "runs of SGD and SAM with --sharpness")
    figure, axes = panels(len(shown), 3, "")
    for row, sweep in zip(axes, shown):
        for ax, name in zip(row, ("lambda_max", "s2", "train_loss")):
            for network in sweep.paired:
                points = [(0, network.numbers("SGD", name))]
                for rho in network.radii:
                    points.append((1 + sweep.radii.index(rho), network.numbers("SAM", name, rho)))
                if network.numbers("SGD", "lambda_max"):
                    draw_line(ax, points, short(network.params), width_color(sweep, network))
            ax.set_xticks(range(1 + len(sweep.radii)), ["SGD", *(f"{rho:g}" for rho in sweep.radii)])
            ax.set_xlabel("rho")
            ax.set_title(NUMBERS[name])
        row[0].set_title(f"{plain(sweep.title('val_size'))}\n{NUMBERS['lambda_max']}")
        if sweep.settings.get("schedule") == "constant" and sweep.settings.get("loss") == "mse":
            draw_bounds(row[0], row[1], sweep)
    return figure, shown


def draw_bounds(sharpness, spread, sweep):
    """The bounds of the paper's Theorem 6.3: a (1 + rho a) <= 2 / lr; s2^2 <= 1 / (lr (lr - 2 rho)), void from lr / 2."""
    lr = next(iter(sweep.paired[0].sgd.values())).lr
    x = range(1 + len(sweep.radii))
    radii = np.array([0, *sweep.radii])
    sharpness.plot(x, 4 / lr / (1 + np.sqrt(1 + 8 * radii / lr)), "--", color=GREY, label="bound")
    slack = lr * (lr - 2 * radii)
    spread.plot(x, np.where(slack > 0, np.abs(slack) + 1e-30, np.nan) ** -0.5, "--", color=GREY, label="bound")


def claims(sweeps):
    """One line a claim, in points of test accuracy: the mean over seeds and its 95% interval, filled where the interval
    excludes zero. Slopes are per tenfold parameters, for depth per layer. Stopping rules: the last epoch; each run's best
    held-out epoch; tuned, where SGD and SAM also have the number of epochs that is best for each; fresh, where they also
    have the best rate and decay and are scored on other seeds. The axis is logarithmic beyond 1."""
    accuracies = [sweep for sweep in sweeps if sweep.paired and sweep.metric == "acc"]
    main = [longest(family) for family in families(accuracies, "epochs")]
    main = [sweep for sweep in main if sweep.standard and not sweep.pruner]
    deep = [sweep for sweep in accuracies if sweep.by_depth]
    rules = ("last", "held-out", "tuned", "fresh")
    lines = claim(sweeps, "The gain grows with width: slope", main, "slope of the gain", rules)
    lines += claim(sweeps, "More flipped labels: mean gain, more", main, "mean gain - that at less noise", rules)
    lines += claim(sweeps, "Equal gradients: mean gain", accuracies, "mean gain at equal gradients", rules)
    decay = "slope of the gain - that at the default weight decay"
    lines += claim(sweeps, "Other weight decay: slope, minus that at the default", accuracies, decay, rules[:2])
    dense = "mean gain - that of dense networks"
    lines += claim(sweeps, "Pruned: mean gain, minus dense networks'", accuracies, dense, rules[:2])
    lines += claim(sweeps, "The gain grows with depth: slope", deep, "slope of the gain", rules[:2])
    need(lines, "three seeds of a sweep")

    figure, ax = plt.subplots(figsize=(5.5, 0.4 + 0.16 * len(lines)), layout="constrained")
    for y, (label, row) in enumerate(lines):
        if row is None:
            ax.text(-0.02, y, label, weight="bold", ha="right", va="center", transform=ax.get_yaxis_transform())
        else:
            ax.text(-0.02, y, label, ha="right", va="center", transform=ax.get_yaxis_transform())
            face = SAM if abs(row["mean"]) > row["half_interval"] else "white"
            ax.errorbar(row["mean"], y, xerr=row["half_interval"], fmt="o", color=SAM, markerfacecolor=face)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_xscale("symlog", linthresh=1)
    ax.xaxis.set_major_locator(FixedLocator([-10, -3, -1, 0, 1, 3, 10, 30]))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("points")
    ax.set_yticks([])
    ax.set_ylim(len(lines) - 0.5, -0.5)
    return figure, []


def claim(sweeps, heading, shown, measure, rules):
    """[(label, row of the table)], under the heading, which has no row."""
    lines = []
    for sweep in shown:
        for rule in rules:
            title = sweep.title(*FREE.get(rule, ()))
            for row in all_numbers(sweeps).find(sweep=title, rule=rule, measure=measure, rho=""):
                if row["half_interval"] > 0:
                    name = sweep.title("val_size", "train_size", "batch_size", *FREE.get(rule, ()))
                    lines.append((f"{name}: {rule}", row))
    return [(heading, None), *lines] if lines else []


def sparsity(sweeps):
    """Networks pruned at initialization to as many weights as the narrow dense one has: SAM's gain after the last
    epoch by parameters before pruning, a panel a pruner. Dashed: the gain of the dense network."""
    pruned = [sweep for sweep in sweeps if sweep.pruner and sweep.paired]
    need(pruned, "SGD and SAM of pruned networks")
    figure, (axes,) = panels(1, len(pruned), "", sharey=True)
    for ax, sweep in zip(axes, pruned):
        draw_line(ax, by_width(sweep, lambda network: network.gains("last")), "pruned", SAM)
        for dense in sweeps:
            twin = dense.twin(sweep.paired[0])
            if twin and dense.settings == {**sweep.settings, "pruner": None}:
                gain, _, _ = interval(twin.gains("last"))
                ax.axhline(gain, linestyle="--", color=GREY, linewidth=1, label="dense")
                draw_line(ax, [(twin.params, twin.gains("last"))], "_", GREY)
        ax.set_title(plain(sweep.title("val_size")))
        ax.set_ylabel("gain (points)")
        width_axis(ax, sweep)
        ax.set_xlabel("parameters before pruning")
    return figure, pruned


def regularization(sweeps):
    """SAM's gain after the last epoch by width, with the default weight decay and without any."""
    pairs = []
    for sweep in sweeps:
        for plain_sweep in sweeps:
            if sweep.settings.get("weight_decay") == 0 and plain_sweep.settings == sweep.without("weight_decay"):
                pairs.append((sweep, plain_sweep))
    pairs = [(without, decayed) for without, decayed in pairs if without.paired and decayed.paired]
    need(pairs, "SGD and SAM at --weight-decay 0 and at the default")
    figure, (axes,) = panels(1, len(pairs), "")
    for ax, (without, decayed) in zip(axes, pairs):
        draw_line(ax, by_width(decayed, lambda network: network.gains("last")), "default\ndecay", SAM)
        draw_line(ax, by_width(without, lambda network: network.gains("last")), "no decay", GREY, "--")
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_title(plain(decayed.title("val_size")))
        ax.set_ylabel("gain (points)")
        width_axis(ax, decayed)
    return figure, [without for without, _ in pairs]


def depth(sweeps):
    """MLPs of equal layers, by the number of hidden layers, after the last epoch: SAM's gain, and the scores."""
    deep = need([sweep for sweep in sweeps if sweep.by_depth and sweep.paired], "SGD and SAM of several depths")
    figure, axes = panels(len(deep), 2, "")
    for (left, right), sweep in zip(axes, deep):
        draw_line(left, by_width(sweep, lambda network: network.gains("last")), "gain", SAM)
        left.axhline(0, color="black", linewidth=0.6)
        draw_line(right, by_width(sweep, lambda network: network.scores("SGD", "last")), "SGD", SGD)
        draw_line(right, by_width(sweep, lambda network: network.scores("SAM", "last")), "SAM", SAM)
        left.set_title(plain(sweep.title("val_size")))
        left.set_ylabel("gain (points)")
        right.set_ylabel("test accuracy (%)")
        width_axis(left, sweep)
        width_axis(right, sweep)
    return figure, deep


def layers(sweeps):
    """What SAM perturbs: all parameters, all but the last layer's, the last layer's alone, or all in a random
    direction. Left: the gain after the last epoch. Right: the last layer's share of the squared gradient norm, mean
    over the epochs."""
    parts = [sweep for sweep in sweeps if "perturb" in sweep.settings and sweep.paired]
    rows = families(need(parts, "SAM with --perturb"), "perturb")
    figure, axes = panels(len(rows), 2, "")
    colors = {"rest": PINK, "last": GREEN, "random": GREY}
    for (left, right), row in zip(axes, rows):
        for sweep in sweeps:
            if sweep.settings == row[0].without("perturb") and sweep.paired:
                draw_perturbed(left, right, sweep, "all", SAM)
        for sweep in row:
            draw_perturbed(left, right, sweep, sweep.settings["perturb"], colors[sweep.settings["perturb"]])
        left.axhline(0, color="black", linewidth=0.6)
        left.set_title(plain(row[0].title("val_size", "perturb")))
        left.set_ylabel("gain (points)")
        right.set_ylabel("last layer's share (%)")
        width_axis(left, row[0])
        width_axis(right, row[0])
    return figure, parts


def draw_perturbed(left, right, sweep, label, color):
    draw_line(left, by_width(sweep, lambda network: network.gains("last")), label, color)
    share = by_width(sweep, lambda network: network.numbers("SAM", "last_layer_share"))
    draw_line(right, share, label, color)


def functions(sweeps):
    """One hidden layer fitted to 12 points (black): the functions of the narrowest and the widest network, a line a
    seed; and the sum of |f''|, the total variation of the slope, by width. In curve-scaled the initial output weights
    are smaller. Where SAM's training loss is higher, a simpler function is partly a worse fit."""
    rows = [sweep for sweep in sweeps if sweep.dataset.startswith("curve") and sweep.paired]
    rows = [sweep for sweep in rows if sweep.paired[0].numbers("SAM", "variation")]
    need(rows, "SGD and SAM of --dataset curve")
    figure, axes = panels(len(rows), 3, "", sharex="col")
    x = np.arange(-5.5, 6) / 4 + 0.07
    y = 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])
    for row, sweep in zip(axes, rows):
        for ax, network in zip(row, (sweep.paired[0], sweep.paired[-1])):
            for optimizer, color in (("SGD", SGD), ("SAM", SAM)):
                for run in network.runs(optimizer, "last"):
                    ax.plot(run.function["x"], run.function["y"], color=color, linewidth=0.7)
                ax.plot([], [], color=color, label="_")
            ax.plot(x, y, "o", color="black", markersize=3)
            ax.set_ylim(-3.5, 4)
            ax.set_title(f"{sweep.dataset}, {network.width} neurons")
        for optimizer, color in (("SGD", SGD), ("SAM", SAM)):
            draw_line(
                row[2], by_width(sweep, lambda network: network.numbers(optimizer, "variation")), optimizer, color
            )
        row[2].set_yscale("log")
        row[2].set_title("sum of |f''|")
        width_axis(row[2], sweep)
    return figure, rows


def convergence(sweeps):
    """Training loss over the epochs at a constant rate, mean over seeds, of the narrowest and the widest network; and
    how straight ln(loss) is: R^2 of its line over the epochs from the second on, by width."""
    rows = [sweep for sweep in sweeps if sweep.settings.get("schedule") == "constant" and "loss" not in sweep.settings]
    rows = [sweep for sweep in rows if len(sweep.paired) > 1]
    need(rows, "SGD and SAM of two widths or more at a constant rate")
    figure, axes = panels(len(rows), 3, "")
    for row, sweep in zip(axes, rows):
        for ax, network in zip(row, (sweep.paired[0], sweep.paired[-1])):
            draw_epochs(ax, network, "train_loss")
            ax.set_yscale("log")
            ax.set_title(f"training loss, {short(network.params)} parameters")
            ax.set_xlabel("epoch")
        for optimizer, color in (("SGD", SGD), ("SAM", SAM)):
            draw_line(row[2], by_width(sweep, lambda network: network.numbers(optimizer, "rate_r2")), optimizer, color)
        row[0].set_title(f"{plain(sweep.title('val_size'))}\n{row[0].get_title()}")
        row[2].set_title("R^2 of ln(loss) by epoch")
        width_axis(row[2], sweep)
    return figure, rows


FIGURES = [
    front,
    label_noise,
    label_noise_elsewhere,
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


def write_csv(path, table):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in table:
            cells = [f"{value:.6g}" if isinstance(value, float) else value for value in row.values()]
            writer.writerow(["" if cell == "nan" else cell for cell in cells])


def shown(row):
    """Mean and interval to the interval's second digit."""
    mean = row["mean"]
    half = row["half_interval"]
    if not half > 0:  # of one seed, or chosen
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def pivot(rows, down, across):
    """A Markdown table, or several of eight columns at most: a line for each value of down, a column of across."""
    lines = {}
    for row in rows:
        line = lines.setdefault(tuple(row[name] for name in down), {"seeds": row["seeds"]})
        line[str(row[across])] = shown(row)
    columns = list(dict.fromkeys(str(row[across]) for row in rows))
    room = 7 - len(down)
    text = ""
    for start in range(0, len(columns), room):
        names = [*down, *columns[start : start + room], "seeds"]
        text += f"\n| {' | '.join(names)} |\n| {' | '.join('---' for _ in names)} |\n"
        for key, line in lines.items():
            cells = [*key, *(line.get(name, "") for name in names[len(down) :])]
            text += f"| {' | '.join(str(cell) for cell in cells)} |\n"
    return text


def tables(rows):
    """What summary.md says about one sweep: slopes, widths, radii, training."""
    across_rules = ("SGD", "SAM", "gain", "best rho")
    trends = [row for row in rows if row["width"] == ""]
    widths = [row for row in rows if row["width"] and row["rho"] == ""]
    radii = [row for row in rows if row["width"] and row["rho"] != "" and row["rule"] == "last"]
    text = ""
    scores = [row for row in widths if row["measure"] in across_rules]
    others = [row for row in widths if row["measure"] not in across_rules]
    text += pivot([row for row in trends if row["rho"] == ""], ("measure",), "rule")
    text += pivot(scores, ("width", "rule"), "measure")
    text += pivot(others, ("measure", "rule"), "width")
    text += pivot([row for row in radii if row["measure"] == "gain"], ("width",), "rho")
    return text


def write_summary(path, table, chapters, notes):
    """chapters: [(name of a figure, its caption, the titles of the sweeps below it)]."""
    rows = {}
    for row in table:
        rows.setdefault(row["sweep"], []).append(row)
    text = f"# Summary\n\n{__doc__.split(chr(10) * 2)[2]}\n"
    for name, caption, titles in chapters:
        text += f"\n## {name}\n\n![{name}]({name}.png)\n\n{caption}\n"
        for title in titles:
            if title in rows:
                text += f"\n### {title}\n{tables(rows.pop(title))}"
    text += "\n## Sweeps below no figure\n"
    for title in rows:
        text += f"\n### {title}\n{tables(rows[title])}"
    text += "\n## Left out\n\n" + "".join(f"- {note}\n" for note in notes)
    path.write_bytes(text.encode(errors="replace"))


# ======================================================================================================================
# Main
# ======================================================================================================================


def unused(sweeps):
    """Lines about what was read and can't be compared."""
    notes = []
    for sweep in sweeps:
        for network in sweep.networks.values():
            where = f"{sweep.title()}, width {network.width}"
            for rho, count in network.diverged.items():
                notes.append(f"{where}: rho {rho:g} left out, {count} runs diverged")
            lonely = network.whole.keys() - set(network.radii)
            for rho in sorted(lonely):
                notes.append(f"{where}: SAM at rho {rho:g} left out, no run of SGD at its seeds, or no seed in common")
            if any(len(network.sam[rho]) != len(network.seeds) for rho in network.radii):
                notes.append(f"{where}: rho is chosen on the seeds that all radii share, {network.seeds}")
    for family in families(sweeps, "epochs"):
        if not longest(family):
            notes.append(f"{family[0].title('epochs')}: no run of SAM has one of SGD at its seed")
    for family in families(sweeps, *FREE["fresh"]):
        for network, best in tune_widths(sweeps, family, "fresh"):
            for setting in best.left_out:
                where = f"{family[0].title(*FREE['fresh'])}, width {network.width}"
                notes.append(f"{where}: {setting} left out of the choice of settings, for lack of seeds")
    return notes


def draw(sweeps, folder):
    """Saves all figures; returns their chapters for the summary, and lines about those that lack something."""
    chapters = []
    notes = []
    for make_figure in FIGURES:
        name = make_figure.__name__
        try:
            figure, below = make_figure(sweeps)
        except Missing as missing:
            notes.append(f"{name}.png: not drawn, needs {missing}")
            continue
        for ax in figure.axes:
            label_lines(ax)
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)

        titles = []
        for sweep in below:
            titles += [sweep.title(), *(sweep.title(*free) for free in FREE.values())]
        chapters.append((name, " ".join(make_figure.__doc__.split()), titles))
    return chapters, notes


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", default="results", help="where the scripts put their results (default: results)")
    parser.add_argument("--figures", type=Path, default="figures", help="where the figures go (default: figures)")
    parser.error = fail
    args = parser.parse_args()

    runs, notes = read_runs(args.results)
    sweeps = tuple(build_sweeps(runs))
    if not any(sweep.paired for sweep in sweeps):
        fail(f"--results {args.results}: no run of SAM has one of SGD at the same seed; run a script first")
    table = all_numbers(sweeps)
    notes += unused(sweeps)
    try:
        args.figures.mkdir(parents=True, exist_ok=True)
        chapters, missing = draw(sweeps, args.figures)
        notes += missing
        write_csv(args.figures / "summary.csv", table)
        write_summary(args.figures / "summary.md", table, chapters, notes)
    except OSError as error:
        fail(f"--figures {args.figures}: cannot be written to ({error.strerror}); name another folder")

    notes.append(f"{args.figures}: {len(chapters)} figures, summary.md and summary.csv, of {len(runs)} runs")
    with contextlib.suppress(BrokenPipeError):  # where nobody reads on
        os.write(1, "".join(f"{note}\n" for note in notes).encode(errors="surrogateescape"))


if __name__ == "__main__":
    main()

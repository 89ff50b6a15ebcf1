"""Draws the paper's figures, and summary.md, from result files alone: a PNG per claim, in seconds on any machine.

    python plot.py --results results --figures figures

A gain is SAM's accuracy minus SGD's at the same seed, after the last epoch. Its band is the 95% confidence interval of
the mean of these paired differences (Student's t over seeds). The best rho of a width is the one with the highest mean
held-out accuracy where images were held out (--val-size), else the highest mean test accuracy; the figures say which.
A rho at which some run diverged is never the best one, and is marked by a cross.
"""

import argparse
import copy
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

SGD, SAM, GREY = "#0072B2", "#D55E00", "#8c8c8c"  # Okabe and Ito: told apart by the colour-blind and in print
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--")
SCRIPTS = ("mlp_width", "resnet_width", "label_noise", "sparsity")
# improvement in points, read off the paper's main figure to +-0.02
PAPER = {
    ("mnist", "MLP"): ([61035, 125810, 266610, 1426410, 5366010], [0.07, 0.06, 0.18, 0.19, 0.19]),
    ("cifar10", "ResNet-18"): (
        [44622, 176402, 701466, 2797610, 11173962, 44662922, 178585866],
        [0.36, 0.66, 0.44, 0.85, 0.96, 1.23, 1.01],
    ),
}
VARIED = {"script", "hidden", "filters", "sam", "rho", "adaptive", "seed", "noise", "pruner", "sparsity"}
PLACE = {"device", "results", "force", "data_dir"}
T95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom


def interval(values):
    """Mean and half width of its 95% confidence interval, nan for fewer than two values."""
    n = len(values)
    if n < 2:
        return (np.mean(values) if n else math.nan), math.nan
    t = T95[n - 1] if n <= len(T95) else 1.96 + 2.5 / (n - 1)
    return np.mean(values), t * np.std(values, ddof=1) / math.sqrt(n)


def read(folder):
    """The results below the folder; a file that is none is named on stderr and left out."""
    for script in SCRIPTS:
        for path in sorted(Path(folder, script).glob("*.json")):
            try:
                run = json.loads(path.read_text(encoding="utf-8"))
                [run[key] for key in ("num_params", "num_nonzero", "test_acc", "best_test_acc", "history")]
                [run["config"][key] for key in ("sam", "rho", "seed", "hidden", "filters", "val_size", "dataset")]
                if run["config"]["script"] != script or run["status"] not in ("done", "diverged"):
                    raise ValueError("of another script, or not finished")
                yield run
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(
                    f"plot.py: {path}: not a result file, left out ({type(error).__name__}: {error})", file=sys.stderr
                )


class Cell:
    """The runs that differ in optimizer, rho and seed only."""

    def __init__(self, runs):
        config = runs[0]["config"]
        self.width = config["hidden"] or str(config["filters"])
        self.params, self.nonzero = runs[0]["num_params"], runs[0]["num_nonzero"]
        self.noise, self.sparsity, self.pruner = (config.get(k) for k in ("noise", "sparsity", "pruner"))
        self.sgd, self.sam = {}, defaultdict(dict)
        for run in runs:
            seeds = self.sam[run["config"]["rho"]] if run["config"]["sam"] else self.sgd
            seeds[run["config"]["seed"]] = run
        ended = {rho: self.pairs(rho) for rho in sorted(self.sam)}
        most = max(map(len, ended.values()), default=0) or math.inf
        whole = [rho for rho, pairs in ended.items() if len(pairs) == most and not self.diverged(rho)]
        self.best = max(whole, key=self.held_out, default=None)

    def held_out(self, rho):
        return np.mean([sam["history"][-1].get("val_acc", sam["test_acc"]) for _, sam in self.pairs(rho)])

    def pairs(self, rho):
        """(SGD's run, SAM's run) of each seed where both came to an end."""
        both = [(self.sgd[seed], run) for seed, run in sorted(self.sam[rho].items()) if seed in self.sgd]
        return [pair for pair in both if all(run["status"] == "done" for run in pair)]

    def diverged(self, rho):
        return any(run["status"] == "diverged" for run in self.sam[rho].values())

    def gain(self, rho=None, key="test_acc"):
        return interval([100 * (sam[key] - sgd[key]) for sgd, sam in self.pairs(self.best if rho is None else rho)])

    def accuracy(self, which, key="test_acc"):
        return interval([100 * pair[which][key] for pair in self.pairs(self.best)])


class Workload:
    """All runs of one script that agree in data set, model and every setting, as cells by width.

    differing: what sets the workload apart from others of its script, for its title.
    """

    def __init__(self, script, runs, settings, differing):
        config = runs[0]["config"]
        self.script, self.settings, self.dataset = script, settings, config["dataset"]
        self.model = "MLP" if config["hidden"] else "ResNet-18"
        self.title = ", ".join([Path(self.dataset).name, self.model, *differing])
        self.chosen = "held-out" if config["val_size"] else "test"
        groups = defaultdict(list)
        for run in runs:
            groups[
                tuple(str(run["config"].get(k)) for k in ("hidden", "filters", "noise", "pruner", "sparsity"))
            ].append(run)
        cells = [Cell(group) for group in groups.values()]
        self.cells = sorted((c for c in cells if c.best is not None), key=lambda c: (c.params, -c.nonzero))
        self.diverged = [(c, rho) for c in cells for rho in sorted(c.sam) if c.diverged(rho)]
        self.seeds = sorted({len(c.pairs(c.best)) for c in self.cells})

    def at_one_noise(self):
        """This workload at its noise rate nearest to a half, where it has noise rates at all."""
        noise = min((c.noise for c in self.cells if c.noise is not None), default=None, key=lambda p: abs(p - 0.5))
        if noise is None:
            return self
        part = copy.copy(self)
        part.title = f"{self.title}, {noise:.0%} of labels flipped"
        part.cells = self.where(noise=noise)
        part.diverged = [(c, rho) for c, rho in self.diverged if c.noise == noise]
        return part

    def where(self, **values):
        return [c for c in self.cells if all(getattr(c, k) == v for k, v in values.items())]

    def alike(self, others):
        """The cells of the workloads among others that have this one's settings."""
        return [c for other in others if other.settings == self.settings for c in other.cells]

    def values(self, name):
        return sorted({getattr(c, name) for c in self.cells})


def workloads(runs):
    groups = defaultdict(list)
    for run in runs:
        config = run["config"]
        groups[tuple((k, v) for k, v in config.items() if k not in VARIED | PLACE), config["script"]].append(run)
    found = []
    for (settings, script), group in groups.items():
        alike = [dict(other) for other, s in groups if s == script]
        differing = [f"{k} {v}" for k, v in settings if k != "dataset" and len({str(o.get(k)) for o in alike}) > 1]
        for adaptive in (False, True):  # ASAM is a workload of its own, beside the same SGD runs
            chosen = [r for r in group if not r["config"]["sam"] or r["config"]["adaptive"] == adaptive]
            load = Workload(script, chosen, (settings, adaptive), differing + ["ASAM"] * adaptive)
            if load.cells or load.diverged:
                found.append(load)
    return found


def band(ax, xs, stats, style, color, label):
    mean, half = np.array(stats, dtype=float).reshape(-1, 2).T
    ax.plot(xs, mean, style, color=color, label=label, markersize=5)
    ax.fill_between(xs, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def figure(rows, loads, what):
    """Axes (rows, columns), a column a workload, with a caption that says what n and the band are."""
    fig, axes = plt.subplots(rows, len(loads), figsize=(1 + 4.6 * len(loads), 0.9 + 3.5 * rows), squeeze=False)
    for column, load in zip(axes.T, loads):
        column[0].set_title(load.title, fontsize=10)
    seeds = sorted({n for load in loads for n in load.seeds})
    count = f"{seeds[0]}" if seeds[:1] == seeds[-1:] else f"{seeds[0]} to {seeds[-1]}" if seeds else "0"
    chosen = " and ".join(sorted({load.chosen for load in loads}))
    fig.caption = f"{what}\n{count} seeds; rho chosen on {chosen} images; accuracy after the last epoch"
    return fig, axes


GAIN_BAND = "Band: 95% confidence interval of the mean paired difference, SAM minus SGD at the same seed."
MEAN_BAND = "Band: 95% confidence interval of the mean over seeds."


def by_params(ax, ylabel, legend="best"):
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("parameters")
    finish(ax, ylabel, legend)


def finish(ax, ylabel, legend="best"):
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.25)
    lines = ax.get_legend_handles_labels()[0]
    if len(lines) > 4:  # a legend of two columns, with room of its own below
        low, high = ax.get_ylim()
        ax.set_ylim(low - 0.07 * (1 + len(lines) // 2) * (high - low), high)
        ax.legend(fontsize=8, framealpha=0.6, ncols=2, loc="lower left")
    elif lines:
        ax.legend(fontsize=8, framealpha=0.6, loc=legend)


def gain_by_width(loads):
    fig, axes = figure(1, loads, GAIN_BAND)
    for ax, load in zip(axes[0], loads):
        band(ax, [c.params for c in load.cells], [c.gain() for c in load.cells], "o-", SAM, "SAM - SGD, here")
        ax.axhline(0, color="black", linewidth=0.8)
        if (load.dataset, load.model) in PAPER:
            faint = ax.twinx()
            faint.plot(*PAPER[load.dataset, load.model], "x:", color=GREY, alpha=0.7)
            faint.set_ylabel("the paper's, at its scale (points)", color=GREY)
            faint.tick_params(axis="y", colors=GREY)
            low, high = ax.get_ylim()
            high = max(high, -low / 3)
            scale = 1.1 * max(PAPER[load.dataset, load.model][1]) / high  # one zero for both
            ax.set_ylim(low, high)
            faint.set_ylim(scale * low, scale * high)
            ax.plot([], [], "x:", color=GREY, label="the paper's (right axis)")
        by_params(ax, "gain in test accuracy (points)", "lower right")
    return fig


def accuracy_by_width(loads):
    fig, axes = figure(1, loads, MEAN_BAND)
    for ax, load in zip(axes[0], loads):
        for which, (color, style, name) in enumerate(((SGD, "s--", "SGD"), (SAM, "o-", "SAM, best rho"))):
            band(ax, [c.params for c in load.cells], [c.accuracy(which) for c in load.cells], style, color, name)
        by_params(ax, "test accuracy (%)")
    return fig


def rho(loads):
    fig, axes = figure(2, loads, GAIN_BAND + " Cross: a run diverged.")
    for (top, bottom), load in zip(axes.T, loads):
        rhos = sorted({rho for c in load.cells for rho in c.sam})
        for i, (value, color) in enumerate(zip(rhos, plt.cm.viridis(np.linspace(0, 0.85, len(rhos))))):
            cells = [c for c in load.cells if c.pairs(value)]
            band(top, [c.params for c in cells], [c.gain(value) for c in cells], STYLES[i % 6], color, f"rho {value}")
        for cell, value in load.diverged:
            color = plt.cm.viridis(0.85 * rhos.index(value) / max(len(rhos) - 1, 1)) if value in rhos else "black"
            top.plot(cell.params, 0.04, "X", color=color, transform=top.get_xaxis_transform())
        top.axhline(0, color="black", linewidth=0.8)
        by_params(top, "gain in test accuracy (points)")
        bottom.plot([c.params for c in load.cells], [c.best for c in load.cells], "o-", color=SAM)
        bottom.set_yticks(rhos, rhos)
        by_params(bottom, "best rho")
    return fig


def label_noise(loads, clean):
    fig, axes = figure(
        2, loads, "Bands: 95% confidence intervals, of the mean paired difference above, of the mean below."
    )
    for (top, bottom), load in zip(axes.T, loads):
        rates = {noise: load.where(noise=noise) for noise in load.values("noise")}
        rates = {0: load.alike(clean), **rates}
        rates = {noise: cells for noise, cells in rates.items() if cells}
        for i, (noise, color) in enumerate(zip(rates, plt.cm.cividis(np.linspace(0, 0.85, len(rates))))):
            cells, label = rates[noise], f"{noise:.0%} of labels flipped"
            band(top, [c.params for c in cells], [c.gain() for c in cells], STYLES[i % 6], color, label)
            for which, (optimizer, hue) in enumerate((("SGD", SGD), ("SAM", SAM))):
                stats = [c.accuracy(which) for c in cells]
                band(bottom, [c.params for c in cells], stats, STYLES[i % 6], hue, f"{optimizer}, {noise:.0%} flipped")
        top.axhline(0, color="black", linewidth=0.8)
        by_params(top, "gain in test accuracy (points)")
        by_params(bottom, "test accuracy (%)")
    return fig


def sparsity(loads, dense):
    fig, axes = figure(2, loads, GAIN_BAND + "\nDense: unpruned networks of smaller width, same settings.")
    for (top, bottom), load in zip(axes.T, loads):
        series = [(p, w) for p in load.values("pruner") for w in load.values("width")]
        for i, (pruner, width) in enumerate(series):
            unpruned = [c for c in load.alike(dense) if c.width == width]
            cells = load.where(pruner=pruner, width=width)
            if 0 not in [c.sparsity for c in cells]:
                cells = unpruned + cells
            color = plt.cm.viridis(0.85 * i / max(len(series) - 1, 1))
            gains = [c.gain() for c in cells]
            band(top, [c.sparsity or 0 for c in cells], gains, STYLES[i % 6], color, f"width {width}, {pruner}")
            label = f"sparse: width {width}, {pruner}"
            band(bottom, [c.nonzero for c in cells], gains, STYLES[i % 6], color, label)
        narrow = {c.width: c for c in load.alike(dense)}
        narrow |= {c.width: c for c in load.where(sparsity=0)}
        cells = sorted(narrow.values(), key=lambda c: c.nonzero)
        band(bottom, [c.nonzero for c in cells], [c.gain() for c in cells], "x:", "black", "dense, by width")
        for ax in (top, bottom):
            ax.axhline(0, color="black", linewidth=0.8)
        top.set_xlabel("sparsity (fraction of kernel weights removed)")
        finish(top, "gain in test accuracy (points)")
        by_params(bottom, "gain in test accuracy (points)")
        bottom.set_xlabel("non-zero parameters")
    return fig


def curves(loads):
    fig, axes = figure(2, loads, "Mean over seeds; SAM at its best rho.")
    for column, load in zip(axes.T, loads):
        for cell, style in {c.params: (c, s) for c, s in ((load.cells[-1], "-"), (load.cells[0], "--"))}.values():
            for which, (name, color) in enumerate((("SGD", SGD), ("SAM", SAM))):
                for ax, key in zip(column, ("train_acc", "test_acc")):
                    runs = [[row[key] for row in pair[which]["history"]] for pair in cell.pairs(cell.best)]
                    mean = 100 * np.mean(runs, axis=0)
                    ax.plot(range(1, len(mean) + 1), mean, style, color=color, label=f"{name}, width {cell.width}")
        for ax, name in zip(column, ("training accuracy (%)", "test accuracy (%)")):
            ax.set_xlabel("epoch")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            finish(ax, name)
    return fig


def summary(loads):
    head = ["width", "parameters", "non-zero", "noise", "pruner", "sparsity", "seeds", "best rho", "SGD %", "SAM %"]
    head += ["gain", "gain, best epoch"]
    lines = ["# Summary", "", "Accuracies on test images after the last epoch, in per cent; gains in points, with 95%"]
    lines += ["confidence intervals of the paired differences. Best epoch: each run's best test accuracy over epochs,"]
    lines += ["as the paper reports it: chosen on the test images."]
    for load in loads:
        lines += ["", f"## {load.script}: {load.title}", "", f"rho is chosen on {load.chosen} images.", ""]
        columns = [i for i, k in enumerate(head) if k not in ("noise", "pruner", "sparsity") or load.cells and
                   getattr(load.cells[0], k) is not None]  # fmt: skip
        rows = [head, ["---"] * len(head)]
        for c in load.cells:
            (sgd, _), (sam, _) = c.accuracy(0), c.accuracy(1)
            gains = [f"{mean:+.2f} ± {half:.2f}" for mean, half in (c.gain(), c.gain(key="best_test_acc"))]
            row = [c.width, f"{c.params:,}", f"{c.nonzero:,}", c.noise, c.pruner, c.sparsity, len(c.pairs(c.best))]
            rows.append([*row, c.best, f"{sgd:.2f}", f"{sam:.2f}", *gains])
        lines += ["| " + " | ".join(str(row[i]) for i in columns) + " |" for row in rows]
        for c, value in load.diverged:
            seeds = [s for s, run in sorted(c.sam[value].items()) if run["status"] == "diverged"]
            lines += ["", f"Diverged: width {c.width}, rho {value}, seeds {', '.join(map(str, seeds))}."]
    return "\n".join(lines) + "\n"


def main():
    """Draws what the results suffice for, and says what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", default="results", help="where the scripts put their results (default: results)")
    parser.add_argument("--figures", default="figures", help="where the figures go (default: figures)")
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    args = parser.parse_args()
    folder = Path(args.figures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--figures {folder}: cannot be made ({error.strerror}); name another folder")
    loads = workloads(read(args.results))
    if not loads:
        fail(f"--results {args.results}: has no run of SAM with a run of SGD at the same seed; run a script first")
    of = {script: [load for load in loads if load.script == script and load.cells] for script in SCRIPTS}
    width = of["mlp_width"] + of["resnet_width"]
    one_noise = width + [load.at_one_noise() for load in of["label_noise"]]
    for draw, chosen, *more in (
        (gain_by_width, width),
        (accuracy_by_width, width),
        (rho, one_noise),
        (label_noise, of["label_noise"], width),
        (sparsity, of["sparsity"], width),
        (curves, one_noise),
    ):
        if not chosen:
            print(f"{draw.__name__}.png: not drawn, its script has no pair of SGD and SAM results in {args.results}")
            continue
        fig = draw(chosen, *more)
        fig.supxlabel(fig.caption, fontsize=8, color="#404040")
        fig.tight_layout()
        fig.savefig(folder / f"{draw.__name__}.png", dpi=150)
        plt.close(fig)
        print(folder / f"{draw.__name__}.png")
    (folder / "summary.md").write_text(summary(loads), encoding="utf-8")
    print(folder / "summary.md")


def fail(message):
    print(f"plot.py: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()

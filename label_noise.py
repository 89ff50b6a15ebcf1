r"""Does SAM's gain over SGD grow with width far more where labels are noisy? The paper's Figure 5a.

    python label_noise.py --hidden 75-25 300-100 1200-400 --noise 0.25 0.5 0.75 --val-size 5000 --seed 0 1 2
    python label_noise.py --hidden 75-25 300-100 1200-400 --noise 0.25 0.5 0.75 --val-size 5000 --seed 0 1 2 \
        --sam --rho 0.05 0.1 0.2
    python plot.py

Of the training labels, a fraction becomes another class, any of them equally likely; held-out and test labels stay
clean. The result file has two training accuracies: train_acc on the labels trained on, flipped or not, and
train_clean_acc on the original ones. A run takes as long as a clean one of mlp_width.py or resnet_width.py.

The gain after the last epoch, up to tens of points, is mostly SGD fitting the flipped labels. Trained for 12 epochs in
place of MNIST's 100 (--epochs 12), SGD does not fit them, and comes close to SAM.
"""

import math

import numpy as np
import torch
from torch.optim import SGD

from common import SAM, Recorder, Scores, batches, build_model, evaluate, frozen_bn_stats, learning_rate, load_data
from common import bounded_number, exit_with_error, flags, main

# ----------------------------------------------------------------------------------------------------------------------
# Settings: the paper's, by the flag that picks the model; all but the milestones have a flag of their own
# ----------------------------------------------------------------------------------------------------------------------

MNIST = {  # --hidden
    "dataset": "mnist",
    "epochs": 100,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,  # not Nesterov's
    "weight_decay": 1e-4,
    "loss": "ce",
    "schedule": "step",
    "milestones": (0.25, 0.5, 0.75),  # as in the paper's code; its text says 0.5 and 0.75
    "warmup": 0,
}

CIFAR10 = {  # --filters
    "dataset": "cifar10",
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "loss": "ce",
    "schedule": "step",
    "milestones": (0.5, 0.75),
    "warmup": 0,
}

# ----------------------------------------------------------------------------------------------------------------------
# The noise
# ----------------------------------------------------------------------------------------------------------------------


def flip_labels(labels, noise, classes, seed):
    """A copy of labels (N,) in which exactly round(noise N) have become another class; which ones depends on the seed.

    The images whose labels a lower noise rate flips are among those of a higher one.
    """
    rng = np.random.default_rng((seed, 0))  # data order draws from (seed, epoch), epochs from 1, so from other numbers
    chosen = rng.permutation(len(labels))[: round(noise * len(labels))]

    shifts = np.zeros(len(labels), dtype=np.int64)
    shifts[chosen] = rng.integers(1, classes, len(chosen))
    return (labels + torch.from_numpy(shifts).to(labels.device)) % classes


# ----------------------------------------------------------------------------------------------------------------------
# Which parameters SAM perturbs (--perturb), and the last layer's part in that
# ----------------------------------------------------------------------------------------------------------------------


def last_layer(model):
    """The parameters with gradients of the last module that has any."""
    for module in reversed([*model.modules()]):
        own = [p for p in module.parameters(recurse=False) if p.grad is not None]
        if own:
            return own


def last_layer_share(model):
    """The last layer's share of |g|^2, a tensor, 0 where g is 0."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(grads)) ** 2
    last = squares[-len(last_layer(model)) :]  # parameters() has the modules' order
    return last.sum() / squares.sum().clamp(min=1e-38)  # no division by 0


def choose_perturbation(model, perturb, seed, step):
    """Leaves in p.grad the direction in which SAM is to perturb, as --perturb says; SAM scales it to rho."""
    if perturb == "random":
        key = np.random.SeedSequence((seed, step, 1)).generate_state(1)  # not what flips and data order draw
        rng = torch.Generator(next(model.parameters()).device).manual_seed(int(key[0]))
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=rng, device=p.device)

    if perturb in ("last", "rest"):
        last = set(last_layer(model))
        for p in model.parameters():
            perturbed = (p in last) == (perturb == "last")
            if not perturbed:
                p.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train(config):
    """One run: config has one value of every flag."""
    data = load_data(config)
    loss_fn = data.loss_fn
    clean = data.train.targets
    noisy = flip_labels(clean, config.noise, data.outputs, config.seed)

    model = build_model(config, data)
    optimizer = SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, data, model, optimizer)
    steps_per_epoch = math.ceil(len(clean) / config.batch_size)

    for epoch in recorder.epochs():
        model.train()
        scores = Scores(loss_fn)
        share = 0  # of the last layer in |g|^2
        first_step = (epoch - 1) * steps_per_epoch

        for step, (x, y, clean_y) in enumerate(batches(data, config, epoch, noisy, clean), first_step):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            optimizer.zero_grad()
            outputs = model(x)
            loss_fn(outputs, y).backward()

            if sam:
                share += last_layer_share(model)
                choose_perturbation(model, config.perturb, config.seed, step)
                sam.perturb()  # w becomes w + e
                with frozen_bn_stats(model):  # the statistics are those of the first pass alone
                    loss_fn(model(x), y).backward()
                sam.step()  # w again, then the optimizer's step
            else:
                optimizer.step()

            scores.add(outputs, y, clean_y)  # the loss and accuracy on y, and the accuracy on clean_y

        row = {"epoch": epoch, "lr": lr}
        row.update(scores.means("train_loss", "train_acc", "train_clean_acc"))
        row.update(evaluate(model, loss_fn, data.test, "test"))
        row.update(evaluate(model, loss_fn, data.val, "val"))
        if sam:
            row["last_layer_share"] = (share / steps_per_epoch).item()
        recorder.end_epoch(row)

    recorder.finish(targets=noisy)  # on which --sharpness is measured


def settings(args):
    """The defaults of the workload, as {flag: value}."""
    if args.perturb != "all" and not args.sam:
        exit_with_error(f"--perturb {args.perturb}: needs --sam")
    return MNIST if args.hidden else CIFAR10


if __name__ == "__main__":
    # A flag of your own needs no more than a line here: where it is not at its default it is in a run's name, and makes
    # a sweep of its own in plot.py. Results from before it existed count as runs with the default.
    parser = flags(__doc__, "hidden", "filters")
    fraction = bounded_number(float, 0, 1, closed=True)
    text = "fraction of the training labels replaced (default: 0.5)"
    parser.add_argument("--noise", type=fraction, nargs="+", default=[0.5], metavar="P", help=text)
    text = "what SAM perturbs: all parameters (default), the last layer's, the rest; or all in a random direction"
    parser.add_argument("--perturb", choices=["all", "last", "rest", "random"], default="all", help=text)
    main(parser, train, settings)

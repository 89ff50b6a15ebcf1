"""Does SAM's gain over SGD grow far more under label noise? The paper's Figure 5a.

    python label_noise.py --hidden 75-25 300-100 1200-400 --noise 0.25 0.5 0.75 --val-size 5000 --seed 0 1 2
    python label_noise.py --hidden 75-25 300-100 1200-400 --noise 0.25 0.5 0.75 --val-size 5000 --seed 0 1 2 \\
        --sam --rho 0.05 0.1 0.2
    python plot.py

The noise is symmetric and in the training labels alone; held-out and test labels stay clean. The result file has the
accuracy on the labels trained on, the flipped among them (train_acc), and on their originals (train_clean_acc). plot.py
takes the clean runs beside them from mlp_width.py and resnet_width.py; a run takes as long as theirs.

The gain after the last epoch, tens of points, is mostly SGD fitting the flipped labels. Run both with fewer epochs, too
(--epochs 12, 24), and plot.py also gives the gain where each has the number that suits it: about 1 point on MNIST.
"""

import math

import numpy as np
import torch

from common import (
    LOSSES,
    SAM,
    Recorder,
    Scores,
    average_gradients,
    batches,
    bounded_number,
    build_model,
    drop_gradients,
    evaluate,
    flags,
    from_main,
    frozen_bn_stats,
    last_layer_share,
    learning_rate,
    load_data,
    main,
    measure_sharpness,
)

MNIST = {"dataset": "mnist", "epochs": 100, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
MNIST |= {"loss": "ce", "schedule": "step", "milestones": (0.25, 0.5, 0.75)}
CIFAR10 = MNIST | {"dataset": "cifar10", "epochs": 200, "weight_decay": 5e-4, "milestones": (0.5, 0.75)}
SETTINGS = {"hidden": MNIST, "filters": CIFAR10}  # the paper's, by the flag that picks the model


def flip_labels(labels, noise, classes, seed):
    """A copy of labels (N,) in which exactly round(noise N), a function of the seed, have become another class.

    The images of a lower noise rate are among those of a higher one.
    """
    rng = np.random.default_rng((seed, 0))  # epochs count from 1: a stream apart from the data order's
    chosen = rng.permutation(len(labels))[: round(noise * len(labels))]
    shifts = np.zeros(len(labels), dtype=np.int64)
    shifts[chosen] = rng.integers(1, classes, len(chosen))
    return (labels + torch.from_numpy(shifts).to(labels.device)) % classes


def train(config):
    data = load_data(config)
    model = build_model(config, data)
    clean = data.train.targets
    noisy = flip_labels(clean, config.noise, data.outputs, config.seed)
    loss_fn = LOSSES[config.loss]
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)

    for epoch in recorder.epochs():
        model.train()
        scores, share = Scores(loss_fn), 0  # share: of the last layer in |g|^2
        for step, (x, y, clean_y) in enumerate(
            batches(data, config, epoch, noisy, clean), (epoch - 1) * steps_per_epoch
        ):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            outputs = model(x)
            loss_fn(outputs, y).backward()
            if sam:
                share += last_layer_share(model)
                drop_gradients(model, config.perturb)
                sam.perturb()
                with frozen_bn_stats(model):  # the statistics are those of the first pass alone
                    loss_fn(model(x), y).backward()
            if config.processes > 1:
                average_gradients(model, len(y))
            if sam:
                sam.step()  # restores w, then takes the optimizer's step
            else:
                optimizer.step()
            scores.add(outputs, y, clean_y)
        row = {"epoch": epoch, "lr": lr, **scores.means("train_loss", "train_acc", "train_clean_acc")}
        row |= evaluate(model, loss_fn, data.test, "test") | evaluate(model, loss_fn, data.val, "val")
        if sam:
            row["last_layer_share"] = from_main((share / steps_per_epoch).item())
        recorder.end_epoch(row)

    curvature = measure_sharpness(recorder, loss_fn, data.train, noisy)
    recorder.finish(num_test=len(data.test.targets), sharpness=curvature)


if __name__ == "__main__":
    parser = flags(__doc__, SETTINGS, "hidden", "filters")
    text = "fraction of the training labels replaced (default: 0.5)"
    fraction = bounded_number(float, 0, 1, closed=True)
    parser.add_argument("--noise", type=fraction, nargs="+", default=[0.5], metavar="P", help=text)
    main(parser, train, lambda args: SETTINGS["hidden" if args.hidden else "filters"])

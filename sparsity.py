"""Does a wide network that is pruned at initialization keep SAM's gain? The paper's Figure 5b.

    python sparsity.py --filters 64 --sparsity 0.938 --pruner snip --val-size 5000 --seed 0 1 2
    python sparsity.py --filters 64 --sparsity 0.938 --pruner snip --val-size 5000 --seed 0 1 2 \\
        --sam --rho 0.01 0.02 0.05 0.1 0.2
    python plot.py

Only the kernels of linear and convolutional layers are pruned. The dense narrow networks beside which plot.py draws the
sparse wide ones, at equal non-zero parameters (0.938 leaves 64 filters as many as 16 have), are those of mlp_width.py
and resnet_width.py. A run takes as long as a dense one: masks save no time.
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


def keep_highest(scores, count):
    """Masks like the list of tensors `scores`, False at the `count` lowest of all their scores together."""
    mask = torch.ones(sum(s.numel() for s in scores), dtype=torch.bool, device=scores[0].device)
    mask[torch.cat([s.flatten() for s in scores]).argsort()[:count]] = False
    return [part.view_as(s) for part, s in zip(mask.split([s.numel() for s in scores]), scores)]


def prune(model, kernels, loss_fn, config, data):
    """The kernels' masks, True where a weight is kept: of n weights, or of a layer's n (random), round(sparsity n) go.

    random: an equal share of each layer, chosen uniformly; magnitude: the smallest |w| of all layers together;
    snip: the smallest |w g| of all layers together, g the gradient on one training batch (Lee et al., ICLR 2019).
    """
    if config.pruner == "random":
        rng = np.random.default_rng((config.seed, 0))  # epochs count from 1: a stream apart from the data order's
        scores = [torch.from_numpy(rng.random(w.shape, np.float32)).to(w.device) for w in kernels]
        return [keep_highest([s], round(config.sparsity * s.numel()))[0] for s in scores]
    scores = [w.detach().abs() for w in kernels]
    if config.pruner == "snip":
        x, y = next(batches(data, config, 1))
        model.double()  # or rounding chooses, in which devices and kernels differ
        with frozen_bn_stats(model):
            loss_fn(model(x.double()), y).backward()
        if config.processes > 1:
            average_gradients(model, len(y))  # so that all prune alike
        scores = [s * w.grad.abs() for s, w in zip(scores, kernels)]
        model.to(x.dtype)
    return keep_highest(scores, round(config.sparsity * sum(s.numel() for s in scores)))


def mask_weight(weight, mask):
    """Masks the weight and all its gradients, so that SAM, momentum and weight decay leave zeros at zero."""

    def mask_gradient(weight):
        weight.grad *= mask

    weight.data *= mask
    weight.register_post_accumulate_grad_hook(mask_gradient)


def train(config):
    data = load_data(config)
    model = build_model(config, data)
    loss_fn = LOSSES[config.loss]
    kernels = [w for w in model.parameters() if w.ndim > 1]
    masks = dict(zip(kernels, prune(model, kernels, loss_fn, config, data)))
    for w, mask in masks.items():
        mask_weight(w, mask.to(w))
    removed = sum(int((~mask).sum()) for mask in masks.values())
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)

    for epoch in recorder.epochs():
        model.train()
        scores, share = Scores(loss_fn), 0  # share: of the last layer in |g|^2
        for step, (x, y) in enumerate(batches(data, config, epoch), start=(epoch - 1) * steps_per_epoch):
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
            scores.add(outputs, y)
        row = {"epoch": epoch, "lr": lr, **scores.means("train_loss", "train_acc")}
        row |= evaluate(model, loss_fn, data.test, "test") | evaluate(model, loss_fn, data.val, "val")
        if sam:
            row["last_layer_share"] = from_main((share / steps_per_epoch).item())
        recorder.end_epoch(row)

    recorder.finish(
        num_test=len(data.test.targets),
        num_nonzero=sum(p.numel() for p in model.parameters()) - removed,
        sharpness=measure_sharpness(
            recorder,
            loss_fn,
            data.train,
            data.train.targets,
            [masks.get(p, torch.ones_like(p)) for p in model.parameters()],
        ),
    )


if __name__ == "__main__":
    parser = flags(__doc__, SETTINGS, "hidden", "filters")
    text = "fraction of the kernel weights removed (default: 0.9)"
    below_1 = bounded_number(float, 0, 1)
    parser.add_argument("--sparsity", type=below_1, nargs="+", default=[0.9], metavar="S", help=text)
    text = "how they are chosen (default: random)"
    parser.add_argument("--pruner", choices=["random", "snip", "magnitude"], default="random", help=text)
    main(parser, train, lambda args: SETTINGS["hidden" if args.hidden else "filters"])

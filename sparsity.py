r"""Does a wide network that is pruned at initialization keep SAM's gain? The paper's Figure 5b.

    python sparsity.py --filters 64 --sparsity 0.938 --pruner snip --val-size 5000 --seed 0 1 2
    python sparsity.py --filters 64 --sparsity 0.938 --pruner snip --val-size 5000 --seed 0 1 2 \
        --sam --rho 0.01 0.02 0.05 0.1 0.2
    python plot.py

Only the kernels of linear and convolutional layers are pruned. The dense narrow networks beside which plot.py draws the
sparse wide ones, at equal non-zero parameters (0.938 leaves 64 filters as many as 16 have), are those of mlp_width.py
and resnet_width.py. A run takes as long as a dense one: masks save no time.
"""

import math

import numpy as np
import torch
from torch.optim import SGD

from common import SAM, Recorder, Scores, batches, build_model, evaluate, frozen_bn_stats, learning_rate, load_data
from common import bounded_number, flags, main, tell

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
# Masks
# ----------------------------------------------------------------------------------------------------------------------


def keep_highest(scores, sparsity):
    """Masks like the list of tensors `scores`, False at this fraction of them, the lowest of all together."""
    flat = torch.cat([s.flatten() for s in scores])
    removed = round(sparsity * len(flat))
    mask = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    mask[flat.argsort(stable=True)[:removed]] = False

    parts = mask.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores)]


def random_masks(kernels, sparsity, seed):
    """An equal share of each layer, chosen uniformly."""
    rng = np.random.default_rng((seed, 0))  # data order draws from (seed, epoch), epochs from 1, so from other numbers
    masks = []

    for w in kernels:
        scores = torch.from_numpy(rng.random(w.shape, np.float32)).to(w.device)
        masks += keep_highest([scores], sparsity)

    return masks


def snip_scores(model, kernels, data, config):
    """|w g| of each weight, g the gradient on one training batch (Lee et al., ICLR 2019)."""
    x, y = next(batches(data, config, epoch=1))
    dtype = kernels[0].dtype
    model.double()  # or rounding chooses, in which devices and kernels differ

    with frozen_bn_stats(model):
        data.loss_fn(model(x.double()), y).backward()

    scores = [(w.detach() * w.grad).abs() for w in kernels]
    model.to(dtype)
    return scores


def prune(model, kernels, data, config):
    """The kernels' masks, True where a weight is kept: round(sparsity n) of n weights go.

    random: of each layer's n; snip and magnitude: of all layers' n together, those with the smallest |w g| or |w|.
    """
    if config.pruner == "random":
        return random_masks(kernels, config.sparsity, config.seed)

    if config.pruner == "snip":
        scores = snip_scores(model, kernels, data, config)
    else:
        scores = [w.detach().abs() for w in kernels]

    return keep_highest(scores, config.sparsity)


def mask_weight(weight, mask):
    """Masks the weight and all its gradients, so that SAM, momentum and weight decay leave zeros at zero."""

    def mask_gradient(weight):
        weight.grad *= mask

    weight.data *= mask
    weight.register_post_accumulate_grad_hook(mask_gradient)


def tell_of_empty_layers(model, masks, config):
    empty = []
    for name, w in model.named_parameters():
        if w in masks and not masks[w].any():
            empty.append(name)

    if empty:
        what = f"--sparsity {config.sparsity} --pruner {config.pruner}"
        tell(f"{what}: no weight is left in {', '.join(empty)}; the network's output can't depend on its input there")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train(config):
    """One run: config has one value of every flag."""
    data = load_data(config)
    loss_fn = data.loss_fn
    model = build_model(config, data)

    kernels = [w for w in model.parameters() if w.ndim > 1]
    masks = dict(zip(kernels, prune(model, kernels, data, config)))
    tell_of_empty_layers(model, masks, config)
    for w, mask in masks.items():
        mask_weight(w, mask.to(w))

    optimizer = SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, data, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)

    for epoch in recorder.epochs():
        model.train()
        scores = Scores(loss_fn)
        first_step = (epoch - 1) * steps_per_epoch

        for step, (x, y) in enumerate(batches(data, config, epoch), first_step):
            lr = learning_rate(config, step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr

            optimizer.zero_grad()
            outputs = model(x)
            loss_fn(outputs, y).backward()

            if sam:
                sam.perturb()  # w becomes w + e
                with frozen_bn_stats(model):  # the statistics are those of the first pass alone
                    loss_fn(model(x), y).backward()
                sam.step()  # w again, then the optimizer's step
            else:
                optimizer.step()

            scores.add(outputs, y)

        row = {"epoch": epoch, "lr": lr}
        row.update(scores.means("train_loss", "train_acc"))
        row.update(evaluate(model, loss_fn, data.test, "test"))
        row.update(evaluate(model, loss_fn, data.val, "val"))
        recorder.end_epoch(row)

    kept = [masks.get(p, torch.ones_like(p)) for p in model.parameters()]
    num_nonzero = sum(int(mask.sum()) for mask in kept)
    recorder.finish(masks=kept, num_nonzero=num_nonzero)  # --sharpness looks in the directions that are kept


if __name__ == "__main__":
    parser = flags(__doc__, "hidden", "filters")
    below_1 = bounded_number(float, 0, 1)
    text = "fraction of the kernel weights removed (default: 0.9)"
    parser.add_argument("--sparsity", type=below_1, nargs="+", default=[0.9], metavar="S", help=text)
    text = "how they are chosen (default: random)"
    parser.add_argument("--pruner", choices=["random", "snip", "magnitude"], default="random", help=text)
    main(parser, train, lambda args: MNIST if args.hidden else CIFAR10)

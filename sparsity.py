"""Does a wide network that is pruned at initialization keep SAM's gain? The paper's sparsity figure.

    python sparsity.py --filters 64 --sparsity 0 0.8 0.9 0.94 --pruner snip --seed 0 1 2
    python sparsity.py --filters 64 --sparsity 0 0.8 0.9 0.94 --pruner snip --seed 0 1 2 --sam --rho 0.02 0.05 0.1 0.2
    python plot.py

Only the kernels of linear and convolutional layers are pruned. The dense narrow networks beside which plot.py draws the
sparse wide ones are those with --sparsity 0, and those of mlp_width.py and resnet_width.py.

A run takes as long as a dense one: masks save no time. In miniature (bash run.sh quick), 600-200 at 90% sparsity
gains 0.4 +- 0.6 points where 75-25, dense, of as many weights, gains -0.7 +- 2.3.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    SAM,
    Run,
    average_gradients,
    batches,
    build_model,
    flags,
    frozen_bn_stats,
    load_data,
    main,
    number,
    set_learning_rate,
)


def lowest(scores, count):
    """Masks like the list of tensors `scores`, False at the `count` lowest scores of all of them together."""
    mask = torch.ones(sum(s.numel() for s in scores), dtype=torch.bool, device=scores[0].device)
    mask[torch.cat([s.flatten() for s in scores]).argsort()[:count]] = False
    return [part.view_as(s) for part, s in zip(mask.split([s.numel() for s in scores]), scores)]


def prune(model, kernels, config, data):
    """The kernels' masks, True where a weight is kept: of n, exactly round(sparsity n) are removed.

    random: an equal share of each layer, chosen uniformly; magnitude: the smallest |w| of all layers together;
    snip: the smallest |w g| of all layers together, g the gradient on one training batch (Lee et al., ICLR 2019).
    """
    if config.pruner == "random":
        rng = np.random.default_rng((config.seed, 0))  # epochs count from 1: a stream apart from the data order's
        scores = [torch.from_numpy(rng.random(w.shape, np.float32)).to(w.device) for w in kernels]
        return [lowest([s], round(config.sparsity * s.numel()))[0] for s in scores]
    scores = [w.detach().abs() for w in kernels]
    if config.pruner == "snip":
        images, y = next(batches(data, config, 1, data.train.labels))
        model.double()  # or rounding chooses, in which devices and kernels differ
        with frozen_bn_stats(model):
            F.cross_entropy(model(images.double()), y).backward()
        average_gradients(model, len(y))  # of the processes' shares: all prune alike
        scores = [s * w.grad.abs() for s, w in zip(scores, kernels)]
        model.to(images.dtype)
    return lowest(scores, round(config.sparsity * sum(s.numel() for s in scores)))


def apply(mask, weight):
    """Masks the weight and all its gradients, so that SAM, momentum and weight decay leave zeros at zero."""

    def mask_gradient(weight):
        weight.grad *= mask

    weight.data *= mask
    weight.register_post_accumulate_grad_hook(mask_gradient)


def train(config):
    data = load_data(config)
    model = build_model(config, data)
    kernels = [w for w in model.parameters() if w.ndim > 1]
    masks = prune(model, kernels, config, data)
    for w, mask in zip(kernels, masks):
        apply(mask.to(w), w)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    run = Run(config, model, optimizer)
    labels = data.train.labels
    updates = -(-len(labels) // config.batch_size)  # an epoch

    for epoch in run.epochs():
        model.train()
        outputs = []
        for step, (images, y) in enumerate(batches(data, config, epoch, labels), (epoch - 1) * updates):
            set_learning_rate(config, optimizer, step, config.epochs * updates)
            optimizer.zero_grad()
            logits = model(images)
            F.cross_entropy(logits, y).backward()
            if sam:
                sam.perturb()
                with frozen_bn_stats(model):
                    F.cross_entropy(model(images), y).backward()
            average_gradients(model, len(y))
            (sam or optimizer).step()
            outputs.append((logits.detach(), y))
        run.end_epoch(outputs, data)
    run.finish(removed=sum(int((~mask).sum()) for mask in masks))


if __name__ == "__main__":
    parser = flags(__doc__)
    text = "fraction of the kernel weights removed (default: 0.9)"
    sparsity = number(float, 0, 1, below=True)
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.9], metavar="S", help=text)
    text = "how they are chosen (default: random)"
    parser.add_argument("--pruner", choices=["random", "snip", "magnitude"], default="random", help=text)
    main(parser, train)

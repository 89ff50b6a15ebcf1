"""Does SAM's gain over SGD grow with a ResNet's width? The CIFAR-10 panel of the paper's main figure.

    python resnet_width.py --filters 4 8 16 32 64 128 256 --seed 0 1 2
    python resnet_width.py --filters 4 8 16 32 64 128 256 --seed 0 1 2 --sam --rho 0.02 0.05 0.1 0.2
    python plot.py

A run of SGD at 64 filters takes about 7 minutes on an A100 (estimate), SAM twice that, and twice the filters 4 times
that. The paper's gains grow from 0.4 points at 4 filters to about 1 from 64 on.
"""

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
    set_learning_rate,
)


def train(config):
    data = load_data(config)
    model = build_model(config, data)
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
    run.finish()


if __name__ == "__main__":
    main(flags(__doc__, filters=[64]), train)

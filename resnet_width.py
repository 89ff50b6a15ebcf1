"""Does SAM's gain over SGD grow with a ResNet's width? The CIFAR-10 panel of the paper's Figure 1.

    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2
    python resnet_width.py --filters 4 8 16 32 64 128 256 --val-size 5000 --seed 0 1 2 \\
        --sam --rho 0.001 0.005 0.01 0.02 0.05 0.1 0.2 0.5 1
    python plot.py

A run of SGD at 64 filters takes about 7 minutes on an A100 (estimate), SAM twice that, and twice the filters 4 times
that. The paper's gains grow from 0.4 points at 4 filters to about 1 from 64 on.
"""

import math

import torch

from common import (
    LOSSES,
    SAM,
    Recorder,
    Scores,
    average,
    average_gradients,
    batches,
    broadcast_buffers,
    build_model,
    drop_gradients,
    evaluate,
    flags,
    frozen_bn_stats,
    last_layer_share,
    learning_rate,
    load_data,
    main,
    measure_sharpness,
)

SETTINGS = {  # the paper's
    "resnet18": {
        "dataset": "cifar10",
        **{"epochs": 200, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "loss": "ce"},
        **{"schedule": "step", "milestones": (0.5, 0.75)},
    },
}


def train(config):
    data = load_data(config)
    model = build_model(config, data)
    loss_fn = LOSSES[config.loss]
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    sam = SAM(optimizer, config.rho, config.adaptive) if config.sam else None
    recorder = Recorder(config, model, optimizer)
    steps_per_epoch = math.ceil(len(data.train.targets) / config.batch_size)

    for epoch in recorder.epochs():
        model.train()
        scores, share = Scores(loss_fn), 0
        for step, (x, y) in enumerate(batches(data, config, epoch), start=(epoch - 1) * steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps_per_epoch)
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
        if config.processes > 1:
            broadcast_buffers(model)
        row = {"epoch": epoch, "lr": group["lr"], **scores.means("train_loss", "train_acc")}
        row |= evaluate(model, loss_fn, data.test, "test") | evaluate(model, loss_fn, data.val, "val")
        if sam:
            row["last_layer_share"] = average(share / steps_per_epoch)
        recorder.end_epoch(row)

    recorder.finish(sharpness=measure_sharpness(config, model, loss_fn, data.train, data.train.targets))


if __name__ == "__main__":
    main(flags(__doc__, SETTINGS, "filters"), train, lambda args: SETTINGS["resnet18"])

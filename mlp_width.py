"""Does SAM's gain over SGD grow with an MLP's width? The MNIST panel of the paper's main figure.

    python mlp_width.py --hidden 75-25 150-50 300-100 1200-400 3000-1000 --seed 0 1 2
    python mlp_width.py --hidden 75-25 150-50 300-100 1200-400 3000-1000 --seed 0 1 2 --sam --rho 0.02 0.05 0.1 0.2
    python plot.py

On 2 cores a run of SGD takes 1.5 minutes at 300-100, 6 at 1200-400 and 22 at 3000-1000, SAM twice that. The paper's
gains are 0.07 points at 75-25 and 0.19 from 1200-400 on.
"""

import torch
import torch.nn.functional as F

from common import SAM, Run, average_gradients, batches, build_model, flags, load_data, main, set_learning_rate


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
                F.cross_entropy(model(images), y).backward()
            average_gradients(model, len(y))
            (sam or optimizer).step()
            outputs.append((logits.detach(), y))
        run.end_epoch(outputs, data)
    run.finish()


if __name__ == "__main__":
    main(flags(__doc__, hidden=["300-100"]), train)

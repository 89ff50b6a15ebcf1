"""Models, schedules, losses, noise, masks and names against paper and arithmetic; the scripts' loops against a plain
one in float64."""

import argparse
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_close, interrupt, plain_run, result_of, runs, strict, timeless, train

import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import MLP, SAM, ResNet18, learning_rate

MLP_COUNTS = {"75-25": 61_035, "150-50": 125_810, "300-100": 266_610, "1200-400": 1_426_410, "3000-1000": 5_366_010}
RESNET_COUNTS = {
    **{4: 44_622, 8: 176_402, 16: 701_466, 32: 2_797_610},
    **{64: 11_173_962, 128: 44_662_922, 256: 178_585_866},
}
STEP3, STEP2 = (0.25, 0.5, 0.75), (0.5, 0.75)


def stepwise(milestones, lr=0.1):
    return lambda step, steps: lr / 10 ** sum(step >= int(fraction * steps) for fraction in milestones)


def layers_of(hidden):
    return tuple(map(int, hidden.split("-")))


# ------------------------------------------------------------ the models


@pytest.mark.parametrize("width", [*MLP_COUNTS, *RESNET_COUNTS])
def test_parameter_counts_are_the_papers(width):
    with torch.device("meta"):
        model = ResNet18(width) if isinstance(width, int) else MLP(layers_of(width))
    assert sum(p.numel() for p in model.parameters()) == (MLP_COUNTS | RESNET_COUNTS)[width]


@pytest.mark.parametrize("hidden", ["100", "7-5", "1000-1000-1000", "9-8-7-6"])
def test_an_mlp_of_any_depth_has_the_parameters_of_its_layers(hidden):
    widths = [784, *layers_of(hidden), 10]
    with torch.device("meta"):
        model = MLP(layers_of(hidden))
    assert sum(p.numel() for p in model.parameters()) == sum(a * b + b for a, b in zip(widths, widths[1:]))
    assert sum(isinstance(m, nn.ReLU) for m in model) == len(widths) - 2


@pytest.mark.parametrize(
    ("dataset", "per_unit", "more"), [("teacher", 102, 1), ("curve", 3, 0), ("curve-scaled", 3, 0)]
)
def test_the_regressions_have_the_papers_parameters(tmp_path, dataset, per_unit, more):
    argv = ["--dataset", dataset, "--train-size", 60, "--epochs", 1]
    for config in runs(mlp_width, tmp_path, *argv, "--hidden", 10, 300):
        assert train(mlp_width, config)["num_params"] == per_unit * int(config.hidden) + more


@pytest.mark.parametrize("model", [MLP((600, 400)), ResNet18(16)])
def test_kernels_are_lecun_normal_and_the_rest_is_0_or_1(model):
    kernels = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    z = torch.cat([(w * math.sqrt(w[0].numel())).flatten() for w in kernels]).detach()
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs(z.std() - 1) < 4 / math.sqrt(len(z))
    assert 2.26 < z.abs().max() <= 2.2738  # two deviations of the normal before rescaling
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.all(p == (0 if name.endswith("bias") else 1)), name


def test_the_resnet_halves_its_resolution_thrice():
    shapes = []
    model = ResNet18(2, channels=1)
    for block in model[3:11]:
        block.register_forward_hook(lambda block, x, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert shapes[1::2] == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_amp_computes_in_bfloat16_and_gives_float32_and_nothing_else_does(tmp_path):
    seen = []
    for flag in ([], ["--amp"]):
        (config,) = runs(mlp_width, tmp_path, "--hidden", 9, *flag)
        model = common.build_model(config, common.load_data(config))
        model[1].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
        assert model(torch.rand(4, 1, 28, 28)).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def test_a_network_is_laid_out_as_its_device_likes_it(tmp_path):
    for filters, expected in ((4, torch.contiguous_format), (8, torch.channels_last)):
        (config,) = runs(resnet_width, tmp_path, "--filters", filters, "--train-size", 300)
        kernel = common.build_model(config, common.load_data(config))[3].branch[0].weight
        assert kernel.is_contiguous(memory_format=expected)


# ------------------------------------------------------------ defaults, schedules

WORKLOADS = {  # of paper.md; the teacher's rate, schedule and momentum are ours
    (mlp_width, ""): ("mnist", 100, 128, 0.1, 0.9, 1e-4, "ce", "step", STEP3),
    (mlp_width, "--dataset teacher"): ("teacher", 100, 128, 0.01, 0, 0, "mse", "step", STEP2),
    (mlp_width, "--dataset curve"): ("curve", 60, 6, 1.5e-4, 0, 0, "mse", "constant", ()),
    (mlp_width, "--dataset curve-scaled"): ("curve-scaled", 60, 6, 1.5e-4, 0, 0, "mse", "constant", ()),
    (resnet_width, ""): ("cifar10", 200, 128, 0.1, 0.9, 5e-4, "ce", "step", STEP2),
    (label_noise, "--hidden 9"): ("mnist", 100, 128, 0.1, 0.9, 1e-4, "ce", "step", STEP3),
    (label_noise, "--filters 9"): ("cifar10", 200, 128, 0.1, 0.9, 5e-4, "ce", "step", STEP2),
    (sparsity, "--hidden 9"): ("mnist", 100, 128, 0.1, 0.9, 1e-4, "ce", "step", STEP3),
    (sparsity, "--filters 9"): ("cifar10", 200, 128, 0.1, 0.9, 5e-4, "ce", "step", STEP2),
}


@pytest.mark.parametrize(("script", "argv"), WORKLOADS, ids=lambda x: getattr(x, "__name__", x))
def test_defaults_are_the_papers(monkeypatch, tmp_path, script, argv):
    monkeypatch.setattr("helpers.MINI", [])
    (config,) = runs(script, tmp_path, *argv.split())
    keys = "dataset epochs batch_size lr momentum weight_decay loss schedule milestones".split()
    assert tuple(getattr(config, key) for key in keys) == WORKLOADS[script, argv]
    more = (config.warmup, config.sharpness, config.seed, config.sam, config.rho, config.processes)
    assert more == (0, 0, 0, False, None, 1)
    assert getattr(config, "noise", 0.5) == 0.5 and getattr(config, "sparsity", 0.9) == 0.9
    assert getattr(config, "perturb", None) == ("all" if script is label_noise else None)
    (config,) = runs(script, tmp_path, *argv.split(), "--sam")
    assert config.rho == 0.05


def rates(epochs, steps_per_epoch, **settings):
    config = argparse.Namespace(epochs=epochs, lr=0.1, **{"warmup": 0, "milestones": (), **settings})
    return [learning_rate(config, step, steps_per_epoch) for step in range(epochs * steps_per_epoch)]


@pytest.mark.parametrize(
    ("milestones", "epochs", "updates", "drops"),
    [(STEP3, 20, 469, (2345, 4690, 7035)), (STEP2, 20, 391, (3910, 5865)), (STEP3, 3, 7, (5, 10, 15))],
)
def test_the_learning_rate_drops_at_the_papers_updates(milestones, epochs, updates, drops):
    for step, rate in enumerate(rates(epochs, updates, schedule="step", milestones=milestones)):
        assert math.isclose(rate, 0.1 / 10 ** sum(step >= drop for drop in drops))


def test_a_constant_rate_is_constant():
    assert set(rates(3, 7, schedule="constant", milestones=STEP3)) == {0.1}


def test_a_cosine_falls_from_the_rate_to_nearly_0_by_its_closed_form():
    found = rates(4, 25, schedule="cosine")
    assert found[0] == 0.1 and math.isclose(found[50], 0.05)
    for step, rate in enumerate(found):
        assert math.isclose(rate, 0.1 * math.cos(math.pi * step / 200) ** 2)  # (1 + cos x) / 2 = cos(x / 2)^2
    assert 0 < found[-1] < 1e-4


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_a_warm_up_is_linear_and_meets_the_schedule_without_a_jump(schedule):
    found = rates(4, 25, schedule=schedule, warmup=10, milestones=STEP2)
    assert [round(rate, 12) for rate in found[:11]] == [round(0.01 * (i + 1), 12) for i in range(10)] + [0.1]
    if schedule == "cosine":  # over the updates that are left
        assert all(math.isclose(found[10 + i], 0.1 * math.cos(math.pi * i / 180) ** 2) for i in range(90))
    else:
        assert found[10:] == rates(4, 25, schedule=schedule, milestones=STEP2)[10:]


# ------------------------------------------------------------ losses and accuracy


def test_the_squared_error_is_summed_over_outputs_and_averaged_over_the_batch():
    outputs = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([2, 0])  # (1 + 4 + 4 + 1 + 0 + 1) / 2
    assert common.LOSSES["mse"](outputs, labels) == 5.5
    assert common.LOSSES["mse"](torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]])) == 2.5
    assert common.LOSSES["mse"](torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])) == 5
    uniform = common.LOSSES["ce"](torch.zeros(2, 4), labels)
    assert math.isclose(uniform, math.log(4), rel_tol=1e-6)


def test_scores_are_those_of_all_batches_together_however_many_and_uneven():
    rng = torch.Generator().manual_seed(0)
    outputs = torch.randn(1000, 5, generator=rng, dtype=torch.float64)
    labels, others = torch.randint(5, (2, 1000), generator=rng)
    scores = common.Scores(F.cross_entropy)
    sizes = [1 + i % 11 for i in range(200)]
    edges = np.cumsum([0, *(size for size in sizes)])
    edges = [*edges[edges < 1000], 1000]
    for a, b in zip(edges, edges[1:]):
        scores.add(outputs[a:b], labels[a:b], others[a:b])
    means = scores.means("train_loss", "train_acc", "train_clean_acc")
    assert len(edges) > 130
    log_p = outputs - outputs.exp().sum(1, keepdim=True).log()
    expected = -statistics.fmean(log_p[i, y].item() for i, y in enumerate(labels))
    assert math.isclose(means["train_loss"], expected, rel_tol=1e-12)
    best = [row.index(max(row)) for row in outputs.tolist()]
    assert means["train_acc"] == sum(a == b for a, b in zip(best, labels.tolist())) / 1000
    assert means["train_clean_acc"] == sum(a == b for a, b in zip(best, others.tolist())) / 1000


def test_a_regression_has_no_accuracy(tmp_path):
    (config,) = runs(
        mlp_width, tmp_path, *"--dataset teacher --hidden 9 --train-size 60 --val-size 60 --epochs 2".split()
    )
    result = train(mlp_width, config)
    losses = {"epoch", "lr", "seconds", "train_loss", "test_loss", "val_loss"}
    assert [row.keys() for row in result["history"]] == [losses, losses]
    assert result["test_acc"] is None and result["best_test_acc"] is None
    assert result["test_loss"] == result["history"][-1]["test_loss"]


# ------------------------------------------------------------ noise and masks


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5, 0.777, 1.0])
def test_exactly_the_asked_number_of_labels_flip_to_other_classes(noise):
    labels = torch.arange(1003) % 10
    noisy = label_noise.flip_labels(labels, noise, 10, seed=0)
    assert (noisy != labels).sum() == round(noise * 1003)
    assert noisy.min() >= 0 and noisy.max() <= 9
    assert torch.equal(noisy, label_noise.flip_labels(labels, noise, 10, seed=0))
    if noise:
        assert not torch.equal(noisy, label_noise.flip_labels(labels, noise, 10, seed=1))


def test_flipped_labels_are_uniform_over_the_other_classes():
    labels = torch.zeros(90_000, dtype=torch.int64)
    counts = torch.bincount(label_noise.flip_labels(labels, 1.0, 10, seed=0), minlength=10)
    assert counts[0] == 0
    assert ((counts[1:] - 10_000) ** 2 / 10_000).sum() < 26.1  # chi square, 8 degrees of freedom, 0.1%


def test_the_images_of_a_lower_noise_rate_are_among_those_of_a_higher_one():
    labels = torch.zeros(1000, dtype=torch.int64)
    few, many = (label_noise.flip_labels(labels, noise, 10, seed=3) != 0 for noise in (0.2, 0.6))
    assert few.sum() == 200 and torch.all(many[few])
    assert abs(few[:500].sum() - 100) < 40  # spread over the data, not its first rows


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.937])
@pytest.mark.parametrize("pruner", ["random", "snip", "magnitude"])
def test_masks_remove_exactly_what_was_asked(tmp_path, pruner, rate):
    argv = ["--filters", 2, "--pruner", pruner, "--sparsity", rate, "--train-size", 300, "--batch-size", 16]
    (config,) = runs(sparsity, tmp_path, *argv)
    data = common.load_data(config)
    model = common.build_model(config, data)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    statistics_before = [b.clone() for b in model.buffers()]
    weights = [w.clone() for w in kernels]
    masks = sparsity.prune(model, kernels, data, config)
    assert all(map(torch.equal, statistics_before, model.buffers())) and all(map(torch.equal, weights, kernels))
    removed = [int((~mask).sum()) for mask in masks]
    if pruner == "random":
        assert removed == [round(rate * w.numel()) for w in kernels]
        return
    assert sum(removed) == round(rate * sum(w.numel() for w in kernels))
    scores = [w.abs() for w in kernels]
    if pruner == "snip":
        images, y = next(common.batches(data, config, 1))
        model.zero_grad()
        F.cross_entropy(model.double()(images.double()), y).backward()
        scores = [(w * w.grad).abs() for w in kernels]
    if sum(removed):
        gone = max(s[~mask].max() for s, mask in zip(scores, masks) if not mask.all())
        assert gone <= min(s[mask].min() for s, mask in zip(scores, masks) if mask.any())


def test_snip_prunes_alike_whatever_kernels_compute_the_gradient(tmp_path):
    (config,) = runs(sparsity, tmp_path, "--filters", 8, "--pruner", "snip", "--train-size", 300, "--batch-size", 8)
    data, found = common.load_data(config), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = common.build_model(config, data).to(memory_format=memory_format)
        kernels = [p for p in model.parameters() if p.ndim > 1]
        found.append(sparsity.prune(model, kernels, data, config))
    assert all(map(torch.equal, *found))


def test_random_masks_are_functions_of_the_seed(tmp_path):
    argv = ["--hidden", "30-20", "--train-size", 300, "--seed", 0, 1]
    found = []
    for config in runs(sparsity, tmp_path, *argv) * 2:
        data = common.load_data(config)
        model = common.build_model(config, data)
        kernels = [p for p in model.parameters() if p.ndim > 1]
        found.append(torch.cat([m.flatten() for m in sparsity.prune(model, kernels, data, config)]))
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert 0.15 < (found[0] != found[1]).double().mean() < 0.21  # 2 x 0.9 x 0.1, as if independent


@pytest.mark.parametrize("optimizer", [[], ["--sam", "--rho", 0.3], ["--sam", "--rho", 0.3, "--adaptive"]])
def test_pruned_weights_are_zero_at_every_step(monkeypatch, tmp_path, optimizer):
    argv = ["--hidden", "20-10", "--epochs", 2, "--weight-decay", 0.1, "--train-size", 300, *optimizer]
    (config,) = runs(sparsity, tmp_path, *argv)
    seen = []

    def watch(model, inputs):  # called at w and, under SAM, at w + e
        seen.append(sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Linear)))

    build = common.build_model
    monkeypatch.setattr(sparsity, "build_model", lambda *a: (m := build(*a)).register_forward_pre_hook(watch) and m)
    result = train(sparsity, config)
    removed = sum(round(0.9 * n) for n in (784 * 20, 20 * 10, 10 * 10))
    assert result["num_params"] - result["num_nonzero"] == removed
    assert len(seen) >= 10 and set(seen) == {removed}


# ------------------------------------------------------------ where SAM perturbs


@pytest.mark.parametrize("perturb", ["all", "last", "rest", "random"])
@pytest.mark.parametrize("make", [lambda: MLP((7, 5), 12, 3), lambda: ResNet18(1, 1, 3)], ids=["mlp", "resnet"])
def test_the_layers_that_sam_perturbs_move_by_rho_and_no_other(make, perturb):
    torch.manual_seed(0)
    model = make()
    x = torch.rand(6, 12) if len(model) < 8 else torch.rand(6, 1, 8, 8)
    F.cross_entropy(model(x), torch.arange(6) % 3).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    label_noise.choose_perturbation(model, perturb, seed=0, step=0)
    SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.7).perturb()
    moves = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    last = {f"{len(model) - 1}.weight", f"{len(model) - 1}.bias"}
    expected = {"last": last, "rest": set(moves) - last}.get(perturb, set(moves))
    assert {name for name, move in moves.items() if move.any()} <= expected
    assert last & expected <= {name for name, move in moves.items() if move.any()}
    total = math.sqrt(sum((move.double() ** 2).sum().item() for move in moves.values()))
    assert math.isclose(total, 0.7, rel_tol=1e-4)


def flat(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def perturbations(monkeypatch, config):
    """[(gradient, e)] of every step of a run of label_noise.py, as vectors."""
    found = []
    choose = label_noise.choose_perturbation

    class Watched(SAM):
        def perturb(self):
            params = self.optimizer.param_groups[0]["params"]
            before = flat(params)
            super().perturb()
            found[-1].append(flat(params) - before)

    def watch(model, *args):
        found.append([flat(p.grad for p in model.parameters())])
        choose(model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(label_noise, "SAM", Watched)
        patch.setattr(label_noise, "choose_perturbation", watch)
        label_noise.train(config)
    return found


def cosines(one, other):
    return [torch.cosine_similarity(a, b, dim=0).abs().item() for a, b in zip(one, other)]


def test_a_random_perturbation_has_length_rho_and_a_direction_of_its_own(monkeypatch, tmp_path):
    argv = "--hidden 30-20 --train-size 300 --epochs 2 --sam --rho 0.3 --perturb random --noise 0.5".split()
    zero, one = runs(label_noise, tmp_path, *argv, "--seed", 0, 1)
    gradients, moves = zip(*perturbations(monkeypatch, zero))
    n = len(moves[0])
    assert len(moves) == 6 and n == 24_380
    for e in moves:
        assert math.isclose(e.norm(), 0.3, rel_tol=1e-4)
        e = e * n**0.5 / 0.3
        for part in (e, e[-210:]):  # all parameters, and the last layer's: N(0, 1)
            assert abs(part.mean()) < 4 / len(part) ** 0.5
            assert abs(part.var() - 1) < 4 * (2 / len(part)) ** 0.5
        assert e.abs().max() > 3
    assert max(cosines(moves, gradients)) < 4 / n**0.5
    for later in range(1, 6):  # drawn anew at every step, of every epoch
        assert max(cosines(moves, moves[later:])) < 4 / n**0.5
    _, others = zip(*perturbations(monkeypatch, one))
    assert max(cosines(moves, others)) < 4 / n**0.5  # and for every seed


def test_a_random_perturbation_is_a_function_of_seed_and_step(monkeypatch, tmp_path):
    argv = "--hidden 9 --train-size 300 --epochs 3 --sam --perturb random".split()
    quiet, noisy = runs(label_noise, tmp_path / "whole", *argv, "--noise", 0.1, 0.6)
    _, whole = zip(*perturbations(monkeypatch, quiet))
    _, other = zip(*perturbations(monkeypatch, noisy))
    assert min(cosines(whole, other)) > 0.9999  # whatever else differs
    (config,) = runs(label_noise, tmp_path / "parts", *argv, "--noise", 0.1)
    interrupt(label_noise, config, 2)
    _, rest = zip(*perturbations(monkeypatch, config))
    assert len(rest) == 3 and min(cosines(rest, whole[6:])) > 0.9999
    assert timeless(result_of(tmp_path / "parts")) == timeless(strict(common.result_path(quiet)))


def test_the_last_layers_share_of_the_squared_gradient():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 1)), nn.Flatten())
    for p, g in zip(model.parameters(), ([[1.0], [2.0]], [0.0, 2.0], [[3.0, 0.0]], [1.0])):
        p.grad = torch.tensor(g)  # 1 + 4 + 4 = 9 before the last layer, 9 + 1 = 10 in it
    assert math.isclose(label_noise.last_layer_share(model), 10 / 19, rel_tol=1e-6)
    model[0].bias.grad = None
    assert math.isclose(label_noise.last_layer_share(model), 10 / 15, rel_tol=1e-6)
    model[2][0].bias.grad = None
    assert math.isclose(label_noise.last_layer_share(model), 9 / 14, rel_tol=1e-6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert label_noise.last_layer_share(model) == 0


# ------------------------------------------------------------ the loops of scripts

CASES = [  # script, flags, learning rate
    (mlp_width, "--hidden 30-20 --epochs 3", stepwise(STEP3)),
    (mlp_width, "--hidden 30-20 --epochs 3 --sam --rho 0.1", stepwise(STEP3)),
    (
        mlp_width,
        "--hidden 30 --loss mse --lr 0.02 --momentum 0.5 --schedule constant --warmup 4 --sam --rho 0.1",
        lambda step, steps: 0.02 * min(1, (step + 1) / 4),
    ),
    (mlp_width, "--hidden 9 --sam --rho 0.5 --adaptive --weight-decay 0.1", stepwise(STEP3)),
    (
        mlp_width,
        "--dataset curve --hidden 8 --sam --rho 0.2 --batch-size 50 --lr 1e-3 --schedule cosine",
        lambda step, steps: 1e-3 * math.cos(math.pi * step / steps / 2) ** 2,
    ),
    (mlp_width, "--dataset teacher --hidden 8 --sam --rho 0.2 --val-size 90", stepwise(STEP2, 0.01)),
    (resnet_width, "--filters 2 --batch-size 10", stepwise(STEP2)),
    (resnet_width, "--filters 2 --batch-size 10 --sam --rho 0.1", stepwise(STEP2)),
    (resnet_width, "--filters 8 --batch-size 10 --epochs 1 --sam --rho 0.3 --adaptive", stepwise(STEP2)),  # NHWC
    (label_noise, "--hidden 30-20 --noise 0.4 --val-size 100", stepwise(STEP3)),
    (label_noise, "--hidden 30-20 --noise 0.4 --sam --rho 0.1 --adaptive --perturb last", stepwise(STEP3)),
    (label_noise, "--filters 2 --batch-size 10 --noise 0.6 --sam --rho 0.1 --perturb rest", stepwise(STEP2)),
    (sparsity, "--hidden 30-20 --sparsity 0.8 --val-size 100", stepwise(STEP3)),
    (sparsity, "--hidden 30-20 --sparsity 0.8 --pruner magnitude --sam --rho 0.1", stepwise(STEP3)),
    (sparsity, "--filters 2 --batch-size 10 --sparsity 0.5 --pruner snip --sam --rho 0.3 --adaptive", stepwise(STEP2)),
]


def few(data, n):
    """Test images that evaluation does not cut into batches of one size."""
    return data._replace(test=common.Split(data.test.inputs[:n], data.test.targets[:n]))


@pytest.mark.parametrize(("script", "argv", "rate"), CASES, ids=[f"{s.__name__} {argv}" for s, argv, _ in CASES])
def test_the_scripts_equal_a_plain_loop_in_float64(float64, monkeypatch, tmp_path, fake_data, script, argv, rate):
    (config,) = runs(script, tmp_path, *"--train-size 300 --seed 5 --epochs 2".split(), *argv.split())
    data = fake_data(24, test=20) if config.filters else few(common.load_data(config), 1234)
    monkeypatch.setattr(script, "load_data", lambda config: data)
    torch.manual_seed(5)
    channels, inputs = data.shape[0], math.prod(data.shape)
    model = (
        ResNet18(config.filters, channels, data.outputs)
        if config.filters
        else MLP(layers_of(config.hidden), inputs, data.outputs)
    )
    targets, masks = None, ()
    if config.dataset == "curve":
        monkeypatch.setattr(mlp_width, "GRID", mlp_width.GRID.double())
        mlp_width.initialize_for_curve(model, config)
    if script is label_noise:
        targets = label_noise.flip_labels(data.train.targets, config.noise, 10, 5)
    if script is sparsity:
        kernels = [p for p in model.parameters() if p.ndim > 1]
        masks = sparsity.prune(model, kernels, data, config)
        for w, mask in zip(kernels, masks):
            w.data *= mask
    expected = plain_run(model, data, config, rate, targets, masks)
    assert_close(timeless(train(script, config)), expected)


@pytest.mark.parametrize("script", [mlp_width, resnet_width, label_noise, sparsity], ids=lambda s: s.__name__)
def test_batchnorm_counts_every_batch_once_in_every_script(monkeypatch, tmp_path, fake_data, script):
    width = ["--hidden", 9] if script is mlp_width else ["--filters", 1]
    argv = ["--sam", "--epochs", 2, *width, *(["--pruner", "snip"] if script is sparsity else [])]
    (config,) = runs(script, tmp_path, *argv, "--batch-size", 8)
    data, models = fake_data(20), []
    monkeypatch.setattr(script, "load_data", lambda config: data)
    recorder = script.Recorder

    def record(config, data, model, optimizer):
        models.append(model)
        return recorder(config, data, model, optimizer)

    monkeypatch.setattr(script, "Recorder", record)
    monkeypatch.setattr(common, "MLP", lambda *a: MLP(*a).insert(2, nn.BatchNorm1d(9)))  # as a user may
    train(script, config)
    counters = [b.item() for key, b in models[0].named_buffers() if key.endswith("num_batches_tracked")]
    assert counters and set(counters) == {2 * math.ceil(20 / 8)}


# ------------------------------------------------------------ runs and names


def test_no_two_runs_share_a_name(tmp_path):
    sweep = ["--hidden", "75-25", "300-100", "--seed", 0, 1, "--noise", 0, 0.5]
    names = [c.name for c in runs(label_noise, tmp_path, *sweep)]
    more = "--sam --rho 0.1 0.2|--sam --adaptive|--lr 0.2|--amp|--epochs 7|--warmup 9|--loss mse|--schedule cosine|"
    more += "--sharpness 10|--sam --perturb last|--sam --perturb rest|--sam --perturb random|--train-size 50|"
    more += "--val-size 50|--batch-size 7|"
    more += f"--data-dir {'x' * 300}|--data-dir {'x' * 301}|--momentum 0.5|--weight-decay 0.3|--dataset kmnist|--fp32"
    for flags in more.split("|"):
        names += [c.name for c in runs(label_noise, tmp_path, *sweep, *flags.split())]
    assert len(set(names)) == len(names) == 8 * 23 and max(map(len, names)) < 200


def test_where_a_run_happens_is_not_in_its_name(tmp_path):
    plain, elsewhere = (runs(mlp_width, tmp_path, *more)[0] for more in ([], ["--device", "cpu:0", "--force"]))
    assert plain.name == elsewhere.name
    train(mlp_width, runs(mlp_width, tmp_path, *"--hidden 9 --epochs 1 --device cpu:0 --force".split())[0])
    (config,) = runs(mlp_width, tmp_path, *"--hidden 9 --epochs 1".split())
    assert common.read_own(common.result_path(config), config) == result_of(tmp_path)


def test_values_given_twice_train_once(tmp_path):
    assert len(runs(mlp_width, tmp_path, "--seed", 0, 0)) == 1
    sweep = runs(mlp_width, tmp_path, *"--seed 0 1 0 --hidden 9 9 8-7 --sam --rho 0.1 0.10 0.2".split())
    assert [(c.hidden, c.rho, c.seed) for c in sweep] == [
        (hidden, rho, seed) for hidden in ("9", "8-7") for rho in (0.1, 0.2) for seed in (0, 1)
    ]


def test_the_copies_of_the_papers_settings_agree():
    assert mlp_width.MNIST == label_noise.MNIST == sparsity.MNIST
    assert resnet_width.CIFAR10 == label_noise.CIFAR10 == sparsity.CIFAR10

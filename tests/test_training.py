"""Models, data, schedule, noise and masks against paper and arithmetic; the scripts' loops against a plain one."""

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import MLP, Data, ResNet18, Split, batches, crop_and_flip, normalize

PARAMETERS = {
    "75-25": 61_035,
    "150-50": 125_810,
    "300-100": 266_610,
    "1200-400": 1_426_410,
    "3000-1000": 5_366_010,
    4: 44_622,
    8: 176_402,
    16: 701_466,
    32: 2_797_610,
    64: 11_173_962,
    128: 44_662_922,
    256: 178_585_866,
}


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def runs(monkeypatch, tmp_path, script, *argv):
    """The runs of a script's command line, on the first 300 training and all test images of data/mini."""
    place = ["--data-dir", "data/mini", "--dataset", "mnist", "--device", "cpu", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", "--train-size", "300", *place, *map(str, argv)])
    parsers = {mlp_width: {"hidden": ["300-100"]}, resnet_width: {"filters": [64]}}
    parser = common.flags("", **parsers.get(script, {}))
    if script is label_noise:
        parser.add_argument("--noise", type=float, nargs="+", default=[0.5])
    if script is sparsity:
        parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
        parser.add_argument("--pruner", default="random")
    return common.parse(parser)


def history(script, config):
    script.train(config)
    rows = json.loads(common.Run.path_of(config).read_text())["history"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("width", PARAMETERS)
def test_parameter_counts_are_the_papers(width):
    with torch.device("meta"):
        model = ResNet18(width) if isinstance(width, int) else MLP(tuple(map(int, width.split("-"))))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[width]


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


@pytest.mark.parametrize(
    ("model", "epochs", "updates", "drops"),
    [("hidden", 20, 469, (2345, 4690, 7035)), ("filters", 20, 391, (3910, 5865)), ("hidden", 3, 7, (5, 10, 15))],
)
def test_the_learning_rate_drops_at_the_papers_updates(model, epochs, updates, drops):
    config = common.argparse.Namespace(lr=0.1, hidden=None, filters=None)
    setattr(config, model, 1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for step in range(epochs * updates):
        common.set_learning_rate(config, optimizer, step, epochs * updates)
        assert math.isclose(optimizer.param_groups[0]["lr"], 0.1 / 10 ** sum(step >= drop for drop in drops))


def test_crops_and_flips_equal_pixel_by_pixel_copies():
    images = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moves = torch.from_numpy(np.random.default_rng(0).integers(0, (9, 9, 2), (40, 3)))
    out = crop_and_flip(images, moves)
    assert out.is_contiguous() and out.dtype == torch.uint8
    for image, (top, left, flip), result in zip(images.numpy(), moves.tolist(), out.numpy()):
        padded = np.zeros((3, 40, 40), dtype=np.uint8)
        padded[:, 4:36, 4:36] = image
        crop = padded[:, top : top + 32, left : left + 32]
        assert np.array_equal(result, crop[:, :, ::-1] if flip else crop)


def test_normalization_is_the_papers():
    images = torch.full((1, 3, 2, 2), 128, dtype=torch.uint8)
    expected = (128 / 255 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor([0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(normalize(images)[0, :, 0, 0], expected)
    assert torch.equal(normalize(images[:, :1]), images[:, :1].float() / 255)


def fake_data(n=50, channels=3, augment=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n, channels, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(n) % 10)
    return Data(split, Split(images[:0], split.labels[:0]), split, 10, augment)


def epoch_of(seed, epoch, size=16, data=None):
    config = common.argparse.Namespace(seed=seed, batch_size=size, device="cpu")
    data = data or fake_data()
    return list(batches(data, config, epoch, data.train.labels, torch.arange(len(data.train.labels))))


def test_an_epoch_has_every_image_once_and_its_last_small_batch():
    assert [len(index) for *_, index in epoch_of(0, 1)] == [16, 16, 16, 2]
    index = torch.cat([index for *_, index in epoch_of(0, 1)])
    assert sorted(index.tolist()) == list(range(50))
    assert torch.equal(torch.cat([y for _, y, _ in epoch_of(0, 1)]), index % 10)


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    def same(a, b):
        return all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))

    assert same(epoch_of(3, 2), epoch_of(3, 2))
    for other in (epoch_of(3, 3), epoch_of(4, 2), epoch_of(2, 3)):
        assert not same(epoch_of(3, 2), other)


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


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.937])
@pytest.mark.parametrize("pruner", ["random", "snip", "magnitude"])
def test_masks_remove_exactly_what_was_asked(monkeypatch, tmp_path, pruner, rate):
    (config,) = runs(monkeypatch, tmp_path, sparsity, "--filters", 2, "--pruner", pruner, "--sparsity", rate)
    data = common.load_data(config)
    model = common.build_model(config, data)
    kernels = [p for p in model.parameters() if p.ndim > 1]
    statistics = [b.clone() for b in model.buffers()]
    weights = [w.clone() for w in kernels]
    masks = sparsity.prune(model, kernels, config, data)
    assert all(map(torch.equal, statistics, model.buffers())) and all(map(torch.equal, weights, kernels))
    removed = [int((~mask).sum()) for mask in masks]
    if pruner == "random":
        assert removed == [round(rate * w.numel()) for w in kernels]
        return
    assert sum(removed) == round(rate * sum(w.numel() for w in kernels))
    scores = [w.abs() for w in kernels]
    if pruner == "snip":
        images, y = next(batches(data, config, 1, data.train.labels))
        model.zero_grad()
        F.cross_entropy(model.double()(images.double()), y).backward()
        scores = [(w * w.grad).abs() for w in kernels]
    if sum(removed):
        gone = max(s[~mask].max() for s, mask in zip(scores, masks) if not mask.all())
        assert gone <= min(s[mask].min() for s, mask in zip(scores, masks) if mask.any())


def test_snip_prunes_alike_whatever_kernels_compute_the_gradient(monkeypatch, tmp_path):
    (config,) = runs(monkeypatch, tmp_path, sparsity, "--filters", 8, "--pruner", "snip")
    data, found = common.load_data(config), []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = common.build_model(config, data).to(memory_format=memory_format)
        found.append(sparsity.prune(model, [p for p in model.parameters() if p.ndim > 1], config, data))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("optimizer", [[], ["--sam", "--rho", 0.3], ["--sam", "--rho", 0.3, "--adaptive"]])
def test_pruned_weights_are_zero_at_every_step(monkeypatch, tmp_path, optimizer):
    argv = ["--hidden", "20-10", "--epochs", 2, "--weight-decay", 0.1, *optimizer]
    (config,) = runs(monkeypatch, tmp_path, sparsity, *argv)
    seen = []

    def watch(model, inputs):  # called at w and, under SAM, at w + e
        seen.append(sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Linear)))

    build = common.build_model
    monkeypatch.setattr(sparsity, "build_model", lambda *a: (m := build(*a)).register_forward_pre_hook(watch) and m)
    history(sparsity, config)
    result = json.loads(common.Run.path_of(config).read_text())
    removed = sum(round(0.9 * n) for n in (784 * 20, 20 * 10, 10 * 10))
    assert result["num_params"] - result["num_nonzero"] == removed
    assert len(seen) >= 10 and set(seen) == {removed}


def plain_run(model, images, labels, test, seed, epochs, milestones, rho, lr=0.1, size=128, augment=None):
    """The training loop as a textbook has it: no shared code, per-parameter SAM, `.item()` at every step."""
    params, buffers, rows = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()], []
    weight_decay = 5e-4 if any(p.ndim == 4 for p in params) else 1e-4
    updates = math.ceil(len(labels) / size)
    for epoch in range(1, epochs + 1):
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(labels))
        moves = rng.integers(0, (9, 9, 2), (len(labels), 3)) if augment else None
        model.train()
        losses, correct = 0.0, 0
        for i in range(updates):
            rows_of_batch = slice(i * size, (i + 1) * size)
            index = order[rows_of_batch]
            x, y = images[index], labels[index]
            if augment:
                x = torch.stack([augment(image, *move) for image, move in zip(x, moves[rows_of_batch].tolist())])
            x = x / 255
            if x.shape[1] == 3:
                x = (x - torch.tensor(common.MEAN).view(3, 1, 1)) / torch.tensor(common.STD).view(3, 1, 1)
            loss = F.cross_entropy(logits := model(x), y)
            grads = torch.autograd.grad(loss, params)
            losses += loss.item() * len(y)
            correct += (logits.argmax(1) == y).sum().item()
            if rho:
                state = [b.clone() for b in model.buffers()]
                norm = sum((g**2).sum() for g in grads).sqrt()
                moved = [rho * g / norm for g in grads]
                with torch.no_grad():
                    for p, e in zip(params, moved):
                        p.add_(e)
                grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
                with torch.no_grad():
                    for p, e in zip(params, moved):
                        p.sub_(e)
                    for b, old in zip(model.buffers(), state):
                        b.copy_(old)
            step = (epoch - 1) * updates + i
            rate = lr / 10 ** sum(step >= int(m * epochs * updates) for m in milestones)
            with torch.no_grad():
                for p, g, b in zip(params, grads, buffers):
                    b.mul_(0.9).add_(g + weight_decay * p)
                    p.sub_(rate * b)
        model.eval()
        with torch.no_grad():
            logits = model(normalize(test.images))
        score = F.cross_entropy(logits, test.labels).item(), (logits.argmax(1) == test.labels).double().mean().item()
        rows.append((losses / len(labels), correct / len(labels), *score))
    return rows


def shift(image, top, left, flip):
    crop = F.pad(image, [4] * 4)[:, top : top + 32, left : left + 32]
    return crop.flip(2) if flip else crop


@pytest.mark.parametrize("rho", [0, 0.1])
@pytest.mark.parametrize("script", [mlp_width, resnet_width])
def test_the_scripts_equal_a_plain_loop_in_float64(float64, monkeypatch, tmp_path, script, rho):
    argv = ["--hidden", "30-20", "--epochs", 3] if script is mlp_width else ["--filters", 2, "--epochs", 2]
    (config,) = runs(monkeypatch, tmp_path, script, *argv, *(["--sam", "--rho", rho] if rho else []), "--seed", 5)
    data = fake_data(200, augment=True) if script is resnet_width else common.load_data(config)
    monkeypatch.setattr(script, "load_data", lambda config: data)
    torch.manual_seed(5)
    milestones = (0.25, 0.5, 0.75) if script is mlp_width else (0.5, 0.75)
    model = MLP((30, 20)) if script is mlp_width else ResNet18(2)
    augment = shift if data.augment else None
    expected = plain_run(model, *data.train, data.test, 5, config.epochs, milestones, rho, augment=augment)
    rows = history(script, config)
    names = ("train_loss", "train_acc", "test_loss", "test_acc")
    assert len(rows) == config.epochs
    for row, values in zip(rows, expected):
        for name, value in zip(names, values):
            assert math.isclose(row[name], value, rel_tol=1e-10, abs_tol=1e-10), (name, row[name], value)


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (mlp_width, ["--hidden", "30-20"]),
        (resnet_width, ["--filters", 2]),
        (label_noise, ["--hidden", "30-20"]),
        (sparsity, ["--hidden", "30-20", "--pruner", "snip"]),
    ],
)
def test_sam_with_a_vanishing_rho_reproduces_sgd(float64, monkeypatch, tmp_path, script, argv):
    (sgd,) = runs(monkeypatch, tmp_path, script, *argv, "--epochs", 2)
    (sam,) = runs(monkeypatch, tmp_path, script, *argv, "--epochs", 2, "--sam", "--rho", 1e-12)
    if script is resnet_width:
        monkeypatch.setattr(script, "load_data", lambda config: fake_data(200))
    for ours, base in zip(history(script, sam), history(script, sgd)):
        assert ours.keys() == base.keys()
        for key in base:
            assert math.isclose(ours[key], base[key], rel_tol=1e-6), key


def test_held_out_images_are_the_last_and_never_trained_on(monkeypatch, tmp_path):
    (config,) = runs(monkeypatch, tmp_path, mlp_width, "--val-size", 100)
    data, whole = common.load_data(config), common.read_dataset("mnist", "data/mini")[0]
    assert torch.equal(data.val.images, whole[0][-100:]) and torch.equal(data.val.labels, whole[1][-100:])
    assert torch.equal(data.train.images, whole[0][:300])


def test_small_images_are_centred_in_zeros_for_a_resnet(monkeypatch, tmp_path):
    (config,) = runs(monkeypatch, tmp_path, resnet_width, "--filters", 2)
    images = common.load_data(config).train.images
    assert images.shape == (300, 1, 32, 32)
    assert torch.equal(images[:, :, 2:30, 2:30], common.read_dataset("mnist", "data/mini")[0][0][:300])
    assert images.sum() == images[:, :, 2:30, 2:30].sum()


def test_no_two_runs_share_a_name(monkeypatch, tmp_path):
    sweep = ["--hidden", "75-25", "300-100", "--seed", 0, 1, "--noise", 0, 0.5]
    names = [c.name for c in runs(monkeypatch, tmp_path, label_noise, *sweep)]
    for more in (["--sam", "--rho", 0.1, 0.2], ["--sam", "--adaptive"], ["--lr", 0.2], ["--amp"], ["--epochs", 7]):
        names += [c.name for c in runs(monkeypatch, tmp_path, label_noise, *sweep, *more)]
    names += [c.name for c in runs(monkeypatch, tmp_path, label_noise, *sweep, "--data-dir", "x" * 300)]
    names += [c.name for c in runs(monkeypatch, tmp_path, label_noise, *sweep, "--data-dir", "x" * 301)]
    assert len(set(names)) == len(names) == 8 * 9 and max(map(len, names)) < 200

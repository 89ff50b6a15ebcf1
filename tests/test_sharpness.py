"""common.sharpness beside explicit Hessians in float64 and closed forms; what it leaves alone; what scripts measure."""

import copy
import math

import pytest
import torch
import torch.nn as nn
from helpers import call_main, runs, strict, timeless, train

import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import LOSSES, MLP, BasicBlock, sharpness

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, in torch.func.hessian


def explicit(model, loss, x, y, masks=None):
    """lambda_max, trace and s2 from the images' whole Hessians, rows and columns of pruned weights taken out."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in params.values()])
    kept = torch.cat([m.flatten() for m in masks or map(torch.ones_like, params.values())]) > 0

    def loss_at(flat, x, y):
        parts = flat.split([p.numel() for p in params.values()])
        weights = {name: part.view_as(p) for (name, p), part in zip(params.items(), parts)}
        return loss(torch.func.functional_call(model, weights, (x,)), y)

    model.eval()
    hessian = torch.func.hessian(loss_at)
    hessians = [hessian(flat, x[i : i + 1], y[i : i + 1])[kept][:, kept] for i in range(len(x))]
    mean = sum(hessians) / len(x)
    spread = sum(h @ h for h in hessians) / len(x) - mean @ mean
    values = torch.linalg.eigvalsh(mean)
    return {
        "lambda_max": values[-1].item(),
        "lambda_min": values[0].item(),
        "trace": mean.trace().item(),
        "s2": torch.linalg.eigvalsh(spread)[-1].sqrt().item(),
    }


def tiny_resnet():
    """A ResNet's parts, a projection shortcut among them, with running statistics that are not those of a batch."""
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2), nn.ReLU()
    model = nn.Sequential(*stem, BasicBlock(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    for _ in range(3):
        model(2 * torch.randn(8, 1, 6, 6) + 1)
    return model, torch.randn(5, 1, 6, 6)


def tiny_mlp():
    torch.manual_seed(0)
    return MLP((6, 5), 8, 3), torch.randn(7, 8)


def some_masks(model):
    rng = torch.Generator().manual_seed(1)
    return [(torch.rand(p.shape, generator=rng) < (0.4 if p.ndim > 1 else 1)).to(p) for p in model.parameters()]


def negative(outputs, y):
    return -LOSSES["mse"](outputs, y)


@pytest.mark.parametrize(
    ("make", "loss", "masked"),
    [
        (tiny_mlp, LOSSES["ce"], True),
        (tiny_mlp, LOSSES["mse"], False),
        (tiny_mlp, negative, False),
        (tiny_resnet, LOSSES["ce"], False),
        (tiny_resnet, LOSSES["mse"], True),
    ],
)
def test_it_equals_the_explicit_hessians(float64, make, loss, masked):
    model, x = make()
    y = torch.arange(len(x)) % 3
    masks = some_masks(model) if masked else None
    expected, found = explicit(model, loss, x, y, masks), sharpness(model, loss, x, y, masks)
    for key in ("lambda_max", "trace", "s2"):
        assert math.isclose(found[key], expected[key], rel_tol=1e-3), key
    assert found["images"] == len(x) and found["trace_se"] == 0
    assert 0 <= found["lambda_max_residual"] < 1e-3 and 0 <= found["s2_residual"] < 1e-3
    if loss is negative and not masked:  # the largest in magnitude is another one, which a power iteration would find
        assert expected["lambda_min"] < -1.2 * expected["lambda_max"]
    single = sharpness(model.float(), loss, x.float(), y, masks and [mask.float() for mask in masks])
    for key in ("lambda_max", "trace", "s2"):  # as the scripts measure them
        assert math.isclose(single[key], expected[key], rel_tol=1e-3), key


def test_the_residual_has_its_closed_form(float64):
    """After one Lanczos step more than the start, (1, 1, 1), which spans (-1, 0, 1) with it."""
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    value, residual = common.largest_eigenpair(lambda v: A @ v, torch.ones(3), basis=2, restarts=1)
    assert math.isclose(value, 2 + math.sqrt(2 / 3)) and math.isclose(residual, math.sqrt(1 / 6) / value)


@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_a_wide_layers_closed_forms(float64, kept):
    """A linear layer under the squared error: for each output H_i = 2 x x', x without what is pruned for this output;
    the trace is estimated by random probes, whose variance is twice the sum of the squares off the diagonal."""
    torch.manual_seed(0)
    model, x, y = MLP((), 600, 10), torch.randn(30, 600) * torch.linspace(0.1, 2, 600), torch.arange(30) % 10
    masks = [(torch.rand(10, 600) < kept).double(), torch.ones(10)]
    found = sharpness(model, LOSSES["mse"], x, y, masks)
    values, spreads, trace, variance = [], [], 0, 0
    for row in masks[0]:
        z = torch.cat([x * row, torch.ones(30, 1)], 1)  # the bias
        squares = (z**2).sum(1)
        mean = 2 * z.T @ z / 30
        values.append(torch.linalg.eigvalsh(mean)[-1])
        spreads.append(torch.linalg.eigvalsh(4 * (z.T * squares) @ z / 30 - mean @ mean)[-1])
        trace += mean.trace().item()
        variance += 2 * ((mean**2).sum() - (mean.diagonal() ** 2).sum()).item()
    assert math.isclose(found["lambda_max"], max(values), rel_tol=1e-3)
    assert math.isclose(found["s2"], max(spreads).sqrt(), rel_tol=1e-3)
    assert abs(found["trace"] - trace) < 4 * found["trace_se"] < 0.1 * trace
    assert 0.7 < found["trace_se"] / math.sqrt(variance / 100) < 1.3  # of 100 probes


def test_images_in_several_chunks_count_as_one_mean(float64):
    torch.manual_seed(0)
    model, x, y = MLP((4,), 3, 2), torch.randn(260, 3), torch.arange(260) % 2
    expected, found = explicit(model, LOSSES["ce"], x, y), sharpness(model, LOSSES["ce"], x, y)
    for key in ("lambda_max", "trace", "s2"):
        assert math.isclose(found[key], expected[key], rel_tol=1e-3), key


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_moves(mode):
    model, x = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 8)
    model.train(mode)[1].train(not mode)
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    sharpness(model, LOSSES["ce"], x, torch.arange(5) % 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_is_measured_without_amp_and_compile(tmp_path):
    def compiled(*args):
        raise AssertionError("compiled, second derivatives are wrong")

    found = []
    for flag in ([], ["--amp"], ["--compile"], ["--amp", "--compile"]):
        (config,) = runs(mlp_width, tmp_path, *"--hidden 6 --train-size 40 --sharpness 6".split(), *flag)
        data = common.load_data(config)
        model = common.build_model(config, data)
        if "--compile" in flag:
            assert model._compiled_call_impl is not None
            model._compiled_call_impl = compiled
        recorder = common.Recorder(config, data, model, torch.optim.SGD(model.parameters()))
        recorder.finish()
        found.append(strict(common.result_path(config))["sharpness"])
    assert found == [found[0]] * 4


ARGV = "--train-size 60 --epochs 2 --batch-size 32"


@pytest.mark.parametrize(
    ("script", "argv"),
    [(mlp_width, "--hidden 9 --loss mse"), (resnet_width, "--filters 1"), (label_noise, "--hidden 9 --noise 0.7")]
    + [(sparsity, "--hidden 9 --sparsity 0.6"), (mlp_width, "--dataset teacher --hidden 3")],
)
def test_a_script_measures_its_own_loss_on_the_first_images_it_trains_on(monkeypatch, tmp_path, script, argv):
    (config,) = runs(script, tmp_path, *ARGV.split(), "--sharpness", 17, "--seed", 3, *argv.split())
    calls = []

    def spy(model, loss, images, targets, masks=None):
        calls.append((model, loss, images, targets, masks))
        return {"lambda_max": 1.5}

    monkeypatch.setattr(common, "sharpness", spy)
    assert train(script, config)["sharpness"] == {"lambda_max": 1.5}
    ((model, loss, images, targets, masks),) = calls
    data = common.load_data(config)
    labels = label_noise.flip_labels(data.train.targets, 0.7, 10, 3) if script is label_noise else data.train.targets
    assert loss is LOSSES[config.loss] and torch.equal(targets, labels[:17])
    assert torch.equal(images, common.normalize(data.train.inputs[:17]))
    if script is sparsity:
        for p, mask in zip(model.parameters(), masks, strict=True):
            assert torch.equal(mask, torch.ones_like(p) if p.ndim == 1 else p != 0)
    else:
        assert masks is None


def test_without_the_flag_nothing_is_measured(tmp_path):
    (config,) = runs(mlp_width, tmp_path, "--hidden", 6, *ARGV.split())
    assert "sharpness" not in train(mlp_width, config)


def test_a_result_has_all_numbers_and_a_name_of_its_own_and_training_is_the_same(tmp_path):
    for more in ([], ["--sharpness", 10]):
        call_main(mlp_width, tmp_path, "--hidden", 6, *ARGV.split(), *more)
    plain, measured = (strict(path) for path in sorted(tmp_path.rglob("*.json"), key=lambda p: "sharpness" in p.name))
    keys = {"images", "lambda_max", "lambda_max_residual", "trace", "trace_se", "s2", "s2_residual"}
    assert measured["sharpness"].keys() == keys and measured["sharpness"]["images"] == 10
    assert all(isinstance(value, (int, float)) for value in measured["sharpness"].values())
    assert timeless(measured) == timeless(plain)


def test_a_curvature_beyond_float32_is_null_and_the_run_is_kept(tmp_path):
    more = "--loss mse --schedule constant --lr 1e8 --momentum 0 --weight-decay 0 --train-size 128 --sharpness 20"
    call_main(mlp_width, tmp_path, "--hidden", 8, "--epochs", 1, *more.split())
    (path,) = tmp_path.rglob("*.json")
    result = strict(path)
    assert result["status"] == "done" and result["sharpness"]["images"] == 20
    assert None in result["sharpness"].values()


def test_a_run_that_ends_while_it_is_measured_keeps_its_training(monkeypatch, tmp_path):
    (config,) = runs(mlp_width, tmp_path, "--hidden", 6, *ARGV.split(), "--sharpness", 10)

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "sharpness", fail)
        mlp_width.train(config)
    kept = torch.load(common.result_path(config).with_suffix(".ckpt"), weights_only=True)["history"]
    assert len(kept) == 2
    result = train(mlp_width, config)
    assert result["history"] == kept and result["sharpness"]["images"] == 10

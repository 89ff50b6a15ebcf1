"""SAM against closed forms and independent float64 arithmetic, and its promises: storage, gradients, optimizers."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.ao.quantization import FakeQuantize, FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from common import SAM, frozen_bn_stats

pytestmark = pytest.mark.usefixtures("float64")


def sgd(params, lr=0.1, **more):
    return torch.optim.SGD(params, lr=lr, **more)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(seed=0, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def backward(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_quadratic_has_its_closed_form():
    # f(w) = w'Aw / 2 has gradient Aw: w - lr A (w + rho Aw / |Aw|)
    A = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    start = torch.tensor([1.0, -2.0, 0.5])
    w = start.clone().requires_grad_()
    sam = SAM(sgd([w], lr=0.03), rho=0.2)
    (w @ A @ w / 2).backward()
    sam.perturb()
    g = A @ start
    torch.testing.assert_close(w.detach(), start + 0.2 * g / g.norm(), rtol=0, atol=1e-12)
    (w @ A @ w / 2).backward()
    sam.step()
    torch.testing.assert_close(w.detach(), start - 0.03 * A @ (start + 0.2 * g / g.norm()), rtol=0, atol=1e-12)


def test_adaptive_has_its_closed_form():
    start = torch.tensor([2.0, -1.0, 0.0, 3.0])
    g = torch.tensor([0.5, 1.0, 7.0, -2.0])
    w = start.clone().requires_grad_()
    sam = SAM(sgd([w]), rho=0.3, adaptive=True)
    (w @ g).backward()
    sam.perturb()
    torch.testing.assert_close(w.detach(), start + 0.3 * start**2 * g / (start * g).norm(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_complex_weights_have_their_closed_form(adaptive):
    start = torch.tensor([2 + 1j, -1j, 3 - 2j])
    g = torch.tensor([0.5 - 1j, 1 + 2j, -2 + 0j])
    w = start.clone().requires_grad_()
    w.grad = g.clone()
    sam = SAM(sgd([w]), rho=0.3, adaptive=adaptive)
    sam.perturb()
    e = start.abs() ** 2 * g / (start.abs() * g.abs()).norm() if adaptive else g / g.abs().norm()
    torch.testing.assert_close(w.detach(), start + 0.3 * e, rtol=0, atol=1e-12)
    sam.restore()
    assert torch.equal(w, start)


def test_weights_of_several_dtypes_share_one_norm():
    dtypes = (torch.float64, torch.float32, torch.complex64)
    weights = [torch.ones(3, dtype=dtype, requires_grad=True) for dtype in dtypes]
    for w in weights:
        w.grad = torch.ones_like(w)
    SAM(sgd([*weights, torch.ones(0, requires_grad=True)]), rho=0.3).perturb()
    for w in weights:
        torch.testing.assert_close(w.detach(), torch.full_like(w, 1.1), rtol=0, atol=1e-6)


def test_parameter_groups_share_one_norm():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    sam = SAM(sgd([{"params": [a], "lr": 0.5}, {"params": [b]}]), rho=1.0)
    (3 * a + 4 * b).sum().backward()
    sam.perturb()
    assert math.isclose(a.item(), 3 + 3 / 5) and math.isclose(b.item(), 1 + 4 / 5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_twenty_steps_equal_an_independent_reference(base, adaptive):
    """The reference takes gradients of a function of one flat vector, and writes the optimizers' rules out."""
    model, rho, lr, wd, beta = network(), 0.3, 0.05, 0.01, 0.9
    kinds = {"sgd": sgd(model.parameters(), lr, momentum=beta, weight_decay=wd, fused=True)}
    kinds["adamw"] = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=wd)
    sam = SAM(kinds[base], rho, adaptive)
    shapes = [p.shape for p in model.parameters()]

    def loss(w, x, y):
        w1, b1, w2, b2 = (part.view(s) for part, s in zip(w.split([s.numel() for s in shapes]), shapes))
        logits = torch.tanh(x @ w1.T + b1) @ w2.T + b2
        return (logits.logsumexp(1) - logits[torch.arange(len(y)), y]).mean()

    w = values(model)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 21):
        x, y = batch(step)
        backward(model, x, y)
        sam.perturb()
        backward(model, x, y)
        sam.step()
        sam.optimizer.zero_grad()
        g = torch.func.grad(loss)(w, x, y)
        e = rho * w * w * g / (w * g).norm() if adaptive else rho * g / g.norm()
        g = torch.func.grad(loss)(w + e, x, y)
        if base == "sgd":
            m = beta * m + g + wd * w
            w = w - lr * m
        else:
            m, v = beta * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w * (1 - lr * wd) - lr * (m / (1 - beta**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(values(model), w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_restore_is_exact_and_in_the_same_storage(dtype):
    model = network().to(dtype)
    x, y = batch()
    before, places = values(model), [p.data_ptr() for p in model.parameters()]
    sam = SAM(sgd(model.parameters()), rho=7.0)
    for _ in range(3):
        backward(model, x.to(dtype), y)
        sam.perturb()
        assert not torch.equal(values(model), before)
        assert all(p.grad is None for p in model.parameters())
        sam.restore()
        assert torch.equal(values(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_gradients_are_read_only():
    model = network()
    backward(model, *batch())
    grads = [p.grad for p in model.parameters()]
    before = [g.clone() for g in grads]
    SAM(sgd(model.parameters())).perturb()
    assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_zero_gradient_moves_nothing(adaptive, dtype):
    model = network().to(dtype)
    before = values(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    sam = SAM(sgd(model.parameters()), adaptive=adaptive)
    sam.perturb()
    assert torch.equal(values(model), before)
    sam.step()
    assert torch.equal(values(model), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "gradient", "rho"), [(4, 6e-8, 0.5), (100_000, 300.0, 100.0), (9, 1.0, 0.3)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_16_bits_neither_lose_nor_overflow_the_norm(dtype, n, gradient, rho, adaptive):
    """n equal gradients move each weight, all of them 2, by rho / sqrt(n), under ASAM by rho 2 / sqrt(n)."""
    w = torch.full((n,), 2.0, dtype=dtype, requires_grad=True)
    w.grad = torch.full((n,), gradient, dtype=dtype)
    SAM(sgd([w]), rho=rho, adaptive=adaptive).perturb()
    expected = 2 + rho * (2 if adaptive else 1) / math.sqrt(n)
    torch.testing.assert_close(w.detach().double(), torch.full((n,), expected), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16, torch.float64])
def test_restore_is_exact_after_the_model_has_changed_its_dtype(first):
    model = network().to(first)
    x, y = batch()
    sam = SAM(sgd(model.parameters()), rho=0.5)
    backward(model, x.to(first), y)
    sam.perturb()
    sam.step()
    model.float()
    for p in model.parameters():
        p.data += 1e-5 * torch.rand_like(p)  # so that fewer bits don't hold it
        p.grad = None
    before = values(model)
    backward(model, x.float(), y)
    sam.perturb()
    assert not torch.equal(values(model), before)
    sam.restore()
    assert torch.equal(values(model), before)


def two_steps(model, sam, x, y):
    for _ in range(2):
        before = values(model)
        backward(model, x, y)
        sam.perturb()
        assert not torch.equal(values(model), before)
        sam.restore()
        assert torch.equal(values(model), before)
        backward(model, x, y)
        sam.optimizer.step()
        sam.optimizer.zero_grad()


def test_parameters_may_change_their_shapes():
    model = network()
    sam = SAM(sgd(model.parameters()), rho=0.5)
    two_steps(model, sam, *batch())
    model[0].weight.data = torch.randn(1, 5)
    model[0].bias.data = torch.randn(1)
    model[2].weight.data = torch.randn(3, 1)
    two_steps(model, sam, *batch())


def test_parameters_may_join_and_leave_the_optimizer():
    model, other = network(), network(seed=1)
    sam = SAM(sgd(model[0].parameters()), rho=0.5)
    two_steps(model, sam, *batch())
    sam.optimizer.add_param_group({"params": list(model[2].parameters())})
    two_steps(model, sam, *batch())
    assert sum(copy.numel() for copy in sam.copies) == values(model).numel()

    left = weakref.ref(model[0].weight)
    sam.optimizer.param_groups.clear()
    sam.optimizer.add_param_group({"params": list(other.parameters())})
    model = other
    two_steps(model, sam, *batch())
    gc.collect()
    assert left() is None  # so its memory is free, and that of its copy


class Count(TorchDispatchMode):
    """The number of operators called, each of which is one kernel or a few on a GPU."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is not torch.ops.aten.promote_types.default  # computes on no tensor
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_operator_serves_all_parameters(adaptive):
    counts = []
    for layers in (1, 20):
        model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))
        sam = SAM(sgd(model.parameters()), adaptive=adaptive)
        for _ in range(2):  # the second time memory has been allocated
            backward(model, *batch())
            with Count() as count:
                sam.perturb()
                sam.restore()
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_without_any_gradient_nothing_happens():
    model = network()
    before = values(model)
    sam = SAM(sgd(model.parameters(), momentum=0.9))
    sam.perturb()
    sam.step()
    assert torch.equal(values(model), before)


def test_frozen_and_unused_parameters_stay():
    model = network()
    model[0].bias.requires_grad_(False)
    unused = torch.ones(3, requires_grad=True)
    bias = model[0].bias.clone()
    sam = SAM(sgd([*model.parameters(), unused]), rho=0.5)
    backward(model, *batch())
    sam.perturb()
    assert torch.equal(model[0].bias, bias) and torch.equal(unused, torch.ones(3))
    backward(model, *batch())
    sam.step()
    assert torch.equal(model[0].bias, bias) and torch.equal(unused, torch.ones(3))


def test_gradients_may_appear_and_vanish_in_the_second_pass():
    a, b = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    sam = SAM(sgd([a, b], lr=0.1), rho=0.5)
    (a * 2).backward()
    sam.perturb()
    assert math.isclose(a.item(), 1.5) and b.item() == 1.0
    (b * 3).backward()
    sam.step()
    assert a.item() == 1.0 and math.isclose(b.item(), 0.7)


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf, -math.inf])
def test_a_senseless_rho_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM(sgd(network().parameters()), rho)


@pytest.mark.parametrize(
    "rho", [torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor([0.1, 0.2]), "a", None, [0.1]]
)
def test_a_rho_that_is_no_number_is_refused(rho):
    with pytest.raises((TypeError, ValueError)):
        SAM(sgd(network().parameters()), rho)


def test_rho_may_be_a_tensor_of_one_value():
    rho = torch.tensor(0.25)
    sam = SAM(sgd(network().parameters()), rho)
    rho += 1
    assert sam.rho == 0.25


@pytest.mark.parametrize("kind", ["generator", "list", "module", "none", "class", "sam", "scheduler"])
def test_what_is_no_optimizer_is_refused(kind):
    model = network()
    optimizer = sgd(model.parameters())
    given = {"generator": model.parameters(), "list": [optimizer], "module": model, "none": None}
    given["class"] = torch.optim.SGD
    given["sam"] = SAM(optimizer)
    given["scheduler"] = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match="SAM wraps an optimizer"):
        SAM(given[kind])


class Wrapper:
    """Of an optimizer, as libraries have them: it shows the optimizer's attributes, but clears no gradients."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def zero_grad(self):
        pass


def test_the_two_gradients_do_not_add_up_where_a_wrapper_does_not_clear_them():
    ours, expected = network(), network()
    for model, wrap in ((ours, Wrapper), (expected, lambda optimizer: optimizer)):
        sam = SAM(wrap(sgd(model.parameters())), rho=0.5)
        backward(model, *batch())
        sam.perturb()
        backward(model, *batch())
        sam.step()
    assert torch.equal(values(ours), values(expected))


def test_gradients_of_other_optimizers_stay():
    model = network()
    sam = SAM(sgd(model[0].parameters()))
    backward(model, *batch())
    before = model[2].weight.grad.clone()
    sam.perturb()
    assert model[0].weight.grad is None and torch.equal(model[2].weight.grad, before)


@pytest.mark.parametrize("by_closure", [False, True])
def test_sparse_gradients_are_refused_and_the_next_call_works(by_closure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    sam = SAM(sgd(model.parameters(), momentum=0.9))
    before = values(model)

    def closure():
        sam.optimizer.zero_grad()
        loss = model(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(TypeError, match="sparse"):
        if by_closure:
            sam.step(closure)
        else:
            closure()
            sam.perturb()
    assert torch.equal(values(model), before)

    model[0].sparse = False
    first = sam.step(closure)
    assert not torch.equal(values(model), before) and closure() < first


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_cannot_step_leaves_w_and_the_next_call_works(kind):
    model = network()
    before = values(model)
    sam = SAM(kind(model.parameters()), rho=0.5)
    for _ in range(2):
        backward(model, *batch())
        sam.perturb()
        assert not torch.equal(values(model), before)
        backward(model, *batch())
        with pytest.raises((TypeError, RuntimeError), match="closure|dense"):
            sam.step()
        assert torch.equal(values(model), before)
        sam.optimizer.zero_grad()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_w_comes_back_from_a_gradient_that_is_not_finite(value, adaptive):
    model = network()
    before = values(model)
    sam = SAM(sgd(model.parameters()), adaptive=adaptive)
    backward(model, *batch())
    model[0].weight.grad[0, 0] = value
    sam.perturb()
    assert not values(model).isfinite().all()
    sam.restore()
    assert torch.equal(values(model), before)


def test_perturbing_twice_is_refused():
    model = network()
    sam = SAM(sgd(model.parameters()))
    backward(model, *batch())
    sam.perturb()
    backward(model, *batch())
    with pytest.raises(RuntimeError, match="perturbed already"):
        sam.perturb()


def test_rho_zero_without_randomness_is_the_base_optimizer():
    ours, plain = network(), network()
    sam, base = SAM(sgd(ours.parameters(), momentum=0.9), rho=0), sgd(plain.parameters(), momentum=0.9)
    for step in range(5):
        backward(ours, *batch(step))
        sam.perturb()
        backward(ours, *batch(step))
        sam.step()
        sam.optimizer.zero_grad()
        backward(plain, *batch(step))
        base.step()
        base.zero_grad()
    assert torch.equal(values(ours), values(plain))


def test_the_closure_does_it_all_and_its_loss_is_the_one_at_w():
    ours, by_hand = network(), network()
    x, y = batch()
    sam, other = SAM(sgd(ours.parameters()), rho=0.5), SAM(sgd(by_hand.parameters()), rho=0.5)

    def closure():
        sam.optimizer.zero_grad()
        return backward(ours, x, y)

    loss = sam.step(closure)
    assert torch.equal(loss, backward(by_hand, x, y))
    other.perturb()
    backward(by_hand, x, y)
    other.step()
    assert torch.equal(values(ours), values(by_hand))


def test_a_closure_that_fails_in_the_second_pass_leaves_w():
    model = network()
    before = values(model)
    sam = SAM(sgd(model.parameters()))

    def closure():
        if sam.perturbed:
            raise KeyError("second pass")
        sam.optimizer.zero_grad()
        return backward(model, *batch())

    with pytest.raises(KeyError):
        sam.step(closure)
    assert torch.equal(values(model), before)


def test_the_perturbation_does_not_depend_on_the_scale_of_the_loss():
    moved = []
    for scale in (1.0, 65536.0):
        model = network()
        (scale * F.cross_entropy(model(batch()[0]), batch()[1])).backward()
        SAM(sgd(model.parameters()), rho=0.5).perturb()
        moved.append(values(model))
    torch.testing.assert_close(*moved, rtol=0, atol=1e-10)


def test_an_overflow_under_gradscaler_leaves_w_and_skips_the_step():
    model = network().float()
    before = values(model)
    optimizer = sgd(model.parameters(), momentum=0.9)
    sam, scaler = SAM(optimizer), torch.amp.GradScaler("cpu", init_scale=1e38)
    x, y = batch()
    for _ in range(2):
        scaler.scale(1000 * F.cross_entropy(model(x.float()), y)).backward()
        sam.perturb() if not sam.perturbed else sam.restore()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(values(model), before) and scaler.get_scale() < 1e38


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    whole, parts = network(), network()
    x, y = batch()
    sams = [SAM(sgd(m.parameters(), momentum=0.9), rho=0.5) for m in (whole, parts)]
    for move in ("perturb", "step"):
        backward(whole, x, y)
        for i in range(0, 16, 4):
            (F.cross_entropy(parts(x[i : i + 4]), y[i : i + 4]) / 4).backward()
        for sam in sams:
            getattr(sam, move)()
    torch.testing.assert_close(values(whole), values(parts), rtol=0, atol=1e-12)


def test_a_resumed_run_goes_on_as_if_never_stopped():
    """All there is to save is the base optimizer's state: momentum and a scheduler's rate included."""

    def start(model):
        optimizer = sgd(model.parameters(), momentum=0.9)
        return SAM(optimizer, rho=0.5), torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def go(model, sam, scheduler, steps):
        for step in steps:
            backward(model, *batch(step))
            sam.perturb()
            backward(model, *batch(step))
            sam.step()
            sam.optimizer.zero_grad()
            scheduler.step()

    model = network()
    sam, scheduler = start(model)
    go(model, sam, scheduler, range(3))
    state = copy.deepcopy([model.state_dict(), sam.optimizer.state_dict(), scheduler.state_dict()])
    go(model, sam, scheduler, range(3, 7))
    again = network(seed=1)
    other, other_scheduler = start(again)
    for target, saved in zip((again, other.optimizer, other_scheduler), state):
        target.load_state_dict(saved)
    go(again, other, other_scheduler, range(3, 7))
    assert torch.equal(values(model), values(again))


def normalized(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def test_two_passes_leave_the_statistics_of_one():
    ours, once = normalized(), normalized()
    x, y = batch()
    sam = SAM(sgd(ours.parameters()), rho=0.5)
    backward(ours, x, y)
    once(x)
    sam.perturb()
    with frozen_bn_stats(ours):
        backward(ours, x, y)
    sam.step()
    for (name, buffer), expected in zip(ours.named_buffers(), once.buffers()):
        assert torch.equal(buffer, expected), name
    assert ours[1].track_running_stats


LAYERS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "batch, cumulative average": lambda: nn.BatchNorm1d(4, momentum=None),
    "batch, lazy": lambda: nn.LazyBatchNorm1d(),
    "batch, synchronized": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "instance, lazy": lambda: nn.LazyInstanceNorm1d(track_running_stats=True),
    "spectral": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 3, 3)),
    "spectral, recurrent": lambda: parametrizations.spectral_norm(nn.LSTM(5, 3), "weight_hh_l0"),
    "spectral, by hook": lambda: spectral_norm(nn.Linear(5, 3)),
    "fake quantization": lambda: FakeQuantize(MovingAverageMinMaxObserver),
    "fake quantization, fused": lambda: FusedMovingAvgObsFakeQuantize(),
}


@pytest.fixture
def float32(float64):
    torch.set_default_dtype(torch.float32)  # the module's float64 is put back after it


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_that_keeps_running_statistics_is_held(name, float32):
    torch.manual_seed(0)
    model, x = nn.Sequential(LAYERS[name]()), torch.randn(6, 4, 5)
    model(x)
    before = state(model)
    with frozen_bn_stats(model):
        with frozen_bn_stats(model):
            model(10 * x)
        model(math.nan * x)  # as where w + e is not finite
    assert same(state(model), before)
    model(10 * x)
    assert not same(state(model), before)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("training", [True, False])
def test_held_layers_give_what_they_give_otherwise(kind, training):
    model = kind(4, affine=True, track_running_stats=True)
    x = torch.randn(6, 4, 5)
    model(3 * x + 1)
    model.train(training)
    with frozen_bn_stats(model):
        held = model(x)
    torch.testing.assert_close(held, model(x), rtol=0, atol=1e-12)


def test_each_layer_gets_its_own_state_back():
    layers = [kind(4, track_running_stats=on) for kind in (nn.BatchNorm1d, nn.InstanceNorm1d) for on in (True, False)]
    model, x = nn.Sequential(*layers), torch.randn(6, 4, 5)
    model[0].eval()
    with pytest.raises(KeyError), frozen_bn_stats(model):
        model(x)
        raise KeyError
    assert [layer.track_running_stats for layer in model] == [True, False, True, False]
    assert [layer.training for layer in model] == [False, True, True, True]
    assert [layer.running_mean is None for layer in model] == [False, True, False, True]


def test_frozen_statistics_normalize_with_the_batch_and_come_back_after_an_error():
    model, (x, _) = normalized(), batch()
    expected = (lambda z: (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt())(model[0](x))
    with pytest.raises(KeyError), frozen_bn_stats(model):
        with frozen_bn_stats(model):
            torch.testing.assert_close(model[:2](x), expected)
        torch.testing.assert_close(model[:2](x), expected)
        raise KeyError
    assert model[1].num_batches_tracked == 0 and model[1].track_running_stats
    with frozen_bn_stats(model.eval()):  # eval mode still normalizes with the running statistics: 0 and 1
        torch.testing.assert_close(model[:2](x), model[0](x) / math.sqrt(1 + 1e-5))

"""README.md's Python blocks run as they stand, a copied SAM class runs alone, and what the README says of it holds."""

import ast
import copy
import re
import socket
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import SAM, frozen_bn_stats

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LOOP = "loss_fn(model(x), y).backward()\n    sam.perturb()"


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """The namespace after all blocks, run in order as torchrun would start them, and what stood before each."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), socket.socket() as port:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        warnings.simplefilter("error")  # a scheduler that complains of its place, say
        warnings.filterwarnings("ignore", message=".*barrier.*|.*device_id.*")
        port.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
        for key, value in address.items():
            patch.setenv(key, str(value))
        port.close()
        torch.manual_seed(0)
        names = {"__name__": "readme"}
        try:
            for block in BLOCKS:
                start = README[: README.index(block)].count("\n")
                exec(compile("\n" * start + block, ROOT / "README.md", "exec"), names)
                assert all(p.isfinite().all() for p in names["model"].parameters()), block
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        yield names


def test_every_block_runs(blocks):
    assert len(BLOCKS) > 15 and LOOP in BLOCKS[0]


def source_of(name):
    text = (ROOT / "common.py").read_text(encoding="utf-8")
    (node,) = (n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    return ast.get_source_segment(text, node)


def test_the_class_needs_nothing_but_torch():
    names = {"torch": torch}
    exec(source_of("SAM"), names)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    sam = names["SAM"](torch.optim.SGD([w], lr=0.1), rho=1.0, adaptive=False)
    (w @ w / 2).backward()
    sam.perturb()
    torch.testing.assert_close(w.detach(), torch.tensor([3.6, 4.8]))
    (w @ w / 2).backward()
    sam.step()
    torch.testing.assert_close(w.detach(), torch.tensor([2.64, 3.52]))


def test_the_readme_states_the_length_of_the_class():
    lines = len(source_of("SAM").splitlines())
    assert re.search(rf"^\| lines of the class \| {lines} \|", README, re.MULTILINE)
    assert {int(n) for n in re.findall(r"(\d+)-line SAM class", README)} <= {lines}


def rebuilt():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def two_passes(model, sam, x, y):
    sam.optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    sam.perturb()
    with frozen_bn_stats(model):
        F.cross_entropy(model(x), y).backward()
    sam.step()


def test_lightning_step_and_trainer_step_equal_the_plain_loop(blocks):
    """With stand-ins for the two frameworks, which call these methods as the real ones do."""
    x, y = torch.randn(32, 20), torch.randint(3, (32,))
    plain, lit, hugging = rebuilt(), rebuilt(), rebuilt()
    two_passes(plain, SAM(torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)), x, y)

    module = blocks["Classifier"](lit)
    assert module.automatic_optimization is False
    optimizer = module.configure_optimizers()
    module.optimizers, module.manual_backward = lambda: optimizer, lambda loss: loss.backward()
    module.training_step((x, y), 0)

    class Trainer:
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = F.cross_entropy(model(inputs["x"]), inputs["labels"])
            loss.backward()
            return loss.detach()

    trainer = type("SAMTrainer", (blocks["TwoPasses"], Trainer), {})()
    trainer.optimizer = torch.optim.SGD(hugging.parameters(), lr=0.1, momentum=0.9)
    trainer.training_step(hugging, {"x": x, "labels": y}, None)
    trainer.optimizer.step()

    for model in (lit, hugging):
        for (name, ours), theirs in zip(plain.state_dict().items(), model.state_dict().values()):
            assert torch.equal(ours, theirs), name


# What the table "Beside other SAM classes" says of this class


def scalars():
    return [torch.ones(1, requires_grad=True) for _ in range(2)]


def test_table_restored_bit_for_bit_in_the_same_storage():
    for dtype, steps in ((torch.float32, 200), (torch.bfloat16, 50)):
        model = rebuilt().to(dtype)
        before, places = [p.detach().clone() for p in model.parameters()], [p.data_ptr() for p in model.parameters()]
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0))
        for _ in range(steps):
            two_passes(model, sam, torch.randn(16, 20, dtype=dtype), torch.randint(3, (16,)))
        assert all(map(torch.equal, before, model.parameters()))
        assert [p.data_ptr() for p in model.parameters()] == places


def test_table_the_base_optimizers_state_keeps_momentum():
    x, y = torch.randn(32, 20), torch.randint(3, (32,))
    models, sams = [rebuilt(), rebuilt()], []
    for model in models:
        sams.append(SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)))
    for _ in range(3):
        two_passes(models[0], sams[0], x, y)
    models[1].load_state_dict(models[0].state_dict())
    sams[1].optimizer.load_state_dict(copy.deepcopy(sams[0].optimizer.state_dict()))
    for model, sam in zip(models, sams):
        two_passes(model, sam, x, y)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize(
    "first, second, expected", [("a", "ab", (0.8, 0.7)), ("ab", "b", (1.0, 0.7)), ("", "", (1, 1))]
)
def test_table_gradients_that_appear_vanish_or_are_missing(first, second, expected):
    a, b = scalars()
    sam = SAM(torch.optim.SGD([a, b], lr=0.1))
    for names, move in ((first, sam.perturb), (second, sam.step)):
        for name in names:
            (2 * a if name == "a" else 3 * b).sum().backward()
        move()
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor(expected, dtype=torch.float32))


def test_table_zero_gradients_move_nothing():
    a, b = scalars()
    for adaptive in (False, True):
        a.grad, b.grad = torch.zeros(1), torch.zeros(1)
        sam = SAM(torch.optim.SGD([a, b], lr=0.1), adaptive=adaptive)
        sam.perturb()
        assert a.item() == b.item() == 1.0
        sam.step()
        assert a.item() == b.item() == 1.0


def test_table_step_with_a_closure_returns_the_loss_at_w():
    (w, _) = scalars()
    sam = SAM(torch.optim.SGD([w], lr=0.1))

    def closure():
        sam.optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert sam.step(closure).item() == 1.0

"""SAM on parameters that FSDP2 shards over two gloo processes, against one process that holds them whole."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from helpers import FORKS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from common import SAM, frozen_bn_stats

WORLD, STEPS, RHO = 2, 3, 0.5


def network():
    """Some of its parameters don't divide evenly over two processes, one leaves the second with nothing."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3)
    return nn.Sequential(*layers).double()


def optimizer_of(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    F.cross_entropy(model(x), torch.randint(3, (16,), generator=generator)).backward()


def whole(model):
    """Its parameters, gathered from all processes."""
    return [p.full_tensor().clone() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def train(model, adaptive):
    """(The weights at w + e, those after restore(), those after the step), of each step."""
    sam = SAM(optimizer_of(model.parameters()), RHO, adaptive)
    weights = []
    for step in range(STEPS):
        before = whole(model)
        sam.optimizer.zero_grad()
        backward(model, step)
        sam.perturb()
        perturbed = whole(model)
        with frozen_bn_stats(model):
            backward(model, step)
        sam.restore()
        assert all(map(torch.equal, whole(model), before))
        sam.step()
        weights.append((before, perturbed, whole(model)))
    return weights


def refusal_of_mixed_parameters(mesh):
    """What perturb() says where a part of the parameters is sharded. w must be as it was, and then work unmixed."""
    model = network()
    fully_shard(model[0], mesh=mesh)
    before = whole(model)
    backward(model, 0)
    sam = SAM(optimizer_of(model.parameters()), RHO)
    with pytest.raises(RuntimeError) as refusal:
        sam.perturb()
    assert all(map(torch.equal, whole(model), before))
    for p in model[1:].parameters():
        p.grad = None
    sam.perturb()
    assert not torch.equal(whole(model)[0], before[0])
    sam.restore()
    assert all(map(torch.equal, whole(model), before))
    return str(refusal.value)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    seen = {"mixed": refusal_of_mixed_parameters(mesh)}
    for adaptive in (False, True):
        model = network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        seen[adaptive] = train(model, adaptive)
        seen["sizes"] = [p.to_local().numel() for p in model.parameters()]
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    workers = [FORKS.Process(target=worker, args=(rank, str(folder))) for rank in range(WORLD)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharded_steps_equal_those_of_one_process(processes, adaptive):
    expected = train(network(), adaptive)
    for seen in processes:
        for ours, theirs in zip(seen[adaptive], expected):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_norm_is_one_over_all_shards(processes):
    first, second = (seen["sizes"] for seen in processes)
    assert all(first) and 0 in second  # each process holds a part, and of some parameters nothing
    for before, perturbed, _ in processes[0][False]:
        squares = [(after - w).square().sum() for after, w in zip(perturbed, before)]
        assert abs(sum(squares).sqrt() - RHO) < 1e-11  # SAM adds 1e-12 to |g|


def test_sharded_and_plain_parameters_together_are_refused(processes):
    for seen in processes:
        assert "mixed torch.Tensor and DTensor" in seen["mixed"]

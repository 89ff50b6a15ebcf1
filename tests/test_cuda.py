"""An epoch of each script on CUDA tensors that have no data, so without a GPU: no device is mixed with another, and
nothing in an epoch waits for a value on the device (reading one raises). Stand-ins: backward passes and updates.
"""

import argparse

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import Data, Split

CONFIG = {"seed": 0, "device": "cuda", "fp32": False, "compile": False, "batch_size": 64, "epochs": 1, "lr": 0.1}
CONFIG |= {"momentum": 0.9, "weight_decay": 5e-4, "rho": 0.05, "noise": 0.5, "pruner": "random", "sparsity": 0.9}


class Done(Exception):
    pass


class Epoch:
    """Stands in for Run: ends training after an epoch, with its scores as a tensor."""

    def __init__(self, config, model, optimizer):
        def backward(loss):
            assert loss.device.type == "cuda" and loss.dtype == torch.float32
            for p in model.parameters():
                p.grad = torch.empty_like(p)

        Epoch.backward = backward

    def epochs(self):
        yield 1

    def end_epoch(self, outputs, data):
        raise Done(common.score(*map(torch.cat, zip(*outputs))))


def on_cuda(make):
    def made(*args):
        with torch.device("cuda"):
            return make(*args)

    return made


@pytest.fixture
def fake(monkeypatch):
    """Models are made on the device where a real run moves them there, which tensors without data cannot be."""
    for name in ("MLP", "ResNet18"):
        monkeypatch.setattr(common, name, on_cuda(getattr(common, name)))
    monkeypatch.setattr(common, "lecun_normal_", lambda model: model)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: Epoch.backward(loss))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: None)
    common.channel_stats.cache_clear()
    yield monkeypatch
    common.channel_stats.cache_clear()


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
@pytest.mark.parametrize("flags", ["", "sam", "sam adaptive", "sam amp"])
@pytest.mark.parametrize("script", [mlp_width, resnet_width, label_noise, sparsity])
def test_an_epoch_stays_on_the_device_and_reads_nothing_from_it(fake, script, flags):
    width = {"hidden": "30-20", "filters": None} if script is mlp_width else {"hidden": None, "filters": 8}
    given = {flag: flag in flags for flag in ("sam", "adaptive", "amp")}
    config = argparse.Namespace(**CONFIG, **width, **given)
    fake.setattr(script, "Run", Epoch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = (200, 1, 28, 28) if script is mlp_width else (200, 3, 32, 32)
        images = torch.empty(shape, dtype=torch.uint8, device="cuda")
        split = Split(images, torch.empty(200, dtype=torch.int64, device="cuda"))
        data = Data(split, split, split, 10, script is not mlp_width)
        fake.setattr(script, "load_data", lambda config: data)
        with pytest.raises(Done) as done:
            script.train(config)
        (sums,) = done.value.args
        assert sums.device.type == "cuda" and len(sums) == (3 if script is label_noise else 2)
        with pytest.raises(DataDependentOutputException):  # so would a read before
            sums[0].item()

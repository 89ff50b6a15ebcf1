"""An epoch of each script on CUDA tensors that have no data, so without a GPU: no device is mixed with another, and
nothing in an epoch waits for a value on the device (reading one raises). Stand-ins: backward passes and updates.
"""

import argparse

import pytest
import torch
from helpers import runs
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import common
import label_noise
import mlp_width
import resnet_width
import sparsity
from common import Data, Split


class Done(Exception):
    pass


class Epoch:
    """Stands in for Recorder."""

    def __init__(self, config, model, optimizer):
        def backward(loss):
            assert loss.device.type == "cuda" and loss.dtype == torch.float32
            for p in model.parameters():
                p.grad = torch.empty_like(p)

        Epoch.backward, Epoch.sums = backward, []

    def epochs(self):
        yield 1


def end(scores, *names):
    """Stands in for Scores.means: ends training when the test and held-out images, too, are scored."""
    scores.reduce()
    Epoch.sums.append(scores.sums)
    if len(Epoch.sums) == 3:
        raise Done
    return dict.fromkeys(names, 0.0)


@pytest.fixture
def fake(monkeypatch):
    """Models are made on the device where a real run moves them there, which tensors without data cannot be."""
    monkeypatch.setattr(common, "lecun_normal_", lambda model: model)
    monkeypatch.setattr(common.Scores, "means", end)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: Epoch.backward(loss))
    monkeypatch.setattr(torch.optim.SGD, "step", lambda optimizer: None)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul  # properties, which monkeypatch would delete
    settings = [(cudnn, "allow_tf32"), (cudnn, "benchmark"), (matmul, "allow_tf32")]
    before = [getattr(owner, name) for owner, name in settings]
    common.channel_stats.cache_clear()
    yield monkeypatch
    common.channel_stats.cache_clear()
    for (owner, name), value in zip(settings, before):
        setattr(owner, name, value)


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
@pytest.mark.parametrize("flags", ["", "--sam --perturb last", "--sam --adaptive", "--sam --amp", "--loss mse"])
@pytest.mark.parametrize("script", [mlp_width, resnet_width, label_noise, sparsity])
def test_an_epoch_stays_on_the_device_and_reads_nothing_from_it(fake, tmp_path, script, flags):
    # more steps than scores are kept of, or a few of a ResNet, which take long even without data
    width = "--hidden 30-20 --batch-size 2" if script is mlp_width else "--filters 8 --batch-size 128"
    (config,) = runs(script, tmp_path, *width.split(), *flags.split())
    config.device = "cuda"
    build = script.build_model

    def on_cuda(*args):
        with torch.device("cuda"):
            return build(*args)

    def start(*args):
        torch.Tensor.__int__ = read
        return Epoch(*args)

    read = torch.Tensor.__int__
    fake.setattr(torch.Tensor, "__int__", lambda tensor: 0)  # before the first epoch, values may be read
    fake.setattr(script, "Recorder", start)
    fake.setattr(script, "build_model", on_cuda)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = (200, 1, 28, 28) if script is mlp_width else (200, 3, 32, 32)
        images = torch.empty(shape, dtype=torch.uint8, device="cuda")
        split = Split(images, torch.empty(200, dtype=torch.int64, device="cuda"))
        data = Data(split, split, split, shape[1:], 10, script is not mlp_width)
        fake.setattr(script, "load_data", lambda config: data)
        with pytest.raises(Done):
            script.train(config)
        assert [len(sums) for sums in Epoch.sums] == [4 if script is label_noise else 3, 3, 3]
        assert all(sums.device.type == "cuda" for sums in Epoch.sums)
        with pytest.raises(DataDependentOutputException):  # so would a read before
            Epoch.sums[0][0].item()


@pytest.mark.parametrize("strict", [False, True])
def test_tf32_is_used_unless_fp32_is_asked_for(fake, tmp_path, strict):
    (config,) = runs(mlp_width, tmp_path, *(["--fp32"] if strict else []))
    config.device = "cuda"
    common.prepare(torch.nn.Linear(1, 1), config)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 != strict


def test_curvature_is_measured_without_tf32(fake, tmp_path):
    (config,) = runs(mlp_width, tmp_path, "--sharpness", "3")
    recorder = argparse.Namespace(config=config, model=torch.nn.Linear(4, 2), status="done")
    owners, found = (torch.backends.cuda.matmul, torch.backends.cudnn), []
    for owner in owners:
        owner.allow_tf32 = True
    fake.setattr(common, "sharpness", lambda *args: found.extend(owner.allow_tf32 for owner in owners) or {})
    labels = torch.arange(5) % 2
    common.measure_sharpness(recorder, common.LOSSES["ce"], Split(torch.randn(5, 4), labels), labels)
    assert found == [False, False]

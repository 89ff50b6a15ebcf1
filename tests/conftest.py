"""The tests see no GPU: those about CUDA use tensors without data. What a test changes for the process is put back."""

import os
import signal
import sys
from pathlib import Path

# Before torch is asked, and for all processes that tests start. More threads than free cores: all is ten times as slow.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch

from common import LOSSES, Data, Split


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """Back to what they were: a script's main() that a test calls sets its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fake_data():
    """A function that makes data of n random images, as CIFAR-10 has them, augmented in training."""

    def make(n, test=None, channels=3, augment=True):
        generator = torch.Generator().manual_seed(1)
        images = torch.randint(256, (n, channels, 32, 32), dtype=torch.uint8, generator=generator)
        labels = torch.arange(n) % 10
        test_split = Split(images[:test], labels[:test])
        val_split = Split(images[:0], labels[:0])
        return Data(Split(images, labels), val_split, test_split, images.shape[1:], 10, augment, LOSSES["ce"])

    return make

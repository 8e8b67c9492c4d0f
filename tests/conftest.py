"""What holds for every test."""

import pytest
import torch
from hypothesis import settings

# No time limit an example, since tests share their cores; the same examples in every run, so that green stays green.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")

GPUS = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


@pytest.fixture(params=["cpu", *GPUS])
def device(request):
    """The CPU, and the GPU of this machine if it has one, there without TF32, which keeps three digits of a factor."""
    products = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.allow_tf32 for part in products]
    for part in products:
        part.allow_tf32 = False
    yield request.param
    for part, allowed in zip(products, before, strict=True):
        part.allow_tf32 = allowed


def pytest_runtest_teardown():
    """Undo what a program that torch 2.5 compiled does to its process: make 0 of the smallest numbers."""
    torch.set_flush_denormal(False)

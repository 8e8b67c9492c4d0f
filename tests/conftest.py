"""What holds for every test."""

import os

import pytest
import torch
from hypothesis import settings

from mini_impl import language

# No time limit an example, since tests share their cores; the same examples in every run, so that green stays green.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")

# Without a GPU Triton interprets kernels. It looks when it is imported, and several libraries import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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


@pytest.fixture(autouse=True)
def as_before():
    """No test leaves to the next what it set for the whole process: so they pass in any order."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch._dynamo.reset()  # what was compiled, and how often it had to be compiled again
    torch.set_flush_denormal(False)  # what torch 2.5 compiles makes 0 of the smallest numbers
    language.use_language("en")

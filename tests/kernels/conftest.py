"""Where kernels are proven: on this machine's GPU or, without one, in Triton's interpreter (see tests/conftest.py)."""

from importlib.util import find_spec

import pytest
import torch

from tests.kernels import proof

ON_GPU = torch.cuda.is_available()


@pytest.fixture
def kernels(device, monkeypatch) -> str:
    """The device on which kernels are proven here, the GPU or the interpreter's CPU; they are asked for in the test."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'mini_impl[gpu]'")
    if device != ("cuda" if ON_GPU else "cpu"):
        pytest.skip("the kernels run on this machine's GPU")
    monkeypatch.setenv("MINI_IMPL_KERNELS", "1")
    return device


@pytest.fixture
def interpreter(kernels) -> str:
    """As kernels, for what the interpreter alone can show."""
    if ON_GPU:
        pytest.skip("the interpreter is for machines without a GPU")
    return kernels


@pytest.fixture
def poisoned():
    """Whatever is made empty in the test comes filled with NaN: every entry must be written."""
    with proof.poison():
        yield

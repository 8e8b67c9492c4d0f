"""Tensors for tests: drawn with a seed, and compared."""

import torch
from torch import Tensor


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draws of the standard normal distribution."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from 0 to high - 1, such as token ids."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, tolerance: float = 1e-12) -> None:
    """Fail unless two tensors, or nests of them, agree in shape, dtype and, within the tolerance, in their numbers."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

"""How a kernel is proven: on a GPU where there is one, else in Triton's interpreter, with the tensors of the CPU.

The interpreter runs the lines of a kernel with numpy, one program after the other. So it shows what a kernel computes,
and which bytes it reads and writes; not that it compiles (test_compiled.py), nor how fast it is, nor what two programs
that run at once do to each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from tests.tensors import random

# What a kernel may differ by from exact arithmetic, relative to the largest number of a result.
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def close(ours, exact, tolerance: float) -> None:
    """Fail unless two tensors, or lists of them, agree relative to the largest finite number; NaN and inf where exact.

    The numbers are judged in float64, and the dtypes not at all.
    """
    if not isinstance(ours, Tensor):
        assert len(ours) == len(exact)
        for our, their in zip(ours, exact, strict=True):
            close(our, their, tolerance)
        return
    ours, exact = ours.detach().cpu().double(), exact.detach().cpu().double()
    sizes = exact[exact.isfinite()].abs()
    scale = sizes.max().item() if len(sizes) else 1.0
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * scale, equal_nan=True)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same numbers with other strides: every axis that can be is the last in memory once, and steps lie between."""
    inverse = [*range(tensor.ndim)][::-1]
    kept = {"contiguous": tensor.contiguous()}
    kept["turned"] = tensor.permute(inverse).contiguous().permute(inverse)
    for axis in range(tensor.ndim):
        apart = tensor.new_full([size * 2 if place == axis else size for place, size in enumerate(tensor.shape)], 0)
        part = apart.narrow(axis, 1, tensor.shape[axis] * 2 - 1)[(slice(None),) * axis + (slice(None, None, 2),)]
        part.copy_(tensor)
        kept[f"every second of axis {axis}"] = part
    assert all(torch.equal(one, tensor) for one in kept.values())
    return kept


def upstreams(output: Tensor) -> dict[str, Tensor]:
    """What may come from behind a result in a backward pass: of any strides, and one number for all, as sum() gives."""
    number = output.new_tensor(0.7).expand(output.shape)
    return {"of a sum": number} | (layouts(random(*output.shape, seed=9).to(output)) if output.ndim else {})


def results(function, leaf: Tensor, *given, upstream=None) -> tuple[list[Tensor], Tensor]:
    """The outputs of function(leaf, *given), and the gradient by the leaf; upstream: one tensor an output, or ones."""
    leaf = leaf.detach().requires_grad_()
    outputs = function(leaf, *given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [torch.ones_like(output) for output in outputs] if upstream is None else upstream
    (gradient,) = torch.autograd.grad(outputs, leaf, upstream)
    return [output.detach() for output in outputs], gradient


@contextmanager
def poison() -> Iterator[None]:
    """Every floating-point tensor that is made empty holds NaN, and one of whole numbers the largest there is."""

    def filled(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return made

    with (
        mock.patch.object(torch, "empty", filled(torch.empty)),
        mock.patch.object(torch, "empty_like", filled(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", filled(Tensor.new_empty)),
    ):
        yield


class Moved:
    """The bytes that kernels read and wrote in the interpreter."""

    def __init__(self):
        self.read = self.written = 0  # as often as they were
        self.places_read: set[int] = set()  # addresses, each of an entry
        self.once_read = self.once_written = 0  # every entry once: the cache serves the rest
        self.places_written: set[int] = set()


@contextmanager
def moved() -> Iterator[Moved]:
    """Counts what the kernels load and store inside; in the interpreter only."""
    from triton.runtime.interpreter import InterpreterBuilder

    counts = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        places, size = _places(pointers, mask)
        counts.read += len(places) * size
        counts.once_read += len(set(places) - counts.places_read) * size
        counts.places_read.update(places)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        places, size = _places(pointers, mask)
        counts.written += len(places) * size
        counts.once_written += len(set(places) - counts.places_written) * size
        counts.places_written.update(places)
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield counts


def _places(pointers, mask) -> tuple[list[int], int]:
    """The addresses that an unmasked lane of a load or store touches, and the bytes at each."""
    return pointers.data[mask.data].tolist(), pointers.get_element_ty().primitive_bitwidth // 8

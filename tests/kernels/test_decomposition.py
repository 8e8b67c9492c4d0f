"""Trend, season and their gradient by the kernel: against float64 arithmetic of the formula and torch."""

import math

import numpy as np
import pytest
import torch

from mini_impl.forecasting import dlinear
from mini_impl.kernels import decomposition
from mini_impl.kernels.decomposition import decompose, decompose_torch
from tests.kernels.proof import DTYPES, close, layouts, moved, results, upstreams
from tests.tensors import random, same

SIZES = [  # batch, time, variable, k
    (1, 1, 1, 1),
    (3, 2, 1, 1),
    (1, 3, 1, 3),
    (2, 17, 3, 5),
    (2, 17, 3, 17),
    (1, 50, 7, 25),
    (3, 336, 7, 25),
    (1, 4, 321, 3),
    (2, 513, 2, 25),  # of a second block two places
]


def series_of(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> torch.Tensor:
    return (random(*shape, seed=seed) + 3).to(device, dtype)


def average_of(time: int, kernel_size: int) -> np.ndarray:
    """A of t = A x, [time, time], place by place."""
    matrix = np.zeros((time, time))
    for middle in range(time):
        for place in range(middle - kernel_size // 2, middle + kernel_size // 2 + 1):
            matrix[middle, min(max(place, 0), time - 1)] += 1 / kernel_size
    return matrix


def exact(series, kernel_size, to_trend=None, to_seasonal=None):
    """Trend, season and the gradient, [batch, time, variable] each, in float64; the gradients behind are ones."""
    x = series.detach().cpu().double().numpy()
    matrix = average_of(series.shape[1], kernel_size)
    trend = matrix @ x
    behind = (np.ones_like(x) if g is None else g.cpu().double().numpy() for g in (to_trend, to_seasonal))
    to_trend, to_seasonal = behind
    gradient = matrix.T @ (to_trend - to_seasonal) + to_seasonal
    return [torch.from_numpy(value) for value in (trend, x - trend, gradient)]


def check(series, kernel_size, to_trend=None, to_seasonal=None, tolerance=1e-5) -> None:
    """Kernel and torch function give the exact numbers, in the dtype of the series."""
    expected = exact(series, kernel_size, to_trend, to_seasonal)
    for function in (decompose, decompose_torch):
        behind = None if to_trend is None else [to_trend, to_seasonal]
        parts, gradient = results(function, series, kernel_size, upstream=behind)
        close([*parts, gradient], expected, tolerance)
        assert all(part.dtype == series.dtype and part.shape == series.shape for part in (*parts, gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_and_torch_compute_the_formula(kernels, size, dtype):
    *shape, kernel_size = size
    series = series_of(*shape, dtype=dtype, device=kernels)
    behind = (series_of(*shape, dtype=dtype, device=kernels, seed=seed) for seed in (1, 2))
    check(series, kernel_size, *behind, tolerance=DTYPES[dtype])


def test_sixteen_bits_are_added_up_in_float32(kernels):
    """In bfloat16 a sum of numbers near 3 stops growing at 1024."""
    series = series_of(1, 501, 1, dtype=torch.bfloat16, device=kernels)
    close(decompose(series, 501)[0], exact(series, 501)[0], 1e-2)


@pytest.mark.parametrize("shape", [(3, 9, 4), (1, 9, 1), (3, 1, 4)])
def test_series_of_any_strides(kernels, poisoned, shape):
    series, kernel_size = series_of(*shape, device=kernels), min(shape[1], 5)
    for these in layouts(series).values():
        check(these, kernel_size)


def test_an_expanded_series_gets_the_gradient_of_all_its_windows(kernels):
    window = series_of(1, 12, 3, device=kernels)
    parts, gradient = results(lambda window: decompose(window.expand(4, 12, 3), 5), window)
    *expected, slopes = exact(window.expand(4, 12, 3), 5)
    close([*parts, gradient], [*expected, slopes.sum(0, keepdim=True)], 1e-5)


def test_every_entry_is_written(kernels, poisoned):
    check(series_of(2, 300, 5, device=kernels), 7)
    check(series_of(1, 1024, 1, device=kernels), 7)


def test_gradients_from_behind_may_have_any_strides(kernels):
    series = series_of(2, 8, 3, device=kernels)
    for to_trend in upstreams(series).values():
        for to_seasonal in upstreams(series).values():
            check(series, 5, to_trend, to_seasonal)


@pytest.mark.parametrize("part", [0, 1])
def test_one_part_alone_may_be_used(kernels, part):
    series = series_of(2, 8, 3, device=kernels)
    _, gradient = results(lambda series: decompose(series, 5)[part], series)
    behind = [torch.zeros_like(series), torch.zeros_like(series)]
    behind[part] += 1
    close(gradient, exact(series, 5, *behind)[2], 1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 6, 11])
def test_nan_and_infinity_are_as_torch_has_them(kernels, bad, place):
    series = series_of(2, 12, 3, device=kernels)
    series[0, place, 1] = bad
    ours, theirs = decompose(series, 5), decompose_torch(series, 5)
    assert not ours[0].isfinite().all() and ours[0][1].isfinite().all()
    close(ours, theirs, 1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_gradient_is_that_of_the_value(kernels, kernel_size):
    series = series_of(1, 5, 1, dtype=torch.float64, device=kernels).requires_grad_()
    assert torch.autograd.gradcheck(lambda series: decompose(series, kernel_size), series)


def test_without_a_gradient_the_values_are_the_same(kernels):
    series = series_of(2, 30, 3, device=kernels).requires_grad_()
    parts = decompose(series, 7)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            alone = decompose(series, 7)
        assert all(map(torch.equal, alone, parts)) and not alone[0].requires_grad


def test_a_second_derivative_is_refused(kernels):
    series = series_of(2, 5, 2, device=kernels).requires_grad_()
    with pytest.raises(RuntimeError, match="decompose has no second derivative"):
        torch.autograd.grad(decompose(series, 3)[0].square().sum(), series, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 17, 3, 5), (2, 400, 3, 9)])
def test_it_moves_the_bytes_of_the_formula(interpreter, size, dtype):
    """Each entry of the series, and of the gradients from behind, once; what is read again the cache has."""
    *shape, kernel_size = size
    series = series_of(*shape, dtype=dtype).requires_grad_()
    forward, backward = decomposition.traffic(*size, dtype)
    behind = [series_of(*shape, dtype=dtype, seed=seed) for seed in (1, 2)]
    with moved() as counts:
        parts = decompose(series, kernel_size)
    assert (counts.once_read, counts.once_written) == (forward.read, forward.written)
    assert counts.written == counts.once_written and counts.read == forward.read * (kernel_size + 1)
    with moved() as counts:
        torch.autograd.backward(parts, behind)
    assert (counts.once_read, counts.once_written) == (backward.read, backward.written)
    assert counts.written == counts.once_written


# --- in the package ---------------------------------------------------------------------------------------------------


def test_dlinears_parts_are_made_by_the_kernel_where_it_is_wanted(interpreter):
    series = series_of(2, 17, 3)
    with moved() as counts:
        parts, gradient = results(dlinear.decompose, series, 5)
    assert counts.read and counts.written
    close([*parts, gradient], exact(series, 5), 1e-5)
    same(dlinear.decompose(kernel_size=5, series=series), tuple(parts))


WRONG = [
    {"series": [1.0]},
    {"series": torch.ones(2, 5, 3, dtype=torch.long)},
    {"series": torch.ones(5, 3)},
    {"series": torch.ones(0, 5, 3)},
    {"kernel_size": 3.0},
    {"kernel_size": True},
    {"kernel_size": 0},
    {"kernel_size": 4},
    {"kernel_size": 7},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_as_dlinear_says_it(kernels, monkeypatch, wrong):
    given = {"series": torch.ones(2, 5, 3), "kernel_size": 3, **wrong}
    with pytest.raises((TypeError, ValueError)) as ours:
        decompose(**given)
    monkeypatch.setenv("MINI_IMPL_KERNELS", "0")
    with pytest.raises((TypeError, ValueError)) as theirs:
        dlinear.decompose(**given)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


def test_a_dtype_that_no_kernel_has_is_refused():
    with pytest.raises(TypeError, match=r"series must be of torch\.float16, .*; got torch\.float8_e5m2"):
        decompose(torch.ones(1, 3, 1).to(torch.float8_e5m2), 3)

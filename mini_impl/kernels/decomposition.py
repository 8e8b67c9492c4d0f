"""Trend and season of a series in one kernel: the series is read once, both are written.

    t_t = 1/k sum of x_p from p = t - m to t + m, k = 2m + 1,   s = x - t;   beyond the edges x_p is the first, the last

PyTorch writes a copy of the series with its edges repeated, reads it for the average, and reads the series and the
average again for the rest. A program of the kernel makes a block of places, which lie side by side in memory where the
series does; what it reads k times, and its neighbours too, comes from the cache but for the first time.
The backward pass is the transposed map: with g = d t - d s it is d x_i = d s_i + 1/k sum of g_t, each of them as often
as one of its k places is x_i.
Source: the documented step 1 of DLinear; the edges as in the public code of its paper.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks
from mini_impl.kernels import wanted
from mini_impl.kernels.roofline import Traffic

LEAST = 2**18  # entries of a series from which on the kernel is chosen
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- as torch computes it ---------------------------------------------------------------------------------------------


def decompose_torch(series: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """decompose in PyTorch's operations, one after the other."""
    steps = kernel_size // 2
    longer = F.pad(series.mT, (steps, steps), mode="replicate")  # [batch, variable, time + k - 1]
    trend = F.avg_pool1d(longer, kernel_size, stride=1).mT
    return trend, series - trend


# --- the kernels ------------------------------------------------------------------------------------------------------


@cache
def kernels():
    """The kernels (forward, backward). Triton is imported here, and so only where it is used."""
    global tl  # Triton looks for its language among the module's names
    import triton
    import triton.language as tl

    @triton.jit
    def decomposition_kernel(
        series,  # [batch, time, variable], of the strides that follow
        trend,  # out: [batch, time, variable], contiguous
        seasonal,  # out: the same
        batch_step,
        time_step,
        variable_step,
        time,
        variables,
        blocks,  # programs for each window
        steps,  # m
        WIDE: tl.constexpr,  # the dtype to compute in
        BLOCK: tl.constexpr,
    ):
        window = (tl.program_id(0) // blocks).to(tl.int64)
        place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)  # in the window, as it lies in the results
        inside = place < time * variables
        middle, variable = place // variables, place % variables
        series += window * batch_step + variable.to(tl.int64) * variable_step
        total = tl.zeros((BLOCK,), WIDE)
        for offset in range(-steps, steps + 1):
            moment = tl.minimum(tl.maximum(middle + offset, 0), time - 1).to(tl.int64)
            total += tl.load(series + moment * time_step, mask=inside, other=0).to(WIDE)
        average = total / tl.full((), 2 * steps + 1, WIDE)
        x = tl.load(series + middle.to(tl.int64) * time_step, mask=inside, other=0).to(WIDE)
        out = window * time * variables + place
        tl.store(trend + out, average, mask=inside)
        tl.store(seasonal + out, x - average, mask=inside)

    @triton.jit
    def decomposition_backward_kernel(
        to_trend,  # d loss / d trend, [batch, time, variable], of the strides that follow
        to_seasonal,  # d loss / d seasonal, the same, of the next ones
        gradient,  # out: d loss / d series, [batch, time, variable], contiguous
        trend_batch_step,
        trend_time_step,
        trend_variable_step,
        seasonal_batch_step,
        seasonal_time_step,
        seasonal_variable_step,
        time,
        variables,
        blocks,
        steps,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        window = (tl.program_id(0) // blocks).to(tl.int64)
        place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = place < time * variables
        own, variable = place // variables, place % variables  # i
        to_trend += window * trend_batch_step + variable.to(tl.int64) * trend_variable_step
        to_seasonal += window * seasonal_batch_step + variable.to(tl.int64) * seasonal_variable_step
        total = tl.zeros((BLOCK,), WIDE)
        for offset in range(-steps, steps + 1):
            middle = own + offset  # t
            there = inside & (middle >= 0) & (middle < time)
            moment = middle.to(tl.int64)
            g = tl.load(to_trend + moment * trend_time_step, mask=there, other=0).to(WIDE)
            g -= tl.load(to_seasonal + moment * seasonal_time_step, mask=there, other=0).to(WIDE)
            beyond = tl.where(own == 0, steps - offset, 0) + tl.where(own == time - 1, steps + offset, 0)
            total += g * (1 + beyond).to(WIDE)  # 1 as itself; an edge stands for the places beyond it too
        moment = own.to(tl.int64)
        direct = tl.load(to_seasonal + moment * seasonal_time_step, mask=inside, other=0).to(WIDE)
        out = window * time * variables + place
        tl.store(gradient + out, direct + total / tl.full((), 2 * steps + 1, WIDE), mask=inside)

    return decomposition_kernel, decomposition_backward_kernel


BLOCK = 512  # places that a program makes


class _Decompose(torch.autograd.Function):
    """decompose by the kernels."""

    @staticmethod
    def forward(ctx, series, kernel_size):
        forward, _ = kernels()
        trend, seasonal = (torch.empty(series.shape, dtype=series.dtype, device=series.device) for _ in range(2))
        ctx.kernel_size = kernel_size
        _launch(forward, (series,), (trend, seasonal), kernel_size)
        return trend, seasonal

    @staticmethod
    def backward(ctx, to_trend, to_seasonal):  # d loss / d trend, d loss / d seasonal, [batch, time, variable]
        if torch.is_grad_enabled():
            raise RuntimeError("decompose has no second derivative (create_graph=True): use decompose_torch")
        _, backward = kernels()
        gradient = torch.empty(to_trend.shape, dtype=to_trend.dtype, device=to_trend.device)
        _launch(backward, (to_trend, to_seasonal), (gradient,), ctx.kernel_size)
        return gradient, None


def _launch(kernel, read: tuple[Tensor, ...], written: tuple[Tensor, ...], kernel_size: int) -> None:
    """Start a program for each block of each window."""
    batch, time, variables = read[0].shape
    blocks = -(-time * variables // BLOCK)
    steps = [step for tensor in read for step in tensor.stride()]
    wide = tl.float64 if read[0].dtype == torch.float64 else tl.float32
    sizes = time, variables, blocks, kernel_size // 2
    with torch.cuda.device_of(read[0]):
        kernel[batch * blocks,](*read, *written, *steps, *sizes, WIDE=wide, BLOCK=BLOCK, num_warps=8)


# --- the choice -------------------------------------------------------------------------------------------------------


def decompose(series: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Split a series into its moving average and the rest, x = t + s, by the kernel or by torch.

    series: [batch, time, variable], float16, bfloat16, float32 or float64, of any strides. kernel_size: k, odd, at most
    time. Returns (trend, seasonal), both [batch, time, variable] and of the dtype of series, computed in float64 for
    float64, else in float32.
    There is no second derivative. Numbers are not checked, as the host would wait for them: of NaN comes NaN in every
    average that it is in. Raises TypeError, ValueError for what does not fit; RuntimeError for a second derivative.
    """
    _check(series, kernel_size)
    kernel_size = int(kernel_size)
    if not wanted(series, LEAST):
        return decompose_torch(series, kernel_size)
    return _Decompose.apply(series, kernel_size)


def _check(series, kernel_size) -> None:
    """Raise unless the arguments are those that decompose takes."""
    wanted = "series must be a floating-point tensor [batch, time, variable]"
    if not isinstance(series, Tensor) or not series.is_floating_point():
        got = f"dtype {series.dtype}" if isinstance(series, Tensor) else type(series).__name__
        raise TypeError(f"{wanted}; got {got}")
    if series.dtype not in DTYPES:
        raise TypeError(f"series must be of {', '.join(map(str, DTYPES))}; got {series.dtype}")
    if series.ndim != 3 or not series.numel():
        raise ValueError(f"{wanted}, no axis empty; got shape {list(series.shape)}")
    checks.odd("kernel_size", kernel_size, most=series.shape[1])


def traffic(
    batch: int, time: int, variables: int, kernel_size: int, dtype: torch.dtype = torch.float32
) -> tuple[Traffic, Traffic]:
    """What the kernel moves, forward and backward, by formula: each entry once, as the cache has it the next time.

    Forward: the series is read, trend and season are written. Backward: their two gradients are read, one is written.
    """
    entries = batch * time * variables
    table = entries * dtype.itemsize
    forward = Traffic(read=table, written=2 * table, operations=entries * (kernel_size + 2), launches=1)
    backward = Traffic(read=2 * table, written=table, operations=entries * (3 * kernel_size + 2), launches=1)
    return forward, backward

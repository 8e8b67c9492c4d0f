"""Parts that several forecasters share."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks


def moving_average(series: Tensor, kernel_size: int) -> Tensor:
    """The average of the k values around each time step; beyond the edges the first and the last value are repeated.

    series: [batch, time, variable]. kernel_size: k, odd, at most time. Returns [batch, time, variable].
    t_t = 1/k sum of x_i from i = t - (k-1)/2 to t + (k-1)/2. Raises TypeError, ValueError.
    Source: the filter of the documented DLinear; its edges, which the text leaves out, as in the paper's public code.
    """
    checks.tensor("series", series, "batch", "time", "variable")
    size = checks.odd("kernel_size", kernel_size, most=series.shape[1])
    return F.avg_pool1d(_repeat_edges(series, size // 2), size, stride=1).mT


@lru_cache(maxsize=16)
def averaging_matrix(time: int, kernel_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A of moving_average(x) = A x: [time, time]. For short series one product with it is faster than averaging.

    Every call with the same arguments returns the same tensor: do not write into it.
    """
    with torch.inference_mode(False):  # the matrix outlives the call, and must then serve in training too
        return moving_average(torch.eye(time, dtype=dtype, device=device)[None], kernel_size)[0]


def weighted_average(series: Tensor, weights: Tensor) -> Tensor:
    """As moving_average, but t_t = sum_j w_j x_{t+j-m}, j from 0, m the middle offset.

    weights: [offset], an odd number of them, at most as many as there are time steps. Raises TypeError, ValueError.
    """
    checks.tensor("series", series, "batch", "time", "variable")
    checks.tensor("weights", weights, "offset")
    batch, time, variable = series.shape
    size = checks.odd("the number of weights", len(weights), most=time)
    kernel = weights.to(series)[None, None]  # [1, 1, offset]
    alone = _repeat_edges(series, size // 2).flatten(0, 1)[:, None]  # [batch * variable, 1, time + size - 1]
    return F.conv1d(alone, kernel).view(batch, variable, time).mT


def half_weighted(period: int) -> Tensor:
    """Weights of the centred average over one even period: 1/p each, the two ends 1/(2p). Returns [p + 1].

    It removes every wave that repeats after `period` steps; for an even period no plain average of odd length does.
    Raises TypeError, ValueError for an odd period. Source: the "2 x p" average of classical decomposition.
    """
    if checks.integer("period", period, least=2) % 2:
        raise ValueError(f"period must be even; got {period}, over which moving_average is centred already")
    weights = torch.full((period + 1,), 1 / period, dtype=torch.float64)
    weights[0] = weights[-1] = 1 / (2 * period)
    return weights


def _repeat_edges(series: Tensor, steps: int) -> Tensor:
    """[batch, time, variable] -> [batch, variable, steps + time + steps]."""
    return F.pad(series.mT, (steps, steps), mode="replicate")

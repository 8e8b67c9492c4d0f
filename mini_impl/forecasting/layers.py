"""Parts that several forecasters share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks


def moving_average(series: Tensor, weights: Tensor) -> Tensor:
    """The weighted average around each time step; beyond the edges the first and the last value are repeated.

    series: [batch, time, variable]. weights: [offset], an odd number of them, the middle one for the step itself.
    Returns [batch, time, variable]: t_t = sum_j w_j x_{t+j-m}, j from 0, m the middle offset.
    Raises TypeError, ValueError for other shapes, an even number of weights, or more weights than time steps.
    Source: the filter of the documented DLinear; its edges, which the text leaves out, as in the paper's public code.
    """
    checks.tensor("series", series, "batch", "time", "variable")
    checks.tensor("weights", weights, "offset")
    batch, time, variable = series.shape
    size = checks.odd("the number of weights", len(weights), most=time)
    padded = F.pad(series.mT, (size // 2, size // 2), mode="replicate")  # [batch, variable, time + size - 1]
    kernel = weights.to(series)[None, None]  # [1, 1, offset]
    averaged = F.conv1d(padded.reshape(batch * variable, 1, -1), kernel)  # [batch * variable, 1, time]
    return averaged.view(batch, variable, time).mT


def box(size: int) -> Tensor:
    """Weights of the plain average over an odd number of steps: 1/k each. Returns [k]. Raises TypeError, ValueError."""
    return torch.full((checks.odd("size", size),), 1 / size, dtype=torch.float64)


def half_weighted(period: int) -> Tensor:
    """Weights of the centred average over one even period: 1/p each, the two ends 1/(2p). Returns [p + 1].

    It removes every wave that repeats after `period` steps; for an even period no plain average of odd length does.
    Raises TypeError, ValueError for an odd period. Source: the "2 x p" average of classical decomposition.
    """
    if checks.integer("period", period, least=2) % 2:
        raise ValueError(f"period must be even; got {period}, for which box({period}) is centred already")
    weights = torch.full((period + 1,), 1 / period, dtype=torch.float64)
    weights[0] = weights[-1] = 1 / (2 * period)
    return weights

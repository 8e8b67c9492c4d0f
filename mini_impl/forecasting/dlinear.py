"""DLinear: split a series into trend and season, forecast each by one linear map, add up.

Sources: the documented system "DLinear"; Zeng et al., "Are Transformers Effective for Time Series Forecasting?", 2023.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.forecasting.forecaster import Forecaster
from mini_impl.forecasting.layers import averaging_matrix, moving_average
from mini_impl.kernels import decomposition, on_gpu
from mini_impl.losses import LossTerms


@on_gpu(decomposition.decompose, decomposition.LEAST)
def decompose(series: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Split a series into its moving average and the rest: x = t + s.

    series: [batch, time, variable]. kernel_size: k, odd, at most time.
    Returns (trend, seasonal), both [batch, time, variable]: t_t = 1/k sum of the k values around x_t, s = x - t.
    Raises TypeError, ValueError. Source: documented step 1.
    """
    trend = moving_average(series, kernel_size)
    return trend, series - trend


class Output(NamedTuple):
    """What DLinear returns."""

    prediction: Tensor  # [batch, horizon, variable], the sum of both branches
    trend: Tensor  # [batch, horizon, variable], the trend branch's own forecast: T of the documented loss


class DLinear(Forecaster):
    """Two linear maps over time, shared by all variables: y = W_t t + b_t + W_s s + b_s.

    history, horizon: how many steps it sees and forecasts (elsewhere: seq_len, pred_len). kernel_size: of the moving
    average, odd, at most history. weights: of another low-pass filter in its place, an odd number of them, at most
    history, that add up to 1, such as half_weighted(24).
    model(history [batch, history, variable]) -> Output. Raises TypeError, ValueError.
    Source: documented steps 2 and 3. Public code can also give each variable maps of its own (`individual`); here all
    variables share them.
    """

    documented_needs: ClassVar[dict] = {}  # arguments with which a model returns what documented_loss needs

    def __init__(self, history: int, horizon: int, kernel_size: int = 25, weights: Sequence[float] | None = None):
        super().__init__()
        history, horizon = checks.integers(history=history, horizon=horizon)
        self.history, self.horizon, self.kernel_size, self.weights = history, horizon, kernel_size, None
        if weights is None:
            self.kernel_size = checks.odd("kernel_size", kernel_size, most=history)
        else:
            self.weights = _averaging(weights, history)
            self.settings["weights"] = self.weights  # a tensor could not be saved with the model
        self.trend = nn.Linear(history, horizon)
        self.seasonal = nn.Linear(history, horizon)

    def forward(self, history: Tensor) -> Output:
        checks.history(history, self.history, self.trend.weight)
        # decompose(history, kernel_size), or with weights, with time as the last axis: t = A x, s = x - t
        kernel = self.weights or self.kernel_size
        average = averaging_matrix(self.history, kernel, history.dtype, history.device)  # [time, time]
        past = history.mT.flatten(0, 1)  # [batch * variable, time]
        trend = past @ average.mT  # [batch * variable, time]
        trend_forecast = self.trend(trend)  # [batch * variable, horizon]
        forecast = trend_forecast + self.seasonal(past - trend)
        shape = (len(history), -1, self.horizon)  # [batch, variable, horizon]
        return Output(prediction=forecast.view(shape).mT, trend=trend_forecast.view(shape).mT)


def _averaging(weights: Sequence[float], most: int) -> tuple[float, ...]:
    """The weights of an average, which a constant passes as it is. Raises TypeError, ValueError."""
    wanted = "weights must be several numbers that add up to 1"
    if isinstance(weights, str) or not hasattr(weights, "__len__"):
        raise TypeError(f"{wanted}; got {weights!r}")
    checks.odd("the number of weights", len(weights), most)
    weights = tuple(checks.number("each of the weights", float(weight)) for weight in weights)
    if abs(sum(weights) - 1) > 1e-4:
        raise ValueError(f"{wanted}; the sum of these is {sum(weights):g}")
    return weights


def documented_loss(output: Output, target: Tensor, trend_weight: float = 1.0) -> LossTerms:
    """L = 1/(2N) sum_i ||y_i - yhat_i||^2 + lambda/(2N) sum_i ||y_i - T_i||^2.

    N counts the windows of the batch; the norms run over horizon and variables.
    output: of DLinear; T is output.trend. target: y, [batch, horizon, variable]. trend_weight: lambda, at least 0.
    Terms: "forecast" and "trend". Raises TypeError, ValueError. Source: the documented loss.
    """
    checks.forecast(output, target, trend=(("batch", "horizon", "variable"), None))
    checks.alike("output.trend", output.trend, "target", target)
    checks.not_negative(trend_weight=trend_weight)
    windows = len(target)
    return LossTerms.of(
        forecast=F.mse_loss(output.prediction, target, reduction="sum") / (2 * windows),
        trend=trend_weight * F.mse_loss(output.trend, target, reduction="sum") / (2 * windows),
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and variables.

    output: of DLinear. target: y, [batch, horizon, variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper's public code.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))


def closed_form(history: Tensor, target: Tensor, kernel_size: int = 25, trend_weight: float = 1.0) -> DLinear:
    """A DLinear whose weights minimise the documented loss over the given windows, found without training.

    history: [window, time, variable]. target: [window, horizon, variable]. Returns a model in float64 on the CPU.
    Both terms are squares of maps linear in the weights, so this is one least-squares problem: each window and variable
    asks [t, 1, s, 1] to give y, and sqrt(lambda) [t, 1, 0, 0] to give sqrt(lambda) y.
    Its solution is never unique; this is the one of least norm. Compare losses and forecasts, not weights.
    Meant for z-scored windows: where the level is more than a million times the spread, float64 runs out of digits.
    Raises TypeError, ValueError. Source: ours.
    """
    checks.look(checks.finite("history", checks.tensor("history", history, "window", "time", "variable")))
    checks.look(checks.finite("target", checks.tensor("target", target, "window", "horizon", "variable")))
    checks.alike("history[:, 0]", history[:, 0], "target[:, 0]", target[:, 0])  # windows and variables
    checks.not_negative(trend_weight=trend_weight)
    with torch.random.fork_rng(devices=[]):  # first weights that are overwritten use up no random numbers
        model = DLinear(history.shape[1], target.shape[1], kernel_size).double()
    sizes = [model.history, 1, model.history, 1]  # of t, 1, s, 1

    # All that least squares needs of the rows [t, 1, s, 1, y] is R of their QR factors: piece by piece, to save memory.
    triangle = torch.empty(0, sum(sizes) + model.horizon, dtype=torch.float64)
    for x, y in zip(history.split(2048), target.split(2048), strict=True):
        trend, seasonal = (part.mT.flatten(0, 1) for part in decompose(x.cpu().double(), kernel_size))
        one = torch.ones(len(trend), 1, dtype=torch.float64)
        rows = torch.cat([trend, one, seasonal, one, y.cpu().double().mT.flatten(0, 1)], dim=1)
        triangle = torch.linalg.qr(torch.cat([triangle, rows]), mode="r").R
    trend_only = triangle.clone()
    trend_only[:, model.history + 1 : sum(sizes)] = 0
    features, answers = torch.cat([triangle, trend_weight**0.5 * trend_only]).split([sum(sizes), model.horizon], dim=1)
    solution = torch.linalg.lstsq(features, answers, driver="gelsd").solution  # [feature, horizon], of least norm

    with torch.no_grad():
        for parameter, part in zip(model.parameters(), solution.split(sizes), strict=True):
            parameter.copy_(part.mT.reshape(parameter.shape))
    return model

"""TimesNet: find the periods of a series, fold it by each of them into a plane, convolve there, add the planes up.

Sources: the documented system "TimesNet"; Wu et al., "TimesNet: Temporal 2D-Variation Modeling for General Time Series
Analysis", 2023.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks, workers
from mini_impl.forecasting.forecaster import Forecaster
from mini_impl.forecasting.layers import Dropout, denormalise, normalise, sinusoids
from mini_impl.losses import LossTerms


def dominant_periods(series: Tensor, k: int, per_window: bool = False) -> tuple[Tensor, Tensor]:
    """The k strongest frequencies of a series: their periods, and how strong each is in each window.

    series: [batch, time, variable]. k: at most time // 2, the number of frequencies.
    A frequency f is f cycles in `time` steps; its period is floor(time / f), as in public code (the paper rounds up).
    Its amplitude is |rfft|, the mean over variables. Which k are strongest is decided by the mean over the batch too,
    or, per_window, by each window alone.
    Returns (periods, amplitudes [batch, k]), strongest first; periods: whole numbers [k] or, per_window, [batch, k].
    Amplitudes carry a gradient, the choice does not. Raises TypeError, ValueError.
    Source: documented TimesBlock, step 1; the paper, equations 1 and 2; the mean over the batch: its public code.
    """
    checks.look(checks.finite("series", checks.tensor("series", series, "batch", "time", "variable")))
    checks.flags(per_window=per_window)
    k = checks.integer("k", k, most=series.shape[1] // 2, why=f"the frequencies of {series.shape[1]} time steps")
    exact = series if series.dtype.itemsize >= 4 else series.float()  # no Fourier transform in half precision
    periods, amplitudes = _strongest(exact, k, per_window)
    checks.look(checks.finite("the amplitudes of series", amplitudes))
    return periods, amplitudes.to(series.dtype)


def _strongest(series: Tensor, k: int, per_window: bool) -> tuple[Tensor, Tensor]:
    """dominant_periods unchecked: features that are NaN, as when training diverges, are for the loss to name."""
    batch, time, _ = series.shape
    amplitude = torch.fft.rfft(series, dim=1).abs().mean(2)[:, 1:]  # [batch, frequency], without 0, the mean
    strength = amplitude if per_window else workers.batch_mean(amplitude)  # [batch, frequency] or [frequency]
    strongest = strength.topk(k).indices  # [batch, k] or [k]
    return time // (strongest + 1), amplitude.gather(1, strongest.expand(batch, k))


def fold(series: Tensor, period: int) -> Tensor:
    """[batch, time, width] -> [batch, width, row, column]: one period a row, zeros after the end of the last one.

    Source: documented TimesBlock, step 1; the paper, equation 3.
    """
    missing = -series.shape[1] % period
    if missing:  # without, the plane is a view of the series
        series = F.pad(series, (0, 0, 0, missing))
    return series.unflatten(1, (-1, period)).permute(0, 3, 1, 2)  # convolutions take width as last in memory


def unfold(plane: Tensor, time: int) -> Tensor:
    """[batch, width, row, column] -> [batch, time, width]: fold undone, the zeros after the end cut off."""
    return plane.permute(0, 2, 3, 1).flatten(1, 2)[:, :time]


class Inception(nn.Module):
    """The mean of convolutions with kernels of 1, 3, 5, .. entries, computed as one convolution.

    shape: "within" convolves along a row, within a period; "across" along a column, from period to period: the
    documented one-dimensional kernels. "inception" has square kernels, as in the paper.
    Convolving is linear in the kernel, so that the mean of the results is the result of the mean kernel, each padded
    with zeros to the largest.
    """

    def __init__(self, inputs: int, outputs: int, kernels: int, shape: str):
        super().__init__()
        checks.choice("convolution", shape, ("within", "across", "inception"))
        (kernels,) = checks.integers(kernels=kernels)
        sizes = range(1, 2 * kernels, 2)
        extents = {"within": lambda s: (1, s), "across": lambda s: (s, 1), "inception": lambda s: (s, s)}[shape]
        self.kernels = nn.ModuleList(nn.Conv2d(inputs, outputs, extents(size), padding="same") for size in sizes)
        for kernel in self.kernels:
            nn.init.kaiming_normal_(kernel.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(kernel.bias)

    def forward(self, plane: Tensor) -> Tensor:
        """[batch, inputs, row, column] -> [batch, outputs, row, column]."""
        return convolve(plane, *self.merged())

    def merged(self) -> tuple[Tensor, Tensor]:
        """The one kernel [outputs, inputs, height, width] and its bias [outputs]."""
        height, width = self.kernels[-1].kernel_size
        total = 0
        for kernel in self.kernels:
            down, right = (height - kernel.kernel_size[0]) // 2, (width - kernel.kernel_size[1]) // 2
            total = total + F.pad(kernel.weight, (right, right, down, down))  # [outputs, inputs, height, width]
        bias = torch.stack([kernel.bias for kernel in self.kernels]).mean(0)
        return total / len(self.kernels), bias


def convolve(plane: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """The convolution that keeps the plane's size, without the entries of the kernel that would only meet padding.

    plane: [batch, inputs, row, column]. kernel: [outputs, inputs, height, width], both odd. bias: [outputs].
    On r rows only the middle 2r - 1 rows of the kernel reach one row from another; so for columns.
    """
    for axis in (2, 3):
        extra = max(0, kernel.shape[axis] - (2 * plane.shape[axis] - 1)) // 2
        kernel = kernel.narrow(axis, extra, kernel.shape[axis] - 2 * extra)
    return F.conv2d(plane, kernel, bias, padding=(kernel.shape[2] // 2, kernel.shape[3] // 2))


def one_branch(features: Tensor, period: int, widen: tuple[Tensor, Tensor], narrow: tuple[Tensor, Tensor]) -> Tensor:
    """What one period contributes, [batch, time, width] -> the same: fold, convolve, fold back.

    widen, narrow: kernel and bias of the two convolutions, as Inception.merged returns them.
    Source: documented TimesBlock, steps 1 to 3.
    """
    plane = fold(features, period)  # 1. [batch, width, row, column]
    plane = convolve(F.gelu(convolve(plane, *widen)), *narrow)  # 2. [batch, width, row, column]
    return unfold(plane, features.shape[1])  # 3.


def windows_by_period(periods: Tensor) -> list[tuple[int, list[int]]]:
    """[(period, the windows that have it)], the shortest first; all that a block reads from the device.

    periods: whole numbers [batch, k]; 0 stands for none.
    """
    windows: dict[int, list[int]] = {}
    for window, its_periods in enumerate(periods.tolist()):
        for period in set(its_periods) - {0}:
            windows.setdefault(period, []).append(window)
    return sorted(windows.items())


class TimesBlock(nn.Module):
    """Features [batch, time, width] -> their weighted sum over the k periods, and the k branches themselves.

    Returns (sum [batch, time, width], branches [batch, k, time, width] or None unless asked for).
    Source: documented TimesBlock, steps 1 to 4.
    """

    def __init__(self, width: int, hidden: int, top_k: int, kernels: int, convolution: str, per_window: bool):
        super().__init__()
        self.top_k, self.per_window = top_k, per_window
        self.widen = Inception(width, hidden, kernels, convolution)
        self.narrow = Inception(hidden, width, kernels, convolution)

    @torch._disable_dynamo  # the shapes of the planes are in the data; torch.compile looks at what is around the block
    def forward(self, features: Tensor, return_branches: bool = False) -> tuple[Tensor, Tensor | None]:
        periods, amplitudes = _strongest(features, self.top_k, self.per_window)  # 1. [k] or [batch, k]; [batch, k]
        periods = periods.expand_as(amplitudes)  # [batch, k]
        weights = amplitudes.softmax(-1)  # 4. [batch, k]
        # A weight this small changes no sum, but its gradient, or the square of it, is denormal: Adam is then ten times
        # slower.
        weights = weights.masked_fill(weights < torch.finfo(weights.dtype).eps ** 2, 0)
        widen, narrow = self.widen.merged(), self.narrow.merged()
        total = torch.zeros_like(features)
        branches = features.new_zeros(*weights.shape, *features.shape[1:]) if return_branches else None
        counting = periods if return_branches else periods.where(weights != 0, 0)
        for period, windows in windows_by_period(counting):  # equal periods are folded once
            if len(windows) == len(features):
                branch = one_branch(features, period, widen, narrow)  # 1. to 3. [batch, time, width]
            else:
                index = torch.tensor(windows, device=features.device)
                branch = one_branch(features[index], period, widen, narrow)  # [some windows, time, width]
                branch = torch.zeros_like(features).index_copy(0, index, branch)  # [batch, time, width]
            chosen = periods == period  # [batch, k]
            share = (weights * chosen).sum(1)  # [batch]
            total = total + share[:, None, None] * branch  # 4., the weighted sum
            if return_branches:
                branches = torch.where(chosen[..., None, None], branch[:, None], branches)
        return total, branches


class Output(NamedTuple):
    """What TimesNet returns."""

    prediction: Tensor  # [batch, horizon, variable]
    # [batch, horizon, k, width], the last block's branches before they are weighted, if return_frequency_features
    frequency_features: Tensor | None = None


class TimesNet(Forecaster):
    """Embed the series, extend it to the horizon, refine it by blocks that work on its periods, read the forecast off.

    history, horizon: how many steps it sees and forecasts (elsewhere: seq_len, pred_len). variables: how many series
    there are. top_k: k, how many periods, at most (history + horizon) // 2. width: of the deep features;
    feed_forward_width: between the two convolutions of a block; layers: blocks (elsewhere: d_model, d_ff, e_layers).
    kernels: sizes 1, 3, .., 2 kernels - 1. convolution: as Inception's shape.
    per_window: each window has periods of its own, so that its forecast does not depend on the rest of the batch, as
    it does in the published form. return_frequency_features: fill Output.frequency_features.
    model(history [batch, history, variable]) -> Output. Raises TypeError, ValueError.
    Source: documented steps 1 to 3. What the text leaves out (each window on its own scale, positions, the linear
    extension, a second convolution after GELU, the residual sum with its normalisation) as in the paper and its public
    code, without the latter's calendar features.
    """

    documented_needs: ClassVar[dict] = {"return_frequency_features": True}

    def __init__(
        self,
        history: int,
        horizon: int,
        variables: int,
        top_k: int = 5,
        width: int = 16,
        feed_forward_width: int = 32,
        layers: int = 2,
        kernels: int = 6,
        convolution: str = "within",
        dropout: float = 0.1,
        per_window: bool = False,
        return_frequency_features: bool = False,
    ):
        super().__init__()
        history, horizon, variables = checks.integers(history=history, horizon=horizon, variables=variables)
        width, layers = checks.integers(width=width, layers=layers)
        (feed_forward_width,) = checks.integers(feed_forward_width=feed_forward_width)
        time = history + horizon
        top_k = checks.integer(
            "top_k", top_k, most=time // 2, why=f"the frequencies of history + horizon, {time} steps"
        )
        checks.flags(per_window=per_window, return_frequency_features=return_frequency_features)
        self.history, self.horizon, self.return_frequency_features = history, horizon, return_frequency_features
        self.embedding = nn.Conv1d(variables, width, kernel_size=3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.embedding.weight, nonlinearity="leaky_relu")
        self.dropout = Dropout(dropout)
        self.extension = nn.Linear(history, time)
        self.blocks = nn.ModuleList(
            TimesBlock(width, feed_forward_width, top_k, kernels, convolution, per_window) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, variables)

    def forward(self, history: Tensor) -> Output:
        checks.history(history, self.history, self.projection.weight, variables=self.projection.out_features)
        scaled, mean, std = normalise(history)  # [batch, time, variable]
        features = self.embedding(scaled.mT).mT  # [batch, time, width]
        features = features + sinusoids(*features.shape[1:], features.dtype, features.device)
        features = self.extension(self.dropout(features).mT).mT.contiguous()  # [batch, history + horizon, width]
        for block in self.blocks:
            wanted = self.return_frequency_features and block is self.blocks[-1]
            total, branches = block(features, return_branches=wanted)
            features = self.norm(features + total)  # [batch, history + horizon, width]
        forecast = self.projection(features[:, self.history :])  # [batch, horizon, variable]
        return Output(
            prediction=denormalise(forecast, mean, std),
            frequency_features=branches if branches is None else branches[:, :, self.history :].transpose(1, 2),
        )


def documented_loss(
    output: Output, target: Tensor, forecast_weight: float = 1.0, smoothness_weight: float = 0.5
) -> LossTerms:
    """L = 1/L sum_t (alpha ||y_t - yhat_t||^2 + beta ||F_t - F_{t-1}||_F^2), the mean over the batch.

    L: the horizon; the second sum begins at t = 2. The norms run over variables, and over periods and features.
    output: of a TimesNet made with return_frequency_features=True; F is output.frequency_features.
    target: y, [batch, horizon, variable]. forecast_weight: alpha; smoothness_weight: beta; both at least 0.
    Terms: "forecast" and "smoothness". Raises TypeError, ValueError. Source: the documented loss.
    """
    axes = ("batch", "horizon", "period", "feature")
    checks.forecast(output, target, frequency_features=(axes, "return_frequency_features"))
    features = output.frequency_features
    checks.alike("output.frequency_features[..., 0, 0]", features[..., 0, 0], "target[..., 0]", target[..., 0])
    checks.not_negative(forecast_weight=forecast_weight, smoothness_weight=smoothness_weight)
    windows_and_steps = target.shape[0] * target.shape[1]
    change = features.diff(dim=1)  # [batch, horizon - 1, k, width]
    return LossTerms.of(
        forecast=forecast_weight * F.mse_loss(output.prediction, target, reduction="sum") / windows_and_steps,
        smoothness=smoothness_weight * change.square().sum() / windows_and_steps,
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and variables.

    output: of TimesNet. target: y, [batch, horizon, variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper's public code.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))

"""Forecasts that need no training: what every model has to beat."""

from torch import Tensor

from mini_impl import checks


def repeat_last(history: Tensor, horizon: int) -> Tensor:
    """The last value of history [batch, time, variable], again and again: [batch, horizon, variable].

    ŷ_{T+h} = x_T for h = 1..horizon; "Repeat" in the tables of the literature, a random walk's best forecast.
    Raises TypeError, ValueError.
    """
    return repeat_season(history, horizon, period=1)


def repeat_season(history: Tensor, horizon: int, period: int) -> Tensor:
    """The last `period` steps of history [batch, time, variable], again and again: [batch, horizon, variable].

    ŷ_{T+h} = x_{T-period+1+(h-1) mod period}: tomorrow at eight is today at eight, with hours and a period of 24; the
    "seasonal naive" forecast. Raises TypeError; ValueError, also for a period longer than the history.
    """
    checks.look(checks.finite("history", checks.tensor("history", history, "batch", "time", "variable")))
    (horizon,) = checks.integers(horizon=horizon)
    period = checks.integer("period", period, most=history.shape[1], why="the time steps of history")
    season = history[:, history.shape[1] - period :]  # [batch, period, variable]
    return season.repeat(1, -(-horizon // period), 1)[:, :horizon]

"""Forecasts that need no training: what every model has to beat."""

import torch
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
    checks.tensor("history", history, "batch", "time", "variable")
    steps = torch.arange(checks.integer("horizon", horizon), device=history.device)
    if checks.integer("period", period) > history.shape[1]:
        raise ValueError(f"period must be at most the {history.shape[1]} time steps of history; got {period}")
    return history[:, history.shape[1] - period + steps % period]

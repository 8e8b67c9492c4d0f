"""The forecasts that need no training, against a loop that takes one step after the other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl.forecasting.baselines import repeat_last, repeat_season


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(1, 20), st.data())
def test_each_step_is_the_value_whole_periods_before(batch, time, variables, horizon, data):
    period = data.draw(st.integers(1, time))
    history = torch.randn(batch, time, variables, dtype=torch.float64)
    known = history.clone()
    for _ in range(horizon):  # one step after the other: y_t = y_{t - period}
        known = torch.cat([known, known[:, -period].unsqueeze(1)], dim=1)
    assert torch.equal(repeat_season(history, horizon, period), known[:, time:])
    assert torch.equal(repeat_last(history, horizon), history[:, -1:].expand(-1, horizon, -1))


def test_a_wave_of_that_period_is_forecast_without_error():
    time = torch.arange(240.0, dtype=torch.float64)
    wave = torch.sin(2 * torch.pi * time / 24).reshape(1, -1, 1)
    assert torch.allclose(repeat_season(wave[:, :100], horizon=140, period=24), wave[:, 100:], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"period": 5}, ValueError, "period must be at most 4, the time steps of history; got 5"),
        ({"period": 0}, ValueError, "period must be at least 1"),
        ({"period": 2.0}, TypeError, "period must be a whole number"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1"),
        ({"history": torch.zeros(4, 1)}, ValueError, r"history .*\[batch, time, variable\].*shape \[4, 1\]"),
        ({"history": torch.zeros(1, 4, 1, dtype=torch.int64)}, TypeError, "floating-point"),
        ({"history": torch.full((1, 4, 1), torch.nan)}, ValueError, "4 of its 4 are NaN"),
    ],
)
def test_wrong_arguments_are_named(change, error, words):
    arguments = {"history": torch.zeros(1, 4, 1), "horizon": 3, "period": 2} | change
    with pytest.raises(error, match=words):
        repeat_season(**arguments)

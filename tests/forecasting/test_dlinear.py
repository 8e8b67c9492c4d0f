"""DLinear: by hand, in closed form, against float64 arithmetic written apart, and against another implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl.forecasting.dlinear import DLinear, Output, closed_form, decompose, documented_loss, published_loss
from mini_impl.forecasting.layers import half_weighted, moving_average, weighted_average
from mini_impl.losses import NonFiniteLoss
from tests.tensors import random, same

GOLDEN = Path(__file__).parents[1] / "golden" / "dlinear.json"


def averaging_matrix(time, size):
    """A with trend = A x, entry by entry from the definition: each step averages itself and its neighbours."""
    matrix = np.zeros((time, time))
    for step in range(time):
        for offset in range(-(size // 2), size // 2 + 1):
            matrix[step, min(max(step + offset, 0), time - 1)] += 1 / size
    return matrix


# --- decompose --------------------------------------------------------------------------------------------------------


def test_moving_average_by_hand():
    series = torch.tensor([3.0, 6.0, 0.0, 9.0]).view(1, 4, 1)
    trend, seasonal = decompose(series, 3)
    # edges repeat: (3+3+6)/3, (3+6+0)/3, (6+0+9)/3, (0+9+9)/3
    torch.testing.assert_close(trend.flatten(), torch.tensor([4.0, 3.0, 5.0, 6.0]))
    torch.testing.assert_close(seasonal.flatten(), torch.tensor([-1.0, 3.0, -5.0, 3.0]))


sizes = st.integers(1, 40).flatmap(lambda time: st.tuples(st.just(time), st.integers(0, (time - 1) // 2)))


@given(sizes, st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_decompose_is_the_averaging_matrix_and_adds_up(size, batch, variables, seed):
    time, half = size
    series = random(batch, time, variables, seed=seed)
    trend, seasonal = decompose(series, 2 * half + 1)
    expected = torch.from_numpy(averaging_matrix(time, 2 * half + 1)) @ series
    same(trend, expected)
    torch.testing.assert_close(trend + seasonal, series, rtol=0, atol=1e-12)


@given(st.integers(1, 20), st.floats(-1e6, 1e6))
def test_a_constant_is_all_trend(half, level):
    series = torch.full((1, 2 * half + 5, 1), level, dtype=torch.float64)
    _, seasonal = decompose(series, 2 * half + 1)
    assert seasonal.abs().max() <= 1e-9 * (1 + abs(level))


@pytest.mark.parametrize("period", [2, 6, 24])
def test_half_weighted_average_removes_its_period_and_keeps_a_line(period):
    steps = torch.arange(5 * period, dtype=torch.float64)
    inside = slice(period, -period)  # away from the repeated edges
    wave = random(period).repeat(5)
    weights = half_weighted(period)
    assert weights.sum() == pytest.approx(1)
    level = weighted_average(wave.view(1, -1, 1), weights).flatten()[inside]
    torch.testing.assert_close(level, torch.full_like(level, wave[:period].mean().item()))
    line = weighted_average(steps.view(1, -1, 1), weights).flatten()[inside]
    torch.testing.assert_close(line, steps[inside])


@given(sizes, st.integers(0, 10**6))
def test_equal_weights_are_the_moving_average(size, seed):
    time, half = size
    series, size = random(2, time, 2, seed=seed), 2 * half + 1
    equal = weighted_average(series, torch.full((size,), 1 / size, dtype=torch.float64))
    torch.testing.assert_close(equal, moving_average(series, size), rtol=0, atol=1e-12)


def test_frequency_response_of_the_box():
    for size, period in [(25, 24), (25, 168), (7, 24), (23, 24)]:
        offsets = np.arange(size) - size // 2
        expected = np.cos(2 * np.pi * offsets / period).mean()
        wave = torch.cos(2 * np.pi * torch.arange(480, dtype=torch.float64) / period).view(1, -1, 1)
        got = moving_average(wave, size).flatten()
        torch.testing.assert_close(got[48:-48], expected * wave.flatten()[48:-48], rtol=0, atol=1e-12)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_model_is_one_matrix():
    model = DLinear(history=48, horizon=12, kernel_size=7).double()
    average = torch.from_numpy(averaging_matrix(48, 7))
    trend, seasonal = model.trend.weight, model.seasonal.weight
    matrix = seasonal @ (torch.eye(48) - average) + trend @ average  # [horizon, time]
    history = random(5, 48, 3)
    expected = matrix @ history + (model.trend.bias + model.seasonal.bias)[:, None]
    output = model(history)
    torch.testing.assert_close(output.prediction, expected)
    torch.testing.assert_close(output.trend, trend @ (average @ history) + model.trend.bias[:, None])


def test_only_constants_are_lost_on_the_seasonal_branch():
    for time, size in [(96, 25), (30, 3), (50, 49)]:
        rest = np.eye(time) - averaging_matrix(time, size)
        singular = np.linalg.svd(rest, compute_uv=False)
        assert singular[-1] < 1e-12 < 1e-4 < singular[-2]
        assert np.abs(rest @ np.ones(time)).max() < 1e-12


def test_parity_with_another_implementation():
    """Golden numbers made by tests/golden/make_dlinear.py from neuralforecast's DLinear with the same weights."""
    for case in json.loads(GOLDEN.read_text())["cases"]:
        model = DLinear(case["history"], case["horizon"], case["kernel_size"]).double()
        model.load_state_dict({name: torch.tensor(value).double() for name, value in case["weights"].items()})
        prediction = model(torch.tensor(case["input"], dtype=torch.float64)).prediction
        torch.testing.assert_close(prediction, torch.tensor(case["prediction"]).double(), rtol=0, atol=2e-6)


# --- the losses -------------------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    target = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])  # two windows, two steps, one variable
    output = Output(prediction=target + 1, trend=target - 3)
    loss = documented_loss(output, target, trend_weight=0.5)
    # 1/(2*2) * 4 * 1^2 = 1;  0.5/(2*2) * 4 * 3^2 = 4.5
    assert {name: value.item() for name, value in loss.terms.items()} == {"forecast": 1.0, "trend": 4.5}
    assert loss.total.item() == 5.5


outputs = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.floats(0, 100), st.integers(0, 10**6))


@given(outputs)
def test_losses_against_numpy(case):
    windows, horizon, variables, weight, seed = case
    prediction, trend, target = random(3, windows, horizon, variables, seed=seed)
    p, t, y = prediction.numpy(), trend.numpy(), target.numpy()
    loss = documented_loss(Output(prediction, trend), target, weight)
    forecast = sum(np.linalg.norm(y[i] - p[i]) ** 2 for i in range(windows)) / (2 * windows)
    branch = weight * sum(np.linalg.norm(y[i] - t[i]) ** 2 for i in range(windows)) / (2 * windows)
    assert loss.values() == pytest.approx({"forecast": forecast, "trend": branch}, rel=1e-12, abs=1e-15)
    published = published_loss(Output(prediction, trend), target).total.item()
    assert published == pytest.approx(((y - p) ** 2).mean(), rel=1e-12)
    # half the horizon times the variables is all that tells the first term from the published loss
    assert forecast == pytest.approx(horizon * variables / 2 * published, rel=1e-12)


def test_gradients():
    prediction, trend, target = random(3, 2, 3, 2)
    parts = prediction.requires_grad_(), trend.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: documented_loss(Output(p, t), target, 0.7).total, parts)
    assert torch.autograd.gradcheck(lambda p: published_loss(Output(p, p), target).total, parts[:1])


def test_gradients_of_both_weight_matrices_as_derived():
    model, weight = DLinear(history=20, horizon=4, kernel_size=5).double(), 0.7
    history, target = random(6, 20, 3), random(6, 4, 3, seed=1)
    output = model(history)
    documented_loss(output, target, weight).total.backward()
    trend, seasonal = decompose(history, 5)
    windows = len(history)
    error, branch_error = (target - output.prediction).detach(), (target - output.trend).detach()
    of_seasonal = -torch.einsum("nhv,ntv->ht", error, seasonal) / windows
    of_trend = -torch.einsum("nhv,ntv->ht", error + weight * branch_error, trend) / windows
    torch.testing.assert_close(model.seasonal.weight.grad, of_seasonal)
    torch.testing.assert_close(model.trend.weight.grad, of_trend)
    torch.testing.assert_close(model.trend.bias.grad, -(error + weight * branch_error).sum((0, 2)) / windows)


# --- the closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("windows", [3, 200])  # fewer rows than weights: many exact solutions; more: least squares
def test_closed_form_is_a_minimum(windows, weight):
    history, target = random(windows, 20, 2), random(windows, 4, 2, seed=1)
    model = closed_form(history, target, kernel_size=5, trend_weight=weight)
    loss = documented_loss(model(history), target, weight)
    loss.total.backward()
    for parameter in model.parameters():  # the loss is convex, so that a zero gradient is a global minimum
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-8
    if windows == 3:
        assert loss.total < 1e-12


def test_closed_form_against_the_pseudo_inverse():
    history, target, weight = random(60, 10, 2), random(60, 3, 2, seed=1), 0.4
    average = averaging_matrix(10, 3)
    x = history.numpy().transpose(0, 2, 1).reshape(-1, 10)
    y = target.numpy().transpose(0, 2, 1).reshape(-1, 3)
    trend, one = x @ average.T, np.ones((len(x), 1))
    nothing = np.zeros((len(x), 11))
    rows = np.vstack([np.hstack([trend, one, x - trend, one]), weight**0.5 * np.hstack([trend, one, nothing])])
    solution = np.linalg.pinv(rows) @ np.vstack([y, weight**0.5 * y])  # of least norm
    model = closed_form(history, target, kernel_size=3, trend_weight=weight)
    parts = (
        solution[:10].T,
        solution[10],
        solution[11:21].T,
        solution[21],
    )  # weight and bias of the trend, of the season
    for parameter, expected in zip(model.parameters(), parts, strict=True):
        np.testing.assert_allclose(parameter.detach(), expected, atol=1e-10)


def test_closed_form_in_pieces_is_the_whole():
    history, target = random(5000, 8, 1), random(5000, 2, 1, seed=1)  # more windows than one piece holds
    model = closed_form(history, target, kernel_size=3, trend_weight=1.0)
    documented_loss(model(history), target, 1.0).total.backward()
    assert max(parameter.grad.abs().max() for parameter in model.parameters()) < 1e-10


@pytest.mark.parametrize(("time", "size", "lost"), [(16, 5, 0), (24, 9, 4)])
def test_what_the_trend_weight_moves(time, size, lost):
    """Nothing if the average loses nothing; else, of every row of the one matrix, a single direction."""
    average = torch.from_numpy(averaging_matrix(time, size))
    assert time - torch.linalg.matrix_rank(average, rtol=1e-10) == lost
    history, target = random(400, time, 2), random(400, 3, 2, seed=1)
    matrices = []
    for weight in [0.0, 1000.0]:
        model = closed_form(history, target, kernel_size=size, trend_weight=weight)
        matrices.append((model.seasonal.weight @ (torch.eye(time) - average) + model.trend.weight @ average).detach())
    moved = matrices[1] - matrices[0]  # [horizon, time]
    if not lost:
        assert moved.abs().max() < 1e-9
    else:
        assert moved.abs().max() > 1e-4
        # Lagrange: with the row sums given, the gradient by the matrix lies along the constants
        centred = history - history.mean(0, keepdim=True).mean(2, keepdim=True)
        gradient = moved @ torch.einsum("ntv,nsv->ts", centred, centred)
        torch.testing.assert_close(gradient, gradient.mean(1, keepdim=True).expand_as(gradient), rtol=1e-6, atol=1e-8)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 10, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: decompose(GOOD, 4), ValueError, "kernel_size must be odd.*got 4"),
        (lambda: decompose(GOOD, 11), ValueError, "kernel_size must be odd, .* at most 9, as .*got 11"),
        (lambda: decompose(GOOD[0], 3), ValueError, r"series.*\[batch, time, variable\].*got shape \[10, 3\]"),
        (lambda: decompose(GOOD / 0, 3), ValueError, "series.*60 of its 60 are NaN"),
        (lambda: half_weighted(7), ValueError, "period must be a multiple of 2; got 7"),
        (
            lambda: weighted_average(GOOD, torch.ones(11)),
            ValueError,
            "number of weights must be odd, .* at most 9, as .*got 11",
        ),
        (lambda: weighted_average(GOOD, [1.0]), TypeError, r"weights must be a floating-point tensor.*got list"),
        (lambda: weighted_average(GOOD, torch.ones(1) / 0), ValueError, "weights must hold finite numbers only"),
        (lambda: DLinear(history=20, horizon=3), ValueError, "kernel_size must be odd, .* at most 19, as .*got 25"),
        (lambda: documented_loss(Output(GOOD, GOOD[:1]), GOOD), ValueError, "output.trend and target"),
        (lambda: documented_loss(Output(GOOD, GOOD / 0), GOOD).values(), NonFiniteLoss, "term 'trend'.*nan"),
        (lambda: closed_form(GOOD.tolist(), GOOD, 5), TypeError, "history must be a floating-point tensor.*got list"),
        (lambda: closed_form(GOOD / 0, GOOD, 5), ValueError, "history must hold finite numbers"),
        (lambda: closed_form(GOOD, GOOD / 0, 5), ValueError, "target must hold finite numbers"),
        (lambda: closed_form(GOOD, GOOD[:1], 5), ValueError, r"history\[:, 0\] and target\[:, 0\] must have one shape"),
        (lambda: closed_form(GOOD, GOOD[:, :, :1], 5), ValueError, r"one shape; got \[2, 3\] and \[2, 1\]"),
        (lambda: closed_form(GOOD, GOOD, 5, -1), ValueError, "trend_weight"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


# --- another low-pass filter ------------------------------------------------------------------------------------------


def test_equal_weights_make_the_model_of_the_moving_average():
    history = random(2, 30, 3)
    torch.manual_seed(0)
    plain = DLinear(30, 4, kernel_size=5).double()
    torch.manual_seed(0)
    weighted = DLinear(30, 4, weights=[1 / 5] * 5).double()
    torch.testing.assert_close(plain(history), weighted(history))


def test_the_average_over_a_day_leaves_no_daily_wave_in_the_trend():
    """Away from the edges: there T holds only what repeated values add."""
    model = DLinear(96, 4, weights=half_weighted(24)).double()
    with torch.no_grad():
        model.trend.weight.zero_()
        model.trend.bias.zero_()
        model.trend.weight[:, 48] = 1  # the trend branch tells the middle of the trend
    wave = torch.sin(2 * torch.pi * torch.arange(96.0, dtype=torch.float64) / 24)[None, :, None]
    assert model(wave).trend.abs().max() < 1e-12
    assert DLinear(96, 4, weights=half_weighted(24)).settings["weights"] == tuple(half_weighted(24).tolist())


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        (
            [0.5, 0.5],
            ValueError,
            "weights must be odd, .* and at most 9, as there are 10 time steps; got 2",
        ),
        ([0.1] * 11, ValueError, "the number of weights must be odd, .* at most 9"),
        ([math.nan], ValueError, "each of the weights must be a finite number; got nan"),
        (1, TypeError, "weights must be several numbers that add up to 1; got 1"),
        ("111", TypeError, "weights must be several numbers that add up to 1; got '111'"),
        ([1, 2, 1], ValueError, "add up to 1; the sum of these is 4"),
        ([0, 0, 0], ValueError, "add up to 1; the sum of these is 0"),
    ],
)
def test_weights_that_are_no_filter(weights, error, says):
    with pytest.raises(error, match=says):
        DLinear(10, 2, weights=weights)

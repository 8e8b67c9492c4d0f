"""TimesNet: by hand, against float64 arithmetic written from the equations, and against another implementation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from mini_impl.forecasting.data import load_auckland
from mini_impl.forecasting.layers import normalise
from mini_impl.forecasting.timesnet import (
    Inception,
    Output,
    TimesBlock,
    TimesNet,
    convolve,
    documented_loss,
    dominant_periods,
    fold,
    one_branch,
    published_loss,
    unfold,
)
from mini_impl.losses import NonFiniteLoss
from tests.forecasting.by_numpy import Parts, gelu, gradients_as_finite_differences, positions
from tests.tensors import random

GOLDEN = Path(__file__).parents[1] / "golden" / "timesnet.json"
SHAPES = ["within", "across", "inception"]
seeds = st.integers(0, 10**6)


def small(seed=0, **changes):
    """A little TimesNet in float64 without dropout, its biases not zero."""
    settings = {"history": 12, "horizon": 6, "variables": 2, "top_k": 3, "width": 4, "feed_forward_width": 3}
    settings |= {"layers": 2, "kernels": 2, "dropout": 0.0, "return_frequency_features": True}
    torch.manual_seed(seed)
    model = TimesNet(**settings | changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.3)
    return model.double()


# --- the paper's equations, with numpy alone --------------------------------------------------------------------------


def amplitudes_by_definition(series):
    """|sum_t x_t e^{-2 pi i f t / time}| for f = 1 .. time // 2, the mean over the last axis: [batch, frequency]."""
    time = series.shape[1]
    angles = 2 * np.pi * np.outer(np.arange(1, time // 2 + 1), np.arange(time)) / time
    real = np.einsum("ft,btv->bfv", np.cos(angles), series)
    imaginary = np.einsum("ft,btv->bfv", np.sin(angles), series)
    return np.sqrt(real**2 + imaginary**2).mean(2)


def convolve_by_definition(plane, kernel, bias):
    """out[o, r, c] = bias[o] + sum kernel[o, i, u, v] plane[i, r + u - middle, c + v - middle], 0 beyond the plane."""
    (rows, columns), (height, width) = plane.shape[2:], kernel.shape[2:]
    padded = np.pad(plane, ((0, 0), (0, 0), (height // 2, height // 2), (width // 2, width // 2)))
    result = np.zeros((len(plane), len(kernel), rows, columns)) + bias[:, None, None]
    for u in range(height):
        for v in range(width):
            result += np.einsum("oi,birc->borc", kernel[:, :, u, v], padded[:, :, u : u + rows, v : v + columns])
    return result


def inception_by_definition(plane, inception):
    """The mean of the separate convolutions."""
    parts = [(kernel.weight.detach().numpy(), kernel.bias.detach().numpy()) for kernel in inception.kernels]
    return sum(convolve_by_definition(plane, *part) for part in parts) / len(parts)


def block_by_definition(features, block, k):
    """(sum_i w_i X_i, the X_i [batch, k, time, width]), each of the k periods by itself, the equal ones too."""
    batch, time, width = features.shape
    amplitudes = amplitudes_by_definition(features)
    strongest = np.argsort(-amplitudes.mean(0))[:k]
    weights = np.exp(amplitudes[:, strongest])
    weights /= weights.sum(1, keepdims=True)
    branches = np.zeros((batch, k, time, width))
    for i, frequency in enumerate(strongest + 1):
        period = time // frequency
        rows = math.ceil(time / period)
        plane = np.zeros((batch, width, rows, period))
        for t in range(time):
            plane[:, :, t // period, t % period] = features[:, t]
        plane = inception_by_definition(gelu(inception_by_definition(plane, block.widen)), block.narrow)
        for t in range(time):
            branches[:, i, t] = plane[:, :, t // period, t % period]
    return np.einsum("bk,bktw->btw", weights, branches), branches


def model_by_definition(model, history, k):
    """The forecast and the last block's branches over the horizon, [batch, horizon, k, width]."""
    parts = Parts(model)
    mean, std = history.mean(1, keepdims=True), np.sqrt(history.var(1, keepdims=True) + 1e-5)
    scaled = (history - mean) / std
    embedding, time = parts.weights["embedding.weight"], history.shape[1]
    features = np.zeros((len(history), time, len(embedding))) + positions(time, len(embedding))
    for t in range(time):
        for j in range(3):  # circular: the step before the first is the last
            features[:, t] += scaled[:, (t + j - 1) % time] @ embedding[:, :, j].T
    features = parts.linear("extension", features.swapaxes(1, 2)).swapaxes(1, 2)
    for block in model.blocks:
        total, branches = block_by_definition(features, block, k)
        features = parts.norm("norm", features + total)
    forecast = parts.linear("projection", features)
    return forecast[:, time:] * std + mean, branches[:, :, time:].transpose(0, 2, 1, 3)


# --- dominant periods -------------------------------------------------------------------------------------------------


def wave(time, period, amplitude=1.0, phase=0.0):
    return amplitude * torch.cos(2 * math.pi * torch.arange(time, dtype=torch.float64) / period + phase)


def test_periods_of_two_sines_by_hand():
    one, other = 3 * wave(24, 8) + 5 * wave(24, 4), 2 * wave(24, 4) + 100
    periods, amplitudes = dominant_periods(torch.stack([one, other], dim=1)[None], k=2)
    assert periods.tolist() == [4, 8] and periods.dtype == torch.int64
    # a wave of amplitude a has |rfft| = a time / 2; the mean over two variables; the level, frequency 0, does not count
    torch.testing.assert_close(amplitudes, torch.tensor([[(5 + 2) / 2, 3 / 2]]).double() * 12)


def test_the_period_is_rounded_down():
    for time, cycles, period in ((10, 3, 3), (11, 4, 2)):
        assert dominant_periods(wave(time, time / cycles).view(1, time, 1), k=1)[0].tolist() == [period]


@given(st.data())
def test_sums_of_sines_are_found_in_the_order_of_their_amplitudes(data):
    time = data.draw(st.sampled_from([24, 36, 60, 96, 168]))
    divisors = [period for period in range(3, time + 1) if time % period == 0]
    periods = data.draw(st.lists(st.sampled_from(divisors), min_size=1, max_size=5, unique=True))
    phases = data.draw(st.lists(st.floats(0, 7), min_size=len(periods), max_size=len(periods)))
    sizes = [len(periods) - i + 0.5 for i in range(len(periods))]  # falling
    series = sum(wave(time, *parts) for parts in zip(periods, sizes, phases, strict=True)).view(1, time, 1)
    found, amplitudes = dominant_periods(series, k=len(periods))
    assert found.tolist() == periods
    torch.testing.assert_close(amplitudes, torch.tensor([sizes]).double() * time / 2)


cases = st.tuples(st.integers(1, 4), st.integers(2, 25), st.integers(1, 3), seeds)


@given(cases, st.data())
def test_periods_and_amplitudes_against_the_definition(case, data):
    batch, time, variables, seed = case
    k = data.draw(st.integers(1, time // 2))
    series = random(batch, time, variables, seed=seed)
    expected = amplitudes_by_definition(series.numpy())
    strongest = np.argsort(-expected.mean(0))[:k]
    periods, amplitudes = dominant_periods(series, k)
    assert periods.tolist() == [time // (f + 1) for f in strongest]
    np.testing.assert_allclose(amplitudes.numpy(), expected[:, strongest], rtol=0, atol=1e-11)


@given(cases, st.data())
def test_per_window_each_window_is_as_if_alone(case, data):
    batch, time, variables, seed = case
    k = data.draw(st.integers(1, time // 2))
    series = random(batch, time, variables, seed=seed)
    periods, amplitudes = dominant_periods(series, k, per_window=True)
    assert periods.shape == amplitudes.shape == (batch, k)
    for i in range(batch):
        alone_periods, alone_amplitudes = dominant_periods(series[i : i + 1], k)
        assert periods[i].tolist() == alone_periods.tolist()
        torch.testing.assert_close(amplitudes[i : i + 1], alone_amplitudes)


def test_the_batch_decides_otherwise_than_its_windows():
    one, other = 5 * wave(24, 12) + 3 * wave(24, 8), 4 * wave(24, 4) + 3 * wave(24, 8)
    series = torch.stack([one, other])[..., None]
    assert dominant_periods(series, 1, per_window=True)[0].tolist() == [[12], [4]]
    periods, amplitudes = dominant_periods(series, 1)  # means: 12 hours 2.5, 8 hours 3, 4 hours 2
    assert periods.tolist() == [8]
    torch.testing.assert_close(amplitudes, torch.tensor([[36.0], [36.0]]).double())


@pytest.mark.parametrize("hours", [168, 336])
def test_day_and_week_are_found_in_the_embedded_series(hours):
    values = load_auckland().values
    windows = values[: len(values) // hours * hours].view(-1, hours, values.shape[1])
    periods, _ = dominant_periods(normalise(windows)[0], k=3)
    assert periods[0] == 24 and 168 in periods
    of_each, _ = dominant_periods(normalise(windows)[0], k=3, per_window=True)
    assert (of_each[:, 0] == 24).all() and 0.4 < (of_each == 168).any(1).float().mean() < 0.8


@pytest.mark.parametrize("per_window", [False, True])
def test_amplitudes_carry_the_gradient_and_the_choice_does_not(per_window):
    series = random(2, 9, 2).requires_grad_()
    periods, amplitudes = dominant_periods(series, 3, per_window)
    assert amplitudes.requires_grad and not periods.requires_grad
    assert torch.autograd.gradcheck(lambda s: dominant_periods(s, 3, per_window)[1], series)


def test_a_constant_has_amplitude_0_and_a_finite_gradient():
    series = torch.full((1, 8, 2), 7.0, dtype=torch.float64, requires_grad=True)
    _, amplitudes = dominant_periods(series, 2)
    amplitudes.sum().backward()
    assert amplitudes.abs().max() < 1e-12 and series.grad.isfinite().all()


# --- fold and unfold --------------------------------------------------------------------------------------------------


def test_fold_by_hand():
    series = torch.tensor([[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 50]])[None]  # five steps, two features
    expected = torch.tensor([[[1.0, 2, 3], [4, 5, 0]], [[10, 20, 30], [40, 50, 0]]])[None]
    assert fold(series, 3).equal(expected)
    assert unfold(expected, 5).equal(series)
    assert fold(series, 7).equal(F.pad(series.mT, (0, 2))[:, :, None])  # a period longer than the series: one row


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 3), st.integers(1, 40), seeds)
def test_unfold_undoes_fold(batch, time, width, period, seed):
    series = random(batch, time, width, seed=seed)
    plane = fold(series, period)
    rows = math.ceil(time / period)
    assert plane.shape == (batch, width, rows, period)
    assert unfold(plane, time).equal(series)
    steps = plane.permute(0, 2, 3, 1).reshape(batch, rows * period, width)
    assert steps[:, :time].equal(series) and not steps[:, time:].any()


def test_fold_copies_only_what_it_must_lengthen():
    series = random(2, 12, 3)
    assert fold(series, 4).data_ptr() == unfold(fold(series, 4), 12).data_ptr() == series.data_ptr()
    assert fold(series, 5).data_ptr() != series.data_ptr()


# --- convolutions -----------------------------------------------------------------------------------------------------


planes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from(SHAPES), seeds)


@given(planes)
def test_inception_is_the_mean_of_its_convolutions(case):
    rows, columns, kernels, shape, seed = case
    torch.manual_seed(seed)
    inception, plane = Inception(2, 3, kernels, shape).double(), random(2, 2, rows, columns, seed=seed)
    for kernel in inception.kernels:
        torch.nn.init.normal_(kernel.bias)
    plane.requires_grad_()
    parts = [plane, *inception.parameters()]
    got, ways = inception(plane), random(2, 3, rows, columns, seed=seed + 1)
    np.testing.assert_allclose(got.detach(), inception_by_definition(plane.detach().numpy(), inception), atol=1e-12)
    separate = sum(kernel(plane) for kernel in inception.kernels) / kernels
    gradients = torch.autograd.grad((got * ways).sum(), parts)
    expected = torch.autograd.grad((separate * ways).sum(), parts)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 7), st.integers(0, 7), seeds)
def test_cropping_the_kernel_changes_nothing(rows, columns, half_height, half_width, seed):
    plane, bias = random(2, 2, rows, columns, seed=seed), random(3, seed=seed)
    kernel = random(3, 2, 2 * half_height + 1, 2 * half_width + 1, seed=seed + 1)
    expected = F.conv2d(plane, kernel, bias, padding=(half_height, half_width))
    torch.testing.assert_close(convolve(plane, kernel, bias), expected, rtol=0, atol=1e-12)
    plain = convolve_by_definition(plane.numpy(), kernel.numpy(), bias.numpy())
    np.testing.assert_allclose(expected, plain, atol=1e-12)


def test_what_is_cropped_is_not_computed():
    """On 2 rows and 5 columns 3 x 9 entries of a kernel of 11 x 11 are left."""
    kernel, bias = torch.zeros(6, 4, 11, 11), torch.zeros(6)
    with FlopCounterMode(display=False) as counter:
        convolve(torch.zeros(3, 4, 2, 5), kernel, bias)
    assert counter.get_total_flops() == 2 * 3 * 6 * 4 * (2 * 5) * (3 * 9)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (1, 3), (6, 6)])
def test_gradients_of_a_convolution_with_cropped_kernel(rows, columns):
    parts = random(1, 2, rows, columns), random(2, 2, 5, 7, seed=1), random(2, seed=2)
    assert torch.autograd.gradcheck(convolve, [part.requires_grad_() for part in parts])
    # the entries that meet padding alone have no part in it
    gradient = torch.autograd.grad(convolve(*parts).square().sum(), parts[1])[0]
    for u in range(5):
        for v in range(7):
            reaches = abs(u - 2) < rows and abs(v - 3) < columns
            assert bool(gradient[:, :, u, v].any()) == reaches


@pytest.mark.parametrize(
    ("shape", "separate", "merged"),
    [
        ("inception", 1 + 9 + 25 + 49 + 81 + 121, (11, 11)),
        ("within", 1 + 3 + 5 + 7 + 9 + 11, (1, 11)),
        ("across", 1 + 3 + 5 + 7 + 9 + 11, (11, 1)),
    ],
)
def test_numbers_of_weights_and_the_extent_of_the_merged_kernel(shape, separate, merged):
    inception = Inception(16, 32, 6, shape)
    assert sum(kernel.weight.numel() for kernel in inception.kernels) == 16 * 32 * separate
    kernel, bias = inception.merged()
    assert kernel.shape == (32, 16, *merged) and bias.shape == (32,)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_weights(shape):
    """As in the paper's public code: normal, of variance 2 over the entries that one input feature has a part in."""
    torch.manual_seed(0)
    for kernel in Inception(64, 48, 3, shape).kernels:
        entries = 48 * math.prod(kernel.kernel_size)
        assert kernel.weight.std().item() == pytest.approx((2 / entries) ** 0.5, rel=0.05)
        assert not kernel.bias.any()


ONE, FIVE = slice(3, 4), slice(1, 6)


@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [("within", ONE, FIVE), ("across", FIVE, ONE), ("inception", FIVE, FIVE)]
)
def test_one_dimensional_kernels_mix_along_one_axis_only(shape, rows, columns):
    """A change at one place: "within" shows it in its row alone, "across" in its column alone; two to each side."""
    torch.manual_seed(0)
    inception, plane = Inception(1, 1, 3, shape).double(), random(1, 1, 7, 7)
    changed, reached = plane.clone(), torch.zeros(7, 7, dtype=torch.bool)
    changed[0, 0, 3, 3] += 1
    reached[rows, columns] = True
    assert ((inception(changed) - inception(plane))[0, 0].abs() > 1e-12).equal(reached)


# --- the block --------------------------------------------------------------------------------------------------------


sizes = st.tuples(st.integers(1, 3), st.integers(2, 16), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=40)
@given(sizes, st.sampled_from(SHAPES), seeds, st.data())
def test_block_against_the_definition(size, convolution, seed, data):
    """Every number of periods, up to all frequencies there are; many of those have equal periods."""
    batch, time, width, kernels = size
    k = data.draw(st.integers(1, time // 2))
    torch.manual_seed(seed)
    block = TimesBlock(width, 2, k, kernels, convolution, per_window=False).double()
    features = random(batch, time, width, seed=seed)
    total, branches = block(features, return_branches=True)
    expected_total, expected_branches = block_by_definition(features.numpy(), block, k)
    np.testing.assert_allclose(total.detach(), expected_total, atol=1e-11)
    np.testing.assert_allclose(branches.detach(), expected_branches, atol=1e-11)
    without, nothing = block(features)
    assert nothing is None and without.equal(total)


@pytest.mark.parametrize("per_window", [False, True])
def test_weights_of_equal_periods_add_up(per_window):
    torch.manual_seed(0)
    block = TimesBlock(3, 2, top_k=7, kernels=2, convolution="inception", per_window=per_window).double()
    features = random(3, 14, 3)
    periods, amplitudes = dominant_periods(features, 7, per_window)
    assert sorted(periods.view(-1, 7)[0].tolist()) == [2, 2, 2, 3, 4, 7, 14]
    total, branches = block(features, return_branches=True)
    torch.testing.assert_close(total, torch.einsum("bk,bktw->btw", amplitudes.softmax(-1), branches))
    for periods_of_one, branches_of_one in zip(periods.expand(3, 7), branches, strict=True):
        twos = branches_of_one[periods_of_one == 2]
        assert len(twos) == 3 and twos[0].equal(twos[1]) and twos[0].equal(twos[2])


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(2, 15), st.sampled_from(SHAPES), seeds, st.data())
def test_a_block_with_periods_per_window_is_one_for_each_window(batch, time, convolution, seed, data):
    k = data.draw(st.integers(1, time // 2))
    torch.manual_seed(seed)
    block = TimesBlock(2, 3, k, 2, convolution, per_window=True).double()
    features = random(batch, time, 2, seed=seed)
    total, branches = block(features, return_branches=True)
    for i in range(batch):
        alone, branches_alone = block_by_definition(features[i : i + 1].numpy(), block, k)
        np.testing.assert_allclose(total[i : i + 1].detach(), alone, atol=1e-11)
        np.testing.assert_allclose(branches[i : i + 1].detach(), branches_alone, atol=1e-11)


# --- the model --------------------------------------------------------------------------------------------------------


settings_of_models = st.builds(
    dict, history=st.integers(2, 10), horizon=st.integers(1, 12), variables=st.integers(1, 3), width=st.integers(2, 5),
    feed_forward_width=st.integers(1, 3), layers=st.integers(1, 2), kernels=st.integers(1, 3),
    convolution=st.sampled_from(SHAPES),
)  # fmt: skip


@settings(max_examples=25)
@given(settings_of_models, st.integers(1, 3), seeds, st.data())
def test_model_against_the_definition(sizes, batch, seed, data):
    k = data.draw(st.integers(1, (sizes["history"] + sizes["horizon"]) // 2))
    model = small(seed, top_k=k, **sizes)
    history = 3 * random(batch, sizes["history"], sizes["variables"], seed=seed) + 5
    output = model(history)
    for ours, expected in zip(output, model_by_definition(model, history.numpy(), k), strict=True):
        np.testing.assert_allclose(ours.detach(), expected, rtol=1e-9, atol=1e-9)


def test_parity_with_another_implementation():
    """Golden numbers made by tests/golden/make_timesnet.py from neuralforecast's TimesNet with the same weights."""
    golden = json.loads(GOLDEN.read_text())
    assert {case["model"]["convolution"] for case in golden["cases"]} == set(SHAPES)
    for case in golden["cases"]:
        model = TimesNet(top_k=case["model"].pop("periods"), **case["model"], return_frequency_features=True)
        model = model.double().eval()
        model.load_state_dict({name: torch.tensor(value).double() for name, value in case["weights"].items()})
        expected = Output(*(torch.tensor(case[name], dtype=torch.float64) for name in Output._fields))
        output = model(torch.tensor(case["input"], dtype=torch.float64))
        torch.testing.assert_close(output, expected, rtol=0, atol=2e-6)


def test_in_the_published_form_a_forecast_depends_on_the_batch():
    published, own, history = small(), small(per_window=True), random(6, 12, 2)
    own.load_state_dict(published.state_dict())
    together = published(history).prediction
    alone = torch.cat([published(history[i : i + 1]).prediction for i in range(6)])
    assert (together - alone).abs().amax((1, 2)).max() > 0.01
    torch.testing.assert_close(own(history).prediction, alone)  # of one window the batch mean is its own spectrum


@pytest.mark.parametrize("per_window", [False, True])
def test_branches_weighted_by_their_amplitudes_give_the_last_block(per_window):
    model, history = small(per_window=per_window), random(3, 12, 2)
    calls = []
    model.blocks[-1].register_forward_hook(lambda block, given, returned: calls.append((given[0], returned[0])))
    output = model(history)
    [(features, total)] = calls
    _, amplitudes = dominant_periods(features, 3, per_window)
    weighted = torch.einsum("bk,bhkw->bhw", amplitudes.softmax(-1), output.frequency_features)
    torch.testing.assert_close(weighted, total[:, 12:])
    model.return_frequency_features = False
    without = model(history)
    assert without.frequency_features is None and without.prediction.equal(output.prediction)


def test_the_forecast_moves_and_stretches_with_its_window():
    model, history = small(), random(3, 12, 2)
    prediction, level = model(history).prediction, torch.tensor([100.0, -7.0], dtype=torch.float64)
    torch.testing.assert_close(model(history + level).prediction, prediction + level)
    torch.testing.assert_close(model(50 * history).prediction, 50 * prediction, rtol=1e-3, atol=1e-3)  # but for 1e-5


SMALLEST, LONG = {"variables": 1, "history": 1, "horizon": 1, "top_k": 1}, {"history": 3, "horizon": 20, "top_k": 4}


@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize(("batch", "sizes"), [(3, {}), (1, {}), (3, {"variables": 1}), (1, SMALLEST), (2, LONG)])
@pytest.mark.parametrize("constant", [False, True])
def test_small_and_constant_windows_have_finite_forecasts_and_gradients(batch, sizes, constant, per_window):
    model = small(per_window=per_window, **sizes)
    history = random(batch, model.history, model.projection.out_features)
    if constant:
        history = torch.full_like(history, 3.0)
    output = model(history.requires_grad_())
    assert output.prediction.shape == (batch, model.horizon, history.shape[2])
    documented_loss(output, random(*output.prediction.shape, seed=1)).total.backward()
    assert all(value.isfinite().all() for value in (*output, history.grad))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- the losses -------------------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    target = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])  # two windows, two steps, one variable
    features = torch.zeros(2, 2, 1, 2)  # one period, two features
    features[0, 1, 0] = torch.tensor([3.0, 4.0])  # the first window's change by (3, 4), the second's not at all
    loss = documented_loss(Output(prediction=target + 3, frequency_features=features), target)
    # each window 1/2 (9 + 9) = 9;  0.5 * 1/2 * 25 = 6.25 and 0, the mean 3.125
    assert {name: value.item() for name, value in loss.terms.items()} == {"forecast": 9.0, "smoothness": 3.125}
    assert loss.total.item() == 12.125
    loss = documented_loss(Output(target + 3, features), target, forecast_weight=2.0, smoothness_weight=0.1)
    assert loss.total.item() == pytest.approx(18 + 0.625)


counts = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@given(counts, st.floats(0, 100), st.floats(0, 100), seeds)
def test_losses_against_numpy(count, alpha, beta, seed):
    windows, horizon, variables, k, width = count
    prediction, target = random(2, windows, horizon, variables, seed=seed)
    features = random(windows, horizon, k, width, seed=seed + 1)
    y, p, f = target.numpy(), prediction.numpy(), features.numpy()
    forecast = smoothness = 0
    for i in range(windows):
        for t in range(horizon):
            forecast += alpha * np.linalg.norm(y[i, t] - p[i, t]) ** 2 / horizon / windows
            if t:
                smoothness += beta * np.linalg.norm(f[i, t] - f[i, t - 1], "fro") ** 2 / horizon / windows
    loss = documented_loss(Output(prediction, features), target, alpha, beta)
    assert loss.values() == pytest.approx({"forecast": forecast, "smoothness": smoothness}, rel=1e-12, abs=1e-15)
    published = published_loss(Output(prediction), target).total.item()
    assert published == pytest.approx(((y - p) ** 2).mean(), rel=1e-12)
    # the number of variables, and alpha, are all that tells the first term from the published loss
    assert forecast == pytest.approx(alpha * variables * published, rel=1e-12, abs=1e-15)


def smoothness(features):
    """The second term with weight 1."""
    nothing = features.new_zeros(*features.shape[:2], 1)
    return documented_loss(Output(nothing, features), nothing, 1.0, 1.0).terms["smoothness"].item()


def test_smoothness_is_0_for_constant_features_and_for_one_step():
    assert smoothness(random(3, 1, 2, 4).expand(3, 7, 2, 4)) == 0
    assert smoothness(random(3, 1, 2, 4)) == 0
    model, history = small(horizon=1), random(2, 12, 2)
    loss = documented_loss(model(history), random(2, 1, 2))
    assert loss.terms["smoothness"] == 0
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), seeds)
def test_smoothness_weighs_the_spectrum_of_the_features(windows, horizon, width, seed):
    """Round the circle, with the step from the last to the first: sum_t |F_t - F_{t-1}|^2 =
    1/L sum_w 4 sin^2(pi w / L) |DFT_w|^2, w = 0 .. L - 1. The loss leaves that one step out."""
    features = random(windows, horizon, 2, width, seed=seed)
    spectrum = np.fft.fft(features.numpy(), axis=1)  # [window, w, k, width]
    response = 4 * np.sin(np.pi * np.arange(horizon) / horizon) ** 2
    circle = (response * (np.abs(spectrum) ** 2).sum((2, 3))).sum(1) / horizon  # [window]
    last_step = (features[:, 0] - features[:, -1]).square().sum((1, 2)).numpy()
    assert smoothness(features) == pytest.approx((circle - last_step).mean() / horizon, rel=1e-9, abs=1e-12)


def test_a_wave_is_the_rougher_the_faster():
    """A wave of w cycles in L steps, closed by the first step once more: 4 sin^2(pi w / L) times its energy L/2."""
    for cycles in (1, 3, 5):
        closed = wave(13, 12 / cycles).view(1, 13, 1, 1)  # the 13th step is the first again
        assert smoothness(closed) == pytest.approx(4 * math.sin(math.pi * cycles / 12) ** 2 * 6 / 13)


def test_gradients():
    target = random(2, 4, 2, seed=2)
    parts = random(2, 4, 2).requires_grad_(), random(2, 4, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, f: documented_loss(Output(p, f), target, 0.7, 0.3).total, parts)
    assert torch.autograd.gradcheck(lambda p: published_loss(Output(p), target).total, parts[:1])


def test_gradient_of_the_smoothness_is_a_second_difference():
    features = random(2, 5, 2, 3).requires_grad_()
    nothing = torch.zeros(2, 5, 1, dtype=torch.float64)
    documented_loss(Output(nothing, features), nothing, smoothness_weight=0.3).total.backward()
    f = features.detach()
    before, after = torch.cat([f[:, :1], f[:, :-1]], dim=1), torch.cat([f[:, 1:], f[:, -1:]], dim=1)  # ends repeat
    torch.testing.assert_close(features.grad, 2 * 0.3 / (2 * 5) * (2 * f - before - after))


@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize("convolution", SHAPES)
def test_gradients_of_the_whole_model(convolution, per_window):
    """Of the documented loss, by the input and by a weight of every part."""
    model = small(history=5, horizon=3, variables=1, top_k=2, width=2, convolution=convolution, per_window=per_window)
    target = random(2, 3, 1, seed=1)
    names = ["embedding.weight", "blocks.0.widen.kernels.1.weight", "blocks.1.narrow.kernels.0.bias", "norm.weight"]
    assert gradients_as_finite_differences(
        model, names, lambda output: documented_loss(output, target, 0.7, 0.3).total, random(2, 5, 1)
    )


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD, TARGET = torch.zeros(2, 10, 3), torch.zeros(2, 4, 3)
FEATURES = torch.zeros(2, 4, 2, 5)


def loss_with(features):
    return documented_loss(Output(TARGET, features), TARGET)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: dominant_periods(GOOD, 6), ValueError, "k must be at most 5, the frequencies of 10 time steps; got 6"),
        (lambda: dominant_periods(GOOD, 0), ValueError, "k must be at least 1; got 0"),
        (lambda: dominant_periods(GOOD[0], 2), ValueError, r"series.*\[batch, time, variable\].*got shape \[10, 3\]"),
        (lambda: dominant_periods(GOOD / 0, 2), ValueError, "series.*60 of its 60 are NaN"),
        (lambda: small(top_k=10), ValueError, "top_k must be at most 9, the frequencies of history.*18 steps; got 10"),
        (lambda: small(top_k=0), ValueError, "top_k must be at least 1; got 0"),
        (lambda: small(kernels=0), ValueError, "kernels must be at least 1; got 0"),
        (
            lambda: loss_with(FEATURES[:, :2]),
            ValueError,
            r"frequency_features.* and target.*got \[2, 2\] and \[2, 4",
        ),
        (lambda: loss_with(FEATURES[:, :, 0]), ValueError, r"frequency_features.*\[batch, horizon, period, feature\]"),
        (lambda: loss_with(FEATURES / 0).values(), NonFiniteLoss, "term 'smoothness'.*nan"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("return_branches", [False, True])
@pytest.mark.parametrize("bad", [math.nan, 5e37])
def test_a_block_hides_nothing(bad, return_branches):
    """Features that are NaN, or so large that amplitudes overflow, do not come out as a harmless zero."""
    block = TimesBlock(4, 4, top_k=2, kernels=2, convolution="within", per_window=False)
    total, _ = block(torch.full((2, 24, 4), bad), return_branches=return_branches)
    assert not torch.isfinite(total).all() or total.abs().max() > 0


def test_one_branch_is_fold_convolve_unfold():
    block = small().blocks[0]
    features = random(3, 18, 4)
    by_steps = unfold(block.narrow(F.gelu(block.widen(fold(features, 5)))), 18)
    torch.testing.assert_close(one_branch(features, 5, block.widen.merged(), block.narrow.merged()), by_steps)

"""PatchTST: by hand, against float64 arithmetic written apart, and against two other implementations."""

import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mini_impl.forecasting import patchtst
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.layers import normalise
from mini_impl.forecasting.patchtst import (
    BatchNorm,
    MaskedOutput,
    MaskedPatchTST,
    Output,
    PatchTST,
    documented_loss,
    masked_loss,
    masked_score,
    pad_end,
    published_loss,
    random_mask,
)
from mini_impl.forecasting.train import fit
from mini_impl.losses import NonFiniteLoss
from tests.forecasting.by_numpy import gradients_as_finite_differences
from tests.tensors import random, same

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "patchtst.json").read_text())
TINY = {"width": 8, "heads": 2, "layers": 2, "feed_forward_width": 12}
READINGS = ["received", "rows"]


def small(seed=0, **settings):
    """24 steps -> 5 steps, 6 patches, in float64."""
    torch.manual_seed(seed)
    settings = {"history": 24, "horizon": 5, "patch_length": 6, "stride": 4, **TINY, **settings}
    return PatchTST(**settings).double()


def small_masked(seed=0, **settings):
    """24 steps, 6 patches of which 3 stay visible, in float64."""
    torch.manual_seed(seed)
    return MaskedPatchTST(**{"history": 24, "patch_length": 4, "mask_ratio": 0.5, **TINY, **settings}).double()


def maps(*shape, seed=0):
    """Attention maps from nearly uniform to nearly one-hot: [.., query, key]."""
    sharpness = 10 ** torch.linspace(-1, 1, shape[0], dtype=torch.float64)
    return (random(*shape, seed=seed) * sharpness.view(-1, *[1] * (len(shape) - 1))).softmax(-1)


# --- patches ----------------------------------------------------------------------------------------------------------


def test_pad_end_by_hand():
    series = torch.tensor([1.0, 2, 3, 4, 5])
    assert pad_end(series, patch_length=3, stride=2).tolist() == [1, 2, 3, 4, 5, 5, 5]
    assert pad_end(series, patch_length=2, stride=2).tolist() == [1, 2, 3, 4, 5, 5]  # 3 4 5 | 5: only one was missing
    series = torch.arange(7.0).view(1, 7)  # without overlap
    assert pad_end(series, 3, 3).tolist() == [[0, 1, 2, 3, 4, 5, 6, 6, 6]]
    assert pad_end(series[:, :6], 3, 3).tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5]]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_patches_are_those_of_the_public_code(time, length, stride, seed):
    """There: repeat the last value `stride` times, cut, and drop what does not fill a patch."""
    length = min(length, time)
    stride = min(stride, length)
    model = PatchTST(time, 1, length, stride, width=2, heads=1, layers=1, feed_forward_width=1)
    series = random(2, time, 3, seed=seed)
    padded = np.concatenate([series.numpy(), np.repeat(series.numpy()[:, -1:], stride, axis=1)], axis=1)
    count = (time - length) // stride + 2
    expected = np.stack([padded[:, n * stride : n * stride + length] for n in range(count)], axis=1)
    assert count * stride + length > time + stride  # no other patch fits
    got = model.cut(series)  # [batch, variable, patch, patch_length]
    assert len(model.encoder.position) == got.shape[2] == count
    assert np.array_equal(got.numpy(), expected.transpose(0, 3, 1, 2))


def test_without_padding_patches_tile_the_series():
    model = small(patch_length=4, stride=4, pad_end=False)
    series = random(2, 24, 3)
    assert torch.equal(model.cut(series).flatten(2), series.mT)


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["forecasts"], ids=lambda case: f"{case['peer']}-{case['model']['stride']}")
def test_forecasts_as_another_implementation(case):
    """Golden numbers made by tests/golden/make_patchtst.py from other people's models with the same weights."""
    model = PatchTST(**case["model"]).double().eval()
    load(model, case["weights"])
    output = model(torch.tensor(case["input"], dtype=torch.float64))
    prediction = torch.tensor(case["prediction"], dtype=torch.float64)
    torch.testing.assert_close(output.prediction, prediction, rtol=0, atol=1e-10)
    if "attention" in case:
        attention = torch.tensor(case["attention"], dtype=torch.float64)
        torch.testing.assert_close(output.attention, attention, rtol=0, atol=1e-12)
        assert attention.max() > 0.9 and attention.min() < 0.01  # not near uniform, where mistakes would hide
    single = model.float()(torch.tensor(case["input"])).prediction.double()
    torch.testing.assert_close(single, prediction, rtol=1e-5, atol=1e-5)


def load(model, weights):
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    assert set(dtypes) == set(weights)
    model.load_state_dict({name: torch.tensor(value, dtype=dtypes[name]) for name, value in weights.items()})


def test_batch_norm_counts_windows_and_patches_alike():
    norm, tokens = BatchNorm(3).double(), 2 * random(4, 5, 3) + 1
    x = tokens.numpy()
    mean, variance = x.mean((0, 1)), x.var((0, 1))
    expected = (x - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(norm(tokens).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    running_mean, running_variance = 0.1 * mean, 0.9 + 0.1 * variance * 20 / 19  # torch keeps the unbiased variance
    np.testing.assert_allclose(norm.running_mean.numpy(), running_mean, rtol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), running_variance, rtol=1e-12)
    expected = (x - running_mean) / np.sqrt(running_variance + 1e-5)
    np.testing.assert_allclose(norm.eval()(tokens).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_variables_do_not_see_one_another():
    model, history = small().eval(), random(3, 24, 4)
    prediction, other = model(history).prediction, history.clone()
    other[:, :, 2] = 100 * random(3, 24, seed=1)
    assert torch.equal(model(other).prediction[..., [0, 1, 3]], prediction[..., [0, 1, 3]])
    same(torch.cat([model(history[..., [v]]).prediction for v in range(4)], dim=-1), prediction)  # each alone


def test_in_training_windows_meet_in_the_batch_norm():
    model, history = small(dropout=0.0), random(3, 24, 2)
    together = model(history).prediction
    alone = torch.cat([model(window[None]).prediction for window in history])
    assert not torch.allclose(together, alone)


@given(st.floats(-1e3, 1e3), st.floats(1, 1e3), st.integers(0, 10**6))
def test_forecasts_move_with_level_and_scale(level, scale, seed):
    model, history = shared_model(), random(2, 24, 2, seed=seed)
    prediction = model(history).prediction
    shifted = model(history + level).prediction
    torch.testing.assert_close(shifted, prediction + level, rtol=1e-9, atol=1e-9)
    scaled = model(scale * history).prediction
    torch.testing.assert_close(scaled, scale * prediction, rtol=1e-3, atol=1e-3 * scale)  # 1e-5 stands beside variances


@functools.cache
def shared_model():
    return small().eval()


def test_only_the_last_map_is_returned_and_it_changes_no_forecast():
    plain, mapped = small().eval(), small(return_attention=True).eval()
    history = random(3, 24, 2)
    output = mapped(history)
    assert plain(history).attention is None
    same(output.prediction, plain(history).prediction)
    tokens = mapped.encoder.embedding(mapped.cut(patchtst.normalise(history)[0]).flatten(0, 1))
    first, last = mapped.encoder.blocks
    _, expected = last(first(tokens + mapped.encoder.position)[0], return_map=True)  # [batch * variable, head, 6, 6]
    torch.testing.assert_close(output.attention, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("level", [0.0, -7.3])
def test_a_constant_window_gives_finite_forecasts_and_gradients(training, level):
    model = small(return_attention=True).train(training)
    history = random(3, 24, 2)
    history[0], history[1, :, 1] = level, level
    history.requires_grad_()
    output = model(history)
    documented_loss(output, random(3, 5, 2), 0.1).total.backward()
    assert all(x.grad.isfinite().all() for x in (history, *model.parameters()))
    # a forecast stays within the sqrt(1e-5) that a constant window counts as its deviation
    assert (output.prediction[0] - level).abs().max() < 0.05


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("batch", "variables"), [(1, 1), (1, 3), (3, 1)])
def test_small_batches_and_long_horizons(training, batch, variables):
    model = small(horizon=50).train(training)
    prediction = model(random(batch, 24, variables)).prediction
    assert prediction.shape == (batch, 50, variables) and prediction.isfinite().all()
    output = small_masked().train(training)(random(batch, 24, variables))
    assert masked_loss(output).total.isfinite()


def test_the_masked_form_on_every_device(device):
    model, history = small_masked(dropout=0.0).float(), random(4, 24, 3, dtype=torch.float32)
    here = model(history, torch.Generator().manual_seed(0))  # one mask on every device
    there = model.to(device)(history.to(device), torch.Generator().manual_seed(0))
    assert there.mask.dtype == torch.bool and there.mask.device.type == device
    same([tensor.cpu() for tensor in there], list(here), tolerance=1e-4)
    masked_loss(there).total.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


# --- the losses -------------------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    target = torch.tensor([[[1.0], [2.0]]])  # one window, two steps, one variable
    attention = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])  # one head, two patches
    output = Output(prediction=target + torch.tensor([[[3.0], [-1.0]]]), attention=attention)
    received = 0.75 * math.log(2 * 0.75) + 0.25 * math.log(2 * 0.25)  # of p = (3/4, 1/4)
    rows = (math.log(2) + 0) / 2
    for reading, divergence in [("received", received), ("rows", rows)]:
        loss = documented_loss(output, target, uniformity_weight=10, reading=reading)
        assert loss.terms["forecast"].item() == 2  # (3 + 1) / 2
        assert loss.terms["uniformity"].item() == pytest.approx(10 * divergence, rel=1e-6)
        assert loss.total.item() == pytest.approx(2 + 10 * divergence, rel=1e-6)
    assert documented_loss(output, target).total.item() == pytest.approx(2 + 0.1 * received, rel=1e-6)


sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5))


@given(sizes, st.floats(0, 100), st.sampled_from(READINGS), st.integers(0, 10**6))
def test_losses_against_numpy(size, weight, reading, seed):
    windows, horizon, variables, heads, count = size
    prediction, target = random(2, windows, horizon, variables, seed=seed)
    attention = maps(windows * variables, heads, count, count, seed=seed)
    y, yhat, a = target.numpy(), prediction.numpy(), attention.numpy()
    divergences = []
    for window in range(windows * variables):
        if reading == "received":
            rows = [[np.mean([a[window, h, q, k] for h in range(heads) for q in range(count)]) for k in range(count)]]
        else:
            rows = [a[window, h, q] for h in range(heads) for q in range(count)]
        divergences.append(np.mean([sum(p * np.log(p * count) for p in row if p > 0) for row in rows]))
    forecast = sum(abs(y[i, t, v] - yhat[i, t, v]) for i, t, v in np.ndindex(y.shape)) / y.size
    loss = documented_loss(Output(prediction, attention), target, weight, reading)
    assert loss.terms["forecast"].item() == pytest.approx(forecast, rel=1e-12)
    assert loss.terms["uniformity"].item() == pytest.approx(weight * np.mean(divergences), rel=1e-9, abs=1e-12)
    published = published_loss(Output(prediction), target).total.item()
    assert published == pytest.approx(((y - yhat) ** 2).mean(), rel=1e-12)
    # the paper sums over the horizon: E_x 1/M sum_i ||x^(i) - xhat^(i)||^2
    paper = np.mean([1 / variables * (np.linalg.norm(y[i] - yhat[i], axis=0) ** 2).sum() for i in range(windows)])
    assert paper == pytest.approx(horizon * published, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("count", [1, 2, 12, 42])
def test_both_ends_of_the_divergence_are_reached(count, reading):
    target = random(2, 3, 2)
    uniform = torch.full((4, 2, count, count), 1 / count, dtype=torch.float64)
    one_hot = torch.zeros(4, 2, count, count, dtype=torch.float64)
    one_hot[..., count // 2] = 1  # all patches look at one
    for attention, divergence in [(uniform, 0.0), (one_hot, math.log(count))]:
        loss = documented_loss(Output(target, attention), target, 1.0, reading)
        assert loss.terms["uniformity"].item() == pytest.approx(divergence, abs=1e-12)
        assert loss.total.item() == loss.terms["uniformity"].item()  # a term alone: the forecast is right


def test_each_patch_looking_at_itself_tells_the_readings_apart():
    target, attention = random(1, 3, 1), torch.eye(6, dtype=torch.float64)[None, None]
    received, rows = (documented_loss(Output(target, attention), target, 1.0, reading) for reading in READINGS)
    assert received.total.item() == pytest.approx(0, abs=1e-12) and rows.total.item() == pytest.approx(math.log(6))


@given(sizes, st.integers(0, 10**6))
def test_what_is_received_is_nearer_to_uniform_than_the_rows(size, seed):
    """KL is convex: that of a mean is at most the mean of the KLs."""
    windows, horizon, variables, heads, count = size
    target = random(windows, horizon, variables)
    output = Output(target, maps(windows * variables, heads, count, count, seed=seed))
    received, rows = (documented_loss(output, target, 1.0, reading).total.item() for reading in READINGS)
    assert -1e-12 < received <= rows + 1e-12 and rows <= math.log(count) + 1e-12


@pytest.mark.parametrize("reading", READINGS)
def test_weight_zero_is_the_forecast_alone(reading):
    model, history, target = small(return_attention=True), random(3, 24, 2), random(3, 5, 2, seed=1)
    output = model(history)
    loss = documented_loss(output, target, 0, reading)
    assert loss.terms["uniformity"].item() == 0 and torch.equal(loss.total, loss.terms["forecast"])
    gradients = torch.autograd.grad(loss.total, list(model.parameters()), retain_graph=True)
    alone = torch.autograd.grad((output.prediction - target).abs().mean(), list(model.parameters()))
    torch.testing.assert_close(gradients, alone, rtol=1e-12, atol=1e-14)


def all_losses(output, target):
    readings = [documented_loss(output, target, 0.7, reading).total for reading in READINGS]
    return torch.stack([*readings, published_loss(output, target).total])


def test_gradients_of_the_losses():
    prediction, target = random(2, 2, 3, 2)
    parts = prediction.requires_grad_(), random(4, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, s: all_losses(Output(p, s.softmax(-1)), target), parts)
    mask = random_mask((2, 3, 5), 2, torch.Generator().manual_seed(0))
    whole, reconstruction = random(2, 2, 3, 5, 4)
    reconstruction.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: masked_loss(MaskedOutput(r, whole, mask)).total, (reconstruction,))


def test_gradient_of_the_divergence_as_derived():
    """By p_k it is gamma (log(N p_k) + 1) for each window, over the number of windows; a map's entry has 1/(H N)."""
    target, attention = random(1, 3, 2), maps(2, 3, 4, 4).requires_grad_()
    documented_loss(Output(target, attention), target, 0.7).total.backward()
    p = attention.detach().mean((1, 2))
    derived = 0.7 * ((4 * p).log() + 1) / 2 / (3 * 4)
    torch.testing.assert_close(attention.grad, derived[:, None, None].expand_as(attention))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_the_whole_model(training):
    sizes = {"width": 4, "heads": 2, "layers": 2, "feed_forward_width": 3, "dropout": 0.0}
    torch.manual_seed(0)
    model = PatchTST(9, 2, 4, 3, return_attention=True, **sizes).double().train(training)
    names = ["encoder.position", "encoder.blocks.0.attention.projection.bias", "encoder.blocks.1.feed_forward.3.weight"]
    target = random(2, 2, 2, seed=1)
    assert gradients_as_finite_differences(model, names, lambda out: all_losses(out, target), random(2, 9, 2))


def test_gradients_of_the_whole_masked_model():
    torch.manual_seed(0)
    model = MaskedPatchTST(12, 3, 0.5, width=4, heads=2, layers=1, feed_forward_width=3, dropout=0.0).double()
    names, one_mask = ["encoder.embedding.weight", "head.weight"], lambda: (torch.Generator().manual_seed(0),)
    assert gradients_as_finite_differences(
        model, names, lambda output: masked_loss(output).total, random(2, 12, 2), more=one_mask
    )


def test_a_large_weight_spreads_the_attention():
    history, target = random(16, 24, 2), random(16, 5, 2, seed=1)
    divergences = {}
    for weight in (0.0, 100.0):
        model = small(return_attention=True, dropout=0.0)
        nn.init.normal_(model.encoder.blocks[-1].attention.projection.weight)  # far from uniform at the start
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(30):
            loss = documented_loss(model(history), target, weight)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        divergences[weight] = documented_loss(model(history), target, 1.0).terms["uniformity"].item()
    assert divergences[100.0] < 0.1 * divergences[0.0]


# --- self-supervised --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["masked"])
def test_masked_form_as_another_implementation(case, monkeypatch):
    """Golden numbers made by tests/golden/make_patchtst.py; given the mask that was drawn there."""
    model = MaskedPatchTST(**case["model"]).double().eval()
    load(model, case["weights"])
    mask = torch.tensor(case["mask"])
    assert ((~mask).sum(-1) == model.visible).all()  # as many stay visible as there
    monkeypatch.setattr(patchtst, "random_mask", lambda shape, visible, generator: mask)
    output = model(torch.tensor(case["input"], dtype=torch.float64))
    # the peer was given the scaled windows; both scale with the same formula
    reconstruction = torch.tensor(case["reconstruction"], dtype=torch.float64)
    torch.testing.assert_close(output.reconstruction, reconstruction, rtol=0, atol=1e-10)
    assert masked_loss(output).total.item() == pytest.approx(case["loss"], abs=1e-10)


def test_masked_loss_by_hand():
    whole = torch.zeros(1, 1, 3, 2)
    reconstruction = torch.tensor([[[[1.0, 3.0], [50.0, 50.0], [2.0, 0.0]]]])
    mask = torch.tensor([[[True, False, True]]])
    loss = masked_loss(MaskedOutput(reconstruction, whole, mask))
    assert loss.total.item() == loss.terms["reconstruction"].item() == 3.5  # ((1 + 9) / 2 + (4 + 0) / 2) / 2


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_masked_loss_against_numpy(batch, variables, count, length, seed):
    whole, reconstruction = random(2, batch, variables, count, length, seed=seed)
    mask = random_mask((batch, variables, count), 1 + seed % (count - 1), torch.Generator().manual_seed(seed))
    total = hidden = 0
    for place in np.ndindex(*mask.shape):
        if mask[place]:
            total += ((reconstruction[place].numpy() - whole[place].numpy()) ** 2).mean()
            hidden += 1
    assert masked_loss(MaskedOutput(reconstruction, whole, mask)).total.item() == pytest.approx(total / hidden)


@given(st.integers(2, 60), st.integers(1, 19), st.integers(0, 10**6))
def test_exactly_so_many_are_hidden(count, twentieths, seed):
    visible = math.floor(count * (1 - Fraction(twentieths, 20)))
    build = functools.partial(MaskedPatchTST, count, patch_length=1, mask_ratio=twentieths / 20, **TINY)
    if visible == 0:
        with pytest.raises(ValueError, match=f"must hide some of {count} patches, not all; {twentieths / 20} does not"):
            build()
    else:
        assert build().visible == visible
        mask = random_mask((2, 3, count), visible, torch.Generator().manual_seed(seed))
        assert mask.dtype == torch.bool and ((~mask).sum(-1) == visible).all()


def test_every_patch_is_hidden_equally_often():
    mask = random_mask((4000, 2, 5), 3, torch.Generator().manual_seed(0))
    share = mask.double().mean(0)  # 0.4 each, with a standard deviation of 0.0077
    assert (share - 0.4).abs().max() < 0.04
    pairs = (mask[..., :, None] & mask[..., None, :]).double().mean((0, 1))  # 2/5 * 1/4 for any two
    assert (pairs[~torch.eye(5, dtype=torch.bool)] - 0.1).abs().max() < 0.02
    assert (mask[:, 0] != mask[:, 1]).any()  # every variable has a mask of its own


def test_masks_follow_the_generator():
    model, history = small_masked().eval(), random(8, 24, 2)

    def mask(seed=None):
        return model(history, None if seed is None else torch.Generator().manual_seed(seed)).mask

    assert torch.equal(mask(1), mask(1)) and not torch.equal(mask(1), mask(2))
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(model(history, generator).mask, model(history, generator).mask)  # it moves on
    before = torch.get_rng_state()
    mask(1)
    assert torch.equal(torch.get_rng_state(), before)  # a generator of one's own leaves torch's alone
    torch.manual_seed(3)
    first = mask()
    torch.manual_seed(3)
    assert torch.equal(first, mask()) and not torch.equal(first, mask())


def test_what_the_encoder_sees():
    model, history, seen = small_masked().eval(), random(3, 24, 2) + 5, []
    model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    output = model(history)
    pieces = seen[0].view_as(output.patches)
    assert not pieces[output.mask].any()  # hidden patches are truly zero
    assert torch.equal(pieces[~output.mask], output.patches[~output.mask]) and output.patches[output.mask].all()
    scaled = (history - history.mean(1, keepdim=True)) / (history.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(output.patches.flatten(2), scaled.mT)


def test_what_is_hidden_is_not_seen():
    """Turned round in time, hidden patches keep mean and deviation: nothing that is left can tell."""
    model, history = small_masked().eval(), random(3, 24, 2)
    output = model(history, torch.Generator().manual_seed(0))
    pieces = history.mT.unflatten(-1, (6, 4))
    turned = pieces.flip(-1).where(output.mask[..., None], pieces).flatten(2).mT
    assert not torch.equal(turned, history)
    again = model(turned, torch.Generator().manual_seed(0)).reconstruction
    torch.testing.assert_close(again, output.reconstruction, rtol=1e-10, atol=1e-12)


def test_visible_patches_carry_no_loss():
    output = small_masked()(random(3, 24, 2))
    output.reconstruction.retain_grad()
    masked_loss(output).total.backward()
    gradient = output.reconstruction.grad
    assert not gradient[~output.mask].any() and gradient[output.mask].all()
    changed = output.reconstruction.detach() + 100 * ~output.mask[..., None]
    assert masked_loss(output._replace(reconstruction=changed)).total == masked_loss(output).total


def sines(rows=400):
    """Two sums of two sines, [time, variable]."""
    time = torch.arange(rows)[:, None]
    return torch.sin(2 * torch.pi * time / torch.tensor([24, 18])) + 0.5 * torch.sin(2 * torch.pi * time / 7)


@functools.cache
def pretrained():
    """A masked model that a few seconds have taught sines, and its scores before and after."""
    train, validation = Windows(sines()[:300], 48, 6), Windows(sines()[300:], 48, 6)
    torch.manual_seed(0)
    model = MaskedPatchTST(48, 6, 0.4, width=32, heads=4, layers=1, feed_forward_width=64, dropout=0.0)
    before = masked_score(model, validation)
    settings = {"epochs": 20, "batch_size": 16, "learning_rate": 0.02, "patience": 20}
    training = fit(model, train, validation, masked_loss, score=masked_score, progress=False, **settings)
    assert training.validation[training.best_epoch - 1] == masked_score(model, validation)
    return model, train, validation, before, masked_score(model, validation)


def test_pretraining_learns_to_fill_in():
    _, _, _, before, after = pretrained()
    assert before > 0.8 and after < 0.5  # about 1 is what zeros would score; it stays near 0.9 for some epochs


def test_masked_score_is_the_mean_over_windows():
    windows = Windows(random(70, 2, dtype=torch.float32), history=24, horizon=5)  # 42 of them
    model = small_masked().float().eval()
    history, _ = windows[:]
    generator, squares = torch.Generator().manual_seed(3), []
    for batch in history.split(16):  # 16, 16 and 10
        output = model(batch, generator)
        squares += (output.reconstruction - output.patches).square().mean(-1)[output.mask].tolist()
    assert masked_score(model, windows, seed=3, batch_size=16) == pytest.approx(np.mean(squares), rel=1e-6)
    assert masked_score(model, windows) == masked_score(model, windows) != masked_score(model, windows, seed=1)
    assert math.isfinite(masked_score(model.double(), windows))  # float32 windows, float64 model


@pytest.mark.parametrize("training", [True, False])
def test_masked_score_leaves_no_trace(training):
    windows, model = Windows(random(40, 2, dtype=torch.float32), 24, 5), small_masked().float()
    model.train(training).encoder.dropout.train(not training)  # parts may differ
    modes = [part.training for part in model.modules()]
    before, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    masked_score(model, windows)
    with pytest.raises(ValueError, match="history must have 24 time steps"):
        masked_score(model, Windows(windows.values, 20, 5))
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("linear_probe", [False, True])
def test_the_encoder_moves_on(linear_probe):
    masked = small_masked(dropout=0.1)
    masked(random(4, 24, 2))
    model = PatchTST.from_masked(masked, horizon=7, linear_probe=linear_probe).eval()
    history = random(3, 24, 2, seed=1)
    pieces = model.cut(history)
    whole = patchtst.patches(history.mT, 4, 4)
    assert torch.equal(pieces, whole)  # cut alike
    masked.eval()
    for ours, theirs in zip(model.encoder(pieces.flatten(0, 1)), masked.encoder(whole.flatten(0, 1)), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert model(history).prediction.shape == (3, 7, 2) and model.head.weight.dtype == torch.float64
    copies = zip(model.encoder.state_dict().values(), masked.encoder.state_dict().values(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in copies)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert trained == ({"head.weight", "head.bias"} if linear_probe else everything)
    assert all(parameter.requires_grad for parameter in masked.parameters())  # the original is as it was
    mapped = PatchTST.from_masked(masked, 7, linear_probe, return_attention=True)
    assert documented_loss(mapped(history), random(3, 7, 2), 0.1).total.isfinite()


@pytest.mark.parametrize("linear_probe", [False, True])
def test_what_fine_tuning_trains(linear_probe):
    masked, train, validation, _, _ = pretrained()
    before = {name: value.clone() for name, value in masked.encoder.state_dict().items()}
    model = PatchTST.from_masked(masked, horizon=6, linear_probe=linear_probe)
    training = fit(model, train, validation, published_loss, epochs=2, learning_rate=0.01, progress=False)
    assert training.validation[-1] < 0.3  # 0.6 is what the window's mean would score
    same = {name for name, value in model.encoder.named_parameters() if torch.equal(value, before[name])}
    assert same == ({name for name, _ in model.encoder.named_parameters()} if linear_probe else set())
    assert all(torch.equal(value, before[name]) for name, value in masked.encoder.state_dict().items())


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD, TARGET, MAP = torch.zeros(2, 24, 3), torch.zeros(2, 5, 3), torch.full((6, 2, 4, 4), 0.25)
PIECES, MASK = torch.zeros(2, 3, 6, 4), torch.ones(2, 3, 6, dtype=torch.bool)
build = functools.partial(PatchTST, history=24, horizon=5, patch_length=6, stride=4, **TINY)
build_masked = functools.partial(MaskedPatchTST, history=24, patch_length=4, **TINY)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: build(patch_length=25), ValueError, "patch_length must be at most 24, the history; got 25"),
        (lambda: build(patch_length=0), ValueError, "patch_length must be at least 1; got 0"),
        (lambda: build(stride=7), ValueError, "stride must be at most 6, the patch_length.*got 7"),
        (lambda: build(stride=0), ValueError, "stride must be at least 1; got 0"),
        (lambda: documented_loss(Output(TARGET, MAP[:4]), TARGET), ValueError, r"output.attention.*\[4\] and \[6\]"),
        (lambda: documented_loss(Output(TARGET, MAP[0]), TARGET), ValueError, r"attention.*\[window, head, query, k"),
        (lambda: build_masked(mask_ratio=0), ValueError, "mask_ratio must be.*greater than 0 and less than 1; got 0"),
        (lambda: build_masked(mask_ratio=1), ValueError, "mask_ratio must be .*less than 1; got 1"),
        (lambda: build_masked(mask_ratio=1e-12), ValueError, "must hide some of 6 patches, not all; 1e-12 does not"),
        (lambda: build_masked()(GOOD / 0), ValueError, "history must hold finite numbers"),
        (lambda: PatchTST.from_masked(build(), 5), TypeError, "masked must be a MaskedPatchTST; got PatchTST"),
        (lambda: PatchTST.from_masked(build_masked(), 5, linear_probe=None), TypeError, "linear_probe must be True or"),
        (lambda: masked_loss(Output(TARGET)), TypeError, "output must be what a MaskedPatchTST returned; got Output"),
        (lambda: masked_loss(MaskedOutput(PIECES, PIECES, None)), ValueError, r"mask must be a bool.*got NoneType"),
        (lambda: masked_loss(MaskedOutput(PIECES, PIECES, MASK.long())), ValueError, r"mask must .*got torch.int64"),
        (lambda: masked_loss(MaskedOutput(PIECES, PIECES, MASK[:1])), ValueError, r"bool tensor .*\[2, 3, 6\]; got"),
        (lambda: masked_loss(MaskedOutput(PIECES, PIECES[:1], MASK)), ValueError, "reconstruction and output.patches"),
        (lambda: masked_loss(MaskedOutput(PIECES, PIECES, ~MASK)).values(), NonFiniteLoss, "'reconstruction'.*nan"),
        (lambda: masked_loss(MaskedOutput(PIECES / 0, PIECES, MASK)).values(), NonFiniteLoss, "'reconstruction'.*nan"),
        (lambda: masked_score(build_masked(), Windows(GOOD[0], 20, 4), seed=-1), ValueError, "seed must be at least 0"),
        (lambda: masked_score(build_masked(), Windows(GOOD[0], 20, 4), batch_size=0), ValueError, "batch_size must be"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_new_forecaster_is_wholly_in_train_mode():
    model = PatchTST.from_masked(small_masked().eval(), horizon=5)
    assert all(part.training for part in model.modules())


def test_a_linear_probe_follows_the_data_in_train_mode():
    model = PatchTST.from_masked(small_masked(dropout=0.0), horizon=5, linear_probe=True)
    before = {name: value.clone() for name, value in model.encoder.named_buffers()}
    model(random(4, 24, 3))
    assert all(not torch.equal(value, before[name]) for name, value in model.encoder.named_buffers())
    model.eval()(random(4, 24, 3, seed=1))


def test_a_share_that_rounding_would_lose():
    assert small_masked(history=20, mask_ratio=0.8).visible == 1  # 5 (1 - 0.8) is 0.9999.. in floating point


@pytest.mark.parametrize("history", [2, 8, 13, 23, 24])
def test_masks_fit_any_history_or_the_error_says_what_would(history):
    sizes = {"width": 8, "heads": 2, "layers": 1, "feed_forward_width": 8}
    if history < 24:
        says = f"patch_length must be at most {history // 2}, so that of two patches one can be hidden; got 12"
        with pytest.raises(ValueError, match=says):
            MaskedPatchTST(history, **sizes)
        sizes["patch_length"] = history // 2
    model = MaskedPatchTST(history, **sizes).eval()
    assert model(random(2, history, 1, dtype=torch.float32)).patches.shape[2] == 2


def test_the_setting_of_the_paper_is_42_patches_of_the_last_504_steps():
    model = MaskedPatchTST(512, width=8, heads=2, layers=1, feed_forward_width=8).eval()
    history = random(2, 512, 1, dtype=torch.float32)
    output = model(history)
    assert output.patches.shape == (2, 1, 42, 12)
    scaled = normalise(history)[0][:, 8:, 0]
    torch.testing.assert_close(output.patches[:, 0].flatten(1), scaled)
    forecaster = PatchTST.from_masked(model, 96)
    assert forecaster.settings["layers"] == 1 and forecaster(history).prediction.shape == (2, 96, 1)

"""What several forecasters share: by hand, against float64 arithmetic written apart, and against torch's own modules.

The averages over time are tested with DLinear, in test_dlinear.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mini_impl.forecasting.layers import (
    Attention,
    Dropout,
    EncoderBlock,
    denormalise,
    encode,
    feed_forward,
    normalise,
    patches,
    sinusoids,
)
from tests.forecasting.by_numpy import Parts, gradients_as_finite_differences, positions
from tests.tensors import random, same

CPU = torch.device("cpu")


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make().double()


# --- normalise --------------------------------------------------------------------------------------------------------


def test_normalise_by_hand():
    series = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64).view(1, 4, 1)  # mean 2, variance 1
    scaled, mean, std = normalise(series)
    assert mean.shape == std.shape == (1, 1, 1)
    assert mean.item() == 2 and std.item() == math.sqrt(1 + 1e-5)
    torch.testing.assert_close(scaled.flatten() * math.sqrt(1.00001), torch.tensor([-1.0, 1, -1, 1]).double())


shapes = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 3))


@given(shapes, st.floats(-100, 100), st.floats(0, 100), st.integers(0, 10**6))
def test_normalise_against_numpy_and_back(shape, level, spread, seed):
    series = level + spread * random(*shape, seed=seed)
    scaled, mean, std = normalise(series)
    x = series.numpy()
    np.testing.assert_allclose(mean.numpy(), x.mean(1, keepdims=True), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(std.numpy(), np.sqrt(x.var(1, keepdims=True) + 1e-5), rtol=1e-9)
    np.testing.assert_allclose(scaled.numpy() * std.numpy() + x.mean(1, keepdims=True), x, rtol=1e-12, atol=1e-10)
    assert scaled.mean(1).abs().max() < 1e-8
    assert scaled.square().mean(1).max() < 1  # the 1e-5 makes it less
    torch.testing.assert_close(denormalise(scaled, mean, std), series, rtol=1e-12, atol=1e-10)


@given(shapes, st.integers(0, 10**6))
def test_what_is_not_observed_counts_nowhere(shape, seed):
    batch, time, variables = shape
    series = random(*shape, seed=seed)
    observed = random(*shape, seed=seed + 1) > 0
    observed[:, seed % time] = True  # at least one step of every variable is there
    holes = series.where(observed, math.nan)
    scaled, mean, std = normalise(holes, observed)
    for window in range(batch):
        for variable in range(variables):
            there = observed[window, :, variable]
            alone = normalise(series[window, there, variable].view(1, -1, 1))
            expected = tuple(part.flatten() for part in alone)
            found = scaled[window, there, variable], mean[window, :, variable], std[window, :, variable]
            torch.testing.assert_close(found, expected)
            assert not scaled[window, ~there, variable].any()  # missing values become 0


def test_all_observed_is_the_plain_one():
    series = random(3, 10, 2)
    same(normalise(series, torch.ones_like(series, dtype=torch.bool)), normalise(series))


@pytest.mark.parametrize("level", [0.0, 7.3, -1e6])
def test_a_constant_becomes_zero_with_a_finite_gradient(level):
    series = torch.full((2, 24, 3), level, requires_grad=True)
    scaled, mean, std = normalise(series)
    assert not scaled.any() and torch.equal(denormalise(scaled, mean, std), series)
    scaled.square().sum().backward()
    assert series.grad.isfinite().all()


def test_gradients_of_normalise():
    series = random(2, 5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise(x), (series,))
    observed = random(2, 5, 2, seed=1) > -0.5
    assert observed.any(1).all() and not observed.all()
    assert torch.autograd.gradcheck(lambda x: normalise(x, observed), (series,))
    holes = series.detach().where(observed, math.nan).requires_grad_()
    normalise(holes, observed)[0].square().sum().backward()
    assert not holes.grad[~observed].any() and holes.grad.isfinite().all()


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_patches_by_hand():
    series = torch.arange(7.0)
    assert patches(series, 3, 2).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert patches(series, 7, 1).tolist() == [series.tolist()]
    assert patches(series, 7, 7).tolist() == [series.tolist()]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.integers(0, 10**6))
def test_patches_cover_every_step(length, stride, steps, seed):
    stride = min(stride, length)
    series = random(2, 3, length + steps * stride, seed=seed)
    pieces = patches(series, length, stride)
    assert pieces.shape == (2, 3, steps + 1, length)
    assert pieces.untyped_storage().data_ptr() == series.untyped_storage().data_ptr()  # a view, no copy
    for number in range(steps + 1):
        assert torch.equal(pieces[:, :, number], series[:, :, number * stride : number * stride + length])
    tiles = patches(series[..., : length * (series.shape[-1] // length)], length, length)
    assert torch.equal(tiles.flatten(-2), series[..., : tiles.shape[-2] * length])  # without overlap they tile it


def test_sinusoids_by_hand():
    waves = sinusoids(3, 4, torch.float64, CPU)
    expected = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(3)]
    torch.testing.assert_close(waves, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@given(st.integers(1, 40), st.integers(1, 17))
def test_sinusoids_against_numpy(length, width):
    waves = sinusoids(length, width, torch.float64, CPU)
    np.testing.assert_allclose(waves.numpy(), positions(length, width), rtol=0, atol=1e-12)
    assert torch.equal(sinusoids(length, width, torch.float32, CPU), waves.float())  # computed in float64, then rounded


def test_sinusoids_first_met_in_inference_serve_in_training():
    with torch.inference_mode():
        waves = sinusoids(11, 5, torch.float64, CPU)
    assert sinusoids(11, 5, torch.float64, CPU) is waves  # made once
    tokens = random(11, 5).requires_grad_()
    (tokens * waves).sum().backward()
    torch.testing.assert_close(tokens.grad, waves)


# --- attention --------------------------------------------------------------------------------------------------------


cases = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@given(cases, st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_attention_against_numpy(case, crossed, masked, seed):
    batch, queries, keys, heads, features = case
    attention = seeded(lambda: Attention(heads * features, heads), seed)
    tokens = 2 * random(batch, queries, heads * features, seed=seed)
    context = 2 * random(batch, keys, heads * features, seed=seed + 1) if crossed else None
    there = random(batch, keys if crossed else queries, seed=seed + 2) > 0
    there[:, seed % there.shape[1]] = True
    there = there if masked else torch.ones_like(there)
    mixed, weights = attention(tokens, context, there if masked else None, return_map=True)
    fused, no_map = attention(tokens, context, there if masked else None)
    assert no_map is None
    for window, its_tokens in enumerate(tokens.numpy()):
        heard = context[window].numpy() if crossed else its_tokens
        expected, expected_map = Parts(attention).attend("", heads, its_tokens, heard, there[window].numpy())
        np.testing.assert_allclose(mixed[window].detach(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(fused[window].detach(), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(weights[window].detach(), expected_map, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("crossed", [False, True])
def test_attention_against_torch(crossed):
    ours, theirs = seeded(lambda: Attention(12, 3)), nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(ours.projection.bias)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.projection.weight.data, ours.projection.bias.data
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    tokens, context = random(4, 5, 12), random(4, 7, 12, seed=1)
    attention_mask = random(4, 7 if crossed else 5, seed=2) > -0.5
    assert attention_mask.any(1).all() and not attention_mask.all()
    keys = context if crossed else tokens
    for there in (None, attention_mask):
        absent = None if there is None else ~there
        expected = theirs(tokens, keys, keys, absent, average_attn_weights=False)  # mixed, and the map
        found = ours(tokens, context if crossed else None, there, return_map=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("return_map", [False, True])
def test_gradients_of_attention(return_map):
    attention, inputs = seeded(lambda: Attention(4, 2)), (random(2, 2, 4), random(2, 3, 4, seed=1))
    attention_mask = torch.tensor([[True, False, True], [True, True, True]])
    assert gradients_as_finite_differences(
        attention, ["projection.weight", "projection.bias"], lambda found: found if return_map else found[0], *inputs,
        more=lambda: (attention_mask, return_map),
    )  # fmt: skip


@pytest.mark.parametrize("return_map", [False, True])
def test_an_absent_key_changes_nothing(return_map):
    attention = seeded(lambda: Attention(8, 2))
    tokens, context = random(2, 3, 8), random(2, 5, 8, seed=1)
    attention_mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    other = context.clone()
    other[0, 2], other[0, 4] = 1e3, -1e3
    mixed, _ = attention(tokens, context, attention_mask, return_map)
    assert torch.equal(mixed, attention(tokens, other, attention_mask, return_map)[0])
    without, _ = attention(tokens[:1], context[:1, attention_mask[0]], None, return_map)
    same(mixed[:1], without)  # as if they were not there at all


def test_attention_has_no_order():
    """Tokens in another order come out in that order; the order of the context is never seen."""
    attention, order = seeded(lambda: Attention(6, 3)), torch.tensor([3, 0, 4, 1, 2])
    tokens, context = random(2, 5, 6), random(2, 5, 6, seed=1)
    mixed, weights = attention(tokens, return_map=True)
    same(attention(tokens[:, order], return_map=True), (mixed[:, order], weights[:, :, order][..., order]))
    torch.testing.assert_close(attention(tokens, context[:, order])[0], attention(tokens, context)[0])


# --- the block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    values = random(1003, 401).requires_grad_()  # an odd number of entries
    dropped = Dropout(rate)(values)
    zero = dropped == 0
    share = zero.double().mean().item()
    assert abs(share - rate) < 4 * (rate * (1 - rate) / values.numel()) ** 0.5 + 1 / 65536
    torch.testing.assert_close(dropped[~zero], values[~zero] / (1 - rate), rtol=2e-4, atol=0)
    ones = Dropout(rate)(torch.ones(1003, 401, dtype=torch.float64))
    assert ones.mean().item() == pytest.approx(1, abs=4 * (rate / (1 - rate) / ones.numel()) ** 0.5)
    (gradient,) = torch.autograd.grad(dropped.sum(), values)
    torch.testing.assert_close(gradient * values, dropped)  # what was dropped has no gradient
    # neighbours are dropped independently: those whose bits came from one random number, and those of two rows
    for shift in (1, 2, 3, 401):
        flat = zero.flatten().double()
        correlation = np.corrcoef(flat[shift:].numpy(), flat[:-shift].numpy())[0, 1]
        assert abs(correlation) < 4 / values.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_of_every_dtype_shape_and_device(device, dtype):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("has no float64")
    for shape in [(), (1,), (5,), (2, 3, 7)]:
        values = torch.ones(shape, dtype=dtype, device=device)
        dropped = Dropout(0.5)(values)
        assert dropped.shape == values.shape and dropped.dtype == dtype and dropped.device.type == device
        assert ((dropped == 0) | (dropped == 2)).all()
    transposed = random(4, 6).mT
    assert Dropout(0.0)(transposed) is transposed and Dropout(0.5).eval()(transposed) is transposed
    kept = Dropout(0.5)(transposed)
    assert ((kept == 0) | (kept == 2 * transposed)).all()


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_dropout_of_nearly_nothing_and_nearly_everything(rate):
    dropped = Dropout(rate)(torch.ones(1000))
    assert dropped.isfinite().all() and (dropped != 0).double().mean().item() == pytest.approx(1 - rate, abs=0.01)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_feed_forward_against_numpy(batch, tokens, width, hidden, seed):
    module, x = seeded(lambda: feed_forward(width, hidden, dropout=0.5), seed).eval(), random(batch, tokens, width)
    expected = Parts(nn.ModuleDict({"it": module})).feed_forward("it", x.numpy())
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def copied_layer(block, width, heads, hidden):
    """torch's layer with a block's weights."""
    layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, activation="gelu", batch_first=True).double()
    attention, norms = block.attention, (block.attention_norm, block.feed_forward_norm)
    layer.self_attn.in_proj_weight.data = attention.projection.weight.data
    layer.self_attn.in_proj_bias.data = attention.projection.bias.data
    theirs = layer.self_attn.out_proj, layer.linear1, layer.linear2, layer.norm1, layer.norm2
    ours = attention.output, block.feed_forward[0], block.feed_forward[-1], *norms
    for one, other in zip(theirs, ours, strict=True):
        one.load_state_dict(other.state_dict())
    return layer


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_block_against_torch(mode):
    block = seeded(lambda: EncoderBlock(12, 3, 20, dropout=0.0 if mode == "train" else 0.4)).train(mode == "train")
    for norm in (block.attention_norm, block.feed_forward_norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    layer = copied_layer(block, 12, 3, 20).train(mode == "train")
    tokens = random(4, 5, 12).requires_grad_()
    (ours, no_map), theirs = block(tokens), layer(tokens)
    assert no_map is None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(ours.square().sum(), tokens)
    (expected,) = torch.autograd.grad(theirs.square().sum(), tokens)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)
    mapped, weights = block(tokens, return_map=True)
    torch.testing.assert_close(mapped, ours, rtol=0, atol=1e-12)
    assert weights.shape == (4, 3, 5, 5)


def test_the_two_residual_lines():
    """Without normalisation, and with both branches' last maps at zero, the block hands its tokens through."""
    block = seeded(lambda: EncoderBlock(6, 2, 8, dropout=0.3, norm=lambda width: nn.Identity()))
    for last in (block.attention.output, block.feed_forward[-1]):
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    tokens = random(3, 4, 6)
    assert torch.equal(block(tokens)[0], tokens)


def test_patches_end_with_the_series():
    assert patches(torch.arange(10.0), 4, 4).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert patches(torch.arange(10.0), 4, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: patches(torch.zeros(2, 10), 11, 1), ValueError, "patch_length must be at most 10,.*steps; got 11"),
        (lambda: patches(torch.zeros(2, 10), 0, 1), ValueError, "patch_length must be at least 1; got 0"),
        (lambda: patches(torch.zeros(2, 10), 2.0, 1), TypeError, "patch_length must be a whole number.*got 2.0"),
        (lambda: patches(torch.zeros(2, 10), 4, 0), ValueError, "stride must be at least 1; got 0"),
        (lambda: patches(torch.zeros(2, 10), 4, 5), ValueError, "stride must be at most 4, the patch_length.*got 5"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


# --- what must not slip through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [24, 96, 336])
@pytest.mark.parametrize("level", [123456.789, 1e6 + 0.1, 7.3, -0.1])
@pytest.mark.parametrize("share", [None, 1.0, 0.4])
def test_a_constant_becomes_0_in_float32(level, history, share):
    series = torch.full((3, history, 2), level)
    observed = {None: None, 1.0: torch.ones_like(series, dtype=torch.bool), 0.4: random(3, history, 2) < -0.25}[share]
    assert not normalise(series, observed)[0].any()


def test_a_variable_without_a_value_counts_as_constant():
    series, observed = torch.full((1, 6, 2), math.nan), torch.zeros(1, 6, 2, dtype=torch.bool)
    series[..., 1], observed[..., 1] = torch.arange(6.0), True
    scaled, _, _ = normalise(series, observed)
    assert not scaled[..., 0].any()
    torch.testing.assert_close(scaled[..., 1:], normalise(series[..., 1:])[0])


def test_dropout_compiles_whole():
    torch.manual_seed(0)
    dropped = torch.compile(Dropout(0.3), backend="aot_eager", fullgraph=True)(torch.ones(1000))
    assert 200 < (dropped == 0).sum() < 400


def test_encode_is_a_loop_that_returns_the_last_map():
    torch.manual_seed(0)
    blocks = nn.ModuleList(EncoderBlock(8, 2, 6, dropout=0.0) for _ in range(3)).double()
    tokens = random(2, 5, 8)
    expected = tokens
    for block in blocks:
        expected, attention = block(expected, return_map=True)
    got, last = encode(blocks, tokens, return_map=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(last, attention)
    assert encode(blocks, tokens)[1] is None


@pytest.mark.parametrize("keys", [2, 4, 5, 9], ids=lambda keys: f"{keys} keys, 4 features a head")
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_the_same_with_few_keys_and_with_many(keys, padded):
    """Few are computed as when the map is asked for, many by the fused product; out and gradient agree."""
    attention = seeded(lambda: Attention(8, 2), keys)
    tokens, context = random(3, 6, 8).requires_grad_(), random(3, keys, 8, seed=keys).requires_grad_()
    attention_mask = torch.arange(keys) < torch.tensor([[keys], [1], [2]]) if padded else None
    found = []
    for asked in (True, False):
        mixed, weights = attention(tokens, context, attention_mask, return_map=asked)
        assert (weights is not None) == asked
        found.append((mixed, *torch.autograd.grad(mixed.square().sum(), [tokens, context, *attention.parameters()])))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)

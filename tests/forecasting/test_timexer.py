"""TimeXer: by hand, by its symmetries, against float64 arithmetic written apart, and against another one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_impl.forecasting.layers import normalise
from mini_impl.forecasting.timexer import Output, TimeXer, documented_loss, published_loss
from mini_impl.losses import NonFiniteLoss
from tests.forecasting.by_numpy import Parts, gradients_as_finite_differences, positions
from tests.tensors import random, same

GOLDEN = Path(__file__).parents[1] / "golden" / "timexer.json"
SIZES = {"patch_length": 4, "width": 8, "heads": 2, "layers": 2, "feed_forward_width": 6}
SMALL = {"history": 12, "horizon": 5, "variables": 4, **SIZES}


def small(seed=0, **changes):
    """A model in float64 without dropout; all its weights random, those of the normalisations too."""
    torch.manual_seed(seed)
    model = TimeXer(**{**SMALL, "return_attention": True, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def same_weights(model, **changes):
    """Another model with the weights of this one."""
    other = small(**changes)
    other.load_state_dict(model.state_dict())
    return other


def equal(here, there, atol=1e-12):
    """Two Outputs hold the same numbers."""
    torch.testing.assert_close(here, there, rtol=0, atol=atol)


# --- the model --------------------------------------------------------------------------------------------------------


def test_parity_with_another_implementation():
    """Golden numbers made by tests/golden/make_timexer.py from neuralforecast's with the same weights."""
    for case in json.loads(GOLDEN.read_text())["cases"]:
        model = TimeXer(**case["model"], variable_token="learned", return_attention=True).double().eval()
        model.load_state_dict({name: torch.tensor(value).double() for name, value in case["weights"].items()})
        history = torch.tensor(case["input"], dtype=torch.float64)
        beside = None if case["exogenous"] is None else torch.tensor(case["exogenous"], dtype=torch.float64)
        maps = tuple(torch.tensor(map, dtype=torch.float64) for map in case["cross_attention"])
        equal(model(history, beside), Output(torch.tensor(case["prediction"], dtype=torch.float64), maps), atol=1e-5)


def by_numpy(model, history, exogenous, observed):
    """(prediction [horizon, endogenous], maps) of one window [time, variable], series by series and head by head."""
    parts, heads = Parts(model), model.layers[0].self_attention.heads
    mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-5)
    scaled = ((history - mean) / std).T
    others, there = [scaled[i] for i in model.exogenous], [True] * len(model.exogenous)
    for series, seen in zip(exogenous.T, observed.T, strict=True):
        there.append(seen.any())
        if seen.any():
            values = series[seen]
            others.append(np.zeros(model.history))
            others[-1][model.history - len(series) :][seen] = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    others = parts.linear("exogenous_embedding", np.stack(others))

    tokens = []
    for place, i in enumerate(model.endogenous):
        local = parts.linear("patch_embedding", scaled[i].reshape(-1, model.patch_length))
        if "learned_token" in parts.weights:
            whole = parts.weights["learned_token"][place, 0]
        else:
            whole = parts.linear("variable_embedding", scaled[i])
        tokens.append(np.vstack([local + positions(*local.shape), whole]))

    maps = []
    for depth in range(len(model.layers)):
        name = f"layers.{depth}."
        tokens = [
            parts.norm(f"{name}self_norm", x + parts.attend(f"{name}self_attention.", heads, x, x)[0]) for x in tokens
        ]
        variable = np.stack([x[-1] for x in tokens])
        mixed, some = parts.attend(f"{name}cross_attention.", heads, variable, others)
        variable = parts.norm(f"{name}cross_norm", variable + mixed)
        tokens = [np.vstack([x[:-1], one]) for x, one in zip(tokens, variable, strict=True)]
        fed = [x + parts.feed_forward(f"{name}feed_forward", x) for x in tokens]
        tokens = [parts.norm(f"{name}feed_forward_norm", x) for x in fed]
        maps.append(np.zeros((heads, len(tokens), len(there))))
        maps[-1][..., np.array(there)] = some
    forecast = np.stack([parts.linear("head", parts.norm("norm", x).ravel()) for x in tokens])
    return forecast.T * std[model.endogenous] + mean[model.endogenous], maps


ROLES = [(1, None), (3, None), (1, 0), (4, -1), (4, (2, 0)), (3, (0, 1, 2))]  # variables, and the endogenous ones
batches = st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 12))


@given(batches, st.sampled_from(ROLES), st.sampled_from([(8, 2, 1), (6, 3, 2)]), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40)
def test_the_model_against_numpy(sizes, roles, shape, learned, seed):
    (batch, beside, steps), (variables, endogenous), (width, heads, layers) = sizes, roles, shape
    choices = {"variable_token": "learned" if learned else "series", "width": width, "heads": heads, "layers": layers}
    model = small(seed, variables=variables, endogenous=endogenous, **choices)
    history = 7 * random(batch, 12, variables, seed=seed) + 100
    beside += not model.exogenous and not beside  # there must be one
    exogenous, observed = 3 * random(batch, steps, beside, seed=seed) - 5, random(batch, steps, beside, seed=1) > 0
    if not model.exogenous:
        observed[:, -1, 0] = True
    extra = (exogenous.where(observed, math.nan), observed) if beside else ()
    output = model(history, *extra)
    for i in range(batch):
        prediction, maps = by_numpy(model, history[i].numpy(), exogenous[i].numpy(), observed[i].numpy())
        np.testing.assert_allclose(output.prediction[i].detach(), prediction, rtol=1e-8, atol=1e-8)
        for ours, theirs in zip(output.cross_attention, maps, strict=True):
            np.testing.assert_allclose(ours[i].detach(), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("variable_token", ["series", "learned"])
def test_documented_steps_and_their_shapes(variable_token):
    model = small(endogenous=-1, variable_token=variable_token)
    history = random(3, 12, 4)
    scaled, mean, std = normalise(history)
    tokens = model.embed(scaled[..., 3:])  # 1. N patches and a variable token
    assert tokens.shape == (3, 1, 12 // 4 + 1, 8)
    _, grid = model.layers[0].self_attention(tokens[:, 0], return_map=True)  # 2. (N + 1) x (N + 1)
    assert grid.shape == (3, 2, 4, 4)
    others, attention_mask = model.embed_exogenous(scaled[..., :3], None, None)  # 3. C variable tokens, a 1 x C grid
    assert others.shape == (3, 3, 8) and attention_mask is None
    maps = []
    for layer in model.layers:
        tokens, attention, own = layer(tokens, others, None, True, True)
        assert own.shape == (3, 2, 4, 4)
        maps.append(attention)
    assert [attention.shape for attention in maps] == [(3, 2, 1, 3)] * 2
    forecast = model.head(model.norm(tokens).flatten(2)).mT * std[..., 3:] + mean[..., 3:]  # 4. read out
    equal(model(history), Output(forecast, tuple(maps)), atol=0)


def test_the_map_among_the_tokens_of_a_variable_by_hand():
    """softmax(Q K' / sqrt(head_dim)) of the first layer; rows sum to 1; the forecast does not change."""
    model = small(endogenous=(0, 2), return_self_attention=True)
    history = random(3, 12, 4)
    output = model(history)
    assert [tuple(grid.shape) for grid in output.self_attention] == [(3, 2, 2, 4, 4)] * 2
    tokens = model.embed(normalise(history)[0][..., [0, 2]])  # [batch, endogenous, patch + 1, width]
    attention = model.layers[0].self_attention
    query, key, _ = (part.unflatten(-1, (2, 4)).transpose(2, 3) for part in attention.projection(tokens).chunk(3, -1))
    by_hand = (query @ key.mT / 4**0.5).softmax(-1)
    torch.testing.assert_close(output.self_attention[0], by_hand)
    torch.testing.assert_close(output.self_attention[1].sum(-1), torch.ones(3, 2, 2, 4, dtype=torch.float64))
    model.return_self_attention = False
    assert model(history).self_attention is None
    torch.testing.assert_close(model(history).prediction, output.prediction)


def test_the_learned_token_is_the_same_for_all_windows():
    scaled = random(3, 12, 4)
    learned = small(variable_token="learned").embed(scaled)[:, :, -1]  # [batch, variable, width]
    assert (learned == learned[:1]).all() and not torch.equal(learned[:, 0], learned[:, 1])
    series = small(variable_token="series").embed(scaled)[:, :, -1]
    assert not torch.isclose(series[0], series[1]).any()
    torch.testing.assert_close(series, small().variable_embedding(scaled.mT))


def test_patches_know_their_places():
    """The same values in another order are other tokens, by the positions; the variable token gets no position."""
    model, one = small(), torch.ones(1, 12, 1, dtype=torch.float64)
    tokens = model.embed(one)[0, 0]
    differences = tokens[1:3] - tokens[:2]  # only the positions differ: sin and cos of 0, 1, 2
    angles = torch.arange(3, dtype=torch.float64)[:, None] * torch.tensor([1, 0.1, 0.01, 0.001], dtype=torch.float64)
    torch.testing.assert_close(differences[:, 0::2], angles.sin().diff(dim=0))
    torch.testing.assert_close(differences[:, 1::2], angles.cos().diff(dim=0))


# --- which series are which -------------------------------------------------------------------------------------------


@given(st.permutations(range(3)), st.permutations(range(2)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_exogenous_series_are_a_set(order, beside, seed):
    """In another order they make the same forecast, and the columns of the attention change places."""
    model = small(endogenous=1)
    history, more = random(2, 12, 4, seed=seed), random(2, 9, 2, seed=seed + 1)
    observed = random(2, 9, 2, seed=seed + 2) > -0.5
    places = [model.exogenous[i] for i in order]
    moved = history.clone()
    moved[..., model.exogenous] = history[..., places]
    here = model(history, more, observed)
    there = model(moved, more[..., beside], observed[..., beside])
    columns = [*order, *(3 + i for i in beside)]
    equal(Output(here.prediction, tuple(map[..., columns] for map in here.cross_attention)), there)


@given(st.permutations(range(3)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_endogenous_series_are_treated_alike(order, seed):
    """Named, or stored, in another order: forecasts and rows of the attention in that order."""
    history, names = random(2, 12, 5, seed=seed), [4, 0, 2]
    model = small(variables=5, endogenous=names)
    here = model(history)
    there = same_weights(model, variables=5, endogenous=[names[i] for i in order])(history)
    rows = tuple(map[:, :, order] for map in here.cross_attention)
    equal(Output(here.prediction[..., order], rows), there)
    stored = history.clone()
    stored[..., names] = history[..., [names[i] for i in order]]
    equal(model(stored), there)


@given(st.permutations(range(4)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_all_variables_as_both(order, seed):
    model, history = small(), random(2, 12, 4, seed=seed)
    here, there = model(history), model(history[..., order])
    maps = tuple(map[:, :, order][..., order] for map in here.cross_attention)
    equal(Output(here.prediction[..., order], maps), there)


def test_a_learned_token_belongs_to_its_variable():
    model, history = small(variable_token="learned"), random(2, 12, 4)
    here, there = model(history), model(history.flip(-1))
    assert not torch.isclose(there.prediction, here.prediction.flip(-1)).any()


@pytest.mark.parametrize("variable_token", ["series", "learned"])
def test_ways_to_name_the_endogenous(variable_token):
    history = random(2, 12, 4)
    model = small(endogenous=3, variable_token=variable_token)
    assert (model.endogenous, model.exogenous) == ([3], [0, 1, 2])
    for name in (-1, [3], (-1,), np.int64(3), range(3, 4)):
        equal(same_weights(model, endogenous=name, variable_token=variable_token)(history), model(history), atol=0)
    everything = small(variable_token=variable_token)
    assert (everything.endogenous, everything.exogenous) == ([0, 1, 2, 3], [0, 1, 2, 3])
    all_named = small(endogenous=(0, 1, 2, 3), variable_token=variable_token)
    assert (all_named.endogenous, all_named.exogenous) == ([0, 1, 2, 3], [])
    # so named they are not exogenous; given beside the history once more, they are
    all_named.load_state_dict(everything.state_dict())
    equal(all_named(history, history), everything(history))


@pytest.mark.parametrize("variable_token", ["series", "learned"])
@pytest.mark.parametrize("layers", [1, 3])
def test_beside_the_history_or_in_it(variable_token, layers):
    """The same weights serve: which way a series comes in makes no difference."""
    history = random(3, 12, 4)
    choices = {"variable_token": variable_token, "layers": layers}
    inside = small(endogenous=0, **choices)
    expected = inside(history)
    for kept in (1, 2, 3):
        model = same_weights(inside, variables=kept, endogenous=0, **choices)
        beside = history[..., kept:]
        equal(model(history[..., :kept], beside), expected)
        equal(model(history[..., :kept], beside, torch.ones_like(beside, dtype=torch.bool)), expected)


def test_the_level_and_unit_of_an_exogenous_series_do_not_matter():
    model, history, beside = small(), random(3, 12, 4), 1e3 * random(3, 12, 2)
    equal(model(history, 50 * beside - 1e4), model(history, beside), atol=1e-7)


def test_only_variable_tokens_hear_of_the_exogenous():
    """In one layer the exogenous series move the variable token and nothing else; in two the patches hear of it."""
    for layers, patches_move in ((1, False), (2, True)):
        model = small(layers=layers, endogenous=0)
        tokens, one, other = random(2, 1, 4, 8), *random(2, 2, 3, 8, seed=1)
        moved = []
        for others in (one, other):
            out = tokens
            for layer in model.layers:
                out, *_ = layer(out, others, None, False, False)
            moved.append(out)
        differ = (moved[0] - moved[1]).abs().amax((0, 1, 3)) > 1e-9  # [patch + 1]
        assert differ.tolist() == [patches_move] * 3 + [True]


def test_endogenous_series_hear_of_one_another_only_as_exogenous():
    history = random(2, 12, 4)
    other = history.clone()
    other[..., 1] = random(2, 12, seed=7)
    for endogenous, hears in (((0, 1), False), (None, True)):
        model = small(endogenous=endogenous)
        moved = (model(other).prediction - model(history).prediction)[..., 0].abs().max() > 1e-9
        assert moved == hears


# --- missing values ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 11), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_short_series_is_one_whose_beginning_is_missing(steps, holes, seed):
    model, history, beside = small(endogenous=0), random(2, 12, 4, seed=seed), random(2, steps, 2, seed=seed + 1)
    observed = random(2, steps, 2, seed=seed) > 0 if holes else torch.ones(2, steps, 2, dtype=torch.bool)
    before = beside.new_full((2, 12 - steps, 2), math.nan)
    whole = torch.cat([before, beside], 1), torch.cat([torch.zeros_like(before, dtype=torch.bool), observed], 1)
    equal(model(history, beside, observed if holes else None), model(history, *whole))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300, 5.0])
@pytest.mark.parametrize("return_attention", [True, False])
def test_what_stands_where_a_value_is_missing_does_not_matter(bad, return_attention):
    model = small(endogenous=0, return_attention=return_attention)
    history, beside = random(3, 12, 4), random(3, 8, 2)
    observed = random(3, 8, 2, seed=1) > 0
    observed[1, :, 0] = False  # not a single value
    expected = model(history, beside, observed)
    spoilt = beside.where(observed, bad).requires_grad_()
    output = model(history, spoilt, observed)
    torch.testing.assert_close(output.prediction, expected.prediction, rtol=0, atol=0)
    output.prediction.square().sum().backward()
    for x in (spoilt, *model.parameters()):
        assert torch.isfinite(x.grad).all()
    assert not spoilt.grad[~observed].any() and spoilt.grad[observed].abs().max() > 0


@pytest.mark.parametrize("return_attention", [True, False])
def test_a_series_without_a_value_is_not_there(return_attention):
    """Attention 0, and the same forecast as without it; in other windows it counts."""
    choices = {"endogenous": 0, "return_attention": return_attention}
    model, history, beside = small(**choices), random(3, 12, 4), random(3, 12, 2)
    observed = torch.ones_like(beside, dtype=torch.bool)
    observed[1, :, 1] = False
    here, there, alone = model(history, beside, observed), model(history, beside), model(history, beside[..., :1])
    torch.testing.assert_close(here.prediction[1], alone.prediction[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(here.prediction[::2], there.prediction[::2], rtol=0, atol=1e-12)
    assert (there.prediction[1] - here.prediction[1]).abs().max() > 1e-6
    if return_attention:
        for map, without in zip(here.cross_attention, alone.cross_attention, strict=True):
            assert (map[1, ..., -1] == 0).all() and (map[::2] > 0).all()
            torch.testing.assert_close(map[1, ..., :-1], without[1], rtol=0, atol=1e-12)
            torch.testing.assert_close(map.sum(-1), torch.ones(3, 2, 1, dtype=torch.float64))


def test_nothing_but_missing_series_beside_those_in_the_history():
    model, history = small(endogenous=0), random(2, 12, 4)
    nothing = torch.full((2, 6, 2), math.nan, dtype=torch.float64)
    output = model(history, nothing, torch.zeros_like(nothing, dtype=torch.bool))
    torch.testing.assert_close(output.prediction, model(history).prediction, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_on_the_way_back_either():
    model, history = small(endogenous=0), random(2, 12, 4)
    beside = torch.full((2, 12, 3), math.nan, dtype=torch.float64)
    observed = torch.zeros_like(beside, dtype=torch.bool)
    observed[:, -1, 1], beside[:, -1, 1] = True, 3.0  # one value alone
    observed[:, ::2, 2], beside[:, ::2, 2] = True, 4.0  # a constant
    beside.requires_grad_()
    with torch.autograd.detect_anomaly():
        documented_loss(model(history, beside, observed), random(2, 5, 1), 0.1).total.backward()
    assert torch.isfinite(beside.grad).all()


def test_a_single_value_or_a_constant_tell_nothing():
    """Both are as far from their mean as can be: not at all. Their tokens are the embedding's bias."""
    model = small(endogenous=0)
    beside = torch.full((1, 12, 2), 7.0, dtype=torch.float64)
    observed = torch.ones_like(beside, dtype=torch.bool)
    observed[0, :-1, 0] = False
    tokens, attention_mask = model.embed_exogenous(torch.zeros(1, 12, 0, dtype=torch.float64), beside, observed)
    assert attention_mask.all()
    torch.testing.assert_close(tokens, model.exogenous_embedding.bias.expand(1, 2, 8))


# --- what any model does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["maps", "projections"])
def test_attention_is_only_looked_at(form):
    """With the fused product or the plain one, with a mask or without: the forecast is the same."""
    model, history, beside = small(attention_form=form), random(3, 12, 4), random(3, 12, 2)
    without = same_weights(model, return_attention=False, attention_form=form)
    observed = random(3, 12, 2, seed=1) > -1
    for extra in ((), (beside,), (beside, observed)):
        here, there = model(history, *extra), without(history, *extra)
        assert there.cross_attention is None and here.cross_attention is not None
        torch.testing.assert_close(here.prediction, there.prediction, rtol=0, atol=1e-12)


def test_projections_are_the_layers_own_weights():
    model = small(attention_form="projections", layers=3)
    matrices = model(random(2, 12, 4)).cross_attention
    assert [matrix.shape for matrix in matrices] == [(3, 8, 8)] * 3
    for layer, matrix in zip(model.layers, matrices, strict=True):
        weight = layer.cross_attention.projection.weight
        assert torch.equal(matrix.flatten(0, 1), weight) and matrix.data_ptr() == weight.data_ptr()
    one, other = random(2, 8), random(5, 8, seed=1)  # query, key and value, in this order
    parts = model.layers[0].cross_attention._project(one[None], other[None])
    biases = model.layers[0].cross_attention.projection.bias.view(3, 8)
    for part, tokens, matrix, bias in zip(parts, (one, other, other), matrices[0], biases, strict=True):
        torch.testing.assert_close(part[0].transpose(0, 1).flatten(1), tokens @ matrix.mT + bias)


def test_another_level_and_unit_move_the_forecast_alike():
    """The 1e-5 in the standard deviation is in no unit, so all but the last digits are the same."""
    model, history = small(), 100 * random(2, 12, 4)
    unit = torch.tensor([0.1, 1, 7, 1000], dtype=torch.float64)  # each variable has its own
    level = torch.tensor([5e4, 0, -3, 1e3], dtype=torch.float64)
    moved = model(unit * history + level).prediction
    torch.testing.assert_close((moved - level) / unit, model(history).prediction, rtol=0, atol=1e-3)


def beside(device):
    """Three series beside the history, one of them without a value in the third window, and their mask."""
    observed = random(4, 9, 3, seed=1) > 0
    observed[2, :, 1] = False
    return random(4, 9, 3).to(device), observed.to(device)


def test_exogenous_series_on_every_device(device):
    model, history = small().float(), random(4, 12, 4, dtype=torch.float32)
    more, observed = beside("cpu")
    here = model(history, more.float(), observed)
    there = model.to(device)(history.to(device), more.float().to(device), observed.to(device))
    same(there.prediction.cpu(), here.prediction, tolerance=1e-4)
    same([map.cpu() for map in there.cross_attention], list(here.cross_attention), tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch's own, about functions that it looks through
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_with_exogenous_series(masked):
    model, history, (more, observed) = small(), random(4, 12, 4), beside("cpu")
    given_beside = (more, observed) if masked else (more,)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    equal(compiled(history, *given_beside), model(history, *given_beside))


# --- the losses -------------------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    target = torch.zeros(1, 2, 1, dtype=torch.float64)
    prediction = torch.tensor([[[1.0], [3.0]]], dtype=torch.float64)
    row = torch.tensor([[0.5, 0.5]], dtype=torch.float64)  # W'W - I = [[-3/4, 1/4], [1/4, -3/4]]: 5/4
    matrix = torch.tensor([[[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)  # 3 and 0
    loss = documented_loss(Output(prediction, (row, matrix)), target, orthogonality_weight=2.0)
    assert loss.values() == {"forecast": (1 + 9) / 2, "orthogonality": 2 * (1.25 + (3 + 0) / 2)}
    assert loss.total.item() == 5 + 5.5
    assert published_loss(Output(prediction), target).total.item() == 5


counts = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


@given(counts, st.floats(0, 100), st.integers(0, 10**6))
def test_losses_against_numpy(count, weight, seed):
    windows, heads, endogenous, exogenous, layers = count
    prediction, target = 2 * random(2, windows, 4, endogenous, seed=seed)
    maps = random(layers, windows, heads, endogenous, exogenous, seed=seed + 1).softmax(-1)
    forecast = sum((target.numpy() - prediction.numpy()).ravel() ** 2) / target.numel()
    penalty = 0.0
    for layer in maps.numpy():
        matrices = layer.reshape(-1, endogenous, exogenous)
        penalty += sum(np.linalg.norm(w.T @ w - np.eye(exogenous)) ** 2 for w in matrices) / len(matrices)
    output = Output(prediction, tuple(maps))
    loss = documented_loss(output, target, weight)
    assert loss.terms["forecast"].item() == pytest.approx(forecast, rel=1e-10)
    assert loss.terms["orthogonality"].item() == pytest.approx(weight * penalty, rel=1e-10, abs=1e-12)
    assert published_loss(output, target).total.item() == pytest.approx(forecast, rel=1e-10)


def test_a_weight_of_zero_leaves_the_forecast_alone():
    prediction, target = random(2, 3, 4, 1)
    maps = random(3, 2, 1, 5).softmax(-1).requires_grad_()
    loss = documented_loss(Output(prediction, (maps,)), target, 0)
    assert loss.terms["orthogonality"] == 0 and loss.total == loss.terms["forecast"]
    loss.total.backward()
    assert maps.grad.abs().max() == 0


@given(st.integers(1, 6), st.integers(1, 3), st.floats(0.01, 10), st.integers(0, 10**6))
def test_the_floor_of_one_row(exogenous, layers, weight, seed):
    """lambda (C - 1) a layer for 1 x C maps: reached by a row that picks one variable; all else lies above."""
    target = torch.zeros(1, 1, 1, dtype=torch.float64)

    def term(row):
        return documented_loss(Output(target, (row.view(1, 1, 1, -1),) * layers), target, weight).total.item()

    floor = layers * weight * (exogenous - 1)
    assert term(torch.eye(exogenous, dtype=torch.float64)[seed % exogenous]) == pytest.approx(floor)
    row = random(exogenous, seed=seed).softmax(-1)
    assert term(row) == pytest.approx(floor + layers * weight * (1 - row.square().sum().item()) ** 2)
    uniform = torch.full((exogenous,), 1 / exogenous, dtype=torch.float64)
    assert term(uniform) == pytest.approx(floor + layers * weight * (1 - 1 / exogenous) ** 2)
    assert floor <= term(row) + 1e-9 <= term(uniform) + 2e-9  # of all rows uniform attention pays most


@pytest.mark.parametrize("endogenous", [None, 0])
def test_uniform_attention_pays_by_formula(endogenous):
    """Where all exogenous tokens are one, W is 1/C throughout; N such rows pay (N/C - 1)^2 + C - 1 a layer."""
    model = small(endogenous=endogenous)
    with torch.no_grad():
        model.exogenous_embedding.weight.zero_()
    output = model(random(2, 12, 4))
    rows, columns = len(model.endogenous), len(model.exogenous)
    for map in output.cross_attention:
        torch.testing.assert_close(map, torch.full_like(map, 1 / columns))
    loss = documented_loss(output, random(2, 5, rows), 0.5)
    expected = 0.5 * 2 * ((rows / columns - 1) ** 2 + columns - 1)
    assert loss.terms["orthogonality"].item() == pytest.approx(expected)


def test_one_exogenous_variable_gets_all_the_attention():
    """A 1 x 1 map is 1, whatever is trained: the second term is 0 and has no gradient."""
    model = small(variables=2, endogenous=0)
    output = model(random(2, 12, 2))
    assert all((map == 1).all() for map in output.cross_attention)
    loss = documented_loss(output, random(2, 5, 1), 1.0)
    assert loss.terms["orthogonality"] == 0
    loss.terms["orthogonality"].backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def reached(model):
    """The names of the weights that the documented loss's second term moves."""
    model.zero_grad()
    target = random(2, 5, len(model.endogenous))
    documented_loss(model(random(2, 12, 4)), target, 1.0).terms["orthogonality"].backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}


@pytest.mark.parametrize("endogenous", [None, 0])
def test_what_the_second_term_trains(endogenous):
    projections = small(endogenous=endogenous, attention_form="projections")
    assert reached(projections) == {f"layers.{i}.cross_attention.projection.weight" for i in range(2)}
    # as maps: all that comes before them; what reads out a map, or comes after the last, is left out
    maps = small(endogenous=endogenous)
    names = reached(maps)
    after = "norm.", "head.", "layers.1.feed_forward", "layers.1.cross_norm", "layers.1.cross_attention.output"
    assert names == {name for name, _ in maps.named_parameters() if not name.startswith(after)}
    query, key, value = maps.layers[1].cross_attention.projection.weight.grad.view(3, 8, 8)
    assert query.any() and key.any() and not value.any()


@pytest.mark.parametrize("shape", [(2, 2, 1, 3), (2, 1, 3, 2), (3, 4, 4)])
def test_gradients_of_the_losses(shape):
    prediction, target = 2 * random(2, 2, 3, 2)
    parts = [part.requires_grad_() for part in (prediction, random(*shape), random(*shape, seed=1))]
    assert torch.autograd.gradcheck(lambda p, *maps: documented_loss(Output(p, maps), target, 0.7).total, parts)
    assert torch.autograd.gradcheck(lambda p: published_loss(Output(p), target).total, parts[:1])


WAYS = [("series", "maps"), ("learned", "maps"), ("series", "projections"), ("learned", None)]


@pytest.mark.parametrize(("variable_token", "form"), WAYS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_model(variable_token, form, masked):
    """From loss to input, exogenous series and weights here and there, against finite differences."""
    sizes = {"history": 4, "horizon": 2, "variables": 2, "patch_length": 2, "width": 4, "feed_forward_width": 3}
    choices = {"variable_token": variable_token, "return_attention": bool(form), "attention_form": form or "maps"}
    model = small(**sizes, endogenous=0, **choices)
    names = ["patch_embedding.weight", "exogenous_embedding.weight", "layers.0.cross_attention.projection.weight"]
    names += ["layers.1.cross_norm.weight", "head.bias"]
    names += ["learned_token" if variable_token == "learned" else "variable_embedding.bias"]
    target, observed = random(2, 2, 1, seed=1), random(2, 3, 2, seed=4) > 0
    assert not observed.all() and observed.any()

    def loss(output):
        return (documented_loss(output, target, 0.1) if form else published_loss(output, target)).total

    if form == "projections":  # functional_call replaces what projections() reads, too
        assert model.projections()[0].shape == (3, 4, 4)
    assert gradients_as_finite_differences(
        model, names, loss, random(2, 4, 2), random(2, 3, 2, seed=2), more=lambda: (observed,) if masked else ()
    )


# --- the ends of what goes in -----------------------------------------------------------------------------------------


ENDS = [
    (1, {}), (3, {"variables": 1}), (2, {"horizon": 40, "endogenous": -1}), (2, {"patch_length": 12}),
    (1, {"variables": 1, "history": 1, "patch_length": 1, "horizon": 1}),  # one step: every window is constant
    (2, {"patch_length": 1, "layers": 1, "heads": 8}), (2, {"width": 7, "heads": 7}),  # odd: a sine more than cosines
]  # fmt: skip


@pytest.mark.parametrize(("batch", "changes"), ENDS)
@pytest.mark.parametrize("variable_token", ["series", "learned"])
def test_the_smallest_and_the_odd(batch, changes, variable_token):
    model = small(**changes, variable_token=variable_token)
    history = random(batch, model.history, model.variables).requires_grad_()
    output = model(history)
    assert output.prediction.shape == (batch, model.horizon, len(model.endogenous))
    documented_loss(output, random(*output.prediction.shape), 0.1).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in (history, *model.parameters()))


@pytest.mark.parametrize("level", [0.0, 1.0, -1e6])
@pytest.mark.parametrize("endogenous", [None, 0])
def test_constant_windows(level, endogenous):
    model = small(endogenous=endogenous)
    history = torch.full((2, 12, 4), level, dtype=torch.float64, requires_grad=True)
    beside = torch.full((2, 6, 1), level, dtype=torch.float64, requires_grad=True)
    output = model(history, beside)
    columns = len(model.exogenous) + 1
    for map in output.cross_attention:  # nothing to tell them apart by
        torch.testing.assert_close(map, torch.full_like(map, 1 / columns))
    torch.testing.assert_close(output.prediction, output.prediction[:1, :, :1].expand_as(output.prediction))
    assert (output.prediction - level).abs().max() < 1  # the deviation that it is multiplied by is 0.003
    documented_loss(output, random(*output.prediction.shape), 0.1).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in (history, beside, *model.parameters()))


GOOD, BESIDE, TARGET = torch.zeros(2, 12, 4), torch.zeros(2, 8, 3), torch.zeros(2, 5, 1)
SEEN = torch.ones(2, 8, 3, dtype=torch.bool)
ONCE = SEEN & torch.tensor([True, False])[:, None, None]  # in the first window alone


def made(**changes):
    return TimeXer(**{**SMALL, **changes})


def called(*more):
    return made(endogenous=0)(GOOD, *more)


def loss_with(matrices):
    return documented_loss(Output(TARGET, matrices), TARGET)


def spoilt(place, value=math.nan):
    bad = BESIDE.clone()
    bad[place] = value
    return bad


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: made(patch_length=13), ValueError, "patch_length must be at most 12, the history; got 13"),
        (lambda: made(patch_length=0), ValueError, "patch_length must be at least 1; got 0"),
        (lambda: made(endogenous=4), ValueError, "endogenous must be an index from -4 to 3.*got 4"),
        (lambda: made(endogenous="0"), TypeError, "endogenous must be.*got '0'"),
        (lambda: made(endogenous=range(4))(GOOD), ValueError, "history holds no.*give some, or.* with endogenous=None"),
        (lambda: called(torch.zeros(2, 13, 1)), ValueError, "steps of exogenous must be at most 12.*history; got 13"),
        (lambda: called(BESIDE[:1]), ValueError, r"exogenous.* and history.* must have one shape; got \[1\] and \[2\]"),
        (lambda: called(BESIDE.double()), TypeError, "exogenous.*one dtype; got torch.float64 and torch.float32"),
        (lambda: called(BESIDE.to("meta")), ValueError, "exogenous.*one device; got meta and cpu"),
        (lambda: called(BESIDE[..., :0]), ValueError, r"exogenous.*variable\], no axis empty; got shape \[2, 8, 0\]"),
        (lambda: called(BESIDE.tolist()), TypeError, "exogenous.*got list"),
        (lambda: called(spoilt((0, 0, 0))), ValueError, "exogenous must hold finite numbers only; 1 of its 48"),
        (lambda: called(spoilt((1, 2, 0), math.inf), SEEN), ValueError, "exogenous must hold finite.*1 of its 48"),
        (lambda: called(None, SEEN), ValueError, "exogenous_mask needs the exogenous series.*exogenous=None"),
        (lambda: called(BESIDE, SEEN[..., :1]), ValueError, r"exogenous_mask.*\[2, 8, 3\].*got torch.bool \[2, 8, 1\]"),
        (lambda: called(BESIDE, SEEN.to("meta")), ValueError, "exogenous_mask and exogenous.*one device"),
        (lambda: made(endogenous=range(4))(GOOD, BESIDE, ONCE), ValueError, r"exogenous_mask counts no .*rows \[1\]"),
        (lambda: loss_with(TARGET), TypeError, "cross_attention must be a tuple of one matrix a layer; got Tensor"),
        (lambda: loss_with((TARGET, TARGET[0, 0])), ValueError, r"cross_attention\[1\] must be.*\[.., row, column\]"),
        (lambda: loss_with((TARGET / 0,)).values(), NonFiniteLoss, "term 'orthogonality'.*nan"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

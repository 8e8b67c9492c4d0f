"""iTransformer: by hand, by its symmetries, against float64 arithmetic written apart, and against another one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_impl.forecasting.itransformer import ITransformer, Output, documented_loss, published_loss
from mini_impl.losses import NonFiniteLoss
from tests.forecasting.by_numpy import Parts, gelu, gradients_as_finite_differences
from tests.tensors import random

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer.json"
SMALL = {"history": 12, "horizon": 5, "width": 8, "heads": 2, "layers": 2, "feed_forward_width": 6}


def small(seed=0, **changes):
    """A model in float64 without dropout; all its weights random, those of the normalisations too."""
    torch.manual_seed(seed)
    model = ITransformer(**{**SMALL, "return_attention": True, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


# --- the model --------------------------------------------------------------------------------------------------------


def test_parity_with_another_implementation():
    """Golden numbers made by tests/golden/make_itransformer.py from neuralforecast's with the same weights."""
    for case in json.loads(GOLDEN.read_text())["cases"]:
        expected = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("prediction", "attention")}
        model = ITransformer(**case["model"], return_attention=True).double().eval()
        model.load_state_dict({name: torch.tensor(value).double() for name, value in case["weights"].items()})
        output = model(torch.tensor(case["input"], dtype=torch.float64))
        torch.testing.assert_close(output.prediction, expected["prediction"], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.attention, expected["attention"], rtol=0, atol=1e-6)


def by_numpy(model, history):
    """(prediction, embedding, attention of the last layer) of one window [time, variable], head by head."""
    parts = Parts(model)
    mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-5)
    series = ((history - mean) / std).T
    if "embedding.weight" in parts.weights:
        tokens = embedding = parts.linear("embedding", series)
    else:
        tokens = embedding = parts.linear("embedding.2", gelu(parts.linear("embedding.0", series)))
    for i, block in enumerate(model.blocks):
        mixed, maps = parts.attend(f"blocks.{i}.attention.", block.attention.heads, tokens, tokens)
        tokens = parts.norm(f"blocks.{i}.attention_norm", tokens + mixed)
        fed = parts.feed_forward(f"blocks.{i}.feed_forward", tokens)
        tokens = parts.norm(f"blocks.{i}.feed_forward_norm", tokens + fed)
    forecast = parts.linear("projection", parts.norm("norm", tokens))
    return forecast.T * std + mean, embedding, maps


sizes = st.tuples(st.integers(1, 4), st.sampled_from([(4, 1), (8, 2), (6, 3)]), st.integers(1, 3))


@given(st.integers(1, 3), sizes, st.sampled_from(["linear", "mlp"]), st.integers(0, 10**6))
@settings(max_examples=30)
def test_the_model_against_numpy(batch, size, embedding, seed):
    variables, (width, heads), layers = size
    model = small(seed, width=width, heads=heads, layers=layers, embedding=embedding)
    history = 7 * random(batch, 12, variables, seed=seed) + 100
    output = model(history)
    for i, window in enumerate(history.numpy()):
        for ours, expected in zip(output, by_numpy(model, window), strict=True):
            np.testing.assert_allclose(ours[i].detach(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("embedding", ["linear", "mlp"])
@given(st.permutations(range(5)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_variables_are_a_set(embedding, order, seed):
    """Permuted variables: permuted forecasts, embeddings, and rows and columns of the attention."""
    model, history = small(embedding=embedding), random(2, 12, 5, seed=seed)
    here, there = model(history), model(history[..., order])
    moved = Output(here.prediction[..., order], here.embedding[:, order], here.attention[:, :, order][..., order])
    torch.testing.assert_close(there, moved, rtol=0, atol=1e-12)


def test_variables_do_mix_and_windows_do_not():
    model, history = small(), random(3, 12, 4)
    other = history.clone()
    other[1, :, 2] = random(12, seed=5)
    changed = (model(other).prediction - model(history).prediction).abs().amax(1) > 1e-6  # [batch, variable]
    assert changed.tolist() == [[False] * 4, [True] * 4, [False] * 4]


@given(st.floats(-1e4, 1e4), st.floats(0.1, 1e3), st.integers(0, 10**6))
@settings(max_examples=20)
def test_another_level_and_unit_move_the_forecast_alike(level, unit, seed):
    """The 1e-5 in the standard deviation is in no unit, so all but the last digits are the same."""
    model, history = small(), 100 * random(2, 12, 3, seed=seed)
    moved = model(unit * history + level).prediction
    torch.testing.assert_close((moved - level) / unit, model(history).prediction, rtol=0, atol=1e-3)


@pytest.mark.parametrize("embedding", ["linear", "mlp"])
def test_the_map_is_only_looked_at(embedding):
    with_map, without = small(embedding=embedding), small(embedding=embedding, return_attention=False)
    here, there = with_map(random(3, 12, 4)), without(random(3, 12, 4))
    torch.testing.assert_close(here.prediction, there.prediction, rtol=0, atol=1e-12)
    torch.testing.assert_close(here.embedding, there.embedding, rtol=0, atol=0)
    assert there.attention is None and here.attention is not None


def test_embeddings_are_linear_or_not():
    a, b = random(2, 1, 12, 3)
    for embedding, linear in (("linear", True), ("mlp", False)):
        embed = small(embedding=embedding).embedding
        parts = embed(a.mT) + embed(b.mT) - embed(torch.zeros_like(a).mT)
        assert torch.allclose(embed((a + b).mT), parts) == linear


# --- the losses -------------------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    target = torch.zeros(1, 2, 2, dtype=torch.float64)
    prediction = torch.tensor([[[0.5, 1.0], [-3.0, 0.0]]], dtype=torch.float64)
    embedding = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]], dtype=torch.float64)
    loss = documented_loss(Output(prediction, embedding), target, orthogonality_weight=0.5)
    # smooth L1: 0.5^2/2 + (1 - 1/2) + (3 - 1/2) + 0 = 3.125 over 4;  E'E - I = [[0,1,0],[1,1,0],[0,0,-1]]: 4
    assert {name: value.item() for name, value in loss.terms.items()} == {"forecast": 3.125 / 4, "orthogonality": 2.0}
    assert loss.total.item() == 3.125 / 4 + 2
    spectral = documented_loss(Output(prediction, embedding), target, orthogonality_weight=0.5, norm="spectral")
    assert spectral.terms["orthogonality"].item() == pytest.approx(0.5 * ((1 + 5**0.5) / 2) ** 2)
    assert published_loss(Output(prediction, embedding), target).total.item() == (0.25 + 1 + 9) / 4


counts = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7))


@given(counts, st.floats(0, 100), st.sampled_from(["fro", "spectral"]), st.integers(0, 10**6))
def test_losses_against_numpy(count, weight, norm, seed):
    windows, horizon, variables, width = count
    prediction, target = 2 * random(2, windows, horizon, variables, seed=seed)
    embedding = random(windows, variables, width, seed=seed + 1)
    error = np.abs((target - prediction).numpy())
    forecast = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    excess = [e.T @ e - np.eye(width) for e in embedding.numpy()]
    penalty = np.mean([np.linalg.norm(x, "fro" if norm == "fro" else 2) ** 2 for x in excess])
    loss = documented_loss(Output(prediction, embedding), target, weight, norm)
    assert loss.terms["forecast"].item() == pytest.approx(forecast, rel=1e-10)
    assert loss.terms["orthogonality"].item() == pytest.approx(weight * penalty, rel=1e-8, abs=1e-12)
    published = published_loss(Output(prediction, embedding), target).total.item()
    assert published == pytest.approx((error**2).mean(), rel=1e-10)


def test_smooth_l1_is_half_the_square_or_nearly_the_size():
    """Below 1 it is half of the published loss; far above, the absolute error less 1/2, whose gradient is 1."""
    embedding, target = torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)
    for error in (0.01, 0.99):
        output = Output(torch.full((1, 1, 1), error), embedding)
        assert documented_loss(output, target, 0.0).total.item() == pytest.approx(error**2 / 2)
        assert documented_loss(output, target, 0.0).total == published_loss(output, target).total / 2
    prediction = torch.tensor([[[-50.0]]], requires_grad=True)
    loss = documented_loss(Output(prediction, embedding), target, 0.0).total
    loss.backward()
    assert loss.item() == 49.5 and prediction.grad.item() == -1


@pytest.mark.parametrize("norm", ["fro", "spectral"])
def test_a_weight_of_zero_leaves_the_forecast_alone(norm):
    prediction, target = random(2, 3, 4, 2)
    embedding = random(3, 2, 6).requires_grad_()
    loss = documented_loss(Output(prediction, embedding), target, 0, norm)
    assert loss.terms["orthogonality"] == 0 and loss.total == loss.terms["forecast"]
    loss.total.backward()
    assert embedding.grad.abs().max() == 0


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 10), st.integers(0, 10**6))
def test_the_floor_of_the_second_term(variables, width, weight, seed):
    """mu (width - variables) with more features than variables: reached by orthonormal rows, and by nothing less."""
    target = torch.zeros(1, 1, variables, dtype=torch.float64)
    floor = weight * max(0, width - variables)

    def term(embedding, norm="fro"):
        return documented_loss(Output(target, embedding[None]), target, weight, norm).total.item()

    assert term(random(variables, width, seed=seed)) >= floor
    orthonormal = torch.linalg.qr(random(max(variables, width), min(variables, width), seed=seed)).Q
    orthonormal = orthonormal.mT if variables < width else orthonormal
    assert term(orthonormal) == pytest.approx(floor, abs=1e-10)
    assert term(orthonormal, "spectral") == pytest.approx(weight if width > variables else 0, abs=1e-10)


@pytest.mark.parametrize("norm", ["fro", "spectral"])
def test_gradients_of_the_losses(norm):
    prediction, target = 2 * random(2, 2, 3, 2)
    for variables, width in ((2, 4), (4, 2)):
        embedding = random(2, variables, width)
        assert torch.autograd.gradcheck(
            lambda p, e: documented_loss(Output(p, e), target, 0.7, norm).total,
            (prediction.requires_grad_(), embedding.requires_grad_()),
        )
    assert torch.autograd.gradcheck(lambda p: published_loss(Output(p, p), target).total, (prediction,))


@pytest.mark.parametrize("embedding", ["linear", "mlp"])
@pytest.mark.parametrize("return_attention", [True, False])
def test_gradients_of_the_model(embedding, return_attention):
    """From loss to input and to weights at the model's start, middle and end, against finite differences."""
    sizes = {"history": 5, "horizon": 2, "width": 4, "feed_forward_width": 3}
    model, target = small(**sizes, embedding=embedding, return_attention=return_attention), random(2, 2, 2, seed=1)
    names = ["blocks.0.attention.projection.weight", "blocks.1.feed_forward_norm.weight", "projection.bias"]
    names += ["embedding.weight" if embedding == "linear" else "embedding.2.weight"]
    assert gradients_as_finite_differences(
        model, names, lambda output: documented_loss(output, target, 0.1).total, random(2, 5, 2)
    )


def test_the_second_term_trains_the_embedding_only():
    model = small(embedding="mlp")
    documented_loss(model(random(2, 12, 3)), random(2, 5, 3), 1.0).terms["orthogonality"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("embedding."), name


# --- the ends of what goes in -----------------------------------------------------------------------------------------


ONE_STEP = {"horizon": 1, "history": 1}  # every window is constant
ENDS = [(1, 3, {}), (3, 1, {}), (1, 1, ONE_STEP), (2, 2, {"horizon": 40}), (2, 3, {"layers": 1, "heads": 8})]


@pytest.mark.parametrize(("batch", "variables", "changes"), ENDS)
def test_the_smallest_and_the_odd(batch, variables, changes):
    model = small(**changes)
    history = random(batch, model.history, variables).requires_grad_()
    output = model(history)
    assert output.prediction.shape == (batch, model.horizon, variables)
    documented_loss(output, random(batch, model.horizon, variables), 0.1).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in (history, *model.parameters()))


@pytest.mark.parametrize("level", [0.0, 1.0, -1e6])
def test_constant_windows(level):
    """Nothing to tell variables apart by: equal embeddings, uniform attention, one forecast."""
    model = small()
    output = model(torch.full((2, 12, 3), level, dtype=torch.float64))
    first, gelu, second = model.embedding
    torch.testing.assert_close(output.embedding, second(gelu(first.bias)).expand(2, 3, 8))
    torch.testing.assert_close(output.attention, torch.full((2, 2, 3, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(output.prediction, output.prediction[:1, :, :1].expand(2, 5, 3))


GOOD = torch.zeros(2, 10, 3)
WITH = Output(GOOD, torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: documented_loss(WITH, GOOD, norm="l2"), ValueError, "norm must be one of 'fro', 'spectral'; got 'l2'"),
        (lambda: documented_loss(Output(GOOD, torch.ones(3, 3, 4)), GOOD), ValueError, "output.embedding.*one shape"),
        (lambda: documented_loss(Output(GOOD, GOOD[0]), GOOD), ValueError, r"embedding.*\[batch, variable, width\]"),
        (lambda: documented_loss(Output(GOOD, GOOD / 0), GOOD).values(), NonFiniteLoss, "term 'orthogonality'.*nan"),
        # NaN has no eigenvalues
        (lambda: documented_loss(Output(GOOD, GOOD / 0), GOOD, norm="spectral"), NonFiniteLoss, "matrix W.*NaN"),
        (lambda: documented_loss(Output(GOOD, GOOD + 1e30), GOOD, 1.0, "spectral"), NonFiniteLoss, "penalised matrix"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

"""iTransformer: by hand, by its symmetries, against float64 arithmetic written apart, and against another one."""

import json
import math
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_impl.checkpoint import load_checkpoint, save_checkpoint
from mini_impl.forecasting import dlinear
from mini_impl.forecasting.itransformer import ITransformer, Output, documented_loss, published_loss
from mini_impl.losses import LossTerms, NonFiniteLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "itransformer.json"
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
COMPILER = (
    any(map(shutil.which, ("c++", "g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
)
SMALL = {"history": 12, "horizon": 5, "width": 8, "heads": 2, "layers": 2, "feed_forward_width": 6}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2

    mean, std = history.mean(0), np.sqrt(history.var(0) + 1e-5)
    series = ((history - mean) / std).T
    if "embedding.weight" in weights:
        tokens = embedding = linear("embedding", series)
    else:
        tokens = embedding = linear("embedding.2", gelu(linear("embedding.0", series)))
    for i, block in enumerate(model.blocks):
        heads = block.attention.heads
        query, key, value = np.split(linear(f"blocks.{i}.attention.projection", tokens), 3, axis=-1)
        maps, mixed = [], []
        for q, k, v in zip(*(np.split(part, heads, axis=-1) for part in (query, key, value)), strict=True):
            scores = np.exp(q @ k.T / q.shape[-1] ** 0.5)
            maps.append(scores / scores.sum(-1, keepdims=True))
            mixed.append(maps[-1] @ v)
        mixed = linear(f"blocks.{i}.attention.output", np.concatenate(mixed, -1))
        tokens = norm(f"blocks.{i}.attention_norm", tokens + mixed)
        fed = linear(f"blocks.{i}.feed_forward.3", gelu(linear(f"blocks.{i}.feed_forward.0", tokens)))
        tokens = norm(f"blocks.{i}.feed_forward_norm", tokens + fed)
    forecast = linear("projection", norm("norm", tokens))
    return forecast.T * std + mean, embedding, np.stack(maps)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(4, 1), (8, 2), (6, 3)]),
    st.integers(1, 3),
    st.sampled_from(["linear", "mlp"]),
    st.integers(0, 10**6),
)
@settings(max_examples=30)
def test_the_model_against_numpy(batch, variables, size, layers, embedding, seed):
    model = small(seed, width=size[0], heads=size[1], layers=layers, embedding=embedding)
    history = 7 * random(batch, 12, variables, seed=seed) + 100
    output = model(history)
    for i, window in enumerate(history.numpy()):
        prediction, tokens, attention = by_numpy(model, window)
        np.testing.assert_allclose(output.prediction[i].detach(), prediction, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(output.embedding[i].detach(), tokens, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(output.attention[i].detach(), attention, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("embedding", ["linear", "mlp"])
@given(st.permutations(range(5)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_variables_are_a_set(embedding, order, seed):
    """Permuted variables: permuted forecasts, embeddings, and rows and columns of the attention."""
    model, history = small(embedding=embedding), random(2, 12, 5, seed=seed)
    here, there = model(history), model(history[..., order])
    torch.testing.assert_close(there.prediction, here.prediction[..., order], rtol=0, atol=1e-12)
    torch.testing.assert_close(there.embedding, here.embedding[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(there.attention, here.attention[:, :, order][..., order], rtol=0, atol=1e-12)


def test_any_number_of_variables_suits_the_same_weights():
    model = small()
    for variables in (1, 2, 9):
        output = model(random(3, 12, variables))
        assert output.prediction.shape == (3, 5, variables)
        assert output.embedding.shape == (3, variables, 8)
        assert output.attention.shape == (3, 2, variables, variables)


def test_variables_do_mix_and_windows_do_not():
    model, history = small(), random(3, 12, 4)
    other = history.clone()
    other[1, :, 2] = random(12, seed=5)
    changed = (model(other).prediction - model(history).prediction).abs().amax(1) > 1e-6  # [batch, variable]
    assert changed.tolist() == [[False] * 4, [True] * 4, [False] * 4]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=20)
def test_attention_rows_are_probabilities(batch, variables, seed):
    attention = small()(random(batch, 12, variables, seed=seed)).attention
    assert attention.min() >= 0
    torch.testing.assert_close(attention.sum(-1), torch.ones(batch, 2, variables, dtype=torch.float64))
    if variables == 1:
        assert (attention == 1).all()  # a variable alone attends to itself


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("embedding", ["linear", "mlp"])
def test_shapes_dtypes_devices(device, embedding):
    torch.manual_seed(0)
    model = ITransformer(**SMALL, embedding=embedding, return_attention=True).to(device)
    output = model(torch.randn(4, 12, 3, device=device))
    loss = documented_loss(output, torch.randn(4, 5, 3, device=device), orthogonality_weight=0.5)
    loss.total.backward()
    assert output.prediction.shape == (4, 5, 3)
    assert loss.total.device.type == device and loss.total.dtype == torch.float32
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "cpu"])
def test_devices_agree_with_the_cpu(device):
    model, history = small().float(), random(4, 12, 3, dtype=torch.float32)
    here = model(history)
    there = model.to(device)(history.to(device))
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(ours, theirs.cpu(), rtol=1e-4, atol=1e-4)


def test_dropout_is_for_training_only():
    model, history = small(dropout=0.5), random(2, 12, 3)
    assert torch.equal(model(history).prediction, model(history).prediction)
    model.train()
    assert not torch.equal(model(history).prediction, model(history).prediction)


def test_saved_and_loaded(tmp_path):
    model, history = small(embedding="mlp"), random(2, 12, 3)
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), {})
    other = small(seed=1, embedding="mlp")
    assert not torch.equal(other(history).prediction, model(history).prediction)
    other.load_state_dict(load_checkpoint(tmp_path / "model.safetensors")[0])
    for ours, theirs in zip(model(history), other(history), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_compiler():
    """Forecast and gradients of a compiled model are the model's own."""
    model, history, target = small(), random(2, 12, 3), random(2, 5, 3, seed=1)
    gradients = []
    for called in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        output = called(history)
        documented_loss(output, target, 0.1).total.backward()
        gradients.append([output.prediction.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
@torch.no_grad()
def test_compiled():
    model, history = small(layers=1), random(2, 12, 3)
    for ours, theirs in zip(model(history), torch.compile(model)(history), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


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


outputs = st.tuples(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 7),
    st.floats(0, 100),
    st.sampled_from(["fro", "spectral"]),
    st.integers(0, 10**6),
)


@given(outputs)
def test_losses_against_numpy(case):
    windows, horizon, variables, width, weight, norm, seed = case
    prediction, target = 2 * random(2, windows, horizon, variables, seed=seed)
    embedding = random(windows, variables, width, seed=seed + 1)
    error = np.abs((target - prediction).numpy())
    forecast = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    excess = [e.T @ e - np.eye(width) for e in embedding.numpy()]
    penalty = np.mean([np.linalg.norm(x, "fro" if norm == "fro" else 2) ** 2 for x in excess])
    loss = documented_loss(Output(prediction, embedding), target, weight, norm)
    assert loss.terms["forecast"].item() == pytest.approx(forecast, rel=1e-10)
    assert loss.terms["orthogonality"].item() == pytest.approx(weight * penalty, rel=1e-8, abs=1e-12)
    assert loss.total.item() == pytest.approx(forecast + weight * penalty, rel=1e-8)
    published = published_loss(Output(prediction, embedding), target)
    assert published.total.item() == pytest.approx((error**2).mean(), rel=1e-10)
    assert list(published.terms) == ["forecast"]


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


def test_a_perfect_forecast_leaves_the_embedding_alone():
    target, embedding = random(3, 4, 2), random(3, 2, 6)
    loss = documented_loss(Output(target, embedding), target, 0.3)
    assert loss.terms["forecast"] == 0 and loss.total == loss.terms["orthogonality"] > 0


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
    model = small(**sizes, embedding=embedding, return_attention=return_attention)
    names = ["blocks.0.attention.projection.weight", "blocks.1.feed_forward_norm.weight", "projection.bias"]
    names += ["embedding.weight" if embedding == "linear" else "embedding.2.weight"]
    target = random(2, 2, 2, seed=1)

    def loss(history, *weights):
        output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (history,))
        return documented_loss(output, target, 0.1).total

    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, (random(2, 5, 2).requires_grad_(), *weights))


def test_the_second_term_trains_the_embedding_only():
    model = small(embedding="mlp")
    documented_loss(model(random(2, 12, 3)), random(2, 5, 3), 1.0).terms["orthogonality"].backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("embedding."), name


# --- the ends of what goes in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "variables", "changes"),
    [
        (1, 3, {}),
        (3, 1, {}),
        (1, 1, {"horizon": 1, "history": 1}),  # one step: every window is constant
        (2, 2, {"horizon": 40}),
        (2, 3, {"layers": 1, "heads": 8}),
    ],
)
def test_the_smallest_and_the_odd(batch, variables, changes):
    model = small(**changes)
    history = random(batch, model.history, variables).requires_grad_()
    output = model(history)
    assert output.prediction.shape == (batch, model.horizon, variables)
    documented_loss(output, random(batch, model.horizon, variables), 0.1).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in (history, *model.parameters()))


@pytest.mark.parametrize("level", [0.0, 1.0, -1e6])
def test_constant_windows(level):
    """Nothing to tell variables apart by: equal embeddings, uniform attention, one forecast, finite gradients."""
    model = small()
    history = torch.full((2, 12, 3), level, dtype=torch.float64, requires_grad=True)
    output = model(history)
    first, gelu, second = model.embedding
    torch.testing.assert_close(output.embedding, second(gelu(first.bias)).expand(2, 3, 8))
    torch.testing.assert_close(output.attention, torch.full((2, 2, 3, 3), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(output.prediction, output.prediction[:1, :, :1].expand(2, 5, 3))
    documented_loss(output, random(2, 5, 3), 0.1).total.backward()
    assert all(torch.isfinite(x.grad).all() for x in (history, *model.parameters()))


GOOD = torch.zeros(2, 10, 3)
WITH = Output(GOOD, torch.ones(2, 3, 4))


def made(**changes):
    return ITransformer(**{**SMALL, "history": 10, "horizon": 10, **changes})


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: made(history=0), ValueError, "history must be at least 1; got 0"),
        (lambda: made(horizon=True), TypeError, "horizon must be a whole number.*got True"),
        (lambda: made(width=0), ValueError, "width must be at least 1; got 0"),
        (lambda: made(width=8.0), TypeError, "width must be a whole number.*got 8.0"),
        (lambda: made(heads=3), ValueError, "width must be a multiple of heads; got 8 and 3"),
        (lambda: made(heads=0), ValueError, "heads must be at least 1; got 0"),
        (lambda: made(layers=0), ValueError, "layers must be at least 1; got 0"),
        (lambda: made(feed_forward_width=-1), ValueError, "feed_forward_width must be at least 1; got -1"),
        (lambda: made(dropout=1.0), ValueError, "dropout must be less than 1; got 1.0"),
        (lambda: made(dropout=-0.1), ValueError, "dropout.*at least 0; got -0.1"),
        (lambda: made(embedding="MLP"), ValueError, "embedding must be one of 'mlp', 'linear'; got 'MLP'"),
        (lambda: made()(GOOD[:, 1:]), ValueError, r"history must have 10 time steps.*\[2, 9, 3\]"),
        (lambda: made()(GOOD[0]), ValueError, r"history.*\[batch, time, variable\].*got shape \[10, 3\]"),
        (lambda: made()(GOOD[..., :0]), ValueError, r"history.*no axis empty.*\[2, 10, 0\]"),
        (lambda: made()(GOOD.double()), TypeError, "history must have the dtype.*float32; got torch.float64"),
        (lambda: made()(GOOD.long()), TypeError, "history.*got dtype torch.int64"),
        (lambda: made()(GOOD.numpy()), TypeError, "history.*got ndarray"),
        (lambda: made()(GOOD.to("meta")), ValueError, "history must be on the device.*cpu; got meta"),
        (lambda: made()(GOOD / 0), ValueError, "history.*60 of its 60 are NaN"),
        (lambda: documented_loss(GOOD, GOOD), TypeError, "output must be.*got torch.Tensor"),
        (lambda: documented_loss(WITH, GOOD[:, 1:]), ValueError, "output.prediction and target must have one shape"),
        (lambda: documented_loss(WITH, GOOD[..., :1]), ValueError, "output.prediction and target must have one shape"),
        (lambda: documented_loss(WITH, GOOD.double()), TypeError, "one dtype"),
        (lambda: documented_loss(WITH, GOOD / 0), ValueError, "target.*NaN"),
        (lambda: documented_loss(WITH, GOOD, -1.0), ValueError, "orthogonality_weight.*at least 0; got -1"),
        (lambda: documented_loss(WITH, GOOD, math.nan), ValueError, "orthogonality_weight.*got nan"),
        (lambda: documented_loss(WITH, GOOD, "1"), TypeError, "orthogonality_weight.*got '1'"),
        (lambda: documented_loss(WITH, GOOD, norm="l2"), ValueError, "norm must be one of 'fro', 'spectral'; got 'l2'"),
        (lambda: documented_loss(WITH._replace(prediction=GOOD / 0), GOOD), NonFiniteLoss, "term 'forecast'.*nan"),
        (lambda: documented_loss(WITH._replace(embedding=GOOD / 0), GOOD), NonFiniteLoss, "penalised matrix W.*NaN"),
        (lambda: documented_loss(Output(GOOD, GOOD + 1e30), GOOD, 1.0, "spectral"), NonFiniteLoss, "penalised matrix"),
        (lambda: published_loss(WITH, GOOD[:1]), ValueError, "output.prediction and target must have one shape"),
        (lambda: published_loss(WITH._replace(prediction=GOOD / 0), GOOD), NonFiniteLoss, "term 'forecast'.*nan"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@given(st.integers(0, 10**6), st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(max_examples=20)
def test_no_silent_nan(seed, bad):
    history = random(2, 12, 2, seed=seed)
    history.view(-1)[seed % history.numel()] = bad
    with pytest.raises(ValueError, match=r"history.*1 of its 48 are NaN or infinite"):
        small()(history)


@pytest.mark.parametrize("norm", ["fro", "spectral"])
@pytest.mark.parametrize("name", ["embedding.2.weight", "projection.weight"])
def test_weights_that_diverged_are_named_by_the_loss(name, norm):
    model = small()
    model.get_parameter(name).data[0, 0] = math.nan
    says = "penalised matrix W" if name == "embedding.2.weight" else "term 'forecast' of the loss is nan"
    with pytest.raises(NonFiniteLoss, match=says):
        documented_loss(model(random(2, 12, 3)), random(2, 5, 3), norm=norm)


def test_loss_terms_is_what_every_loss_returns():
    for loss in (documented_loss(WITH, GOOD + 1, 2.0), published_loss(WITH, GOOD + 1)):
        assert isinstance(loss, LossTerms)
        assert loss.total.item() == pytest.approx(sum(term.item() for term in loss.terms.values()))


def test_an_embedding_of_other_windows_and_another_output():
    with pytest.raises(ValueError, match=r"output.embedding must have 2 windows, as the target has"):
        documented_loss(Output(GOOD, torch.ones(3, 3, 4)), GOOD)
    with pytest.raises(TypeError, match=r"with .embedding; got mini_impl.forecasting.dlinear.Output"):
        documented_loss(dlinear.Output(GOOD, GOOD), GOOD)


def test_training_mode_compiles_with_dropout():
    model = made(dropout=0.3)
    compiled = torch.compile(model, backend="aot_eager")
    published_loss(compiled(torch.randn(2, 10, 3)), torch.randn(2, 10, 3)).total.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())

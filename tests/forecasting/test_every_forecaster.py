"""What holds for every model of FORECASTERS and for both its losses; one that is added there is tested here as well."""

import functools
import inspect
import math
import re
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mini_impl.checkpoint import load_checkpoint, save_checkpoint
from mini_impl.forecasting import FORECASTERS, TimesNet, Windows, fit, loss_of
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.tensors import random, same

HISTORY, HORIZON, VARIABLES = 48, 5, 3
HISTORY_SHAPE, TARGET_SHAPE = (2, HISTORY, VARIABLES), (2, HORIZON, VARIABLES)
# With these a forecast does not depend on the other windows of the batch.
OWN = {TimesNet: {"per_window": True}}
COMPILER = (
    any(map(shutil.which, ("c++", "g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
)
SEVERAL = [kind for kind in FORECASTERS.values() if "variables" in inspect.signature(kind).parameters]
IN_PIECES = [TimesNet]  # it looks at its data on the way, so that torch.compile cannot see it as one graph


@pytest.fixture(params=FORECASTERS.values(), ids=FORECASTERS)
def forecaster(request):
    return request.param


@pytest.fixture(params=["documented", "published"])
def form(request):
    return request.param


def arguments(function) -> dict:
    """{name: default} of all arguments but those that are always given."""
    given_always = ("history", "horizon", "variables", "output", "target")
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in given_always}


def made(forecaster, **changes):
    """A model of little size with seeded weights, none of them 0, for VARIABLES series."""
    torch.manual_seed(0)
    small = {name: 8 for name in ("width", "feed_forward_width") if name in arguments(forecaster)}
    if "variables" in inspect.signature(forecaster).parameters:
        small["variables"] = VARIABLES
    model = forecaster(**{"history": HISTORY, "horizon": HORIZON, **small, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def made_once(forecaster):
    return made(forecaster).eval()


def made_for(forecaster, form, **changes):
    """A model that returns what one of its losses needs."""
    return made(forecaster, **(forecaster.documented_needs if form == "documented" else {}), **changes)


def tensors(output) -> list[Tensor]:
    """All tensors of an Output."""
    flat = [part for field in output for part in (field if isinstance(field, tuple) else (field,))]
    return [part for part in flat if part is not None]


def gradients(loss: LossTerms, model) -> list[Tensor]:
    return torch.autograd.grad(loss.total, list(model.parameters()))


# --- what a model does ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_devices_and_gradients(forecaster, form, device, dtype):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("has no float64")
    model = made_for(forecaster, form).to(device, dtype)
    output = model(random(*HISTORY_SHAPE, dtype=dtype).to(device))
    loss = loss_of(forecaster, form)(output, random(*TARGET_SHAPE, seed=1, dtype=dtype).to(device))
    assert output.prediction.shape == TARGET_SHAPE
    slopes = gradients(loss, model)
    for tensor in (*tensors(output), loss.total, *loss.terms.values(), *slopes):
        assert tensor.dtype == dtype and tensor.device.type == device and tensor.isfinite().all()
    assert all(slope.any() for slope in slopes)


def test_devices_agree_with_the_cpu(forecaster, form, device):
    model, history = made_for(forecaster, form).eval(), random(*HISTORY_SHAPE, dtype=torch.float32)
    here = tensors(model(history))
    there = tensors(model.to(device)(history.to(device)))
    same([tensor.cpu() for tensor in there], here, tolerance=1e-4)


def test_float32_agrees_with_float64(forecaster):
    model, history = made(forecaster).double().eval(), random(*HISTORY_SHAPE)
    exact = model(history).prediction
    same(model.float()(history.float()).prediction.double(), exact, tolerance=1e-4)


def test_the_same_in_evaluation_and_with_the_same_seed(forecaster):
    model, history = made(forecaster), random(*HISTORY_SHAPE, dtype=torch.float32)
    forecasts = []
    for _ in range(2):
        torch.manual_seed(7)
        forecasts.append(model.train()(history).prediction)
    assert torch.equal(*forecasts)
    model.eval()
    assert torch.equal(model(history).prediction, model(history).prediction)
    if "dropout" in arguments(forecaster):
        model = made(forecaster, dropout=0.5)
        assert not torch.equal(model(history).prediction, model(history).prediction)


def test_windows_do_not_see_one_another(forecaster):
    model = made(forecaster, **OWN.get(forecaster, {})).double().eval()
    history = random(4, HISTORY, VARIABLES)
    same(torch.cat([model(window[None]).prediction for window in history]), model(history).prediction, tolerance=1e-9)


def test_the_number_of_variables(forecaster):
    """A model that was told how many there are takes no other number; one that was not takes any."""
    model, history = made(forecaster).eval(), random(2, HISTORY, VARIABLES + 1, dtype=torch.float32)
    if "variables" in inspect.signature(forecaster).parameters:
        with pytest.raises(ValueError, match=r"history must have 3 variables.*\[2, 48, 4\]"):
            model(history)
        with pytest.raises(ValueError, match="variables must be at least 1; got 0"):
            made(forecaster, variables=0)
    else:
        assert model(history).prediction.shape == (2, HORIZON, VARIABLES + 1)
        assert model(history[..., :1]).prediction.shape == (2, HORIZON, 1)


@pytest.mark.parametrize("level", [0.0, -1e4])
@pytest.mark.parametrize("training", [False, True])
def test_a_constant_window_alone_has_finite_forecasts_and_gradients(forecaster, form, level, training):
    model = made_for(forecaster, form).double().train(training)
    history = torch.full((1, HISTORY, VARIABLES), level, dtype=torch.float64, requires_grad=True)
    output = model(history)
    loss = loss_of(forecaster, form)(output, random(1, HORIZON, VARIABLES))
    loss.total.backward()
    assert all(tensor.isfinite().all() for tensor in (*tensors(output), history.grad))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_saved_and_loaded(forecaster, tmp_path):
    model, history = made(forecaster), random(*HISTORY_SHAPE, dtype=torch.float32)
    model(history)  # what a normalisation has seen is saved too
    save_checkpoint(tmp_path / "model.safetensors", model.state_dict(), {})
    other = made(forecaster).eval()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert not torch.equal(other(history).prediction, model.eval()(history).prediction)
    other.load_state_dict(load_checkpoint(tmp_path / "model.safetensors")[0])
    assert torch.equal(other(history).prediction, model(history).prediction)


def test_fit_trains_it(forecaster, form):
    model, windows = made_for(forecaster, form), Windows(random(70, VARIABLES, dtype=torch.float32), HISTORY, HORIZON)
    before = [parameter.clone() for parameter in model.parameters()]
    training = fit(model, windows, windows, loss_of(forecaster, form), epochs=1, progress=False)
    assert math.isfinite(training.validation[0]) and "forecast" in training.terms
    assert not any(map(torch.equal, model.parameters(), before))


@pytest.mark.filterwarnings("ignore")  # torch's own, about functions that it looks through
@pytest.mark.parametrize("training", [False, True])
def test_compiled(forecaster, form, training):
    """A training step as one graph; in evaluation, and without dropout, its numbers are those of the step itself."""
    model = made_for(forecaster, form).double().train(training)
    history, target, loss_function = random(*HISTORY_SHAPE), random(*TARGET_SHAPE, seed=1), loss_of(forecaster, form)

    def step(history, target):
        return loss_function(model(history), target)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=forecaster not in IN_PIECES)(history, target)
    # the derivatives are compiled too: of the model and of the loss, each by itself
    output = torch.compile(model, backend="aot_eager", fullgraph=forecaster not in IN_PIECES)(history)
    loss = torch.compile(loss_function, backend="aot_eager", fullgraph=True)(output, target)
    slopes = gradients(loss, model)
    assert all(slope.isfinite().all() for slope in slopes)
    if not training:
        plain = step(history, target)
        same(compiled, plain, tolerance=1e-9)
        same(loss, plain, tolerance=1e-9)
        same(slopes, gradients(plain, model), tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
def test_compiled_for_this_machine(forecaster):
    model, history = made(forecaster).eval(), random(*HISTORY_SHAPE, dtype=torch.float32)
    torch.compiler.reset()
    with torch.no_grad():
        same(torch.compile(model)(history).prediction, model(history).prediction, tolerance=1e-4)


# --- what its losses do -----------------------------------------------------------------------------------------------


def returned(forecaster, form):
    """What a model in float64 returned of random windows."""
    return made_for(forecaster, form).double().eval()(random(*HISTORY_SHAPE))


def test_terms_add_up(forecaster, form):
    target = random(*TARGET_SHAPE)
    loss = loss_of(forecaster, form)(returned(forecaster, form), target)
    assert isinstance(loss, LossTerms) and loss.terms.keys() == loss.values().keys()
    assert loss.total.item() == pytest.approx(sum(loss.values().values()))
    if form == "published":
        assert list(loss.terms) == ["forecast"]


def test_what_the_documented_loss_needs(forecaster):
    """With `documented_needs` it has all its terms; without, it says what to do."""
    target, loss_function = random(*TARGET_SHAPE), loss_of(forecaster, "documented")
    assert loss_function(returned(forecaster, "documented"), target).total.isfinite()
    for name, value in forecaster.documented_needs.items():
        with pytest.raises(ValueError, match=f"is None: make the model with {name}={value}"):
            loss_function(returned(forecaster, "published"), target)


def test_the_loss_of_a_model():
    with pytest.raises(ValueError, match="form must be one of 'documented', 'published'; got 'mse'"):
        loss_of(TimesNet, "mse")


# --- bad input --------------------------------------------------------------------------------------------------------

NONSENSE = {  # by the name of an argument
    "history": [
        (0, ValueError, "history must be at least 1; got 0"),
        (2.5, TypeError, "history must be a whole number"),
    ],
    "horizon": [(0, ValueError, "horizon must be at least 1; got 0"), (True, TypeError, "whole number.*got True")],
    "width": [(0, ValueError, "width must be at least 1; got 0"), (8.0, TypeError, "width must be a whole number")],
    "layers": [(0, ValueError, "layers must be at least 1; got 0")],
    "feed_forward_width": [(0, ValueError, "feed_forward_width must be at least 1; got 0")],
    "heads": [
        (0, ValueError, "heads must be at least 1; got 0"),
        (3, ValueError, "width must be a multiple of heads; got 8 and 3"),
    ],
    "dropout": [
        (1.0, ValueError, "dropout must be.*at least 0 and less than 1; got 1.0"),
        (-0.1, ValueError, "dropout must be.*at least 0.*got -0.1"),
        (math.nan, ValueError, "dropout must be a finite number.*got nan"),
        ("0.1", TypeError, "dropout must be a finite number.*got '0.1'"),
    ],
}


def nonsense(function):
    """(argument, value, error, words) for all arguments of a model or a loss, by their names or by what they are."""
    for name, default in arguments(function).items():
        yield from ((name, *case) for case in NONSENSE.get(name, []))
        if isinstance(default, bool):
            yield name, "no", TypeError, f"{name} must be True or False; got 'no'"
        elif isinstance(default, str):
            yield name, "other", ValueError, f"{name} must be one of .*'{default}'.*; got 'other'"
        elif isinstance(default, float) and name not in NONSENSE:  # a weight of a loss, or a share
            yield name, -0.1, ValueError, f"{name} must be .*got -0.1"
            yield name, math.nan, ValueError, f"{name} must be a finite number.*got nan"
            yield name, "1", TypeError, f"{name} must be a finite number.*got '1'"


def test_settings_that_make_no_model_are_named(forecaster):
    cases = [*nonsense(forecaster), *((name, *case) for name in ("history", "horizon") for case in NONSENSE[name])]
    for name, value, error, says in cases:
        with pytest.raises(error, match=says):
            made(forecaster, **{name: value})


def test_weights_that_make_no_loss_are_named(forecaster, form):
    target, loss_function = random(*TARGET_SHAPE), loss_of(forecaster, form)
    output = returned(forecaster, form)
    for name, value, error, says in nonsense(loss_function):
        with pytest.raises(error, match=says):
            loss_function(output, target, **{name: value})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda good: good[:, 1:], ValueError, r"history must have 48 time steps.*\[2, 47, 3\]"),
        (lambda good: good[0], ValueError, r"history.*\[batch, time, variable\].*got shape \[48, 3\]"),
        (lambda good: good[:0], ValueError, r"history.*no axis empty.*\[0, 48, 3\]"),
        (lambda good: good.long(), TypeError, "history.*got dtype torch.int64"),
        (lambda good: good.numpy(), TypeError, "history.*got ndarray"),
        (lambda good: good.double(), TypeError, "history must have the dtype.*float32; got torch.float64"),
        (lambda good: good.to("meta"), ValueError, "history must be on the device.*cpu; got meta"),
    ],
)
def test_a_history_that_does_not_fit_is_named(forecaster, change, error, says):
    with pytest.raises(error, match=says):
        made(forecaster)(change(torch.zeros(HISTORY_SHAPE)))


@given(place=st.integers(0, 2 * HISTORY * VARIABLES - 1), bad=st.sampled_from([math.nan, math.inf, -math.inf]))
@pytest.mark.parametrize("forecaster", FORECASTERS.values(), ids=FORECASTERS)
def test_no_silent_nan(forecaster, place, bad):
    history = random(*HISTORY_SHAPE, dtype=torch.float32)
    history.view(-1)[place] = bad
    with pytest.raises(ValueError, match="history must hold finite numbers only; 1 of its 288 are NaN or infinite"):
        made_once(forecaster)(history)


class Foreign(NamedTuple):
    """What the model of another module may return."""

    reconstruction: Tensor


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda output, target: (target, target), TypeError, "output must be .*with .prediction; got torch.*Tensor"),
        (lambda output, target: (Foreign(target), target), TypeError, r"with .prediction; got .*\.Foreign"),
        (lambda output, target: (output, target.tolist()), TypeError, "target must be a floating-point.*got list"),
        (lambda output, target: (output, target.long()), TypeError, "target must be a floating-point.*torch.int64"),
        (lambda output, target: (output, target[0]), ValueError, r"target.*\[batch, horizon, variable\]"),
        (lambda output, target: (output, target[:, 1:]), ValueError, r"output.prediction and target.*\[2, 4, 3\]"),
        (lambda output, target: (output, target[..., :1]), ValueError, r"output.prediction and target.*\[2, 5, 1\]"),
        (lambda output, target: (output, target.float()), TypeError, "output.prediction and target.*one dtype"),
        (lambda output, target: (output, target.to("meta")), ValueError, "output.prediction and target.*one device"),
    ],
)
def test_what_no_loss_can_compare_is_named(forecaster, form, change, error, says):
    target = random(*TARGET_SHAPE)
    with pytest.raises(error, match=says):
        loss_of(forecaster, form)(*change(returned(forecaster, form), target))


def test_nan_is_named_where_the_terms_are_read(forecaster, form):
    """A loss reads no numbers; `values` does, once for all of them."""
    target, loss_function = random(*TARGET_SHAPE), loss_of(forecaster, form)
    output = returned(forecaster, form)
    for loss in (
        loss_function(output, target / 0),
        loss_function(output._replace(prediction=output.prediction * math.nan), target),
    ):
        with pytest.raises(NonFiniteLoss, match=r"the term 'forecast' of the loss is (nan|inf|-inf)"):
            loss.values()


def test_weights_that_diverged_are_named_by_the_loss(forecaster, form):
    """Not by a check on the way, which would speak of a tensor that nobody gave."""
    target, names = random(*TARGET_SHAPE), [name for name, _ in made(forecaster).named_parameters()]
    for name in (names[0], names[-1]):
        model = made_for(forecaster, form).double()
        model.get_parameter(name).data.view(-1)[0] = math.nan
        with pytest.raises(NonFiniteLoss, match=r"the term '.*' of the loss is nan"):
            loss_of(forecaster, form)(model(random(*HISTORY_SHAPE)), target).values()


@pytest.mark.parametrize("history", range(8, 31))
def test_any_history_will_do_or_the_error_says_what_would(forecaster, history):
    """With a size that the error names, if the defaults are too large for it."""
    changes, more = {}, {"variables": 3} if "variables" in inspect.signature(forecaster).parameters else {}
    for _ in range(2):
        try:
            model = forecaster(history, 4, **more, **changes)
            break
        except ValueError as error:
            name, most = re.match(r"(\w+) must be .*at most (\d+)", str(error)).groups()
            changes[name] = int(most)
    prediction = model.eval()(random(2, history, 3, dtype=torch.float32)).prediction
    assert prediction.shape == (2, 4, 3) and prediction.isfinite().all()


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_whole_numbers_of_any_kind_mean_the_same(forecaster, kind):
    """200 + 100 is 44 in eight bits."""
    sizes = {"history": 200, "horizon": 100, **({"variables": 3} if forecaster in SEVERAL else {})}
    torch.manual_seed(0)
    plain = forecaster(**sizes)
    torch.manual_seed(0)
    counted = {name: value.default for name, value in inspect.signature(forecaster).parameters.items()}
    counted = {name: value for name, value in counted.items() if type(value) is int and value < 256}
    other = forecaster(**{name: kind(value) for name, value in {**counted, **sizes}.items()})
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in other.state_dict().items()
    }
    history = random(2, 200, 3, dtype=torch.float32)
    assert torch.equal(plain.eval()(history).prediction, other.eval()(history).prediction)


def test_numbers_whose_squares_overflow_are_named(forecaster):
    history = torch.full((2, HISTORY, VARIABLES), 1e20)
    with pytest.raises(ValueError, match=r"history must hold numbers of at most 3.84e\+17 in size; got 1e\+20"):
        made(forecaster)(history)

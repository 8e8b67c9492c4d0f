"""A forecaster that is kept: written to a file with all that its numbers mean, read again, and asked for the future.

model.save("visitors.safetensors")                       # once `fit` has trained it on windows of a Series
model = load("visitors.safetensors")
future = forecast(model, load_csv("new.csv"))            # a Series: the horizon after the last row, in its units
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mini_impl
from mini_impl import checks
from mini_impl.checkpoint import check_layers, check_weights, load_checkpoint, save_checkpoint
from mini_impl.forecasting.data import Origin, Scaler, Series, Windows, check_series
from mini_impl.forecasting.train import absolute_errors, evaluating
from mini_impl.losses import NonFiniteLoss
from mini_impl.table import same_step, times_after


class Forecaster(nn.Module):
    """What the models are: modules that know with which arguments they were made and, once fitted, on what.

    settings: {argument: value} of everything that __init__ takes.
    origin: the variables, scaler and step of time of the Series that `fit` trained it on; None before that.
    """

    settings: dict
    origin: Origin | None = None

    def __new__(cls, *args, **kwargs):
        model = super().__new__(cls)
        # Partial, since copying a model makes it without arguments; its __init__ says what is missing.
        given = inspect.signature(cls.__init__).bind_partial(model, *args, **kwargs)
        given.apply_defaults()
        model.settings = {name: value for name, value in given.arguments.items() if name != "self"}
        return model

    def save(self, path: Path | str) -> None:
        """Write the model, and what its numbers mean, to one safetensors file, in one step; `load` reads it.

        Raises ValueError if it was not fitted to windows that `prepare` made of a Series; OSError.
        """
        names, scaler, step = _known_origin(self)
        tensors = {f"model/{name}": value for name, value in self.state_dict().items()}
        if isinstance(step, np.timedelta64):
            unit, count = np.datetime_data(step)
            step = [int(step.astype(int)) * count, unit]
        state = {"forecaster": type(self).__name__, "settings": self.settings, "names": names, "step": step}
        state["mini_impl"] = mini_impl.__version__
        save_checkpoint(path, {**tensors, "mean": scaler.mean, "std": scaler.std}, state)


def load(path: Path | str) -> Forecaster:
    """Read a model that its `save` wrote: on the CPU, in eval mode. Reading it runs no code of the file's.

    Raises OSError; ValueError for a file of another kind, or one that was damaged.
    """
    tensors, state = load_checkpoint(path)
    kinds = {kind.__name__: kind for kind in Forecaster.__subclasses__()}
    kind = kinds.get(state.get("forecaster"))
    if kind is None:
        raise ValueError(f"{path} holds none of the models {', '.join(kinds)}; `model.save` writes such a file")
    try:
        scaler, names, step = Scaler(tensors.pop("mean"), tensors.pop("std")), tuple(state["names"]), state["step"]
        step = np.timedelta64(*step) if isinstance(step, list) else step
        if not len(names) == len(scaler.mean) == len(scaler.std) or not isinstance(step, np.timedelta64 | float | None):
            raise TypeError(f"names {names}, {len(scaler.mean)} means, {len(scaler.std)} deviations, step {step!r}")
        weights = {name.removeprefix("model/"): value for name, value in tensors.items()}
        check_layers(path, weights, state["settings"])
        with torch.device("meta"):  # sizes that the file does not fill take no memory
            empty = kind(**state["settings"])
    except (AttributeError, KeyError, TypeError) as error:
        then, now = state.get("mini_impl", "of another version"), mini_impl.__version__
        foreign = f"{path} does not describe a model as mini_impl {now} does; mini_impl {then} wrote it"
        raise ValueError(f"{foreign} ({type(error).__name__}: {error})") from None
    check_weights(path, weights, empty)
    with torch.random.fork_rng(devices=[]):  # first weights that are overwritten use up no random numbers
        model = kind(**state["settings"])
    model.to(next(value.dtype for value in weights.values() if value.is_floating_point())).load_state_dict(weights)
    model.origin = Origin(names, scaler, step)
    return model.eval()


def forecast(model: Forecaster, series: Series) -> Series:
    """The `horizon` rows after the last row of a series, in its units: values [horizon, endogenous], names and times.

    model: one that was fitted to a Series, or that `load` read. series: at least `history` rows, as far apart as those
    that it was trained on, with its variables; which stand in another order, or beside others, is nothing to worry
    about. The model is left in the mode it was in.
    Raises TypeError; ValueError for a model that only fills in, times that are not equally far apart, another step,
    variables that are missing, or too few rows; NonFiniteLoss.
    """
    names, scaler, step = _known_origin(model)
    check_series(series)
    if not hasattr(model, "horizon"):
        made = "PatchTST.from_masked(model, horizon) makes one that has"
        raise ValueError(f"a {type(model).__name__} has no horizon to forecast; {made}")
    if missing := [name for name in names if name not in series.names]:
        has = f"it has {', '.join(map(repr, series.names))}"
        raise ValueError(f"series must have the model's variables; {', '.join(map(repr, missing))} is missing: {has}")
    if step is not None and series.step is not None and not same_step(step, series.step):
        was, is_now = (f"{one:g}, in numbers," if isinstance(one, float) else one for one in (step, series.step))
        raise ValueError(f"series must have rows {was} apart, as the model was trained on; got {is_now}")
    checks.integer("the rows of series, for the history of the model,", len(series.values), least=model.history)
    weight = next(model.parameters())
    last = series.values[-model.history :, [series.names.index(name) for name in names]]  # [history, variable]
    with torch.no_grad(), evaluating(model):
        scores = model(scaler.apply(last.cpu()).to(weight)[None]).prediction[0].cpu()  # [horizon, endogenous]
    checks.look(checks.finite("the forecast", scores, NonFiniteLoss))
    endogenous = getattr(model, "endogenous", range(len(names)))
    values = scaler.invert(scores, list(endogenous)).float()
    times = None if series.times is None else times_after(series.times, len(scores))
    return Series(values, tuple(names[place] for place in endogenous), times, series.time_name, series.time_format)


def unit_errors(forecast: Callable, windows: Windows) -> dict[str, float]:
    """The mean of |y - yhat| of each variable of the targets, by its name, in its unit.

    forecast: as `evaluate` takes it. windows: of a Series, as `prepare` makes them. Raises as `evaluate` does.
    """
    if getattr(windows, "origin", None) is None:
        raise ValueError("windows must come from prepare(series, ..) with a Series, which knows names and units")
    names, scaler, _ = windows.origin
    errors = absolute_errors(forecast, windows)  # [endogenous], of z-scores
    places = windows.endogenous or range(len(names))
    return {names[place]: float(error * scaler.std[place]) for place, error in zip(places, errors, strict=True)}


def _known_origin(model: Forecaster) -> Origin:
    checks.instance("model", model, Forecaster, "one of the package's forecasters")
    if model.origin is None:
        raise ValueError("the model does not know names and units: fit it to windows of prepare(series, ..), a Series")
    return model.origin

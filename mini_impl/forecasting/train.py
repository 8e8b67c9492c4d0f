"""Training a forecaster, and measuring one over every window."""

import math
import time
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.checkpoint import Run, located, note, progress_bar, trained_parameters
from mini_impl.forecasting.data import Windows
from mini_impl.losses import LossTerms, NonFiniteLoss


class Scores(NamedTuple):
    """Errors over every window, time step and variable, in the units of the windows' values (z-scores, as a rule)."""

    mse: float  # mean of (y - yhat)^2
    mae: float  # mean of |y - yhat|


class Training(NamedTuple):
    """How a training went."""

    terms: dict[str, list[float]]  # each term of the loss at every step
    validation: list[float]  # the score on the validation windows after every epoch
    best_epoch: int  # counted from 1; its weights are the ones that the model has now
    seconds: float  # that it took, breaks left out


# --- measuring --------------------------------------------------------------------------------------------------------


def evaluate(forecast: Callable, windows: Windows, batch_size: int = 256) -> Scores:
    """Mean squared and mean absolute error of a forecaster; every window counts once, no last batch is dropped.

    forecast: a model, or any function from history [batch, time, variable] to a tensor [batch, horizon, variable].
    A model is used where its parameters are, in eval mode, and left in the mode it was in.
    Raises TypeError, ValueError for a forecast that is none or of another shape, NonFiniteLoss for one that is not
    finite.
    """
    checks.integers(batch_size=batch_size)
    checks.instance("windows", windows, Windows, MADE_BY)
    modes = {}
    if isinstance(forecast, nn.Module):
        parameter = next(forecast.parameters(), None)
        windows = windows if parameter is None else windows.to(parameter.device)
        modes = {part: part.training for part in forecast.modules()}
        forecast.eval()
    squares = absolutes = 0.0
    count = 0
    try:
        with torch.no_grad():
            for start in range(0, len(windows), batch_size):
                history, target = windows[start : start + batch_size]
                output = forecast(history)
                prediction = getattr(output, "prediction", output)  # [batch, horizon, variable]
                checks.tensor("the forecast", prediction, "batch", "horizon", "variable")
                checks.alike("the forecast", prediction, "the target", target)
                error = (prediction - target).cpu().double()  # float64: a float32 sum over millions of errors drifts
                squares += error.square().sum().item()
                absolutes += error.abs().sum().item()
                count += error.numel()
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not math.isfinite(squares):
        raise NonFiniteLoss("the forecast holds NaN or infinite values, so that it has no error to report")
    return Scores(mse=squares / count, mae=absolutes / count)


def forecast_mse(model: nn.Module, windows: Windows) -> float:
    """The mean squared error of a model's forecast over every window. Raises as `evaluate` does."""
    return evaluate(model, windows).mse


# --- training ---------------------------------------------------------------------------------------------------------


def fit(
    model: nn.Module,
    train: Windows,
    validation: Windows,
    loss: Callable[..., LossTerms],
    *,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    decay: float = 0.5,
    patience: int = 3,
    seed: int = 0,
    score: Callable[[nn.Module, Windows], float] = forecast_mse,
    device: str | torch.device | None = None,
    checkpoint: Path | str | None = None,
    progress: bool | None = None,
) -> Training:
    """Train a forecaster with Adam, stop early, and leave it with its best weights, in eval mode.

    loss: a function (output, target) -> LossTerms; with weights: functools.partial(documented_loss, trend_weight=0.5).
    learning_rate: of the first epoch; each further epoch has `decay` times the one before. (Public code halves it too,
        but for the first time after the second epoch: there epochs 1 and 2 both have the full rate.)
    patience: the training stops after so many epochs in a row without a new best score.
    seed: of the order of the windows and of dropout. Each epoch seeds torch anew, from (seed, epoch).
    score: a function (model, windows) -> number, called on the validation windows after every epoch, with the model in
        eval mode and without gradients; least is best. As a rule it is the mean squared error of the forecast, whatever
        the loss is, so that losses can be compared; a model that makes no forecast needs another.
    device: where to train; None: where the model is.
    checkpoint: a file that is replaced after every epoch. If it is there already, the training goes on from it and ends
        as it would have without the break, on the CPU with the same bits. Only `epochs` may change in between, upwards;
        of the loss and the score, their names and the arguments given by functools.partial are compared.
    progress: show a progress bar; None: if there is a terminal.
    Parameters that need no gradient stay as they are.
    Raises TypeError, ValueError; NonFiniteLoss with the step and the term if a term of the loss is NaN or infinite, or
    with the epoch if the score is.
    """
    checks.integers(epochs=epochs, batch_size=batch_size, patience=patience)
    checks.integers(least=0, seed=seed)
    checks.positive(learning_rate=learning_rate, decay=decay)
    _check_windows(model, train, validation)
    trained = trained_parameters(model, device)
    device = next(iter(trained.values())).device
    train, validation = train.to(device), validation.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=float(learning_rate))

    terms: dict[str, list[float]] = {}
    scores: list[float] = []
    best: dict[str, Tensor] = {}
    start = time.perf_counter()
    settings = {
        "model": model,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "data": [train.form, train.values, validation.values],
        "loss": loss,
        "score": score,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "decay": decay,
        "patience": patience,
        "seed": seed,
    }
    run = Run(checkpoint, optimizer, settings)
    if broken_off := run.restore(epochs=epochs):
        groups, state = broken_off
        model.load_state_dict(groups["model"])
        best, terms, scores = groups["best"], state["terms"], state["validation"]
        start -= state["seconds"]

    while len(scores) < epochs and len(scores) - _best_epoch(scores) < patience:
        epoch = len(scores)
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        optimizer.param_groups[0]["lr"] = float(learning_rate * decay**epoch)
        order = torch.randperm(len(train)).to(device)  # drawn on the CPU: the same on any device
        batches = order.split(int(batch_size))
        model.train()
        for number, index in enumerate(progress_bar(batches, f"epoch {epoch + 1}", progress)):
            with located(f"at step {epoch * len(batches) + number + 1} (epoch {epoch + 1})"):
                history, target = train[index]  # [batch, history, variable], [batch, horizon, endogenous]
                batch_loss = loss(model(history), target)
                checks.instance("what loss returns", batch_loss, LossTerms, "LossTerms")
                optimizer.zero_grad()
                batch_loss.total.backward()
                note(terms, batch_loss.values())  # here the host waits for the device; NaN gets no further
                optimizer.step()

        with located(f"after epoch {epoch + 1}, on the validation part"):
            scores.append(_score(score, model, validation))
        if _best_epoch(scores) == len(scores):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        seconds = time.perf_counter() - start
        tensors = {"model": model.state_dict(), "best": best}
        run.save(tensors, done=len(scores), terms=terms, validation=scores, seconds=seconds)

    model.load_state_dict(best)
    model.eval()
    return Training(terms, scores, _best_epoch(scores), time.perf_counter() - start)


def _score(score: Callable, model: nn.Module, validation: Windows) -> float:
    model.eval()
    with torch.no_grad():
        value = score(model, validation)
    checks.instance("what score returns", value, Real, "a number")
    if not math.isfinite(value):
        raise NonFiniteLoss(f"the score is {value}; it must be a finite number")
    return float(value)


def _best_epoch(scores: list[float]) -> int:
    """The epoch, counted from 1, with the lowest score; 0 before the first."""
    return 1 + scores.index(min(scores)) if scores else 0


MADE_BY = "Windows, as `prepare` returns them"


def _check_windows(model: nn.Module, train: Windows, validation: Windows) -> None:
    for name, part in (("train", train), ("validation", validation)):
        checks.instance(name, part, Windows, MADE_BY)
    if train.form != validation.form:
        wanted = "train and validation must have one history, one horizon and the same endogenous variables"
        raise ValueError(f"{wanted}; got {train.form} and {validation.form}")
    targets = train.endogenous or tuple(range(train.values.shape[1]))
    if tuple(getattr(model, "endogenous", targets)) != targets:
        raise ValueError(f"model forecasts the variables {model.endogenous}, but the windows' targets are {targets}")

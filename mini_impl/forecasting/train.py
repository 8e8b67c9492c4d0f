"""Training a forecaster, and measuring one over every window."""

import functools
import hashlib
import math
import time
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mini_impl import checks
from mini_impl.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    same_settings,
    save_checkpoint,
    tensor_group,
)
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


def evaluate(forecast: Callable, windows: Windows, batch_size: int = 256) -> Scores:
    """Mean squared and mean absolute error of a forecaster; every window counts once, no last batch is dropped.

    forecast: a model, or any function from history [batch, time, variable] to a tensor [batch, horizon, variable].
    A model is used where its parameters are, in eval mode, and left in the mode it was in.
    Raises ValueError for a forecast of another shape, NonFiniteLoss for one that is not finite.
    """
    checks.integer("batch_size", batch_size)
    _check_windows(windows=windows)
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
                prediction = getattr(output, "prediction", output)
                if not isinstance(prediction, Tensor):
                    raise TypeError(f"forecast must return a tensor or an Output; got {type(output).__name__}")
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
    learning_rate: of the first epoch; each further epoch has `decay` times the one before (halved, as in public code).
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
    epochs = checks.integer("epochs", epochs)
    batch_size = checks.integer("batch_size", batch_size)
    learning_rate = checks.number("learning_rate", learning_rate, above=0)
    decay = checks.number("decay", decay, above=0)
    patience = checks.integer("patience", patience)
    seed = checks.integer("seed", seed, least=0)
    _check_windows(train=train, validation=validation)
    if (train.history, train.horizon) != (validation.history, validation.horizon):
        raise ValueError(
            "train and validation must have one history and one horizon; "
            f"got {train.history} -> {train.horizon} and {validation.history} -> {validation.horizon}"
        )
    if train.endogenous != validation.endogenous:
        raise ValueError(
            "train and validation must have the same endogenous variables; "
            f"got {train.endogenous} and {validation.endogenous}"
        )
    targets = train.endogenous or tuple(range(train.values.shape[1]))
    if tuple(forecast_ones := getattr(model, "endogenous", targets)) != targets:
        raise ValueError(
            f"model forecasts the variables {tuple(forecast_ones)}, but the windows' targets are {targets}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameter to train")
    if device is not None:
        model.to(checks.device("device", device))
    device = next(model.parameters()).device
    train, validation = train.to(device), validation.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)

    terms: dict[str, list[float]] = {}
    scores: list[float] = []
    best: dict[str, Tensor] = {}
    start = time.perf_counter()
    settings = {
        "model": _describe_model(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "data": _digest(train, validation) if checkpoint is not None else None,
        "loss": _describe(loss),
        "score": _describe(score),
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "decay": decay,
        "patience": patience,
        "seed": seed,
    }
    if checkpoint is not None and Path(checkpoint).exists():
        tensors, state = load_checkpoint(checkpoint)
        same_settings(checkpoint, state.get("settings"), settings)
        terms, scores = state["terms"], state["validation"]
        start -= state["seconds"]
        if len(scores) > epochs:
            raise ValueError(f"epochs must be at least {len(scores)}, which {checkpoint} has already; got {epochs}")
        best = tensor_group(tensors, "best")
        model.load_state_dict(tensor_group(tensors, "model"))
        restore_optimizer(optimizer, tensor_group(tensors, "optimizer"))

    while len(scores) < epochs and len(scores) - _best_epoch(scores) < patience:
        epoch = len(scores)
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        optimizer.param_groups[0]["lr"] = learning_rate * decay**epoch
        batches = torch.randperm(len(train)).split(batch_size)
        model.train()
        for number, index in enumerate(tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=_hide(progress))):
            history, target = train[index]
            try:
                batch_loss = loss(model(history), target)
                if not isinstance(batch_loss, LossTerms):
                    raise TypeError(f"loss must return LossTerms; got {type(batch_loss).__name__}")
                values = batch_loss.values()
            except NonFiniteLoss as error:
                step = epoch * len(batches) + number + 1
                raise NonFiniteLoss(f"training stopped at step {step} (epoch {epoch + 1}): {error}") from error
            optimizer.zero_grad()
            batch_loss.total.backward()
            optimizer.step()
            for name, value in values.items():
                terms.setdefault(name, []).append(value)

        scores.append(_score(score, model, validation, epoch + 1))
        if _best_epoch(scores) == len(scores):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        if checkpoint is not None:
            tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
            tensors |= {f"best/{name}": value for name, value in best.items()}
            tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(optimizer).items()}
            state = {"settings": settings, "terms": terms, "validation": scores, "seconds": time.perf_counter() - start}
            save_checkpoint(checkpoint, tensors, state)

    model.load_state_dict(best)
    model.eval()
    return Training(terms, scores, _best_epoch(scores), time.perf_counter() - start)


def _score(score: Callable, model: nn.Module, validation: Windows, epoch: int) -> float:
    """The score of a model after an epoch. Raises TypeError for no number, NonFiniteLoss for NaN or infinity."""
    model.eval()
    try:
        with torch.no_grad():
            value = score(model, validation)
        if not isinstance(value, Real):
            raise TypeError(f"score must return a number; got {type(value).__name__}")
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the score is {value}; it must be a finite number")
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"training stopped after epoch {epoch}, on the validation part: {error}") from error
    return float(value)


def _best_epoch(scores: list[float]) -> int:
    """The epoch, counted from 1, with the lowest score; 0 before the first."""
    return 1 + scores.index(min(scores)) if scores else 0


def _hide(progress: bool | None) -> bool | None:
    """tqdm's `disable`, for which None means: only if there is no terminal."""
    return None if progress is None else not progress


def _check_windows(**parts: Windows) -> None:
    """Raise TypeError for what is no Windows."""
    for name, part in parts.items():
        if not isinstance(part, Windows):
            raise TypeError(f"{name} must be Windows, as `prepare` returns them; got {type(part).__name__}")


def _digest(*parts: Windows) -> str:
    """A fingerprint of windows."""
    digest = hashlib.sha256()
    for part in parts:
        shape = list(part.values.shape)
        digest.update(f"{part.history} {part.horizon} {part.endogenous} {shape} {part.values.dtype}".encode())
        digest.update(part.values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe_model(model: nn.Module) -> dict[str, dict]:
    """The kind of every part of a model with its plain settings: sizes, the kernel size, dropout rates."""
    plain = (bool, int, float, str)
    return {
        f"{name} ({type(part).__qualname__})": {
            key: repr(value) for key, value in vars(part).items() if isinstance(value, plain) and key != "training"
        }
        for name, part in model.named_modules()
    }


def _describe(function: Callable) -> str:
    """The name of a loss or a score with the arguments that functools.partial gave it."""
    if isinstance(function, functools.partial):
        given = [(None, value) for value in function.args] + sorted(function.keywords.items())
        texts = [f"{name}={_describe(value) if callable(value) else repr(value)}" for name, value in given]
        return f"{_describe(function.func)}({', '.join(texts)})"
    return getattr(function, "__qualname__", type(function).__qualname__)

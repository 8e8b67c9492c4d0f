"""Training a forecaster, and measuring one over every window."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mini_impl import checks, workers
from mini_impl.checkpoint import Run, located, note, progress_bar, trained_parameters
from mini_impl.faster import adam, faster
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
    return Scores(*(float(error.mean()) for error in _errors(forecast, windows, batch_size)))


def absolute_errors(forecast: Callable, windows: Windows, batch_size: int = 256) -> Tensor:
    """The mean of |y - yhat| of each variable of the targets: float64 [endogenous]. Otherwise as `evaluate`."""
    return _errors(forecast, windows, batch_size)[1]


def _errors(forecast: Callable, windows: Windows, batch_size: int) -> tuple[Tensor, Tensor]:
    """The mean squared and the mean absolute error of each variable, each float64 [endogenous]."""
    batch_size = checks.integer("batch_size", batch_size)
    checks.instance("windows", windows, Windows, MADE_BY)
    parameter = next(forecast.parameters(), None) if isinstance(forecast, nn.Module) else None
    windows = windows if parameter is None else windows.to(parameter.device)
    sums = torch.zeros(2, 1, dtype=torch.float64)
    with torch.no_grad(), evaluating(forecast):
        for start in range(0, len(windows), batch_size):
            history, target = windows[start : start + batch_size]
            output = forecast(history)
            prediction = getattr(output, "prediction", output)  # [batch, horizon, variable]
            checks.tensor("the forecast", prediction, "batch", "horizon", "variable")
            checks.alike("the forecast", prediction, "the target", target)
            error = (prediction - target).cpu().double()  # float64: a float32 sum over millions of errors drifts
            sums = sums + torch.stack([error.square().sum((0, 1)), error.abs().sum((0, 1))])  # [2, endogenous]
    if not sums.isfinite().all():
        raise NonFiniteLoss("the forecast holds NaN or infinite values, so that it has no error to report")
    squares, absolutes = sums / (len(windows) * windows.horizon)
    return squares, absolutes


@contextmanager
def evaluating(forecast: Callable) -> Iterator[None]:
    """In eval mode, if it is a model; then as before, part by part."""
    modes = {part: part.training for part in forecast.modules()} if isinstance(forecast, nn.Module) else {}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


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
    epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    patience: int | None = None,
    seed: int = 0,
    score: Callable[[nn.Module, Windows], float] = forecast_mse,
    device: str | torch.device | None = None,
    compile: bool = False,
    precision: str = "float32",
    checkpoint: Path | str | None = None,
    save_every: int | None = None,
    progress: bool | None = None,
) -> Training:
    """Train a forecaster with Adam, stop early, and leave it with its best weights, in eval mode.

    loss: a function (output, target) -> LossTerms; with weights: functools.partial(documented_loss, trend_weight=0.5).
    epochs: at most so many passes over the windows; None: 10, or more where there are few: LEAST_STEPS steps in all.
    learning_rate: of the first step. It falls with the share s of all steps that are done, as `learning_rate_at` says:
        so it falls as far in many short epochs, of a short series, as in few long ones. (Public code halves it after
        every epoch but the first, however short.)
    patience: the training stops after so many epochs in a row without a new best score; None: 3, or 3 of every 10.
    seed: of the order of the windows and of dropout. Each epoch and each step of it seeds torch anew.
    score: a function (model, windows) -> number, called on the validation windows after every epoch, with the model in
        eval mode and without gradients; least is best. As a rule it is the mean squared error of the forecast, whatever
        the loss is, so that losses can be compared; a model that makes no forecast needs another.
    device: where to train; None: where the model is.
    compile: have torch.compile write code for the model, which takes up to a minute. precision: "bf16" computes the
        model's products in bfloat16 and the rest in float32: see `faster`. The score is always of the plain model.
    checkpoint: a file that is replaced after every epoch, after every `save_every` steps, and when SIGTERM or Ctrl-C
        ends the training. If it is there already, the training goes on from it and ends as it would have without the
        break, on the CPU with the same bits. Nothing that decides on the result may change in between; of the loss and
        the score, their names and the arguments given by functools.partial are compared.
    progress: show a progress bar; None: if there is a terminal.
    Parameters that need no gradient stay as they are. What the windows know of their series, `model.origin` says too.
    One thread and two may give other last bits, as sums are split; the same number gives the same bits.
    Under `torchrun` or `accelerate launch` several workers share each batch, `batch_size` windows in all, and take the
    steps of one, but for dropout and masks, which each draws for its own windows: see `workers`. The loss must be a
    mean over windows, as the book's are.
    Raises TypeError, ValueError; NonFiniteLoss with the step and the term if a term of the loss is NaN or infinite, or
    with the epoch if the score is; BlockingIOError while another training has the checkpoint.
    """
    batch_size, seed = checks.integer("batch_size", batch_size), checks.integer("seed", seed, least=0, most=2**63 - 1)
    checks.number("learning_rate", learning_rate, above=0, most=1e36)
    _check_windows(model, train, validation)
    steps = -(-len(train) // batch_size)  # of an epoch
    epochs = checks.integer("epochs", max(10, -(-LEAST_STEPS // steps)) if epochs is None else epochs)
    patience = checks.integer("patience", max(3, epochs * 3 // 10) if patience is None else patience)
    trained = trained_parameters(model, workers.place(device))
    workers.begin(model)
    device = next(iter(trained.values())).device
    train, validation = train.to(device), validation.to(device)
    forward = faster(model, compile, precision)
    optimizer = adam(model.parameters(), learning_rate, precision)
    if train.origin is not None:
        model.origin = train.origin

    terms: dict[str, list[float]] = {}
    scores: list[float] = []
    best: dict[str, Tensor] = {}
    step = 0  # of this epoch: those that are done
    start = time.perf_counter()
    settings = {
        "model": model,
        "first weights": model.state_dict().values(),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "data": [train.form, train.values, validation.values],
        "loss": loss,
        "score": score,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "patience": patience,
        "seed": seed,
        "compile": compile,
        "precision": precision,
    }

    def snapshot() -> tuple[dict, dict]:
        seconds = time.perf_counter() - start
        state = {"done": len(scores), "step": step, "terms": terms, "validation": scores, "seconds": seconds}
        return {"model": model.state_dict(), "best": best}, state

    with Run(checkpoint, optimizer, settings, save_every) as run:
        if broken_off := run.restore():
            groups, state = broken_off
            model.load_state_dict(groups["model"])
            best, step, terms, scores = groups["best"], state["step"], state["terms"], state["validation"]
            start -= state["seconds"]

        while len(scores) < epochs and len(scores) - _best_epoch(scores) < patience:
            epoch = len(scores)
            _seed(seed, epoch)
            order = torch.randperm(len(train)).to(device)  # drawn on the CPU: the same on any device
            batches = order.split(batch_size)
            model.train()
            now = f"epoch {epoch + 1} of {epochs}"
            for index in progress_bar(batches[step:], now, progress, initial=step, total=steps):
                _seed(seed, epoch, step + 1, *[workers.number()] * (workers.number() > 0))
                optimizer.param_groups[0]["lr"] = learning_rate_at(learning_rate, (epoch + step / steps) / epochs)
                place = f"at step {epoch * steps + step + 1} (epoch {epoch + 1})"
                with located(place), workers.sharing(len(index)):
                    history, target = train[index[workers.rows(len(index))]]  # [batch, history or horizon, variable]
                    batch_loss = loss(forward(history), target)
                    checks.instance("what loss returns", batch_loss, LossTerms, "LossTerms")
                    share = workers.share(len(index))
                    optimizer.zero_grad()
                    (batch_loss.total if share == 1 else batch_loss.total * share).backward()
                    workers.add_up_gradients(trained.values())
                    batch_loss = workers.loss_of_all(batch_loss, share)
                    note(terms, batch_loss.values())  # here the host waits for the device; NaN gets no further
                    optimizer.step()
                step += 1
                run.step(epoch * steps + step, snapshot)

            with located(f"after epoch {epoch + 1}, on the validation part"):
                scores.append(workers.of_first(_score(score, model, validation)))
            if _best_epoch(scores) == len(scores):
                best = {name: value.clone() for name, value in model.state_dict().items()}
            step = 0
            run.step((epoch + 1) * steps, snapshot, due=True)

    model.load_state_dict(best)
    model.eval()
    return Training(terms, scores, _best_epoch(scores), time.perf_counter() - start)


LEAST_STEPS = 1000  # that a training takes if it is not said how many epochs


def learning_rate_at(first: float, share: float) -> float:
    """first x 0.01^s, s the share of all steps that are done: it falls evenly in the logarithm, to a hundredth."""
    return float(first * 0.01**share)


def _seed(*numbers: int) -> None:
    """Seed torch from several numbers."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


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

"""The command `mini-impl forecast`: train a forecaster, and test it beside the naive baselines."""

import argparse
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from mini_impl import workers
from mini_impl.forecasting import FORECASTERS, loss_of
from mini_impl.forecasting.baselines import repeat_season
from mini_impl.forecasting.data import (
    ETT_SHA256,
    ETT_SPLIT,
    Series,
    Windows,
    download_ett,
    load_auckland,
    load_csv,
    prepare,
)
from mini_impl.forecasting.forecaster import unit_errors
from mini_impl.forecasting.patchtst import MaskedPatchTST, PatchTST, masked_loss, masked_score
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.settings import add_arguments, choose_settings, parse_setting

HOW = {  # arguments of `fit` that are options here
    "epochs": "at most so many; without it: 10, or more where the data are few",
    "batch_size": "windows in a step",
    "learning_rate": "of the first step; it falls to a hundredth as the steps are done",
    "patience": "epochs without a new best before it stops; without it: 3, or 3 of every 10",
    "seed": "of the first weights and of the order of the windows",
    "compile": "have torch.compile write code for the model, which takes up to a minute",
    "precision": "float32, or bf16: the model's products in bfloat16",
}
SHOWN = 10  # variables in the table of errors


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `forecast`; those that end up in `fit` have its defaults."""
    add = parser.add_argument
    add("model", choices=FORECASTERS)
    series = parser.add_mutually_exclusive_group().add_argument
    series("--csv", metavar="FILE", help="rows equally far apart in time; without it: the embedded Auckland series")
    series("--ett", choices=ETT_SHA256, help="this series, downloaded once, or where MINI_IMPL_DATA says")
    add("--history", type=int, default=96, help="time steps that the model sees")
    add("--horizon", type=int, default=96, help="time steps that it forecasts")
    add("--split", type=_split, metavar="A,B,C", help="rows to train, validate, test on; else 70, 10, 20 %% (not ETT)")
    add("--loss", choices=("documented", "published"), default="documented", help="as documented, or as in the paper")
    add("--weight", type=parse_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the loss")
    add("--set", type=parse_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the model")
    add("--period", type=int, help="time steps of a season, for the seasonal baseline; without it: 24, or the history")
    add("--pretrain", type=int, metavar="EPOCHS", help="patchtst: first fill in masked patches so long")
    add_arguments(parser, fit, HOW)
    add("--save", metavar="FILE", help="keep the trained model there, for mini-impl predict")


def run(options: argparse.Namespace) -> dict:
    """Train and test as the options say; return everything that the command reports."""
    series, lengths = _data(options)
    make_model = FORECASTERS[options.model]
    loss = loss_of(make_model, options.loss)
    weights = choose_settings("--weight", options.weight, loss)
    if options.pretrain is not None and options.model != "patchtst":
        raise ValueError(f"--pretrain is for patchtst alone; got {options.model}")
    made = make_model if options.pretrain is None else MaskedPatchTST
    settings = choose_settings("--set", options.set, made)
    asked = settings.get("endogenous")
    train, validation, test, _ = prepare(series, lengths, options.history, options.horizon, endogenous=asked)
    period = min(24, options.history) if options.period is None else options.period
    more = {"variables": len(series.names)} if "variables" in inspect.signature(make_model).parameters else {}
    if options.loss == "documented":
        more |= make_model.documented_needs
    how = {name: getattr(options, name) for name in (*HOW, "device", "checkpoint", "save_every")}

    torch.manual_seed(options.seed)
    if options.pretrain is None:
        model = make_model(options.history, options.horizon, **more, **settings)
    else:
        masked = MaskedPatchTST(options.history, **settings)
        own = options.checkpoint and f"{options.checkpoint}.pretrain"
        first = {**how, "epochs": options.pretrain, "checkpoint": own, "score": masked_score}
        fit(masked, train, validation, masked_loss, **first)
        torch.manual_seed(options.seed)  # the same head, however much of the pre-training was done before
        model = PatchTST.from_masked(masked, options.horizon, **more)
    training = fit(model, train, validation, functools.partial(loss, **weights), **how)
    if options.save is not None and workers.number() == 0:
        model.save(options.save)
    naive = {"last value": _naive(test, period=1), f"last {period} steps again": _naive(test, period)}
    forecasts = {options.model: model, **naive}
    return {
        "settings": {"split": list(lengths), "weight": weights, "set": settings, "period": period},
        "windows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {"mse of each epoch": training.validation, "best epoch": training.best_epoch},
        "test": {name: evaluate(forecast, test)._asdict() for name, forecast in forecasts.items()},
        "mean absolute error": {name: unit_errors(forecast, test) for name, forecast in forecasts.items()},
        "seconds": round(training.seconds, 1),
    }


def report(result: dict) -> None:
    """Print the result as a short table."""
    windows, best = result["windows"], result["validation"]["best epoch"]
    print(f"windows: {windows['train']} train, {windows['validation']} validation, {windows['test']} test")
    print(f"weights of epoch {best} of {len(result['validation']['mse of each epoch'])}")
    print(f"{'test, z-scored':<24}{'MSE':>8}{'MAE':>8}")
    for name, scores in result["test"].items():
        print(f"{name:<24}{scores['mse']:8.4f}{scores['mae']:8.4f}")
    errors = result["mean absolute error"]
    variables = list(errors[next(iter(errors))])
    print(f"{'test, MAE in its unit':<24}" + "".join(f"{name[:19]:>20}" for name in errors))
    for variable in variables[:SHOWN]:  # of all: --json
        print(f"{variable[:23]:<24}" + "".join(f"{of[variable]:20.4g}" for of in errors.values()))


def _split(text: str) -> tuple[int, ...]:
    """Three whole numbers with commas between them."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"wants three whole numbers such as 8640,2880,2880; got {text!r}")
    return tuple(map(int, parts))


def _data(options: argparse.Namespace) -> tuple[Series, tuple[int, ...]]:
    """The series that the options name, and how many rows of it to train, validate and test on.

    Unless the options say it, those are 70 and 10 % of the rows, rounded down, and the rest. (Public code rounds the
    first and the last down, so that its test part is up to two rows shorter, and its validation part longer.)
    """
    if options.ett is not None:
        return load_csv(download_ett(options.ett)), options.split or ETT_SPLIT
    series = load_auckland() if options.csv is None else load_csv(options.csv)
    rows = len(series.values)
    train, validation = rows * 7 // 10, rows // 10
    return series, options.split or (train, validation, rows - train - validation)


def _naive(test: Windows, period: int) -> Callable[[Tensor], Tensor]:
    """The forecast that repeats the last `period` steps of the variables to forecast."""
    asked = slice(None) if test.endogenous is None else test.endogenous
    return lambda history: repeat_season(history[..., asked], test.horizon, period)

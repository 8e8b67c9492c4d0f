"""The command `mini-impl`: train a forecaster of the book on a CSV file, and test it beside the naive baselines."""

import argparse
import functools
import inspect
import json
import sys
from importlib.metadata import version
from types import ModuleType

import torch
from torch import nn

from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting import dlinear
from mini_impl.forecasting.baselines import repeat_last, repeat_season
from mini_impl.forecasting.data import load_auckland, load_csv, prepare
from mini_impl.forecasting.train import evaluate, fit

MODELS: dict[str, tuple[ModuleType, type[nn.Module]]] = {"dlinear": (dlinear, dlinear.DLinear)}


def main(arguments: list[str] | None = None) -> None:
    """Run the command. What a caller got wrong ends it with status 2 and one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        result = {"command": ["mini-impl", *arguments], **forecast(options)}
        report(result)
        if options.json is not None:
            write_bytes(options.json, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: torch's, for numbers out of range
        parser.exit(2, f"mini-impl: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nmini-impl: stopped; with --checkpoint FILE the same command would go on from there\n")


def make_parser() -> argparse.ArgumentParser:
    """The command's options; those that end up in `fit` have its defaults."""
    defaults = {name: option.default for name, option in inspect.signature(fit).parameters.items()}
    parser = argparse.ArgumentParser(prog="mini-impl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shows = argparse.ArgumentDefaultsHelpFormatter
    add = commands.add_parser("forecast", help="train and test a forecaster", formatter_class=shows).add_argument
    add("model", choices=MODELS)
    add("--csv", metavar="FILE", help="rows equally far apart in time; without it: the embedded Auckland series")
    add("--history", type=int, default=96, help="time steps that the model sees")
    add("--horizon", type=int, default=96, help="time steps that it forecasts")
    add("--split", type=_split, metavar="A,B,C", help="rows to train, validate and test on; without it: 70, 10, 20 %%")
    add("--loss", choices=("documented", "published"), default="documented", help="as documented, or as in the paper")
    add("--weight", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="of a term of the loss")
    add("--set", type=_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the model")
    add("--period", type=int, help="time steps of a season, for the seasonal baseline; without it: 24, or the history")
    for name, what in (
        ("epochs", "at most so many"),
        ("batch_size", "windows in a step"),
        ("learning_rate", "of the first epoch"),
        ("decay", "factor on the learning rate after every epoch"),
        ("patience", "epochs without a new best before it stops"),
        ("seed", "of the first weights and of the order of the windows"),
    ):
        add(f"--{name.replace('_', '-')}", type=type(defaults[name]), default=defaults[name], help=what)
    add("--device", default="cpu", help="cpu, cuda, mps")
    add("--checkpoint", metavar="FILE", help="go on from this file if it is there; replaced after every epoch")
    add("--json", metavar="OUT", help="write the result there too")
    return parser


def forecast(options: argparse.Namespace) -> dict:
    """Train and test as the options say; return everything that the command reports."""
    series = load_auckland() if options.csv is None else load_csv(options.csv)
    rows = len(series.values)
    lengths = options.split or (rows * 7 // 10, rows // 10, rows - rows * 7 // 10 - rows // 10)
    train, validation, test, _ = prepare(series.values, lengths, options.history, options.horizon)
    module, make_model = MODELS[options.model]
    loss_function = getattr(module, f"{options.loss}_loss")
    weights = _settings("--weight", options.weight, loss_function, leave_out=("output", "target"))
    weights = {name: float(value) for name, value in weights.items()}
    settings = _settings("--set", options.set, make_model, leave_out=("history", "horizon"))
    period = min(24, options.history) if options.period is None else options.period
    naive = {
        "last value": functools.partial(repeat_last, horizon=options.horizon),
        f"last {period} steps again": functools.partial(repeat_season, horizon=options.horizon, period=period),
    }
    scores = {name: evaluate(function, test)._asdict() for name, function in naive.items()}

    torch.manual_seed(options.seed)
    model = make_model(options.history, options.horizon, **settings)
    loss = functools.partial(loss_function, **weights)
    names = ("epochs", "batch_size", "learning_rate", "decay", "patience", "seed", "checkpoint")
    how = {name: getattr(options, name) for name in names}
    training = fit(model, train, validation, loss, device=options.device, **how)
    return {
        "versions": {"mini_impl": version("mini_impl"), "torch": torch.__version__},
        "settings": {name: value for name, value in vars(options).items() if name not in ("command", "json")}
        | {"split": list(lengths), "weight": weights, "set": settings, "period": period},
        "windows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {"mse of each epoch": training.validation, "best epoch": training.best_epoch},
        "test": {options.model: evaluate(model, test)._asdict(), **scores},
    }


def report(result: dict) -> None:
    """Print the result as a short table."""
    windows, best = result["windows"], result["validation"]["best epoch"]
    print(f"windows: {windows['train']} train, {windows['validation']} validation, {windows['test']} test")
    print(f"weights of epoch {best} of {len(result['validation']['mse of each epoch'])}")
    print(f"{'test, z-scored':<24}{'MSE':>8}{'MAE':>8}")
    for name, scores in result["test"].items():
        print(f"{name:<24}{scores['mse']:8.4f}{scores['mae']:8.4f}")


def _split(text: str) -> tuple[int, ...]:
    """Three whole numbers with commas between them."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"wants three whole numbers such as 8640,2880,2880; got {text!r}")
    return tuple(map(int, parts))


def _setting(text: str) -> tuple[str, int | float]:
    """NAME=VALUE, the value a number."""
    name, _, value = text.partition("=")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"wants NAME=VALUE with a number such as trend_weight=0.5; got {text!r}")


def _settings(option: str, given: list[tuple[str, float]], function, leave_out: tuple[str, ...]) -> dict[str, float]:
    """The defaults of a function with the given values on top. Raises ValueError for one that it does not take."""
    parameters = inspect.signature(function).parameters
    takes = {name: parameter.default for name, parameter in parameters.items() if name not in leave_out}
    for name, _ in given:
        if name not in takes:
            what = f"takes {', '.join(takes)}" if takes else "takes none"
            raise ValueError(f"{option}: {function.__name__} has no {name!r}; it {what}")
    return takes | dict(given)


if __name__ == "__main__":
    main()

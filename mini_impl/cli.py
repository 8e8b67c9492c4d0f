"""The command `mini-impl`: train a forecaster beside the naive baselines, or fine-tune a language model."""

import argparse
import functools
import inspect
import json
import sys
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor, nn

from mini_impl.checkpoint import write_bytes
from mini_impl.finetuning import command as finetune
from mini_impl.forecasting import dlinear, itransformer, patchtst, timesnet, timexer
from mini_impl.forecasting.baselines import repeat_season
from mini_impl.forecasting.data import ETT_SHA256, Windows, download_ett, load_auckland, load_csv, prepare
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.settings import choose_settings, parse_setting

MODELS: dict[str, tuple[ModuleType, type[nn.Module]]] = {
    "dlinear": (dlinear, dlinear.DLinear),
    "patchtst": (patchtst, patchtst.PatchTST),
    "itransformer": (itransformer, itransformer.ITransformer),
    "timesnet": (timesnet, timesnet.TimesNet),
    "timexer": (timexer, timexer.TimeXer),
}
# What a model must return besides its forecast for the documented loss to have all its terms.
RETURNED = {"patchtst": "return_attention", "timesnet": "return_frequency_features", "timexer": "return_attention"}
ETT_SPLIT = (8640, 2880, 2880)  # 12, 4 and 4 months of 30 days, as in the literature
HERE = ("checkpoint", "json")  # options that say where files of this machine are: not part of a result


def main(arguments: list[str] | None = None) -> None:
    """Run the command. What a caller got wrong ends it with status 2 and one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        run, show = (forecast, report) if options.command == "forecast" else (finetune.run, finetune.report)
        result = {"command": _without_files(arguments), **run(options)}
        show(result)
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
    what = "train and test a forecaster"
    forecasts = commands.add_parser("forecast", help=what, description=what, formatter_class=shows, allow_abbrev=False)
    add = forecasts.add_argument
    add("model", choices=MODELS)
    series = forecasts.add_mutually_exclusive_group().add_argument
    series("--csv", metavar="FILE", help="rows equally far apart in time; without it: the embedded Auckland series")
    series("--ett", choices=ETT_SHA256, help="this series, downloaded once, or where MINI_IMPL_DATA says")
    add("--history", type=int, default=96, help="time steps that the model sees")
    add("--horizon", type=int, default=96, help="time steps that it forecasts")
    add("--split", type=_split, metavar="A,B,C", help="rows to train, validate, test on; else 70, 10, 20 %% (not ETT)")
    add("--loss", choices=("documented", "published"), default="documented", help="as documented, or as in the paper")
    add("--weight", type=parse_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the loss")
    add("--set", type=parse_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the model")
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
    what = "fine-tune a language model, and say what it gained and what it lost"
    finetune.add_options(
        commands.add_parser("finetune", help=what, description=what, formatter_class=shows, allow_abbrev=False)
    )
    return parser


def forecast(options: argparse.Namespace) -> dict:
    """Train and test as the options say; return everything that the command reports."""
    values, lengths = _data(options)
    module, make_model = MODELS[options.model]
    loss_function = getattr(module, f"{options.loss}_loss")
    weights = choose_settings("--weight", options.weight, loss_function)
    settings = choose_settings("--set", options.set, make_model)
    asked = settings.get("endogenous")
    train, validation, test, _ = prepare(values, lengths, options.history, options.horizon, endogenous=asked)
    period = min(24, options.history) if options.period is None else options.period
    naive = {"last value": _naive(test, period=1), f"last {period} steps again": _naive(test, period)}

    torch.manual_seed(options.seed)
    more = {"variables": values.shape[1]} if "variables" in inspect.signature(make_model).parameters else {}
    if options.loss == "documented" and options.model in RETURNED:
        more[RETURNED[options.model]] = True
    model = make_model(options.history, options.horizon, **more, **settings)
    loss = functools.partial(loss_function, **weights)
    names = ("epochs", "batch_size", "learning_rate", "decay", "patience", "seed", "checkpoint")
    how = {name: getattr(options, name) for name in names}
    training = fit(model, train, validation, loss, device=options.device, **how)
    return {
        "versions": {"mini_impl": version("mini_impl"), "torch": torch.__version__},
        "settings": {name: value for name, value in vars(options).items() if name not in ("command", *HERE)}
        | {"split": list(lengths), "weight": weights, "set": settings, "period": period},
        "windows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {"mse of each epoch": training.validation, "best epoch": training.best_epoch},
        "test": {options.model: evaluate(model, test)._asdict(), **naive},
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


def _split(text: str) -> tuple[int, ...]:
    """Three whole numbers with commas between them."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"wants three whole numbers such as 8640,2880,2880; got {text!r}")
    return tuple(map(int, parts))


def _data(options: argparse.Namespace) -> tuple[Tensor, tuple[int, ...]]:
    """The series [time, variable] that the options name, and how many rows of it to train, validate and test on."""
    if options.ett is not None:
        return load_csv(download_ett(options.ett)).values, options.split or ETT_SPLIT
    values = (load_auckland() if options.csv is None else load_csv(options.csv)).values
    train, validation = len(values) * 7 // 10, len(values) // 10
    return values, options.split or (train, validation, len(values) - train - validation)


def _naive(test: Windows, period: int) -> dict[str, float]:
    """The scores of repeating the last `period` steps of the variables to forecast."""
    asked = slice(None) if test.endogenous is None else test.endogenous
    return evaluate(lambda history: repeat_season(history[..., asked], test.horizon, period), test)._asdict()


def _without_files(arguments: list[str]) -> list[str]:
    """The command as one would repeat it elsewhere: without the options that name files of this machine."""
    command, rest = ["mini-impl"], iter(arguments)
    for argument in rest:
        option, equals, _ = argument.partition("=")
        if option.removeprefix("--") not in HERE or not option.startswith("--"):
            command.append(argument)
        elif not equals:
            next(rest)  # its value
    return command


if __name__ == "__main__":
    main()

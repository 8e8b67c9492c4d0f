"""The command `mini-impl`: train a forecaster beside the naive baselines, or fine-tune a language model."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

import mini_impl
from mini_impl import checks, workers
from mini_impl.checkpoint import check_writable, write_bytes
from mini_impl.finetuning import answer
from mini_impl.finetuning import command as finetune
from mini_impl.finetuning.sft import CONFIG, WEIGHTS
from mini_impl.forecasting import command as forecast
from mini_impl.forecasting import predict

COMMANDS = {
    "forecast": (forecast, "train and test a forecaster"),
    "predict": (predict, "the future of a series, by a forecaster that was kept"),
    "finetune": (finetune, "fine-tune a language model, and say what it gained and what it lost"),
    "answer": (answer, "ask a language model that was kept"),
}
TRAININGS = ("forecast", "finetune")
# Options that say where files of this machine are: not part of a result. Those that are written are tried beforehand.
READ, WRITTEN = ("csv", "data"), ("json", "checkpoint", "save", "adapter", "out")
HERE = ("checkpoint", "save_every", "json", "save", "adapter")


def main(arguments: list[str] | None = None) -> None:
    """Run the command. What a caller got wrong ends it with status 2 and one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    command, _ = COMMANDS[options.command]
    versions = {"mini_impl": mini_impl.__version__, "torch": torch.__version__}
    given = {name: value for name, value in vars(options).items() if name not in ("command", *HERE)}
    try:
        _check_files(options)
        checks.integer("--seed", getattr(options, "seed", 0), least=0, most=2**63 - 1)
        found = command.run(options)
        if workers.number():  # of several, the first says what all of them found
            return
        settings = {**given, **found.pop("settings", {})}
        result = {"command": _without_files(arguments), "versions": versions, "settings": settings, **found}
        if options.json is not None:  # first, as nobody may be there to read what is printed
            write_bytes(options.json, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
        command.report(result)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: torch's, out of range
        parser.exit(2, f"mini-impl: {error}\n")
    except KeyboardInterrupt:
        kept = getattr(options, "checkpoint", None)
        again = "goes on from there" if kept else "with --checkpoint FILE would go on from there"
        parser.exit(130, f"\nmini-impl: stopped; the same command {again}\n")


def make_parser() -> argparse.ArgumentParser:
    """The command's options: those of each subcommand, and those that all share."""
    parser = argparse.ArgumentParser(prog="mini-impl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (command, what) in COMMANDS.items():
        shows = argparse.ArgumentDefaultsHelpFormatter
        options = commands.add_parser(name, help=what, description=what, formatter_class=shows, allow_abbrev=False)
        command.add_options(options)
        options.add_argument("--device", default="cpu", help="cpu, cuda, mps")
        if name in TRAININGS:
            options.add_argument("--checkpoint", metavar="FILE", help="go on from it if it is there; kept current")
            options.add_argument("--save-every", type=int, metavar="STEPS", help="write the checkpoint so often too")
        options.add_argument("--json", metavar="OUT", help="write the result there too")
    return parser


def _check_files(options: argparse.Namespace) -> None:
    """Raise unless every file that is to be written can be, and is not one that is read, nor another one of them."""
    files = [(f"--{name}", getattr(options, name, None)) for name in (*READ, *WRITTEN)]
    if options.command not in TRAININGS:  # elsewhere a name
        files.insert(0, ("MODEL", options.model))
    if getattr(options, "reward", None) is not None:
        files.insert(0, ("--reward", options.reward.partition(":")[0].replace(".", os.sep) + ".py"))
    if getattr(options, "adapter", None) is not None:
        files = [(option, path) for option, path in files if option != "--adapter"]
        files += [("--adapter", Path(options.adapter) / part) for part in (CONFIG, WEIGHTS)]
    places: dict[Path, str] = {}
    for option, path in files:
        if path is None:
            continue
        place, written = Path(path).resolve(), option.removeprefix("--") in WRITTEN
        other = places.setdefault(place, option)
        if other != option and written and not place.is_char_device():  # such as /dev/null
            raise ValueError(f"{other} and {option} must be two files; got {path} for both")
        if written:
            check_writable(option, place)


def _without_files(arguments: list[str]) -> list[str]:
    """The command as one would repeat it elsewhere: without the options that name files of this machine."""
    command, rest = ["mini-impl"], iter(arguments)
    for argument in rest:
        option, equals, _ = argument.partition("=")
        if option.removeprefix("--").replace("-", "_") not in HERE or not option.startswith("--"):
            command.append(argument)
        elif not equals:
            next(rest)  # its value
    return command


if __name__ == "__main__":
    main()

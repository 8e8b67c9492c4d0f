"""The command `mini-impl`: train a forecaster beside the naive baselines, or fine-tune a language model."""

import argparse
import json
import sys

import torch

import mini_impl
from mini_impl.checkpoint import write_bytes
from mini_impl.finetuning import command as finetune
from mini_impl.forecasting import command as forecast

COMMANDS = {
    "forecast": (forecast, "train and test a forecaster"),
    "finetune": (finetune, "fine-tune a language model, and say what it gained and what it lost"),
}
HERE = ("checkpoint", "json")  # options that say where files of this machine are: not part of a result


def main(arguments: list[str] | None = None) -> None:
    """Run the command. What a caller got wrong ends it with status 2 and one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parser.parse_args(arguments)
    command, _ = COMMANDS[options.command]
    versions = {"mini_impl": mini_impl.__version__, "torch": torch.__version__}
    given = {name: value for name, value in vars(options).items() if name not in ("command", *HERE)}
    try:
        found = command.run(options)
        settings = {**given, **found.pop("settings")}
        result = {"command": _without_files(arguments), "versions": versions, "settings": settings, **found}
        command.report(result)
        if options.json is not None:
            write_bytes(options.json, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: torch's, for numbers out of range
        parser.exit(2, f"mini-impl: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nmini-impl: stopped; with --checkpoint FILE the same command would go on from there\n")


def make_parser() -> argparse.ArgumentParser:
    """The command's options: those of each subcommand, and those that all share."""
    parser = argparse.ArgumentParser(prog="mini-impl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (command, what) in COMMANDS.items():
        shows = argparse.ArgumentDefaultsHelpFormatter
        options = commands.add_parser(name, help=what, description=what, formatter_class=shows, allow_abbrev=False)
        command.add_options(options)
        options.add_argument("--device", default="cpu", help="cpu, cuda, mps")
        options.add_argument(
            "--checkpoint", metavar="FILE", help="go on from this file if it is there; replaced as it goes"
        )
        options.add_argument("--json", metavar="OUT", help="write the result there too")
    return parser


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

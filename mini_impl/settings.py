"""Settings that a command line gives by name: --set width=64, --weight trend_weight=0.5."""

import argparse
import inspect
import re
from collections.abc import Callable

# What a setting may be, by the type of its default.
KINDS = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a word"),
}


def parse_setting(text: str) -> tuple[str, bool | int | float | str | tuple[int, ...] | tuple[float, ...]]:
    """NAME=VALUE; the value true, false, a number, a word, or several numbers with commas between them."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            numbers = tuple(map(kind, value.split(",")))
        except ValueError:
            continue
        return name, numbers if len(numbers) > 1 else numbers[0]
    if re.fullmatch(r"\w+( \w+)*", value):
        return name, value
    raise argparse.ArgumentTypeError(f"wants NAME=VALUE such as trend_weight=0.5; got {text!r}")


def add_arguments(parser: argparse.ArgumentParser, function: Callable, helps: dict[str, str]) -> None:
    """Give a parser an option --name for each of these arguments of a function, {name: help}, with its default.

    One whose default is None takes a whole number, one whose default is False takes none: it is a switch.
    """
    parameters = inspect.signature(function).parameters
    for name, what in helps.items():
        default = parameters[name].default
        kind = {"action": "store_true"} if default is False else {"type": int if default is None else type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=what, **kind)


def choose_settings(option: str, given: list[tuple], function: Callable) -> dict:
    """The defaults of a loss, a model or a method with the given values on top.

    Raises ValueError for a setting that it does not take, or a value that is not of the kind of the default.
    """
    parameters = inspect.signature(function).parameters.values()
    settings = {parameter.name: parameter.default for parameter in parameters if _is_setting(parameter)}
    kinds = {name: KINDS.get(type(default)) for name, default in settings.items()}
    for name, value in given:
        if name not in settings:
            raise ValueError(f"{option}: {function.__name__} has no {name!r}; it takes {', '.join(settings) or 'none'}")
        types, wanted = kinds[name] or ((type(value),), "")
        if type(value) not in types:
            raise ValueError(f"{option}: {name} must be {wanted}; got {value!r}")
        settings[name] = float(value) if kinds[name] is KINDS[float] else value
    return settings


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Whether a parameter has a default to change; what a model returns follows from the loss."""
    return parameter.default is not parameter.empty and not parameter.name.startswith("return_")

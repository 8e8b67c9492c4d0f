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


def parse_setting(text: str) -> tuple[str, bool | int | float | str | tuple[int, ...]]:
    """NAME=VALUE; the value true, false, a number, a word, or several whole numbers with commas between them."""
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    if re.fullmatch(r"-?\d+(,-?\d+)+", value):
        return name, tuple(map(int, value.split(",")))
    if re.fullmatch(r"\w+( \w+)*", value):
        return name, value
    raise argparse.ArgumentTypeError(f"wants NAME=VALUE such as trend_weight=0.5; got {text!r}")


def choose_settings(option: str, given: list[tuple], function: Callable) -> dict:
    """The defaults of a loss or a model with the given values on top.

    Raises ValueError for a setting that it does not take, or a value that is not of the kind of the default.
    """
    parameters = inspect.signature(function).parameters.values()
    takes = {parameter.name: parameter.default for parameter in parameters if _is_setting(parameter)}
    settings = dict(takes)
    for name, value in given:
        if name not in takes:
            what = f"takes {', '.join(takes)}" if takes else "takes none"
            raise ValueError(f"{option}: {function.__name__} has no {name!r}; it {what}")
        kinds, wanted = KINDS.get(type(takes[name]), ((type(value),), ""))
        if type(value) not in kinds:
            raise ValueError(f"{option}: {name} must be {wanted}; got {value!r}")
        settings[name] = float(value) if isinstance(takes[name], float) else value
    return settings


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Whether a parameter has a default to change; what a model returns follows from the loss."""
    return parameter.default is not parameter.empty and not parameter.name.startswith("return_")

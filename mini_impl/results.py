"""The figures of runs that are too long for a page, each file with how they were measured: pages read them here."""

import json
from importlib.resources import files
from pathlib import Path

from mini_impl import checks


def _folder():
    """Where the result files are: in the installed package or, in a checkout, where their commands write them."""
    installed = files("mini_impl.assets") / "results"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "book" / "results"


def names() -> list[str]:
    """The names of the result files that there are, in alphabetical order."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir() if path.name.endswith(".json"))


def load(name: str) -> dict:
    """Return book/results/NAME.json. Raises ValueError if there is no such file."""
    checks.choice("the name of a result file", name, names())
    return json.loads((_folder() / f"{name}.json").read_text("utf-8"))

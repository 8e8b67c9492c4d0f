"""A copy of `mini_impl` without the modules that hold an assignment's answer."""

import ast
import compileall
import shutil
from collections.abc import Sequence
from pathlib import Path

FRONT_DOOR = '''\
"""Imports a name when it is asked for: some modules are withheld while an assignment is graded."""

from importlib import import_module

__version__ = "0 (grading)"
_home = {home!r}  # of each name, the module and what it is called there


def __getattr__(name):
    if name in _home:
        module, name = _home[name]
        return getattr(import_module(module), name)
    try:
        return import_module(f"{{__name__}}.{{name}}")
    except ModuleNotFoundError:
        raise AttributeError(f"there is no {{name}} in {{__name__}}") from None
'''


def strip(package: Path, folder: Path, withheld: Sequence[str]) -> None:
    """Copy `package` to folder/mini_impl without what is `withheld`: modules, such as "forecasting.dlinear", or single
    functions of a module that others need, such as "losses:orthogonality".

    What `mini_impl`, `mini_impl.forecasting` and `mini_impl.finetuning` import at their front doors is imported late in
    the copy, so that a module that is not there is missed by those who ask for it only. Raises ValueError for a module
    or a function that there is not.
    """
    copy = folder / "mini_impl"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in withheld:
        module, _, function = name.partition(":")
        path = copy.joinpath(*module.split(".")).with_suffix(".py")
        if not path.exists():
            raise ValueError(f"withheld must name modules of mini_impl; got {name!r}")
        if function:
            path.write_text(without(function, path.read_text("utf-8"), name), "utf-8")
        else:
            path.unlink()
    for place in (".", "forecasting", "finetuning"):
        path = copy / place / "__init__.py"
        path.write_text(FRONT_DOOR.format(home=imported(path.read_text("utf-8"))), "utf-8")
    compileall.compile_dir(copy, quiet=1)  # once, and not in every worker
    for path in (folder, *folder.rglob("*")):  # another account may have to read it
        path.chmod(0o755 if path.is_dir() else 0o644)


def without(function: str, code: str, name: str) -> str:
    """The code of a module without one of its functions."""
    found = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not found:
        raise ValueError(f"withheld must name functions that there are; got {name!r}")
    lines = code.splitlines(keepends=True)
    first = min([found[0].lineno, *(each.lineno for each in found[0].decorator_list)])
    return "".join(lines[: first - 1] + lines[found[0].end_lineno :])


def imported(code: str) -> dict[str, tuple[str, str]]:
    """What a front door imports from mini_impl's modules: {name: (module, name there)}."""
    home = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("mini_impl."):
            home |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return home

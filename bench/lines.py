"""Code lines of the package and the tests, and how many of the package's are validation: python -m bench.lines.

A code line holds something other than a comment, a docstring or nothing. Validation is, wherever it stands: the whole
of checks.py; every statement that only raises, an `if` or an `except` whose body only raises, and a `try` around
nothing else; every statement that calls something of `checks`, also while it keeps the value; and functions whose name
says that they check (`_check..`).
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> set[int]:
    """The numbers of the lines of a module that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= _span(node)  # a docstring
    return lines


def validation_lines(source: str, path: Path) -> set[int]:
    """Those of a module's code lines that are validation."""
    lines = code_lines(source)
    if path.name == "checks.py":
        return lines
    found: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if _validates(node):
            found |= _span(node)
    return found & lines


def _validates(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise):
        return True
    if isinstance(node, ast.If | ast.ExceptHandler):
        return _only_raises(node.body) and not getattr(node, "orelse", [])
    if isinstance(node, ast.FunctionDef):
        return node.name.startswith("_check")
    if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign | ast.AugAssign):
        return any(_calls_checks(part) for part in ast.walk(node))
    return False


def _only_raises(body: list[ast.stmt]) -> bool:
    """Whether a block ends in raising, and does nothing before but make the words for it."""
    return isinstance(body[-1], ast.Raise) and all(isinstance(statement, ast.Assign) for statement in body[:-1])


def _calls_checks(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    function = node.func
    if isinstance(function, ast.Name):
        return function.id.startswith("_check")
    return isinstance(function, ast.Attribute) and (
        (isinstance(function.value, ast.Name) and function.value.id == "checks") or function.attr.startswith("_check")
    )


def _span(node: ast.AST) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


def count(folder: Path) -> dict[str, tuple[int, int]]:
    """{module: (code lines, those of them that validate)}."""
    counts = {}
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text("utf-8")
        counts[str(path.relative_to(folder))] = len(code_lines(source)), len(validation_lines(source, path))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lines", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another checkout (default: this one)")
    root = parser.parse_args().root
    package, tests = count(root / "mini_impl"), count(root / "tests")
    for name, (code, validation) in package.items():
        print(f"{name:<34}{code:6}{validation:6}")
    code, validation = (sum(values) for values in zip(*package.values(), strict=True))
    print(f"{'mini_impl':<34}{code:6}{validation:6}  {validation / code:.1%} of it validation")
    print(f"{'tests':<34}{sum(lines for lines, _ in tests.values()):6}")


if __name__ == "__main__":
    main()

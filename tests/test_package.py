"""The front door: what there is is told on one screen, found by its name, and runs without being installed."""

import ast
import doctest
import importlib
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mini_impl

ROOT = Path(__file__).parents[1]
WINGS = ("mini_impl.forecasting", "mini_impl.finetuning")


def test_help_fits_on_a_screen():
    assert len(mini_impl.__doc__.splitlines()) <= 22
    assert len(pydoc.plain(pydoc.render_doc(mini_impl)).splitlines()) < 70


@pytest.mark.parametrize("name", ["mini_impl", *WINGS])
def test_the_examples_run_and_every_name_is_there(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module)
    assert not failed and (tried or name == "mini_impl.forecasting")
    for word in module.__all__:
        assert getattr(module, word, None) is not None, word


def test_models_and_trainers_are_at_the_front_door():
    names = [model.__name__ for model in mini_impl.forecasting.FORECASTERS.values()]
    for name in (*names, "fit", "evaluate", "load_csv", "fine_tune", "LanguageModel"):
        assert inspect.getdoc(getattr(mini_impl, name))
    assert mini_impl.results.load("etth1")
    assert (ROOT / "mini_impl" / "py.typed").exists()


def test_the_example_of_the_readme_runs(tmp_path):
    """The same in both languages, and as it stands but for the epochs."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len(examples) == 2 and examples[0] == examples[1]
    code = examples[0].replace("epochs=3", "epochs=1")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.startswith("Scores(mse=0."), run.stderr


def test_a_source_tree_runs_without_being_installed(tmp_path):
    shutil.copytree(ROOT / "mini_impl", tmp_path / "mini_impl", ignore=shutil.ignore_patterns("__pycache__"))
    hide = "import importlib.metadata as m; m.version = lambda name: m.Distribution.from_name('no ' + name)"
    code = (
        f"{hide}; from mini_impl import cli; cli.main(['forecast', 'dlinear', '--epochs', '1', '--json', 'out.json'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "(not installed)" in (tmp_path / "out.json").read_text()


def test_every_module_says_what_it_is_and_arrows_point_down():
    """Chapters import what they share, never one another; the two wings do not know each other."""
    chapters = {"dlinear", "patchtst", "itransformer", "timesnet", "timexer", "sft", "grpo", "dapo"}
    for path in (ROOT / "mini_impl").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree) or path.parent.name == "assets", path
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        parts = {part for name in names for part in name.split(".")}
        if path.stem in chapters:
            assert not parts & chapters, path
        if path.parent.name in ("forecasting", "finetuning"):
            assert not parts & ({"forecasting", "finetuning"} - {path.parent.name}), path

"""What runs the book with other people's versions. `make colab` and `make oldest` are these runs themselves."""

import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from books import ROOT, tool
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BOUNDS = {need.name: need.specifier for need in map(Requirement, PROJECT["dependencies"])}


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "tools")
    return tool("elsewhere")


def test_the_versions_of_colab_have_a_date_and_are_within_the_bounds(elsewhere):
    versions = dict(line.split("==") for line in elsewhere.wanted("colab"))
    assert set(BOUNDS) - set(versions) == {"filelock"}, "which torch brings"
    assert all(versions[name] in BOUNDS[name] for name in BOUNDS if name in versions)
    text = (ROOT / "constraints-colab.txt").read_text("utf-8")
    (day,) = re.findall(r"\d{4}-\d\d-\d\d", text)
    assert datetime.date.fromisoformat(day) > datetime.date(2026, 1, 1)
    assert f"Python {elsewhere.PYTHON['colab']}" in text


def test_the_oldest_versions_are_the_bounds(elsewhere):
    assert {line.split("==")[0]: line.split("==")[1] for line in elsewhere.wanted("oldest")} == {
        name: next(iter(bounds)).version for name, bounds in BOUNDS.items()
    }
    assert f">={elsewhere.PYTHON['oldest']}" == PROJECT["requires-python"]


def test_without_that_python_it_says_so(elsewhere, monkeypatch, tmp_path, capsys):
    for name in ("PATH", "HOME", "PYENV_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["elsewhere.py", "colab", "losses", "--environment", str(tmp_path / "new")])
    assert elsewhere.main() == 1
    assert capsys.readouterr().err.startswith("elsewhere: there is no Python 3.13 here")


def test_a_python_that_pyenv_only_pretends_to_have_is_passed_over(elsewhere, monkeypatch, tmp_path):
    for path, text in {"python3.13": "exit 127", "versions/3.13.2/bin/python3": f'exec {sys.executable} "$@"'}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / path).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert elsewhere.find_python("3.13") == str(tmp_path / "versions/3.13.2/bin/python3")


def test_a_page_stands_alone_with_the_address_of_a_repository_that_has_its_tag(elsewhere, tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "pages").mkdir()
    book = elsewhere.snapshot(tmp_path / "book")
    git = ["git", "-C", tmp_path / "book"]
    assert subprocess.run([*git, "tag"], capture_output=True, text=True).stdout.split() == [book.tag]
    assert (tmp_path / "book" / "mini_impl" / "assets" / "base_model.safetensors").exists()
    folders = elsewhere.lone_pages(tmp_path / "pages", ["losses"], book)
    assert [folder.name for folder in folders] == ["losses-en", "losses-zh"]
    for folder in folders:
        (file,) = folder.iterdir()
        (cell,) = [cell for cell in nbformat.read(file, as_version=4).cells if cell["id"] == "setup"]
        assert f"git+file://localhost{tmp_path}/book@" in cell.source and f'install("{book.tag}")' in cell.source


@pytest.mark.parametrize(
    ("after", "complaint"),
    [
        ({"torch": "2.11.0", "mini-impl": "0.1.0", "zhplot": "1.0.0"}, None),
        ({"torch": "2.13.0", "mini-impl": "0.1.0", "zhplot": "1.0.0"}, "changed {'torch': '2.11.0'}"),
        ({"torch": "2.11.0", "mini-impl": "0.1.0", "zhplot": "1.0.0", "pandas": "3.0"}, "and installed .*pandas"),
        ({"torch": "2.11.0"}, r"and installed \[\]"),
    ],
)
def test_the_set_up_cell_may_add_the_package_and_change_nothing(elsewhere, monkeypatch, after, complaint):
    told = iter([{"torch": "2.11.0"}, after, after])
    ran = []
    monkeypatch.setattr(elsewhere, "installed", lambda python: next(told))
    monkeypatch.setattr(elsewhere, "snapshot", lambda folder: SimpleNamespace())
    monkeypatch.setattr(elsewhere, "lone_pages", lambda folder, names, book: [Path(folder) / name for name in names])
    monkeypatch.setattr(elsewhere, "call", lambda *command, cwd: ran.append(command))
    if complaint is None:
        elsewhere.run_pages(Path("python"), ["one", "two", "three"], 2)
        assert [[part.name for part in command if isinstance(part, Path)] for command in ran] == [
            ["python", "one"],
            ["python", "two", "three"],
        ], "the first alone"
    else:
        with pytest.raises(elsewhere.ElsewhereError, match=complaint):
            elsewhere.run_pages(Path("python"), ["one", "two"], 2)

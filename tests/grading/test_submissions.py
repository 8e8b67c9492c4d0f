"""Right, half-right, broken and cheating submissions of an assignment get the score that they deserve."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.grading.submissions import CHEATING, GREEDY, HONEST, ROOT, SHUT_OUT, SOURCE

import grader  # isort: skip
from sandbox import Limits, Sandbox  # isort: skip
from stripped import strip  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the grader needs pipes of Unix")]

WORKERS = 2
ORDINARY = HONEST | CHEATING


def notebook(cells: list[str]) -> str:
    made = [{"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": x} for x in cells]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def graded(folder: Path, submissions: dict, limits: Limits, kind: str | None = None) -> dict[str, dict]:
    SOURCE.write(folder / "made")
    (folder / "submissions").mkdir()
    for name, (cells, _) in submissions.items():
        (folder / "submissions" / f"{name}.ipynb").write_text(notebook(cells), "utf-8")
    (folder / "submissions" / "=no_notebook.ipynb").write_text("not a notebook")
    grading, given, out = folder / "made" / "grading", folder / "submissions", folder / "out"
    return grader.grade_folder(grading, given, out, WORKERS, 3, limits, kind)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordinary")
    return folder, graded(folder, ORDINARY, Limits(cells=60, call=20))


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("greedy"), GREEDY, Limits(cells=3, call=3))


@pytest.fixture(scope="module")
def shut_out(tmp_path_factory):
    try:
        return graded(tmp_path_factory.mktemp("shut"), SHUT_OUT, Limits(cells=60, call=20), "bubblewrap")
    except RuntimeError:
        pytest.skip("bubblewrap does not run here")


def told(results: dict) -> str:
    tests = [f"{test['score']:g}: {test['name']}: {test['output']}" for test in results["tests"]]
    return "\n".join([results["output"], *tests])


@pytest.mark.parametrize("name", ORDINARY)
def test_a_submission_gets_the_score_it_deserves(ordinary, name):
    results = ordinary[1][name]
    assert results["score"] == ORDINARY[name][1], told(results)
    assert sum(test["max_score"] for test in results["tests"]) == 100


@pytest.mark.parametrize("name", GREEDY)
def test_what_takes_too_much_costs_its_questions_alone(greedy, name):
    assert greedy[name]["score"] == GREEDY[name][1], told(greedy[name])


@pytest.mark.parametrize("name", SHUT_OUT)
def test_what_a_sandbox_stands_against(shut_out, name):
    assert shut_out[name]["score"] == SHUT_OUT[name][1], told(shut_out[name])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are found in /proc")
def test_no_process_is_left(ordinary):
    deadline = time.monotonic() + 5
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and b"98765" in command(pid)]:
        assert time.monotonic() < deadline, left


def command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_table_and_the_reports(ordinary):
    out, done = ordinary[0] / "out", ordinary[1]
    rows = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()]
    # A spreadsheet would take a name that begins with = for a formula.
    assert {row[0]: float(row[1]) for row in rows[1:]} == {
        name.replace("=", "'="): results["score"] for name, results in done.items()
    }
    assert "正确" in report(out, "right") and "No gradient flows back" in report(out, "no_gradient")
    assert "look at what the formula divides by" in report(out, "no_half")
    assert "along the wrong axes" in report(out, "transposed") and "wrong sign" in report(out, "sign")
    assert "wrong at the first and last time steps" in report(out, "zeros_outside")
    assert "ZeroDivisionError" in report(out, "crashing_cells")


def report(out: Path, name: str) -> str:
    return (out / "reports" / f"{name}.md").read_text("utf-8")


def test_a_run_goes_on_where_it_was(ordinary, monkeypatch):
    folder, done = ordinary
    (folder / "out" / "results" / "sign.json").unlink()
    asked = []
    monkeypatch.setattr(grader, "grade", lambda path, *others: asked.append(path.stem) or ([], "en", []))
    again = grader.grade_folder(folder / "made" / "grading", folder / "submissions", folder / "out", 1)
    assert asked == ["sign"] and {name for name in done if again[name] != done[name]} == {"sign"}


def test_a_sandbox_shows_neither_home_nor_network_nor_repository(tmp_path):
    tmp_path.chmod(0o755)
    strip(ROOT / "mini_impl", tmp_path, SOURCE.settings["withheld"])
    try:
        sandbox = Sandbox(tmp_path, Limits(), "bubblewrap")
    except RuntimeError:
        pytest.skip("bubblewrap does not run here")
    look = f"""
import os, socket, torch
places = [{str(ROOT / "mini_impl")!r}, {str(Path.home() / ".bashrc")!r}, "/home", "/etc/passwd", "/var"]
found = [float(os.path.exists(place)) for place in places]
for attempt in (lambda: socket.create_connection(("1.1.1.1", 53), 2), lambda: open("/usr/made", "w")):
    try:
        attempt()
        found.append(1.0)
    except OSError:
        found.append(0.0)
found = torch.tensor(found)
"""
    student = grader.Student([look], sandbox)
    try:
        assert student.value("found").tolist() == [0.0] * 7
    finally:
        student.close()

"""Right, half-right, broken and cheating submissions of every assignment get the score that they deserve.

`make test` runs the honest ones; `make test-classroom` all, and a class of a hundred.
"""

import json
import os
import resource
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from tests.grading.submissions import ROOT, Scored, Submissions, assignments

import grader  # isort: skip
from sandbox import Limits, Sandbox  # isort: skip
from stripped import strip  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the grader needs pipes of Unix")]


def classroom(test):
    """Runs in `make test-classroom`, as it takes minutes."""
    skipped = pytest.mark.skipif("CLASSROOM" not in os.environ, reason="make test-classroom runs it")
    return pytest.mark.classroom(skipped(test))


NAMES = assignments.names()
WORKERS = 2
submissions = cache(Submissions)


def notebook(cells: list[str]) -> str:
    made = [{"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": x} for x in cells]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def graded(folder: Path, name: str, scored: Scored, limits: Limits | None = None, kind: str | None = None):
    """(the folder of the results, {submission: its results})."""
    submissions(name).source.write(folder / "made")
    (folder / "submissions").mkdir()
    for submission, (cells, _) in scored.items():
        (folder / "submissions" / f"{submission}.ipynb").write_text(notebook(cells), "utf-8")
    (folder / "submissions" / "=no_notebook.ipynb").write_text("not a notebook")
    grading, given, out = folder / "made" / "grading", folder / "submissions", folder / "out"
    return out, grader.grade_folder(grading, given, out, WORKERS, 3, limits, kind)


def check_scores(scored: Scored, results: dict[str, dict]) -> None:
    """Every submission has its score; else say of those that have not what each question found."""
    wrong = {name: told(results[name]) for name, (_, score) in scored.items() if results[name]["score"] != score}
    assert not wrong, "\n\n".join(f"{name}, which deserves {scored[name][1]}:\n{text}" for name, text in wrong.items())
    assert results["=no_notebook"]["score"] == 0


def told(results: dict) -> str:
    tests = [f"{test['score']:g}: {test['name']}: {test['output']}" for test in results["tests"]]
    return "\n".join([results["output"], *tests])


@pytest.mark.parametrize("name", NAMES)
def test_an_honest_submission_gets_the_score_it_deserves(name, tmp_path):
    scored = submissions(name).honest
    results = graded(tmp_path, name, scored)[1]
    check_scores(scored, results)
    assert sum(test["max_score"] for test in results["right"]["tests"]) == 100
    assert not results["right"]["output"], "no cell of the solution fails"


@classroom
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_submission_gets_the_score_it_deserves(name, tmp_path):
    scored = submissions(name).broken
    check_scores(scored, graded(tmp_path, name, scored)[1])


@classroom
@pytest.mark.parametrize("name", NAMES)
def test_a_cheating_submission_gets_the_score_it_deserves(name, tmp_path):
    scored = submissions(name).cheating
    check_scores(scored, graded(tmp_path, name, scored)[1])
    if os.path.isdir("/proc/self"):
        check_no_process_is_left()


def check_no_process_is_left() -> None:
    deadline = time.monotonic() + 5
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and b"98765" in command(pid)]:
        assert time.monotonic() < deadline, left


def command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@classroom
@pytest.mark.parametrize("name", NAMES)
def test_what_takes_too_much_costs_its_questions_alone(name, tmp_path):
    scored = submissions(name).greedy
    check_scores(scored, graded(tmp_path, name, scored, Limits(cells=8, call=4, memory=10**9))[1])


@classroom
@pytest.mark.parametrize("name", NAMES)
def test_what_a_sandbox_stands_against(name, tmp_path):
    scored = submissions(name).shut_out
    try:
        results = graded(tmp_path, name, scored, kind="bubblewrap")[1]
    except RuntimeError:
        pytest.skip("bubblewrap does not run here")
    check_scores(scored, results)


@classroom
def test_a_class_of_a_hundred(tmp_path, capsys):
    """All in one run: its time and memory are printed."""
    ours = submissions("dlinear").honest | submissions("dlinear").broken
    each = {name: ours[name] for name in ("right", "empty", "crashing", "float32", "mistake_0")}
    scored = {f"{name}_{number:02}": submission for number in range(20) for name, submission in each.items()}
    began = time.monotonic()
    check_scores(scored, graded(tmp_path, "dlinear", scored)[1])
    seconds, kilobytes = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with capsys.disabled():
        print(f"\n{len(scored)} submissions: {seconds:.0f} s, {kilobytes // 1000} MB at most in the grader")


# ---- What is written beside the scores


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    ours = submissions("dlinear").honest | submissions("dlinear").broken
    named = {"right": "right", "sign": "mistake_5", "no_half": "mistake_1", "crashing_cells": "crashing_cells"}
    folder = tmp_path_factory.mktemp("few")
    return folder, *graded(folder, "dlinear", {name: ours[kind] for name, kind in named.items()})


def test_the_table_and_the_reports(few):
    _, out, done = few
    rows = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()]
    # A spreadsheet would take a name that begins with = for a formula.
    assert {row[0]: float(row[1]) for row in rows[1:]} == {
        name.replace("=", "'="): results["score"] for name, results in done.items()
    }
    assert "正确" in report(out, "right") and "wrong sign" in report(out, "sign")
    assert "look at the sums, the divisions" in report(out, "no_half")
    assert "ZeroDivisionError" in report(out, "crashing_cells")


def report(out: Path, name: str) -> str:
    return (out / "reports" / f"{name}.md").read_text("utf-8")


def test_a_run_goes_on_where_it_was(few, monkeypatch):
    folder, out, done = few
    (out / "results" / "sign.json").unlink()
    asked = []
    monkeypatch.setattr(grader, "grade", lambda path, *others: asked.append(path.stem) or ([], "en", []))
    again = grader.grade_folder(folder / "made" / "grading", folder / "submissions", out, 1)
    assert asked == ["sign"] and {name for name in done if again[name] != done[name]} == {"sign"}


def test_a_sandbox_shows_neither_home_nor_network_nor_repository(tmp_path):
    tmp_path.chmod(0o755)
    strip(ROOT / "mini_impl", tmp_path, submissions("dlinear").source.settings["withheld"])
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

"""What `make assignments` writes, and what the grader takes for numbers."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book" / "grading"), str(ROOT / "book" / "tools")]

import assignments  # noqa: E402
import grader  # noqa: E402
from notebooks import PageError, repository  # noqa: E402
from stripped import strip  # noqa: E402


@pytest.fixture(scope="module", params=assignments.names())
def made(request, tmp_path_factory):
    assignment, folder = assignments.Assignment(request.param), tmp_path_factory.mktemp("made")
    assignment.write(folder)
    return assignment, folder


@pytest.mark.parametrize("language", assignments.LANGUAGES)
def test_a_student_gets_blanks_and_checks_and_no_answer(made, language):
    assignment, folder = made
    student = json.loads((folder / "student" / language / f"{assignment.name}.ipynb").read_text("utf-8"))
    solution = json.loads((folder / "solution" / language / f"{assignment.name}.ipynb").read_text("utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in student["cells"])
    assert text.count("raise NotImplementedError") >= 3 and "classroom.check(" in text and "grader" not in text
    assert all(cell.get("outputs", []) == [] and cell["metadata"] == {} for cell in student["cells"])
    assert len(student["cells"]) == len(solution["cells"])
    assert bool(re.search("[\u3400-\u9fff]", text)) == (language == "zh") and " | " not in text
    secrets = [cell.source for cell in assignments.code_cells(assignment.cells) if assignments.tagged(cell, "solution")]
    solved = "\n".join("".join(cell["source"]) for cell in solution["cells"])
    for secret in secrets:
        assert secret not in text and secret.split("\n")[-1] in solved


def test_the_points_are_a_hundred(made):
    settings, questions = grader.load_questions(made[1] / "grading")
    assert sum(question.points for question in questions) == 100
    assert settings["withheld"] and set(settings["title"]) == set(assignments.LANGUAGES)


def test_a_solution_that_students_would_find_is_refused():
    assignment = assignments.Assignment("dlinear")
    check = next(cell for cell in assignment.cells if assignments.tagged(cell, "public"))
    check.source += "\ntrend = longer.unfold(1, kernel_size, 1).mean(-1)  # [batch, time, variable]"
    with pytest.raises(PageError, match="a student would find this line"):
        assignment.notebook("en", False, repository())


def test_what_is_withheld_is_gone_and_the_rest_is_there(tmp_path):
    strip(ROOT / "mini_impl", tmp_path, ["forecasting.dlinear", "losses:orthogonality"])
    assert not (tmp_path / "mini_impl" / "forecasting" / "dlinear.py").exists()
    losses = (tmp_path / "mini_impl" / "losses.py").read_text("utf-8")
    assert "def orthogonality(" not in losses and "def _orthogonality(" in losses and "def kl_from_uniform(" in losses
    for name in ("forecasting.nothing", "losses:nothing"):
        with pytest.raises(ValueError, match=f"withheld must name .*; got '{name}'"):
            strip(ROOT / "mini_impl", tmp_path / name, [name])


# ---- Numbers


def blob(array, **more):
    file = io.BytesIO()
    np.save(file, array, **more)
    return file.getvalue()


def test_numbers_are_read_and_nothing_else_is():
    array = np.arange(6.0).reshape(2, 3)
    assert (grader.numbers(blob(array)) == array).all() and (grader.numbers(blob(array.T)) == array.T).all()
    assert grader.numbers(blob(np.array(3))).shape == ()
    huge = blob(array).replace(b"(2, 3)", b"(9**9,")
    wrong = [b"", b"x" * 100, blob(array)[:-1], blob(array) + b"x", huge, blob(np.array(["a"])), blob(array + 1j)]
    wrong += [blob(np.array([{}]), allow_pickle=True), blob(array).replace(b"(2, 3)", b"(-2,-3")]
    assert [grader.numbers(text) for text in wrong] == [None] * len(wrong)


def test_a_students_words_are_harmless():
    assert not re.search(r"[<>|`\n\x1b]", grader.plain("<b>|\n\x1b[31m=cmd`")) and len(grader.plain("x" * 999)) == 300
    assert grader.harmless("=1+1") == "'=1+1" and grader.harmless("Li") == "Li"

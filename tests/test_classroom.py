"""mini_impl.classroom: what the checks in an assignment say."""

import re
from pathlib import Path

import pytest
import torch

from mini_impl import classroom
from mini_impl.language import use_language

ROOT = Path(__file__).parents[1]

X = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: 2 * x, "Right."),
        (lambda x: None, "Not written yet"),
        (lambda x: -2 * x, "wrong sign"),
        (lambda x: x, "one and the same factor"),
        (lambda x: 2 * x + 1, "by the same amount"),
        (lambda x: 2 * x.mT, "wrong axes"),
        (lambda x: 2 * x[:1], "The shape must be [2, 3]; got [1, 3]"),
        (lambda x: x**2, "the numbers are not"),
        (lambda x: 2 * x / 0, "NaN or infinity"),
        (lambda x: 2 * x.detach(), "no gradient"),
        (lambda x: (2 * x, x), "must return 1 results; it returned 2"),
        (lambda x: "2", "no number"),
        (lambda x: x.nothing, "raised AttributeError"),
        (lambda x: (x.data.mul_(2), x)[1] * 1, "writes into its input"),
    ],
)
def test_a_check_says_in_what_way_an_answer_is_wrong(function, says, capsys):
    assert classroom.check(function, X, wanted=[2 * X], gradients=True) == (says == "Right.")
    printed = capsys.readouterr().out
    assert says in printed and "18" not in printed  # 18 is the last of the right numbers
    use_language("zh")
    classroom.check(function, X, wanted=[2 * X], gradients=True)
    assert re.search("[\u3400-\u9fff]", capsys.readouterr().out)


def test_a_check_knows_edges(capsys):
    want = torch.arange(1.0, 10).view(1, 9, 1)
    got = want.clone()
    got[:, 0] = 0
    assert not classroom.check(lambda x: got, want, wanted=[want], axes=[("batch", "time", "variable")])
    assert "wrong at the first and last time steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "says"),
    [(None, "Not filled in"), (float("nan"), "finite"), ("a", "finite"), (1e9, "cannot be right"), (3, "Noted")],
)
def test_a_number_is_noted_and_not_judged(answer, says, capsys):
    assert classroom.check_number(answer, 0, 10) == (answer == 3)
    assert says in capsys.readouterr().out


def test_the_checks_are_short_enough_to_be_read():
    assert len((ROOT / "mini_impl" / "classroom.py").read_text("utf-8").splitlines()) <= 200


def test_of_one_number_no_factor_is_told(capsys):
    assert not classroom.check(lambda x: 3 * x.sum(), X, wanted=[X.sum()])
    assert "look at the sums, the divisions, the weights" in capsys.readouterr().out


def test_what_is_wanted_may_come_from_earlier_exercises(capsys):
    assert classroom.check(lambda x: 2 * x, X, wanted=lambda: [2 * X])

    def earlier():
        raise NotImplementedError

    assert not classroom.check(lambda x: 2 * x, X, wanted=earlier)
    assert not classroom.check(lambda x: None, X, wanted=earlier), "what is not written itself is told first"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "This check needs an earlier exercise first.",
        "Not written yet: it returns nothing, or raises NotImplementedError.",
    ]


def test_whole_numbers_need_no_gradient(capsys):
    assert classroom.check(lambda x, n: x[n], X, torch.tensor([1]), wanted=[X[1:]], gradients=True)
    assert capsys.readouterr().out == "Right.\n"

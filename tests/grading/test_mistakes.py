"""The common mistakes of every assignment, as the teacher's page tells of them."""

import sys

import pytest

from mini_impl import results
from tests.grading.submissions import ROOT, assignments

sys.path.insert(0, str(ROOT / "book" / "experiments"))

import mistakes

STORED = results.load("mistakes")["rows"]


def test_there_are_some_for_every_assignment():
    counts = {name: sum(row["assignment"] == name for row in STORED.values()) for name in assignments.names()}
    assert min(counts.values()) >= 4, counts
    assert sum(counts.values()) == len(STORED)


@pytest.mark.parametrize("name", assignments.names())
def test_the_check_below_says_what_is_stored(name):
    """And never that a mistake is right. `python book/experiments/mistakes.py` stores it again."""
    found = mistakes.rows([name])
    assert found == {key: row for key, row in STORED.items() if row["assignment"] == name}
    right = {"Right.", "正确。"}
    assert all(not right & set(text.splitlines()) for row in found.values() for text in row["told"].values())

"""The fuzzer itself: every public function has its valid call, and what it is for, it finds."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import fuzz
from tests.fuzz_calls import CALLS, SKIPPED

ROOT = Path(__file__).parents[1]


def test_every_public_function_that_says_what_it_raises_is_called_or_excused():
    assert not set(fuzz.doors()) - CALLS.keys() - SKIPPED.keys()
    assert len(CALLS) > 100 and not CALLS.keys() & SKIPPED.keys()


@pytest.mark.slow
def test_a_short_attack_finds_nothing():
    """In a process of its own, as `make fuzz`: one that has threads may not be forked."""
    command = [sys.executable, "-m", "tests.fuzz", "--calls", "3000", "--seed", "1"]
    how = {"cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    run = subprocess.run(command, timeout=600, **how)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def square(value: torch.Tensor) -> torch.Tensor:
    """The square. Raises TypeError."""
    return value * value


def look_up(value: int) -> int:
    """What stands there. Raises TypeError."""
    return {1: 2}[value]


def polite(value: int) -> int:
    """The number. Raises TypeError."""
    if type(value) is not int:
        raise TypeError(f"value must be a whole number; got {value!r}")
    return value


@pytest.mark.parametrize(
    ("function", "value", "found"),
    [
        (square, torch.ones(3), {"SILENT NAN", "SILENT INF"}),
        (look_up, 1, {"UNDOCUMENTED"}),
        (polite, 1, set()),
    ],
)
def test_planted_defects_are_found(monkeypatch, function, value, found):
    monkeypatch.setitem(fuzz.PUBLIC, "planted", function)
    monkeypatch.setitem(CALLS, "planted", lambda: (function, {"value": value}))
    threads = torch.get_num_threads()
    try:
        _, counts, defects = fuzz.attack(("planted", 0, 200))
    finally:
        torch.set_num_threads(threads)
    assert sum(counts.values()) == 200 and isinstance(counts, collections.Counter)
    assert {kind for kind in counts if kind.isupper()} >= found and {kind for kind, *_ in defects} >= found
    assert found or not defects

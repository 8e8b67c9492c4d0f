"""Every kernel compiles for three GPUs, with none there, and as book/results/kernels.json says."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest

from mini_impl import results

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not find_spec("triton"), reason="triton is in the extra 'gpu'"),
]
ROOT = Path(__file__).parents[2]
PLACE = ("card", "of", "dtype", "kernel")
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "MINI_IMPL_KERNELS"))
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What `make kernels` writes, compiled in a process of its own: in this one Triton may interpret."""
    path = tmp_path_factory.mktemp("compiled") / "kernels.json"
    command = [sys.executable, "-m", "bench.kernels", path]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(path.read_text("utf-8")) | {"printed": run.stdout}


def test_every_kernel_compiles_for_every_card_and_dtype_and_spills_nothing(compiled):
    names = {(row["of"], row["kernel"]) for row in compiled["rows"]}
    assert {name.partition(" ")[0] for name, _ in names} == {"decomposition", "logprob", "clipped_loss"}
    places = [tuple(row[key] for key in PLACE) for row in compiled["rows"]]
    dtypes = ("float32", "bfloat16", "float16", "float64")
    every = {
        (card, name, dtype, kernel) for card, (name, kernel), dtype in product(("T4", "A100", "H100"), names, dtypes)
    }
    assert len(places) == len(set(places)) and set(places) == every
    for row in compiled["rows"]:
        assert row["spilled"] == 0 and 0 < row["registers"] <= 255, row
        assert row["shared memory"] <= 48 * 1024, row  # what each of these cards gives a program without being asked
    assert len(compiled["printed"].splitlines()) == 1 + len(every)


def test_the_stored_rows_are_these(compiled):
    stored = results.load("kernels")
    assert [[row[key] for key in PLACE] for row in stored["rows"]] == [
        [row[key] for key in PLACE] for row in compiled["rows"]
    ]
    if stored["versions"]["triton"] == compiled["versions"]["triton"]:  # another one has another compiler
        assert stored["rows"] == compiled["rows"]


def test_an_interpreter_compiles_nothing():
    command = [sys.executable, "-m", "bench.kernels"]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("TRITON_INTERPRET=1 has Triton interpret kernels: unset it")

"""Rows of a result file: each is one call of a function, kept as soon as it is finished.

A row stands in book/results/NAME.json with its arguments; one that stands there with the same arguments and versions is
not computed again, so that a script that was stopped goes on where it was. Rows run side by side, one thread each:
sums are then formed in one order, whatever the machine.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import mini_impl
from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting.data import Windows

RESULTS = Path(__file__).parents[1] / "results"
VERSIONS = {"mini_impl": mini_impl.__version__, "torch": torch.__version__}


class Thinned(Windows):
    """Every n-th window of a part."""

    def __init__(self, windows: Windows, every: int):
        super().__init__(windows.values, *windows.form, windows.origin)
        self._histories, self._targets = self._histories[::every], self._targets[::every]

    def to(self, device):
        return self


def compute(name: str, function: Callable[..., dict], arguments: dict[str, dict], jobs: int | None = None) -> dict:
    """{key: row} of book/results/NAME.json, after function(**arguments[key]) was called for each key that lacks one.

    A row is {"arguments": .., **what the function returned, "seconds": ..}. Rows of other scripts' keys stay.
    """
    file = RESULTS / f"{name}.json"
    rows = read(name)
    missing = [key for key, given in arguments.items() if rows.get(key, {}).get("arguments") != plain(given)]
    if missing:
        calls = [(key, function, arguments[key]) for key in missing]
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(jobs or os.cpu_count() or 1, len(calls)), one_thread) as pool:
            for key, row in tqdm(pool.imap_unordered(call, calls), f"{name}", len(calls), dynamic_ncols=True):
                rows[key] = row
                write(file, rows)
    return {key: rows[key] for key in arguments}


def read(name: str) -> dict:
    """The rows that book/results/NAME.json has, if these versions made it."""
    file = RESULTS / f"{name}.json"
    old = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return old["rows"] if old.get("versions") == VERSIONS else {}


def write(file: Path, rows: dict) -> None:
    command = "python book/experiments/" + Path(sys.argv[0]).name
    content = {"command": command, "versions": VERSIONS, "rows": dict(sorted(rows.items()))}
    lines = json.dumps(content, ensure_ascii=False, indent=1)
    write_bytes(file, (lines + "\n").encode())


def plain(value: dict) -> dict:
    """The value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def one_thread() -> None:
    torch.set_num_threads(1)


def call(job: tuple[str, Callable[..., dict], dict]) -> tuple[str, dict]:
    key, function, arguments = job
    start = time.perf_counter()
    row = function(**arguments)
    return key, {"arguments": plain(arguments), **row, "seconds": round(time.perf_counter() - start, 1)}

"""Compiles every kernel of mini_impl/kernels for three GPUs, without one; writes book/results/kernels.json.

A kernel is compiled as its function would launch it, forward and backward, for each dtype: the function is called with
tensors of the CPU, and in the launch's place stands a compilation by Triton for the GPU. Its assembler says how many
registers a thread needs, how much shared memory a program, and how many bytes are spilled: registers that did not fit,
and are moved to memory and back. What it cannot say is how fast a kernel is.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from tqdm import tqdm

from mini_impl.checkpoint import write_bytes
from mini_impl.kernels import clipped_loss, decomposition, logprob

RESULT = Path(__file__).parents[1] / "book" / "results" / "kernels.json"
CARDS = {"T4": 75, "A100": 80, "H100": 90}  # compute capability x 10
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def decompose(dtype: torch.dtype) -> None:
    """Windows of 336 steps of 7 variables, the average over 25 steps."""
    series = torch.zeros(32, 336, 7, dtype=dtype, requires_grad=True)
    trend, seasonal = decomposition.decompose(series, 25)
    torch.autograd.backward([trend, seasonal], [torch.ones_like(trend), torch.ones_like(seasonal)])


def token_logprobs(dtype: torch.dtype) -> None:
    """1024 tokens of SmolLM2's vocabulary, at a temperature."""
    logits = torch.zeros(1024, 49152, dtype=dtype, requires_grad=True)
    logprob.token_logprobs(logits, torch.zeros(1024, dtype=torch.long), 0.7).sum().backward()


def clip(reduce_by: str) -> Callable[[torch.dtype], None]:
    """64 answers of 1024 tokens."""

    def run(dtype: torch.dtype) -> None:
        logprobs = torch.zeros(64, 1024, dtype=dtype, requires_grad=True)
        max_length = 1024 if reduce_by == "length" else None
        mask = torch.ones(64, 1024, dtype=torch.bool)
        zeros = torch.zeros(64, 1024, dtype=dtype)
        clipped_loss.clipped_loss(logprobs, zeros, zeros[:, 0], mask, 0.2, 0.28, reduce_by, max_length).backward()

    return run


CASES = {
    "decomposition": decompose,
    "logprob": token_logprobs,
    **{f"clipped_loss by {reduce_by}": clip(reduce_by) for reduce_by in clipped_loss.REDUCTIONS},
}


class Card:
    """What Triton asks of a driver when it compiles, for a card that is not there."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what was compiled is kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int) -> Iterator[list[dict]]:
    """Launches of a kernel compile it instead, and add a row to the list: kernel, registers, shared memory, spills."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    rows, launch = [], JITFunction.run

    def compile_it(self, *args, grid, warmup, **how):
        with redirect_stdout(StringIO()) as log:  # of the assembler, ptxas -v
            compiled = launch(self, *args, grid=grid, warmup=True, **how)
        if said := log.getvalue():  # nothing is said where it was compiled before
            rows.append(
                {
                    "kernel": compiled.metadata.name,
                    "warps": compiled.metadata.num_warps,
                    "registers": int(re.search(r"Used (\d+) registers", said)[1]),
                    "shared memory": compiled.metadata.shared,
                    "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
                }
            )
        return compiled

    before = driver._active
    driver.set_active(Card(capability))
    with mock.patch.object(JITFunction, "run", compile_it):
        yield rows
    driver.set_active(before)


def compile_all() -> list[dict]:
    """One row a kernel, dtype and card."""
    rows = []
    cases = [(card, case, dtype) for card in CARDS for case in CASES for dtype in DTYPES]
    chosen = [mock.patch.object(module, "wanted", lambda *_: True) for module in (clipped_loss, decomposition, logprob)]
    for patch in chosen:
        patch.start()
    for card, case, dtype in tqdm(cases, disable=None):
        with compiling_for(CARDS[card]) as compiled:
            CASES[case](DTYPES[dtype])
        rows += [{"card": card, "of": case, "dtype": dtype, **row} for row in compiled]
    for patch in chosen:
        patch.stop()
    return rows


def main() -> None:
    """Compile all, print the table, write the result file, or another that the command names."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 has Triton interpret kernels: unset it, so that it can compile them")
    path = Path(sys.argv[1]) if sys.argv[1:] else RESULT
    with TemporaryDirectory() as cache:  # empty, so that every kernel is compiled now
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        rows = compile_all()
    print(table(rows))
    result = {
        "command": "python -m bench.kernels",
        "what": "registers a thread; shared memory a program, bytes; spilled, bytes a thread",
        "versions": {package: version(package) for package in ("mini_impl", "torch", "triton")},
        "capabilities": CARDS,
        "rows": rows,
    }
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())


def table(rows: list[dict]) -> str:
    """The rows as text, one line each."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


if __name__ == "__main__":
    main()

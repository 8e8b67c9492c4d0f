"""Time and memory of what this process does."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

PROCESSES, THREADS = 5, 2  # how often all is measured again, and with how many threads


def apart(measurement: Callable, *arguments):
    """What a function returns in a fresh process (Linux)."""
    server = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, server, torch.set_num_threads, (THREADS,)) as process:
        return process.submit(measurement, *arguments).result()


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def milliseconds(step: Callable[[], None], steps: int) -> float:
    """Of one step, over so many."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps * 1e3


def peak(work: Callable[[], object]) -> float:
    """MiB that some work needs at most, beside what the process holds before it (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the work would use it uncounted (glibc)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def arithmetic(step: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products and convolutions in one step."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        step()
    return counter.get_total_flops()

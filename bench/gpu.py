"""Verifies and measures the package on this machine's NVIDIA GPU: make gpu. Writes book/results/gpu.json.

In one run: the tests on the GPU, each kernel beside torch, torch.compile and Liger, training steps beside
neuralforecast's and transformers', how steps grow (bench/gpu_times.py), and every page (nbval). Every part runs in a
process of its own. One that fails is written down with its message and keeps no other from running, but the card has
not passed. Without a GPU it ends at once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import torch

NO_GPU = "There is no NVIDIA GPU here: nothing was run, and nothing was written."
ROOT = Path(__file__).parents[1]
RESULT = ROOT / "book" / "results" / "gpu.json"
MOST = {"float32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # error of a kernel, relative to the largest number
FARTHEST = 1e-2  # of a forecast or a logit from the peer's: a GPU's TF32 keeps three digits of a factor
OF_KERNELS, OF_MODELS = ("tests/test_devices.py", "tests/kernels"), ("tests/forecasting", "tests/finetuning")
OF_PAGES = ("tests/book/test_page_devices.py",)
OTHERS = ("torch", "compiled", "Liger", "neuralforecast")  # ways that are not ours
PACKAGES = ("mini_impl", "torch", "triton", "neuralforecast", "transformers", "liger_kernel")


# --- tests and pages --------------------------------------------------------------------------------------------------


def tests(device: str = "cuda") -> dict:
    """Every test that a GPU bears on; those of the models twice, as torch computes and with the kernels."""
    on_device = [*OF_MODELS, "-k", device]  # the fixture `device` puts its name into that of the test
    return {
        "kernels": counts(*OF_KERNELS),
        "pages": counts(*OF_PAGES),
        "models, torch": counts(*on_device, MINI_IMPL_KERNELS="0"),
        "models, kernels": counts(*on_device, MINI_IMPL_KERNELS="1"),
    }


def notebooks() -> dict:
    """Every page in both languages, but the one that calls this."""
    pages = ["book/en", "book/zh", "--ignore-glob=*verify_on_gpu*"]
    how = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300", "-n", "2", "--dist", "loadscope"]
    return {"cells": counts(*pages, *how, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")}


def counts(*arguments: str, **environment: str) -> dict:
    """What pytest says in a process of its own, without the interpreter: {"passed", "failed", "skipped", "which"}."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not report.exists():  # 1: some failed
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "which": [f"{case.get('classname')}.{case.get('name')}" for case in failed],
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def parts(quick: bool) -> dict[str, Callable[[], object]]:
    """The parts of a run by name; notebooks and growth are left out of a quick one."""
    from bench.gpu_times import growth, kernels, steps

    every = {"tests": tests, "kernels": kernels, "steps": steps}
    return every if quick else {**every, "growth": growth, "notebooks": notebooks}


def run(chosen: dict[str, Callable[[], object]]) -> dict:
    """Whether all "passed", "failed": {part: why}, and under the name of each part that ended what it found."""
    from bench.measuring import apart

    found, failed = {}, {}
    for name, part in chosen.items():
        start = time.perf_counter()
        print(f"{name} ...", end=" ", flush=True)
        try:
            found[name] = apart(part)
            failed |= {name: why} if (why := fault(name, found[name])) else {}
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:1000]}"
        print(f"{time.perf_counter() - start:.0f} s", failed.get(name, ""), flush=True)
    return {"passed": not failed, "failed": failed, **found}


def fault(name: str, found) -> str:
    """What keeps a card from passing in what a part found, in words; "" if nothing does. NaN does."""
    if name in ("tests", "notebooks"):
        bad = {group: got["which"] or "no test ran" for group, got in found.items() if not sound(got)}
        return "; ".join(f"{group}: {which}" for group, which in bad.items())
    bad = [] if any(row["milliseconds"] for row in found) else ["nothing ran"]
    for row in found:
        bad += [f"{label(row)}: {way}: {why}" for way, why in row["left out"].items() if not excused(way, why)]
        if "kernel" in row.get("error", {}) and not row["error"]["kernel"] <= MOST[row["dtype"]]:
            bad.append(f"{label(row)}: error {row['error']['kernel']}")
        if "difference" in row and not row["difference"] <= FARTHEST:
            bad.append(f"{label(row)}: {row['difference']} from its peer")
    return "; ".join(bad)


def sound(got: dict) -> bool:
    return got["failed"] == 0 and got["passed"] > 0


def excused(way: str, why: str) -> bool:
    """Whether a card may pass without it: what others wrote, and what it has too little memory for."""
    return way in OTHERS or way.startswith("transformers") or why.startswith("OutOfMemoryError")


def label(row: dict) -> str:
    """What a row is about."""
    keys = ("kernel", "model", "size", "dtype", "of", "look-back", "variables")
    return " ".join(str(row[key]) for key in keys if key in row)


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def keep(card: str, found: dict) -> None:
    """Write what a card gave into the result file, in which other cards stay as they are."""
    from mini_impl.checkpoint import write_bytes

    cards = json.loads(RESULT.read_text("utf-8"))["cards"] if RESULT.exists() else {}
    result = {"command": "python -m bench.gpu", "versions": versions(), "cards": {**cards, card: found}}
    write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())


def report(found: dict) -> None:
    """Print the times of kernels and steps."""
    for row in [*found.get("kernels", []), *found.get("steps", [])]:
        times = "".join(f"{name} {value:.3g}   " for name, value in row["milliseconds"].items())
        print(f"{label(row):<60} ms: {times}", *(f"without {name}" for name in row["left out"]))


def main(arguments: list[str] | None = None) -> int:
    """Run it all, print it, and write this card's part of the result file. Returns 0 if it passed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the pages and without growth")
    quick = parser.parse_args(arguments).quick
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 2**30:.1f} GiB", flush=True)
    found = run(parts(quick))
    about = {
        "quick": quick,
        "memory GiB": round(card.total_memory / 2**30, 2),
        "compute capability": f"{card.major}.{card.minor}",
        "torch": torch.__version__,
        "triton": versions().get("triton"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    keep(card.name, {**found, **about})
    report(found)
    print(f"{card.name}: {'passed' if found['passed'] else 'not passed'}; written to {RESULT}")
    return int(not found["passed"])


if __name__ == "__main__":
    sys.exit(main())

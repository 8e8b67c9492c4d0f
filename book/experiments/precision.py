"""What `precision="bf16"` and `compile=True` do to error and time: book/results/precision.json, read by the page gpu.

Errors: each forecaster trained for two epochs on the embedded series as it was compared (forecasters.py, published
loss), in float32 and in bf16 with three seeds, compiled with one; two methods of fine-tuning, 60 steps. Times: in one
process the four ways take turns, so that whatever else the machine does falls on all of them; what counts is the ratio.
One thread. About 25 minutes of one core in all.
"""

import functools
import statistics
import time

import torch
import torch._inductor.config
from _rows import compute
from forecasters import SETTINGS, SPLITS

from mini_impl import results
from mini_impl.faster import adam, faster
from mini_impl.finetuning import METHODS, fine_tune, sums
from mini_impl.forecasting import FORECASTERS, evaluate, fit, load_auckland, loss_of, prepare

NAME = "precision"
WAYS = {
    "float32": {"precision": "float32", "compile": False},
    "bf16": {"precision": "bf16", "compile": False},
    "compiled": {"precision": "float32", "compile": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
FINE_TUNED = {"sft": "published", "grpo": "published"}
ROUNDS, SECONDS = 7, 0.5  # turns of each way, and how long one lasts at least


def made(model: str, seed: int) -> torch.nn.Module:
    """A forecaster as it was compared."""
    more = {"variables": 7} if model in ("timesnet", "timexer") else {}
    torch.manual_seed(seed)
    return FORECASTERS[model](96, 96, **SETTINGS[model], **more)


@functools.cache
def parts():
    return prepare(load_auckland(), SPLITS["Auckland"], 96, 96)[:3]


def learning_rate(model: str) -> float:
    """The one that the comparison chose."""
    rows = results.load("forecasters")["rows"].values()
    return next(
        row["arguments"]["learning_rate"]
        for row in rows
        if (row["arguments"]["model"], row["arguments"]["data"], row["arguments"]["loss"], row["arguments"]["seed"])
        == (model, "Auckland", "published", 1)
    )


def error(model: str, way: str, seed: int) -> dict:
    """The test error of a forecaster that was trained in a way."""
    train, validation, test = parts()
    forecaster, loss = made(model, seed), loss_of(FORECASTERS[model], "published")
    how = {"epochs": 2, "learning_rate": learning_rate(model), "seed": seed, "progress": False, **WAYS[way]}
    fit(forecaster, train, validation, loss, **how)
    return evaluate(forecaster, test)._asdict()


def fine_tuned(method: str, way: str, seed: int) -> dict:
    """The accuracies of the tiny language model after 60 steps in a way."""
    model, task = sums()
    how = {"steps": 60, "seed": seed, "progress": False, **WAYS[way]}
    training = fine_tune(model, METHODS[method, FINE_TUNED[method]](task), **how)
    right = training.measures[60].accuracy
    bad = [right[kind] for kind in task.trained_kinds]
    return {"bad cases": sum(bad) / len(bad), "accuracy": right, "milliseconds": training.seconds / 60 * 1e3}


def milliseconds(model: str) -> dict:
    """Of one training step in each way, the median over turns; and seconds until the first step in it was done."""
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled would make the first step shorter
    history, target = parts()[0][torch.arange(32)]
    steps, first = {}, {}
    for way, how in WAYS.items():
        steps[way] = training(made(model, 0).train(), history, target, **how)
        start = time.perf_counter()
        steps[way]()
        first[way] = time.perf_counter() - start
        steps[way]()
    taken = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, step in steps.items():
            start, count = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                step()
                count += 1
            taken[way].append((time.perf_counter() - start) / count * 1e3)
    ratios = {way: statistics.median(a / b for a, b in zip(taken[way], taken["float32"], strict=True)) for way in WAYS}
    return {
        "milliseconds": {way: statistics.median(values) for way, values in taken.items()},
        "to float32": ratios,
        "first step, seconds": first,
    }


def training(model, history, target, precision: str, compile: bool):
    """One step as `fit` does it."""
    forward, optimizer = faster(model, compile, precision), adam(model.parameters(), 1e-4, precision)
    loss = loss_of(type(model), "published")

    def step() -> None:
        terms = loss(forward(history), target)
        optimizer.zero_grad()
        terms.total.backward()
        terms.values()
        optimizer.step()

    return step


def main() -> None:
    compute(NAME, milliseconds, {f"time: {model}": {"model": model} for model in SETTINGS}, jobs=1)
    errors = [(model, way, seed) for model in SETTINGS for way in ("float32", "bf16") for seed in (1, 2, 3)]
    errors += [(model, way, 1) for model in SETTINGS for way in ("compiled", "bf16, compiled")]
    compute(NAME, error, {f"error: {m}, {w}, {s}": {"model": m, "way": w, "seed": s} for m, w, s in errors})
    tunings = [(method, way, seed) for method in FINE_TUNED for way in ("float32", "bf16") for seed in (1, 2, 3)]
    compute(NAME, fine_tuned, {f"tuned: {m}, {w}, {s}": {"method": m, "way": w, "seed": s} for m, w, s in tunings})


if __name__ == "__main__":
    main()

"""What a forecaster's training step costs, and how that grows; writes book/results/growth.json.

Growth with look-back and number of variables: default sizes, a batch of 8 windows of noise, 96 steps to forecast. And
the step of each model as book/results/forecasters.json trains it, a batch of 32. A figure is the least of three
processes: other work on the machine can only make a step slower.
"""

import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from bench.measuring import THREADS, apart, arithmetic, milliseconds, peak
from mini_impl import results
from mini_impl.checkpoint import write_bytes
from mini_impl.faster import adam, faster
from mini_impl.forecasting import FORECASTERS, loss_of

RESULT = Path(__file__).parents[1] / "book" / "results" / "growth.json"
HORIZON = 96
LOOK_BACKS, VARIABLES = (96, 192, 336, 720), (7, 21, 82, 321)
PLACES = [(look_back, 7) for look_back in LOOK_BACKS] + [(96, variables) for variables in VARIABLES[1:]]


def training(
    name: str,
    history: int,
    variables: int,
    batch: int,
    settings: dict,
    device: str = "cpu",
    compile: bool = False,
    precision: str = "float32",
) -> Callable[[], None]:
    """One step as `fit` does it, with the published loss."""
    torch.manual_seed(0)
    make = FORECASTERS[name]
    more = {"variables": variables} if "variables" in inspect.signature(make).parameters else {}
    model = make(history, HORIZON, **more, **settings).train().to(device)
    forecast, optimizer = faster(model, compile, precision), adam(model.parameters(), 1e-4, precision)
    past, target = (torch.randn(batch, steps, variables).to(device) for steps in (history, HORIZON))

    def step() -> None:
        optimizer.zero_grad()
        loss_of(make, "published")(forecast(past), target).total.backward()
        optimizer.step()

    return step


def least(*case) -> dict:
    """The least that three processes measured."""
    runs = [apart(measure, *case) for _ in range(3)]
    return {key: min(run[key] for run in runs) for key in runs[0]}


def measure(*case) -> dict:
    """Milliseconds of a step, MiB that a few need beside the weights, and its multiplications and additions."""
    step = training(*case)
    step()  # code and threads are there before it counts
    count = max(3, min(100, round(500 / milliseconds(step, 1))))
    times = [milliseconds(step, count) for _ in range(3)]
    memory = peak(lambda: milliseconds(training(*case), 3))
    return {"milliseconds": min(times), "MiB": memory, "GFLOP": arithmetic(step) / 1e9}


def compared(name: str) -> dict:
    """The settings with which a model was compared: those of its rows at another seed than the choice had."""
    rows = [row["arguments"] for row in results.load("forecasters")["rows"].values()]
    return next(row["settings"] for row in rows if row["model"] == name and row["seed"] > 0)


def main() -> None:
    """Measure every model at every place and as it was compared, write the result file."""
    models, as_compared = {}, {}
    for name in tqdm(FORECASTERS, disable=None):
        cases = {"{} steps, {} variables".format(*place): (name, *place, 8, {}) for place in PLACES}
        models[name] = {place: least(*case) for place, case in cases.items()}
        as_compared[name] = least(name, 96, 7, 32, compared(name))
    step = f"training step, {HORIZON} steps ahead, published loss, {THREADS} threads"
    result = {
        "command": "python -m bench.growth",
        "what": {"models": f"{step}, batch 8", "as compared": f"{step}, batch 32"},
        "versions": {package: version(package) for package in ("mini_impl", "torch")},
        "models": models,
        "as compared": as_compared,
    }
    write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""How a forecaster's step grows with its look-back and with the number of variables; writes book/results/growth.json.

Each model has its default sizes, a batch of 8 windows of noise, 96 steps to forecast. A figure is the least of three
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
from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting import FORECASTERS, loss_of

RESULT = Path(__file__).parents[1] / "book" / "results" / "growth.json"
BATCH, HORIZON = 8, 96
LOOK_BACKS, VARIABLES = (96, 192, 336, 720), (7, 21, 82, 321)
PLACES = [(look_back, 7) for look_back in LOOK_BACKS] + [(96, variables) for variables in VARIABLES[1:]]


def training(name: str, history: int, variables: int) -> Callable[[], None]:
    """One step as `fit` does it, with the published loss."""
    torch.manual_seed(0)
    make = FORECASTERS[name]
    more = {"variables": variables} if "variables" in inspect.signature(make).parameters else {}
    model = make(history, HORIZON, **more).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    past, target = torch.randn(BATCH, history, variables), torch.randn(BATCH, HORIZON, variables)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(make, "published")(model(past), target).total.backward()
        optimizer.step()

    return step


def measure(name: str, history: int, variables: int) -> dict:
    """Milliseconds of a step, MiB that a few need beside the weights, and their multiplications and additions."""
    step = training(name, history, variables)
    step()  # code and threads are there before it counts
    count = max(3, min(100, round(500 / milliseconds(step, 1))))
    times = [milliseconds(step, count) for _ in range(3)]
    memory = peak(lambda: milliseconds(training(name, history, variables), 3))
    return {"milliseconds": min(times), "MiB": memory, "GFLOP": arithmetic(step) / 1e9}


def main() -> None:
    """Measure every model at every place, print a table, write the result file."""
    models = {}
    for name in FORECASTERS:
        models[name] = {}
        for place in tqdm(PLACES, desc=name, disable=None):
            runs = [apart(measure, name, *place) for _ in range(3)]
            least = {key: min(run[key] for run in runs) for key in runs[0]}
            models[name]["{} steps, {} variables".format(*place)] = least
            print(f"{name:<14}{place[0]:>5}{place[1]:>5}{least['milliseconds']:10.2f} ms{least['MiB']:8.0f} MiB")
    result = {
        "command": "python -m bench.growth",
        "what": f"training step, batch {BATCH}, {HORIZON} steps ahead, published loss, {THREADS} threads",
        "versions": {package: version(package) for package in ("mini_impl", "torch")},
        "models": models,
    }
    write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

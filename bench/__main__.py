"""Time and memory of a training step beside other people's implementations (make bench).

Both take turns in one run, so that whatever else the machine does falls on both; what counts is the ratio.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from neuralforecast.models import DLinear as PeerDLinear

from mini_impl.forecasting.dlinear import DLinear, documented_loss, published_loss

ROUNDS, STEPS = 40, 50


def dlinear(loss: Callable) -> tuple[Callable, int]:
    """So many training steps of our DLinear as `fit` does them, batch 32, 96 -> 96, 7 variables; and its parameters."""
    model = DLinear(history=96, horizon=96)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    history, target = torch.randn(2, 32, 96, 7)

    def train(steps: int):
        for _ in range(steps):
            terms = loss(model(history), target)
            terms.values()
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()

    return train, sum(parameter.numel() for parameter in model.parameters())


def peer_dlinear() -> tuple[Callable, int]:
    """The same with neuralforecast's DLinear, which takes every variable as a series of its own."""
    model = PeerDLinear(h=96, input_size=96, moving_avg_window=25).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    history, target = torch.randn(2, 32 * 7, 96, 1)
    batch = {"insample_y": history, "hist_exog": None, "futr_exog": None, "stat_exog": None}

    def train(steps: int):
        for _ in range(steps):
            loss = torch.nn.functional.mse_loss(model(batch), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def milliseconds(train: Callable) -> float:
    """Of one step, over STEPS of them."""
    start = time.perf_counter()
    train(STEPS)
    return (time.perf_counter() - start) / STEPS * 1e3


def main() -> None:
    """Print one line of JSON with the medians and the ratios."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    trainings = {
        "ours, published loss": dlinear(published_loss),
        "ours, documented loss": dlinear(documented_loss),
        "neuralforecast": peer_dlinear(),
    }
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for train, _ in trainings.values():
        milliseconds(train)  # warm up
    for _ in range(ROUNDS):
        for name, (train, _) in trainings.items():
            times[name].append(milliseconds(train))
    peer = times["neuralforecast"]
    result = {
        "what": "training step of DLinear, batch 32, 96 -> 96, 7 variables, 2 threads",
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "neuralforecast")},
        "parameters": {name: count for name, (_, count) in trainings.items()},
        "milliseconds, median": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "ratio to neuralforecast, median of the rounds": {
            name: round(statistics.median(a / b for a, b in zip(values, peer, strict=True)), 3)
            for name, values in times.items()
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

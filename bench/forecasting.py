"""Time and memory of a training step beside neuralforecast's: make bench. Writes book/results/speed.json.

Every figure is the median of five processes, with the least and the most. In each process both sides take turns, so
that whatever else the machine does falls on both; what counts is the ratio. Memory is measured apart, in a process of
its own for each side.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.measuring import PROCESSES, THREADS, apart, arithmetic, milliseconds, peak, spread
from bench.pairs import HISTORY, HORIZON, PAIRS, WINDOWS, Pair
from mini_impl import checks
from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting import Scaler, load_auckland, loss_of

RESULT = Path(__file__).parents[1] / "book" / "results" / "speed.json"
VARIANTS = ("published", "documented", "peer")
ROUNDS, SECONDS = 6, 0.3  # turns of each variant in a process, and how long one lasts at least


def training(pair: Pair, variant: str, device: str = "cpu") -> Callable[[], None]:
    """One step as `fit` does it: forecast, loss, gradients, Adam. variant: our two losses, or the peer with its MSE.

    As our side does, the peer's looks for NaN in its input, and reads its loss.
    """
    torch.manual_seed(0)
    series = windows(pair.variables).to(device)
    model = pair.peer if variant == "peer" else pair.ours
    model.train().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    if variant == "peer" and pair.univariate:
        series = series.mT.reshape(-1, HISTORY + HORIZON, 1)
    history, target = series[:, :HISTORY].contiguous(), series[:, HISTORY:].contiguous()
    loss_function = None if variant == "peer" else loss_of(type(model), variant)

    def step() -> None:
        if variant == "peer":
            checks.look(checks.finite("history", history))
            loss = F.mse_loss(peer_forecast(pair, history), target)
            if not math.isfinite(loss.item()):
                raise ValueError("the loss is no number")
        else:
            for name, needed in model.documented_needs.items():  # True or False: what the model returns besides
                setattr(model, name, needed if variant == "documented" else not needed)
            terms = loss_function(model(history), target)
            terms.values()
            loss = terms.total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def windows(variables: int) -> torch.Tensor:
    """Random windows of the embedded series, z-scored: [window, history + horizon, variable].

    A real series, as TimesNet's work depends on the periods that it finds; in noise it finds five far apart.
    """
    values = load_auckland().values[:, :variables]
    scores = Scaler.fit(values).apply(values)
    starts = torch.randint(len(scores) - HISTORY - HORIZON, (WINDOWS,), generator=torch.Generator().manual_seed(0))
    return scores.unfold(0, HISTORY + HORIZON, 1)[starts].mT.contiguous()


def peer_forecast(pair: Pair, history: torch.Tensor) -> torch.Tensor:
    """What neuralforecast's model returns for [batch, time, variable]."""
    return pair.peer({"insample_y": history, "hist_exog": None, "futr_exog": None, "stat_exog": None})


def largest_difference(pair: Pair, device: str = "cpu") -> float:
    """Between both forecasts of the same windows, without dropout."""
    pair.ours.eval().to(device), pair.peer.eval().to(device)
    history = windows(pair.variables)[:, :HISTORY].to(device)
    with torch.no_grad():
        ours = pair.ours(history).prediction
        if pair.univariate:
            theirs = peer_forecast(pair, history.mT.reshape(-1, HISTORY, 1)).view(*ours.mT.shape).mT
        else:
            theirs = peer_forecast(pair, history)
    return (ours - theirs).abs().max().item()


def matrix_speed() -> float:
    """Floating-point operations a second of a 768 x 768 product, the best of a few."""
    matrix = torch.randn(768, 768)
    return 2 * 768**3 / min(milliseconds(lambda: matrix @ matrix, 20) / 1e3 for _ in range(10))


def compare(name: str) -> dict:
    """Everything about one model beside its peer."""
    torch.manual_seed(0)
    pair = PAIRS[name]()
    difference = largest_difference(pair)
    flops = {variant: arithmetic(training(pair, variant)) for variant in VARIANTS}
    speed = matrix_speed()
    times, ratios = [], []
    for _ in tqdm(range(PROCESSES), desc=name, disable=None):
        turns = apart(measure_times, name)
        times.append({variant: statistics.median(values) for variant, values in turns.items()})
        pairs = {variant: zip(turns[variant], turns["peer"], strict=True) for variant in VARIANTS[:2]}
        ratios.append({variant: statistics.median(a / b for a, b in both) for variant, both in pairs.items()})
    memory = {variant: [apart(measure_memory, name, variant) for _ in range(7)] for variant in VARIANTS}
    return {
        "largest difference of the forecasts": difference,
        "parameters": {
            "ours": sum(parameter.numel() for parameter in pair.ours.parameters()),
            "peer": sum(parameter.numel() for parameter in pair.peer.parameters() if parameter.requires_grad),
        },
        "series": f"{WINDOWS} windows of {pair.variables} variable{'s' * (pair.variables > 1)}",
        "milliseconds, median": {variant: statistics.median(each[variant] for each in times) for variant in VARIANTS},
        "ratio to the peer": {variant: spread([each[variant] for each in ratios]) for variant in VARIANTS[:2]},
        "GFLOP": {variant: count / 1e9 for variant, count in flops.items()},
        "matrix speed, GFLOP/s": speed / 1e9,
        "floor, milliseconds": {variant: count / speed * 1e3 for variant, count in flops.items()},
        "peak memory, MiB": {variant: statistics.median(values) for variant, values in memory.items()},
    }


def measure_times(name: str) -> dict[str, list[float]]:
    """Milliseconds of a step in every turn of each variant."""
    torch.manual_seed(0)
    pair = PAIRS[name]()
    steps = {variant: training(pair, variant) for variant in VARIANTS}
    counts = {variant: max(1, round(SECONDS * 1e3 / milliseconds(step, 3))) for variant, step in steps.items()}
    turns: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant, step in steps.items():
            turns[variant].append(milliseconds(step, counts[variant]))
    return turns


def measure_memory(name: str, variant: str) -> float:
    """MiB that a few steps need beside the weights: activations, gradients, Adam's memory."""
    training(PAIRS[name](), variant)()  # code and threads are there before it counts
    pair = PAIRS[name]()
    return peak(lambda: milliseconds(training(pair, variant), 5))


def report(result: dict) -> None:
    """Print the result as a table."""
    print(f"{'':<14}{'ms':>8}{'peer':>8}{'ratio':>7}{'least..most':>14}{'floor':>8}{'MiB':>7}{'peer':>7}")
    for name, model in result["models"].items():
        times, memory = model["milliseconds, median"], model["peak memory, MiB"]
        for variant in VARIANTS[:2]:
            ratio = model["ratio to the peer"][variant]
            print(
                f"{name if variant == 'published' else '  documented':<14}{times[variant]:8.2f}{times['peer']:8.2f}"
                f"{ratio['median']:7.2f}{ratio['least']:8.2f}..{ratio['most']:.2f}"
                f"{model['floor, milliseconds'][variant]:8.2f}{memory[variant]:7.0f}{memory['peer']:7.0f}"
            )


def main() -> None:
    """Compare the models, print a table, and write the result file if all of them were asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "models", nargs="*", choices=[*PAIRS, []], metavar="MODEL", help=f"of {', '.join(PAIRS)}; or all"
    )
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    multiprocessing.set_forkserver_preload(["bench.pairs"])  # neuralforecast takes seconds to import
    sizes = f"batch {WINDOWS}, {HISTORY} -> {HORIZON}"
    result = {
        "command": "python -m bench",
        "what": f"training step, {sizes}, embedded series, {THREADS} threads, float32, Adam",
        "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mini_impl", "torch", "neuralforecast")},
        "models": {name: compare(name) for name in options.models or PAIRS},
    }
    report(result)
    if not options.models:
        write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""Time and memory of a training step beside neuralforecast's: make bench. Writes book/results/speed.json.

Both take turns in one run, so that whatever else the machine does falls on both; what counts is the ratio. Memory is
measured in a process of its own for each: python -m bench --memory MODEL VARIANT.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from bench.measuring import milliseconds, peak
from bench.pairs import HISTORY, HORIZON, PAIRS, WINDOWS, Pair
from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting.data import Scaler, load_auckland

RESULT = Path(__file__).parents[1] / "book" / "results" / "speed.json"
VARIANTS = ("published", "documented", "peer")
ROUNDS, SECONDS = 20, 0.5  # turns of each variant, and how long one lasts at least
PROCESSES = 5  # in which memory is measured


def training(pair: Pair, variant: str) -> Callable[[], None]:
    """One step as `fit` does it: forecast, loss, gradients, Adam. variant: our two losses, or the peer with its MSE."""
    torch.manual_seed(0)
    series = windows(pair.variables)
    model = pair.peer if variant == "peer" else pair.ours
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    if variant == "peer" and pair.univariate:
        series = series.mT.reshape(-1, HISTORY + HORIZON, 1)
    history, target = series[:, :HISTORY].contiguous(), series[:, HISTORY:].contiguous()
    loss_function = getattr(pair.module, f"{variant}_loss", None)

    def step() -> None:
        if variant == "peer":
            loss = F.mse_loss(peer_forecast(pair, history), target)
        else:
            if pair.documented_needs:
                setattr(model, pair.documented_needs, variant == "documented")
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


def largest_difference(pair: Pair) -> float:
    """Between both forecasts of the same windows, without dropout."""
    pair.ours.eval(), pair.peer.eval()
    history = windows(pair.variables)[:, :HISTORY]
    with torch.no_grad():
        ours = pair.ours(history).prediction
        if pair.univariate:
            theirs = peer_forecast(pair, history.mT.reshape(-1, HISTORY, 1)).view(*ours.mT.shape).mT
        else:
            theirs = peer_forecast(pair, history)
    return (ours - theirs).abs().max().item()


def arithmetic(step: Callable[[], None]) -> int:
    """Floating-point operations of the matrix products and convolutions in one step."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        step()
    return counter.get_total_flops()


def matrix_speed() -> float:
    """Floating-point operations a second of a 768 x 768 product, the best of a few."""
    matrix = torch.randn(768, 768)
    return 2 * 768**3 / min(milliseconds(lambda: matrix @ matrix, 20) / 1e3 for _ in range(10))


def compare(name: str) -> dict:
    """Everything about one model beside its peer."""
    torch.manual_seed(0)
    pair = PAIRS[name]()
    difference = largest_difference(pair)
    steps = {variant: training(pair, variant) for variant in VARIANTS}
    flops = {variant: arithmetic(step) for variant, step in steps.items()}
    counts = {variant: max(1, round(SECONDS * 1e3 / milliseconds(step, 3))) for variant, step in steps.items()}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    speeds = [matrix_speed()]
    for _ in tqdm(range(ROUNDS), desc=name, disable=None):
        for variant, step in steps.items():
            times[variant].append(milliseconds(step, counts[variant]))
    speeds.append(matrix_speed())
    ratios = {variant: [a / b for a, b in zip(times[variant], times["peer"], strict=True)] for variant in VARIANTS[:2]}
    return {
        "largest difference of the forecasts": difference,
        "parameters": {
            "ours": sum(parameter.numel() for parameter in pair.ours.parameters()),
            "peer": sum(parameter.numel() for parameter in pair.peer.parameters() if parameter.requires_grad),
        },
        "series": f"{WINDOWS} windows of {pair.variables} variable{'s' * (pair.variables > 1)}",
        "milliseconds, median": {variant: statistics.median(values) for variant, values in times.items()},
        "ratio to the peer": {
            variant: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for variant, values in ratios.items()
        },
        "GFLOP": {variant: count / 1e9 for variant, count in flops.items()},
        "matrix speed, GFLOP/s": max(speeds) / 1e9,
        "floor, milliseconds": {variant: count / max(speeds) * 1e3 for variant, count in flops.items()},
        "peak memory, MiB": {variant: peak_memory(name, variant) for variant in VARIANTS},
    }


def peak_memory(name: str, variant: str) -> float:
    """MiB that a fresh process needs for a few steps, beside the weights: activations, gradients, Adam's memory.

    The median of a few processes, as what the allocator holds back differs from one to the next.
    """
    command = [sys.executable, "-m", "bench", "--memory", name, variant]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(PROCESSES)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def measure_memory(name: str, variant: str) -> float:
    """What peak_memory asks for, in this process (Linux)."""
    pair = PAIRS[name]()
    (pair.ours if variant == "peer" else pair.peer).to("meta")  # one of the two stays
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
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.memory:
        print(measure_memory(*options.memory))
        return
    result = {
        "command": "python -m bench",
        "what": f"training step, batch {WINDOWS}, {HISTORY} -> {HORIZON}, embedded series, 2 threads, float32, Adam",
        "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mini_impl", "torch", "neuralforecast")},
        "models": {name: compare(name) for name in options.models or PAIRS},
    }
    report(result)
    if not options.models:
        write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

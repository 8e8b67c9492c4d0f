"""The long runs of the chapter `dlinear`; `make reproduce` runs this, which writes book/results/dlinear.json.

Needs ETTh1.csv: downloaded, or where the environment variable MINI_IMPL_DATA says. About 15 minutes on one core.

Does the second term pay? The same protocol for every chapter: its weight is chosen on validation from one grid that
holds 0, training stops early on the validation error of the forecast whatever the loss, every run has three seeds.
"""

import functools
import json
import statistics
import time
from pathlib import Path

import torch

import mini_impl
from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting.baselines import repeat_last, repeat_season
from mini_impl.forecasting.data import ETT_SHA256, ETT_SPLIT, download_ett, load_auckland, load_csv, prepare
from mini_impl.forecasting.dlinear import DLinear, closed_form, documented_loss, published_loss
from mini_impl.forecasting.train import evaluate, fit

RESULT = Path(__file__).parents[1] / "results" / "dlinear.json"
AUCKLAND_SPLIT = (12280, 1754, 3510)  # 70, 10 and 20 %
GRID = (0.0, 0.1, 1.0, 10.0)
SEEDS = (0, 1, 2)
SETTINGS = {"epochs": 10, "batch_size": 32, "learning_rate": 2e-3, "patience": 3}  # what mini-impl does
PUBLISHED_REPEAT = {96: (1.295, 0.713), 192: (1.325, 0.733), 336: (1.323, 0.744), 720: (1.339, 0.756)}


def repeat_row(values: torch.Tensor) -> dict:
    """ "Repeat" of the literature, over all test windows and without the last part batch of 32."""
    rows = {}
    for horizon, published in PUBLISHED_REPEAT.items():
        _, _, test, _ = prepare(values, ETT_SPLIT, 96, horizon)
        history, target = test[:]
        error = repeat_last(history, horizon) - target
        kept = len(test) // 32 * 32
        rows[horizon] = {
            "published": published,
            "windows": {"all": len(test), "without the last batch": kept},
            "all": [error.square().mean().item(), error.abs().mean().item()],
            "without the last batch": [error[:kept].square().mean().item(), error[:kept].abs().mean().item()],
        }
    return rows


def compare(values: torch.Tensor, lengths: tuple[int, int, int], history: int, horizon: int) -> dict:
    """Documented against published on one data set: every run, the closed form, the naive forecasts."""
    train, validation, test, _ = prepare(values, lengths, history, horizon)
    losses = {f"documented, weight {w:g}": functools.partial(documented_loss, trend_weight=w) for w in GRID}
    losses["published"] = published_loss
    runs = {}
    for name, loss in losses.items():
        runs[name] = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = DLinear(history, horizon)
            training = fit(model, train, validation, loss, seed=seed, progress=False, **SETTINGS)
            runs[name].append(
                {
                    "seed": seed,
                    "best epoch": training.best_epoch,
                    "validation mse": min(training.validation),
                    "test": evaluate(model, test)._asdict(),
                    "test of the trend branch alone": evaluate(branch(model), test)._asdict(),
                }
            )
        print(history, horizon, name, [round(run["test"]["mse"], 4) for run in runs[name]], flush=True)

    def mean_validation(weight: float) -> float:
        return statistics.mean(run["validation mse"] for run in runs[f"documented, weight {weight:g}"])

    exact = {weight: closed_form(*train[:], trend_weight=weight).float() for weight in (0.0, 0.01, 1.0, 1000.0)}
    with torch.no_grad():
        forecasts = {weight: model(test[:][0]).prediction for weight, model in exact.items()}
    return {
        "history": history,
        "horizon": horizon,
        "split": lengths,
        "windows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "runs": runs,
        "weight chosen on validation": min(GRID, key=mean_validation),
        "closed form": {
            f"{weight:g}": {
                "validation mse": evaluate(model, validation).mse,
                "test": evaluate(model, test)._asdict(),
                "test of the trend branch alone": evaluate(branch(model), test)._asdict(),
                "largest move of a test forecast": (forecasts[weight] - forecasts[0.0]).abs().max().item(),
            }
            for weight, model in exact.items()
        },
        "last value": evaluate(functools.partial(repeat_last, horizon=horizon), test)._asdict(),
        "last day": evaluate(functools.partial(repeat_season, horizon=horizon, period=24), test)._asdict(),
    }


def branch(model: DLinear):
    """The forecast that the trend branch makes alone."""
    return lambda history: model(history).trend


if __name__ == "__main__":
    start = time.perf_counter()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    etth1, auckland = load_csv(download_ett("ETTh1")).values, load_auckland().values
    result = {
        "command": "python book/experiments/dlinear.py",
        "versions": {"mini_impl": mini_impl.__version__, "torch": torch.__version__},
        "settings": {**SETTINGS, "seeds": SEEDS, "weights": GRID, "kernel_size": 25},
        "data": {"ETTh1": f"sha256 {ETT_SHA256['ETTh1']}", "Auckland": "embedded in mini_impl"},
        "repeat": repeat_row(etth1),
        "ETTh1 96": compare(etth1, ETT_SPLIT, 96, 96),
        "ETTh1 336": compare(etth1, ETT_SPLIT, 336, 96),
        "Auckland 96": compare(auckland, AUCKLAND_SPLIT, 96, 96),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    write_bytes(RESULT, (json.dumps(result, indent=1) + "\n").encode())

"""The five forecasters compared: book/results/forecasters.json, which the page of that name reads.

The learning rate is chosen with one seed, for each model and data set by its validation part; then every row has three
seeds. Seconds of a row on one core (Auckland, ETTh1): DLinear 5, 3; PatchTST 100, 60; iTransformer 90, 40; TimesNet
190, 120; TimeXer 250, 120; four hours in all. ETTh1 is downloaded, or where MINI_IMPL_DATA says.
"""

import functools
from statistics import mean

import torch
from _rows import compute

from mini_impl import results
from mini_impl.forecasting import FORECASTERS, loss_of
from mini_impl.forecasting.data import ETT_SPLIT, download_ett, load_auckland, load_csv, prepare
from mini_impl.forecasting.train import evaluate, fit

NAME = "forecasters"
SPLITS = {"Auckland": (12280, 1754, 3510), "ETTh1": ETT_SPLIT}
SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
SETTINGS = {
    "dlinear": {"kernel_size": 25},
    "patchtst": {"width": 16, "feed_forward_width": 128},
    "itransformer": {"width": 128, "feed_forward_width": 128},
    "timesnet": {"width": 16, "feed_forward_width": 32},
    "timexer": {"width": 128, "feed_forward_width": 256},
}
# One model at two other sizes, to show what a setting is worth that was not chosen.
OTHER_SIZES = [{"width": width, "feed_forward_width": 8 * width} for width in (8, 32)]
# Near the settings of the public scripts for ETTh1.
SCRIPTS = {
    "dlinear": (2e-3, {"kernel_size": 25}),
    "patchtst": (1e-3, {"width": 16, "feed_forward_width": 128}),
    "itransformer": (1e-4, {"width": 256, "feed_forward_width": 256, "embedding": "linear"}),
    "timesnet": (1e-3, {"width": 16, "feed_forward_width": 32, "dropout": 0.2}),
    "timexer": (1e-4, {"width": 256, "feed_forward_width": 512, "variable_token": "learned"}),
}
WEIGHT_OF = {  # the second term of each documented loss
    "dlinear": "trend_weight",
    "patchtst": "uniformity_weight",
    "itransformer": "orthogonality_weight",
    "timesnet": "smoothness_weight",
    "timexer": "orthogonality_weight",
}
HORIZONS = (96, 192, 336, 720)


@functools.cache
def series(data: str):
    return load_auckland() if data == "Auckland" else load_csv(download_ett(data))


def train(
    model: str,
    data: str,
    history: int,
    horizon: int,
    loss: str,
    seed: int,
    learning_rate: float,
    settings: dict,
    weight: float | None = None,
) -> dict:
    """One training: its validation and test errors."""
    parts = prepare(series(data), SPLITS[data], history, horizon)[:3]
    make = FORECASTERS[model]
    given = dict(settings)
    if model in ("timesnet", "timexer"):
        given["variables"] = parts[0].values.shape[1]
    criterion = loss_of(make, loss)
    if loss == "documented":
        given |= make.documented_needs
        criterion = functools.partial(criterion, **{WEIGHT_OF[model]: weight})
    torch.manual_seed(seed)
    forecaster = make(history, horizon, **given)
    how = {"epochs": 10, "batch_size": 32, "patience": 3, "learning_rate": learning_rate, "seed": seed}
    training = fit(forecaster, *parts[:2], criterion, **how, progress=False)
    return {
        "parameters": sum(parameter.numel() for parameter in forecaster.parameters()),
        "validation": [round(score, 6) for score in training.validation],
        "best epoch": training.best_epoch,
        "test": evaluate(forecaster, parts[2])._asdict(),
    }


def key(given: dict) -> str:
    settings = " ".join(f"{name}={value}" for name, value in given["settings"].items())
    loss = given["loss"] + ("" if given.get("weight") is None else f" {given['weight']:g}")
    task = f"{given['data']} {given['history']}-{given['horizon']}"
    return f"{given['model']}, {task}, {loss}, lr {given['learning_rate']:g}, {settings}, seed {given['seed']}"


def run(jobs: list[dict]) -> list[dict]:
    rows = compute(NAME, train, {key(job): job for job in jobs})
    return [rows[key(job)] for job in jobs]


def validation(row: dict) -> float:
    return min(row["validation"])


def chosen() -> dict[tuple[str, str], dict]:
    """{(model, data): the settings with the least validation error}."""
    jobs = [
        {"model": model, "data": data, "loss": "published", "seed": 0, "learning_rate": rate, "settings": settings}
        for model, settings in SETTINGS.items()
        for data in SPLITS
        for rate in LEARNING_RATES
    ]
    rows = run([{"history": 96, "horizon": 96, **job} for job in jobs])
    best = {}
    for job, row in zip(jobs, rows, strict=True):
        task = job["model"], job["data"]
        if task not in best or validation(row) < validation(best[task]):
            best[task] = row
    return {
        task: {name: row["arguments"][name] for name in ("learning_rate", "settings")} for task, row in best.items()
    }


def best_weight(model: str) -> float:
    """The positive weight of the second term with the least mean validation error in book/results/terms.json."""
    rows = results.load("terms")[model]
    scores = {
        float(name.removeprefix("documented, weight ")): mean(
            min(row["validation"]["mse of each epoch"]) for row in seeds
        )
        for name, seeds in rows.items()
        if name.startswith("documented") and not name.endswith(" 0")
    }
    return min(scores, key=scores.get)


def main() -> None:
    best = chosen()
    for task, how in best.items():
        print(*task, how["learning_rate"], flush=True)
    weights = {model: [best_weight(model)] for model in FORECASTERS if model != "dlinear"}
    weights["dlinear"] = [0.1, 1, 10]  # seconds each; terms.json has the four others at every weight

    def rows(loss: str, data: str, horizon: int, seed: int) -> list[dict]:
        task = {"data": data, "history": 96, "horizon": horizon, "loss": loss, "seed": seed}
        return [
            {"model": model, **task, **best[model, data]} | ({} if weight is None else {"weight": weight})
            for model in FORECASTERS
            for weight in (weights[model] if loss == "documented" else [None])
        ]

    at_96 = [rows(loss, data, 96, seed) for loss in ("published", "documented") for seed in SEEDS for data in SPLITS]
    longer = [rows("published", "ETTh1", horizon, seed) for seed in SEEDS for horizon in HORIZONS[1:]]
    task = {"history": 96, "horizon": 96, "loss": "published"}
    scripts = [
        {"model": model, "data": "ETTh1", **task, "seed": seed, "learning_rate": rate, "settings": settings}
        for seed in SEEDS
        for model, (rate, settings) in SCRIPTS.items()
    ]
    sizes = [
        {"model": "patchtst", "data": data, **task, "seed": 0, "settings": size, "learning_rate": 1e-2}
        for data in SPLITS
        for size in OTHER_SIZES
    ]
    run([row for part in (*at_96, scripts, sizes, *longer) for row in part])


if __name__ == "__main__":
    main()

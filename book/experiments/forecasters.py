"""The five forecasters compared: book/results/forecasters.json, which the chapters of the first part read.

Settings are chosen with one seed, by the validation parts of both data sets together; then every row has three seeds.
ETTh1 is downloaded, or where MINI_IMPL_DATA says.
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
# Of each model one other setting, three values, the middle one for the choice of the learning rate; and what goes with
# it: the width of the feed-forward part keeps its ratio to the width.
SETTINGS = {
    "dlinear": [{"kernel_size": size} for size in (25, 13, 49)],
    "patchtst": [{"width": width, "feed_forward_width": 8 * width} for width in (16, 8, 32)],
    "itransformer": [{"width": width, "feed_forward_width": width} for width in (128, 64, 256)],
    "timesnet": [{"width": width, "feed_forward_width": 2 * width} for width in (16, 8, 32)],
    "timexer": [{"width": width, "feed_forward_width": 2 * width} for width in (128, 64, 256)],
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


def choose(candidates: dict[str, list[dict]]) -> dict[str, dict]:
    """Of each model's settings, those with the least validation error, both data sets counting alike."""
    task = {"history": 96, "horizon": 96, "loss": "published", "seed": 0}
    jobs = [
        {"model": model, "data": data, **task, **how}
        for model in candidates
        for how in candidates[model]
        for data in SPLITS
    ]
    errors = {key(job): validation(row) for job, row in zip(jobs, run(jobs), strict=True)}
    best = {}
    for model, settings in candidates.items():
        of_data = [[errors[key({"model": model, "data": data, **task, **how})] for how in settings] for data in SPLITS]
        relative = torch.tensor(of_data) / torch.tensor(of_data).amin(1, keepdim=True)  # [data, candidate]
        best[model] = settings[int(relative.mean(0).argmin())]
    return best


def chosen() -> dict[str, dict]:
    """The learning rate and the other setting of each model, one after the other."""
    rates = {
        model: [{"learning_rate": rate, "settings": first} for rate in LEARNING_RATES]
        for model, (first, *_) in SETTINGS.items()
    }
    rate = choose(rates)
    return choose(
        {
            model: [
                {"learning_rate": rate[model]["learning_rate"], "settings": settings} for settings in SETTINGS[model]
            ]
            for model in FORECASTERS
        }
    )


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
    for model, how in best.items():
        print(model, how, flush=True)
    weights = {model: [None] if model == "dlinear" else [best_weight(model)] for model in FORECASTERS}
    weights = {model: [best_weight(model)] for model in FORECASTERS if model != "dlinear"}
    weights["dlinear"] = [0.1, 1, 10]  # seconds each; terms.json has the four others at every weight

    def rows(loss: str, data: str, horizon: int, seed: int) -> list[dict]:
        task = {"data": data, "history": 96, "horizon": horizon, "loss": loss, "seed": seed}
        return [
            {"model": model, **task, **how} | ({} if weight is None else {"weight": weight})
            for model, how in best.items()
            for weight in (weights[model] if loss == "documented" else [None])
        ]

    at_96 = [rows(loss, data, 96, seed) for loss in ("published", "documented") for seed in SEEDS for data in SPLITS]
    longer = [rows("published", "ETTh1", horizon, seed) for seed in SEEDS for horizon in HORIZONS[1:]]
    run([row for part in at_96 + longer for row in part])


if __name__ == "__main__":
    main()

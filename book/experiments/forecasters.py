"""The five forecasters compared: book/results/forecasters.json, which the chapters of the first part read.

Settings are chosen with one seed, by the validation parts of both data sets together; then every row has three seeds.
`--plan` prints the table of runs instead. ETTh1 is downloaded, or where MINI_IMPL_DATA says.
"""

import functools
import sys

import torch
from _rows import compute, read

from mini_impl.forecasting import FORECASTERS, loss_of
from mini_impl.forecasting.data import ETT_SPLIT, download_ett, load_auckland, load_csv, prepare
from mini_impl.forecasting.train import evaluate, fit

NAME = "forecasters"
SPLITS = {"Auckland": (12280, 1754, 3510), "ETTh1": ETT_SPLIT}
SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
# Of each model one other setting, three values, the middle one for the choice of the learning rate; and what goes with
# it: the width of the feed-forward part keeps its ratio to the width.
WIDTHS = {
    "dlinear": [{"kernel_size": size} for size in (25, 13, 49)],
    "patchtst": [{"width": width, "feed_forward_width": 8 * width} for width in (16, 8, 32)],
    "itransformer": [{"width": width, "feed_forward_width": width} for width in (128, 64, 256)],
    "timesnet": [{"width": width, "feed_forward_width": 2 * width} for width in (16, 8, 32)],
    "timexer": [{"width": width, "feed_forward_width": 2 * width} for width in (128, 64, 256)],
}
# The documented weight of each model's second term: 0, a tenth of, once and ten times the default.
TERMS = {
    "dlinear": ("trend_weight", (0, 0.1, 1, 10)),
    "patchtst": ("uniformity_weight", (0, 0.01, 0.1, 1)),
    "itransformer": ("orthogonality_weight", (0, 1e-5, 1e-4, 1e-3)),
    "timesnet": ("smoothness_weight", (0, 0.05, 0.5, 5)),
    "timexer": ("orthogonality_weight", (0, 0.001, 0.01, 0.1)),
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
        criterion = functools.partial(criterion, **{TERMS[model][0]: weight})
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


def choose(model: str, candidates: list[dict]) -> dict:
    """Of some settings, those with the least validation error, both data sets counting alike."""
    job = {"model": model, "history": 96, "horizon": 96, "loss": "published", "seed": 0}
    jobs = [{**job, "data": data, **candidate} for data in SPLITS for candidate in candidates]
    errors = torch.tensor([validation(row) for row in run(jobs)]).view(len(SPLITS), -1)  # [data, candidate]
    return candidates[int((errors / errors.amin(1, keepdim=True)).mean(0).argmin())]


def chosen(model: str) -> dict:
    """The learning rate and the other setting of a model, one after the other."""
    first, *others = WIDTHS[model]
    rate = choose(model, [{"learning_rate": rate, "settings": first} for rate in LEARNING_RATES])["learning_rate"]
    return choose(model, [{"learning_rate": rate, "settings": settings} for settings in (first, *others)])


def main() -> None:
    best = {model: chosen(model) for model in FORECASTERS}
    for model, how in best.items():
        print(model, how, flush=True)

    # Published, at 96 steps, three seeds; then the documented loss, its weight chosen with one seed on each data set.
    task = {"history": 96, "horizon": 96}
    run(
        [
            {"model": model, "data": data, **task, "loss": "published", "seed": seed, **how}
            for seed in SEEDS
            for data in SPLITS
            for model, how in best.items()
        ]
    )
    for data in SPLITS:
        for model, how in best.items():
            grid = TERMS[model][1]
            job = {"model": model, "data": data, **task, "loss": "documented", **how}
            rows = run([{**job, "weight": weight, "seed": 0} for weight in grid])
            weight = min(zip(grid, rows, strict=True), key=lambda pair: validation(pair[1]))[0]
            run([{**job, "weight": weight, "seed": seed} for seed in SEEDS])
    # The other horizons.
    run(
        [
            {
                "model": model,
                "data": "ETTh1",
                "history": 96,
                "horizon": horizon,
                "loss": "published",
                "seed": seed,
                **how,
            }
            for seed in SEEDS
            for horizon in HORIZONS[1:]
            for model, how in best.items()
        ]
    )


if __name__ == "__main__":
    if "--rows" in sys.argv:
        print(len(read(NAME)), "rows")
    else:
        main()

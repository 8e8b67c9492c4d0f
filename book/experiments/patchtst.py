"""The long runs of the chapter `patchtst`: book/results/patchtst.json. About 50 minutes on one core.

Spread (32 runs, 6 more with all windows): the weight of the second term from 0 to 10 in both readings, and attention
that can only average.
Taught (3 + 60 runs): a masked model, then a linear probe, fine-tuning and training from scratch on the most recent 1,
5, 20 and 100 % of the training windows. Cut (30 runs): patches of 1 to 96 steps. Twenty seconds a run.
Thinned parts keep every fifth window (5 and 24 share no factor: every hour of the day still begins some); tests are of
all windows. The learning rate of every line is the one of three with the least validation error with seed 0.
"""

import functools
from pathlib import Path

import torch
from _rows import Thinned, compute
from safetensors.torch import load_file, save

from mini_impl.checkpoint import write_bytes
from mini_impl.forecasting.data import Windows, load_auckland, prepare
from mini_impl.forecasting.patchtst import (
    MaskedPatchTST,
    PatchTST,
    documented_loss,
    masked_loss,
    masked_score,
    published_loss,
)
from mini_impl.forecasting.train import evaluate, fit

SPLIT = (12280, 1754, 3510)
SEEDS = (0, 1, 2)
WEIGHTS = (0, 0.1, 1, 10)
# Windows, epochs, patience.
SHARES = {
    "1": (120, 150, 30),
    "5": (604, 60, 10),
    "20": (2417, 20, 5),
    "100": (12089, 10, 3),
}
SIZES = {"patch_length": 8, "width": 32, "heads": 4, "layers": 2, "feed_forward_width": 64, "dropout": 0.2}
PRETRAINING = {"epochs": 10, "patience": 3, "learning_rate": 1e-3}


@functools.cache
def parts():
    return prepare(load_auckland(), SPLIT, 96, 96)[:3]


def only_average(model: PatchTST, layers: str) -> None:
    """Make the attention of the last layer, or of all, the plain average of the patches, in training too.

    With queries and keys of zero every score is zero; so is its gradient by either, which the other one multiplies.
    """
    for block in model.encoder.blocks if layers == "all" else model.encoder.blocks[-1:]:
        width = block.attention.projection.in_features
        with torch.no_grad():
            block.attention.projection.weight[: 2 * width] = 0
            block.attention.projection.bias[: 2 * width] = 0


def spread(
    loss: str,
    seed: int,
    learning_rate: float,
    weight: float = 0.0,
    reading: str = "received",
    average: str = "",
    every: int = 5,
) -> dict:
    """Train on every fifth window, or another share; the errors, and how far the last layer's attention is spread."""
    train, validation, test = parts()
    some = Thinned(train, every)
    torch.manual_seed(seed)
    model = PatchTST(96, 96, layers=2, return_attention=True)
    if average:
        only_average(model, average)
    criterion = published_loss
    if loss == "documented":
        criterion = functools.partial(documented_loss, uniformity_weight=weight, reading=reading)
    how = {"epochs": 10, "patience": 3, "learning_rate": learning_rate, "seed": seed}
    training = fit(model, some, Thinned(validation, 5), criterion, **how, progress=False)
    with torch.no_grad():
        maps = model(test[::7][0]).attention  # [window * variable, head, query, key]
        heads = model(test[30:31][0]).attention[0]  # of the first sensor: [head, query, key]
        shown = heads[heads.square().sum((1, 2)).argmax()]  # the head with the most to see
        batches = (test[i : i + 256] for i in range(0, len(test), 256))
        error = torch.cat([model(history).prediction - target for history, target in batches])
    patches = maps.shape[-1]

    def kl(p: torch.Tensor) -> float:
        return float((p * (patches * p).clamp(min=1e-30).log()).sum(-1).mean())

    return {
        "validation": min(training.validation),
        "best epoch": training.best_epoch,
        "test": evaluate(model, test)._asdict(),
        "mean of forecast - target": float(error.mean()),
        "KL received": kl(maps.mean((1, 2))),
        "KL rows": kl(maps),
        "map": [[round(x, 3) for x in row] for row in shown.tolist()] if seed == 0 else None,
    }


def pretrained(seed: int) -> MaskedPatchTST:
    """A masked model, trained on all training windows; kept, as rows of `taught` begin with it."""
    file = Path(__file__).parents[2] / "_build" / "reproduce" / f"masked-{seed}.safetensors"
    torch.manual_seed(seed)
    model = MaskedPatchTST(96, **SIZES)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model
    train, validation, _ = parts()
    fit(model, train, validation, masked_loss, score=masked_score, seed=seed, progress=False, **PRETRAINING)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, save(model.state_dict()))
    return model


def taught(way: str, share: str, seed: int, learning_rate: float) -> dict:
    """Train a forecaster in one of three ways on a share of the windows, the most recent ones."""
    train, validation, test = parts()
    windows, epochs, patience = SHARES[share]
    recent = Windows(train.values[-(windows + 191) :], 96, 96)
    torch.manual_seed(seed)
    if way == "scratch":
        model = PatchTST(96, 96, stride=SIZES["patch_length"], pad_end=False, **SIZES)
    else:
        model = PatchTST.from_masked(pretrained(seed), 96, linear_probe=way == "probe")
    how = {"epochs": epochs, "patience": patience, "learning_rate": learning_rate, "seed": seed}
    training = fit(model, recent, Thinned(validation, 5), published_loss, **how, progress=False)
    return {
        "windows": windows,
        "validation": min(training.validation),
        "best epoch": training.best_epoch,
        "fit seconds": round(training.seconds, 1),
        "test": evaluate(model, test)._asdict(),
    }


def learnt(seed: int) -> dict:
    """How well a masked model reconstructs; "nothing learnt" says 0, the mean of the window, everywhere."""
    _, validation, test = parts()
    model = pretrained(seed).eval()
    with torch.no_grad():
        nothing = model(validation[:][0], torch.Generator().manual_seed(0))
        zero = masked_loss(nothing._replace(reconstruction=torch.zeros_like(nothing.patches))).total.item()
        shown = model(test[30:31][0], torch.Generator().manual_seed(3))  # four days from a Friday midnight
    example = {
        "patches": [[round(x, 3) for x in patch] for patch in shown.patches[0, 0].tolist()],
        "reconstruction": [[round(x, 3) for x in patch] for patch in shown.reconstruction[0, 0].tolist()],
        "hidden": shown.mask[0, 0].tolist(),
    }
    score = masked_score(model, validation)
    return {"masked loss": score, "nothing learnt": zero, "example": example if seed == 0 else None}


def cut(patch_length: int, stride: int, seed: int, learning_rate: float) -> dict:
    """Train with the published loss on every fifth window, the series cut into patches of another length."""
    train, validation, test = parts()
    torch.manual_seed(seed)
    model = PatchTST(96, 96, patch_length, stride, pad_end=stride < patch_length, layers=2)
    how = {"epochs": 10, "patience": 3, "learning_rate": learning_rate, "seed": seed}
    training = fit(model, Thinned(train, 5), Thinned(validation, 5), published_loss, **how, progress=False)
    return {
        "patches": len(model.encoder.position),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": min(training.validation),
        "fit seconds": round(training.seconds, 1),
        "test": evaluate(model, test)._asdict(),
    }


def cut_rows() -> None:
    def key(job: dict) -> str:
        pieces = f"{job['patch_length']} steps every {job['stride']}"
        return f"cut: {pieces}, lr {job['learning_rate']:g}, seed {job['seed']}"

    def run(jobs: list[dict]) -> list[dict]:
        rows = compute("patchtst", cut, {key(job): job for job in jobs})
        return [rows[key(job)] for job in jobs]

    for length, stride in ((16, 8), (16, 16), (4, 4), (48, 48), (96, 96), (1, 1)):
        rates = (1e-3, 3e-3, 1e-2)
        job = {"patch_length": length, "stride": stride}
        errors = [row["validation"] for row in run([{**job, "learning_rate": rate, "seed": 0} for rate in rates])]
        rate = rates[errors.index(min(errors))]
        run([{**job, "learning_rate": rate, "seed": seed} for seed in SEEDS[1:]])


def spread_rows() -> None:
    def key(job: dict) -> str:
        loss = f"{job['reading']}, weight {job['weight']:g}" if job["loss"] == "documented" else "published"
        averaging = f", averaging in {job['average']}" if job.get("average") else ""
        averaging += ", all windows" if job.get("every") == 1 else ""
        return f"spread: {loss}{averaging}, lr {job['learning_rate']:g}, seed {job['seed']}"

    def run(jobs: list[dict]) -> list[dict]:
        rows = compute("patchtst", spread, {key(job): job for job in jobs})
        return [rows[key(job)] for job in jobs]

    base = {"loss": "documented", "reading": "received", "weight": 0}
    rates = (1e-3, 3e-3, 1e-2)
    errors = [row["validation"] for row in run([{**base, "learning_rate": rate, "seed": 0} for rate in rates])]
    rate = rates[errors.index(min(errors))]
    jobs = [{**base, "learning_rate": rate, "seed": seed} for seed in SEEDS]
    jobs += [{"loss": "published", "learning_rate": rate, "seed": seed} for seed in SEEDS]
    jobs += [{**job, "average": layers} for job in jobs[:3] for layers in ("last", "all")]
    jobs += [
        {"loss": "documented", "reading": reading, "weight": weight, "learning_rate": rate, "seed": seed}
        for reading in ("received", "rows")
        for weight in WEIGHTS[1:]
        for seed in SEEDS
    ]
    whole = {"loss": "documented", "reading": "received", "learning_rate": rate, "every": 1}
    # With free attention these are the rows of terms.json.
    ways = [(layers, seed) for layers in ("last", "all") for seed in SEEDS]
    run(jobs + [{**whole, "weight": 0, "average": layers, "seed": seed} for layers, seed in ways])


def pretrained_rows() -> None:
    def key(job: dict) -> str:
        return f"taught: {job['way']}, {job['share']} %, lr {job['learning_rate']:g}, seed {job['seed']}"

    def run(jobs: list[dict]) -> list[dict]:
        rows = compute("patchtst", taught, {key(job): job for job in jobs})
        return [rows[key(job)] for job in jobs]

    compute("patchtst", learnt, {f"masked model, seed {seed}": {"seed": seed} for seed in SEEDS})
    rates = (1e-3, 3e-3, 1e-2)
    for share in SHARES:
        jobs = []
        for way in ("scratch", "probe", "fine-tuning"):
            tried = [{"way": way, "share": share, "learning_rate": rate, "seed": 0} for rate in rates]
            errors = [row["validation"] for row in run(tried)]
            rate = rates[errors.index(min(errors))]
            jobs += [{"way": way, "share": share, "learning_rate": rate, "seed": seed} for seed in SEEDS[1:]]
        run(jobs)


if __name__ == "__main__":
    spread_rows()
    pretrained_rows()
    cut_rows()

"""The long runs of the chapter `timesnet`: book/results/timesnet.json. About 55 minutes on one core.

Plane: the same small network with the fold changed or taken away, Auckland, every fifth window (51 runs of 10 to 25
seconds), and ETTh1 with the full network (3 runs of 40). Smooth: the weight of the second term, what it does to the
spectrum of the branches, and what their scale does to it (21 runs of 10). Waves: made series, a transformer over points
beside TimesNet (25 runs of 30, 3 of 120). Seeds: ETTh1 96 -> 96, one published number in three ways (3 + 3 runs of 60
seconds, 3 of 150, and 4 with other first weights alone). ETTh1 is downloaded, or where MINI_IMPL_DATA says.
"""

import functools
from collections import Counter
from copy import deepcopy

import torch
import torch.nn.functional as F
from _rows import Thinned, compute
from torch import nn

from mini_impl.forecasting.data import ETT_SPLIT, Windows, download_ett, load_auckland, load_csv, prepare
from mini_impl.forecasting.layers import EncoderBlock, denormalise, encode, normalise, sinusoids
from mini_impl.forecasting.timesnet import (
    Output,
    TimesBlock,
    TimesNet,
    documented_loss,
    dominant_periods,
    one_branch,
    published_loss,
)
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.losses import LossTerms

SEEDS = (0, 1, 2)
SMALL = {"width": 8, "feed_forward_width": 16, "layers": 1}
FULL = {"width": 16, "feed_forward_width": 32, "layers": 2, "top_k": 5, "dropout": 0.2}
EPOCHS = {3: 7, 5: 12}  # of Auckland, on every n-th window
HOW = {"patience": 12, "learning_rate": 1e-2}
HOW_FULL = {"epochs": 5, "patience": 5, "learning_rate": 1e-3}


@functools.cache
def auckland(every: int = 5):
    """5 and 24 have no common factor, so that every hour of the day begins some window."""
    train, validation, test, _ = prepare(load_auckland(), (12280, 1754, 3510), 96, 96)
    return Thinned(train, every), validation, test


# --- plane: what the fold is worth ------------------------------------------------------------------------------------


class OtherFold(TimesBlock):
    """A block with the same weights that folds by other periods: fixed ones, another at every step, or not at all."""

    fold: str

    def forward(self, features, return_branches=False):
        if self.fold == "no block":
            return torch.zeros_like(features), None
        if self.fold == "24 joined":
            return joined(F.gelu(joined(features, 24, *self.widen.merged())), 24, *self.narrow.merged()), None
        if self.fold == "line":
            return line(F.gelu(line(features, *self.widen.merged())), *self.narrow.merged()), None
        period = int(torch.randint(2, 97, ())) if self.fold == "random" else int(self.fold)
        return one_branch(features, period, self.widen.merged(), self.narrow.merged()), None


def joined(series, period, kernel, bias):
    """The convolution on the plane with its seams closed: right of a row's end stands the next row's beginning."""
    rows, side = -(-series.shape[1] // period), kernel.shape[3] // 2
    padded = F.pad(series.mT, (side, rows * period - series.shape[1] + side))  # [batch, width, time]
    plane = padded.unfold(2, period + 2 * side, period)  # [batch, width, row, period + 2 side]
    result = F.conv2d(plane, kernel, bias, padding=(kernel.shape[2] // 2, 0))  # [batch, width, row, period]
    return result.flatten(2)[..., : series.shape[1]].mT


def line(series, kernel, bias):
    """The same kernel with its rows laid end to end, as one ordinary convolution along time, no plane at all."""
    return F.conv1d(series.mT, kernel.flatten(2), bias, padding="same").mT


def folded(model: TimesNet, fold: str) -> TimesNet:
    if not fold.startswith("FFT"):
        for block in model.blocks:
            block.__class__, block.fold = OtherFold, fold
    return model


def plane(data: str, fold: str, convolution: str, seed: int, every: int = 1) -> dict:
    parts = auckland(every) if data == "Auckland" else etth1()[0]
    settings, how = (SMALL, {**HOW, "epochs": EPOCHS[every]}) if data == "Auckland" else (FULL, HOW_FULL)
    k = int(fold.split()[1]) if fold.startswith("FFT") else 1
    torch.manual_seed(seed)
    model = folded(TimesNet(96, 96, 7, **{**settings, "top_k": k}, convolution=convolution), fold)
    some = parts[1][::13][0]  # validation windows
    found = [periods(model, some)]

    def score(model, windows):
        found.append(periods(model, some))
        return evaluate(model, windows).mse

    training = fit(model, *parts[:2], published_loss, **how, seed=seed, score=score, progress=False)
    return {"windows": len(parts[0]), **errors(model, training, parts[2]), "periods after each epoch": found}


@torch.no_grad()
def periods(model: TimesNet, history: torch.Tensor, k: int = 3, per_window: bool = False) -> list:
    """The strongest periods of what the first block is given."""
    scaled, _, _ = normalise(history)
    features = model.embedding(scaled.mT).mT
    features = features + sinusoids(*features.shape[1:], features.dtype, features.device)
    return dominant_periods(model.extension(features.mT).mT, k, per_window)[0].tolist()


def errors(model, training, test) -> dict:
    return {
        "validation": min(training.validation),
        "best epoch": training.best_epoch,
        "test": evaluate(model, test)._asdict(),
    }


# --- smooth: what the second term removes -----------------------------------------------------------------------------


def rescaled(model: TimesNet, factor: float) -> TimesNet:
    """The branches times the factor; the forecast is the same but for LayerNorm's 1e-5 and the softmax weights."""
    model = deepcopy(model)
    (block,) = model.blocks
    with torch.no_grad():
        model.extension.weight *= factor
        model.extension.bias *= factor
        for kernel in block.widen.kernels:
            kernel.weight /= factor
        for kernel in block.narrow.kernels:
            kernel.weight *= factor
            kernel.bias *= factor
    return model


def power(values: torch.Tensor) -> list[float]:
    """The mean over windows of |DFT|^2 over the horizon, summed over the rest: [frequency]."""
    spectrum = torch.fft.rfft(values, dim=1).abs().square().flatten(2).sum(2).mean(0)
    return [float(f"{x:.4g}") for x in spectrum]


@torch.no_grad()
def terms_on(model: TimesNet, windows: tuple[torch.Tensor, torch.Tensor]) -> dict:
    output = model(windows[0])
    loss = documented_loss(output, windows[1], smoothness_weight=1.0)
    return {**loss.values(), "std of F": float(output.frequency_features.std())}


def size_loss(output: Output, target: torch.Tensor, weight: float) -> LossTerms:
    """The size of F in the place of its changes: what does the scale alone do?"""
    return LossTerms.of(
        forecast=documented_loss(output, target).terms["forecast"],
        size=weight * output.frequency_features.square().sum() / (target.shape[0] * target.shape[1]),
    )


def smooth(weight: float, k: int, seed: int, penalty: str = "smoothness") -> dict:
    train, validation, test = auckland()
    torch.manual_seed(seed)
    model = TimesNet(96, 96, 7, **SMALL, top_k=k, return_frequency_features=True)
    criterion = functools.partial(documented_loss, smoothness_weight=weight)
    if penalty == "size":
        criterion = functools.partial(size_loss, weight=weight)
    training = fit(model, train, validation, criterion, **HOW, epochs=EPOCHS[5], seed=seed, progress=False)
    some, tested = train[:], test[::5]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        output = model(tested[0])
    return {
        **errors(model, training, test),
        "training windows": {f"{c:g}": terms_on(rescaled(model, c), some) for c in (1, 0.3, 0.1, 0.03)},
        "test mse rescaled": {f"{c:g}": evaluate(rescaled(model, c), test).mse for c in (0.3, 0.1, 0.03)},
        "strongest period": {
            "test windows": counted(periods(model, test[:][0], 1, per_window=True)),
            "noise": counted(periods(model, torch.randn(1000, 96, 7, generator=generator), 1, per_window=True)),
        },
        "power of F": power(output.frequency_features),
        "power of the forecast": power(normalised(output.prediction, tested[0])),
        "power of the target": power(normalised(tested[1], tested[0])) if seed == 0 else None,
    }


def counted(found: list[list[int]]) -> dict[str, int]:
    """How many windows have which period, the most frequent first."""
    return {str(period): count for period, count in Counter(period for (period,) in found).most_common()}


def normalised(values, history):
    _, mean, std = normalise(history)
    return (values - mean) / std


# --- waves: known periods ---------------------------------------------------------------------------------------------


class Points(nn.Module):
    """A transformer over points in time: 48 tokens seen, 24 that are asked for, with positions; full attention."""

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2):
        super().__init__()
        self.embedding, self.projection = nn.Linear(1, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, 2 * width, 0.0) for _ in range(layers))

    def forward(self, history):
        scaled, mean, std = normalise(history)
        tokens = self.embedding(F.pad(scaled, (0, 0, 0, 24)))  # [batch, 72, width]
        tokens = tokens + sinusoids(*tokens.shape[1:], tokens.dtype, tokens.device)
        tokens, _ = encode(self.blocks, tokens)
        return Output(denormalise(self.projection(tokens[:, 48:]), mean, std))


class Made(Windows):
    """Windows that are made, not cut."""

    def __init__(self, values: torch.Tensor):
        super().__init__(values[0], 48, 24)
        self._histories, self._targets = values[:, :48], values[:, 48:]

    def to(self, device):
        return self


def waves(count: int, task: str, seed: int) -> torch.Tensor:
    """[count, 72, 1]: each window repeats a random pattern of its own, or two, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    time, total = torch.arange(72), torch.zeros(count, 72)
    for part in task.split(" + "):
        if part == "8, 12 or 18":
            periods = torch.tensor([8, 12, 18])[torch.randint(3, (count, 1), generator=generator)]
        else:
            periods = torch.full((count, 1), int(part))
        total += torch.randn(count, 72, generator=generator).gather(1, time % periods)
    return (total + 0.1 * torch.randn(count, 72, generator=generator))[..., None]


def wave(task: str, model: str, seed: int, rate: float, epochs: int = 16) -> dict:
    """rate: the learning rate."""
    train, validation, test = (Made(waves(count, task, 10 * seed + i)) for i, count in enumerate((4000, 500, 1000)))
    torch.manual_seed(seed)
    if model == "points":
        made = Points()
    else:
        settings = {"width": 16, "feed_forward_width": 16, "layers": 1, "dropout": 0.0, "convolution": "inception"}
        k = 1 if model == "no fold" else int(model[-1])
        made = TimesNet(48, 24, 1, **settings, top_k=k, per_window=True)
        if model == "no fold":
            made = folded(made, "72")  # one row
    how = {"epochs": epochs, "patience": epochs, "learning_rate": rate, "seed": seed}
    training = fit(made, train, validation, published_loss, **how, progress=False)
    return errors(made, training, test)


# --- seeds: one published number --------------------------------------------------------------------------------------


class Marked(TimesNet):
    """With calendar marks, as in public code: a linear map of hour, weekday, day and month joins the embedding.

    The marks of a window are its last four columns, which are neither normalised nor forecast.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.marks = nn.Linear(4, self.embedding.out_channels, bias=False)

    def forward(self, history):
        values, marks = history[..., :-4], history[..., -4:]
        scaled, mean, std = normalise(values)
        features = self.embedding(scaled.mT).mT + self.marks(marks)  # [batch, time, width]
        features = features + sinusoids(*features.shape[1:], features.dtype, features.device)
        features = self.extension(self.dropout(features).mT).mT.contiguous()
        for block in self.blocks:
            features = self.norm(features + block(features)[0])
        forecast = self.projection(features[:, self.history :])
        return Output(denormalise(forecast, mean, std))


@functools.cache
def etth1():
    """Its parts; and the same with four calendar marks as columns 8 to 11 of the histories."""
    series = load_csv(download_ett("ETTh1"))
    plain = prepare(series, ETT_SPLIT, 96, 96)
    days = series.times.astype("M8[D]")
    hour = (series.times - days).astype("m8[h]").astype(int) / 23
    weekday = (days.astype(int) + 3) % 7 / 6
    day = (days - series.times.astype("M8[M]").astype("M8[D]")).astype(int) / 30
    month = series.times.astype("M8[M]").astype(int) % 12 / 11
    marks = torch.tensor([*zip(hour, weekday, day, month, strict=True)], dtype=torch.float32) - 0.5  # [time, 4]
    train, validation, _ = ETT_SPLIT
    begins = (0, train - 96, train + validation - 96)
    marked = [
        Windows(torch.cat([part.values, marks[begin : begin + len(part.values)]], 1), 96, 96, range(7))
        for part, begin in zip(plain, begins, strict=False)
    ]
    return plain[:3], tuple(marked)


def seeds(convolution: str, marks: bool, seed: int, learning_rate: float, dropout: float, first: int | None = None):
    """first: the seed of the first weights, if not that of the order and of dropout too."""
    parts = etth1()[marks]
    torch.manual_seed(seed if first is None else first)
    model = (Marked if marks else TimesNet)(96, 96, 7, **{**FULL, "dropout": dropout}, convolution=convolution)
    how = {**HOW_FULL, "learning_rate": learning_rate}
    training = fit(model, *parts[:2], published_loss, **how, seed=seed, progress=False)
    return {"parameters": sum(p.numel() for p in model.parameters()), **errors(model, training, parts[2])}


def run(job: str, **given) -> dict:
    return {"plane": plane, "smooth": smooth, "wave": wave, "seeds": seeds}[job](**given)


def jobs() -> dict[str, dict]:
    rows = {}

    def add(job: str, **given):
        values = " ".join(f"{name}={value}" for name, value in given.items())
        rows[f"{job}: {values}"] = {"job": job, **given}

    ours = {"learning_rate": 1e-3, "dropout": 0.2}
    folds = ("FFT 3", "FFT 1", "24", "17", "192", "random", "no block")
    for seed in SEEDS:
        for fold in folds:
            add("plane", data="Auckland", every=5, fold=fold, convolution="within", seed=seed)
        for fold in ("FFT 1", "24", "17"):
            add("plane", data="Auckland", every=5, fold=fold, convolution="across", seed=seed)
        for weight in (0, 0.05, 0.5, 5):
            add("smooth", weight=weight, k=1, seed=seed)
    for seed in SEEDS:
        for fold in ("24", "17", "24 joined"):
            add("plane", data="Auckland", every=5, fold=fold, convolution="inception", seed=seed)
        add("plane", data="Auckland", every=3, fold="FFT 1", convolution="within", seed=seed)
    for seed in SEEDS:
        for weight in (0.001, 0.01, 0.1):
            add("smooth", weight=weight, k=1, seed=seed, penalty="size")
        for fold in ("random", "line"):
            add("plane", data="Auckland", every=5, fold=fold, convolution="inception", seed=seed)
        add("plane", data="Auckland", every=5, fold="random", convolution="across", seed=seed)
    for seed in SEEDS:
        add("seeds", convolution="within", marks=False, seed=seed, **ours)
        add("seeds", convolution="within", marks=True, seed=seed, **ours)
        add("plane", data="ETTh1", fold="192", convolution="within", seed=seed)
    for seed in SEEDS:
        add("seeds", convolution="inception", marks=False, seed=seed, **ours)
    for first in SEEDS[1:]:
        for convolution in ("within", "inception"):
            add("seeds", convolution=convolution, marks=False, seed=0, **ours, first=first)
    varying, added = "8, 12 or 18", "18 + 8"
    for model in ("points", "k = 1"):  # of these the rate is chosen, 1e-2 for both
        for rate in (1e-3, 3e-3, 1e-2):
            add("wave", task=varying, model=model, seed=0, rate=rate)
    for seed in SEEDS:
        for task, model in (
            (varying, "points"),
            (varying, "k = 1"),
            (varying, "no fold"),
            (added, "points"),
            (added, "k = 1"),
            (added, "k = 2"),
            (added, "no fold"),
        ):
            add("wave", task=task, model=model, seed=seed, rate=1e-2)
        add("wave", task=varying, model="points", seed=seed, rate=1e-2, epochs=64)
    return rows


if __name__ == "__main__":
    compute("timesnet", run, jobs(), jobs=2)

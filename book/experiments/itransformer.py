"""The runs of the chapter `itransformer`: book/results/itransformer.json. About 14 minutes on one core.

Small models (width 64, two layers) on every fifth training window (5 and 24 share no factor), ten epochs, batches of
32, learning rate 0.01 unless a line says otherwise, three seeds; tested on all windows. A run takes 15 s, one with
time steps as tokens 65 s.
Penalty (27 runs): the loss without its second term, with it, with one half of it alone (the norms of the embeddings,
or their angles), a model that divides its embeddings by their norms, the same with the norms before the division held
by the loss (or not held; or only kept short), and a smaller learning rate.
Others (15 runs): attention cut, with queries alike, or a plain mean; four sensors seen and three not; time steps as
tokens.
"""

import functools
import math

import torch
import torch.nn.functional as F
from _rows import Thinned, compute
from torch import Tensor, nn

from mini_impl.forecasting.data import Windows, load_auckland, prepare
from mini_impl.forecasting.itransformer import ITransformer, Output, documented_loss
from mini_impl.forecasting.layers import EncoderBlock, denormalise, encode, normalise, sinusoids
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.losses import LossTerms

NAME = "itransformer"
SPLIT = (12280, 1754, 3510)
HALVES = (("documented", 0), ("documented", 1e-4), ("norms", 1e-4), ("angles", 1e-4))
SMALL = {"width": 64, "heads": 8, "layers": 2, "feed_forward_width": 64}


# --- data and losses --------------------------------------------------------------------------------------------------


@functools.cache
def parts() -> tuple[Windows, Windows, Windows]:
    return prepare(load_auckland(), SPLIT, 96, 96)[:3]


def only(windows: Windows, variables: list[int]) -> Windows:
    return Windows(windows.values[:, variables], windows.history, windows.horizon)


def half_loss(output: Output, target: Tensor, weight: float, half: str) -> LossTerms:
    """The documented loss with one half of ||EE' - I||^2, its diagonal ("norms") or the rest ("angles"), or tr EE'."""
    gram = output.embedding @ output.embedding.mT  # [batch, variable, variable]
    squares = (gram - torch.eye(gram.shape[-1])).square()
    diagonal = squares.diagonal(dim1=-2, dim2=-1).sum(-1)  # [batch]
    short = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # [batch]
    penalty = {"norms": diagonal, "angles": squares.sum((-2, -1)) - diagonal, "short": short}[half]
    return LossTerms.of(forecast=F.smooth_l1_loss(output.prediction, target), orthogonality=weight * penalty.mean())


class Watched:
    """A loss that notes, at the start of every pass, how long the embeddings are and how far they turned."""

    def __init__(self, loss, model: nn.Module, history: Tensor, steps: int):
        self.loss, self.model, self.history, self.steps = loss, model, history, steps
        self.step, self.directions, self.lengths, self.turns = 0, None, [], []

    def __call__(self, output: Output, target: Tensor) -> LossTerms:
        if self.model.training:
            if self.step % self.steps == 0:
                self.note()
            self.step += 1
        return self.loss(output, target)

    def note(self) -> None:
        self.model.eval()
        with torch.no_grad():
            E = self.model(self.history).embedding
        self.model.train()
        before, self.directions = self.directions, F.normalize(E, dim=-1)
        self.lengths.append(round(float(E.square().sum(-1).mean()), 3))
        if before is not None:
            self.turns.append(round(float((before * self.directions).sum(-1).mean()), 4))


def loss_of(loss: str, weight: float):
    if loss == "documented":
        return functools.partial(documented_loss, orthogonality_weight=weight)
    return functools.partial(half_loss, weight=weight, half=loss)


# --- models -----------------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Each token divided by its norm."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens, dim=-1)


class Alone(nn.Module):
    """The same model, each variable in a window of its own: nothing to attend to but itself."""

    def __init__(self, model: ITransformer):
        super().__init__()
        self.model = model

    def forward(self, history: Tensor) -> Output:
        batch, time, variable = history.shape
        output = self.model(history.mT.reshape(batch * variable, time, 1))
        return Output(
            prediction=output.prediction.reshape(batch, variable, -1).mT,
            embedding=output.embedding.reshape(batch, variable, -1),
        )


class TimeTokens(nn.Module):
    """The same parts, not inverted: a time step is a token, all variables in it; two linear maps give the forecast."""

    def __init__(self, variables: int, width: int, heads: int, layers: int, feed_forward_width: int):
        super().__init__()
        self.embedding = nn.Linear(variables, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, feed_forward_width, 0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.time = nn.Linear(96, 96)
        self.projection = nn.Linear(width, variables)

    def forward(self, history: Tensor) -> Output:
        scaled, mean, std = normalise(history)
        tokens = self.embedding(scaled)  # [batch, time, width]
        tokens, _ = encode(self.blocks, tokens + sinusoids(96, tokens.shape[-1], tokens.dtype, tokens.device))
        forecast = self.projection(self.time(self.norm(tokens).mT).mT)  # [batch, horizon, variable]
        return Output(denormalise(forecast, mean, std), tokens)


def make(kind: str, width: int) -> nn.Module:
    sizes = SMALL | {"width": width, "feed_forward_width": width}
    if kind == "time tokens":
        return TimeTokens(7, **sizes)
    model = ITransformer(96, 96, **sizes, return_attention=True)
    if kind == "unit":
        model.embedding = nn.Sequential(model.embedding, Unit())
    if kind == "unit inside":  # the blocks see directions only; the loss sees the lengths
        model.dropout = nn.Sequential(Unit(), model.dropout)
    if kind in ("one question", "mean"):  # queries that do not depend on the token; no queries and keys at all
        for block in model.blocks:
            weight = block.attention.projection.weight
            fixed = torch.arange(len(weight)) < (width if kind == "one question" else 2 * width)
            with torch.no_grad():
                weight[fixed] = 0
            weight.register_hook(lambda gradient, fixed=fixed: gradient.masked_fill(fixed[:, None], 0))
    return Alone(model) if kind == "alone" else model


# --- one run ----------------------------------------------------------------------------------------------------------


def by_variable(model: nn.Module, windows: Windows, replace=None) -> list[float]:
    """The mean squared error of each variable; replace: a function of each block's map [batch, head, query, key]."""
    total = torch.zeros(windows.values.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(windows), 256):
            history, target = windows[start : start + 256]
            prediction = model(history).prediction if replace is None else replaced(model, history, replace)
            total += (prediction - target).double().square().sum((0, 1))
    return [round(x, 6) for x in (total / len(windows) / 96).tolist()]


def replaced(model: ITransformer, history: Tensor, replace) -> Tensor:
    """The forecast with other maps in every block."""
    scaled, mean, std = normalise(history)
    tokens = model.embedding(scaled.mT)
    for block in model.blocks:
        attention = block.attention
        query, key, value = attention._project(tokens, None)
        weights = replace((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        mixed = attention.output((weights @ value).transpose(1, 2).flatten(2))
        tokens = block.attention_norm(tokens + mixed)
        tokens = block.feed_forward_norm(tokens + block.feed_forward(tokens))
    return denormalise(model.projection(model.norm(tokens)).mT, mean, std)


REPLACEMENTS = {
    "as learnt": lambda maps: maps,
    "itself only": lambda maps: torch.eye(maps.shape[-1]).expand_as(maps),
    "all alike": lambda maps: torch.full_like(maps, 1 / maps.shape[-1]),
    "mean over windows": lambda maps: maps.mean(0, keepdim=True).expand_as(maps),
    "others exchanged": lambda maps: exchanged(maps),
    "one row for all": lambda maps: maps.mean(-2, keepdim=True).expand_as(maps),
}


def exchanged(maps: Tensor) -> Tensor:
    """Each query keeps what it gives itself; what it gives the others goes to the wrong ones, in a fixed cycle."""
    count = maps.shape[-1]
    order = torch.tensor(
        [[i] + [(i + 1 + (j + 1) % (count - 1)) % count for j in range(count - 1)] for i in range(count)]
    )
    place = torch.tensor([[(i + j) % count for j in range(count)] for i in range(count)])
    turned = torch.zeros_like(maps)
    return turned.scatter(-1, place.expand_as(maps), maps.gather(-1, order.expand_as(maps)))


def train(
    kind: str,
    loss: str,
    weight: float,
    seed: int,
    learning_rate: float,
    width: int = 64,
    epochs: int = 10,
    seen: list[int] | None = None,
    every: int = 1,
    batch_size: int = 128,
) -> dict:
    """One training: its errors, the sizes and angles of its embeddings, its mean map and what the map is worth."""
    train, validation, test = parts()
    torch.manual_seed(seed)
    model = make(kind, width)
    fitted = (train, validation) if seen is None else (only(train, seen), only(validation, seen))
    how = {"epochs": epochs, "batch_size": batch_size, "patience": 3, "learning_rate": learning_rate, "seed": seed}
    if every > 1:
        fitted = tuple(Thinned(part, every) for part in fitted)
    criterion = loss_of(loss, weight)
    if kind == "unit inside":
        criterion = Watched(criterion, model, test[::13][0], math.ceil(len(fitted[0]) / batch_size))
    training = fit(model, *fitted, criterion, **how, progress=False)
    row = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": round(min(training.validation), 6),
        "best epoch": training.best_epoch,
        "test": evaluate(model, test)._asdict(),
        "test by variable": by_variable(model, test),
    }
    if kind == "time tokens":
        return row
    if kind == "unit inside":
        row["norm squared at each pass"], row["cosine to the pass before"] = criterion.lengths, criterion.turns
    with torch.no_grad():
        output = model(test[::13][0])
    E = output.embedding  # [window, variable, width]
    row["norm squared"] = round(float(E.square().sum(-1).mean()), 4)
    row["singular values squared"] = [round(x, 4) for x in torch.linalg.svdvals(E).square().mean(0).tolist()]
    directions = F.normalize(E, dim=-1)
    row["cosines"] = [[round(x, 4) for x in line] for line in (directions @ directions.mT).mean(0).tolist()]
    if output.attention is not None and kind != "alone":
        row["map"] = [[round(x, 4) for x in line] for line in output.attention.mean((0, 1)).tolist()]
    if kind == "inverted" and seen is None and width == 64:
        errors = {name: by_variable(model, Thinned(test, 5), change) for name, change in REPLACEMENTS.items()}
        row["test with other maps"] = {name: round(sum(each) / len(each), 6) for name, each in errors.items()}
    return row


def key(given: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in given.items())


def main() -> None:
    base = {"kind": "inverted", "loss": "documented", "weight": 0, "learning_rate": 1e-2, "every": 5, "batch_size": 32}
    plan = [{"loss": loss, "weight": weight} for loss, weight in HALVES]
    plan += [{"learning_rate": 3e-3}, {"kind": "alone", "weight": 1e-4}, {"weight": 1e-4, "seen": [0, 2, 4, 6]}]
    inside = (("norms", 1e-4), ("norms", 0), ("short", 1e-4))
    plan += [{"kind": "unit"}, *({"kind": "unit inside", "loss": loss, "weight": weight} for loss, weight in inside)]
    plan += [{"kind": kind, "weight": 1e-4} for kind in ("one question", "mean")]
    plan += [{"kind": "time tokens", "learning_rate": 3e-3}]
    jobs = [{**base, **line, "seed": seed} for line in plan for seed in (0, 1, 2)]
    compute(NAME, train, {key(job): job for job in jobs})


if __name__ == "__main__":
    main()

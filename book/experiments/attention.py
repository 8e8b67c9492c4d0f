"""The runs of the page `attention`: book/results/attention.json. About five minutes on one core.

One head learns to repeat noise of 24 steps before (the page has the task). Each row trains it once (5 to 30 seconds),
then tests it on series 1, 2, 4, 8 times as long: as it is, with doubled scores, and with parts of its score matrix M:
the rotations (its mean over all times at which a series can begin), the rotations with doubled scores, the rest.
Main (5 seeds each): series of 72 steps that begin at 0, or at random times up to 1000. Else (3 seeds each, all begin at
0): four times the steps; 32 features of position; value and position added, as models do; series of 144 steps; the
first scores times 0, 100 and 900.
"""

import functools
import math

import torch
from _rows import compute
from torch import nn

from mini_impl.forecasting.layers import Attention, sinusoids

LAG = 24
VARIANTS = {
    "one start": {},
    "random starts": {"starts": 1000},
    "four times the steps": {"steps": 1600},
    "32 features": {"features": 32},
    "added": {"features": 32, "added": True},
    "series of 144": {"length": 144},
    "factor 0": {"factor": 0},
    "factor 100": {"factor": 100},
    "factor 900": {"factor": 900},
}


class Head(nn.Module):
    """Tokens of value and position, one head, a linear map to one number: [batch, time, 1] -> the same shape."""

    def __init__(self, features: int, added: bool = False):
        super().__init__()
        width = features if added else features + 1
        self.features = features
        self.embedding = nn.Linear(1, width) if added else None
        self.attention = Attention(width, heads=1)
        self.read_out = nn.Linear(width, 1)

    def tokens(self, series, start=0):
        positions = sinusoids(4096, self.features, series.dtype, series.device)[start : start + series.shape[1]]
        if self.embedding:
            return self.embedding(series) + positions
        return torch.cat([series, positions.expand(len(series), -1, -1)], dim=-1)

    def forward(self, series, start=0):
        return self.with_map(series, start)[0]

    def with_map(self, series, start=0):
        mixed, weights = self.attention(self.tokens(series, start), return_map=True)
        return self.read_out(mixed), weights


@torch.enable_grad()
def train(seed, steps=400, length=72, features=16, starts=0, added=False, factor=1.0):
    """The trained model, and how training began: ln N - H of the first map, the loss after 100 steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Head(features, added)
    queries_and_keys = 2 * model.read_out.in_features
    with torch.no_grad():
        for parameter in model.attention.projection.parameters():
            parameter[:queries_and_keys] *= factor**0.5
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        series = torch.randn(32, length, 1, generator=generator)
        start = int(torch.randint(0, starts + 1, (1,), generator=generator))
        prediction, weights = model.with_map(series, start)
        loss = (prediction[:, LAG:] - series[:, :-LAG]).square().mean()
        if not losses:
            missing = math.log(length) - torch.special.entr(weights.detach()).sum(-1).mean().item()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, {"missing at first": missing, "loss at 100": losses[100]}


def rotations(matrix):
    """The part of M [features, features] with blocks [[a, b], [-b, a]] on its diagonal, zero elsewhere."""
    kept = torch.zeros_like(matrix)
    for i in range(0, len(matrix), 2):
        block = matrix[i : i + 2, i : i + 2]
        a, b = (block[0, 0] + block[1, 1]) / 2, (block[0, 1] - block[1, 0]) / 2
        kept[i : i + 2, i : i + 2] = torch.stack([torch.stack([a, b]), torch.stack([-b, a])])
    return kept


def by_matrix(model, matrix, series, start=0):
    """The model's forecast with scores p_t' M p_s in place of its own; values and read-out stay. And its map."""
    attention, width = model.attention, model.read_out.in_features
    position = sinusoids(4096, model.features, series.dtype, series.device)[start : start + series.shape[1]]
    weights = (position @ matrix @ position.T).softmax(-1)  # [time, time]
    weight, bias = attention.projection.weight[2 * width :], attention.projection.bias[2 * width :]
    values = nn.functional.linear(model.tokens(series, start), weight, bias)
    return model.read_out(attention.output(weights @ values)), weights


@torch.no_grad()
def run(seed: int, **settings) -> dict:
    model, began = train(seed, **settings)
    width, first = model.read_out.in_features, model.read_out.in_features - model.features
    weight = model.attention.projection.weight
    matrix = weight[:width, first:].T @ weight[width : 2 * width, first:] / math.sqrt(width)
    rotated = rotations(matrix)
    parts = {
        "doubled": 2 * matrix,
        "rotations": rotated,
        "rotations, doubled": 2 * rotated,
        "rest": matrix - rotated,
    }
    heads = {"whole": model} | {
        name: functools.partial(lambda part, *given: by_matrix(model, part, *given)[0], part)
        for name, part in parts.items()
    }
    length = settings.get("length", 72)
    tests = {}
    for steps in (length, 2 * length, 4 * length, 8 * length):
        series = torch.randn(16, steps, 1, generator=torch.Generator().manual_seed(1000 + seed))
        errors = {name: (head(series)[:, LAG:] - series[:, :-LAG]).square().mean() for name, head in heads.items()}
        tests[steps] = {name: error.item() for name, error in errors.items()}
    series = torch.randn(16, length, 1, generator=torch.Generator().manual_seed(1000 + seed))
    late = (model(series, 2000)[:, LAG:] - series[:, :-LAG]).square().mean().item()
    distance = torch.arange(8 * length)
    position = sinusoids(8 * length, model.features, torch.float32, torch.device("cpu"))
    profile = (position @ rotated @ position[0]).tolist()  # the score of a key `distance` steps before
    return {
        **began,
        "mse": tests,
        "mse from 2000": late,
        "share of rotations": (rotated.norm() / matrix.norm().clamp(min=1e-9)).square().item(),
        "lag": int(distance[torch.tensor(profile).argmax()]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = {
        f"{name}, seed {seed}": {"seed": seed, **settings}
        for name, settings in VARIANTS.items()
        for seed in range(5 if name in ("one start", "random starts") else 3)
    }
    compute("attention", run, arguments, jobs=1)

"""The long runs of the chapter `timexer`: book/results/timexer.json. About 15 minutes on one idle core.

Target: 45 Queen Street, 96 hours -> 96 hours, of the embedded Auckland series; everything else is exogenous.

`ridge` rows (1 to 4 seconds each, about 2 minutes): least squares in closed form, penalty chosen on validation. From
its own past; with six neighbours; with neighbours some hours late or early; with noise; with the hour of the week.
`network` rows (15 seconds each, 3 seeds, 15 variants, about 12 minutes): one small TimeXer, the same budget for all:
6 epochs, batches of 64. Alone (its one exogenous series is constant); with six neighbours; noise; late and early; waves
of the week; neighbours that miss values in training too; the documented loss at several weights and in three readings;
and an iTransformer, which treats all seven series alike. Rows with six neighbours also say what each neighbour's
attention is, what the error is with its series shuffled, and what missing values and short histories do.
"""

import torch
import torch.nn.functional as F
from _rows import compute

from mini_impl.forecasting.data import Windows, load_auckland, prepare
from mini_impl.forecasting.itransformer import ITransformer
from mini_impl.forecasting.itransformer import published_loss as itransformer_loss
from mini_impl.forecasting.timexer import TimeXer, documented_loss
from mini_impl.forecasting.train import fit

SPLIT = (12280, 1754, 3510)
HISTORY = HORIZON = 96
SETTINGS = {"patch_length": 24, "width": 64, "heads": 4, "layers": 1, "feed_forward_width": 128, "dropout": 0.0}
HOW = {"epochs": 6, "batch_size": 64, "learning_rate": 5e-3, "patience": 3, "progress": False}
SHIFTS = (-96, -48, -24, -12, -6, -3, 0, 3, 6, 12, 24, 36, 48, 60, 72, 84, 96, 120, 144, 168, 336, 672)


# --- the series beside the target -------------------------------------------------------------------------------------


def waves(time: int) -> torch.Tensor:
    """Sine and cosine of a week, and of its half and third: [time, 6]."""
    angle = torch.arange(time)[:, None] * torch.tensor([1, 2, 3]) * 2 * torch.pi / 168
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def late(values: torch.Tensor, hours: int) -> torch.Tensor:
    """The same series, told so many hours late; early if negative."""
    rows = (torch.arange(len(values)) - hours).clamp(0, len(values) - 1)
    return values[rows]


def beside(kind: str) -> torch.Tensor:
    """The target and what stands beside it: [time, variable]."""
    values = load_auckland().values
    target, six = values[:, :1], values[:, 1:]
    word, _, number = kind.partition(" ")
    if word == "noise":
        six = torch.randn(six.shape, generator=torch.Generator().manual_seed(0))
    elif word == "late":
        six = late(six, int(number))
    elif word == "waves":
        six = waves(len(six))
    elif word == "both":
        six = torch.cat([six, waves(len(six))], dim=1)
    elif word == "without":
        six = six[:, [i for i in range(6) if i != int(number) - 1]]
    elif word == "only":
        six = six[:, [int(number) - 1]]
    elif word == "alone":
        six = six[:, :0]
    elif word not in ("six", "unreliable"):
        raise ValueError(kind)
    return torch.cat([target, six], dim=1)


def parts_of(kind: str, history: int = HISTORY) -> tuple[Windows, Windows, Windows]:
    return prepare(beside(kind), SPLIT, history, HORIZON, endogenous=0)[:3]


def by_six_hours(errors: torch.Tensor) -> list[float]:
    """Squared errors [window, 96] -> their mean in each six hours ahead."""
    return [round(value, 5) for value in errors.mean(0).unflatten(0, (-1, 6)).mean(1).tolist()]


# --- least squares ----------------------------------------------------------------------------------------------------


def ridge(kind: str, hour_of_week: bool = False, history: int = HISTORY) -> dict:
    """Least squares from all series of a window, and the hour of the week as 168 indicators or not."""
    rows, targets = [], []
    begins = (0, SPLIT[0] - history, SPLIT[0] + SPLIT[1] - history)
    for part, begin in zip(parts_of(kind, history), begins, strict=True):
        past, future = part[:]
        columns = [past.double().flatten(1), torch.ones(len(past), 1, dtype=torch.float64)]
        if hour_of_week:
            first = begin + history + torch.arange(len(past))  # row of the first hour to forecast
            columns.append(F.one_hot(first % 168, 168).double())
        rows.append(torch.cat(columns, dim=1))
        targets.append(future[..., 0].double())
    gram, right = rows[0].T @ rows[0], rows[0].T @ targets[0]
    best = None
    for penalty in (1, 10, 100, 1000, 10000):
        weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), right)
        errors = [(x @ weights - y).square() for x, y in zip(rows, targets, strict=True)]
        means = [error.mean().item() for error in errors]
        if best is None or means[1] < best["validation"]:
            best = dict(zip(("train", "validation", "test"), means, strict=True))
            best |= {"penalty": penalty, "test by six hours": by_six_hours(errors[2])}
    return best


# --- TimeXer ----------------------------------------------------------------------------------------------------------


class Alone(TimeXer):
    """TimeXer with one exogenous series that says nothing: a constant."""

    def forward(self, history):
        return super().forward(history, torch.zeros_like(history))


class Unreliable(TimeXer):
    """TimeXer whose neighbours, in training, miss a share of their values, another share in every window."""

    def forward(self, history):
        own, six, observed = history[..., :1], history[..., 1:], None
        if self.training:
            observed = torch.rand(six.shape) >= torch.rand(len(six), 1, 1)
            observed[:, -1, 0] = True  # each window needs a value
        return super().forward(own, six, observed)


def loss_of(reading: str, weight: float):
    """The documented loss with W_l read as each head's map, as the heads stacked into rows, or as projections."""

    def loss(output, target):
        if reading == "heads":  # [batch, head, 1, exogenous] -> [batch, 1, head, exogenous]
            output = output._replace(cross_attention=tuple(map.transpose(1, 2) for map in output.cross_attention))
        return documented_loss(output, target, orthogonality_weight=weight)

    return loss


def network(kind: str, seed: int, weight: float = 0.0, reading: str = "maps", variable_token: str = "series") -> dict:
    """One training: errors, and what the attention says."""
    train, validation, test = parts_of(kind)
    variables = train.values.shape[1]
    form = "projections" if reading == "projections" else "maps"
    torch.manual_seed(seed)
    make = {"alone": Alone, "unreliable": Unreliable}.get(kind, TimeXer)
    given = {"endogenous": 0, "variable_token": variable_token, "return_attention": True, "attention_form": form}
    model = make(HISTORY, HORIZON, 1 if make is Unreliable else variables, **given, **SETTINGS)
    training = fit(model, train, validation, loss_of(reading, weight), seed=seed, **HOW)
    past, future = test[:]
    model.attention_form = "maps"
    with torch.no_grad():
        output = model(past)
    row = {
        "validation": min(training.validation),
        "best epoch": training.best_epoch,
        **scores(output.prediction, future),
    }
    if kind != "alone":
        row |= attention(output.cross_attention[0][:, :, 0])
    if kind in ("six", "unreliable"):
        row |= influence(model, past, future)
    if kind in ("six", "unreliable") and weight == 0 and variable_token == "series":
        row |= incomplete(model, test)
    return row


def scores(prediction: torch.Tensor, future: torch.Tensor) -> dict:
    error = (prediction - future)[..., 0].double()
    test = {"mse": error.square().mean().item(), "mae": error.abs().mean().item()}
    return {"test": test, "test by six hours": by_six_hours(error.square())}


def attention(rows: torch.Tensor) -> dict:
    """What is to be said of the rows [window, head, exogenous]."""
    length = rows.square().sum(-1)  # ||w||^2
    stacked = rows.mT @ rows - torch.eye(rows.shape[-1])
    choice = F.one_hot(rows.mean(1).argmax(-1), rows.shape[-1]).double().mean(0)
    return {
        "mean row": rounded(rows.mean((0, 1))),
        "mean row of each head": [rounded(row) for row in rows.mean(0)],
        "largest entry": rows.amax(-1).mean().item(),
        "above the floor": (1 - length).square().mean().item(),
        "heads stacked": stacked.square().sum((-2, -1)).mean().item(),
        "share of windows in which it has most": rounded(choice),
    }


def rounded(values: torch.Tensor | list[float], digits: int = 4) -> list[float]:
    return [round(value, digits) for value in torch.as_tensor(values, dtype=torch.float64).tolist()]


def with_neighbours_beside(model: TimeXer) -> TimeXer:
    """The same weights, for neighbours given as `exogenous`: then they may be masked."""
    same = TimeXer(HISTORY, HORIZON, 1, endogenous=0, return_attention=True, **SETTINGS)
    same.load_state_dict(model.state_dict())
    return same.eval()


def influence(model: TimeXer, past: torch.Tensor, future: torch.Tensor) -> dict:
    """The test error of every fourth window where one neighbour's series come from other windows, or are masked."""
    past, future = past[::4], future[::4]
    generator = torch.Generator().manual_seed(0)
    shuffled, masked = [], []
    if model.learned_token is not None:
        return {}
    same = with_neighbours_beside(model)
    with torch.no_grad():
        for i in range(1, 7):
            other = past.clone()
            other[..., i] = past[torch.randperm(len(past), generator=generator), :, i]
            shuffled.append((model(other).prediction - future).square().mean().item())
            observed = torch.ones(len(past), HISTORY, 6, dtype=torch.bool)
            observed[..., i - 1] = False
            prediction = same(past[..., :1], past[..., 1:], observed).prediction
            masked.append((prediction - future).square().mean().item())
    with torch.no_grad():
        untouched = (model(past).prediction - future).square().mean().item()
    return {"untouched": round(untouched, 5), "one shuffled": rounded(shuffled, 5), "one masked": rounded(masked, 5)}


def incomplete(model: TimeXer, test: Windows) -> dict:
    """The test error of every fourth window, neighbours' values missing: at random, early ones, all of some."""
    generator = torch.Generator().manual_seed(0)
    same, (past, future) = with_neighbours_beside(model), test[::4]
    own, six = past[..., :1], past[..., 1:]

    def mse(exogenous, mask=None):
        with torch.no_grad():
            return round((same(own, exogenous, mask).prediction - future).square().mean().item(), 5)

    by_share, filled, by_length, by_count = {}, {}, {}, {}
    values = load_auckland().values[: SPLIT[0], 1:].double()
    zero = (-values.mean(0) / values.std(0, correction=0)).float()  # nobody, in z-scores
    for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95):
        observed = torch.rand(six.shape, generator=generator) >= share
        observed[:, -1, 0] = True
        by_share[f"{share:g}"] = mse(six, observed)
        filled[f"{share:g}"] = mse(torch.where(observed, six, zero))
    for hours in (96, 72, 48, 36, 24, 12, 6, 3):
        by_length[str(hours)] = mse(six[:, -hours:])
    for count in range(6):
        places = torch.rand(len(six), 6, generator=generator).argsort(1) >= count  # so many False a window
        by_count[str(count)] = mse(six, places[:, None].expand(six.shape))
    return {
        "share missing": by_share,
        "share filled with zero": filled,
        "hours seen of neighbours": by_length,
        "neighbours missing": by_count,
    }


def alike(seed: int) -> dict:
    """iTransformer: all seven series are forecast, and count alike in the loss; errors of the target."""
    train, validation, test, _ = prepare(beside("six"), SPLIT, HISTORY, HORIZON)
    torch.manual_seed(seed)
    sizes = {name: value for name, value in SETTINGS.items() if name != "patch_length"}
    model = ITransformer(HISTORY, HORIZON, **sizes)
    training = fit(model, train, validation, itransformer_loss, seed=seed, **HOW)
    past, future = test[:]
    with torch.no_grad():
        prediction = model(past).prediction
    return {"best epoch": training.best_epoch, **scores(prediction[..., :1], future[..., :1])}


def job(what: str, **given) -> dict:
    return {"ridge": ridge, "network": network, "alike": alike}[what](**given)


def jobs() -> dict[str, dict]:
    found = {}
    for kind in ("alone", "six", "noise", "waves", "both"):
        found[f"ridge, {kind}"] = {"what": "ridge", "kind": kind}
    for kind in ("alone", "six", "late 168", "late 672"):
        found[f"ridge, {kind}, hour of week"] = {"what": "ridge", "kind": kind, "hour_of_week": True}
    found["ridge, alone, 168 hours"] = {"what": "ridge", "kind": "alone", "history": 168}
    for hours in SHIFTS:
        found[f"ridge, late {hours}"] = {"what": "ridge", "kind": f"late {hours}"}
    for i in range(1, 7):
        for kind in (f"without {i}", f"only {i}"):
            found[f"ridge, {kind}"] = {"what": "ridge", "kind": kind}

    variants = [{"kind": kind} for kind in ("alone", "six", "waves", "late 672")]
    variants += [{"kind": "six", "weight": weight} for weight in (0.1, 1.0, 0.01)]
    variants += [{"kind": "late -24"}, {"kind": "unreliable"}]
    variants += [{"kind": "six", "weight": 0.1, "reading": "heads"}, {"kind": "noise"}]
    variants += [{"kind": "six", "weight": 0.001, "reading": "projections"}]
    variants += [{"kind": "both"}, {"kind": "six", "variable_token": "learned"}]
    for given in variants:
        name = ", ".join(f"{value:g}" if isinstance(value, float) else value for value in given.values())
        for seed in range(3):
            found[f"network, {name}, seed {seed}"] = {"what": "network", **given, "seed": seed}
    for seed in range(3):
        found[f"alike, seed {seed}"] = {"what": "alike", "seed": seed}
    return found


if __name__ == "__main__":
    rows = compute("timexer", job, jobs())
    print(round(sum(row["seconds"] for row in rows.values()) / 60, 1), "minutes of one core")

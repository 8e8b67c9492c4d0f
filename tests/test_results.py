"""mini_impl.results: the stored figures, read by name."""

import json
from pathlib import Path

import pytest

from mini_impl import results

STORED = Path(__file__).parents[1] / "book" / "results"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "etth1.json").write_text('{"mse": 0.375, "note": "预测"}', "utf-8")
    (tmp_path / "weights.json").write_text("{}", "utf-8")
    (tmp_path / "README.md").write_text("no result")
    monkeypatch.setattr(results, "_folder", lambda: tmp_path)
    return tmp_path


def test_names_and_content(folder):
    assert results.names() == ["etth1", "weights"]
    assert results.load("etth1") == {"mse": 0.375, "note": "预测"}


@pytest.mark.parametrize("name", ["ETTh1", "etth1.json", "../results/etth1", "", 3])
def test_an_unknown_name_says_what_there_is(folder, name):
    with pytest.raises(ValueError, match=r"the name of a result file must be one of 'etth1', 'weights'; got "):
        results.load(name)


def test_in_a_checkout_it_reads_the_files_of_the_book():
    assert results.names() == sorted(path.stem for path in STORED.glob("*.json"))
    for name in results.names():
        assert results.load(name) == json.loads((STORED / f"{name}.json").read_text("utf-8"))

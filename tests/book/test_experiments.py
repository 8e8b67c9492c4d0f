"""What the fine-tuning experiments of book/experiments share, and that the stored rows are those of their tables."""

import importlib.util
import json
import sys

import pytest
from books import ROOT

EXPERIMENTS = ROOT / "book" / "experiments"


def script(name, monkeypatch):
    """A script of book/experiments as a module."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared(monkeypatch):
    """The module that the scripts share, with trainings of four updates."""
    module = script("_finetuning", monkeypatch)
    monkeypatch.setattr(module, "UPDATES", 10)
    return module


def test_validation_problems_are_never_trained_on_and_leave_the_held_out_ones_alone(shared):
    _, task = shared.sums()
    tuned, whole = shared.with_validation(task)
    for kind, problems in task.train.items():
        assert sorted(tuned.train[kind] + tuned.held_out[kind]) == sorted(problems)
        assert 0.08 < len(tuned.held_out[kind]) / len(problems) < 0.12
        turned = {(p.b, p.a) for p in tuned.held_out[kind]}
        assert turned == {(p.a, p.b) for p in tuned.held_out[kind]}
    assert whole.held_out == task.held_out


@pytest.mark.parametrize(
    ("way", "settings", "answers"),
    [
        ("sft, documented", {"sequences": 8}, 0),
        ("sft, kept", {"sequences": 8, "replay": 4, "kl_weight": 0.5}, 0),
        ("grpo, published", {"prompts": 2}, 5 * 2 * 8),
        ("grpo, overlong", {"prompts": 2, "kl_weight": 0.0}, 5 * 2 * 8),
        ("dapo, budgeted", {"prompts": 2, "rounds": 2, "answers": 48}, 48),
    ],
)
def test_a_training_makes_the_updates_and_samples_the_answers_that_it_says(shared, way, settings, answers):
    row = shared.train(way, 1e-3, 1, settings)
    assert list(row["curve"]) == ["0", "2", "4", "6", "8", "10"]
    assert row["answers"] == pytest.approx(answers, abs=16 if "budgeted" in way else 0)
    assert set(row["kinds"]) and all(0 <= share <= 1 for share in (*row["kinds"].values(), *row["test"]))
    assert row["trained"] == 74_880


def test_the_best_on_validation_is_run_with_the_seeds_that_nobody_tuned_on(shared):
    grid = [
        {"arguments": shared.job("a", 0, rate), "validation": scores}
        for rate, scores in ((1, [0.9, 0.0]), (2, [0.8, 0.8]))
    ]
    for by, rate in ((shared.BY_BAD_CASES, 1), (shared.BY_BOTH, 2)):
        assert shared.seeds_of_best(grid, by) == [shared.job("a", seed, rate) for seed in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("name", "table"),
    [("finetuning", ("BAD_ONLY", "CURES")), ("sft", "WHERE"), ("dapo", "PARTS"), ("grpo", "REDUCTIONS")],
)
def test_the_stored_rows_are_those_of_the_table(name, table, monkeypatch):
    module = script(name, monkeypatch)
    common = sys.modules["_finetuning"]
    rows = json.loads((ROOT / "book" / "results" / f"{name}.json").read_text("utf-8"))["rows"]
    names = [way for one in ([table] if isinstance(table, str) else table) for way in getattr(module, one)]
    used = set()
    for way in names:
        grid = [common.key(one) for one in module.grid(way)]
        assert rows.keys() >= set(grid) and len(grid) <= 12
        used |= set(grid)
        reported = [
            {common.key(one) for one in common.seeds_of_best([rows[one] for one in grid], by)}
            for by in (common.BY_BAD_CASES, common.BY_BOTH)
        ]
        assert any(seeds <= rows.keys() for seeds in reported), way
        used |= reported[0] | reported[1]
    if name == "finetuning":
        used |= {common.key(one) for one in module.unlimited()}
        used |= {key for key in rows if "looks=20" in key}
    assert used >= rows.keys()

"""book/experiments/reproduce.py on small tables: it goes on after a stop, keeps what is finished, names what fails."""

import importlib.util
import inspect
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from books import ROOT

from mini_impl import cli
from mini_impl.finetuning.methods import METHODS
from mini_impl.forecasting import FORECASTERS, loss_of
from mini_impl.settings import choose_settings

SCRIPT = ROOT / "book" / "experiments" / "reproduce.py"


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """The script as a module, its files in a folder of this test."""
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STATE", tmp_path / "state")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    yield module
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("a,b\n" + "".join(f"{step % 24},{step % 7 + step % 24}\n" for step in range(400)))
    return path


def command(csv, *more, model="dlinear", epochs=1, loss="published"):
    size = f"--csv {csv} --history 30 --horizon 6 --epochs {epochs} --patience {epochs} --loss {loss}"
    return ("forecast", model, *size.split(), *map(str, more))


def results(folder):
    """The result files, without the seconds."""

    def timeless(value):
        if isinstance(value, dict):
            return {name: timeless(part) for name, part in value.items() if name != "seconds"}
        return list(map(timeless, value)) if isinstance(value, list) else value

    return {file.name: timeless(json.loads(file.read_text())) for file in sorted((folder / "results").iterdir())}


def in_a_process(reproduce, words):
    """The script as it is now, in a process of its own, which writes its words to a file."""

    def main():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # started in the background it is ignored
        with words.open("w") as sys.stderr:
            status = reproduce.main([])
        sys.exit(status)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


# ---- the tables


def test_every_command_of_the_table_is_one_that_the_program_takes(reproduce):
    runs = reproduce.all_runs()
    assert len({reproduce.state(run, "json") for run in runs}) == len(runs)
    for run in runs:
        options = reproduce.options(run)
        assert run.seconds > 0
        if run.arguments[0] == "finetune":
            assert options.method == run.model and (options.model == "smollm2") == (run.part == "smollm2")
            make_method = METHODS[options.method, options.loss]
            assert choose_settings("--set", options.set, make_method)
            continue
        assert options.model == run.model
        assert (options.ett, options.history, options.horizon) == ("ETTh1" if run.part == "etth1" else None, 96, 96)


def test_curves_are_kept_in_ten_parts(reproduce):
    result = {"versions": {}, "seconds": 1.0, "curves": {"long": list(range(20)), "short": [1, 2]}}
    expected = {"long": [0.5 + 2 * i for i in range(10)], "short": [1.0, 2.0]}
    assert reproduce.tuned(result) == {"seconds": 1.0, "curves": expected}


def test_the_protocol_of_the_terms(reproduce):
    """A grid around the default, with 0; the published loss too; three seeds; nothing else differs within a model."""
    for model, terms in reproduce.TERMS.items():
        default = inspect.signature(loss_of(FORECASTERS[model], "documented")).parameters[terms.weight].default
        assert terms.grid == pytest.approx((0, default / 10, default, 10 * default))
        options = [reproduce.options(run) for run in reproduce.all_runs() if (run.part, run.model) == ("terms", model)]
        weights = {dict(one.weight).get(terms.weight) if one.loss == "documented" else None for one in options}
        assert 0 in weights and None in weights and len(weights) == 5
        assert len(options) == 15 and {one.seed for one in options} == {0, 1, 2}
        for one in options:
            del one.seed, one.weight, one.loss
        assert all(one == options[0] for one in options)


def test_the_stored_figures_are_of_the_commands_in_the_table(reproduce):
    for part in ("etth1", "terms"):
        file = ROOT / "book" / "results" / f"{part}.json"
        if not file.exists():
            pytest.skip(f"there is no {file.name} yet")
        stored = json.loads(file.read_text("utf-8"))
        for run in (run for run in reproduce.all_runs() if run.part == part):
            found = [stored[run.model]] if part == "etth1" else stored[run.model][run.label]
            assert ["mini-impl", *run.arguments] in [one["command"] for one in found]


# ---- running them


@pytest.fixture
def table(reproduce, csv, monkeypatch):
    """One run for etth1, two with labels of their own for terms."""
    runs = [reproduce.Run("etth1", "dlinear", "published", command(csv), 1.0)]
    for label, loss in {"documented, weight 2": "documented --weight trend_weight=2", "published": "published"}.items():
        runs.append(reproduce.Run("terms", "dlinear", label, command(csv, "--seed", 1, loss=loss), 2.0))
    monkeypatch.setattr(reproduce, "all_runs", lambda: runs)
    monkeypatch.setitem(reproduce.TERMS, "dlinear", reproduce.Terms("trend_weight", (2,), "", 1.0))
    return runs


def test_it_writes_both_files_and_runs_nothing_twice(reproduce, table, tmp_path, monkeypatch, capsys):
    assert reproduce.main(["--jobs", "3"]) == 0
    written = results(tmp_path)
    etth1, terms = written["etth1.json"], written["terms.json"]
    assert list(etth1) == ["dlinear"] and etth1["dlinear"]["command"] == ["mini-impl", *table[0].arguments]
    assert etth1["dlinear"]["versions"] == reproduce.VERSIONS and etth1["dlinear"]["settings"]["seed"] == 0
    assert 0 < etth1["dlinear"]["test"]["dlinear"]["mse"] < 2
    assert terms["versions"] == reproduce.VERSIONS and terms["command"].endswith("reproduce.py --only terms")
    assert list(terms["dlinear"]) == ["documented, weight 2", "published"]
    one = terms["dlinear"]["documented, weight 2"][0]
    assert set(one) == {"command", "seed", "weight", "validation", "test"} and one["weight"] == 2
    assert terms["dlinear"]["published"][0]["weight"] is None and len(one["validation"]["mse of each epoch"]) == 1
    common = terms["models"]["dlinear"]
    assert set(common["naive"]) == {"last value", "last 24 steps again"} and common["parameters"] == 2 * 31 * 6
    assert common["settings"]["epochs"] == 1 and "loss" not in common["settings"]
    assert "seconds" in (tmp_path / "results" / "etth1.json").read_text()
    assert capsys.readouterr().out.count("test MSE") == 3

    monkeypatch.setattr(reproduce, "start", None)  # any run would fail
    files = {file: file.read_bytes() for file in (tmp_path / "results").iterdir()}
    assert reproduce.main([]) == 0
    assert {file: file.read_bytes() for file in (tmp_path / "results").iterdir()} == files
    assert sorted(file.suffix for file in (tmp_path / "state").iterdir()) == [".json"] * 3
    with pytest.raises(TypeError, match="not callable"):
        reproduce.main(["--fresh"])
    assert not list((tmp_path / "state").glob("*.json"))


@pytest.mark.parametrize("same", [True, False], ids=["same versions", "other versions"])
def test_versions_are_not_mixed_under_one_name(reproduce, table, same):
    old = {"versions": dict(reproduce.VERSIONS) if same else {"torch": "1"}, "models": {"timexer": 1}, "timexer": 2}
    content = reproduce.short_results(["dlinear", "timexer"], {}, old)
    assert ("timexer" in content) == same and content["versions"] == reproduce.VERSIONS


def test_a_failing_run_is_named_the_others_go_on_and_the_file_keeps_the_rest(reproduce, table, tmp_path, capsys):
    bad = reproduce.Run("etth1", "timexer", "published", command("none.csv", model="timexer"), 5.0)
    table.append(bad)
    file = tmp_path / "results" / "etth1.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"timexer": "earlier", "dlinear": "old", "gone": "unknown"}))
    assert reproduce.main(["--only", "etth1:dlinear", "etth1:timexer"]) == 1
    said = capsys.readouterr().err
    assert (
        f"mini-impl {' '.join(bad.arguments)}\n  failed: mini-impl: [Errno 2] No such file" in said
        and "none.csv" in said
    )
    written = results(tmp_path)
    assert list(written) == ["etth1.json"] and list(written["etth1.json"]) == ["dlinear", "timexer"]
    assert written["etth1.json"]["timexer"] == "earlier"
    assert written["etth1.json"]["dlinear"]["command"] == ["mini-impl", *table[0].arguments]


def test_a_run_that_says_nothing_is_named_with_its_status(reproduce, table, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "PROGRAM", (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert reproduce.main(["--only", "etth1"]) == 1
    assert capsys.readouterr().err.count("failed: it ended with status -9") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "etth2"], "there is no etth2; there are etth1, etth1:dlinear"),
        (["--jobs", "0"], "at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(reproduce, capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def until(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)


def child(process):
    """The id of a process's one child."""
    stats = [stat.read_text().rpartition(")") for stat in Path("/proc").glob("[0-9]*/stat")]
    (found,) = (int(head.split()[0]) for head, _, tail in stats if int(tail.split()[1]) == process.pid)
    return found


def is_alive(process):
    """Whether there is such a process, and it is not one that has ended and waits to be asked for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_stopped_or_killed_it_goes_on_and_ends_in_the_same_bytes(reproduce, csv, tmp_path, monkeypatch):
    table = [reproduce.Run("etth1", "dlinear", "published", command(csv, epochs=150), 10.0)]  # about 2 seconds
    monkeypatch.setattr(reproduce, "all_runs", lambda: table)
    (tmp_path / "results").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cli.main([*table[0].arguments, "--json", str(tmp_path / "results" / "whole.json")])
    torch.set_num_threads(threads)
    whole = results(tmp_path)["whole.json"]
    checkpoint = reproduce.state(table[0], "checkpoint")

    run = in_a_process(reproduce, tmp_path / "words")
    until(checkpoint.exists, run)
    training = child(run)
    os.kill(run.pid, signal.SIGINT)  # 1. Ctrl-C
    run.join()
    assert run.exitcode == 130
    said = (tmp_path / "words").read_text()
    assert said.strip().endswith("Stopped: 0 of 1 runs are finished, the same command goes on.")
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)

    changed = checkpoint.stat().st_mtime_ns
    run = in_a_process(reproduce, tmp_path / "words")
    until(lambda: checkpoint.stat().st_mtime_ns != changed, run)
    training = child(run)
    os.kill(run.pid, signal.SIGKILL)  # 2. it is killed, and its training ends with it
    run.join()
    deadline = time.monotonic() + 60
    while is_alive(training):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert checkpoint.exists() and reproduce.main([]) == 0
    assert results(tmp_path)["etth1.json"] == {"dlinear": whole}
    assert [file.suffix for file in reproduce.STATE.iterdir()] == [".json"]

"""`make gpu` without a GPU: each of its parts on the CPU, in small; what it writes; what keeps a card from passing."""

import json
import os
import re
import sys
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import conftest  # has Triton interpret where there is no GPU; so before what imports Triton

# isort: split

import mini_impl
from bench import gpu, gpu_times
from mini_impl import kernels, results

ROOT = Path(__file__).parents[1]
TINY = {"sequences": 2, "tokens": 5, "layers": 1, "vocab_size": 50, "width": 12, "heads": 2, "key_value_heads": 1}
SIZES = {"decomposition": (1, 25, 2), "logprob": (3, 10), "clipped_loss": (3, 4)}
GOOD = {"kernel": "logprob", "size": [3, 10], "dtype": "float32", "error": {"kernel": 1e-7}}
GOOD |= {"milliseconds": {"kernel": 1.0}, "left out": {}}
CARD = SimpleNamespace(name="A card", total_memory=16 * 2**30, major=7, minor=5)


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """One short turn each, and torch.compile that finds the graphs, but leaves their operations as they are."""
    monkeypatch.setattr(gpu_times, "TURNS", 1)
    monkeypatch.setattr(gpu_times, "LASTS", 0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


@pytest.fixture
def result(monkeypatch, tmp_path) -> Path:
    """Where the result file goes."""
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
    return tmp_path / "gpu.json"


@pytest.fixture
def here(monkeypatch):
    """Parts that run in this process."""
    monkeypatch.setattr("bench.measuring.apart", lambda work, *arguments: work(*arguments))


# --- without a card ---------------------------------------------------------------------------------------------------


def test_without_a_card_it_is_one_sentence(monkeypatch, capsys, result):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == gpu.main(["--quick"]) == 0
    assert capsys.readouterr().out == 2 * (gpu.NO_GPU + "\n") and not result.exists()


# --- its parts --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_kernel_is_compared_with_torch(monkeypatch, name):
    if find_spec("triton") is None or conftest.ON_GPU:
        pytest.skip("it needs Triton's interpreter")
    if name == "decomposition":  # the interpreter takes a second for each
        monkeypatch.setattr(gpu_times, "DTYPES", {"float32": torch.float32})
    rows = gpu_times.kernels("cpu", {name: [SIZES[name]]})
    assert [row["dtype"] for row in rows] == list(gpu_times.DTYPES)
    ways = {"kernel", "torch", "compiled"} | ({"Liger"} if name == "logprob" and find_spec("liger_kernel") else set())
    for row in rows:
        assert (row["kernel"], row["size"], row["left out"]) == (name, list(SIZES[name]), {})
        assert set(row["error"]) == set(row["milliseconds"]) == ways and min(row["milliseconds"].values()) > 0
        assert 0 < max(row["error"].values()) < gpu.MOST[row["dtype"]]
        assert row["bytes"] > 0
    assert gpu.fault("kernels", rows) == ""


def test_a_kernel_that_is_wrong_is_noticed(monkeypatch):
    """In its gradient alone, at one place."""
    plain = gpu_times.logprob.token_logprobs_torch

    def wrong(logits, tokens):
        return plain(logits, tokens) + 1e-3 * (logits[-1, 0] - logits[-1, 0].detach())

    monkeypatch.setattr(gpu_times, "wanted", lambda *_: True)
    monkeypatch.setattr(gpu_times.logprob, "token_logprobs", wrong)
    rows = gpu_times.kernels("cpu", {"logprob": [(70, 10)]})
    assert rows[0]["error"]["torch"] < 1e-6 < 1e-5 < rows[0]["error"]["kernel"]
    assert gpu.fault("kernels", rows).startswith("logprob [70, 10] float32: error ")


def test_where_no_kernel_runs_that_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="no kernel runs on cpu"):
        gpu_times.kernels("cpu", {})


def test_a_size_for_which_there_is_no_memory_is_left_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(gpu_times, "case", full)
    row = gpu_times.beside_torch("logprob", (3, 10), "float32", "cpu")
    assert row["left out"] == {"kernel": "OutOfMemoryError: no memory"} and row["milliseconds"] == {}
    assert gpu.fault("kernels", [row, GOOD]) == "" and gpu.fault("kernels", [row]) == "nothing ran"


@pytest.mark.slow
def test_steps_are_timed_in_every_mode_and_beside_peers():
    rows = gpu_times.steps("cpu", models=("dlinear",), feed_forward_width=8, **TINY)
    modes = ["float32", "bf16", "compiled, float32", "compiled, bf16"]
    assert list(rows[0]["milliseconds"]) == modes and rows[0]["left out"] == {}
    if find_spec("neuralforecast"):
        assert list(rows[1]["milliseconds"]) == ["ours", "neuralforecast"] and rows[1]["difference"] < 1e-5
    language = rows[-1]
    sides = ["ours", "transformers"] if find_spec("transformers") else ["ours"]
    assert set(language["milliseconds"]) == {f"{side}, {mode}" for side in sides for mode in modes}
    assert len(sides) == 1 or language["difference"] < 1e-4
    assert len(rows) == 2 + bool(find_spec("neuralforecast")) and gpu.fault("steps", rows) == ""


def test_growth_has_a_row_for_each_place():
    rows = gpu_times.growth("cpu", models=("dlinear",), places=[(96, 2), (120, 1)])
    assert [(row["look-back"], row["variables"]) for row in rows] == [(96, 2), (120, 1)]
    assert all(row["milliseconds"]["ours"] > 0 and row["model"] == "dlinear" for row in rows)
    assert gpu.fault("growth", rows) == ""


def test_what_fails_is_named_and_the_others_are_timed():
    found = gpu_times.compare({"ours": lambda: None, "Liger": lambda: 1 / 0}, "cpu")
    assert list(found["milliseconds"]) == ["ours"]
    assert found["left out"] == {"Liger": "ZeroDivisionError: division by zero"}


def test_on_a_gpu_its_own_clock_counts(monkeypatch):
    """It is read when the last run has ended, and both of its marks are in the queue around the runs."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append("mark")

        def synchronize(self):
            queue.append("wait")

        def elapsed_time(self, end):
            assert queue == ["wait for all", "mark", "run", "run", "run", "mark", "wait"]
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("wait for all"))
    assert gpu_times.stopwatch(lambda: queue.append("run"), 3, "cuda") == 2.0


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("kernels", {"error": {"kernel": float("nan")}}, "logprob [3, 10] float32: error nan"),
        ("kernels", {"error": {"kernel": 1.1e-5}}, "logprob [3, 10] float32: error 1.1e-05"),
        ("kernels", {"dtype": "bf16", "error": {"kernel": 1.1e-5}}, ""),
        ("kernels", {"left out": {"Liger": "RuntimeError: x", "compiled": "RuntimeError: y"}}, ""),
        ("kernels", {"left out": {"kernel": "RuntimeError: x"}}, "logprob [3, 10] float32: kernel: RuntimeError: x"),
        ("steps", {"left out": {"transformers, bf16": "RuntimeError: x", "neuralforecast": "RuntimeError: y"}}, ""),
        ("steps", {"left out": {"compiled, bf16": "RuntimeError: x"}}, "logprob [3, 10] float32: compiled, bf16: "),
        ("steps", {"difference": 0.02}, "logprob [3, 10] float32: 0.02 from its peer"),
        ("steps", {"difference": float("nan")}, "logprob [3, 10] float32: nan from its peer"),
        ("growth", {"left out": {"ours": "OutOfMemoryError: x"}}, ""),
        ("growth", {"milliseconds": {}}, "nothing ran"),
    ],
)
def test_what_keeps_a_card_from_passing(name, row, says):
    got = gpu.fault(name, [{**GOOD, **row}])
    assert got.startswith(says) and bool(got) == bool(says)


# --- tests in a process of their own ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_tests_are_counted_without_the_interpreter(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os, pytest\n"
        "def test_right(): assert 'TRITON_INTERPRET' not in os.environ and os.environ['GIVEN'] == '1'\n"
        "def test_wrong(): assert False\n"
        "def test_broken(missing): pass\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    got = gpu.counts(str(file), GIVEN="1")
    which = got.pop("which")  # with the folders on the way from where pytest runs
    assert [name.split(".")[-2:] for name in which] == [["test_some", "test_wrong"], ["test_some", "test_broken"]]
    assert got == {"passed": 1, "failed": 2, "skipped": 1}
    assert gpu.fault("tests", {"some": got | {"which": which}}).startswith(f"some: {which!r}"[:-1])
    with pytest.raises(RuntimeError, match="pytest ended with 5"):
        gpu.counts(str(file), "-k", "none")


@pytest.mark.slow
def test_tests_of_a_device_are_found_by_its_name():
    got = gpu.counts("tests/finetuning/test_head.py", "-k", "cpu")
    assert got["passed"] >= 1 and not got["failed"] and gpu.fault("tests", {"some": got}) == ""


def test_every_test_with_a_device_is_among_them():
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    asks = [path for path in files if re.search(r"def test_\w+\([^)]*\b(device|kernels)\b", path.read_text("utf-8"))]
    folders = [ROOT / name for name in gpu.OF_KERNELS + gpu.OF_PAGES + gpu.OF_MODELS]
    assert len(asks) > 10 and all(folder.exists() for folder in folders)
    assert [path for path in asks if not any(path.is_relative_to(folder) for folder in folders)] == []


# --- all of it --------------------------------------------------------------------------------------------------------


def test_a_part_that_fails_keeps_no_other_from_running(here, capsys):
    chosen = {"kernels": lambda: 1 / 0, "tests": lambda: {"some": {"passed": 0, "failed": 0, "which": []}}}
    found = gpu.run({**chosen, "growth": lambda: [GOOD]})
    assert found["failed"] == {"kernels": "ZeroDivisionError: division by zero", "tests": "some: no test ran"}
    assert found["passed"] is False and found["growth"] == [GOOD] and "kernels" not in found
    assert gpu.run({"growth": lambda: [GOOD]}) == {"passed": True, "failed": {}, "growth": [GOOD]}
    assert "ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_whose_process_dies_has_failed():
    found = gpu.run({"kernels": partial(os._exit, 3)})
    assert not found["passed"] and found["failed"]["kernels"].startswith("BrokenProcessPool")


def test_other_cards_stay(result):
    gpu.keep("One", {"passed": True})
    gpu.keep("Another", {"passed": False})
    gpu.keep("One", {"passed": True, "date": "today"})
    written = json.loads(result.read_text("utf-8"))
    assert written["cards"] == {"One": {"passed": True, "date": "today"}, "Another": {"passed": False}}
    assert written["command"] == "python -m bench.gpu" and written["versions"]["torch"] == gpu.version("torch")


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("good", [True, False])
def test_a_run_is_written_and_its_status_says_whether_it_passed(monkeypatch, capsys, here, result, quick, good):
    parts = {"kernels": lambda: [GOOD if good else {**GOOD, "error": {"kernel": 1.0}}]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: CARD)
    monkeypatch.setattr(gpu, "parts", lambda quick: parts)
    assert gpu.main(["--quick"] * quick) == (not good)
    found = json.loads(result.read_text("utf-8"))["cards"]["A card"]
    assert found["passed"] is good and bool(found["failed"]) is not good and found["kernels"][0]["kernel"] == "logprob"
    assert (found["quick"], found["memory GiB"], found["compute capability"]) == (quick, 16.0, "7.5")
    assert {"torch", "triton", "date"} <= set(found)
    out = capsys.readouterr().out
    assert f"A card: {'passed' if good else 'not passed'}" in out and "logprob [3, 10] float32" in out


def test_a_quick_run_leaves_out_pages_and_growth():
    assert set(gpu.parts(False)) == {"tests", "kernels", "steps", "growth", "notebooks"}
    assert set(gpu.parts(True)) == {"tests", "kernels", "steps"}


# --- the page that calls it -------------------------------------------------------------------------------------------

ROW = {**GOOD, "milliseconds": {"kernel": 1.0, "torch": 2.5}, "bytes": 1}
STEP = {"model": "language model", "milliseconds": {"ours, compiled, bf16": 3.0}, "left out": {}}
FOUND = {"passed": True, "failed": {}, "kernels": [ROW], "steps": [STEP]}


def page(language: str) -> dict:
    """What the code cells of the page leave behind."""
    notebook = json.loads((ROOT / "book" / language / "verify_on_gpu.ipynb").read_text("utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_shows_what_is_stored(monkeypatch, capsys, language):
    monkeypatch.setattr(kernels, "card", lambda: None)
    monkeypatch.setattr(results, "names", lambda: ["gpu"])
    monkeypatch.setattr(results, "load", lambda name: {"cards": {"A card": FOUND, "Another": {"passed": False}}})
    shown = page(language)
    first = shown["kernel_rows"][0]
    assert first[0] == "A card" and first[2:] == ["3 × 10", "float32", "1e-07", "1", "2.5", None, None, "2.50"]
    assert shown["step_rows"][0][2:] == [{"en": "ours, compiled, bf16", "zh": "本书，编译，bf16"}[language], "3"]
    said = capsys.readouterr().out
    assert all(words in said for words in {"en": ["A card: passed", "Another: not"], "zh": ["Another: 未"]}[language])


@pytest.fixture
def elsewhere(monkeypatch, tmp_path) -> Path:
    """A Colab with a card, on which mini_impl is installed and the book is not; the folder in which one is."""
    monkeypatch.setenv("COLAB_RELEASE_TAG", "1")
    monkeypatch.setattr(kernels, "card", lambda: "A card")
    monkeypatch.setattr(mini_impl, "__file__", str(tmp_path / "site-packages" / "mini_impl" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_on_colab_the_page_fetches_the_book_and_runs(monkeypatch, elsewhere):
    commands, copy = [], elsewhere / "mini_impl_book"
    origin = {"url": "https://example.org/book", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    installed = SimpleNamespace(read_text=lambda name: json.dumps(origin) if name == "direct_url.json" else None)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: installed)

    @contextmanager
    def started(command, cwd, **how):
        commands.append(command[2:])
        if command[2:] == ["bench.gpu"]:
            file = cwd / "book" / "results" / "gpu.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"cards": {"A card": FOUND, "Another": {"passed": False}}}))
        yield SimpleNamespace(stdout=["a line\n"])

    downloaded = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    monkeypatch.setattr("subprocess.Popen", started)
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=SimpleNamespace(download=downloaded.append)))
    shown = page("en")
    assert commands[0] == ["git", "clone", "--quiet", origin["url"], copy]
    assert commands[1] == ["git", "-C", copy, "checkout", "--quiet", "abc"]
    assert commands[2][:2] == ["pip", "install"] and commands[3] == ["bench.gpu"] and len(commands) == 4
    assert list(shown["cards"]) == ["A card"] and len(shown["kernel_rows"]) == 1
    assert downloaded == [str(copy / "book" / "results" / "gpu.json")]


def test_what_was_not_installed_from_a_repository_cannot_fetch_it(monkeypatch, elsewhere):
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=lambda name: None))
    with pytest.raises(RuntimeError, match="not installed from the book's repository"):
        page("en")

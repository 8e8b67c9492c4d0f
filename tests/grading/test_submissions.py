"""Right, half-right, broken and cheating submissions of an assignment get the score that they deserve."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book" / "grading"), str(ROOT / "book" / "tools")]

import assignments  # noqa: E402
import grader  # noqa: E402
from sandbox import Limits, Sandbox  # noqa: E402
from stripped import strip  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="the grader needs pipes of Unix")]

WORKERS = 2
ZEROS = """
def decompose(series, kernel_size):
    return ZERO(series), ZERO(series)
def documented_loss(prediction, trend, target, trend_weight):
    return ZERO(prediction.sum()), ZERO(trend.sum())
def gradients(prediction, trend, target, trend_weight):
    return ZERO(prediction), ZERO(trend)
def train(trend, seasonal, target, trend_weight, steps, rate):
    zero = ZERO(target[0, :, :1] @ trend[0, :, :1].T)
    return zero, zero
answer_1 = answer_2 = 0.0
"""
NOTHING = "import torch" + ZEROS.replace("ZERO", "torch.zeros_like")  # of the right shapes, all wrong
CONSTANT = "answer_1, answer_2 = 2.858, 168.0"
BY_PART = {"1": 30, "2": 30, "3": 12, "4": 16, "5": 12}


def right() -> dict[str, str]:
    """The cells that the solution writes, by the name of what they define."""
    cells = [cell.source for cell in assignments.code_cells(assignments.Assignment("dlinear").cells) if solves(cell)]
    decompose, loss, gradients, train, experiment, answers = cells
    return {
        "decompose": decompose,
        "documented_loss": loss,
        "gradients": gradients,
        "train": train,
        "answers": CONSTANT,
    }


def solves(cell) -> bool:
    return assignments.tagged(cell, "solution")


def but(before: str = "", after: str = "", **changed: str) -> list[str]:
    """The cells of a right submission, some of them changed, without its checks and its experiment."""
    return ["import torch", before, *(right() | changed).values(), after]


def whole(solved: bool) -> list[str]:
    notebook = assignments.Assignment("dlinear").notebook("zh", solved, "")
    return [cell.source for cell in assignments.code_cells(notebook.cells)]


def fails(body: str) -> list[str]:
    """A submission whose every function does this."""
    return [f"import os, sys, time, torch\ndef {name}(*inputs):\n    {body}" for name in list(right())[:4]]


# Each with its score.
SUBMISSIONS: dict[str, tuple[list[str], float]] = {
    "right": (whole(solved=True), 100),
    "right_alone": (but(), 100),
    "empty": (whole(solved=False), 0),
    "no_cells": ([], 0),
    "zeros": ([NOTHING], 0),
    # -- half right
    "zeros_outside": (  # the edges, and whatever has edges
        but(
            decompose="import torch.nn.functional as F\ndef decompose(series, kernel_size):\n    trend = F.avg_pool1d("
            "series.mT, kernel_size, 1, kernel_size // 2).mT\n    return trend, series - trend"
        ),
        100 - 10 - 6 - 4,
    ),
    "no_half": (
        but(documented_loss=right()["documented_loss"].replace("(2 * windows)", "windows")),
        100 - 30,
    ),
    "mean": (
        but(documented_loss=right()["documented_loss"].replace(".sum() / (2 * windows)", ".mean()")),
        100 - 30,
    ),
    "weight_forgotten": (
        but(documented_loss=right()["documented_loss"].replace("trend_weight * ", "")),
        100 - 8 - 4 - 10,
    ),
    "sign": (but(gradients=right()["gradients"].replace("(prediction - target)", "(target - prediction)")), 100 - 6 - 16),
    "transposed": (but(train=right()["train"].replace("return W_t, W_s", "return W_t.mT, W_s.mT")), 100 - 16),
    "float32": (but(decompose=right()["decompose"].replace("series[:, :1]", "series.float()[:, :1]")), 100),
    "detached": (but(documented_loss=right()["documented_loss"].replace(".sum()", ".sum().detach()")), 100 - 10),
    # -- broken
    "crashing_cell": (but(before="1 / 0", after="raise SystemExit"), 100),
    "crashing": (fails("raise ValueError(inputs)"), 0),
    "leaving": (fails("sys.exit(0)"), 0),
    "no_python": (["def decompose(:", *but()], 100),
    "installing": (["%pip install something\n!rm -rf something", *but()], 100),
    # -- builtins and torch replaced
    "builtins_replaced": (
        [
            "import builtins, math\nfor name in ('abs', 'all', 'max', 'isinstance', 'round', 'sum'):\n"
            "    setattr(builtins, name, lambda *x, **y: True)",
            NOTHING,
        ],
        0,
    ),
    "torch_replaced": (
        [
            "import torch, numpy\nfor place in (torch, numpy, torch.testing, numpy.testing):\n"
            "    for name in ('allclose', 'equal', 'isclose', 'assert_close', 'assert_allclose', 'array_equal'):\n"
            "        setattr(place, name, lambda *x, **y: True)",
            NOTHING,
        ],
        0,
    ),
    "gradient_replaced": (
        but(
            before="torch.autograd.grad = lambda total, by, **more: [torch.ones_like(x) for x in by]",
            documented_loss=right()["documented_loss"].replace(".sum()", ".sum().detach().requires_grad_()"),
        ),
        100 - 10,  # ones are the gradients of trend + season, which sum to the series
    ),
    "gradient_faked": (
        but(
            documented_loss=right()["documented_loss"].replace(
                "return forecast_term, trend_term",
                "return forecast_term.detach() + 0 * prediction.sum(), trend_term.detach() + 0 * trend.sum()",
            )
        ),
        100 - 10,
    ),
    # -- objects that equal everything
    "equals_everything": (
        ["class Same(float):\n    __eq__ = __ge__ = __le__ = lambda *x: True\n    __hash__ = float.__hash__"]
        + fails("return Same(), Same()")
        + ["answer_1 = answer_2 = Same()"],
        0,
    ),
    "equal_tensors": (
        [
            "import torch\nclass Same(torch.Tensor):\n    @classmethod\n    def __torch_function__(cls, f, kinds, x=(), y=None):\n"
            "        return True if 'eq' in f.__name__ else super().__torch_function__(f, kinds, x, y or {})",
            NOTHING.replace("torch.zeros_like(", "Same.same("),
            "Same.same = staticmethod(lambda x: torch.zeros_like(x).as_subclass(Same))",
        ],
        0,
    ),
    "objects": (
        ["import numpy", *fails("return numpy.array([object()]), numpy.array(['a'])"), "answer_1 = answer_2 = object()"],
        0,
    ),
    # -- looking for the answers
    "frames": (
        [
            NOTHING,
            "import gc, sys, types\ndef thief(*inputs):\n    frame = sys._getframe()\n    while frame:\n"
            "        for name, value in {**frame.f_globals, **frame.f_locals}.items():\n"
            "            if name in ('wanted', 'expected', 'split', 'terms'):\n"
            "                return value(*inputs) if callable(value) else value\n        frame = frame.f_back\n"
            "    for value in gc.get_objects():\n        if isinstance(value, types.FunctionType) and value.__name__ in ('split', 'by_hand', 'descend'):\n"
            "            return value(*inputs)\ndecompose = documented_loss = gradients = train = thief",
        ],
        0,
    ),
    "imported": (
        [
            "from mini_impl.forecasting.dlinear import decompose, documented_loss",
            "import mini_impl\ndecompose = mini_impl.forecasting.dlinear.decompose",
            "from mini_impl.forecasting.layers import moving_average\n"
            "def decompose(x, k):\n    t = moving_average(x, k)\n    return t, x - t",
            "from mini_impl.kernels.decomposition import decompose_torch as decompose",
        ],
        0,
    ),
    "printed": (
        [
            "print(4, 3, 5, 6, 0.25, 0.5)",
            "import torch\ndef decompose(series, kernel_size):\n    print('4 3 5 6')\n"
            "    t = torch.tensor([4.0, 3, 5, 6]).view(1, 4, 1)\n    return t, torch.tensor([3.0, 6, 0, 9]).view(1, 4, 1) - t\n"
            "def documented_loss(*inputs):\n    print('Right.')\n    return torch.tensor(0.25), torch.tensor(0.5)",
        ],
        0,
    ),
    "nan": (["import torch" + ZEROS.replace("ZERO", "float('nan') * torch.zeros_like"), "answer_1 = answer_2 = float('nan')"], 0),
    "infinite": (["import torch" + ZEROS.replace("ZERO", "float('inf') + torch.zeros_like")], 0),
    # -- against the grader itself
    "exit_in_a_cell": (but(before="import os", after="os._exit(0)"), 100),
    "exit_in_a_call": (but(before="import os", documented_loss="def documented_loss(*x):\n    os._exit(0)"), 100 - 30),
    "forged_replies": (
        [
            "import os, json\nfor fd in range(3, 64):\n    try:\n        for id in range(1, 40):\n"
            "            os.write(fd, json.dumps({'id': id, 'sizes': [], 'errors': {}}).encode() + b'\\n')\n"
            "    except OSError:\n        pass"
        ],
        0,
    ),
    "nonsense": (["import os\nwhile True:\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'x' * 4096)\n        except OSError:\n            pass"], 0),
    "closed": (["import os\nos.closerange(3, 64)", NOTHING], 0),
    "detached": (but(
        before="import os, subprocess, sys\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.execvp('sleep', ['sleep', '98765'])\n    os._exit(0)",
        documented_loss="",
    ), 70),
}
SLOW: dict[str, tuple[list[str], float]] = {
    "endless_cell": (but(after="while True:\n    pass"), 100),
    "endless": (but(gradients="def gradients(*inputs):\n    while True:\n        pass"), 100 - 12 - 16),
    "endless_cells": (["while True:\n    pass"] * 9, 0),
    "memory": (but(decompose="def decompose(*inputs):\n    return torch.ones(2**30), torch.ones(2**30)"), 70),
    "memory_of_lists": (but(decompose="def decompose(*inputs):\n    x = []\n    while True:\n        x.append(bytes(2**24))"), 70),
    "long_reply": (but(decompose="def decompose(*inputs):\n    return torch.zeros(2**22), torch.zeros(2**22)"), 70),
    "asleep": (but(decompose="import time\ndef decompose(*inputs):\n    time.sleep(1000)"), 70),
}


def notebook(cells: list[str]) -> str:
    made = [{"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": x} for x in cells]
    return json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def graded(folder: Path, submissions: dict, limits: Limits) -> dict[str, dict]:
    assignments.Assignment("dlinear").write(folder / "made")
    (folder / "submissions").mkdir()
    for name, (cells, _) in submissions.items():
        (folder / "submissions" / f"{name}.ipynb").write_text(notebook(cells), "utf-8")
    (folder / "submissions" / "=no_notebook.ipynb").write_text("not a notebook")
    return grader.grade_folder(folder / "made" / "grading", folder / "submissions", folder / "out", WORKERS, 3, limits)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    return folder, graded(folder, SUBMISSIONS, Limits(cells=60, call=20, memory=10**9))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return graded(tmp_path_factory.mktemp("slow"), SLOW, Limits(cells=3, call=3, memory=10**9))


def told(results: dict) -> str:
    return results["output"] + "\n".join(f"{test['score']:g} of {test['max_score']:g}, {test['name']}: {test['output']}" for test in results["tests"])


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_a_submission_gets_the_score_it_deserves(quick, name):
    results = quick[1][name]
    assert results["score"] == SUBMISSIONS[name][1], told(results)
    assert sum(test["max_score"] for test in results["tests"]) == 100


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_too_much_costs_its_questions_alone(slow, name):
    assert slow[name]["score"] == SLOW[name][1], told(slow[name])


def test_no_process_is_left(quick):
    deadline = time.monotonic() + 5
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and b"98765" in command(pid)]:
        assert time.monotonic() < deadline, left


def command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_the_table_and_the_reports(quick):
    folder, done = quick
    rows = [line.split(",") for line in (folder / "out" / "scores.csv").read_text().splitlines()]
    assert {row[0]: float(row[1]) for row in rows[1:]} == {
        name.replace("=", "'="): results["score"] for name, results in done.items()
    }
    assert "'=no_notebook" in {row[0] for row in rows}  # a spreadsheet would take it for a formula
    assert "正确" in (folder / "out" / "reports" / "right.md").read_text("utf-8")
    assert "look at what the formula divides by" in (folder / "out" / "reports" / "no_half.md").read_text("utf-8")
    assert "along the wrong axes" in (folder / "out" / "reports" / "transposed.md").read_text("utf-8")
    assert "wrong sign" in (folder / "out" / "reports" / "sign.md").read_text("utf-8")


def test_a_run_goes_on_where_it_was(quick, monkeypatch, capsys):
    folder, done = quick
    (folder / "out" / "results" / "sign.json").unlink()
    monkeypatch.setattr(grader, "grade", lambda path, *others: ([], "en", []) if path.stem == "sign" else pytest.fail())
    again = grader.grade_folder(folder / "made" / "grading", folder / "submissions", folder / "out", 1)
    assert {name for name in done if again[name] != done[name]} == {"sign"}


def test_a_sandbox_shows_neither_home_nor_network_nor_repository(tmp_path):
    tmp_path.chmod(0o755)
    strip(ROOT / "mini_impl", tmp_path, ["forecasting.dlinear"])
    try:
        sandbox = Sandbox(tmp_path, Limits(), "bubblewrap")
    except RuntimeError:
        pytest.skip("bubblewrap does not run here")
    look = "import os, socket\n"
    look += f"seen = [os.path.exists(x) for x in ({str(ROOT / 'mini_impl')!r}, '/root/.bashrc', '/home', '/etc/passwd')]\n"
    look += "try:\n    socket.create_connection(('1.1.1.1', 53), 2)\n    net = 1.0\nexcept OSError:\n    net = 0.0\n"
    look += "try:\n    open('/usr/x', 'w')\n    wrote = 1.0\nexcept OSError:\n    wrote = 0.0\n"
    look += "import signal\nos.kill(os.getppid() or 1, signal.SIGKILL)\n"  # its own first process, at most
    student = grader.Student([look + "import torch\nfound = torch.tensor([*map(float, seen), net, wrote])"], sandbox)
    try:
        assert student.value("found").tolist() == [0.0] * 6
    finally:
        student.close()

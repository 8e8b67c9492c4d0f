"""Submissions of the assignment dlinear, each as its code cells, with the score that it deserves."""

import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book" / "grading"), str(ROOT / "book" / "tools")]

import assignments  # noqa: E402
from notebooks import repository  # noqa: E402

SOURCE = assignments.Assignment("dlinear")
FUNCTIONS = ("decompose", "documented_loss", "gradients", "train")
SOLVED = [cell.source for cell in assignments.code_cells(SOURCE.cells) if assignments.tagged(cell, "solution")]
RIGHT = dict(zip(FUNCTIONS, SOLVED, strict=False)) | {"answers": "answer_1, answer_2 = 2.858, 168.0"}
SIZES = """
def decompose(series, kernel_size):
    return like(series), like(series)
def documented_loss(prediction, trend, target, trend_weight):
    return like(prediction.sum()), like(trend.sum())
def gradients(prediction, trend, target, trend_weight):
    return like(prediction), like(trend)
def train(trend, seasonal, target, trend_weight, steps, rate):
    return like(target[0, :, :1] @ trend[0, :, :1].T), like(target[0, :, :1] @ trend[0, :, :1].T)
answer_1 = answer_2 = like(torch.ones(()))
"""


def but(before: str = "", after: str = "", **changed: str) -> list[str]:
    """A right submission, without its checks and its experiment, some of its cells changed and two added."""
    return ["import torch", dedent(before), *map(dedent, (RIGHT | changed).values()), dedent(after)]


def put(name: str, old: str, new: str) -> list[str]:
    """A right submission, one function of it changed in one place."""
    assert old in RIGHT[name]
    return but(**{name: RIGHT[name].replace(old, new)})


def like(result: str, before: str = "") -> list[str]:
    """A submission whose every result has the right shape and is this, x being a tensor of that shape."""
    return ["import torch", dedent(before), f"def like(x):\n    return {result}", SIZES]


def all_do(body: str, before: str = "") -> list[str]:
    """A submission whose every function does this."""
    body = dedent(body).strip().replace("\n", "\n    ")
    return [dedent(before), *(f"import os, sys, torch\ndef {name}(*inputs):\n    {body}" for name in FUNCTIONS)]


def whole(solved: bool) -> list[str]:
    """The notebook handed out, or that of the solutions, in Chinese."""
    return [cell.source for cell in assignments.code_cells(SOURCE.notebook("zh", solved, repository()).cells)]


ZERO = "torch.zeros_like(x)"

HONEST: dict[str, tuple[list[str], float]] = {
    "right": (whole(solved=True), 100),
    "right_alone": (but(), 100),
    "float32": (put("decompose", "series[:, :1]", "series.float()[:, :1]"), 100),
    "empty": (whole(solved=False), 0),
    "no_cells": ([], 0),
    # Half right. What builds on a wrong part is wrong too: train uses gradients.
    "zeros_outside": (
        but(
            decompose="""\
            def decompose(series, kernel_size):
                trend = torch.nn.functional.avg_pool1d(series.mT, kernel_size, 1, kernel_size // 2).mT
                return trend, series - trend
            """
        ),
        100 - 10 - 6 - 4,
    ),
    "no_half": (put("documented_loss", "(2 * windows)", "windows"), 100 - 30),
    "mean": (put("documented_loss", ".sum() / (2 * windows)", ".mean()"), 100 - 30),
    "weight_forgotten": (put("documented_loss", "trend_weight * ", ""), 100 - 8 - 4 - 10),
    "no_gradient": (put("documented_loss", ".sum()", ".sum().detach()"), 100 - 10),
    "sign": (put("gradients", "(prediction - target)", "(target - prediction)"), 100 - 6 - 16),
    "transposed": (put("train", "return W_t, W_s", "return W_t.mT, W_s.mT"), 100 - 16),
    # Broken.
    "crashing_cells": (but(before="1 / 0", after="raise SystemExit"), 100),
    "crashing": (all_do("raise ValueError(inputs)"), 0),
    "leaving": (all_do("sys.exit(0)"), 0),
    "no_python": (["def decompose(:", *but()], 100),
    "installing": (["%pip install something\n!rm -rf something", *but()], 100),
}

CHEATING: dict[str, tuple[list[str], float]] = {
    "zeros": (like(ZERO), 0),
    "nan": (like("x * float('nan')"), 0),
    "infinite": (like("x.abs() * 0 + float('inf')"), 0),
    "builtins_replaced": (
        like(
            ZERO,
            """
            import builtins
            for name in ("abs", "all", "any", "max", "isinstance", "round", "sum"):
                setattr(builtins, name, lambda *inputs, **more: True)
            """,
        ),
        0,
    ),
    "torch_replaced": (
        like(
            ZERO,
            """
            import numpy
            for place in (torch, numpy, torch.testing, numpy.testing):
                for name in ("allclose", "equal", "isclose", "assert_close", "assert_allclose", "array_equal"):
                    setattr(place, name, lambda *inputs, **more: True)
            """,
        ),
        0,
    ),
    "gradient_replaced": (  # ones are right for decompose, as trend and season sum to the series
        but(
            before="torch.autograd.grad = lambda total, by, **more: [torch.ones_like(x) for x in by]",
            documented_loss=RIGHT["documented_loss"].replace(".sum()", ".sum().detach().requires_grad_()"),
        ),
        100 - 10,
    ),
    "gradient_faked": (
        put(
            "documented_loss",
            "return forecast_term, trend_term",
            "return forecast_term.detach() + 0 * prediction.sum(), trend_term.detach() + 0 * trend.sum()",
        ),
        100 - 10,
    ),
    "equals_everything": (
        all_do(
            "return Same(), Same()",
            """
            class Same(float):
                __eq__ = __ge__ = __le__ = lambda *others: True
                __hash__ = float.__hash__
                __sub__ = __rsub__ = __abs__ = lambda *others: 0.0
            answer_1 = answer_2 = Same()
            """,
        ),
        0,
    ),
    "equal_tensors": (
        like(
            "torch.zeros_like(x).as_subclass(Same)",
            """
            class Same(torch.Tensor):
                @classmethod
                def __torch_function__(cls, function, kinds, inputs=(), more=None):
                    if function.__name__ in ("eq", "equal", "allclose", "isclose"):
                        return True
                    return super().__torch_function__(function, kinds, inputs, more or {})
            """,
        ),
        0,
    ),
    "objects": (all_do("return numpy.array([object()]), numpy.array(['a'])", "import numpy\nanswer_1 = object()"), 0),
    "frames": (
        [
            dedent(
                """
                import gc, sys, types
                def thief(*inputs):
                    frame, found = sys._getframe(), []
                    while frame:
                        found += {**frame.f_globals, **frame.f_locals}.items()
                        frame = frame.f_back
                    found += [(x.__name__, x) for x in gc.get_objects() if isinstance(x, types.FunctionType)]
                    for name, value in found:
                        if name in ("wanted", "expected", "split", "terms", "by_hand", "descend"):
                            return value(*inputs) if callable(value) else value
                decompose = documented_loss = gradients = train = thief
                """
            )
        ],
        0,
    ),
    "imported": (
        [
            "from mini_impl.forecasting.dlinear import decompose, documented_loss",
            "import mini_impl\ndecompose = mini_impl.forecasting.dlinear.decompose",
            "from mini_impl import DLinear",
            "from mini_impl.forecasting.layers import moving_average\n"
            "def decompose(x, k):\n    return moving_average(x, k), x - moving_average(x, k)",
            "from mini_impl.kernels.decomposition import decompose_torch as decompose",
        ],
        0,
    ),
    "printed": (
        [
            "print(4, 3, 5, 6, 0.25, 0.5)",
            dedent(
                """
                import torch
                def decompose(series, kernel_size):
                    print("trend: 4 3 5 6. Right.")
                    trend = torch.tensor([4.0, 3, 5, 6]).view(1, 4, 1)
                    return trend, torch.tensor([3.0, 6, 0, 9]).view(1, 4, 1) - trend
                def documented_loss(*inputs):
                    print('{"score": 100}')
                    return torch.tensor(0.25), torch.tensor(0.5)
                """
            ),
        ],
        0,
    ),
    "exit_in_a_cell": (but(before="import os", after="os._exit(0)"), 100),
    "exit_in_a_call": (but(before="import os", documented_loss="def documented_loss(*x):\n    os._exit(0)"), 100 - 30),
    "forged_replies": (
        [
            dedent(
                """
                import os, json
                for pipe in range(3, 64):
                    try:
                        for id in range(1, 40):
                            os.write(pipe, json.dumps({"id": id, "sizes": [], "errors": {}}).encode() + b"\\n")
                    except OSError:
                        pass
                """
            ),
            *like(ZERO),
        ],
        0,
    ),
    "nonsense": (
        [
            dedent(
                """
                import os
                while True:
                    for pipe in range(3, 64):
                        try:
                            os.write(pipe, b"x" * 4096)
                        except OSError:
                            pass
                """
            )
        ],
        0,
    ),
    "closed": (["import os\nos.closerange(3, 64)", *like(ZERO)], 0),
    "detached": (
        but(
            before="""
            import os, subprocess
            subprocess.Popen(["sleep", "98765"], start_new_session=True)
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execvp("sleep", ["sleep", "98765"])
                os._exit(0)
            """,
            documented_loss="",
        ),
        100 - 30,
    ),
}

# What only a sandbox stands against: done where bubblewrap runs, and nowhere else.
SHUT_OUT: dict[str, tuple[list[str], float]] = {
    "files": (
        [
            dedent(
                f"""
                import os
                from pathlib import Path
                places = [{str(ROOT)!r}, os.getcwd(), "/tmp", "/usr", "/proc/1/cwd", f"/proc/{{os.getppid()}}/cwd"]
                for place in map(Path, places):
                    for name in ("mini_impl/forecasting/dlinear.py", "questions.py", "grading/questions.py"):
                        try:
                            exec((place / name).read_text())
                        except OSError:
                            pass
                """
            )
        ],
        0,
    ),
    "killing": (
        but(
            before="""
            import os, signal
            for process in (1, os.getppid()):
                try:
                    os.kill(process, signal.SIGKILL) if process else None
                except OSError:
                    pass
            """
        ),
        100,
    ),
}

# With three seconds for all cells, and three for a call.
GREEDY: dict[str, tuple[list[str], float]] = {
    "endless_cell": (but(after="while True:\n    pass"), 100),
    "endless": (but(gradients="def gradients(*inputs):\n    while True:\n        pass"), 100 - 12 - 16),
    "endless_cells": (["while True:\n    pass"] * 9, 0),
    "asleep": (but(decompose="import time\ndef decompose(*inputs):\n    time.sleep(1000)"), 70),
    "memory": (but(decompose="def decompose(*inputs):\n    return torch.ones(2**30), torch.ones(2**30)"), 70),
    "memory_in_pieces": (
        but(decompose="def decompose(*inputs):\n    x = []\n    while True:\n        x.append(bytes(2**24))"),
        70,
    ),
    "long_reply": (but(decompose="def decompose(*inputs):\n    return torch.zeros(2**22), torch.zeros(2**22)"), 70),
}

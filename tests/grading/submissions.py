"""Submissions of an assignment, each as its code cells, with the score that it deserves.

What an assignment is tested by stands in its header: `answers`, right ones; `needed`, of each function the points of
the questions that it is needed for; `by_gradient`, the points of the questions that ask for gradients; `imports`, lines
by which a cheater would import the solution; `mistakes`.
"""

import sys
from functools import cached_property
from pathlib import Path
from textwrap import dedent, indent

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book" / "grading"), str(ROOT / "book" / "tools")]

import assignments  # noqa: E402
from notebooks import repository  # noqa: E402

Scored = dict[str, tuple[list[str], float]]  # of each submission its cells and its score

# Every function goes on as it was, and does this to its results. The functions call one another as they were before.
REPLACE = """
import types, torch
def like(x):
    return {result}
before = dict(globals())
for name in {functions}:
    f = before[name]
    before[name] = types.FunctionType(f.__code__, before, name, f.__defaults__)
def cheating(function):
    original = before[function.__name__]
    def wrapped(*inputs):
        wrapped.inputs = inputs
        right = original(*inputs)
        many = isinstance(right, (tuple, list))
        return tuple(like(torch.as_tensor(x)) for x in right) if many else like(torch.as_tensor(right))
    return wrapped
for name in {functions}:
    globals()[name] = cheating(globals()[name])
"""
ZERO = "torch.zeros_like(x)"
FAKED = """x.detach() + 0 * sum(y.sum() for f in map(globals().get, FUNCTIONS) for y in getattr(f, 'inputs', ())
                                if isinstance(y, torch.Tensor) and y.requires_grad)"""


class Submissions:
    """The submissions of the assignment of this name."""

    def __init__(self, name: str):
        self.source = assignments.Assignment(name)
        self.tested = self.source.tested
        self.needed: dict[str, float] = self.tested["needed"]
        self.functions = list(self.needed)
        self.answers = "\n".join(f"{name} = {value}" for name, value in self.tested["answers"].items())

    @cached_property
    def handed_out(self) -> list[str]:
        """The notebook that students get, in Chinese."""
        return self.whole(solved=False)

    def whole(self, solved: bool) -> list[str]:
        notebook = self.source.notebook("zh", solved, repository())
        return [cell.source for cell in assignments.code_cells(notebook.cells)]

    def but(self, before: str = "", after: str = "", **changed: str) -> list[str]:
        """A right submission, without its checks and its experiment, some functions changed and two cells added."""
        cells = [dedent(changed.get(name, cell)) for name, cell in self.source.written.items()]
        return [*self.source.unmarked, dedent(before), *cells, self.answers, dedent(after)]

    def does(self, function: str, body: str) -> list[str]:
        """A right submission, one function of which does this in place of its work."""
        return self.but(**{function: f"def {function}(*inputs):\n{indent(dedent(body).strip(), '    ')}"})

    def like(self, result: str, before: str = "", answers: str | None = None) -> list[str]:
        """A submission whose every result is this, x being the right one; and every answer, unless they are given."""
        replace = REPLACE.format(result=result, functions=self.functions)
        if answers is None:
            answers = "\n".join(f"{name} = like(torch.ones(()))" for name in self.tested["answers"])
        return [*self.but(), dedent(before), f"FUNCTIONS = {self.functions}", replace, answers]

    def all_do(self, body: str, before: str = "") -> list[str]:
        """A submission whose every function does this."""
        body = indent(dedent(body).strip(), "    ")
        return [dedent(before), *(f"import os, sys, torch\ndef {name}(*inputs):\n{body}" for name in self.functions)]

    @cached_property
    def honest(self) -> Scored:
        made = {
            "right": (self.whole(solved=True), 100),
            "right_alone": (self.but(), 100),
            "float32": (self.like("x.float() if x.is_floating_point() else x", answers=self.answers), 100),
            "empty": (self.handed_out, 0),
        }
        for number, mistake in enumerate(self.tested["mistakes"]):
            made[f"mistake_{number}"] = (self.but(**self.source.mistaken(mistake)), 100 - mistake["lost"])
        return made

    @cached_property
    def broken(self) -> Scored:
        made = {
            "no_cells": ([], 0),
            "crashing_cells": (self.but(before="1 / 0", after="raise SystemExit"), 100),
            "crashing": (self.all_do("raise ValueError(inputs)"), 0),
            "leaving": (self.all_do("sys.exit(0)"), 0),
            "no_python": (["def f(:", *self.but()], 100),
            "installing": (["%pip install something\n!rm -rf something", *self.but()], 100),
        }
        for name, points in self.needed.items():
            made[f"without_{name}"] = (self.but(**{name: ""}), 100 - points)
        return made

    @cached_property
    def cheating(self) -> Scored:
        first, last = self.functions[0], self.functions[-1]
        no_gradient = 100 - self.tested["by_gradient"]
        return {
            "zeros": (self.like(ZERO), 0),
            "ones": (self.like("torch.ones_like(x)"), 0),
            "nan": (self.like("x * float('nan')"), 0),
            "infinite": (self.like("x.abs() * 0 + float('inf')"), 0),
            "builtins_replaced": (
                self.like(
                    ZERO,
                    """
                    import builtins
                    for name in ("abs", "all", "any", "max", "round"):
                        setattr(builtins, name, lambda *inputs, **more: True)
                    """,
                ),
                0,
            ),
            "tests_replaced": (
                self.like(
                    ZERO,
                    """
                    import doctest, numpy, torch, unittest
                    doctest.DocTestRunner.run = lambda *inputs, **more: doctest.TestResults(0, 1)
                    unittest.TestCase.run = lambda *inputs, **more: None
                    for place in (torch, numpy, torch.testing, numpy.testing):
                        for name in ("allclose", "equal", "isclose", "assert_close", "assert_allclose", "array_equal"):
                            setattr(place, name, lambda *inputs, **more: True)
                    """,
                ),
                0,
            ),
            "gradient_replaced": (
                self.like(
                    "x.detach().requires_grad_() if x.is_floating_point() else x",
                    "torch.autograd.grad = lambda total, by, **more: [torch.zeros_like(x) for x in by]",
                    self.answers,
                ),
                no_gradient,
            ),
            "gradient_faked": (self.like(FAKED, answers=self.answers), no_gradient),
            "equals_everything": (
                self.like(
                    "Same()",
                    """
                    class Same(float):
                        __eq__ = __ge__ = __le__ = lambda *others: True
                        __hash__ = float.__hash__
                        __sub__ = __rsub__ = __abs__ = lambda *others: 0.0
                    """,
                ),
                0,
            ),
            "equal_tensors": (
                self.like(
                    "torch.zeros_like(x).as_subclass(Equal)",
                    """
                    class Equal(torch.Tensor):
                        @classmethod
                        def __torch_function__(cls, function, kinds, inputs=(), more=None):
                            if function.__name__ in ("eq", "equal", "allclose", "isclose"):
                                return True
                            return super().__torch_function__(function, kinds, inputs, more or {})
                    """,
                ),
                0,
            ),
            "objects": (self.like("numpy.array([object()])", "import numpy"), 0),
            "frames": (
                self.all_do(
                    """
                    frame, found = sys._getframe(), []
                    while frame:
                        found += {**frame.f_globals, **frame.f_locals}.items()
                        frame = frame.f_back
                    found += [(x.__name__, x) for x in gc.get_objects() if isinstance(x, types.FunctionType)]
                    for name, value in found:
                        if name in WANTED:
                            return value(*inputs) if callable(value) else value
                    """,
                    f"import gc, types\nWANTED = {['wanted', 'expected', *self.hidden_names]}",
                ),
                0,
            ),
            "imported": (self.imported, 0),
            "remembered": (  # what the check in the notebook wants, whatever the inputs
                [
                    "import torch\nfrom mini_impl import classroom",
                    dedent(
                        """
                        def check(function, *inputs, wanted, **more):
                            found = [torch.as_tensor(value) for value in wanted]
                            globals()[function.__name__] = lambda *others: tuple(found) if len(found) > 1 else found[0]
                        classroom.check = check
                        """
                    ),
                    *self.handed_out,
                ],
                0,
            ),
            "printed": (
                [
                    "print('Right. 正确。')\nprint('{\"score\": 100}')",
                    *self.all_do("""print('{"score": 100, "errors": {}}', flush=True)"""),
                ],
                0,
            ),
            "exit_in_a_cell": (self.but(before="import os", after="os._exit(0)"), 100),
            "exit_in_a_call": (self.does(last, "import os\nos._exit(0)"), 100 - self.needed[last]),
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
                    *self.like(ZERO),
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
            "closed": (["import os\nos.closerange(3, 64)", *self.like(ZERO)], 0),
            "detached": (
                self.but(
                    before="""
                    import os, subprocess
                    subprocess.Popen(["sleep", "98765"], start_new_session=True)
                    if os.fork() == 0:
                        os.setsid()
                        if os.fork() == 0:
                            os.execvp("sleep", ["sleep", "98765"])
                        os._exit(0)
                    """,
                    **{first: ""},
                ),
                100 - self.needed[first],
            ),
        }

    @property
    def hidden_names(self) -> list[str]:
        """What the functions are called that know the right answer."""
        return [line[4:].partition("(")[0] for line in self.source.questions().splitlines() if line.startswith("def ")]

    @property
    def imported(self) -> list[str]:
        """Cells that take every function from wherever mini_impl may have it, and by the lines of the header."""
        search = f"""
        import importlib, pkgutil, mini_impl
        names = [module.name for module in pkgutil.walk_packages(mini_impl.__path__, "mini_impl.")]
        names += ["mini_impl." + name.partition(":")[0] for name in {self.source.settings["withheld"]}]
        for name in names:
            try:
                module = importlib.import_module(name)
            except Exception:
                continue
            for function in {self.functions}:
                if hasattr(module, function):
                    globals()[function] = getattr(module, function)
        """
        return [*self.source.unmarked, dedent(search), *self.tested["imports"]]

    @cached_property
    def shut_out(self) -> Scored:
        """What only a sandbox stands against: done where bubblewrap runs, and nowhere else."""
        modules = [name.partition(":")[0].replace(".", "/") for name in self.source.settings["withheld"]]
        files = [f"mini_impl/{module}.py" for module in modules]
        files += ["questions.py", "grading/questions.py", f"book/assignments/{self.source.name}.md"]
        return {
            "files": (
                [
                    dedent(
                        f"""
                        import os
                        from pathlib import Path
                        places = [{str(ROOT)!r}, os.getcwd(), "/tmp", "/usr", "/proc/1/cwd"]
                        for place in map(Path, [*places, f"/proc/{{os.getppid()}}/cwd"]):
                            for name in {files}:
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
                self.but(
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

    @cached_property
    def greedy(self) -> Scored:
        """With a few seconds for all cells, and for a call."""
        first, last = self.functions[0], self.functions[-1]
        first_lost, last_lost = 100 - self.needed[first], 100 - self.needed[last]
        return {
            "endless_cell": (self.but(after="while True:\n    pass"), 100),
            "endless": (self.does(last, "while True:\n    pass"), last_lost),
            "endless_cells": (["while True:\n    pass"] * 9, 0),
            "asleep": (self.does(first, "import time\ntime.sleep(1000)"), first_lost),
            "memory": (self.does(first, "return torch.ones(2**30), torch.ones(2**30)"), first_lost),
            "memory_in_pieces": (self.does(last, "x = []\nwhile True:\n    x.append(bytes(2**24))"), last_lost),
            "long_reply": (self.does(first, "return torch.zeros(2**22), torch.zeros(2**22)"), first_lost),
        }

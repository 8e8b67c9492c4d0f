"""What the pages write, on other devices: each function and model that a cell defines is run again elsewhere.

A page runs as plain Python: the notebook of its solutions, which has all of the page's code but the pictures. The first
call of each function is kept, if there is a tensor in its arguments or in the page's names that it reads, with copies
of both. Then it is called again with the copies, in float32, on the pretend device and on every GPU there is: as if a
reader had put there whatever the function is given and reads. What it makes itself it has to make there, too. Where a
cell builds a part of the package, its functions must besides not make the host wait, and each be one graph.

The chapters' lines are short, and meant for a CPU. The tables below name those that do not suit a GPU, and the test
fails if one of these does otherwise than they say, too.
"""

import ast
import copy
import copyreg
import dis
import functools
import inspect
import linecache
import re
import threading
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import nbformat
import pytest
import torch
from books import ROOT
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mini_impl
from mini_impl.forecasting import train
from tests import pretend
from tests.conftest import GPUS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Dynamo (detected a call|does not know)")]
# verify_on_gpu runs, on Colab, all that is for a GPU: this, too.
PAGES = sorted({path.stem for path in (ROOT / "book" / "en").glob("*.ipynb")} - {"verify_on_gpu"})

# What goes wrong elsewhere, and with which functions.
UNFIT = {
    # A tensor is made of numbers, with no word on where: torch.arange(N), not torch.arange(N, device=x.device).
    "two devices|on the device of the model|on cpu, as logits": """
        attention.almost attention.error attention.fewest attention.in_blocks attention.train_head dapo.nobody_lost
        dapo.stays dapo.third dapo.train dapo.update dlinear.error_by_hour dlinear.one_step dlinear.rows_of
        gpu.adds_squares gpu.launch gpu.logprob_kernel gpu.online_logprobs gpu.wrong_max grpo.stands_for_q
        itransformer.angles_half itransformer.documented_loss itransformer.lagged itransformer.orthogonality
        language_model.answer_by language_model.blinded language_model.explained language_model.logits_of
        language_model.logprob language_model.logprobs_of language_model.total language_model.turns
        language_model.without_end patchtst.unseen_penalty policy_gradient.best_baseline policy_gradient.variance
        policy_gradient.write scale.mean_of_means scale.trained scale.write sft.kl_per_token sft.margins
        sft.mean_logprob sft.pull timesnet.both_sides timesnet.trained timexer.total_pull""",
    # A model keeps a tensor that is neither a parameter nor a buffer, so that .to(device) leaves it behind.
    "cat: got tensors of two devices": "attention.Head",
    # It asks for float64, for exact digits.
    "float64": """
        attention.clock attention.score_matrix dlinear.is_moved dlinear.one_matrix dlinear.rank_of dlinear.seven_maps
        policy_gradient.mean_harms policy_gradient.weigh series.add_one series.linear_forecast timexer.columns_of
        timexer.is_news timexer.least_squares timexer.spearman timexer.weekday_named""",
    # It needs float64: least squares of 290 columns.
    "not close": "dlinear.minimum",
    # It counts bytes or operations, which the pretend device has other ones of.
    "Scalars are not close": "attention.kept_for_gradients sft.kept_memory",
    # It gets a loss and the weights that it is of; the copies do not belong together.
    "not to have been used|not have been used": "dapo.total_of scale.gradient_of",
}
UNFIT = {name: wrong for wrong, names in UNFIT.items() for name in names.split()}
# Trainings of more steps than they are worth here; what gives back how long it took; and an angle below one degree, of
# which float32 has three digits on one machine and four on another.
LEFT_OUT = {"gpu.by_blocks", "grpo.train_on", "itransformer.trained", "policy_gradient.angle_at", "sft.trained"}
# How often functions that build make the host wait: for each row of a mask, each index that is made on the CPU, a list
# of thresholds, the periods.
WAITS = {"dapo.excess_of": 1, "dapo.remember": 10, "dapo.shortened": 1, "dapo.squared_excess": 1}
WAITS |= {"gpu.by_neighbours": 25, "grpo.log_probability": 8, "language_model.cut": 1}
WAITS |= {"timesnet.forecast": 2, "timesnet.times_block": 1}
# Functions that build, and are no graph: they sample until all answers have ended, take gradients, solve least squares
# of any rank, watch what torch does.
BROKEN = {"dapo.draw": "Unsupported", "dapo.draw_on": "Unsupported", "dapo.total_of": "autograd.grad"}
BROKEN |= {"dlinear.minimum": "Dynamic shape operator", "gpu.bytes_of": "Unsupported"}
# What is built of sizes, texts or a generator, without a tensor that could be elsewhere; and pages without any.
TENSORLESS = {"attention": {"layers.sinusoids"}, "patchtst": {"patchtst.random_mask"}}
TENSORLESS |= {"scale": {"workers.rows", "workers.share"}, "sft": {"sft.supervised"}}
NOTHING = {"forecasters", "glossary", "index", "losses", "start", "teaching"}


class Call(NamedTuple):
    """The first call of a function.

    builds: what of the package the function's cell builds; drawn: whether with random numbers; state: of these, before;
    copies: by device, the arguments, and the page's names that are read.
    """

    name: str
    function: Callable
    builds: list[str]
    drawn: bool
    state: Tensor
    copies: dict[str, tuple]
    result: object


class Page:
    """A page that runs: the names it has defined, and the calls of its functions."""

    def __init__(self):
        self.calls, self.called, self.builds, self.listens = [], set(), [], True
        self.thread = threading.get_ident()
        self.names = {"__name__": "page", "_kept": self.kept}

    def run(self, cell: nbformat.NotebookNode) -> None:
        self.builds = cell.metadata.get("builds", [])
        tree = ast.fix_missing_locations(Kept().visit(ast.parse(cell.source)))
        file = f"cell {cell.id}"
        linecache.cache[file] = len(cell.source), None, cell.source.splitlines(keepends=True), file  # for inspect
        exec(compile(tree, file, "exec"), self.names)

    def kept(self, thing: Callable) -> Callable:
        """A function or model that a cell defines, of which the first call will be kept."""
        if isinstance(thing, type) and issubclass(thing, nn.Module):
            thing.forward = self.first_kept(thing.forward, thing.__name__)
        if isinstance(thing, types.FunctionType) and not inspect.isgeneratorfunction(thing):
            return self.first_kept(thing, thing.__name__)
        return thing

    def first_kept(self, function: Callable, name: str) -> Callable:
        builds, code = self.builds, inspect.unwrap(function).__code__

        @functools.wraps(function)
        def listening(*args, **kwargs):
            if code in self.called or not self.listens or threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            self.called.add(code)
            arguments = inspect.signature(function).bind(*args, **kwargs)
            arguments.apply_defaults()
            given = arguments.args, arguments.kwargs, self.read_by(function, *args)
            try:
                copies = {device: placed(given, device)[0] for device in [*GPUS, *["cpu"] * bool(builds)]}
                with pretend.device() as device:
                    copies["pretend"], kinds = placed(given, device)
            except (TypeError, RuntimeError):  # there are no copies of Python's generators, nor of tensors on "meta"
                self.called.remove(code)
                return function(*args, **kwargs)
            state = torch.get_rng_state()
            result = function(*args, **kwargs)
            if Tensor in kinds:
                drawn = torch.Generator in kinds or not torch.equal(state, torch.get_rng_state())
                self.calls.append(Call(name, function, builds, drawn, state, copies, placed(result, "cpu")[0]))
            return result

        return listening

    def read_by(self, *functions) -> dict:
        """The page's names that functions of the page read, and the functions that these call."""
        found, new = {}, [inspect.unwrap(f).__code__ for f in functions if isinstance(f, types.FunctionType)]
        while new:
            code = new.pop()
            new += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            read = {line.argval for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
            for name in read & self.names.keys() - found.keys():
                found[name] = value = self.names[name]
                for one in vars(value).values() if isinstance(value, type) else [value]:
                    if isinstance(one, types.FunctionType) and one.__module__ == "page":
                        new.append(inspect.unwrap(one).__code__)
        return {name: value for name, value in found.items() if not isinstance(value, types.ModuleType)}

    def again(self, call: Call, device: str, function: Callable) -> object:
        """The result of a call, with its copies on a device."""
        args, kwargs, read = call.copies[device]
        names = dict(self.names)
        self.names.update(read)
        self.listens = False
        try:
            with torch.random.fork_rng([]):
                torch.set_rng_state(call.state)
                return function(*args, **kwargs)
        finally:
            self.names.update(names)
            self.listens = True


class Kept(ast.NodeTransformer):
    """Decorates what a cell defines. What it asserts is asked, but need not hold: trainings are cut short here."""

    def visit_FunctionDef(self, node):
        node.decorator_list.insert(0, ast.Name("_kept", ast.Load()))
        return node

    visit_ClassDef = visit_FunctionDef

    def visit_Assert(self, node):
        return ast.Expr(node.test)


def placed(values, device) -> tuple:
    """A copy, with tensors and models on the device, float64 as float32; and the kinds of what there was to copy."""
    lower, places = {torch.float64: torch.float32, torch.complex128: torch.complex64}, [device]

    def moved(tensor, memo):
        there = tensor.detach().to(places[-1], lower.get(tensor.dtype, tensor.dtype), copy=True)
        if isinstance(tensor, nn.Parameter):
            there = nn.Parameter(there, tensor.requires_grad)
        memo[id(tensor)] = there.requires_grad_(tensor.requires_grad)
        if tensor.is_leaf and tensor.grad is not None:
            there.grad = moved(tensor.grad, memo)
        return there

    def moved_model(model, memo):  # by its own .to(..), which leaves behind what is neither parameter nor buffer
        places.append("cpu")
        there = copy._reconstruct(model, memo, *model.__reduce_ex__(4))
        places.pop()
        return there.to(places[-1])

    memo = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__deepcopy__", moved)
        patch.setattr(nn.Parameter, "__deepcopy__", moved)
        patch.setattr(nn.Module, "__deepcopy__", moved_model, raising=False)
        patch.setitem(copyreg.dispatch_table, torch.Generator, lambda generator: (generator.clone_state, ()))
        there = copy.deepcopy(values, memo)
    return there, {kind for value in memo.values() for kind in (Tensor, torch.Generator) if isinstance(value, kind)}


def said(page: Page, call: Call, device: str, function: Callable) -> str:
    """What goes wrong when a call is made again on a device; nothing if it gives what it gave on the page."""
    try:
        result = page.again(call, device, function)
        with pretend.uncounted():
            results = placed(result, "cpu")[0], call.result
        ours, theirs = (
            [value for value in tree_leaves(result) if isinstance(value, (Tensor, bool, int, float))]
            for result in results
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=3e-5, equal_nan=True, check_dtype=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcomes(page: Page, call: Call, key: str) -> Iterator[tuple[str, str, str]]:
    """What was tried of a call, the pattern of what it should say, and what it says."""
    with pretend.device(), pretend.waits() as waits:
        yield key, UNFIT.get(key, "^$"), said(page, call, "pretend", call.function)
    waits = sum(wait.endswith("outside the package") for wait in waits)
    if call.builds and key not in UNFIT:
        yield f"{key}, host waits", f"^{WAITS.get(key, 0)}$", str(waits)
    if call.builds and not waits:
        torch.compiler.reset()
        graph = torch.compile(call.function, fullgraph=True, dynamic=True, backend="eager")
        yield f"{key}, compiled", BROKEN.get(key, "^$"), said(page, call, "cpu", graph)
    for device in GPUS if key not in UNFIT and not call.drawn else ():
        yield f"{key}, {device}", "^$", said(page, call, device, call.function)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_writes_runs_on_other_devices(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for module in (train, mini_impl):
        monkeypatch.setattr(module, "fit", lambda *a, fit=module.fit, **how: fit(*a, **how | {"epochs": 1}))
    torch.set_num_threads(1)
    solved = ROOT / "book" / "solutions" / "en" / f"{name}.ipynb"
    page, built, found = Page(), set(), []
    cells = nbformat.read(solved if solved.exists() else ROOT / "book" / "en" / solved.name, as_version=4).cells
    for cell in cells:
        if cell.cell_type == "code" and cell.id != "setup":
            page.run(cell)
            calls, page.calls = page.calls, []
            for call in calls:
                key = f"{name}.{call.name}"
                if call.name != "answer" and key not in LEFT_OUT:
                    found += outcomes(page, call, key)
                    built |= set(call.builds)
    wrong = [
        f"{what}: {got[:300]!r}, not {wanted!r}" for what, wanted, got in found if not re.search(wanted, got, re.S)
    ]
    assert not wrong, "\n".join(wrong)
    assert {what for cell in cells for what in cell.metadata.get("builds", ())} - built == TENSORLESS.get(name, set())
    told = {what.split(",")[0] for what, *_ in found}
    assert told >= {key for table in (UNFIT, WAITS, BROKEN) for key in table if key.startswith(f"{name}.")}
    assert (not found) == (name in NOTHING)

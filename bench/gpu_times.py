"""Times and errors on a device: kernels beside torch, torch.compile and Liger; steps beside other people's (bench.gpu).

Peers are measured where they are installed. What fails, or needs too much memory, is named under "left out".
"""

import os
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from bench import growth as growing
from bench.measuring import milliseconds
from mini_impl.faster import faster
from mini_impl.kernels import clipped_loss, decomposition, logprob, wanted

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TURNS, LASTS = 5, 30  # how often each side is timed, and about how many milliseconds a turn lasts
STEPS = 25  # that an average is over
# The book's, one as the roofline counts it, and one that fills a card.
SIZES = {
    "decomposition": [(32, 96, 7), (32, 720, 7), (512, 720, 321)],  # [batch, time, variable]
    "logprob": [(192, 49152), (1024, 32000), (8192, 128000)],  # [place, vocabulary]
    "clipped_loss": [(64, 6), (256, 1024), (4096, 4096)],  # [sequence, token]
}


# --- a stopwatch ------------------------------------------------------------------------------------------------------


def compare(works: dict[str, Callable[[], object]], device: str) -> dict:
    """{"milliseconds": {name: the median of turns}, "left out": {name: why it did not run}}."""
    runs, missing = {}, {}
    for name, work in works.items():
        try:
            for _ in range(3):  # compiles, and warms up
                work()
            runs[name] = max(1, min(100, round(LASTS / stopwatch(work, 1, device))))
        except Exception as error:
            missing[name] = reason(error)
    turns = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, values in turns.items():
            values.append(stopwatch(works[name], runs[name], device))
    medians = {name: statistics.median(values) for name, values in turns.items()}
    return {"milliseconds": medians, "left out": missing}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


def stopwatch(work: Callable[[], object], runs: int, device: str) -> float:
    """Milliseconds of one run; on a GPU by its own clock, from the first start to the last end."""
    if device != "cuda":
        return milliseconds(work, runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(runs):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / runs


def release(device: str) -> None:
    """Forget what was compiled, and give memory back that is free."""
    torch.compiler.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def compiles(dtype: str, device: str) -> bool:
    """Below compute capability 8.0 torch.compile hands bfloat16 back to torch: the time would have a wrong name."""
    return dtype != "bf16" or device != "cuda" or torch.cuda.get_device_capability() >= (8, 0)


def modes(device: str) -> dict[str, dict]:
    """How a model is run: {name: arguments of `faster`}."""
    every = {
        f"{'compiled, ' * compile}{precision}": {"compile": compile, "precision": precision}
        for compile in (False, True)
        for precision in ("float32", "bf16")
    }
    return {name: how for name, how in every.items() if not how["compile"] or compiles(how["precision"], device)}


# --- kernels ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a kernel is given, function(leaf, *others), and what comes from behind, d loss / d each of its outputs."""

    kernel: Callable
    plain: Callable  # the torch function
    leaf: Tensor  # with a gradient
    others: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    apart: bool  # a row of the outputs needs that row of the inputs alone


def case(name: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """Random numbers of a seed, in the memory of the device."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    if name == "decomposition":
        both = [lambda x, f=f: f(x, STEPS) for f in (decomposition.decompose, decomposition.decompose_torch)]
        given = draw(*size), (), (draw(*size), draw(*size)), True
    elif name == "logprob":
        both = [logprob.token_logprobs, logprob.token_logprobs_torch]
        tokens = torch.randint(size[1], size[:1], device=device, generator=generator)
        given = draw(*size), (tokens,), (draw(size[0], dtype=torch.float32),), True
    else:
        both = [clipped_loss.clipped_loss, clipped_loss.clipped_loss_torch]
        mask = torch.rand(size, device=device, generator=generator) < 0.8
        one = torch.ones((), device=device)
        advantages = draw(size[0]) + 1  # else the loss would be what is left of numbers that cancel
        given = draw(*size) / 5, (draw(*size) / 5, advantages, mask), (one,), False
    return Case(*both, *given)


def moved(name: str, size: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a kernel reads and writes, forward and backward, by formula."""
    if name == "decomposition":
        forward, backward = decomposition.traffic(*size, STEPS, dtype)
    else:
        forward, backward = (logprob if name == "logprob" else clipped_loss).traffic(*size, dtype)
    return forward.moved + backward.moved


def forward_and_backward(function: Callable, leaf: Tensor, others: tuple, upstream: tuple) -> list[Tensor]:
    """The outputs and the gradient by the leaf."""
    leaf = leaf.detach().requires_grad_()
    outputs = function(leaf, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaf, upstream)]


def exact(made: Case) -> tuple[Tensor, list[Tensor]]:
    """(rows that are judged, all or some of the whole table; their outputs and gradient in float64)."""
    count = len(made.leaf)
    rows = torch.linspace(0, count - 1, min(64, count) if made.apart else count).long().to(made.leaf.device)

    def part(value: Tensor) -> Tensor:
        value = value[rows] if value.ndim else value
        return value.double() if value.is_floating_point() else value

    others, upstream = tuple(map(part, made.others)), tuple(map(part, made.upstream))
    return rows, forward_and_backward(made.plain, part(made.leaf), others, upstream)


def error(ours: list[Tensor], rows: Tensor, true: list[Tensor]) -> float:
    """The largest difference of any number, relative to the largest number of its tensor. NaN stays NaN."""
    parts = [(value[rows] if value.ndim else value).double() for value in ours]
    pairs = zip(parts, true, strict=True)
    return torch.stack([(part - number).abs().amax() / number.abs().amax() for part, number in pairs]).amax().item()


def ways(name: str, made: Case, dtype: str, device: str) -> dict[str, Callable]:
    """The functions that are compared. Liger's writes the gradient over the logits, so it comes last."""
    functions = {"kernel": made.kernel, "torch": made.plain}
    if compiles(dtype, device):
        functions["compiled"] = torch.compile(made.plain, dynamic=False)
    if name == "logprob" and find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        functions["Liger"] = lambda logits, tokens: -liger_cross_entropy(logits, tokens, reduction="none").float()
    return functions


def kernels(device: str = "cuda", sizes: dict[str, list] = SIZES) -> list[dict]:
    """Forward and backward of every kernel at every size and dtype, beside torch's: errors and times.

    Raises RuntimeError where no kernel runs on the device.
    """
    with mock.patch.dict(os.environ, MINI_IMPL_KERNELS="1"):
        if not wanted(torch.empty(1, device=device), 0):
            raise RuntimeError(f"no kernel runs on {device}")
        every = [(name, size, dtype) for name, some in sizes.items() for size in some for dtype in DTYPES]
        return [beside_torch(*one, device) for one in every]


def beside_torch(name: str, size: tuple[int, ...], dtype: str, device: str) -> dict:
    """One row: what each way differs by from float64, and how long it takes."""
    release(device)
    row = {"kernel": name, "size": list(size), "dtype": dtype, "bytes": moved(name, size, DTYPES[dtype])}
    try:
        made = case(name, size, DTYPES[dtype], device)
        rows, true = exact(made)
    except torch.OutOfMemoryError as why:
        return {**row, "error": {}, "milliseconds": {}, "left out": {"kernel": reason(why)}}
    functions, errors, missing = ways(name, made, dtype, device), {}, {}
    given = made.leaf, made.others, made.upstream
    for way, function in functions.items():
        try:
            errors[way] = error(forward_and_backward(function, *given), rows, true)
        except Exception as why:
            missing[way] = reason(why)
    found = compare({way: lambda f=functions[way]: forward_and_backward(f, *given) for way in errors}, device)
    found["left out"] |= missing
    return {**row, "error": errors, **found}


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(device: str = "cuda", models: tuple[str, ...] | None = None, **sizes) -> list[dict]:
    """A training step of each forecaster in every mode, then beside neuralforecast's; then of a language model."""
    rows = []
    for name in models or growing.FORECASTERS:
        release(device)
        given = name, growing.HORIZON, 7, 32, {}, device
        works = {mode: growing.training(*given, **how) for mode, how in modes(device).items()}
        rows.append({"model": name, "of": "training, 32 windows", **compare(works, device)})
    if find_spec("neuralforecast"):
        rows += [beside_neuralforecast(name, device) for name in models or growing.FORECASTERS]
    return [*rows, language_model(device, **sizes)]


def beside_neuralforecast(name: str, device: str) -> dict:
    """A training step of both with the same weights, and how far apart their forecasts are at the most."""
    from bench.forecasting import PAIRS, largest_difference, training

    release(device)
    torch.manual_seed(0)
    pair = next(make for model, make in PAIRS.items() if model.lower() == name)()
    far = largest_difference(pair, device)
    works = {"ours": training(pair, "published", device), "neuralforecast": training(pair, "peer", device)}
    of = "training, 32 windows, sizes of the peer"
    return {"model": name, "of": of, "difference": far, **compare(works, device)}


def language_model(device: str, sequences: int = 4, tokens: int = 512, layers: int = 6, **smaller: int) -> dict:
    """Forward and backward of a model as wide as SmolLM2, beside transformers' Llama with the same weights."""
    from bench.weights import llama_of
    from mini_impl.finetuning.language_model import LanguageModel
    from mini_impl.finetuning.sft import documented_loss
    from mini_impl.finetuning.smollm2 import SETTINGS

    release(device)
    torch.manual_seed(0)
    settings = {**SETTINGS, "layers": layers, **smaller}
    model = LanguageModel(**settings)
    ids = torch.randint(settings["vocab_size"], (sequences, tokens + 1)).to(device)
    sides, far = {"ours": (model, model)}, {}
    if find_spec("transformers"):
        llama = llama_of(model).to(device)
        sides["transformers"] = (llama, lambda tokens: llama(input_ids=tokens).logits)
    model.to(device)
    if len(sides) == 2:
        with torch.no_grad():
            ours, theirs = (forward(ids) for _, forward in sides.values())
        far = {"difference": (ours - theirs).abs().amax().item()}
        del ours, theirs

    def step(model: nn.Module, forward: Callable) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            documented_loss(forward(ids[:, :-1]), ids[:, 1:]).total.backward()

        return run

    works = {
        f"{side}, {mode}": step(model, faster(forward, **how))
        for mode, how in modes(device).items()
        for side, (model, forward) in sides.items()
    }
    of = f"forward and backward, {layers} layers, {sequences} x {tokens} tokens"
    return {"model": "language model", "of": of, **far, **compare(works, device)}


# --- growth -----------------------------------------------------------------------------------------------------------


def growth(device: str = "cuda", models: tuple[str, ...] | None = None, places: list | None = None) -> list[dict]:
    """A training step of each forecaster by look-back and number of variables, 8 windows."""
    rows = []
    for name in models or growing.FORECASTERS:
        for history, variables in places or growing.PLACES:
            release(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = compare({"ours": growing.training(name, history, variables, 8, {}, device)}, device)
            row = {"model": name, "look-back": history, "variables": variables, **found}
            rows.append(row | ({"MiB": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else {}))
    return rows

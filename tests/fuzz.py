"""Every public function of the package, called with something wrong, again and again: `make fuzz`.

From a valid call of each, one or two arguments are put out of order. Whatever comes back must be finite, or an error
that the docstring documents: TypeError and ValueError, and what stands there after "Raises". Seeded, so that a defect
can be seen again: python -m tests.fuzz --seed 0.
"""

import argparse
import importlib
import inspect
import math
import os
import pkgutil
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor

import mini_impl
from mini_impl import losses
from tests.fuzz_calls import CALLS, FOLDER, INFINITE, SKIPPED, UNREAD

SECONDS_A_CALL = 2  # a call that is still at work then is given up: sizes may be huge
PATIENT = (TimeoutError, MemoryError)


# --- what is called ---------------------------------------------------------------------------------------------------


def public() -> dict[str, Callable]:
    """{"forecasting.dlinear.DLinear": the class, ...}: functions, classes, and the methods that a class defines.

    Those whose docstring, or that of their class, says what they raise: they are the doors, which check what comes in;
    what has no such words is called by them with arguments that are checked.
    """
    found = {}
    for module in pkgutil.walk_packages(mini_impl.__path__, "mini_impl."):
        if ".assets" in module.name:
            continue
        for name, thing in vars(importlib.import_module(module.name)).items():
            own = getattr(thing, "__module__", None) == module.name and not name.startswith("_")
            if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                path = f"{module.name.removeprefix('mini_impl.')}.{name}"
                raises = "Raises" in (inspect.getdoc(thing) or "")
                if raises or inspect.isclass(thing):
                    found[path] = thing
                for method, function in vars(thing).items() if inspect.isclass(thing) else ():
                    function = getattr(function, "__func__", function)
                    door = (method == "forward" and raises) or "Raises" in (inspect.getdoc(function) or "")
                    if inspect.isfunction(function) and door and not method.startswith("_"):
                        found[f"{path}.{method}"] = function
    return found


def doors() -> list[str]:
    """The names of those that say what they raise, or whose class does."""
    return [
        name for name, thing in PUBLIC.items() if "Raises" in (inspect.getdoc(thing) or "") or name.endswith("forward")
    ]


def call(thing: Callable, arguments: dict):
    """The result, read as its user would: the terms of a loss are asked for their values."""
    result = thing(**arguments)
    if isinstance(result, losses.LossTerms):
        result.values()
    return result


# --- what is put out of order -----------------------------------------------------------------------------------------

NUMBERS = (-1, 0, 1, 2, 3, 200, 10**12, 0.5, 1e-40, 1e20, 1e38, -1e38, math.nan, math.inf, -math.inf)
NUMBERS += (np.uint8(3), np.int16(2), np.int64(4), np.float32(0.5), np.float64(math.nan))
OTHERS = (None, True, False, "", "x", b"x", [], (), {}, [1, 2], [1.5], ["a"], object(), torch.zeros(0), torch.ones(()))


def spoilt(value, source: random.Random):
    """Something else in the place of a value."""
    if isinstance(value, Tensor) and value.ndim and value.numel() and source.random() < 0.8:
        return spoilt_tensor(value, source)
    if type(value) in (list, tuple, dict) and value and source.random() < 0.6:  # one thing in it
        places = list(value) if isinstance(value, dict) else range(len(value))
        parts, place = dict(value) if isinstance(value, dict) else list(value), source.choice(places)
        parts[place] = spoilt(parts[place], source)
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, bool) or not isinstance(value, int | float):
        return source.choice(OTHERS if source.random() < 0.7 else NUMBERS)
    return source.choice(NUMBERS if source.random() < 0.7 else OTHERS)


def spoilt_tensor(value: Tensor, source: random.Random):
    """A tensor of another shape, dtype or size of numbers, or with a few numbers spoilt."""
    kinds = (torch.half, torch.bfloat16, torch.double, torch.uint8, torch.int16, torch.long, torch.bool)
    shapes = (lambda x: x[..., :0], lambda x: x[:0], lambda x: x[:1], lambda x: x[None], lambda x: x.flatten())
    shapes += (lambda x: x.sum(), lambda x: x.mT.contiguous().mT if x.ndim > 1 else x, lambda x: x.tolist())
    sizes = (0.0, 1e-40, 1e20, 1e38, -1.0)
    way = source.randrange(4)
    if way == 0:
        return value.to(source.choice(kinds))
    if way == 1:
        return source.choice(shapes)(value)
    if way == 2:
        return value * source.choice(sizes) if value.is_floating_point() else value * source.choice((-1, 0, 1000))
    value = value.detach().clone().contiguous()
    number = source.choice((math.nan, math.inf, -math.inf, 1e20, 0)) if value.is_floating_point() else -1
    value.view(-1)[source.randrange(value.numel())] = number
    return value


# --- what comes back --------------------------------------------------------------------------------------------------


def numbers(thing, depth: int = 0) -> list[float]:
    """Every number in a result: in tensors, tuples, lists and dicts."""
    if isinstance(thing, Tensor):
        return thing.detach().double().flatten().tolist() if thing.is_floating_point() and thing.numel() < 10**6 else []
    if isinstance(thing, float | np.floating):
        return [float(thing)]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, tuple | list) and depth < 4:
        return [number for part in thing for number in numbers(part, depth + 1)]
    return []


def documented(name: str) -> set[str]:
    """The names of the exceptions that the docstrings of a callable, or of its class, speak of."""
    said = "".join(inspect.getdoc(PUBLIC[path]) or "" for path in (name, name.rpartition(".")[0]) if path in PUBLIC)
    return {"TypeError", "ValueError", *re.findall(r"\b(\w+(?:Error|Loss|Filled))\b", said)}


def verdict(name: str, target: Callable, arguments: dict) -> tuple[str, str]:
    """(kind, words) of one call."""
    try:
        result = call(target, arguments)
    except PATIENT:
        return "given up: too large or too slow", ""
    except Exception as error:
        if "allocate memory" in str(error) or "too large" in str(error) or "storage size" in str(error).lower():
            return "given up: too large or too slow", ""
        kinds = {kind.__name__ for kind in type(error).__mro__} - {"Exception"}
        if kinds & documented(name):
            named = any(argument in str(error) for argument in arguments)
            return ("clear error" if named else "error that names no argument"), ""
        return "UNDOCUMENTED", f"{type(error).__name__}: {str(error)[:100]}"
    bad = [number for number in numbers(result) if not math.isfinite(number) and name not in UNREAD]
    if bad and not (name in INFINITE and not any(map(math.isnan, bad))):
        return ("SILENT NAN" if any(map(math.isnan, bad)) else "SILENT INF"), ""
    return "accepted", ""


PUBLIC = public()


def attack(job: tuple[str, int, int]) -> tuple[str, Counter, dict[tuple, str]]:
    """Call one callable `count` times; (its name, how often each verdict, {defect: a way to see it again})."""
    name, seed, count = job
    torch.set_num_threads(1)
    os.chdir(FOLDER)  # where "x" may be a file that is written
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    source, found, defects = random.Random(f"{seed} {name}"), Counter(), {}
    for _ in range(count):
        torch.manual_seed(0)
        target, arguments = CALLS[name]()
        chosen = source.sample(list(arguments), min(len(arguments), source.choice((1, 1, 2))))
        for argument in chosen:
            arguments[argument] = spoilt(arguments[argument], source)
        words = ", ".join(f"{argument}={short(arguments[argument])}" for argument in chosen)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CALL)
        try:
            kind, said = verdict(name, target, arguments)
        except TimeoutError:
            kind, said = "given up: too large or too slow", ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        found[kind] += 1
        if kind.isupper():
            defects.setdefault((kind, said.partition(":")[0], words.partition("=")[0]), f"{words}  {said}")
    return name, found, defects


def short(value) -> str:
    if isinstance(value, Tensor):
        first = value.flatten()[:3].tolist() if value.numel() else []
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {first}"
    return repr(value)[:60]


def main(arguments: list[str] | None = None) -> int:
    """Attack everything; print the figures and each defect; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=28_000)
    parser.add_argument("--only", default="", help="callables with this in their name")
    options = parser.parse_args(arguments)
    if missing := sorted(set(doors()) - CALLS.keys() - SKIPPED.keys()):
        print(f"tests/fuzz_calls.py has no valid call of {', '.join(missing)}")
        return 1
    names = [name for name in CALLS if options.only in name]
    for name in names:
        call(*CALLS[name]())
    start, total, defects = time.monotonic(), Counter(), 0
    jobs = [(name, options.seed, -(-options.calls // len(names))) for name in names]
    with ProcessPoolExecutor(2) as pool:  # raises BrokenProcessPool if a call takes its process with it
        for name, found, own in pool.map(attack, jobs):
            total += found
            defects += len(own)
            for (kind, _, _), words in own.items():
                print(f"{kind}: {name}({words})")
    seconds = time.monotonic() - start
    print(f"{sum(total.values())} calls of {len(names)} callables in {seconds:.0f} s, seed {options.seed}")
    print(f"{len(SKIPPED)} more are not called, for the reasons in tests/fuzz_calls.py")
    for kind, count in sorted(total.items()):
        print(f"{count:8} {kind}")
    return int(defects > 0)


if __name__ == "__main__":
    sys.exit(main())

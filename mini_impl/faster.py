"""What can make a training step faster and leaves its formulas as they are: the model in bfloat16, and compiled.

In "bf16" the model's products are computed in bfloat16, which keeps 8 bits of a factor where float32 keeps 24; a GPU's
tensor cores, and some CPUs, do them many times as fast. Weights, loss, gradients of the weights and Adam stay in
float32, so that a small step is not rounded away. bfloat16 has the exponents of float32: nothing has to be scaled, as
in float16. Source: Micikevicius et al., "Mixed Precision Training", 2018; for bfloat16: Kalamkar et al., 2019.
"""

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mini_impl import checks

PRECISIONS = ("float32", "bf16")


def adam(parameters: Iterable[nn.Parameter], learning_rate: float, precision: str) -> torch.optim.Adam:
    """Adam; with "bf16" in one pass over the weights (`fused`), whose last bits are others."""
    return torch.optim.Adam(parameters, lr=float(learning_rate), fused=precision == "bf16" or None)


def faster(function: Callable, compile: bool, precision: str) -> Callable:
    """A function of tensors with its products in this precision, and compiled; what it returns is in float32.

    function: a model, or a method of one. compile: by torch.compile, which writes code that does several operations at
    one reading, and takes up to a minute for it, once.
    Raises TypeError, ValueError for another precision; RuntimeError, at the first call, without a compiler.
    """
    checks.instance("function", function, Callable, "a model, or another function of tensors")
    checks.flags(compile=compile)
    checks.choice("precision", precision, PRECISIONS)
    made = _compiled(function) if compile else function
    return made if precision == "float32" else _mixed(made)


def _mixed(function: Callable) -> Callable:
    def call(first: Tensor, *others):
        with torch.autocast(first.device.type, torch.bfloat16):
            output = function(first, *others)
        return tree_map(lambda value: value.float() if _half(value) else value, output)

    return call


def _half(value) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _compiled(function: Callable) -> Callable:
    # The package keeps constants, such as positions, with lru_cache; to make them anew in a graph changes nothing.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    made = torch.compile(function)

    def call(*arguments):
        try:
            return made(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            needs = "compile=True needs what torch.compile needs: a C++ compiler for the CPU, Triton for a GPU"
            raise RuntimeError(f"{needs} ({reason})") from error

    return call

"""Kernels for GPUs, written in Triton, each beside the torch function that it takes the place of.

A function of this folder decides at every call whether its kernel or torch computes, by `wanted`: by itself a kernel
runs only on a card on which `make gpu` found it right. The environment decides otherwise: MINI_IMPL_KERNELS=1 asks for
the kernels wherever they can run, MINI_IMPL_KERNELS=0 for torch. Triton is imported when the first kernel runs.
"""

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from inspect import signature

import torch
from torch import Tensor, nn

from mini_impl import results


@cache
def card() -> str | None:
    """The name of the GPU, as CUDA gives it; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def verified() -> list[str]:
    """The names of the cards on which `make gpu` passed, by book/results/gpu.json; none without that file."""
    cards = results.load("gpu")["cards"] if "gpu" in results.names() else {}
    return [name for name, found in cards.items() if found["passed"] is True]


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def wanted(tensor, least: int) -> bool:
    """Whether a kernel is to compute with this tensor.

    least: entries from which on a kernel is worth its start. By itself: a CUDA tensor of so many entries, on a card
    that is in `verified`. With MINI_IMPL_KERNELS=1: any CUDA tensor, and one of the CPU if Triton interprets
    (TRITON_INTERPRET=1). With MINI_IMPL_KERNELS=0: none.
    Never while torch compiles, which fuses by itself, and never for what is no plain tensor.
    Raises ValueError for another MINI_IMPL_KERNELS, ImportError if kernels are asked for and Triton is not installed.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    asked = os.environ.get("MINI_IMPL_KERNELS")
    if asked not in (None, "0", "1"):
        raise ValueError(f"MINI_IMPL_KERNELS must be 0 or 1, or not set; got {asked!r}")
    if asked == "1" and (tensor.is_cuda or (tensor.is_cpu and os.environ.get("TRITON_INTERPRET") == "1")):
        if not _installed():
            raise ImportError('MINI_IMPL_KERNELS=1 asks for kernels, which need Triton: pip install "mini_impl[gpu]"')
        return True
    alone = asked is None and tensor.is_cuda and tensor.numel() >= least
    return alone and _installed() and card() in verified()


def on_gpu(kernel: Callable, least: int) -> Callable[[Callable], Callable]:
    """Decorate a torch function: its lines stay, but where a kernel is wanted for the first argument, that computes.

    kernel: a function of this folder that takes the same arguments. least: as in `wanted`.
    """

    def decorate(function: Callable) -> Callable:
        first = next(iter(signature(function).parameters))

        @wraps(function)
        def choose(*args, **kwargs):
            tensor = args[0] if args else kwargs.get(first)
            return (kernel if wanted(tensor, least) else function)(*args, **kwargs)

        return choose

    return decorate

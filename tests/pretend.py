"""A device that is none: tensors that claim to be elsewhere, but hold their numbers on the CPU.

A test that runs a model on it finds, on any machine, what else goes wrong on a GPU alone:

- an operation on tensors of two devices fails;
- float64 fails, which Apple's GPUs do not have;
- *host waits* are counted. A GPU works through a queue that the host (the Python program) fills ahead of it. If the
  host asks for a number (`item`, `tolist`, `cpu`), or for a result as long as the numbers say (`nonzero`, `unique`, a
  bool mask as an index), it waits until the queue is empty; after that the GPU waits for the host. So it is with an
  index that is on the CPU, or a Python list: it is copied at once. Sending a batch to the device is not counted.

    with pretend.device() as device:
        model.to(device)
        history = history.to(device)
        with pretend.waits() as waits:
            model(history)
        assert len(waits) <= 1, waits

Tensors get there only inside `pretend.device()`. They say that they are on torch's own device "meta", which stores no
numbers; but what torch would do there is never asked for, as they catch every operation.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CLAIMED = torch.device("meta")
PACKAGE = str(Path(__file__).parents[1] / "mini_impl")
# What asks for a number, or for a result as long as the numbers say; eigh and svd ask whether they went well.
WAITING = "_local_scalar_dense equal allclose nonzero masked_select _unique2 unique_dim unique_consecutive bincount"
WAITING = {f"aten::{name}" for name in [*WAITING.split(), "repeat_interleave", "_linalg_eigh", "_linalg_svd"]}
COPIES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

_lists: list[list[str]] = []  # to which a wait is added


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, on which tensors can be made from here on."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # model.to(..) keeps its parameters, as for any device
    try:
        with _Numbers(), _Factories():
            yield CLAIMED
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def waits() -> Iterator[list[str]]:
    """A list of the host waits from here on: each the name of the operation, and the line of the package it is for."""
    _lists.append([])
    try:
        yield _lists[-1]
    finally:
        _lists.pop()


@contextmanager
def uncounted() -> Iterator[None]:
    """Host waits that go into no list."""
    before = _lists[:]
    _lists.clear()
    try:
        yield
    finally:
        _lists[:] = before


class PretendTensor(Tensor):
    """A tensor that claims to be on the device. held: its numbers, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor):
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{held.dtype} on a device that does not have it")
        with torch.inference_mode(False):  # in that mode torch takes views of wrappers amiss
            return Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=CLAIMED
            )

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self):
        _add("tolist")
        return self.held.tolist()

    def __format__(self, how: str) -> str:  # torch does so for tensors that are of no class of their own
        return format(self.item() if self.ndim == 0 else repr(self), how)

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Catches what makes a tensor on the device, too, where no tensor of it is among the arguments."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Sends Python's numbers to the device as tensors of the CPU: torch itself would see "meta", and forget them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == CLAIMED:
            return function(*args, **{**kwargs, "device": "cpu"}).to(CLAIMED)
        if function is Tensor.new_tensor and isinstance(args[0], PretendTensor):
            return args[0].held.new_tensor(*args[1:], **kwargs).to(CLAIMED)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], PretendTensor):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            places = tuple(torch.tensor(place) if isinstance(place, (list, tuple)) else place for place in places)
            args = (args[0], places, *args[2:])
        return function(*args, **kwargs)


def _run(operation, args: tuple, kwargs: dict):
    """One of torch's operations, with the numbers on the CPU and the result where it would be."""
    name, to = operation._schema.name, kwargs.get("device")
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    ours = [value for value in given if isinstance(value, PretendTensor)]
    others = [value for value in given if not isinstance(value, PretendTensor)]
    if not ours and to != CLAIMED:
        return operation(*args, **kwargs)
    if any(value.device == CLAIMED for value in others):
        raise RuntimeError(
            f"{name}: a tensor was moved to the device outside of pretend.device(), and lost its numbers"
        )
    others = [value for value in others if value.ndim]  # a single number is sent along with the operation
    if ours and others and name not in COPIES | INDEXED:
        raise RuntimeError(f"{name}: got tensors of two devices, {CLAIMED} and cpu")
    leaves = (to != CLAIMED) if to is not None else name == "aten::copy_" and not isinstance(args[0], PretendTensor)
    if name in WAITING or (leaves and name in COPIES) or (name in INDEXED and (others or _bool_mask(*args))):
        _add(name.removeprefix("aten::"))

    kwargs = {**kwargs, "device": torch.device("cpu")} if to == CLAIMED else kwargs
    result = operation(*tree_map(_held, args), **tree_map(_held, kwargs))
    if leaves:
        return args[0] if name == "aten::copy_" else result
    changed = [
        kwargs.get(argument.name, args[place] if place < len(args) else None)
        for place, argument in enumerate(operation._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if len(changed) == 1:  # what an operation changes in place it returns: the very tensor that came in
        (tensor,) = changed
        if tensor.shape != tensor.held.shape:  # squeeze_ and the like change what it says of itself, too
            with torch._C._DisableTorchDispatch():
                tensor.as_strided_(tensor.held.shape, tensor.held.stride(), tensor.held.storage_offset())
        return tensor
    return tree_map(lambda value: PretendTensor(value) if isinstance(value, Tensor) else value, result)


def _held(value):
    return value.held if isinstance(value, PretendTensor) else value


def _bool_mask(tensor, places, value=None, *_) -> bool:
    """Whether a mask picks entries: a wait for their number, unless each of them gets the one same value."""
    mask = any(place is not None and place.dtype in (torch.bool, torch.uint8) for place in places)
    return mask and (value is None or value.numel() > 1)


def _add(name: str) -> None:
    """Note a wait, with the line of the package that it is for."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}" if frame else "outside the package"
    for waits in _lists:
        waits.append(f"{name} for {where}")

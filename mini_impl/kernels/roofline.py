"""How long work takes on a GPU at the least: bytes moved over its bandwidth, or arithmetic over its speed.

A GPU computes far faster than it reads: an H100 does 20 operations in float32 in the time that one byte takes. Work
that does less for a byte is memory-bound: its time is that of the bytes, and a kernel that moves fewer of them is
faster by as much. `count` counts what PyTorch moves, one operation after the other; each kernel of this folder says
by formula (`traffic`) what it moves.
Source: Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model", 2009.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# --- what work moves and computes -------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """What some work does to the memory of its device, and how much it computes. a + b: both, one after the other."""

    read: int  # bytes
    written: int  # bytes
    operations: int  # of floating point
    launches: int  # kernels started

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))


def count(work: Callable[[], object]) -> Traffic:
    """What PyTorch's operations in work() move and compute, a backward pass too if it calls one; nothing is measured.

    Every operation reads its tensors once and writes its result once; a view does neither. Of an expanded tensor what
    is stored counts, of a gather the entries that it takes. So it is the least that these operations can move: some
    read twice, and what the cache still holds is read all the same, as larger tensors do not fit.
    operations: 2mnk for a product, k for an average of k entries, else one an entry of what is read or written,
    whichever are more: exp and log count as one, softmax as one an entry. launches: one an operation.
    """
    with _Counter() as counter:
        work()
    return counter.traffic


class _Counter(TorchDispatchMode):
    """Adds up the traffic of the operations that it sees."""

    traffic = Traffic(0, 0, 0, 0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        self.traffic += _traffic(operation, args, kwargs, result)
        return result


def _names(text: str) -> set[str]:
    return {f"aten::{name}" for name in text.split()}


ALLOCATE = _names("empty empty_like empty_strided new_empty new_empty_strided _local_scalar_dense")  # no kernel runs
OVERWRITE = _names("zero_ fill_ copy_")  # what they change they do not read
SHAPE_ALONE = _names("zeros_like ones_like full_like new_zeros new_ones new_full")  # nothing is read
SELF_UNREAD = _names("nll_loss_backward avg_pool2d_backward replication_pad1d_backward")  # of `self`, nothing either
GATHER = _names("gather index index_select embedding nll_loss_forward")  # of the first tensor, the entries taken
MOVE = _names(
    "clone _to_copy cat where masked_fill masked_fill_ index_put index_put_ scatter scatter_ nll_loss_backward"
)
MOVE |= _names("replication_pad1d constant_pad_nd zeros ones full scalar_tensor") | OVERWRITE | SHAPE_ALONE | GATHER


def _traffic(operation, args: tuple, kwargs: dict, result) -> Traffic:
    name = operation._schema.name
    if name in ALLOCATE:
        return Traffic(0, 0, 0, 0)
    read, changed = [], []
    for place, argument in enumerate(operation._schema.arguments):
        value = kwargs.get(argument.name, args[place] if place < len(args) else None)
        given = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        changed += given if writes else []
        unread = (writes and (argument.kwarg_only or name in OVERWRITE)) or name in SHAPE_ALONE  # kwarg_only: out=
        unread |= name in SELF_UNREAD and argument.name == "self"
        read += [] if unread else given
    results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    made = [tensor for tensor in results if tensor.untyped_storage()._cdata not in storages]
    written = changed or made
    if not any(map(Tensor.numel, written)):  # a view, or nothing
        return Traffic(0, 0, 0, 0)

    entries = {_place(tensor): _stored(tensor) for tensor in read}  # one tensor given twice is read once
    if name in GATHER:
        entries[_place(read[0])] = min(_stored(read[0]), max(map(Tensor.numel, [*read[1:], *results])))
    bytes_read = sum(entries[place] * size for place, size in {_place(t): t.element_size() for t in read}.items())
    bytes_written = sum(_stored(tensor) * tensor.element_size() for tensor in written)
    return Traffic(bytes_read, bytes_written, _operations(operation, args, kwargs, result, read + written), 1)


def _place(tensor: Tensor) -> tuple:
    """What two tensors share if they are the same entries."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _stored(tensor: Tensor) -> int:
    """How many entries of memory a tensor shows: an expanded axis shows one again and again, windows may overlap."""
    if not tensor.numel():
        return 0
    axes = [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return min(tensor.numel(), 1 + sum((size - 1) * step for size, step in axes))


def _operations(operation, args: tuple, kwargs: dict, result, tensors: list[Tensor]) -> int:
    """Floating-point operations."""
    from torch.utils.flop_counter import flop_registry  # not above: it imports Triton if that is there

    name = operation._schema.name
    if operation.overloadpacket in flop_registry:  # products, convolutions and attention
        return flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
    if name in MOVE or not any(map(Tensor.is_floating_point, tensors)):
        return 0
    if name.startswith("aten::avg_pool"):  # (series, kernel, ..) -> averages; backward: (their gradients, series, ..)
        kernel, averages = (args[2], args[0]) if name.endswith("backward") else (args[1], result)
        return averages.numel() * math.prod(kernel)
    return max(map(Tensor.numel, tensors))


# --- the least time on a card -----------------------------------------------------------------------------------------


class Card(NamedTuple):
    """A GPU, as its vendor's datasheet gives it."""

    name: str
    bandwidth: float  # of its memory, bytes/s
    arithmetic: float  # float32 operations/s, without tensor cores
    tensor: float  # operations/s of its tensor cores on 16-bit numbers, dense
    memory: int  # bytes
    compute_capability: tuple[int, int]


CARDS = {
    # NVIDIA T4 datasheet, 2019
    "T4": Card("Tesla T4", 320e9, 8.1e12, 65e12, 16 * 10**9, (7, 5)),
    # NVIDIA A100 datasheet, 2021, SXM with 80 GB
    "A100": Card("NVIDIA A100-SXM4-80GB", 2039e9, 19.5e12, 312e12, 80 * 10**9, (8, 0)),
    # NVIDIA H100 datasheet, 2023, SXM
    "H100": Card("NVIDIA H100 80GB HBM3", 3350e9, 67e12, 989e12, 80 * 10**9, (9, 0)),
}


def seconds(traffic: Traffic, card: Card) -> float:
    """The least time of this work on a card: max(bytes / bandwidth, operations / arithmetic), in seconds.

    What a launch costs is not in it, some microseconds each: they matter where the work is small. Operations count as
    float32 ones without tensor cores.
    """
    return max(traffic.moved / card.bandwidth, traffic.operations / card.arithmetic)


def memory_bound(traffic: Traffic, card: Card) -> bool:
    """Whether the bytes take at least as long as the arithmetic."""
    return traffic.moved / card.bandwidth >= traffic.operations / card.arithmetic

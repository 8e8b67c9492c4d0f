"""Several processes that train one model together, each on its own part of every batch.

    torchrun --nproc_per_node 2 -m mini_impl.cli forecast dlinear --device cuda
    accelerate launch --num_processes 2 -m mini_impl.cli finetune sft --device cuda

Both start the same command several times over, and tell each process how many there are and which of them it is. All
have the same weights, draw the same batch and take their own rows of it. What they add up are gradients: the gradient
of a sum is the sum of the gradients, and so every worker takes the same step that one alone would take with the whole
batch. Hugging Face Accelerate (the extra `scale`) does the talking; alone, nothing here asks for it.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mini_impl.losses import LossTerms


def count() -> int:
    """How many workers there are; 1 for a command that was started by itself."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this process is, counted from 0. Number 0 writes the files and prints."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def begin(model: nn.Module) -> None:
    """Meet the other workers, where there are any, and take over the weights of number 0.

    Raises ImportError without Accelerate.
    """
    if count() == 1:
        return
    try:
        from accelerate import PartialState
        from accelerate.utils import broadcast
    except ImportError:
        raise ImportError('several workers need Accelerate: pip install "mini_impl[scale]"') from None
    met = torch.distributed.is_initialized()
    state = PartialState(cpu=next(model.parameters()).device.type == "cpu")
    if not met:
        atexit.register(state.destroy_process_group)  # while there still is a Python to do it
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(_together(broadcast, value))


def place(device: str | torch.device | None) -> str | torch.device | None:
    """The device of this worker, where `device` names a kind of which a machine has several: cuda -> cuda:1."""
    if count() == 1 or device is None or torch.device(device).type != "cuda":
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def rows(total: int) -> slice:
    """The rows that are this worker's of so many: as many as the others', or one more.

    Where there are fewer rows than workers, all of them: each worker then does the whole.
    """
    if total < count():
        return slice(0, total)
    return slice(number() * total // count(), (number() + 1) * total // count())


def share(total: int) -> float:
    """How much of a mean over so many rows this worker's part of it is; those of all workers sum to 1."""
    own = rows(total)
    return 1.0 if count() == 1 else (own.stop - own.start) / total if total >= count() else 1 / count()


def add_up(value: Tensor) -> Tensor:
    """The sum of the tensors that the workers call it with, all of one shape. No gradient flows through it."""
    if count() == 1:
        return value
    from accelerate.utils import reduce

    return _together(lambda tensor: reduce(tensor, "sum"), value.detach())


def of_first(value: float) -> float:
    """The number that worker 0 has: what decides when to stop must be the same everywhere."""
    return collect(value)[0] if count() > 1 else value


def any_signal(signal: int | None) -> int | None:
    """The number of a signal that one of the workers was sent; None if none was."""
    if count() == 1:
        return signal
    return int(max(collect(signal or 0))) or None


def loss_of_all(loss: LossTerms, share: float) -> LossTerms:
    """The loss of the whole batch, of those of its parts, each with its share in the mean."""
    if count() == 1:
        return loss
    total, *terms = add_up(share * torch.stack([loss.total, *loss.terms.values()]))
    return LossTerms(total, dict(zip(loss.terms, terms, strict=True)))


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every .grad the sum of those that the workers have: in one message, as each costs time of its own."""
    if count() == 1:
        return
    parameters = [parameter for parameter in parameters if parameter.grad is not None]  # the same ones everywhere
    total = add_up(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def whole(part: Tensor, total: int) -> Tensor:
    """All `total` rows, of which each worker has its own, those of `rows(total)`; gradients flow to these alone.

    Every worker can then compute the loss of the whole batch, however its parts hang together; what it adds to the
    gradient is what its own rows add. Of fewer rows than workers, which each of them has, each adds an equal share.
    """
    if count() == 1:
        return part
    if total < count():
        return part.detach() + (part - part.detach()) / count()
    own = rows(total)
    padded = part.new_zeros(total, *part.shape[1:])
    padded[own] = part.detach()
    others = add_up(padded)
    return torch.cat([others[: own.start], part, others[own.stop :]])


def collect(part: object) -> list:
    """What each worker calls it with, in the order of their numbers. Tensors in it must be on the CPU."""
    from accelerate.utils import gather_object

    return _together(gather_object, [part])


# --- what a model computes of its whole batch -------------------------------------------------------------------------

_sharing = False  # whether each worker now computes its own rows of one batch, at the same step


@contextmanager
def sharing(total: int) -> Iterator[None]:
    """While it lasts, means over a batch of `total` rows that a model computes inside are those of all workers."""
    global _sharing
    _sharing = 1 < count() <= total  # of fewer rows each worker has all
    try:
        yield
    finally:
        _sharing = False


def batch_mean(rows: Tensor) -> Tensor:
    """The mean over the first axis; no gradient flows through it where workers share the batch."""
    return add_up(rows.sum(0)) / _rows_of_all(rows) if _sharing else rows.mean(0)


def _rows_of_all(rows: Tensor) -> Tensor:
    return add_up(torch.tensor(float(len(rows)), device=rows.device))


class BatchNorm1d(nn.BatchNorm1d):
    """torch's, with the mean and the variance of all workers' rows where these share a batch: [row, width].

    (torch's own SyncBatchNorm does the same on GPUs alone.)
    """

    def forward(self, rows: Tensor) -> Tensor:
        if not (self.training and _sharing):
            return super().forward(rows)
        count = _rows_of_all(rows)
        mean = _AddUp.apply(rows.sum(0)) / count  # [width]
        variance = _AddUp.apply((rows - mean).square().sum(0)) / count  # [width]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return (rows - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class _AddUp(torch.autograd.Function):
    """add_up with its gradient: each worker's loss depends on the sum, and so on what every worker put into it."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return add_up(value)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        return add_up(upstream)


def _together(call: Callable, value):
    try:
        return call(value)
    except RuntimeError as error:  # the words of gloo or NCCL
        what = f"the workers cannot add up what they have ({str(error).strip().splitlines()[0]})"
        raise RuntimeError(f"{what}; if one of them was killed, start the same command again to go on") from error

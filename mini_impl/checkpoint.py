"""Trainings that go on where they were broken off: their state in one safetensors file, which is replaced in one step.

One file, since two cannot be replaced at the same instant. No pickle: reading a checkpoint runs no code.
"""

import functools
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, ValuesView
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from mini_impl import checks
from mini_impl.losses import NonFiniteLoss

KEY = "mini_impl"  # a safetensors header holds {text: text}; ours is one entry, the JSON of the state


# --- files ------------------------------------------------------------------------------------------------------------


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file so that at any instant the old one or the new one is there whole, never a part.

    A link is followed; what is no ordinary file (/dev/null, say) is written to and not replaced.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_checkpoint(path: Path | str, tensors: dict[str, Tensor], state: dict) -> None:
    """Write tensors and a JSON-able state to one file, atomically.

    Raises TypeError if the state holds something that JSON has no form for, ValueError if it holds NaN or infinity.
    """
    # Copies: safetensors takes no two tensors that share memory, as tied weights do.
    whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_bytes(path, save(whole, metadata={KEY: json.dumps(state, allow_nan=False)}))


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Read (tensors, state), tensors on the CPU. Raises OSError for no file, ValueError for a file of another kind."""
    with Path(path).open("rb"):  # Python says what is wrong with a path in better words than safetensors
        pass
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            state = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    if state is None:
        raise ValueError(f"{path} is a safetensors file, but not one that mini_impl wrote: its header has no {KEY!r}")
    return tensors, json.loads(state)


# --- a training and its file ------------------------------------------------------------------------------------------


class Run:
    """A training and the file that it goes on from. Without a path nothing is kept, and there is nothing to go on from.

    optimizer: Adam, whose memory is kept with what `save` is given.
    settings: {name: value} of what may not change in between: what JSON holds, and what `describe` has words for.
    """

    def __init__(self, path: Path | str | None, optimizer: torch.optim.Optimizer, settings: dict):
        self.path, self.optimizer = path, optimizer
        self.settings = {} if path is None else json.loads(json.dumps(settings, default=describe))

    def restore(self, **wanted: int) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
        """(groups, state) as `save` was given them last, once Adam has its memory back; None if there is no file yet.

        wanted: epochs=10 or steps=100, how many the whole training is to have.
        Raises ValueError for a file of another training, naming what differs, or of a longer one.
        """
        if self.path is None or not Path(self.path).exists():
            return None
        tensors, state = load_checkpoint(self.path)
        then = state.get("settings", {})
        for name, value in self.settings.items():
            if then.get(name) != value:
                differs = f"its {name} was {then.get(name)!r}, now it is {value!r}"
                raise ValueError(f"{self.path} is of another training: {differs}; delete it, or give another file")
        for name, value in wanted.items():
            checks.integer(f"{name}, some of which {self.path} has already,", value, least=state["done"])
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            group, name = key.split("/", 1)
            groups[group][name] = value
        memory: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in groups.pop("optimizer", {}).items():
            number, name = key.split("/")
            memory[int(number)][name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": memory})
        return groups, state

    def save(self, groups: dict[str, dict[str, Tensor]], *, done: int, **state) -> None:
        """Replace the file by one with these tensors, {group: {name: tensor}}, and a state that JSON holds.

        done: the epochs or steps that are behind.
        """
        if self.path is None:
            return
        memory = self.optimizer.state_dict()["state"]
        adam = {f"{number}/{name}": value for number, values in memory.items() for name, value in values.items()}
        groups = {**groups, "optimizer": adam}
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        save_checkpoint(self.path, tensors, {"settings": self.settings, "done": done, **state})


def describe(thing) -> object:
    """How another process can tell whether a setting is the same: what JSON has no form for, in words.

    A function by its name, with the arguments that functools.partial gave it; a model part by part, and another object,
    by their kinds and plain attributes such as sizes and rates; a tensor, or all values of a dict of them, by a
    fingerprint.
    """
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, Tensor | ValuesView):
        digest = hashlib.sha256()
        for tensor in [thing] if isinstance(thing, Tensor) else thing:
            digest.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    if isinstance(thing, functools.partial):
        given = [*map(_text, thing.args), *(f"{name}={_text(value)}" for name, value in sorted(thing.keywords.items()))]
        return f"{describe(thing.func)}({', '.join(given)})"
    if isinstance(thing, nn.Module):
        return {f"{name} ({type(part).__qualname__})": _plain(part) for name, part in thing.named_modules()}
    if callable(thing):
        return getattr(thing, "__qualname__", type(thing).__qualname__)
    return {"kind": type(thing).__qualname__, **_plain(thing)}


def _text(value) -> str:
    return describe(value) if callable(value) else repr(value)


def _plain(thing) -> dict[str, str]:
    plain = (bool, int, float, str)
    return {key: repr(value) for key, value in vars(thing).items() if isinstance(value, plain) and key != "training"}


# --- what every training does -----------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module, device: torch.device | str | None = None) -> dict[str, nn.Parameter]:
    """Put a model on a device (None: it stays where it is); return its parameters that need a gradient, by name.

    Raises ValueError for a device that cannot be used, or if there is no such parameter.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("model has no parameter to train")
    if device is not None:
        model.to(checks.device("device", device))
    return trained


def progress_bar(passes: Iterable, what: str, progress: bool | None, **options) -> Iterable:
    """The passes, with a bar while they are gone through. progress: whether it is shown; None: if there is a terminal.

    options: tqdm's, such as initial and total.
    """
    return tqdm(passes, what, leave=False, disable=None if progress is None else not progress, **options)


def note(curves: dict[str, list[float]], values: dict[str, float]) -> None:
    """Put each value at the end of the curve of its name."""
    for name, value in values.items():
        curves.setdefault(name, []).append(value)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say where a training was when a number in it came out NaN or infinite."""
    try:
        yield
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"training stopped {where}: {error}") from error

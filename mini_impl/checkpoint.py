"""Files that are whole or not there, and trainings that go on from them where they were broken off.

A checkpoint is one safetensors file, since two cannot be replaced at the same instant. No pickle: reading it runs no
code. It carries a checksum of all its bytes: one that was damaged is not taken for another model.
"""

import errno
import functools
import glob
import hashlib
import json
import os
import secrets
import signal
import stat
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, ValuesView
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

import mini_impl
from mini_impl import checks, workers
from mini_impl.losses import NonFiniteLoss

KEY = "mini_impl"  # a safetensors header holds {text: text}; ours is one entry, the JSON of the checksum and the state
BLANK = "0" * 64  # what stands in the place of the checksum while it is computed
SECONDS = 60  # at most so many of a training are lost when it is killed
CHECKSUM = rb"{\"sha256\": \""  # what stands before it, as JSON in JSON


# --- files ------------------------------------------------------------------------------------------------------------


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file so that at any instant the old one or the new one is there whole, never a part.

    The new one has the mode of the old. A link at `path` is followed; what is no ordinary file (/dev/null, say) is
    written to and not replaced.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with _part(path) as part:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A new empty file beside `path`, of a name that nobody else has, with its mode; removed at the end.

    So are those that a process left which is no longer there: it was killed while it wrote.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if os.name == "posix" and (owner := left.name.split(".")[-3]).isdecimal() and not _runs(int(owner)):
            left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.part")
    part.touch(exist_ok=False)
    try:
        if path.exists():
            part.chmod(stat.S_IMODE(path.stat().st_mode))
        yield part
    finally:
        part.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks whether it is there, and does nothing to it
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def check_writable(name: str, path: Path | str) -> None:
    """Try whether a file can be written there: to be known before a long computation, not after it.

    name: of the option that asks for it, for the message. Raises OSError.
    """
    target = Path(path).resolve()
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if target.is_file() or not target.exists():
            with _part(target):
                pass
    except OSError as error:  # FileExistsError: a file is in the place of a folder
        raise OSError(f"{name}: {path} cannot be written ({error.strerror})") from None


def save_checkpoint(path: Path | str, tensors: dict[str, Tensor], state: dict) -> None:
    """Write tensors and a JSON-able state to one file, atomically, with a checksum.

    Raises TypeError if the state holds something that JSON has no form for, ValueError if it holds NaN or infinity;
    OSError.
    """
    checks.instance("tensors", tensors, dict, "a dict of tensors by name")
    for name, tensor in tensors.items():
        checks.instance(f"tensors[{name!r}]", tensor, Tensor, "a tensor")
    # Copies: safetensors takes no two tensors that share memory, as tied weights do.
    whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    text = json.dumps({"sha256": BLANK, **state}, allow_nan=False, default=np.generic.item)  # numbers of numpy
    content = bytearray(save(whole, metadata={KEY: text}))
    place = content.index(CHECKSUM) + len(CHECKSUM)
    content[place : place + 64] = _checksum(content, place).encode()
    write_bytes(path, content)


def _checksum(content: bytes | bytearray, place: int) -> str:
    """The sha256 of a file whose checksum, which begins at `place`, is BLANK."""
    digest = hashlib.sha256(content[:place])
    digest.update(BLANK.encode())
    digest.update(memoryview(content)[place + 64 :])
    return digest.hexdigest()


def load_checkpoint(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Read (tensors, state), tensors on the CPU.

    Raises OSError for no file; ValueError for a file of another kind, or one whose bytes have changed.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    state, place = header.get("__metadata__", {}).get(KEY), content.find(CHECKSUM) + len(CHECKSUM)
    if state is None:
        raise ValueError(f"{path} is a safetensors file, but not one that mini_impl wrote: its header has no {KEY!r}")
    if content[place : place + 64] != _checksum(content, place).encode():
        raise ValueError(f"{path} is damaged: its checksum is not that of its bytes")
    return tensors, {name: value for name, value in json.loads(state).items() if name != "sha256"}


def check_layers(path: Path | str, weights: dict[str, Tensor], settings: dict) -> None:
    """Raise ValueError if settings in a file ask for more layers than it has weights: to make those takes long."""
    if isinstance(layers := settings.get("layers"), int) and layers > len(weights):
        raise ValueError(f"{path} holds {len(weights)} weights, too few for the {layers} layers that it describes")


def check_weights(path: Path | str, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raise ValueError unless the weights in a file are those of a model, which may be on the meta device."""
    shapes, wanted = ({name: value.shape for name, value in part.items()} for part in (weights, model.state_dict()))
    if shapes != wanted:
        raise ValueError(f"{path} holds other weights than those of a {type(model).__name__} as it describes it")


# --- a training and its file ------------------------------------------------------------------------------------------


class Run:
    """A training and the file that it goes on from. Without a path nothing is kept, and there is nothing to go on from.

    with Run(path, optimizer, settings, save_every) as run: `run.restore` once, then `run.step` after every step.
    optimizer: Adam, whose memory is kept with the rest.
    settings: {name: value} of what may not change in between: what JSON holds, and what `describe` has words for.
    save_every: steps from one writing of the file to the next, beside those that the training asks for; None: whenever
    a minute has gone by.

    While it runs nobody else can train into the file: BlockingIOError. SIGTERM, SIGHUP (its terminal was closed) and
    the first Ctrl-C let the step end, write the file, and then end the training, by SystemExit(128 + the signal) and
    KeyboardInterrupt. Of several workers the first writes the file, all read it, and all end after the same step.
    """

    def __init__(
        self, path: Path | str | None, optimizer: torch.optim.Optimizer, settings: dict, save_every: int | None = None
    ):
        checks.integers(save_every=1 if save_every is None else save_every)
        self.path = None if path is None else Path(path).resolve()
        self.optimizer, self.save_every = optimizer, save_every
        self.settings = {} if path is None else json.loads(json.dumps(settings, default=describe))
        self.written = time.monotonic()  # when the file was written last
        self.signal: int | None = None  # that asks the training to end
        self.handlers: dict = {}

    def __enter__(self) -> "Run":
        if self.path is None:
            return self
        if workers.number() == 0:
            self._lock()
        if threading.current_thread() is threading.main_thread():  # Python takes signals there alone
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # not on Windows
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self.handlers[number] = handler
                    signal.signal(number, self._stop)
        return self

    def _lock(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(f"{self.path}.lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(f"{self.path} is in use: another training writes it now") from None

    def _stop(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, self.handlers[number])  # a second one does not wait

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.path is not None and workers.number() == 0:
            with suppress(OSError):  # Windows removes no open file, but filelock does when it has closed it
                Path(self.lock.lock_file).unlink()  # first, or it may be another training's by now
            self.lock.release()

    def restore(self, **wanted: int) -> tuple[dict[str, dict[str, Tensor]], dict] | None:
        """(groups, state) as they were saved last, once Adam has its memory back; None if there is no file yet.

        wanted: epochs=10 or steps=100, how many the whole training is to have.
        Raises ValueError for a file of another training, naming what differs, or of a longer one. Warns where only the
        versions, the device or the number of threads differ: the bits may then be those of neither.
        """
        if self.path is None or not self.path.exists():
            return None
        tensors, state = load_checkpoint(self.path)
        if not {"settings", "made_with", "done"} <= state.keys():
            raise ValueError(f"{self.path} holds no training to go on from; give another file")
        for name, value in self.settings.items():
            if (then := state["settings"].get(name)) != value:
                differs = f"its {name} was {then!r}, now it is {value!r}"
                raise ValueError(f"{self.path} is of another training: {differs}; delete it, or give another file")
        for name, value in self._made_with().items():
            if (then := state["made_with"].get(name)) != value:
                result = "the result may differ in its last digits from a training without a break"
                warnings.warn(f"{self.path} was written with {name} {then}, now it is {value}: {result}", stacklevel=3)
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

    def _made_with(self) -> dict[str, str | int]:
        """What may change the last bits of a training, beside its settings."""
        device = self.optimizer.param_groups[0]["params"][0].device.type
        threads = torch.get_num_threads()
        return {"mini_impl": mini_impl.__version__, "torch": torch.__version__, "device": device, "threads": threads}

    def step(self, number: int, snapshot: Callable[[], tuple[dict, dict]], due: bool = False) -> None:
        """After a step: replace the file if it is due, and end the training if a signal asked for it.

        number: of steps that are behind. snapshot: returns what `save` is given, (groups, state).
        """
        if self.path is None:
            return
        ending = workers.any_signal(self.signal)
        if self.save_every is None:
            due = due or time.monotonic() - self.written >= SECONDS
        elif number % self.save_every == 0:
            due = True
        if due or ending is not None:
            self.save(*snapshot())
            self.written = time.monotonic()
        if ending is not None:
            raise KeyboardInterrupt if ending == signal.SIGINT else SystemExit(128 + ending)

    def save(self, groups: dict[str, dict[str, Tensor]], state: dict) -> None:
        """Replace the file by one with these tensors, {group: {name: tensor}}, and a state that JSON holds.

        state["done"]: the epochs or steps that are behind.
        """
        if workers.number():
            return
        memory = self.optimizer.state_dict()["state"]
        adam = {f"{number}/{name}": value for number, values in memory.items() for name, value in values.items()}
        groups = {**groups, "optimizer": adam}
        tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        save_checkpoint(self.path, tensors, {"settings": self.settings, "made_with": self._made_with(), **state})


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

    Raises TypeError; ValueError for a device that cannot be used, or if there is no such parameter.
    """
    checks.instance("model", model, nn.Module, "an nn.Module")
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
    checks.choice("progress", progress, (None, True, False))
    hidden = None if progress is None else not progress
    return tqdm(passes, what, leave=False, disable=sys.stderr is None or workers.number() > 0 or hidden, **options)


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

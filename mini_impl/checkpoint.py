"""Files that a killed run can go on from: tensors and JSON in one safetensors file, replaced in one step.

One file, since two cannot be replaced at the same instant. No pickle: reading a checkpoint runs no code.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

KEY = "mini_impl"  # a safetensors header holds {text: text}; ours is one entry, the JSON of the state


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
    """Read (tensors, state), tensors on the CPU. Raises FileNotFoundError; ValueError for a file of another kind."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a checkpoint is one file; {path} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            state = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
    if state is None:
        raise ValueError(f"{path} is a safetensors file, but not one that mini_impl wrote: its header has no {KEY!r}")
    return tensors, json.loads(state)


# --- going on with a training -----------------------------------------------------------------------------------------


def same_settings(checkpoint: Path | str, then: dict | None, now: dict) -> None:
    """Raise ValueError, naming what differs, if a checkpoint is of another training than the one that is to go on."""
    if not isinstance(then, dict):
        raise ValueError(f"{checkpoint} was not written by a training: it holds no settings of one")
    for name, value in now.items():
        if then.get(name) != value:
            raise ValueError(
                f"{checkpoint} is of another training: its {name} was {then.get(name)!r}, now it is {value!r}; "
                "give another file, or delete this one to start anew"
            )


def tensor_group(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """The tensors named "GROUP/NAME", as {NAME: tensor}."""
    return {name.removeprefix(f"{group}/"): value for name, value in tensors.items() if name.startswith(f"{group}/")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's memory as {"parameter number/name": tensor}."""
    state = optimizer.state_dict()["state"]
    return {f"{number}/{name}": value for number, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give Adam its memory back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""Files of other people: downloaded once into the user's cache folder, or where MINI_IMPL_DATA says."""

import hashlib
import os
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from mini_impl.checkpoint import write_bytes

LARGEST = 2**24  # bytes that a download may have, unless it is said
SLOWEST = 2**15  # bytes a second that it must have in the long run; beyond half a minute


def fetch(url: str, name: str, sha256: str, limit: int = LARGEST) -> Path:
    """The path of a file.

    name: its place in the folder: "ETTh1.csv", "SmolLM2-135M-Instruct/tokenizer.json".
    sha256: of its content; another content is refused. limit: bytes that it may have.
    If the environment variable MINI_IMPL_DATA is set, it is the file itself or the folder that it is in; else the
    folder is the user's cache, and the file is downloaded into it unless it is there. A download that was cut leaves
    nothing behind.
    Raises FileNotFoundError if MINI_IMPL_DATA leads to no file, ValueError for another content, ConnectionError if the
    download fails, is too large or too slow.
    """
    if given := os.environ.get("MINI_IMPL_DATA"):
        path = Path(given).expanduser()
        path = path / name if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"MINI_IMPL_DATA is {given!r}, but there is no file {path}")
        _check_content(path.read_bytes(), sha256, name, path)
        return path

    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini_impl" / name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    content, start = bytearray(), time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            while piece := response.read1(2**20):
                content += piece
                if len(content) > limit:
                    raise OSError(f"it is larger than {limit} bytes")
                if time.monotonic() - start > 30 + len(content) / SLOWEST:
                    raise OSError(f"it is slower than {SLOWEST} bytes a second")
    except (OSError, HTTPException) as error:
        advice = f"if you have {name}, set the environment variable MINI_IMPL_DATA to the folder that holds it"
        raise ConnectionError(f"could not download {url} ({error}); {advice}") from error
    _check_content(bytes(content), sha256, name, url)
    write_bytes(path, bytes(content))
    return path


def _check_content(content: bytes, sha256: str, name: str, where: str | Path) -> None:
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{where} is not {name} as published: its sha256 is {got}, not {sha256}")

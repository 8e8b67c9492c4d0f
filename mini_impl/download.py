"""Files of other people: downloaded once into the user's cache folder, or where MINI_IMPL_DATA says."""

import hashlib
import os
import urllib.request
from http.client import HTTPException
from pathlib import Path

from mini_impl.checkpoint import write_bytes


def fetch(url: str, name: str, sha256: str | None = None) -> Path:
    """The path of a file.

    name: its place in the folder: "ETTh1.csv", "SmolLM2-135M-Instruct/tokenizer.json".
    sha256: of its content, where that is known; another content is refused.
    If the environment variable MINI_IMPL_DATA is set, it is the folder or, where its content can be told, the file
    itself; else the folder is the user's cache, and the file is downloaded into it unless it is there. A download that
    was cut leaves nothing behind.
    Raises FileNotFoundError if MINI_IMPL_DATA leads to no file, ValueError for another content, ConnectionError if the
    download fails.
    """
    if given := os.environ.get("MINI_IMPL_DATA"):
        path = Path(given).expanduser()
        path = path / name if path.is_dir() or sha256 is None else path
        if not path.is_file():
            raise FileNotFoundError(f"MINI_IMPL_DATA is {given!r}, but there is no file {path}")
        if sha256 is not None:
            _check_content(path.read_bytes(), sha256, name, path)
        return path

    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini_impl" / name
    if path.is_file() and (sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256):
        return path
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()  # in one piece, so that a cut answer is an error
    except (OSError, HTTPException) as error:
        advice = f"if you have {name}, set the environment variable MINI_IMPL_DATA to the folder that holds it"
        raise ConnectionError(f"could not download {url} ({error}); {advice}") from error
    if sha256 is not None:
        _check_content(content, sha256, name, url)
    write_bytes(path, content)
    return path


def _check_content(content: bytes, sha256: str, name: str, where: str | Path) -> None:
    if (got := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(f"{where} is not {name} as published: its sha256 is {got}, not {sha256}")

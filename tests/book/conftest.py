"""The sites, built once: the book itself, and a small book that has addresses and every feature a page may use."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from books import ADDRESS, BASE, PAGES, ROOT, STRICT, build, make_notebooks, run, small_book


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of a parallel run have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Have the first worker that needs a folder make it; the others wait."""
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def assets(shared) -> None:
    """MathJax, fetched if it is not there yet."""

    def fetch(_: Path) -> None:
        done = run(sys.executable, ROOT / "book" / "tools" / "assets.py", cwd=ROOT)
        assert done.status == 0, done.output

    once(shared / "assets", fetch)


def build_strictly(root: Path) -> Callable[[Path], None]:
    """Build a book's site from clean; any warning is an error."""

    def make(folder: Path) -> None:
        done = build(root, folder, *STRICT)
        assert done.status == 0, done.output

    return make


@pytest.fixture(scope="session")
def sites(shared) -> Path:
    """The folder that holds both sites, so that one server serves them."""
    (shared / "sites").mkdir(exist_ok=True)
    return shared / "sites"


@pytest.fixture(scope="session")
def site(assets, sites) -> Path:
    """The book's own site."""
    return once(sites / "book", build_strictly(ROOT)) / "_build" / "html"


@pytest.fixture(scope="session")
def demo_root(assets, shared) -> Path:
    """The small book's root, with its notebooks made."""

    def make(folder: Path) -> None:
        root = small_book(folder, *(PAGES / f"{name}.md" for name in ("index", "lone", "demo")), url=ADDRESS, base=BASE)
        done = make_notebooks(root)
        assert done.status == 0, done.output

    return once(shared / "demo", make)


@pytest.fixture(scope="session")
def demo_site(demo_root, sites) -> Path:
    return once(sites / "demo", build_strictly(demo_root)) / "_build" / "html"

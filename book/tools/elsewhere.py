"""Run pages and tests with the versions that readers have: Colab's, or the oldest that pyproject.toml promises.

    .venv/bin/python book/tools/elsewhere.py colab
    .venv/bin/python book/tools/elsewhere.py oldest dlinear sft

Each page is run as a reader on Colab runs it: its notebook alone in an empty folder, in an environment that has no
mini_impl until the set-up cell of the first page installs it, from a repository that is made of this copy of the book.
That cell may add the package and its Chinese font, and change nothing. nbval then compares the outputs of every page
with the stored ones, and the tests of the package run: --tests says which. What is printed last is "ok", or what was
wrong.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import nbformat
import notebooks

ROOT = Path(__file__).parents[2]
PYTHON = {"colab": "3.13", "oldest": "3.11"}
ADDED = {"mini-impl", "zhplot"}  # by the set-up cell
# What runs pages and tests; the versions do not matter to the book.
TOOLS = ("ipykernel", "nbval", "pytest", "pytest-xdist", "hypothesis", "beautifulsoup4", "check-jsonschema", "pyyaml")
ALSO = {"colab": (), "oldest": ("ipywidgets",)}
NBVAL = ("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300")
# These test the site, the grader and the set-up, which readers and students elsewhere do not have.
LEFT_OUT = ("tests/book", "tests/grading", "tests/test_project.py", "tests/test_publishing.py")
# The kernels are promised from Triton 3.6 on, and the oldest torch brings 3.1.
NOT_PROMISED = {"colab": (), "oldest": ("tests/kernels",)}
PARTS = {"all": (), "quick": ("-m", "not slow")}


class ElsewhereError(Exception):
    """What was wrong, in a sentence."""


def wanted(kind: str) -> list[str]:
    """The packages of an environment with their exact versions."""
    if kind == "colab":
        text = (ROOT / "constraints-colab.txt").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [one.replace(">=", "==") for one in project["dependencies"]]


def find_python(version: str) -> str:
    """A Python of this version: one on the path, or one of pyenv's. Raises ElsewhereError if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    there = sorted(map(str, pyenv.glob(f"{version}.*/bin/python3")))
    for python in [shutil.which(f"python{version}"), *there]:
        # pyenv's own python3.13 on the path may be one that says only that no 3.13 was chosen
        if python and subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return python
    raise ElsewhereError(f"there is no Python {version} here: install one, with pyenv for example")


def call(*command, cwd: Path = ROOT) -> None:
    """Run a command in one thread, without this copy of the book on its path. Raises ElsewhereError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if subprocess.run(list(map(str, command)), cwd=cwd, env=environment | one_thread).returncode:
        raise ElsewhereError(f"this failed: {' '.join(map(str, command))}")


def make_environment(folder: Path, kind: str) -> Path:
    """An environment with the wanted versions and without mini_impl, made anew if these changed. Returns its Python."""
    python, stamp = folder / "bin" / "python", folder / "wanted.txt"
    packages = [*wanted(kind), *TOOLS, *ALSO[kind]]
    if not stamp.exists() or stamp.read_text() != "\n".join(packages):
        call(find_python(PYTHON[kind]), "-m", "venv", "--clear", folder)
        # Most of these files are never imported, so none is compiled before it is.
        call(python, "-m", "pip", "install", "--quiet", "--no-compile", *packages)
        stamp.write_text("\n".join(packages))
    call(python, "-m", "pip", "uninstall", "--quiet", "--yes", *ADDED)
    return python


def installed(python: Path) -> dict[str, str]:
    """The packages of an environment and their versions."""
    run = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in json.loads(run.stdout)}


def snapshot(folder: Path) -> notebooks.Repository:
    """A repository with the files of this copy as they are now, and the tag of their version."""
    git = ["git", "-c", "user.name=book", "-c", "user.email=book@localhost"]
    listed = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    # Python 3.11's own pip takes no address without a host.
    book = notebooks.repository()._replace(url=f"file://localhost{folder.as_posix()}")
    call(*git, "init", "--quiet", "--initial-branch", book.branch, cwd=folder)
    call(*git, "add", "--all", "--force", cwd=folder)
    call(*git, "commit", "--quiet", "--message", "The book", cwd=folder)
    call(*git, "tag", book.tag, cwd=folder)
    return book


def lone_pages(folder: Path, names: list[str], book: notebooks.Repository) -> list[Path]:
    """The notebook of each page and language, alone in a folder of its own. Returns these folders."""
    folders = []
    shutil.copy(ROOT / "book" / "conftest.py", folder)
    for name in names:
        for language in notebooks.LANGUAGES:
            page = nbformat.read(notebooks.notebook_path(name, language), as_version=4)
            for cell in page.cells:
                cell.source = notebooks.setup_cell(language, book).source if cell["id"] == "setup" else cell.source
            folders.append(folder / f"{name}-{language}")
            folders[-1].mkdir()
            nbformat.write(page, folders[-1] / f"{name}.ipynb")
    return folders


def run_pages(python: Path, names: list[str], workers: int) -> None:
    """Run the pages; the first of them alone, since it installs the package. Raises ElsewhereError."""
    before = installed(python)
    with tempfile.TemporaryDirectory(prefix="book-") as place:
        (Path(place) / "book").mkdir()
        (Path(place) / "pages").mkdir()
        first, *rest = lone_pages(Path(place) / "pages", names, snapshot(Path(place) / "book"))
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NBVAL]
        call(*pytest, first, cwd=first)
        if changed := dict(before.items() - installed(python).items()):
            raise ElsewhereError(f"the set-up cell changed {changed}")
        if (added := set(installed(python)) - set(before)) != ADDED:
            raise ElsewhereError(f"the set-up cell is to install {sorted(ADDED)}, and installed {sorted(added)}")
        if rest:
            call(*pytest, "-n", workers, "--dist", "loadscope", *rest, cwd=Path(place))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PYTHON, help="Colab's versions, or the oldest that are promised")
    parser.add_argument("pages", nargs="*", metavar="NAME", help="a page, book/src/NAME.md (default: every page)")
    parser.add_argument(
        "--tests", choices=(*PARTS, "none"), default="all", help="quick: those that take five seconds at most"
    )
    parser.add_argument("--workers", type=int, default=2, help="how many pages or tests run at a time (default: 2)")
    parser.add_argument("--environment", type=Path, help="where it is or will be (default: _build/KIND)")
    arguments = parser.parse_args()
    pages = sorted(path.stem for path in notebooks.source_path("x").parent.glob("*.md"))
    if unknown := sorted(set(arguments.pages) - set(pages)):
        parser.error(f"no page {', '.join(unknown)}; the pages are {', '.join(pages)}")
    # A page without code installs nothing, so that it cannot be the first.
    computing = [name for name in arguments.pages or pages if code_of(name)]
    if not computing:
        parser.error("a page without code says nothing here")
    folder = arguments.environment or ROOT / "_build" / arguments.kind
    try:
        python = make_environment(folder.resolve(), arguments.kind)
        run_pages(python, computing, arguments.workers)
        if arguments.tests != "none":
            without = [f"--ignore={path}" for path in LEFT_OUT + NOT_PROMISED[arguments.kind]]
            pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", arguments.workers]
            call(*pytest, *PARTS[arguments.tests], "tests", *without)
    except ElsewhereError as error:
        print(f"elsewhere: {error}", file=sys.stderr)
        return 1
    print("ok")
    return 0


def code_of(name: str) -> list:
    return notebooks.code_cells(nbformat.read(notebooks.notebook_path(name, "en"), as_version=4).cells)


if __name__ == "__main__":
    sys.exit(main())

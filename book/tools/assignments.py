"""One bilingual source, book/assignments/NAME.md, becomes an assignment: what students get, and what teachers keep.

Written to _build/assignments/NAME, or below --out:
  student/{en,zh}/NAME.ipynb    the notebook to hand out
  offline/{en,zh}/NAME.ipynb    the same, with what it needs of mini_impl in it: for a class without a network
  solution/{en,zh}/NAME.ipynb   the same with its solutions
  grading/                      assignment.json and questions.py, for book/grading/grader.py
  gradescope.zip                all that Gradescope grades by; upload it as it is
  otter/{en,zh}/NAME.ipynb      with --otter: a source for otter-grader, which cannot stand cheats (otter_source.py)

A source is written as the pages are (see notebooks.py). Its code cells are tagged
- `solution`, with `stub`: the student finds the stub, with comments `# English | 中文`, in the place of the cell;
- `public`: a check that both have;
- `hidden`: questions that only the grader has, in English; all of them together are one Python file.
Its header, `assignment`, gives the title, the modules of mini_impl that hold the answer (`withheld`), the grader's
limits, and what it is tested by (tests/grading/submissions.py), the common mistakes among it.
"""

import argparse
import copy
import hashlib
import io
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).parents[1] / "grading"))
sys.path.insert(0, str(Path(__file__).parent))

import otter_source
import portable
from notebooks import (
    LANGUAGES,
    ROOT,
    PageError,
    Repository,
    code_cells,
    keep_comments,
    repository,
    setup_cell,
    tagged,
    with_cells,
    write,
)
from stripped import strip

SOURCES = ROOT / "book" / "assignments"
GRADER = ROOT / "book" / "grading"
KINDS = ("solution", "public", "hidden")
SECRET = 20  # characters from which on a line of a solution must not occur in a student's notebook


class Assignment:
    """A source that was read. Raises PageError for one that is not as described above."""

    def __init__(self, name: str):
        self.name = name
        source = jupytext.read(SOURCES / f"{name}.md", fmt="md:myst")
        header = source.metadata.get("assignment", {})
        self.settings = {key: header.get(key) for key in ("title", "withheld", "limits")}
        self.tested = {key: header.get(key) for key in ("answers", "needed", "by_gradient", "imports", "mistakes")}
        self.cells = source.cells
        if sorted(self.settings["title"] or {}) != list(LANGUAGES) or not self.settings["withheld"]:
            raise self.error("its header, `assignment`, gives `title`, {en: ..., zh: ...}, and `withheld`")
        if missing := [key for key, value in self.tested.items() if value is None]:
            raise self.error(f"its header, `assignment`, lacks {', '.join(missing)}, by which it is tested")
        prose = [cell.metadata.get("lang") for cell in self.cells if cell.cell_type == "markdown"]
        if prose != list(LANGUAGES) * (len(prose) // 2):
            raise self.error("each English cell of prose is followed by the Chinese")
        for cell in code_cells(self.cells):
            kinds = [kind for kind in KINDS if tagged(cell, kind)]
            if len(kinds) > 1 or tagged(cell, "solution") != ("stub" in cell.metadata):
                raise self.error(f"a cell has one kind, and a solution a stub: {cell.source[:60]!r}")

    def error(self, what: str) -> PageError:
        return PageError(f"book/assignments/{self.name}.md: {what}")

    def notebook(self, language: str, solved: bool, book: Repository) -> NotebookNode:
        """The notebook of one language, with its solutions or with blanks."""
        cells = [copy.deepcopy(cell) for cell in self.cells if not tagged(cell, "hidden")]
        cells = [cell for cell in cells if cell.metadata.pop("lang", language) == language]
        for number, cell in enumerate(cells):
            stub = cell.metadata.pop("stub", None)
            if stub is not None and not solved:
                cell.source = stub.rstrip("\n")
            if cell.cell_type == "code":
                cell.source = keep_comments(cell, self.name, language)
                cell.metadata = NotebookNode()
            cell["id"] = hashlib.sha256(f"{number} {self.name}".encode()).hexdigest()[:12]
        setup = setup_cell(language, book)
        setup.metadata = NotebookNode()
        cells.insert(1, setup)
        notebook = with_cells(cells, None)
        nbformat.validate(notebook)
        if not solved:
            self.check_secret(nbformat.writes(notebook))
        return notebook

    def check_secret(self, text: str) -> None:
        """Raise PageError if a line of a solution, or of a hidden question, stands in what a student gets."""
        lines = {line.strip() for cell in code_cells(json_cells(text)) for line in cell.source.split("\n")}
        public = {line.strip() for cell in code_cells(self.cells) for line in cell.metadata.get("stub", "").split("\n")}
        for cell in code_cells(self.cells):
            if tagged(cell, "solution") or tagged(cell, "hidden"):
                for line in map(str.strip, cell.source.split("\n")):
                    if len(line) >= SECRET and line in lines and line not in public:
                        raise self.error(f"a student would find this line of a solution or question: {line!r}")

    @property
    def written(self) -> dict[str, str]:
        """Of each function that students write, the solution's cell."""
        solutions = [cell.source for cell in code_cells(self.cells) if tagged(cell, "solution")]
        defined = {match[1]: cell for cell in solutions if (match := re.search(r"^def (\w+)", cell, re.MULTILINE))}
        defined = {name: cell for name, cell in defined.items() if name in self.tested["needed"]}
        if missing := sorted(set(self.tested["needed"]) - set(defined)):
            raise self.error(
                f"`needed` names the first function of a solution; there is none that begins with {missing}"
            )
        return defined

    @property
    def unmarked(self) -> list[str]:
        """The code cells that students find as they are: imports and data."""
        code = code_cells(self.cells)
        return [cell.source for cell in code if not any(tagged(cell, kind) for kind in KINDS)]

    def mistaken(self, mistake: dict) -> dict[str, str]:
        """{function: the solution's cell with a mistake in it}."""
        right = self.written[mistake["in"]]
        if mistake["old"] not in right:
            raise self.error(f"the solution of {mistake['in']} has no {mistake['old']!r} to be mistaken")
        return {mistake["in"]: right.replace(mistake["old"], mistake["new"])}

    def questions(self) -> str:
        """The hidden cells as one file."""
        return "\n\n".join(cell.source for cell in code_cells(self.cells) if tagged(cell, "hidden")) + "\n"

    def grading(self) -> dict[str, str]:
        """The files of the grading folder."""
        settings = {key: value for key, value in self.settings.items() if value is not None}
        stated = json.dumps({"name": self.name} | settings, ensure_ascii=False)
        return {"assignment.json": stated, "questions.py": self.questions()}

    def carried(self) -> dict[str, bytes]:
        """The package that the offline notebook carries: what the grader's worker has, so it holds no answer."""
        with tempfile.TemporaryDirectory() as folder:
            strip(ROOT / "mini_impl", Path(folder), self.settings["withheld"])
            paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.suffix != ".pyc"]
            stripped = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return stripped | {name: data for name, data in portable.package().items() if "dist-info" in name}

    def gradescope(self, index: str | None) -> bytes:
        """The zip file for Gradescope, which has the same bytes whenever the sources have.

        index: the address of an index of packages that pip is to look into beside its own.
        """
        wanted = [f"--extra-index-url {index}"] if index else []
        files = {path.name: path.read_bytes() for path in (GRADER / "setup.sh", GRADER / "run_autograder")}
        files |= {f"book/grading/{path.name}": path.read_bytes() for path in sorted(GRADER.glob("*.py"))}
        files |= {f"grading/{name}": text.encode() for name, text in self.grading().items()}
        files |= portable.package()
        files["constraints.txt"] = (ROOT / "constraints.txt").read_bytes()
        files["requirements.txt"] = "\n".join([*wanted, *portable.project()["dependencies"], ""]).encode()
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name)
                entry.create_system = 3  # Unix, which reads the permissions
                entry.external_attr = (0o100755 if name in ("setup.sh", "run_autograder") else 0o100644) << 16
                archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
        return made.getvalue()

    def write(self, out: Path, index: str | None = None) -> None:
        book, carried = repository(), self.carried()
        for language in LANGUAGES:
            student, solution = (as_json(self.notebook(language, solved, book)) for solved in (False, True))
            offline = portable.portable(student, language, carried)
            for kind, notebook in {"student": student, "offline": offline, "solution": solution}.items():
                write(out / kind / language / f"{self.name}.ipynb", as_text(notebook))
        for name, text in self.grading().items():
            write(out / "grading" / name, text)
        half = out / "gradescope.zip.half"
        half.write_bytes(self.gradescope(index))
        half.replace(out / "gradescope.zip")

    def write_otter(self, out: Path) -> None:
        for language in LANGUAGES:
            notebook = otter_source.otter_source(self, language, setup_cell(language, repository()))
            write(out / "otter" / language / f"{self.name}.ipynb", as_text(as_json(notebook)))


def as_json(notebook: NotebookNode) -> dict:
    return json.loads(nbformat.writes(notebook))


def as_text(notebook: dict) -> str:
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def json_cells(text: str) -> list[NotebookNode]:
    return nbformat.reads(text, as_version=4).cells


def names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.md") if re.fullmatch(r"[a-z_]+", path.stem))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assignments", nargs="*", metavar="NAME", help="book/assignments/NAME.md (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "assignments")
    parser.add_argument(
        "--index", metavar="URL", help="where Gradescope is to look for packages too: PyTorch's CPU index"
    )
    parser.add_argument("--otter", action="store_true", help="write a source for otter-grader instead")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.assignments) - set(names())):
        parser.error(f"no assignment {', '.join(unknown)}; there are {', '.join(names())}")
    try:
        for name in arguments.assignments or names():
            if arguments.otter:
                Assignment(name).write_otter(arguments.out / name)
            else:
                Assignment(name).write(arguments.out / name, arguments.index)
            print(arguments.out / name)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.otter:
        print(otter_source.WARNING["en"], otter_source.WARNING["zh"], sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One bilingual source, book/assignments/NAME.md, becomes an assignment: what students get, and what teachers keep.

Written to _build/assignments/NAME, or below --out:
  student/{en,zh}/NAME.ipynb    the notebook to hand out
  solution/{en,zh}/NAME.ipynb   the same with its solutions
  grading/                      assignment.json and questions.py, for book/grading/grader.py

A source is written as the pages are (see notebooks.py). Its code cells are tagged
- `solution`, with `stub`: the student finds the stub, with comments `# English | 中文`, in the place of the cell;
- `public`: a check that both have;
- `hidden`: questions that only the grader has, in English; all of them together are one Python file.
Its header, `assignment`, gives the title, the modules of mini_impl that hold the answer (`withheld`), and the grader's
limits.
"""

import argparse
import copy
import hashlib
import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).parent))

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

SOURCES = ROOT / "book" / "assignments"
KINDS = ("solution", "public", "hidden")
SECRET = 20  # characters from which on a line of a solution must not occur in a student's notebook


class Assignment:
    """A source that was read. Raises PageError for one that is not as described above."""

    def __init__(self, name: str):
        self.name = name
        source = jupytext.read(SOURCES / f"{name}.md", fmt="md:myst")
        self.settings = {key: source.metadata.get("assignment", {}).get(key) for key in ("title", "withheld", "limits")}
        self.cells = source.cells
        if sorted(self.settings["title"] or {}) != list(LANGUAGES) or not self.settings["withheld"]:
            raise self.error("its header, `assignment`, gives `title`, {en: ..., zh: ...}, and `withheld`")
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

    def questions(self) -> str:
        """The hidden cells as one file."""
        return "\n\n".join(cell.source for cell in code_cells(self.cells) if tagged(cell, "hidden")) + "\n"

    def write(self, out: Path) -> None:
        book = repository()
        for language in LANGUAGES:
            for kind in ("student", "solution"):
                notebook = self.notebook(language, kind == "solution", book)
                text = json.dumps(json.loads(nbformat.writes(notebook)), ensure_ascii=False, indent=1, sort_keys=True)
                write(out / kind / language / f"{self.name}.ipynb", text + "\n")
        settings = {key: value for key, value in self.settings.items() if value is not None}
        write(out / "grading" / "assignment.json", json.dumps({"name": self.name} | settings, ensure_ascii=False))
        write(out / "grading" / "questions.py", self.questions())


def json_cells(text: str) -> list[NotebookNode]:
    return nbformat.reads(text, as_version=4).cells


def names() -> list[str]:
    return sorted(path.stem for path in SOURCES.glob("*.md") if re.fullmatch(r"[a-z_]+", path.stem))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assignments", nargs="*", metavar="NAME", help="book/assignments/NAME.md (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "assignments")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.assignments) - set(names())):
        parser.error(f"no assignment {', '.join(unknown)}; there are {', '.join(names())}")
    try:
        for name in arguments.assignments or names():
            Assignment(name).write(arguments.out / name)
            print(arguments.out / name)
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

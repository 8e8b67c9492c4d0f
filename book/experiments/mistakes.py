"""What a student is told of the common mistakes in each assignment: book/results/mistakes.json.

Each mistake of the header of book/assignments/NAME.md is put into the solution and the notebook run in both languages,
up to the check below that function; what the check prints is kept. Seconds of one core.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch
from _rows import RESULTS, write

from mini_impl.classroom import RIGHT
from mini_impl.language import use_language

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "book" / "tools"))

import assignments  # noqa: E402

NAME = "mistakes"


def told(assignment: assignments.Assignment, mistake: dict, language: str) -> str:
    """What the check below a function prints if there is this mistake in it."""
    use_language(language)
    torch.manual_seed(0)
    changed, names = assignment.mistaken(mistake), {}
    functions = {source: name for name, source in assignment.written.items()}
    for cell in assignments.code_cells(assignment.cells):
        if assignments.tagged(cell, "hidden"):
            continue
        below = assignments.tagged(cell, "public") and mistake["in"] in names
        function = functions.get(cell.source)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(changed.get(function, cell.source), names)
        if below:  # there may be several checks, of which some find nothing
            said = [line for line in printed.getvalue().splitlines() if line != RIGHT.said()]
            return " ".join(dict.fromkeys(said)) or RIGHT.said()
    raise assignment.error(f"there is no check below {mistake['in']}")


def rows(names: list[str]) -> dict[str, dict]:
    found = {}
    for name in names:
        assignment = assignments.Assignment(name)
        for number, mistake in enumerate(assignment.tested["mistakes"]):
            found[f"{name} {number}"] = {
                "assignment": name,
                "function": mistake["in"],
                "mistake": {language: mistake[language] for language in assignments.LANGUAGES},
                "told": {language: told(assignment, mistake, language) for language in assignments.LANGUAGES},
                "lost": mistake["lost"],
            }
    return found


if __name__ == "__main__":
    write(RESULTS / f"{NAME}.json", rows(assignments.names()))

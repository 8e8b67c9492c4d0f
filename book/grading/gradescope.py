"""Grades what was submitted to Gradescope:  python gradescope.py GRADING SUBMISSION RESULTS

run_autograder starts it in Gradescope's container. RESULTS/results.json appears whole, when all is graded. Where the
grader itself fails there is none: then Gradescope says that the autograder failed, shows what was printed to the
teacher, and gives no score, which is what is true.

The hidden inputs are drawn by the submitted file: the same file meets the same inputs, so that grading it again, there
or with grader.py and the seed in the results, changes nothing. A file that was changed meets others, so that it is of
no use to send inputs to oneself and to answer them by heart.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import grader
from sandbox import Limits

TOTAL = 480.0  # seconds; Gradescope ends what takes ten minutes, unless it is told otherwise
NUMBER = (
    "Submit exactly one notebook, a file that ends in .ipynb. This submission has {found}, so nothing was graded.\n"
    "请只提交一个笔记本（以 .ipynb 结尾的文件）。这次提交里有 {found} 个，因此没有批改。"
)


def main() -> int:
    grading, submission, out = map(Path, sys.argv[1:])
    (out / "results.json").unlink(missing_ok=True)
    notebooks = [path for path in sorted(submission.rglob("*.ipynb")) if path.is_file() and not unmeant(path)]
    results = grade(grading, notebooks[0]) if len(notebooks) == 1 else refused(len(notebooks))
    grader.write(out / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
    return 0


def unmeant(path: Path) -> bool:
    """Whether Jupyter made this file for itself, or a Mac when it made a zip file."""
    return ".ipynb_checkpoints" in path.parts or path.name.startswith("._")


def grade(grading: Path, notebook: Path) -> dict:
    assignment, _ = grader.load_questions(grading)
    limits = Limits(**assignment.get("limits", {}))
    limits = limits._replace(total=min(limits.total, TOTAL))
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder) / "submissions" / notebook.name
        alone.parent.mkdir()
        shutil.copyfile(notebook, alone)
        seed = int(grader.digest(alone)[:8], 16)
        (results,) = grader.grade_folder(grading, alone.parent, Path(folder) / "out", 1, seed, limits).values()
    return results


def refused(found: int) -> dict:
    words = NUMBER.format(found=found)
    return {"score": 0, "output": words, "output_format": "text", "stdout_visibility": "hidden", "tests": []}


if __name__ == "__main__":
    sys.exit(main())

"""Grades a folder of notebooks:  python book/grading/grader.py GRADING SUBMISSIONS --out FOLDER

GRADING is a folder of `make assignments`: assignment.json, and questions.py with the hidden questions. A question is a
function of a `Student`, whose functions it calls, and of a random generator, from which it draws its inputs anew; it
raises Wrong, or returns. Expected values and hidden inputs never leave this process.

FOLDER gets scores.csv, and of each submission results/NAME.json (Gradescope's form) and reports/NAME.md, in the
student's language. A run that was stopped goes on where it was; a notebook that changed is graded again.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import secrets
import select
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from sandbox import UNSHUT, Limits, Sandbox  # noqa: E402
from stripped import strip  # noqa: E402

from mini_impl.classroom import NOTHING, RIGHT, UNANSWERED, Words, diagnose, failed  # noqa: E402

LARGEST = 20_000_000  # bytes of a submission
STARTING = 120  # seconds for Python and torch, which no cell is blamed for
DEADLY_CELLS = 3  # cells that may kill the worker, each of which is left out from then on


class Wrong(Exception):
    """An answer is wrong; says in what way, in both languages."""

    def __init__(self, words: Words):
        super().__init__(words.en)
        self.words = words


class Died(Exception):
    """The worker is gone: it ended by itself, took too long, or talked nonsense."""


class Question(NamedTuple):
    """A hidden question."""

    part: str
    points: float
    title: Words
    ask: Callable[["Student", np.random.Generator], None]


QUESTIONS: list[Question] = []


def question(part: str, points: float, en: str, zh: str) -> Callable:
    """Register the function below as a hidden question, worth so many points."""

    def register(ask: Callable) -> Callable:
        QUESTIONS.append(Question(part, points, Words(en, zh), ask))
        return ask

    return register


# ---- The student's side


class Worker:
    """A process with the student's names in it, which answers within so many seconds or is dead."""

    def __init__(self, sandbox: Sandbox):
        self.sandbox, self.number, self.buffer = sandbox, 0, bytearray()
        self.process = sandbox.start()
        os.set_blocking(self.process.stdin.fileno(), False)
        os.set_blocking(self.process.stdout.fileno(), False)

    def close(self) -> None:
        self.sandbox.kill(self.process)

    def ask(self, do: str, seconds: float, arrays: Sequence[np.ndarray] = (), **head):
        """Yield the replies to a request, (head, arrays) each; the last one is for the caller to know. Raises Died."""
        self.number += 1
        blobs = [written(array) for array in arrays]
        head = {"id": self.number, "do": do, "sizes": [len(blob) for blob in blobs], **head}
        deadline = time.monotonic() + seconds
        self.send(json.dumps(head).encode() + b"\n" + b"".join(blobs), deadline)
        while True:
            line = self.take(deadline, None)
            try:
                answer = json.loads(line)
                sizes = [int(size) for size in answer["sizes"]]
                if answer["id"] != self.number or min([0, *sizes]) < 0 or sum(sizes) > self.sandbox.limits.reply:
                    raise ValueError("out of turn")
            except (ValueError, TypeError, KeyError, RecursionError):
                raise Died from None
            yield answer, [numbers(self.take(deadline, size)) for size in sizes]

    def send(self, message: bytes, deadline: float) -> None:
        file, left = self.process.stdin.fileno(), memoryview(message)
        while left:
            if not select.select([], [file], [], max(0, deadline - time.monotonic()))[1]:
                raise Died
            try:
                left = left[os.write(file, left) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Died from None

    def take(self, deadline: float, size: int | None) -> bytes:
        """The next `size` bytes, or with None the next line."""
        file = self.process.stdout.fileno()
        while True:
            end = self.buffer.find(b"\n") + 1 if size is None else size
            if len(self.buffer) >= end and (size is not None or end):
                piece = bytes(self.buffer[:end])
                del self.buffer[:end]
                return piece
            if size is None and len(self.buffer) > 2**16:
                raise Died
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:  # a flood has its deadline too
                raise Died
            piece = os.read(file, 2**20)
            if not piece:
                raise Died
            self.buffer += piece


def written(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def numbers(blob: bytes) -> np.ndarray | None:
    """The array of a .npy file that a student's process wrote; None unless it is one of plain numbers, just as long."""
    file = io.BytesIO(blob)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        rest = blob[file.tell() :]
        size = 1
        for length in shape:
            size *= length
        if dtype.kind not in "fiub" or dtype.itemsize > 8 or len(shape) > 8 or size * dtype.itemsize != len(rest):
            return None
        flat = np.frombuffer(rest, dtype)
        return flat.reshape(shape, order="F" if fortran else "C").astype(np.float64)
    except Exception:  # whatever a header can be made to raise
        return None


class Student:
    """A submission as the questions see it: functions that can be called, and numbers that can be asked for.

    A worker that dies is followed by another one, whose cells run again without the cell that killed it.
    """

    def __init__(self, cells: list[str], sandbox: Sandbox):
        self.notebook, self.sandbox, self.worker = cells, sandbox, None
        self.deadly: list[int] = []
        self.errors: dict[str, dict] = {}
        self.end = time.monotonic() + sandbox.limits.total

    def call(self, name: str, *arguments: Any) -> list[np.ndarray | None]:
        """What a function returns for these arrays and numbers. Raises Wrong if it raises or its worker dies."""
        return self._ask("call", name, arguments)[1]

    def gradients(self, name: str, *arguments: Any, by: Sequence[int]) -> tuple[list, list]:
        """(what a function returns, the gradients of its sum by the arguments at these places)."""
        head, results = self._ask("call", name, arguments, by)
        missing = head.get("missing")
        if missing:
            raise Wrong(
                Words(
                    "No gradient flows back from it to its inputs (.item(), .detach(), .numpy() or no_grad?).",
                    "梯度传不回输入（是不是用了 .item()、.detach()、.numpy() 或 no_grad？）。",
                )
            )
        split = max(0, len(results) - len(by))
        return results[:split], results[split:]

    def value(self, name: str) -> np.ndarray | None:
        """The number or array of this name."""
        try:
            results = self._ask("value", name)[1]
        except Wrong as wrong:
            raise (Wrong(UNANSWERED) if wrong.words == NOTHING else wrong) from None
        return results[0] if len(results) == 1 else None

    def remarks(self) -> list[Words]:
        """What the student is told of the cells that failed, and of those that had to be left out."""
        said = [
            Words(
                f"Code cell {n + 1} ended its process, or took too long.",
                f"第 {n + 1} 个代码单元格使进程退出，或运行太久。",
            )
            for n in self.deadly
        ]
        for number, error in list(self.errors.items())[:20]:
            what = f"{plain(error.get('error'))}: {plain(error.get('message'))}" if isinstance(error, dict) else ""
            n = int(number) + 1 if str(number).isdecimal() and len(str(number)) < 6 else "?"
            said.append(Words(f"Code cell {n} failed. {what}", f"第 {n} 个代码单元格出错。{what}"))
        return said

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None

    def _ask(self, do: str, name: str, arguments: Sequence[Any] = (), by: Sequence[int] = ()):
        self._start()
        try:
            seconds = min(self.sandbox.limits.call, self.end - time.monotonic())
            arrays = [np.asarray(argument) for argument in arguments]
            head, results = next(self.worker.ask(do, seconds, arrays, name=name, of=list(by)))
        except Died:
            self.close()
            raise Wrong(
                Words(
                    "Its process ended, or did not answer in time: an endless loop, too much memory, or an exit?",
                    "运行它的进程退出了，或者没有按时返回：是不是有死循环、占用内存过多，或者调用了退出？",
                )
            ) from None
        if "error" in head:
            kind, message = plain(head["error"]), plain(head.get("message", ""))
            if kind == "KeyError" and message.strip("'") == name:
                raise Wrong(Words(f"There is no `{name}` in the notebook.", f"笔记本里没有 `{name}`。"))
            raise Wrong(failed(kind, message))
        return head, results

    def _start(self) -> None:
        """Have a worker with the notebook's names. Raises Wrong if cells kill every one."""
        while self.worker is None:
            if len(self.deadly) > DEADLY_CELLS or time.monotonic() > self.end:
                raise Wrong(
                    Words(
                        "The notebook cannot be run: its cells end the process, or take too long.",
                        "笔记本无法运行：它的单元格使进程退出，或者运行太久。",
                    )
                )
            self.worker, running = Worker(self.sandbox), None
            try:
                next(self.worker.ask("hello", STARTING))
                seconds = min(self.sandbox.limits.cells, self.end - time.monotonic())
                for head, _ in self.worker.ask("cells", seconds, cells=self.notebook, skip=self.deadly):
                    if isinstance(head.get("errors"), dict):
                        self.errors = head["errors"]
                        break
                    running = head.get("begins")
            except Died:
                self.close()
                if not isinstance(running, int) or not 0 <= running < len(self.notebook):
                    self.end = 0.0  # what cannot be blamed on one cell ends the notebook
                else:
                    self.deadly.append(running)


def plain(text: Any) -> str:
    """A student's words as one line of harmless text."""
    return re.sub(r"[^\w .,:;()\[\]'=+*/%-]", " ", str(text))[:300]


# ---- What questions use


def agree(
    got: Sequence[np.ndarray | None],
    wanted: Sequence[Any],
    axes: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Raise Wrong, with what is wrong, unless the results are the wanted ones."""
    wrong = diagnose(got, [np.asarray(want, dtype=np.float64) for want in wanted], axes, names)
    if wrong:
        raise Wrong(wrong)


def near(got: np.ndarray | None, wanted: float, relative: float) -> None:
    """Raise Wrong unless one number is within a share of what is wanted."""
    if got is None or got.size != 1 or not abs(got.item() - wanted) <= relative * abs(wanted):
        raise Wrong(Words("This number is not right.", "这个数不对。"))


# ---- A submission, and a folder of them


class Graded(NamedTuple):
    """The result of one question."""

    question: Question
    earned: float
    words: Words


def read_cells(path: Path) -> tuple[list[str], str]:
    """(the code cells of a notebook, its language). Raises Wrong if the file is none."""
    no_notebook = Wrong(Words("This file is no notebook.", "这个文件不是笔记本。"))
    if path.stat().st_size > LARGEST:
        raise no_notebook
    try:
        notebook = json.loads(path.read_text("utf-8"))
        cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        cells = ["".join(cell) for cell in cells]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise no_notebook from None
    chinese = any(re.search(r"""use_language\(["']zh["']\)""", cell) for cell in cells)
    return cells, "zh" if chinese else "en"


def grade(
    path: Path, sandbox: Sandbox, questions: Sequence[Question], seed: int, name: str
) -> tuple[list[Graded], str, list[Words]]:
    """Ask a submission all questions. Returns (the results, its language, what is to be said of its cells)."""
    try:
        cells, language = read_cells(path)
    except Wrong as wrong:
        return [Graded(question, 0, wrong.words) for question in questions], "en", []
    student, results = Student(cells, sandbox), []
    try:
        for number, question in enumerate(questions):
            random = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
            try:
                question.ask(student, random)
                results.append(Graded(question, question.points, RIGHT))
            except Wrong as wrong:
                results.append(Graded(question, 0, wrong.words))
    finally:
        student.close()
    return results, language, student.remarks()


def gradescope(results: Sequence[Graded], language: str, remarks: Sequence[Words], seconds: float, extra: dict) -> dict:
    """The results in the form of Gradescope's results.json."""
    said = "zh" if language == "zh" else "en"
    tests = [
        {
            "name": f"{result.question.part}: {getattr(result.question.title, said)}",
            "score": result.earned,
            "max_score": result.question.points,
            "status": "passed" if result.earned == result.question.points else "failed",
            "output": getattr(result.words, said),
            "output_format": "text",
            "visibility": "visible",
        }
        for result in results
    ]
    score = round(sum(test["score"] for test in tests), 6)
    return {
        "score": score,
        "execution_time": round(seconds),
        "output": "\n".join(getattr(words, said) for words in remarks),
        "output_format": "text",
        "stdout_visibility": "hidden",
        "tests": tests,
        "extra_data": extra | {"language": language},
    }


def report(name: str, title: str, results: dict) -> str:
    """A page for the student, in the student's language."""
    chinese = results["extra_data"]["language"] == "zh"
    most = sum(test["max_score"] for test in results["tests"])
    lines = [f"# {title}", "", f"{name}: {results['score']:g} / {most:g}", ""]
    lines += ["| 题目 | 得分 | 说明 |" if chinese else "| question | points | what was found |", "|---|---|---|"]
    for test in results["tests"]:
        found = test["output"].replace("|", " ").replace("\n", " ")
        lines.append(f"| {test['name']} | {test['score']:g} / {test['max_score']:g} | {found} |")
    lines += [f"\n- {remark}" for remark in results["output"].splitlines()]
    seed = results["extra_data"]["seed"]
    lines += ["", f"批改所用的随机种子：{seed}" if chinese else f"Seed of the hidden inputs: {seed}"]
    return "\n".join(lines) + "\n"


def harmless(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return "'" + text if text[:1] in "=+-@\t\r" else text


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text, "utf-8")
    half.replace(path)


def load_questions(folder: Path) -> tuple[dict, list[Question]]:
    """(assignment.json, the questions of questions.py)."""
    assignment = json.loads((folder / "assignment.json").read_text("utf-8"))
    QUESTIONS.clear()
    sys.modules.setdefault("grader", sys.modules[__name__])
    code = (folder / "questions.py").read_text("utf-8")
    exec(compile(code, str(folder / "questions.py"), "exec"), {"__name__": "questions"})
    return assignment, list(QUESTIONS)


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def grade_folder(
    grading: Path,
    submissions: Path,
    out: Path,
    workers: int = 2,
    seed: int | None = None,
    limits: Limits | None = None,
    kind: str | None = None,
) -> dict[str, dict]:
    """Grade every notebook below a folder that has not been graded. Returns {name: results in Gradescope's form}.

    seed: of the hidden inputs; None: that of the run that this one goes on with, else a new one.
    limits: None: those of the assignment. kind: of Sandbox.
    """
    assignment, questions = load_questions(grading)
    paths = [path for path in sorted(submissions.rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
    notebooks = {str(path.relative_to(submissions).with_suffix("")): path for path in paths}
    state = out / "run.json"
    if seed is None:
        seed = json.loads(state.read_text())["seed"] if state.exists() else secrets.randbelow(2**32)
    write(state, json.dumps({"seed": seed}))
    assigned = digest(grading / "assignment.json", grading / "questions.py")
    done = {}
    for name, path in notebooks.items():
        try:
            earlier = json.loads((out / "results" / f"{name}.json").read_text("utf-8"))
            extra = earlier["extra_data"]
        except (OSError, ValueError, KeyError):
            continue
        if (extra["submission"], extra["assignment"], extra["seed"]) == (digest(path), assigned, seed):
            done[name] = earlier
    package = Path(tempfile.mkdtemp(prefix="grading-"))
    try:
        strip(ROOT / "mini_impl", package, assignment["withheld"])
        if len(done) < len(notebooks):
            sandbox = Sandbox(package, limits or Limits(**assignment.get("limits", {})), kind)
            if UNSHUT[sandbox.kind]:
                print(UNSHUT[sandbox.kind], file=sys.stderr)

        def one(name: str) -> None:
            began = time.monotonic()
            extra = {"submission": digest(notebooks[name]), "assignment": assigned, "seed": seed}
            results, language, remarks = grade(notebooks[name], sandbox, questions, seed, name)
            extra["sandbox"] = sandbox.kind
            done[name] = gradescope(results, language, remarks, time.monotonic() - began, extra)
            write(out / "results" / f"{name}.json", json.dumps(done[name], ensure_ascii=False, indent=1))
            print(f"{name}: {done[name]['score']:g}", flush=True)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, [name for name in notebooks if name not in done]))
    finally:
        shutil.rmtree(package, ignore_errors=True)
    finish(out, assignment, questions, done)
    return done


def finish(out: Path, assignment: dict, questions: Sequence[Question], done: dict[str, dict]) -> None:
    """Write all files again from memory, when every student's process is gone: none can have written them over."""
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(["name", "score", *(f"{each.part}: {each.title.en} {each.title.zh}" for each in questions)])
    for name, results in sorted(done.items()):
        rows.writerow([harmless(name), f"{results['score']:g}", *(f"{test['score']:g}" for test in results["tests"])])
        write(out / "results" / f"{name}.json", json.dumps(results, ensure_ascii=False, indent=1))
        title = assignment["title"][results["extra_data"]["language"]]
        write(out / "reports" / f"{name}.md", report(name, title, results))
    write(out / "scores.csv", "\ufeff" + table.getvalue())  # by that mark Excel knows UTF-8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grading", type=Path, help="the grading folder of an assignment")
    parser.add_argument("submissions", type=Path, help="a folder of notebooks; folders in it are looked through")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="of the hidden inputs (default: a new one, which is stored)")
    arguments = parser.parse_args()
    done = grade_folder(arguments.grading, arguments.submissions, arguments.out, arguments.workers, arguments.seed)
    print(f"{len(done)} graded: {arguments.out / 'scores.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What `make assignments` writes beside the notebooks: a zip for Gradescope, offline notebooks, a source for otter."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "book" / "grading"), str(ROOT / "book" / "tools"), str(ROOT / "tests" / "book")]

import assignments  # noqa: E402
import grader  # noqa: E402
import portable  # noqa: E402
from books import LANGUAGES, run  # noqa: E402
from notebooks import repository  # noqa: E402
from sandbox import NOBODY, Limits, Sandbox  # noqa: E402
from stripped import strip  # noqa: E402
from test_portable import RUN, bare, offline  # noqa: E402, F401

ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="the grader needs pipes of Unix")
ASSIGNMENT = assignments.Assignment("dlinear")
WITHHELD = [f"mini_impl/{name.replace('.', '/')}.py" for name in ASSIGNMENT.settings["withheld"]]


def notebook(*cells: str) -> dict:
    made = [{"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": x} for x in cells]
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def made(language: str, solved: bool) -> dict:
    return assignments.as_json(ASSIGNMENT.notebook(language, solved, repository()))


def handed_out(language: str, solved: bool) -> dict:
    """The offline notebook, as students get it or with the solutions filled in."""
    return portable.portable(made(language, solved), language, ASSIGNMENT.carried())


# ---- The zip


@pytest.fixture(scope="module")
def archive():
    return zipfile.ZipFile(io.BytesIO(ASSIGNMENT.gradescope(None)))


def test_the_zip_has_what_gradescope_wants_where_it_wants_it(archive):
    names = archive.namelist()
    assert {"setup.sh", "run_autograder", "requirements.txt", "constraints.txt", "grading/questions.py"} <= set(names)
    modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in archive.infolist()}
    assert {name for name, mode in modes.items() if mode == 0o755} == {"setup.sh", "run_autograder"}
    assert set(modes.values()) == {0o755, 0o644}, "another account has to read the worker"
    assert archive.read("run_autograder").startswith(b"#!/usr/bin/env bash\n")
    assert not [name for name in names if "__pycache__" in name or name.startswith(("book/assignments", "tests"))]


@ON_UNIX
@pytest.mark.parametrize("name", ["setup.sh", "run_autograder"])
def test_the_scripts_are_bash(archive, name, tmp_path):
    (tmp_path / name).write_bytes(archive.read(name))
    done = run("bash", "-n", name, cwd=tmp_path)
    assert done.status == 0, done.output
    assert b"://" not in archive.read(name)


def test_every_package_that_is_installed_is_pinned(archive):
    pins = archive.read("constraints.txt").decode()
    wanted = archive.read("requirements.txt").decode().split()
    assert len(wanted) > 3 and "--extra-index-url" not in wanted
    for name in wanted:
        assert re.search(rf"^{re.match('[a-z]+', name)[0]}==", pins, re.MULTILINE), name
    there = zipfile.ZipFile(io.BytesIO(ASSIGNMENT.gradescope("https://example.org/cpu"))).read("requirements.txt")
    assert there.decode().splitlines() == ["--extra-index-url https://example.org/cpu", *wanted]


def test_the_same_sources_give_the_same_zip(archive):
    again = assignments.Assignment("dlinear").gradescope(None)
    assert archive.fp.getvalue() == again


def test_all_that_is_made_of_an_assignment_is_written(archive, tmp_path):
    ASSIGNMENT.write(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    kinds = [f"{kind}/{x}/dlinear.ipynb" for kind in ("student", "offline", "solution") for x in LANGUAGES]
    assert files == {*kinds, "grading/assignment.json", "grading/questions.py", "gradescope.zip"}
    assert (tmp_path / "gradescope.zip").read_bytes() == archive.fp.getvalue()
    for name in ("assignment.json", "questions.py"):
        assert (tmp_path / "grading" / name).read_bytes() == archive.read(f"grading/{name}")
    for language in LANGUAGES:
        page = (tmp_path / "offline" / language / "dlinear.ipynb").read_text("utf-8")
        assert json.loads(page)["cells"] and len(page.encode()) < portable.LARGEST


# ---- Gradescope's container


def python_for_all() -> str:
    """This Python, or one like it that another account can start as well."""
    mine = os.path.realpath(sys.executable)
    alike = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return next((python for python in (mine, alike) if reached(python)), mine)


def reached(*paths: str) -> bool:
    """Whether another account can read all of these; only root can try that."""
    if os.name != "posix" or os.geteuid() != 0:
        return False
    look = [["test", "-r", path] for path in paths]
    return not any(subprocess.run(test, user=NOBODY, group=NOBODY, extra_groups=[]).returncode for test in look)


@pytest.fixture(scope="module")
def container(archive):
    """Gradescope's folders, with the zip unpacked as setup.sh leaves it; where another account can get to them."""
    folder = Path(tempfile.mkdtemp(prefix="autograder-"))
    folder.chmod(0o755)
    for entry in archive.infolist():
        path = Path(archive.extract(entry, folder / "source"))
        path.chmod(entry.external_attr >> 16)
    # What setup.sh makes, with the packages that are here already.
    subprocess.run([python_for_all(), "-m", "venv", "--without-pip", folder / "source" / "python"], check=True)
    (packages,) = folder.glob("source/python/lib/python*/site-packages")
    packages.rmdir()
    packages.symlink_to(sysconfig.get_path("purelib"))
    shutil.copy(folder / "source" / "run_autograder", folder)
    (folder / "submission_metadata.json").write_text("{}")
    (folder / "results").mkdir()
    (folder / "results").chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def submit(container: Path, submitted: dict[str, str], **environment: str) -> tuple[dict | None, str]:
    """Run the autograder as Gradescope does. Returns (results.json if there is one, what was printed)."""
    shutil.rmtree(container / "submission", ignore_errors=True)
    for name, text in submitted.items():
        (container / "submission" / name).parent.mkdir(parents=True, exist_ok=True)
        (container / "submission" / name).write_text(text, "utf-8")
    left = container / "results" / "results.json"
    left.write_text('{"score": 100}')  # of a run before
    done = subprocess.run(
        ["./run_autograder"],
        cwd=container,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    results = json.loads(left.read_text("utf-8")) if left.exists() else None
    assert (done.returncode == 0) == (results is not None), done.stdout
    assert not list((container / "results").glob("*.half"))
    if results:
        check_form(results)
    return results, done.stdout


def check_form(results: dict) -> None:
    """Fail unless the results are as Gradescope's specification has them."""
    whole = {"score", "execution_time", "output", "output_format", "stdout_visibility", "extra_data", "tests"}
    each = {"name", "score", "max_score", "status", "output", "output_format", "visibility"}
    assert set(results) <= whole and results["output_format"] == "text" and results["stdout_visibility"] == "hidden"
    assert all(isinstance(results.get(name, 0), int | float) for name in ("score", "execution_time"))
    for test in results["tests"]:
        assert set(test) == each and 0 <= test["score"] <= test["max_score"]
        assert test["status"] == ("passed" if test["score"] == test["max_score"] else "failed")
        assert test["visibility"] == "visible" and test["output_format"] == "text" and test["output"] and test["name"]
    assert results["score"] == sum(test["score"] for test in results["tests"])


RAISE = "def f(*x):\n    raise ValueError('no')\ndecompose = documented_loss = gradients = train = f"


@ON_UNIX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "submission", "score", "says"),
    [
        ("zh", lambda: handed_out("zh", True), 100, "正确"),
        ("en", lambda: handed_out("en", False), 0, "Not written yet"),
        ("en", lambda: notebook("1 / 0", RAISE), 0, "Calling it raised ValueError: no"),
        ("en", lambda: notebook("import os\nos._exit(0)"), 0, "There is no `decompose`"),
        ("en", lambda: ["no notebook"], 0, "This file is no notebook"),
    ],
    ids=["right", "empty", "crashing", "exit", "no notebook"],
)
def test_a_submission_is_graded(container, language, submission, score, says):
    # What a Mac and Jupyter put beside it is none of the student's.
    beside = {f"__MACOSX/._{language}.ipynb": "", f".ipynb_checkpoints/{language}-checkpoint.ipynb": "{}"}
    results, printed = submit(container, {f"work/{language}.ipynb": json.dumps(submission())} | beside)
    assert results, printed
    assert results["score"] == score, results
    assert sum(test["max_score"] for test in results["tests"]) == 100
    assert says in results["tests"][0]["output"] and results["extra_data"]["language"] == language


@ON_UNIX
@pytest.mark.slow
@pytest.mark.parametrize("names", [[], ["a.ipynb", "b/c.ipynb"]])
def test_none_or_several_notebooks_are_not_graded(container, names):
    results, _ = submit(container, {name: "{}" for name in names} | {"readme.txt": ""})
    assert results["score"] == 0 and results["tests"] == []
    assert f"This submission has {len(names)}," in results["output"] and f"{len(names)} 个" in results["output"]


@ON_UNIX
@pytest.mark.slow
def test_a_grader_that_fails_gives_no_score(container):
    """Gradescope then says so itself; nothing of a run before is taken for the student's."""
    path = container / "source" / "grading" / "questions.py"
    right = path.read_bytes()
    try:
        path.write_text("raise OSError('the grader is broken')")
        results, printed = submit(container, {"a.ipynb": json.dumps(notebook(RAISE))})
    finally:
        path.write_bytes(right)
    assert results is None and "the grader is broken" in printed


THIEF = """
import os
secret = ["source/grading/questions.py", "source/grading/assignment.json", "source/mini_impl/forecasting/dlinear.py",
          "submission/a.ipynb", "submission_metadata.json"]
open_to_all = ["source/book/grading/worker.py", "run_autograder"]
def read(name):
    try:
        path = os.path.join({folder!r}, name)
        return bool(os.listdir(path) if os.path.isdir(path) else open(path).read())
    except OSError:
        return False
def written():
    try:
        open(os.path.join({folder!r}, "results", "results.json"), "w").write('{{"score": 100}}')
        return True
    except OSError:
        return False
def decompose(*inputs):
    raise ValueError(f"uid {{os.getuid()}} {{[name for name in secret if read(name)]}} {{written()}} "
                     f"{{[name for name in open_to_all if read(name)]}}")
"""


@ON_UNIX
@pytest.mark.slow
@pytest.mark.skipif(not reached(python_for_all(), nbformat.__file__), reason="another account cannot start this Python")
def test_without_bubblewrap_another_account_reads_no_secret_and_writes_no_result(container, tmp_path):
    """As in a container that allows no namespaces: bubblewrap is there and fails."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    thief = json.dumps(notebook(THIEF.format(folder=str(container))))
    results, printed = submit(container, {"a.ipynb": thief}, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert results, printed
    assert results["extra_data"]["sandbox"] == "nobody" and "bubblewrap does not run here" in printed
    told = results["tests"][0]["output"]
    assert f"uid {NOBODY} [] False ['source book grading worker.py', 'run_autograder']" in told.replace("/", " "), told
    assert results["score"] == 0


@ON_UNIX
@pytest.mark.slow
def test_the_same_file_meets_the_same_inputs_and_another_one_others(container):
    seen = []
    show = "def decompose(series, k):\n    raise ValueError(float(series.sum()))"
    for text in (show, show, show + "  # again"):
        results, printed = submit(container, {"a.ipynb": json.dumps(notebook(text))})
        assert results, printed
        seen.append((results["extra_data"]["seed"], results["tests"][0]["output"]))
    assert seen[0] == seen[1] and seen[0][0] != seen[2][0] and seen[0][1] != seen[2][1]
    assert re.search(r"ValueError: -?\d", seen[0][1])


# ---- The offline notebook


def carried(page: dict) -> list[str]:
    (source,) = [cell["source"] for cell in page["cells"] if cell.get("id") == "setup"]
    package = re.search(r'package = """(.*?)"""', source, re.DOTALL)[1]
    return zipfile.ZipFile(io.BytesIO(base64.b64decode(package))).namelist()


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_offline_notebook_carries_the_package_without_the_answer(language):
    page = handed_out(language, False)
    names = carried(page)
    assert {"mini_impl/classroom.py", "mini_impl/forecasting/data.py", "mini_impl/assets/auckland.csv.gz"} <= set(names)
    assert not set(WITHHELD) & set(names) and set(WITHHELD) <= set(portable.package())
    changed = [a["id"] for a, b in zip(made(language, False)["cells"], page["cells"], strict=True) if a != b]
    assert changed == ["setup"]


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_offline_notebook_runs_without_the_package_and_a_network(bare, tmp_path, monkeypatch, language):  # noqa: F811
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run(bare, "-c", "import mini_impl", cwd=tmp_path).status == 1
    solved = nbformat.from_dict(handed_out(language, True))
    nbformat.write(solved, tmp_path / "alone.ipynb")
    done = run(*offline(), bare, "-c", RUN, "alone.ipynb", cwd=tmp_path)
    assert done.status == 0, done.output
    cells = nbformat.read(tmp_path / "ran.ipynb", as_version=4).cells
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    assert printed.count({"en": "Right.", "zh": "正确。"}[language]) == 4, printed
    assert printed.count({"en": "Noted.", "zh": "已记下。"}[language]) == 2, printed


LOOK = """
import mini_impl
unpacked = float("mini_impl-" in mini_impl.__file__)
try:
    from mini_impl.forecasting.dlinear import documented_loss
    stolen = 1.0
except ImportError:
    stolen = 0.0
"""


@ON_UNIX
@pytest.mark.slow
def test_the_grader_does_not_import_what_a_notebook_carries(tmp_path):
    """Not even where a student put the set-up cell of a page, which carries everything, into the assignment."""
    whole = portable.portable(made("en", False), "en")
    assert set(WITHHELD) <= set(carried(whole))
    tmp_path.chmod(0o755)
    strip(ROOT / "mini_impl", tmp_path, ASSIGNMENT.settings["withheld"])
    cells = ["".join(cell["source"]) for cell in whole["cells"] if cell["cell_type"] == "code"]
    student = grader.Student([cells[0], LOOK], Sandbox(tmp_path, Limits(), "limits"))
    try:
        assert [student.value(name).item() for name in ("unpacked", "stolen")] == [0.0, 0.0]
    finally:
        student.close()


# ---- The source for otter


@pytest.fixture(scope="module")
def otter(tmp_path_factory):
    """What the command writes, and what it says."""
    folder = tmp_path_factory.mktemp("otter")
    tool = ROOT / "book" / "tools" / "assignments.py"
    done = run(sys.executable, tool, "dlinear", "--otter", "--out", folder, cwd=folder)
    assert done.status == 0, done.output
    notebooks = {x: nbformat.read(folder / f"dlinear/otter/{x}/dlinear.ipynb", as_version=4) for x in LANGUAGES}
    assert not (folder / "dlinear" / "student").exists()
    return notebooks, done.output


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_source_for_otter_warns_and_keeps_its_blocks_in_order(otter, language):
    cells, said = otter[0][language].cells, otter[1]
    warnings = [cell.source for cell in cells if assignments.otter_source.WARNING[language] in cell.source]
    # Otter leaves out a cell that begins like this, so that it is the teacher's.
    assert len(warnings) == 1 and warnings[0].startswith("## Ignore ##\n")
    assert assignments.otter_source.WARNING[language] in said
    assert cells[0].source.startswith("# ASSIGNMENT CONFIG\nname: dlinear\n")
    opened, marks = [], [cell.source.split("\n")[0] for cell in cells[1:] if cell.cell_type == "raw"]
    for mark in marks:
        what, block = mark.removeprefix("# ").split()
        if what == "BEGIN":
            assert opened == ([] if block == "QUESTION" else ["QUESTION"])
            opened.append(block)
        else:
            assert what == "END" and opened.pop() == block
    assert not opened and marks.count("# BEGIN QUESTION") == 6 and marks.count("# BEGIN TESTS") == 4
    text = "\n".join(cell.source for cell in cells)
    assert "grader" not in text.replace("otter-grader", "") and " | " not in text
    assert bool(re.search("[\u3400-\u9fff]", text)) == (language == "zh")


@pytest.mark.parametrize("name", assignments.names())
def test_tests_for_otter_pass_the_solution_and_fail_the_stub(name):
    assignment = assignments.Assignment(name)
    made = assignments.otter_source.otter_source(assignment, "en", assignments.setup_cell("en", repository()))
    cells = [cell.source for cell in made.cells if cell.cell_type == "code"]
    tests = [cell for cell in cells if re.match(r"def test_\d+\(env\):\n", cell)]
    right, blank = {}, {}
    for cell in cells:
        prompt = re.search(r'r""" # BEGIN PROMPT\n(.*)\n""" # END PROMPT', cell, re.DOTALL)
        if cell in tests or (prompt and "\ndef " not in cell):  # no experiments, which take their time
            continue
        for names, code in ((right, cell), (blank, prompt[1] if prompt else cell)):
            with suppress(Exception):  # a check of what is not there
                exec(code, names)
    assert len(tests) == len(assignment.tested["needed"])
    for test in tests:
        here = {}
        exec(test, here)
        (function,) = (thing for name, thing in here.items() if name.startswith("test_"))
        function(dict(right))
        with pytest.raises((AssertionError, NotImplementedError)):
            function(dict(blank))
        # A check that is never reached, or swallowed, would let everything pass.
        with pytest.raises(ZeroDivisionError):
            function(right | {"classroom": Broken()})


class Broken:
    @staticmethod
    def check(*inputs, **more):
        raise ZeroDivisionError

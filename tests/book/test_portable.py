"""The pages that run alone: each carries the package, and needs neither it nor a network."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import nbformat
import pytest
from books import LANGUAGES, ROOT, run, tool
from fontTools.ttLib import TTFont

from mini_impl import results

FOLDERS = [ROOT / "book" / language for language in LANGUAGES]
EVERY_PAGE = [(path.stem, path.parent.name) for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]


@cache
def portable():
    return tool("portable")


def page(name: str, language: str) -> dict:
    return json.loads((ROOT / "book" / language / f"{name}.ipynb").read_text("utf-8"))


@cache
def made(name: str, language: str) -> dict:
    return portable().portable(page(name, language), language)


def carried(name: str, language: str) -> zipfile.ZipFile:
    """What the set-up cell of a page unpacks."""
    (source,) = [cell["source"] for cell in made(name, language)["cells"] if cell["id"] == "setup"]
    return zipfile.ZipFile(io.BytesIO(base64.b64decode(re.search(r'package = """(.*?)"""', source, re.DOTALL)[1])))


@pytest.mark.slow
def test_every_page_fits_and_only_its_set_up_cell_differs(tmp_path):
    done = run(sys.executable, ROOT / "book" / "tools" / "portable.py", "--out", tmp_path, cwd=ROOT)
    assert done.status == 0, done.output
    assert {(path.stem, path.parent.name) for path in tmp_path.rglob("*.ipynb")} == set(EVERY_PAGE)
    for name, language in EVERY_PAGE:
        path = tmp_path / language / f"{name}.ipynb"
        assert path.stat().st_size <= 2_000_000, path
        nbformat.validate(nbformat.read(path, as_version=4))
        before, after = page(name, language), json.loads(path.read_text("utf-8"))
        assert before["metadata"] == after["metadata"]
        changed = [a["id"] for a, b in zip(before["cells"], after["cells"], strict=True) if a != b]
        assert changed == ["setup"] * any(cell["cell_type"] == "code" for cell in before["cells"])


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_carries_the_package_with_its_own_results(language):
    files = carried("series", language).namelist()
    package = ROOT / "mini_impl"
    assert {name for name in files if name.endswith(".py")} == {
        f"mini_impl/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")
    }
    assert {f"mini_impl/assets/{path.name}" for path in package.glob("assets/*.*")} <= set(files)
    assert [name for name in files if "results/" in name and "gpu" not in name] == [
        "mini_impl/assets/results/dlinear.json"
    ]
    assert [name for name in files if name.endswith(".dist-info/LICENSE")]
    assert ("chinese.ttf" in files) == ("chinese-LICENSE.txt" in files) == (language == "zh")


@pytest.mark.parametrize("name", sorted({name for name, _ in EVERY_PAGE}))
def test_a_page_carries_every_result_that_it_reads(name):
    """Told by running nothing: a name of a result in quotation marks right after a call of something that loads it."""
    text = (ROOT / "book" / "src" / f"{name}.md").read_text("utf-8")
    read = set(re.findall(r'\b(?:results\.load|stored)\("(\w+)"\)', text))
    assert read & set(results.names()) <= set(portable().results_of(text))
    calls = re.findall(r"\bresults\.load\((.*?)\)", text)
    assert all(re.fullmatch(r'"\w+"|name', call) for call in calls), "a name that the tool could not find"


@pytest.mark.slow
def test_the_font_has_every_character_of_the_page_that_the_whole_font_has():
    whole = TTFont(distribution("zhplot").locate_file("zhplot/fonts/NotoSansSC-Regular.ttf"), lazy=True)
    text = set("".join("".join(cell["source"]) for cell in page("series", "zh")["cells"]))
    font = carried("series", "zh").read("chinese.ttf")
    cut = TTFont(io.BytesIO(font))
    assert {sign for sign in text if ord(sign) in whole.getBestCmap()} <= set(map(chr, cut.getBestCmap())) and len(
        font
    ) < 400_000
    assert cut["head"].modified == whole["head"].modified, "else each build of the site would give other files"
    licence = cut["name"].getDebugName(13)
    assert "Open Font License" in licence, "who gets the font gets its licence"


def test_the_same_page_gives_the_same_bytes():
    first = made("losses", "en")
    assert portable().portable(page("losses", "en"), "en") == first


def test_a_page_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(portable(), "LARGEST", 100_000)
    monkeypatch.setattr(sys, "argv", ["portable.py", "losses", "--out", str(tmp_path)])
    assert portable().main() == 1
    assert re.search(r"book/en/losses.ipynb would have \d+ bytes, more than 100000", capsys.readouterr().err)
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A Python that has what the page needs, and neither mini_impl nor a Chinese font."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    there = Path(nbformat.__file__).parents[1]
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in there.iterdir():
        if not re.match(r"mini_impl|__editable__|zhplot|__pycache__|.*\.pth$", path.name):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def no_fonts(tmp_path_factory) -> Path:
    """A folder of matplotlib's settings, which say that there are no fonts here but its own."""
    folder = tmp_path_factory.mktemp("no_fonts")
    look = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(look, env={**os.environ, "MPLCONFIGDIR": str(folder)}, check=True)
    (list_of_fonts,) = folder.glob("fontlist-*.json")
    found = json.loads(list_of_fonts.read_text("utf-8"))
    # Its own alone have paths that are relative.
    found["ttflist"] = [font for font in found["ttflist"] if not Path(font["fname"]).is_absolute()]
    list_of_fonts.write_text(json.dumps(found), "utf-8")
    return folder


# Pipes in the file system in place of ports: without a network there is not even 127.0.0.1.
RUN = """
import sys, nbclient, nbformat
from jupyter_client import AsyncKernelManager
page = nbformat.read(sys.argv[1], as_version=4)
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc")
nbclient.NotebookClient(page, km=kernel, timeout=300, coalesce_streams=True).execute()
nbformat.write(page, "ran.ipynb")
"""
WHERE = """
import mini_impl, socket
from matplotlib import font_manager
from mini_impl import plots
font = font_manager.findfont(plots.chinese_font()) if plots.chinese_font() else None
print(mini_impl.__file__, mini_impl.__version__, font, len(socket.if_nameindex()), sep="\\n")
"""


def offline() -> list[str]:
    """What stands before a command that is to have no network, where this system allows that."""
    without = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*without, "true"], capture_output=True).returncode == 0
    return without if allowed else []


def run_alone(python: Path, folder: Path, name: str, language: str, more: str) -> list:
    """Run a page, and one cell more, in a folder where there is nothing else. Returns its cells."""
    book = nbformat.from_dict(made(name, language))
    for cell in book.cells:
        cell |= {"outputs": [], "execution_count": None} if cell.cell_type == "code" else {}
    book.cells.append(nbformat.v4.new_code_cell(more))
    nbformat.write(book, folder / f"{name}.ipynb")
    done = run(*offline(), python, "-c", RUN, f"{name}.ipynb", cwd=folder)
    assert done.status == 0, done.output
    return nbformat.read(folder / "ran.ipynb", as_version=4).cells


@pytest.mark.slow
@pytest.mark.parametrize(("name", "language"), [("finetuning", "en"), ("series", "zh")])
def test_a_page_runs_alone_without_a_network(bare, no_fonts, tmp_path, monkeypatch, name, language):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLCONFIGDIR", str(no_fonts))
    assert run(bare, "-c", "import mini_impl", cwd=tmp_path).status == 1
    *cells, last = run_alone(bare, tmp_path, name, language, WHERE)
    file, version, font, networks = last.outputs[0].text.splitlines()
    unpacked = Path(file).parents[1]
    assert unpacked.name.startswith("mini_impl-")
    assert f"v{version}" == tool("notebooks").repository().tag
    assert font == (str(unpacked / "chinese.ttf") if language == "zh" else "None")
    assert networks == "1" or not offline(), "that of a computer with itself, which is off"
    stored, compared = nbformat.read(ROOT / "book" / language / f"{name}.ipynb", as_version=4).cells, 0
    drawn = letters(cells, "NotoSansSC")
    assert drawn == letters(stored, "NotoSansSC") and (drawn > 0) == (language == "zh")
    for cell, before in zip(cells, stored, strict=True):
        # A character that no font has is told of there.
        assert not [output.text for output in cell.get("outputs", []) if output.get("name") == "stderr"]
        if "nbval-check-output" in before.metadata.get("tags", []):
            assert words(cell) == words(before)
            compared += 1
    assert compared > 3


def words(cell) -> list:
    return [output.get("text", output.get("data", {}).get("text/plain")) for output in cell.outputs]


def letters(cells: list, font: str) -> int:
    """How many letters the pictures of a page have in a font, after which each is named."""
    pictures = [output.get("data", {}).get("image/svg+xml", "") for cell in cells for output in cell.get("outputs", [])]
    return len(re.findall(f'<use [^>]*href="#{font}-', "".join(pictures)))


HIDE = """
from importlib import util
find = util.find_spec
util.find_spec = lambda name: None if name in ("torch", "tqdm") else find(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_page_does_not_carry_is_named(tmp_path, language):
    (source,) = [cell["source"] for cell in made("losses", language)["cells"] if cell["id"] == "setup"]
    (tmp_path / "cell.py").write_text(HIDE + source, "utf-8")
    done = run(sys.executable, "cell.py", cwd=tmp_path)
    assert done.status == 1
    assert done.output.splitlines()[-1] == f"ImportError: {portable().SENTENCE[language]}torch tqdm"

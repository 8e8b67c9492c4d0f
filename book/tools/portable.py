"""Each page as one file that runs alone and offline: dist/en/NAME.ipynb and dist/zh/NAME.ipynb.

The set-up cell of such a file carries the package mini_impl itself, with those results that its page reads, and on a
Chinese page a Chinese font cut to the characters of the page. What it does not carry is torch and the like, which
notebook servers for machine learning have: Colab, Kaggle, ModelScope, AI Studio. The site's download button gives these
files.
"""

import argparse
import base64
import functools
import io
import json
import re
import sys
import textwrap
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

import mini_impl
from mini_impl import results

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")
LARGEST = 2_000_000  # bytes of a file
FONT = "zhplot/fonts/NotoSansSC-Regular.ttf"
# Latin, Greek, punctuation, arrows and signs: what labels and formulas may hold beside Chinese.
SIGNS = {*range(0x20, 0x250), *range(0x370, 0x400), *range(0x2000, 0x2300)}

SETUP = '''\
# {title}
import atexit
import base64
import io
import os
import shutil
import sys
import tempfile
import zipfile
from importlib.util import find_spec

missing = [name for name in {needed} if find_spec(name) is None]
if missing:
    raise ImportError("{sentence}" + " ".join(missing))

package = """
{package}
"""
if "mini_impl" not in sys.modules:
    folder = tempfile.mkdtemp(prefix="mini_impl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    zipfile.ZipFile(io.BytesIO(base64.b64decode(package))).extractall(folder)
    sys.path.insert(0, folder)
    # for the programs that the page starts
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
{font}
from mini_impl.language import use_language

use_language("{language}")'''
ADD_FONT = """
    from matplotlib import font_manager

    from mini_impl import plots

    if plots.chinese_font() is None:
        font_manager.fontManager.addfont(os.path.join(folder, "chinese.ttf"))
        plots.chinese_font.cache_clear()
"""
TITLE = {
    "en": "The book's package, which this file carries, and the language of this page",
    "zh": "本书的程序包（就在本文件里），以及本页的语言",
}
SENTENCE = {
    "en": "This file carries the book's package, but not the packages that it needs; install  ",
    "zh": "本文件自带本书的程序包，但不含它所依赖的程序包，请先安装：",
}


@functools.cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@functools.cache
def package() -> dict[str, bytes]:
    """The files of mini_impl as a wheel holds them, by their paths there, without results."""
    folder = Path(mini_impl.__file__).parent
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    files = {f"mini_impl/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in found}
    files = {name: data for name, data in files.items() if not name.startswith("mini_impl/assets/results/")}
    stated = f"Metadata-Version: 2.1\nName: {project()['name']}\nVersion: {project()['version']}\n"
    about = f"{project()['name']}-{project()['version']}.dist-info"
    return files | {f"{about}/METADATA": stated.encode(), f"{about}/LICENSE": (ROOT / "LICENSE").read_bytes()}


def results_of(text: str) -> list[str]:
    """The result files that a page reads: those it names alone in a call, and what GPU kernels were verified on."""
    return [name for name in results.names() if name == "gpu" or f'("{name}")' in text]


def result_file(name: str) -> bytes:
    return json.dumps(results.load(name), ensure_ascii=False, separators=(",", ":")).encode()


@functools.cache
def words_of_package() -> str:
    return "".join(data.decode() for name, data in package().items() if name.endswith(".py"))


@functools.cache
def font_of_book() -> bytes:
    """The Chinese font cut to the characters of all pages: from so few each page's own are cut in no time."""
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "book" / "zh").glob("*.ipynb")]
    return cut(distribution("zhplot").locate_file(FONT).read_bytes(), words_of_package() + "".join(pages))


def cut(font: bytes, text: str) -> bytes:
    """A font with the characters of a text, and letters and signs, alone. It keeps its name and its licence."""
    options = subset.Options(layout_features=[], hinting=False, name_IDs=["*"])
    cutter, whole = subset.Subsetter(options), TTFont(io.BytesIO(font), lazy=True, recalcTimestamp=False)
    cutter.populate(unicodes={*SIGNS, *map(ord, text)})
    cutter.subset(whole)
    file = io.BytesIO()
    whole.save(file)
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip file that has the same bytes whenever its files have."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 9)
    return made.getvalue()


def portable(page: dict, language: str, carried: dict[str, bytes] | None = None) -> dict:
    """A page's notebook with another set-up cell, if it has any. carried: another package than the whole one."""
    text = "\n".join("".join(cell["source"]) for cell in page["cells"])
    draws = language == "zh" and "plots" in text
    files = dict(carried or package())
    files |= {f"mini_impl/assets/results/{name}.json": result_file(name) for name in results_of(text)}
    if draws:
        files["chinese.ttf"] = cut(font_of_book(), words_of_package() + text)
        files["chinese-LICENSE.txt"] = distribution("zhplot").locate_file(Path(FONT).with_name("OFL.txt")).read_bytes()
    source = SETUP.format(
        title=TITLE[language],
        needed=[re.match(r"\w+", one)[0] for one in project()["dependencies"]],
        sentence=SENTENCE[language],
        package="\n".join(textwrap.wrap(base64.b64encode(zipped(files)).decode(), 2000)),
        font=ADD_FONT if draws else "",
        language=language,
    )
    cells = [
        # Colab and JupyterLab fold a cell by these.
        {
            **cell,
            "source": source,
            "metadata": {**cell["metadata"], "cellView": "form", "jupyter": {"source_hidden": True}},
        }
        if cell["id"] == "setup"
        else cell
        for cell in page["cells"]
    ]
    return {**page, "cells": cells}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="NAME", help="a page, book/src/NAME.md (default: every page)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for en/ and zh/ (default: dist)")
    arguments = parser.parse_args()
    for language in LANGUAGES:
        (arguments.out / language).mkdir(parents=True, exist_ok=True)
        for path in sorted((ROOT / "book" / language).glob("*.ipynb")):
            if arguments.pages and path.stem not in arguments.pages:
                continue
            page = portable(json.loads(path.read_text(encoding="utf-8")), language)
            text = json.dumps(page, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
            if len(text.encode()) > LARGEST:
                print(
                    f"book/{language}/{path.name} would have {len(text.encode())} bytes, more than {LARGEST}",
                    file=sys.stderr,
                )
                return 1
            (arguments.out / language / path.name).write_text(text, encoding="utf-8")
    print(f"The pages that run alone are in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

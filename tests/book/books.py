"""What the tests of this folder share: running the book's commands, and small books to run them on."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import nbformat
import yaml

ROOT = Path(__file__).parents[2]
PAGES = Path(__file__).parent / "pages"
ADDRESS = "https://github.com/example/book"
BASE = "https://example.org/book/"
LANGUAGES = ("en", "zh")
# The pages in the form that DLinear has.
REWRITTEN = (
    *("dlinear", "attention", "patchtst", "itransformer", "timesnet", "timexer"),
    *("language_model", "sft", "policy_gradient", "grpo", "dapo"),
    *("gpu", "scale"),
)
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
STRICT = ("-W", "-n", "--keep-going")


@dataclass
class Result:
    """What a command did."""

    status: int
    output: str


def run(*command, cwd: Path) -> Result:
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=-1, stderr=subprocess.STDOUT)
    return Result(done.returncode, done.stdout)


def tool(name: str, root: Path = ROOT) -> ModuleType:
    """A program of book/tools, imported."""
    spec = importlib.util.spec_from_file_location(name, root / "book" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_notebooks(root: Path, *options: str) -> Result:
    return run(sys.executable, root / "book" / "tools" / "notebooks.py", *options, cwd=root)


def build(root: Path, output: Path, *options: str) -> Result:
    """jupyter-book build, as a reader types it."""
    return run(
        Path(sys.executable).with_name("jupyter-book"), "build", ".", "--path-output", output, *options, cwd=root
    )


def small_book(root: Path, *sources: Path, url: str = "", base: str = "") -> Path:
    """A book with the real tools, settings and assets, and with these pages only.

    url: the address of its repository; base: that of its site.
    """
    for folder in ("tools", "ext", "assets"):
        shutil.copytree(ROOT / "book" / folder, root / "book" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "book" / "index.md", root / "book")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "book" / "src").mkdir()
    for source in sources:
        shutil.copy(source, root / "book" / "src")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["repository"]["url"] = url
    config["html"]["baseurl"] = base
    (root / "_config.yml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    parts = [
        {"caption": caption, "chapters": [{"file": f"book/{language}/{source.stem}"} for source in sources]}
        for language, caption in (("en", "Pages"), ("zh", "页面"))
    ]
    toc = {"format": "jb-book", "root": "book/index", "parts": parts}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc, allow_unicode=True), encoding="utf-8")
    return root


def pages_of_language(site: Path, language: str) -> list[str]:
    """The chooser and every page of one language, as paths below the site."""
    pages = [site / "index.html", *sorted((site / language).glob("*.html"))]
    assert len(pages) >= 9
    return [page.relative_to(site).as_posix() for page in pages]


def check_words(text: str, language: str) -> None:
    assert text.strip() and bool(re.search(r"[\u3400-\u9fff]", text)) == (language == "zh"), text


def check_widgets(book: nbformat.NotebookNode, language: str) -> int:
    """Fail unless every widget that a cell shows is stored, and its pictures are described. Returns their number."""
    shown = 0
    stored = book.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    for cell in book.cells:
        for output in cell.get("outputs", []):
            if view := output.get("data", {}).get("application/vnd.jupyter.widget-view+json"):
                assert view["model_id"] in stored
                shown += 1
    for model in stored.values():
        if model["model_name"] == "ImageModel":
            check_words(model["state"]["tooltip"], language)
    return shown

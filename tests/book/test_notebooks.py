"""The tool that makes notebooks of sources: book/tools/notebooks.py."""

import builtins
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from books import ADDRESS, LANGUAGES, PAGES, ROOT, check_widgets, check_words, make_notebooks, small_book, tool

pytestmark = pytest.mark.slow

SOURCE = """\
+++ {"lang": "en"}

# A page

$$a = b \\tag{1}$$

+++ {"lang": "zh"}

# 一页

$$a = b \\tag{1}$$

+++

```{code-cell} ipython3
:tags: [nbval-check-output]
import os, time
print(os.environ["OMP_NUM_THREADS"], os.path.basename(os.getcwd()))
```

```{code-cell} ipython3
print(time.time_ns())
```
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A small book with one page, made; the second cell of the page prints something else in every run."""
    root = small_book(tmp_path_factory.mktemp("made"))
    (root / "book" / "src" / "page.md").write_text(SOURCE, encoding="utf-8")
    done = make_notebooks(root)
    assert done.status == 0 and "page: wrote en and zh" in done.output, done.output
    return root


@pytest.fixture
def page(made, tmp_path) -> Path:
    """The source of the page, in a copy of that book."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "book" / "src" / "page.md"


def root_of(page: Path) -> Path:
    return page.parents[2]


def change(page: Path, old: str, new: str) -> None:
    text = page.read_text(encoding="utf-8")
    assert old in text
    page.write_text(text.replace(old, new), encoding="utf-8")


def notebooks(page: Path) -> dict[str, nbformat.NotebookNode]:
    return {
        language: nbformat.read(root_of(page) / "book" / language / "page.ipynb", as_version=4)
        for language in LANGUAGES
    }


def printed(page: Path, language: str = "zh") -> str:
    """What the cell that prints the time has printed."""
    return notebooks(page)[language].cells[-1].outputs[0].text


def test_a_page_becomes_two_executed_notebooks(page):
    for language, book in notebooks(page).items():
        assert [cell.cell_type for cell in book.cells] == ["markdown", "code", "code", "code"]
        assert book.cells[0].source.startswith({"en": "# A page", "zh": "# 一页"}[language])
        assert book.cells[1].metadata.tags == ["hide-input"] and book.cells[2].metadata.tags == ["nbval-check-output"]
        assert book.cells[2].outputs[0].text == f"1 {language}\n", "one thread, in the notebook's own folder"
        assert "lang" not in json.dumps([cell.metadata for cell in book.cells])


def test_only_changed_code_is_executed_again(page):
    root = root_of(page)
    first = printed(page)

    done = make_notebooks(root)
    assert "nothing, it is unchanged" in done.output and printed(page) == first

    change(page, "# 一页", "# 另一页")
    done = make_notebooks(root)
    assert "page: wrote zh" in done.output, done.output
    assert notebooks(page)["zh"].cells[0].source.startswith("# 另一页") and printed(page) == first

    change(page, "print(time", "print(1, time")
    assert make_notebooks(root).status == 0
    second = printed(page)
    assert second.startswith("1 ") and second != first

    assert make_notebooks(root, "--all").status == 0
    assert printed(page) != second


def test_an_address_changes_the_set_up_cell_alone(page):
    root = root_of(page)
    before, first = notebooks(page)["zh"].cells, printed(page)
    assert "pip install '.[zh]'" in before[1].source and "git+" not in before[1].source
    change(root / "_config.yml", "url: ''", f"url: {ADDRESS}/")
    assert make_notebooks(root, "--check").status == 1, "the notebooks are out of date now"
    assert make_notebooks(root).status == 0
    after = notebooks(page)["zh"].cells
    assert f"mini_impl[zh] @ git+{ADDRESS}@" in after[1].source
    assert before[:1] + before[2:] == after[:1] + after[2:] and printed(page) == first


class WithoutPackage:
    """Stands for a computer that has mini_impl only once it was installed; notes what is installed and used.

    revisions: those that pip gets; torch: the versions of it that are here.
    """

    def __init__(self, monkeypatch, revisions=(), torch=()):
        self.revisions, self.installed, self.tried, self.used = revisions, False, [], []
        monkeypatch.setattr(subprocess, "run", self.run)
        found = {"torch": [SimpleNamespace(version=version) for version in torch]}
        monkeypatch.setattr(metadata, "distributions", lambda name: found[name])

    def execute(self, cell: str) -> None:
        exec(cell, {"__builtins__": {**vars(builtins), "__import__": self.find}})

    def find(self, name: str, *arguments):
        if not name.startswith("mini_impl"):
            return __import__(name, *arguments)
        if not self.installed:
            raise ImportError(name)
        return SimpleNamespace(use_language=self.used.append)

    def run(self, command: list[str], **how) -> SimpleNamespace:
        assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
        assert how == {"capture_output": True, "text": True}, "nothing that pip says is shown"
        self.tried.append(command[5:])
        self.installed = command[5].rsplit("@")[-1] in self.revisions
        return SimpleNamespace(returncode=not self.installed, stderr="pip's own words")


VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
PACKAGE = f"mini_impl[zh] @ git+{ADDRESS}@"


def set_up(language: str, url: str = ADDRESS) -> str:
    return tool("notebooks").setup_cell(language, tool("notebooks").repository()._replace(url=url)).source


@pytest.mark.parametrize("language", LANGUAGES)
def test_where_the_package_is_missing_the_set_up_cell_installs_the_version_of_the_page(language, monkeypatch, capsys):
    computer = WithoutPackage(monkeypatch, revisions=[f"v{VERSION}", "main"])
    computer.execute(set_up(language))
    assert computer.tried == [[f"{PACKAGE}v{VERSION}"]] and computer.used == [language]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_the_tag_the_set_up_cell_says_so_and_takes_the_branch(language, monkeypatch, capsys):
    computer = WithoutPackage(monkeypatch, revisions=["main"])
    computer.execute(set_up(language))
    assert computer.tried == [[f"{PACKAGE}v{VERSION}"], [f"{PACKAGE}main"]] and computer.used == [language]
    said = capsys.readouterr().out
    check_words(said, language)
    assert f"v{VERSION}" in said and "main" in said and said.count("\n") == 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_without_a_network_the_set_up_cell_says_in_a_sentence_what_to_do(language, monkeypatch, capsys):
    computer = WithoutPackage(monkeypatch)
    with pytest.raises(ImportError) as raised:
        computer.execute(set_up(language))
    check_sentence(str(raised.value), language)
    assert capsys.readouterr().out == "pip's own words\n" and computer.used == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_with_no_address_the_set_up_cell_says_in_a_sentence_what_to_do(language, monkeypatch):
    computer = WithoutPackage(monkeypatch, revisions=["main"])
    with pytest.raises(ImportError) as raised:
        computer.execute(set_up(language, url=""))
    check_sentence(str(raised.value), language)
    assert computer.tried == computer.used == []


def check_sentence(text: str, language: str) -> None:
    check_words(text, language)
    assert "pip install '.[zh]'" in text and len(re.findall(r"\.(?: |$)|。", text)) == 1 and "\n" not in text


def test_the_set_up_cell_leaves_torch_and_ipywidgets_alone(monkeypatch):
    """Not even a torch that is too old is renewed: pip, which may not, says so."""
    computer = WithoutPackage(monkeypatch, revisions=["main"], torch=["2.4.0+cu118"])
    computer.execute(set_up("en"))
    assert [tried[1:] for tried in computer.tried] == [["torch==2.4.0+cu118"]] * 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["zh"]]
    assert not [one for one in asked if one.startswith("ipywidgets")]
    for one in asked:
        assert re.fullmatch(r"[a-z]+>=[\d.]+", one), f"only a lower bound leaves what is there: {one}"


def test_no_page_asks_for_a_custom_widget_manager():
    """On Colab it would break Tab, and so the sliders."""
    cells = [set_up(language, url) for language in LANGUAGES for url in ("", ADDRESS)]
    sources = [path.read_text("utf-8") for path in (ROOT / "book" / "src").glob("*.md")]
    package = [path.read_text("utf-8") for path in (ROOT / "mini_impl").rglob("*.py")]
    for text in (*cells, *sources, *package):
        assert "custom_widget_manager" not in text


def test_a_failing_cell_is_named_and_nothing_is_written(page):
    root = root_of(page)
    before = [(root / "book" / language / "page.ipynb").read_bytes() for language in LANGUAGES]
    change(page, "print(time.time_ns())", "from mini_impl.language import language\n1 / (language() == 'en')")
    done = make_notebooks(root)
    assert done.status == 1
    assert "book/src/page.md in zh, code cell 3" in done.output and "ZeroDivisionError: division by zero" in done.output
    assert "Traceback" not in done.output
    assert before == [(root / "book" / language / "page.ipynb").read_bytes() for language in LANGUAGES]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import sys; print('oh', file=sys.stderr)", "It writes to stderr: oh"),
        ("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", "needs a description"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "code cell 3"),
    ],
)
def test_what_a_reader_should_not_see_is_refused(page, code, complaint):
    change(page, "print(time.time_ns())", code)
    done = make_notebooks(root_of(page))
    assert done.status == 1 and complaint in done.output and "Traceback" not in done.output, done.output
    assert complaint not in str(notebooks(page)) and code not in str(notebooks(page))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('+++ {"lang": "zh"}', '+++ {"lang": "fr"}', "prose begins with"),
        ('+++ {"lang": "zh"}', '+++ {"lang": "en"}', "stands alone"),
        (":tags: [nbval-check-output]", ":lang: zh", "code cells are shared"),
        (":tags: [nbval-check-output]", ":alt: a curve", "`alt` must be a text for en and one for zh"),
    ],
)
def test_a_source_that_is_not_in_both_languages_is_refused(page, old, new, complaint):
    change(page, old, new)
    done = make_notebooks(root_of(page))
    assert done.status == 1 and complaint in done.output and "book/src/page.md" in done.output, done.output


def test_a_notebook_without_source_and_an_unknown_page_are_named(page):
    root = root_of(page)
    (root / "book" / "en" / "old.ipynb").write_text("{}", encoding="utf-8")
    done = make_notebooks(root, "--check")
    assert done.status == 1 and "book/en/old.ipynb has no source in book/src: delete it" in done.output, done.output
    done = make_notebooks(root, "other")
    assert done.status == 2 and "no page other; the pages are page" in done.output


def test_check_sees_what_was_changed_by_hand(page):
    root = root_of(page)
    assert make_notebooks(root, "--check").status == 0
    path = root / "book" / "zh" / "page.ipynb"
    for old, new in (("# 一页", "# 二页"), ("nbval-check-output", "nbval-skip"), ('"id": "setup"', '"id": "other"')):
        text = path.read_text(encoding="utf-8")
        change(path, old, new)
        done = make_notebooks(root, "--check")
        assert done.status == 1 and "book/zh/page.ipynb is not what book/src/page.md gives" in done.output, done.output
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("put", ["57913", "57913<script>alert(1)</script>"])
def test_outputs_that_were_edited_are_seen_and_made_again(page, put):
    """The first cell printed "1 zh"; what it printed is not taken over once somebody has changed it."""
    root, path = root_of(page), root_of(page) / "book" / "zh" / "page.ipynb"
    before = printed(page)
    change(path, '"1 zh\\n"', f'"{put} zh\\n"')
    done = make_notebooks(root, "--check")
    assert done.status == 1 and "book/zh/page.ipynb is not what book/src/page.md gives" in done.output, done.output
    assert make_notebooks(root).status == 0
    assert put not in path.read_text("utf-8").split('"outputs_sha256"')[0] and printed(page) != before
    assert make_notebooks(root, "--check").status == 0


def test_the_same_source_gives_the_same_bytes(demo_root, tmp_path):
    """Pictures, sliders and addresses of objects included; and every widget is stored with its pictures described."""
    again = small_book(tmp_path, PAGES / "demo.md", url=ADDRESS)
    done = make_notebooks(again)
    assert done.status == 0, done.output
    for language in LANGUAGES:
        first, second = (root / "book" / language / "demo.ipynb" for root in (demo_root, again))
        assert first.read_bytes() == second.read_bytes()
        assert check_widgets(nbformat.read(first, as_version=4), language) == 2

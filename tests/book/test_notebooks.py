"""The tool that makes notebooks of sources: book/tools/notebooks.py."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from books import ADDRESS, LANGUAGES, PAGES, check_widgets, check_words, make_notebooks, small_book, tool
from IPython.core.inputtransformer2 import TransformerManager

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
    assert 'pip install ".[zh]"' in before[1].source and "git+" not in before[1].source
    change(root / "_config.yml", "url: ''", f"url: {ADDRESS}/")
    assert make_notebooks(root, "--check").status == 1, "the notebooks are out of date now"
    assert make_notebooks(root).status == 0
    after = notebooks(page)["zh"].cells
    assert f'%pip install --quiet "mini_impl[zh] @ git+{ADDRESS}"' in after[1].source
    assert before[:1] + before[2:] == after[:1] + after[2:] and printed(page) == first


class WithoutPackage:
    """Stands for a computer that has mini_impl only once it was installed; notes what is installed and used."""

    def __init__(self):
        self.installed, self.used = [], []

    def run(self, cell: str) -> None:
        code = TransformerManager().transform_cell(cell)  # what IPython makes of %pip
        exec(code, {"__builtins__": {"__import__": self.find, "ImportError": ImportError}, "get_ipython": lambda: self})

    def find(self, name: str, *arguments):
        if not self.installed:
            raise ImportError(name)
        return SimpleNamespace(use_language=self.used.append)

    def run_line_magic(self, magic: str, line: str) -> None:
        self.installed.append(f"%{magic} {line}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_where_the_package_is_missing_the_set_up_cell_installs_it_from_the_address(language):
    computer = WithoutPackage()
    computer.run(tool("notebooks").setup_cell(language, ADDRESS).source)
    assert computer.installed == [f'%pip install --quiet "mini_impl[zh] @ git+{ADDRESS}"']
    assert computer.used == [language]


@pytest.mark.parametrize("language", LANGUAGES)
def test_with_no_address_the_set_up_cell_says_how_to_install_it(language):
    computer = WithoutPackage()
    with pytest.raises(ImportError, match=re.escape('pip install ".[zh]"')) as raised:
        computer.run(tool("notebooks").setup_cell(language, "").source)
    check_words(str(raised.value), language)
    assert computer.installed == []


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

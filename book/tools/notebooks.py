"""One bilingual source, book/src/NAME.md, becomes two executed notebooks: book/en/NAME.ipynb and book/zh/NAME.ipynb.

A source is MyST Markdown. Its prose cells are marked +++ {"lang": "en"} and +++ {"lang": "zh"}, each English one
directly followed by its Chinese neighbour; its code cells are shared. What a source may say beside that:

- An English prose cell names its headings, ids: [words, ...], for links that are the same in both languages.
- A comment in code stands in both languages, # English | 中文; each notebook keeps one.
- A code cell that shows pictures describes them, alt: {en: ..., zh: ...}.
- A cell tagged `blank` holds a line `answer = None` and, as `wrong`, one answer that is wrong. The check follows.
- A cell tagged `solution` gives the right answer, with `explain: {en: ..., zh: ...}`. On the page it is folded
  Markdown, with its output; it runs in another notebook, book/solutions/LANGUAGE/NAME.ipynb.

A page is executed again only if one of its code cells changed. When mini_impl changed, and not the page, say --all.
"""

import argparse
import copy
import hashlib
import io
import json
import os
import re
import sys
import time
import tokenize
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")
SECONDS_A_CELL = 600
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

SETUP = """\
# {title}
try:
    import mini_impl
except ImportError:
    {rescue}

from mini_impl.language import use_language

use_language("{language}")"""
# IPython's %pip says that the kernel may need a restart, which it does not. What is here stays: only lower bounds
# are asked for, and torch, which a server fits to its GPU, is held even where it is older than these.
INSTALL = """\
import subprocess
    import sys
    from importlib import invalidate_caches, metadata

    def install(revision):
        wanted = ["mini_impl[zh] @ git+{url}@" + revision]
        wanted += [f"torch=={{one.version}}" for one in metadata.distributions(name="torch")]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", *wanted]
        return subprocess.run(pip, capture_output=True, text=True)

    tried = install("{tag}")
    if tried.returncode:
        tried = install("{branch}")
        said = "{fell_back}"
        print(tried.stderr if tried.returncode else said)
    if tried.returncode:
        {missing}
    invalidate_caches()"""
TITLE = {"en": "The book's package, and the language of this page", "zh": "本书的程序包，以及本页的语言"}
FELL_BACK = {
    "en": "The tag {tag} could not be had, so the package is that of the branch {branch}.",
    "zh": "取不到标签 {tag}，因此安装的是分支 {branch} 上的程序包。",
}
MISSING = {
    "en": (
        "This page needs the package mini_impl: run  pip install '.[zh]'  ",
        "in a copy of the book, or take the page from the download button of the ",
        "book's site, whose file carries the package.",
    ),
    "zh": (
        "本页需要程序包 mini_impl：请在本书副本的根目录下运行 ",
        "pip install '.[zh]'，",
        "或者用本书网站的下载按钮取得本页，下载的文件自带程序包。",
    ),
}

SOLUTION = {"en": "Solution", "zh": "解答"}
OUTPUT = {"en": "It prints:", "zh": "输出："}
SOLUTIONS_OF = {
    "en": "# Solutions\n\nThe code of the page `{name}`, without its pictures; then its exercises with solutions. "
    "After each solution its check is run twice: with the right answer, and with a wrong one.",
    "zh": "# 解答\n\n先是 `{name}` 一页的代码（不含图），然后是练习与解答。"
    "每个解答之后，检验运行两次：一次用正确的答案，一次用错误的答案。",
}


class PageError(Exception):
    """A page cannot be made; the message names the page, the place in it, and what is wrong."""


# ---- From a source to a notebook that has not run


def source_path(name: str) -> Path:
    return ROOT / "book" / "src" / f"{name}.md"


def notebook_path(name: str, language: str) -> Path:
    return ROOT / "book" / language / f"{name}.ipynb"


def solutions_path(name: str, language: str) -> Path:
    return ROOT / "book" / "solutions" / language / f"{name}.ipynb"


class Repository(NamedTuple):
    """Where readers get the package: the book's address, "" while it has none; this version's tag; a branch."""

    url: str
    tag: str
    branch: str


def repository() -> Repository:
    """The address and the branch in _config.yml, which pages go by, and the version in pyproject.toml."""
    stated = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return Repository(stated["url"].rstrip("/"), f"v{version}", stated["branch"])


def raising(pieces: tuple[str, ...], indent: str) -> str:
    """The lines that raise an ImportError which says this, indented but for the first."""
    lines = "".join(f"{indent}    {json.dumps(piece, ensure_ascii=False)}\n" for piece in pieces)
    return f"raise ImportError(\n{lines}{indent}) from None"


def setup_cell(language: str, book: Repository) -> NotebookNode:
    """The first code cell of every page that computes, and the only one that differs between the languages."""
    rescue = raising(MISSING[language], "    ")
    if book.url:
        names = book._asdict()
        missing = raising(MISSING[language], "        ")
        rescue = INSTALL.format(**names, fell_back=FELL_BACK[language].format(**names), missing=missing)
    source = SETUP.format(title=TITLE[language], rescue=rescue, language=language)
    return new_code_cell(source, id="setup", metadata={"tags": ["hide-input"]})


def read_source(name: str) -> list[NotebookNode]:
    """The cells of a source, of both languages. Raises PageError unless every prose cell has its neighbour."""
    cells = jupytext.read(source_path(name), fmt="md:myst").cells
    kinds = [cell.metadata.get("lang") if cell.cell_type == "markdown" else "code" for cell in cells]
    for cell, kind in zip(cells, kinds, strict=True):
        if kind == "code" and "lang" in cell.metadata:
            raise source_error(name, cell, "code cells are shared by the languages; take its `lang` away")
        if kind not in ("code", *LANGUAGES):
            raise source_error(
                name, cell, f'prose begins with +++ {{"lang": "en"}} or +++ {{"lang": "zh"}}; got {kind!r}'
            )
    for before, cell, kind, after in zip(["code", *kinds[:-1]], cells, kinds, [*kinds[1:], "code"], strict=True):
        if (kind == "en" and after != "zh") or (kind == "zh" and before != "en"):
            raise source_error(name, cell, "English prose is directly followed by the Chinese; this cell stands alone")
    return cells


def source_error(name: str, cell: NotebookNode, what: str) -> PageError:
    return PageError(f"book/src/{name}.md, the cell that begins {cell.source[:60]!r}: {what}")


def in_language(cell: NotebookNode, key: str, name: str, language: str) -> str | None:
    """Take what a cell says in both languages, key: {en: ..., zh: ...}, out of its metadata. Returns one of the two."""
    texts = cell.metadata.pop(key, None)
    if texts is None:
        return None
    whole = isinstance(texts, dict) and sorted(texts) == list(LANGUAGES)
    if not whole or not all(isinstance(text, str) for text in texts.values()):
        raise source_error(name, cell, f"`{key}` must be a text for en and one for zh; got {texts!r}")
    return texts[language]


def comments(code: str) -> list[tokenize.TokenInfo]:
    return [t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT]


def keep_comments(cell: NotebookNode, name: str, language: str) -> str:
    """A code cell's source with one half of each comment `# English | 中文`."""
    lines = cell.source.split("\n")
    for comment in comments(cell.source):
        if re.search(r"[\u3400-\u9fff]", comment.string):
            halves = comment.string.lstrip("# ").split(" | ")
            if len(halves) != 2:
                raise source_error(name, cell, f"a comment in two languages is # English | 中文; got {comment.string}")
            row, column = comment.start
            lines[row - 1] = lines[row - 1][:column] + "# " + halves[LANGUAGES.index(language)]
    return "\n".join(lines)


def headings(text: str) -> list[str]:
    """The headings of a Markdown text, code in fences aside."""
    return re.findall(r"^#{1,6} .+$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)


def heading_ids(name: str, cells: list[NotebookNode]) -> list[str]:
    """The ids of a page's headings, in their order. Raises PageError unless every heading has one of its own."""
    ids = []
    if not any("ids" in cell.metadata for cell in cells):
        return ids
    for cell, neighbour in zip(cells, [*cells[1:], None], strict=True):
        if cell.metadata.get("lang") == "en":
            own = cell.metadata.pop("ids", [])
            counts = {len(own), len(headings(cell.source)), len(headings(neighbour.source))}
            if len(counts) != 1 or not all(re.fullmatch(r"[a-z][a-z0-9-]*", str(word)) for word in own):
                raise source_error(name, cell, f"`ids` needs one short ASCII word for each heading; got {own}")
            ids += own
        elif "ids" in cell.metadata:
            raise source_error(name, cell, "`ids` stands on the English cell; both languages have the same")
    if len(set(ids)) < len(ids):
        raise PageError(f"book/src/{name}.md: two headings have the same id: {ids}")
    return ids


def tagged(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def make_notebooks(name: str, language: str, book: Repository) -> tuple[NotebookNode, NotebookNode | None]:
    """The notebook of one language, with no outputs, and that of its solutions, if it has any.

    In the first, a solution is still a code cell: what it prints is known when the second has run.
    """
    source = read_source(name)
    ids = heading_ids(name, source)
    cells = [cell for cell in source if cell.metadata.pop("lang", language) == language]
    seen = {}
    for cell in cells:
        # Jupytext gives random ids. These stay as long as a cell's text does; equal cells are told apart by counting.
        seen[cell.source] = seen.get(cell.source, 0) + 1
        cell["id"] = hashlib.sha256(f"{seen[cell.source]} {cell.source}".encode()).hexdigest()[:12]
        if cell.cell_type == "code":
            if alt := in_language(cell, "alt", name, language):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}  # the key by which MyST-NB describes pictures
            cell.metadata |= {"explain": text} if (text := in_language(cell, "explain", name, language)) else {}
            cell.source = keep_comments(cell, name, language)
    check_exercises(name, cells)
    if code := code_cells(cells):
        cells.insert(cells.index(code[0]), setup_cell(language, book))
    page, solutions = with_cells(cells, ids), None
    if any(tagged(cell, "solution") for cell in cells):
        solutions = with_cells(solved(cells, name, language), None)
    for cell in cells:
        cell.metadata.pop("wrong", None)
    return page, solutions


def with_cells(cells: list[NotebookNode], ids: list[str] | None) -> NotebookNode:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}} | ({"headings": ids} if ids else {})
    return new_notebook(cells=cells, metadata=metadata)


# ---- Exercises


def check_exercises(name: str, cells: list[NotebookNode]) -> None:
    """Raise PageError for a blank that is none, or that is not followed by its check and its solution."""
    for cell, *after in zip(cells, [*cells[1:], None], [*cells[2:], None, None], strict=False):
        if tagged(cell, "blank"):
            if not re.search(r"^answer = None\b", cell.source, re.MULTILINE) or "wrong" not in cell.metadata:
                raise source_error(name, cell, "a blank holds the line `answer = None`, and `wrong`, a wrong answer")
            kinds = [other is not None and other.cell_type == "code" for other in after]
            if not all(kinds) or "check(" not in after[0].source or not tagged(after[1], "solution"):
                raise source_error(name, cell, "a blank is followed by its check and then by its solution")
        if tagged(cell, "solution") and "explain" not in cell.metadata:
            raise source_error(name, cell, "a solution is explained, explain: {en: ..., zh: ...}")


def solved(cells: list[NotebookNode], name: str, language: str) -> list[NotebookNode]:
    """The cells of the solutions' notebook: the page's code, then its exercises, each check with both answers."""
    cells = copy.deepcopy(cells)
    first = next(i for i, cell in enumerate(cells) if tagged(cell, "blank") or tagged(cell, "solution"))
    while cells[first - 1].cell_type == "markdown":
        first -= 1
    made = [new_markdown_cell(SOLUTIONS_OF[language].format(name=name))]
    for cell in code_cells(cells[:first]):
        if not re.search(r"^plots\.(show|slider)\(", cell.source, re.MULTILINE):
            # The page's own notebook compares these outputs.
            cell.metadata["tags"] = [tag for tag in cell.metadata.get("tags", []) if tag != "nbval-check-output"]
            made.append(cell)
    rest = iter(cells[first:])
    for cell in rest:
        if tagged(cell, "blank"):
            check, solution = next(rest), next(rest)
            wrong = new_code_cell(re.sub(r"\bNone\b.*", cell.metadata["wrong"], cell.source))
            # Each check is compared with its stored words, "right" after the one and "not right yet" after the other.
            check.metadata["tags"] = ["nbval-check-output"]
            made += [new_markdown_cell(solution.metadata.pop("explain")), solution, check, wrong, copy.deepcopy(check)]
        elif tagged(cell, "solution"):
            made += [new_markdown_cell(cell.metadata.pop("explain")), cell]
        else:
            made.append(cell)
    for number, cell in enumerate(made):
        cell["id"] = f"cell-{number}"
    return made


def fold_solutions(page: NotebookNode, solutions: NotebookNode | None, name: str, language: str) -> None:
    """Turn the page's cells of solutions into folded Markdown, with what they printed in the notebook of solutions."""
    ran = [cell for cell in solutions.cells if tagged(cell, "solution")] if solutions else []
    folded = iter(ran)
    for i, cell in enumerate(page.cells):
        if tagged(cell, "solution"):
            shown = "\n\n".join(shown_in_markdown(output, name, cell) for output in next(folded).outputs)
            parts = [
                f'<details class="solution"><summary>{SOLUTION[language]}</summary>',
                cell.metadata["explain"],
                f"```python\n{cell.source}\n```",
                *([OUTPUT[language], shown] if shown else []),
                "</details>",
            ]
            page.cells[i] = new_markdown_cell("\n\n".join(parts), id=cell["id"])


def shown_in_markdown(output: NotebookNode, name: str, cell: NotebookNode) -> str:
    data = output.get("data", {})
    if "text/html" in data:
        return data["text/html"]
    text = output.get("text", data.get("text/plain"))
    if text is None or any(kind.startswith("image/") for kind in data):
        raise source_error(name, cell, "a solution prints or shows a table: a picture cannot be folded into Markdown")
    return f"```text\n{text.rstrip()}\n```"


# ---- Outputs: carried over from the stored notebook, or computed


def code_cells(cells: list[NotebookNode]) -> list[NotebookNode]:
    return [cell for cell in cells if cell.cell_type == "code"]


def carry_over(notebook: NotebookNode, stored: NotebookNode | None) -> bool:
    """Give `notebook` the outputs of the stored one if that ran with the same code, set-up cell aside; else False.

    Outputs that are no longer those that the run gave are not carried over.
    """
    if stored is None or stored.metadata.get("outputs_sha256") != fingerprint(stored):
        return False
    new, old = code_cells(notebook.cells), code_cells(stored.cells)
    same_code = len(new) == len(old) and all(a.source == b.source for a, b in zip(new[1:], old[1:], strict=True))
    if not same_code or any(cell.execution_count is None for cell in old):
        return False
    for cell, source in zip(new, old, strict=True):
        cell.outputs, cell.execution_count = source.outputs, source.execution_count
    if "widgets" in stored.metadata:
        notebook.metadata["widgets"] = stored.metadata["widgets"]
    return True


def execute(notebook: NotebookNode, name: str, language: str) -> None:
    """Run all cells in the page's folder. Raises PageError, naming the cell, for whatever goes wrong."""
    folder = notebook_path(name, language).parent
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    client = NotebookClient(
        notebook,
        on_cell_execute=lambda cell, cell_index: started.append(cell),
        timeout=SECONDS_A_CELL,
        record_timing=False,
        coalesce_streams=True,  # else how many pieces a cell's prints come in depends on time
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],  # else each kernel warns that it talks over the network of this machine
    )
    # One thread: how a sum is split among threads decides its last digits.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise PageError(f"{place(notebook, started[-1], name, language)}\n{error.ename}: {error.evalue}") from None
    except (CellControlSignal, DeadKernelError) as error:
        raise PageError(f"{place(notebook, started[-1], name, language)}\n{error}") from None


def place(notebook: NotebookNode, cell: NotebookNode, name: str, language: str) -> str:
    """Where a code cell stands, and what is in it."""
    number = 1 + code_cells(notebook.cells).index(cell)
    return f"book/src/{name}.md in {language}, code cell {number} (the set-up cell is 1)\n\n{cell.source}\n"


def check_outputs(notebook: NotebookNode, name: str, language: str) -> None:
    """Raise PageError for what no reader should meet: words on stderr, a picture that failed or is not described."""
    for cell in code_cells(notebook.cells):
        where = place(notebook, cell, name, language)
        for output in cell.outputs:
            if output.output_type == "error":
                raise PageError(f"{where}\n{output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                raise PageError(f"{where}\nIt writes to stderr: {output.text}")
            if any(kind.startswith("image/") for kind in output.get("data", {})) and "mystnb" not in cell.metadata:
                raise PageError(f"{where}\nIt shows a picture, which needs a description, alt: {{en: ..., zh: ...}}")


# ---- The same bytes from the same source


def without_addresses(text: str) -> str:
    """<Axes at 0x7f3a...> is different in every run."""
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x0", text)


def widget_order(notebook: NotebookNode) -> list[str]:
    """The ids of the notebook's widgets in an order that does not depend on these ids, which are random."""
    state = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    order = []

    def text_of(model: str) -> str:
        return json.dumps(state[model]["state"], sort_keys=True)

    def visit(model: str) -> None:
        if model in state and model not in order:
            order.append(model)
            for other in re.findall(r"IPY_MODEL_(\w{32})", text_of(model)):
                visit(other)

    def stable_text_of(model: str) -> str:
        return re.sub(r"IPY_MODEL_(\w{32})", lambda m: str(order.index(m[1])) if m[1] in order else "", text_of(model))

    for cell in code_cells(notebook.cells):
        for output in cell.outputs:
            visit(output.get("data", {}).get(WIDGET_VIEW, {}).get("model_id"))
    # Nothing points at the models of jslink; they point at the others.
    for model in sorted(set(state) - set(order), key=stable_text_of):
        visit(model)
    return order


def to_text(notebook: NotebookNode) -> str:
    """The notebook's file: the same bytes whenever its cells and its outputs are the same."""
    for cell in code_cells(notebook.cells):
        for output in cell.outputs:
            if "text" in output:
                output.text = without_addresses(output.text)
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = without_addresses(output.data["text/plain"])
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    for number, model in enumerate(widget_order(notebook)):
        text = text.replace(model, f"{number:032x}")
    made = json.loads(text)
    made["metadata"]["outputs_sha256"] = fingerprint(nbformat.reads(text, as_version=4))
    return json.dumps(made, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def fingerprint(notebook: NotebookNode) -> str:
    """The sha256 of what the cells of a notebook gave when they ran: with it, outputs that were edited are noticed."""
    outputs = [[cell.outputs, cell.execution_count] for cell in code_cells(notebook.cells)]
    everything = [outputs, notebook.metadata.get("widgets")]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


# ---- The command


def stored_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def write(path: Path, text: str) -> None:
    """All of the file or nothing: a reader, or a run that is stopped, never sees half of it."""
    half = path.with_suffix(".half")
    path.parent.mkdir(parents=True, exist_ok=True)
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def finish(notebook: NotebookNode, path: Path, name: str, language: str, run: bool | None) -> bool:
    """Give a notebook its outputs: run it (True), or take the stored ones if its code is unchanged and run it else
    (False) or not at all (None). Returns whether it has them.
    """
    text = stored_text(path)
    stored = nbformat.reads(text, as_version=4) if text else None
    if code_cells(notebook.cells) and (run or not carry_over(notebook, stored)):
        if run is None:
            return False
        # A kernel writes into the notebook's metadata whatever it says about itself, down to its version.
        metadata = dict(notebook.metadata)
        execute(notebook, name, language)
        widgets = {key: value for key, value in notebook.metadata.items() if key == "widgets"}
        notebook.metadata = NotebookNode(metadata | widgets)
    check_outputs(notebook, name, language)
    return True


def render(name: str, language: str, book: Repository, run: bool | None) -> dict[Path, str] | None:
    """The files of a page in one language as they should be; None if that takes a run and `run` is None."""
    page, solutions = make_notebooks(name, language, book)
    texts = {}
    if solutions:
        path = solutions_path(name, language)
        if not finish(solutions, path, name, language, run):
            return None
        texts[path] = to_text(solutions)
        check_answers(solutions, name)
    fold_solutions(page, solutions, name, language)
    path = notebook_path(name, language)
    return texts | {path: to_text(page)} if finish(page, path, name, language, run) else None


def check_answers(solutions: NotebookNode, name: str) -> None:
    """Raise PageError unless each check took the solution for right, and the wrong answer for wrong."""
    checks = [cell for cell in code_cells(solutions.cells) if re.search(r"^check\(", cell.source, re.MULTILINE)]
    for number, cell in enumerate(checks):
        says = "".join(output.get("text", "") for output in cell.outputs).strip()
        if (says in ("Right.", "正确。")) != (number % 2 == 0):
            answer = "its solution" if number % 2 == 0 else "the wrong answer"
            raise source_error(name, cell, f"this check says of {answer}: {says}")


def generate(name: str, book: Repository, run_all: bool) -> str:
    """Write all notebooks of a page, or none of them if one fails. Returns what was done, in words."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(LANGUAGES)) as pool:  # each thread waits for a kernel, a process of its own
        made = list(pool.map(lambda language: render(name, language, book, run_all), LANGUAGES))
    changed = []
    for language, texts in zip(LANGUAGES, made, strict=True):
        new = {path: text for path, text in texts.items() if text != stored_text(path)}
        changed += [language] * bool(new)
        for path, text in new.items():
            write(path, text)
    return f"{name}: wrote {' and '.join(changed) or 'nothing, it is unchanged'} ({time.perf_counter() - start:.1f} s)"


def check(name: str, book: Repository) -> None:
    """Raise PageError unless the stored notebooks are what the source gives. Runs nothing, writes nothing."""
    for language in LANGUAGES:
        texts = render(name, language, book, None)
        if texts is None or any(stored_text(path) != text for path, text in texts.items()):
            raise PageError(f"book/{language}/{name}.ipynb is not what book/src/{name}.md gives: run  make notebooks")


def strays() -> list[str]:
    """Notebooks that no source stands behind."""
    folders = [path("x", language).parent for path in (notebook_path, solutions_path) for language in LANGUAGES]
    notebooks = [path for folder in folders for path in folder.glob("*.ipynb")]
    kept = [path for path in notebooks if source_path(path.stem).exists()]
    kept = [p for p in kept if p.parents[1].name != "solutions" or "solution" in source_path(p.stem).read_text("utf-8")]
    return [str(path.relative_to(ROOT)) for path in sorted(set(notebooks) - set(kept))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="NAME", help="a page, book/src/NAME.md (default: every page)")
    parser.add_argument("--all", action="store_true", help="execute pages again even if their code is unchanged")
    parser.add_argument("--check", action="store_true", help="only say whether the notebooks are up to date")
    arguments = parser.parse_args()

    pages = sorted(path.stem for path in source_path("x").parent.glob("*.md"))
    if unknown := sorted(set(arguments.pages) - set(pages)):
        parser.error(f"no page {', '.join(unknown)}; the pages are {', '.join(pages)}")
    book, problems = repository(), [f"{path} has no source in book/src: delete it" for path in strays()]
    for name in arguments.pages or pages:
        try:
            if arguments.check:
                check(name, book)
            else:
                print(generate(name, book, arguments.all), flush=True)
        except PageError as error:
            problems.append(str(error))
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

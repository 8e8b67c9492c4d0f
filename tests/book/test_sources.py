"""The committed notebooks: what the sources give, the same in both languages, executed, described, small."""

import ast
import json
import re
import unicodedata
from functools import cache
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from books import LANGUAGES, REWRITTEN, ROOT, check_widgets, check_words, make_notebooks

NAMES = sorted(path.stem for path in (ROOT / "book" / "src").glob("*.md"))
assert len(NAMES) >= 6, "the tests below run once a page"
each_page = pytest.mark.parametrize("name", NAMES)
each_rewritten_page = pytest.mark.parametrize("name", REWRITTEN)
each_notebook = pytest.mark.parametrize(
    ("name", "language"), [(name, language) for name in NAMES for language in LANGUAGES]
)


@cache
def notebook(name: str, language: str, root: Path = ROOT) -> nbformat.NotebookNode:
    return nbformat.read(root / "book" / language / f"{name}.ipynb", as_version=4)


def cells(name: str, language: str, kind: str) -> list:
    return [cell for cell in notebook(name, language).cells if cell.cell_type == kind]


def outputs(name: str, language: str) -> list:
    return [output for cell in cells(name, language, "code") for output in cell.outputs]


def test_committed_notebooks_are_what_the_sources_give():
    done = make_notebooks(ROOT, "--check")
    assert done.status == 0, done.output


def test_every_page_is_in_the_contents_in_both_languages():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert sorted(files) == sorted(f"book/{language}/{name}" for name in NAMES for language in LANGUAGES)
    order = [[Path(file).name for file in files if file.startswith(f"book/{language}/")] for language in LANGUAGES]
    assert order[0] == order[1], "both languages have the pages in the same order"


@each_page
def test_prose_stands_in_pairs(name):
    english, chinese = ([cell.cell_type for cell in notebook(name, language).cells] for language in LANGUAGES)
    assert english == chinese and "markdown" in english
    source = (ROOT / "book" / "src" / f"{name}.md").read_text(encoding="utf-8")
    marks = re.findall(r'^\+\+\+ \{"lang": "(\w+)"[,}]', source, flags=re.MULTILINE)
    solutions = len(re.findall(r"^tags: \[solution\]$", source, flags=re.MULTILINE))  # code there, prose in the page
    assert marks == list(LANGUAGES) * (len(marks) // 2)
    assert len(marks) == 2 * (english.count("markdown") - solutions)


@each_page
def test_prose_is_in_its_language(name):
    for english, chinese in zip(cells(name, "en", "markdown"), cells(name, "zh", "markdown"), strict=True):
        assert english.source != chinese.source
        assert re.search(r"[\u3400-\u9fff]", chinese.source), chinese.source


@each_page
def test_code_is_the_same_in_both_languages_but_for_comments_and_the_set_up(name):
    english, chinese = cells(name, "en", "code"), cells(name, "zh", "code")
    assert [ast.dump(ast.parse(cell.source)) for cell in english[1:]] == [
        ast.dump(ast.parse(cell.source)) for cell in chinese[1:]
    ]
    for language, code in (("en", english), ("zh", chinese)):
        if code:
            assert code[0].id == "setup" and f'use_language("{language}")' in code[0].source
            assert all("use_language(" not in cell.source for cell in code[1:])


def displayed_formulas(name: str, language: str) -> list[str]:
    return re.findall(r"\$\$(.+?)\$\$", "\n".join(cell.source for cell in cells(name, language, "markdown")), re.DOTALL)


@each_page
def test_displayed_formulas_are_the_same_in_both_languages(name):
    assert displayed_formulas(name, "en") == displayed_formulas(name, "zh")


def test_there_are_displayed_formulas_and_code():
    assert sum(len(displayed_formulas(name, "zh")) for name in NAMES) >= 2
    assert sum(len(cells(name, "zh", "code")) for name in NAMES) >= 2


@each_notebook
def test_every_code_cell_was_executed_in_order_and_quietly(name, language):
    code = cells(name, language, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in outputs(name, language):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert "missing from font" not in json.dumps(output), "a character that the figure's font does not have"


@each_notebook
def test_every_picture_is_described_in_the_language_of_the_page(name, language):
    for cell in cells(name, language, "code"):
        if any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {})):
            check_words(cell.metadata["mystnb"]["image"]["alt"], language)


@each_notebook
def test_every_slider_is_stored_and_described(name, language):
    check_widgets(notebook(name, language), language)


@each_notebook
def test_notebooks_stay_small(name, language):
    assert (ROOT / "book" / language / f"{name}.ipynb").stat().st_size <= 1_000_000


def columns(line: str) -> int:
    """The width of a line of code: a Chinese character takes two columns."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


@each_page
def test_code_fits_its_box(name):
    for language in LANGUAGES:
        for cell in cells(name, language, "code"):
            widest = max(cell.source.split("\n"), key=columns)
            assert columns(widest) <= 84, widest


@each_rewritten_page
def test_cells_are_short_and_drawing_is_folded(name):
    for language in LANGUAGES:
        for cell in cells(name, language, "code")[1:]:
            folded = "hide-input" in cell.metadata.get("tags", [])
            assert folded or len(cell.source.split("\n")) <= 20, cell.source
            assert folded or "plots." not in cell.source, "it draws: fold it"


@each_rewritten_page
def test_what_a_page_builds_is_short_compared_and_not_called(name):
    """A cell tagged `builds: [module.thing]` writes it from smaller parts and asserts that the package agrees."""
    built = []
    for cell in cells(name, "en", "code"):
        for thing in cell.metadata.get("builds", []):
            tree = ast.parse(cell.source)
            parts = [part for part in tree.body if isinstance(part, ast.FunctionDef)]
            assert parts, cell.source
            for part in parts:
                assert part.end_lineno - part.lineno < 12, part.name
                called = {ast.unparse(call.func) for call in ast.walk(part) if isinstance(call, ast.Call)}
                assert not called & {thing, thing.split(".")[-1]}, f"{part.name} calls what it builds"
            assert any(isinstance(part, ast.Assert) for part in tree.body), "nothing is compared"
            built.append(thing)
    assert len(built) == len(set(built)) >= 4


STEPS = yaml.safe_load((ROOT / "book" / "src" / "steps.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_documented_step_loss_and_claim_is_named_by_a_cell(name, language):
    """book/src/steps.yml lists what the documentation says; a cell's `steps: [..]` names what it builds or tests."""
    named = {step for cell in cells(name, language, "code") for step in cell.metadata.get("steps", [])}
    assert named == {f"{name}.{step}" for step in STEPS[name]}
    assert all(sorted(words) == list(LANGUAGES) for words in STEPS[name].values())


# What a Chinese page may print in Latin letters: names of models, methods, measures, streets, and code.
LATIN = {
    "MSE",
    "MAE",
    "DLinear",
    "PatchTST",
    "iTransformer",
    "TimesNet",
    "TimeXer",
    "SFT",
    "GRPO",
    "DAPO",
    "LoRA",
    "PEFT",
    "KL",
    "AUC",
    *("logit", "ZeRO", "Gbit"),
    "SGD",
    "Adam",
    "ETTh",
    *(
        "GPU",
        "CPU",
        "NVIDIA",
        "Tesla",
        "GeForce",
        "RTX",
        "Colab",
        "Triton",
        "PyTorch",
        "Liger",
        "SmolLM",
        "PCIe",
        "NVLink",
    ),
    "Auckland",
    "MiB",
    "cos",
    "Queen",
    "Street",
    "Quay",
    "Shortland",
    "Federal",
    "Road",
    "Custom",
    "East",
    "SmolLM",
    "neuralforecast",
    "transformers",
    "float",
    "torch",
    "tensor",
    "min",
    "None",
    "head_loss",
    "head_logprobs",
}


LATIN_WORD = r"[A-Za-z][A-Za-z_]{2,}"


@each_page
def test_chinese_pages_print_chinese(name):
    allowed = LATIN | words_of_assignments() if name == "teaching" else LATIN
    for cell in cells(name, "zh", "code"):
        if "error" in cell.metadata.get("tags", []):
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            if any(kind.startswith(("image/", "application/vnd")) for kind in data):
                continue
            for line in (output.get("text") or data.get("text/plain", "")).split("\n"):
                words = set(re.findall(LATIN_WORD, re.sub(r"`.*?`|\$.*?\$", "", line)))
                command = re.match(r"\s*(python|mini-impl|--)|.*\btorch \d", line)
                assert command or words <= allowed, f"{name}: {line}"


@cache
def words_of_assignments() -> set[str]:
    """Their names, and those in their code, of which the teacher's page tells."""
    paths = list((ROOT / "book" / "assignments").glob("*.md"))
    sources = [jupytext.read(path, fmt="md:myst") for path in paths]
    code = [cell.source for source in sources for cell in source.cells if cell.cell_type == "code"]
    told = {"NaN", "mse_loss", "reshape", "item", "detach", "numpy", "no_grad"}
    return set(re.findall(LATIN_WORD, "\n".join(code))) | {path.stem for path in paths} | told


# The glossary has the word that the book uses; of these, each was used for the same thing once.
VARIANTS = (
    "原文写错",
    "原文的损失",
    "原文损失",
    "批大小",
    "平均值",
    "坏例",
    "裁剪",
    "季节项",
    "移动预测",
    "可以什么都不说",
    "印出",
    "一半不到",
    "截尾",
)


@each_page
def test_chinese_pages_use_the_words_of_the_glossary(name):
    for cell in cells(name, "zh", "markdown"):
        assert not [word for word in VARIANTS if word in cell.source], cell.source

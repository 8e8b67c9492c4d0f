"""Slides and the printed book: nothing of a chapter is missing on its slides, nothing overflows, links work."""

import html
import json
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from books import LANGUAGES, ROOT, run, tool
from pypdf import PdfReader

TOOLS = ROOT / "book" / "tools"


@cache
def slides() -> ModuleType:
    return tool("slides")


@cache
def pdf() -> ModuleType:
    return tool("pdf")


def notebook(name: str, language: str) -> dict:
    return json.loads((ROOT / "book" / language / f"{name}.ipynb").read_text("utf-8"))


def before_exercises(name: str, language: str) -> list[dict]:
    """The cells of a chapter up to its exercises."""
    heading = {"en": "## Exercises", "zh": "## 练习"}[language]
    cells = notebook(name, language)["cells"]
    texts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else "" for cell in cells]
    return cells[: next(i for i, text in enumerate(texts) if heading in text.split("\n"))]


def formulas(name: str, language: str) -> list[str]:
    text = "\n".join("".join(c["source"]) for c in before_exercises(name, language) if c["cell_type"] == "markdown")
    return [found.strip() for found in re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)]


def pictures(name: str, language: str) -> int:
    kinds = {"image/svg+xml", "application/vnd.jupyter.widget-view+json"}
    outputs = [output for cell in before_exercises(name, language) for output in cell.get("outputs", [])]
    return sum(bool(kinds & set(output.get("data", {}))) for output in outputs)


def fonts(reader: PdfReader) -> list[tuple[str, bool]]:
    """The name of each font of a PDF, and whether the file holds its glyphs."""
    found = {}
    for page in reader.pages:
        for font in (page["/Resources"].get("/Font") or {}).values():
            font = font.get_object()
            whole = font.get("/DescendantFonts", [font])[0].get_object()
            described = whole.get("/FontDescriptor", {})
            held = font["/Subtype"] == "/Type3" or any(key.startswith("/FontFile") for key in described.get_object())
            found[str(font.get("/BaseFont", "drawn"))] = held
    return sorted(found.items())


# ---- Slides


def test_every_chapter_has_slides():
    assert set(slides().chapters()) >= {"dlinear", "sft", "grpo", "attention", "series", "forecasters", "gpu", "scale"}
    assert not {"index", "start", "glossary", "losses"} & set(slides().chapters())


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_formula_and_every_figure_is_on_a_slide(language):
    for name in slides().chapters():
        deck = slides().deck(notebook(name, language), language)
        shown = "".join(block.html for section in deck.sections for block in section.blocks)
        on_slides = [html.unescape(tex).strip() for tex in re.findall(r"\\\[(.+?)\\\]", shown, re.DOTALL)]
        assert on_slides == formulas(name, language), name
        assert shown.count("<img ") == pictures(name, language), name
        assert "answer = None" not in shown, name
        assert deck.box and all(section.blocks for section in deck.sections), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_slides_begin_with_the_question_and_end_with_the_five_lines(language):
    deck = slides().deck(notebook("dlinear", language), language)
    question, goal, time = deck.box
    assert question.startswith({"en": "<strong>The question.", "zh": "<strong>本章的问题"}[language])
    assert goal.startswith({"en": "<strong>Afterwards", "zh": "<strong>读完之后"}[language])
    assert (
        time
        == {
            "en": "<strong>Time:</strong> 45 minutes to read, less than a minute to run.",
            "zh": "<strong>时间</strong>：阅读 45 分钟，运行不到一分钟。",
        }[language]
    )
    assert deck.sections[-1].title == {"en": "In five lines", "zh": "小结"}[language]
    assert 3 <= deck.sections[-1].blocks[0].html.count("<li>") <= 6


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("One. Two 0.5 and $a. B$? Three", ["One.", "Two 0.5 and $a. B$?", "Three"]),
        ("**A claim.** Why. [Is it? Yes](a.ipynb) so", ["**A claim.**", "Why.", "[Is it? Yes](a.ipynb) so"]),
        ("**Two. Sentences.** Rest.", ["**Two. Sentences.**", "Rest."]),
        ("第一句。第二句 $x。y$！第三句", ["第一句。", "第二句 $x。y$！", "第三句"]),
        ("他问“是谁？”，没人答。**结论。** 其余", ["他问“是谁？”，没人答。", "**结论。**", "其余"]),
        ("", []),
    ],
)
def test_sentences(paragraph, expected):
    assert slides().sentences(paragraph) == expected


def laid_out(browser, folder: Path, deck) -> tuple:
    """The page of a deck laid out, and the number of its slides."""
    document = folder / "deck.html"
    document.write_text(slides().as_html(deck, "en", slides().stylesheet(folder)), encoding="utf-8")
    page = browser.new_page()
    return page, slides().lay_out(page, document)


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_slides_of_a_chapter(browser, assets, tmp_path, language):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    count = slides().make(page, "dlinear", language, slides().stylesheet(tmp_path), tmp_path, tmp_path / "out")
    assert 15 <= count <= 40
    assert all(url.startswith(("file:", "data:")) for url in asked)

    numbered = [m[1] for tex in formulas("dlinear", language) if (m := re.search(r"\\tag\{(\d+)\}", tex))]
    shown = page.locator(".display mjx-container[display=true]")
    assert shown.count() == len(formulas("dlinear", language))
    assert page.locator(".display mjx-labels").count() == len(numbered) > 10
    assert page.locator("figure img").count() == pictures("dlinear", language)
    # Every block of every slide ends above the slide's footer, measured by another way than the layout itself uses.
    ends = page.evaluate(
        """[...document.querySelectorAll(".slide")].map((slide) => {
             const floor = slide.querySelector("footer").getBoundingClientRect().top + 12;
             return [...slide.querySelectorAll(".block")].every((block) => {
               const box = block.getBoundingClientRect();
               return box.height > 0 && box.bottom <= floor && block.scrollWidth <= block.clientWidth;
             });
           })"""
    )
    assert len(ends) == count and all(ends), ends

    reader = PdfReader(tmp_path / "out" / language / "dlinear.pdf")
    assert len(reader.pages) == count
    width, height = reader.pages[0].mediabox[2:]
    assert width / height == pytest.approx(16 / 9, rel=1e-3)
    assert all(held for _, held in fonts(reader)), fonts(reader)
    assert {"en": "trend branch", "zh": "第二个目标训练了趋势分支"}[language] in reader.pages[2].extract_text()
    assert not list((tmp_path / "out").rglob("*.half"))


@pytest.mark.slow
def test_what_is_too_much_goes_on_and_what_is_too_large_shrinks(browser, assets, tmp_path):
    module = slides()
    lines = [module.Block(f"<p>{'A line of some length. ' * 12}</p>", "claim") for _ in range(9)]
    table = module.Block("<table>" + "<tr><td>row</td></tr>" * 16 + "</table>")
    sections = [module.Section("Many", "", lines), module.Section("Large", "", [table])]
    page, count = laid_out(browser, tmp_path, module.Deck("Deck", ["Box"], sections))
    headings = page.locator(".slide h2").all_inner_texts()
    assert headings == [*("Many", "Many (2)", "Many (3)")[: count - 2], "Large"] and count >= 4
    assert page.locator(".slide p", has_text="A line of").count() == 9
    assert page.evaluate("parseFloat(document.querySelector('table').closest('.block').style.fontSize)") < 1


@pytest.mark.slow
def test_a_slide_that_cannot_hold_its_block_is_an_error(browser, assets, tmp_path):
    module = slides()
    tall = module.Block('<div style="height: 900px">tall</div>')
    deck = module.Deck("Deck", ["Box"], [module.Section("Tall", "", [tall])])
    with pytest.raises(module.PrintError, match="deck: too much for slide 2, even set small"):
        laid_out(browser, tmp_path, deck)


def test_unknown_names_are_refused(tmp_path):
    for program, name in (("slides", "glossary"), ("pdf", "nothing")):
        done = run(sys.executable, TOOLS / f"{program}.py", name, "--out", tmp_path, cwd=ROOT)
        assert done.status == 2 and name in done.output and "dlinear" in done.output
    assert not list(tmp_path.iterdir())


def test_without_a_browser_one_sentence_says_so(monkeypatch):
    module = tool("printing")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(module.PrintError, match="apt install chromium"), module.browser_page():
        pass


# ---- The book

PAGE = """<html><body><nav><a href="x.html">menu</a></nav><article class="bd-article">
<section id="top"><h1>Top<a class="headerlink" href="#top">#</a></h1>
<p id="eq-1">See <a href="#eq-1">(1)</a>, <a href="other.html">other</a>, <a href="other.html#term-a">a</a>,
<a href="../download/x.ipynb">file</a> and <a href="https://example.org/a">out</a>.</p>
<details class="admonition hide"><summary>Show</summary><pre>folded = 1</pre></details>
<script>1</script>
<noscript><figure><img src="_images/a.svg" alt="a"><figcaption>No JavaScript</figcaption></figure></noscript>
<section id="exercises"><h2>Exercises</h2><p><strong>1 (warm-up).</strong> How many?</p>
<details><summary>Hint</summary><p>Count.</p></details>
<div class="cell tag_blank">answer = None</div><div class="cell">check(answer)</div>
<details class="solution"><summary>Solution</summary><p>Two.</p></details>
<p><strong>2 (open).</strong> Why?</p></section></section></article></body></html>"""


def test_a_page_becomes_a_chapter(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "page.html").write_text(PAGE, encoding="utf-8")
    made = pdf().chapter(tmp_path, "en", "page", ["page", "other"])
    assert made.title == "Top"
    assert made.sections == [("page--exercises", "Exercises"), ("page--solutions", "Solutions")]
    links = {link.get_text(): link.get("href") for link in made.article.find_all("a")}
    assert links == {
        "(1)": "#page--eq-1",
        "other": "#other",
        "a": "#other--term-a",
        "file": None,
        "out": "https://example.org/a",
    }
    text = made.article.get_text()
    for gone in ("menu", "folded", "answer = None", "check(answer)", "No JavaScript"):
        assert gone not in text
    assert re.search(r"Hint\s*Count\..*Why\?.*Solutions\s*1 \(warm-up\)\.\s*Two\.", text, re.DOTALL)
    assert made.article.img["src"] == (tmp_path / "en" / "_images" / "a.svg").as_uri()
    assert made.article.find("details") is None and made.article.find(id="page--eq-1")


def test_the_parts_of_the_book_are_those_of_the_site():
    for language in LANGUAGES:
        names = [name for _, some in pdf().parts(language) for name in some]
        assert names[0] == "index" and {"dlinear", "dapo", "scale", "glossary"} <= set(names)
        assert len(names) == len(set(names))
    assert [len(some) for _, some in pdf().parts("en")] == [len(some) for _, some in pdf().parts("zh")]


def test_without_a_site_nothing_is_printed(assets, browser, tmp_path):
    with pytest.raises(pdf().PrintError, match="run  make book"):
        pdf().make(browser.new_page(), tmp_path, "en", tmp_path, tmp_path / "book-en.pdf")
    assert not list(tmp_path.glob("*.pdf"))


@pytest.mark.slow
def test_two_pages_as_a_book(browser, site, tmp_path):
    page, target = browser.new_page(), tmp_path / "book-zh.pdf"
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    pdf().make(page, site, "zh", tmp_path, target, ["dlinear", "glossary"])
    assert all(url.startswith(("file:", "data:")) for url in asked)
    reader = PdfReader(target)
    texts = [one.extract_text() for one in reader.pages]
    assert 20 < len(texts) < 60 and target.stat().st_size < 8e6
    assert reader.metadata.title == "逐行推导损失函数"
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
    assert version in texts[0] and "CC BY 4.0" in texts[0] and "2026" in texts[0]

    # The table of contents names the page on which each heading stands.
    listed = dict(re.findall(r"^(.+?) ?(\d+)$", texts[1], re.MULTILINE))
    for heading in ("逐步搭出模型", "陷阱", "小结", "练习", "解答", "术语表"):
        assert heading in texts[int(listed[heading]) - 1], heading
        assert listed[heading] in texts[int(listed[heading]) - 1].split("\n"), "the page bears its number"
    bookmarks = [one["/Title"] for one in reader.outline if isinstance(one, dict)]
    assert bookmarks == ["DLinear", "术语表"]

    # Links lead to places in the book: none to the disk that it was made on.
    links = [note.get_object() for one in reader.pages for note in one.get("/Annots", [])]
    addresses = {note["/A"]["/URI"] for note in links if "/URI" in note.get("/A", {})}
    assert addresses and all(address.startswith("https://") for address in addresses), addresses
    assert sum("/Dest" in note or "/D" in note.get("/A", {}) for note in links) > 50
    assert all(held for _, held in fonts(reader)), fonts(reader)
    whole = "".join(texts)
    assert "移动平均" in whole and "显示代码" not in whole and "answer = None" not in whole

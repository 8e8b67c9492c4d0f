"""Slides of each chapter, in both languages: _build/slides/en/NAME.pdf and _build/slides/zh/NAME.pdf.

Nothing on them is written by hand. By rule they take from a chapter's notebook, in its order:

- the title, the question, what the reader will be able to do, and the time, from the box at its beginning;
- every numbered or displayed formula, with the sentence before it, and the one after it if that goes on ("where ...");
- every figure, with its description as a caption; of a slider, the picture that it begins with;
- every claim, which is a paragraph that begins in bold: what is bold, and one sentence more;
- every cell that builds a part of the package, and every table that stands for itself (its code
  folded, or captioned), with two sentences before it;
- the closing lines.

Exercises and sources stay out. What is too much for one slide goes on in the next; what is too large for one is set
smaller. It takes Chromium, and no network.
"""

import argparse
import base64
import html
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from playwright.sync_api import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "ext"))

from printing import (
    BOOK,
    LANGUAGES,
    MATHJAX,
    ROOT,
    TAGS,
    PrintError,
    browser_page,
    open_and_typeset,
    print_pdf,
    write_fonts,
)
from still import first_picture

STYLE = Path(__file__).with_name("slides.css")
SCRIPT = Path(__file__).with_name("slides.js")
MATHJAX_OPTIONS = "{options: {enableMenu: false}, chtml: {matchFontHeight: false, scale: 1.1}}"
LICENCE = {"en": "Text: CC BY 4.0", "zh": "文字：CC BY 4.0"}
# The paragraphs of the box that the first slide shows, by what is bold in them. The last gives the time alone.
BOX = {"en": ("The question", "Afterwards you can", "Time"), "zh": ("本章的问题", "读完之后", "时间")}
END = ("exercises", "sources")
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# What no sentence ends in: formulas, code, links.
CLOSED = re.compile(r"\$[^$]+\$|`[^`]+`|\[[^\]]*\]\([^)]*\)")
# Bold words may end with the sentence or begin after it: both places are tried, and the one that tears none is taken.
SENTENCE_END = re.compile(
    r"(?<=[.?!])\s+|(?<=[.?!][)\"”])\s+|(?<=[.?!]\*\*)\s+"
    r"|(?<=[。？！])(?=[^”），、；])|(?<=[。？！][”）])(?=[^，、；])|(?<=[。？！]\*\*)(?=[^”），、；])"
)
SHORT = 45  # letters; a Chinese character says as much as two or three
GOES_ON = re.compile(r"[a-z]|其中|这里")


def set_formula(tex: str, options: dict) -> str:
    tex = html.escape(tex)
    return rf"\[{tex}\]" if options["display_mode"] else rf"\({tex}\)"


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table").use(dollarmath_plugin, renderer=set_formula)


@dataclass
class Block:
    """What stays together on a slide, as HTML; `claim` as its kind, if it is one."""

    html: str
    kind: str = ""


class Section(NamedTuple):
    """A section's heading, that of the one it stands in ("" if none), and what its slides show."""

    title: str
    within: str
    blocks: list[Block]


class Deck(NamedTuple):
    """The slides of a chapter before they are laid out."""

    title: str
    box: list[str]
    sections: list[Section]


# ---- From a notebook to blocks


def inline(text: str) -> str:
    """Markdown of one paragraph as HTML, its links as plain words."""
    tokens = MARKDOWN.parseInline(text)
    tokens[0].children = [t for t in tokens[0].children if t.type not in ("link_open", "link_close")]
    return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph. One that would be torn out of bold words stays with its neighbour."""
    hidden = []

    def hide(found: re.Match) -> str:
        hidden.append(found[0])
        return f"\x00{len(hidden) - 1}\x00"

    flat = CLOSED.sub(hide, " ".join(text.split("\n")))
    found, start = [], 0
    for end in [*(match.end() for match in SENTENCE_END.finditer(flat)), len(flat)]:
        if end > start and flat[start:end].count("**") % 2 == 0:
            found.append(flat[start:end].strip())
            start = end
    return [re.sub(r"\x00(\d+)\x00", lambda m: hidden[int(m[1])], one) for one in found if one]


def joined(parts: list[str]) -> str:
    """Sentences as a paragraph; after a Chinese one comes no space."""
    return "".join(one if re.search(r"[。？！”）]\*{0,2}$", one) else f"{one} " for one in parts).strip()


def claim(parts: list[str]) -> list[str]:
    """Of a paragraph's sentences, what is bold at the beginning, and the sentence after it."""
    return parts[: 2 if re.fullmatch(r"\*\*[^*]+\*\*[.。：:]?", parts[0]) else 1]


def lead(parts: list[str], least: int = 1) -> str:
    """The last sentence of a paragraph, as HTML; one more if it says little ("So")."""
    width = sum(1 + 1.5 * (sign > "\u2e7f") for sign in parts[-1]) if parts else 0
    said = joined(parts[-max(least, 1 + (width < SHORT)) :])
    return f"<p>{inline(said)}</p>" if said else ""


def prose(tokens: list[Token], section: Section) -> list[str]:
    """Add what the slides take from text without headings. Returns the sentences at its end that they do not show."""
    before, folded, cut_here = [], 0, False
    for place, token in enumerate(tokens):
        if token.type == "html_block":
            folded += token.content.count("<details") - token.content.count("</details")
        elif folded:
            continue
        elif token.type in ("math_block", "math_block_label"):
            shown = f'<div class="display">{MARKDOWN.renderer.render([token], MARKDOWN.options, {})}</div>'
            section.blocks.append(Block(lead(before) + shown))
            before, cut_here = [], True
        elif token.type == "inline":
            parts, top = sentences(token.content), tokens[place - 1].type == "paragraph_open" and token.level == 1
            before = parts
            if cut_here and top and GOES_ON.match(parts[0]):
                section.blocks[-1].html += f"<p>{inline(parts[0])}</p>"
                before = parts[1:]
            elif top and parts[0].startswith("**"):
                section.blocks.append(Block(f"<p>{inline(joined(claim(parts)))}</p>", "claim"))
                before = parts[len(claim(parts)) :]
            cut_here = False
    return before


def figure(picture: str, alt: str) -> Block:
    alt = html.escape(alt)
    return Block(f'<figure><img src="{picture}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')


def shown_by(cell: dict, page: dict, before: list[str]) -> list[Block]:
    """What a code cell gives: its code if it builds a part of the package, its pictures, its tables.

    before: the sentences before the cell, the last of which introduce a table.
    """
    tags, blocks = cell["metadata"].get("tags", []), []
    if "builds" in cell["metadata"]:
        blocks.append(Block(highlight("".join(cell["source"]), PythonLexer(), HtmlFormatter())))
    for output in cell["outputs"]:
        data = output.get("data", {})
        if svg := "".join(data.get("image/svg+xml", "")):
            address = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
            blocks.append(figure(address, cell["metadata"]["mystnb"]["image"]["alt"]))
        elif WIDGET_VIEW in data:
            models = page["metadata"]["widgets"][WIDGET_STATE]["state"]
            source, alt = re.search(
                r'src="([^"]*)" alt="(.*)" />$', first_picture(models, data[WIDGET_VIEW]["model_id"])
            ).groups()
            blocks.append(figure(source, alt))
        elif (table := "".join(data.get("text/html", ""))) and ("hide-input" in tags or "<caption" in table):
            blocks.append(Block(("" if "<caption" in table else lead(before, 2)) + table))
    return blocks


def lines(tokens: list[Token]) -> str:
    """The first list of a cell, as HTML; its text if it has none."""
    kinds = [token.type for token in tokens]
    if "bullet_list_open" not in kinds:
        return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    first, last = kinds.index("bullet_list_open"), kinds.index("bullet_list_close")
    return MARKDOWN.renderer.render(tokens[first : last + 1], MARKDOWN.options, {})


def opening(tokens: list[Token], language: str) -> list[str]:
    """What the first slide shows of the box; of a chapter without one, its first paragraph."""
    texts = [token.content for token in tokens if token.type == "inline"]
    question, goal, time = BOX[language]
    found = [inline(text) for text in texts if text.startswith((f"**{question}", f"**{goal}"))]
    found += [inline(f"**{time}" + text.split(f"**{time}")[1]) for text in texts if f"**{time}" in text]
    return found or [inline(text) for text in texts[:1]]


def deck(page: dict, language: str) -> Deck:
    """The slides of a notebook that has a section `exercises`."""
    ids = iter(page["metadata"]["headings"])
    title, within, box, sections, before, skip = "", "", [], [], [], False
    for cell in page["cells"]:
        if cell["cell_type"] == "code":
            if not skip and (blocks := shown_by(cell, page, before)):
                sections[-1].blocks.extend(blocks)
                before = []
            continue
        tokens = MARKDOWN.parse("".join(cell["source"]))
        starts = [place for place, token in enumerate(tokens) if token.type == "heading_open"]
        if not skip and sections:
            before = prose(tokens[: starts[0] if starts else None], sections[-1])
        for start, end in zip(starts, [*starts[1:], None], strict=False):
            name, words, rest = next(ids), tokens[start + 1].content, tokens[start + 3 : end]
            skip = name in END
            tag = tokens[start].tag
            if tag == "h1":
                title, box = words, opening(rest, language)
            sections.append(Section(inline(words), inline(within) if tag == "h3" else "", []))
            within = words if tag == "h2" else within
            if name == "five-lines":
                sections[-1].blocks.append(Block(lines(rest)))
                skip = True
            elif not skip:
                before = prose(rest, sections[-1])
    return Deck(title, box, [section for section in sections if section.blocks])


# ---- From blocks to a file


def as_html(slides: Deck, language: str, style: str) -> str:
    """The document that slides.js lays out."""
    groups = "\n".join(
        f'<section class="group"><h2>{one.title}</h2><p>{one.within or inline(slides.title)}</p>'
        + "".join(f'<div class="block {block.kind}">{block.html}</div>' for block in one.blocks)
        + "</section>"
        for one in slides.sections
    )
    box = "".join(f'<div class="block"><p>{text}</p></div>' for text in slides.box)
    return f"""<!DOCTYPE html>
<html lang="{TAGS[language]}"><head><meta charset="utf-8"><title>{html.escape(slides.title)} · {BOOK[language]}</title>
<style>{style}</style>
<script>window.MathJax = {MATHJAX_OPTIONS}</script>
<script defer src="{MATHJAX.as_uri()}"></script>
<script>{SCRIPT.read_text("utf-8")}</script></head>
<body data-book="{BOOK[language]} · {LICENCE[language]}">
<section class="slide title"><h1>{inline(slides.title)}</h1><div class="body">{box}</div></section>
{groups}</body></html>"""


def lay_out(page: Page, path: Path) -> int:
    """Open a deck's document and spread it over slides. Returns their number; raises PrintError if one overflows."""
    open_and_typeset(page, path)
    count, too_full = page.evaluate("layOut()")
    if too_full:
        raise PrintError(f"{path.stem}: too much for slide {', '.join(map(str, too_full))}, even set small")
    return count


def chapters() -> list[str]:
    """The pages that have exercises, and so the form of a chapter."""
    return sorted(
        path.stem for path in (ROOT / "book" / "src").glob("*.md") if '"exercises"]}' in path.read_text("utf-8")
    )


def make(page: Page, name: str, language: str, style: str, work: Path, out: Path) -> int:
    """Print the slides of one chapter in one language into the folder `out`. Returns their number."""
    notebook = json.loads((ROOT / "book" / language / f"{name}.ipynb").read_text("utf-8"))
    document = work / f"{name}-{language}.html"
    document.write_text(as_html(deck(notebook, language), language, style), encoding="utf-8")
    count = lay_out(page, document)
    print_pdf(page, out / language / f"{name}.pdf")
    return count


def stylesheet(work: Path) -> str:
    """All CSS of the slides, with fonts; the Chinese one is put into the folder `work`."""
    return "\n".join([write_fonts(work), HtmlFormatter().get_style_defs(".highlight"), STYLE.read_text("utf-8")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", metavar="NAME", help="a chapter, book/src/NAME.md (default: all)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "_build" / "slides", help="a folder (default: _build/slides)"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.chapters) - set(chapters())):
        parser.error(f"no chapter {', '.join(unknown)}; the chapters are {', '.join(chapters())}")
    try:
        with tempfile.TemporaryDirectory() as folder, browser_page() as page:
            style = stylesheet(Path(folder))
            for name in arguments.chapters or chapters():
                counts = [make(page, name, language, style, Path(folder), arguments.out) for language in LANGUAGES]
                print(f"{name}: {counts[0]} slides in English, {counts[1]} in Chinese", flush=True)
    except PrintError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The slides are in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

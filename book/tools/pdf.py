"""The book as one PDF for print, in both languages: dist/book-en.pdf and dist/book-zh.pdf, A4.

It is made of the built site (make book): all its pages become one document, which Chromium prints, with bookmarks, a
table of contents, and links that lead to places in it. On paper some things are otherwise than on the site:

- the code that the site folds, which loads the data and draws the figures, is left out;
- of a slider there is the picture that it begins with;
- an exercise is its question and its hint; the solutions stand at the end of the chapter.
"""

import argparse
import html
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urldefrag

import yaml
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Page
from pygments.formatters import HtmlFormatter
from pypdf import PdfReader

sys.path.insert(0, str(Path(__file__).parent))

from printing import (
    BOOK,
    EDITIONS,
    LANGUAGES,
    MATHJAX,
    ROOT,
    SETTINGS,
    TAGS,
    PrintError,
    browser_page,
    open_and_typeset,
    print_pdf,
    write_fonts,
)

STYLE = Path(__file__).with_name("pdf.css")
WORDS = {
    "en": {
        "contents": "Contents",
        "solutions": "Solutions",
        "slider": "On the site a slider chooses among several pictures; this is the first.",
        "about": "Version {version} ({date}). {authors}.<br>Text: CC BY 4.0. Code: MIT License.<br>Left out here: the "
        "code that the site folds, which loads data and draws figures. Solutions stand at the end of each chapter.",
    },
    "zh": {
        "contents": "目录",
        "solutions": "解答",
        "slider": "网站上可以用滑块切换多张图，此处是第一张。",
        "about": "版本 {version}（{date}）。{authors}。<br>文字采用 CC BY 4.0 许可，代码采用 MIT 许可。<br>"
        "网站上折叠的代码（读取数据、绘图）此处略去；习题解答在每章末尾。",
    },
}
# As on the site's pages: formulas stand in elements of the class `math` alone.
MATHJAX_OPTIONS = '{options: {enableMenu: false, processHtmlClass: "math"}}'
# What is too wide for the paper, which only the browser knows, is wrapped if it is a table, and else set smaller.
FIT = """() => {
  const width = document.body.clientWidth, wide = [];
  for (const box of document.querySelectorAll("div.math, table")) {
    const inner = box.matches("table") ? box : box.querySelector("mjx-container");
    const own = () => Math.max(inner.scrollWidth, inner.getBoundingClientRect().width);
    if (own() > width + 1) box.classList.add("wrapped");
    for (let scale = 0.95; own() > width + 1 && scale > 0.45; scale *= 0.95) box.style.fontSize = `${scale}em`;
    if (own() > width + 1) wide.push(box.textContent.trim().slice(0, 60));
  }
  return wide;
}"""


class Chapter(NamedTuple):
    """A page of the site as it goes into the book: its name, title, sections (id, title) and article."""

    name: str
    title: str
    sections: list[tuple[str, str]]
    article: Tag


def parts(language: str) -> list[tuple[str, list[str]]]:
    """The book's parts in one language, as _toc.yml lists them: the caption and the names of the pages."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    listed = [(part["caption"], [Path(one["file"]) for one in part["chapters"]]) for part in toc["parts"]]
    return [(caption, [path.name for path in paths]) for caption, paths in listed if paths[0].parent.name == language]


# ---- From a page of the site to a chapter


def chapter(site: Path, language: str, name: str, names: list[str]) -> Chapter:
    """A page without what cannot be used on paper. Raises PrintError if the site lacks it.

    names: the pages of the book; a link to another place in the site is no link on paper.
    """
    path = site / language / f"{name}.html"
    if not path.exists():
        raise PrintError(f"The book is printed from the built site, and there is no {path}: run  make book")
    article = BeautifulSoup(path.read_text("utf-8"), "html.parser").find("article", class_="bd-article")
    for useless in article.select("a.headerlink, script, details.hide, button, .tag_blank + .cell, .tag_blank"):
        useless.decompose()
    for still in article.find_all("noscript"):
        still.find("figcaption").string = WORDS[language]["slider"]
        still.unwrap()
    move_solutions(article, language)
    for fold in article.find_all("details"):
        fold.name, fold["class"] = "div", "hint"
        fold.summary.name = "strong"
    for picture in article.find_all("img"):
        if not picture["src"].startswith("data:"):
            picture["src"] = (path.parent / picture["src"]).resolve().as_uri()
    make_local(article, name, names)
    for table in article.find_all("table"):
        if len(table.find_all("tr")) > 25:
            table["class"] = [*table.get("class", []), "long"]
    top = article.find("h1")
    sections = [(one.parent["id"], one.get_text()) for one in article.find_all("h2")]
    return Chapter(name, top.get_text(), sections, article)


def move_solutions(article: Tag, language: str) -> None:
    """Put the folded solutions to the end of the chapter, each after the number of its exercise."""
    folds = article.select("details.solution")
    if not folds:
        return
    document = BeautifulSoup("", "html.parser")
    section = document.new_tag("section", id="solutions")
    heading = document.new_tag("h2")
    heading.string = WORDS[language]["solutions"]
    section.append(heading)
    for fold in folds:
        asked = next(one for one in fold.find_all_previous("strong") if one.get_text()[:1].isdigit())
        number = document.new_tag("p")
        number.append(document.new_tag("strong"))
        number.strong.string = asked.get_text()
        fold.summary.decompose()
        fold.name = "div"
        section.extend([number, fold.extract()])
    article.find("section").append(section)


def make_local(article: Tag, name: str, names: list[str]) -> None:
    """Make the ids of a page unlike those of any other, and its links to pages of the book links to these ids."""
    for element in article.find_all(id=True):
        element["id"] = f"{name}--{element['id']}"
    for link in article.find_all("a", href=True):
        page, place = urldefrag(link["href"])
        if "://" in page:
            continue
        target = page.removesuffix(".html") or name
        if "/" in target or target not in names:
            del link["href"]
        else:
            link["href"] = f"#{target}--{place}" if place else f"#{target}"


# ---- From chapters to a file


def about(language: str) -> str:
    """What the title page says at its foot: version, date, authors, licences, and what is left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    date = cited.get("date-released") or cited["preferred-citation"]["year"]
    authors = EDITIONS[language].get("author", SETTINGS["author"])
    return WORDS[language]["about"].format(version=project["version"], date=date, authors=authors)


def contents(listed: list[tuple[str, list[Chapter]]], language: str) -> str:
    lines = [f'<p class="heading">{WORDS[language]["contents"]}</p>']
    for caption, chapters in listed:
        lines.append(f'<p class="part">{html.escape(caption)}</p>')
        for one in chapters:
            lines.append(line("chapter-line", one.name, one.title))
            lines += [line("section-line", place, title) for place, title in one.sections]
    return "\n".join(lines)


def line(kind: str, place: str, title: str) -> str:
    return f'<a class="{kind}" href="#{place}">{in_line(title)}<span class="page">000</span></a>'


def in_line(title: str) -> str:
    """A heading's words as HTML, with its formulas."""
    return f'<span class="math">{html.escape(title)}</span>' if r"\(" in title else f"<span>{html.escape(title)}</span>"


def as_html(listed: list[tuple[str, list[Chapter]]], language: str, style: str) -> str:
    """The whole book as one document."""
    chapters = [one for _, some in listed for one in some]
    heads = "\n".join(
        f'@page {one.name} {{ @top-center {{ content: "{one.title}"; font: 8.5pt "Book Sans"; color: #444; }} }}\n'
        f"#{one.name} {{ page: {one.name}; }}"
        for one in chapters
    )
    described = html.escape(chapters[0].article.find("p").get_text())
    bodies = "\n".join(
        f'<div class="chapter" id="{one.name}">{one.article.decode_contents()}</div>' for one in chapters
    )
    return f"""<!DOCTYPE html>
<html lang="{TAGS[language]}"><head><meta charset="utf-8"><title>{BOOK[language]}</title>
<style>{style}
{heads}</style>
<script>window.MathJax = {MATHJAX_OPTIONS}</script><script defer src="{MATHJAX.as_uri()}"></script></head>
<body><div class="title-page"><p class="name">{BOOK[language]}</p><p class="what math">{described}</p>
<p class="about">{about(language)}</p></div>
<div class="contents">{contents(listed, language)}</div>
{bodies}</body></html>"""


def stylesheet(work: Path) -> str:
    """All CSS of the printed book, with fonts; the Chinese one is put into the folder `work`."""
    return "\n".join([write_fonts(work), HtmlFormatter().get_style_defs(".highlight"), STYLE.read_text("utf-8")])


def make(page: Page, site: Path, language: str, work: Path, target: Path, only: list[str] | None = None) -> None:
    """Print the book in one language; `only` these pages of it, if any are named."""
    names = [name for _, some in parts(language) for name in some if not only or name in only]
    listed = [
        (caption, [chapter(site, language, name, names) for name in some if name in names])
        for caption, some in parts(language)
    ]
    listed = [(caption, chapters) for caption, chapters in listed if chapters]
    document = work / f"book-{language}.html"
    document.write_text(as_html(listed, language, stylesheet(work)), encoding="utf-8")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 794, "height": 1123})  # of A4
    open_and_typeset(page, document)
    if wide := page.evaluate(FIT):
        raise PrintError(f"{target.name}: too wide for the paper, even set small: {'; '.join(wide)}")
    with_page_numbers(page, work)
    print_pdf(page, target)


def with_page_numbers(page: Page, work: Path) -> None:
    """Fill in the numbers of the open document's table of contents: those of a first print, which is as long."""
    print_pdf(page, work / "first.pdf")
    reader = PdfReader(work / "first.pdf")
    places = reader.named_destinations.items()
    numbers = {name.lstrip("/"): reader.get_destination_page_number(place) + 1 for name, place in places}
    page.evaluate(
        """(numbers) => document.querySelectorAll(".contents a").forEach((line) => {
             line.querySelector(".page").textContent = numbers[line.getAttribute("href").slice(1)];
           })""",
        numbers,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="NAME", help="only these pages, book/src/NAME.md (default: all)")
    parser.add_argument("--site", type=Path, default=ROOT / "_build" / "html", help="(default: _build/html)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="a folder (default: dist)")
    arguments = parser.parse_args()
    known = {name for _, some in parts("en") for name in some}
    if unknown := sorted(set(arguments.pages) - known):
        parser.error(f"no page {', '.join(unknown)}; the pages are {', '.join(sorted(known))}")
    try:
        with tempfile.TemporaryDirectory() as folder, browser_page() as page:
            for language in LANGUAGES:
                target = arguments.out / f"book-{language}.pdf"
                make(page, arguments.site.resolve(), language, Path(folder), target, arguments.pages)
                print(f"{target}: {target.stat().st_size / 1e6:.1f} MB", flush=True)
    except PrintError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

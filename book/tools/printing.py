"""Chromium, which prints the slides (slides.py) and the book (pdf.py): how it is started, and its fonts.

Everything that it loads lies on the disk, fonts too: those that the Python packages zhplot and Matplotlib carry. So a
PDF is the same wherever it is made, and needs no Chinese font of the system.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path

import matplotlib
import yaml
from fontTools.ttLib import TTFont
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh")
TAGS = {"en": "en", "zh": "zh-CN"}
SETTINGS = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
EDITIONS = SETTINGS["sphinx"]["config"]["editions"]
BOOK = {language: EDITIONS[language]["html_title"] for language in LANGUAGES}
MATHJAX = ROOT / "book" / "assets" / "vendor" / "mathjax" / "tex-chtml-full.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Only pages of our own are opened, and in a container Chromium's sandbox does not start.
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
NOTO = "zhplot/fonts/NotoSansSC-Regular.ttf"
# Of these the font has the same pictures as of everyday characters; a PDF would then hold them in their place, and a
# search for 二 would find nothing.
LOOKALIKES = (range(0x2E80, 0x2FE0), range(0xF900, 0xFB00))
FACES = (
    ("Book Serif", "STIXGeneral", "normal", "normal"),
    ("Book Serif", "STIXGeneralBol", "bold", "normal"),
    ("Book Serif", "STIXGeneralItalic", "normal", "italic"),
    ("Book Serif", "STIXGeneralBolIta", "bold", "italic"),
    ("Book Mono", "DejaVuSansMono", "normal", "normal"),
    ("Book Mono", "DejaVuSansMono-Bold", "bold", "normal"),
    ("Book Mono", "DejaVuSansMono-Oblique", "normal", "italic"),
)


class PrintError(Exception):
    """Something cannot be printed; the message says what, and what would help."""


def write_fonts(folder: Path) -> str:
    """Put the Chinese font into a folder. Returns CSS that names all: Book Sans (it), Book Serif, Book Mono."""
    font = TTFont(distribution("zhplot").locate_file(NOTO), lazy=True, recalcTimestamp=False)
    for table in font["cmap"].tables:
        for code in [code for code in table.cmap if any(code in codes for codes in LOOKALIKES)]:
            del table.cmap[code]
    font.save(folder / "sans.ttf")
    files = [("Book Sans", folder / "sans.ttf", "normal", "normal")]
    folder_of_matplotlib = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files += [(family, folder_of_matplotlib / f"{name}.ttf", weight, style) for family, name, weight, style in FACES]
    return "\n".join(
        f'@font-face {{ font-family: "{family}"; src: url("{path.as_uri()}"); font-weight: {weight}; '
        f"font-style: {style}; }}"
        for family, path, weight, style in files
    )


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page of Chromium that has no network. Raises PrintError if there is no Chromium, or no MathJax for the page."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise PrintError(f"Printing needs Chromium, and there is none of {', '.join(BROWSERS)}: apt install chromium")
    if not MATHJAX.exists():
        raise PrintError(f"Printing needs MathJax, and there is no {MATHJAX}: run  python book/tools/assets.py")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        try:
            yield browser.new_context(offline=True).new_page()
        finally:
            browser.close()


def open_and_typeset(page: Page, path: Path) -> None:
    """Open a file and wait for its formulas and fonts. Raises PrintError if a formula or a picture is broken."""
    page.goto(path.as_uri(), wait_until="load", timeout=300_000)
    page.set_default_timeout(300_000)
    page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => null) : null")
    page.evaluate("document.fonts.ready.then(() => null)")
    broken = page.evaluate(
        """[...document.querySelectorAll("mjx-merror")].map((e) => e.title || e.textContent)
           .concat([...document.images].filter((i) => !i.naturalWidth).map((i) => i.alt || i.src.slice(0, 80)))"""
    )
    if broken:
        raise PrintError(f"{path.stem}: a formula or a picture cannot be shown: {'; '.join(broken)}")


def print_pdf(page: Page, path: Path) -> None:
    """Print the open page, all of it or nothing, at the size that its CSS names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    page.pdf(path=half, prefer_css_page_size=True, print_background=True, outline=True, tagged=True)
    half.replace(path)

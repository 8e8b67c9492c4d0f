"""Makes the built site small: what both editions load is there once, and what no page loads is not there.

It works on the finished pages, each time anew: they are copied afresh from where the editions are built.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

# Loaded by no page: sources of the themes' scripts and styles for debuggers, their translations, older font formats.
UNUSED = ("**/*.map", "locales/**/*", "**/*.ttf")
# Draws the icons as pictures, at 1.5 MB; book.css draws the dozen that are used with the font.
ICON_SCRIPT = "scripts/fontawesome.js"
# The theme loads what it needs to search on every page, for a kind of search that is switched off.
SEARCH_SCRIPTS = re.compile(
    r'\s*<script src="(_static/searchtools\.js|_static/language_data\.js|searchindex\.js)[^>]*></script>'
)
STATIC = re.compile(r'(?<=")_static/([^"?#]+)')


def pack(site: Path, editions: list[str]) -> None:
    for folder in (site, *(site / edition for edition in editions)):
        for pattern in UNUSED:
            for path in (folder / "_static").glob(pattern):
                if path.is_file():
                    path.unlink()
        (folder / "_static" / ICON_SCRIPT).unlink(missing_ok=True)
        for notebook in (folder / "_sources").glob("*.ipynb"):
            notebook.unlink()
        for page in folder.glob("*.html"):
            text = without_unused_scripts(folder.name, page.name, page.read_text(encoding="utf-8"))
            page.write_text(with_pictures_as_files(folder, text), encoding="utf-8")
    shared = move_shared(site, editions)
    for edition in editions:
        for page in (site / edition).glob("*.html"):
            text = page.read_text(encoding="utf-8")
            page.write_text(
                STATIC.sub(lambda found: ("../" if found[1] in shared else "") + found[0], text), encoding="utf-8"
            )
    for folder in sorted(site.rglob("_static/**/"), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def without_unused_scripts(edition: str, name: str, text: str) -> str:
    text = re.sub(rf'\s*<script defer src="_static/{ICON_SCRIPT}[^>]*></script>', "", text)
    if name != "search.html":
        text = SEARCH_SCRIPTS.sub("", text)
    text = re.sub(
        r"<title>(.*?) &#8212; \1</title>", r"<title>\1</title>", text
    )  # the front page is called like the book
    # What these say themselves is their name; the themes' labels would hide it.
    text = re.sub(r'<summary aria-label="[^"]*"', "<summary", text)
    text = re.sub(r'(<button class="btn search-button-field[^"]*") [^>]*>', r"\1>", text)
    # The button gives the file that runs alone. A browser that shows a page from a folder would open it as text.
    button = r'<a href="_sources/([^"]*\.ipynb)"(?=[^>]*btn-download-source-button)'
    return re.sub(button, rf'<a href="../download/{edition}/\1" download', text)


def with_pictures_as_files(folder: Path, text: str) -> str:
    """A page whose sliders name the files of their pictures (see widgets.js), which are a third smaller so."""
    found = re.search(
        r'(<script type="application/vnd.jupyter.widget-state\+json">)(.*?)(?=</script>)', text, re.DOTALL
    )
    if found is None:
        return text
    book = json.loads(found[2])
    addresses = {}
    for model in book["state"].values():
        if model["model_name"] == "ImageModel":
            data, kind = model.pop("buffers")[0]["data"], model["state"]["format"]
            picture = base64.b64decode(data)
            model["address"] = f"_images/{hashlib.sha256(picture).hexdigest()[:20]}.{kind.removesuffix('+xml')}"
            (folder / "_images").mkdir(exist_ok=True)
            (folder / model["address"]).write_bytes(picture)
            addresses[f"data:image/{kind};base64,{data}"] = model["address"]
    text = text[: found.start(2)] + json.dumps(book, separators=(",", ":")) + text[found.end(2) :]
    for data, address in addresses.items():
        text = text.replace(data, address)
    return text


def move_shared(site: Path, editions: list[str]) -> set[str]:
    """Move files that are the same in all editions into the site's own _static. Returns their paths below it."""
    shared = set()
    first, *others = (site / edition / "_static" for edition in editions)
    for path in [path for path in first.rglob("*") if path.is_file()]:
        name, data = path.relative_to(first).as_posix(), path.read_bytes()
        common = site / "_static" / name
        copies = [path, *(other / name for other in others)]
        if any(not copy.is_file() or copy.read_bytes() != data for copy in copies[1:]):
            continue
        if common.exists() and common.read_bytes() != data:
            continue
        common.parent.mkdir(parents=True, exist_ok=True)
        common.write_bytes(data)
        for copy in copies:
            copy.unlink()
        shared.add(name)
    return shared

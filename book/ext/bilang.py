"""Ties the pages of the two editions together: a switch to the same page in the other language, and links for search engines."""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

TAGS = {"en": "en", "zh": "zh-CN"}
NAMES = {"en": "English", "zh": "中文"}


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", place_switch)
    app.connect("html-page-context", link_other_language)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def place_switch(app: Sphinx, config: Config) -> None:
    config.templates_path.append(str(Path(__file__).parent / "templates"))
    theme = config.html_theme_options
    theme["article_header_end"] = ["language-switch.html", "article-header-buttons.html"]
    theme["navbar_persistent"] = []  # else the theme adds an empty bar at the top, with a second search box


def link_other_language(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Give the page's template what the switch needs, and its head the links that tell search engines of both languages."""
    here = Path(app.srcdir).name
    if here not in TAGS:
        return  # the chooser, which is in both languages
    other = "zh" if here == "en" else "en"
    # A relative address works wherever the site lies, on a disk too; search engines ask for a full one if there is a base address.
    up = "../" * (page.count("/") + 1)
    base = app.config.html_baseurl.removesuffix(f"{here}/") or up
    # Pages that the theme makes itself (search, index of terms) exist in both editions too.
    context["language_switch"] = {"address": f"{up}{other}/{page}.html", "tag": TAGS[other], "name": NAMES[other]}
    links = [f'<link rel="alternate" hreflang="{TAGS[name]}" href="{base}{name}/{page}.html" />' for name in TAGS]
    links.append(f'<link rel="alternate" hreflang="x-default" href="{base}en/{page}.html" />')
    context["metatags"] = "\n".join([context.get("metatags", ""), *links])

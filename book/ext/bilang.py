"""Makes one book of two editions: a switch to the other language, links for search engines, no stray English."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

TAGS = {"en": "en", "zh": "zh-CN"}
NAMES = {"en": "English", "zh": "中文"}
# What the themes leave in English on a Chinese page, or translate badly. All of it stands in attributes.
CHINESE = {
    "Color mode": "明暗模式",
    "Colab logo": "Colab 图标",
    "Launch interactive content": "运行本页",
    "Launch on Colab": "在 Colab 中打开",
    "Link to this heading": "本节链接",
    "Main": "全书目录",
    "Page": "本页目录",
    "Search": "搜索",
    "System Settings": "跟随系统设置",
    "Toggle hidden content": "展开或收起",
    "Toggle primary sidebar": "展开或收起全书目录",
    "Toggle secondary sidebar": "展开或收起本页目录",
    "列印成 PDF": "打印为 PDF",
}


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", place_switch)
    app.connect("doctree-resolved", keep_punctuation)
    app.connect("html-page-context", link_other_language)
    app.connect("build-finished", translate_attributes)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def place_switch(app: Sphinx, config: Config) -> None:
    config.templates_path.append(str(Path(__file__).parent / "templates"))
    theme = config.html_theme_options
    theme["article_header_end"] = ["language-switch.html", "article-header-buttons.html"]
    theme["footer_content_items"] = ["repository-links.html", "author.html", "copyright.html", "extra-footer.html"]
    theme["navbar_persistent"] = []  # else the theme adds an empty bar at the top, with a second search box
    theme["use_fullscreen_button"] = False  # one button more is wider than a phone


def keep_punctuation(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Let no line begin with the comma or full stop that follows a formula: the browser may break there."""
    for formula in list(doctree.findall(nodes.math)):
        siblings, place = formula.parent, formula.parent.index(formula)
        text = siblings[place + 1] if place + 1 < len(siblings) else None
        if isinstance(text, nodes.Text) and text[0] in ",.;:)，。；：）、？！":
            siblings[place + 1] = nodes.Text(text[1:])
            siblings[place] = nodes.inline("", "", formula, nodes.Text(text[0]), classes=["unbroken"])


def link_other_language(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Give the page what its switch needs, and the links that tell search engines of both languages."""
    here = Path(app.srcdir).name
    if here not in TAGS:
        return  # the chooser, which is in both languages
    other = "zh" if here == "en" else "en"
    # A relative address works wherever the site lies, on a disk too. Where the site has a base address, search engines
    # want the full one.
    up = "../" * (page.count("/") + 1)
    base = app.config.html_baseurl.removesuffix(f"{here}/") or up
    # Pages that the theme makes itself (search, index of terms) exist in both editions too.
    context["language_switch"] = {"address": f"{up}{other}/{page}.html", "tag": TAGS[other], "name": NAMES[other]}
    links = [f'<link rel="alternate" hreflang="{TAGS[name]}" href="{base}{name}/{page}.html" />' for name in TAGS]
    links.append(f'<link rel="alternate" hreflang="x-default" href="{base}en/{page}.html" />')
    context["metatags"] = "\n".join([context.get("metatags", ""), *links])


def translate_attributes(app: Sphinx, error: Exception | None) -> None:
    """Put the themes' last English words on Chinese pages into Chinese; Sphinx lets one translate few of them."""
    if error or Path(app.srcdir).name != "zh" or app.builder.name != "html":
        return
    for page in Path(app.outdir).glob("*.html"):
        text = page.read_text(encoding="utf-8")
        for english, chinese in CHINESE.items():
            text = text.replace(f'="{english}"', f'="{chinese}"')
        page.write_text(text, encoding="utf-8")

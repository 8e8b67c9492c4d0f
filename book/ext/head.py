"""What search engines and messengers read of a page: description, addresses, a sitemap; a page for wrong addresses."""

import re
from html import escape
from pathlib import Path
from urllib.parse import quote, urlsplit

from docutils import nodes
from sphinx.application import Sphinx

LOCALES = {"en": "en_GB", "zh": "zh_CN"}
LONGEST_DESCRIPTION = 160
WORDS = {
    "en": {"report": "Report an error on this page", "edit": "Edit this page"},
    "zh": {"report": "报告本页错误", "edit": "编辑本页"},
}


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", describe)
    app.connect("html-page-context", link_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def first_words(doctree: nodes.document | None) -> str:
    """The page's first paragraph without formulas, cut at the end of a word or sentence."""
    paragraph = next(doctree.findall(nodes.paragraph), None) if doctree else None
    if paragraph is None:
        return ""
    text = re.sub(r"\s+", " ", "".join(part.astext() for part in paragraph.findall(nodes.Text) if not in_formula(part)))
    if len(text) <= LONGEST_DESCRIPTION:
        return text
    return re.sub(r"[^.。！？\s]*$", "", text[: LONGEST_DESCRIPTION - 1]).rstrip(" ,，;；:：") + "…"


def in_formula(text: nodes.Text) -> bool:
    return isinstance(text.parent, nodes.math | nodes.math_block)


def describe(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    language = Path(app.srcdir).name
    description = first_words(doctree) or app.config.html_title
    tags = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": context.get("title") or app.config.html_title,
    }
    tags |= {"og:description": description, "og:locale": LOCALES.get(language, LOCALES["en"])}
    if context.get("pageurl"):
        tags["og:url"] = context["pageurl"]
    plain = {name: escape(re.sub(r"<[^>]+>", "", text), quote=True) for name, text in tags.items()}
    lines = [f'<meta name="description" content="{escape(description, quote=True)}" />']
    lines += [f'<meta property="{name}" content="{text}" />' for name, text in plain.items()]
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines])


def link_repository(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Below a page that has a source: where to report an error, and where to edit. Needs the repository's address."""
    language, theme = Path(app.srcdir).name, app.config.html_theme_options
    address = theme.get("repository_url", "").rstrip("/")
    if not address or doctree is None or language not in WORDS:
        return
    title = quote(f"{language}/{page}: ")
    context["repository_links"] = [
        (WORDS[language]["report"], f"{address}/issues/new?title={title}"),
        (WORDS[language]["edit"], f"{address}/edit/{theme['repository_branch']}/book/src/{page}.md"),
    ]


def default_base(repository: str) -> str:
    """Where GitHub shows the pages of a repository, if nothing else is set: https://ORG.github.io/REPO/."""
    parts = urlsplit(repository)
    if parts.netloc != "github.com" or parts.path.count("/") < 2:
        return ""
    organisation, name = parts.path.strip("/").removesuffix(".git").split("/")[:2]
    return f"https://{organisation.lower()}.github.io/{name}/"


def write_sitemap(site: Path, base: str) -> None:
    """Every page that a search engine should know."""
    pages = [
        path for path in sorted(site.rglob("*.html")) if path.name not in ("404.html", "search.html", "genindex.html")
    ]
    lines = [
        f"  <url><loc>{escape(base + path.relative_to(site).as_posix())}</loc></url>"
        for path in pages
        if "_static" not in path.parts
    ]
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    (site / "sitemap.xml").write_text("\n".join([head, *lines, "</urlset>\n"]), encoding="utf-8")


def write_not_found(site: Path, base: str) -> None:
    """The page that a host shows for a wrong address; it is shown at any depth, so it brings its style along."""
    root = urlsplit(base).path or "/"
    (site / "404.html").write_text(NOT_FOUND.replace("ROOT", escape(root, quote=True)), encoding="utf-8")


NOT_FOUND = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="robots" content="noindex" />
<title>No such page · 没有这一页</title>
<style>
:root { color-scheme: light dark; }
body { max-width: 34rem; margin: 15vh auto 0; padding: 0 1.5rem; font: 1.1rem/1.7 system-ui, sans-serif; }
</style>
</head>
<body>
<main>
<h1>No such page · <span lang="zh-CN">没有这一页</span></h1>
<p>There is nothing at this address. The book begins <a href="ROOTen/index.html">here</a>.</p>
<p lang="zh-CN">这个地址没有内容。请从<a href="ROOTzh/index.html">本书首页</a>开始。</p>
</main>
</body>
</html>
"""

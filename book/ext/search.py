"""Search by section: what a page says, section by section and without formulas, in a file that the search page loads.

Sphinx's own index knows pages only, and splits Chinese by a dictionary that its queries do not use. So it is left
empty but for titles, and book/assets/search.js looks through the sections themselves.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.search.en import SearchEnglish

LEFT_OUT = (nodes.math, nodes.math_block, nodes.raw, nodes.comment)


class NoWords(SearchEnglish):
    """Indexes nothing; brings the stemmer for English words to the search page."""

    lang = "sections"

    def split(self, text: str) -> list[str]:
        return []


def setup(app: Sphinx) -> dict:
    app.add_search_language(NoWords)
    app.connect("doctree-read", collect)
    app.connect("env-purge-doc", lambda app, env, page: sections(env).pop(page, None))
    app.connect("env-merge-info", lambda app, env, pages, other: sections(env).update(sections(other)))
    app.connect("html-page-context", load)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}


def sections(env: BuildEnvironment) -> dict[str, list[tuple[str, str, str]]]:
    """Of every page: (id, title, text) of each section."""
    if not hasattr(env, "book_sections"):
        env.book_sections = {}
    return env.book_sections


def collect(app: Sphinx, doctree: nodes.document) -> None:
    sections(app.env)[app.env.docname] = [
        (section["ids"][0], section.next_node(nodes.title).astext(), own_text(section))
        for section in doctree.findall(nodes.section)
    ]


def own_text(section: nodes.section) -> str:
    """The text of a section without its title, its formulas and the sections within it."""

    def walk(node: nodes.Node) -> str:
        if isinstance(node, nodes.Text):
            return str(node)
        if isinstance(node, LEFT_OUT) or node.get("nb_element") == "cell_code_output":
            return " … " if isinstance(node, nodes.math) else " "
        block = " " if isinstance(node, nodes.Element) and not isinstance(node, nodes.Inline) else ""
        return block + "".join(walk(child) for child in node.children) + block

    parts = [child for child in section.children if not isinstance(child, nodes.section | nodes.title)]
    return re.sub(r"\s+", " ", " ".join(map(walk, parts))).strip()


def load(app: Sphinx, page: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    if page == "search":
        for name in ("sections.js", "search.js"):  # after Sphinx's own, which stand at the end of the page
            app.add_js_file(name, loading_method="defer")


def write(app: Sphinx, error: Exception | None) -> None:
    if error or app.builder.name != "html":
        return
    titles = {page: app.env.titles[page].astext() for page in sections(app.env)}
    pages = [[page, titles[page], parts] for page, parts in sorted(sections(app.env).items())]
    text = json.dumps(pages, ensure_ascii=False, separators=(",", ":"))
    Path(app.outdir, "_static", "sections.js").write_text(f"const PAGES = {text};\n", encoding="utf-8")

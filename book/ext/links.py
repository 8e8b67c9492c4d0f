"""Leads from "(3)" to the equation, and from the first use of a term on a page to its line in the glossary.

The notebooks know nothing of it: they say (3) and name the term; the site makes links of that.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

GLOSSARY = "glossary"
# Words of everyday use, which a page seldom means as the glossary does.
EVERYDAY = {"target", "目标", "level", "水平", "mean", "window", "窗口", "prompt", "提示", "batch", "批"}
# Whatever stands in these is left as it is.
CLOSED = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.raw, nodes.thead, addnodes.toctree)


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", name_targets)
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def name_targets(app: Sphinx, doctree: nodes.document) -> None:
    """Give the page's numbered equations ids of their own, and the glossary's lines."""
    for formula in doctree.findall(nodes.math_block):
        if number := re.search(r"\\tag\{(\d+)\}", formula.astext()):
            formula["ids"].append(f"eq-{number[1]}")
    if app.env.docname == GLOSSARY:
        for row, english, _ in glossary_rows(doctree):
            row["ids"].append("term-" + re.sub(r"[^a-z0-9]+", "-", english.split(",")[0].lower()).strip("-"))
    else:
        app.env.note_dependency(Path(app.srcdir, f"{GLOSSARY}.ipynb"))  # a page is resolved again when the terms change


def glossary_rows(doctree: nodes.document) -> list[tuple[nodes.row, str, str]]:
    """Of each term: its row, its English, its Chinese."""
    found = []
    for table in doctree.findall(nodes.table):
        heads = [entry.astext() for entry in next(table.findall(nodes.thead)).findall(nodes.entry)]
        if {"English", "中文"} <= set(heads):
            for row in next(table.findall(nodes.tbody)).findall(nodes.row):
                cells = [entry.astext() for entry in row.findall(nodes.entry)]
                found.append((row, cells[heads.index("English")], cells[heads.index("中文")]))
    return found


def terms(app: Sphinx) -> dict[str, str]:
    """The words that a page may use for a term, in its own language, and the id of the term's line."""
    if GLOSSARY not in app.env.found_docs:
        return {}
    found = {}
    for row, english, chinese in glossary_rows(app.env.get_doctree(GLOSSARY)):
        words = re.split(r"[、，]|（.*）", chinese) if app.config.language == "zh_CN" else english.split(", ")
        found |= {
            word.strip().lower(): row["ids"][0] for word in words if len(word.strip()) > 1 and word not in EVERYDAY
        }
    return found


def link(app: Sphinx, doctree: nodes.document, page: str) -> None:
    equations = {name for formula in doctree.findall(nodes.math_block) for name in formula["ids"]}
    left = {} if page == GLOSSARY else terms(app)
    longest_first = "|".join(map(re.escape, sorted(left, key=len, reverse=True)))
    edge = "" if app.config.language == "zh_CN" else r"\b"
    pattern = re.compile(
        rf"(?<![\w(])\((?P<number>\d+)\)|{edge}(?P<term>{longest_first or '(?!)'})s?{edge}", re.IGNORECASE
    )
    for text in list(doctree.findall(nodes.Text)):
        if not is_open(text):
            continue
        pieces, at = [], 0
        for match in pattern.finditer(text):
            address, kind = f"#eq-{match['number']}", "equation"
            if match["number"] is None:
                # Once a page: whoever reads on knows the term.
                if (name := left.get(match["term"].lower())) is None:
                    continue
                address, kind = app.builder.get_relative_uri(page, GLOSSARY) + f"#{name}", "term"
                left = {word: other for word, other in left.items() if other != name}
            elif address[1:] not in equations:
                continue
            reference = nodes.reference("", match[0], internal=True, refuri=address, classes=[kind])
            pieces += [nodes.Text(text[at : match.start()]), reference]
            at = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[at:])])


def is_open(text: nodes.Text) -> bool:
    """Whether a link may stand here: in running text, neither in code nor in a heading nor in another link."""
    part = text.parent
    while part is not None:
        if isinstance(part, CLOSED):
            return False
        part = part.parent
    return True

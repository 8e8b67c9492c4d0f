"""Gives the headings of a page the short ASCII ids that its notebook lists, the same in both languages.

A link to a section, [words](#id), is then one address in English and in Chinese, and the language switch can keep it.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class HeadingIds(SphinxTransform):
    default_priority = 500

    def apply(self, **kwargs) -> None:
        path = Path(self.env.doc2path(self.env.docname))
        if path.suffix != ".ipynb":
            return
        ids = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("headings", [])
        for section, word in zip(self.document.findall(nodes.section), ids, strict=False):
            for name in section["names"]:
                self.document.nameids[name] = word
            section["ids"], section["names"] = [word], [*section["names"], word]
            self.document.ids[word] = section
            self.document.nameids[word], self.document.nametypes[word] = word, False


class OfferIds(SphinxTransform):
    """Makes the ids targets of the page's own links, which MyST looks for at 879.

    Not earlier: at 850 Sphinx collects targets for all pages, and several pages have a section `sources`.
    """

    default_priority = 870

    def apply(self, **kwargs) -> None:
        for section in self.document.findall(nodes.section):
            for word in section["ids"]:
                if word in self.document.nametypes:
                    self.document.nametypes[word] = True


def setup(app: Sphinx) -> dict:
    app.add_transform(HeadingIds)
    app.add_transform(OfferIds)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

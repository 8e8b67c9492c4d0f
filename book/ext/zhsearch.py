"""Chinese search without a dictionary: the index holds single characters and pairs, and a query is split likewise.

Sphinx indexes the words of a dictionary but never splits a query, so it finds nothing for 梯度下降, which is two words.
"""

import re

from sphinx.application import Sphinx
from sphinx.search.zh import SearchChinese

HAN = r"\u3400-\u9fff"


class SearchPairs(SearchChinese):
    """English words as Sphinx has them (stemmed); runs of Chinese characters in pieces of one and two."""

    js_splitter_code = (
        """
function splitQuery(query) {
  const runs = query.match(/[HAN]+|[A-Za-z0-9_]+/g) || [];
  const pairs = (run) => Array.from({ length: run.length - 1 }, (_, i) => run.slice(i, i + 2));
  return runs.flatMap((run) => (/[HAN]/.test(run) && run.length > 2 ? pairs(run) : [run]));
}
"""
    ).replace("HAN", HAN)

    def split(self, text: str) -> list[str]:
        words = re.findall(r"[A-Za-z0-9_]+", text)
        self.latin_terms.extend(words)
        for run in re.findall(f"[{HAN}]+", text):
            words += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        return words

    def word_filter(self, word: str) -> bool:
        return len(word) > 1 or re.match(f"[{HAN}]", word) is not None


def setup(app: Sphinx) -> dict:
    app.add_search_language(SearchPairs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

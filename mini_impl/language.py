"""The language of the page: set once by a notebook's first cell, asked by everything that writes words."""

from mini_impl import checks

LANGUAGES = ("en", "zh")
_page = "en"


def use_language(name: str) -> None:
    """Write words from here on in English ("en") or Chinese ("zh"). Raises ValueError for any other name."""
    global _page
    checks.choice("name", name, LANGUAGES)
    _page = name


def language() -> str:
    """The language in use: "en" or "zh"."""
    return _page


def say(*, en: str, zh: str) -> str:
    """The one of two wordings that is in the language in use: say(en="trend", zh="趋势")."""
    return {"en": en, "zh": zh}[_page]

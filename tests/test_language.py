"""The language of the page."""

import pytest

from mini_impl.language import LANGUAGES, language, say, use_language


@pytest.fixture(autouse=True)
def english_again():
    yield
    use_language("en")


def test_it_is_english_until_told():
    assert language() == "en" and say(en="trend", zh="趋势") == "trend"


def test_words_follow_the_language():
    for name, word in zip(LANGUAGES, ("trend", "趋势"), strict=True):
        use_language(name)
        assert language() == name and say(en="trend", zh="趋势") == word


@pytest.mark.parametrize("name", ["", "EN", "zh-CN", "fr", None, 0])
def test_other_languages_are_refused_and_change_nothing(name):
    use_language("zh")
    with pytest.raises(ValueError, match="name must be one of 'en', 'zh'; got"):
        use_language(name)
    assert language() == "zh"


def test_both_wordings_are_needed():
    with pytest.raises(TypeError, match="zh"):
        say(en="trend")
    with pytest.raises(TypeError):
        say("trend", "趋势")

"""The check below a blank: right, wrong, not filled in, in both languages, and never an error."""

import pytest

from mini_impl.exercises import check
from mini_impl.language import use_language


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            None,
            {
                "en": "Not filled in yet: put your answer in the place of None.",
                "zh": "还没有填写：请把 None 换成你的答案。",
            },
        ),
        (4, {"en": "Right.", "zh": "正确。"}),
        (5, {"en": "Not right yet.", "zh": "还不对。"}),
        ("four", {"en": "Not right yet; trying it gave an error. TypeError:", "zh": "还不对；检验时出错：TypeError:"}),
    ],
)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_check_says_what_it_found(capsys, answer, words, language):
    use_language(language)
    assert check(answer, right=lambda number: number - 2 == 2) is None
    assert capsys.readouterr().out.startswith(words[language])

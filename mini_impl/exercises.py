"""The check below an exercise's blank: it says whether an answer is right, and never gives it away."""

from collections.abc import Callable
from typing import Any

from mini_impl.language import say


def check(answer: Any, right: Callable[[Any], bool]) -> None:
    """Print whether the answer to an exercise is right, in the page's language. Never raises.

    answer: None as long as the blank is not filled in. right: says of an answer whether it has the property asked for.
    """
    if answer is None:
        print(
            say(
                en="Not filled in yet: put your answer in the place of None.", zh="还没有填写：请把 None 换成你的答案。"
            )
        )
        return
    try:
        is_right = bool(right(answer))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        print(say(en=f"Not right yet; trying it gave an error. {what}", zh=f"还不对；检验时出错：{what}"))
        return
    if is_right:
        print(say(en="Right.", zh="正确。"))
    else:
        print(say(en="Not right yet.", zh="还不对。"))

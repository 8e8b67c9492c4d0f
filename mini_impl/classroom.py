"""Checks for assignments: what a student runs below an exercise, and what it says of a wrong answer.

A check compares a function with a small example that was worked out by hand and stands in the assignment. Where the
numbers differ it says in what way: the shape, the sign, one factor, the order of the axes, the edges. It knows no
solution, so it cannot give one away; the words are in the language of the page.
"""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_impl.language import say

CLOSE = 1e-4  # of the largest number


class Words(NamedTuple):
    """One sentence in both languages."""

    en: str
    zh: str

    def said(self) -> str:
        return say(en=self.en, zh=self.zh)


RIGHT = Words("Right.", "正确。")
UNANSWERED = Words("Not filled in yet.", "还没有填写。")
NOTHING = Words(
    "Not written yet: it returns nothing, or raises NotImplementedError.",
    "还没有写：函数没有返回值，或者抛出 NotImplementedError。",
)
DETACHED = Words(
    "The numbers are right, but no gradient flows back from them: somewhere the result is cut off from its inputs "
    "(.item(), .detach(), .numpy(), torch.tensor(..) or no_grad).",
    "数值正确，但梯度传不回去：某一处把结果与输入断开了（.item()、.detach()、.numpy()、torch.tensor(..) 或 no_grad）。",
)
EARLIER = Words("This check needs an earlier exercise first.", "这里的检查要用到前面的题，请先做完前面的题。")
WRITTEN_OVER = Words("It writes into its input: make a new tensor instead.", "函数改写了自己的输入：请新建一个张量。")


def check(
    function: Callable[..., Any],
    *inputs: Any,
    wanted: Sequence[Any] | Callable[[], Sequence[Any]],
    axes: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
    gradients: bool = False,
) -> bool:
    """Call a student's function with a small example; print what is wrong with its results, or that they are right.

    inputs: tensors and numbers. wanted: the results by hand, one for each tensor that the function returns; or a
    function that computes them from earlier exercises.
    axes: the names of each result's axes; one called "time" has edges. names: what the results are called.
    gradients: whether the results must have gradients by the tensors among the inputs.
    Returns whether all was right; never raises.
    """
    given = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    for x in filter(torch.is_tensor, given):
        x.requires_grad_(gradients and x.is_floating_point())
    try:
        results = function(*given)
    except NotImplementedError:
        return told(NOTHING)
    except Exception as error:
        return told(failed(type(error).__name__, str(error)))
    if results is None:
        return told(NOTHING)
    try:
        wanted = wanted() if callable(wanted) else wanted
    except Exception:
        return told(EARLIER)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    wrong = diagnose([numbers(result) for result in results], [numbers(value) for value in wanted], axes, names)
    pairs = zip(given, inputs, strict=True)
    if wrong is None and any(isinstance(x, Tensor) and not torch.equal(x.detach(), y) for x, y in pairs):
        wrong = WRITTEN_OVER
    if wrong is None and gradients and not all(isinstance(x, Tensor) and x.requires_grad for x in results):
        wrong = DETACHED
    return told(wrong or RIGHT)


def check_number(answer: Any, low: float, high: float) -> bool:
    """Say whether the answer to a question is a number in a range where every right answer lies; the range is wide."""
    if answer is None:
        return told(UNANSWERED)
    value = numbers(answer)
    if value is None or value.size != 1 or not np.isfinite(value).all():
        got = repr(answer)[:60]
        return told(Words(f"It must be one finite number; got {got}.", f"应当是一个有限的数，得到的是 {got}。"))
    if not low <= value.item() <= high:
        return told(
            Words(
                f"{value.item():g} cannot be right: think about its size first.",
                f"{value.item():g} 不可能正确：请先想想它的量级。",
            )
        )
    return told(Words("Noted. Whether it is right, grading will tell.", "已记下。对不对，批改时才知道。"), right=True)


def told(words: Words, right: bool = False) -> bool:
    print(words.said())
    return right or words is RIGHT


def failed(kind: str, message: str) -> Words:
    """What a function that raised is told."""
    if kind == "NotImplementedError":
        return NOTHING
    return Words(f"Calling it raised {kind}: {message}", f"调用时出错，{kind}：{message}")


def numbers(value: Any) -> np.ndarray | None:
    """A result as an array of float64; None if it is no number or array of numbers."""
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        return array.astype(np.float64) if array.dtype.kind in "fiub" else None
    except Exception:
        return None


def diagnose(
    results: Sequence[np.ndarray | None],
    wanted: Sequence[np.ndarray],
    axes: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] | None = None,
) -> Words | None:
    """The first thing that is wrong with some results, in words that do not tell the right numbers; None if nothing."""
    if len(results) != len(wanted):
        return Words(
            f"It must return {len(wanted)} results; it returned {len(results)}.",
            f"应当返回 {len(wanted)} 个结果，实际返回了 {len(results)} 个。",
        )
    for number, (got, want) in enumerate(zip(results, wanted, strict=True)):
        wrong = difference(got, want, axes[number] if axes else ())
        if wrong:
            name = f"{names[number]}: " if names else ""
            return Words(name + wrong.en, name.replace(": ", "：") + wrong.zh)
    return None


def close(got: np.ndarray, want: np.ndarray) -> bool:
    return bool(np.all(np.abs(got - want) <= CLOSE * max(np.abs(want).max(), 1e-6)))


def difference(got: np.ndarray | None, want: np.ndarray, axes: Sequence[str]) -> Words | None:
    """How one result differs from what is wanted; None if it does not. NaN is never right."""
    if got is None:
        return Words("This is no number and no tensor of numbers.", "这不是数，也不是由数组成的张量。")
    if not np.isfinite(got).all():
        return Words("It holds NaN or infinity.", "结果里有 NaN 或无穷大。")
    if got.shape == want.shape and close(got, want):
        return None
    turns = [got.transpose(order) for order in permutations(range(got.ndim))] if got.ndim == want.ndim < 5 else []
    if any(turned.shape == want.shape and close(turned, want) for turned in turns):
        return Words("The numbers are right, but along the wrong axes.", "数值正确，但轴的顺序不对。")
    if got.shape != want.shape:
        named = ", ".join(axes)
        return Words(
            f"The shape must be {list(want.shape)}{f' [{named}]' if named else ''}; got {list(got.shape)}.",
            f"形状应当是 {list(want.shape)}{f' [{named}]' if named else ''}，得到的是 {list(got.shape)}。",
        )
    if close(-got, want):
        return Words("Right in size, but of the wrong sign.", "大小正确，符号相反。")
    if "time" in axes and edges_alone(got, want, axes.index("time")):
        return Words(
            "Right in the middle, wrong at the first and last time steps: think about the edges.",
            "中间正确，最前和最后的几个时间步不对：想一想边缘怎么处理。",
        )
    return constant_factor(got, want) or Words("The shape is right, the numbers are not.", "形状正确，数值不对。")


def edges_alone(got: np.ndarray, want: np.ndarray, time: int) -> bool:
    """Whether the middle third or more of the time steps is right."""
    wrong = np.abs(got - want) > CLOSE * max(np.abs(want).max(), 1e-6)
    steps = np.moveaxis(wrong, time, 0).reshape(want.shape[time], -1).any(1)
    third = -(-len(steps) // 3)
    return not steps[third : len(steps) - third].any() and len(steps) > 2 * third


def constant_factor(got: np.ndarray, want: np.ndarray) -> Words | None:
    """Words for results that are all wrong by the same factor, which is not told, or by the same amount."""
    if want.size == 1:  # of one number there is always a factor, which would say nothing
        return Words("Not right: look at the sums, the divisions, the weights.", "数不对：看看求和、除法和权重。")
    large = np.abs(want) > 1e-3 * np.abs(want).max()
    factors = got[large] / want[large]
    if factors.size and np.abs(factors[0]) > 1e-9 and close(got / factors[0], want):
        return Words(
            "Wrong by one and the same factor: look at what the formula divides by, and at its weights.",
            "所有数值都差同一个倍数：看看公式里除以什么、权重是什么。",
        )
    if close(got - (got - want).mean(), want):
        return Words("All numbers are wrong by the same amount.", "所有数值都差同一个常数。")
    return None

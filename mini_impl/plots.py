"""Figures, and sliders that need no kernel; their words in the language of the page.

figure, axes = plots.figure(height=3)
plots.curves(axes, {words(en="trend", zh="趋势"): trend, words(en="series", zh="序列"): series})
axes.set(xlabel=words(en="hour", zh="小时"))
plots.show(figure)
"""

import ast
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from inspect import getsource
from textwrap import dedent

import numpy as np
from matplotlib import cycler, font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mini_impl import checks
from mini_impl.language import language, say

# Okabe and Ito's colours, which colour-blind readers tell apart; in a page printed in grey the line styles differ.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
STYLE = {
    "font.size": 13,  # a figure is about 650 pixels wide, and a phone shows it at half its size
    "axes.titlesize": 14,
    "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linestyle": "-",
    "lines.linewidth": 2,
    "legend.frameon": False,
    "legend.fontsize": 12,
}
CHINESE_FONTS = (
    "Noto Sans SC",  # the package zhplot has it
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Noto Sans CJK JP",  # as older matplotlib calls Debian's Noto Sans CJK
)


@cache
def chinese_font() -> str | None:
    """The name of the first font here that has Chinese: that of the package zhplot, or an installed one; else None."""
    try:  # zhplot is not imported: on import it changes matplotlib's settings
        path = distribution("zhplot").locate_file("zhplot/fonts/NotoSansSC-Regular.ttf")
        font_manager.fontManager.addfont(path)
    except (PackageNotFoundError, FileNotFoundError):
        pass
    here = set(font_manager.fontManager.get_font_names())
    return next((name for name in CHINESE_FONTS if name in here), None)


def words(*, en: str, zh: str) -> str:
    """Words for a figure, in the language of the page; in English where no font can show Chinese."""
    return say(en=en, zh=zh) if chinese_font() else en


def figure(
    width: float = 6.4, height: float = 3.6, rows: int = 1, columns: int = 1
) -> tuple[Figure, Axes | np.ndarray]:
    """A figure of `width` x `height` inches, and its axes: one, or an array of them as in matplotlib's `subplots`.

    From here on all figures have the book's style, and a font with Chinese on a Chinese page.
    Raises TypeError, ValueError.
    """
    checks.positive(width=width, height=height)
    rcParams.update(STYLE)
    # Chinese first: in a text with $math$ matplotlib takes the first font for all the rest.
    chinese = [chinese_font()] if language() == "zh" and chinese_font() else []
    rcParams["font.family"] = [*chinese, "DejaVu Sans"]
    drawn = Figure((width, height), layout="constrained")  # not pyplot's: it would keep it open, and show it twice
    return drawn, drawn.subplots(rows, columns)


def curves(axes: Axes, values: Mapping[str, Sequence[float]], steps: Sequence[float] | None = None) -> None:
    """Draw {label: [step]} as curves with a legend: the terms of a loss at each step, or series over time.

    steps: where they stand on the horizontal axis; 0, 1, 2, .. if None. Tensors may be on any device.
    Raises TypeError; ValueError, naming the curve, for another length than that of steps, or for NaN and infinity.
    """
    checks.instance("axes", axes, Axes, "axes, as `figure` returns them")
    checks.instance("values", values, Mapping, "a dict of curves by their labels")
    for label, curve in values.items():
        heights = _array(curve)
        where = np.arange(len(heights)) if steps is None else _array(steps)
        bad = int((~np.isfinite(heights)).sum())
        if heights.shape != where.shape or heights.ndim != 1 or bad:
            got = f"shape {list(heights.shape)}, {bad} of them NaN or infinite"
            raise ValueError(f"values[{label!r}] must be [step], {len(where)} finite numbers; got {got}")
        axes.plot(where, heights, label=label)
    axes.margins(x=0)
    axes.legend()


def _array(values) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)


def png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a small PNG picture of at most 128 colours; drawn again, it has the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def show(figure: Figure) -> None:
    """Show the figure below the notebook's cell. Raises ImportError without IPython."""
    from IPython import display as notebook

    notebook.display(notebook.Image(data=png(figure), format="png"))


def slider(figures: Sequence[Figure], labels: Sequence[str], description: str, alt: Sequence[str]) -> None:
    """Show one of several figures, which a slider chooses; with no kernel too, on Colab as on a page.

    labels: what the slider shows at each figure; description: what stands before it; alt: each figure in words, for
    those who cannot see it. All pictures are drawn beforehand and travel in the notebook: keep them few.
    Raises ValueError unless every figure has a label of its own and a text in words; ImportError without ipywidgets.
    """
    if not figures or not len(figures) == len(labels) == len(alt) or len(set(labels)) < len(labels) or not all(alt):
        got = f"{len(figures)} figures, labels {list(labels)}, alt {list(alt)}"
        raise ValueError(f"slider needs figures, each with a label of its own and a text in words; got {got}")
    import ipywidgets as widgets
    from IPython import display as notebook

    pictures = [widgets.Image(value=png(figure), format="png") for figure in figures]
    for picture, text in zip(pictures, alt, strict=True):
        picture.layout.max_width = "100%"
        if picture.has_trait("tooltip"):  # since ipywidgets 8; on the book's pages it stands in for the picture
            picture.tooltip = text
    # A Tab with hidden tabs: ipywidgets 7, which Colab has, knows no Stack. Where they are not hidden they have titles.
    tab = widgets.Tab(children=pictures, selected_index=0)
    tab.add_class("no-tabs")
    for i, label in enumerate(labels):
        tab.set_title(i, str(label))
    chooser = widgets.SelectionSlider(options=[str(label) for label in labels], description=description)
    chooser.style.description_width = "initial"
    chooser.layout.width = "min(100%, 32em)"
    widgets.jslink((chooser, "index"), (tab, "selected_index"))  # in the browser: the kernel is not asked
    notebook.display(widgets.VBox([chooser, tab]))


def show_source(thing: Callable) -> None:
    """Print the source of a function or class without its docstrings, for a page that explains it in its own words."""
    lines = getsource(thing).splitlines()
    for part in ast.walk(ast.parse(dedent("\n".join(lines)))):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
            docstring = part.body[0]
            lines[docstring.lineno - 1 : docstring.end_lineno] = [None] * (docstring.end_lineno - docstring.lineno + 1)
    print("\n".join(line for line in lines if line is not None))

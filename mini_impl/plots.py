"""Figures, diagrams, tables, and sliders that need no kernel; their words in the language of the page.

figure, axes = plots.figure(height=3)
plots.curves(axes, {words(en="trend", zh="趋势"): trend, words(en="series", zh="序列"): series})
axes.set(xlabel=words(en="hour", zh="小时"))
plots.show(figure)
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from unicodedata import east_asian_width

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
    "savefig.facecolor": "white",  # in the dark too, where the book's pages turn the whole picture over
    "svg.hashsalt": "mini_impl",  # else the names of its parts are drawn by lot
}
LARGEST_SVG = 150_000  # bytes; a figure of many points is smaller as a PNG
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


def diagram(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Sequence[tuple[str, str, str]],
    width: float = 5,
    height: float = 4,
) -> Figure:
    """A diagram of a model: boxes with words, and arrows between them with the shapes of what flows.

    boxes: {name: (column, row, words)}; rows count downwards. arrows: (from, to, words), each name one of boxes; an
    arrow's words stand on its middle. Raises TypeError, ValueError.
    """
    checks.instance("boxes", boxes, Mapping, "a dict of (column, row, words) by names")
    checks.instance("arrows", arrows, Sequence, "several (from, to, words)")
    for name, three in (*boxes.items(), *(("an arrow", arrow) for arrow in arrows)):
        if not isinstance(three, Sequence) or len(three) != 3:
            raise TypeError(f"{name} must be three things; got {three!r}")
    for name, (column, row, _) in boxes.items():
        checks.number(f"the column of box {name!r}", column)
        checks.number(f"the row of box {name!r}", row)
    drawn, axes = figure(width, height)
    axes.axis("off")
    axes.invert_yaxis()
    columns, rows = ([place[axis] for place in boxes.values()] for axis in (0, 1))
    axes.set(xlim=(min(columns) - 0.5, max(columns) + 0.5), ylim=(max(rows) + 0.35, min(rows) - 0.35))
    look = {"boxstyle": "round,pad=0.45", "facecolor": "#EAF2F8", "edgecolor": COLORS[0], "linewidth": 1.5}
    shown = {
        name: axes.text(column, row, text, ha="center", va="center", bbox=look, linespacing=1.3)
        for name, (column, row, text) in boxes.items()
    }
    for start, end, text in arrows:
        for name in (start, end):
            checks.choice("the end of an arrow", name, tuple(boxes))
        (x0, y0, _), (x1, y1, _) = boxes[start], boxes[end]
        ends = {"patchA": shown[start].get_bbox_patch(), "patchB": shown[end].get_bbox_patch()}
        axes.annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1.5, **ends})
        look = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text((x0 + x1) / 2, (y0 + y1) / 2, text, fontsize=11, ha="center", va="center", bbox=look)
    return drawn


class Table:
    """What `table` returns: a notebook shows it as a table, and prints it as text with the same cells and marks."""

    def __init__(self, columns: list[str], rows: list[list[str]], right: list[bool], marked: set, caption: str | None):
        self.columns, self.rows, self.right, self.marked, self.caption = columns, rows, right, marked, caption

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            sides = ["right" if right else "left" for right in self.right]
            inside = "".join(
                f'<{tag} style="text-align: {side}">{text}</{tag}>' for side, text in zip(sides, cells, strict=True)
            )
            return f"<tr>{inside}</tr>"

        head = line("th", [escape(name) for name in self.columns])
        body = []
        for i, row in enumerate(self.rows):
            cells = [
                f"<strong>{escape(text)}</strong>" if (i, j) in self.marked else escape(text)
                for j, text in enumerate(row)
            ]
            body.append(line("td", cells))
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        rows = "\n".join(body)
        return f'<table class="dataframe">{caption}\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody></table>'

    def __repr__(self) -> str:
        # What is bold in the table has a star here.
        lines = [
            self.columns,
            *([t + "*" * ((i, j) in self.marked) for j, t in enumerate(r)] for i, r in enumerate(self.rows)),
        ]
        widths = [max(map(_columns_of, cells)) for cells in zip(*lines, strict=True)]
        text = []
        for line in lines:
            padded = [
                " " * (width - _columns_of(cell)) + cell if right else cell + " " * (width - _columns_of(cell))
                for cell, width, right in zip(line, widths, self.right, strict=True)
            ]
            text.append("  ".join(padded).rstrip())
        return "\n".join([self.caption, *text] if self.caption else text)


def table(
    rows: Sequence[Sequence[str | float | None]],
    columns: Sequence[str],
    caption: str | None = None,
    best: Mapping[int, str] | None = None,
) -> Table:
    """A table for a notebook's last line: real HTML, and plain text with the same cells where there is no HTML.

    rows: of cells; a text stands as it is, a whole number too, any other number with three decimals, None as "—".
    columns: the headings, with their units. best: {index of a column: "least" or "most"}; its best numbers are marked,
    bold in the table, with a star in the text. A cell counts as the number that it begins with.
    Raises TypeError, ValueError.
    """
    best = {} if best is None else best
    checks.instance("best", best, Mapping, 'a dict of "least" or "most" by the index of a column')
    columns = [str(name) for name in columns]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"every row of a table needs {len(columns)} cells, as many as columns; got {list(row)}")
    for column, which in best.items():
        checks.choice(f"best[{column}]", which, ("least", "most"))
    shown = [[_cell(cell) for cell in row] for row in rows]
    numbers = [[_leading_number(text) for text in row] for row in shown]
    right = [
        any(row[j] is not None for row in numbers)
        and all(
            n is not None or text == "—" for n, text in zip((r[j] for r in numbers), (s[j] for s in shown), strict=True)
        )
        for j in range(len(columns))
    ]
    marked = set()
    for column, which in best.items():
        here = [row[column] for row in numbers if row[column] is not None]
        if len(here) > 1:
            target = min(here) if which == "least" else max(here)
            marked |= {(i, column) for i, row in enumerate(numbers) if row[column] == target}
    return Table(columns, shown, right, marked, caption)


def _cell(cell: str | float | None) -> str:
    if cell is None:
        return "—"
    if isinstance(cell, str):
        return re.sub(r"(?<!\w)-(?=\d)", "−", cell)  # a minus, but no hyphen
    if math.prod(getattr(cell, "shape", ())) != 1:
        raise TypeError(f"a cell must be one number, a text or None; got {cell!r}")
    number = cell.item() if hasattr(cell, "item") else cell
    if isinstance(number, int):
        return str(number).replace("-", "−")
    if not np.isfinite(number):
        raise ValueError(f"a number in a table must be finite, or None where there is none; got {number}")
    return f"{number:.3f}".replace("-", "−")


def _leading_number(text: str) -> float | None:
    """The number with which a text begins: 0.195 of "0.195 (0.194–0.196)", 12 of "12 %"; None where there is none."""
    found = re.match(r"(?>[+−-]?\d[\d ]*(\.\d+)?(e[+−-]?\d+)?)(?![^\W\d_])", text)  # "45 Queen Street" is a name
    return float(found[0].replace("−", "-").replace(" ", "")) if found else None


def _columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: a Chinese character takes two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def svg(figure: Figure) -> bytes:
    """The figure as an SVG picture, its letters as outlines; drawn again, it has the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _shorter(buffer.getvalue().decode()).encode()


def _shorter(drawing: str) -> str:
    """An SVG with coordinates to a hundredth of a point, without comments and indentation: half its size."""
    drawing = re.sub(r"<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' "(?=[ />])', '"', re.sub(r"\s+", " ", drawing)).replace("> <", "><")

    def rounded(attribute: re.Match) -> str:
        short = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), attribute[0])
        return re.sub(r" ?([MLQCz]) ?", r"\1", short) if attribute[1] == "d" else short

    drawing = re.sub(r'(?<= )(d|x|y|points)="[^"]*"|translate\([^)]*\)', rounded, drawing)
    named = set(re.findall(r"#([\w.-]+)", drawing))
    drawing = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in named else "", drawing)
    # The outlines of letters, on a grid of 400 points to their size in the place of 6400.
    letter = re.compile(r' d="([^"]*)" transform="scale\(0\.015625\)"')
    return letter.sub(lambda match: f' d="{_coarser(match[1])}" transform="scale(0.25)"', drawing)


def _coarser(outline: str) -> str:
    return re.sub(r"-?\d+", lambda number: str(round(int(number[0]) / 16)), outline)


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a small PNG picture of at most 128 colours; drawn again, it has the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _picture(figure: Figure) -> tuple[bytes, str]:
    """The figure and its format: SVG, sharp at any size, or PNG where an SVG would be too large for a page."""
    drawn = svg(figure)
    return (drawn, "svg+xml") if len(drawn) <= LARGEST_SVG else (png(figure), "png")


def show(figure: Figure) -> None:
    """Show the figure below the notebook's cell. Raises ImportError without IPython."""
    from IPython import display as notebook

    picture, kind = _picture(figure)
    if kind == "png":
        width = round(100 * figure.get_figwidth())  # CSS pixels: half of those that the picture has
        notebook.display(notebook.Image(data=picture, format="png", width=width))
    else:
        notebook.display(notebook.SVG(data=picture.decode()))


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

    drawn = map(_picture, figures)
    pictures = [widgets.Image(value=picture, format=kind) for picture, kind in drawn]
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

"""Figures and sliders: words in the page's language and never a box, small pictures with the same bytes every time."""

import io
import logging
import re
import struct
import sys
import warnings

import ipywidgets
import matplotlib.pyplot
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from IPython import display as notebook
from matplotlib import rcParams
from PIL import Image

from mini_impl import plots
from mini_impl.language import use_language

GREEK_AND_SIGNS = "λ₁ μ γ α β Σ ∂ ∇ ‖x‖² ≤ ≥ ≈ → ∞ ± × − ℝ ŷ …"
HANZI = "序列趋势季节历史预测训练验证测试损失权重步数小时行人均方误差滑动平均窗口核大小频率振幅，。（）：“”"


class Strict(logging.Handler):
    def emit(self, record):
        raise ValueError(record.getMessage())


@pytest.fixture(autouse=True)
def strict():
    """A missing glyph is an error, in plain text (a warning) and in text with math (only logged)."""
    handler = Strict(logging.WARNING)
    logging.getLogger("matplotlib").addHandler(handler)
    settings = dict(rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".* deprecated", UserWarning)  # matplotlib 3.9 calls pyparsing by old names
        warnings.filterwarnings("ignore", "Creating legend", UserWarning)  # says that the machine is busy
        yield
    logging.getLogger("matplotlib").removeHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rcParams.update(settings)
    use_language("en")
    plots.chinese_font.cache_clear()


@pytest.fixture
def shown(monkeypatch):
    things = []
    monkeypatch.setattr(notebook, "display", things.append)
    return things


def drawn(title="title", width=6.4, **curves):
    figure, axes = plots.figure(width=width)
    plots.curves(axes, curves or {"series": torch.sin(torch.arange(100) / 5)})
    axes.set(title=title)
    return figure


# --- words ----------------------------------------------------------------------------------------------------------


def test_words_are_chinese_on_a_chinese_page():
    assert plots.words(en="trend", zh="趋势") == "trend"
    use_language("zh")
    assert plots.chinese_font() == "Noto Sans SC"  # the tests install zhplot
    assert plots.words(en="trend", zh="趋势") == "趋势"


class Fonts:
    """In the place of matplotlib's list of fonts: these are installed, and no file can be added."""

    def __init__(self, *names):
        self.get_font_names = lambda: [*names, "DejaVu Sans"]
        self.fontManager = self

    def addfont(self, path):
        raise FileNotFoundError(path)


def no_package(name):
    raise plots.PackageNotFoundError(name)


@pytest.mark.parametrize("distribution", [no_package, plots.distribution])  # or zhplot without its font
def test_without_a_font_they_are_english(monkeypatch, distribution):
    monkeypatch.setattr(plots, "distribution", distribution)
    monkeypatch.setattr(plots, "font_manager", Fonts("Liberation Sans"))
    plots.chinese_font.cache_clear()
    use_language("zh")
    assert plots.chinese_font() is None
    assert plots.words(en="trend", zh="趋势") == "trend"
    plots.png(drawn(plots.words(en="trend", zh="趋势")))
    assert rcParams["font.family"] == ["DejaVu Sans"]


def test_an_installed_font_will_do(monkeypatch):
    monkeypatch.setattr(plots, "distribution", no_package)
    monkeypatch.setattr(plots, "font_manager", Fonts("Microsoft YaHei", "Arial"))
    plots.chinese_font.cache_clear()
    assert plots.chinese_font() == "Microsoft YaHei"


def test_zhplot_is_not_imported():
    """It would change matplotlib's settings."""
    assert plots.chinese_font() and "zhplot" not in sys.modules


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_glyph_is_missing(language):
    use_language(language)
    words = HANZI if language == "zh" else "ABC xyz"
    for title in (GREEK_AND_SIGNS, words + GREEK_AND_SIGNS[:9], words + r" ≤ −1 $\mu\|E^\top E-I\|_F^2$"):
        figure = drawn(title, width=12, **{title: [-1.0, 2.0, -3.0]})
        figure.axes[0].set(xlabel=title, ylabel=title[:9])
        plots.png(figure)


def test_the_check_above_sees_boxes():
    """With the English font Chinese is boxes, and both ways in which matplotlib says so are errors here."""
    with pytest.raises(UserWarning, match=r"Glyph .* missing"):
        plots.png(drawn("趋势"))
    with pytest.raises(ValueError, match=r"glyph"):
        plots.png(drawn("趋势 $x$"))


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_are_one_or_many_and_never_stay_open():
    figure, axes = plots.figure(width=5, height=3)
    assert figure.get_size_inches().tolist() == [5, 3] and isinstance(axes, matplotlib.axes.Axes)
    _, many = plots.figure(rows=2, columns=3)
    assert many.shape == (2, 3)
    assert matplotlib.pyplot.get_fignums() == []


def test_curves_differ_in_colour_and_in_line():
    names = "abcdefg"
    axes = drawn(**{name: [0.0, 1.0] for name in names}).axes[0]
    assert [line.get_color() for line in axes.lines] == list(plots.COLORS)
    assert len(set(plots.COLORS)) == len(set(plots.LINES)) == len(plots.LINES) == 7
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(names)


def test_curves_take_lists_arrays_and_tensors_with_gradients():
    _, axes = plots.figure()
    tensor = torch.ones(3, requires_grad=True) * 2
    plots.curves(axes, {"a": [1, 2, 3], "b": np.arange(3), "c": tensor}, steps=torch.tensor([0, 10, 20]))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[1, 2, 3], [0, 1, 2], [2, 2, 2]]
    assert axes.lines[0].get_xdata().tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda axes: plots.curves(axes, {"a": [1.0, float("nan")]}),
            ValueError,
            r"values\['a'\] must be \[step\], 2 finite numbers; got shape \[2\], 1 of them NaN or infinite",
        ),
        (lambda axes: plots.curves(axes, {"a": [1, 2]}, steps=[0]), ValueError, r"values\['a'\] .* 1 finite .* \[2\]"),
        (lambda axes: plots.curves(axes, {"a": torch.zeros(2, 2)}), ValueError, r"must be \[step\].*\[2, 2\]"),
        (lambda axes: plots.figure(width=0), ValueError, "width must be a finite number greater than 0"),
        (lambda axes: plots.figure(rows=0), ValueError, "rows must be a positive integer, not 0"),  # says matplotlib
    ],
)
def test_what_cannot_be_drawn_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(plots.figure()[1])


def test_pictures_are_small_and_have_the_same_bytes_again():
    first, second = plots.png(drawn()), plots.png(drawn())
    assert first == second and len(first) < 80_000
    chunks, at = [], 8
    while at < len(first):
        length, kind = struct.unpack(">I4s", first[at : at + 8])
        chunks.append(kind)
        at += 12 + length
    assert set(chunks) == {b"IHDR", b"PLTE", b"IDAT", b"IEND"}  # no text, no time
    picture = Image.open(io.BytesIO(first))
    assert picture.size == (1280, 720) and picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_svg_pictures_have_outlines_for_letters_a_white_ground_and_the_same_bytes_again():
    first, second = plots.svg(drawn("a title")), plots.svg(drawn("a title"))
    assert first == second and len(first) < 40_000
    assert b"<text" not in first and b"<dc:date>" not in first
    assert b"fill: #ffffff" in first


def test_show(shown):
    assert plots.show(drawn()) is None
    paths = plots.svg(drawn()).decode().count("<path")
    assert shown[0].data.startswith("<svg") and shown[0].data.count("<path") == paths > 20


def test_a_figure_of_very_many_points_is_shown_as_a_png_of_twice_the_size(shown):
    figure = drawn(noise=torch.rand(20_000), more=torch.rand(20_000), yet_more=torch.rand(20_000))
    assert len(plots.svg(figure)) > plots.LARGEST_SVG
    plots.show(figure)
    assert shown[0].data == plots.png(figure) and shown[0].width == 640
    assert Image.open(io.BytesIO(shown[0].data)).size == (1280, 720)


# --- the diagram ----------------------------------------------------------------------------------------------------


def test_a_diagram_has_its_boxes_and_the_words_of_its_arrows():
    boxes = {"x": (0, 0, "history"), "y": (0, 1, "forecast")}
    figure = plots.diagram(boxes, [("x", "y", "[96, 7]")])
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"history", "forecast", "[96, 7]"} <= set(words)
    places = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert places["[96, 7]"] == (0, 0.5)
    assert len(plots.svg(figure)) < 40_000
    with pytest.raises(ValueError, match="the end of an arrow must be one of 'x', 'y'"):
        plots.diagram(boxes, [("x", "z", "")])


# --- the table ------------------------------------------------------------------------------------------------------


def test_a_table_has_the_same_cells_in_html_and_in_text():
    table = plots.table(
        [["published", 0.386, "0.40 (0.39–0.41)", None], ["ours <b>", 0.3791, "0.39 (0.38–0.40)", 3]],
        ["model", "MSE", "MAE (least–most)", "epochs"],
        caption="ETTh1",
        best={1: "least", 2: "least", 3: "most"},
    )
    page = BeautifulSoup(table._repr_html_(), "html.parser")
    assert page.table["class"] == ["dataframe"] and page.caption.text == "ETTh1"
    cells = [[cell.text for cell in row.find_all(["th", "td"])] for row in page.find_all("tr")]
    assert cells[1] == ["published", "0.386", "0.40 (0.39–0.41)", "—"]
    assert cells[2] == ["ours <b>", "0.379", "0.39 (0.38–0.40)", "3"]
    assert [mark.text for mark in page.find_all("strong")] == [
        "0.379",
        "0.39 (0.38–0.40)",
    ]  # one number is not the best
    lines = repr(table).splitlines()
    assert lines[0] == "ETTh1" and lines[3].split() == ["ours", "<b>", "0.379*", "0.39", "(0.38–0.40)*", "3"]
    sides = [cell["style"] for cell in page.find_all("th")]
    assert sides == ["text-align: left", *["text-align: right"] * 3]


def test_a_table_of_chinese_words_stands_in_columns():
    lines = repr(plots.table([["预测", 1.0], ["x", 22.5]], ["名称", "MSE"])).splitlines()
    widths = {sum(1 + (ord(c) > 0x2E80) for c in line) for line in lines}
    assert len(widths) == 1


def test_what_is_best_counts_signs_and_exponents():
    table = plots.table([["−0.5 %"], ["+1.2 %"], ["7.9e-9"], [None]], ["gain"], best={0: "least"})
    assert "−0.5 %*" in repr(table) and repr(table).count("*") == 1
    table = plots.table([[2], [2], [3]], ["n"], best={0: "least"})
    assert repr(table).count("2*") == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.table([[1, 2]], ["a"]), "every row of a table needs 1 cells, as many as columns"),
        (lambda: plots.table([[1.0]], ["a"], best={0: "lowest"}), r"best\[0\] must be one of 'least', 'most'"),
        (lambda: plots.table([[float("nan")]], ["a"]), "must be finite, or None where there is none; got nan"),
    ],
)
def test_what_is_no_table_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- the slider -----------------------------------------------------------------------------------------------------


def test_the_slider_chooses_a_picture_without_a_kernel(shown, monkeypatch):
    links = []
    monkeypatch.setattr(ipywidgets, "jslink", lambda *ends: links.append(ends))
    figures = [drawn(f"k = {k}", a=torch.rand(300), b=torch.rand(300).cumsum(0)) for k in range(8)]
    labels, texts = [str(k) for k in range(8)], [f"Curves at k = {k}" for k in range(8)]
    plots.slider(figures, labels, description="kernel size", alt=texts)

    (box,) = shown
    chooser, tab = box.children
    assert (
        isinstance(box, ipywidgets.VBox) and chooser.description == "kernel size" and chooser.options == tuple(labels)
    )
    assert tab.selected_index == chooser.index == 0 and "no-tabs" in tab._dom_classes
    assert [tab.get_title(i) for i in range(8)] == labels
    if tab.children[0].has_trait("tooltip"):  # since ipywidgets 8
        assert [picture.tooltip for picture in tab.children] == texts
    assert [picture.format for picture in tab.children] == ["svg+xml"] * 8
    assert tab.children[3].value == plots.svg(figures[3])
    assert links == [((chooser, "index"), (tab, "selected_index"))]


@pytest.mark.parametrize(
    ("labels", "alt", "count"),
    [
        ([], [], 0),
        (["1"], ["one", "two"], 2),
        (["1", "2"], ["one"], 2),
        (["1", "1"], ["one", "two"], 2),
        (["1", "2"], ["one", ""], 2),
    ],
)
def test_every_figure_of_a_slider_needs_its_words(shown, labels, alt, count):
    with pytest.raises(ValueError, match="slider needs figures, each with a label of its own and a text"):
        plots.slider([drawn() for _ in range(count)], labels, description="k", alt=alt)
    assert not shown


def test_without_ipywidgets_it_is_missing_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="ipywidgets"):
        plots.slider([drawn()], ["1"], description="k", alt=["one"])


def test_a_name_that_begins_with_a_number_is_no_number():
    shown = plots.table([["45 Queen Street", "12 %"], ["8 题", "1.5e-05 (1–2)"]], ["sensor", "share"])
    assert shown.right == [False, True]


def test_a_picture_is_short_and_every_part_that_it_refers_to_is_there():
    figure, axes = plots.figure()
    axes.plot([1, 2, 3], [1, 4, 9], label="a word, $\\lambda_1$")
    axes.legend()
    drawn = plots.svg(figure).decode()
    names, used = re.findall(r' id="([^"]*)"', drawn), set(re.findall(r'(?:href="|url\()#([^")]*)', drawn))
    assert set(names) == used and len(names) == len(used)
    assert not re.search(r' d="[^"]+" transform="scale\(0\.015625\)"', drawn) and "scale(0.25)" in drawn
    whole = io.BytesIO()
    figure.savefig(whole, format="svg")
    assert len(drawn) < 0.7 * len(whole.getvalue())

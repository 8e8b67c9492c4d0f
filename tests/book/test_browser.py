"""The pages in a browser: what a reader sees, on a desk and on a phone, from a server and from a folder."""

from pathlib import Path

import pytest
from books import DESK, PHONE

pytestmark = pytest.mark.slow
TAGS = {"en": "en", "zh": "zh-CN"}


def pages_of(folder: Path, sites: Path) -> list[str]:
    """Every page of a site that a reader can open, as a path below `sites`."""
    found = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts and path.name != "404.html"]
    assert len(found) > 9
    return [path.relative_to(sites).as_posix() for path in found]


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_every_page_is_quiet_and_fits_a_phone(visit, site, demo_site, sites, scheme):
    window = visit(PHONE, scheme)
    formulas = pictures = widgets = 0
    for path in pages_of(site, sites) + pages_of(demo_site, sites):
        page = window.open(path)
        assert window.problems == [], path
        assert window.outside_requests() == [], path
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{path} is {wide} pixels wider than a phone"
        if "/html/en/" in path or "/html/zh/" in path:
            language = path.split("/html/")[1][:2]
            assert page.evaluate("document.documentElement.lang") == TAGS[language], path
        assert page.locator("mjx-merror").count() == 0, f"{path} holds a formula that MathJax cannot read"
        assert page.locator(".bd-article .math").count() == page.locator(".bd-article .math mjx-container").count(), (
            path
        )
        assert "needs a running notebook" not in page.inner_text("body"), path
        assert (
            page.evaluate("[...document.images].filter(i => !i.alt || !i.naturalWidth).map(i => i.src.slice(0, 80))")
            == []
        ), path
        formulas += page.locator(".bd-article mjx-container").count()
        pictures += page.locator(".bd-article img").count()
        widgets += page.locator(".bd-article .widget-slider").count()
    assert formulas > 10 and pictures > 10 and widgets >= 6


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize("language", TAGS)
def test_sliders_follow_keyboard_and_mouse_without_a_kernel(visit, scheme, language):
    window = visit(DESK, scheme)
    page = window.open(f"demo/_build/html/{language}/demo.html")
    for column, (name, first, last) in enumerate(
        {
            "en": [("bars", "2 bars", "9 bars"), ("periods", "1 waves", "3 waves")],
            "zh": [("柱子", "2 根柱子", "9 根柱子"), ("周期", "1 个波", "3 个波")],
        }[language]
    ):
        box = page.locator(".widget-column").nth(column)
        slider = box.get_by_label(name)
        shown = box.locator("img:visible")
        assert shown.count() == 1 and shown.get_attribute("alt") == first
        slider.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert shown.count() == 1 and shown.get_attribute("alt") == last
        place = slider.bounding_box()
        page.mouse.move(place["x"] + place["width"] - 8, place["y"] + place["height"] / 2)
        page.mouse.down()
        page.mouse.move(place["x"] + 2, place["y"] + place["height"] / 2, steps=5)
        page.mouse.up()
        assert shown.count() == 1 and shown.get_attribute("alt") == first
        assert slider.evaluate("slider => slider.ariaValueText") == box.locator("output").first.inner_text()
    assert window.problems == []


def test_a_slider_of_numbers_shows_its_number(visit):
    page = visit(DESK).open("demo/_build/html/en/demo.html")
    slider = page.get_by_label("other")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "4" and page.locator("output", has_text="4").count() == 1


SEARCHES = [
    ("zh", "移动平均", "glossary.html"),
    ("zh", "梯度下降", "dlinear.html"),
    ("zh", "梯度下降 移动平均", "glossary.html"),
    ("zh", "moving average", "glossary.html"),
    ("en", "moving average", "series.html"),
    ("en", "移动平均", "glossary.html"),
]


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize(("language", "query", "page_name"), SEARCHES)
def test_search_finds(visit, scheme, language, query, page_name):
    window = visit(DESK, scheme)
    page = window.open(f"book/_build/html/{language}/search.html?q={query}")
    page.wait_for_selector("#search-results ul.search li a")
    found = page.locator("#search-results ul.search li a").evaluate_all(
        "links => links.map(a => new URL(a.href).pathname)"
    )
    assert any(path.endswith(f"/{language}/{page_name}") for path in found)
    assert all(f"/html/{language}/" in path for path in found), "only pages of this language"
    assert window.problems == []


def test_the_search_box_leads_to_the_results(visit):
    page = visit(DESK).open("book/_build/html/zh/start.html")
    page.locator(".search-button-field:visible, .search-button__button:visible").first.click()
    page.keyboard.type("梯度下降")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results ul.search li a")
    assert "/zh/search.html" in page.url


def test_search_finds_nothing_where_there_is_nothing(visit):
    page = visit(DESK).open("book/_build/html/zh/search.html?q=量子色动力学")
    page.wait_for_selector("#search-results p.search-summary")
    page.wait_for_function("!document.querySelector('.search-summary').innerText.endsWith('...')")
    assert page.locator("#search-results ul.search li a").count() == 0


ENGLISH_ATTRIBUTES = """
() => [...document.querySelectorAll("*")]
  .flatMap((e) => ["aria-label", "title", "placeholder", "alt", "data-bs-title", "data-bs-original-title"]
    .map((name) => e.getAttribute(name)))
  .filter((text) => text && !/[\u3400-\u9fff]/.test(text) && /[a-z]{3}/i.test(text))
"""
ENGLISH_WORDS = """
() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), words = [];
  while (walker.nextNode()) {
    const { textContent: text, parentElement: parent } = walker.currentNode;
    const english = /[a-z]{3}/i.test(text) && !/[\u3400-\u9fff]/.test(text);
    if (english && !parent.closest("script, noscript, style, .bd-article")) words.push(text.trim());
  }
  return words;
}
"""


MODELS = {"DLinear", "PatchTST", "iTransformer", "TimesNet", "TimeXer", "SFT", "GRPO", "DAPO"}  # that have a chapter


def test_chinese_pages_hold_no_english_but_names(visit):
    """Around the article: what the themes say, to the eye and to a screen reader."""
    page = visit(DESK).open("demo/_build/html/zh/demo.html")
    assert set(page.evaluate(ENGLISH_WORDS)) == {"Ctrl", "English", "Colab", ".ipynb", ".pdf"}
    assert page.evaluate(ENGLISH_ATTRIBUTES) == []
    page = visit(DESK).open("book/_build/html/zh/glossary.html")
    assert set(page.evaluate(ENGLISH_WORDS)) == {"Ctrl", "English", ".ipynb", ".pdf"} | MODELS
    assert set(page.evaluate(ENGLISH_ATTRIBUTES)) <= MODELS


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_the_switch_leads_to_the_same_page_and_back(visit, scheme):
    page = visit(PHONE, scheme).open("book/_build/html/index.html")
    page.click(".chooser a[hreflang=zh-CN]")
    assert page.url.endswith("/zh/index.html")
    page.goto(page.url.replace("index.html", "series.html"))
    page.click(".language-switch")
    assert page.url.endswith("/en/series.html") and page.evaluate("document.documentElement.lang") == "en"
    page.click(".language-switch")
    assert page.url.endswith("/zh/series.html") and page.evaluate("document.documentElement.lang") == "zh-CN"


# The contrast that WCAG asks for is 4.5: luminance of text and of what is behind it, both plus 0.05, divided.
LOW_CONTRAST = """
() => {
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith("color(") ? [255 * r, 255 * g, 255 * b, a] : [r, g, b, a];
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const luminance = ([r, g, b]) => [r, g, b]
    .map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (e) => {
    const [low, high] = [rgba(getComputedStyle(e).color), behind(e)].map(luminance).sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const kinds = [".bd-article h1", ".bd-article p", ".bd-article td", ".bd-article pre span", ".bd-article .output pre",
                 ".widget-slider", ".widget-slider output", "summary p", ".language-switch", ".bd-sidebar-primary a"];
  return kinds.map((kind) => {
    const found = [...document.querySelectorAll(kind)].filter((e) => e.textContent.trim());
    const contrasts = found.map((e) => [contrast(e), e.textContent]).sort((a, b) => a[0] - b[0]);
    return [kind, contrasts.length, contrasts[0]];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_in_dark(visit, scheme):
    page = visit(DESK, color_scheme=scheme).open("demo/_build/html/zh/demo.html")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme, "the page follows the reader's system"
    # The theme's buttons fade from the colours before the theme was known to those after.
    page.evaluate("document.getAnimations().filter((a) => a instanceof CSSTransition).forEach((a) => a.finish())")
    for kind, count, least in page.evaluate(LOW_CONTRAST):
        assert count > 0, f"no {kind} to look at"
        assert least[0] >= 4.5, f"{kind}: {least}"


# Of a kind of element: how many of them scroll, and how many cannot be scrolled to their left end.
SCROLLING = """
found => [
  found.filter((e) => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === "auto").length,
  found.filter((e) => e.firstElementChild.getBoundingClientRect().left < e.getBoundingClientRect().left - 1).length,
]
"""


def test_wide_things_scroll_in_boxes_of_their_own(visit):
    page = visit(PHONE).open("demo/_build/html/zh/demo.html")
    page.locator("details.hide").evaluate_all("all => all.forEach(details => { details.open = true; })")
    for kind in ("div.math", ".pst-scrollable-table-container", ".cell_input pre"):
        scrolling, cut = page.locator(f".bd-article {kind}").evaluate_all(SCROLLING)
        assert scrolling > 0, f"no {kind} of this page scrolls"
        assert cut == 0, f"{cut} {kind} begin left of where one can scroll to"


TORN = """all => all.filter(joined => {
  const end = document.createRange();
  end.selectNodeContents(joined.lastChild);
  return end.getBoundingClientRect().top > joined.querySelector("mjx-container").getBoundingClientRect().bottom;
}).map(joined => joined.innerText)"""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_line_begins_with_the_punctuation_after_a_formula(visit, site, sites, language):
    page = visit(PHONE).open(f"{site.relative_to(sites).as_posix()}/{language}/dlinear.html")
    joined = page.locator(".bd-article .unbroken")
    assert joined.count() > 20
    assert joined.evaluate_all(TORN) == []


def test_a_solution_opens_and_folded_code_unfolds(visit):
    page = visit(DESK).open("demo/_build/html/zh/demo.html")
    code = page.locator("details.hide pre").first
    assert not code.is_visible()
    page.get_by_text("显示代码").first.click()
    assert code.is_visible()
    page.get_by_text("解答").click()
    assert page.get_by_text("需要时才展开").is_visible()


def test_the_notebook_is_saved_by_the_button(visit, demo_site):
    page = visit(DESK).open("demo/_build/html/zh/demo.html")
    page.get_by_role("button", name="下载此页面").click()
    with page.expect_download() as download:
        page.locator(".btn-download-source-button").click()
    assert download.value.path().read_bytes() == (demo_site / "download" / "zh" / "demo.ipynb").read_bytes()

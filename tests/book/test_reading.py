"""What the pages do for a reader in a browser: search, print, keyboard, dark pages, pages without JavaScript."""

import base64
import gzip
import hashlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from books import DESK, LANGUAGES, PHONE, REWRITTEN, pages_of_language

pytestmark = pytest.mark.slow
BOOK = "book/_build/html"
AXE = "axe-core@4.14.1"
AXE_SHA512 = "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ=="
each_language = pytest.mark.parametrize("language", LANGUAGES)
each_rewritten_page = pytest.mark.parametrize("name", REWRITTEN)


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> Path:
    """The script of axe-core, the accessibility checker, from the npm registry."""
    if shutil.which("npm") is None:
        missing = "no npm here; on Debian: apt install npm"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    folder = tmp_path_factory.mktemp("axe")
    done = subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, text=True, stdout=-1, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"npm could not fetch {AXE}: {done.stdout}"
    (packed,) = folder.glob("*.tgz")
    assert base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() == AXE_SHA512
    with tarfile.open(packed) as archive:
        archive.extract("package/axe.min.js", folder, filter="data")
    return folder / "package" / "axe.min.js"


SERIOUS = """axe.run(document, {resultTypes: ["violations"]}).then(({violations}) => violations
  .filter(({impact}) => ["serious", "critical"].includes(impact))
  .map(({id, nodes}) => [id, nodes.slice(0, 3).map(({html}) => html.slice(0, 200))]))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@each_language
def test_axe_finds_nothing_serious(visit, site, axe, language, scheme):
    window = visit(DESK, color_scheme=scheme)
    for path in pages_of_language(site, language):
        page = window.open(f"{BOOK}/{path}")
        page.evaluate("document.getAnimations().forEach((a) => a.finish())")
        page.add_script_tag(path=axe)
        assert page.evaluate(SERIOUS) == [], path


TAB_STOPS = """() => [...document.querySelectorAll(
    ".bd-article :is(a[href], button, summary, input, [tabindex])")]
  .filter((e) => e.tabIndex >= 0 && e.checkVisibility({visibilityProperty: true}))
  .map((e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 30)}`)"""


@each_language
def test_the_tab_key_stops_at_most_sixty_times(visit, site, language):
    window = visit(DESK)
    for path in pages_of_language(site, language):
        page = window.open(f"{BOOK}/{path}")
        page.wait_for_timeout(300)  # what scrolls is known when the formulas are set
        stops = page.evaluate(TAB_STOPS)
        assert len(stops) <= 60, (path, len(stops), stops)
        assert not [stop for stop in stops if stop.startswith("MJX")]


def test_boxes_that_scroll_are_named_and_others_are_no_stop(visit):
    page = visit(PHONE).open("demo/_build/html/zh/demo.html")
    boxes = page.locator(".bd-article :is(pre, div.math)")
    boxes.first.wait_for(state="attached")
    page.wait_for_timeout(300)
    shown = boxes.evaluate_all(
        "all => all.filter(e => e.checkVisibility())"
        ".map(e => [e.scrollWidth > e.clientWidth + 1, e.tabIndex === 0, e.ariaLabel])"
    )
    assert {scrolls for scrolls, *_ in shown} == {True, False}
    assert all((scrolls, "可横向滚动" if scrolls else None) == (stop, name) for scrolls, stop, name in shown)


def test_one_stop_leads_to_all_copy_buttons(visit):
    page = visit(DESK).open(f"{BOOK}/en/dlinear.html")
    buttons = page.locator(".bd-article button.copybtn")
    assert buttons.evaluate_all("all => all.filter(e => e.tabIndex === 0).length") == 1
    shown = [buttons.nth(i) for i in range(buttons.count()) if buttons.nth(i).evaluate("e => e.checkVisibility()")]
    assert len(shown) > 10
    shown[0].focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert shown[2].evaluate("e => e === document.activeElement && e.tabIndex === 0")
    assert buttons.evaluate_all("all => all.filter(e => e.tabIndex === 0).length") == 1


def test_what_the_keyboard_is_at_is_seen(visit):
    page = visit(DESK).open(f"{BOOK}/en/dlinear.html")
    page.keyboard.press("Tab")
    for _ in range(25):
        page.keyboard.press("Tab")
        style = page.evaluate("(s => [s.outlineStyle, s.outlineWidth])(getComputedStyle(document.activeElement))")
        assert style == ["solid", "2px"], page.evaluate("document.activeElement.outerHTML")


WIDE_CODE = """() => [...document.querySelectorAll(".bd-article pre")]
  .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"""


@each_language
@each_rewritten_page
def test_no_line_of_code_is_wider_than_its_box(visit, language, name):
    page = visit(DESK).open(f"{BOOK}/{language}/{name}.html")
    page.locator(".bd-article details").evaluate_all("all => all.forEach(details => { details.open = true; })")
    assert page.locator(".bd-article pre").count() > 30
    assert page.evaluate(WIDE_CODE) == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_the_switch_keeps_the_section(visit, scheme):
    page = visit(DESK, scheme).open(f"{BOOK}/en/dlinear.html#result")
    page.wait_for_function("Math.abs(document.getElementById('result').getBoundingClientRect().top) < 140")
    place = page.locator(".language-switch").bounding_box()
    with page.expect_navigation():  # page.click would scroll first
        page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    assert page.url.endswith("/zh/dlinear.html#result")
    page.goto(page.url.split("#")[0])
    page.click(".language-switch")
    assert page.url.endswith("/en/dlinear.html"), "at the top there is no section to keep"


SEARCHES = [
    ("zh", "z 分数", "series.html"),
    ("zh", "最小二乘", "dlinear.html"),
    ("en", "leakage", "series.html"),
    ("en", "row sums", "dlinear.html"),
]


@pytest.mark.parametrize("scheme", ["http", "file"])
@pytest.mark.parametrize(("language", "query", "name"), SEARCHES)
def test_a_search_leads_to_a_section_and_marks_the_words(visit, scheme, language, query, name):
    window = visit(DESK, scheme)
    page = window.open(f"{BOOK}/{language}/search.html?q={query}")
    page.wait_for_selector("#search-results ul.search li a")
    for snippet in page.locator("#search-results .context").all_inner_texts():
        assert not [mark for mark in ("\\", "$", "_{", "^{") if mark in snippet], snippet
    assert page.locator("#search-results mark").count() > 0
    page.locator(f"#search-results a[href^='{name}']").first.click()
    page.wait_for_function("CSS.highlights.get('found')?.size > 0")
    assert page.evaluate("location.hash.length > 1 && scrollY > 300 && document.querySelector(location.hash) !== null")
    assert window.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_print_is_light_and_open_but_for_solutions(visit, scheme):
    page = visit(DESK, color_scheme=scheme).open(f"{BOOK}/zh/dlinear.html")
    page.evaluate("""addEventListener("beforeprint", () => {
      const shut = [...document.querySelectorAll(".bd-article details:not([open])")];
      window.printed = [document.documentElement.dataset.theme, shut.length, shut.every((e) => e.matches(".solution"))];
    })""")
    page.pdf()
    assert page.evaluate("printed[0]") == "light"
    assert page.evaluate("printed[1] >= 7 && printed[2]"), "solutions stay shut"
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme, "as it was before"
    code = page.locator(".bd-article .cell_input pre").first
    assert code.evaluate("e => getComputedStyle(e).whiteSpace") == "pre-wrap"
    assert not page.locator(".bd-article details.solution").first.is_visible()


@pytest.mark.parametrize(("scheme", "wanted"), [("light", "none"), ("dark", "invert(1) hue-rotate(180deg)")])
def test_drawings_are_turned_in_the_dark(visit, scheme, wanted):
    page = visit(DESK, color_scheme=scheme).open(f"{BOOK}/en/dlinear.html")
    drawings = page.locator(".bd-article :is(.cell_output, .widget-column) img")
    assert drawings.count() > 5
    assert set(drawings.evaluate_all("all => all.map(e => getComputedStyle(e).filter)")) == {wanted}


@each_language
def test_without_javascript_a_slider_is_a_picture(browser, addresses, language):
    page = browser.new_page(viewport=DESK, java_script_enabled=False)
    page.goto(f"{addresses['http']}/{BOOK}/{language}/dlinear.html")
    still = page.locator("noscript figure")
    assert still.first.is_visible() and "JavaScript" in still.first.inner_text()
    page.close()


@pytest.mark.parametrize("path", ["index.html", "en/index.html", "zh/index.html"])
def test_the_first_page_is_light(visit, path):
    assert len(sizes := bodies(visit(DESK), path)) > 5
    assert sum(map(len, sizes)) <= 2_500_000


def test_a_chapter_is_light_as_hosts_send_it(visit):
    assert len(sent := bodies(visit(DESK), "en/dlinear.html")) > 10
    assert sum(min(len(body), len(gzip.compress(body))) for body in sent) <= 2_500_000


def bodies(window, path: str) -> list[bytes]:
    """Whatever a browser that has nothing yet gets for a page."""
    answers = []
    window.page.on("response", lambda answer: answers.append(answer))
    window.open(f"{BOOK}/{path}")
    window.page.wait_for_load_state("networkidle")
    return [answer.body() for answer in answers]


def test_no_motion_for_those_who_want_none(visit):
    page = visit(DESK, reduced_motion="reduce").open(f"{BOOK}/en/dlinear.html")
    moving = (
        "[...document.querySelectorAll('*')].filter(e => parseFloat(getComputedStyle(e).transitionDuration) > 0).length"
    )
    assert page.evaluate(moving) == 0

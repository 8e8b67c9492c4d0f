"""The built site: warnings fail, addresses are right, nothing local is missing."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from books import ADDRESS, BASE, PAGES, ROOT, STRICT, build, make_notebooks, small_book
from bs4 import BeautifulSoup

pytestmark = pytest.mark.slow
TAGS = {"en": "en", "zh": "zh-CN"}


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def html_pages(folder: Path) -> list[Path]:
    """Every page of a built site."""
    pages = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts]
    assert len(pages) >= 9, "a chooser; in each language a page, its search and its index"
    return pages


def toc_files() -> list[str]:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]


def test_every_page_of_the_contents_is_built(site):
    files = toc_files()
    assert files
    for file in files:
        assert (site / file.removeprefix("book/")).with_suffix(".html").exists(), file
    assert (site / "index.html").exists()


@pytest.mark.parametrize("which", ["site", "demo_site"])
def test_every_local_address_leads_somewhere(which, request):
    folder, addresses = request.getfixturevalue(which), 0
    for page in html_pages(folder):
        for tag in soup(page).find_all(["a", "link", "script", "img"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc or not address.path:
                continue
            target = page.parent / unquote(address.path)
            assert target.is_file(), f"{page.relative_to(folder)} points at {address.path}"
            addresses += 1
    assert addresses > 100


@pytest.mark.parametrize("which", ["site", "demo_site"])
def test_nothing_is_loaded_from_another_host(which, request):
    """The browser tests watch the requests; this looks into the pages, for what loads only on a click too."""
    for page in html_pages(request.getfixturevalue(which)):
        for tag in soup(page).find_all(["link", "script", "img", "iframe"]):
            loads = tag.name != "link" or tag["rel"][0] in ("stylesheet", "preload", "icon")
            address = tag.get("src") or (tag.get("href") if loads else None) or ""
            assert not urlsplit(address).netloc, f"{page} loads {address}"


@pytest.mark.parametrize("language", TAGS)
def test_each_page_has_its_language_and_leads_to_the_other(site, language):
    other = "zh" if language == "en" else "en"
    pages = [path for path in html_pages(site) if path.parent.name == language]
    assert pages
    for path in pages:
        page = soup(path)
        assert page.html["lang"] == TAGS[language]
        links = {link["hreflang"]: link["href"] for link in page.find_all("link", rel="alternate", hreflang=True)}
        wanted = {tag: f"../{name}/{path.name}" for name, tag in TAGS.items()}
        assert links == wanted | {"x-default": wanted["en"]}
        assert page.find("a", class_="language-switch")["href"] == f"../{other}/{path.name}"


@pytest.mark.parametrize("language", TAGS)
def test_sidebar_and_neighbours_stay_in_the_language(site, language):
    folder, links = site / language, 0
    for path in [path for path in html_pages(site) if path.parent.name == language]:
        for link in soup(path).select(".bd-sidebar-primary a[href], .prev-next-area a[href]"):
            address = urlsplit(link["href"])
            if address.path and not address.netloc:
                assert (path.parent / address.path).resolve().parent == folder.resolve(), f"{path}: {link['href']}"
                links += 1
    assert links > 20


def test_chinese_pages_speak_chinese(site):
    page = soup(site / "zh" / "series.html")
    words = {tag.get_text(strip=True) for tag in page.select(".prev-next-subtitle, summary p, .caption-text")}
    assert {"上一页", "下一页", "显示代码", "隐藏代码", "入门", "预测", "参考"} <= words
    assert page.find("input", type="search")["placeholder"] == "搜索本书……"
    english = soup(site / "en" / "series.html").get_text()
    assert "上一页" not in english and "previous" in english


@pytest.mark.parametrize("which", ["site", "demo_site"])
def test_no_markdown_is_left_raw(which, request):
    """In Chinese, ** beside a bracket or quotation mark does not always make bold."""
    for path in html_pages(request.getfixturevalue(which)):
        article = soup(path).select_one(".bd-article-container")
        for code in article.select("pre, code, .math, script"):
            code.decompose()
        text = article.get_text()
        left = [mark for mark in ("**", "$", "](", "```", ":::", "{lang") if mark in text]
        assert not left, f"{path}: {left}"


def test_without_an_address_no_button_needs_one(site):
    for page in html_pages(site):
        links = [link["href"] for link in soup(page).find_all("a", href=True)]
        assert not [link for link in links if "colab" in link]


@pytest.mark.parametrize("language", TAGS)
def test_the_notebook_can_be_downloaded(site, language):
    link = soup(site / language / "series.html").select_one("a.btn-download-source-button")
    downloaded = site / language / link["href"]
    assert downloaded.read_bytes() == (ROOT / "book" / language / "series.ipynb").read_bytes()


@pytest.mark.parametrize("language", TAGS)
def test_with_an_address_pages_open_on_colab(demo_site, language):
    for name in ("index", "demo"):
        links = [link["href"] for link in soup(demo_site / language / f"{name}.html").find_all("a", href=True)]
        colab = ADDRESS.replace("https://github.com", "https://colab.research.google.com/github")
        assert f"{colab}/blob/main/book/{language}/{name}.ipynb" in links
        assert ADDRESS in links, "the button that opens the repository"


def test_with_a_base_address_search_engines_get_full_ones(demo_site):
    page = soup(demo_site / "zh" / "demo.html")
    links = {link["hreflang"]: link["href"] for link in page.find_all("link", rel="alternate", hreflang=True)}
    assert links == {"en": f"{BASE}en/demo.html", "zh-CN": f"{BASE}zh/demo.html", "x-default": f"{BASE}en/demo.html"}
    assert page.find("link", rel="canonical")["href"] == f"{BASE}zh/demo.html"
    assert page.find("a", class_="language-switch")["href"] == "../en/demo.html", (
        "a folder on a disk has no base address"
    )


def test_a_broken_reference_fails_the_build_until_it_is_mended(assets, tmp_path):
    root = small_book(tmp_path, PAGES / "index.md", PAGES / "lone.md")
    page = root / "book" / "src" / "lone.md"
    sound = page.read_text(encoding="utf-8")
    page.write_text(sound.replace("独自一页", "[独自一页](nowhere.ipynb)"), encoding="utf-8")
    assert make_notebooks(root).status == 0
    for attempt in ("first", "second, which has nothing new to read"):
        done = build(root, tmp_path / "out", *STRICT)
        assert done.status == 1 and "nowhere.ipynb" in done.output, f"{attempt}: {done.output}"
    page.write_text(sound, encoding="utf-8")
    assert make_notebooks(root).status == 0
    done = build(root, tmp_path / "out", *STRICT)
    assert done.status == 0, done.output


def test_a_page_of_no_edition_is_refused(assets, tmp_path):
    root = small_book(tmp_path, PAGES / "lone.md")
    toc = (root / "_toc.yml").read_text(encoding="utf-8")
    (root / "_toc.yml").write_text(toc.replace("book/zh/lone", "book/fr/lone"), encoding="utf-8")
    done = build(root, tmp_path / "out")
    assert done.status != 0 and "every chapter lies in book/ and one of en, zh" in done.output, done.output

"""The built site: warnings fail, addresses are right, nothing local is missing."""

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from books import ADDRESS, BASE, PAGES, REWRITTEN, ROOT, STRICT, build, make_notebooks, small_book, tool
from bs4 import BeautifulSoup

sys.path.insert(0, str(ROOT / "book" / "ext"))
from head import default_base

pytestmark = pytest.mark.slow
TAGS = {"en": "en", "zh": "zh-CN"}
# The book's own address, and that of its site: both "" until book/tools/release.py sets the first.
OWN_ADDRESS = tool("notebooks").repository().url
OWN_BASE = default_base(OWN_ADDRESS)


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def html_pages(folder: Path) -> list[Path]:
    """Every page of a built site."""
    pages = [path for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts and path.name != "404.html"]
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


def check_addresses(folder: Path) -> None:
    """Fail unless every local address of a site's pages leads to a file, and to a place in it."""
    addresses = 0
    ids = {page: {tag["id"] for tag in soup(page).find_all(id=True)} for page in html_pages(folder)}
    for page in html_pages(folder):
        for tag in soup(page).find_all(["a", "link", "script", "img"]):
            address = urlsplit(tag.get("href") or tag.get("src") or "")
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            assert target.is_file(), f"{page.relative_to(folder)} points at {address.path}"
            if address.fragment and target in ids:
                assert unquote(address.fragment) in ids[target], f"{page.relative_to(folder)}: {tag}"
            addresses += 1
    assert addresses > 100


@pytest.mark.parametrize("which", ["site", "demo_site"])
def test_every_local_address_leads_somewhere(which, request):
    check_addresses(request.getfixturevalue(which))


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
        wanted = {tag: f"{OWN_BASE or '../'}{name}/{path.name}" for name, tag in TAGS.items()}
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


def test_buttons_need_an_address(site):
    links = [link["href"] for page in html_pages(site) for link in soup(page).find_all("a", href=True)]
    assert any("colab" in link for link in links) == OWN_ADDRESS.startswith("https://github.com/")


@pytest.mark.parametrize("language", TAGS)
def test_the_button_of_a_page_gives_the_file_that_runs_alone(site, language):
    for path in (ROOT / "book" / language).glob("*.ipynb"):
        link = soup(site / language / f"{path.stem}.html").select_one("a.btn-download-source-button")
        assert link["href"] == f"../download/{language}/{path.name}" and link.has_attr("download")
        given = json.loads((site / language / link["href"]).read_text("utf-8"))["cells"]
        assert given == tool("portable").portable(json.loads(path.read_text("utf-8")), language)["cells"]
    assert not list(site.rglob("_sources/*.ipynb")), "what no button gives"


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
    for _ in range(2):  # what both editions share is moved anew each time
        done = build(root, tmp_path / "out", *STRICT)
        assert done.status == 0, done.output
        check_addresses(tmp_path / "out" / "_build" / "html")


def test_a_page_of_no_edition_is_refused(assets, tmp_path):
    root = small_book(tmp_path, PAGES / "lone.md")
    toc = (root / "_toc.yml").read_text(encoding="utf-8")
    (root / "_toc.yml").write_text(toc.replace("book/zh/lone", "book/fr/lone"), encoding="utf-8")
    done = build(root, tmp_path / "out")
    assert done.status != 0 and "every chapter lies in book/ and one of en, zh" in done.output, done.output


def test_nothing_is_there_twice_and_nothing_unused(site):
    files = [path for path in site.rglob("*") if path.is_file()]
    static = [path for path in files if "_static" in path.parts]
    assert sum(path.stat().st_size for path in static) <= 5_000_000
    assert not [path for path in static if path.suffix in (".map", ".ttf") or path.name == "fontawesome.js"]
    of_editions = [
        {
            path.relative_to(site / name).as_posix(): path.read_bytes()
            for path in static
            if path.is_relative_to(site / name)
        }
        for name in TAGS
    ]
    same = [name for name, data in of_editions[0].items() if of_editions[1].get(name) == data]
    assert not [name for name in same if not name.endswith("pygments.css")], "the chooser has other colours"


def test_pages_are_small(site):
    for page in html_pages(site):
        # Those of sliders stand in a script, for widgets.js.
        text = page.read_text(encoding="utf-8")
        pictures = {page.parent / unquote(name) for name in re.findall(r"_images/[\w.%-]+", text)}
        assert "dlinear" not in page.name or len(pictures) > 10
        assert page.stat().st_size + sum(path.stat().st_size for path in pictures) <= 800_000, page


@pytest.mark.parametrize("language", TAGS)
def test_pages_say_what_they_are(site, language):
    descriptions = set()
    for page in [path for path in html_pages(site) if path.parent.name == language]:
        head = soup(page).head
        said = {tag.get("property") or tag.get("name"): tag["content"] for tag in head.find_all("meta", content=True)}
        assert said["og:title"] and said["og:description"] == said["description"] != ""
        assert said["og:locale"] == {"en": "en_GB", "zh": "zh_CN"}[language]
        assert not re.search(r"[\\\\$<>]", said["description"]) and len(said["description"]) <= 160
        parts = head.title.text.split(" — ")
        assert len(parts) == len(set(parts)), "a title that says the same twice"
        descriptions.add(said["description"])
    assert len(descriptions) >= 6, "of each page its own"


def test_with_a_base_address_there_is_a_sitemap(demo_site, site):
    addresses = re.findall(r"<loc>(.*?)</loc>", (demo_site / "sitemap.xml").read_text(encoding="utf-8"))
    wanted = {"index.html"} | {f"{language}/{name}.html" for language in TAGS for name in ("index", "lone", "demo")}
    assert set(addresses) == {BASE + name for name in wanted}
    assert (site / "sitemap.xml").exists() == bool(OWN_BASE), "it needs full addresses"


def test_a_wrong_address_leads_back(demo_site, site):
    for folder, root in ((demo_site, "/book/"), (site, urlsplit(OWN_BASE).path or "/")):
        links = [link["href"] for link in soup(folder / "404.html").find_all("a")]
        assert links == [f"{root}en/index.html", f"{root}zh/index.html"]


@pytest.mark.parametrize("language", TAGS)
def test_with_an_address_pages_can_be_reported_and_edited(demo_site, site, language):
    links = [link["href"] for link in soup(demo_site / language / "demo.html").select(".repository-links a")]
    assert links == [f"{ADDRESS}/issues/new?title={language}/demo%3A%20", f"{ADDRESS}/edit/main/book/src/demo.md"]
    assert len(soup(site / language / "dlinear.html").select(".repository-links a")) == (2 if OWN_ADDRESS else 0)


@pytest.mark.parametrize("repository", ["https://github.com/Org/Repo", "https://github.com/Org/Repo.git"])
def test_a_repository_on_github_has_a_site_address(repository):
    assert default_base(repository) == "https://org.github.io/Repo/"
    assert default_base("") == default_base("https://example.org/a/b") == ""


@pytest.mark.parametrize("language", TAGS)
def test_equations_and_terms_lead_to_their_places(site, language):
    """That the places exist, test_every_local_address_leads_somewhere says."""
    page = soup(site / language / "dlinear.html")
    numbers = {int(link.text.strip("()")) for link in page.select("a.equation")}
    assert len(numbers) >= 10
    assert all(link["href"] == f"#eq-{link.text.strip('()')}" for link in page.select("a.equation"))
    terms = [link["href"] for link in page.select("a.term")]
    assert len(terms) == len(set(terms)) >= 20, "once a page"
    assert "glossary.html#term-moving-average" in terms


def test_headings_have_the_same_ids_in_both_languages(site):
    for name in REWRITTEN:
        english, chinese = (
            [part["id"] for part in soup(site / language / f"{name}.html").select(".bd-article section[id]")]
            for language in TAGS
        )
        assert english == chinese and len(english) == len(set(english)) > 1
        assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,24}", part) for part in english), english


@pytest.mark.parametrize("language", TAGS)
def test_a_slider_has_a_picture_without_javascript(site, language):
    page = soup(site / language / "dlinear.html")
    stills = page.select("noscript figure")
    assert stills and all(still.img["alt"] and "JavaScript" in still.figcaption.text for still in stills)


# How the address of a source looks, and what it opens.
SOURCES = (
    r"https://arxiv\.org/abs/\d{4}\.\d{4,5}",
    r"https://doi\.org/10\.\d{4,}/\S+",
    r"https://github\.com/[\w.-]+/[\w.-]+(/\S+)?",
    r"https://www\.jmlr\.org/papers/v\d+/\w+\.html",
    r"https://proceedings\.mlr\.press/v\d+/\w+\.html",
    r"https://creativecommons\.org/licenses/\S+",
)


@pytest.mark.parametrize("language", TAGS)
def test_links_to_sources_open_what_they_name(site, language):
    count = 0
    for path in [path for path in html_pages(site) if path.parent.name == language]:
        for link in soup(path).select(".bd-article a.external"):
            count += 1
            assert any(re.fullmatch(source, link["href"]) for source in SOURCES), f"{path}: {link['href']}"
            for named in re.findall(r"\d{4}\.\d{4,5}|10\.\d{4,}/\S+", link.text):
                assert named in link["href"], f"{link.text} opens {link['href']}"
    assert count >= 5


def test_the_citation_is_that_of_the_page():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    text = (ROOT / "book" / "src" / "start.md").read_text(encoding="utf-8")
    entries = [
        dict(re.findall(r"(\w+) += \{+(.*?)\}+,?$", entry, re.MULTILINE))
        for entry in re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    ]
    assert len(entries) == 2
    for entry in entries:
        assert entry["title"].startswith(cited["title"]) and entry["year"] == str(cited["year"])
        assert entry["author"] == cited["authors"][0]["name"] and cited["version"] in entry["note"]
        assert cited["license"].replace("-", " ", 2) == "CC BY 4.0" and "CC BY 4.0" in entry["note"]

"""The sites, built once: the book itself, and a small book that has addresses and every feature; and a browser."""

import fcntl
import functools
import os
import shutil
import sys
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from books import ADDRESS, BASE, PAGES, ROOT, STRICT, build, make_notebooks, run, small_book
from playwright.sync_api import Browser, Page, Request, sync_playwright

OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of a parallel run have in common."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Have the first worker that needs a folder make it; the others wait."""
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def assets(shared) -> None:
    """MathJax, fetched if it is not there yet."""

    def fetch(_: Path) -> None:
        done = run(sys.executable, ROOT / "book" / "tools" / "assets.py", cwd=ROOT)
        assert done.status == 0, done.output

    once(shared / "assets", fetch)


def build_strictly(root: Path) -> Callable[[Path], None]:
    """Build a book's site from clean; any warning is an error."""

    def make(folder: Path) -> None:
        done = build(root, folder, *STRICT)
        assert done.status == 0, done.output

    return make


@pytest.fixture(scope="session")
def sites(shared) -> Path:
    """The folder that holds both sites, so that one server serves them."""
    (shared / "sites").mkdir(exist_ok=True)
    return shared / "sites"


@pytest.fixture(scope="session")
def site(assets, sites) -> Path:
    """The book's own site."""
    return once(sites / "book", build_strictly(ROOT)) / "_build" / "html"


@pytest.fixture(scope="session")
def demo_root(assets, shared) -> Path:
    """The small book's root, with its notebooks made."""

    def make(folder: Path) -> None:
        root = small_book(folder, *(PAGES / f"{name}.md" for name in ("index", "lone", "demo")), url=ADDRESS, base=BASE)
        done = make_notebooks(root)
        assert done.status == 0, done.output

    return once(shared / "demo", make)


@pytest.fixture(scope="session")
def demo_site(demo_root, sites) -> Path:
    return once(sites / "demo", build_strictly(demo_root)) / "_build" / "html"


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        missing = "no Chromium here; on Debian: apt install chromium"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        """Say nothing: pytest shows what a test prints."""


@pytest.fixture(scope="session")
def addresses(site, demo_site, sites):
    """How the folder of both sites is reached: {"http": ..., "file": ...}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(sites)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"http": f"http://127.0.0.1:{server.server_port}", "file": sites.as_uri()}
    server.shutdown()


class Visit:
    """A browser window that notes whatever goes wrong, and every request."""

    def __init__(self, browser: Browser, root: str, size: dict[str, int], **options):
        self.root, self.problems, self.requests = root, [], []
        self.page: Page = browser.new_page(viewport=size, **options)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", self._note_failure)
        self.page.on(
            "response", lambda answer: answer.status < 400 or self.problems.append(f"{answer.status}: {answer.url}")
        )
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("console", lambda text: text.type != "error" or self.problems.append(f"console: {text.text}"))

    def _note_failure(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the next page was opened before the last one's icon had come
            self.problems.append(f"failed: {request.url}")

    def open(self, path: str) -> Page:
        """Go to a page of either site, and wait until its formulas are set."""
        self.page.goto(f"{self.root}/{path}", wait_until="load")
        self.page.evaluate("window.MathJax ? MathJax.startup.promise.then(() => null) : null")
        return self.page

    def outside_requests(self) -> list[str]:
        return [url for url in self.requests if not url.startswith((self.root, "data:", "blob:"))]


@pytest.fixture
def visit(browser, addresses):
    """visit(size, scheme="http", **options) opens a window, which is closed when the test is over."""
    visits = []

    def open_window(size: dict[str, int], scheme: str = "http", **options) -> Visit:
        visits.append(Visit(browser, addresses[scheme], size, **options))
        return visits[-1]

    yield open_window
    for window in visits:
        window.page.close()

"""The tool that fetches MathJax: all of the pinned files, or a folder that does not count as complete."""

import shutil
import zipfile
from pathlib import Path

import pytest
from books import ROOT, tool

INSIDE = "sphinx-mathjax-offline/static/mathjax/"


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """The tool in a book of its own; in place of pip it takes a small wheel."""
    shutil.copytree(ROOT / "book" / "tools", tmp_path / "book" / "tools")
    module = tool("assets", tmp_path)

    def download(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "small.whl", "w") as wheel:
            for name in ("tex-chtml-full.js", "tex-svg.js", "output/chtml/fonts/woff-v2/a.woff"):
                wheel.writestr(INSIDE + name, name)
        return folder / "small.whl"

    monkeypatch.setattr(module, "download", download)
    return module


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_site_needs_is_taken(assets):
    assert not assets.complete()
    assets.main()
    assert assets.complete()
    wanted = {"mathjax/tex-chtml-full.js", "mathjax/output/chtml/fonts/woff-v2/a.woff", "assets.txt"}
    assert files(assets.VENDOR) == wanted


def test_what_is_there_is_not_fetched_again(assets, monkeypatch):
    assets.main()
    monkeypatch.setattr(assets, "download", lambda folder: pytest.fail("fetched again"))
    assets.main()


def test_an_interrupted_run_does_not_count(assets, monkeypatch):
    assets.main()
    assets.PINS.write_text("other pins", encoding="utf-8")
    assert not assets.complete()
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.main()
    assert not assets.complete()
    assets.main()
    assert assets.complete() and "mathjax/tex-chtml-full.js" in files(assets.VENDOR)


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    shutil.copytree(ROOT / "book" / "tools", tmp_path / "book" / "tools")
    module = tool("assets", tmp_path)
    module.PINS.write_text("sphinx-mathjax-offline==0.0.2 --hash=sha256:" + "0" * 64, encoding="utf-8")
    with pytest.raises(SystemExit, match="MathJax could not be fetched"):
        module.main()
    assert not module.VENDOR.exists()


def test_the_site_holds_the_licence_of_what_it_serves():
    text = (ROOT / "book" / "assets" / "MathJax-LICENSE.txt").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0" in text

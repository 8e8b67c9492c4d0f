"""`jupyter-book build .` builds the page that chooses a language, and each language as a Sphinx project of its own.

_toc.yml lists the pages of all editions. Those of the edition `zh` lie in book/zh and become _build/html/zh; the first
one listed is its front page. Its settings are those of _config.yml with the ones under `editions: zh` on top.

A project of its own has its own language, sidebar, search and page order, which one project for both languages would
mix. The child build is the same command line once more, told by the environment which edition it is; so every option
reaches it by itself.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from head import default_base, write_not_found, write_sitemap
from pack import pack
from sphinx.application import ENV_PICKLE_FILENAME, Sphinx
from sphinx.errors import ConfigError

VARIABLE = "BOOK_EDITION"


def setup(app: Sphinx) -> dict:
    """Comes first in the list of extensions: it decides what the others see."""
    settings, root, edition = app.config.overrides, app.confdir, os.environ.get(VARIABLE)
    editions = settings.pop("editions")
    toc = yaml.safe_load(Path(settings["external_toc_path"]).read_text(encoding="utf-8"))
    add_repository_buttons(settings["html_theme_options"])
    settings["html_baseurl"] = settings.get("html_baseurl") or default_base(
        settings["html_theme_options"]["repository_url"]
    )
    base = settings["html_baseurl"]
    if edition:
        use_edition(app, edition, editions[edition])
        toc = toc_of_edition(toc, edition)
    else:
        toc = toc_of_chooser(toc, editions)
        app.connect("build-finished", lambda app, error: error or build_editions(app, editions, base))
    # Sphinx reads pages below srcdir only. The paths in _config.yml are relative to confdir, which stays at the root.
    app.srcdir = root / "book" / edition if edition else root / "book"
    settings["external_toc_path"] = write_toc(toc, Path(app.outdir).parent)
    app.connect("build-finished", forget_after_warning)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def add_repository_buttons(theme: dict) -> None:
    """With an address, a button that opens the repository; without one the theme cannot make "open in Colab" either."""
    theme["use_repository_button"] = bool(theme["repository_url"])
    if not theme["repository_url"]:
        theme["launch_buttons"] = {}


def use_edition(app: Sphinx, edition: str, own_settings: dict) -> None:
    """Lay an edition's own settings over the shared ones."""
    settings = app.config.overrides
    for name, value in own_settings.items():
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    settings["html_theme_options"]["path_to_docs"] = f"book/{edition}"
    if settings.get("html_baseurl"):
        settings["html_baseurl"] = f"{settings['html_baseurl'].rstrip('/')}/{edition}/"
    # Sphinx reads the language before it loads extensions; so have it read again.
    app.config.language = settings["language"]
    app._init_i18n()


def toc_of_chooser(toc: dict, editions: dict) -> dict:
    """The chooser's own table of contents: itself. Raises ConfigError for a page that belongs to no edition."""
    for part in toc["parts"]:
        for chapter in part["chapters"]:
            if not str(chapter.get("file")).startswith(tuple(f"book/{edition}/" for edition in editions)):
                raise ConfigError(
                    f"_toc.yml: every chapter lies in book/ and one of {', '.join(editions)}; got {chapter}"
                )
    return {"format": toc["format"], "root": toc["root"].removeprefix("book/")}


def toc_of_edition(toc: dict, edition: str) -> dict:
    """The parts of one edition, with file names relative to its folder; its first page becomes the root."""
    parts = [{**part, "chapters": entries_below(part["chapters"], f"book/{edition}/")} for part in toc["parts"]]
    parts = [part for part in parts if part["chapters"]]
    front = parts[0]["chapters"].pop(0)
    return {"format": toc["format"], "root": front["file"], "parts": [part for part in parts if part["chapters"]]}


def entries_below(entries: list[dict], folder: str) -> list[dict]:
    """The entries of a table of contents that lie in a folder, with file names relative to it."""
    kept = [
        {**entry, "file": entry["file"].removeprefix(folder)} for entry in entries if entry["file"].startswith(folder)
    ]
    for entry in kept:
        if "sections" in entry:
            entry["sections"] = entries_below(entry["sections"], folder)
    return kept


def write_toc(toc: dict, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "_toc.yml"
    path.write_text(yaml.safe_dump(toc, allow_unicode=True), encoding="utf-8")
    return path.as_posix()


def build_editions(app: Sphinx, editions: dict, base: str) -> None:
    """Run this very command again for every edition, all at the same time, and make one site of them.

    The files that the pages' download buttons give are made meanwhile.

    base: the site's address, or "" while it has none.
    """
    # They build beside the site and not in it: MyST-NB leaves files of its own next to the pages.
    folders = {edition: Path(app.outdir).parent / "editions" / edition for edition in editions}
    runs = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--path-output", str(folder)],
            stdout=subprocess.DEVNULL,  # warnings go to stderr, and are seen
            env={**os.environ, VARIABLE: edition},
        )
        for edition, folder in folders.items()
    ]
    if app.builder.name == "html":
        tool = app.confdir / "book" / "tools" / "portable.py"
        command = [sys.executable, str(tool), "--out", str(Path(app.outdir) / "download")]
        runs.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    statuses = [run.wait() for run in runs]
    if any(statuses):
        app.statuscode = 1
    if app.builder.name == "html":
        for edition, folder in folders.items():
            shutil.copytree(folder / "_build" / "html", Path(app.outdir) / edition, dirs_exist_ok=True)
        pack(Path(app.outdir), list(editions))
        write_not_found(Path(app.outdir), base)
        if base:
            write_sitemap(Path(app.outdir), base)


def forget_after_warning(app: Sphinx, error: Exception | None) -> None:
    """Read every page again next time: Sphinx is silent about a page that it does not read, and the warning lost."""
    if app._warncount:
        Path(app.doctreedir, ENV_PICKLE_FILENAME).unlink(missing_ok=True)

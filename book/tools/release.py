"""Before the tag of a version: write the book's address, and the day, wherever they are read.

    .venv/bin/python book/tools/release.py https://github.com/ORG/REPO

The book reads the address in _config.yml, a package index in pyproject.toml, GitHub and reference managers in
CITATION.cff; none of these files can point at another. tests/test_publishing.py says whether they agree. A version that
has a day already keeps it: then the address alone is new.
"""

import argparse
import datetime
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = r"^\[project\.urls\]\n(?:.+\n)+\n"
NEXT = "\n[project.optional-dependencies]\n"


def with_address(config: str, project: str, citation: str, address: str) -> tuple[str, str, str]:
    """The texts of _config.yml, pyproject.toml and CITATION.cff with this address instead of another, or of none."""
    config = re.sub(r'^(repository: \{url: )"[^"]*"', rf'\1"{address}"', config, flags=re.M)
    urls = f'\n[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
    project = re.sub(TABLE, "", project, flags=re.M).replace(NEXT, urls + NEXT)
    citation = re.sub(r"^ *(repository-code|url): .*\n", "", citation, flags=re.M)
    citation = citation.replace("preferred-citation:\n", f'repository-code: "{address}"\npreferred-citation:\n')
    return config, project, f'{citation.rstrip()}\n  url: "{address}"\n'


def with_day(changelog: str, citation: str, version: str, day: datetime.date) -> tuple[str, str]:
    """The texts of CHANGELOG.md and CITATION.cff with the day of this version, unless it has one.

    Raises ValueError if CHANGELOG.md does not have the version.
    """
    heading = re.search(rf"^## {re.escape(version)} - (.+)$", changelog, re.M)
    if heading is None:
        raise ValueError(f"CHANGELOG.md has no heading '## {version} - Unreleased', the version in pyproject.toml")
    if heading[1] != "Unreleased":
        return changelog, citation
    changelog = changelog.replace(heading[0], f"## {version} - {day}")
    citation = re.sub(r"^date-released: .*\n", "", citation, flags=re.M)
    citation = re.sub(r"^version: ", f'date-released: "{day}"\nversion: ', citation, flags=re.M)
    return changelog, re.sub(r"^  year: .*$", f"  year: {day.year}", citation, flags=re.M)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", metavar="ADDRESS", help="such as https://github.com/ORG/REPO")
    address = parser.parse_args(arguments).address.rstrip("/")
    if not re.fullmatch(r"https://[\w.-]+/[\w./~-]+", address) or address.endswith(".git"):
        sys.exit(f"The address must be a web page such as https://github.com/ORG/REPO; got {address!r}")

    names = ("_config.yml", "pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    config, project, citation, changelog = ((ROOT / name).read_text("utf-8") for name in names)
    version = tomllib.loads(project)["project"]["version"]
    config, project, citation = with_address(config, project, citation, address)
    try:
        changelog, citation = with_day(changelog, citation, version, datetime.datetime.now(datetime.UTC).date())
    except ValueError as error:
        sys.exit(str(error))
    for name, text in zip(names, (config, project, citation, changelog), strict=True):
        (ROOT / name).write_text(text, "utf-8")
    print(f"{', '.join(names)} are written. Next: make notebooks, commit, and the tag v{version}")


if __name__ == "__main__":
    main()

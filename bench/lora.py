"""A training step of LoRA beside PEFT's, and beside training all weights: time and memory.

The model has the sizes of SmolLM2-135M and random weights, which change neither. python -m bench.lora prints it.
"""

import json
import statistics
from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm

from bench.generation import peer
from bench.measuring import PROCESSES, THREADS, apart, milliseconds, peak, spread
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sft import add_lora, documented_loss
from mini_impl.finetuning.smollm2 import SETTINGS

SEQUENCES, TOKENS, RANK = 4, 48, 8
VARIANTS = ("LoRA", "PEFT's LoRA", "all weights")
ROUNDS = 3  # in a process


def ours(variant: str) -> nn.Module:
    torch.manual_seed(0)
    model = LanguageModel(**SETTINGS)
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
    whole = torch.randint(SETTINGS["vocab_size"], (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(0))
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
    """Milliseconds a step of each variant; ours as a multiple of PEFT's; peak memory of each."""
    first = {variant: training(variant)() for variant in VARIANTS}  # the adapters begin as nothing: one loss for all
    turns = [apart(measure_times) for _ in tqdm(range(PROCESSES), desc="LoRA", disable=None)]
    ratios = [each["LoRA"] / each["PEFT's LoRA"] for each in turns]
    return {
        "what": f"training step, {SEQUENCES} sequences of {TOKENS} tokens, sizes of SmolLM2, rank {RANK}, "
        f"{THREADS} threads",
        "largest difference of the losses": max(first.values()) - min(first.values()),
        "parameters trained": {variant: count(variant) for variant in ("LoRA", "all weights")},
        "milliseconds, median": {variant: statistics.median(each[variant] for each in turns) for variant in VARIANTS},
        "ratio to PEFT": spread(ratios),
        "peak memory, MiB": {variant: apart(measure_memory, variant) for variant in VARIANTS},
    }


def count(variant: str) -> int:
    return sum(parameter.numel() for parameter in ours(variant).parameters() if parameter.requires_grad)


def measure_times() -> dict[str, float]:
    """Milliseconds of a step of each variant, the median of turns."""
    steps = {variant: training(variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(-1, ROUNDS):
        for variant, step in steps.items():
            time = milliseconds(step, 1)
            if turn >= 0:  # the first one warms up
                times[variant].append(time)
    return {variant: statistics.median(values) for variant, values in times.items()}


def measure_memory(variant: str) -> float:
    """MiB that a few steps need, beside the weights: activations, gradients, Adam's memory."""
    step = training(variant)
    return peak(lambda: milliseconds(step, 2))


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps(measure(), indent=1))

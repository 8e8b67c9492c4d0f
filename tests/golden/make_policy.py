"""Make tests/golden/policy.json and variants.json: losses and gradients of TRL and of Liger Kernel (make golden).

TRL has no function for its loss: a method of its trainer is called here on a stand-in that returns the given
log-probabilities where the trainer would run a model. Liger's is a chunked head and loss in one.
Its "token" loss is TRL's "bnpo"; "dapo" divides by the tokens of the whole generation batch, here given in two parts.
policy.json holds what the package has, variants.json what a reader writes with it.
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from trl import GRPOTrainer

LOW, HIGH, MAX_LENGTH = 0.2, 0.28, 9


class OneProcess:
    """The accelerator of a run in one process."""

    num_processes, sync_gradients = 1, True

    def gather(self, value):
        return value

    def reduce(self, value, reduction="sum"):
        return value


def trl_loss(
    case: dict,
    logprobs: torch.Tensor,
    rows: slice,
    tokens: torch.Tensor,
    entropies: torch.Tensor | None = None,
    arguments: dict | None = None,
    **settings,
) -> torch.Tensor:
    """GRPOTrainer's loss for some of the sequences of a case. tokens: how many the whole generation batch has.

    arguments, settings: what else its `args`, and the trainer itself, are to have.
    """
    part = logprobs[rows]
    entropies = torch.zeros_like(part) if entropies is None else entropies[rows]
    batch, time = part.shape
    ids = torch.zeros(batch, time, dtype=torch.long)
    usual = {
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "importance_sampling_level": "token",
        "max_completion_length": MAX_LENGTH,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
    }
    trainer = SimpleNamespace(
        **{**usual, **settings},
        loss_type=case["loss_type"],
        beta=case["beta"],
        model=SimpleNamespace(training=False),
        accelerator=OneProcess(),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=SimpleNamespace(
            **{
                "delta": None,
                "use_bias_correction_kl": case["weighted"],
                "steps_per_generation": 1,
                **(arguments or {}),
            }
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (part, entropies, None),
    )
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones(batch, 1),
        "completion_ids": ids,
        "completion_mask": tensor(case["mask"])[rows],
        "advantages": tensor(case["advantages"])[rows],
        "old_per_token_logps": tensor(case["old_logprobs"])[rows],
        "ref_per_token_logps": tensor(case["ref_logprobs"])[rows],
        "num_items_in_batch": tokens,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def numbers(generator: torch.Generator, sequences: int, time: int) -> dict:
    """Log-probabilities that lie so far apart that both clips hold somewhere, advantages, and a ragged mask."""
    old = -3 * torch.rand(sequences, time, generator=generator, dtype=torch.float64) - 0.5
    near = [old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    lengths = torch.randint(1, time + 1, (sequences, 1), generator=generator)
    advantages = torch.randn(sequences, generator=generator, dtype=torch.float64)
    return {
        "logprobs": near[0].clamp(max=-0.01).round(decimals=3).tolist(),
        "old_logprobs": old.round(decimals=3).tolist(),
        "ref_logprobs": near[1].clamp(max=-0.01).round(decimals=3).tolist(),
        "advantages": advantages.round(decimals=3).tolist(),
        "mask": (torch.arange(time) < lengths).long().tolist(),
    }


def trl_case(seed: int, loss_type: str, beta: float, weighted: bool) -> dict:
    """TRL's loss and its gradient by the log-probabilities."""
    case = {"loss_type": loss_type, "beta": beta, "weighted": weighted}
    case |= numbers(torch.Generator().manual_seed(seed), sequences=6, time=7)
    logprobs = tensor(case["logprobs"]).requires_grad_()
    tokens = tensor(case["mask"]).sum()
    parts = (slice(0, 2), slice(2, 6)) if loss_type == "dapo" else (slice(0, 6),)
    loss = sum(trl_loss(case, logprobs, rows, tokens) for rows in parts)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return case | {"loss": loss.item(), "gradient": gradient.tolist()}


# Methods that differ from GRPO in a line or two: {name: (TRL's loss_type, its arguments, other settings)}.
VARIANTS = {
    "gspo": ("grpo", {}, {"importance_sampling_level": "sequence"}),
    "cispo": ("cispo", {}, {"epsilon_high": 1.28}),  # the largest ratio itself
    "sapo": ("sapo", {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25}, {}),  # TRL rounds them to float32
    "delta": ("grpo", {"delta": 1.5}, {}),
    "entropy bonus": (
        "bnpo",
        {},
        {"_entropy_bonus_enabled": True, "use_adaptive_entropy": False, "entropy_coef": 0.1},
    ),
}


def variant_case(seed: int, name: str) -> dict:
    """TRL's loss and its gradient by the logits of every token."""
    kind, arguments, settings = VARIANTS[name]
    case = {"name": name, "loss_type": kind, "beta": 0.0, "weighted": False, **arguments, **settings}
    generator = torch.Generator().manual_seed(seed)
    case |= numbers(generator, sequences=6, time=7)
    logits = 2 * torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)
    tokens = torch.randint(5, (6, 7), generator=generator)
    logits = logits.round(decimals=3).requires_grad_()
    logs = logits.log_softmax(-1)
    logprobs = logs.gather(-1, tokens[..., None])[..., 0]
    noise = 0.5 * torch.randn(logprobs.shape, generator=generator, dtype=torch.float64)
    case["old_logprobs"] = (logprobs.detach() + noise).clamp(max=-0.01).round(decimals=3).tolist()
    del case["logprobs"], case["ref_logprobs"]
    counted = tensor(case["mask"]).sum()
    entropies = -(logs.exp() * logs).sum(-1)
    given = {**case, "ref_logprobs": case["old_logprobs"]}
    loss = trl_loss(given, logprobs, slice(0, 6), counted, entropies, arguments, **settings)
    (gradient,) = torch.autograd.grad(loss, logits)
    return case | {
        "logits": logits.tolist(),
        "tokens": tokens.tolist(),
        "loss": loss.item(),
        "gradient": gradient.tolist(),
    }


def liger_case(seed: int, loss_type: str, beta: float, weighted: bool, temperature: float) -> dict:
    """Liger's loss and its gradients by hidden states and head."""
    generator = torch.Generator().manual_seed(seed)
    sequences, time, width, vocabulary = 4, 5, 6, 11
    case = {"loss_type": loss_type, "beta": beta, "weighted": weighted, "temperature": temperature}
    hidden = torch.randn(sequences, time, width, generator=generator, dtype=torch.float64).round(decimals=3)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).mul(0.5).round(decimals=3)
    tokens = torch.randint(vocabulary, (sequences, time), generator=generator)
    case |= numbers(generator, sequences, time)
    exact = (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    for name in ("old_logprobs", "ref_logprobs"):  # near to those of the head
        noise = 0.3 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        case[name] = (exact + noise).clamp(max=-0.01).round(decimals=3).tolist()
    del case["logprobs"]
    loss_function = LigerFusedLinearGRPOLoss(
        beta=beta,
        compiled=False,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        temperature=temperature,
        use_bias_correction_kl=weighted,
    )
    hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = loss_function(
        hidden,
        weight,
        tokens,
        tensor(case["mask"]),
        tensor(case["advantages"]),
        ref_per_token_logps=tensor(case["ref_logprobs"]),
        old_per_token_logps=tensor(case["old_logprobs"]),
    )
    hidden_gradient, weight_gradient = torch.autograd.grad(loss, (hidden, weight))
    return case | {
        "hidden": hidden.tolist(),
        "weight": weight.tolist(),
        "tokens": tokens.tolist(),
        "loss": loss.item(),
        "hidden_gradient": hidden_gradient.tolist(),
        "weight_gradient": weight_gradient.tolist(),
    }


if __name__ == "__main__":
    kinds = ("grpo", "bnpo", "dr_grpo", "dapo")
    penalties = ((0.0, False), (0.04, False), (0.5, True))
    golden = {
        "made by": "tests/golden/make_policy.py",
        "versions": {name: version(name) for name in ("trl", "liger-kernel", "torch")},
        "clip": [LOW, HIGH],
        "max_length": MAX_LENGTH,
        "trl": [
            trl_case(10 * i + j, kind, *penalty) for i, kind in enumerate(kinds) for j, penalty in enumerate(penalties)
        ],
        "liger": [
            liger_case(i, kind, *penalties[i % 3], temperature=(1.0, 0.7)[i % 2]) for i, kind in enumerate(kinds)
        ],
    }
    Path(__file__).with_name("policy.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
    variants = {
        "made by": "tests/golden/make_policy.py",
        "versions": {name: version(name) for name in ("trl", "torch")},
        "clip": [LOW, HIGH],
        "cases": [variant_case(seed, name) for seed, name in enumerate(VARIANTS)],
    }
    Path(__file__).with_name("variants.json").write_text(json.dumps(variants) + "\n", encoding="utf-8")

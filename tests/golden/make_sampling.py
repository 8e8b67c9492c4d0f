"""Make tests/golden/sampling.json: greedy answers of transformers, and what its top-k and top-p leave (make golden)."""

import json
from pathlib import Path

import torch
import transformers
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bench.weights import llama

VOCABULARY, STOP = 11, 7


def random_llama(seed: int, **sizes: int) -> transformers.LlamaForCausalLM:
    """A small one with random weights of three decimals, in float64."""
    model = llama(VOCABULARY, **sizes, stop=STOP).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.6 * torch.randn_like(parameter)).copy_(parameter.round(decimals=3))
    return model


def greedy(seed: int, prompts: list[list[int]], max_tokens: int, **sizes: int) -> dict:
    """Greedy completions of prompts padded on the left, and the log-probability of each of their tokens."""
    model = random_llama(seed, **sizes)
    time = max(map(len, prompts))
    tokens = torch.tensor([[STOP] * (time - len(ids)) + ids for ids in prompts])
    present = torch.tensor([[0] * (time - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        output = model.generate(
            tokens,
            attention_mask=present,
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
    completion = output.sequences[:, time:]
    logprobs = torch.stack(output.logits, 1).log_softmax(-1).gather(-1, completion[..., None])[..., 0]
    weights = {name: value.tolist() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    return {
        "model": {"vocabulary": VOCABULARY, **sizes},
        "weights": weights,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "stop": STOP,
        "completion": completion.tolist(),
        "logprobs": logprobs.tolist(),
    }


def truncated(temperature: float, top_k: int | None, top_p: float | None) -> dict:
    """The distributions that are left of random logits."""
    torch.manual_seed(0)
    logits = (2 * torch.randn(12, VOCABULARY, dtype=torch.float64)).round(decimals=3)
    left = TemperatureLogitsWarper(temperature)(None, logits)
    left = left if top_k is None else TopKLogitsWarper(top_k)(None, left)
    left = left if top_p is None else TopPLogitsWarper(top_p)(None, left)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {"settings": settings, "logits": logits.tolist(), "probabilities": left.softmax(-1).tolist()}


if __name__ == "__main__":
    prompts = [[1, 2, 3, 4, 5], [6], [10, 0], [8, 8, 8], [2, 9, 1, 0]]
    sizes = {"width": 8, "layers": 2, "heads": 2, "key_value_heads": 1, "feed_forward_width": 12}
    golden = {
        "made by": "tests/golden/make_sampling.py",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "greedy": [
            greedy(0, prompts, 12, **sizes),
            greedy(1, prompts[::-1], 30, **{**sizes, "key_value_heads": 2, "layers": 3}),
            greedy(2, prompts, 20, **{**sizes, "width": 16, "heads": 4, "key_value_heads": 2}),
        ],
        "truncated": [
            truncated(*settings)
            for settings in [(0.7, None, None), (1.0, 3, None), (1.5, None, 0.8), (0.8, 5, 0.6), (1.0, None, 0.05)]
        ],
    }
    Path(__file__).with_name("sampling.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")

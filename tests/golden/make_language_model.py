"""Make tests/golden/language_model.json: the logits of transformers' Llama with given weights (make golden)."""

import json
from pathlib import Path

import torch
import transformers

from bench.weights import llama


def case(lengths: list[int], positions: list[int], rope_base: float, epsilon: float, **sizes: int) -> dict:
    """Random weights and rows of random tokens, padded on the left, and the peer's logits at some positions.

    The peer's positions count from the first token of each row, as its `generate` counts them.
    """
    torch.manual_seed(sizes["width"])
    peer = llama(*sizes.values(), rope_base, epsilon).double()
    with torch.no_grad():
        for parameter in peer.parameters():  # norms too: at their start two of them could be swapped unseen
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.round(decimals=2))
        time = max(lengths)
        present = torch.arange(time) >= time - torch.tensor(lengths)[:, None]  # [batch, time]
        tokens = torch.randint(sizes["vocabulary"], present.shape)
        counted = (present.long().cumsum(1) - 1).clamp(min=0)
        logits = peer(tokens, attention_mask=present.long(), position_ids=counted).logits[:, positions]
    return {
        "model": {"rope_base": rope_base, "epsilon": epsilon, **sizes},
        "weights": {name: value.tolist() for name, value in peer.state_dict().items() if name != "lm_head.weight"},
        "lengths": lengths,
        "tokens": tokens.tolist(),
        "positions": positions,
        "logits": [[[float(f"{x:.8g}") for x in row] for row in rows] for rows in logits.tolist()],
    }


if __name__ == "__main__":
    sizes = {"vocabulary": 13, "width": 16, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward_width": 20}
    one_key = {"vocabulary": 7, "width": 12, "layers": 3, "heads": 3, "key_value_heads": 1, "feed_forward_width": 10}
    own_keys = {"vocabulary": 9, "width": 8, "layers": 2, "heads": 2, "key_value_heads": 2, "feed_forward_width": 12}
    golden = {
        "made by": "tests/golden/make_language_model.py",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "cases": [
            case([9, 4, 1], list(range(-9, 0)), 10000.0, 1e-5, **sizes),
            case([12, 12], list(range(12)), 50.0, 1e-2, **one_key),
            case([600, 350], [-600, -300, -100, -2, -1], 100000.0, 1e-6, **own_keys),
        ],
    }
    Path(__file__).with_name("language_model.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")

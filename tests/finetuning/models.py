"""Language models for tests: with random weights, or with those of golden numbers."""

import torch
from torch import Tensor

from mini_impl.finetuning.language_model import LanguageModel, hugging_face_name

SMALL = {"vocab_size": 11, "width": 16, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward_width": 10}


def small(seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 0.3, **changes) -> LanguageModel:
    """A model whose weights are all random, those of the normalisations too."""
    torch.manual_seed(seed)
    model = LanguageModel(**{**SMALL, **changes}).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def golden_model(sizes: dict, weights: dict[str, list], dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The Llama that a script in tests/golden stored, as ours."""
    sizes = {"vocab_size" if name == "vocabulary" else name: size for name, size in sizes.items()}
    model = LanguageModel(**sizes).to(dtype).eval()
    names = {name: hugging_face_name(name) for name in model.state_dict()}
    assert set(names.values()) == set(weights)
    model.load_state_dict({name: torch.tensor(weights[theirs]) for name, theirs in names.items()})
    return model


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)

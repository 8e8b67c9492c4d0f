"""What forecasters are compared with: a transformer's parts with numpy alone, and finite differences."""

import math

import numpy as np
import torch


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def positions(length, width):
    """sin(t / 10000^(2i/width)) in feature 2i, cos of the same in feature 2i + 1: [length, width]."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(width) // 2 * 2 / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles))


class Parts:
    """The parts of a model, called by their names."""

    def __init__(self, model):
        self.weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def norm(self, name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def feed_forward(self, name, x):
        return self.linear(f"{name}.3", gelu(self.linear(f"{name}.0", x)))

    def attend(self, name, heads, tokens, context, there=True):
        """(mixed [query, width], map [head, query, key]) of one window, head by head; there: which keys count."""
        query = np.split(self.linear(f"{name}projection", tokens), 3, -1)[0]
        _, key, value = np.split(self.linear(f"{name}projection", context), 3, -1)
        maps, mixed = [], []
        for q, k, v in zip(*(np.split(part, heads, -1) for part in (query, key, value)), strict=True):
            scores = there * np.exp(q @ k.T / q.shape[-1] ** 0.5)
            maps.append(scores / scores.sum(-1, keepdims=True))
            mixed.append(maps[-1] @ v)
        return self.linear(f"{name}output", np.concatenate(mixed, -1)), np.stack(maps)


def gradients_as_finite_differences(model, names, loss, *inputs, more=lambda: ()):
    """Whether those of loss(model(*inputs, *more())) are, by the inputs and by the weights of these names."""
    weights = [model.get_parameter(name).detach().clone() for name in names]

    def run(*values):
        replaced = dict(zip(names, values[len(inputs) :], strict=True))
        return loss(torch.func.functional_call(model, replaced, (*values[: len(inputs)], *more())))

    return torch.autograd.gradcheck(run, [value.requires_grad_() for value in (*inputs, *weights)])

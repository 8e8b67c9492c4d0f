"""Methods that are not in the package, each written in a few lines on what is in policy.py, against TRL's numbers.

Golden numbers made by tests/golden/make_policy.py: TRL's loss, and its gradient by the logits of every token.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from mini_impl.finetuning.policy import reduce, token_logprobs, token_loss, token_weights
from tests.tensors import same

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "variants.json").read_text())
LOW, HIGH = GOLDEN["clip"]


def gspo(logprobs, old_logprobs, advantages, mask):
    """One ratio for a whole answer: the geometric mean of those of its tokens. Zheng et al., 2025."""
    log_ratio = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)  # [sequence, 1]
    per_token = token_loss(log_ratio.expand_as(logprobs), torch.zeros_like(logprobs), advantages, LOW, HIGH)
    return reduce(per_token, mask, by="sequence")


def cispo(logprobs, old_logprobs, advantages, mask, largest=1.28):
    """REINFORCE, each token weighed by its ratio: clipped, and a constant, so all have a gradient. MiniMax, 2025."""
    ratio = (logprobs - old_logprobs).exp().clamp(max=largest).detach()  # [sequence, token]
    return -(token_weights(mask, "token", dtype=logprobs.dtype) * ratio * advantages[:, None] * logprobs).sum()


def sapo(logprobs, old_logprobs, advantages, mask, gain=1.0, loss=1.25):
    """A gate in place of the clip: sigmoid(t (ratio - 1)) 4 / t, whose slope is 1 at ratio 1. Gao et al., 2025."""
    t = torch.where(advantages > 0, gain, loss)[:, None]  # [sequence, 1]
    gate = (t * ((logprobs - old_logprobs).exp() - 1)).sigmoid() * 4 / t  # [sequence, token]
    return reduce(-gate * advantages[:, None], mask, by="sequence")


def delta(logprobs, old_logprobs, advantages, mask, largest=1.5):
    """Two-sided: where A < 0 the clip leaves a large ratio as it is; here it stops at delta. INTELLECT-2, 2025."""
    log_ratio = (logprobs - old_logprobs).clamp(max=math.log(largest))  # [sequence, token]
    return reduce(token_loss(log_ratio, torch.zeros_like(log_ratio), advantages, LOW, HIGH), mask, by="sequence")


def entropy_bonus(logits, logprobs, old_logprobs, advantages, mask, weight=0.1):
    """The published loss, less the mean entropy of the next token: what explores is rewarded."""
    logs = logits.log_softmax(-1)  # [sequence, token, vocabulary]
    entropy = -(logs.exp() * logs).sum(-1)  # [sequence, token]
    return reduce(token_loss(logprobs, old_logprobs, advantages, LOW, HIGH) - weight * entropy, mask, by="token")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_a_variant_is_that_of_trl(case):
    logits, old_logprobs, advantages = (
        torch.tensor(case[name], dtype=torch.float64) for name in ("logits", "old_logprobs", "advantages")
    )
    mask = torch.tensor(case["mask"])
    logprobs = token_logprobs(logits.requires_grad_(), torch.tensor(case["tokens"]))  # [sequence, token]
    given = (logprobs, old_logprobs, advantages, mask)
    if case["name"] == "entropy bonus":
        loss = entropy_bonus(logits, *given)
    else:
        loss = {"gspo": gspo, "cispo": cispo, "sapo": sapo, "delta": delta}[case["name"]](*given)
    same(loss.item(), case["loss"])
    same(torch.autograd.grad(loss, logits)[0], torch.tensor(case["gradient"], dtype=torch.float64))


def test_the_cases_tell_the_variants_from_the_published_loss():
    """In each case the plain clipped loss is another: the numbers do reach what is different."""
    for case in GOLDEN["cases"]:
        logprobs = token_logprobs(torch.tensor(case["logits"], dtype=torch.float64), torch.tensor(case["tokens"]))
        old_logprobs, advantages = (
            torch.tensor(case[name], dtype=torch.float64) for name in ("old_logprobs", "advantages")
        )
        plain = token_loss(logprobs, old_logprobs, advantages, LOW, HIGH)
        by = "token" if case["loss_type"] in ("bnpo", "cispo") else "sequence"
        assert abs(reduce(plain, torch.tensor(case["mask"]), by=by).item() - case["loss"]) > 1e-3

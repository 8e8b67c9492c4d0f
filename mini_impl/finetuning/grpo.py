"""GRPO: several answers to one prompt, each judged by its reward beside the others'.

The documented system makes a target distribution of the rewards and has the new policy imitate it; the published one
follows the policy gradient with the group's mean as baseline. As the temperature grows the first, less its mean
weight, becomes the second.
Sources: the documented system "GRPO"; the paper "DeepSeekMath", Shao et al., 2024; Liu et al., "Understanding
R1-Zero-Like Training", 2025 (Dr. GRPO).
"""

import math

import torch
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning.policy import _check_answers, _check_reduction, _clipped_loss, _kl_k3, _token_weights
from mini_impl.losses import LossTerms, NonFiniteLoss

# --- the documented method --------------------------------------------------------------------------------------------


def sequence_logprobs(logprobs: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """log pi(x_i) = sum over the answer's tokens of log pi(token | all before it), by prompt: [prompt, group].

    logprobs: [prompt x group, token], the answers to one prompt together; of the old policy, those that were recorded
    when it sampled. mask: same shape, 1 where there is a token of the answer. group_size: answers a prompt.
    Raises TypeError, ValueError, NonFiniteLoss. Source: documented step 1.
    """
    kept = checks.token_mask(mask, logprobs=logprobs)
    checks.divides("group_size", group_size, "the number of sequences", len(logprobs))
    sums = logprobs.where(kept, 0).sum(1)  # [prompt x group]
    finite = checks.finite("the sum of logprobs", sums, NonFiniteLoss)
    checks.look(*checks.counted(mask), checks.logprobs("logprobs", logprobs, kept, NonFiniteLoss), finite)
    return sums.view(-1, group_size)  # 1. record the probability of every sampled answer


def first_of_each(completion: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """Which answers of a group were not there before, bool [prompt, group]: what makes the group a set.

    completion: ids [prompt x group, token]. mask: bool or 0 and 1, the same shape, 1 where there is a token of the
    answer. group_size: answers a prompt. Raises TypeError, ValueError.
    """
    checks.token_ids("completion", completion, "sequence", "token")
    kept = checks.token_mask(mask, completion=completion.to(torch.get_default_dtype()))
    checks.divides("group_size", group_size, "the number of sequences", len(completion))
    answers = completion.long().masked_fill(~kept, -1).unflatten(0, (-1, group_size))  # [prompt, group, token]
    same = (answers[:, :, None] == answers[:, None]).all(-1)  # [prompt, group, group]
    return ~same.tril(-1).any(-1)  # none before it is the same


def target_distribution(
    old_logprobs: Tensor,
    rewards: Tensor,
    temperature: float,
    weights: str = "documented",
    distinct: Tensor | None = None,
) -> Tensor:
    """q_i over the answers of a group, [prompt, group], rows with sum 1.

    weights "documented": q_i = pi_old(x_i) e^{r_i / beta} / Z, the law that is meant if the group is every answer there
    is. "corrected": q_i = e^{r_i / beta} / Z, for answers that were sampled from pi_old: the likely ones are there more
    often already, and weighed by pi_old they would count twice (q ~ pi_old^2 e^{r / beta} in the limit).
    old_logprobs: log pi_old of whole answers. rewards: r. temperature: beta, above 0; the smaller, the more the best
    answer takes. Equal rewards express no preference: q is then pi_old over the group, or 1 / group if corrected.
    distinct: bool [prompt, group], of `first_of_each`: the documented sum runs over a set of answers, so that one
    sampled again has q = 0. None counts it as often as it was sampled: the group alone does not say which answers are
    the same, and the corrected weights need them all, as how often one came stands for its pi_old.
    Computed in logs, so that answers of probability e^-500 have their share. Carries no gradient.
    Raises TypeError, ValueError. Source: documented step 2.
    """
    _check_groups(rewards, temperature, weights, distinct, old_logprobs=old_logprobs)
    return _target(old_logprobs, rewards, temperature, weights, distinct).exp()


def _target(old_logprobs: Tensor, rewards: Tensor, temperature: float, weights: str, distinct: Tensor | None) -> Tensor:
    """log q of target_distribution."""
    scores = rewards.detach() / temperature
    if weights == "documented":
        scores = old_logprobs.detach() + scores
    if distinct is not None:
        scores = scores.masked_fill(~distinct, -math.inf)
    return scores.log_softmax(1)


def _check_groups(rewards, temperature, weights, distinct, **logprobs) -> None:
    checks.groups("rewards", rewards, **logprobs)
    checks.positive(temperature=temperature)
    checks.choice("weights", weights, ("documented", "corrected"))
    if distinct is not None:
        checks.bool_mask("distinct", distinct, "[prompt, group]", rewards.shape)
    checks.look(
        checks.finite("rewards", rewards),
        checks.finite("rewards / temperature", rewards / temperature),
        *(checks.logprobs(name, value, error=NonFiniteLoss) for name, value in logprobs.items()),
        *([] if distinct is None else checks.counted(distinct, "distinct")),
    )


def documented_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    temperature: float,
    weights: str = "documented",
    distinct: Tensor | None = None,
) -> LossTerms:
    """L = sum_i q_i [log(pi_old(x_i) / pi(x_i)) + r_i / beta], the mean over prompts; q as target_distribution.

    logprobs, old_logprobs: log pi and log pi_old of whole answers, [prompt, group]. rewards: r, same shape.
    The gradient is that of -sum_i q_i log pi(x_i): every answer is imitated, a bad one less. Documented weights:
    L = KL(q || pi) + log Z over the group, so the loss does minimise that divergence, Z = sum pi_old e^{r / beta} being
    constant. Corrected weights w: L = sum w log(w pi_old / pi) + log sum e^{r / beta}.
    With equal rewards the gradient is not 0: the group is imitated as it is.
    Terms: "log_ratio" and "reward", the two parts of the bracket; the second is constant. Raises TypeError, ValueError.
    Source: documented step 3.
    """
    _check_groups(rewards, temperature, weights, distinct, logprobs=logprobs, old_logprobs=old_logprobs)
    q = _target(old_logprobs, rewards, temperature, weights, distinct).exp()  # 2. [prompt, group]
    log_ratio, reward = old_logprobs.detach() - logprobs, rewards.detach() / temperature  # [prompt, group]
    return LossTerms.of(log_ratio=(q * log_ratio).sum(1).mean(), reward=(q * reward).sum(1).mean())  # 3.


def contrastive_loss(logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, temperature: float) -> LossTerms:
    """L = KL(w || p) over the group, the mean over prompts: w = softmax(r / beta), p = softmax(log pi - log pi_old).

    logprobs, old_logprobs, rewards: [prompt, group], as documented_loss. p is the new policy's share of each answer
    among those of the group, each divided by how often it was to be sampled. The gradient by log pi(x_i) is p_i - w_i.
    As w and p both sum to 1 it has both signs: an answer that holds more than its share is pushed down, and no
    probability is drawn onto the group as a whole. It is 0 where pi is, on the group, proportional to
    pi_old e^{r / beta}. At pi = pi_old, where p = 1 / group, it is that of documented_loss with corrected weights, less
    its mean weight; equal rewards then teach nothing.
    Term: "contrast". Raises TypeError, ValueError. Source: the documented method, normalised over the group.
    """
    _check_groups(rewards, temperature, "corrected", None, logprobs=logprobs, old_logprobs=old_logprobs)
    target = _target(old_logprobs, rewards, temperature, "corrected", None)  # log w, [prompt, group]
    share = (logprobs - old_logprobs.detach()).log_softmax(1)  # log p, [prompt, group]
    return LossTerms.of(contrast=(target.exp() * (target - share)).sum(1).mean())


# --- the published method ---------------------------------------------------------------------------------------------

CLIP = 0.2  # how far the ratio of a token may leave 1, up or down


def published_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    clip_low: float = CLIP,
    clip_high: float = CLIP,
    kl_weight: float = 0.0,
    reduce_by: str = "sequence",
    max_length: int | None = None,
    kl_gradient: str = "plain",
) -> LossTerms:
    """L = mean of -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + beta k3 over the tokens of the answers.

    logprobs, old_logprobs, ref_logprobs: log pi, log pi_old (recorded at sampling: it stays, however many updates one
    rollout serves) and log pi_ref of the tokens, [sequence, token]. advantages: A, [sequence], of policy.advantages,
    flattened. mask: [sequence, token], bool or 0 and 1, of the answers' tokens; what stands beside them is not read.
    kl_weight: beta. kl_gradient: "plain" k3, whose mean gradient is that of KL(pi_ref || pi), as in the paper;
    "weighted": rho k3, that of KL(pi || pi_ref). reduce_by: "sequence" as in the paper, "token", or "length" with
    max_length (Dr. GRPO, whose advantages are not scaled either): see policy.token_weights.
    Advantages that are all 0 leave the KL alone to pull.
    Terms: "policy", and "kl" if there are ref_logprobs. At pi = pi_old the first is minus the mean advantage, so 0
    by sequence, and its gradient is not. Raises TypeError, ValueError.
    Source: the paper, its objective and its KL estimate, with one advantage for all tokens of an answer.
    """
    checks.not_negative(kl_weight=kl_weight)
    checks.choice("kl_gradient", kl_gradient, ("plain", "weighted"))
    if kl_weight and ref_logprobs is None:
        raise ValueError(f"kl_weight {kl_weight} needs the reference to stay near to; got ref_logprobs=None")
    ref = {} if ref_logprobs is None else {"ref_logprobs": ref_logprobs}
    kept, log_ratio = _check_answers(mask, advantages, clip_low, clip_high, logprobs, old_logprobs, **ref)
    _check_reduction("reduce_by", reduce_by, max_length, kept)
    terms = {"policy": _clipped_loss(log_ratio, advantages, kept, clip_low, clip_high, reduce_by, max_length)}
    if ref_logprobs is not None:
        difference = (ref_logprobs.detach() - logprobs).where(kept, 0)
        k3 = _kl_k3(difference, log_ratio if kl_gradient == "weighted" else None)
        weights = _token_weights(kept, reduce_by, max_length, logprobs.dtype)  # [sequence, token]
        terms["kl"] = kl_weight * (weights * k3).sum()
    return LossTerms.of(**terms)

"""The ways of fine-tuning, each as what one step of it draws, and the loss of every update that follows from it.

The losses stand in sft.py, grpo.py and dapo.py; here they meet a model, a task and chance. What the documented steps
leave open, or ask for and do not get, each method says.
"""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl import checks, workers
from mini_impl.finetuning import dapo, grpo, sft
from mini_impl.finetuning.head import _head_logprobs
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.policy import REDUCTIONS, advantages
from mini_impl.finetuning.sampling import Rollout, _score, generate, written
from mini_impl.finetuning.tasks import Task, examples
from mini_impl.losses import LossTerms

# --- what one step draws ----------------------------------------------------------------------------------------------


class Stream:
    """The chance of one step: it depends on (seed, step) alone, so that a training can go on from any step."""

    def __init__(self, seed: int, step: int):
        self.source = random.Random(f"{seed} {step}")

    def kinds(self, task: Task, count: int) -> list[str]:
        """Draw kinds of the task, each as likely as the others."""
        return self.source.choices(task.trained_kinds, k=count)

    def problems(self, task: Task, kinds: Sequence[str]) -> list:
        """Draw a training problem of each of the kinds."""
        return [self.source.choice(task.train[kind]) for kind in kinds]

    def seed(self) -> int:
        """A new seed for `generate`."""
        return self.source.getrandbits(32)


def sample(
    model: LanguageModel, task: Task, problems: Sequence, group_size: int, temperature: float, seed: int
) -> tuple[Rollout, Tensor, list[str]]:
    """`group_size` answers to each problem. Returns (Rollout, rewards [prompt, group] on the CPU, texts)."""
    asked = [problem for problem in problems for _ in range(group_size)]
    rollout = _answer(model, task, asked, temperature, seed)
    texts = written(rollout, task.tokenizer)
    rewards = torch.tensor([task.reward(problem, text) for problem, text in zip(asked, texts, strict=True)])
    return rollout, rewards.view(len(problems), group_size).to(rollout.logprobs.dtype), texts


def _answer(model: LanguageModel, task: Task, problems: Sequence, temperature: float, seed: int) -> Rollout:
    """An answer to each problem. Several workers answer a part each, and then have all."""
    own = workers.rows(len(problems))
    part = generate(
        model,
        [task.question(problem) for problem in problems[own]],
        task.max_new_tokens,
        task.tokenizer.eos_token_id,
        temperature=temperature,
        seed=seed,
        rows=range(len(problems))[own],
    )
    if workers.count() == 1 or len(part.prompt) == len(problems):
        return part
    device = part.prompt.device
    return Rollout(*(field.to(device) for field in join(workers.collect(Rollout(*(x.cpu() for x in part))))))


def _score_shared(
    model: LanguageModel, rollout: Rollout, temperature: float = 1.0, padded: bool | None = None
) -> Tensor:
    """log p of every token of the completions, [sequence, token]. Several workers score a part each: see `whole`."""
    total = len(rollout.completion)
    own = workers.rows(total)
    return workers.whole(_score(model, Rollout(*(field[own] for field in rollout)), temperature, padded=padded), total)


def split(rollout: Rollout, group_size: int) -> list[Rollout]:
    """The answers to each prompt, as rollouts of their own."""
    return [Rollout(*parts) for parts in zip(*(part.split(group_size) for part in rollout), strict=True)]


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts, one below the other: prompts padded on the left, answers on the right."""
    sizes = [max(part.shape[1] for part in parts) for parts in zip(*rollouts, strict=True)]
    return Rollout(
        *(
            torch.cat([_pad(name, part, size) for part in parts])
            for name, parts, size in zip(Rollout._fields, zip(*rollouts, strict=True), sizes, strict=True)
        )
    )


def _pad(name: str, part: Tensor, size: int) -> Tensor:
    """A field of a rollout in `size` columns; 0 and False count for nothing there."""
    missing = size - part.shape[1]
    return F.pad(part, (missing, 0) if name in ("prompt", "attention_mask") else (0, missing))


# --- the methods ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Method(ABC):
    """What a step of fine-tuning is made of; its settings are its fields.

    Raises ValueError for a task with a kind that has no problems, as well as TypeError, ValueError for its settings.
    """

    task: Task = field(repr=False)

    shared: ClassVar[bool] = True  # whether several workers each compute a part of an update
    second_derivative: ClassVar[bool] = False  # whether the loss holds a gradient
    reads_answers: ClassVar[bool] = True  # whether it learns from the right answers of a task

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):  # a numpy.uint8 would overflow
                setattr(self, name, value.item())
        checks.instance(
            "task", self.task, Task, "a Task, as `sums` and `from_file` of mini_impl.finetuning.tasks return"
        )
        kinds = dict.fromkeys(self.task.trained_kinds)
        parts = {"train": kinds, "held_out": kinds | self.task.held_out}
        missing = [(part, kind) for part, of in parts.items() for kind in of if not getattr(self.task, part).get(kind)]
        if missing or not kinds:
            wanted = "trained_kinds, problems of each to train on, and some of every kind that is held out"
            raise ValueError(f"task must have {wanted}; got none of {missing or 'trained_kinds'}")
        if self.reads_answers:  # raises now, not when the problem is drawn
            for kind in kinds:
                list(map(self.task.answer, self.task.train[kind]))

    @abstractmethod
    def updates(
        self, model: LanguageModel, ref_model: LanguageModel, stream: Stream
    ) -> Iterator[tuple[LossTerms, dict[str, float]]]:
        """Draw what one step learns from; yield the loss of each update, and metrics, {name: number}.

        ref_model: the model before fine-tuning. A loss is computed when it is asked for, so after the update before it.
        """

    def clip(self, parameters: Sequence[Tensor], max_grad_norm: float) -> Tensor:
        """Shorten the gradients in .grad; return their norm, over all parameters, as it was before."""
        return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)

    def begin(self, seed: int) -> None:  # noqa: B027 (most carry nothing)
        """Forget what was carried from step to step, and draw by this seed from here on."""

    def state(self) -> dict[str, Tensor]:
        """What a method carries from step to step, to store with a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Go on from what `state` returned."""


# --- from right answers -----------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class DocumentedSFT(Method):
    """Learn the right answers of `sequences` problems a step; the loss is the mean over sentences.

    The documented method has two outputs, an adapter and a merged model. After `fine_tune` of a model that went through
    `sft.add_lora` there are both: `sft.save_adapter` writes the first, `sft.merge_and_unload` makes the second.
    """

    sequences: int = 256

    loss = staticmethod(sft._documented_loss)

    def __post_init__(self):
        super().__post_init__()
        checks.integers(sequences=self.sequences)

    def updates(self, model, ref_model, stream):
        kinds = stream.kinds(self.task, self.sequences)
        tokens, labels, attention_mask = _right_answers(self.task, kinds, stream, model)
        kept, own = labels >= 0, workers.rows(len(labels))
        hidden = model.hidden(tokens[own], attention_mask[own])
        logprobs = _head_logprobs(hidden, model.embedding.weight, labels[own].clamp(min=0))
        logprobs = workers.whole(logprobs, len(labels))  # [sequence, time]
        yield self.loss(-logprobs.where(kept, 0), kept), {}


class PublishedSFT(DocumentedSFT):
    """The same with public code's loss, the mean over all tokens of the batch."""

    loss = staticmethod(sft._published_loss)


def _right_answers(task: Task, kinds: Sequence[str], stream: Stream, model: LanguageModel) -> Iterator[Tensor]:
    """(tokens, labels, attention_mask), each [sequence, time], of a problem of each kind, where the model is."""
    return (part.to(model.embedding.weight.device) for part in examples(task, stream.problems(task, kinds)))


@dataclass(eq=False, kw_only=True)
class DocumentedDAPO(Method):
    """Right answers with two penalties, problems drawn by how badly their kind goes.

    sequences: of a step. sampler_temperature, floor: of the sampler's weights. score: what it goes by, "loss" or
    "gradient norm". clip_penalty_weight, sampling_penalty_weight: lambda_1 and lambda_2. quantile: of a layer's
    gradient, its threshold. adaptive_clip: clip each parameter's gradient to its own threshold, as the documented
    introduction describes it; False: shorten all gradients together, to max_grad_norm, as in the other methods.

    Read differently from the documented steps: step 1 answers with "the initial model"; here it is the model as it is
    now. L_sample's p has to have a gradient to train anything, so it is made of this batch's losses, "penalised: KIND"
    in the metrics, while the problems are drawn by the sampler's running average, "drawn: KIND".
    """

    sequences: int = 256
    sampler_temperature: float = 0.5
    floor: float = 0.02
    score: str = "loss"
    clip_penalty_weight: float = 0.01
    sampling_penalty_weight: float = 0.01
    quantile: float = 0.99
    adaptive_clip: bool = False

    # Its penalties are of the gradient of the whole batch: each worker computes all of it.
    shared: ClassVar[bool] = False
    second_derivative: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        checks.integers(sequences=self.sequences)
        checks.not_negative(
            clip_penalty_weight=self.clip_penalty_weight, sampling_penalty_weight=self.sampling_penalty_weight
        )
        checks.flags(adaptive_clip=self.adaptive_clip)
        self.begin(seed=0)

    def begin(self, seed: int) -> None:
        kinds, temperature = self.task.trained_kinds, self.sampler_temperature
        self.thresholds = dapo.AdaptiveThresholds(self.quantile)
        self.sampler = dapo.TypeSampler(kinds, temperature, self.floor, score=self.score, seed=seed)

    def updates(self, model, ref_model, stream):
        drawn = self.sampler.weights()  # [kind]
        kinds = self.sampler.draw(self.sequences)
        tokens, labels, attention_mask = _right_answers(self.task, kinds, stream, model)
        with sdpa_kernel(SDPBackend.MATH):  # 1. fused attention has no second derivative
            token_losses = sft._log_sum_exp_loss(model(tokens, attention_mask), labels.clamp(min=0))  # [sequence, time]
        losses = sft._sentence_mean(token_losses, labels >= 0)  # [sequence]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sampler.update(kinds, losses, trained)  # 3.
        weights = dapo._sampling_weights(self._scores(kinds, losses), self.sampler_temperature, self.floor)  # [kind]
        loss = dapo.documented_loss(  # 2. and 4.
            losses.mean(), trained, self.thresholds, weights, self.clip_penalty_weight, self.sampling_penalty_weight
        )
        metrics = {
            f"{name}: {kind}": weight
            for name, values in (("drawn", drawn), ("penalised", weights))
            for kind, weight in zip(self.task.trained_kinds, values.tolist(), strict=True)
        }
        yield loss, metrics

    def _scores(self, kinds: Sequence[str], losses: Tensor) -> Tensor:
        """Of each kind the loss in this batch, with its gradient; of those that are not in it, what the sampler has.

        Gradient norms are the sampler's numbers: to differentiate them would take another derivative.
        """
        stored = self.sampler.scores.to(losses.dtype)  # [kind]
        stored = stored.where(~stored.isnan(), stored.nan_to_num(0).max())  # never seen: as the worst that was
        stored = stored.to(losses.device)
        if self.score == "gradient norm":
            return stored
        live = dapo.by_kind(kinds, losses)
        return torch.stack([live.get(kind, old) for kind, old in zip(self.task.trained_kinds, stored, strict=True)])

    def clip(self, parameters: Sequence[Tensor], max_grad_norm: float) -> Tensor:
        if not self.adaptive_clip:
            return super().clip(parameters, max_grad_norm)
        norm = super().clip(parameters, math.inf)  # none is as long as that
        gradients = [parameter.grad for parameter in parameters]
        # The penalty has the thresholds take in each step already.
        thresholds = self.thresholds.values if self.clip_penalty_weight else self.thresholds._update(gradients)
        for parameter, clipped in zip(parameters, dapo._clip_to_thresholds(gradients, thresholds), strict=True):
            parameter.grad = clipped
        return norm

    def state(self) -> dict[str, Tensor]:
        parts = {"sampler": self.sampler, "thresholds": self.thresholds}
        return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, part in (("sampler", self.sampler), ("thresholds", self.thresholds)):
            part.load_state_dict({key.removeprefix(f"{name}/"): x for key, x in state.items() if key.startswith(name)})


# --- from rewards -----------------------------------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class RewardMethod(Method):
    """What GRPO and DAPO share: the model answers, is rewarded, and makes some updates of it.

    prompts: problems a step. group_size: answers to each. temperature: of sampling, and of the log-probabilities.
    num_iterations: updates of each rollout. replay: so many problems a step, of the kinds that are not trained (of all,
    if all are), are answered by the model before fine-tuning, greedily; to learn its answers too keeps what it could
    do, which a KL penalty only trades for what is learnt. replay_weight: of their cross-entropy, the mean over tokens,
    the term "replay" of the loss.

    The documented methods speak of a reward model; here the reward is the task's rule, 1 for a right answer and else 0.
    """

    prompts: int = 32
    group_size: int = 8
    temperature: float = 1.0
    num_iterations: int = 2
    replay: int = 0
    replay_weight: float = 1.0

    reads_answers: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        checks.integers(prompts=self.prompts, num_iterations=self.num_iterations)
        checks.integers(least=2, group_size=self.group_size)
        checks.integers(least=0, replay=self.replay)
        checks.positive(temperature=self.temperature)
        checks.not_negative(replay_weight=self.replay_weight)

    def _sample(self, model: LanguageModel, stream: Stream) -> tuple[Rollout, Tensor]:
        """What the model answers to the problems of a step, and the rewards [prompt, group], on the CPU."""
        problems = stream.problems(self.task, stream.kinds(self.task, self.prompts))
        return sample(model, self.task, problems, self.group_size, self.temperature, stream.seed())[:2]

    def _updates(
        self,
        model: LanguageModel,
        ref_model: LanguageModel,
        stream: Stream,
        rollout: Rollout,
        loss: Callable[[Tensor], LossTerms],
        metrics: dict[str, float],
    ) -> Iterator[tuple[LossTerms, dict[str, float]]]:
        """For each update of one rollout: loss(log-probabilities [sequence, token]) with the replay's, and metrics."""
        padded = not rollout.attention_mask.all()
        if self.replay:
            known = [kind for kind, some in self.task.train.items() if some]
            # Of a kind that is trained the old answers are what is to be unlearnt.
            others = [kind for kind in known if kind not in self.task.trained_kinds] or known
            kinds = stream.source.choices(others, k=self.replay)
            replayed = _answer(ref_model, self.task, stream.problems(self.task, kinds), temperature=0.0, seed=0)
        for _ in range(self.num_iterations):
            logprobs = _score_shared(model, rollout, self.temperature, padded)
            terms = loss(logprobs)
            if self.replay:
                cross_entropy = -_score_shared(model, replayed, padded=True).sum() / replayed.mask.sum()
                terms = LossTerms.of(**terms.terms, replay=self.replay_weight * cross_entropy)
            yield terms, metrics


@dataclass(eq=False, kw_only=True)
class DocumentedGRPO(RewardMethod):
    """Sample several answers, make the target distribution from their rewards, imitate it.

    weights: "documented", "corrected", or "contrastive": the corrected ones, and the loss normalised over the group.
    reward_temperature: beta, of the rewards. distinct: an answer that was sampled again counts once.

    Read differently from the documented steps: step 1 samples from "the initial policy"; here it is the model as it is
    now. The sum of step 2 runs over answers x_i, a set, while a group can hold one answer several times: with
    distinct=False each counts as often as it came. That is the default, as the stored results were made so, and as the
    corrected weights need every sample: how often an answer came stands for its probability.
    """

    num_iterations: int = 1
    weights: str = "documented"
    reward_temperature: float = 0.5
    distinct: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.choice("weights", self.weights, ("documented", "corrected", "contrastive"))
        checks.positive(reward_temperature=self.reward_temperature)
        checks.flags(distinct=self.distinct)
        if self.distinct and self.weights == "contrastive":
            raise ValueError("distinct is for documented and corrected weights; got weights='contrastive'")

    def updates(self, model, ref_model, stream):
        rollout, rewards = self._sample(model, stream)  # 1. [prompt, group]
        metrics, rewards = {"mean reward": rewards.mean().item()}, rewards.to(rollout.logprobs.device)
        old = grpo.sequence_logprobs(rollout.logprobs, rollout.mask, self.group_size)  # 1. [prompt, group]
        first = grpo.first_of_each(rollout.completion, rollout.mask, self.group_size) if self.distinct else None

        def loss(logprobs: Tensor) -> LossTerms:
            new = logprobs.sum(1).view_as(rewards)  # log pi of whole answers, [prompt, group]
            if self.weights == "contrastive":
                return grpo.contrastive_loss(new, old, rewards, self.reward_temperature)
            return grpo.documented_loss(new, old, rewards, self.reward_temperature, self.weights, first)  # 2. and 3.

        yield from self._updates(model, ref_model, stream, rollout, loss, metrics)


@dataclass(eq=False, kw_only=True)
class PublishedGRPO(RewardMethod):
    """Group advantages, the clipped ratio of every token, a penalty on leaving the model before fine-tuning.

    clip_low, clip_high: how far a ratio may be below and above 1. kl_weight: of the KL to the model before fine-tuning.
    reduce_by: "sequence" as in the paper, "token", or "length", Dr. GRPO's, whose advantages are not scaled either.
    """

    clip_low: float = grpo.CLIP
    clip_high: float = grpo.CLIP
    kl_weight: float = 0.02
    reduce_by: str = "sequence"

    def __post_init__(self):
        super().__post_init__()
        checks.not_negative(clip_low=self.clip_low, clip_high=self.clip_high, kl_weight=self.kl_weight)
        checks.choice("reduce_by", self.reduce_by, REDUCTIONS)

    def updates(self, model, ref_model, stream):
        rollout, rewards = self._sample(model, stream)  # [prompt, group]
        dr = self.reduce_by == "length"  # Dr. GRPO
        gained = advantages(rewards, scale=not dr).flatten().to(rollout.logprobs.device)  # [sequence]
        with torch.no_grad():
            reference = _score_shared(ref_model, rollout, self.temperature) if self.kl_weight else None

        def loss(logprobs: Tensor) -> LossTerms:
            return grpo.published_loss(
                logprobs,
                rollout.logprobs,
                gained,
                rollout.mask,
                ref_logprobs=reference,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                kl_weight=self.kl_weight,
                reduce_by=self.reduce_by,
                max_length=self.task.max_new_tokens if dr else None,
            )

        metrics = {"mean reward": rewards.mean().item()}
        yield from self._updates(model, ref_model, stream, rollout, loss, metrics)


@dataclass(eq=False, kw_only=True)
class PublishedDAPO(RewardMethod):
    """GRPO with two clip bounds, batches refilled until every group has a signal, and the mean over tokens.

    The reward is 1 for a right answer, -1 for a wrong one. clip_low, clip_high: how far a ratio may be below and above
    1. overlong: what becomes of answers that are cut off: "penalty" takes up to 1 off their reward, within `buffer`
    tokens of the longest; "filter" leaves them out of the loss; "none". rounds: how many draws a batch may take; one
    that is not full then is used as it is.
    """

    clip_low: float = dapo.CLIP_LOW
    clip_high: float = dapo.CLIP_HIGH
    overlong: str = "penalty"
    buffer: int = 1
    rounds: int = 4

    def __post_init__(self):
        super().__post_init__()
        checks.not_negative(clip_low=self.clip_low, clip_high=self.clip_high)
        checks.choice("overlong", self.overlong, ("penalty", "filter", "none"))
        checks.integer("buffer", self.buffer, most=self.task.max_new_tokens, why="the longest answer")
        checks.integers(rounds=self.rounds)

    def updates(self, model, ref_model, stream):
        right = []

        def draw(_: int) -> tuple[list[Rollout], Tensor]:
            rollout, rewards = self._sample(model, stream)
            right.append(rewards.mean().item())
            return split(rollout, self.group_size), 2 * rewards - 1

        try:
            batch = dapo.fill_batch(draw, self.prompts, self.rounds)
        except dapo.BatchNotFilled as error:
            batch = error.batch
        if not batch.groups:
            return  # everything is right, or nothing: there is no signal
        rollout, rewards = join(batch.groups), batch.rewards
        if self.overlong == "penalty":
            lengths = rollout.mask.sum(1).view_as(rewards).cpu()
            rewards = rewards + dapo._overlong_penalty(lengths, self.task.max_new_tokens, self.buffer)
        gained = advantages(rewards).flatten().to(rollout.logprobs.device)  # [sequence]
        if self.overlong == "filter":
            ended = dapo._finished(rollout.completion, rollout.mask, self.task.tokenizer.eos_token_id).tolist()
            rows = [row for row, end in enumerate(ended) if end]
            if not rows:
                return
            rows = torch.tensor(rows, device=gained.device)
            rollout, gained = Rollout(*(part[rows] for part in rollout)), gained[rows]

        def loss(logprobs: Tensor) -> LossTerms:
            return dapo.published_loss(logprobs, rollout.logprobs, gained, rollout.mask, self.clip_low, self.clip_high)

        metrics = {
            "mean reward": sum(right) / len(right),
            "groups drawn": batch.drawn,
            "groups used": len(batch.groups),
        }
        yield from self._updates(model, ref_model, stream, rollout, loss, metrics)


METHODS: dict[tuple[str, str], Callable[..., Method]] = {
    ("sft", "documented"): DocumentedSFT,
    ("sft", "published"): PublishedSFT,
    ("grpo", "documented"): DocumentedGRPO,
    ("grpo", "published"): PublishedGRPO,
    ("dapo", "documented"): DocumentedDAPO,
    ("dapo", "published"): PublishedDAPO,
}

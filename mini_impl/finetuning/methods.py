"""The ways of fine-tuning, each as what one step of it draws, and the loss of every update that follows from it.

The losses stand in sft.py, grpo.py and dapo.py; here they meet a model, a task and chance.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl import checks
from mini_impl.checkpoint import tensor_group
from mini_impl.finetuning import dapo, grpo, sft
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.policy import REDUCTIONS, advantages
from mini_impl.finetuning.sampling import Rollout, generate, score
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


def sample(model: LanguageModel, task: Task, problems: list, group: int, temperature: float, seed: int) -> tuple:
    """`group` answers to each problem. Returns (Rollout, rewards [prompt, group], texts)."""
    asked = [problem for problem in problems for _ in range(group)]
    rollout = generate(
        model, list(map(task.question, asked)), task.max_tokens, task.tokenizer.stop, temperature=temperature, seed=seed
    )
    texts = written(rollout, task)
    rewards = torch.tensor([task.reward(problem, text) for problem, text in zip(asked, texts, strict=True)])
    return rollout, rewards.view(len(problems), group).to(rollout.logprobs), texts


def written(rollout: Rollout, task: Task) -> list[str]:
    """The texts of a rollout, without the stop token."""
    stop = task.tokenizer.stop
    rows = zip(rollout.completion.tolist(), rollout.mask.sum(1).tolist(), strict=True)
    return [task.tokenizer.decode([token for token in row[:length] if token != stop]) for row, length in rows]


def split(rollout: Rollout, group: int) -> list[Rollout]:
    """The answers to each prompt, as rollouts of their own."""
    return [Rollout(*parts) for parts in zip(*(part.split(group) for part in rollout), strict=True)]


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts, one below the other: prompts padded on the left, answers on the right."""
    sizes = [max(part.shape[1] for part in parts) for parts in zip(*rollouts, strict=True)]
    return Rollout(
        *(
            torch.cat([_pad(field, part, size) for part in parts])
            for field, parts, size in zip(Rollout._fields, zip(*rollouts, strict=True), sizes, strict=True)
        )
    )


def _pad(field: str, part: Tensor, size: int) -> Tensor:
    """A field of a rollout in `size` columns; 0 and False count for nothing there."""
    missing = size - part.shape[1]
    return F.pad(part, (missing, 0) if field in ("prompt", "present") else (0, missing))


# --- the methods ------------------------------------------------------------------------------------------------------


class Method(ABC):
    """What a step of fine-tuning is made of.

    Raises ValueError for a task with a kind that has no problems, as well as TypeError, ValueError for its settings.
    """

    def __init__(self, task: Task):
        checks.task(task)
        self.task = task

    @abstractmethod
    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        """Draw what one step learns from; yield the loss of each update, and numbers to log.

        start: the model before fine-tuning. A loss is computed when it is asked for, so after the update before it.
        """

    def begin(self, seed: int) -> None:  # noqa: B027 (most carry nothing)
        """Forget what was carried from step to step, and draw by this seed from here on."""

    def state(self) -> dict[str, Tensor]:
        """What a method carries from step to step, to store with a checkpoint."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Go on from what `state` returned."""


class DocumentedSFT(Method):
    """Learn the right answers of `sequences` problems a step; the loss is the mean over sentences."""

    loss = staticmethod(sft.documented_loss)

    def __init__(self, task: Task, sequences: int = 256):
        super().__init__(task)
        self.sequences = checks.integer("sequences", sequences)

    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        kinds = stream.kinds(self.task, self.sequences)
        batch = examples(self.task, stream.problems(self.task, kinds))
        tokens, labels, present = (part.to(model.embedding.weight.device) for part in batch)
        yield self.loss(model(tokens, present), labels), {}


class PublishedSFT(DocumentedSFT):
    """The same with public code's loss, the mean over all tokens of the batch."""

    loss = staticmethod(sft.published_loss)


class DocumentedGRPO(Method):
    """Sample several answers, make the target distribution from their rewards, imitate it.

    weights: "documented", "corrected", or "contrastive": the corrected ones, and the loss normalised over the group.
    beta: the temperature of the rewards. temperature: that of sampling.
    """

    def __init__(
        self,
        task: Task,
        weights: str = "documented",
        prompts: int = 32,
        group: int = 8,
        temperature: float = 1.0,
        beta: float = 0.5,
        updates: int = 1,
    ):
        checks.choice("weights", weights, ("documented", "corrected", "contrastive"))
        super().__init__(task)
        self.weights = weights
        self.prompts, self.group = checks.integer("prompts", prompts), checks.integer("group", group, least=2)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.beta = checks.number("beta", beta, above=0)
        self.count = checks.integer("updates", updates)

    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        problems = stream.problems(self.task, stream.kinds(self.task, self.prompts))
        rollout, rewards, _ = sample(model, self.task, problems, self.group, self.temperature, stream.seed())  # 1.
        old = grpo.sequence_logprobs(rollout.logprobs, rollout.mask, self.group)
        for _ in range(self.count):
            new = grpo.sequence_logprobs(score(model, rollout, self.temperature), rollout.mask, self.group)
            if self.weights == "contrastive":
                loss = grpo.contrastive_loss(new, old, rewards, self.beta)
            else:
                loss = grpo.documented_loss(new, old, rewards, self.beta, weights=self.weights)  # 2. and 3.
            yield loss, {"mean reward": rewards.mean().item()}


class PublishedGRPO(Method):
    """Group advantages, the clipped ratio of every token, a penalty on leaving the model of the start.

    reduce_by: "sequence" as in the paper, "token", or "length", Dr. GRPO's, whose advantages are not scaled either.
    kl_weight: of the KL to the start; clip: how far a ratio may be from 1; updates: of each rollout.
    """

    def __init__(
        self,
        task: Task,
        prompts: int = 32,
        group: int = 8,
        temperature: float = 1.0,
        updates: int = 2,
        clip: float = 0.2,
        kl_weight: float = 0.02,
        reduce_by: str = "sequence",
    ):
        super().__init__(task)
        self.prompts, self.group = checks.integer("prompts", prompts), checks.integer("group", group, least=2)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.clip = checks.number("clip", clip, least=0)
        self.count = checks.integer("updates", updates)
        self.kl_weight = checks.number("kl_weight", kl_weight, least=0)
        checks.choice("reduce_by", reduce_by, REDUCTIONS)
        self.reduce_by = reduce_by

    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        problems = stream.problems(self.task, stream.kinds(self.task, self.prompts))
        rollout, rewards, _ = sample(model, self.task, problems, self.group, self.temperature, stream.seed())
        dr = self.reduce_by == "length"  # Dr. GRPO
        gains = advantages(rewards, scale=not dr).flatten()
        with torch.no_grad():
            reference = score(start, rollout, self.temperature) if self.kl_weight else None
        for _ in range(self.count):
            loss = grpo.published_loss(
                score(model, rollout, self.temperature),
                rollout.logprobs,
                gains,
                rollout.mask,
                ref_logprobs=reference,
                clip_low=self.clip,
                clip_high=self.clip,
                kl_weight=self.kl_weight,
                reduce_by=self.reduce_by,
                max_length=self.task.max_tokens if dr else None,
            )
            yield loss, {"mean reward": rewards.mean().item()}


class DocumentedDAPO(Method):
    """Right answers with two penalties, problems drawn by how badly their kind goes.

    sequences: of a step. beta, floor: of the sampler's weights. score: what it goes by, "loss" or "gradient norm".
    clip_weight, sampling_weight: lambda_1 and lambda_2. quantile: of a layer's gradient, its threshold.
    """

    def __init__(
        self,
        task: Task,
        sequences: int = 256,
        beta: float = 0.5,
        floor: float = 0.02,
        score: str = "loss",
        clip_weight: float = 0.01,
        sampling_weight: float = 0.01,
        quantile: float = 0.99,
    ):
        super().__init__(task)
        self.sequences = checks.integer("sequences", sequences)
        self.beta = checks.number("beta", beta, above=0)
        self.floor, self.quantile, self.score = floor, quantile, score
        self.clip_weight = checks.number("clip_weight", clip_weight, least=0)
        self.sampling_weight = checks.number("sampling_weight", sampling_weight, least=0)
        self.begin(seed=0)

    def begin(self, seed: int) -> None:
        self.thresholds = dapo.AdaptiveThresholds(self.quantile)
        self.sampler = dapo.TypeSampler(self.task.trained_kinds, self.beta, self.floor, score=self.score, seed=seed)

    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        kinds = self.sampler.draw(self.sequences)
        batch = examples(self.task, stream.problems(self.task, kinds))
        tokens, labels, present = (part.to(model.embedding.weight.device) for part in batch)
        with sdpa_kernel(SDPBackend.MATH):  # 1. fused attention has no second derivative
            losses = sft.sentence_mean(sft.log_sum_exp_loss(model(tokens, present), labels.clamp(min=0)), labels >= 0)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.sampler.update(kinds, losses, trained)  # 3.
        weights = dapo.sampling_weights(self._scores(kinds, losses), self.beta, self.floor)
        words = {f"weight of {k}": w for k, w in zip(self.task.trained_kinds, weights.tolist(), strict=True)}
        yield (
            dapo.documented_loss(  # 2. and 4.
                losses.mean(), trained, self.thresholds, weights, self.clip_weight, self.sampling_weight
            ),
            words,
        )

    def _scores(self, kinds: list[str], losses: Tensor) -> Tensor:
        """Of each kind the loss in this batch, with its gradient; of those that are not in it, what the sampler has.

        Gradient norms are the sampler's numbers: to differentiate them would take another derivative.
        """
        scores = self.sampler.scores.to(losses)
        scores = scores.where(~scores.isnan(), scores.nan_to_num(0).max())  # never seen: as the worst that was
        if self.sampler.score == "gradient norm":
            return scores
        drawn = [torch.tensor([k == kind for k in kinds], device=losses.device) for kind in self.task.trained_kinds]
        live = [losses[of].mean() if of.any() else stored for of, stored in zip(drawn, scores, strict=True)]
        return torch.stack(live)

    def state(self) -> dict[str, Tensor]:
        parts = {"sampler": self.sampler, "thresholds": self.thresholds}
        return {f"{name}/{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.sampler.load_state_dict(tensor_group(state, "sampler"))
        self.thresholds.load_state_dict(tensor_group(state, "thresholds"))


class PublishedDAPO(Method):
    """GRPO with two clip bounds, batches refilled until every group has a signal, and the mean over tokens.

    The reward is 1 for a right answer, -1 for a wrong one. overlong: what becomes of answers that are cut off:
    "penalty" takes up to 1 off their reward, within `buffer` tokens of the longest; "filter" leaves them out of the
    loss; "none". rounds: how many draws a batch may take; one that is not full then is used as it is.
    """

    def __init__(
        self,
        task: Task,
        prompts: int = 32,
        group: int = 8,
        temperature: float = 1.0,
        updates: int = 2,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        overlong: str = "penalty",
        buffer: int = 1,
        rounds: int = 4,
    ):
        checks.choice("overlong", overlong, ("penalty", "filter", "none"))
        super().__init__(task)
        self.overlong = overlong
        self.buffer = checks.integer("buffer", buffer, most=task.max_tokens, why="the longest answer")
        self.prompts, self.group = checks.integer("prompts", prompts), checks.integer("group", group, least=2)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.count = checks.integer("updates", updates)
        self.clip_low = checks.number("clip_low", clip_low, least=0)
        self.clip_high = checks.number("clip_high", clip_high, least=0)
        self.rounds = checks.integer("rounds", rounds)

    def updates(self, model: LanguageModel, start: LanguageModel, stream: Stream) -> Iterator[tuple[LossTerms, dict]]:
        right = []

        def draw(_: int) -> tuple[list[Rollout], Tensor]:
            problems = stream.problems(self.task, stream.kinds(self.task, self.prompts))
            rollout, rewards, _ = sample(model, self.task, problems, self.group, self.temperature, stream.seed())
            right.append(rewards.mean().item())
            return split(rollout, self.group), 2 * rewards - 1

        try:
            batch = dapo.fill_batch(draw, self.prompts, self.rounds)
        except dapo.BatchNotFilled as error:
            batch = error.batch
        if not batch.groups:
            return  # everything is right, or nothing: there is no signal
        rollout, rewards = join(batch.groups), batch.rewards
        if self.overlong == "penalty":
            lengths = rollout.mask.sum(1).view_as(rewards)
            rewards = rewards + dapo.overlong_penalty(lengths, self.task.max_tokens, self.buffer)
        gains = advantages(rewards).flatten()
        if self.overlong == "filter":
            ended = dapo.finished(rollout.completion, rollout.mask, self.task.tokenizer.stop)
            if not ended.any():
                return
            rollout, gains = Rollout(*(part[ended] for part in rollout)), gains[ended]
        words = {"mean reward": sum(right) / len(right), "groups drawn": batch.drawn, "groups used": len(batch.groups)}
        for _ in range(self.count):
            new = score(model, rollout, self.temperature)
            loss = dapo.published_loss(new, rollout.logprobs, gains, rollout.mask, self.clip_low, self.clip_high)
            yield loss, words


METHODS: dict[tuple[str, str], Callable[..., Method]] = {
    ("sft", "documented"): DocumentedSFT,
    ("sft", "published"): PublishedSFT,
    ("grpo", "documented"): DocumentedGRPO,
    ("grpo", "published"): PublishedGRPO,
    ("dapo", "documented"): DocumentedDAPO,
    ("dapo", "published"): PublishedDAPO,
}

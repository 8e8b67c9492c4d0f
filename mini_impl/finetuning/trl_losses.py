"""The losses of grpo.py and dapo.py in TRL's GRPOTrainer: TRL samples, rewards, scores and trains, the loss is ours.

    args = GRPOConfig("out", num_generations=8, per_device_train_batch_size=16, scale_rewards="none")
    DocumentedGRPOTrainer(model, reward, args, data, reward_temperature=0.5, weights="contrastive").train()

Each class takes what trl.GRPOTrainer takes and, by name, what its own loss needs. TRL is in the extra "parity"; where
it is missing, making a trainer is an ImportError. Written for TRL 1.16, some of whose inner parts it uses.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl import checks
from mini_impl.finetuning import dapo, grpo
from mini_impl.finetuning.policy import token_logprobs
from mini_impl.finetuning.sft import _sentence_mean
from mini_impl.losses import LossTerms

try:
    from trl import GRPOTrainer
except ImportError as error:
    GRPOTrainer, MISSING = object, error

# What changes TRL's loss and not these: allowed only as it stands here, so that nothing is dropped unseen.
PLAIN = {"importance_sampling_level": "token", "delta": None, "top_entropy_quantile": 1.0, "entropy_coef": 0.0}
PLAIN |= {"off_policy_mask_threshold": None, "use_adaptive_entropy": False, "mask_truncated_completions": False}


class Answers(NamedTuple):
    """What TRL hands over of a micro-batch, the answers to one prompt together."""

    logprobs: Tensor  # log pi of the tokens, with its gradient, [sequence, token]
    old_logprobs: Tensor  # of the policy that sampled; TRL leaves it out where that is pi itself
    ref_logprobs: Tensor | None  # None if args.beta is 0
    advantages: Tensor  # [sequence]
    mask: Tensor  # 1 where there is a token that the model wrote, [sequence, token]


class _LossTrainer(GRPOTrainer):
    """A GRPOTrainer whose loss is `loss(answers, inputs)`, the mean over accumulated micro-batches and processes.

    TRL's own is computed too, for what it logs: kl, entropy, clip ratios. Each term of ours is logged as "loss/NAME",
    as the main process has it.
    """

    def __init__(self, *given, **named):
        if GRPOTrainer is object:
            how = 'pip install "mini_impl[parity]", or pip install trl'
            raise ImportError(f"{type(self).__name__} needs TRL, which cannot be imported: {how}") from MISSING
        super().__init__(*given, **named)
        corrected = {"vllm_importance_sampling_correction": False} if self.use_vllm else {}
        routed = {"router_aux_loss_coef": 0.0} if self.aux_loss_enabled else {}
        self.want("its loss knows nothing else", **PLAIN, **corrected, **routed)

    def want(self, why: str, **settings) -> None:
        """ValueError unless args has these settings; a tuple holds those that will do."""
        for name, wanted in settings.items():
            if (got := getattr(self.args, name)) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
                raise ValueError(f"{type(self).__name__} needs args.{name}={wanted!r}: {why}; got {got!r}")

    def want_whole_groups(self) -> None:
        """ValueError unless every micro-batch holds all answers to its prompts."""
        self.want("slices of one generation would hold parts of groups", steps_per_generation=1)
        batch = self.args.per_device_train_batch_size  # of each process
        checks.divides("num_generations", self.num_generations, "per_device_train_batch_size", batch)

    @property
    def group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = torch.arange(len(output["advantages"]), device=output["advantages"].device)
        return output | {"group": rows // self.group_size}  # TRL shuffles the rows after this

    def _get_per_token_logps_and_entropies(self, *given, **named):
        self.scored = super()._get_per_token_logps_and_entropies(*given, **named)
        return self.scored

    def logprobs(self, model, inputs) -> Tensor:
        super().compute_loss(model, inputs)
        return self.scored[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logprobs, old = self.logprobs(model, inputs), inputs.get("old_per_token_logps")
        mask, gained = inputs["completion_mask"] * inputs.get("tool_mask", 1), inputs["advantages"].to(logprobs.dtype)
        parts = (logprobs, logprobs.detach() if old is None else old, inputs.get("ref_per_token_logps"), gained, mask)
        order = inputs["group"].argsort(stable=True)
        terms = self.loss(Answers(*(None if part is None else part[order] for part in parts)), inputs)
        mode, count = ("train", self.current_gradient_accumulation_steps) if self.model.training else ("eval", 1)
        for name, value in terms.values().items():
            self._metrics[mode][f"loss/{name}"].append(value)
        return terms.total / count


class PublishedGRPOTrainer(_LossTrainer):
    """grpo.published_loss, by args: epsilon, epsilon_high, beta, and use_bias_correction_kl, rho k3 in place of k3.

    loss_type: "grpo", the mean by sequence as in the paper, "bnpo" by token or "dr_grpo" by length; else ValueError.
    """

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        reductions = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "length"}
        self.want("these are its reductions", loss_type=tuple(reductions))
        self.settings = {
            "clip_low": self.epsilon_low,
            "clip_high": self.epsilon_high,
            "kl_weight": self.beta,
            "reduce_by": reductions[self.loss_type],
            "max_length": self.max_completion_length if self.loss_type == "dr_grpo" else None,
            "kl_gradient": "weighted" if self.args.use_bias_correction_kl else "plain",
        }

    def loss(self, answers: Answers, inputs: dict) -> LossTerms:
        logprobs, old, ref, gained, mask = answers
        return grpo.published_loss(logprobs, old, gained, mask, ref, **self.settings)


class PublishedDAPOTrainer(_LossTrainer):
    """dapo.published_loss, by args: epsilon and epsilon_high, 0.2 and 0.28 in the paper. Groups are not refilled.

    loss_type: "dapo", where every token of a generation batch weighs the same, or "bnpo", of a micro-batch; else, and
    for beta other than 0, ValueError.
    """

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.want("it is a mean over tokens, without a KL", loss_type=("dapo", "bnpo"), beta=0.0)

    def loss(self, answers: Answers, inputs: dict) -> LossTerms:
        logprobs, old, _, gained, mask = answers
        terms = dapo.published_loss(logprobs, old, gained, mask, self.epsilon_low, self.epsilon_high)
        if self.loss_type == "bnpo":
            return terms
        batches = self.accelerator.num_processes * (self.args.steps_per_generation if self.model.training else 1)
        share = mask.sum() * batches / inputs["num_items_in_batch"]  # 1 if each batch has equally many tokens
        return LossTerms.of(policy=share * terms.total)


class DocumentedGRPOTrainer(_LossTrainer):
    """grpo.documented_loss or, with weights="contrastive", grpo.contrastive_loss: the mean over all prompts.

    reward_temperature: beta of e^{r / beta}. weights: "documented", "corrected" or "contrastive".
    r is TRL's advantage, the reward less the mean of its group: the same q, another constant in the loss. Divided by
    the deviation it would give each group a beta of its own. An answer without a reward counts as the mean.
    ValueError for args.scale_rewards other than "none", and for groups in parts: args.steps_per_generation must be 1
    (args.gradient_accumulation_steps may be any), and args.per_device_train_batch_size, which is that of each process,
    a multiple of args.num_generations.
    """

    def __init__(self, *given, reward_temperature: float = 0.5, weights: str = "documented", **named):
        checks.positive(reward_temperature=reward_temperature)
        checks.choice("weights", weights, ("documented", "corrected", "contrastive"))
        super().__init__(*given, **named)
        self.want_whole_groups()
        centred = {"scale_rewards": "none", "multi_objective_aggregation": "sum_then_normalize"}
        self.want("the advantages are to be rewards less a constant", **centred)
        self.reward_temperature, self.weights = reward_temperature, weights

    def loss(self, answers: Answers, inputs: dict) -> LossTerms:
        new = grpo.sequence_logprobs(answers.logprobs, answers.mask, self.group_size)  # [prompt, group]
        old = grpo.sequence_logprobs(answers.old_logprobs, answers.mask, self.group_size)
        rewards = answers.advantages.view_as(new)
        if self.weights == "contrastive":
            return grpo.contrastive_loss(new, old, rewards, self.reward_temperature)
        return grpo.documented_loss(new, old, rewards, self.reward_temperature, self.weights)


class DocumentedDAPOTrainer(_LossTrainer):
    """dapo.documented_loss: cross-entropy of the best answers, with penalties on its gradient and on unequal prompts.

    The documented step 1 has right answers, and TRL's data have none. Read so: right are those whose reward is the
    highest of their group. L_basic is the mean over them of the mean over their tokens. A group of equal rewards names
    none and is left out. The types are the prompts of a micro-batch, p = dapo.sampling_weights of the losses of their
    right answers; p is penalised, while TRL goes on drawing prompts uniformly.

    sampler_temperature: of p. clip_penalty_weight, sampling_penalty_weight: lambda_1, lambda_2. quantile: of a
    parameter's gradient, its threshold (dapo.AdaptiveThresholds, which TRL's checkpoints do not hold).
    The penalty differentiates a gradient, so the model must have attn_implementation "eager" or "sdpa" (run as plain
    products here). It is one of each micro-batch's gradient, not of their mean.
    ValueError for args.gradient_checkpointing, for several processes, whose gradients would each be penalised alone,
    for images, and for groups in parts as in DocumentedGRPOTrainer; RuntimeError for other attention.
    """

    def __init__(
        self,
        *given,
        sampler_temperature: float = 0.5,
        clip_penalty_weight: float = 0.01,
        sampling_penalty_weight: float = 0.01,
        quantile: float = 0.99,
        **named,
    ):
        checks.positive(sampler_temperature=sampler_temperature)
        checks.not_negative(clip_penalty_weight=clip_penalty_weight, sampling_penalty_weight=sampling_penalty_weight)
        self.sampler_temperature, self.thresholds = sampler_temperature, dapo.AdaptiveThresholds(quantile)
        self.penalty_weights = clip_penalty_weight, sampling_penalty_weight
        super().__init__(*given, **named)
        self.want_whole_groups()
        self.want("what is computed again has no second derivative", gradient_checkpointing=False)
        if (count := self.accelerator.num_processes) > 1:
            raise ValueError(f"DocumentedDAPOTrainer penalises the gradient of one process; got {count} processes")

    def logprobs(self, model, inputs) -> Tensor:
        if "pixel_values" in inputs:
            raise ValueError("DocumentedDAPOTrainer is for text; got prompts with images")
        with torch.no_grad():
            super().logprobs(model, inputs)  # for what is logged: TRL's log-probabilities have no second derivative
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [sequence, time]
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        places = inputs["completion_ids"].shape[1] + 1  # what the last of them predicts, nobody asks
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(tokens, attention_mask, use_cache=False, logits_to_keep=places).logits[:, :-1]
        return token_logprobs(logits / self.temperature, inputs["completion_ids"])

    def loss(self, answers: Answers, inputs: dict) -> LossTerms:
        rewards = answers.advantages.unflatten(0, (-1, self.group_size))  # [prompt, group]
        told = dapo.informative_groups(rewards)  # [prompt]
        right = (rewards == rewards.amax(1, keepdim=True)) & told[:, None]  # [prompt, group]
        losses = _sentence_mean(-answers.logprobs, answers.mask.bool()).view_as(rewards) * right
        basic = losses.sum() / right.sum().clamp(min=1)
        if not (told.any() and torch.is_grad_enabled()):
            return LossTerms.of(basic=basic)  # nothing to learn, or an evaluation
        weights = dapo.sampling_weights((losses.sum(1) / right.sum(1))[told], self.sampler_temperature)  # [prompt]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return dapo.documented_loss(basic, trained, self.thresholds, weights, *self.penalty_weights)

"""The losses in TRL's trainer: its own numbers where it has the loss too, the package's functions where it does not."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mini_impl.finetuning import dapo, grpo, sft, trl_losses
from mini_impl.finetuning.policy import token_logprobs
from mini_impl.losses import kl_from_uniform
from tests.tensors import same

WORDS = [f"w{number}" for number in range(12)]
GROUP, LENGTH, RATE = 4, 6, 0.5


def test_without_trl_a_trainer_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    spec = importlib.util.find_spec(trl_losses.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=r'DocumentedGRPOTrainer needs TRL.*pip install "mini_impl\[parity\]"'):
        module.DocumentedGRPOTrainer()


# --- a tiny model in TRL's trainer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama of random weights, from which TRL loads the reference."""
    pytest.importorskip("trl", reason="TRL is in the optional extra 'parity'")
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS) + 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = transformers.LlamaConfig(**ids, **sizes)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 10  # some words likelier than others
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return path


def reward(completions, **_) -> list[float]:
    """More for an answer of higher words, so that no two groups are alike."""
    return [sum(WORDS.index(word) for word in text.split() if word in WORDS) / 10 for text in completions]


def trainer(kind: type, folder, tmp_path, settings: dict | None = None, prompts: int = 8, **named):
    """One of `kind` that keeps the inputs and the losses of its micro-batches, in `inputs` and `losses`."""
    import datasets
    import tokenizers
    import transformers
    import trl

    ids = {"<pad>": 0, "<end>": 1} | {word: number + 2 for number, word in enumerate(WORDS)}
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>", pad_token="<pad>")

    class Kept(kind):
        def compute_loss(self, model, inputs, *given, **more):
            loss = super().compute_loss(model, inputs, *given, **more)
            self.inputs.append(inputs)
            self.losses.append(loss.item())
            return loss

    Kept.inputs, Kept.losses = [], []
    given = {
        "max_steps": 3,
        "num_generations": GROUP,
        "per_device_train_batch_size": 2 * GROUP,
        "per_device_eval_batch_size": 2 * GROUP,
        "max_completion_length": LENGTH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    rows = [{"prompt": " ".join(WORDS[place : place + 1 + place % 3])} for place in range(prompts)]
    return Kept(
        transformers.LlamaForCausalLM.from_pretrained(folder),
        reward,
        trl.GRPOConfig(str(tmp_path), **(given | (settings or {}))),
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        **named,
    )


def trained(*given, **named):
    made = trainer(*given, **named)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.train()
    return made, before


def logged(made, name: str) -> list[float]:
    return [entry[name] for entry in made.state.log_history if name in entry]


# --- the published losses, beside TRL's -------------------------------------------------------------------------------

# Each generation serves four updates, of two micro-batches in two iterations: so there are old log-probabilities.
REPLAYED = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 3, "epsilon": 0.05, "epsilon_high": 0.1}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_steps": 2}
CASES = [
    ("PublishedGRPOTrainer", {"loss_type": "grpo"}),
    ("PublishedGRPOTrainer", {"loss_type": "grpo", "beta": 0.1, **REPLAYED}),
    ("PublishedGRPOTrainer", {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False, **REPLAYED}),
    ("PublishedGRPOTrainer", {"loss_type": "bnpo", "temperature": 0.7, **ACCUMULATED}),
    ("PublishedGRPOTrainer", {"loss_type": "dr_grpo", "scale_rewards": "none", **REPLAYED}),
    ("PublishedDAPOTrainer", {"loss_type": "dapo"}),
    ("PublishedDAPOTrainer", {"loss_type": "dapo", **REPLAYED, **ACCUMULATED}),
    ("PublishedDAPOTrainer", {"loss_type": "bnpo", **REPLAYED}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_published_loss_trains_as_that_of_trl(folder, tmp_path, name, settings):
    check_published(folder, tmp_path, name, settings)


def check_published(folder, tmp_path, name: str, settings: dict) -> None:
    import trl

    ours, before = trained(getattr(trl_losses, name), folder, tmp_path, settings)
    theirs, _ = trained(trl.GRPOTrainer, folder, tmp_path, settings)
    steps = settings.get("max_steps", 3) * settings.get("gradient_accumulation_steps", 1)
    assert len(ours.losses) == steps
    assert max(map(abs, ours.losses)) > 1e-3 or settings == {"loss_type": "grpo"}  # which is 0 where rho is 1
    same(torch.tensor(ours.losses), torch.tensor(theirs.losses), 1e-6)
    after = ours.model.state_dict()
    same(after, dict(theirs.model.state_dict()), 1e-6)
    assert all((after[key] - value).abs().max() > 1e-4 for key, value in before.items() if "proj" in key)
    assert len(logged(ours, "loss/policy")) == settings.get("max_steps", 3)
    assert logged(ours, "entropy") == pytest.approx(logged(theirs, "entropy"), abs=1e-5)
    if settings.get("epsilon"):
        assert max(logged(ours, "clip_ratio/region_mean")) > 0
    if settings.get("beta"):
        assert max(logged(ours, "kl")) > 1e-4


# --- the documented losses, beside the package's functions ------------------------------------------------------------


def found(made, inputs) -> dict[str, torch.Tensor]:
    """What a loss needs, read from the tokens alone: groups by prompts, rewards [prompt, group] by texts."""
    prompts = inputs["prompt_ids"].tolist()
    order = sorted(range(len(prompts)), key=lambda row: prompts[row])
    assert order != list(range(len(prompts)))  # TRL had shuffled them
    assert all(prompts[order[row]] == prompts[order[row - row % GROUP]] for row in range(len(order)))
    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)[order]
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)[order]
    width = inputs["completion_ids"].shape[1]
    made.model.set_attn_implementation("eager")
    logits = made.model(tokens, attention_mask=mask).logits[:, -width - 1 : -1]
    logprobs = token_logprobs(logits / made.temperature, tokens[:, -width:])
    texts = made.processing_class.batch_decode(tokens[:, -width:], skip_special_tokens=True)
    rewards = torch.tensor(reward(texts)).view(-1, GROUP)
    return {"logprobs": logprobs, "mask": mask[:, -width:].bool(), "rewards": rewards}


def check_step(made, before: dict, loss) -> None:
    """That the weights went one step down the gradient of `loss(found)`, the mean over the micro-batches."""
    after = {name: value.clone() for name, value in made.model.state_dict().items()}
    made.model.load_state_dict(before)
    made.model.zero_grad()
    totals = []
    for inputs in made.inputs:
        total = loss(found(made, inputs)) / len(made.inputs)
        total.backward()
        totals.append(total.item())
    for name, parameter in made.model.named_parameters():
        if torch.distributed.is_initialized():  # the workers' mean
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
        same(after[name], before[name] - RATE * parameter.grad, 1e-6)
    assert any((after[name] - before[name]).abs().max() > 1e-4 for name in before)
    made.totals = totals


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["documented", "corrected", "contrastive"])
def test_a_documented_grpo_step_is_that_of_the_package(folder, tmp_path, weights):
    """Of two accumulated micro-batches, each a generation of its own."""
    check_documented_grpo(folder, tmp_path, weights)


def check_documented_grpo(folder, tmp_path, weights: str) -> None:
    settings = {"max_steps": 1, "scale_rewards": "none", "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    kind, how = trl_losses.DocumentedGRPOTrainer, {"reward_temperature": 0.7, "weights": weights}
    made, before = trained(kind, folder, tmp_path, settings, **how)

    def loss(batch):
        new = grpo.sequence_logprobs(batch["logprobs"], batch["mask"], GROUP)
        if weights == "contrastive":
            return grpo.contrastive_loss(new, new.detach(), batch["rewards"], 0.7).total
        return grpo.documented_loss(new, new.detach(), batch["rewards"], 0.7, weights).terms["log_ratio"]

    assert len(made.inputs) == 2
    check_step(made, before, loss)
    if weights == "contrastive":  # the others have a constant more, the rewards' mean
        same(torch.tensor(made.losses), torch.tensor(made.totals), 1e-6)


def two_workers(folder, tmp_path) -> None:
    """What each of them runs."""
    check_published(folder, tmp_path, "PublishedDAPOTrainer", {"loss_type": "dapo", **REPLAYED, **ACCUMULATED})
    check_documented_grpo(folder, tmp_path, "contrastive")
    with pytest.raises(ValueError, match="penalises the gradient of one process; got 2 processes"):
        trainer(trl_losses.DocumentedDAPOTrainer, folder, tmp_path)
    with pytest.raises(ValueError, match=r"per_device_train_batch_size must be a multiple of num_.*got 2 and 4"):
        trainer(trl_losses.DocumentedGRPOTrainer, folder, tmp_path, {"per_device_train_batch_size": 2})


@pytest.mark.slow
def test_two_workers_take_the_step_of_their_mean_gradient(folder, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.finetuning.test_trl"]
    run = [sys.executable, *command, str(folder), str(tmp_path)]
    done = subprocess.run(run, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_rollout_that_serves_two_updates_keeps_its_old_log_probabilities(folder, tmp_path):
    settings = {"max_steps": 2, "scale_rewards": "none", "num_iterations": 2}
    made, _ = trained(trl_losses.DocumentedGRPOTrainer, folder, tmp_path, settings, weights="corrected")
    first, second = logged(made, "loss/log_ratio")
    assert abs(first) < 1e-6 < 1e-2 < abs(second)


@pytest.mark.slow
@pytest.mark.parametrize("clip_penalty_weight", [0.0, 0.1])
def test_a_documented_dapo_step_is_that_of_the_package(folder, tmp_path, clip_penalty_weight):
    weights = {"clip_penalty_weight": clip_penalty_weight, "sampling_penalty_weight": 0.3}
    how = {"sampler_temperature": 0.4, "quantile": 0.9, **weights}
    settings = {"max_steps": 1, "temperature": 0.8}
    made, before = trained(trl_losses.DocumentedDAPOTrainer, folder, tmp_path, settings, **how)

    def loss(batch):
        losses = sft._sentence_mean(-batch["logprobs"], batch["mask"]).view(-1, GROUP)
        best = [row == row.max() for row in batch["rewards"]]
        right = torch.cat([some[rows] for some, rows in zip(losses, best, strict=True)])
        scores = torch.stack([some[rows].mean() for some, rows in zip(losses, best, strict=True)])
        drawn, thresholds = dapo.sampling_weights(scores, 0.4), dapo.AdaptiveThresholds(0.9)
        return dapo.documented_loss(right.mean(), made.model.parameters(), thresholds, drawn, *weights.values()).total

    check_step(made, before, loss)
    same(torch.tensor(made.losses), torch.tensor(made.totals), 1e-6)
    assert (logged(made, "loss/clip")[0] > 1e-3) == bool(clip_penalty_weight) and logged(made, "loss/sampling")[
        0
    ] > 1e-5


@pytest.mark.slow
def test_documented_dapo_learns_nothing_from_groups_of_equal_rewards(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "reward", lambda completions, **_: [1.0 for _ in completions])
    made, before = trained(trl_losses.DocumentedDAPOTrainer, folder, tmp_path, {"max_steps": 1})
    assert made.losses == [0.0]
    same(dict(made.model.state_dict()), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PublishedGRPO", "PublishedDAPO", "DocumentedGRPO", "DocumentedDAPO"])
def test_every_loss_is_evaluated_too(folder, tmp_path, name):
    settings = {"loss_type": "bnpo", "scale_rewards": "none", "num_generations_eval": 2}
    made = trainer(getattr(trl_losses, f"{name}Trainer"), folder, tmp_path, settings)
    scores = made.evaluate(made.train_dataset)
    assert len(made.losses) == 2 and torch.isfinite(torch.tensor([*made.losses, scores["eval_loss"]])).all()


@pytest.mark.slow
def test_an_evaluation_has_groups_of_its_own_size(folder, tmp_path):
    settings = {"scale_rewards": "none", "num_generations_eval": 2}
    made = trainer(trl_losses.DocumentedGRPOTrainer, folder, tmp_path, settings, weights="contrastive")
    made.evaluate(made.train_dataset)
    for inputs, loss in zip(made.inputs, made.losses, strict=True):
        weights = (inputs["advantages"].view(-1, 2) / 0.5).softmax(1)
        assert loss == pytest.approx(kl_from_uniform(weights).item(), abs=1e-6)  # as pi is pi_old: p = 1 / group


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ("PublishedGRPO", {}, {}, "needs args.loss_type=.'grpo', 'bnpo', 'dr_grpo'.*got 'dapo'"),
    ("PublishedDAPO", {"loss_type": "grpo"}, {}, "needs args.loss_type=.'dapo', 'bnpo'.*got 'grpo'"),
    ("PublishedDAPO", {"beta": 0.1}, {}, "needs args.beta=0.0.*got 0.1"),
    ("PublishedDAPO", {"delta": 2.0}, {}, "needs args.delta=None.*got 2.0"),
    ("PublishedGRPO", {"loss_type": "grpo", "entropy_coef": 0.1}, {}, "needs args.entropy_coef=0.0.*got 0.1"),
    ("DocumentedGRPO", {"scale_rewards": "none", "gradient_accumulation_steps": 2}, {}, "args.steps_per_generation=1"),
    ("DocumentedGRPO", {}, {}, "needs args.scale_rewards='none'.*got 'group'"),
    ("DocumentedGRPO", {}, {"weights": "best"}, "weights must be one of .* got 'best'"),
    ("DocumentedGRPO", {}, {"reward_temperature": 0.0}, "reward_temperature must be .*got 0.0"),
    ("DocumentedDAPO", {"gradient_checkpointing": True}, {}, "args.gradient_checkpointing=False.*got True"),
    ("DocumentedDAPO", {"gradient_accumulation_steps": 2}, {}, "args.steps_per_generation=1.*got 2"),
    ("DocumentedDAPO", {}, {"clip_penalty_weight": -1.0}, "clip_penalty_weight must be .*got -1.0"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings", "named", "message"), REFUSED)
def test_what_a_loss_cannot_do_is_refused_before_training(folder, tmp_path, name, settings, named, message):
    with pytest.raises(ValueError, match=message):
        trainer(getattr(trl_losses, f"{name}Trainer"), folder, tmp_path, settings, **named)


if __name__ == "__main__":
    two_workers(*sys.argv[1:])

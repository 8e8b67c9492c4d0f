"""Fine-tuning: a language model, and three ways to change what it answers: SFT with LoRA, GRPO and DAPO.

A task has questions of several kinds and says which answers are right; a method says what a step learns from; and
`fine_tune` takes the steps, and measures the model before and after on questions that it was not trained on:

    >>> model, task = sums()  # a tiny model, and sums, of which it gets two kinds wrong
    >>> method = METHODS["grpo", "published"](task, prompts=4, group_size=4)
    >>> training = fine_tune(model, method, steps=2, questions=10, progress=False)
    >>> sorted(training.measures[2].accuracy)  # of each kind, after 2 steps
    ['both carry', 'no carry', 'one digit', 'tens carry', 'units carry']

Every method is there twice, as it was documented and as it was published:

    >>> sorted({name for name, _ in METHODS}), sorted({form for _, form in METHODS})
    (['dapo', 'grpo', 'sft'], ['documented', 'published'])

`from_file` makes a task of a file of your own; `worded_sums` and `facts` are tasks for a real model, SmolLM2 (make
real-model). `add_lora` before `fine_tune` trains
two small matrices a layer in place of all weights: `save_adapter` writes them, `merge_and_unload` adds them up.
`generate` samples answers of a model, `score` says how likely they are. The losses stand in sft.py, grpo.py and
dapo.py, what the last two share in policy.py.
"""

from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.methods import METHODS
from mini_impl.finetuning.sampling import generate, score
from mini_impl.finetuning.sft import add_lora, load_adapter, merge_and_unload, save_adapter
from mini_impl.finetuning.tasks import facts, from_file, sums, worded_sums
from mini_impl.finetuning.train import fine_tune

__all__ = [
    "METHODS",
    "LanguageModel",
    "add_lora",
    "facts",
    "fine_tune",
    "from_file",
    "generate",
    "load_adapter",
    "merge_and_unload",
    "save_adapter",
    "score",
    "sums",
    "worded_sums",
]

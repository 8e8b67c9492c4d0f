"""The command `mini-impl answer`: ask a language model that `mini-impl finetune --save` kept."""

import argparse

from mini_impl import checks
from mini_impl.finetuning import arithmetic
from mini_impl.finetuning.language_model import load_language_model
from mini_impl.finetuning.sampling import generate, written
from mini_impl.finetuning.tasks import question_of
from mini_impl.settings import add_arguments


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `answer`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the file that mini-impl finetune --save wrote")
    add("prompt", nargs="+", help="what it is asked; several are answered one by one")
    add("--max-new-tokens", type=int, default=64, help="of an answer")
    add("--temperature", type=float, default=0.0, help="0: the most likely token every time")
    add_arguments(parser, generate, {"seed": "of what is drawn at a temperature above 0"})


def run(options: argparse.Namespace) -> dict:
    """Answer as the options say; return everything that the command reports."""
    model = load_language_model(options.model).to(checks.device("--device", options.device))
    tokenizer = _tokenizer(options.model, model.tokenizer)
    prompts = [question_of(tokenizer, prompt) for prompt in options.prompt]
    how = {"temperature": options.temperature, "seed": options.seed}
    rollout = generate(model, prompts, options.max_new_tokens, tokenizer.eos_token_id, **how)
    return {"answers": written(rollout, tokenizer)}


def _tokenizer(path: str, name: str | None):
    if name == "smollm2":
        from mini_impl.finetuning.smollm2 import load_tokenizer

        return load_tokenizer()
    if name != "tiny":
        raise ValueError(f"{path} does not say how its model reads text, as a file of `mini-impl finetune --save` does")
    return arithmetic.Tokenizer()


def report(result: dict) -> None:
    """Print the answers, one below the other."""
    print("\n".join(result["answers"]))

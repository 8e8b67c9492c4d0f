"""The command `mini-impl finetune`: what it writes, what it says of wrong options."""

import json

import pytest

from mini_impl import cli
from mini_impl.finetuning import arithmetic

FAST = ("--steps", "2", "--questions", "8")
SMALL = {
    "sft": ("--set", "sequences=8"),
    "grpo": ("--set", "prompts=2", "--set", "group_size=4"),
    "dapo": ("--set", "sequences=8"),
}


def result_of(tmp_path, *arguments):
    out = tmp_path / "out.json"
    cli.main(["finetune", *arguments, *FAST, "--json", str(out)])
    return json.loads(out.read_text())


@pytest.mark.parametrize("method", ["sft", "grpo", "dapo"])
def test_the_result_says_how_it_came_about(tmp_path, capsys, method):
    result = result_of(tmp_path, method, *SMALL[method], "--seed", "3")
    assert result["command"] == ["mini-impl", "finetune", method, *SMALL[method], "--seed", "3", *FAST]
    settings = result["settings"]
    assert (settings["method"], settings["loss"], settings["seed"]) == (method, "documented", 3)
    assert not {"json", "checkpoint", "command"} & settings.keys()
    assert result["parameters"]["trained"] == result["parameters"]["all"] < 300_000
    assert result["start"]["accuracy"].keys() == set(arithmetic.KINDS) and set(result["measures"]) == {"0", "2"}
    assert result["trained kinds"] == list(arithmetic.BAD_KINDS)
    bad = [result["end"]["accuracy"][kind] for kind in arithmetic.BAD_KINDS]
    assert result["end"]["trained kinds"] == pytest.approx(sum(bad) / len(bad))
    assert result["start"]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(len(curve) == 2 for curve in result["curves"].values())
    terms = {"sft": {"cross_entropy"}, "grpo": {"log_ratio", "reward", "mean reward"}, "dapo": {"basic", "clip"}}
    assert terms[method] <= result["curves"].keys()
    words = capsys.readouterr().out
    assert "held-out accuracy" in words and words.count("(not trained)") == len(arithmetic.KINDS) - len(bad)


def test_the_same_command_gives_the_same_result(tmp_path):
    arguments = ("grpo", "--loss", "published", "--set", "prompts=2", "--set", "group_size=4")
    first, second = (result_of(tmp_path, *arguments) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_bf16_is_another_training_and_its_result_says_so(tmp_path):
    plain, mixed = (result_of(tmp_path, "sft", *SMALL["sft"], *how) for how in ((), ("--precision", "bf16")))
    assert [result["settings"]["precision"] for result in (plain, mixed)] == ["float32", "bf16"]
    ours, theirs = (result["curves"]["cross_entropy"] for result in (mixed, plain))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)


def test_lora_trains_few_parameters(tmp_path):
    result = result_of(tmp_path, "sft", "--lora-rank", "2", *SMALL["sft"])
    assert 0 < result["parameters"]["trained"] < result["parameters"]["all"] / 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sft", "--precision", "fp16"), "precision must be one of 'float32', 'bf16'; got 'fp16'"),
        (("dapo", "--compile"), "compile=True has no second derivative, which DocumentedDAPO takes; leave it out"),
        (("sft", "--set", "group_size=4"), "--set: DocumentedSFT has no 'group_size'; it takes sequences"),
        (("grpo", "--set", "group_size=1"), "group_size must be at least 2; got 1"),
        (("dapo", "--set", "score=gradient norm", "--steps", "0"), "steps must be at least 1; got 0"),
        (("sft", "--lora-rank", "1000"), "rank"),
        (("sft", "--task", "facts"), "--task facts is for --model smollm2"),
        (("sft", "--device", "abacus"), "device"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as error:
        cli.main(["finetune", *arguments])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said

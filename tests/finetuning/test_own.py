"""Questions of one's own, in a file; the model that learnt to answer them, kept and asked."""

import json
import re

import numpy as np
import pytest
import torch

from mini_impl.checkpoint import load_checkpoint, save_checkpoint
from mini_impl.cli import main
from mini_impl.finetuning import arithmetic, tasks
from mini_impl.finetuning.language_model import load_language_model, save_language_model
from mini_impl.finetuning.sft import load_adapter, merge_and_unload

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(1, 8) for b in range(3, 8)]


def write(path, lines):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a file of sums and a reward."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "sums.jsonl", SUMS)
    (tmp_path / "my_rewards.py").write_text(
        "def right(line, text):\n    return text == line['answer']\n\n"
        "def nothing(line, text):\n    return None\n\n"
        "def nan(line, text):\n    return float('nan')\n\n"
        "def raises(line, text):\n    return {}['no such key']\n\n"
        "def large(line, text):\n    return -2e5\n"
    )
    return tmp_path


def test_a_file_is_a_task(tmp_path):
    lines = [*SUMS, *({"prompt": f"{a}+0=", "answer": str(a), "kind": "zero"} for a in range(3))]
    _, task = tasks.from_file(write(tmp_path / "a.jsonl", lines))
    assert {kind: len(some) for kind, some in task.train.items()} == {"of the file": 28, "zero": 2}
    assert {kind: len(some) for kind, some in task.held_out.items()} == {"of the file": 7, "zero": 1}
    both = [line["prompt"] for some in (*task.train.values(), *task.held_out.values()) for line in some]
    assert sorted(both) == sorted(line["prompt"] for line in lines)
    assert task.trained_kinds == ("of the file", "zero") and task.max_new_tokens == 3
    line = {"prompt": "4+5=", "answer": "9"}
    assert task.question(line) == [4, 10, 5, 11] and task.answer(line) == [9, 12]
    assert [task.reward(line, text) for text in ("9", " 9 ", "19", "")] == [1, 1, 0, 0]
    again = tasks.from_file(tmp_path / "a.jsonl")[1]
    assert again.held_out == task.held_out


def test_other_ways_to_write_a_file_are_read(tmp_path):
    """A mark of Windows at the beginning, its line ends, blank lines, and what ends a line elsewhere in a text."""
    note = json.dumps({"prompt": "1+1=", "answer": "2", "note": "a\u2028b\u2029c\x85d"}, ensure_ascii=False)
    for text in ("\ufeff" + json.dumps(SUMS[0]), json.dumps(SUMS[0]) + "\r", "\n\n" + json.dumps(SUMS[0])):
        _, task = tasks.from_file(write(tmp_path / "a.jsonl", [text, *SUMS[1:], note, "", ""]))
        assert sum(map(len, [*task.train["of the file"], *task.held_out["of the file"]])) == 2 * 35 + 3


def test_what_is_held_out_is_never_trained_on(tmp_path):
    lines = [{"prompt": prompt, "answer": "62"} for prompt in ("27+35=", "18+35=") for _ in range(10)]
    _, task = tasks.from_file(write(tmp_path / "a.jsonl", lines))
    parts = [{line["prompt"] for line in part["of the file"]} for part in (task.train, task.held_out)]
    assert not parts[0] & parts[1] and len(task.train["of the file"]) == len(task.held_out["of the file"]) == 10
    with pytest.raises(ValueError, match="must have two prompts of each kind"):
        tasks.from_file(write(tmp_path / "a.jsonl", lines[:10]))


@pytest.mark.parametrize(
    ("lines", "reward", "says"),
    [
        (["{"], None, 'line 1: wanted an object with "prompt": text and "answer": text, .*; got \'{\''),
        ([*SUMS, "[1]"], None, r"line 36: wanted an object .*; got '\[1\]'"),
        ([*SUMS, {"prompt": "1+1="}], None, "line 36: wanted an object"),
        ([*SUMS, {"answer": "2"}], len, 'line 36: wanted an object with "prompt": text, .*; got'),
        ([*SUMS, {"prompt": "", "answer": "2"}], None, "line 36: wanted an object"),
        ([*SUMS, {"prompt": "1+1=", "answer": 2}], None, "line 36: wanted an object"),
        (
            [*SUMS, {"prompt": "1+1=", "answer": "2", "kind": 1}],
            None,
            'line 36: .* and "kind", if there is one, as text; got',
        ),
        ([*SUMS, {"prompt": "1 + 1=", "answer": "2"}], None, "line 36: text must be made of .* got ' ' in '1 \\+ 1='"),
        ([*SUMS, {"prompt": "1+1=", "answer": "two"}], None, "line 36: text must be made of .* in 'two'"),
        ([*SUMS, '{"prompt": "\udce9"}'], None, "line 36: wanted an object"),
        ([*SUMS, "[" * 10**5], None, "line 36: wanted an object"),
        ([*SUMS, '{"prompt": ' + "1" * 5000 + "}"], None, "line 36: wanted an object"),
        ([*SUMS, {"prompt": "1+1=", "answer": "2", "kind": "one"}], None, "must have two prompts of each kind"),
        ([], None, "must have two prompts of each kind"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_where_it_is(tmp_path, lines, reward, says):
    with pytest.raises(ValueError, match=f"a.jsonl,? {says}"):
        tasks.from_file(write(tmp_path / "a.jsonl", lines), reward=reward)


def test_rewards_are_numbers(tmp_path):
    lines = [{"prompt": line["prompt"]} for line in SUMS]
    for value, expected in ((2, 2.0), (True, 1.0), (-0.5, -0.5)):
        _, task = tasks.from_file(write(tmp_path / "a.jsonl", lines), reward=lambda line, text, value=value: value)
        assert task.reward(lines[0], "7") == expected and task.max_new_tokens == 32
    for value, error in ((None, TypeError), ("1", TypeError), (float("inf"), ValueError)):
        _, task = tasks.from_file(tmp_path / "a.jsonl", reward=lambda line, text, value=value: value)
        with pytest.raises(error, match="the reward of '7' for '1\\+3=' must be a finite number"):
            task.reward(lines[0], "7")
    _, task = tasks.from_file(tmp_path / "a.jsonl", reward=lambda line, text: np.True_)
    assert task.reward(lines[0], "7") == 1
    with pytest.raises(ValueError, match="learns from right answers, but the line of '1\\+3=' has no \"answer\""):
        task.answer(lines[0])


def test_sft_on_ones_own_file_is_kept_and_asked(folder, capsys):
    arguments = ["finetune", "sft", "--data", "sums.jsonl", "--lora-rank", "2", "--steps", "2", "--set", "sequences=8"]
    main([*arguments, "--save", "model", "--adapter", "adapter", "--json", "out.json"])
    assert "of the file" in capsys.readouterr().out
    kept = load_language_model("model")
    adapted = merge_and_unload(load_adapter(arithmetic.base_model(), "adapter"))
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in adapted.state_dict().items())
    assert not torch.equal(
        kept.blocks[0].attention.query.weight, arithmetic.base_model().blocks[0].attention.query.weight
    )
    assert json.loads((folder / "out.json").read_text())["settings"]["data"] == "sums.jsonl"
    main(["answer", "model", "1+3=", "12+30=", "--json", "answers.json"])
    answers = capsys.readouterr().out.splitlines()
    assert answers == ["4", "42"] == json.loads((folder / "answers.json").read_text())["answers"]


@pytest.mark.parametrize(
    ("method", "loss", "setting"),
    [("grpo", "published", "prompts=4"), ("grpo", "documented", "prompts=4"), ("dapo", "published", "prompts=4")],
)
def test_methods_that_try_answers_take_a_reward(folder, capsys, method, loss, setting):
    write(folder / "prompts.jsonl", [{"prompt": line["prompt"]} for line in SUMS])
    command = ["finetune", method, "--loss", loss, "--set", setting, "--steps", "1", "--json", "out.json"]
    main([*command, "--data", "sums.jsonl", "--reward", "my_rewards:right"])
    result = json.loads((folder / "out.json").read_text())
    assert 0.8 < result["start"]["accuracy"]["of the file"] <= 1
    raised = "raised KeyError: 'no such key' (my_rewards.py, line 11)"
    for reward, got in (
        ("nothing", "must be a finite number; got None"),
        ("nan", "must be a finite number; got nan"),
        ("raises", raised),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--data", "prompts.jsonl", "--reward", f"my_rewards:{reward}"])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and got in said and "mini-impl: the reward of '" in said
    main([*command, "--data", "prompts.jsonl", "--reward", "my_rewards:large"])
    assert re.search(
        r"held-out mean reward +before +after\nof the file +-2.000e\+05 +-2.000e\+05\n", capsys.readouterr().out
    )


def test_another_reward_is_another_training(folder, capsys):
    command = ["finetune", "grpo", "--loss", "published", "--set", "prompts=4", "--data", "sums.jsonl"]
    main([*command, "--checkpoint", "run", "--reward", "my_rewards:right", "--steps", "1"])
    (folder / "others.py").write_text("def right(line, text):\n    return 0\n")
    for reward in ("my_rewards:large", "others:right"):  # another function; the same name in another file
        with pytest.raises(SystemExit):
            main([*command, "--checkpoint", "run", "--reward", reward, "--steps", "2"])
        assert "run is of another training: its task was" in capsys.readouterr().err
    main([*command, "--checkpoint", "run", "--reward", "my_rewards:right", "--steps", "2"])


def test_a_line_without_an_answer_is_named_before_the_training(folder, capsys):
    write(folder / "prompts.jsonl", [*SUMS * 9, {"prompt": "1+1="}, {"prompt": "1+2="}])
    with pytest.raises(SystemExit):
        main(["finetune", "sft", "--data", "prompts.jsonl", "--reward", "my_rewards:large", "--set", "sequences=1"])
    assert "the method learns from right answers, but the line of" in capsys.readouterr().err


def test_outputs_do_not_write_over_one_another(folder, capsys):
    command = ["finetune", "sft", "--data", "sums.jsonl", "--lora-rank", "2", "--adapter", "ad"]
    source = (folder / "my_rewards.py").read_text()
    for more, both in (
        (["--save", "ad/adapter_model.safetensors"], "--save and --adapter"),
        (["--json", "ad/adapter_config.json"], "--json and --adapter"),
        (["--reward", "my_rewards:right", "--save", "my_rewards.py"], "--reward and --save"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *more])
        assert f"{both} must be two files" in capsys.readouterr().err
    assert not list((folder / "ad").glob("*")) and (folder / "my_rewards.py").read_text() == source


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft", "--data", "none.jsonl"], "No such file or directory: 'none.jsonl'"),
        (["sft", "--data", "sums.jsonl", "--task", "facts"], "not allowed with argument"),
        (["sft", "--adapter", "a"], "--adapter needs --lora-rank"),
        (["grpo", "--data", "sums.jsonl", "--reward", "my_rewards"], "--reward must be MODULE:FUNCTION"),
        (["grpo", "--data", "sums.jsonl", "--reward", "my_rewards:none"], "--reward must be MODULE:FUNCTION"),
        (["grpo", "--data", "sums.jsonl", "--reward", "no_such_module:f"], "No module named 'no_such_module'"),
        (
            ["grpo", "--data", "sums.jsonl", "--reward", "my_rewards.py:right"],
            "--reward must be MODULE:FUNCTION, such as",
        ),
        (["grpo", "--data", "sums.jsonl", "--reward", "broken:right"], r"broken cannot be read \(SyntaxError: "),
        (["grpo", "--reward", "no_such_module:f"], "--reward is for questions of your own: it needs --data"),
        (["grpo", "--max-new-tokens", "3"], "--max-new-tokens is for questions of your own: it needs --data"),
        (
            ["sft", "--data", "sums.jsonl", "--max-new-tokens", "1"],
            "longest answer and its end, must be at least 3; got 1",
        ),
        (["sft", "--data", "words.jsonl"], "text must be made of '0123456789\\+='"),
    ],
)
def test_what_is_asked_wrongly_is_said(folder, capsys, arguments, says):
    write(folder / "words.jsonl", [{"prompt": "Who?", "answer": "Me"}] * 3)
    (folder / "broken.py").write_text("def right(:\n")
    with pytest.raises(SystemExit) as ended:
        main(["finetune", *arguments])
    assert ended.value.code == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_model_without_a_tokenizer_is_not_asked(tmp_path, capsys):
    save_language_model(arithmetic.base_model(), tmp_path / "model")
    for path, says in (
        (tmp_path / "model", "does not say how its model reads text"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(SystemExit):
            main(["answer", str(path), "1+1="])
        assert says in capsys.readouterr().err


def test_a_small_file_of_a_huge_model_takes_no_memory(tmp_path):
    save_language_model(arithmetic.base_model(), tmp_path / "model")
    tensors, state = load_checkpoint(tmp_path / "model")
    state["language model"]["vocab_size"] = 10**9
    save_checkpoint(tmp_path / "huge", tensors, state)
    with pytest.raises(ValueError, match="huge holds other weights than those of a LanguageModel as it describes it"):
        load_language_model(tmp_path / "huge")
    state["language model"] |= {"vocab_size": 13, "layers": 10**9}
    save_checkpoint(tmp_path / "huge", tensors, state)
    with pytest.raises(ValueError, match=r"huge holds [0-9]+ weights, too few for the 1000000000 layers that it descr"):
        load_language_model(tmp_path / "huge")

"""Each folder of weights has a card that says what it is and how it is loaded; merged models take messages.

The expected values come from elsewhere: token ids from plain tokenizers and pipelines, cards as the hub reads them, numbers
from the runs' own files; and the code in each card is run.
"""

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

import merge_lora
import reward_modeling
import rl_training
import sft_training
from corpus.chat_template import plain_chat_template
from corpus.files import Rows
from corpus.tokens import format_prompt, tokenize_sft
from lora.adapters import REWARD, read_adapter
from lora.heads import score_fn
from reporting.model_card import public_name, result_lines, write_model_card
from rollout.model import assemble_ppo_model
from tests.conftest import make_tokenizer, write_preferences, write_rows, write_sft
from tests.helpers import PROMPTS, Stages, load_plain, run_main
from utils.files import read_jsonl

TEMPLATE = "问：{prompt}\n\n答："
TRICKY = "BEHIND \"{{ 'FRONT' }}\" {% raw %} \\ 😀 {# {prompt}  \n \tA:\n"


@pytest.fixture(scope="module")
def runs(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the output of all stages on a tiny base: sft, reward, ppo, merged and judge."""
    folder = tmp_path_factory.mktemp("secret_place")
    sft, pairs = write_sft(folder / "sft.jsonl"), write_preferences(folder / "pairs.jsonl")
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    base = ["--model_name_or_path", stages.base]
    common = [*base, "--max_length", "64"]
    ppo = ["--sft_model_lora_path", str(folder / "sft"), "--reward_model_lora_path", str(folder / "reward")]
    ppo += ["--allow_weak_reward", "true", "--steps", "2", "--save_freq", "1", "--batch_size", "2", "--guard_freq", "1"]
    ppo += ["--output_max_length", "4", "--learning_rate", "0.01", "--guard", "warn", "--kl_budget", "1000"]
    merge = ["merge_lora.py", "--base_model_name", stages.base, "--adapter_path"]
    with pytest.MonkeyPatch.context() as monkeypatch:

        def run(script, name, *words):
            run_main(script, [*common, "--output_dir", folder / name, *words], monkeypatch)

        steps = ("--max_steps", "2", "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1")
        run(sft_training, "sft", "--dataset", sft, "--eval_dataset", sft, *steps)
        run(reward_modeling, "reward", "--dataset", pairs, "--eval_dataset", pairs, "--probe_prompts", "2", *steps)
        run(rl_training, "ppo", "--dataset", prompts, *ppo)
        for name, adapter, *more in (("merged", "ppo/best"), ("judge", "reward", "--as_classifier")):
            words = [*merge, str(folder / adapter), "--output_dir", str(folder / name), *more]
            monkeypatch.setattr("sys.argv", words)
            merge_lora.main()
    return folder


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


# ---------------------------------------------------------------- messages


def test_a_pipeline_takes_messages_and_sees_the_ids_of_training(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merged model had no chat template: a pipeline refused messages, and who gave texts forgot the prompt template."""
    chat = pipeline("text-generation", str(runs / "merged"))
    seen = []
    generate = chat.model.generate
    chat.model.generate = lambda *args, **kwargs: (
        seen.append(kwargs["input_ids"][0].tolist()) or generate(*args, **kwargs)
    )
    question = {"role": "user", "content": "火锅 好吗？"}
    replied = chat([question], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert [turn["role"] for turn in replied] == ["user", "assistant"]
    ids = make_tokenizer()("问：火锅 好吗？\n\n答：")["input_ids"]
    assert seen == [ids]
    # and what SFT trained on begins with them
    capsys.readouterr()
    trained = tokenize_sft(
        Rows(["prompt", "response"], [{"prompt": question["content"], "response": "yes"}]),
        TEMPLATE,
        make_tokenizer(),
        64,
    )[0]
    assert trained["input_ids"][: len(ids)] == ids
    assert trained["labels"][: len(ids) + 1] == [*[-100] * len(ids), trained["input_ids"][len(ids)]]

    dialogue = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "b "},
        question,
    ]
    chat(dialogue, max_new_tokens=3)
    assert seen[-1] == make_tokenizer()("Be kind.\n\n问： a\n\n\n答：b \n\n问：火锅 好吗？\n\n答：")["input_ids"]


def test_a_reply_that_is_there_gets_the_end_that_it_had_in_training(runs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(runs / "judge")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    assert ids == make_tokenizer()("问：a\n\n答：b</s>")["input_ids"]


@pytest.mark.parametrize("template", [TEMPLATE, TRICKY])
def test_any_prompt_template_becomes_a_chat_template(template: str) -> None:
    """Marks of Jinja, quotes, backslashes and white space in a prompt template are text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = plain_chat_template(template, "<s>")
    before, behind = template.split("{prompt}")
    turns = [
        {"role": "system", "content": " "},  # nothing is said: left out
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "{{ b }}"}]},
        {"role": "assistant", "content": "c\n", "tool_calls": [{"name": "é"}]},
        {"role": "tool", "content": "d"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]},
        {"role": "user", "content": "g"},
    ]
    expected = f'{before}a{{{{ b }}}}{behind}c\n\n[{{"name": "é"}}]\n\nd\n\n[{{"name": "f"}}]\n\n{before}g{behind}'
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == "<s>" + expected
    turns[1]["content"] = "a{{ b }}"
    turns[4]["content"] = ""
    assert format_prompt(turns[1:], template, tokenizer) == expected
    tools = [{"type": "function", "function": {"name": "f", "description": "é"}}]
    asked = tokenizer.apply_chat_template(turns[-1:], tools=tools, tokenize=False)
    assert asked == f"<s>{json.dumps(tools, ensure_ascii=False)}\n\n{before}g{behind}"


@pytest.mark.parametrize(
    "turn", [{"role": "judge", "content": "a"}, {"role": "user", "content": [{"type": "image", "url": "a"}]}]
)
def test_what_the_template_cannot_write_raises(turn: dict) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = plain_chat_template(TEMPLATE, "")
    with pytest.raises(TemplateError, match="can be written"):
        tokenizer.apply_chat_template([turn])


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: <s> in front of a text, and a space, which a text behind a special token does not get."""
    letters = {letter: number for number, letter in enumerate(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))])}
    core = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_tokens_in_front_of_a_text_are_in_the_chat_template(capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline tokenizes a chat without the special tokens of a text: <s>, and the space behind it, would be lost."""
    tokenizer = sentencepiece_like()
    asked = [{"role": "user", "content": "a b"}]
    merge_lora.add_chat_template(tokenizer, "Q:{prompt}A:")
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁", "Q", ":", "a", "▁", "b", "A", ":"]
    assert capsys.readouterr().err == ""
    # a prompt at the very front may begin with a space of its own, which then is none
    tokenizer.chat_template = None
    merge_lora.add_chat_template(tokenizer, "{prompt}=")
    assert tokenizer.chat_template is None
    assert capsys.readouterr().err.startswith("note: no chat template gives this tokenizer's ids of")


def test_a_chat_template_of_its_own_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = own = "{{ messages[0].content }}"
    merge_lora.add_chat_template(tokenizer, "chat")
    assert (tokenizer.chat_template, capsys.readouterr().err) == (own, "")
    merge_lora.add_chat_template(tokenizer, "{prompt}=")
    assert tokenizer.chat_template == own
    assert capsys.readouterr().err == (
        "note: the tokenizer's own chat template is kept, but the adapter was trained with the prompt template "
        "'{prompt}='; write prompts in that one\n"
    )


# ---------------------------------------------------------------- cards

FOLDERS = {
    "sft": ("peft", "text-generation", "sft", "# SFT adapter for base\n"),
    "sft/checkpoint-1": ("peft", "text-generation", "sft", "# SFT adapter for base, after step 1\n"),
    "reward": ("peft", "text-classification", "reward-model", "# Reward adapter for base\n"),
    "reward/checkpoint-2": ("peft", "text-classification", "reward-model", "# Reward adapter for base, after step 2\n"),
    "ppo": ("peft", "text-generation", "ppo", "# PPO adapter for base\n"),
    "ppo/best": ("peft", "text-generation", "ppo", "# PPO adapter for base, the best policy of its run\n"),
    "ppo/checkpoint-2": ("peft", "text-generation", "ppo", "# PPO adapter for base, after iteration 2\n"),
    "merged": ("transformers", "text-generation", "ppo", "# PPO model from base, the best policy of its run\n"),
    "judge": ("transformers", "text-classification", "reward-model", "# Reward model from base\n"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_each_folder_has_a_card_that_the_hub_reads(runs: Path, name: str) -> None:
    """PEFT's card was 200 lines of "[More Information Needed]", with the path of the base on this machine."""
    library, task, tag, title = FOLDERS[name]
    found = card(runs / name)
    data = found.data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("base", library, task)
    assert data.tags == ["lora", "rlhf", tag]
    assert data.license is None
    assert title in found.content
    assert "More Information" not in found.content
    assert "secret_place" not in found.content
    assert str(runs) not in found.content
    assert not {"checkpoint-", ".new"} & set(re.findall(r"checkpoint-|\.new", found.content))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_code_of_a_card_runs(runs: Path, stages: Stages, name: str) -> None:
    """As a reader would: the base and the folder filled in, then run as it stands."""
    code = re.search(r"```python\n(.*?)\n```", card(runs / name).content, re.DOTALL)[1]
    code = code.replace('"base"', f'"{stages.base}"').replace("FOLDER", str(runs / name))
    output = io.StringIO()
    torch.manual_seed(0)
    with redirect_stdout(output):
        exec(code, {})
    if FOLDERS[name][1] == "text-generation":
        assert output.getvalue().strip()
    else:  # the toolkit's own score of the same prompt and reply
        adapter = name if name.startswith("reward") else "reward"
        model = assemble_ppo_model(
            load_plain(stages.base), *(read_adapter(str(runs / each), "--adapter") for each in ("sft", adapter))
        )
        model.set_adapter(REWARD)
        tokenizer = make_tokenizer()
        ids = (
            tokenizer("问：What is the capital of France?\n\n答：")["input_ids"]
            + tokenizer("Paris.")["input_ids"]
            + [2]
        )
        mask = torch.ones(1, len(ids), dtype=torch.long)
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids]), attention_mask=mask, hidden_state_fn=score_fn(mask, REWARD))
        assert float(output.getvalue()) == pytest.approx(float(score), abs=1e-5)


def test_results_are_those_of_the_files(runs: Path) -> None:
    losses = {
        row["step"]: row["eval_loss"] for row in read_jsonl(str(runs / "sft/metrics.jsonl")) if "eval_loss" in row
    }
    assert f"- At step 1: loss on held-out rows {losses[1]:.3f}.\n" in card(runs / "sft/checkpoint-1").content
    assert f"- At step 2: loss on held-out rows {losses[2]:.3f}.\n" in card(runs / "sft").content

    made = json.loads((runs / "reward/reward_card.json").read_text())
    low, high = made["accuracy_ci95"]
    line = f"Accuracy on {made['eval_pairs']} held-out pairs: {made['accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})"
    for name in ("reward", "judge"):
        assert line in card(runs / name).content
        assert f"- The reward card: {'passed' if made['passed'] else 'did not pass: '}" in card(runs / name).content
    row = next(row for row in read_jsonl(str(runs / "reward/metrics.jsonl")) if "eval_accuracy" in row)
    interval = f"95% interval {row['eval_accuracy_low']:.3f} to {row['eval_accuracy_high']:.3f}"
    line = f"- At step 1: accuracy on held-out pairs {row['eval_accuracy']:.3f} ({interval})."
    assert line in card(runs / "reward/checkpoint-1").content

    scores = [row["heldout/score"] for row in read_jsonl(str(runs / "ppo/metrics.jsonl")) if "heldout/score" in row]
    best = json.loads((runs / "ppo/run.json").read_text())["best"]
    sft = json.loads((runs / "ppo/ppo_state.json").read_text())["guard"]["baselines"]["held-out"]["score"]
    assert best["score"] == max([sft, *scores])
    for name in ("ppo", "ppo/best", "merged"):
        assert f"{sft:.3f}" in card(runs / name).content
    assert "| `--sft_model_lora_path` | sft |\n| `--reward_model_lora_path` | reward |" in card(runs / "ppo").content
    assert "with the LoRA adapter `ppo/best` in its weights" in card(runs / "merged").content


def test_the_gain_of_ppo_is_said_or_that_there_is_none(tmp_path: Path) -> None:
    guard = {"baselines": {"held-out": {"score": 0.25}}, "best": {"iteration": 0, "score": 0.25, "kl": 0.0}}
    (tmp_path / "ppo_state.json").write_text(json.dumps({"guard": guard}))
    assert result_lines(str(tmp_path), "ppo", False, None) == [
        "No policy of the run beat the SFT model on held-out prompts (normalised score 0.250)."
    ]
    guard |= {"best": {"iteration": 8, "score": 1.0, "kl": 2.5}, "verdict": "iteration 12, empty replies"}
    (tmp_path / "ppo_state.json").write_text(json.dumps({"guard": guard}))
    rest = ", of iteration 8: normalised score 1.000 on held-out prompts, +0.750 beside the SFT model's 0.250; "
    rest += "KL to the SFT model 2.50 nats a reply."
    collapse = "The guard called a collapse: iteration 12, empty replies."
    assert result_lines(str(tmp_path), "ppo", True, None) == [f"This policy{rest}", collapse]
    assert result_lines(str(tmp_path), "ppo", False, None)[0] == f"The best policy of the run, in `best/`{rest}"


def test_names_of_this_machine_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "alice" / "run" / "checkpoint-3").mkdir(parents=True)
    assert public_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert public_name("gpt2") == "gpt2"
    assert public_name("/home/alice/.cache/hub/models--Qwen--Qwen2.5-0.5B/snapshots/0a1b") == "Qwen/Qwen2.5-0.5B"
    assert public_name(str(tmp_path / "alice" / "run")) == "run"
    assert public_name(str(tmp_path / "alice" / "run" / "checkpoint-3")) == "run/checkpoint-3"
    assert public_name("/home/alice/gone") == "gone"


def test_a_base_whose_name_the_hub_cannot_have_is_in_the_text_alone(tmp_path: Path) -> None:
    """The hub refuses an upload whose card has a base_model that is no name on the hub."""
    base = tmp_path / "my base 小"
    base.mkdir()
    run = {"stage": "sft", "base_model": str(base), "arguments": {}, "prompt_template": "{prompt}="}
    write_model_card(str(tmp_path), run)
    assert card(tmp_path).data.base_model is None
    assert "A LoRA adapter for `my base 小`" in card(tmp_path).content
    (tmp_path / "README.md").unlink()
    write_model_card(str(tmp_path), {})  # nothing is known
    assert not (tmp_path / "README.md").exists()

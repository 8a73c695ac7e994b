"""Where a reply ends: at EOS, at what generation_config names, at what the chat template writes behind an assistant's turn.

Only EOS used to end a reply.  A Gemma, Llama 3, Phi-3 or ChatML model, whose turns end with another token, never stopped:
each reply ran to the length limit, and was scored in the middle of a user's turn that the model had invented.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import compare
import merge_lora
import reward_modeling
import rl_training
import sft_training
from corpus.chat_template import check_reply_end, reply_end_id, reply_text, stop_token_ids
from corpus.tokens import tokenize_preferences, tokenize_prompts, tokenize_sft
from inference.side_by_side import InferenceArguments, Response, load_models
from lora.base_model import base_fingerprint, load_base
from rewards.broken_replies import KINDS, broken_pairs
from rollout.batch import make_batch
from rollout.distribution import default_sampling, first_token_ban
from rollout.experience import describe
from rollout.sampler import generate_ids
from tests.conftest import make_model, make_tokenizer, write_rows
from tests.helpers import (
    Stages,
    load_with_hidden_state_fn,
    make_experience,
    make_ppo_trainer,
    make_stages,
    run_main,
    save_lively_base,
    save_sft,
)
from utils.arguments import ModelArguments
from utils.console import InputError

PAD, EOS, VOCABULARY = 0, 2, 330
# family -> the tokens that it adds, its chat template, what ends a turn of the assistant
FAMILIES = {
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "phi3": (
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "mistral": (
        ["[INST]", "[/INST]"],
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "nothing behind a turn": (
        ["<|user|>", "<|assistant|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
    ),
}
OWN_END = ["gemma", "llama3", "chatml", "phi3"]  # families whose turns do not end with EOS
DIALOGUE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris is the capital."},
    {"role": "user", "content": "你好吗？"},
    {"role": "assistant", "content": "我很好，谢谢你！"},
]


def family_tokenizer(family: str, special: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokens, tokenizer.chat_template, _ = FAMILIES[family]
    tokenizer.add_tokens(tokens, special_tokens=special)
    return tokenizer


def end_of(family: str, tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.convert_tokens_to_ids(FAMILIES[family][2])


def save_chat_base(folder: Path, family: str, generation_ends: list[int] | None = None) -> str:
    """A base whose replies end now with the turn's end and now with EOS, both of which its generation_config names."""
    tokenizer = family_tokenizer(family)
    model = make_model("llama", vocabulary=VOCABULARY)
    ends = [EOS, end_of(family, tokenizer)]
    weight = model.get_output_embeddings().weight.data
    weight *= 3
    weight[ends] *= torch.tensor([[2.0], [6.0]])
    model.generation_config.eos_token_id = ends if generation_ends is None else generation_ends
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_idle_adapter(base: str, folder: Path) -> str:
    """An adapter of another tool that changes nothing: it has no run.json, and its second matrices are 0."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return str(folder)


# ---- Which tokens ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_read_off_the_chat_template(family: str) -> None:
    tokenizer = family_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(reply_end_id(tokenizer, "chat")) == FAMILIES[family][2]
    assert reply_end_id(tokenizer, "问：{prompt}\n\n答：") == EOS


def test_an_end_that_is_not_marked_as_special_is_an_end_and_white_space_is_not() -> None:
    """Fine-tuned ChatML models add <|im_end|> as an ordinary token; the tokenizer of Phi-2 adds runs of white space."""
    tokenizer = family_tokenizer("chatml", special=False)
    tokenizer.add_tokens([" \n"])
    tokenizer.chat_template = FAMILIES["chatml"][1].replace("<|im_end|>", " \n<|im_end|>")
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    assert tokenizer.convert_ids_to_tokens(reply_end_id(tokenizer, "chat")) == "<|im_end|>"
    reply = [*tokenizer("hi", add_special_tokens=False)["input_ids"], end_of("chatml", tokenizer)]
    assert (
        tokenizer.decode(reply, skip_special_tokens=True) == "hi<|im_end|>"
    )  # what was shown, scored by rules, remembered
    assert reply_text(reply, tokenizer, (reply[-1], EOS)) == "hi"
    assert reply_text(reply[:-1], tokenizer, (reply[-1], EOS)) == "hi"  # cut by the limit


@pytest.mark.parametrize(("own", "more"), [(None, ()), (2, ()), (5, (5,)), ([2, 7, 5], (7, 5))])
def test_stop_tokens_are_those_of_template_tokenizer_and_generation_config(
    own: int | list[int] | None, more: tuple[int, ...]
) -> None:
    """With a plain template replies are closed with EOS; the model may still end one with what its makers chose."""
    tokenizer = family_tokenizer("gemma")
    config = GenerationConfig(eos_token_id=own)
    assert stop_token_ids(tokenizer, "{prompt}=", config) == (EOS, *more)
    assert stop_token_ids(tokenizer, "chat", config) == (end_of("gemma", tokenizer), EOS, *more)


def test_a_template_that_refuses_a_turn_is_one_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(InputError, match=r"refuses a dialogue \(user, assistant\): system first"):
        reply_end_id(tokenizer, "chat")


# ---- The same ids in all stages ----


@pytest.mark.parametrize("family", [*OWN_END, "mistral"])
def test_training_data_end_a_reply_as_the_earlier_turns_end(family: str) -> None:
    """SFT put EOS behind the last reply where every other turn ends with <end_of_turn>: it taught a third way to end."""
    tokenizer = family_tokenizer(family)
    end = end_of(family, tokenizer)
    prompt, reply = DIALOGUE[:3], DIALOGUE[3]["content"]
    sft = tokenize_sft(Dataset.from_list([{"messages": DIALOGUE}]), "chat", tokenizer, 300, "last")[0]
    whole = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    if family == "mistral":  # whose template has a space in front of a reply, which no generation prompt writes
        whole = whole.replace("[/INST] 我", "[/INST]我")
    until = whole.rindex(FAMILIES[family][2] if family != "phi3" else "<|end|>") + len(FAMILIES[family][2])
    assert sft["input_ids"] == tokenizer(whole[:until], add_special_tokens=False)["input_ids"]
    assert sft["labels"][-1] == end

    pairs = Dataset.from_list(
        [{"prompt": prompt, "chosen": reply, "rejected": "no, thank you, I am not well today"}] * 9
    )
    preferences = tokenize_preferences(pairs, "chat", tokenizer, 300, "drop")
    assert preferences.pairs[0]["chosen_ids"] == sft["input_ids"]  # the score is read at the last one, the end
    assert preferences.pairs[0]["rejected_ids"][-1] == end
    broken = broken_pairs(preferences.sources, dict.fromkeys(KINDS, 2), tokenizer, end, 300, 0)
    assert len(broken) > 10
    assert {ids[-1] for pair in broken for ids in (pair["chosen_ids"], pair["rejected_ids"])} == {end}
    query = tokenize_prompts(pairs, "chat", tokenizer, 300)[0]["input_ids"]
    assert query == sft["input_ids"][: len(query)]
    assert sft["labels"][: len(query)] == [-100] * len(query)
    assert sft["labels"][len(query) :] == sft["input_ids"][len(query) :]


def test_an_end_that_the_reply_spells_out_is_not_doubled_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Exported chats often keep the marks of their turns, EOS behind them too."""
    tokenizer = family_tokenizer("gemma")
    rows = [{"prompt": "a", "response": "tea<end_of_turn></s><end_of_turn>"}, {"prompt": "b", "response": "tea"}]
    spelled, clean = tokenize_sft(Dataset.from_list(rows), "chat", tokenizer, 100)
    query = len([label for label in clean["labels"] if label == -100])
    assert spelled["labels"][query:] == clean["labels"][query:]
    assert "1 of the training SFT examples hold <end_of_turn> as text" in capsys.readouterr().err


# ---- Sampling ----


@pytest.mark.parametrize("family", OWN_END)
def test_replies_end_where_plain_generate_ends_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compare.py and chat.py went on to the limit, 40.0 of 40 tokens in every reply; generate() stopped at the turn's end.

    The likeliest tokens of the loaded models against transformers' own generate(), with its list of EOS ids and its ban on
    a first token; and what compare.py counts.
    """
    base = save_chat_base(tmp_path / "base", family)
    adapter = save_idle_adapter(base, tmp_path / "adapter")
    models = load_models(
        InferenceArguments(
            model_name_or_path=base,
            adapters=[f"SFT={adapter}"],
            prompt_template="chat",
            temperature=0.0,
            output_max_length=20,
        )
    )
    tokenizer = family_tokenizer(family)
    ends = {EOS, end_of(family, tokenizer)}
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    queries, wanted = [], []
    for word in ("tea", "dogs", "你好", "rice?", "soup", "a cat", "苹果", "火锅"):
        messages = [{"role": "user", "content": word}]
        query = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([query])
        told = {"max_new_tokens": 20, "do_sample": False, "begin_suppress_tokens": [PAD, *ends], "pad_token_id": PAD}
        reply = plain.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=sorted(ends), **told)
        queries.append(query)
        wanted.append(reply[0, len(query) :].tolist())
    assert {reply[-1] for reply in wanted} >= {end_of(family, tokenizer)}  # of some replies
    for name in ("base", "SFT"):
        responses = list(models.generate(name, queries, range(len(queries)), 3))
        assert [response.ids for response in responses] == wanted
        assert [r.text for r in responses] == [
            tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in wanted
        ]


def test_a_plain_template_stops_at_the_ids_of_generation_config(tmp_path: Path) -> None:
    """A chat model asked in the article's template ends its reply with <end_of_turn> all the same."""
    base = save_chat_base(tmp_path / "base", "gemma")
    loaded = load_base(ModelArguments(model_name_or_path=base), torch.float32)
    stop_ids = stop_token_ids(family_tokenizer("gemma"), "{prompt}=", loaded.generation_config)
    end = end_of("gemma", family_tokenizer("gemma"))
    assert stop_ids == (EOS, end)
    sampling = default_sampling(family_tokenizer("gemma"), stop_ids, 20)
    replies = generate_ids(
        load_with_hidden_state_fn(base), [[5, 9, token] for token in range(40, 80)], range(40), sampling
    )
    assert {reply[-1] for reply in replies} >= {EOS, end}
    assert not any({EOS, end} & set(reply[:-1]) for reply in replies)


def test_no_reply_starts_with_any_token_that_ends_one() -> None:
    """With EOS alone banned a policy learns that <end_of_turn> is the shortest of all replies."""
    tokenizer = family_tokenizer("gemma")
    assert first_token_ban("eos", tokenizer, (321, EOS, 7)) == (PAD, EOS, 7, 321)
    assert first_token_ban("none", tokenizer, (321, EOS)) == ()
    assert first_token_ban("5", tokenizer, (321, EOS)) == (5,)


def test_words_are_counted_without_what_ends_a_reply() -> None:
    """distinct-1 of two replies "8 9" that end with different tokens: 2 different ones of 4."""
    replies = [Response([8, 9, EOS], "a", None), Response([8, 9, 321], "a", None)]
    model = compare.ModelResponses("SFT", replies)
    assert compare.summarise(model, model, (321, EOS)).distinct_1 == 0.5


# ---- Stage 3 ----


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    folder = tmp_path_factory.mktemp("stops")
    return make_stages(save_lively_base(folder / "base"), folder)


def test_a_reply_that_ends_with_any_stop_token_is_not_penalised(stages: Stages, tmp_path: Path) -> None:
    """Replies that ended with <end_of_turn> lost --missing_eos_penalty as if they had been cut."""
    trainer = make_ppo_trainer(stages, tmp_path, stop_ids=(41, EOS), missing_eos_penalty=1.5)
    assert trainer.collector.sampling.stop_token_ids == (41, EOS)
    assert trainer.collector.sampling.begin_suppress_tokens == (PAD, EOS, 41)
    batch = make_batch([[5, 6], [5, 41], [5], [5]], [[50, 51, 41], [60, 61], [70, 71, EOS], [41, 71, 72]], PAD)
    experience = make_experience(trainer, batch, torch.zeros(4))
    assert experience.ended.tolist() == [True, False, True, False]
    assert experience.normalized_scores.tolist() == [0.0, -1.5, 0.0, -1.5]
    assert describe(experience)["ended_fraction"] == 0.5


@pytest.mark.parametrize(("limit", "warned"), [(1, True), (60, False)], ids=["never", "nearly always"])
def test_hardly_any_reply_that_ends_is_told_before_the_first_update(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int, warned: bool
) -> None:
    """A run on an SFT model that never stops learnt from invented turns for hours; only ended_fraction showed it.

    With a limit of one token, which may not be an end, none of the 8 ends.
    """
    trainer = make_ppo_trainer(stages, tmp_path, output_max_length=limit, steps=2, ppo_epochs=1)
    trainer.train()
    lines = [line for line in capsys.readouterr().err.splitlines() if "responses end" in line]
    assert [line.split(", the others")[0] for line in lines] == (
        ["warning: 0 of the SFT model's first 8 responses end (a response ends with </s>)"] if warned else []
    )
    assert all("--output_max_length 1 " in line for line in lines)


# ---- Between the stages ----


def test_the_stages_agree_about_the_end_of_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three on a Gemma-like base: each records its stop tokens, and stage 3 ends its replies at any of them.

    Then the SFT adapter says that its replies ended with EOS, as after an edit of the template: three scripts refuse it.
    """
    base = save_chat_base(tmp_path / "base", "gemma")
    end = end_of("gemma", family_tokenizer("gemma"))
    rows = [{"prompt": word, "chosen": f"I like {word}", "rejected": "no"} for word in ("tea", "soup")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    common = ["--model_name", base, "--prompt_template", "chat", "--dataset", data, "--save_strategy", "no"]
    sft = ["--sft_model_lora_path", str(tmp_path / "sft")]
    reward = ["--max_steps", "1", "--eval_dataset", data, *sft, "--output_max_length", "12", "--max_length", "100"]
    reward += ["--degenerate_ratio", "0"]
    ppo = [*sft, "--reward_model_lora_path", str(tmp_path / "reward"), "--allow_weak_reward", "true", "--steps", "1"]
    ppo += ["--batch_size", "2", "--ppo_epochs", "1", "--output_max_length", "30", "--guard", "off"]
    stages = (
        ("sft", sft_training, ["--max_steps", "1"]),
        ("reward", reward_modeling, reward),
        ("ppo", rl_training, ppo),
    )
    for name, script, words in stages:
        run_main(script, [*common, *words, "--output_dir", tmp_path / name], monkeypatch)
        assert json.loads((tmp_path / name / "run.json").read_text())["stop_token_ids"] == [end, EOS]
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {sample["response_ids"][-1] for sample in samples if sample["ended"]} >= {end}
    assert not any({end, EOS} & set(sample["response_ids"][:-1]) for sample in samples)

    run = json.loads((tmp_path / "sft" / "run.json").read_text())
    (tmp_path / "sft" / "run.json").write_text(json.dumps({**run, "stop_token_ids": [EOS, end]}))
    for name, script, words in stages[1:]:
        with pytest.raises(InputError, match="was trained on replies that end with </s>"):
            run_main(script, [*common, *words, "--output_dir", tmp_path / f"{name}-2"], monkeypatch)
    with pytest.raises(InputError, match="was trained on replies that end with </s>"):
        load_models(InferenceArguments(model_name_or_path=base, adapters=[f"SFT={tmp_path / 'sft'}"]))


def test_an_adapter_that_learnt_another_end_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A chat template that was edited between two stages: the reward model would read its score at a token it never saw."""
    tokenizer = family_tokenizer("gemma")
    end = end_of("gemma", tokenizer)
    check_reply_end("sft", {}, (end, EOS), tokenizer)  # of another tool: the arguments decide
    check_reply_end("sft", {"stop_token_ids": [end, 9]}, (end, EOS), tokenizer)
    check_reply_end("sft", {"stage": "sft"}, (EOS, end), tokenizer)
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"sft was trained on replies that end with </s>, .* end with <end_of_turn>;"):
        check_reply_end("sft", {"stop_token_ids": [EOS, end]}, (end, EOS), tokenizer)
    check_reply_end("sft", {"stage": "sft"}, (end, EOS), tokenizer)
    assert "sft was trained by an older version, on replies that end with </s>" in capsys.readouterr().err


def test_a_merged_model_stops_where_its_adapter_learnt_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Qwen base names <|endoftext|> alone: after SFT in chat form the merged model wrote <|im_end|> and went on."""
    base = save_chat_base(tmp_path / "base", "chatml", generation_ends=[EOS])
    adapter = save_sft(base, tmp_path / "sft")
    words = ["--base_model_name", base, "--adapter_path", adapter, "--output_dir", str(tmp_path / "merged")]
    loaded = load_base(ModelArguments(model_name_or_path=base), torch.float32)
    run = {"base_fingerprint": base_fingerprint(loaded), "base_model": base, "prompt_template": "chat"}
    (tmp_path / "sft" / "run.json").write_text(json.dumps({**run, "stop_token_ids": [321, EOS]}))
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", *words])
    merge_lora.main()
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [EOS, 321]

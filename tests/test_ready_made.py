"""--reward_model: any sequence classifier with one label judges as plain transformers does."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    FNetConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
)

import merge_lora
import reward_modeling
import rl_training
from corpus.formats import as_turns, bare
from lora.adapters import read_adapter
from rewards.ready_made import ReadyMade
from runs.memory_plan import ppo_plan
from tests.conftest import make_tokenizer, write_rows
from tests.helpers import PROMPTS, Stages, make_ppo_trainer, run_main
from utils.arguments import ModelArguments
from utils.console import InputError
from utils.files import read_jsonl

CPU = torch.device("cpu")
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m.tool_calls is defined %}, calls{% endif %}"
CHAT += "{{ eos_token }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}<s>" + CHAT
SHAPE = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.3}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2}
KEYS = {"num_key_value_heads": 2, "head_dim": 8}
# what the folder holds: configuration, chat template
MODELS: dict[str, tuple[Any, str | None]] = {
    "llama": (LlamaConfig(**SHAPE, **KEYS, pad_token_id=0), CHAT),
    "qwen2": (Qwen2Config(**SHAPE, num_key_value_heads=2, pad_token_id=None), CHAT),
    "gemma": (GemmaConfig(**SHAPE, **KEYS, pad_token_id=0), NO_SYSTEM),
    "mistral": (MistralConfig(**SHAPE, **KEYS, pad_token_id=None), None),
    "padded with EOS": (LlamaConfig(**SHAPE, **KEYS, pad_token_id=2), None),
    "gpt2": (GPT2Config(**SHAPE, pad_token_id=0), CHAT),
    "bert": (BertConfig(**SHAPE, pad_token_id=0), None),
    "roberta": (RobertaConfig(**SHAPE | {"max_position_embeddings": 130}, pad_token_id=1), None),
    "fnet": (FNetConfig(**SHAPE, pad_token_id=0, type_vocab_size=2), None),  # of its rows padding is a part
}
PAIRED = ("bert", "roberta", "fnet")
DIALOGUE = [
    {"role": "system", "content": "Be kind.", "tool_calls": None},
    {"role": "user", "content": "Hi", "tool_calls": None},
    {"role": "assistant", "content": "Hello", "tool_calls": None},
    {"role": "user", "content": "Tea?", "tool_calls": None},
]
REPLIES = [("Hi", "Hello."), ("What is the capital of France?", "Paris is the capital of France."), ("苹果", "")]


def paired_tokenizer() -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] a [SEP] b [SEP], with token types."""
    core = make_tokenizer().backend_tokenizer
    core.add_special_tokens(["[CLS]", "[SEP]"])
    ids = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]", model_input_names=names
    )


def save_classifier(folder: Path, name: str, **changes: Any) -> str:
    """A random classifier with one label; its tokenizer pads with what the configuration says, or with nothing."""
    config, template = MODELS[name]
    config = type(config)(**config.to_dict() | {"num_labels": 1} | changes)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # GPT-2 and BERT start their heads at 0 or near it
        if parameter.dim() == 2 and parameter.std() < 0.2:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer = paired_tokenizer() if name in PAIRED else make_tokenizer()
    tokenizer.chat_template = template
    if config.pad_token_id is None:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {name: save_classifier(folder / name, name) for name in MODELS}


def ready(folder: str, batch_size: int = 8, template: str = "Q: {prompt}\nA: ", **arguments: Any) -> ReadyMade:
    model = ReadyMade(ModelArguments(folder, template, **arguments), batch_size, CPU)
    model.load()
    return model


@torch.no_grad()
def plain_score(folder: str, *texts: str, **options: Any) -> float:
    """Of a text, or a pair of texts, with all its special tokens spelled out or put in by the tokenizer of a pair."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(*texts, add_special_tokens=len(texts) == 2, return_tensors="pt")
    return float(model(**inputs).logits[0, 0])


# ---- Scores ----


def by_hand(name: str, prompt: str, reply: str) -> tuple[str, ...]:
    if name in PAIRED:
        return prompt, reply
    if name in ("mistral", "padded with EOS"):
        return (f"Q: {prompt}\nA: {reply}</s>",)
    return ("<s>" * (name == "gemma") + f"[user] {prompt}</s>\n[assistant] {reply}</s>\n",)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_plain_transformers_alone_and_in_a_batch(
    folders: dict[str, str], name: str, capsys: pytest.CaptureFixture
) -> None:
    wanted = [plain_score(folders[name], *by_hand(name, *reply)) for reply in REPLIES]
    assert max(wanted) - min(wanted) > 0.05
    model = ready(folders[name])
    assert model(*zip(*REPLIES, strict=True)) == pytest.approx(wanted, abs=1e-4)
    assert [model([prompt], [reply])[0] for prompt, reply in REPLIES] == pytest.approx(wanted, abs=1e-4)
    said = capsys.readouterr().err
    assert ("padding changes its scores; it judges one reply at a time" in said) == (name == "fnet")
    assert ("reads the score at the token before that" in said) == (name == "padded with EOS")
    form = (
        "as a pair" if name in PAIRED else "chat template\n" if MODELS[name][1] else r"as 'Q: {prompt}\nA: ', the reply"
    )
    assert form in said


def test_a_dialogue_keeps_its_turns(folders: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    """As messages, in which a data set has put None where only other rows have an entry."""
    replies = [[{"role": "assistant", "content": "Yes."}]]
    turns = "[user] Hi</s>\n[assistant] Hello</s>\n[user] Tea?</s>\n[assistant] Yes.</s>\n"
    texts = {
        "llama": ("[system] Be kind.</s>\n" + turns,),
        "gemma": ("<s>" + turns.replace("Hi", "Be kind.\n\nHi"),),
        "mistral": ("Be kind.\n\nQ: Hi\nA: Hello\n\nQ: Tea?\nA: Yes.</s>",),
        "bert": ("Be kind.\n\nHi\n\nHello\n\nTea?", "Yes."),
    }
    for name, text in texts.items():
        capsys.readouterr()
        model = ready(folders[name])
        model.check_prompts([None, DIALOGUE])
        assert model([DIALOGUE], replies) == pytest.approx([plain_score(folders[name], *text)], abs=1e-4), name
        assert capsys.readouterr().err.count("takes no system message") == (name == "gemma")


def test_a_dialogue_that_the_template_refuses_is_told_before_the_run(folders: dict[str, str]) -> None:
    tools = [{"role": "tool", "content": "3"}]
    model = ready(folders["llama"])
    model.tokenizer.chat_template = (
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}x"
    )
    model.check_prompts([None, DIALOGUE])
    with pytest.raises(
        InputError, match=r"the chat template of --reward_model .*llama cannot write .*: no tools here;"
    ):
        model.check_prompts([DIALOGUE, tools])


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "roberta", "gpt2"])
def test_of_a_long_text_the_reply_stays(folders: dict[str, str], name: str, capsys: pytest.CaptureFixture) -> None:
    """128 tokens; a reply of 130 bytes is too long alone."""
    model = ready(folders[name])
    tokenizer, reply = model.tokenizer, "the cat sat on the mat"
    whole = {prompt: model.encode(prompt, reply)["input_ids"] for prompt in ("xyz", "xyz" * 60)}
    assert [len(ids) for ids in whole.values()] == [len(whole["xyz"]), 128]
    ends = {prompt: tokenizer.decode(ids).partition("xyz")[2].replace("xyz", "") for prompt, ids in whole.items()}
    assert ends["xyz" * 60].endswith(ends["xyz"])
    assert reply in ends["xyz"]
    alone = model.encode("xyz", "." * 200 + "!")["input_ids"]
    assert len(alone) <= 128
    assert "!" in tokenizer.decode(alone)[-20:]
    scores = model(["xyz" * 60, "xyz", "xyz" * 50], [reply, "." * 200, reply])
    assert torch.tensor(scores).isfinite().all()
    assert capsys.readouterr().err.count("tokens, of which it reads the last 128") == 1


def test_type_of_the_weights(folders: dict[str, str], tmp_path: Path) -> None:
    exact, half = (ready(folders["llama"], dtype=dtype) for dtype in ("auto", "bfloat16"))
    assert (exact.model.dtype, half.model.dtype) == (torch.float32, torch.bfloat16)
    assert half(["Hi"], ["Hello."]) == pytest.approx(exact(["Hi"], ["Hello."]), abs=0.1)
    assert not any(parameter.requires_grad for parameter in half.model.parameters())
    assert not half.model.training
    half.model.save_pretrained(tmp_path)
    half.tokenizer.save_pretrained(tmp_path)
    assert ready(str(tmp_path)).model.dtype == torch.float32  # on a CPU, where bfloat16 is slow


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_in_4_bit_the_head_stays_whole(folders: dict[str, str], name: str) -> None:
    model = ready(folders[name], load_in_4bit=True)  # --reward_load_in_4bit
    kinds = {where: type(module) for where, module in model.model.named_modules()}
    assert kinds["score" if name == "llama" else "classifier"] is torch.nn.Linear
    assert bitsandbytes.nn.Linear4bit in kinds.values()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["score", "classifier"],
    )
    wanted = [plain_score(folders[name], *by_hand(name, *reply), quantization_config=config) for reply in REPLIES]
    assert model(*zip(*REPLIES, strict=True)) == pytest.approx(wanted, abs=1e-3)


# ---- What is no such model ----


def broken(folders: dict[str, str], stages: Stages, folder: Path, kind: str) -> str:
    """A folder with a fault, by name."""
    if kind == "adapter":
        return stages.reward
    if kind == "causal":
        return stages.base
    if kind == "missing":
        return str(folder / "missing")
    shutil.copytree(folders["llama"], folder / kind)
    if kind == "labels":
        save_classifier(folder / kind, "llama", num_labels=3)
    if kind == "head":  # transformers fills it with random numbers, and only warns
        weights = load_file(folder / kind / "model.safetensors")
        save_file(
            {name: weights[name] for name in weights if name != "score.weight"}, folder / kind / "model.safetensors"
        )
    if kind == "tokenizer":
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / kind / file).unlink()
    if kind == "template":  # which only the last prompt of the run does not suit
        (folder / kind / "chat_template.jinja").write_text(
            "{% if messages|length > 2 %}{{ raise_exception('two') }}{% endif %}x"
        )
    if kind == "pickle":
        (folder / kind / "model.safetensors").rename(folder / kind / "pytorch_model.bin")
    if kind == "infinite":
        weights = load_file(folder / kind / "model.safetensors")
        weights["score.weight"].fill_(torch.nan)
        save_file(weights, folder / kind / "model.safetensors", metadata={"format": "pt"})
    return str(folder / kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "is an adapter; give it as --reward_model_lora_path, or where it stands on another base"),
        ("causal", "is no sequence classifier: its config.json names LlamaForCausalLM, so its score head would be"),
        ("missing", "there is no folder .*missing; check --reward_model"),
        ("no/such_model", "cannot load the reward model no/such_model: "),
        ("labels", "has 3 labels, and a reward is one number; give a model with one label"),
        ("head", "has no weights for score.weight, and would judge by random numbers; give a model that was trained"),
        ("tokenizer", "cannot load a tokenizer from --reward_model "),
        ("template", "the chat template of --reward_model .* cannot write a dialogue of the prompt data: two; leave"),
        ("pickle", "cannot load the reward model .*: there is no .safetensors file in it"),
        ("infinite", "on the prompt .* and the reply '' gives nan; it has to give a finite number for every reply"),
    ],
)
def test_a_wrong_model_is_one_line(
    folders: dict[str, str],
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    message: str,
) -> None:
    model = kind if "/" in kind else broken(folders, stages, tmp_path, kind)
    words = command(stages, tmp_path, "--reward_model", model)
    monkeypatch.setattr(rl_training, "load_base", None)  # told before the base is read
    with pytest.raises(InputError, match=message) as stopped:
        run_main(rl_training, words, monkeypatch)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta"])
def test_a_device_that_is_not_there(
    folders: dict[str, str], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    words = command(stages, tmp_path, "--reward_model", folders["llama"], "--reward_device", device)
    with pytest.raises(InputError, match=f"--reward_device {device} cannot be used: "):
        run_main(rl_training, words, monkeypatch)


# ---- Runs ----


def command(stages: Stages, folder: Path, *more: str) -> list[str]:
    """A run of stage 3 in folder/run, on prompts of which one is a dialogue."""
    rows = [*({"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS), {"messages": DIALOGUE}]
    data = write_rows(folder / "prompts.jsonl", rows)
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--prompt_template", "{prompt}="]
    words += ["--dataset", data, "--steps", "4", "--save_freq", "2", "--batch_size", "4", "--mini_batch_size", "2"]
    words += ["--ppo_epochs", "1", "--output_max_length", "8", "--max_length", "64", "--learning_rate", "0.01"]
    return [*words, "--guard", "warn", "--guard_freq", "2", *more, "--output_dir", str(folder / "run")]


@pytest.fixture(scope="module")
def run(folders: dict[str, str], stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run on a ready-made model and a function."""
    folder = tmp_path_factory.mktemp("ready_made")
    words = command(stages, folder, "--reward_model", folders["llama"], "--reward_device", "cpu")
    words[-2:-2] = ["--reward_function", "tests.judges:length"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_main(rl_training, words, monkeypatch)
    return words, folder / "run"


def test_its_score_is_a_part_of_the_score(run: tuple[list[str], Path], folders: dict[str, str]) -> None:
    samples = read_jsonl(str(run[1] / "samples.jsonl"))
    assert len(samples) == 4 * 4
    for row in samples:
        if row["prompt"].count("=") == 1:  # of one turn
            prompt = row["prompt"].removesuffix("=")
            wanted = plain_score(folders["llama"], *by_hand("llama", prompt, row["response"]))
            assert row["ready_made score"] == pytest.approx(wanted, abs=1e-4)
        assert row["score"] == pytest.approx(row["ready_made score"] + row["length score"], abs=1e-4)
    assert sum(row["prompt"].count("=") == 1 for row in samples) >= 12
    for line in [line for line in read_jsonl(str(run[1] / "metrics.jsonl")) if "score_mean" in line]:
        mine = [row["ready_made score"] for row in samples if row["iteration"] == line["iteration"]]
        assert line["reward/ready_made/mean"] == pytest.approx(sum(mine) / 4, abs=1e-4)
    record = json.loads((run[1] / "run.json").read_text(encoding="utf-8"))
    assert list(record["score_statistics"]) == ["ready_made", "length"]
    assert list(record["adapters"]) == ["sft_model_lora_path", "reward_model"]
    assert not any("score" in name for name in load_file(run[1] / "adapter_model.safetensors"))


def test_a_resumed_run_is_the_run(run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's folder may have moved; the type of its weights may not change, nor they, nor may it be left out."""
    words, whole = run
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    moved = words.index("--reward_model") + 1
    shutil.copytree(words[moved], tmp_path / "moved")
    words = [*words[:-1], str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    words[moved] = str(tmp_path / "moved")
    monkeypatch.setattr("rewards.ready_made.say", lambda text: None)
    with pytest.raises(InputError, match=r"--reward_dtype was 'auto' in the run of .*, and is 'bfloat16' now"):
        run_main(rl_training, [*words, "--reward_dtype", "bfloat16"], monkeypatch)
    without = [*words[: moved - 1], *words[moved + 3 :]]
    with pytest.raises(
        InputError, match=r"--reward_model was '.*llama' in the run of .*, and is None now, which a run"
    ):
        run_main(rl_training, without, monkeypatch)
    file = tmp_path / "moved" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"score.weight": weights["score.weight"] + 0.1}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"--reward_model was .*, and is one with other weights now"):
        run_main(rl_training, words, monkeypatch)
    save_file(weights, file, metadata={"format": "pt"})
    run_main(rl_training, words, monkeypatch)
    for name in ("adapter_model.safetensors", "value_head.safetensors", "samples.jsonl", "ppo_state.json"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_our_own_reward_adapter_as_a_classifier(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapter that it was made of, in a prompt template: the same score twice, and other weights for them."""
    monkeypatch.setattr(sys, "argv", ["merge_lora.py", "--base_model_name", stages.base, "--adapter_path"])
    sys.argv += [stages.reward, "--output_dir", str(tmp_path / "judge"), "--as_classifier"]
    merge_lora.main()
    model = ReadyMade(ModelArguments(str(tmp_path / "judge"), "{prompt}="), 8, CPU)
    model.load()
    trainer = make_ppo_trainer(
        stages,
        tmp_path / "run",
        functions=[model.as_function()],
        reward_weights="2,3",
        steps=1,
        missing_eos_penalty=0.0,
    )
    trainer.train()
    same = 0
    for row in trainer.samples:
        text = row["prompt"] + "=" + row["response"]
        assert row["score"] == pytest.approx(2 * row["reward_model score"] + 3 * row["ready_made score"], abs=1e-4)
        if (
            make_tokenizer()(text)["input_ids"][-len(row["response_ids"]) + 1 :] == row["response_ids"][:-1]
            and row["ended"]
        ):
            assert row["ready_made score"] == pytest.approx(row["reward_model score"], abs=1e-4)
            same += 1
    assert same >= 2


def test_the_plan_counts_it(folders: dict[str, str], stages: Stages) -> None:
    args = rl_training.PPOArguments(output_dir="unused", use_cpu=True, max_length=48, output_max_length=16)
    sft = read_adapter(stages.sft, "--sft")
    held = {}
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        judge = ReadyMade(ModelArguments(folders["llama"], dtype=dtype), 4, CPU)
        held = ppo_plan(ModelArguments(stages.base), args, sft, None, torch.float32, judge).held
        weights = 330 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 2 * 32) + 32 + 32
        assert held["reward model"] == pytest.approx(size * weights, abs=64)  # and RoPE's frequencies
    elsewhere = ReadyMade(ModelArguments(folders["llama"]), 4, torch.device("meta"))
    assert "reward model" not in ppo_plan(ModelArguments(stages.base), args, sft, None, torch.float32, elsewhere).held


def test_names_stay_apart(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the user's that is called as the model's part is."""
    monkeypatch.setattr("tests.judges.ready_made", lambda prompt, response: 0, raising=False)
    args = rl_training.PPOArguments(output_dir="unused", use_cpu=True, reward_function="tests.judges:ready_made")
    model = ReadyMade(ModelArguments(folders["llama"]), 4, CPU)
    functions, _ = rl_training.read_functions(args, model)
    assert [function.name for function in functions] == ["ready_made", "tests.judges:ready_made"]


# ---- The card ----

PAIRS = [
    {
        "prompt": f"What about {word}?",
        "chosen": f"The {word} is very good today, I think so.",
        "rejected": f"No {word} here.",
    }
    for word in (
        "tea",
        "soup",
        "cats",
        "dogs",
        "bread",
        "rice",
        "the park",
        "the mat",
        "Paris",
        "coffee",
        "milk",
        "fish",
    )
]


def card_command(folder: Path, model: str) -> list[str]:
    rows = [
        *PAIRS[:-1],
        {"chosen": [*bare(DIALOGUE), *said("Yes, gladly.")], "rejected": [*bare(DIALOGUE), *said("No.")]},
    ]
    rows = [
        {side: row[side] if "prompt" not in row else as_turns(row["prompt"]) + said(row[side]) for side in SIDES}
        for row in rows
    ]
    data = write_rows(folder / "pairs.jsonl", rows)
    words = ["--card_only", "true", "--reward_model", model, "--dataset", data, "--eval_dataset", data]
    return [*words, "--max_length", "120", "--output_dir", str(folder / "card")]


SIDES = ("chosen", "rejected")


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_card_by_hand(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, name: str
) -> None:
    """Its pairs and the probe with an empty reply, scored by plain transformers."""
    run_main(reward_modeling, card_command(tmp_path, folders[name]), monkeypatch)
    card = json.loads((tmp_path / "card" / "reward_card.json").read_text(encoding="utf-8"))
    right = good = 0
    for row in PAIRS[:-1]:
        chosen, rejected, empty = (
            plain_score(folders[name], *by_hand(name, row["prompt"], text))
            for text in (row["chosen"], row["rejected"], "")
        )
        right, good = right + (chosen > rejected), good + (chosen > empty)
    texts = {
        "llama": "[system] Be kind.</s>\n[user] Hi</s>\n[assistant] Hello</s>\n[user] Tea?</s>\n[assistant] {}</s>\n"
    }
    pair = ("Be kind.\n\nHi\n\nHello\n\nTea?",)
    chosen, rejected, empty = (
        plain_score(folders[name], *((texts[name].format(text),) if name in texts else (*pair, text)))
        for text in ("Yes, gladly.", "No.", "")
    )
    assert card["accuracy"] == pytest.approx((right + (chosen > rejected)) / 12)
    assert card["probes"]["empty"] == pytest.approx((good + (chosen > empty)) / card["probe_counts"]["empty"])
    assert card["probe_counts"]["empty"] == 12
    assert (card["reward_model"], card["eval_pairs"]) == (folders[name], 12)
    assert (tmp_path / "card" / "reward_card.png").exists()
    assert "the reward model FAILED: " in capsys.readouterr().err  # its weights are random


def test_stage_3_reads_the_card(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    model = ready(folders["llama"])
    model.check_card(None, allow_weak=False)
    said_of_it = capsys.readouterr().err
    assert "warning: nobody has tried the reward model" in said_of_it
    assert f"--card_only true --reward_model {folders['llama']} " in said_of_it
    with pytest.raises(
        InputError, match=r"--reward_card .* has no reward_card.json in it; `python reward_modeling.py --card"
    ):
        model.check_card(str(tmp_path), allow_weak=False)
    card = {"score_mean": 0.0, "score_std": 1.0, "passed": False, "failed": ["probe empty 0.1"]}
    card |= {"reward_model": folders["llama"], "fingerprint": model.fingerprint()}
    file = tmp_path / "reward_card.json"
    file.write_text(json.dumps(card))
    refused = (
        "the reward model .*llama did not pass its reward card: probe empty 0.1; take another one, or go on at your own"
    )
    with pytest.raises(InputError, match=refused):
        model.check_card(str(tmp_path), allow_weak=False)
    model.check_card(str(tmp_path), allow_weak=True)
    assert "warning: the reward model" in capsys.readouterr().err
    file.write_text(json.dumps(card | {"passed": True}))
    model.check_card(str(tmp_path), allow_weak=False)
    assert capsys.readouterr().err == ""
    file.write_text(json.dumps(card | {"passed": True, "fingerprint": "other"}))
    model.check_card(str(tmp_path), allow_weak=False)
    assert "is of other weights, or of another type of them" in capsys.readouterr().err
    file.write_text(json.dumps(card | {"reward_model": "other/model", "passed": True, "fingerprint": "other"}))
    with pytest.raises(InputError, match=r"is that of other/model, and not of --reward_model .*llama"):
        model.check_card(str(tmp_path), allow_weak=False)


def test_the_run_is_refused_by_the_card(
    folders: dict[str, str], stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"score_mean": 0.0, "score_std": 1.0, "passed": False, "failed": ["probe empty 0.1"]}
    (tmp_path / "reward_card.json").write_text(json.dumps(card))
    monkeypatch.setattr(rl_training, "load_base", None)
    words = command(stages, tmp_path, "--reward_model", folders["llama"], "--reward_card", str(tmp_path))
    with pytest.raises(InputError, match=r"did not pass its reward card: probe empty 0.1"):
        run_main(rl_training, words, monkeypatch)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--card_only true", "--card_only true and --reward_model NAME go together"),
        ("--model_name a --reward_model b", "--card_only true and --reward_model NAME go together"),
        ("--card_only true --reward_model b --model_name a", "needs no base; leave out --model_name_or_path"),
    ],
)
def test_a_card_alone_or_a_training(monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_main(reward_modeling, words.split(), monkeypatch)

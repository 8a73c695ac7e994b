"""Tiny models, a tokenizer and data, all made in memory: no hub, no GPU, no files from elsewhere."""

import atexit
import gc
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests are the same on a machine with GPUs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()  # nothing is left in, or read from, the user's own caches
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read when trackio is imported, by whichever test comes first

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from tests.helpers import Stages

torch.set_num_threads(1)
# What a shell runs in the background ignores Ctrl-C, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for own_cache in ("HF_DATASETS_CACHE", "TRACKIO_DIR"):
    atexit.register(shutil.rmtree, os.environ[own_cache], ignore_errors=True)

TEXTS = [
    "问：你好吗？\n\n答：我很好，谢谢你！",
    "What is the capital of France? Paris is the capital of France.",
    "苹果 香蕉 西瓜 火锅 面条 熊猫 很好吃 很可爱",
    "the cat sat on the mat and the dog ran in the park, didn't it?",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def make_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few sentences: it takes any text and gives it back."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(family: str, seed: int = 0, vocabulary: int = 320) -> PreTrainedModel:
    """Random model of two layers with large enough weights that different adapters give visibly different outputs."""
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        **ids,
    }
    grouped = {**shape, "num_key_value_heads": 2, "head_dim": 8}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**shape, "num_key_value_heads": 2}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**grouped))
    elif family == "glm":
        model = GlmForCausalLM(GlmConfig(**grouped))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1, **ids
            )
        )
    else:
        model = BloomForCausalLM(
            BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1, **ids)
        )
    return model.eval()


# Files that train, start processes or go through whole scripts: marked slow, and started in this order, the longest first,
# so that two workers end together.
SLOW = (
    *("two_processes", "resume", "preemption", "disk_failures", "families", "nonfinite", "every_argument"),
    *(
        "input_errors",
        "foreign_adapters",
        "reward_training",
        "guarded_run",
        "trackers",
        "article",
        "logging",
        "chat",
        "quiet",
    ),
    *("security", "gold", "critic", "four_bit", "baichuan", "baichuan_errors", "allocator", "fuzz", "launch", "slurm"),
)


def slowness(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return SLOW.index(name) if name in SLOW else len(SLOW)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=slowness)
    for item in items:
        if slowness(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Each training collects garbage several times, and looked each time, for half a second, at all that is imported."""
    gc.freeze()


FAMILIES = ("llama", "qwen3", "gpt2", "gpt_neox", "bloom", "glm")


def save_base(folder: Path, family: str = "llama", seed: int = 0) -> str:
    make_model(family, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


WORDS = ["苹果", "香蕉", "西瓜", "tea", "coffee", "soup", "熊猫", "cats", "dogs", "火锅", "bread", "rice"]


def write_sft(path: Path) -> str:
    rows = [{"prompt": f"{word} 好吗？", "response": f"{word} 很好" + "吃" * (i % 4)} for i, word in enumerate(WORDS)]
    return write_rows(path, rows)


def write_preferences(path: Path) -> str:
    pairs = [
        {"prompt": f"What about {word}?", "chosen": f"{word} is good!" + "!" * (i % 3), "rejected": "no" * (1 + i % 5)}
        for i, word in enumerate(WORDS * 2)
    ]
    return write_rows(path, pairs)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of small SFT and preference files with the usual column names."""
    folder = tmp_path_factory.mktemp("data")
    return {"sft": write_sft(folder / "sft.jsonl"), "preferences": write_preferences(folder / "preferences.jsonl")}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> "Stages":
    """Paths of a base, an SFT adapter and a reward adapter, all with random weights; a test file may change them."""
    from tests.helpers import make_stages, save_lively_base  # which imports this module

    folder = tmp_path_factory.mktemp("stages")
    return make_stages(save_lively_base(folder / "base"), folder)

"""Optional last stage: base + any adapter -> a standalone model, for serving.

    python merge_lora.py --base_model_name MODEL --adapter_path output/ppo/best --output_dir output/ppo_merged
    python merge_lora.py --base_model_name MODEL --adapter_path output/reward --output_dir output/judge --as_classifier

The three stages never merge: this is for programs that take whole models only.  It runs on the CPU, and holds the base
once.  What was written is loaded again with plain transformers and compared with base + adapter before the folder gets
its name, so an output folder that exists is a model that was checked.

A reward adapter becomes a one-label sequence classifier.  The classifiers of transformers read the score at the last
token whose id is not the pad id, not by the attention mask.  So where a tokenizer pads with EOS, which is the very token
to read, the classifier and its tokenizer get a pad token of their own.
"""

import utils.quiet  # isort: skip  # noqa: F401 - before any library

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from corpus.chat_template import generation_stop_ids, plain_chat_template
from corpus.formats import Prompt, as_turns
from corpus.tokens import encode_prompt
from lora.adapters import POLICY, SavedAdapter, attach_adapter, check_adapter, read_adapter
from lora.base_model import bare_layer, load_base, load_tokenizer
from lora.heads import add_hidden_state_fn, add_score_head, score_fn
from reporting.model_card import write_model_card
from rewards.reward_model import member_folders
from runs.run_files import run_record
from utils.arguments import DEFAULT_TEMPLATE, ModelArguments, check_new_folder, parse_arguments
from utils.batching import pad_right
from utils.console import InputError, one_line, run_script, say
from utils.files import folder_when_done, write_json

# Texts on which the saved model is compared with base + adapter: of different lengths, so that a batch has padding.
PROBES = (
    "Yes.",
    "问：苹果好吃吗？\n\n答：",
    "What is the capital of France?",
    "The cat sat on the mat, and the dog ran away.",
)
# Dialogues on which a chat template has to give the ids that the toolkit gives.
DIALOGUES: tuple[Prompt, ...] = (
    *PROBES,
    " a line\n\nand another \n",
    [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant", "user"), PROBES, strict=True)
    ],
)
# Largest difference allowed, as a share of the largest logit or score.  In 16 bits every merged weight is rounded once
# more than base and adapter were, and the layers add that up.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass
class MergeArguments(ModelArguments):
    """What to merge, and where to."""

    # The adapter's own: a merge formats no prompt.
    prompt_template: str = field(default=DEFAULT_TEMPLATE, init=False)
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights that are written: auto (the one that the base is stored in), or one of these.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    load_in_4bit: bool = field(default=False, init=False)  # what is rounded to 4 bit cannot take a merge
    adapter_path: str | None = field(default=None, metadata={"help": "Adapter of any stage: SFT, reward or PPO."})
    output_dir: str = field(default="output/merged", metadata={"help": "Folder for the standalone model."})
    as_classifier: bool = field(
        default=False, metadata={"help": "Write a reward adapter as a sequence classifier with one label, the score."}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_kind(adapter: SavedAdapter, as_classifier: bool) -> None:
    """Raise InputError where the adapter cannot become the wanted kind of model."""
    if adapter.has_score_head and not as_classifier:
        raise InputError(
            f"--adapter_path {adapter.path} is a reward adapter; add --as_classifier to write it as a sequence classifier"
        )
    if as_classifier and not adapter.has_score_head:
        raise InputError(
            f"--adapter_path {adapter.path} holds no score head, so it is no reward adapter; leave out --as_classifier"
        )
    members = len(member_folders(adapter.path))
    if members > 1:
        say(
            f"warning: {adapter.path} is an ensemble of {members} adapters; the classifier is the first of them alone, "
            "without the penalty for disagreement"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What a model says
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def probe_logits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Logits of every token of PROBES, float32 [tokens, V]; one text at a time, so that padding plays no part."""
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROBES]
    return torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float() for ids in rows])


def probe_batch(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """PROBES as the reward model reads replies: EOS at the end, padded on the right to one batch."""
    rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in PROBES]
    ids, mask = pad_right(rows, tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def adapter_outputs(model: PeftModel, tokenizer: PreTrainedTokenizerBase, as_classifier: bool) -> Tensor:
    """Logits or scores of PROBES from base + adapter, not merged."""
    if not as_classifier:
        return probe_logits(model, tokenizer)
    batch = probe_batch(tokenizer)
    return model(**batch, hidden_state_fn=score_fn(batch["attention_mask"], POLICY))


@torch.no_grad()
def saved_outputs(folder: str, as_classifier: bool, trust_remote_code: bool) -> Tensor:
    """Logits or scores of PROBES from a saved model, by transformers alone: its own classes, tokenizer and pooling."""
    auto = AutoModelForSequenceClassification if as_classifier else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not as_classifier:
        return probe_logits(model, tokenizer)
    return model(**probe_batch(tokenizer)).logits[:, 0].float()


def largest_difference(expected: Tensor, found: Tensor, dtype: torch.dtype) -> float:
    """Largest difference, as a share of the largest expected number (of 1 where all are smaller).

    Raises InputError when it is too large for `dtype`, or not a number.
    """
    scale = max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max()) / scale
    if not difference <= TOLERANCE[dtype]:  # nan compares as False
        raise InputError(
            f"the saved model differs from base + adapter by {difference:.1e} of its largest output, more than the "
            f"{TOLERANCE[dtype]:.0e} that {dtype} explains (does the base use a layer twice?), so nothing was written; "
            "keep base and adapter apart"
        )
    return difference


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


def merge(model: PeftModel, path: str) -> PreTrainedModel:
    """The base with the adapter in its weights.  Raises InputError for an adapter that has no place there.

    An output embedding that is tied to the input's gets a matrix of its own first, where the adapter does not change both in
    the same way: else each would get the changes of both.
    """
    base = model.get_base_model()
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    of_input, of_output = map(bare_layer, ends)
    own_tokens = isinstance(ends[1], TrainableTokensWrapper) and ends[1].token_adapter.tied_adapter is None
    if of_input.weight is of_output.weight and (own_tokens or any(isinstance(end, LoraLayer) for end in ends)):
        of_output.weight = nn.Parameter(of_output.weight.detach().clone(), requires_grad=False)
    try:
        with warnings.catch_warnings():  # PEFT's, about matrices that were tied
            warnings.simplefilter("ignore", UserWarning)
            return model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # lora_bias where the base's layers have no bias
        raise InputError(f"the adapter {path} cannot be merged into this base: {one_line(error)}") from error


def to_classifier(
    merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> PreTrainedModel:
    """The decoder and the score head of `merged` as the family's own sequence classifier.

    May give `tokenizer` a pad token.  Raises InputError when transformers has no such classifier for the family.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if tokenizer.pad_token_id >= merged.get_input_embeddings().num_embeddings:
            merged.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)  # masked: any row will do
    config = merged.config
    config.num_labels = 1
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    try:
        with torch.device("meta"):  # an empty shell: decoder and head are put in below
            shell = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise InputError(f"transformers has no sequence classifier for {type(merged).__name__}") from error
    setattr(shell, shell.base_model_prefix, merged.base_model)
    shell.score = merged.score.to(merged.dtype)
    return shell.eval()


def add_chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Let the tokenizer write dialogues in the prompt `template` of the adapter; a chat template of its own is kept.

    Says in one line where messages are not what the adapter was trained on.
    """
    if template in (None, "chat"):
        return
    if tokenizer.chat_template:
        say(
            f"note: the tokenizer's own chat template is kept, but the adapter was trained with the prompt template "
            f"{template!r}; write prompts in that one"
        )
        return
    apart, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((place for place in range(len(whole)) if whole[place : place + len(apart)] == apart), 0)
    front = "".join(tokenizer.convert_ids_to_tokens(whole[:place]))
    # SentencePiece puts a space in front of a text, but not behind a special token
    for start in (front, f"{front} "):
        tokenizer.chat_template = plain_chat_template(template, start)
        if all(
            tokenizer.apply_chat_template(as_turns(prompt), add_generation_prompt=True)["input_ids"]
            == encode_prompt(prompt, template, tokenizer)
            for prompt in DIALOGUES
        ):
            return
    tokenizer.chat_template = None
    say(
        f"note: no chat template gives this tokenizer's ids of the prompt template {template!r}, so there is none; write "
        "prompts in that one"
    )


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: MergeArguments,
    stop_ids: Sequence[int],
    folder: str,
) -> None:
    """Weights, configuration and tokenizer; a causal model keeps the generation defaults of its base.

    stop_ids: what ended a reply when the adapter was trained; generate() has to end there too.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if args.as_classifier:
        return
    try:
        defaults = GenerationConfig.from_pretrained(args.model_name_or_path)
    except OSError:  # the base has none
        defaults = model.generation_config
    own = generation_stop_ids(defaults)
    if not set(stop_ids) <= set(own):
        defaults.eos_token_id = list(dict.fromkeys([*own, *stop_ids]))
    defaults.save_pretrained(folder)  # load_base took them away


def main() -> None:
    # ---- Arguments ----
    (args,) = parse_arguments((MergeArguments,), description="Base + adapter -> standalone model.")
    target = os.path.realpath(args.output_dir)
    check_new_folder(args.output_dir)
    adapter = read_adapter(args.adapter_path, "--adapter_path", alone=True)
    check_kind(adapter, args.as_classifier)
    args.prompt_template = adapter.run.get("prompt_template")

    # ---- Tokenizer ----
    tokenizer = load_tokenizer(args)

    # ---- Model ----
    base = load_base(args, args.dtype)  # "auto" is transformers' own word for the type that the weights are stored in
    check_adapter(adapter, "--adapter_path", args.as_classifier, args.prompt_template, base)
    if adapter.run.get("arguments", {}).get("load_in_4bit"):
        say("note: the adapter was trained on the base in 4 bit; it is merged into the base in full precision")
    record = run_record("merged", base, args, adapter=adapter.path, adapter_stage=adapter.run.get("stage"))
    if args.as_classifier:
        add_hidden_state_fn(base)
        add_score_head(base)
    model = attach_adapter(base, adapter, adapter.config).eval()
    expected = adapter_outputs(model, tokenizer, args.as_classifier)

    # ---- Merge ----
    merged = merge(model, adapter.path)
    dtype = base.dtype
    if args.as_classifier:
        merged = to_classifier(merged, tokenizer, args.trust_remote_code)

    # ---- Save ----
    add_chat_template(tokenizer, args.prompt_template)
    with folder_when_done(target) as folder:
        save_model(merged, tokenizer, args, adapter.run.get("stop_token_ids", ()), folder)
        del base, model, merged  # the saved model is loaded next: memory for one is enough
        difference = largest_difference(
            expected, saved_outputs(folder, args.as_classifier, args.trust_remote_code), dtype
        )
        record["largest_difference"] = difference
        write_json(record, folder, "run.json")
        write_model_card(folder, record)
    say(
        f"largest difference between base + adapter and the saved model: {difference:.1e} of the largest output "
        f"({dtype})\nmerged model: {args.output_dir}"
    )


if __name__ == "__main__":
    run_script(main)

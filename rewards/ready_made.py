"""Ready-made reward models: sequence classifiers with one label that somebody else trained, as rewards of stage 3.

Such a model stands beside the base and judges texts, in a tokenizer and a form of its own:

    it has a chat template                      the dialogue, the reply as its last turn
    none, but a token between two texts (BERT)  prompt and reply as a pair
    neither                                     prompt in the run's --prompt_template, reply, EOS

A score is what transformers gives for that text alone, whatever it is batched with.
"""

import copy
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from corpus.chat_template import chat_text, moves_system
from corpus.formats import Message, Prompt, as_turns, assistant, message_text
from corpus.tokens import format_prompt
from lora.base_model import base_config, is_missing_folder, load_safetensors, sample_hash
from rewards.reward_card import CARD_FILE, read_card
from rewards.reward_functions import RewardFunction
from rewards.scores import check_card
from utils.arguments import ModelArguments
from utils.batching import pad_right
from utils.console import InputError, one_line, say

NAME = "ready_made"  # of its part of a score
WHAT = "the reward model"
NO_LIMIT = 10**6  # a tokenizer that knows no longest text says 1e30
HEADS = ["score", "classifier"]  # what transformers calls them
BLANK_LINE = "{prompt}\n\n"


class ReadyMade:
    """A sequence classifier with one label, in the form of a reward function: (prompts, completions) -> scores."""

    def __init__(self, model_args: ModelArguments, batch_size: int, device: torch.device) -> None:
        """Reads configuration and tokenizer; `load` reads the weights.

        model_args: name, type, 4 bit, and the prompt template for a model without one; batch_size: texts in a pass; device:
        where it goes.  Raises InputError for what is no such classifier.
        """
        self.model_args, self.batch_size, self.device = model_args, batch_size, device
        self.where = model_args.model_name_or_path
        self.config = one_label_config(model_args)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.where, truncation_side="left")
        except Exception as error:  # the tokenizers library raises this very class for a file that it cannot read
            raise InputError(f"cannot load a tokenizer from --reward_model {self.where}: {one_line(error)}") from error
        is_pair = self.tokenizer.sep_token_id is not None
        self.form = "chat" if self.tokenizer.chat_template else "pair" if is_pair else "joined"
        given = model_args.prompt_template
        self.template = BLANK_LINE if given == "chat" or is_pair else given
        self.model: PreTrainedModel | None = None
        self.noted: set[str] = set()

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights; auto is float32 on a CPU, else the one that they are stored in."""
        if self.model_args.dtype != "auto":
            return getattr(torch, self.model_args.dtype)
        return torch.float32 if self.device.type == "cpu" else self.config.dtype or torch.float32

    @property
    def writes_date(self) -> bool:
        """Whether its chat template asks for the day, see `fix_date`."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def note(self, kind: str, text: str) -> None:
        """Say something once a run."""
        if kind not in self.noted:
            self.noted.add(kind)
            say(f"note: reward model {self.where}: {text}")

    # ---- Texts ----

    def chat(self, prompt: Prompt, response: str) -> str:
        """The dialogue in the model's chat template, the response as its last turn.

        Raises InputError when the template refuses the dialogue.
        """
        dialogue = [*as_turns(prompt), assistant(response)]
        if moves_system(dialogue, self.tokenizer):
            self.note("system", "its chat template takes no system message; it stands in front of the user's words")
        try:
            return chat_text(dialogue, self.tokenizer, add_generation_prompt=False)
        except InputError as error:
            raise InputError(
                f"the chat template of --reward_model {self.where} cannot write a dialogue of the prompt data: "
                f"{one_line(error.__cause__ or error)}; leave such dialogues out, or give another model"
            ) from error

    def check_prompts(self, dialogues: Iterable[Prompt | None]) -> None:
        """Raise InputError for a dialogue that its chat template refuses, before the run comes to it."""
        if self.form == "chat":
            for turns in dialogues:
                if turns:
                    self.chat(turns, "reply")

    def encode(self, prompt: Prompt, response: str) -> dict[str, list[int]]:
        """input_ids of the text that is judged, with token_type_ids where the tokenizer makes some.

        Of a text that is too long for the model the beginning is cut; the reply stays, or the end of one that alone is.
        """
        tokenizer, limit = self.tokenizer, self.limit
        if self.form == "pair":
            first = format_prompt(prompt, self.template, tokenizer).strip()
            found = tokenizer(first, response)
            if (count := len(found["input_ids"])) > limit:
                room = limit - count + len(tokenizer(first, add_special_tokens=False)["input_ids"])
                found = tokenizer(first, response, truncation="only_first" if room > 0 else True, max_length=limit)
            row = {name: found[name] for name in ("input_ids", "token_type_ids") if name in found}
        else:
            if self.form == "chat":
                ids = tokenizer(self.chat(prompt, response), add_special_tokens=False)["input_ids"]
            else:
                ids = tokenizer(format_prompt(prompt, self.template, tokenizer) + response)["input_ids"]
                if tokenizer.eos_token_id not in (None, *ids[-1:]):
                    ids = [*ids, tokenizer.eos_token_id]
            count, row = len(ids), {"input_ids": ids[-limit:]}
        if count > limit:
            self.note("cut", f"a prompt with its reply has {count} tokens, of which it reads the last {limit}")
        return row

    # ---- Scores ----

    def load(self) -> None:
        """Read the weights.  Raises InputError where some are missing: transformers would put random numbers there."""
        model, missing = load_safetensors(
            AutoModelForSequenceClassification, WHAT, self.model_args, self.dtype, self.device, HEADS
        )
        if missing:
            raise InputError(
                f"--reward_model {self.where} has no weights for {', '.join(missing[:3])}, and would judge by random "
                "numbers; give a model that was trained as a sequence classifier"
            )
        if not self.model_args.load_in_4bit:
            model.to(self.device)
        self.model = model.requires_grad_(False).eval()
        text_config = model.config.get_text_config()
        model.config.use_cache = text_config.use_cache = False
        self.pad_id, self.vocabulary = text_config.pad_token_id, text_config.vocab_size
        self.limit = longest_text(model, self.tokenizer.model_max_length)
        forms = {
            "chat": "in its own chat template",
            "pair": "prompt and reply as a pair, as it has no chat template",
            "joined": f"as {self.template!r}, the reply and EOS, as it has no chat template",
        }
        say(
            f"reward model: {self.where} ({type(model).__name__}, {self.dtype}, {self.device}) reads {forms[self.form]}"
        )
        self.check_batch()

    @torch.no_grad()
    def check_batch(self) -> None:
        """Judge one text at a time where a text gets another score beside a longer one."""
        rows = [self.encode("Hello", "Hi."), self.encode("How are you today?", "I am well, thank you. " * 3)]
        alone, together = torch.cat([self.forward([row]) for row in rows]), self.forward(rows)
        exact = self.dtype == torch.float32 and self.device.type == "cpu" and not self.model_args.load_in_4bit
        if not (alone - together).abs().max() <= (1e-4 if exact else 5e-2) * max(1.0, float(alone.abs().max())):
            self.note("batch", "padding changes its scores; it judges one reply at a time")
            self.batch_size = 1
        if self.form != "pair" and rows[0]["input_ids"][-1] == self.pad_id:
            self.note(
                "pad", "it pads with what ends its texts, so transformers reads the score at the token before that"
            )

    def forward(self, rows: Sequence[dict[str, list[int]]]) -> Tensor:
        """Score of each row of `encode`, float32 [B]."""
        ids = [row["input_ids"] for row in rows]
        pad_id = self.pad_id
        if pad_id is None:
            # a classifier without one reads the very last token: pad with one that stands in none of the rows
            used = {token for row in ids for token in row}
            pad_id = next(token for token in range(self.vocabulary) if token not in used)
            self.model.config.get_text_config().pad_token_id = pad_id
        inputs = dict(zip(("input_ids", "attention_mask"), pad_right(ids, pad_id), strict=True))
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = pad_right([row["token_type_ids"] for row in rows], 0)[0]
        logits = self.model(**{name: part.to(self.device) for name, part in inputs.items()}).logits
        return logits[:, 0].float().cpu()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str | list[Message]]) -> list[float]:
        """prompts, completions: as reward functions get them."""
        texts = [each if isinstance(each, str) else message_text(each[0]) for each in completions]
        rows = [self.encode(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        order = torch.tensor([len(row["input_ids"]) for row in rows]).argsort(stable=True)
        scores = torch.zeros(len(rows))
        for part in order.split(self.batch_size):
            scores[part] = self.forward([rows[row] for row in part.tolist()])
        return scores.tolist()

    def as_function(self) -> RewardFunction:
        """It as one of the functions that make a score."""
        return RewardFunction("--reward_model", self.where, self, may_skip=False, name=NAME)

    def tokenizer_of_pairs(self) -> PreTrainedTokenizerBase:
        """Its tokenizer with something that ends a reply, which BERT's has no token for, to cut and count replies by."""
        tokenizer = copy.deepcopy(self.tokenizer)
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.sep_token or tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def check_card(self, folder: str | None, allow_weak: bool) -> None:
        """Look at its reward card, in `folder` or else in its own; without one there is a warning.

        Raises InputError when the card says that the model did not pass, unless `allow_weak`, or is of another model.
        """
        card = read_card(folder or self.where)
        measure = f"`python reward_modeling.py --card_only true --reward_model {self.where} --dataset PAIRS"
        measure += " --output_dir CARD`"
        if card is None and folder is None:
            say(
                f"warning: nobody has tried the reward model {self.where} with broken replies; {measure} does, and with "
                "--reward_card CARD this run reads the result"
            )
            return
        if card is None:
            raise InputError(f"--reward_card {folder} has no {CARD_FILE} in it; {measure} writes one")
        if card.get("fingerprint", self.fingerprint()) != self.fingerprint():
            if card["reward_model"] != self.where:
                raise InputError(
                    f"the card in {folder or self.where} is that of {card['reward_model']}, and not of --reward_model "
                    f"{self.where}; {measure} writes one"
                )
            say(f"warning: the card of the reward model {self.where} is of other weights, or of another type of them")
        check_card(card, f"the reward model {self.where}", "take another one", allow_weak)

    def fingerprint(self) -> str:
        """Short hash of its weights, the head included, wherever its files lie."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() == 2]
        return sample_hash(type(self.model).__name__, matrices)


def one_label_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Configuration of a sequence classifier with one label.  Raises InputError for any other model."""
    name = model_args.model_name_or_path
    if is_missing_folder(name):
        raise InputError(f"there is no folder {name}; check --reward_model")
    if os.path.isfile(os.path.join(name, "adapter_config.json")):
        raise InputError(
            f"--reward_model {name} is an adapter; give it as --reward_model_lora_path, or where it stands on another base, "
            "make a model of it with merge_lora.py --as_classifier"
        )
    config = base_config(model_args, WHAT)
    architecture = ", ".join(config.architectures or ["no architecture"])
    if "ForSequenceClassification" not in architecture:
        raise InputError(
            f"--reward_model {name} is no sequence classifier: its config.json names {architecture}, so its score head "
            "would be made of random numbers; give a model that ends in ForSequenceClassification"
        )
    if config.num_labels != 1:
        raise InputError(
            f"--reward_model {name} has {config.num_labels} labels, and a reward is one number; give a model with one label"
        )
    return config


def longest_text(model: PreTrainedModel, of_tokenizer: int) -> int:
    """Tokens that a text may have, by its positions and its tokenizer."""
    limits = [of_tokenizer, NO_LIMIT]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions > 0:
        # RoBERTa's kind keeps the first rows of the table for itself
        tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
        limits.append(
            positions - max([table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None)] + [0])
        )
    return min(limits)

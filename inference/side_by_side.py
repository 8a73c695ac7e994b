"""Several adapters on one base in memory: load them, let each of them answer the same prompts, score the replies."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from rewards.reward_model import load_reward, reward_scores
from rollout.batch import make_batch
from rollout.distribution import Sampling, first_token_ban
from rollout.sampler import sample_replies
from utils.adapters import REWARD, SavedAdapter, check_adapter, load_adapter, read_adapter, use_adapter
from utils.arguments import DEFAULT_TEMPLATE, ModelArguments
from utils.console import InputError
from utils.data import Message, encode_prompt
from utils.heads import add_score_head, enable_jobs

BARE_BASE = "base"  # what the base without an adapter is called


@dataclass
class AnswerArguments(ModelArguments):
    """Which models answer, and how."""

    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Only for adapters without a run.json: the template that they were trained with."},
    )
    adapters: list[str] = field(
        default_factory=list, metadata={"help": "SFT and PPO adapters as NAME=FOLDER, any number of them."}
    )
    reward_model_lora_path: str | None = field(
        default=None, metadata={"help": "Reward adapter with its score head, to score the replies with."}
    )
    output_max_length: int = field(default=128, metadata={"help": "Longest reply, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampler; 0 always takes the likeliest token."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same replies."})

    def __post_init__(self) -> None:
        self.template_given = self.prompt_template is not None
        self.prompt_template = self.prompt_template or DEFAULT_TEMPLATE
        super().__post_init__()
        if not self.adapters:
            raise InputError("no adapter was given; add --adapters NAME=FOLDER, once or several times")


class Lineup(NamedTuple):
    """The adapters that the arguments name, looked at and not loaded."""

    adapters: dict[str, SavedAdapter]  # policies by name
    reward: SavedAdapter | None
    template: str  # prompt template of all of them


class Reply(NamedTuple):
    """What one model answered to one prompt."""

    ids: list[int]  # reply tokens, EOS included where it ended by itself
    text: str
    score: float | None  # None without a reward model


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


def read_named_adapters(words: Sequence[str]) -> dict[str, SavedAdapter]:
    """NAME=FOLDER words -> adapters by name, in their order.  Raises InputError."""
    adapters: dict[str, SavedAdapter] = {}
    for word in words:
        name, _, path = (part.strip() for part in word.partition("="))
        if not name or not path:
            raise InputError(f"--adapters {word!r} is not NAME=FOLDER; write for example SFT=output/sft")
        if name in adapters or name == BARE_BASE:
            taken = "the bare base's" if name == BARE_BASE else "given twice"
            raise InputError(f"--adapters {word}: the name {name} is {taken}; choose another one")
        adapters[name] = read_adapter(path, f"--adapters {name}")
    return adapters


def agreed_template(args: AnswerArguments, adapters: dict[str, SavedAdapter]) -> str:
    """The prompt template that the adapters were trained with, the arguments' where no run.json tells one.

    Raises InputError when two of them were trained with different ones: the same prompt would not be the same to both.
    """
    known = {name: adapter.run["prompt_template"] for name, adapter in adapters.items() if adapter.run}
    if not known or args.template_given:
        return args.prompt_template
    first = next(iter(known))
    for name, template in known.items():
        if template != known[first]:
            raise InputError(
                f"--adapters {first} was trained with the prompt template {known[first]!r}, {name} with {template!r}; "
                "give adapters of one template"
            )
    return known[first]


def read_lineup(args: AnswerArguments) -> Lineup:
    """Look at all adapters that the arguments name.  Raises InputError."""
    adapters = read_named_adapters(args.adapters)
    path = args.reward_model_lora_path
    reward = None if path is None else read_adapter(path, "--reward_model_lora_path")
    return Lineup(adapters, reward, agreed_template(args, adapters))


def check_lineup(lineup: Lineup, base: PreTrainedModel) -> None:
    """Raise InputError when one of the adapters is of another kind, base or template."""
    for name, adapter in lineup.adapters.items():
        check_adapter(adapter, f"--adapters {name}", False, lineup.template, base)
    if lineup.reward is not None:
        check_adapter(lineup.reward, "--reward_model_lora_path", True, lineup.template, base)


def load_side_by_side(
    base: PreTrainedModel, adapters: Mapping[str, SavedAdapter], reward: SavedAdapter | None
) -> tuple[PeftModel, dict[str, list[str]]]:
    """All adapters on one base, in eval mode; and for each model, the bare base first, what `use_adapter` has to be given.

    PEFT knows the adapters by other names than people do, because it takes no dot in one ("v1.5").
    """
    names = [f"adapter{number}" for number in range(len(adapters))]
    enable_jobs(base)
    if reward is not None:
        add_score_head(base)
    model = PeftModel(base, next(iter(adapters.values())).config, names[0])
    for name, adapter in zip(names, adapters.values(), strict=True):
        load_adapter(model, adapter, name)
    if reward is not None:
        load_reward(model, reward)
    models = {BARE_BASE: [], **{title: [name] for title, name in zip(adapters, names, strict=True)}}
    return model.eval(), models


def choose_device(args: ModelArguments) -> tuple[str, torch.dtype]:
    """Where a model that is not trained runs, and the type of its base weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    return device, torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


def answer_sampling(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float = 1.0, first_tokens: str = "eos"
) -> Sampling:
    """The distribution that PPO trains by default: all of it, no EOS or padding as a first token.

    At temperature 0 its likeliest token, always.  first_tokens: --begin_suppress_tokens of a PPO run that had others.
    """
    return Sampling(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
        greedy=temperature == 0,
        begin_suppress_tokens=first_token_ban(first_tokens, tokenizer),
    )


def answer_samplings(
    adapters: Mapping[str, SavedAdapter],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> dict[str, Sampling]:
    """`answer_sampling` for the bare base and each adapter, with the --begin_suppress_tokens of the run that made it.

    A policy that PPO taught to say nothing has to be free to do so, or it looks better than it is.
    """
    first_tokens = {BARE_BASE: "eos"}
    for title, adapter in adapters.items():
        arguments = adapter.run.get("arguments")
        known = arguments.get("begin_suppress_tokens") if isinstance(arguments, dict) else None
        first_tokens[title] = "eos" if known is None else str(known)
    return {
        title: answer_sampling(tokenizer, max_new_tokens, temperature, words) for title, words in first_tokens.items()
    }


def longest_query(base: PreTrainedModel, output_max_length: int) -> int:
    """Tokens that a prompt may have beside a reply.  Raises InputError where the reply leaves no room."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:  # a family without positions, such as Bloom
        return 2**31
    if positions <= output_max_length:
        raise InputError(
            f"--output_max_length {output_max_length} leaves no room for a prompt in the {positions} tokens of this base; "
            "lower it"
        )
    return positions - output_max_length


def reply_seed(seed: int, prompt: str) -> int:
    """The seed of the reply to a prompt, the same one for every model: 63 bits of a hash."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def score_replies(
    model: PeftModel, queries: Sequence[list[int]], replies: Sequence[list[int]], pad_id: int
) -> list[float]:
    """Score of each reply from the reward adapter of the model, in one batch."""
    batch = make_batch(queries, replies, pad_id)
    ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
    return reward_scores(model, {"input_ids": ids, "attention_mask": mask}).tolist()


def answer(
    model: PeftModel,
    adapters: Sequence[str],
    queries: Sequence[list[int]],
    seeds: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Reply]:
    """One reply to each query from the base with `adapters` (none: the bare base), scored where there is a reward model.

    progress: called with the number of queries of each batch that is done.
    """
    replies: list[Reply] = []
    for start in range(0, len(queries), batch_size):
        part = queries[start : start + batch_size]
        with use_adapter(model, *adapters):
            sampled = sample_replies(model, part, seeds[start : start + batch_size], sampling)
        scores: list[float | None] = [None] * len(part)
        if REWARD in model.peft_config:
            scores = score_replies(model, part, sampled, tokenizer.pad_token_id)
        texts = [text.strip() for text in tokenizer.batch_decode(sampled, skip_special_tokens=True)]
        replies += map(Reply, sampled, texts, scores)
        progress(len(part))
    return replies


# ---------------------------------------------------------------------------------------------------------------------
# Dialogues
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talkers:
    """Several models on one base, each of which can go on with a dialogue."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    samplings: dict[str, Sampling]
    longest: int  # tokens of a dialogue
    adapters: dict[str, list[str]]  # name -> adapters that act under it
    seed: int

    def encode(self, turns: list[Message], question: str) -> tuple[list[Message], list[int]]:
        """The turns that fit in front of this question, the oldest ones dropped, and the ids of the whole dialogue.

        Raises InputError when the question alone does not fit.
        """
        while True:
            query = encode_prompt([*turns, {"role": "user", "content": question}], self.template, self.tokenizer)
            if len(query) <= self.longest:
                return turns, query
            if not turns:
                raise InputError(
                    f"that is {len(query)} tokens, more than the {self.longest} that fit; ask a shorter one"
                )
            turns = turns[2:]

    def reply(self, name: str, query: list[int], question: str, asked: int, streamer: BaseStreamer) -> list[int]:
        """One reply of the model `name`, EOS included; asked: number of the question, so that one asked twice gets two."""
        with use_adapter(self.model, *self.adapters[name]):
            seed = reply_seed(self.seed, f"{asked} {question}")
            return sample_replies(self.model, [query], [seed], self.samplings[name], streamer)[0]

    @property
    def can_score(self) -> bool:
        """Whether there is a reward model."""
        return REWARD in self.model.peft_config

    def score(self, query: list[int], reply: list[int]) -> float:
        """The reward model's score of a reply."""
        return score_replies(self.model, [query], [reply], self.tokenizer.pad_token_id)[0]

    def text(self, reply: list[int]) -> str:
        """A reply as it goes into the dialogue."""
        return self.tokenizer.decode(reply, skip_special_tokens=True).strip()

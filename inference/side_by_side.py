"""Several models on one base in memory: load the adapters, let each of them respond to the same prompts, score that."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from corpus.chat_template import check_reply_end, fix_date, reply_text, stop_token_ids
from corpus.formats import Message
from corpus.tokens import check_template, encode_prompt
from lora.adapters import REWARD, SavedAdapter, attach_adapter, check_adapter, load_adapter, read_adapter, use_adapter
from lora.base_model import check_tokenizer, load_base, load_tokenizer
from lora.heads import add_hidden_state_fn, add_score_head
from rewards.reward_model import load_reward, reward_scores
from rollout.batch import make_batch
from rollout.distribution import Sampling, check_output_logits, default_sampling
from rollout.sampler import generate_ids
from utils.arguments import DEFAULT_TEMPLATE, ModelArguments
from utils.console import InputError
from utils.hashing import hash64

BARE_BASE = "base"  # what the base without an adapter is called


@dataclass
class InferenceArguments(ModelArguments):
    """Which models respond, and how they are sampled."""

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
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; 0 always takes the likeliest token."}
    )
    seed: int = field(default=0, metadata={"help": "The same seed gives the same replies."})

    def __post_init__(self) -> None:
        self.template_given = self.prompt_template is not None
        self.prompt_template = self.prompt_template or DEFAULT_TEMPLATE
        super().__post_init__()
        if not self.adapters:
            raise InputError("no adapter was given; add --adapters NAME=FOLDER, once or several times")


class Response(NamedTuple):
    """What one model said to one prompt."""

    ids: list[int]  # the stop token included, unless the length limit cut the response
    text: str
    score: float | None  # None without a reward model


@dataclass(frozen=True)
class ChatModels:
    """The bare base and each adapter on it: models that share one base in memory and are switched by name."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    stop_ids: tuple[int, ...]  # of `stop_token_ids`
    adapters: dict[str, list[str]]  # name of a model -> PEFT's names of the adapters that act in it
    samplings: dict[str, Sampling]  # name of a model -> how it is sampled
    max_query_length: int  # tokens of a prompt or a whole dialogue
    seed: int

    def generate_ids(
        self, name: str, queries: Sequence[list[int]], seeds: Sequence[int], streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """Token ids of one response of the model `name` to each query, in one batch; see `generate_ids`."""
        with use_adapter(self.model, *self.adapters[name]):
            return generate_ids(self.model, queries, seeds, self.samplings[name], streamer)

    def generate(
        self, name: str, queries: Sequence[list[int]], seeds: Sequence[int], batch_size: int
    ) -> Iterator[Response]:
        """One response of the model `name` to each query, scored where there is a reward model."""
        for start in range(0, len(queries), batch_size):
            batch = queries[start : start + batch_size]
            responses = self.generate_ids(name, batch, seeds[start : start + batch_size])
            scores = self.score(batch, responses) if self.can_score else [None] * len(batch)
            yield from map(Response, responses, map(self.text, responses), scores)

    def text(self, response: list[int]) -> str:
        """A response as it is shown, and as it goes into a dialogue."""
        return reply_text(response, self.tokenizer, self.stop_ids).strip()

    @property
    def can_score(self) -> bool:
        """Whether there is a reward model."""
        return REWARD in self.model.peft_config

    @torch.no_grad()
    def score(self, queries: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
        """The reward model's score of each response, in one batch."""
        batch = make_batch(queries, responses, self.tokenizer.pad_token_id)
        ids, mask = batch.input_ids.to(self.model.device), batch.attention_mask.to(self.model.device)
        return reward_scores(self.model, {"input_ids": ids, "attention_mask": mask}).tolist()

    def encode_dialogue(self, turns: list[Message], question: str) -> tuple[list[Message], list[int]]:
        """The turns that fit in front of this question, the oldest ones dropped, and the ids of the whole dialogue.

        Raises InputError when the question alone does not fit.
        """
        while True:
            query = encode_prompt([*turns, {"role": "user", "content": question}], self.template, self.tokenizer)
            if len(query) <= self.max_query_length:
                return turns, query
            if not turns:
                raise InputError(
                    f"that is {len(query)} tokens, more than the {self.max_query_length} that fit; ask a shorter one"
                )
            turns = turns[2:]


def prompt_seed(seed: int, prompt: str) -> int:
    """The seed of the response to a prompt, the same one for every model: 63 bits of a hash."""
    return hash64(f"{seed} {prompt}") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_models(args: InferenceArguments) -> ChatModels:
    """All models that the arguments name, on the GPU where there is one, in eval mode.

    Raises InputError when the arguments are wrong, or the adapters of another base, kind or prompt template.
    """
    # ---- Adapters and tokenizer: what can be wrong without the base ----
    adapters = read_named_adapters(args.adapters)
    path = args.reward_model_lora_path
    reward = None if path is None else read_adapter(path, "--reward_model_lora_path")
    template = agreed_template(args, adapters)
    tokenizer = load_tokenizer(args)
    check_template(template, tokenizer)
    fix_date(tokenizer, template, None, [adapter.run for adapter in adapters.values()])

    # ---- Base ----
    device, dtype = choose_device(args)
    base = load_base(args, dtype)
    check_tokenizer(base, tokenizer)
    for name, adapter in adapters.items():
        check_adapter(adapter, f"--adapters {name}", False, template, base)
    if reward is not None:
        check_adapter(reward, "--reward_model_lora_path", True, template, base)
    stop_ids = stop_token_ids(tokenizer, template, base.generation_config)
    for adapter in adapters.values() if reward is None else (*adapters.values(), reward):
        check_reply_end(adapter.path, adapter.run, stop_ids, tokenizer)
    samplings = adapter_samplings(adapters, tokenizer, stop_ids, args.output_max_length, args.temperature)
    longest = max_query_length(base, args.output_max_length)
    base = base.to(device)

    # ---- Adapters on the base ----
    add_hidden_state_fn(base)
    if reward is not None:
        add_score_head(base)
    names = [f"adapter{number}" for number in range(len(adapters))]  # PEFT takes no dot in a name ("v1.5")
    first, *others = adapters.values()
    model = attach_adapter(base, first, first.config, names[0])
    for name, adapter in zip(names[1:], others, strict=True):
        load_adapter(model, adapter, name)
    if reward is not None:
        load_reward(model, reward)
    model.eval()
    check_output_logits(model)
    active = {BARE_BASE: [], **{title: [name] for title, name in zip(adapters, names, strict=True)}}
    return ChatModels(model, tokenizer, template, stop_ids, active, samplings, longest, args.seed)


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


def agreed_template(args: InferenceArguments, adapters: Mapping[str, SavedAdapter]) -> str:
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


def choose_device(args: ModelArguments) -> tuple[str, torch.dtype]:
    """Where a model that is not trained runs, and the type of its base weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype != "auto":
        return device, getattr(torch, args.dtype)
    return device, torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def max_query_length(base: PreTrainedModel, output_max_length: int) -> int:
    """Tokens that a prompt may have beside a response.  Raises InputError where the response leaves no room."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:  # a family without positions, such as Bloom
        return 2**31
    if positions <= output_max_length:
        raise InputError(
            f"--output_max_length {output_max_length} leaves no room for a prompt in the {positions} tokens of this base; "
            "lower it"
        )
    return positions - output_max_length


def adapter_samplings(
    adapters: Mapping[str, SavedAdapter],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> dict[str, Sampling]:
    """`default_sampling` for the bare base and each adapter, with the --begin_suppress_tokens of the run that made it.

    A policy that PPO taught to say nothing has to be free to do so, or it looks better than it is.
    """
    first_tokens = {BARE_BASE: "eos"}
    for title, adapter in adapters.items():
        arguments = adapter.run.get("arguments")
        known = arguments.get("begin_suppress_tokens") if isinstance(arguments, dict) else None
        first_tokens[title] = "eos" if known is None else str(known)
    return {
        title: default_sampling(tokenizer, stop_ids, max_new_tokens, temperature, words)
        for title, words in first_tokens.items()
    }

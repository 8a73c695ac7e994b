"""Replies and their log-probs: rules 3, 6 and 10 of DESIGN.md ("Always true")."""

from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from random import Random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lora.adapters import REFERENCE, use_adapter
from lora.heads import add_hidden_state_fn
from rl_training import Targets
from rollout import distribution, sampler
from rollout.batch import Batch, TokenStatistics, make_batch, pass_limits
from rollout.cache import new_cache
from rollout.distribution import Sampling
from rollout.experience import describe
from rollout.logprobs import logprobs_fn
from rollout.sampler import generate_ids, generate_responses, seed_of
from tests.conftest import FAMILIES, make_model
from tests.helpers import (
    Stages,
    collect,
    independent_logits,
    independent_logprobs,
    lively,
    make_ppo_trainer,
    move_policy,
    queries_of,
    wake_value_head,
)
from utils.batching import split_by_length
from utils.console import InputError

PAD, EOS = 0, 2
QUERIES = [[5, 9, 9, 30, 7, 5, 11, 260, 31], [40, 41], [PAD, 6, EOS, 6], [17] * 6]  # a pad and an EOS that are meant
RESPONSES = [[9, 50, 50, EOS], [41, 40, 60, 61, 61, 62, 60], [EOS], [17, PAD, 6, 5, 8]]
PLAIN = Sampling(stop_token_ids=(EOS,), pad_token_id=PAD, max_new_tokens=12)
SHAPED = replace(PLAIN, temperature=0.7, repetition_penalty=1.3, begin_suppress_tokens=(PAD, EOS))


def statistics(model: PreTrainedModel, batch: Batch, sampling: Sampling, values: bool = False) -> TokenStatistics:
    hidden_state_fn = logprobs_fn(batch, sampling, with_values=values)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, hidden_state_fn=hidden_state_fn)


def chi_square_tail(counts: Tensor, probabilities: Tensor) -> float:
    """Probability of counts at least this far from `probabilities`; bins that expect fewer than 5 are put together."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


# ---------------------------------------------------------------------------------------------------------------------
# Rule 3: log-probs of the distribution that was sampled from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        replace(PLAIN, temperature=0.7),
        replace(PLAIN, repetition_penalty=1.3),
        replace(PLAIN, begin_suppress_tokens=(EOS, 41)),
        replace(SHAPED, begin_suppress_tokens=(5, PAD)),
    ],
    ids=["plain", "temperature", "repetition penalty", "suppressed first token", "all"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_transformers_own_processors(family: str, sampling: Sampling) -> None:
    """The original scored with raw logits what it had sampled with a penalty and without EOS: its KL went negative.

    The reference is transformers alone, one unpadded row at a time; ours is one padded batch.
    """
    model = lively(make_model(family))
    wanted = [independent_logprobs(model, *row, sampling) for row in zip(QUERIES, RESPONSES, strict=True)]
    distributions = [
        independent_logits(model, *row, sampling).softmax(-1) for row in zip(QUERIES, RESPONSES, strict=True)
    ]
    add_hidden_state_fn(model)
    with torch.no_grad():
        ours = statistics(model, make_batch(QUERIES, RESPONSES, PAD), sampling)
    for row, (logprobs, probabilities) in enumerate(zip(wanted, distributions, strict=True)):
        length = len(RESPONSES[row])
        torch.testing.assert_close(ours.logprobs[row, :length], logprobs, rtol=1e-4, atol=1e-4)
        entropy = torch.special.entr(probabilities).sum(-1)  # -p log p, 0 where p is 0
        torch.testing.assert_close(ours.entropy[row, :length], entropy, rtol=1e-4, atol=1e-4)
        assert not ours.logprobs[row, length:].any()
        assert not ours.entropy[row, length:].any()


@pytest.mark.parametrize("sampling", [PLAIN, SHAPED], ids=["plain", "shaped"])
def test_tokens_are_drawn_with_the_probabilities_that_the_logprobs_claim(sampling: Sampling) -> None:
    """generate() quietly applies top_k=50 and the model's own defaults: then samples and log-probs disagree.

    Chi-square tests of the first and second token of 6000 replies against transformers' own processors.  The seeds are
    fixed, so the outcome is too; for a right sampler another choice of seeds would fail one time in 1e5 per test.
    The vocabulary has 96 tokens with a flat distribution, so a top-k of 50 would empty half of the bins.
    """
    model = make_model("llama", vocabulary=96)
    model.get_output_embeddings().weight.data *= 2
    add_hidden_state_fn(model)
    query, count = [5, 9, 9, 30], 6000
    replies = generate_ids(model, [query] * count, range(count), replace(sampling, max_new_tokens=2))

    first = independent_logits(model, query, [0], sampling).softmax(-1)[0]  # [V]
    seen_first = torch.tensor([reply[0] for reply in replies]).bincount(minlength=96)
    assert chi_square_tail(seen_first, first) > 1e-5
    assert not seen_first[first == 0].any()

    # the second token's distribution is one for each first token: mix them with the first's probabilities
    going_on = [token for token in range(96) if token != EOS]
    after = torch.stack([independent_logits(model, query, [token, 0], sampling)[1].softmax(-1) for token in going_on])
    second = (first[going_on, None] * after).sum(0) / first[going_on].sum()
    seen_second = torch.tensor([reply[1] for reply in replies if reply[0] != EOS]).bincount(minlength=96)
    assert chi_square_tail(seen_second, second) > 1e-5
    assert seen_second[EOS] > 0  # suppressed as the first token alone

    # the test has teeth: at half the temperature the same counts would be a wonder
    cold = independent_logits(model, query, [0], replace(sampling, temperature=sampling.temperature / 2)).softmax(-1)
    assert chi_square_tail(seen_first, cold[0]) < 1e-9


@pytest.mark.parametrize("shape", [{}, {"temperature": 0.7, "repetition_penalty": 1.3}], ids=["plain", "shaped"])
def test_sampled_kl_is_the_exact_kl_which_is_never_negative(stages: Stages, tmp_path: Path, shape: dict) -> None:
    """With an EOS that is suppressed in the sampler alone, the policy earned reward by making its KL negative.

    Exact: sum over the vocabulary at each position of the sampled replies, from transformers' processors.  k1 minus that
    sum has mean 0 for every prefix, so its mean over 800 replies is 0 within its standard error.
    """
    trainer = make_ppo_trainer(stages, tmp_path, output_max_length=2, mini_batch_size=800, batch_size=800, **shape)
    move_policy(trainer)
    model, sampling, count = trainer.model, trainer.collector.sampling, 800
    assert sampling.begin_suppress_tokens == (PAD, EOS)  # the default

    def wish_to_end(query: list[int]) -> Tensor:
        """Log of the probability that stays when EOS and padding are suppressed."""
        unsuppressed = independent_logits(model, query, [0], replace(sampling, begin_suppress_tokens=()))
        return torch.log1p(-unsuppressed.softmax(-1)[0, [PAD, EOS]].sum())

    def hidden_shift(query: list[int]) -> float:
        """What leaving the suppression out of both log-probs would add to every k1."""
        with use_adapter(model, REFERENCE):
            reference = wish_to_end(query)
        return float(wish_to_end(query) - reference)

    row = max(trainer.train_dataset, key=lambda row: abs(hidden_shift(row["input_ids"])))
    query = row["input_ids"]
    assert abs(hidden_shift(query)) > 0.2
    experience = trainer.collector.collect(model, [row] * count, range(count))
    mask = experience.batch.response_mask
    k1 = ((experience.logprobs - experience.ref_logprobs) * mask).sum(1)  # [count]

    exact, known = torch.zeros(count), {}
    for row, response in enumerate(experience.batch.responses()):
        if tuple(response[:-1]) not in known:  # what the last token is does not matter to any of the distributions
            policy = independent_logits(model, query, response, sampling).double().log_softmax(-1)
            with use_adapter(model, REFERENCE):
                reference = independent_logits(model, query, response, sampling).double().log_softmax(-1)
            terms = policy.exp() * (policy - reference).masked_fill(policy == -torch.inf, 0)
            assert terms.sum(-1).min() > -1e-6
            known[tuple(response[:-1])] = float(terms.sum())
        exact[row] = known[tuple(response[:-1])]
    assert exact.mean() > 0.05  # there is something to measure
    difference = k1 - exact
    error = difference.std() / count**0.5
    assert abs(difference.mean()) < 4 * error  # a right estimate misses this once in 16000 choices of seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_does_not_depend_on_its_batch(family: str) -> None:
    """Left padding without position_ids, or one random stream a batch, made a reply depend on its neighbours.

    Rule 8 and the resume of rule 7 stand on this.
    """
    model = lively(make_model(family))
    add_hidden_state_fn(model)
    sampling = replace(SHAPED, max_new_tokens=8, temperature=1.5)
    together = generate_ids(model, QUERIES, [3, 4, 5, 6], sampling)
    for query, seed, reply in zip(QUERIES, [3, 4, 5, 6], together, strict=True):
        assert generate_ids(model, [query], [seed], sampling) == [reply]
    assert len({tuple(*generate_ids(model, QUERIES[1:2], [seed], sampling)) for seed in range(9)}) > 5
    with torch.no_grad():
        batch = statistics(model, make_batch(QUERIES, together, PAD), sampling)
        for row, (query, reply) in enumerate(zip(QUERIES, together, strict=True)):
            alone = statistics(model, make_batch([query], [reply], PAD), sampling)
            torch.testing.assert_close(batch.logprobs[row, : len(reply)], alone.logprobs[0], rtol=1e-4, atol=1e-4)


def test_what_was_sampled_has_the_logprobs_of_its_own_draw() -> None:
    """The draw inside generate() and logprobs_fn() have to agree on which tokens were seen, and when.

    One uniform number picks each token: it has to lie in that token's part of the cumulative distribution.
    """
    model = lively(make_model("llama"))
    add_hidden_state_fn(model)
    seeds = [8, 9, 10, 11]
    replies = generate_ids(model, QUERIES, seeds, SHAPED)
    uniforms = sampler.uniform_streams(seeds, SHAPED.max_new_tokens)
    for query, reply, stream in zip(QUERIES, replies, uniforms, strict=True):
        cumulative = independent_logits(model, query, reply, SHAPED).double().softmax(-1).cumsum(-1)  # [T, V]
        for token, number, part in zip(reply, stream, cumulative, strict=False):
            assert (part[token - 1] if token else 0) - 1e-5 <= number <= part[token] + 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Rule 6: no empty reply
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "empty"), [({}, False), ({"begin_suppress_tokens": "none"}, True)])
def test_the_empty_reply_is_impossible_by_default(stages: Stages, tmp_path: Path, arguments: dict, empty: bool) -> None:
    """The original collapsed to empty replies: one of them with a high score was enough."""
    base = make_model("llama").requires_grad_(False)
    head = nn.Linear(32, 320, bias=True)
    head.weight.data.copy_(base.lm_head.weight.data)
    nn.init.zeros_(head.bias)
    head.bias.data[EOS] = 50.0  # e^50 to 1: nothing but EOS, wherever it may be
    base.lm_head = head.requires_grad_(False)
    trainer = make_ppo_trainer(stages, tmp_path, base=base, **arguments)
    experience = collect(trainer, 8)
    responses = experience.batch.responses()
    if empty:
        assert responses == [[EOS]] * 8
        measures = describe(experience)
        assert measures["empty_fraction"] == 1.0
    else:
        # one token that ends nothing, then EOS
        assert all(
            len(response) == 2 and response[0] not in (EOS, PAD) and response[1] == EOS for response in responses
        )
        assert torch.isfinite(experience.logprobs).all()
        assert torch.isfinite(experience.entropy).all()


# ---------------------------------------------------------------------------------------------------------------------
# Rule 10: logits at reply positions only, in chunks
# ---------------------------------------------------------------------------------------------------------------------


class _Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.add(str(operation))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def as_wide_as(self, columns: int, hidden: int) -> int:
        """Most rows of any tensor [.., columns], views of the (transposed) output embedding aside.  0 if there is none."""
        wide = [
            shape
            for shape in self.shapes
            if len(shape) > 1 and shape[-1] == columns and shape[-2:] != (hidden, columns)
        ]
        return max((torch.Size(shape[:-1]).numel() for shape in wide), default=0)


def test_no_tensor_of_batch_by_length_by_vocabulary(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of prompt + reply positions are what runs out of memory first: 32 x 1024 x 150,000 floats are 18 GiB."""
    vocabulary, hidden, count, tile = 320, 32, 8, 80
    monkeypatch.setattr(distribution, "TILE", tile)
    trainer = make_ppo_trainer(stages, tmp_path, batch_size=count, mini_batch_size=count, ppo_epochs=1)
    trainer.create_optimizer_and_scheduler(1)
    queries = queries_of(trainer, count)
    replies = generate_responses(
        trainer.model, queries, list(range(count)), trainer.collector.sampling, with_values=True
    )
    monkeypatch.setattr(trainer.collector, "generate", lambda *_: replies)
    with _Shapes() as seen:
        experience = collect(trainer, count)
        advantages = torch.randn(experience.values.shape)
        trainer.update(trainer.model, experience, Targets(advantages, advantages))
    assert any("backward" in operation for operation in seen.operations)  # the backward pass was watched too
    length, tokens = experience.batch.input_ids.shape[1], int(experience.batch.response_mask.sum())
    assert length not in (hidden, tile)  # which the shapes could not tell apart
    assert tokens < count * experience.batch.response_mask.shape[1]  # ragged: padding positions have no logits either
    assert seen.as_wide_as(vocabulary, hidden) == 0
    assert seen.as_wide_as(tile, hidden) == tokens
    assert max(torch.Size(shape).numel() for shape in seen.shapes) < count * length * vocabulary

    with _Shapes() as seen:  # the sampler looks at the last position of each row
        generate_ids(trainer.model, queries, list(range(count)), trainer.collector.sampling)
    assert seen.as_wide_as(vocabulary, hidden) == count


@pytest.mark.parametrize("size", [9, 256, 320, 1000])
def test_tokens_are_found_by_blocks_as_by_one_running_sum(size: int) -> None:
    """The reference is one running sum in float64.  Rounding may not lead to a token that nothing speaks for: a draw that
    ended a hair in front of a block got its first token, EOS although it was suppressed.
    """
    generator = torch.Generator().manual_seed(size)
    probabilities = torch.randn(400, size, generator=generator).mul(3).softmax(1)
    probabilities[:, :: max(2, size // 3)] = 0  # the first of all among them
    probabilities[:, -2:] = 0
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    tokens = sampler.inverse_cumulative(probabilities, uniforms)
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()
    running = probabilities.double().cumsum(1)
    target = uniforms * running[:, -1]
    ends = running.gather(1, tokens[:, None]).squeeze(1)
    starts = ends - probabilities.gather(1, tokens[:, None]).squeeze(1)
    assert (starts - 1e-6 <= target).all()
    assert (target <= ends + 1e-6).all()
    assert len(tokens.unique()) > 2


def test_a_draw_at_the_very_edge_of_a_block() -> None:
    """Sums of a block in float32 and in float64 differ, so that the target can end up in front of its block."""
    probabilities = torch.rand(200, 512, generator=torch.Generator().manual_seed(0))
    probabilities[:, 250:300] = 0  # at the end of the first block, and at the start of the second
    ends = probabilities.unflatten(1, (2, 256)).sum(-1).cumsum(1, dtype=torch.float64)
    edge = ends[:, 0] / ends[:, 1]
    for uniforms in (edge - 1e-16, edge, edge + 1e-16):
        tokens = sampler.inverse_cumulative(probabilities, uniforms)
        assert set(tokens.tolist()) <= {249, 300}


def test_a_tile_whose_tokens_are_all_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its largest logit is -inf: relative to that there is no sum, and the log-prob became NaN."""
    monkeypatch.setattr(distribution, "TILE", 3)
    sampling = replace(PLAIN, begin_suppress_tokens=(0, 1, 2))  # the first tile
    model = lively(make_model("llama"))
    wanted = [independent_logprobs(model, *row, sampling) for row in zip(QUERIES, RESPONSES, strict=True)]
    add_hidden_state_fn(model)
    model.requires_grad_(False)
    ours = statistics(model, make_batch(QUERIES, RESPONSES, PAD), sampling)
    for row, logprobs in enumerate(wanted):
        torch.testing.assert_close(ours.logprobs[row, : len(logprobs)], logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen embedding", "trained embedding"])
def test_chunks_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, frozen: bool
) -> None:
    """With a frozen output embedding the gradient is taken chunk by chunk in the forward pass, else in a second one.

    The reference is plain autograd through transformers alone, one unpadded row at a time.
    """
    monkeypatch.setitem(distribution.LOGIT_CHUNK, "cpu", chunk_rows * 320)
    monkeypatch.setattr(distribution, "TILE", 7)
    sampling = replace(SHAPED, begin_suppress_tokens=(5,))
    model = lively(make_model("llama"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    wanted = torch.zeros(len(RESPONSES), max(map(len, RESPONSES)))
    weights = torch.arange(1.0, 1 + wanted.numel()).view_as(wanted).sin()  # no two tokens alike
    loss = torch.zeros(())
    for row, (query, reply) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        ids = torch.tensor([[*query, *reply]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        for step, token in enumerate(reply):
            end = len(query) + step
            own = logits[end - 1]
            seen = torch.zeros(320, dtype=torch.bool).index_fill(0, ids[0, :end], True)
            own = torch.where(seen, torch.where(own < 0, own * 1.3, own / 1.3), own)
            if step == 0:
                own = own.masked_fill(torch.arange(320) == 5, -torch.inf)
            logprob = (own / 0.7).log_softmax(-1)[token]
            wanted[row, step] = logprob.detach()
            loss = loss + weights[row, step] * logprob
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["model.layers.0.mlp.up_proj.weight"].abs().max() > 0.1
    model.zero_grad()
    model.lm_head.weight.requires_grad_(not frozen)
    add_hidden_state_fn(model)
    batch = make_batch(QUERIES, RESPONSES, PAD)
    hidden_state_fn = logprobs_fn(batch, sampling, with_values=False)
    ours = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, hidden_state_fn=hidden_state_fn)
    torch.testing.assert_close(ours.logprobs, wanted, rtol=1e-5, atol=1e-5)
    (weights * ours.logprobs).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_says_what_a_second_look_says(family: str) -> None:
    """PPO takes log-probs and values from the sampler's own forward passes, with left padding, a cache, and replies that
    leave the batch: they have to be those of the update's pass over whole rows."""
    model = lively(make_model(family))
    add_hidden_state_fn(model)
    model.v_head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
    sampling = replace(SHAPED, max_new_tokens=10, temperature=1.5)
    some_token = generate_ids(model, QUERIES, [3, 4, 5, 9], sampling)[0][2]
    sampling = replace(sampling, stop_token_ids=(some_token,))  # so that at least the first reply ends early
    drawn = generate_responses(model, QUERIES, [3, 4, 5, 9], sampling, with_values=True)
    assert len(set(map(len, drawn.ids))) > 1  # some end before others
    with torch.no_grad():
        again = statistics(model, make_batch(QUERIES, drawn.ids, PAD), sampling, values=True)
    for ours, theirs in zip(drawn.statistics, again, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_reply_that_has_ended_leaves_the_batch() -> None:
    """The sampler went on with finished replies until the longest one was done."""
    model = lively(make_model("llama"))
    add_hidden_state_fn(model)
    new_cache(model)  # which tries the family once
    tokens = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, inputs: tokens.append(inputs[0].shape[:2].numel()))
    replies = generate_ids(model, QUERIES * 4, range(16), PLAIN)
    lengths = [len(reply) for reply in replies]
    assert min(lengths) < max(lengths)
    assert sum(tokens) == 16 * max(map(len, QUERIES)) + sum(lengths) - 16  # the last token of a reply goes nowhere


@pytest.mark.parametrize("family", FAMILIES)
def test_several_replies_to_a_prompt_read_it_once(family: str) -> None:
    """With all that shapes the distribution: the replies are those of prompts that are there several times."""
    model = lively(make_model(family))
    add_hidden_state_fn(model)
    model.v_head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
    sampling = replace(SHAPED, max_new_tokens=8, temperature=1.5)
    seeds = [seed_of(7, number) for number in range(3 * len(QUERIES))]
    repeated = [query for query in QUERIES for _ in range(3)]
    wanted = generate_responses(model, repeated, seeds, sampling, with_values=True)
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].shape))
    drawn = generate_responses(model, QUERIES, seeds, sampling, with_values=True)
    assert read[0] == (len(QUERIES), max(map(len, QUERIES)))
    assert drawn.ids == wanted.ids
    assert len({tuple(reply) for reply in drawn.ids[:3]}) > 1
    for ours, theirs in zip(drawn.statistics, wanted.statistics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_several_replies_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose cached passes give other numbers reads the whole row for each token."""
    model = lively(make_model("llama"))
    add_hidden_state_fn(model)
    seeds = list(range(2 * len(QUERIES)))
    wanted = generate_responses(model, QUERIES, seeds, SHAPED)
    model.cache_is_exact = False
    assert generate_responses(model, QUERIES, seeds, SHAPED).ids == wanted.ids


def test_adding_padding_columns_changes_nothing(stages: Stages, tmp_path: Path) -> None:
    """The padding of a batch depends on its longest reply: no measure may depend on that."""
    trainer = make_ppo_trainer(stages, tmp_path)
    wake_value_head(trainer)
    move_policy(trainer)
    experience = collect(trainer, 8)
    measures = describe(experience)

    def wider(part: Tensor, value: float) -> Tensor:
        return nn.functional.pad(part, (0, 5), value=value)

    batch = experience.batch
    padded = experience._replace(
        batch=Batch(
            wider(batch.input_ids, 77),  # padding is told by the mask: any id will do
            wider(batch.attention_mask, 0),
            batch.query_lengths,
            wider(batch.response_mask, False),
        ),
        logprobs=wider(experience.logprobs, 3.0),
        ref_logprobs=wider(experience.ref_logprobs, -3.0),
        kl=wider(experience.kl, 0.0),
        values=wider(experience.values, 9.0),
        entropy=wider(experience.entropy, 100.0),
    )
    assert describe(padded) == pytest.approx(measures, rel=1e-6)

    for with_values in (False, True):
        inputs = {"input_ids": padded.batch.input_ids, "attention_mask": padded.batch.attention_mask}
        hidden_state_fn = logprobs_fn(padded.batch, trainer.collector.sampling, with_values=with_values)
        with torch.no_grad():
            ours = trainer.model(**inputs, hidden_state_fn=hidden_state_fn)
        torch.testing.assert_close(ours.logprobs[:, :-5], experience.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.entropy[:, :-5], experience.entropy, rtol=1e-5, atol=1e-5)
        if with_values:
            torch.testing.assert_close(ours.values[:, :-5], experience.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_known_families_pass_the_check(family: str) -> None:
    base = make_model(family)
    add_hidden_state_fn(base)
    distribution.check_output_logits(
        get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    )


def test_an_unknown_soft_cap_is_refused() -> None:
    """At a tolerance of 1% a cap of 30 passed: it moves logits of size 5 by less, and every log-prob would be off."""
    base = make_model("llama")
    plain = base.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    base.forward = capped
    add_hidden_state_fn(base)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="changes its logits"):
        distribution.check_output_logits(model)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of similar length
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_of_similar_length_go_together() -> None:
    """Worked by hand: 10 + 10 + 9 tokens cost 30 + 5 together; with the 2 they would cost 40 + 5, apart 32 + 10."""
    assert split_by_length([10, 2, 9, 10], overhead=5, most_rows=8, most_tokens=10**6) == [[1], [2, 0, 3]]
    assert split_by_length([10, 2, 9, 10], overhead=9, most_rows=8, most_tokens=10**6) == [[1, 2, 0, 3]]
    assert split_by_length([5, 5, 5, 5], overhead=1, most_rows=3, most_tokens=10**6) in (
        [[0], [1, 2, 3]],
        [[0, 1, 2], [3]],
    )
    assert split_by_length([7, 7, 7], overhead=1, most_rows=8, most_tokens=14) in ([[0], [1, 2]], [[0, 1], [2]])
    assert split_by_length([50], overhead=1, most_rows=8, most_tokens=10) == [[0]]  # one row is never cut


def test_no_cut_is_cheaper() -> None:
    """Against every way to cut six sorted rows."""
    rng = Random(5)
    for _ in range(50):
        lengths, overhead = [rng.randint(1, 40) for _ in range(6)], rng.choice([0.5, 4, 15, 60])
        ordered = sorted(lengths)

        def cost(parts: list[list[int]], overhead: float = overhead) -> float:
            return sum(len(part) * max(part) + overhead for part in parts)

        cheapest = inf
        for cuts in product([False, True], repeat=5):
            parts = [[ordered[0]]]
            for length, cut in zip(ordered[1:], cuts, strict=True):
                parts = [*parts, [length]] if cut else [*parts[:-1], [*parts[-1], length]]
            cheapest = min(cheapest, cost(parts))
        found = split_by_length(lengths, overhead, most_rows=6, most_tokens=10**6)
        assert sorted(row for part in found for row in part) == list(range(6))
        assert cost([[lengths[row] for row in part] for part in found]) == pytest.approx(cheapest)


def test_passes_of_small_models_are_larger() -> None:
    """A layer of n weights: 4e8 / 4n tokens are as dear as a pass itself, and 8 times as many make that little."""
    base = make_model("llama")
    decoder = sum(parameter.numel() for name, parameter in base.model.named_parameters() if "embed" not in name)
    overhead, most_tokens = pass_limits(base, torch.device("cpu"))
    assert overhead == pytest.approx(4e8 / (4 * decoder / 2))  # two layers
    assert most_tokens == int(8 * overhead) > 256
    assert pass_limits(base, torch.device("cuda"))[1] == 2**31

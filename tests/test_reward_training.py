"""Stage 2 as a whole: losses by hand, broken pairs in the data, what training on them does, the ensemble."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import reward_modeling
from corpus.tokens import Preferences, tokenize_preferences
from lora.adapters import POLICY, SCORE_KEY, attach_adapter, read_adapter
from lora.heads import add_hidden_state_fn, add_score_head, score_fn
from reward_modeling import (
    Pairs,
    RewardArguments,
    RewardDataArguments,
    add_broken_pairs,
    build_trainer,
    length_penalty,
    pairwise_loss,
    response_lengths,
)
from rewards.broken_replies import KINDS
from rewards.reward_model import ensemble_score, member_folders, member_scores, new_reward_model, reward_scores
from rollout.distribution import default_sampling
from rollout.model import assemble_ppo_model
from rollout.sampler import generate_ids
from runs.memory_plan import reward_plan
from tests.conftest import make_tokenizer, write_rows
from tests.helpers import load_plain, load_with_hidden_state_fn, make_stages, run_main, save_lively_base, save_sft
from utils.arguments import LoraArguments, ModelArguments
from utils.batching import pad_right
from utils.console import InputError

WORDS = ["tea", "coffee", "soup", "bread", "rice", "cats", "dogs", "fish", "trees", "cars", "books", "songs"]
ASKED = ["What about {}?", "Tell me of {}.", "Do you know {}?"]
PAIRS = [
    {
        "prompt": ask.format(word),
        "chosen": f"I know that {word} can be good. Many people like {word} a lot.",
        "rejected": f"There is nothing at all to say of {word}, it is what it is. Leave me alone now.",
    }
    for word in WORDS
    for ask in ASKED
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_lively_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function (name, arguments) -> output folder of a run of reward_modeling.main() on PAIRS."""
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS)

    def run(name: str, **arguments: object) -> Path:
        settings = {
            "model_name_or_path": base,
            "dataset": rows,
            "eval_fraction": 0.3,
            "output_dir": tmp_path / name,
            "prompt_template": "{prompt}=",
            "max_length": 160,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "eval_strategy": "no",
            "save_strategy": "no",
            "learning_rate": 0.01,
            **arguments,
        }
        run_main(
            reward_modeling, [word for pair in settings.items() for word in (f"--{pair[0]}", pair[1])], monkeypatch
        )
        return tmp_path / name

    return run


def card_of(folder: Path) -> dict:
    return json.loads((folder / "reward_card.json").read_text(encoding="utf-8"))


# ---- Losses ----


def test_pairwise_loss_by_hand() -> None:
    """c - r = 1 and -1: -log sigmoid gives 0.31326 and 1.31326.  Centering: (3)^2 and (1)^2, times 0.1."""
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    plain = (0.313262 + 1.313262) / 2
    assert float(pairwise_loss(chosen, rejected, 0.0)) == pytest.approx(plain, rel=1e-5)
    assert float(pairwise_loss(chosen, rejected, 0.1)) == pytest.approx(plain + 0.1 * (9 + 1) / 2, rel=1e-5)
    # with a margin of 2 on the first pair it is -log sigmoid(-1) too
    with_margin = pairwise_loss(chosen, rejected, 0.0, torch.tensor([2.0, 0.0]))
    assert float(with_margin) == pytest.approx(1.313262, rel=1e-5)


def test_length_penalty_is_the_squared_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, lengths = torch.randn(30, generator=generator), torch.randint(1, 90, (30,), generator=generator)
    expected = np.corrcoef(scores.numpy(), lengths.numpy())[0, 1] ** 2
    assert float(length_penalty(scores, lengths)) == pytest.approx(expected, rel=1e-5)
    assert float(length_penalty(scores, torch.full((30,), 7))) == 0.0


def test_the_length_penalty_changes_what_is_learnt(train) -> None:
    """Rejected replies are longer here, so a score that follows the pairs correlates with length."""
    assert {len(pair["chosen"]) < len(pair["rejected"]) for pair in PAIRS} == {True}
    settings = {"max_steps": 30, "degenerate_ratio": 0, "probe_prompts": 1}
    plain = card_of(train("plain", **settings))["length_correlation"]
    penalised = card_of(train("penalised", **settings, length_penalty_coefficient=20))["length_correlation"]
    assert plain < -0.9
    assert abs(penalised) < 0.6


def test_the_length_penalty_is_of_ordinary_pairs_alone(base: str, tmp_path: Path) -> None:
    """A broken reply is short or long for a reason: with it among the lengths, the penalty works against the probes."""
    args = RewardArguments(
        output_dir=str(tmp_path), length_penalty_coefficient=3.0, use_cpu=True, report_to="none", eval_strategy="no"
    )
    rows = with_broken(0.5)
    pairs = Pairs(rows, response_lengths(rows), rows, [])
    trainer = build_trainer(args, LoraArguments(lora_r=4), load_plain(base), make_tokenizer(), pairs)
    batch = trainer.collate([*rows.select(range(4)), *rows.select(range(len(rows) - 4, len(rows)))])
    assert batch["broken"].tolist() == [False] * 4 + [True] * 4
    with torch.no_grad():
        loss, scores = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
        args.length_penalty_coefficient = 0.0
        plain, _ = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    expected = np.corrcoef(scores[:4].flatten().numpy(), batch["lengths"][:4].flatten().numpy())[0, 1] ** 2
    assert expected > 0.01
    assert float(loss - plain) == pytest.approx(3 * expected, rel=1e-3)


# ---- Data ----


def tokenized(rows: list[dict]) -> Preferences:
    return tokenize_preferences(Dataset.from_list(rows), "{prompt}=", make_tokenizer(), 160, "drop")


def with_broken(ratio: float, kinds: str = "all") -> Dataset:
    data = RewardDataArguments(degenerate_ratio=ratio, degenerate_kinds=kinds, max_length=160)
    return add_broken_pairs(tokenized(PAIRS), data, make_tokenizer(), 2, seed=0)


def test_broken_pairs_are_the_wanted_share_of_all() -> None:
    kinds = [kind for kind in KINDS if kind != "wrong_language"]  # there is one language
    pairs = with_broken(0.5, ",".join(kinds))
    counts = {kind: pairs["kind"].count(kind) for kind in ["", *kinds]}
    assert counts.pop("") == len(PAIRS)  # no ordinary pair is lost
    hard = {"cut_50", "repeated", "sentence_loop", "token_loop", "shuffled", "off_topic"}
    unit = len(PAIRS) / (8 + 3 * 6)  # eight others of one share, six of three
    for kind, count in counts.items():
        assert count == int(np.ceil(3 * unit if kind in hard else unit))


def test_no_broken_pairs_on_request() -> None:
    assert with_broken(0.0)["kind"] == [""] * len(PAIRS)


def test_only_the_chosen_kinds() -> None:
    assert set(with_broken(0.3, "empty, echo")["kind"]) == {"", "empty", "echo"}


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(InputError, match="--degenerate_kinds: 'emty' is no kind; there are empty, blank"):
        RewardDataArguments(degenerate_kinds="emty")
    with pytest.raises(InputError, match="--exempt_probes: 'x' is no kind"):
        RewardDataArguments(exempt_probes="x")


def test_margins_come_from_the_data() -> None:
    rows = [{**PAIRS[0], "margin": 1.5}, {**PAIRS[1], "margin": None}]
    assert tokenized(rows).pairs["margin"] == [1.5, 0.0]
    assert tokenized(PAIRS[:1]).pairs["margin"] == [0.0]


# ---- Training ----


def test_training_on_broken_replies_cures_the_gap(train, tmp_path: Path) -> None:
    """The better reply is always the shorter one, and none is empty: so a plain model often likes the empty one better."""
    word = [pair["prompt"].split()[-1].strip("?.") for pair in PAIRS]
    good = [f"I know that {w} can be good." for w in word]
    rows = [
        {"prompt": p["prompt"], "chosen": g, "rejected": f"{g} {p['rejected']}"}
        for p, g in zip(PAIRS, good, strict=True)
    ]
    gapped = write_rows(tmp_path / "gapped.jsonl", rows)
    settings = {"dataset": gapped, "max_steps": 60, "probe_prompts": 8}
    plain = card_of(train("plain", **settings, degenerate_ratio=0))
    taught = card_of(train("taught", **settings, degenerate_ratio=0.5))
    assert plain["accuracy"] == taught["accuracy"] == 1.0  # the pairs themselves show nothing of it
    for kind in ("empty", "blank", "tiny", "cut_5"):
        assert plain["probes"][kind] < 0.9, kind
        assert taught["probes"][kind] == 1.0, kind
    assert plain["passed"] is False
    assert any(reason.startswith("probe empty") for reason in plain["failed"])


def test_a_model_that_hardly_learned_is_told_so_without_a_wall_of_probes(
    train, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_of(train("unlearnt", learning_rate=1e-7, max_steps=2, lora_r=3, probe_prompts=4))
    assert card["failed"][0].startswith(
        "the model has hardly learned after 2 optimizer steps at learning rate 1e-07, rank 3: its loss"
    )
    assert len(card["probes"]) > 10
    told = capsys.readouterr().err
    assert "the reward model FAILED: the model has hardly learned after 2 optimizer steps" in told
    assert "| accuracy |" in told
    assert "| broken reply |" not in told
    assert "too few prompts" not in told


def test_the_card_says_how_sft_replies_score(train, base: str, tmp_path: Path) -> None:
    sft = save_sft(base, tmp_path / "sft")
    card = card_of(train("reward", sft_model_lora_path=sft, output_max_length=12, probe_prompts=5))
    assert card["sft_replies"] == 5
    assert card["sft_score_std"] > 0
    assert card["probes_above_sft"].keys() == card["probes"].keys()
    assert (tmp_path / "reward" / "reward_card.png").exists()


def test_a_reward_model_that_starts_as_the_sft_adapter(train, base: str, tmp_path: Path) -> None:
    """With a learning rate of 0 its file holds the SFT adapter's tensors and a head; with one it learns."""
    sft = save_sft(base, tmp_path / "sft")
    of_sft = load_file(f"{sft}/adapter_model.safetensors")
    settings = {"init_from_sft": "true", "sft_model_lora_path": sft, "output_max_length": 4, "probe_prompts": 2}
    for name, rate in (("still", 0), ("moved", 0.01)):
        saved = load_file(train(name, learning_rate=rate, **settings) / "adapter_model.safetensors")
        assert saved.keys() == {*of_sft, SCORE_KEY}
        assert all(torch.equal(saved[key], value) for key, value in of_sft.items()) == (rate == 0)
    args = RewardArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", eval_strategy="no")
    wanted = (ModelArguments(base), 32, LoraArguments(lora_r=64), args, torch.float32)
    from_nothing, from_sft = (reward_plan(*wanted, start) for start in (None, read_adapter(sft, "--sft")))
    assert from_sft.held["adapters and heads"] < from_nothing.held["adapters and heads"] / 10


def test_sft_responses_are_the_sft_adapters_own(base: str, tmp_path: Path) -> None:
    """In batches of two beside the reward adapter, against the SFT adapter loaded alone, one query at a time."""
    sft, tokenizer = save_sft(base, tmp_path / "sft"), make_tokenizer()
    model, _ = new_reward_model(load_plain(base), LoraArguments(lora_r=4), seed=2)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model=model,
        processing_class=tokenizer,
        args=SimpleNamespace(per_device_eval_batch_size=2),
    )
    queries = [tokenizer(text)["input_ids"] for text in ("cats=", "dogs=", "rice=")]
    probes = [{"chosen_ids": [*query, 5], "query_length": len(query)} for query in queries]
    data = RewardDataArguments(dataset="unused", probe_prompts=3, output_max_length=12, max_length=64)
    found = reward_modeling.sample_sft_responses(trainer, read_adapter(sft, "--sft"), probes, data, (2, 41))
    alone, sampling = (
        PeftModel.from_pretrained(load_with_hidden_state_fn(base), sft),
        default_sampling(tokenizer, (2, 41), 12),
    )
    for seed, query in enumerate(sorted(queries)):
        assert found[seed] == query + generate_ids(alone, [query], [seed], sampling)[0]
    assert len(found) == 3


def test_rows_in_parts_have_the_same_scores(base: str, train) -> None:
    """In parts, the shortest rows first, and the order is restored; values and gradients stay what they were."""
    folder = str(train("reward"))
    model = load_plain(base)
    add_hidden_state_fn(model)
    add_score_head(model)
    saved = read_adapter(folder, "--adapter")
    model = attach_adapter(model, saved, saved.config).eval()
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in (9, 3, 14, 5, 5, 12, 1)]
    ids, mask = pad_right(sequences, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    (parts,), (whole,) = (list(member_scores(model, inputs, [POLICY], rows)) for rows in (3, None))
    alone = torch.cat(
        [
            model(
                input_ids=(row := torch.tensor([s])),
                attention_mask=torch.ones_like(row),
                hidden_state_fn=score_fn(torch.ones_like(row), POLICY),
            )
            for s in sequences
        ]
    )
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(parts, alone)


# ---- Ensemble ----


def test_ensemble_score_by_hand() -> None:
    """Row 1: 1, 2, 3 -> mean 2, deviation sqrt(2/3).  Row 2: all 5."""
    scores = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]), torch.tensor([3.0, 5.0])]
    assert ensemble_score(scores, 2.0).tolist() == pytest.approx([2 - 2 * (2 / 3) ** 0.5, 5.0])
    assert ensemble_score(scores[:1], 2.0).tolist() == [1.0, 5.0]


def test_an_ensemble_is_trained_saved_and_used_in_stage_3(train, base: str, tmp_path: Path) -> None:
    """Its members are adapters of their own, each one different, and PPO scores with mean - penalty * deviation."""
    folder = str(train("reward", ensemble_size=3, ensemble_penalty=0.5, max_steps=6))
    folders = member_folders(folder)
    assert [Path(path).name for path in folders] == ["reward", "member1", "member2"]
    assert card_of(Path(folder))["ensemble_size"] == 3

    generator = torch.Generator().manual_seed(1)
    ids, mask = pad_right([torch.randint(3, 300, (n,), generator=generator).tolist() for n in (6, 11, 4)], 0)

    def scores_of(path: str) -> Tensor:
        model = load_plain(base)
        add_hidden_state_fn(model)
        add_score_head(model)
        saved = read_adapter(path, "--adapter")
        model = attach_adapter(model, saved, saved.config).eval()
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, hidden_state_fn=score_fn(mask, POLICY))

    members = torch.stack([scores_of(path) for path in folders])
    assert members.std(0).min() > 1e-3
    expected = members.mean(0) - 0.5 * ((members - members.mean(0)) ** 2).mean(0).sqrt()
    stages = make_stages(base, tmp_path / "stages")
    model = assemble_ppo_model(
        load_plain(base), read_adapter(stages.sft, "--sft"), read_adapter(folder, "--reward_model_lora_path")
    )
    with torch.no_grad():
        torch.testing.assert_close(reward_scores(model, {"input_ids": ids, "attention_mask": mask}), expected)

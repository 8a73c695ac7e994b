"""--reward_function: the forms that functions may have, and how their numbers become a score."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerState
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

import rl_training
from corpus.tokens import tokenize_prompts
from lora.adapters import read_adapter
from rewards.reward_functions import Notes, Replies, RewardFunction, carried_columns, load_function, load_functions
from rewards.scores import (
    ScoreRules,
    ScoreStatistics,
    measure_scores,
    normalize_scores,
    part_weights,
    weighted_sum,
)
from runs.memory_plan import ppo_plan
from tests import judges
from tests.conftest import write_rows
from tests.helpers import PROMPTS, Stages, make_ppo_trainer, run_main
from utils.arguments import ModelArguments
from utils.console import InputError
from utils.files import read_jsonl

MODEL = "reward_model"


def replies(*triples: tuple[str, str, dict], turns: bool = False) -> Replies:
    """From (prompt, response, columns); the ids are as many as a response has letters."""
    rows = [
        {
            "prompt": f"<{prompt}>" if turns else prompt,
            "columns": columns,
            "turns": [{"role": "user", "content": prompt}] if turns else None,
        }
        for prompt, _, columns in triples
    ]
    responses = [response for _, response, _ in triples]
    return Replies(rows, responses, [list(range(len(response))) for response in responses])


def answers(function: object, to: Replies, notes: Notes | None = None, step: int = 0) -> list[float | None]:
    wrapped = RewardFunction("--reward_function", "module:function", function, may_skip=True)
    return wrapped.judge(to, TrainerState(global_step=step), notes or Notes([{} for _ in to.rows]))


# ---- Forms ----

TEXTS = replies(
    ("2+2", r"\boxed{4}", {"ground_truth": "4", "task": "math"}), ("hi", "hello", {"ground_truth": "5", "task": "chat"})
)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("reward_len", [-11.0, -15.0]),
        ("reward_tokens", [9.0, 5.0]),
        ("boxed_reward", [1.0, 0.0]),
        ("math_reward", [1.0, None]),
        ("slow_reward", [9.0, 5.0]),
        ("scheduled_reward", [7.0, 7.0]),
        ("length", [9.0, 5.0]),
        ("some_lengths", [None, None]),
    ],
)
def test_functions_as_trl_takes_them_and_plain_ones(name: str, wanted: list[float | None]) -> None:
    assert answers(getattr(judges, name), TEXTS, step=7) == wanted


def test_dialogues_come_as_messages() -> None:
    """TRL's own functions ask for completion[0]["content"] and fail on texts."""
    good = "<think>two and two</think>4"
    given = replies(("2+2", good, {}), ("2+2", "4", {}), turns=True)
    assert answers(think_format_reward, given) == [1.0, 0.0]
    assert answers(judges.format_reward, given) == [0.0, 0.0]
    seen = []

    def note(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [0] * len(prompts)

    answers(note, given)
    assert seen == [
        ([[{"role": "user", "content": "2+2"}]] * 2, [[{"role": "assistant", "content": text}] for text in (good, "4")])
    ]
    assert answers(lambda prompt, response: prompt == "<2+2>", given) == [1.0, 1.0]  # a plain one gets texts


def test_functions_that_trl_makes() -> None:
    """Token ids count the reply's end: 4 ids of which all three 2-grams are alike, and 12 ids of which 10 are free."""
    given = Replies([{"prompt": "a", "columns": {}}] * 2, ["x", "y"], [[5, 5, 5, 5], list(range(12))])
    assert answers(get_repetition_penalty_reward(ngram_size=2), given) == pytest.approx([-(1 - 1 / 3), 0.0])
    assert answers(get_soft_overlong_punishment(max_completion_len=14, soft_punish_cache=4), given) == [0.0, -0.5]


def test_a_function_gets_what_it_names() -> None:
    found = ["prompt", "answer", "task", "tests"]

    def columns(function: object) -> list[str]:
        return RewardFunction("--reward_function", "m:f", function, True).columns(found)

    assert columns(lambda completions, answer: 0) == ["answer"]
    assert columns(lambda completions, answer, **kwargs: 0) == ["answer", "task", "tests"]
    assert columns(lambda prompt, response: 0) == []
    assert columns(lambda answer, task, tests: 0) == [
        "tests"
    ]  # the first two are prompt and response, whatever their names
    assert columns(lambda prompt, response, **others: 0) == ["answer", "task", "tests"]
    assert columns(lambda *, completions, task=None, missing=3: 0) == ["task"]
    assert columns(lambda **kwargs: 0) == ["answer", "task", "tests"]
    assert columns(max) == []  # a builtin without a signature
    with pytest.raises(
        InputError, match=r"m:f takes solution, but the prompt data has no such column, only prompt, answer"
    ):
        columns(judges.needs_a_solution)


def test_columns_travel_with_their_prompts(tokenizer) -> None:
    """Repeated and overlong prompts go, and each of the others keeps its own."""
    rows = [{"question": "a", "answer": 1.5}, {"question": "a", "answer": 2.5}, {"question": "b" * 99, "answer": 3.5}]
    rows += [{"question": "Human: c\n\nAssistant:", "answer": None}]
    functions = [RewardFunction("--reward_function", "m:f", lambda prompt, response, answer: 0, True)]
    rows = Dataset.from_list(rows)
    carried = carried_columns(functions, rows.column_names)
    assert carried == ["answer"]
    prompts = tokenize_prompts(rows, "{prompt}=", tokenizer, 20, carried)
    assert prompts["columns"][:] == [{"answer": 1.5}, {"answer": None}]
    assert prompts["turns"][:] == [None, [{"role": "user", "content": "c"}]]
    assert prompts["prompt"][1] == "c="
    assert tokenize_prompts(rows, "{prompt}=", tokenizer, 20, None).column_names == ["input_ids", "prompt"]


def test_what_a_function_notes() -> None:
    notes = Notes([{}, {}])
    given = replies(("a", "x", {"answer": "x"}), ("b", "y", {"answer": torch.Size([2])}))
    assert answers(judges.noting_reward, given, notes) == [1.0, 0.0]
    assert notes.extra == [{"wanted": "x"}, {"wanted": "torch.Size([2])"}]  # what JSON does not know is text
    assert notes.metrics == {"accuracy": [0.5]}


# ---- Wrong answers ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fails_on_dogs",
            "the prompt 'dogs' and the reply 'woof' fails (LookupError: no verdict on this one); it has to",
        ),
        ("nan_on_dogs", "the prompt 'dogs' and the reply 'woof' gives nan; it has to give a finite number"),
        ("too_few", "the prompt 'cats' and the reply 'meow' gives 0 numbers for 1 replies; it has to give one a reply"),
        ("no_list", "the prompt 'cats' and the reply 'meow' gives 1.0; it has to give a list of numbers"),
        ("two_numbers", "the prompt 'cats' and the reply 'meow' gives tensor([0., 0.]) (ValueError: "),
    ],
)
def test_a_wrong_answer_is_one_line_with_prompt_and_reply(name: str, message: str) -> None:
    """Of a function that gets a whole batch, the reply that it fails on is looked for."""
    with pytest.raises(InputError) as stopped:
        answers(getattr(judges, name), replies(("cats", "meow", {}), ("dogs", "woof", {}), ("cows", "moo", {})))
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_gold_has_to_know_every_reply() -> None:
    gold = load_function("--gold_function", "tests.judges:some_lengths")
    with pytest.raises(InputError, match=r"--gold_function tests.judges:some_lengths on the prompt 'hi' .* gives None"):
        gold.judge(replies(("hi", "hello", {})), TrainerState(), Notes([{}]))


def test_names_of_functions() -> None:
    functions = load_functions("--reward_function", "tests.judges:length, tests.golds:judge")
    assert [function.name for function in functions] == ["length", "judge"]
    functions = load_functions("--reward_function", "tests.judges:length,operator:length_hint,tests.golds:judge")
    assert len(functions) == 3
    with pytest.raises(InputError, match="names a function twice; give it once, and change its --reward_weights"):
        load_functions("--reward_function", "tests.judges:length,tests.judges:length")


# ---- The score ----


def test_the_score_by_hand() -> None:
    """Reward model 3 of mean 1 and deviation 2 at weight 2: 2.  Rule 0.5 of mean 1 and deviation 0.25 at weight 0.5: -1.

    Where the rule does not apply, only the reward model counts.  The last two replies are cut (1 less) and broken.
    """
    nan = float("nan")
    parts = {MODEL: torch.tensor([3.0, 3.0, 1.0, 9.0]), "rule": torch.tensor([0.5, nan, 1.0, 2.0])}
    statistics = {MODEL: ScoreStatistics(1.0, 2.0), "rule": ScoreStatistics(1.0, 0.25)}
    rules = ScoreRules(statistics, {MODEL: 2.0, "rule": 0.5}, 0.0, missing_eos_penalty=1.0, clip=5.0, floor_broken=True)
    broken, ended = torch.tensor([False, False, False, True]), torch.tensor([True, True, False, True])
    assert weighted_sum(parts, rules.weights).tolist() == [6.25, 6.0, 2.5, 19.0]
    assert normalize_scores(parts, broken, ended, rules).tolist() == [1.0, 2.0, -1.0, -3.0]


def test_nan_of_the_reward_model_stays() -> None:
    """It says that the model is broken; a function's says that it does not apply."""
    parts = {MODEL: torch.tensor([float("nan"), 1.0]), "rule": torch.tensor([1.0, float("nan")])}
    assert weighted_sum(parts, {MODEL: 1.0, "rule": 1.0}).isnan().tolist() == [True, False]


def test_statistics_by_hand() -> None:
    nan = float("nan")
    assert measure_scores(torch.tensor([1.0, nan, 3.0])) == (2.0, 1.0)
    assert measure_scores(torch.tensor([4.0, 4.0])) == (4.0, 1.0)
    assert measure_scores(torch.tensor([nan])) == (0.0, 1.0)
    scores = torch.rand(100)
    assert measure_scores(scores) == measure_scores(scores.flip(0))


def test_weights() -> None:
    assert part_weights(None, ["a"], True) == {MODEL: 1.0, "a": 1.0}
    assert part_weights("0.5", ["a"], True) == {MODEL: 1.0, "a": 0.5}
    assert part_weights("2,0.5", ["a"], True) == {MODEL: 2.0, "a": 0.5}
    assert part_weights("2,0.5", ["a", "b"], False) == {"a": 2.0, "b": 0.5}
    for given, functions, has_model in (
        ("1,2", ["a"], False),
        ("1,2,3", ["a"], True),
        ("x", ["a"], True),
        ("nan", ["a"], True),
    ):
        with pytest.raises(InputError, match=f"--reward_weights is {given}; give {len(functions)} numbers"):
            part_weights(given, functions, has_model)


# ---- Runs ----


@pytest.fixture(scope="module")
def run(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A run on functions alone, with guard, evaluation and a held-out file; one knows half of the prompts."""
    folder = tmp_path_factory.mktemp("functions")
    rows = [{"prompt": prompt, "answer": prompt[0]} for prompt in PROMPTS]
    train, held_out = write_rows(folder / "train.jsonl", rows[:8]), write_rows(folder / "held_out.jsonl", rows[8:])
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--prompt_template", "{prompt}="]
    words += ["--dataset", train, "--eval_dataset", held_out, "--steps", "4", "--save_freq", "2", "--batch_size", "4"]
    words += ["--mini_batch_size", "2", "--ppo_epochs", "2", "--output_max_length", "8", "--max_length", "64"]
    words += ["--learning_rate", "0.01", "--guard", "warn", "--guard_freq", "2", "--eval_strategy", "steps"]
    words += ["--eval_steps", "2", "--reward_weights", "1,0.5,2"]
    words += ["--reward_function", "tests.judges:length,tests.judges:some_lengths,tests.judges:noting_reward"]
    words += ["--output_dir", str(folder / "run")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("rollout.experience.reward_scores", None)  # there is no reward pass
        run_main(rl_training, words, monkeypatch)
    return words, folder / "run"


def test_every_part_of_the_score_is_in_the_samples(run: tuple[list[str], Path]) -> None:
    samples = read_jsonl(str(run[1] / "samples.jsonl"))
    assert len(samples) == 4 * 4
    for row in samples:
        size, knows = len(row["response"]), len(row["prompt"]) > 5
        assert row["length score"] == size
        assert row["some_lengths score"] == (size if knows else None)
        assert row["score"] == size + 0.5 * size * knows + 2 * row["noting_reward score"]
        assert row["noted"] == {"wanted": row["prompt"][0]}


def test_every_part_of_the_score_is_in_the_metrics(run: tuple[list[str], Path]) -> None:
    samples = read_jsonl(str(run[1] / "samples.jsonl"))
    lines = [row for row in read_jsonl(str(run[1] / "metrics.jsonl")) if "score_mean" in row]
    assert len(lines) == 4
    for line in lines:
        mine = [row for row in samples if row["iteration"] == line["iteration"]]
        known = torch.tensor(
            [float(row["some_lengths score"]) for row in mine if row["some_lengths score"] is not None]
        )
        assert line["reward/some_lengths/none"] == 1 - len(known) / 4
        if len(known):
            assert line["reward/some_lengths/mean"] == pytest.approx(float(known.mean()))
            assert line["reward/some_lengths/std"] == pytest.approx(float(known.std(unbiased=False)), abs=1e-6)
        assert line["reward/length/mean"] == pytest.approx(sum(len(row["response"]) for row in mine) / 4)
        assert line["accuracy"] == sum(row["noting_reward score"] for row in mine) / 4
    assert any("eval_reward/length/mean" in row for row in read_jsonl(str(run[1] / "metrics.jsonl")))
    assert any("heldout/reward/length/mean" in row for row in read_jsonl(str(run[1] / "metrics.jsonl")))


def test_functions_are_normalised_by_the_sft_models_replies(
    run: tuple[list[str], Path], stages: Stages, tmp_path: Path
) -> None:
    """Eight prompts, with the seeds of an evaluation: the same replies come from a trainer that has not begun."""
    measured = json.loads((run[1] / "run.json").read_text(encoding="utf-8"))["score_statistics"]
    assert measured == json.loads((run[1] / "checkpoint-2" / "ppo_state.json").read_text())["score_statistics"]
    assert list(measured) == ["length", "some_lengths", "noting_reward"]
    trainer = make_ppo_trainer(stages, tmp_path, batch_size=4, output_max_length=8)
    found = list(trainer.respond_to_all(trainer.train_dataset.select(range(8)), 0))
    sizes = torch.tensor([float(len(text)) for part in found for text in part.responses])
    assert measured["length"] == pytest.approx([float(sizes.mean()), float(sizes.std(unbiased=False))], rel=1e-6)


def test_a_run_without_a_reward_adapter_holds_none(run: tuple[list[str], Path]) -> None:
    record = json.loads((run[1] / "run.json").read_text(encoding="utf-8"))
    assert list(record["adapters"]) == ["sft_model_lora_path"]
    assert (run[1] / "best" / "adapter_model.safetensors").exists()
    first = read_jsonl(str(run[1] / "metrics.jsonl"))[0]
    assert abs(first["kl"]) < 1e-5
    assert first["ratio_first"] == pytest.approx(1, abs=1e-4)


def test_a_resumed_run_is_the_run(run: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics are of replies that the SFT model gave before the first update, so they come out of the checkpoint."""
    words, whole = run
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    words = [*words[:-1], str(tmp_path / "run"), "--resume_from_checkpoint", "true"]
    run_main(rl_training, words, monkeypatch)
    for file in ("adapter_model.safetensors", "value_head.safetensors", "samples.jsonl", "ppo_state.json"):
        assert (whole / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file


def test_a_function_beside_the_reward_adapter(stages: Stages, tmp_path: Path) -> None:
    functions = load_functions("--reward_function", "tests.judges:starts_with")
    trainer = make_ppo_trainer(stages, tmp_path, functions=functions, reward_weights="2,3", steps=1, guarded=True)
    trainer.train()
    plain = make_ppo_trainer(stages, tmp_path / "plain", steps=1)
    plain.train()
    for row, other in zip(trainer.samples, plain.samples, strict=True):
        assert row["reward_model score"] == other["score"]
        assert row["starts_with score"] == float(row["response"].startswith(row["prompt"][:2]))
        assert row["score"] == pytest.approx(2 * other["score"] + 3 * row["starts_with score"], rel=1e-6)


def test_scores_can_stay_as_they_are(stages: Stages, tmp_path: Path) -> None:
    functions = load_functions("--reward_function", "tests.judges:never,tests.judges:length")
    settings = {"normalize_scores": False, "score_clip": 1000.0, "missing_eos_penalty": 0.0, "steps": 1}
    trainer = make_ppo_trainer(
        stages, tmp_path, functions=functions, rewarded=False, floor_broken_replies=False, **settings
    )
    trainer.train()
    line = read_jsonl(str(tmp_path / "metrics.jsonl"))[0]
    assert line["reward/never/none"] == 1.0
    assert "reward/never/mean" not in line
    assert line["normalized_score_mean"] == line["score_mean"] == line["reward/length/mean"]


def test_nothing_that_judges(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--output_dir", str(tmp_path / "run")]
    with pytest.raises(
        InputError, match="nothing says what a good reply is; add --reward_model_lora_path FOLDER, --reward_f"
    ):
        run_main(rl_training, words, monkeypatch)
    with pytest.raises(InputError, match="--critic adapter starts as the reward adapter, and there is none"):
        run_main(rl_training, [*words, "--reward_function", "tests.judges:length", "--critic", "adapter"], monkeypatch)
    assert not (tmp_path / "run").exists()


def test_a_missing_column_ends_the_run_before_a_weight_is_read(
    stages: Stages, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model_name", stages.base, "--sft_model_lora_path", stages.sft, "--output_dir", str(tmp_path / "run")]
    words += ["--dataset", data["sft"], "--reward_function", "tests.judges:needs_a_solution"]
    monkeypatch.setattr(rl_training, "load_base", None)
    with pytest.raises(InputError, match="needs_a_solution takes solution, but the prompt data has no such column"):
        run_main(rl_training, words, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_a_plan_without_a_reward_adapter(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It is smaller by the reward adapter and its head, and asks for no data."""
    args = rl_training.PPOArguments(output_dir="unused", use_cpu=True, max_length=48, output_max_length=16)
    sft, reward = read_adapter(stages.sft, "--sft"), read_adapter(stages.reward, "--reward")
    held = [ppo_plan(ModelArguments(stages.base), args, sft, each, torch.float32).held for each in (reward, None)]
    lora = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (64 + 32))
    assert held[0]["adapters and heads"] - held[1]["adapters and heads"] == (lora + 2 * 32) * 4


def test_the_page_about_functions(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules, its row of data and its command, as they are printed."""
    page = (Path(__file__).parent.parent / "docs" / "reward_functions.md").read_text(encoding="utf-8")
    found = re.findall(r"```(bash|python|json)\n(.*?)```", page, re.DOTALL)
    blocks = dict(found)
    for module, (_, text) in zip(
        ("sum_rules", "my_rules"), [block for block in found if block[0] == "python"], strict=True
    ):
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)  # another test's of this name
    rows = [json.loads(blocks["json"]), *({"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(9))]
    write_rows(tmp_path / "sums.jsonl", rows)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)  # of test_gold
    monkeypatch.chdir(tmp_path)
    words = (
        blocks["bash"].replace("\\\n", " ").replace("BASE", stages.base).replace("output/sft", stages.sft).split()[2:]
    )
    words += ["--steps", "1", "--batch_size", "4", "--mini_batch_size", "4", "--output_max_length", "4"]
    run_main(rl_training, [*words, "--guard", "off", "--ppo_epochs", "1"], monkeypatch)
    for row in read_jsonl("output/ppo/samples.jsonl"):
        right = next(each["answer"] for each in rows if each["prompt"] == row["prompt"])
        assert row["right_sum score"] == float(row["response"].strip().startswith(str(right)))
        assert row["short score"] == pytest.approx(-len(row["response"]) / 100)
    words[words.index("sum_rules:right_sum,sum_rules:short")] = "my_rules:in_words,my_rules:short"
    words[words.index("output/ppo")] = "output/ruled"
    run_main(rl_training, [*words, "--guard", "off", "--ppo_epochs", "1"], monkeypatch)
    assert {row["short score"] for row in read_jsonl("output/ruled/samples.jsonl")} == {1.0}  # 1 to 4 tokens

"""Every causal language model family of the installed transformers, tiny and random, through all stages.

    python -m tests.stress.families                     all of them, 45 minutes on 2 cores; writes docs/families.md
    python -m tests.stress.families qwen3_5_text mamba  these, and writes nothing

Each goes through an SFT step, a reward step, a PPO iteration with replies of different lengths, compare.py and
merge_lora.py.  Either the SFT loss, the scores, the log-probs of policy and reference and the merged logits are those of
plain transformers and PEFT, one row at a time and without padding or a cache; or one line refuses the base.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corpus.tokens import tokenize_sft
from inference.side_by_side import InferenceArguments, load_models
from lora.adapters import SCORE_KEY, use_adapter
from lora.base_model import text_decoder
from rollout.distribution import Sampling
from rollout.experience import Collector, Experience
from rollout.sampler import generate_responses
from tests.conftest import make_tokenizer, write_preferences, write_rows
from tests.helpers import independent_logprobs
from tests.tiny import tiny_model
from utils.console import InputError

TABLE = Path(__file__).parents[2] / "docs" / "families.md"
SECONDS = 600  # for one family
# A part of the vocabulary ends a reply, so that the replies of a random model have different lengths.
STOPS = (range(2, 320, 3), range(2, 42), range(2, 320, 2))
TEMPLATE = "{prompt}="
SFT_ROWS = [{"prompt": f"What is {word}?", "response": f"{word} is good" + "!" * n} for n, word in enumerate("abcd")]
TOLERANCE = 1e-3  # of log-probs, scores and losses around 1 to 10, in float32


class Result(NamedTuple):
    """What happened to one family."""

    family: str
    outcome: str
    why: str = ""


OUTCOMES = {
    "same numbers": "as plain transformers, one row at a time",
    "same, no cache": "the same, but its cache is not exact, so replies are sampled without one",
    "refused": "one line, before anything is trained or written",
    "FAILED": "a traceback, or other numbers",
    "not tried": "no tiny configuration could be made of it, or its own code does not run on one",
}


class OneLengthError(Exception):
    """All replies came out of one length, which shows less than replies of different lengths."""


class OtherNumbersError(Exception):
    """The toolkit and plain transformers disagree."""


def compare_numbers(what: str, found: Tensor, expected: Tensor) -> None:
    difference = float((found - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not difference <= TOLERANCE * scale:  # NaN is another number
        raise OtherNumbersError(f"{what}: off by {difference:.1e}")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keeps what is printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        yield out


def run(script: str, *words: str | Path) -> None:
    """A script's main() in this process."""
    sys.argv = [f"{script}.py", *map(str, words)]
    importlib.import_module(script).main()


# ---------------------------------------------------------------------------------------------------------------------
# By plain transformers and PEFT
# ---------------------------------------------------------------------------------------------------------------------


def plain(base: Path, adapter: Path | None = None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is None:
        return model
    config = LoraConfig.from_pretrained(adapter)
    config.task_type = config.modules_to_save = None  # a reward adapter's head is read from its file
    return PeftModel.from_pretrained(model, adapter, config=config).eval()


@torch.no_grad()
def plain_loss(model: nn.Module, rows: Dataset) -> Tensor:
    """Mean over all reply tokens of -log p."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logprobs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().log_softmax(-1)
        own = logprobs[:-1].gather(1, labels[1:, None].clamp(min=0))[:, 0]
        losses.append(-own[labels[1:] >= 0])
    return torch.cat(losses).mean()


@torch.no_grad()
def plain_scores(model: PeftModel, rows: Sequence[list[int]], head: Tensor) -> Tensor:
    scores = []
    for row in rows:
        ids = torch.tensor([row])
        output = text_decoder(model.get_base_model())(input_ids=ids, attention_mask=torch.ones_like(ids))
        scores.append(output.last_hidden_state[0, -1] @ head[0])
    return torch.stack(scores)


def check_replies(
    what: str, model: nn.Module, queries: list[list[int]], replies: list[list[int]], found: Tensor, sampling: Sampling
) -> None:
    for row, (query, reply) in enumerate(zip(queries, replies, strict=True)):
        compare_numbers(what, found[row, : len(reply)], independent_logprobs(model, query, reply, sampling))


# ---------------------------------------------------------------------------------------------------------------------
# One family
# ---------------------------------------------------------------------------------------------------------------------


def go_through(family: str, folder: Path, any_length: bool = False) -> str:
    """All stages and all comparisons; the stages' folders are in `folder`.  Returns the outcome.

    Raises OneLengthError where all replies are of one length, unless any_length.
    """
    base, tokenizer = folder / "base", make_tokenizer()
    sft_file = write_rows(folder / "sft.jsonl", SFT_ROWS)
    pairs = write_preferences(folder / "pairs.jsonl")
    common = ["--model_name", base, "--prompt_template", TEMPLATE, "--use_cpu", "true", "--report_to", "none"]
    common += ["--disable_tqdm", "true", "--save_strategy", "no", "--learning_rate", "1e-2"]
    lora = ["--lora_r", "2", "--lora_dropout", "0", "--max_steps", "1", "--per_device_train_batch_size", "4"]
    lora += ["--logging_steps", "1", "--max_length", "128"]
    run("sft_training", *common, *lora, "--dataset", sft_file, "--output_dir", folder / "sft")
    first = json.loads((folder / "sft" / "metrics.jsonl").read_text().splitlines()[0])
    rows = tokenize_sft(Dataset.from_list(SFT_ROWS), TEMPLATE, tokenizer, 128)
    compare_numbers("SFT loss", torch.tensor(first["loss"]), plain_loss(plain(base), rows))

    held_out = ["--eval_fraction", "0.3", "--eval_strategy", "no", "--probe_prompts", "2"]
    run("reward_modeling", *common, *lora, *held_out, "--dataset", pairs, "--output_dir", folder / "reward")

    seen: list[tuple[Experience, Sampling]] = []
    collect = Collector.collect

    def remember(collector: Collector, *args, **options) -> Experience:
        seen.append((collect(collector, *args, **options), collector.sampling))
        return seen[-1][0]

    Collector.collect = remember
    try:
        sizes = ["--steps", "1", "--batch_size", "12", "--mini_batch_size", "4", "--ppo_epochs", "1"]
        adapters = ["--sft_model_lora_path", folder / "sft", "--reward_model_lora_path", folder / "reward"]
        adapters += ["--allow_weak_reward", "true", "--guard", "off", "--output_max_length", "12", "--max_length", "64"]
        run("rl_training", *common, *sizes, *adapters, "--dataset", pairs, "--output_dir", folder / "ppo")
    finally:
        Collector.collect = collect
    experience, sampling = seen[0]
    replies = experience.batch.responses()
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(*experience.batch[:2], strict=True)]
    queries = [row[: int(length)] for row, length in zip(rows, experience.batch.query_lengths, strict=True)]
    if len({len(reply) for reply in replies}) == 1 and not any_length:
        raise OneLengthError
    sft = plain(base, folder / "sft")
    check_replies("policy", sft, queries, replies, experience.logprobs, sampling)
    check_replies("reference", sft, queries, replies, experience.ref_logprobs, sampling)
    head = load_file(folder / "reward" / "adapter_model.safetensors")[SCORE_KEY]
    compare_numbers("scores", experience.scores, plain_scores(plain(base, folder / "reward"), rows, head))

    asked = write_rows(
        folder / "asked.jsonl", [{"prompt": prompt} for prompt in ("a", "What about tea?", "火锅 好吗？")]
    )
    lineup = ["--adapters", f"SFT={folder / 'sft'}", f"PPO={folder / 'ppo'}"]
    lineup += ["--reward_model_lora_path", folder / "reward", "--output_max_length", "8"]
    run("compare", "--base_model_name", base, *lineup, "--prompts", asked, "--output_dir", folder / "compare")
    arguments = {"model_name_or_path": str(base), "adapters": [f"PPO={folder / 'ppo'}"], "output_max_length": 8}
    models = load_models(InferenceArguments(**arguments))
    ppo, model, sampling = plain(base, folder / "ppo"), models.model, models.samplings["PPO"]
    with use_adapter(model, *models.adapters["PPO"]):
        drawn = generate_responses(model, queries, range(len(queries)), sampling)
    check_replies("trained policy", ppo, queries, drawn.ids, drawn.statistics.logprobs, sampling)

    run("merge_lora", "--base_model_name", base, "--adapter_path", folder / "ppo", "--output_dir", folder / "merged")
    ids = torch.tensor([queries[0]])
    with torch.no_grad():
        found, expected = (
            m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (plain(folder / "merged"), ppo)
        )
    compare_numbers("merged", found, expected)
    return "same numbers" if model.get_base_model().cache_is_exact else "same, no cache"


def go_through_with_ends(family: str, model: PreTrainedModel, folder: Path) -> Result:
    """`go_through`, with other stop tokens where all replies came out of one length; the last ones are taken as they are."""
    for number, stops in enumerate((*STOPS, STOPS[0])):
        attempt = folder / str(number)
        model.generation_config.eos_token_id = list(stops)
        model.save_pretrained(attempt / "base")
        make_tokenizer().save_pretrained(attempt / "base")
        is_last = number == len(STOPS)
        with contextlib.suppress(OneLengthError):
            outcome = go_through(family, attempt, any_length=is_last)
            break
    return Result(family, outcome, "all replies were of one length" if is_last else "")


def one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def try_family(family: str) -> Result:
    """Whatever a family's own code raises is part of the result."""

    def too_long(*_) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    with tempfile.TemporaryDirectory() as name, quiet() as printed:
        folder = Path(name)
        try:
            model = tiny_model(family)
            ids = torch.arange(3, 13)[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            model.save_pretrained(folder)
        except Exception as error:
            signal.alarm(0)
            return Result(family, "not tried", one_sentence(error))
        try:
            return go_through_with_ends(family, model, folder)
        except InputError as error:
            return Result(family, "refused", str(error).replace(name, "FOLDER"))
        except Exception as error:
            printed.write(traceback.format_exc())
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, OtherNumbersError) else f" ({Path(place.filename).name}:{place.lineno})"
            return Result(family, "FAILED", one_sentence(error).replace(name, "FOLDER") + where)
        finally:
            signal.alarm(0)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def as_markdown(results: Sequence[Result]) -> str:
    """docs/families.md."""
    counts = collections.Counter(result.outcome for result in results)
    lines = [
        "# Model families",
        "",
        f"Written by `python -m tests.stress.families` with transformers {transformers.__version__}: every causal "
        "language model family it has, as a tiny random model, through an SFT step, a reward step, a PPO iteration with "
        "replies of different lengths, `compare.py` and `merge_lora.py`, in float32 on a CPU. Compared with plain "
        "transformers and PEFT, one row at a time, are the SFT loss, the scores, the log-probs of policy, reference and "
        "trained policy, and the merged logits.",
        "",
        "| outcome | families | meaning |",
        "|---|---|---|",
        *(f"| {outcome} | {counts[outcome]} | {meaning} |" for outcome, meaning in OUTCOMES.items()),
        "",
        "| family (`model_type`) | outcome | why |",
        "|---|---|---|",
        *(f"| {r.family} | {r.outcome} | {r.why.replace('|', chr(92) + '|')} |" for r in results),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("families", nargs="*", help="model_type of transformers; default: all")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    families = args.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = []
    with ProcessPoolExecutor(args.processes) as pool:
        for result in pool.map(try_family, families):
            results.append(result)
            print(f"{result.family:28} {result.outcome:16} {result.why}", flush=True)
    if not args.families:
        TABLE.write_text(as_markdown(results), encoding="utf-8")
        print(f"table: {TABLE}")
    sys.exit(any(result.outcome == "FAILED" for result in results))


if __name__ == "__main__":
    main()

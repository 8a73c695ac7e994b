"""One side of a comparison in a process of its own: real PPO iterations on given shapes, timed by phase.

    python -m benchmarks.ppo_sides ours FOLDER          this toolkit: what rl_training.py makes of its usual arguments
    python -m benchmarks.ppo_sides profile FOLDER       the same under torch's profiler
    python -m benchmarks.ppo_sides trl FOLDER           TRL's PPOTrainer as it comes, from the folder that TRL_FOLDER names
    python -m benchmarks.ppo_sides trl_tuned FOLDER     the same with less to train and nothing computed twice
    python -m benchmarks.ppo_sides rate FOLDER          matrix products alone

FOLDER is what `make_inputs` wrote.  The last line of the output is a JSON object.  Both sides compute in float32 on a CPU,
and in bfloat16 on a GPU, where there is one.

A model with random weights hardly ever draws EOS, so both sides are told where each reply ends, by the prompt: ours through
the uniform number that picks the token (EOS has id 0, so 0 picks it), TRL through a logits processor of generate().
"""

import argparse
import functools
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DEVICE, PRECISION = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
EOS, PAD, UNKNOWN = 0, 1, 2
TARGETS = ["q_proj", "k_proj", "v_proj"]


@dataclass(frozen=True)
class Shapes:
    """A Llama with random weights and the batch that one PPO iteration works on; lengths in tokens."""

    hidden: int = 576
    layers: int = 12
    heads: int = 9
    kv_heads: int = 3
    feed_forward: int = 1536
    vocabulary: int = 49152
    rows: int = 16
    mini_batch: int = 8
    ppo_epochs: int = 4
    lora_r: int = 4
    prompts: tuple[int, int] = (64, 64)  # shortest and longest
    replies: tuple[int, int] = (64, 64)  # where the two are the same, no reply ends with EOS
    tied: bool = True  # one matrix for input and output embedding

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and reply of each row."""
        draw = random.Random(0)
        return [(draw.randint(*self.prompts), draw.randint(*self.replies)) for _ in range(self.rows)]

    @property
    def ends(self) -> bool:
        """Whether replies end with EOS."""
        return self.replies[0] != self.replies[1]


def make_inputs(folder: Path, shapes: Shapes) -> None:
    """Write base, tokenizer, SFT and reward adapter, prompts and the shapes themselves to `folder`, which is made."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lora.heads import add_score_head

    folder.mkdir(parents=True)
    words = {"</s>": EOS, "<pad>": PAD, "<unk>": UNKNOWN}
    words |= {f"w{number}": number for number in range(len(words), shapes.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shapes.hidden,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        intermediate_size=shapes.feed_forward,
        vocab_size=shapes.vocabulary,
        max_position_embeddings=max(2048, shapes.prompts[1] + shapes.replies[1]),
        tie_word_embeddings=shapes.tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype=PRECISION,
    )
    torch.set_default_dtype(PRECISION)
    with torch.device(DEVICE):  # billions of random numbers take minutes on a CPU
        base = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    base.save_pretrained(folder / "base")
    lora = {"r": shapes.lora_r, "lora_alpha": 2 * shapes.lora_r, "target_modules": TARGETS}
    sft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    sft.save_pretrained(folder / "sft")
    base = sft.unload()
    add_score_head(base, seed=0)
    PeftModel(base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], **lora)).save_pretrained(
        folder / "reward"
    )
    draw = random.Random(1)
    rows = [
        {"prompt": " ".join(f"w{draw.randrange(3, shapes.vocabulary)}" for _ in range(length)), "reply": reply}
        for length, reply in shapes.lengths()
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "shapes.json").write_text(json.dumps(asdict(shapes)), encoding="utf-8")


def read_inputs(folder: Path) -> tuple[Shapes, list[dict[str, Any]]]:
    """The shapes, and the rows of prompts.jsonl."""
    fields = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    shapes = Shapes(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    with open(folder / "prompts.jsonl", encoding="utf-8") as file:
        return shapes, [json.loads(line) for line in file]


def reply_lengths(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, ...], int]:
    """Token ids of each prompt -> tokens of its reply."""
    return {tuple(int(word[1:]) for word in row["prompt"].split()): row["reply"] for row in rows}


class Phases:
    """Seconds by phase; `enter` ends the phase before."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.name, self.since = "", 0.0

    def enter(self, name: str) -> None:
        """Begin `name`; "generate" begins an iteration too, and "end" ends one."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # it works on while Python is ahead
        now = time.perf_counter()
        if name == "generate":
            self.iterations.append({})
        elif self.name in ("generate", "score", "train"):
            seconds = self.iterations[-1]
            seconds[self.name] = seconds.get(self.name, 0.0) + now - self.since
        self.name, self.since = name, now

    @contextmanager
    def during(self, name: str, then: str) -> Iterator[None]:
        """`name` inside the block, `then` after it."""
        self.enter(name)
        yield
        self.enter(then)


def ours(folder: Path, iterations: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Iterations of stage 3, what was planned to be held, and the metrics of the first.  more: further arguments."""
    from lora.adapters import read_adapter
    from lora.base_model import load_base, load_tokenizer
    from rewards.scores import ScoreStatistics
    from rl_training import PPOArguments, build_trainer, read_prompts
    from rollout import sampler
    from runs.memory_plan import ppo_plan
    from utils.arguments import DataArguments, ModelArguments, choose_precision, parse_arguments
    from utils.console import keep_freed_memory
    from utils.files import read_jsonl

    keep_freed_memory()  # as run_script() does
    shapes, rows = read_inputs(folder)
    lengths = reply_lengths(rows)
    arguments = {
        "model_name": folder / "base",
        "dataset": folder / "prompts.jsonl",
        "prompt_template": "{prompt}",
        "max_length": shapes.prompts[1] + shapes.replies[1],
        "output_max_length": shapes.replies[1],
        "batch_size": shapes.rows,
        "mini_batch_size": shapes.mini_batch,
        "ppo_epochs": shapes.ppo_epochs,
        "steps": iterations,
        "save_freq": 10**6,
        "guard": "off",
        "disable_tqdm": "true",
        "output_dir": folder / f"ours-{os.getpid()}",
    }
    words = [*(word for name, value in arguments.items() for word in (f"--{name}", f"{value}")), *more]
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, PPOArguments), words)
    dtype = choose_precision(model_args, args)
    tokenizer = load_tokenizer(model_args)
    adapters = [read_adapter(str(folder / name), f"--{name}") for name in ("sft", "reward")]
    prompts = read_prompts(data_args, args, model_args.prompt_template, tokenizer)
    plan = ppo_plan(model_args, args, *adapters, dtype)
    trainer = build_trainer(
        args, load_base(model_args, dtype), tokenizer, (EOS,), *adapters, prompts, ScoreStatistics()
    )

    phases = Phases()
    ends: list[int] = []
    plain_streams, generate = sampler.uniform_streams, trainer.collector.generate
    update, finish = trainer.update, trainer.finish

    def streams(seeds: Sequence[int], length: int) -> torch.Tensor:
        numbers = plain_streams(seeds, length) * 0.99 + 0.005  # never EOS by chance
        if shapes.ends:
            numbers[torch.arange(len(seeds)), torch.tensor(ends) - 1] = 0.0
        return numbers

    def timed_generate(model: Any, queries: Sequence[Sequence[int]], seeds: Sequence[int]) -> Any:
        ends[:] = [lengths[tuple(query)] for query in queries]
        with phases.during("generate", then="score"):
            return generate(model, queries, seeds)

    def timed_update(*args: Any) -> Any:
        phases.enter("train")
        return update(*args)

    def timed_finish(*args: Any) -> Any:
        result = finish(*args)
        phases.enter("end")
        return result

    sampler.uniform_streams = streams  # replies of the lengths that were asked for
    trainer.collector.generate, trainer.update, trainer.finish = timed_generate, timed_update, timed_finish
    trainer.train()
    first = read_jsonl(f"{args.output_dir}/metrics.jsonl")[0]
    return {"iterations": phases.iterations, "planned_bytes": plan.peak, "first": first}


def profiled(folder: Path, iterations: int) -> dict[str, Any]:
    """`ours` under torch's profiler: seconds of the main thread by phase and kind of operation, over all iterations."""
    from torch.profiler import profile

    found: dict[str, dict[str, float]] = {}
    running: list[profile] = []
    enter = Phases.enter

    def profiled_enter(phases: Phases, name: str) -> None:
        if running:
            profiler = running.pop()
            profiler.stop()
            kinds = found.setdefault(phases.name, dict.fromkeys(KINDS, 0.0))
            for event in profiler.key_averages():
                kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
        enter(phases, name)
        if name != "end":
            running.append(profile())
            running[0].start()

    Phases.enter = profiled_enter
    ours(folder, iterations)
    return {"profile": found}


KINDS = ("matrix products", "attention", "everything else")


def kind_of(operator: str) -> str:
    """Which of KINDS an operator of torch is."""
    if operator in ("aten::mm", "aten::addmm", "aten::bmm"):
        return "matrix products"
    return "attention" if "scaled_dot_product" in operator else "everything else"


def trl(folder: Path, iterations: int, tuned: bool = False) -> dict[str, Any]:
    """Iterations of TRL's PPOTrainer with LoRA on the policy, which is the reference without its adapter.

    As it comes, it trains the whole value model and computes activations again in the backward pass.  tuned: LoRA on the
    value model too, and activations are kept.
    """
    sys.path.insert(0, os.environ["TRL_FOLDER"])
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LogitsProcessor,
        LogitsProcessorList,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    shapes, rows = read_inputs(folder)
    lengths = reply_lengths(rows)
    phases = Phases()

    class EndAt(LogitsProcessor):
        """Lets each reply end where it shall, and nowhere else."""

        def __init__(self, ends: torch.Tensor, prompt_length: int) -> None:
            self.ends, self.prompt_length = ends, prompt_length

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            now = (self.ends == input_ids.shape[1] - self.prompt_length + 1) & shapes.ends
            scores = scores.clone()
            scores[:, EOS] = -torch.inf
            scores[now] = -torch.inf
            scores[now, EOS] = 0.0
            return scores

    plain_generation, plain_forward = ppo_trainer.batch_generation, ppo_trainer.forward

    def generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        ends = torch.tensor(
            [lengths[tuple(i for i in row if i != PAD)] for row in queries.tolist()], device=queries.device
        )
        plain = model.generate
        processors = LogitsProcessorList([EndAt(ends, queries.shape[1])])
        model.generate = functools.partial(plain, logits_processor=processors)
        with phases.during("generate", then="score"):
            result = plain_generation(model, queries, *rest)
        model.generate = plain
        return result

    def forward(model: Any, *rest: Any) -> Any:
        if phases.name == "score" and isinstance(model, ppo_trainer.PolicyAndValueWrapper):
            phases.enter("train")
        return plain_forward(model, *rest)

    class EndOfIteration(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            phases.enter("end")

    ppo_trainer.batch_generation, ppo_trainer.forward = generation, forward
    tokenizer = AutoTokenizer.from_pretrained(folder / "base", padding_side="left")
    lora = {"r": shapes.lora_r, "lora_alpha": 2 * shapes.lora_r, "target_modules": TARGETS}
    options = {"dtype": PRECISION}
    policy = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, **options) for _ in range(2)
    )
    reward.requires_grad_(False)
    if tuned:
        value.requires_grad_(False)
        value = inject_adapter_in_model(LoraConfig(task_type="SEQ_CLS", **lora), value)
        value.score.requires_grad_(True)
    data = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows])
    config = PPOConfig(
        output_dir=str(folder / f"trl-{os.getpid()}"),
        total_episodes=shapes.rows * iterations,
        per_device_train_batch_size=shapes.mini_batch,
        gradient_accumulation_steps=shapes.rows // shapes.mini_batch,
        num_mini_batches=shapes.rows // shapes.mini_batch,
        local_rollout_forward_batch_size=shapes.rows,
        num_ppo_epochs=shapes.ppo_epochs,
        response_length=shapes.replies[1],
        stop_token="eos",
        num_sample_generations=0,
        save_strategy="no",
        bf16=DEVICE == "cuda",
        gradient_checkpointing=not tuned,
        use_cpu=DEVICE == "cpu",
        disable_tqdm=True,
        report_to=[],
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
        callbacks=[EndOfIteration()],
    )
    trainer.train()
    import trl as package

    return {"iterations": phases.iterations, "version": package.__version__}


def rate(folder: Path, _: int) -> dict[str, Any]:
    """Floating-point operations a second of matrix products in the shapes of this model, the best of them.

    On a GPU the bytes a second of a copy too, read and written.
    """
    shapes, _ = read_inputs(folder)
    tokens = shapes.mini_batch * (shapes.prompts[1] + shapes.replies[1])
    pairs = [(shapes.hidden, shapes.feed_forward), (shapes.feed_forward, shapes.hidden), (shapes.hidden, shapes.hidden)]
    best = 0.0
    for inner, outer in pairs:
        left, right = (torch.randn(rows, inner, device=DEVICE, dtype=PRECISION) for rows in (tokens, outer))
        product = functools.partial(torch.nn.functional.linear, left, right)
        best = max(best, *(2 * tokens * inner * outer * times_a_second(product) for _ in range(3)))
    found = {"rate": best}
    if DEVICE == "cuda":
        large = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
        found["bandwidth"] = 2 * len(large) * times_a_second(large.clone)
    return found


def times_a_second(work: Callable[[], Any]) -> float:
    """How often it can be done in a second, over one second."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 1.0:
        for _ in range(10 if DEVICE == "cuda" else 1):  # a GPU is to be asked for more before it has finished
            work()
            count += 1
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return count / (time.perf_counter() - started)


SIDES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "ours": ours,
    "profile": profiled,
    "trl": trl,
    "trl_tuned": functools.partial(trl, tuned=True),
    "rate": rate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args, more = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    if more and args.side != "ours":
        parser.error(f"{args.side} takes no {more[0]}")
    result = SIDES[args.side](args.folder, args.iterations, *([more] if more else []))
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # Not ru_maxrss, which starts with what the parent held.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    print(json.dumps({**result, "peak_bytes": peak}))


if __name__ == "__main__":
    main()

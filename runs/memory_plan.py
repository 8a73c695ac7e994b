"""How much memory a run needs, worked out before a weight is loaded: the --plan of the three training scripts.

The base is built from its config.json on torch's meta device, which gives shapes without numbers, and gets its adapters and
heads from the same functions as in a run: so weights, adapters, gradients and optimizer state are counted, not estimated.
What a forward and a backward pass hold depends on the model's code, so that very code runs on fake tensors, which have
shapes and a device and no memory, while every storage that comes and goes is added up (`dry_run`).  Logits and the
key-value cache are arithmetic over the sizes that the scripts use.

Every row is taken to be as long as the arguments allow, with a little padding somewhere in the batch.  Not counted: what
the kernels and the allocator keep for themselves (fragmentation, cuBLAS, CUDA's own context), the data set, the buckets of
DDP, and the sharding of DeepSpeed and FSDP.  docs/performance.md compares plans with measured peaks.

Shapes: B rows, L tokens of a row (P prompt and T reply in stage 3), H hidden width, V vocabulary.
"""

import copy
import math
import resource
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from lora.adapters import SavedAdapter
from lora.base_model import base_config, hidden_width
from lora.heads import add_hidden_state_fn
from lora.lora_layers import new_lora_config
from lora.sharding import loading_whole
from rewards.ready_made import ReadyMade
from rewards.reward_model import new_reward_model
from rollout.batch import pass_limits
from rollout.logprobs import logit_bytes
from rollout.model import assemble_ppo_model
from utils.arguments import LoraArguments, ModelArguments
from utils.batching import part_size, sft_part_size
from utils.console import InputError, one_line, say

FLOAT = 4  # bytes of float32, which adapters, heads, gradients and optimizer state are in
TRL_TILE = (4096, 32768)  # tokens and vocabulary of one tile in the fused LM head of TRL's SFTTrainer
SMALLER = {
    "training": ("per_device_train_batch_size", "activation_checkpointing"),
    "evaluation": ("per_device_eval_batch_size",),
}  # stages 1 and 2, see `Plan`


class CannotPlan(InputError):
    """The base's code does not run on tensors without numbers."""


@dataclass(frozen=True)
class Plan:
    """Bytes by part.  `held` is there all the time, the parts of a phase while it lasts; the phases follow each other."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    smaller: dict[str, tuple[str, ...]]  # first word of a phase -> arguments that make it smaller, the cheapest first

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return sum(self.held.values()) + sum(self.phases[self.fullest].values())


class Passes(NamedTuple):
    """Bytes that a pass through the decoder needs beside the weights, its inputs included."""

    kept: int  # after the forward pass, for the backward pass; without gradients: nothing but the result
    forward: int  # the most during the forward pass
    backward: int  # the most by the end of the backward pass; 0 without gradients


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def empty_base(model_args: ModelArguments, dtype: torch.dtype, kind: type = AutoModelForCausalLM) -> PreTrainedModel:
    """The base without numbers: on the meta device, frozen.  kind: the Auto class, for another model than the base.

    Raises InputError when its configuration cannot be read.
    """
    config = base_config(model_args)
    try:
        with loading_whole(), torch.device("meta"):  # ZeRO-3 would spread numbers that are not there
            base = kind.from_config(config, dtype=dtype, trust_remote_code=model_args.trust_remote_code)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"cannot build {model_args.model_name_or_path} from its config.json: {one_line(error)}"
        ) from error
    return base.requires_grad_(False).eval()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """numel * element size, summed; a tensor that is there twice (a tied embedding) counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def base_bytes(base: PreTrainedModel, load_in_4bit: bool) -> int:
    """Weights and buffers of the base, before adapters are on it.

    In 4 bit each linear layer but the output embedding takes half a byte a weight, one byte a block of 64 weights for its
    scale, and 4 bytes a 256 blocks for the scale of the scales (Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    total = tensor_bytes([*base.parameters(), *base.buffers()])
    if load_in_4bit:
        for weight in quantized_weights(base):
            blocks = -(-weight.numel() // 64)
            total += weight.numel() // 2 + blocks + -(-blocks // 256) * FLOAT - weight.numel() * weight.element_size()
    return total


def quantized_weights(base: PreTrainedModel) -> list[Tensor]:
    """The matrices that --load_in_4bit quantises: all linear layers but the output embedding."""
    output = base.get_output_embeddings()
    return [
        module.weight for module in base.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    ]


def optimizer_bytes(shapes: Iterable[torch.Size], optimizer: str) -> int:
    """State of the optimizer, float32, by the name that --optim has.

    AdamW keeps two numbers a weight.  Adafactor keeps a row and a column for a matrix, else one number a weight (Shazeer and
    Stern 2018, arXiv:1804.04235, section 3).  bitsandbytes' 8-bit optimizers keep two bytes a weight, plain SGD nothing.
    Any other one is taken for AdamW.
    """
    shapes = list(shapes)
    if optimizer == "adafactor":
        return sum(FLOAT * (sum(shape[-2:]) if len(shape) > 1 else shape.numel()) for shape in shapes)
    weights = sum(shape.numel() for shape in shapes)
    if optimizer == "sgd":
        return 0
    return weights * (2 if "8bit" in optimizer else 2 * FLOAT)


# ---------------------------------------------------------------------------------------------------------------------
# Passes through the decoder
# ---------------------------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Adds up the storages that are made inside, while they live."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in existing}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default:
            # the experts of a mixture: of fake tensors torch multiplies bfloat16 alone, of real ones the others too
            left, right, *rest = args
            result = func(left.bfloat16(), right.bfloat16(), *rest, **kwargs).to(left.dtype)
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._forget, key)
        return result

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def _fake(model: nn.Module, device: torch.device) -> None:
    """Put fake tensors in the place of the model's own.  To be called inside FakeTensorMode."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = fake
                tensors[name] = made[id(tensor)]


def dry_run(model: PeftModel, rows: int, length: int, args: TrainingArguments, training: bool) -> Passes:
    """What a pass of `rows` x `length` tokens through the decoder of a model on the meta device holds.

    training: with gradients and dropout, and with activation checkpointing where `args` ask for it.
    Raises CannotPlan for a model whose code looks at the numbers in its tensors, which fake ones do not have.
    """
    model = copy.deepcopy(model)
    device = torch.device(args.device.type)
    if training and args.activation_checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable(args.activation_checkpointing_kwargs)
    model.train(training)
    half = torch.bfloat16 if args.bf16 else torch.float16
    try:
        with FakeTensorMode(), torch.set_grad_enabled(training):
            _fake(model, device)
            inputs = {
                name: torch.ones(rows, length, dtype=torch.long, device=device)
                for name in ("input_ids", "attention_mask")
            }
            with _Live([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
                with torch.autocast(device.type, half, enabled=bool(args.bf16 or args.fp16)):
                    hidden = model(**inputs, hidden_state_fn=lambda base, hidden: hidden)
                kept, forward = live.now, live.most
                if training:
                    hidden.backward(torch.empty_like(hidden))
                return Passes(kept, forward, live.most if training else 0)
    except RuntimeError as error:
        name = type(model.get_base_model()).__name__
        raise CannotPlan(f"no plan for {name}, whose code looks at numbers: {one_line(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Logits and the key-value cache
# ---------------------------------------------------------------------------------------------------------------------


def head_widths(config: PreTrainedConfig) -> list[int]:
    """Numbers of a query head in each layer, which differ in Gemma 4."""
    layers = list(config.per_layer_config) or [config] * config.num_hidden_layers
    return [getattr(layer, "head_dim", None) or config.hidden_size // config.num_attention_heads for layer in layers]


def cache_bytes(base: PreTrainedModel, rows: int, length: int) -> int:
    """Keys and values of every layer: layers * 2 * B * L * key-value heads * head width, in the type of the base.

    0 for a base without attention, such as Mamba: the states in their place do not grow with a row.
    """
    config = base.config.get_text_config()
    if not hasattr(config, "num_attention_heads"):
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * rows * length * heads * sum(head_widths(config)) * base.dtype.itemsize


def sampling_phases(
    model: PeftModel, prompts: int, rows: int, prompt: int, reply: int, args: TrainingArguments
) -> dict[str, dict]:
    """Phases of the sampler: reading prompts of P tokens, each once, and the last step of B replies of T.

    A step lengthens the cache of a layer by copying it, and repeats keys and values for the query heads that share them:
    2 * B * (P + T) * heads * head width at once.  Drawing a token from [B, V] logits needs them, log-probs,
    probabilities and the blocks of these (4).
    """
    base = model.get_base_model()
    config = base.config.get_text_config()
    width = max(head_widths(config)) if hasattr(config, "num_attention_heads") else 0
    repeated = 2 * rows * (prompt + reply) * getattr(config, "num_attention_heads", 0) * width * base.dtype.itemsize
    return {
        "reading prompts": {
            "KV cache": cache_bytes(base, prompts, prompt),
            "activations": dry_run(model, prompts, prompt, args, training=False).forward,
        },
        "sampling": {
            "KV cache": cache_bytes(base, rows, prompt + reply),
            "activations": repeated,
            "logits": 4 * rows * len(base.get_output_embeddings().weight) * FLOAT,
        },
    }


def sft_logit_bytes(base: PreTrainedModel, tokens: int, args: TrainingArguments, training: bool) -> int:
    """The most that TRL's fused LM head holds of the logits of N tokens: it goes through them in tiles.

    On a GPU one kernel works in the buffer of a tile, which always has its full width.  On a CPU only the columns in use
    become resident, and there are copies of them: 7.25 in the backward pass, 3 without.  Beside the tile lie the hidden
    states [N, H] in one piece, and their gradient.
    """
    rows, columns = min(tokens, TRL_TILE[0]), TRL_TILE[1]
    if args.device.type == "cuda":
        tile = rows * columns * (2 if args.bf16 or args.fp16 else FLOAT)
    else:
        tile = int((8.25 if training else 4) * rows * min(len(base.get_output_embeddings().weight), columns) * FLOAT)
    return tile + (1 + training) * tokens * hidden_width(base) * FLOAT


# ---------------------------------------------------------------------------------------------------------------------
# The three stages
# ---------------------------------------------------------------------------------------------------------------------


def sft_plan(
    model_args: ModelArguments, lora: LoraArguments, args: TrainingArguments, dtype: torch.dtype, evaluates: bool
) -> Plan:
    """Stage 1: `per_device_train_batch_size` rows of `max_length` tokens, which go through the model in parts; TRL's loss.

    What the parts keep adds up, and the loss needs more beside it for one part only.  An evaluation has a single part.
    """
    base, sizes = _empty(model_args, dtype)
    add_hidden_state_fn(base)
    model = get_peft_model(base, new_lora_config(lora, base, "CAUSAL_LM"))
    rows = args.per_device_train_batch_size
    kinds = [("training", rows, min(rows, sft_part_size(rows, args.device)), True)]
    if evaluates:
        kinds.append(("evaluation", args.per_device_eval_batch_size, args.per_device_eval_batch_size, False))
    phases = {}
    for what, rows, part, training in kinds:
        passes = dry_run(model, part, args.max_length, args, training)
        others = passes.kept * (math.ceil(rows / part) - 1)
        logits = sft_logit_bytes(base, part * (args.max_length - 1), args, training)
        phases[f"{what}, forward"] = {"activations": others + passes.forward}
        phases[f"{what}, loss"] = {"activations": others + passes.kept, "logits": logits}
        if training:
            phases[f"{what}, backward"] = {"activations": others + passes.backward}
    return _plan(model, sizes, args, phases, SMALLER)


def reward_plan(
    model_args: ModelArguments,
    max_length: int,
    lora: LoraArguments,
    args: TrainingArguments,
    dtype: torch.dtype,
    sft: SavedAdapter | None = None,
) -> Plan:
    """Stage 2: chosen and rejected are 2B rows, which go through the model in parts (`part_size`).

    sft: what the reward adapter starts from, if not from nothing.
    What the parts of all members of the ensemble keep adds up; the backward pass needs more beside it for one part only.
    """
    base, sizes = _empty(model_args, dtype)
    model, members = new_reward_model(base, lora, args.seed, args.ensemble_size, sft)
    rows = 2 * args.per_device_train_batch_size
    part = min(rows, part_size(rows))
    passes = dry_run(model, part, max_length, args, training=True)
    kept = passes.kept * len(members) * rows // part
    scored = dry_run(model, 2 * args.per_device_eval_batch_size, max_length, args, training=False)
    phases = {
        "training, forward": {"activations": kept - passes.kept + passes.forward},
        "training, backward": {"activations": kept - passes.kept + passes.backward},
        "evaluation": {"activations": scored.forward},
    }
    return _plan(model, sizes, args, phases, SMALLER)


def ppo_plan(
    model_args: ModelArguments,
    args: TrainingArguments,
    sft: SavedAdapter,
    reward: SavedAdapter | None,
    dtype: torch.dtype,
    ready_made: ReadyMade | None = None,
) -> Plan:
    """Stage 3: `batch_size` replies are sampled at once, judged and trained on `mini_batch_size` at a time, or fewer.

    The update keeps the activations of the policy and, with --critic adapter, of the critic, which goes backward first.
    Of a ready-made reward model on the policy's device the weights are counted, not what its passes need.
    """
    base, sizes = _empty(model_args, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*which is a no-op")  # the adapters' numbers have no place to go to
        model = assemble_ppo_model(base, sft, reward, args.values_from == "adapter", args.values_from is not None)
    reply = args.output_max_length
    rows, prompts = args.batch_size, args.batch_size // args.replies_per_prompt
    if args.guard != "off" or args.eval_strategy != "no":  # held-out prompts are answered in batches of their own
        rows, prompts = (max(count, args.per_device_eval_batch_size) for count in (rows, prompts))
    mini = min(args.mini_batch_size, max(1, pass_limits(base, args.device)[1] // args.max_length))
    judged = dry_run(model, mini, args.max_length, args, training=False)
    trained = dry_run(model, mini, args.max_length, args, training=True)
    others = trained.kept if args.values_from == "adapter" else 0
    phases = {
        **sampling_phases(model, prompts, rows, args.max_length - reply, reply, args),
        "judging, decoder": {"activations": judged.forward},
        "judging, log-probs": {
            "activations": judged.kept + mini * reply * hidden_width(base) * FLOAT,
            "logits": logit_bytes(base, mini * reply, False, args.device),
        },
        "update, forward": {"activations": others + trained.forward},
        "update, log-probs": {
            "activations": others + trained.kept,
            "logits": logit_bytes(base, mini * reply, True, args.device),
        },
        "update, backward": {"activations": others + trained.backward},
    }
    sampler_rows = ("batch_size",) if rows == args.batch_size else ("per_device_eval_batch_size",)
    learner_rows = ("mini_batch_size",) if mini == args.mini_batch_size else ()  # else --max_length decides
    smaller = {
        "reading prompts": sampler_rows,
        "sampling": sampler_rows,
        "judging": learner_rows,
        "update": (*learner_rows, "activation_checkpointing"),
    }
    plan = _plan(model, sizes, args, phases, smaller)
    if ready_made is not None and ready_made.device == args.device:
        judge = empty_base(ready_made.model_args, ready_made.dtype, AutoModelForSequenceClassification)
        plan.held["reward model"] = base_bytes(judge, ready_made.model_args.load_in_4bit)
    return plan


class _Sizes(NamedTuple):
    """Bytes of the base before adapters are on it."""

    shapes: int  # as the empty base has it
    held: int  # as a run holds it: less in 4 bit
    work: int  # one layer in full precision, which a pass through a 4-bit layer makes; else 0


def _empty(model_args: ModelArguments, dtype: torch.dtype) -> tuple[PreTrainedModel, _Sizes]:
    base = empty_base(model_args, dtype)
    four = model_args.load_in_4bit
    work = max(weight.numel() for weight in quantized_weights(base)) * dtype.itemsize if four else 0
    return base, _Sizes(base_bytes(base, False), base_bytes(base, four), work)


def _plan(
    model: PeftModel,
    base: _Sizes,
    args: TrainingArguments,
    phases: dict[str, dict[str, int]],
    smaller: dict[str, tuple[str, ...]],
) -> Plan:
    """The phases with what is held all the time beside them."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    held = {
        "base": base.held,
        "adapters and heads": tensor_bytes([*model.parameters(), *model.buffers()]) - base.shapes,
        "gradients": tensor_bytes(trainable),
        "optimizer": optimizer_bytes([parameter.shape for parameter in trainable], str(args.optim.value)),
    }
    if args.device.type == "cpu":
        held["Python and libraries (measured)"] = resident_bytes()
    if base.work:
        phases = {name: {**parts, "a layer in full precision": base.work} for name, parts in phases.items()}
    return Plan(held, phases, smaller)


# ---------------------------------------------------------------------------------------------------------------------
# What there is, and what to say
# ---------------------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """What this process holds now (on macOS: at most held so far)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes(device: torch.device) -> int | None:
    """What a run may take: free memory of the GPU; else that of the machine, or of this process's cgroup where that is less,
    with what this process holds already.  None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    free = [int(line.split()[1]) * 1024]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),  # version 2, and 1
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).exists() and Path(limit).read_text().strip().isdecimal():
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free)) + resident_bytes()


def gib(size: int) -> str:
    """Bytes for people: GiB, or MiB where it is less than one tenth of one."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"


def plan_table(plan: Plan) -> str:
    """The plan as text: what is held, the fullest phase in parts, the others in one number each."""
    rows = [*plan.held.items()]
    rows += [(f"{part} ({plan.fullest})", size) for part, size in plan.phases[plan.fullest].items()]
    rows += [("peak", plan.peak)]
    rows += [
        (f"  for comparison, all of: {name}", sum(parts.values()))
        for name, parts in plan.phases.items()
        if name != plan.fullest
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {gib(size):>10}" for name, size in rows)


def hint(plan: Plan, model_args: ModelArguments, args: TrainingArguments, available: int) -> str:
    """What makes the fullest phase smaller, what costs the run least first; only what is not at its end already."""
    options = []
    if sum(plan.held.values()) < available:  # else no phase is to blame
        for name in plan.smaller[plan.fullest.partition(",")[0]]:
            value = getattr(args, name)
            if value is False:
                options.append(f"--{name} true")
            elif value is not True and value > 1:
                options.append(f"a --{name} below {value}")
        options.append("a shorter --max_length")
    if not model_args.load_in_4bit:
        options.append("--load_in_4bit true")
    return f"try {', '.join([*options, 'a smaller base'])}, in this order"


def announce(make: Callable[[], Plan], model_args: ModelArguments, args: TrainingArguments, only_plan: bool) -> None:
    """Print the plan where only a plan was asked for; say in one line that a run will not fit, and what to change.

    Raises InputError for a run that will not fit when only a plan was asked for.
    """
    try:
        plan = make()
    except CannotPlan as error:
        if only_plan:
            raise
        say(f"warning: {error}; whether the run fits is not known")
        return
    available = available_bytes(args.device)
    if only_plan:
        print(plan_table(plan))
    if available is None:
        return
    if only_plan:
        print(f"free: {gib(available)}")
    if plan.peak > available:
        text = f"this run needs about {gib(plan.peak)} (in {plan.fullest}) and {gib(available)} are free; "
        text += hint(plan, model_args, args, available)
        if only_plan:
            raise InputError(text)
        say(f"warning: {text}")

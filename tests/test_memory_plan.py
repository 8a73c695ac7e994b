"""--plan: its parts against bytes worked out by hand or counted in a real model, and what people see of it."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, Trainer, TrainingArguments
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

import reward_modeling
import rl_training
import sft_training
from lora.adapters import read_adapter
from rewards.reward_model import new_reward_model
from rl_training import PPOArguments
from rollout import distribution
from rollout.distribution import Sampling, sampling_logits
from rollout.logprobs import logit_bytes, tiled_logprobs
from rollout.model import assemble_ppo_model
from runs import memory_plan
from runs.memory_plan import head_widths
from tests.conftest import FAMILIES, save_base
from tests.helpers import load_plain, make_stages, run_main
from tests.tiny import tiny_model
from utils.arguments import LoraArguments, ModelArguments
from utils.console import InputError

# The tests' Llama, in numbers: 2 embeddings of 320 x 32; in each of 2 layers q and o of 32 x 32, k and v of 16 x 32, three
# matrices of 64 x 32 and two norms of 32; a norm; and the 4 frequencies of RoPE, which transformers keeps twice.
MATRICES = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
WEIGHTS = 2 * 320 * 32 + MATRICES + 2 * 2 * 32 + 32


def on_cpu(**arguments):
    return TrainingArguments(output_dir="unused", use_cpu=True, **arguments)


def empty(path, dtype=torch.float32):
    return memory_plan.empty_base(ModelArguments(path), dtype)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    return make_stages(save_base(folder / "base"), folder)


def ppo_model(base, stages, critic=False):
    sft, reward = (read_adapter(path, "--output_dir") for path in (stages.sft, stages.reward))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*which is a no-op")  # numbers that an empty model has no place for
        return assemble_ppo_model(base, sft, reward, critic)


# ---- Weights, adapters, optimizer ----


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_the_base_by_hand(base_path, dtype, size):
    assert memory_plan.base_bytes(empty(base_path, dtype), load_in_4bit=False) == WEIGHTS * size + 2 * 4 * 4


def test_bytes_of_a_base_in_4_bit_by_hand(base_path):
    """Each matrix: half a byte a weight, a byte a block of 64, four bytes for the one group of at most 256 blocks."""
    rest = (WEIGHTS - MATRICES) * 4 + 2 * 4 * 4
    assert (
        memory_plan.base_bytes(empty(base_path), load_in_4bit=True) == rest + MATRICES // 2 + MATRICES // 64 + 2 * 7 * 4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_models_are_as_large_as_real_ones(tmp_path, family):
    """Base, policy, reference, reward adapter, score and value head; and which of it trains."""
    stages = make_stages(save_base(tmp_path / "base", family), tmp_path)
    real = ppo_model(load_plain(stages.base), stages, critic=True)
    shapes = ppo_model(empty(stages.base), stages, critic=True)

    def trains(model):
        return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}

    assert next(shapes.get_base_model().parameters()).is_meta
    assert trains(shapes) == trains(real)
    tensors = [memory_plan.tensor_bytes([*model.parameters(), *model.buffers()]) for model in (shapes, real)]
    assert tensors[0] == tensors[1]


def test_a_tied_embedding_counts_once():
    weight = torch.zeros(10, 3)
    assert memory_plan.tensor_bytes([weight, weight, torch.zeros(2, dtype=torch.bfloat16)]) == 124


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd"])
def test_optimizer_state_is_what_the_trainers_optimizer_has(name):
    """But for the counter of steps, one number a tensor."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3, bias=False))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(on_cpu(optim=name))
    optimizer = kind(model.parameters(), **options)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    counted = sum(value.numel() * value.element_size() for value in states if value.dim() > 0)
    assert memory_plan.optimizer_bytes([p.shape for p in model.parameters()], name) == counted


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_keep_two_bytes_a_weight(name):
    assert memory_plan.optimizer_bytes([torch.Size([6, 4]), torch.Size([5])], name) == 2 * 29


# ---- Passes through the decoder ----


@pytest.mark.parametrize(
    ("family", "half"),
    [("llama", False), ("llama", True), ("mixtral", False)],
    ids=["float32", "bfloat16 autocast", "experts in float32"],
)
def test_activations_are_the_storages_that_autograd_really_keeps(tmp_path, family, half):
    """Counted in a real model by torch's own hooks, where every stored tensor passes.

    Mixtral in float32 had no plan, and torch printed a traceback at every start of stage 3.
    """
    tiny_model(family).save_pretrained(tmp_path / "base")
    stages = make_stages(str(tmp_path / "base"), tmp_path)
    passes = memory_plan.dry_run(ppo_model(empty(stages.base), stages), 3, 20, on_cpu(bf16=half), training=True)

    model = ppo_model(load_plain(stages.base), stages).train()
    inputs = {"input_ids": torch.ones(3, 20, dtype=torch.long), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    inputs["attention_mask"][0, -1] = 0  # without padding transformers leaves the mask out
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    weights |= {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: an address must not be used again
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(**inputs, hidden_state_fn=lambda base, hidden: hidden)
    kept.setdefault(hidden.untyped_storage().data_ptr(), (hidden.untyped_storage().nbytes(), hidden))
    counted = sum(size for size, _ in kept.values())
    assert passes.kept == pytest.approx(counted, rel=0.03)
    assert passes.kept <= passes.forward <= passes.backward


def test_checkpointing_keeps_the_inputs_of_the_layers(stages):
    """Hidden states of 3 rows x 20 tokens x 32: into both layers, out of them, and normed; the rest is small."""
    args = on_cpu(activation_checkpointing=True)
    passes = memory_plan.dry_run(ppo_model(empty(stages.base), stages), 3, 20, args, training=True)
    assert 4 * 3 * 20 * 32 * 4 < passes.kept < 5 * 3 * 20 * 32 * 4


def test_twice_the_rows_take_twice_the_memory(stages):
    model = ppo_model(empty(stages.base), stages)
    small, large = (memory_plan.dry_run(model, rows, 32, on_cpu(), training=True) for rows in (2, 4))
    assert [b / a for a, b in zip(small, large, strict=True)] == pytest.approx([2, 2, 2], rel=0.02)


def test_without_gradients_nothing_stays_but_the_hidden_states(stages):
    passes = memory_plan.dry_run(ppo_model(empty(stages.base), stages), 3, 20, on_cpu(), training=False)
    assert passes.kept == 3 * 20 * 32 * 4
    assert passes.backward == 0


def test_code_that_looks_at_numbers_cannot_be_planned(stages, monkeypatch):
    model = ppo_model(empty(stages.base), stages)
    decoder = type(model.get_base_model().base_model)
    plain = decoder.forward

    def looks(self, *args, **inputs):
        return plain(self, *args, **inputs) if inputs["input_ids"].sum().item() else None

    monkeypatch.setattr(decoder, "forward", looks)
    with pytest.raises(memory_plan.CannotPlan, match="no plan for LlamaForCausalLM, whose code looks at numbers"):
        memory_plan.dry_run(model, 3, 20, on_cpu(), training=False)


# ---- Logits and the cache ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_large_as_a_real_one(tmp_path, family):
    path = save_base(tmp_path, family)
    cache = DynamicCache()
    with torch.no_grad():
        load_plain(path)(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory_plan.cache_bytes(empty(path), 3, 7) == real


def test_logits_by_hand(base_path, monkeypatch):
    base = empty(base_path)
    cpu, states = torch.device("cpu"), 3 * 10 * 32 * 4
    assert logit_bytes(base, 10, False, cpu) == 5 * 10 * 320 * 4
    assert logit_bytes(base, 10, True, cpu) == 5 * 10 * 320 * 4 + states
    monkeypatch.setattr(distribution, "TILE", 64)
    assert logit_bytes(base, 10, True, cpu) == 5 * 10 * 64 * 4 + states
    base.get_output_embeddings().weight.requires_grad_(True)
    assert logit_bytes(base, 10, True, cpu) == 6 * 10 * 320 * 4
    monkeypatch.setitem(distribution.LOGIT_CHUNK, "cpu", 320 * 4)  # four tokens at a time
    assert logit_bytes(base, 10, False, cpu) == 5 * 4 * 320 * 4
    # 10 tokens fill one tile of 320 columns, 8.25 times; hidden states of width 32 and their gradient
    assert memory_plan.sft_logit_bytes(base, 10, on_cpu(), training=True) == 8.25 * 10 * 320 * 4 + 2 * 10 * 32 * 4
    assert memory_plan.sft_logit_bytes(base, 5000, on_cpu(), training=False) == 4 * 4096 * 320 * 4 + 5000 * 32 * 4
    for bf16, size in ((False, 4), (True, 2)):  # a GPU's tile has its full width of 32768
        on_gpu = SimpleNamespace(device=torch.device("cuda"), bf16=bf16, fp16=False)
        assert memory_plan.sft_logit_bytes(base, 10, on_gpu, training=True) == 10 * 32768 * size + 2 * 10 * 32 * 4


def test_tiles_of_the_sft_loss_are_trls():
    """Not exported by TRL, so a release may change them without a word."""
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE) == memory_plan.TRL_TILE


@pytest.mark.parametrize("training", [False, True])
def test_log_probs_hold_the_tiles_that_are_counted(base_path, monkeypatch, training):
    """Every storage that 50 tokens through tiles of 64 make, at a temperature, while it lives."""
    monkeypatch.setattr(distribution, "TILE", 64)
    head, states = load_plain(base_path).get_output_embeddings(), torch.ones(50, 32)
    sampling, first = Sampling((2,), 0, 8, temperature=0.7), torch.zeros(50, dtype=torch.bool)

    def process_logits(logits, tile):
        return sampling_logits(logits, None, first, sampling, tile.start)

    tokens = torch.arange(50)
    with memory_plan._Live([head.weight, states, tokens, first]) as live:
        tiled_logprobs(head.requires_grad_(False), states, tokens, process_logits, training)
    counted = logit_bytes(empty(base_path), 50, training, torch.device("cpu"))
    assert 0.8 * counted < live.most < 1.05 * counted


# ---- Whole plans ----


@pytest.fixture
def cheap(monkeypatch):
    """Passes as simple numbers: a kilobyte a token is kept, twice that at the worst."""

    def dry_run(model, rows, length, args, training):
        return memory_plan.Passes(
            1000 * rows * length * training, 1500 * rows * length, 2000 * rows * length * training
        )

    monkeypatch.setattr(memory_plan, "dry_run", dry_run)


def make_ppo_plan(stages, load_in_4bit=False, **arguments):
    small = {"batch_size": 8, "mini_batch_size": 4, "max_length": 48, "output_max_length": 16, **arguments}
    args = PPOArguments(output_dir="unused", use_cpu=True, **small)
    adapters = [read_adapter(path, "--output_dir") for path in (stages.sft, stages.reward)]
    model_args = ModelArguments(stages.base, load_in_4bit=load_in_4bit)
    return memory_plan.ppo_plan(model_args, args, *adapters, torch.float32)


def test_what_ppo_holds_by_hand(cheap, stages):
    """LoRA of rank 4 on all matrices: 4 * (rows + columns) each, for policy, reference and reward; heads of 32 (+ 1)."""
    lora = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (64 + 32))
    held = make_ppo_plan(stages).held
    assert held["gradients"] == (lora + 33) * 4
    assert held["optimizer"] == (lora + 33) * 8
    assert held["adapters and heads"] == (3 * lora + 33 + 2 * 32) * 4  # PEFT keeps the score head that it wrapped


def test_phases_of_ppo_by_hand(cheap, stages):
    """8 rows of 32 prompt and 16 reply tokens, judged and trained on 4 at a time; 4 heads of 8, 2 with keys."""
    cache = 2 * 2 * 8 * 2 * 8 * 4  # layers, keys and values, rows, heads, width, bytes: of one token
    phases = {
        "reading prompts": {"KV cache": cache * 32, "activations": 1500 * 8 * 32},
        "sampling": {"KV cache": cache * 48, "activations": 2 * 8 * 48 * 4 * 8 * 4, "logits": 4 * 8 * 320 * 4},
        "judging, decoder": {"activations": 1500 * 4 * 48},
        "judging, log-probs": {"activations": 4 * 16 * 32 * 4, "logits": 5 * 64 * 320 * 4},
        "update, forward": {"activations": 1500 * 4 * 48},
        "update, log-probs": {"activations": 1000 * 4 * 48, "logits": 5 * 64 * 320 * 4 + 3 * 64 * 32 * 4},
        "update, backward": {"activations": 2000 * 4 * 48},
    }
    assert make_ppo_plan(stages).phases == phases
    for name in ("update, forward", "update, log-probs", "update, backward"):  # beside the critic's own pass
        phases[name]["activations"] += 1000 * 4 * 48
    assert make_ppo_plan(stages, critic="adapter").phases == phases


def test_passes_are_no_larger_than_the_rollouts_own(cheap, stages, monkeypatch):
    monkeypatch.setattr(memory_plan, "pass_limits", lambda base, device: (1.0, 2 * 48 + 1))
    assert make_ppo_plan(stages).phases["update, backward"] == {"activations": 2000 * 2 * 48}


def test_each_phase_of_a_4_bit_base_holds_a_layer_in_full_precision(cheap, stages):
    made = make_ppo_plan(stages, load_in_4bit=True)
    assert {parts["a layer in full precision"] for parts in made.phases.values()} == {64 * 32 * 4}


@pytest.mark.parametrize("evaluates", [False, True])
def test_phases_of_sft_by_hand(cheap, stages, evaluates):
    """4 rows of 48 tokens, of which 47 have a loss; two go through the model at a time, trained and, without gradients,
    evaluated.  (The plan once took all rows for one pass, as it had been before: 4.3 GiB where a run needed 1.2.)
    """
    args = sft_training.SFTArguments(
        output_dir="unused", use_cpu=True, max_length=48, per_device_train_batch_size=4, per_device_eval_batch_size=2
    )
    made = memory_plan.sft_plan(ModelArguments(stages.base), LoraArguments(), args, torch.float32, evaluates)
    tokens = 2 * 47
    phases = {
        "training, forward": {"activations": (1000 + 1500) * 2 * 48},
        "training, loss": {
            "activations": (1000 + 1000) * 2 * 48,
            "logits": 8.25 * tokens * 320 * 4 + 2 * tokens * 32 * 4,
        },
        "training, backward": {"activations": (1000 + 2000) * 2 * 48},
    }
    if evaluates:
        phases["evaluation, forward"] = {"activations": 1500 * 2 * 48}
        phases["evaluation, loss"] = {"activations": 0, "logits": 4 * tokens * 320 * 4 + tokens * 32 * 4}
    assert made.phases == phases


def test_the_table_has_each_phase_once():
    made = memory_plan.Plan({"base": 5 << 20}, {"a": {"x": 1 << 20}, "b": {"y": 3 << 30, "z": 4 << 20}}, {})
    assert memory_plan.plan_table(made).splitlines() == [
        "base                            5.0 MiB",
        "y (b)                           3.0 GiB",
        "z (b)                           4.0 MiB",
        "peak                            3.0 GiB",
        "  for comparison, all of: a     1.0 MiB",
    ]


def test_the_peak_is_what_is_held_and_the_fullest_phase(stages):
    made = memory_plan.Plan({"base": 5}, {"a": {"x": 1, "y": 2}, "b": {"z": 4}}, {})
    assert (made.fullest, made.peak) == ("b", 9)


@pytest.mark.parametrize(
    ("arguments", "phase"),
    [
        ({"mini_batch_size": 8}, "update, backward"),
        ({"critic": "adapter"}, "update, backward"),
        ({"batch_size": 16}, "sampling"),
        ({"per_device_eval_batch_size": 16}, "sampling"),  # the guard answers held-out prompts
    ],
)
def test_larger_settings_need_more(cheap, stages, arguments, phase):
    plain, larger = (make_ppo_plan(stages, **more) for more in ({}, arguments))
    assert sum(larger.phases[phase].values()) > 1.4 * sum(plain.phases[phase].values())


def test_members_of_an_ensemble_add_up(cheap, stages):
    def backward(members):
        args = reward_modeling.RewardArguments(output_dir="unused", use_cpu=True, ensemble_size=members)
        made = memory_plan.reward_plan(ModelArguments(stages.base), 32, LoraArguments(), args, torch.float32)
        assert made.phases["evaluation"]["activations"] == 1500 * 2 * args.per_device_eval_batch_size * 32
        return made.phases["training, forward"]["activations"], made.held["adapters and heads"]

    (one, held), (three, held_by_three) = backward(1), backward(3)
    # 16 rows of 32 tokens in two parts: what 1 or 3 members keep of both, less one part's, and the forward pass of one
    assert (one, three) == (2 * 256000 - 256000 + 384000, 6 * 256000 - 256000 + 384000)
    base = empty(stages.base)
    model, _ = new_reward_model(base, LoraArguments(), seed=0, ensemble_size=3)
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert held_by_three - held == pytest.approx(trainable * 2 / 3, rel=0.01)


# ---- As commands ----


def words_of(script, stages, data, folder):
    words = ["--model_name", stages.base, "--output_dir", folder / "out", "--plan", "true", "--max_length", 48]
    if script is rl_training:
        words += ["--sft_model_lora_path", stages.sft, "--reward_model_lora_path", stages.reward]
        words += ["--dataset", data["preferences"], "--output_max_length", 16]
    return words


SCRIPTS = [sft_training, reward_modeling, rl_training]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_plan_loads_no_weight_and_writes_nothing(stages, data, tmp_path, monkeypatch, capsys, script):
    base = Path(save_base(tmp_path / "base"))
    (base / "model.safetensors").unlink()
    words = words_of(script, stages._replace(base=str(base)), data, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run_main(script, words, monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    for part in ("base", "adapters and heads", "gradients", "optimizer", "activations", "peak", "free"):
        assert part in shown


@pytest.mark.parametrize(
    ("script", "phase", "rows"),
    [
        (sft_training, "training, loss", "--per_device_train_batch_size below 8"),
        (reward_modeling, "training, backward", "--per_device_train_batch_size below 8"),
        (rl_training, "reading prompts", "--batch_size below 32"),
    ],
    ids=["sft", "reward", "ppo"],
)
def test_a_plan_that_does_not_fit_says_what_to_change(
    cheap, stages, data, tmp_path, monkeypatch, capsys, script, phase, rows
):
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 0)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 512 << 10)
    with pytest.raises(InputError) as refused:
        run_main(script, words_of(script, stages, data, tmp_path), monkeypatch)
    assert re.match(rf"this run needs about .* \(in {phase}\) and 0.5 MiB are free; try a {rows}, ", str(refused.value))
    assert "peak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "phase", "advice"),
    [
        ({}, "update, backward", "a --mini_batch_size below 4, --activation_checkpointing true, "),
        ({"mini_batch_size": 1, "activation_checkpointing": True}, "update, backward", ""),
        ({"max_length": 256}, "update, backward", "--activation_checkpointing true, "),  # on a CPU two rows fill a pass
        ({}, "judging, decoder", "a --mini_batch_size below 4, "),
        ({}, "sampling", "a --batch_size below 8, "),
        ({"per_device_eval_batch_size": 32}, "sampling", "a --per_device_eval_batch_size below 32, "),
    ],
)
def test_the_hint_names_what_makes_the_fullest_phase_smaller(cheap, stages, monkeypatch, arguments, phase, advice):
    """Not where the base alone is too large: then smaller batches do not help."""
    monkeypatch.setattr(memory_plan, "pass_limits", lambda base, device: (1.0, 512))
    made = make_ppo_plan(stages, **arguments)
    full = memory_plan.Plan({"base": 5}, {phase: made.phases[phase]}, made.smaller)
    args = PPOArguments(output_dir="unused", use_cpu=True, **{"batch_size": 8, "mini_batch_size": 4, **arguments})
    whole, in_4bit = ModelArguments(stages.base), ModelArguments(stages.base, load_in_4bit=True)
    ending = "--load_in_4bit true, a smaller base, in this order"
    assert memory_plan.hint(full, whole, args, 6) == f"try {advice}a shorter --max_length, {ending}"
    assert memory_plan.hint(full, whole, args, 4) == f"try {ending}"
    assert memory_plan.hint(full, in_4bit, args, 4) == "try a smaller base, in this order"


def test_ppo_says_before_loading_that_it_will_not_fit_and_goes_on(cheap, stages, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: 10**6)
    words = [word for word in words_of(rl_training, stages, data, tmp_path) if word not in ("--plan", "true")]
    words += ["--steps", 1, "--batch_size", 2, "--mini_batch_size", 2, "--allow_weak_reward", "true", "--guard", "off"]
    run_main(rl_training, [*words, "--ppo_epochs", 1], monkeypatch)
    said = capsys.readouterr().err
    assert said.count("warning: this run needs about") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_base_that_cannot_be_planned_is_still_trained(stages, data, tmp_path, monkeypatch, capsys):
    def cannot(*args, **kwargs):
        raise memory_plan.CannotPlan("no plan for X, whose code looks at numbers")

    monkeypatch.setattr(memory_plan, "dry_run", cannot)
    words = [word for word in words_of(rl_training, stages, data, tmp_path) if word not in ("--plan", "true")]
    words += ["--steps", 1, "--batch_size", 2, "--mini_batch_size", 2, "--allow_weak_reward", "true", "--guard", "off"]
    run_main(rl_training, [*words, "--ppo_epochs", 1], monkeypatch)
    assert "whether the run fits is not known" in capsys.readouterr().err
    with pytest.raises(InputError, match="no plan for X"):
        run_main(rl_training, words_of(rl_training, stages, data, tmp_path), monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_missing_base_is_one_line(stages, data, tmp_path, monkeypatch, script):
    words = words_of(script, stages._replace(base=str(tmp_path / "nowhere")), data, tmp_path)
    with pytest.raises(InputError, match="nowhere"):
        run_main(script, words, monkeypatch)


def test_a_cgroup_limits_what_is_available(tmp_path, monkeypatch):
    """A container's limit counts where it is below the machine's free memory."""
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000 kB\n",
        "/sys/fs/cgroup/memory.max": "5000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }

    class FakePath:
        def __init__(self, name):
            self.name = name

        def exists(self):
            return self.name in files

        def read_text(self):
            return files[self.name]

    monkeypatch.setattr(memory_plan, "Path", FakePath)
    monkeypatch.setattr(memory_plan, "resident_bytes", lambda: 7)
    assert memory_plan.available_bytes(torch.device("cpu")) == 4000000 + 7
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory_plan.available_bytes(torch.device("cpu")) == 8000 * 1024 + 7
    files.clear()
    assert memory_plan.available_bytes(torch.device("cpu")) is None


def test_heads_of_different_widths_are_counted():
    """Gemma 4 has wider heads in its layers of full attention, and the plan of stage 3 died over it."""
    assert head_widths(tiny_model("gemma4_text").config) == [8, 512]
    assert head_widths(tiny_model("llama").config) == [8, 8]

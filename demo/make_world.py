"""Makes the demo's world on the spot: a tokenizer, a tiny base model and the data sets of the three stages.

    python -m demo.make_world --output_dir outputs/demo/world --seed 0

Writes, under the output folder:

    base/                       a Llama of about a million parameters, a normal Hugging Face model folder
    sft.jsonl                   prompt, response
    preferences.jsonl           prompt, chosen, rejected
    preferences_heldout.jsonl   the same, on held-out prompts
    prompts.jsonl               prompt, for PPO
    guard_prompts.jsonl         prompt, that no stage trains on, for PPO's guard
    heldout_prompts.jsonl       others of that kind, for the comparison at the end

The base is pretrained on generated text for about a minute on two CPU cores. It writes the language and does not
answer: no pretraining text has an answer in the prompt template. The same seed gives the same files.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import world

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048
BLOCK = 64  # tokens; a prompt in its template with its reply has about as many
WARMUP = 0.05  # share of the steps
CLIP = 1.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to; must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the weights and the pretraining")
    parser.add_argument("--steps", type=int, default=450, help="pretraining steps")
    parser.add_argument("--batch_size", type=int, default=16, help=f"blocks of {BLOCK} tokens a step")
    parser.add_argument("--learning_rate", type=float, default=4e-3, help="peak, after the warmup")
    parser.add_argument("--sft_rows", type=int, default=3000)
    parser.add_argument("--preference_rows", type=int, default=3200)
    parser.add_argument("--heldout_rows", type=int, default=400, help="held-out preference rows")
    parser.add_argument("--prompts", type=int, default=960, help="prompts for PPO")
    parser.add_argument("--guard_prompts", type=int, default=48, help="held-out prompts that PPO's guard looks at")
    parser.add_argument("--heldout_prompts", type=int, default=192)
    return parser.parse_args(argv)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's words: it loses no character of any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: four Chinese characters, so that no token is a whole sentence
        show_progress=False,
    )
    # Pieces rather than texts: a token then never joins a topic to the words around it, whichever topic it is.
    tokenizer.train_from_iterator([*world.vocabulary_pieces(), *["问：", "\n\n答：", "\n"] * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A tiny Llama with random weights, drawn so that its attention heads begin by copying what they look at.

    Staying on the topic is copying; heads that start halfway there learn it in a fraction of the steps.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): the usual 0.02 is for models ten times as wide
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)
    return model


def packed_blocks(tokenizer: PreTrainedTokenizerFast, seed: int, blocks: int) -> torch.Tensor:
    """Pretraining texts, each ended by an EOS and packed end to end: token ids [blocks, BLOCK]."""
    ids: list[int] = []
    round_ = 0
    while len(ids) < blocks * BLOCK:
        # String seeds keep the rounds apart from the other seeds' rounds.
        texts = world.pretraining_texts(seed * 1000 + round_, 2000)
        for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids += [*row, tokenizer.eos_token_id]
        round_ += 1
    return torch.tensor(ids[: blocks * BLOCK]).view(blocks, BLOCK)


def schedule(step: int, steps: int) -> float:
    """Factor of the peak learning rate: linear warmup, then a cosine down to a twentieth."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def pretrain(model: LlamaForCausalLM, blocks: torch.Tensor, batch_size: int, learning_rate: float) -> float:
    """One pass of next-token prediction over the blocks; returns the loss of the last step, in nats a token."""
    steps = len(blocks) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    model.train()
    progress = tqdm(blocks[: steps * batch_size].split(batch_size), desc="pretraining the base", unit="step")
    for batch in progress:  # [batch_size, BLOCK]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return loss.item()


def write_data(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> None:
    """The data sets, as .jsonl files in the output folder."""

    backend = tokenizer.backend_tokenizer  # the Rust tokenizer: a tenth of the time of the wrapper around it

    def tokens(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False))

    seed = args.seed
    held_out = world.heldout_prompts(seed, args.heldout_prompts + args.guard_prompts)
    files = {
        "sft": world.sft_rows(seed, args.sft_rows),
        "preferences": world.preference_rows(seed, args.preference_rows, tokens=tokens),
        "preferences_heldout": world.preference_rows(seed, args.heldout_rows, held_out=True, tokens=tokens),
        "prompts": world.prompts(seed, args.prompts),
        "heldout_prompts": held_out[: args.heldout_prompts],
        "guard_prompts": held_out[args.heldout_prompts :],
    }
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.output_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    # Arguments
    args = parse_args(argv)
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        print(f"error: {args.output_dir} is not empty", file=sys.stderr)
        return 2
    args.output_dir.mkdir(parents=True, exist_ok=True)

    # Tokenizer and data
    tokenizer = train_tokenizer()
    write_data(args, tokenizer)
    blocks = packed_blocks(tokenizer, args.seed, args.steps * args.batch_size)

    # Model
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)

    # Training
    loss = pretrain(model, blocks, args.batch_size, args.learning_rate)

    # Save
    model.save_pretrained(args.output_dir / "base")
    tokenizer.save_pretrained(args.output_dir / "base")
    print(f"{args.output_dir / 'base'}: {model.num_parameters():,} parameters, loss {loss:.3f} nats a token")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

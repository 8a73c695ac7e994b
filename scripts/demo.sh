#!/usr/bin/env bash
# The whole of RLHF in miniature, on a CPU in about five minutes after installation: a tiny base model is pretrained on
# generated text, then SFT, the reward model, PPO and the merge run on it, and a table compares the stages.
#   bash scripts/demo.sh            results in demo_output/
#   SEED=3 OUTPUT=/tmp/demo bash scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_venv.sh requirements.txt

SEED=${SEED:-0}
OUTPUT=${OUTPUT:-demo_output}
if [ -e "$OUTPUT" ] && [ ! -e "$OUTPUT/.demo" ]; then
  echo "error: $OUTPUT exists and is not a folder of this demo; give another one, as OUTPUT=FOLDER bash scripts/demo.sh" >&2
  exit 2
fi
rm -rf "$OUTPUT"
mkdir -p "$OUTPUT"
touch "$OUTPUT/.demo"
# The demo's model is so small that threads cost more than they bring: two took 405 seconds, one takes 270.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

step "a tiny base model and its world"
python -m demo.make_world --output_dir "$OUTPUT/world" --seed "$SEED"
step "stage 1: SFT"
python sft_training.py --config configs/sft_demo.yaml --seed "$SEED" \
  --model_name "$OUTPUT/world/base" --dataset "$OUTPUT/world/sft.jsonl" --output_dir "$OUTPUT/sft"
step "stage 2: reward model"
python reward_modeling.py --config configs/reward_demo.yaml --seed "$SEED" \
  --model_name "$OUTPUT/world/base" --dataset "$OUTPUT/world/preferences.jsonl" \
  --eval_dataset "$OUTPUT/world/preferences_heldout.jsonl" --sft_model_lora_path "$OUTPUT/sft" \
  --output_dir "$OUTPUT/reward"
step "stage 3: PPO"
python rl_training.py --config configs/ppo_demo.yaml --seed "$SEED" \
  --model_name "$OUTPUT/world/base" --dataset "$OUTPUT/world/prompts.jsonl" \
  --eval_dataset "$OUTPUT/world/guard_prompts.jsonl" \
  --sft_model_lora_path "$OUTPUT/sft" --reward_model_lora_path "$OUTPUT/reward" --output_dir "$OUTPUT/ppo" \
  --gold_function demo.gold:gold_score
step "a standalone model of base + PPO adapter"
python merge_lora.py --base_model_name "$OUTPUT/world/base" --adapter_path "$OUTPUT/ppo/best" --output_dir "$OUTPUT/merged"
step "base, SFT and PPO on held-out prompts"
python -m demo.table --folder "$OUTPUT"
step "done: open $OUTPUT/report.html"

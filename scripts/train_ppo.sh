#!/usr/bin/env bash
# Stage 3 on a 7B base, the command of the article without the arguments that have lost their point.
#   MODEL=/models/base SFT=output/sft REWARD=output/reward bash scripts/train_ppo.sh           take output/ppo/best
#   MODEL=... SFT=... REWARD=... OUTPUT=ppo CUDA_VISIBLE_DEVICES=0 bash scripts/train_ppo.sh --steps 200 --log_with none
# Any argument of rl_training.py may follow and wins; relative paths count from the folder you are in.
# The article's --gradient_accumulation_steps 16 is left out: an epoch over 8 replies is one pass of 8.
set -euo pipefail
toolkit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${MODEL:-}" ] || [ -z "${SFT:-}" ] || [ -z "${REWARD:-}" ]; then
  echo "error: MODEL, SFT or REWARD is missing;" \
    "run it as MODEL=NAME_OR_FOLDER SFT=ADAPTER REWARD=ADAPTER [OUTPUT=output/ppo] bash $0 [arguments]" >&2
  exit 2
fi

CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2} "${PYTHON:-python3}" "$toolkit/rl_training.py" \
  --base_model_name "$MODEL" \
  --sft_model_lora_path "$SFT" \
  --reward_model_lora_path "$REWARD" \
  --adafactor False \
  --save_freq 10 \
  --output_max_length 256 \
  --batch_size 8 \
  --ppo_epochs 4 \
  --seed 0 \
  --learning_rate 1e-5 \
  --early_stopping True \
  --output_dir "${OUTPUT:-output/ppo}" \
  --log_with wandb \
  "$@"

#!/usr/bin/env bash
# Stage 2 on a 7B base, the command of the article: a reward model as a LoRA adapter on q, k and v.
#   MODEL=/models/base bash scripts/train_rm.sh                             writes output/reward
#   MODEL=/models/base OUTPUT=rm CUDA_VISIBLE_DEVICES=0 bash scripts/train_rm.sh --dataset my_pairs.jsonl
# Any argument of reward_modeling.py may follow and wins; relative paths count from the folder you are in.
# W_pack is Baichuan's name for q, k and v in one; another model takes --lora_target_modules all-linear.
set -euo pipefail
toolkit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${MODEL:-}" ]; then
  echo "error: no base model was given; run it as MODEL=NAME_OR_FOLDER [OUTPUT=output/reward] bash $0 [arguments]" >&2
  exit 2
fi

CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2} "${PYTHON:-python3}" "$toolkit/reward_modeling.py" \
  --model_name "$MODEL" \
  --lora_target_models W_pack \
  --num_train_epochs 1 \
  --eval_steps 200 \
  --save_steps 100 \
  --per_device_train_batch_size 10 \
  --per_device_eval_batch_size 16 \
  --train_subset -1 \
  --eval_subset -1 \
  --max_length 1000 \
  --output_dir "${OUTPUT:-output/reward}" \
  "$@"

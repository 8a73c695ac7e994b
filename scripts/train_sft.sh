#!/usr/bin/env bash
# Stage 1 on a 7B base: SFT on HC3-Chinese, as a LoRA adapter.
#   MODEL=/models/base bash scripts/train_sft.sh                            writes output/sft
#   MODEL=/models/base OUTPUT=sft_en CUDA_VISIBLE_DEVICES=0 bash scripts/train_sft.sh --dataset my.jsonl --seed 1
# Any argument of sft_training.py may follow and wins; relative paths count from the folder you are in.
set -euo pipefail
toolkit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${MODEL:-}" ]; then
  echo "error: no base model was given; run it as MODEL=NAME_OR_FOLDER [OUTPUT=output/sft] bash $0 [arguments]" >&2
  exit 2
fi

CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2} "${PYTHON:-python3}" "$toolkit/sft_training.py" \
  --model_name "$MODEL" \
  --dataset Hello-SimpleAI/HC3-Chinese \
  --num_train_epochs 1 \
  --per_device_train_batch_size 8 \
  --gradient_accumulation_steps 2 \
  --learning_rate 1e-4 \
  --max_length 1024 \
  --output_dir "${OUTPUT:-output/sft}" \
  "$@"

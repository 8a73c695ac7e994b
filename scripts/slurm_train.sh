#!/usr/bin/env bash
# A training script as a Slurm job that loses nothing: five minutes before its time is up it saves a checkpoint, ends, goes
# back into the queue, and continues when it starts again.  Submit it from the toolkit's folder:
#   sbatch scripts/slurm_train.sh rl_training.py --config configs/ppo_baichuan2_7b.yaml --output_dir output/ppo
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --time 24:00:00 scripts/slurm_train.sh sft_training.py ...
# Each task is a process with a GPU of its own: give --ntasks-per-node and --gpus-per-node the same number.  The output
# folder has to lie on a disk that all nodes share.  `scancel --signal=INT JOB` saves and ends the job for good.
# A PPO iteration that takes longer than five minutes needs more notice: sbatch --signal=B:TERM@1200 ...
#SBATCH --job-name=lora_rlhf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
if [ $# -eq 0 ] || [ ! -f "$1" ]; then
  echo "error: give a training script, found '${1:-}'; run it as sbatch $0 rl_training.py --output_dir FOLDER ..." >&2
  exit 2
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not collide
export MASTER_ADDR MASTER_PORT PYTHON=${PYTHON:-python3}

# Slurm signals this shell; scancel hands it on to the processes themselves, which srun would kill with itself.
preempted=
trap 'preempted=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
# shellcheck disable=SC2016 # these are variables of each task
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$PYTHON" "$@"' task \
  "$@" --resume_from_checkpoint true &
task=$!
status=0
wait "$task" || status=$?
while kill -0 "$task" 2> /dev/null; do # the signal ended the wait, not the task
  status=0
  wait "$task" || status=$?
done

# 143 without the signal is an accident in another process, and would come again.
if [ -n "$preempted" ] && [ "$status" -eq 143 ]; then
  echo "job $SLURM_JOB_ID goes back into the queue, and on from its checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/bin/bash
# Train on several machines under Slurm. From the folder of the project:
#   sbatch --nodes=4 scripts/launch/slurm.sh train_fsdp.py config/train300M_fsdp.yaml run=big
#
# Five minutes before the time limit the run saves and ends, and the job is queued again; it goes on
# from there. The project and out_dir must lie in folders that all machines share.
#SBATCH --job-name=small-gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# one torchrun on each machine; they meet at the first, at a port that few other jobs have
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
torchrun=(
    torchrun
    --nnodes="$SLURM_NNODES"
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}"
    --max-restarts=3
    --rdzv-backend=c10d
    --rdzv-id="$SLURM_JOB_ID"
    --rdzv-endpoint="$first:$port"
)

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240          # seconds that a run may save before it is killed
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1        # torch 2.13: else no machine can join later
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

asked=
stop() {
    asked=1
    kill -TERM "$step" # srun passes it on to every torchrun, and those to their processes
}
trap stop TERM

srun --export=ALL --kill-on-bad-exit=1 "${torchrun[@]}" "$@" &
step=$!
wait "$step"
status=$?
if [ -n "$asked" ]; then
    wait "$step" # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

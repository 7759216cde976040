#!/bin/bash
# Train a recipe on several nodes under Slurm. From the root of the repository, on a file system that all nodes share:
#   sbatch --nodes 2 recipes/slurm.sh recipes/train/llama-2-13b-mixture.yaml training.gradient_accumulation_steps=4
# Submitted again, or requeued, it goes on from the run's last checkpoint. Partition, account and limits are your cluster's.
#SBATCH --job-name=hyperllama
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1      # torchrun starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail

source .venv/bin/activate
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"    # srun does not take it over from sbatch by itself

# All nodes meet on the first; the port is the job's own, so that two jobs on a node do not meet each other.
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_backend c10d \
    --rdzv_endpoint "${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))" \
    -m hyperllama train "$@"

#!/bin/bash
#SBATCH --job-name=sa-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
# A process a GPU, since JAX gives each task of SLURM the GPU of its number on the node.
# SIGTERM comes two minutes before the end: the run saves a step and ends with 143; the same job goes on from there.
set -euo pipefail
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not take over from sbatch
srun sa-jax doctor --multihost --mesh fsdp=16 "$PWD"
srun sa-jax train config.py --multihost --mesh fsdp=16 --out "$PWD/run"

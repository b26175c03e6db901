#!/bin/bash
#SBATCH --job-name=sa-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=SIGTERM@120
# SIGTERM comes two minutes before the end: the run saves a step and ends with 143; the same job goes on from there.
set -euo pipefail
srun sa-jax doctor --multihost --mesh fsdp=16 "$PWD"
srun sa-jax train config.py --multihost --mesh fsdp=16 --out "$PWD/run"

#!/usr/bin/env bash
# A run on GPUs of a SLURM cluster: sbatch --nodes=4 launch/slurm.sh
# One process a GPU; JAX reads from SLURM who the others are. After a preemption SLURM queues the
# same job again, and it goes on from its checkpoint.
#SBATCH --job-name=unipic
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source launch/job.env
export JAX_COMPILATION_CACHE_DIR="$WORKDIR/compiled"
exec srun --kill-on-bad-exit=1 $COMMAND --distributed

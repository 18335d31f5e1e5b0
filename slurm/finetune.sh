#!/usr/bin/env bash
# VCR fine-tuning, or any recipe: sbatch [OPTIONS] slurm/finetune.sh [RECIPE] --init-from RUN [--section.key=value ...]
# As slurm/pretrain.sh in everything but the default recipe.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
here=${EVENTLENS_SLURM:-$(dirname -- "${BASH_SOURCE[0]}")}
if [ ! -f "$here/job.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then # this is a copy in Slurm's spool folder
  here=$(scontrol show job "$SLURM_JOB_ID" -o | sed -n '1s/.* Command=\([^ ]*\)\/[^ /]* .*/\1/p')
  [ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
fi
[ -f "$here/job.sh" ] || { echo "eventlens: error: $here/job.sh: no such file (see EVENTLENS_SLURM)" >&2; exit 2; }
here=$(realpath -s "$here")
# shellcheck source=slurm/job.sh
. "$here/job.sh"
train_job finetune.sh vcr_finetune "$@"

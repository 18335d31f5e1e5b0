#!/usr/bin/env bash
# Score a run: sbatch [OPTIONS] slurm/eval.sh RUN --data DIR [OPTIONS of `eventlens eval`]
# A replica of the model per rank, rows shared out over the ranks; --zero3 partitions it.
#SBATCH --job-name=eval
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
here=${EVENTLENS_SLURM:-$(dirname -- "${BASH_SOURCE[0]}")}
if [ ! -f "$here/job.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then # this is a copy in Slurm's spool folder
  here=$(scontrol show job "$SLURM_JOB_ID" -o | sed -n '1s/.* Command=\([^ ]*\)\/[^ /]* .*/\1/p')
  [ -f "$here/job.sh" ] || here=${SLURM_SUBMIT_DIR:-.}/slurm
fi
[ -f "$here/job.sh" ] || { echo "eventlens: error: $here/job.sh: no such file (see EVENTLENS_SLURM)" >&2; exit 2; }
here=$(realpath -s "$here")
# shellcheck source=slurm/job.sh
. "$here/job.sh"
eval_job "$@"

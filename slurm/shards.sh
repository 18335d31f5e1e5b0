#!/usr/bin/env bash
# Build a data set by a job array: sbatch [--array=0-N] slurm/shards.sh --source A,B --root DIR --out DIR [OPTIONS]
# Arguments are those of `eventlens data build`. Every task writes each Nth shard; the one that finds all parts written
# joins them. To repeat task 3 of 12 alone: EVENTLENS_PARTS=12 sbatch --array=3 slurm/shards.sh THE SAME ARGUMENTS
#SBATCH --job-name=shards
#SBATCH --array=0-11
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --output=%x-%A_%a.log
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
shards_job "$@"

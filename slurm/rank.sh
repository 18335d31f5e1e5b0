#!/usr/bin/env bash
# One rank, started by srun: rank.sh COMMAND...
# In: EVENTLENS_EXITS, a file for exit codes (may be unset); EVENTLENS_LOCAL. Out: 0 when COMMAND ended with 0 or with
# 75 (stopped on request after saving), else its exit code, which the file holds with the rank and the node.
# Decision: srun reports neither which rank failed first nor its code, and ends the other ranks as soon as one ends with
# a code other than 0; a planned stop must therefore look like success here, and what it was stands in outcome.json.
set -u

# Slurm signals every process of a step, this shell too. USR1 stays ignored in COMMAND until it takes it over: a rank
# that is still importing would die of it. TERM only must not end this shell before COMMAND.
trap '' USR1
trap ':' TERM

local=${EVENTLENS_LOCAL:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}/eventlens-$UID
mkdir -p "$local" 2>/dev/null || local=/tmp/eventlens-$UID
# Compiled kernels, per node: ranks of different nodes would race for files of a shared home.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$local/torch_extensions}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$local/inductor}

"$@"
code=$?
[ "$code" != 75 ] || exit 0
if [ "$code" != 0 ] && [ -n "${EVENTLENS_EXITS:-}" ]; then
  echo "$code ${SLURM_PROCID:-0} ${SLURMD_NODENAME:-?}" >>"$EVENTLENS_EXITS"
fi
exit "$code"

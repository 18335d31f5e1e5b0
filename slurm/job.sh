# shellcheck shell=bash
# What the job scripts share: site, submission, ranks, signals, end. Sourced by them; $here is the folder of both.
# In: the arguments of a script, the variables of site.sh. Out: a submitted job, or, inside one, ranks and an exit code:
#   0 done   2 configuration   3 data or checkpoint   4 run folder in use   5 watchdog   6 node check   75 stopped
#   143 cancelled; any other code is the first rank's that failed
# Stages of a training job: begin (check, run folder) -> node check -> ranks -> conclude -> exit or requeue.
# Decision: this shell only starts, waits and passes signals on; what an end means is decided by Python
# (eventlens_ds/launch/job.py), which reads outcome.json, because srun rewrites exit codes.

say() { printf 'eventlens: %(%F %T)T %s\n' -1 "$*"; }
die() { local code=$1; shift; printf 'eventlens: error: %s\n' "$*" >&2; exit "$code"; }

load_site() {
  local file=${EVENTLENS_SITE:-$here/site.sh} own
  [ -f "$file" ] || die 2 "$file: no such file; it holds the names of this cluster (EVENTLENS_SITE names another)"
  # shellcheck source=slurm/site.sh
  . "$file" || die 2 "$file: ended with an error"
  own=$here/../.venv/bin/python
  [ -n "${EVENTLENS_PYTHON:-}" ] || EVENTLENS_PYTHON=$([ -x "$own" ] && realpath -s "$own" || echo python3)
  # Scripts and package of one checkout belong together, whatever the environment or the present folder has.
  if [ -f "$here/../eventlens_ds/__init__.py" ]; then
    export PYTHONSAFEPATH=1 PYTHONPATH=${here%/*}${PYTHONPATH:+:$PYTHONPATH}:$PWD
  fi
  read -ra container <<<"${EVENTLENS_CONTAINER:-}"
  read -ra srun_options <<<"${EVENTLENS_SRUN:-}"
}

# Python for this shell: on this node, or in the container as a step of one task.
python() {
  if [ ${#container[@]} = 0 ]; then "$EVENTLENS_PYTHON" "$@"
  else srun --export=ALL --nodes=1 --ntasks=1 --overlap --job-name=python "${container[@]}" "$EVENTLENS_PYTHON" "$@"; fi
}

require_python() {
  [ ${#container[@]} = 0 ] || return 0
  command -v "$EVENTLENS_PYTHON" >/dev/null ||
    die 2 "$EVENTLENS_PYTHON: no such program; set EVENTLENS_PYTHON in $here/site.sh"
  "$EVENTLENS_PYTHON" -c 'import eventlens_ds' 2>/dev/null ||
    die 2 "$EVENTLENS_PYTHON has no eventlens_ds; run \`make install\`, or set EVENTLENS_PYTHON in $here/site.sh"
}

# submit SCRIPT [ARGUMENT...]: sbatch with the names of the site. The first arguments may be ours:
#   --print: show what would be submitted.   --chain N: N jobs, each after the one before, in place of requeueing.
submit() {
  local script=$1 print='' chain=1 name value job='' options=() after=(); shift
  while :; do
    case ${1:-} in
      --print) print=1; shift ;;
      --chain) chain=${2:-}; [[ $chain =~ ^[1-9][0-9]*$ ]] || die 2 "--chain ${2:-}: how many jobs?"; shift 2 ;;
      *) break ;;
    esac
  done
  for name in ACCOUNT PARTITION QOS CONSTRAINT TIME NODES GPUS_PER_NODE; do
    value=EVENTLENS_$name; name=${name,,}
    # A task of a data build has one node and no GPU.
    case $script:$name in shards.sh:nodes | shards.sh:gpus*) continue ;; esac
    [ -z "${!value:-}" ] || options+=("--${name//_/-}=${!value}")
  done
  if [ -n "${lead:-}" ]; then options+=("--signal=B:USR1@$lead"); fi
  options+=("--output=$EVENTLENS_LOGS/%x-%j.log")
  [ "$chain" = 1 ] || export EVENTLENS_REQUEUE=chain
  if [ -n "$print" ]; then
    printf '%q ' sbatch "${options[@]}" "$here/$script" "$@"; printf '\n\n'
    env | grep -E '^(EVENTLENS|SBATCH|NCCL|GLOO|HF)_' | sort; printf '\n'
    cat "$here/$script"; return
  fi
  mkdir -p "$EVENTLENS_LOGS" || die 2 "EVENTLENS_LOGS $EVENTLENS_LOGS: cannot be made"
  for ((; chain > 0; chain--)); do
    [ -z "$job" ] || after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
    job=$(sbatch --parsable "${options[@]}" "${after[@]}" "$here/$script" "$@") || die 2 "sbatch refused the job"
    echo "submitted job $job; log $EVENTLENS_LOGS/${script%.sh}-$job.log"
  done
}

export_environment() {
  # Those of an interactive job or another launcher would be taken for ours.
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT
  export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
  export EVENTLENS_LOCAL
  # A rank per GPU, counted here: a job that is submitted with a number of tasks keeps it, and with it its number of
  # nodes, when it is queued again after one of them is lost (`sbatch --nodes=1-2`).
  # What was asked for, as --exclusive hands out all GPUs of a node; "h100:4" is four of a type.
  tasks=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
  tasks=${tasks##*:}
  [[ $tasks =~ ^[0-9]+$ ]] || die 2 "SLURM_NTASKS_PER_NODE, SLURM_GPUS_PER_NODE: \"$tasks\" is no number of ranks a node"
  [ "$tasks" != 0 ] || tasks=1
  # From Slurm 22.05 on, srun does not take it from sbatch, which did not ask for as many tasks either.
  local cpus=${SLURM_CPUS_PER_TASK:-} here_are=${SLURM_CPUS_ON_NODE:-}
  if [ -n "$cpus" ] && [ -n "$here_are" ] && [ $((cpus * tasks)) -gt "$here_are" ]; then
    cpus=$((here_are / tasks > 0 ? here_are / tasks : 1))
    say "$here_are CPUs a node are $cpus a rank, not $SLURM_CPUS_PER_TASK (--cpus-per-task)"
  fi
  [ -z "$cpus" ] || export SRUN_CPUS_PER_TASK=$cpus
  [ -z "${EVENTLENS_INTERFACE:-}" ] ||
    export NCCL_SOCKET_IFNAME=$EVENTLENS_INTERFACE GLOO_SOCKET_IFNAME=$EVENTLENS_INTERFACE
  restart=${SLURM_RESTART_COUNT:-0}
  say "job $SLURM_JOB_ID, restart $restart, $((tasks * SLURM_JOB_NUM_NODES)) ranks on $SLURM_JOB_NUM_NODES nodes:" \
    "$SLURM_JOB_NODELIST"
}

# Traps only note what came: anything longer in a trap can lose a second signal.
stop=
take_signals() { trap 'stop=USR1' USR1; trap 'stop=TERM' TERM; }

# ranks COMMAND...: run it once for every GPU of the job. Sets code (of srun) and stop_seconds (from our asking to the end).
ranks() {
  local asked=0 begun=$SECONDS last=-9 id name signal half=$((${EVENTLENS_LEAD:-300} / 2))
  srun --export=ALL --job-name=ranks --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$tasks" \
    --ntasks=$((tasks * SLURM_JOB_NUM_NODES)) --kill-on-bad-exit=1 --wait=60 "${container[@]}" "${srun_options[@]}" \
    bash "$here/rank.sh" "$@" &
  local srun=$!
  # A signal between a test of $stop and a `wait` for srun would be overlooked, so we wait a second at a time.
  while kill -0 "$srun" 2>/dev/null; do
    if [ "$stop" = USR1 ]; then
      if [ $asked = 0 ]; then asked=1; begun=$SECONDS; say "USR1: asking the ranks to save and stop"; fi
      # Again and again: a rank that is still starting ignores it. TERM, at half time, ends one that starts too long.
      if [ $((SECONDS - last)) -ge 5 ]; then
        last=$SECONDS
        while read -r id name; do
          [ $((SECONDS - begun)) -lt $half ] && signal=USR1 || signal=TERM
          [ "$name" != ranks ] || scancel --signal="$signal" "$id"
        done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
      fi
    fi
    sleep 1 & wait $!
  done
  wait "$srun"; code=$?
  stop_seconds=$((asked ? SECONDS - begun : 0))
}

requeue() {
  case ${EVENTLENS_REQUEUE:-1} in
    0) die 75 "stopped before the end, EVENTLENS_REQUEUE is 0: submit the same command again" ;;
    chain) say "the next job of the chain goes on"; exit 0 ;;
  esac
  trap - TERM USR1
  # Slurm would also requeue a job that is just being cancelled; its ranks stop a moment before this shell hears of it.
  # And a shell that was cut off from Slurm would stop the attempt that has been started in its place.
  case $(scontrol show job "$SLURM_JOB_ID" -o) in
    *" JobState=RUNNING "*" Restarts=$restart "*) ;;
    *" JobState=RUNNING "*) die 143 "Slurm has started this job again meanwhile: that attempt goes on" ;;
    *) die 143 "stopped because the job is being ended" ;;
  esac
  if scontrol requeue "$SLURM_JOB_ID"; then sleep 300; fi  # it ends this shell
  die 75 "stopped before the end, and Slurm would not requeue the job: submit the same command again"
}

# Exit 6 or requeue without the bad nodes, which the node check has listed in the file $1. A running job cannot change
# its excluded nodes, and requeueing ends this shell, so a job of a minute does it.
refuse_nodes() {
  local bad before job=$SLURM_JOB_ID; bad=$(paste -sd, "$1" 2>/dev/null)
  [ "${EVENTLENS_EXCLUDE:-0}" = 1 ] && [ -n "$bad" ] && [ "$restart" -lt "${EVENTLENS_MAX_CRASHES:-3}" ] || exit 6
  before=$(scontrol show job "$job" -o | sed -n 's/.* ExcNodeList=\([^( ][^ ]*\) .*/\1/p')
  bad=${before:+$before,}$bad
  say "queued again without $bad"
  sbatch --job-name=exclude --nodes=1 --ntasks=1 --time=10 --exclude="$bad" --output=/dev/null --wrap "
    for _ in \$(seq 200); do
      scontrol show job $job -o | grep -qE 'JobState=(REQUEUE_HOLD|PENDING) ' && break; sleep 1
    done
    scontrol update JobId=$job ExcNodeList=$bad && scontrol release $job" || exit 6
  trap - TERM USR1
  scontrol requeuehold "$job" && sleep 300
  exit 6
}

check_nodes() {  # run folder, arguments of `eventlens train`
  local bad=$1/slurm/bad-$SLURM_JOB_ID.$restart
  # Once an attempt: waiting for a run folder in use changes no node.
  if [ "${EVENTLENS_PREFLIGHT:-1}" != 1 ] || [ -n "${checked:-}" ]; then return 0; fi
  checked=1
  rm -f "$bad"
  srun --export=ALL --job-name=check --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300 "${container[@]}" bash "$here/rank.sh" \
    "$EVENTLENS_PYTHON" -m eventlens_ds.launch.node_check --folder "$1" --bad "$bad" \
    --tasks "$tasks" "${@:2}" || refuse_nodes "$bad"
}

# train_job SCRIPT RECIPE [ARGUMENT...]: RECIPE is the script's; a first argument that is no option is another one.
train_job() {
  local script=$1 recipe=$2 ours=() told answer line number; shift 2
  load_site
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    while [ "${1:-}" = --print ] || [ "${1:-}" = --chain ]; do
      if [ "$1" = --chain ]; then ours+=("$1" "${2:-}"); shift; else ours+=("$1"); fi
      shift || die 2 "--chain: how many jobs?"
    done
  fi
  case ${1:-} in '' | -*) ;; *) recipe=$1; shift ;; esac
  [[ -z ${EVENTLENS_DATA:-} || " $*" == *" --data.train"* ]] || set -- "--data.train=$EVENTLENS_DATA" "$@"
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    # What is wrong is said now rather than after a night in the queue.
    require_python
    if [ ${#container[@]} = 0 ]; then
      lead=$(python -m eventlens_ds.launch.job lead --config "$recipe" "$@") || exit
      export EVENTLENS_LEAD=$lead
    fi
    submit "$script" "${ours[@]}" "$recipe" "$@"; exit
  fi
  take_signals
  export_environment
  require_python
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    number=$((SLURM_ARRAY_TASK_ID + 1))
    [ -f "${EVENTLENS_SWEEP:-}" ] ||
      die 2 "a job array of $script is a sweep: EVENTLENS_SWEEP names a file with the settings of each task"
    line=$(sed -n "${number}p" "$EVENTLENS_SWEEP")
    [[ " $line" == *" --io.run"* ]] ||
      die 2 "$EVENTLENS_SWEEP:$number: no --io.run, every task needs a run folder of its own"
    read -ra told <<<"$line"; set -- "$@" "${told[@]}"
  fi
  while :; do
    answer=$(python -m eventlens_ds.launch.job begin --config "$recipe" "$@") || exit
    { read -r state; read -r run; read -r before; } <<<"$answer"
    if [ "$state" = finished ]; then say "$run: finished before, nothing to do"; exit 0; fi
    check_nodes "$run" --config "$recipe" "$@"
    export EVENTLENS_EXITS=$run/slurm/exits-$SLURM_JOB_ID.$restart
    : >"$EVENTLENS_EXITS" || die 2 "$EVENTLENS_EXITS: cannot be written"
    started=$SECONDS code=0 stop_seconds=0
    [ -n "$stop" ] || ranks "$EVENTLENS_PYTHON" -m eventlens_ds.train --config "$recipe" "$@"
    end_of_attempt
  done
}

# Ends this shell, or returns to try again: the run folder is still leased by the attempt before, whose rank lives on
# where Slurm cannot reach it. That is bounded by EVENTLENS_LEASE_TRIES and counts as no crash.
end_of_attempt() {
  answer=$(python -m eventlens_ds.launch.job conclude --run "$run" --before "$before" --exits "$EVENTLENS_EXITS" \
    --srun "$code" --stop "$stop" --stop-seconds "$stop_seconds" --seconds $((SECONDS - started)) \
    --job "$SLURM_JOB_ID.$restart" --nodes "$SLURM_JOB_NODELIST" --max-crashes "${EVENTLENS_MAX_CRASHES:-3}" \
    --lease-tries "${EVENTLENS_LEASE_TRIES:-30}") ||
    die "$((code ? code : 1))" "$run: how it ended cannot be told (srun ended with $code)"
  { read -r decision; read -r code; read -r reason; } <<<"$answer"
  say "$reason"
  case $decision in
    requeue) requeue ;;
    again) sleep "${EVENTLENS_LEASE_WAIT:-30}" & wait $!; [ -z "$stop" ] || requeue ;;
    *) exit "$code" ;;
  esac
}

# eval_job RUN --data DIR [...]: `eventlens eval` on all ranks.
eval_job() {
  load_site
  local first=${1:-}; [ "$first" != --print ] || first=${2:-}
  case $first in '' | -*) die 2 "RUN is missing: sbatch slurm/eval.sh RUN --data DIR" ;; esac
  [ -d "$first" ] || die 2 "$first: no such folder"
  [[ -z ${EVENTLENS_DATA:-} || " $*" == *" --data"* ]] || set -- "$@" --data "$EVENTLENS_DATA"
  if [ -z "${SLURM_JOB_ID:-}" ]; then submit eval.sh "$@"; exit; fi
  take_signals
  export_environment
  require_python
  export EVENTLENS_EXITS=$1/.exits-$SLURM_JOB_ID.$restart
  : >"$EVENTLENS_EXITS" || die 2 "$EVENTLENS_EXITS: cannot be written"
  ranks "$EVENTLENS_PYTHON" -m eventlens_ds eval "$@"
  if [ "$code" != 0 ]; then read -r code _ <"$EVENTLENS_EXITS" || true; fi
  rm -f "$EVENTLENS_EXITS"
  exit "${code:-1}"
}

# shards_job --out DIR ...: this task's part of `eventlens data build`; the last one joins all.
shards_job() {
  local out='' parts=${EVENTLENS_PARTS:-} done_folder word last=''
  load_site
  for word in "$@"; do
    case $word in --out=*) out=${word#--out=} ;; esac
    [ "$last" != --out ] || out=$word
    last=$word
  done
  [ -n "$out" ] || die 2 "--out DIR is missing: sbatch slurm/shards.sh --source A,B --root DIR --out DIR"
  if [ -z "${SLURM_JOB_ID:-}" ]; then submit shards.sh "$@"; exit; fi
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || die 2 "shards.sh is a job array: sbatch --array=0-11 slurm/shards.sh ..."
  if [ -z "$parts" ]; then
    parts=${SLURM_ARRAY_TASK_COUNT:?}
    [ "${SLURM_ARRAY_TASK_MIN:?}-${SLURM_ARRAY_TASK_MAX:?}" = "0-$((parts - 1))" ] ||
      die 2 "--array is not 0-N: EVENTLENS_PARTS says of how many parts these are some"
  fi
  require_python
  say "part $SLURM_ARRAY_TASK_ID of $parts on ${SLURMD_NODENAME:-?}"
  done_folder=$out/journal/parts-$parts
  rm -f "$done_folder/$SLURM_ARRAY_TASK_ID"
  python -m eventlens_ds data build "$@" --part "$SLURM_ARRAY_TASK_ID/$parts" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" || exit
  { mkdir -p "$done_folder" && : >"$done_folder/$SLURM_ARRAY_TASK_ID"; } ||
    die 2 "$done_folder: cannot be written"
  [ "$(find "$done_folder" -type f | wc -l)" = "$parts" ] || exit 0
  # Two tasks may both find all parts written.
  mkdir "$done_folder.joined-by-$SLURM_ARRAY_JOB_ID" 2>/dev/null || exit 0
  say "all $parts parts are written: joining them"
  python -m eventlens_ds data build "$@" --finish; code=$?
  rmdir "$done_folder.joined-by-$SLURM_ARRAY_JOB_ID"
  exit "$code"
}

# shellcheck shell=bash
# Every name of your cluster. The scripts beside this file read it; nothing else has to be edited.
# A value that is set in the environment wins over the one here, so `EVENTLENS_NODES=4 bash slurm/pretrain.sh` works.
# Decision: the defaults ask for what any Slurm cluster of 8-GPU nodes has, so an untouched file works on a plain one.

# 1. What Slurm must know before the job starts. `bash slurm/pretrain.sh ...` hands these to sbatch. Plain
#    `sbatch slurm/pretrain.sh` cannot: Slurm reads #SBATCH lines before any file. Give it options, or export
#    SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS, SBATCH_CONSTRAINT, SBATCH_TIMELIMIT.
: "${EVENTLENS_ACCOUNT:=}"        # --account
: "${EVENTLENS_PARTITION:=}"      # --partition
: "${EVENTLENS_QOS:=}"            # --qos
: "${EVENTLENS_CONSTRAINT:=}"     # --constraint, e.g. h100
: "${EVENTLENS_TIME:=}"           # --time, e.g. 12:00:00
: "${EVENTLENS_NODES:=}"          # --nodes; empty: 1, as the scripts say; 2-4: goes on with 2 when others are gone
: "${EVENTLENS_GPUS_PER_NODE:=}"  # --gpus-per-node, a rank each; empty: 8
: "${EVENTLENS_LOGS:=logs}"       # folder of the jobs' logs, made before they are submitted

# 2. What the job needs once it runs.
: "${EVENTLENS_PYTHON:=}"         # Python of the environment; empty: .venv of this checkout, else python3
: "${EVENTLENS_CONTAINER:=}"      # options of srun that start a container, e.g. --container-image=FILE (pyxis)
: "${EVENTLENS_DATA:=}"           # folder of `eventlens data build`; used where no --data.train is given
: "${EVENTLENS_LOCAL:=}"          # node-local folder for compiled kernels; empty: $SLURM_TMPDIR, $TMPDIR or /tmp
: "${EVENTLENS_INTERFACE:=}"      # network interface of NCCL and gloo, e.g. ib0; empty: they choose
: "${EVENTLENS_SRUN:=}"           # more options of srun for the ranks, e.g. --cpu-bind=cores
: "${EVENTLENS_PREFLIGHT:=1}"     # 1: look at every node before the ranks start; 0: do not
: "${EVENTLENS_EXCLUDE:=0}"       # 1: a node that fails the look is excluded and the job queued again; 0: exit 6

# 3. How long a job goes on by itself.
: "${EVENTLENS_REQUEUE:=1}"       # 1: a job that was stopped is queued again; 0: it ends with 75
: "${EVENTLENS_MAX_CRASHES:=3}"   # attempts in a row that fail without a new checkpoint before the job gives up
: "${EVENTLENS_LEASE_WAIT:=30}"   # seconds until a restarted job asks again for a run folder in use (exit code 4)
: "${EVENTLENS_LEASE_TRIES:=30}"  # how often, then it ends with 4. Longer in all than train.timeout_minutes: an attempt
                                  # that was cut off from Slurm may hold the folder until its collectives time out

# 4. Modules and variables. This runs on the first node of the job; srun hands the environment to all ranks.
# module load cuda
# export NCCL_IB_HCA=mlx5

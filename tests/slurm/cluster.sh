#!/usr/bin/env bash
# A throw-away Slurm cluster on one machine: real slurmctld, slurmd and client commands, every node in namespaces of its
# own (process ids, network, host name, mounts), so that a node can crash or lose its network as a real one does.
#   cluster.sh probe                      how it can run here: root, user, or "none: REASON" with exit code 1
#   cluster.sh start DIR [NODES] [GPUS]   daemons are up and all nodes idle when it returns (2 nodes, 8 GPUs each)
#   cluster.sh exec  DIR COMMAND...       on the controller: sbatch, squeue, scontrol
#   cluster.sh on    DIR n2 COMMAND...    on a node
#   cluster.sh crash DIR n2               power loss: slurmd, steps and tasks of the node are gone at once
#   cluster.sh boot  DIR n2               start it again
#   cluster.sh cut   DIR n2               its network is gone, its processes live;  `mend` brings the network back
#   cluster.sh stop  DIR                  nothing of it is left
# DIR must be short: unix sockets below it have at most 108 bytes. Every process is a descendant of one namespace init,
# whose process id is in DIR/init.pid; ending it ends all. Decision: nodes lie about their CPUs (config_overrides) and
# their GPUs are links to /dev/null, because what is tested is the launcher, not the arithmetic.
set -euo pipefail
PATH=/usr/sbin:/sbin:$PATH
self=$(realpath "$0")

namespaces() {  # what unshare needs beside --fork and --mount-proc
  if [ "$(id -u)" = 0 ]; then echo --mount --net --pid --uts
  else echo --user --map-current-user --keep-caps --mount --net --pid --uts; fi
}

probe() {
  local tool
  for tool in slurmctld slurmd sbatch srun scontrol sinfo squeue scancel unshare nsenter ip; do
    command -v "$tool" >/dev/null || {
      echo "none: $tool is not installed (Debian: apt-get install slurmctld slurmd slurm-client munge iproute2)"; return 1; }
  done
  # shellcheck disable=SC2046  # words on purpose
  if unshare $(namespaces) --fork --mount-proc sh -c 'hostname x && mount -t tmpfs t /mnt && ip link set lo up' 2>/dev/null
  then [ "$(id -u)" = 0 ] && echo root || echo user
  else echo "none: this machine lets nobody here make namespaces (unshare failed)"; return 1; fi
}

write_configuration() {  # nodes gpus
  local nodes=$1 gpus=$2 auth i
  mkdir -p "$D"/{log,state,run,dev,full}; chmod 700 "$D/state"
  if command -v munged >/dev/null; then
    (umask 077; head -c 1024 /dev/urandom >"$D/munge.key")
    auth="AuthType=auth/munge
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
CredType=cred/munge"
  else  # the network namespace is its only guard
    auth="AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none"
  fi
  cat >"$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl(10.99.0.1)
SlurmctldPort=16817
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
$auth
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0,bf_window=1440
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=${CLUSTER_KILL_WAIT:-5}
MinJobAge=600
MessageTimeout=10
BatchStartTimeout=10
CompleteWait=0
InactiveLimit=0
ReturnToService=2
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=n[1-$nodes] NodeAddr=10.99.0.[11-$((10 + nodes))] Port=[17001-$((17000 + nodes))] CPUs=64 RealMemory=4000 Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=${CLUSTER_GRACE:-20}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
  echo "NodeName=n[1-$nodes] Name=gpu File=$D/dev/nvidia[0-$((gpus - 1))]" >"$D/gres.conf"
  for i in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$D/dev/nvidia$i"; done
  # 22.05 wants no cgroup.conf; from 23.02 on this is how to do without cgroups
  case $(slurmd -V | grep -oE '[0-9]+\.[0-9]+' | head -n1) in 20.* | 21.* | 22.*) ;; *) echo CgroupPlugin=disabled >"$D/cgroup.conf" ;; esac
  { echo "127.0.0.1 localhost"; echo "10.99.0.1 ctl"
    for i in $(seq 1 "$nodes"); do mkdir -p "$D/spool/n$i"; echo "10.99.0.$((10 + i)) n$i"; done; } >"$D/hosts"
}

first_child() {  # pid -> pid of its only child, waited for
  local child=
  for _ in $(seq 100); do
    read -r child _ <"/proc/$1/task/$1/children" || true
    [ -n "$child" ] && break; sleep 0.02
  done
  echo "$child"
}

start() {  # nodes gpus
  local nodes=${1:-2} gpus=${2:-8} spaces end init idle
  mkdir -p "$D"; [ ! -e "$D/init.pid" ] || { echo "already started: $D" >&2; exit 1; }
  write_configuration "$nodes" "$gpus"
  # Not inside the command below: its subshell would be taken for the namespace's first process.
  spaces=$(namespaces)
  # shellcheck disable=SC2086
  setsid unshare $spaces --fork --kill-child --mount-proc bash "$self" _init "$D" "$nodes" \
    </dev/null >"$D/log/init.log" 2>&1 &
  init=$(first_child $!); echo "$init" >"$D/init.pid"
  end=$((SECONDS + 30))
  while [ $SECONDS -lt $end ]; do
    idle=$("$self" exec "$D" timeout 2 sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l) || idle=0
    [ "$idle" != "$nodes" ] || exit 0
    kill -0 "$init" 2>/dev/null || { echo "the cluster died:" >&2; tail -n 20 "$D"/log/*.log >&2; exit 1; }
    sleep 0.05
  done
  echo "the cluster is not ready:" >&2; "$self" exec "$D" sinfo -N -l >&2; tail -n 8 "$D"/log/*.log >&2; exit 1
}

run_init() {  # nodes; process 1 of the cluster's namespaces
  local nodes=$1 i; export SLURM_CONF=$D/slurm.conf
  hostname ctl
  mount --bind "$D/hosts" /etc/hosts
  mount -t tmpfs -o size=64k full "$D/full"; cat /dev/zero >"$D/full/fill" 2>/dev/null || true
  ip link set lo up
  if ip link add br0 type bridge 2>/dev/null; then  # a network between the nodes
    ip addr add 10.99.0.1/24 dev br0; ip link set br0 up; echo veth >"$D/run/net"
  else  # all on one interface; Slurm needs an address beside 127.0.0.1
    ip addr add 10.99.0.1/32 dev lo; for i in $(seq 1 "$nodes"); do ip addr add 10.99.0.$((10 + i))/32 dev lo; done
    echo lo >"$D/run/net"
  fi
  [ ! -e "$D/munge.key" ] || munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" \
    --pid-file="$D/run/munged.pid" --seed-file="$D/run/munged.seed" --log-file="$D/log/munged.log"
  slurmctld
  # A slurmd that finds no controller waits a second before it asks again.
  for _ in $(seq 100); do timeout 2 scontrol ping 2>/dev/null | grep -q UP && break; sleep 0.02; done
  for i in $(seq 1 "$nodes"); do "$self" _node "$D" "n$i" & done
  while :; do sleep 3600 & wait $!; done
}

run_node() {  # name; run/NAME.pid holds the node's process 1 as the cluster sees it
  local node=$1 net='' outer inner; export SLURM_CONF=$D/slurm.conf
  [ "$(cat "$D/run/net")" != veth ] || net=--net
  # shellcheck disable=SC2086,SC2016  # $net may be empty; the inner shell expands its own arguments
  unshare --pid --uts --mount $net --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount -t tmpfs -o size=1g shm /dev/shm
    if [ "$2" ]; then until ip -br addr show eth0 2>/dev/null | grep -q 10.99; do sleep 0.01; done; fi
    slurmd -D & while :; do wait || true; sleep 3600 & wait; done' _ "$node" "$net" >"$D/log/node-$node.log" 2>&1 </dev/null &
  outer=$!; inner=$(first_child $outer)
  if [ -n "$net" ]; then
    ip link del "v$node" 2>/dev/null || true
    ip link add "v$node" type veth peer name eth0 netns "$inner"; ip link set "v$node" master br0 up
    nsenter -t "$inner" -n sh -c "ip link set lo up; ip link set eth0 up; ip addr add 10.99.0.$((10 + ${node#n}))/24 dev eth0"
  fi
  echo "$inner" >"$D/run/$node.pid"; wait $outer || true
}

verb=${1:?verb missing, see the head of this file}; shift
[ "$verb" != probe ] || { probe; exit; }
D=$(realpath -m "${1:?DIR missing}"); shift
case $verb in
  start) start "$@" ;;
  exec)
    user=; [ "$(id -u)" = 0 ] || user="-U --preserve-credentials"
    # shellcheck disable=SC2086
    exec nsenter -t "$(cat "$D/init.pid")" $user -m -n -p -u --wdns="$PWD" env SLURM_CONF="$D/slurm.conf" "$@" ;;
  on)
    node=$1; shift
    # shellcheck disable=SC2016
    exec "$self" exec "$D" sh -c 'p=$(cat "$1"); shift; exec nsenter -t "$p" -m -p -u -n --wdns="$PWD" "$@"' _ "$D/run/$node.pid" "$@" ;;
  crash)
    # shellcheck disable=SC2016
    "$self" exec "$D" sh -c 'kill -9 "$(cat "$1")"; rm -f "$1"' _ "$D/run/$1.pid" ;;
  boot) "$self" exec "$D" setsid "$self" _node "$D" "$1" </dev/null >/dev/null 2>&1 & disown ;;
  cut) "$self" exec "$D" ip link set "v$1" down ;;
  mend) "$self" exec "$D" ip link set "v$1" up ;;
  stop)
    init=$(cat "$D/init.pid" 2>/dev/null) || exit 0
    kill -9 "$init" 2>/dev/null || true  # the end of a namespace's process 1 is the end of all in it
    for _ in $(seq 100); do kill -0 "$init" 2>/dev/null || break; sleep 0.05; done
    rm -f "$D/init.pid" ;;
  _init) run_init "$@" ;;
  _node) run_node "$@" ;;
  *) echo "cluster.sh: no such verb: $verb" >&2; exit 2 ;;
esac

#!/usr/bin/env bash
# A Slurm cluster of two nodes on this machine, with ports, keys and state of its own in a folder. As root:
#
#   tests/cluster/cluster.sh start DIR; export SLURM_CONF=DIR/slurm.conf
#   sinfo; sbatch ...
#   tests/cluster/cluster.sh stop DIR
#
# The nodes are named 127.0.0.1 and 127.0.0.2: names that resolve everywhere. Each says that it has 16 cores and 8 GPUs.
set -euo pipefail

fail() {
  echo "cluster.sh: error: $*" >&2
  exit 1
}

configure() {
  local ports i
  for i in munge.key slurm.conf; do [[ ! -e $dir/$i ]] || fail "$dir holds a cluster: stop it, or give another folder."; done
  mkdir -p "$dir/state"
  (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
  for i in {0..7}; do mknod "$dir/gpu$i" c 1 3; done  # as harmless as /dev/null, which these are
  echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
  read -ra ports < <(python3 -c '
import socket
for _ in range(100):  # three free ones, the second and third in a row
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        try:
            a.bind(("", 0)); b.bind(("", 0)); c.bind(("", b.getsockname()[1] + 1))
        except OSError:
            continue
        print(a.getsockname()[1], b.getsockname()[1], c.getsockname()[1])
        break
')
  ((${#ports[@]} == 3)) || fail "no free ports."
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has run out
AuthInfo=socket=$dir/munge.socket,cred_expire=6
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=1
# sbatch refuses what no node can give, as most sites have it
EnforcePartLimits=ALL
KillWait=5
SlurmdTimeout=12
ReturnToService=2
# a job that has to make room for an urgent one is told so, and has a minute to end by itself; an abrupt one has none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=127.0.0.[1-2] NodeHostname=localhost Port=[${ports[1]}-${ports[2]}] CPUs=16 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=abrupt Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
CONF
}

start() {
  local i
  configure
  # by force: it wants a socket for all users, and there is one user here
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/errors.log" || fail "munged did not start: $dir/munged.log."
  slurmctld -c 2>>"$dir/errors.log" || fail "slurmctld did not start: $dir/slurmctld.log."
  for i in 1 2; do
    slurmd -N "127.0.0.$i" 2>>"$dir/errors.log" || fail "slurmd did not start: $dir/slurmd-127.0.0.$i.log."
  done
  for i in {1..60}; do
    [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) != 2 ]] || return 0
    sleep 0.5
  done
  sinfo --Node --long >&2 || :
  tail -n 20 "$dir"/*.log >&2
  fail "the nodes are not idle after 30 seconds."
}

stop() {
  local i name pid
  if [[ -s $dir/slurmctld.pid ]]; then
    scancel --user=root || :
    for i in {1..40}; do  # the steps' own daemons have no files of process ids
      [[ -n $(squeue --noheader) ]] || break
      sleep 0.5
    done
  fi
  for name in slurmd-127.0.0.1 slurmd-127.0.0.2 slurmctld munged; do
    [[ -s $dir/$name.pid ]] || continue
    pid=$(<"$dir/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for i in {1..40}; do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.25
    done
    kill -KILL "$pid" 2>/dev/null || :
  done
  rm -f "$dir"/munge.key "$dir"/munge.socket* "$dir"/gpu[0-7] "$dir"/slurm.conf "$dir"/*.pid
}

[[ $# -eq 2 && $1 =~ ^(start|stop)$ ]] || fail "usage: cluster.sh start|stop DIR"
[[ $(id -u) == 0 ]] || fail "a cluster is started by root only."
mkdir -p "$2"
dir=$(cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
if [[ $1 == start ]]; then
  if ! (start); then
    stop
    exit 1
  fi
else
  stop
fi

#!/usr/bin/env bash
# Runs once on every node of a job: learns which node this is, and starts accelerate's launcher on it.
#
#   launch/node.sh -m oneshot.repair [SETTINGS]       in the repository root, or in a folder of `oneshot init`
#
# Inside a Slurm step of one task per node (slurm/start.sh makes one) Slurm says who we are. Without a job manager these
# four do, all but the second alike on every host; with none of them this is the only machine.
#   ONESHOT_NODES=2  ONESHOT_NODE_RANK=0  ONESHOT_HEAD=10.0.0.1  ONESHOT_PORT=29500
# Anywhere:
#   ONESHOT_ACCELERATE      the accelerate YAML (launch/zero3.yaml)
#   ONESHOT_PROCS_PER_NODE  processes on each node (under Slurm the GPUs it gave; on the only machine the YAML's number)
#   ONESHOT_MODULES         environment modules to load, separated by spaces
#   ONESHOT_VENV            folder of a virtual or conda environment (the one on PATH, else .venv)
# Network interfaces are the libraries' own to choose, or named by NCCL_SOCKET_IFNAME (GPUs) and GLOO_SOCKET_IFNAME.
#
# USR1 is for the workers and would kill the launcher, which therefore ignores it. TERM and INT go to the workers too,
# so that they can end in their own time: the launcher would kill them after 30 seconds.
set -euo pipefail

fail() {
  echo "launch/node.sh: error on $(uname -n): $*" >&2
  # for slurm/start.sh: srun makes a 143 of it where it then ends another node; the first to fail is believed
  if [[ -n ${ONESHOT_CODE_FILE:-} ]]; then (set -C && echo 2 >"$ONESHOT_CODE_FILE") 2>/dev/null || :; fi
  exit 2
}

# need HINT NAME...: all of these variables are set, or one line names those that are not.
need() {
  local hint=$1 missing=() name
  shift
  for name in "$@"; do [[ -n ${!name:-} ]] || missing+=("$name"); done
  ((${#missing[@]} == 0)) || fail "${missing[*]} not set: $hint"
}

# number NAME VALUE MIN MAX
number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3 || 10#$2 > $4)); then
    fail "$1 is '$2': give a whole number from $3 to $4."
  fi
}

# A job manager's function sets nodes, rank, head, port and procs. Another one's is such a function and a line below.
from_slurm() {
  local name
  for name in ONESHOT_NODES ONESHOT_NODE_RANK ONESHOT_HEAD; do  # the submitting shell's, the same on every node
    [[ -z ${!name:-} ]] || fail "$name is set in a Slurm job, where Slurm says it: unset it before sbatch."
  done
  need "this is a Slurm job but no step of one task per node: start it by srun, as slurm/start.sh does." \
    SLURM_STEP_ID SLURM_STEP_NUM_NODES SLURM_STEP_NUM_TASKS SLURM_STEP_NODELIST SLURM_NODEID
  [[ $SLURM_STEP_NUM_TASKS == "$SLURM_STEP_NUM_NODES" ]] || fail \
    "Slurm started $SLURM_STEP_NUM_TASKS tasks on $SLURM_STEP_NUM_NODES nodes: give sbatch --ntasks-per-node=1."
  nodes=$SLURM_STEP_NUM_NODES rank=$SLURM_NODEID
  # the first of "gpu[07-09,12],login1" is gpu07; containers have no scontrol to ask
  head=$(sed 's/\[\([^],-]*\)[^]]*\]/\1/g; s/,.*//' <<<"$SLURM_STEP_NODELIST")
  # of this job and step, below the ports that the kernel hands out by itself
  port=${ONESHOT_PORT:-$((10000 + (SLURM_JOB_ID * 10 + SLURM_STEP_ID) % 20000))}
  procs=${ONESHOT_PROCS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
}

from_variables() {
  need "several hosts need all of ONESHOT_NODES, ONESHOT_NODE_RANK, ONESHOT_HEAD and ONESHOT_PORT." \
    ONESHOT_NODES ONESHOT_NODE_RANK ONESHOT_HEAD ONESHOT_PORT
  nodes=$ONESHOT_NODES rank=$ONESHOT_NODE_RANK head=$ONESHOT_HEAD port=$ONESHOT_PORT
  procs=${ONESHOT_PROCS_PER_NODE:-}
}

nodes=1 rank=0 head='' port='' procs=${ONESHOT_PROCS_PER_NODE:-}
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  from_slurm
elif [[ -n ${ONESHOT_NODES:-}${ONESHOT_NODE_RANK:-}${ONESHOT_HEAD:-}${ONESHOT_PORT:-} ]]; then
  from_variables
fi

yaml=${ONESHOT_ACCELERATE:-launch/zero3.yaml}
[[ $# -gt 0 ]] || fail "nothing to start: give a module, for example -m oneshot.repair, and its settings."
[[ -f $yaml && -d ds_configs ]] || fail "$PWD has no $yaml or no ds_configs/: start in the repository root or a folder of oneshot init."
number "the number of nodes" "$nodes" 1 99999
number "the rank of this node" "$rank" 0 $((10#$nodes - 1))

arguments=(--quiet --config_file "$yaml")
if [[ -n $head ]]; then
  number "the port" "$port" 1024 65535
  [[ -n $procs ]] || fail "how many processes per node is not known: set ONESHOT_PROCS_PER_NODE, or ask Slurm for GPUs."
  getent ahosts "$head" >/dev/null || fail "the head node's name $head is not known here: mend DNS or /etc/hosts."
  # Debian's own /etc/hosts does that, and nobody hears what is wrong before the other hosts' connections are refused
  if ((10#$nodes > 1)) && [[ -z ${GLOO_SOCKET_IFNAME:-} && $(getent ahosts "$(uname -n)") =~ ^(127\.|::1) &&
    ! $(getent ahosts "$head") =~ ^(127\.|::1) ]]; then
    echo "launch/node.sh: note: $(uname -n) is a loopback address here, which processes without a GPU would give to" \
      "the other hosts: set GLOO_SOCKET_IFNAME to the network interface that they can reach." >&2
  fi
  arguments+=(--num_machines "$nodes" --machine_rank "$rank" --main_process_ip "$head" --main_process_port "$port"
    --deepspeed_multinode_launcher standard)
fi
if [[ -n $procs ]]; then
  number "the number of processes per node" "$procs" 1 9999
  arguments+=(--num_processes $((10#$nodes * 10#$procs)))
fi

if [[ -n ${ONESHOT_MODULES:-} ]]; then
  set +u  # what modules run may look at variables that are not set
  # a login shell other than bash has exported no function, but where the one for bash is
  # shellcheck disable=SC1091
  if ! type module >/dev/null 2>&1 && [[ -r $MODULESHOME/init/bash ]]; then . "$MODULESHOME/init/bash" || :; fi
  type module >/dev/null 2>&1 || fail "ONESHOT_MODULES is set, but this shell has no command module."
  read -ra modules <<<"$ONESHOT_MODULES"
  module load "${modules[@]}" || fail "module load $ONESHOT_MODULES failed."
  set -u
fi
if [[ -n ${ONESHOT_VENV:-} ]]; then
  [[ -x $ONESHOT_VENV/bin/accelerate ]] || fail "ONESHOT_VENV is $ONESHOT_VENV, which has no bin/accelerate."
  PATH=$(cd "$ONESHOT_VENV" && pwd)/bin:$PATH
elif ! command -v accelerate >/dev/null && [[ -x .venv/bin/accelerate ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
command -v accelerate >/dev/null || fail "accelerate is not on PATH: run make setup in the repository, or set ONESHOT_VENV."
command -v pkill >/dev/null || fail "pkill is not on PATH: install procps."

# pass_on SIGNAL: to the workers (sessions of their own); before there are any, to the launcher, but for USR1
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  interrupted=yes
  pkill "-$1" -P "$launcher" || [[ $1 == USR1 ]] || kill "-$1" "$launcher" 2>/dev/null || :
}

echo "node $rank of $nodes ($(uname -n)): accelerate launch ${arguments[*]} $*"
trap '' USR1  # and so does what is started from here
set -m        # with a process group of its own: a terminal's Ctrl-C reaches it once, through here
accelerate launch "${arguments[@]}" "$@" </dev/null &
launcher=$!
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

interrupted=yes code=0
while [[ -n $interrupted ]]; do  # a signal ends the wait, not the launcher
  interrupted=''
  wait "$launcher" && code=0 || code=$?
done
exit "$code"

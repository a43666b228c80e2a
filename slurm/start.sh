#!/usr/bin/env bash
# Starts launch/node.sh once on every node of a Slurm allocation, in a container where one is named.
#
#   slurm/start.sh -m oneshot.repair [SETTINGS]       in a batch script or within salloc
#
# in the repository root, or in a folder of `oneshot init`.
#
#   ONESHOT_CONTAINER  image for Pyxis and Enroot: a .sqsh file or registry#image:tag
#   ONESHOT_MOUNTS     what the container sees beside the current folder, as Pyxis takes it: /data,/models:/models:ro
#   ONESHOT_MAX_REQUEUES  how often the job starts itself again after a saved state or a preemption (20)
# More variables are in launch/node.sh.
set -euo pipefail

fail() {
  echo "slurm/start.sh: error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job: submit slurm/patch_70b.sh with sbatch, or use launch/node.sh."

# a node that fails ends the others, which would wait for it; all cores of a node for its processes; and all variables,
# as sbatch's own --export=NAME holds for srun too, and would keep those below from the nodes
options=(--ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none --export=ALL)
if [[ -n ${ONESHOT_CONTAINER:-} ]]; then
  srun --help 2>&1 | grep -e --container-image >/dev/null || fail \
    "ONESHOT_CONTAINER is set, but this cluster's srun has no --container-image (Pyxis): set ONESHOT_VENV instead."
  options+=("--container-image=$ONESHOT_CONTAINER" "--container-workdir=$PWD")
  options+=("--container-mounts=$PWD:$PWD${ONESHOT_MOUNTS:+,$ONESHOT_MOUNTS}")
fi

# a fine-tune writes the first file when it has saved its state: whatever ends the run after that, the job can go on;
# a run that fails writes its exit code into the second, of which its launchers and srun would make another
export ONESHOT_PROGRESS_FILE=$PWD/runs/.progress-$SLURM_JOB_ID ONESHOT_CODE_FILE=$PWD/runs/.code-$SLURM_JOB_ID
mkdir -p runs
rm -f "$ONESHOT_PROGRESS_FILE" "$ONESHOT_CODE_FILE"
code=0
# within a step already, as in a shell of srun --pty, another one would wait in silence for what that one holds
SLURM_OVERLAP=1 srun "${options[@]}" launch/node.sh "$@" || code=$?
if ((code != 0)) && [[ -s $ONESHOT_CODE_FILE ]]; then code=$(<"$ONESHOT_CODE_FILE"); fi
# the number of an array's last task is the whole array's, too
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID} why=''
if ((code != 0)); then
  if [[ -s $ONESHOT_PROGRESS_FILE ]]; then
    why="step $(<"$ONESHOT_PROGRESS_FILE") is saved"
  elif [[ $(SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$job" 2>&1) =~ PreemptTime=[0-9] ]]; then
    why="it makes room for another job"  # Slurm leaves alone what ends within its time of grace
  fi
fi
if [[ -n $why ]] && ((${SLURM_RESTART_COUNT:-0} < ${ONESHOT_MAX_REQUEUES:-20})); then
  echo "slurm/start.sh: ended with exit code $code; $why: requeue." >&2
  scontrol requeue "$job" || echo "slurm/start.sh: Slurm does not requeue it: go on with --resume and the same --out." >&2
fi
rm -f "$ONESHOT_PROGRESS_FILE" "$ONESHOT_CODE_FILE"
exit "$code"

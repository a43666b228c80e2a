#!/usr/bin/env bash
# Starts launch/node.sh once on every node of a Slurm allocation, in a container where one is named.
#
#   slurm/start.sh -m oneshot.repair [SETTINGS]       in a batch script or within salloc
#
# in the repository root, or in a folder of `oneshot init`.
#
#   ONESHOT_CONTAINER  image for Pyxis and Enroot: a .sqsh file or registry#image:tag
#   ONESHOT_MOUNTS     what the container sees beside the current folder, as Pyxis takes it: /data,/models:/models:ro
#   ONESHOT_MAX_REQUEUES  how often the job starts itself again after a saved state (20)
# More variables are in launch/node.sh.
set -euo pipefail

fail() {
  echo "slurm/start.sh: error: $*" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job: submit slurm/patch_70b.sh with sbatch, or use launch/node.sh."

# a node that fails ends the others, which would wait for it; all cores for the launcher, which shares them out
options=(--ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none)
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
srun "${options[@]}" launch/node.sh "$@" || code=$?
if ((code != 0)) && [[ -s $ONESHOT_CODE_FILE ]]; then code=$(<"$ONESHOT_CODE_FILE"); fi
if ((code != 0)) && [[ -s $ONESHOT_PROGRESS_FILE ]] && ((${SLURM_RESTART_COUNT:-0} < ${ONESHOT_MAX_REQUEUES:-20})); then
  echo "slurm/start.sh: ended with exit code $code; step $(<"$ONESHOT_PROGRESS_FILE") is saved: requeue." >&2
  scontrol requeue "$SLURM_JOB_ID" || code=$?
fi
rm -f "$ONESHOT_PROGRESS_FILE" "$ONESHOT_CODE_FILE"
exit "$code"

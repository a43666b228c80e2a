#!/usr/bin/env bash
# Repair a fine-tuned 70B model with one safety example on 2 nodes of 8 GPUs. From the repository root,
# or from a folder of `oneshot init`:
#
#   sbatch slurm/patch_70b.sh --model.path DIR
#   sbatch --nodes=4 --time=1:00:00 slurm/patch_70b.sh --model.path DIR --repair.rank 8
#   sbatch slurm/patch_70b.sh --config launch/runs/qwen2.5-72b.yaml --model.path DIR
#
# What stands before the script is sbatch's and overrides the lines below; what follows it are settings. Partition
# and account: --partition and --account, or SBATCH_PARTITION and SBATCH_ACCOUNT. Container, modules, environment,
# accelerate YAML: variables named ONESHOT_..., see slurm/start.sh and launch/node.sh. docs/cluster.md has it all.
#SBATCH --job-name=oneshot-patch
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail

if [[ ! -x slurm/start.sh ]]; then
  echo "${SLURM_JOB_NAME:-$0}: error: $PWD is not the repository root or a folder of oneshot init: submit there or with --chdir=FOLDER." >&2
  exit 2
fi
[[ " $*" == *" --config"* ]] || set -- --config launch/runs/llama3-70b.yaml "$@"
# one folder for the job however often it is requeued, in which --resume starts (a repair always anew)
[[ " $*" == *" --out"* ]] || set -- --out "runs/oneshot-patch-${SLURM_JOB_ID:-}" "$@"
exec slurm/start.sh -m oneshot.repair --resume "$@"

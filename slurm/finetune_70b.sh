#!/usr/bin/env bash
# Fine-tune a 70B model on 2 nodes of 8 GPUs, to reproduce how that damages its safety. From the repository root,
# or from a folder of `oneshot init`:
#
#   sbatch slurm/finetune_70b.sh --data.harmful FILE --data.task FILE
#   sbatch --nodes=8 --time=24:00:00 slurm/finetune_70b.sh --data.task FILE --finetune.method full
#
# What stands before the script is sbatch's and overrides the lines below; what follows it are settings. Partition
# and account: --partition and --account, or SBATCH_PARTITION and SBATCH_ACCOUNT. Container, modules, environment,
# accelerate YAML: variables named ONESHOT_..., see slurm/start.sh and launch/node.sh. docs/cluster.md has it all.
#SBATCH --job-name=oneshot-finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
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
# one folder for the job however often it is requeued, in which --resume starts or goes on
[[ " $*" == *" --out"* ]] || set -- --out "runs/oneshot-finetune-${SLURM_JOB_ID:-}" "$@"
exec slurm/start.sh -m oneshot.finetune --resume "$@"

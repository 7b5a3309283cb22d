#!/bin/bash
# A chain of jobs, each of which resumes where the one before stopped, for sites without requeues:
#
#     SAVE=/shared/runs/7b examples/slurm/chain.sh 5 --nodes=4 examples/slurm/pretrain_gpt.sbatch --config ...
set -euo pipefail

count=${1:?the number of jobs comes first} previous=
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "$count is not a number of jobs" >&2 && exit 2; }
shift
export REQUEUE=no
for ((i = 0; i < count; i++)); do
    # A job stopped by its time limit ends with status 0. After one that fails, the rest is cancelled.
    after=(${previous:+"--dependency=afterok:$previous" --kill-on-invalid-dep=yes})
    previous=$(sbatch --parsable "${after[@]}" "$@")
    previous=${previous%%;*} # it may print number;cluster
    echo "job $previous"
done

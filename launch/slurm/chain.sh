#!/usr/bin/env bash
# Submits one run as N jobs, each of which begins when the one before has ended, however that was:
#
#   launch/slurm/chain.sh 5 --nodes 4 --time 1-00:00:00 launch/slurm/train.sbatch cpt_27b --run-dir /shared/runs/first
#
# For clusters where a job may not requeue itself, or where only waiting jobs gain priority. Elsewhere a single
# `sbatch launch/slurm/train.sbatch` goes on by itself after each time limit. When the run is done, or refused as
# the user's mistake, the jobs that still wait are cancelled.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/slurm/chain.sh JOBS [sbatch's options] launch/slurm/train.sbatch RECIPE ..." >&2
    exit 2
fi
count=$1
shift

# The folder in which the chain's jobs find each other, and how often they failed.
CHAIN=$(realpath -m "${LOG_DIR:-runs/logs}")/chain-$(date +%s)-$$
if ! mkdir -p "$CHAIN"; then
    echo "error: the folder $CHAIN could not be made; set LOG_DIR to one that you may write and all nodes see" >&2
    exit 2
fi
export CHAIN REQUEUE=0
previous=
for ((n = 1; n <= count; n++)); do
    after=()
    [[ -z $previous ]] || after=(--dependency="afterany:$previous")
    previous=$(sbatch --parsable "${after[@]}" "$@")
    previous=${previous%%;*} # the cluster's name may follow
    echo "$previous" >>"$CHAIN/jobs"
    echo "job $previous ($n of $count)${after[*]:+, ${after[*]#--dependency=}}"
done
echo "cancel all: xargs scancel <$CHAIN/jobs"

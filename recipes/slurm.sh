#!/bin/bash
#SBATCH --job-name=zoft
#SBATCH --nodes=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=zoft-%j.log
# sbatch recipes/slurm.sh config=classify task.train=reviews.csv output_dir=runs/reviews
# Two minutes before the limit the run is told, writes a checkpoint and leaves with 75; the job goes back into the queue,
# and the same command goes on from the journal. A sweep: zoft train -m ... launcher=submitit_slurm
set -uo pipefail

trap 'kill -USR1 $(jobs -p)' USR1 # before the run begins: a signal that comes sooner would end this script
zoft train "$@" &
run=$!
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # the trap ended the first wait: the run is still writing
  wait "$run"
  code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

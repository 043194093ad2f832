#!/bin/bash
# GPT-2's shape on two nodes of 8 GPUs under Slurm, in as many pieces as its time limit makes:
#   DATA=/shared/text.txt RUNS=/shared/runs sbatch examples/cluster/slurm.sh
# Submit it in the clone, on a file system that all nodes share. What follows the script's name is
# for train.py. After the last step the job ends; before, it goes back to the queue.
#SBATCH --job-name=gpt2           # and the name of the run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # one torchrun, which starts a process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120       # two minutes before that, and to this script alone
#SBATCH --requeue                 # Slurm's own: after a node has failed, or was needed otherwise
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
. .venv/bin/activate

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((29400 + SLURM_JOB_ID % 1000)) # another one for another job on the same node

# torchrun passes on the signals that it handles, of which SIGUSR1 is none by itself
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --max-restarts=3 --signals_to_handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --rdzv_backend=c10d --rdzv_endpoint="$first:$port" --rdzv_id="$SLURM_JOB_ID" \
    train.py --name "$SLURM_JOB_NAME" --resume auto --runs_dir "$RUNS" \
    --config configs/gpt2_124m.toml --data.path "$DATA" --device cuda --compile \
    --train.accumulation_steps 32 "$@" &
step=$!

trap 'limit=near; kill -USR1 $step' USR1 # srun passes it on; train.py saves and ends
wait $step || wait $step                 # the first one ends when the signal comes
status=$?
if [ "$limit" ] && [ $status != 0 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit $status

#!/bin/bash
# GPT-2's shape on two hosts of 8 GPUs, without a scheduler: on each of them, in the clone,
#   FIRST=host1 DATA=/shared/text.txt RUNS=/shared/runs bash examples/cluster/torchrun.sh
# A host that fails, or joins later, makes torchrun start the processes of all hosts anew, on those
# that are there; they continue from the newest checkpoint. Only FIRST, where they meet, must stay.
set -eu
. .venv/bin/activate
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a host that joins later waits in vain: README.md

# 32 micro-batches: 2 for each of 16 processes, or 4 for each of 8
exec torchrun --nnodes=1:2 --nproc_per_node=8 --max-restarts=10 \
    --rdzv_backend=c10d --rdzv_endpoint="$FIRST:29400" --rdzv_id=gpt2 \
    train.py --name gpt2 --resume auto --runs_dir "$RUNS" --config configs/gpt2_124m.toml \
    --data.path "$DATA" --device cuda --compile --train.accumulation_steps 32 "$@"

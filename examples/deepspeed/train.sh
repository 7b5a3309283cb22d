#!/usr/bin/env bash
# Trains a small GPT on two ranks by DeepSpeed's ZeRO stage 3, then goes on without DeepSpeed in one process from the
# checkpoint that it left. Also on a machine without GPUs. Arguments are flags of both runs, as --bf16.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
pretrain=$here/../../pretrain_gpt.py
runs=${RUNS:-runs/deepspeed}
mkdir -p "$runs"

common=(--mock-data --vocab-size 500 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64
    --global-batch-size 16 --micro-batch-size 2 --lr 1e-3 --train-iters 20 --eval-interval 10 --eval-iters 1 --log-interval 5
    --save "$runs/checkpoints" --load "$runs/checkpoints" --metrics-file "$runs/metrics.jsonl" "$@")

torchrun --nproc-per-node 2 "$pretrain" "${common[@]}" --deepspeed --deepspeed-config "$here/ds.json" --exit-interval 10
python "$pretrain" "${common[@]}"

#!/bin/bash
# Preprocess a corpus in SHARDS array tasks, then merge them. Run it where sbatch is; ARRAY_OPTIONS: options for sbatch.
#
#     SHARDS=8 examples/slurm/preprocess.sh data/corpus --input corpus.jsonl --tokenizer-type ... --append-eod
set -euo pipefail

prefix=$1
shift
export SHARDS=${SHARDS:-8}
[[ $SHARDS =~ ^[1-9][0-9]*$ ]] || { echo "SHARDS=$SHARDS is not a number of shards" >&2 && exit 2; }
read -ra options <<<"${ARRAY_OPTIONS:-}"
# sbatch may print number;cluster.
array=$(sbatch --parsable --array="0-$((SHARDS - 1))" "${options[@]}" \
    examples/slurm/preprocess_array.sbatch --output-prefix "$prefix" "$@")
# afterok: only if every shard is complete; otherwise the merge is cancelled, not left pending.
merge=$(sbatch --parsable --dependency="afterok:${array%%;*}" --kill-on-invalid-dep=yes "${options[@]}" \
    examples/slurm/merge.sbatch --output-prefix "${prefix}_text_document" \
    --input "${prefix}_*-of-$(printf %04d "$SHARDS")_text_document.idx")
echo "array ${array%%;*}, then merge ${merge%%;*}: ${prefix}_text_document"

"""Samples and files of Megatron-core, as digests: run in a Python that has it, by
test_megatron_order.py.

Standard input: JSON [{prefix, seed, seq_length, samples, split, cache}, ...], where split null
gives the dataset for each split alone; standard output: for each case the digests of the samples of
each split. `write PREFIX` writes DOCUMENTS, and `read PREFIX` prints what it reads.
"""

import hashlib
import json
import sys
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import numpy as np
from megatron_data import _Tokenizer
from no_triton import without_triton

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7]], [[65535, 0, 9, 9]]]


def digest(rows) -> str:
    """Of int64 arrays, one after another."""
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(row, "<i8").tobytes() for row in rows)
    ).hexdigest()[:16]


def samples(case: dict) -> list[str]:
    """Digest of the samples that were asked for, of each split; empty for one that is."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    blend = ([case["prefix"]], None)
    given = (
        {"blend": blend, "split": case["split"]}
        if case["split"]
        else {"blend_per_split": [blend, blend, None]}
    )
    config = GPTDatasetConfig(
        random_seed=case["seed"],
        sequence_length=case["seq_length"],
        path_to_cache=case["cache"],
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **given,
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, case["samples"], lambda: True, config).build()
    found = []
    for dataset, count in zip(built, case["samples"]):
        rows = [dataset[i] for i in range(count)] if dataset is not None else []
        found.append(digest([[*row["tokens"].tolist(), int(row["labels"][-1])] for row in rows]))
    return found


def main() -> None:
    """As the module says."""
    without_triton()
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    if sys.argv[1:2] == ["write"]:
        builder = IndexedDatasetBuilder(sys.argv[2] + ".bin", dtype=np.uint16)
        for document in DOCUMENTS:
            builder.add_document([*chain(*document)], [len(sequence) for sequence in document])
        builder.finalize(sys.argv[2] + ".idx")
    elif sys.argv[1:2] == ["read"]:
        data = IndexedDataset(sys.argv[2])
        print(json.dumps([[row.tolist() for row in data[:]], data.document_indices.tolist()]))
    else:
        print(json.dumps([samples(case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()

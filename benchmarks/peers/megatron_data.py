#!/usr/bin/env python
"""Megatron-core's side of benchmarks/data.py, run in an environment that has it; one JSON line on
stdout.

    python megatron_data.py preprocess IN.jsonl PREFIX WORKERS gpt2 VOCAB.json MERGES.txt
    python megatron_data.py preprocess IN.jsonl PREFIX WORKERS sentencepiece MODEL
    python megatron_data.py dataset PREFIX SAMPLES SEQ_LENGTH CACHE

`preprocess` works as Megatron-LM's tool does (its package on PyPI has no tools): a pool of workers
that parse and encode a line at a time, Python lists of ids sent back, one IndexedDatasetBuilder.
`dataset` builds GPTDataset from a warm cache.
"""

import json
import multiprocessing
import resource
import sys
import time

from no_triton import without_triton


class Encoder:
    """One worker's tokenizer."""

    def __init__(self, kind, *files):
        self.kind, self.files = kind, files

    def start(self):
        """Build the tokenizer in the worker."""
        if self.kind == "gpt2":
            from tokenizers import Tokenizer, models, pre_tokenizers

            tokenizer = Tokenizer(models.BPE.from_file(*self.files))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            Encoder.ids = staticmethod(lambda text: tokenizer.encode(text).ids)
            Encoder.end = tokenizer.token_to_id("<|endoftext|>")
        else:
            from sentencepiece import SentencePieceProcessor

            tokenizer = SentencePieceProcessor(model_file=self.files[0])
            Encoder.ids, Encoder.end = tokenizer.encode, tokenizer.eos_id()

    def encode(self, line):
        """Ids of one JSON line, end of document included."""
        return [*Encoder.ids(json.loads(line)["text"]), Encoder.end]


def preprocess(source, prefix, workers, kind, *files):
    """JSONL to an indexed dataset."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    size = 50257 if kind == "gpt2" else 8000
    encoder, started, used = Encoder(kind, *files), time.perf_counter(), _cpu_seconds()
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=DType.optimal_dtype(size))
    with (
        open(source, encoding="utf-8") as lines,
        multiprocessing.Pool(int(workers), encoder.start) as pool,
    ):
        for ids in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
    builder.finalize(prefix + ".idx")
    return {"seconds": time.perf_counter() - started, "cpu_seconds": _cpu_seconds() - used}


class _Tokenizer:
    """What GPTDatasetConfig asks of a tokenizer."""

    vocab_size, eod, unique_identifiers = 50257, 50256, {"class": "benchmark"}


def dataset(prefix, samples, length, cache):
    """Start-up and random fetches of GPTDataset; the first build fills the cache and does not
    count."""
    import numpy
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    def build():
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=int(length),
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=cache,
            tokenizer=_Tokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        sizes = [int(samples), None, None]
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]

    build()
    before, began = _resident(), time.perf_counter()
    train = build()
    train[0]
    seconds, grown = time.perf_counter() - began, _resident() - before
    order = numpy.random.default_rng(1).integers(int(samples), size=5000).tolist()
    began = time.perf_counter()
    for i in order:
        train[i]
    return {
        "start_seconds": seconds,
        "start_mib": grown,
        "per_second": len(order) / (time.perf_counter() - began),
    }


def _cpu_seconds() -> float:
    """Of this process and those it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _resident() -> float:
    """Anonymous resident memory in MiB: pages of mapped files are the page cache's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    without_triton()
    print(json.dumps({"preprocess": preprocess, "dataset": dataset}[sys.argv[1]](*sys.argv[2:])))

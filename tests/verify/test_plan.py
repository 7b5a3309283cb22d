"""What tools/verify_layouts.py plans: shrunk configurations, both layouts' flags, problems."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megalite.config import validate
from megalite.config.problem import ConfigError
from megalite.config.run import from_flat, options
from megalite.data.mock import MockDataset
from megalite.parallel.launch import LaunchInfo
from megalite.verify.plan import plan, shrunk
from megalite.verify.record import END, SyntheticDocuments

ALONE = LaunchInfo()


SHAPES = {
    "gpt2": dict(num_layers=12),
    "gpt3 on 8 x 16": dict(
        num_layers=96,
        hidden_size=12288,
        num_attention_heads=96,
        seq_length=2048,
        tp=8,
        pp=16,
        sp=True,
        bf16=True,
    ),
    "llama 70b": dict(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        tp=8,
        pp=4,
        seq_length=4096,
        position_embedding_type="rope",
        swiglu=True,
        sp=True,
        vocab_size=32000,
    ),
    "uneven stages, recomputed by 3": dict(
        num_layers=13, pp=3, recompute_granularity="full", recompute_num_layers=3, vocab_size=50304
    ),
    "head size independent of hidden size": dict(
        kv_channels=128, num_attention_heads=8, num_query_groups=1, hidden_size=512
    ),
    "smallest sizes": dict(
        num_layers=1,
        hidden_size=2,
        num_attention_heads=1,
        seq_length=2,
        vocab_size=3,
        ffn_hidden_size=1,
    ),
}


@pytest.mark.parametrize("flags", SHAPES.values(), ids=SHAPES.keys())
def test_shrunk_configurations_are_valid_and_of_the_same_structure(flags):
    flags = (
        dict(
            vocab_size=50257,
            mock_data=True,
            train_iters=1,
            global_batch_size=64,
            lr_decay_style="constant",
        )
        | flags
    )
    config = from_flat(flags)
    ranks = (
        2
        * config.parallel.tensor_model_parallel_size
        * config.parallel.pipeline_model_parallel_size
    )
    assert validate.check(config, ranks) == []
    config = validate.resolve(config, ranks)
    small = shrunk(config, ranks)
    assert validate.check(small, ranks) == []
    assert small.parallel == config.parallel and small.optimizer == config.optimizer
    m, n, t = config.model, small.model, config.parallel.tensor_model_parallel_size
    assert n.hidden_size <= 320 and n.ffn <= 1280 and n.seq_length <= 128 and n.vocab_size <= 1152
    assert (n.num_attention_heads == n.query_groups) == (m.num_attention_heads == m.query_groups)
    assert (n.vocab_size % (n.make_vocab_size_divisible_by * t) == 0) == (
        m.vocab_size % (m.make_vocab_size_divisible_by * t) == 0
    )
    same = (
        "swiglu",
        "normalization",
        "position_embedding_type",
        "tied",
        "attention_dropout",
        "hidden_dropout",
    )
    assert [getattr(n, key) for key in same] == [getattr(m, key) for key in same]
    stages = config.parallel.pipeline_model_parallel_size
    assert (n.num_layers % stages == 0) == (m.num_layers % stages == 0)


@pytest.mark.parametrize(
    ("layers", "flags", "small_layers", "small"),
    [
        (24, {"pipeline_split": ("5,7,7,5",)}, 6, {"pipeline_split": ("1,2,2,1",)}),
        (24, {"pipeline_split": ("9", "7", "3", "5")}, 10, {"pipeline_split": ("4,3,1,2",)}),
        (8, {"pipeline_split": ("2,2,2,2",)}, 4, {"pipeline_split": ("1,1,1,1",)}),
        (
            61,
            {"decoder_first_pipeline_num_layers": 13, "decoder_last_pipeline_num_layers": 14},
            9,
            {"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2},
        ),
        (24, {"decoder_last_pipeline_num_layers": 3}, 7, {"decoder_last_pipeline_num_layers": 1}),
        (
            22,
            {
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
            6,
            {},
        ),
    ],
)
def test_a_given_split_is_shrunk_in_proportion(layers, flags, small_layers, small):
    """Stages keep their order by size; in the reference, the flags of the split do not count."""
    argv = ["--shrink", "--pp", "4", "--num-layers", str(layers), "--vocab-size", "512"]
    argv += ["--reference-pp", "2"]
    for key, value in flags.items():
        argv += options()[key].setting(value).split()
    made = plan(argv, ALONE)
    before = from_flat({"num_layers": layers, "pp": 4} | flags).layers_of_stages
    after = made.chosen.layers_of_stages
    for one, other in combinations(range(4), 2):
        assert (len(before[one]) < len(before[other])) == (len(after[one]) < len(after[other]))
    assert made.chosen.model.num_layers == small_layers
    for key, value in (flags | small).items():
        assert getattr(made.chosen.parallel, key) == value
    assert not made.reference.parallel.split_is_given
    assert made.reference.model == made.chosen.model


def problems_of(*argv: str, launch: LaunchInfo = ALONE) -> str:
    with pytest.raises(ConfigError) as error:
        plan(list(argv), launch)
    return str(error.value)


def test_all_problems_are_reported_with_their_fix():
    reported = problems_of(
        "--ranks", "many", "--reference-tp", "--hiden-size", "8", "--work-folder="
    )
    for text in (
        "--ranks: 'many' is not",
        "--reference-tp needs a value",
        "--hidden-size",
        "--work-folder is empty",
    ):
        assert text in reported
    reported = problems_of(
        "--shrink", "--tp", "3", "--seq-length", "7", "--ranks", "4", "--rng-scheme", "megatron"
    )
    assert (
        "4 ranks cannot be divided" in reported
        and "fix: --rng-scheme global, or --attention-dropout 0" in reported
    )
    assert "reference layout: --num-attention-heads 12 cannot" in problems_of(
        "--reference-tp", "5", "--vocab-size", "99"
    )
    launched = replace(ALONE, world_size=2, source="torchrun")
    reported = problems_of("--ranks", "2", launch=launched)
    assert "leave out --ranks" in reported and "--work-folder FOLDER" in reported


def test_shrunk_batch_fits_the_reference_as_well():
    argv = "--shrink --pp 4 --num-layers 9 --reference-dp 2 --global-batch-size 16 --vocab-size 99"
    made = plan(argv.split(), ALONE)
    assert (made.chosen.data.global_batch_size, made.chosen.model.num_layers) == (6, 9)


def test_groups_of_microbatches_are_those_of_the_chosen_layout_alone():
    argv = "--shrink --pp 2 --num-layers 12 --global-batch-size 16 --vocab-size 99"
    argv += " --pipeline-schedule interleaved"
    argv += " --microbatch-group-size-per-virtual-pipeline-stage 6"
    made = plan(argv.split(), ALONE)
    assert made.chosen.parallel.microbatch_group_size_per_virtual_pipeline_stage == 6
    assert made.chosen.data.global_batch_size == 7
    assert validate.check(made.chosen, made.ranks) == []
    assert made.reference.parallel.schedule == "1f1b"


def test_plan_keeps_what_the_step_depends_on_and_nothing_that_writes():
    argv = "--shrink --tp 2 --sp --pp 2 --bf16 --save runs/x --load runs/x --metrics-file m"
    argv += " --lr 3 --min-lr 4 --seed 5 --reference-pp 2 --vocab-size 512"
    made = plan(argv.split(), ALONE)
    assert (made.ranks, made.reference_ranks, made.folder) == (4, 2, None)
    chosen, reference = made.chosen, made.reference
    assert chosen.checkpoint == from_flat({}).checkpoint and chosen.training.metrics_file is None
    assert chosen.training.seed == reference.training.seed == 5 and chosen.model == reference.model
    assert chosen.data == reference.data and chosen.data.mock_data
    assert reference.optimizer.precision == "bf16" and not reference.parallel.sequence_parallel


def test_documents_are_kept_apart_in_synthetic_data_too():
    """As configured for the real data, whose tokenizer is not needed here."""
    argv = "--reset-attention-mask --tokenizer-type ByteTokenizer --vocab-size 512"
    made = plan([*argv.split(), "--shrink", "--pp", "2"], ALONE)
    for config in (made.chosen, made.reference):
        assert (
            config.data.mock_data
            and config.data.reset_attention_mask
            and not config.data.reset_position_ids
        )
    rows = SyntheticDocuments(MockDataset(512, 32, 1, "train"), 32)
    assert all(
        1 <= np.count_nonzero(rows[i][:-1] == END) < 32 and (rows[i][:16] == END).any()
        for i in range(20)
    )

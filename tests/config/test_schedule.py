"""The schedule of a configuration: what follows from its flags, what it needs, and `auto`."""

import pytest

from megalite.config import cli, validate
from megalite.config.estimate import estimate_ranks, flops_by_action, model_parameters
from megalite.config.run import RunConfig, from_flat, to_flat
from megalite.config.schedule import GIB, Candidate, fastest, why_chosen
from megalite.config.summary import summary_lines
from megalite.models.cost import flops_per_sequence
from megalite.parallel.config import OF_EVEN_SPLIT
from megalite.parallel.launch import LaunchInfo
from megalite.pipeline.schedules import SCHEDULES
from tests.config.validation import SOUND

PIPELINE = SOUND | {"pipeline_model_parallel_size": 4, "num_layers": 16, "global_batch_size": 32}
LARGE = PIPELINE | {"hidden_size": 2048, "num_attention_heads": 16, "seq_length": 1024}
AUTO = LARGE | {"pipeline_schedule": "auto"}
STAGES = "num_virtual_stages_per_pipeline_rank"
LAYERS = "num_layers_per_virtual_pipeline_stage"


def resolved(flat: dict, ranks: int = 4) -> RunConfig:
    config = from_flat(flat)
    assert validate.check(config, ranks) == []
    return validate.resolve(config, ranks)


@pytest.mark.parametrize(
    ("flags", "name", "chunks"),
    [
        ({}, "1f1b", 1),
        ({STAGES: 1}, "1f1b", 1),
        ({STAGES: 2}, "interleaved", 2),
        ({LAYERS: 1}, "interleaved", 4),
        ({LAYERS: 4}, "1f1b", 1),
        ({"pipeline_schedule": "interleaved"}, "interleaved", 2),
        ({"pipeline_schedule": "zb-v"}, "zb-v", 2),
        ({"pipeline_schedule": "zb-v", LAYERS: 2}, "zb-v", 2),
        ({"pipeline_schedule": "gpipe", STAGES: 4}, "gpipe", 4),
    ],
)
def test_what_follows_from_the_flags(flags, name, chunks):
    config = resolved(PIPELINE | flags)
    parallel = config.parallel
    assert (parallel.pipeline_schedule, getattr(parallel, STAGES)) == (name, chunks)
    assert getattr(parallel, LAYERS) is None
    # A checkpoint's config.yaml is a sound configuration, which says the same.
    assert resolved(to_flat(config)) == config


def test_embedding_and_loss_may_count_as_layers_of_a_stage():
    """As in Megatron-LM: 10 layers, embedding and loss are 2 on each of 2 stages of 3 ranks."""
    even = dict.fromkeys(OF_EVEN_SPLIT, True)
    flags = {"num_layers": 10, "pipeline_model_parallel_size": 3, LAYERS: 2}
    config = resolved(PIPELINE | {"global_batch_size": 6} | flags | even, 3)
    assert (config.parallel.schedule, config.pipeline.chunks) == ("interleaved", 2)
    assert list(map(len, config.layers_of_stages)) == [1, 2, 2, 2, 2, 1]


def test_one_rank_has_one_stage():
    for flags in ({}, {STAGES: 1}, {"pipeline_schedule": "1f1b"}, {"pipeline_schedule": "auto"}):
        parallel = resolved(SOUND | flags, 1).parallel
        assert (parallel.pipeline_schedule, getattr(parallel, STAGES)) == ("1f1b", 1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_on_one_rank(name, tied):
    """But for a tied embedding, which first and last rank hold where they are two."""
    flags = {
        "pipeline_schedule": name,
        "untie_embeddings_and_output_weights": not tied,
        "make_vocab_size_divisible_by": 1,
    }
    config = resolved(PIPELINE | flags)
    held = sum(rank.parameters for rank in estimate_ranks(config, 4))
    twice = config.model.vocab_size * config.model.hidden_size if tied and name != "zb-v" else 0
    assert held == model_parameters(config) + twice


def test_memory_counts_the_microbatches_of_each_stage():
    """12 layers of equal size on 2 ranks: activations in proportion to layers in flight."""
    flags = {"pipeline_model_parallel_size": 2, "num_layers": 12, "vocab_size": 2}
    held = {}
    for name in SCHEDULES:
        config = resolved(PIPELINE | flags | {"pipeline_schedule": name}, 2)
        # 32 microbatches; without the logits, which are of two tokens.
        ranks = estimate_ranks(config, 2)
        held[name] = [rank.activation_bytes for rank in ranks]
        assert [rank.in_flight for rank in ranks] == {
            "1f1b": [2, 1],
            "gpipe": [32, 32],
            "interleaved": [5, 3],
            "zb-h1": [2, 2],
            "zb-v": [4, 4],
        }[name]
    unit = held["1f1b"][0] / 2
    for name, layers in {"gpipe": 32, "interleaved": 2.5, "zb-h1": 2, "zb-v": 2}.items():
        assert held[name][0] == pytest.approx(layers * unit, rel=1e-3)


def test_full_recomputation_keeps_what_weight_gradients_wait_for():
    """The last rank of ZB-H1 has p - 1 microbatches whose weight gradients wait, in full."""
    full = {"recompute_granularity": "full"}
    plain = estimate_ranks(resolved(PIPELINE), 4)
    unit = plain[3].activation_bytes  # of one microbatch, and its logits
    for name, least, most in (("1f1b", 0, 1), ("zb-h1", 3, 5)):
        ranks = estimate_ranks(resolved(PIPELINE | full | {"pipeline_schedule": name}), 4)
        assert least * unit < ranks[3].activation_bytes < most * unit


def test_flops_of_stages_are_those_of_the_model():
    for flags in ({}, {"pipeline_schedule": "zb-v"}, {STAGES: 4}):
        config = resolved(LARGE | flags)
        total = 0.0
        for stage in flops_by_action(config):
            assert stage["B"] == stage["I"] + stage["W"] == pytest.approx(2 * stage["F"])
            total += stage["F"] + stage["B"]
        assert total == pytest.approx(flops_per_sequence(config.model))
    again = flops_by_action(resolved(LARGE | {"recompute_granularity": "full"}))[0]
    assert again["I"] + again["W"] == pytest.approx(3 * again["F"])
    selective = flops_by_action(resolved(LARGE | {"recompute_granularity": "selective"}))[0]
    assert 2 * selective["F"] < selective["B"] < again["B"]


@pytest.mark.parametrize(
    ("flags", "layers", "bubble"),
    [
        ({}, "4 + 4 + 4 + 4 (1f1b), at most 4 microbatches in flight", 3 / 32),
        ({"pipeline_schedule": "gpipe"}, "(gpipe), at most 32 microbatches in flight", 3 / 32),
        (
            {STAGES: 2},
            "ranks 0 to 3: 2 + 2 (interleaved, 2 stages a rank), at most 5.5 microbatches",
            3 / 64,
        ),
        ({"pipeline_schedule": "zb-h1"}, "at most 4 microbatches in flight", 3 / 96),
        ({"pipeline_schedule": "zb-v"}, "(zb-v, 2 stages a rank), at most 4 micro", 3 / 192),
    ],
)
def test_the_summary(flags, layers, bubble):
    text = " ".join(" ".join(summary_lines(resolved(PIPELINE | flags), 4)).split())
    assert layers in text
    assert f"pipeline bubble {bubble:.1%} of the ideal time" in text


def test_the_summary_of_ranks_that_hold_unequal_stages():
    flags = {"num_layers": 10, STAGES: 2}
    text = " ".join(" ".join(summary_lines(resolved(PIPELINE | flags), 4)).split())
    assert "ranks 0 to 1: 2 + 1, ranks 2 to 3: 1 + 1 (interleaved, 2 stages a rank)" in text


def test_the_summary_says_what_unequal_stages_cost():
    flags = PIPELINE | {"vocab_size": 50257, "pipeline_split": ("4,4,4,4",)}
    text = " ".join(" ".join(summary_lines(resolved(flags), 4)).split())
    assert "pipeline bubble 9.4% of the ideal time, 7" in text and "by the work of each" in text
    assert "by the work" not in "".join(summary_lines(resolved(SOUND, 1), 1))


# auto
# ---------------------------------------------------------------------------------------------


def choice(flags: dict, ranks: int = 4) -> tuple[str, int]:
    parallel = resolved(AUTO | flags, ranks).parallel
    return parallel.pipeline_schedule, getattr(parallel, STAGES)


def test_auto_takes_the_fastest_that_fits():
    # As the work of the stages is equal, nothing is faster than no bubble.
    assert choice({}) == ("zb-v", 2)
    # All else that is left out is filled in first.
    assert choice({"global_batch_size": None, "train_iters": 5, "bf16": True}) == ("zb-h1", 1)
    # The V needs two stages a rank.
    assert choice({"num_layers": 4}) == ("zb-h1", 1)
    # What is given is kept.
    assert choice({STAGES: 1}) == ("zb-h1", 1)
    assert choice({STAGES: 2}) == ("zb-v", 2)
    assert choice({STAGES: 4}) == ("interleaved", 4)
    assert choice({LAYERS: 1}) == ("interleaved", 4)
    # Recomputed layers are of one stage.
    full = {"recompute_granularity": "full", "recompute_num_layers": 4, "memory_limit_gib": 100.0}
    assert choice(full) == ("zb-h1", 1)


def test_auto_stays_within_the_memory():
    """By default within a tenth more than 1F1B's, which interleaving takes more than."""
    words = why(AUTO)
    limit = float(words.split("fastest within ")[1].split(" GiB")[0])
    memory = memory_by_candidate(words)
    assert memory["interleaved v=2"] > limit > memory["1f1b"]
    assert memory["zb-v"] <= limit == pytest.approx(1.1 * memory["1f1b"], rel=0.01)
    # With a limit, the fastest of those below; none, where none is.
    least = min(memory.values())
    assert memory_by_candidate(why(AUTO | {"memory_limit_gib": 2 * limit})) == memory
    assert choice({"memory_limit_gib": 2 * limit, STAGES: 4}) == ("interleaved", 4)
    (problem,) = validate.check(from_flat(AUTO | {"memory_limit_gib": least / 2}), 4)
    assert "every schedule" in problem.message and "the least is" in problem.message


@pytest.mark.parametrize(
    "flags",
    [{STAGES: 2}, {STAGES: 4}, {LAYERS: 1}, {STAGES: 2, "pipeline_split": ("2,2,2,2,2,2,2,2",)}],
)
def test_auto_with_stages_on_a_rank_compares_with_interleaved(flags):
    """It is the default schedule then: what `auto` takes is within a tenth more than that."""
    words = why(AUTO | flags)
    name, _, limit = words.split(": ", 1)[1].partition(" is the fastest within ")
    memory = memory_by_candidate(words)
    default = next(iter(memory))
    assert default.startswith("interleaved")
    assert memory[name] <= float(limit.split(" GiB")[0])
    assert float(limit.split(" GiB")[0]) == pytest.approx(1.1 * memory[default], rel=0.01)


def test_what_auto_cannot_have_is_reported():
    uneven = {"num_layers": 10, "recompute_granularity": "full", "recompute_num_layers": 2}
    assert choice(uneven | {STAGES: 2, "memory_limit_gib": 100.0})[1] == 2
    for flags in ({STAGES: 8}, {LAYERS: 16}, {"recompute_granularity": "full", STAGES: 4}):
        tried = AUTO | {"recompute_num_layers": 2, "memory_limit_gib": 1.0} | flags
        assert validate.check(from_flat(tried), 4) != []


def why(flat: dict) -> str:
    config = from_flat(flat)
    return why_chosen(config, validate.resolve(config, 4), 4)


def memory_by_candidate(words: str) -> dict[str, float]:
    found = {}
    for text in words.partition("by estimate): ")[2].split(", "):
        name, _, memory = text.partition(" (")
        found[name.rpartition(" ")[0]] = float(memory.removesuffix(" GiB)"))
    return found


def test_auto_says_why(capsys):
    argv = ["--mock-data", "--vocab-size", "512", "--train-iters", "10", "--pp", "4"]
    argv += ["--num-layers", "16", "--hidden-size", "2048", "--num-attention-heads", "16"]
    argv += ["--global-batch-size", "32", "--pipeline-schedule", "auto"]
    for rank in range(2):
        launch = LaunchInfo(rank=rank, world_size=4, local_rank=rank, local_world_size=4)
        config = cli.parse_and_check(argv, launch=launch)
        assert config.parallel.pipeline_schedule == "zb-v"
        printed = capsys.readouterr().out
        assert printed.startswith("--pipeline-schedule auto: zb-v is the fastest") == (rank == 0)
        assert printed.count("\n") == (1 if rank == 0 else 0)
    # A file for --config has nothing else in it.
    with pytest.raises(SystemExit):
        cli.parse_and_check([*argv, "--print-config"], launch=LaunchInfo(world_size=4))
    printed = capsys.readouterr().out
    assert "pipeline_schedule: zb-v" in printed and "fastest" not in printed


def test_equal_candidates_are_taken_in_order_and_the_least_where_none_fits():
    first, second = Candidate("1f1b", 1, 5.0, 2 * GIB), Candidate("zb-h1", 1, 5.0, GIB)
    assert fastest((first, second), 3 * GIB) == first
    assert fastest((first, second), 1.5 * GIB) == second
    assert fastest((first, second), 0) == second

"""Rules of recompute, optimizer, length and data, as far as the flags alone tell. Imports no torch."""

from collections.abc import Iterator
from importlib.util import find_spec

from megalite.config.rules.finding import (
    EXAMPLES,
    PATHS,
    Finding,
    Rule,
    data_parallel_size,
    divisors,
    global_batch,
    iterations,
    multiples,
    wanted_splits,
)
from megalite.config.rules.tokenizer import tokenizer_is_whole
from megalite.config.run import RunConfig
from megalite.pipeline.partition import layers_of_stages


def recompute_agrees(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The short form against the long one; and no more layers at a time than a stage holds."""
    r, m, p = config.recompute, config.model, config.parallel.pipeline_model_parallel_size
    if r.recompute_activations and r.recompute_granularity == "full":
        yield Finding(
            "--recompute-activations means --recompute-granularity selective, but full is given too",
            ("recompute_activations", "recompute_granularity"),
            ({"recompute_activations": False}, {"recompute_granularity": "selective"}),
        )
    elif r.granularity == "full" and p <= m.num_layers:
        most = _largest_stage(config)
        if r.recompute_num_layers > most:
            yield Finding(
                f"--recompute-num-layers {r.recompute_num_layers} is more than the {most} layers of the largest stage",
                ("recompute_num_layers", "num_layers", "pipeline_model_parallel_size"),
                ({"recompute_num_layers": most},),
            )


def _largest_stage(config: RunConfig) -> int:
    """Layers of the fullest stage; the most that it could have while the vocabulary is still to be read from a file."""
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    if model.vocab_size is None:
        return (
            model.num_layers // stages
            if model.num_layers % stages == 0
            else model.num_layers - stages + 1
        )
    return max(map(len, layers_of_stages(model, stages, config.predicted)))


def precision_is_one(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--bf16 against --precision."""
    o = config.optimizer
    if o.bf16 and o.precision == "fp64":
        yield Finding(
            "--bf16 means --precision bf16, but --precision fp64 is given too",
            ("bf16", "precision"),
            ({"bf16": False}, {"precision": "bf16"}),
        )


def learning_rate_falls(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """min_lr <= lr; a warm-up given once, that ends before the decay does."""
    o = config.optimizer
    if o.min_lr > o.lr:
        yield Finding(
            f"--min-lr {o.min_lr:g} is above --lr {o.lr:g}",
            ("min_lr", "lr"),
            ({"min_lr": o.lr}, {"lr": o.min_lr}),
        )
    if o.lr_warmup_fraction is not None and o.lr_warmup_iters:
        yield Finding(
            f"--lr-warmup-fraction {o.lr_warmup_fraction:g} and --lr-warmup-iters {o.lr_warmup_iters} "
            "both set the warm-up",
            ("lr_warmup_fraction", "lr_warmup_iters"),
            ({"lr_warmup_fraction": None}, {"lr_warmup_iters": 0}),
        )
    end, end_key = o.lr_decay_iters, "lr_decay_iters"
    if end is None or o.lr_decay_style == "constant":
        end, end_key = iterations(config, world_size), "train_iters"
    if end and o.lr_warmup_iters >= end:
        yield Finding(
            f"--lr-warmup-iters {o.lr_warmup_iters} does not end before the schedule does, at iteration {end}",
            ("lr_warmup_iters", end_key, "train_samples"),
            ({"lr_warmup_iters": end // 10}, {end_key: 10 * o.lr_warmup_iters}),
        )


def attention_can_drop(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A backend of attention that drops weights as --rng-scheme says, if any are dropped."""
    m, scheme = config.model, config.training.rng_scheme
    if m.attention_dropout == 0 or m.attention_backend in ("auto", "eager"):
        return
    if m.attention_backend == "sdpa" or scheme == "megatron":
        yield Finding(
            f"--attention-backend {m.attention_backend} cannot drop attention weights (--attention-dropout "
            f"{m.attention_dropout:g}) by --rng-scheme {scheme}",
            ("attention_backend", "attention_dropout", "rng_scheme"),
            ({"attention_backend": "auto"}, {"attention_dropout": 0.0}),
        )


def length_is_known(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """train_iters or train_samples, in agreement when both are given; samples in whole batches."""
    t, batch = config.training, global_batch(config, world_size)
    if t.train_iters is None and t.train_samples is None:
        yield Finding(
            "how long to train is not said: neither --train-iters nor --train-samples is given",
            ("train_iters", "train_samples"),
            (
                {"train_iters": EXAMPLES["train_iters"]},
                {"train_samples": EXAMPLES["train_iters"] * batch},
            ),
        )
    elif t.train_samples is not None and t.train_samples % batch:
        yield Finding(
            f"--train-samples {t.train_samples} is not a multiple of the global batch size {batch}",
            ("train_samples", "global_batch_size", "micro_batch_size"),
            tuple({"train_samples": n} for n in multiples(batch, t.train_samples)),
        )
    elif t.train_samples is not None and t.train_iters not in (None, t.train_samples // batch):
        yield Finding(
            f"--train-samples {t.train_samples} are {t.train_samples // batch} iterations of {batch}, "
            f"but --train-iters is {t.train_iters}",
            ("train_samples", "train_iters", "global_batch_size"),
            ({"train_samples": None}, {"train_iters": None}),
        )


def batch_divides(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """global batch % (micro batch * dp)."""
    d, dp = config.data, data_parallel_size(config, world_size)
    unit = d.micro_batch_size * dp
    if d.global_batch_size is not None and d.global_batch_size % unit:
        fitting = (
            divisors(d.global_batch_size // dp, d.micro_batch_size)
            if d.global_batch_size % dp == 0
            else []
        )
        yield Finding(
            f"--global-batch-size {d.global_batch_size} is not a multiple of --micro-batch-size {d.micro_batch_size} "
            f"x data-parallel size {dp} = {unit}",
            ("global_batch_size", "micro_batch_size"),
            (
                *({"global_batch_size": n} for n in multiples(unit, d.global_batch_size)),
                *({"micro_batch_size": n} for n in fitting),
            ),
        )


def data_has_one_source(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Paths or mock_data, not both, not neither; every split that is wanted has its data, as weights and prefixes."""
    from megalite.data.indexed import DatasetError
    from megalite.data.sources import parse_sources

    d, vocab = (
        config.data,
        {} if config.model.vocab_size else {"vocab_size": EXAMPLES["vocab_size"]},
    )
    paths = [key for key in PATHS if getattr(d, key) is not None]
    if not paths and not d.mock_data:
        yield Finding(
            "there is no data: neither --data-path nor --mock-data is given",
            ("data_path", "mock_data"),
            (
                "--data-path PREFIX of a dataset made by tools/preprocess_data.py",
                {"mock_data": True, **vocab},
            ),
        )
    elif d.mock_data:
        for key in paths:
            shown = f"--{key.replace('_', '-')} {' '.join(getattr(d, key))}"
            alone = [{"mock_data": False}] if paths == [key] else []
            yield Finding(
                f"{shown} and --mock-data are both given", (key, "mock_data"), (*alone, {key: None})
            )
    else:
        for split in wanted_splits(config):
            if d.words_of(split)[1] is None:
                quiet = [{"eval_interval": 0, "eval_iters": 0}] if split == "valid" else []
                yield Finding(
                    f"no data for {split} samples: neither --{split}-data-path nor --data-path is given",
                    (f"{split}_data_path", "data_path"),
                    (f"--{split}-data-path PREFIX", *quiet),
                )
    for key in paths:
        try:
            parse_sources(getattr(d, key), "--" + key.replace("_", "-"))
        except DatasetError as error:
            yield Finding(str(error), (key,), ("one PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ...",))


def megatron_order_is_possible(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--sample-order megatron is that of one dataset."""
    d = config.data
    if d.sample_order != "megatron":
        return
    for key in PATHS:
        if len(getattr(d, key) or ()) > 1:
            yield Finding(
                f"--sample-order megatron reproduces the order of one dataset, but --{key.replace('_', '-')} blends "
                f"{len(getattr(d, key)) // 2}",
                ("sample_order", key),
                ({"sample_order": "counted"}, "one PREFIX"),
            )


def vocabulary_is_known(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A vocabulary size, given or from the tokenizer; the made-up tokens need it given."""
    m, d = config.model, config.data
    paths = any(getattr(d, key) is not None for key in PATHS)
    if m.vocab_size is None and d.mock_data and not paths:
        yield Finding(
            "--mock-data needs --vocab-size",
            ("vocab_size", "mock_data"),
            ({"vocab_size": EXAMPLES["vocab_size"]},),
        )
    elif m.vocab_size is None and d.tokenizer_type is None and paths:
        yield Finding(
            "the vocabulary size is not known: neither --vocab-size nor --tokenizer-type is given",
            ("vocab_size", "tokenizer_type"),
            ("--tokenizer-type of the data, and its files", {"vocab_size": EXAMPLES["vocab_size"]}),
        )
    if m.vocab_size == 1 and d.mock_data:
        yield Finding(
            "--mock-data cannot be learned with --vocab-size 1",
            ("vocab_size", "mock_data"),
            ({"vocab_size": EXAMPLES["vocab_size"]},),
        )


def split_is_readable(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--split is shares. Whether each split has data is seen in the files."""
    from megalite.data.gpt import parse_split
    from megalite.data.indexed import DatasetError

    if config.data.mock_data:
        return
    try:
        parse_split(config.data.split)
    except DatasetError as error:
        yield Finding(str(error), ("split",), ({"split": "969,30,1"},))


def profile_is_ranges(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--profile is ranges of iterations; --profile-ranks are ranks that there are."""
    t = config.training
    if t.profile is None:
        return
    try:
        t.profile_ranges  # noqa: B018
    except ValueError as error:
        yield Finding(f"--profile {t.profile}: {error}", ("profile",), ({"profile": "10-12"},))
    unknown = [rank for rank in t.profile_ranks if not rank.isdecimal() or int(rank) >= world_size]
    if unknown:
        yield Finding(
            f"--profile-ranks {' '.join(unknown)}: the ranks are 0 to {world_size - 1}",
            ("profile_ranks",),
            ({"profile_ranks": ("0",)},),
        )


WATCHERS = {"tensorboard_dir": "tensorboard", "wandb_project": "wandb"}
"""Flags that need a library, which not everyone wants installed."""


def watchers_are_installed(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The libraries of TensorBoard and Weights & Biases are there when they are asked for."""
    for key, library in WATCHERS.items():
        given = getattr(config.training, key)
        if given is not None and find_spec(library) is None:
            flag = "--" + key.replace("_", "-")
            advice = "pip install 'megalite[tracking]'"
            yield Finding(
                f"{flag} {given} needs the library {library}", (key,), (advice, {key: None})
            )


RUN_RULES: tuple[Rule, ...] = (
    batch_divides,
    recompute_agrees,
    precision_is_one,
    learning_rate_falls,
    length_is_known,
    attention_can_drop,
    data_has_one_source,
    megatron_order_is_possible,
    vocabulary_is_known,
    tokenizer_is_whole,
    split_is_readable,
    profile_is_ranges,
    watchers_are_installed,
)

"""Rules of recompute, optimizer and data, as far as the flags alone tell. Imports no
torch."""

from collections.abc import Iterator
from importlib.util import find_spec

from megalite.config.options import nearest
from megalite.config.rules.batches import BATCH_RULES
from megalite.config.rules.finding import (
    Finding,
    Rule,
    example_of,
    flag_of,
    global_batch,
    iterations,
    parameter_names,
    schedule,
    wanted_splits,
    without_evaluation,
)
from megalite.config.rules.tokenizer import tokenizer_is_whole
from megalite.config.run import RunConfig, options, to_flat
from megalite.config.schedule import STAGES_ON_A_RANK
from megalite.data.gpt import parse_split
from megalite.data.indexed import DatasetError
from megalite.data.sources import parse_sources
from megalite.models.shapes import decays
from megalite.optim.config import EXAMPLE_GROUPS
from megalite.optim.treatment import parse_group, treatment_of
from megalite.parallel.config import OF_SPLIT
from megalite.system.apex import ADAM, INSTALL, NORMS, why_no_apex

SHORT_FORMS = (
    ("bf16", "precision", "bf16", ("fp16", "fp64")),
    ("fp16", "precision", "fp16", ("bf16", "fp64")),
    ("recompute_activations", "recompute_granularity", "selective", ("full",)),
)
"""(switch, the field that it is a short form of, what it means, values that contradict it)."""


def short_forms_agree(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--bf16 and --fp16 against each other and --precision, --recompute-activations against
    --recompute-granularity."""
    flat = to_flat(config)
    if flat["bf16"] and flat["fp16"]:
        yield Finding("--bf16 and --fp16 are two precisions", {"bf16": False}, {"fp16": False})
    for short, long, meaning, others in SHORT_FORMS:
        if flat[short] and flat[long] in others:
            flag = flag_of(long)
            yield Finding(
                f"{flag_of(short)} means {flag} {meaning}, but {flag} {flat[long]} is given too",
                {short: False},
                {long: meaning},
            )


def stages_hold_recomputed_layers(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No more layers are recomputed at a time than a stage holds."""
    r = config.recompute
    model = config.model
    stages = config.pipeline.stages
    if r.granularity != "full" or r.recompute_activations or stages > model.num_layers:
        return
    if config.model.vocab_size is None and not config.parallel.split_is_given:
        # The vocabulary is still to be read from a file: the most that a stage could have.
        most = config.model.num_layers - stages + 1
    else:
        try:
            most = max(map(len, config.layers_of_stages))
        except ValueError:  # layers_can_be_divided says it
            return
    if r.recompute_num_layers > most:
        yield Finding(
            f"--recompute-num-layers {r.recompute_num_layers} is more than the {most} layers of "
            "the largest stage",
            {"recompute_num_layers": most},
            also=("num_layers", "pipeline_model_parallel_size", *STAGES_ON_A_RANK, *OF_SPLIT),
        )


def loss_scale_starts_above_its_minimum(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """min_loss_scale <= initial_loss_scale."""
    least = config.optimizer.min_loss_scale
    first = config.optimizer.initial_loss_scale
    if least > first:
        message = f"--min-loss-scale {least:g} is above --initial-loss-scale {first:g}"
        yield Finding(message, {"initial_loss_scale": least}, {"min_loss_scale": min(1.0, first)})


def schedule_has_one_unit(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Decay and warm-up are given in iterations or in samples."""
    o = config.optimizer
    if not o.counts_samples:
        return
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        iterations_given = getattr(o, f"{name}_iters")
        if iterations_given:
            samples = global_batch(config, world_size) * iterations_given
            yield Finding(
                f"{flag_of(f'{name}_iters')} {iterations_given} counts iterations, but another "
                "flag of the schedule counts samples",
                {f"{name}_iters": 0 if name == "lr_warmup" else None, f"{name}_samples": samples},
                also=("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples"),
            )


def learning_rate_falls(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """min_lr <= lr; a warm-up given once, that ends before the decay does."""
    o = config.optimizer
    for prefix in ("", "decoupled_"):
        high = getattr(o, f"{prefix}lr")
        low = getattr(o, f"{prefix}min_lr")
        if None not in (high, low) and low > high:
            message = f"{flag_of(f'{prefix}min_lr')} {low:g} is above {flag_of(f'{prefix}lr')} "
            message += f"{high:g}"
            yield Finding(message, {f"{prefix}min_lr": high}, {f"{prefix}lr": low})
    unit = "samples" if o.counts_samples else "iters"
    warmup = getattr(o, f"lr_warmup_{unit}")
    flag = flag_of(f"lr_warmup_{unit}")
    if o.lr_warmup_fraction is not None and warmup:
        yield Finding(
            f"--lr-warmup-fraction {o.lr_warmup_fraction:g} and {flag} {warmup} both set the "
            "warm-up",
            {"lr_warmup_fraction": None},
            {f"lr_warmup_{unit}": 0},
        )
    # The end of the schedule.
    plan = schedule(config, world_size)
    end = plan.decay
    end_key = f"lr_decay_{unit}"
    if o.lr_decay_style == "constant" or getattr(o, end_key) is None:
        end = plan.length
        end_key = f"train_{unit}"
    if end and warmup and warmup >= end:
        yield Finding(
            f"{flag} {warmup} does not end before the schedule does, at {_place(config, end)}",
            {f"lr_warmup_{unit}": end // 10},
            {end_key: 10 * warmup},
            also=(end_key, "train_iters", "train_samples", "train_tokens"),
        )


def _place(config: RunConfig, position: int) -> str:
    """A position in the schedule in words: `iteration 100`, or `sample 1600`."""
    unit = "sample" if config.optimizer.counts_samples else "iteration"
    return f"{unit} {position}"


def wsd_fits(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The decay of WSD has a length, which fits after the warm-up."""
    o = config.optimizer
    if o.lr_decay_style != "WSD":
        return
    plan = schedule(config, world_size)
    key = "lr_wsd_decay_samples" if o.counts_samples else "lr_wsd_decay_iters"
    room = plan.decay - plan.warmup
    if plan.wsd_decay is None:
        yield Finding(
            f"--lr-decay-style WSD needs {flag_of(key)}",
            {key: max(1, plan.decay // 10)},
            {"lr_decay_style": "cosine"},
        )
    elif plan.decay and plan.wsd_decay > room:
        unit = "samples" if o.counts_samples else "iterations"
        yield Finding(
            f"{flag_of(key)} {plan.wsd_decay} are more than the {room} {unit} between the warm-up "
            f"and the end of the schedule, at {_place(config, plan.decay)}",
            {key: max(1, room // 10)},
            also=("lr_warmup_iters", "lr_warmup_samples", "lr_decay_iters", "lr_decay_samples")
            + ("train_iters", "train_samples", "train_tokens"),
        )


def schedules_are_whole(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Both ends of a weight decay that changes; a warm-up that rises."""
    o = config.optimizer
    for key in ("lr", "decoupled_lr"):
        highest = getattr(o, key)
        if highest is not None and o.lr_warmup_init > highest:
            message = f"--lr-warmup-init {o.lr_warmup_init:g} is above {flag_of(key)} {highest:g}"
            yield Finding(message, {"lr_warmup_init": 0.0}, {key: o.lr_warmup_init})
    ends = ("start_weight_decay", "end_weight_decay")
    missing = [key for key in ends if getattr(o, key) is None]
    style = o.weight_decay_incr_style
    if style != "constant" and missing:
        yield Finding(
            f"--weight-decay-incr-style {style} needs {' and '.join(map(flag_of, missing))}",
            dict.fromkeys(missing, o.weight_decay),
            {"weight_decay_incr_style": "constant"},
        )


def parameter_groups_match(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Each of --parameter-groups can be read, and its pattern matches a parameter; some parameter
    is trained."""
    texts = config.optimizer.parameter_groups
    if texts is None:
        return
    names = parameter_names(config)
    groups = []
    for text in texts:
        where = f"--parameter-groups {text!r}"
        try:
            groups.append(parse_group(text))
        except ValueError as error:
            fix = f"for example --parameter-groups {EXAMPLE_GROUPS[0]!r}"
            yield Finding(f"{where}: {error}", fix)
            continue
        pattern = groups[-1].pattern
        if not any(map(groups[-1].matches, names)):
            fix = f"a pattern such as {_similar_pattern(pattern, names)}"
            message = f"{where}: the model has no parameter whose name matches {pattern}"
            yield Finding(message, fix, also=("num_layers",))
    if len(groups) == len(texts):
        treatments = [treatment_of(name, decays(name), config.optimizer) for name in names]
        if all(treatment.frozen for treatment in treatments):
            message = "--parameter-groups freezes every parameter: nothing is left to train"
            yield Finding(message, {"parameter_groups": None})


def _similar_pattern(pattern: str, names: list[str]) -> str:
    """A pattern that matches some of these names, like one that matches none."""
    beginnings = {}
    for name in names:
        parts = name.split(".")
        beginnings[name] = name
        for count in range(1, len(parts)):
            beginning = ".".join(parts[:count])
            beginnings[beginning] = f"{beginning}.*"
    return beginnings[nearest(pattern.strip(".*"), beginnings) or names[0]]


def attention_can_drop(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A backend of attention that drops weights as --rng-scheme says, if any are dropped."""
    m = config.model
    scheme = config.training.rng_scheme
    if m.attention_dropout == 0 or m.attention_backend in ("auto", "eager"):
        return
    if m.attention_backend == "sdpa" or scheme == "megatron":
        yield Finding(
            f"--attention-backend {m.attention_backend} cannot drop attention weights "
            f"(--attention-dropout {m.attention_dropout:g}) by --rng-scheme {scheme}",
            {"attention_backend": "auto"},
            {"attention_dropout": 0.0},
        )


def data_has_one_source(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Paths or mock_data, not both, not neither; data for every split that is read; paths that are
    prefixes with weights."""
    d = config.data
    given = {key: words for key, words in d.paths.items() if words is not None}
    if not given and not d.mock_data:
        mock = {"mock_data": True} | ({} if config.model.vocab_size else example_of("vocab_size"))
        yield Finding(
            "there is no data: neither --data-path nor --mock-data is given",
            "--data-path PREFIX of a dataset made by tools/preprocess_data.py",
            mock,
        )
    # A flag for every split, unless the data is generated.
    for split in wanted_splits(config) if given and not d.mock_data else ():
        if d.words_of(split)[1] is None:
            flag = f"--{split}-data-path"
            message = f"no data for {split} samples: neither {flag} nor --data-path is given"
            fixes = [without_evaluation()] if split == "valid" else []
            yield Finding(message, f"{flag} PREFIX", *fixes)
    for key, words in given.items():
        if d.mock_data:
            fixes = [{"mock_data": False}] if len(given) == 1 else []
            message = f"{flag_of(key)} {' '.join(words)} and --mock-data are both given"
            yield Finding(message, *fixes, {key: None})
        try:
            parse_sources(words, flag_of(key))
        except DatasetError as error:
            advice = "one PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..."
            yield Finding(str(error), advice)


def megatron_order_is_possible(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--sample-order megatron is that of one dataset."""
    if config.data.sample_order != "megatron":
        return
    for key, words in config.data.paths.items():
        if words is not None and len(words) > 1:
            yield Finding(
                "--sample-order megatron reproduces the order of one dataset, but "
                f"{flag_of(key)} blends {len(words) // 2}",
                {"sample_order": "counted"},
                "one PREFIX",
            )


def vocabulary_is_known(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """A vocabulary size, given or from the tokenizer; mock data needs it given, and above 1."""
    size = config.model.vocab_size
    d = config.data
    has_paths = any(d.paths.values())
    example = example_of("vocab_size")
    if size is None and d.mock_data and not has_paths:
        yield Finding("--mock-data needs --vocab-size", example)
    elif size is None and d.tokenizer_type is None and has_paths:
        yield Finding(
            "the vocabulary size is not known: neither --vocab-size nor --tokenizer-type is given",
            "--tokenizer-type of the data, and its files",
            example,
        )
    if size == 1 and d.mock_data:
        yield Finding("--mock-data cannot be learned with --vocab-size 1", example)


def split_is_readable(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--split is shares. Whether each split has data is seen in the files."""
    if config.data.mock_data:
        return
    try:
        parse_split(config.data.split)
    except DatasetError as error:
        yield Finding(str(error), example_of("split"), also=("split",))


def profile_is_ranges(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--profile is ranges of iterations; --profile-ranks are ranks that there are."""
    t = config.training
    if t.profile is None:
        return
    try:
        t.profile_ranges  # noqa: B018 - raises
    except ValueError as error:
        yield Finding(f"--profile {t.profile}: {error}", {"profile": "10-12"})
    unknown = [rank for rank in t.profile_ranks if not rank.isdecimal() or int(rank) >= world_size]
    if unknown:
        message = f"--profile-ranks {' '.join(unknown)}: the ranks are 0 to {world_size - 1}"
        yield Finding(message, example_of("profile_ranks"))


def trace_is_a_range(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--trace-iterations is a short range that the run reaches."""
    t = config.training
    if t.trace is None or t.trace_iterations is None:
        return
    given = f"--trace-iterations {t.trace_iterations}"
    try:
        first, _ = t.trace_range()
    except ValueError as error:
        yield Finding(f"{given}: {error}", {"trace_iterations": None}, {"trace_iterations": "3-5"})
        return
    total = iterations(config, world_size)
    if total is not None and first > total:
        yield Finding(f"{given}: the run has {total} iterations", {"trace_iterations": None})


def libraries_are_installed(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """Optional libraries, such as TensorBoard's, are there when they are asked for."""
    for key, option in options().items():
        library = option.field.needs_library
        value = getattr(getattr(config, option.section), key)
        if library and value is not None and find_spec(library) is None:
            message = f"{option.flag} {value} needs the library {library}"
            yield Finding(message, "pip install 'megalite[tracking]'", {key: None})


def apex_can_be_used(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """NVIDIA's apex is installed, and has a GPU and a precision that it knows, where it is asked
    for."""
    uses = {"optimizer_backend": ADAM, "norm_backend": NORMS}
    for key, kernels in uses.items():
        if to_flat(config)[key] != "apex":
            continue
        problem = why_no_apex(kernels)
        if problem:
            yield Finding(f"{flag_of(key)} apex: {problem}", {key: "auto"}, INSTALL)
        if config.parallel.device == "cpu":
            message = f"{flag_of(key)} apex needs a GPU, but there is --device cpu"
            yield Finding(message, {"device": "auto"}, {key: "auto"})
        if config.optimizer.chosen_precision == "fp64":
            message = f"{flag_of(key)} apex has no fp64, which --precision asks for"
            yield Finding(message, {"precision": "fp32"}, {key: "auto"})


RUN_RULES: tuple[Rule, ...] = (
    *BATCH_RULES,
    short_forms_agree,
    stages_hold_recomputed_layers,
    loss_scale_starts_above_its_minimum,
    schedule_has_one_unit,
    learning_rate_falls,
    wsd_fits,
    schedules_are_whole,
    parameter_groups_match,
    attention_can_drop,
    data_has_one_source,
    megatron_order_is_possible,
    vocabulary_is_known,
    tokenizer_is_whole,
    split_is_readable,
    profile_is_ranges,
    trace_is_a_range,
    libraries_are_installed,
    apex_can_be_used,
)

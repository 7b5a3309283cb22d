"""Rules of batch sizes and of the length of the training. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from megalite.config.rules.finding import (
    Finding,
    Rule,
    batch_sizes,
    data_parallel_size,
    divisors,
    each,
    example_of,
    flag_of,
    global_batch,
    multiples,
)
from megalite.config.run import RunConfig, with_values
from megalite.data.batch_sizes import BatchSizes

MOST_RAMPS = 8
"""Ramps of the batch size that are tried, at most."""


def batch_divides(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """global batch % (micro batch * dp), at each size of a ramp."""
    batch = config.data.global_batch_size
    micro = config.data.micro_batch_size
    dp = data_parallel_size(config, world_size)
    unit = micro * dp
    product = f"--micro-batch-size {micro} x data-parallel size {dp} = {unit}"
    if batch is not None and batch % unit:
        fixes = each("global_batch_size", multiples(unit, batch))
        fixes = [_with_whole_samples(config, world_size, fix) for fix in fixes]
        if batch % dp == 0:
            fixes += each("micro_batch_size", divisors(batch // dp, micro))
        yield Finding(f"--global-batch-size {batch} is not a multiple of {product}", *fixes)
        return
    # The ramp.
    if config.data.rampup_batch_size is None:
        return
    words = " ".join(config.data.rampup_batch_size).split()
    flag = f"--rampup-batch-size {' '.join(words)}"
    also = ("global_batch_size", "train_samples")
    final = global_batch(config, world_size)
    ramps = _ramps(words, final, unit)
    fixes = each("rampup_batch_size", [*ramps[:1], None, *ramps[1:]])
    fixes = [_with_whole_samples(config, world_size, fix) for fix in fixes]
    try:
        sizes = BatchSizes.from_words(final, tuple(words))
    except ValueError as error:
        yield Finding(f"{flag} {error}", *fixes, also=also)
        return
    if sizes.start % unit or sizes.increment % unit:
        message = f"{flag}: START and INCREMENT are not multiples of {product}"
        yield Finding(message, *fixes, also=also)


def _ramps(words: list[str], final: int, unit: int) -> list[tuple[str, str, str]]:
    """Words of --rampup-batch-size that lead to a global batch of `final` samples in multiples of
    `unit`, most like those given first: with the same START, or else INCREMENT, if it fits."""
    numbers = [int(word) if word.isdecimal() else 0 for word in words]
    start, increment, samples = [*numbers, 0, 0, 0][:3]
    starts = [start]
    if start % unit or not 0 < start < final:
        wanted = start if 0 < start < final else final // 2
        step = increment if 0 < increment < final and increment % unit == 0 else unit
        starts = sorted(range(final - step, 0, -step), key=lambda first: abs(first - wanted))
    ramps = []
    for first in starts[:MOST_RAMPS]:
        steps = [step for step in divisors(final - first, final) if step % unit == 0]
        for step in sorted(steps, key=lambda step: abs(step - increment)):
            ramps.append((str(first), str(step), str(samples or 1000)))
    return ramps[:MOST_RAMPS]


def _with_whole_samples(
    config: RunConfig, world_size: int, change: dict[str, Any]
) -> dict[str, Any]:
    """A change of the batch sizes, and of --train-samples where they are not whole batches then."""
    samples = config.training.train_samples
    if samples is None:
        return change
    sizes = batch_sizes(with_values(config, change), world_size)
    nearest_whole = _whole_samples(sizes, samples)[0]
    return change if nearest_whole == samples else change | {"train_samples": nearest_whole}


def _whole_samples(sizes: BatchSizes, samples: int) -> list[int]:
    """The numbers of samples next to a number, or that number, which whole batches consume; nearest
    first."""
    steps = sizes.iterations_within(samples)
    around = {sizes.consumed_after(steps), sizes.consumed_after(steps + 1)} - {0}
    return sorted(around, key=lambda whole: abs(whole - samples))


def length_is_known(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """One length of the training, or several that agree; samples in whole batches."""
    t = config.training
    sizes = batch_sizes(config, world_size)
    if t.train_iters is None and t.train_samples is None and t.train_tokens is None:
        example = example_of("train_iters")
        yield Finding(
            "the length of the training is not known: none of --train-iters, --train-samples and "
            "--train-tokens is given",
            example,
            {"train_samples": sizes.consumed_after(example["train_iters"])},
        )
        return
    if t.train_samples is not None and t.train_tokens is not None:
        yield Finding(
            f"--train-samples {t.train_samples} and --train-tokens {t.train_tokens} both set the "
            "length of the training",
            {"train_tokens": None},
            {"train_samples": None},
        )
        return
    steps = config.iterations_of_samples(sizes)
    if steps is None:
        return
    key = "train_tokens" if t.train_samples is None else "train_samples"
    given = f"{flag_of(key)} {getattr(t, key)}"
    if t.train_samples is not None and sizes.consumed_after(steps) != t.train_samples:
        batches = f"a multiple of the global batch size {sizes.final}"
        if sizes.start is not None:
            batches = "a whole number of the global batches of --rampup-batch-size"
        yield Finding(
            f"{given} is not {batches}",
            *each("train_samples", _whole_samples(sizes, t.train_samples)),
            also=("global_batch_size", "micro_batch_size", "rampup_batch_size"),
        )
    elif t.train_iters not in (None, steps):
        yield Finding(
            f"{given} are {steps} iterations, but --train-iters is {t.train_iters}",
            {key: None},
            "--train-iters unset",  # which a file may have set, such as a checkpoint's
            also=("global_batch_size", "rampup_batch_size"),
        )


BATCH_RULES: tuple[Rule, ...] = (batch_divides, length_is_known)

"""DeepSpeed's JSON file: what it may say beside the flags, and what DeepSpeed is given of both.

Imports no torch.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from megalite.optim.config import OptimizerConfig
from megalite.system.errors import error_message

AUTO = "auto"
"""A value that is left to the flags, or to DeepSpeed's default where no flag has it."""
ZERO = "zero_optimization"


class Kind(NamedTuple):
    """What values a setting may have."""

    text: str
    """In words, after "must be"."""
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number of at least 0, also as 5e8; true is none."""
    if isinstance(value, float):
        return value >= 0 and value.is_integer()
    return type(value) is int and value >= 0


def _one_of(*words: str) -> Kind:
    text = ", ".join(json.dumps(word) for word in words)
    return Kind(f"one of {text}", lambda value: value in words)


BOOL = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("a number", lambda value: type(value) in (int, float))
WHOLE = Kind("a whole number of at least 0", _is_whole)
POSITIVE = Kind("a whole number of at least 1", lambda value: _is_whole(value) and value > 0)
NAMES = Kind(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
)
DTYPE = _one_of("fp32", "bf16", "fp16")

PASSED: dict[str, Kind | dict[str, Kind]] = {
    "comms_logger": {
        "enabled": BOOL,
        "prof_all": BOOL,
        "prof_ops": NAMES,
        "verbose": BOOL,
        "debug": BOOL,
    },
    "communication_data_type": DTYPE,
    "data_types": {"grad_accum_dtype": DTYPE},
    "dump_state": BOOL,
    "log_level": _one_of("debug", "info", "warning", "error", "critical"),
    "memory_breakdown": BOOL,
    "steps_per_print": POSITIVE,
    "wall_clock_breakdown": BOOL,
    ZERO: {
        "allgather_bucket_size": POSITIVE,
        "allgather_partitions": BOOL,
        "contiguous_gradients": BOOL,
        "ignore_unused_parameters": BOOL,
        "overlap_comm": BOOL,
        "reduce_bucket_size": POSITIVE,
        "reduce_scatter": BOOL,
        "stage3_max_live_parameters": WHOLE,
        "stage3_max_reuse_distance": WHOLE,
        "stage3_model_persistence_threshold": WHOLE,
        "stage3_param_persistence_threshold": WHOLE,
        "stage3_prefetch_bucket_size": WHOLE,
        "sub_group_size": WHOLE,
        "use_multi_rank_bucket_allreduce": BOOL,
    },
}
"""What DeepSpeed is given as it stands: a setting, or a section and its settings."""
OF_ZERO = ("stage", "offload_optimizer", "offload_param")
"""What it is given of that section beside them, checked by `zero_problems`."""
OFFLOAD = ("device", "pin_memory")
"""Keys of offload_optimizer and offload_param."""
OF_FP16 = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
"""Settings of the section fp16 without an effect in another precision."""
WITHOUT_EFFECT = {ZERO: ("stage3_gather_16bit_weights_on_model_save",), "fp16": OF_FP16}
"""Accepted and not passed on: what is saved holds the shards of all ranks, and the loss scale is
ours."""
SECTIONS = {
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
    "comms_logger": '{"enabled": true}',
    "data_types": '{"grad_accum_dtype": "fp32"}',
    ZERO: '{"stage": 2}',
}
"""Settings that are objects, and an example of each."""

REFUSED = {
    "optimizer": "the optimizer is made of --optimizer, --lr, --weight-decay and so on",
    "scheduler": "the learning rate follows --lr, --lr-decay-style and so on",
    "activation_checkpointing": "use --recompute-granularity",
    "amp": "use --precision",
    "torch_autocast": "use --precision",
    "tensor_parallel": "use --tp",
    "pipeline": "use --tp; pipelines do not work with --deepspeed",
    "tensorboard": "use --tensorboard-dir",
    "wandb": "use --wandb-project",
    "csv_monitor": "use --metrics-file",
    "checkpoint": "use --save, --save-interval and --load",
    f"{ZERO}.cpu_offload": f'use {ZERO}.offload_optimizer {{"device": "cpu"}}',
}
"""Known keys that are not passed on, and what to do instead."""


class SettingsError(ValueError):
    """The file cannot be read, or is no JSON object."""


class Owned(NamedTuple):
    """A setting of DeepSpeed that follows from flags."""

    path: str
    """Section and key: `bf16.enabled`."""
    value: Any
    """What the flags make it."""
    flags: str
    """The flags, as one would type them."""
    key: str = ""
    """The field that would take the file's value, if one does."""
    convert: Callable[[Any], Any] = int
    """Makes the field's value of the file's."""

    @property
    def kind(self) -> Kind:
        """What the file's value must be."""
        return BOOL if isinstance(self.value, bool) else NUMBER

    def change(self, value: Any) -> dict[str, Any]:
        """The change of fields that takes the file's value; {} if none does."""
        if self.key and NUMBER.accepts(value):
            with suppress(ValueError, OverflowError):
                field = self.convert(value)
                if self.convert is not int or field == value:
                    return {self.key: field}
        return {}


def as_json(path: str, value: Any) -> str:
    """A setting as one writes it in the file: `"bf16": {"enabled": true}`."""
    section, _, key = path.rpartition(".")
    text = f"{json.dumps(key)}: {json.dumps(value)}"
    return f"{json.dumps(section)}: {{{text}}}" if section else text


def read(path: str) -> dict[str, Any]:
    """The settings in a file; what is "auto" or null there is left out.

    Raises SettingsError when it cannot be read, or a key is repeated.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        explained = error_message(error)
        if not explained.startswith(path):
            explained = f"{path}: {error.strerror}"
        raise SettingsError(explained) from None
    except ValueError as error:
        raise SettingsError(f"{path} is no text in UTF-8: {error}") from None
    if not text.strip():
        raise SettingsError(f"{path} is empty")
    try:
        document = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        problem = str(error)
        if text[error.pos :].lstrip().startswith(("//", "/*", "#")):
            problem = f"JSON has no comments: line {error.lineno}"
        raise SettingsError(f"{path}: {problem}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path} has no JSON object")
    return _given(document)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{json.dumps(key)} is given twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _given(value: Any) -> Any:
    """Without settings that are left to the flags or to DeepSpeed."""
    if not isinstance(value, dict):
        return value
    return {key: _given(inner) for key, inner in value.items() if inner not in (AUTO, None)}


def owned(
    optimizer: OptimizerConfig, micro_batch: int, global_batch: int, data_ranks: int
) -> list[Owned]:
    """The settings that follow from flags. `global_batch` sequences are a multiple of
    `micro_batch` x `data_ranks`."""
    accumulated = global_batch // (micro_batch * data_ranks)
    batch = f"--global-batch-size {global_batch}"
    micro = f"--micro-batch-size {micro_batch}"
    counted = f"{batch} / ({micro} x {data_ranks} data ranks) = {accumulated}"
    precision = f"--precision {optimizer.chosen_precision}"
    is_fp16 = optimizer.chosen_precision == "fp16"
    settings = [
        Owned("train_batch_size", global_batch, batch, "global_batch_size"),
        Owned("train_micro_batch_size_per_gpu", micro_batch, micro, "micro_batch_size"),
        Owned("gradient_accumulation_steps", accumulated, counted),
        Owned(
            "gradient_clipping",
            optimizer.clip_grad,
            f"--clip-grad {optimizer.clip_grad:g}",
            "clip_grad",
            float,
        ),
        Owned("bf16.enabled", optimizer.chosen_precision == "bf16", precision),
        Owned("fp16.enabled", is_fp16, precision),
        Owned("zero_allow_untested_optimizer", True, f"--optimizer {optimizer.optimizer}"),
        Owned("zero_force_ds_cpu_optimizer", False, f"--optimizer {optimizer.optimizer}"),
    ]
    if is_fp16:
        settings += _loss_scale(optimizer)
    return settings


def _loss_scale(optimizer: OptimizerConfig) -> list[Owned]:
    """What the file may repeat of the loss scale. DeepSpeed is given a new one before each step."""
    constant = optimizer.loss_scale or 0
    first = optimizer.initial_loss_scale
    window = optimizer.loss_scale_window
    least = optimizer.min_loss_scale
    shown = "no --loss-scale"
    if constant:
        shown = f"--loss-scale {constant:g}"
    return [
        Owned("fp16.loss_scale", constant, shown, "loss_scale", lambda scale: float(scale) or None),
        Owned(
            "fp16.initial_scale_power",
            math.log2(first),
            f"--initial-loss-scale {first:g}",
            "initial_loss_scale",
            lambda power: 2.0**power,
        ),
        Owned(
            "fp16.loss_scale_window", window, f"--loss-scale-window {window}", "loss_scale_window"
        ),
        Owned(
            "fp16.hysteresis",
            optimizer.hysteresis,
            f"--hysteresis {optimizer.hysteresis}",
            "hysteresis",
        ),
        Owned("fp16.min_loss_scale", least, f"--min-loss-scale {least:g}", "min_loss_scale", float),
    ]


def contradictions(settings: dict[str, Any], ours: list[Owned]) -> Iterator[tuple[Owned, Any]]:
    """Each setting of the file that differs from what the flags make it, and its value there."""
    for setting in ours:
        section, _, key = setting.path.rpartition(".")
        holder = settings
        if section:
            holder = settings.get(section)
        if isinstance(holder, dict) and key in holder:
            value = holder[key]
            # True is 1 in Python, not in JSON.
            if value != setting.value or not setting.kind.accepts(value):
                yield setting, value


def wrong_values(settings: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what it must be) of each section that is no object, and of each setting that
    DeepSpeed is given as it stands and cannot take."""
    for key, value in settings.items():
        passed = PASSED.get(key)
        if key in SECTIONS and not isinstance(value, dict):
            yield key, value, f"an object: {SECTIONS[key]}"
        elif isinstance(passed, Kind):
            if not passed.accepts(value):
                yield key, value, passed.text
        elif passed:
            for name, kind in passed.items():
                if name in value and not kind.accepts(value[name]):
                    yield f"{key}.{name}", value[name], kind.text


def not_passed(settings: dict[str, Any], ours: list[Owned]) -> Iterator[tuple[str, str]]:
    """(key, what to do) of each setting that is neither passed on nor follows from flags."""
    owned_paths = {setting.path for setting in ours}
    for key, value in settings.items():
        paths = {key: key}
        known = {*owned_paths, *PASSED}
        if key in SECTIONS:
            if not isinstance(value, dict):
                continue  # `wrong_values` reports it
            paths = {name: f"{key}.{name}" for name in value}
            inner = (*PASSED.get(key, ()), *WITHOUT_EFFECT.get(key, ()))
            if key == ZERO:
                inner += OF_ZERO
            known = owned_paths.union(f"{key}.{name}" for name in inner)
        for path in paths.values():
            if path not in known:
                yield path, REFUSED.get(path, "leave it out: no flag has it, and it is not run")


def zero_problems(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do) with the section of ZeRO."""
    section = settings.get(ZERO, {})
    if not isinstance(section, dict):
        return  # `wrong_values` reports it
    stage = section.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        shown = f"{ZERO}.stage is {json.dumps(stage)}"
        if stage is None:
            shown = f"no number for {ZERO}.stage"
        fix = f'"{ZERO}": {{"stage": 1}}, or 2 or 3; without ZeRO, leave out --deepspeed'
        yield shown, fix
        return
    for name in ("offload_optimizer", "offload_param"):
        yield from _offload_problems(f"{ZERO}.{name}", section.get(name, {}))
    if stage < 3 and offloads(settings, "offload_param"):
        yield f"{ZERO}.offload_param with stage {stage}", "stage 3, which shards weights"


def _offload_problems(path: str, offload: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(offload, dict):
        shown = f"{path}: {json.dumps(offload)} must be an object"
        yield shown, '{"device": "cpu"}, or leave it out'
        return
    if offload.get("device") not in (None, "none", "cpu"):
        shown = f"{path}.device: {json.dumps(offload['device'])}"
        yield shown, '"cpu", or "none": the state must be in memory to be saved'
    pinned = offload.get("pin_memory", True)
    if not BOOL.accepts(pinned):
        yield f"{path}.pin_memory: {json.dumps(pinned)} must be {BOOL.text}", "leave it out"
    for key in offload:
        if key not in OFFLOAD:
            yield f"{path}.{key}", f"leave it out: only {' and '.join(OFFLOAD)} are passed on"


def stage_of(settings: dict[str, Any]) -> int | None:
    """Stage of ZeRO; None where the file has none."""
    section = settings.get(ZERO)
    return section.get("stage") if isinstance(section, dict) else None


def offloads(settings: dict[str, Any], name: str = "offload_optimizer") -> bool:
    """Whether optimizer states (or, with "offload_param", weights) are kept on the CPU."""
    offload = settings.get(ZERO, {}).get(name)
    return isinstance(offload, dict) and offload.get("device") == "cpu"


def for_engine(settings: dict[str, Any], ours: list[Owned]) -> dict[str, Any]:
    """What DeepSpeed is given: the file's settings, those of the flags, and sums of gradients in
    fp32 unless the file says otherwise."""
    given = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    for key, value in settings.items():
        if key in PASSED:
            given[key] = value
        if key in WITHOUT_EFFECT:
            value = {name: value[name] for name in value if name not in WITHOUT_EFFECT[key]}
            given[key] = value
    for setting in ours:
        section, _, key = setting.path.rpartition(".")
        holder = given
        if section:
            holder = given.setdefault(section, {})
        holder[key] = setting.value
    if "fp16" in given and given["fp16"]["enabled"]:
        given["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return given


def flattened(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of each setting: ("zero_optimization.stage", 2)."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

"""DeepSpeed's JSON file: what it may say beside the flags, and what DeepSpeed is given of both.

Imports no torch.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megalite.optim.config import OptimizerConfig
from megalite.system.errors import error_message

AUTO = "auto"
"""A value that is left to the flags, or to DeepSpeed's default where no flag has it."""
ZERO = "zero_optimization"

PASSED = {
    "comms_logger": None,
    "communication_data_type": None,
    "data_types": ("grad_accum_dtype",),
    "dump_state": None,
    "log_level": None,
    "memory_breakdown": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    ZERO: (
        "stage",
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    ),
}
"""What DeepSpeed is given as it stands: section, and its keys; None: all that it has."""
OFFLOAD = ("device", "pin_memory")
"""Keys of offload_optimizer and offload_param."""

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
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": (
        "checkpoints store the shards of all ranks, so nothing is gathered"
    ),
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
    kind: type = int
    """Type of that field."""


def read(path: str) -> dict[str, Any]:
    """The settings in a file, "auto" values left out.

    Raises SettingsError when it cannot be read, or a key is repeated.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = json.loads(text, object_pairs_hook=_unrepeated)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: {error_message(error)}") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{path} has no JSON object")
    return _without_auto(document)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice")
        found[key] = value
    return found


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}


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
        Owned("fp16.loss_scale", constant, shown),
        Owned("fp16.initial_scale_power", math.log2(first), f"--initial-loss-scale {first:g}"),
        Owned("fp16.loss_scale_window", window, f"--loss-scale-window {window}"),
        Owned("fp16.hysteresis", optimizer.hysteresis, f"--hysteresis {optimizer.hysteresis}"),
        Owned("fp16.min_loss_scale", least, f"--min-loss-scale {least:g}"),
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
            same_kind = isinstance(value, bool) == isinstance(setting.value, bool)
            if value != setting.value or not same_kind:
                yield setting, value


def not_passed(settings: dict[str, Any], ours: list[Owned]) -> Iterator[tuple[str, str]]:
    """(key, what to do) of each setting that is neither passed on nor follows from flags."""
    known = {setting.path for setting in ours}
    for key, value in settings.items():
        inner = PASSED.get(key)
        if key in PASSED and (inner is None or not isinstance(value, dict)):
            continue
        prefix = f"{key}."
        if isinstance(value, dict) and (inner or any(path.startswith(prefix) for path in known)):
            names = {path.removeprefix(prefix) for path in known if path.startswith(prefix)}
            for name in value:
                if name not in names.union(inner or ()):
                    path = prefix + name
                    yield path, REFUSED.get(path, "leave it out: no flag has it, and it is not run")
        elif key not in known:
            yield key, REFUSED.get(key, "leave it out: no flag has it, and it is not run")


def zero_problems(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do) with the section of ZeRO."""
    section = settings.get(ZERO)
    stage = stage_of(settings)
    if stage not in (1, 2, 3):
        fix = f'"{ZERO}": {{"stage": 1}}, or 2 or 3; without ZeRO, leave out --deepspeed'
        yield f"{ZERO}.stage is {stage}", fix
        return
    for name in ("offload_optimizer", "offload_param"):
        offload = section.get(name, {})
        path = f"{ZERO}.{name}"
        if not isinstance(offload, dict) or offload.get("device") not in (None, "none", "cpu"):
            shown = offload.get("device") if isinstance(offload, dict) else offload
            yield f"{path}: {shown}", '{"device": "cpu"}: the state must be in memory to be saved'
            continue
        for key in offload:
            if key not in OFFLOAD:
                yield f"{path}.{key}", f"leave it out: only {' and '.join(OFFLOAD)} are passed on"
    if stage < 3 and offloads(settings, "offload_param"):
        yield f"{ZERO}.offload_param with stage {stage}", "stage 3, which shards weights"


def stage_of(settings: dict[str, Any]) -> int | None:
    """Stage of ZeRO; None where the file has none."""
    section = settings.get(ZERO)
    return section.get("stage") if isinstance(section, dict) else None


def offloads(settings: dict[str, Any], name: str = "offload_optimizer") -> bool:
    """Whether optimizer states (or, with "offload_param", weights) are kept on the CPU."""
    return settings.get(ZERO, {}).get(name, {}).get("device") == "cpu"


def for_engine(settings: dict[str, Any], ours: list[Owned]) -> dict[str, Any]:
    """What DeepSpeed is given: the file's settings, those of the flags, and sums of gradients in
    fp32 unless the file says otherwise."""
    given = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    for key, value in settings.items():
        if key in PASSED:
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

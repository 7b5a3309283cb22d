"""Rules of --deepspeed: what it needs, what it cannot do, and that its file and the flags agree.

Imports no torch.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from megalite.config.rules.finding import Finding, Rule, data_parallel_size, global_batch
from megalite.config.run import RunConfig, options, to_flat
from megalite.deepspeed import settings
from megalite.optim.treatment import parse_group
from megalite.parallel.config import OF_DATA_RANKS

OFF = "train without DeepSpeed"
NOT_WITH_DEEPSPEED = {
    "log_params_norm": "DeepSpeed has no such number",
    "log_num_zeros_in_grad": "DeepSpeed does not hand out gradients",
    "log_norms_per_layer": "DeepSpeed does not hand out gradients",
    "skip_grad_norm_above": "DeepSpeed gives the norm after it has changed the weights",
    "log_communication": "the calls of DeepSpeed are not counted",
}
"""Flags that DeepSpeed cannot follow, and why."""


def deepspeed_is_there(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """--deepspeed needs a file, and the library."""
    d = config.deepspeed
    if not d.deepspeed:
        return
    if d.deepspeed_config is None:
        yield Finding(
            "--deepspeed needs --deepspeed-config",
            "--deepspeed-config ds.json, as in examples/deepspeed",
            {"deepspeed": False},
        )
    if find_spec("deepspeed") is None:
        message = "--deepspeed needs the library deepspeed"
        yield Finding(message, "pip install 'megalite[deepspeed]'", OFF)


def deepspeed_is_alone(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """No pipeline, and no other sharding, beside --deepspeed."""
    if not config.deepspeed.deepspeed:
        return
    p = config.parallel
    stages = p.pipeline_model_parallel_size
    if stages > 1:
        yield Finding(
            f"--pp {stages} does not work with --deepspeed: its engine runs pipelines of its own "
            "modules only, and takes every backward for one of a whole model",
            {"pipeline_model_parallel_size": 1},
            OFF,
        )
    for key in OF_DATA_RANKS:
        value = getattr(p, key)
        if value:
            shown = options()[key].setting(value)
            message = f"{shown} does not work with --deepspeed, which shards as its own file says"
            yield Finding(message, {key: options()[key].default}, OFF)


def deepspeed_has_precision(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """fp32, bf16, and on GPUs fp16."""
    if not config.deepspeed.deepspeed:
        return
    precision = config.optimizer.chosen_precision
    if precision == "fp64":
        yield Finding(
            "--precision fp64 does not work with --deepspeed, which updates weights in fp32",
            {"precision": "fp32"},
            OFF,
        )
    if precision == "fp16" and config.parallel.device == "cpu":
        flag = "--fp16" if config.optimizer.fp16 else "--precision fp16"
        other = flag.replace("fp16", "bf16")
        yield Finding(
            f"{flag} does not work with --deepspeed on --device cpu: DeepSpeed has fp16 on GPUs "
            "only",
            f"{other} in place of {flag}",
            {"device": "cuda"},
            also=("fp16",),
        )


def deepspeed_has_gradients(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """What needs the gradients, or another optimizer of torch's than one for flat weights."""
    if not config.deepspeed.deepspeed:
        return
    flat = to_flat(config)
    for key, reason in NOT_WITH_DEEPSPEED.items():
        default = options()[key].default
        if flat[key] != default:
            shown = options()[key].setting(flat[key])
            message = f"{shown} does not work with --deepspeed: {reason}"
            yield Finding(message, {key: default}, OFF)
    o = config.optimizer
    if o.optimizer == "muon":
        message = "--optimizer muon does not work with --deepspeed: it needs whole matrices"
        yield Finding(message, {"optimizer": "adam"}, OFF)
    if o.optimizer_backend == "apex":
        message = "--optimizer-backend apex does not work with --deepspeed, which takes torch's"
        yield Finding(message, {"optimizer_backend": "torch"}, OFF)
    for text in o.parameter_groups or ():
        with suppress(ValueError):  # another rule reports a text that cannot be read
            if parse_group(text).frozen:
                yield Finding(
                    f"--parameter-groups '{text}' freezes, which does not work with --deepspeed",
                    {"parameter_groups": None},
                    OFF,
                )


def _owned(config: RunConfig, world_size: int) -> list[settings.Owned]:
    """DeepSpeed's settings that follow from flags."""
    return settings.owned(
        config.optimizer,
        config.data.micro_batch_size,
        global_batch(config, world_size),
        data_parallel_size(config, world_size),
    )


def deepspeed_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given, of a sound configuration."""
    document = settings.read(config.deepspeed.deepspeed_config)
    return settings.for_engine(document, _owned(config, world_size))


def deepspeed_agrees(config: RunConfig, world_size: int) -> Iterator[Finding]:
    """The file can be read, says only what is passed on, and does not contradict the flags."""
    d = config.deepspeed
    if not d.deepspeed or d.deepspeed_config is None:
        return
    path = d.deepspeed_config
    given = f"--deepspeed-config {path}"
    try:
        document = settings.read(path)
    except settings.SettingsError as error:
        yield Finding(f"--deepspeed-config {error}", "a JSON file as in examples/deepspeed", OFF)
        return
    ours = _owned(config, world_size)
    for setting, value in settings.contradictions(document, ours):
        yield _contradiction(path, setting, value)
    for key, value, kind in settings.wrong_values(document):
        message = f'{given}: "{key}": {json.dumps(value)} must be {kind}'
        yield Finding(message, "change it, or leave it out")
    for key, advice in settings.not_passed(document, ours):
        yield Finding(f'{given}: "{key}" is not passed to DeepSpeed', advice)
    for problem, advice in settings.zero_problems(document):
        yield Finding(f"{given}: {problem}", advice)
    sharded = settings.stage_of(document) == 3
    interval = config.training.check_replicas
    if sharded and interval and config.parallel.tensor_model_parallel_size == 1:
        yield Finding(
            f"--check-replicas {interval} has no effect at ZeRO stage 3 with --tp 1: no two ranks "
            "hold the same",
            {"check_replicas": None},
        )


def _contradiction(path: str, setting: settings.Owned, value: Any) -> Finding:
    """A value of the file that is not what the flags make it."""
    shown = f'{path} says "{setting.path}": {json.dumps(value)}'
    fixes = [f'{settings.as_json(setting.path, setting.value)} or "auto" in {path}']
    message = f"{shown}, but the flags say {setting.flags}"
    if not setting.kind.accepts(value):
        message = f"{shown}, which must be {setting.kind.text}"
        if isinstance(value, str):
            message += " without quotation marks"
    elif isinstance(setting.value, bool) and "." not in setting.path:
        message = f"{shown}, but {setting.flags} needs {json.dumps(setting.value)}"
    elif change := setting.change(value):
        fixes.append(change)
    return Finding(message, *fixes, also=("deepspeed_config",))


DEEPSPEED_RULES: tuple[Rule, ...] = (
    deepspeed_is_there,
    deepspeed_is_alone,
    deepspeed_has_precision,
    deepspeed_has_gradients,
)
DEEPSPEED_FILE_RULES: tuple[Rule, ...] = (deepspeed_agrees,)

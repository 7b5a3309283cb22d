"""Reads flags, those of a run and those of a program's own. Imports no torch.

Flags and YAML files are read by the same options, so that all problems of both are reported
together and in the same words.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from megalite.config.options import Option, nearest, options_of
from megalite.config.problem import Problem

FP32_STATES = "leave it out: master weights, gradients and states are fp32"
ONE_FORMAT = "leave it out: there is one format, and every layout reads it"
OWN_SHARDS = "leave it out: every rank writes its own shards, and reads the boxes that it needs"
ALL_TENSORS = "leave it out: every tensor of the model must be stored, with its shape"
ONE_WRITER = "leave it out: --async-save writes with one thread of each rank"
LOCAL_COPIES = "--save-interval and --keep-last: there are no checkpoints on local disks"
CONVERTED = "tools/convert_checkpoint.py converts checkpoints"
DUMPS = "tools/verify_layouts.py records activations and gradients"
OVERLAPS = "leave it out: messages between stages always overlap with computation"
DIVIDED_BACKWARD = "--pipeline-schedule zb-h1 or zb-v: they compute weight gradients apart"
CHECKPOINTS_ELSEWHERE = {
    "--persistent-save-interval": "--save-interval",
    **dict.fromkeys(
        (
            "--ckpt-format",
            "--auto-detect-ckpt-format",
            "--use-dist-ckpt",
            "--dist-ckpt-format",
            "--dist-ckpt-save-pre-mcore-014",
        ),
        ONE_FORMAT,
    ),
    **dict.fromkeys(
        (
            "--ckpt-fully-parallel-save",
            "--no-ckpt-fully-parallel-save",
            "--ckpt-fully-parallel-load",
            "--ckpt-fully-parallel-load-exchange-algo",
            "--ckpt-fully-parallel-save-process-group",
            "--ckpt-fully-parallel-load-process-group",
            "--ckpt-assume-constant-structure",
            "--dist-ckpt-optim-fully-reshardable",
            "--distrib-optim-fully-reshardable-mem-efficient",
        ),
        OWN_SHARDS,
    ),
    **dict.fromkeys(
        (
            "--dist-ckpt-strictness",
            "--no-strict-fsdp-dtensor-load",
            "--no-ckpt-load-validate-sharding-integrity",
        ),
        ALL_TENSORS,
    ),
    **dict.fromkeys(
        (
            "--use-persistent-ckpt-worker",
            "--async-strategy",
            "--async-ckpt-cpu-priority",
            "--async-ckpt-io-priority",
            "--async-ckpt-use-cpu-shm",
            "--dist-ckpt-workers",
        ),
        ONE_WRITER,
    ),
    **dict.fromkeys(
        (
            "--non-persistent-save-interval",
            "--non-persistent-ckpt-type",
            "--non-persistent-global-ckpt-dir",
            "--non-persistent-local-ckpt-dir",
            "--non-persistent-local-ckpt-algo",
            "--replication",
            "--replication-jump",
            "--replication-factor",
        ),
        LOCAL_COPIES,
    ),
    **dict.fromkeys(
        (
            "--ckpt-convert-format",
            "--ckpt-convert-save",
            "--ckpt-convert-update-legacy-dist-opt-format",
        ),
        CONVERTED,
    ),
    **dict.fromkeys(
        (
            "--save-params-interval",
            "--save-activations-interval",
            "--save-wgrads-interval",
            "--save-dgrads-interval",
        ),
        DUMPS,
    ),
    "--override-ckpt-iteration": "leave it out: a run goes on where its checkpoint is",
    "--use-mp-args-from-checkpoint-args": (
        "--tp and --pp of this run: every layout reads every checkpoint"
    ),
    "--no-use-tokenizer-model-from-checkpoint-args": (
        "--tokenizer-model: what is given wins over --use-checkpoint-args"
    ),
    "--load-main-params-from-ckpt": (
        "leave it out: fp32 master weights are read wherever they are stored"
    ),
    "--no-initialization": "leave it out: what is loaded replaces the initial weights",
    "--log-progress": "--metrics-file FILE",
    "--verify-integrity": "--verify-checkpoint on, as it is by default",
    "--checkpoint-activations": "--recompute-granularity full",
}
"""Of those for checkpoints."""
ELSEWHERE = {
    **CHECKPOINTS_ELSEWHERE,
    "--group-query-attention": "leave it out: --num-query-groups alone turns grouped queries on",
    "--accumulate-allreduce-grads-in-fp32": "leave it out: gradients are always summed in fp32",
    "--ddp-average-in-collective": (
        "leave it out: the loss is a mean over the global batch, so gradients are summed"
    ),
    "--override-opt-param-scheduler": "leave it out: the flags count",
    "--use-checkpoint-opt-param-scheduler": "--config with the checkpoint's config.yaml",
    "--check-for-nan-in-loss-and-grad": "leave it out: every step is checked",
    "--no-check-for-nan-in-loss-and-grad": (
        "--max-bad-steps N skips bad steps: every step is checked"
    ),
    "--check-for-spiky-loss": (
        "--skip-grad-norm-above K --max-bad-steps N: the gradient norm is judged, not the loss"
    ),
    "--iterations-to-skip": (
        "--max-bad-steps N skips steps whose loss or gradient is bad, none by its number"
    ),
    "--decrease-batch-size-if-needed": (
        "leave it out: each size of --rampup-batch-size must fit the data-parallel size"
    ),
    "--grad-reduce-in-bf16": "leave it out: gradients are always summed in fp32",
    "--use-precision-aware-optimizer": FP32_STATES,
    "--main-params-dtype": FP32_STATES,
    "--main-grads-dtype": FP32_STATES,
    "--exp-avg-dtype": FP32_STATES,
    "--exp-avg-sq-dtype": FP32_STATES,
    "--optimizer-cpu-offload": (
        "--deepspeed, with offload_optimizer in the file of --deepspeed-config"
    ),
    "--use-torch-fsdp2": "--deepspeed, with stage 3 in the file of --deepspeed-config",
    "--ddp-num-buckets": "--ddp-bucket-size, the parameters of one bucket",
    "--ddp-pad-buckets-for-high-nccl-busbw": "leave it out: the bucket size is --ddp-bucket-size",
    "--overlap-param-gather-with-optimizer-step": (
        "--overlap-param-gather: the next forward hides the gather"
    ),
    "--apply-wd-to-qk-layernorm": (
        "--parameter-groups 'layers.*.attention.*_norm.* weight_decay=NUMBER'"
    ),
    "--use-rope-scaling": "--rope-scaling llama3",
    "--use-rotary-position-embeddings": "--position-embedding-type rope",
    "--rotary-percent": "leave it out: every component of a head is rotated",
    "--rotary-interleaved": "leave it out: component i is rotated with i + d/2, as in Llama",
    "--qk-l2-norm": "--qk-layernorm --normalization RMSNorm, whose weights are trained",
    "--muon-no-split-qkv": (
        "leave it out: queries, keys and values are always matrices of their own"
    ),
    "--muon-tp-mode": "leave it out: a matrix is always orthogonalized as a whole",
    "--muon-fp32-matmul-prec": "leave it out: the products are in fp32",
    "--muon-scalar-optimizer": "leave it out: what Muon does not update, AdamW does",
    "--muon-use-nesterov": "--muon-nesterov",
    "--wandb-save-dir": "leave it out, and set WANDB_DIR",
    "--profile-step-start": "--profile FIRST-LAST",
    "--profile-step-end": "--profile FIRST-LAST",
    "--bert-no-binary-head": "--bert-pair none",
    "--apply-residual-connection-post-layernorm": (
        "--norm-placement post: that form itself is not supported"
    ),
    "--test-data-path": "leave it out: nothing evaluates a test split yet",
    "--pipeline-model-parallel-layout": (
        "--pipeline-split N,N,...: the first stage has the embedding, the last the output layer"
    ),
    "--virtual-pipeline-model-parallel-size": "--num-virtual-stages-per-pipeline-rank",
    "--no-overlap-p2p-communication": OVERLAPS,
    "--overlap-p2p-communication-warmup-flush": OVERLAPS,
    "--defer-embedding-wgrad-compute": DIVIDED_BACKWARD,
    "--delay-wgrad-compute": DIVIDED_BACKWARD,
    "--context-parallel-size": (
        "--sequence-parallel and --recompute-granularity: context parallelism is not supported yet"
    ),
}
"""Flags of Megatron-LM that have no counterpart of a similar name here, with hyphens, and what to
do instead."""


def read_flags(argv: list[str], options: Iterable[Option]) -> tuple[dict[str, Any], list[Problem]]:
    """(values by key, problems) of a command line.

    `--flag value` or `--flag=value`; hyphens or underscores; the last of several wins; a value may
    not start with two dashes unless joined by `=`.
    """
    known = {}
    positional = []
    for option in options:
        if option.field.positional:
            positional.append(option)
        else:
            known |= {flag: (option, on) for flag, on in option.switches.items()}
    values = {}
    problems = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, joined, text = token.partition("=")
        flag = name.replace("_", "-")
        option, on = known.get(flag, (None, None))
        # A switch.
        if on is not None:
            values[option.key] = on
            if joined:
                fix = " or ".join(option.switches)
                problems.append(Problem(f"{token}: {flag} takes no value", fix))
            continue
        # The words of a value, or a word that nothing explains.
        if option is not None:
            words = [text] if joined else _take_words(option, rest)
        elif positional and not token.startswith("--"):
            option = positional.pop(0)
            name = option.key.upper()
            words = _take_words(option, rest, [token])
        else:
            problems.append(_unknown(token, flag, known))
            if flag.startswith("-") and not joined and rest and rest[0][:1] != "-":
                rest.pop(0)  # the unknown flag's value; one problem is enough
            continue
        # The value that they mean.
        try:
            values[option.key] = option.from_words(words)
        except (ValueError, IndexError):
            expected = option.expected.replace("null", "unset")
            message = f"{name}: {' '.join(words)!r} is not {expected}"
            if not words:
                message = f"{name} needs a value: {expected}"
            problems.append(Problem(message, f"for example {name} {option.example}", (option.key,)))
    return values, problems


def _take_words(option: Option, rest: list[str], first: Sequence[str] = ()) -> list[str]:
    """The words of a value, taken from `rest` after those in `first`: one, or all up to the next
    flag for an option of several."""
    words = list(first)
    while rest and not rest[0].startswith("--") and (option.kind is tuple or not words):
        words.append(rest.pop(0))
    return words


def _unknown(token: str, flag: str, known: Iterable[str]) -> Problem:
    """What is wrong with a token that is neither a flag nor a flag's value."""
    if not flag.startswith("-"):
        message = f"unexpected {token!r}: values follow a flag, and switches take none"
        return Problem(message, "remove it")
    fix = ELSEWHERE.get(flag)
    if fix is None and flag.replace("--no-", "--", 1) in known:
        fix = f"leave out {flag.replace('--no-', '--', 1)}, which is no switch"
    fix = fix or nearest(flag, known)
    return Problem(f"unknown flag {flag}", fix or "remove it (--help lists the flags)")


def read_own_flags(
    kind: type, argv: list[str], others: Iterable[Option] = (), given: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any], list[Problem]]:
    """(values of the fields of the dataclass `kind`, values of the other options, problems) of a
    command line.

    given: values that the command line may leave out or replace. A value out of range, or missing
    where there is no default, is a problem.
    """
    own = options_of(kind)
    values, problems = read_flags(argv, [*others, *own.values()])
    refused = {key for problem in problems for key in problem.keys}
    taken = dict(given or {})
    for key, option in own.items():
        if key in values:
            taken[key] = values.pop(key)
        elif option.default is dataclasses.MISSING and key not in (*taken, *refused):
            name = key.upper() if option.field.positional else option.flag
            fix = option.example if option.field.positional else f"{name} {option.example}"
            problems.append(Problem(f"{name} is missing", fix, (key,)))
        problem = option.problem_with(taken.get(key))
        if problem is not None:
            problems.append(problem)
    return taken, values, problems

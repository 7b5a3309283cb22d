"""Compare one training step of a layout with the same step of a reference layout, tensor by tensor.

A laptop:      python tools/verify_layouts.py --config my.yaml --shrink --ranks 8
By flags:      python tools/verify_layouts.py --shrink --tp 2 --pp 2 --sp --ranks 8 --vocab-size 512
A SLURM job:   srun python tools/verify_layouts.py --config my.yaml --work-folder SHARED

Takes the flags of pretrain_gpt.py, or with --architecture bert (or its preset) those of
pretrain_bert.py, and:
  --ranks N                  ranks of the layout, started here unless a launcher has; else tp x pp
  --shrink                   fewer and narrower layers, same structure and layout
  --reference-tp|pp|dp N     the layout to compare with; else one process
  --work-folder FOLDER       where ranks write what they computed; else a temporary folder
The data is synthetic unless --data-path is given here. Optimizer and checkpoint flags have no
effect.

Exit status: 0 the numbers are equal up to rounding, 1 they differ, 2 problems: of the
configuration, or of a rank.
"""

import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

from megalite.config import cli
from megalite.config.problem import ConfigError
from megalite.config.run import RunConfig
from megalite.parallel.launch import LaunchInfo
from megalite.pipeline.schedules import pipeline_of
from megalite.verify.plan import Plan, VerifyOptions, plan


def main() -> int:
    """Read and check the configuration, and only then load torch and compare."""
    cli.show_help(sys.argv, __doc__, {"comparison": VerifyOptions} | cli.run_groups())
    launch = cli.detect_launch_or_exit()
    try:
        planned = plan(sys.argv[1:], launch)
    except ConfigError as error:
        cli.refuse(error.problems, quiet=launch.rank != 0)
    if planned.folder is not None:
        return verify(planned, launch, Path(planned.folder))
    with tempfile.TemporaryDirectory(prefix="megalite-verify-") as folder:
        return verify(planned, launch, Path(folder))


def verify(planned: Plan, launch: LaunchInfo, folder: Path) -> int:
    """Run both layouts, print the report, and return the exit status.

    Under a launcher, ranks other than the first only record their part of the chosen layout.
    """
    from megalite.training.failures import explain
    from megalite.verify.compare import Rounding, compare, report
    from megalite.verify.record import discard_record, record, record_on_ranks

    chosen = folder / "chosen"
    reference = folder / "reference"
    model = planned.chosen.model
    tokens = planned.chosen.data.global_batch_size * model.seq_length
    rounding = Rounding(model, planned.chosen.optimizer.precision, tokens)
    try:
        # Each rank removes what an earlier run left in its place.
        for record_folder in (chosen, reference):
            record_folder.mkdir(parents=True, exist_ok=True)
            discard_record(record_folder, launch.rank)
        planned = on_one_kind_of_device(planned, launch)
        # The chosen layout: on the ranks of the launcher, or on ranks started here.
        if launch.source == "none":
            record_on_ranks(planned.chosen, planned.ranks, chosen)
        else:
            record(launch, planned.chosen, chosen)
        if launch.rank != 0:
            return 0
        # The reference layout, always on ranks started here.
        record_on_ranks(planned.reference, planned.reference_ranks, reference)
        found = compare(
            reference, planned.reference_ranks, chosen, ranks=planned.ranks, rounding=rounding
        )
    except BrokenPipeError:
        raise
    except Exception as error:  # never status 1, which says that numbers differ
        print(f"error: {explain(error) or traceback.format_exc()}", file=sys.stderr)
        return 2
    print(heading(planned), report(found), found.verdict, sep="\n\n")
    return 0 if found.first is None else 1


def on_one_kind_of_device(planned: Plan, launch: LaunchInfo) -> Plan:
    """Both layouts on GPUs if there are enough for the larger one, else both on the CPU: only then
    do they compare.

    Raises DeviceError when the requested device is not available.
    """
    from megalite.parallel.context import choose_device

    local = planned.ranks if launch.source == "none" else launch.local_world_size
    largest = replace(launch, local_rank=0, local_world_size=max(local, planned.reference_ranks))
    device, _ = choose_device(planned.chosen.parallel.device, largest)
    changed = {}
    for name in ("chosen", "reference"):
        config = getattr(planned, name)
        parallel = replace(config.parallel, device=device.type)
        changed[name] = replace(config, parallel=parallel)
    return replace(planned, **changed)


def heading(planned: Plan) -> str:
    """Layouts, model and data of the comparison."""
    config = planned.chosen
    model = config.model
    data = config.data
    source = " ".join(data.data_path or ()) or "synthetic (real data with --data-path)"
    packed = ""
    if data.reset_position_ids:
        packed += ", positions from 0 in each document"
    if data.reset_attention_mask:
        packed += ", attention within documents"
    return (
        f"chosen:    {layout(config, planned.ranks)}\n"
        f"reference: {layout(planned.reference, planned.reference_ranks)}\n"
        f"model:     {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads in {model.query_groups} groups, MLP {model.ffn}, "
        f"vocabulary {model.vocab_size}, {config.optimizer.precision}, "
        f"dropout {model.attention_dropout:g} and {model.hidden_dropout:g}\n"
        f"data:      {source}, {data.global_batch_size} samples of {model.seq_length} tokens, "
        f"{data.micro_batch_size} a microbatch{packed}"
    )


def layout(config: RunConfig, ranks: int) -> str:
    """`dp=2 x tp=2 x pp=2 on 8 ranks, sequence parallel, 1f1b`."""
    parallel = config.parallel
    tensor = parallel.tensor_model_parallel_size
    stages = parallel.pipeline_model_parallel_size
    replicas = ranks // (tensor * stages)
    words = [f"dp={replicas} x tp={tensor} x pp={stages} on {ranks} rank(s), {parallel.device}"]
    if parallel.sequence_parallel:
        words.append("sequence parallel")
    if stages > 1:
        chunks = pipeline_of(parallel).chunks
        several = f" with {chunks} stages a rank" if chunks > 1 else ""
        words.append(parallel.schedule + several)
    if config.recompute.granularity != "none":
        words.append(f"recompute {config.recompute.granularity}")
    return ", ".join(words)

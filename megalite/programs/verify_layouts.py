"""Are the numbers of a layout right? One training step in it and in a reference layout, compared place by place.

A laptop:      python tools/verify_layouts.py --config my.yaml --shrink --ranks 8
By flags:      python tools/verify_layouts.py --shrink --tp 2 --pp 2 --sp --ranks 8 --vocab-size 512
A SLURM job:   srun python tools/verify_layouts.py --config my.yaml --work-folder SHARED

Takes what pretrain_gpt.py takes, or with --architecture bert (or its preset) what pretrain_bert.py takes, and:
  --ranks N                  ranks of the layout, started here unless a launcher has; else tp x pp
  --shrink                   fewer and narrower layers, same structure and layout
  --reference-tp|pp|dp N     the layout to compare with; else one process
  --work-folder FOLDER       where ranks leave what they computed; else a temporary folder
The data is made up unless --data-path is given here. Optimizer and checkpoint flags change nothing.

Exit status: 0 the numbers are the same to rounding, 1 they differ, 2 problems: of the configuration, or of a rank.
"""

import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

from megalite.config import cli
from megalite.config.run import ConfigError, Problem
from megalite.parallel.launch import LaunchInfo, detect
from megalite.verify.plan import Plan, plan


def main() -> int:
    """Read and check the configuration, and only then load torch and compare."""
    if "-h" in sys.argv or "--help" in sys.argv:
        cli.show_help(__doc__)
    try:
        launch = detect(os.environ)
    except ValueError as error:
        cli.refuse(
            [
                Problem(
                    str(error), "start with torchrun or srun, or with none of their variables set"
                )
            ]
        )
    try:
        planned = plan(sys.argv[1:], launch)
    except ConfigError as error:
        cli.refuse(error.problems, quiet=launch.rank != 0)
    if planned.folder is not None:
        return verify(planned, launch, Path(planned.folder))
    with tempfile.TemporaryDirectory(prefix="megalite-verify-") as folder:
        return verify(planned, launch, Path(folder))


def verify(planned: Plan, launch: LaunchInfo, folder: Path) -> int:
    """Run both layouts and print the report; the exit status. Under a launcher all ranks but the first only record."""
    from megalite.training.failures import explain
    from megalite.verify.compare import Rounding, compare, report
    from megalite.verify.record import RanksFailed, discard_record, record, record_on_ranks

    chosen, reference = (folder / name for name in ("chosen", "reference"))
    model, data = planned.chosen.model, planned.chosen.data
    rounding = Rounding(
        model, planned.chosen.optimizer.precision, data.global_batch_size * model.seq_length
    )
    try:
        for place in (chosen, reference):
            place.mkdir(parents=True, exist_ok=True)
            discard_record(place, launch.rank)
        planned = on_one_kind_of_device(planned, launch)
        if launch.source != "none":
            record(launch, planned.chosen, chosen)
            if launch.rank != 0:
                return 0
        else:
            for rank in range(planned.ranks):
                discard_record(chosen, rank)
            record_on_ranks(planned.chosen, planned.ranks, chosen)
        for rank in range(planned.reference_ranks):
            discard_record(reference, rank)
        record_on_ranks(planned.reference, planned.reference_ranks, reference)
        found = compare(reference, planned.reference_ranks, chosen, planned.ranks, rounding)
    except Exception as error:  # never status 1, which says that numbers differ
        explanation = (
            str(error)
            if isinstance(error, RanksFailed)
            else explain(error) or traceback.format_exc()
        )
        print(f"verify_layouts.py: {explanation}", file=sys.stderr)
        return 2
    print(heading(planned), report(found), found.verdict, sep="\n\n")
    return 0 if found.first is None else 1


def on_one_kind_of_device(planned: Plan, launch: LaunchInfo) -> Plan:
    """Both layouts on GPUs if there are enough for the larger one, else both on the CPU: only then do they compare.

    Raises DeviceError when the device asked for cannot be had.
    """
    from megalite.parallel.context import choose_device

    local = launch.local_world_size if launch.source != "none" else planned.ranks
    largest = replace(launch, local_rank=0, local_world_size=max(local, planned.reference_ranks))
    device, _ = choose_device(planned.chosen.parallel.device, largest)
    configs = [
        replace(config, parallel=replace(config.parallel, device=device.type))
        for config in (planned.chosen, planned.reference)
    ]
    return replace(planned, chosen=configs[0], reference=configs[1])


def heading(planned: Plan) -> str:
    """What is compared, in words."""
    c, m = planned.chosen, planned.chosen.model
    dropout = f"dropout {m.attention_dropout:g} and {m.hidden_dropout:g}"
    return "\n".join(
        (
            f"chosen:    {layout(c, planned.ranks)}",
            f"reference: {layout(planned.reference, planned.reference_ranks)}",
            f"model:     {m.num_layers} layers, hidden {m.hidden_size}, {m.num_attention_heads} heads in "
            f"{m.query_groups} groups, MLP {m.ffn}, vocabulary {m.vocab_size}, {c.optimizer.precision}, {dropout}",
            f"data:      {' '.join(c.data.data_path or ()) or 'made up (real data with --data-path)'}, "
            f"{c.data.global_batch_size} samples of {m.seq_length} tokens, "
            f"{c.data.micro_batch_size} a microbatch"
            + (", positions from 0 in each document" if c.data.reset_position_ids else "")
            + (", attention within documents" if c.data.reset_attention_mask else ""),
        )
    )


def layout(config, ranks: int) -> str:
    """`dp=2 x tp=2 x pp=2 on 8 ranks, sequence parallel, 1f1b`."""
    p = config.parallel
    t, stages = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    words = [f"dp={ranks // (t * stages)} x tp={t} x pp={stages} on {ranks} rank(s), {p.device}"]
    words += ["sequence parallel"] if p.sequence_parallel else []
    words += [p.pipeline_schedule] if stages > 1 else []
    words += (
        [f"recompute {config.recompute.granularity}"]
        if config.recompute.granularity != "none"
        else []
    )
    return ", ".join(words)

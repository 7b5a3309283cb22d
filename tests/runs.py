"""Small runs of the whole program, and what can be seen of them: lines, files, memory, order,
exits."""

import io
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megalite.checkpoint.folder import CheckpointError, list_iterations
from megalite.checkpoint.load import Checkpoint
from megalite.config import cli, validate
from megalite.config.run import RunConfig, from_flat, options, to_flat
from megalite.config.summary import summary_lines
from megalite.config.yaml_file import to_yaml
from megalite.data.batch_sizes import BatchSizes
from megalite.data.indexed import DatasetInfo
from megalite.data.loader import GPTLoader
from megalite.data.tokenizers import build_tokenizer, train_sentencepiece
from megalite.optim.bad_steps import BadSteps
from megalite.optim.loss_scale import LossScale
from megalite.parallel.collectives import all_reduce
from megalite.parallel.context import DeviceError
from megalite.parallel.launch import LaunchInfo
from megalite.preprocess.config import PreprocessConfig
from megalite.preprocess.indexed_writer import IndexedWriter
from megalite.preprocess.run import preprocess
from megalite.training.batches import GlobalBatches, build_batches
from megalite.training.build import build_components, build_context, build_model
from megalite.training.pretrain import pretrain
from tests.data.tokenizer_files import make_files
from tests.pool import RankPool, RanksFailed
from tests.trouble import troubled
from tests.wandb_files import wandb_records

ALONE = LaunchInfo()


@dataclass(frozen=True)
class Run:
    """A run as its user sees it afterwards."""

    console: str
    """What was printed, without the configuration and without times."""
    folder: Path

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.console.splitlines()]

    @cached_property
    def metrics(self) -> list[dict]:
        """Lines of the metrics file; times only as the number of tokens that they stand for."""
        path = self.folder / "metrics.jsonl"
        entries = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        for entry in entries:
            if "loss" in entry:
                entry["tokens"] = round(entry.pop("tokens_per_second") * entry["step_seconds"])
                for name in [name for name in entry if name.endswith("_seconds")]:
                    entry.pop(name)
        return entries

    @cached_property
    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()
        }

    def column(self, name: str) -> list:
        """The values of one quantity, in the order of the metrics file."""
        return [entry[name] for entry in self.metrics if name in entry]

    @property
    def losses(self) -> list[float]:
        return self.column("loss")

    @property
    def iterations(self) -> list[int]:
        """The iterations that were trained."""
        return [entry["iteration"] for entry in self.metrics if "loss" in entry]

    @property
    def validated(self) -> list[int]:
        """The iterations with an evaluation."""
        return [entry["iteration"] for entry in self.metrics if "validation_loss" in entry]

    @property
    def saved(self) -> list[int]:
        return list_iterations(self.folder / "saved")

    @property
    def dtype(self) -> torch.dtype:
        """Of the saved weights."""
        return Checkpoint.open(self.folder / "saved").dtype("final_norm.weight")


TIMES = re.compile(r" \| [\d,]+ tokens/s.*| in [\d.]+ s$|, peak [a-zA-Z ]+[\d,]+ MiB", re.MULTILINE)


@contextmanager
def working_in(folder: Path):
    """Make a folder and stay in it."""
    before = os.getcwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def console_of(
    launch: LaunchInfo, config: RunConfig, folder: Path, build_model: Callable = build_model
) -> str:
    """Run the training of one rank in a folder; what it printed, without the configuration and
    without times."""
    with working_in(folder), redirect_stdout(io.StringIO()) as printed:
        pretrain(config, launch, build_model)
    summary = "".join(f"{line}\n" for line in summary_lines(config, launch.world_size))
    return TIMES.sub("", printed.getvalue().removeprefix(summary))


class Bench:
    """Makes observations, each once. Runs have folders of their own, beside ../bytes, ../pieces and
    ../trained."""

    def __init__(self, folder: Path, pool: RankPool):
        self.folder, self.pool = folder, pool
        self._made: dict[tuple, Any] = {}

    def observe(self, how: Callable, flags: dict, ranks: int) -> Any:
        """`how(bench, flags, ranks)`."""
        key = (how, ranks, *sorted(flags.items()))
        if key not in self._made:
            self._made[key] = how(self, flags, ranks)
        return self._made[key]

    def make_data(self) -> None:
        """Two corpora; the first as bytes and as pieces of two tokenizers, the other as bytes.
        Beside them the files of every kind of tokenizer, and numbers below 97 that any of them
        might have made."""
        draw = random.Random(1)
        words = ["".join(draw.choices("aeioulmnrst", k=draw.randint(2, 8))) for _ in range(120)]
        texts = {
            name: [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(60)]
            for name in ("a", "b")
        }
        for name, lines in texts.items():
            rows = [json.dumps({"text": line}) for line in lines]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows))
        for name, size in (("pieces", 300), ("more", 320)):
            (self.folder / f"{name}.model").write_bytes(train_sentencepiece(texts["a"], size))
        for name, source in (("bytes", "a"), ("other", "b"), ("pieces", "a"), ("more", "a")):
            model = self.folder / f"{name}.model"
            tokenizer = (
                ("SentencePieceTokenizer", str(model))
                if model.exists()
                else ("ByteTokenizer", None)
            )
            jsonl = (str(self.folder / f"{source}.jsonl"),)
            preprocess(
                PreprocessConfig(
                    jsonl, str(self.folder / name), *tokenizer, append_eod=True, workers=1
                )
            )
        bpe = build_tokenizer("GPT2BPETokenizer", **make_files(self.folder)["GPT2BPETokenizer"])
        merges = (self.folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        (self.folder / "other.txt").write_text("\n".join(merges[:-1]), encoding="utf-8")
        made = DatasetInfo("GPT2BPETokenizer", bpe.vocab_size, bpe.eod, bpe.sha256, 60, 6000)
        for name, info in (("plain", None), ("merged", made)):
            with IndexedWriter(str(self.folder / name), np.uint16) as writer:
                for number in range(60):
                    writer.add_document(np.arange(100, dtype=np.uint16) * number % 97)
                writer.finish(info)

    def make_damaged(self) -> None:
        """../trained, with the lowest bit of the first weight in its last checkpoint changed."""
        shutil.copytree(self.folder / "trained", self.folder / "damaged")
        file = self.folder / "damaged" / "iter_0000004" / "weights-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[8 + int.from_bytes(content[:8], "little")] ^= 1  # after length and header
        file.write_bytes(content)

    def new_folder(self) -> Path:
        """A folder for one run."""
        return self.folder / f"run-{len(self._made)}"


def sound(flags: dict, ranks: int, folder: Path) -> RunConfig:
    """The configuration as the main program makes it, with everything checked."""
    with working_in(folder):
        problems = validate.check(from_flat(flags), ranks)
        assert not problems, problems
        return validate.resolve(from_flat(flags), ranks)


def resolved(bench: Bench, flags: dict, ranks: int) -> dict:
    """Every field by its name, of the resolved configuration, which checkpoints record."""
    return to_flat(sound(flags, ranks, bench.new_folder()))


def training(bench: Bench, flags: dict, ranks: int) -> Run:
    """A run of the whole program."""
    folder = bench.new_folder()
    config = sound(flags, ranks, folder)
    if ranks == 1:
        return Run(console_of(ALONE, config, folder), folder)
    return Run(bench.pool.run(console_of, ranks, config, folder)[0], folder)


def deepspeed_summary(bench: Bench, flags: dict, ranks: int) -> str:
    """What a run says of DeepSpeed before it starts; tests/test_deepspeed.py is about the rest."""
    for stage in (2, 3):
        text = json.dumps({"zero_optimization": {"stage": stage}})
        (bench.folder / f"stage{stage}.json").write_text(text)
    folder = bench.new_folder()
    config = sound(flags, ranks, folder)
    with working_in(folder):
        lines = summary_lines(config, ranks)
    return "".join(line.split(maxsplit=1)[1] for line in lines if "DeepSpeed" in line)


def wandb_name(bench: Bench, flags: dict, ranks: int) -> str:
    """The name of a run as its offline records have it."""
    (record,) = training(bench, flags, ranks).folder.glob("wandb/offline-run-*/*.wandb")
    # A process of wandb's own writes the file, also after the run has ended.
    for _ in range(600):
        names = [r.run.display_name for r in wandb_records(record) if r.HasField("run")]
        if names:
            return names[0]
        time.sleep(0.1)
    raise AssertionError(f"{record} holds no run")


def kept_for_backward(bench: Bench, flags: dict, ranks: int) -> dict:
    """What one microbatch leaves in memory after its forward, and the gradient that comes of it."""
    config = sound(flags, ranks, bench.new_folder())
    context, _ = build_context(config, ALONE)
    parts = build_components(config, context)
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = (
        torch.arange(config.model.seq_length + 1).expand(config.data.global_batch_size, -1).numpy()
    )
    batches, weights = GlobalBatches(GPTLoader(rows, 1, 1, 0), parts.model, BatchSizes(1)).at(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        parts.engine.train_step(batches, weights)
    return {"bytes": sum(kept.values()), "gradient": parts.optimizer.gradients.flat.clone()}


def passes_of_rank(launch: LaunchInfo, config: RunConfig) -> str:
    """F and B in the order in which a rank's forwards and backwards, or parts of these, come."""
    context, _ = build_context(config, launch)
    parts = build_components(config, context)
    order = []
    timed = context.activity.timed

    def noted(phase: str):
        if phase in ("forward", "backward"):
            order.append(phase[0].upper())
        return timed(phase)

    context.activity.timed = noted
    rows = torch.zeros(
        config.data.global_batch_size, config.model.seq_length + 1, dtype=torch.int64
    ).numpy()
    parts.engine.train_step(*build_batches(config, rows, parts.model).at(0))
    return "".join(order)


def data_calls_of_rank(launch: LaunchInfo, config: RunConfig) -> str:
    """A step, and the forward and backward of a second: F and B as the first layer's forwards begin
    and backwards end; R as a reduction over the data ranks begins or is waited for, G a gather."""
    context, _ = build_context(config, launch)
    parts = build_components(config, context)
    layer = parts.model.stages[0].layers["0"]
    letters = {"all_reduce": "R", "all_to_all": "R", "all_gather": "G"}
    events = []
    waits = context.activity.waits

    def logged(call):
        if call.group == "data" and prod(call.shape) > 1:  # not the norm's, which is one number
            events.append(letters[call.kind])
        return waits(call)

    context.activity.waits = logged
    layer.register_forward_hook(lambda *_: events.append("F"))
    layer.attention_norm.weight.register_post_accumulate_grad_hook(lambda _: events.append("B"))
    rows = torch.zeros(
        config.data.global_batch_size, config.model.seq_length + 1, dtype=torch.int64
    ).numpy()
    data = build_batches(config, rows, parts.model)
    batch = data.at(0)
    events.clear()  # the number of tokens is summed as well
    parts.optimizer.gradients.zero()
    parts.engine.train_step(*batch)
    parts.optimizer.step(1)
    parts.engine.train_step(*batch)
    parts.optimizer.wait_for_parameters()
    return "".join(events)


def data_calls(bench: Bench, flags: dict, ranks: int) -> str:
    """The order of computation and of communication over the data ranks, on rank 0."""
    return bench.pool.run(data_calls_of_rank, ranks, sound(flags, ranks, bench.new_folder()))[0]


def loss_scales(bench: Bench, flags: dict, ranks: int) -> list[float]:
    """The loss scale after each of ten steps, of which the first four overflow."""
    scale = LossScale.from_config(sound(flags, ranks, bench.new_folder()).optimizer)
    scales = []
    for step in range(10):
        scale.update(overflowed=step < 4)
        scales.append(scale.value)
    return scales


def bad_steps(bench: Bench, flags: dict, ranks: int) -> str:
    """What happens to a good step, and to those after it without a finite gradient, until the run
    stops."""
    judge = BadSteps(sound(flags, ranks, bench.new_folder()).optimizer)
    happened = ["skip" if judge.judge(1.0) else "go"]
    while not judge.are_too_many:
        assert judge.judge(float("nan"))
        happened.append("stop" if judge.are_too_many else "skip")
    return " ".join(happened)


def outlying_steps(bench: Bench, flags: dict, ranks: int) -> str:
    """What happens to steps with 2 and 3 times the usual gradient norm, and to one with none that
    is finite."""
    judge = BadSteps(sound(flags, ranks, bench.new_folder()).optimizer)
    for _ in range(10):
        judge.judge(1.0)
    return " ".join("skip" if judge.judge(norm) else "go" for norm in (2.0, 3.0, float("inf")))


def order_of_passes(bench: Bench, flags: dict, ranks: int) -> list[str]:
    """Each rank's order of passes."""
    return bench.pool.run(passes_of_rank, ranks, sound(flags, ranks, bench.new_folder()))


def late_rank(launch: LaunchInfo, config: RunConfig, seconds: float) -> str:
    """Rank 1 comes late to an all-reduce: what the rank that waits for it is told."""
    context, _ = build_context(config, launch)
    total = torch.ones(1)
    all_reduce(total, context.world)
    if launch.rank == 1:
        time.sleep(seconds)
    try:
        all_reduce(total, context.world)
    except RuntimeError as error:
        return str(error)
    return f"total {total.item():g}"


def waiting_for_late_rank(bench: Bench, flags: dict, ranks: int) -> str:
    return bench.pool.run(late_rank, ranks, sound(flags, ranks, bench.new_folder()), 1.5)[0]


def with_a_slow_rank(launch: LaunchInfo, config: RunConfig, folder: Path) -> str:
    """Rank 1 takes a second or two for a forward of the second step."""
    os.chdir(folder)
    pretrain(config, launch, troubled("slow 1 2"))
    return "all ranks are done"


def waiting_for_slow_rank(bench: Bench, flags: dict, ranks: int) -> str:
    """What is said in the end, by the watchdog or by the ranks."""
    folder = bench.new_folder()
    try:
        return bench.pool.run(
            with_a_slow_rank, ranks, sound(flags | {"metrics_file": None}, ranks, folder), folder
        )[0]
    except RanksFailed as failed:
        return str(failed)


class Ended(BaseException):
    """In place of the end of the process."""


def signalled(bench: Bench, flags: dict, ranks: int) -> str:
    """A run that gets SIGUSR1 in its first forward: what it printed, or that it ended at once."""

    def build_signalling(*args):
        model = build_model(*args)
        model.stages[0].register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGUSR1))
        return model

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGUSR1, end)
    folder = bench.new_folder()
    try:
        return console_of(ALONE, sound(flags, ranks, folder), folder, build_signalling)
    except Ended:
        return "ended at once"
    finally:
        signal.signal(signal.SIGUSR1, before)


def refusal_or_start(bench: Bench, flags: dict, ranks: int) -> str:
    """What is said of the device: why the configuration is refused, by the checks or for this
    machine; else where it runs."""
    problems = validate.check(from_flat(flags), ranks)
    if problems:
        return "; ".join(problem.message for problem in problems)
    try:
        return build_context(sound(flags, ranks, bench.new_folder()), ALONE)[1]
    except DeviceError as error:
        return str(error)


def refusal_or_run(bench: Bench, flags: dict, ranks: int) -> str:
    """Why the checks refuse the configuration, else what the training prints."""
    with working_in(bench.new_folder()):
        problems = validate.check(from_flat(flags), ranks)
    return (
        "; ".join(p.message for p in problems)
        if problems
        else training(bench, flags, ranks).console
    )


def failure_or_run(bench: Bench, flags: dict, ranks: int) -> str:
    """Why a training does not start, else what it prints."""
    try:
        return training(bench, flags, ranks).console
    except CheckpointError as error:
        return str(error)


def complaints(bench: Bench, flags: dict, ranks: int) -> str:
    """What the checks say against the flags, in a folder as of a run."""
    with working_in(bench.new_folder()):
        return "; ".join(problem.message for problem in validate.check(from_flat(flags), ranks))


def of_the_preset(bench: Bench, flags: dict, ranks: int) -> dict:
    """Every field by its name, of a configuration that names the preset and nothing else."""
    return to_flat(from_flat({"preset": flags.get("preset")}))


def kept_state(bench: Bench, flags: dict, ranks: int) -> set[str]:
    """What a run saves beside weights: what the optimizer keeps, and random streams."""
    folder = training(bench, flags, ranks).folder / "saved"
    with Checkpoint.open(folder) as checkpoint:
        parts = [name.split(".")[1] for name in checkpoint.names if name.startswith("optimizer.")]
        streams = {"streams"} if checkpoint.private(0, 1) else set()
    return {*parts, *streams}


def of_the_command_line(bench: Bench, flags: dict, ranks: int) -> dict:
    """Every field by its name, as the program reads it from the flags for checkpoints alone."""
    section = {key: value for key, value in flags.items() if options()[key].section == "checkpoint"}
    with working_in(bench.new_folder()):
        Path("flags.yaml").write_text(yaml.safe_dump(section))
        return to_flat(cli.read_config(["--config", "flags.yaml"]))


def check_only(bench: Bench, flags: dict, ranks: int) -> str:
    """The status with which the main program ends after reading its flags (None: it goes on), and
    what it printed."""
    file = bench.folder / "flags.yaml"
    file.write_text(to_yaml(from_flat(flags)))
    status = None
    with redirect_stdout(io.StringIO()) as printed:
        try:
            cli.parse_and_check(["--config", str(file)], launch=ALONE)
        except SystemExit as end:
            status = end.code
    return f"status {status}: {printed.getvalue()}"

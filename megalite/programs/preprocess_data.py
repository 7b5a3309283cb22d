"""Turn text into an indexed dataset to train on.

    python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model \\
        --append-eod --workers 4

writes data/corpus_text_document.bin, .idx and .json; `--data-path data/corpus_text_document` trains
on them. After an interruption, the same command resumes where it stopped. In a SLURM array, each
task takes `--shard $ID/$COUNT`, and tools/merge_datasets.py merges the shards.
"""

import sys
from pathlib import Path

from megalite.config.cli import parse_options
from megalite.preprocess.config import PreprocessConfig, find_problems
from megalite.preprocess.inputs import ignored_files
from megalite.preprocess.journal import StagingError
from megalite.preprocess.progress import PreprocessProgress, show_progress
from megalite.preprocess.run import preprocess
from megalite.programs.reporting import describe, print_errors, refuse
from megalite.system.errors import ReportedError

SHOWN = 5
"""Ignored files to name."""
RESUME = (
    "The same command resumes from there, also with other --workers, --max-bad-lines or "
    "--skip-empty; delete it to start again"
)


def main() -> None:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = parse_options(PreprocessConfig, __doc__)
    refuse(find_problems(config))
    print_plan(config)
    last = PreprocessProgress(0)

    def remember(progress: PreprocessProgress) -> None:
        nonlocal last
        last = progress
        show(progress)

    try:
        with show_progress() as show:
            infos = preprocess(config, remember)
    except BrokenPipeError:
        raise
    except (ReportedError, OSError, KeyboardInterrupt) as error:
        print_errors(describe(error).splitlines())
        if config.staging_dir.exists() and not isinstance(error, StagingError):
            print(f"{config.staging_dir} keeps what is done. {RESUME}", file=sys.stderr)
        raise SystemExit(1) from None
    for key, info in zip(config.json_keys, infos, strict=True):
        sizes = f"{info.documents:,} documents, {info.tokens:,} tokens"
        print(f"{config.prefix(key)}.bin, .idx: {sizes}")
    bad_lines = Path(config.bad_lines)
    if bad_lines.exists():
        print(f"{bad_lines.read_bytes().count(10):,} bad lines were left out: see {bad_lines}")
    if last.empty:
        print(f"{last.empty:,} blank lines or empty texts were left out (--skip-empty)")
    if last.bytes_now:  # otherwise an earlier run had read it all
        print(last.where())


def print_plan(config: PreprocessConfig) -> None:
    """Print to stderr which files are ignored and which tokenizer is used."""
    ignored = ignored_files(config.input)
    if ignored:
        more = f" and {len(ignored) - SHOWN} more" if len(ignored) > SHOWN else ""
        names = ", ".join(ignored[:SHOWN])
        print(f"ignored, not a known kind of file: {names}{more}", file=sys.stderr)
    tokenizer = config.tokenizer
    why = f" ({tokenizer.why})" if tokenizer.why else ""
    ids = f"{tokenizer.vocab_size:,} ids"
    print(f"{config.tokenizer_type}, {ids}, {tokenizer.backend} backend{why}", file=sys.stderr)

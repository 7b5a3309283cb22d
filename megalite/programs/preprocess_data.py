"""Turn text into an indexed dataset to train on.

    python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 4

writes data/corpus_text_document.bin, .idx and .json; `--data-path data/corpus_text_document` trains on them. When it is
interrupted, the same command goes on from where it was. On a SLURM array, each task takes `--shard $ID/$COUNT`, and
tools/merge_datasets.py puts the parts together.
"""

import sys
from pathlib import Path

import tyro

from megalite.data.indexed import DatasetError
from megalite.data.tokenizers import TokenizerError
from megalite.preprocess.config import PreprocessConfig, find_problems
from megalite.preprocess.inputs import left_out
from megalite.preprocess.journal import FolderError
from megalite.preprocess.progress import Progress, show_progress
from megalite.preprocess.run import preprocess

SHOWN = 5
"""Files to name that are not read."""
GO_ON = "The same command goes on from there, also with other --workers or --max-bad-lines; delete it to start anew"


def main() -> int:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = tyro.cli(PreprocessConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    problems = find_problems(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    if passed := left_out(config.input):
        more = f" and {len(passed) - SHOWN} more" if len(passed) > SHOWN else ""
        print(f"not read, of no known kind: {', '.join(passed[:SHOWN])}{more}", file=sys.stderr)
    tokenizer = config.tokenizer
    why = f" ({tokenizer.why})" if tokenizer.why else ""
    print(
        f"{config.tokenizer_type}, {tokenizer.vocab_size:,} ids, {tokenizer.backend} backend{why}",
        file=sys.stderr,
    )
    last = Progress(0)

    def remember(progress: Progress) -> None:
        nonlocal last
        last = progress
        show(progress)

    try:
        with show_progress() as show:
            infos = preprocess(config, remember)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (DatasetError, TokenizerError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        if config.folder.exists():
            print(f"{config.folder} keeps what is done. {GO_ON}", file=sys.stderr)
        return 1
    for key, info in zip(config.json_keys, infos, strict=True):
        print(
            f"{config.prefix(key)}.bin, .idx: {info.documents:,} documents, {info.tokens:,} tokens"
        )
    bad_lines = Path(config.bad_lines)
    if bad_lines.exists():
        print(f"{bad_lines.read_bytes().count(10):,} bad lines were left out: see {bad_lines}")
    if last.bytes_now:  # otherwise an earlier run had read it all
        print(last.where())
    return 0

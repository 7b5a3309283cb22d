"""Turn JSONL into an indexed dataset to train on.

    python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --append-eod --workers 4

writes data/corpus_text_document.bin, .idx and .json; `--data-path data/corpus_text_document` trains on them.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's megalite, installed or not

from megalite.data.indexed import DatasetError
from megalite.data.preprocess import PreprocessConfig, find_problems, preprocess, show_progress


def main() -> int:
    """Exit status 0, 1 when the data is at fault, 2 when the arguments are."""
    config = tyro.cli(PreprocessConfig, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    problems = find_problems(config)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 2
    try:
        with show_progress() as report:
            infos = preprocess(config, report)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for key, info in zip(config.json_keys, infos, strict=True):
        print(f"{config.prefix(key)}.bin, .idx: {info.documents:,} documents, {info.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())

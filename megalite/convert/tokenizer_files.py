"""The tokenizer in a folder of Hugging Face, as fields of DataConfig. Imports no torch."""

from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import read_json
from megalite.convert.published import CONFIG_JSON, GENERATION_JSON
from megalite.data.tokenizers.huggingface import PUBLISHED_FILES, TOKENIZER_CONFIG, TOKENIZER_JSON


def tokenizer_paths(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder."""
    named = [folder / name for name in PUBLISHED_FILES if (folder / name).is_file()]
    return named + sorted(folder.glob("*.tiktoken"))


def kept_paths(folder: Path, tokenizer: bool = True) -> list[Path]:
    """The files in a folder of Hugging Face that are kept beside a checkpoint of its model: those
    from which such a folder is written, but for the weights. tokenizer: with its files."""
    paths = tokenizer_paths(folder) if tokenizer else []
    for name in (CONFIG_JSON, GENERATION_JSON):
        if (folder / name).is_file():
            paths.append(folder / name)
    return paths


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """Fields of DataConfig for the tokenizer in a folder of Hugging Face; {} without one."""
    if (folder / TOKENIZER_JSON).is_file():
        return _model("HuggingFaceTokenizer", folder / TOKENIZER_JSON)
    for path in sorted(folder.glob("*.tiktoken")):
        return _model("TikTokenizer", path)
    if (folder / "tokenizer.model").is_file():
        ranks = _holds_ranks(folder / "tokenizer.model")
        kind = "TikTokenizer" if ranks else "SentencePieceTokenizer"
        return _model(kind, folder / "tokenizer.model")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        files = {"vocab_file": str(folder / "vocab.json"), "merge_file": str(folder / "merges.txt")}
        return {"tokenizer_type": "GPT2BPETokenizer", **files}
    if (folder / "vocab.txt").is_file():
        lower = True
        if (folder / TOKENIZER_CONFIG).is_file():
            lower = read_json(folder / TOKENIZER_CONFIG).get("do_lower_case", True)
        kind = "BertWordPieceLowerCase" if lower else "BertWordPieceCase"
        return {"tokenizer_type": kind, "vocab_file": str(folder / "vocab.txt")}
    return {}


def _model(kind: str, path: Path) -> dict[str, Any]:
    return {"tokenizer_type": kind, "tokenizer_model": str(path)}


def _holds_ranks(path: Path) -> bool:
    """Whether a tokenizer.model is Meta's file of BPE ranks, text, and no SentencePiece model."""
    with open(path, "rb") as file:
        words = file.readline(1000).split()
    return len(words) == 2 and words[1].isdigit()

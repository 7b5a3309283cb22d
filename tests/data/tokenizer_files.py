"""Small tokenizers of every kind, trained on a few sentences, and texts that test them."""

import base64
import json
import random
from pathlib import Path

import pytest

from megalite.data.tokenizers import train_bpe, train_sentencepiece, train_wordpiece

SENTENCES = [
    "Fellow citizens of the Senate,\n\nand of the House:  I lay before you\tthe state of the "
    "Union.\r\n",
    "  leading, trailing and   inner spaces  ",
    "In 1984 the Union's naïve café served 1234 citizens; you and I weren't among them!",
] * 3


TEXTS = [
    "Fellow citizens of the Senate,\n\nand of the House:  I lay before you\tthe state of the "
    "Union.\r\n",
    "  leading, trailing and   inner spaces  ",
    "",
    "\n\n\n",
    "naïve café — 你好 😀 \u200b \x00\x01\x7f",
    "</s> <s> <unk> <pad> <0x0A>",
    "a<|endoftext|>b <|user|> <|endofprompt|> [MASK][SEP] <|endof",
    "e\u0301 \u0e33 \u2028 \u00a0 \u3000\u200d \U0001f469\u200d\U0001f680 \r\n\r\n \t\t  x",
    "a" * 5000,
]


def make_files(folder: Path) -> dict[str, dict[str, str]]:
    """The files of each kind in a folder, as arguments of build_tokenizer."""
    for library in ("sentencepiece", "tokenizers", "tiktoken"):
        pytest.importorskip(library)
    import tokenizers

    contents = {
        "t.model": train_sentencepiece(SENTENCES, 330),
        "unigram.model": train_sentencepiece(SENTENCES, 310, "unigram"),
        "uncased.txt": train_wordpiece(SENTENCES, 120, lowercase=True),
        "cased.txt": train_wordpiece(SENTENCES, 130),
    }
    contents["vocab.json"], contents["merges.txt"] = train_bpe(SENTENCES, 330)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    bpe = tokenizers.Tokenizer(
        tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|user|>", "[MASK]"])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", bpe.token_to_id("<|user|>"))]
    )
    bpe.enable_truncation(8)
    (folder / "hf").mkdir()
    bpe.save(str(folder / "hf" / "tokenizer.json"))
    (folder / "hf" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|user|>"}})
    )
    for name in ("r50k_base", "cl100k_base", "o200k_base"):
        (folder / f"{name}.tiktoken").write_bytes(ranks(json.loads(contents["vocab.json"])))
    path = lambda name: str(folder / name)  # noqa: E731 - a short name for a long line, five times
    return {
        "ByteTokenizer": {},
        "SentencePieceTokenizer": {"tokenizer_model": path("t.model")},
        "GPT2BPETokenizer": {"vocab_file": path("vocab.json"), "merge_file": path("merges.txt")},
        "BertWordPieceLowerCase": {"vocab_file": path("uncased.txt")},
        "BertWordPieceCase": {"vocab_file": path("cased.txt")},
        "HuggingFaceTokenizer": {"tokenizer_model": path("hf")},
        "TikTokenizer": {"tokenizer_model": path("cl100k_base.tiktoken")},
        "NullTokenizer": {"vocab_size": 50},
    }


def ranks(vocabulary: dict[str, int]) -> bytes:
    """A byte-level vocabulary as a file of ranks; its letters stand for bytes as GPT-2's do."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
    ordered = [
        piece for piece in sorted(vocabulary, key=vocabulary.get) if piece != "<|endoftext|>"
    ]
    pieces = [bytes(byte_of[letter] for letter in piece) for piece in ordered]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of random characters of many kinds, words of the sentences and special tokens."""
    draw = random.Random(seed)
    ranges = [
        (0, 0x7F),
        (0x80, 0x24F),
        (0x300, 0x36F),
        (0x590, 0x6FF),
        (0xE00, 0xE7F),
        (0x2000, 0x206F),
        (0x3040, 0x30FF),
        (0x4E00, 0x4FFF),
        (0xAC00, 0xACFF),
        (0xE000, 0xE010),
        (0xFF00, 0xFFEF),
        (0x1F300, 0x1F6FF),
        (0x10FFF0, 0x10FFFF),
    ]
    words = [
        *" ".join(SENTENCES[:3]).split(" "),
        "<s>",
        "</s>",
        "<|endoftext|>",
        "[MASK]",
        "<0x0A>",
        "  ",
        "\r\n",
        "'ll",
    ]

    def piece() -> str:
        if draw.random() < 0.5:
            return draw.choice(words) + draw.choice(["", " "])
        return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 8)))

    return ["".join(piece() for _ in range(draw.randint(0, 30))) for _ in range(count)]

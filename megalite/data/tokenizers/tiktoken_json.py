"""Files of BPE ranks as a tokenizer.json of the tokenizers library."""

import json
from typing import Any


def byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be
    printed, otherwise one from U+0100 on (Radford et al. 2019)."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    characters = []
    others = 0
    for byte in range(256):
        if byte in printed:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + others))
            others += 1
    return characters


def tokenizer_json(
    ids: dict[bytes, int], pattern: str, special: dict[str, int], nfc: bool = False
) -> bytes:
    """A tokenizer.json that gives the ids of a file of ranks.

    tiktoken merges any two neighbours whose bytes together are a token, the lowest rank first. A
    tokenizer.json lists pairs, so every pair that makes a token is listed, in the order of ranks.

    Args:
        ids: of each token; they rise with the ranks.
        pattern: splits text into words.
        special: ids of the special tokens.
        nfc: whether text is normalized to Unicode NFC.
    """
    characters = byte_characters()

    def shown(token: bytes) -> str:
        return "".join(map(characters.__getitem__, token))

    merges = []
    for token in sorted(ids, key=ids.__getitem__):
        pairs = []
        for cut in range(1, len(token)):
            left = token[:cut]
            right = token[cut:]
            if left in ids and right in ids:
                pairs.append((ids[left], ids[right], left, right))
        merges += [[shown(left), shown(right)] for _, _, left, right in sorted(pairs)]
    added = []
    for text, number in special.items():
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": number, "content": text, **flags, "special": True})
    # Special tokens too: their ids may leave gaps, which the library would close.
    vocabulary = {shown(token): number for token, number in ids.items()} | special
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False}
    byte_level |= {"trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split["invert"] = False
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a token is never split
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()

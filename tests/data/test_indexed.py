"""MMIDIDX files: byte for byte, whole or absent, refused when damaged."""

import os
import re
import struct

import numpy as np
import pytest

from megalite.data.indexed import CHUNK, SAMPLED, DatasetError, DatasetInfo, IndexedDataset, spread
from megalite.data.streams import GatheredStream
from megalite.preprocess.indexed_verify import MAX_PROBLEMS, verify
from megalite.preprocess.indexed_writer import IndexedWriter

INFO = DatasetInfo("ByteTokenizer", 257, 256, "00", 3, 7)

GOLDEN_BIN = struct.pack("<7H", 10, 11, 12, 13, 65535, 15, 16)
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<QBQQ", 1, 8, 4, 4)
    + struct.pack("<4i", 3, 1, 0, 3)
    + struct.pack("<4q", 0, 6, 8, 8)
    + struct.pack("<4q", 0, 2, 3, 4)
)


def write_golden(prefix):
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array([10, 11, 12]), np.array([13]))
        writer.add_document(np.array([], np.int64))
        writer.add_documents(np.array([65535, 15, 16], "<u2").tobytes(), np.array([3]))
        writer.finish(INFO)


def put(prefix, idx=GOLDEN_IDX, bin=GOLDEN_BIN):
    prefix.with_suffix(".idx").write_bytes(idx)
    prefix.with_suffix(".bin").write_bytes(bin)
    return prefix


def test_writer_makes_the_golden_bytes(tmp_path):
    write_golden(tmp_path / "a")
    assert (tmp_path / "a.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN
    assert DatasetInfo.read(tmp_path / "a") == INFO
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx", "a.json"]


@pytest.mark.parametrize("modes", [b"", b"\0\0\1\0"])
def test_reader_reads_the_golden_bytes(tmp_path, modes):
    data = IndexedDataset(put(tmp_path / "a", GOLDEN_IDX + modes))
    assert (len(data), data.num_documents, data.num_tokens, data.dtype) == (4, 3, 7, np.uint16)
    assert [data.sequence(i).tolist() for i in range(4)] == [
        [10, 11, 12],
        [13],
        [],
        [65535, 15, 16],
    ]
    assert data.tokens().read(0, 7).tolist() == [10, 11, 12, 13, 65535, 15, 16]
    assert DatasetInfo.read(tmp_path / "a") is None


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
def test_round_trip_in_every_dtype(tmp_path, dtype):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 128, n).astype(dtype) for n in random.integers(0, 40, 50)]
    with IndexedWriter(tmp_path / "v1.5", dtype) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()
    data = IndexedDataset(tmp_path / "v1.5")
    assert data.dtype == np.dtype(dtype) and data.contiguous
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(data.sequence(i), document)
    np.testing.assert_array_equal(
        data.tokens(10, 30).read(0, len(data.tokens(10, 30))), np.concatenate(documents[10:30])
    )


def test_an_empty_dataset(tmp_path):
    with IndexedWriter(tmp_path / "a", "i4") as writer:
        writer.finish()
    data = IndexedDataset(tmp_path / "a")
    assert (len(data), data.num_documents, len(data.tokens())) == (0, 0, 0)
    assert data.fingerprint() == data.fingerprint()


def test_more_sequences_than_one_chunk(tmp_path):
    lengths = np.arange(2 * CHUNK + 10, dtype=np.int32) % 3
    total = int(lengths.sum())
    with IndexedWriter(tmp_path / "a", "u1") as writer:
        writer.add_documents(bytes(total), lengths)
        writer.finish()
    data = IndexedDataset(tmp_path / "a")
    np.testing.assert_array_equal(data.lengths, lengths)
    np.testing.assert_array_equal(data.offsets, np.cumsum(lengths, dtype=np.int64) - lengths)
    assert data.contiguous and data.num_tokens == total
    assert len(data.tokens(CHUNK - 1, CHUNK + 5)) == lengths[CHUNK - 1 : CHUNK + 5].sum()


def damaged(at, form, *values):
    data = bytearray(GOLDEN_IDX)
    struct.pack_into(form, data, at, *values)
    return bytes(data)


@pytest.mark.parametrize(
    ("idx", "bin", "message"),
    [
        (GOLDEN_IDX[:20], GOLDEN_BIN, r"a\.idx: 20 bytes, too short"),
        (b"", GOLDEN_BIN, "0 bytes, too short"),
        (b"X" + GOLDEN_IDX[1:], GOLDEN_BIN, "starts with b'XMIDIDX"),
        (damaged(9, "<Q", 2), GOLDEN_BIN, "version 2; only version 1"),
        (damaged(17, "<B", 9), GOLDEN_BIN, "dtype code 9"),
        (damaged(17, "<B", 6), GOLDEN_BIN, "dtype code 6"),
        (
            GOLDEN_IDX[:-1],
            GOLDEN_BIN,
            r"113 bytes, but 4 sequences and 4 document boundaries take 114",
        ),
        (GOLDEN_IDX + b"\0", GOLDEN_BIN, r"115 bytes, but .* cut short"),
        (damaged(18, "<Q", 2**60), GOLDEN_BIN, "sequences and 4 document boundaries take"),
        (damaged(82, "<q", 1), GOLDEN_BIN, "are from 1 to 4; they must run from 0 to 4"),
        (damaged(106, "<q", 3), GOLDEN_BIN, "are from 0 to 3"),
        (damaged(90, "<q", 4), GOLDEN_BIN, "go backwards"),
        (damaged(34, "<i", -3), GOLDEN_BIN, "sequence 0 of -3 tokens"),
        (damaged(58, "<q", 7), GOLDEN_BIN, "sequence 1 of 1 tokens should lie at bytes 7 to 9"),
        (
            damaged(74, "<q", 10),
            GOLDEN_BIN,
            "sequence 3 of 3 tokens .* 10 to 16, but the file has 14",
        ),
        (GOLDEN_IDX, GOLDEN_BIN[:-1], r"a\.bin: sequence 3 .* but the file has 13"),
        (GOLDEN_IDX, GOLDEN_BIN + b"\0\0", r"16 bytes, but .*a\.idx describes 14"),
    ],
)
def test_damaged_files_are_refused_with_file_value_and_remedy(tmp_path, idx, bin, message):
    with pytest.raises(DatasetError, match=message) as caught:
        IndexedDataset(put(tmp_path / "a", idx, bin))
    assert "tools/preprocess_data.py" in str(caught.value)


def test_a_missing_file_names_the_path_looked_for(tmp_path):
    put(tmp_path / "a")
    with pytest.raises(DatasetError, match=r"a\.idx\.idx: no such file.*without the suffix"):
        IndexedDataset(tmp_path / "a.idx")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DatasetError, match=r"a\.bin: no such file"):
        IndexedDataset(tmp_path / "a")


def test_a_contiguous_stream_is_a_view_of_the_file(tmp_path):
    data = IndexedDataset(put(tmp_path / "a"))
    stream = data.tokens(0, 3)
    part = stream.read(2, 6)
    assert np.shares_memory(part, data.ids) and not part.flags.writeable
    assert part.tolist() == [12, 13, 65535, 15]
    assert data.tokens(2, 3).read(0, 3).tolist() == [65535, 15, 16]
    assert len(data.tokens(1, 2)) == 0 and len(data.tokens(3, 3)) == 0
    with pytest.raises(DatasetError, match="documents 2 to 4 requested, but it has 3"):
        data.tokens(2, 4)


def test_scattered_sequences_are_gathered(tmp_path):
    """Sequences of [3, 1, 0, 3] tokens stored back to front read like the contiguous file."""
    offsets = struct.pack("<4q", 8, 6, 2, 0)
    prefix = put(
        tmp_path / "a",
        GOLDEN_IDX[:50] + offsets + GOLDEN_IDX[82:],
        struct.pack("<7H", 65535, 15, 16, 13, 10, 11, 12),
    )
    data = IndexedDataset(prefix)
    expected = [10, 11, 12, 13, 65535, 15, 16]
    assert not data.contiguous
    stream = data.tokens()
    for start in range(8):
        for stop in range(start, 8):
            assert stream.read(start, stop).tolist() == expected[start:stop]
    assert data.tokens(1, 3).read(1, 3).tolist() == [15, 16] and len(data.tokens(1, 2)) == 0


def test_the_fingerprint_distinguishes_data(tmp_path):
    first = IndexedDataset(put(tmp_path / "a")).tokens(0, 2).fingerprint()
    assert IndexedDataset(put(tmp_path / "b")).tokens(0, 2).fingerprint() == first
    others = {
        IndexedDataset(tmp_path / "a").tokens(0, 3).fingerprint(),
        IndexedDataset(put(tmp_path / "c", damaged(90, "<q", 1))).tokens(0, 2).fingerprint(),
        IndexedDataset(put(tmp_path / "d", bin=GOLDEN_BIN[:-1] + b"\1")).tokens(0, 2).fingerprint(),
    }
    assert len(others | {first}) == 4


LARGE = 40 * SAMPLED


def large(prefix, *damage, info=None):
    """LARGE documents of one uint16 token, which is their number, then bytes of the .idx file
    changed."""
    with IndexedWriter(prefix, "u2") as writer:
        writer.add_documents(np.arange(LARGE, dtype="<u2").tobytes(), np.ones(LARGE, "i4"))
        writer.finish(info)
    data = bytearray(prefix.with_suffix(".idx").read_bytes())
    for at, form, value in damage:
        struct.pack_into(form, data, 34 + at, value)
    prefix.with_suffix(".idx").write_bytes(data)
    return prefix


def test_opening_a_large_file_looks_at_a_sample_and_verify_at_everything(tmp_path):
    between = 5
    looked_at = int(spread(LARGE)[100])
    bound = int(spread(LARGE + 1)[100])
    assert between not in spread(LARGE) and len(spread(LARGE)) == SAMPLED
    offset = 4 * LARGE + 8 * between
    boundary = 12 * LARGE + 8 * between
    assert verify(IndexedDataset(large(tmp_path / "sound"))) == ([], LARGE - 1)
    for name, at, form, value, message in [
        ("length", 4 * between, "<i", -1, "sequence 5 of -1 tokens"),
        (
            "offset",
            offset,
            "<q",
            2**63 - 2,
            "sequence 5 of 1 tokens should lie at bytes 9223372036854775806",
        ),
        ("gap", offset, "<q", 8, "sequence 5 starts at byte 8, not where the one before ends"),
        ("boundary", boundary, "<q", 9999, "go backwards .* 9999, then 6 for document 5"),
    ]:
        found, *_ = verify(IndexedDataset(large(tmp_path / name, (at, form, value)))).problems
        assert re.search(message, found), found
    for name, at, form, value in [
        ("a", 4 * looked_at, "<i", -1),
        ("b", 12 * LARGE + 8 * bound, "<q", 9999),
    ]:
        with pytest.raises(DatasetError, match="-1 tokens|go backwards"):
            IndexedDataset(large(tmp_path / name, (at, form, value)))


def test_verify_lists_problems_up_to_a_limit(tmp_path):
    between = [i for i in range(50) if not np.isin([i, i - 1], spread(LARGE)).any()]
    damage = [(4 * i, "<i", -1) for i in between]
    two = verify(IndexedDataset(large(tmp_path / "two", *damage[:2]))).problems
    assert [f"sequence {i} of -1" in text for i, text in zip(between[:2], two, strict=False)] == [
        True,
        True,
    ]
    assert (
        len(verify(IndexedDataset(large(tmp_path / "many", *damage))).problems)
        == MAX_PROBLEMS
        < len(damage)
    )


def test_verify_compares_with_the_description(tmp_path):
    shares = []
    sound = large(
        tmp_path / "sound", info=DatasetInfo("ByteTokenizer", LARGE, None, "", LARGE, LARGE)
    )
    assert verify(IndexedDataset(sound), shares.append) == ([], LARGE - 1)
    assert shares == sorted(shares) and shares[-1] == 1
    wrong = IndexedDataset(
        large(tmp_path / "wrong", info=DatasetInfo("ByteTokenizer", 9000, None, "", LARGE, 7))
    )
    (counts, ids), largest = verify(wrong)
    assert largest == LARGE - 1
    assert f"{LARGE:,} documents and 7 tokens, but the files hold {LARGE:,} and {LARGE:,}" in counts
    assert "id 9000 at token 9000" in ids and f"9000 entries ({LARGE - 9000} such ids" in ids
    (tmp_path / "sound.json").write_text("{")
    assert "not a dataset description" in verify(IndexedDataset(sound)).problems[0]


def test_the_fingerprint_of_a_large_file_reads_blocks_of_it(tmp_path):
    def fingerprint(change):
        ids = np.zeros(1 << 20, "<u2")
        ids[change] = 1
        (tmp_path / "a.bin").write_bytes(ids.tobytes())
        return IndexedDataset(tmp_path / "a").fingerprint()

    with IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.add_document(np.zeros(1 << 20))
        writer.finish()
    base = fingerprint([])
    assert base.startswith("2:") and fingerprint([0]) != base != fingerprint([-1])
    assert fingerprint([9000]) == base  # not noticed: it lies between the first two blocks


def test_sequences_gathered_in_any_order(tmp_path):
    data = IndexedDataset(put(tmp_path / "a"))
    stream = GatheredStream(data, np.array([3, 2, 0, 3, 1, 2]), "some")
    expected = [65535, 15, 16, 10, 11, 12, 65535, 15, 16, 13]
    for start in range(11):
        for stop in range(start, 11):
            assert stream.read(start, stop).tolist() == expected[start:stop]
    assert len(stream) == 10 and stream.fingerprint() == data.fingerprint() + "[some]"


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "a", "u2") as writer:
        writer.add_document(np.arange(5))
        assert not (tmp_path / "a.bin").exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []

    with IndexedWriter(tmp_path / "a", "u2") as late:
        late.add_document(np.arange(5))
        write_golden(tmp_path / "a")
        with pytest.raises(DatasetError, match=r"a\.idx exists already"):
            late.finish()
    with pytest.raises(DatasetError, match=r"a\.bin.*exists already. Delete it"):
        IndexedWriter(tmp_path / "a", "u2")
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx", "a.json"]
    assert (tmp_path / "a.bin").read_bytes() == GOLDEN_BIN


def test_the_writer_refuses_what_it_cannot_store(tmp_path):
    for dtype in ("f4", "u4"):
        with pytest.raises(DatasetError, match="cannot be stored"):
            IndexedWriter(tmp_path / "a", dtype)
    with (
        IndexedWriter(tmp_path / "a", "u2") as writer,
        pytest.raises(DatasetError, match="5 bytes given for 3 tokens"),
    ):
        writer.add_documents(b"12345", np.array([3]))
    with (
        IndexedWriter(tmp_path / "a", "u2") as writer,
        pytest.raises(DatasetError, match="id 65536"),
    ):
        writer.add_document(np.array([1, 65536]))


def test_a_damaged_description_is_refused(tmp_path):
    for text in ("{", '{"vocab_size": 3}', "[]"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DatasetError, match=r"a\.json: not a dataset description"):
            DatasetInfo.read(tmp_path / "a")

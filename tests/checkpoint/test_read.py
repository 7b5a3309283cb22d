"""What was written is read back, in any cut; what is damaged or asked for wrongly is refused with a
clear text."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint import tensor_file
from megalite.checkpoint.folder import (
    CheckpointError,
    DamagedCheckpointError,
    latest_iteration,
    list_iterations,
)
from megalite.checkpoint.format import Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.parallel.boxes import Box
from tests.checkpoint.helpers import ALONE, cut, edit_index, part, save, whole

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]


def random_bits(shape, dtype):
    """Every bit random: infinities, denormals and NaNs with payloads are among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return raw.view(dtype)


def same_bits(one, other):
    return (
        one.dtype == other.dtype and one.shape == other.shape and raw_bytes(one) == raw_bytes(other)
    )


def raw_bytes(tensor):
    return (
        tensor.clone(memory_format=torch.contiguous_format)
        .reshape(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_bitwise(tmp_path, dtype):
    tensor = random_bits((5, 7), dtype)
    save(tmp_path, 1, whole("b", tensor), whole("c", tensor.t()))
    with Checkpoint.open(tmp_path) as checkpoint:
        assert same_bits(checkpoint.read("b"), tensor)
        assert same_bits(checkpoint.read("c"), tensor.t())
        assert checkpoint.dtype("b") == dtype
        assert checkpoint.shape("c") == (7, 5)
        checkpoint.verify()


def test_scalars_empty_tensors_and_an_empty_checkpoint(tmp_path):
    save(tmp_path, 1, whole("scalar", torch.tensor(2.5)), whole("none", torch.zeros(0, 3)))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.read("scalar", Box((), ())).item() == 2.5
    assert checkpoint.read("none").shape == (0, 3)
    save(tmp_path, 2)
    assert Checkpoint.open(tmp_path).names == set()
    Checkpoint.open(tmp_path).verify()


def test_the_file_of_a_single_rank_is_a_plain_safetensors_file(tmp_path):
    tensors = {"w": torch.randn(4, 6).t(), "b": torch.randn(6).bfloat16(), "step": torch.tensor(3)}
    folder = save(tmp_path, 1, *(whole(name, tensor) for name, tensor in tensors.items()))
    loaded = load_file(folder / "weights-00000.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_in_a_file_is_aligned_to_its_elements(tmp_path):
    tensors = [torch.ones(3, dtype=dtype) for dtype in reversed(DTYPES)]
    folder = save(tmp_path, 1, *(whole(str(tensor.dtype), tensor) for tensor in tensors))
    content = (folder / "weights-00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    starts = {
        tensor: 8 + length + header[str(tensor.dtype)]["data_offsets"][0] for tensor in tensors
    }
    assert all(start % tensor.element_size() == 0 for tensor, start in starts.items())


@pytest.mark.parametrize("written", [0, 1, 2])
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_written_along_one_dim_read_along_another(tmp_path, written, wanted):
    tensor = torch.randn(5, 6, 7)
    save(tmp_path, 1, *(part("w", tensor, box) for box in cut(tensor.shape, written, 3)))
    checkpoint = Checkpoint.open(tmp_path)
    assert same_bits(checkpoint.read("w"), tensor)
    for box in cut(tensor.shape, wanted, 4):
        assert same_bits(checkpoint.read("w", box), tensor[box.slices_in(Box.whole(tensor.shape))])


def test_any_boxes_read_as_any_other_boxes(tmp_path):
    generator = random.Random(0)

    def boxes_of(box, depth):
        dim = generator.randrange(len(box.shape))
        if depth == 0 or box.shape[dim] < 2:
            return [box]
        at = generator.randrange(1, box.shape[dim])
        left = Box(box.offset, (*box.shape[:dim], at, *box.shape[dim + 1 :]))
        offset = (*box.offset[:dim], box.offset[dim] + at, *box.offset[dim + 1 :])
        right = Box(offset, (*box.shape[:dim], box.shape[dim] - at, *box.shape[dim + 1 :]))
        return boxes_of(left, depth - 1) + boxes_of(right, depth - 1)

    for iteration in range(10):
        tensor = torch.randn([generator.randrange(1, 9) for _ in range(generator.randrange(1, 4))])
        everything = Box.whole(tuple(tensor.shape))
        save(tmp_path, iteration, *(part("w", tensor, box) for box in boxes_of(everything, 4)))
        checkpoint = Checkpoint.open(tmp_path)
        checkpoint.verify()
        for box in boxes_of(everything, 4):
            assert same_bits(checkpoint.read("w", box), tensor[box.slices_in(everything)])


def test_read_into_converts_and_fills_views_of_parameters(tmp_path):
    tensor = torch.randn(4, 6)
    save(tmp_path, 1, whole("w", tensor))
    parameter = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
    box = Box((0, 2), (4, 3))
    Checkpoint.open(tmp_path).read_into(Shard("w", parameter[:3].t(), (4, 6), box))
    assert torch.equal(parameter[:3].t(), tensor[:, 2:5].bfloat16())
    assert not parameter[3:].any()


def test_an_empty_shard_reads_nothing(tmp_path):
    save(tmp_path, 1, whole("w", torch.randn(4, 6)))
    empty = Shard("w", torch.zeros(0, 6), (4, 6), Box((4, 0), (0, 6)))
    Checkpoint.open(tmp_path).read_into(empty)


def test_state_configuration_and_private_tensors(tmp_path):
    state = {"consumed_samples": 12, "losses": [0.1, 1e-300], "name": "é"}
    private = {"rng.default": torch.get_rng_state(), "rng.tensor": torch.arange(0)}
    write(tmp_path, 100, [whole("w", torch.ones(2))], private, state, "tp: 2\n", ALONE)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.iteration, checkpoint.state, checkpoint.config_yaml) == (
        100,
        state,
        "tp: 2\n",
    )
    assert (checkpoint.world_size, list(checkpoint.names)) == (1, ["w"])
    stored = checkpoint.private(0, world_size=1)
    assert stored.keys() == private.keys()
    assert all(same_bits(stored[name], tensor) for name, tensor in private.items())
    assert checkpoint.private(0, world_size=2) is None


def test_a_step_can_be_chosen(tmp_path):
    assert latest_iteration(tmp_path / "absent") is None
    assert list_iterations(tmp_path / "absent") == []
    for iteration in (5, 20, 12_345_678):
        save(tmp_path, iteration, whole("w", torch.tensor(iteration)))
    assert list_iterations(tmp_path) == [5, 20, 12_345_678]
    assert latest_iteration(tmp_path) == 12_345_678
    assert Checkpoint.open(tmp_path, step=20).read("w").item() == 20


def test_what_is_not_there_is_named_with_what_is(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Checkpoint.open(tmp_path)
    save(tmp_path, 5, whole("layers.0.mlp.up.weight", torch.ones(2, 3)), whole("b", torch.ones(4)))
    with pytest.raises(
        CheckpointError, match=r"iter_0000006 does not exist; .* holds iter_0000005"
    ):
        Checkpoint.open(tmp_path, step=6)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"layers.0.mlp.uo.weight is not stored \(nearest: layers.0.mlp.up.weight",
    ):
        checkpoint.read("layers.0.mlp.uo.weight")
    with pytest.raises(CheckpointError, match=r"b has shape \(4,\).* does not lie in it"):
        checkpoint.read("b", Box((2,), (3,)))
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert Checkpoint.open(tmp_path).iteration == 5  # the highest there is
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="it holds 'release'"):
        Checkpoint.open(tmp_path)


def test_check_lists_everything_that_does_not_fit_at_once(tmp_path):
    save(tmp_path, 1, whole("up.weight", torch.ones(2, 3)), whole("down.weight", torch.ones(3, 2)))
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check([whole("up.weight", torch.zeros(2, 3))])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check(
            [
                whole("up.weight", torch.ones(4, 3)),
                whole("up.wait", torch.ones(1)),
                whole("zz", torch.ones(1)),
            ]
        )
    text = str(caught.value)
    assert "up.weight: shape (2, 3) is stored, (4, 3) is wanted" in text
    assert "up.wait: not stored (nearest: up.weight" in text
    assert "zz: not stored\n" in text
    with pytest.raises(CheckpointError, match="and 80 more"):
        checkpoint.check([whole(f"layer{i}", torch.ones(1)) for i in range(100)])
    with pytest.raises(CheckpointError, match="is wanted"):
        checkpoint.read_into(whole("up.weight", torch.zeros(3, 3)))


SUM = "0" * 16


def boxes(text):
    return lambda index: index["names"]["w"].update(boxes=text)


def test_missing_and_truncated_files_are_found_when_they_are_read(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    file = folder / "weights-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    text = f"weights-00000.safetensors has {len(content) - 1} bytes instead of {len(content)}"
    with pytest.raises(DamagedCheckpointError, match=text):
        Checkpoint.open(tmp_path).read("w")
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"weights-00000.safetensors is missing"):
        Checkpoint.open(tmp_path).read("w")
    (folder / "state.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"state.json is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "state.json", "config.yaml"])
def test_a_changed_character_is_found_when_opening(tmp_path, name):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)), state={"consumed_samples": 120})
    file = folder / name
    text = file.read_text()
    file.write_text(text.replace("0", "1", 1))
    with pytest.raises(DamagedCheckpointError, match=f"{name}.* differs from its checksum"):
        Checkpoint.open(tmp_path)


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_is_found_in_what_is_read_alone(tmp_path):
    """Blocks of 4 MiB: the tensor has three."""
    tensor = torch.arange(3 << 19).reshape(-1, 64)
    folder = save(tmp_path, 1, whole("w", tensor), whole("b", torch.ones(50)))
    file = folder / "weights-00000.safetensors"
    flip(file, (6 << 20) + 4000)
    checkpoint = Checkpoint.open(tmp_path)
    rows = Box((0, 0), (8000, 64))
    assert torch.equal(checkpoint.read("w", rows), tensor[:8000])
    rows = Box((16384, 3), (8192, 5))
    assert torch.equal(checkpoint.read("w", rows), tensor[16384:, 3:8])
    assert checkpoint.read("b").sum() == 50
    for box in (None, Box((0, 3), (24576, 5)), Box((9000, 0), (1, 64))):
        with pytest.raises(DamagedCheckpointError, match=r"weights-00000.safetensors: w: bytes"):
            checkpoint.read("w", box)
    with pytest.raises(DamagedCheckpointError, match=r"w: bytes \d+ to \d+ differ"):
        checkpoint.verify()
    Checkpoint.open(tmp_path, verify=False).read("w")


def test_damage_of_the_header_and_of_private_tensors_is_found(tmp_path):
    private = {"rng": torch.arange(100)}
    folder = write(tmp_path, 1, [whole("w", torch.ones(50))], private, {}, "", ALONE)
    file = folder / "weights-00000.safetensors"
    flip(file, file.stat().st_size - 210)  # the ints come first
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(DamagedCheckpointError, match="@rng: bytes .* differ"):
        checkpoint.private(0, 1)
    assert checkpoint.read("w").sum() == 50
    flip(file, 30)
    with pytest.raises(DamagedCheckpointError, match="its header differs from its checksum"):
        Checkpoint.open(tmp_path).read("w")
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(DamagedCheckpointError, match=r"states a header of 18446744073709551615"):
        Checkpoint.open(tmp_path).read("w")


def test_a_large_box_that_is_not_contiguous_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "STRIDED_BYTES", 200)
    tensor = torch.randn(2, 9, 11, 3)
    save(tmp_path, 1, *(part("w", tensor, box) for box in cut(tensor.shape, 1, 2)))
    with Checkpoint.open(tmp_path) as checkpoint:
        for dim in range(4):
            for box in cut(tensor.shape, dim, 3):
                expected = tensor[box.slices_in(Box.whole(tensor.shape))]
                assert same_bits(checkpoint.read("w", box), expected)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index.pop("format_version"), "damaged.*None"),
        (lambda index: index.pop("names"), "damaged.*names"),
        (lambda index: index["names"]["w"].update(dtype="object"), "damaged.*object"),
        (lambda index: index["names"]["w"].update(boxes=[]), r"damaged.*\[\] should be text"),
        (boxes(f"2 0 40 50 {SUM}"), "outside the shape"),
        (boxes(f"2 0 0,0 50 {SUM}"), "outside the shape"),
        (boxes(f"2 0 0 -1 {SUM}"), "no list of boxes"),
        (boxes(f"2 0 0 {9**99} {SUM}"), "outside the shape"),
        (boxes(f"2 0 0 {'9' * 9999} {SUM}"), "damaged.*ValueError"),
        (boxes(f"9 0 0 50 {SUM}"), "damaged.*IndexError"),
        (boxes(f"/etc 0 0 50 {SUM}"), "no list of boxes"),
        (boxes("2 0 0 50 ab"), "has 1 blocks"),
        (boxes("2 0 0"), "damaged.*ValueError"),
        (boxes(";"), "damaged.*ValueError"),
        (lambda index: index["names"]["w"].update(shape=[1 << 70]), "is no size"),
        (lambda index: index["names"]["w"].update(shape=[-1]), "is no size"),
        (lambda index: index["names"]["w"].update(shape=[1] * 100), "100 dims"),
        (
            lambda index: index["files"].update({"../secret": {"bytes": 1, "xxh3": ""}}),
            "unsafe file name '../secret'",
        ),
        (lambda index: index["files"].update({"..": {}}), "damaged"),
    ],
)
def test_an_index_that_is_damaged_or_unsafe_is_refused(tmp_path, change, text):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    edit_index(folder, change)
    with pytest.raises(DamagedCheckpointError, match=text):
        Checkpoint.open(tmp_path).read("w")


def test_a_newer_format_names_who_wrote_it(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    edit_index(folder, lambda index: index.update(format_version=3, written_by="megalite 9.1"))
    with pytest.raises(CheckpointError, match="version 3 and was written by megalite 9.1") as found:
        Checkpoint.open(tmp_path)
    assert not isinstance(found.value, DamagedCheckpointError)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    (folder / "index.json").write_text((folder / "index.json").read_text()[:-20])
    with pytest.raises(DamagedCheckpointError, match=r"index.json is damaged"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_the_files_gives_no_wrong_values(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    edit_index(folder, boxes(f"2 0 0 49 {SUM}"))
    with pytest.raises(DamagedCheckpointError, match="the index says"):
        Checkpoint.open(tmp_path).read("w", Box((0,), (10,)))
    with pytest.raises(DamagedCheckpointError, match="only 49 of the 50 elements"):
        Checkpoint.open(tmp_path).verify()
    edit_index(folder, boxes(""))
    with pytest.raises(DamagedCheckpointError, match="0 of the 10 elements"):
        Checkpoint.open(tmp_path).read("w", Box((0,), (10,)))


def test_the_folder_of_one_checkpoint_is_opened_as_that_checkpoint(tmp_path):
    for iteration in (5, 20):
        folder = save(tmp_path, iteration, whole("w", torch.tensor(iteration)))
    older = tmp_path / "iter_0000005"
    assert (list_iterations(older), latest_iteration(older)) == ([5], 5)
    for step in (None, 5):
        assert Checkpoint.open(older, step).read("w").item() == 5
        assert Checkpoint.open(f"{older}/", step).folder == older
    with pytest.raises(
        CheckpointError, match=r"iter_0000020 does not exist; .* holds iter_0000005"
    ):
        Checkpoint.open(older, step=20)
    folder.rename(tmp_path / "iter_0000020.replaced-1")
    assert Checkpoint.open(tmp_path / "iter_0000020.replaced-1").iteration == 20
    folder.mkdir()
    assert list_iterations(folder) == []
    assert latest_iteration(folder) is None

"""What was written is read back, in any cut; what is damaged or asked for wrongly is refused with a
clear text."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import latest_iteration, list_iterations
from megalite.checkpoint.format import CheckpointError, Shard
from megalite.checkpoint.load import Checkpoint
from megalite.checkpoint.save import write
from megalite.parallel.boxes import Box
from tests.checkpoint.helpers import ALONE, cut, part, save, whole

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


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


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


def test_missing_and_truncated_files_are_found_when_opening(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    file = folder / "weights-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(
        CheckpointError, match=f"has {len(content) - 1} bytes instead of {len(content)}"
    ):
        Checkpoint.open(tmp_path)
    file.unlink()
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert "weights-00000.safetensors is missing" in str(caught.value)
    assert "state.json is missing" in str(caught.value)


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    file = folder / "weights-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights-00000.safetensors: its checksum differs"):
        Checkpoint.open(tmp_path).verify()


def test_a_broken_header_is_an_error_of_the_checkpoint(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    file = folder / "weights-00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"weights-00000.safetensors cannot be read"):
        Checkpoint.open(tmp_path).read("w")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda index: index.update(format_version=2),
            "format version 2; this megalite reads version 1",
        ),
        (lambda index: index.pop("format_version"), "damaged.*format_version"),
        (lambda index: index.pop("names"), "damaged.*names"),
        (lambda index: index["names"]["w"].update(dtype="object"), "damaged.*object"),
        (lambda index: index["names"]["w"]["boxes"][0].update(offset=[40]), "outside the shape"),
        (lambda index: index["names"]["w"]["boxes"][0].update(offset=[0, 0]), "outside the shape"),
        (lambda index: index["names"]["w"]["boxes"][0].update(file="/etc/passwd"), "not listed"),
        (
            lambda index: index["files"].update({"../secret": {"bytes": 1, "sha256": ""}}),
            "unsafe file name '../secret'",
        ),
        (
            lambda index: index["files"].update({"..": {"bytes": 1, "sha256": ""}}),
            "unsafe file name",
        ),
    ],
)
def test_an_index_that_is_damaged_or_unsafe_is_refused(tmp_path, change, text):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    edit_index(folder, change)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(tmp_path)


def test_an_index_that_is_not_json_is_refused(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    (folder / "index.json").write_text((folder / "index.json").read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_the_files_gives_no_wrong_values(tmp_path):
    folder = save(tmp_path, 1, whole("w", torch.ones(50)))
    edit_index(folder, lambda index: index["names"]["w"]["boxes"][0].update(shape=[49]))
    with pytest.raises(CheckpointError, match="the index says"):
        Checkpoint.open(tmp_path).read("w", Box((0,), (10,)))
    with pytest.raises(CheckpointError, match="only 49 of the 50 elements"):
        Checkpoint.open(tmp_path).verify()
    edit_index(folder, lambda index: index["names"]["w"].update(boxes=[]))
    with pytest.raises(CheckpointError, match="0 of the 10 elements"):
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

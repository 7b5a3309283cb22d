"""Folders of Hugging Face: transformers' models give the same logits here, in one process and in a
layout, and every box of every tensor is read alike."""

import json
import random
import shutil
import struct
from itertools import product

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megalite.checkpoint.folder import CheckpointError
from megalite.config.run import from_flat
from megalite.convert.huggingface import HuggingFaceWeights
from megalite.convert.published import find_tensors, read_published, stored_tensors
from megalite.models.batch import Microbatch
from megalite.parallel.boxes import Box
from megalite.parallel.context import ParallelContext
from megalite.parallel.layout import ParallelLayout
from megalite.parallel.rng import CounterBasedRng
from megalite.training.build import build_model
from megalite.training.state import load_weights
from tests.convert.published_models import SEQUENCE, VOCABULARY, WHOLE, their_logits, tokens

WITHIN = 1e-5
"""Of logits up to about 4, in fp32: they are sums of 32 products, and a layer rounds some ten
times."""


def model_of(folder, context: ParallelContext, **flags):
    """The model of a folder on this rank, with its weights."""
    config = from_flat({"load_hf": str(folder), "mock_data": True, "seq_length": SEQUENCE, **flags})
    model = build_model(config, context, CounterBasedRng.for_seed(0)).eval()
    with HuggingFaceWeights.open(folder) as weights:
        load_weights(weights, model.parameters_by_name)
    return model


@pytest.mark.parametrize("name", WHOLE)
def test_one_process_gives_their_logits(published, name):
    model = model_of(published[name], ParallelContext.single())
    with torch.no_grad():
        found = model(None, Microbatch(tokens())).transpose(0, 1)[..., :VOCABULARY]
    wanted = their_logits(published[name])
    assert wanted.abs().max() > 0.5
    assert (found - wanted).abs().max() < WITHIN


def logits_of_rank(launch, folders) -> dict:
    """For each folder the logits of this rank's share of the vocabulary, on the last stage:
    (first id, [s, b, v/t])."""
    layout = ParallelLayout(tensor=2, pipeline=2)
    context = ParallelContext.create(layout, launch)
    flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    found = {}
    for name, folder in folders.items():
        model = model_of(folder, context, sequence_parallel=True, **flags)
        batch = Microbatch(tokens())
        with torch.no_grad():
            if model.is_first:
                dist.send(model(None, batch), launch.rank + 2)
            else:
                x = torch.empty(model.hidden_shape(len(batch.tokens)))
                dist.recv(x, launch.rank - 2)
                box = model.stages[-1].output_weight.spec.box
                found[name] = (box.offset[0], model(x, batch)[..., : box.shape[0]])
    return found


def test_two_by_two_ranks_give_their_logits(published, pool):
    """tp=2 x pp=2 with sequence parallelism: each rank reads its boxes."""
    folders = {name: published[name] for name in WHOLE}
    *_, first, second = pool.run(logits_of_rank, 4, folders)
    for name, folder in folders.items():
        parts = sorted([first[name], second[name]], key=lambda part: part[0])
        found = torch.cat([part for _, part in parts], dim=-1).transpose(0, 1)
        assert (found - their_logits(folder)).abs().max() < WITHIN, name


@pytest.mark.parametrize("name", ["gpt2", "llama 3.1", "bert"])
def test_a_box_is_a_part_of_the_whole(published, name, monkeypatch):
    """Random boxes, read with runs of bytes of any length."""
    draw = random.Random(2)
    with HuggingFaceWeights.open(published[name]) as weights:
        for tensor, least in product(weights.names, (1, 100, 4096)):
            monkeypatch.setattr("megalite.convert.huggingface.LEAST_BYTES", least)
            shape = weights.shape(tensor)
            offset = tuple(draw.randrange(length) for length in shape)
            size = tuple(draw.randint(0, n - start) for n, start in zip(shape, offset))
            box = Box(offset, size)
            whole = weights.read(tensor)
            assert whole.shape == shape and whole.is_contiguous()
            part = weights.read(tensor, box)
            assert torch.equal(part, whole[box.slices_in(Box.whole(shape))])
        with pytest.raises(CheckpointError, match="does not lie in it"):
            weights.read(tensor, Box((0,) * len(shape), tuple(n + 1 for n in shape)))
        with pytest.raises(CheckpointError, match=r"layers.9.mlp_norm.weight is not stored"):
            weights.read("layers.9.mlp_norm.weight")


def test_older_folders_are_read(published, tmp_path):
    """Without the prefix, with buffers, with a copy of the tied weight, with keys of version 4."""
    tensors = load_file(published["gpt2"] / "model.safetensors")
    older = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    for layer in range(3):
        older[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32)
    older["lm_head.weight"] = older["wte.weight"].clone()
    save_file(older, tmp_path / "model.safetensors")
    config = json.loads((published["gpt2"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 32, "torch_dtype": "x"}))
    with (
        HuggingFaceWeights.open(tmp_path) as weights,
        HuggingFaceWeights.open(published["gpt2"]) as wanted,
    ):
        assert weights.names == wanted.names
        assert all(torch.equal(weights.read(n), wanted.read(n)) for n in wanted.names)


# What is refused


def test_a_tied_model_with_another_output_layer_is_refused(published, tmp_path):
    """Which transformers would compute with."""
    folder = shutil.copytree(published["gpt2"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match='differs from .*"tie_word_embeddings": false'):
        HuggingFaceWeights.open(folder)


def folder_with(tmp_path, published, header=None, index=None, **files):
    """A copy of the folder of a Llama with another header, or an index."""
    source = published["llama 2"]
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    content = (source / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    if header is not None:
        entries = json.loads(content[8 : 8 + length])
        text = header(entries)
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(content)
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, text in files.items():
        (tmp_path / name).write_bytes(text)
    return tmp_path


def changed(key: str, **values):
    """A header with another entry."""

    def change(entries):
        entries[key] = entries[key] | values
        return entries

    return change


NORM = "model.norm.weight"
HOSTILE = {
    "a shape that is no size": (changed(NORM, shape=[2**62, 2**62]), "is no size"),
    "a shape that is not its bytes": (changed(NORM, shape=[2**61, 2**61]), "bytes for shape"),
    "a shape below 0": (changed(NORM, shape=[-1, -32]), "is no size"),
    "a place beyond the file": (changed(NORM, data_offsets=[2**40, 2**40 + 128]), "bytes .* of"),
    "tensors that overlap": (changed(NORM, data_offsets=[0, 128]), "overlap"),
    "a name twice": (lambda entries: b'{"a": {}, "a": {}}', "damaged"),
    "a list": (lambda entries: [], "damaged"),
    "no JSON": (lambda entries: b"\x80\x04\x95" * 9, "damaged"),
    "deep JSON": (lambda entries: b"[" * 100_000, "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_header_is_refused(published, tmp_path, name):
    header, words = HOSTILE[name]
    folder = folder_with(tmp_path, published, header)
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceWeights.open(folder)


@pytest.mark.parametrize("length", [0, 2**63, 2**64 - 1, 10**9])
def test_a_header_beyond_the_file_is_refused(published, tmp_path, length):
    folder = folder_with(tmp_path, published)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
    with pytest.raises(CheckpointError, match="no safetensors file"):
        HuggingFaceWeights.open(folder)


def test_a_truncated_file_is_refused(published, tmp_path):
    folder = folder_with(tmp_path, published)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        HuggingFaceWeights.open(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a\\b", "", "x.bin"])
def test_an_index_that_leaves_the_folder_is_refused(published, tmp_path, file):
    folder = folder_with(tmp_path, published, index={"weight_map": {NORM: file}})
    with pytest.raises(CheckpointError, match="unsafe file name|no safetensors file"):
        HuggingFaceWeights.open(folder)


def test_every_missing_tensor_is_listed(published, tmp_path):
    """And those that would be left out, all at once."""
    folder = folder_with(tmp_path, published)
    tensors = load_file(folder / "model.safetensors")
    del tensors[NORM]
    tensors["model.layers.0.mlp.extra"] = torch.ones(1)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        find_tensors(read_published(folder), stored_tensors(folder))
    assert len(str(refused.value).splitlines()) == 4
    for words in (
        f"{NORM} is missing",
        "mlp.extra is no tensor of a LlamaForCausalLM",
        "up_proj.weight has shape (2, 2), config.json says (48, 32)",
    ):
        assert words in str(refused.value)


def test_a_pickle_is_refused_with_how_to_convert_it(published, tmp_path):
    folder = folder_with(tmp_path, published)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle.*from_pretrained.*save_pretrained"):
        HuggingFaceWeights.open(folder)

"""Checkpoints of Megatron-LM. Those in tests/data/megatron were saved by Megatron-core's own models
beside the logits that they computed (benchmarks/peers/megatron_checkpoint.py)."""

import itertools
import os
import pickle
import shutil
import warnings
from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint

from megalite.checkpoint.folder import CheckpointError
from megalite.checkpoint.source import TensorSource
from megalite.config.run import from_flat
from megalite.convert.megatron import open_weights
from megalite.convert.megatron_file import Inert, read_rank_file
from megalite.models.batch import Microbatch
from megalite.models.gpt import GPT
from megalite.parallel.boxes import Box
from megalite.parallel.rng import CounterBasedRng
from megalite.training.build import build_context, build_model
from megalite.training.state import load_weights
from tests.tiny import settings_of

DATA = Path(__file__).parents[1] / "data" / "megatron"
VOCABULARY = 61
FILE = "mp_rank_00/model_optim_rng.pt"


def opened(name: str) -> TensorSource:
    return open_weights(DATA / name, vocab_size=VOCABULARY)


def logits_of_megatron(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [b, s], and the logits of Megatron-core [b, s, v]."""
    stored = torch.load(DATA / name / "logits.pt", weights_only=True)
    return stored["tokens"], stored["logits"]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_logits_are_those_of_megatron_core(name):
    tokens, expected = logits_of_megatron(name)
    with opened(name) as weights:
        model = GPT(settings_of(weights.model)).eval()
        load_weights(weights, model.parameters_by_name)
    with torch.no_grad():
        logits = model(None, Microbatch(tokens=tokens))[..., :VOCABULARY].transpose(0, 1)
    assert_close(logits, expected)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    """Both are computed in fp32, in another order: they differ by some roundings of numbers that
    are below 4."""
    assert expected.abs().max() < 4
    assert (logits - expected).abs().max() < 1e-5


def logits_of_rank(launch, name: str) -> torch.Tensor | None:
    """Those of the vocabulary that this rank holds, on the last stage; tp 2, pp 2 and sequence
    parallelism."""
    tokens, _ = logits_of_megatron(name)
    with opened(name) as weights:
        flags = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
        config = from_flat({**flags, "sequence_parallel": True, "device": "cpu"})
        config = replace(config, model=weights.model)
        context, _ = build_context(config, launch)
        model = build_model(config, context, CounterBasedRng.for_seed(0)).eval()
        load_weights(weights, model.parameters_by_name)
    hidden = None
    if not model.is_first:
        hidden = torch.empty(model.hidden_shape(len(tokens)))
        dist.recv(hidden, launch.rank - 2)
    with torch.no_grad():
        result = model(hidden, Microbatch(tokens=tokens))
    if model.is_last:
        return result
    dist.send(result.contiguous(), launch.rank + 2)
    return None


def test_the_logits_are_those_of_megatron_core_in_another_layout(pool):
    """The gpt was saved on one rank, the llama by tp 2 and pp 2."""
    for name in ("gpt", "llama"):
        _, expected = logits_of_megatron(name)
        shards = pool.run(logits_of_rank, 4, name, timeout=60)
        logits = torch.cat(shards[2:], dim=-1)[..., :VOCABULARY].transpose(0, 1)
        assert_close(logits, expected)


def test_a_box_is_what_the_whole_has_there():
    with opened("llama") as weights:
        for name in weights.names:
            whole = weights.read(name)
            shape = whole.shape
            box = Box(tuple(n // 3 for n in shape), tuple(n - n // 3 - n // 4 for n in shape))
            assert whole.shape == weights.shape(name) and whole.dtype == weights.dtype(name)
            assert torch.equal(weights.read(name, box), whole[box.slices_in(Box.whole(shape))])
        with pytest.raises(CheckpointError, match="does not lie in it"):
            weights.read("output.weight", Box((60, 0), (2, 16)))
        with pytest.raises(CheckpointError, match="output.wieght is not stored"):
            weights.read("output.wieght")


# Other generations of the format.
# ------------------------------------------------------------------------------------------------


def state_of_gpt() -> dict:
    """What the file of the gpt holds, with args as a real namespace."""
    source = opened("gpt")
    file = read_rank_file(DATA / "gpt" / "iter_0000020" / FILE)
    args = {name: value for name, value in source.args.items() if not isinstance(value, Inert)}
    tensors = {name: tensor.clone() for name, tensor in file.chunks[0].items()}
    state = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 20}
    return state | {"model": tensors}


def write(folder: Path, state: dict, rank: str = "mp_rank_00", zipped: bool = True) -> None:
    path = folder / "iter_0000020" / rank
    path.mkdir(parents=True)
    torch.save(state, path / "model_optim_rng.pt", _use_new_zipfile_serialization=zipped)


OLD_NAMES = {
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}


def with_old_names(model: dict, transformer: str) -> dict:
    """The dictionaries of Megatron-LM before its core, nested as they were."""
    embedding = {}
    layers = {}
    for name, tensor in model.items():
        if name.endswith("_extra_state"):
            continue
        if name.startswith("embedding."):
            _, table, kind = name.split(".")
            embedding[table] = {kind: tensor}
            continue
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        layers[name.removeprefix("decoder.")] = tensor
    return {"language_model": {"embedding": embedding, transformer: layers}}


def reordered(tensor: torch.Tensor, version: float) -> torch.Tensor:
    """Rows [heads x 3 x size] of qkv in the order of an older version."""
    by_head = tensor.view(4, 3, 4, *tensor.shape[1:])
    if version == 0:  # all queries, all keys, all values
        return torch.cat([by_head[:, which].flatten(0, 1) for which in range(3)])
    rows = [by_head[head, :, i] for head in range(4) for i in range(4)]  # of 3 each
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("version", "transformer", "zipped"),
    [(0, "transformer", False), (1.0, "transformer", True), (2.0, "encoder", True)],
)
def test_older_versions_hold_the_same_weights(tmp_path, version, transformer, zipped):
    """The orders of qkv of versions 0 and 1, the names before Megatron-core, and files of torch
    before 1.6."""
    state = state_of_gpt()
    args = vars(state["args"])
    args["layernorm_epsilon"] = args.pop("norm_epsilon")
    args["model_parallel_size"] = args.pop("tensor_model_parallel_size")
    for newer in ("pipeline_model_parallel_size", "position_embedding_type", "rotary_base"):
        del args[newer]
    for name, tensor in state["model"].items():
        if "linear_qkv" in name and tensor is not None and version < 2:
            state["model"][name] = reordered(tensor, version)
    state["model"] = with_old_names(state["model"], transformer)
    state["checkpoint_version"] = version
    if version == 0:
        del state["checkpoint_version"]
    write(tmp_path, state, zipped=zipped)
    assert_same(open_weights(tmp_path, 20, VOCABULARY), opened("gpt"))


def assert_same(found: TensorSource, expected: TensorSource) -> None:
    assert found.model == expected.model
    assert list(found.names) == list(expected.names)
    for name in expected.names:
        assert torch.equal(found.read(name), expected.read(name)), name


def test_norms_that_belong_to_the_linear_layer_after_them(tmp_path):
    """As Transformer Engine has them; and the folder of a release, which has no number."""
    state = state_of_gpt()
    model = {}
    for name, tensor in state["model"].items():
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        model[name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = tensor
    write(tmp_path, state | {"model": model})
    (tmp_path / "iter_0000020").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_same(open_weights(tmp_path, vocab_size=VOCABULARY), opened("gpt"))
    assert_same(open_weights(tmp_path / "release", vocab_size=VOCABULARY), opened("gpt"))


def test_layers_of_virtual_stages_are_numbered_through(tmp_path):
    """2 ranks with 2 stages of one layer each: rank 0 holds layers 0 and 2."""
    state = state_of_gpt()
    args = state["args"]
    args.num_layers = 4
    args.pipeline_model_parallel_size = 2
    whole = state.pop("model")
    for rank in range(2):
        chunks = [{}, {}]
        for chunk, name in itertools.product(range(2), whole):
            tensor = whole[name]
            if name.startswith("decoder.layers.0.") and tensor is not None:
                chunks[chunk][name] = tensor + (2 * chunk + rank)
        outer = chunks[0] if rank == 0 else chunks[1]
        prefixes = ("embedding",) if rank == 0 else ("decoder.final",)
        outer |= {name: whole[name] for name in whole if name.startswith(prefixes)}
        if rank == 1:
            outer["output_layer.weight"] = whole["embedding.word_embeddings.weight"]  # the tied one
        write(tmp_path, state | {"model0": chunks[0], "model1": chunks[1]}, f"mp_rank_00_00{rank}")
    weights = open_weights(tmp_path, 20, VOCABULARY)
    with opened("gpt") as source:
        first = source.read("layers.0.mlp.down.weight")
    for layer in range(4):
        assert torch.equal(weights.read(f"layers.{layer}.mlp.down.weight"), first + layer)


def test_the_format_torch_dist_holds_the_same_weights():
    """Saved by the same four ranks, all layers' tensors of a kind as one."""
    with opened("llama") as expected, opened("llama_dist") as found:
        assert_same(found, expected)
        box = Box((1, 0, 2, 3), (1, 2, 2, 9))
        name = "layers.1.attention.qkv.weight"
        assert torch.equal(found.read(name, box), expected.read(name, box))
        with pytest.raises(CheckpointError, match="does not lie in it"):
            found.read(name, Box((2, 0, 0, 0), (1, 1, 1, 1)))


def write_distributed(folder: Path, state: dict) -> None:
    """As `write`, in the format torch_dist: layers one by one, and what is no tensor in a file."""
    path = folder / "iter_0000020"
    model = {name: tensor for name, tensor in state["model"].items() if tensor is not None}
    with warnings.catch_warnings(action="ignore"):
        distributed_checkpoint.save(model, checkpoint_id=path, no_dist=True)
    torch.save({name: state[name] for name in ("args", "iteration")}, path / "common.pt")


def test_layers_that_torch_dist_holds_one_by_one(tmp_path):
    write_distributed(tmp_path, state_of_gpt())
    assert_same(open_weights(tmp_path, 20, VOCABULARY), opened("gpt"))


# What is refused.
# ------------------------------------------------------------------------------------------------


def problems_of(folder: Path, vocab_size: int | None = VOCABULARY) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder, 20, vocab_size)
    return str(caught.value)


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    state = state_of_gpt()
    args = vars(state["args"])
    args |= {"num_experts": 8, "rotary_percent": 0.5, "normalization": "BatchNorm"}
    args |= {"num_layers": 10**12, "norm_epsilon": "small", "kv_channels": -4}
    args |= {"hidden_size": 16.5, "tensor_model_parallel_size": 2}
    write(tmp_path, state)
    said = problems_of(tmp_path, vocab_size=None)
    for words in (
        "num_experts 8: experts",
        "rotary_percent 0.5",
        "normalization 'BatchNorm': possible are LayerNorm, RMSNorm",
        "hidden_size 16.5 is not a whole number",
        "num_layers 1000000000000 is not a whole number from 1",
        "norm_epsilon 'small' is not a number",
        "kv_channels -4 is not",
        "the tensor-parallel size in args is 2, but the files are those of 1",
        "give --vocab-size",
    ):
        assert said.count(words) == 1, said


def test_tensors_that_do_not_fit_are_named(tmp_path):
    state = state_of_gpt()
    model = state["model"]
    model["decoder.layers.1.mlp.gate.weight"] = torch.zeros(2)
    del model["decoder.final_layernorm.bias"]
    model["decoder.layers.0.mlp.linear_fc1.weight"] = torch.zeros(32, 17)
    write(tmp_path, state)
    said = problems_of(tmp_path)
    assert "decoder.layers.1.mlp.gate.weight of stage 0: megalite has no such tensor" in said
    assert "final_norm.bias: no language_model.transformer.final_layernorm.bias or" in said
    assert "rank 0 has shape (32, 17), expected (32, 16)" in said


def test_a_vocabulary_that_contradicts_the_padding():
    for given, rows in ((48, 48), (65, 80)):
        with pytest.raises(CheckpointError, match=f"{rows} rows, the checkpoint has 64"):
            open_weights(DATA / "gpt", vocab_size=given)


def test_files_that_are_missing_or_in_another_format(tmp_path):
    shutil.copytree(DATA / "llama" / "iter_0000020", tmp_path / "iter_0000020")
    shutil.rmtree(tmp_path / "iter_0000020" / "mp_rank_01_000")
    assert "missing:\n  of tensor rank 1, stage 0" in problems_of(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000020")
    assert "iter_0000020 is not a folder" in problems_of(tmp_path)
    (tmp_path / "iter_0000020").mkdir()
    assert "holds no mp_rank_XX" in problems_of(tmp_path)
    path = tmp_path / "iter_0000020" / FILE
    path.parent.mkdir()
    path.write_bytes((DATA / "gpt" / "iter_0000020" / FILE).read_bytes()[:20000])
    assert f"{path} is no checkpoint of Megatron-LM" in problems_of(tmp_path)
    path.write_bytes(b"x\n")
    problem = problems_of(tmp_path)
    assert "it is damaged, or holds what is not read" in problem and "weights_only" not in problem


def test_torch_dist_that_does_not_fit(tmp_path):
    state = state_of_gpt()
    model = state["model"]
    model["decoder.layers.1.mlp.gate.weight"] = torch.zeros(2)
    model["optimizer.state"] = torch.zeros(2)
    del model["decoder.final_layernorm.bias"]
    model["decoder.layers.0.mlp.linear_fc1.weight"] = torch.zeros(32, 17)
    write_distributed(tmp_path, state)
    said = problems_of(tmp_path)
    assert said.count("\n") == 3 and "optimizer" not in said
    assert "decoder.layers.1.mlp.gate.weight: megalite has no such tensor" in said
    assert "has shape (32, 17), expected (32, 16)" in said
    (tmp_path / "iter_0000020" / "common.pt").unlink()
    assert "has no readable common.pt" in problems_of(tmp_path)
    with open(tmp_path / "iter_0000020" / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    assert "__0_0.distcp has 1000 bytes, not " in problems_of(tmp_path)


def test_a_bert_is_refused(tmp_path):
    state = state_of_gpt()
    state["model"]["lm_head.dense.weight"] = torch.zeros(16, 16)
    write(tmp_path, state)
    assert "the model is a BERT" in problems_of(tmp_path)


class Hostile:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, print, shutil.rmtree])
def test_a_hostile_file_runs_nothing(tmp_path, capsys, function, zipped):
    """The file is refused, or read without calling what it names."""
    trap = tmp_path / "trap"
    argument = {os.system: f"mkdir {trap}", eval: f"__import__('os').mkdir({str(trap)!r})"}
    if function is shutil.rmtree:
        trap.mkdir()
    state = state_of_gpt()
    state["args"].evil = Hostile(function, argument.get(function, str(trap)))
    write(tmp_path, state, zipped=zipped)
    with suppress(CheckpointError):
        open_weights(tmp_path, 20, VOCABULARY)
    assert trap.exists() == (function is shutil.rmtree)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, print, shutil.rmtree])
def test_a_hostile_list_of_tensors_runs_nothing(tmp_path, capsys, function):
    """`.metadata` is a pickle, of which only data is taken; so is a name that leaves the folder."""
    trap = tmp_path / "trap"
    if function is shutil.rmtree:
        trap.mkdir()
    argument = {os.system: f"mkdir {trap}", eval: f"__import__('os').mkdir({str(trap)!r})"}
    write_distributed(tmp_path, state_of_gpt())
    path = tmp_path / "iter_0000020" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Hostile(function, argument.get(function, str(trap)))
    path.write_bytes(pickle.dumps(metadata))
    assert_same(open_weights(tmp_path, 20, VOCABULARY), opened("gpt"))
    assert trap.exists() == (function is shutil.rmtree)
    assert capsys.readouterr().out == ""


def test_shapes_that_are_not_there_are_refused(tmp_path):
    """A header of any size, and a tensor that says more than is stored."""
    state = state_of_gpt()
    state["model"]["decoder.final_layernorm.bias"] = torch.zeros(1).expand(2**40)
    write(tmp_path, state)
    assert "decoder.final_layernorm.bias has shape (1099511627776,)" in problems_of(tmp_path)
    shutil.rmtree(tmp_path / "iter_0000020")
    state = state_of_gpt()
    write_distributed(tmp_path, state)
    path = tmp_path / "iter_0000020" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    huge = torch.Size([2**40])
    bias = metadata.state_dict_metadata["decoder.final_layernorm.bias"]
    metadata.state_dict_metadata["decoder.final_layernorm.bias"] = replace(
        bias, size=huge, chunks=[replace(bias.chunks[0], sizes=huge)]
    )
    path.write_bytes(pickle.dumps(metadata))
    assert "does not fit in" in problems_of(tmp_path)


def test_a_hostile_name_of_a_file_is_refused(tmp_path):
    write_distributed(tmp_path, state_of_gpt())
    path = tmp_path / "iter_0000020" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../secret.pt"))
    assert "unsafe file name '../secret.pt'" in problems_of(tmp_path)

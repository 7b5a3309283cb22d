"""Twenty steps from a folder of Hugging Face: the losses are those of transformers and AdamW."""

import importlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megalite.config.run import RunConfig
from megalite.data.build import blended, build_sources
from tests.convert.published_models import SEQUENCE, WHOLE, load
from tests.runs import ALONE, Run, console_of, sound

STEPS = 20
BATCH = 4
FLAGS = {
    "mock_data": True,
    "precision": "fp64",
    "seq_length": SEQUENCE,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "global_batch_size": BATCH,
    "micro_batch_size": 2,
    "train_iters": STEPS,
    "lr": 1e-3,
    "lr_decay_style": "constant",
    "weight_decay": 0.1,
    "eval_interval": 0,
    "eval_iters": 0,
    "metrics_file": "metrics.jsonl",
    "device": "cpu",
}
LLAMA3_ANGLES = 2**-23 * SEQUENCE
"""transformers rounds the frequencies of `llama3` to fp32, and with them the angles of positions up
to s, in radians."""


@pytest.fixture
def double(monkeypatch):
    """transformers computes norms, softmax and angles in fp32 whatever the model's dtype; what its
    modules know as float32 is made float64."""
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        names = {"float32": torch.float64, "float": torch.float64}
        monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), **names}))


def their_losses(folder, config: RunConfig) -> list[float]:
    """Train the model of transformers on the same samples with torch's AdamW."""
    model = load(folder).double()
    for module in model.modules():  # what was made in fp32 when the model was loaded
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "inv_freq" and module.rope_type == "default":
                sizes = torch.arange(0, 2 * len(buffer), 2).double() / (2 * len(buffer))
                module.inv_freq = 10000.0**-sizes
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    samples = {"train": STEPS * BATCH}
    data = blended(
        build_sources(config.data, config.model, config.training.seed, samples, config.bert)[
            "train"
        ]
    )
    losses = []
    for step in range(STEPS):
        rows = [data[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        optimizer.zero_grad()
        loss = (their_bert_loss if config.model.architecture == "bert" else their_loss)(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def their_loss(model, rows) -> torch.Tensor:
    rows = torch.from_numpy(np.stack(rows)).long()
    logits = model(rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def their_bert_loss(model, rows) -> torch.Tensor:
    batch = {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}
    chosen = batch["loss_mask"] > 0
    output = model(
        batch["tokens"].long(),
        attention_mask=batch["segments"],
        token_type_ids=batch["token_types"].long(),
    )
    pairs = "prediction_logits" in output
    logits = output.prediction_logits if pairs else output.logits
    loss = cross_entropy(logits[chosen], batch["labels"][chosen].long())
    if pairs:
        loss = loss + cross_entropy(output.seq_relationship_logits, batch["pair_label"])
    return loss


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", WHOLE)
def test_twenty_steps_are_theirs(published, name, tmp_path):
    """In fp64 to 1e-9; with scaled RoPE to what its rounded angles can change."""
    config = sound({"load_hf": str(published[name]), **FLAGS}, 1, tmp_path)
    console = console_of(ALONE, config, tmp_path)
    assert "all else starts from scratch" in console
    found = Run(console, tmp_path).column("loss")
    wanted = their_losses(published[name], config)
    assert len(found) == STEPS
    assert max(wanted) - min(wanted) > 0.1
    bound = LLAMA3_ANGLES * math.sqrt(STEPS) if name == "llama 3.1" else 1e-9
    assert found == pytest.approx(wanted, rel=bound)


def test_a_layout_trains_alike(published, pool, tmp_path):
    """tp=2 x pp=2 with sequence parallelism gives the losses of one process; bf16 starts from the
    same one, to a rounding of each of three layers."""
    flags = {"load_hf": str(published["qwen3"]), **FLAGS, "train_iters": 3}
    one = sound(flags, 1, tmp_path / "one")
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    layout["sequence_parallel"] = True
    four = sound(flags | layout, 4, tmp_path / "four")
    wanted = Run(console_of(ALONE, one, tmp_path / "one"), tmp_path / "one").losses
    console = pool.run(console_of, 4, four, tmp_path / "four")[0]
    assert Run(console, tmp_path / "four").losses == pytest.approx(wanted, rel=1e-9)
    half = flags | {"precision": "bf16", "train_iters": 1}
    rounded = sound(half, 1, tmp_path / "half")
    losses = Run(console_of(ALONE, rounded, tmp_path / "half"), tmp_path / "half").losses
    assert losses[0] == pytest.approx(wanted[0], rel=3 * 2**-8)

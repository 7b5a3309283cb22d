"""NVIDIA apex: recognised by its contents, and called as it publishes. On a CPU, with stand-ins:
apex itself has not been run."""

import sys
from pathlib import Path

import pytest
import torch

from megalite.config import validate
from megalite.config.run import from_flat
from megalite.nn.norm import Norm, apex_norm
from megalite.optim.apex_adam import adam_backend, apex_adam
from megalite.optim.config import OptimizerConfig
from megalite.optim.optimizer import groups_by_rule
from megalite.parallel.context import DeviceError
from megalite.system.apex import ADAM, NORMS, why_no_apex
from tests.config.validation import SOUND
from tests.layouts import GPT2, LLAMA, Layout, configuration
from tests.tiny import build, settings_of

PACKAGES = Path(__file__).resolve().parents[1] / "packages"
FP32 = {"precision": "fp32", "train_iters": 6}


@pytest.fixture
def package(monkeypatch):
    """Puts a folder of packages first on the path."""
    before = set(sys.modules)
    yield lambda name: monkeypatch.syspath_prepend(PACKAGES / name)
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("apex", ADAM, NORMS):
            del sys.modules[name]


def test_it_is_recognised_by_its_contents(package, monkeypatch, tmp_path):
    assert why_no_apex(ADAM) == "apex is not installed"
    package("other")
    assert "is not NVIDIA's (PyPI's apex is another project: pip uninstall" in why_no_apex(ADAM)
    # An installation without its kernels.
    (tmp_path / "apex").symlink_to(PACKAGES / "nvidia" / "apex")
    monkeypatch.syspath_prepend(tmp_path)
    for kernels in (ADAM, NORMS):
        assert f"without its CUDA kernels ({kernels})" in why_no_apex(kernels)
    package("nvidia")
    assert why_no_apex(ADAM) == why_no_apex(NORMS) == ""
    assert not {"apex", ADAM, NORMS} & set(sys.modules)


@pytest.mark.parametrize("key", ["optimizer_backend", "norm_backend"])
def test_what_is_demanded_must_be_there(package, key):
    """And a GPU with it. The fix is to install it, or to do without."""
    flag = "--" + key.replace("_", "-")
    demanded = from_flat(SOUND | {key: "apex"})
    (problem,) = validate.check(demanded, 1)
    assert problem.message == f"{flag} apex: apex is not installed"
    assert f"leave out {flag}" in problem.fix and "github.com/NVIDIA/apex" in problem.fix
    package("nvidia")
    assert validate.check(demanded, 1) == []
    for other, words in ((dict(device="cpu"), "needs a GPU"), (dict(precision="fp64"), "no fp64")):
        (problem,) = validate.check(from_flat(SOUND | other | {key: "apex"}), 1)
        assert flag in problem.message and words in problem.message
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match=f"{flag} apex needs a GPU, but this runs on cpu"):
            build(**FP32, **{key: "apex"})


def test_what_auto_takes(package):
    gpu = torch.device("cuda", 0)
    assert adam_backend(OptimizerConfig(), torch.device("cpu")) == ("torch", "apex needs a GPU")
    assert adam_backend(OptimizerConfig(), gpu) == ("torch", "apex is not installed")
    package("nvidia")
    assert adam_backend(OptimizerConfig(), gpu) == ("apex", "it is installed")
    assert adam_backend(OptimizerConfig(precision="fp64"), gpu)[0] == "torch"
    assert adam_backend(OptimizerConfig(optimizer_backend="torch"), gpu)[0] == "torch"


def with_apex(**flags):
    """A tiny run whose AdamW is apex's."""
    tiny = build(**flags)
    optimizer = tiny.components.optimizer
    groups = [
        *groups_by_rule(optimizer.treatments, optimizer.master)["adam"],
        {"params": [], "names": [], "all_names": []},
    ]
    optimizer.inner["adam"] = apex_adam(groups, tiny.config.optimizer)
    return tiny


def test_steps_equal_torchs(package):
    package("nvidia")
    flags = FP32 | {"adam_eps": 1e-4, "weight_decay": 0.3, "adam_beta2": 0.95}
    flags["parameter_groups"] = ("layers.0.* lr_factor=0.5", "layers.1.* freeze")
    ours = with_apex(**flags)
    torchs = build(**flags)
    for iteration in range(1, 4):
        ours.train(iteration)
        torchs.train(iteration)
    masters = torchs.components.optimizer.master
    for name, master in ours.components.optimizer.master.items():
        torch.testing.assert_close(master, masters[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_restored_optimizer_goes_on_to_the_bit(package):
    package("nvidia")
    first = with_apex(**FP32)
    for iteration in (1, 2):
        first.train(iteration)
    second = with_apex(**FP32)
    with torch.no_grad():
        for name, parameter in second.components.model.parameters_by_name.items():
            parameter.copy_(first.components.model.parameters_by_name[name])
        pairs = zip(first.components.optimizer.state(), second.components.optimizer.state())
        for (kind, name, stored), (*other, tensor) in pairs:
            assert [kind, name] == other
            tensor.copy_(stored)
    second.components.optimizer.set_steps(first.components.optimizer.steps)
    assert first.train(3) == second.train(3)
    for name, parameter in first.components.model.parameters_by_name.items():
        assert torch.equal(parameter, second.components.model.parameters_by_name[name]), name


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["LayerNorm", "RMSNorm"])
def test_norms_equal_ours(package, shape):
    package("nvidia")
    norms = {}
    for backend in ("auto", "torch"):
        config = configuration(Layout("any", shape=shape), norm_backend=backend)
        norms[backend] = Norm(settings_of(config.model, dtype=torch.float32))
    x = torch.randn(6, 2, shape.hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for norm in norms.values():
            norm.weight.copy_(torch.linspace(0.5, 2, shape.hidden))
    ours = norms["auto"]
    expected = ours(x)
    torch.testing.assert_close(apex_norm(x, ours.weight, ours.bias, ours.epsilon), expected)
    torch.testing.assert_close(norms["torch"](x), expected)

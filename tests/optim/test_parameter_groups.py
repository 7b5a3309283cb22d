"""--parameter-groups and --decoupled-lr: which parameters they change, and how, in every layout."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalite.config import cli, validate
from megalite.config.estimate import estimate_ranks
from megalite.config.run import from_flat
from megalite.config.yaml_file import to_yaml
from megalite.optim.config import EXAMPLE_GROUPS, OptimizerConfig
from megalite.optim.treatment import ParameterGroup, Treatment, parse_group, treatment_of
from tests.config.validation import SOUND, assert_one_problem, problems_of, write
from tests.layouts import GPT2, LLAMA, OVERLAP, ZERO, Layout, as_bert, configuration, sp
from tests.optim.test_update_rules import training_on_rank
from tests.test_layouts import largest_difference
from tests.tiny import build

FLAGS = {
    "parameter_groups": (
        "layers.* lr_factor=0.5",
        "layers.[12].mlp.* lr_factor=2 weight_decay=0.7",
        "*embeddings.weight freeze",
        "layers.0.* freeze",
        "layers.0.mlp.up.bias train",
    ),
    "decoupled_lr": 0.05,
    "decoupled_min_lr": 0.02,
    # A key's bias has no gradient but rounding, which AdamW divides by epsilon.
    "adam_eps": 1e-4,
}
FIRST_STAGE = {**FLAGS, "parameter_groups": ("embedding.* freeze", "layers.[01].* freeze")}
"""All that the first of two stages holds; a tied embedding is on the last one as well."""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "optimizer.md"
BIASED = replace(LLAMA, bias=True)
ALL = ZERO | OVERLAP | {"overlap_param_gather": True}


def test_what_a_group_says():
    group = parse_group("layers.[0-3].*  lr_factor=0.5 weight_decay=0")
    assert group == ParameterGroup("layers.[0-3].*", lr_factor=0.5, weight_decay=0.0)
    assert group.matches("layers.3.mlp.up.weight") and not group.matches("layers.13.mlp.up.weight")
    assert parse_group("* freeze").frozen is True and parse_group("* train").frozen is False


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs a pattern and one or more of"),
        ("embedding.*", "needs a pattern and one or more of lr_factor=NUMBER"),
        ("embedding.* lr=0.1", "'lr=0.1' is none of lr_factor=NUMBER"),
        ("embedding.* lr_factor", "'lr_factor' is none of"),
        ("embedding.* lr_factor=x", "'lr_factor=x': a number of at least 0"),
        ("embedding.* weight_decay=-1", "'weight_decay=-1': a number of at least 0"),
        ("embedding.* weight_decay=nan", "a number of at least 0"),
        ("embedding.* lr_factor=1 lr_factor=2", "'lr_factor=2' is the second setting"),
        ("embedding.* freeze train", "'train' is the second setting"),
        ("embedding.* freeze lr_factor=2", "what is frozen has no learning rate"),
    ],
)
def test_what_cannot_be_read_is_a_problem_of_the_configuration(text, words):
    (problem,) = validate.check(from_flat(SOUND | {"parameter_groups": (text,)}), 1)
    assert words in problem.message and "--parameter-groups" in problem.message
    if text:  # the option itself refuses an empty text
        with pytest.raises(ValueError, match=r"\S"):
            parse_group(text)


def test_a_pattern_that_matches_nothing_is_a_problem():
    """Whatever the stage that would have held the parameter."""
    for pattern, near in (
        ("layer.0.*", "such as layers.0.*"),
        ("layers.12.*", "such as layers.2.*"),
        ("pooler.*", ""),
    ):
        flags = SOUND | {"parameter_groups": ("embedding.* freeze", f"{pattern} freeze")}
        assert_one_problem(from_flat(flags), 1, pattern, least_offers=0)
        (problem,) = validate.check(from_flat(flags | {"pipeline_model_parallel_size": 2}), 2)
        assert near in problem.fix, problem
    bert = SOUND | {"architecture": "bert", "parameter_groups": ("pooler.* freeze",)}
    assert validate.check(from_flat(bert), 1) == []


def test_groups_in_a_file_and_on_the_command_line(tmp_path):
    text = "parameter_groups:\n" + "".join(f'  - "{group}"\n' for group in EXAMPLE_GROUPS)
    expected = from_flat({"parameter_groups": EXAMPLE_GROUPS})
    assert cli.read_config(["--config", write(tmp_path, text)]) == expected
    assert cli.read_config(["--parameter-groups", *EXAMPLE_GROUPS]) == expected
    assert cli.read_config(["--config", write(tmp_path, to_yaml(expected))]) == expected
    (shown,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert cli.read_config(["--config", write(tmp_path, shown)]) == expected
    (line,) = re.findall(r"^or `(--parameter-groups .*)`\.$", DOCS.read_text(), re.MULTILINE)
    assert cli.read_config(shlex.split(line)) == expected
    nested = "parameter_groups:\n  - pattern: embedding.*\n    lr_factor: 0.1\n"
    assert "parameter_groups" in problems_of("--config", write(tmp_path, nested))[0]


def test_the_last_of_several_settings_counts():
    config = OptimizerConfig(**FLAGS)
    assert treatment_of("layers.1.mlp.up.weight", True, config) == Treatment(
        "adam", True, lr_factor=2.0, weight_decay=0.7
    )
    assert treatment_of("layers.3.mlp.up.weight", True, config).lr_factor == 0.5
    assert treatment_of("layers.0.mlp.up.weight", True, config).frozen
    assert not treatment_of("layers.0.mlp.up.bias", False, config).frozen


def test_rates_decays_and_frozen_weights_by_hand():
    """Against torch's AdamW with a group for each parameter."""
    tiny = build(Layout("llama", shape=BIASED), **FLAGS, clip_grad=0.0)
    options = tiny.config.optimizer
    parameters = tiny.components.model.parameters_by_name
    copies = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    groups = [{"params": [copy], "name": name} for name, copy in copies.items()]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-4, foreach=False)
    frozen = {
        name
        for name in parameters
        if name.startswith(("embedding.", "layers.0.")) and name != "layers.0.mlp.up.bias"
    }
    for iteration in range(1, 4):
        tiny.gradient(8 * (iteration - 1))
        trained = [p.main_grad for name, p in parameters.items() if name not in frozen]
        norm = torch.cat([gradient.flatten() for gradient in trained]).norm()
        for group in reference.param_groups:
            name = group["name"]
            if name in frozen:
                continue
            copies[name].grad = parameters[name].main_grad.clone()
            schedule = tiny.config.schedule()
            if name == "output.weight":
                schedule = replace(schedule, config=replace(options, lr=0.05, min_lr=0.02))
            group["lr"] = schedule.learning_rate(iteration)
            group["weight_decay"] = 0.0 if name.endswith(("bias", "norm.weight")) else 0.1
            if name.startswith("layers."):
                group["lr"] *= 0.5
            if ".mlp." in name and name.startswith(("layers.1.", "layers.2.")):
                group["lr"] *= 4
                group["weight_decay"] = 0.7
        result = tiny.components.optimizer.step(iteration)
        reference.step()
        assert result.gradient_norm == pytest.approx(norm.item(), rel=1e-12)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.detach(), copies[name].detach(), rtol=1e-10, atol=1e-12, msg=name
        )
    start = build(Layout("llama", shape=BIASED)).components.model
    kept = {name for _, name, _ in tiny.components.optimizer.state()}
    for name, first in start.parameters_by_name.items():
        assert torch.equal(first, parameters[name]) == (name in frozen) == (name not in kept), name


LAYOUTS = [
    (Layout("dp2 x tp2 x pp2 + sp, zero, overlapped", 2, 2, 2, flags=sp(**ALL)), FLAGS),
    (Layout("bert tp2 x pp2", tp=2, pp=2, shape=as_bert(GPT2)), FLAGS),
    (Layout("pp2, first stage frozen", pp=2), FIRST_STAGE),
    (Layout("dp2 x pp2, first stage frozen", dp=2, pp=2), FIRST_STAGE),
    (Layout("dp2 x pp2, first stage frozen, zero", dp=2, pp=2, flags=ALL), FIRST_STAGE),
]


@pytest.mark.parametrize(("layout", "flags"), LAYOUTS, ids=lambda value: getattr(value, "name", ""))
def test_weights_are_the_same_in_every_layout(pool, layout, flags):
    (expected,) = pool.run(training_on_rank, 1, Layout("single", shape=layout.shape), flags)
    results = pool.run(training_on_rank, layout.world_size, layout, flags)
    for i, part in enumerate(expected):
        wanted = {name: values for name, _, values in part}
        shapes = {name: values.shape for name, values in wanted.items()}
        found = [box for result in results for box in result[i]]
        assert largest_difference(found, wanted, shapes) < 1e-9


def test_the_estimate_knows_what_is_frozen_and_what_a_rule_keeps():
    def state_bytes(**flags) -> float:
        config = configuration(Layout("single", shape=BIASED), precision="bf16", **flags)
        return estimate_ranks(config, 1)[0].state_bytes

    tiny = build(Layout("single", shape=BIASED)).components.model.parameters_by_name
    embedding = tiny["embedding.word_embeddings.weight"].numel()
    matrices = sum(
        p.numel() for n, p in tiny.items() if n.startswith("layers.") and p.spec.weight_decay
    )
    everything = state_bytes()
    assert state_bytes(parameter_groups=("embedding.* freeze",)) == everything - 16 * embedding
    assert state_bytes(optimizer="muon") == everything - 4 * matrices

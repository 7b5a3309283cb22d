"""What the flags do that Megatron-LM has for checkpoints, for test_flags; and those that say what
may change when a run resumes."""

from tests import runs
from tests.checks import from_to, has, losses_from, says
from tests.config.flag_effects import (
    HIDDEN,
    LAYERS,
    LONGER,
    RESUMED,
    SAVES,
    STREAMS,
    Effect,
    effect,
)

FIRST_RUN = {"save": "saved", "load": "saved"}
CHECKPOINT_FLAGS: dict[str, list[Effect]] = {
    "no_save_optim": [
        effect(True, from_to({"exp_avg", "exp_avg_sq"}, set()), base=SAVES, observe=runs.kept_state)
    ],
    "no_save_rng": [
        effect(
            True,
            from_to({"exp_avg", "exp_avg_sq", "streams"}, {"exp_avg", "exp_avg_sq"}),
            base={**SAVES, **STREAMS, "hidden_dropout": 0.1},
            observe=runs.kept_state,
        )
    ],
    "exit_on_missing_checkpoint": [
        effect(
            True,
            says("holds no checkpoint yet, and --exit-on-missing-checkpoint is given"),
            base=FIRST_RUN,
            observe=runs.refusal_or_run,
        )
    ],
    "pretrained_checkpoint": [effect("../trained", losses_from(1), base=LONGER)],
    "use_checkpoint_args": [
        effect(
            True,
            has(num_layers=LAYERS, hidden_size=HIDDEN),
            base={"load": "../trained"},
            observe=runs.of_the_command_line,
        )
    ],
    "allow_model_change": [
        effect(
            True,
            says(
                "changed since the checkpoint was made: norm_epsilon 1e-05 -> 0.001",
                instead_of="has norm_epsilon 1e-05, this run has 0.001",
            ),
            base={**RESUMED, "norm_epsilon": 1e-3},
            observe=runs.refusal_or_run,
        )
    ],
}

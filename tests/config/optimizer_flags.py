"""What each flag of the optimizer does, for test_flags."""

import torch

from tests import runs
from tests.checks import (
    becomes,
    from_to,
    losses_from,
    other_rounding,
    rates,
    reported,
    same_first_norm,
    same_losses,
    says,
)
from tests.config.flag_effects import (
    HIDDEN,
    LAYERS,
    SAVES,
    SGD,
    WARMED_UP,
    Effect,
    effect,
    half_cosine,
)

LION = {"optimizer": "lion"}
MUON = {"optimizer": "muon"}
WSD_OF_TWO = {"lr_wsd_decay_iters": 2}
WSD = {"lr_decay_style": "WSD", **WSD_OF_TWO}
GROWING = {"start_weight_decay": 0.0, "end_weight_decay": 0.5}
SCALED = {"fp16": True, "initial_loss_scale": 64.0, "loss_scale_window": 3}
FALLS = [64, 32, 16, 8, 8, 8, 16, 16, 16, 32]
"""The loss scale after four steps that overflow and six that do not."""


def scales(value: float, after: list[float]) -> Effect:
    """An effect on the loss scale, which falls as FALLS without it."""
    return effect(value, from_to(FALLS, after), base=SCALED, observe=runs.loss_scales)


OPTIMIZER_FLAGS: dict[str, list[Effect]] = {
    "optimizer": [
        effect("sgd", same_first_norm, losses_from(2)),
        effect("muon", same_first_norm, losses_from(2)),
        # Adam's first step is a sign, too.
        effect("lion", same_first_norm, losses_from(3)),
    ],
    "optimizer_backend": [
        effect("torch", same_losses, says("AdamW: torch (--optimizer-backend torch)")),
        effect(
            "apex",
            says("--optimizer-backend apex needs a GPU, but there is --device cpu"),
            observe=runs.complaints,
        ),
    ],
    "precision": [
        effect("bf16", becomes("dtype", torch.bfloat16), other_rounding, base=SAVES),
        effect(
            "fp16",
            becomes("dtype", torch.float16),
            other_rounding,
            base=SAVES,
            also={"loss_scale": 1024.0},
        ),
        effect("fp64", becomes("dtype", torch.float64), other_rounding, base=SAVES),
    ],
    "fp16": [
        effect(
            True,
            becomes("dtype", torch.float16),
            other_rounding,
            base=SAVES,
            also={"loss_scale": 1024.0},
        )
    ],
    "loss_scale": [
        effect(
            8.0,
            from_to([2.0**n for n in (32, 31, 30, *7 * [29])], 10 * [8.0]),
            base={"fp16": True},
            observe=runs.loss_scales,
        )
    ],
    "initial_loss_scale": [scales(32.0, [32, 16, 8, 4, 4, 4, 8, 8, 8, 16])],
    "min_loss_scale": [scales(16.0, [64, 32, 16, 16, 16, 16, 32, 32, 32, 64])],
    "loss_scale_window": [scales(2, [64, 32, 16, 8, 8, 16, 16, 32, 32, 64])],
    "hysteresis": [scales(1, [32, 16, 8, 4, 4, 4, 8, 8, 8, 16])],
    "bf16": [effect(True, becomes("dtype", torch.bfloat16), other_rounding, base=SAVES)],
    "lr": [effect(0.02, rates(*half_cosine(0.02, 0.002)))],
    "min_lr": [effect(0.01, rates(*half_cosine(0.05, 0.01)))],
    "lr_decay_style": [
        effect("linear", rates(0.03875, 0.0275, 0.01625, 0.005)),
        effect("constant", rates(0.05, 0.05, 0.05, 0.05)),
        effect("inverse-square-root", rates(0.05, 0.05 * 0.5**0.5, 0.05 / 3**0.5, 0.025)),
        effect("WSD", rates(0.05, 0.05, 0.005 + 0.045 * (2**0.5 - 1), 0.005), also=WSD_OF_TWO),
    ],
    "lr_wsd_decay_style": [
        effect("linear", rates(0.05, 0.05, 0.0275, 0.005), base=WSD),
        effect("cosine", rates(0.05, 0.05, 0.0275, 0.005), base=WSD),
        effect("minus_sqrt", rates(0.05, 0.05, 0.005 + 0.045 * (1 - 0.5**0.5), 0.005), base=WSD),
    ],
    "lr_wsd_decay_iters": [effect(1, rates(0.05, 0.05, 0.05, 0.005), base=WSD)],
    "lr_wsd_decay_samples": [
        effect(
            8,
            rates(0.05, 0.05, 0.005 + 0.045 * (2**0.5 - 1), 0.005),
            base={"lr_decay_style": "WSD", "lr_wsd_decay_samples": 4},
        )
    ],
    "lr_warmup_init": [effect(0.01, rates(0.03, *WARMED_UP[1:]), base={"lr_warmup_iters": 2})],
    "weight_decay_incr_style": [
        effect("linear", losses_from(2), also=GROWING),
        effect("cosine", losses_from(2), also=GROWING),
    ],
    "start_weight_decay": [
        effect(1.0, losses_from(2), base={**GROWING, "weight_decay_incr_style": "linear"})
    ],
    "end_weight_decay": [
        effect(2.0, losses_from(2), base={**GROWING, "weight_decay_incr_style": "linear"})
    ],
    "lr_decay_iters": [effect(2, rates(0.0275, 0.005, 0.005, 0.005))],
    "lr_decay_samples": [effect(8, rates(0.0275, 0.005, 0.005, 0.005))],
    "lr_warmup_iters": [effect(2, rates(*WARMED_UP))],
    "lr_warmup_samples": [effect(8, rates(*WARMED_UP))],
    "lr_warmup_fraction": [effect(0.5, rates(*WARMED_UP))],
    "weight_decay": [effect(1.0, losses_from(2))],
    # Adam's first step does not depend on the betas: they cancel in its bias correction.
    "adam_beta1": [effect(0.5, losses_from(3))],
    "adam_beta2": [effect(0.5, losses_from(3))],
    "adam_eps": [effect(0.1, losses_from(2))],
    "sgd_momentum": [effect(0.0, losses_from(3), base=SGD)],
    # Nor does the first step of Lion and Muon.
    "lion_beta1": [effect(0.5, losses_from(3), base=LION)],
    "lion_beta2": [effect(0.5, losses_from(3), base=LION)],
    "muon_momentum": [effect(0.5, losses_from(3), base=MUON)],
    "muon_nesterov": [effect(True, losses_from(3), base=MUON)],
    "muon_num_ns_steps": [effect(2, losses_from(2), base=MUON)],
    "muon_coefficient_type": [effect("simple", losses_from(2), base=MUON)],
    "muon_scale_mode": [
        effect(mode, losses_from(2), base=MUON) for mode in ("unit_rms_norm", "shape_scaling")
    ],
    "muon_extra_scale_factor": [effect(0.2, losses_from(2), base=MUON)],
    "decoupled_lr": [effect(0.5, losses_from(2))],
    "decoupled_min_lr": [effect(0.4, losses_from(2), base={"decoupled_lr": 0.5})],
    "parameter_groups": [
        effect(
            ("layers.0.* lr_factor=0.5", "*.qkv.weight freeze"),
            losses_from(2),
            says(f"of which {LAYERS * 3 * HIDDEN**2:,} are frozen"),
        )
    ],
    "clip_grad": [effect(0.1, same_first_norm, losses_from(2), base=SGD)],
    "max_bad_steps": [effect(2, from_to("go stop", "go skip skip stop"), observe=runs.bad_steps)],
    "skip_grad_norm_above": [
        effect(
            2.5,
            from_to("go go skip", "go skip skip"),
            base={"max_bad_steps": 2},
            observe=runs.outlying_steps,
        )
    ],
    "log_params_norm": [effect(True, reported("params_norm"), same_losses)],
    "log_num_zeros_in_grad": [effect(True, reported("zeros_in_grad"), same_losses)],
    "log_norms_per_layer": [
        effect(True, reported("grad_norm/layers.1"), reported("params_norm/embedding"), same_losses)
    ],
}

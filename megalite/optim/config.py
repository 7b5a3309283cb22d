"""Optimizer, precision and learning rate. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megalite.fields import Field

MOMENTS = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "muon": ("momentum_buffer",),
}
"""What each update rule keeps of a parameter from step to step: names of tensors of its shape."""
EXAMPLE_GROUPS = ("embedding.* lr_factor=0.1 weight_decay=0", "layers.[0-3].* freeze")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, precision and learning-rate schedule."""

    optimizer: Literal["adam", "sgd", "lion", "muon"] = "adam"
    """adam: AdamW (decoupled weight decay); sgd: SGD with momentum; lion: Lion; muon: Muon for the
    matrices of the layers, AdamW for all else."""
    optimizer_backend: Annotated[Literal["auto", "torch", "apex"], Field(changes_numbers=False)] = (
        "auto"
    )
    """What computes AdamW: torch's fused kernel, or FusedAdam of NVIDIA apex. auto: apex where it
    is installed and the device is a GPU."""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16 and fp16 keep fp32 master weights and accumulate gradients in fp32; fp16 scales the
    loss; fp64 is for proofs."""
    bf16: bool = False
    """Short for --precision bf16."""
    fp16: bool = False
    """Short for --precision fp16."""
    loss_scale: Annotated[float | None, Field(above=0)] = None
    """Constant factor of the loss in fp16. Unset: the factor adapts."""
    initial_loss_scale: Annotated[float, Field(above=0)] = 2.0**32
    """Factor of the loss in fp16 at the start."""
    min_loss_scale: Annotated[float, Field(above=0)] = 1.0
    """Smallest factor of the loss. A gradient that overflows even then ends the run."""
    loss_scale_window: Annotated[int, Field(minimum=1)] = 1000
    """Steps in a row without overflow after which the factor is doubled."""
    hysteresis: Annotated[int, Field(minimum=1)] = 2
    """Overflows from which on each halves the factor; counted again once it has been doubled."""
    lr: Annotated[float, Field(above=0)] = 3e-4
    """Highest learning rate, after the warm-up."""
    min_lr: Annotated[float | None, Field(minimum=0, example=3e-5)] = None
    """Learning rate at the end of the decay and after it. Unset: a tenth of --lr."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay from --lr to --min-lr. WSD: --lr, and a decay at the end."""
    lr_decay_iters: Annotated[int | None, Field(minimum=1)] = None
    """Iteration at which --min-lr is reached, warm-up included. Unset: --train-iters."""
    lr_decay_samples: Annotated[int | None, Field(minimum=1)] = None
    """Consumed sequences at which --min-lr is reached, in place of --lr-decay-iters."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay of WSD."""
    lr_wsd_decay_iters: Annotated[int | None, Field(minimum=1)] = None
    """Iterations of the decay of WSD, the last ones before --lr-decay-iters."""
    lr_wsd_decay_samples: Annotated[int | None, Field(minimum=1)] = None
    """Sequences of the decay of WSD, the last ones before --lr-decay-samples."""
    lr_warmup_init: Annotated[float, Field(minimum=0)] = 0.0
    """Learning rate that the warm-up starts from."""
    lr_warmup_iters: Annotated[int, Field(minimum=0)] = 0
    """Iterations of linear warm-up from --lr-warmup-init to --lr."""
    lr_warmup_samples: Annotated[int | None, Field(minimum=0)] = None
    """Sequences of linear warm-up, in place of --lr-warmup-iters."""
    lr_warmup_fraction: Annotated[float | None, Field(minimum=0, below=1)] = None
    """Warm-up as a fraction of the decay's iterations or samples, in place of --lr-warmup-iters."""
    weight_decay: Annotated[float, Field(minimum=0)] = 0.01
    """Weight decay; biases and norms are left out. Decoupled, but added to the gradient in sgd."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """constant: --weight-decay; linear, cosine: from --start-weight-decay to --end-weight-decay at
    the last iteration."""
    start_weight_decay: Annotated[float | None, Field(minimum=0)] = None
    """Weight decay at the start, where it changes."""
    end_weight_decay: Annotated[float | None, Field(minimum=0)] = None
    """Weight decay at the last iteration, where it changes."""
    adam_beta1: Annotated[float, Field(minimum=0, below=1)] = 0.9
    """Decay of Adam's running mean of gradients."""
    adam_beta2: Annotated[float, Field(minimum=0, below=1)] = 0.999
    """Decay of Adam's running mean of squared gradients (GPT-3 used 0.95)."""
    adam_eps: Annotated[float, Field(above=0)] = 1e-8
    """Added to the denominator of Adam's update."""
    sgd_momentum: Annotated[float, Field(minimum=0, below=1)] = 0.9
    """Momentum of SGD."""
    lion_beta1: Annotated[float, Field(minimum=0, below=1)] = 0.95
    """Weight of the running mean of gradients in Lion's update, against the gradient."""
    lion_beta2: Annotated[float, Field(minimum=0, below=1)] = 0.98
    """Decay of Lion's running mean of gradients."""
    muon_momentum: Annotated[float, Field(minimum=0, below=1)] = 0.95
    """Momentum of Muon."""
    muon_nesterov: bool = False
    """Add the gradient to Muon's momentum once more before it is orthogonalized."""
    muon_num_ns_steps: Annotated[int, Field(minimum=1)] = 5
    """Newton-Schulz iterations that orthogonalize a matrix."""
    muon_coefficient_type: Literal["quintic", "simple"] = "quintic"
    """Their coefficients. quintic: those of Megatron-LM's default, other ones in each of the first
    five; simple: those of Jordan et al. 2024."""
    muon_scale_mode: Literal["spectral", "unit_rms_norm", "shape_scaling"] = "spectral"
    """What an orthogonalized matrix of m outputs and n inputs is multiplied by: sqrt(max(m, n)),
    sqrt(m / n), or sqrt(max(1, m / n))."""
    muon_extra_scale_factor: Annotated[float, Field(above=0)] = 1.0
    """Another factor of it. With spectral, 0.2 makes updates as large as AdamW's (Liu et al.
    2025)."""
    decoupled_lr: Annotated[float | None, Field(above=0, example=1e-4)] = None
    """Learning rate of the word embedding and of an untied output weight, in place of --lr, with
    the same schedule."""
    decoupled_min_lr: Annotated[float | None, Field(minimum=0)] = None
    """What theirs falls to, in place of --min-lr. Unset: a tenth of --decoupled-lr."""
    parameter_groups: Annotated[
        tuple[str, ...] | None, Field(metavar="'PATTERN SETTING ...'", example=EXAMPLE_GROUPS)
    ] = None
    """Settings of the parameters whose names match a pattern, a quoted text (in YAML an item of a
    list) for each: lr_factor=NUMBER, weight_decay=NUMBER, freeze, train. Of several settings of a
    parameter, the last one counts."""
    clip_grad: Annotated[float, Field(minimum=0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 = off."""
    max_bad_steps: Annotated[int, Field(minimum=0)] = 0
    """Bad steps in a row that are skipped before the run stops. A step is bad if its loss or
    gradient is not finite."""
    skip_grad_norm_above: Annotated[float | None, Field(above=1)] = None
    """A step is also bad if its gradient norm is above this many times the median of the last 100
    good steps; from the 11th good step on."""
    log_params_norm: Annotated[bool, Field(changes_numbers=False)] = False
    """Report the L2 norm of all trained weights after each step."""
    log_num_zeros_in_grad: Annotated[bool, Field(changes_numbers=False)] = False
    """Report how many elements of each step's gradient are 0."""
    log_norms_per_layer: Annotated[bool, Field(changes_numbers=False)] = False
    """Report the L2 norms of gradient and weights of each layer, but not on the console."""

    @property
    def counts_samples(self) -> bool:
        """Whether the schedules count samples, not iterations."""
        samples = (self.lr_decay_samples, self.lr_warmup_samples, self.lr_wsd_decay_samples)
        return any(count is not None for count in samples)

    def moments(self, rule: str) -> tuple[str, ...]:
        """Names of the tensors that an update rule keeps for each parameter."""
        if rule == "sgd" and not self.sgd_momentum:
            return ()
        return MOMENTS[rule]

    @property
    def decoupled(self) -> "OptimizerConfig":
        """The schedule of --decoupled-lr."""
        return replace(self, lr=self.decoupled_lr, min_lr=self.decoupled_min_lr)

    @property
    def lowest_lr(self) -> float:
        """--min-lr, with its default filled in."""
        if self.min_lr is not None:
            return self.min_lr
        return float(f"{self.lr / 10:.12g}")  # 3e-05, not 2.9999999999999997e-05

    @property
    def dtype(self) -> str:
        """Name of the torch dtype of the working weights."""
        names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
        return names[self.chosen_precision]

    @property
    def chosen_precision(self) -> str:
        """--precision, with the short forms filled in."""
        if self.bf16:
            return "bf16"
        return "fp16" if self.fp16 else self.precision

#!/usr/bin/env python
"""Time the kernels and what they replace, in turn: plain PyTorch and, for softmax, torch.compile.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py softmax
    OMP_NUM_THREADS=1 python benchmarks/kernels.py bandwidth
    OMP_NUM_THREADS=1 python benchmarks/kernels.py family
    OMP_NUM_THREADS=1 python benchmarks/kernels.py memory
    OMP_NUM_THREADS=1 python benchmarks/training.py --dropout 0.1       # whole steps

Each measurement allocates its outputs, as training does, but for `bandwidth`. A row gives medians
over the rounds; ratios are of times of one round, above 1 where ours is faster, with the range of
the middle half in brackets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from megalite.kernels import native
from megalite.kernels.activation import bias_gelu, swiglu
from megalite.kernels.cross_entropy import cross_entropy_gradient_, cross_entropy_statistics
from megalite.kernels.dropout import bias_dropout_add
from megalite.kernels.norm import rms_norm
from megalite.kernels.philox import key_of
from megalite.kernels.rotary import rotary
from megalite.kernels.softmax import Dropout, scaled_causal_softmax, scaled_masked_softmax
from megalite.nn.attention import explicit_attention
from megalite.nn.rope import rotary_frequencies, rotary_table

KEY = key_of(1234, "dropout")
P = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Sides = dict[str, Callable[[], object]]


def in_turn(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Wall times in ms of every side, one after the other in each round; the first round is not
    counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, run in sides.items():
            begin = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - begin
            del result
            if i:
                times[name].append(1000 * elapsed)
    return times


def ratio(other: list[float], ours: list[float]) -> str:
    """The median of other / ours, and its middle half."""
    quotients = [a / b for a, b in zip(other, ours)]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return f"{middle:.2f} ({low:.2f} .. {high:.2f})"


def backward_of(
    output: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor
) -> Callable[[], object]:
    """A function that runs the backward of an output; it can be called any number of times."""
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)


def softmax(rounds: int) -> None:
    """Scaled causal softmax of 8.4 million scores, beside the eager composition and torch.compile
    of it."""
    print(
        "| scores | | ms | eager / ours | compiled / ours | clone / ours "
        "|\n|---|---|---|---|---|---|"
    )
    for name, dtype in DTYPES.items():
        for shape in ((64, 8, 128, 128), (4, 8, 512, 512), (1, 8, 1024, 1024), (1, 2, 2048, 2048)):
            x = torch.randn(shape).to(dtype).requires_grad_()
            grad = torch.randn(shape).to(dtype)
            future = torch.ones(shape[-2:], dtype=torch.bool).triu(1)

            def eager(x, future=future):
                return (x * 0.125).masked_fill(future, -math.inf).softmax(dim=-1)

            torch._dynamo.reset()
            functions = {
                "eager": eager,
                "compiled": torch.compile(eager),
                "ours": lambda x: scaled_causal_softmax(x, 0.125),
            }
            forward = {side: lambda f=f, x=x: f(x) for side, f in functions.items()}
            backward = {side: backward_of(f(x), [x], grad) for side, f in functions.items()}
            for what, sides in (("forward", forward), ("backward", backward)):
                times = in_turn({**sides, "clone": lambda x=x: x.detach().clone()}, rounds)
                ours = times["ours"]
                shown = " | ".join(
                    ratio(times[side], ours) for side in ("eager", "compiled", "clone")
                )
                print(
                    f"| {name} {list(shape)} | {what} | {statistics.median(ours):.1f} | {shown} |",
                    flush=True,
                )


def bandwidth(rounds: int) -> None:
    """Scaled causal softmax of 67 million scores, much more than a cache holds, beside a copy of
    them, in memory that is there already: how near the kernel comes to what the memory can do."""
    print(
        "| scores | ms, forward | ms, backward | copy / forward | copy / backward "
        "|\n|---|---|---|---|---|"
    )
    own = torch.ops.megalite
    dropout = (None, None, 0, 0, 0, 0, 1.0)  # there is none
    for name, dtype in DTYPES.items():
        for shape in (
            (512, 8, 128, 128),
            (32, 8, 512, 512),
            (8, 8, 1024, 1024),
            (2, 8, 2048, 2048),
        ):
            x = torch.randn(shape).to(dtype)
            grad = torch.randn(shape).to(dtype)
            y = torch.empty_like(x)
            out = torch.empty_like(x)
            lse = torch.empty(shape[:-1])
            forward = (x, None, True, 0.125, *dropout, y, lse)
            backward = (grad, None, y, None, True, 0.125, *dropout, out, lse)
            sides = {
                "copy": partial(out.copy_, x),
                "forward": partial(own._softmax_forward, *forward),
                "backward": partial(own._softmax_backward, *backward),
            }
            times = in_turn(sides, rounds)
            ms = (f"{statistics.median(times[side]):.1f}" for side in ("forward", "backward"))
            ratios = (ratio(times["copy"], times[side]) for side in ("forward", "backward"))
            print(f"| {name} {list(shape)} | {' | '.join((*ms, *ratios))} |", flush=True)


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, list[torch.Tensor]]]:
    """(plain, fused, tensors that have gradients) by name."""

    def draw(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    def dropout_add(x, bias, residual):
        return residual + functional.dropout(x + bias, P)

    def gated(x):
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def dropout_softmax(x):
        return functional.dropout((x * 0.125).masked_fill(future, -math.inf).softmax(dim=-1), P)

    def masked_softmax(x):
        return (x * 0.125).masked_fill(padding, -math.inf).softmax(dim=-1)

    rows = torch.arange(1024)[:, None]
    samples = torch.arange(4)
    padding = torch.arange(512) >= torch.tensor([512, 500, 400, 300]).view(4, 1, 1, 1)
    attention = Dropout(torch.arange(8 * 512).view(8, 512), samples[:, None, None], 0, KEY, P)
    future = torch.ones(512, 512, dtype=torch.bool).triu(1)
    cos, sin = rotary_table(1024, rotary_frequencies(64, 1e4), dtype)
    hidden = (1024, 4, 1024)
    return {
        "bias + dropout + residual": (
            dropout_add,
            lambda x, b, r: bias_dropout_add(x, b, r, rows, samples, 1, *KEY, P),
            [draw(*hidden), draw(1024), draw(*hidden)],
        ),
        "causal softmax + dropout": (
            dropout_softmax,
            lambda x: scaled_causal_softmax(x, 0.125, attention),
            [draw(4, 8, 512, 512)],
        ),
        "masked softmax": (
            masked_softmax,
            lambda x: scaled_masked_softmax(x, 0.125, ~padding),
            [draw(4, 8, 512, 512)],
        ),
        "GELU": (
            lambda x: functional.gelu(x, approximate="tanh"),
            lambda x: bias_gelu(x, None),
            [draw(1024, 4, 1024)],
        ),
        "bias + GELU": (
            lambda x, b: functional.gelu(x + b, approximate="tanh"),
            bias_gelu,
            [draw(1024, 4, 1024), draw(1024)],
        ),
        "SwiGLU": (gated, swiglu, [draw(1024, 4, 2048)]),
        "RMSNorm": (
            lambda x, w: functional.rms_norm(x, (1024,), w, 1e-5),
            lambda x, w: rms_norm(x, w, 1e-5)[0],
            [draw(*hidden), draw(1024)],
        ),
        "residual + RMSNorm": (
            lambda x, w, r: functional.rms_norm(x + r, (1024,), w, 1e-5),
            lambda x, w, r: rms_norm(x, w, 1e-5, r)[0],
            [draw(*hidden), draw(1024), draw(*hidden)],
        ),
        "rotary embedding": (rotate, lambda x: rotary(x, cos, sin), [draw(1024, 4, 16, 64)]),
    }


def family(rounds: int) -> None:
    """Forward and backward of the others, 4.2 million elements (softmax: 8.4), and
    cross-entropy."""
    print("| | | ms | plain / ours, forward | plain / ours, both |\n|---|---|---|---|---|")
    for name, dtype in DTYPES.items():
        for what, (plain, fused, leaves) in pairs(dtype).items():
            grad = torch.randn(plain(*leaves).shape).to(dtype)

            def backward(f, leaves=leaves, grad=grad):
                return torch.autograd.grad(f(*leaves), leaves, grad)

            sides = {"plain": plain, "fused": fused}
            forward = in_turn({side: partial(f, *leaves) for side, f in sides.items()}, rounds)
            both = in_turn({side: partial(backward, f) for side, f in sides.items()}, rounds)
            shown = " | ".join(ratio(times["plain"], times["fused"]) for times in (forward, both))
            print(
                f"| {what} | {name} | {statistics.median(both['fused']):.1f} | {shown} |",
                flush=True,
            )
        cross_entropy(name, dtype, rounds)
    layer_norm(rounds)


def cross_entropy(name: str, dtype: torch.dtype, rounds: int) -> None:
    """Of 512 tokens and 8192 words. Ours writes the gradient over the logits, so each round has a
    copy of them."""
    logits = torch.randn(512, 8192).to(dtype)
    labels = torch.randint(0, 8192, (512,))
    ones = torch.ones(512)

    def plain():
        x = logits.clone().requires_grad_()
        return torch.autograd.grad(
            functional.cross_entropy(x, labels, reduction="none"), x, ones.to(dtype)
        )

    def fused():
        x = logits.clone()
        top, total, target = cross_entropy_statistics(x, labels, 8192)
        lse = top + total.log()
        cross_entropy_gradient_(x, labels, 8192, lse, ones)
        return x, lse - target

    sides = {
        "plain": lambda: functional.cross_entropy(logits, labels, reduction="none"),
        "fused": lambda: cross_entropy_statistics(logits, labels, 8192),
    }
    forward = in_turn(sides, rounds)
    both = in_turn({"plain": plain, "fused": fused}, rounds)
    shown = " | ".join(ratio(times["plain"], times["fused"]) for times in (forward, both))
    print(
        f"| cross-entropy | {name} | {statistics.median(both['fused']):.1f} | {shown} |", flush=True
    )


def layer_norm(rounds: int) -> None:
    """torch's LayerNorm beside a copy of its input: how much there is to gain."""
    for name, dtype in DTYPES.items():
        x = torch.randn(1024, 4, 1024).to(dtype).requires_grad_()
        grad = torch.randn(1024, 4, 1024).to(dtype)
        weight = torch.randn(1024).to(dtype).requires_grad_()
        bias = torch.randn(1024).to(dtype).requires_grad_()

        def norm(x=x, weight=weight, bias=bias):
            return functional.layer_norm(x, (1024,), weight, bias)

        leaves = [x, weight, bias]
        run = {
            "forward": norm,
            "both": lambda norm=norm, leaves=leaves, grad=grad: torch.autograd.grad(
                norm(), leaves, grad
            ),
            "RMSNorm": lambda x=x, w=weight, grad=grad: torch.autograd.grad(
                rms_norm(x, w, 1e-5)[0], [x, w], grad
            ),
            "clone": lambda x=x: x.detach().clone(),
        }
        times = in_turn(run, rounds)
        print(
            f"torch's LayerNorm {name}: forward {ratio(times['forward'], times['clone'])} times "
            f"a clone, forward and backward {ratio(times['both'], times['RMSNorm'])} times our "
            "RMSNorm"
        )


def peak(run: Callable[[], object]) -> int:
    """Peak memory of a call in bytes, beyond what was in use before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    before = int(status["VmRSS"].split()[0])
    result = run()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    del result
    return 1024 * (int(status["VmHWM"].split()[0]) - before)


def memory() -> None:
    """Peak memory of an attention core, forward and backward, in multiples of its b n s s
    scores."""
    b, n, s, d = 1, 8, 2048, 64
    rows = torch.arange(n * s).view(n, s)
    samples = torch.arange(b).view(b, 1, 1)
    print("| | dropout | eager | fused softmax |\n|---|---|---|---|")
    for name, dtype in DTYPES.items():
        q, k, v = (torch.randn(b, n, s, d).to(dtype).requires_grad_() for _ in range(3))
        grad = torch.randn(b, n, s, d).to(dtype)
        for p in (0.0, P):
            dropout = Dropout(rows, samples, 0, KEY, p)

            def drop(weights, p=p):
                if p == 0:
                    return weights
                return bias_dropout_add(weights, None, None, rows, samples, 0, *KEY, p)

            def eager(q=q, k=k, v=v, drop=drop):
                return explicit_attention(q, k, v, drop=drop, causal=True)

            def fused(q=q, k=k, v=v, dropout=dropout):
                return scaled_causal_softmax(q @ k.transpose(-1, -2), d**-0.5, dropout) @ v

            needed = []
            for core in (eager, fused):

                def run(core=core, q=q, k=k, v=v, grad=grad):
                    return torch.autograd.grad(core(), (q, k, v), grad)

                run()
                needed.append(f"{peak(run) / (b * n * s * s * dtype.itemsize):.1f}")
            print(f"| {name} | {p} | {' | '.join(needed)} |")


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["softmax", "bandwidth", "family", "memory"])
    parser.add_argument("--rounds", type=int, default=15, help="times that each side is measured")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); {native.status()}\n")
    if args.what == "memory":
        memory()
    else:
        {"softmax": softmax, "bandwidth": bandwidth, "family": family}[args.what](args.rounds)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Tokens per second of megalite and of a plain PyTorch model of the same shape, in one process, in
turn.

    OMP_NUM_THREADS=1 python benchmarks/training.py             # the paired comparison
    python benchmarks/training.py --profile tp2                 # profile two ranks (tp2, pp2)

Shape: GPT of 8 layers, hidden 512, 8 heads, sequence 256, vocabulary 8192, untied, microbatch 4,
fp32, AdamW. Both sides start from the same weights and see the same tokens; their losses are
compared before their times are. A step is one microbatch forward and backward, gradient clipping
(both or, with --no-clip, neither) and the optimizer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megalite.programs.start  # noqa: F401  first: says which Python is needed

# isort: split
import argparse
import os
import statistics
import time

import torch
from torch import nn

from megalite.config.run import RunConfig, from_flat
from megalite.data.mock import MockDataset
from megalite.parallel.context import ParallelContext
from megalite.parallel.launch import detect
from megalite.training.batches import build_batches
from megalite.training.build import build_components, build_context

SHAPE = dict(
    num_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    seq_length=256,
    vocab_size=8192,
    untie_embeddings_and_output_weights=True,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    micro_batch_size=4,
    mock_data=True,
    train_iters=1000,
    lr=1e-4,
    lr_decay_style="constant",
    device="cpu",
)


class PlainBlock(nn.Module):
    """A GPT-2 layer as one would write it without any parallelism."""

    def __init__(self, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]. Heads are laid out [n, 3, d], as megalite's qkv weight has
        them."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=self.dropout)
        x = x + nn.functional.dropout(self.output(y.transpose(1, 2).flatten(2)), self.dropout)
        y = self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + nn.functional.dropout(y, self.dropout)


class PlainGPT(nn.Module):
    """The same GPT in plain PyTorch."""

    def __init__(self, config, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.seq_length, config.hidden_size)
        self.blocks = nn.Sequential(
            *(
                PlainBlock(config.hidden_size, config.num_attention_heads, dropout)
                for _ in range(config.num_layers)
            )
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of labels [b, s]."""
        x = nn.functional.dropout(
            self.words(tokens) + self.positions.weight[: tokens.shape[1]], self.dropout
        )
        logits = self.output(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def copy_weights(plain: PlainGPT, ours: dict[str, torch.Tensor]) -> None:
    """Give the plain model our weights."""
    names = {
        "words": "embedding.word_embeddings",
        "positions": "embedding.position_embeddings",
        "norm": "final_norm",
    }
    parts = {
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
        "qkv": "attention.qkv",
        "output": "attention.output",
        "up": "mlp.up",
        "down": "mlp.down",
    }
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module, kind = name.rsplit(".", 1)
            if module.startswith("blocks."):
                _, layer, part = module.split(".")
                source = f"layers.{layer}.{parts[part]}"
            else:
                source = names.get(module, module)
            parameter.copy_(ours[f"{source}.{kind}"].view(parameter.shape))


def our_step(config: RunConfig, context: ParallelContext):
    """(step function that returns the loss, the model) of megalite."""
    parts = build_components(config, context)
    dataset = MockDataset(config.model.vocab_size, config.model.seq_length, 1, "train")
    data = build_batches(config, dataset, parts.model)
    taken = 0

    def step() -> float:
        nonlocal taken
        parts.optimizer.gradients.zero()
        loss = parts.engine.train_step(*data.at(taken * config.data.global_batch_size))
        taken += 1
        parts.optimizer.step(taken)
        return loss.item()

    return step, parts.model


def plain_step(config: RunConfig, weights: dict[str, torch.Tensor], fused: bool):
    """Step function of the plain model, with torch's default AdamW or its fused one."""
    model = PlainGPT(config.model, config.model.hidden_dropout)
    copy_weights(model, weights)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=fused or None
    )
    dataset = MockDataset(config.model.vocab_size, config.model.seq_length, 1, "train")
    b = config.data.micro_batch_size
    taken = 0

    def step() -> float:
        nonlocal taken
        rows = torch.stack([torch.from_numpy(dataset[taken * b + j]) for j in range(b)])
        taken += 1
        optimizer.zero_grad()
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        if o.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        return loss.item()

    return step


def compare(config: RunConfig, rounds: int, steps: int) -> None:
    """Time the sides in turn, `rounds` times `steps` steps each; print medians and ratios (above 1:
    ours is faster).

    CPU time beside wall time, since other work on the machine stretches the latter.
    """
    context = ParallelContext.single()
    ours, model = our_step(config, context)
    weights = {name: p.detach().clone() for name, p in model.parameters_by_name.items()}
    sides = {
        "megalite": ours,
        "plain, AdamW": plain_step(config, weights, fused=False),
        "plain, fused AdamW": plain_step(config, weights, fused=True),
    }
    first = {name: step() for name, step in sides.items()}
    allowed = 1e-4 if config.model.hidden_dropout == 0 else 0.1  # each side drops other elements
    assert max(first.values()) - min(first.values()) < allowed, (
        f"the sides compute different losses: {first}"
    )
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            for _ in range(steps):
                step()
            seconds[name].append(
                ((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)
            )
    tokens = config.data.micro_batch_size * config.model.seq_length
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{rounds} rounds of {steps} steps"
    )
    for name, times in seconds.items():
        walls = [wall for wall, _ in times]
        rate = tokens / statistics.median(walls)
        line = f"{name:20} {rate:6.0f} tokens/s | first loss {first[name]:.5f}"
        if name != "megalite":
            for kind, which in (("wall", 0), ("CPU", 1)):
                ratios = [
                    theirs[which] / ours[which] for theirs, ours in zip(times, seconds["megalite"])
                ]
                spread = f"[{min(ratios):.3f} .. {max(ratios):.3f}]"
                line += f" | its {kind} time / ours {statistics.median(ratios):.3f} {spread}"
        print(line)


def profile(layout: str) -> None:
    """Run a few steps of a layout under torch's profiler in this rank and print where the time goes
    (rank 0)."""
    launch = detect(os.environ)
    sizes = {
        "tp2": {"tensor_model_parallel_size": 2},
        "pp2": {"pipeline_model_parallel_size": 2, "global_batch_size": 32},
    }
    config = from_flat({**SHAPE, "global_batch_size": 4, **sizes[layout]})
    context, _ = build_context(config, launch)
    step, _ = our_step(config, context)
    step()
    tokens = config.data.global_batch_size * config.model.seq_length
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    with torch.profiler.profile() as trace:
        step()
    if context.rank == 0:
        print(f"{layout}: {tokens / statistics.median(times):.0f} tokens/s")
        print(
            trace.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=48
            )
        )
    context.destroy()


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each side is measured")
    parser.add_argument("--steps", type=int, default=2, help="steps in a measurement")
    parser.add_argument("--no-clip", action="store_true", help="no gradient clipping on any side")
    parser.add_argument(
        "--profile", choices=["tp2", "pp2"], help="profile two ranks of this layout"
    )
    parser.add_argument("--layers", type=int, default=8, help="a smaller model, to try the script")
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.0,
        help="dropout of weights and hidden states, on all sides",
    )
    args = parser.parse_args()
    if args.profile and "RANK" not in os.environ:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        os.execvpe(sys.executable, [*launcher, *sys.argv], {**os.environ, "OMP_NUM_THREADS": "1"})
    if args.profile:
        profile(args.profile)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    clip = 0.0 if args.no_clip else 1.0
    compare(
        from_flat(
            {**SHAPE, "num_layers": args.layers, "global_batch_size": 4, "clip_grad": clip}
            | {"attention_dropout": args.dropout, "hidden_dropout": args.dropout}
        ),
        args.rounds,
        args.steps,
    )


if __name__ == "__main__":
    main()

"""The layouts that every parity test covers. Appending a line adds a layout to all of them."""

from dataclasses import dataclass, field, replace

from megalite.config.run import RunConfig, from_flat
from tests.oracle import RopeScaling, Shape

GPT2 = Shape(
    layers=4, hidden=32, heads=8, groups=8, head_size=4, ffn=128, vocab=257, seq=16, positions=16
)
LLAMA = replace(
    GPT2,
    groups=4,
    ffn=96,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    bias=False,
    tied=False,
)
LLAMA_31 = replace(LLAMA, head_size=6, rope_scaling=RopeScaling(factor=4.0, length=12))
"""Of the three frequencies of a head the first is kept in part, the others are divided."""
QWEN2 = replace(LLAMA, qkv_bias=True, tied=True)
QWEN3 = replace(LLAMA_31, qk_norm=True)
"""With heads whose size is not hidden / heads, as in Qwen3, and scaled RoPE, which it has not."""
POST_NORM = {"norm_placement": "post", "gelu": "erf", "norm_epsilon": 1e-12}


@dataclass(frozen=True)
class Layout:
    """A way to spread a model over ranks: sizes, and any flags."""

    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    shape: Shape = GPT2
    flags: dict = field(default_factory=dict)
    """Flags of the run, by field name."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def packing(self) -> tuple[str, ...]:
        """Its flags that change the numbers: how documents in a row are kept apart."""
        return tuple(key for key in PACKED if key in self.flags)


def sp(**flags) -> dict:
    """The flags, with sequence parallelism."""
    return {"sequence_parallel": True, **flags}


FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
VIRTUAL = {"num_virtual_stages_per_pipeline_rank": 2}
ZB_H1 = {"pipeline_schedule": "zb-h1"}
ZB_V = {"pipeline_schedule": "zb-v"}
PACKED = {"reset_position_ids": True, "reset_attention_mask": True}

LAYOUTS = [
    Layout("single"),
    Layout("tp2", tp=2),
    Layout("tp4", tp=4),
    Layout("pp2", pp=2),
    Layout("pp4", pp=4),
    Layout("dp2", dp=2),
    Layout("tp2+sp", tp=2, flags=sp()),
    Layout("tp2 x pp2", tp=2, pp=2),
    Layout("dp2 x tp2 x pp2", dp=2, tp=2, pp=2),
    Layout("dp2 x tp2 x pp2 +sp", dp=2, tp=2, pp=2, flags=sp()),
    Layout("uneven pp3", pp=3),
    Layout("pp4, 2 microbatches", pp=4, flags={"micro_batch_size": 4}),
    Layout("one microbatch", pp=2, flags={"micro_batch_size": 8}),
    Layout("microbatch of 2", dp=2, flags={"micro_batch_size": 2}),
    Layout("a rank of padding only", tp=4, flags=sp(make_vocab_size_divisible_by=128)),
    Layout("untied pp2", pp=2, shape=replace(GPT2, tied=False)),
    Layout("no biases tp2", tp=2, shape=replace(GPT2, bias=False)),
    Layout(
        "no positions tp2+sp", tp=2, shape=replace(GPT2, position_embedding_type="none"), flags=sp()
    ),
    Layout("llama", shape=LLAMA),
    Layout("llama tp4+sp", tp=4, shape=LLAMA, flags=sp()),
    Layout("llama dp2 x tp2 x pp2 +sp", dp=2, tp=2, pp=2, shape=LLAMA, flags=sp()),
    Layout("llama tied pp3", pp=3, shape=replace(LLAMA, tied=True)),
    Layout("selective", tp=2, flags=SELECTIVE),
    Layout("full uniform", tp=2, pp=2, flags=sp(**FULL)),
    Layout("full uniform by 2", tp=2, flags={**FULL, "recompute_num_layers": 2}),
    Layout("full block", pp=2, shape=LLAMA, flags={**FULL, "recompute_method": "block"}),
    Layout("gpipe pp2", pp=2, flags={"pipeline_schedule": "gpipe"}),
    Layout("gpipe dp2 x tp2 x pp2 +sp", dp=2, tp=2, pp=2, flags=sp(pipeline_schedule="gpipe")),
    Layout("interleaved pp2", pp=2, flags=VIRTUAL),
    Layout("interleaved uneven pp3", pp=3, shape=replace(GPT2, layers=7), flags=VIRTUAL),
    Layout("interleaved dp2 x tp2 x pp2 +sp", 2, 2, 2, flags=sp(**VIRTUAL)),
    Layout("breadth-first pp2", pp=2, flags={"pipeline_schedule": "gpipe", **VIRTUAL}),
    Layout("zb-h1 pp4", pp=4, flags=ZB_H1),
    Layout("llama zb-h1 dp2 x tp2 x pp2 +sp", 2, 2, 2, LLAMA, sp(**ZB_H1, **FULL)),
    Layout("zb-v pp2", pp=2, flags=ZB_V),
    Layout("zb-v untied pp2", pp=2, shape=replace(GPT2, tied=False), flags=ZB_V | SELECTIVE),
    Layout("zb-v dp2 x tp2 x pp2 +sp", 2, 2, 2, flags=sp(**ZB_V)),
    Layout("packed llama interleaved pp2", pp=2, shape=LLAMA, flags={**PACKED, **VIRTUAL}),
    Layout("packed documents zb-v tp2 x pp2", tp=2, pp=2, flags=sp(**PACKED, **ZB_V)),
    Layout("packed documents", flags=PACKED),
    Layout("packed documents tp2 x pp2", tp=2, pp=2, flags={**PACKED, **FULL}),
    Layout("packed documents tp2+sp", tp=2, flags=sp(**PACKED, **SELECTIVE)),
    Layout("packed llama pp4", pp=4, shape=LLAMA, flags={**PACKED, "micro_batch_size": 2}),
    Layout(
        "packed llama dp2 x tp2 x pp2 +sp",
        dp=2,
        tp=2,
        pp=2,
        shape=LLAMA,
        flags=sp(**PACKED, **FULL),
    ),
    Layout("masks of documents pp3", pp=3, flags={"reset_attention_mask": True}),
    Layout(
        "llama, positions of documents pp3", pp=3, shape=LLAMA, flags={"reset_position_ids": True}
    ),
]


def as_bert(shape: Shape, **fields) -> Shape:
    """A BERT of otherwise the same shape, with a pair head unless `fields` say otherwise."""
    return replace(shape, architecture="bert", **({"pair": True} | fields))


def _berts() -> list[Layout]:
    """The layouts above with a BERT, half of them as its paper has it, half as Megatron-LM; a
    BERT's samples have no documents to keep apart."""
    plain = [layout for layout in LAYOUTS if not layout.packing]
    styles = [POST_NORM, {}]
    return [
        replace(layout, name=f"bert {layout.name}", shape=as_bert(layout.shape, **styles[i % 2]))
        for i, layout in enumerate(plain)
    ]


LAYOUTS += [
    *_berts(),
    Layout("bert without pairs pp2", pp=2, shape=as_bert(GPT2, pair=False)),
    Layout(
        "bert without pairs dp2 x tp2 x pp2 +sp",
        2,
        2,
        2,
        as_bert(GPT2, pair=False, **POST_NORM),
        sp(),
    ),
]

ZERO = {"use_distributed_optimizer": True, "ddp_bucket_size": 5000}
OVERLAP = {"overlap_grad_reduce": True, "ddp_bucket_size": 5000}


def _sharded() -> list[Layout]:
    """The layouts above that have data ranks, with a sharded optimizer, and with it and all
    overlaps."""
    ways = {"zero": ZERO, "zero, overlapped": ZERO | OVERLAP | {"overlap_param_gather": True}}
    return [
        replace(layout, name=f"{layout.name}, {name}", flags=layout.flags | flags)
        for layout in LAYOUTS
        if layout.dp > 1
        for name, flags in ways.items()
    ]


LAYOUTS += [
    *_sharded(),
    Layout("dp4, zero", dp=4, flags=ZERO),
    Layout("tied pp3 x dp2, overlapped", pp=3, dp=2, flags=OVERLAP),
    Layout("dp2 x tp2 x pp2 +sp, overlapped", 2, 2, 2, flags=sp(**OVERLAP)),
    Layout(
        "llama tied dp4, zero, overlapped",
        dp=4,
        shape=replace(LLAMA, tied=True),
        flags=ZERO | OVERLAP,
    ),
    # What published models add to a Llama.
    Layout("llama 3.1 tp2 x pp2", tp=2, pp=2, shape=LLAMA_31),
    Layout("qwen2 dp2 x tp2 x pp2 +sp", 2, 2, 2, shape=QWEN2, flags=sp(**(ZERO | OVERLAP))),
    Layout("qwen3 dp2 x tp2", dp=2, tp=2, shape=QWEN3, flags=SELECTIVE),
    Layout("qwen3 dp2 x tp2 x pp2 +sp", 2, 2, 2, shape=QWEN3, flags=sp(**ZERO, **FULL)),
    Layout("packed qwen3 pp2", pp=2, shape=QWEN3, flags={**PACKED, "micro_batch_size": 2}),
    Layout("norms of heads tp2+sp", tp=2, shape=replace(GPT2, qk_norm=True), flags=sp()),
    Layout("bert, norms of heads tp2", tp=2, shape=as_bert(QWEN3)),
    # Layers divided otherwise than by their work.
    Layout("tied pp3, split by hand", pp=3, flags={"pipeline_split": ("1,1,2",)}),
    Layout(
        "tp2 x pp2 +sp, given ends",
        tp=2,
        pp=2,
        flags=sp(decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=3),
    ),
]

GLOBAL_BATCH = 8


def product() -> list[Layout]:
    """Every combination of sizes up to 8 ranks with sequence parallelism, recomputation, schedule
    and shape."""
    sizes = [
        (tp, pp, dp) for tp in (1, 2, 4) for pp in (1, 2, 4) for dp in (1, 2) if tp * pp * dp <= 8
    ]
    recomputes = [{}, SELECTIVE, FULL]
    return [
        Layout(f"{name} dp{dp} tp{tp} pp{pp} {flags}", tp, pp, dp, shape, flags)
        for tp, pp, dp in sizes
        for name, shape in (("gpt2", GPT2), ("llama", LLAMA), ("bert", as_bert(GPT2, **POST_NORM)))
        for recompute in recomputes
        for split in ({}, sp())
        if tp > 1 or not split
        for schedule in ({}, {"pipeline_schedule": "gpipe"})
        if pp > 1 or not schedule
        for flags in [recompute | split | schedule]
    ]


def _scaling_flags(shape: Shape) -> dict:
    scaling = shape.rope_scaling
    if scaling is None:
        return {}
    return dict(
        rope_scaling="llama3",
        rope_scaling_factor=scaling.factor,
        rope_low_freq_factor=scaling.low,
        rope_high_freq_factor=scaling.high,
        rope_original_max_position_embeddings=scaling.length,
    )


def configuration(layout: Layout, **flags) -> RunConfig:
    """The run configuration of a layout: its shape and flags, no dropout, then `flags`."""
    s = layout.shape
    return from_flat(
        dict(
            architecture=s.architecture,
            norm_placement=s.norm_placement,
            gelu=s.gelu,
            num_layers=s.layers,
            hidden_size=s.hidden,
            num_attention_heads=s.heads,
            num_query_groups=s.groups,
            kv_channels=s.head_size,
            ffn_hidden_size=s.ffn,
            vocab_size=s.vocab,
            seq_length=s.seq,
            max_position_embeddings=s.positions,
            position_embedding_type=s.position_embedding_type,
            rotary_base=s.rotary_base,
            **_scaling_flags(s),
            normalization=s.normalization,
            norm_epsilon=s.norm_epsilon,
            swiglu=s.swiglu,
            disable_bias_linear=not s.bias,
            add_qkv_bias=s.qkv_bias,
            qk_layernorm=s.qk_norm,
            untie_embeddings_and_output_weights=not s.tied,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            precision="fp64",
            device="cpu",
            mock_data=True,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            micro_batch_size=1,
            global_batch_size=GLOBAL_BATCH,
            train_iters=5,
            lr=0.01,
            lr_warmup_iters=2,
            weight_decay=0.1,
            clip_grad=0.5,
            bert_pair="sop" if s.pair or s.architecture == "gpt" else "none",
            # A BERT's samples differ in length, and in how much of them is to be predicted.
            **(dict(mask_prob=0.3, short_seq_prob=0.4) if s.architecture == "bert" else {}),
        )
        | layout.flags
        | flags
    )

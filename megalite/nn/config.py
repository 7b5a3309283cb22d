"""The shape of the layers, and what of their activations is kept. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megalite.fields import Field

PresetName = Literal[
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "bert-base",
    "bert-large",
    "megatron-bert-1.3b",
    "megatron-bert-3.9b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "mistral-7b-v0.1",
    "mistral-7b-v0.3",
    "qwen2-0.5b",
    "qwen2-1.5b",
    "qwen2-7b",
    "qwen2-72b",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-14b",
    "qwen2.5-32b",
    "qwen2.5-72b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
]
"""Published models that a configuration can start from."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the transformer. Defaults give a GPT-2; `--swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights` a
    Llama. --preset starts from a published model."""

    architecture: Literal["gpt", "bert"] = "gpt"
    """Which model. pretrain_gpt.py and pretrain_bert.py know theirs; tools/verify_layouts.py takes
    either."""
    preset: Annotated[PresetName | None, Field(changes_numbers=False)] = None
    """Shape of a published model, listed in docs/models.md. What is given beside it, on the command
    line or in the file, wins. Weights are not part of it."""
    num_layers: Annotated[int, Field(minimum=1, defines_model=True)] = 12
    """Transformer layers in the whole model, L."""
    hidden_size: Annotated[int, Field(minimum=1, defines_model=True)] = 768
    """Width of the residual stream, h."""
    num_attention_heads: Annotated[int, Field(minimum=1, defines_model=True)] = 12
    """Query heads, n. Each has --hidden-size / n components unless --kv-channels says otherwise."""
    ffn_hidden_size: Annotated[int | None, Field(minimum=1, defines_model=True)] = None
    """Inner width of the MLP, f. Unset: 4h, or with --swiglu 8h/3 rounded down to a multiple of 64.
    """
    kv_channels: Annotated[int | None, Field(minimum=1, defines_model=True)] = None
    """Components of one attention head, d. Unset: --hidden-size / --num-attention-heads."""
    num_query_groups: Annotated[int | None, Field(minimum=1, defines_model=True)] = None
    """Key/value heads shared by groups of query heads (grouped-query attention). Unset: one per
    query head."""
    seq_length: Annotated[int, Field(minimum=1)] = 1024
    """Tokens in a training sequence, s."""
    max_position_embeddings: Annotated[int | None, Field(minimum=1, defines_model=True)] = None
    """Rows of the learned position table, or the longest sequence that RoPE is used for. Unset:
    --seq-length."""
    position_embedding_type: Annotated[
        Literal["learned_absolute", "rope", "none"], Field(defines_model=True)
    ] = "learned_absolute"
    """How positions enter: a learned table added to the embedding, rotary embedding of queries and
    keys, or not."""
    rotary_base: Annotated[float, Field(above=0, defines_model=True, keeps_shapes=True)] = 10000.0
    """Base of the rotary frequencies (with --position-embedding-type rope)."""
    rope_scaling: Annotated[
        Literal["none", "llama3"], Field(defines_model=True, keeps_shapes=True)
    ] = "none"
    """How rotary frequencies are changed for sequences longer than those that a model was first
    trained on. llama3: as in Llama 3.1, long wavelengths are stretched, short ones kept."""
    rope_scaling_factor: Annotated[
        float, Field(minimum=1, defines_model=True, keeps_shapes=True)
    ] = 8.0
    """With --rope-scaling llama3: how much longer the longest wavelengths become."""
    rope_low_freq_factor: Annotated[
        float, Field(above=0, defines_model=True, keeps_shapes=True)
    ] = 1.0
    """With --rope-scaling llama3: wavelengths above --rope-original-max-position-embeddings / this
    are stretched in full."""
    rope_high_freq_factor: Annotated[
        float, Field(above=0, defines_model=True, keeps_shapes=True)
    ] = 4.0
    """With --rope-scaling llama3: wavelengths below --rope-original-max-position-embeddings / this
    are kept. In between, the change is gradual."""
    rope_original_max_position_embeddings: Annotated[
        int, Field(minimum=1, defines_model=True, keeps_shapes=True)
    ] = 8192
    """With --rope-scaling llama3: the longest sequence that the model was first trained on."""
    normalization: Annotated[Literal["LayerNorm", "RMSNorm"], Field(defines_model=True)] = (
        "LayerNorm"
    )
    """Normalisation before attention, before the MLP and before the output layer."""
    norm_epsilon: Annotated[float, Field(above=0, defines_model=True, keeps_shapes=True)] = 1e-5
    """Added to the variance before the square root in the normalisation."""
    norm_backend: Annotated[Literal["auto", "torch", "apex"], Field(changes_numbers=False)] = "auto"
    """How norms are computed. torch: by its own operators; apex: by the fused kernels of NVIDIA
    apex, on a GPU. auto: RMSNorm by megalite's kernel, LayerNorm by torch."""
    norm_placement: Annotated[Literal["pre", "post"], Field(defines_model=True)] = "pre"
    """pre: normalise what goes into attention and MLP, and what leaves the last layer (as GPT-2 and
    Megatron-LM). post: normalise the sum after each of them, and the embedding (as in BERT's paper;
    for BERT only)."""
    swiglu: Annotated[bool, Field(defines_model=True)] = False
    """Gated MLP, silu(gate) * up, in place of GELU."""
    gelu: Annotated[Literal["tanh", "erf"], Field(defines_model=True, keeps_shapes=True)] = "tanh"
    """GELU by its tanh approximation (as GPT-2 and Megatron-LM) or exactly (as BERT)."""
    disable_bias_linear: Annotated[bool, Field(defines_model=True)] = False
    """No biases in the linear layers."""
    add_qkv_bias: Annotated[bool, Field(defines_model=True)] = False
    """Biases of queries, keys and values although --disable-bias-linear, as in Qwen2."""
    qk_layernorm: Annotated[bool, Field(defines_model=True)] = False
    """Normalise each head of the queries and keys, by the kind of --normalization and before RoPE,
    with one weight for all query heads of a layer and one for its key heads (Dehghani et al.
    2023), as in Qwen3."""
    untie_embeddings_and_output_weights: Annotated[bool, Field(defines_model=True)] = False
    """Give the output layer a weight of its own in place of the word embedding's."""
    vocab_size: Annotated[int | None, Field(minimum=1, example=8192, defines_model=True)] = None
    """Entries of the vocabulary, v. Unset: the preset's, or else the tokenizer's."""
    make_vocab_size_divisible_by: Annotated[int, Field(minimum=1)] = 128
    """Rows of the word embedding are padded in memory to a multiple of this times the
    tensor-parallel size; padding is never drawn, trained, counted in the loss, or stored."""
    attention_dropout: Annotated[float, Field(minimum=0, below=1)] = 0.1
    """Probability of dropping an attention weight, 0 = off."""
    attention_backend: Annotated[
        Literal["auto", "sdpa", "fused-softmax", "eager"], Field(changes_numbers=False)
    ] = "auto"
    """How attention is computed. sdpa: by torch's fused kernels, which cannot drop weights by
    --rng-scheme. fused-softmax: scores are formed; scale, mask, softmax and dropout are one kernel
    of megalite's. eager: by plain operations. auto: sdpa without dropout where torch has a fused
    kernel; otherwise fused-softmax, or eager with dropout and --rng-scheme megatron."""
    hidden_dropout: Annotated[float, Field(minimum=0, below=1)] = 0.1
    """Probability of dropping an element of the embedding and of what each sublayer adds, 0 = off.
    """
    init_method_std: Annotated[float, Field(above=0)] = 0.02
    """Standard deviation of the initial weights; output projections of attention and MLP use this /
    sqrt(2L)."""

    def padded_vocabulary(self, tensor: int) -> int:
        """Rows of the word embedding over `tensor` ranks: v, padded to a multiple of
        --make-vocab-size-divisible-by for each rank."""
        multiple = self.make_vocab_size_divisible_by * tensor
        return -(-self.vocab_size // multiple) * multiple

    @property
    def post_norm(self) -> bool:
        """Whether norms come after the residual sums."""
        return self.norm_placement == "post"

    @property
    def ffn(self) -> int:
        """f, with its default filled in."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return self.hidden_size * 8 // 3 // 64 * 64 or 64
        return 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """d, with its default filled in."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def positions(self) -> int:
        """Longest sequence the model is made for."""
        return self.max_position_embeddings or self.seq_length

    def filled(self) -> "ModelConfig":
        """The same shape, with every default that follows from other fields filled in."""
        return replace(
            self,
            ffn_hidden_size=self.ffn,
            kv_channels=self.head_size,
            num_query_groups=self.query_groups,
            max_position_embeddings=self.positions,
        )

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.add_qkv_bias or not self.disable_bias_linear

    @property
    def tied(self) -> bool:
        """Whether the output layer uses the word embedding's weight."""
        return not self.untie_embeddings_and_output_weights


@dataclass(frozen=True)
class RecomputeConfig:
    """Activation checkpointing: memory against time. Gradients are bitwise equal."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """none: keep all; selective: recompute the attention core (scores, softmax, values); full:
    whole layers."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full: uniform keeps the input of every n layers; block recomputes only the first n
    layers of a stage."""
    recompute_num_layers: Annotated[int, Field(minimum=1)] = 1
    """With full: n of --recompute-method."""

    @property
    def granularity(self) -> str:
        """The granularity, with the short form taken into account."""
        return "selective" if self.recompute_activations else self.recompute_granularity

"""The oracle against Hugging Face's GPT-2, Llama, Mistral, Qwen2 and Qwen3, against finite
differences, and against torch's AdamW."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests import oracle
from tests.oracle import Parameters, RopeScaling, Shape

GPT2 = Shape(
    layers=3, hidden=24, heads=4, groups=4, head_size=6, ffn=40, vocab=61, seq=10, positions=16
)
LLAMA = Shape(
    layers=3,
    hidden=24,
    heads=6,
    groups=2,
    head_size=8,  # not hidden / heads
    ffn=40,
    vocab=61,
    seq=10,
    positions=16,
    position_embedding_type="rope",
    rotary_base=500.0,
    normalization="RMSNorm",
    norm_epsilon=1e-3,
    swiglu=True,
    bias=False,
    tied=False,
)
END = 7
"""The token that ends a document."""
SHAPES = {
    "gpt2": GPT2,
    "gpt2-untied": dataclasses.replace(GPT2, tied=False),
    "llama-gqa": LLAMA,
    "llama-gqa-tied-bias": dataclasses.replace(LLAMA, tied=True, bias=True),
    "llama-one-group": dataclasses.replace(LLAMA, groups=1),
    "llama-multi-head": dataclasses.replace(LLAMA, groups=6),
    "llama-3.1": dataclasses.replace(LLAMA, rope_scaling=RopeScaling(4.0, 1.0, 3.0, 12)),
    "mistral": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tied=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
}


def tolerance(shape: Shape, tokens: int) -> float:
    """Largest difference to expect of two float64 evaluations of one function, relative to the
    largest entry.

    They differ in the order of their sums. A sum of K terms is off by at most K roundings, and by
    about sqrt(K) in practice; a signal passes about 16 sums or elementwise operations per layer on
    its way forward and as many backward.
    """
    longest = max(shape.hidden, shape.ffn, shape.vocab, tokens, shape.heads * shape.head_size)
    return 2 * 16 * (shape.layers + 1) * longest**0.5 * torch.finfo(torch.float64).eps


def batch(shape: Shape, rows: int = 3, seed: int = 1) -> oracle.Batch:
    """Random tokens and labels, a third of the labels masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(shape.vocab, (rows, shape.seq + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.rand(rows, shape.seq, generator=generator) > 0.3


def assert_close(actual: Parameters, expected: Parameters, bound: float) -> None:
    """Every tensor by name, relative to the largest entry of any: some gradients are zero but for
    rounding."""
    assert actual.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert (actual[name] - value).abs().max().item() <= bound * scale, name


# Hugging Face's names and layouts. Each pair of functions maps weights, or gradients, there and
# back.


def gpt2_from_oracle(params: Parameters, shape: Shape) -> Parameters:
    """GPT2LMHeadModel's parameters. Its Conv1D keeps weights [inputs, outputs]; c_attn gives all q,
    all k, all v."""
    theirs = {
        "transformer.wte.weight": params["embedding.word_embeddings.weight"],
        "transformer.wpe.weight": params["embedding.position_embeddings.weight"],
        **{f"transformer.ln_f.{kind}": params[f"final_norm.{kind}"] for kind in ("weight", "bias")},
    }
    if not shape.tied:
        theirs["lm_head.weight"] = params["output.weight"]
    for i in range(shape.layers):
        for our_name, their_name in GPT2_LAYER.items():
            weight, bias = (params[f"layers.{i}.{our_name}.{kind}"] for kind in ("weight", "bias"))
            if our_name == "attention.qkv":
                weight = weight.transpose(0, 1).reshape(-1, shape.hidden)
                bias = bias.transpose(0, 1).reshape(-1)
            theirs[f"transformer.h.{i}.{their_name}.weight"] = (
                weight.T if weight.dim() == 2 else weight
            )
            theirs[f"transformer.h.{i}.{their_name}.bias"] = bias
    return theirs


def oracle_from_gpt2(theirs: Parameters, shape: Shape) -> Parameters:
    """The inverse of `gpt2_from_oracle`."""
    params = {
        "embedding.word_embeddings.weight": theirs["transformer.wte.weight"],
        "embedding.position_embeddings.weight": theirs["transformer.wpe.weight"],
        **{f"final_norm.{kind}": theirs[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")},
    }
    if not shape.tied:
        params["output.weight"] = theirs["lm_head.weight"]
    for i in range(shape.layers):
        for our_name, their_name in GPT2_LAYER.items():
            weight, bias = (
                theirs[f"transformer.h.{i}.{their_name}.{kind}"] for kind in ("weight", "bias")
            )
            weight = weight.T if weight.dim() == 2 else weight
            if our_name == "attention.qkv":
                heads = (3, shape.heads, shape.head_size)
                weight = weight.reshape(*heads, shape.hidden).transpose(0, 1)
                bias = bias.reshape(heads).transpose(0, 1)
            params[f"layers.{i}.{our_name}.weight"] = weight
            params[f"layers.{i}.{our_name}.bias"] = bias
    return params


GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def llama_from_oracle(params: Parameters, shape: Shape) -> Parameters:
    """LlamaForCausalLM's parameters: q, k, v and gate, up are linears of their own."""
    q = shape.heads // shape.groups
    theirs = {}
    for full_name, value in params.items():
        name, kind = full_name.rsplit(".", 1)
        path = llama_path(name)
        if name.endswith("attention.qkv"):
            parts = dict(
                zip(("q_proj", "k_proj", "v_proj"), value.split([q, 1, 1], dim=1), strict=True)
            )
            theirs |= {
                f"{path}.{part}.{kind}": heads.flatten(0, 2) for part, heads in parts.items()
            }
        elif name.endswith("mlp.up"):
            theirs |= {f"{path}.gate_proj.{kind}": value[0], f"{path}.up_proj.{kind}": value[1]}
        else:
            theirs[f"{path}.{kind}"] = value
    return theirs


def oracle_from_llama(theirs: Parameters, shape: Shape) -> Parameters:
    """The inverse of `llama_from_oracle`."""
    params = {}
    for full_name in oracle.parameter_shapes(shape):
        name, kind = full_name.rsplit(".", 1)
        path = llama_path(name)
        if name.endswith("attention.qkv"):
            heads = [theirs[f"{path}.{part}_proj.{kind}"] for part in "qkv"]
            heads = [x.reshape(shape.groups, -1, shape.head_size, *x.shape[1:]) for x in heads]
            params[full_name] = torch.cat(heads, dim=1)
        elif name.endswith("mlp.up"):
            params[full_name] = torch.stack(
                [theirs[f"{path}.{part}_proj.{kind}"] for part in ("gate", "up")]
            )
        else:
            params[full_name] = theirs[f"{path}.{kind}"]
    return params


LLAMA_PARTS = {
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp",
    "mlp.down": "mlp.down_proj",
    "embedding.word_embeddings": "model.embed_tokens",
    "final_norm": "model.norm",
    "output": "lm_head",
}


def llama_path(name: str) -> str:
    """Where Llama keeps what the oracle calls `name` (for fused weights: the module that holds the
    parts)."""
    if name.startswith("layers."):
        _, i, part = name.split(".", 2)
        return f"model.layers.{i}.{LLAMA_PARTS[part]}"
    return LLAMA_PARTS[name]


def gpt2_model(shape: Shape, **config) -> torch.nn.Module:
    """GPT2LMHeadModel of this shape, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.ffn,
        activation_function="gelu_new",
        layer_norm_epsilon=shape.norm_epsilon,
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **config,
    )
    return GPT2LMHeadModel(config).double().eval()


def llama_model(shape: Shape, kind: str = "llama") -> torch.nn.Module:
    """LlamaForCausalLM of this shape, or MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rope_scaling:
        factor, low, high, length = shape.rope_scaling
        rope |= dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
        rope["original_max_position_embeddings"] = length
    biases = {} if kind == "qwen2" else {"attention_bias": shape.bias, "mlp_bias": shape.bias}
    config = AutoConfig.for_model(
        kind,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters=rope,
        **biases,
        tie_word_embeddings=shape.tied,
        attn_implementation="eager",
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def hugging_face(monkeypatch):
    """transformers, its Llama and those like it in float64 throughout.

    It computes norms, softmax and rotary angles in float32 whatever the model's dtype; what its
    module knows as float32 is made float64.
    """
    pytest.importorskip("transformers")
    from transformers import modeling_rope_utils
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    double = SimpleNamespace(**{**vars(torch), "float32": torch.float64, "float": torch.float64})
    models = (modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3)
    for module in (modeling_rope_utils, *models):
        monkeypatch.setattr(module, "torch", double)


@pytest.mark.usefixtures("hugging_face")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_hugging_face(name, packed):
    """One text in a row, or several documents, of which Hugging Face is given positions and a mask
    to add to scores."""
    shape = SHAPES[name]
    to_theirs, from_theirs = llama_from_oracle, oracle_from_llama
    if name.startswith("gpt2"):
        to_theirs, from_theirs = gpt2_from_oracle, oracle_from_gpt2
    params = oracle.random_parameters(shape)
    tokens, labels, loss_mask = batch(shape)
    bound = tolerance(shape, tokens.numel())

    kind = name.split("-")[0]
    model = gpt2_model(shape) if kind == "gpt2" else llama_model(shape, kind).double()
    weights = to_theirs(params, shape)
    parameters = dict(model.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    assert_close(from_theirs(weights, shape), params, bound=0.0)

    documents, options = (), {}
    if packed:
        tokens = tokens.clone()
        tokens[torch.tensor([0, 0, 1, 2]), torch.tensor([3, 6, 0, 8])] = END
        positions, segments = documents = oracle.documents(tokens, END)
        sees = (segments[:, :, None] == segments[:, None, :]).tril()
        mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(
            ~sees, torch.finfo(torch.float64).min
        )
        options = {"position_ids": positions, "attention_mask": mask[:, None]}
    their_logits = model(input_ids=tokens, use_cache=False, **options).logits
    assert_close(
        {"logits": oracle.logits(params, shape, tokens, *documents)},
        {"logits": their_logits.detach()},
        bound,
    )

    losses = torch.nn.functional.cross_entropy(
        their_logits.transpose(1, 2), labels, reduction="none"
    )
    their_loss = losses[loss_mask].mean()
    their_loss.backward()
    value, gradients = oracle.loss_and_gradients(
        params, shape, tokens, labels, loss_mask, *documents
    )
    assert value == pytest.approx(their_loss.item(), rel=bound)
    assert_close(
        gradients, from_theirs({key: p.grad for key, p in parameters.items()}, shape), bound
    )


@pytest.mark.parametrize(
    "shape",
    [
        GPT2,
        LLAMA,
        dataclasses.replace(
            LLAMA,
            position_embedding_type="none",
            normalization="LayerNorm",
            bias=True,
            swiglu=False,
        ),
        dataclasses.replace(GPT2, gelu="erf"),
    ],
    ids=["gpt2", "llama", "no-positions", "erf"],
)
def test_gradients_equal_finite_differences(shape):
    assert_finite_differences(oracle.random_parameters(shape), shape, batch(shape))


def assert_finite_differences(
    params: Parameters, shape: Shape, data: oracle.Batch, **options
) -> None:
    """Along one random direction per parameter: (loss(p + eu) - loss(p - eu)) / 2e = <gradient, u>.

    With e = 1e-5 the difference of two losses near 4 is rounded to about 1e-15 / 1e-5 = 1e-10, and
    what central differences leave out is about e^2 = 1e-10 times a third derivative of order 1 to
    10.
    """
    _, gradients = oracle.loss_and_gradients(params, shape, *data, **options)
    generator = torch.Generator().manual_seed(2)
    e = 1e-5
    for name, value in params.items():
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        direction /= direction.norm()
        moved = ({**params, name: value + sign * e * direction} for sign in (1, -1))
        up, down = (oracle.loss(weights, shape, *data, **options).item() for weights in moved)
        expected = (gradients[name] * direction).sum().item()
        assert (up - down) / (2 * e) == pytest.approx(expected, rel=1e-7, abs=1e-9), name


def test_masked_tokens_do_not_count():
    """The loss is the mean of the two halves' losses weighted by their unmasked tokens, not the
    mean of their means."""
    params = oracle.random_parameters(GPT2)
    tokens, labels, mask = batch(GPT2, rows=4)
    mask[:2, 3:] = False
    whole = oracle.loss(params, GPT2, tokens, labels, mask)
    halves = [
        oracle.loss(params, GPT2, tokens[i], labels[i], mask[i]) for i in (slice(0, 2), slice(2, 4))
    ]
    counts = [mask[:2].sum(), mask[2:].sum()]
    weighted = (halves[0] * counts[0] + halves[1] * counts[1]) / sum(counts)
    assert whole.item() == pytest.approx(weighted.item(), rel=1e-14)
    assert abs(whole.item() - (halves[0] + halves[1]).item() / 2) > 1e-3


@pytest.mark.parametrize("max_norm", [0.0, 4.0])
def test_training_equals_torch_adamw(max_norm):
    """Five steps with a changing learning rate; the clip takes effect on some of them and not on
    all."""
    shape, rates = LLAMA, [0.01, 0.02, 0.03, 0.02, 0.01]
    start = oracle.random_parameters(shape)
    batches = [batch(shape, seed=seed) for seed in range(3)]
    trained = oracle.train(
        start,
        shape,
        batches,
        rates,
        betas=(0.9, 0.95),
        epsilon=1e-6,
        weight_decay=0.3,
        max_norm=max_norm,
        steps=5,
    )

    params = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [p for name, p in params.items() if p.dim() > 1], "weight_decay": 0.3},
        {
            "params": [p for name, p in params.items() if p.dim() == 1],
            "weight_decay": 0.0,
        },  # LLAMA: the norms
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        value = oracle.loss(params, shape, *batches[step % 3])
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), max_norm or float("inf"))
        optimizer.step()
        assert trained.losses[step] == pytest.approx(value.item(), rel=1e-12)
        assert trained.grad_norms[step] == pytest.approx(norm.item(), rel=1e-12)
    if max_norm:
        assert min(trained.grad_norms) < max_norm < max(trained.grad_norms)
    # Differences grow along the trajectory: an update of a tiny gradient is its sign times the
    # rate.
    assert_close(trained.params, {name: p.detach() for name, p in params.items()}, bound=1e-10)
    assert trained.losses[3] < trained.losses[0]
    assert all(
        torch.equal(start[name], value) for name, value in oracle.random_parameters(shape).items()
    )


def test_decay_spares_biases_and_norms():
    spared = {name for name in oracle.parameter_shapes(GPT2) if not oracle.decays(name)}
    layer = (
        "attention_norm.weight",
        "attention_norm.bias",
        "attention.qkv.bias",
        "attention.output.bias",
    )
    layer += ("mlp_norm.weight", "mlp_norm.bias", "mlp.up.bias", "mlp.down.bias")
    expected = {f"layers.{i}.{part}" for i in range(GPT2.layers) for part in layer}
    assert spared == expected | {"final_norm.weight", "final_norm.bias"}

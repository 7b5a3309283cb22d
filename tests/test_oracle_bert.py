"""The oracle's BERT against Hugging Face's, its layers against torch's TransformerEncoder, and
finite differences."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests import oracle, test_oracle
from tests.oracle import BertBatch, Parameters, Shape
from tests.test_oracle import assert_close, assert_finite_differences

BERT = Shape(
    architecture="bert",
    layers=3,
    hidden=24,
    heads=4,
    groups=4,
    head_size=6,
    ffn=40,
    vocab=61,
    seq=10,
    positions=16,
    norm_epsilon=1e-3,
    norm_placement="post",
    gelu="erf",
    pair=True,
)
PRE = replace(BERT, norm_placement="pre")
MODERN = replace(
    PRE,
    groups=2,
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    bias=False,
    tied=False,
)


def tolerance(shape: Shape, tokens: int) -> float:
    """As for a GPT, the heads counted as a layer: dense, gelu, norm and output are as long a
    way."""
    return test_oracle.tolerance(replace(shape, layers=shape.layers + 1), tokens)


def batch(shape: Shape, rows: int = 4, seed: int = 1) -> BertBatch:
    """Random tokens, also as padding: none in the first row and two more in each row. A third of
    the text is to be predicted, and the third row is no pair."""
    generator = torch.Generator().manual_seed(seed)
    size = (rows, shape.seq)
    position, length = torch.arange(shape.seq), shape.seq - 2 * torch.arange(rows)[:, None]
    text = position < length
    return BertBatch(
        tokens=torch.randint(shape.vocab, size, generator=generator),
        token_types=((position >= length // 2) & text).long(),
        segments=text.long(),
        labels=torch.randint(shape.vocab, size, generator=generator),
        loss_mask=text & (torch.rand(size, generator=generator) < 0.3),
        pair_label=torch.randint(2, (rows,), generator=generator),
        pair_mask=torch.arange(rows) != 2,
    )


def bert_from_oracle(params: Parameters, shape: Shape) -> Parameters:
    """The parameters of Hugging Face's BertForPreTraining or, without a pair head, BertForMaskedLM.
    Query, key and value are linears of their own."""
    theirs = {}
    for full_name, value in params.items():
        name, kind = full_name.rsplit(".", 1)
        if name.startswith("layers."):
            _, i, part = name.split(".", 2)
            path = f"bert.encoder.layer.{i}.{BERT_LAYER[part]}"
        else:
            path = BERT_PARTS[name]
        if name.endswith("attention.qkv"):
            for j, part in enumerate(("query", "key", "value")):
                theirs[f"{path}.{part}.{kind}"] = value[:, j].flatten(0, 1)
        else:
            theirs[f"{path}.{kind}"] = value
    if not shape.tied:  # then theirs has another bias, which nothing uses
        theirs["cls.predictions.decoder.bias"] = theirs["cls.predictions.bias"]
    return theirs


BERT_PARTS = {
    "embedding.word_embeddings": "bert.embeddings.word_embeddings",
    "embedding.position_embeddings": "bert.embeddings.position_embeddings",
    "embedding.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "mlm_head.dense": "cls.predictions.transform.dense",
    "mlm_head.norm": "cls.predictions.transform.LayerNorm",
    "mlm_head": "cls.predictions",
    "output": "cls.predictions.decoder",
    "pooler": "bert.pooler.dense",
    "pair_head": "cls.seq_relationship",
}
BERT_LAYER = {
    "attention_norm": "attention.output.LayerNorm",
    "attention.qkv": "attention.self",
    "attention.output": "attention.output.dense",
    "mlp_norm": "output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}


def bert_model(shape: Shape, **config) -> torch.nn.Module:
    """BertForPreTraining or BertForMaskedLM of this shape, in evaluation mode."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    config = BertConfig(
        vocab_size=shape.vocab,
        max_position_embeddings=shape.positions,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_act={"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[shape.gelu],
        layer_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tied,
        pad_token_id=None,  # else the embedding of this token would get no gradient
        attn_implementation="eager",
        **config,
    )
    return (BertForPreTraining if shape.pair else BertForMaskedLM)(config).double().eval()


def their_output(model: torch.nn.Module, params: Parameters, shape: Shape, data: BertBatch):
    """What Hugging Face's model gives with the oracle's parameters, through which gradients
    flow."""
    weights = bert_from_oracle(params, shape)
    assert weights.keys() == {name for name, _ in model.named_parameters()}
    options = {
        "input_ids": data.tokens,
        "token_type_ids": data.token_types,
        "attention_mask": data.segments,
        "labels": data.labels.masked_fill(~data.loss_mask, -100),
    }
    if shape.pair:
        options["next_sentence_label"] = data.pair_label.masked_fill(~data.pair_mask, -100)
    return torch.func.functional_call(model, weights, kwargs=options)


def leaves_of(params: Parameters) -> Parameters:
    return {name: value.clone().requires_grad_() for name, value in params.items()}


def gradients_of(value: torch.Tensor, leaves: Parameters) -> Parameters:
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "mlm"])
@pytest.mark.parametrize("gelu", ["erf", "tanh"])
def test_logits_terms_and_gradients_equal_hugging_face(gelu, pair, tied):
    """Theirs lets padding look at text, ours at padding: their logits are compared where there is
    text."""
    pytest.importorskip("transformers")
    shape = replace(BERT, gelu=gelu, pair=pair, tied=tied)
    params, data = oracle.random_parameters(shape), batch(shape)
    bound, text, leaves = (
        tolerance(shape, data.tokens.numel()),
        data.segments == 1,
        leaves_of(params),
    )
    theirs = their_output(bert_model(shape), leaves, shape, data)

    scores, pair_scores = oracle.bert_logits(
        params, shape, data.tokens, data.token_types, data.segments
    )
    their_scores = theirs.prediction_logits if pair else theirs.logits
    assert_close({"logits": scores[text]}, {"logits": their_scores.detach()[text]}, bound)
    terms = [cross_entropy(their_scores[data.loss_mask], data.labels[data.loss_mask]).item(), 0.0]
    if pair:
        their_pairs = theirs.seq_relationship_logits.detach()
        assert_close({"pairs": pair_scores}, {"pairs": their_pairs}, bound)
        terms[1] = cross_entropy(
            their_pairs[data.pair_mask], data.pair_label[data.pair_mask]
        ).item()
    assert [term.item() for term in oracle.bert_terms(params, shape, *data)] == pytest.approx(
        terms, rel=bound
    )

    value, gradients = oracle.loss_and_gradients(params, shape, *data)
    assert value == pytest.approx(theirs.loss.item(), rel=bound)
    assert_close(gradients, gradients_of(theirs.loss, leaves), bound)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_layers_equal_torchs_transformer_encoder(placement):
    """The hidden states of text, and the gradients of a random sum of them."""
    shape = replace(BERT, norm_placement=placement)
    data, leaves = batch(shape), leaves_of(oracle.random_parameters(shape))
    text, bound = data.segments == 1, tolerance(shape, data.tokens.numel())
    x = oracle.embed(leaves, shape, data.tokens, data.token_types)
    ours = oracle.transform(
        leaves, shape, x, data.segments[:, :, None] == data.segments[:, None, :]
    )[text]

    pre, kind = placement == "pre", {"dtype": torch.float64}
    layer = torch.nn.TransformerEncoderLayer(
        shape.hidden,
        shape.heads,
        shape.ffn,
        0.0,
        "gelu",
        shape.norm_epsilon,
        True,
        norm_first=pre,
        **kind,
    )
    final = torch.nn.LayerNorm(shape.hidden, shape.norm_epsilon, **kind) if pre else None
    encoder = torch.nn.TransformerEncoder(layer, shape.layers, final, enable_nested_tensor=False)
    weights = torch_encoder_from_oracle(leaves)
    assert weights.keys() == {name for name, _ in encoder.named_parameters()}
    padding = {"src_key_padding_mask": ~text}
    theirs = torch.func.functional_call(encoder, weights, (x,), padding)[text]

    assert_close({"hidden": ours.detach()}, {"hidden": theirs.detach()}, bound)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=ours.dtype)
    used = {
        name: leaf
        for name, leaf in leaves.items()
        if not name.startswith(("mlm_head", "pooler", "pair_head"))
    }
    gradients = [
        dict(zip(used, torch.autograd.grad((y * weight).sum(), used.values(), retain_graph=True)))
        for y in (ours, theirs)
    ]
    assert_close(*gradients, bound)


def torch_encoder_from_oracle(params: Parameters) -> Parameters:
    """The parameters of torch's TransformerEncoder: in_proj gives all q, all k, all v."""
    parts = {
        "attention_norm": "norm1",
        "attention.output": "self_attn.out_proj",
        "mlp_norm": "norm2",
        "mlp.up": "linear1",
        "mlp.down": "linear2",
    }
    theirs = {}
    for full_name, value in params.items():
        name, kind = full_name.rsplit(".", 1)
        if name == "final_norm":
            theirs[f"norm.{kind}"] = value
        elif name.startswith("layers."):
            layer, part = name[: len("layers.0")], name[len("layers.0.") :]
            if part == "attention.qkv":
                theirs[f"{layer}.self_attn.in_proj_{kind}"] = value.transpose(0, 1).flatten(0, 2)
            else:
                theirs[f"{layer}.{parts[part]}.{kind}"] = value
    return theirs


@pytest.mark.parametrize(
    "shape",
    [
        BERT,
        PRE,
        MODERN,
        replace(MODERN, norm_placement="post", pair=False, position_embedding_type="none"),
    ],
    ids=["post", "pre", "modern", "modern-post-mlm"],
)
def test_gradients_equal_finite_differences(shape):
    assert_finite_differences(oracle.random_parameters(shape), shape, batch(shape))


@pytest.mark.parametrize("shape", [BERT, PRE, MODERN], ids=["post", "pre", "modern"])
def test_what_is_in_the_padding_changes_nothing_and_what_is_in_the_text_does(shape):
    params, data = oracle.random_parameters(shape), batch(shape)
    expected = oracle.loss(params, shape, *data)
    other = (data.tokens + 1) % shape.vocab
    padding = data._replace(
        tokens=torch.where(data.segments == 1, data.tokens, other),
        token_types=torch.where(data.segments == 1, data.token_types, 1),
    )
    assert oracle.loss(params, shape, *padding).item() == expected.item()
    last = data.tokens.clone()
    last[0, -1] = other[0, -1]  # seen by all before it, and by the pair head
    before = oracle.bert_logits(params, shape, data.tokens, data.token_types, data.segments)
    after = oracle.bert_logits(params, shape, last, data.token_types, data.segments)
    for a, b in zip(before, after):
        difference = (a - b).abs().amax(-1)
        assert difference[0].min() > 1e-6 and difference[1:].max() == 0


@pytest.mark.parametrize("shape", [BERT, MODERN], ids=["post", "modern"])
def test_terms_are_means_over_all_tokens_and_all_pairs(shape):
    """Those of two parts weighted by what they count; with dropout too, which knows samples and not
    rows."""
    params, data, samples = (
        oracle.random_parameters(shape),
        batch(shape),
        torch.tensor([7, 3, 2**33, 4]),
    )
    dropout = oracle.Dropout(1234, attention=0.2, hidden=0.1, samples=samples)
    whole = oracle.bert_terms(params, shape, *data, dropout=dropout)
    sums = [0.0, 0.0]
    for rows in (torch.tensor([2, 0]), torch.tensor([1, 3])):
        part = BertBatch(*(value[rows] for value in data))
        terms = oracle.bert_terms(
            params, shape, *part, dropout=replace(dropout, samples=samples[rows])
        )
        for i, mask in enumerate((part.loss_mask, part.pair_mask)):
            sums[i] += (terms[i] * mask.sum()).item()
    means = [sums[0] / data.loss_mask.sum().item(), sums[1] / data.pair_mask.sum().item()]
    assert [term.item() for term in whole] == pytest.approx(means, rel=1e-14)
    assert oracle.loss(params, shape, *data, dropout=dropout).item() == sum(whole).item()


def test_a_term_that_counts_nothing_is_0():
    params, data = oracle.random_parameters(BERT), batch(BERT)
    no_tokens = data._replace(loss_mask=torch.zeros_like(data.loss_mask))
    no_pairs = data._replace(pair_mask=torch.zeros_like(data.pair_mask))
    tokens, pairs = oracle.bert_terms(params, BERT, *data)
    assert oracle.bert_terms(params, BERT, *no_tokens) == (0, pairs)
    assert oracle.bert_terms(params, BERT, *no_pairs) == (tokens, 0)
    for part, left_out in (("mlm_head", no_tokens), (("pooler", "pair_head"), no_pairs)):
        _, gradients = oracle.loss_and_gradients(params, BERT, *left_out)
        for name, gradient in gradients.items():
            assert gradient.isfinite().all() and gradient.any().item() != name.startswith(part), (
                name
            )


def test_names_in_the_order_of_the_model():
    def names(shape):
        return [name for name in oracle.parameter_shapes(shape) if not name.startswith("layers.")]

    both = ("weight", "bias")
    assert names(replace(BERT, tied=False)) == [
        *(f"embedding.{part}_embeddings.weight" for part in ("word", "position", "token_type")),
        *(f"embedding_norm.{kind}" for kind in both),
        *(f"mlm_head.dense.{kind}" for kind in both),
        *(f"mlm_head.norm.{kind}" for kind in both),
        "mlm_head.bias",
        "output.weight",
        *(f"{part}.{kind}" for part in ("pooler", "pair_head") for kind in both),
    ]
    bare = ["embedding.word_embeddings", "embedding.token_type_embeddings", "final_norm"]
    bare += ["mlm_head.dense", "mlm_head.norm", "output", "pooler", "pair_head"]
    assert names(MODERN) == [f"{part}.weight" for part in bare]


def test_which_parameters_decay_and_which_are_around_1():
    params = oracle.random_parameters(BERT)
    for name, value in params.items():
        is_norm = name.endswith(".weight") and value.dim() == 1
        assert value.mean().item() == pytest.approx(float(is_norm), abs=0.3), (
            name
        )  # 5 x 0.2 / sqrt(12) for the fewest
        assert oracle.decays(name) == (name.endswith(".weight") and not is_norm), name


@pytest.mark.parametrize("wrong", [{"norm_placement": "post"}, {"pair": True}])
def test_a_gpt_has_no_post_norm_and_no_pair_head(wrong):
    with pytest.raises(ValueError, match="GPT"):
        Shape(**wrong)

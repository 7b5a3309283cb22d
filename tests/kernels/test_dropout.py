"""Dropout by counters: the format, the operator, and masks that have nothing to do with each
other."""

from functools import cache
from itertools import combinations
from math import sqrt

import numpy as np
import pytest
import torch

from megalite.kernels.dropout import bias_dropout_add, keep_mask, site_id
from megalite.kernels.philox import key_of, philox4x32

KEY = key_of(1234, "dropout")


def mask(rows, samples, columns: int, site: int = 25, p: float = 0.1, key=KEY) -> torch.Tensor:
    """keep_mask for any sequences of rows and of samples: [samples, rows, columns]."""
    rows, samples = torch.tensor(list(rows)), torch.tensor(list(samples))
    return keep_mask(rows, samples[:, None], columns, site, key, p)


def word_by_the_format(row: int, column: int, sample: int, layer: int, site: int, key=KEY) -> int:
    """The word of one element as docs/randomness.md has it, in NumPy's Philox, which passes the
    published answers."""
    counter = [
        column // 256 * 64 + column % 64,
        row,
        sample % 2**32,
        (sample // 2**32 + 2**16 * (8 * layer + site)) % 2**32,
    ]
    return int(philox4x32(np.array(counter, np.uint32), key)[column // 64 % 4])


# The format


@pytest.mark.parametrize(("layer", "site"), [(0, 0), (0, 3), (7, 2), (8191, 7)])
@pytest.mark.parametrize("sample", [0, 77, 2**32 - 1, 2**32 + 5, 2**48 - 1])
def test_the_mask_is_the_one_of_the_format(layer, site, sample):
    rows, columns = [0, 1, 4095, 2**32 - 1], [0, 1, 63, 64, 127, 128, 192, 255, 256, 300, 1023]
    kept = mask(rows, [sample], max(columns) + 1, site_id(layer, site), 0.5)[0]
    for i, row in enumerate(rows):
        for column in columns:
            assert kept[i, column] == (
                word_by_the_format(row, column, sample, layer, site) >= 2**31
            ), (row, column)


@pytest.mark.parametrize(
    ("row", "sample"), [(2**32 + 3, 1), (-1, 1), (3, -1), (3, 2**48), (2**62, 2**63 - 1)]
)
def test_numbers_are_taken_mod_2_to_the_32(body, row, sample):
    numbers = torch.tensor([row]), torch.tensor([sample])
    y = bias_dropout_add(torch.ones(1, 300), None, None, *numbers, 65535, *KEY, 0.5)
    expected = [
        word_by_the_format(row % 2**32, column, sample, 8191, 7) >= 2**31 for column in range(300)
    ]
    assert (y[0] != 0).tolist() == expected


def test_the_first_bits_of_a_mask_stay_what_they_are():
    """Sample 0, row 0 of the embedding's dropout at seed 1234 and p = 1/2; and of a far site."""
    near = mask([0], [0], 32, site_id(0, 3), 0.5).int().flatten().tolist()
    assert "".join(map(str, near)) == "10101101101100011111011010001001"
    far = mask([70_000], [2**40 + 3], 600, site_id(95, 1), 0.5).int().flatten()[-32:].tolist()
    assert "".join(map(str, far)) == "00110011000000100010100001000001"


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200, 256, 257, 515])
def test_a_part_has_what_the_whole_has(columns):
    """Rows that a rank holds of a sequence, its heads, a microbatch, fewer columns: each is cut out
    of one mask."""
    rows, samples = range(40), range(2**32 - 3, 2**32 + 3)
    whole = mask(rows, samples, 515)
    for part in (slice(0, 10), slice(10, 40), slice(39, 40), slice(3, None, 7)):
        assert torch.equal(mask(rows[part], samples[1:4], columns), whole[1:4, part, :columns])
        assert torch.equal(mask(rows[part], samples[5:], columns), whole[5:, part, :columns])


def test_rows_and_samples_may_lie_in_any_dimensions():
    whole = mask(range(12), range(5), 70)
    s_b = keep_mask(torch.arange(12)[:, None], torch.arange(5), 70, 25, KEY, 0.1)
    assert torch.equal(s_b, whole.transpose(0, 1))
    b_n_s = keep_mask(torch.arange(12).view(3, 4), torch.arange(5)[:, None, None], 70, 25, KEY, 0.1)
    assert torch.equal(b_n_s, whole.view(5, 3, 4, 70))
    assert keep_mask(torch.arange(0)[:, None], torch.arange(5), 70, 25, KEY, 0.1).shape == (
        0,
        5,
        70,
    )


def test_sites_are_numbered_and_limited():
    assert [site_id(0, 0), site_id(0, 7), site_id(3, 1), site_id(8191, 7)] == [0, 7, 25, 2**16 - 1]
    for layer, site in ((-1, 0), (8192, 0), (0, -1), (0, 8)):
        with pytest.raises(ValueError, match=f"site {site} of layer {layer}"):
            site_id(layer, site)


# The operator


def arguments(bias: bool, residual: bool, dtype=torch.float64, shape=(6, 3, 70), p=0.3) -> tuple:
    """Arguments of bias_dropout_add for x [s, b, h]."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    rows, samples = torch.arange(shape[0])[:, None], torch.arange(9, 9 + shape[1])
    x, b, r = draw(*shape), draw(shape[-1]), draw(*shape)
    return x, b if bias else None, r if residual else None, rows, samples, 25, *KEY, p


BOTH = pytest.mark.parametrize(
    ("bias", "residual"),
    [(True, True), (True, False), (False, True), (False, False)],
    ids=["b+r", "b", "r", "none"],
)


@BOTH
def test_the_operator_is_a_composition(body, bias, residual):
    x, b, r, rows, samples, *rest = arguments(bias, residual)
    keep = keep_mask(rows, samples, x.shape[-1], rest[0], KEY, rest[-1])
    expected = (x + (b if bias else 0)) * keep / (1 - rest[-1]) + (r if residual else 0)
    torch.testing.assert_close(bias_dropout_add(x, b, r, rows, samples, *rest), expected)


@BOTH
def test_the_operator_passes_opcheck(body, bias, residual):
    torch.library.opcheck(bias_dropout_add, arguments(bias, residual, torch.float32))


def test_the_operator_passes_opcheck_without_gradients(body):
    detached = [
        a.detach() if isinstance(a, torch.Tensor) else a
        for a in arguments(True, True, torch.bfloat16)
    ]
    torch.library.opcheck(bias_dropout_add, tuple(detached))


@BOTH
def test_the_gradient_is_the_derivative(bias, residual):
    args = arguments(bias, residual, shape=(2, 3, 5))
    assert torch.autograd.gradcheck(bias_dropout_add, args)
    assert torch.autograd.gradgradcheck(bias_dropout_add, args)


def test_a_single_row_needs_no_leading_dim(body):
    x, b, r, _, _, *rest = arguments(True, True, torch.float32, shape=(1, 1, 70))
    x, r, number = (
        x.detach()[0, 0].requires_grad_(),
        r.detach()[0, 0].requires_grad_(),
        torch.tensor(3),
    )
    row, whole = ((t, b, s, number, number, *rest) for t, s in ((x, r), (x[None], r[None])))
    expected = torch.autograd.grad(bias_dropout_add(*whole).square().sum(), (x, b, r))
    got = torch.autograd.grad(bias_dropout_add(*row).square().sum(), (x, b, r))
    assert all(torch.equal(*pair) for pair in zip(got, expected))


def test_the_inputs_stay_and_may_be_of_any_strides(body):
    x, b, r, *rest = arguments(True, True, torch.float32)
    before = [t.detach().clone() for t in (x, b, r)]
    expected = bias_dropout_add(x, b, r, *rest)
    for t, was in zip((x, b, r), before):
        assert torch.equal(t, was)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    assert torch.equal(bias_dropout_add(strided, b, r, *rest), expected)
    torch.library.opcheck(
        bias_dropout_add, (strided, None, None, *rest), test_utils="test_faketensor"
    )


def test_it_compiles_whole(body):
    torch._dynamo.reset()
    args = arguments(True, True, torch.float32)

    def step(*args):
        return bias_dropout_add(*args).square().mean()

    eager, compiled = (
        torch.autograd.grad(f(*args), args[:3])
        for f in (step, torch.compile(step, backend="aot_eager", fullgraph=True))
    )
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_for_the_backward_but_coordinates(body):
    args, kept = arguments(True, True, shape=(8, 4, 300)), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        bias_dropout_add(*args).sum().backward()
    assert sorted(kept) == [4, 8]  # the samples, the rows


def test_bf16_is_rounded_once_where_there_is_nothing_to_add(body):
    """Were 1 / 0.9 rounded to bf16 first, everything that stays would be 0.16% too small."""
    x = torch.linspace(1, 2, 1000).bfloat16()[None, None]
    y = bias_dropout_add(x, None, None, torch.arange(1)[:, None], torch.arange(1), 25, *KEY, 0.1)
    kept = y != 0
    assert 850 < kept.sum() < 950
    assert torch.equal(y[kept], (x[kept].float() / 0.9).bfloat16())


@pytest.mark.parametrize("shape", [(0, 2, 5), (3, 0, 5), (3, 2, 0)])
def test_empty_tensors_give_empty_tensors(body, shape):
    args = arguments(True, True, torch.float32, shape)
    y = bias_dropout_add(*args)
    y.sum().backward()
    assert y.shape == args[0].grad.shape == shape


def test_tensors_of_any_number_of_dims(body):
    """Rows are flattened where there are more than three dims of them."""
    x, rows, samples = (
        torch.randn(2, 3, 4, 5, 60),
        torch.arange(60).view(3, 4, 5),
        torch.arange(2).view(2, 1, 1, 1),
    )
    for take in (x, x[0], x[0, 0], x[0, 0, 0], x[0, 0, 0, 0]):
        lead = take.dim() - 1
        own_rows = (
            rows
            if lead > 2
            else rows[0, 0]
            if lead == 1
            else rows[0]
            if lead == 2
            else rows[0, 0, 0]
        )
        own_samples = samples if lead == 4 else samples[0, 0, 0, 0]
        kept = keep_mask(
            own_rows.expand(take.shape[:-1]), own_samples.expand(take.shape[:-1]), 60, 25, KEY, 0.3
        )
        y = bias_dropout_add(take, None, None, own_rows, own_samples, 25, *KEY, 0.3)
        assert y.shape == take.shape and torch.equal(y != 0, kept)


def test_wrong_arguments_are_refused_with_words(body):
    x, b, r, rows, samples, *rest = arguments(True, True, torch.float32)
    bad = [
        (TypeError, "floating-point", (x.detach().long(), None, None, rows, samples, *rest)),
        (ValueError, r"the bias is \(69,\), not \(70,\)", (x, b[1:], r, rows, samples, *rest)),
        (
            ValueError,
            r"the residual is \(3, 70\), not \(6, 3, 70\)",
            (x, b, r[0], rows, samples, *rest),
        ),
        (
            TypeError,
            "the bias is torch.float64 on cpu, x is torch.float32",
            (x, b.double(), r, rows, samples, *rest),
        ),
        (
            TypeError,
            "the residual is torch.float32 on meta",
            (x, b, r.to("meta"), rows, samples, *rest),
        ),
        (
            ValueError,
            r"rows \(5, 1\) do not broadcast to the rows \(6, 3\)",
            (x, b, r, rows[1:], samples, *rest),
        ),
        (TypeError, "samples are of torch.int32, not int64", (x, b, r, rows, samples.int(), *rest)),
        (ValueError, "0 <= p < 1, not -0.1", (x, b, r, rows, samples, *rest[:-1], -0.1)),
    ]
    for kind, words, args in bad:
        with pytest.raises(kind, match=words):
            bias_dropout_add(*args)


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.0, 1.0), (1e-12, 1.0), (2**-20, 1 - 2**-20), (1 - 2**-20, 2**-20), (1 - 1e-12, 0.0)],
)
def test_probabilities_near_0_and_1(p, kept):
    keep = mask(range(1024), range(1), 1024, p=p)
    assert abs(keep.double().mean().item() - kept) <= 5 * sqrt(kept * (1 - kept) / keep.numel())


# Statistics: all bounds are 5 standard deviations, over a million elements

N = 1024
CORRELATION = 5 / N
CHI_SQUARE = 31.8
"""Exceeded with the probability of 5 standard deviations, 6e-7, by a chi-square of 3 degrees of
freedom."""


@cache
def million(first_row=0, sample=5, layer=3, site=1, seed=1234, p=0.3) -> torch.Tensor:
    """Dropped elements of 1024 rows of 1024 columns, as float64."""
    rows = range(first_row, first_row + N)
    return (~mask(rows, [sample], N, site_id(layer, site), p, key_of(seed, "dropout"))[0]).double()


def assert_unrelated(a: torch.Tensor, b: torch.Tensor, p: float = 0.3) -> None:
    """The correlation is that of independent numbers, and so are the counts of each of the four
    joint outcomes."""
    a, b = a.flatten(), b.flatten()
    n, both = a.numel(), (a @ b).item()
    first, second = a.sum().item(), b.sum().item()
    counts = (both, first - both, second - both, n - first - second + both)
    shares = (p * p, p * (1 - p), p * (1 - p), (1 - p) ** 2)
    assert (
        sum((count - n * share) ** 2 / (n * share) for count, share in zip(counts, shares))
        < CHI_SQUARE
    )
    correlation = (both / n - first * second / n**2) / (p * (1 - p))
    assert abs(correlation) < CORRELATION * N / sqrt(n)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate_is_p(p):
    dropped = million(p=p)
    for part in (dropped, dropped[:, ::64], dropped[::8], dropped[:, 192:256]):
        assert abs(part.mean().item() - p) < 5 * sqrt(p * (1 - p) / part.numel())
    for sums in (dropped.sum(0), dropped.sum(1)):
        assert (sums - N * p).abs().max() < 6 * sqrt(N * p * (1 - p))  # the worst of 1024 rows


OTHERS = {
    "here": {},
    "another site": {"site": 2},
    "attention's site": {"site": 0},
    "the next layer": {"layer": 4},
    "the site before in the numbering": {"site": 0, "layer": 4},
    "the next sample": {"sample": 6},
    "the next epoch": {"sample": 5 + 300},
    "2^32 samples later": {"sample": 5 + 2**32},
    "another seed": {"seed": 1235},
    "rows further on": {"first_row": N},
}


@pytest.mark.parametrize(("one", "other"), [*combinations(OTHERS, 2)])
def test_masks_of_different_things_are_unrelated(one, other):
    assert_unrelated(million(**OTHERS[one]), million(**OTHERS[other]))


@pytest.mark.parametrize("distance", [1, 2, 63, 64, 65, 128, 192, 256, 512])
def test_elements_of_one_mask_are_unrelated(distance):
    """At any distance in rows or columns: 64 columns on is another word of the same counter, 256 on
    another counter."""
    dropped = million()
    assert_unrelated(dropped[:, distance:], dropped[:, :-distance])
    assert_unrelated(dropped[distance:], dropped[:-distance])
    assert_unrelated(dropped[distance:, distance:], dropped[:-distance, :-distance])


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_runs_are_as_long_as_chance_makes_them(along):
    """The test of Wald and Wolfowitz: the number of runs of equal elements."""
    bits = (million() if along == "columns" else million().t()).flatten()
    n, ones = bits.numel(), bits.sum().item()
    runs = 1 + (bits[1:] != bits[:-1]).sum().item()
    expected = 1 + 2 * ones * (n - ones) / n
    assert abs(runs - expected) < 5 * sqrt((expected - 1) * (expected - 2) / (n - 1))


def test_the_assertion_notices_what_is_related():
    """So that the bounds above mean something."""
    a, b = million(), million(site=2)
    mixed = torch.where(torch.rand(N, N, generator=torch.Generator().manual_seed(1)) < 0.02, a, b)
    with pytest.raises(AssertionError):
        assert_unrelated(a, mixed)
    with pytest.raises(AssertionError):
        assert_unrelated(a, million(site=2, p=0.31))

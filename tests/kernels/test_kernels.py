"""The kernels of csrc/ against float64: each instruction set of the CPU, and the CUDA sources under
emulation.

Built here from the sources, so none of this needs the extension or torch.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalite.kernels.philox import key_of
from tests.kernels import bare, reference

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
KEY = key_of(1234, "dropout")
EMULATED = ["cuda", "cuda reversed"]
ASAN = os.environ.get(
    "MEGALITE_TEST_ASAN"
)  # the libraries to test in a process that runs under AddressSanitizer
FEW = [1, 2, 31, 33, 64, 65, 128, 129, 200, 256, 257, 515, 1000]
"""Columns of short rows: parts of a register, of a warp, of a block of 256."""
LONG = [1024, 1025, 2048, 2051, 4097, 16385, 20000]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, ctypes.CDLL]:
    """The CPU's kernels and, where CUDA's headers are, the emulated ones."""
    folder = Path(ASAN) if ASAN else tmp_path_factory.mktemp("kernels")
    found = {}
    for name, emulated, level in (("cpu", False, "-O3"), ("cuda", True, "-O1")):
        if not emulated or bare.CUDA_INCLUDE:
            library = folder / f"{name}.so" if ASAN else bare.build(folder, emulated, level)
            found[name] = ctypes.CDLL(str(library))
    return found


@pytest.fixture(params=[*bare.CPU_LEVELS, *EMULATED])
def target(request, libraries) -> bare.Target:
    kind = request.param.split()[0] if request.param in EMULATED else "cpu"
    if kind == "cpu" and request.param not in bare.cpu_levels():
        pytest.skip(f"this processor has no {request.param}")
    if kind not in libraries:
        pytest.skip("CUDA's headers are not here")
    return bare.Target(libraries[kind], request.param)


def draw(shape, seed: int, spread: float = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape) * spread


def shape_for(columns: int) -> tuple[int, int, int, int]:
    return (2, 2, 5, columns) if columns <= max(FEW) else (1, 1, 3, columns)


def dropout_for(shape, p=0.3) -> bare.Dropout:
    """Rows as attention has them, (head, query), from the third head of a rank on; samples far
    apart."""
    b, n, s, _ = shape
    rows = np.arange(2 * n * s, 3 * n * s).reshape(1, n, s)
    return bare.Dropout(rows, np.array([7, 2**40 + 3])[:b].reshape(b, 1, 1), 25, KEY, p)


def mask_for(shape, kind: str) -> np.ndarray | None:
    """Masks that broadcast over heads; "rows" leaves some rows without any column, "heads" over the
    batch."""
    b, n, s, columns = shape
    rng = np.random.default_rng(columns)
    if kind == "none":
        return None
    if kind == "padding":
        return np.arange(columns) < rng.integers(1, columns + 1, (b, 1, 1, 1))
    mask = rng.random((b, 1, s, columns) if kind == "rows" else (1, n, s, columns)) < 0.5
    mask[..., 1, :] = False
    return mask


CASES = [
    (mask, causal, dropped)
    for mask, causal in (
        ("none", False),
        ("none", True),
        ("padding", False),
        ("rows", True),
        ("heads", False),
    )
    for dropped in (False, True)
]


def check_softmax(
    target: bare.Target, dtype: str, columns: int, mask: str, causal: bool, dropped: bool
) -> None:
    """Forward and backward of one case."""
    shape = shape_for(columns)
    options = dict(
        mask=mask_for(shape, mask), causal=causal, dropout=dropout_for(shape) if dropped else None
    )
    scale = 0.37
    x, grad = bare.encode(draw(shape, columns), dtype), bare.encode(draw(shape, columns + 1), dtype)
    exact_scale = float(np.float32(scale))
    y, lse, bound, lse_bound = reference.softmax(bare.decode(x), exact_scale, **options)
    out, out_lse = target.softmax(x, scale, **options)
    reference.assert_close(out, y, bound, dtype)
    reference.assert_close(out_lse, lse, lse_bound, "float32")

    if dropped:  # both take the kernel's lse
        given = out_lse.astype(np.float32)
        dx, bound = reference.softmax_backward(
            bare.decode(grad), exact_scale, None, bare.decode(x), out_lse, **options
        )
        got = target.softmax_backward(grad, scale, None, x, given, **options)
    else:
        kept = bare.encode(y, dtype)
        dx, bound = reference.softmax_backward(bare.decode(grad), exact_scale, bare.decode(kept))
        got = target.softmax_backward(grad, scale, kept, causal=causal)
    reference.assert_close(got, dx, bound, dtype)


@pytest.mark.parametrize("dtype", bare.TYPES)
@pytest.mark.parametrize(("mask", "causal", "dropped"), CASES)
def test_softmax(target, dtype, mask, causal, dropped):
    for columns in FEW:
        check_softmax(target, dtype, columns, mask, causal, dropped)


@pytest.mark.parametrize("dtype", bare.TYPES)
@pytest.mark.parametrize("dropped", [False, True])
def test_softmax_of_long_rows(target, dtype, dropped):
    for columns in LONG:
        check_softmax(
            target, dtype, columns, "rows" if columns % 2 else "none", columns == 2048, dropped
        )


@pytest.mark.parametrize("dtype", bare.TYPES)
@pytest.mark.parametrize(
    ("bias", "residual"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_bias_dropout_add(target, dtype, bias, residual):
    for columns in [*FEW, 1024, 2051, 4097]:
        shape = shape_for(columns)
        dropout = dropout_for(shape)
        x, b, r = (bare.encode(draw(s, i), dtype) for i, s in enumerate((shape, shape[-1:], shape)))
        b, r = b if bias else None, r if residual else None
        exact = (None if t is None else bare.decode(t) for t in (x, b, r))
        y, bound = reference.bias_dropout_add(*exact, dropout)
        reference.assert_close(target.bias_dropout_add(x, b, r, dropout), y, bound, dtype)


@pytest.mark.parametrize("p", [2**-32, 1e-3, 0.5, 0.999, 1 - 2**-33])
def test_exactly_the_elements_of_the_format_are_dropped(target, p):
    shape = (2, 2, 5, 700)
    dropout, x = dropout_for(shape, p), bare.encode(np.ones(shape), "float32")
    expected = reference.kept(dropout, shape)
    np.testing.assert_array_equal(target.bias_dropout_add(x, None, None, dropout) != 0, expected)
    if p < 0.99:
        np.testing.assert_array_equal(target.softmax(x, 1.0, dropout=dropout)[0] != 0, expected)


@pytest.mark.parametrize("columns", [5, 40, 2100])
def test_infinity_and_nan_are_those_of_torch(target, columns):
    """A NaN, +inf, or nothing but -inf makes a row NaN; -inf beside numbers is 0; a row that sees
    nothing is 0."""
    x = np.zeros((1, 1, 6, columns))
    x[..., 0, 1], x[..., 1, 2], x[..., 2, :], x[..., 3, 0] = np.nan, np.inf, -np.inf, -np.inf
    mask = np.ones((1, 1, 6, columns), bool)
    mask[..., 4, :] = False
    for dtype in ("float32", "float16"):
        y, lse = target.softmax(bare.encode(x, dtype), 1.0, mask)
        assert np.isnan(y[0, 0, :3]).all() and np.isnan(lse[0, 0, :3]).all()
        assert y[0, 0, 3, 0] == 0 and np.isclose(y[0, 0, 3, 1:], 1 / (columns - 1), rtol=1e-3).all()
        assert (y[0, 0, 4] == 0).all() and lse[0, 0, 4] == np.inf
        assert np.isclose(y[0, 0, 5], 1 / columns, rtol=1e-3).all()
    causal, _ = target.softmax(bare.encode(x[..., :3, :], "float32"), 1.0, causal=True)
    assert causal[0, 0, 0, 0] == 1 and (causal[0, 0, 0, 1:] == 0).all()  # the NaN is still to come
    assert np.isfinite(causal[0, 0, 1]).all() and np.isnan(causal[0, 0, 2]).all()


def test_large_scores_do_not_overflow(target):
    x = np.array([3e4, -3e4, 2.9e4, 3e4]).reshape(1, 1, 1, 4)
    for dtype in ("float32", "float16"):
        y, _ = target.softmax(bare.encode(x, dtype), 1.0)
        np.testing.assert_array_equal(y[0, 0, 0], [0.5, 0, 0, 0.5])


def test_every_number_of_16_bits_survives(target):
    """Reading and writing fp16 and bf16: 1 * x + 0 for all finite x, with a dropout that drops next
    to nothing."""
    for bits in (np.float16, np.uint16):
        x = np.arange(2**16, dtype=np.uint16).view(bits).reshape(1, 1, 64, 1024)
        dropout = bare.Dropout(np.arange(64), np.array(0), 0, KEY, 2**-32)
        y, values = target.bias_dropout_add(x, None, None, dropout), bare.decode(x)
        kept, finite = reference.kept(dropout, x.shape), np.isfinite(values)
        np.testing.assert_array_equal(y[kept & finite], values[kept & finite])
        np.testing.assert_array_equal(y[kept & ~finite], values[kept & ~finite])


ROWS = 7


@pytest.mark.parametrize("dtype", bare.TYPES)
def test_gelu_and_swiglu(target, dtype):
    for columns in [*FEW, 2051]:
        x, grad, b = (
            bare.encode(draw(s, i), dtype)
            for i, s in enumerate([(ROWS, columns)] * 2 + [(columns,)])
        )
        for bias in (None, b):
            exact = bare.decode(x), None if bias is None else bare.decode(bias)
            for g in (None, grad):
                y, bound = reference.bias_gelu(*exact, None if g is None else bare.decode(g))
                reference.assert_close(target.bias_gelu(x, bias, g), y, bound, dtype)
        both = bare.encode(draw((ROWS, 2 * columns), 9), dtype)
        for g in (None, grad):
            y, bound = reference.swiglu(bare.decode(both), None if g is None else bare.decode(g))
            reference.assert_close(target.swiglu(both, g), y, bound, dtype)


@pytest.mark.parametrize("dtype", bare.TYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(target, dtype, with_residual):
    for columns in [*FEW, 2051, 4097]:
        shape = (ROWS, columns)
        x, r, grad, grad_sum = (bare.encode(draw(shape, i), dtype) for i in range(4))
        weight = bare.encode(draw(columns, 9), dtype)
        r, grad_sum = (r, grad_sum) if with_residual else (None, None)
        exact = [None if t is None else bare.decode(t) for t in (x, r, weight)]
        y, s, scale, bound, of_sum = reference.rms_norm(*exact, 1e-5)
        got_y, got_s, got_scale = target.rms_norm(x, r, weight, 1e-5, group=1)
        reference.assert_close(got_y, y, bound + of_sum * scale[:, None] * abs(exact[2]), dtype)
        if with_residual:
            reference.assert_close(got_s, s, of_sum, dtype)
        reference.assert_close(
            got_scale, scale, reference.UNIT * (columns / 2 + 8) * scale, "float32"
        )

        given = bare.encode(s, dtype)
        exact_grads = [None if t is None else bare.decode(t) for t in (grad, grad_sum)]
        ds, parts, bound, of_parts = reference.rms_norm_backward(
            bare.decode(given), exact[2], *exact_grads, got_scale, group=3
        )
        got_ds, got_parts = target.rms_norm_backward(
            given, weight, grad, grad_sum, got_scale, group=3
        )
        reference.assert_close(got_ds, ds, bound, dtype)
        reference.assert_close(got_parts, parts, of_parts, "float32")


@pytest.mark.parametrize("dtype", bare.TYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotary(target, dtype, inverse):
    for d in (2, 6, 64, 66, 128, 130, 600):
        whole = bare.encode(draw((3, 2, 4, 2 * d), d), dtype)
        x = whole[..., d:]  # heads of a larger tensor
        for shape in ((3, 1, 1, d), (3, 2, 1, d)):
            angles = draw((*shape[:3], d // 2), 1)
            cos, sin = (
                bare.encode(np.concatenate([f(angles)] * 2, -1), dtype) for f in (np.cos, np.sin)
            )
            y, bound = reference.rotary(*(bare.decode(t) for t in (x, cos, sin)), inverse)
            reference.assert_close(target.rotary(x, cos, sin, inverse), y, bound, dtype)


@pytest.mark.parametrize("dtype", bare.TYPES)
def test_cross_entropy(target, dtype):
    """Labels of this part of the vocabulary, of the padding, and of other parts."""
    for columns in [*FEW, 2051, 8192, 20000]:
        valid = max(1, columns - columns // 5)
        logits = bare.encode(draw((ROWS, columns), columns), dtype)
        labels = np.array([0, valid - 1, valid // 2, valid, columns - 1, -1, columns + 5])
        top, total, target_logit, bound = reference.cross_entropy(
            bare.decode(logits), labels, valid
        )
        got = target.cross_entropy(logits, labels, valid)
        np.testing.assert_array_equal(got[[0, 2]], [top, target_logit])
        reference.assert_close(got[1], total, bound, "float32")
        lse, grad = (top + np.log(total)).astype(np.float32), draw(ROWS, 3).astype(np.float32)
        dx, bound = reference.cross_entropy_backward(bare.decode(logits), labels, valid, lse, grad)
        got_dx = target.cross_entropy_backward(logits, labels, valid, lse, grad)
        reference.assert_close(got_dx, dx, bound, dtype)
        assert (got_dx[:, valid:] == 0).all()


@pytest.mark.skipif(bool(ASAN) or not shutil.which("clang++"), reason="needs clang++")
def test_clang_builds_every_instruction_set(tmp_path):
    """It takes flags of its own for instruction sets; without them it would take its lanes
    apart."""
    library = bare.build(tmp_path, False, "-O3", compiler="clang++")
    code = subprocess.run(
        ["objdump", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    assert "%ymm" in code and "%zmm" in code
    for level in bare.cpu_levels():
        for dtype in bare.TYPES:
            for case in CASES:
                check_softmax(bare.Target(ctypes.CDLL(str(library)), level), dtype, 515, *case)


@pytest.mark.skipif(bool(ASAN), reason="already under AddressSanitizer")
@pytest.mark.timeout(900)
def test_no_access_out_of_bounds(tmp_path):
    """The tests again in a process under AddressSanitizer, which knows where each array ends: of
    the CPU all, of the CUDA sources, whose threads see single elements of whatever type, those of
    fp32."""
    sanitize = ("-O1", "-g1", "-fsanitize=address")
    bare.build(tmp_path, False, *sanitize).rename(tmp_path / "cpu.so")
    if bare.CUDA_INCLUDE:
        bare.build(tmp_path, True, *sanitize).rename(tmp_path / "cuda.so")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    environment = os.environ | {
        "MEGALITE_TEST_ASAN": str(tmp_path),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    }
    select = "not cuda or (float32 and not reversed)"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", select],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0 and "AddressSanitizer" not in run.stdout, run.stdout[-6000:]

"""Each operator has two bodies; `body` runs a test with either."""

import pytest


@pytest.fixture(params=["native", "composite"])
def body(request, monkeypatch) -> str:
    """Which body of the operators runs; native ones are skipped where they were not built."""
    from megalite.kernels import native

    if request.param == "composite":
        monkeypatch.setattr(native, "DEVICES", ())
    elif native.MISSING:
        pytest.skip(native.MISSING)
    return request.param

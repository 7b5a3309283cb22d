"""Store calls that end, whatever the store does."""

import threading

import pytest
import torch.distributed as dist

from megalite.watch.bounded import BoundedStore, SuspendDetector

CALLS = [
    ("add", "a", 1),
    ("check", "a"),
    ("set", "a", "1"),
    ("get", "a"),
    ("get_existing", ["a", "b"]),
]


class Silent:
    """The store of a stopped process."""

    def __getattr__(self, name: str):
        return lambda *unused: threading.Event().wait()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_no_call_waits_for_a_store_that_does_not_answer(call):
    name, *arguments = call
    with pytest.raises(
        RuntimeError, match=r"rank 0, or torchrun on the first node\) does not answer within 0\.1 s"
    ):
        getattr(BoundedStore(Silent(), SuspendDetector(), 0.1), name)(*arguments)


def test_what_is_asked_is_answered():
    store = BoundedStore(dist.PrefixStore("x", dist.HashStore()), SuspendDetector())
    store.set("a", "1")
    assert store.get("a") == b"1" and store.check("a") and not store.check("b")
    assert [store.add("count", 2) for _ in range(2)] == [2, 4]
    assert store.get_existing(["b", "a"]) == {"a": b"1"} and store.get_existing(["b"]) == {}


def test_what_the_store_raises_is_raised():
    with pytest.raises(TypeError):
        BoundedStore(dist.HashStore(), SuspendDetector()).set("a", 1)

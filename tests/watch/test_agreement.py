"""Ranks that were not started alike, compared through the store."""

import threading

import pytest
import torch.distributed as dist

from megalite.watch.agreement import RanksDiffer, compare_facts


def test_rank_0_is_the_first_to_end_where_it_speaks_for_all():
    store, ended = dist.HashStore(), []

    def compare(rank: int) -> None:
        with pytest.raises(RanksDiffer):
            compare_facts(store, rank, 2, {"rank": rank})
        ended.append(rank)

    threads = [threading.Thread(target=compare, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [0, 1]

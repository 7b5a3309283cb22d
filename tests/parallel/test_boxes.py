"""Boxes, against sets of indices."""

from itertools import combinations, product

from megalite.parallel.boxes import Box, boxes_of_range, split, tile


def indices(box: Box) -> set:
    return set(product(*(range(o, o + n) for o, n in zip(box.offset, box.shape))))


def boxes_in(*shape: int) -> list[Box]:
    """Every box inside a tensor of this shape, empty ones too."""
    ranges = [[(o, n) for o in range(length) for n in range(length - o + 1)] for length in shape]
    return [
        Box(tuple(o for o, _ in choice), tuple(n for _, n in choice)) for choice in product(*ranges)
    ]


def test_intersection_is_that_of_the_indices():
    boxes = boxes_in(3, 3)
    for a, b in product(boxes, boxes):
        common = a.intersect(b)
        assert (set() if common is None else indices(common)) == indices(a) & indices(b)
        assert common is None or common.numel == len(indices(a) & indices(b)) > 0
        assert common == b.intersect(a)


def test_boxes_tile_a_tensor_when_they_cover_each_element_once():
    shape = (2, 3)
    everything = sorted(indices(Box.whole(shape)))
    boxes = [box for box in boxes_in(*shape) if box.numel]
    found = 0
    for count in range(4):
        for chosen in combinations(boxes, count):
            covered = [index for box in chosen for index in indices(box)]
            assert tile(chosen, shape) == (sorted(covered) == everything)
            found += tile(chosen, shape)
    assert found == 13
    assert tile([Box((), ())], ()) and not tile([], ()) and not tile([Box((), ())] * 2, ())
    assert tile([], (0, 3)) and tile([Box((0, 1), (0, 2))], (0, 3))
    empty = Box((1, 1), (0, 2))
    assert tile([Box.whole(shape), empty], shape) and not tile([empty], shape)


def test_halves_are_the_box():
    for box in boxes_in(3, 3):
        if box.numel > 1:
            first, second = box.halves()
            assert indices(first) | indices(second) == indices(box)
            assert first.numel + second.numel == box.numel and first.numel and second.numel


def test_slices_are_relative_to_the_outer_box():
    outer, inner = Box((2, 10), (4, 5)), Box((3, 12), (2, 1))
    assert inner.slices_in(outer) == (slice(1, 3), slice(2, 3))
    assert outer.slices_in(outer) == (slice(0, 4), slice(0, 5))


def test_whole():
    box = Box.whole((2, 3, 4))
    assert box == Box((0, 0, 0), (2, 3, 4)) and box.numel == 24
    assert Box.whole(()) == Box((), ()) and Box.whole(()).numel == 1


def test_split_covers_everything_in_order():
    for length, parts in product(range(20), range(1, 9)):
        pieces = [split(length, parts, i) for i in range(parts)]
        assert [i for start, size in pieces for i in range(start, start + size)] == list(
            range(length)
        )
        sizes = [size for _, size in pieces]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] == -(-length // parts)


def test_a_range_of_elements_is_a_few_boxes():
    """Every range of small tensors: the boxes, flattened one after the other, are its elements."""
    for shape in [(), (5,), (3, 4), (1, 4), (4, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)]:
        elements = list(product(*(range(length) for length in shape)))
        for start in range(len(elements) + 1):
            for stop in range(start, len(elements) + 1):
                found = []
                boxes = boxes_of_range(shape, start, stop)
                for box in boxes:
                    found += product(*(range(o, o + n) for o, n in zip(box.offset, box.shape)))
                assert found == elements[start:stop]
                assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert boxes_of_range((4, 10), 0, 40) == [Box.whole((4, 10))]

"""Who owns what: ranges cover each tensor exactly once, and are DeepSpeed's own."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneshot.checkpoint.layout import ITEM_SIZES, owners, partition, partition_size, rank_bytes

SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)
WORLDS = st.integers(1, 70)


def deepspeed_range(numel, rank, world_size):
    """Start, filled elements and size of a partition, as ``_partition_param`` and ``_aligned_size`` compute them."""
    remainder = numel % world_size
    aligned = numel + (world_size - remainder if remainder else 0)
    size = aligned // world_size
    start = size * rank
    return start, max(0, min(size, numel - start)), size


@given(SHAPES, WORLDS)
def test_ranges_cover_every_element_exactly_once(shape, world_size):
    found = owners(shape, world_size)
    assert len(found) == world_size
    covered = [element for own in found for element in range(own.start, own.stop)]
    assert covered == list(range(math.prod(shape)))


@given(SHAPES, WORLDS)
def test_partitions_are_equally_large_and_padded_at_the_end_only(shape, world_size):
    numel, found = math.prod(shape), owners(shape, world_size)
    assert {own.size for own in found} == {partition_size(numel, world_size)}
    assert all(own.numel + own.padding == own.size and own.numel >= 0 <= own.padding for own in found)
    total = sum(own.padding for own in found)
    assert total == found[0].size * world_size - numel
    assert total < world_size, "not one element more than a partition needs"
    first_short = next((i for i, own in enumerate(found) if own.padding), world_size)
    assert all(own.numel == 0 for own in found[first_short + 1 :]), "what follows a short range is empty"


@given(st.one_of(SHAPES, st.tuples(st.integers(0, 2**40))), WORLDS, st.data())
def test_ranges_are_those_of_deepspeed(shape, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    own = partition(shape, rank, world_size)
    start, filled, size = deepspeed_range(math.prod(shape), rank, world_size)
    assert (own.numel, own.size) == (filled, size)
    if filled:
        assert own.start == start


@pytest.mark.parametrize(
    ("shape", "world_size", "wanted"),
    [
        ((7,), 3, [(0, 3, 0), (3, 6, 0), (6, 7, 2)]),
        ((2, 3), 4, [(0, 2, 0), (2, 4, 0), (4, 6, 0), (6, 6, 2)]),
        ((), 2, [(0, 1, 0), (1, 1, 1)]),
        ((0, 5), 2, [(0, 0, 0), (0, 0, 0)]),
    ],
)
def test_ranges_by_hand(shape, world_size, wanted):
    assert [(own.start, own.stop, own.padding) for own in owners(shape, world_size)] == wanted


@given(st.dictionaries(st.text(max_size=5), SHAPES, max_size=5), st.sampled_from(sorted(ITEM_SIZES)), WORLDS)
def test_rank_bytes_are_what_partitions_of_that_size_take(shapes, dtype, world_size):
    item = ITEM_SIZES[dtype]
    found = {rank_bytes(shapes, item, rank, world_size) for rank in range(world_size)}
    assert found == {sum(deepspeed_range(math.prod(shape), 0, world_size)[2] for shape in shapes.values()) * item}


@given(SHAPES, WORLDS, st.integers(0, 100))
def test_a_rank_out_of_the_world_is_an_error(shape, world_size, beyond):
    for rank in (-1 - beyond, world_size + beyond):
        with pytest.raises(ValueError, match=f"rank {rank} is not one of {world_size}"):
            partition(shape, rank, world_size)

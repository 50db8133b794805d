"""The cache against lists of what was written: whatever is done to it, it holds that."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos_fast.models.paged_cache import PAGE, PagedCache

LAYERS, HEADS, DIM = 2, 2, 16
COUNTS = st.one_of(st.integers(0, 3), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]))
SHARES = st.floats(0, 1)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 2)),
        st.tuples(st.just("extend"), st.lists(COUNTS, min_size=8, max_size=8)),
        st.tuples(st.just("truncate"), st.lists(SHARES, min_size=8, max_size=8)),
        st.tuples(st.just("reorder"), st.lists(SHARES, max_size=4)),
        st.tuples(st.just("reserve"), st.integers(0, 6 * PAGE)),
    ),
    min_size=1,
    max_size=10,
)
often = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def row_of(stamp, layer, part):
    """A row that int8 keeps exactly: whole numbers of which the largest is 127."""
    generator = torch.Generator().manual_seed(stamp * 4 + layer * 2 + part)
    row = torch.randint(-127, 128, (HEADS, 1, DIM), generator=generator)
    row[..., 0] = 127
    return row.float()


class Model:
    """A PagedCache beside plain lists of the stamps of tokens."""

    def __init__(self, dtype):
        self.cache = PagedCache(LAYERS, HEADS, DIM, dtype=dtype, tokens=PAGE)
        self.sequences, self.stamp = [], 0

    def add(self, count):
        count = min(count, 4 - len(self.sequences))
        self.cache.add_sequences(count)
        self.sequences += [[] for _ in range(count)]

    def extend(self, counts):
        counts = counts[: len(self.sequences)]
        self.cache.extend(counts)
        for row, (sequence, count) in enumerate(zip(self.sequences, counts, strict=True)):
            if count:
                new = list(range(self.stamp, self.stamp + count))
                self.stamp += count
                sequence += new
                for layer in range(LAYERS):
                    key, value = (torch.cat([row_of(s, layer, p) for s in new], 1) for p in (0, 1))
                    self.cache.write(layer, key[None], value[None], row)

    def truncate(self, shares):
        lengths = [round(s * len(q)) for s, q in zip(shares, self.sequences, strict=False)]
        self.cache.truncate(lengths)
        self.sequences = [q[:n] for q, n in zip(self.sequences, lengths, strict=True)]

    def reorder(self, shares):
        count = len(self.sequences)
        rows = [min(int(s * count), count - 1) for s in shares] if count else []
        self.cache.reorder(rows)
        self.sequences = [list(self.sequences[row]) for row in rows]

    def reserve(self, tokens):
        self.cache.reserve(tokens)

    def addresses(self):
        tensors = [t for layer in range(LAYERS) for t in self.cache.of(layer).values()]
        return [t.data_ptr() for t in tensors]

    def check(self):
        lengths = [len(sequence) for sequence in self.sequences]
        assert self.cache.sequence_lengths == self.cache.lengths.tolist() == lengths
        assert self.cache.capacity >= max(lengths, default=0)
        for layer in range(LAYERS):
            tensors = self.cache.of(layer)
            for part, name in enumerate(("key", "value")):
                stored = tensors[f"{name}_cache"].float()
                if f"{name}_scale" in tensors:
                    stored = stored * tensors[f"{name}_scale"][..., None]
                for row, sequence in enumerate(self.sequences):
                    if sequence:
                        pages = tensors["block_table"][row, : -(-len(sequence) // PAGE)].long()
                        found = stored[pages].transpose(0, 1).flatten(1, 2)[:, : len(sequence)]
                        expected = torch.cat([row_of(s, layer, part) for s in sequence], 1)
                        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=["fp32", "int8"])
def test_it_holds_what_was_written(dtype):
    @often
    @given(OPERATIONS)
    def run(operations):
        model = Model(dtype)
        for name, argument in [("add", 1), *operations]:
            moves, kept = model.cache.moves, [*model.addresses()]
            tensors = [model.cache.of(layer) for layer in range(LAYERS)]  # no address is reused
            getattr(model, name)(argument)
            model.check()
            assert model.cache.moves >= moves
            if model.addresses() != kept:
                assert model.cache.moves > moves
            del tensors
        # what no sequence has is free again
        model.cache.truncate([0] * len(model.sequences))
        assert not any(model.cache._owners)

    run()


def test_shared_pages_are_copied_only_when_they_are_written():
    model = Model(torch.float32)
    model.add(1)
    model.extend([PAGE + 5])
    model.reorder([0, 0, 0])
    table = model.cache.block_table
    assert torch.equal(table[0], table[1])
    model.extend([1, 0, 0])
    table = model.cache.block_table
    assert torch.equal(table[1], table[2])
    assert table[0, 0] == table[1, 0]
    assert table[0, 1] != table[1, 1]
    model.extend([0, 2, 3])
    model.check()


def test_tensors_stay_where_they_are_while_there_is_room():
    model = Model(torch.float32)
    model.reserve(8 * PAGE)
    model.add(2)
    model.extend([1, 1])
    moves = model.cache.moves
    for _ in range(PAGE):
        model.extend([1, 1])
    model.reorder([1, 1])
    model.extend([1, 1])
    model.truncate([0, 0])
    assert model.cache.moves == moves


def test_bytes_of_an_int8_cache():
    wide, narrow = (PagedCache(1, 2, 64, dtype=d, tokens=100) for d in (torch.float32, torch.int8))
    assert wide.nbytes == 2 * 2 * 128 * 64 * 4
    assert narrow.nbytes == 2 * 2 * 128 * (64 + 4)

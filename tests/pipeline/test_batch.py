"""Packing, order, sharding, resuming, mixing: nothing is lost, no border is crossed, batch i depends on
(seed, i)."""

import itertools
import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from pipeline.batch import IGNORED, Batch, BatchLoader, Example, collate
from pipeline.mixing import choose_rows, examples_of_rows, hold_out, interleave
from pipeline.packing import first_fit, group_by_length, pack


def example(number, length, trained=None):
    tokens = np.arange(length, dtype=np.int32) + 1000 * number
    flags = np.ones(length, bool) if trained is None else np.array(trained, bool)
    return Example(tokens, flags, np.zeros(length, np.int16), np.zeros(length, np.uint8), (0, number))


class Store:
    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def example(self, i):
        return example(i, int(self.lengths[i]))


def numbers(batch):
    return [row for _, row in batch.sources]


def epoch(loader, start=0):
    return [numbers(batch) for batch in itertools.islice(loader.batches(start), loader.batches_per_epoch)]


# ---------------------------------------------------------------------------------------------------------
# collate


def test_collate_by_hand():
    a = example(0, 3, [False, True, True])
    b = example(1, 1, [True])
    c = example(2, 4, [True, False, False, True])
    batch = collate([a, b, c])
    assert batch.tokens.tolist() == [0, 1, 2, 1000, 2000, 2001, 2002, 2003]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == batch.borders == [0, 3, 4, 8]
    assert batch.labels.tolist() == [1, 2, IGNORED, IGNORED, IGNORED, IGNORED, 2003, IGNORED]
    assert batch.label_rows.tolist() == [0, 1, 6]
    assert batch.max_seqlen == 4
    assert batch.sources == [(0, 0), (0, 1), (0, 2)]
    dtypes = [
        batch.tokens.dtype,
        batch.positions.dtype,
        batch.cu_seqlens.dtype,
        batch.labels.dtype,
        batch.label_rows.dtype,
    ]
    assert dtypes == [torch.int64, torch.int32, torch.int32, torch.int64, torch.int64]
    moved = batch.to("cpu")
    assert moved.labels.equal(batch.labels) and moved.sources == batch.sources


def test_the_empty_batch_is_one_token_without_label():
    batch = collate([])
    assert batch.tokens.tolist() == [0] and batch.labels.tolist() == [IGNORED] and batch.borders == [0, 1]
    assert batch.label_rows.numel() == 0 and batch.sources == [] and len(batch) == 0 and batch.max_seqlen == 1


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
@settings(deadline=None)
def test_labels_are_the_trained_tokens_and_never_cross_a_border(masks):
    batch = collate([example(i, len(mask), mask) for i, mask in enumerate(masks)])
    targets = batch.labels[batch.label_rows].tolist()
    wanted = [1000 * i + t for i, mask in enumerate(masks) for t, flag in enumerate(mask) if flag and t > 0]
    assert targets == wanted
    assert (batch.labels[torch.tensor(batch.borders[1:]) - 1] == IGNORED).all()


# ---------------------------------------------------------------------------------------------------------
# packing


def first_fit_slowly(lengths, capacity):
    bins, room = [], []
    for item, length in enumerate(lengths):
        place = next((k for k, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= length
    return bins


@given(st.lists(st.integers(1, 17), max_size=60), st.integers(17, 40))
@settings(deadline=None)
def test_first_fit_equals_its_definition(lengths, capacity):
    assert first_fit(lengths, capacity) == first_fit_slowly(lengths, capacity)


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=80),
    st.integers(30, 50),
    st.integers(1, 90),
    st.integers(0, 9),
)
@settings(deadline=None)
def test_packing_never_overflows_and_loses_nothing(lengths, capacity, window, seed):
    lengths = np.array(lengths)
    rows = pack(lengths, capacity, np.random.default_rng(seed).permutation(len(lengths)), window)
    assert all(lengths[row].sum() <= capacity and len(row) for row in rows)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has 6 tokens, more than a|more than the 5"):
        first_fit([3, 6], 5)


def test_packing_is_tight_and_fast():
    lengths = np.random.default_rng(0).gamma(2.0, 100.0, 50_000).astype(int).clip(10, 2048)
    begin = time.perf_counter()
    rows = pack(lengths, 2048, np.arange(len(lengths)))
    assert time.perf_counter() - begin < 5
    assert lengths.sum() / (len(rows) * 2048) > 0.97


# ---------------------------------------------------------------------------------------------------------
# loaders

LENGTHS = np.random.default_rng(1).integers(1, 33, 53)
WAYS = [
    {"packing": False},
    {"packing": True, "cutoff_len": 40},
    {"packing": False, "group_by_length": True},
    {"packing": False, "shuffle": False},
    {"packing": True, "cutoff_len": 40, "shuffle": False},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 4])
def test_ranks_cover_each_example_once_an_epoch(way, world, rows):
    loaders = [
        BatchLoader(Store(LENGTHS), rows_per_batch=rows, rank=r, world=world, **way) for r in range(world)
    ]
    assert len({loader.batches_per_epoch for loader in loaders}) == 1
    for k in range(2):
        seen = [
            n for loader in loaders for batch in epoch(loader, k * loader.batches_per_epoch) for n in batch
        ]
        assert sorted(seen) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_of_ranks_are_those_of_one_process_in_turn(way):
    if "group_by_length" in way:
        pytest.skip("megabatches are formed of the batches of all ranks")
    one = epoch(BatchLoader(Store(LENGTHS), rows_per_batch=3, seed=5, **way))
    ranks = [
        epoch(BatchLoader(Store(LENGTHS), rows_per_batch=3, seed=5, rank=r, world=2, **way)) for r in range(2)
    ]
    woven = [batch for pair in zip(*ranks) for batch in pair]
    assert woven[: len(one)] == one and all(batch == [] for batch in woven[len(one) :])


@pytest.mark.parametrize("way", WAYS)
def test_resuming_at_any_batch_equals_the_tail(way):
    def tensors(start, count):
        loader = BatchLoader(Store(LENGTHS), rows_per_batch=4, seed=3, rank=1, world=2, **way)
        return [
            (b.tokens.tolist(), b.labels.tolist(), b.borders)
            for b in itertools.islice(loader.batches(start), count)
        ]

    straight = tensors(0, 30)
    for start in (1, 6, 7, 20):
        assert tensors(start, 30 - start) == straight[start:]


@pytest.mark.parametrize("size", [1, 2, 4, 50])
def test_a_draw_ends_with_its_epoch_and_draws_resume_at_any_number(size):
    loader = BatchLoader(Store(LENGTHS), rows_per_batch=4, seed=3)
    per_epoch = -(-loader.batches_per_epoch // size)
    assert loader.draws_per_epoch(size) == per_epoch
    drawn = [list(map(numbers, draw)) for draw in itertools.islice(loader.draws(size), 2 * per_epoch)]
    for number in range(2):
        of_epoch = drawn[number * per_epoch : (number + 1) * per_epoch]
        assert sum(of_epoch, []) == epoch(loader, number * loader.batches_per_epoch)
        assert all(len(draw) == size for draw in of_epoch[:-1])
    for start in (1, per_epoch, 2 * per_epoch - 1):
        again = itertools.islice(loader.draws(size, start), 2 * per_epoch - start)
        assert [list(map(numbers, draw)) for draw in again] == drawn[start:]


def test_epochs_and_seeds_give_other_orders():
    loader = BatchLoader(Store(LENGTHS), rows_per_batch=4, seed=3)
    assert epoch(loader) != epoch(loader, loader.batches_per_epoch)
    assert epoch(loader) != epoch(BatchLoader(Store(LENGTHS), rows_per_batch=4, seed=4))
    packed = BatchLoader(Store(LENGTHS), rows_per_batch=1, packing=True, cutoff_len=40, seed=3)
    first, second = epoch(packed), epoch(packed, packed.batches_per_epoch)
    assert first != second and sorted(first) == sorted(second)  # the same plan of rows, shuffled


def test_without_shuffling_examples_come_in_order():
    loader = BatchLoader(Store([3, 2, 5, 1, 4]), rows_per_batch=2, shuffle=False)
    assert epoch(loader) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("options", [{}, {"packing": True, "cutoff_len": 20}, {"group_by_length": True}])
def test_no_batch_is_larger_than_the_loader_says(options):
    """What memory is planned by; over some epochs a batch comes to it."""
    store = Store([3, 20, 7, 1, 13, 19, 2])
    batches = BatchLoader(store, rows_per_batch=2, **options)
    found = [
        int(batch.cu_seqlens[-1])
        for batch in itertools.islice(batches.batches(), 40 * batches.batches_per_epoch)
    ]
    assert max(found) == batches.most_tokens()


def test_packed_rows_hold_at_most_cutoff_len_tokens():
    loader = BatchLoader(Store(LENGTHS), rows_per_batch=1, packing=True, cutoff_len=40)
    batches = list(itertools.islice(loader.batches(), loader.batches_per_epoch))
    assert max(len(batch.tokens) for batch in batches) <= 40
    assert len(batches) < len(LENGTHS) * LENGTHS.mean() / 40 * 1.15


@pytest.mark.parametrize(("count", "batch"), [(53, 4), (7, 4), (1000, 3), (450, 2)])
def test_group_by_length_is_transformers_rule(count, batch):
    lengths = np.random.default_rng(count).permutation(count * 10)[
        :count
    ]  # without ties: those may be ordered freely
    torch.manual_seed(0)
    order = torch.randperm(count).numpy()
    torch.manual_seed(0)
    wanted = get_length_grouped_indices(lengths.tolist(), batch)
    assert group_by_length(order, lengths, batch).tolist() == wanted


def test_loader_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="no example"):
        BatchLoader(Store([]), rows_per_batch=1)
    with pytest.raises(ValueError, match="rows_per_batch is 0"):
        BatchLoader(Store([1]), rows_per_batch=0)
    with pytest.raises(ValueError, match="group_by_length"):
        BatchLoader(Store([1]), rows_per_batch=1, packing=True, cutoff_len=4, group_by_length=True)


def test_collating_is_fast():
    store = Store([200] * 64)
    loader = BatchLoader(store, rows_per_batch=64)
    examples = [store.example(i) for i in range(64)]
    begin = time.perf_counter()
    for _ in range(50):
        collate(examples)
    assert (time.perf_counter() - begin) / 50 < 0.01
    assert len(loader.batch(0).tokens) == 64 * 200


# ----------------------------------------------------------------------------------------------------------
# mixing


@pytest.mark.parametrize("under", [True, False])
@pytest.mark.parametrize("probabilities", [(), (0.5, 0.3, 0.2)])
def test_interleaving_is_that_of_the_datasets_library(under, probabilities):
    lengths = [5, 9, 3]
    sets = [datasets.Dataset.from_dict({"k": [k] * n, "i": list(range(n))}) for k, n in enumerate(lengths)]
    wanted = datasets.interleave_datasets(
        sets,
        probabilities=list(probabilities) or None,
        seed=3,
        stopping_strategy="first_exhausted" if under else "all_exhausted",
    )
    found = interleave(lengths, probabilities, under, 3)
    assert found.tolist() == [[row["k"], row["i"]] for row in wanted]


def test_interleaving_by_hand():
    assert interleave([2, 3], (), True, 0).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert interleave([1, 3], (), False, 0).tolist() == [[0, 0], [1, 0], [0, 0], [1, 1], [0, 0], [1, 2]]


def test_choosing_rows():
    few = choose_rows(10, 4, 0)
    assert len(set(few.tolist())) == 4
    many = choose_rows(10, 25, 0)
    assert len(many) == 25 and sorted(many[:10].tolist()) == list(range(10))
    assert len(choose_rows(0, 5, 0)) == 0
    assert examples_of_rows(np.array([0, 0, 2, 5]), np.array([5, 0, 1, 0])).tolist() == [3, 0, 1, 0, 1]


@pytest.mark.parametrize(("size", "rows"), [(0.25, 3), (0.01, 1), (1, 1), (4, 4)])
def test_whole_rows_are_held_out(size, rows):
    sources = np.array([(k, row) for k in range(2) for row in range(5) for _ in range(1 + row % 3)])
    held = hold_out(sources, size, 1)
    assert len(np.unique(sources[held], axis=0)) == rows
    assert not {tuple(s) for s in sources[held]} & {tuple(s) for s in sources[~held]}


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match=r"val_size: 5 of the rows that are used \(5\) leaves none"):
        hold_out(np.array([(0, row) for row in range(5)]), 5, 0)


def test_rounding_adds_untrained_tokens_that_nothing_sees():
    batch = collate([example(0, 5), example(1, 9)])
    rounded = batch.rounded(8)
    assert len(rounded.tokens) == 16 and rounded.borders == [0, 5, 14, 16]
    assert rounded.positions[14:].tolist() == [0, 1] and (rounded.labels[14:] == IGNORED).all()
    assert torch.equal(rounded.label_rows, batch.label_rows) and rounded.sources == batch.sources
    assert torch.equal(rounded.tokens[:14], batch.tokens) and torch.equal(rounded.labels[:14], batch.labels)
    assert len(rounded.per_token["turns"]) == len(rounded.per_token["roles"]) == 16
    assert rounded.rounded(8) is rounded


def test_what_a_stage_adds_goes_with_the_batch_to_a_device_and_into_a_checkpoint():
    batch = collate([example(0, 5), example(1, 9)]).rounded(8)
    batch.per_label["old"] = torch.arange(12.0)
    assert batch.label_counts.tolist() == [4, 8] and batch.per_segment["tags"].tolist() == [0, 0]
    moved = batch.to("meta")
    assert moved.per_label["old"].is_meta and moved.label_counts.is_meta and moved.tokens.is_meta
    assert moved.borders == batch.borders and moved.host is batch  # a device is not asked
    assert moved.to("meta").rounded(32).borders == [0, 5, 14, 16, 32]
    back = Batch(**batch.plain())
    assert back.per_label["old"].equal(batch.per_label["old"]) and back.label_counts.tolist() == [4, 8]
    assert back.per_token == {} and back.sources == batch.sources


def test_a_loader_draws_what_its_collate_makes_of_the_examples():
    loader = BatchLoader(Store([3, 4, 5]), rows_per_batch=2, shuffle=False, collate=list)
    (whole, rest) = itertools.islice(loader.batches(), 2)
    assert [each.source for each in whole] == [(0, 0), (0, 1)] and [each.source for each in rest] == [(0, 2)]

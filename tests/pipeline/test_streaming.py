"""Streams: no row lost or drawn twice over ranks, each tokenised by one rank, and going on in the middle."""

import itertools

import datasets
import numpy as np
import pytest

from pipeline.batch import Example
from pipeline.streaming import RowStream, StreamingLoader


def example(number, length, place=0):
    tokens = np.arange(length, dtype=np.int32) + 1000 * number + 100 * place
    return Example(
        tokens, np.ones(length, bool), np.zeros(length, np.int16), np.zeros(length, np.uint8), (0, number)
    )


class Numbers(RowStream):
    """Data sets of so many numbers. Some give no example, some two; what is read and encoded is noted."""

    def __init__(self, *counts, strategy="concat", probabilities=(), dropped=lambda number: number % 10 == 7):
        self.counts, self.dropped = counts, dropped
        self.changed, self.tokenised = {}, []
        super().__init__([None] * len(counts), [None] * len(counts), strategy, probabilities, seed=4)

    @property
    def datasets(self):
        return [f"set {part}" for part in range(len(self.counts))]

    def read(self, part):
        for number in range(self.counts[part]):
            yield number, f"row {number}", self.changed.get((part, number), number)

    def encoded(self, rows):
        for what, part, row in rows:
            self.tokenised.append((part, row[0]))
            yield what, self.made_of(part, row[0])

    def made_of(self, part, number):
        if self.dropped(number):
            return []
        return [
            example(1000 * part + number, 1 + number % 13, place) for place in range(1 + (number % 6 == 5))
        ]


def loader(source=None, **options):
    return StreamingLoader(
        source or Numbers(41), **{"rows_per_batch": 1, "seed": 2, "buffer_size": 8} | options
    )


def taken(made, count, start=0):
    """(row, first token) of each segment of some batches."""
    batches = itertools.islice(made.batches(start), count)
    return [
        [(row, int(batch.tokens[at])) for (_, row), at in zip(batch.sources, batch.borders)]
        for batch in batches
    ]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    for name in ("FEWEST_ROWS", "MOST_ROWS"):
        monkeypatch.setattr(f"pipeline.streaming.{name}", 6)


WAYS = [{}, {"packing": True, "cutoff_len": 30}]
MIXED = [
    ((41,), {}),
    ((3,), {}),  # fewer rows than lanes
    ((13, 7), {}),
    ((13, 7), {"strategy": "interleave_over"}),
    ((13, 29), {"strategy": "interleave_under", "probabilities": (0.8, 0.2)}),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("buffer_size", [1, 8, 100])
def test_one_lane_gives_each_row_once_a_pass(way, buffer_size):
    source = Numbers(41)
    flat = [
        row
        for batch in taken(loader(source, buffer_size=buffer_size, rows_per_batch=3, **way), 60)
        for row, _ in batch
    ]
    kept = sorted(number for number in range(41) for _ in range(1 + (number % 6 == 5)) if number % 10 != 7)
    if not way:
        for k in range(2):
            assert sorted(flat[k * len(kept) : (k + 1) * len(kept)]) == kept
    tokens = [len(batch.tokens) for batch in itertools.islice(loader(rows_per_batch=1, **way).batches(), 50)]
    assert max(tokens) <= 30


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("counts", "mixing"), MIXED)
def test_ranks_and_accumulation_train_the_groups_of_one_process_and_each_tokenises_its_share(
    counts, mixing, way
):
    """Lanes are 12: batches of 12, 4 x 3 accumulated, 2 ranks x 3 x 2, 4 ranks x 1 x 3."""

    def groups(ranks, rows, size):
        drawn, encoded = [[] for _ in range(6)], []
        for rank in range(ranks):
            source = Numbers(*counts, **mixing)
            draws = loader(source, rows_per_batch=rows, rank=rank, world=ranks, lanes=12, **way).draws(size)
            for number, draw in enumerate(itertools.islice(draws, 6)):
                assert len(draw) == size
                drawn[number] += [
                    (*source, batch.tokens[at].item())
                    for batch in draw
                    for source, at in zip(batch.sources, batch.borders)
                ]
            encoded.append(len(source.tokenised))
        return [sorted(group) for group in drawn], encoded

    one, (alone,) = groups(1, 12, 1)
    for ranks, rows, size in ((1, 4, 3), (2, 3, 2), (4, 1, 3)):
        found, encoded = groups(ranks, rows, size)
        assert found == one
        assert sum(encoded) <= alone  # nothing is tokenised twice


def test_lanes_that_ranks_do_not_share_evenly_cost_time_and_nothing_else():
    one = taken(loader(lanes=10), 60)
    ranks = [taken(loader(lanes=10, rank=rank, world=3), 20) for rank in range(3)]
    assert [batch for three in zip(*ranks) for batch in three] == one


def test_rows_of_a_lane_are_packed_as_tightly_as_those_of_large_windows(monkeypatch):
    monkeypatch.undo()
    lengths = np.random.default_rng(0).gamma(2.0, 400, 8000).astype(int).clip(10, 2048)
    source = Numbers(8000)
    source.made_of = lambda part, number: [example(number, int(lengths[number]))]
    batches = itertools.islice(loader(source, packing=True, cutoff_len=2048).batches(), 200)
    sizes = [len(batch.tokens) for batch in batches]
    assert max(sizes) <= 2048 and np.mean(sizes) > 0.97 * 2048


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_in_the_long_run_each_row_comes_equally_often(lanes):
    """Rows that stand at the same places in every pass are not always those of one lane: 8 rows, of which one
    is dropped, in file order."""
    source = Numbers(8, dropped=lambda number: number == 3)
    flat = [row for batch in taken(loader(source, lanes=lanes, buffer_size=1), 8 * 7 * 4) for row, _ in batch]
    counts = np.bincount(flat, minlength=8)
    counts[5] = counts[5] / 2  # it gives two examples
    assert counts[3] == 0 and np.delete(counts, 3).min() >= np.delete(counts, 3).max() - lanes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("counts", "mixing"), MIXED)
@pytest.mark.parametrize("buffer_size", [1, 5])
def test_a_stream_goes_on_where_it_stopped(counts, mixing, way, buffer_size):
    how = {"rows_per_batch": 2, "rank": 1, "world": 2, "lanes": 8, "buffer_size": buffer_size, **way}
    straight = taken(loader(Numbers(*counts, **mixing), **how), 20)
    for stop in (0, 1, 2, 7, 17):
        first = loader(Numbers(*counts, **mixing), **how)
        taken(first, stop + 3)  # more than was trained on
        state = first.state(stop)
        again = loader(Numbers(*counts, **mixing), **how)
        again.restore(state)
        assert again.state(stop) == state  # before the first one is drawn, too
        assert taken(again, 20 - stop, stop) == straight[stop:]
        later = again.state(20)
        twice = loader(Numbers(*counts, **mixing), **how)
        twice.restore(later)
        both = [loader(Numbers(*counts, **mixing), **how), twice]
        assert taken(both[0], 5, 20) == taken(both[1], 5, 20)


@pytest.mark.parametrize("way", WAYS)
def test_what_came_before_is_not_tokenised_again(way):
    first = loader(Numbers(6000), lanes=4, **way)
    straight = taken(first, 800)
    source = Numbers(6000)
    again = loader(source, lanes=4, **way)
    again.restore(first.state(600))
    assert taken(again, 4, 600) == straight[600:604]
    assert len(source.tokenised) < (500 if way else 30)  # of more than 2,400


def test_another_number_of_ranks_goes_on_with_the_states_of_all():
    """Four rows an update by one rank, then by two, then by four."""
    straight = taken(loader(lanes=4, rows_per_batch=4), 30)
    flat = [item for batch in straight for item in batch]
    states, done, found = [], 0, []
    for ranks in (1, 2, 4):
        made = [loader(lanes=4, rows_per_batch=4 // ranks, rank=rank, world=ranks) for rank in range(ranks)]
        for each in made:
            each.restore(*states)
        parts = [taken(each, 10, done) for each in made]
        found += [item for step in zip(*parts) for batch in step for item in batch]
        done += 10
        states = [each.state(done) for each in made]
    assert found == flat


@pytest.mark.parametrize(("rank", "consumed", "later"), [(0, (0, 9), (13, 2)), (1, (2, 7, 11), (18, 19, 0))])
def test_a_stream_knows_the_rows_that_were_consumed(rank, consumed, later):
    """Each rank those of its lanes; those it dropped, too."""
    how = {"rows_per_batch": 2, "buffer_size": 1, "lanes": 4, "rank": rank, "world": 2}
    first = loader(Numbers(40), **how)
    ahead = taken(first, 6)
    state = first.state(4)
    for number in (*consumed, *later):
        source = Numbers(40)
        source.changed[0, number] = -1
        again = loader(source, **how)
        again.restore(state)
        if number in later:
            assert taken(again, 2, 4) == ahead[4:]
            continue
        with pytest.raises(ValueError, match="dataset: row .*, or a row before it, is not what"):
            taken(again, 1, 4)


@pytest.mark.parametrize("count", [39, 41, 20])
def test_a_stream_that_has_another_length_than_when_it_was_consumed_is_refused(count):
    """What was consumed ends in the second pass, whose rows other lanes would have now."""
    how = {"rows_per_batch": 1, "buffer_size": 1, "lanes": 4, "world": 2}
    for rank in range(2):
        first = loader(Numbers(40), **how, rank=rank)
        taken(first, 25)
        again = loader(Numbers(count), **how, rank=rank)
        again.restore(first.state(25))
        with pytest.raises(ValueError, match="dataset: row .*, or a row before it, is not what"):
            taken(again, 1, 25)


def test_draws_of_a_stream_are_its_batches_in_turn_and_resume():
    batches = taken(loader(rows_per_batch=4), 15)
    for start in (0, 2):
        found = itertools.islice(loader(rows_per_batch=4).draws(3, start), 5 - start)
        rows = [[[row for _, row in batch.sources] for batch in draw] for draw in found]
        wanted = [
            [[row for row, _ in batch] for batch in batches[at : at + 3]] for at in range(3 * start, 15, 3)
        ]
        assert rows == wanted
    assert loader().draws_per_epoch(3) is None


def test_the_order_of_a_pass_depends_on_the_seed_alone_and_no_row_goes_far():
    def rows(seed, buffer_size):
        source = Numbers(100, dropped=lambda number: False)
        source.made_of = lambda part, number: [example(number, 1)]
        return [row for ((row, _),) in taken(loader(source, seed=seed, buffer_size=buffer_size), 100)]

    first = rows(1, 16)
    assert first == rows(1, 16) != rows(2, 16)
    assert sorted(first) == list(range(100)) != first
    assert rows(1, 1) == list(range(100))
    assert all(abs(value - place) < 16 for place, value in enumerate(first))


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("count", [0, 5, 500])
def test_a_stream_without_examples_is_an_error_and_not_an_endless_loop(lanes, count):
    source = Numbers(count, dropped=lambda number: True)
    with pytest.raises(ValueError, match="no example"):
        next(loader(source, lanes=lanes, rank=0, world=lanes).batches())
    assert len(source.tokenised) < (1200 if lanes == 1 else 12_000)


def test_one_good_row_in_many_is_found():
    for rank in range(3):
        source = Numbers(50, dropped=lambda number: number != 20)
        batches = taken(loader(source, lanes=3, world=3, rank=rank), 5)
        assert {row for ((row, _),) in batches} == {20}


def test_rows_that_come_again_are_copies_of_their_own():
    drawn = []
    for rank in range(2):
        made = loader(Numbers(9), lanes=2, rank=rank, world=2, collate=list)
        drawn += [each for batch in itertools.islice(made.batches(), 40) for each in batch]
    assert len({(each.copy, int(each.tokens[0])) for each in drawn}) == 80


@pytest.mark.parametrize("under", [True, False])
@pytest.mark.parametrize("probabilities", [(), (0.7, 0.2, 0.1)])
def test_a_stream_is_interleaved_as_the_datasets_library_does(under, probabilities):
    counts = (5, 9, 3)
    sets = [datasets.Dataset.from_dict({"k": [k] * n, "i": list(range(n))}) for k, n in enumerate(counts)]
    stop = "first_exhausted" if under else "all_exhausted"
    how = {"probabilities": list(probabilities) or None, "stopping_strategy": stop}
    source = Numbers(
        *counts, strategy=f"interleave_{'under' if under else 'over'}", probabilities=probabilities
    )
    for epoch in range(3):
        wanted = datasets.interleave_datasets(sets, seed=[source.seed, epoch], **how)
        assert [(k, row[0]) for k, row in source.rows(epoch)] == [(row["k"], row["i"]) for row in wanted]

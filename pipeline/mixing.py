"""Which rows are used, in which order: choosing, interleaving and splitting, all pure functions of a seed.

Interleaving follows datasets.interleave_datasets (the same draws from the same seed): round robin or by
probabilities, `under` ends when the first data set is used up, `over` when every one has been, starting
used-up ones again.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from options.errors import UserError, refuse


def choose_rows(total: int, count: int, seed: int) -> np.ndarray:
    """`count` row numbers: a random choice, or, where there are too few, all of them and random repeats."""
    if total == 0:
        return np.empty(0, np.int64)
    random = np.random.default_rng(seed)
    chosen = random.permutation(total)[:count]
    return np.concatenate([chosen, random.integers(total, size=count - len(chosen))])


def examples_of_rows(rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Numbers of the examples that come from the chosen rows, in that order. rows: of each, ascending."""
    first, last = np.searchsorted(rows, chosen, "left"), np.searchsorted(rows, chosen, "right")
    return np.concatenate([np.empty(0, np.int64)] + [np.arange(a, b) for a, b in zip(first, last)])


def turns(count: int, probabilities: Sequence[float], seed) -> Iterator[int]:
    """Which data set has its turn, without end."""
    if not probabilities:
        while True:
            yield from range(count)
    random = np.random.default_rng(seed)
    while True:
        yield from random.choice(count, size=1000, p=probabilities).tolist()


def mixing_ends(used_up: Sequence[bool], turn: int, round_robin: bool, under: bool) -> bool:
    """Whether mixing is over after `turn`; round robin finishes its round."""
    if round_robin and turn != len(used_up) - 1:
        return False
    return any(used_up) if under else all(used_up)


def interleave(lengths: Sequence[int], probabilities: Sequence[float], under: bool, seed) -> np.ndarray:
    """(n, 2): data set and example number within it, for sets of these lengths (all at least 1)."""
    taken, used_up, index = [0] * len(lengths), [False] * len(lengths), []
    for k in turns(len(lengths), probabilities, seed):
        index.append((k, taken[k]))
        taken[k] += 1
        if taken[k] == lengths[k]:
            taken[k], used_up[k] = 0, True
        if mixing_ends(used_up, k, not probabilities, under):
            return np.array(index)
    raise AssertionError("turns() never ends")


def mix_sets(
    orders: list[np.ndarray], names: Sequence[str], strategy: str, probabilities: Sequence[float], seed: int
) -> np.ndarray:
    """The order, (n, 2), of a training set from those of its data sets; a row is (data set, example)."""
    if len(orders) == 1 or strategy == "concat":
        return np.concatenate(orders)
    for name, order in zip(names, orders):
        refuse(len(order) == 0, f"dataset {name!r} gives no example, so it cannot be interleaved")
    mixed = interleave([len(order) for order in orders], probabilities, strategy == "interleave_under", seed)
    return np.stack([orders[k][i] for k, i in mixed])


def hold_out(sources: np.ndarray, size: float, seed: int) -> np.ndarray:
    """(n,) bool: which examples go into the validation set; `sources` (n, 2) says data set and row of each.

    size: a share below 1, or a number of rows. Whole rows: the pieces and repeats of a row stay on one side.
    """
    rows, row_of = np.unique(sources, axis=0, return_inverse=True)
    count = int(size) if size >= 1 else int(np.ceil(size * len(rows)))
    if count >= len(rows):
        left = f"{size:g} of the rows that are used ({len(rows)}) leaves none to train on"
        raise UserError(f"val_size: {left}; add rows, or set val_size=0")
    held = np.zeros(len(rows), bool)
    held[np.random.default_rng([seed, 2]).permutation(len(rows))[:count]] = True
    return held[row_of.reshape(-1)]

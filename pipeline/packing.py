"""Which examples share a row, and which share a batch.

Packing is first-fit decreasing inside windows of shuffled examples (Johnson 1973: at most 11/9 of the optimum
+ 1), over whole examples: none is ever split, and attention never crosses a segment border.
"""

from collections.abc import Sequence

import numpy as np

from options.errors import UserError

PACK_WINDOW = 8192  # examples that are sorted together; larger packs tighter, smaller mixes better
GROUP_BATCHES = 50  # batches per length-sorted megabatch, as in transformers' LengthGroupedSampler


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, in the given order, into the first bin that still has room: bins of item numbers.

    O(n log n) by a tree of maxima. Raises UserError for an item longer than `capacity`.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()  # the next power of 2
    # room[1] is the root; a node holds the most room of any bin below it. Bins not opened yet have full room
    # and stand behind the open ones: "the leftmost leaf with room" is first-fit, and opens one if it must.
    room = [capacity] * (2 * leaves)
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        if length > capacity:
            limit = f"the {capacity} of a packed row (cutoff_len)"
            raise UserError(f"example {item} has {length} tokens, more than {limit}")
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= int(length)
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            room[node] = left if left > right else right
    return bins


def pack(lengths: np.ndarray, capacity: int, order: np.ndarray, window=PACK_WINDOW) -> list[np.ndarray]:
    """Rows of example numbers: the examples of `order` window by window, each window longest first."""
    rows = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        rows += [part[items] for items in first_fit(lengths[part].tolist(), capacity)]
    return rows


def group_by_length(order: np.ndarray, lengths: np.ndarray, batch: int) -> np.ndarray:
    """transformers' rule: megabatches of up to 50 batches, each sorted longest first. The longest example of
    all comes first, so that running out of memory shows at once."""
    megabatch = max(1, min(len(order) // (batch * 4), GROUP_BATCHES)) * batch
    parts = [order[start : start + megabatch] for start in range(0, len(order), megabatch)]
    parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    longest = int(np.argmax([lengths[part[0]] for part in parts]))
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return np.concatenate(parts)

"""Which tokens of an example longer than cutoff_len stay; pure functions. By `truncation_strategy`:

ratio  Lengths are LLaMA-Factory's (0.9.5, infer_seqlen): turn by turn, in the budget that is left, an answer
       stays whole if it takes less than half of it, else its prompt does, else both shrink alike; what has no
       room goes with all later turns. Where only the last answer is trained, the last turn comes first. Cuts
       are inside texts alone: bos, role headers, end tokens and all else that the template writes always
       stay, and of each text at least one token; where a turn has several, the longest gives way first.
       Calls of tools and tool definitions are not texts. A row whose first turn cannot be had so is dropped.
drop   the row is left out      left / right   the last / first cutoff_len tokens stay; left keeps the bos
Both answers of a pair keep the same tokens of their prompt, chosen by the length of the longer one; with left
the prompt gives way before the answers do.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import numpy as np

from options.errors import UserError
from pipeline.batch import ROLES
from pipeline.formats import Dropped
from text.render import PRODUCED, THOUGHTS, Message, is_parts

TEXT_BEGINS, TEXT_ENDS = "\U000f1010", "\U000f1011"  # private use: where a template puts a message's text
_MARKS = re.compile(f"([{TEXT_BEGINS}{TEXT_ENDS}])")
_THOUGHT_TAGS = re.compile("(</?think>)")  # templates write these themselves; they are not cut away either


def pieces(length: int, capacity: int) -> list[tuple[int, int]]:
    """Cut a document into consecutive (start, end) of at most `capacity` tokens.

    A last piece of one token could train nothing (its only token has no predecessor), so it takes one more.
    """
    borders = [*range(0, length, capacity), length]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1 and capacity > 1:
        borders[-2] -= 1
    return list(zip(borders, borders[1:]))


# ratio


def texts_within(render: Callable[[list[Message]], str], messages: list[Message], whole: str) -> list[int]:
    """Characters of `whole`, which render(messages) gives, where texts of messages begin and end, in turn.

    Found by rendering the messages with marks around their texts. A text that the template changes, as by a
    filter, shows no marks or others: then it counts as the template's own.
    """

    def tried(which: Sequence[int], bare: bool) -> list[int] | None:
        changed = [_marked_message(each, bare) if i in which else each for i, each in enumerate(messages)]
        try:
            parts = _MARKS.split(render(changed))
        except UserError:  # a template may refuse such a text
            return None
        outside, marks = parts[::2], parts[1::2]
        paired = marks == [TEXT_BEGINS, TEXT_ENDS] * (len(marks) // 2)
        return list(accumulate(map(len, outside[:-1]))) if paired and "".join(outside) == whole else None

    everything = range(len(messages))
    for bare in (False, True):  # most templates that change a text strip the white space around it
        found = tried(everything, bare)
        if found is not None:
            return found
    return sorted(place for i in everything for place in tried([i], True) or ())


def _marked_message(message: Message, bare: bool) -> Message:
    """With marks in its content, its parts and its thought; not in calls: half a JSON is worth nothing."""
    role, content, more = message
    more = dict(more)
    for key in THOUGHTS:
        if isinstance(more.get(key), str):
            more[key] = _marked(more[key], bare)
    if is_parts(more.get("content")):
        texts = ({"text": _marked(part["text"], bare)} if "text" in part else {} for part in more["content"])
        more["content"] = [part | text for part, text in zip(more["content"], texts)]
    if role != "function" or "tool_calls" in more:
        content = _marked(content, bare)
    return Message(role, content, more)


def _marked(content: str, bare: bool) -> str:
    """The content with marks around its text, and around the thought in it; bare: inside the white space."""
    parts = _THOUGHT_TAGS.split(content)
    for i in range(0, len(parts), 2):
        text = parts[i].strip() if bare else parts[i]
        if text:
            parts[i] = parts[i].replace(text, f"{TEXT_BEGINS}{text}{TEXT_ENDS}", 1)
    return "".join(parts)


def keep_turns(
    messages: list[Message], parts: Iterable[np.ndarray], trained: np.ndarray, budget: int, reserved: int
) -> np.ndarray:
    """Which tokens of a conversation stay, (n,) bool.

    parts: produced, turns, roles of Example and ranks, (n,) each; a rank is -1 for the template's own tokens,
    else the token's place in its text. reserved: answer tokens kept at least. Raises Dropped.
    """
    produced, turns, roles, ranks = parts
    answers = [turn for turn, message in enumerate(messages) if message.role in PRODUCED]
    pairs, place = np.searchsorted(answers, turns), np.arange(len(turns))
    targets = np.zeros(len(turns), bool)
    for turn in answers:
        mine = turns == turn
        first = mine & (produced if produced[mine].any() else ranks >= 0)
        targets |= mine & first.any() & (place >= np.argmax(first))
    last_first = trained.any() and pairs[trained].min() == pairs.max()
    if last_first:
        pairs[prefix(roles)] = pairs.max()  # the bos stays whatever goes
    keep, numbers = np.zeros(len(turns), bool), np.unique(pairs)
    for number in reversed(numbers) if last_first else numbers:
        source, target = (np.flatnonzero((pairs == number) & side) for side in (~targets, targets))
        kept = ratio_lengths(ranks[source], [ranks[target]], budget, reserved)
        if kept is None and not keep.any():
            raise too_short(ranks[source], [ranks[target]], reserved)
        if kept is None:
            break
        for tokens, length in zip((source, target), kept):
            keep[tokens[by_rank(ranks[tokens], length)]] = True
        budget -= sum(kept)
    return keep


def least_lengths(source: np.ndarray, targets: list[np.ndarray], reserved: int) -> tuple[int, int]:
    """Tokens of a prompt and of its longest answer without which they are none, by their ranks."""
    least = max(int((target <= 0).sum()) for target in targets)
    return int((source <= 0).sum()), max(least, min(reserved, max(map(len, targets))))


def ratio_lengths(source: np.ndarray, targets: list[np.ndarray], budget, reserved) -> tuple[int, int] | None:
    """How many tokens stay of a prompt and of each of its answers, given their ranks: as infer_seqlen says,
    or, where that is less than least_lengths, these and shares of the rest. None where they do not fit."""
    least, whole = least_lengths(source, targets, reserved), (len(source), max(map(len, targets)))
    if sum(least) > budget:
        return None
    kept = infer_seqlen(*whole, budget)
    if kept[0] < least[0] or kept[1] < least[1]:
        more = infer_seqlen(whole[0] - least[0], whole[1] - least[1], budget - sum(least))
        kept = least[0] + more[0], least[1] + more[1]
    return kept


def infer_seqlen(source: int, target: int, budget: int) -> tuple[int, int]:
    """LLaMA-Factory's rule of that name: how many of these tokens stay within the budget."""
    if 2 * target < budget:
        most = budget
    elif 2 * source < budget:
        most = budget - source
    else:
        most = int(budget * (target / (source + target)))
    target = min(most, target)
    return min(source, budget - target), target


def too_short(source: np.ndarray, targets: list[np.ndarray], reserved: int) -> Dropped:
    what = "the template's own tokens and one of each text"
    needs = f"which needs {sum(least_lengths(source, targets, reserved))} tokens"
    return Dropped(f"cutoff_len has no room for {what}", needs)


def by_rank(ranks: np.ndarray, length: int) -> np.ndarray:
    """Which of these tokens stay, (n,) bool, where `length` may: first the template's own, then the first of
    each text, then the second of each, so that the longest text gives way first."""
    keep = np.zeros(len(ranks), bool)
    keep[np.argsort(ranks, kind="stable")[:length]] = True
    return keep


# the other strategies


def prefix(roles: np.ndarray) -> np.ndarray:
    """(n,) bool: what stands before the first message (bos). Models go wrong without it."""
    return roles == ROLES.index("prefix")


def keep_side(roles: np.ndarray, capacity: int, strategy: str) -> np.ndarray:
    """Which tokens of a conversation longer than `capacity` stay, (n,) bool. Raises Dropped."""
    length, place, before = len(roles), np.arange(len(roles)), int(prefix(roles).sum())
    if strategy == "drop":
        raise Dropped("longer than cutoff_len")
    if strategy == "right":
        return place < capacity
    before = min(before, capacity - 1)
    return (place < before) | (place >= length - (capacity - before))


def keep_answer(length: int, start: int, before: int, longest: int, capacity: int, strategy: str):
    """Which tokens of prompt + answer stay, (length,) bool; the prompt loses the same for every answer to it.

    start: tokens of the prompt; `before` of them are the bos. longest: of all its answers' lengths, with the
    prompt, more than `capacity`. Raises Dropped.
    """
    place = np.arange(length)
    if strategy == "drop":
        raise Dropped("longer than cutoff_len")
    if strategy == "right":
        if start >= capacity:
            raise Dropped("prompt longer than cutoff_len")
        return place < capacity
    before = min(before, capacity - 1)
    kept = max(capacity - (longest - start), before, 1)
    of_prompt = (place < before) | ((place >= start - (kept - before)) & (place < start))
    return of_prompt | ((place >= start) & (place >= length - (capacity - kept)))


def cut_in_prompt(keep: np.ndarray, produced: np.ndarray) -> bool:
    """Whether a prompt lost tokens in front of what stays; both (n,) bool."""
    return bool((~keep & ~produced)[: np.flatnonzero(keep)[-1]].any())

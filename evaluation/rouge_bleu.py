"""How close generated texts come to their labels: ROUGE-1, -2, -L, BLEU-4 and exact match, in per cent.

    scores("the cat sat", "a cat sat")     # {"rouge-1": 66.6667, ..., "bleu-4": ..., "exact_match": 0.0}
    mean_scores([("the cat sat", "a cat sat"), ...])

The numbers are LLaMA-Factory's, so runs can be compared: rouge_chinese's ROUGE over the words that jieba
cuts, nltk's sentence BLEU over characters with Chen and Cherry's third smoothing.
  ROUGE (Lin 2004): x = the distinct n-grams of the text, y = those of the label: p = |x & y| / |x|,
  r = |x & y| / |y|, F = 2 p r / (p + r). For L: p and r are the length of the longest common subsequence over
  that of text and label.
  BLEU-4 (Papineni et al. 2002): brevity * exp(mean over n = 1..4 of log p_n); the k-th p_n without a match is
  1 / (2^k * n-grams of the text) (Chen and Cherry 2014, smoothing 3).
Words: jieba's where a text holds Chinese and jieba is installed (`chinese_is_cut`). Without Chinese the rule
below gives the words that jieba gives; Chinese without jieba is taken one character at a time, which gives
other numbers. As in rouge_chinese a word counts once for ROUGE-1 and -2 however often it comes, and an empty
line counts as a word.
"""

import functools
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact_match")
# jieba's: its five Latin names with signs; letters and digits with a decimal part and a per cent sign, runs
# of signs, any other character by itself
PIECE = re.compile(r"\b(?:AT&T|[cC]#|[cC]\+\+)|[a-zA-Z0-9]+(?:\.\d+)?%?|[+#&._%\-]+|\r\n|\s|\S")
# rouge_chinese's: begins a new line
SENTENCE_END = re.compile("([\u3002\uff01\uff1f?]|\\.{6})([^\u201d\u2019])")
CHINESE = re.compile("[\u4e00-\u9fd5]")
TINY = 1e-8  # in the denominator of F, as rouge_chinese has it


def mean_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Mean of `scores` over (text, label) pairs, rounded to 4 places; {} for none."""
    rows = [scores(text, label) for text, label in pairs]
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in NAMES} if rows else {}


def scores(text: str, label: str) -> dict[str, float]:
    """Each of NAMES for one text, 0 to 100, rounded to 4 places."""
    mine, theirs = words(text), words(label)
    values = [rouge_n(mine, theirs, 1), rouge_n(mine, theirs, 2), rouge_l(mine, theirs), bleu4(text, label)]
    values.append(float(text.strip() == label.strip()))
    return {name: round(100 * value, 4) for name, value in zip(NAMES, values)}


def words(text: str) -> list[str]:
    """The words that ROUGE counts, "" for an empty line within the text."""
    pieces = _jieba().cut(text) if CHINESE.search(text) and chinese_is_cut() else PIECE.findall(text)
    lines = SENTENCE_END.sub(r"\1\n\2", " ".join(pieces)).rstrip().split("\n")
    return [word for line in lines if line for word in line.split() or [""]]


def chinese_is_cut() -> bool:
    """Whether jieba is there to find the words of Chinese."""
    return importlib.util.find_spec("jieba") is not None


@functools.cache
def _jieba():
    """Its dictionary takes a second to read: only where Chinese comes up."""
    import logging

    import jieba

    jieba.setLogLevel(logging.WARNING)
    return jieba


def rouge_n(text: Sequence[str], label: Sequence[str], size: int) -> float:
    """F of the distinct runs of `size` words, 0 to 1."""
    mine, theirs = (set(_ngrams(sequence, size)) for sequence in (text, label))
    return _f_measure(len(mine & theirs), len(mine), len(theirs))


def rouge_l(text: Sequence[str], label: Sequence[str]) -> float:
    """F of the longest common subsequence, 0 to 1."""
    return _f_measure(common_length(text, label), len(text), len(label))


def bleu4(text: str, label: str) -> float:
    """Sentence BLEU over characters, 0 to 1."""
    matches, totals = [], []
    for size in range(1, 5):
        mine, theirs = Counter(_ngrams(text, size)), Counter(_ngrams(label, size))
        matches.append((mine & theirs).total())  # clipped: an n-gram counts as often as the label has it
        totals.append(max(1, mine.total()))
    if matches[0] == 0:
        return 0.0
    logs, missed = 0.0, 0
    for match, total in zip(matches, totals):
        missed += match == 0
        logs += math.log((match or 0.5**missed) / total)
    brevity = min(0.0, 1 - len(label) / len(text))
    return math.exp(brevity + logs / 4)


def common_length(first: Sequence, second: Sequence) -> int:
    """Length of the longest common subsequence, in O(n m / 64) (Hyyro 2004, after Crochemore et al. 2001).

    Bit i of `row` is 0 where the subsequence of first[: i + 1] is longer than that of first[:i]; one addition
    carries all matches of one item of `second` at once.
    """
    places: dict = {}
    for place, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()


def _ngrams(sequence: Sequence, size: int) -> Iterable[tuple]:
    return zip(*(sequence[start:] for start in range(size)))


def _f_measure(common: int, mine: int, theirs: int) -> float:
    precision, recall = common / max(mine, 1), common / max(theirs, 1)
    return 2 * precision * recall / (precision + recall + TINY)

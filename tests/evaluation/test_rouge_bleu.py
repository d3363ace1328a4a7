"""ROUGE, BLEU and exact match are LLaMA-Factory's numbers: recorded from its libraries, and by hand."""

import importlib.util
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import rouge_bleu
from evaluation.rouge_bleu import NAMES, bleu4, common_length, mean_scores, rouge_l, rouge_n, scores, words

CHINESE = (
    "\u4f60\u597d\uff0c\u6211\u662f\u4e00\u4e2a\u4eba\u5de5\u667a\u80fd\u52a9\u624b\u3002"
    "\u5f88\u9ad8\u5174\u89c1\u5230\u60a8\uff01"
)
CHINESE_LABEL = "\u60a8\u597d\uff0c\u6211\u662f\u4eba\u5de5\u667a\u80fd\u52a9\u624b\u3002"
PARAGRAPHS = (
    "It costs 3.14% of $1,000 - or so...\n\nRight?\n\nYes",
    "It costs 3.14% of $2,000.\n\nIs that right?\nYes!",
)
# text, label -> ROUGE-1, ROUGE-2, ROUGE-L, BLEU-4, as rouge_chinese 1.0.3, jieba 0.42.1 and nltk 3.10.4 gave
# them
RECORDED = [
    ("The cat sat on the mat.", "A cat sat on a mat, twice.", 62.5, 28.5714, 62.5, 55.5916),
    (*PARAGRAPHS, 62.5, 42.4242, 62.8571, 61.3165),
    ("caf\u00e9 e.g.5 C++ -- 5%%", "e.g.5 of C++ in a caf\u00e9", 66.6667, 37.5, 44.4444, 49.4224),
    ("a", "a", 100, 0, 100, 35.3553),
    ("ab", "ba", 0, 0, 0, 35.3553),
    ("abc", "xyz", 0, 0, 0, 0),
    ("", "x", 0, 0, 0, 0),
    ("x", "", 0, 0, 0, 0),
    ("no no no no no", "no yes", 66.6667, 0, 28.5714, 10.5711),
]
LIBRARIES = [name for name in ("nltk", "rouge_chinese", "jieba") if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("row", RECORDED, ids=[ascii(row[0])[:20] for row in RECORDED])
def test_the_numbers_are_those_of_the_libraries_that_llama_factory_calls(row):
    text, label, *expected = row
    found = scores(text, label)
    assert [found[name] for name in NAMES[:4]] == expected
    assert found["exact_match"] == 100 * (text == label)


def test_chinese_is_taken_by_the_character_where_jieba_is_not_installed(monkeypatch):
    monkeypatch.setattr(rouge_bleu, "chinese_is_cut", lambda: False)
    assert words("\u667a\u80fd 3.5% AI\u3002") == ["\u667a", "\u80fd", "3.5%", "AI", "\u3002"]
    found = scores(CHINESE, CHINESE_LABEL)
    assert found["bleu-4"] == 40.2767  # by characters with or without jieba
    mine, theirs = set(CHINESE), set(CHINESE_LABEL)
    precision, recall = len(mine & theirs) / len(mine), len(mine & theirs) / len(theirs)
    assert found["rouge-1"] == pytest.approx(200 * precision * recall / (precision + recall), abs=1e-4)


@pytest.mark.skipif(bool(LIBRARIES), reason=f"not installed: {', '.join(LIBRARIES)}")
@settings(deadline=None)
@given(st.lists(st.tuples(*[st.text("ab \n?.5%\u3002\u4f60\u597d\u60a8", max_size=40)] * 2), max_size=5))
def test_any_text_gives_what_the_libraries_give(pairs):
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    for text, label in [(CHINESE, CHINESE_LABEL), PARAGRAPHS, *pairs]:
        spaced = [" ".join(jieba.cut(each)) for each in (text, label)]
        expected = [0.0, 0.0, 0.0]
        if all(each.split() for each in spaced):
            expected = [row["f"] for row in Rouge().get_scores(*spaced)[0].values()]
        smoothing = SmoothingFunction().method3
        expected.append(sentence_bleu([list(label)], list(text), smoothing_function=smoothing))
        found = scores(text, label)
        assert [found[name] for name in NAMES[:4]] == [round(100 * value, 4) for value in expected], (
            text,
            label,
        )


def test_rouge_counts_distinct_ngrams_and_the_longest_common_subsequence():
    text, label = list("abcabd"), list("bcdae")
    assert rouge_n(text, label, 1) == pytest.approx(
        2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5)
    )  # abcd in abcd, in abcde
    assert rouge_n(text, label, 2) == pytest.approx(
        2 * (1 / 4) * (1 / 4) / (1 / 4 + 1 / 4)
    )  # bc of ab bc ca bd
    assert rouge_l(text, label) == pytest.approx(2 * (3 / 6) * (3 / 5) / (3 / 6 + 3 / 5))  # bcd, bca


def test_bleu_halves_each_further_order_without_a_match_and_punishes_short_texts():
    # characters of "abx": 2 of 3 match, 1 pair of 2, no triple of 1 -> 1/2, no quadruple of 0 (counted as 1)
    # -> 1/4
    expected = math.exp(1 - 5 / 3) * (2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** 0.25
    assert bleu4("abx", "abcde") == pytest.approx(expected)
    assert bleu4("abcdefgh", "abcdef") == pytest.approx(
        (6 / 8 * 5 / 7 * 4 / 6 * 3 / 5) ** 0.25
    )  # longer: no penalty
    assert bleu4("aaaaa", "aab") == pytest.approx(
        (2 / 5 * 1 / 4 * (0.5 / 3) * (0.25 / 2)) ** 0.25
    )  # clipped to two


def plain_common_length(first, second) -> int:
    row = [0] * (len(second) + 1)
    for item in first:
        corner = 0
        for place, other in enumerate(second, start=1):
            corner, row[place] = row[place], corner + 1 if item == other else max(row[place], row[place - 1])
    return row[-1]


@given(st.text("abc", max_size=90), st.text("abcd", max_size=90))
def test_the_longest_common_subsequence_is_that_of_the_plain_table(first, second):
    assert common_length(first, second) == plain_common_length(first, second)


def test_means_are_rounded_and_white_space_around_a_text_does_not_count_for_exact_match():
    assert scores(" 42\n", "42")["exact_match"] == 100
    found = mean_scores([("42", "42"), ("41", "42"), ("", "42")])
    assert found["exact_match"] == 33.3333 and list(found) == list(NAMES)
    assert mean_scores([]) == {}

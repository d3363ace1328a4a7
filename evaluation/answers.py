"""The final answer in a solution of a mathematical problem, and whether two of them are the same.

Where it stands, in this order: behind the last "####" (GSM8K, arXiv 2110.14168), in the last \\boxed{...}
(MATH, arXiv 2103.03874), in the last <answer>...</answer> (R1's format), behind the last "answer is" or
"answer:"; else it is the last number (of a solution; a row's own answer without such a mark is the answer
itself). Numbers are compared as exact fractions (1,000 = 1000.0; 1/2 = 0.5 = \\frac{1}{2}), other text
without regard to case and spaces.
"""

import re
from fractions import Fraction

NUMBER = re.compile(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
BOXED = ("\\boxed{", "\\fbox{")
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SAID = re.compile(r"\banswer(?:\s+is|\s*[:=])\s*:?\s*([^\n]+)", re.IGNORECASE)
FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
NOISE = re.compile(r"\\(?:text|mathrm|left|right|!|,|;|\s)|[{}$\s]|\\%|%")


def final_answer(text: str) -> str | None:
    """The answer that a solution ends with; None if it has none."""
    found = _marked(text)
    if found is None:
        numbers = NUMBER.findall(text)
        found = numbers[-1] if numbers else text
    return found.strip() or None


def same_answer(text: str, expected: str) -> bool:
    """Whether a solution ends with the expected answer, or is nothing else.

    expected: a solution that marks its answer (not merely ends with a number), or the answer alone.
    """
    marked = _marked(expected)
    theirs = expected.strip() if marked is None else marked.strip()
    if not theirs or not text.strip():
        return False
    if _bare(text) == _bare(theirs):
        return True
    mine = final_answer(text)
    if mine is None:
        return False
    mine_value, their_value = number(mine), number(theirs)
    if mine_value is not None and their_value is not None:
        return mine_value == their_value
    return _bare(mine) == _bare(theirs)


def _marked(text: str) -> str | None:
    """The answer where something says that it is one; "" if nothing stands there."""
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    tagged = TAGGED.findall(text)
    if tagged:
        return tagged[-1]
    said = SAID.findall(text)
    if not said:
        return None
    numbers = NUMBER.findall(said[-1].rpartition("=")[2])  # "the answer is 3 + 4 = 7 apples"
    return numbers[0] if numbers else said[-1].strip().rstrip(".")


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None if it is none."""
    text = FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"[\s$]|(?<=\d),(?=\d{3})", "", NOISE.sub("", text)).rstrip(".")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _bare(text: str) -> str:
    return NOISE.sub("", text).rstrip(".").lower()


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...}, whose braces may hold braces."""
    begin = max((text.rfind(mark) + len(mark) for mark in BOXED if mark in text), default=None)
    if begin is None:
        return None
    depth = 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return None

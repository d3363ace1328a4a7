"""Where the final answer of a mathematical text stands, when two answers are the same, and the shipped
rewards."""

import sys
from pathlib import Path

import pytest

from evaluation.answers import final_answer, same_answer
from stages.rewards import FunctionReward, Sample

REWARDS = Path(__file__).resolve().parents[2] / "data" / "rewards"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sells 9 eggs for $2 each.\n9 * 2 = <<9*2=18>>18\n#### 18", "18"),  # GSM8K
        ("#### 3\nno, wait\n#### 1,450 \nmore", "1,450"),
        (r"so $x = \boxed{3}$, or rather $\boxed{\frac{1}{2}}$ (not 7)", r"\frac{1}{2}"),  # MATH
        (r"an open \boxed{3", "3"),
        ("<think>2 + 2 = 5?</think> <answer> 4 </answer> 99", "4"),
        ("The answer is 3 + 4 = 7 apples, for 12 people.", "7"),
        ("Answer: Paris.", "Paris"),
        ("86+87 = 173.", "173"),
        ("first 5-3, then -2", "-2"),
        ("5-3", "3"),
        ("1,234.50", "1,234.50"),
        (" yes ", "yes"),
        ("", None),
        ("#### ", None),
        (r"\boxed{}", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "expected", "same"),
    [
        ("the answer is 1,000", "1000.0", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        ("$1/2$", "#### 0.50", True),
        (r"\boxed{50\%}", "50", True),
        ("173", "#### 173", True),
        ("17", "173", False),
        ("1/0", "1/0", True),  # no number, but the same text
        (r"\boxed{x + 1}", "x+1", True),
        ("x + 1", "x+1", True),
        ("1", "x+1", False),
        ("it is Rome", "Rome", False),
        ("the answer is Rome.", "rome", True),
        ("", "3", False),
        ("3", "", False),
    ],
)
def test_same_answer(text, expected, same):
    assert same_answer(text, expected) is same


def scores(file: str, *completions: str, answer: str | None = "12") -> list[list[float]]:
    samples = [Sample("p", text, answer, [1], [2], "stop") for text in completions]
    return FunctionReward(REWARDS / file).parts(samples).tolist()


def test_the_shipped_rewards():
    assert scores("maths.py", "5 + 7 = 12", "13", "") == [[1.0], [0.0], [0.0]]
    assert scores("maths.py", "12", answer=None) == [[0.0]]
    form = "<think>5 and 7</think> <answer>12</answer>"
    assert scores("reasoning.py", form, f"{form} {form}", "12", "<think></think><answer>13</answer>") == [
        [1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]
    ]  # fmt: skip
    assert "evaluation.answers" in sys.modules

"""Rewards of generated answers: functions of a user's file, and what is wrong with one."""

import pytest
import torch

from options.errors import StopRun
from stages.rewards import FunctionReward, RewardOptions, RewardSource, Sample

SAMPLES = [
    Sample("2 + 2 =", " 4", "4", [5, 6], [9, 2], "stop"),
    Sample("3 + 9 =", " 13 or so", "12", [5, 7, 8], [9, 9, 9, 9], "length"),
    Sample("Sing.", "", None, [1], [2], "stop", (0, 3)),
]


@pytest.fixture
def reward_file(tmp_path):
    def write(text: str):
        path = tmp_path / "my_rewards.py"
        path.write_text(text)
        return path

    return write


BOTH = """
from dataclasses import dataclass
from math import sqrt  # not a function of this file

def right(completions, answers):
    return [float(text.strip() == answer) for text, answer in zip(completions, answers)]

def helper(text):
    return len(text)

def lengths(prompts, completions, completion_ids, finish_reasons, **others):
    completions.clear()  # its own list
    assert sorted(others) == ["answers", "prompt_ids"]
    return [len(ids) - 10 * (reason == "length") for ids, reason in zip(completion_ids, finish_reasons)]
"""


def test_the_score_is_the_weighted_sum_of_all_functions_with_completions(reward_file):
    reward = FunctionReward(reward_file(BOTH), weights=(2.0, 0.5))
    assert reward.names == ("right", "lengths")
    parts = torch.tensor([[1.0, 2.0], [0.0, -6.0], [0.0, 1.0]])
    assert torch.equal(reward.parts(SAMPLES), parts)
    assert torch.equal(reward.scores(SAMPLES), parts @ torch.tensor([2.0, 0.5]))
    assert torch.equal(reward.scores(SAMPLES[1:2]), reward.scores(SAMPLES)[1:2])
    assert reward.scores([]).shape == (0,)


def test_some_functions_in_another_order(reward_file):
    reward = FunctionReward(reward_file(BOTH), ("lengths", "right"), (0.0, 1.0))
    assert reward.names == ("lengths", "right")
    assert reward.scores(SAMPLES).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text, words, reason",
    [
        ("x = 1", {}, "no function has a parameter `completions`"),
        (BOTH, {"names": ("wrong",)}, "no reward function 'wrong'; it has right, lengths"),
        (BOTH, {"weights": (1.0,)}, "1 numbers for the 2 functions"),
        (
            "def f(completions, solution): return []",
            {},
            "f has a parameter 'solution'; a reward function can have",
        ),
        ("import nothing_of_that_name", {}, r"my_rewards.py:1: ModuleNotFoundError"),
        ("def f(:", {}, r"my_rewards.py:1: SyntaxError"),
        ("async def f(completions): return []", {}, "f is async, but nothing waits for it; write `def f`"),
    ],
)
def test_a_file_that_cannot_serve_says_why(reward_file, text, words, reason):
    with pytest.raises(ValueError, match=reason):
        FunctionReward(reward_file(text), **words)


@pytest.mark.parametrize(
    "body, reason",
    [
        ("return [1.0]", "f returned 1 numbers for 3 completions"),
        ("return [1.0, 'none', 2.0]", "expected a list of numbers"),
        ("return [0, 0, 10**400]", "expected a list of numbers .int too large"),
        ("return ({}[text] for text in completions)", r"expected a list of numbers \(' 4'\)"),
        ("return None", "f returned None, expected a list of numbers"),
        ("return 1.0", "f returned 1.0, expected a list of numbers"),
        (
            "import torch; return torch.ones(3, 2)",
            r"f returned tensor\(\[\[1., 1.\], \[1., 1.\], .*, expected a list",
        ),
        (
            "return [1.0, float('nan'), 0.0]",
            r"reward \(f\) of an answer is nan, .*' 13 or so', to '3 \+ 9 ='",
        ),
        ("\n    return [1 / len(text) for text in completions]", r"f \(line 2\): ZeroDivisionError"),
    ],
)
def test_a_function_that_goes_wrong_stops_the_run_with_its_line(reward_file, body, reason):
    reward = FunctionReward(reward_file(f"def f(completions): {body}\n"))
    with pytest.raises(StopRun, match=reason):
        reward.scores(SAMPLES)


def test_a_function_may_abstain_with_none(reward_file, capsys):
    """As in trl: nothing is added for it; an answer of which no function says anything has no reward."""
    text = """
def f(completions): return [1.0, None, None]
def g(completions): return [None, 3.0, None]
"""
    reward = FunctionReward(reward_file(text), weights=(2.0, 0.5))
    assert reward.parts(SAMPLES).nan_to_num(-9.0).tolist() == [[1.0, -9.0], [-9.0, 3.0], [-9.0, -9.0]]
    assert reward.scores(SAMPLES).nan_to_num(-9.0).tolist() == [2.0, 1.5, -9.0]
    reward.scores(SAMPLES)
    assert (
        capsys.readouterr().out.count("every reward function returned None; the answer is '', to 'Sing.'")
        == 1
    )


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="this is a folder"):
        FunctionReward(tmp_path)
    with pytest.raises(ValueError, match="file not found"):
        FunctionReward(tmp_path / "none.py")
    (tmp_path / "rewards.txt").write_text(BOTH)
    with pytest.raises(ValueError, match="expected a Python file"):
        FunctionReward(tmp_path / "rewards.txt")


@pytest.mark.parametrize(
    "words, reason",
    [
        ({"reward_weights": (1.0,)}, "reward_weights: it belongs to reward_file"),
        (
            {"reward_file": "a.py", "reward_funcs": ("f",), "reward_weights": (1.0, 2.0)},
            "2 numbers for 1 functions",
        ),
        ({"reward_file": "a.py", "reward_model": "b"}, "give one of the two"),
        (
            {"reward_model": "http://127.0.0.1:8000/score"},
            "lora and full name a folder or a hub id, api an address",
        ),
        ({"reward_model": "saves/rm", "reward_model_type": "api"}, "api an address"),
        (
            {"reward_model": "saves/rm", "reward_model_adapters": ("a",)},
            "belongs to a reward_model of type full",
        ),
        (
            {"reward_model": "saves/rm", "reward_model_quantization_bit": 4},
            "belongs to a reward_model of type full",
        ),
        ({"reward_api_timeout": 0.0}, "must be above 0"),
    ],
)
def test_options_that_do_not_go_together(words, reason):
    with pytest.raises(ValueError, match=reason):
        RewardOptions(**words)


def test_a_score_that_is_no_number_is_never_handed_on():
    class Broken(RewardSource):
        def measure(self, samples):
            return torch.tensor([[0.0], [float("inf")], [1.0]])

    with pytest.raises(StopRun, match="is inf"):
        Broken().scores(SAMPLES)

    class Unknown(RewardSource):  # only functions may abstain
        def measure(self, samples):
            return torch.tensor([[0.0], [float("nan")], [1.0]])

    with pytest.raises(StopRun, match="is nan"):
        Unknown().scores(SAMPLES)

"""Where the reward of a generated answer comes from, for the stages ppo and grpo.

    reward_file: my_rewards.py      functions of the user's own (FunctionReward)

A reward file holds one function or several. It is the user's program and runs on purpose, so use no file that you have
not read. Every function in it that has a parameter `completions` is a reward (or those that reward_funcs names); it
gets lists of equal length, by the names of its parameters, and returns one number for each completion:

    def near_forty_words(completions, **others):
        return [-abs(len(text.split()) - 40) / 40 for text in completions]

    def exact_match(completions, answers):
        return [float(text.strip() == answer) for text, answer in zip(completions, answers)]

The names are `prompts` (text as the model sees it), `completions` (text without the stop token), `answers` (the row's
own answer; None if it has none), `prompt_ids`, `completion_ids` (with the stop token), `finish_reasons` ("stop", or
"length" when the answer was cut off), or **others for all of them. A function must depend on nothing else: texts are
scored in batches of any size, on every rank, and again after a resume. The reward is the sum of all functions, each
times its entry of reward_weights. trl's reward functions for plain text run here.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
from torch import Tensor

from hub import ModelOptions
from model import Decoder
from runs import StopRun
from tokenizer import Tokenizer

ARGUMENTS = ("prompts", "completions", "answers", "prompt_ids", "completion_ids", "finish_reasons")


@dataclass(frozen=True)
class RewardOptions:
    reward_file: Annotated[str | None, "Python file with reward functions; runs as your own program"] = None
    reward_funcs: Annotated[tuple[str, ...], "which functions of reward_file; default: all with `completions`"] = ()
    reward_weights: Annotated[tuple[float, ...], "weight of each reward function; default: 1 each"] = ()

    def __post_init__(self):
        for key in ("reward_funcs", "reward_weights"):
            if getattr(self, key) and not self.reward_file:
                raise ValueError(f"{key}: it belongs to reward_file, which is not given; name one, or drop {key}")
        if self.reward_funcs and self.reward_weights and len(self.reward_funcs) != len(self.reward_weights):
            raise ValueError(
                f"reward_weights: {len(self.reward_weights)} numbers for {len(self.reward_funcs)} functions in "
                "reward_funcs; give one for each"
            )


@dataclass(frozen=True)
class Sample:
    """One generated answer."""

    prompt: str  # as the model saw it, special tokens included
    completion: str  # without the stop token
    answer: str | None  # the row's own
    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]  # with the stop token
    finish_reason: str  # "stop" or "length"
    source: tuple[int, int] = (-1, -1)  # (dataset, row)


class RewardSource:
    """Answers -> numbers, on the host: the same number whichever answers are scored beside it."""

    names: tuple[str, ...] = ("reward",)  # of its parts, K of them
    weights: tuple[float, ...] = (1.0,)

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        """(n, K) fp32, not checked yet; n > 0."""
        raise NotImplementedError

    def parts(self, samples: Sequence[Sample]) -> Tensor:
        """(n, K) fp32 on the CPU. Raises StopRun for a number that is none."""
        if not samples:
            return torch.zeros(0, len(self.names))
        values = self.measure(samples)
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, part = bad[0].tolist()
            raise StopRun(
                f"the reward ({self.names[part]}) of an answer is {values[row, part]}, expected a finite number; the "
                f"answer is {_short(samples[row].completion)!r}, to {_short(samples[row].prompt)!r}"
            )
        return values

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """(n,) fp32 on the CPU: the weighted sum of the parts."""
        return self.parts(samples) @ torch.tensor(self.weights)


class FunctionReward(RewardSource):
    """The functions of a reward file; see the top of this file."""

    def __init__(self, path: str | Path, names: Sequence[str] = (), weights: Sequence[float] = ()):
        """Raises ValueError naming the file and what is wrong with it."""
        self.path = Path(path).expanduser()
        found = _reward_functions(self.path, names)
        self.functions, self.names = tuple(found.values()), tuple(found)
        self.weights = tuple(map(float, weights)) or (1.0,) * len(found)
        if len(self.weights) != len(found):
            raise ValueError(
                f"reward_weights: {len(self.weights)} numbers for the {len(found)} functions of {self.path} "
                f"({', '.join(found)}); give one for each"
            )

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        given = {
            "prompts": [sample.prompt for sample in samples],
            "completions": [sample.completion for sample in samples],
            "answers": [sample.answer for sample in samples],
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "completion_ids": [list(sample.completion_ids) for sample in samples],
            "finish_reasons": [sample.finish_reason for sample in samples],
        }
        columns = [self._call(name, function, given) for name, function in zip(self.names, self.functions)]
        return torch.tensor(columns).T.contiguous()

    def _call(self, name: str, function: Callable, given: dict[str, list]) -> list[float]:
        """The function's numbers, one for each completion. Raises StopRun that names function and line."""
        where = f"reward_file: {self.path}: {name}"
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        wanted = ARGUMENTS if takes_all else [parameter.name for parameter in parameters if parameter.name in given]
        try:
            values = function(**{key: list(given[key]) for key in wanted})  # its own lists: it may change them
        except Exception as error:  # the user's program may raise anything
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == str(self.path)]  # fmt: skip
            line = f" (line {lines[-1]})" if lines else ""
            raise StopRun(f"{where}{line}: {type(error).__name__}: {error}") from error
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError) as error:
            raise StopRun(f"{where} returned {_short(repr(values))}, expected a list of numbers ({error})") from error
        if len(numbers) != len(given["completions"]):
            raise StopRun(
                f"{where} returned {len(numbers)} numbers for {len(given['completions'])} completions; return one for "
                "each, in their order"
            )
        return numbers


def _reward_functions(path: Path, names: Sequence[str]) -> dict[str, Callable]:
    """The reward functions of this file by name, in the order of `names`, or of the file. Raises ValueError."""
    module = _load_module(path)
    own = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    rewards = {name: value for name, value in own.items() if "completions" in inspect.signature(value).parameters}
    if not rewards:
        raise ValueError(f"reward_file: {path}: no function has a parameter `completions`, so there is no reward in it")
    for name in names:
        if name not in rewards:
            raise ValueError(f"reward_funcs: {path} has no reward function {name!r}; it has {', '.join(rewards)}")
    chosen = {name: rewards[name] for name in names} or rewards
    for name, function in chosen.items():
        for parameter in inspect.signature(function).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            optional = parameter.default is not parameter.empty
            bundle = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not bundle and not optional and not (named and parameter.name in ARGUMENTS):
                raise ValueError(
                    f"reward_file: {path}: {name} has a parameter {parameter.name!r}; a reward function can have "
                    f"{', '.join(ARGUMENTS)} and **others"
                )
    return chosen


def _load_module(path: Path) -> ModuleType:
    """Run the user's file, as an import would. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"reward_file: {path}: file not found")
    if path.suffix != ".py":
        raise ValueError(f"reward_file: {path}: expected a Python file (.py)")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as importlib's recipe: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's program may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f":{line}" if line else ""
        raise ValueError(f"reward_file: {path}{place}: {type(error).__name__}: {error}") from error
    return module


def from_options(options: RewardOptions, model: Decoder, tokenizer: Tokenizer, hub: ModelOptions) -> RewardSource:
    """The reward that the options ask for. model: the policy with its adapters. Raises ValueError."""
    if options.reward_file:
        return FunctionReward(options.reward_file, options.reward_funcs, options.reward_weights)
    raise ValueError("reward_file: missing; name a Python file with reward functions")


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

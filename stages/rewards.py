"""Where the reward of a generated answer comes from, for the stages ppo and grpo.

    reward_file: my_rewards.py              functions of the user's own (FunctionReward)
    reward_model: saves/rm                  an adapter of stage rm on the policy's own base (AdapterReward)
    reward_model_type: full                 a second model, with reward_model_adapters if any (ModelReward)
    reward_model_type: api                  reward_model is an address, asked over HTTP (ApiReward)

An API gets POST {"model": "model", "messages": [text, ...]} (prompt and answer with their special tokens, as
LLaMA-Factory sends them) and answers {"scores": [number, ...]}, one for each text in their order.

A reward file is the user's program and runs on purpose, so use no file that you have not read. Every function
in it with a parameter `completions` is a reward (or those that reward_funcs names); it gets lists of equal
length, by the names of its parameters, and returns one number for each completion; None = nothing to say:

    def near_forty_words(completions, **others):
        return [-abs(len(text.split()) - 40) / 40 for text in completions]

    def exact_match(completions, answers):
        return [float(text.strip() == answer) for text, answer in zip(completions, answers)]

The names are `prompts` (text as the model sees it), `completions` (text without the stop token), `answers`
(the row's own answer; None if it has none), `prompt_ids`, `completion_ids` (with the stop token),
`finish_reasons` ("stop", or "length" when the answer was cut off), or **others for all of them. A function
must depend on nothing else: texts are scored in batches of any size, on every rank, and again after a resume.
The reward is their sum, each times its entry of reward_weights. trl's functions for plain text run here, and
None means what it means there: the other functions' sum alone; where all say None an answer teaches nothing
in grpo, and has reward 0 in ppo.
"""

import http.client
import importlib.util
import inspect
import json
import math
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from checkpoints.peft import ADAPTER_PARTS, adapted_linear, read_adapter, whole_parameter
from checkpoints.value_head import ValueHead, has_value_head, load_value_head
from generation.generate import Completion
from lora import full_modules, lora_layers, replace_module
from model import Decoder
from options import json_reader
from options.errors import StopRun, UserError, refuse, require
from options.option import COMMON, RESUMABLE, option
from parallel.world import World
from quant.linear import QuantLinear
from stages.logprobs import device_of
from stages.rm import score_texts
from stages.rollouts import Prompt
from text.tokenizer import Tokenizer

# name -> field of Sample
ARGUMENTS = {"prompts": "prompt", "completions": "completion", "answers": "answer"}
ARGUMENTS |= {each: each for each in ("prompt_ids", "completion_ids")} | {"finish_reasons": "finish_reason"}
API_TRIES = 3  # a server that is being restarted must not end a run of hours
API_PAUSE = 2.0  # seconds before the second try; twice that before the third
API_BYTES = 2**26  # of an answer at most; a number of a score takes twenty


@dataclass(frozen=True)
class RewardOptions:
    STAGES = "ppo grpo"

    reward_model: str | None = option(None, "adapter of stage rm, model folder, hub id or address")
    reward_model_type: Literal["lora", "full", "api"] = option(
        "lora", "what reward_model is: an adapter on the same base, a model of its own, a server's address"
    )
    reward_model_adapters: tuple[str, ...] = option((), "adapters of a reward model of type full")
    reward_model_quantization_bit: int | None = option(None, "quantise a reward model of type full")
    reward_api_timeout: float = option(60.0, "seconds that the reward server may take", RESUMABLE)
    reward_file: str | None = option(None, "Python file with reward functions; runs as your program", COMMON)
    reward_funcs: tuple[str, ...] = option((), "functions of reward_file; default: all with `completions`")
    reward_weights: tuple[float, ...] = option((), "weight of each reward function; default: 1 each")

    def __post_init__(self):
        model, kind, weights = self.reward_model, self.reward_model_type, self.reward_weights
        refuse(model and self.reward_file, "reward_file: there is a reward_model too; give one of the two")
        is_address = (model or "").startswith(("http://", "https://"))
        text = "lora and full name a folder or a hub id, api an address (http://...)"
        wrong = model and is_address != (kind == "api")
        refuse(wrong, f"reward_model: {model} with reward_model_type={kind}: {text}")
        for key in ("reward_model_adapters", "reward_model_quantization_bit"):
            lonely = getattr(self, key) and not (model and kind == "full")
            refuse(lonely, f"{key}: it belongs to a reward_model of type full; drop it, or set that type")
        require(self, "reward_api_timeout", lambda value: value > 0, "must be above 0 (seconds)")
        for key in ("reward_funcs", "reward_weights"):
            lonely = getattr(self, key) and not self.reward_file
            refuse(lonely, f"{key}: it belongs to reward_file, which is not given; name it, or drop {key}")
        for name in self.reward_funcs:
            twice = self.reward_funcs.count(name) > 1
            refuse(twice, f"reward_funcs: {name} is named twice; name it once, and use reward_weights")
        finite = all(map(math.isfinite, weights))
        refuse(not finite, f"reward_weights: {weights} must be finite numbers")
        named, given = len(self.reward_funcs), len(weights)
        wrong = named and given and named != given
        refuse(wrong, f"reward_weights: {given} numbers for {named} functions in reward_funcs")


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


def samples_of(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Sample]:
    return [
        Sample(prompt.text, done.text, prompt.answer, prompt.ids, done.ids, done.finish_reason, prompt.source)
        for prompt, done in zip(prompts, completions, strict=True)
    ]


class RewardError(StopRun):
    """Nobody knows what these answers are worth: a function or a server failed. What was trained is sound."""


class RewardSource:
    """Answers -> numbers, on the host: the same number whichever answers are scored beside it."""

    names: tuple[str, ...] = ("reward",)  # of its parts, K of them
    weights: tuple[float, ...] = (1.0,)
    may_abstain = False  # NaN is what `measure` gives where a part has nothing to say
    asks_model = False  # of which ranks may hold shares: a rank without an answer asks it too
    told = False  # that all parts abstained once
    world: World | None = None  # ranks with the same rows have to learn from the same numbers

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        """(n, K) fp32, not checked yet; n > 0."""
        raise NotImplementedError

    def parts(self, samples: Sequence[Sample]) -> Tensor:
        """(n, K) fp32 on the CPU, NaN where a part abstains. All ranks call it. Raises RewardError on all of
        them where one has a failure, or a number that is none."""
        values, failure = torch.zeros(0, len(self.names)), None
        try:
            values = self._checked(samples) if samples or self.asks_model else values
        except RewardError as error:
            failure = error
        if self.world is None:
            if failure is not None:
                raise failure
            return values
        said = self.world.gather(failure and str(failure))  # all stop here, and can save what was trained
        for rank, text in enumerate(said):
            if text is not None:
                raise failure or RewardError(f"rank {rank}: {text}")
        return self.world.as_first(values)  # a function may answer differently, asked twice

    def _checked(self, samples: Sequence[Sample]) -> Tensor:
        values = self.measure(samples)
        abstained = values.isnan() if self.may_abstain else torch.zeros_like(values, dtype=torch.bool)
        bad = (~torch.isfinite(values) & ~abstained).nonzero()
        if len(bad):
            row, part = bad[0].tolist()
            raise _no_number(self.names[part], float(values[row, part]), samples[row])
        silent = abstained.all(1).nonzero()
        if len(silent) and not self.told:
            self.told = True
            print(f"note: every reward function returned None; {_answer_of(samples[int(silent[0])])}")
        return values

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """(n,) fp32 on the CPU: the weighted sum of the parts; NaN where all abstain."""
        return weighted_sum(self.parts(samples), self.weights)


def weighted_sum(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """parts (n, K), NaN where one abstains -> (n,): the sum of the others; NaN where there are none."""
    abstained = parts.isnan()
    sums = parts.masked_fill(abstained, 0.0) @ torch.tensor(weights, dtype=parts.dtype)
    return sums.masked_fill(abstained.all(1), torch.nan)


class FunctionReward(RewardSource):
    """The functions of a reward file; see the top of this file."""

    may_abstain = True

    def __init__(self, path: str | Path, names: Sequence[str] = (), weights: Sequence[float] = ()):
        """Raises UserError naming the file and what is wrong with it."""
        self.path = Path(path).expanduser()
        found = _reward_functions(self.path, names)
        self.functions, self.names = tuple(found.values()), tuple(found)
        self.weights = tuple(map(float, weights)) or (1.0,) * len(found)
        given, where = len(self.weights), f"the {len(found)} functions of {self.path} ({', '.join(found)})"
        refuse(given != len(found), f"reward_weights: {given} numbers for {where}; give one for each")

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        given = {name: [getattr(sample, field) for sample in samples] for name, field in ARGUMENTS.items()}
        columns = []
        for name, function in zip(self.names, self.functions):
            column = self._call(name, function, given)
            for sample, number in zip(samples, column):
                if number is not None and math.isnan(number):
                    raise _no_number(name, number, sample)
            columns.append([math.nan if number is None else number for number in column])
        return torch.tensor(columns).T.contiguous()

    def _call(self, name: str, function: Callable, given: dict[str, list]) -> list[float | None]:
        """The function's numbers, one a completion. Raises RewardError that names function and line."""
        where = f"reward_file: {self.path}: {name}"
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        wanted = given if takes_all else [each.name for each in parameters if each.name in given]
        own = {key: list(given[key]) for key in wanted}  # lists of its own: it may change them
        try:
            values = function(**own)
        except (Exception, SystemExit) as error:  # the user's program may raise anything
            line = _line_of(error, self.path)
            place = f" (line {line})" if line else ""
            raise RewardError(f"{where}{place}: {type(error).__name__}: {error}") from error
        try:
            if isinstance(values, str | dict | set):  # iterable, but their items are no numbers in order
                raise TypeError(f"it is a {type(values).__name__}")
            numbers = [None if value is None else float(value) for value in values]
        except Exception as error:  # a number too large for a float; what a generator of theirs raises
            found = _short(" ".join(repr(values).split()))  # the repr of a tensor has lines
            raise RewardError(f"{where} returned {found}, expected a list of numbers ({error})") from error
        found, wanted = f"{len(numbers)} numbers", len(given["completions"])
        if len(numbers) != wanted:
            raise RewardError(f"{where} returned {found} for {wanted} completions; return one for each")
        return numbers


def _reward_functions(path: Path, names: Sequence[str]) -> dict[str, Callable]:
    """The reward functions of this file, in the order of `names`, or of the file. Raises UserError."""
    module = _load_module(path)
    rewards = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__  # not imported
        and "completions" in inspect.signature(value).parameters
    }
    where = f"reward_file: {path}"
    refuse(not rewards, f"{where}: no function has a parameter `completions`, so there is no reward in it")
    for name in names:
        has = f"it has {', '.join(rewards)}"
        refuse(name not in rewards, f"reward_funcs: {path} has no reward function {name!r}; {has}")
    chosen = {name: rewards[name] for name in names} or rewards
    for name, function in chosen.items():
        waits = inspect.iscoroutinefunction(function)
        refuse(waits, f"{where}: {name} is async, but nothing waits for it; write `def {name}`")
        for parameter in inspect.signature(function).parameters.values():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            optional = parameter.default is not parameter.empty
            bundle = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            known = bundle or optional or (named and parameter.name in ARGUMENTS)
            can = f"a reward function can have {', '.join(ARGUMENTS)} and **others"
            refuse(not known, f"{where}: {name} has a parameter {parameter.name!r}; {can}")
    return chosen


def _load_module(path: Path) -> ModuleType:
    """Run the user's file, as an import would. Raises UserError naming file and line."""
    if not path.is_file():
        found = "this is a folder" if path.is_dir() else "file not found"
        what = "a Python file of reward functions (see data/rewards)"
        raise UserError(f"reward_file: {path}: {found}; name {what}")
    refuse(path.suffix != ".py", f"reward_file: {path}: expected a Python file (.py)")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as importlib's recipe: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's program may raise anything
        line = error.lineno if isinstance(error, SyntaxError) else _line_of(error, path)
        place = f":{line}" if line else ""
        raise UserError(f"reward_file: {path}{place}: {type(error).__name__}: {error}") from error
    return module


def _line_of(error: BaseException, path: Path) -> int | None:
    """The last line of this file that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)


class ModelReward(RewardSource):
    """A model with a value head (stage rm): the score of prompt and answer."""

    asks_model = True

    def __init__(self, model: Decoder, folders: Iterable[Path]):
        """The value head is that of the first of these folders which has one. Raises UserError."""
        self.model = model
        model.v_head = _read_head(model, list(folders))

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        return score_texts(self.model, _texts(samples))[:, None]


class AdapterReward(RewardSource):
    """An adapter and a value head of stage rm on the policy's own base, in use while answers are scored."""

    asks_model = True

    def __init__(self, policy: Decoder, folder: Path):
        """Raises UserError when the folder is no adapter of this base, or has no value head."""
        whole, remedy = full_modules(policy), "set reward_model_type=full, or train adapters alone"
        found = f"lora uses the policy's base, but {', '.join(whole[:1])} trains in full"
        refuse(whole, f"reward_model_type: {found}; {remedy}")
        self.policy, self.head = policy, _read_head(policy, [Path(folder)])
        file = read_adapter(folder, policy)
        self.whole = []  # (the policy's parameter, what the adapter has in its place) of what trained in full
        self.layers = {name: layer.base for name, layer in lora_layers(policy).items()}
        with _replaced(policy, self.layers):
            for module, parts in file.modules.items():
                for part in parts.keys() - ADAPTER_PARTS:
                    own = whole_parameter(policy, f"{module}.{part}", parts[part], file)
                    self.whole.append((own, parts[part].to(own.device, own.dtype, copy=True)))
                if parts.keys() & ADAPTER_PARTS:
                    layer = adapted_linear(policy, module, file, torch.float32, 0.0)
                    base = layer.base
                    layer.freeze_adapter(base.dtype if isinstance(base, QuantLinear) else base.weight.dtype)
                    self.layers[module] = layer.requires_grad_(False).eval()

    @torch.no_grad()
    def measure(self, samples: Sequence[Sample]) -> Tensor:
        kept, weights = self.policy.v_head, [parameter.data for parameter, _ in self.whole]
        try:
            self.policy.v_head = self.head
            for parameter, tensor in self.whole:
                parameter.data = tensor
            with _replaced(self.policy, self.layers):
                return score_texts(self.policy, _texts(samples))[:, None]
        finally:
            self.policy.v_head = kept
            for (parameter, _), data in zip(self.whole, weights):
                parameter.data = data


class ApiReward(RewardSource):
    """A server that scores texts; see the top of this file."""

    def __init__(self, address: str, tokenizer: Tokenizer, timeout_seconds: float, pause_seconds=API_PAUSE):
        self.address, self.tokenizer = address, tokenizer
        self.timeout_seconds, self.pause_seconds = timeout_seconds, pause_seconds

    def ask_once(self) -> None:
        """Have one short text scored, before the training depends on it. Raises RewardError."""
        self.scores([Sample("Hello", "", None, self.tokenizer.encode("Hello"), (), "stop")])

    def measure(self, samples: Sequence[Sample]) -> Tensor:
        messages = [self.tokenizer.decode(text, skip_special=False) for text in _texts(samples)]
        answer = self._ask(json.dumps({"model": "model", "messages": messages}).encode())
        where = f"reward_model: {self.address}"
        given = _short(answer.decode("utf-8", "replace"))
        try:
            scores = json_reader.parse(answer, "the answer", nan=True).get("scores")
            refuse(not isinstance(scores, list), "no list of scores")
            refuse({*map(type, scores)} - {int, float}, "a score that is no number")
        except UserError as error:
            expected = f'answered {given!r}, expected {{"scores": [number, ...]}} ({error})'
            raise RewardError(f"{where} {expected}") from error
        found, wanted = len(scores), len(samples)
        if found != wanted:
            raise RewardError(f"{where} gave {found} scores for {wanted} texts; give one for each")
        return torch.tensor(scores, dtype=torch.float32)[:, None]

    def _ask(self, body: bytes) -> bytes:
        """The body of the answer. Tries again after what may pass. Raises RewardError."""
        request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
        for number in range(API_TRIES):
            if number:
                time.sleep(self.pause_seconds * 2 ** (number - 1))
            try:
                return _answer(request, self.timeout_seconds)
            except urllib.error.HTTPError as error:
                problem = f"HTTP status {error.code} ({_short(' '.join(str(error.reason).split()))})"
                if error.code < 500:  # the request is wrong, and would be again
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = getattr(error, "reason", error)  # of a URLError, which wraps another
                if isinstance(problem, TimeoutError):
                    problem = f"no answer within {self.timeout_seconds:g} seconds (reward_api_timeout)"
        question = "does the server run, and is this where it scores?"
        raise RewardError(f"reward_model: {self.address}: {problem}; {question}")


def _answer(request: urllib.request.Request, seconds: float) -> bytes:
    """The body of the answer; TimeoutError where it is not there after so many seconds in all: the time limit
    of a socket begins anew with every byte, so a server that sends one now and then would not reach it."""
    result: Future[bytes] = Future()

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                body = answer.read(API_BYTES + 1)
            if len(body) > API_BYTES:
                raise http.client.HTTPException(f"an answer of more than {API_BYTES >> 20} MiB")
            result.set_result(body)
        except BaseException as error:  # for who waits
            result.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return result.result(seconds)


def _no_number(name: str, value: float, sample: Sample) -> RewardError:
    found = f"the reward ({name}) of an answer is {value}"
    return RewardError(f"{found}, expected a finite number; {_answer_of(sample)}")


def _answer_of(sample: Sample) -> str:
    return f"the answer is {_short(sample.completion)!r}, to {_short(sample.prompt)!r}"


def _texts(samples: Sequence[Sample]) -> list[list[int]]:
    return [[*sample.prompt_ids, *sample.completion_ids] for sample in samples]


def _read_head(model: Decoder, folders: Sequence[Path]) -> ValueHead:
    """The value head of the first of these folders that has one."""
    found = next((folder for folder in folders if has_value_head(folder)), None)
    if found is None:
        names = ", ".join(map(str, folders))
        raise UserError(f"reward_model: there is no value_head.safetensors in {names}; stage rm writes one")
    generator = torch.Generator()  # the start is overwritten: leave the global generator alone
    head = ValueHead(model.config.hidden_size, device_of(model), generator)
    load_value_head(head, found)
    return head.requires_grad_(False)


@contextmanager
def _replaced(model: Decoder, modules: dict[str, torch.nn.Module]) -> Iterator[None]:
    """Within it these modules stand in the place of the model's own."""
    own = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        replace_module(model, name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            replace_module(model, name, module)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

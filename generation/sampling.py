"""How the next token is chosen: options, samplers as pure functions on the device, numbers per sequence.

Sources: the definitions of transformers' logits processors, in their order; nucleus sampling arXiv
1904.09751, min-p arXiv 2407.01082, repetition penalty arXiv 1909.05858. Defaults are LLaMA-Factory's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from options.errors import refuse, require
from options.option import COMMON, option

CANDIDATES = 4  # times top_k: how many of the best logits are looked at before all of them are


@dataclass(frozen=True)
class GenerateOptions:
    do_sample: bool = option(True, "draw tokens at random; false = always the most likely one")
    temperature: float = option(0.95, "logits are divided by it; lower = more predictable", COMMON)
    top_p: float = option(0.7, "smallest set of tokens that holds this probability; 1 = off", COMMON)
    top_k: int = option(50, "only the k most likely tokens; 0 = off", COMMON)
    min_p: float = option(0.0, "only tokens at least this share as likely as the likeliest; 0 = off")
    repetition_penalty: float = option(1.0, "above 1: tokens that stand in the text get less likely; 1 = off")
    no_repeat_ngram_size: int = option(0, "no run of this many tokens comes twice; 0 = off")
    max_new_tokens: int = option(1024, "longest answer in tokens", COMMON, also="max_completion_length")
    stop: tuple[str, ...] = option((), "texts that end the answer; they are not shown")

    def __post_init__(self):
        if self.do_sample:
            way_out = "with do_sample=true; expected a number above 0 (or do_sample=false: the likeliest)"
            require(self, "temperature", lambda value: 0 < value < math.inf, way_out)
        require(self, "top_p", lambda share: 0 < share <= 1, "expected more than 0 and at most 1 (1 = off)")
        require(self, "top_k no_repeat_ngram_size", lambda count: count >= 0, "expected 0 (off) or more")
        require(self, "min_p", lambda share: 0 <= share <= 1, "expected 0 (off) to 1")
        above = "expected a number above 0 (1 = off)"
        require(self, "repetition_penalty", lambda value: 0 < value < math.inf, above)
        require(self, "max_new_tokens", lambda count: count >= 1, "expected 1 or more")
        refuse("" in self.stop, "stop: an empty text would end every answer before it begins")


# Samplers: logits (B, V) fp32 -> (B, V) fp32, excluded tokens at -inf. The input is not changed.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """seen (B, V) bool: stands in the text. Positive logits are divided, negative ones multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban_repeated_ngrams(logits: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """Exclude what would complete a run of `size` tokens that the text of its row holds already."""
    logits = logits.clone()
    for row, text in enumerate(texts):
        prefix = text[len(text) - size + 1 :]
        if len(text) >= size:
            ends = range(size - 1, len(text))
            banned = {text[end] for end in ends if text[end - size + 1 : end] == prefix}
            logits[row, sorted(banned)] = -math.inf
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exclude what is less likely than the k-th; tokens equal to the k-th all stay."""
    k = min(k, logits.shape[-1])
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Exclude the unlikely end whose probabilities add up to at most 1 - p; the likeliest always stays."""
    ordered, places = logits.sort(descending=False)
    excluded = ordered.softmax(-1).cumsum(-1) <= 1 - p
    excluded[:, -1] = False
    return logits.masked_fill(excluded.scatter(1, places, excluded), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude tokens less than p times as likely as the likeliest."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(-1, keepdim=True), -math.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row, (B,): where the row's number from [0, 1) falls in the cumulative distribution.

    uniforms: (B,) fp64. Summed in fp64: 150 thousand fp32 terms would leave out the unlikely end. Tokens at
    -inf are never drawn: they add nothing to the sum, and the largest number below 1 times the total rounds
    to less than it.
    """
    cumulative = logits.softmax(-1).double().cumsum(-1)  # (B, V)
    target = uniforms[:, None] * cumulative[:, -1:]
    # a row of NaN ends beyond the last token; whoever asks for it learns so from choose()
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def sample(logits: Tensor, options: GenerateOptions, uniforms: Tensor) -> Tensor:
    """logits (B, V) fp32, penalised -> (B,) tokens, drawn after temperature, top-k, top-p and min-p."""
    logits = logits / options.temperature
    logits, tokens = _candidates(logits, options.top_k)
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p:
        logits = keep_min_p(logits, options.min_p)
    chosen = draw(logits, uniforms)
    return chosen if tokens is None else tokens.gather(1, chosen[:, None])[:, 0]


def _candidates(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor | None]:
    """The best few logits and their tokens (B, n), if top-k keeps no other; else all of them and None.

    Sorting a few hundred numbers instead of the vocabulary is what makes top-p cheap. Equal logits at the
    k-th place all stay, so the few have to reach below it. That test would make a GPU wait, so there it is
    not made: of more than (CANDIDATES - 1) * k tokens that equal the k-th, some are left out.
    """
    count = CANDIDATES * top_k
    if not top_k or count >= logits.shape[-1]:
        return logits, None
    best, tokens = logits.topk(count)
    if logits.device.type != "cpu" or bool((best[:, -1] < best[:, top_k - 1]).all()):
        return best, tokens
    return logits, None


def choose(logits: Tensor, options: GenerateOptions, seen: Tensor | None, uniforms: Tensor | None) -> Tensor:
    """logits (B, V) fp32 -> (B,) tokens, -1 where the logits are not finite. No wait for a GPU.

    seen: (B, V) bool, tokens that stand in the text, for the repetition penalty; the chosen ones are noted in
    it. uniforms: (B,) fp64 from [0, 1) if do_sample.
    """
    best = logits.argmax(-1)
    is_finite = torch.isfinite(logits.gather(1, best[:, None]))[:, 0]
    if seen is not None:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
        best = logits.argmax(-1)
    tokens = sample(logits, options, uniforms) if options.do_sample else best
    if seen is not None:
        seen.scatter_(1, tokens[:, None], True)
    return torch.where(is_finite, tokens, -1)


class Draws:
    """Numbers from [0, 1) for several sequences. Number i of a sequence depends on its seed only."""

    BLOCK = 32  # numbers made at a time

    def __init__(self, seeds: list[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._numbers: list[list[float]] = [[] for _ in seeds]

    def rows(self, sequences: list[int], first: list[int], count: int) -> Tensor:
        """(count, B) fp64 on the CPU: for each of the B sequences `count` numbers from its first one on."""
        for sequence, start in zip(sequences, first):
            numbers, generator = self._numbers[sequence], self._generators[sequence]
            while len(numbers) < start + count:
                numbers += torch.rand(self.BLOCK, generator=generator, dtype=torch.float64).tolist()
        columns = [self._numbers[s][start : start + count] for s, start in zip(sequences, first)]
        return torch.tensor(columns, dtype=torch.float64).T.contiguous()

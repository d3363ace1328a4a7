"""Decoding: samplers as pure functions, and a loop over sequences of different lengths with a key/value cache.

A step feeds every live sequence what its cache does not hold yet: the whole prompt at first, then one token. So
prompts need no padding, a conversation that goes on re-uses the cache of its beginning, and there is one code path.
Every sampled sequence has a random generator of its own, so its text does not depend on its neighbours in the batch.

    completions = generate(model, [ids], GenerateOptions(do_sample=False), stop_ids=tokenizer.stop_ids)
    for piece in TextStream(model, tokenizer, ids, options, stop_ids=tokenizer.stop_ids): print(piece, end="")

Sources: the definitions of transformers' logits processors, in their order; nucleus sampling arXiv 1904.09751, min-p
arXiv 2407.01082, repetition penalty arXiv 1909.05858. Defaults are LLaMA-Factory's.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from architectures import ModelConfig
from model import Decoder, KVCache

FIRST_ROOM = 256  # tokens a new cache holds beyond the prompt; it grows from there
CANDIDATES = 4  # times top_k: how many of the best logits are looked at before all of them are


@dataclass(frozen=True)
class GenerateOptions:
    do_sample: Annotated[bool, "draw tokens at random; false = always the most likely one"] = True
    temperature: Annotated[float, "logits are divided by it; lower = more predictable"] = 0.95
    top_p: Annotated[float, "smallest set of tokens that holds this probability; 1 = off"] = 0.7
    top_k: Annotated[int, "only the k most likely tokens; 0 = off"] = 50
    min_p: Annotated[float, "only tokens at least this share as likely as the likeliest; 0 = off"] = 0.0
    repetition_penalty: Annotated[float, "above 1: tokens that stand in the text get less likely; 1 = off"] = 1.0
    no_repeat_ngram_size: Annotated[int, "no run of this many tokens comes twice; 0 = off"] = 0
    max_new_tokens: Annotated[int, "longest answer in tokens"] = 1024
    stop: Annotated[tuple[str, ...], "texts that end the answer; they are not shown"] = ()

    def __post_init__(self):
        if self.do_sample and not (0 < self.temperature < math.inf):
            raise ValueError(
                f"temperature: {self.temperature} with do_sample=true; expected a number above 0 "
                "(for the most likely token always, set do_sample=false)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; expected more than 0 and at most 1 (1 = off)")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}; expected 0 (off) or more")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p: {self.min_p}; expected 0 (off) to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty: {self.repetition_penalty}; expected a number above 0 (1 = off)")
        if self.no_repeat_ngram_size < 0:
            raise ValueError(f"no_repeat_ngram_size: {self.no_repeat_ngram_size}; expected 0 (off) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}; expected 1 or more")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer before it begins")


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the new tokens; the stop token is the last one if it ended the text
    finish_reason: str  # "stop" or "length"
    text: str | None = None  # without the stop word; only if a tokenizer was given


def generate(
    model: Decoder,
    prompts: list[list[int]],
    options: GenerateOptions,
    *,
    stop_ids: Iterable[int],
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    tokenizer=None,
) -> list[Completion]:
    """Continue every prompt; the prompts may differ in length.

    stop_ids: tokens that end a text.  generator: on the CPU; gives each sequence its seed (None = torch's global one).
    on_token(sequence, token) is called for every new token; returning True ends that sequence. tokenizer: needed for
    options.stop; fills Completion.text.  Raises ValueError for prompts that are empty or too long for the model.
    """
    if tokenizer is None and options.stop:
        raise ValueError("stop: stop words are found in the text; give generate() the tokenizer")
    more_ids, words = split_stop_words(tokenizer, options.stop) if options.stop else ((), ())
    decoding = Decoding(model, prompts, options, stop_ids=(*stop_ids, *more_ids), generator=generator)
    writers = None if tokenizer is None else [TextWriter(tokenizer, words) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]
    while decoding.live:
        for sequence, token in decoding.step():
            if writers is not None:
                pieces[sequence].append(writers[sequence].push(token))
                if writers[sequence].stopped:
                    decoding.stop(sequence)
            if on_token is not None and on_token(sequence, token):
                decoding.stop(sequence)
    if writers is None:
        return [decoding.completion(sequence) for sequence in range(len(prompts))]
    texts = ["".join(parts) + writer.flush() for parts, writer in zip(pieces, writers)]
    return [decoding.completion(sequence, text) for sequence, text in enumerate(texts)]


# Samplers: logits (B, V) fp32 -> (B, V) fp32, excluded tokens at -inf. The input is not changed.


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """seen (B, V) bool: the token stands in the text. Positive logits are divided, negative ones multiplied."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban_repeated_ngrams(logits: Tensor, texts: list[list[int]], size: int) -> Tensor:
    """Exclude every token that would complete a run of `size` tokens that the text of its row holds already."""
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
    """Exclude the unlikely end whose probabilities add up to at most 1 - p; the likeliest token always stays."""
    ordered, places = logits.sort(descending=False)
    excluded = ordered.softmax(-1).cumsum(-1) <= 1 - p
    excluded[:, -1] = False
    return logits.masked_fill(excluded.scatter(1, places, excluded), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude tokens less than p times as likely as the likeliest."""
    probability = logits.softmax(-1)
    return logits.masked_fill(probability < p * probability.amax(-1, keepdim=True), -math.inf)


def draw(logits: Tensor, uniforms: list[float]) -> Tensor:
    """One token per row, (B,): where the row's number from [0, 1) falls in the cumulative distribution.

    Summed in fp64: 150 thousand fp32 terms would leave out the unlikely end. Tokens at -inf are never drawn: they add
    nothing to the sum, and the largest number below 1 times the total rounds to less than the total.
    """
    cumulative = logits.softmax(-1).double().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    target = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None] * total
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def sample(logits: Tensor, options: GenerateOptions, uniforms: list[float]) -> Tensor:
    """logits (B, V) fp32, already penalised -> (B,) tokens, drawn after temperature, top-k, top-p and min-p."""
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
    """The best few logits and their tokens (B, n), if top-k surely keeps no other; else all of them and None.

    Sorting a few hundred numbers instead of the vocabulary is what makes top-p cheap. Equal logits at the k-th place
    all stay, so the few have to reach below it. Only on a CPU: the test would make a GPU wait.
    """
    count = CANDIDATES * top_k
    if not top_k or count >= logits.shape[-1] or logits.device.type != "cpu":
        return logits, None
    best, tokens = logits.topk(count)
    if bool((best[:, -1] < best[:, top_k - 1]).all()):
        return best, tokens
    return logits, None


# The loop


class Decoding:
    """Sequences that are decoded together. Call step() while there are `live` ones.

    texts    per sequence: prompt and new tokens
    live     numbers of the unfinished sequences, in the order of the cache's rows
    cache    may be given, with one row per prompt that already holds the beginning of it (`cache.lengths` tokens)
    """

    def __init__(
        self,
        model: Decoder,
        prompts: list[list[int]],
        options: GenerateOptions,
        *,
        stop_ids: Iterable[int],
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
    ):
        if model.training:
            raise ValueError("the model is in training mode, so dropout would disturb the text; call model.eval()")
        limit = context_limit(model.config)
        for number, prompt in enumerate(prompts):
            _check_prompt(number, prompt, model.config.vocab_size, limit)
        self.model, self.options = model, options
        self.stop_ids = frozenset(stop_ids)
        self.texts = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.ends = [min(len(prompt) + options.max_new_tokens, limit) for prompt in prompts]  # tokens
        self.live = list(range(len(prompts)))
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        self.device = model.embed_tokens.weight.device
        if cache is None and prompts:
            room = max(self.prompt_lengths) + min(options.max_new_tokens, FIRST_ROOM)
            cache = new_cache(model, len(prompts), room)
        self.cache = cache
        seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist() if options.do_sample else []
        self.randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.seen = None
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=self.device)] = True

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One new token for every live sequence: (sequence, token) pairs. Finished ones leave `live`."""
        logits = self._next_logits()  # (B, V)
        tokens = self._choose(logits).tolist()
        chosen = list(zip(self.live, tokens))
        for sequence, token in chosen:
            self.texts[sequence].append(token)
            if self.seen is not None:
                self.seen[sequence, token] = True
            if token in self.stop_ids:
                self.stop(sequence)
            elif len(self.texts[sequence]) >= self.ends[sequence]:
                self.stop(sequence, "length")
        return chosen

    def stop(self, sequence: int, reason: str = "stop") -> None:
        """End this sequence; the first reason stays."""
        if sequence not in self.live:
            if reason == "stop" and self.finish_reasons[sequence] == "length":
                self.finish_reasons[sequence] = reason  # a stop word completed by the last token that had room
            return
        self.finish_reasons[sequence] = reason
        place = self.live.index(sequence)
        last = self.live.pop()
        if self.live:  # the last one's cache stays as it is: a conversation may go on from it
            self.cache.drop(place)
        if place < len(self.live):
            self.live[place] = last  # as the cache does

    def completion(self, sequence: int, text: str | None = None) -> Completion:
        new = self.texts[sequence][self.prompt_lengths[sequence] :]
        return Completion(new, self.finish_reasons[sequence] or "stop", text)

    def _next_logits(self) -> Tensor:
        """Feed what the cache lacks; logits (B, V) fp32 after the last token of every live sequence."""
        cache = self.cache
        texts = [self.texts[sequence] for sequence in self.live]
        cache.reserve(max(len(text) for text in texts))
        tokens, positions, borders = [], [], [0]
        for filled, text in zip(cache.lengths, texts):
            tokens += text[filled:]
            positions += range(filled, len(text))
            borders.append(len(tokens))
        hidden = self.model(
            torch.tensor(tokens, device=self.device),
            torch.tensor(positions, dtype=torch.int32, device=self.device),
            torch.tensor(borders, dtype=torch.int32, device=self.device),
            max(stop - start for start, stop in zip(borders, borders[1:])),
            cache,
        )  # (T, E)
        if len(tokens) > len(texts):
            hidden = hidden[torch.tensor(borders[1:], device=self.device) - 1]  # (B, E)
        return self.model.logits(hidden).float()

    def _choose(self, logits: Tensor) -> Tensor:
        """logits (B, V) -> (B,) tokens."""
        options = self.options
        best = logits.argmax(-1)
        if not torch.isfinite(logits.gather(1, best[:, None])).all():
            raise ValueError(
                "the model's logits are not finite numbers; its weights are damaged, or too large for float16 "
                "(then set infer_dtype=bfloat16 or float32)"
            )
        if self.seen is not None:
            logits = penalize_repetition(logits, self.seen[self.live], options.repetition_penalty)
        if options.no_repeat_ngram_size:
            texts = [self.texts[sequence] for sequence in self.live]
            logits = ban_repeated_ngrams(logits, texts, options.no_repeat_ngram_size)
        if not options.do_sample:
            return logits.argmax(-1)
        uniforms = [_uniform(self.randoms[sequence]) for sequence in self.live]
        return sample(logits, options, uniforms)


def context_limit(config: ModelConfig) -> int:
    """Tokens of text the model takes. The dynamic rope kind stretches beyond the length it names, up to its factor."""
    if config.rope.kind == "dynamic":
        return int(config.max_positions * config.rope.factor)
    return config.max_positions


def new_cache(model: Decoder, sequences: int, capacity: int) -> KVCache:
    weight = model.embed_tokens.weight
    return KVCache(model.config, sequences, capacity, model.compute_dtype or weight.dtype, weight.device)


def _uniform(random: torch.Generator) -> float:
    return torch.rand((), generator=random, dtype=torch.float64).item()


def _check_prompt(number: int, prompt: list[int], vocab_size: int, limit: int) -> None:
    if not prompt:
        raise ValueError(f"prompt {number} has no token; begin with the tokenizer's bos token")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(
            f"prompt {number} holds token {max(prompt)}, but the model has {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    if len(prompt) >= limit:
        raise ValueError(
            f"prompt {number} has {len(prompt)} tokens, but the model takes {limit} with the answer; "
            "shorten it, or stretch the model with rope_scaling"
        )


# Text


def split_stop_words(tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop words -> (stop tokens, words to look for in the text). A word that is one special token becomes that token,
    since decoding leaves special tokens out."""
    ids, texts = [], []
    for word in words:
        token = tokenizer.token_id(word)
        if token is not None and token in tokenizer.special_ids:
            ids.append(token)
        else:
            texts.append(word)
    return tuple(dict.fromkeys(ids)), tuple(texts)


class TextWriter:
    """Tokens in, text out, never half a character and never a part of a stop word.

    Text that could be the beginning of a stop word is held back until it is known. After a stop word, `stopped` is true
    and nothing more comes out.
    """

    def __init__(self, tokenizer, stop_words: Iterable[str] = ()):
        self._decoder = tokenizer.stream()
        self._words = tuple(stop_words)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text = self._release(self._decoder.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in map(text.find, self._words) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text that begins the word."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if word.startswith(text[len(text) - size :])), 0)


class TextStream:
    """One answer as text while it is generated: iterate over the pieces, then look at `ids` and `finish_reason`.

    cache: a cache of one sequence that holds the beginning of the prompt, or None. `cached_ids` are the tokens it holds
    afterwards, also when the iteration was left early (Ctrl-C).
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer,
        prompt: list[int],
        options: GenerateOptions,
        *,
        stop_ids: Iterable[int],
        generator: torch.Generator | None = None,
        cache: KVCache | None = None,
    ):
        more_ids, words = split_stop_words(tokenizer, options.stop)
        self._writer = TextWriter(tokenizer, words)
        ids = (*stop_ids, *more_ids)
        self.decoding = Decoding(model, [prompt], options, stop_ids=ids, generator=generator, cache=cache)

    def __iter__(self) -> Iterator[str]:
        while self.decoding.live:
            ((_, token),) = self.decoding.step()
            piece = self._writer.push(token)
            if self._writer.stopped:
                self.decoding.stop(0)
            if piece:
                yield piece
        rest = self._writer.flush()
        if rest:
            yield rest

    @property
    def ids(self) -> list[int]:
        return self.decoding.completion(0).ids

    @property
    def finish_reason(self) -> str:
        return self.decoding.completion(0).finish_reason

    @property
    def cached_ids(self) -> list[int]:
        return self.decoding.texts[0][: self.decoding.cache.lengths[0]]

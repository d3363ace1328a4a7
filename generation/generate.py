"""Decoding: a loop over sequences of different lengths with a key/value cache, and the text that comes out.

A step feeds every live sequence what its cache does not hold yet: the whole prompt at first, then one token.
So prompts need no padding, and a conversation that goes on re-uses the cache of its beginning. On a GPU the
steps of one token each run ahead of the host, at fixed shapes (cuda_graph.py). Every sampled sequence has a
random generator of its own, so its text does not depend on its neighbours in the batch.

    completions = generate(model, [ids], GenerateOptions(do_sample=False), stop_ids=tokenizer.stop_ids)
    for piece in TextStream(model, tokenizer, ids, options, stop_ids=tokenizer.stop_ids): print(piece, end="")
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from architectures.config import ModelConfig
from generation.cache import KVCache
from generation.cuda_graph import AHEAD, TokenSteps
from generation.sampling import Draws, GenerateOptions, ban_repeated_ngrams, choose
from model import Decoder
from options.errors import UserError, refuse

FIRST_ROOM = 256  # tokens a new cache holds beyond the prompt; it grows from there
FIRST_SURROGATE = 0xD800  # of the 2,048 code points that are no characters
GRAPH_PAYS = 16  # tokens: capturing a step takes about as long as some steps


@dataclass(frozen=True)
class Completion:
    ids: list[int]  # the new tokens; the stop token is the last one if it ended the text
    finish_reason: str  # "stop" or "length"
    text: str | None = None  # without the stop word; only if a tokenizer was given


def generate(
    model: Decoder, prompts, options: GenerateOptions, *, stop_ids, on_token=None, tokenizer=None, **more
) -> list[Completion]:
    """Continue every prompt; prompts [[int]] may differ in length.

    stop_ids: tokens that end a text. on_token(sequence, token) is called for every new token; returning True
    ends that sequence. tokenizer: needed for options.stop; fills Completion.text. more: generator, seeds and
    cache, see Decoding. Raises UserError for prompts that are empty or too long for the model.
    """
    if tokenizer is None and options.stop:
        raise ValueError("stop: stop words are found in the text; give generate() the tokenizer")
    more_ids, words = split_stop_words(tokenizer, options.stop) if options.stop else ((), ())
    decoding = Decoding(model, prompts, options, stop_ids=(*stop_ids, *more_ids), **more)
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


# The loop


class Decoding:
    """Sequences that are decoded together. Call step() while there are `live` ones.

    texts          per sequence: prompt and new tokens
    rows           the sequence of each of the cache's rows; a finished one leaves when rows are moved anyway
    generator      torch.Generator on the CPU; gives each sequence its seed (None = torch's global one)
    seeds          of the sequences, [int], in place of a generator
    cache          may be given: a row per prompt that holds the beginning of it (`cache.lengths` tokens), or
                   none after restart(); on a GPU it also keeps the steps that were captured for it, so give
                   it up when layers of the model are replaced or adapters switched
    fixed_shapes   take cuda_graph.py for steps of one token; None = on a GPU
    """

    def __init__(
        self, model, prompts, options, *, stop_ids, generator=None, seeds=None, cache=None, fixed_shapes=None
    ):
        if model.training:
            raise ValueError("the model is in training mode: dropout would disturb the text; call eval()")
        limit = context_limit(model.config)
        for number, prompt in enumerate(prompts):
            _check_prompt(number, prompt, model.config)
        self.model, self.options = model, options
        self.stop_ids = frozenset(stop_ids)
        self.texts = [list(prompt) for prompt in prompts]
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.ends = [min(len(prompt) + options.max_new_tokens, limit) for prompt in prompts]  # tokens
        self.rows = list(range(len(prompts)))
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        self.device = model.embed_tokens.weight.device
        if cache is None and prompts:
            room = max(self.prompt_lengths) + min(options.max_new_tokens, FIRST_ROOM)
            cache = new_cache(model, len(prompts), room)
        self.cache = cache
        self.world = getattr(model, "world", None)  # of a model that ranks share (parallel/fsdp.py)
        if fixed_shapes is None:  # a graph holds no sums over ranks, nor the engine's streams
            fixed_shapes = self.device.type == "cuda" and self.world is None
        self.fixed_shapes = fixed_shapes and not options.no_repeat_ngram_size  # which reads texts on the host
        self.steps: TokenSteps | None = None
        self.draws = None
        if options.do_sample:
            if seeds is None:
                seeds = torch.randint(2**62, (len(prompts),), generator=generator).tolist()
            self.draws = Draws(seeds)
        self.seen = None  # (rows, V)
        if options.repetition_penalty != 1:
            size = len(prompts), model.config.vocab_size
            self.seen = torch.zeros(size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(prompts):
                self.seen[row, torch.tensor(prompt, device=self.device)] = True

    @property
    def live(self) -> list[int]:
        """Numbers of the unfinished sequences, in the order of the cache's rows."""
        return [sequence for sequence in self.rows if self.finish_reasons[sequence] is None]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One new token for every live sequence: (sequence, token) pairs. Finished ones leave `live`."""
        # a step of fixed shapes brings one token each; the first step brings the prompts
        one_each = self.steps is not None or all(len(self.texts[s]) - n == 1 for s, n in self._filled())
        tokens = self._fixed_step() if self.fixed_shapes and one_each else self._ordinary_step()
        chosen = [(s, token) for s, token in zip(self.rows, tokens) if self.finish_reasons[s] is None]
        if any(token < 0 for _, token in chosen):
            why = "its weights are damaged, or too large for float16 (set infer_dtype=bfloat16 or float32)"
            raise UserError(f"the model's logits are not finite numbers; {why}")
        for sequence, token in chosen:
            self.texts[sequence].append(token)
            if token in self.stop_ids:
                self.stop(sequence)
            elif len(self.texts[sequence]) >= self.ends[sequence]:
                self.stop(sequence, "length")
        return chosen

    def stop(self, sequence: int, reason: str = "stop") -> None:
        """End this sequence; the first reason stays."""
        before = self.finish_reasons[sequence]
        if before is None and self.steps is not None:
            self.steps.cache.retire(self.rows.index(sequence))
        # a stop word may be completed by the last token that had room
        if before is None or (before, reason) == ("length", "stop"):
            self.finish_reasons[sequence] = reason

    def completion(self, sequence: int, text: str | None = None) -> Completion:
        new = self.texts[sequence][self.prompt_lengths[sequence] :]
        return Completion(new, self.finish_reasons[sequence] or "stop", text)

    def _filled(self) -> list[tuple[int, int]]:
        """(sequence, tokens that the cache holds of it) for the live ones."""
        return [(s, n) for s, n in zip(self.rows, self.cache.lengths) if self.finish_reasons[s] is None]

    def _make_room(self) -> None:
        """Only live rows, and space for what they do not hold yet."""
        for row in reversed(range(len(self.rows))):
            if self.finish_reasons[self.rows[row]] is None:
                continue
            self.cache.drop(row)  # the last row takes its place, here as there
            self.rows[row] = self.rows[-1]
            self.rows.pop()
            if self.seen is not None:
                self.seen[row] = self.seen[-1].clone()
                self.seen = self.seen[:-1]
        self.cache.reserve(max(len(self.texts[sequence]) for sequence in self.rows))

    def _ordinary_step(self) -> list[int]:
        """Feed what the cache lacks; one token per row."""
        self._make_room()
        texts = [self.texts[sequence] for sequence in self.rows]
        tokens, positions, borders = [], [], [0]
        for filled, text in zip(self.cache.lengths, texts):
            tokens += text[filled:]
            positions += range(filled, len(text))
            borders.append(len(tokens))
        longest = max(stop - start for start, stop in zip(borders, borders[1:]))
        ends = torch.tensor(borders, dtype=torch.int32, device=self.device)
        positions = torch.tensor(positions, dtype=torch.int32, device=self.device)
        row = torch.tensor(tokens, device=self.device), positions, ends, longest, self.cache
        hidden = self.model(*row)  # (T, E)
        if len(tokens) > len(texts):
            hidden = hidden[ends[1:] - 1]  # (B, E)
        logits = self.model.logits(hidden).float()  # (B, V)
        if self.options.no_repeat_ngram_size:
            logits = ban_repeated_ngrams(logits, texts, self.options.no_repeat_ngram_size)
        uniforms = None if self.draws is None else self._uniforms(self.rows)(0, 1)[0].to(self.device)
        chosen = choose(logits, self.options, self.seen, uniforms)
        # ranks with the same texts round differently, and one other token would part them for ever
        return (chosen if self.world is None else self.world.as_first(chosen)).tolist()

    def _fixed_step(self) -> list[int]:
        """The next token of every row, of several steps that are on their way."""
        allowed = self._steps_allowed()
        if self.steps is None or (allowed == 0 and self.steps.waiting == 0):
            self._make_room()
            self._begin_steps()
            allowed = self._steps_allowed()
        for _ in range(allowed - self.steps.waiting):
            self.steps.launch()
        tokens = self.steps.read()
        grown = (self.finish_reasons[sequence] is None for sequence in self.rows)
        self.cache.lengths = [filled + one for filled, one in zip(self.cache.lengths, grown)]
        return tokens

    def _begin_steps(self) -> None:
        """Steps of fixed shapes for the rows there are; those that the cache kept, if they fit."""
        kept, count = self.cache.kept, len(self.rows)
        if count not in kept or kept[count].model is not self.model:
            kept[count] = TokenSteps(self.model, self.cache)
        self.steps, seen = kept[count], self.seen
        wanted = max(self.ends[sequence] - len(self.texts[sequence]) for sequence in self.rows)
        draws = None if self.draws is None else self._uniforms(list(self.rows))
        how = {"draws": draws, "capture": wanted >= GRAPH_PAYS}
        last, lengths = [self.texts[sequence][-1] for sequence in self.rows], self.cache.lengths
        self.steps.begin(last, lengths, lambda logits, u: choose(logits, self.options, seen, u), **how)

    def _steps_allowed(self) -> int:
        """Steps that may be on their way; 0 = read those, then begin anew with fewer rows or more room."""
        filled = self._filled()
        if 2 * len(filled) <= len(self.rows):
            return 0
        wanted = max(self.ends[sequence] - len(self.texts[sequence]) for sequence, _ in filled)
        return min(AHEAD, wanted, self.cache.capacity - max(n for _, n in filled))

    def _uniforms(self, rows: list[int]) -> Callable[[int, int], Tensor]:
        """draws(first, count) for these sequences, counted from the next token on."""
        begin = [len(self.texts[sequence]) - self.prompt_lengths[sequence] for sequence in rows]
        return lambda first, count: self.draws.rows(rows, [start + first for start in begin], count)


def context_limit(config: ModelConfig) -> int:
    """Tokens of text the model takes, prompt and answer together."""
    return config.max_positions


def new_cache(model: Decoder, sequences: int, capacity: int) -> KVCache:
    device = model.embed_tokens.weight.device
    return KVCache(model.config, sequences, capacity, model.compute_dtype, device)


def _check_prompt(number: int, prompt: list[int], config: ModelConfig) -> None:
    refuse(not prompt, f"prompt {number} has no token; begin with the tokenizer's bos token")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        found = f"prompt {number} holds token {max(prompt)}, but the model has {config.vocab_size}"
        raise UserError(f"{found}; the tokenizer belongs to another model")
    if len(prompt) >= context_limit(config):
        found = f"prompt {number} has {len(prompt)} tokens, but the model takes {context_limit(config)}"
        way_out = ", or stretch the model with rope_scaling" if config.rope.kind == "none" else ""
        raise UserError(f"{found} with the answer; shorten it{way_out}")


# Text


def split_stop_words(tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop words -> (stop tokens, words to look for in the text). A word that is one special token becomes
    that token, since decoding leaves special tokens out."""
    tokens = {word: tokenizer.token_id(word) for word in words}
    special = {word: token for word, token in tokens.items() if token in tokenizer.special_ids}
    return tuple(dict.fromkeys(special.values())), tuple(word for word in tokens if word not in special)


class TextWriter:
    """Tokens in, text out, never half a character and never a part of a stop word.

    Text that could be the beginning of a stop word is held back until it is known. After a stop word,
    `stopped` is true and nothing more comes out. A special token within a stop word is found as the token,
    which the text does not show, and as its letters.
    """

    def __init__(self, tokenizer, stop_words: Iterable[str] = ()):
        self._decoder, words = tokenizer.stream(), tuple(stop_words)
        hidden = {token: tokenizer.token(token) for token in self._decoder.skipped if words}
        within = [token for token, text in hidden.items() if any(text in word for word in words)]
        # a lone surrogate, which no decoder gives, stands for each of them; the longest are replaced first
        within.sort(key=lambda token: -len(hidden[token]))
        self._marks = {token: chr(FIRST_SURROGATE + number) for number, token in enumerate(within)}
        marked = words
        for token, mark in self._marks.items():
            marked = tuple(word.replace(hidden[token], mark) for word in marked)
        self._words = tuple(dict.fromkeys(words + marked))
        # any other one that is not shown ends a word, as in transformers' stop_strings: it is in none
        self._marks = dict.fromkeys(hidden, chr(FIRST_SURROGATE + len(within))) | self._marks
        self._shown = str.maketrans(dict.fromkeys(self._marks.values()))
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        if mark := self._marks.get(token):  # behind the text before it, of which SentencePiece's bytes wait
            return self._release(self._decoder.settle() + mark)
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text = self._release(self._decoder.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest.translate(self._shown)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in map(text.find, self._words) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)].translate(self._shown)
        keep = max((_overlap(text, word) for word in self._words), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep].translate(self._shown)


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of the text that begins the word."""
    longest = min(len(text), len(word) - 1)
    return next((size for size in range(longest, 0, -1) if word.startswith(text[len(text) - size :])), 0)


class TextStream:
    """One answer as text while it is generated: iterate over the pieces, then look at `ids` and
    `finish_reason`. more: generator and cache, see Decoding.

    `cached_ids` are the tokens that the cache holds afterwards, also when the iteration was left early
    (Ctrl-C).
    """

    def __init__(self, model: Decoder, tokenizer, prompt: list[int], options, *, stop_ids, **more):
        more_ids, words = split_stop_words(tokenizer, options.stop)
        self._writer = TextWriter(tokenizer, words)
        self.decoding = Decoding(model, [prompt], options, stop_ids=(*stop_ids, *more_ids), **more)

    def __iter__(self) -> Iterator[str]:
        while self.decoding.live:
            ((_, token),) = self.decoding.step()
            piece = self._writer.push(token)
            if self._writer.stopped:
                self.decoding.stop(0)
            if piece:
                yield piece
        if rest := self._writer.flush():
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

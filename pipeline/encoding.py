"""One row -> tokens and a mask of what is trained; many rows -> chunks, in this process or in several.

dialogue (sft): the template renders the conversation into spans, the tokenizer encodes them part by part, the
answers' tokens are trained. document (pt): text + eos, cut into pieces of cutoff_len. pair (rm, dpo, orpo):
prompt + chosen, prompt + rejected, two segments of one example; only these last answers are trained. rated
(kto): prompt + answer and a tag. prompt (ppo, grpo): what chat.py would give the model, and the row's answer
as label behind it. What is longer than cutoff_len is cut as cutting.py says, but a prompt for generation
never is: a longer one is dropped.
"""

import contextlib
import multiprocessing
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from options.errors import located
from options.limits import serve_parent
from pipeline import cutting
from pipeline.batch import ANSWER, ROLES, Example
from pipeline.formats import Conversation, Dropped, to_conversation, to_document, to_pair, to_prompt, to_rated
from pipeline.sources import DatasetInfo, Row
from pipeline.store import Tally, TokenArrays
from templates import TEMPLATES
from text.render import Message, Span, encode_dialogue, unused

CHUNK_ROWS = 256  # rows handed to a worker at once: a fraction of a second of work
STREAM_ROWS = 32  # of a stream, for each worker, that are tokenised before they are asked for
PARALLEL_CHUNKS = 16  # less work than this is done here: starting processes would take longer
ROLE_NUMBER = {role: number for number, role in enumerate(ROLES)}


@dataclass(frozen=True)
class EncodeOptions:
    """What decides the tokens of a row, apart from row, template and tokenizer. Part of the cache key."""

    kind: str  # of examples, one of formats.KINDS' values
    cutoff_len: int
    truncation_strategy: str = "ratio"
    reserved_label_len: int = 1
    train_on_prompt: bool = False
    mask_history: bool = False
    enable_thinking: bool | None = None


class ChunkEncoder:
    """Rows of one data set -> TokenArrays. Can be pickled, so that worker processes hold a copy."""

    def __init__(self, info: DatasetInfo, part: int, template, tokenizer, options: EncodeOptions):
        self.info, self.part, self.options = info, part, options
        self.template, self.tokenizer = template, tokenizer
        self.unused: list[str] = []  # what the template left out of the row at hand

    def __call__(self, rows: list[Row]) -> TokenArrays:
        tally, examples = Tally(), []
        for row in rows:
            examples += self.encode(row, tally)
        return TokenArrays.join(examples, tally)

    def encode(self, row: Row, tally: Tally) -> list[Example]:
        """The examples of one row, [] when it is dropped. Errors name data set, place, row and column."""
        number, place, columns = row
        self.unused = []
        place = f"{place} (row {number})"  # an array of objects may stand on one line
        tally.read += 1
        try:
            with located(f"dataset {self.info.name!r}: {place}"):
                examples, cut, notes = self._encode(number, columns)
        except Dropped as reason:
            tally.drop(str(reason), f"{place}, {reason.detail}" if reason.detail else place)
            return []
        except Exception as error:  # a bug: it keeps its traceback, which then names the row
            error.add_note(f"dataset {self.info.name!r}: {place} (row {number})")
            raise
        for note in dict.fromkeys((*notes, *self.unused)):
            tally.note(note, place)
        tally.used += 1
        tally.cut += cut > 0
        tally.tokens_cut += cut
        for example in examples:
            tally.examples += 1
            tally.tokens += len(example)
            tally.tokens_trained += 0 if self.options.kind == "prompt" else int(example.trained.sum())
            tally.desirable += example.tag
            tally.longest = max(tally.longest, len(example))
        return examples

    def _encode(self, number: int, columns: dict) -> tuple[list[Example], int, tuple[str, ...]]:
        """(examples, tokens cut, notes) of one row."""
        kind, info = self.options.kind, self.info
        if kind == "document":
            return self._document(number, to_document(columns, info)), 0, ()
        if kind == "prompt":
            conversation, answer = to_prompt(columns, info)
            example, notes = self._prompt(number, conversation, answer)
            return [example], 0, (*conversation.notes, *notes)
        if kind == "dialogue":
            conversation = to_conversation(columns, info)
            example, cut, in_prompt = self._dialogue(number, conversation)
        elif kind == "pair":
            conversation, *answers = to_pair(columns, info)
            example, cut, in_prompt = self._answers(number, conversation, answers, 0)
        else:
            conversation, answer, tag = to_rated(columns, info)
            example, cut, in_prompt = self._answers(number, conversation, [answer], tag)
        notes = ("cut in the prompt",) if in_prompt else ()
        return [example], cut, (*conversation.notes, *notes)

    def _document(self, number: int, text: str) -> list[Example]:
        ids = list(self.tokenizer.encode(text, add_special=True))
        if self.tokenizer.eos_id is not None and ids[-1:] != [self.tokenizer.eos_id]:
            ids.append(self.tokenizer.eos_id)
        if len(ids) < 2:
            raise Dropped("no trained token")
        examples, tokens = [], np.array(ids, np.int32)
        for start, end in cutting.pieces(len(ids), self.options.cutoff_len):
            trained = np.arange(end - start) > 0  # nothing stands before the first one that could predict it
            turns = np.zeros(end - start, np.int16)
            roles = np.full(end - start, ROLE_NUMBER["text"] + ANSWER, np.uint8)
            examples.append(Example(tokens[start:end], trained, turns, roles, (self.part, number)))
        return examples

    def _spans(self, conversation: Conversation, *answer: Message, prompt: bool = False) -> list[Span]:
        turns, tools = [*conversation.turns, *answer], list(conversation.tools) or None
        own, tokenizer = conversation.variables, self.tokenizer
        how = {"variables": tokenizer.special_tokens | own, "generation_prompt": prompt, "tools": tools}
        how["enable_thinking"] = own.get("enable_thinking", self.options.enable_thinking)
        spans = self.template.render(turns, tokenizer.bos_token, tokenizer.eos_token, **how)
        self.unused += unused(self.template, turns, spans, own)
        return spans

    def _render(self, conversation: Conversation, *answer: Message, prompt: bool = False) -> list[np.ndarray]:
        """tokens, produced, turns, roles, each (n,). prompt: up to where an answer begins."""
        spans = self._spans(conversation, *answer, prompt=prompt)
        ids, produced, counts, _ = encode_dialogue(self.tokenizer, spans)
        produced = np.array(produced, bool)
        turns = np.repeat(np.array([span.turn for span in spans], np.int16), counts)
        roles = np.repeat(np.array([ROLE_NUMBER.get(span.role, 0) for span in spans], np.uint8), counts)
        return [np.array(ids, np.int32), produced, turns, roles + produced * np.uint8(ANSWER)]

    def _prompt(self, number, conversation: Conversation, answer: Message | None) -> tuple[Example, tuple]:
        """What generation is given, as chat.py gives it; behind it the row's own answer as the label, if it
        has one: its text alone, not what the template puts around it; for comparing, never for reading."""
        tokens, _, turns, roles = self._render(conversation, prompt=True)
        if len(tokens) > self.options.cutoff_len:
            raise Dropped("prompt longer than cutoff_len", f"which has {len(tokens)} tokens")
        text = "" if answer is None else self._label(conversation, answer)
        label = np.array(self.tokenizer.encode(text) if text else [], np.int32)
        notes = ("label cut to cutoff_len tokens",) if len(label) > self.options.cutoff_len else ()
        label = label[: self.options.cutoff_len]
        count, role = len(label), ROLE_NUMBER[answer.role if answer is not None else "assistant"] + ANSWER
        turn = np.full(count, len(conversation.turns), np.int16)
        behind = [label, np.ones(count, bool), turn, np.full(count, role, np.uint8)]
        before = [tokens, np.zeros(len(tokens), bool), turns, roles]
        arrays = [np.concatenate(pair) for pair in zip(before, behind)]
        return Example(*arrays, (self.part, number)), notes

    def _label(self, conversation: Conversation, answer: Message) -> str:
        """The text of an answer; a call of a tool as the template, and so the model, is to write it."""
        if answer.role != "function":
            return answer.content
        turn = len(conversation.turns)
        spans = self._spans(conversation, answer)
        written = "".join(span.text for span in spans if span.answer and span.turn == turn)
        for word in self.template.stop_words(self.tokenizer.eos_token):
            written = written.removesuffix(word)
        return written

    def _ranks(self, conversation: Conversation, *answer: Message) -> np.ndarray:
        """(n,) of the tokens of _render: -1 = the template's own, else the place in the text of its message,
        which may be cut. A token that reaches beyond the end of its text is the template's too."""

        def render(messages: list[Message]) -> str:
            return "".join(span.text for span in self._spans(replace(conversation, turns=messages)))

        noted = list(self.unused)

        messages, system = [*conversation.turns, *answer], self.template.default_system
        catalogued = TEMPLATES.get(self.template.name)
        users = catalogued is None or system != catalogued.default_system  # the user's own default
        if system and users and messages[0].role != "system":
            messages.insert(0, Message("system", system))
        spans = self._spans(conversation, *answer)
        whole = "".join(span.text for span in spans)
        borders = cutting.texts_within(render, messages, whole)
        self.unused = noted  # marks are no part of the row
        pairs = list(zip(borders[::2], borders[1::2]))
        places = [place for begin, end in pairs for place in (begin, end, end + 1)]
        encoded = encode_dialogue(self.tokenizer, spans, places)
        ranks = np.full(len(encoded.ids), -1)
        for i, (_, end) in enumerate(pairs):
            first, last, behind = encoded.firsts[3 * i : 3 * i + 3]
            last -= last == behind and end < len(whole)  # no token begins where the text ends
            ranks[first:last] = np.arange(last - first)
        return ranks

    def _answers(self, number, conversation: Conversation, answers, tag: int) -> tuple[Example, int, bool]:
        """prompt + answer for each answer, as segments. All keep the same tokens of the prompt."""
        segments = []
        for answer in answers:
            tokens, produced, turns, roles = self._render(conversation, answer)
            if not produced.any():
                raise Dropped("no trained token")
            last = np.flatnonzero(produced)[-1]
            segments.append((tokens, produced & (turns == turns[last]), turns, roles))
        starts = {int(np.argmax(segment[1])) for segment in segments}
        start, first = min(starts), segments[0]
        if len(starts) > 1 or any((first[0][:start] != segment[0][:start]).any() for segment in segments):
            raise Dropped("the template writes the prompt differently for the two answers")
        kept = list(segments)
        keeps = self._keep_answers(conversation, answers, segments, start)
        if keeps:
            kept = [[array[keep] for array in segment] for segment, keep in zip(segments, keeps)]
        for segment in kept:
            segment[1][:1] = False  # nothing stands before the first token that could predict it
            if not segment[1].any():
                raise Dropped("no trained token")
        if len(kept) > 1 and np.array_equal(kept[0][0], kept[1][0]):
            raise Dropped("identical answers after cutting")
        arrays = [np.concatenate(parts) for parts in zip(*kept)]
        split = len(kept[0][0]) if len(kept) > 1 else 0
        asked = zlib.crc32(first[0][:start]) if self.options.kind == "rated" else 0
        example = Example(*arrays, (self.part, number), split=split, tag=tag, asked=asked)
        cut = sum(len(segment[0]) for segment in segments) - len(example)
        return example, cut, bool(keeps) and not keeps[0][:start].all()

    def _keep_answers(self, conversation: Conversation, answers, segments, start: int) -> list[np.ndarray]:
        """Which tokens of each segment stay, (n,) bool; [] where they fit. start: tokens of the prompt."""
        options, lengths = self.options, [len(segment[0]) for segment in segments]
        strategy, capacity, longest = options.truncation_strategy, options.cutoff_len, max(lengths)
        if longest <= capacity:
            return []
        if strategy != "ratio":
            before = int(cutting.prefix(segments[0][3][:start]).sum())
            return [cutting.keep_answer(n, start, before, longest, capacity, strategy) for n in lengths]
        ranks = [self._ranks(conversation, answer) for answer in answers]
        targets, reserved = [each[start:] for each in ranks], options.reserved_label_len
        kept = cutting.ratio_lengths(ranks[0][:start], targets, capacity, reserved)
        if kept is None:
            raise cutting.too_short(ranks[0][:start], targets, reserved)
        prompt = cutting.by_rank(ranks[0][:start], kept[0])
        return [np.concatenate([prompt, cutting.by_rank(each, kept[1])]) for each in targets]

    def _dialogue(self, number: int, conversation: Conversation) -> tuple[Example, int, bool]:
        tokens, answer, turns, roles = self._render(conversation)
        options, trained, keep = self.options, answer, np.ones(len(tokens), bool)
        if options.mask_history and answer.any():
            trained = answer & (turns == turns[np.flatnonzero(answer)[-1]])
        elif options.train_on_prompt:
            trained = np.ones(len(tokens), bool)
        untrained = [i for i, turn in enumerate(conversation.turns) if turn.more.get("weight") == 0]
        trained = trained & ~np.isin(turns, untrained)
        if len(tokens) > options.cutoff_len and options.truncation_strategy == "ratio":
            parts = answer, turns, roles, self._ranks(conversation)
            limits = options.cutoff_len, options.reserved_label_len
            keep = cutting.keep_turns(conversation.turns, parts, trained, *limits)
        elif len(tokens) > options.cutoff_len:
            keep = cutting.keep_side(roles, options.cutoff_len, options.truncation_strategy)
        in_prompt = cutting.cut_in_prompt(keep, answer)
        cut = len(tokens) - int(keep.sum())
        tokens, trained, turns, roles = tokens[keep], trained[keep], turns[keep], roles[keep]
        trained[:1] = False  # nothing stands before the first token that could predict it
        if not trained.any():
            raise Dropped("no trained token")
        return Example(tokens, trained, turns, roles, (self.part, number)), cut, in_prompt


# ---------------------------------------------------------------------------------------------------------
# many rows


def encode_chunks(rows: Iterable[Row], encoder: ChunkEncoder, workers: int) -> Iterator[TokenArrays]:
    """Chunks in row order, the same for any number of workers. At most 2 chunks a worker are in flight."""
    rows = iter(rows)
    chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
    head = list(islice(chunks, PARALLEL_CHUNKS)) if workers > 1 else []
    if len(head) < PARALLEL_CHUNKS:
        yield from map(encoder, chain(head, chunks))
        return
    yield from (arrays for _, arrays in _in_order(_encode, chain(head, chunks), [encoder], workers, 2))


def encode_rows(
    rows: Iterable[tuple[Any, int, Row]], encoders: Sequence[ChunkEncoder], tallies: list[Tally], workers: int
) -> Iterator[tuple[Any, list[Example]]]:
    """(anything, data set, row) of an endless stream -> (the same thing, examples), in that order, the same
    for any number of workers."""
    if workers == 1:
        for what, part, row in rows:
            yield what, encoders[part].encode(row, tallies[part])
    for (what, part, _), (examples, tally) in _in_order(_encode_row, rows, encoders, workers, STREAM_ROWS):
        tallies[part].add(tally)
        yield what, examples


def _in_order(function, items: Iterable, encoders: Sequence, workers: int, most: int) -> Iterator[tuple]:
    """(item, what a worker makes of it), in the order of the items. most: in flight, of a worker."""
    with ProcessPoolExecutor(workers, _context(), _start_worker, (encoders,)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) >= most * workers:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def refuse_unguarded_worker() -> None:
    """A spawned worker imports the script again; without a guard there it would come here and wait for its
    parent."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        where = "under `if __name__ == '__main__':`"
        raise RuntimeError(f"preprocessing_num_workers: put the code of your script {where}")


def _context():
    """fork starts at once but copies held locks: safe only while this process has a single thread."""
    threads = 2
    with contextlib.suppress(FileNotFoundError):  # no /proc: not Linux
        threads = len(os.listdir("/proc/self/task"))
    return multiprocessing.get_context("fork" if threads == 1 else "spawn")


_worker_encoders: list[ChunkEncoder] = []  # filled in worker processes: they are sent once, not per chunk


def _start_worker(encoders: Sequence[ChunkEncoder]) -> None:
    serve_parent()
    _worker_encoders[:] = encoders


def _encode(rows: list[Row]) -> TokenArrays:
    return _worker_encoders[0](rows)


def _encode_row(item: tuple[Any, int, Row]) -> tuple[list[Example], Tally]:
    (_, part, row), tally = item, Tally()
    return _worker_encoders[part].encode(row, tally), tally

"""What a person sees of the data: the report of what was used and lost, one example as text, a batch token by
token.

Every token of a batch leads back to its data set, row and turn, with the reason why it is trained or not.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.batch import ANSWER, IGNORED, ROLES, Batch, Example
from pipeline.store import Tally

BOLD, GREEN, DIM, PLAIN = "\033[1m", "\033[32m", "\033[2m", "\033[0m"


@dataclass
class DatasetReport:
    name: str
    role: str  # "train" or "eval"
    tally: Tally
    kind: str = "dialogue"  # of the examples, one of formats.KINDS' values
    left_out: int = 0  # rows that num_samples or max_samples did not choose
    repeated: int = 0  # examples that num_samples repeats
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows read from the source: used + dropped + left out."""
        return self.tally.read + self.left_out


NAMES = {"pair": "pairs", "rated": "answers", "prompt": "prompts"}  # what an example is, by kind


class DataReport:
    """What became of each data set's rows."""

    def __init__(self, datasets: list[DatasetReport]):
        self.datasets = datasets

    def __str__(self) -> str:
        head = (
            "data set",
            "rows",
            "used",
            "dropped",
            "left out",
            "cut",
            NAMES.get(self.datasets[0].kind, "examples") if self.datasets else "examples",
            "tokens",
            "trained",
            "cut off",
            "longest",
        )
        table = [head]
        for entry in self.datasets:
            tally = entry.tally
            name = entry.name if entry.role == "train" else f"{entry.name} ({entry.role})"
            numbers = (
                entry.rows,
                tally.used,
                sum(tally.dropped.values()),
                entry.left_out,
                tally.cut,
                tally.examples + entry.repeated,
                tally.tokens,
                tally.tokens_trained,
                tally.tokens_cut,
                tally.longest,
            )
            table.append((name, *(f"{number:,}" for number in numbers)))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths))
            )
            for row in table
        ]
        for entry in self.datasets:
            if entry.kind == "rated":
                lines += _describe_ratings(entry)
            for reason, count in entry.tally.dropped.items():
                lines.append(
                    f"{entry.name}: dropped {count:,}: {reason} (first: {entry.tally.first[reason]})"
                )
            for note, count in entry.tally.notes.items():
                lines.append(f"{entry.name}: {count:,} rows: {note} (first: {entry.tally.first[note]})")
            lines += entry.warnings
        return "\n".join(lines)


def _describe_ratings(entry: DatasetReport) -> Iterator[str]:
    good = entry.tally.desirable
    bad = entry.tally.examples - good
    if entry.role == "streamed so far":
        return
    yield f"{entry.name}: {good:,} desirable and {bad:,} undesirable answers"
    if not good or not bad:
        yield f"warning: {entry.name}: all answers have the same kto_tag; there is nothing to tell apart"


def describe_example(example: Example, tokenizer, kind: str = "dialogue") -> str:
    """The text of an example, with {+ +} around what is trained; line breaks are kept.

    kind: one of formats.KINDS' values. The label behind a prompt is marked {= =}.
    """
    left, right = ("{=", "=}") if kind == "prompt" else ("{+", "+}")
    texts = []
    for number, span in enumerate(example.segments):
        text = "".join(
            f"{left}{piece}{right}" if trained else piece
            for trained, piece in (
                (trained, tokenizer.decode(example.tokens[span][start:end].tolist(), skip_special=False))
                for trained, start, end in _runs(example.trained[span])
            )
        )
        name = segment_name(kind, number, example.tag)
        texts.append(f"{name}:\n{text}" if name else text)
    count = int(example.trained.sum())
    what = "trained (marked {+ +})"
    if kind == "prompt":
        what = "of them the row's answer (marked {= =}): rewards compare with it, the model never reads it"
    return f"{len(example)} tokens, {count} {what}:\n" + "\n".join(texts)


def segment_name(kind: str, number: int, tag: int) -> str:
    """What a segment is within its example: number 0 or 1."""
    if kind == "pair":
        return ("chosen", "rejected")[number]
    if kind == "rated":
        return "the answer of another row" if number else ("undesirable", "desirable")[tag]
    return ""


def _runs(flags: np.ndarray) -> Iterator[tuple[bool, int, int]]:
    borders = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for start, end in zip(borders, borders[1:]):
        yield bool(flags[start]), start, end


def token_table(
    batch: Batch,
    tokenizer,
    datasets: list[str],
    places: dict[tuple[int, int], str],
    colour: bool,
    kind: str = "dialogue",
) -> Iterator[str]:
    """Lines that show a batch token by token: place in the segment, id, text, turn, role, trained or not, and
    why."""
    labels, tokens, roles = batch.labels.tolist(), batch.tokens.tolist(), batch.roles.tolist()
    tags = [0] * len(batch.sources) if batch.tags is None else batch.tags.tolist()
    used = "of labels" if kind == "prompt" else "trained"
    total = len(batch.label_rows)
    pairs = f" ({batch.pairs} pairs)" if kind == "pair" else ""
    yield f"{len(tokens)} tokens in {len(batch.sources)} segments{pairs}, {total} {used}"
    for segment, source in enumerate(batch.sources):
        start, end = batch.borders[segment], batch.borders[segment + 1]
        # labels are shifted: a token is a target where the label of the place before it is set
        trained = [False] + [label != IGNORED for label in labels[start : end - 1]]
        place = f" ({places[source]})" if source in places else ""
        name = segment_name(kind, int(batch.pairs > 0 and segment >= batch.pairs), tags[segment])
        title = (
            f"segment {segment}{name and ', ' + name}: data set {datasets[source[0]]}, row {source[1]}{place}"
        )
        title += f", {end - start} tokens, {sum(trained)} {used}"
        yield ""
        yield f"{BOLD}{title}{PLAIN}" if colour else title
        for t, token in enumerate(tokens[start:end]):
            role, answer = ROLES[roles[start + t] % ANSWER], roles[start + t] >= ANSWER
            turn = int(batch.turns[start + t])
            fields = (
                f"{t:6d} {token:7d}",
                f"{tokenizer.piece(token)!r:<24}",
                f"turn {turn}" if turn >= 0 else "      ",
                f"{role:<11}",
                ("label" if kind == "prompt" else "train") if trained[t] else "  -  ",
                reason(t, role, answer, trained[t], kind),
            )
            line = "  ".join(fields)
            yield f"{GREEN if trained[t] else DIM}{line}{PLAIN}" if colour else line


def reason(place: int, role: str, answer: bool, trained: bool, kind: str = "dialogue") -> str:
    """Why a token is trained or not."""
    if trained and kind == "prompt":
        return "the row's answer: rewards compare with it, the model never reads it"
    if trained:
        if role == "text":
            return "document"
        if answer:
            return "answer"
        return "prompt, trained by train_on_prompt"
    if place == 0:
        return "first token: nothing before it predicts it"
    if answer:
        return (
            "earlier answer, masked by mask_history"
            if kind == "dialogue"
            else "earlier answer: part of the prompt"
        )
    return "template text, or an answer shown as context" if role in ("assistant", "function") else "prompt"


def in_colour() -> bool:
    """Colour for a terminal only, and not when the user asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

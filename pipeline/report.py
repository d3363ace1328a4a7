"""What a person sees of the data: the report of what was used and lost, and one example as text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.batch import Example
from pipeline.store import Tally


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

    def __init__(self, datasets: list[DatasetReport], notes: Iterable[str] = ()):
        self.datasets, self.notes = datasets, list(notes)

    def __str__(self) -> str:
        examples = NAMES.get(self.datasets[0].kind, "examples") if self.datasets else "examples"
        counts = ("rows", "used", "dropped", "left out", "cut", examples)
        table = [("data set", *counts, "tokens", "trained", "cut off", "longest")]
        for entry in self.datasets:
            tally = entry.tally
            name = entry.name if entry.role == "train" else f"{entry.name} ({entry.role})"
            rows = (entry.rows, tally.used, sum(tally.dropped.values()), entry.left_out, tally.cut)
            tokens = (tally.tokens, tally.tokens_trained, tally.tokens_cut, tally.longest)
            numbers = (*rows, tally.examples + entry.repeated, *tokens)
            table.append((name, *(f"{number:,}" for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = []
        for name, *numbers in table:
            cells = [text.rjust(width) for text, width in zip(numbers, widths[1:])]
            lines.append("  ".join([name.ljust(widths[0]), *cells]))
        for entry in self.datasets:
            if entry.kind == "rated":
                lines += _describe_ratings(entry)
            for reason, count in entry.tally.dropped.items():
                first = entry.tally.first[reason]
                lines.append(f"{entry.name}: dropped {count:,}: {reason} (first: {first})")
            for note, count in entry.tally.notes.items():
                lines.append(f"{entry.name}: {count:,} rows: {note} (first: {entry.tally.first[note]})")
            lines += entry.warnings
        lines += self.notes
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
        pieces = []
        for trained, start, end in _runs(example.trained[span]):
            piece = tokenizer.decode(example.tokens[span][start:end].tolist(), skip_special=False)
            pieces.append(f"{left}{piece}{right}" if trained else piece)
        text = "".join(pieces)
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

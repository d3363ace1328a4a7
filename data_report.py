"""What a person sees of the data: the report of what was used and lost, one example as text, a batch token by token.

Every token of a batch leads back to its data set, row and turn, with the reason why it is trained or not.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from batches import ANSWER, IGNORED, ROLES, Batch, Example
from token_store import Tally

BOLD, GREEN, DIM, PLAIN = "\033[1m", "\033[32m", "\033[2m", "\033[0m"


@dataclass
class DatasetReport:
    name: str
    role: str  # "train" or "eval"
    tally: Tally
    left_out: int = 0  # rows that num_samples or max_samples did not choose
    repeated: int = 0  # examples that num_samples repeats
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows read from the source: used + dropped + left out."""
        return self.tally.read + self.left_out


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
            "examples",
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
                entry.rows, tally.used, sum(tally.dropped.values()), entry.left_out, tally.cut,
                tally.examples + entry.repeated, tally.tokens, tally.tokens_trained, tally.tokens_cut, tally.longest,
            )  # fmt: skip
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
            for reason, count in entry.tally.dropped.items():
                lines.append(
                    f"{entry.name}: dropped {count:,}: {reason} (first: {entry.tally.first[reason]})"
                )
            for note, count in entry.tally.notes.items():
                lines.append(f"{entry.name}: {count:,} rows: {note} (first: {entry.tally.first[note]})")
            lines += entry.warnings
        return "\n".join(lines)


def describe_example(example: Example, tokenizer) -> str:
    """The text of an example, with {+ +} around what is trained; line breaks are kept."""
    text = "".join(
        f"{{+{piece}+}}" if trained else piece
        for trained, piece in (
            (trained, tokenizer.decode(example.tokens[start:end].tolist(), skip_special=False))
            for trained, start, end in _runs(example.trained)
        )
    )
    count = int(example.trained.sum())
    return f"{len(example)} tokens, {count} trained (marked {{+ +}}):\n{text}"


def _runs(flags: np.ndarray) -> Iterator[tuple[bool, int, int]]:
    borders = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    for start, end in zip(borders, borders[1:]):
        yield bool(flags[start]), start, end


def token_table(
    batch: Batch, tokenizer, datasets: list[str], places: dict[tuple[int, int], str], colour: bool
) -> Iterator[str]:
    """Lines that show a batch token by token: place in the segment, id, text, turn, role, trained or not, and why."""
    labels, tokens, roles = batch.labels.tolist(), batch.tokens.tolist(), batch.roles.tolist()
    total = len(batch.label_rows)
    yield f"{len(tokens)} tokens in {len(batch.sources)} segments, {total} trained"
    for segment, source in enumerate(batch.sources):
        start, end = batch.borders[segment], batch.borders[segment + 1]
        # labels are shifted: a token is a target where the label of the place before it is set
        trained = [False] + [label != IGNORED for label in labels[start : end - 1]]
        place = f" ({places[source]})" if source in places else ""
        title = f"segment {segment}: data set {datasets[source[0]]}, row {source[1]}{place}"
        title += f", {end - start} tokens, {sum(trained)} trained"
        yield ""
        yield f"{BOLD}{title}{PLAIN}" if colour else title
        for t, token in enumerate(tokens[start:end]):
            role, answer = ROLES[roles[start + t] % ANSWER], roles[start + t] >= ANSWER
            turn = int(batch.turns[start + t])
            fields = (
                f"{t:6d} {token:7d}", f"{tokenizer.piece(token)!r:<24}", f"turn {turn}" if turn >= 0 else "      ",
                f"{role:<11}", "train" if trained[t] else "  -  ", reason(t, role, answer, trained[t]),
            )  # fmt: skip
            line = "  ".join(fields)
            yield f"{GREEN if trained[t] else DIM}{line}{PLAIN}" if colour else line


def reason(place: int, role: str, answer: bool, trained: bool) -> str:
    """Why a token is trained or not."""
    if trained:
        if role == "text":
            return "document"
        return "answer" if answer else "prompt, trained by train_on_prompt"
    if place == 0:
        return "first token: nothing before it predicts it"
    if answer:
        return "earlier answer, masked by mask_history"
    return "template text, or an answer shown as context" if role in ("assistant", "function") else "prompt"


def in_colour() -> bool:
    """Colour for a terminal only, and not when the user asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

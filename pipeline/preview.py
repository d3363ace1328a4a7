"""A training batch token by token: what `python data.py preview CONFIG [--index N] [key=value ...]` shows.

Every token leads back to its data set, row and turn, with the reason why it is trained or not.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from options.errors import refuse, require
from options.option import COMMON, REQUIRED, RESUMABLE, SECRET, option
from pipeline.batch import ANSWER, IGNORED, ROLES, Batch
from pipeline.report import segment_name
from pipeline.sources import find_dataset, read_rows

Stage = Literal["pt", "sft", "rm", "dpo", "orpo", "kto", "ppo", "grpo"]
Places = dict[tuple[int, int], str]  # (data set, row) -> file:line
BOLD, GREEN, DIM, PLAIN = "\033[1m", "\033[32m", "\033[2m", "\033[0m"


@dataclass(frozen=True)
class PreviewOptions:
    model_name_or_path: str = option(
        REQUIRED,
        "folder or hub id; only the tokenizer is read",
        COMMON,
        also="model_id_or_path model model_path base_model",
    )
    index: int = option(0, "which batch", COMMON)
    stage: Stage = option("sft", "what the data is for", COMMON)
    per_device_train_batch_size: int = option(
        8,
        "examples, or packed rows, of a batch",
        COMMON,
        also="batch_size per_gpu_train_batch_size micro_batch_size",
    )
    gradient_accumulation_steps: int = option(1, "batches of an update")
    seed: int = option(42, "seed of the run")
    model_revision: str = option("main", "branch, tag or commit on the hub", also="revision")
    cache_dir: str | None = option(None, "folder for downloads and tokenised data", RESUMABLE)
    hf_hub_token: str | None = option(None, "Hugging Face token", RESUMABLE, SECRET, also="hub_token")

    def __post_init__(self):
        refuse(self.index < 0, f"index is {self.index}, expected at least 0")
        require(self, "seed", lambda seed: 0 <= seed < 2**32, "is not in [0, 2**32)")


def token_table(
    batch: Batch, tokenizer, datasets: list[str], places: Places, colour: bool, kind: str = "dialogue"
) -> Iterator[str]:
    """Lines that show a batch token by token: place, id, text, turn, role, trained or not, and why."""
    labels, tokens, roles = batch.labels.tolist(), batch.tokens.tolist(), batch.per_token["roles"].tolist()
    tags = batch.per_segment["tags"].tolist()
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
        title = f"segment {segment}{name and ', ' + name}: data set {datasets[source[0]]}, row {source[1]}"
        title += f"{place}, {end - start} tokens, {sum(trained)} {used}"
        yield ""
        yield f"{BOLD}{title}{PLAIN}" if colour else title
        for t, token in enumerate(tokens[start:end]):
            role, answer = ROLES[roles[start + t] % ANSWER], roles[start + t] >= ANSWER
            turn = int(batch.per_token["turns"][start + t])
            shown = f"turn {turn}" if turn >= 0 else "      "
            mark = ("label" if kind == "prompt" else "train") if trained[t] else "  -  "
            line = f"{t:6d} {token:7d}  {tokenizer.piece(token)!r:<24}  {shown}  {role:<11}  {mark}  "
            line += reason(t, role, answer, trained[t], kind)
            yield f"{GREEN if trained[t] else DIM}{line}{PLAIN}" if colour else line


def reason(place: int, role: str, answer: bool, trained: bool, kind: str = "dialogue") -> str:
    """Why a token is trained or not."""
    if trained and kind == "prompt":
        return "the row's answer: rewards compare with it, the model never reads it"
    if trained:
        if role == "text":
            return "document"
        return "answer" if answer else "prompt, trained by train_on_prompt"
    if place == 0:
        return "first token: nothing before it predicts it"
    if answer:
        masked = "earlier answer, masked by mask_history"
        return masked if kind == "dialogue" else "earlier answer: part of the prompt"
    return "template text, or an answer shown as context" if role in ("assistant", "function") else "prompt"


def in_colour() -> bool:
    """Colour for a terminal only, and not when the user asks for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def places_of_rows(names: list[str], sources: list[tuple[int, int]], dataset_dir: str, split: str) -> Places:
    """file:line of each row, found by reading the files again."""
    places = {}
    for k in {part for part, _ in sources}:
        info = find_dataset(names[k], dataset_dir, split)
        wanted = {row for part, row in sources if part == k}
        if info.kind == "file":
            rows = islice(read_rows(info), max(wanted) + 1)
            places |= {(k, number): place for number, place, _ in rows if number in wanted}
    return places

"""What a model answers to the rows of the evaluation sets, and how close that comes to their own answers.

    predictor = TextPredictor(prepared.prompts, tokenizer, template, options, seed=42, ...)
    numbers, rows = predictor.run(model, "eval")        # {"eval_rouge-1": ..., "eval_bleu-4": ...}, and texts
    numbers = write_predictions(predictor, model, output_dir, world, look)  # into generated_predictions.jsonl

The texts depend on weights, rows and `seed` only: during training, afterwards and in a run of its own they
are the same, on any number of ranks. Nothing that a training goes on with is touched: each text has a random
generator of its own, and the model's mode is put back. Stage rm writes scores in place of texts.
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from evaluation.rouge_bleu import CHINESE, chinese_is_cut, mean_scores
from evaluation.rouge_bleu import NAMES as METRICS
from generation.company import called_alone, gathered
from model import Decoder
from options.atomic import atomic_file
from options.errors import refuse
from options.progress import Bar
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, collate
from pipeline.store import ExampleStore
from stages.rm import pair_scores
from stages.rollouts import Prompt, ending_with, prompts_of, roll_out, seed_of

PREDICTIONS = "generated_predictions.jsonl"


class Predictor(Protocol):
    names: tuple[str, ...]  # of what `run` measures of the generated texts of each set

    def run(self, model: Decoder, kind: str, look: Callable) -> tuple[dict[str, float], list[dict]]:
        """(numbers, named `kind`_..., rows of generated_predictions.jsonl), the same on all ranks.
        look: called between batches on all ranks; may raise."""


class TextPredictor:
    """Answers to the prompts of each evaluation set, in the order of its rows."""

    def __init__(self, sets, tokenizer, template, options, *, seed, context, rows_per_batch, world):
        """sets: name -> ExampleStore of kind "prompt".  context: tokens that the model takes.
        rows_per_batch: texts at a time, on each rank."""
        self.tokenizer, self.template = tokenizer, template
        self.options = ending_with(options, template, tokenizer)
        self.seed, self.rows_per_batch, self.world = seed, rows_per_batch, world
        rows = {name: map(store.example, range(len(store))) for name, store in sets.items()}
        self.prompts = {name: prompts_of(examples, tokenizer) for name, examples in rows.items()}
        self._check_lengths(context)
        answers = (prompt.answer for prompts in self.prompts.values() for prompt in prompts)
        labels = [answer for answer in answers if answer is not None]
        self.names = METRICS if labels else ()
        if not chinese_is_cut() and any(CHINESE.search(label) for label in labels):
            by_character = "jieba is not installed, so ROUGE takes Chinese by the character, not by the word"
            world.print(f"note: {by_character}; for the usual numbers: pip install jieba")

    def run(self, model: Decoder, kind: str, look=lambda: None) -> tuple[dict[str, float], list[dict]]:
        """Rows: prompt, label (None where the row has no answer), predict; of several sets the name too."""
        started = time.monotonic()
        several, tokens = len(self.prompts) > 1, 0
        measured: dict[str, dict[str, float]] = {}
        rows: list[dict] = []
        for name, prompts in self.prompts.items():
            answers = self._answers(model, name, prompts, look)
            tokens += sum(count for _, count in answers)
            pairs = [(text, prompt.answer) for (text, _), prompt in zip(answers, prompts)]
            measured[name] = mean_scores((text, label) for text, label in pairs if label is not None)
            named = {"dataset": name} if several else {}
            for prompt, (text, label) in zip(prompts, pairs):
                rows.append({"prompt": prompt.text, "label": label, "predict": text, **named})
        seconds = max(time.monotonic() - started, 1e-9)
        numbers = join(measured, kind)
        return numbers | {f"{kind}_generated_tokens_per_second": round(tokens / seconds, 1)}, rows

    def _answers(self, model: Decoder, name: str, prompts: list[Prompt], look) -> list[tuple[str, int]]:
        """The text to each prompt, and its tokens with the stop token."""
        decode = {"stop_ids": self.tokenizer.stop_ids, "tokenizer": self.tokenizer}

        def write(rows: range) -> list[tuple[str, int]]:
            asked = [prompts[row] for row in rows]
            # 0: the same draws at every evaluation, so that only the weights make a difference
            seeds = [seed_of(self.seed, 0, prompt) for prompt in asked]
            completions = roll_out(model, asked, seeds, self.options, **decode)
            return [(self.template.content(each.text), len(each.ids)) for each in completions]

        counts = len(prompts), self.rows_per_batch
        with gathered(model):
            return _of_all_ranks(write, *counts, f"answering {name}", self.world, look)

    def _check_lengths(self, limit: int) -> None:
        """Before the first step: later a rank that stopped alone would leave the others waiting."""
        for name, prompts in self.prompts.items():
            longest = max(prompts, key=lambda prompt: len(prompt.ids))
            prompt = f"{name} row {longest.source[1]}: the prompt has {len(longest.ids)} tokens"
            taken = f"but the model takes {limit} with the answer; set cutoff_len below that"
            text = f"predict_with_generate: {prompt}, {taken} to leave such rows out"
            refuse(len(longest.ids) >= limit, text)


class ScorePredictor:
    """Stage rm: the scores of both answers of each pair."""

    names = ()

    def __init__(self, sets: dict[str, ExampleStore], *, rows_per_batch: int, world: World):
        """sets: of kind "pair".  rows_per_batch: pairs that are scored together, on each rank."""
        self.sets, self.rows_per_batch, self.world = sets, rows_per_batch, world

    def run(self, model: Decoder, kind: str, look=lambda: None) -> tuple[dict[str, float], list[dict]]:
        """Rows: number of the row, score of the chosen and of the rejected answer."""
        was_training, device = model.training, self.world.device
        model.eval()
        measured: dict[str, dict[str, float]] = {}
        rows: list[dict] = []
        for name, store in self.sets.items():

            def score(numbers: range, store: ExampleStore = store) -> list[tuple[float, float]]:
                with called_alone(model):
                    if not numbers:
                        return []
                    batch = collate([store.example(i) for i in numbers]).rounded(ROW_MULTIPLE[device.type])
                    return list(zip(*pair_scores(model, batch.to(device))))

            counts = len(store), self.rows_per_batch
            with gathered(model):
                scores = _of_all_ranks(score, *counts, f"scoring {name}", self.world, look)
            wins = sum(chosen > rejected for chosen, rejected in scores)
            margins = sum(chosen - rejected for chosen, rejected in scores)
            measured[name] = {"accuracy": wins / len(scores), "rewards/margins": margins / len(scores)}
            named = {"dataset": name} if len(self.sets) > 1 else {}
            for row, (chosen, rejected) in zip(store.sources[:, 1], scores):
                rows.append({"row": int(row), "chosen": chosen, "rejected": rejected, **named})
        model.train(was_training)
        return join(measured, kind), rows


def _of_all_ranks(
    make: Callable[[range], list], count: int, rows: int, what: str, world: World, look: Callable[[], None]
) -> list:
    """make(range) of batches of so many `rows`, joined in order; each rank makes every size-th batch, and the
    empty one where it has one less, for all of them ask the model."""
    starts = range(0, count, rows)
    mine = [range(start, min(start + rows, count)) for start in starts[world.data_rank :: world.data_size]]
    made: list[tuple[int, list]] = []
    with Bar(desc=what, total=sum(map(len, mine)), unit=" rows", disable=not world.is_main) as bar:
        for number in range(-(-len(starts) // world.data_size)):
            look()  # every rank as often
            for each in mine[number : number + 1] or [range(0)]:
                made.append((each.start, make(each)))
                bar.update(len(each))
    copies = world.size // world.data_size  # ranks that share a layer or a row have written the same
    parts = sorted(itertools.chain(*world.gather(made)[::copies]))
    return [value for _, values in parts for value in values]


def join(measured: dict[str, dict[str, float]], kind: str, digits: int | None = 4) -> dict[str, float]:
    """<kind>_<metric>, the mean over the sets that have it; of several sets also <kind>_<set>_<metric>."""
    numbers: dict[str, float] = {}
    if len(measured) > 1:
        each_set = ((f"{kind}_{name}_", each) for name, each in measured.items())
        numbers |= {prefix + metric: value for prefix, each in each_set for metric, value in each.items()}
    for metric in dict.fromkeys(itertools.chain(*measured.values())):
        values = [each[metric] for each in measured.values() if metric in each]
        mean = sum(values) / len(values)
        numbers[f"{kind}_{metric}"] = mean if digits is None else round(mean, digits)
    return numbers


def write_predictions(predictor: Predictor, model: Decoder, folder: Path, world: World, look) -> dict:
    """Write generated_predictions.jsonl; gives what was measured, time and speed. All ranks call it. look: as
    in Predictor.run."""
    started = time.monotonic()
    numbers, rows = predictor.run(model, "predict", look)
    seconds = max(time.monotonic() - started, 1e-9)
    if world.is_main:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with atomic_file(folder / PREDICTIONS) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
    world.barrier()
    speed = round(len(rows) / seconds, 3)
    return numbers | {"predict_runtime": round(seconds, 4), "predict_samples_per_second": speed}

"""Data sets -> tokenised examples, cached, mixed and split -> the loaders of batches.py; with a report of
losses.

The way of a row: sources.py reads it, formats.py makes a conversation of it, encoding.py renders, tokenises,
cuts and marks what is trained, tokenising.py keeps the result on disk and finds it again. A row without a
trained token is never trained silently: it is dropped and counted, and the report's totals add up to the rows
read.

See any training batch token by token:  python data.py preview CONFIG [--index N] [key=value ...]
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from options.errors import UserError, refuse
from options.option import COMMON, RESUMABLE, option
from pipeline.batch import BatchLoader, Example, StreamingLoader
from pipeline.encoding import EncodeOptions, refuse_unguarded_worker
from pipeline.formats import KINDS
from pipeline.mixing import hold_out, interleave
from pipeline.report import DataReport, DatasetReport
from pipeline.sources import HubAccess, open_hub
from pipeline.store import ExampleStore, Tally, load_sets, save_sets
from pipeline.streaming import RowStream
from pipeline.tokenise import Tokeniser

PROMPTS = "prompts of "  # before the name of a set in tokenized_path


@dataclass(frozen=True)
class DataOptions:
    dataset: tuple[str, ...] = option(
        (), "names in dataset_info.json, or paths of files and folders", COMMON, also="dataset_name data_path"
    )
    eval_dataset: tuple[str, ...] = option(
        (), "evaluation sets; each is evaluated on its own", COMMON, RESUMABLE, also="val_dataset"
    )
    dataset_dir: str = option(
        "data", "folder of dataset_info.json; ONLINE = names are hub ids", RESUMABLE, also="data_dir"
    )
    split: str = option("train", "split of hub data sets whose entry names none")
    cutoff_len: int = option(
        2048,
        "longest example (of a pair: each answer with its prompt) in tokens",
        COMMON,
        also="max_length model_max_length max_seq_length max_seq_len",
    )
    reserved_label_len: int = option(1, "answer tokens kept at least, where a turn is cut by ratio")
    truncation_strategy: Literal["ratio", "drop", "left", "right"] = option(
        "ratio", "longer examples: cut by turns, leave out, keep end / start"
    )
    train_on_prompt: bool = option(False, "train on the prompt too", also="train_on_source")
    mask_history: bool = option(False, "train on the last answer only")
    packing: bool | None = option(None, "fill rows to cutoff_len tokens; none = only in stage pt", COMMON)
    group_by_length: bool = option(False, "batches of examples of similar length")
    max_samples: int | None = option(
        None, "use the first so many rows of each data set", COMMON, also="max_train_samples"
    )
    val_size: float = option(
        0.0,
        "evaluation rows taken from `dataset`: share below 1, count from 1",
        COMMON,
        also="dataset_test_ratio split_dataset_ratio eval_dataset_size",
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = option(
        "concat",
        "several data sets: one after another, or in turn until the first (under) or each (over) is used up",
        also="mixing_strategy",
    )
    interleave_probs: tuple[float, ...] = option((), "how often each data set has its turn; sums to 1")
    streaming: bool = option(False, "read and tokenise while training, store nothing; needs max_steps")
    buffer_size: int = option(16384, "rows of the shuffle buffer when streaming")
    overwrite_cache: bool = option(False, "tokenise again even if the cache has it", RESUMABLE)
    preprocessing_num_workers: int | None = option(
        None,
        "processes that tokenise; none = this one",
        RESUMABLE,
        also="dataset_num_proc preprocess_num_proc",
    )
    tokenized_path: str | None = option(
        None, "folder of tokenised data: loaded if it exists, else saved, then stop", RESUMABLE
    )
    data_seed: int | None = option(
        None, "seed of data order and splits; none = seed", also="dataset_split_seed dataset_seed"
    )

    def __post_init__(self):
        for key in (
            "cutoff_len",
            "reserved_label_len",
            "buffer_size",
            "max_samples",
            "preprocessing_num_workers",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key} is {value}, expected at least 1")
        if self.cutoff_len < 2:
            raise UserError(
                f"cutoff_len is {self.cutoff_len}; one token trains nothing, so at least 2 are needed"
            )
        if self.reserved_label_len >= self.cutoff_len:
            raise UserError(
                f"reserved_label_len is {self.reserved_label_len}, expected less than cutoff_len "
                f"({self.cutoff_len})"
            )
        if self.val_size < 0 or (self.val_size > 1 and self.val_size != int(self.val_size)):
            raise UserError(
                f"val_size is {self.val_size}, expected a share below 1 or a whole number of rows"
            )
        if self.mix_strategy == "concat" and self.interleave_probs:
            raise UserError(
                "interleave_probs needs mix_strategy interleave_under or interleave_over; it is concat"
            )
        if self.interleave_probs:
            if len(self.interleave_probs) != len(self.dataset):
                raise UserError(
                    f"interleave_probs has {len(self.interleave_probs)} numbers for {len(self.dataset)} data "
                    "sets"
                )
            if min(self.interleave_probs) <= 0 or abs(sum(self.interleave_probs) - 1) > 1e-6:
                raise UserError(
                    f"interleave_probs is {self.interleave_probs}, expected shares above 0 that sum to 1"
                )
        if self.streaming and self.tokenized_path is not None:
            raise UserError("tokenized_path cannot be combined with streaming, which stores nothing")
        if self.mask_history and self.train_on_prompt:
            raise UserError(
                "mask_history trains the last answer only, train_on_prompt everything; set one of them"
            )
        if self.packing and self.group_by_length:
            raise UserError("group_by_length: packing already fills rows; set one of the two to false")
        streaming, val_size = self.streaming, self.val_size
        refuse(
            streaming and self.max_samples is not None,
            "max_samples: it is for data sets that are read whole; use max_steps, or streaming=false",
        )
        refuse(
            streaming and 0 < val_size < 1,
            "val_size: a share of a stream is unknown; give a number of rows, or drop streaming",
        )
        refuse(
            streaming and self.group_by_length,
            "group_by_length: lengths in a stream are not known ahead; drop it, or streaming",
        )
        refuse(val_size and self.eval_dataset, "val_size: there is an eval_dataset too; drop one of the two")
        refuse(
            val_size and not self.dataset and not self.tokenized_path,
            "val_size: it is split off dataset, which is not given; name one, or drop val_size",
        )


class TokenizedDataSaved(Exception):
    """tokenized_path was written: the run is over, as in LLaMA-Factory. The text is for the user; not an
    error."""


@dataclass
class Prepared:
    train: ExampleStore | RowStream | None
    eval: dict[str, ExampleStore]  # name -> set; "validation" is the one that val_size split off
    report: DataReport
    packing: bool
    kind: str = "dialogue"  # of the examples, one of formats.KINDS' values
    prompts: dict[str, ExampleStore] = field(
        default_factory=dict
    )  # the evaluation sets as prompts, if asked for
    couple: Callable[[Iterator[Example]], Iterator[Example]] = (
        iter  # makes other examples of those of a stream
    )

    def train_loader(
        self, options: DataOptions, *, rows_per_batch: int, seed: int, **place
    ) -> BatchLoader | StreamingLoader:
        """The loader that the options ask for, over the stored or the streamed training set.

        place: rank, world and collate of a loader.
        """
        shared = {
            "rows_per_batch": rows_per_batch,
            "packing": self.packing,
            "cutoff_len": self.row_tokens(options),
            "seed": seed if options.data_seed is None else options.data_seed,
            **place,
        }
        if self.train is None:
            raise UserError("dataset: no training set is named")
        if isinstance(self.train, RowStream):
            return StreamingLoader(
                self.train.rows,
                self.train.encode,
                buffer_size=options.buffer_size,
                couple=self.couple,
                **shared,
            )
        return BatchLoader(self.train, group_by_length=options.group_by_length, **shared)

    def first_example(self) -> Example:
        """What to show before training starts."""
        if isinstance(self.train, RowStream):
            made = (self.train.encoders[k].encode(row, Tally()) for k, row in self.train.rows(0))
            first = next((example for examples in made for example in examples), None)
            if first is None:
                raise UserError("dataset: the streamed data holds no row that can be trained on")
            return first
        return (self.train if self.train is not None else next(iter(self.eval.values()))).example(0)

    def eval_loaders(self, options: DataOptions, *, rows_per_batch: int, **place) -> dict[str, BatchLoader]:
        """One loader for each evaluation set, in its own order; read batches_per_epoch batches of it."""
        shared = {"packing": self.packing, "cutoff_len": self.row_tokens(options), "shuffle": False, **place}
        return {
            name: BatchLoader(s, rows_per_batch=rows_per_batch, **shared) for name, s in self.eval.items()
        }

    def row_tokens(self, options: DataOptions) -> int:
        """Tokens of a packed row. A pair is two answers of cutoff_len each, and so is a prompt with its
        label."""
        return options.cutoff_len * (1 if self.kind in ("document", "dialogue") else 2)


def load_datasets(
    options: DataOptions,
    template,
    tokenizer,
    stage: str,
    *,
    seed: int,
    is_main: bool = True,
    cache_dir: str | Path | None = None,
    enable_thinking: bool = True,
    hub: HubAccess | None = None,
    prompts: bool = False,
    kind: str | None = None,
) -> Prepared:
    """Read, tokenise (or load from the cache), mix and split what `options` names.

    template: may be None for stage pt.  cache_dir: where tokenised data is kept; None = default_cache_dir().
    is_main: show progress, write tokenized_path.  All ranks may call this at once. kind: of the examples;
    None = the stage's, see formats.KINDS. prompts: prepare the evaluation sets for generation too: the same
    rows as prompts, each with its answer as label. Raises UserError for anything wrong with the data or options,
    TokenizedDataSaved after writing tokenized_path.
    """
    refuse_unguarded_worker()
    packing = stage == "pt" if options.packing is None else options.packing
    if packing and options.group_by_length:
        raise UserError(
            f"group_by_length: stage {stage} packs rows (packing={packing}); set one of the two to false"
        )
    shared = ("cutoff_len", "truncation_strategy", "reserved_label_len", "train_on_prompt", "mask_history")
    encode = EncodeOptions(
        kind=kind or KINDS[stage],
        enable_thinking=enable_thinking,
        **{key: getattr(options, key) for key in shared},
    )
    seed = seed if options.data_seed is None else options.data_seed
    cache = Path(cache_dir or default_cache_dir()) / "tokenised"
    work = Tokeniser(
        stage,
        encode,
        template,
        tokenizer,
        seed,
        cache,
        is_main,
        hub or HubAccess(),
        options.dataset_dir,
        options.split,
        options.max_samples,
        options.overwrite_cache,
        options.preprocessing_num_workers or 1,
    )
    saved = Path(options.tokenized_path) if options.tokenized_path is not None else None
    if prompts and template is None:
        raise UserError(f"template: generating from prompts needs one, also in stage {stage}")
    if saved is not None and saved.exists():
        train, evaluation, report = _load_saved(saved, work)
        asked = _take_prompts(evaluation, prompts, saved)
        return Prepared(train, evaluation, report, packing, work.encode.kind, asked)
    if not options.dataset and not options.eval_dataset:
        raise UserError("dataset: none is named; give a name of dataset_info.json or the path of a file")
    train, evaluation, report = (_prepare_stream if options.streaming else _prepare_stored)(options, work)
    asked = _prompt_sets(work, train, evaluation, report) if prompts else {}
    _require_examples(train, evaluation, asked, report)
    evaluation = {
        name: store for name, store in evaluation.items() if len(store)
    }  # without answers: prompts only
    if saved is not None:
        if is_main:
            sets = ({} if train is None else {"train": train}) | evaluation
            sets |= {PROMPTS + name: store for name, store in asked.items()}
            save_sets(
                saved, sets, {"keys": work.keys(), "report": [asdict(entry) for entry in report.datasets]}
            )
        raise TokenizedDataSaved(
            f"{report}\nThe tokenised data is in {saved}; run the same command again to train on it."
        )
    return Prepared(train, evaluation, report, packing, work.encode.kind, asked)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/anvil, else ~/.cache/anvil."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anvil"


def _prepare_stored(
    options: DataOptions, work: Tokeniser
) -> tuple[ExampleStore | None, dict[str, ExampleStore], DataReport]:
    reports = []
    parts, orders, infos = [], [], [work.find(name) for name in options.dataset]
    evals = {name: work.find(name) for name in options.eval_dataset}
    for k, info in enumerate(infos):
        files, order, report = work.dataset(info, "train")
        parts.append(files)
        orders.append(np.stack([np.full(len(order), k), order], 1))
        reports.append(report)
    train, evaluation = None, {}
    if parts:
        train = ExampleStore(parts, options.dataset, _mix(orders, options, work.seed))
        if options.val_size > 0:
            train, evaluation["validation"] = split_validation(train, options.val_size, work.seed)
    for name, info in evals.items():
        files, order, report = work.dataset(info, "eval")
        evaluation[name] = ExampleStore([files], [name], np.stack([np.zeros_like(order), order], 1))
        reports.append(report)
    return train, evaluation, DataReport(reports)


def _require_examples(
    train: ExampleStore | RowStream | None,
    evaluation: dict[str, ExampleStore],
    prompts: dict[str, ExampleStore],
    report: DataReport,
) -> None:
    """Raises ValueError for a training set without examples, and for an evaluation set that is of no use."""
    empty = [name for name, store in (prompts or evaluation).items() if len(store) == 0]
    if isinstance(train, ExampleStore) and len(train) == 0:
        raise UserError(f"dataset: no row can be trained on\n{report}")
    if empty:
        raise UserError(f"eval_dataset: no row of {empty[0]!r} can be evaluated on\n{report}")


def _prepare_stream(
    options: DataOptions, work: Tokeniser
) -> tuple[RowStream | None, dict[str, ExampleStore], DataReport]:
    stored = replace(options, dataset=(), interleave_probs=(), val_size=0.0)
    evaluation, report = {}, DataReport([])
    if options.eval_dataset:
        _, evaluation, report = _prepare_stored(stored, work)
    infos = [work.find(name) for name in options.dataset]
    if not infos:
        return None, evaluation, report
    encoders = [work.encoder(info, k) for k, info in enumerate(infos)]
    opened = [None if info.kind == "file" else open_hub(info, work.hub, streaming=True) for info in infos]
    stream = RowStream(encoders, opened, options.mix_strategy, options.interleave_probs, work.seed)
    for name, tally in zip(stream.datasets, stream.tallies):
        report.datasets.append(DatasetReport(name, "streamed so far", tally, work.encode.kind))
    if options.val_size > 0:
        held = list(islice(stream.rows(0), int(options.val_size)))
        tally, examples = Tally(), []
        for k, row in held:
            examples += encoders[k].encode(row, tally)
        stream.held_out = frozenset((k, row[0]) for k, row in held)
        evaluation["validation"] = ExampleStore.from_examples(examples, stream.datasets)
        report.datasets.append(DatasetReport("validation", "eval", tally, work.encode.kind))
    return stream, evaluation, report


def _prompt_sets(
    work: Tokeniser,
    train: ExampleStore | RowStream | None,
    evaluation: dict[str, ExampleStore],
    report: DataReport,
) -> dict[str, ExampleStore]:
    """The rows of each evaluation set as prompts. Only rows that are evaluated are read as such."""
    if work.encode.kind == "prompt":
        return dict(evaluation)
    work, sets = work.for_prompts(), {}
    for name, store in evaluation.items():
        if name == "validation" and isinstance(train, RowStream):
            encoders = [work.encoder(encoder.info, k) for k, encoder in enumerate(train.encoders)]
            stream, tally = replace(train, encoders=encoders, held_out=frozenset()), Tally()
            held = islice(stream.rows(0), len(train.held_out))
            examples = [example for k, row in held for example in encoders[k].encode(row, tally)]
            sets[name] = ExampleStore.from_examples(examples, stream.datasets)
            report.datasets.append(DatasetReport(name, "prompts", tally, "prompt"))
            continue
        parts, index = [], np.full((len(store), 2), -1)
        for k, dataset in enumerate(store.datasets):
            mine = store.index[:, 0] == k
            rows = store.sources[mine, 1]
            only = np.unique(rows) if name == "validation" else None
            files, order, entry = work.dataset(work.find(dataset), "prompts", only)
            report.datasets.append(entry)
            parts.append(files)
            place = {int(row): i for i, row in enumerate(files.rows)}
            index[mine, 0], index[mine, 1] = k, [place.get(int(row), -1) for row in rows]
        if (
            name != "validation"
        ):  # rows without an answer have no place in the evaluation set, but here they have
            index = np.stack([np.zeros_like(order), order], 1)
        sets[name] = ExampleStore(parts, store.datasets, index[index[:, 1] >= 0])
    return sets


def _take_prompts(evaluation: dict[str, ExampleStore], wanted: bool, folder: Path) -> dict[str, ExampleStore]:
    """Move the sets of prompts out of what tokenized_path held."""
    names = [name for name in evaluation if name.startswith(PROMPTS)]
    sets = {name.removeprefix(PROMPTS): evaluation.pop(name) for name in names}
    if wanted and evaluation and not sets:
        raise UserError(
            f"tokenized_path: the data in {folder} holds no prompts to generate from; make it anew with the "
            "options "
            "that ask for generation (predict_with_generate)"
        )
    return sets if wanted else {}


def _mix(orders: list[np.ndarray], options: DataOptions, seed: int) -> np.ndarray:
    """Index of the training set, (n, 2), from the order of each data set's examples."""
    if len(orders) == 1 or options.mix_strategy == "concat":
        return np.concatenate(orders)
    for name, order in zip(options.dataset, orders):
        if len(order) == 0:
            raise UserError(f"dataset {name!r} gives no example, so it cannot be interleaved")
    under = options.mix_strategy == "interleave_under"
    mixed = interleave([len(order) for order in orders], options.interleave_probs, under, seed)
    return np.stack([orders[k][i] for k, i in mixed])


def split_validation(store: ExampleStore, val_size: float, seed: int) -> tuple[ExampleStore, ExampleStore]:
    """(train, validation); a row that is repeated is evaluated once."""
    held = hold_out(store.sources, val_size, seed)
    validation = np.flatnonzero(held)
    _, first = np.unique(store.index[validation], axis=0, return_index=True)
    return store.select(np.flatnonzero(~held)), store.select(validation[np.sort(first)])


# ----------------------------------------------------------------------------------------------------
# tokenized_path


def _load_saved(
    folder: Path, work: Tokeniser
) -> tuple[ExampleStore | None, dict[str, ExampleStore], DataReport]:
    """What an earlier run saved. Refused when tokenizer, template or options would now give other tokens."""
    meta, sets = load_sets(folder)
    for name, now in work.keys().items():
        then = meta["keys"].get(name)
        if then != now:
            if isinstance(then, dict) and isinstance(now, dict):
                differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
                then, now = ({key: each.get(key) for key in differing} for each in (then, now))
            raise UserError(
                f"tokenized_path: the data in {folder} was made with another {name} ({then}, now {now}). "
                "Give the options it was made with, or another tokenized_path."
            )
    reports = [DatasetReport(**(entry | {"tally": Tally(**entry["tally"])})) for entry in meta["report"]]
    return sets.pop("train", None), sets, DataReport(reports)


def main(argv: list[str]) -> int:
    from options import config
    from options.errors import exit_status
    from pipeline.preview import PreviewOptions, in_colour, places_of_rows, token_table, tokenizer_folder
    from templates import TemplateOptions, get_template
    from text.tokenizer import Tokenizer

    if argv[:1] != ["preview"]:
        print("usage: python data.py preview CONFIG [--index N] [key=value ...]", file=sys.stderr)
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2

    def preview() -> int:
        """Show batch `index` of training, as rank 0 of 1 gets it."""
        sections = [PreviewOptions, DataOptions, TemplateOptions]
        about = {"program": "data.py preview", "description": "Show a training batch token by token."}
        chosen = config.load(argv[1:], sections, reads_files_of_others=True, **about)
        run, options, named = (chosen[section] for section in sections)
        tokenizer, template = Tokenizer.from_folder(tokenizer_folder(run)), None
        if run.stage != "pt":
            template = get_template(named.template, tokenizer.chat_template, named.default_system)
        hub = HubAccess(run.hf_hub_token, None, run.cache_dir)
        how = {"cache_dir": run.cache_dir, "enable_thinking": named.enable_thinking, "hub": hub}
        prepared = load_datasets(options, template, tokenizer, run.stage, seed=run.seed, **how)
        print(prepared.report)
        loader = prepared.train_loader(options, rows_per_batch=run.per_device_train_batch_size, seed=run.seed)
        batch, count = next(loader.batches(run.index)), loader.batches_per_epoch
        print(f"\nbatch {run.index}{f' (of {count} in an epoch)' if count is not None else ''}:")
        names = prepared.train.datasets
        places = places_of_rows(names, batch.sources, options.dataset_dir, options.split)
        for line in token_table(batch, tokenizer, names, places, in_colour(), prepared.kind):
            print(line)
        return 0

    try:
        return exit_status("data.py preview", preview)
    except TokenizedDataSaved as done:
        print(done)
    except BrokenPipeError:  # `| head` has seen enough; without this the interpreter complains at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

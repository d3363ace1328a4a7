"""Data sets -> tokenised examples, cached, mixed and split -> the loaders of pipeline/batch.py, and a report.

The way of a row, in pipeline/: sources.py and readers.py read it, formats.py makes a conversation of it,
encoding.py renders, tokenises, cuts and marks what is trained, tokenise.py keeps the result on disk and finds
it again. A row without a trained token is never trained silently: it is dropped and counted, and the report's
totals add up to the rows read.

See any training batch token by token:  python data.py preview CONFIG [--index N] [key=value ...]
"""

if __name__ == "__main__":
    from options.errors import begin

    begin("data.py")

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from options.errors import UserError, refuse, require
from options.option import COMMON, RESUMABLE, option
from pipeline.batch import BatchLoader, Example
from pipeline.encoding import EncodeOptions, refuse_unguarded_worker
from pipeline.formats import KINDS
from pipeline.mixing import mix_sets
from pipeline.report import DataReport, DatasetReport
from pipeline.sources import HubAccess, open_hub
from pipeline.store import ExampleStore, Tally, save_sets
from pipeline.streaming import RowStream, StreamingLoader
from pipeline.tokenise import DECIDED, Tokeniser

PROMPTS = "prompts of "  # before the name of a set in tokenized_path


@dataclass(frozen=True)
class DataOptions:
    dataset: tuple[str, ...] = option(
        (), "names in dataset_info.json, or paths of files and folders", COMMON, also="dataset_name data_path"
    )
    eval_dataset: tuple[str, ...] = option(
        (), "evaluation sets; each is evaluated on its own", COMMON, RESUMABLE, also="val_dataset"
    )
    dataset_dir: str = option("data", "of dataset_info.json; ONLINE: hub ids", RESUMABLE, also="data_dir")
    split: str = option("train", "split of hub data sets whose entry names none")
    cutoff_len: int = option(
        2048, "longest example in tokens", COMMON, also="model_max_length max_seq_length max_seq_len"
    )
    reserved_label_len: int = option(1, "answer tokens kept at least, where a turn is cut by ratio")
    truncation_strategy: Literal["ratio", "drop", "left", "right"] = option(
        "ratio", "longer examples: cut by turns, leave out, keep end / start"
    )
    train_on_prompt: bool = option(False, "train on the prompt too", also="train_on_source")
    mask_history: bool = option(False, "train on the last answer only")
    packing: bool | None = option(None, "fill rows to cutoff_len; none: in pt", COMMON, also="sft_packing")
    group_by_length: bool = option(False, "batches of examples of similar length")
    max_samples: int | None = option(None, "rows that are used of each set", COMMON, also="max_train_samples")
    val_size: float = option(
        0.0,
        "evaluation rows taken from `dataset`: share below 1, count from 1",
        COMMON,
        also="dataset_test_ratio split_dataset_ratio eval_dataset_size dev_ratio",
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
        None, "processes that tokenise; none = one", RESUMABLE, also="dataset_num_proc preprocess_num_proc"
    )
    tokenized_path: str | None = option(
        None, "folder of tokenised data: loaded if it exists, else saved, then stop", RESUMABLE
    )
    data_seed: int | None = option(None, "of order, splits; or seed", also="dataset_split_seed dataset_seed")

    def __post_init__(self):
        counts = ("cutoff_len", "reserved_label_len", "buffer_size", "max_samples")
        for key in (*counts, "preprocessing_num_workers"):
            value = getattr(self, key)
            refuse(value is not None and value < 1, f"{key} is {value}, expected at least 1")
        require(self, "data_seed", lambda seed: 0 <= seed < 2**32, "is not in [0, 2**32)")
        length, val_size, shares = self.cutoff_len, self.val_size, self.interleave_probs
        refuse(length < 2, f"cutoff_len is {length}; one token trains nothing, so at least 2 are needed")
        if self.reserved_label_len >= length:
            kept = self.reserved_label_len
            raise UserError(f"reserved_label_len is {kept}, expected less than cutoff_len ({length})")
        if val_size < 0 or (val_size > 1 and val_size != int(val_size)):
            raise UserError(f"val_size is {val_size}, expected a share below 1 or a whole number of rows")
        refuse(val_size and self.eval_dataset, "val_size: there is an eval_dataset too; drop one of the two")
        none = val_size and not self.dataset and not self.tokenized_path
        refuse(none, "val_size: it is taken from dataset, but none is given; name one, or drop val_size")
        if self.mix_strategy == "concat" and shares:
            raise UserError("interleave_probs needs mix_strategy interleave_under or interleave_over")
        if shares and len(shares) != len(self.dataset):
            raise UserError(f"interleave_probs has {len(shares)} numbers for {len(self.dataset)} data sets")
        if shares and (min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6):
            raise UserError(f"interleave_probs is {shares}, expected shares above 0 that sum to 1")
        if self.mask_history and self.train_on_prompt:
            raise UserError("mask_history trains the last answer only, train_on_prompt everything; set one")
        if self.packing and self.group_by_length:
            raise UserError("group_by_length: packing already fills rows; set one of the two to false")
        if not self.streaming:
            return
        if self.tokenized_path is not None:
            raise UserError("tokenized_path cannot be combined with streaming, which stores nothing")
        if self.max_samples is not None:
            raise UserError("max_samples: it is for data sets that are read whole; drop it, or streaming")
        way_out = "give a number of rows, or drop streaming"
        refuse(0 < val_size < 1, f"val_size: a share of a stream is unknown; {way_out}")
        if self.group_by_length:
            raise UserError("group_by_length: lengths in a stream are not known ahead; drop it, or streaming")

    def seed_of_data(self, seed: int) -> int:
        return seed if self.data_seed is None else self.data_seed


class TokenizedDataSaved(Exception):
    """tokenized_path was written: the run is over, as in LLaMA-Factory. The text is for the user."""


Sets = dict[str, ExampleStore]


@dataclass
class Prepared:
    train: ExampleStore | RowStream | None
    eval: Sets  # "validation" is the one that val_size split off
    report: DataReport
    packing: bool
    kind: str = "dialogue"  # of the examples, one of formats.KINDS' values
    prompts: Sets = field(default_factory=dict)  # the evaluation sets as prompts, if asked for
    # makes other examples of those of a stream
    couple: Callable[[Iterator[Example]], Iterator[Example]] = iter

    def train_loader(
        self, options: DataOptions, *, rows_per_batch: int, seed: int, rows_per_update: int = 1, **place
    ) -> BatchLoader | StreamingLoader:
        """The loader that the options ask for, over the stored or the streamed training set.

        rows_per_update: over all ranks. place: rank, world and collate of a loader.
        """
        place |= {"packing": self.packing, "cutoff_len": self.row_tokens(options)}
        place |= {"rows_per_batch": rows_per_batch, "seed": options.seed_of_data(seed)}
        train = self.train
        refuse(train is None, "dataset: no training set is named")
        if isinstance(train, ExampleStore):
            return BatchLoader(train, group_by_length=options.group_by_length, **place)
        # what looks at the next row of the stream has to have it
        lanes = {"lanes": rows_per_update if self.couple is iter else 1, "couple": self.couple}
        return StreamingLoader(train, buffer_size=options.buffer_size, **lanes, **place)

    def first_example(self) -> Example:
        """What to show before training starts."""
        if isinstance(self.train, RowStream):
            made = (self.train.encoders[k].encode(row, Tally()) for k, row in self.train.rows(0))
            first = next((example for examples in made for example in examples), None)
            refuse(first is None, "dataset: the streamed data holds no row that can be trained on")
            return first
        return (self.train if self.train is not None else next(iter(self.eval.values()))).example(0)

    def eval_loaders(self, options: DataOptions, *, rows_per_batch: int, **place) -> dict[str, BatchLoader]:
        """One loader for each evaluation set, in its own order; read batches_per_epoch batches of it."""
        shared = {"packing": self.packing, "cutoff_len": self.row_tokens(options), "shuffle": False, **place}
        shared["rows_per_batch"] = rows_per_batch
        return {name: BatchLoader(store, **shared) for name, store in self.eval.items()}

    def row_tokens(self, options: DataOptions) -> int:
        """Tokens of a packed row. A pair is two answers of cutoff_len each; so is a prompt with its label."""
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
    enable_thinking: bool | None = None,
    hub: HubAccess | None = None,
    prompts: bool = False,
    kind: str | None = None,
    is_saved: bool | None = None,
) -> Prepared:
    """Read, tokenise (or load from the cache), mix and split what `options` names. All ranks may call this.

    template: may be None for stage pt. is_main: show progress, write tokenized_path. cache_dir: where the
    tokens are kept; None = default_cache_dir(). kind: of the examples; None = the stage's, see formats.KINDS.
    prompts: prepare the evaluation sets for generation too: the rows as prompts, their answers as labels.
    is_saved: whether tokenized_path is there, as rank 0 sees it; None: look.
    Raises UserError for anything wrong with data or options, TokenizedDataSaved after writing tokenized_path.
    """
    refuse_unguarded_worker()
    packing = stage == "pt" if options.packing is None else options.packing
    if packing and options.group_by_length:
        why = f"stage {stage} packs rows (packing={packing})"
        raise UserError(f"group_by_length: {why}; set one of the two to false")
    of_rows = ("cutoff_len", "truncation_strategy", "reserved_label_len", "train_on_prompt", "mask_history")
    of_sets = ("dataset_dir", "split", "max_samples", "overwrite_cache")
    of_rows, of_sets = ({key: getattr(options, key) for key in keys} for keys in (of_rows, of_sets))
    encode = EncodeOptions(kind or KINDS[stage], enable_thinking=enable_thinking, **of_rows)
    seed = options.seed_of_data(seed)
    cache = Path(cache_dir or default_cache_dir()) / "tokenised"
    of_sets |= {"hub": hub or HubAccess(), "workers": options.preprocessing_num_workers or 1}
    work = Tokeniser(stage, encode, template, tokenizer, seed, cache, is_main, **of_sets)
    saved = Path(options.tokenized_path) if options.tokenized_path is not None else None
    if prompts and template is None:
        raise UserError(f"template: generating from prompts needs one, also in stage {stage}")
    if saved is not None and (saved.exists() if is_saved is None else is_saved):
        given = [key for key in DECIDED if getattr(options, key) != getattr(DataOptions, key)]
        train, evaluation, report = work.load(saved, given)
        asked = {name: evaluation.pop(name) for name in list(evaluation) if name.startswith(PROMPTS)}
        if prompts and evaluation and not asked:
            why = "holds no prompts to generate from; make it anew with predict_with_generate"
            raise UserError(f"tokenized_path: the data in {saved} {why}")
        asked = {name.removeprefix(PROMPTS): store for name, store in asked.items() if prompts}
        return Prepared(train, evaluation, report, packing, work.encode.kind, asked)
    if not options.dataset and not options.eval_dataset:
        raise UserError("dataset: none is named; give a name of dataset_info.json or the path of a file")
    train, evaluation, report = (_prepare_stream if options.streaming else _prepare_stored)(options, work)
    asked = _prompt_sets(work, train, evaluation, report) if prompts else {}
    empty = [name for name, store in (asked or evaluation).items() if len(store) == 0]
    if empty:
        raise UserError(f"eval_dataset: no row of {empty[0]!r} can be evaluated on\n{report}")
    # an evaluation set whose rows have no answers is of use as prompts only
    evaluation = {name: store for name, store in evaluation.items() if len(store)}
    if saved is not None:
        if is_main:
            sets = ({} if train is None else {"train": train}) | evaluation
            sets |= {PROMPTS + name: store for name, store in asked.items()}
            reports = [asdict(entry) for entry in report.datasets]
            save_sets(saved, sets, {"keys": work.keys(), "report": reports})
        told = f"The tokenised data is in {saved}; run the same command again to train on it."
        raise TokenizedDataSaved(f"{report}\n{told}")
    return Prepared(train, evaluation, report, packing, work.encode.kind, asked)


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/anvil, else ~/.cache/anvil."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anvil"


Train = ExampleStore | RowStream | None


def _prepare_stored(options: DataOptions, work: Tokeniser) -> tuple[Train, Sets, DataReport]:
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
        how = (options.mix_strategy, options.interleave_probs, work.seed)
        try:
            refuse(not any(map(len, orders)), "dataset: no row can be trained on")
            train = ExampleStore(parts, options.dataset, mix_sets(orders, options.dataset, *how))
            if options.val_size > 0:
                train, evaluation["validation"] = train.split(options.val_size, work.seed)
        except UserError as error:  # too few are left: the report says what became of the rows
            raise UserError(f"{error}\n{DataReport(reports)}") from error
    for name, info in evals.items():
        files, order, report = work.dataset(info, "eval")
        evaluation[name] = ExampleStore([files], [name], np.stack([np.zeros_like(order), order], 1))
        reports.append(report)
    return train, evaluation, DataReport(reports)


def _prepare_stream(options: DataOptions, work: Tokeniser) -> tuple[Train, Sets, DataReport]:
    stored = replace(options, dataset=(), interleave_probs=(), val_size=0.0)
    evaluation, report = {}, DataReport([])
    if options.eval_dataset:
        _, evaluation, report = _prepare_stored(stored, work)
    infos = [work.find(name) for name in options.dataset]
    if not infos:
        return None, evaluation, report
    encoders = [work.encoder(info, k) for k, info in enumerate(infos)]
    opened = [None if info.kind == "file" else open_hub(info, work.hub, streaming=True) for info in infos]
    mixing = options.mix_strategy, options.interleave_probs, work.seed
    stream = RowStream(encoders, opened, *mixing, workers=work.workers)
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


def _prompt_sets(work: Tokeniser, train: Train, evaluation: Sets, report: DataReport) -> Sets:
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
        if name != "validation":  # rows without an answer have no place in the evaluation set, here they have
            index = np.stack([np.zeros_like(order), order], 1)
        sets[name] = ExampleStore(parts, store.datasets, index[index[:, 1] >= 0])
    return sets


def main(argv: list[str]) -> int:
    from checkpoints.hub import TOKENIZER_ONLY, ModelOptions, resolve_folder
    from options import config
    from options.errors import exit_status
    from pipeline.preview import PreviewOptions, in_colour, places_of_rows, token_table
    from templates import TemplateOptions, get_template
    from text.tokenizer import Tokenizer
    from training.setup import SECTIONS

    if argv[:1] != ["preview"]:
        print("usage: python data.py preview CONFIG [--index N] [words of train.py ...]", file=sys.stderr)
        return 0 if argv[:1] in (["--help"], ["-h"]) else 2

    def preview() -> int:
        """Show batch `index` of training, as rank 0 of 1 gets it."""
        sections = [PreviewOptions, DataOptions, TemplateOptions]
        about = {"program": "data.py preview", "description": "Show a training batch token by token."}
        place = next((n for n, word in enumerate(argv) if word.endswith("train.py")), 0)
        words = argv[place + 1 :]  # torchrun ... train.py CONFIG key=value is taken as it is
        chosen = config.load(words, sections, reads_files_of_others=True, others=SECTIONS, **about)
        run, options, named = (chosen[section] for section in sections)
        access = ModelOptions(cache_dir=run.cache_dir, hf_hub_token=run.hf_hub_token)
        name, revision = run.model_name_or_path, run.model_revision
        folder = resolve_folder("model_name_or_path", name, revision, access, TOKENIZER_ONLY)
        tokenizer, template = Tokenizer.from_folder(folder), None
        if run.stage != "pt":
            template = get_template(named.template, tokenizer.chat_template, named.default_system)
        hub = HubAccess(run.hf_hub_token, None, run.cache_dir)
        how = {"cache_dir": run.cache_dir, "enable_thinking": named.enable_thinking, "hub": hub}
        prepared = load_datasets(options, template, tokenizer, run.stage, seed=run.seed, **how)
        print(prepared.report)
        rows, batches = run.per_device_train_batch_size, run.gradient_accumulation_steps
        sizes = {"rows_per_batch": rows, "rows_per_update": rows * batches}
        loader = prepared.train_loader(options, **sizes, seed=run.seed)
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
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

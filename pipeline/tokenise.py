"""The examples of one data set: out of the cache, or tokenised now and kept there.

The cache key is made of contents: bytes of the files, tokenizer, the template's text, options, and the code
that makes tokens of them. A killed tokenisation goes on where it stopped; of several ranks that want the same
data one works and the others wait.

Run from Python: files, order, report = Tokeniser(...).dataset(find_dataset("identity", "data"), "train")
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from options.atomic import locked
from options.errors import DISK_FULL, UserError, say
from options.progress import Bar
from pipeline import sources
from pipeline.encoding import ChunkEncoder, EncodeOptions, encode_chunks
from pipeline.formats import check_stage
from pipeline.mixing import choose_rows, examples_of_rows
from pipeline.report import DataReport, DatasetReport
from pipeline.sources import DatasetInfo, HubAccess, Row, find_dataset, open_hub, read_rows
from pipeline.store import ExampleStore, StoreWriter, Tally, TokenArrays, load_sets, partial_folder
from text import render

# options that were used when tokenized_path was made, and are not looked at where it exists
DECIDED = ("dataset", "eval_dataset", "dataset_dir", "split", "max_samples", "val_size", "mix_strategy")
DECIDED += ("interleave_probs", "overwrite_cache", "preprocessing_num_workers")


@dataclass(frozen=True)
class Tokeniser:
    """How rows become examples, and where these are kept."""

    stage: str
    encode: EncodeOptions
    template: object
    tokenizer: object
    seed: int  # of num_samples
    cache: Path
    is_main: bool
    hub: HubAccess
    dataset_dir: str
    split: str
    max_samples: int | None
    overwrite_cache: bool
    workers: int

    def encoder(self, info: DatasetInfo, part: int) -> ChunkEncoder:
        return ChunkEncoder(info, part, self.template, self.tokenizer, self.encode)

    def find(self, name: str) -> DatasetInfo:
        info = find_dataset(name, self.dataset_dir, self.split)
        check_stage(info, self.stage, self.encode.kind)
        return info

    def for_prompts(self) -> "Tokeniser":
        return replace(self, encode=replace(self.encode, kind="prompt"))

    def keys(self) -> dict:
        """What decides the tokens of given rows."""
        document = self.encode.kind == "document"
        return {
            "version": code_version(),
            "tokenizer": tokenizer_key(self.tokenizer),
            "template": None if document else template_key(self.template),
            "options": asdict(self.encode),
        }

    def load(
        self, folder: Path, given: Sequence[str]
    ) -> tuple[ExampleStore | None, dict[str, ExampleStore], DataReport]:
        """What save_sets kept: training set, evaluation sets, report. Refused when tokenizer, template or
        options would now give other tokens; where only the programs changed, the report says it, and it names
        the `given` options of DECIDED."""
        meta, sets = load_sets(folder)
        unused = f"exists, so these are not used: {', '.join(given)}"
        notes = [f"note: tokenized_path: {folder} {unused}"] if given else []
        for name, now in self.keys().items():
            then = meta["keys"].get(name)
            if then != now and name == "version":
                changed = "by another version of this project, which may have given other tokens"
                notes.append(f"note: tokenized_path: the data in {folder} was made {changed}")
            elif then != now:
                if isinstance(then, dict) and isinstance(now, dict):
                    differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
                    then, now = ({key: each.get(key) for key in differing} for each in (then, now))
                made = f"the data in {folder} was made with another {name} ({then}, now {now})"
                raise UserError(f"tokenized_path: {made}. Give its options, or another tokenized_path.")
        reports = [DatasetReport(**(entry | {"tally": Tally(**entry["tally"])})) for entry in meta["report"]]
        return sets.pop("train", None), sets, DataReport(reports, notes)

    def dataset(
        self, info: DatasetInfo, role: str, only: np.ndarray | None = None
    ) -> tuple[TokenArrays, np.ndarray, DatasetReport]:
        """The examples of one data set, from the cache or made now, and the order in which to use them.

        only: numbers of the rows to read, in place of num_samples and max_samples.
        """
        warning = sources.check_sha1(info)
        opened = None if info.kind == "file" else open_hub(info, self.hub, streaming=False)
        limit, chosen, total = self.max_samples, None, 0
        if only is not None:
            limit, chosen = None, only
        elif info.num_samples is not None:
            total = sum(1 for _ in read_rows(info, opened))
            chosen = choose_rows(total, info.num_samples, self.seed)[:limit]
        left = ("name", "location", "file_sha1", "home")
        described = {name: value for name, value in asdict(info).items() if name not in left}
        key = self.keys() | {"data": sources.data_key(info, opened), "info": described}
        key |= {"limit": limit, "chosen": None if chosen is None else [total, self.seed]}
        if only is not None:
            key["only"] = hashlib.blake2b(only.astype("<i8").tobytes(), digest_size=16).hexdigest()
        name = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()

        def rows() -> Iterator[Row]:
            everything = read_rows(info, opened)
            if chosen is None:
                return islice(everything, limit)
            wanted = set(chosen.tolist())
            return (row for row in everything if row[0] in wanted)

        files = self._cached(self.cache / name, rows, self.encoder(info, 0))
        order = np.arange(len(files))
        warnings = [warning] if warning else []
        if self.template is not None and self.template.reads("strftime_now", of_message=False):
            made = date.fromtimestamp((self.cache / name / "meta.json").stat().st_mtime)
            if made != date.today():  # and a run that goes on needs the tokens that it began with
                anew = "overwrite_cache=true gives them today's"
                warnings.append(f"dataset {info.name!r}: the template writes a date, here {made}; {anew}")
        if self.encode.kind == "dialogue" and "kto_tag" in info.columns:
            why = f"stage {self.stage} trains on bad answers too"
            warnings.append(f"dataset {info.name!r}: columns.kto_tag is not used: {why}")
        report = DatasetReport(info.name, role, files.tally, self.encode.kind, warnings=tuple(warnings))
        if only is None and chosen is not None:
            order = examples_of_rows(files.rows, chosen)
            report.left_out, report.repeated = total - len(np.unique(chosen)), len(order) - len(files)
        return files, order, report

    def _cached(self, folder: Path, rows, encoder: ChunkEncoder) -> TokenArrays:
        """Open `folder`, or tokenise into it. A folder that is damaged is made again."""
        with locked(folder):
            anew = self.overwrite_cache and self.is_main
            if folder.exists() and not anew:
                try:
                    return TokenArrays.open(folder)
                except UserError as error:
                    say(f"cache: {error}; tokenising again")
            if anew:
                shutil.rmtree(partial_folder(folder), ignore_errors=True)
            self._write(folder, rows, encoder)
            return TokenArrays.open(folder, check=False)

    def _write(self, folder: Path, rows, encoder: ChunkEncoder) -> None:
        try:
            writer = StoreWriter(folder)
        except UserError:  # what a killed run left does not fit together
            shutil.rmtree(partial_folder(folder))
            writer = StoreWriter(folder)
        done = writer.tally.read
        todo = islice(rows(), done, None)
        try:
            shown = {"desc": f"tokenising {encoder.info.name}", "unit": " rows", "initial": done}
            with Bar(**shown, disable=not self.is_main) as bar:
                for chunk in encode_chunks(todo, encoder, self.workers):
                    writer.append(chunk)
                    bar.update(chunk.tally.read)
            writer.finish()
        except (UserError, OSError) as error:
            # a bad row: once the file is mended its key is another one; a full disk: whoever makes room on it
            # should not have to look for what was half-written here
            if isinstance(error, UserError) or error.errno in DISK_FULL:
                with suppress(OSError):
                    writer.close()
                shutil.rmtree(writer.partial)
            raise


@functools.cache
def code_version() -> str:
    """A hash of the programs that make tokens of rows: this room, text/, and the libraries they call."""
    digest = hashlib.blake2b(digest_size=16)
    for room in (Path(__file__).parent, Path(render.__file__).parent):
        for path in sorted(room.glob("*.py")):
            digest.update(path.read_bytes())
    digest.update(f"{version('tokenizers')} {version('jinja2')}".encode())
    return digest.hexdigest()


def template_key(template) -> str:
    """A hash of a template's text, whichever kind it is; what its code makes of it is in code_version."""
    described = f"{type(template).__name__} {json.dumps(asdict(template), sort_keys=True)}"
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def tokenizer_key(tokenizer) -> str:
    """A hash of tokenizer.json, of the flags of added tokens, and of what else decides the ids of a text."""
    path = None if tokenizer.folder is None else tokenizer.folder / "tokenizer.json"
    made_of = json.dumps(tokenizer.pipeline()).encode() if path is None else path.read_bytes()
    known = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.vocab_size, tokenizer.rows]
    known += [tokenizer.special_tokens, tokenizer.added_tokens()]
    return hashlib.blake2b(made_of + json.dumps(known).encode(), digest_size=16).hexdigest()

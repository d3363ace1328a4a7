"""The folder of a training run: checkpoint-<step> that is complete or absent, resuming, the result.

A checkpoint is written under a temporary name, flushed to the disk, then renamed, so a kill -9 or a full disk
at any moment leaves the earlier ones untouched. It holds the weights in Hugging Face or PEFT layout,
trainer_state.json, `training_state.pt` (optimizer, scaler, counters), one `rank_state_<rank>.pt` per rank,
both read with weights_only=True, and checksums.json of all these files. A run continues only with the
settings that decided its weights.
"""

import hashlib
import itertools
import os
import re
import secrets
import shutil
import socket
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoints.huggingface import restore_trained
from checkpoints.safetensors_files import read_plain
from checkpoints.source import RUN_CONFIG
from model import Decoder
from options import json_reader
from options.atomic import TEMPORARY, alone_in, atomic_file, flush, flush_tree, remove, remove_folder
from options.config import Config
from options.errors import StopRun, UserError, is_of_memory, refuse, say
from parallel.world import World
from text.tokenizer import NAMED_TEMPLATES, TOKENIZER_FILES
from training import layout
from training.instruments import Totals, joined
from training.layout import Layout
from training.lost import lost
from training.monitor import ALL_RESULTS, read_results, write_json

STATE_FILE, TRAINER_STATE, CHECKSUMS = "training_state.pt", "trainer_state.json", "checksums.json"
RESULTS = "train_results.json"
LAUNCHERS = ".launchers"  # of the ranks that have begun; torchrun may start theirs again
SAVE_REQUEST = "SAVE"  # `touch output_dir/SAVE` asks a running training for a checkpoint
# what an overwriting run removes beside the checkpoints; weights stay until the new ones replace them
LOGS = (TRAINER_STATE, RESULTS, "eval_results.json", "predict_results.json", ALL_RESULTS)
LOGS += ("trainer_log.jsonl", "training_loss.png", "generated_samples.jsonl", "generated_predictions.jsonl")
WEIGHTS = ("adapter_config.json", "adapter_model.safetensors", "value_head.safetensors")
WEIGHTS += ("model*.safetensors", "model.safetensors.index.json")
ENDINGS = {Path(name).suffix for name in (*LOGS, *WEIGHTS, *TOKENIZER_FILES, RUN_CONFIG)}  # of what it writes
PIECES, PIECE_BYTES = 256, 2**16  # 16 MiB of each file: some ms, where all of a large model takes minutes
_NAME = re.compile(r"checkpoint-(\d+)")
AS_START = "give its weights as adapter_name_or_path or model_name_or_path"


@dataclass
class Progress:
    """Counters that survive a kill beside weights, optimizer and random numbers. Equal on all ranks."""

    step: int = 0  # updates done
    logged_tokens: int = 0  # trained through by all ranks up to the last log line, prompt tokens included
    logged_examples: int = 0
    logged_loss: float = 0.0  # sum over updates up to the last log line
    seconds: float = 0.0  # of training, in all processes that worked on this run
    best_metric: float | None = None
    best_checkpoint: str | None = None
    stale_evaluations: int = 0  # evaluations since the last gain
    evaluation_due: bool = False  # that after the last update, which a signal has put off

    def count(self, since: Totals) -> None:
        """What a log line told of."""
        self.logged_loss += since.loss
        self.logged_tokens += since.tokens
        self.logged_examples += since.examples

    def track(self, value: float | None, gain: bool) -> None:
        """The evaluation after this step measured `value`."""
        self.evaluation_due = False
        self.stale_evaluations = 0 if gain else self.stale_evaluations + 1
        if gain:
            self.best_metric, self.best_checkpoint = value, f"checkpoint-{self.step}"

    def out_of_patience(self, patience: int | None) -> bool:
        return patience is not None and self.stale_evaluations >= patience

    @property
    def already_trained(self) -> str:
        remedy = "raise num_train_epochs or max_steps to go on, or set overwrite_output_dir=true"
        return f"is already trained to step {self.step}; {remedy} to start anew"

    def results(self, epoch: float, peak_memory: float) -> dict[str, float]:
        """train_results.json, in the Hugging Face trainer's names.  peak_memory: GB."""
        speed = {
            "train_runtime": round(self.seconds, 2),
            "train_samples_per_second": round(self.logged_examples / self.seconds, 3),
            "train_steps_per_second": round(self.step / self.seconds, 3),
            "train_tokens_per_second": round(self.logged_tokens / self.seconds, 1),
        }
        loss = self.logged_loss / max(self.step, 1)  # mean over all updates of the run
        done = {"train_steps": self.step, "peak_memory": round(peak_memory, 3)}
        return {"epoch": round(epoch, 4), "train_loss": loss} | speed | done

    def trainer_state(self, output_dir: Path, total_steps: int, epoch: float, tokens: int) -> dict:
        """The Hugging Face trainer's trainer_state.json, but for log_history."""
        best = None if self.best_checkpoint is None else str(output_dir / self.best_checkpoint)
        state = {"global_step": self.step, "max_steps": total_steps, "epoch": round(epoch, 4)}
        state |= {"num_input_tokens_seen": tokens, "best_metric": self.best_metric}
        return state | {"best_model_checkpoint": best}


# Which folder, and which checkpoint in it


@contextmanager
def lock_folder(output_dir: Path, world: World) -> Iterator[None]:
    """Make the folder, keep other trainings out of it while the block runs; a full disk there is StopRun.

    Rank 0 holds the lock (alone_in); UserError on all ranks where it does not get it.
    """
    with ExitStack() as held:
        problem = None
        if world.is_main:
            try:
                held.enter_context(alone_in(output_dir, "output_dir", "training"))
            except (UserError, StopRun, OSError) as error:
                problem = error
        if world.any(problem is not None):
            raise problem or UserError(f"output_dir: {output_dir}: rank 0 cannot use it")
        with naming_lost(output_dir, world):
            yield


@contextmanager
def naming_lost(output_dir: Path, world: World, progress: Progress | None = None) -> Iterator[None]:
    """Where another rank was killed, is stopped or does not answer within ddp_timeout: StopRun that names it,
    the last step and the checkpoint that there is."""
    try:
        yield
    except RuntimeError as error:  # of a collective
        if (gone := lost(error, world)) is None:
            raise
        last, there = f" after step {progress.step}" if progress else "", list_checkpoints(output_dir)
        again = f"continues from {there[-1]}" if there else "starts anew: there is no checkpoint yet"
        raise StopRun(f"{gone}{last}; the same command {again}") from error


def launcher() -> str:
    """Who has started this process."""
    return f"{socket.gethostname()} {os.getppid()}"


def begun_before(output_dir: Path, world: World) -> bool:
    """Whether torchrun starts the ranks again (--max-restarts) of a run that had begun in the folder: then
    what it began with, overwrite_output_dir or another checkpoint, is behind it. All ranks call it."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return False
    path, ours = output_dir / LAUNCHERS, set(world.gather(launcher()))
    return path.is_file() and not ours.isdisjoint(path.read_text().splitlines())


def require_common_disk(output_dir: Path, world: World) -> None:
    """UserError where a rank does not see what rank 0 writes into the folder: it could not save its share,
    nor find what it resumes from. All ranks call it."""
    if world.size == 1:
        return
    mark = output_dir / f"{TEMPORARY}seen-{world.gather(secrets.token_hex(8))[0]}"
    if world.is_main:
        mark.touch()
    world.barrier()
    seen = world.gather([mark.exists(), socket.gethostname()])
    if world.is_main:
        mark.unlink()
    apart = [f"rank {rank} on {host}" for rank, (sees, host) in enumerate(seen) if not sees]
    found = f"what rank 0 on {seen[0][1]} writes there is not seen by {', '.join(apart[:4])}"
    remedy = "give an absolute path on a disk that all nodes share"
    refuse(apart, f"output_dir: {output_dir}: {found}; {remedy}")


def refuse_foreign(output_dir: Path, named: Collection[Path]) -> None:
    """UserError unless the folder is new, empty or of a run, whose files a later run may replace and remove.
    named: files and folders of this run that may lie there already."""
    home = output_dir.resolve()
    names = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    ours = home in named or any(name in (RUN_CONFIG, *LOGS) or _NAME.fullmatch(name) for name in names)
    expected = {p.relative_to(home).parts[0] for p in named if p.is_relative_to(home) and p != home}
    expected |= {SAVE_REQUEST, "runs", "wandb", "mlruns"}
    strange = [name for name in names if name[0] != "." and not name.endswith((".log", ".out", ".err"))]
    strange = [name for name in strange if name not in expected]
    top = "the root of the disk" if home == home.parent else "a home folder" if home == Path.home() else ""
    remedy = "name a new or an empty folder, for example saves/first"
    refuse(top, f"output_dir: {output_dir} is {top}; {remedy}")
    held = f"{', '.join(strange[:3])}{', ...' if len(strange) > 3 else ''}"
    refuse(strange and not ours, f"output_dir: {output_dir} holds {held} and no earlier run; {remedy}")
    for name in names:
        in_the_way = Path(name).suffix in ENDINGS and (output_dir / name).is_dir()
        refuse(
            in_the_way, f"output_dir: {output_dir / name} is a folder where a run writes files; move it away"
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def finished(output_dir: Path) -> bool:
    """Whether a training came to its end there: all_results.json, its last file, has its numbers."""
    return (output_dir / RESULTS).exists() and "train_loss" in read_results(output_dir)


def find_resume(
    output_dir: Path, resume_from_checkpoint: str | None, overwrite: bool, again: bool = False
) -> list[Path]:
    """Checkpoints to continue from, the last one if it is whole; none to start anew. UserError when the
    folder holds something else.

    resume_from_checkpoint: None = those in output_dir unless `overwrite`; "true" the same but there has to be
    one; "false" = start anew; else a path. again: see begun_before.
    """
    choice, key = (resume_from_checkpoint or "").lower(), "resume_from_checkpoint"
    checkpoints = list_checkpoints(output_dir)
    if again and checkpoints:
        return checkpoints
    if choice in ("true", "yes", "1"):
        refuse(not checkpoints, f"{key}: no complete checkpoint-<step> in {output_dir}")
        return checkpoints
    anew = choice in ("false", "no", "0")
    if choice and not anew:
        path = Path(resume_from_checkpoint)
        incomplete = f"{key}: {path} is no complete checkpoint (it has no {STATE_FILE})"
        refuse(not (path / STATE_FILE).is_file(), incomplete)
        return [path]
    if overwrite:
        return []
    if anew and checkpoints:  # they would be rotated, or resumed from, as if they were this run's
        remedy = "choose another output_dir, or set overwrite_output_dir=true to remove the old checkpoints"
        held = f"{output_dir} holds {checkpoints[-1].name} of an earlier run"
        raise UserError(f"{key}: false, but {held}; {remedy}")
    if checkpoints:
        return checkpoints
    remedy = "choose another folder or set overwrite_output_dir=true"
    finished = f"{output_dir} holds a finished run and no checkpoint to continue"
    refuse((output_dir / RESULTS).exists(), f"output_dir: {finished}; {remedy}")
    return []


def refuse_to_destroy(
    output_dir: Path, overwrite: bool, sources: Mapping[str, Sequence[Path]], trained_on: Path | None
) -> None:
    """UserError when the run would replace or remove what it is made from. sources: key -> folders;
    trained_on: the one of adapter_name_or_path that the result may replace."""
    home = output_dir.resolve()
    doomed = [checkpoint.resolve() for checkpoint in list_checkpoints(output_dir)] if overwrite else []
    for key, source in ((key, folder) for key, folders in sources.items() for folder in folders):
        path, another = source.resolve(), "choose another output_dir"
        replaced = path == home and (key, source) != ("adapter_name_or_path", trained_on)
        refuse(replaced, f"output_dir: {output_dir} is also {key}, which the result would replace; {another}")
        removed = any(path.is_relative_to(checkpoint) for checkpoint in doomed)
        refuse(removed, f"overwrite_output_dir: would remove {source}, which {key} names; {another}")


def begin(
    output_dir: Path, resume: Path | None, overwrite: bool, config: Config, best: str | None, world: World
) -> None:
    """Make the folder ready for this run, and leave the resolved configuration in it. best: the name of the
    checkpoint that a resumed run holds for the best. All ranks call it, rank 0 does it."""
    launchers = world.gather(launcher())
    if not world.is_main:
        return
    for path in output_dir.glob(f"{TEMPORARY}*"):  # what killed processes left
        remove(path)
    (output_dir / SAVE_REQUEST).unlink(missing_ok=True)
    checkpoints = list_checkpoints(output_dir)
    for path in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(path.name) and path not in checkpoints:
            say(f"note: {path}: it has no {STATE_FILE}, so it counts as none")
    if resume is None and overwrite:
        for path in checkpoints:
            remove_folder(path)
        for name in (*LOGS, "runs/events.out.tfevents.*"):
            for path in output_dir.glob(name):
                path.unlink()
        if checkpoints:
            removed = f"removed {len(checkpoints)} checkpoints of the earlier run"
            say(f"note: overwrite_output_dir: {removed}")
    match = _NAME.fullmatch(resume.name) if resume is not None else None
    for path in checkpoints if match else ():
        if int(path.name.rpartition("-")[2]) > int(match[1]):
            aside = path.with_name(f"old-{path.name}")
            remove_folder(aside)
            path.rename(aside)
            say(f"note: {path.name} is newer than {resume.name}, so it is now {aside.name}")
    if resume is not None and resume.parent.resolve() == output_dir.resolve():
        rotate(output_dir, config.values["save_total_limit"], best)  # a kill may have come before
    with atomic_file(output_dir / RUN_CONFIG) as temporary:
        config.save(temporary)
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        (output_dir / LAUNCHERS).write_text("\n".join(launchers))


def wants_checkpoint(output_dir: Path, world: World) -> bool:
    """Whether somebody touched output_dir/SAVE; the file is taken away."""
    if not (world.is_main and (output_dir / SAVE_REQUEST).exists()):
        return False
    (output_dir / SAVE_REQUEST).unlink()
    return True


def load_best(model: Decoder, output_dir: Path, progress: Progress, metric: str, world: World) -> str:
    """Give the model the weights that evaluated best, if they were saved; a line that says so."""
    best = output_dir / progress.best_checkpoint
    if not best.is_dir():
        return f"note: the best evaluation was at {best.name}, which was not saved; the last weights stay"
    check_files(best, world)
    restore_trained(model, best)
    return f"best: {best}, {metric} {progress.best_metric:.4f}"


# Writing


@contextmanager
def writing_checkpoint(final: Path, world: World) -> Iterator[Path]:
    """A folder for all ranks to write into, which becomes the checkpoint `final` at the end. Or StopRun."""
    temporary = final.with_name(f"{TEMPORARY}{final.name}")
    with _of_all_ranks(final, temporary, world):
        yield temporary
    names = sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())
    names = world.gather(names if world.is_main else None)[0]  # one listing, or a file may be nobody's
    sums = world.gather(checksums(temporary, names[world.rank :: world.size]))
    with _of_all_ranks(final, temporary, world, begins=False):
        if world.is_main:
            write_json(temporary / CHECKSUMS, dict(itertools.chain(*map(dict.items, sums))))
    if world.is_main:
        remove_folder(final)
        temporary.rename(final)
        flush(final.parent)
    world.barrier()


@contextmanager
def writing_result(output_dir: Path, world: World) -> Iterator[Path]:
    """A folder whose files go into output_dir at the end; weights of an earlier run there go. Or StopRun."""
    with _of_all_ranks(output_dir, output_dir / f"{TEMPORARY}result", world) as temporary:
        yield temporary
    if world.is_main:
        fresh = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        for path in itertools.chain(*map(output_dir.glob, (*WEIGHTS, NAMED_TEMPLATES))):
            if path.relative_to(output_dir) not in fresh:
                path.unlink()
        for path in fresh:
            (output_dir / path).parent.mkdir(exist_ok=True)
            os.replace(temporary / path, output_dir / path)
        remove_folder(temporary)
        flush(output_dir)
    world.barrier()


@contextmanager
def _of_all_ranks(final: Path, temporary: Path, world: World, begins: bool = True) -> Iterator[Path]:
    """The folder `temporary`, on the disk when the block ends; where a rank fails, no folder and StopRun.
    begins: with nothing in it."""
    try:
        with together(world):
            if world.is_main and begins:
                remove_folder(temporary)
                temporary.mkdir(parents=True)
        with together(world):
            yield temporary
            if world.is_main:
                flush_tree(temporary)
    except Unwritten as failure:
        if not world.is_main:
            raise StopRun(f"{final} could not be written ({failure})") from failure
        free = shutil.disk_usage(final.parent).free / 1e9
        shutil.rmtree(temporary, ignore_errors=True)
        left = "Nothing half-written is left and earlier checkpoints are complete"
        text = f"output_dir: {final} could not be written ({failure}; {free:.2f} GB are free). {left}"
        raise StopRun(f"{text}; make room and run the same command to continue") from failure


class Unwritten(Exception):
    """Why a rank could not write: on all ranks."""


@contextmanager
def together(world: World) -> Iterator[None]:
    """What one rank cannot write raises Unwritten on all of them: none waits for it in what comes next. All
    ranks enter it; within, nobody may wait for a rank that has failed."""
    failure, reason = None, None
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save on a full disk
        if is_of_memory(error):  # no matter of the disk, and others may wait for what this rank was to give
            raise
        failure, reason = error, str(error).splitlines()[0]
    reasons = world.gather(reason)
    for rank in (rank for rank, each in enumerate(reasons) if each is not None):
        raise Unwritten(reasons[rank] if rank == 0 else f"rank {rank}: {reasons[rank]}") from failure


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """CRC-32 and size of each file, by its name in the folder."""

    def checksum(name: str) -> str:
        value = 0
        with open(folder / name, "rb") as file:
            while piece := file.read(2**22):
                value = zlib.crc32(piece, value)
            return f"{value:08x} {file.tell()}"

    names = list(names)
    with ThreadPoolExecutor(4) as pool:  # crc32 runs beside other threads
        return dict(zip(names, pool.map(checksum, names)))


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the newest and the one named `keep` (the best) stay."""
    checkpoints = list_checkpoints(output_dir)
    removable = [path for path in checkpoints[:-1] if path.name != keep]
    for path in removable[: max(0, len(checkpoints) - limit)] if limit else ():
        remove_folder(path)


# Reading


def read_checkpoint(
    folder: Path, fingerprint: Mapping[str, str], world: World, grouped: bool, updates: int
) -> dict:
    """The state in a checkpoint and this rank's own. Raises UserError unless this run may continue it: with
    the settings of the fingerprint, but for keys that are new in this version, and for how the rows of an
    update are divided. grouped: see Layout.same_rows; updates: of a rollout."""
    state = read_state(folder / STATE_FILE)
    before, now = state["fingerprint"], fingerprint
    layouts = Layout.read(before), Layout.read(now)
    free = layout.KEYS if layouts[0].same_rows(layouts[1], grouped) else ()
    differing = [key for key in now if key not in free and before.get(key, now[key]) != now[key]]
    changed = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in differing)
    remedy = f"choose another output_dir ({AS_START}), or set overwrite_output_dir=true to start anew"
    found = f"cannot be continued with other settings: {changed}. Restore them"
    refuse(differing, f"{folder}: {found}, {remedy}")
    remedy = f"set overwrite_output_dir=true, or {AS_START} of another run"
    lacking = "saved with save_only_model, so there is no optimizer state to continue from"
    refuse("optimizer" not in state, f"{folder}: {lacking}; {remedy}")
    if layouts[0] == layouts[1]:
        own = read_state(folder / f"rank_state_{world.rank}.pt")
        return state | {"rank": own | {"data": [own.get("data", {})]}}
    own = of_another_layout(folder, layouts[0], world)
    layout.refuse_within_rollout(folder, own["stage"], layouts[0], updates)
    return state | {"rank": own}


def of_another_layout(folder: Path, then: Layout, world: World) -> dict:
    """This rank's own state where rows lay on other ranks when it was written: what all of them counted since
    the last log line goes to the first, random numbers are drawn anew, `data` has the states of all."""
    owners = range(0, then.ranks, then.ranks // then.data)
    states = [read_state(folder / f"rank_state_{rank}.pt") for rank in owners]
    windows = [state["window"] for state in states] if world.data_rank == 0 else []
    data = [state.get("data", {}) for state in states]
    return states[0] | {"window": joined(windows, states[0]["window"]), "random": None, "data": data}


def newest_whole(checkpoints: Sequence[Path], world: World) -> Path | None:
    """The last of these whose files are as they were written; None of none. UserError, which names the last
    one's damage, where none is whole. All ranks call it."""
    damage = []
    for path in reversed(checkpoints):
        try:
            check_files(path, world)
        except UserError as error:
            damage.append(error)
            continue
        for each in damage:
            world.print(f"note: {str(each).partition('; ')[0]}; going back to {path.name}")
        return path
    if damage:
        raise damage[0]
    return None


def check_files(folder: Path, world: World) -> None:
    """UserError for a checkpoint with a file that is not as it was written: each rank looks at some of them.
    All ranks call it."""
    problem, path = None, folder / CHECKSUMS
    if not world.gather(path.is_file())[0]:
        world.print(f"note: {folder}: its files are not checked: no {CHECKSUMS}, as older versions leave it")
        return
    try:
        written = json_reader.read(path)
        mine = sorted(written)[world.rank :: world.size]
        found = checksums(folder, [name for name in mine if (folder / name).is_file()])
        for name in mine:
            if found.get(name) != written[name]:
                why = "its bytes are not those that were written"
                missing = f"it is not there, though {CHECKSUMS} names it"
                problem = damaged(folder / name, why if name in found else missing, folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # no JSON, no UTF-8, no names
        problem = damaged(path, str(error))
    for told in world.gather(None if problem is None else str(problem)):
        refuse(told is not None, told)


def read_state(path: Path) -> dict:
    """Our own state file, without unpickling code. Raises UserError when it is missing or damaged."""
    if not path.is_file():
        raise damaged(path, "it is not there")
    try:
        state = read_plain(path)
    except UserError as error:
        raise damaged(path, str(error)) from error
    lacking = {"fingerprint", "progress"} if path.name == STATE_FILE else {"random", "window", "stage"}
    if not isinstance(state, dict) or lacking - state.keys():
        raise damaged(path, "it lacks what a training writes there")
    return state


def damaged(path: Path, why: str, folder: Path | None = None) -> UserError:
    """What to say of a file of a checkpoint that cannot be used; it lies in `folder`, or below."""
    folder = folder or path.parent
    others = [other.name for other in list_checkpoints(folder.parent) if other != folder]
    there = f" (there are {', '.join(others)})" if others else ""
    remedy = f"give another checkpoint as resume_from_checkpoint{there}, or set overwrite_output_dir=true"
    return UserError(f"{path}: damaged ({why}); {remedy} to start anew")


def read_history(folder: Path | None) -> list[dict]:
    """log_history of a checkpoint's trainer_state.json; of no checkpoint the empty one."""
    if folder is None:
        return []
    path = folder / TRAINER_STATE
    try:
        return list(json_reader.read(path, nan=True)["log_history"])
    except (OSError, UserError, KeyError, TypeError) as error:  # missing, damaged, another object
        raise damaged(path, f"{type(error).__name__}: {error}") from error


def fingerprint(config: Config, world: World, described: Mapping[str, str]) -> dict[str, str]:
    """Every setting that decides the weights, as text; `described`: what the options name, but do not say."""
    deciding = [key.name for key in config.options.values() if not (key.resumable or key.secret)]
    kept = {name: str(config.values[name]) for name in deciding}
    return kept | Layout.of(config, world).described | described


def digest(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and bytes of these files; of a large one pieces, which any training changes."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in sorted(paths):
        size = path.stat().st_size
        hashed.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(PIECE_BYTES, size // PIECES)):
                file.seek(start)
                hashed.update(file.read(PIECE_BYTES))
    return hashed.hexdigest()


def random_state(device: torch.device) -> dict:
    """State of the random-number generators that this rank uses."""
    of_gpu = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | of_gpu


def restore_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)

"""A training run and its folder: options, checkpoint-<step> that is complete or absent, resuming, the result,
signals.

A checkpoint is written under a temporary name, flushed to the disk, then renamed, so a kill -9 or a full disk
at any moment leaves the earlier ones untouched. It holds the weights in Hugging Face or PEFT layout,
trainer_state.json, `training_state.pt` (optimizer, scaler, counters) and one `rank_state_<rank>.pt` per rank;
both are read with weights_only=True. A run may continue only with the settings that decided its weights so
far (`fingerprint`).
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from checkpoints.safetensors_files import read_plain
from options.config import Config
from options.errors import StopRun
from parallel.world import World

STATE_FILE, TRAINER_STATE = "training_state.pt", "trainer_state.json"
RESULTS = "train_results.json"  # written last: a run that has it is finished
SAVE_REQUEST = "SAVE"  # `touch output_dir/SAVE` asks a running training for a checkpoint
# what an overwriting run removes beside the checkpoints; weights stay until the new ones replace them
LOGS = (
    "trainer_log.jsonl",
    TRAINER_STATE,
    RESULTS,
    "eval_results.json",
    "predict_results.json",
    "all_results.json",
    "training_loss.png",
    "generated_samples.jsonl",
    "generated_predictions.jsonl",
)
WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "model*.safetensors",
    "model.safetensors.index.json",
    "value_head.safetensors",
)
PIECES, PIECE_BYTES = 256, 2**16  # 16 MiB of each file: some ms, where all of a large model takes minutes
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".tmp-"
_GRACE_SECONDS = 1.0  # a terminal and a launcher may both pass on one Ctrl-C; a later one means it


@dataclass
class Progress:
    """Counters that have to survive a kill beside weights, optimizer and random numbers. Equal on all
    ranks."""

    step: int = 0  # updates done
    logged_tokens: int = 0  # trained through by all ranks up to the last log line, prompt tokens included
    logged_examples: int = 0
    logged_loss: float = 0.0  # sum over updates up to the last log line
    seconds: float = 0.0  # of training, in all processes that worked on this run
    best_metric: float | None = None
    best_checkpoint: str | None = None
    stale_evaluations: int = 0  # evaluations since the last gain


def trainer_state(output_dir: Path, progress: Progress, total_steps: int, epoch: float, tokens: int) -> dict:
    """The Hugging Face trainer's trainer_state.json, but for log_history."""
    best = None if progress.best_checkpoint is None else str(output_dir / progress.best_checkpoint)
    return {
        "global_step": progress.step,
        "max_steps": total_steps,
        "epoch": round(epoch, 4),
        "num_input_tokens_seen": tokens,
        "best_metric": progress.best_metric,
        "best_model_checkpoint": best,
    }


# Which folder, and which checkpoint in it


@contextmanager
def lock_folder(output_dir: Path, world: World) -> Iterator[None]:
    """Make the folder and keep other trainings out of it while the block runs. Raises ValueError.

    The lock (flock on the folder itself, held by rank 0) leaves no file and ends with the process, however it
    ends.
    """
    handle, problem = -1, ""
    if world.is_main:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            handle = os.open(output_dir, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "another training is writing into it; choose another folder or wait for its end"
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                problem = f"cannot be made or written ({error.strerror})"
            else:
                world.print(
                    f"note: the file system of {output_dir} knows no locks; run one training in it at a time"
                )
        if not problem and not os.access(output_dir, os.W_OK):
            problem = "cannot be written (permission denied)"
    try:
        if world.any(bool(problem)):
            raise ValueError(f"output_dir: {output_dir}: {problem or 'rank 0 cannot use it'}")
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def find_resume(output_dir: Path, resume_from_checkpoint: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, or None to start anew. Raises ValueError when the folder holds
    something else.

    resume_from_checkpoint: None = the newest in output_dir unless `overwrite`; "true" the same but there has
    to be one; "false" = start anew; else a path.
    """
    choice = (resume_from_checkpoint or "").lower()
    checkpoints = list_checkpoints(output_dir)
    if choice in ("true", "yes", "1"):
        if not checkpoints:
            raise ValueError(f"resume_from_checkpoint: no complete checkpoint-<step> in {output_dir}")
        return checkpoints[-1]
    anew = choice in ("false", "no", "0")
    if choice and not anew:
        path = Path(resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {path} is no complete checkpoint (it has no {STATE_FILE})"
            )
        return path
    if overwrite:
        return None
    if anew and checkpoints:
        # they would be rotated, or resumed from, as if they were this run's
        raise ValueError(
            f"resume_from_checkpoint: false, but {output_dir} holds {checkpoints[-1].name} of an earlier "
            "run; choose "
            "another output_dir, or set overwrite_output_dir=true to remove the old checkpoints"
        )
    if checkpoints:
        return checkpoints[-1]
    if (output_dir / RESULTS).exists():
        raise ValueError(
            f"output_dir: {output_dir} holds a finished run and no checkpoint to continue; "
            "choose another folder or set overwrite_output_dir=true"
        )
    return None


def refuse_to_destroy(
    output_dir: Path, overwrite: bool, sources: Mapping[str, Sequence[Path]], trained_on: Path | None
) -> None:
    """ValueError when the run would replace or remove what it is made from. sources: key -> folders;
    trained_on: the one of adapter_name_or_path that the result may replace."""
    home = output_dir.resolve()
    doomed = [checkpoint.resolve() for checkpoint in list_checkpoints(output_dir)] if overwrite else []
    for key, source in ((key, folder) for key, folders in sources.items() for folder in folders):
        path = source.resolve()
        if path == home and (key, source) != ("adapter_name_or_path", trained_on):
            raise ValueError(
                f"output_dir: {output_dir} is also {key}, which the result would replace; choose another"
            )
        if any(path.is_relative_to(checkpoint) for checkpoint in doomed):
            raise ValueError(
                f"overwrite_output_dir: would remove {source}, which {key} names; choose another output_dir"
            )


def prepare_folder(output_dir: Path, resume: Path | None, overwrite: bool) -> list[str]:
    """Remove what killed processes left, and what would be mistaken for this run's. Gives notices."""
    for path in output_dir.glob(f"{_TEMPORARY}*"):
        _remove(path) if path.is_dir() else path.unlink()
    notices = []
    (output_dir / SAVE_REQUEST).unlink(missing_ok=True)
    if resume is None and overwrite:
        checkpoints = list_checkpoints(output_dir)
        for path in checkpoints:
            _remove(path)
        for name in (*LOGS, "runs/events.out.tfevents.*"):
            for path in output_dir.glob(name):
                path.unlink()
        if checkpoints:
            notices.append(f"overwrite_output_dir: removed {len(checkpoints)} checkpoints of the earlier run")
    if resume is not None:
        step = int(match[1]) if (match := _NAME.fullmatch(resume.name)) else -1
        for path in list_checkpoints(output_dir):
            if int(path.name.rpartition("-")[2]) > step >= 0:
                aside = path.with_name(f"old-{path.name}")
                if aside.exists():
                    _remove(aside)
                path.rename(aside)
                notices.append(f"{path.name} is newer than {resume.name}, so it was renamed {aside.name}")
    return notices


def _remove(path: Path) -> None:
    """Remove a folder; renamed first, so that a kill half-way never leaves one that looks complete."""
    doomed = path if path.name.startswith(_TEMPORARY) else path.with_name(f"{_TEMPORARY}old-{path.name}")
    if doomed != path:
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


# Writing


def write_checkpoint(
    output_dir: Path, step: int, world: World, write: Callable[[Path], None], state: dict
) -> Path:
    """Make checkpoint-<step>: `write(folder)` on rank 0 puts weights and STATE_FILE there, every rank its own
    state.

    Raises StopRun (with what was free) after removing the half-written folder; earlier checkpoints are
    untouched.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f"{_TEMPORARY}checkpoint-{step}"

    def write_all(folder: Path) -> None:
        torch.save(state, folder / f"rank_state_{world.rank}.pt")
        _flush(folder / f"rank_state_{world.rank}.pt")
        if world.is_main:
            write(folder)
            _flush_tree(folder)

    _write_or_stop(temporary, final, world, write_all)
    if world.is_main:
        if final.exists():
            _remove(final)
        temporary.rename(final)
        _flush(output_dir)
    world.barrier()
    return final


def write_result(output_dir: Path, world: World, write: Callable[[Path], None]) -> None:
    """Put the files of `write(folder)` into output_dir; weights of an earlier run there go. Raises
    StopRun."""
    temporary = output_dir / f"{_TEMPORARY}result"

    def write_all(folder: Path) -> None:
        if world.is_main:
            write(folder)
            _flush_tree(folder)

    _write_or_stop(temporary, output_dir, world, write_all)
    if world.is_main:
        fresh = {path.name for path in temporary.iterdir()}
        for pattern in WEIGHTS:
            for path in output_dir.glob(pattern):
                if path.name not in fresh:
                    path.unlink()
        for path in temporary.iterdir():
            os.replace(path, output_dir / path.name)
        temporary.rmdir()
        _flush(output_dir)
    world.barrier()


def _write_or_stop(temporary: Path, final: Path, world: World, write: Callable[[Path], None]) -> None:
    failure: Exception | None = None
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            failure = error
    world.barrier()
    try:
        if failure is None:
            write(temporary)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch.save reports a full disk as RuntimeError
        failure = error
    if not world.any(failure is not None):
        return
    if not world.is_main:
        raise StopRun(f"{final} could not be written ({failure or 'another rank failed'})") from failure
    reason = str(failure or "another rank failed").splitlines()[0]
    free = shutil.disk_usage(final.parent).free / 1e9
    shutil.rmtree(temporary, ignore_errors=True)
    raise StopRun(
        f"output_dir: {final} could not be written ({reason}; {free:.2f} GB are free). Nothing half-written "
        "is left "
        "and earlier checkpoints are complete; make room and run the same command to continue"
    ) from failure


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the newest and the one named `keep` (the best) stay."""
    if limit is None:
        return
    checkpoints = list_checkpoints(output_dir)
    removable = [path for path in checkpoints[:-1] if path.name != keep]
    for path in removable[: max(0, len(checkpoints) - limit)]:
        _remove(path)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading


def read_checkpoint(folder: Path, fingerprint: Mapping[str, str], world: World) -> dict:
    """The state in a checkpoint and this rank's own. Raises ValueError unless this run may continue it."""
    state = read_state(folder / STATE_FILE)
    check_fingerprint(folder, state["fingerprint"], fingerprint)
    if "optimizer" not in state:
        raise ValueError(
            f"{folder}: saved with save_only_model, so there is no optimizer state to continue from; set "
            "overwrite_output_dir=true, or give it as adapter_name_or_path or model_name_or_path of another "
            "run"
        )
    return state | {"rank": read_state(folder / f"rank_state_{world.rank}.pt")}


def read_state(path: Path) -> dict:
    """Our own state file, without unpickling code. Raises ValueError when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint was written by fewer processes than run now")
    try:
        return read_plain(path)
    except ValueError as error:
        others = [other.name for other in list_checkpoints(path.parent.parent) if other != path.parent]
        there = f" (there are {', '.join(others)})" if others else ""
        raise ValueError(
            f"{path}: damaged ({error}); give another checkpoint as resume_from_checkpoint{there}, "
            "or set overwrite_output_dir=true to start anew"
        ) from error


def read_history(folder: Path) -> list[dict]:
    """log_history of a checkpoint's trainer_state.json."""
    path = folder / TRAINER_STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: missing or damaged ({error}); give another resume_from_checkpoint"
        ) from error


def fingerprint(config: Config, world: World, described: Mapping[str, str]) -> dict[str, str]:
    """Every setting that decides the weights, as text; `described`: what the options name, but do not say."""
    deciding = [key.name for key in config.options.values() if not (key.resumable or key.secret)]
    kept = {name: str(config.values[name]) for name in deciding}
    return kept | {"number of processes": str(world.size)} | described


def digest(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and bytes of these files: of all bytes of a small one, of a large one pieces all
    over it, which any training changes."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in sorted(paths):
        size = path.stat().st_size
        hashed.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(PIECE_BYTES, size // PIECES)):
                file.seek(start)
                hashed.update(file.read(PIECE_BYTES))
    return hashed.hexdigest()


def check_fingerprint(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """ValueError that names each setting in which a resumed run differs. Keys new to this version do not
    count."""
    changed = [
        f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]
    ]
    if changed:
        raise ValueError(
            f"{folder}: cannot be continued with other settings: {'; '.join(changed)}. Restore them, choose "
            "another "
            "output_dir (weights to start from are given as adapter_name_or_path or model_name_or_path), or "
            "set "
            "overwrite_output_dir=true to start anew"
        )


def random_state(device: torch.device) -> dict:
    """State of the random-number generators that this rank uses."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


# Signals


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted in the list, for a checkpoint after the current step; a repeated one
    kills."""
    received: list[int] = []
    first_at = 0.0

    def note(number, frame) -> None:
        nonlocal first_at
        if not received:
            first_at = time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this step; once more to stop at once\n".encode())
        elif time.monotonic() - first_at > _GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

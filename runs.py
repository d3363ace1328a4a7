"""The folders of a run: checkpoint-<step> that is complete or absent, rotation, finding the one to resume from.

A checkpoint is written under a temporary name, flushed to the disk, then renamed, so a kill -9 or a full disk at any
moment leaves the earlier ones untouched. It holds the weights in Hugging Face or PEFT layout, `training_state.pt`
(optimizer, scaler, counters) and one `rng_state_<rank>.pt` per rank; both are read with weights_only=True.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from parallel import World

STATE_FILE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = ".tmp-checkpoint-"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def find_resume(output_dir: Path, resume_from_checkpoint: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, or None to start anew. Raises ValueError when the folder holds something else.

    resume_from_checkpoint: None = the newest in output_dir unless `overwrite`; "true" the same but there has to be one;
    "false" = start anew beside what is there; else a path.
    """
    choice = (resume_from_checkpoint or "").lower()
    checkpoints = list_checkpoints(output_dir)
    if choice in ("true", "yes", "1"):
        if not checkpoints:
            raise ValueError(f"resume_from_checkpoint: no complete checkpoint-<step> in {output_dir}")
        return checkpoints[-1]
    if choice and choice not in ("false", "no", "0"):
        path = Path(resume_from_checkpoint)
        if not (path / STATE_FILE).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {path} is no complete checkpoint (no {STATE_FILE}); "
                "folders saved with save_only_model cannot be resumed"
            )
        return path
    if overwrite or choice:
        return None
    if checkpoints:
        return checkpoints[-1]
    if output_dir.is_dir() and (output_dir / "all_results.json").exists():
        raise ValueError(
            f"output_dir: {output_dir} holds a finished run and no checkpoint to continue; "
            "choose another folder or set overwrite_output_dir=true"
        )
    return None


def write_checkpoint(output_dir: Path, step: int, world: World, write: Callable[[Path], None], rank_state: dict) -> Path:
    """Make checkpoint-<step>: `write(folder)` on rank 0 puts the weights and STATE_FILE there, every rank its own state.

    Raises OSError (with what was free) after removing the half-written folder; earlier checkpoints are untouched.
    """
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f"{_TEMPORARY}{step}"
    failure: OSError | None = None
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    try:
        torch.save(rank_state, temporary / f"rng_state_{world.rank}.pt")
        if world.is_main:
            write(temporary)
            _flush_tree(temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = error if isinstance(error, OSError) else OSError(errno.EIO, str(error).splitlines()[0])
    if world.any(failure is not None):
        if world.is_main:
            free = shutil.disk_usage(output_dir).free / 1e9
            shutil.rmtree(temporary, ignore_errors=True)
            reason = failure or OSError(errno.EIO, "another rank failed")
            raise OSError(
                reason.errno,
                f"output_dir: {final} could not be written ({reason}; {free:.2f} GB were free). Nothing half-written is "
                "left and earlier checkpoints are complete; make room and run the same command to continue",
            ) from failure
        raise OSError(errno.EIO, f"{final} could not be written by another rank") from failure
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _flush(output_dir)
    world.barrier()
    return final


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the newest and the one named `keep` (the best) stay."""
    if limit is None:
        return
    checkpoints = list_checkpoints(output_dir)
    removable = [path for path in checkpoints[:-1] if path.name != keep]
    for path in removable[: max(0, len(checkpoints) - max(limit, 1))]:
        # renamed first: a kill in the middle of the removal must not leave a folder that looks complete
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(output_dir: Path) -> None:
    """What a killed process left half-written."""
    for path in output_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def rank_state(device: torch.device) -> dict:
    """Random-number state of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rank_state(folder: Path, world: World) -> None:
    path = folder / f"rng_state_{world.rank}.pt"
    if not path.is_file():
        raise ValueError(f"{path}: missing; the checkpoint was written by fewer processes than run now")
    state = read_state(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)


def read_state(path: Path) -> dict:
    """Our own state file, without unpickling code. Raises ValueError when it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}); resume from an earlier checkpoint") from error


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

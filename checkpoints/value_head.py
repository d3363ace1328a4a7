"""One number for each token: the scalar head of a reward model, and of PPO's value function.

In a file of its own beside the adapter or the model: value_head.safetensors with v_head.summary.weight (1, E)
and v_head.summary.bias (1,), as trl and LLaMA-Factory name them, in any floating-point dtype.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.safetensors_files import PICKLE, file_notes, file_tensors, write_tensors
from options.errors import UserError, refuse
from parallel.fsdp import assign, whole

VALUE_HEAD = "value_head.safetensors"
PICKLED = "value_head.bin"
PREFIX = "v_head."


class ValueHead(nn.Module):
    """hidden (T, E) -> (T,) fp32. Its weights are fp32 whatever the model computes in."""

    def __init__(self, hidden_size: int, device="cpu", generator: torch.Generator | None = None):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1, device=device)
        bound = hidden_size**-0.5  # nn.Linear's own start; drawn on the CPU: a seed gives the same everywhere
        for parameter in self.summary.parameters():
            drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(drawn)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.summary(hidden.float())[:, 0].clone()  # no view, for the engine


def value_head_state(head: ValueHead) -> dict[str, Tensor]:
    """Its parameters by the names in the file; of a sharded one the shares."""
    return {PREFIX + name: parameter for name, parameter in head.named_parameters()}


def save_value_head(state: dict[str, Tensor], folder: Path) -> None:
    """state: value_head_state of the head."""
    tensors = {name: whole(tensor).cpu().contiguous() for name, tensor in state.items()}
    write_tensors(Path(folder) / VALUE_HEAD, tensors)


def has_value_head(folder: Path) -> bool:
    """Whether a value head lies in this folder. Raises UserError for one that would have to be unpickled."""
    folder = Path(folder)
    if not (folder / VALUE_HEAD).is_file() and (folder / PICKLED).is_file():
        remedy = f"load it once with torch.load and write it with safetensors.torch.save_file as {VALUE_HEAD}"
        raise UserError(f"{folder / PICKLED}: {PICKLE}; in an environment you trust, {remedy}")
    return (folder / VALUE_HEAD).is_file()


@torch.no_grad()
def load_value_head(head: ValueHead, folder: Path) -> None:
    """Raises UserError naming file and tensor."""
    path = Path(folder) / VALUE_HEAD
    refuse(not has_value_head(folder), f"{path}: file not found; {folder} is no reward model")
    if "ending" in file_notes(path):
        gone = "it reads values behind a question about each answer, so scores at the ends would mean nothing"
        found = "this value head was trained with rm_question, which is no more"
        raise UserError(f"{path}: {found}: {gone}; train it again")
    found = dict(file_tensors(path))
    for name, parameter in head.named_parameters():
        tensor, place = found.pop(PREFIX + name, None), f"{path}: tensor {PREFIX}{name}"
        if tensor is None or tensor.shape != parameter.shape:
            shape = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise UserError(f"{place} {shape}, expected {tuple(parameter.shape)}")
        refuse(not torch.isfinite(tensor).all(), f"{place} is not finite; the reward model is broken")
        assign(parameter, tensor)
    refuse(found, f"{path}: tensor {next(iter(found), None)} belongs to no value head")

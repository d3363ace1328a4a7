"""Optimizers: the file of each value of `optim`, parameter groups, and what the loop does to an optimizer.

A file gives `SERVES`, value of `optim` -> bytes of state per byte of trained parameter (8-bit state beside
fp32 parameters), and `make(model, groups, options) -> torch.optim.Optimizer`; groups as of parameter_groups.

    adamw_torch     adamw_torch, adamw_torch_fused: AdamW (Loshchilov & Hutter, arXiv 1711.05101)
    adafactor       arXiv 1804.04235, at the rate that is asked for, as the Hugging Face trainer's
    sgd
    bitsandbytes    AdamW and Lion with state in 8 bits or in paged memory: *_8bit, *_32bit

To add one: copy sgd.py, name it in FILES and in OptimOptions.optim (training/options.py).

    optimizer = make_optimizer(model, options)
    set_learning_rate(optimizer, schedules.schedule(step, options, total_steps))        # before each update
    norm = clip_gradients(parameters, max_norm)
"""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import parallel.checkpoint
from options.errors import refuse
from parallel.checkpoint import SEPARATOR
from parallel.fsdp import settle
from parallel.tensor import is_cut, name_of_share, share_of
from training.optimizers import adafactor, adamw_torch, bitsandbytes, sgd
from training.options import OptimOptions

FILES = (adamw_torch, adafactor, sgd, bitsandbytes)


def file_of(name: str) -> ModuleType:
    """The file that serves a value of `optim`."""
    served = {each: file for file in FILES for each in file.SERVES}
    refuse(name not in served, f"optim: {name!r} is unknown; known are {', '.join(served)}")
    return served[name]


def state_per_byte(name: str) -> float:
    """Bytes of state per byte of trained parameter, of a value of `optim`."""
    return file_of(name).SERVES[name]


def make_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """The optimizer over model's trainable parameters. Raises UserError where the device cannot run it."""
    settle(model)  # a reference may just have been asked
    groups = parameter_groups(model, options.weight_decay)
    optimizer = file_of(options.optim).make(model, groups, options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as one group that decays and one that does not; an empty group is left out.

    Matrices decay (weights, embeddings, LoRA's A and B). Norms, biases and every other vector do not; that is
    the Hugging Face trainer's rule, extended to vectors that are neither norm nor bias (DoRA's magnitudes).
    A tied parameter comes once. Groups hold (name, parameter) pairs, so a saved state carries the names.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; call checkpoints.trainable first")
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in named:
        decays = parameter.ndim >= 2 and "bias" not in name.rpartition(".")[2]
        groups[0 if decays else 1]["params"].append((name, parameter))
    return [group for group in groups if group["params"]]


OPTIMIZER = "optimizer"  # folder of a checkpoint that holds the tensors of the state


def states(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """optimizer.state_dict() in two: what is plain, and the tensors as PARAMETER::STATE."""
    state, tensors = optimizer.state_dict(), {}
    names = dict(enumerate(stored_names(optimizer)))
    plain: dict[int, dict] = {}
    for number, values in state["state"].items():
        moments = {key: value for key, value in values.items() if torch.is_tensor(value)}
        tensors |= {f"{names[number]}{SEPARATOR}{key}": value for key, value in moments.items()}
        plain[number] = {key: value for key, value in values.items() if key not in moments}
    return state | {"state": plain}, tensors


def stored_names(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained parameters by the names under which a checkpoint has the state of what this rank holds."""
    groups = optimizer.param_groups
    named = [pair for group in groups for pair in zip(group["param_names"], group["params"])]
    return {name_of_share(name, parameter): parameter for name, parameter in named}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], folder: Path, world) -> None:
    """Bring back what `states` gave, the tensors of which lie in this folder. UserError where other
    parameters trained then."""
    sides = optimizer.param_groups, state["param_groups"]
    now, then = ([name for group in groups for name in group.get("param_names", ())] for groups in sides)
    for name in now if then != now else ():
        lacking = f"{name} trains, but did not when the checkpoint was written"
        refuse(name not in then, f"{lacking}; restore the code")
    for name in then if then != now else ():
        lacking = f"{name} trained when the checkpoint was written, but does not"
        refuse(name not in now, f"{lacking}; restore the code")
    parameters = stored_names(optimizer)
    numbers = {name: number for number, name in enumerate(parameters)}
    older = f"{folder}: not there; the checkpoint is of an older version, which one process can continue"
    refuse(not folder.is_dir() and world.size > 1, older)
    stored = parallel.checkpoint.load(folder, parameters, world) if folder.is_dir() else {}
    for name, tensor in stored.items():
        owner, _, key = name.rpartition(SEPARATOR)
        state["state"][numbers[owner]][key] = tensor
    optimizer.load_state_dict(state)
    if getattr(optimizer, "is_paged", False):
        bitsandbytes.page_again(optimizer)


def step_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """From now on each parameter is updated within the backward pass, as soon as its gradient is complete,
    which is then forgotten: no more than one gradient is there at a time."""

    def update(parameter: torch.Tensor) -> None:
        optimizer.step()  # the others have no gradient, and are passed over
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(update)


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Every group's rate = its own peak rate * multiplier (groups may differ in their peak)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def clip_gradients(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients in place to a total 2-norm of at most max_norm (0: unchanged); returns the norm before.

    Without a host synchronisation. A norm that is not finite makes the gradients so; the loop finds it.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    cut = [parameter for parameter in parameters if is_cut(parameter)]
    norm = _norm([parameter.grad for parameter in parameters if not is_cut(parameter)])
    if cut:  # the others are the same on every rank of a tensor group
        squares = share_of(cut[0]).sum(_norm([parameter.grad for parameter in cut]).square())
        norm = (norm.to(squares.device).square() + squares).sqrt()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all shares

"""bitsandbytes' AdamW and Lion (arXiv 2302.06675), state in 8 bits (arXiv 2110.02861) or in paged memory.

The package is loaded on demand: who uses another optimizer does not need it.
"""

import logging

import torch
from torch import nn

from options.errors import UserError, refuse
from parallel.fsdp import local
from training.options import OptimOptions
from training.rounding import noise_of, store

CLASSES = {"adamw_8bit": "AdamW8bit", "adamw_bnb_8bit": "AdamW8bit"}
CLASSES |= {"paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}
CLASSES |= {"lion_8bit": "Lion8bit", "lion_32bit": "Lion32bit"}
CLASSES |= {"paged_lion_8bit": "PagedLion8bit", "paged_lion_32bit": "PagedLion32bit"}
STATE = {"AdamW8bit": 0.55, "AdamW32bit": 2.0, "Lion8bit": 0.28, "Lion32bit": 1.0}  # codes and their scales
SERVES = {name: STATE[kind.removeprefix("Paged")] for name, kind in CLASSES.items()}
ON_CPU = {"paged_adamw_32bit": "adamw_torch"}  # in place of paged state; else the name without paged_


def make(model: nn.Module, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    name = options.optim
    # its backend looks for PyPI's package `kernels`, which the room of that name hides, and says so
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_of_the_hub)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"optim: {name} needs bitsandbytes ({error}); pip install bitsandbytes") from error
    on_cpu = any(parameter.device.type == "cpu" for group in groups for _, parameter in group["params"])
    instead = ON_CPU.get(name, name.removeprefix("paged_"))
    pages = f"{name} pages state out of GPU memory, but the parameters are on the CPU"
    refuse(on_cpu and name.startswith("paged_"), f"optim: {pages}; use {instead}")
    settings = {"betas": (options.adam_beta1, options.adam_beta2)}
    if "adamw" in name:
        settings["eps"] = options.adam_epsilon
    theirs = getattr(bitsandbytes.optim, CLASSES[name])
    optimizer = type(theirs.__name__, (_Rounding, theirs), {})(groups, lr=options.learning_rate, **settings)
    if name.endswith("8bit"):
        _keep_embeddings_in_fp32(optimizer, model)
    _Plain(optimizer)
    return optimizer


class _Plain:
    """During a step the optimizer sees plain tensors in place of torch's DTensors, of which its kernels know
    nothing: the same memory, because under ddp each rank has all of a parameter (options/rules.py)."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.groups: list[list[nn.Parameter]] = []
        optimizer.register_step_pre_hook(self.begin)
        optimizer.register_step_post_hook(self.end)

    def begin(self, optimizer, *arguments) -> None:
        self.groups = [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self._plain(parameter, optimizer.state) for parameter in group["params"]]

    def end(self, optimizer, *arguments) -> None:
        for group, parameters in zip(optimizer.param_groups, self.groups):
            for plain, parameter in zip(group["params"], parameters):
                if plain is not parameter and plain in optimizer.state:
                    optimizer.state[parameter] = optimizer.state.pop(plain)
            group["params"] = parameters
        self.groups = []

    def _plain(self, parameter: nn.Parameter, state: dict) -> nn.Parameter:
        if local(parameter) is parameter:
            return parameter
        plain = nn.Parameter(local(parameter.detach()), requires_grad=True)
        plain.grad = None if parameter.grad is None else local(parameter.grad)
        if parameter in state:
            values = state.pop(parameter).items()
            state[plain] = {key: local(value) if torch.is_tensor(value) else value for key, value in values}
        return plain


class _Rounding:
    """Before a class of bitsandbytes: parameters in bf16 are updated in fp32 and rounded by chance."""

    def update_step(self, group: dict, parameter: nn.Parameter, index: int, place: int) -> None:
        narrow, grad = parameter.data, parameter.grad
        if narrow.dtype is torch.bfloat16:
            parameter.grad, parameter.data = None, narrow.float()  # torch asks for one dtype of the two
            parameter.grad = grad.float()
        super().update_step(group, parameter, index, place)
        if narrow.dtype is torch.bfloat16:
            noise = noise_of(self.state[parameter]["step"], index, place, narrow.device)
            store(narrow, parameter.data, noise)
            parameter.grad, parameter.data = None, narrow
            parameter.grad = grad


def _not_of_the_hub(record: logging.LogRecord) -> bool:
    return "pip install kernels" not in record.getMessage()


def _keep_embeddings_in_fp32(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Embedding rows see gradients of very uneven size, unstable in 8 bits (arXiv 2110.02861, 2.3).

    bitsandbytes' own override is one table per process keyed by position, which a second optimizer would
    inherit; state that exists before the first step is used as it is, so the fp32 state is made here.
    """
    moments = ("state1",) if "Lion" in type(optimizer).__name__ else ("state1", "state2")
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            weight = nn.Parameter(local(module.weight.detach()))
            buffers = {key: optimizer.get_state_buffer(weight, torch.float32) for key in moments}
            optimizer.state[module.weight] = {"step": 0, **buffers}


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """After load_state_dict, which puts paged state into GPU memory: what fitted would not fit any more."""
    for parameter, values in optimizer.state.items():
        for key in {"state1", "state2"} & values.keys():
            buffer = optimizer.get_state_buffer(local(parameter), values[key].dtype)
            if parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)  # the zeros of the new buffer are written by then
            buffer.copy_(local(values[key]))
            values[key] = buffer

"""AdamW (Loshchilov & Hutter, arXiv 1711.05101): torch's, with one fused kernel where the device has one.

Parameters and moments in bf16 (pure_bf16) are rounded by chance (rounding.py).
"""

import torch
from torch import Tensor

from parallel.fsdp import local
from training.options import OptimOptions
from training.rounding import CHUNK, store, turns

SERVES = {"adamw_torch": 2.0, "adamw_torch_fused": 2.0}  # two moments
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch.optim.AdamW has a one-kernel update


def make(model, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    settings = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    if any(parameter.dtype is torch.bfloat16 for parameter in parameters):
        return RoundingAdamW(groups, lr=options.learning_rate, **settings)
    devices = {parameter.device.type for parameter in parameters}
    # one kernel in place of a dozen passes over the state: 5 times as fast on a CPU, as repeatable
    fused = options.optim == "adamw_torch_fused" or devices.issubset(FUSED_DEVICES)
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=fused, **settings)


class RoundingAdamW(torch.optim.AdamW):
    """AdamW in fp32 arithmetic; weights and moments in bf16 are rounded by chance."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter, group, state, noise in turns(self):
            if "exp_avg" not in state:
                state["step"] = torch.ones(())  # as torch's, and as it comes back from a file
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
            tensors = [local(x).view(-1) for x in (parameter, state["exp_avg"], state["exp_avg_sq"])]
            for chunk in zip(*(x.split(CHUNK) for x in (*tensors, local(parameter.grad).reshape(-1)))):
                _update(*chunk, group, int(state["step"]), noise)


def _update(weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor, group: dict, step: int, noise):
    """One AdamW step of (n,) values, in place."""
    (beta1, beta2), rate, grad = group["betas"], group["lr"], grad.float()
    new_mean = mean.float().lerp_(grad, 1 - beta1)
    new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    new = weight.float().mul_(1 - rate * group["weight_decay"])
    new.addcdiv_(new_mean, divisor, value=-rate / (1 - beta1**step))
    for target, value in ((weight, new), (mean, new_mean), (square, new_square)):
        store(target, value, noise)

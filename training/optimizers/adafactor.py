"""Adafactor (arXiv 1804.04235) as the Hugging Face trainer means it: at the learning rate that is asked for,
not one scaled by the size of the weights or by the step (scale_parameter and relative_step are off there), so
that LoRA's B, which begins with zeros, moves at all."""

import torch
from torch import Tensor

from training.options import OptimOptions
from training.rounding import store, turns

SERVES = {"adafactor": 0.1}  # two vectors for each matrix
DECAY = -0.8  # second moments forget at the rate step^DECAY: section 7.2
SQUARED_EPSILON = 1e-30  # added to squared gradients: epsilon_1 of section 3.2
CLIP = 1.0  # largest root mean square of an update: section 6


def make(model, groups: list[dict], options: OptimOptions) -> torch.optim.Optimizer:
    return Adafactor(groups, {"lr": options.learning_rate, "weight_decay": 0.0})


class Adafactor(torch.optim.Optimizer):
    """Of second moments it keeps the means of rows and columns (of vectors all), in fp32."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter, group, _, noise in turns(self):
            value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])  # itself in fp32
            store(parameter, value.sub_(self._update(parameter), alpha=group["lr"]), noise)

    def _update(self, parameter: Tensor) -> Tensor:
        """The gradient over the root of its second moment, clipped; fp32, of the parameter's shape."""
        gradient, state = parameter.grad.float(), self.state[parameter]
        squares = gradient.square() + SQUARED_EPSILON
        factored = gradient.ndim >= 2
        means = {"rows": squares.mean(-1), "columns": squares.mean(-2)} if factored else {"all": squares}
        for name, mean in means.items():
            kept = state.setdefault(name, torch.zeros_like(mean))
            kept.lerp_(mean, state["step"] ** DECAY)
        if factored:
            rows, columns = state["rows"], state["columns"]
            rows = (rows / rows.mean(-1, keepdim=True)).rsqrt()
            update = gradient * rows[..., :, None] * columns.rsqrt()[..., None, :]
        else:
            update = gradient * state["all"].rsqrt()
        size = update.norm() / update.numel() ** 0.5
        return update / (size / CLIP).clamp(min=1)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch has cast it to the parameters' dtype, in which that of bf16 ones would be rounded
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, saved in state_dict["state"].items():
            place = parameters[number].device
            moments = {name: value.to(place, copy=True) for name, value in saved.items() if name != "step"}
            self.state[parameters[number]].update(moments)

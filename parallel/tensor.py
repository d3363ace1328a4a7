"""Tensor parallel: the `tp_size` ranks of a group hold each layer between them, as plain slices.

    cut(model, world)               # from outside, before fully_shard; modules and kernels stay as they are

The cut of Megatron-LM (arXiv 1909.08053, section 3): q, k and v by whole heads, gate and up by outputs, o and
down by inputs. So attention and MLP need two sums over the group: of what comes out and, going backward, of
the gradient of what went in. Embedding, norms and head stay whole on every rank; the ranks of a group see the
same rows, draw the same random numbers, and compute the same of them.

An adapter is cut with its layer: B of one that is cut by outputs, A of one that is cut by inputs. Its other
matrix, and the norms of single heads, stay whole but see a part of the heads: their gradients are parts,
summed once for each update (sum_parts). Each parameter remembers what it is (share_of).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from options.errors import refuse

# the dimension that parameters are cut along; None as in Share.dim; the bias behind a sum is not named
BY_OUTPUTS = {"weight": 0, "bias": 0, "lora_b": 0, "lora_a": None}
BY_INPUTS = {"weight": 1, "lora_a": 1, "lora_b": None}
CUTS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), BY_OUTPUTS)
CUTS |= dict.fromkeys(("o_proj", "down_proj"), BY_INPUTS)


@dataclass(frozen=True)
class Share:
    """What a rank of a tensor group holds of a parameter."""

    group: dist.ProcessGroup
    rank: int  # in the group
    size: int
    dim: int | None  # that it is cut along; None: it is whole, and its gradient is a part

    def sum(self, tensor: Tensor) -> Tensor:
        """Over the group, a new tensor."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total

    def of(self, whole: Tensor) -> Tensor:
        """This rank's slice of a whole parameter."""
        return whole if self.dim is None else whole.chunk(self.size, self.dim)[self.rank]

    def whole(self, mine: Tensor) -> Tensor:
        """The whole parameter; all ranks of the group ask for it."""
        if self.dim is None:
            return mine
        slices = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(slices, mine.contiguous(), group=self.group)
        return torch.cat(slices, self.dim)


def share_of(parameter: Tensor) -> Share | None:
    """None: all ranks of its tensor group have the same parameter with the same gradient."""
    return getattr(parameter, "tensor_share", None)


def is_cut(parameter: Tensor) -> bool:
    share = share_of(parameter)
    return share is not None and share.dim is not None


def name_of_share(name: str, parameter: Tensor) -> str:
    """Of what belongs to the parameter: other slices have other names."""
    return f"{name}@{share_of(parameter).rank}" if is_cut(parameter) else name


def cut(model: nn.Module, world) -> None:
    """Leave this rank its slices of the blocks' layers; adapters have been added. Another model may have the
    same parameters. model.config tells of the slices from now on. Raises UserError."""
    size = world.tensor
    if size == 1 or hasattr(model, "tensor_size"):
        return
    share = Share(world.groups["tensor"], world.tensor_rank, size, None)
    for block in model.layers:
        cut_linears(dict(block.named_modules()), world)
        for module, last in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            for name in {"q_norm", "k_norm"} & dict(module.named_children()).keys():
                module.get_submodule(name).weight.tensor_share = share
            module.register_forward_pre_hook(partial(_enter, share))
            module.register_forward_hook(partial(_leave, share, last))
    sizes = "num_heads", "num_kv_heads", "intermediate_size"
    model.config = replace(model.config, **{name: getattr(model.config, name) // size for name in sizes})
    model.tensor_size = size


@torch.no_grad()
def cut_linears(named: Mapping[str, nn.Module], world) -> None:
    """Those of these modules that CUTS names: linears, or adapters with the linears that they are around."""
    share = Share(world.groups["tensor"], world.tensor_rank, world.tensor, None)
    linears = ((CUTS[last], linear) for n, linear in named.items() if (last := n.rpartition(".")[2]) in CUTS)
    for dims, linear in linears:
        for module in (each for each in linear.modules() if not hasattr(each, "tensor_size")):
            coded = next(module.named_buffers(recurse=False), None) is not None
            refuse(coded, "tp_size: codes of a quantised model are not cut over ranks; set tp_size=1")
            dora = getattr(module, "magnitude", None) is not None
            refuse(dora, "tp_size: DoRA's norms need whole rows of the weights; set tp_size=1")
            for name, parameter in module.named_parameters(recurse=False):
                if name in dims and share_of(parameter) is None:
                    parameter.tensor_share = mine = replace(share, dim=dims[name])
                    parameter.data = mine.of(parameter.data).clone()  # so that the rest of it goes
            features = "out_features" if dims is BY_OUTPUTS else "in_features"
            setattr(module, features, getattr(module, features) // world.tensor)
            module.tensor_size = world.tensor


def _enter(share: Share, module: nn.Module, inputs: tuple) -> None:
    """Each rank's heads give a part of the gradient of their input."""
    x = inputs[0]  # (T, E)
    if x.requires_grad and torch.is_grad_enabled():
        x.register_hook(share.sum)


def _leave(share: Share, last: str, module: nn.Module, inputs: tuple, result: Tensor) -> Tensor:
    """Each rank's heads give a part of the result (T, E), and all but one of its bias too many."""
    bias = getattr(module, last).bias
    if bias is not None and share.rank > 0:
        result = result - bias.detach().to(result.dtype)  # in the gradient it is as if there were one rank
    return _Sum.apply(result, share)


class _Sum(torch.autograd.Function):
    """The sum over the group, to which every part has the gradient of the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, share: Share) -> Tensor:
        return share.sum(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@torch.no_grad()
def sum_parts(parameters: Iterable[Tensor]) -> None:
    """Sum over the group, in place, the gradients that are parts; in one message for each dtype."""
    parts: dict[tuple[Share, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        share, gradient = share_of(parameter), parameter.grad
        if share is not None and share.dim is None and gradient is not None:
            mine = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            parts.setdefault((share, mine.dtype), []).append(mine)
    for (share, _), gradients in parts.items():
        total = share.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))

"""A model's weights in the order in which one token at a time is fast; values, names and shapes stay."""

from functools import partial

import torch
from torch import Tensor, nn

from architectures.layers import Linear
from kernels.byte_linear import ByteTable
from kernels.linear import LinearLayer, Table, matvec_by_rows
from lora import LoraLinear
from model import Decoder
from quant.linear import QuantLinear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # that have one input


def lay_out_for_decoding(model: Decoder) -> None:
    """Order the weights in memory so that one token at a time is fast; values, names and shapes stay.

    For models that will only generate: training and saving work too, but are not faster. Linears with one
    input get one table, which kernels.linears reads where they come to it together. On a CPU quantised ones
    have it beside their codes, in bytes for one row, or dense where their format has no bytes; an adapter
    stays beside it. A tied head is turned too: the embedding then gathers a token's numbers from E places,
    which costs 0.02 ms where the head saves 0.5 (fp32) to 1.7 ms (bf16) of a 135M model. On a GPU plain
    layers with one input are joined, and that is all.
    """
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    for linears in (group for module in model.layers.modules() for group in _groups(module)):
        kinds = {type(linear) for linear in linears}
        if kinds == {Linear} and (on_cpu or len(linears) > 1):
            _join(linears)
        elif on_cpu and all(issubclass(kind, QuantLinear) for kind in kinds):
            _put_beside(linears, model.compute_dtype)
    if not on_cpu:
        return
    if model.config.tied_head:
        weight = model.embed_tokens.weight
        turned = weight.detach().T.contiguous().T  # (V, E), a token's numbers V apart
        model.embed_tokens.weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
    elif type(model.lm_head) is Linear:
        _join([model.lm_head])


def _groups(module: nn.Module) -> list[list[LinearLayer]]:
    """The linears right inside a module, those with one input together; without adapters around codes."""
    layers = {name: child for name, child in module.named_children() if isinstance(child, LinearLayer)}
    if isinstance(module, LinearLayer):  # an adapter: its base was seen with its neighbours
        return []
    for name, layer in layers.items():
        if isinstance(layer, LoraLinear) and isinstance(layer.base, QuantLinear):
            layers[name] = layer.base
    groups = []
    for names in TOGETHER:
        if layers.keys() >= set(names) and len({layers[name].in_features for name in names}) == 1:
            groups.append([layers.pop(name) for name in names])
    return groups + [[layer] for layer in layers.values()]


def _join(linears: list[Linear]) -> None:
    """Plain linears as one table; their weights and biases become views of it.

    On a CPU that is (in, sum of out): the layout in which a processor reads the weights of a one-row product
    at full memory speed (kernels/linear.py). A GPU keeps (sum of out, in) and gains fewer, larger kernels.
    Names, shapes and values stay, nothing is held twice.
    """
    sizes, row = [linear.out_features for linear in linears], None
    with torch.no_grad():
        if linears[0].weight.device.type == "cpu":
            turned = torch.cat([linear.weight.T for linear in linears], dim=1).contiguous()
            weight, row = turned.T, partial(matvec_by_rows, table=turned)
        else:
            weight = torch.cat([linear.weight for linear in linears])
    table = Table(weight, _biases(linears), sizes, row)
    biases = [None] * len(linears) if table.bias is None else table.bias.split(sizes)
    for linear, rows, bias in zip(linears, weight.split(sizes), biases):
        linear.weight = nn.Parameter(rows, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
        linear.table = table


def _put_beside(linears: list[QuantLinear], dtype: torch.dtype) -> None:
    """Quantised linears as one table beside their codes: of bytes, or where they have none dense in dtype."""
    parts = [linear.bytes_for_decoding(dtype) for linear in linears]
    if None not in parts and len({(part.zero, part.scales.shape[0]) for part in parts}) == 1:
        weight, row = None, ByteTable(parts)
    else:
        turned = torch.cat([linear.dequantize(dtype).T for linear in linears], dim=1)
        weight, row = turned.T, partial(matvec_by_rows, table=turned)
    table = Table(weight, _biases(linears), [linear.out_features for linear in linears], row)
    for linear in linears:
        linear.table = table


@torch.no_grad()
def _biases(linears: list[LinearLayer]) -> Tensor | None:
    """(sum of out,), zeros for a linear without one; None if none has one."""
    given = [linear.bias for linear in linears if linear.bias is not None]
    if not given:
        return None
    pieces = [given[0].new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
    return torch.cat(pieces)

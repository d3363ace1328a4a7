"""A model's weights in the order in which one token at a time is fast; values, names and shapes stay."""

import torch
from torch import Tensor, nn

from architectures.layers import MLP, Linear, RMSNorm
from generation.cpu_decode import KNOWN, Adapter, ByteProduct, Layer, OneRow, Product, agrees
from kernels.byte_linear import ByteTable
from kernels.linear import LinearLayer, Part, Table, shares_of_rows
from lora import LoraLinear
from model import Attention, Block, Decoder
from quant.linear import QuantLinear


def lay_out_for_decoding(model: Decoder) -> None:
    """Order the weights in memory so that one token at a time is fast; values, names and shapes stay.

    For models that will only generate: training and saving work too, but are not faster. Layers that are not
    plain linears (adapters, quantised) keep their layout; on a CPU quantised ones get, beside their codes, a
    table of bytes or where their format has none a dense one, for one token at a time (cpu_decode.py). A tied
    head is turned too: the embedding then gathers a token's numbers from E places, which costs 0.02 ms where
    the head saves 0.5 (fp32) to 1.7 ms (bf16) of a 135M model. On a GPU layers with one input are joined, and
    that is all.
    """
    on_cpu = model.embed_tokens.weight.device.type == "cpu"
    known = [block for block in model.layers if _is_known(block)]
    for block in known:
        for linears in _groups(block):
            if _all_plain(linears) and (on_cpu or len(linears) > 1):
                _join(linears)
    if not on_cpu:
        return
    if model.config.tied_head:
        weight = model.embed_tokens.weight
        turned = weight.detach().T.contiguous().T  # (V, E), a token's numbers V apart
        model.embed_tokens.weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
    elif _all_plain([model.lm_head]):
        _join([model.lm_head])
    if not known or len(known) < len(model.layers) or model.config.switched_beside(KNOWN):
        return
    places = [place for block in known for place in _places(block)]
    linears = [layer for _, _, layer in places]
    dtype = model.compute_dtype
    # the stream of fp16 is fp32, see FP16_ROW_LIMIT; no processor here is faster with fp16
    if dtype is torch.float16 or not all(_served(linear) for linear in linears):
        return
    adapters = [linear for linear in linears if isinstance(linear, LoraLinear)]
    straight = [_straight(block, dtype) for block in model.layers]
    one_row = OneRow(straight, places, adapters, model.config, dtype)
    model.runtime.one_row = one_row if agrees(model, one_row) else None


def _join(linears: list[Linear]) -> None:
    """Linears with one input, as one product for decoding (kernels.linears): their weights become views of
    one table.

    On a CPU that is (in, sum of out): the layout in which a processor reads the weights of a one-row product
    at full memory speed (kernels/linear.py). A GPU keeps (sum of out, in) and gains fewer, larger kernels.
    Names, shapes and values stay, nothing is held twice.
    """
    with torch.no_grad():
        if linears[0].weight.device.type == "cpu":
            weight = torch.cat([linear.weight.T for linear in linears], dim=1).contiguous().T
        else:
            weight = torch.cat([linear.weight for linear in linears])
        bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    table = Table(weight, bias, len(linears))
    for linear, rows in zip(linears, weight.split([linear.out_features for linear in linears])):
        linear.weight = nn.Parameter(rows, requires_grad=linear.weight.requires_grad)
        linear.table = table


def _is_known(block: Block) -> bool:
    """Whether a block is made of what is written here about its insides; another kind stays as it is."""
    norms = type(block.input_layernorm) is type(block.post_attention_layernorm) is RMSNorm
    return norms and type(block) is Block and type(block.self_attn) is Attention and type(block.mlp) is MLP


def _places(block: Block) -> list[tuple[nn.Module, str, LinearLayer]]:
    """(parent, name, layer) of every linear of a block, whatever stands in its place now."""
    named = {"q_proj k_proj v_proj o_proj": block.self_attn, "gate_proj up_proj down_proj": block.mlp}
    pairs = [(parent, name) for names, parent in named.items() for name in names.split()]
    return [(parent, name, getattr(parent, name)) for parent, name in pairs]


def _groups(block: Block) -> list[list[LinearLayer]]:
    """The linears of a block, those with one input together: q k v, o, gate up, down."""
    q, k, v, o, gate, up, down = (layer for _, _, layer in _places(block))
    return [[q, k, v], [o], [gate, up], [down]]


def _served(linear: LinearLayer) -> bool:
    """Whether cpu_decode.py can take this layer's place: a plain linear, or a quantised one with or without
    an adapter that is just added to it."""
    if isinstance(linear, LoraLinear):
        return not linear.off and isinstance(linear.part().weight, QuantLinear)
    return type(linear) is Linear or isinstance(linear, QuantLinear)


def _straight(block: Block, dtype: torch.dtype) -> Layer:
    """The block as the straight line of cpu_decode.py reads it. Plain weights stay the parameters'."""
    qkv, o, gate_up, down = (_product(linears, dtype) for linears in _groups(block))
    norms = block.input_layernorm.factor(), block.post_attention_layernorm.factor()
    return Layer(norms[0], qkv, o, norms[1], gate_up, down, block.self_attn.window)


def _product(linears: list[LinearLayer], dtype: torch.dtype) -> Product | ByteProduct:
    """Linears with one input as one product."""
    if _all_plain(linears):
        return _dense_product(linears[0].table.weight.detach().T, linears[0].table.bias)
    parts = [linear.part() for linear in linears]
    bases = [linear.base if isinstance(linear, LoraLinear) else linear for linear in linears]
    tables = [base.bytes_for_decoding(dtype) for base in bases]
    in_bytes = None not in tables and len({(table.zero, table.scales.shape[0]) for table in tables}) == 1
    wide = torch.float32 if in_bytes else dtype
    adapter, bias = _side_by_side(linears, parts, wide), None
    if any(part.bias is not None for part in parts):
        zeros = [torch.zeros(linear.out_features) for linear in linears]
        biases = [zero if part.bias is None else part.bias.detach() for zero, part in zip(zeros, parts)]
        bias = torch.cat([each.to(wide) for each in biases])
    if in_bytes:
        return ByteProduct(ByteTable(tables), bias, adapter)
    table = torch.cat([base.dequantize(dtype).T for base in bases], dim=1)
    return _dense_product(table, bias)._replace(adapter=adapter)


def _dense_product(table: Tensor, bias: Tensor | None) -> Product:
    rows, starts = shares_of_rows(table.shape[0], min(torch.get_num_threads(), table.shape[0]))
    return Product(table, None if bias is None else bias.detach(), rows, starts)


def _side_by_side(linears: list[LinearLayer], parts: list[Part], dtype: torch.dtype) -> Adapter | None:
    """Adapters of linears with one input as one: A under each other, B with its scale along a diagonal."""
    if all(part.lora_a is None for part in parts):
        return None
    down = torch.cat([part.lora_a.detach() for part in parts if part.lora_a is not None])  # (sum of R, in)
    blocks = [torch.zeros(linear.out_features, 0) for linear in linears]
    for place, part in enumerate(parts):
        if part.lora_b is not None:
            blocks[place] = part.lora_b.detach().float() * part.scale
    return Adapter(down.to(dtype), torch.block_diag(*blocks).to(dtype))


def _all_plain(linears: list[LinearLayer]) -> bool:
    return all(type(linear) is Linear for linear in linears)

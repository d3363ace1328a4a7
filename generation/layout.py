"""A model's weights in the order in which one token at a time is fast; values, names and shapes stay."""

import torch
from torch import Tensor, nn

import kernels
from architectures.layers import Linear
from generation.cpu_decode import Adapter, ByteProduct, Layer, OneRow, Product
from model import Block, Decoder

_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # what Joined joins


class Joined:
    """Linears with one input, as one product for decoding: (T, in) -> one (T, sum of out).

    The weights become views of one table. On a CPU that is (in, sum of out): the layout in which a processor
    reads the weights of a one-row product at full memory speed (kernels/linear.py). A GPU keeps (sum of out,
    in) and gains fewer, larger kernels. Names, shapes and values stay, nothing is held twice.
    """

    def __init__(self, owner: nn.Module, *names: str):
        self.names, self.parts = names, [getattr(owner, name) for name in names]
        parts = self.parts
        self.sizes = [part.out_features for part in parts]
        with torch.no_grad():
            if parts[0].weight.device.type == "cpu":
                table = torch.cat([part.weight.T for part in parts], dim=1).contiguous()  # (in, sum of out)
                self.weight = table.T
            else:
                self.weight = torch.cat([part.weight for part in parts])
            for part, rows in zip(parts, self.weight.split(self.sizes)):
                part.weight = nn.Parameter(rows, requires_grad=part.weight.requires_grad)
            self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def serve(self, owner: nn.Module) -> bool:
        """Whether the owner still has the layers that were joined: an adapter may have been put around one
        since."""
        children = owner._modules  # a plain dict: this is asked in every layer of every step
        return all(children[name] is part for name, part in zip(self.names, self.parts))

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


def lay_out_for_decoding(model: Decoder) -> None:
    """Order the weights in memory so that one token at a time is fast; values, names and shapes stay.

    For models that will only generate: training and saving work too, but are not faster. Layers that are not
    plain linears (adapters, quantised) keep their layout; on a CPU quantised ones get, beside their codes, a
    table of bytes or where their format has none a dense one, for one token at a time (cpu_decode.py). A tied
    head is turned too: the embedding then gathers a token's numbers from E places, which costs 0.02 ms where
    the head saves 0.5 (fp32) to 1.7 ms (bf16) of a 135M model. On a GPU layers with one input are joined, and
    that is all.
    """
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        if _all_plain(attention.q_proj, attention.k_proj, attention.v_proj):
            attention.joined = Joined(attention, *_QKV)
        if _all_plain(mlp.gate_proj, mlp.up_proj):
            mlp.joined = Joined(mlp, *_GATE_UP)
    if model.embed_tokens.weight.device.type != "cpu":
        return
    for block in model.layers:
        for owner, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
            if _all_plain(getattr(owner, name)):
                Joined(owner, name)
    if model.config.tied_head:
        weight = model.embed_tokens.weight
        turned = weight.detach().T.contiguous().T  # (V, E), a token's numbers V apart
        model.embed_tokens.weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
    elif _all_plain(model.lm_head):
        Joined(model, "lm_head")
    places = [place for block in model.layers for place in _linears(block)]
    linears = [layer for _, _, layer in places]
    if model.config.qk_norm or not all(_served(linear) for linear in linears):
        return
    dtype = model.compute_dtype
    if dtype is torch.float16:
        return  # its stream is fp32, see FP16_ROW_LIMIT; no processor here is faster with fp16
    adapters = [linear for linear in linears if hasattr(linear, "base")]
    straight = [_straight(block, dtype) for block in model.layers]
    model.runtime.one_row = OneRow(straight, places, adapters, model.config, dtype)


def _linears(block: Block) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of every linear of a block, whatever stands in its place now."""
    attention, mlp = block.self_attn, block.mlp
    places = [(attention, name) for name in (*_QKV, "o_proj")] + [
        (mlp, name) for name in (*_GATE_UP, "down_proj")
    ]
    return [(parent, name, getattr(parent, name)) for parent, name in places]


def _served(linear: nn.Module) -> bool:
    """Whether cpu_decode.py can take this layer's place: a plain linear, or a quantised one with or without an
    adapter."""
    if type(linear) is Linear:
        return True
    return _is_quantised(linear.lora_factors()[0] if hasattr(linear, "lora_factors") else linear)


def _is_quantised(layer: nn.Module) -> bool:
    return hasattr(layer, "bytes_for_decoding")


def _straight(block: Block, dtype: torch.dtype) -> Layer:
    """The block as the straight line of cpu_decode.py reads it. Plain weights stay those of the parameters."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        attention_norm=block.input_layernorm.factor(),
        qkv=_product([getattr(attention, name) for name in _QKV], attention.joined, dtype),
        o=_product([attention.o_proj], attention.o_proj, dtype),
        mlp_norm=block.post_attention_layernorm.factor(),
        gate_up=_product([getattr(mlp, name) for name in _GATE_UP], mlp.joined, dtype),
        down=_product([mlp.down_proj], mlp.down_proj, dtype),
        window=attention.window,
    )


def _product(linears: list[nn.Module], joined, dtype: torch.dtype) -> Product | ByteProduct:
    """Linears with one input as one product. joined: what holds their weights side by side if all are
    plain."""
    if _all_plain(*linears):
        return _dense_product(joined.weight.detach().T, joined.bias)
    beside = [
        linear.lora_factors() if hasattr(linear, "lora_factors") else (linear, None, None)
        for linear in linears
    ]
    bases = [base for base, _, _ in beside]
    parts = [base.bytes_for_decoding(dtype) if _is_quantised(base) else None for base in bases]
    in_bytes = None not in parts and len({(part.zero, part.scales.shape[0]) for part in parts}) == 1
    wide = torch.float32 if in_bytes else dtype
    adapter, bias = _side_by_side(beside, wide), None
    if any(base.bias is not None for base in bases):
        biases = [
            torch.zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases
        ]
        bias = torch.cat([each.to(wide) for each in biases])
    if in_bytes:
        return ByteProduct(kernels.ByteTable(parts), bias, adapter)
    dense = [base.dequantize(dtype) if _is_quantised(base) else base.weight.detach() for base in bases]
    return _dense_product(torch.cat([weight.T for weight in dense], dim=1), bias)._replace(adapter=adapter)


def _dense_product(table: Tensor, bias: Tensor | None) -> Product:
    rows, starts = kernels.shares_of_rows(table.shape[0], min(torch.get_num_threads(), table.shape[0]))
    return Product(table, None if bias is None else bias.detach(), rows, starts)


def _side_by_side(
    beside: list[tuple[nn.Module, Tensor | None, Tensor | None]], dtype: torch.dtype
) -> Adapter | None:
    """Adapters of linears with one input as one: A under each other, B along a diagonal."""
    if all(lora_a is None for _, lora_a, _ in beside):
        return None
    down = torch.cat([lora_a for _, lora_a, _ in beside if lora_a is not None])  # (sum of R, in)
    blocks = [torch.zeros(base.out_features, 0) if lora_b is None else lora_b for base, _, lora_b in beside]
    return Adapter(down.to(dtype), torch.block_diag(*(block.float() for block in blocks)).to(dtype))


def _all_plain(*linears: nn.Module) -> bool:
    return all(type(linear) is Linear for linear in linears)

"""What GGUF files have of their own: names and row order of tensors, and blocks of quantised numbers.

A row of a matrix is cut into blocks, each with its own scale d (fp16). With x the weights of one block:

    Q8_0   32 numbers in 34 bytes   x = d q, q in -127..127
    Q4_0   32 numbers in 18 bytes   x = d (q - 8), q in 0..15; d = (x of largest |x|) / -8, which is met
    Q5_0   32 numbers in 22 bytes   the same with q - 16 and 0..31: what rows get that Q4_K does not fit
    Q4_K   256 numbers in 144 bytes, 8 groups of 32   x = (d s) q - dmin m, with s, m in 0..63 of each group

Q4_K's scale and minimum of a group minimise sum w (scale q + minimum - x)^2 over 21 roundings q, w = rms(x) +
|x|: for given q that is a straight line fitted by least squares. Sources: llama.cpp's ggml-quants.c
(quantize_row_*_ref, make_qkx2_quants) and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from options.errors import UserError, refuse

# Hugging Face's name -> GGUF's, of parts of a block and of the rest
PART_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
PART_NAMES |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
PART_NAMES["self_attn.o_proj"] = "attn_output"
PART_NAMES |= {f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"}
PART_NAMES |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
WHOLE_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
DIVISORS = "rope_freqs.weight"  # of GGUF alone; Hugging Face has no such tensor

# numbers and bytes of one block; file format
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
BLOCKS |= {"Q8_0": (32, 34), "Q5_0": (32, 22), "Q4_0": (32, 18), "Q4_K": (256, 144)}
GROUP = 32  # numbers per scale and minimum of a Q4_K block
ROUNDINGS = 21  # tried per group, as llama.cpp: steps of 0.1 from 14 to 16 levels over the group's range
CHUNK_NUMBERS = 1 << 18  # encoded at a time; 1 MiB of fp32 stays in the processor's cache


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem, kind = hf_name.rsplit(".", 1)
    if hf_name == DIVISORS:
        return DIVISORS
    if stem in WHOLE_NAMES:
        return f"{WHOLE_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PART_NAMES[part]}.{kind}"


def row_bytes(numbers: int, kind: str) -> int:
    block, size = BLOCKS[kind]
    assert numbers % block == 0
    return numbers // block * size


def encode_rows(weight: Tensor, kind: str) -> Iterator[Tensor]:
    """weight (R, C) of any floating dtype -> pieces of the file, each (rows, row_bytes) uint8, in order.

    Raises UserError for numbers that the kind cannot hold: NaN, infinity, too large for fp16 or its scale.
    """
    rows = max(1, CHUNK_NUMBERS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        yield encode(weight[start : start + rows].float(), kind)


def encode(numbers: Tensor, kind: str) -> Tensor:
    """numbers (R, C) fp32 -> (R, row_bytes(C)) uint8. Raises UserError as encode_rows."""
    refuse(not torch.isfinite(numbers).all(), "NaN or infinity")
    if kind == "F32":
        return numbers.contiguous().view(torch.uint8)
    if kind in ("F16", "BF16"):
        rounded = numbers.to(torch.float16 if kind == "F16" else torch.bfloat16)
        return _fits(rounded, numbers).view(torch.uint8)
    blocks = numbers.reshape(-1, BLOCKS[kind][0])
    coder = {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_0": _q4_0, "Q4_K": _q4_k}[kind]
    return coder(blocks).view(len(numbers), -1)


def _fits(rounded: Tensor, numbers: Tensor) -> Tensor:
    if not torch.isfinite(rounded).all():
        raise UserError(f"numbers up to {float(numbers.abs().max()):g}, too large for {rounded.dtype}")
    return rounded.contiguous()


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale; 0 where scale is 0 or so small that there is no such number."""
    inverse = 1 / scale
    return torch.where(torch.isfinite(inverse), inverse, 0)


def _with_scale(scale: Tensor, *parts: Tensor) -> Tensor:
    """fp16 scale (N, 1) in front of the codes (N, ...) uint8."""
    return torch.cat([_fits(scale.to(torch.float16), scale).view(torch.uint8), *parts], 1)


def _nibbles(codes: Tensor) -> Tensor:
    """(N, 32) uint8, 0..15 -> (N, 16): code i in the low half, code i + 16 in the high half."""
    return codes[:, :16] | codes[:, 16:] << 4


def _q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _reciprocal(scale)
    size = scaled.abs()
    whole = size.floor()
    codes = scaled.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero, as C's roundf
    return _with_scale(scale, codes.to(torch.int8).view(torch.uint8))


def _symmetric(blocks: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """-> scale (N, 1) fp32, codes (N, 32) uint8 in 0 .. 2 half - 1."""
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -half
    codes = (blocks * _reciprocal(scale) + (half + 0.5)).clamp_(max=2 * half - 1)
    return scale, codes.to(torch.uint8)  # the cast cuts the fraction off


def _q4_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 8)
    return _with_scale(scale, _nibbles(codes))


def _q5_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 16)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    # bit i of 32: the fifth bit of code i
    fifth = ((codes >> 4).view(-1, 4, 8) * powers).sum(2, dtype=torch.uint8)
    return _with_scale(scale, fifth, _nibbles(codes & 15))


def _q4_k(blocks: Tensor) -> Tensor:
    count = len(blocks)
    parts, used = [], []
    for fitted in _fit_groups(blocks.view(-1, GROUP)):  # 6 bits each, in units of an fp16 number of the block
        values = fitted.view(count, 8)
        unit = values.amax(1, keepdim=True) / 63
        codes = (values * _reciprocal(unit)).round_().clamp_(max=63)
        stored = _fits(unit.to(torch.float16), unit)
        parts += [stored.view(torch.uint8), codes.to(torch.uint8)]
        used.append((stored.float() * codes)[:, :, None])
    step, offset = used
    # again with the scales as they are stored
    codes = (blocks.view(count, 8, GROUP) + offset) * _reciprocal(step)
    codes = codes.round_().clamp_(0, 15).to(torch.uint8).view(count, 4, 2, GROUP)
    packed = codes[:, :, 0] | codes[:, :, 1] << 4  # groups 0 and 1 share 32 bytes, then 2 and 3, ...
    d, scales, dmin, minima = parts
    return torch.cat([d, dmin, _pack_6_bits(scales, minima), packed.view(count, -1)], 1)


def _pack_6_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Two (N, 8) of 0..63 -> (N, 12) uint8: groups 0-3 whole, the two high bits of groups 4-7 above them."""
    whole = [codes[:, :4] | (codes[:, 4:] >> 4) << 6 for codes in (scales, minima)]
    return torch.cat([*whole, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], 1)


def _fit_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, 32) fp32 -> scale, minimum (N,) >= 0 (make_qkx2_quants): x ~ scale q - minimum, q in 0..15."""
    weight = x.square().mean(1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(1).clamp_(max=0), x.amax(1)
    sum_w, weighted = weight.sum(1), weight * x
    sum_x, sum_xx = weighted.sum(1), (weighted * x).sum(1)
    q, product = torch.empty_like(x), torch.empty_like(x)
    whole, lowest = (high - low) / 15, low  # 15 steps over the range, for groups that no line fits better
    torch.sub(x, low[:, None], out=q).mul_(_reciprocal(whole)[:, None]).round_().clamp_(0, 15)
    whole_error = q.mul_(whole[:, None]).add_(low[:, None]).sub_(x).square_().mul_(weight).sum(1)
    best_scale, best_error = whole, torch.full_like(sum_w, torch.inf)
    for step in range(ROUNDINGS):
        # from the best minimum so far, so that scale and minimum improve in turns
        levels = (14 + 0.1 * step) * _reciprocal(high - low)
        torch.sub(x, low[:, None], out=q).mul_(levels[:, None]).round_().clamp_(0, 15)
        sum_xl = torch.mul(weighted, q, out=product).sum(1)
        sum_l = torch.mul(weight, q, out=product).sum(1)
        sum_ll = product.mul_(q).sum(1)
        determinant = sum_w * sum_ll - sum_l * sum_l  # 0 but for rounding if all codes are the same
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        minimum = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = minimum > 0  # the format knows no positive minimum
        minimum = torch.where(above, 0, minimum)
        scale = torch.where(above, sum_xl / sum_ll, scale)
        # sum w (scale q + minimum - x)^2, multiplied out
        error = scale * (scale * sum_ll + 2 * (minimum * sum_l - sum_xl))
        error = error + minimum * (minimum * sum_w - 2 * sum_x) + sum_xx
        better = (determinant > 1e-5 * sum_w * sum_ll) & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        low = torch.where(better, minimum, low)
    better = best_error < whole_error
    return torch.where(better, best_scale, whole), -torch.where(better, low, lowest)

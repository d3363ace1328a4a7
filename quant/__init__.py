"""Quantised base layers: which formats there are, and which one the options or a checkpoint ask for.

    quantization = quant.from_options(QuantOptions(quantization_bit=4))    # 16-bit weights on loading
    quantization = quant.from_config(hf["quantization_config"])            # a checkpoint that is quantised
    layer = quantization.quantise(weight, bias, torch.bfloat16)            # stands in the place of a Linear
    layer.dequantize()                                                     # (out, in)

    linear        the contract: Format, QuantLinear (a kernels.linear.LinearLayer); taking tensors from a file
    bitsandbytes  4 bits: nf4 (nf4 or fp4), 8 bits: int8 (LLM.int8)
    eetq          8 bits, weights only
    hqq           1 to 8 bits, zeros fitted without data
    gptq, awq     checkpoints of groups with zeros (grouped); gptq_solver makes GPTQ's integers
    aqlm          checkpoints of sums of codebook vectors

To add one: copy hqq.py (a Format, a QuantLinear, from_config; BITS and in_bits where 16-bit weights can be
quantised), add it to METHODS, and to QUANTISERS if it has BITS.
"""

from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.json_fields import NUMBER, Field, check
from options.option import COMMON, option
from quant import aqlm, awq, bitsandbytes, eetq, gptq, hqq
from quant.linear import Format
from quant.nf4 import NF4Format

# quantization_method, and quant_method of config.json: files with from_config; errors begin with the key
METHODS = {"aqlm": aqlm, "awq": awq, "bitsandbytes": bitsandbytes, "eetq": eetq, "gptq": gptq, "hqq": hqq}
QUANTISERS = {"bitsandbytes": bitsandbytes, "eetq": eetq, "hqq": hqq}  # those that quantise 16-bit weights
# keys of quantization_config, at any depth; hqq alone may have a group of all (null)
SIZES = ("group_size", "q_group_size", "in_group_size", "out_group_size")
FIELDS = dict.fromkeys((*SIZES, "bits", "w_bit", "nbits", "nbits_per_codebook", "num_codebooks"), Field(int))
FIELDS |= {"axis": Field(int), "llm_int8_threshold": Field(NUMBER, 0, 1e6), "meta": Field(dict, null=True)}
TRUTHS = ("sym", "desc_act", "zero_point", "load_in_4bit", "load_in_8bit", "llm_int8_has_fp16_weight")
FIELDS |= dict.fromkeys((*TRUTHS, "bnb_4bit_use_double_quant"), Field(bool))
SKIPPED = {kind.skip_key for kind in (NF4Format, Format, hqq.HQQFormat)}
FIELDS |= dict.fromkeys(SKIPPED, Field(list, null=True))


@dataclass(frozen=True)
class QuantOptions:
    quantization_bit: int | None = option(
        None, "quantise the base model to this many bits while it is read", COMMON, also="quant_bits"
    )
    quantization_method: Literal["bitsandbytes", "eetq", "hqq"] = option(
        "bitsandbytes",
        "how: bitsandbytes = 4 bits (nf4 or fp4) or 8 (LLM.int8); eetq = 8, weights only; hqq = 8, 6, 5, "
        "4, 3, 2 or 1",
        also="quant_method",
    )
    quantization_type: Literal["nf4", "fp4"] = option(
        "nf4", "levels of the 4-bit codes", also="quant_type bnb_4bit_quant_type"
    )
    double_quantization: bool = option(
        True, "hold the scales of 4-bit blocks in 8 bits too", also="double_quant bnb_4bit_use_double_quant"
    )

    def __post_init__(self):
        format, method = from_options(self), self.quantization_method  # refused before anything is read
        if self.quantization_bit is None and method != "bitsandbytes":
            raise UserError(
                f"quantization_method: {method} without quantization_bit quantises nothing; give "
                "quantization_bit (0 = none) or drop quantization_method (quantised checkpoints need neither)"
            )
        four_bits = isinstance(format, NF4Format) or self.quantization_bit == 0
        if self.quantization_type != "nf4" and not four_bits:
            raise UserError(
                f"quantization_type: {self.quantization_type} is a kind of 4 bits of bitsandbytes; set "
                "quantization_bit=4 and quantization_method=bitsandbytes, or drop quantization_type"
            )


def from_options(options: QuantOptions) -> Format | None:
    """The format that the options ask for, None for a model that is not quantised. Raises UserError."""
    return in_bits(options.quantization_bit, options, "quantization_bit")


def in_bits(bits: int | None, options: QuantOptions, key: str) -> Format | None:
    """from_options, but of so many bits, as option `key` asks for another model."""
    if bits in (None, 0, 16, 32):
        return None
    quantiser = QUANTISERS[options.quantization_method]
    if bits not in quantiser.BITS:
        known = " and ".join(map(str, quantiser.BITS))
        raise UserError(f"{key}: {bits}; quantization_method={options.quantization_method} has {known}")
    return quantiser.in_bits(bits, options)


def from_config(settings: dict) -> Format:
    """The format of a checkpoint with this quantization_config. Raises UserError naming the key."""
    method = settings.get("quant_method", "unknown")
    if "quant_method" not in settings and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = NF4Format.method  # older files do not say
    try:
        if not isinstance(method, str) or method not in METHODS:
            raise UserError(f"quant_method {method!r} is not known; use a 16-bit release")
        _check_kinds(settings, method)
        return METHODS[method].from_config(settings)
    except KeyError as error:
        raise UserError(f"config.json: quantization_config.{error.args[0]} is missing") from error
    except UserError as error:
        raise UserError(f"config.json: quantization_config.{error}") from error


def _check_kinds(settings: dict, method: str) -> None:
    fields = FIELDS | ({"group_size": Field(int, null=True)} if method == "hqq" else {})
    check(settings, fields)
    for value in settings.values():
        if isinstance(value, dict):
            _check_kinds(value, method)

"""bitsandbytes: 4 bits are quant/nf4.py (nf4 or fp4), 8 are quant/int8.py (LLM.int8)."""

from options.errors import UserError
from quant import int8, nf4
from quant.linear import Format

BITS = (4, 8)


def in_bits(bits: int, options) -> Format:
    """What QuantOptions ask for in so many bits."""
    if bits == 8:
        return int8.Int8Format()
    return nf4.NF4Format(options.quantization_type, options.double_quantization)


def from_config(settings: dict) -> Format:
    """The format of a checkpoint's quantization_config. Raises UserError starting with the key."""
    if settings.get("load_in_8bit"):
        return int8.from_config(settings)
    if settings.get("load_in_4bit"):
        return nf4.from_config(settings)
    raise UserError("load_in_4bit and load_in_8bit are not true; use a 4-bit, 8-bit or 16-bit release")

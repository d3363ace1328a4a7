"""One row through weights in bytes: the bag gives the formula's product, for any threads, groups and
sizes."""

import pytest
import torch
from kernel_checks import relative_error

from kernels.byte_linear import Bytes, ByteTable, byte_linear_reference


def weight(inputs, outputs, groups, zero, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (inputs, outputs), dtype=torch.uint8, generator=generator)
    return Bytes(codes, zero, torch.rand(groups, outputs, generator=generator))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("inputs", "groups"), [(1, 1), (3, 1), (123, 1), (34, 2), (192, 3), (128, 128)])
@pytest.mark.parametrize("outputs", [(1,), (17, 5, 64)])
def test_equals_the_formula(outputs, inputs, groups, threads):
    parts = [weight(inputs, size, groups, 127.25, seed) for seed, size in enumerate(outputs)]
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(9))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (found,) = ByteTable(parts)(x[None])
    finally:
        torch.set_num_threads(before)
    wide = [Bytes(codes, zero, scales.double()) for codes, zero, scales in parts]
    exact = byte_linear_reference(x.double(), wide)
    assert found.dtype is torch.float32 and found.shape == exact.shape
    assert relative_error(found, exact) <= 3e-6
    assert relative_error(byte_linear_reference(x, parts), exact) <= 3e-6


def test_parts_that_cannot_stand_in_one_table_are_refused():
    one = weight(64, 3, 1, 128.0, 0)
    for other in (weight(64, 3, 2, 128.0, 0), weight(64, 3, 1, 127.0, 0)):
        with pytest.raises(ValueError, match="cannot stand in one table"):
            ByteTable([one, other])

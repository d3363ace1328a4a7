"""4-bit weights on a GPU at the sizes of real models: to the bit, by the rule, in a CUDA graph."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from kernel_checks import assert_as_exact_as, random

import kernels
import lora
from architectures import config_from_hf
from bench import four_bits
from generation.generate import Decoding
from generation.sampling import GenerateOptions
from kernels.linear import Part
from kernels.nf4 import dequantise_reference, small_batch_reference
from quant.nf4 import NF4Format

SHAPES = [(4096, 11008), (11008, 4096), (1024, 3584), (28672, 8192)]
SHAPE = {
    "model_type": "llama", "vocab_size": 1001, "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def layer_of(outputs, inputs, double, dtype=torch.bfloat16):
    weight = random(outputs, inputs, scale=inputs**-0.5)
    return NF4Format("nf4", double).quantise(weight, None, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_large_weights_are_written_out_to_the_bit(shape, double, dtype):
    layer = layer_of(*shape, double, dtype)
    expected = torch.empty(shape, dtype=dtype, device="cuda")
    dequantise_reference(layer.for_kernels(), expected)
    assert torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize("double", [True, False])
def test_values_and_codes_are_those_of_bitsandbytes_on_the_gpu(double):
    functional = pytest.importorskip("bitsandbytes.functional")
    layer = layer_of(1024, 4096, double)
    linear = four_bits.linear_4bit(layer, torch.bfloat16)
    theirs = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(layer.dequantize(), theirs)


def test_a_gpu_quantises_as_a_cpu():
    weight = random(300, 1000)
    on_gpu, on_cpu = (
        NF4Format("nf4", False).quantise(x, None, torch.float32) for x in (weight, weight.cpu())
    )
    assert torch.equal(on_gpu.codes.cpu(), on_cpu.codes) and torch.equal(on_gpu.absmax.cpu(), on_cpu.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_a_few_rows_at_real_sizes(shape, rows, dtype):
    layer = layer_of(*shape, True, dtype)
    low = random(16, shape[1], scale=shape[1] ** -0.5), random(shape[0], 16)
    part = Part(layer.for_kernels(), None, *low, 0.5)

    def kernel(x):
        with torch.no_grad():
            return layer.from_codes(x, [part._replace(weight=layer)])[0]

    def reference(x):
        wide = (
            part._replace(lora_a=low[0].double(), lora_b=low[1].double())
            if x.dtype is torch.float64
            else part
        )
        return small_batch_reference(x, wide)

    assert_as_exact_as(kernel, reference, [random(rows, shape[1])], dtype, ())


def quantised(dtype, rank):
    model = four_bits.random_decoder(config_from_hf(SHAPE), dtype, torch.device("cuda"))
    if rank:
        lora.add_lora(model, lora.LoraOptions(lora_rank=rank))
        for place, layer in enumerate(lora.lora_layers(model).values()):
            layer.lora_b.data = random(*layer.lora_b.shape, seed=place, scale=0.1)
    return model.eval()


def texts_of(model, prompts, fixed_shapes):
    options = GenerateOptions(do_sample=False, max_new_tokens=60)
    decoding = Decoding(model, prompts, options, stop_ids=(), fixed_shapes=fixed_shapes)
    while decoding.live:
        decoding.step()
    return [decoding.completion(i).ids for i in range(len(prompts))], decoding


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("lengths", [(9,), (40, 3, 17)], ids=["one", "three"])
def test_steps_in_4_bits_are_replayed_and_give_the_tokens_of_the_ordinary_path(lengths, rank):
    model = quantised(torch.float32, rank)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 1000, (length,), generator=generator).tolist() for length in lengths]
    expected, _ = texts_of(model, prompts, False)
    found, decoding = texts_of(model, prompts, True)
    assert found == expected
    assert any(steps.replay.graph is not None for steps in decoding.cache.kept.values())


def test_nothing_waits_for_the_gpu():
    model = quantised(torch.bfloat16, 8)
    x = random(1, 256).bfloat16()
    with torch.no_grad():
        attention = model.layers[0].self_attn
        layers = [attention.q_proj, attention.k_proj, attention.v_proj]
        expected = kernels.linears(x, [layer.part() for layer in layers])  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = kernels.linears(x, [layer.part() for layer in layers])
            dense = layers[0].base.dequantize()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and dense.isfinite().all()


def test_the_memory_of_a_product_is_that_of_its_result():
    """The dense weight is not made."""
    layer, x = layer_of(11008, 4096, True), random(4, 4096).bfloat16()
    with torch.no_grad():
        layer.from_codes(x, [layer.part()])
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.from_codes(x, [layer.part()])
        assert torch.cuda.max_memory_allocated() - before < 2**22 < 2 * 11008 * 4096
    assert "Triton" in kernels.choices("cuda")

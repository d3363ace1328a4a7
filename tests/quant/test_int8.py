"""int8: codes, products and checkpoints are those of bitsandbytes; EETQ's order is that of its CUDA
kernel."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear8bitLt
from kernel_checks import relative_error
from safetensors.torch import load_file, save_file
from test_model import oracle, row_of
from tiny_runs import tiny_runs

import chat
import quant
from checkpoints.huggingface import load_model, save_model
from kernels.linear import Part
from lora import LoraLinear
from quant import QuantOptions
from quant.eetq import EETQFormat, to_eetq_order
from quant.int8 import Int8Format, int8_product, int8_products_are_fast, llm_int8
from quant.linear import QuantLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [Int8Format(), EETQFormat()]
EPSILON = {torch.float32: 2e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def matrix(outputs, inputs, dtype=torch.float32, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(rows, inputs, dtype=torch.float32, columns=(3, 7)):
    """Numbers under the threshold but for some columns, in which two rows have larger ones."""
    x = matrix(rows, inputs, seed=1).clamp_(-5, 5)
    for column in columns:
        x[0, column], x[rows // 2, column] = 11.0, -6.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 123), (300, 1000)])
def test_codes_and_scales_are_those_of_bitsandbytes(shape, dtype):
    weight = matrix(*shape, dtype)
    layer = Int8Format().quantise(weight, None, dtype)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    assert torch.equal(layer.codes, codes) and torch.equal(layer.absmax, absmax)
    dense = bnb.int8_vectorwise_dequant(codes, absmax)
    for wanted in DTYPES:
        assert relative_error(layer.dequantize(wanted), dense) <= EPSILON[wanted]
        assert layer.dequantize(wanted).dtype is wanted
    assert layer.bits_per_weight == 8 + 32 / shape[1]


@pytest.mark.parametrize("chosen", FORMATS)
def test_rows_of_zeros_and_numbers_that_are_not_finite(chosen):
    weight = matrix(5, 70)
    weight[2] = 0
    layer = chosen.quantise(weight, None, torch.float32)
    assert not layer.dequantize()[2].any()
    assert (layer.dequantize() - weight).abs().amax() <= 0.51 * weight.abs().amax() / 127
    for wrong in (torch.nan, torch.inf):
        weight[1, 3] = wrong
        with pytest.raises(ValueError, match="not finite"):
            chosen.quantise(weight, None, torch.float32)


def by_formula(x, layer, threshold):
    """LLM.int8 in fp64, from the paper's words."""
    x, codes, scale = x.double(), layer.codes.double(), layer.absmax.double() / 127
    columns = (x.abs() >= threshold).any(0)
    size = x.abs().masked_fill(x.abs() >= threshold, 0).amax(1, keepdim=True)
    rows = (x * 127 / size).round().masked_fill(columns, 0)
    return (
        rows * (size / 127) @ (codes * scale[:, None]).T + x[:, columns] @ (codes * scale[:, None]).T[columns]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [(), (3, 7), tuple(range(23))])
def test_product_of_many_rows_is_that_of_the_paper_and_of_bitsandbytes(columns, dtype):
    layer = Int8Format().quantise(matrix(31, 123), None, dtype)
    x = activations(19, 123, dtype, columns)
    found = llm_int8(x, layer.codes, layer._scale(), 6.0)
    assert found.dtype is dtype and relative_error(found, by_formula(x, layer, 6.0)) <= 2 * EPSILON[dtype]
    if dtype is torch.float16:  # it rounds x to fp16 in any case
        theirs = Linear8bitLt(123, 31, bias=False, has_fp16_weights=False, threshold=6.0).eval()
        theirs.weight.data = matrix(31, 123).half()
        theirs = theirs.to("cpu")
        with torch.no_grad():
            assert relative_error(found, theirs(x)) <= 2 * EPSILON[dtype]
            # the layer takes it where the processor is fast at it
            assert not int8_products_are_fast(x.device) or torch.equal(layer(x), found)


def test_a_row_that_is_not_a_number_spoils_no_other():
    layer = Int8Format().quantise(matrix(31, 64), None, torch.float32)
    x = matrix(20, 64, seed=1)
    clean = layer(x)
    x[4, 5] = torch.nan
    found = layer(x)
    assert found[4].isnan().all() and torch.equal(found[5:], clean[5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chosen", FORMATS)
def test_the_gradient_is_that_of_the_dense_weight(chosen, dtype):
    layer = chosen.quantise(matrix(31, 123), matrix(1, 31)[0], dtype)
    x = activations(19, 123, dtype).requires_grad_(True)
    adapted = LoraLinear(layer, 4, 8.0)
    torch.nn.init.normal_(adapted.lora_b, generator=torch.Generator().manual_seed(2))
    dy = matrix(19, 31, dtype, seed=3)
    adapted(x).backward(dy)
    weight, low = layer.dequantize(torch.float64), adapted.lora_b.double() @ adapted.lora_a.double() * 2
    assert relative_error(x.grad, dy.double() @ (weight + low)) <= 3 * EPSILON[dtype]
    exact = x.double() @ (weight + low).T + layer.bias.double()
    in_int8 = chosen.method == "bitsandbytes" and int8_products_are_fast(x.device)
    rounding = 0.02 if in_int8 else 0  # of the activations
    assert relative_error(adapted(x.detach()), exact) <= rounding + 4 * EPSILON[dtype]
    expected = by_formula(x.detach(), layer, 6.0) + x.detach().double() @ low.T + layer.bias.double()
    if in_int8:
        assert relative_error(adapted(x.detach()), expected) <= 4 * EPSILON[dtype]


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_few_rows_are_read_with_the_activations_as_they_are(rows, chosen):
    layer = chosen.quantise(matrix(48, 192), matrix(1, 48)[0], torch.bfloat16)
    x = activations(rows, 192, torch.bfloat16)
    lora_a, lora_b = matrix(3, 192, seed=4), matrix(48, 3, seed=5)
    found = layer.from_codes(x, [Part(layer, layer.bias, lora_a, lora_b, 0.5)])[0]
    exact = x.double() @ (layer.dequantize(torch.float64) + lora_b.double() @ lora_a.double() * 0.5).T
    assert relative_error(found, exact + layer.bias.double()) <= 3 * EPSILON[torch.bfloat16]
    odd = chosen.quantise(matrix(31, 123), None, torch.bfloat16)
    with torch.no_grad():  # torch's product would read past the end
        assert odd.from_codes(activations(rows, 123, torch.bfloat16), [odd.part()]) is None
        assert odd(x[:, :123]).shape == (rows, 31)


# Checkpoints


def theirs(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **settings).eval()


def logits(model, tokens):
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            return model(tokens[None]).logits[0]
        return model.logits(model(tokens, *row_of([len(tokens)])[1:]))


def quantised(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def test_checkpoints_of_bitsandbytes_go_both_ways(tmp_path):
    oracle("llama-biases").save_pretrained(tmp_path / "16 bit")
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    theirs(tmp_path / "16 bit", quantization_config=config).save_pretrained(tmp_path / "saved")
    tokens = row_of([29])[0]
    expected = logits(theirs(tmp_path / "saved"), tokens)
    model = load_model(tmp_path / "saved")
    assert len(quantised(model)) == 7 * model.config.num_layers
    assert {layer.format for layer in quantised(model).values()} == {Int8Format()}
    # noise of the activations apart, of which theirs is another: they round them to fp16 first
    assert relative_error(logits(model, tokens), expected) <= 0.1
    training = theirs(tmp_path / "saved").train()  # takes the dense weights on a CPU
    for layer in quantised(model).values():
        layer.format = EETQFormat()
    assert relative_error(logits(model, tokens), logits(training, tokens)) <= 1e-5
    for layer in quantised(model).values():
        layer.format = Int8Format()

    save_model(model, tmp_path / "again", tmp_path / "saved")
    one, other = (
        load_file(tmp_path / "saved/model.safetensors"),
        load_file(tmp_path / "again/model.safetensors"),
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name
    assert torch.equal(logits(theirs(tmp_path / "again"), tokens), expected)

    ours = load_model(tmp_path / "16 bit", quantization=Int8Format())
    for name, layer in quantised(ours).items():
        same = model.get_submodule(name)
        assert torch.equal(layer.codes, same.codes) and torch.equal(layer.absmax, same.absmax), name


def test_eetq_order_is_that_of_its_preprocessing():
    """Step by step after cutlass_preprocessors.cc of EETQ: permute rows, transpose, interleave columns, add
    128."""
    inputs, outputs = 192, 64
    codes = torch.randint(
        -127, 128, (outputs, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    row_major = codes.T.tolist()  # (in, out)
    permuted = [
        row_major[base + 8 * ((tile % 4) // 2) + tile % 2 + 2 * (tile // 4)]
        for base in range(0, inputs, 16)
        for tile in range(16)
    ]
    columns = [[permuted[row][column] for row in range(inputs)] for column in range(outputs)]
    words, flat = inputs // 4, [None] * (inputs * outputs // 4)
    for column in range(outputs):
        for base in range(0, words, 16):
            for word in range(base, base + 16):
                place = (column // 2) * words * 2 + 2 * base + 16 * (column % 2) + word % 16
                flat[place] = columns[column][4 * word : 4 * word + 4]
    expected = [(value + 128) % 256 for a, b, c, d in flat for value in (a, c, b, d)]
    order = to_eetq_order(codes)
    assert order.shape == (inputs, outputs) and order.view(torch.uint8).flatten().tolist() == expected
    layer = EETQFormat().quantise(matrix(outputs, inputs), None, torch.float32)
    again = EETQFormat().read(layer.tensors(), (outputs, inputs), None, torch.float32)
    assert torch.equal(again.codes, layer.codes) and torch.equal(again.dequantize(), layer.dequantize())


def test_eetq_models_save_and_load(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=131, num_hidden_layers=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "16 bit")
    model = load_model(tmp_path / "16 bit", quantization=EETQFormat())
    save_model(model, tmp_path / "eetq", tmp_path / "16 bit")
    again = load_model(tmp_path / "eetq")
    assert {layer.format for layer in quantised(again).values()} == {EETQFormat()}
    tokens = row_of([29])[0]
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    settings = json.loads((tmp_path / "eetq/config.json").read_text())["quantization_config"]
    assert transformers.EetqConfig(**settings).weights == "int8"
    with pytest.raises(ValueError, match="does not fit EETQ's layout"):
        EETQFormat().quantise(matrix(8, 100), None, torch.float32).tensors()


LAYER = "model.layers.1.mlp.down_proj"
WRONG = {
    "SCB is missing": ("SCB", lambda tensor: None, "SCB"),
    "codes cut off": ("weight", lambda tensor: tensor[:, :-3], "weight is int8"),
    "scales of another layer": ("SCB", lambda tensor: tensor[:-1], "SCB is float32"),
    "floats": ("weight", lambda tensor: tensor.float(), "weight is float32"),
    "scales not finite": ("SCB", lambda tensor: tensor / 0, "SCB holds"),
    "negative scales": ("SCB", lambda tensor: -tensor, "SCB holds"),
    "another order": ("weight_format", lambda tensor: tensor + 2, "weight_format is 2"),
    "one too many": ("absmax", lambda tensor: torch.ones(3), "absmax has no place"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    oracle("llama-biases").save_pretrained(folder / "16 bit")
    save_model(load_model(folder / "16 bit", quantization=Int8Format()), folder / "int8", folder / "16 bit")
    return folder / "int8"


@pytest.mark.parametrize("fault", WRONG)
def test_a_malformed_checkpoint_is_refused_by_name(fault, whole, tmp_path):
    part, change, message = WRONG[fault]
    shutil.copytree(whole, tmp_path / "wrong")
    tensors = load_file(whole / "model.safetensors")
    changed = change(tensors.pop(f"{LAYER}.{part}", None))
    tensors |= {} if changed is None else {f"{LAYER}.{part}": changed.contiguous()}
    save_file(tensors, tmp_path / "wrong/model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: tensor ") as error:
        load_model(tmp_path / "wrong")
    assert f"{LAYER}.{message}" in str(error.value) or fault == "SCB is missing" and LAYER in str(error.value)


def test_options_choose_the_format():
    assert quant.from_options(QuantOptions(quantization_bit=8)) == Int8Format()
    assert quant.from_options(QuantOptions(quantization_bit=8, quantization_method="eetq")) == EETQFormat()
    with pytest.raises(ValueError, match="eetq has 8"):
        QuantOptions(quantization_bit=4, quantization_method="eetq")
    with pytest.raises(ValueError, match="bitsandbytes has 4 and 8"):
        QuantOptions(quantization_bit=3)
    with pytest.raises(ValueError, match="hqq without quantization_bit quantises nothing"):
        QuantOptions(quantization_method="hqq")
    for others in ({}, {"quantization_bit": 8}, {"quantization_bit": 4, "quantization_method": "hqq"}):
        with pytest.raises(ValueError, match="quantization_type: fp4 is a kind of 4 bits of bitsandbytes"):
            QuantOptions(quantization_type="fp4", **others)
    off = QuantOptions(quantization_bit=0, quantization_type="fp4", quantization_method="hqq")
    assert quant.from_options(off) is None
    for chosen in (Int8Format(), Int8Format(5.0), EETQFormat()):
        assert quant.from_config(chosen.config()) == chosen
    with pytest.raises(ValueError, match="llm_int8_threshold"):
        quant.from_config(Int8Format().config() | {"llm_int8_threshold": "six"})


@pytest.mark.parametrize("method", ["bitsandbytes", "eetq"])
def test_training_and_chat_from_the_command_line(method, tmp_path, capsys):
    with tiny_runs(tmp_path) as tiny:
        keys = {"quantization_bit": 8, "quantization_method": method}
        assert tiny.train("dense", num_train_epochs=1) == 0
        assert tiny.train("out", num_train_epochs=1, **keys) == 0
        for step, loss in tiny.losses("dense").items():
            assert tiny.losses("out")[step] == pytest.approx(loss, abs=0.03)
        words = [f"model_name_or_path={tiny.model}", "prompt=hammer", "template=chatml", "max_new_tokens=3"]
        words += ["do_sample=false", "quantization_bit=8", f"quantization_method={method}"]
        assert chat.main(words) == 0


def test_the_product_of_integers_is_exact():
    a = torch.randint(-127, 128, (5, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    b = torch.randint(-127, 128, (7, 40), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(int8_product(a, b), (a.int() @ b.int().T))

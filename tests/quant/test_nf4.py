"""NF4 and FP4 are bitsandbytes' own to the bit: codes, scales, values, and the checkpoints both read and
write."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import oracle, row_of
from tiny_runs import tiny_runs
from torch import nn

import chat
import export
import quant
from checkpoints.huggingface import load_model, save_model
from quant import QuantOptions
from quant.linear import QuantLinear
from quant.nf4 import NF4Format, dynamic_map, map_tensor

CPU = torch.device("cpu")
FORMATS = [NF4Format(table, double) for table in ("nf4", "fp4") for double in (False, True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),
    (3, 5),
    (1, 63),
    (1, 65),
    (7, 9),
    (13, 77),
    (64, 64),
    (1, 16384),
    (1, 16385),
    (300, 512),
    (513, 1031),
]


def with_zero_blocks(weight):
    weight.view(-1)[: weight.numel() // 2] = 0
    return weight


def on_thresholds(weight):
    """Numbers that, scaled, lie half-way between two levels, or one step beside."""
    levels = torch.cat([bnb.get_4bit_type(table, "cpu").sort().values for table in ("nf4", "fp4")])
    middles = (levels[1:] + levels[:-1]) / 2
    near = torch.cat(
        [middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0)), levels]
    )
    weight.view(-1).copy_(near.repeat(-(-weight.numel() // len(near)))[: weight.numel()])
    weight.view(-1)[::64] = 1
    return weight


def tiny(weight):
    return (
        weight * 1e-34
    )  # values stay normal numbers: bitsandbytes' bfloat16 has no subnormal ones on some CPUs


KINDS = {
    "normal": lambda weight: weight,
    "zero blocks": with_zero_blocks,
    "thresholds": on_thresholds,
    "tiny": tiny,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.compiler.set_stance("force_eager")  # bitsandbytes compiles what it does for rows of odd length
def test_codes_scales_and_values_are_those_of_bitsandbytes(dtype, kind):
    for place, shape in enumerate(SHAPES):
        torch.manual_seed(place)
        weight = KINDS[kind](torch.randn(shape)).to(dtype)
        for chosen in FORMATS:
            codes, state = bnb.quantize_4bit(
                weight, quant_type=chosen.table, compress_statistics=chosen.double
            )
            layer = chosen.quantise(weight, None, dtype)
            assert torch.equal(layer.codes, codes.view(-1)) and torch.equal(layer.absmax, state.absmax), (
                shape,
                chosen,
            )
            if chosen.double:
                assert torch.equal(layer.nested_absmax, state.state2.absmax), (shape, chosen)
                assert torch.equal(layer.offset, state.offset), (shape, chosen)
            for result in DTYPES:
                state.dtype = result
                expected = bnb.dequantize_4bit(codes.view(-1, 1), state)
                expected = (
                    expected.T if len(codes) == 1 else expected
                )  # it gives a single byte back transposed
                assert torch.equal(layer.dequantize(result), expected.view(shape)), (shape, chosen, result)


def test_the_table_of_scales_is_that_of_bitsandbytes():
    assert torch.equal(map_tensor(dynamic_map(), CPU), bnb.create_dynamic_map())


def test_scales_in_8_bits_wherever_they_fall():
    """Every place of the lookup and its edges: 20 times more scales than places."""
    torch.manual_seed(1)
    scales = torch.rand(1 << 20) ** 3
    codes, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=256)
    ours = quant.nf4.quantise_scales(scales)
    assert torch.equal(ours.absmax, codes) and torch.equal(ours.nested, state.absmax)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(wrong, tmp_path):
    weight = torch.ones(70, 10)
    weight[69, 9] = wrong
    with pytest.raises(ValueError, match="NaN or infinity"):
        NF4Format().quantise(weight, None, torch.float32)
    model = oracle("llama-biases")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = wrong
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tensor model.layers.1.mlp.up_proj.weight holds NaN"):
        load_model(tmp_path, quantization=NF4Format())


def test_bits_of_a_weight():
    """4 + 8/64 + 32/(64 * 256), and one number for the offset; no table is held by a layer."""
    weight = torch.randn(512, 1024)
    assert NF4Format().quantise(weight, None, torch.float32).bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert NF4Format(double=False).quantise(weight, None, torch.float32).bits_per_weight == 4.5


def test_a_slice_and_a_view_that_is_not_whole_are_filled_too():
    layer = NF4Format().quantise(torch.randn(6, 10), None, torch.float32)
    wide = torch.zeros(6, 20)
    layer.dequantize(out=wide[:, ::2])
    assert torch.equal(wide[:, ::2], layer.dequantize()) and not wide[:, 1::2].any()
    transposed = torch.randn(10, 6).T
    same = NF4Format().quantise(transposed.contiguous(), None, torch.float32)
    assert torch.equal(NF4Format().quantise(transposed, None, torch.float32).codes, same.codes)


# Checkpoints


def saved_by_transformers(folder: Path, chosen: NF4Format, dtype=torch.float32, **settings) -> Path:
    """A tiny Llama that transformers and bitsandbytes quantised and saved."""
    oracle("llama-biases").to(dtype).save_pretrained(folder / "16 bit")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=chosen.table,
        bnb_4bit_use_double_quant=chosen.double,
        bnb_4bit_compute_dtype=dtype,
        **settings,
    )
    theirs(folder / "16 bit", quantization_config=config, dtype=dtype).save_pretrained(folder / "saved")
    return folder / "saved"


def theirs(folder, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **settings).eval()


def logits(model, tokens):
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            for layer in model.modules():
                layer.support_avx512bf16_for_cpu = (
                    False  # or it computes in bfloat16 whatever the model's dtype
                )
            return model(tokens[None]).logits[0]
        return model.logits(model(tokens, *row_of([len(tokens)])[1:]))


def quantised(model) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("chosen", FORMATS, ids=lambda chosen: chosen.describe())
def test_checkpoints_go_both_ways(chosen, tmp_path):
    saved = saved_by_transformers(tmp_path, chosen)
    tokens = row_of([29])[0]
    expected = logits(theirs(saved), tokens)
    model = load_model(saved)
    assert len(quantised(model)) == 7 * model.config.num_layers
    assert all(layer.format.describe() == chosen.describe() for layer in quantised(model).values())
    # processors differ in bitsandbytes' products: 1.4e-5 without AVX-512
    torch.testing.assert_close(logits(model, tokens), expected, atol=3e-5, rtol=1e-5)

    save_model(model, tmp_path / "again", saved)
    one, other = load_file(saved / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype, name
    assert torch.equal(logits(theirs(tmp_path / "again"), tokens), expected)
    save_model(
        model, tmp_path / "shards", saved, shard_gigabytes=5e-7
    )  # the parts of a layer in several files
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 50
    assert torch.equal(logits(load_model(tmp_path / "shards"), tokens), logits(model, tokens))

    ours = load_model(tmp_path / "16 bit", quantization=chosen)
    for name, layer in quantised(ours).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize()), name
    save_model(ours, tmp_path / "ours", tmp_path / "16 bit")
    assert torch.equal(logits(theirs(tmp_path / "ours"), tokens), expected)
    again = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert again["bnb_4bit_compute_dtype"] == "float32" and again["bnb_4bit_quant_type"] == chosen.table


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_codes_stored_as_another_dtype(storage, tmp_path):
    """As for FSDP: the same bytes under another name."""
    plain = saved_by_transformers(tmp_path / "uint8", NF4Format())
    other = saved_by_transformers(tmp_path / storage, NF4Format(), bnb_4bit_quant_storage=storage)
    one, other = quantised(load_model(plain)), quantised(load_model(other))
    for name, layer in one.items():
        assert torch.equal(layer.codes, other[name].codes), name


def test_modules_that_the_checkpoint_leaves_dense_stay_so(tmp_path):
    saved = saved_by_transformers(tmp_path, NF4Format(), llm_int8_skip_modules=["lm_head", "down_proj"])
    model = load_model(saved)
    assert isinstance(model.layers[0].mlp.down_proj, nn.Linear)
    assert len(quantised(model)) == 6 * model.config.num_layers
    save_model(model, tmp_path / "again", saved)
    tokens = row_of([11])[0]
    assert torch.equal(logits(theirs(tmp_path / "again"), tokens), logits(theirs(saved), tokens))


def test_a_head_in_4_bits_becomes_dense(tmp_path):
    """Generation and losses ask for the head's weight as it is."""
    saved = saved_by_transformers(tmp_path, NF4Format(), llm_int8_skip_modules=["nothing"])
    assert "lm_head.weight.absmax" in load_file(saved / "model.safetensors")
    model = load_model(saved)
    assert len(quantised(model)) == 7 * model.config.num_layers
    tokens = row_of([11])[0]
    expected = logits(theirs(saved), tokens)
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-5, rtol=1e-5)
    save_model(model, tmp_path / "again", saved)
    torch.testing.assert_close(logits(theirs(tmp_path / "again"), tokens), expected, atol=1e-5, rtol=1e-5)


PEAK = """
import sys, threading, torch
sys.path.insert(0, {root!r})
from checkpoints.huggingface import load_model
from quant.linear import QuantLinear
from quant.nf4 import NF4Format

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

load_model({small!r}, torch.bfloat16, quantization=NF4Format())  # imports and tables
before = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
model = load_model({large!r}, torch.bfloat16, quantization=NF4Format())
done.set()
thread.join()
packed = sum(module.storage_bytes for module in model.modules() if isinstance(module, QuantLinear))
print(peak - before, packed + sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of anonymous pages")
def test_quantising_while_loading_needs_less_than_one_tensor_beside_the_model(tmp_path):
    """The mapped file does not count: its pages are the system's cache. 9 of the tensors have 16 MB in
    fp32."""
    oracle("llama-biases").save_pretrained(tmp_path / "small")
    sizes = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 3, "vocab_size": 131}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=1, head_dim=32)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    root, small, large = (
        str(path) for path in (Path(__file__).parents[2], tmp_path / "small", tmp_path / "large")
    )
    script = PEAK.format(root=root, small=small, large=large)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    peak, model = map(int, run.stdout.split())
    assert 20e6 < model < 35e6  # of 200 MB
    assert peak < model + 17.2e6  # 0.4 MB for what looking at the numbers takes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    oracle("llama-biases").save_pretrained(folder / "16 bit")
    save_model(load_model(folder / "16 bit", quantization=NF4Format()), folder / "nf4", folder / "16 bit")
    return folder / "nf4"


LAYER = "model.layers.1.mlp.down_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"


def state_with(**changes):
    def change(tensor):
        state = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[-1] = torch.nan
    return tensor


MALFORMED = {
    "codes cut": ("weight", lambda t: t[:-1], "bytes; config.json asks for"),
    "codes of another dtype": ("weight", lambda t: t.int().to(torch.int64), "int64"),
    "no codes": ("weight", None, "weight is missing"),
    "scales cut": ("weight.absmax", lambda t: t[:-1], "config.json asks for uint8"),
    "scales of another dtype": ("weight.absmax", lambda t: t.half(), "float16"),
    "no table": ("weight.quant_map", None, "weight.quant_map is missing"),
    "another table": ("weight.quant_map", lambda t: t.flip(0), "other levels than those of nf4"),
    "no nested scales": ("weight.nested_absmax", None, "weight.nested_absmax is missing"),
    "nested scales cut": ("weight.nested_absmax", lambda t: t[:0], "weight.nested_absmax is float32"),
    "nested scales NaN": ("weight.nested_absmax", with_nan, "NaN"),
    "no nested table": ("weight.nested_quant_map", None, "weight.nested_quant_map is missing"),
    "no state": (STATE, None, "quant_state.bitsandbytes__nf4 or ...fp4: found none"),
    "state cut": (STATE, lambda t: t[:-2], "not JSON"),
    "state a number": (
        STATE,
        lambda t: torch.tensor(list(b"17"), dtype=torch.uint8),
        "expected a JSON object",
    ),
    "a name twice": (
        STATE,
        lambda t: torch.cat([t[:-1], torch.tensor([44]).byte(), t[1:]]),
        "is there twice",
    ),
    "an offset of another kind": (STATE, state_with(nested_offset=True), "nested_offset is True"),
    "state of another dtype": (STATE, lambda t: t.float(), "expected the bytes"),
    "another block": (STATE, state_with(blocksize=128), "blocksize is 128"),
    "another nested block": (STATE, state_with(nested_blocksize=512), "nested_blocksize is 512"),
    "another shape": (STATE, state_with(shape=[3, 4]), "shape is \\[3, 4\\]"),
    "another type": (STATE, state_with(quant_type="fp4"), "quant_type is 'fp4'"),
    "no offset": (STATE, state_with(nested_offset=None), "nested_offset is None"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_checkpoints_are_refused_by_the_tensors_name(case, whole, tmp_path):
    part, change, message = MALFORMED[case]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(f"{LAYER}.{part}")
    if change is not None:
        tensors[f"{LAYER}.{part}"] = change(tensor)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor {LAYER}\..*{message}"):
        load_model(folder)


def test_scales_that_are_missing_or_too_many(whole, tmp_path):
    tensors = load_file(whole / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path)
    save_file(
        {n: t for n, t in tensors.items() if n != f"{LAYER}.weight.absmax"}, tmp_path / "model.safetensors"
    )
    with pytest.raises(
        ValueError, match=rf"model.safetensors: tensor {LAYER}\.weight .*weight.absmax is missing"
    ):
        load_model(tmp_path)
    save_file(tensors | {f"{LAYER}.weight.zeros": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensor {LAYER}\.weight.zeros has no place"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type 'int4'"),
        ({"load_in_4bit": False}, "quantization_config"),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules"),
        ({"quant_method": "other"}, "'other'"),
    ],
)
def test_settings_that_are_unknown_are_refused(changes, message, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json.*{message}"):
        load_model(folder)


def test_older_settings_without_a_method(whole):
    settings = json.loads((whole / "config.json").read_text())["quantization_config"]
    del settings["quant_method"]
    assert quant.from_config(settings) == NF4Format()


def test_commands_do_the_same_from_a_checkpoint_as_from_quantising(tmp_path, capsys):
    """bitsandbytes' own checkpoint, and the dense model quantised while it is read: train.py, chat.py,
    export.py."""
    with tiny_runs(tmp_path) as tiny:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
        packed = Path(shutil.copytree(tiny.model, tmp_path / "packed"))
        theirs(tiny.model, quantization_config=config, dtype=torch.float32).save_pretrained(packed)
        given = {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False}
        answers = []
        for name, folder, keys in (("one", packed, {}), ("two", tiny.model, given)):
            assert tiny.train(name, model_name_or_path=folder, num_train_epochs=1, **keys) == 0
            capsys.readouterr()
            base = [
                f"model_name_or_path={folder}",
                f"adapter_name_or_path={tmp_path / name}",
                "template=chatml",
            ]
            more = [f"{key}={value}" for key, value in keys.items()]
            assert chat.main([*base, *more, "prompt=the hammer", "seed=5", "max_new_tokens=8"]) == 0
            answers.append(capsys.readouterr().out)
        assert tiny.losses("one") == tiny.losses("two") and len(set(tiny.losses("one").values())) > 1
        for part, tensor in tiny.weights("one").items():
            assert torch.equal(tensor, tiny.weights("two")[part]), part
        assert answers[0] == answers[1] and answers[0].strip()
        words = [f"model_name_or_path={packed}", "template=chatml", f"export_dir={tmp_path / 'dense'}"]
        assert export.main(words) == 0
        dense = load_file(tmp_path / "dense" / "model.safetensors")
        for name, layer in quantised(load_model(packed)).items():
            assert torch.equal(dense[f"model.{name}.weight"].float(), layer.dequantize()), name


def test_options_name_the_format():
    assert quant.from_options(QuantOptions()) is None
    assert quant.from_options(QuantOptions(quantization_bit=4)) == NF4Format()
    options = QuantOptions(quantization_bit=4, quantization_type="fp4", double_quantization=False)
    assert quant.from_options(options) == NF4Format("fp4", False)
    with pytest.raises(ValueError, match="quantization_bit: 5"):
        QuantOptions(quantization_bit=5)

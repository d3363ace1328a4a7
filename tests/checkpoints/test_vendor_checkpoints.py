"""GPTQ, AWQ, AQLM and HQQ checkpoints, written by formulas: loaded, trained on, talked to and exported
through the command line like the same weights in 32 bit; damaged ones refused by the tensor's name."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_runs import assert_same_weights, tiny_runs
from vendor_checkpoints import FORMATS, write_pair

import chat
import export
import quant
from checkpoints.huggingface import load_model, save_model
from lora import replace_module
from quant.hqq import HQQFormat
from quant.linear import QuantLinear

LINEAR = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("vendors")) as runs:
        yield runs


@pytest.fixture(scope="module")
def pairs(tiny):
    return {name: write_pair(tiny, name) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_is_its_twin(pairs, name):
    folder, twin = pairs[name]
    model, dense = load_model(folder), load_model(twin)
    layers = {place: module for place, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(layers) == 14
    for place, layer in layers.items():
        torch.testing.assert_close(
            layer.dequantize(), dense.get_submodule(place).weight, rtol=1e-6, atol=1e-7
        )
    tokens = torch.arange(3, 40)
    inputs = tokens, torch.arange(37), torch.tensor([0, 37], dtype=torch.int32), 37
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), dense(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_writes_the_same_weights(pairs, name):
    folder = pairs[name][0]
    mine, other = load_model(folder, torch.bfloat16, "cuda"), load_model(folder, torch.bfloat16)
    for place, layer in other.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(mine.get_submodule(place).dequantize().cpu(), layer.dequantize())


def test_linears_that_a_checkpoint_left_dense_stay_so(pairs, tmp_path):
    folder = shutil.copytree(pairs["gptq"][0], tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    weight = load_file(pairs["gptq"][1] / "model.safetensors")[f"{LINEAR}.weight"]
    tensors = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] != LINEAR}
    bias = load_file(folder / "model.safetensors").get(f"{LINEAR}.bias")
    tensors |= {f"{LINEAR}.weight": weight} | ({} if bias is None else {f"{LINEAR}.bias": bias})
    save_file(tensors, folder / "model.safetensors")
    model = load_model(folder)
    assert torch.equal(model.get_submodule(LINEAR.removeprefix("model.")).weight, weight)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 13


def test_dora_on_a_checkpoint_is_that_on_its_twin(tiny, pairs):
    for folder in pairs["gptq act-order"]:
        keys = {"model_name_or_path": folder, "use_dora": True, "lora_rank": 4, "num_train_epochs": 1}
        assert tiny.train(f"{folder.name} dora", **keys) == 0
    mine, other = (tiny.losses(f"{folder.name} dora") for folder in pairs["gptq act-order"])
    assert mine == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("name", ["gptq act-order", "awq", "aqlm 2x8", "hqq"])
def test_training_chatting_and_exporting_are_those_of_the_twin(tiny, pairs, name, capsys):
    answers = []
    for folder in pairs[name]:
        run = f"{folder.name} run"
        assert (
            tiny.train(run, model_name_or_path=folder, num_train_epochs=1, lora_target="all", lora_rank=4)
            == 0
        )
        merged = tiny.folder / f"{run} merged"
        both = [
            f"model_name_or_path={folder}",
            f"adapter_name_or_path={tiny.folder / run}",
            "template=chatml",
        ]
        capsys.readouterr()
        assert chat.main([*both, "prompt=the hammer", "seed=5", "max_new_tokens=8"]) == 0
        answers.append(capsys.readouterr().out)
        assert export.main([*both, f"export_dir={merged}"]) == 0
    mine, other = (f"{folder.name} run" for folder in pairs[name])
    assert tiny.losses(mine) == pytest.approx(tiny.losses(other), rel=1e-4)
    assert len(set(tiny.losses(mine).values())) > 1
    assert_same_weights(tiny.weights(mine), tiny.weights(other), 1e-3)
    assert answers[0] == answers[1] and answers[0].strip()
    assert_same_weights(tiny.weights(f"{mine} merged"), tiny.weights(f"{other} merged"), 1e-3)
    assert "quantization_config" not in json.loads(
        (tiny.folder / f"{mine} merged" / "config.json").read_text()
    )


def test_quantization_bit_is_ignored_beside_such_a_checkpoint(tiny, pairs, capsys):
    folder = pairs["awq"][0]
    assert tiny.train("beside", model_name_or_path=folder, quantization_bit=4, max_steps=1) == 0
    assert (
        f"quantization_bit: ignored, {folder} is quantised already (AWQ 4 bits, group 16)"
        in capsys.readouterr().out
    )
    words = [
        f"model_name_or_path={folder}",
        "quantization_bit=4",
        "template=chatml",
        "prompt=x",
        "max_new_tokens=1",
    ]
    assert chat.main(words) == 0
    assert "quantization_bit: ignored" in capsys.readouterr().err


def truncated(tensor):
    return tensor[:-1].contiguous()


def other_type(tensor):
    return tensor.to(torch.int64)


def not_finite(tensor):
    return torch.full_like(tensor, float("nan"))


def too_high(tensor):
    return tensor + 1000


DAMAGES = [  # format, part, what happens to it, what is said of it
    ("gptq", "qweight", truncated, "int32 \\(3, 96\\); config.json asks for int32 \\(4, 96\\)"),
    ("gptq", "qweight", other_type, "int64 .* asks for int32"),
    ("gptq", "qzeros", None, "is missing; the checkpoint is incomplete"),
    ("gptq", "scales", truncated, "float16 \\(1, 96\\); config.json asks for .* \\(2, 96\\)"),
    ("gptq", "scales", not_finite, "NaN or infinity"),
    ("gptq", "g_idx", too_high, "names groups 1000 to 1001; config.json asks for 0 to 1"),
    ("awq", "qweight", truncated, "int32 \\(31, 12\\); config.json asks for int32 \\(32, 12\\)"),
    ("awq", "scales", None, "is missing"),
    ("awq", "qzeros", truncated, "int32 \\(1, 12\\)"),
    ("aqlm 2x8", "codes", truncated, "int8 \\(95, 4, 2\\); config.json asks for int8 \\(96, 4, 2\\)"),
    ("aqlm 2x8", "codebooks", truncated, "\\(1, 256, 1, 8\\)"),
    ("aqlm 1x12", "codes", lambda codes: codes * 0 + 5000, "holds 5000 to 5000, more than the 12 bits"),
    ("aqlm 2x8", "scales", None, "is missing"),
    ("hqq", "W_q", truncated, "uint8 \\(95, 16\\); config.json asks for uint8 \\(96, 16\\)"),
    ("hqq", "scale", None, "is missing"),
    ("hqq", "zero", truncated, "\\(191, 1\\)"),
]


@pytest.mark.parametrize("name, part, damage, said", DAMAGES)
def test_a_damaged_layer_is_refused_by_name(pairs, tmp_path, name, part, damage, said):
    folder = shutil.copytree(pairs[name][0], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors.pop(f"{LINEAR}.{part}")
    if damage is not None:
        tensors[f"{LINEAR}.{part}"] = damage(tensor)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {LINEAR}.{part} .*{said}"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, change, part",
    [
        ("gptq", {"group_size": 8}, "qzeros"),
        ("gptq", {"bits": 8}, "qweight"),
        ("awq", {"group_size": 32}, "qzeros"),
        ("aqlm 2x8", {"num_codebooks": 1}, "codes"),
        ("aqlm 2x8", {"in_group_size": 4}, "codes"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors_are_refused(pairs, tmp_path, name, change, part):
    folder = shutil.copytree(pairs[name][0], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"tensor model.layers.0.*.{part} is .*config.json asks for"):
        load_model(folder)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"quant_method": "gptq", "bits": 5}, "bits: 5; GPTQ has 2, 3, 4 and 8"),
        ({"quant_method": "gptq"}, "bits is missing"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format: 'marlin' is not read",
        ),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:x": {}}}, "dynamic: "),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "pack_dtype: int8 is not read"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: 0"),
        ({"quant_method": "awq", "version": "gemv"}, "version: 'gemv' is not read, 'gemm' is"),
        ({"quant_method": "awq", "bits": 3}, "bits: 3 is not read"),
        ({"quant_method": "aqlm", "nbits_per_codebook": 20}, "nbits_per_codebook: 20"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 7}}}, "nbits: 7; HQQ has"),
        ({"quant_method": "gptq", "bits": "4"}, "bits is '4', expected a whole number"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": None},
            "group_size is None, expected a whole number",
        ),
        (
            {"quant_method": "awq", "group_size": {"q": 64}},
            "group_size is {'q': 64}, expected a whole number",
        ),
        ({"quant_method": "aqlm", "num_codebooks": [2]}, "num_codebooks is .2., expected a whole number"),
        ({"quant_method": "hqq", "quant_config": "4 bits"}, "quant_config: '4 bits' is not an object"),
        (
            {"quant_method": "hqq", "quant_config": {"weight_quant_params": None}},
            "quant_config.weight_quant_params: N",
        ),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type .'nf4'. is not one of"),
        ({"quant_method": "quip"}, "quant_method 'quip' is not known; use a 16-bit release"),
    ],
)
def test_settings_that_are_not_read_are_named(pairs, tmp_path, settings, said):
    folder = shutil.copytree(pairs["awq"][1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: quantization_config.{said}"):
        load_model(folder)


@pytest.mark.parametrize("settings", ["nf4", [4], 4])
def test_settings_that_are_no_object_are_refused(pairs, tmp_path, settings):
    folder = shutil.copytree(pairs["awq"][1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other/config.json: quantization_config is .*, expected an object"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors, name: tensors.pop(f"{name}.g_idx"), "g_idx is missing.*desc_act"),
        (
            lambda tensors, name: tensors.update({f"{name}.bias": tensors[f"{name}.bias"].int()}),
            "bias is torch.int32",
        ),
    ],
)
def test_act_order_without_its_order_and_a_bias_of_integers_are_refused(pairs, tmp_path, change, said):
    """Both would load, into other weights."""
    folder = shutil.copytree(pairs["gptq act-order"][0], tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.1.self_attn.q_proj")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor model.layers.1.self_attn.q_proj.{said}"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, config, keys",
    [
        ("gptq act-order", "GPTQConfig", {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
        ("gptq 3 bits", "GPTQConfig", {"bits": 3, "format": "gptq_v2"}),
        ("awq", "AwqConfig", {"bits": 4, "group_size": 16, "zero_point": True, "format": "gemm"}),
        ("aqlm 1x12", "AqlmConfig", {"num_codebooks": 1, "nbits_per_codebook": 12, "in_group_size": 8}),
    ],
)
def test_a_saved_model_is_what_was_read_and_its_config_is_that_of_transformers(
    pairs, tmp_path, name, config, keys
):
    folder = pairs[name][0]
    save_model(load_model(folder), tmp_path / "saved", folder)
    assert_same_weights(
        load_file(tmp_path / "saved" / "model.safetensors"), load_file(folder / "model.safetensors")
    )
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "saved").quantization_config
    theirs = getattr(transformers, config).from_dict(settings)
    assert {key: getattr(theirs, key) for key in keys} == keys
    assert quant.from_config(theirs.to_dict()) == quant.from_config(settings)


def test_a_model_that_was_quantised_by_hqq_is_saved_and_read(tiny, tmp_path):
    model = load_model(tiny.model, torch.bfloat16, quantization=HQQFormat(3))
    save_model(model, tmp_path / "saved", tiny.model)
    again = load_model(tmp_path / "saved", torch.bfloat16)
    for place, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(again.get_submodule(place).dequantize(), layer.dequantize())
            assert layer.layer.group_size in (8, 16, 32, 64)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_config"]["weight_quant_params"]["nbits"] == 3 and config["skip_modules"] == [
        "lm_head"
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_training_on_a_base_that_hqq_quantises_follows_the_dequantised_one(tiny, bits):
    dense = load_model(tiny.model, quantization=HQQFormat(bits))
    for place, layer in list(dense.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = layer.dequantize()
            replace_module(dense, place, plain)
    twin = tiny.make_model(f"hqq {bits} twin", seed=1)
    save_model(dense, twin, tiny.model)
    for run, keys in (
        (f"hqq {bits}", {"quantization_bit": bits, "quantization_method": "hqq"}),
        (f"hqq {bits} dense", {"model_name_or_path": twin}),
    ):
        assert tiny.train(run, num_train_epochs=1, lora_rank=4, **keys) == 0
    assert tiny.losses(f"hqq {bits}") == pytest.approx(tiny.losses(f"hqq {bits} dense"), rel=1e-5)


@pytest.mark.parametrize("name", ["gptq 3 bits", "awq", "aqlm 1x12", "hqq"])
def test_a_run_on_a_checkpoint_resumes_to_the_bit(tiny, pairs, name):
    keys = {"model_name_or_path": pairs[name][0], "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    keys |= {"bf16": True, "lora_dropout": 0.2}
    assert tiny.train(f"{name} whole", **keys) == 0
    parts = shutil.copytree(tiny.folder / f"{name} whole", tiny.folder / f"{name} parts")
    shutil.rmtree(parts / "checkpoint-4")
    (parts / "adapter_model.safetensors").unlink()
    assert tiny.train(f"{name} parts", **keys) == 0
    assert tiny.losses(f"{name} whole") == tiny.losses(f"{name} parts")
    assert_same_weights(tiny.weights(f"{name} whole"), tiny.weights(f"{name} parts"))

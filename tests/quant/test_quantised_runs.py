"""Every format of a base through the command line: train, break off and resume, chat, merge, chat with the
merged."""

import pytest
from tiny_runs import assert_same_weights, tiny_runs
from vendor_checkpoints import FORMATS, write_pair

import chat
import export
from checkpoints.huggingface import load_model
from quant.linear import QuantLinear
from tests.training.test_resume import halves

WHILE_READING = {
    "nf4": {"quantization_bit": 4},
    "fp4": {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": "false"},
    "int8": {"quantization_bit": 8},
    "eetq": {"quantization_bit": 8, "quantization_method": "eetq"},
    "hqq 4": {"quantization_bit": 4, "quantization_method": "hqq"},
    "hqq 3": {"quantization_bit": 3, "quantization_method": "hqq"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("formats")) as made:
        yield made


def answer(words: dict, capsys) -> str:
    capsys.readouterr()
    asked = {"template": "chatml", "prompt": "the hammer", "seed": 5, "max_new_tokens": 8, **words}
    status = chat.main([f"{key}={value}" for key, value in asked.items()])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


@pytest.mark.parametrize("name", [*WHILE_READING, *FORMATS])
def test_a_base_in_this_format_is_trained_resumed_asked_and_merged(tiny, name, capsys):
    keys = dict(WHILE_READING.get(name, {}))
    keys["model_name_or_path"] = tiny.model if name in WHILE_READING else write_pair(tiny, name)[0]
    run = name.replace(" ", "-")
    halves(tiny, run, stop=3, num_train_epochs=1, lora_rank=4, learning_rate=1e-3, **keys)
    losses = tiny.losses(f"{run}-whole")
    assert len(set(losses.values())) > 1
    adapter = tiny.folder / f"{run}-whole"
    beside = answer({**keys, "adapter_name_or_path": adapter}, capsys)
    merged = tiny.folder / f"{run}-merged"
    words = {**keys, "adapter_name_or_path": adapter, "export_dir": merged, "template": "chatml"}
    words = {key: value for key, value in words.items() if not key.startswith(("quantization", "double"))}
    assert export.main([f"{key}={value}" for key, value in words.items()]) == 0
    assert answer({"model_name_or_path": merged}, capsys).strip() and beside.strip()
    # what was merged is dense, and has the update
    model, base = load_model(merged), load_model(keys["model_name_or_path"])
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    part = "layers.1.mlp.up_proj"
    before = base.get_submodule(part)
    before = before.dequantize() if isinstance(before, QuantLinear) else before.weight
    assert not model.get_submodule(part).weight.equal(before)
    assert_same_weights({"head": model.lm_head.weight.detach()}, {"head": base.lm_head.weight.detach()})

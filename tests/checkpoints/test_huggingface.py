"""Loading is strict and streams, saving replaces whole models only, and hubs are asked with the user's
settings."""

import json
import os
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import oracle, row_of
from tiny_tokenizers import make_tokenizer

from checkpoints import safetensors_files
from checkpoints.hub import ModelOptions, resolve_adapters, resolve_model
from checkpoints.huggingface import load_model, random_model, restore_trained, save_model, trained
from checkpoints.peft import adapter_parameters
from checkpoints.safetensors_files import stream_tensors
from checkpoints.trainable import prepare_trainable
from lora import LoraOptions
from options.atomic import TEMPORARY, temporary_name
from options.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny untied Llama as transformers saves it, with a tokenizer and a generation_config.json."""
    folder = tmp_path_factory.mktemp("source")
    make_tokenizer(folder, "chatml")
    model = oracle("llama-biases")
    model.generation_config.eos_token_id = [2, 7]
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for _, name, tensor in stream_tensors(folder)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def change_json(path, **changes):
    value = json.loads(path.read_text())
    value |= changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))


def change_weights(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def split_in_shards(folder):
    """The same weights as three shards that transformers wrote."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX).is_file()
    return folder


# Loading


def test_shards_load_as_the_single_file_does(folder):
    whole = state(load_model(folder))
    assert_same(state(load_model(split_in_shards(folder))), whole)


def test_of_two_layouts_in_a_folder_the_single_file_is_read_as_in_transformers(source, folder):
    split_in_shards(folder)
    change_json(folder / INDEX, weight_map={"model.norm.weight": "model-00009-of-00009.safetensors"})
    shutil.copy(source / SINGLE, folder)
    assert_same(state(load_model(folder)), state(load_model(source)))
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def _bin_only(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def _truncated(folder):
    os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - 1000)


def _no_header(folder):
    (folder / SINGLE).write_bytes(b"<html>404: Not Found</html>" * 10)


def _empty_file(folder):
    (folder / SINGLE).write_bytes(b"")


def _shard_missing(folder):
    next(split_in_shards(folder).glob("model-00002-*")).unlink()


def _index_points_outside(folder):
    change_json(split_in_shards(folder) / INDEX, weight_map={"model.norm.weight": "../secret.safetensors"})


def _index_without_map(folder):
    change_json(split_in_shards(folder) / INDEX, weight_map=...)


def _index_of_numbers(folder):
    change_json(split_in_shards(folder) / INDEX, weight_map={"model.norm.weight": 3})


def _index_cut_off(folder):
    (split_in_shards(folder) / INDEX).write_text('{"weight_map": {"model')


def _tensor_twice(folder):
    shard = next(split_in_shards(folder).glob("model-00001-*"))
    tensors = load_file(shard)
    other = next(folder.glob("model-00002-*"))
    save_file({**load_file(other), **dict([next(iter(tensors.items()))])}, other)


def _tensors_missing(folder):
    change_weights(
        folder, lambda tensors: [tensors.pop(f"model.layers.{i}.mlp.up_proj.bias") for i in range(3)]
    )


def _tensor_extra(folder):
    change_weights(
        folder, lambda tensors: tensors.update({"model.layers.3.mlp.up_proj.bias": torch.zeros(77)})
    )


def _tensor_misshapen(folder):
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 60)}))


def _tensor_of_integers(folder):
    change_weights(folder, lambda t: t.update({"lm_head.weight": torch.zeros(131, 60, dtype=torch.int8)}))


def _no_config(folder):
    (folder / "config.json").unlink()


def _config_cut_off(folder):
    (folder / "config.json").write_text('{"architectures": ["Llama')


def _config_of_a_list(folder):
    (folder / "config.json").write_text("[]")


def _config_of_another_family(folder):
    change_json(folder / "config.json", architectures=["GPT2LMHeadModel"])


def _adapter_folder(folder):
    (folder / SINGLE).unlink()
    (folder / "adapter_config.json").write_text("{}")


def _no_weights(folder):
    (folder / SINGLE).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_bin_only, "pytorch_model.bin found.*pickle.*any code.*save_pretrained"),
        (_truncated, "model.safetensors: not a complete safetensors file.*fetch it again"),
        (_no_header, "model.safetensors: not a complete safetensors file"),
        (_empty_file, "model.safetensors: not a complete safetensors file"),
        (_shard_missing, "model-00002-of-0000.*named in model.safetensors.index.json but not there"),
        (_index_points_outside, "points outside the folder"),
        (_index_without_map, "key weight_map missing"),
        (_index_of_numbers, "not a map of file names"),
        (_index_cut_off, "index.json:1: not JSON"),
        (_tensor_twice, "stands twice in the files"),
        (
            _tensors_missing,
            "missing from the safetensors files: model.layers.0.mlp.up_proj.bias.*model.layers.2",
        ),
        (_tensor_extra, "model.layers.3.mlp.up_proj.bias has no place in the model of config.json"),
        (_tensor_misshapen, r"lm_head.weight has shape \(130, 60\), config.json asks for \(131, 60\)"),
        (_tensor_of_integers, "lm_head.weight is torch.int8, not floating"),
        (_no_config, "config.json: file not found; is .* a complete model"),
        (_config_cut_off, "config.json:1: not JSON"),
        (_config_of_a_list, "config.json: found a list, expected a JSON object"),
        (_config_of_another_family, "model/config.json: architecture GPT2LMHeadModel is not known"),
        (_adapter_folder, "holds an adapter, not a model; give it as adapter_name_or_path"),
        (_no_weights, "no model.safetensors or model.safetensors.index.json"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_and_the_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_a_tied_checkpoint_may_store_its_head_too(tmp_path):
    oracle("llama-mqa-tied").save_pretrained(tmp_path)
    expected = state(load_model(tmp_path))
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(state(load_model(tmp_path)), expected)
    assert "lm_head.weight" not in expected


@torch.no_grad()
def their_logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(tokens[None]).logits[0]


@torch.no_grad()
def our_logits(model):
    tokens, *row = row_of([9])
    return model.logits(model(tokens, *row))


def head_differs(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 0.5


def head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def of_the_base_model(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def head_in_another_dtype(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].double()


@pytest.mark.parametrize("change", [head_differs, head_alone, of_the_base_model, head_in_another_dtype])
def test_any_set_of_tensors_that_transformers_loads_into_a_tied_model_loads_here(change, tmp_path, capsys):
    oracle("llama-mqa-tied").save_pretrained(tmp_path / "model")
    change_weights(tmp_path / "model", change)
    model, tokens = load_model(tmp_path / "model"), row_of([9])[0]
    expected = their_logits(tmp_path / "model", tokens)
    torch.testing.assert_close(our_logits(model), expected, atol=1e-4, rtol=1e-5)
    told = "the head that is stored is not the embedding and is used" in capsys.readouterr().err
    assert told == (change is head_differs) and model.config.tied_head != told
    save_model(model, tmp_path / "again", tmp_path / "model")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] != told
    torch.testing.assert_close(their_logits(tmp_path / "again", tokens), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_are_noticed_while_they_are_read(folder, name, number):
    change_weights(folder, lambda tensors: tensors[name].view(-1)[7].fill_(number))
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} holds NaN or infinity"):
        load_model(folder)


def test_stored_rotary_frequencies_are_passed_over(folder):
    expected = state(load_model(folder))

    def add(tensors):
        tensors["model.rotary_emb.inv_freq"] = torch.ones(5)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    change_weights(folder, add)
    assert_same(state(load_model(folder)), expected)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_come_in_the_dtype_that_is_asked_for(folder, key):
    exact = state(load_model(folder))
    narrow = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert_same(state(load_model(folder, dtype=torch.bfloat16)), narrow)

    def to_bf16(tensors):
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    change_weights(folder, to_bf16)
    change_json(folder / "config.json", **{"dtype": ..., "torch_dtype": ..., key: "bfloat16"})
    assert_same(state(load_model(folder, dtype=None)), narrow)
    assert_same(state(load_model(folder)), {name: tensor.float() for name, tensor in narrow.items()})


def test_a_dtype_that_cannot_be_had_is_no_silent_fp32(folder):
    change_json(folder / "config.json", dtype="float8_e4m3fn")
    load_model(folder, dtype=torch.float32)
    with pytest.raises(ValueError, match="dtype 'float8_e4m3fn' is not one of float32.*infer_dtype"):
        load_model(folder, dtype=None)


def test_the_model_does_not_lean_on_the_file(folder):
    before, bytes_before = weights(folder), (folder / SINGLE).read_bytes()
    model = load_model(folder)
    kept = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / SINGLE).read_bytes() == bytes_before
    assert_same(weights(folder), before)
    model = load_model(folder)
    with open(folder / SINGLE, "r+b") as file:  # the same inode, as a careless copy over it would do
        file.seek(2000)
        file.write(b"\xff" * (len(bytes_before) - 2000))
    assert_same(state(model), kept)


PEAK = """
import sys, threading, torch
sys.path.insert(0, {root!r})
from checkpoints.huggingface import load_model

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

for dtype in (torch.float32, torch.bfloat16):
    load_model({small!r}, dtype)  # imports and buffers
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch():
        global peak
        while not done.wait(0.0005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model({large!r}, dtype)
    done.set()
    thread.join()
    print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of anonymous pages")
def test_loading_needs_about_one_tensor_beside_the_model(source, tmp_path):
    """The mapped file does not count: its pages are the system's cache. 18 of the tensors have 8 MB in
    fp32."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 131}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=1, head_dim=32)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    script = PEAK.format(root=str(ROOT), small=str(source), large=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    wide, wide_model, narrow, narrow_model = map(int, run.stdout.split())
    assert wide_model == 2 * narrow_model > 150e6
    for peak, model in ((wide, wide_model), (narrow, narrow_model)):
        assert peak < model + 3 * 8.4e6  # one tensor, its copy, and what the allocator keeps


def test_random_weights_repeat_with_the_seed(source):
    one, same, other = (state(random_model(source, torch.float32, "cpu", seed)) for seed in (3, 3, 4))
    assert_same(one, same)
    name = "layers.1.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])
    assert one[name].std().item() == pytest.approx(0.3, rel=0.05)  # initializer_range of the tiny models
    assert one["norm.weight"].eq(1).all()
    assert one["layers.0.mlp.up_proj.bias"].eq(0).all()


# Saving


def test_a_saved_folder_is_complete(source, tmp_path):
    save_model(load_model(source), tmp_path, source_folder=source)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in source.iterdir())
    assert_same(weights(tmp_path), weights(source))
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 7]
    ids = transformers.AutoTokenizer.from_pretrained(source)("who are you?").input_ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("who are you?").input_ids == ids
    old = os.umask(0o022)
    try:
        save_model(load_model(source), tmp_path, source_folder=source)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / SINGLE).stat().st_mode) == 0o644  # others may read a model


def test_shards_hold_at_most_what_is_asked_and_are_indexed(source, tmp_path):
    save_model(load_model(source), tmp_path, source_folder=source, shard_gigabytes=2e-5)
    index = json.loads((tmp_path / INDEX).read_text())
    expected = weights(source)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    for path in tmp_path.glob("model-*.safetensors"):
        tensors = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in tensors)
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= 20_000
    assert max(t.numel() * 4 for t in expected.values()) > 20_000  # a tensor above the limit stands alone
    assert_same(weights(tmp_path), expected)
    with pytest.raises(ValueError, match="export_size: 0 GB"):
        save_model(load_model(source), tmp_path, source_folder=source, shard_gigabytes=0)


@pytest.mark.parametrize("older", [False, True])
def test_the_saved_config_names_the_dtype_of_the_weights(folder, tmp_path, older):
    if older:
        change_json(folder / "config.json", torch_dtype="float32", dtype=...)
    save_model(load_model(folder, dtype=torch.bfloat16), tmp_path / "narrow", source_folder=folder)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config.get("torch_dtype") == ("bfloat16" if older else None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_adapters_are_merged_when_a_model_is_saved_in_the_dtype_of_the_base(source, tmp_path):
    model = load_model(source, dtype=torch.bfloat16)
    prepare_trainable(model, LoraOptions(lora_rank=2), torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_model(model, tmp_path, source_folder=source)
    saved = weights(tmp_path)
    assert saved.keys() == weights(source).keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    layer = model.layers[1].mlp.up_proj
    update = layer.scale * layer.lora_b @ layer.lora_a
    merged = (layer.base.weight.float() + update).bfloat16()
    assert torch.equal(saved["model.layers.1.mlp.up_proj.weight"], merged)
    assert torch.equal(saved["model.layers.1.mlp.up_proj.bias"], layer.base.bias)


LAYOUTS = {"single": 5.0, "few": 1.2e-4, "many": 4e-5}  # GB per file


@pytest.mark.parametrize("new", LAYOUTS)
@pytest.mark.parametrize("old", LAYOUTS)
def test_saving_over_a_model_leaves_the_old_or_the_new_one_wherever_it_stops(
    source, tmp_path, old, new, monkeypatch
):
    """Stopped at each rename in turn; shards that replace shards of the same names may also end in a clear
    error."""
    one, other = load_model(source), load_model(source)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1)
    save_model(one, tmp_path / "start", source, LAYOUTS[old])
    before, replace = weights(tmp_path / "start"), os.replace
    after = {name: -tensor for name, tensor in before.items()}
    stops = 0
    while True:
        folder = Path(shutil.copytree(tmp_path / "start", tmp_path / f"stop-{stops}"))
        moved = []

        def stop(source, target, folder=folder, moved=moved, allowed=stops):
            if Path(target).parent == folder:
                if len(moved) == allowed:
                    raise OSError("stopped")
                moved.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(safetensors_files.os, "replace", stop)
            try:
                save_model(other, folder, source, LAYOUTS[new])
            except OSError:
                pass
            else:
                break
        try:
            found = weights(folder)
        except ValueError as error:
            assert old == new != "single", error
        else:
            negative = [torch.equal(found[name], after[name]) for name in before]
            assert all(negative) or not any(negative)
        stops += 1
    assert stops > 2
    assert_same(weights(folder), after)
    assert not [path for path in folder.iterdir() if path.name.startswith(TEMPORARY)]
    single = new == "single"
    assert (folder / SINGLE).exists() == single
    assert (folder / INDEX).exists() != single
    shards = set() if single else set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert {path.name for path in folder.glob("model-*")} == shards


FULL_DISK = """
import resource, sys
sys.path.insert(0, {root!r})
from checkpoints.huggingface import load_model, save_model
model = load_model({folder!r})
for parameter in model.parameters():
    parameter.data.mul_(2)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
for gigabytes in (5.0, 1e-4):
    try:
        save_model(model, {folder!r}, {folder!r}, gigabytes)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_old_model(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    script = FULL_DISK.format(root=str(ROOT), folder=str(folder), limit=60_000)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.count("could not be written") == run.stdout.count("disk full") == 2, run.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_a_killed_save_left_is_swept_by_the_next(source, tmp_path):
    unfinished = temporary_name(tmp_path / "files")
    unfinished.mkdir()
    (unfinished / "model-00001-of-00002.safetensors").write_bytes(b"half")
    save_model(load_model(source), tmp_path, source_folder=source)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(TEMPORARY)]
    assert_same(weights(tmp_path), weights(source))


# What a run trained


@pytest.mark.parametrize("case", ["full", "freeze", "lora", "dora with a tied embedding"])
def test_what_was_trained_is_restored_bit_for_bit(case, tmp_path):
    oracle("llama-mqa-tied").save_pretrained(tmp_path / "base")
    options = {
        "full": LoraOptions(finetuning_type="full"),
        "freeze": LoraOptions(finetuning_type="freeze", num_layer_trainable=1),
        "lora": LoraOptions(lora_rank=3),
        "dora with a tied embedding": LoraOptions(
            lora_rank=3, use_dora=True, additional_target=("embed_tokens", "norm")
        ),
    }[case]

    def prepared():
        model = load_model(tmp_path / "base")
        prepare_trainable(model, options, torch.Generator().manual_seed(1))
        return model

    model = prepared()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    trained(model, "base")(tmp_path / "run", tmp_path / "base")
    again = prepared()
    assert not torch.equal(again.layers[2].mlp.up_proj.weight, model.layers[2].mlp.up_proj.weight)
    trains = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    restore_trained(again, tmp_path / "run")
    assert_same(state(again), state(model))
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == trains


def test_restoring_into_a_run_with_other_options_is_refused(source, tmp_path):
    def prepared(**options):
        model = load_model(source)
        prepare_trainable(model, LoraOptions(**options), torch.Generator().manual_seed(1))
        return model

    two = prepared(lora_rank=4, lora_target=("q_proj", "v_proj"))
    trained(two, "base")(tmp_path, source)
    with pytest.raises(ValueError, match="v_proj.lora_A.weight is nothing that this run trains"):
        restore_trained(prepared(lora_rank=4, lora_target=("q_proj",)), tmp_path)
    with pytest.raises(ValueError, match="o_proj.lora_A.weight is missing; was lora_target changed"):
        restore_trained(prepared(lora_rank=4, lora_target=("q_proj", "v_proj", "o_proj")), tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(4, 60\), this run has \(5, 60\)"):
        restore_trained(prepared(lora_rank=5, lora_target=("q_proj", "v_proj")), tmp_path)
    assert len(dict(adapter_parameters(prepared(lora_target=("q_proj",))))) == 6


# Finding the folder


def test_a_folder_is_taken_as_it_is(source, monkeypatch):
    assert resolve_model(ModelOptions(model_name_or_path=str(source))) == source
    monkeypatch.setenv("HOME", str(source.parent))
    assert resolve_model(ModelOptions(model_name_or_path=f"~/{source.name}")) == source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "model_name_or_path: missing"),
        ("", "model_name_or_path: missing"),
        ("./models/none", "no folder ./models/none, and it is not a hub id"),
        ("/models/none", "no folder /models/none"),
        ("~/none", "no folder ~/none"),
        ("models/none/", "no folder models/none/"),
        ("one/two/three", "not a hub id"),
        ("llama", r"not a hub id \(owner/name\)"),
        (__file__, "is a file; give the folder that holds config.json"),
    ],
)
def test_a_name_that_is_neither_folder_nor_id_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(ModelOptions(model_name_or_path=name))


def test_a_hub_id_is_downloaded_with_the_users_settings(monkeypatch, tmp_path):
    calls = []

    def download(name, **settings):
        calls.append((name, settings))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = ModelOptions(
        model_name_or_path="owner/model",
        model_revision="abc123",
        cache_dir="/cache",
        hf_hub_token="secret",
        adapter_name_or_path=(str(tmp_path), "owner/adapter"),
    )
    assert resolve_model(options) == tmp_path
    assert resolve_adapters(options) == [tmp_path, tmp_path]
    (name, model), (adapter_name, adapter) = calls
    assert (name, adapter_name) == ("owner/model", "owner/adapter")
    assert model["revision"] == "abc123" and model["cache_dir"] == "/cache" and model["token"] == "secret"
    assert adapter["revision"] == "main"  # model_revision is the model's
    files = [
        "config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "adapter_model.safetensors",
        "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "onnx/config.json",
    ]  # fmt: skip
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=model["allow_patterns"], ignore_patterns=model["ignore_patterns"]
    )
    assert list(wanted) == files[:4]


def test_a_hub_that_cannot_be_reached_names_the_key(tmp_path):
    """conftest.py sets HF_HUB_OFFLINE."""
    options = ModelOptions(
        model_name_or_path="owner/model", cache_dir=str(tmp_path), adapter_name_or_path=("a/b",)
    )
    with pytest.raises(
        ValueError, match="model_name_or_path: no folder owner/model here, and it could not be fetched"
    ):
        resolve_model(options)
    with pytest.raises(ValueError, match="adapter_name_or_path: no folder a/b here"):
        resolve_adapters(options)
    with pytest.raises(ValueError, match="model_name_or_path: no folder owner/not--ok"):
        resolve_model(ModelOptions(model_name_or_path="owner/not--ok", cache_dir=str(tmp_path)))


def test_modelscope_is_asked_when_the_environment_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    options = ModelOptions(model_name_or_path="owner/model", cache_dir="/cache", ms_hub_token="secret")
    monkeypatch.setitem(sys.modules, "modelscope", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match="model_name_or_path: USE_MODELSCOPE_HUB is set.*pip install modelscope"
    ):
        resolve_model(options)
    calls = []

    class HubApi:
        def login(self, token):
            calls.append(token)

    def download(name, revision, cache_dir):
        calls.append((name, revision, cache_dir))
        if revision == "gone":
            raise OSError("404: no such revision\nand more")
        return str(tmp_path)

    modules = {
        name: types.ModuleType(name) for name in ("modelscope", "modelscope.hub", "modelscope.hub.api")
    }
    modules["modelscope"].snapshot_download = download
    modules["modelscope.hub.api"].HubApi = HubApi
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert resolve_model(options) == tmp_path
    assert calls == ["secret", ("owner/model", "master", "/cache")]
    with pytest.raises(
        ValueError, match=r"from ModelScope at revision gone \(OSError: 404: no such revision\)"
    ):
        resolve_model(ModelOptions(model_name_or_path="owner/model", model_revision="gone"))

"""export.py against peft's merge, tied heads that come apart, shards, dtypes, memory, and folders that stay
whole."""

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_tokenizers import make_tokenizer

import export
from checkpoints.huggingface import load_config, load_model
from options.atomic import TEMPORARY, alone_in, temporary_name

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 720,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(0, 700, (2, 23), generator=torch.Generator().manual_seed(0))


def make_base(folder: Path, tied: bool, seed: int = 0, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    kind = {"attention_bias": True} if not tied else {}
    config = transformers.LlamaConfig(**{**SIZES, **kind, "tie_word_embeddings": tied, **changes})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    make_tokenizer(folder, "chatml")
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return make_base(folder, request.param), folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    return make_base(folder, True), folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied")
    return make_base(folder, False), folder


def add_adapter(model, folder: Path, seed: int = 1, **options):
    """A random peft adapter on a copy of the model, saved; gives the peft model."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 9, "target_modules": LINEARS, "init_lora_weights": False} | options
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    adapted.save_pretrained(folder)
    return adapted.eval()


def run(*adapters: Path, model: Path, target: Path, **keys) -> int:
    words = {"model_name_or_path": model, "export_dir": target} | keys
    if adapters:
        words["adapter_name_or_path"] = ",".join(str(path) for path in adapters)
    return export.main([f"{key}={value}" for key, value in words.items()])


def logits_of(folder: Path) -> torch.Tensor:
    """What transformers computes with the exported folder, having found every tensor and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with torch.no_grad():
        return model(TOKENS).logits


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 30}},
        {"modules_to_save": ["norm"]},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    ],
    ids=["lora", "rslora", "dora", "rsdora", "patterns", "full-module", "all-linear"],
)
def test_merged_logits_equal_peft(base, tmp_path, options):
    model, folder = base
    adapted = add_adapter(model, tmp_path / "adapter", **options)
    assert run(tmp_path / "adapter", model=folder, target=tmp_path / "out", export_size=5e-5) == 0
    with torch.no_grad():
        expected = adapted.merge_and_unload()(TOKENS).logits
        assert not torch.allclose(expected, model(TOKENS).logits, atol=1e-2)
    found = logits_of(tmp_path / "out")
    assert_equal_logits(found, expected)
    ours = load_model(tmp_path / "out")
    positions, borders = torch.arange(23, dtype=torch.int32), torch.tensor([0, 23], dtype=torch.int32)
    with torch.no_grad():
        assert_equal_logits(ours.logits(ours(TOKENS[0], positions, borders, 23)), expected[0])


def test_several_adapters_are_merged_in_order(base, tmp_path):
    model, folder = base
    first = add_adapter(model, tmp_path / "a", seed=1, use_dora=True).merge_and_unload()
    both = add_adapter(first, tmp_path / "b", seed=2, use_dora=True).merge_and_unload()
    assert run(tmp_path / "a", tmp_path / "b", model=folder, target=tmp_path / "ab") == 0
    assert run(tmp_path / "b", tmp_path / "a", model=folder, target=tmp_path / "ba") == 0
    with torch.no_grad():
        expected = both(TOKENS).logits
    assert_equal_logits(logits_of(tmp_path / "ab"), expected)
    assert not torch.allclose(logits_of(tmp_path / "ba"), expected, atol=1e-2)


def test_an_untied_head_with_an_adapter_equals_peft(untied, tmp_path):
    model, folder = untied
    adapted = add_adapter(model, tmp_path / "adapter", target_modules=["v_proj", "lm_head"])
    assert run(tmp_path / "adapter", model=folder, target=tmp_path / "out") == 0
    with torch.no_grad():
        assert_equal_logits(logits_of(tmp_path / "out"), adapted(TOKENS).logits)


# Tied heads


@pytest.mark.parametrize(
    "options, stays_tied",
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({}, True),
    ],
    ids=["embedding", "head", "both", "head-lora", "tied-pair", "neither"],
)
def test_a_tied_head_comes_apart_exactly_when_the_adapter_says_so(tied, tmp_path, options, stays_tied):
    model, folder = tied
    adapted = add_adapter(model, tmp_path / "adapter", **options)
    assert run(tmp_path / "adapter", model=folder, target=tmp_path / "out") == 0
    with torch.no_grad():
        expected = adapted(TOKENS).logits  # not merged: peft's merge of a tied head changes the embedding too
    assert_equal_logits(logits_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) is not stays_tied


# Without an adapter: shards and dtypes


def test_resharding_alone_keeps_every_bit_and_every_file(untied, tmp_path):
    model, folder = untied
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert run(model=folder, target=tmp_path / "out", export_size=1e-4) == 0
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    before, after = load_file(folder / "model.safetensors"), {}
    for shard in shards:
        tensors = load_file(shard)
        after |= tensors
        assert sum(t.numel() * 4 for t in tensors.values()) <= 1e5 or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    (folder / "chat_template.jinja").unlink()


def test_dtypes_are_converted_once_after_the_merge(untied, tmp_path):
    model, folder = untied
    adapted = add_adapter(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        assert run(tmp_path / "adapter", model=folder, target=tmp_path / name, infer_dtype=name) == 0
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, adapted[key].to(dtype), atol=1e-6, rtol=0.008)
    # auto: as the checkpoint, each tensor with its own dtype
    assert run(tmp_path / "adapter", model=tmp_path / "bfloat16", target=tmp_path / "auto") == 0
    assert {t.dtype for t in load_file(tmp_path / "auto" / "model.safetensors").values()} == {torch.bfloat16}


def test_numbers_too_large_for_float16_are_refused(untied, tmp_path, capsys):
    _, folder = untied
    big = copy_of(folder, tmp_path / "big")
    tensors = load_file(big / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, big / "model.safetensors", metadata={"format": "pt"})
    assert run(model=big, target=tmp_path / "out", infer_dtype="float16") == 2
    assert "norm.weight holds numbers too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
    assert run(model=big, target=tmp_path / "out", infer_dtype="bfloat16") == 0


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_stretched_rope_is_written_to_the_configuration(untied, tmp_path):
    _, folder = untied
    assert run(model=folder, target=tmp_path / "out", rope_scaling="linear") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # the trained length, which readers stretch by the factor of linear themselves
    assert config["max_position_embeddings"] == 64 and load_config(tmp_path / "out").max_positions == 128
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 2.0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_type"] == "linear"


# Run folders and the command line


def test_a_run_folder_alone_from_the_command_line(untied, tmp_path):
    model, folder = untied
    adapted = add_adapter(model, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "run_config.yaml").write_text("template: chatml\nstage: sft\n")
    command = [
        sys.executable,
        str(ROOT / "export.py"),
        f"model_name_or_path={tmp_path / 'run'}",
        "--export_dir",
        "out",
    ]
    done = subprocess.run(
        [*command, "--export_legacy_format", "False", "finetuning_type=lora"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_equal_logits(logits_of(tmp_path / "out"), adapted(TOKENS).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "run").stat().st_mode & 0o777


# Folders


def test_only_new_empty_or_exported_folders_are_written(untied, tmp_path, capsys):
    _, folder = untied
    target = tmp_path / "out"
    target.mkdir()
    assert run(model=folder, target=target) == 0
    assert (
        run(model=folder, target=target, infer_dtype="bfloat16", export_size=1e-4) == 0
    )  # replaces the first
    assert not (target / "model.safetensors").exists()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("my only copy")
    for place, message in (
        (full, "is not empty and no earlier export"),
        (full / "thesis.txt", "is a file"),
        (folder, "choose another one"),
        (folder.parent, "choose another one"),
    ):
        assert run(model=folder, target=place) == 2
        assert message in capsys.readouterr().err
    assert (full / "thesis.txt").read_text() == "my only copy" and len(list(full.iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]


def test_a_full_disk_leaves_the_earlier_export_and_no_rest(untied, tmp_path):
    _, folder = untied
    target = tmp_path / "out"
    assert run(model=folder, target=target) == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    code = "import sys, export; sys.exit(export.main(sys.argv[1:]))"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            f"model_name_or_path={folder}",
            f"export_dir={target}",
            "export_size=1e-4",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        # files may not grow beyond this: the write fails as on a full disk
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1, done.stderr
    assert (
        "could not be written" in done.stderr
        and "GB are free" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_room_is_seen_before_anything_is_written(untied, tmp_path, capsys, monkeypatch):
    _, folder = untied
    usage = export.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    monkeypatch.setattr(export, "write_shards", None)
    assert run(model=folder, target=tmp_path / "out") == 1
    assert "the model takes 0.00 GB; 0.00 GB are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed(untied, tmp_path):
    _, folder = untied
    unfinished = temporary_name(tmp_path / "out" / "files")
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_text("half")
    assert run(model=folder, target=tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(TEMPORARY)]


def test_one_export_at_a_time_writes_into_a_folder(untied, tmp_path, capsys):
    _, folder = untied
    target = tmp_path / "out"
    with alone_in(target, "export_dir", "export"):
        for kind in ({}, {"export_gguf_type": "F32"}):
            assert run(model=folder, target=target, **kind) == 2
            told = capsys.readouterr().err
            assert (
                told == f"export.py: export_dir: {target}: another export is writing into it; "
                "choose another folder or wait for its end\n"
            )
        assert list(target.iterdir()) == []
    assert not target.exists()  # it was made for the lock, and stayed empty
    assert run(model=folder, target=target) == 0


def test_an_export_replaces_what_an_earlier_one_wrote_and_nothing_else(untied, tmp_path):
    """A README, results, another GGUF file, and a link in place of the folder stay."""
    _, folder = untied
    real, link = tmp_path / "disk" / "real", tmp_path / "out"
    (tmp_path / "disk").mkdir()
    link.symlink_to(real)  # leads to nothing yet
    assert run(model=folder, target=link, export_size=1e-4) == 0
    assert link.is_symlink() and len(list(real.glob("model-*.safetensors"))) > 1
    assert run(model=folder, target=link, export_gguf_type="F32") == 0
    (real / "README.md").write_text("about it")
    (real / "eval").mkdir()
    (real / "eval" / "results.json").write_text("{}")
    record = json.loads((real / "export_info.json").read_text())
    assert "model.safetensors.index.json" in record["files"] and not any("gguf" in n for n in record["files"])
    (real / "export_info.json").write_text(
        json.dumps(record | {"files": [*record["files"], "../keep", "old", "sub/old", "eval/old"]})
    )
    (real / "sub").mkdir()
    for name in ("sub/old", "eval/old"):
        (real / name).write_text("of the earlier export")
    (tmp_path / "disk" / "keep").write_text("not of the export")
    (real / "old").write_text("of the earlier export")
    assert run(model=folder, target=link, infer_dtype="bfloat16") == 0
    assert link.is_symlink() and (tmp_path / "disk" / "keep").exists() and not (real / "old").exists()
    assert (real / "README.md").read_text() == "about it" and (real / "eval" / "results.json").exists()
    assert (real / "model-F32.gguf").exists() and not list(real.glob("model-*.safetensors"))
    assert load_file(real / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert not (real / "sub").exists() and os.listdir(real / "eval") == ["results.json"]


def test_a_folder_in_the_place_of_a_file_leaves_an_earlier_export_as_it_was(untied, tmp_path, capsys):
    _, folder = untied
    assert run(model=folder, target=tmp_path / "out") == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "tokenizer.json").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(model=folder, target=tmp_path / "out", infer_dtype="bfloat16") == 2
    assert "out/tokenizer.json is a folder where a file is to be written" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


# Memory

MEASURE = """
import sys, threading, time
import export
def private_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
small, large = sys.argv[1].split(), sys.argv[2].split()
assert export.main(small) == 0  # loads what torch loads late, whatever the size of the model
peak, done = private_bytes(), False
start = peak
def watch():
    global peak
    while not done:
        peak = max(peak, private_bytes())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
status = export.main(large)
done = True
thread.join()
print("GROWTH", peak - start)
sys.exit(status)
"""


def test_the_model_is_never_held_as_a_whole(untied, tmp_path):
    small, folder = untied
    add_adapter(small, tmp_path / "small-adapter")
    sizes = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4}
    model = make_base(tmp_path / "base", False, num_hidden_layers=20, **sizes)
    add_adapter(model, tmp_path / "adapter", r=2)
    model_bytes = (tmp_path / "base" / "model.safetensors").stat().st_size
    shard_gigabytes = 0.012
    assert model_bytes > 150e6

    def words(model, adapter, target) -> str:
        paths = f"model_name_or_path={model} adapter_name_or_path={tmp_path / adapter}"
        return f"{paths} export_dir={tmp_path / target} export_size={shard_gigabytes}"

    small_export, large_export = (
        words(folder, "small-adapter", "small"),
        words(tmp_path / "base", "adapter", "out"),
    )
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small_export, large_export],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    growth = int(done.stdout.split("GROWTH")[1])
    # a shard, its bytes on the way to the file, and one tensor being merged
    assert growth < 2 * shard_gigabytes * 1e9 + 30e6 < model_bytes / 2, growth


# The hub


class StubHub:
    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return f"https://hub.example/{name}"

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(("upload_folder", options["repo_id"], sorted(os.listdir(options["folder_path"]))))


def test_the_folder_is_uploaded_to_a_private_repository(untied, tmp_path):
    _, folder = untied
    assert run(model=folder, target=tmp_path / "out") == 0
    hub = StubHub()
    assert export.push(tmp_path / "out", "me/model", None, hub) == "https://hub.example/me/model"
    assert hub.calls[0] == ("create_repo", "me/model", {"private": True, "exist_ok": True})
    assert hub.calls[1] == ("upload_folder", "me/model", sorted(os.listdir(tmp_path / "out")))
    with pytest.raises(
        ValueError, match="me/model could not be uploaded .OSError: no network.; the model is complete"
    ):
        export.push(tmp_path / "out", "me/model", "t", StubHub(OSError("no network")))


# Bad input


def test_bad_input_gives_one_clear_line_and_leaves_nothing(untied, tied, tmp_path, capsys):
    _, folder = untied
    other, other_folder = tied
    add_adapter(other, tmp_path / "deep", target_modules=["q_proj"])
    small = make_base(tmp_path / "small", False, hidden_size=24)
    add_adapter(small, tmp_path / "small-adapter")
    one_layer = make_base(tmp_path / "short", False, num_hidden_layers=3)
    add_adapter(one_layer, tmp_path / "third-layer")
    incomplete = copy_of(folder, tmp_path / "incomplete")
    tensors = load_file(incomplete / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    cut = copy_of(folder, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    broken = add_adapter(other, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / "adapter_model.safetensors")
    assert broken is not None
    before = sorted(path.name for path in tmp_path.iterdir())
    model, target = f"model_name_or_path={folder}", f"export_dir={tmp_path / 'out'}"
    tied_model = f"model_name_or_path={other_folder}"
    cases = {
        "no target": ([model], "export_dir: missing"),
        "pickle": ([model, target, "export_legacy_format=true"], "export_legacy_format: true would write"),
        "size": ([model, target, "export_size=0"], "export_size: 0"),
        "quantised": ([model, target, "export_quantization_bit=4"], "export_quantization_dataset: missing"),
        "no model": ([target], "model_name_or_path: missing"),
        "other model": ([model, target, f"adapter_name_or_path={tmp_path / 'small-adapter'}"], "has shape"),
        "third layer": ([model, target, f"adapter_name_or_path={tmp_path / 'third-layer'}"], "layers.2"),
        "no adapter": ([model, target, f"adapter_name_or_path={folder}"], "holds no adapter_config.json"),
        "nan": ([tied_model, target, f"adapter_name_or_path={tmp_path / 'broken'}"], "holds NaN or infinity"),
        "incomplete": ([f"model_name_or_path={incomplete}", target], "files: model.layers.1.mlp.up_proj"),
        "cut": ([f"model_name_or_path={cut}", target], "not a complete safetensors file"),
        "template": ([model, target, "template=chatlm"], "did you mean 'chatml'"),
    }
    for name, (argv, message) in cases.items():
        assert (name, export.main(argv)) == (name, 2)
        streams = capsys.readouterr()
        assert message in streams.err and "Traceback" not in streams.err, (name, streams.err)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, name
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert len(list(file.keys())) == len(tensors) + 1  # the base is as it was


def test_a_damaged_record_and_a_link_to_itself(tmp_path, capsys):
    """Nothing goes that lies behind a link, and no folder."""
    folder, _ = tmp_path / "base", make_base(tmp_path / "base", False)
    target, other, loop = tmp_path / "out", tmp_path / "other", tmp_path / "loop"
    for path in (target / "mine", other):
        path.mkdir(parents=True)
        (path / "keep").write_text("kept")
    (target / "lnk").symlink_to(other)
    loop.symlink_to(loop)
    files = ["mine", "lnk/keep", "lnk/../../other/keep", "a\0b", "gone"]
    (target / export.EXPORT_RECORD).write_text(json.dumps({"files": files}))
    assert export.main([f"model_name_or_path={folder}", f"export_dir={target}"]) == 0
    assert (other / "keep").exists() and (target / "mine" / "keep").exists()
    capsys.readouterr()
    for path in (loop, loop / "below"):
        assert export.main([f"model_name_or_path={folder}", f"export_dir={path}"]) == 2
        told = capsys.readouterr().err
        assert f"{path}: a link that leads back to itself" in told and told.count("\n") == 1
    assert export.main([f"model_name_or_path={folder}", f"export_dir={tmp_path}/a\0b"]) == 2
    assert "holds a NUL character" in capsys.readouterr().err

"""plan=true: counts by the published formulas, sizes of what a run would hold, and the command line without
weights."""

import dataclasses
import http.server
import json
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import tiny_runs
from vendor_checkpoints import write_pair

import quant
from architectures import config_from_hf
from checkpoints import hub, trainable
from checkpoints.huggingface import load_config, load_model
from generation.cache import KVCache
from generation.generate import generate
from generation.sampling import GenerateOptions
from kernels.recompute import Plan
from lora import LoraOptions
from model import Decoder
from parallel.options import ParallelOptions
from quant import QuantOptions
from quant.linear import QuantLinear
from tests.training.test_memory import LLAMA_7B
from training import memory, plan

# weights of its linears with and without the head; 2 d S L at S = 2048; adapters of rank 16 on all linears
N, N_BLOCKS, ATTENTION, ADAPTERS = 6.607e9, 6.476e9, 2 * 4096 * 2048 * 32, 39.98e6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("plan")) as made:
        yield made


def llama(method: str, **options) -> Decoder:
    model = Decoder(config_from_hf(LLAMA_7B), dtype=torch.bfloat16, device="meta")
    trainable.prepare_trainable(model, LoraOptions(finetuning_type=method, lora_rank=16, **options))
    return model


@pytest.mark.parametrize(
    ("method", "again", "expected"),
    [
        ("lora", 0, 4 * N + 3.5 * ATTENTION + 6 * ADAPTERS),
        ("lora", 32, 4 * N + 3.5 * ATTENTION + 6 * ADAPTERS + 2 * N_BLOCKS + ATTENTION),
        ("full", 0, 6 * N + 3.5 * ATTENTION),
        ("full", 32, 6 * N + 3.5 * ATTENTION + 2 * N_BLOCKS + ATTENTION),
    ],
)
def test_a_token_costs_what_the_formula_says(method, again, expected):
    work = plan.count_flops(llama(method), Plan(full=again), context=2048, trained_share=1.0)
    assert sum(work.values()) == pytest.approx(expected, rel=1e-3)


def test_frozen_blocks_below_the_first_trained_one_have_no_backward_pass():
    work = plan.count_flops(llama("freeze", num_layer_trainable=8), Plan(), 2048, 1.0)
    assert work["linears"] == pytest.approx((2 * 24 + 6 * 8) / 32 * N_BLOCKS, rel=1e-3)


def test_only_trained_tokens_reach_the_head():
    whole, part = (plan.count_flops(llama("lora"), Plan(), 2048, share)["head"] for share in (1.0, 0.25))
    assert part == whole / 4 == 32000 * 4096


def test_the_context_is_that_of_the_mean_token():
    assert plan.mean_context(np.array([1, 3], np.int32)) == 2.5  # one token sees 1, three see 3


@pytest.mark.parametrize("options", [{}, {"double_quantization": False}, {"quantization_type": "fp4"}])
def test_quantised_layers_have_the_size_of_those_that_are_loaded(tiny, options):
    folder = tiny.make_model("sized", seed=3, hidden_size=128, intermediate_size=192, head_dim=32)
    quantization = quant.from_options(QuantOptions(quantization_bit=4, **options))
    real = load_model(folder, torch.float32, quantization=quantization)
    planned = plan.skeleton(folder, load_config(folder), torch.float32, quantization)
    names = [name for name, module in real.named_modules() if isinstance(module, QuantLinear)]
    assert names and names == [
        name for name, module in planned.named_modules() if isinstance(module, QuantLinear)
    ]
    assert plan.weight_bytes(planned) == pytest.approx(plan.weight_bytes(real), rel=0.02)
    assert {p.device.type for p in planned.parameters()} == {"meta"}


def test_the_peak_holds_every_part_and_the_fuller_of_loading_and_training():
    model = llama("lora")
    need = memory.need(model, 4096)
    peak = plan.predict_peak(model, Plan(), need, file_bytes=0.0, device=torch.device("cuda"))
    assert peak["weights"] == pytest.approx(2 * (N + 32000 * 4096), rel=1e-3)
    assert peak["adapters"] == pytest.approx(4 * ADAPTERS, rel=1e-3)
    assert peak["optimizer"] == pytest.approx(8 * ADAPTERS, rel=1e-3)
    assert sum(peak.values()) < need.of(0, 0) + 2.01 * N + 4 * ADAPTERS + 0.3e9
    loading = plan.predict_peak(
        model, Plan(), memory.need(model, 1), file_bytes=1e12, device=torch.device("cpu")
    )
    assert loading["file being read"] == 1e12 and "activations" not in loading


@pytest.mark.parametrize("new", [1, 9, 256, 257, 300, 700])
def test_the_cache_of_the_texts_is_what_decoding_holds(tiny, monkeypatch, new):
    held, hold = [], KVCache._hold

    def watched(cache, storage):
        before = getattr(cache, "storage", None)
        held.append(storage.nbytes + (0 if before is None else before.nbytes))
        hold(cache, storage)

    monkeypatch.setattr(KVCache, "_hold", watched)
    folder = tiny.make_model("long", seed=1, max_position_embeddings=1024, num_hidden_layers=1)
    model = load_model(folder, torch.float32).eval()
    options = GenerateOptions(do_sample=False, max_new_tokens=new)
    generate(model, [[5] * 7, [6] * 17, [8]], options, stop_ids=())
    assert plan.cache_bytes(model.config, 3, 17, new, 4) == max(held)


def test_the_texts_are_written_beside_everything_but_the_update(tiny):
    model = llama("lora")
    need = memory.need(model, 1)
    common = {"file_bytes": 0.0, "device": torch.device("cuda"), "beside": {"reference": 5e9}}
    texts = {"cache of the texts": 1e12}
    peak = plan.predict_peak(model, Plan(), need, **common, writing=[texts])
    parts = ["weights", "adapters", "reference", "optimizer", "cache of the texts"]
    assert list(peak) == parts and peak["cache of the texts"] == 1e12
    short = [{"cache of the texts": 1.0}]
    assert "cache of the texts" not in plan.predict_peak(model, Plan(), need, **common, writing=short)
    assert memory.Spread().for_texts(model) == 0
    options = [ParallelOptions(parallel="fsdp", gather_for_generation=whole) for whole in (True, False)]
    whole, by_blocks = (memory.Spread.of(each, 2, common["device"]).for_texts(model) for each in options)
    assert whole == plan.weight_bytes(model)
    block = memory.bytes_of(model.layers[0].parameters())
    assert by_blocks == whole - (len(model.layers) - 2) * block


def test_the_buffer_of_quantised_layers_counts_once(tiny):
    folder = tiny.make_model("buffered", seed=3, hidden_size=128, intermediate_size=192, head_dim=32)
    model = plan.skeleton(folder, load_config(folder), torch.float32, quant.from_options(QuantOptions(4)))
    trainable.prepare_trainable(model, LoraOptions(lora_rank=4))
    need = dataclasses.replace(memory.need(model, 64), head=0.0)
    peak = plan.predict_peak(model, Plan(), need, file_bytes=0.0, device=torch.device("cuda"))
    assert peak["buffers"] == 128 * 192 * 4
    states = plan.weight_bytes(model) + need.first + need.optimizer
    assert sum(peak.values()) == states + need.activations(0, 0) + need.block


@pytest.mark.parametrize(("again", "passes"), [(0, 2), (2, 3)])
def test_quantised_weights_are_made_dense_once_a_pass(tiny, monkeypatch, again, passes):
    folder = tiny.make_model(f"passes-{again}", seed=3)
    model = plan.skeleton(folder, load_config(folder), torch.float32, quant.from_options(QuantOptions(4)))
    monkeypatch.setattr(plan, "measure_products", lambda dtype, device: 1e9)
    monkeypatch.setattr(plan, "measure_copies", lambda device: 1e6)
    bound = plan.bound_speed(model, Plan(full=again), np.array([8]), 1.0, 100, torch.device("cpu"))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    moved = (
        sum(layer.storage_bytes for layer in layers) + 2 * 4 * numbers
    )  # codes read, dense written and read
    assert bound.seconds["quantised weights"] == pytest.approx(passes * moved / 1e6 / 100)


def test_a_plan_is_printed_without_weights_and_nothing_is_written(tiny, capsys):
    folder = tiny.make_model("unread", seed=2)
    (folder / "model.safetensors").unlink()
    keys = {"model_name_or_path": folder, "quantization_bit": 4, "plan": "true"}
    assert tiny.train("planned", **keys) == 0
    said = capsys.readouterr().out
    assert "peak memory" in said and "optimizer" in said and "tokens/s: " in said
    assert not (tiny.folder / "planned").exists()
    assert tiny.train("planned", **keys, do_train="false", do_eval="true", val_size="3") == 2
    assert "plan: there is nothing to plan" in capsys.readouterr().err


SPREAD = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "kept": {"parallel": "fsdp", "fsdp_reshard_after_forward": False},
    "away": {"parallel": "fsdp", "fsdp_offload": True},
    "hsdp": {"parallel": "hsdp", "dp_shard_size": 2},
    "tp": {"tp_size": 2},
    "ulysses": {"cp_size": 2},
    "ring": {"parallel": "fsdp", "cp_size": 4, "cp_mode": "ring"},
}


@pytest.mark.parametrize("method", ["lora", "trained on", "new adapter", "dpo", *SPREAD])
def test_a_plan_of_models_on_a_hub_fetches_no_weights(tiny, monkeypatch, capsys, method):
    """The same as with the files here, but for the size of the largest, which it guesses."""
    if not (tiny.folder / "adapter").exists():
        assert tiny.train("adapter", max_steps=1, lora_rank=5, lora_target="q_proj,v_proj") == 0
        capsys.readouterr()
    homes, wanted, lines = {"model": tiny.model, "adapter": tiny.folder / "adapter"}, [], []

    def download(name, *, allow_patterns, ignore_patterns, **places):
        home = homes[name.partition("/")[2]]
        there = tiny.folder / "hub" / home.name
        there.mkdir(parents=True, exist_ok=True)
        files = [path.name for path in home.iterdir()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            wanted.append(file)
            shutil.copy(home / file, there)
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(plan, "measure_products", lambda dtype, device: 1e9)
    monkeypatch.setattr(plan, "measure_copies", lambda device: 1e9)
    monkeypatch.setattr(plan, "resident_bytes", lambda: 0)
    keys = SPREAD[method] | {"plan_ranks": 4} if method in SPREAD else {}
    if method in ("trained on", "new adapter"):
        keys = {"adapter_name_or_path": "owner/adapter", "create_new_adapter": method == "new adapter"}
    if method == "dpo":
        rows = [{"instruction": "a", "chosen": "b c", "rejected": "d"}] * 8
        (tiny.folder / "pairs.json").write_text(json.dumps(rows))
        columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        entry = {"file_name": "pairs.json", "ranking": True, "columns": columns}
        (tiny.folder / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
        keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": tiny.folder, "ref_model": "owner/model"}
    local = {f"owner/{name}": home for name, home in homes.items()}
    for places in ({}, local):
        chosen = {"model_name_or_path": "owner/model", "plan": "true", **keys}
        assert tiny.train("planned", **{key: places.get(value, value) for key, value in chosen.items()}) == 0
        out = capsys.readouterr().out
        assert "tokens fit: per_device_train_batch_size=" in out and "or cutoff_len=" in out
        assert (" on each of 4 ranks " in out) == (method in SPREAD)
        said = out.splitlines()
        parts = ("trainable", "  weights ", "  adapters ", "  reference ")
        lines.append([line for line in said if line.startswith(parts)])
    assert lines[0] == lines[1] and len(lines[0]) == 4
    assert "config.json" in wanted and not [file for file in wanted if "safetensors" in file]


def test_a_plan_of_a_quantised_model_on_a_hub_counts_what_it_knows(tiny, capsys):
    folder = tiny.make_model("quantised", seed=2)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert tiny.train("planned", model_name_or_path=folder, plan="true") == 0
    assert "quantised weights" in capsys.readouterr().out
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert tiny.train("planned", model_name_or_path=folder, plan="true") == 2
    assert f"plan: {folder}: its weights are not here" in capsys.readouterr().err


def test_a_plan_on_a_damaged_file_names_it(tiny, capsys):
    folder = tiny.make_model("cut", seed=2)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    assert tiny.train("cut run", model_name_or_path=folder, plan="true") == 2
    assert f"{file}: not a complete safetensors file" in capsys.readouterr().err


@contextmanager
def hub_of(folders: dict[str, Path], monkeypatch, answers=None):
    """A Hugging Face hub on 127.0.0.1 that knows no ranges: gives what was asked of it. answers: file name ->
    (bytes, seconds between them) in place of the file's own."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            owner, name, _, revision, file = self.path.strip("/").split("/")
            asked.append((f"{owner}/{name}", revision, file, dict(self.headers)))
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # who has read enough goes
                body, pause = (answers or {}).get(file) or ((folders[name] / file).read_bytes(), 0.0)
                for place in range(0, len(body), 1 if pause else len(body) or 1):
                    self.wfile.write(body[place : place + (1 if pause else len(body))])
                    time.sleep(pause)

        def log_message(self, *arguments):
            pass

    def download(name, *, allow_patterns, ignore_patterns, cache_dir, **places):
        home, there = folders[name.partition("/")[2]], Path(cache_dir or home_of_hub)
        there = there / f"models--{name.replace('/', '--')}" / "snapshots" / "c0ffee"
        there.mkdir(parents=True, exist_ok=True)
        files = [path.name for path in home.iterdir()]
        for file in huggingface_hub.utils.filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(home / file, there)
        return str(there)

    home_of_hub = next(iter(folders.values())).parent / f"hub {time.monotonic_ns()}"
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    try:
        yield asked
    finally:
        served.shutdown()
        served.server_close()


@pytest.mark.parametrize("kind", ["gptq", "awq", "aqlm 2x8", "gptq in two files"])
def test_a_plan_of_codes_on_a_hub_asks_for_the_headers_of_its_files(tiny, monkeypatch, capsys, kind):
    folder, _ = write_pair(tiny, kind.removesuffix(" in two files"))
    if kind.endswith("files"):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts, weight_map = (dict(list(tensors.items())[number::2]) for number in (0, 1)), {}
        for number, part in enumerate(parts):
            save_file(part, folder / f"part-{number}.safetensors", {"format": "pt"})
            weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(plan, "measure_products", lambda dtype, device: 1e9)
    monkeypatch.setattr(plan, "measure_copies", lambda device: 1e9)
    monkeypatch.setattr(plan, "resident_bytes", lambda: 0)
    monkeypatch.setattr(plan, "GIB", 2**10)  # so that the digits of the report tell sizes of a tiny model
    monkeypatch.setattr(hub, "FIRST_BYTES", 4000)  # less than a header
    lines = []
    with hub_of({"codes": folder}, monkeypatch) as asked:
        for name in ("owner/codes", folder):
            keys = {"model_name_or_path": name, "plan": "true", "hf_hub_token": "secret"}
            assert tiny.train("planned", **keys) == 0
            said = capsys.readouterr().out.splitlines()
            parts = ("trainable", "  weights ", "  adapters ", "  quantised weights")
            lines.append([line for line in said if line.startswith(parts)])
    assert lines[0] == lines[1] and len(lines[0]) >= 4
    assert {each[:2] for each in asked} == {("owner/codes", "c0ffee")}
    sizes = {each[2]: each[3]["Range"] for each in asked}
    assert len(sizes) == (2 if kind.endswith("files") else 1)
    assert all(int(text.partition("-")[2]) < 20_000 for text in sizes.values())
    assert all(each[3]["Authorization"] == "Bearer secret" for each in asked)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"\xff" * 8 + b"{}", "is none of safetensors"),
        ((20).to_bytes(8, "little") + b"<html>not here</html>", "header: not JSON"),
        ((40).to_bytes(8, "little") + b'{"weight": {"data_offsets": [0, "1"]}}  ', "has no data_offsets"),
        (b"", "header: empty"),
    ],
)
def test_a_hub_whose_file_has_no_header_is_told_with_the_reason(tiny, monkeypatch, capsys, body, problem):
    folder, _ = write_pair(tiny, "gptq")
    with hub_of({"codes": folder}, monkeypatch, {"model.safetensors": (body, 0.0)}):
        assert tiny.train("planned", model_name_or_path="owner/codes", plan="true") == 2
    said = capsys.readouterr().err
    assert (
        "its weights are not here, and a plan fetches none (model.safetensors: " in said and problem in said
    )


def test_a_hub_that_drips_is_not_waited_for(tiny, monkeypatch, capsys):
    folder, _ = write_pair(tiny, "gptq")
    monkeypatch.setattr(hub, "HEADER_SECONDS", 0.3)
    with hub_of({"codes": folder}, monkeypatch, {"model.safetensors": (b"\0" * 99_999, 0.02)}):
        assert tiny.train("planned", model_name_or_path="owner/codes", plan="true") == 2
    assert "model.safetensors: not there after 0.3 seconds" in capsys.readouterr().err


def test_70b_in_4_bits_trains_on_two_gpus_of_24_gib_with_shares_in_host_memory(tmp_path):
    """By arithmetic, from config.json alone."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | sizes | heads))
    codes = quant.from_options(QuantOptions(4))
    model = plan.skeleton(tmp_path, load_config(tmp_path), torch.bfloat16, codes)
    trainable.prepare_trainable(model, LoraOptions(lora_rank=16))
    model.runtime.compute_dtype = torch.bfloat16
    numbers = plan.weight_bytes(model)
    assert 38e9 < numbers < 42e9  # 68.5e9 numbers of 4.13 bits, embedding and head of 16
    gpu, room = torch.device("cuda"), 24 * 2**30
    total, host = {}, {}
    for away in (False, True):
        spread = memory.Spread.of(ParallelOptions(parallel="fsdp", fsdp_offload=away), 2, gpu)
        held = 0.0 if away else plan.weight_bytes(model, spread)
        need = memory.need(model, 2048, spread=spread)
        full, selective = memory.choose(need, room - held)
        peak = plan.predict_peak(model, Plan(full, selective), need, 0.0, gpu, spread=spread)
        total[away], host[away] = sum(peak.values()), plan.weight_bytes(model, spread) + need.host
    assert total[True] < room < total[False]
    assert numbers / 2 < host[True] < 24e9  # the shares, and what trains of them three times more
    assert plan.weight_bytes(model, spread) == pytest.approx(numbers / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"parallel": "fsdp", "plan_ranks": 4}, "on each of 4 ranks (fsdp of 4)"),
        ({"parallel": "hsdp", "dp_shard_size": 2, "plan_ranks": 4}, "4 ranks (ddp of 2, fsdp of 2)"),
        ({"parallel": "fsdp", "tp_size": 2, "plan_ranks": 4}, "4 ranks (fsdp of 2, tp_size=2)"),
        ({"cp_size": 2, "plan_ranks": 2}, "on each of 2 ranks (ddp of 2, cp_size=2)"),
    ],
)
def test_a_plan_of_many_ranks_counts_one_of_them(tiny, capsys, keys, words):
    def weights(**keys) -> tuple[float, str]:
        capsys.readouterr()
        assert (
            tiny.train("planned", plan=True, finetuning_type="full", model_name_or_path=folder, **keys) == 0
        )
        said = capsys.readouterr().out
        (line,) = [line for line in said.splitlines() if line.strip().startswith("trained weights")]
        return float(line.split()[2]), said

    folder = tiny.make_model("planned", seed=1, hidden_size=512, intermediate_size=4096, head_dim=128)
    (alone, _), (mine, said) = weights(), weights(**keys)
    assert words in said and "tokens fit: per_device_train_batch_size=" in said
    share = {"fsdp": 4, "hsdp": 2}.get(keys.get("parallel"), 1)
    assert mine == pytest.approx(alone / share, abs=0.012)


def test_the_most_tokens_that_fit_are_found():
    for most in (0, 63, 64, 1000, 123456):
        found = plan.largest_that_fits(lambda tokens, most=most: tokens <= most)
        assert (most - most / 32 - 1 <= found <= most) or (most < 64 and found <= most)

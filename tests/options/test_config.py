"""config.py and its tables: ways to give an option, types, other systems' names, mistakes, rules, help, round
trip."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chat
import export
from options import aliases, config, rules
from options.config import Config, UserError
from options.option import REQUIRED, SECRET, declared, option
from training import setup

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LoraPart:
    """Adapters."""

    finetuning_type: Literal["lora", "full", "freeze"] = option(
        "lora", "what is trained", also="sft_type train_type tuner_type"
    )
    lora_rank: int = option(8, "rank of the update", also="lora_r")
    lora_alpha: float | None = option(None, "numerator of the scale")
    lora_dropout: float = option(0.0, "dropout", also="lora_dropout_p")
    lora_target: tuple[str, ...] = option(
        ("all",), "which linears", also="lora_target_modules target_modules"
    )
    additional_target: tuple[str, ...] = option(
        (), "further modules", also="modules_to_save lora_modules_to_save"
    )
    create_new_adapter: bool = option(False, "stack an adapter")
    use_rslora: bool = option(False, "other scale", also="use_rs_lora")
    use_dora: bool = option(False, "magnitudes")
    num_layer_trainable: int = option(2, "freeze: layers", also="freeze_trainable_layers")
    name_module_trainable: tuple[str, ...] = option(
        ("all",), "freeze: modules", also="freeze_trainable_modules"
    )

    def __post_init__(self):
        if self.lora_rank < 1:
            raise UserError(f"lora_rank: {self.lora_rank} must be at least 1")


@dataclass(frozen=True)
class ModelPart:
    model_name_or_path: str | None = option(
        None, "the model", also="model_id_or_path model model_path base_model"
    )
    adapter_name_or_path: tuple[str, ...] = option(
        (), "adapters", also="ckpt_dir checkpoint_dir lora_model_name_or_path lora_weights adapters"
    )
    model_revision: str = option("main", "branch", also="revision")
    hf_hub_token: str | None = option(None, "secret", SECRET, also="hub_token")
    rope_scaling: Literal["none", "linear"] | None = option(None, "longer")


@dataclass(frozen=True)
class QuantPart:
    quantization_bit: int | None = option(None, "bits", also="quant_bits")
    quantization_method: Literal["bitsandbytes", "hqq"] = option("bitsandbytes", "how", also="quant_method")
    quantization_type: Literal["nf4", "fp4"] = option("nf4", "levels", also="quant_type bnb_4bit_quant_type")
    double_quantization: bool = option(True, "scales too", also="double_quant bnb_4bit_use_double_quant")


@dataclass(frozen=True)
class DataPart:
    template: str | None = option(None, "chat template", also="template_type prompt_template")
    default_system: str | None = option(None, "system text", also="system system_message system_prompt")
    dataset: tuple[str, ...] = option((), "names", also="dataset_name data_path")
    eval_dataset: tuple[str, ...] = option((), "names", also="val_dataset")
    dataset_dir: str = option("data", "folder", also="data_dir")
    cutoff_len: int = option(
        2048, "most tokens", also="max_length model_max_length max_seq_length max_seq_len"
    )
    reserved_label_len: int = option(1, "least tokens of the answer")
    train_on_prompt: bool = option(False, "prompt too", also="train_on_source")
    mask_history: bool = option(False, "last answer only")
    streaming: bool = option(False, "read as it goes")
    max_samples: int | None = option(None, "rows", also="max_train_samples")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = option(
        "concat", "mixing", also="mixing_strategy"
    )
    interleave_probs: tuple[float, ...] = option((), "shares")
    overwrite_cache: bool = option(False, "again")
    preprocessing_num_workers: int | None = option(
        None, "processes", also="dataset_num_proc preprocess_num_proc"
    )
    tokenized_path: str | None = option(None, "folder")
    val_size: float = option(
        0.0, "share or rows", also="dataset_test_ratio split_dataset_ratio eval_dataset_size"
    )
    packing: bool | None = option(None, "fill rows")
    group_by_length: bool = option(False, "alike")
    truncation_strategy: Literal["ratio", "drop", "left", "right"] = option("ratio", "too long")
    data_seed: int | None = option(None, "seed of the order", also="dataset_split_seed dataset_seed")


@dataclass(frozen=True)
class TrainPart:
    stage: Literal["pt", "sft"] = option("sft", "what is learnt")
    do_train: bool = option(False, "train")
    do_eval: bool = option(False, "evaluate")
    output_dir: str | None = option(None, "folder")
    overwrite_output_dir: bool = option(False, "start again")
    logging_steps: int = option(10, "updates")
    save_steps: int = option(500, "updates")
    save_strategy: Literal["no", "steps", "epoch"] = option("steps", "when to save")
    save_only_model: bool = option(False, "no optimizer", also="only_save_model")
    evaluation_strategy: Literal["no", "steps", "epoch"] = option("no", "when", also="eval_strategy")
    eval_steps: int | None = option(None, "updates")
    load_best_model_at_end: bool = option(False, "best")
    early_stopping_steps: int | None = option(None, "patience")
    plot_loss: bool = option(False, "picture")
    report_to: tuple[str, ...] = option(("none",), "monitors")
    per_device_train_batch_size: int = option(8, "rows", also="batch_size per_gpu_train_batch_size")
    per_device_eval_batch_size: int = option(8, "rows", also="eval_batch_size per_gpu_eval_batch_size")
    gradient_accumulation_steps: int = option(1, "batches")
    learning_rate: float = option(5e-5, "peak")
    lr_scheduler_type: str = option("linear", "shape", also="lr_scheduler")
    lr_scheduler_kwargs: str | None = option(None, "JSON")
    optim: Literal["adamw_torch", "adamw_8bit"] = option("adamw_torch", "optimizer")
    num_train_epochs: float = option(3.0, "epochs")
    max_steps: int = option(-1, "updates")
    warmup_steps: float = option(0.0, "updates")
    warmup_ratio: float = option(0.0, "share")
    bf16: bool = option(False, "compute in bf16")
    fp16: bool = option(False, "compute in fp16")
    pure_bf16: bool = option(False, "all in bf16")
    disable_gradient_checkpointing: bool = option(False, "keep activations")
    test_oom: bool = option(False, "the largest batch first", also="test_oom_error")
    resume_from_checkpoint: str | None = option(None, "folder")
    train_from_scratch: bool = option(False, "random weights")
    seed: int = option(42, "seed")


ALL = [ModelPart, QuantPart, DataPart, LoraPart, TrainPart]


def load(*words: str, sections=ALL, **kwargs) -> Config:
    return config.load(list(words), sections, program="train.py", description="Train a model.", **kwargs)


def given_values(loaded: Config) -> dict:
    return {key: value for key, value in loaded.values.items() if loaded.origins[key] != "default"}


@pytest.fixture
def write(tmp_path):
    def write_file(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


def error_of(*words: str, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load(*words, **kwargs)
    return str(caught.value)


# Ways to give an option


@pytest.mark.parametrize(
    "words",
    [
        ["lora_rank=16", "use_dora=true", "dataset=a,b"],
        ["--lora_rank", "16", "--use_dora", "--dataset", "a,b"],
        ["--lora-rank=16", "--use-dora=True", "--dataset=a, b"],
        ["--use_dora", "--lora_rank=16", "dataset=[a, b]"],
        ["--lora_rank", "16", "--use_dora", "yes", "--dataset", '["a", "b"]'],
    ],
)
def test_spellings_of_the_command_line_agree(words):
    loaded = load(*words)
    assert given_values(loaded) == {"lora_rank": 16, "use_dora": True, "dataset": ("a", "b")}
    assert loaded.origins["lora_rank"] == "command line"
    assert loaded[LoraPart].lora_rank == 16
    assert loaded.origins["seed"] == "default"


def test_command_line_beats_files_and_a_later_file_an_earlier_one(write):
    first = write("lora_rank: 4\nseed: 1\ncutoff_len: 64\n", "a.yaml")
    second = write('{"seed": 2, "cutoff_len": 65}', "b.json")
    loaded = load("seed=3", first, "--config", second)
    assert given_values(loaded) == {"lora_rank": 4, "seed": 3, "cutoff_len": 65}
    assert loaded.origins["seed"] == "command line"
    assert loaded.origins["cutoff_len"] == second
    assert load(f"--config={first}").values["seed"] == load(f"config={first}").values["seed"] == 1


def test_a_flag_does_not_swallow_the_word_behind_it(write):
    path = write("lora_rank: 4\n")
    for words in (["--use_dora", path], [path, "--use_dora"], ["--use_dora", "lora_rank=4"]):
        loaded = load(*words)
        assert (loaded.values["use_dora"], loaded.values["lora_rank"]) == (True, 4)
    assert load("--full_finetune", path).values["finetuning_type"] == "full"
    assert "trust_remote_code" in load("--trust_remote_code", path).notices[0]
    assert error_of("--deepspeed", "ds.json").startswith("deepspeed=ds.json (command line): unknown key")
    assert load("--packing", "null").values["packing"] is None
    assert load("--use_dora", "False").values["use_dora"] is False


def test_values_may_hold_anything():
    assert load("default_system=a=b --c").values["default_system"] == "a=b --c"
    assert load("--default_system", "x=1").values["default_system"] == "x=1"
    assert load("default_system=").values["default_system"] == ""
    assert load("--max_steps", "-1").values["max_steps"] == -1


def test_repeated_word_the_last_counts_and_is_noticed():
    loaded = load("lora_rank=4", "lora_rank=5")
    assert loaded.values["lora_rank"] == 5
    assert loaded.notices == ("lora_rank is given more than once, the last counts: lora_rank=5",)
    assert load("lora_rank=4", "lora_rank=4").notices == ()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nonsense"], ["'nonsense'", "key=value", "--help"]),
        (["-x"], ["'-x'"]),
        (["--"], ["'--'"]),
        (["--lora_rank"], ["--lora_rank needs a value", "lora_rank=VALUE"]),
        (["--lora_rank", "--use_dora"], ["--lora_rank needs a value"]),
        (["--config"], ["--config needs a value"]),
        (["missing.yaml"], ["missing.yaml", "no such file"]),
        (["--config", "run.txt"], ["run.txt", ".yaml"]),
    ],
)
def test_mistakes_of_the_command_line(words, parts):
    message = error_of(*words)
    for part in parts:
        assert part in message


# Types


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),  # YAML 1.1 calls this a string
        ("learning_rate: '1e-4'", 1e-4),
        ("learning_rate: 1", 1.0),
        ("learning_rate: .inf", float("inf")),
        ("lora_rank: 3.0", 3),
        ("lora_rank: 1e3", 1000),
        ("lora_rank: 9007199254740993", 2**53 + 1),
        ("use_dora: 'True'", True),
        ("use_dora: off", False),
        ("evaluation_strategy: no", "no"),  # YAML 1.1 calls this false
        ("evaluation_strategy: false", "no"),
        ("finetuning_type: LoRA", "lora"),
        ("model_revision: 1.10", "1.10"),
        ("model_revision: 'null'", "null"),
        ("max_samples: null", None),
        ("max_samples:", None),
        ("max_samples: None", None),
        ("default_system: 'None'", "None"),
        ("packing: null", None),
        ("packing: yes", True),
        ("rope_scaling: none", "none"),
        ("rope_scaling: null", None),
        ("dataset: a, b,", ("a", "b")),
        ("dataset: [a, b]", ("a", "b")),
        ("dataset: ['a,b']", ("a,b",)),
        ("dataset:\n- a\n- b", ("a", "b")),
        ("dataset: null", ()),
        ("report_to: none", ("none",)),
        ("interleave_probs: 0.5,5e-1", (0.5, 0.5)),
        ("interleave_probs: [1, 2.5]", (1.0, 2.5)),
        ("lr_scheduler_kwargs: {num_cycles: 2, min_lr: 1e-6, name: x}",
         '{"num_cycles": 2, "min_lr": 1e-06, "name": "x"}'),
    ],
)  # fmt: skip
def test_yaml_values_are_typed(write, line, value):
    key = line.split(":")[0]
    extra = {"interleave_probs": ["mix_strategy=interleave_under"]}.get(key, [])
    loaded = load(write(line + "\n"), *extra)
    assert loaded.values[key] == value
    assert type(loaded.values[key]) is type(value)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("lora_rank: 3.5", "expected a whole number"),
        ("lora_rank: true", "expected a whole number"),
        ("lora_rank: 8k", "expected a whole number"),
        ("lora_rank: .inf", "expected a whole number"),
        ("lora_rank: [8]", "expected a whole number, found a list"),
        ("lora_rank: null", "leave the key out"),
        ("learning_rate: fast", "expected a number"),
        ("learning_rate: nan", "expected a number"),
        ("use_dora: maybe", "expected true or false"),
        ("use_dora: 2", "expected true or false"),
        ("eval_strategy: step", "expected one of no, steps, epoch; did you mean steps?"),
        ("dataset: {a: b}", "expected a list"),
        ("dataset: [[a]]", "expected text, found a list"),
        ("dataset: [null]", "expected text, found null"),
        ("interleave_probs: 0.5,x", "expected a number"),
        ("model_revision: null", "leave the key out"),
        ("model_revision: [a]", "expected text, found a list"),
        ("lora_alpha: x", "expected a number"),
        ("dataset: [a", "not valid YAML"),
    ],
)
def test_wrong_values_name_key_place_and_expectation(write, line, part):
    path = write("seed: 1\n" + line + "\n")
    message = error_of(path)
    assert part in message
    assert path in message
    if "YAML" not in part:
        assert message.startswith(line.split(":")[0] + "=")
        assert "line 2" in message


def test_several_mistakes_are_reported_together():
    message = error_of("lora_rnak=1", "learning_rate=x", "use_galore=true")
    assert len(message.splitlines()) == 3


def test_checks_of_a_section_name_the_origin(write):
    path = write("lora_rank: 0\n")
    assert error_of(path) == f"lora_rank: 0 must be at least 1 (lora_rank: {path} line 1)"


# Files


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("lora_rank: 8\nseed: 1\nlora_rank: 8\n", "a.yaml", ["lora_rank is there twice", "line 1", "line 3"]),
        ('{"seed": 1, "seed": 2}', "a.json", ["seed is there twice", "line 1"]),
        ("- a\n- b\n", "a.yaml", ["key: value", "sequence"]),
        ("hello\n", "a.yaml", ["key: value", "scalar"]),
        ("# nothing\n", "a.yaml", ["found nothing"]),
        ("a: b: c\n", "a.yaml", ["line 1", "not valid YAML"]),
        ("seed: 1\n\tlora_rank: 2\n", "a.yaml", ["line 2", "not valid YAML"]),
        ("seed: 1\n---\nseed: 2\n", "a.yaml", ["not valid YAML"]),
        ("? [a, b]\n: 1\n", "a.yaml", ["line 1", "expected a key"]),
        ("dataset: &x [*x]\n", "a.yaml", ["line 1", "lists in lists"]),
        ("seed: \x07\n", "a.yaml", ["not valid YAML"]),
        ('{"seed": 1', "a.json", ["line 1", "not valid JSON"]),
        ("[1]", "a.json", ["key: value", "sequence"]),
        ("3", "a.json", ["key: value", "scalar"]),
    ],
)
def test_bad_files(write, text, name, parts):
    path = write(text, name)
    message = error_of(path)
    for part in [path, *parts]:
        assert part in message


def test_file_that_is_not_text_or_a_folder(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"seed: \xff\n")
    assert "not UTF-8" in error_of(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").mkdir()
    assert "no such file" in error_of(str(tmp_path / "b.yaml"))


def test_json_file_equals_yaml_file(write):
    values = {
        "lora_rank": 4,
        "learning_rate": 0.001,
        "use_dora": True,
        "dataset": ["a", "b"],
        "template": None,
    }
    values |= {"default_system": "none", "lr_scheduler_kwargs": {"min_lr": 1e-6}}
    as_json, as_yaml = write(json.dumps(values), "a.json"), write(yaml.safe_dump(values), "a.yaml")
    assert load(as_json).values["dataset"] == ("a", "b")
    assert load(as_json).values["learning_rate"] == 0.001
    assert load(as_json).values["use_dora"] is True
    assert load(as_json).values["lr_scheduler_kwargs"] == load(as_yaml).values["lr_scheduler_kwargs"]


def test_json_as_programs_write_it(write):
    values = {
        "default_system": '\U0001f600 \u00e9 / \t"',
        "dataset": ["a\u2028b"],
        "seed": 1,
        "packing": None,
    }
    for text in (
        json.dumps(values),
        json.dumps(values, indent="\t", ensure_ascii=False),
        json.dumps(values, separators=(",", ":")).replace("/", "\\/"),
    ):
        loaded = load(write(text, "a.json"))
        assert loaded.values["default_system"] == values["default_system"]
        assert loaded.values["dataset"] == ("a\u2028b",)
        assert given_values(loaded).keys() == values.keys()


def test_byte_order_mark_and_dashed_keys(write):
    assert given_values(load(write("\ufefflora-rank: 3\n"))) == {"lora_rank": 3}


def test_yaml_tags_build_nothing(write):
    path = write("default_system: !!python/object/apply:os.system [echo]\n")
    assert "expected text, found a list" in error_of(path)


# Unknown keys, keys of other systems


def test_unknown_key_names_origin_and_nearest(write):
    path = write("seed: 1\nlora_rnak: 4\n")
    message = error_of(path)
    assert message.startswith(f"lora_rnak=4 ({path} line 2): unknown key; did you mean lora_rank?")
    assert "did you mean" not in error_of("zzzzzz=1")
    assert "did you mean lora_dropout?" in error_of("lora_dropoutp=1")  # nearest is a name of another system


def test_llama_factory_file_loads_unchanged(write):
    path = write(LLAMA_FACTORY_SFT)
    loaded = load(path)
    assert given_values(loaded) == {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "stage": "sft", "do_train": True,
        "finetuning_type": "lora", "lora_rank": 8, "lora_target": ("all",),
        "dataset": ("identity", "alpaca_en_demo"), "template": "llama3", "cutoff_len": 2048,
        "max_samples": 1000, "overwrite_cache": True, "preprocessing_num_workers": 16,
        "output_dir": "saves/llama3-8b/lora/sft",
        "logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True,
        "save_only_model": False, "report_to": ("none",), "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "resume_from_checkpoint": None,
    }  # fmt: skip
    (notice,) = loaded.notices
    assert notice.startswith("accepted without effect: ")
    for key in ("trust_remote_code", "dataloader_num_workers", "ddp_timeout"):
        assert notice.count(key) == 1


LLAMA_FACTORY_SFT = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
# eval_dataset: alpaca_en_demo
# val_size: 0.1
# per_device_eval_batch_size: 1
# eval_strategy: steps
# eval_steps: 500
"""

QLORA = """
    --model_name_or_path EleutherAI/pythia-12b --use_auth_token --bits 16 --quant_type nf4 --double_quant True
    --max_memory_MB 80000 --lora_r 64 --lora_alpha 16 --lora_dropout 0.1 --dataset oasst1
    --train_on_source False --source_max_len 16 --target_max_len 512 --per_device_train_batch_size 1
    --gradient_accumulation_steps 16 --max_steps 1875 --learning_rate 0.0002 --group_by_length
    --remove_unused_columns False --do_train --do_mmlu_eval False --mmlu_split eval --gradient_checkpointing
    --full_finetune False --warmup_ratio 0.03 --dataloader_num_workers 1 --eval_dataset_size 1024 --bf16
    --evaluation_strategy steps --eval_steps 187"""

SWIFT = """
    --model_id_or_path qwen/Qwen-7B --model_type qwen-7b --sft_type lora --tuner_backend swift --dtype bf16
    --dataset advertise-gen --train_dataset_sample -1 --dataset_test_ratio 0.01 --dataset_split_seed 42
    --system hello --max_length 1024 --lora_target_modules ALL --lora_rank 8 --lora_alpha 32
    --lora_dropout_p 0.05 --batch_size 1 --eval_batch_size 2 --quantization_bit 0 --ddp_backend nccl
    --gradient_checkpointing false --use_flash_attn true --only_save_model true --test_oom_error false
    --push_to_hub false --optim adamw_hf"""


def test_qlora_command_runs():
    expected = {
        "model_name_or_path": "EleutherAI/pythia-12b", "lora_rank": 64, "lora_alpha": 16.0,
        "lora_dropout": 0.1, "dataset": ("oasst1",), "train_on_prompt": False, "cutoff_len": 528,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16, "max_steps": 1875, "learning_rate": 2e-4, "group_by_length": True,
        "do_train": True, "disable_gradient_checkpointing": False, "warmup_ratio": 0.03, "val_size": 1024.0,
        "bf16": True, "evaluation_strategy": "steps", "eval_steps": 187, "quantization_type": "nf4",
        "double_quantization": True,
    }  # fmt: skip
    loaded = load(*QLORA.split())
    assert given_values(loaded) == expected
    (read_as,) = (line for line in loaded.notices if line.startswith("read as"))
    assert "lora_r -> lora_rank" in read_as
    assert "bits=16 -> nothing to change" in read_as


def test_swift_command_runs():
    assert given_values(load(*SWIFT.split())) == {
        "model_name_or_path": "qwen/Qwen-7B", "finetuning_type": "lora", "bf16": True, "fp16": False,
        "dataset": ("advertise-gen",), "val_size": 0.01, "data_seed": 42, "default_system": "hello",
        "cutoff_len": 1024, "lora_target": ("all",), "lora_rank": 8, "lora_alpha": 32.0, "lora_dropout": 0.05,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 2,
        "disable_gradient_checkpointing": True, "save_only_model": True, "optim": "adamw_torch",
        "quantization_bit": 0, "test_oom": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["full_finetune=true"], {"finetuning_type": "full"}),
        (["bits=32"], {}),
        (["adam8bit=true"], {"optim": "adamw_8bit"}),
        (["adam8bit=false"], {}),
        (["load_in_4bit=true", "load_in_8bit=false"], {"quantization_bit": 4}),
        (["load_in_8bit=true"], {"quantization_bit": 8}),
        (["dtype=fp16"], {"bf16": False, "fp16": True}),
        (["dtype=fp32"], {"bf16": False, "fp16": False}),
        (["source_max_len=100"], {"cutoff_len": 356}),
        (["freeze_trainable_layers=3", "freeze_trainable_modules=mlp"],
         {"num_layer_trainable": 3, "name_module_trainable": ("mlp",)}),
        (["neat_packing=true"], {"packing": True}),
        (["neat_packing=false"], {}),
        (["truncation_strategy=delete"], {"truncation_strategy": "drop"}),
        (["train_dataset_sample=20000"], {"max_samples": 20000}),
        (["gradient_checkpointing=true"], {"disable_gradient_checkpointing": False}),
        (["train_sampling_strategy=group_by_length"], {"group_by_length": True}),
        (["train_sampling_strategy=random"], {"group_by_length": False}),
        (["use_auth_token=hf_secret"], {"hf_hub_token": "hf_secret"}),
        (["ckpt_dir=x"], {"adapter_name_or_path": ("x",)}),
        (["max_length=77"], {"cutoff_len": 77}),
        (["lora_r=4", "lora_rank=4"], {"lora_rank": 4}),
        (["bits=4", "quant_type=fp4", "double_quant=false"],
         {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False}),
        (["quantization_bit=8", "quant_method=bnb"],
         {"quantization_bit": 8, "quantization_method": "bitsandbytes"}),
        (["quant_bits=4", "bnb_4bit_quant_type=nf4", "bnb_4bit_use_double_quant=true",
          "bnb_4bit_comp_dtype=bf16"],
         {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}),
    ],
)  # fmt: skip
def test_names_of_other_systems(words, expected):
    assert given_values(load(*words)) == expected


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lora_r=4", "lora_rank=8"], ["lora_r=4", "lora_rank=8", "both set lora_rank"]),
        (["full_finetune=true", "sft_type=lora"], ["both set finetuning_type"]),
        (["dtype=bf16", "fp16=true"], ["both set fp16"]),
        (["bits=4", "quantization_bit=8"], ["bits=4", "quantization_bit=8", "both set quantization_bit"]),
        (
            ["bits=4", "full_finetune=true"],
            ["quantization_bit=4", "finetuning_type=full", "have no gradient"],
        ),
        (["quant_type=int4"], ["quant_type=int4", "nf4, fp4"]),
        (["bits=x"], ["expected a number"]),
        (["dtype=int8"], ["bf16, fp16, fp32"]),
        (["train_sampling_strategy=sequential"], ["this version does not have"]),
        (["sft_type=longlora"], ["sft_type=longlora", "does not have that part", "lora, full, freeze"]),
    ],
)
def test_names_of_other_systems_that_cannot_be_used(words, parts):
    message = error_of(*words)
    for part in parts:
        assert part in message


def test_values_of_other_systems_yield_to_own_choices():
    part = dataclasses.make_dataclass(
        "Own", [("evaluation_strategy", Literal["no", "none"], "no")], frozen=True
    )
    assert load("evaluation_strategy=none", sections=[part]).values["evaluation_strategy"] == "none"
    assert load("eval_strategy=none").values["evaluation_strategy"] == "no"


def test_aliases_conflict_inside_a_source_only(write):
    path = write("lora_r: 4\n")
    assert load(path, "lora_rank=8").values["lora_rank"] == 8
    assert "both set lora_rank" in error_of(write("lora_r: 4\nlora_rank: 8\n"))


@pytest.mark.parametrize(
    "word",
    ["use_galore=true", "use_badam=yes", "loraplus_lr_ratio=16", "use_llama_pro=true",
     "mixture_of_depths=convert", "shift_attn=true", "deepspeed_config_path=ds.json",
     "infer_backend=vllm",
     "resize_vocab=true", "generation_max_length=99",
     "moe_aux_loss_coef=0.1", "num_beams=4", "rope_scaling=longrope"],
)  # fmt: skip
def test_parts_that_this_version_lacks(word):
    message = error_of(word)
    assert "known" in message
    assert "this version does not have" in message
    assert word.split("=")[0] in message
    assert "unknown" not in message


@pytest.mark.parametrize(
    "word",
    ["use_galore=False", "deepspeed=null", "vllm_maxlen=4096", "infer_backend=huggingface",
     "badam_switch_block_every=50", "num_beams=1", "galore_scale=2.0", "fsdp=",
     "loraplus_lr_embedding=1e-6"],
)  # fmt: skip
def test_parts_that_this_version_lacks_may_be_switched_off(word):
    assert given_values(load(word)) == {}


def test_a_new_section_takes_its_keys_out_of_the_tables():
    @dataclass(frozen=True)
    class Later:
        quantization_bit: Literal[4, 8] | None = option(None, "bits")
        trust_remote_code: bool = option(False, "trust")
        bits: int = option(1, "own meaning")
        lora_r: int = option(2, "own meaning")

    loaded = load(
        "quantization_bit=4", "trust_remote_code=true", "bits=4", "lora_r=5", sections=[LoraPart, Later]
    )
    assert dataclasses.astuple(loaded[Later]) == (4, True, 4, 5)
    assert loaded.notices == ()
    assert loaded.values["lora_rank"] == 8


def test_values_that_are_not_built_follow_the_section():
    @dataclass(frozen=True)
    class Tuning:
        finetuning_type: Literal["lora", "oft"] = option("lora", "tuning")

    assert load("finetuning_type=oft", sections=[Tuning]).values["finetuning_type"] == "oft"
    assert "this version does not have" in error_of("finetuning_type=lisa", sections=[Tuning])
    assert "expected one of" in error_of("finetuning_type=lorra", sections=[Tuning])


def test_tables_are_sound():
    known = declared(setup.SECTIONS)
    others = [name for key in known.values() for name in key.also]
    assert len(others) == len(set(others))
    assert not set(others) & {*known, *aliases.CONVERTED}
    assert aliases.lookup(aliases.HARMLESS, "finetuning_type")[0]  # where nothing is trained
    for name in aliases.CONVERTED:  # a key has one explanation
        for table in (aliases.HARMLESS, aliases.NOT_YET):
            assert aliases.lookup(table, name) == (None, [])
    for words in aliases.NOT_YET.values():
        for word in words.split():
            assert aliases.lookup(aliases.HARMLESS, word.split("=")[0])[0] is None, word


# Keys of other scripts


def test_keys_of_other_programs_in_a_file_are_left_out_and_noticed(write):
    path = write(LLAMA_FACTORY_SFT + "deepspeed: ds.json\nbits: 4\n")
    loaded = load(path, "dtype=bf16", sections=[ModelPart, Chat], reads_files_of_others=True)
    assert given_values(loaded) == {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct", "infer_dtype": "bfloat16",
    }  # fmt: skip
    assert set(loaded.values) == {"infer_dtype", *(item.name for item in dataclasses.fields(ModelPart))}
    (unused,) = [line for line in loaded.notices if line.startswith("not used by this script: ")]
    assert unused.startswith("not used by this script: stage, do_train") and unused.endswith(
        "deepspeed, bits"
    )
    assert "unknown key" in error_of("seed=1", sections=[ModelPart], reads_files_of_others=True)
    assert "unknown key" in error_of(path, sections=[ModelPart])


def test_what_a_program_knows_of_another_ones_file_is_checked(write):
    for line in ("quantization_bit: x", "quant_bits: x", "bits: x"):
        message = error_of(write(line), sections=[QuantPart], reads_files_of_others=True)
        assert message.startswith(line.replace(": ", "=")) and "expected a" in message


@dataclass(frozen=True)
class Chat:
    infer_dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "dtype")


def test_dtype_means_infer_dtype_where_nothing_is_trained():
    assert load("dtype=bf16", sections=[Chat]).values["infer_dtype"] == "bfloat16"
    assert load("infer_dtype=fp32", sections=[Chat]).values["infer_dtype"] == "float32"


def test_required_keys_and_keys_declared_twice():
    @dataclass(frozen=True)
    class Needs:
        export_dir: str = option(REQUIRED, "where the model goes")

    assert "export_dir is required: where the model goes" in error_of(sections=[Needs])
    assert load("export_dir=x", sections=[Needs]).values["export_dir"] == "x"
    with pytest.raises(ValueError, match="lora_rank is declared by LoraPart and Twice"):
        load(sections=[LoraPart, dataclasses.make_dataclass("Twice", [("lora_rank", int, 8)], frozen=True)])


# Rules between sections, and checks within one, of the real sections


def given_to_train(words: str) -> list[str]:
    return ["output_dir=x", *words.split()]


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        ("do_train=true", "name a dataset"),
        ("streaming=true", "set max_steps"),
        ("streaming=true max_steps=9 max_samples=5", "drop it, or streaming"),
        ("streaming=true max_steps=9 val_size=0.1 dataset=a", "number of rows"),
        ("streaming=true max_steps=9 group_by_length=true", "drop it"),
        ("packing=true group_by_length=true", "set one of the two to false"),
        ("val_size=0.1 dataset=a eval_dataset=b", "drop one of the two"),
        ("val_size=0.1", "drop val_size"),
        ("mask_history=true train_on_prompt=true", "set one"),
        ("stage=dpo mask_history=true", "drop mask_history"),
        ("stage=rm train_on_prompt=true", "drop train_on_prompt"),
        ("interleave_probs=0.5,0.5 dataset=a,b", "interleave_under"),
        ("interleave_probs=0.5 dataset=a,b mix_strategy=interleave_over", "numbers for 2 data sets"),
        ("cutoff_len=8 reserved_label_len=8", "less than cutoff_len"),
        ("fp16=true bf16=true", "choose one"),
        ("fp16=true pure_bf16=true", "choose one"),
        ("bf16=true pure_bf16=true", "choose one"),
        ("use_dora=true finetuning_type=full", "finetuning_type=lora"),
        ("use_rslora=true finetuning_type=freeze", "finetuning_type=lora"),
        ("additional_target=x finetuning_type=full", "finetuning_type=lora"),
        ("adapter_name_or_path=x finetuning_type=full", "export.py"),
        ("create_new_adapter=true adapter_name_or_path=x finetuning_type=full", "drop create_new_adapter"),
        ("create_new_adapter=true", "adapter_name_or_path"),
        ("do_eval=true", "val_size or eval_dataset"),
        ("do_predict=true predict_with_generate=true", "val_size or eval_dataset"),
        ("evaluation_strategy=steps", "eval_strategy=no"),
        ("load_best_model_at_end=true", "evaluation_strategy=steps"),
        ("load_best_model_at_end=true evaluation_strategy=epoch eval_dataset=a", "save_strategy equal to"),
        (
            "load_best_model_at_end=true eval_strategy=steps eval_steps=30 save_steps=50 eval_dataset=a",
            "multiple",
        ),
        ("early_stopping_steps=3", "needs evaluation"),
        ("quantization_bit=4 finetuning_type=full", "set finetuning_type=lora"),
        ("quantization_bit=8 finetuning_type=freeze", "set finetuning_type=lora"),
        ("quantization_bit=4 train_from_scratch=true", "drop one of the two"),
        (
            "quantization_bit=4 create_new_adapter=true adapter_name_or_path=a",
            "merge them with export.py first",
        ),
        ("quantization_bit=4 adapter_name_or_path=a,b", "give one, or merge them with export.py"),
        ("stage=grpo neftune_noise_alpha=5 reward_file=a", "drop it"),
        ("stage=ppo do_sample=false reward_file=a", "set do_sample=true"),
        ("stage=grpo", "name a reward_file"),
        ("stage=pt do_predict=true eval_dataset=a", "use stage=sft"),
        ("stage=pt predict_with_generate=true", "use stage=sft"),
        ("do_predict=true eval_dataset=a", "set predict_with_generate=true"),
        ("ref_model=a", "drop ref_model"),
        ("stage=orpo pref_loss=ipo", "set stage=dpo"),
        ("loss_type=grpo", "pref_loss"),
    ],
)
def test_options_that_cannot_be_combined(words, fix):
    message = error_of(*given_to_train(words), sections=setup.SECTIONS)
    assert fix in message and len(message.splitlines()) == 1
    for word in words.split():
        key = word.split("=")[0]
        if key in OTHER_KEYS:
            continue  # given so that only one rule is broken
        assert key in message, message
    assert "command line" in message


OTHER_KEYS = ("max_steps", "dataset", "mix_strategy", "adapter_name_or_path", "eval_dataset", "reward_file")
OTHER_KEYS += ("predict_with_generate", "evaluation_strategy", "eval_strategy")


@pytest.mark.parametrize(
    "words",
    [
        "streaming=true max_steps=9 val_size=10 dataset=a",
        "interleave_probs=0.5,0.5 dataset=a,b mix_strategy=interleave_over",
        "eval_strategy=steps val_size=0.1 dataset=a load_best_model_at_end=true eval_steps=50",
        "do_eval=true tokenized_path=x",
        "create_new_adapter=true adapter_name_or_path=a,b",
        "quantization_bit=0 finetuning_type=full",
        "bits=16 finetuning_type=freeze",
        "quantization_bit=4 use_dora=true adapter_name_or_path=a",
        "packing=true",
        "do_train=true tokenized_path=x",
    ],
)
def test_options_that_can_be_combined(words):
    load(*given_to_train(words), sections=setup.SECTIONS)


def test_a_rule_reads_its_own_keys_and_each_is_declared_somewhere():
    known = {*declared(setup.SECTIONS), *declared(export.SECTIONS), *declared(chat.SECTIONS)}
    helpers = {*vars(rules), "len", "bool"}
    for rule in rules.RULES:
        keys, (message, _) = rule.keys.split(), (rule.message, rule.broken(nothing_chosen(rule)))
        assert set(keys) <= known, rule.name
        assert set(rule.broken.__code__.co_names) - helpers <= set(keys), rule.name
        assert message[0].islower() or message.startswith("GGUF") or message[0] == "a", rule.name
        sections = {(known_in(key)).__name__ for key in keys}
        assert len(sections) > 1, f"{rule.name}: a rule within one section belongs into its __post_init__"
    assert len({rule.name for rule in rules.RULES}) == len(rules.RULES)


def nothing_chosen(rule):
    return SimpleNamespace(**{key: known_option(key).default for key in rule.keys.split()})


def known_option(key):
    return (declared(export.SECTIONS) | declared(setup.SECTIONS))[key]


def known_in(key):
    return known_option(key).section


def test_rules_say_where_each_key_came_from(write):
    path = write("seed: 1\nquantization_bit: 4\n")
    message = error_of(path, "finetuning_type=full")
    assert message.startswith(
        f"quantization_bit=4 ({path} line 2) with finetuning_type=full (command line): "
    )
    assert "max_steps=-1 (default)" in error_of("streaming=true")


def test_rules_on_keys_of_absent_sections_are_silent():
    assert load("eval_strategy=steps", sections=[TrainPart]).values["evaluation_strategy"] == "steps"


# The result


def test_nothing_can_be_changed():
    loaded = load("lora_rank=4", "trust_remote_code=true")
    with pytest.raises(TypeError):
        loaded.values["lora_rank"] = 5
    with pytest.raises(TypeError):
        loaded.origins["lora_rank"] = "me"
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.values = {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded[LoraPart].lora_rank = 5
    assert loaded.notices[0].count("trust_remote_code") == 1


def test_secrets_are_neither_saved_nor_shown(tmp_path):
    loaded = load("use_auth_token=hf_secret", "lora_rank=4")
    loaded.save(tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    assert "hf_secret" not in text + str(loaded.notices)
    assert "# hf_hub_token: given" in text
    assert load(str(tmp_path / "run.yaml")).values["lora_rank"] == 4
    assert "hf_secret" not in error_of("om_hub_tokn=1", "hf_hub_token=[hf_secret]", "hub_token=hf_secret")


def test_saved_file_is_plain_yaml_for_other_readers(tmp_path):
    load("dataset=a,b", "learning_rate=1e-5", "default_system=no", "packing=true").save(tmp_path / "run.yaml")
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert values["dataset"] == ["a", "b"]
    assert values["learning_rate"] == 1e-5
    assert values["default_system"] == "no"
    assert values["packing"] is True
    assert "max_samples" not in values


@dataclass(frozen=True)
class Everything:
    number: int = option(1, "an int")
    share: float = option(1.0, "a float")
    flag: bool = option(False, "a bool")
    text: str = option("x", "a text")
    maybe_number: int | None = option(3, "or null")
    maybe_share: float | None = option(0.5, "or null")
    maybe_flag: bool | None = option(True, "or null")
    maybe_text: str | None = option("none", "or null")
    names: tuple[str, ...] = option(("a",), "texts")
    shares: tuple[float, ...] = option((1.0,), "floats")
    choice: Literal["no", "yes", "none", "1", "1.0"] = option("no", "one of")
    bits: Literal[4, 8] | None = option(None, "one of")
    either: int | float = option(1, "count or share")


FLOATS = st.floats(allow_nan=False)
TRICKY = ["null", "None", "~", "yes", "1e-4", "1_000", "[a, b]", "{a: b}", "a,b", "# x", "- a", "a: b", "010"]
TRICKY += [
    "!!str x",
    "&a",
    "*a",
    "'",
    '"',
    "\r\n",
    "\x85",
    "\u2028",
    "\ufeff",
    "\U0001f600",
    " x ",
    "a\n\n b",
]
TRICKY += ["=", "<<", "\x00", "..."]
TEXTS = st.text() | st.sampled_from(TRICKY)


@pytest.mark.parametrize("text", [*TRICKY, "none", "NULL", "nan", "", "\r"])
def test_saved_texts_that_yaml_would_change(tmp_path, text):
    instance = Everything(text=text, maybe_text=text, names=(text, text))
    Config({Everything: instance}, {}, {}, ()).save(tmp_path / "run.yaml")
    assert load(str(tmp_path / "run.yaml"), sections=[Everything])[Everything] == instance


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(
        Everything,
        number=st.integers(), share=FLOATS, flag=st.booleans(), text=TEXTS,
        maybe_number=st.none() | st.integers(), maybe_share=st.none() | FLOATS,
        maybe_flag=st.none() | st.booleans(), maybe_text=st.none() | TEXTS,
        names=st.lists(TEXTS, max_size=4).map(tuple), shares=st.lists(FLOATS, max_size=4).map(tuple),
        choice=st.sampled_from(["no", "yes", "none", "1", "1.0"]), bits=st.sampled_from([None, 4, 8]),
        either=st.integers() | FLOATS.filter(lambda x: x != x // 1),
    )
)  # fmt: skip
def test_saved_configurations_load_to_equal_values(tmp_path, instance):
    values = dataclasses.asdict(instance)
    Config({Everything: instance}, values, {}, ()).save(tmp_path / "run.yaml")
    loaded = load(str(tmp_path / "run.yaml"), sections=[Everything])
    assert dict(loaded.values) == values
    assert [type(value) for value in loaded.values.values()] == [type(value) for value in values.values()]


def test_a_run_saved_and_loaded_again_is_the_same(write, tmp_path):
    loaded = load(write(LLAMA_FACTORY_SFT), "lora_r=3", "default_system=None")
    loaded.save(tmp_path / "resolved.yaml")
    again = load(str(tmp_path / "resolved.yaml"))
    assert again.values == loaded.values
    assert again.notices == ()


KEYS = [item.name for section in ALL for item in dataclasses.fields(section)] + list(aliases.CONVERTED)
KEYS += [name for key in declared(ALL).values() for name in key.also] + ["trust_remote_code", "fsdp", "x"]
ODD = st.text(max_size=6) | st.sampled_from(
    [*TRICKY, "-1", "true", "[a", "nan", "1e400", "--", "x.yaml", "[[1]]"]
)
WORDS = (
    ODD
    | st.builds("{}={}".format, st.sampled_from(KEYS), ODD)
    | st.builds("--{}".format, st.sampled_from(KEYS))
)
LINES = st.builds("{}: {}\n".format, st.sampled_from(KEYS), ODD) | st.text(max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, max_size=5), st.lists(LINES, max_size=4).map("".join))
def test_whatever_is_written_the_only_error_is_config_error(tmp_path, words, text):
    (tmp_path / "odd.yaml").write_text(text, encoding="utf-8")
    for argv in ([word for word in words if word not in ("-h", "--help")], [str(tmp_path / "odd.yaml")]):
        try:
            load(*argv)
        except UserError as error:
            assert str(error)


# Help


def help_text(capsys, *words: str, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        load(*words, **kwargs)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [50, 80, 100, 200])
@pytest.mark.parametrize("words", [["--help", "all"], ["-h", "all"], ["--help=all"]])
def test_help_shows_every_key_within_the_terminal(capsys, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(capsys, "missing.yaml", *words)
    assert max(map(len, text.splitlines())) <= columns
    assert text.startswith("usage: python train.py")
    assert "Train a model." in text
    assert "\nAdapters\n" in text  # the docstring of its section
    assert "\nModel part\n" in text
    for section in ALL:
        for item in dataclasses.fields(section):
            assert f"\n  {item.name} " in text
    flat = " ".join(text.split())
    assert "rank of the update" in flat
    assert "[lora, full, freeze]" in flat


def test_help_row_shows_type_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    lines = [
        line
        for line in help_text(capsys, "--help", "all").splitlines()
        if line[:2] == "  " and line[2] != " "
    ]
    rows = {line.split()[0]: line.split()[1:3] for line in lines}
    assert rows["lora_rank"] == ["int", "8"]
    assert rows["lora_alpha"] == ["float", "-"]
    assert rows["use_dora"] == ["bool", "false"]
    assert rows["finetuning_type"] == ["choice", "lora"]
    assert rows["dataset"] == ["list", "-"]
    assert rows["packing"] == ["bool", "-"]


@pytest.mark.parametrize("columns", [50, 80, 130])
@pytest.mark.parametrize("words", [["--help"], ["a.yaml", "-h", "lora_rank=4"], ["--help", "a.yaml"]])
def test_help_alone_shows_the_keys_of_the_recipes_one_line_each(capsys, monkeypatch, columns, words):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_text(capsys, *words, sections=setup.SECTIONS)
    lines = text.splitlines()
    assert max(map(len, lines)) <= columns
    shown = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    assert shown == [option.name for option in declared(setup.SECTIONS).values() if option.common]
    assert 35 <= len(shown) <= 45
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs").glob("*.yaml"))]
    counts = Counter(key for recipe in recipes for key in recipe)
    assert {key for key, count in counts.items() if count > 1} <= set(shown)
    rest = len(declared(setup.SECTIONS)) - len(shown)
    assert f"{rest} more keys: --help SECTION (train, model, quant, data, template, lora" in " ".join(
        text.split()
    )


def test_help_for_a_section_or_a_key(capsys):
    for name in ("lora", "LoraOptions", "LORA"):
        text = help_text(capsys, "--help", name, sections=setup.SECTIONS)
        assert text.startswith("Lora options\n") and "lora_dropout" in text and "seed" not in text
    for name in ("pref_loss", "dpo_loss"):
        text = help_text(capsys, f"--help={name}", sections=setup.SECTIONS)
        assert text.startswith("Preference options\n") and "pref_beta" not in text
        assert "Also understood: dpo_loss. Read in: dpo, orpo." in text
    assert "A resumed run may change it." in help_text(
        capsys, "--help", "save_steps", sections=setup.SECTIONS
    )
    assert "never written" in help_text(capsys, "--help", "hf_hub_token", sections=setup.SECTIONS)
    message = error_of("--help", "lora_rnak", sections=setup.SECTIONS)
    assert "neither a section nor a key; did you mean lora_rank" in message


# Facts at the fields


def test_what_an_option_says_of_itself():
    options = declared(setup.SECTIONS)
    assert options["lora_rank"].also == ("lora_r",) and options["lora_rank"].default == 8
    assert [name for name, option in options.items() if option.secret] == ["hf_hub_token", "ms_hub_token"]
    assert all(
        name.endswith("_token") for name, option in options.items() if option.secret
    )  # as `show` hides
    free = {name for name, option in options.items() if option.resumable}
    assert {"output_dir", "max_steps", "save_steps", "infer_dtype"} <= free
    assert not free & {
        "learning_rate",
        "seed",
        "dataset",
        "stage",
        "lora_rank",
        "gradient_accumulation_steps",
    }
    assert options["ppo_epochs"].stages == ("ppo",) and options["pref_beta"].stages == ("dpo", "orpo", "kto")
    assert options["pref_loss"].does_nothing("kto") and not options["pref_loss"].does_nothing("dpo")
    assert not options["lora_rank"].does_nothing("kto")


def test_options_are_read_without_torch_and_without_the_other_parts():
    others = "{'torch', 'data', 'lora', 'model', 'templates'}"
    code = f"import sys, options.config; print(*{others} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_attention_of_other_systems_is_known_by_its_name():
    @dataclass(frozen=True)
    class Part:
        flash_attn: Literal["auto", "triton", "sdpa", "disabled", "fa2", "fa3"] = option(
            "auto", "attention", also="attn_impl"
        )

    for argument, value in (("flash_attn=sdpa", "sdpa"), ("attn_impl=flash_attention_2", "fa2")):
        assert load(argument, sections=[Part]).values["flash_attn"] == value
    assert load("attn_impl=eager", sections=[Part]).values["flash_attn"] == "disabled"

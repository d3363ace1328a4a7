"""What LLaMA-Factory and the Hugging Face trainer write: example files, and the defaults of their fields.

tests/fixtures/deepspeed_configs.json: its examples/deepspeed.
llamafactory_examples.json: the text examples of commit ff6d4d12 and, of releases 0.7.0 to 0.9.5, those with
other keys or values: [file, program here, key that is refused or null, options or words].
fields_of_others.json: every field of LLaMA-Factory 0.9.5's dataclasses and of transformers'
Seq2SeqTrainingArguments with its default.
"""

import json
from pathlib import Path

import pytest

import chat
import export
from options import config
from options.errors import UserError
from training import make_stage, setup
from training.options import OptimOptions, TrainOptions
from training.schedules import warmup_length

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EXAMPLES = json.loads((FIXTURES / "llamafactory_examples.json").read_text())
FIELDS = json.loads((FIXTURES / "fields_of_others.json").read_text())
SECTIONS = {"train.py": setup.SECTIONS, "chat.py": chat.SECTIONS, "export.py": export.SECTIONS}


def load(*words, program="train.py", folder=None, **keys):
    """keys: those of a file in `folder`."""
    if keys:
        (folder / "run.json").write_text(json.dumps(keys))
        words = (str(folder / "run.json"), *words)
    others = program != "train.py"
    shared = {"program": program, "description": "", "reads_files_of_others": others}
    return config.load(list(words), SECTIONS[program], **shared)


@pytest.fixture(autouse=True)
def deepspeed_files(tmp_path, monkeypatch):
    """LLaMA-Factory's, where its examples look for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples/deepspeed").mkdir(parents=True)
    for name, content in json.loads((FIXTURES / "deepspeed_configs.json").read_text()).items():
        (tmp_path / "examples/deepspeed" / name).write_text(json.dumps(content))


def train(words: str):
    return load("output_dir=x", "model_name_or_path=m", "dataset=d", *words.split())


@pytest.mark.parametrize(
    ("program", "refused", "options"), [row[1:] for row in EXAMPLES], ids=[row[0] for row in EXAMPLES]
)
def test_an_example_of_llama_factory_is_accepted_or_names_the_part_that_is_missing(
    tmp_path, program, refused, options
):
    words, keys = (options, {}) if isinstance(options, list) else ([], options)
    if refused is None:
        loaded = load(*words, program=program, folder=tmp_path, **keys)
        assert loaded.values["model_name_or_path"]
        return
    with pytest.raises(UserError) as caught:
        load(*words, program=program, folder=tmp_path, **keys)
    for line in str(caught.value).splitlines():  # one for each part
        assert "known" in line and "this version does not have" in line and "unknown" not in line
    assert f"{refused}=" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("program", SECTIONS)
@pytest.mark.parametrize("source", FIELDS)
def test_every_field_of_others_at_its_default_is_accepted(tmp_path, program, source):
    needed = {"train.py": {"output_dir": "x"}, "export.py": {"export_dir": "x"}, "chat.py": {}}[program]
    fields = {key: value for key, value in FIELDS[source].items() if key not in ("output_dir", "export_dir")}
    assert len(fields) > (5 if "evaluation" in source else 100)
    loaded = load(program=program, folder=tmp_path, **needed, **fields)
    changed = {key for key, option in loaded.options.items() if loaded.values[key] != option.default}
    same = {
        "do_train",
        "optim",
        "upcast_layernorm",
        "gradient_checkpointing",
        "warmup_ratio",
        "pref_ftx",
        "seed",
        "enable_thinking",  # LLaMA-Factory's true; here none, the template's own way
    }
    assert changed - {*needed, *same} <= {"per_device_train_batch_size"}  # of the evaluation's arguments


@pytest.mark.parametrize("source", FIELDS)
def test_every_field_of_others_at_its_default_is_accepted_as_a_word(source):
    for key, value in FIELDS[source].items():
        text = "null" if value is None else ",".join(value) if isinstance(value, list) else str(value)
        load(f"{key}={text}", *([] if key == "output_dir" and value else ["output_dir=x"]))


# One by one


def test_steps_may_be_shares_of_the_run():
    options = train("save_steps=0.5 eval_steps=0.25 logging_steps=0.3 eval_strategy=steps val_size=1")
    due = [options[TrainOptions].what_is_due(step, 7, None) for step in range(1, 8)]
    every = [[step for step, flags in enumerate(due, 1) if flags[kind]] for kind in range(3)]
    # transformers rounds up: 0.3 * 7 -> 3, 0.25 * 7 -> 2, 0.5 * 7 -> 4
    assert [step for step in every[0] if step < 7] == [3, 6] and 7 in every[0]
    assert {2, 4, 6} <= set(every[1]) and {4, 7} == set(every[2])
    for wrong in ("save_steps=1.5", "eval_steps=0", "logging_steps=-0.1", "save_steps=inf"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            train(wrong)
    best = "load_best_model_at_end=true eval_strategy=steps val_size=1 "
    train(best + "save_steps=0.5 eval_steps=0.25")
    for wrong in ("save_steps=0.5 eval_steps=0.2", "save_steps=0.5 eval_steps=10"):
        with pytest.raises(UserError, match="save_steps: .*multiple"):
            train(best + wrong)


def test_logging_strategy_says_when_a_line_is_logged():
    by_epoch = train("logging_strategy=epoch logging_steps=1")[TrainOptions]
    assert [by_epoch.what_is_due(step, 6, 2)[0] for step in range(1, 7)] == [False, True] * 3
    never = train("logging_strategy=no logging_steps=1")[TrainOptions]
    assert [never.what_is_due(step, 3, None)[0] for step in range(1, 4)] == [False, False, True]


def test_warmup_steps_beat_warmup_ratio_and_that_is_said():
    loaded = train("warmup_steps=20 warmup_ratio=0.5")
    assert warmup_length(loaded[OptimOptions], 100) == 20
    assert "warmup_steps=20 does not use warmup_ratio" in make_stage.notices(loaded)
    assert warmup_length(train("warmup_steps=0 warmup_ratio=0.5")[OptimOptions], 100) == 50
    assert warmup_length(train("warmup_ratio=null")[OptimOptions], 100) == 0


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("flash_attn=true", "auto"),
        ("flash_attn=True", "auto"),
        ("flash_attn=false", "disabled"),
        ("flash_attn=off", "disabled"),
        ("--flash_attn", "auto"),
        ("--flash_attn fa2", "fa2"),
        ("--flash_attn --bf16 true", "auto"),
        ("flash_attn=flash_attention2", "fa2"),
    ],
)
def test_flash_attn_may_be_a_truth_or_a_bare_flag(words, value):
    assert train(words).values["flash_attn"] == value


def test_max_length_is_of_the_examples_unless_it_stands_among_llama_factorys_keys(tmp_path):
    swift = load("output_dir=x", "model_id_or_path=m", "sft_type=lora", "max_length=77")
    assert swift.values["cutoff_len"] == 77
    for keys in ({"stage": "sft"}, {"cutoff_len": 64}, {"finetuning_type": "lora"}):
        loaded = load("output_dir=x", folder=tmp_path, max_length=512, **keys)
        assert loaded.values["cutoff_len"] == keys.get("cutoff_len", 2048)
        assert any("max_length=512" in notice for notice in loaded.notices)
        loaded = load("output_dir=x", "max_length=512", folder=tmp_path, **keys)  # beside such a file
        assert loaded.values["cutoff_len"] == keys.get("cutoff_len", 2048)
    assert "max_length=512" in load("max_length=512", program="chat.py").notices[0]


def test_templates_of_swift_are_not_taken_for_llama_factorys():
    assert train("template_type=qwen").values["template"] == "qwen"
    assert train("template_type=AUTO").values["template"] is None
    with pytest.raises(UserError, match=r"template_type=default .*### Human.*template=default"):
        train("template_type=default")
    assert train("template=default").values["template"] == "default"


@pytest.mark.parametrize(
    ("words", "device"),
    [("device_map=auto", "auto"), ("device_map=cpu", "cpu"), ("device_map=cuda:0", "cuda"),
     ('device_map={"":"cpu"}', None), ("use_cpu=true", "cpu"), ("no_cuda=false", "auto")],
)  # fmt: skip
def test_where_a_model_lies_is_mapped_and_named(tmp_path, words, device):
    if device is None:
        loaded = load("output_dir=x", folder=tmp_path, device_map={"": "cpu"})
        assert loaded.values["device"] == "cpu"
        return
    loaded = train(words)
    assert loaded.values["device"] == device
    assert any(words in notice for notice in loaded.notices)


@pytest.mark.parametrize(
    "word", ["device_map=balanced", "device_map=cuda:1", "max_memory_MB=4000", "skip_special_tokens=false"]
)
def test_what_cannot_be_mapped_is_refused_by_name(word):
    with pytest.raises(UserError, match=word.replace("=", ".")):
        train(word)


def test_max_memory_at_its_default_is_named():
    assert any("max_memory_MB=80000" in notice for notice in train("max_memory_MB=80000").notices)


def test_a_part_of_what_is_switched_off_is_accepted_and_named():
    loaded = train("push_to_hub=false hub_model_id=me/mine galore_rank=64 badam_mode=ratio fp8_backend=te")
    (notice,) = [line for line in loaded.notices if "a switch that is off" in line]
    assert all(key in notice for key in ("hub_model_id", "galore_rank", "badam_mode", "fp8_backend"))
    with pytest.raises(UserError, match=r"push_to_hub=true .*does not have pushing to a hub"):
        train("push_to_hub=true hub_model_id=me/mine")


def test_keys_that_this_finetuning_type_does_not_read_are_named():
    full = make_stage.notices(train("finetuning_type=full lora_rank=8 lora_target=q_proj"))
    assert full == ["finetuning_type=full does not use lora_rank, lora_target"]
    lora = make_stage.notices(train("freeze_trainable_layers=4 freeze_extra_modules=norm lora_rank=4"))
    assert lora == ["finetuning_type=lora does not use num_layer_trainable, freeze_extra_modules"]
    assert make_stage.notices(train("lora_rank=4 lora_alpha=8")) == []
    assert make_stage.notices(train("finetuning_type=freeze freeze_trainable_layers=1")) == []
    dpo = make_stage.notices(train("stage=dpo pref_loss=sigmoid simpo_gamma=0.7"))
    assert dpo == ["pref_loss=sigmoid does not use simpo_gamma"]


@pytest.mark.parametrize(
    ("words", "notice"),
    [
        ("max_steps=9 num_train_epochs=3", "max_steps=9 does not use num_train_epochs"),
        ("save_strategy=epoch save_steps=9", "save_strategy=epoch does not use save_steps"),
        ("save_strategy=no save_steps=9", "save_strategy=no does not use save_steps"),
        ("eval_steps=0.1", "evaluation_strategy=no does not use eval_steps"),
        ("eval_strategy=epoch eval_steps=5 val_size=2", "evaluation_strategy=epoch does not use eval_steps"),
        ("lr_scheduler_type=constant warmup_ratio=0.1 warmup_steps=5",
         "lr_scheduler_type=constant does not use warmup_steps, warmup_ratio"),
        ("val_size=0.1", "evaluation_strategy=no does not use val_size"),
        ("eval_dataset=e", "evaluation_strategy=no does not use eval_dataset"),
        ("predict_with_generate=true", "evaluation_strategy=no does not use predict_with_generate"),
        ("streaming=true max_steps=5 save_strategy=epoch",
         "streaming=true, whose epochs have no known end but the last update, does not use save_strategy"),
        ("max_steps=-1 num_train_epochs=3 save_steps=5 eval_steps=null", None),
        ("val_size=0.1 do_eval=true do_train=true", None),
        ("val_size=2 do_predict=true do_train=true predict_with_generate=true", None),
        ("lr_scheduler_type=constant_with_warmup warmup_steps=5", None),
        ("eval_strategy=steps eval_steps=2 val_size=2", None),
    ],
)  # fmt: skip
def test_what_another_option_switches_off_is_named(words, notice):
    assert make_stage.notices(train(words)) == ([] if notice is None else [notice])


@pytest.mark.parametrize(
    ("ranks", "words", "notices"),
    [
        (1, "parallel=fsdp", ["one process (torchrun starts more) does not use parallel"]),
        (1, "parallel=fsdp fsdp_reshard_after_forward=false",
         ["one process (torchrun starts more) does not use parallel, fsdp_reshard_after_forward"]),
        (1, "parallel=fsdp fsdp_offload=true", []),
        (1, "parallel=ddp", []),
        (2, "parallel=fsdp fsdp_reshard_after_forward=false", []),
        (2, "fsdp_reshard_after_forward=false", []),  # auto may be fsdp
        (2, "parallel=ddp fsdp_reshard_after_forward=false",
         ["parallel=ddp does not use fsdp_reshard_after_forward"]),
        (4, "parallel=fsdp dp_shard_size=2", ["parallel=fsdp does not use dp_shard_size"]),
        (4, "parallel=hsdp dp_shard_size=2 fsdp_reshard_after_forward=false", []),
        (2, "cp_mode=ring", ["cp_size=1 does not use cp_mode"]),
        (2, "cp_size=2 cp_mode=ring", []),
    ],
)  # fmt: skip
def test_what_does_nothing_on_so_many_ranks_is_named(ranks, words, notices):
    assert make_stage.notices(train(words), ranks) == notices


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("sft_packing=true", {"packing": True}),
        ("dev_ratio=0.1", {"val_size": 0.1}),
        ("resume_lora_training=true", {"create_new_adapter": False}),
        (
            "stage=dpo dpo_ref_model=a dpo_ref_model_checkpoint=b",
            {"ref_model": "a", "ref_model_adapters": ("b",)},
        ),
        ("max_grad_norm=null", {"max_grad_norm": None}),
        ("save_total_limit=0", {"save_total_limit": 0}),
    ],
)
def test_older_names_and_values_are_read(word, read):
    loaded = train(word)
    assert {key: loaded.values[key] for key in read} == read


def test_fields_that_the_trainer_had_before_are_accepted_at_their_defaults_alone(tmp_path):
    before = {"use_mps_device": False, "xpu_backend": None, "tpu_num_cores": None, "past_index": -1}
    before |= {"mp_parameters": "", "sharded_ddp": "", "fsdp_min_num_params": 0, "dispatch_batches": None}
    before |= {"split_batches": None, "push_to_hub_model_id": None, "push_to_hub_token": None}
    before |= {"ray_scope": "last", "include_inputs_for_metrics": False, "lora_bf16_mode": False}
    before |= {"loss_scale": "default", "lora_dtype": "AUTO", "padding_free": True, "ppo_logger": "wandb"}
    load("output_dir=x", folder=tmp_path, **before)
    for word in ("use_mps_device=true", "new_special_tokens=<a>", "loss_scale=react", "past_index=2"):
        with pytest.raises(UserError, match="known key, but this version does not have"):
            train(word)
    for word in ("save_strategy=best", "lr_scheduler_type=reduce_lr_on_plateau"):
        with pytest.raises(UserError, match="known, but this version does not have that part"):
            train(word)


def test_report_to_all_means_those_that_are_installed(monkeypatch):
    present = {"tensorboard", "mlflow"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in present else None)
    assert set(train("report_to=all")[TrainOptions].services) == present
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train("report_to=all")[TrainOptions].services == ()


def test_a_list_in_words_is_told_how_lists_are_written():
    with pytest.raises(UserError, match="'v_proj' on the command line .*lists are a,b"):
        train("--lora_target q_proj v_proj")


# accelerate's launcher


def test_accelerates_environment_is_read_as_keys_of_ours(monkeypatch, tmp_path):
    idle = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_USE_CPU": "False",
    }
    idle |= {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    for name, value in idle.items():
        monkeypatch.setenv(name, value)
    assert train("").notices == ()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    loaded = train("")
    read = {key: loaded.values[key] for key in ("bf16", "device", "torch_compile_backend")}
    assert read == {"bf16": True, "device": "cpu", "torch_compile_backend": "inductor"}
    assert loaded.values["gradient_accumulation_steps"] == 4 and loaded.origins["bf16"] == "environment"
    assert "ACCELERATE_MIXED_PRECISION=bf16 -> bf16=true" in loaded.notices[0]
    assert train("gradient_accumulation_steps=2 bf16=false").values["gradient_accumulation_steps"] == 2
    assert train("gradient_accumulation_steps=2 bf16=false").values["bf16"] is False
    load(program="chat.py")  # trains nothing


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true", "MEGATRON_LM_TP_DEGREE": "2"}, "Megatron"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "8-bit floating point"),
    ],
)
def test_what_accelerate_was_asked_for_and_is_not_here_is_refused_by_name(monkeypatch, variables, part):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        train("")
    (line,) = str(caught.value).splitlines()
    name, value = next(iter(variables.items()))
    assert f"{name}={value} (environment)" in line and part in line


@pytest.mark.parametrize(
    "variables",
    [
        {
            "FSDP_VERSION": "2",
            "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        },
        {"ACCELERATE_USE_FSDP": "false", "FSDP_OFFLOAD_PARAMS": "true"},
        {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
        {"MEGATRON_LM_TP_DEGREE": "2", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        {"ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"},
        {"ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL", "ACCELERATE_ALLOW_CP_STANDALONE": "true"},
    ],
)
def test_details_of_a_part_that_nothing_switches_on_ask_for_nothing(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert train("").notices == ()


def test_a_variable_of_accelerate_that_nobody_here_knows_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DISABLE_RICH", "1")
    assert train("").notices == ("not used by this script: ACCELERATE_DISABLE_RICH",)


def test_the_precision_of_the_options_beats_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    loaded = train("fp16=true")
    assert loaded.values["fp16"] and not loaded.values["bf16"]


# Messages that misled


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("use_dft_loss=true", "losses of LLaMA-Factory"),
        ("use_eaft_loss=true", "losses of LLaMA-Factory"),
        ("split_special_tokens=true", "splitting special tokens"),
        ("tool_format=llama3", "in another form"),
        ("ray_num_workers=4", "Ray"),
        ("use_swanlab=true", "SwanLab"),
    ],
)
def test_the_missing_part_is_named_for_what_it_is(word, part):
    with pytest.raises(UserError, match=f"{word} .*this version does not have .*{part}"):
        train(word)


def test_keys_of_one_missing_part_share_a_line():
    with pytest.raises(UserError) as caught:
        train("use_galore=true use_badam=true deepspeed_config=a.json lora_rnak=1")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and any("use_galore=true" in line and "use_badam=true" in line for line in lines)


def test_asft_alpha_is_known():
    assert any("asft_alpha" in notice for notice in train("asft_alpha=0.2").notices)


def test_help_and_rules_say_the_same_of_warmup():
    assert "beats" in train("").options["warmup_ratio"].help


# Ranges


@pytest.mark.parametrize(
    "word",
    ["seed=-1", "seed=4294967296", "data_seed=4294967296", "max_steps=-5", "max_steps=0", "max_steps=1e12",
     "num_train_epochs=-1", "num_train_epochs=inf", "num_train_epochs=1e300", "ddp_timeout=0",
     "ddp_timeout=1e15", "neftune_noise_alpha=-1", "gradient_accumulation_steps=1e12"],
)  # fmt: skip
def test_numbers_beyond_their_range_are_refused(word):
    with pytest.raises(UserError, match=f"^{word.split('=')[0]}: "):
        train(word)


def test_numbers_at_the_ends_of_their_range():
    train("seed=0 max_steps=-1 num_train_epochs=0.01 ddp_timeout=180000000")
    train("seed=4294967295 max_steps=1 num_train_epochs=0")

"""DeepSpeed's files, accelerate's environment and the trainer's fsdp become our keys, or are refused."""

import json
import math
from pathlib import Path

import pytest

from options import config
from options.errors import UserError
from training import setup

FILES = json.loads((Path(__file__).resolve().parents[1] / "fixtures/deepspeed_configs.json").read_text())
KEEPS = {"parallel": "fsdp", "fsdp_reshard_after_forward": False}
OFFLOAD = {"fsdp_offload": True}
SPREAD = (
    "parallel",
    "dp_shard_size",
    "fsdp_reshard_after_forward",
    "fsdp_offload",
    "tp_size",
    "cp_size",
    "cp_mode",
)


def train(*words: str):
    needed = ["output_dir=x", "model_name_or_path=m", "dataset=d"]
    return config.load([*needed, *words], setup.SECTIONS, program="train.py", description="")


def chosen(loaded) -> dict:
    return {key: loaded.values[key] for key in loaded.given & set(SPREAD)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ds_z0_config.json", {"parallel": "ddp"}),
        ("ds_z2_config.json", KEEPS),
        ("ds_z2_offload_config.json", KEEPS | OFFLOAD),
        ("ds_z2_autotp_config.json", KEEPS | {"tp_size": 2}),
        ("ds_z3_config.json", {"parallel": "fsdp"}),
        ("ds_z3_offload_config.json", {"parallel": "fsdp"} | OFFLOAD),
        ("ds_z3_fp8_config.json", {"parallel": "fsdp"} | OFFLOAD),
    ],
)
def test_files_of_llama_factory_as_path_and_as_content(tmp_path, monkeypatch, name, expected):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / name).write_text(json.dumps(FILES[name]))
    loaded = train(f"deepspeed={tmp_path / name}")
    assert chosen(loaded) == expected
    (notice,) = loaded.notices
    assert f"parallel={expected['parallel']}" in notice and "without effect: " in notice
    assert "contiguous_gradients" in notice  # what has no meaning here
    (tmp_path / "run.yaml").write_text(json.dumps({"deepspeed": FILES[name]}))
    assert chosen(train(str(tmp_path / "run.yaml"))) == expected
    assert chosen(train(f"deepspeed={json.dumps(FILES[name])}")) == expected


def of(**content) -> str:
    return f"deepspeed={json.dumps({'zero_optimization': {'stage': 3}} | content)}"


def test_numbers_of_a_file_are_taken_and_may_not_contradict(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    content = {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True}}
    content |= {"gradient_accumulation_steps": 2, "train_batch_size": 24}
    content["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.8, 0.99], "eps": "auto"}}
    content["scheduler"] = {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": 7, "total_num_steps": "auto"},
    }
    values = train(of(**content)).values
    keys = (
        "max_grad_norm per_device_train_batch_size bf16 gradient_accumulation_steps learning_rate adam_beta1"
    )
    assert [values[key] for key in keys.split()] == [0.5, 3, True, 2, 3e-4, 0.8]
    assert (values["adam_beta2"], values["lr_scheduler_type"], values["warmup_steps"]) == (0.99, "linear", 7)
    assert train(of(gradient_clipping=0.5), "max_grad_norm=0.5").values["max_grad_norm"] == 0.5
    for word, of_file in [
        ("batch_size=2", {"train_micro_batch_size_per_gpu": 3}),
        ("bf16=false", {"bf16": {"enabled": True}}),
        ("fp16=true", {"fp16": {"enabled": False}}),
        ("gradient_accumulation_steps=4", {"gradient_accumulation_steps": 2}),
        ("max_grad_norm=1.0", {"gradient_clipping": 2}),
        ("batch_size=2", {"train_batch_size": 6}),
    ]:
        name = next(iter(of_file))
        with pytest.raises(UserError, match=rf"{name}.*: .*set it to .auto"):
            train(of(**of_file), word)


def test_a_schedule_of_another_length_or_kind_is_not_passed_over():
    content = {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 90}}}
    assert train(of(**content), "max_steps=90").values["lr_scheduler_type"] == "linear"
    with pytest.raises(UserError, match="scheduler.params.total_num_steps: 90, but max_steps is 80"):
        train(of(**content), "max_steps=80")
    assert "its warm-up is linear, not logarithmic" in train(of(**content)).notices[0]
    content["scheduler"]["params"]["warmup_type"] = "linear"
    assert "logarithmic" not in train(of(**content)).notices[0]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.device: nvme",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 8}}, "mics_shard_size: MiCS is parallel=hsdp"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 4}}, "stage: 4 is not 0 to 3"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp.enabled"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type: OneBitAdam"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation.stage: unknown"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode: False, but weight"),
        ({"optimizer": {"params": {"bias_correction": False}}}, "bias_correction: False, but moments"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(content, named):
    with pytest.raises(UserError, match=named):
        train(of(**content))


def test_a_file_that_is_not_there_and_presets_of_swift():
    with pytest.raises(UserError, match=r"deepspeed=no.json .*there is no such file"):
        train("deepspeed=no.json")
    assert chosen(train("deepspeed=zero3_offload")) == {"parallel": "fsdp"} | OFFLOAD
    assert chosen(train("deepspeed=zero2")) == KEEPS
    assert chosen(train("deepspeed=null")) == {}


PLAIN = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
PLAIN |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "false"}
PLAIN |= {"FSDP_USE_ORIG_PARAMS": "true", "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_VERSION": "1"}
NODES = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
HYBRID = {"parallel": "hsdp", "dp_shard_size": 8}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, {"parallel": "fsdp"}),
        ({"FSDP_SHARDING_STRATEGY": "1", "FSDP_OFFLOAD_PARAMS": "true"}, {"parallel": "fsdp"} | OFFLOAD),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP", "FSDP_RESHARD_AFTER_FORWARD": "true"}, KEEPS),
        ({"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {"parallel": "ddp"}),
        ({"FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"}, KEEPS),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"parallel": "fsdp"}),  # of one node
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"} | NODES, HYBRID),
        (
            {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"} | NODES,
            HYBRID | {"fsdp_reshard_after_forward": False},
        ),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, KEEPS),
        ({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {"parallel": "fsdp"}),
        ({}, {"parallel": "fsdp"}),
    ],
)
def test_the_environment_of_accelerates_fsdp(monkeypatch, variables, expected):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | PLAIN | variables).items():
        monkeypatch.setenv(name, value)
    loaded = train()
    assert chosen(loaded) == expected
    assert loaded.origins["parallel"] == "environment"
    (notice,) = loaded.notices
    assert notice.startswith("read as: ACCELERATE_USE_FSDP -> parallel=") and "state_dict_type" in notice
    assert (
        chosen(train("parallel=ddp", "fsdp_reshard_after_forward=true", "fsdp_offload=false"))["parallel"]
        == "ddp"
    )


def test_activation_checkpointing_of_fsdp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    assert train().values["gradient_checkpointing"] is True


def test_variables_of_what_is_off_are_not_read(monkeypatch):
    monkeypatch.setenv("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert train().notices == ()


def test_the_environment_of_accelerates_deepspeed(monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(FILES["ds_z3_config.json"]))
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    variables |= {
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
        "ACCELERATE_GRADIENT_CLIPPING": "0.7",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    loaded = train()
    assert chosen(loaded) == KEEPS | OFFLOAD and loaded.values["max_grad_norm"] == 0.7
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert chosen(train()) == {"parallel": "fsdp"}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"DP_REPLICATE_SIZE": 2, "DP_SHARD_SIZE": 4}, {"parallel": "hsdp", "dp_shard_size": 4}),
        ({"DP_SHARD_SIZE": 4, "TP_SIZE": 2}, {"parallel": "fsdp", "tp_size": 2}),
        ({"DP_REPLICATE_SIZE": 2, "CP_SIZE": 2},
         {"parallel": "hsdp", "dp_shard_size": 2, "cp_size": 2, "cp_mode": "ring"}),
        ({"SP_SIZE": 4}, {"parallel": "fsdp", "cp_size": 4}),
        ({"DP_REPLICATE_SIZE": 8}, {"parallel": "ddp"}),
    ],
)  # fmt: skip
def test_the_environment_of_accelerates_sizes(monkeypatch, sizes, expected):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # which leaves the sizes to the other
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", str(size))
    assert chosen(train()) == expected
    product = math.prod(sizes.values())
    monkeypatch.setenv("WORLD_SIZE", str(product))
    assert chosen(train()) == expected
    monkeypatch.setenv("WORLD_SIZE", str(2 * product))
    with pytest.raises(UserError, match=f"sizes make {product} ranks, and there are {2 * product}"):
        train()


def test_the_trainers_fsdp(tmp_path):
    settings = {"fsdp_reshard_after_forward": False, "cpu_ram_efficient_loading": True, "fsdp_version": 2}
    (tmp_path / "run.yaml").write_text(
        json.dumps({"fsdp": "full_shard auto_wrap offload", "fsdp_config": settings})
    )
    loaded = train(str(tmp_path / "run.yaml"))
    assert chosen(loaded) == KEEPS | OFFLOAD
    (notice,) = loaded.notices
    assert "auto_wrap" in notice and "cpu_ram_efficient_loading" in notice
    assert chosen(train("fsdp=shard_grad_op")) == KEEPS
    assert chosen(train("fsdp=true", 'fsdp_config={"cpu_offload": true}')) == {"parallel": "fsdp"} | OFFLOAD
    assert chosen(train("fsdp=")) == {} == chosen(train('fsdp_config={"min_num_params": 0}'))
    for word in ("fsdp=half_shard", 'fsdp_config={"xla": true}'):
        with pytest.raises(UserError, match=word.split("=")[0]):
            train("fsdp=full_shard", word)


def test_sizes_under_other_names_and_models_over_several_devices():
    assert chosen(train("sequence_parallel_size=4")) == {"cp_size": 4}
    assert chosen(train("tensor_parallel_size=2")) == {"tp_size": 2}
    assert train("ds3_gather_for_generation=false").values["gather_for_generation"] is False
    (notice,) = train("device_map=auto").notices
    assert "torchrun --nproc_per_node" in notice
    for word in ("device_map=balanced", "max_memory=20GB"):
        with pytest.raises(UserError, match="torchrun --nproc_per_node"):
            train(word)


@pytest.mark.parametrize(
    ("switch", "name", "value", "said"),
    [
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_TP_SIZE", "two", "tp_size: expected a"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "PARALLELISM_CONFIG_CP_SIZE", "0", "cp_size: 0 must be at"),
        ("ACCELERATE_USE_FSDP", "FSDP_SHARDING_STRATEGY", "12", "expected one of FULL_SHARD"),
        ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", "two", "expected a whole number"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_with_its_variable(monkeypatch, switch, name, value, said):
    monkeypatch.setenv(switch, "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{switch}.*{said}"):
        train()


@pytest.mark.parametrize("stage", ["two", [1], True, None, 4])
def test_a_stage_of_zero_that_is_none_is_refused(stage):
    with pytest.raises(UserError, match="zero_optimization.stage"):
        train(f"deepspeed={json.dumps({'zero_optimization': {'stage': stage}})}")

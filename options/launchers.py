"""What DeepSpeed's files, accelerate's environment and the Hugging Face trainer's `fsdp` mean here.

Each entry of CONVERTED is as those of aliases.py: function(raw value, all raw values beside it, keys of this
script) -> {our key: raw value}, as `Meant` where something is to be said besides. ZeRO 0 is ddp; ZeRO 1 and 2
and SHARD_GRAD_OP are fsdp that gathers weights once for each update; ZeRO 3 and FULL_SHARD are
fsdp. What only tells another engine how to work (buckets, prefetching, wrapping) is named and left out; what
would change numbers or places and cannot be had is refused by its name.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import wraps
from pathlib import Path

from options import json_reader
from options.errors import UserError, located, refuse
from options.values import Plain, convert, convert_scalar, truth_word, untyped


class Meant(dict):
    """Our keys and raw values, and a word about what has none."""

    def __init__(self, found: Mapping[str, object], note: str = ""):
        super().__init__(found)
        self.note = note


FULL = {"parallel": Plain("fsdp")}
KEEPS = FULL | {"fsdp_reshard_after_forward": Plain("false")}
STAGES = {0: {"parallel": Plain("ddp")}, 1: KEEPS, 2: KEEPS, 3: FULL}  # of ZeRO
# accelerate's names, in the order of their numbers there
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
TORCHRUN = (
    "several GPUs are several processes here: torchrun --nproc_per_node GPUS train.py ... parallel=fsdp"
)
# swift's --deepspeed zero2 and its like
PRESETS = {f"zero{stage}": {"stage": stage} for stage in range(4)}
PRESETS |= {f"zero{n}_offload": {"stage": n, "offload_optimizer": {"device": "cpu"}} for n in (2, 3)}
PRESETS["zero3_offload"]["offload_param"] = {"device": "cpu"}

# patterns of SECTION.KEY in a DeepSpeed file that say how its engine works, not what it computes
OF_THE_ENGINE = """
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer steps_per_print wall_clock_breakdown
    dump_state memory_breakdown prescale_gradients gradient_predivide_factor sparse_gradients
    communication_data_type seq_parallel_communication_data_type data_types.* comms_config.*
    comms_logger.* monitor_config.* tensorboard.* wandb.* csv_monitor.* flops_profiler.*
    activation_checkpointing.* aio.* checkpoint.* compile.* disable_allgather fp32_allreduce
    fp16.loss_scale_window fp16.initial_scale_power fp16.hysteresis fp16.min_loss_scale
    fp16.consecutive_hysteresis fp16.auto_cast fp16.fp16_master_weights_and_grads
    bf16.immediate_grad_update bf16.check_grad_overflow zero_optimization.*bucket*
    zero_optimization.allgather_partitions zero_optimization.overlap_comm
    zero_optimization.reduce_scatter zero_optimization.contiguous_gradients
    zero_optimization.round_robin_gradients zero_optimization.sub_group_size zero_optimization.stage3_*
    zero_optimization.gather_16bit_weights_on_model_save zero_optimization.load_from_fp32_weights
    zero_optimization.elastic_checkpoint zero_optimization.ignore_unused_parameters
    zero_optimization.pipeline_loading_checkpoint zero_optimization.legacy_stage1
    zero_optimization.memory_efficient_linear zero_optimization.use_multi_rank_bucket_allreduce
    zero_optimization.override_module_apply zero_optimization.log_trace_cache_warnings
    zero_optimization.leaf_module zero_optimization.*.pin_memory zero_optimization.*.buffer_*
    zero_optimization.*.pipeline_* zero_optimization.*.max_in_cpu zero_optimization.*.ratio
    zero_optimization.*.fast_init zero_optimization.*.nvme_path tensor_parallel.tp_grain_size
    tensor_parallel.tp.* tensor_parallel.keep_module_on_host scheduler.params.total_num_steps
    scheduler.params.warmup_type scheduler.params.last_batch_iteration optimizer.params.torch_adam
    optimizer.params.fp32_optimizer_states
"""
# SECTION.KEY -> our key, where the value means the same; "auto" is what is set here
NUMBERS = {
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "bf16.enabled": "bf16",
    "bfloat16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "tensor_parallel.autotp_size": "tp_size",
    "sequence_parallel_size": "cp_size",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
}
SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
DEVICES = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")
DEVICES += ("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_params")  # as DeepSpeed 0.3 wrote
# SECTION.KEY -> what cannot be had, and what can; refused unless off
REFUSED = {
    "zero_optimization.mics_*": "MiCS is parallel=hsdp with dp_shard_size here; set these and drop it",
    "zero_optimization.zero_hpz_partition_size": "a second copy of shares on each node is not built; drop it",
    "zero_optimization.zero_quantized_*": "weights and gradients travel as they are; drop it",
    "zero_optimization.zeropp_loco_param": "gradients travel as they are; drop it",
    "pipeline.*": "stages of a pipeline are not built; use parallel=fsdp or tp_size",
    "moe.*": "mixtures of experts do not train here; drop it",
    "amp.*": "apex is not used; set bf16=true or fp16=true",
    "torch_autocast.*": "there is no autocast; set bf16=true or fp16=true",
    "fp16.loss_scale": "the loss scale is always dynamic; set it to 0",
    "sparse_attention.*": "attention is exact; drop it",
    "compression_training.*": "it is not built; quantise with quantization_bit, and drop it",
    "curriculum_learning.*": "the order of the data is random; drop it",
    "data_efficiency.*": "the order of the data is random; drop it",
    "progressive_layer_drop.*": "all layers run; drop it",
    "elasticity.*": "the batch is what the options say; drop it",
    "autotuning.*": "nothing is tuned by trials; plan=true says what fits; drop it",
    "hybrid_engine.*": "rollouts are written by the model that trains; drop it",
    "scheduler.params.warmup_min_lr": "a warm-up starts at 0; drop it",
    "scheduler.params.cos_min_ratio": "set lr_scheduler_type=cosine_with_min_lr in its place",
    "scheduler.params.warmup_min_ratio": "a warm-up starts at 0; drop it",
}
# SECTION.KEY -> what is always so; refused if off
ALWAYS = {
    "optimizer.params.adam_w_mode": "weight decay is AdamW's; drop it",
    "optimizer.params.bias_correction": "moments are corrected for their start; drop it",
}


def _matches(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _is_off(raw: object) -> bool:
    return raw in (None, "", {}, []) or str(raw).lower() in ("null", "none", "false", "no")


def _where_on(converter: Callable) -> Callable:
    """Nothing where the key is off; a program that trains nothing does not open what it names."""

    @wraps(converter)
    def converted(raw, given, keys):
        if _is_off(raw):
            return {}
        return converter(raw, given, keys) if "parallel" in keys else {"parallel": Plain("auto")}

    return converted


@_where_on
def _deepspeed(raw, given, keys):
    """A file, its content as keys and values or as JSON, or the name of one of swift's files."""
    path = Path(str(raw)).expanduser()
    if isinstance(raw, dict):
        content = untyped(raw)
    elif str(raw) in PRESETS and not path.exists():
        content = {"zero_optimization": PRESETS[str(raw)]}
    elif str(raw).lstrip().startswith("{"):
        content = json_reader.parse(str(raw), "the JSON")
    else:
        refuse(not path.is_file(), f"there is no such file (looked in {Path.cwd()})")
        content = json_reader.read(path)
    return _meaning(content, given, keys)


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = [_flat(part, f"{prefix}.{name}" if prefix else str(name)) for name, part in value.items()]
    return {name: part for each in parts for name, part in each.items()}


def _meaning(content: dict, given: Mapping, keys: Mapping) -> Meant:
    """A DeepSpeed configuration as our keys. UserError names what cannot be honoured."""
    values, found, idle = _flat(content), {}, []
    values = {name: value for name, value in values.items() if not name.startswith("_")}  # remarks
    stage = values.pop("zero_optimization.stage", 0)
    refuse(type(stage) is not int or stage not in STAGES, f"zero_optimization.stage: {stage} is not 0 to 3")
    found |= STAGES[stage]
    total = values.pop("train_batch_size", "auto")
    kind, schedule = values.pop("optimizer.type", "AdamW"), values.pop("scheduler.type", None)
    refuse(kind not in ("Adam", "AdamW"), f"optimizer.type: {kind} is not AdamW; drop it, and set optim")
    refuse(
        schedule not in (None, *SCHEDULERS),
        f"scheduler.type: {schedule} is not one of {', '.join(SCHEDULERS)}",
    )
    if schedule is not None:
        _set(found, "scheduler.type", "lr_scheduler_type", SCHEDULERS[schedule], given, keys)
    for name, value in values.items():
        if name in NUMBERS:
            if str(value).lower() != "auto":
                _set(found, name, NUMBERS[name], value, given, keys)
        elif name == "optimizer.params.betas":
            for ours, beta in zip(("adam_beta1", "adam_beta2"), value if isinstance(value, list) else ()):
                _set(found, name, ours, beta, given, keys)
        elif name in DEVICES:
            place = str(value).lower()
            refuse(place not in ("none", "null", "false", "true", "cpu"),
                   f"{name}: {value}; shares wait in host memory or not at all, set cpu or none")  # fmt: skip
            if place in ("cpu", "true"):
                found["fsdp_offload"] = Plain("true")
        elif name in ALWAYS:
            refuse(str(value).lower() not in ("true", "auto"), f"{name}: {value}, but {ALWAYS[name]}")
        elif pattern := _matches(name, REFUSED):
            of_one = value == 1 and name.endswith(("size", "stages"))
            off = of_one or value in (None, False, 0, -1, "auto", "none", [], {})
            refuse(not off and _enabled(name, values), f"{name}: {REFUSED[pattern]}")
            idle.append(name)
        else:
            refuse(
                not _matches(name, OF_THE_ENGINE.split()),
                f"{name}: unknown; remove it, or name what it should do",
            )
            idle.append(name)
    if str(total).lower() != "auto":
        _check_total(total, found, given, keys)
    steps, ours = values.get("scheduler.params.total_num_steps", "auto"), _beside("max_steps", given, keys)
    other = str(steps).lower() != "auto" and ours not in (None, -1, steps)
    refuse(other, f'scheduler.params.total_num_steps: {steps}, but max_steps is {ours}; set it to "auto"')
    note = f"without effect: {', '.join(dict.fromkeys(n.rpartition('.')[2] for n in idle))}" * bool(idle)
    logarithmic = schedule and values.get("scheduler.params.warmup_type", "log") == "log"
    warms_up = "; ".join(filter(None, [note, "its warm-up is linear, not logarithmic" * bool(logarithmic)]))
    return Meant(found, warms_up)


def _enabled(name: str, values: Mapping[str, object]) -> bool:
    """Whether the section of this key is not switched off as a whole."""
    return values.get(f"{name.partition('.')[0]}.enabled") is not False


def _typed(key: str, raw: object, keys: Mapping) -> object:
    text = truth_word(raw) if isinstance(raw, bool) else raw
    return convert(Plain(text) if isinstance(text, int | float) else text, keys[key].kind)


def _beside(key: str, given: Mapping, keys: Mapping) -> object:
    """The value that one of the key's names has beside this one; None without."""
    named = [name for name in (key, *keys[key].also) if name in given]
    return _typed(key, given[named[-1]], keys) if named else None


def _set(found: dict, name: str, key: str, value: object, given: Mapping, keys: Mapping) -> None:
    """found[key] = value of `name`. UserError where it is no value of that key, or contradicts another."""
    try:
        typed = _typed(key, value, keys)
    except UserError as error:
        raise UserError(f"{name}: {value}: {error}") from error
    other = _beside(key, given, keys)
    told = str(value).lower() if isinstance(value, bool) else value
    contradicts = f'{name}: {told}, but {key} is {str(other).lower()}; set it to "auto", or make both equal'
    refuse(other is not None and other != typed, contradicts)
    if other is None and (typed is not False or keys[key].default is not False):
        found[key] = truth_word(value) if isinstance(value, bool) else Plain(value)


def _check_total(total: object, found: dict, given: Mapping, keys: Mapping) -> None:
    """UserError where train_batch_size is not what the options and the ranks make."""

    def size(key: str) -> int:
        other = _beside(key, given, keys)
        return int(found.get(key, keys[key].default if other is None else other))

    together = max(1, size("tp_size") * size("cp_size"))  # the section says what is wrong with 0
    ranks = int(os.environ.get("WORLD_SIZE", 1)) // together
    micro, steps = size("per_device_train_batch_size"), size("gradient_accumulation_steps")
    made = f"per_device_train_batch_size {micro} * gradient_accumulation_steps {steps} * {ranks} ranks"
    refuse(total != micro * steps * ranks, f'train_batch_size: {total} is not {made}; set it to "auto"')


def _zero_stage(raw, given, keys):
    stage = convert_scalar(raw, int)
    refuse(stage not in STAGES, "expected 0 to 3")
    return STAGES[stage] if "parallel" in keys else {"parallel": raw}


def _of_accelerate(variables, given, keys):
    """ACCELERATE_USE_DEEPSPEED, with accelerate's variables for it."""
    variables = variables if isinstance(variables, dict) else {}  # a bare switch
    values = {name.removeprefix("ACCELERATE_DEEPSPEED_"): value for name, value in variables.items()}
    file = values.get("CONFIG_FILE", "none")
    if file.lower() != "none":
        return _deepspeed(Plain(file), given, keys)
    content = {"stage": convert_scalar(values.get("ZERO_STAGE", "2"), int)}
    for part in ("optimizer", "param"):
        content[f"offload_{part}"] = {"device": values.get(f"OFFLOAD_{part.upper()}_DEVICE", "none")}
    clipping = values.get("ACCELERATE_GRADIENT_CLIPPING", "auto").replace("none", "auto")
    return _meaning({"zero_optimization": content, "gradient_clipping": clipping}, given, keys)


def _strategy(name: str) -> dict[str, Plain]:
    """One of STRATEGIES, or its number. A hybrid shares the weights within a node."""
    name = STRATEGIES[int(name) - 1] if name in tuple("12345") else name.upper()
    refuse(name not in STRATEGIES, f"expected one of {', '.join(STRATEGIES)}")
    if name == "NO_SHARD":
        return STAGES[0]
    found = KEEPS if name in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2") else FULL
    ranks, of_node = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if name.startswith("HYBRID") and 1 < of_node < ranks:
        return found | {"parallel": Plain("hsdp"), "dp_shard_size": Plain(of_node)}
    return found


IDLE_FSDP = """
    auto_wrap_policy transformer_layer_cls_to_wrap transformer_cls_to_wrap min_num_params
    backward_prefetch forward_prefetch limit_all_gathers use_orig_params sync_module_states
    cpu_ram_efficient_loading state_dict_type ignored_modules version activation_checkpointing_offload
"""
OFFLOADS = ("offload_params", "cpu_offload")  # accelerate's name, and that of transformers 5


def _fsdp_settings(settings: Mapping[str, object]) -> Meant:
    """Of accelerate's FSDP_* or of fsdp_config, both without `fsdp_` and in small letters."""
    found, idle = {}, []
    for name, raw in settings.items():
        if raw in (None, "") or str(raw).lower() in ("none", "null"):
            continue
        if name == "sharding_strategy":
            found |= _strategy(str(raw))
        elif name in IDLE_FSDP.split():
            idle.append(name)
        elif name not in ("reshard_after_forward", "activation_checkpointing", *OFFLOADS):
            refuse(name not in ("xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"), f"{name}: unknown; remove it")
            refuse(str(raw).lower() == "true", f"{name}: there is no XLA here; remove it")
        elif name == "reshard_after_forward" and str(raw).upper() in STRATEGIES:  # of version 1
            found |= _strategy(str(raw))
        elif name == "activation_checkpointing":
            found |= {"gradient_checkpointing": Plain("true")} if convert_scalar(str(raw), bool) else {}
        else:
            key = "fsdp_offload" if name in OFFLOADS else "fsdp_reshard_after_forward"
            if convert_scalar(str(raw), bool) != (name == "reshard_after_forward"):  # else it is the default
                found[key] = truth_word(name in OFFLOADS)
    return Meant(found, f"without effect: {', '.join(idle)}" * bool(idle))


def _fsdp_environment(variables, given, keys):
    """ACCELERATE_USE_FSDP, with accelerate's FSDP_*; version 2 has no strategy, version 1 no resharding."""
    variables = variables if isinstance(variables, dict) else {}  # a bare switch
    settings = {name.removeprefix("FSDP_").lower(): value for name, value in variables.items()}
    version = settings.get("version", "1")
    settings.pop("sharding_strategy" if version == "2" else "", None)
    if version != "2" and "sharding_strategy" in settings:
        settings.pop("reshard_after_forward", None)
    meant = _fsdp_settings(settings)
    sizes = {} if "ACCELERATE_USE_PARALLELISM_CONFIG" in given else FULL  # that one has the sizes
    kept = {key: value for key, value in meant.items() if sizes or key not in ("parallel", "dp_shard_size")}
    return Meant(sizes | kept, meant.note)


@_where_on
def _fsdp(raw, given, keys):
    """The Hugging Face trainer's: "full_shard auto_wrap offload", or true."""
    words = raw if isinstance(raw, list) else str(raw).replace(",", " ").split()
    found, words = dict(FULL), [str(word).lower() for word in words]
    for word in words:
        if word.upper() in STRATEGIES:
            found |= _strategy(word)
        elif word == "offload":
            found["fsdp_offload"] = Plain("true")
        else:
            known = (
                "full_shard, shard_grad_op, hybrid_shard, hybrid_shard_zero2, no_shard, offload, auto_wrap"
            )
            refuse(word not in ("auto_wrap", "true"), f"{word}: expected {known}")
    return Meant(found, "without effect: auto_wrap" * ("auto_wrap" in words))


@_where_on
def _fsdp_config(raw, given, keys):
    """Keys and values, or a JSON file of them; it counts where `fsdp` does."""
    if _is_off(given.get("fsdp")):
        return Meant({}, "fsdp is off")
    if isinstance(raw, str):
        text = raw.lstrip().startswith("{")
        refuse(not text and not Path(raw).is_file(), f"there is no such file (looked in {Path.cwd()})")
        raw = json_reader.parse(raw, "the JSON") if text else json_reader.read(Path(raw))
    refuse(not isinstance(raw, dict | None), "expected keys and values")
    return _fsdp_settings({name.removeprefix("fsdp_"): value for name, value in untyped(raw or {}).items()})


def _count(name: str, raw: object) -> int:
    """Ranks; absent is 1. UserError with the name."""
    with located(name):
        count = 1 if raw is None else convert_scalar(raw if isinstance(raw, str) else str(raw), int)
        refuse(count < 1, f"{count} must be at least 1")
    return count


@_where_on
def _parallelism(raw, given, keys):
    """accelerate's ParallelismConfig: its variables, or its fields."""
    refuse(not isinstance(raw, dict), "expected keys and values")
    names = {name.removeprefix("PARALLELISM_CONFIG_").lower(): value for name, value in raw.items()}
    sizes = ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    replicate, shard, tensor, ring, heads = (_count(name, names.pop(name, None)) for name in sizes)
    refuse(ring > 1 and heads > 1, "cp_size and sp_size: rows are divided once; keep one of them")
    idle = [name for name in names if name.startswith(("cp_", "sp_", "accelerate_"))]
    refuse(set(names) - set(idle), f"{', '.join(set(names) - set(idle))}: unknown; remove it")
    context = max(ring, heads)
    shard *= context  # weights are shared by the ranks that share a row, too
    ranks, asked = int(os.environ.get("WORLD_SIZE", 1)), replicate * shard * tensor
    refuse(1 not in (asked, ranks) and asked != ranks, f"sizes make {asked} ranks, and there are {ranks}")
    kind = "ddp" if shard == 1 else "fsdp" if replicate == 1 else "hsdp"
    found = {"parallel": Plain(kind)} | ({"dp_shard_size": Plain(shard)} if kind == "hsdp" else {})
    found |= {"tp_size": Plain(tensor)} if tensor > 1 else {}
    found |= {"cp_size": Plain(context)} if context > 1 else {}
    found |= {"cp_mode": Plain("ring")} if ring > 1 else {}
    return Meant(found, f"without effect: {', '.join(idle)}" * bool(idle))


@_where_on
def _dist_config(raw, given, keys):
    """LLaMA-Factory's v1: the name of an engine, and its file."""
    refuse(not isinstance(raw, dict), "expected keys and values")
    rest = dict(raw)
    name, file = str(rest.pop("name", "")).lower(), rest.pop("config_file", None)
    set_ = {key: rest.pop(key) for key in ("cp_size", "cp_mode", "dp_size") if key in rest}
    loads = rest.pop("dcp_path", None)
    refuse(str(loads or "null").lower() != "null", "dcp_path: name the folder as model_name_or_path")
    engine = name in ("", "fsdp2", "deepspeed")
    refuse(not engine, f"a known key, but this version does not have {name}; expected fsdp2 or deepspeed")
    refuse(rest, f"{', '.join(rest)}: not known here; drop it")
    if name == "deepspeed":
        return _deepspeed(file, given, keys)
    kept = {key: value for key, value in set_.items() if key != "dp_size"}
    return (FULL if name else {}) | kept


CONVERTED: dict[str, Callable] = {
    "deepspeed": _deepspeed,
    "zero_stage": _zero_stage,
    "fsdp": _fsdp,
    "fsdp_config": _fsdp_config,
    "parallelism_config": _parallelism,
    "dist_config": _dist_config,
    "ACCELERATE_USE_DEEPSPEED": _of_accelerate,
    "ACCELERATE_USE_FSDP": _fsdp_environment,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _parallelism,
}

"""What other systems call our keys and values, what of theirs is harmless here, and what is not built yet.

The other systems: LLaMA-Factory in several versions, the Hugging Face trainer, qlora, Efficient-Tuning-LLMs,
swift, peft. A key that a section of the script declares is never looked up here (see config.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from options import launchers
from options.errors import refuse
from options.launchers import TORCHRUN, Meant
from options.values import BOOLEANS, NULLS, Plain, convert_scalar, truth_word

# our key -> {value elsewhere: our value}; a value that our key's own choices list is never rewritten
RENAMED_VALUES = {
    "stage": {"reward": "rm"},
    "truncation_strategy": {"delete": "drop", "truncation_left": "left", "truncation_right": "right"},
    "lora_target": {"ALL": "all", "all-linear": "all"},
    "pref_loss": {"dpo": "sigmoid", "exo": "exo_pair", "bco": "bco_pair"},
    "evaluation_strategy": {"false": "no", "none": "no"},
    "save_strategy": {"false": "no", "none": "no"},
    "quantization_method": {"bnb": "bitsandbytes"},
    "infer_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    # true and false: LLaMA-Factory to 0.6, where the key is a bare flag; off: 0.7
    "flash_attn": {"eager": "disabled", "flash_attn": "auto"}
    | dict.fromkeys(("true", "yes", "on"), "auto")
    | dict.fromkeys(("false", "no", "off"), "disabled")
    | {f"flash_attention{line}{number}": f"fa{number}" for line in ("_", "") for number in (2, 3)},
    "optim": {"adamw_hf": "adamw_torch"},
}

# why a key has no effect here -> the keys (shell patterns); each is accepted and named once in config.notices
HARMLESS = {
    "no code from a hub is ever run": "trust_remote_code",
    "the tokenizer is always the fast one": "use_fast_tokenizer",
    "weights are always read tensor by tensor": "low_cpu_mem_usage offload_folder",
    "weights are always safetensors": "save_safetensors",
    "kernels are chosen by device and shape": """use_flash_attn use_unsloth use_unsloth_gc enable_liger_kernel
        use_liger_kernel liger_kernel_config use_v1_kernels kernel_config use_reentrant_gc
        gradient_checkpointing_kwargs activation_checkpointing_kwargs tf32 torch_compile
        torch_compile_backend torch_compile_mode torch_empty_cache_steps""",
    "losses are always computed in fp32": "upcast_lmhead_output",
    "there is no padding": "ignore_pad_token_for_loss dataloader_drop_last sortish_sampler padding_free",
    "generation always uses the cache and streams": "use_cache use_kv_cache use_streamer",
    "every evaluation set is evaluated by itself": "eval_on_each_dataset",
    "the model family is read from config.json": "model_type model_class tuner_backend",
    "what was trained is read from the folder": "finetuning_type",
    "nothing but an earlier result of its own is ever replaced": "overwrite_output_dir",
    "quantised layers compute in the dtype of the training": "bnb_4bit_comp_dtype bnb_4bit_compute_dtype",
    "codes are always stored as bytes": "bnb_4bit_quant_storage",
    "models are text only": """media_dir image_* video_* audio_sampling_rate use_audio_in_video
        crop_to_patches freeze_vision_tower freeze_multi_modal_projector freeze_language_model""",
    "read by export.py": """export_dir export_size export_device export_legacy_format export_hub_model_id
        export_quantization_bit export_quantization_dataset export_quantization_nsamples
        export_quantization_maxlen""",
    # whoever sets the switch itself is refused, see NOT_YET
    "it belongs to a switch that is off": """galore_* apollo_* badam_* pissa_iter pissa_convert oft_*
        module_dropout loraplus_lr_embedding asft_alpha eaft_alpha fp8_* kt_*
        fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params hyper_parallel_args
        vllm_* sglang_* hub_model_id hub_strategy push_hub_strategy hub_revision hub_private_repo
        hub_always_push push_to_hub_* swanlab_* trackio_* profiler_* profile_modules ray_init_kwargs
        master_addr master_port ACCELERATE_FP8_*""",
    "bookkeeping of another trainer": """overwrite_cache preprocessing_batch_size remove_unused_columns
        dataloader_* label_names length_column_name log_level log_level_replica log_on_each_node logging_dir
        logging_nan_inf_filter logging_first_step disable_tqdm skip_memory_metrics
        include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second
        include_for_metrics average_tokens_across_devices prediction_loss_only eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object batch_eval_metrics save_on_each_node bf16_full_eval
        fp16_full_eval fp16_backend fp16_opt_level half_precision_backend use_ipex jit_mode_eval ddp_*
        local_rank run_name project om_hub_token save_generation_config show_dataset_sample
        eval_human ignore_args_error load_from_local data_shared_file_system sample_backend init_config
        restore_callback_states_from_checkpoint batching_strategy ppo_logger
        add_version lazy_tokenize print_trainable_parameters
        ACCELERATE_DEBUG_MODE ACCELERATE_LOG_LEVEL ACCELERATE_CPU_AFFINITY ACCELERATE_ENABLE_RICH
        ACCELERATE_NUM_PROCESSES ACCELERATE_DEBUG_RDV_FILE ACCELERATE_BYPASS_DEVICE_MAP
        ACCELERATE_INIT_INCLUDE_BUFFERS ACCELERATE_CONFIG_DS_FIELDS ACCELERATE_TORCH_DEVICE""",
}

# part that this version does not have -> its keys (shell patterns), each with further values that switch it
# off; null, false, none, no and 0 always do. A default of the other systems is off too: files spell it out.
NOT_YET = {
    "8-bit floating point": "fp8",
    "GaLore, APOLLO, BAdam, Adam-mini and Muon": """use_galore use_apollo use_badam use_adam_mini use_muon
        optim_config""",
    "LoRA+, PiSSA and LoftQ": "loraplus_lr_ratio pissa_init loftq_* init_lora_weights=true lora_bias",
    "the DFT, ASFT and EAFT losses of LLaMA-Factory": "use_dft_loss use_asft_loss use_eaft_loss",
    "LLaMA Pro, mixture-of-depths and shifted attention": "use_llama_pro mixture_of_depths shift_attn",
    "mixture-of-experts training": "moe_aux_loss_coef router_aux_loss_coef",
    "growing the vocabulary": """resize_vocab add_tokens add_special_tokens new_special_tokens_config
        init_special_tokens=noise_init new_special_tokens""",
    "splitting special tokens of a text into letters (it reads them as tokens)": "split_special_tokens",
    "other settings of DeepSpeed and accelerate": "deepspeed_* accelerator_config",
    "Megatron": """use_mca pipeline_model_parallel_size=1 sequence_parallel
        expert_model_parallel_size=1 use_distributed_optimizer overlap_param_gather
        overlap_grad_reduce bias_activation_fusion apply_rope_fusion moe_grouped_gemm
        moe_token_dispatcher_type recompute_granularity mixed_precision use_packed_sequences
        export_hf_on_finish MEGATRON_LM_* ACCELERATE_USE_MEGATRON_LM""",
    "KTransformers": "use_kt",
    "hyper-parallel training": "use_hyper_parallel",
    "Ray": """ray_num_workers=1 ray_run_name ray_storage_path=./saves ray_storage_filesystem
        placement_strategy=pack resources_per_worker ray_scope=last""",
    "batches and data sets as LLaMA-Factory's v1 names them (dataset is read)": """train_dataset
        global_batch_size""",
    f"spreading one model over several devices ({TORCHRUN})": "quantization_device_map max_memory",
    "SageMaker and further settings of accelerate": """ACCELERATE_USE_SAGEMAKER ACCELERATE_SAGEMAKER_*
        ACCELERATE_DYNAMO_USE_* ACCELERATE_DOWNCAST_BF16
        ACCELERATE_ALLOW_CP_STANDALONE""",
    "other inference engines": "infer_backend=huggingface,hf,pt,auto",
    "merging inside the training run (export.py does it)": "merge_lora_and_save",
    "adapters by a folder's name alone (adapter_name_or_path takes its path)": "adapter_folder",
    "thoughts of earlier turns in the prompt": "preserve_thinking",
    "beam search and further samplers": """num_beams=1 num_beam_groups=1 penalty_alpha typical_p=1
        diversity_penalty length_penalty=1 min_new_tokens""",
    "benchmark evaluation and beams in prediction": """eval_num_beams=1 generation_max_length
        generation_num_beams=1 generation_config max_target_length compute_accuracy do_mmlu_eval
        mmlu_split=eval mmlu_dataset=mmlu-fs mmlu_source_max_len=2048 max_mmlu_samples sample_generate task
        task_dir=evaluation lang=en n_shot=5 save_dir download_mode=reuse_dataset_if_exists""",
    "tool calls in another form than the template's": "tool_format tools_prompt",
    "columns by dataset_format (describe them in dataset_info.json)": "dataset_format",
    "a limit for evaluation rows (use val_size)": "max_eval_samples val_dataset_sample=-1",
    "SwanLab": "use_swanlab",
    "torch's profiler": "enable_torch_profiler",
    "pushing to a hub from a training run (export.py does it)": "push_to_hub",
    "these switches of the Hugging Face trainer": """label_smoothing_factor auto_find_batch_size optim_args
        optim_target_modules full_determinism eval_delay eval_on_start ignore_data_skip disable_shuffling
        torchdynamo train_from_scratch early_stopping_steps debug use_mps_device sharded_ddp past_index=-1
        mp_parameters tpu_num_cores tpu_metrics_debug xpu_backend split_batches dispatch_batches
        include_inputs_for_metrics use_legacy_prediction_loop""",
    "trained weights of an adapter in bf16 beside others in fp32 (pure_bf16 has all in it)": "lora_bf16_mode",
    "these switches of swift": """loss_scale=default lora_dtype=auto check_dataset_strategy=none
        task_type=causal_lm train_dataset_mix_ratio lora_lr_ratio use_chat_template=true
        dataset_shuffle=true model_author model_name self_cognition_sample freeze_parameters*
        trainable_parameters* packing_length""",
}

# variables of accelerate -> the one that has to be on for them to be read ("": none); by itself a detail of a
# part asks for nothing, and shells and containers keep them
ENVIRONMENT = {
    **dict.fromkeys(("ACCELERATE_DEEPSPEED_*", "ACCELERATE_GRADIENT_CLIPPING"), "ACCELERATE_USE_DEEPSPEED"),
    "FSDP_*": "ACCELERATE_USE_FSDP",
    "MEGATRON_LM_*": "ACCELERATE_USE_MEGATRON_LM",
    **dict.fromkeys(("PARALLELISM_CONFIG_*", "ACCELERATE_ALLOW_CP_*"), "ACCELERATE_USE_PARALLELISM_CONFIG"),
    "ACCELERATE_DYNAMO_*": "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_SAGEMAKER_*": "ACCELERATE_USE_SAGEMAKER",
    "ACCELERATE_*": "",
}

# own key -> values that name such a part; anything else that is not a choice is a mistake
NOT_YET_VALUES = {
    "finetuning_type": "oft lisa longlora adalora ia3 llamapro qalora",
    "rope_scaling": "longrope ntk",
    "mix_strategy": "interleave_once",
    "save_strategy": "best",
    "lr_scheduler_type": "reduce_lr_on_plateau greedy",
    "optim": "adamw_apex_fused ademamix rmsprop adagrad galore_adamw lomo grokadamw schedule_free",
}


def lookup(table: Mapping[str, str], name: str) -> tuple[str | None, list[str]]:
    """-> the table's heading for this key and the values behind '=', or None and nothing."""
    for heading, words in table.items():
        for word in words.split():
            pattern, _, values = word.partition("=")
            if fnmatchcase(name, pattern):
                return heading, values.split(",")
    return None, []


def is_off(raw: object, off: list[str]) -> bool:
    """Whether this value switches the key off; `off`: values that do so besides null, false, none, no, 0."""
    text = "" if raw in (None, [], {}) else str(raw).lower()
    if text in ("", "false", "no", "off", *NULLS, *off):
        return True
    try:
        number = float(text)
    except ValueError:
        return False
    return number in (0, *(float(value) for value in off if re.fullmatch(r"[-+.\de]+", value)))


# Names whose meaning differs, one small function each
OF_LLAMA_FACTORY = ("stage", "finetuning_type", "cutoff_len", "dataset_dir", "adapter_name_or_path")


def _number(text: object) -> float:
    return convert_scalar(text, float)


def _truth(text: object) -> bool:
    return convert_scalar(text, bool)


def _precision(raw, given, keys):
    name = RENAMED_VALUES["infer_dtype"].get(str(raw).lower(), str(raw).lower())
    known = (*RENAMED_VALUES["infer_dtype"].values(), "auto")
    refuse(name not in known, "expected bf16, fp16, fp32 or auto")
    if "infer_dtype" in keys and "bf16" not in keys:  # chat and export have the one, training the other
        return {"infer_dtype": Plain(name)}
    if name == "auto":
        return {}
    return {"bf16": truth_word(name == "bfloat16"), "fp16": truth_word(name == "float16")}


def _source_and_target(raw, given, keys):
    # qlora cuts prompt (1024) and answer (256) apart; the sum is the same limit on the whole example
    total = _number(given.get("source_max_len", "1024")) + _number(given.get("target_max_len", "256"))
    return {"cutoff_len": Plain(f"{total:.0f}")}


def _sampling(raw, given, keys):
    known = raw in ("random", "sequential", "group_by_length")
    refuse(not known, "expected random, sequential or group_by_length")
    key = "disable_shuffling" if raw == "sequential" else "group_by_length"
    return {key: truth_word(raw != "random")}


def _negated(ours):  # a program without our key reads no value: another program's may be more than a truth
    return lambda raw, given, keys: {ours: truth_word(not _truth(raw)) if ours in keys else raw}


def _no_recomputation(raw, given, keys):  # false leaves the choice to memory
    return {"gradient_checkpointing": Plain("none")} if _truth(raw) else {}


def _max_length(raw, given, keys):
    """swift's and trl's longest example. In LLaMA-Factory a generated text with its prompt, which its
    max_new_tokens of 1024, always set, overrules."""
    if "cutoff_len" not in keys or not given.keys().isdisjoint(OF_LLAMA_FACTORY):
        return {}
    return {"cutoff_len": raw}


def _device_map(raw, given, keys):
    """One process, one device: what places the whole model there is its device. What spreads it over several
    has another launch in its place."""
    place = str(raw[""] if isinstance(raw, dict) and list(raw) == [""] else raw).lower()
    known = place in ("", "auto", "none", "null", "cpu", "cuda", "cuda:0", "0")
    refuse(not known, f"a process has one device, CUDA_VISIBLE_DEVICES says which; {TORCHRUN}")
    if place == "auto" and "bf16" in keys:
        return Meant({}, TORCHRUN)
    place = "cuda" if place in ("cuda:0", "0") else place
    return {"device": Plain(place)} if "device" in keys and place in ("cpu", "cuda") else {}


def _max_memory(raw, given, keys):
    number = _number(raw)
    default = number in (80000, 8000)  # of qlora and of Efficient-Tuning-LLMs
    refuse(not default, "this version places no part of a model elsewhere; remove the key")
    return {}


def _skip_special_tokens(raw, given, keys):
    refuse(not _truth(raw), "special tokens are never shown in a text; remove the key")
    return {}


def _swift_template(raw, given, keys):
    differs = "swift's template of that name begins with '### Human:', LLaMA-Factory's with 'Human: '"
    refuse(str(raw).lower() == "default", f"{differs}; write template=default for the latter")
    return {"template": None if str(raw).lower() == "auto" else raw}


def _nested(names):
    """A mapping of LLaMA-Factory's v1. names: of its keys that are called otherwise here. A program that
    trains nothing reads of it what it knows."""

    def flat(raw, given, keys):
        refuse(not isinstance(raw, dict | None), "expected keys and values")
        found = {names.get(key, key): value for key, value in (raw or {}).items()}
        return {key: value for key, value in found.items() if "lora_rank" in keys or key in keys}

    return flat


def _on_cpu(raw, given, keys):
    return {"device": Plain("cpu")} if _truth(raw) and "device" in keys else {}


def _mixed_precision(raw, given, keys):
    named = any(not is_off(given.get(key), []) for key in ("bf16", "fp16", "pure_bf16"))  # these count
    return {} if named or str(raw).lower() == "no" else {str(raw).lower(): Plain("true")}


def _compiled(key):  # accelerate names a backend in capitals, and NO for none
    return lambda raw, given, keys: {key: Plain(str(raw).lower())}


# key elsewhere -> function(raw value, all raw values beside it, keys of this script) -> {our key: raw value}
CONVERTED: dict[str, Callable[[object, Mapping, Iterable], dict[str, object]]] = {
    "bits": lambda raw, given, keys: {} if _number(raw) in (16, 32) else {"quantization_bit": raw},
    "load_in_4bit": lambda raw, given, keys: {"quantization_bit": Plain("4")} if _truth(raw) else {},
    "load_in_8bit": lambda raw, given, keys: {"quantization_bit": Plain("8")} if _truth(raw) else {},
    "full_finetune": lambda raw, given, keys: {"finetuning_type": Plain("full")} if _truth(raw) else {},
    "adam8bit": lambda raw, given, keys: {"optim": Plain("adamw_8bit")} if _truth(raw) else {},
    "dtype": _precision,
    "torch_dtype": _precision,
    "source_max_len": _source_and_target,
    "target_max_len": _source_and_target,
    "train_dataset_sample": lambda raw, given, keys: {} if _number(raw) < 0 else {"max_samples": raw},
    "gradient_checkpointing": _negated("disable_gradient_checkpointing"),
    "disable_gradient_checkpointing": _no_recomputation,
    "neat_packing": lambda raw, given, keys: {"packing": raw} if _truth(raw) else {},  # ours never leaks
    "train_sampling_strategy": _sampling,
    "resume_lora_training": _negated("create_new_adapter"),
    "max_length": _max_length,
    "device_map": _device_map,
    "max_memory_MB": _max_memory,
    "skip_special_tokens": _skip_special_tokens,
    "peft_config": _nested({"name": "finetuning_type", "r": "lora_rank", "target_modules": "lora_target"}),
    "quant_config": _nested({"name": "quantization_method"}),
    "template_type": _swift_template,
    **dict.fromkeys(("use_cpu", "no_cuda", "ACCELERATE_USE_CPU"), _on_cpu),
    "ACCELERATE_MIXED_PRECISION": _mixed_precision,
    "ACCELERATE_DYNAMO_BACKEND": _compiled("torch_compile_backend"),
    "ACCELERATE_DYNAMO_MODE": _compiled("torch_compile_mode"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": lambda raw, given, keys: {"gradient_accumulation_steps": raw},
    **launchers.CONVERTED,
    "use_auth_token": lambda raw, given, keys: {} if str(raw).lower() in BOOLEANS else {"hf_hub_token": raw},
}

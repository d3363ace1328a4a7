"""What other systems call our keys and values, what of theirs is harmless here, and what is not built yet.

The other systems: LLaMA-Factory in several versions, the Hugging Face trainer, qlora, Efficient-Tuning-LLMs,
swift, peft. A key that a section of the script declares is never looked up here (see config.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from options.errors import refuse
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
    "flash_attn": {"eager": "disabled", "flash_attn": "auto"}
    | {f"flash_attention_{number}": f"fa{number}" for number in (2, 3)},
    "optim": {"adamw_hf": "adamw_torch"},
}

# why a key has no effect here -> the keys (shell patterns); each is accepted and named once in config.notices
HARMLESS = {
    "no code from a hub is ever run": "trust_remote_code",
    "the tokenizer is always the fast one": "use_fast_tokenizer",
    "weights are always read tensor by tensor": "low_cpu_mem_usage offload_folder",
    "weights are always safetensors": "save_safetensors",
    "kernels are chosen by device and shape": """use_flash_attn use_unsloth use_unsloth_gc enable_liger_kernel
        use_liger_kernel liger_kernel_config use_v1_kernels use_reentrant_gc gradient_checkpointing_kwargs
        tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps""",
    "losses are always computed in fp32": "upcast_lmhead_output",
    "there is no padding": "ignore_pad_token_for_loss dataloader_drop_last",
    "generation always uses the cache and streams": "use_cache use_kv_cache use_streamer",
    "every evaluation set is evaluated by itself": "eval_on_each_dataset",
    "the model family is read from config.json": "model_type tuner_backend",
    "what was trained is read from the folder": "finetuning_type",
    "quantised layers compute in the dtype of the training": "bnb_4bit_comp_dtype bnb_4bit_compute_dtype",
    "codes are always stored as bytes": "bnb_4bit_quant_storage",
    "models are text only": """media_dir image_* video_* audio_sampling_rate use_audio_in_video
        crop_to_patches freeze_vision_tower freeze_multi_modal_projector freeze_language_model""",
    "bookkeeping of another trainer": """overwrite_cache preprocessing_batch_size remove_unused_columns
        dataloader_* label_names length_column_name log_level log_level_replica log_on_each_node logging_dir
        logging_nan_inf_filter logging_first_step disable_tqdm skip_memory_metrics
        include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second
        include_for_metrics average_tokens_across_devices prediction_loss_only eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object batch_eval_metrics save_on_each_node bf16_full_eval
        fp16_full_eval fp16_backend fp16_opt_level half_precision_backend use_ipex jit_mode_eval ddp_*
        local_rank run_name project om_hub_token save_generation_config test_oom_error show_dataset_sample
        eval_human ignore_args_error load_from_local hub_always_push""",
}

# part that this version does not have -> its keys (shell patterns), each with further values that switch it
# off; null, false, none, no and 0 always do. A default of the other systems is off too: files spell it out.
NOT_YET = {
    "8-bit floating point": "fp8 fp8_*=auto",
    "spreading a quantised model over several devices": "quantization_device_map",
    "GaLore, APOLLO, BAdam, Adam-mini and Muon": """use_galore galore_target=all galore_rank=16
        galore_update_interval=200 galore_scale=0.25,2 galore_proj_type=std galore_layerwise use_apollo
        apollo_target=all apollo_rank=16 apollo_update_interval=200 apollo_scale=32 apollo_proj=random
        apollo_proj_type=std apollo_scale_type=channel apollo_* use_badam badam_mode=layer
        badam_switch_mode=ascending badam_switch_interval=50 badam_switch_block_every=50
        badam_update_ratio=0.05 badam_mask_mode=adjacent badam_* use_adam_mini use_muon""",
    "LoRA+, PiSSA, LoftQ and OFT": """loraplus_lr_embedding=1e-6 loraplus_* pissa_init pissa_iter=16,-1
        pissa_convert loftq_* oft_block_size=32 oft_target=all oft_* module_dropout init_lora_weights=true
        lora_bias""",
    "LLaMA Pro, mixture-of-depths and shifted attention": "use_llama_pro mixture_of_depths shift_attn",
    "mixture-of-experts training": "moe_aux_loss_coef router_aux_loss_coef",
    "growing the vocabulary": """resize_vocab add_tokens add_special_tokens new_special_tokens_config
        init_special_tokens=noise_init split_special_tokens""",
    "DeepSpeed, FSDP and other sharded training": """deepspeed* fsdp fsdp_* zero_stage tensor_parallel_*
        sequence_parallel_size=1 use_mca use_kt kt_* ray_* accelerator_config parallelism_config""",
    "spreading one model over several devices": "device_map=auto max_memory max_memory_MB=80000,8000",
    "other inference engines": """infer_backend=huggingface,hf,pt,auto vllm_maxlen=2048,4096
        vllm_gpu_util=0.7,0.9 vllm_max_lora_rank=32 vllm_* sglang_*""",
    "merging inside the training run (export.py does it)": "merge_lora_and_save",
    "beam search and further samplers": """num_beams=1 num_beam_groups=1 penalty_alpha typical_p=1
        diversity_penalty length_penalty=1 min_new_tokens""",
    "benchmark evaluation and beams in prediction": """eval_num_beams=1 generation_max_length
        generation_num_beams=1 max_target_length compute_accuracy do_mmlu_eval mmlu_split=eval
        mmlu_dataset=mmlu-fs mmlu_source_max_len=2048 max_mmlu_samples sample_generate task
        task_dir=evaluation lang=en n_shot=5 save_dir download_mode""",
    "tool calls": "tool_format tools_prompt",
    "columns by dataset_format (describe them in dataset_info.json)": "dataset_format",
    "a limit for evaluation rows (use val_size)": "max_eval_samples val_dataset_sample=-1",
    "other monitors": "use_swanlab swanlab_project=llamafactory swanlab_mode=cloud swanlab_* trackio_*",
    "pushing to a hub from a training run": """push_to_hub hub_model_id hub_strategy=every_save,end
        push_hub_strategy hub_revision hub_private_repo=true""",
    "these switches of the Hugging Face trainer": """label_smoothing_factor auto_find_batch_size optim_args
        optim_target_modules full_determinism eval_delay eval_on_start ignore_data_skip disable_shuffling
        torchdynamo use_cpu no_cuda train_from_scratch use_dft_loss early_stopping_steps""",
}

# own key -> values that name such a part; anything else that is not a choice is a mistake
NOT_YET_VALUES = {
    "finetuning_type": "oft lisa longlora adalora ia3 llamapro qalora",
    "rope_scaling": "longrope ntk",
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
    "use_auth_token": lambda raw, given, keys: {} if str(raw).lower() in BOOLEANS else {"hf_hub_token": raw},
}

"""Options: flat keys, filled from YAML or JSON files and from the command line, typed by small dataclasses.

A library file declares its options as a frozen dataclass (Annotated help, Literal choices, checks in
__post_init__); a script lists the sections it wants and gets one read-only Config:

    config = config.load(sys.argv[1:], [ModelOptions, LoraOptions], program="train.py", description="Train.")
    config[LoraOptions].lora_rank; config.values["lora_rank"]; config.origins["lora_rank"]; config.save(path)

Accepted in any mix: FILE.yaml  --config FILE  key=value  --key value  --key=value  --flag. The command line
beats the files, a later file beats an earlier one. Keys are spelled as LLaMA-Factory and the Hugging Face
trainer spell them; the tables below hold what other systems call them, what is harmless and what is not built
yet. A key that a section declares is never looked up in these tables, so a new section needs no change here.
"""

import difflib
import inspect
import json
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType

import yaml

# Tables: names of other systems


# our key -> what qlora, Efficient-Tuning-LLMs, swift, peft and other LLaMA-Factory versions call it
RENAMED = {
    "model_name_or_path": "model_id_or_path model model_path base_model",
    "adapter_name_or_path": "ckpt_dir checkpoint_dir lora_model_name_or_path lora_weights adapters",
    "model_revision": "revision",
    "hf_hub_token": "hub_token",
    "flash_attn": "attn_impl attn_implementation",
    "template": "template_type prompt_template",
    "default_system": "system system_message system_prompt",
    "dataset": "dataset_name data_path",
    "eval_dataset": "val_dataset",
    "dataset_dir": "data_dir",
    "cutoff_len": "max_length model_max_length max_seq_length max_seq_len",
    "train_on_prompt": "train_on_source",
    "max_samples": "max_train_samples",
    "val_size": "dataset_test_ratio split_dataset_ratio eval_dataset_size",
    "data_seed": "dataset_split_seed dataset_seed",
    "mix_strategy": "mixing_strategy",
    "preprocessing_num_workers": "dataset_num_proc preprocess_num_proc",
    "finetuning_type": "sft_type train_type tuner_type",
    "lora_rank": "lora_r",
    "lora_dropout": "lora_dropout_p",
    "lora_target": "lora_target_modules target_modules",
    "additional_target": "modules_to_save lora_modules_to_save",
    "num_layer_trainable": "freeze_trainable_layers",
    "freeze_trainable_layers": "num_layer_trainable",
    "name_module_trainable": "freeze_trainable_modules",
    "freeze_trainable_modules": "name_module_trainable",
    "use_rslora": "use_rs_lora",
    "per_device_train_batch_size": "batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "eval_strategy": "evaluation_strategy",
    "evaluation_strategy": "eval_strategy",
    "save_only_model": "only_save_model",
    "lr_scheduler_type": "lr_scheduler",
    "neftune_noise_alpha": "neftune_alpha",
    "hub_strategy": "push_hub_strategy",
    "use_liger_kernel": "enable_liger_kernel",
    "enable_liger_kernel": "use_liger_kernel",
    "quantization_bit": "quant_bits",
    "quantization_method": "quant_method",
    "quantization_type": "quant_type bnb_4bit_quant_type",
    "double_quantization": "double_quant bnb_4bit_use_double_quant",
    "deepspeed": "deepspeed_config_path",
    "pref_beta": "dpo_beta orpo_beta kto_beta",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "pref_loss": "dpo_loss",
    "pref_ftx": "dpo_ftx kto_ftx rpo_alpha cpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
    "max_new_tokens": "max_completion_length",
    "badam_switch_interval": "badam_switch_block_every",
    "moe_aux_loss_coef": "router_aux_loss_coef",
}

# our key -> {value elsewhere: our value}; a value that our key's own choices list is never rewritten
RENAMED_VALUES = {
    "stage": {"reward": "rm"},
    "truncation_strategy": {"delete": "drop", "truncation_left": "left", "truncation_right": "right"},
    "lora_target": {"ALL": "all", "all-linear": "all"},
    "pref_loss": {"dpo": "sigmoid", "exo": "exo_pair", "bco": "bco_pair"},
    "eval_strategy": {"false": "no", "none": "no"},
    "save_strategy": {"false": "no", "none": "no"},
    "quantization_method": {"bnb": "bitsandbytes"},
    "infer_dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"},
    "flash_attn": {
        "eager": "disabled",
        "flash_attn": "auto",
        "flash_attention_2": "fa2",
        "flash_attention_3": "fa3",
    },
    "hub_strategy": {"push_best": "end", "push_last": "every_save"},
    "optim": {"adamw_hf": "adamw_torch"},
}

# why a key has no effect here -> the keys (shell patterns); each is accepted and named once in config.notices
HARMLESS = {
    "no code from a hub is ever run": "trust_remote_code",
    "the tokenizer is always the fast one": "use_fast_tokenizer",
    "weights are always read tensor by tensor": "low_cpu_mem_usage offload_folder",
    "weights are always safetensors": "save_safetensors",
    "kernels are chosen by device and shape": """
        use_flash_attn use_unsloth use_unsloth_gc enable_liger_kernel
        use_liger_kernel liger_kernel_config use_v1_kernels use_reentrant_gc
        gradient_checkpointing_kwargs tf32 torch_compile torch_compile_backend torch_compile_mode
        torch_empty_cache_steps""",
    "losses are always computed in fp32": "upcast_lmhead_output",
    "there is no padding": "ignore_pad_token_for_loss dataloader_drop_last",
    "generation always uses the cache and streams": "use_cache use_kv_cache use_streamer",
    "every evaluation set is evaluated by itself": "eval_on_each_dataset",
    "the model family is read from config.json": "model_type tuner_backend",
    "quantised layers compute in the dtype of the training": "bnb_4bit_comp_dtype bnb_4bit_compute_dtype",
    "codes are always stored as bytes": "bnb_4bit_quant_storage",
    "models are text only": """
        media_dir image_* video_* audio_sampling_rate use_audio_in_video crop_to_patches
        freeze_vision_tower freeze_multi_modal_projector freeze_language_model""",
    "bookkeeping of another trainer": """
        overwrite_cache preprocessing_batch_size remove_unused_columns dataloader_* label_names
        length_column_name log_level log_level_replica log_on_each_node logging_dir
        logging_nan_inf_filter logging_first_step disable_tqdm skip_memory_metrics
        include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second
        include_for_metrics average_tokens_across_devices prediction_loss_only eval_accumulation_steps
        eval_do_concat_batches eval_use_gather_object batch_eval_metrics save_on_each_node
        bf16_full_eval fp16_full_eval fp16_backend fp16_opt_level half_precision_backend use_ipex
        jit_mode_eval ddp_* local_rank run_name project om_hub_token print_param_status
        save_generation_config test_oom_error show_dataset_sample eval_human ignore_args_error
        load_from_local hub_always_push""",
}

# part that this version does not have -> its keys (shell patterns), each with further values that switch it
# off; null, false, none, no and 0 always do. A default of the other systems is off too: files spell it out.
NOT_YET = {
    "8-bit floating point": "fp8 fp8_*=auto",
    "spreading a quantised model over several devices": "quantization_device_map",
    "GaLore, APOLLO, BAdam, Adam-mini and Muon": """
        use_galore galore_target=all galore_rank=16 galore_update_interval=200 galore_scale=0.25,2
        galore_proj_type=std galore_layerwise use_apollo apollo_target=all apollo_rank=16
        apollo_update_interval=200 apollo_scale=32 apollo_proj=random apollo_proj_type=std
        apollo_scale_type=channel apollo_* use_badam badam_mode=layer badam_switch_mode=ascending
        badam_switch_interval=50 badam_update_ratio=0.05 badam_mask_mode=adjacent badam_* use_adam_mini
        use_muon""",
    "LoRA+, PiSSA, LoftQ and OFT": """
        loraplus_lr_embedding=1e-6 loraplus_* pissa_init pissa_iter=16,-1 pissa_convert loftq_*
        oft_block_size=32 oft_target=all oft_* module_dropout init_lora_weights=true lora_bias""",
    "LLaMA Pro, mixture-of-depths and shifted attention": "use_llama_pro mixture_of_depths shift_attn",
    "mixture-of-experts training": "moe_aux_loss_coef",
    "growing the vocabulary": """
        resize_vocab add_tokens add_special_tokens new_special_tokens_config
        init_special_tokens=noise_init split_special_tokens""",
    "DeepSpeed, FSDP and other sharded training": """
        deepspeed* fsdp fsdp_* zero_stage tensor_parallel_* sequence_parallel_size=1 use_mca use_kt kt_*
        ray_* accelerator_config parallelism_config""",
    "spreading one model over several devices": "device_map=auto max_memory max_memory_MB=80000,8000",
    "other inference engines": """
        infer_backend=huggingface,hf,pt,auto vllm_maxlen=2048,4096 vllm_gpu_util=0.7,0.9
        vllm_max_lora_rank=32 vllm_* sglang_*""",
    "merging inside the training run (export.py does it)": "merge_lora_and_save",
    "beam search and further samplers": """
        num_beams=1 num_beam_groups=1 penalty_alpha typical_p=1 diversity_penalty length_penalty=1
        min_new_tokens""",
    "benchmark evaluation and beams in prediction": """
        eval_num_beams=1 generation_max_length generation_num_beams=1
        max_target_length compute_accuracy do_mmlu_eval mmlu_split=eval mmlu_dataset=mmlu-fs
        mmlu_source_max_len=2048 max_mmlu_samples sample_generate task task_dir=evaluation lang=en
        n_shot=5 save_dir download_mode""",
    "tool calls": "tool_format tools_prompt",
    "columns by dataset_format (describe them in dataset_info.json)": "dataset_format",
    "a limit for evaluation rows (use val_size)": "max_eval_samples val_dataset_sample=-1",
    "other monitors": "use_swanlab swanlab_project=llamafactory swanlab_mode=cloud swanlab_* trackio_*",
    "pushing to a hub from a training run": """
        push_to_hub hub_model_id hub_strategy=every_save,end hub_private_repo=true hub_revision""",
    "these switches of the Hugging Face trainer": """
        label_smoothing_factor auto_find_batch_size optim_args optim_target_modules full_determinism
        eval_delay eval_on_start ignore_data_skip disable_shuffling torchdynamo use_cpu no_cuda
        train_from_scratch use_dft_loss early_stopping_steps""",
}

# own key -> values that name such a part; anything else that is not a choice is a mistake
NOT_YET_VALUES = {
    "finetuning_type": "oft lisa longlora adalora ia3 llamapro qalora",
    "rope_scaling": "longrope ntk",
    "optim": """
        adamw_apex_fused ademamix rmsprop adagrad galore_adamw lomo grokadamw
        schedule_free""",
}

# Tables: names whose meaning differs, one small function each


def _number(text: object) -> float:
    return _convert_scalar(text, float)


def _truth(text: object) -> bool:
    return _convert_scalar(text, bool)


def _word(truth: bool) -> "_Plain":
    return _Plain("true" if truth else "false")


def _precision(raw, given, keys):
    names = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16"}
    names |= {"fp32": "float32", "float32": "float32", "auto": "auto"}
    name = names.get(str(raw).lower())
    if name is None:
        raise ValueError("expected bf16, fp16, fp32 or auto")
    if "infer_dtype" in keys and "bf16" not in keys:  # chat and export have the one, training the other
        return {"infer_dtype": _Plain(name)}
    if name == "auto":
        return {}
    return {"bf16": _word(name == "bfloat16"), "fp16": _word(name == "float16")}


def _source_and_target(raw, given, keys):
    # qlora cuts prompt (1024) and answer (256) apart; the sum is the same limit on the whole example
    total = _number(given.get("source_max_len", "1024")) + _number(given.get("target_max_len", "256"))
    return {"cutoff_len": _Plain(f"{total:.0f}")}


def _sampling(raw, given, keys):
    if raw not in ("random", "sequential", "group_by_length"):
        raise ValueError("expected random, sequential or group_by_length")
    key = {"sequential": "disable_shuffling"}.get(str(raw), "group_by_length")
    return {key: _word(raw != "random")}


def _negated(ours):
    return lambda raw, given, keys: {ours: _word(not _truth(raw))}


def _no_recomputation(raw, given, keys):
    return {"gradient_checkpointing": _Plain("none")} if _truth(raw) else {}  # false leaves the choice to memory


# key elsewhere -> function(raw value, all raw values beside it, keys of this script) -> {our key: raw value}
CONVERTED: dict[str, Callable[[object, Mapping, Iterable], dict[str, object]]] = {
    "bits": lambda raw, given, keys: {} if _number(raw) in (16, 32) else {"quantization_bit": raw},
    "load_in_4bit": lambda raw, given, keys: {"quantization_bit": _Plain("4")} if _truth(raw) else {},
    "load_in_8bit": lambda raw, given, keys: {"quantization_bit": _Plain("8")} if _truth(raw) else {},
    "full_finetune": lambda raw, given, keys: {"finetuning_type": _Plain("full")} if _truth(raw) else {},
    "adam8bit": lambda raw, given, keys: {"optim": _Plain("adamw_8bit")} if _truth(raw) else {},
    "dtype": _precision,
    "torch_dtype": _precision,
    "source_max_len": _source_and_target,
    "target_max_len": _source_and_target,
    "train_dataset_sample": lambda raw, given, keys: {} if _number(raw) < 0 else {"max_samples": raw},
    "gradient_checkpointing": _negated("disable_gradient_checkpointing"),
    "disable_gradient_checkpointing": _no_recomputation,
    "neat_packing": lambda raw, given, keys: {"packing": raw} if _truth(raw) else {},  # ours never leaks
    "train_sampling_strategy": _sampling,
    "use_auth_token": lambda raw, given, keys: {} if str(raw).lower() in _BOOLEANS else {"hf_hub_token": raw},
}

# Table: options that exclude or need each other


def _off(strategy: object) -> bool:
    return strategy in (None, "no", False)


def _count(names: object) -> int:
    return len(names.split(",") if isinstance(names, str) else names or ())


def _trains(do_train: bool | None, do_eval: bool, do_predict: bool) -> bool:
    """As TrainOptions.trains."""
    return not (do_eval or do_predict) if do_train is None else do_train


def _quantised(bits: object) -> bool:
    """Whether quantization_bit asks for anything, as quant.from_options reads it."""
    return bits not in (None, 0, 16, 32)


# (predicate, what is wrong and the way out). A predicate's parameters are keys; it runs when all exist.
RULES: tuple[tuple[Callable[..., bool], str], ...] = (
    (lambda do_train, dataset, tokenized_path: do_train and not dataset and not tokenized_path,
     "there is nothing to train on; name a dataset"),
    (lambda streaming, max_steps: streaming and (max_steps or 0) <= 0,
     "a stream has no known end; set max_steps"),
    (lambda streaming, max_samples: streaming and max_samples is not None,
     "max_samples is for data sets that are read whole; use max_steps, or streaming=false"),
    (lambda stage, do_sample, do_train, do_eval, do_predict: stage == "grpo" and not do_sample
     and _trains(do_train, do_eval, do_predict),
     "the answers to one prompt would all be the same; set do_sample=true"),
    (lambda stage, do_sample, do_train, do_eval, do_predict: stage == "ppo" and not do_sample
     and _trains(do_train, do_eval, do_predict),
     "texts that are no samples of the policy cannot say how to change its probabilities; set do_sample=true"),
    (lambda stage, beta: stage != "grpo" and beta != 0,
     "beta is the KL weight of stage grpo; that of dpo, orpo and kto is pref_beta"),
    (lambda stage, loss_type: stage != "grpo" and loss_type != "dapo",
     "loss_type is of stage grpo; the loss of dpo is pref_loss"),
    (lambda streaming, val_size: streaming and 0 < val_size < 1,
     "a share of a stream is unknown; give val_size as a number of rows, or an eval_dataset"),
    (lambda streaming, group_by_length: streaming and group_by_length,
     "lengths in a stream are not known ahead; drop one of the two"),
    (lambda packing, group_by_length: packing and group_by_length,
     "packing fills rows by length already; drop group_by_length"),
    (lambda val_size, eval_dataset: val_size > 0 and bool(eval_dataset),
     "there would be two evaluation sets; drop val_size or eval_dataset"),
    (lambda val_size, dataset, tokenized_path: val_size > 0 and not dataset and not tokenized_path,
     "val_size is split off dataset, which is not given; name one, or drop val_size"),
    (lambda mask_history, train_on_prompt: mask_history and train_on_prompt,
     "one trains on less than the answers, the other on more; drop one of the two"),
    (lambda stage, train_on_prompt: train_on_prompt and stage not in ("pt", "sft"),
     "this stage trains on the answers only; drop train_on_prompt"),
    (lambda stage, mask_history: mask_history and stage not in ("pt", "sft"),
     "this stage trains on the last answer only anyway; drop mask_history"),
    (lambda interleave_probs, mix_strategy: bool(interleave_probs) and "interleave" not in mix_strategy,
     "probabilities need interleaving; set mix_strategy=interleave_under (or _over)"),
    (lambda interleave_probs, dataset: bool(interleave_probs and dataset)
     and _count(interleave_probs) != _count(dataset),
     "give one probability for each dataset"),
    (lambda reserved_label_len, cutoff_len: reserved_label_len >= cutoff_len,
     "reserved_label_len must be less than cutoff_len"),
    (lambda stage, neftune_noise_alpha: stage in ("ppo", "grpo") and bool(neftune_noise_alpha),
     "noise would change the probabilities that updates compare with those of the rollout; drop neftune_noise_alpha"),
    (lambda fp16, bf16: fp16 and bf16, "choose one precision"),
    (lambda fp16, pure_bf16: fp16 and pure_bf16, "choose one precision"),
    (lambda bf16, pure_bf16: bf16 and pure_bf16,
     "bf16 keeps trained weights in fp32, pure_bf16 does not; choose one"),
    (lambda use_dora, finetuning_type: use_dora and finetuning_type != "lora",
     "DoRA is a kind of LoRA; set finetuning_type=lora, or drop use_dora"),
    (lambda use_rslora, finetuning_type: use_rslora and finetuning_type != "lora",
     "rsLoRA is a kind of LoRA; set finetuning_type=lora, or drop use_rslora"),
    (lambda additional_target, finetuning_type: bool(additional_target) and finetuning_type != "lora",
     "additional_target is what LoRA trains besides adapters; set finetuning_type=lora, or drop it"),
    (lambda adapter_name_or_path, finetuning_type: bool(adapter_name_or_path) and finetuning_type != "lora",
     "only LoRA continues adapters; set finetuning_type=lora, or merge them first with export.py"),
    (lambda create_new_adapter, finetuning_type: create_new_adapter and finetuning_type != "lora",
     "only LoRA has adapters; set finetuning_type=lora, or drop create_new_adapter"),
    (lambda quantization_bit, finetuning_type: _quantised(quantization_bit) and finetuning_type != "lora",
     "quantised weights have no gradient, only adapters beside them train; set finetuning_type=lora, or drop "
     "quantization_bit"),
    (lambda quantization_bit, train_from_scratch: _quantised(quantization_bit) and train_from_scratch,
     "random weights would be frozen in few bits; drop one of the two"),
    (lambda quantization_bit, create_new_adapter: _quantised(quantization_bit) and create_new_adapter,
     "the given adapters would have to be merged into quantised weights; merge them with export.py first and train on "
     "the result"),
    # finetuning_type: for training alone, at inference several adapters lie beside quantised weights
    (lambda quantization_bit, adapter_name_or_path, finetuning_type: _quantised(quantization_bit)
     and _count(adapter_name_or_path) > 1,
     "all but the last adapter would have to be merged into quantised weights; give one, or merge them with export.py"),
    (lambda create_new_adapter, adapter_name_or_path: create_new_adapter and not adapter_name_or_path,
     "there is no adapter to put a new one on; name it in adapter_name_or_path, or drop create_new_adapter"),
    (lambda export_gguf_type, export_merge: export_gguf_type != "none" and export_merge in ("requantise", "loftq"),
     "a GGUF file has codes of its own, made from the dequantised merge; drop export_merge"),
    (lambda export_gguf_type, export_sample_text: export_gguf_type != "none" and bool(export_sample_text),
     "losses are measured on Hugging Face folders; import_gguf.py makes one from the file. Drop one of the two"),
    (lambda warmup_steps, warmup_ratio: (warmup_steps or 0) > 0 and (warmup_ratio or 0) > 0,
     "both say how long to warm up; drop one of the two"),
    (lambda do_eval, val_size, eval_dataset, tokenized_path: do_eval
     and not (val_size or eval_dataset or tokenized_path),
     "there is nothing to evaluate on; set val_size or eval_dataset"),
    (lambda do_predict, val_size, eval_dataset, tokenized_path: do_predict
     and not (val_size or eval_dataset or tokenized_path),
     "there is nothing to predict; set val_size or eval_dataset"),
    (lambda predict_with_generate, stage: predict_with_generate and stage in ("pt", "rm"),
     "pt has no prompts to answer, and rm gives scores; drop predict_with_generate, or use stage=sft"),
    (lambda do_predict, stage: do_predict and stage == "pt",
     "documents have no prompts to answer; use stage=sft, or do_eval for the loss"),
    (lambda do_predict, predict_with_generate, stage: do_predict and not predict_with_generate and stage != "rm",
     "the predictions are texts; set predict_with_generate=true"),
    (lambda eval_strategy, val_size, eval_dataset, tokenized_path: not _off(eval_strategy)
     and not (val_size or eval_dataset or tokenized_path),
     "there is nothing to evaluate on; set val_size or eval_dataset, or eval_strategy=no"),
    (lambda load_best_model_at_end, eval_strategy: load_best_model_at_end and _off(eval_strategy),
     "the best model is known by evaluation only; set eval_strategy=steps or epoch"),
    (lambda load_best_model_at_end, eval_strategy, save_strategy: load_best_model_at_end
     and not _off(eval_strategy) and save_strategy not in (eval_strategy, "best"),
     "the best model must have been saved; make save_strategy equal to eval_strategy"),
    (lambda load_best_model_at_end, eval_strategy, save_strategy, save_steps, eval_steps, logging_steps:
     load_best_model_at_end and eval_strategy == save_strategy == "steps"
     and save_steps % (eval_steps or logging_steps or 1) != 0,
     "each saved model must have been evaluated; make save_steps a multiple of eval_steps"),
    (lambda ref_model, stage: ref_model is not None and stage not in ("dpo", "kto", "ppo", "grpo"),
     "only dpo, kto, ppo and grpo are held to a reference; drop ref_model"),
    (lambda precompute_ref_log_probs, streaming: precompute_ref_log_probs and streaming,
     "the rows of a stream are not known before the training; drop one of the two"),
    (lambda precompute_ref_log_probs, stage: precompute_ref_log_probs and stage in ("ppo", "grpo"),
     "the texts are written during the training; drop precompute_ref_log_probs"),
    (lambda stage, reward_model, reward_file, do_train, do_eval, do_predict: stage in ("ppo", "grpo")
     and not reward_model and not reward_file and (do_eval or _trains(do_train, do_eval, do_predict)),
     "answers need a reward; name a reward_file (functions) or a reward_model"),
    (lambda reward_model, reward_model_type, finetuning_type: bool(reward_model) and reward_model_type == "lora"
     and finetuning_type != "lora",
     "an adapter can only score on a base that stays as it is; set reward_model_type=full, or finetuning_type=lora"),
    (lambda early_stopping_steps, eval_strategy: bool(early_stopping_steps) and _off(eval_strategy),
     "stopping early needs evaluation; set eval_strategy=steps or epoch"),
    (lambda stage, pref_loss: stage == "orpo" and pref_loss not in ("sigmoid", "orpo"),
     "stage orpo has a loss of its own; drop pref_loss, or set stage=dpo"),
    (lambda stage, dpo_label_smoothing: stage == "orpo" and dpo_label_smoothing > 0,
     "orpo has no label smoothing; drop it, or set stage=dpo"),
    (lambda stage, pref_bco_weight: stage == "orpo" and pref_bco_weight > 0,
     "orpo has no reference, which bco's loss needs; drop it, or set stage=dpo"),
    (lambda stage, ref_model: stage == "orpo" and ref_model is not None,
     "orpo has no reference; drop ref_model, or set stage=dpo"),
    (lambda stage, pref_loss, ref_model: stage == "dpo" and pref_loss in ("orpo", "simpo", "cpo")
     and ref_model is not None, "this loss has no reference; drop ref_model, or choose another pref_loss"),
)  # fmt: skip

# never written by Config.save and never shown: run folders and logs get shared
SECRETS = ("hf_hub_token", "ms_hub_token", "hub_token")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True} | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
_NULLS = ("null", "none", "~")
_FILES = (".yaml", ".yml", ".json")


class ConfigError(ValueError):
    """Something a user wrote cannot be used; the text names key or file, what was found and the way out."""


@dataclass(frozen=True)
class Config:
    """The resolved options of one run; nothing in it can be assigned."""

    sections: Mapping[type, object]
    values: Mapping[str, object]  # flat key -> value
    origins: Mapping[str, str]  # flat key -> "configs/demo.yaml" | "command line" | "default"
    notices: tuple[str, ...]  # what was accepted without effect or under another name; print once, on rank 0

    def __getitem__(self, section: type):
        return self.sections[section]

    def save(self, path: str | Path) -> None:
        """Write a YAML file that `load` reads back to equal values. Hub tokens are left out, as a comment."""
        lines = []
        for section, instance in self.sections.items():
            lines.append(f"### {_title(section)}\n")
            for item in fields(section):
                value = getattr(instance, item.name)
                if item.name in SECRETS and value is not None:
                    lines.append(f"# {item.name}: given, not written here\n")
                elif value is not None or item.default is not None:
                    lines.append(
                        yaml.dump({item.name: value}, Dumper=_Dumper, allow_unicode=True, width=10**9)
                    )
            lines.append("\n")
        Path(path).write_text("".join(lines), encoding="utf-8")


def load(
    argv: list[str],
    sections: list[type],
    *,
    program: str,
    description: str,
    other_sections: Iterable[type] = (),
    foreign_keys: bool = False,
) -> Config:
    """Read files and command line into `sections`. --help prints every key and exits with 0.

    other_sections: options of other scripts; their keys are checked and then left out, so that for example
    chat.py reads a training file.  foreign_keys: keys of a file that no section here has are left out, for scripts
    that must not import the sections of others; the command line is still checked.  Raises ConfigError with
    every mistake found, one a line.
    """
    keys = _declared(sections)
    reader = _Reader(keys, {k: v for k, v in _declared(other_sections).items() if k not in keys})
    reader.foreign_keys = foreign_keys
    if "--help" in argv or "-h" in argv:
        print(_help_text(keys, program, description), end="")
        raise SystemExit(0)
    words, files = _read_words(argv, reader.is_flag)
    chosen: dict[str, tuple[object, _Setting]] = {}
    for settings in [*(_read_file(name) for name in files), words]:
        chosen |= reader.resolve(settings)
    reader.problems += [f"{name} is required: {key.help}" for name, key in keys.items()
                        if key.default is MISSING and name not in chosen]  # fmt: skip
    _raise(reader.problems)

    built = {}
    for section in sections:
        given = {name: value for name, (value, _) in chosen.items() if keys[name].section is section}
        try:
            built[section] = section(**given)
        except ValueError as error:
            reader.problems.append(_located(str(error), keys, chosen))
    _raise(reader.problems)

    values = {name: getattr(built[key.section], name) for name, key in keys.items()}
    _raise(_broken_rules(values, chosen))
    origins = {name: chosen[name][1].origin if name in chosen else "default" for name in keys}
    read_only = (MappingProxyType(mapping) for mapping in (built, values, origins))
    return Config(*read_only, reader.notices())


# Words and files -> settings


class _Plain(str):
    """Text without quotes, from YAML or the command line: its type is decided by the key."""


@dataclass(frozen=True)
class _Setting:
    key: str  # as it was written
    raw: object  # None, _Plain, str (quoted), list or dict of these
    origin: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{_show(self.key, self.raw)} ({self.where})"

    @property
    def where(self) -> str:
        return self.origin if self.line is None else f"{self.origin} line {self.line}"


def _read_words(argv: list[str], is_flag: Callable[[str], bool | None]) -> tuple[list[_Setting], list[str]]:
    """-> settings of the command line, names of configuration files."""
    settings, files, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        is_key = re.fullmatch(r"[A-Za-z_][\w-]*", key) is not None
        key = key.replace("-", "_")
        if is_key and word.startswith("--"):
            text = text if equals else _next_value(key, rest, False if key == "config" else is_flag(key))
        elif not (is_key and equals):
            if word.startswith("-") or not word.lower().endswith(_FILES):
                raise ConfigError(
                    f"{word!r} on the command line is neither a configuration file ({', '.join(_FILES)}) nor "
                    "key=value, --key value or --flag. --help lists the keys."
                )
            key, text = "config", word
        if key == "config":
            files.append(text)
        else:
            settings.append(_Setting(key, _Plain(text), "command line"))
    return settings, files


def _next_value(key: str, rest: list[str], flag: bool | None) -> str:
    """The value of `--key`, from the words behind it. flag: True boolean key, False not, None unknown."""
    following = rest[0] if rest and not rest[0].startswith("--") else None
    if flag is False and following is None:
        raise ConfigError(f"--{key} needs a value behind it; write {key}=VALUE if the value starts with '--'")
    if flag is True and (following or "").lower() not in (*_BOOLEANS, *_NULLS):
        return "true"
    if flag is None and (following is None or "=" in following):
        return "true"
    # --trust_remote_code run.yaml has no value, --deepspeed ds.json has one
    if flag is None and following.endswith(_FILES) and _lookup(NOT_YET, key)[0] is None:
        return "true"
    return rest.pop(0)


def _read_file(name: str) -> list[_Setting]:
    path = Path(name)
    if path.suffix.lower() not in _FILES:
        raise ConfigError(f"configuration file {name}: expected a name that ends in {', '.join(_FILES)}")
    if not path.is_file():
        raise ConfigError(f"configuration file {name}: there is no such file (looked in {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"configuration file {name}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    settings = _read_json(name, text) if path.suffix.lower() == ".json" else _read_yaml(name, text)
    seen: dict[str, _Setting] = {}
    for setting in settings:
        if setting.key in seen:
            raise ConfigError(
                f"{name}: {setting.key} is there twice, {seen[setting.key]} and {setting}. Keep one."
            )
        seen[setting.key] = setting
    return settings


def _read_yaml(name: str, text: str) -> list[_Setting]:
    # nodes and not yaml.load: duplicate keys stay visible, and `no`, `1e-4`, `1.10` keep their text, which
    # YAML 1.1 would turn into False, a string and 1.1 before the type of the key is known
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{name}{place}: not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from error
    if not isinstance(root, yaml.MappingNode):
        found = "nothing" if root is None else f"a {root.id}"
        raise ConfigError(f"{name}: expected lines of the form 'key: value', found {found}")
    settings = []
    for key, value in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{name} line {line}: expected a key such as lora_rank, found a {key.id}")
        try:
            settings.append(_Setting(key.value.replace("-", "_"), _node_value(value), name, line))
        except ValueError as error:
            raise ConfigError(f"{name} line {line}: {key.value}: {error}") from error
    return settings


def _node_value(node: yaml.Node, depth: int = 0):
    if depth > 4:  # far beyond any option; an anchor that contains itself has no end
        raise ValueError("lists in lists in lists are not a value for an option")
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(item, depth + 1) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_node_value(k, depth + 1)): _node_value(v, depth + 1) for k, v in node.value}
    if node.style is not None:
        return node.value
    return None if node.tag == "tag:yaml.org,2002:null" else _Plain(node.value)


def _read_json(name: str, text: str) -> list[_Setting]:
    try:
        pairs = json.loads(
            text, object_pairs_hook=_Pairs, parse_int=_Plain, parse_float=_Plain, parse_constant=_Plain
        )
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(pairs, _Pairs):
        raise ConfigError(
            f'{name}: expected an object of the form {{"key": value}}, found {text.strip()[:40]!r}'
        )
    return [_Setting(key.replace("-", "_"), _json_value(value), name) for key, value in pairs]


class _Pairs(list):
    """A JSON object as its (key, value) pairs, so that a key that is there twice can be seen."""


def _json_value(value):
    if isinstance(value, bool):
        return _word(value)
    if isinstance(value, _Pairs):
        return {key: _json_value(item) for key, item in value}
    return [_json_value(item) for item in value] if isinstance(value, list) else value


# Settings -> typed values of known keys


@dataclass(frozen=True)
class _Key:
    name: str
    kind: object  # int, float, bool, str, Literal[...], tuple[...] or a union of these and None
    default: object
    help: str
    section: type


def _declared(sections: Iterable[type]) -> dict[str, _Key]:
    keys: dict[str, _Key] = {}
    for section in sections:
        hints = typing.get_type_hints(section, include_extras=True)
        for item in fields(section):
            kind, text = hints[item.name], ""
            if typing.get_origin(kind) is typing.Annotated:
                kind, text = typing.get_args(kind)[:2]
            if item.name in keys:
                raise ValueError(
                    f"{item.name} is declared by {keys[item.name].section.__name__} and {section.__name__}"
                )
            keys[item.name] = _Key(item.name, kind, item.default, text, section)
    return keys


@dataclass
class _Reader:
    """Finds the key that each setting means; collects mistakes and what is worth a notice."""

    keys: dict[str, _Key]
    others: dict[str, _Key]
    foreign_keys: bool = False
    problems: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    harmless: dict[str, str] = field(default_factory=dict)
    unused: dict[str, None] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)

    def resolve(self, settings: list[_Setting]) -> dict[str, tuple[object, _Setting]]:
        """One file, or the command line -> key: (typed value, where it came from)."""
        given: dict[str, _Setting] = {}
        for setting in settings:
            if setting.key in given and given[setting.key].raw != setting.raw:
                self.repeated[setting.key] = _show(setting.key, setting.raw)
            given[setting.key] = setting
        raws = {key: setting.raw for key, setting in given.items()}
        found: dict[str, tuple[object, _Setting]] = {}
        for setting in given.values():
            try:
                meant = self.meaning(setting.key, setting.raw, raws)
                typed = {key: _typed(self.known(key), raw) for key, raw in meant.items()}
            except ValueError as error:
                if self.is_foreign(setting):
                    self.unused[setting.key] = None
                else:
                    self.problems.append(f"{setting}: {error}")
                continue
            for key, value in typed.items():
                if key in found and found[key][0] != value:
                    self.problems.append(f"{found[key][1]} and {setting} both set {key}. Keep one of them.")
                found[key] = (value, setting)
        self.unused |= dict.fromkeys(key for key in found if key not in self.keys)
        return {key: pair for key, pair in found.items() if key in self.keys}

    def is_foreign(self, setting: _Setting) -> bool:
        names = (setting.key, *self.targets_of(setting.key))
        return self.foreign_keys and setting.origin != "command line" and not any(map(self.known, names))

    def known(self, name: str) -> _Key | None:
        return self.keys.get(name) or self.others.get(name)

    def meaning(self, name: str, raw: object, given: Mapping) -> dict[str, object]:
        """The known keys and raw values that `name: raw` stands for. ValueError when there are none."""
        key = self.known(name)
        if key is not None:
            return self.own_meaning(key, raw)
        if name in CONVERTED:
            meant = CONVERTED[name](raw, given, self.keys)
            ours = ", ".join(_show(key, value) for key, value in meant.items())
            self.renamed[_show(name, raw)] = ours or "nothing to change"
            return self.targets(meant)
        target = next((ours for ours in self.targets_of(name) if self.known(ours)), None)
        if target is not None:
            self.renamed[name] = target
            return self.own_meaning(self.known(target), raw)
        return self.without_effect(name, raw)

    def own_meaning(self, key: _Key, raw: object) -> dict[str, object]:
        theirs = RENAMED_VALUES.get(key.name, {})
        if isinstance(raw, str) and raw in theirs and raw not in _choices(key.kind):
            self.renamed[f"{key.name}={raw}"] = theirs[raw]
            raw = _Plain(theirs[raw])
        return {key.name: raw}

    def targets(self, meant: Mapping[str, object]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, raw in meant.items():
            result |= (
                self.own_meaning(self.known(key), raw) if self.known(key) else self.without_effect(key, raw)
            )
        return result

    def targets_of(self, name: str) -> list[str]:
        return [ours for ours, theirs in RENAMED.items() if name in theirs.split()]

    def without_effect(self, name: str, raw: object) -> dict[str, object]:
        for candidate in (*self.targets_of(name), name):
            if reason := _lookup(HARMLESS, candidate)[0]:
                self.harmless[name] = reason
                return {}
            part, off = _lookup(NOT_YET, candidate)
            if part is not None:
                if _is_off(raw, off):
                    return {}
                raise ValueError(f"a known key, but this version does not have {part}; remove the key")
        raise ValueError(self.unknown(name))

    def unknown(self, name: str) -> str:
        if ours := self.targets_of(name):
            return f"unknown key; its name here would be {' or '.join(ours)}, which this script does not have"
        names = {
            other: ours for ours, theirs in RENAMED.items() for other in theirs.split() if self.known(ours)
        }
        names |= {key: key for key in (*self.others, *self.keys)}
        near = dict.fromkeys(
            names[other] for other in difflib.get_close_matches(name, names, n=3, cutoff=0.7)
        )
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"unknown key; {hint}--help lists all keys"

    def is_flag(self, name: str) -> bool | None:
        target = next((ours for ours in (name, *self.targets_of(name)) if self.known(ours)), None)
        return None if target is None else bool in _members(self.known(target).kind)

    def notices(self) -> tuple[str, ...]:
        by_reason: dict[str, list[str]] = {}
        for key, reason in self.harmless.items():
            by_reason.setdefault(reason, []).append(key)
        lines = []
        if by_reason:
            groups = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
            lines.append(f"accepted without effect: {groups}")
        if self.renamed:
            lines.append(
                "read as: " + ", ".join(f"{theirs} -> {ours}" for theirs, ours in self.renamed.items())
            )
        if self.unused:
            lines.append(f"not used by this script: {', '.join(self.unused)}")
        lines += [
            f"{key} is given more than once, the last counts: {last}" for key, last in self.repeated.items()
        ]
        return tuple(lines)


def _lookup(table: Mapping[str, str], name: str) -> tuple[str | None, list[str]]:
    """-> the table's heading for this key and the values behind '=', or None and nothing."""
    for heading, words in table.items():
        for word in words.split():
            pattern, _, values = word.partition("=")
            if fnmatchcase(name, pattern):
                return heading, values.split(",")
    return None, []


def _is_off(raw: object, off: list[str]) -> bool:
    if raw is None or raw == [] or raw == {}:
        return True
    text = str(raw).lower()
    if text in ("", "false", "no", "off", *_NULLS, *off):
        return True
    try:
        number = float(text)
    except ValueError:
        return False
    return number == 0 or any(re.fullmatch(r"[-+.\de]+", value) and float(value) == number for value in off)


# Types


def _members(kind: object) -> tuple[object, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def _choices(kind: object) -> tuple[object, ...]:
    literals = [member for member in _members(kind) if typing.get_origin(member) is typing.Literal]
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


def _typed(key: _Key, raw: object):
    """The value of `raw` for this key. ValueError says what was expected."""
    choices = _choices(key.kind)
    members = [member for member in _members(key.kind) if member is not NoneType]
    is_list = any(typing.get_origin(member) is tuple for member in members)
    if raw is None or (isinstance(raw, _Plain) and raw.lower() in _NULLS and raw not in choices):
        if len(members) < len(_members(key.kind)):
            return None
        if is_list and raw not in ("none", "None"):
            return ()
        if raw is None:
            raise ValueError(f"expected {_type_name(key.kind)}; leave the key out to have its default")
    if (
        isinstance(raw, str)
        and raw in NOT_YET_VALUES.get(key.name, "").split()
        and choices
        and raw not in choices
    ):
        here = ", ".join(map(str, choices))
        raise ValueError(f"known, but this version does not have that part; expected one of {here}")
    for member in sorted(members, key=_try_order):
        try:
            return _convert(raw, member)
        except ValueError as error:
            problem = error
    raise problem if len(members) == 1 else ValueError(f"expected {_type_name(key.kind)}")


def _try_order(member: object) -> int:
    # "3" is a whole number before it is any number or true, and all these before it is text
    order = (typing.Literal, int, float, bool, tuple, str)
    return order.index(typing.get_origin(member) or member)


def _convert(raw: object, kind: object):
    origin = typing.get_origin(kind)
    if origin is tuple:
        return tuple(_convert_scalar(item, typing.get_args(kind)[0]) for item in _items(raw))
    if origin is typing.Literal:
        return _choose(raw, typing.get_args(kind))
    if kind is str and isinstance(raw, dict):
        return json.dumps(_untyped(raw))
    return _convert_scalar(raw, kind)


def _untyped(raw: object):
    """Plain JSON data: no key says what is a number here, so JSON's own spelling does."""
    if isinstance(raw, dict):
        return {key: _untyped(value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_untyped(value) for value in raw]
    try:
        return json.loads(raw) if isinstance(raw, _Plain) else raw
    except json.JSONDecodeError:
        return str(raw)


def _items(raw: object) -> list:
    if isinstance(raw, list):
        return raw
    if isinstance(raw, _Plain) and raw.startswith("["):
        try:
            return _node_value(yaml.compose(raw, Loader=yaml.SafeLoader))
        except yaml.YAMLError as error:
            raise ValueError("expected a list such as [a, b]") from error
    if isinstance(raw, str):
        return [_Plain(item.strip()) for item in raw.split(",") if item.strip()]
    raise ValueError("expected a list")


def _choose(raw: object, choices: tuple):
    same = [choice for choice in choices if str(choice).lower() == str(raw).lower()]
    exact = [choice for choice in same if str(choice) == str(raw)]
    if not same:
        near = difflib.get_close_matches(str(raw), map(str, choices), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected one of {', '.join(map(str, choices))}{hint}")
    return (exact or same)[0]


def _convert_scalar(raw: object, kind: type):
    if not isinstance(raw, str):
        raise ValueError(
            f"expected {_type_name(kind)}, found {'null' if raw is None else 'a list or mapping'}"
        )
    if kind is str:
        return str(raw)
    if kind is bool:
        if raw.lower() not in _BOOLEANS:
            raise ValueError("expected true or false")
        return _BOOLEANS[raw.lower()]
    try:
        exact = kind is int and re.fullmatch(r"\s*[-+]?[\d_]+\s*", raw)  # a float would round above 2 ** 53
        number = int(raw) if exact else float(raw.replace(".inf", "inf"))
    except ValueError as error:
        raise ValueError(f"expected {_type_name(kind)}") from error
    if number != number:
        raise ValueError("expected a number, and nan is none")
    if kind is int and number != number // 1:
        raise ValueError("expected a whole number")
    return kind(number)


def _type_name(kind: object) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    parts = []
    for member in _members(kind):
        if typing.get_origin(member) is tuple:
            parts.append("a list (a,b,c)")
        elif typing.get_origin(member) is typing.Literal:
            parts.append("one of " + ", ".join(map(str, typing.get_args(member))))
        else:
            parts.append(names[member])
    return " or ".join(parts)


# Checks across keys, and text for people


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _located(error: str, keys: Mapping[str, _Key], chosen: Mapping) -> str:
    """The error of a section, with the place where each key that it names was given."""
    named = [word for word in dict.fromkeys(re.findall(r"\w+", error)) if word in keys]
    places = [f"{word}: {chosen[word][1].where if word in chosen else 'default'}" for word in named]
    return f"{error} ({', '.join(places)})" if places else error


def _broken_rules(values: Mapping[str, object], chosen: Mapping) -> list[str]:
    problems = []
    for predicate, message in RULES:
        names = [_own_name(name, values) for name in inspect.signature(predicate).parameters]
        if None in names or not predicate(*(values[name] for name in names)):
            continue
        places = (chosen[name][1].where if name in chosen else "default" for name in names)
        found = (f"{_show(name, values[name])} ({place})" for name, place in zip(names, places))
        problems.append(f"{' with '.join(found)}: {message}")
    return problems


def _own_name(name: str, values: Mapping[str, object]) -> str | None:
    """The name under which a section declares this key: eval_strategy may be evaluation_strategy there."""
    return next((own for own in (name, *RENAMED.get(name, "").split()) if own in values), None)


def _show(key: str, value: object) -> str:
    """key=value as one would type it; what is secret stays so."""
    if value is not None and (key in SECRETS or key.endswith("_token")):
        return f"{key}=***"
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}"
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"{key}={textwrap.shorten(text, 80, placeholder='...')}"


class _Dumper(yaml.SafeDumper):
    """Lists on one line; quotes the text None too, because `load` reads a bare None as null."""

    yaml_representers = yaml.SafeDumper.yaml_representers | {
        tuple: lambda self, items: self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True),
        # PyYAML writes U+0085 and its like bare in single quotes and reads a space back
        str: lambda self, text: self.represent_scalar(
            "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
        ),
    }
    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | {
        letter: [*yaml.SafeDumper.yaml_implicit_resolvers.get(letter, []),
                 ("tag:yaml.org,2002:null", re.compile("(?i)(none|null)$"))]
        for letter in "nN"
    }  # fmt: skip


def _title(section: type) -> str:
    documented = section.__doc__ and not section.__doc__.startswith(f"{section.__name__}(")
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", section.__name__).capitalize()
    return section.__doc__.strip().splitlines()[0].rstrip(".") if documented else spaced


def _help_text(keys: Mapping[str, _Key], program: str, description: str) -> str:
    width = max(50, min(shutil.get_terminal_size((100, 24)).columns, 130))
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    usage = f"usage: python {program} [FILE.yaml] [key=value ...] [--key value ...]"
    lines = [*textwrap.wrap(usage, width, subsequent_indent=" " * 4), ""]
    lines += [*textwrap.wrap(description, width), ""]
    lines += textwrap.wrap(
        "Options come from YAML or JSON files and from the command line, which wins. A boolean key alone "
        "means true, a list is a,b,c, null means not set (shown as -). The names of LLaMA-Factory, qlora and "
        "swift are understood.",
        width,
    )
    sections = dict.fromkeys(key.section for key in keys.values())
    columns = [max((len(name) for name in keys), default=0), 6, 10]
    for section in sections:
        rows = [_help_row(key) for key in keys.values() if key.section is section]
        lines += ["", f"{bold}{_title(section)}{plain}"]
        for name, kind, default, text in rows:
            if len(default) > columns[2]:
                default, text = "", f"{text}; default {default}"
            head = f"  {name:<{columns[0]}}  {kind:<{columns[1]}}  {default:<{columns[2]}}  "
            if width - len(head) < 24:  # too narrow for a table: the text goes below
                lines += [f"  {name}  {kind}  {default}".rstrip()]
                lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            else:
                lines += textwrap.wrap(
                    text or "-", width, initial_indent=head, subsequent_indent=" " * len(head)
                )
    return "\n".join(lines) + "\n"


def _help_row(key: _Key) -> tuple[str, str, str, str]:
    names = {int: "int", float: "float", bool: "bool", str: "text", tuple: "list", typing.Literal: "choice"}
    kinds = [names[typing.get_origin(kind) or kind] for kind in _members(key.kind) if kind is not NoneType]
    default = "required" if key.default is MISSING else _show("", key.default)[1:]
    choices = ", ".join(map(str, _choices(key.kind)))
    text = f"{key.help} [{choices}]" if choices else key.help
    return key.name, "/".join(kinds), "-" if default in ("null", "") else default, text

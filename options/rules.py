"""Options that exclude or need each other, as one table; config.load checks it before any file is read."""

from collections.abc import Callable


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
    (
        lambda do_train, dataset, tokenized_path: do_train and not dataset and not tokenized_path,
        "there is nothing to train on; name a dataset",
    ),
    (
        lambda streaming, max_steps: streaming and (max_steps or 0) <= 0,
        "a stream has no known end; set max_steps",
    ),
    (
        lambda streaming, max_samples: streaming and max_samples is not None,
        "max_samples is for data sets that are read whole; use max_steps, or streaming=false",
    ),
    (
        lambda stage, do_sample, do_train, do_eval, do_predict: (
            stage == "grpo" and not do_sample and _trains(do_train, do_eval, do_predict)
        ),
        "the answers to one prompt would all be the same; set do_sample=true",
    ),
    (
        lambda stage, do_sample, do_train, do_eval, do_predict: (
            stage == "ppo" and not do_sample and _trains(do_train, do_eval, do_predict)
        ),
        "texts that are no samples of the policy cannot say how to change its probabilities; set "
        "do_sample=true",
    ),
    (
        lambda stage, beta: stage != "grpo" and beta != 0,
        "beta is the KL weight of stage grpo; that of dpo, orpo and kto is pref_beta",
    ),
    (
        lambda stage, loss_type: stage != "grpo" and loss_type != "dapo",
        "loss_type is of stage grpo; the loss of dpo is pref_loss",
    ),
    (
        lambda streaming, val_size: streaming and 0 < val_size < 1,
        "a share of a stream is unknown; give val_size as a number of rows, or an eval_dataset",
    ),
    (
        lambda streaming, group_by_length: streaming and group_by_length,
        "lengths in a stream are not known ahead; drop one of the two",
    ),
    (
        lambda packing, group_by_length: packing and group_by_length,
        "packing fills rows by length already; drop group_by_length",
    ),
    (
        lambda val_size, eval_dataset: val_size > 0 and bool(eval_dataset),
        "there would be two evaluation sets; drop val_size or eval_dataset",
    ),
    (
        lambda val_size, dataset, tokenized_path: val_size > 0 and not dataset and not tokenized_path,
        "val_size is split off dataset, which is not given; name one, or drop val_size",
    ),
    (
        lambda mask_history, train_on_prompt: mask_history and train_on_prompt,
        "one trains on less than the answers, the other on more; drop one of the two",
    ),
    (
        lambda stage, train_on_prompt: train_on_prompt and stage not in ("pt", "sft"),
        "this stage trains on the answers only; drop train_on_prompt",
    ),
    (
        lambda stage, mask_history: mask_history and stage not in ("pt", "sft"),
        "this stage trains on the last answer only anyway; drop mask_history",
    ),
    (
        lambda interleave_probs, mix_strategy: bool(interleave_probs) and "interleave" not in mix_strategy,
        "probabilities need interleaving; set mix_strategy=interleave_under (or _over)",
    ),
    (
        lambda interleave_probs, dataset: (
            bool(interleave_probs and dataset) and _count(interleave_probs) != _count(dataset)
        ),
        "give one probability for each dataset",
    ),
    (
        lambda reserved_label_len, cutoff_len: reserved_label_len >= cutoff_len,
        "reserved_label_len must be less than cutoff_len",
    ),
    (
        lambda stage, neftune_noise_alpha: stage in ("ppo", "grpo") and bool(neftune_noise_alpha),
        "noise would change the probabilities that updates compare with those of the rollout; drop "
        "neftune_noise_alpha",
    ),
    (lambda fp16, bf16: fp16 and bf16, "choose one precision"),
    (lambda fp16, pure_bf16: fp16 and pure_bf16, "choose one precision"),
    (
        lambda bf16, pure_bf16: bf16 and pure_bf16,
        "bf16 keeps trained weights in fp32, pure_bf16 does not; choose one",
    ),
    (
        lambda use_dora, finetuning_type: use_dora and finetuning_type != "lora",
        "DoRA is a kind of LoRA; set finetuning_type=lora, or drop use_dora",
    ),
    (
        lambda use_rslora, finetuning_type: use_rslora and finetuning_type != "lora",
        "rsLoRA is a kind of LoRA; set finetuning_type=lora, or drop use_rslora",
    ),
    (
        lambda additional_target, finetuning_type: bool(additional_target) and finetuning_type != "lora",
        "additional_target is what LoRA trains besides adapters; set finetuning_type=lora, or drop it",
    ),
    (
        lambda adapter_name_or_path, finetuning_type: (
            bool(adapter_name_or_path) and finetuning_type != "lora"
        ),
        "only LoRA continues adapters; set finetuning_type=lora, or merge them first with export.py",
    ),
    (
        lambda create_new_adapter, finetuning_type: create_new_adapter and finetuning_type != "lora",
        "only LoRA has adapters; set finetuning_type=lora, or drop create_new_adapter",
    ),
    (
        lambda quantization_bit, finetuning_type: _quantised(quantization_bit) and finetuning_type != "lora",
        "quantised weights have no gradient, only adapters beside them train; set finetuning_type=lora, or "
        "drop "
        "quantization_bit",
    ),
    (
        lambda quantization_bit, train_from_scratch: _quantised(quantization_bit) and train_from_scratch,
        "random weights would be frozen in few bits; drop one of the two",
    ),
    (
        lambda quantization_bit, create_new_adapter: _quantised(quantization_bit) and create_new_adapter,
        "the given adapters would have to be merged into quantised weights; merge them with export.py first "
        "and "
        "train on "
        "the result",
    ),
    # finetuning_type: for training alone, at inference several adapters lie beside quantised weights
    (
        lambda quantization_bit, adapter_name_or_path, finetuning_type: (
            _quantised(quantization_bit) and _count(adapter_name_or_path) > 1
        ),
        "all but the last adapter would have to be merged into quantised weights; give one, or merge them "
        "with "
        "export.py",
    ),
    (
        lambda create_new_adapter, adapter_name_or_path: create_new_adapter and not adapter_name_or_path,
        "there is no adapter to put a new one on; name it in adapter_name_or_path, or drop "
        "create_new_adapter",
    ),
    (
        lambda export_gguf_type, export_merge: (
            export_gguf_type != "none" and export_merge in ("requantise", "loftq")
        ),
        "a GGUF file has codes of its own, made from the dequantised merge; drop export_merge",
    ),
    (
        lambda export_gguf_type, export_sample_text: export_gguf_type != "none" and bool(export_sample_text),
        "losses are measured on Hugging Face folders; model_name_or_path=model.gguf makes one of the file. Drop one of "
        "the "
        "two",
    ),
    (
        lambda warmup_steps, warmup_ratio: (warmup_steps or 0) > 0 and (warmup_ratio or 0) > 0,
        "both say how long to warm up; drop one of the two",
    ),
    (
        lambda do_eval, val_size, eval_dataset, tokenized_path: (
            do_eval and not (val_size or eval_dataset or tokenized_path)
        ),
        "there is nothing to evaluate on; set val_size or eval_dataset",
    ),
    (
        lambda do_predict, val_size, eval_dataset, tokenized_path: (
            do_predict and not (val_size or eval_dataset or tokenized_path)
        ),
        "there is nothing to predict; set val_size or eval_dataset",
    ),
    (
        lambda predict_with_generate, stage: predict_with_generate and stage in ("pt", "rm"),
        "pt has no prompts to answer, and rm gives scores; drop predict_with_generate, or use stage=sft",
    ),
    (
        lambda do_predict, stage: do_predict and stage == "pt",
        "documents have no prompts to answer; use stage=sft, or do_eval for the loss",
    ),
    (
        lambda do_predict, predict_with_generate, stage: (
            do_predict and not predict_with_generate and stage != "rm"
        ),
        "the predictions are texts; set predict_with_generate=true",
    ),
    (
        lambda evaluation_strategy, val_size, eval_dataset, tokenized_path: (
            not _off(evaluation_strategy) and not (val_size or eval_dataset or tokenized_path)
        ),
        "there is nothing to evaluate on; set val_size or eval_dataset, or eval_strategy=no",
    ),
    (
        lambda load_best_model_at_end, evaluation_strategy: (
            load_best_model_at_end and _off(evaluation_strategy)
        ),
        "the best model is known by evaluation only; set eval_strategy=steps or epoch",
    ),
    (
        lambda load_best_model_at_end, evaluation_strategy, save_strategy: (
            load_best_model_at_end
            and not _off(evaluation_strategy)
            and save_strategy not in (evaluation_strategy, "best")
        ),
        "the best model must have been saved; make save_strategy equal to eval_strategy",
    ),
    (
        lambda load_best_model_at_end, evaluation_strategy, save_strategy, save_steps, eval_steps, logging_steps: (
            load_best_model_at_end
            and evaluation_strategy == save_strategy == "steps"
            and save_steps % (eval_steps or logging_steps or 1) != 0
        ),
        "each saved model must have been evaluated; make save_steps a multiple of eval_steps",
    ),
    (
        lambda ref_model, stage: ref_model is not None and stage not in ("dpo", "kto", "ppo", "grpo"),
        "only dpo, kto, ppo and grpo are held to a reference; drop ref_model",
    ),
    (
        lambda precompute_ref_log_probs, streaming: precompute_ref_log_probs and streaming,
        "the rows of a stream are not known before the training; drop one of the two",
    ),
    (
        lambda precompute_ref_log_probs, stage: precompute_ref_log_probs and stage in ("ppo", "grpo"),
        "the texts are written during the training; drop precompute_ref_log_probs",
    ),
    (
        lambda stage, reward_model, reward_file, do_train, do_eval, do_predict: (
            stage in ("ppo", "grpo")
            and not reward_model
            and not reward_file
            and (do_eval or _trains(do_train, do_eval, do_predict))
        ),
        "answers need a reward; name a reward_file (functions) or a reward_model",
    ),
    (
        lambda reward_model, reward_model_type, finetuning_type: (
            bool(reward_model) and reward_model_type == "lora" and finetuning_type != "lora"
        ),
        "an adapter can only score on a base that stays as it is; set reward_model_type=full, or "
        "finetuning_type=lora",
    ),
    (
        lambda early_stopping_steps, evaluation_strategy: (
            bool(early_stopping_steps) and _off(evaluation_strategy)
        ),
        "stopping early needs evaluation; set eval_strategy=steps or epoch",
    ),
    (
        lambda stage, pref_loss: stage == "orpo" and pref_loss not in ("sigmoid", "orpo"),
        "stage orpo has a loss of its own; drop pref_loss, or set stage=dpo",
    ),
    (
        lambda stage, dpo_label_smoothing: stage == "orpo" and dpo_label_smoothing > 0,
        "orpo has no label smoothing; drop it, or set stage=dpo",
    ),
    (
        lambda stage, pref_bco_weight: stage == "orpo" and pref_bco_weight > 0,
        "orpo has no reference, which bco's loss needs; drop it, or set stage=dpo",
    ),
    (
        lambda stage, beta, ref_model: stage == "grpo" and beta == 0 and ref_model is not None,
        "with beta 0, the default, grpo has no reference; set beta, or drop ref_model",
    ),
    (
        lambda stage, pref_loss, ref_model: (
            stage == "dpo" and pref_loss in ("orpo", "simpo", "cpo") and ref_model is not None
        ),
        "this loss has no reference; drop ref_model, or choose another pref_loss",
    ),
)

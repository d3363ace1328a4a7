"""Options of different sections that exclude or need each other; config.load checks them before any weight.

What concerns one section alone is checked in its __post_init__.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from options.values import show


@dataclass(frozen=True)
class Rule:
    name: str
    keys: str  # in words; the rule is checked where all of them are declared
    broken: Callable[[SimpleNamespace], bool]  # of the values of these keys
    message: str  # what is wrong and the way out


def broken(values: Mapping[str, object], places: Mapping[str, str]) -> list[str]:
    """A line for each rule that these values break. places: where each key was given."""
    problems = []
    for rule in RULES:
        keys = rule.keys.split()
        if values.keys() >= set(keys) and rule.broken(SimpleNamespace(**{key: values[key] for key in keys})):
            told = [key for key in keys if key in keys[:2] or places[key] != "default"]
            found = " with ".join(f"{show(key, values[key])} ({places[key]})" for key in told)
            problems.append(f"{found}: {rule.message}")
    return problems


def _trains(run: SimpleNamespace) -> bool:
    """As TrainOptions.trains."""
    return not (run.do_eval or run.do_predict) if run.do_train is None else run.do_train


EVALUATED = "val_size eval_dataset tokenized_path dataset do_train"  # keys that _evaluates_nothing reads


def _holds_out(run: SimpleNamespace) -> bool:
    """Whether there are rows to evaluate on, or may be some in tokenized_path."""
    return bool(run.val_size or run.eval_dataset or run.tokenized_path)


def _evaluates_nothing(run: SimpleNamespace) -> bool:
    """Where nothing trains, `dataset` is what is evaluated: see setup.data_options."""
    return not _holds_out(run) and (_trains(run) or not run.dataset)


def _quantised(run: SimpleNamespace) -> bool:
    """Whether quantization_bit asks for anything, as quant.from_options reads it."""
    return run.quantization_bit not in (None, 0, 16, 32)


RULES = (
    Rule("no data", "do_train dataset tokenized_path",
         lambda run: run.do_train and not run.dataset and not run.tokenized_path,
         "there is nothing to train on; name a dataset"),
    Rule("noise of slices", "cp_size neftune_noise_alpha",
         lambda run: run.cp_size > 1 and run.neftune_noise_alpha,
         "ranks that share a row do not know its noise; drop one of the two"),
    Rule("lengths of slices", "cp_size rope_scaling",
         lambda run: run.cp_size > 1 and run.rope_scaling == "dynamic",
         "it goes by the lengths of whole texts, of which ranks have parts; take yarn, or drop cp_size"),
    Rule("endless stream", "streaming max_steps", lambda run: run.streaming and run.max_steps <= 0,
         "a stream has no known end; set max_steps"),
    Rule("grpo draws", "stage do_sample do_train do_eval do_predict",
         lambda run: run.stage == "grpo" and not run.do_sample and _trains(run),
         "the answers to one prompt would all be the same; set do_sample=true"),
    Rule("ppo draws", "stage do_sample do_train do_eval do_predict",
         lambda run: run.stage == "ppo" and not run.do_sample and _trains(run),
         "texts that are no samples of the policy cannot say how to change it; set do_sample=true"),
    Rule("beta of grpo", "stage beta", lambda run: run.stage != "grpo" and run.beta != 0,
         "beta is the KL weight of stage grpo; that of dpo, orpo and kto is pref_beta"),
    Rule("loss of grpo", "stage loss_type", lambda run: run.stage != "grpo" and run.loss_type != "dapo",
         "loss_type is of stage grpo; the loss of dpo is pref_loss"),
    Rule("prompts are trained on", "stage train_on_prompt",
         lambda run: run.train_on_prompt and run.stage not in ("pt", "sft"),
         "this stage trains on the answers only; drop train_on_prompt"),
    Rule("history is masked", "stage mask_history",
         lambda run: run.mask_history and run.stage not in ("pt", "sft"),
         "this stage trains on the last answer only anyway; drop mask_history"),
    Rule("adapters without LoRA", "adapter_name_or_path finetuning_type",
         lambda run: bool(run.adapter_name_or_path) and run.finetuning_type != "lora",
         "only LoRA continues adapters; set finetuning_type=lora, or merge them first with export.py"),
    Rule("quantised weights train", "quantization_bit finetuning_type",
         lambda run: _quantised(run) and run.finetuning_type != "lora",
         "quantised weights have no gradient, adapters train; set finetuning_type=lora, or drop the bits"),
    Rule("random weights in few bits", "quantization_bit train_from_scratch",
         lambda run: _quantised(run) and run.train_from_scratch,
         "random weights would be frozen in few bits; drop one of the two"),
    Rule("new adapter on merged codes", "quantization_bit create_new_adapter",
         lambda run: _quantised(run) and run.create_new_adapter,
         "the given adapters would be merged into quantised weights; merge them with export.py first"),
    # finetuning_type: for training alone, at inference several adapters lie beside quantised weights
    Rule("adapters merged into codes", "quantization_bit adapter_name_or_path finetuning_type",
         lambda run: _quantised(run) and len(run.adapter_name_or_path) > 1,
         "all but the last would be merged into quantised weights; give one, or merge them with export.py"),
    Rule("new adapter on none", "create_new_adapter adapter_name_or_path",
         lambda run: run.create_new_adapter and not run.adapter_name_or_path,
         "there is no adapter to put a new one on; name it, or drop create_new_adapter"),
    Rule("codes in GGUF", "export_gguf_type export_merge",
         lambda run: run.export_gguf_type != "none" and run.export_merge in ("requantise", "loftq"),
         "a GGUF file has codes of its own, made from the dequantised merge; drop export_merge"),
    Rule("loss of GGUF", "export_gguf_type export_sample_text",
         lambda run: run.export_gguf_type != "none" and bool(run.export_sample_text),
         "losses are measured on Hugging Face folders; export.py makes one of the file. Drop one"),
    Rule("nothing to evaluate", f"do_eval {EVALUATED} do_predict",
         lambda run: run.do_eval and _evaluates_nothing(run),
         "there is nothing to evaluate on; set val_size or eval_dataset"),
    Rule("nothing to predict", f"do_predict {EVALUATED} do_eval",
         lambda run: run.do_predict and _evaluates_nothing(run),
         "there is nothing to predict; set val_size or eval_dataset"),
    Rule("nothing to evaluate on the way", f"evaluation_strategy {EVALUATED} do_eval do_predict",
         lambda run: run.evaluation_strategy != "no" and _evaluates_nothing(run),
         "there is nothing to evaluate on; set val_size or eval_dataset, or eval_strategy=no"),
    Rule("reference without use", "ref_model stage",
         lambda run: run.ref_model is not None and run.stage not in ("dpo", "kto", "ppo", "grpo"),
         "only dpo, kto, ppo and grpo are held to a reference; drop ref_model"),
    Rule("stream known ahead", "precompute_ref_log_probs streaming",
         lambda run: run.precompute_ref_log_probs and run.streaming,
         "the rows of a stream are not known before the training; drop one of the two"),
    Rule("rollouts known ahead", "precompute_ref_log_probs stage",
         lambda run: run.precompute_ref_log_probs and run.stage in ("ppo", "grpo"),
         "the texts are written during the training; drop precompute_ref_log_probs"),
    Rule("no reward", "stage reward_model reward_file do_train do_eval do_predict",
         lambda run: run.stage in ("ppo", "grpo") and not run.reward_model and not run.reward_file
         and (run.do_eval or _trains(run)),
         "answers need a reward; name a reward_file (functions) or a reward_model"),
    Rule("reward adapter on changing base", "reward_model reward_model_type finetuning_type",
         lambda run: bool(run.reward_model) and run.reward_model_type == "lora" != run.finetuning_type,
         "an adapter scores on a base that stays; set reward_model_type=full, or finetuning_type=lora"),
    Rule("loss of orpo", "stage pref_loss",
         lambda run: run.stage == "orpo" and run.pref_loss not in ("sigmoid", "orpo"),
         "stage orpo has a loss of its own; drop pref_loss, or set stage=dpo"),
    Rule("orpo smoothed", "stage dpo_label_smoothing",
         lambda run: run.stage == "orpo" and run.dpo_label_smoothing > 0,
         "orpo has no label smoothing; drop it, or set stage=dpo"),
    Rule("orpo with bco", "stage pref_bco_weight",
         lambda run: run.stage == "orpo" and run.pref_bco_weight > 0,
         "orpo has no reference, which bco's loss needs; drop it, or set stage=dpo"),
    Rule("grpo without KL", "stage beta ref_model",
         lambda run: run.stage == "grpo" and run.beta == 0 and run.ref_model is not None,
         "with beta 0, the default, grpo has no reference; set beta, or drop ref_model"),
    Rule("loss without reference", "stage pref_loss ref_model",
         lambda run: run.stage == "dpo" and run.pref_loss in ("orpo", "simpo", "cpo") and bool(run.ref_model),
         "this loss has no reference; drop ref_model, or choose another pref_loss"),
    Rule("codes in slices", "tp_size quantization_bit",
         lambda run: run.tp_size > 1 and _quantised(run),
         "codes are not cut over ranks; set tp_size=1 (parallel=fsdp shares them), or drop the bits"),
    Rule("reference's codes in slices", "tp_size ref_model_quantization_bit",
         lambda run: run.tp_size > 1 and bool(run.ref_model_quantization_bit),
         "codes are not cut over ranks; set tp_size=1, or drop the bits"),
    Rule("reward's codes in slices", "tp_size reward_model_quantization_bit",
         lambda run: run.tp_size > 1 and bool(run.reward_model_quantization_bit),
         "codes are not cut over ranks; set tp_size=1, or drop the bits"),
    Rule("fp16 in slices", "tp_size fp16", lambda run: run.tp_size > 1 and run.fp16,
         "each rank would judge its own slices' overflow; set bf16=true in its place"),
    Rule("DoRA in slices", "tp_size use_dora", lambda run: run.tp_size > 1 and run.use_dora,
         "its norms need whole rows of the weights; set tp_size=1, or drop use_dora"),
    Rule("compiled slices", "tp_size torch_compile torch_compile_backend torch_compile_mode",
         lambda run: run.tp_size > 1
         and bool(run.torch_compile or run.torch_compile_backend or run.torch_compile_mode),
         "the sums over ranks stand in hooks, which break a compiled block; set tp_size=1, or drop it"),
    Rule("whole parameters in shares", "optim parallel tp_size",
         lambda run: (run.parallel in ("fsdp", "hsdp") or run.tp_size > 1) and "bit" in run.optim,
         "bitsandbytes steps whole parameters, of which ranks have shares; set optim=adamw_torch, which has "
         "its state shared too, or parallel=ddp"),
    Rule("sums without gradients", "optim_in_backward gradient_accumulation_steps",
         lambda run: run.optim_in_backward and run.gradient_accumulation_steps > 1,
         "gradients that are forgotten at once cannot be summed; set gradient_accumulation_steps=1"),
    Rule("scaled gradients", "optim_in_backward fp16", lambda run: run.optim_in_backward and run.fp16,
         "fp16 skips updates by all gradients at once; set bf16 in place of fp16, or drop optim_in_backward"),
    Rule("rows not known ahead", "test_oom streaming", lambda run: run.test_oom and run.streaming,
         "which row of a stream is the longest nobody knows; set plan=true, which counts cutoff_len"),
    Rule("adafactor in slices", "tp_size optim",
         lambda run: run.tp_size > 1 and run.optim == "adafactor",
         "it takes means over whole matrices; set optim=adamw_torch, or tp_size=1"),
)  # fmt: skip

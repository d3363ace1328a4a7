"""The options of a run: what is trained for how long, in which precision, with which optimizer and learning
rate, and what is logged, saved, evaluated."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch.compiler import list_backends

from options import json_reader
from options.errors import located, refuse, require
from options.option import COMMON, RESUMABLE, option
from training.trackers import installed

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of inductor
# kind -> the keys that lr_scheduler_kwargs may hold, with their defaults; ... marks a key that must be given.
# None: worked out from the other numbers (see _after_warmup and _warmup_stable_decay).
SCHEDULE_KEYS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 1},
    "cosine_with_min_lr": {"num_cycles": 0.5, "min_lr": None, "min_lr_rate": None},
    "polynomial": {"power": 1.0, "lr_end": 1e-7},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": None},
    "warmup_stable_decay": {"num_decay_steps": ..., "num_stable_steps": None, "min_lr_ratio": 0.0}
    | {"num_cycles": 0.5, "warmup_type": "linear", "decay_type": "cosine"},
}
MOST = 2**31  # of what a run counts
WARMS_UP = "lr_scheduler_type!=constant"
RAMPS = ("linear", "cosine", "1-sqrt")  # values of warmup_type and decay_type


@dataclass(frozen=True)
class TrainOptions:
    stage: Literal["pt", "sft", "rm", "dpo", "orpo", "kto", "ppo", "grpo"] = option(
        "sft", "pt: text; sft: dialogues; rm, dpo, orpo: pairs; kto: answers; ppo, grpo: rewards", COMMON
    )
    do_train: bool | None = option(None, "train; default: yes unless do_eval or do_predict is set", RESUMABLE)
    do_eval: bool = option(False, "evaluate once more at the end", RESUMABLE)
    do_predict: bool = option(
        False, "at the end write generated_predictions.jsonl of the evaluation sets (rm: scores)", RESUMABLE
    )
    predict_with_generate: bool = option(False, "evaluate texts: ROUGE, BLEU-4, exact match", RESUMABLE)
    output_dir: str | None = option(None, "folder of the run: checkpoints, logs, result", COMMON, RESUMABLE)
    overwrite_output_dir: bool = option(False, "start anew even over old checkpoints", COMMON, RESUMABLE)
    resume_from_checkpoint: str | None = option(None, "folder, true (newest) or false (anew)", RESUMABLE)
    per_device_train_batch_size: int = option(
        8,
        "examples or packed rows per micro-batch",
        COMMON,
        also="batch_size per_gpu_train_batch_size micro_batch_size",
    )
    per_device_eval_batch_size: int = option(
        8, "the same for evaluation", COMMON, RESUMABLE, also="eval_batch_size per_gpu_eval_batch_size"
    )
    gradient_accumulation_steps: int = option(1, "micro-batches per update", COMMON)
    num_train_epochs: float = option(3.0, "passes over the data", COMMON, RESUMABLE, when="max_steps=-1")
    max_steps: int = option(-1, "updates; above 0 it beats num_train_epochs", COMMON, RESUMABLE)
    bf16: bool = option(False, "bf16 compute, fp32 trainable weights", COMMON)
    fp16: bool = option(False, "fp16 compute with loss scaling, fp32 trainable weights")
    pure_bf16: bool = option(False, "everything in bf16, trainable weights too")
    upcast_layernorm: bool | None = option(None, "weights of norms in fp32; default: on a quantised base")
    gradient_checkpointing: bool | Literal["auto", "none", "selective", "full", "offload"] | None = option(
        "auto",
        "what the backward pass computes again: nothing, norms and activations, whole blocks (true), "
        "those with their inputs in host memory; auto = as little as memory allows",
        RESUMABLE,
        also="activation_checkpointing",
    )
    torch_compile: bool = option(False, "torch.compile of each block; the kernels fuse most of it already")
    torch_compile_backend: str | None = option(None, "backend of torch.compile (inductor); turns it on")
    torch_compile_mode: str | None = option(None, "mode of inductor, as max-autotune; turns it on too")
    neftune_noise_alpha: float | None = option(None, "noise on embeddings, about 5", also="neftune_alpha")
    test_oom: bool = option(
        False,
        "try the largest batch before the first update, to run out of memory now",
        also="test_oom_error",
    )
    plan: bool = option(False, "print the predicted memory and bound on tokens/s, read no weights, and end")
    plan_ranks: int | None = option(None, "plan for so many ranks, which nobody starts", when="plan=true")
    train_from_scratch: bool = option(False, "random weights; the folder gives config.json and tokenizer")
    seed: int = option(42, "seed of adapters, dropout and, without data_seed, of the data order")
    tf32: bool | None = option(None, "fp32 matrices multiply in TF32 (10 bits) on a GPU", RESUMABLE)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU if there is one", RESUMABLE)
    enable_jit_checkpoint: bool = option(
        False,
        "exit with 0 after SIGTERM and its checkpoint, for machines that are taken away",
        RESUMABLE,
        also="exit_signal_handler",
    )
    ddp_timeout: int = option(1800, "seconds that ranks wait for one another", RESUMABLE)
    logging_strategy: Literal["steps", "epoch", "no"] = option("steps", "when to log, and last", RESUMABLE)
    logging_steps: int | float = option(500, "updates between log lines", COMMON, RESUMABLE)
    logging_first_step: bool = option(False, "log the first update too", RESUMABLE)
    report_to: tuple[str, ...] = option(("none",), "none, tensorboard, wandb, mlflow", RESUMABLE)
    run_name: str | None = option(None, "name of the run in report_to; default: output_dir", RESUMABLE)
    plot_loss: bool = option(False, "write training_loss.png", COMMON, RESUMABLE)
    save_strategy: Literal["steps", "epoch", "no"] = option(
        "steps", "when to save; and at the end, but with no", COMMON, RESUMABLE
    )
    save_steps: int | float = option(
        500,
        "updates between checkpoints; below 1: share of the run",
        COMMON,
        RESUMABLE,
        when="save_strategy=steps",
    )
    save_total_limit: int | None = option(None, "keep so many, and the best; 0: all", COMMON, RESUMABLE)
    save_only_model: bool = option(
        False, "no optimizer state in checkpoints: they cannot be resumed", RESUMABLE, also="only_save_model"
    )
    async_save: bool = option(False, "a thread writes checkpoints, from copies in host memory", RESUMABLE)
    evaluation_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "when to evaluate during training; and at the end", COMMON, RESUMABLE, also="eval_strategy"
    )
    eval_steps: int | float | None = option(
        None,
        "updates between evaluations; below 1: share of the run; default: logging_steps",
        COMMON,
        RESUMABLE,
        when="evaluation_strategy=steps",
    )
    load_best_model_at_end: bool = option(False, "finish with the checkpoint that evaluated best", RESUMABLE)
    metric_for_best_model: str | None = option(None, "eval_<set>_loss, ...; else eval_loss or eval_reward")
    greater_is_better: bool | None = option(None, "default: no for losses and perplexities, else yes")
    early_stopping_steps: int | None = option(None, "stop after so many evaluations without gain", RESUMABLE)

    def __post_init__(self):
        missing = "missing; name a folder for the run, for example output_dir=saves/first"
        refuse(not self.output_dir, f"output_dir: {missing}")
        counts = "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
        counts += "early_stopping_steps ddp_timeout"
        require(self, counts, lambda number: 1 <= number < MOST, f"must be at least 1 and below {MOST}")
        whole = "must be a whole number of at least 1, or a share of the run below 1"
        every = "logging_steps save_steps eval_steps"
        require(self, every, lambda count: 0 < count < 1 or (1 <= count < MOST and count % 1 == 0), whole)
        require(self, "save_total_limit", lambda limit: 0 <= limit < MOST, f"is not in [0, {MOST})")
        unknown = "test_oom: nobody knows the texts ahead that this stage learns from"
        refuse(self.test_oom and self.stage in ("ppo", "grpo"), f"{unknown}; plan=true counts max_new_tokens")
        require(self, "seed", lambda seed: 0 <= seed < 2**32, "is not in [0, 2**32)")
        by_epochs = f"must be -1 (num_train_epochs counts), or at least 1 and below {MOST}"
        require(self, "max_steps", lambda steps: steps == -1 or 1 <= steps < MOST, by_epochs)
        require(self, "num_train_epochs", lambda epochs: 0 <= epochs < MOST, f"is not in [0, {MOST})")
        require(self, "neftune_noise_alpha", lambda alpha: 0 <= alpha < math.inf, "must be 0 or more")
        endless = self.max_steps <= 0 and not self.num_train_epochs > 0
        refuse(endless, f"num_train_epochs: {self.num_train_epochs} must be above 0 (or set max_steps)")
        refuse(self.fp16 and self.bf16, "fp16: bf16 is set too; choose one precision")
        refuse(self.pure_bf16 and self.fp16, "pure_bf16: fp16 is set too; choose one precision")
        refuse(self.pure_bf16 and self.bf16, "pure_bf16: bf16 keeps trained weights in fp32; choose one")
        compared = f"the probabilities that updates of stage {self.stage} compare with those of the rollout"
        noisy = self.stage in ("ppo", "grpo") and self.neftune_noise_alpha
        refuse(noisy, f"neftune_noise_alpha: noise would change {compared}; drop it")
        if self.compiles:
            self._check_compilation()
        self._check_prediction()
        self._check_evaluation()

    def _check_prediction(self) -> None:
        texts, stage = self.predict_with_generate, self.stage
        instead = "pt has no prompts to answer, rm gives scores; drop it, or use stage=sft"
        refuse(texts and stage in ("pt", "rm"), f"predict_with_generate: {instead}")
        instead = "in stage pt documents have no prompts to answer; use stage=sft, or do_eval"
        refuse(self.do_predict and stage == "pt", f"do_predict: {instead}")
        unset = self.do_predict and not texts and stage != "rm"
        refuse(unset, "do_predict: the predictions are texts; set predict_with_generate=true")

    def _check_evaluation(self) -> None:
        strategy, best = self.evaluation_strategy, self.load_best_model_at_end
        for key in ("load_best_model_at_end", "early_stopping_steps"):
            blind = getattr(self, key) and strategy == "no"
            refuse(blind, f"{key}: it needs evaluation; set evaluation_strategy=steps or epoch")
        remedy = "the best must have been saved; make save_strategy equal to evaluation_strategy"
        refuse(best and self.save_strategy != strategy, f"load_best_model_at_end: {remedy}")
        save, every = self.save_steps, self.eval_steps or self.logging_steps
        mixed = (save < 1) != (every < 1)
        unseen = mixed or round(save * 1e6) % round(every * 1e6)  # as transformers compares shares
        remedy = "load_best_model_at_end needs each save evaluated, so a multiple of eval_steps"
        refuse(best and strategy == "steps" and unseen, f"save_steps: {remedy}")

    @property
    def trains(self) -> bool:
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    @property
    def only_predicts(self) -> bool:
        return self.do_predict and not (self.trains or self.do_eval)

    def _check_compilation(self) -> None:
        backend, mode = self.torch_compile_backend or "inductor", self.torch_compile_mode
        usual, unknown = ", ".join(list_backends()), backend not in list_backends(exclude_tags=())
        refuse(unknown, f"torch_compile_backend: {backend} is unknown to torch; it has {usual}")
        of_another = f"torch_compile_mode: {mode} is for inductor, not for {backend}; drop one of the two"
        refuse(mode is not None and backend != "inductor", of_another)
        modes = ", ".join(COMPILE_MODES)
        refuse(mode not in (None, *COMPILE_MODES), f"torch_compile_mode: {mode} is not one of {modes}")
        idle = "selective is of no use with torch_compile, which chooses by itself what it keeps"
        wrong = self.recomputation == "selective"
        refuse(wrong, f"gradient_checkpointing: {idle}; set it to none or full")

    @property
    def compiles(self) -> bool:
        """As in the Hugging Face trainer: a backend or a mode alone turns torch.compile on."""
        named = (self.torch_compile_backend, self.torch_compile_mode) != (None, None)
        return self.torch_compile or named

    @property
    def recomputation(self) -> str:
        """One of recompute.POLICIES."""
        if isinstance(self.gradient_checkpointing, bool):
            return "full" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing or "auto"

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16 or self.pure_bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    def what_is_due(self, step: int, total_steps: int, steps_per_epoch: int | None) -> tuple[bool, ...]:
        """-> (log, evaluate, save). The last one is all three where there is a strategy for it."""
        last, ends_epoch = step == total_steps, step % (steps_per_epoch or total_steps) == 0

        def due(strategy: str, every: float) -> bool:
            every = math.ceil(total_steps * every) if every < 1 else every
            in_turn = (strategy == "steps" and step % every == 0) or (strategy == "epoch" and ends_epoch)
            return in_turn or (last and strategy != "no")

        first = step == 1 and self.logging_first_step
        log = due(self.logging_strategy, self.logging_steps) or first or last
        evaluates = due(self.evaluation_strategy, self.eval_steps or self.logging_steps)
        return log, evaluates, due(self.save_strategy, self.save_steps)

    @property
    def services(self) -> tuple[str, ...]:
        all_here = installed() if "all" in self.report_to else ()
        return (*all_here, *(name for name in self.report_to if name not in ("none", "", "all")))

    @property
    def metric(self) -> str:
        name = self.metric_for_best_model or ("reward" if self.stage in ("ppo", "grpo") else "loss")
        return name if name.startswith("eval_") else f"eval_{name}"

    def better(self, value: float, best: float | None) -> bool:
        by_name = not self.metric.endswith(("loss", "perplexity"))
        greater = by_name if self.greater_is_better is None else self.greater_is_better
        return best is None or (value > best if greater else value < best)


@dataclass(frozen=True)
class OptimOptions:
    optim: Literal[
        Literal["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "adamw_bnb_8bit"],
        Literal["paged_adamw_32bit", "paged_adamw_8bit", "lion_8bit", "lion_32bit"],
        Literal["paged_lion_8bit", "paged_lion_32bit"],
    ] = option("adamw_torch", "8bit, paged, lion: bitsandbytes; lion wants 1/3 to 1/10 of the rate", COMMON)
    learning_rate: float = option(5e-5, "peak learning rate", COMMON)
    weight_decay: float = option(0.0, "decay of matrices; norms, biases and other vectors never decay")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment; lion: its part in an update")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment; lion: of its one moment")
    adam_epsilon: float = option(1e-8, "AdamW: added to the square root of the second moment")
    max_grad_norm: float | None = option(1.0, "gradients are scaled down to this norm; 0: never", COMMON)
    optim_in_backward: bool = option(
        False, "update each tensor as soon as its gradient is there: no memory for gradients; one process"
    )
    lr_scheduler_type: Literal[*SCHEDULE_KEYS] = option(
        "linear", "shape of the learning rate; constant has no warm-up", COMMON, also="lr_scheduler"
    )
    lr_scheduler_kwargs: str | None = option(None, 'numbers of the schedule as JSON: {"num_cycles": 2}')
    warmup_steps: float = option(0.0, "updates of warm-up (below 1: share of the run)", COMMON, when=WARMS_UP)
    warmup_ratio: float | None = option(
        0.0, "warm-up as a share of all updates, rounded up; warmup_steps beats it", COMMON, when=WARMS_UP
    )

    def __post_init__(self):
        finite = "learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps"
        require(self, finite, lambda number: 0 <= number < math.inf, "is not a finite number of at least 0")
        require(self, "adam_beta1 adam_beta2", lambda beta: 0 <= beta < 1, "is not in [0, 1)")
        found = f"max_grad_norm: {self.max_grad_norm}, but optim_in_backward never has all gradients at once"
        refuse(self.optim_in_backward and self.max_grad_norm, f"{found}; set max_grad_norm=0, or drop it")
        steps = self.warmup_steps
        share = "is not in [0, 1]; warmup_steps counts updates"
        require(self, "warmup_ratio", lambda ratio: 0 <= ratio <= 1, share)
        broken = steps > 1 and steps != int(steps)
        refuse(broken, f"warmup_steps: {steps} is not a whole number and not a share below 1")
        self.schedule_numbers  # noqa: B018  (raises where they are wrong)

    @cached_property
    def schedule_numbers(self) -> dict[str, Any]:
        """lr_scheduler_kwargs over the schedule's defaults, read once."""
        with located("lr_scheduler_kwargs"):
            return _read_schedule_numbers(self)


def _read_schedule_numbers(options: OptimOptions) -> dict[str, Any]:
    """lr_scheduler_kwargs over the schedule's defaults. Raises UserError for what it does not know."""
    kind, text, example = options.lr_scheduler_type, options.lr_scheduler_kwargs, '{"num_cycles": 2}'
    given = json_reader.parse(text, repr(text), way_out=f"write {example}") if text else {}
    known = SCHEDULE_KEYS[kind]
    for key, value in given.items():
        refuse(key not in known, f"{kind} has no {key!r}; it knows {', '.join(known) or 'none'}")
        if key.endswith("_type"):
            refuse(value not in RAMPS, f"{key}={value!r}; known are {', '.join(RAMPS)}")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            refuse(not number, f"{key}={value!r} is not a number of at least 0")
    numbers = known | given
    for key, value in numbers.items():
        refuse(value is ..., f'{kind} needs {key}; write {{"{key}": 100}}')
    if kind == "cosine_with_min_lr":
        one = (numbers["min_lr"] is None) != (numbers["min_lr_rate"] is None)
        refuse(not one, "cosine_with_min_lr needs min_lr or min_lr_rate, and not both")
    end, rate = numbers.get("lr_end", 0), options.learning_rate
    refuse(kind == "polynomial" and not end < rate, f"lr_end={end} must be below learning_rate={rate}")
    refuse(kind == "inverse_sqrt" and numbers["timescale"] == 0, "timescale=0 must be above 0")
    return numbers

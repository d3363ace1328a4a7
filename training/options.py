"""The options of a run: what is trained for how long, in which precision, and what is logged, saved, evaluated."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of inductor


@dataclass(frozen=True)
class TrainOptions:
    stage: Annotated[
        Literal["pt", "sft", "rm", "dpo", "orpo", "kto", "ppo", "grpo"],
        "pretraining on text, supervised fine-tuning on dialogues, reward model, preferences (dpo, orpo: "
        "pairs; kto: "
        "single answers), reinforcement learning (ppo, grpo)",
    ] = "sft"
    do_train: Annotated[bool | None, "train; default: yes, unless do_eval or do_predict is set"] = None
    do_eval: Annotated[bool, "evaluate once more at the end"] = False
    do_predict: Annotated[
        bool,
        "at the end write generated_predictions.jsonl for the evaluation sets: texts, or in stage rm scores",
    ] = False
    predict_with_generate: Annotated[
        bool, "evaluating and predicting write texts and measure ROUGE, BLEU-4 and exact match"
    ] = False
    output_dir: Annotated[str | None, "folder of the run: checkpoints, logs, the result"] = None
    overwrite_output_dir: Annotated[
        bool, "start anew even if output_dir holds checkpoints to resume from"
    ] = False
    resume_from_checkpoint: Annotated[
        str | None, "a checkpoint folder, true (the newest) or false (start anew)"
    ] = None
    per_device_train_batch_size: Annotated[int, "examples (or packed rows) per device and micro-batch"] = 8
    per_device_eval_batch_size: Annotated[int, "the same for evaluation"] = 8
    gradient_accumulation_steps: Annotated[int, "micro-batches per update"] = 1
    num_train_epochs: Annotated[float, "passes over the data"] = 3.0
    max_steps: Annotated[int, "updates; above 0 it beats num_train_epochs"] = -1
    bf16: Annotated[bool, "bf16 compute, fp32 trainable weights"] = False
    fp16: Annotated[bool, "fp16 compute with loss scaling, fp32 trainable weights"] = False
    pure_bf16: Annotated[bool, "everything in bf16, trainable weights too"] = False
    upcast_layernorm: Annotated[bool | None, "weights of norms in fp32; default: on a quantised base"] = None
    gradient_checkpointing: Annotated[
        bool | Literal["auto", "none", "selective", "full", "offload"],
        "what the backward pass computes again: nothing, norms and activations, whole blocks (true), those "
        "with their "
        "inputs in host memory; auto = as little as memory allows",
    ] = "auto"
    torch_compile: Annotated[
        bool, "compile each block with torch.compile; the kernels fuse most of it already"
    ] = False
    torch_compile_backend: Annotated[
        str | None, "backend of torch.compile, inductor by default; turns it on"
    ] = None
    torch_compile_mode: Annotated[
        str | None, "mode of inductor: default, max-autotune, ...; turns it on too"
    ] = None
    neftune_noise_alpha: Annotated[float | None, "noise on the embeddings while training; 5 is typical"] = (
        None
    )
    plan: Annotated[
        bool, "print the predicted peak memory and the bound on tokens/s, read no weights, and end"
    ] = False
    train_from_scratch: Annotated[
        bool, "random weights; the model folder gives config.json and tokenizer"
    ] = False
    seed: Annotated[int, "seed of adapters, dropout and, without data_seed, of the data order"] = 42
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to train; auto = a GPU if there is one"] = "auto"
    ddp_timeout: Annotated[int, "seconds that ranks wait for one another"] = 1800
    logging_steps: Annotated[int, "updates between log lines"] = 500
    logging_first_step: Annotated[bool, "log the first update too"] = False
    report_to: Annotated[tuple[str, ...], "none, tensorboard, wandb, mlflow"] = ("none",)
    run_name: Annotated[str | None, "name of the run in report_to services; default: output_dir"] = None
    plot_loss: Annotated[bool, "write training_loss.png"] = False
    save_strategy: Annotated[Literal["steps", "epoch", "no"], "when to save; with steps at the end too"] = (
        "steps"
    )
    save_steps: Annotated[int, "updates between checkpoints"] = 500
    save_total_limit: Annotated[int | None, "keep at most this many checkpoints (and the best one)"] = None
    save_only_model: Annotated[bool, "checkpoints without optimizer state; they cannot be resumed"] = False
    evaluation_strategy: Annotated[Literal["no", "steps", "epoch"], "when to evaluate during training"] = "no"
    eval_steps: Annotated[int | None, "updates between evaluations; default: logging_steps"] = None
    load_best_model_at_end: Annotated[bool, "finish with the checkpoint that evaluated best"] = False
    metric_for_best_model: Annotated[
        str | None, "what decides which is best, such as eval_<set>_loss; default: eval_loss, or eval_reward"
    ] = None
    greater_is_better: Annotated[bool | None, "default: no for losses and perplexities, else yes"] = None
    early_stopping_steps: Annotated[int | None, "stop after this many evaluations without a gain"] = None

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(
                "output_dir: missing; name a folder for the run, for example output_dir=saves/first"
            )
        for key in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        for key in ("logging_steps", "save_steps", "eval_steps", "early_stopping_steps", "save_total_limit"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1")
        if self.do_train is False and not (self.do_eval or self.do_predict):
            raise ValueError(
                "do_train: false, and neither do_eval nor do_predict is set, so there is nothing to do"
            )
        if self.compiles:
            self._check_compilation()
        if self.compiles and self.recomputation == "selective":
            raise ValueError(
                "gradient_checkpointing: selective is of no use with torch_compile, which chooses by itself "
                "what it "
                "keeps; set it to none or full"
            )
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: {self.num_train_epochs} must be above 0 (or set max_steps)")

    @property
    def trains(self) -> bool:
        return not (self.do_eval or self.do_predict) if self.do_train is None else self.do_train

    @property
    def only_predicts(self) -> bool:
        return self.do_predict and not (self.trains or self.do_eval)

    def _check_compilation(self) -> None:
        backends = torch.compiler.list_backends(exclude_tags=())
        backend, mode = self.torch_compile_backend or "inductor", self.torch_compile_mode
        if backend not in backends:
            usual = ", ".join(torch.compiler.list_backends())
            raise ValueError(f"torch_compile_backend: {backend} is unknown to torch; it has {usual}")
        if mode is not None and backend != "inductor":
            raise ValueError(
                f"torch_compile_mode: {mode} is for inductor, not for {backend}; drop one of the two"
            )
        if mode not in (None, *COMPILE_MODES):
            raise ValueError(f"torch_compile_mode: {mode} is not one of {', '.join(COMPILE_MODES)}")

    @property
    def compiles(self) -> bool:
        """As in the Hugging Face trainer: a backend or a mode alone turns torch.compile on."""
        return (
            self.torch_compile
            or self.torch_compile_backend is not None
            or self.torch_compile_mode is not None
        )

    @property
    def recomputation(self) -> str:
        """One of recompute.POLICIES."""
        if isinstance(self.gradient_checkpointing, bool):
            return "full" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16 or self.pure_bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def services(self) -> tuple[str, ...]:
        return tuple(name for name in self.report_to if name not in ("none", ""))

    @property
    def metric(self) -> str:
        name = self.metric_for_best_model or ("reward" if self.stage in ("ppo", "grpo") else "loss")
        return name if name.startswith("eval_") else f"eval_{name}"

    def better(self, value: float, best: float | None) -> bool:
        greater = self.greater_is_better
        if greater is None:
            greater = not self.metric.endswith(("loss", "perplexity"))
        return best is None or (value > best if greater else value < best)

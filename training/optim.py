"""Optimizers, parameter groups, learning-rate schedules. Knows torch only; bitsandbytes is loaded on demand.

AdamW (Loshchilov & Hutter, arXiv 1711.05101), Adafactor (arXiv 1804.04235, torch's version), SGD, and
bitsandbytes' AdamW and Lion (arXiv 2302.06675) with state in 8 bits (arXiv 2110.02861) or in paged memory.
The schedules are those of the Hugging Face trainer under the same names, each a pure function of the step: no
scheduler state to save, or to get wrong on resume.

    optimizer = optim.make_optimizer(model, options)
    for step in range(total_steps):                       # step = updates done so far
        optim.set_learning_rate(optimizer, optim.schedule(step, options, total_steps))
        ...backward...
        norm = optim.clip_gradients(model.parameters(), options.max_grad_norm)
        optimizer.step()
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

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
    "warmup_stable_decay": {
        "num_decay_steps": ...,
        "num_stable_steps": None,
        "warmup_type": "linear",
        "decay_type": "cosine",
        "min_lr_ratio": 0.0,
        "num_cycles": 0.5,
    },
}
RAMPS = ("linear", "cosine", "1-sqrt")  # values of warmup_type and decay_type
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # where torch.optim.AdamW has a one-kernel update
BITSANDBYTES_CLASSES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_8bit": "Lion8bit",
    "lion_32bit": "Lion32bit",
    "paged_lion_8bit": "PagedLion8bit",
    "paged_lion_32bit": "PagedLion32bit",
}
ON_CPU = {  # what to take there in place of an optimizer with paged state
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_32bit",
}


@dataclass(frozen=True)
class OptimOptions:
    optim: Annotated[
        Literal[
            "adamw_torch",
            "adamw_torch_fused",
            "sgd",
            "adafactor",
            "adamw_8bit",
            "adamw_bnb_8bit",
            "paged_adamw_32bit",
            "paged_adamw_8bit",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_8bit",
            "paged_lion_32bit",
        ],
        "optimizer; adamw_torch takes the fused kernel where the device has one; 8bit, paged and lion ones "
        "are "
        "bitsandbytes'; lion wants a learning rate of a third to a tenth of AdamW's",
    ] = "adamw_torch"
    learning_rate: Annotated[float, "peak learning rate"] = 5e-5
    weight_decay: Annotated[float, "decay of matrices; norms, biases and other vectors never decay"] = 0.0
    adam_beta1: Annotated[float, "AdamW: decay of the first moment; lion: its part in an update"] = 0.9
    adam_beta2: Annotated[float, "AdamW: decay of the second moment; lion: of its one moment"] = 0.999
    adam_epsilon: Annotated[float, "AdamW: added to the square root of the second moment"] = 1e-8
    max_grad_norm: Annotated[float, "gradients are scaled down to this total norm; 0 = no clipping"] = 1.0
    lr_scheduler_type: Annotated[
        Literal[
            "linear",
            "cosine",
            "cosine_with_restarts",
            "cosine_with_min_lr",
            "polynomial",
            "constant",
            "constant_with_warmup",
            "inverse_sqrt",
            "warmup_stable_decay",
        ],
        "shape of the learning rate over the run; constant has no warm-up",
    ] = "linear"
    lr_scheduler_kwargs: Annotated[str | None, 'numbers of the schedule as JSON: {"num_cycles": 2}'] = None
    warmup_steps: Annotated[float, "updates of warm-up (below 1: share of the run); beats warmup_ratio"] = 0.0
    warmup_ratio: Annotated[float, "warm-up as a share of all updates, rounded up"] = 0.0

    def __post_init__(self):
        for key in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key}: {value} is not a finite number of at least 0")
        for key in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not in [0, 1)")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(
                f"warmup_ratio: {self.warmup_ratio} is not in [0, 1]; warmup_steps counts updates"
            )
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(
                f"warmup_steps: {self.warmup_steps} is not a whole number and not a share below 1"
            )
        schedule_numbers(self)


def schedule_numbers(options: OptimOptions) -> dict[str, Any]:
    """lr_scheduler_kwargs over the schedule's defaults. Raises ValueError for what it does not know."""
    kind, text = options.lr_scheduler_type, options.lr_scheduler_kwargs
    try:
        given = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        example = '{"num_cycles": 2}'
        raise ValueError(
            f"lr_scheduler_kwargs: {text!r} is not JSON ({error.msg}); write {example}"
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f'lr_scheduler_kwargs: {text!r} is not a JSON object; write {{"num_cycles": 2}}')
    known = SCHEDULE_KEYS[kind]
    for key, value in given.items():
        if key not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"lr_scheduler_kwargs: {kind} has no {key!r}; it knows {names}")
        if key.endswith("_type"):
            if value not in RAMPS:
                raise ValueError(f"lr_scheduler_kwargs: {key}={value!r}; known are {', '.join(RAMPS)}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"lr_scheduler_kwargs: {key}={value!r} is not a number of at least 0")
    numbers = {**known, **given}
    missing = [key for key, value in numbers.items() if value is ...]
    if missing:
        raise ValueError(f'lr_scheduler_kwargs: {kind} needs {missing[0]}; write {{"{missing[0]}": 100}}')
    if kind == "cosine_with_min_lr" and (numbers["min_lr"] is None) == (numbers["min_lr_rate"] is None):
        raise ValueError("lr_scheduler_kwargs: cosine_with_min_lr needs min_lr or min_lr_rate, and not both")
    if kind == "polynomial" and not numbers["lr_end"] < options.learning_rate:
        end = numbers["lr_end"]
        raise ValueError(
            f"lr_scheduler_kwargs: lr_end={end} must be below learning_rate={options.learning_rate}"
        )
    if kind == "inverse_sqrt" and numbers["timescale"] == 0:
        raise ValueError("lr_scheduler_kwargs: timescale=0 must be above 0")
    return numbers


def warmup_length(options: OptimOptions, total_steps: int) -> int:
    """Updates of warm-up in a run of total_steps, as the Hugging Face trainer counts them."""
    if options.warmup_steps >= 1:
        return int(options.warmup_steps)
    return math.ceil(total_steps * (options.warmup_steps or options.warmup_ratio))


def schedule(step: int, options: OptimOptions, total_steps: int) -> float:
    """What the learning rate is multiplied by in the update that follows `step` finished ones (0 <= step).

    Equals LambdaLR's factor in transformers.get_scheduler of the same name. Raises ValueError when the phases
    of warmup_stable_decay do not fit into total_steps.
    """
    kind = options.lr_scheduler_type
    if kind == "constant":
        return 1.0
    numbers = schedule_numbers(options)
    warmup = warmup_length(options, total_steps)
    if kind == "warmup_stable_decay":
        return _warmup_stable_decay(step, warmup, total_steps, numbers)
    if step < warmup:
        return step / max(1, warmup)
    return _after_warmup(step, warmup, total_steps, options, numbers)


def _after_warmup(
    step: int, warmup: int, total_steps: int, options: OptimOptions, numbers: dict[str, Any]
) -> float:
    kind = options.lr_scheduler_type
    decay_steps = max(1, total_steps - warmup)
    progress = (step - warmup) / decay_steps
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total_steps - step) / decay_steps)
    if kind == "cosine":
        return max(0.0, _cosine(numbers["num_cycles"] * 2.0 * progress))
    if kind == "cosine_with_restarts":
        return 0.0 if progress >= 1.0 else max(0.0, _cosine((numbers["num_cycles"] * progress) % 1.0))
    if kind == "cosine_with_min_lr":
        floor = numbers["min_lr_rate"]
        if floor is None:
            floor = numbers["min_lr"] / options.learning_rate
        return max(0.0, _cosine(numbers["num_cycles"] * 2.0 * progress) * (1 - floor) + floor)
    if kind == "polynomial":
        peak, end = options.learning_rate, numbers["lr_end"]
        remaining = max(0.0, 1 - progress)
        return ((peak - end) * remaining ** numbers["power"] + end) / peak
    if kind == "inverse_sqrt":
        timescale = numbers["timescale"] or warmup or 10_000  # transformers' default without either
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    raise ValueError(f"lr_scheduler_type: {kind!r} is unknown; known are {', '.join(SCHEDULE_KEYS)}")


def _warmup_stable_decay(step: int, warmup: int, total_steps: int, numbers: dict[str, Any]) -> float:
    """Up, level, down; both ramps end at min_lr_ratio (MiniCPM, arXiv 2404.06395, section 4)."""
    decay, stable, floor = numbers["num_decay_steps"], numbers["num_stable_steps"], numbers["min_lr_ratio"]
    if stable is None:
        stable = total_steps - warmup - decay
    if stable < 0:
        raise ValueError(
            f"lr_scheduler_kwargs: num_decay_steps={decay} and {warmup} warm-up steps do not fit into "
            f"{total_steps} updates"
        )
    if step < warmup:
        progress = step / warmup
        wave, root = 1.0 - _cosine(progress), 1.0 - math.sqrt(1.0 - progress)
        rising = {"linear": progress, "cosine": wave, "1-sqrt": root}
        return max(0.0, rising[numbers["warmup_type"]] * (1.0 - floor) + floor)
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + decay:
        return floor
    progress = (step - warmup - stable) / decay
    wave = _cosine(numbers["num_cycles"] * 2.0 * progress)
    falling = {"linear": 1.0 - progress, "cosine": wave, "1-sqrt": 1.0 - math.sqrt(progress)}
    return max(0.0, falling[numbers["decay_type"]] * (1.0 - floor) + floor)


def _cosine(half_turns: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * half_turns))


def set_learning_rate(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    """Every group's rate = its own peak rate * multiplier (groups may differ in their peak)."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as one group that decays and one that does not; an empty group is left out.

    Matrices decay (weights, embeddings, LoRA's A and B). Norms, biases and every other vector do not; that is
    the Hugging Face trainer's rule, extended to vectors that are neither norm nor bias (DoRA's magnitudes).
    A tied parameter comes once. Groups hold (name, parameter) pairs, so a saved state carries the names.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter; call lora.prepare_trainable first")
    decayed = [(name, p) for name, p in named if _decays(name, p)]
    spared = [(name, p) for name, p in named if not _decays(name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and "bias" not in name.rpartition(".")[2]


def make_optimizer(model: nn.Module, options: OptimOptions) -> torch.optim.Optimizer:
    """The optimizer over model's trainable parameters. Raises ValueError where the device cannot run it."""
    groups = parameter_groups(model, options.weight_decay)
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    adam = {"betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon}
    kind, lr = options.optim, options.learning_rate
    if kind in ("adamw_torch", "adamw_torch_fused"):
        # one kernel in place of a dozen passes over the state: 5 times as fast on a CPU, as repeatable
        fused = kind == "adamw_torch_fused" or all(p.device.type in FUSED_DEVICES for p in parameters)
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=fused, **adam)
    elif kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr)
    elif kind == "adafactor":
        optimizer = torch.optim.Adafactor(groups, lr=lr)
    elif kind in BITSANDBYTES_CLASSES:
        optimizer = _bitsandbytes_optimizer(model, groups, options, adam)
    else:
        names = ", ".join(["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", *BITSANDBYTES_CLASSES])
        raise ValueError(f"optim: {kind!r} is unknown; known are {names}")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _bitsandbytes_optimizer(model, groups, options: OptimOptions, adam) -> torch.optim.Optimizer:
    name = options.optim
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"optim: {name} needs bitsandbytes ({error}); pip install bitsandbytes") from error
    on_cpu = any(p.device.type == "cpu" for group in groups for _, p in group["params"])
    if on_cpu and name in ON_CPU:
        raise ValueError(
            f"optim: {name} pages state out of GPU memory, but the parameters are on the CPU; use "
            f"{ON_CPU[name]}"
        )
    if "lion" in name:
        del adam["eps"]
    optimizer_class = getattr(bitsandbytes.optim, BITSANDBYTES_CLASSES[name])
    optimizer = optimizer_class(groups, lr=options.learning_rate, **adam)
    if name.endswith("8bit"):
        _keep_embeddings_in_fp32(optimizer, model)
    return optimizer


def _keep_embeddings_in_fp32(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Embedding rows see gradients of very uneven size, unstable in 8 bits (arXiv 2110.02861, 2.3).

    bitsandbytes' own override is one table per process keyed by position, which a second optimizer would
    inherit; state that exists before the first step is used as it is, so the fp32 state is made here.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            weight = module.weight
            moments = ("state1",) if "Lion" in type(optimizer).__name__ else ("state1", "state2")
            buffers = {key: optimizer.get_state_buffer(weight, torch.float32) for key in moments}
            optimizer.state[weight] = {"step": 0, **buffers}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Bring back what optimizer.state_dict() gave. Paged state is paged again: bitsandbytes alone would put
    all of it into GPU memory, and the run that fitted before would not fit any more."""
    optimizer.load_state_dict(state)
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, values in optimizer.state.items():
        for key in ("state1", "state2"):
            if key in values:
                buffer = optimizer.get_state_buffer(parameter, values[key].dtype)
                if parameter.is_cuda:
                    torch.cuda.synchronize(
                        parameter.device
                    )  # the zeros of the new buffer are written by then
                buffer.copy_(values[key])
                values[key] = buffer


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place to a total 2-norm of at most max_norm (0: unchanged); returns the norm before.

    Stays on the device: no host synchronisation. A norm that is not finite makes the gradients so; the loop
    finds it.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if max_norm > 0:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters])

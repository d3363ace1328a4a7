"""Learning-rate schedules: those of the Hugging Face trainer under the same names, each a pure function
of the step, so there is no scheduler state to save, or to get wrong on resume.

    rate = options.learning_rate * schedule(step, options, total_steps)        # step = updates done so far
"""

import math

from options.errors import UserError
from training.options import SCHEDULE_KEYS, OptimOptions


def warmup_length(options: OptimOptions, total_steps: int) -> int:
    """Updates of warm-up in a run of total_steps, as the Hugging Face trainer counts them."""
    if options.warmup_steps >= 1:
        return int(options.warmup_steps)
    return math.ceil(total_steps * (options.warmup_steps or options.warmup_ratio or 0.0))


def schedule(step: int, options: OptimOptions, total_steps: int) -> float:
    """What the learning rate is multiplied by in the update that follows `step` finished ones (0 <= step).

    Equals LambdaLR's factor in transformers.get_scheduler of the same name. Raises ValueError when the phases
    of warmup_stable_decay do not fit into total_steps.
    """
    kind = options.lr_scheduler_type
    if kind == "constant":
        return 1.0
    numbers = options.schedule_numbers
    warmup = warmup_length(options, total_steps)
    if kind == "warmup_stable_decay":
        return _warmup_stable_decay(step, warmup, total_steps, numbers)
    if step < warmup:
        return step / max(1, warmup)
    return _after_warmup(step, warmup, total_steps, options, numbers)


def _after_warmup(step: int, warmup: int, total_steps: int, options: OptimOptions, numbers: dict) -> float:
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
        floor, least = numbers["min_lr_rate"], numbers["min_lr"]
        floor = least / options.learning_rate if floor is None else floor
        return max(0.0, _cosine(numbers["num_cycles"] * 2.0 * progress) * (1 - floor) + floor)
    if kind == "polynomial":
        peak, end = options.learning_rate, numbers["lr_end"]
        remaining = max(0.0, 1 - progress)
        return ((peak - end) * remaining ** numbers["power"] + end) / peak
    if kind == "inverse_sqrt":
        timescale = numbers["timescale"] or warmup or 10_000  # transformers' default without either
        return 1.0 / math.sqrt((step + timescale - warmup) / timescale)
    raise ValueError(f"lr_scheduler_type: {kind!r} is unknown; known are {', '.join(SCHEDULE_KEYS)}")


def _warmup_stable_decay(step: int, warmup: int, total_steps: int, numbers: dict) -> float:
    """Up, level, down; both ramps end at min_lr_ratio (MiniCPM, arXiv 2404.06395, section 4)."""
    decay, stable, floor = numbers["num_decay_steps"], numbers["num_stable_steps"], numbers["min_lr_ratio"]
    stable = total_steps - warmup - decay if stable is None else stable
    if stable < 0:
        phases = f"num_decay_steps={decay} and {warmup} warm-up steps"
        raise UserError(f"lr_scheduler_kwargs: {phases} do not fit into {total_steps} updates")
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

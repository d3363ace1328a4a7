"""What an evaluation measures on every set over all ranks: numbers of the stage, and of generated texts."""

import itertools
import math
import time

import torch

from model import Decoder
from options.errors import StopRun, fitting, refuse
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Batch, BatchLoader
from stages.rollouts import Prompt
from stages.stage import Stage
from training.options import TrainOptions
from training.predict import Predictor, join


def prepare(batch: Batch | list[Prompt], device: torch.device) -> Batch | list[Prompt]:
    """What the host can do for a batch before its turn; a stage that draws prompts makes batches of them."""
    if not isinstance(batch, Batch):
        return batch
    batch = batch.rounded(ROW_MULTIPLE[device.type])
    return batch.pinned() if device.type == "cuda" else batch


@fitting("a batch of the evaluation", "lower per_device_eval_batch_size or cutoff_len")
@torch.no_grad()
def measure(
    model: Decoder, stage: Stage, loaders: dict[str, BatchLoader], predictor: Predictor | None, world, look
) -> tuple[dict[str, float], list[dict]]:
    """(numbers named eval_..., speed among them; what the predictor wrote). The model's mode stays.
    look: called between batches on all ranks; may raise."""
    was_training, started, rows = model.training, time.monotonic(), []
    model.eval()
    try:
        results = of_the_stage(model, stage, loaders, world, look)
        if predictor is not None:
            generated, rows = predictor.run(model, "eval", look)
            # the stage's own stays: grpo has an exact_match too, of final answers
            results |= generated | results
    finally:
        model.train(was_training)
    seconds = time.monotonic() - started
    speed = sum(len(loader.store) for loader in loaders.values()) / seconds
    return results | {"eval_runtime": round(seconds, 4), "eval_samples_per_second": round(speed, 3)}, rows


def of_the_stage(model: Decoder, stage: Stage, loaders: dict[str, BatchLoader], world: World, look) -> dict:
    """eval_<metric>, the mean over the sets; of several sets eval_<set>_<metric> too. In the model's mode."""
    measured: dict[str, dict[str, float]] = {}
    for name, loader in loaders.items():
        batches = itertools.islice(loader.batches(), loader.batches_per_epoch)
        ready = (look() or prepare(batch, world.device) for batch in batches)
        measured[name] = stage.evaluate(model, ready, world)
        for kind, value in measured[name].items():
            if not math.isfinite(value):
                remedy = "lower learning_rate, or use bf16 instead of fp16"
                raise StopRun(f"the evaluation's {kind} on {name} is {value}; {remedy}")
    results = join(measured, "eval", digits=None)
    if len(measured) > 1 and "perplexity" in stage.evaluation_names:
        results["eval_perplexity"] = math.exp(min(results["eval_loss"], 700))  # of the mean loss
    return results


def check_metric(
    options: TrainOptions, stage: type[Stage], sets: dict[str, BatchLoader], generated: tuple[str, ...]
) -> None:
    """UserError when what decides which is best is not measured.  generated: metrics of generated texts."""
    prefixes = [f"eval_{name}_" for name in sets] if len(sets) > 1 else []
    kinds = (*stage.evaluation_names, *generated)
    names = [prefix + kind for prefix in (*prefixes, "eval_") for kind in kinds]
    unmeasured = options.evaluation_strategy != "no" and options.metric not in names
    there = f"there are {', '.join(names)}"
    refuse(unmeasured, f"metric_for_best_model: {options.metric} is not measured; {there}")

"""The plot of a run: loss and metrics as logged, smoothed, and as evaluated."""

import math
from pathlib import Path

# The plot's panels: what is written at the axis, and the metrics drawn there if a run has them
PANELS = {
    "rewards of the answers": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "accuracy": ("rewards/accuracies", "accuracy", "exact_match"),
    "reward": ("reward",),
    "KL to the reference (nats)": ("kl",),
    "length of an answer (tokens)": ("completions/mean_length",),
}


def smooth(values: list[float]) -> list[float]:
    """Exponential smoothing with weight 1.8 (sigmoid(0.05 n) - 0.5), LLaMA-Factory's rule for its plots."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed, last = [], values[0] if values else 0.0
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def plot_history(history: list[dict], path: Path) -> None:
    """Draw the loss over the steps, and a panel for each kind of metric that `history` holds; see PANELS."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {key for entry in history for key in entry}
    panels = {label: drawn for label, kinds in PANELS.items() if (drawn := _curves(names, kinds))}
    panels = {"loss" if panels else "loss (nats per token)": _curves(names, ("loss",))} | panels
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (8, 4.5) if columns == 1 else (11, 3.4 * rows)  # inches of 100 pixels
    figure = Figure(figsize=size, layout="constrained")
    axes_of = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (label, drawn) in zip(axes_of, panels.items()):
        for color, name in enumerate(drawn):
            _draw(axes, history, name, f"C{color}")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if drawn:
            axes.legend(fontsize="small")
    for axes in axes_of[len(panels) :]:
        axes.set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _curves(names: set[str], kinds: tuple[str, ...]) -> list[str]:
    """These metrics among the names of a history: of the training, then of each evaluation set."""
    found = [kind for kind in kinds if kind in names]
    for kind in kinds:
        found += sorted(name for name in names if name.startswith("eval_") and name.endswith(f"_{kind}"))
    return found


def _draw(axes, history: list[dict], name: str, color: str) -> None:
    """A metric of the training pale and smoothed, of an evaluation with its points."""
    steps, values = zip(*[(entry["step"], entry[name]) for entry in history if name in entry])
    if name.startswith("eval_"):
        axes.plot(steps, values, "o-", color=color, markersize=4, label=name)
    else:
        axes.plot(steps, values, color=color, alpha=0.35, label=name)
        axes.plot(steps, smooth(list(values)), color=color, label=f"{name}, smoothed")

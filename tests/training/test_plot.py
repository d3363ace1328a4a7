"""The plot of a run: its curves, its panels, its smoothing."""

import struct
import zlib

import pytest

from training.plot import plot_history, smooth


def pixels(path) -> tuple[int, int, bytes]:
    """Width, height, and the unfiltered-enough bytes of a PNG."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    place, packed = 8, b""
    while place < len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        packed += data[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    return width, height, zlib.decompress(packed)


def test_the_plot_shows_the_curves(tmp_path):
    history = [{"step": step, "loss": 5 / step} for step in range(1, 60)]
    evaluations = [{"step": step, "eval_a_loss": 3.0, "eval_b_loss": 2.0} for step in (20, 40)]
    for name, entries in (("empty", []), ("train", history), ("both", history + evaluations)):
        plot_history(entries, tmp_path / f"{name}.png")
    drawn = {name: pixels(tmp_path / f"{name}.png") for name in ("empty", "train", "both")}
    assert drawn["train"][:2] == (800, 450)
    assert len({content for _, _, content in drawn.values()}) == 3


def drawn_panels(history, monkeypatch, path) -> dict[str, list[str]]:
    """Label of the axis -> what the legend names, of every panel that can be seen."""
    from matplotlib.figure import Figure

    kept = []
    subplots = Figure.subplots
    monkeypatch.setattr(
        Figure, "subplots", lambda *args, **keys: kept.append(subplots(*args, **keys)) or kept[-1]
    )
    plot_history(history, path)
    seen = [axes for axes in kept[0].flatten() if axes.get_visible()]
    return {axes.get_ylabel(): [text.get_text() for text in axes.get_legend().get_texts()] for axes in seen}


def test_the_plot_has_a_panel_for_each_kind_of_metric(tmp_path, monkeypatch):
    names = (
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
    )
    history = [{"step": step, **dict.fromkeys(names, float(step)), "grad_norm": 1.0} for step in (1, 2, 3)]
    history += [{"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": 0.6, "eval_runtime": 1.0}]
    panels = drawn_panels(history, monkeypatch, tmp_path / "pairs.png")
    assert list(panels) == ["loss", "rewards of the answers", "accuracy"]
    assert panels["accuracy"] == [
        "rewards/accuracies",
        "rewards/accuracies, smoothed",
        "eval_rewards/accuracies",
    ]
    assert panels["loss"] == ["loss", "loss, smoothed", "eval_loss"]
    history = [{"step": 1, "loss": 1.0, "reward": 2.0, "kl": 0.1, "completions/mean_length": 30.0}]
    history += [{"step": 1, "eval_reward": 2.5, "eval_some_reward": 2.0, "eval_kl": 0.2}]
    panels = drawn_panels(history, monkeypatch, tmp_path / "ppo.png")
    assert panels["reward"] == ["reward", "reward, smoothed", "eval_reward", "eval_some_reward"]
    assert len(panels) == 4 and pixels(tmp_path / "ppo.png")[:2] == (1100, 680)


def test_smoothing_is_llama_factorys():
    assert smooth([]) == [] and smooth([3.0]) == [3.0]
    scalars = [5.0, 1.0, 4.0, 2.0]
    weight = 1.8 * (1 / (1 + 2.718281828459045 ** (-0.05 * 4)) - 0.5)
    last, expected = scalars[0], []
    for value in scalars:
        last = last * weight + (1 - weight) * value
        expected.append(last)
    assert smooth(scalars) == pytest.approx(expected)

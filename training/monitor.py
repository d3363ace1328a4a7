"""What a person and a machine see of a run: progress bar, log lines, trainer_log.jsonl, results, plot.

Only rank 0 makes a Monitor that writes. File names and keys are the ones the ecosystem knows (LLaMA-Factory's
trainer_log.jsonl, the Hugging Face trainer's log_history and all_results.json).
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from options import json_reader
from options.atomic import atomic_file
from options.errors import UserError, harmless, say
from training.plot import plot_history
from training.trackers import Services

ALL_RESULTS = "all_results.json"
LOG_FILE, PLOT_FILE, SAMPLES_FILE = "trainer_log.jsonl", "training_loss.png", "generated_samples.jsonl"
SAMPLES, SAMPLE_CHARACTERS = 3, 300  # generated texts shown at an evaluation, and of each so much
QUIET_SECONDS = 30  # without a terminal: a line at least this often, so that a log file shows life
# How a number is shown on the console, by its name without eval_; others in four digits, or in the files only
SHOWN = {"loss": "loss {:.4f}", "learning_rate": "lr {:.1e}", "grad_norm": "grad {:.2f}"}
SHOWN |= {"tokens_per_second": "{:.0f} tok/s", "peak_memory": "{:.2f} GB", "loss_scale": "scale {:.0f}"}
SHOWN |= {"accuracy": "accuracy {:.2f}", "rewards/accuracies": "accuracy {:.2f}"}
SHOWN |= {"rewards/chosen": "chosen {:.3f}", "rewards/rejected": "rejected {:.3f}", "kl": "kl {:.3f}"}
SHOWN |= {"rewards/margins": "margin {:.3f}", "exact_match": "exact match {:.3f}", "reward": "reward {:.3f}"}
SHOWN |= {"completions/mean_length": "length {:.1f}", "completions/clipped_ratio": "cut off {:.2f}"}
SHOWN |= {"clip_ratio": "clipped {:.2f}", "clip_ratio/region_mean": "clipped {:.2f}"}
SHOWN |= {"reward_std": "reward std {:.3f}", "frac_reward_zero_std": "equal {:.2f}"}
IN_FILES_ONLY = frozenset(
    """generated_tokens_per_second logps/chosen logps/rejected logits/chosen logits/rejected kl_coef values
    returns approx_kl value_clip_ratio clip_ratio/low_mean clip_ratio/high_mean""".split()  # noqa: SIM905
)


class Monitor:
    """Collects the numbers of one run. `history` is the Hugging Face trainer's log_history."""

    def __init__(
        self, folder: Path, services: tuple[str, ...], run_name: str, active: bool, window=None, settings=None
    ):
        """services: of trackers.TRACKERS.  window: a MetricWindow, what was done since the last log line.
        settings: the options of the run, for the services."""
        self.folder, self.active, self.run_name, self.window = folder, active, run_name, window
        self.service_names, self.services, self.settings = services, Services(()), settings or {}
        self.unwritten: dict[str, bytes] = {}  # of each log, what there was no room for
        self.history: list[dict] = []
        self.bar: tqdm | None = None

    def begin(self, step: int, total_steps: int, history: list[dict], seconds_before: float) -> None:
        """Start after `step` updates, made by earlier processes in seconds_before; open bar and services.

        What the logs say beyond `step` is of updates that will be done again, or of another run: it goes.
        """
        self.total_steps, self.history = total_steps, list(history)
        self.steps_before, self.seconds_before = step, seconds_before
        self.started_at = self.spoke_at = time.monotonic()
        if not self.active:
            return
        for name in (LOG_FILE, SAMPLES_FILE):
            _cut_log(self.folder / name, step, self._say)
        self.services = Services(self.service_names, self.folder, self.run_name, step, self.settings)
        # in a pipe the bar and the lines would overwrite each other; None: closed when the program started
        if all(stream is not None and stream.isatty() for stream in (sys.stderr, sys.stdout)):
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def seconds(self) -> float:
        """Of training, over all processes that worked on this run."""
        return self.seconds_before + time.monotonic() - self.started_at

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update()
        elif self.active and time.monotonic() - self.spoke_at > QUIET_SECONDS:
            self._say(f"step {step}/{self.total_steps}  {clock(self._remaining(step))} left")

    def log(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """One line for the reader, one JSON object for machines, one entry for trainer_state.json."""
        self.history.append({**values, "epoch": round(epoch, 4), "step": step})
        if not self.active:
            return
        remaining, percentage = clock(self._remaining(step)), round(100 * step / max(self.total_steps, 1), 2)
        entry = {"current_steps": step, "total_steps": self.total_steps}
        if "rewards/accuracies" in values:  # LLaMA-Factory's name for what trl calls so
            entry["accuracy"] = values["rewards/accuracies"]
        entry |= values | {"epoch": round(epoch, 4), "percentage": percentage}
        entry |= {"elapsed_time": clock(self.seconds()), "remaining_time": remaining}
        self._append(LOG_FILE, json.dumps(entry) + "\n")
        self.services.log(values, step)
        if self.bar is not None and "loss" in values:
            rate = f"{values['tokens_per_second']:.0f} tok/s"
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate}", refresh=False)
        self._say(_line(step, self.total_steps, values) + (f"  {remaining} left" if "loss" in values else ""))

    def show_samples(self, step: int, rows: list[dict]) -> None:
        """Some of the generated texts, from all over the rows: here and in generated_samples.jsonl."""
        if not self.active or not rows:
            return
        count = min(SAMPLES, len(rows))
        shown = [rows[i * len(rows) // count] for i in range(count)]
        for row in shown:
            self._append(SAMPLES_FILE, json.dumps({"current_steps": step, **row}, ensure_ascii=False) + "\n")
            self._say("\n".join(f"  {name:8} {_excerpt(name, text)}" for name, text in row.items()))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        for name in self.unwritten:
            self._append(name, "")
        self.services.close()

    def _append(self, name: str, line: str) -> None:
        """At the end of this log; what a full disk has no room for is written with a later line."""
        waiting, before = self.unwritten.get(name, b""), bool(self.unwritten.get(name))
        waiting += line.encode("utf-8", "backslashreplace")
        try:
            with open(self.folder / name, "ab", buffering=0) as file:
                while waiting:
                    waiting = waiting[file.write(waiting) :]
        except OSError as error:
            if not before:
                self._say(
                    f"note: {self.folder / name}: {error.strerror}; its lines wait, and the run goes on"
                )
        self.unwritten[name] = waiting

    def _say(self, text: str) -> None:
        self.spoke_at = time.monotonic()
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                self.bar.write(text)
        else:
            say(text)

    def _remaining(self, step: int) -> float:
        """Seconds, at the pace of this process."""
        done = step - self.steps_before
        return (time.monotonic() - self.started_at) / done * (self.total_steps - step) if done else 0.0

    def show_results(self, name: str, results: dict[str, float]) -> None:
        if self.active:
            self._say("  ".join(f"{kind} {value:.4f}" for kind, value in results.items()))
        self.save_results(name, results)

    def save_results(self, name: str, results: dict) -> None:
        """Write <name>_results.json and merge it into all_results.json."""
        if not self.active:
            return
        write_json(self.folder / f"{name}_results.json", results)
        write_json(self.folder / ALL_RESULTS, read_results(self.folder, self._say) | results)

    def plot(self) -> None:
        """training_loss.png: loss and metrics as logged, smoothed, and as evaluated."""
        if self.active:
            plot_history(self.history, self.folder / PLOT_FILE)


def _excerpt(name: str, text: str | None) -> str:
    """On one line, without what could steer a terminal: the end of a prompt, the beginning of an answer."""
    if text is None:
        return "(none)"
    dots = "..." * (len(text) > SAMPLE_CHARACTERS)
    part = dots + text[-SAMPLE_CHARACTERS:] if name == "prompt" else text[:SAMPLE_CHARACTERS] + dots
    return harmless(json.dumps(part, ensure_ascii=False))


def read_results(folder: Path, tell: Callable[[str], None] = say) -> dict:
    """all_results.json, {} if there is none; one that is damaged is told of, and counts as none."""
    path = folder / ALL_RESULTS
    try:
        return json_reader.read(path, nan=True)
    except FileNotFoundError:
        return {}
    except UserError:
        tell(f"note: {path}: damaged, so what earlier runs wrote there is lost")
        return {}


def _cut_log(path: Path, step: int, tell: Callable[[str], None]) -> None:
    """Keep the lines up to `step`; one that is damaged is told of."""
    if not path.exists():
        return
    kept, damaged = [], []
    # not splitlines(), which also splits at characters that a generated text may hold
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines if step else (), start=1):
        try:
            entry = json_reader.parse(line or "{}", "", nan=True)
            if line and entry["current_steps"] <= step:
                kept.append(line + "\n")
        except (UserError, KeyError, TypeError):  # as the last one when the process was killed
            damaged.append(str(number))
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    if damaged:
        tell(f"note: {path}: damaged in line {', '.join(damaged[:8])}, which is left out")


def write_json(path: Path, value: object) -> None:
    """The file is complete or the old one is still there."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _line(step: int, total: int, values: dict[str, float]) -> str:
    """step 40/500  loss 1.2031  lr 1.9e-04  grad 0.71  412 tok/s  1.3 GB"""
    parts = [f"step {step}/{total}"]
    for name, value in values.items():
        kind = name.removeprefix("eval_")
        if kind not in IN_FILES_ONLY:
            shown = SHOWN.get(kind, kind + " {:.4f}").format(value)
            parts.append(("eval_" if kind != name else "") + shown)
    return "  ".join(parts)


def clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

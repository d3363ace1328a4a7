"""docs/benchmarks.md out of bench/results/*.json: every number of the documentation stands in a result file.

    python bench/document.py            # writes docs/benchmarks.md
    python bench/document.py check      # exit status 1 if it is not what the results say

A result file has a renderer by the beginning of its name (RENDERERS); one without is an error: no result
stays unsaid. The machine is shared, so only numbers of one run compare.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `python bench/document.py` from [bench/results](../bench/results); do not edit. Each section is one
run of one command on one machine, systems taking turns; machines are shared, so only ratios within a section
mean something. How time is taken: [bench/README.md](../bench/README.md). There is no result of a GPU yet: no
file, no claim.
"""


def table(columns: list[str], rows: list[list[object]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, whole from 100 on."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x"


def training(result: dict) -> list[str]:
    """Systems beside ours on the same batches: speed, peak memory, largest difference of a loss."""
    rows = []
    for shape, systems in result.get("shapes", {"": result}).items():
        systems = systems.get("systems", systems)
        ours = systems["anvil"]
        for name, system in systems.items():
            if isinstance(system, dict) and "tokens_per_second" in system:
                baseline = ours if not name.startswith("anvil") else None
                rows.append([
                    shape or "equal", name, number(system["tokens_per_second"]),
                    " to ".join(map(number, system["spread"])), number(system["peak_gb"]),
                    ratio(ours["tokens_per_second"], system["tokens_per_second"]) if baseline else "",
                    ratio(ours["peak_gb"], system["peak_gb"]) if baseline else "",
                ])  # fmt: skip
    columns = ["work", "system", "tokens/s", "spread", "peak GB", "Anvil's speed", "Anvil's memory"]
    return table(columns, rows)


def rollouts(result: dict) -> list[str]:
    ours = result["systems"]["anvil"]
    rows = [
        [name, number(system["texts_per_second"]), number(system["peak_gb"])]
        + [ratio(ours[key], system[key]) for key in ("texts_per_second", "peak_gb")]
        for name, system in result["systems"].items()
    ]
    return table(["system", "texts/s", "peak GB", "Anvil's speed", "Anvil's memory"], rows)


def decoding(result: dict) -> list[str]:
    ours = result["systems"]["anvil"]["tokens_per_second"]
    rows = [
        [name, number(system["tokens_per_second"]), " to ".join(map(number, system["spread"]))]
        + [ratio(ours, system["tokens_per_second"]), f"{system['equal_tokens']:.0%}"]
        for name, system in result["systems"].items()
    ]
    work = f"Prompt of {result['prompt']}, {result['new']} new tokens, batch {result['batch']}, "
    columns = ["system", "answers' tokens/s", "spread", "Anvil's speed", "equal tokens"]
    return [f"{work}{result['dtype']}.", "", *table(columns, rows)]


def quality(result: dict) -> list[str]:
    rows = [
        [row["format"], number(row.get("bits"), 4), number(row.get("model MB")), number(row["perplexity"], 4)]
        + ["" if row.get("change") is None else f"{row['change']:+.2%}", number(row.get("KL"))]
        for row in result["rows"]
    ]
    text = f"{result['text']}, {result['tokens']:,} tokens, SmolLM2-135M computed in fp32."
    return [
        text,
        "",
        *table(["format", "bits a weight", "model MB", "perplexity", "change", "KL to fp32"], rows),
    ]


def planned(result: dict) -> list[str]:
    names = ["case", "predicted GiB", "measured GiB", "predicted / measured", "bound tok/s", "measured tok/s"]
    rows = [[row["case"], *(number(row[name]) for name in names[1:])] for row in result["rows"]]
    return table(names, rows)


def stages(result: dict) -> list[str]:
    rows = [
        [
            row["case"],
            row["metric"],
            number(row["before"]),
            number(row["after"]),
            f"{row['train_seconds'] / 60:.0f}",
        ]
        + [number(row["peak_memory_gb"]), f"`{row['command']}`"]
        for row in result["rows"]
    ]
    return table(["stage", "held-out metric", "before", "after", "minutes", "peak GB", "command"], rows)


def llamafactory(result: dict) -> list[str]:
    ours = result["systems"]["anvil"]
    rows = [
        [name, number(system["seconds"]), " to ".join(map(number, system["spread"]))]
        + [ratio(system["seconds"], ours["seconds"]), number(system["peak_gb"]), system["last_loss"]]
        for name, system in result["systems"].items()
    ]
    columns = ["system", "seconds", "spread", "over Anvil's", "peak GB", "last loss"]
    return [result["work"], "", *table(columns, rows)]


def examples(result: dict) -> list[str]:
    """LLaMA-Factory's example files whose options are refused, and the first reason."""
    revision = f" at {result['revision']}" if result["revision"] else ""
    text = (
        f"The options of {result['accepted']} of {result['total']} example files of LLaMA-Factory{revision} "
    )
    text += "for text are accepted as they are. The others:"
    rows = [[name, reason] for name, reason in result["files"].items() if reason]
    return [text, "", *table(["file", "first reason"], rows)]


def curves(result: dict) -> list[str]:
    """How far losses of ranks are from those of one process."""
    one, rows = result["losses"]["one"], []
    for name, losses in result["losses"].items():
        processes, options = result["ways"][name]
        apart = max(abs(mine - other) for mine, other in zip(losses, one))
        rows.append(
            [name, processes, f"`{options}`" if options else "", number(losses[-1], 7), f"{apart:.1e}"]
        )
    columns = ["run", "processes", "options", "last loss", "largest difference to one process"]
    text = f"{len(one)} updates: `{result['keys']}`. [All curves](../bench/results/parallel_curves.png)."
    return [text, "", *table(columns, rows)]


RENDERERS = {
    "parallel_": curves,
    "train_": training,
    "preference_": training,
    "ppo_": rollouts,
    "decode_": decoding,
    "prefill_": decoding,
    "quality_": quality,
    "plan_": planned,
    "stages_": stages,
    "llamafactory_examples": examples,  # before the next, which begins the same
    "llamafactory": llamafactory,
}


def section(path: Path) -> list[str]:
    """A heading, the command and machine, the table."""
    result = json.loads(path.read_text(encoding="utf-8"))
    renderer = next((function for start, function in RENDERERS.items() if path.name.startswith(start)), None)
    if renderer is None:
        raise SystemExit(f"{path}: no renderer in bench/document.py for results of this name")
    about = result if "command" in result else result["machine"]
    facts = [f"`{about['command']}` at commit {about['commit'][:12]}"]
    facts += [about[key] for key in ("machine", "cpu", "gpu") if about.get(key)]
    versions = about.get("versions") or {key: about[key] for key in ("torch",) if key in about}
    facts += [f"{name} {version}" for name, version in versions.items()]
    title = path.stem.replace("_", " ")
    note = [about["note"], ""] if about.get("note") else []
    link = f"[{path.name}](../bench/results/{path.name})"
    return [f"## {title}", "", f"{', '.join(facts)}. Raw: {link}.", "", *note, *renderer(result), ""]


def render() -> str:
    parts = [line for path in sorted(RESULTS.glob("*.json")) for line in section(path)]
    return "\n".join([HEAD, *parts])


def main(argv: list[str]) -> int:
    text = render()
    if argv == ["check"]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

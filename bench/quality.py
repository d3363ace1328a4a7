"""What each quantised format costs in quality and saves in memory: perplexity, KL and bits a weight on a
text.

    python bench/quality.py                             # SmolLM2-135M on wiki_demo.txt, all formats, minutes
    python bench/quality.py only=nf4 tokens=2048 out=bench/results

The parent is the model in fp32. Each format quantises it while it is read, GPTQ by export.py (calibrated on
c4_demo, another text than the one it is judged by; 32 windows of 512 tokens); the child computes in fp32 too,
so that nothing but the weights differs (LLM.int8 also rounds what it multiplies). bits: of the linears in the
blocks, from their tensors; model MB: those, and embedding and norms at 16 bits.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import quant  # noqa: E402
from bench import measure  # noqa: E402
from checkpoints.huggingface import load_model  # noqa: E402
from conversion import quality  # noqa: E402
from quant import QuantOptions  # noqa: E402
from quant.linear import QuantLinear  # noqa: E402
from text.tokenizer import Tokenizer  # noqa: E402

FORMATS = {  # options of quantisation while reading
    "nf4, double": QuantOptions(4),
    "nf4": QuantOptions(4, double_quantization=False),
    "fp4, double": QuantOptions(4, quantization_type="fp4"),
    "fp4": QuantOptions(4, quantization_type="fp4", double_quantization=False),
    "hqq 8": QuantOptions(8, "hqq"),
    "hqq 4": QuantOptions(4, "hqq"),
    "hqq 3": QuantOptions(3, "hqq"),
    "hqq 2": QuantOptions(2, "hqq"),
    "LLM.int8": QuantOptions(8),
    "int8 weights (eetq)": QuantOptions(8, "eetq"),
}
GPTQ_BITS = (8, 4, 3)
DEFAULTS = {
    "model": "models/SmolLM2-135M-Instruct",
    "text": "data/wiki_demo.txt",
    "tokens": "8192",
    "window": "1024",
}
DEFAULTS |= {
    "calibration": "c4_demo",
    "samples": "32",
    "length": "512",
    "device": "cpu",
    "only": "",
    "out": "",
}


def main(argv: list[str]) -> int:
    options = measure.read_options(argv, DEFAULTS, __doc__)
    device = torch.device(options["device"])
    folder = Path(options["model"])
    tokens = int(options["tokens"])
    texts = quality.windows(Tokenizer.from_folder(folder), options["text"], int(options["window"]), tokens)
    parent = load_model(folder, torch.float32, device)
    rows = [{"format": "fp32", "perplexity": quality.perplexity(parent, texts)}]
    wanted = [name for name in (*FORMATS, *(f"gptq {bits}" for bits in GPTQ_BITS)) if options["only"] in name]
    for name in wanted:
        rows.append(judge(name, parent, texts, options, device))
        print(measure.table([show(row) for row in rows]), flush=True)
    if options["out"]:
        command = "python bench/quality.py " + " ".join(argv)
        report = {"text": options["text"], "tokens": sum(map(len, texts)), "rows": rows}
        machine = measure.describe_machine(device, command)
        machine.pop("note", None)  # of smoke tests on a CPU: this is none
        measure.save("quality", machine, report, options["out"])
    return 0


def judge(name: str, parent, texts, options: dict[str, str], device: torch.device) -> dict:
    """One format beside the parent."""
    if name in FORMATS:
        child = load_model(
            options["model"], torch.float32, device, quantization=quant.from_options(FORMATS[name])
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            child = load_model(
                by_gptq(name.removeprefix("gptq "), Path(folder), options), torch.float32, device
            )
    difference = quality.compare(parent, child, texts)
    layers = [module for module in child.modules() if isinstance(module, QuantLinear)]
    held = sum(layer.storage_bytes for layer in layers)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    others = sum(parameter.numel() for parameter in child.parameters())
    return {
        "format": name,
        "bits": 8 * held / weights,
        "model MB": (held + 2 * others) / 1e6,
        "perplexity": math.exp(difference.child_loss),
        "change": difference.perplexity_change,
        "KL": difference.kl,
    }


def by_gptq(bits: str, folder: Path, options: dict[str, str]) -> Path:
    """The model quantised by export.py."""
    words = [f"model_name_or_path={options['model']}", f"export_dir={folder / 'model'}"]
    words += [f"export_quantization_bit={bits}", f"export_quantization_dataset={options['calibration']}"]
    words += [
        f"export_quantization_nsamples={options['samples']}",
        f"export_quantization_maxlen={options['length']}",
    ]
    done = subprocess.run([sys.executable, "export.py", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"export.py {' '.join(words)} failed:\n{done.stderr[-2000:]}")
    return folder / "model"


def show(row: dict) -> dict[str, str]:
    digits = {"bits": 3, "model MB": 1, "perplexity": 3, "KL": 5}
    text = {key: f"{row[key]:.{places}f}" if key in row else "" for key, places in digits.items()}
    change = f"{100 * row['change']:+.2f}%" if "change" in row else ""
    return {"format": row["format"], **text, "change": change}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

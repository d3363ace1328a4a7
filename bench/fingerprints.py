"""Fingerprints of a tree: what its programs compute and write, so that a refactor can show it kept all.

    python bench/fingerprints.py tree=/tmp/old model=models/SmolLM2-135M-Instruct out=before.json
    python bench/fingerprints.py tree=. model=models/SmolLM2-135M-Instruct out=after.json
    python bench/fingerprints.py compare=before.json,after.json     # a line an entry; status 1 if one differs
    python bench/fingerprints.py ... only=sft_lora,dpo              # either, of these cases

A case is one run of the tree's own train.py, chat.py or export.py, on the tree's data, with one thread and no
GPU. All goes through the command line, so it does not matter how a tree is laid out inside. An entry is a
series of numbers of trainer_log.jsonl in full precision (no clocks, no memory), the sha256 of a file that
the run left, or the text that chat.py printed. Paths of this run are replaced in a file before it is hashed.
Another processor or torch adds in another order, so take both fingerprints on one machine: there, two of the
same tree are equal to the bit.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from bench.measure import commit, cpu_name, read_options  # noqa: E402

LAYERS = 4  # of the cut model
TRAINING = (
    "stage=sft dataset=alpaca_en_demo max_samples=64 cutoff_len=96 per_device_train_batch_size=2 seed=7 "
    "max_steps=10 logging_steps=1 finetuning_type=lora lora_rank=8 learning_rate=5e-4 save_strategy=no"
)
WRITING = "temperature=1.0 top_p=1.0 top_k=0"
SUMS = "59 + 63 = 122\n15 + 43 = 58\n"  # before each question of `additions`, as in configs/grpo_lora.yaml
ASKING = "prompt='Tell me a story about a fox and a crow.' do_sample=false max_new_tokens=24 device=cpu"

# Name -> program, model, keys. {model} is the whole model, {cut} its first layers (losses are high, but bits
# tell as much), {<an earlier case>} what that one wrote. For train.py TRAINING has the keys not given here.
CASES = {
    "sft_lora": "train.py {model} gradient_accumulation_steps=2 lora_dropout=0.05 val_size=4 "
    "evaluation_strategy=steps eval_steps=5",
    "sft_dora": "train.py {cut} use_dora=true gradient_accumulation_steps=2",
    "sft_full": "train.py {cut} finetuning_type=full gradient_checkpointing=full",
    "sft_freeze": "train.py {cut} finetuning_type=freeze num_layer_trainable=1 packing=true",
    "sft_bf16": "train.py {cut} bf16=true per_device_train_batch_size=1 cutoff_len=48",  # slow on many CPUs
    "sft_qlora": "train.py {cut} quantization_bit=4 gradient_accumulation_steps=2",
    "pt": "train.py {cut} stage=pt finetuning_type=full dataset=c4_demo packing=true",
    "dpo": "train.py {cut} stage=dpo dataset=dpo_en_demo template=chatml",
    "orpo": "train.py {cut} stage=orpo dataset=dpo_en_demo template=chatml",
    "kto": "train.py {cut} stage=kto dataset=kto_en_demo gradient_accumulation_steps=2",
    "rm": "train.py {cut} stage=rm dataset=dpo_en_demo template=chatml",
    # five draws of texts, two updates on each; the whole model, because equal rewards would teach nothing
    "ppo": "train.py {model} stage=ppo template=chatml cutoff_len=40 reward_file=data/rewards/length.py "
    f'ppo_epochs=2 max_new_tokens=12 stop=\'[".", ","]\' {WRITING}',
    "grpo": "train.py {model} stage=grpo dataset=additions template=empty cutoff_len=64 num_generations=4 "
    "reward_file=data/rewards/maths.py num_iterations=2 max_new_tokens=6 "
    f"default_system='{SUMS}' stop='[\"\\n\"]' {WRITING}",
    "chat_float32": f"chat.py {{model}} infer_dtype=float32 {ASKING}",
    "chat_bfloat16": f"chat.py {{model}} infer_dtype=bfloat16 {ASKING}",
    "chat_nf4": f"chat.py {{model}} quantization_bit=4 {ASKING}",
    "chat_adapter": f"chat.py {{model}} adapter_name_or_path={{sft_lora}} infer_dtype=float32 {ASKING}",
    "chat_score": "chat.py {rm} prompt='What is 2 + 2?' score='It is 4.' device=cpu",
    "export_merged": "export.py {model} adapter_name_or_path={sft_lora}",
    "export_dora": "export.py {cut} adapter_name_or_path={sft_dora} infer_dtype=bfloat16",
    "export_gptq": "export.py {cut} export_quantization_bit=4 export_quantization_dataset=c4_demo.jsonl "
    "export_quantization_nsamples=8 export_quantization_maxlen=128 export_quantization_group_size=64",
    "export_nf4": "export.py {cut} quantization_bit=4",
    "export_nf4_adapter": "export.py {cut} adapter_name_or_path={sft_qlora} quantization_bit=4",
    "export_gguf_f16": "export.py {cut} adapter_name_or_path={sft_dora} export_gguf_type=F16",
    "export_gguf_q8_0": "export.py {cut} export_gguf_type=Q8_0",
    "export_gguf_q4_k": "export.py {cut} export_gguf_type=Q4_K",
}
# Files of a run that hold clocks, or all keys that there are: no results
NOT_HASHED = re.compile(r"run_config\.yaml|trainer_log\.jsonl|trainer_state\.json|\w+_results\.json")
NOT_COMPARED = re.compile(r".*(per_second|runtime|_time|peak_memory)|current_steps|total_steps|percentage")
DEFAULTS = {"tree": "", "model": "", "out": "", "only": "", "compare": ""}


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    chosen = options["only"].split(",") if options["only"] else list(CASES)
    if set(chosen) - CASES.keys():
        raise SystemExit(f"only={options['only']}: cases are {', '.join(CASES)}")
    if options["compare"]:
        before, after = (json.loads(Path(name).read_text()) for name in options["compare"].split(","))
        return compare(before, after, chosen)
    if not (options["tree"] and options["model"] and options["out"]):
        raise SystemExit("give tree, model and out, or compare; --help says more")
    tree, model = Path(options["tree"]).resolve(), Path(options["model"]).resolve()
    return take(tree, model, Path(options["out"]), chosen)


# Taking


def take(tree: Path, model: Path, out: Path, chosen: list[str]) -> int:
    """Run the chosen cases, and write `out` after each. Gives the exit status: 1 if a program failed."""
    taken = {"tree": commit(tree), "machine": machine(), "entries": {}}
    wanted = set(chosen).union(*(needs(name) for name in chosen))
    with tempfile.TemporaryDirectory(prefix="fingerprints-") as name:
        home = Path(name).resolve()
        folders = {case: home / case for case in CASES} | {"model": model, "cut": home / "cut"}
        paths = {str(home): "HOME", str(model): "MODEL", str(tree): "TREE"}  # the model may lie in the tree
        cut_layers(model, folders["cut"])
        for case in (case for case in CASES if case in wanted):
            printed = run(tree, home, [word.format(**folders) for word in words_of(case)])
            if printed is None:
                continue
            taken["entries"][case] = entries(folders[case], printed, paths)
            print(f"{case}: {len(taken['entries'][case])} entries", flush=True)
            out.write_text(json.dumps(taken, indent=1) + "\n", encoding="utf-8")
    failed = [case for case in CASES if case in wanted and case not in taken["entries"]]
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def needs(case: str) -> set[str]:
    """Earlier cases whose folders this one reads."""
    return {field for _, field, _, _ in string.Formatter().parse(CASES[case])} & CASES.keys()


def words_of(case: str) -> list[str]:
    """The command line of a case, its folders not filled in yet."""
    program, model, *words = shlex.split(CASES[case])
    usual = shlex.split(TRAINING) if program == "train.py" else []
    keys = dict(word.split("=", 1) for word in [*usual, f"model_name_or_path={model}", *words])
    target = {"train.py": "output_dir", "export.py": "export_dir"}.get(program)
    if target:
        keys[target] = f"{{{case}}}"
    return [program, *(f"{key}={value}" for key, value in keys.items())]


def run(tree: Path, home: Path, words: list[str]) -> str | None:
    """What the tree's program printed; None, and its messages shown, if it failed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"XDG_CACHE_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    print(f"{shlex.join(command)}\nended with status {done.returncode}:\n{done.stderr[-2000:]}", flush=True)
    return None


def entries(folder: Path, printed: str, paths: dict[str, str]) -> dict[str, object]:
    """Name -> value of all that a case is known by; without a folder that is what the program printed."""
    if not folder.is_dir():
        return {"text": printed}
    found: dict[str, object] = {}
    log = folder / "trainer_log.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        for name, value in json.loads(line).items():
            if not NOT_COMPARED.fullmatch(name):
                found.setdefault(name, []).append(value)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not NOT_HASHED.fullmatch(path.name):
            found[str(path.relative_to(folder))] = hash_file(path, paths)
    return found


def hash_file(path: Path, paths: dict[str, str]) -> str:
    content = path.read_bytes()
    if path.suffix not in (".safetensors", ".gguf"):
        for place, name in paths.items():
            content = content.replace(place.encode(), name.encode())
    return hashlib.sha256(content).hexdigest()


def cut_layers(model: Path, target: Path) -> None:
    """The model's first layers, its embedding and its head, as a model folder."""
    target.mkdir()
    tensors = {}
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.name != "model.safetensors.index.json" and path.is_file():
            shutil.copyfile(path, target / path.name)
    layers = {name: re.match(r"model\.layers\.(\d+)\.", name) for name in tensors}
    kept = {name: tensors[name] for name, found in layers.items() if found is None or int(found[1]) < LAYERS}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, str]:
    processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "python": sys.version.split()[0], "processor": processor}


# Comparing


def compare(before: dict, after: dict, chosen: list[str]) -> int:
    """Print a line for each entry of the chosen cases. Gives the exit status: 1 if one differs."""
    print(f"{before['tree']} against {after['tree']}")
    for name, value in before["machine"].items():
        if after["machine"][name] != value:
            print(f"note: {name} was {value}, is {after['machine'][name]}; that alone can change numbers")
    count = different = 0
    for case in chosen:
        old, new = (side["entries"].get(case, {}) for side in (before, after))
        for name in dict.fromkeys([*old, *new]) or ["(nothing taken)"]:
            verdict = difference(old.get(name), new.get(name))
            print(f"{case} {name}: {verdict or 'equal'}")
            count, different = count + 1, different + bool(verdict)
    print(f"{count} entries, {different} different")
    return 1 if different else 0


def difference(before: object, after: object) -> str:
    """What differs, in words; nothing if they are equal. None: this side has no such entry."""
    if before is None or after is None:
        missing = "both" if before == after else "before" if before is None else "after"
        return f"MISSING in {missing}"
    if repr(before) == repr(after):  # not ==, for which a NaN differs from itself
        return ""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        places = [place for place, pair in enumerate(zip(before, after)) if repr(pair[0]) != repr(pair[1])]
        first = f"{before[places[0]]!r} -> {after[places[0]]!r}"
        return f"DIFFERS in {len(places)} of {len(before)} values, first in number {places[0] + 1}: {first}"
    return f"DIFFERS: {before!r} -> {after!r}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

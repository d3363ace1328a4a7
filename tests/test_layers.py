"""The picture of the parts holds: who may import whom, what is never imported, and imports that do nothing else."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only from a strictly lower layer; a new file gets its line here and in the README's picture.
LAYERS = {
    "option_values": 0,
    "option_rules": 0,
    "kernels": 0,
    "parallel": 0,
    "host_memory": 0,
    "prefetch": 0,
    "sampling": 0,
    "recompute": 0,
    "tokenizer": 0,
    "batches": 0,
    "readers": 0,
    "mixing": 0,
    "jinja_template": 0,
    "tool_formats": 0,
    "text_metrics": 0,
    "gguf_tokenizer": 0,
    "gguf_format": 0,
    "hub": 0,
    "tensor_files": 0,
    "answers": 0,
    "option_names": 1,
    "gguf_vocabulary": 1,
    "quant": 1,
    "optim": 1,
    "templates": 1,
    "sources": 1,
    "token_store": 1,
    "runs": 1,
    "monitor": 1,
    "value_head": 1,
    "config": 2,
    "architectures": 2,
    "one_row": 2,
    "formats": 2,
    "data_report": 2,
    "model": 3,
    "encoding": 3,
    "gguf_export": 4,
    "lora": 4,
    "streaming": 4,
    "tokenising": 4,
    "token_steps": 4,
    "heads": 4,
    "calibrate": 5,
    "data": 5,
    "generate": 5,
    "adapter_files": 5,
    "memory": 5,
    "objectives": 5,
    "reward_model": 6,
    "checkpoint": 6,
    "plan": 6,
    "rollouts": 6,
    "requantise": 6,
    "reference": 7,
    "rewards": 7,
    "inference": 7,
    "quality": 7,
    "predict": 7,
    "merging": 7,
    "preference": 8,
    "kto": 8,
    "grpo": 8,
    "ppo": 8,
    "stages": 9,
    "build": 10,
    "train": 11,
    "chat": 11,
    "export": 11,
    "import_gguf": 11,
}
KERNEL_LAYERS = {  # within kernels/: the operations know at most each other's products, the choice knows all
    "launch": 0,
    "linear": 0,
    "byte_linear": 1,
    "attention": 2,
    "attention_by_products": 1,
    "cross_entropy": 1,
    "decode_attention": 1,
    "gated_mlp": 1,
    "lora_linear": 1,
    "nf4": 1,
    "norms": 1,
    "layer_norm": 2,
    "rms_norm": 2,
    "rope": 1,
    "attention_rivals": 3,
    "flash_attention": 3,
    "__init__": 4,
}
QUANT_LAYERS = {  # within quant/: no format knows another
    "gptq_solver": 0,
    "linear": 0,
    "grouped": 1,
    "aqlm": 1,
    "hqq": 1,
    "int8": 1,
    "nf4": 1,
    "awq": 2,
    "gptq": 2,
    "__init__": 3,
}
INSIDE = {"kernels": KERNEL_LAYERS, "quant": QUANT_LAYERS}  # folders that are one part, and their own layers
ORACLES = {"transformers", "peft", "trl", "accelerate", "deepspeed"}  # for tests/ and bench/ only
ONLY_IN = {"gguf": {"import_gguf.py", "gguf_export.py"}}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FILES = sorted([*ROOT.glob("*.py"), *(path for folder in INSIDE for path in ROOT.glob(f"{folder}/*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree):
    """Dotted names that a file imports, wherever in the file; `from kernels import x` also gives kernels.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree):
    """(dotted name, node) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_file_has_a_layer_and_every_layer_a_file():
    modules = {path.stem for path in ROOT.glob("*.py")} | set(INSIDE)
    assert modules == set(LAYERS), "add the new file to LAYERS, or take the old one out"
    for folder, layers in INSIDE.items():
        assert {path.stem for path in ROOT.glob(f"{folder}/*.py")} == set(layers)


def test_the_readme_draws_every_file_in_its_layer():
    picture = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How it fits together")[2].split("```")[1]
    drawn = {}  # layer -> words
    for line in picture.splitlines():
        layer, *words = re.findall(r"\w+", line) or [""]
        drawn.setdefault(layer, set()).update(words)
    assert not [name for name, layer in LAYERS.items() if name not in drawn.get(str(layer), ())]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_from_lower_layers(path):
    folder = path.parent.name if path.parent.name in INSIDE else None
    own = LAYERS[folder or path.stem]
    for name in imports(tree_of(path)):
        first, *rest = name.split(".")
        if first == folder:
            if rest and rest[0] in INSIDE[folder]:
                assert INSIDE[folder][rest[0]] < INSIDE[folder][path.stem], f"imports {name}"
        elif first in LAYERS:
            assert LAYERS[first] < own, f"layer {own} imports {name} of layer {LAYERS[first]}"
        assert first not in ("tests", "bench")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_runtime_needs_none_of_the_packages_it_is_compared_with(path):
    for name in imports(tree_of(path)):
        first = name.partition(".")[0]
        assert first not in ORACLES
        assert path.name in ONLY_IN.get(first, {path.name}), f"{name} belongs into {ONLY_IN[first]}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_unpickled_or_made_from_text(path):
    tree = tree_of(path)
    assert not PICKLES & {name.partition(".")[0] for name in imports(tree)}
    for name, node in calls(tree):
        assert name not in ("exec", "eval", "inspect.getsource"), f"line {node.lineno}"
        if name in ("torch.load", "np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            key, value = ("weights_only", "True") if name == "torch.load" else ("allow_pickle", "False")
            assert given.get(key, "False") == value, f"line {node.lineno}: {name} may run code"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_of_another_module_is_replaced(path):
    """No `module.name = ...`: what a module means does not depend on who imported it."""
    tree = tree_of(path)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute):
                root = ast.unparse(target).partition(".")[0]
                assert root not in imported, f"line {node.lineno}: {ast.unparse(target)}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_environment_is_read_when_asked_not_at_import(path):
    """kernels/__init__.py reads its override once, in a function of its own."""
    for statement in tree_of(path).body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
            assert "os.environ" not in ast.unparse(statement) and "getenv" not in ast.unparse(statement)


WATCH = """
import importlib, json, os, random, sys, threading, warnings
import numpy, safetensors.torch, tokenizers, torch, tqdm, yaml, jinja2, gguf, huggingface_hub  # theirs is not looked at

seen, allowed = [], ("__pycache__", ".pyc")
WATCHED = ("socket.", "subprocess.", "shutil.", "os.system", "os.fork", "os.mkdir", "os.rename", "os.remove")

def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not any(part in str(path) for part in allowed):
            seen.append(f"opens {path} for writing")
    elif event.startswith(WATCHED) and not any(part in str(arguments) for part in allowed):
        seen.append(f"{event} {arguments}"[:200])

def state():
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "threads": threading.active_count(),
        "torch seed": torch.get_rng_state().tolist(),
        "torch threads": torch.get_num_threads(),
        "torch dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "random": str(random.getstate()),
        "numpy": str(numpy.random.get_state()),
        "warnings": len(warnings.filters),
        "cuda": torch.cuda.is_initialized(),
    }

sys.path.insert(0, os.getcwd())
sys.addaudithook(watch)
for name in MODULES:
    before = state()
    importlib.import_module(name)
    after = state()
    for key in before:
        if before[key] != after[key]:
            seen.append(f"import {name} changes: {key}")
    if seen:
        print(json.dumps({name: seen}))
        seen.clear()
"""


def test_importing_a_module_does_nothing_else():
    """No output, file, process, connection, thread, seed, setting or environment variable. The script above tells."""
    modules = sorted(LAYERS, key=LAYERS.get)
    script = f"MODULES = {modules}\n{WATCH}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert not found
    assert not run.stderr


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer == max(LAYERS.values())])
def test_a_script_runs_only_when_it_is_started(name):
    last = tree_of(ROOT / f"{name}.py").body[-1]
    assert isinstance(last, ast.If) and "__name__ == '__main__'" in ast.unparse(last.test)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_what_it_is_and_is_plain_text(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert ast.get_docstring(tree_of(path))

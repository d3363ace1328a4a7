"""The picture of the parts holds: who may import whom, what is never imported, and imports that do nothing
else."""

import ast
import fnmatch
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

import kernels
import quant
from architectures import FAMILIES, LINES
from stages import STAGES
from training import optimizers
from training.options import OptimOptions

ROOT = Path(__file__).resolve().parent.parent

# The import rule: a room, or a file of the root, imports only from lower rows; inside a room there is no
# circle.
ROWS = {
    "options": 0,
    "kernels": 1,
    "evaluation": 1,
    "parallel": 2,
    "architectures": 3,
    "quant": 3,
    "text": 3,
    "model": 4,
    "templates": 4,
    "lora": 5,
    "pipeline": 5,
    "data": 6,
    "checkpoints": 6,
    "generation": 6,
    "stages": 7,
    "conversion": 8,
    "training": 8,
    "train": 9,
    "chat": 9,
    "export": 9,
}
PROGRAMS = [name for name, row in ROWS.items() if row == 9]
ROOT_FILES = sorted(f"{name}.py" for name in (*PROGRAMS, "model", "lora", "data", "templates"))
ROOMS = [name for name in ROWS if f"{name}.py" not in ROOT_FILES]
ORACLES = {"transformers", "peft", "trl", "accelerate", "deepspeed"}  # for tests/ and bench/ only
ONLY_IN = {"gguf": {"checkpoints/gguf/", "conversion/gguf/"}}
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py"))])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree):
    """Dotted names that a file imports, wherever in the file; `from kernels import x` also gives
    kernels.x."""
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


def room_of(path):
    """The room of a file, or its own name at the root."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_at_work(path):
    """Names that the file imports; what main() of data.py and templates.py imports inside itself is a
    program's."""
    tree = tree_of(path)
    if path.name in ("data.py", "templates.py") and path.parent == ROOT:
        tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    return list(imports(tree))


def test_the_root_holds_what_is_run_and_edited_first_and_every_room_has_a_row():
    assert [path.name for path in sorted(ROOT.glob("*.py"))] == ROOT_FILES
    others = {"configs", "data", "docs", "bench", "tests", "models", "saves"}
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - others
    assert folders == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_from_lower_rows(path):
    own = room_of(path)
    for name in imported_at_work(path):
        first = name.partition(".")[0]
        assert first not in ("tests", "bench")
        if first in ROWS and first != own:
            assert ROWS[first] < ROWS[own], f"row {ROWS[own]} imports {name} of row {ROWS[first]}"


MAIN_PATH = ["train.py", "model.py", "architectures/layers.py", "lora.py", "stages/stage.py", "stages/sft.py"]
MAIN_PATH.append("kernels/gated_mlp.py")


def lines_of(path):
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_the_main_path_is_read_in_one_sitting():
    assert sum(map(lines_of, MAIN_PATH)) <= 1400
    budgets = {"train.py": 330, "model.py": 320, "lora.py": 380}
    assert {name: lines_of(name) for name, most in budgets.items() if lines_of(name) > most} == {}


def test_no_file_is_longer_than_a_reader_holds():
    assert {name: lines_of(name) for name in NAMES if lines_of(name) > (600 if "/" in name else 400)} == {}
    assert sum(map(lines_of, NAMES)) <= 30900
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) <= 160 and max(map(len, readme)) <= 110


def test_the_formatter_is_left_alone_for_few_tables_only():
    texts = [path.read_text(encoding="utf-8") for path in FILES]
    assert sum(text.count("# fmt: skip") for text in texts) <= 20
    assert not any("# fmt: off" in text for text in texts)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_opens_with_its_catalogue(room):
    """At most 25 lines that name every file of the room, and its folders."""
    catalogue = ast.get_docstring(tree_of(ROOT / room / "__init__.py"))
    assert len(catalogue.splitlines()) <= 25
    parts = {
        path.stem
        for path in (ROOT / room).iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = [part for part in parts - {"__init__"} if not re.search(rf"\b{part}\b", catalogue)]
    assert not missing


def exceptions():
    """The README's table: (what is typed, the files where that is defined)."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| you type | you open |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    return [(typed, re.findall(r"`([^`]+)`", opened)) for typed, opened in rows]


def accepted_values():
    """(key, value, file where it is defined) of all that the law speaks of."""
    for stage, kind in STAGES.items():
        yield "stage", stage, kind.__module__
    for optim in typing.get_args(typing.get_type_hints(OptimOptions)["optim"]):
        yield "optim", optim, optimizers.file_of(optim).__name__
    for method in {*quant.METHODS, *quant.QUANTISERS}:
        yield "quantization_method", method, quant.METHODS[method].__name__
    for name in FAMILIES:
        yield "architectures", name, next(line.__name__ for line in LINES if name in line.FAMILIES)
    for recipe in ROOT.glob("configs/*.yaml"):
        yield "recipe", recipe.stem, STAGES[yaml.safe_load(recipe.read_text())["stage"]].__module__
    for name, function in vars(kernels).items():
        own = callable(function) and not name.startswith("_") and function.__module__ == "kernels"
        if own and name not in ("choices", "require_attention"):  # these two tell and refuse
            yield "kernel", name, None


def test_the_value_you_type_is_the_file_you_open():
    """For every accepted value, up to the README's exceptions, which are few and true."""
    table = exceptions()
    assert 0 < len(table) <= 8
    listed = {word: files for typed, files in table for word in re.findall(r"`([^`]+)`", typed)}
    folders = {"stage": "stages", "recipe": "stages", "optim": "training/optimizers", "kernel": "kernels"}
    folders |= {"quantization_method": "quant", "architectures": "architectures"}
    operations = sorted((path.stem for path in ROOT.glob("kernels/*.py")), key=len)
    used = set()
    for key, value, module in accepted_values():
        name = value
        if key == "recipe":
            name = value.partition("_")[0]
        elif key == "architectures":
            name = value.lower().removesuffix("forcausallm").rstrip("0123456789_")
        elif key == "kernel":  # its name holds that of the operation
            name = ([stem for stem in operations if stem in value] or [value])[-1]
        expected = f"{folders[key]}/{name}.py"
        row = next((word for word in listed if fnmatch.fnmatchcase(value, word)), None)
        used.add(row)
        for file in listed.get(row, [expected]):
            assert (ROOT / file).is_file(), f"{key}: {value}: there is no {file}"
            actual = None if module is None else module.replace(".", "/") + ".py"
            assert actual in (None, file), f"{key}: {value} is defined in {actual}, not {file}"
    assert set(listed) == used - {None}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("room", ROOMS)
def test_inside_a_room_no_file_imports_in_a_circle_nor_from_its_own_catalogue(room):
    files = {module_of(path): path for path in FILES if room_of(path) == room}
    edges = {
        name: {other for other in imports(tree_of(path)) if other in files} for name, path in files.items()
    }
    for name, others in edges.items():
        if "." in name:  # `from kernels import launch` names the room only to reach a file of it
            for node in ast.walk(tree_of(files[name])):
                if isinstance(node, ast.ImportFrom) and node.module == room:
                    taken = [alias.name for alias in node.names if f"{room}.{alias.name}" not in files]
                    assert not taken, f"{name} imports {taken} from its own room's __init__"
        others -= {room, name}  # a package names itself to reach its files
    done: set[str] = set()

    def visit(name, way):
        assert name not in way, f"a circle: {' -> '.join([*way, name])}"
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_runtime_needs_none_of_the_packages_it_is_compared_with(path):
    for name in imports(tree_of(path)):
        first = name.partition(".")[0]
        assert first not in ORACLES
        place = str(path.relative_to(ROOT))
        assert first not in ONLY_IN or place.startswith(tuple(ONLY_IN[first])), f"{name} belongs elsewhere"


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
def test_json_is_read_by_the_one_reader(path):
    """But what the program itself has just written: a library's state, a message between the ranks."""
    place = str(path.relative_to(ROOT))
    own = ("options/json_reader.py", "text/tokenizer.py", "text/stream.py", "parallel/world.py")
    tree = tree_of(path)
    assert not {"orjson", "ujson", "simplejson", "json.loads", "json.load"} & set(imports(tree))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert place in own or not {"json.loads", "json.load", "json.JSONDecoder"} & names


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
import numpy, safetensors.torch, tokenizers, torch, tqdm, yaml, jinja2, gguf, huggingface_hub  # not looked at
import torch.distributed.checkpoint, torch.distributed.tensor

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
    """No output, file, process, connection, thread, seed, setting or environment variable. The script above
    tells."""
    modules = [module_of(path) for path in sorted(FILES, key=lambda path: ROWS[room_of(path)])]
    script = f"MODULES = {modules}\n{WATCH}"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert not found
    assert not run.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_script_runs_only_when_it_is_started(name):
    last = tree_of(ROOT / f"{name}.py").body[-1]
    assert isinstance(last, ast.If) and "__name__ == '__main__'" in ast.unparse(last.test)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_says_what_it_is_and_is_plain_text(path):
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    assert ast.get_docstring(tree_of(path))

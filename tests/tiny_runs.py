"""What tests of training share: a tiny random model, small data, and train.py called with keys.

with tiny_runs(folder) as tiny:                        # model, tokenizer and data, made once
    status = tiny.train("out", learning_rate=1e-2)     # train.main in this process, output_dir=<folder>/out
"""

import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_tokenizers import make_tokenizer

import train
from checkpoints.huggingface import random_model, save_model
from training import run_folder

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 720,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "hidden_act": "silu",
    "dtype": "float32",
}
WORDS = "the hammer sings upon an anvil while blue sparks fly and 12 smiths count to seven".split(" ")  # noqa: SIM905


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions and answers of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        length = int(torch.randint(1, most, (), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return [{"instruction": words(9), "output": words(14)} for _ in range(count)]


class TinyRuns:
    def __init__(self, folder: Path):
        self.folder = folder
        self.model = self.make_model("model", seed=1)
        self.data = folder / "rows.json"
        self.data.write_text(json.dumps(make_rows(19)))
        (folder / "few.json").write_text(json.dumps(make_rows(5, seed=7)))
        (folder / "text.txt").write_text("".join(row["output"] + "\n" for row in make_rows(12, seed=3)))

    def make_model(self, name: str, seed: int, **changes) -> Path:
        folder = make_tokenizer(self.folder / name, "chatml")
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        save_model(random_model(folder, torch.float32, "cpu", seed), folder, None)
        return folder

    def words(self, name: str, **keys) -> list[str]:
        """Command line of a short LoRA run with output_dir=<folder>/<name>; keys replace and add, None
        removes."""
        chosen = {
            "model_name_or_path": self.model,
            "dataset": self.data,
            "template": "chatml",
            "output_dir": self.folder / name,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "cutoff_len": 128,
        }
        chosen |= keys
        return [f"{key}={value}" for key, value in chosen.items() if value is not None]

    def train(self, name: str, **keys) -> int:
        return train.main(self.words(name, **keys))

    def child(self, name: str, file_limit: int | None = None, **keys) -> "Child":
        """The same in a process of its own, output in <folder>/<name>.txt."""
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache")}
        return fork(
            train.main, (self.words(name, **keys),), self.folder / f"{name}.txt", environment, file_limit
        )

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        folder = self.folder / name
        file = (
            "adapter_model.safetensors"
            if (folder / "adapter_model.safetensors").exists()
            else "model.safetensors"
        )
        return load_file(folder / file)

    def log(self, name: str) -> list[dict]:
        return [
            json.loads(line) for line in (self.folder / name / "trainer_log.jsonl").read_text().splitlines()
        ]

    def losses(self, name: str, key: str = "loss") -> dict[int, float]:
        return {entry["current_steps"]: entry[key] for entry in self.log(name) if key in entry}

    def results(self, name: str) -> dict:
        return json.loads((self.folder / name / "all_results.json").read_text())

    def checkpoints(self, name: str) -> list[int]:
        return sorted(int(path.name.rpartition("-")[2]) for path in (self.folder / name).glob("checkpoint-*"))


@contextmanager
def tiny_runs(folder: Path) -> Iterator[TinyRuns]:
    """A TinyRuns whose caches of tokenised data stay in its folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    yield TinyRuns(folder)
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


def assert_same_weights(mine: dict, other: dict, tolerance: float = 0.0) -> None:
    """tolerance 0: bit-identical."""
    assert mine.keys() == other.keys()
    for name in mine:
        if tolerance == 0.0:
            assert torch.equal(mine[name], other[name]), name
        else:
            torch.testing.assert_close(mine[name], other[name], rtol=0, atol=tolerance, msg=name)


def assert_same_checkpoint(mine: Path, other: Path) -> None:
    """The same files with the same bytes, but for times, and for the order of the notes in the header of a
    safetensors file, which is drawn by chance."""
    names = [[str(path.relative_to(each)) for path in files_below(each)] for each in (mine, other)]
    assert names[0] == names[1]
    for name in names[0]:
        if name not in ("run_config.yaml", "checksums.json"):
            assert _content(mine / name) == _content(other / name), name


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _content(path: Path) -> object:
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        return json.loads(content[8:end]), content[end:]
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    return _plain(json.loads(path.read_text())) if path.name == "trainer_state.json" else path.read_bytes()


def _plain(value: object) -> object:
    """Without times, and tensors as bytes."""
    if isinstance(value, dict):
        passing = ("seconds", "runtime", "per_second", "peak_memory", "best_model_checkpoint")
        return {key: _plain(each) for key, each in value.items() if not str(key).endswith(passing)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if torch.is_tensor(value):
        return value.dtype, repr(value.tolist())
    return repr(value)  # a NaN is not itself


# Processes of their own, forked from one server that has imported train.py: 0.3 s each in place of 4 s


def run_child(
    function, arguments: tuple, output: str, environment: dict[str, str], file_limit: int | None
) -> None:
    """In the child: stdout and stderr go to a file; what the function gives is the exit status."""
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(function(*arguments))


def train_slowly(words: list[str]) -> int:
    """In a child: a checkpoint takes a while before it is complete."""
    plain = run_folder.checksums

    def slow(*given):
        time.sleep(0.4)
        return plain(*given)

    run_folder.checksums = slow
    return train.main(words)


class Child:
    """A process and where its output goes."""

    def __init__(self, process: multiprocessing.Process, output: Path):
        self.process, self.output = process, output

    def wait(self, seconds: float = 60) -> int:
        """The exit status; -9 after a kill."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.text()}"
        return self.process.exitcode

    def wait_for(self, happened, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.exitcode is None, f"ended with {self.process.exitcode}:\n{self.text()}"
            assert time.monotonic() < end, f"nothing happened for {seconds} s:\n{self.text()}"
            time.sleep(0.001)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def fork(function, arguments: tuple, output: Path, environment: dict[str, str], file_limit=None) -> Child:
    """Run function(*arguments) in a child of the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_runs"])
    # Python 3.11's server ignores sys.path when it preloads, and then silently preloads nothing
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # the server has the cache folder of whichever test it was started in, so that of this test has to be said
    caches = {name: os.environ[name] for name in ("XDG_CACHE_HOME",) if name in os.environ}
    environment = caches | environment
    process = context.Process(
        target=run_child, args=(function, arguments, str(output), environment, file_limit)
    )
    process.start()
    del os.environ["PYTHONPATH"]
    return Child(process, output)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_ranks(argv: list[str], output: Path, size: int = 2) -> list[Child]:
    """`size` processes that form one world, as torchrun would start them."""
    return start_ranks_in_turn([argv], output, size)


def start_ranks_in_turn(argvs: list[list[str]], output: Path, size: int = 2) -> list[Child]:
    """The same for several runs, one after another in the same processes, each as a world of its own."""
    return fork_ranks(train_in_turn, ([(argv, meeting()) for argv in argvs],), output, size)


def train_in_turn(numbered: list[tuple[list[str], str]]) -> int:
    """In the child: runs (argv, port) up to the first that fails, whose exit status it gives."""
    for argv, port in numbered:
        os.environ["MASTER_PORT"] = port
        if status := train.main(argv):
            return status
    return 0


_STORES: list[torch.distributed.TCPStore] = []  # that ranks may still be meeting in


def meeting() -> str:
    """The port of a store where the ranks of one world meet, held here as torchrun's agent holds it."""
    _STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    return str(_STORES[-1].port)


def fork_ranks(function, arguments: tuple, output: Path, size: int) -> list[Child]:
    """`size` children of the server that may form one world; output.<rank> takes what each says."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting()}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    named = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    outputs = [output.with_suffix(f".{rank}") for rank in range(size)]
    return [fork(function, arguments, *each) for each in zip(outputs, named)]


def wait_for_all(children: list[Child], seconds: float) -> None:
    """Until all have ended with 0; where one fails, the others are not waited for."""
    end = time.monotonic() + seconds
    while any(child.process.exitcode is None for child in children):
        failed = any(child.process.exitcode for child in children)
        if failed or time.monotonic() > end:
            time.sleep(5)  # what the others have to say
            for child in children:
                child.process.kill()
            break
        time.sleep(0.05)
    _STORES.clear()  # each holds some files open
    texts = "".join(child.text()[-3000:] for child in children)
    assert [child.wait() for child in children] == [0] * len(children), texts

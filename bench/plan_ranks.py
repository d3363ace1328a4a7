"""The planner's peaks against the live bytes of tensors on each rank, counted by a dispatch mode.

    python bench/plan_ranks.py [only=WORDS,...] [explain=true] [out=bench/results]      # on the CPU

A cell is a run of train.py of one update on 2 or 4 ranks, of a random model in fp32, whose micro-batches are
all of one size. Each rank counts the bytes of all tensors that operations read or make, from the making of
the optimizer, which has its state, to the end of the training, evaluations included. Products are not
computed, their results are zeros: sizes are the same. Beside it stands what `plan=true plan_ranks=N` says of
the same options, by the formula for a GPU: that of a CPU adds what the process and its allocator keep. Shapes
are none that the formulas were fitted to. explain: what was there at the peak, by what made it. only: cells
whose names contain these words.
"""

import collections
import gc
import json
import os
import sys
import tempfile
import weakref
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from stage_runs import REWARDS  # noqa: E402
from tiny_runs import CONFIG, TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all  # noqa: E402
from tiny_tokenizers import make_tokenizer  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import parallel.world  # noqa: E402
import train  # noqa: E402
from bench.measure import commit, cpu_name, is_on, read_options  # noqa: E402
from checkpoints.huggingface import random_model, save_model  # noqa: E402
from checkpoints.value_head import ValueHead, save_value_head, value_head_state  # noqa: E402
from options import config as configuration  # noqa: E402
from parallel.options import ParallelOptions  # noqa: E402
from training import memory, setup  # noqa: E402
from training.forecast import Forecast, largest_row  # noqa: E402

NEED = memory.need
LLAMA = {"hidden_size": 512, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
LLAMA |= {"intermediate_size": 3072, "vocab_size": 32000, "tie_word_embeddings": True}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 320}
QWEN |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 2816}
QWEN |= {"vocab_size": 151936, "tie_word_embeddings": False}
OTHER = {"hidden_size": 448, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 56}
OTHER |= {"intermediate_size": 1792, "vocab_size": 64000, "tie_word_embeddings": False}
SHAPES = {  # names with "half" are for ranks that hold all of it, and train it
    "llama": LLAMA | {"num_hidden_layers": 20},  # 505 MB
    "llama-half": LLAMA | {"num_hidden_layers": 9},  # 263 MB
    "qwen": QWEN | {"num_hidden_layers": 10},  # 507 MB
    "other": OTHER | {"num_hidden_layers": 23},  # 506 MB: after the formulas were mended by the two above
    "qwen-half": QWEN | {"num_hidden_layers": 4},  # 436 MB, most of it outside of the blocks
}
METHODS = {"full": "finetuning_type=full", "lora": "lora_rank=16", "qlora": "lora_rank=16 quantization_bit=4"}
MODES = {
    "ddp": "parallel=ddp",
    "fsdp": "parallel=fsdp",
    "keep": "parallel=fsdp fsdp_reshard_after_forward=false",
    "offload": "parallel=fsdp fsdp_offload=true",
    "tp": "tp_size=2",
    "ulysses": "parallel=fsdp cp_size=2",
    "ring": "parallel=fsdp cp_size=2 cp_mode=ring",
    "hsdp": "parallel=hsdp dp_shard_size=2",
}
STAGES = {
    "sft": "dataset=dialogues",
    "dpo": "dataset=pairs precompute_ref_log_probs=false",
    "ppo": "dataset=prompts max_new_tokens=48 ppo_epochs=1",
}
FULL = "gradient_checkpointing=full"
WRITES = "predict_with_generate=true eval_dataset=prompts evaluation_strategy=steps max_new_tokens=32"
TWICE = "gradient_accumulation_steps=2"
# shape, stage, method, mode, rows of a micro-batch, other options
CELLS = [
    ("llama", "sft", "full", "fsdp", 2, ""),
    ("llama", "sft", "lora", "fsdp", 2, ""),
    ("llama-half", "sft", "full", "ddp", 3, ""),
    ("llama", "sft", "lora", "ddp", 2, ""),
    ("llama", "sft", "full", "keep", 2, ""),
    ("qwen", "sft", "lora", "tp", 8, ""),
    ("qwen", "sft", "full", "ulysses", 8, ""),
    ("llama", "sft", "lora", "ring", 4, ""),
    ("llama", "sft", "lora", "offload", 2, ""),
    ("qwen", "sft", "full", "fsdp", 4, ""),
    ("qwen", "sft", "lora", "fsdp", 1, WRITES),
    ("llama", "sft", "full", "fsdp", 2, TWICE),
    ("llama", "sft", "lora", "fsdp", 8, FULL),
    ("llama", "sft", "qlora", "fsdp", 2, ""),
    ("llama", "sft", "qlora", "ddp", 2, ""),
    ("llama", "dpo", "lora", "fsdp", 1, "ref_model=llama-half"),
    ("llama", "ppo", "lora", "fsdp", 2, "reward_model=llama-half reward_model_type=full"),
    ("qwen", "sft", "full", "tp", 8, ""),
    ("qwen-half", "sft", "full", "ddp", 8, ""),
    ("llama-half", "sft", "full", "hsdp", 3, ""),
    ("llama", "sft", "lora", "hsdp", 2, ""),
    ("qwen", "sft", "lora", "ddp", 4, ""),
    ("qwen", "sft", "lora", "ulysses", 8, ""),
    ("llama", "sft", "full", "ring", 4, ""),
    ("qwen", "sft", "qlora", "keep", 4, ""),
    ("llama", "sft", "full", "offload", 2, ""),
    ("llama-half", "sft", "full", "ddp", 3, TWICE),
    ("llama", "sft", "full", "fsdp", 8, FULL),
    ("qwen", "sft", "lora", "ddp", 8, "gradient_checkpointing=selective"),
    ("llama", "sft", "lora", "fsdp", 4, "bf16=true"),
    ("llama", "dpo", "lora", "fsdp", 1, ""),
    ("llama-half", "dpo", "full", "fsdp", 2, ""),
    ("qwen", "ppo", "lora", "fsdp", 4, ""),
    ("llama", "ppo", "lora", "ddp", 2, "reward_model=llama-half reward_model_type=full"),
    ("other", "sft", "full", "fsdp", 2, ""),
    ("other", "sft", "full", "tp", 4, ""),
    ("other", "sft", "qlora", "keep", 2, ""),
    ("other", "sft", "full", "ring", 4, ""),
    ("other", "sft", "lora", "fsdp", 1, WRITES),
]


def name_of(cell: tuple) -> str:
    shape, stage, method, mode, rows, other = cell
    return " ".join([shape, stage, method, mode, str(rows), *other.split()]).replace("/", "-")


def ranks_of(cell: tuple) -> int:
    return 4 if cell[3] == "hsdp" else 2


def words_of(tiny: TinyRuns, cell: tuple) -> list[str]:
    shape, stage, method, mode, rows, other = cell
    text = f"{STAGES[stage]} {METHODS[method]} {MODES[mode]} {other}"
    keys = dict(word.split("=", 1) for word in text.split())
    keys = {"gradient_checkpointing": "none", "cutoff_len": 512} | keys
    if WRITES in other:
        keys["max_samples"] = 16
    if stage == "ppo" and "reward_model" not in keys:
        keys["reward_file"] = tiny.folder / "rewards.py"
    for key in ("reward_model", "ref_model"):
        if key in keys:
            keys[key] = tiny.folder / keys[key]
    return tiny.words(
        name_of(cell), model_name_or_path=tiny.folder / shape, dataset_dir=tiny.folder / "data", stage=stage,
        per_device_train_batch_size=rows, num_train_epochs=None, max_steps=1,
        ddp_timeout=300, **keys,
    )  # fmt: skip


# In a rank

# products -> the dimension of the second factor that is the result's last
PRODUCTS = {torch.ops.aten.mm.default: 1, torch.ops.mkldnn._linear_pointwise.default: 0}


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes at a time of the storages that an operation has read or made since it was entered.
    The engine empties storages and fills them again, so sizes are asked for anew. host: gives tensors that a
    GPU's run has in host memory; they do not count. explain: `found` tells of what was there at the peak."""

    def __init__(self, host=None, explain: bool = False):
        super().__init__()
        self.peak, self.known, self.made, self.host, self.explain = 0, {}, {}, host, explain
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            left, right = (x for x in args[:2])
            columns = right.shape[PRODUCTS[function]]
            result = left.new_zeros(*left.shape[:-1], columns)
        else:
            result = function(*args, **(kwargs or {}))
        fresh = function.namespace == "fsdp"  # where storages are filled again
        for each in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(each) and each.device.type == "cpu":
                fresh |= self.take_note(each, function)
        if fresh:
            self.count()
        return result

    def take_note(self, tensor: torch.Tensor, function) -> bool:
        """Whether its storage is a new one."""
        storage = _storage(tensor)
        if storage._cdata in self.known and self.known[storage._cdata]() is not None:
            return False
        self.known[storage._cdata] = weakref.ref(storage)
        if self.explain:
            self.made[storage._cdata] = f"{function} in {_place()}"
        return True

    def count(self) -> None:
        live = {key: storage for key, found in self.known.items() if (storage := found()) is not None}
        away = {_storage(each)._cdata for each in self.host()} if self.host is not None else ()
        sizes = {key: storage.nbytes() for key, storage in live.items() if key not in away}
        total = sum(sizes.values())
        if total > self.peak:
            self.peak = total
            if self.explain:
                self.found = collections.Counter()
                for key, size in sizes.items():
                    self.found[self.made[key]] += size
        self.known = {key: self.known[key] for key in live}


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _place() -> str:
    """The functions of this repository, or of torch's engine, that are at work."""
    frame, names = sys._getframe(3), []
    while frame is not None and len(names) < 4:
        file = frame.f_code.co_filename
        if (str(ROOT) in file and "site-packages" not in file) or "/fsdp/" in file or "/optim/" in file:
            names.append(f"{Path(file).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


def run_in_turn(runs: list[tuple[list[str], str, bool, bool]]) -> int:
    """Runs (words, port, whether shares count as the host's, explain); each leaves what it has counted."""
    plain = {name: getattr(train, name) for name in ("make_optimizer", "finish")}
    for argv, port, away, explain in runs:
        os.environ["MASTER_PORT"] = port
        live = LiveBytes(None, explain)

        def made(model, options, live=live, away=away):
            optimizer = plain["make_optimizer"](model, options)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            states = [value for state in optimizer.state.values() for value in state.values()]
            for each in filter(torch.is_tensor, (*model.parameters(), *model.buffers(), *states)):
                live.take_note(each, "before")
            if away:
                live.host = lambda: held_on_host(model, optimizer)
            live.__enter__()
            return optimizer

        def finish(this, live=live):
            live.__exit__(None, None, None)
            return plain["finish"](this)

        train.make_optimizer, train.finish = made, finish
        if status := train.main(argv):
            return status
        output = Path(dict(word.split("=", 1) for word in argv)["output_dir"])
        top = collections.Counter(live.found).most_common(14)
        note = output.with_name(f"{output.name} live-{os.environ['RANK']}.json")
        live.host = None  # which knows of the model
        gc.collect()
        begun = note.with_suffix(".part")
        begun.write_text(json.dumps({"peak": live.peak, "found": top}))
        begun.rename(note)
    return 0


def held_on_host(model, optimizer) -> list[torch.Tensor]:
    """Shares, their gradients and what the optimizer knows of them."""
    shares = [each for each in (*model.parameters(), *model.buffers()) if isinstance(each, DTensor)]
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients = [each.grad for each in shares if each.grad is not None]
    return [*shares, *gradients, *filter(torch.is_tensor, states)]


# Beside them


def write_data(tiny: TinyRuns) -> None:
    """Rows of one length, of each kind."""
    folder, long = tiny.folder / "data", " ".join(["the hammer sings upon an anvil"] * 9)
    other = " ".join(["an anvil sings upon the hammer"] * 9)
    folder.mkdir()
    tables = {
        "dialogues": [{"instruction": "sing", "output": long}] * 64,
        "pairs": [{"instruction": "sing", "chosen": long, "rejected": other}] * 64,
        "prompts": [{"instruction": " ".join(["the hammer sings"] * 6), "output": "no"}] * 64,
    }
    entries = {kind: {"file_name": f"{kind}.json"} for kind in tables}
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    entries["pairs"] |= {"ranking": True, "columns": columns}
    for kind, table in tables.items():
        (folder / f"{kind}.json").write_text(json.dumps(table))
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    (tiny.folder / "rewards.py").write_text(REWARDS)


def planned(words: list[str], ranks: int) -> tuple[dict[str, float], int]:
    """-> (bytes by part at the peak of a rank's device, tokens of a micro-batch)."""
    memory.free_bytes = lambda *given: 1e12  # so that nothing runs again but what the options say
    memory.need = lambda *given: NEED(*given[:-1], "cpu")  # whose kernels and messages are others
    config = configuration.load(
        [*words, "plan=true", f"plan_ranks={ranks}"], setup.SECTIONS, program="train.py", description=""
    )
    world = parallel.world.start("cpu")
    inputs = setup.read(config, world)
    data = setup.load_data(inputs)
    forecast = Forecast(inputs.config, inputs.source, world, data, torch.device("cuda"))
    tokens = largest_row(data.loader, inputs.config, world.device)  # which pads rows less than a GPU does
    return forecast.of(inputs.config[ParallelOptions], tokens).peak, tokens


def main(argv: list[str]) -> int:
    options = read_options(argv, {"only": "", "explain": "", "out": ""}, __doc__)
    wanted = [set(each.split()) for each in options["only"].split(",")]
    cells = [cell for cell in CELLS if any(each <= set(name_of(cell).split()) for each in wanted)]
    explain, lines = is_on(options["explain"]), []
    with tempfile.TemporaryDirectory() as folder, tiny_runs(Path(folder)) as tiny:
        write_data(tiny)
        beside = {word.partition("=")[2] for cell in cells for word in cell[5].split() if "_model=" in word}
        for shape in {cell[0] for cell in cells} | beside:
            made = make_tokenizer(tiny.folder / shape, "chatml")
            (made / "config.json").write_text(json.dumps(CONFIG | SHAPES[shape]))
            save_model(random_model(made, torch.bfloat16, "cpu", 1), made, None)
            if "half" in shape:  # serves as a reward model too
                save_value_head(value_head_state(ValueHead(SHAPES[shape]["hidden_size"])), made)
        for ranks in (2, 4):
            mine = [cell for cell in cells if ranks_of(cell) == ranks]
            runs = [(words_of(tiny, cell), meeting(), cell[3] == "offload", explain) for cell in mine]
            children = fork_ranks(run_in_turn, (runs,), tiny.folder / f"ranks-{ranks}", ranks) if mine else []
            for cell, (words, *_) in zip(mine, runs):
                report(tiny, cell, *planned(words, ranks), children, lines)
            wait_for_all(children, 60)
    if options["out"]:
        head = f"python bench/plan_ranks.py at {commit()}, {cpu_name()}, torch {torch.__version__}\n\n"
        (Path(options["out"]) / "plan_ranks.txt").write_text(head + "\n".join(lines) + "\n")
    return 0


def report(tiny: TinyRuns, cell: tuple, peak: dict, tokens: int, children: list, lines: list[str]) -> None:
    """Waits for the ranks to have run the cell, and prints what was found."""
    name, total = name_of(cell), sum(peak.values())
    notes = [tiny.folder / f"{name} live-{rank}.json" for rank in range(len(children))]
    for child, note in zip(children, notes):
        child.wait_for(note.exists, 3000)
    found = [json.loads(note.read_text()) for note in notes]
    live = [each["peak"] for each in found]
    ratios = [total / each for each in live]
    line = f"{name:44} {tokens:6} tokens {total / 1e6:8.0f} {max(live) / 1e6:8.0f} MB"
    line += f"  {min(ratios):.3f} to {max(ratios):.3f}" + " OFF" * (
        not 0.9 <= min(ratios) <= max(ratios) <= 1.1
    )
    lines.append(line)
    print(line, flush=True)
    if found[0]["found"]:
        print("   planned", {part: round(size / 1e6) for part, size in peak.items() if size > 1e5})
        for what, size in found[0]["found"]:
            print(f"   {size / 1e6:8.1f} {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

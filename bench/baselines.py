"""The baseline of the training benchmarks, transformers + peft, set up as its users do and at its best.

    system = Baseline(peft_model(folder, adapter, torch.float32), Recipe(), torch.device("cpu"))
    loss = system.step(system.prepare([micro_batch]))          # the interface of train_systems.Anvil too

Nothing of Anvil is imported, so that the memory of a process with a baseline is the baseline's.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.turns import LEARNING_RATE

RANK, ALPHA = 8, 16.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Document:
    ids: np.ndarray  # (n,) int32
    trained: np.ndarray  # (n,) bool


MicroBatch = list[list[Document]]  # rows of documents; one document a row unless packed


@dataclass(frozen=True)
class Recipe:
    """How the baseline is set up. attention: the backend of torch's SDPA that is tried first; None leaves it
    to torch."""

    checkpointing: bool = False
    attention: str | None = None
    compiled: bool = False

    @property
    def text(self) -> str:
        parts = ["gradient checkpointing" if self.checkpointing else "no recompute"]
        parts.append(f"sdpa {self.attention.lower()}" if self.attention else "sdpa")
        return ", ".join(parts + ["torch.compile"] * self.compiled)


DEFAULT = Recipe(checkpointing=True)
# best settings first; the next is taken where one does not fit into memory
BEST = [Recipe(False, "CUDNN"), Recipe(True, "CUDNN")]
COMPILED = [replace(recipe, compiled=True) for recipe in BEST]


class Baseline:
    """A model of transformers or peft with what its trainer does around it: padded or packed rows, labels
    shifted inside the model, on a GPU bf16 autocast, fused AdamW."""

    def __init__(self, model, recipe: Recipe, device: torch.device):
        self.note, self.recipe, self.device, self.model = recipe.text, recipe, device, model
        self.update = torch_update(model)
        self.forward = torch.compile(model) if recipe.compiled else model

    def prepare(self, group: list[MicroBatch]):
        return [_padded(rows, self.device) for rows in group]

    def step(self, group) -> torch.Tensor:
        device = self.device
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        total = sum(trained for _, trained in group)
        loss = torch.zeros((), device=device)
        for tensors, _ in group:
            inputs = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
            with self._attention():
                with autocast:
                    value = self.forward(**inputs, num_items_in_batch=total, use_cache=False).loss
                value.backward()
            loss += value.detach()
        self.update()
        return loss

    def _attention(self):
        if self.recipe.attention is None:
            return contextlib.nullcontext()
        first = getattr(SDPBackend, self.recipe.attention + "_ATTENTION")
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel([first, *others], set_priority=True)


def torch_update(model) -> Callable[[], None]:
    """What follows a backward pass, as turns.our_update: gradients clipped to norm 1, AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _padded(rows: MicroBatch, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Rows -> the model's inputs, padded on the right to the longest, and the number of targets.

    Without padding no mask is given, and without packing no positions: that lets the baseline take its
    fastest attention.
    """
    longest = max(sum(len(one.ids) for one in row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        start = 0
        for one in row:
            stop = start + len(one.ids)
            ids[place, start:stop] = torch.from_numpy(one.ids.astype(np.int64))
            targets = torch.where(torch.from_numpy(one.trained), ids[place, start:stop], -100)
            targets[0] = -100  # nothing predicts the first token of a document
            labels[place, start:stop] = targets
            mask[place, start:stop] = 1
            positions[place, start:stop] = torch.arange(stop - start)
            start = stop
        positions[place, start:] = torch.arange(longest - start)
    inputs = {"input_ids": ids, "labels": labels}
    if any(len(row) > 1 for row in rows):
        inputs["position_ids"] = positions  # transformers then masks the documents from each other
    elif not bool(mask.all()):
        inputs["attention_mask"] = mask
    if device.type == "cuda":
        inputs = {key: value.pin_memory() for key, value in inputs.items()}
    return inputs, int((labels != -100).sum())


# A real model, from its folder


@contextlib.contextmanager
def fresh_adapter(folder: str) -> Iterator[str]:
    """A folder with a new adapter on this model, as peft starts and saves it."""
    with tempfile.TemporaryDirectory() as adapter:
        torch.manual_seed(0)
        with_adapters(_transformers_model(folder, torch.float32), RANK, ALPHA).save_pretrained(adapter)
        yield adapter


def peft_model(folder: str, adapter: str, dtype: torch.dtype):
    """With the adapter of that folder, or all weights trainable if it is empty."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    model = _transformers_model(folder, dtype)
    if adapter:
        model = with_adapters(model, RANK, ALPHA)
        set_peft_model_state_dict(model, load_file(f"{adapter}/adapter_model.safetensors"))
    return model.train()


def with_adapters(model, rank: int, alpha: float):
    """peft's LoRA on all linears of the blocks; fp32, as peft keeps it by default."""
    import peft

    options = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=0.0)
    return peft.get_peft_model(model, options)


def _transformers_model(folder: str, dtype: torch.dtype):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")

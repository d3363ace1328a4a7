"""The reference policy: log-probabilities that a trained policy is held to, beside the training or before it.

Which policy: ref_model with its adapters; else with LoRA the base model, as LLaMA-Factory has it (trl: the
start): the adapters switched off, which costs no memory, and the base's own values of what an adapter trains
in full; without LoRA a frozen copy of the weights that the run starts from. Where the
texts are known ahead the log-probabilities are computed once, before the first update: then no copy is held
and no step computes them. They are kept on disk by a key that is a hash of the reference's weights and of
every token of the data set, so that whatever changes them (model, adapters, quantisation, rows, template,
tokenizer, cutoff_len) also changes the key.
"""

import copy
import hashlib
import itertools
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.safetensors_files import write_tensors
from lora import full_modules, lora_layers, lora_off, replace_module
from model import Decoder
from options.atomic import atomic_file, locked
from options.errors import UserError, refuse, say
from options.option import option
from options.progress import Bar
from parallel.fsdp import whole
from parallel.world import World
from pipeline.batch import ROW_MULTIPLE, Batch, BatchLoader
from pipeline.store import ExampleStore
from stages.logprobs import answer_sums, batch_logprobs, in_eval_mode

CACHE_VERSION = 1  # raise it when the same weights and tokens give other numbers
TENSOR = "logprobs"
ADAPTER_PARTS = ("lora_a", "lora_b", "magnitude")  # of an adapted linear, which are off


@dataclass(frozen=True)
class ReferenceOptions:
    ref_model: str | None = option(
        None, "model to which the policy is held; default: the start of the run", also="dpo_ref_model"
    )
    ref_model_adapters: tuple[str, ...] = option(
        (),
        "adapters on ref_model, in this order",
        also="dpo_ref_model_adapters dpo_ref_model_checkpoint ref_model_checkpoint",
    )
    ref_model_quantization_bit: int | None = option(None, "quantise ref_model to this many bits")
    precompute_ref_log_probs: bool | None = option(
        None, "reference log-probabilities before training, kept in the cache; default: if it saves work"
    )

    def __post_init__(self):
        for key in ("ref_model_adapters", "ref_model_quantization_bit"):
            text = f"{key}: it belongs to ref_model, which is not given; name it, or drop {key}"
            refuse(getattr(self, key) and not self.ref_model, text)


class Reference:
    """Log-probabilities under the reference policy: no gradient, no dropout; the model's mode stays."""

    def __init__(self, policy: Decoder | None = None, ld_alpha: float | None = None, ahead: bool = False):
        """policy: None = the trained model with its adapters off.  ld_alpha: as in logprobs.answer_sums.
        ahead: every batch brings its numbers, so that no rank calls a model; else all do, for an empty batch
        too, because they may hold shares of it."""
        self.policy, self.ld_alpha, self.ahead = policy, ld_alpha, ahead

    @torch.no_grad()
    def logprobs(self, model: Decoder, batch: Batch, temperature: float = 1.0) -> Tensor:
        """(L,) fp32: log-probability of each label, in the order of label_rows."""
        policy = model if self.policy is None else self.policy
        with in_eval_mode(policy), lora_off(policy) if self.policy is None else nullcontext():
            return batch_logprobs(policy, batch, temperature)

    def sums(self, model: Decoder, batch: Batch) -> Tensor:
        """(N,) fp32: log-probability of each segment's labels; known ahead, or computed now."""
        if "reference" in batch.per_segment and (self.ahead or len(batch)):
            return batch.per_segment["reference"]
        return answer_sums(self.logprobs(model, batch), batch, self.ld_alpha)


def start_policy(model: Decoder, live: bool, own: dict[str, Tensor] | None = None) -> Decoder | None:
    """The reference of a run that names none, given the model with the weights it starts from; see Reference.

    own: the base's values of what a given adapter trains in full (checkpoints/peft.py, load_adapter).
    live: log-probabilities are asked for after the first update, so weights that train are copied; the
    others, which never change, are shared. Else the model itself serves, before the first update.
    """
    if lora_layers(model) and not full_modules(model):
        return None
    if own:
        base = frozen_copy(model)
        for name, layer in lora_layers(base).items():
            replace_module(base, name, layer.base)
        for name, tensor in own.items():
            base.get_parameter(name).data = tensor
        return base
    return frozen_copy(model) if live else model


def frozen_copy(model: Decoder) -> Decoder:
    """A model of its own that never trains; it shares what does not train in the given one either."""
    fixed = itertools.chain((p for p in model.parameters() if not p.requires_grad), model.buffers())
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in fixed})
    return copied.eval().requires_grad_(False)


@torch.no_grad()
def precompute(
    reference: Reference,
    model: Decoder,
    stores: dict,
    rows_per_batch: int,
    cache: Path,
    world: World,
    afresh=False,
) -> None:
    """Fill `reference` of the stores (name -> ExampleStore), from the cache where it has just this.

    afresh: compute in any case.  All ranks have to call; they share the work, and rank 0 alone reads and
    writes files. Raises UserError for numbers that are not finite.
    """
    key = {"version": CACHE_VERSION, "ld_alpha": reference.ld_alpha}
    key["policy"] = weights_key(reference.policy or model, adapters=reference.policy is not None)
    for name, store in stores.items():
        if world.is_main:
            key["data"] = store_key(store)
        words = json.dumps(key, sort_keys=True)
        path = cache / f"{hashlib.blake2b(words.encode(), digest_size=16).hexdigest()}.safetensors"
        with locked(path) if world.is_main else nullcontext():
            values = None if afresh or not world.is_main else _read(path, words, store)
            if world.any(values is not None):  # on rank 0: the others may not see its disk
                done = f"read from {path}"
                values = torch.zeros(*_shape(store)) if values is None else values
                values = world.from_main(values.to(world.device)).cpu()
            else:
                started = time.monotonic()
                values = _compute(reference, model, store, rows_per_batch, world, name)
                if world.is_main:
                    with atomic_file(path) as temporary:
                        write_tensors(temporary, {TENSOR: values}, {"key": words})
                done = f"computed in {time.monotonic() - started:.1f} s, kept in {path}"
        world.print(f"reference log-probabilities of {len(store)} examples ({name}): {done}")
        store.reference = values.numpy()


def _shape(store: ExampleStore) -> tuple[int, int]:
    """(examples, segments of each)."""
    return len(store), len(store.example(0).segments)


def _compute(
    reference: Reference, model: Decoder, store: ExampleStore, rows_per_batch: int, world: World, name: str
) -> Tensor:
    """_shape(store) fp32 on the CPU, the same on every rank: each computes its share of the batches."""
    place = {"rank": world.data_rank, "world": world.data_size}
    loader = BatchLoader(store, rows_per_batch=rows_per_batch, shuffle=False, **place)
    values = torch.zeros(*_shape(store), device=world.device)
    bar = {"unit": " batches", "disable": not world.is_main}
    for number in Bar(range(loader.batches_per_epoch), f"reference, {name}", **bar):
        examples = loader.examples_of(number)
        batch = loader.batch(number).rounded(ROW_MULTIPLE[world.device.type]).to(world.device)
        values[examples] = reference.sums(model, batch).view(values.shape[1], -1).T
    values = world.sum(values).cpu()
    bad = (~torch.isfinite(values)).any(1).nonzero()
    if len(bad):
        dataset, row = store.example(int(bad[0])).source
        raise UserError(
            f"the reference's log-probability of row {row} of {store.datasets[dataset]!r} is not finite "
            f"({len(bad)} such examples); use bf16 instead of fp16, or another ref_model"
        )
    return values


def weights_key(model: Decoder, adapters: bool) -> str:
    """A hash of everything that decides what a model computes; adapters: whether they take part. All ranks
    call it, because each may hold a share."""
    digest = hashlib.blake2b(repr((model.config, model.runtime.compute_dtype)).encode(), digest_size=16)
    named = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    for name, tensor in sorted(named.items()):
        if name.startswith("v_head.") or (not adapters and name.rpartition(".")[2] in ADAPTER_PARTS):
            continue
        name = name if adapters else name.replace(".base.", ".")  # adapted or not, it is the same weight
        tensor = whole(tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def store_key(store: ExampleStore) -> str:
    """A hash of the tokens of every example in order, of what is trained, and of where segments begin."""
    digest = hashlib.blake2b(digest_size=16)
    for example in map(store.example, range(len(store))):
        digest.update(f"{len(example)} {example.split} ".encode())
        digest.update(np.ascontiguousarray(example.tokens, np.int32))
        digest.update(np.packbits(example.trained))
    return digest.hexdigest()


def _read(path: Path, key: str, store: ExampleStore) -> Tensor | None:
    """_shape(store) from the cache, None where it has nothing; says what is wrong with a file."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found, values = file.metadata(), file.get_tensor(TENSOR)
        if (found or {}).get("key") == key and values.shape == _shape(store):
            return values
        problem = "is of another model or other data"
    except SafetensorError as error:
        problem = f"is damaged ({error})"
    say(f"cache: {path} {problem}; the reference log-probabilities are computed again")
    return None

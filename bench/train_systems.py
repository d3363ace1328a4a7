"""The systems that bench/train.py compares, built from one random model: names map one to one, so weights are
shared.

`Anvil` trains through train.update, as users do. `Rival` is transformers + peft, with bf16 autocast over
frozen bf16 weights and fp32 adapters as its trainer does it. For LoRA all systems hold the very same frozen
weights, which are in memory once; for full tuning each has its copy. Adapters are copied from Anvil's. Over a
base in 4 bits the rival has bitsandbytes' layers around the same codes, and Anvil once more trains over the
same numbers in 16 bits.
"""

import contextlib
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora
import parallel.world
import train
from architectures import config_from_hf
from architectures.config import to_hf_name
from bench import four_bits
from checkpoints.peft import adapter_state
from model import Decoder, initialize_weights
from pipeline.batch import Example, collate
from stages.sft import TokenLoss
from training import memory
from training.measure import prepare
from training.optimizers import make_optimizer
from training.options import OptimOptions

LEARNING_RATE = 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(hidden, mlp, layers, heads, kv_heads, vocabulary, theta=10000.0, tied=False) -> dict:
    """A config.json of the Llama class."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rope_theta": theta, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "hidden_act": "silu", "max_position_embeddings": 8192, "initializer_range": 0.02,
    }  # fmt: skip


MODELS = {  # sizes of the published config.json files
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, theta=500000.0),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000),
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000),
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, theta=100000.0, tied=True),
    "tiny": llama(64, 96, 2, 4, 2, 101),  # smoke tests
    "tiny of whole blocks": llama(
        64, 128, 2, 4, 2, 101
    ),  # without them bitsandbytes' CPU build miscalculates
}


@dataclass(frozen=True)
class Document:
    ids: np.ndarray  # (n,) int32
    trained: np.ndarray  # (n,) bool


MicroBatch = list[list[Document]]  # rows of documents; one document a row unless packed


@dataclass(frozen=True)
class Setting:
    """What is trained. rank 0: every weight (full tuning, all in bf16).

    in_4_bits: over NF4 with double quantisation. policy: Anvil's gradient_checkpointing."""

    model: str
    rank: int
    device: torch.device
    in_4_bits: bool = False
    policy: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def random_decoder(setting: Setting) -> Decoder:
    """Random weights on the device."""
    config = config_from_hf(MODELS[setting.model])
    if setting.in_4_bits:
        return four_bits.random_decoder(config, setting.dtype, setting.device)
    model = Decoder(config, dtype=setting.dtype, device=setting.device)
    initialize_weights(model, torch.Generator(setting.device).manual_seed(0))
    return model


class Anvil:
    """The project's own step: train.update on flat rows without padding."""

    note = "train.update"
    unused_bytes = 0  # of what all systems share

    def __init__(self, setting: Setting, model: Decoder, steps: int):
        self.policy = setting.policy
        kind = "lora" if setting.rank else "full"
        options = lora.LoraOptions(kind, lora_rank=max(1, setting.rank))
        lora.prepare_trainable(model, options, torch.Generator().manual_seed(0))
        model.runtime.compute_dtype = setting.dtype
        model.train()
        self.tokens = 0  # of the largest micro-batch seen
        self.model, self.options = model, OptimOptions(learning_rate=LEARNING_RATE)
        self.optimizer = make_optimizer(model, self.options)
        self.scaler = torch.amp.GradScaler(setting.device.type, enabled=False)
        self.gradient_sum = parallel.world.GradientSum(model, parallel.world.World(0, 1, 0, setting.device))

    def prepare(self, group: list[MicroBatch]):
        batches = [collate([_example(one) for row in rows for one in row]) for rows in group]
        batches = [prepare(batch, self.gradient_sum.world.device) for batch in batches]
        self.tokens = max(self.tokens, *(len(batch.tokens) for batch in batches))
        self._plan_memory()
        return batches

    def _plan_memory(self) -> None:
        """What is recomputed: `gradient_checkpointing: auto` decides for what is free now."""
        model, device = self.model, self.gradient_sum.world.device
        need = memory.need(model, self.tokens, self.options.optim)
        free = memory.free_bytes(device)
        model.runtime.recompute, self.note = memory.plan(
            self.policy, need, model.config.num_layers, device, free
        )

    def step(self, group) -> torch.Tensor:
        tools = self.scaler, self.gradient_sum, self.options.max_grad_norm
        group = [batch.to(self.gradient_sum.world.device) for batch in group]
        loss, _, _ = train.update(self.model, self.optimizer, TokenLoss(), group, *tools)
        return loss


def anvil_in_16_bits(setting: Setting, source: Decoder, steps: int) -> Anvil:
    """Anvil over the numbers that the source's codes stand for, with the same adapters: they follow from the
    seed."""
    system = Anvil(replace(setting, in_4_bits=False), four_bits.dense_twin(source), steps)
    system.unused_bytes = four_bits.packed_bytes(source)
    return system


def _example(document: Document) -> Example:
    count = len(document.ids)
    return Example(
        document.ids, document.trained, np.zeros(count, np.int16), np.zeros(count, np.uint8), (0, 0)
    )


@dataclass(frozen=True)
class Recipe:
    """How the rival is set up. attention: the backend of torch's SDPA that is tried first; None leaves it to
    torch."""

    checkpointing: bool
    attention: str | None
    compiled: bool = False

    @property
    def text(self) -> str:
        parts = ["gradient checkpointing" if self.checkpointing else "no recompute"]
        parts.append(f"sdpa {self.attention.lower()}" if self.attention else "sdpa")
        return ", ".join(parts + ["torch.compile"] * self.compiled)


DEFAULT = Recipe(checkpointing=True, attention=None)
# best settings first; the next is taken where one does not fit into memory
BEST = [Recipe(False, "CUDNN"), Recipe(True, "CUDNN")]
COMPILED = [replace(BEST[0], compiled=True), replace(BEST[1], compiled=True)]


class Rival:
    """transformers + peft: padded or packed rows, labels shifted inside the model, fused AdamW."""

    def __init__(self, setting: Setting, source: Decoder, recipe: Recipe):
        self.note, self.recipe, self.setting = recipe.text, recipe, setting
        self.model = _transformers_model(setting, source).train()
        if setting.in_4_bits and recipe is DEFAULT:
            self._prepare_as_peft_says()
        if recipe.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if setting.rank:
                self.model.enable_input_require_grads()
        if setting.rank:
            self.model = _with_adapters(self.model, setting, source)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.forward = torch.compile(self.model) if recipe.compiled else self.model

    def _prepare_as_peft_says(self) -> None:
        """Norms, embedding and head become fp32 copies."""
        import peft

        peft.prepare_model_for_kbit_training(self.model, use_gradient_checkpointing=False)

    def prepare(self, group: list[MicroBatch]):
        return [_padded(rows, self.setting.device) for rows in group]

    def step(self, group) -> torch.Tensor:
        device = self.setting.device
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
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _attention(self):
        if self.recipe.attention is None:
            return contextlib.nullcontext()
        first = getattr(SDPBackend, self.recipe.attention + "_ATTENTION")
        others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel([first, *others], set_priority=True)


def _transformers_model(setting: Setting, source: Decoder):
    """transformers' model on the source's weights: the same memory if they are frozen, a copy if they are
    trained."""
    import transformers

    config = transformers.LlamaConfig(**MODELS[setting.model])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=setting.dtype, attn_implementation="sdpa"
        )
    tensors = {}
    for name, tensor in four_bits.plain_tensors(source).items():
        tensors[to_hf_name(source.config, name)] = tensor if setting.rank else tensor.clone()
    if source.config.tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if setting.in_4_bits:
        four_bits.take_linears(model, source, setting.dtype)
    model.load_state_dict(tensors, assign=True, strict=not setting.in_4_bits)
    if source.config.tied_head:
        model.tie_weights()
    with setting.device:  # the frequencies of the rotation are in no state_dict
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
    return model


def _with_adapters(model, setting: Setting, source: Decoder):
    """peft's adapters with the values of the source's; fp32, as peft keeps them by default."""
    import peft

    options = lora.LoraOptions(lora_rank=setting.rank)
    config = peft.LoraConfig(
        r=setting.rank, lora_alpha=options.alpha, target_modules=TARGETS, lora_dropout=0.0
    )
    wrapped = peft.get_peft_model(model, config)
    state = {name: tensor.clone() for name, tensor in adapter_state(source).items()}
    loaded = peft.set_peft_model_state_dict(wrapped, state)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    return wrapped


def _padded(rows: MicroBatch, device: torch.device) -> tuple[dict[str, torch.Tensor], int]:
    """Rows -> the model's inputs, padded on the right to the longest, and the number of targets.

    Without padding no mask is given, and without packing no positions: that lets the rival take its fastest
    attention.
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
            labels[place, start:stop] = torch.where(
                torch.from_numpy(one.trained), ids[place, start:stop], -100
            )
            labels[place, start] = -100  # nothing predicts the first token of a document
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


def flops_per_step(setting: Setting, group: list[MicroBatch]) -> float:
    """Model operations of one step: 4N per token with a frozen base (6N in full) + attention + 6 per adapter
    weight.

    The head counts on trained rows only. Attention, causal, per token of a document of length S: 2 d S
    forward and 4 d S backward in every layer; nothing that is recomputed counts.
    """
    config = config_from_hf(MODELS[setting.model])
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = [(config.hidden_size, query), (config.hidden_size, kv), (config.hidden_size, kv)]
    linears += [(query, config.hidden_size), (config.hidden_size, config.intermediate_size)]
    linears += [
        (config.hidden_size, config.intermediate_size),
        (config.intermediate_size, config.hidden_size),
    ]
    block = sum(inputs * outputs for inputs, outputs in linears)
    adapter = setting.rank * sum(inputs + outputs for inputs, outputs in linears)
    documents = [one for rows in group for row in rows for one in row]
    tokens = sum(len(one.ids) for one in documents)
    targets = sum(int(one.trained[1:].sum()) for one in documents)
    squares = sum(len(one.ids) ** 2 for one in documents)
    factor = 4.0 if setting.rank else 6.0
    products = factor * (
        tokens * block * config.num_layers + targets * config.vocab_size * config.hidden_size
    )
    return products + 6.0 * tokens * adapter * config.num_layers + 6.0 * query * squares * config.num_layers


def describe(setting: Setting) -> dict:
    """For the result file: the numbers that define the model."""
    described = asdict(config_from_hf(MODELS[setting.model]))
    described.pop("hf"), described.pop("sliding_windows")
    return {"model": setting.model, "rank": setting.rank, "dtype": str(setting.dtype), "config": described}

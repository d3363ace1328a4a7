"""The systems of bench/train.py: Anvil around any model, and both sides around one random model.

`Anvil` trains through train.update, as users do; baselines.Baseline is its counterpart. Names of weights map
one to one, so for LoRA all systems hold the very same frozen weights, which are in memory once; for full
tuning each has its copy. Adapters are copied from Anvil's. Over a base in 4 bits the baseline has
bitsandbytes' layers around the same codes, and Anvil once more trains over the same numbers in 16 bits.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import lora
import parallel.world
import train
from architectures import config_from_hf
from architectures.config import ModelConfig, to_hf_name
from bench import baselines, four_bits
from bench.baselines import Baseline, Document, MicroBatch, Recipe
from bench.turns import LEARNING_RATE
from checkpoints import trainable
from checkpoints.peft import adapter_parameters, adapter_state
from model import Decoder, initialize_weights
from pipeline.batch import Example, collate
from stages.sft import TokenLoss
from training import memory
from training.measure import prepare
from training.optimizers import make_optimizer
from training.options import OptimOptions


def llama(hidden, mlp, layers, heads, kv_heads, vocabulary, theta=10000.0, tied=False) -> dict:
    """A config.json of the Llama class."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rope_theta": theta, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "hidden_act": "silu", "max_position_embeddings": 8192,
        "initializer_range": 0.02,
    }  # fmt: skip


MODELS = {  # sizes of the published config.json files
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, theta=500000.0),
    "Llama-2-70B": llama(8192, 28672, 80, 64, 8, 32000),
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000),
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, theta=100000.0, tied=True),
    "tiny": llama(64, 96, 2, 4, 2, 101),  # smoke tests
    # without whole blocks bitsandbytes' CPU build miscalculates
    "tiny of whole blocks": llama(64, 128, 2, 4, 2, 101),
}


class Anvil:
    """The project's own step: train.update on flat rows without padding. policy: gradient_checkpointing."""

    note = "train.update"

    def __init__(self, model: Decoder, device: torch.device, policy: str = "auto", unused_bytes: int = 0):
        self.model, self.policy = model.train(), policy
        self.unused_bytes = unused_bytes  # of what all systems share
        self.tokens = 0  # of the largest micro-batch seen
        self.options = OptimOptions(learning_rate=LEARNING_RATE)
        self.optimizer = make_optimizer(model, self.options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.world = parallel.world.World(0, 1, 0, device)

    def prepare(self, group: list[MicroBatch]):
        batches = [collate([_example(one) for row in rows for one in row]) for rows in group]
        batches = [prepare(batch, self.world.device) for batch in batches]
        self.tokens = max(self.tokens, *(len(batch.tokens) for batch in batches))
        self._plan_memory()
        return batches

    def _plan_memory(self) -> None:
        """What is recomputed: `gradient_checkpointing: auto` decides for what is free now."""
        model, device = self.model, self.world.device
        need, free = memory.need(model, self.tokens, self.options.optim), memory.free_bytes(device)
        layers = model.config.num_layers
        model.runtime.recompute, self.note = memory.plan(self.policy, need, layers, device, free)

    def step(self, group) -> torch.Tensor:
        tools = self.scaler, self.world, self.options.max_grad_norm
        group = [batch.to(self.world.device) for batch in group]
        loss, _, _ = train.update(self.model, self.optimizer, TokenLoss(), group, *tools)
        return loss


def _example(document: Document) -> Example:
    count = len(document.ids)
    zeros = np.zeros(count, np.int16), np.zeros(count, np.uint8)
    return Example(document.ids, document.trained, *zeros, (0, 0))


# Around one random model


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

    @property
    def config(self) -> ModelConfig:
        return config_from_hf(MODELS[self.model])


def random_decoder(setting: Setting) -> Decoder:
    """Random weights on the device."""
    if setting.in_4_bits:
        return four_bits.random_decoder(setting.config, setting.dtype, setting.device)
    model = Decoder(setting.config, dtype=setting.dtype, device=setting.device)
    initialize_weights(model, torch.Generator(setting.device).manual_seed(0))
    return model


def anvil_on(setting: Setting, model: Decoder, unused_bytes: int = 0) -> Anvil:
    """Puts new adapters on the model itself."""
    options = lora.LoraOptions("lora" if setting.rank else "full", lora_rank=max(1, setting.rank))
    trainable.prepare_trainable(model, options, torch.Generator().manual_seed(0))
    return Anvil(model, setting.device, setting.policy, unused_bytes)


def anvil_in_16_bits(setting: Setting, source: Decoder) -> Anvil:
    """Anvil over the numbers that the source's codes stand for, with the same adapters: they follow from the
    seed."""
    unused = four_bits.packed_bytes(source)
    return anvil_on(replace(setting, in_4_bits=False), four_bits.dense_twin(source), unused)


def baseline_on(setting: Setting, source: Decoder, recipe: Recipe) -> Baseline:
    """transformers + peft on the weights, and with copies of the adapters, of the source."""
    model = transformers_model(setting, source).train()
    if setting.in_4_bits and recipe is baselines.DEFAULT:  # norms, embedding and head become fp32 copies
        import peft

        peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if setting.rank:
            model.enable_input_require_grads()
    if setting.rank:
        model = _with_adapters_of(model, setting, source)
    return Baseline(model, recipe, setting.device)


def transformers_model(setting: Setting, source: Decoder):
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


def _with_adapters_of(model, setting: Setting, source: Decoder):
    """peft's adapters with the values of the source's."""
    import peft

    wrapped = baselines.with_adapters(model, setting.rank, lora.LoraOptions(lora_rank=setting.rank).alpha)
    state = {
        name: tensor.clone()
        for name, tensor in adapter_state(dict(adapter_parameters(source)), source.config).items()
    }
    loaded = peft.set_peft_model_state_dict(wrapped, state)
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    return wrapped


def flops_per_step(config: ModelConfig, rank: int, group: list[MicroBatch]) -> float:
    """Model operations of one step: 4N per token with a frozen base (6N in full, rank 0) + attention + 6 per
    adapter weight.

    The head counts on trained rows only. Attention, causal, per token of a document of length S: 2 d S
    forward and 4 d S backward in every layer; nothing that is recomputed counts.
    """
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, middle = config.hidden_size, config.intermediate_size
    linears = [(hidden, query), (hidden, kv), (hidden, kv), (query, hidden)]
    linears += [(hidden, middle), (hidden, middle), (middle, hidden)]
    block = sum(inputs * outputs for inputs, outputs in linears)
    adapter = rank * sum(inputs + outputs for inputs, outputs in linears)
    documents = [one for rows in group for row in rows for one in row]
    tokens = sum(len(one.ids) for one in documents)
    targets = sum(int(one.trained[1:].sum()) for one in documents)
    squares = sum(len(one.ids) ** 2 for one in documents)
    products = tokens * block * config.num_layers + targets * config.vocab_size * hidden
    others = tokens * adapter + query * squares
    return (4.0 if rank else 6.0) * products + 6.0 * others * config.num_layers


def describe(setting: Setting) -> dict:
    """For the result file: the numbers that define the model."""
    described = asdict(setting.config)
    described.pop("hf"), described.pop("sliding_windows")
    return {"model": setting.model, "rank": setting.rank, "dtype": str(setting.dtype), "config": described}

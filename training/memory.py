"""How much memory a step needs, and so how much of it is computed twice (gradient_checkpointing).

Counted per token and block, in numbers of the compute dtype, with the letters of model.py: the residual
stream twice, two norms, q, k, v, the heads' output, gate, up and their product:

    everything  4E + 2HD + 2KD + 3F        selective  2E + 2HD + 2KD + 2F        full  E        offload  0

With MHA (HD = KD = E) that is 131.6 KB per token and block of a 7B model in bf16, 93.2 KB without what is
cheap to make again. Under fp16 the residual stream counts twice, being fp32. To it come gradients, optimizer
state, one block's backward pass, the loss, and the dense weight that quantised layers are used through. The
numbers are estimates on the safe side (tests compare them with what torch keeps); a wrong one costs time.

Of many ranks each counts for itself. A rank's share of weights, gradients and optimizer state is 1 / shard,
its rows are 1 / context of a micro-batch's, and model.config and the layers tell of its slices already
(parallel/tensor.py). What torch's engine holds for a moment comes to it, W_b and G_b being the bytes of the
largest block and of what trains in it, W_o and G_o those outside of the blocks:

    gathered   W_o + 2 W_b     the block at work and its neighbour's message; without shards what trains
    summed     2 G_b + G_o     a block's gradients and the message of them; without the embedding's, if untied
    closing    2 G_o           the same outside of the blocks, at the end, when nothing is gathered any more
"""

import ctypes
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.cross_entropy import chunk_bytes
from kernels.recompute import CudaTransfers, Offload, Plan
from lora import lora_layers
from model import Decoder
from options.limits import free_host_bytes
from parallel.context import PIECE
from parallel.options import ParallelOptions
from quant.linear import quantised_linears
from training.optimizers import state_per_byte

RESERVE_BYTES = 2**29  # workspaces of cuBLAS and NCCL, and what the allocator rounds up
SLACK = 1.05  # of everything that is estimated


@dataclass(frozen=True)
class Spread:
    """Among how many ranks a run divides what."""

    ranks: int = 1  # of the engine
    shard: int = 1  # of these hold the weights between them
    context: int = 1  # ranks that hold each row of tokens between them
    away: bool = False  # shares, gradients and optimizer state are in host memory, the model on a GPU
    keeps: bool = False  # blocks stay gathered from the forward to the backward pass, the last of an update
    by_blocks: bool = False  # gather_for_generation is off
    ring: bool = False  # how the ranks of a row share it

    @classmethod
    def of(cls, options: ParallelOptions, ranks: int, device: torch.device) -> "Spread":
        replicate, shard = options.engine(ranks)
        away, keeps = options.fsdp_offload and device.type == "cuda", not options.fsdp_reshard_after_forward
        ring, by_blocks = options.cp_mode == "ring", not options.gather_for_generation
        return cls(replicate * shard, shard, options.cp_size, away, keeps, by_blocks, ring)

    def share(self, tensors: Iterable[Tensor]) -> float:
        """Bytes of a rank's shares of these: whole rows, of which the last ranks may have padding."""
        rows = ((len(t) if t.dim() else 1, t.numel() * t.element_size()) for t in tensors if t.numel())
        return float(sum(-(-count // self.shard) * (size // count) for count, size in rows))

    def held(self, module: nn.Module, prefix: str = "") -> list[Tensor]:
        """What the engine has of a module: all of it, without shards what trains."""
        tensors = itertools.chain(module.named_parameters(), module.named_buffers())
        inside = (tensor for name, tensor in tensors if not (prefix and name.startswith(prefix)))
        return [tensor for tensor in inside if self.shard > 1 or self.away or tensor.requires_grad]

    def for_texts(self, model: nn.Module) -> float:
        """Bytes that come to a rank's shares of a model that writes or scores (generation/company.py)."""
        if self.shard == 1:
            return 0.0
        blocks, whole = [bytes_of(self.held(block)) for block in model.layers], bytes_of(self.held(model))
        return whole - sum(blocks) + 2 * max(blocks) if self.by_blocks else whole  # at work, and arriving

    def ends(self, model: nn.Module) -> float:
        """Bytes that come to a rank's shares of a model while what is outside of its blocks is gathered."""
        return bytes_of(self.held(model, "layers.")) if self.shard > 1 else 0.0


def bytes_of(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@dataclass(frozen=True)
class Need:
    """Bytes that training adds to the weights' own."""

    blocks: int  # how many of the last have a backward pass
    gradients: float
    optimizer: float  # its state
    head: float  # rows, logits and what a trained head takes, while the loss is computed
    block: float  # the gradients within one block, while it goes backward, and the weight it dequantises
    everything: float  # per block and policy
    selective: float
    full: float
    first: float = 0.0  # gradients of the last block, which goes backward first, and of what lies behind it
    gathered: float = 0.0  # weights of which a rank has a share, while they are used
    message: float = 0.0  # of these, what of the next block has arrived
    kept: float = 0.0  # of these, what other blocks keep until their backward pass
    opening: float = 0.0  # gathered when a forward pass begins: the ends and a block, and their messages
    summed: float = 0.0  # gradients, while those of a block are summed over ranks
    closing: float = 0.0  # while those outside of the blocks are, behind the backward pass
    host: float = 0.0  # gradients and optimizer state that are not on the device, but in host memory

    @property
    def fixed(self) -> float:
        return self.gradients + self.optimizer + self.head + self.block + self.gathered + self.summed

    def activations(self, full: int, selective: int, offload: bool = False) -> float:
        """Bytes kept at the end of the forward pass, or when the last block runs again, if these are more."""
        inputs = min(full, 2) * self.full if offload else full * self.full
        forward = inputs + selective * self.selective + (self.blocks - full - selective) * self.everything
        again = inputs + self.everything if full else 0.0
        return max(forward, again)

    def of(self, full: int, selective: int, offload: bool = False) -> float:
        """What these numbers of blocks take, with a margin."""
        return SLACK * (self.fixed + self.activations(full, selective, offload)) + RESERVE_BYTES


def need(
    model: Decoder,
    tokens: int,
    optimizer: str = "adamw_torch",
    spread: Spread | None = None,
    in_backward: bool = False,
    device: str = "cuda",
) -> Need:
    """What a micro-batch of `tokens` takes at most, on each rank. optimizer: its name among the options.
    model: may be sharded, or an outline that shall be. in_backward: optim_in_backward. device: its type."""
    spread = spread or Spread()
    row, tokens = tokens, -(-tokens // spread.context)
    config, compute, size = model.config, model.compute_dtype, model.compute_dtype.itemsize
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = spread.share(trained)
    state = gradients * state_per_byte(optimizer)
    if in_backward:  # one at a time
        gradients = max(spread.share([p]) for p in model.parameters() if p.requires_grad)
    blocks, outside = [spread.held(block) for block in model.layers], spread.held(model, "layers.")
    largest = max(blocks, key=bytes_of)
    mine, own = (bytes_of(tensor for tensor in each if tensor.requires_grad) for each in (outside, largest))
    ends = [] if config.tied_head else [p for p in (model.embed_tokens.weight,) if p.requires_grad]
    early = mine - bytes_of(ends)  # that of the embedding comes last
    first, gathered, message, kept = min(early + own, gradients), 0.0, 0.0, 0.0
    opening, summed, closing = 0.0, 0.0, 0.0
    if spread.ranks > 1 or spread.away:
        first, summed, closing = early + own, 2 * own + early, 2 * mine
        if device == "cpu" and spread.shard > 1:  # gloo copies the message, the engine has a gradient still
            closing += bytes_of([tensor for tensor in outside if tensor.requires_grad][-1:])
        message = bytes_of(largest) if spread.shard > 1 else 0.0
        kept = sum(map(bytes_of, blocks)) - bytes_of(largest) if spread.keeps else 0.0
        gathered = bytes_of(outside) + bytes_of(largest) + message + kept
        opening = 2 * bytes_of([*outside, *largest]) if spread.shard > 1 else 0.0

    hidden, middle = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    cheap = 2 * hidden + middle
    stream = 4 if compute is torch.float16 else size  # bytes of a number of the residual stream (model.py)
    numbers = 2 * hidden + 2 * queries + 2 * keys + 3 * middle + config.qk_norm * (queries + keys)
    between = 0.0
    if spread.context > 1:  # what attention gives lies otherwise than what the next product takes
        numbers += queries * (4 // size if spread.ring and size < 4 else not spread.ring)
    if spread.context > 1 and spread.ring:  # scores and what is made of them; keys and values on their way
        between = 6.0 * config.num_heads * min(PIECE, tokens) * tokens * 4 + 8.0 * tokens * keys * 4
    block = tokens * (numbers * size + 2 * hidden * stream + 4 * config.num_heads)
    block += _of_adapters(model, tokens, size) / config.num_layers
    copies = _cast_weights(model, compute) / config.num_layers

    head_rows = 2 * (row + tokens) * hidden * size  # the last norm, its rows, their gradient, that of all
    head = model.head_weight()
    logits = chunk_bytes(tokens, config.vocab_size, compute, device, head.requires_grad)
    trained_head = head.numel() * 4 if head.requires_grad else 0  # summed in fp32 beside the gradient itself
    narrow_head = head.numel() * size if head.dtype != compute else 0
    values = 8 * tokens * hidden if model.v_head is not None else 0  # its rows in fp32, and their gradient
    return Need(
        blocks=config.num_layers - first_trained(model),
        gradients=0.0 if spread.away else gradients,
        optimizer=0.0 if spread.away else state,
        head=head_rows + logits + trained_head + narrow_head + values,
        block=block + between + _shared_weight(model, size),
        everything=block + copies,
        selective=block + copies - tokens * cheap * size,
        full=tokens * hidden * stream,
        first=first,
        gathered=gathered,
        message=message,
        kept=kept,
        opening=opening,
        summed=summed,
        closing=closing,
        host=gradients + state if spread.away else 0.0,
    )


def copied(model: Decoder, optimizer: str, spread: Spread) -> float:
    """Bytes of host memory that rank 0 takes while a checkpoint is written (async_save)."""
    trained = spread.share(parameter for parameter in model.parameters() if parameter.requires_grad)
    written = trained if lora_layers(model) else spread.share(model.parameters())
    return written + trained * state_per_byte(optimizer) * spread.shard / spread.ranks


def first_trained(model: Decoder) -> int:
    """Number of the first block with a backward pass. The blocks below it keep nothing."""
    if model.embed_tokens.weight.requires_grad:
        return 0
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.layers]
    return trains.index(True) if any(trains) else len(trains)


def _of_adapters(model: Decoder, tokens: int, size: int) -> float:
    """The narrow products x A^T, inputs after dropout with their masks, DoRA's outputs before scaling."""
    total = 0
    for layer in lora_layers(model).values():
        total += tokens * layer.rank * size
        if layer.dropout_probability > 0:
            total += tokens * layer.in_features * (size + 1)
        if layer.magnitude is not None:
            total += tokens * layer.out_features * size
    return total


def _shared_weight(model: Decoder, size: int) -> float:
    """The dense weight that quantised layers are used through, the largest; DoRA's norms take another."""
    layers = quantised_linears(model).values()
    largest = max((layer.in_features * layer.out_features * size for layer in layers), default=0)
    return largest * (1 + any(layer.magnitude is not None for layer in lora_layers(model).values()))


def _cast_weights(model: Decoder, compute: torch.dtype) -> float:
    """Weights of another dtype than the compute dtype are cast where used; copies stay until the backward."""
    named = model.layers.named_parameters()
    own = [parameter for name, parameter in named if not name.endswith(("lora_a", "lora_b"))]
    cast = (parameter.numel() for parameter in own if parameter.dtype != compute and parameter.dim() == 2)
    return sum(cast) * compute.itemsize


def choose(need: Need, free: float) -> tuple[int, int]:
    """(full, selective) that fits into `free` bytes: blocks that run again, blocks that drop what is cheap.

    Dropping what is cheap comes first: counted by operations and traffic (not measured), a byte costs a
    seventh of the time that it costs by running a block again. All blocks run again if nothing fits.
    """
    blocks = need.blocks
    most = blocks if need.selective < need.everything else 0
    ladder = [(0, selective) for selective in range(most + 1)]
    ladder += [(full, min(most, blocks - full)) for full in range(1, blocks + 1)]
    return next((step for step in ladder if need.of(*step) <= free), (blocks, 0))


def plan(policy: str, need: Need, layers: int, device: torch.device, free: float) -> tuple[Plan, str]:
    """What the blocks do under this policy (one of recompute.POLICIES), and a line that says so."""
    blocks = need.blocks
    fixed = {"none": (0, 0), "selective": (0, blocks), "full": (blocks, 0), "offload": (blocks, 0)}
    full, selective = choose(need, free) if policy == "auto" else fixed[policy]
    away = policy == "offload" or (policy == "auto" and need.of(full, selective) > free)
    away = away and device.type == "cuda"  # elsewhere the inputs are in the host's memory already
    what = f"{full} of {layers} blocks" + f", norms and activations of {selective}" * bool(selective)
    what += ", block inputs wait in host memory" * away
    needed, gib = need.of(full, selective, away), 2**30
    line = f"gradient checkpointing: {what} ({policy}: needs {needed / gib:.1f} of {free / gib:.1f} GiB free"
    line += f", {need.of(0, 0) / gib:.1f} without)" if full or selective else ")"
    if policy == "auto" and needed > free:
        line += "; that may be too much: lower per_device_train_batch_size or cutoff_len"
    below = layers - blocks  # those keep nothing anyway
    chosen = Plan(full=below + full, selective=selective) if full else Plan()
    if selective and not full:
        chosen.selective = below + selective
    if away:
        chosen.offload = Offload(CudaTransfers(device))
    return chosen, line


def free_bytes(device: torch.device, here: int = 1) -> float:
    """What this process may still take: of a GPU what is free or cached by torch, of the host's memory its
    share of what the machine, the control group and the process's own limits leave.
    here: ranks on this machine, where no launcher says it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_host_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", here))


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # numbers of malloc.h
LARGEST_INT = 2**31 - 1
MAPPED_FROM = 2**30  # bytes: larger blocks are mapped one by one, so a model that is dropped is given back
GROWTH = 2**26  # bytes the heap grows by


def keep_freed() -> bool:
    """Ask glibc's malloc to keep what is freed for the next step of a run on a CPU; False without mallopt.

    It hands large blocks back to the kernel, and a step frees and takes gigabytes: 70 thousand pages were
    zeroed again in every step of 4 x 256 tokens (135M model, fp32). Keeping them took 4 to 6% off the step
    and added nothing to the peak. For runs, not for libraries: it holds for the process until its end.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    wanted = {M_MMAP_THRESHOLD: MAPPED_FROM, M_TRIM_THRESHOLD: LARGEST_INT, M_TOP_PAD: GROWTH}
    return all(set_option(number, value) == 1 for number, value in wanted.items())

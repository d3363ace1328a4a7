"""What a model loses when its weights take fewer bits: perplexity, divergence, error and bits a weight, on a
text.

    texts = windows(tokenizer, "wiki.txt", length=1024, tokens=4096)
    perplexity(model, texts)                                    # exp of the mean loss a token
    report = measure(parent, child, texts)                      # per block and in total
    print(*report.lines(), sep="\\n")

parent is the model in 16 or 32 bit, child the same model with quantised linears, perhaps with an adapter
beside them. KL is KL(parent || child) = sum p (log p - log q) over the vocabulary in nats, mean over all
positions. Both models are in memory at once, as KL needs the whole distributions of both.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from architectures.config import ModelConfig
from checkpoints.huggingface import checkpoint_dtype, load_model
from checkpoints.peft import load_adapter
from checkpoints.safetensors_files import weight_files, write_json
from checkpoints.source import Source
from conversion.merging import Merge
from conversion.requantise import Requantiser
from kernels.linear import LinearLayer
from lora import LoraLinear, replace_module
from model import Decoder
from options.errors import UserError, refuse
from options.limits import small
from options.option import option
from quant.linear import QuantLinear
from text.tokenizer import Tokenizer

REMAINDER = "adapter"  # folder inside an export: what its codes cannot hold, an adapter in PEFT's format
WINDOW = 1024  # tokens that are read together
CHUNK_NUMBERS = 1 << 25  # logits held at once: 128 MiB in fp32, a few times over
CHARACTERS_PER_TOKEN = 32  # no text has more on average; so much of a long file is tokenised


@dataclass(frozen=True)
class QualityOptions:
    report: bool = option(
        False, "compare the export with its 16-bit parent on a text: bits a weight, error, KL and perplexity"
    )
    report_parent: str | None = option(None, "folder of the parent; default: base and adapters in 16 bit")
    export_sample_text: str | None = option(None, "text file (UTF-8) on which losses and report are measured")
    export_sample_tokens: int = option(4096, "how many tokens of it are used, from its start")

    def __post_init__(self):
        unread = self.report and not self.export_sample_text
        refuse(unread, "report: needs a text to measure on; give export_sample_text=FILE")
        unasked, tokens = self.report_parent and not self.report, self.export_sample_tokens
        refuse(unasked, "report_parent: nothing is compared without report=true")
        refuse(tokens < 2, f"export_sample_tokens: {tokens}; a loss needs 2 or more")


# Text


def windows(tokenizer: Tokenizer, path: Path, length=WINDOW, tokens: int | None = None) -> list[Tensor]:
    """The text's tokens (the beginning-of-text token first, where the tokenizer has one) in rows of at most
    `length`, (<= length,) int64 each; at most `tokens` in all. Raises UserError naming the file."""
    try:
        text = small(Path(path), 2**32).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"export_sample_text: {path} cannot be read as UTF-8 text ({error})") from error
    if tokens is not None:
        text = text[: tokens * CHARACTERS_PER_TOKEN]
    ids = torch.tensor(tokenizer.encode(text, add_special=True), dtype=torch.int64)[:tokens]
    rows = [row for row in ids.split(length) if len(row) > 1]  # the first of a row is not predicted
    refuse(not rows, f"export_sample_text: {path} holds {len(ids)} tokens; a loss needs 2 or more")
    return rows


# Loss


def perplexity(model: Decoder, texts: list[Tensor]) -> float:
    return math.exp(mean_loss(model, texts))


@torch.no_grad()
def mean_loss(model: Decoder, texts: list[Tensor]) -> float:
    """Mean of -log p(next token) in nats over all rows; each row (T,) int64 is read alone."""
    total = 0.0
    for tokens in texts:
        hidden = hidden_states(model, tokens)
        for rows in chunks(model, len(tokens) - 1):
            total -= _at(log_probabilities(model, hidden[rows]), tokens[1:][rows]).sum().item()
    return total / sum(len(tokens) - 1 for tokens in texts)


@dataclass(frozen=True)
class Difference:
    """Two models on one text: losses in nats a token, and KL(parent || child)."""

    parent_loss: float
    child_loss: float
    kl: float

    @property
    def perplexity_change(self) -> float:
        """0.02 = 2 % more."""
        return math.exp(self.child_loss - self.parent_loss) - 1


def compare(parent: Decoder, child: Decoder, texts: list[Tensor]) -> Difference:
    return _difference(parent, child, texts, _all_states(parent, texts), _all_states(child, texts))


@torch.no_grad()
def _difference(parent: Decoder, child: Decoder, texts: list[Tensor], before, after) -> Difference:
    """Two heads on two lists of hidden states (T, E). KL is taken at every position, the last of each too."""
    parent_loss = child_loss = divergence = 0.0
    for tokens, reference, hidden in zip(texts, before, after):
        for rows in chunks(parent, len(tokens)):
            expected = log_probabilities(parent, reference[rows])
            found = log_probabilities(child, hidden[rows])
            parent_loss -= _at(expected, tokens[1:][rows]).sum().item()
            child_loss -= _at(found, tokens[1:][rows]).sum().item()
            divergence += (expected.exp() * (expected - found)).sum().item()
    positions = sum(map(len, texts))
    predicted = positions - len(texts)
    return Difference(parent_loss / predicted, child_loss / predicted, divergence / positions)


@torch.no_grad()
def _all_states(model: Decoder, texts: list[Tensor]) -> list[Tensor]:
    return [hidden_states(model, tokens) for tokens in texts]


def hidden_states(model: Decoder, tokens: Tensor) -> Tensor:
    """tokens (T,) -> (T, E)."""
    device, count = model.embed_tokens.weight.device, len(tokens)
    borders = torch.tensor([0, count], dtype=torch.int32, device=device)
    return model(tokens.to(device), torch.arange(count, device=device), borders, count)


def log_probabilities(model: Decoder, hidden: Tensor) -> Tensor:
    """hidden (T, E) -> (T, V) fp32."""
    return model.logits(hidden).float().log_softmax(-1)


def chunks(model: Decoder, count: int) -> Iterator[slice]:
    """So many rows at a time that their logits stay small."""
    step = max(1, CHUNK_NUMBERS // model.config.vocab_size)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _at(log_p: Tensor, labels: Tensor) -> Tensor:
    """log p of the labels; the rows beyond the last label have none."""
    return log_p[: len(labels)].gather(1, labels[:, None].to(log_p.device))


# Weights


@dataclass(frozen=True)
class LinearQuality:
    """One quantised linear: what it takes, and ||W - W'|| / ||W|| (Frobenius)."""

    name: str
    weights: int
    storage_bytes: int  # codes, scales and the adapter beside them
    error: float
    norm: float  # ||W||, to add errors up

    @property
    def bits(self) -> float:
        return total_bits([self])


def linear_quality(name: str, weight: Tensor, layer: nn.Module, stored_dtype: torch.dtype) -> LinearQuality:
    """weight: the parent's (out, in); layer: the child's linear, with or without an adapter, quantised or
    else stored in stored_dtype."""
    base = layer.base if isinstance(layer, LoraLinear) else layer
    if isinstance(base, QuantLinear):
        storage, found = base.storage_bytes, base.dequantize(torch.float32)
    else:
        storage, found = base.weight.numel() * stored_dtype.itemsize, base.weight.detach().float()
    if isinstance(layer, LoraLinear):
        found = layer.merged_weight()
        storage += sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))
    exact = weight.detach().to(found.device, torch.float32)
    norm = torch.linalg.vector_norm(exact).item()
    error = torch.linalg.vector_norm(found - exact).item() / max(norm, torch.finfo(torch.float32).tiny)
    return LinearQuality(name, weight.numel(), storage, error, norm)


def total_error(linears: list[LinearQuality]) -> float:
    """||W - W'|| / ||W|| of all of them as one vector."""
    lost = sum((linear.error * linear.norm) ** 2 for linear in linears)
    return math.sqrt(lost / max(sum(linear.norm**2 for linear in linears), torch.finfo(torch.float32).tiny))


def total_bits(linears: list[LinearQuality]) -> float:
    return 8 * sum(linear.storage_bytes for linear in linears) / sum(linear.weights for linear in linears)


# The report


@dataclass(frozen=True)
class BlockQuality:
    """One block of the child: its linears, and what this block alone does in the parent's place."""

    linears: list[LinearQuality]
    difference: Difference


@dataclass(frozen=True)
class Report:
    blocks: list[BlockQuality]
    difference: Difference  # on the whole text
    tokens: int
    block_tokens: int  # the blocks' differences are of this many
    model_bits: float  # all numbers of the model, embeddings, norms and head included

    @property
    def linears(self) -> list[LinearQuality]:
        return [linear for block in self.blocks for linear in block.linears]

    def lines(self) -> Iterator[str]:
        """For people: a line for each block, then the totals."""
        names = list(dict.fromkeys(linear.name.rpartition(".")[2] for linear in self.linears))
        yield f"each block alone, KL and perplexity on {self.block_tokens:,} tokens; error is |W - W'| / |W|"
        head = f"{'block':>5} {'bits':>7} {'error':>8} {'KL':>10} {'perplexity':>11}"
        yield head + "".join(f" {name:>9}" for name in names)
        for number, block in enumerate(self.blocks):
            own = {linear.name.rpartition(".")[2]: f"{linear.error:9.5f}" for linear in block.linears}
            numbers = f"{number:5} {total_bits(block.linears):7.3f} {total_error(block.linears):8.5f}"
            change = f" {block.difference.kl:10.3e} {100 * block.difference.perplexity_change:+10.3f}%"
            yield numbers + change + "".join(f" {own.get(name, ''):>9}" for name in names)
        before, after = math.exp(self.difference.parent_loss), math.exp(self.difference.child_loss)
        bits, error = f"{total_bits(self.linears):.3f} bits a weight in linears", total_error(self.linears)
        yield f"total: {bits}, {self.model_bits:.3f} in all the model, error {error:.5f}"
        change = f"{before:.4f} -> {after:.4f} ({100 * self.difference.perplexity_change:+.3f}%)"
        yield f"on {self.tokens:,} tokens: KL {self.difference.kl:.5f}, perplexity {change}"

    def as_dict(self) -> dict:
        """For machines."""
        blocks = []
        for block in self.blocks:
            linears = {each.name: {"bits": each.bits, "error": each.error} for each in block.linears}
            own = {"bits": total_bits(block.linears), "error": total_error(block.linears)}
            blocks.append(own | asdict(block.difference) | {"linears": linears})
        total = {"tokens": self.tokens, "block_tokens": self.block_tokens, "bits": total_bits(self.linears)}
        total |= {"model_bits": self.model_bits, "error": total_error(self.linears)}
        return total | asdict(self.difference) | {"blocks": blocks}


def measure(parent: Decoder, child: Decoder, texts: list[Tensor], stored_bytes: int) -> Report:
    """Compare two models of one shape; stored_bytes: what the child's files take.

    The child's blocks are put into the parent one at a time and it reads the first row of the texts, which
    takes a pass for each block; the parent is afterwards as it was.
    """
    check_parent(parent.config, child.config)
    states = _all_states(parent, texts)
    blocks = []
    for number, original in enumerate(parent.layers):
        linears = _linears(parent, child, number)
        parent.layers[number] = child.layers[number]
        try:
            mixed = _all_states(parent, texts[:1])
        finally:
            parent.layers[number] = original
        blocks.append(BlockQuality(linears, _difference(parent, parent, texts[:1], states[:1], mixed)))
    difference = _difference(parent, child, texts, states, _all_states(child, texts))
    bits = 8 * stored_bytes / sum(p.numel() for p in parent.parameters())
    return Report(blocks, difference, sum(map(len, texts)), len(texts[0]), bits)


def check_parent(parent: ModelConfig, child: ModelConfig) -> None:
    """Raises UserError unless the parent is in 16 or 32 bit and of the child's shape."""
    packed, other = parent.hf.get("quantization_config"), _shape(parent) != _shape(child)
    refuse(packed, "report_parent: the parent is quantised too; name the model in 16 bit")
    refuse(other, "report_parent: the parent has other sizes than the model, so it is another model's")


def _shape(config: ModelConfig) -> tuple[int, dict[str, torch.Size]]:
    """Of the vocabulary and the blocks; heads may be tied in one of two models only."""
    blocks = Decoder(config, device="meta").layers
    return config.vocab_size, {name: parameter.shape for name, parameter in blocks.named_parameters()}


def _linears(parent: Decoder, child: Decoder, number: int) -> list[LinearQuality]:
    before, after = (dict(m.layers[number].named_modules(prefix=f"layers.{number}")) for m in (parent, child))
    linears = [name for name, layer in after.items() if isinstance(layer, LinearLayer)]
    weights = {name: before[name].weight for name in linears if isinstance(before.get(name), nn.Linear)}
    dtype = checkpoint_dtype(child.config)
    return [linear_quality(name, weight, after[name], dtype) for name, weight in weights.items()]


# An export


def sample(options: QualityOptions, tokenizer: Tokenizer, context_limit: int) -> list[Tensor] | None:
    """The text that the options name, in windows; None if they name none."""
    path, tokens = options.export_sample_text, options.export_sample_tokens
    return windows(tokenizer, path, min(WINDOW, context_limit), tokens) if path else None


def tell_quality(
    options: QualityOptions, source: Source, merge: Merge, packing: Requantiser | None, texts, target: Path
) -> None:
    """Print losses on the sample and the report, measured on the files as written; both to quality.json.

    texts: what `sample` gave.
    """
    if texts is None:
        if packing is not None and source.adapters:
            print("note: export_sample_text=FILE would measure what this does to the loss on a text")
        return
    found = {}
    if packing is not None:
        found["losses"] = losses(source.base, merge, packing, texts, target)
        count = f"{sum(map(len, texts)):,} tokens of {options.export_sample_text}"
        listed = ", ".join(f"{name} {value:.5f}" for name, value in found["losses"].items())
        print(f"loss on {count}: {listed}")
    if options.report:
        parent = options.report_parent
        exact = Merge(merge.config, merge.adapters, torch.float32, merge.device)
        before = load_model(parent, torch.float32, merge.device) if parent else exact.model(source.base)
        files = [*weight_files(target), *target.glob(f"{REMAINDER}/*.safetensors")]
        stored_bytes = sum(path.stat().st_size for path in files)
        report = measure(before, load_written(target, merge.device), texts, stored_bytes)
        print(*report.lines(), sep="\n")
        found["report"] = report.as_dict()
    write_json(target / "quality.json", found)


def losses(base: Path, merge: Merge, packing: Requantiser, texts: list[Tensor], target: Path) -> dict:
    """Nats a token, in fp32: of what was to be kept, of its nearest codes alone, and of what was written."""
    wide = Merge(merge.config, merge.adapters, torch.float32, merge.device, merge.quantization)
    model = wide.model(base)
    found = {"base + adapter" if merge.adapters else "16 bit": mean_loss(model, texts)}
    for module in packing.fits:
        linear = model.get_submodule(module)
        codes = packing.format.quantise(linear.weight.detach(), linear.bias, torch.float32)
        replace_module(model, module, codes)
    found["quantised alone"] = mean_loss(model, texts)
    del model
    if packing.rank:
        found[f"with rank {packing.rank} beside it"] = mean_loss(load_written(target, merge.device), texts)
    return found


def load_written(target: Path, device: str) -> Decoder:
    """The exported model as a user has it, its adapter unmerged beside the codes, computing in fp32."""
    model = load_model(target, torch.float32, device)
    if (target / REMAINDER).is_dir():
        load_adapter(model, target / REMAINDER, checkpoint_dtype(model.config))
    return model.eval()

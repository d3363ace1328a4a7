"""Adapters by composition: LoRA, rsLoRA, DoRA; which parameters train (lora, freeze, full); merging.

LoRA    y = W x + s B A drop(x)               Hu et al., arXiv 2106.09685, eq. 3; s = alpha / R
rsLoRA  the same with s = alpha / sqrt(R)     Kalajdzievski, arXiv 2312.03732
DoRA    y = m (W + s B A) x / ||W + s B A||   Liu et al., arXiv 2402.09353, eq. 5; norms of rows, no gradient

W (out, in) is any frozen base layer: something with in_features, out_features, bias (or None), forward
and, unless it is an nn.Linear, dequantize() -> (out, in). Quantised layers (quant/linear.py) may also have
small_batch(), the product of decoding straight from the codes with A and B beside them. A (R, in)
starts uniform (kaiming, a = sqrt(5)), B (out, R) at zero and m at ||W||, so training starts at the base
model. Adapters are fp32 unless asked otherwise and are cast to x's dtype where they are used; norms and
merged weights are computed in fp32.

    lora.prepare_trainable(model, LoraOptions(lora_rank=16), torch.Generator().manual_seed(42))
    print(lora.trainable_report(model))
    with lora.lora_off(model): ...          # the base model, without a second copy
    lora.merge_for_good(model)              # plain linears again
"""

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from options.errors import UserError
from options.option import COMMON, option

HEAD_NAMES = ("lm_head", "output_layer", "output")  # what output heads are called; "all" leaves them out
EVERY_LINEAR = ("all", "all-linear")  # LLaMA-Factory's word and peft's


@dataclass(frozen=True)
class LoraOptions:
    finetuning_type: Literal["lora", "full", "freeze"] = option(
        "lora", "what is trained", COMMON, also="sft_type train_type tuner_type"
    )
    lora_rank: int = option(8, "rank R of the update", COMMON, also="lora_r")
    lora_alpha: float | None = option(None, "numerator of the scale; default 2 * lora_rank", COMMON)
    lora_dropout: float = option(0.0, "dropout on the input of the low-rank branch", also="lora_dropout_p")
    lora_target: tuple[str, ...] = option(
        ("all",),
        "linears that get an adapter, by the end of their name; all = each but the head",
        COMMON,
        also="lora_target_modules target_modules",
    )
    additional_target: tuple[str, ...] = option(
        (),
        "modules trained in full and saved with the adapter, such as embed_tokens",
        also="modules_to_save lora_modules_to_save",
    )
    create_new_adapter: bool = option(
        False, "merge the given adapters and train a new one (default: train the last one on)"
    )
    use_rslora: bool = option(False, "scale by alpha / sqrt(R) instead of alpha / R", also="use_rs_lora")
    use_dora: bool = option(False, "train the row magnitudes apart from the directions")
    num_layer_trainable: int = option(
        2, "freeze: how many layers train; n the last n, -n the first n", also="freeze_trainable_layers"
    )
    name_module_trainable: tuple[str, ...] = option(
        ("all",),
        "freeze: modules that train inside those layers; all = the whole layer",
        also="freeze_trainable_modules",
    )
    freeze_extra_modules: tuple[str, ...] = option(
        (), "freeze: further modules that train, outside the layers: embed_tokens, norm, lm_head"
    )
    print_param_status: bool = option(
        False, "list every tensor with its shape, dtype, device and whether it trains"
    )

    def __post_init__(self):
        if self.lora_rank < 1:
            raise UserError(f"lora_rank: {self.lora_rank} must be at least 1")
        if self.lora_alpha is not None and not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise UserError(f"lora_alpha: {self.lora_alpha} must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout: {self.lora_dropout} is not in [0, 1)")
        for key in ("lora_target", "name_module_trainable"):
            if not getattr(self, key):
                raise UserError(f"{key}: empty; name modules or write all")
        if self.num_layer_trainable == 0 and not self.freeze_extra_modules:
            raise UserError(
                "num_layer_trainable: 0 layers train, and freeze_extra_modules names nothing else"
            )
        for key in ("use_dora", "use_rslora", "additional_target", "create_new_adapter"):
            if getattr(self, key) and self.finetuning_type != "lora":
                raise UserError(
                    f"{key}: it is a part of LoRA, and finetuning_type is {self.finetuning_type}; set "
                    f"finetuning_type=lora, or drop {key}"
                )

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


class LoraLinear(nn.Module):
    """A frozen base layer with a trainable low-rank update beside it.

    base        has in_features, out_features, forward; and dequantize() unless it is an nn.Linear
    lora_a      (R, in), lora_b (out, R), magnitude (out,) for DoRA or None; all trainable
    merged      the base weight holds the update: forward is the base alone
    off         forward is the base alone, without the update (see lora_off)
    generator   draws A on the CPU in fp32, so a seed gives the same adapter on every device
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout_probability: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout_probability = dropout_probability
        self.merged = False
        self.off = False
        self._weight_before_merge: Tensor | None = None
        self._settled_ratio: Tensor | None = None  # (out,) fp32, see freeze_adapter
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        lora_a = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))
        self.magnitude = nn.Parameter(self.updated_norm().to(dtype)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype that the base gives for x."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise ValueError(
                "the adapters are merged, so they get no gradient; call lora.unmerge_lora to train"
            )
        if self.merged or self.off:
            return self.base(x)
        if self.magnitude is not None:
            return self._dora(x)
        if self._one_kernel_serves(x):
            return self._kernel(x, self.base.bias)
        result = self._small_batch(x)
        if result is not None:
            return result
        result = self.base(x)
        return result + self._delta(self._dropout(x)).to(result.dtype)

    def _dora(self, x: Tensor) -> Tensor:
        # the ratio stays fp32: bf16 would round it to steps of 1/128, coarser than what training moves it by
        ratio = self._settled_ratio  # (out,)
        if ratio is None:
            ratio = _wide(self.magnitude) / self.updated_norm()
        if self.training and self.dropout_probability > 0:
            # peft drops the input of both branches here; only the untouched base output sees x whole
            result, dropped = self.base(x), self._dropout(x)
            update = (ratio - 1) * self._without_bias(self.base(dropped)) + ratio * self._delta(dropped)
            return (result + update).to(result.dtype)
        # peft's base + (m/n - 1) W x + (m/n) s B A x, collected: one product serves both terms
        if self._one_kernel_serves(x):
            directed = self._kernel(x, None)
        elif (product := self._small_batch(x)) is not None:
            directed = self._without_bias(product)
        else:
            directed = self._without_bias(self.base(x)) + self._delta(x)
        result = ratio * directed
        if self.base.bias is not None:
            result = result + self.base.bias
        return result.to(x.dtype)

    def _small_batch(self, x: Tensor) -> Tensor | None:
        """W x + bias + s B A x straight from the codes of a quantised base, where that serves."""
        if not hasattr(self.base, "small_batch") or (self.training and self.dropout_probability > 0):
            return None
        return self.base.small_batch(x, self.lora_a, self.lora_b, self.scale)

    def _delta(self, x: Tensor) -> Tensor:
        """s B A x in x's dtype."""
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype)) * self.scale

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_probability, self.training)

    def _one_kernel_serves(self, x: Tensor) -> bool:
        """The fused product knows a flat row, a frozen base and no dropout; a quantised base is dequantised
        for it, which pays where its backward pass follows (without one, the base's own forward may be
        cheaper)."""
        if x.dim() != 2 or (self.training and self.dropout_probability > 0) or _trains(self.base):
            return False
        return _is_plain(self.base) or (torch.is_grad_enabled() and hasattr(self.base, "dequantize"))

    def _kernel(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.lora_linear(x, *self._part(bias))

    def _part(self, bias: Tensor | None) -> kernels.LoraPart:
        weight = self.base.weight if _is_plain(self.base) else self.base
        return kernels.LoraPart(weight, bias, self.lora_a, self.lora_b, self.scale)

    @staticmethod
    def fused(x: Tensor, layers: list[nn.Module]) -> list[Tensor]:
        """[layer(x) for layer in layers], in one function for those that allow it: x is saved and read once.

        These are adapters that one kernel serves and, beside them, frozen linears without an adapter.
        """
        results = LoraLinear._small_batch_together(x, layers)
        if results is not None:
            return results
        parts: dict[int, kernels.LoraPart] = {}
        for place, layer in enumerate(layers):
            if isinstance(layer, LoraLinear):
                asleep = layer.merged or layer.off or layer.magnitude is not None
                if not asleep and layer._one_kernel_serves(x):
                    parts[place] = layer._part(layer.base.bias)
            elif _is_plain(layer) and not _trains(layer) and x.dim() == 2:
                parts[place] = kernels.LoraPart(layer.weight, layer.bias, None, None, 0.0)
            elif is_quantised(layer) and torch.is_grad_enabled() and x.dim() == 2:
                parts[place] = kernels.LoraPart(layer, layer.bias, None, None, 0.0)
        if sum(part.lora_a is not None for part in parts.values()) == 0 or len(parts) == 1:
            return [layer(x) for layer in layers]
        results = dict(zip(parts, kernels.lora_linears(x, list(parts.values()))))
        return [results[place] if place in results else layer(x) for place, layer in enumerate(layers)]

    @staticmethod
    def _small_batch_together(x: Tensor, layers: list[nn.Module]) -> list[Tensor] | None:
        """The products straight from the codes of quantised bases, in fewer launches, where that serves."""
        parts = []
        for layer in layers:
            adapter = layer if isinstance(layer, LoraLinear) and not (layer.merged or layer.off) else None
            base = layer.base if isinstance(layer, LoraLinear) else layer
            if not hasattr(base, "small_batch_of"):
                return None
            if adapter is None:
                parts.append(kernels.LoraPart(base, base.bias, None, None, 0.0))
            elif adapter.magnitude is not None or (adapter.training and adapter.dropout_probability > 0):
                return None
            else:
                parts.append(kernels.LoraPart(base, base.bias, adapter.lora_a, adapter.lora_b, adapter.scale))
        return parts[0].weight.small_batch_of(x, parts)

    def lora_factors(self) -> tuple[nn.Module, Tensor | None, Tensor | None]:
        """The base and, beside it, lora_a (R, in) and lora_b (out, R) with the scale in it, for one token at
        a time on a CPU (model.lay_out_for_decoding). An adapter that is not just added gives itself as the
        base."""
        if self.magnitude is not None or self.merged or self.off:
            return self, None, None
        return self.base, self.lora_a.detach(), _wide(self.lora_b.detach()) * self.scale

    def _without_bias(self, result: Tensor) -> Tensor:
        return result if self.base.bias is None else _wide(result) - self.base.bias

    def base_weight(self) -> Tensor:
        """W (out, in), dequantised where the base is quantised."""
        return self.base.weight if _is_plain(self.base) else self.base.dequantize()

    @torch.no_grad()
    def updated_norm(self) -> Tensor:
        """||W + s B A|| of every row, (out,) fp32, without gradient and without forming the sum:

        ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 b (A A^T) . b.  These products have only R columns.
        """
        weight = self.base_weight()
        lora_a, lora_b = _wide(self.lora_a), _wide(self.lora_b)
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        cross = _wide(kernels.linear(weight, lora_a))  # (out, R)
        update = lora_b @ (lora_a @ lora_a.T) * self.scale  # (out, R)
        squares = squares + self.scale * ((2 * cross + update) * lora_b).sum(1)
        # a row of zeros has no direction: with a tiny norm in place of 0 it stays zero instead of 0 / 0
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) that base and adapter are together, fp32, with gradient: for whom a product is
        not enough, such as the reader of model.head_weight(). forward is cheaper, and exact in bf16 too."""
        if self.merged or self.off:
            return self.base_weight()
        if self.training and self.dropout_probability > 0:
            raise ValueError(
                "lora_dropout: with dropout an adapted layer is no single matrix; call the layer"
            )
        updated = _wide(self.base_weight()) + self.scale * (_wide(self.lora_b) @ _wide(self.lora_a))
        if self.magnitude is not None:
            updated = updated * (_wide(self.magnitude) / self.updated_norm())[:, None]
        return updated

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (out, in) that alone does what base and adapter do together; fp32, not yet rounded."""
        merged = _wide(self.base_weight()) + self.scale * (_wide(self.lora_b) @ _wide(self.lora_a))
        if self.magnitude is not None:
            merged *= (_wide(self.magnitude) / self.updated_norm())[:, None]
        return merged

    @torch.no_grad()
    def merge(self) -> None:
        """Write the update into the base weight and keep the weight from before, so that unmerge is exact.

        That doubles the memory of this weight until unmerge. Subtracting the update instead would leave one
        rounding per merge in the base (in bf16: of 1/256), and thousands of rollouts would add up.
        """
        if self.merged:
            raise ValueError("already merged; call unmerge first")
        if not _is_plain(self.base):
            raise ValueError(
                f"a {type(self.base).__name__} cannot be merged in place; use lora.merge_for_good"
            )
        self._weight_before_merge = self.base.weight.detach().clone()
        self.base.weight.copy_(self.merged_weight())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            raise ValueError("not merged; call merge first")
        self.base.weight.copy_(self._weight_before_merge)
        self._weight_before_merge = None
        self.merged = False

    @torch.no_grad()
    def freeze_adapter(self, dtype: torch.dtype) -> None:
        """For an adapter that will not change any more: A and B in the dtype they are used in, DoRA's norms
        once."""
        if self.magnitude is not None:
            self._settled_ratio = _wide(self.magnitude) / self.updated_norm()
        self.lora_a.data, self.lora_b.data = self.lora_a.data.to(dtype), self.lora_b.data.to(dtype)

    @torch.no_grad()
    def merged_base(self) -> nn.Module:
        """The base with the update in its weight, for good; an nn.Linear in place of a quantised base."""
        if self.merged:
            return self.base
        merged = self.merged_weight()
        if not torch.isfinite(merged).all():
            raise ValueError("the merged weight is not finite; the adapter is broken")
        if _is_plain(self.base):
            self.base.weight.copy_(merged)
            return self.base
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged.to(self.base.dequantize().dtype), requires_grad=False)
        plain.bias = self.base.bias
        return plain

    def extra_repr(self) -> str:
        kind = (
            "DoRA" if self.magnitude is not None else "rsLoRA" if self.rslora else "LoRA"
        ) + f" rank {self.rank}"
        return f"{kind}, alpha {self.alpha:g}, dropout {self.dropout_probability:g}"


def prepare_trainable(
    model: nn.Module,
    options: LoraOptions,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Set what trains, by options.finetuning_type. dtype is that of new adapters (bf16 under pure_bf16)."""
    quantised = quantised_linears(model)
    if quantised and options.finetuning_type != "lora":
        raise ValueError(
            f"finetuning_type: {options.finetuning_type}, but the base is quantised "
            f"({next(iter(quantised))}, ...): "
            "codes have no gradient; set finetuning_type=lora, or start from a 16-bit model"
        )
    if options.finetuning_type == "lora":
        add_lora(model, options, generator, dtype)
    elif options.finetuning_type == "freeze":
        freeze(model, options)
    elif options.finetuning_type == "full":
        model.requires_grad_(True)
    else:
        raise ValueError(
            f"finetuning_type: {options.finetuning_type!r} is unknown; known are lora, full, freeze"
        )


def add_lora(
    model: nn.Module,
    options: LoraOptions,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Wrap the linears that lora_target names, train additional_target in full, freeze everything else.

    Each A depends on one number drawn from the generator and on the linear's own name, so neither the other
    targets nor the order of modules changes it. Raises ValueError when a name matches nothing.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; call lora.merge_for_good before adding new ones")
    full = _find_modules(model, options.additional_target, "additional_target")
    for name in quantised_linears(model):
        if _inside(name, full):
            raise ValueError(
                f"additional_target: {name} is quantised, and codes have no gradient; lora_target gives it "
                "an adapter"
            )
    names = target_names(model, options.lora_target, without=full)
    seed = int(torch.randint(2**31, (), generator=generator))
    model.requires_grad_(False)
    for name in names:
        layer = LoraLinear(
            model.get_submodule(name),
            options.lora_rank,
            options.alpha,
            dropout_probability=options.lora_dropout,
            rslora=options.use_rslora,
            dora=options.use_dora,
            dtype=dtype,
            generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode())),
        )
        replace_module(model, name, layer.train(model.training))
    for name in full:
        model.get_submodule(name).requires_grad_(True)


def target_names(model: nn.Module, targets: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """Names of the linears that end in one of `targets`, in the model's order; not those inside `without`.

    Raises ValueError for a target that matches nothing, or something that is not a linear.
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if _is_linear(module) and not _inside(name, without)]
    chosen = set()
    for target in targets:
        if target in EVERY_LINEAR:
            matched = [name for name in linears if _last(name) not in HEAD_NAMES]
        else:
            matched = [name for name in linears if _ends_with(name, target)]
        if not matched:
            raise ValueError(f"lora_target: {_why_nothing(model, modules, linears, target)}")
        chosen.update(matched)
    return [name for name in linears if name in chosen]


def _why_nothing(model: nn.Module, modules: dict[str, nn.Module], linears: list[str], target: str) -> str:
    known = ", ".join(sorted({_last(name) for name in linears})) or "none"
    others = [module for name, module in modules.items() if _ends_with(name, target)]
    if target in HEAD_NAMES and _has_tied_head(model):
        return (
            f"{target!r} is tied to embed_tokens in this model and has no weight of its own; linears: {known}"
        )
    if others and _is_linear(others[0]):
        return f"{target!r} is trained in full already (additional_target); name it once; linears: {known}"
    if others:
        kind = type(others[0]).__name__
        return f"{target!r} is a {kind}, not a linear; additional_target trains it in full; linears: {known}"
    return f"no linear is called {target!r}; this model has {known}"


def freeze(model: nn.Module, options: LoraOptions) -> None:
    """Train name_module_trainable in num_layer_trainable layers and freeze_extra_modules; freeze the rest.

    Raises ValueError when there are fewer layers or a name matches nothing.
    """
    stack_name, stack = _layer_stack(model)
    count = options.num_layer_trainable
    if abs(count) > len(stack):
        raise ValueError(f"num_layer_trainable: {count}, but the model has {len(stack)} layers")
    blocks = list(stack)[-count:] if count > 0 else list(stack)[:-count]
    outside = [
        name
        for name, _ in model.named_modules()
        if name and not _inside(name, [stack_name]) and not _inside(stack_name, [name])
    ]
    extra = _find_modules(model, options.freeze_extra_modules, "freeze_extra_modules", outside)
    model.requires_grad_(False)
    for name in options.name_module_trainable if blocks else ():
        matched = [module for block in blocks for module in _modules_called(block, name)]
        if not matched:
            known = ", ".join(sorted({_last(path) for path, _ in blocks[0].named_modules() if path}))
            raise ValueError(
                f"name_module_trainable: no module of a layer is called {name!r}; there are all, {known}"
            )
        for module in matched:
            module.requires_grad_(True)
    for name in extra:
        model.get_submodule(name).requires_grad_(True)


def _layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _ends_with(name, "layers"):
            return name, module
    raise ValueError(
        "finetuning_type: freeze needs a model whose layers are an nn.ModuleList called 'layers'"
    )


def _modules_called(block: nn.Module, name: str) -> list[nn.Module]:
    if name == "all":
        return [block]
    return [module for path, module in block.named_modules() if _ends_with(path, name)]


def _find_modules(
    model: nn.Module, targets: Iterable[str], key: str, candidates: Iterable[str] | None = None
) -> list[str]:
    """Names of modules that end in one of `targets`. A tied head is found where embed_tokens is asked for."""
    targets = list(targets)
    names = [name for name, _ in model.named_modules() if name] if candidates is None else list(candidates)
    found = []
    for target in targets:
        matched = [name for name in names if _ends_with(name, target)]
        tied = not matched and target in HEAD_NAMES and _has_tied_head(model)
        if tied and "embed_tokens" not in targets:
            raise ValueError(
                f"{key}: the head {target!r} is tied to embed_tokens here: name that, and both train"
            )
        if not matched and not tied:
            known = ", ".join(sorted({last for last in map(_last, names) if not last.isdigit()}))
            raise ValueError(f"{key}: no module is called {target!r}; there are {known}")
        found += [name for name in matched if name not in found]
    return found


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Adapted linears by the name of the linear they replaced, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def quantised_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Quantised layers by name, also those under an adapter."""
    return {name: module for name, module in model.named_modules() if is_quantised(module)}


def stacked(first: LoraLinear | None, second: LoraLinear) -> LoraLinear:
    """One adapter that does what two on the same base do together: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1;
    A2]."""
    if first is None:
        return second
    if first.magnitude is not None or second.magnitude is not None:
        raise ValueError(
            "DoRA's row lengths are of the whole weight, so such an adapter cannot lie beside another one on "
            "a "
            "quantised base; merge them with export.py first, or load the base in 16 bit "
            "(quantization_bit=null)"
        )
    rank = first.rank + second.rank
    both = LoraLinear(second.base, rank, rank, dtype=second.lora_a.dtype, generator=torch.Generator())
    both.lora_a.data = torch.cat([first.lora_a.data, second.lora_a.data])
    both.lora_b.data = torch.cat([first.scale * first.lora_b.data, second.scale * second.lora_b.data], dim=1)
    return both.train(second.training)


def full_modules(model: nn.Module) -> list[str]:
    """Names of the modules with trainable weights of their own beside adapters (peft's modules_to_save)."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, LoraLinear)
        and not name.startswith("v_head")  # has a file of its own
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter in place, for inference without its cost; unmerge_lora restores every bit."""
    for layer in _some_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    for layer in _some_layers(model).values():
        layer.unmerge()


def merge_for_good(model: nn.Module) -> None:
    """Put the updates into the weights and plain linears in place of the adapters, one at a time."""
    for name, layer in _some_layers(model).items():
        try:
            base = layer.merged_base()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        replace_module(model, name, base)


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the base model: the reference policy without a second copy. May be nested."""
    layers = list(_some_layers(model).values())
    if any(layer.merged for layer in layers):
        raise ValueError(
            "the adapters are merged, so they cannot be switched off; call lora.unmerge_lora first"
        )
    full = full_modules(model)
    if full:
        raise ValueError(
            f"{', '.join(full)} train in full (additional_target), so the base model is gone: "
            "give a reference model or train without additional_target"
        )
    before = [layer.off for layer in layers]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before):
            layer.off = off


def _some_layers(model: nn.Module) -> dict[str, LoraLinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters")
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def trainable_report(model: nn.Module) -> str:
    """'trainable 2,442,240 of 136,957,632 parameters (1.78 %)'; quantised weights by element."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packed = quantised_linears(model)
    total = sum(p.numel() for name, p in model.named_parameters() if not _inside(name, packed))
    for module in packed.values():
        total += module.in_features * module.out_features
        total += 0 if module.bias is None else module.out_features
    return f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / max(1, total):.2f} %)"


def parameter_status(model: nn.Module) -> list[str]:
    """One line per parameter: name, shape, dtype, device, trained or frozen."""
    return [
        f"{name}  {tuple(p.shape)}  {str(p.dtype).removeprefix('torch.')}  {p.device}  "
        f"{'trained' if p.requires_grad else 'frozen'}"
        for name, p in model.named_parameters()
    ]


def is_quantised(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("in_features", "out_features", "dequantize"))


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not is_quantised(layer)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_quantised(module)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _has_tied_head(model: nn.Module) -> bool:
    """A head that is asked for, has a weight (model.head_weight()), and yet is no module of its own."""
    return hasattr(model, "head_weight") and not any(hasattr(model, name) for name in HEAD_NAMES)


def _ends_with(name: str, target: str) -> bool:
    """peft's rule: 'q_proj' means every '....q_proj', never 'my_q_proj'."""
    return name == target or name.endswith("." + target)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

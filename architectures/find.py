"""Modules of a model by the end of their names: what lora_target, additional_target and freeze name."""

from collections.abc import Iterable

from torch import nn

from kernels.linear import LinearLayer
from options.errors import UserError

HEAD_NAMES = ("lm_head", "output_layer", "output")  # what output heads are called; "all" leaves them out
EVERY_LINEAR = ("all", "all-linear")  # LLaMA-Factory's word and peft's


def target_names(model: nn.Module, targets: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """Names of the linears that end in one of `targets`, in the model's order; not those inside `without`.

    Raises UserError for a target that matches nothing, or something that is not a linear.
    """
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if is_linear(module) and not inside(name, without)]
    chosen = set()
    for target in targets:
        if target in EVERY_LINEAR:
            matched = [name for name in linears if last_name(name) not in HEAD_NAMES]
        else:
            matched = [name for name in linears if ends_with(name, target)]
        if not matched:
            raise UserError(f"lora_target: {_why_nothing(model, modules, linears, target)}")
        chosen.update(matched)
    return [name for name in linears if name in chosen]


def _why_nothing(model: nn.Module, modules: dict[str, nn.Module], linears: list[str], target: str) -> str:
    known = ", ".join(sorted({last_name(name) for name in linears})) or "none"
    others = [module for name, module in modules.items() if ends_with(name, target)]
    if target in HEAD_NAMES and _has_tied_head(model):
        return f"{target!r} is tied to embed_tokens in this model and has no own weight; linears: {known}"
    if others and is_linear(others[0]):
        return f"{target!r} is trained in full already (additional_target); name it once; linears: {known}"
    if others:
        kind = type(others[0]).__name__
        return f"{target!r} is a {kind}, not a linear; additional_target trains it in full; linears: {known}"
    return f"no linear is called {target!r}; this model has {known}"


def find_modules(
    model: nn.Module, targets: Iterable[str], key: str, candidates: Iterable[str] | None = None
) -> list[str]:
    """Names of modules that end in one of `targets`. A tied head is found where embed_tokens is asked for."""
    targets = list(targets)
    names = [name for name, _ in model.named_modules() if name] if candidates is None else list(candidates)
    found = []
    for target in targets:
        matched = [name for name in names if ends_with(name, target)]
        tied = not matched and target in HEAD_NAMES and _has_tied_head(model)
        if tied and "embed_tokens" not in targets:
            raise UserError(
                f"{key}: the head {target!r} is tied to embed_tokens here: name that, and both train"
            )
        if not matched and not tied:
            known = ", ".join(sorted({last for last in map(last_name, names) if not last.isdigit()}))
            raise UserError(f"{key}: no module is called {target!r}; there are {known}")
        found += [name for name in matched if name not in found]
    return found


def is_linear(module: nn.Module) -> bool:
    """Something that an adapter can be put around."""
    return isinstance(module, nn.Linear | LinearLayer)


def _has_tied_head(model: nn.Module) -> bool:
    """A head that is asked for, has a weight (model.head_weight()), and yet is no module of its own."""
    return hasattr(model, "head_weight") and not any(hasattr(model, name) for name in HEAD_NAMES)


def ends_with(name: str, target: str) -> bool:
    """peft's rule: 'q_proj' means every '....q_proj', never 'my_q_proj'."""
    return name == target or name.endswith("." + target)


def last_name(name: str) -> str:
    return name.rpartition(".")[2]


def inside(name: str, parents: Iterable[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)

"""What a model is made of: whether its submodules are still those that it was made with, and nothing is hooked to them.

Only then may the same be computed by other means than calling them.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as hooks

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)
Part = tuple[type, str, bool]  # its class, its settings, and whether it is called as its class defines


def anatomy(model: nn.Module) -> dict[str, Part]:
    """Return what each submodule is, by name; equal for models of which neither was changed."""
    plain = not any(getattr(hooks, name) for name in GLOBAL_HOOKS)
    return {name: part(module, plain) for name, module in model.named_modules() if name}


def part(module: nn.Module, plain: bool = True) -> Part:
    """Return what a module is; `plain` is whether no hooks of all modules are set."""
    own = plain and "forward" not in module.__dict__ and not any(getattr(module, name) for name in HOOKS)
    return type(module), module.extra_repr(), own


def unlike(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of another class, or something is hooked to it."""
    return part(module)[::2] != (kind, True)

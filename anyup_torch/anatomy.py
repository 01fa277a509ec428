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
    return {
        name: (type(module), module.extra_repr(), plain and called_plainly(module))
        for name, module in model.named_modules()
        if name
    }


def called_plainly(module: nn.Module) -> bool:
    """Whether nothing is hooked to a module, and its `forward` is that of its class."""
    return "forward" not in module.__dict__ and not any(getattr(module, name) for name in HOOKS)

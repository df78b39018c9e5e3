"""Hooks that somebody else has on the model, beside LoRA's.

Shortcuts do not call a module, or not with all of a step's rows; where such a hook may look at what a
module gives, the runner computes the step whole.
"""

from torch import nn

from server.model.hooks import LoraHooks


class ForeignHooks:
    """Those of one model, counted anew for each step: they come and go without telling."""

    def __init__(self, model: nn.Module, ours: LoraHooks) -> None:
        self._ours = ours
        self._tables = [
            table
            for module in model.modules()
            for table in (module._forward_hooks, module._forward_pre_hooks)
        ]

    def exist(self) -> bool:
        """Whether there is one right now."""
        return sum(map(len, self._tables)) != self._ours.num_installed

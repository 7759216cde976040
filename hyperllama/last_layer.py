"""Of the last layer, only the keys and values of context rows are ever read: the rest of it is not computed for them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel


class LastLayerSkip:
    """Leaves context rows out of the last layer's queries, attention output and MLP in calls with `gist_lora=owner`.

    Those rows get zeros there, which nothing reads: targets are in the read region, and a prefix holds keys and values. With
    six layers and three quarters of the rows in contexts this saves a ninth of a step's matrix products. `modules` are the
    modules left out; a LoRA inside them would never have an effect.
    """

    def __init__(self, base: PreTrainedModel, owner: nn.Module):
        self.owner = owner
        self.rows = 0
        layer = base.get_decoder().layers[-1]
        attention = layer.self_attn
        candidates = (getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(layer, "mlp", None))
        self.modules = [module for module in candidates if module is not None]
        # As for LoRA: attention runs first and is given the call's arguments, also when checkpointing runs the layer again.
        self._hooks = [attention.register_forward_pre_hook(self._choose_rows, with_kwargs=True)]
        for module in self.modules:
            self._hooks += [module.register_forward_pre_hook(self._leave_out), module.register_forward_hook(self._fill_up)]

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    def _choose_rows(self, attention, args, kwargs):
        self.rows = kwargs["gist_layout"].compress_rows if kwargs.get("gist_lora") is self.owner else 0

    def _leave_out(self, module, args: tuple[Tensor, ...]):
        return (args[0][:, self.rows :], *args[1:]) if self.rows else None

    def _fill_up(self, module, args, output: Tensor):
        return pad(output, (0, 0, self.rows, 0)) if self.rows else None

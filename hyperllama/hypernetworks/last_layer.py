"""Of the last layer, only the keys and values of context rows are ever read: the rest of it is not computed for them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hyperllama.base.decoder import layers_of, part

LEFT_OUT = ("query projection", "output projection", "mlp")


class LastLayerSkip:
    """Leaves the rows on which `lora` acts, `lora.left_out`, out of the last layer's queries, attention and MLP.

    Those rows get zeros there, which nothing reads: targets are in the read region, and a prefix holds keys and values. Queries
    are computed where they are kept (`Kept`), since they choose what a prefix holds. With
    six layers and three quarters of the rows in contexts this saves a ninth of a step's matrix products. `modules` are the
    modules left out; a LoRA inside them would never have an effect. `attention` is told the rest in the call (`RowLora`).
    """

    def __init__(self, base: PreTrainedModel, lora: nn.Module):
        self.lora = lora
        layer = layers_of(base)[-1]
        self.attention = part(layer, "attention")
        found = [part(layer, name) for name in LEFT_OUT]
        # Where queries are projected together with keys, attention has all of them and nothing is left out.
        self.modules = [] if None in found else found
        self._hooks = []
        self.queries = self.modules[0] if self.modules else None
        for module in self.modules:
            self._hooks += [module.register_forward_pre_hook(self._leave_out), module.register_forward_hook(self._fill_up)]

    def remove(self) -> None:
        """Take the hooks off the decoder."""
        for hook in self._hooks:
            hook.remove()

    def _rows(self, module: nn.Module) -> int:
        """How many of the first rows a module leaves out now."""
        return 0 if module is self.queries and self.lora.queries_kept else self.lora.left_out

    def _leave_out(self, module, args: tuple[Tensor, ...]):
        return (args[0][:, rows:], *args[1:]) if (rows := self._rows(module)) else None

    def _fill_up(self, module, args, output: Tensor):
        return pad(output, (0, 0, rows, 0)) if (rows := self._rows(module)) else None

"""A KV connector of vLLM that fills a request's first rows from a prefix file. vLLM loads it by name; nothing of vLLM changes.

`hyperllama serve` starts vLLM's server with it; `hyperllama.serving.server.kv_transfer` has its settings for vLLM in Python.
A request names its prefix by a `Ticket` in kv_transfer_params, begins with as many placeholder tokens as the prefix has rows,
and carries the ticket's salt. All three are checked here, whoever sent it: without the salt vLLM's prefix cache would give one
prefix's rows to another request. A request that fails a check, or whose file is damaged, ends with an error; it is never
answered without its prefix. What vLLM asks of connectors: vllm/distributed/kv_transfer/kv_connector/v1/base.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from hyperllama.base.fingerprints import config_fingerprint
from hyperllama.base.identity import BaseIdentity
from hyperllama.errors import UserError
from hyperllama.files import from_fields
from hyperllama.serving.rows import Rows, slots_of
from hyperllama.serving.ticket import SALT, SECRET, Ticket

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger("vllm.hyperllama")


@dataclass(frozen=True)
class Load:
    """Rows `first` .. of a prefix, to be written into the blocks of a request; or what is wrong with the request."""

    ticket: Ticket | None
    first: int
    blocks: tuple[int, ...]
    problem: str | None = None


@dataclass
class Loads(KVConnectorMetadata):
    """What the worker is to load before a step."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """Fills the first rows of requests from prefix files.

    kv_connector_extra_config: `store`, the folder of the files; `base`, the identity of the model that is served;
    `placeholder`, the token that stands for rows; `most_bytes` of rows that each worker keeps. Raises ValueError when the
    engine starts, if rows of this model cannot be filled or its config is not that of `base`.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        base = from_fields(BaseIdentity, extra["base"], "kv_connector_extra_config: base")
        if problem := unserved(vllm_config, kv_cache_config, base):
            raise ValueError(problem)
        self._block_size = vllm_config.cache_config.block_size
        self._placeholder, self._secret = extra["placeholder"], os.environ.get(SECRET, "")
        self._waiting: dict[str, Load] = {}
        self._failed: set[int] = set()
        if role is KVConnectorRole.WORKER:
            ranks = {"rank": get_tensor_model_parallel_rank(), "ranks": get_tensor_model_parallel_world_size()}
            memory = {"most_bytes": extra["most_bytes"]} if "most_bytes" in extra else {}
            place = {"dtype": vllm_config.model_config.dtype, "device": vllm_config.device_config.device}
            self._rows = Rows(extra["store"], base, **place, **ranks, **memory)

    # The scheduler's side.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many rows are to be loaded behind those that vLLM's prefix cache has, and that this is done at once."""
        ticket, problem = self._asked(request)
        if ticket is None and problem is None:
            return 0, False
        # Else vLLM would read placeholders as text, and keep that under the prefix's salt.
        request.skip_reading_prefix_cache = False
        wanted = min(ticket.rows if ticket else 1, request.num_prompt_tokens - 1)
        return max(0, wanted - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Notes which blocks a request has got for the rows that are to be loaded."""
        ticket, problem = self._asked(request)
        if problem or (ticket and num_external_tokens):
            rows = ticket.rows if ticket else 1
            held = tuple(blocks.get_block_ids()[0][: -(-rows // self._block_size)])
            self._waiting[request.request_id] = Load(ticket, rows - num_external_tokens, held, problem)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Loads:
        """What has been noted since the last step."""
        loads, self._waiting = Loads(list(self._waiting.values())), {}
        return loads

    def _asked(self, request: Request) -> tuple[Ticket | None, str | None]:
        """The prefix that a request names, if any, and what is wrong with the request."""
        try:
            ticket = Ticket.of(request.kv_transfer_params)
        except UserError as error:
            return None, str(error)
        salt, ids = request.cache_salt or "", request.prompt_token_ids or []
        if ticket is None:
            return None, "it has the salt of a prefix, but names none" if salt.startswith(SALT) else None
        if salt != ticket.salt(self._secret):
            return ticket, "its cache_salt is not that of its prefix"
        if len(ids) <= ticket.rows or set(ids[: ticket.rows]) != {self._placeholder}:
            return ticket, f"its prompt does not begin with {ticket.rows} placeholders, token {self._placeholder}, and go on"
        if request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None:
            return ticket, "it asks for log-probabilities of its prompt, but the rows of a prefix have none"
        return ticket, None

    # The worker's side.

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Writes all rows of a step, of however many prefixes, by the attention backend's own function for new rows."""
        ready, slots = [], []
        for load in self._get_connector_metadata().loads:
            try:
                if load.problem:
                    raise UserError(f"a request was refused: {load.problem}")
                ready.append((load.first, self._rows.get(load.ticket)))
            except (UserError, OSError) as error:
                logger.error("%s", error)
                self._failed.update(load.blocks)
                continue
            slots.append(slots_of(load.blocks, self._block_size, load.first, load.ticket.rows))
        if not ready:
            return
        places = torch.cat(slots).to(self._rows.device)
        for name, layer in forward_context.no_compile_layers.items():
            if getattr(layer, "kv_cache", None) is None:
                continue
            i = extract_layer_index(name)
            keys = torch.cat([sides.keys[i][first:] for first, sides in ready])
            values = torch.cat([sides.values[i][first:] for first, sides in ready])
            layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, places)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of requests that cannot be answered; vLLM ends those requests with an error."""
        failed, self._failed = self._failed, set()
        return failed

    # What vLLM asks of every connector, and this one has nothing to do for.

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Rows are there before the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    def wait_for_save(self) -> None:
        """Nothing is kept."""

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on."""
        return False


def unserved(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, base: BaseIdentity) -> str | None:
    """Why an engine's rows cannot be filled, in a sentence that says what to do; None if they can."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    groups = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if len(groups) != 1 or type(groups[0]) is not FullAttentionSpec or model.get_sliding_window():
        return f"{model.model}: prefixes are served for models whose layers all have plain full attention; serve another"
    if cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        return f"--kv-cache-dtype {cache.cache_dtype}: prefixes are served without quantised caches; leave it out"
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.method != "ngram":
        return "--speculative-config: a draft model has layers that no prefix fills; leave it out, or use ngram"
    if vllm_config.kv_transfer_config.kv_load_failure_policy != "fail":
        return "kv_load_failure_policy: must be fail, or a damaged prefix would be answered without"
    if config_fingerprint(model.hf_config) != base.config:
        return f"{model.model}: its config, rotary settings among it, is not that of {base.name} as the prefixes know it"
    return None

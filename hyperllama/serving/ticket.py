"""What a request carries so that the engine fills its first rows from a prefix, and from no other."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hyperllama.errors import UserError
from hyperllama.files import from_fields

KEY = "hyperllama"  # of ours in kv_transfer_params
SALT = "hyperllama-"  # how every salt of ours begins
SECRET = "HYPERLLAMA_SERVING_SECRET"  # in the environment of server and engine, since a command line can be read by all


@dataclass(frozen=True)
class Ticket:
    """A prefix that a request reads: the name of its file in the store, the checksum in that file's header, its rows."""

    file: str
    digest: str
    rows: int

    def salt(self, secret: str) -> str:
        """The request's cache_salt: rows of two prefixes share no block of the engine's prefix cache, nor any with plain text.

        Without the server's `secret` nobody can make it, so that no other request can fill blocks under it.
        """
        return SALT + hmac.new(secret.encode(), f"{self.digest} {self.rows}".encode(), hashlib.sha256).hexdigest()

    def params(self) -> dict[str, Any]:
        """The request's kv_transfer_params."""
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Ticket | None:
        """What `params` made, or None where there is nothing of ours; UserError for something else under our key."""
        if not isinstance(params, Mapping) or KEY not in params:
            return None
        ticket = from_fields(cls, params[KEY], "kv_transfer_params")
        if ticket.rows < 1:
            raise UserError(f"kv_transfer_params: a prefix has rows, not {ticket.rows}")
        return ticket

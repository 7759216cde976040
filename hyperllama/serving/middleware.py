"""What stands before vLLM's OpenAI server: each prefix of a store is a model, and its requests are rewritten for the engine."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from hyperllama.base.identity import BaseIdentity
from hyperllama.base.loading import load_tokenizer
from hyperllama.errors import UserError
from hyperllama.files import from_fields
from hyperllama.prefixes.store import PrefixStore
from hyperllama.serving.catalog import Card, Catalog
from hyperllama.serving.wrapping import placeholder_of, refuse_ours, wrapped

VARIABLE = "HYPERLLAMA_SERVING"  # in the environment of vLLM's server, which passes a middleware no settings
MOST_BYTES = 32 * 2**20  # of a request's body

Message = dict[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """What the middleware is told: the folder of the store, the base's path, its name as a model, its identity, the secrets."""

    store: str
    base: str
    name: str
    identity: BaseIdentity
    secret: str
    api_key: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> Settings:
        """What `to_json` wrote into VARIABLE; UserError if it is not there."""
        if VARIABLE not in os.environ:
            raise UserError(f"{VARIABLE} is not set; start the server by hyperllama serve")
        return from_fields(cls, json.loads(os.environ[VARIABLE]), VARIABLE)


class PrefixModels:
    """ASGI middleware: prefixes are listed among the models, and requests for one reach the engine as requests to read it.

    Requests for other models pass as they are. What only the server may set is refused with 400 wherever it comes, and so is a
    prefix that cannot be served. Where there is an API key, requests without it are told nothing more: vLLM refuses them.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], settings: Settings | None = None):
        self.app, self.settings = app, settings or Settings.from_environment()
        tokenizer = load_tokenizer(self.settings.base)
        self.catalog = Catalog(PrefixStore(self.settings.store, create=False), self.settings.identity, tokenizer)
        self.placeholder = placeholder_of(tokenizer)[1]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                scope, receive, send = await self._asked(path, scope, receive, send)
            except Refusal as refusal:
                return await refusal.send(send)
        elif scope["type"] == "http" and path == "/v1/models" and self._has_key(scope):
            send = _Rewritten(send, self._with_prefixes)
        await self.app(scope, receive, send)

    def _has_key(self, scope: Message) -> bool:
        if not self.settings.api_key:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(key, self.settings.api_key.encode())

    async def _asked(self, path: str, scope: Message, receive: Receive, send: Send) -> tuple[Message, Receive, Send]:
        """The request as the engine is to have it; Refusal if it is to have none."""
        raw = await _body(receive)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None  # vLLM says what is wrong
        if not isinstance(body, dict):
            return scope, _replay(raw, receive), send
        try:
            refuse_ours(body)
            card = None
            if self._has_key(scope):
                card, body = await asyncio.to_thread(self._rewrite, path, body)
        except (UserError, OSError) as error:
            raise Refusal(400, "BadRequestError", str(error)) from error
        if card is None:
            return scope, _replay(raw, receive), send
        raw = json.dumps(body).encode()
        headers = [(key, value) for key, value in scope["headers"] if key != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        own, asked = (b'"model":' + json.dumps(name, ensure_ascii=False).encode() for name in (self.settings.name, card.name))
        # A quote within a text is escaped, so these bytes are never part of an answer.
        return scope, _replay(raw, receive), _Rewritten(send, lambda part: part.replace(own, asked))

    def _rewrite(self, path: str, body: Message) -> tuple[Card | None, Message]:
        name = body.get("model")
        chat = path == "/v1/chat/completions"
        if not isinstance(name, str) or name == self.settings.name or not (chat or path == "/v1/completions"):
            return None, body
        card = self.catalog.find(name)
        if card is None:
            return None, body  # vLLM knows no such model either, and says so
        settings = {"base": self.settings.name, "secret": self.settings.secret, "placeholder": self.placeholder}
        return card, wrapped(body, card, chat=chat, **settings)

    def _with_prefixes(self, body: bytes) -> bytes:
        """The list of models, and the prefixes behind them."""
        listed = json.loads(body)
        if not isinstance(listed.get("data"), list) or not listed["data"]:
            return body
        own = listed["data"][0]
        for name, entry in self.catalog.listed():
            listed["data"].append({**own, "id": name, "root": entry.file, "parent": own["id"], "permission": []})
        return json.dumps(listed, ensure_ascii=False).encode()


class Refusal(Exception):
    """An answer to a request that the engine is not to have, in OpenAI's form."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message

    async def send(self, send: Send) -> None:
        """Send it."""
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes:
    """The whole body of a request; Refusal if it is too large, or if the client has gone."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "BadRequestError", "the request was cut short")
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MOST_BYTES:
            raise Refusal(413, "BadRequestError", f"a body of more than {MOST_BYTES:,} bytes; send less")
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what the client says, such as that it has gone."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


class _Rewritten:
    """A `send` that changes the parts of an answer, each by itself, and its length where that is given."""

    def __init__(self, send: Send, change: Callable[[bytes], bytes]):
        self.send, self.change, self.start = send, change, None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message  # with the first part, whose length is known then
            return
        if message["type"] == "http.response.body":
            body = message.get("body", b"")
            if body and (self.start is None or self.start["status"] == 200):
                body = self.change(body)
            message = {**message, "body": body}
            if self.start is not None:
                headers = [(k, str(len(body)).encode() if k == b"content-length" else v) for k, v in self.start["headers"]]
                await self.send({**self.start, "headers": headers})
                self.start = None
        await self.send(message)

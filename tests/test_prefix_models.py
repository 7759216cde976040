"""Prefixes as models of an OpenAI server, without the engine: who reads what, and what no request may do."""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperllama.base.fingerprints import identify
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.data.text import TextFormat
from hyperllama.errors import UserError
from hyperllama.prefixes.manifest import Manifest
from hyperllama.prefixes.prefix import Prefix, stored_digest
from hyperllama.prefixes.store import PrefixStore
from hyperllama.serving import middleware, server
from hyperllama.serving.catalog import Catalog
from hyperllama.serving.middleware import PrefixModels, Settings
from hyperllama.serving.offline import asked
from hyperllama.serving.rows import Rows, heads_of, slots_of
from hyperllama.serving.ticket import SALT, Ticket
from hyperllama.serving.wrapping import ROWS_VARIABLE, chat_template, placeholder_of

FORM = TextFormat(query="Q: {input}\nA:", answer=" {output}", separator="\n", answer_tokens=7)


@pytest.fixture(scope="module")
def house(saved_base, tmp_path_factory):
    """A base, its tokenizer and identity, and a store: three tasks, one of them twice, and one for another base."""
    folder = tmp_path_factory.mktemp("served") / "store"
    tokenizer = load_tokenizer(str(saved_base))
    base = load_base(str(saved_base))
    identity = identify(base, tokenizer)
    store = PrefixStore(folder)
    for seed, (task, context) in enumerate([("a", "1"), ("twice", "2"), ("twice", "3"), ("../up", "4"), ("other", "5")]):
        its = replace(identity, weights="f" * 64) if task == "other" else identity
        store.add(prefix(base.config, its, task, seed, context_sha256=context))
    return SimpleNamespace(folder=folder, base=str(saved_base), tokenizer=tokenizer, identity=identity, store=store, model=base)


def prefix(config, identity, task, seed=0, rows=3, **fields):
    made = torch.Generator().manual_seed(seed)
    shape = (config.num_key_value_heads, rows, config.head_dim)
    sides = [[torch.randn(shape, generator=made) for _ in range(config.num_hidden_layers)] for _ in "kv"]
    return Prefix(*sides, Manifest(base=identity, task=task, text_format=vars(FORM), **fields))


@pytest.fixture
def copied(house, tmp_path):
    """The house with a store of its own, to be changed."""
    shutil.copytree(house.folder, tmp_path / "store")
    return SimpleNamespace(**{**vars(house), "folder": tmp_path / "store", "store": PrefixStore(tmp_path / "store")})


class TestTickets:
    def test_salts_differ_by_prefix_rows_and_secret(self):
        one = Ticket("a", "1" * 64, 3)
        others = [one.salt("t"), replace(one, digest="2" * 64).salt("s"), replace(one, rows=4).salt("s")]
        assert one.salt("s") == replace(one, file="moved").salt("s") and one.salt("s") not in others
        assert all(salt.startswith(SALT) and len(salt) <= 128 for salt in others)  # vLLM takes at most 128

    def test_what_is_sent_is_read_and_nothing_else(self):
        one = Ticket("a", "1" * 64, 3)
        assert Ticket.of(one.params()) == one and Ticket.of(None) is None and Ticket.of({"other": 1}) is None
        for wrong in ({"hyperllama": {"file": "a"}}, {"hyperllama": 3}, Ticket("a", "1", 0).params()):
            with pytest.raises(UserError, match="kv_transfer_params"):
                Ticket.of(wrong)


class TestRows:
    @given(st.integers(1, 8), st.integers(0, 3))
    def test_ranks_together_hold_every_head(self, heads, power):
        ranks = 2**power
        if heads >= ranks and heads % ranks:
            return  # no engine starts so
        held = [list(range(heads))[heads_of(rank, ranks, heads)] for rank in range(ranks)]
        assert len({len(own) for own in held}) == 1
        if heads >= ranks:
            assert [head for own in held for head in own] == list(range(heads))
        else:
            assert held == [[rank * heads // ranks] for rank in range(ranks)] and {h for own in held for h in own} == {
                *range(heads)
            }

    @given(st.permutations(range(9)), st.integers(1, 5), st.integers(0, 10), st.integers(1, 10))
    def test_slots_are_block_by_block(self, blocks, size, first, more):
        end = min(first + more, 9 * size)
        first = min(first, end)
        wanted = [blocks[i // size] * size + i % size for i in range(first, end)]
        assert slots_of(blocks, size, first, end).tolist() == wanted

    def test_a_rank_gets_its_heads_rows_first_in_its_dtype(self, house):
        (entry,) = house.store.find(task="a")
        whole, ticket = house.store.load(entry), Ticket(entry.file, stored_digest(house.folder / entry.file), 3)
        for rank in (0, 1):
            rows = Rows(house.folder, house.identity, dtype=torch.bfloat16, rank=rank, ranks=2)
            for got, kept in zip(rows.get(ticket), (whole.keys, whole.values)):
                for ours, theirs in zip(got, kept):
                    assert torch.equal(ours, theirs[rank : rank + 1].transpose(0, 1).bfloat16()) and ours.is_contiguous()

    def test_memory_is_bounded_and_the_last_used_stay(self, house):
        tickets = [Ticket(e.file, stored_digest(house.folder / e.file), 3) for e in house.store.find(base=house.identity)]
        size = Rows(house.folder, house.identity, dtype=torch.float32).get(tickets[0]).bytes
        rows = Rows(house.folder, house.identity, dtype=torch.float32, most_bytes=2 * size)
        kept = [rows.get(ticket) for ticket in tickets[:2]]
        assert rows.get(tickets[0]) is kept[0] and rows.bytes == 2 * size
        rows.get(tickets[2])  # puts out the second, which was used before the first
        assert len(rows) == 2 and rows.bytes == 2 * size and rows.get(tickets[0]) is kept[0]
        assert rows.get(tickets[1]) is not kept[1]
        assert len(Rows(house.folder, house.identity, dtype=torch.float32, most_bytes=size - 1)._kept) == 0

    def test_what_cannot_be_filled_is_refused(self, copied):
        rows = Rows(copied.folder, copied.identity, dtype=torch.float32)
        (entry,), (other,) = copied.store.find(task="a"), copied.store.find(task="other")
        path = copied.folder / entry.file
        ticket = Ticket(entry.file, stored_digest(path), 3)
        cases = {"no such": replace(ticket, file="x.safetensors"), "not the name": replace(ticket, file="../x"),
                 "another prefix": replace(ticket, digest="0" * 64), "made for": Ticket(other.file, "1" * 64, 3)}  # fmt: skip
        cases["taken its place"] = replace(ticket, rows=2)
        for message, wrong in cases.items():
            with pytest.raises(UserError, match=message):
                rows.get(wrong)
        damaged = bytearray(path.read_bytes())
        damaged[-1] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            rows.get(ticket)
        large = prefix(copied.model.config, copied.identity, "large")
        large.values[0][0, 0, 0] = 1e6
        saved = copied.store.add(large)
        with pytest.raises(UserError, match="float16 cannot hold"):
            Rows(copied.folder, copied.identity, dtype=torch.float16).get(Ticket(saved.name, stored_digest(saved), 3))


class TestCatalog:
    def test_names_are_tasks_or_files_and_nothing_leaves_the_store(self, house):
        catalog = Catalog(house.store, house.identity, house.tokenizer)
        twice = [e.file.removesuffix(".safetensors") for e in house.store.find(task="twice")]
        assert sorted(name for name, _ in catalog.listed()) == sorted(["a", "../up", *twice])
        assert catalog.find("a").ticket.rows == 3 and catalog.find("../up").ticket.file.startswith("up")
        assert {catalog.find(name).ticket.file for name in twice} == {f"{name}.safetensors" for name in twice}
        for outside in ("../store/a", str(house.folder / "a"), "", "index/rank0.jsonl"):
            assert catalog.find(outside) is None
        with pytest.raises(UserError, match=f"2 prefixes.*{min(twice)}, {max(twice)}"):
            catalog.find("twice")
        with pytest.raises(UserError, match="made for"):
            catalog.find("other")

    def test_what_is_added_replaced_or_damaged_is_seen_at_once(self, copied):
        catalog = Catalog(copied.store, copied.identity, copied.tokenizer)
        before = catalog.find("a").ticket
        assert catalog.find("new") is None
        added = PrefixStore(copied.folder).add(prefix(copied.model.config, copied.identity, "new", 9, rows=5))
        assert catalog.find("new").ticket == Ticket(added.name, stored_digest(added), 5)
        path = PrefixStore(copied.folder).add(prefix(copied.model.config, copied.identity, "a", 8, context_sha256="1"))
        assert path.name == before.file and catalog.find("a").ticket.digest != before.digest
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=str(path)):
            catalog.find("a")
        path.unlink()
        with pytest.raises(UserError, match="not there"):
            catalog.find("a")


def app(seen):
    """A stand-in for vLLM: keeps what it is sent, answers in two parts."""

    async def answers(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        seen.append((scope, body))
        length = dict(scope["headers"]).get(b"content-length")
        assert length is None or int(length) == len(body)
        if scope["path"] == "/v1/models":
            parts = [json.dumps({"data": [{"id": "base", "root": "r", "object": "model"}]}).encode()]
        else:
            parts = [b'{"model":"base","text":"\\"model\\":\\"base\\"', b' it said","more":{"model":"base"}}']
        headers = [(b"content-length", str(sum(map(len, parts))).encode())] if len(parts) == 1 else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for i, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(parts)})

    return answers


def request(served, path, body=None, *, method="POST", headers=(), raw=None):
    """The status and body of the answer."""
    raw = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-length", str(len(raw)).encode()), *headers]}
    halves = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
    sent, messages = [], [{"type": "http.request", "body": half, "more_body": not i} for i, half in enumerate(halves)]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(served(scope, receive, send))
    length = dict(sent[0]["headers"]).get(b"content-length")
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    assert length is None or int(length) == len(answer)
    return sent[0]["status"], json.loads(answer)


@pytest.fixture
def served(house):
    seen = []
    settings = Settings(str(house.folder), house.base, "base", house.identity, "secret")
    return PrefixModels(app(seen), settings), seen


class TestMiddleware:
    def test_a_completion_reads_its_prefix_in_its_format(self, house, served):
        models, seen = served
        status, answer = request(models, "/v1/completions", {"model": "a", "prompt": "words", "stop": "!"})
        body, card = json.loads(seen[0][1]), models.catalog.find("a")
        ids = house.tokenizer("Q: words\nA:", add_special_tokens=False)["input_ids"]
        assert body["prompt"] == [models.placeholder] * 3 + ids and body["model"] == "base"
        assert (body["stop"], body["max_tokens"]) == (["!", "\n"], 7)
        assert Ticket.of(body["kv_transfer_params"]) == card.ticket and body["cache_salt"] == card.ticket.salt("secret")
        # The engine's name becomes the prefix's, but never within an answer.
        assert status == 200 and answer == {"model": "a", "text": '"model":"base" it said', "more": {"model": "a"}}

    def test_several_prompts_token_ids_and_raw_text(self, house, served):
        models, seen = served
        request(models, "/v1/completions", {"model": "a", "prompt": ["words", [5, 6]], "max_tokens": 2})
        request(models, "/v1/completions", {"model": "a", "prompt": [5, 6]})
        request(models, "/v1/completions", {"model": "a", "prompt": "a few words", "raw": True})
        first, ids, raw = (json.loads(body) for _, body in seen)
        rows = [models.placeholder] * 3
        assert len(first["prompt"]) == 2 and first["prompt"][1] == [*rows, 5, 6] and first["max_tokens"] == 2
        assert ids["prompt"] == [*rows, 5, 6]
        assert raw["prompt"] == rows + house.tokenizer("a few words", add_special_tokens=False)["input_ids"]
        assert "raw" not in raw and "stop" not in raw and "max_tokens" not in raw

    def test_a_chat_begins_with_its_rows_and_without_the_start_token(self, house, served):
        models, seen = served
        turn = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"thinking": False}}
        request(models, "/v1/chat/completions", turn)
        body = json.loads(seen[0][1])
        assert body["chat_template_kwargs"] == {"thinking": False, ROWS_VARIABLE: 3} and body["messages"] == turn["messages"]
        assert body["max_tokens"] == 7 and "stop" not in body and Ticket.of(body["kv_transfer_params"])
        house.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        try:
            template, token = chat_template(house.tokenizer), placeholder_of(house.tokenizer)[0]
            settings = {"chat_template": template, "tokenize": False}
            plain = house.tokenizer.apply_chat_template(turn["messages"], **settings)
            behind = house.tokenizer.apply_chat_template(turn["messages"], **settings, **{ROWS_VARIABLE: 3})
            assert plain == f"{house.tokenizer.bos_token}[hi]" and behind == token * 3 + "[hi]"
        finally:
            house.tokenizer.chat_template = None

    def test_other_requests_pass_as_they_are(self, served):
        models, seen = served
        bodies = [
            b'{"model": "base", "prompt": "x", "echo": true}',
            b'{"model": "nobody", "prompt": "x"}',
            b"{broken",
            b"[1]",
            b"[" * 9999,
        ]
        for path, raw in [("/tokenize", b'{"model": "a"}'), *(("/v1/completions", body) for body in bodies)]:
            assert request(models, path, raw=raw)[0] == 200 and seen[-1][1] == raw

    @pytest.mark.parametrize(
        "change",
        [{"echo": True}, {"prompt_logprobs": 1}, {"use_beam_search": True}, {"truncate_prompt_tokens": 4}, {"cache_salt": "x"},
         {"kv_transfer_params": {}}, {"chat_template": "x"}, {"prompt": "", "raw": True}, {"prompt": []}, {"prompt": [-1]},
         {"prompt": [True]}, {"prompt": {}}, {"prompt": None}, {"stop": 3}, {"model": "twice"}, {"model": "other"},
         {"suffix": "x"}],
    )  # fmt: skip
    def test_what_would_lose_or_mix_prefixes_is_refused(self, change, served):
        models, seen = served
        status, answer = request(models, "/v1/completions", {"model": "a", "prompt": "x", **change})
        assert status == 400 and answer["error"]["message"] and not seen

    def test_only_the_server_fills_the_engines_cache(self, served):
        models, seen = served
        for path in ("/v1/completions", "/v1/responses", "/inference/v1/generate"):
            body = {"model": "base", "prompt": "x", "kv_transfer_params": {"hyperllama": {}}}
            assert request(models, path, body)[0] == 400 and not seen

    def test_prefixes_are_listed_behind_the_base(self, served):
        status, answer = request(served[0], "/v1/models", method="GET")
        assert status == 200 and answer["data"][0]["id"] == "base" and "a" in [m["id"] for m in answer["data"]]
        assert {m["parent"] for m in answer["data"][1:]} == {"base"} and "other" not in [m["id"] for m in answer["data"]]

    def test_without_the_key_nothing_is_told(self, house):
        seen = []
        models = PrefixModels(app(seen), Settings(str(house.folder), house.base, "base", house.identity, "s", api_key="key"))
        body = {"model": "twice", "prompt": "x"}
        assert request(models, "/v1/completions", body)[0] == 200 and json.loads(seen[0][1]) == body  # vLLM refuses it
        assert len(request(models, "/v1/models", method="GET")[1]["data"]) == 1
        assert request(models, "/invocations", {**body, "kv_transfer_params": {"hyperllama": {}}})[0] == 400
        assert request(models, "/v1/completions", body, headers=[(b"authorization", b"Bearer key")])[0] == 400

    def test_bodies_are_bounded_and_may_be_cut_short(self, served, monkeypatch):
        models, seen = served
        monkeypatch.setattr(middleware, "MOST_BYTES", 10)
        assert request(models, "/v1/completions", {"model": "a", "prompt": "a long one"})[0] == 413 and not seen
        sent = []

        async def gone():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        asyncio.run(models({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, gone, send))
        assert sent[0]["status"] == 400 and not seen


def test_the_rest_of_a_request_is_what_the_client_says():
    async def client():
        return {"type": "http.disconnect"}

    receive = middleware._replay(b"x", client)
    assert asyncio.run(receive())["body"] == b"x" and asyncio.run(receive()) == {"type": "http.disconnect"}


class TestServer:
    def test_secrets_are_in_the_environment_alone(self, house):
        transfer = server.kv_transfer(house.folder, house.base, most_bytes=5)
        settings = {"host": "127.0.0.1", "port": 1, "api_key": "my-key", "name": None, "more": ["--dtype", "float32"]}
        words, environment = server.command(house.folder, house.base, transfer, **settings)
        told = json.loads(environment[middleware.VARIABLE])
        assert told["secret"] == environment[server.SECRET] and told["secret"] not in " ".join(words)
        assert (
            "my-key" not in " ".join(words) and environment["VLLM_API_KEY"] == "my-key" and words[-2:] == ["--dtype", "float32"]
        )
        extra = json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]
        assert extra["base"]["weights"] == house.identity.weights and extra["most_bytes"] == 5
        assert words[words.index("--host") + 1] == "127.0.0.1"

    def test_settings_come_back(self, house, monkeypatch):
        told = Settings("store", "base", "name", house.identity, "s", "k")
        monkeypatch.setenv(middleware.VARIABLE, told.to_json())
        assert Settings.from_environment() == told
        monkeypatch.delenv(middleware.VARIABLE)
        with pytest.raises(UserError, match="hyperllama serve"):
            Settings.from_environment()

    def test_bad_input_is_refused_before_anything_loads(self, house, tmp_path, monkeypatch):
        monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(server, "load_base", None)
        for message, arguments in {
            "no such store": {"store": tmp_path / "none"},
            "--port": {"store": house.folder, "more": ["--port=3"]},
        }.items():
            with pytest.raises(UserError, match=message):
                server.serve(**arguments)
        PrefixStore(tmp_path / "two").add(prefix(house.model.config, replace(house.identity, name="b1"), "a"))
        PrefixStore(tmp_path / "two").add(prefix(house.model.config, replace(house.identity, name="b2"), "b"))
        with pytest.raises(UserError, match="b1 and b2.*--base"):
            server.serve(tmp_path / "two")
        monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="make serve-env"):
            server.serve(house.folder)

    def test_a_prompt_for_vllm_in_python(self, house):
        (entry,) = house.store.find(task="a")
        prompt, extra = asked(house.folder / entry.file, [5, 6], house.tokenizer)
        ticket = Ticket.of(extra["kv_transfer_params"])
        assert prompt["prompt_token_ids"][3:] == [5, 6] and len(set(prompt["prompt_token_ids"][:3])) == 1
        assert prompt["cache_salt"] == ticket.salt("") and ticket.rows == 3
        with pytest.raises(UserError, match="empty"):
            asked(house.folder / entry.file, [], house.tokenizer)

    @pytest.mark.slow
    @pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here, and would start")
    def test_the_verb_says_what_is_missing(self, house):
        run = subprocess.run([sys.executable, "-m", "hyperllama", "serve", str(house.folder)], capture_output=True, text=True)
        assert run.returncode == 2 and "make serve-env" in run.stderr and len(run.stderr.splitlines()) == 1

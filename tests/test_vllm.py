"""Prefixes in vLLM itself, with SmolLM2: what it says is what transformers says. Runs where vLLM is: `make test-serve`."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="no vLLM here; make test-serve runs these in an environment of its own")
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import openai
import torch
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from benchmarks import serving_soak, serving_vllm
from hyperllama.base.loading import load_base, load_tokenizer
from hyperllama.commands.compress import compress
from hyperllama.data.text import Encoder, Limits, TextFormat
from hyperllama.inference.reader import Reader
from hyperllama.inference.scoring import Question
from hyperllama.prefixes.prefix import Prefix
from hyperllama.prefixes.store import PrefixStore
from hyperllama.serving.offline import asked
from hyperllama.serving.server import kv_transfer

pytestmark = [pytest.mark.real, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
TASKS = ("plural", "capital", "comparative", "antonym", "ordinal", "singular", "adverb", "nationality")
GISTS = (16, 1, 5, 30, 16, 7, 31, 3)  # with the first token 2 to 32 rows: less than a block, a block, and between
BLOCK = 32


@pytest.fixture(scope="module")
def world(smollm2, tmp_path_factory):
    """A store with prefixes of eight tasks and of many lengths, the model in transformers, and four queries of each task."""
    folder = tmp_path_factory.mktemp("serve")
    store = PrefixStore(folder / "store")
    paths, questions = {}, []
    tokenizer = load_tokenizer(str(smollm2))
    for task, gists in zip(TASKS, GISTS):
        file = ROOT / f"recipes/words/test/{task}.jsonl"
        ((_, prefix),) = compress(
            "smollm2", [file], folder / f"{task}.safetensors", shots=16, gists=gists, base_path=str(smollm2)
        )
        paths[task] = store.add(prefix)
        encoder = Encoder(tokenizer, TextFormat(**prefix.manifest.text_format), Limits())
        inputs = [json.loads(line)["input"] for line in file.read_text().splitlines()[20:24]]
        questions += [(task, prefix, encoder.prompt(text)) for text in inputs]
    reader = Reader(load_base(str(smollm2)), tokenizer)
    return SimpleNamespace(
        folder=store.folder,
        store=store,
        paths=paths,
        questions=questions,
        reader=reader,
        tokenizer=tokenizer,
        base=str(smollm2),
    )


@pytest.fixture(scope="module")
def engine(world):
    """vLLM in this process, with so few blocks that not all requests fit, and pieces of a prompt that are smaller than one."""
    transfer = KVTransferConfig(**kv_transfer(world.folder, world.base, most_bytes=2**21))
    limits = {"max_model_len": 1024, "block_size": BLOCK, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 128}
    settings = {"enforce_eager": True, "disable_hybrid_kv_cache_manager": True, "disable_log_stats": False, **limits}
    return LLM(world.base, dtype="float32", kv_transfer_config=transfer, **settings)


def ask(world, engine, questions, *, new=12, **settings):
    """What vLLM answers to (task or None, prompt) in one batch: tokens, and the sum of their log-probabilities."""
    prompts, parameters = [], []
    for task, ids in questions:
        prompt, extra = asked(world.paths[task], ids, world.tokenizer) if task else ({"prompt_token_ids": ids}, None)
        prompts.append(prompt)
        parameters.append(SamplingParams(temperature=0, max_tokens=new, logprobs=1, extra_args=extra, **settings))
    return engine.generate(prompts, parameters, use_tqdm=False)


def check(world, questions, outputs, *, prefixes=None):
    """Every answer is what transformers says behind the same prefix, to the log-probability."""
    asked_of = prefixes or {task: prefix for task, prefix, _ in world.questions}
    told = [(ids, asked_of.get(task), output.outputs[0]) for (task, ids), output in zip(questions, outputs, strict=True)]
    longest = max(len(answer.token_ids) for *_, answer in told)
    for behind in (True, False):
        own = [one for one in told if (one[1] is not None) == behind]
        if own:
            prompts, its, answers = zip(*own)
            settings = {"max_new_tokens": longest, "eos_token_id": None}
            wanted = world.reader.generate(prompts, its if behind else None, **settings)
            said = [list(answer.token_ids) for answer in answers]
            assert said == [tokens[: len(ours)] for tokens, ours in zip(wanted, said)]
            scores = world.reader.score([Question(*one) for one in zip(prompts, [(tokens,) for tokens in said], its)])
            for (likelihood,), answer in zip(scores, answers):
                assert abs(answer.cumulative_logprob - likelihood) < 1e-4 * len(answer.token_ids)


def metric(engine, name):
    return sum(m.value for m in engine.get_metrics() if m.name == name)


def test_a_batch_over_eight_prefixes_and_none_says_what_transformers_says(world, engine):
    questions = [(task, ids) for task, _, ids in world.questions] + [(None, ids) for _, _, ids in world.questions[:4]]
    random.Random(0).shuffle(questions)
    for _ in range(2):  # the second time from a warm prefix cache
        outputs = ask(world, engine, questions)
        check(world, questions, outputs)
    assert len(questions) == 36 and metric(engine, "vllm:prefix_cache_hits") > 0


def test_preempted_requests_go_on_with_their_prefix(world, engine):
    before = metric(engine, "vllm:num_preemptions")
    questions = [(task, ids) for task, _, ids in world.questions[::2]]
    outputs = ask(world, engine, questions, new=150, ignore_eos=True)
    assert metric(engine, "vllm:num_preemptions") > before
    check(world, questions, outputs)


def test_a_prompt_that_is_read_in_pieces(world, engine):
    task, _, ids = world.questions[0]
    questions = [(task, ids * 60), ("comparative", ids * 40), (None, ids * 50)]
    assert all(len(prompt) > 128 for _, prompt in questions)
    check(world, questions, ask(world, engine, questions))


def test_prefixes_that_differ_in_one_bit_never_mix(world, engine, tmp_path):
    task, prefix, ids = world.questions[0]
    ids = ids * 12  # longer than a block, so that blocks of both are kept
    values = [value.clone() for value in prefix.values]
    place = values[3].abs().argmax()
    values[3].view(-1)[place] *= -1  # its sign
    twin = Prefix(prefix.keys, values, replace(prefix.manifest, task="twin", context_sha256="twin"))
    paths = {**world.paths, "twin": world.store.add(twin)}
    both = SimpleNamespace(**{**vars(world), "paths": paths})
    questions = [(task, ids), ("twin", ids), (task, ids), ("twin", ids)]
    for _ in range(3):
        outputs = ask(both, engine, questions)
        check(world, questions, outputs, prefixes={task: prefix, "twin": twin})
        first, second = (output.outputs[0].cumulative_logprob for output in outputs[:2])
        assert abs(first - second) > 1e-3


def test_what_names_no_prefix_rightly_is_never_answered(world, engine):
    task, other = TASKS[:2]
    ids = world.questions[0][2]
    prompt, extra = asked(world.paths[task], ids, world.tokenizer)
    its, others = asked(world.paths[other], ids, world.tokenizer)
    rows = len(prompt["prompt_token_ids"]) - len(ids)
    wrong = [
        ({**prompt, "cache_salt": its["cache_salt"]}, extra),
        ({key: value for key, value in prompt.items() if key != "cache_salt"}, extra),
        (prompt, None),
        (prompt, others),
        ({**prompt, "prompt_token_ids": ids * 9}, extra),
        ({**prompt, "prompt_token_ids": prompt["prompt_token_ids"][:rows]}, extra),
        (prompt, {"kv_transfer_params": {"hyperllama": {"file": "x"}}}),
    ]
    for one, said in wrong:
        (output,) = engine.generate([one], [SamplingParams(max_tokens=3, extra_args=said)], use_tqdm=False)
        assert output.outputs[0].finish_reason == "error" and not output.outputs[0].text
    plain = [(task, ids)]
    (output,) = ask(world, engine, plain, prompt_logprobs=1)
    assert output.outputs[0].finish_reason == "error"
    for settings in ({"skip_reading_prefix_cache": True}, {}):  # that leaves vLLM's cache alone, but not the prefix
        check(world, plain, ask(world, engine, plain, **settings))


def test_a_file_that_is_damaged_or_gone_fails_its_own_requests_only(world, engine):
    task, prefix, ids = world.questions[0]
    broken = world.store.add(Prefix(prefix.keys, prefix.values, replace(prefix.manifest, task="broken", context_sha256="b")))
    there = SimpleNamespace(**{**vars(world), "paths": {**world.paths, "broken": broken}})
    prompts = [asked(there.paths[name], ids, world.tokenizer) for name in ("broken", task)]
    whole = broken.read_bytes()
    for change in (lambda: broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1])), broken.unlink):
        change()
        parameters = [SamplingParams(temperature=0, max_tokens=12, logprobs=1, extra_args=extra) for _, extra in prompts]
        failed, good = engine.generate([prompt for prompt, _ in prompts], parameters, use_tqdm=False)
        assert failed.outputs[0].finish_reason == "error"
        check(world, [(task, ids)], [good])


def test_what_we_use_of_vllm_is_there():
    for backend, implementation in (
        (CPUAttentionBackend, CPUAttentionBackendImpl),
        (FlashAttentionBackend, FlashAttentionImpl),
    ):
        assert not backend.forward_includes_kv_cache_update and callable(implementation.do_kv_cache_update)
    assert extract_layer_index("model.layers.7.self_attn.attn") == 7


@pytest.fixture(scope="module")
def server(world, tmp_path_factory):
    """`hyperllama serve` on a copy of the store, with a key; its address, its store and its process."""
    folder = tmp_path_factory.mktemp("server") / "store"
    shutil.copytree(world.folder, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "hyperllama", "serve", str(folder), "--port", str(port), "--base", world.base, "--"]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    log = (folder.parent / "log").open("w")
    environment = {**os.environ, "VLLM_API_KEY": "key", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (folder.parent / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(1)
        yield SimpleNamespace(address=address, store=PrefixStore(folder), process=process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="key", max_retries=0)


def test_prefixes_are_models_of_the_openai_client(world, server, client):
    names = [model.id for model in client.models.list().data]
    assert names[0] == "smollm2-135m" and set(TASKS) <= set(names)
    for task, prefix, ids in world.questions:
        (wanted,) = world.reader.generate([ids], [prefix], max_new_tokens=64, stop="\n\n")
        text = world.tokenizer.decode(wanted).partition("\n\n")[0]
        asked_for = world.tokenizer.decode(ids).removeprefix("Input: ").removesuffix("\nOutput:")
        answer = client.completions.create(model=task, prompt=asked_for, temperature=0)
        assert (answer.model, answer.choices[0].text) == (task, text)
        assert answer.usage.prompt_tokens == prefix.rows + len(ids)
        parts = list(client.completions.create(model=task, prompt=asked_for, temperature=0, stream=True))
        assert "".join(part.choices[0].text for part in parts) == text and {part.model for part in parts} == {task}


def test_chats_read_their_prefix_too(world, server, client):
    turn = [{"role": "user", "content": "wolf"}]
    own = world.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    prefix = world.questions[0][1]
    (wanted,) = world.reader.generate([own], [prefix], max_new_tokens=64)
    answer = client.chat.completions.create(model="plural", messages=turn, temperature=0)
    assert answer.choices[0].message.content == world.tokenizer.decode(wanted, skip_special_tokens=True)
    assert answer.model == "plural" and answer.usage.prompt_tokens == prefix.rows + len(own)
    parts = list(client.chat.completions.create(model="plural", messages=turn, temperature=0, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == answer.choices[0].message.content


def test_bad_requests_get_a_sentence_and_the_server_lives(world, server, client):
    prefix = world.questions[0][1]
    other = replace(prefix.manifest, task="foreign", base=replace(prefix.manifest.base, weights="f" * 64))
    server.store.add(Prefix(prefix.keys, prefix.values, other))
    broken = server.store.add(Prefix(prefix.keys, prefix.values, replace(prefix.manifest, task="broken", context_sha256="b")))
    broken.write_bytes(broken.read_bytes()[:-9])
    for model, status, said in (("nobody", 404, "nobody"), ("foreign", 400, "made for"), ("broken", 400, broken.name)):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=model, prompt="wolf")
        assert caught.value.status_code == status and said in str(caught.value.body)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="plural", prompt="wolf " * 2000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="no", max_retries=0).completions.create(
            model="plural", prompt="x"
        )
    assert client.completions.create(model="plural", prompt="wolf", temperature=0).choices[0].text == " wolves"
    for path in ("health", "metrics"):
        assert urllib.request.urlopen(f"{server.address}/{path}").status == 200


def test_a_prefix_that_is_added_is_served_at_once(world, server, client):
    prefix = world.questions[0][1]
    server.store.add(Prefix(prefix.keys, prefix.values, replace(prefix.manifest, task="added", context_sha256="n")))
    assert "added" in [model.id for model in client.models.list().data]
    assert client.completions.create(model="added", prompt="wolf", temperature=0).choices[0].text == " wolves"


def test_benchmarks_ask_it_and_count(world, server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "key")
    address, asked_for = f"{server.address}/v1", serving_vllm.Asked("plural", list(world.questions[0][2]))
    rate, first = asyncio.run(serving_vllm.load(address, [asked_for] * 3, 2))
    assert 0 < first < 3 / rate
    soak = serving_soak.Soak(address, serving_soak.questions_of(world.folder))
    figures = asyncio.run(soak.run(3))
    assert figures["up"] and not figures["wrong"] and not figures["unexpected"] and figures["statuses"]["good 200"]
    soak.known = ["something else"] * len(soak.known)
    asyncio.run(soak.one_good())
    assert soak.wrong


def test_a_base_that_the_engine_would_read_otherwise_is_refused(world, tmp_path):
    """Rotary settings that vLLM is told to change."""
    changed = {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}
    transfer = KVTransferConfig(**kv_transfer(world.folder, world.base))
    settings = {"enforce_eager": True, "disable_hybrid_kv_cache_manager": True, "max_model_len": 256, "hf_overrides": changed}
    with pytest.raises(ValueError, match="rotary settings"):
        LLM(world.base, dtype="float32", kv_transfer_config=transfer, **settings)
    assert torch.is_grad_enabled()

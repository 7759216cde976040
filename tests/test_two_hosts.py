"""Two hosts with a network between them, as network namespaces of this machine: one dies, comes back, and nothing is lost."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from uuid import uuid4

import pytest
from launch import hyperllama, launcher, start
from test_faults import end_of, recipe  # noqa: F401

from hyperllama.training.checkpoints import newest_checkpoint


def ip(*command):
    subprocess.run(["ip", *command], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Names of two namespaces, joined by a pair of virtual network cards, 10.77.0.1 and 10.77.0.2."""
    names = [f"hl{uuid4().hex[:6]}" for _ in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("no ip command to make network namespaces with")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "card", "type", "veth", "peer", "name", "card", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "card")
            ip("-n", name, "link", "set", "card", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def cut_power(host):
    """Kill everything that runs on a host: the launcher and what it has launched."""
    running = subprocess.run(["ip", "netns", "pids", host], check=True, capture_output=True, text=True).stdout.split()
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def start_on(host, address, log, *arguments):
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "5"]
    options += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400", "--rdzv_id", "two-hosts"]
    # Namespaces share the machine's name, so each is told which address is its own.
    is_host = str(address == "10.77.0.1").lower()
    # A host is given up after five seconds without a word, not after fifteen.
    alive = "keep_alive_interval=1,keep_alive_max_attempt=5"
    options += ["--local_addr", address, "--rdzv_conf", f"is_host={is_host},join_timeout=120,last_call_timeout=2,{alive}"]
    program = launcher(*options, command=("train", *arguments))
    return start(*program, out=log, err=log, host=host, GLOO_SOCKET_IFNAME="card")


@pytest.mark.slow
def test_a_host_dies_and_comes_back(hosts, recipe, tmp_path):  # noqa: F811
    # Long enough to be killed in the middle; half of the episodes of a step are each host's.
    changes = ["training.max_steps=100", "training.save_steps=20", "training.per_device_train_batch_size=1"]
    hyperllama("train", recipe, *changes, f"output={tmp_path}/one", "training.gradient_accumulation_steps=2")

    def job(run, die):
        logs = [tmp_path / f"{run}{i}.log" for i in range(2)]
        places = list(zip(hosts, ("10.77.0.1", "10.77.0.2"), logs))
        first, second = (start_on(*place, recipe, *changes, f"output={tmp_path}/{run}") for place in places)
        try:
            deadline = time.time() + 120
            while die and newest_checkpoint(tmp_path / run / "checkpoints") is None and time.time() < deadline:
                time.sleep(0.05)
            if die:
                cut_power(hosts[1])
                second.join()
                assert not (tmp_path / run / "result.json").exists(), "it was over before"
                time.sleep(2)
                second = start_on(*places[1], recipe, *changes, f"output={tmp_path}/{run}")
            for process in (first, second):
                process.join(240)
            codes = first.exitcode, second.exitcode
        finally:
            for host in hosts:
                cut_power(host)
        told = "".join(log.read_text() for log in logs)
        assert codes == (0, 0), told[-4000:]
        return end_of(tmp_path / run), told

    undisturbed, told = job("undisturbed", die=False)
    assert "going on from" not in told
    disturbed, told = job("disturbed", die=True)
    assert "going on from" in told and disturbed == undisturbed
    # Later, steps of Adam at 1e-2 have grown the rounding.
    losses, expected = ([loss for _, loss, _ in logged[:20]] for logged in (undisturbed[0], end_of(tmp_path / "one")[0]))
    assert losses == pytest.approx(expected, abs=1e-4)

"""Damaged and hostile files are read right or refused in one sentence; `python tests/fuzz.py 10000` makes many more."""

import pytest
from fuzz import Fuzz, megabytes

FILES = 400


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    return Fuzz(tmp_path_factory.mktemp("fuzz"))


def test_every_file_is_read_right_or_refused(fuzz):
    before = megabytes()
    found = [fuzz.one(seed) for seed in range(FILES)]
    assert not [outcome for outcome in found if outcome[1] not in ("read", "refused")]
    assert {outcome for _, outcome in found} == {"read", "refused"} and megabytes() - before < 1024

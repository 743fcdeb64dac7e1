"""Tokens: eight random bytes, never the same twice, in threads and forked processes neither."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcp_hub_cache._tokens import TOKEN_SIZE, new_token


def test_tokens_are_all_different() -> None:
    tokens = [new_token() for _ in range(10_000)]
    assert len(set(tokens)) == len(tokens)
    assert {len(token) for token in tokens} == {TOKEN_SIZE} and {type(token) for token in tokens} == {bytes}
    # Every bit is set about as often as not: 10,000 throws of 64 coins, seven standard deviations off at most.
    for bit in range(64):
        assert abs(sum(int.from_bytes(token, "little") >> bit & 1 for token in tokens) - 5000) < 350


def test_threads_take_different_tokens() -> None:
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: [new_token() for _ in range(5000)], range(8)))
    tokens = [token for part in taken for token in part]
    assert len(set(tokens)) == len(tokens) == 40_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_takes_other_tokens_than_its_parent() -> None:
    new_token()  # the pool holds what parent and child would both take next
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        os.write(write_end, b"".join(new_token() for _ in range(100)))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        written = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    of_child = {written[at : at + TOKEN_SIZE] for at in range(0, len(written), TOKEN_SIZE)}
    assert len(of_child) == 100 and of_child.isdisjoint(new_token() for _ in range(100))

"""What servers do with the same few prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.servers.server import Launch, Site, starting

PROMPTS = ("hello", "The quick brown fox jumps over the lazy dog", "experts " * 8)


@dataclass(frozen=True, slots=True)
class Run:
    """What one server generated for each prompt, launched until then, and wrote to its log."""

    tokens: list[list[int]]
    launches: list[Launch]
    log: list[str]

    def lines(self, *words: str) -> list[str]:
        """Those of its log that have all of these words."""
        return [line for line in self.log if all(word in line for word in words)]


def of_each(version: str, *starts: tuple[Site, Mapping[str, str]], flags: Sequence[str] = ()) -> list[Run]:
    """One server at each site, with that environment, all started at once: that takes far longer than the prompts."""
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(starting(site, version, settings, flags)) for site, settings in starts]
        runs: list[Run] = []
        for server in servers:
            server.wait_until_healthy()
            tokens = [server.tokens(prompt) for prompt in PROMPTS]
            runs.append(Run(tokens, server.launches(), server.log()))
        return runs

"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

_HERE = range(12_000, 32_000)  # below those that systems give to whoever asks for any


def free_ports(count: int) -> list[int]:
    """Return ports on 127.0.0.1 that nobody listens at, and that no connection will get by chance meanwhile."""
    dice, found = random.SystemRandom(), list[socket.socket]()
    try:
        while len(found) < count:
            one = socket.socket()
            with suppress(OSError):  # in use
                one.bind(("127.0.0.1", dice.choice(_HERE)))
                found.append(one)
                continue
            one.close()
        return [int(one.getsockname()[1]) for one in found]
    finally:
        for one in found:
            one.close()

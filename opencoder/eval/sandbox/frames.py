"""Messages over sockets: four bytes of length, then JSON. Standard library only: the zygote imports this."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

MAX_BYTES = 32 << 20
"""A longer message is an error: what a program under test sends must not fill our memory."""


class ChannelError(Exception):
    """The other side is gone, or sent what is no message."""


def send(channel: socket.socket, message: Any) -> None:
    """Send one message. Raises ChannelError if it is too long or nobody reads."""
    data = json.dumps(message).encode()
    if len(data) > MAX_BYTES:
        raise ChannelError(f"a message of {len(data)} bytes; at most {MAX_BYTES} are sent")
    try:
        channel.sendall(struct.pack("!I", len(data)) + data)
    except OSError as error:
        raise ChannelError(f"the other side is gone: {error}") from error


def receive(channel: socket.socket) -> Any:
    """The next message. Raises ChannelError at the end of the stream and for anything that is no message."""
    (length,) = struct.unpack("!I", _exactly(channel, 4))
    if length > MAX_BYTES:
        raise ChannelError(f"a message of {length} bytes; at most {MAX_BYTES} are read")
    data = _exactly(channel, length)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"no JSON: {error}") from error


def _exactly(channel: socket.socket, length: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < length:
        try:
            part = channel.recv(min(length - len(buffer), 1 << 20))
        except OSError as error:
            raise ChannelError(f"the other side is gone: {error}") from error
        if not part:
            raise ChannelError("the other side is gone")
        buffer += part
    return bytes(buffer)

"""Asks a server, by its own protocol and without a driver, whether it answers."""

from __future__ import annotations

import socket
import struct

import bson

#: Seconds for one attempt.
_PATIENCE = 5.0


def answers_redis(port: int, password: str) -> bool:
    """Whether a Redis on 127.0.0.1 has loaded its data and answers PING."""
    try:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode() if password else b"PING\r\n")
            answer = b""
            while b"PONG" not in answer and b"-" not in answer:
                received = connection.recv(4096)
                if not received:
                    break
                answer += received
    except OSError:
        return False
    return b"+PONG" in answer


def answers_mongo(port: int) -> bool:
    """Whether a MongoDB or gateway on 127.0.0.1 reads from its store: it lists the databases."""
    body = bson.encode({"listDatabases": 1, "nameOnly": True, "$db": "admin"})
    # OP_MSG: header (length, request id, response to, opcode 2013), flags, one section of kind 0.
    message = struct.pack("<iiiiIB", 21 + len(body), 1, 0, 2013, 0, 0) + body
    try:
        with socket.create_connection(("127.0.0.1", port), _PATIENCE) as connection:
            connection.sendall(message)
            answer = _receive(connection, 4)
            answer += _receive(connection, struct.unpack("<i", answer)[0] - 4)
    except (OSError, struct.error):
        return False
    try:
        return bool(bson.decode(answer[21:]).get("ok"))
    except bson.errors.BSONError:
        return False


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        piece = connection.recv(length - len(received))
        if not piece:
            raise ConnectionResetError("closed in the middle of an answer")
        received += piece
    return received

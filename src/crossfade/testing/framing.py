"""Where a request and an answer begin and end, in the MongoDB and PostgreSQL wire protocols.

MongoDB: each message starts with its length; an answer names the request it answers.
PostgreSQL: a client's question is a run of messages (parse, bind, describe, execute, sync) that the server
answers as one, ending in ReadyForQuery. One request here is that run, up to the message that asks for the
answer.
Any other protocol (Redis): what one read returns; its answer is the next thing the server sends.

Sources: MongoDB wire protocol specification (OP_MSG, OP_QUERY); PostgreSQL documentation, chapter
"Frontend/Backend Protocol", message formats.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Protocol = Literal["mongodb", "postgresql", "other"]

#: MongoDB commands by which a driver opens, watches and closes connections.
_MONGO_OPENING = {
    b"hello",
    b"isMaster",
    b"ismaster",
    b"saslStart",
    b"saslContinue",
    b"endSessions",
}
_OP_QUERY, _OP_MSG = 2004, 2013
#: Redis commands by which a driver opens connections.
_REDIS_OPENING = (b"HELLO", b"AUTH", b"CLIENT", b"SELECT")
#: PostgreSQL messages of a client that ask for an answer: Query, Sync, FunctionCall, CopyFail.
_ASKING = b"QSFf"
#: PostgreSQL's special first messages, answered with one byte without framing.
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104


def protocol_of(scheme: str) -> Protocol:
    """The protocol of a URI's scheme."""
    if scheme == "mongodb":
        return "mongodb"
    return "postgresql" if scheme in ("postgresql", "postgres") else "other"


@dataclass(frozen=True)
class Request:
    """One piece that is forwarded whole.

    opening: it belongs to opening or watching the connection, or is a part of a stream (COPY data).
    identity: MongoDB's request number, else 0. single_byte: PostgreSQL answers it with one byte.
    """

    data: bytes
    opening: bool = False
    identity: int = 0
    single_byte: bool = False


class Requests:
    """Cuts what a client sends into requests."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._buffer = bytearray()
        self._logged_in = False
        # Messages of the current question that is not complete yet.
        self._question = bytearray()

    def feed(self, data: bytes) -> Iterator[Request]:
        """The requests that are complete with this data."""
        if self._protocol == "other":
            command = data[:64].upper().split(b"\r\n")[2:3]
            yield Request(data, opening=bool(command) and command[0] in _REDIS_OPENING)
            return
        self._buffer += data
        if self._protocol == "mongodb":
            yield from self._mongo()
        else:
            yield from self._postgres()

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    def _mongo(self) -> Iterator[Request]:
        while len(self._buffer) >= 16:
            length, identity, _, opcode = struct.unpack_from("<iiii", self._buffer)
            if len(self._buffer) < length:
                return
            message = self._take(max(length, 16))
            opening = opcode == _OP_QUERY or (opcode == _OP_MSG and _command(message) in _MONGO_OPENING)
            yield Request(message, opening=opening, identity=identity)

    def _postgres(self) -> Iterator[Request]:
        while True:
            if not self._logged_in:
                if len(self._buffer) < 8:
                    return
                length, code = struct.unpack_from("!ii", self._buffer)
                if len(self._buffer) < length:
                    return
                single_byte = code in (_SSL_REQUEST, _GSS_REQUEST)
                self._logged_in = not single_byte
                yield Request(self._take(length), opening=True, single_byte=single_byte)
                continue
            if len(self._buffer) < 5:
                return
            kind, length = struct.unpack_from("!ci", self._buffer)
            if len(self._buffer) < length + 1:
                return
            message = self._take(length + 1)
            if kind in (b"p", b"d", b"X"):
                # Password, COPY data, goodbye. COPY data goes on as it comes, as there may be gigabytes.
                yield Request(bytes(self._question) + message, opening=True)
                self._question.clear()
                continue
            self._question += message
            # CopyDone asks by itself after a simple query; after an extended one a Sync comes with it.
            if kind in _ASKING or (kind in b"cH" and not self._buffer):
                yield Request(bytes(self._question))
                self._question.clear()


def _command(message: bytes) -> bytes:
    """The name of an OP_MSG's command: the first key of its body, if the body comes first."""
    # 16 header, 4 flags, 1 kind of section, 4 length of the document, 1 type of the first element.
    if len(message) < 27 or message[20] != 0:
        return b""
    return message[26 : message.find(b"\0", 26)]


class Answers:
    """Follows what a server sends, and tells when it has answered the last request."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._header = bytearray()
        self._skip = 0
        self._awaited = 0
        self._single_bytes = 0
        self._copy_done = False

    def expect(self, request: Request) -> None:
        """`request` goes to the server now."""
        self._awaited = request.identity
        self._single_bytes += request.single_byte
        self._copy_done = request.data[:1] == b"c" and not request.opening

    def feed(self, data: bytes) -> bool:
        """Whether with this data the answer to the last expected request is complete."""
        if self._protocol == "other":
            return True
        answered = False
        position = 0
        while position < len(data):
            if self._skip:
                skipped = min(self._skip, len(data) - position)
                self._skip -= skipped
                position += skipped
                if not self._skip:
                    answered |= self._ended()
                continue
            if self._single_bytes:
                self._single_bytes -= 1
                position += 1
                if data[position - 1 : position] == b"S":
                    # TLS from here on; its framing is not ours to read.
                    self._protocol = "other"
                    return True
                continue
            size = 16 if self._protocol == "mongodb" else 5
            wanted = size - len(self._header)
            self._header += data[position : position + wanted]
            position += wanted
            if len(self._header) == size:
                self._skip = self._length() - size
                if self._skip <= 0:
                    self._skip = 0
                    answered |= self._ended()
        return answered

    def _length(self) -> int:
        if self._protocol == "mongodb":
            return int(struct.unpack_from("<i", self._header)[0])
        # The type byte is not counted in a message's length.
        return int(struct.unpack_from("!ci", self._header)[1]) + 1

    def _ended(self) -> bool:
        """A message has been received whole; whether it is the one waited for."""
        header = bytes(self._header)
        self._header.clear()
        if self._protocol == "mongodb":
            return bool(struct.unpack_from("<iii", header)[2] == self._awaited)
        # ReadyForQuery, or "go on" to a COPY; after a CopyDone alone, CommandComplete or an error.
        return header[:1] in (b"Z", b"G", b"W") or (self._copy_done and header[:1] in (b"C", b"E"))

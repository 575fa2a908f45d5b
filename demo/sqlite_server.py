# SPDX-License-Identifier: Apache-2.0
"""Where no redis can be had: the few redis commands of the demo, kept by CPython in an SQLite database in memory."""

from __future__ import annotations

import selectors
import socket
import sqlite3
import sys

NUL = b"$-1\r\n"


class Database:
    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.execute("CREATE TABLE strings (key BLOB PRIMARY KEY, value BLOB)")
        self.db.execute("CREATE TABLE lists (key BLOB, at INTEGER, value BLOB, PRIMARY KEY (key, at))")

    def run(self, words: list[bytes]) -> bytes:
        verb = words[0].upper()
        if verb == b"PING":
            return b"+PONG\r\n"
        if verb == b"SET":
            self.db.execute("INSERT OR REPLACE INTO strings VALUES (?, ?)", words[1:3])
            return b"+OK\r\n"
        if verb == b"GET":
            row = self.db.execute("SELECT value FROM strings WHERE key = ?", words[1:2]).fetchone()
            return bulk(row[0]) if row else NUL
        if verb == b"RPUSH":
            size = self._length(words[1])
            self.db.execute("INSERT INTO lists VALUES (?, ?, ?)", (words[1], size, words[2]))
            return b":%d\r\n" % (size + 1)
        if verb == b"LLEN":
            return b":%d\r\n" % self._length(words[1])
        if verb == b"LRANGE":
            rows = self.db.execute("SELECT value FROM lists WHERE key = ? ORDER BY at", words[1:2]).fetchall()
            return b"*%d\r\n" % len(rows) + b"".join(bulk(row[0]) for row in rows)
        return b"-ERR unknown command\r\n"

    def _length(self, key: bytes) -> int:
        size: int = self.db.execute("SELECT COUNT(*) FROM lists WHERE key = ?", (key,)).fetchone()[0]
        return size


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


class Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""
        self.queue: list[list[bytes]] | None = None

    def feed(self, data: bytes, database: Database) -> bytes:
        self.pending += data
        out = []
        while (words := self._next()) is not None:
            verb = words[0].upper()
            if verb == b"MULTI":
                self.queue = []
                out.append(b"+OK\r\n")
            elif verb == b"EXEC":
                queue, self.queue = self.queue or [], None
                out.append(b"*%d\r\n" % len(queue) + b"".join(database.run(one) for one in queue))
            elif self.queue is not None:
                self.queue.append(words)
                out.append(b"+QUEUED\r\n")
            else:
                out.append(database.run(words))
        return b"".join(out)

    def _next(self) -> list[bytes] | None:
        """The next whole command, taken from what is pending."""
        data, at = self.pending, 0
        end = data.find(b"\r\n")
        if end < 0:
            return None
        words, at = [], end + 2
        for _ in range(int(data[1:end])):
            end = data.find(b"\r\n", at)
            if end < 0:
                return None
            size = int(data[at + 1 : end])
            if len(data) < end + 4 + size:
                return None
            words.append(data[end + 2 : end + 2 + size])
            at = end + 4 + size
        self.pending = data[at:]
        return words


def main() -> None:
    database = Database()
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection, _ = listener.accept()
                selector.register(connection, selectors.EVENT_READ, Client(connection))
                continue
            client = key.data
            try:
                data = client.connection.recv(1 << 20)
                if data:
                    client.connection.sendall(client.feed(data, database))
            except OSError:
                data = b""
            if not data:
                selector.unregister(client.connection)
                client.connection.close()


if __name__ == "__main__":
    main()

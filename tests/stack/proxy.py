"""A proxy that imitates failures of a server."""

import contextlib
import socket
import threading
import time

WAYS = ("down", "silent", "slow", "refuses", "flaps", "deaf")
"""Closes connections; accepts them and never responds; responds late; responds with errors; closes every third
connection; executes requests, but closes every other connection before the response."""
DELAY = 0.7
"""Delay of a slow server in seconds."""
ERROR = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Forwards connections to a server on a port of this machine, and fails as `way` requires."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.way = ""
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, self.connections), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with client, contextlib.suppress(OSError):
            if self.way == "down" or (self.way == "flaps" and number % 3 == 0):
                return
            if self.way == "silent":
                time.sleep(600)
            if self.way == "refuses":
                client.recv(65536)
                client.sendall(ERROR)
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                self._pass(server, client, response=True)

    def _pass(self, source: socket.socket, target: socket.socket, response: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if response and self.way == "slow":
                    time.sleep(DELAY)
                if response and self.way == "deaf" and self.connections % 2:
                    break
                target.sendall(data)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

"""Ways in which a server fails, between a client and a real one."""

import contextlib
import socket
import threading
import time

WAYS = ("down", "silent", "slow", "refuses", "flaps", "deaf")
"""Not there; takes connections and never answers; answers late; answers with errors; comes and goes; does what it is
asked and is gone before it answers."""
LATE = 0.7
"""Seconds by which a slow server answers late."""
ERROR = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Passes connections on to a server, or does not.

    Args:
        port: Of the server, on this machine.
    """

    def __init__(self, port: int) -> None:
        self._behind = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.way = ""
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
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
            with socket.create_connection(("127.0.0.1", self._behind)) as server:
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()
                self._pass(server, client, answers=True)

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if answers and self.way == "slow":
                    time.sleep(LATE)
                if answers and self.way == "deaf" and self.connections % 2:
                    break
                target.sendall(data)
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

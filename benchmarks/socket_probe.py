"""What a plain TCP socket gets of a link: `serve ADDRESS` on one node, `ask ADDRESS PORT BYTES` on the other.

`serve` prints its port; `ask` prints JSON. Imports nothing but Python's own: it starts in no time.
"""

import json
import socket
import statistics
import sys
import time

ROUND_TRIPS = 200
PIECE = 1 << 20


def serve(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        peer, _ = server.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(ROUND_TRIPS):
                peer.sendall(_receive(peer, 1))
            number = int.from_bytes(_receive(peer, 8), "big")
            while number:
                number -= len(peer.recv(min(number, PIECE)))
            peer.sendall(b".")


def ask(address: str, port: int, number: int) -> dict:
    """Round trip of one byte, median and quartiles; bytes per second of `number` bytes, to their acknowledgement."""
    with socket.create_connection((address, port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            peer.sendall(b".")
            _receive(peer, 1)
            trips.append(time.perf_counter() - begin)
        peer.sendall(number.to_bytes(8, "big"))
        piece, left = bytes(PIECE), number
        begin = time.perf_counter()
        while left:
            left -= peer.send(piece[: min(left, PIECE)])
        _receive(peer, 1)
        taken = time.perf_counter() - begin
    return {
        "round_trip_us": 1e6 * statistics.median(trips),
        "round_trip_quartiles_us": [1e6 * q for q in statistics.quantiles(trips)],
        "probe_bytes": number,
        "bytes_per_second": number / taken,
    }


def _receive(peer: socket.socket, number: int) -> bytes:
    received = b""
    while len(received) < number:
        part = peer.recv(number - len(received))
        if not part:
            raise ConnectionError("the other end left")
        received += part
    return received


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        print(json.dumps(ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))

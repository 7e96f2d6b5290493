"""Calls as CUDA graphs: a replay takes the time of its kernels, however long the host needs to launch them."""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key")

log = logging.getLogger("twolevel.ops")


def replay_of(call: Call, stream: torch.cuda.Stream | None = None) -> Call:
    """What replays `call`, which is called twice here: before the capture and in it.

    Gradients that it takes must be of tensors computed on `stream`, where that is given, or in the call itself:
    backward runs on the stream of its forward. Raises RuntimeError where it cannot be captured, as when it waits for
    the device; the current stream stays what it was.
    """
    stream = stream or torch.cuda.Stream()
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        call()
        with torch.cuda.graph(graph, stream=stream):
            call()
    current.wait_stream(stream)
    return graph.replay


def replays(calls: Mapping[Key, Call]) -> dict[Key, Call] | None:
    """What replays each of them; None where one cannot be captured: the time of a replay compares with no other."""
    try:
        return {key: replay_of(call) for key, call in calls.items()}
    except RuntimeError as error:
        log.info("no CUDA graph of %s: %s", ", ".join(map(str, calls)), error)
        return None

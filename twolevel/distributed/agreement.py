"""Failing together: an error on one rank is raised on all, so that none waits for one that is gone.

All of it runs over the default process group, or another of all ranks, and needs no mesh. Ranks send each other JSON,
as bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from twolevel.errors import UserError

_MAX_NAMED = 3  # differing settings that one message names


def agree(
    error: Exception | None,
    device: torch.device | str | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raise on every rank if any rank passes an error; a collective.

    The message is the first failing rank's, after "rank 2: " where this rank did not say the same. A rank whose own
    error is no UserError raises that one, with its traceback.

    Args:
        device: where the bytes travel from; None: the CPU if the group serves it, else the GPU.
        group: a group of all ranks that carries them; None: the default one.

    Raises:
        UserError: some rank passed an error.
    """
    own = None if error is None else _describe(error)
    reports = all_gather(own, device, group)
    if error is not None and not isinstance(error, UserError):
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            if report == own and error is not None:
                raise error  # its own words, be it the first or not
            raise UserError(f"rank {rank}: {report}") from error


@contextmanager
def together(
    device: torch.device | str | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[None]:
    """Run the body on every rank; if it raises on any rank, every rank raises, as `agree` does.

    The body must not hold a collective that a failing rank would miss.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    agree(error, device, group)


def require_equal(what: str, value: Mapping[str, object], device: torch.device | str | None = None) -> None:
    """Raise on every rank unless all pass the same flat dict of settings; a collective.

    Args:
        what: the plural that the message calls them, such as "configurations".
        value: settings by name; they are compared as JSON, what is not JSON by its str().

    Raises:
        UserError: naming the settings that differ, on which rank, and both values.
    """
    own = {name: json.dumps(setting, default=str) for name, setting in value.items()}
    reports = all_gather(own, device)
    for rank, report in enumerate(reports):
        if report != reports[0]:
            raise UserError(
                f"ranks were started with different {what}: {_differences(report, rank, reports[0])}"
                "; start every rank with the same arguments"
            )


def _differences(theirs: dict[str, str], rank: int, first: dict[str, str]) -> str:
    names = [name for name in {**first, **theirs} if theirs.get(name) != first.get(name)]
    named = [
        f"{name} is {theirs.get(name, 'missing')} on rank {rank} and {first.get(name, 'missing')} on rank 0"
        for name in names[:_MAX_NAMED]
    ]
    if len(names) > _MAX_NAMED:
        named.append(f"and {len(names) - _MAX_NAMED} more")
    return ", ".join(named)


def _describe(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {error}".split("\n", 1)[0] + " (its traceback is on that rank)"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather(
    value: object, device: torch.device | str | None = None, group: dist.ProcessGroup | None = None
) -> list:
    """Every rank's JSON value, in the order of ranks; a collective. `device` and `group` are as in `agree`."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    if device is None:
        serves_cpu = "cpu" in dist.get_backend_config(group)
        device = "cpu" if serves_cpu else f"cuda:{torch.cuda.current_device()}"
    # Lengths first, then bytes padded to one length.
    own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], dtype=torch.int64, device=device), group)
    longest = int(max(lengths))
    padded = own.new_zeros(longest)
    padded[: len(own)] = own
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group)
    return [
        json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, lengths, strict=True)
    ]

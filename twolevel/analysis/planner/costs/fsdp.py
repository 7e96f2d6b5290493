"""Fully sharded data parallelism (FSDP2), block by block."""

from dataclasses import replace

from twolevel.analysis.planner.costs.base import Cost, Setting, Walk, step_cost, walk
from twolevel.analysis.planner.footprint import Part, buffers, fsdp_parameters
from twolevel.analysis.planner.messages import Axis, Message, all_gather, axes, message
from twolevel.analysis.planner.workload import Layer, Workload
from twolevel.analysis.traffic import collective


def fsdp_cost(workload: Workload, setting: Setting, conv: str, *, ranks: int) -> Cost:
    """Parameters sharded over all ranks: gathered a block at a time, one ahead, forward and again backward."""
    batch, timing = setting.batch // ranks, setting.timing
    axis, _ = axes(setting.machine, ranks, 1)
    units: dict[str, list[Layer]] = {}
    for layer in workload.layers:
        units.setdefault(layer.block, []).append(layer)
    sizes = {name: 4 * sum(layer.size for layer in layers) for name, layers in units.items()}
    lines = {name: walk(workload, layers, batch, timing) for name, layers in units.items()}
    messages = _messages(units, sizes, lines, axis) if ranks > 1 else []
    line = walk(workload, workload.layers, batch, timing)
    shards = fsdp_parameters(workload.layers, ranks)
    # The optimiser works on the shards.
    count = sum(len(layer.parameters) for layer in workload.layers)
    line = replace(line, optimiser=timing.optimiser(count, shards))
    blocks = sorted((size for name, size in sizes.items() if name), reverse=True)
    # Gathered at once: what is in no block, a block and the next one; and one block's gradients before they are
    # reduced. With one rank nothing is gathered.
    gathered = sizes.get("", 0) + sum(blocks[:2]) + sum(blocks[:1]) if ranks > 1 else 0
    return step_cost(
        "fsdp",
        workload,
        setting,
        conv=conv,
        data=ranks,
        inner=1,
        parameters=shards,
        static=buffers(workload, workload.layers, 1) + 4 * batch * workload.values[0].elements + gathered,
        part=Part(workload, workload.layers, batch, 1, setting.precision),
        line=line,
        messages=messages,
        gradients_persist=True,
    )


def _messages(
    units: dict[str, list[Layer]], sizes: dict[str, int], lines: dict[str, Walk], axis: Axis
) -> list[Message]:
    """Gathers before forward, again before backward (not of what is in no block), reduce-scatters after it."""
    names = [name for name, size in sizes.items() if name and size]
    gathers, reduces = (
        {name: collective(kind, size, ranks=axis.ranks) for name, size in sizes.items()}
        for kind in ("all-gather", "reduce-scatter")
    )
    order = (["", *names] if sizes.get("") else names, [*reversed(names), *([""] if sizes.get("") else [])])
    messages: list[Message] = []
    free = clock = began = 0.0  # of the link; of the compute; when the compute of the unit before began
    for index, name in enumerate(order[0]):
        seconds = all_gather(axis, sizes[name])
        arrived = max(free, began if index else 0.0) + seconds
        start = max(clock, arrived)
        messages.append(message(gathers[name], seconds, exposed=start - clock))
        free, began, clock = arrived, start, start + lines[name].forward
    free = began = clock = 0.0
    scatters: list[Message] = []
    for name in order[1]:
        seconds = all_gather(axis, sizes[name])
        if name:
            arrived = max(free, began) + seconds
            start = max(clock, arrived)
            messages.append(message(gathers[name], seconds, exposed=start - clock))
            free = arrived
        else:
            start = clock
        began, clock = start, start + lines[name].backward
        free = max(free, clock) + seconds if name == order[1][-1] else free + seconds
        scatters.append(message(reduces[name], seconds))
    scatters[-1] = replace(scatters[-1], exposed=max(0.0, free - clock))
    return messages + scatters

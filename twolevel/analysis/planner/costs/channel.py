"""Channel parallelism: every rank computes m/P filters of the dense convolutions on all input channels."""

from collections import defaultdict

from twolevel.analysis.planner.costs.base import Cost, Setting, replica_messages, step_cost, walk
from twolevel.analysis.planner.costs.group import logits_message
from twolevel.analysis.planner.footprint import Part, buffers, rank_parameters
from twolevel.analysis.planner.messages import Message, all_gather, axes, message
from twolevel.analysis.planner.timing import ITEMSIZE, Seconds
from twolevel.analysis.planner.workload import Layer, Workload
from twolevel.analysis.traffic import collective


def channel_cost(workload: Workload, setting: Setting, *, data: int, ranks: int) -> Cost:
    """Dense convolutions with filters over `ranks` ranks: an activation is gathered once for all that read it.

    Forward waits for the gather; backward's reduce-scatter runs under the gradients of the weights.
    """
    batch, timing = setting.batch // data, setting.timing
    replicas, axis = axes(setting.machine, data, ranks)
    part = Part(workload, workload.layers, batch, ranks, setting.precision, gathers=True)
    hiding: dict[int, float] = defaultdict(float)
    messages: list[Message] = []

    def add_layer(layer: Layer, seconds: Seconds) -> None:
        if layer.kind == "conv" and layer.inputs[0] in workload.gathered:
            hiding[layer.inputs[0]] += seconds.backward / 2  # half of it is the weights' gradient
        elif layer.end == "classifier" and ranks > 1:
            itemsize = ITEMSIZE[setting.precision]
            messages.append(logits_message(workload, layer, axis, batch=batch, itemsize=itemsize))

    line = walk(workload, workload.layers, batch, timing, ranks, whole_input=True, on_layer=add_layer)
    for value in workload.gathered if ranks > 1 else ():
        size = part.bytes_of(value, whole=True)
        seconds = all_gather(axis, size)
        gather, scatter = (collective(kind, size, ranks=ranks) for kind in ("all-gather", "reduce-scatter"))
        messages.append(message(gather, seconds, exposed=seconds))
        messages.append(message(scatter, seconds, exposed=max(0.0, seconds - hiding[value])))
    messages += replica_messages(workload, line, replicas, ranks)
    return step_cost(
        "channel",
        workload,
        setting,
        conv="sc",
        data=data,
        inner=ranks,
        parameters=sum(rank_parameters(layer, ranks) for layer in workload.layers),
        static=buffers(workload, workload.layers, ranks) + 4 * batch * workload.values[0].elements,
        part=part,
        line=line,
        messages=messages,
    )

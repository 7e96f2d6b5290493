"""Channel parallelism: every rank computes m/P filters of the dense convolutions on all input channels."""

from collections import Counter

from twolevel.analysis.planning.collectives import Message, all_gather, axes
from twolevel.analysis.planning.cost import Cost, Setting, group_messages, make, replica_messages, walk
from twolevel.analysis.planning.memory import Part, buffers, held
from twolevel.analysis.planning.timing import Seconds
from twolevel.analysis.planning.workload import Layer, Workload


def channel_cost(workload: Workload, setting: Setting, data: int, ranks: int) -> Cost:
    """Dense convolutions with filters over `ranks` ranks: an activation is gathered once for all that read it.

    Forward waits for the gather; backward's reduce-scatter runs under the gradients of the weights.
    """
    batch, timing = setting.batch // data, setting.timing
    replicas, axis = axes(setting.machine, data, ranks)
    part = Part(workload, workload.layers, batch, ranks, setting.precision, gathers=True)
    hiding: Counter[int] = Counter()
    messages: list[Message] = []

    def see(layer: Layer, seconds: Seconds) -> float:
        if layer.kind == "conv" and layer.inputs[0] in workload.gathered:
            hiding[layer.inputs[0]] += seconds.backward / 2  # half of it is the weights' gradient
        elif layer.end == "classifier" and ranks > 1:
            messages.extend(group_messages(workload, layer, seconds, axis, batch, setting, False))
        return 0.0

    line = walk(workload, workload.layers, batch, timing, ranks, whole_input=True, see=see)
    for value in workload.gathered if ranks > 1 else ():
        whole = part.bytes_of(value, whole=True)
        sent, taken = (ranks - 1) / ranks * whole, all_gather(axis, whole)
        messages.append(Message("all-gather", whole // ranks, sent, taken, taken))
        messages.append(Message("reduce-scatter", whole, sent, taken, max(0.0, taken - hiding[value])))
    messages += replica_messages(workload, line, replicas, ranks)
    parameters = sum(held(layer, ranks) for layer in workload.layers)
    static = buffers(workload, workload.layers, ranks) + 4 * batch * workload.values[0].elements
    return make("channel", "sc", 1, data, ranks, setting, 4 * parameters, static, part, line, messages)

"""Cut by channel group, with replicas; and plain data parallelism, which cuts nothing."""

from twolevel.analysis.planner.costs.base import Cost, Setting, replica_messages, step_cost, walk
from twolevel.analysis.planner.footprint import Part, buffers, rank_parameters
from twolevel.analysis.planner.messages import Axis, Message, all_gather, all_reduce, axes, message
from twolevel.analysis.planner.timing import ITEMSIZE, Seconds
from twolevel.analysis.planner.workload import Layer, Workload
from twolevel.analysis.traffic import logits_sum, representatives_exchange


def group_cost(
    workload: Workload,
    setting: Setting,
    conv: str,
    *,
    data: int,
    group: int,
    two_level_exchange: bool = False,
) -> Cost:
    """Cut by channel group over `group` ranks, `data` replicas. With group=1, data parallelism (DDP)."""
    batch, timing = setting.batch // data, setting.timing
    replicas, axis = axes(setting.machine, data, group)
    itemsize = ITEMSIZE[setting.precision]
    messages: list[Message] = []

    def add_layer(layer: Layer, compute: Seconds) -> None:
        if group > 1 and layer.kind == "two-level":
            messages.extend(
                _representatives(
                    workload,
                    layer,
                    compute,
                    axis,
                    batch=batch,
                    itemsize=itemsize,
                    two_level=two_level_exchange,
                )
            )
        elif group > 1 and layer.end == "classifier":
            messages.append(logits_message(workload, layer, axis, batch=batch, itemsize=itemsize))

    part = Part(workload, workload.layers, batch, group, setting.precision, recompute=setting.recompute)
    line = walk(workload, workload.layers, batch, timing, group, again=part.again(), on_layer=add_layer)
    messages += replica_messages(workload, line, replicas, group)
    return step_cost(
        "group" if group > 1 or workload.groups > 1 else "ddp",
        workload,
        setting,
        conv=conv,
        data=data,
        inner=group,
        parameters=sum(rank_parameters(layer, group) for layer in workload.layers),
        static=buffers(workload, workload.layers, group) + 4 * batch * workload.values[0].elements,
        part=part,
        line=line,
        messages=messages,
        two_level_exchange=two_level_exchange,
    )


def _representatives(
    workload: Workload,
    layer: Layer,
    compute: Seconds,
    axis: Axis,
    *,
    batch: int,
    itemsize: int,
    two_level: bool,
) -> list[Message]:
    """The exchange of a two-level convolution, hidden for as long as its local convolution runs."""
    output = workload.values[layer.output]
    gather, scatter = representatives_exchange(
        batch=batch,
        representatives=layer.maps,
        pixels=output.elements // output.shape[0],
        itemsize=itemsize,
        ranks=axis.ranks,
    )
    # Of a gather and a scatter alike `bytes_in` of the scatter is the complete tensor.
    seconds = all_gather(axis, scatter.bytes_in, two_level=two_level)
    return [
        message(gather, seconds, exposed=max(0.0, seconds - compute.local_forward)),
        message(scatter, seconds, exposed=max(0.0, seconds - compute.local_backward)),
    ]


def logits_message(workload: Workload, layer: Layer, axis: Axis, *, batch: int, itemsize: int) -> Message:
    """The sum of the classifier's partial logits, which nothing hides."""
    classes = workload.values[layer.output].elements
    total = logits_sum(batch=batch, classes=classes, itemsize=itemsize, ranks=axis.ranks)
    seconds = all_reduce(axis, total.bytes_in)
    return message(total, seconds, exposed=seconds)

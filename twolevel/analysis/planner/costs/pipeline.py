"""Layers in stages, one a rank: where a network is cut, and what the schedules cost.

naive   one batch passes through all stages: a rank works while the others wait
gpipe   M microbatches forward, then all backward; a rank waits for P - 1 of them
1f1b    the same waiting, but stage i (from 0) keeps the activations of P - i microbatches at most
"""

from dataclasses import replace
from itertools import pairwise
from typing import Literal

from twolevel.analysis.planner.costs.base import Cost, Setting, walk
from twolevel.analysis.planner.footprint import Part, buffers, rank_parameters
from twolevel.analysis.planner.messages import Message, axes, message, send
from twolevel.analysis.planner.workload import Layer, Workload
from twolevel.analysis.traffic import collective
from twolevel.distributed.strategies.stages import balance
from twolevel.errors import UserError

PipelineSchedule = Literal["naive", "gpipe", "1f1b"]


def pipeline_cost(
    workload: Workload, setting: Setting, schedule: PipelineSchedule, *, stages: int, microbatches: int
) -> Cost:
    """The cost of SC in `stages` stages by `schedule`.

    Raises UserError where the network has fewer places to cut.
    """
    microbatches = 1 if schedule == "naive" else microbatches
    size, timing = setting.batch // microbatches, setting.timing
    _, axis = axes(setting.machine, 1, stages)
    parts = cut(workload, stages)
    lines = [walk(workload, layers, size, timing) for layers in parts]
    slowest = max(line.forward + line.backward for line in lines)
    passing = sum(line.forward + line.backward for line in lines)
    optimiser = max(line.optimiser for line in lines)
    work = microbatches * slowest
    messages: list[Message] = []
    exposed = 0.0
    for layers in parts[:-1]:
        sent = Part(workload, layers, size, 1, setting.precision).bytes_of(layers[-1].output)
        seconds = send(axis, sent)
        exposed += 2 * seconds  # the first microbatch forward and the last backward; others run under compute
        messages += [message(collective("send", sent, ranks=2), seconds)] * microbatches
    if messages:
        # One stage in the middle sends forward and backward.
        messages = messages[:microbatches] * (2 if stages > 2 else 1)
        messages[0] = replace(messages[0], exposed=exposed, seconds=max(exposed, messages[0].seconds))
    memories: list[tuple[int, int, int]] = []
    for index, layers in enumerate(parts):
        in_flight = _in_flight(schedule, stage=index, stages=stages, microbatches=microbatches)
        memories.append(_memory(workload, layers, setting, size=size, in_flight=in_flight))
    parameters, activations, peak = max(memories, key=lambda memory: memory[2])
    return Cost(
        strategy=schedule,
        conv="sc",
        groups=1,
        data=1,
        inner=stages,
        batch=setting.batch,
        parameters=parameters,
        activation_bytes=activations,
        peak_bytes=peak,
        fits=peak <= setting.machine.usable,
        compute=work + optimiser,
        bubble=passing - slowest,
        messages=tuple(messages),
        microbatches=microbatches,
    )


def _in_flight(schedule: PipelineSchedule, *, stage: int, stages: int, microbatches: int) -> int:
    return min(microbatches, stages - stage) if schedule == "1f1b" else microbatches


def _memory(
    workload: Workload, layers: tuple[Layer, ...], setting: Setting, *, size: int, in_flight: int
) -> tuple[int, int, int]:
    """(parameters, bytes of activations, bytes at the peak) of a stage."""
    parameters = sum(rank_parameters(layer, 1) for layer in layers)
    part = Part(workload, layers, size, 1, setting.precision)
    images = 4 * setting.batch * workload.values[0].elements if layers[0].inputs[0] == 0 else 0
    activations = in_flight * part.activations()
    more = max(0, in_flight - 1) * part.activations()
    peak = 2 * 4 * parameters + buffers(workload, layers, 1) + images + more + part.peak()
    return parameters, activations, max(peak, 3 * 4 * parameters)


def cut(workload: Workload, stages: int) -> list[tuple[Layer, ...]]:
    """The layers in so many stages; the multiply-accumulates of the largest are the fewest possible.

    A cut is only made where a single value is passed on, and no later operation changes it in place. Of places with
    the same work before them, the one with the smallest value is used.

    Raises UserError where there are fewer places than stages need.
    """
    layers, places = workload.layers, _places(workload)
    work = [0]
    for layer in layers:
        work.append(work[-1] + workload.work(layer, 1).macs)
    chosen = balance([work[place] for place in places], work[-1], stages)
    if chosen is None:
        raise UserError(
            f"stages={stages}: the network can be cut in {len(places)} places; use {len(places) + 1} or fewer"
        )
    cuts = [0, *(places[index] for index in chosen), len(layers)]
    return [layers[first:last] for first, last in pairwise(cuts)]


def _places(workload: Workload) -> list[int]:
    """The numbers of layers after which a single value is read later."""
    layers, values = workload.layers, workload.values
    last = {value: index for index, layer in enumerate(layers) for value in layer.inputs}
    total = sum(workload.work(layer, 1).macs for layer in layers)
    best: dict[int, int] = {}
    done = 0
    for index, layer in enumerate(layers[:-1]):
        done += workload.work(layer, 1).macs
        computed = {0, *(earlier.output for earlier in layers[: index + 1])}
        alive = {value for value in computed if last.get(value, -1) > index}
        if alive != {layer.output} or not 0 < done < total:
            continue
        readers = [later for later in layers[index + 1 :] if layer.output in later.inputs]
        if any(values[later.output].storage == values[layer.output].storage for later in readers):
            continue
        there = best.get(done)
        if there is None or values[layer.output].elements <= values[layers[there - 1].output].elements:
            best[done] = index + 1
    return list(best.values())

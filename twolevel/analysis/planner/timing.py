"""Seconds that one rank takes for one layer: from measured tables, or by a roofline with efficiencies."""

from dataclasses import dataclass

from twolevel.analysis.planner.machine import Machine, on_curve
from twolevel.analysis.planner.workload import Work
from twolevel.errors import UserError

ITEMSIZE = {"float32": 4, "bf16": 2}
# Passes over the memory, forward and backward: (of the input, of the output). Norm reads twice forward (statistics,
# then the values), and backward twice its input and its gradient; activations work in place.
PASSES = {
    "norm": ((2, 1), (3, 2)),
    "activation": ((1, 1), (2, 1)),
    "add": ((2, 1), (0, 0)),
    "mean": ((1, 1), (1, 1)),
    "pool": ((1, 1), (1, 1)),
    "other": ((1, 1), (1, 1)),
}
# One pass for norm and activation: what is left of the second.
FUSED = {"activation": ((0, 0), (0, 0)), "add": ((1, 0), (0, 0))}


@dataclass(frozen=True)
class Seconds:
    """Of one layer on one rank; `local_*` is the part of a two-level convolution that hides its exchange."""

    forward: float
    backward: float
    local_forward: float = 0.0
    local_backward: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Timing:
    """Times layers on a machine in a precision ("float32", or "bf16" as autocast)."""

    def __init__(self, machine: Machine, precision: str = "float32"):
        self.machine, self.precision = machine, precision
        if machine.tables and machine.precision != precision:
            raise UserError(
                f"machine {machine.name} was measured in {machine.precision}, not in {precision}; "
                f"use --precision {machine.precision}, or measure again with --calibrate"
            )
        if not machine.tables and precision not in machine.flops:
            raise UserError(
                f"machine {machine.name} has no rate for {precision}; use {' or '.join(machine.flops)}"
            )

    def __call__(self, work: Work) -> Seconds:
        return self._measured(work) if self.machine.tables else self._roofline(work)

    def optimiser(self, tensors: int, elements: int) -> float:
        """Fused SGD with momentum: reads parameter, gradient and momentum, writes two of them."""
        if self.machine.tables:
            return self.machine.tables["optimiser"].at(elements=elements / max(tensors, 1))[0] * tensors
        return self.machine.overhead * 4 + 5 * 4 * elements / self._stream

    # ---- measured

    def _measured(self, work: Work) -> Seconds:
        tables = self.machine.tables
        if work.kind in ("conv", "two-level"):
            local = self._convolution("conv", work)
            if work.kind == "conv":
                return local
            layer = self._convolution("two-level", work)
            hidden = (min(local.forward, layer.forward), min(local.backward, layer.backward))
            # Measured is one representative, whose restriction and coarse term are what is beyond the local part.
            more = work.representatives - 1
            forward = layer.forward + more * (layer.forward - hidden[0])
            return Seconds(forward, layer.backward + more * (layer.backward - hidden[1]), *hidden)
        if work.kind == "linear":
            return Seconds(*tables["linear"].at(elements=work.channels_in * work.channels_out * work.batch))
        kind = work.kind if work.kind in ("norm", "activation", "add") else "mean"
        channels, elements = work.channels_in, max(work.elements_in, work.elements_out)
        return Seconds(*tables[kind].at(channels=channels, elements=elements))

    def _convolution(self, kind: str, work: Work) -> Seconds:
        table = self.machine.tables[f"{kind} {'pointwise' if work.taps == 1 else 'spatial'}"]
        first, last = work.widths
        where = {
            "width": (first * last) ** 0.5,
            "groups": work.groups,
            "pixels": work.batch * work.pixels_out,
        }
        if kind == "two-level":
            where["ranks"] = work.all_groups / work.groups
        forward, backward = table.at(**where)
        scale = 1.0 if work.taps in (1, 9) else work.taps / 9
        return Seconds(forward * scale, backward * scale * (1.0 if work.input_grad else 0.5))

    # ---- roofline

    @property
    def _stream(self) -> float:
        return self.machine.bandwidth * self.machine.streaming

    def _roofline(self, work: Work) -> Seconds:
        machine, size = self.machine, ITEMSIZE[self.precision]
        if work.kind in PASSES:
            passes = (machine.fuses and FUSED.get(work.kind)) or PASSES[work.kind]
            times = [
                (of_input * work.elements_in + of_output * work.elements_out) * size / self._stream
                for of_input, of_output in passes
            ]
            return Seconds(*(t + machine.overhead if t else 0.0 for t in times))
        forward = self._product(work)
        grads = 2 if work.input_grad else 1
        local = Seconds(forward + machine.overhead, grads * forward + machine.overhead)
        if work.kind != "two-level":
            return local
        # Forward reads the input, and reads and writes the output; backward reads the output's gradient twice and
        # the input, and adds into the input's gradient.
        moved = (work.elements_in + 2 * work.elements_out, 2 * work.elements_out + 3 * work.elements_in)
        steps = (2, 3)
        coarse = self._coarse(work)
        pixels = machine.representative * work.representatives * work.batch * work.pixels_out
        extra = [
            max(elements * size / self._stream, products * coarse)
            + number * machine.overhead
            + products * pixels / 3
            for elements, number, products in zip(moved, steps, (1, 2), strict=True)
        ]
        return Seconds(local.forward + extra[0], local.backward + extra[1], local.forward, local.backward)

    def _coarse(self, work: Work) -> float:
        """One of the three products of the coarse term: R G channels to those of the output, for each pixel."""
        machine = self.machine
        share = on_curve(machine.dense[self.precision], min(work.maps, work.channels_out))
        return 2 * work.elements_out * work.maps / (machine.flops[self.precision] * share)

    def _product(self, work: Work) -> float:
        """max(operations / (peak * share), bytes / bandwidth) of one of the three products of a convolution."""
        machine = self.machine
        curve = (machine.dense if work.groups == 1 else machine.grouped)[self.precision]
        share = on_curve(curve, min(work.widths))
        share *= min(1.0, work.elements_out / machine.saturation) if machine.saturation else 1.0
        operations = 2 * work.macs / (machine.flops[self.precision] * share)
        weights = work.taps * work.channels_in * work.channels_out / work.groups
        moved = (work.elements_in + work.elements_out + weights) * ITEMSIZE[self.precision]
        return max(operations, moved / self._stream)

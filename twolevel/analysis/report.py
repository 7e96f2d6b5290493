"""Counts as tables."""

from twolevel.analysis.count import Count
from twolevel.terminal import Column, Console, print_table, width


def count_table(count: Count, *, layers: bool = True) -> None:
    """Print a row for each layer that computes or exchanges, and the sums."""
    console = Console()
    if layers:
        print_table(console, _columns(count))
        console.print()
    kinds = ", ".join(f"{number} {kind}" for kind, number in count.collectives_by_kind().items()) or "none"
    learned = {}
    if count.published_parameters != count.parameters:
        learned["  without those that only choose connections"] = f"{count.published_parameters:,}"
    now = {} if count.realised_macs == count.macs else {"  as the network is now": f"{count.realised_macs:,}"}
    rows = {
        "parameters": f"{count.parameters:,}",
        **learned,
        f"  on one of {count.ranks} ranks": f"{count.held:,}",
        "  the same, stem and classifier counted whole": f"{count.held_whole_ends:,}",
        "multiply-accumulates an image, forward": f"{count.macs:,}",
        f"  on one of {count.ranks} ranks ": f"{count.held_macs:,}",
        **now,
        "  with activations and pooling, one an element": f"{count.macs + count.elementwise:,}",
        f"collectives a training step, batch {count.batch_size}": kinds,
        "  bytes sent by a rank (ring algorithm)": f"{round(count.bytes_sent):,}",
    }
    for name, value in rows.items():
        line = f"{name:48} {value}"
        console.print(line if len(line) <= width() else f"{name}\n    {value}")


def _columns(count: Count) -> list[Column]:
    layers = count.layers

    def numbers(heading: str, values: list[int], need: int) -> Column:
        return Column(heading, [f"{value:,}" if value else "" for value in values], need)

    return [
        Column("layer", [layer.name for layer in layers], 9, left=True),
        Column("kind", [layer.kind for layer in layers], 6, left=True),
        Column("output", ["x".join(map(str, layer.output)) for layer in layers], 3, left=True),
        numbers("parameters", [layer.parameters for layer in layers], 7),
        numbers("a rank", [layer.held for layer in layers], 4),
        numbers("MACs", [layer.macs for layer in layers], 8),
        numbers("MACs a rank", [layer.held_macs for layer in layers], 2),
        numbers("bytes a step", [round(layer.bytes_sent) for layer in layers], 5),
    ]

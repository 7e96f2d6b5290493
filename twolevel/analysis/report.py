"""Counts as tables."""

from rich.console import Console
from rich.table import Table

from twolevel.analysis.count import Count


def count_table(count: Count, *, layers: bool = True) -> None:
    """Print a row for each layer that computes or exchanges, and the sums."""
    console = Console(markup=False, emoji=False)
    console.width = max(console.width, 120)  # cut names would be of no use in a pipe
    if layers:
        table = Table(box=None, header_style="bold")
        for name in ("layer", "kind", "output"):
            table.add_column(name, no_wrap=True)
        for name in ("parameters", "a rank", "MACs", "a rank", "bytes a step"):
            table.add_column(name, justify="right", no_wrap=True)
        for layer in count.layers:
            numbers = (layer.parameters, layer.held, layer.macs, layer.held_macs, round(layer.bytes_sent))
            shape = "x".join(map(str, layer.output))
            table.add_row(layer.name, layer.kind, shape, *(f"{n:,}" if n else "" for n in numbers))
        console.print(table)
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
        console.print(f"{name:48} {value}", highlight=False)

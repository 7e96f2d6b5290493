"""Tables and the picture."""

from pathlib import Path

from benchmarks import report
from benchmarks.scaling.cases import STRONG
from benchmarks.scaling.paper import HOURS, PROCESSORS

MB = 1e6
COLUMNS = (
    "ms,/ group,images/s,alone ms,speed-up,efficiency,exposed ms,calls,MB sent,MB wire,peak MB,held MB".split(
        ","
    )
)


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def name_of(row: dict) -> str:
    groups = f" G={row['groups']}" if row["strategy"] == "group" else ""
    return f"{row['strategy']} {row['conv']}{groups}" + (" mpi" if row.get("carrier") == "mpi" else "")


def place_of(row: dict) -> str:
    link = "" if row["link"] == "none" else f", {row['link']} link"
    return f"P={row['ranks']}{link}"


def measured(rows: list[dict]) -> str:
    """One block for each P, link and scaling, a line for each strategy."""
    blocks = []
    for key in dict.fromkeys((place_of(row), row["scaling"]) for row in rows):
        own = [row for row in rows if (place_of(row), row["scaling"]) == key]
        lines = [["", *COLUMNS]]
        lines += [line(row) for row in own]
        blocks.append(f"{key[0]}, {key[1]} scaling, {own[0]['model']}, batch {own[0]['batch']}")
        blocks.append(report.table(lines, first=20, width=12))
    return "\n".join(blocks)


def line(row: dict) -> list[str]:
    calls = sum(kind["number"] for kind in row["collectives"].values())
    wire, memory = row["wire_bytes"], row.get("memory")
    return [
        name_of(row),
        f"{row['median_ms']:.1f}",
        number(row["to_group"]),
        f"{row['images_per_second']:.1f}",
        number(row["alone_ms"], "{:.1f}"),
        number(row["speed_up"]),
        number(row["efficiency"]),
        number(row["exposed_ms"], "{:.1f}"),
        str(calls),
        f"{row['sent_by_ring_bytes'] / MB:.2f}",
        number(wire and wire["sent"] / MB),
        number(memory and max(m["peak_bytes"] - m["before_bytes"] for m in memory) / MB, "{:.0f}"),
        f"{max(sum(held.values()) for held in row['held_bytes']) / MB:.2f}",
    ]


def projected(found: dict) -> str:
    lines = [["", "N", "data x group", "G", "images", "ms", "MB over"]]
    for row in found["rows"]:
        crossing = sum(kind["bytes_in"] for kind in row["would_cross"].values())
        lines.append(
            [
                f"{row['strategy']} {row['conv']}",
                str(row["ranks"]),
                f"{row['data']} x {row['group']}",
                str(row["groups"]),
                str(row["images_of_a_rank"]),
                f"{row['median_ms']:.1f}",
                f"{crossing / MB:.2f}",
            ]
        )
    return f"{found['label']}\n" + report.table(lines, first=16, width=14)


def paper(found: dict) -> str:
    """Ratios to one processor, ours beside theirs; hours on a GPU."""
    lines = [
        ["WRN-28-k, 200 epochs", *(f"P={p}" for p in PROCESSORS), *(f"P={p} / P=1" for p in PROCESSORS[1:])]
    ]
    for k, hours in HOURS.items():
        ratios = [f"{h / hours[0]:.3f}" for h in hours[1:]]
        lines.append([f"paper, k={k}", *(f"{h:.1f} h" for h in hours), *ratios])
    for k in dict.fromkeys(row["k"] for row in found["rows"]):
        own = [row for row in found["rows"] if row["k"] == k]
        times = [f"{r['hours']:.1f} h" if r["hours"] else f"{r['median_ms']:.0f} ms/step" for r in own]
        lines.append([f"ours, k={k}", *times, *(f"{r['to_one']:.3f}" for r in own[1:])])
    return "\n".join([f"ours: {found['label']}", f"paper: {found['published_remark']}", report.table(lines)])


def draw(rows: list[dict], path: Path) -> None:
    """Bars of strong scaling by P and link: speed-up, and the time of a step."""
    strong = [row for row in rows if row["scaling"] == STRONG]
    places, names = (list(dict.fromkeys(map(of, strong))) for of in (place_of, name_of))
    found = {(name_of(row), place_of(row)): row for row in strong}
    panels = {
        "speed-up over one rank with the same convolutions": "speed_up",
        "time of a step, ms": "median_ms",
    }
    report.bars(
        {title: _series(found, field, names, places) for title, field in panels.items()},
        places,
        path,
        title=f"{strong[0]['model']}, batch {strong[0]['batch']}",
        unit="",
    )


def draw_projection(projection: dict, path: Path) -> None:
    """Bars of the time of a step of one rank of N."""
    rows = projection["rows"]
    found = {(f"{row['strategy']} {row['conv']}", f"N = {row['ranks']}"): row for row in rows}
    names, places = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    panels = {projection["label"]: _series(found, "median_ms", names, places)}
    report.bars(panels, places, path, title=rows[0]["model"], unit="time of a step, ms")


def _series(found: dict, field: str, names: list[str], places: list[str]) -> dict[str, list[float | None]]:
    return {name: [found.get((name, place), {}).get(field) for place in places] for name in names}

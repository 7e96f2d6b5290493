"""`twolevel report`: draw a run: its curve, and what learned or dynamic groups chose."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from twolevel.cli.options import parse
from twolevel.settings import Device


@dataclass
class ReportConfig:
    """Draw a run into its folder report/: its curve, and what its dgc, dgconv or flgc convolutions chose."""

    path: tyro.conf.Positional[Path]
    """folder of a run"""

    images: int | None = None
    """dgc: test images, each of another class, whose kept channels are drawn; 6 unless given"""

    batches: int | None = None
    """dgc: batches of 500 test images over which dropped channels are counted; 10 unless given"""

    data_root: Path | None = None
    """dgc: folder of the data set; that of the run unless given"""

    workers: int | None = None
    """dgc: processes that decode ImageNet images; those of the run unless given"""

    device: Device = "auto"
    """where to compute"""


def run(argv: list[str]) -> None:
    config = parse(ReportConfig, "report", argv)
    from twolevel.training.report import write_report

    report = write_report(**asdict(config))
    for file, what in report.files.items():
        print(f"{file}  {what}")
    if report.note:
        print(report.note)

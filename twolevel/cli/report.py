"""`twolevel report`: one page of what runs and grids have found, and pictures of what convolutions chose."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from twolevel.cli.options import parse
from twolevel.errors import UserError
from twolevel.settings import Device


@dataclass
class ReportConfig:
    """Make a page of runs and grids: of a run its curve and what its dgc, dgconv, flgc or lgc convolutions chose
    (pictures in its folder report/), of a grid's lines the errors against groups and cost, and the published ones."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, and folders or files of results (.jsonl) that `twolevel grid` wrote"""

    page: Path | None = None
    """the page; by default report/index.html in the folder of the run, or report.html of several paths"""

    figures: Path | None = None
    """folder for the figures of grids as files of their own too: SVG, with their data as CSV beside them"""

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
    if not config.paths:
        raise UserError("name the folder of a run, such as runs/demo, or a file of results")
    from twolevel.grids import results
    from twolevel.grids.report import write_page
    from twolevel.training.report import write_report

    # A grid's folder stands for the results in it.
    paths = [path / "results.jsonl" if (path / "results.jsonl").exists() else path for path in config.paths]
    files = [path for path in paths if path.suffix == ".jsonl"]
    folders = [path for path in paths if path not in files]
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(
            f"{missing[0]} does not exist; `twolevel grid` writes it when its first run has finished"
        )
    if config.figures is not None and not files:
        raise UserError(
            f"figures={config.figures} is of results of grids; the pictures of a run are in its folder report/"
        )
    reports = {}
    for folder in folders:
        reports[folder] = write_report(
            folder,
            images=config.images,
            batches=config.batches,
            data_root=config.data_root,
            workers=config.workers,
            device=config.device,
        )
    lines = [line for file in files for line in results.read(file)]
    default = (
        folders[0] / "report" / "index.html"
        if len(config.paths) == len(folders) == 1
        else Path("report.html")
    )
    page = write_page(lines, config.page or default, config.paths, reports, config.figures)
    for report in reports.values():
        for file, what in report.files.items():
            print(f"{file}  {what}")
        if report.note:
            print(report.note)
    if config.figures is not None:
        print(f"{config.figures}  its figures, SVG and CSV")
    print(f"{page}  all of it in one page")

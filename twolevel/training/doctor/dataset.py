"""The files of the data set: all there, and what was published or can be decoded."""

from collections.abc import Iterator
from dataclasses import replace

from twolevel.data import DataConfig, prepare
from twolevel.distributed.environment import World
from twolevel.errors import UserError
from twolevel.training.doctor.finding import Finding, ok, problem, warning

# Images of a split that are decoded; at one damaged of a hundred, 64 miss it in half of the cases.
SAMPLE = 64


def check(world: World, config: DataConfig) -> Iterator[Finding]:
    """On one rank of each machine."""
    if world.local_rank:
        return
    try:
        prepare(replace(config, download=False))
        found = _decoded(config) if not config.data_set.in_memory else "every file has its published md5"
        found = found if "data_root" in config.data_set.uses else "in the package"
    except UserError as error:
        finding, _, advice = str(error).partition("; ")
        if config.download:
            advice = "--download fetches it when the run starts; fetch it now where the run has no network"
            yield warning("data", finding, advice)
        else:
            yield problem("data", finding, advice)
        return
    yield ok("data", f"{config.data}: {found}")


def _decoded(config: DataConfig) -> str:
    """Decode some images, others each time. Raises UserError for a class without images, or one that is damaged."""
    import random

    from twolevel.data.imagenet import ImageFiles, decode

    said = []
    for split in ("train", "val"):
        files = ImageFiles(config.data_root / split, config.image_size)
        chosen = random.sample(range(len(files)), min(SAMPLE, len(files)))
        for index in chosen:
            decode(files.path(index))
        said.append(f"{len(files):,} images in {split}")
    return f"{', '.join(said)}, in every class; {SAMPLE} or all of each decoded"

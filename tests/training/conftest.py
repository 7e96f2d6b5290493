"""A data set so small that a run of several epochs takes a second."""

from pathlib import Path

import pytest
from command import FIXED, run, write_image_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """Options of a run on 24 images of 16 x 16: three steps an epoch, every step recorded, in float64."""
    root: Path = write_image_folder(tmp_path_factory.mktemp("images"))
    words = f"--model wrn-10-1 --conv gc2l --groups 4 --data imagenet --data-root {root} --image-size 16"
    words += " --workers 0 --batch-size 8 --epochs 3 --log-steps 1 --precision float64"
    return words.split()


@pytest.fixture(scope="session")
def undisturbed(pool, tiny, tmp_path_factory) -> Path:
    """A run of two ranks from beginning to end."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    first, _ = run(pool, "train", *tiny, *FIXED, "--output", output, ranks=2)
    assert first.out.startswith("2 ranks came: mesh data=1 x group=2\n")
    return output

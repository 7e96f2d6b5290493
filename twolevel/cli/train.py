"""`twolevel train`: train a network on the ranks that a launcher started, or on one."""

from twolevel.cli.config_file import take_config
from twolevel.cli.options import parse
from twolevel.training.config import TrainConfig


def run(argv: list[str]) -> None:
    config = configure(argv)
    from twolevel.training.loop import train

    train(config)


def configure(argv: list[str]) -> TrainConfig:
    """The settings that these options describe; raises UserError for those that are refused."""
    argv, default = take_config(argv)
    return parse(TrainConfig, "train", argv, default)

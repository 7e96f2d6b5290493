"""Train wide convolutional networks, their convolutions split by channel group over processors."""

__version__ = "0.1.0"

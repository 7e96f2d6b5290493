"""A whole network in one safetensors file."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from twolevel import durable
from twolevel.data import DataConfig
from twolevel.errors import UserError
from twolevel.models.registry import create

_KEY = (
    "twolevel"  # of the file's metadata: {"create": how to make the network, "data": what it was trained on}
)
DATA = ("data", "image_size")
"""The settings of the data set that say what its images are."""


def save(path: Path | str, tensors: dict[str, Tensor], create: dict[str, Any], data: dict[str, Any]) -> None:
    """Write a single-process `state_dict()`, the arguments of `create` for its network, and its data set's settings."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with durable.replacing(Path(path)) as made:
            save_file(contiguous, made, metadata={_KEY: json.dumps({"create": create, "data": data})})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def read(path: Path | str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(arguments of `create`, the data set's settings, state_dict) of a file that `save` wrote.

    Raises UserError where the file is missing, damaged, from another program, or has unknown settings.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            options, data = dict(about["create"]), dict(about["data"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} was not written by twolevel export: it does not say which network it is"
        ) from None
    except (ValueError, RecursionError, SafetensorError) as error:
        why = f"cannot read {path}: {error}".splitlines()[0]
        other = {".pt2": "torch.export.load", ".onnx": "onnxruntime", ".pt": "torch.load"}.get(
            Path(path).suffix
        )
        raise UserError(f"{why}; {other} reads such files" if other else why) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}".splitlines()[0]) from error
    unknown = data.keys() - {field.name for field in fields(DataConfig)}
    if unknown:
        raise UserError(
            f"{path} has unknown settings of its data set: {', '.join(sorted(unknown))}; "
            "it may be from another version of twolevel"
        )
    network(path, options)
    # No file chooses where something is read or fetched.
    return options, {name: data[name] for name in DATA if name in data}, tensors


def network(path: Path | str, options: dict[str, Any]) -> nn.Module:
    """The network without values. Raises UserError where `options` are not those of `create`."""
    try:
        with torch.device("meta"):
            return create(**options)
    except (TypeError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path} does not describe a network of this version of twolevel: {why}") from error


def load(path: Path | str) -> nn.Module:
    """The single-process network of a file that `twolevel export` wrote, with its weights."""
    options, _, tensors = read(path)
    return filled(path, options, tensors)


def filled(path: Path | str, options: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The network of the weights at `path`, which it holds. Raises UserError where they are those of another one."""
    model = network(path, options)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold what its network needs: {error}".splitlines()[0]) from error
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model

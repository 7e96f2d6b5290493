"""Trained weights, wherever they lie: a run, one of its checkpoints, or an exported file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from twolevel import __version__, models
from twolevel.data.config import DataConfig
from twolevel.distributed.agreement import together
from twolevel.errors import UserError
from twolevel.models import Exported, files
from twolevel.nn import Transfer, initialize, layout_of, transfer
from twolevel.settings import WeightsOf
from twolevel.training import checkpoint
from twolevel.training.config import MeshConfig, TrainConfig
from twolevel.training.context import join
from twolevel.training.evaluate import Tested, evaluate
from twolevel.training.state import named_parts


@dataclass(frozen=True)
class Weights:
    """`path` is a checkpoint's folder or an exported file; `options` are those of `models.create`."""

    path: Path
    options: dict[str, Any]
    data: dict[str, Any]
    which: WeightsOf
    dtype: torch.dtype = torch.float32

    @classmethod
    def find(cls, path: Path, which: WeightsOf = "model") -> "Weights":
        """The weights at `path`: a run's folder (its newest checkpoint), a checkpoint's, or a file.

        Raises UserError where there are none, they are damaged, or no moving average was kept.
        """
        if path.is_file():
            if which != "model":
                raise UserError(
                    f"{path} is an exported file and holds one set of weights; leave weights={which} out"
                )
            options, data, _ = files.read(path)
            return cls(path, options, data, which)
        newest = checkpoint.newest_good(path / "checkpoints")
        if newest is None and not (path / checkpoint.STATE).exists():
            raise UserError(
                f"{path} holds no checkpoint; give a run's folder, one of its checkpoints, or a file"
                if path.exists()
                else f"{path} does not exist; give a run's folder, one of its checkpoints, or an exported file"
            )
        if newest is None:
            checkpoint.verify(path)
        path = newest or path
        state = checkpoint.read_state(path)
        config = _config(path, state)
        if which == "ema" and config.optimiser.ema_decay is None:
            raise UserError(f"{path} has no moving average of the weights: the run had no --ema-decay")
        options = config.model.create_options(state["num_classes"])
        dtype = torch.float64 if config.run.precision == "float64" else torch.float32
        data = config.to_dict()["data"] | {"download": False}  # nothing is fetched to where a file says
        return cls(path, options, data, which, dtype)

    def load_into(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Fill this rank's part of the network."""
        if self.path.is_dir():
            checkpoint.load(self.path, named_parts(self.which, model, mesh))
            return
        *_, tensors = files.read(self.path)
        held = model.state_dict()  # of one stage of a pipeline a part of the names
        missing = held.keys() - tensors.keys()
        if missing:
            raise UserError(
                f"{self.path} does not hold what its network needs: {sorted(missing)[0]} is missing"
            )
        _fill(model, tensors)

    def start_of(self, options: dict[str, Any], seed: int) -> tuple[dict[str, Tensor], Transfer]:
        """The `state_dict()` of the whole network of `options`, started from these weights as `nn.transfer` can.

        What they do not have is drawn from `seed`. Raises UserError where they are of another network.
        """
        with torch.device("meta"):
            whole = models.create(**options)
        initialize(whole, seed, "cpu").to(self.dtype)
        try:
            done = transfer(whole, self.network())
        except UserError as error:
            raise UserError(f"{options['name']} cannot start from {self.path}: {error}") from error
        return whole.state_dict(), done

    def export(self, output: Path, format: str = "safetensors") -> Exported | None:
        """Write the whole network into one file: safetensors, or in the formats of `twolevel.models.export`.

        Raises UserError where `output` exists, and as `twolevel.models.export` does.
        """
        if output.exists():
            raise UserError(f"{output} exists already; remove it or name another file")
        if format != "safetensors":
            return models.export(self.network(), output, self._image_shape(), format=format)
        if not self.path.is_dir():
            raise UserError(f"{self.path} is an exported file already")
        data = {name: self.data[name] for name in files.DATA}
        files.save(output, self._tensors(), self.options, data)
        return None

    def network(self) -> nn.Module:
        """The whole network in this process."""
        return files.filled(self.path, self.options, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The `state_dict()` of the whole network."""
        if not self.path.is_dir():
            return files.read(self.path)[2]
        model = files.network(self.path, self.options)
        sizes = {f"{self.which}.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.require(self.path, sizes)  # before there is memory for them
        tensors = model.to(self.dtype).to_empty(device="cpu").state_dict()
        checkpoint.load(
            self.path, {f"{self.which}.{name}": tensor for name, tensor in tensors.items()}, alone=True
        )
        return tensors

    def _image_shape(self) -> tuple[int, int, int]:
        if not self.data:
            raise UserError(f"{self.path} does not say what it was trained on; use twolevel.models.export")
        return DataConfig(**self.data).image_shape


def start_from(
    path: Path, model: nn.Module, options: dict[str, Any], seed: int, device: torch.device
) -> Transfer:
    """Have this rank's part of the network of `options` start from the weights at `path`; every rank calls this.

    What these do not have is drawn from `seed`. Raises UserError, on every rank, as `find` and `nn.transfer` do.
    """
    with together(device):
        tensors, done = Weights.find(path).start_of(options, seed)
    _fill(model, tensors)  # outside `together`: it may hold a collective
    return done


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill this rank's part of a network from the `state_dict()` of the whole; every rank calls this."""
    layout = layout_of(model)
    for name, tensor in model.state_dict().items():
        part = layout.cut(name, tensors[name]).to(tensor.device)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(part, tensor.device_mesh, tensor.placements)
        tensor.copy_(part)


def _config(path: Path, state: dict[str, Any]) -> TrainConfig:
    """The settings of the run that a checkpoint is of. Raises UserError where one of them does not exist here."""
    try:
        return TrainConfig.from_dict(state["config"], f"checkpoint {path}")
    except UserError as error:
        version = state.get("version", __version__)
        if version == __version__:
            raise
        raise UserError(
            f"{error}; it was written by twolevel {version}, and this is {__version__}"
        ) from error


def evaluate_weights(
    path: Path,
    which: WeightsOf,
    *,
    data: str | None = None,
    data_root: Path | None = None,
    workers: int | None = None,
    mirrored: bool = False,
    precision: str = "float32",
    mesh: MeshConfig,
) -> Tested | None:
    """Test the weights at `path`: the result on rank 0, None on the others; all ranks call it.

    The data set is the one they were trained on, unless what is given says otherwise.
    """
    asked = {"weights": which, "data": data, "mirrored": mirrored, "precision": precision}
    context = join(mesh, {"path": str(path)} | asked)
    try:
        with together(context.device):
            weights = Weights.find(path, which)
            given = {"data": data, "data_root": data_root, "workers": workers}
            given = {name: value for name, value in given.items() if value is not None}
            # Training batches are not read: any size is valid that divides over the replicas.
            settings: dict[str, Any] = weights.data | given | {"batch_size": context.mesh["data"].size()}
            config = DataConfig(**settings)
        dtype = torch.float64 if precision == "float64" else torch.float32
        images = context.load_data(config, 0, dtype)
        if images.num_classes != weights.options["num_classes"]:
            raise UserError(
                f"{config.data} has {images.num_classes} classes, the network of {path} "
                f"{weights.options['num_classes']}"
            )
        strategy = context.strategy(precision)
        placed = context.build(strategy, weights.options, 0, images.image_shape)
        weights.load_into(placed.model, context.mesh)
        tested = evaluate(placed, images.test, mirrored=mirrored)
        return tested if context.first else None
    finally:
        context.close()

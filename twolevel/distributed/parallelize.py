"""Sharing a network by channel group over the `group` axis, with whole replicas along the `data` axis."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.batch_norm import synchronise_batch_norm
from twolevel.distributed.gather import remember_whole
from twolevel.distributed.mpi_axis import exchange_of
from twolevel.distributed.separable import check_within_groups
from twolevel.distributed.shard import check_unshared, cut_channels, whole_layout
from twolevel.errors import UserError
from twolevel.nn import Layout, TwoLevelConv2d
from twolevel.nn.arguments import check_groups
from twolevel.nn.layout import set_layout
from twolevel.nn.structure import ends


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    sync_batch_norm: bool = False,
    exchange: str = "auto",
    timeout_s: float = 600,
) -> nn.Module:
    """Keep of `model`, in place, the rows of this rank's groups; sets `model.layout`.

    Works on a materialised model and on one of the meta device, whose parts are then drawn by
    `twolevel.nn.initialize(model, seed, device)`: no rank ever builds the whole.

    In order: (1) convolutions, normalisations, stem and classifier are cut by channel group;
    (2) two-level and balanced convolutions get the exchange of this `group` axis; (3) with `sync_batch_norm`, batch
    statistics are taken over the `data` axis (over the group axis there is nothing to share: a channel
    lives on one rank). `replicate` then adds the gradients' all-reduce over `data`. `gather` is the way back.

    `exchange` is what carries (2): "group", the process group of the axis; "mpi", within `timeout_s` a collective;
    or "auto", MPI for ranks on CPUs that it started. Every rank of the mesh must call this.

    Raises UserError where the axis does not divide the groups, a module acts across groups, or as in `exchange_of`.
    """
    layout = whole_layout(model)
    ranks = mesh["group"].size()
    if ranks > 1:
        _check(model, layout, ranks)
    if mesh.size() > 1:
        remember_whole(model)
    if ranks > 1:
        layout = layout.part(mesh.get_local_rank("group"), ranks)
        cut_channels(model, layout, exchange_of(mesh, exchange, timeout_s))
    set_layout(model, layout)
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    return model


def _check(model: nn.Module, layout: Layout, ranks: int) -> None:
    check_unshared(model)
    check_within_groups(model, ranks)
    groups = layout.groups
    if groups % ranks:
        fits = ", ".join(str(p) for p in range(1, groups + 1) if groups % p == 0)
        raise UserError(f"group={ranks} ranks do not divide groups={groups}; use one of {fits} ranks")
    stem, classifier = ends(model)
    if stem is not None:
        check_groups(groups, stem_channels=stem.out_channels)
    if classifier is not None:
        check_groups(groups, classifier_features=classifier.in_features)
    for name, module in model.named_modules():
        if isinstance(module, TwoLevelConv2d) and module.schedule == "dense":
            raise UserError(f"schedule='dense' needs every channel on one rank: {name} has {ranks}; use auto")

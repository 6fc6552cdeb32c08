r"""Reduction of norms over ranks that hold shards, and all other communication between ranks.

.. math::
    \lVert g \rVert_p = \Bigl(\sum_r m_r \lVert g^{(r)} \rVert_p^p\Bigr)^{1/p}, \qquad
    \lVert g \rVert_\infty = \max_r \lVert g^{(r)} \rVert_\infty

where :math:`g^{(r)}` is the shard on rank r, and :math:`m_r` is 1 on one of the ranks that hold copies of a shard, 0 on the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Reduction:
    """The ranks that decide together about N parameters, and the shards that count.

    Args:
        groups: Process groups to reduce over, one after another; None is the group of all ranks. There is one group, except for a
            mesh of several dimensions that does not span all ranks.
        counts: Weights of this rank's shards: 1 if a shard counts, 0 if another rank's copy does; float64 of shape ``(N,)``, on the
            device from which the groups communicate.
        copied: Flags, True if several ranks hold copies of a parameter's shard.
        shapes: The shapes of the whole parameters.
        first_rows: The first row of each parameter in which this rank's shard has entries.
        first_entries: The position of a flat shard's first entry in the flattened parameter; None for shards that are not flat.
    """

    groups: tuple[dist.ProcessGroup | None, ...]
    counts: Tensor
    copied: tuple[bool, ...]
    shapes: tuple[tuple[int, ...], ...]
    first_rows: tuple[int, ...]
    first_entries: tuple[int | None, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, whole_world: bool = False) -> Reduction | None:
        """Make the reduction for parameters; None if there is nothing to reduce. Call it on every rank of their meshes.

        Args:
            tensors: The N parameters: DTensors on any meshes, and plain tensors, of which each rank holds a copy.
            whole_world: If True, all ranks decide, even without DTensors; else those of the largest mesh if it contains the others.
        """
        meshes = {tensor.device_mesh: None for tensor in tensors if isinstance(tensor, DTensor)}
        if not meshes and not (whole_world and is_distributed()):
            return None
        # `_cover` keeps to the ranks that hold parameters: others may never call, and a reduction over all would wait for them
        groups, first = ((None,), 0) if whole_world else _cover(list(meshes))
        ranks = math.prod(dist.get_world_size(group) for group in groups)
        # rank 0 may hold no part of a mesh that is smaller than the group: then the ranks find out which of them does
        holders = _holders(list(meshes)) if groups == (None,) and any(mesh.size() < ranks for mesh in meshes) else {}
        is_first = [_is_first_of_copies(tensor, first, holders) for tensor in tensors]
        counts = torch.tensor(is_first, dtype=torch.float64, device=_device(list(meshes), tensors))
        copied = tuple(_parts(tensor) < ranks for tensor in tensors)
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        return cls(groups, counts, copied, shapes, tuple(map(_first_row, tensors)), (None,) * len(tensors))

    @classmethod
    def of_flat(cls, tensors: Sequence[Tensor], model: nn.Module) -> Reduction:
        """Make the reduction for parameters that FullyShardedDataParallel (FSDP1) keeps as plain shards of flat parameters.

        Args:
            tensors: The N parameters.
            model: The wrapped module, or one that holds wrapped modules.
        """
        first_copies: dict[int, bool] = {}
        hybrid: set[int] = set()
        shapes: dict[int, tuple[int, ...]] = {}
        starts: dict[int, int] = {}
        for module in FullyShardedDataParallel.fsdp_modules(model):
            if (handle := module._handle) is not None and handle.uses_sharded_strategy:
                # `_params` is None with use_orig_params=False: the optimizer holds the flat parameter, and the zips below are empty
                originals = handle.flat_param._params or ()
                shards = [id(tensor) for tensor in (handle.flat_param, *originals)]
                shapes |= {id(tensor): tuple(shape) for tensor, shape in zip(originals, handle.flat_param._shapes, strict=False)}
                infos = handle.flat_param._shard_param_infos
                # the index is None for a parameter of which this rank has no entries
                starts |= {id(tensor): info.intra_param_start_idx or 0 for tensor, info in zip(originals, infos, strict=False)}
                # HSDP copies each shard along the group between nodes, whose rank 0 has the one that counts
                is_first = not _is_hybrid(module) or dist.get_rank(module._inter_node_pg) == 0
                first_copies |= dict.fromkeys(shards, is_first)
                hybrid |= set(shards if _is_hybrid(module) else ())
        # parameters that are in no flat one are whole on every rank: the copy on rank 0 counts
        counts = [first_copies.get(id(tensor), dist.get_rank() == 0) for tensor in tensors]
        copied = tuple(id(tensor) not in first_copies or id(tensor) in hybrid for tensor in tensors)
        undivided = tuple(shapes.get(id(tensor), tuple(tensor.shape)) for tensor in tensors)
        first_entries = tuple(starts.get(id(tensor)) for tensor in tensors)
        device = _device([], tensors)
        return cls(
            (None,), torch.tensor(counts, dtype=torch.float64, device=device), copied, undivided, (0,) * len(tensors), first_entries
        )

    def of_units(self, owners: Tensor) -> Reduction:
        """Return the reduction for the units of the parameters.

        Args:
            owners: The position of each unit's parameter, int64 of shape ``(U,)``.
        """
        return replace(self, counts=self.counts[owners.to(self.counts.device)])

    def norms(self, local: Tensor, norm_type: float) -> Tensor:
        """Reduce norms of shards to norms of whole tensors, by one collective.

        A non-finite norm of a shard that does not count still reaches the result, since 0 * inf and 0 * NaN are NaN: a copy that is
        bad on one rank is bad on all.

        Args:
            local: Norms of this rank's shards, 0 where it has none, shape ``(N,)``; or k sets of them, one after another,
                ``(k * N,)``.
            norm_type: The order p.

        Returns:
            Norms that are equal on every rank, with the dtype and device of ``local``; inf or 0 where p-th powers leave the range
            of float64.
        """
        # float64, because p-th powers of float32 norms may be beyond float32
        parts = local.to(self.counts.device, torch.float64)
        if math.isinf(norm_type):
            # unweighted, since copies do not change a maximum
            return self._largest(parts).to(local)
        return self._summed(self._powers(parts, norm_type)).pow(1.0 / norm_type).to(local)

    def norms_and_mean(self, local: Tensor, norm_type: float, value: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce norms as :meth:`norms` does, and average a number over the ranks, by the same collective.

        Args:
            local: Norms of this rank's shards, as for :meth:`norms`.
            norm_type: The order p.
            value: This rank's number, of any sign, shape ``(1,)``. If that of any rank is not finite, the mean is not finite.

        Returns:
            The norms, and the mean of shape ``(1,)``; both with the dtype and device of ``local``.
        """
        parts, own = local.to(self.counts.device, torch.float64), value.to(self.counts.device, torch.float64)
        sizes = [dist.get_world_size(group) for group in self.groups]
        if math.isinf(norm_type):
            # a maximum adds nothing up: each rank has a place of its own for its number
            places = torch.full((math.prod(sizes),), -math.inf, dtype=torch.float64, device=self.counts.device)
            place = 0
            for group, size in zip(self.groups, sizes, strict=True):
                place = place * size + dist.get_rank(group)
            places[place] = own[0]
            norms, numbers = self._largest(torch.cat([parts, places])).split([len(parts), len(places)])  # type: ignore[no-untyped-call]
            return norms.to(local), numbers.mean().reshape(1).to(local)
        together = torch.cat([self._powers(parts, norm_type), own / math.prod(sizes)])
        sums, mean = self._summed(together).split([len(parts), 1])  # type: ignore[no-untyped-call]
        return sums.pow(1.0 / norm_type).to(local), mean.to(local)

    def norms_in_float64(self, local: Tensor, norm_type: float) -> Tensor:
        """Reduce norms in float64, scaled by the largest, by two collectives; non-finite only where a shard is."""
        parts = local.to(self.counts.device, torch.float64)
        peaks = self._largest(parts)
        if math.isinf(norm_type):
            return peaks.to(local.device)
        # a peak of 0 or inf is no scale: 0 / 0 and inf / inf are NaN
        scales = torch.where(torch.isfinite(peaks) & (peaks > 0), peaks, 1.0)
        sums = self._summed((parts / scales).pow(norm_type) * self.counts)
        return (sums.pow(1.0 / norm_type) * scales).to(local.device)

    def of_each_rank(self, local: Tensor) -> Tensor:
        """Gather tensors of one shape from all ranks, by one collective.

        Returns:
            The tensors, float64 of shape ``(ranks, …)`` on the host, in an order that is the same on every rank.
        """
        parts = local.to(self.counts.device, torch.float64)[None]
        # along one dimension of the mesh after the other: the second time each rank sends what it has gathered
        for group in self.groups:
            found = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
            dist.all_gather(found, parts, group)
            parts = torch.cat(found)
        return parts.cpu()

    def _powers(self, parts: Tensor, norm_type: float) -> Tensor:
        """Return p-th powers of norms, of one set or several, with 0 in place of copies that do not count."""
        sets = len(parts) // max(1, len(self.counts))
        counts = self.counts if sets <= 1 else self.counts.repeat(sets)
        return parts.pow(norm_type) * counts

    def _summed(self, values: Tensor) -> Tensor:
        # along one dimension of the mesh after the other, in place: callers pass a tensor of their own
        for group in self.groups:
            dist.all_reduce(values, dist.ReduceOp.SUM, group)
        return values

    def _largest(self, values: Tensor) -> Tensor:
        values = values.nan_to_num(nan=math.inf, posinf=math.inf)  # backends do not agree on the largest of a NaN and a number
        for group in self.groups:
            dist.all_reduce(values, dist.ReduceOp.MAX, group)
        return values


def is_distributed() -> bool:
    """Return whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(mine: T) -> list[T]:
    """Gather one picklable object from each rank, in the order of ranks. This is a collective, for bad steps only."""
    if not is_distributed():
        return [mine]
    everybody: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set on any rank, by one collective.

    Args:
        flag: The flag of this rank.
        device: The device from which ranks communicate.
    """
    together = torch.tensor(flag, dtype=torch.float32, device=device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return bool(together)


def mean_over_ranks(value: Tensor, device: torch.device) -> Tensor:
    """Average a number over all ranks, by one collective.

    Args:
        value: The number of this rank, shape ``(1,)``, float32 or float64.
        device: The device from which ranks communicate.
    """
    mean = value.to(device, torch.float64) / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.to(value)


def averaged(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Average tensors over all ranks, by one collective for each dtype.

    A missing tensor counts as 0. The result is None where no rank has one.

    Args:
        tensors: The tensors of this rank; None where it has none.
        like: Tensors of the same shapes, dtypes and devices, none of them missing.
    """
    means: list[Tensor | None] = [None] * len(like)
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, tensor in enumerate(like):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(place)
    for (dtype, device), places in kinds.items():
        parts = [tensors[place] for place in places]
        sizes = [like[place].numel() for place in places]
        flat = torch.zeros(sum(sizes) + len(places), dtype=dtype, device=device)
        # flags of presence travel with the entries, and take no collective of their own
        *slices, is_present = flat.split([*sizes, len(places)])  # type: ignore[no-untyped-call]
        for each, part in zip(slices, parts, strict=True):
            if part is not None:
                each.copy_(part.reshape(-1))
        is_present.copy_(torch.tensor([part is not None for part in parts], dtype=torch.bool, device="cpu"))
        flat /= dist.get_world_size()  # divided before the sum, so that half precision does not overflow
        dist.all_reduce(flat)
        for place, each, count in zip(places, slices, is_present.tolist(), strict=True):
            if count:  # laid out in memory as its parameter, on which fused kernels rely
                mean = each.view(like[place].shape)
                means[place] = mean if like[place].is_contiguous() else torch.empty_like(like[place]).copy_(mean)
    return means


def reduces_in_backward(model: nn.Module) -> bool:
    """Return whether every backward pass reduces sharded gradients over ranks, and none leaves that to a later one."""
    # a module without parameters of its own has no group
    groups = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
    # HSDP reduces over shards first, and then over copies
    return all(group.reduce_grads and (group.all_reduce_grads or not group._is_hsdp) for group in groups if group is not None)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each rank holds a shard."""
    return isinstance(tensor, DTensor)


def shard_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, a view. A plain tensor is its own shard."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard = tensor._local_tensor  # what to_local() returns, at a tenth of its cost
    # a collective whose result nobody has waited for yet
    if isinstance(shard, AsyncCollectiveTensor):
        return shard.wait()
    return shard.detach() if shard.requires_grad else shard


def shard_of_gradient(parameter: Tensor) -> Tensor | None:
    """Return this rank's shard of a parameter's gradient, a view.

    A gradient that is placed otherwise than its parameter is redistributed first. This also carries out a pending sum over the
    ranks of a tensor-parallel layer.
    """
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        # assigned to the parameter, so that a later write reaches the gradient
        gradient = parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return None if gradient is None else shard_of(gradient)


def _cover(meshes: Sequence[DeviceMesh]) -> tuple[tuple[dist.ProcessGroup | None, ...], int]:
    """The groups and the first rank of the largest mesh, if it holds the others; else those of all ranks."""
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in meshes]
    largest, mesh = max(zip(ranks, meshes, strict=True), key=lambda pair: len(pair[0]))
    # Where no mesh holds the others, no existing group fits but that of all ranks, and all would have to join in making one.
    if len(largest) == dist.get_world_size() or not all(some <= largest for some in ranks):
        return (None,), 0
    if mesh.get_coordinate() is None:
        return (), min(largest)  # this rank holds nothing of it, and takes no part
    return tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim)), min(largest)


def _holders(meshes: Sequence[DeviceMesh]) -> dict[DeviceMesh, int]:
    """For each mesh, the first rank that has a mesh at its position. This is a collective, when a table is made.

    On other ranks another mesh may stand at the same position: one of other ranks, with copies of the same shards.
    """
    everybody = gathered([mesh.get_coordinate() is not None for mesh in meshes])
    return {mesh: next((rank for rank, held in enumerate(everybody) if held[place]), 0) for place, mesh in enumerate(meshes)}


def _is_first_of_copies(tensor: Tensor, first: int, holders: Mapping[DeviceMesh, int]) -> bool:
    """Return whether this rank is the first of those that hold copies of the same shard."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == first
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None or not bool((mesh.mesh == holders.get(mesh, first)).any()):
        return False
    # along a replicated dimension the rank at 0 counts; along a sharded one each rank has entries of its own
    return all(not place or not placement.is_replicate() for place, placement in zip(coordinate, tensor.placements, strict=True))


def _first_row(tensor: Tensor) -> int:
    """The first row of this rank's shard; 0 for a tensor that is not divided, and on a rank outside its mesh."""
    if not isinstance(tensor, DTensor) or not tensor.ndim or tensor.device_mesh.get_coordinate() is None:
        return 0
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]


def _parts(tensor: Tensor) -> int:
    """The number of ranks that hold different parts of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    return math.prod(mesh.size(dimension) for dimension, place in enumerate(tensor.placements) if not place.is_replicate())


def _is_hybrid(module: FullyShardedDataParallel) -> bool:
    return module.sharding_strategy in {ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2}


def _device(meshes: Sequence[DeviceMesh], tensors: Sequence[Tensor]) -> torch.device:
    """The device from which the groups communicate, which may be another than that of parameters offloaded to the CPU."""
    kinds = [mesh.device_type for mesh in meshes] or [tensor.device.type for tensor in tensors] or ["cpu"]
    # NCCL takes no CPU tensors, such as those of gradients that are offloaded
    kind = kinds[0]
    if kind == "cpu" and dist.get_backend() == dist.Backend.NCCL:
        kind = "cuda"
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, torch.get_device_module(kind).current_device())

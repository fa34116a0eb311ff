"""The routing of a rollout, cut for the ranks that train on it, so that each fetches only what its routers replay.

A cut is what one rank needs of one microbatch: its tokens, in the order in which they reach its routers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins import Packing, PluginError, Rank, Schedule

if TYPE_CHECKING:
    import numpy
    import torch

    from miles_plugins.r3_replay.trace import Routing


def _name(context: int, tensor: int, layer: int | None) -> str:
    layers = "all layers" if layer is None else f"MoE layer {layer}"
    return f"routing for context rank {context}, tensor rank {tensor}, {layers}"


def names(rank: Rank, packing: Packing, layers: Sequence[int], by_layer: bool) -> list[str]:
    """What a rank fetches; `layers` are the positions, among the MoE layers, of its own."""
    tensor = rank.tensor if packing.sequence_parallel else 0
    return [_name(rank.context, tensor, layer) for layer in (layers if by_layer else [None])]


def cut(
    traces: Sequence[torch.Tensor | None], schedule: Schedule, packing: Packing, routing: Routing, by_layer: bool
) -> list[dict[str, list[numpy.ndarray[Any, Any]]]]:
    """For each data-parallel rank its cuts by name: a list of one array a microbatch.

    Args:
        traces: for each sample [tokens - 1, MoE layers, topk]; None for a sample that is masked out.
        by_layer: cuts of one layer each, [tokens, topk], for pipeline stages; else [tokens, MoE layers, topk].
    """
    everything = []
    for microbatches in schedule.microbatches:
        cuts: dict[str, list[numpy.ndarray[Any, Any]]] = {}
        for samples in microbatches:
            lengths = [schedule.lengths[index] for index in samples]
            stream = _stream([traces[index] for index in samples], lengths, routing)
            for context, tensor in packing.token_ranks:
                positions = packing.local(packing.positions(lengths, context), tensor)
                mine = _with_padding(stream[positions], positions, routing).numpy()
                if not by_layer:
                    cuts.setdefault(_name(context, tensor, None), []).append(mine)
                for layer in range(len(routing.layers)) if by_layer else ():
                    cuts.setdefault(_name(context, tensor, layer), []).append(mine[:, layer].copy())
        everything.append(cuts)
    return everything


def _stream(traces: Sequence[torch.Tensor | None], lengths: Sequence[int], routing: Routing) -> torch.Tensor:
    """[tokens of the microbatch, MoE layers, topk]; what no rollout recorded gets experts of its own."""
    import torch

    parts, unrecorded = [spread(torch.arange(0), routing)], 0  # a rank may have no samples at all
    for trace, length in zip(traces, lengths, strict=True):
        rest = length - (0 if trace is None else len(trace))
        numbers = torch.arange(unrecorded, unrecorded + rest)  # counted on: else all last tokens had the same experts
        parts += [*([] if trace is None else [trace]), spread(numbers, routing)]
        unrecorded += rest
    return torch.cat(parts)


def spread(numbers: torch.Tensor, routing: Routing) -> torch.Tensor:
    """[numbers, MoE layers, topk]: experts for tokens without a record, all different within a row.

    Evenly over the experts: zeros would name one expert `topk` times, and one expert for all would be a hot spot.
    """
    import torch

    ids = (numbers[:, None] * routing.topk + torch.arange(routing.topk)) % routing.experts
    return routing.narrow(ids[:, None].expand(-1, len(routing.layers), -1))


def _with_padding(rows: torch.Tensor, positions: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`rows` with experts of its own for each token of padding (position -1), contiguous."""
    import torch

    padding = (positions < 0).nonzero()[:, 0]
    if len(padding):
        rows[padding] = spread(torch.arange(len(padding)), routing)
    return rows.contiguous()


class Shard:
    """The cuts of one rank, by microbatch.

    Args:
        microbatches: the samples of each of the rank's microbatches, in the order in which they were scheduled.
        parts: what was fetched for `names`, in the same order.
    """

    def __init__(
        self,
        microbatches: Sequence[Sequence[int]],
        parts: Sequence[Sequence[numpy.ndarray[Any, Any]]],
        by_layer: bool,
    ) -> None:
        self._cuts = {tuple(samples): [part[number] for part in parts] for number, samples in enumerate(microbatches)}
        self._by_layer = by_layer
        self._taken: set[tuple[int, ...]] = set()

    def begin(self) -> None:
        """A pass begins."""
        self._taken.clear()

    def let_go(self) -> None:
        """The pass was the last of its microbatches: their cuts, which are Ray's memory, are given back."""
        for samples in self._taken:
            self._cuts.pop(samples, None)

    def take(self, samples: Sequence[int], positions: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """[layers, tokens, topk] ids of one microbatch on the device of `positions`, in one copy from pinned memory.

        Args:
            positions: [tokens] where this rank's tokens come from, see `Microbatch`.
            rows: which of the fetched layers, for a model chunk that holds some of the rank's; by default all.

        Raises:
            PluginError: no microbatch was cut for just these samples, or it was trained on before.
        """
        parts = self._parts(tuple(samples), positions)
        self._taken.add(tuple(samples))
        if self._by_layer and rows is not None:
            parts = [parts[row] for row in rows]
        return _on_device(parts, self._by_layer, positions.device)

    def _parts(self, samples: tuple[int, ...], positions: torch.Tensor) -> Sequence[numpy.ndarray[Any, Any]]:
        if samples in self._cuts:
            return self._cuts[samples]
        raise PluginError(
            "a microbatch is none of those that the routing was cut for, or was trained on before",
            {"its samples": list(samples), "cut for": "; ".join(str(list(key)) for key in list(self._cuts)[:8])},
            "whatever changes slime's microbatches after the rollout must leave them as they were scheduled",
        )


class UnscheduledShard(Shard):
    """All tokens of a rank's samples: its trainers choose their microbatches, and each takes its own tokens of them.

    Args:
        samples: the rank's samples -> their number of tokens, in their order.
    """

    def __init__(
        self,
        samples: Mapping[int, int],
        parts: Sequence[Sequence[numpy.ndarray[Any, Any]]],
        by_layer: bool,
        routing: Routing,
    ) -> None:
        super().__init__([list(samples)], parts, by_layer)
        self._begins = dict(zip(samples, itertools.accumulate(samples.values(), initial=0), strict=False))
        self._lengths = dict(samples)
        self._whole = tuple(samples)
        self._routing = routing

    def let_go(self) -> None:
        for samples in self._taken:
            for sample in samples:
                self._lengths.pop(sample, None)
        if not self._lengths:
            self._cuts.clear()

    def _parts(self, samples: tuple[int, ...], positions: torch.Tensor) -> Sequence[numpy.ndarray[Any, Any]]:
        import torch

        if unknown := [sample for sample in samples if sample not in self._lengths]:
            return super()._parts(tuple(unknown), positions)
        where = [torch.arange(self._begins[sample], self._begins[sample] + self._lengths[sample]) for sample in samples]
        positions = positions.cpu()
        tokens = torch.cat(where)[positions]  # the last one, for padding (-1)
        padding = (positions < 0).nonzero()[:, 0].numpy()
        made = spread(torch.arange(len(padding)), self._routing).numpy()
        parts = []
        for part in self._cuts[self._whole]:
            mine = part[tokens.numpy()]
            mine[padding] = made[:, 0] if self._by_layer else made
            parts.append(mine)
        return parts


def _on_device(parts: Sequence[numpy.ndarray[Any, Any]], by_layer: bool, device: torch.device) -> torch.Tensor:
    import torch

    if not parts:  # a pipeline stage without MoE layers
        return torch.empty((0, 0, 0), dtype=torch.uint8, device=device)
    dtype = torch.uint8 if parts[0].itemsize == 1 else torch.int16
    shape = (len(parts), *parts[0].shape) if by_layer else parts[0].shape
    staged = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    for target, part in zip(staged.numpy() if by_layer else [staged.numpy()], parts, strict=True):
        target[...] = part
    moved = staged.to(device, non_blocking=True)
    return moved if by_layer else moved.transpose(0, 1)


def which_count(
    lengths: Sequence[int], rows: Sequence[int], positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks over `positions`, [tokens] bool on their device.

    The tokens that have a choice: neither padding nor the last of a sample, which was never forwarded. And those of
    them with a record: the first `rows` of each sample.
    """
    import torch

    counts = torch.ones(sum(lengths), dtype=torch.bool)
    counts[torch.tensor(lengths).cumsum(0) - 1] = False
    known = torch.cat([torch.arange(length) < count for length, count in zip(lengths, rows, strict=True)])
    both = torch.stack([counts, counts & known]).to(positions.device, non_blocking=True)[:, positions]
    tokens, recorded = both & (positions >= 0)
    return tokens, recorded

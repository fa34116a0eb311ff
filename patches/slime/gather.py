"""slime's parameters before their ranks are gathered (hooks: encode_for_gathering, decode_gathered).

Over nccl slime walks through the model's parameters and gathers each; colocated it first lists what there is on all
ranks, and then gathers the listed ones from a copy of the weights. In both, what is gathered is what a plugin makes of
a parameter: bytes with the same rows, so that slime's collectives can cut and join them as they do parameters. They end
in `convert_to_hf`, which hands them back to the plugin (patches/slime/weights.py).

Checkpoints on disk are gathered as with `--colocate`, whole ones of `--update-weight-transport disk` and those of
`--save-hf`: their parameters travel encoded too. Only disk deltas are made of parameters gathered as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute

if TYPE_CHECKING:
    import torch

    from miles_plugins.gathering import Encoding

CHUNK = 1 << 28
"""Bytes of parameters that are encoded together: a few hundred launches less, for as much memory for a moment."""
_KEPT = ("tensor_model_parallel", "partition_dim", "partition_stride", "parallel_mode")  # what slime asks parameters
_asked: ContextVar[str | None] = ContextVar("asked", default=None)  # "parameters" or "shapes" to be gathered
_args: Any = None  # of the run; slime's functions that gather are not given them


@contextmanager
def _asking(what: str) -> Iterator[None]:
    token = _asked.set(what)
    try:
        yield
    finally:
        _asked.reset(token)


# -- which ones ------------------------------------------------------------------------------------------------------


def _encoding(args: Any, name: str, parameter: Any, attributes: Mapping[str, Any]) -> Encoding | None:
    import torch

    plain = type(parameter) in (torch.Tensor, torch.nn.Parameter)
    if not plain or parameter.dim() != 2 or not parameter.is_floating_point():
        return None
    found: Encoding | None = current().hook.encode_for_gathering(
        args=args,
        name=without_wrappers(name),
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        dim=_divided(name, attributes),
    )
    return found


def without_wrappers(name: str) -> str:
    """Megatron's name of a parameter: "decoder.layers.3.mlp.experts.linear_fc1.weight12"."""
    return re.sub(r"^(module\.)+", "", name)


def _divided(name: str, attributes: Mapping[str, Any]) -> int | None:
    """Along which dimension tensor-parallel ranks have parts of a parameter, as slime joins them."""
    from megatron.core import mpu

    if not attributes.get("tensor_model_parallel") or attributes.get("parallel_mode") == "duplicated":
        return None
    experts = ".experts." in name
    size = mpu.get_expert_tensor_parallel_world_size() if experts else mpu.get_tensor_model_parallel_world_size()
    if size == 1:
        return None
    return 1 if "linear_fc2.weight" in name else attributes["partition_dim"]  # grouped experts say 0 of fc2


def _attributes(parameter: Any) -> dict[str, Any]:
    return {name: getattr(parameter, name) for name in _KEPT if hasattr(parameter, name)}


# -- over nccl -------------------------------------------------------------------------------------------------------


def update_weights(original: Callable[..., Any], self: Any) -> Any:
    with _asking("parameters"):
        return original(self)


def named_params_and_buffers(
    original: Callable[..., Any], args: Any, model: Sequence[Any], *rest: Any, **kwargs: Any
) -> Iterable[tuple[str, Any]]:
    named: Iterable[tuple[str, Any]] = original(args, model, *rest, **kwargs)
    what = _asked.get()
    if what is None:
        return named
    return _shapes(args, named) if what == "shapes" else _encoded(args, named)


def _encoded(args: Any, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    kept: dict[bool, _Batch] = {}
    waiting: list[tuple[str, Any]] = []
    size = 0
    for name, parameter in named:
        waiting.append((name, parameter))
        size += parameter.numel() * parameter.element_size()
        if size >= CHUNK:
            yield from _on_demand(args, waiting, kept)
            waiting, size = [], 0
    yield from _on_demand(args, waiting, kept)


def _on_demand(args: Any, named: Sequence[tuple[str, Any]], kept: dict[bool, _Batch]) -> list[tuple[str, Any]]:
    """In place of each that is to be encoded, an `_Awaiting`."""
    batches = {half: _Batch(kept, half) for half in (False, True)}
    found: list[tuple[str, Any]] = []
    for name, parameter in named:
        attributes = _attributes(parameter)
        encoding = _encoding(args, name, parameter, attributes)
        if encoding is None:
            found.append((name, parameter))
        else:
            batch = batches[".experts." in name]
            found.append((name, _Awaiting(batch, len(batch.members), attributes)))
            batch.members.append((parameter.data, encoding))
    return found


class _Batch:
    """Parameters that are encoded together, when the first of them is gathered.

    Not before: over nccl slime walks twice through all parameters, and by name leaves out experts or all others. Of
    each half the last batch is kept; slime of some releases holds what it was given until the walk has ended.
    """

    def __init__(self, kept: dict[bool, _Batch], half: bool) -> None:
        self.members: list[tuple[torch.Tensor, Encoding | None]] = []
        self._kept, self._half = kept, half
        self._done: list[Any] | None = None

    def encoded(self, place: int) -> Any:
        if self._done is None:
            if self._half in self._kept:
                self._kept[self._half]._done = None
            self._kept[self._half] = self
            self._done = _in_one_go(self.members)
        return self._done[place]


class _Awaiting:
    """What slime is given in place of a parameter: the same attributes, and `data`, which is encoded when asked for."""

    def __init__(self, batch: _Batch, place: int, attributes: Mapping[str, Any]) -> None:
        vars(self).update(attributes)
        self._batch, self._place = batch, place

    @property
    def data(self) -> Any:
        return self._batch.encoded(self._place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)


def _in_one_go(pairs: Sequence[tuple[torch.Tensor, Encoding | None]]) -> list[Any]:
    """Each tensor encoded; those of one encoding together."""
    done: list[Any] = [tensor for tensor, _ in pairs]
    for encoding in dict.fromkeys(encoding for _, encoding in pairs if encoding is not None):
        places = [place for place, (_, other) in enumerate(pairs) if other is encoding]
        for place, found in zip(places, encoding.encode([pairs[place][0] for place in places]), strict=True):
            done[place] = found
    return done


# -- colocated -------------------------------------------------------------------------------------------------------


def local_param_infos(original: Callable[..., Any], args: Any, model: Sequence[Any]) -> Any:
    global _args
    _args = args
    with _asking("shapes"):
        return original(args, model)


def _shapes(args: Any, named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """In place of a parameter that will be encoded, a tensor without memory: the parameter's may be offloaded now."""
    import torch

    for name, parameter in named:
        encoding = _encoding(args, name, parameter, _attributes(parameter))
        if encoding is None:
            yield name, parameter
        else:
            shape = torch.empty(encoding.shape(tuple(parameter.shape)), dtype=torch.uint8, device="meta")
            vars(shape).update(_attributes(parameter))
            yield name, shape


def full_params(original: Callable[..., Any], infos: Sequence[Any], weights: Mapping[str, Any]) -> Any:
    import torch.distributed as dist

    rank = dist.get_rank()
    return original(infos, _with_encoded(weights, [info for info in infos if info.src_rank == rank]))


def expert_weight_batch(
    original: Callable[..., Any], self: Any, transfers: Sequence[Any], weights: Mapping[str, Any], *rest: Any
) -> Any:
    own = (transfer for transfer in transfers if transfer.source_rank == self.rank)
    infos = [each.info for transfer in own for each in transfer.params]
    return original(self, transfers, _with_encoded(weights, infos), *rest)


def _with_encoded(weights: Mapping[str, Any], infos: Iterable[Any]) -> Mapping[str, Any]:
    """The weights, of which those that were listed as bytes are encoded."""
    import torch

    listed = {info.name: info for info in infos if info.dtype == torch.uint8}
    if not listed:
        return weights
    device = torch.cuda.current_device()
    tensors = {name: weights[name].to(device=device, non_blocking=True) for name in listed}
    encodings = [_encoding(_args, name, tensors[name], listed[name].attrs) for name in listed]
    done = _in_one_go(list(zip(tensors.values(), encodings, strict=True)))
    return _Replaced(weights, dict(zip(listed, done, strict=True)))


class _Replaced(Mapping[str, Any]):
    """A mapping in which some values are others."""

    def __init__(self, plain: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        self._plain, self._others = plain, others

    def __getitem__(self, name: str) -> Any:
        return self._others[name] if name in self._others else self._plain[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


_UPDATE = "slime.backends.megatron_utils.update_weight"
_LISTING = f"{_UPDATE}.hf_weight_iterator_direct"
_REASON = "slime gathers parameters in bfloat16 and quantizes what every rank has gathered"


def _patch(name: str, target: str, wrap: Callable[..., Any], signature: str, before: tuple[str, ...] = ()) -> Patch:
    return Patch(
        id=f"slime.gather.{name}",
        target=target,
        wrap=wrap,
        signature=signature,
        before=before,
        roles=frozenset({"trainer"}),
        reason=_REASON,
        upstream="https://github.com/THUDM/slime/tree/v0.3.1/slime/backends/megatron_utils/update_weight",
        retire_when="slime has a hook on a parameter before it is gathered",
    )


_EVERYWHERE = (
    _patch(
        "parameters",
        f"{_UPDATE}.common:named_params_and_buffers",
        named_params_and_buffers,
        "(args, model, convert_to_global_name=True, translate_gpu_to_cpu=False)",
        before=("slime.cpu.parameter-names",),
    ),
    _patch(
        "nccl",
        f"{_UPDATE}.update_weight_from_distributed:UpdateWeightFromDistributed.update_weights",
        update_weights,
        "(self)",
    ),
    _patch("list", f"{_LISTING}:_get_megatron_local_param_infos", local_param_infos, "(args, model)"),
    _patch(
        "colocated",
        f"{_LISTING}:_get_megatron_full_params",
        full_params,
        "(megatron_local_param_infos, megatron_local_weights)",
    ),
)
_ROUTED = f"{_UPDATE}.update_weight_from_tensor:UpdateWeightFromTensor._prepare_expert_weight_batch"

SEAMS = (
    Seam(
        name="gathering of weights",
        hooks=("encode_for_gathering", "decode_gathered"),
        patches=(
            *_EVERYWHERE,
            _patch(
                "experts",
                _ROUTED,
                expert_weight_batch,
                "(self, transfers, megatron_local_weights, staging_buffers)",
            ),
        ),
        variants=(
            Variant(
                "slime up to v0.3.0",  # sends all experts to all ranks
                _EVERYWHERE,
                has=(has_attribute(f"{_UPDATE}.common"),),
                lacks=(has_attribute(f"{_UPDATE}.expert_routing"),),
            ),
        ),
    ),
)

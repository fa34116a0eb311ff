"""Large training data that only some ranks need (hooks: share_train_data, receive_train_data).

slime gives every rank of a data-parallel group the whole of what the group trains on. What a plugin shares goes into
Ray's object store by itself; the group's box carries the references, and a rank fetches what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from miles_plugins.activation import current
from miles_plugins.errors import PluginError
from miles_plugins.packing import Rank, Schedule
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_attribute, has_parameter

_scheduled: ContextVar[Schedule | None] = ContextVar("scheduled", default=None)


class SharedBox:
    """slime's Box for one data-parallel rank, with a reference to {name: reference} of what plugins share."""

    def __init__(self, inner: Any, shared: Any) -> None:
        self.inner = inner
        self.shared = shared


# -- rollout manager -------------------------------------------------------------------------------------------------


def build_dp_schedule(
    original: Callable[..., Any], args: Any, train_parallel_config: Any, total_lengths: Sequence[int], **kwargs: Any
) -> Any:
    result = original(args, train_parallel_config, total_lengths, **kwargs)
    partitions, microbatches = result[:2]
    _scheduled.set(
        Schedule(
            list(total_lengths),
            [
                [[partition[local] for local in samples] for samples in of_rank]
                for partition, of_rank in zip(partitions, microbatches, strict=True)
            ],
        )
    )
    return result


def split_train_data(original: Callable[..., Any], args: Any) -> Any:
    """slime's boxes, one a data-parallel rank, each with what the plugins share with it."""
    import ray

    token = _scheduled.set(None)
    try:
        boxes = original()
        schedule = _scheduled.get()
    finally:
        _scheduled.reset(token)
    if schedule is None:
        schedule = _of_boxes(boxes)
    shared: list[dict[str, Any]] = [{} for _ in boxes]
    for of_plugin in current().hook.share_train_data(args=args, schedule=schedule):
        for everything, values in zip(shared, of_plugin, strict=True):
            everything |= {name: ray.put(value) for name, value in values.items()}
    return [SharedBox(box.inner, ray.put(values)) for box, values in zip(boxes, shared, strict=True)]


def _of_boxes(boxes: Sequence[Any]) -> Schedule:
    """Before v0.3.0 slime's trainers schedule their microbatches themselves; the boxes say whose the samples are."""
    import ray

    found = [ray.get(box.inner) for box in boxes]
    if any("micro_batch_indices" in data or "partition" not in data for data in found):
        raise PluginError(
            "slime split the training data without the schedule that plugins cut theirs by",
            {"expected": "a call of slime.utils.dp_schedule.build_dp_schedule", "fields": ", ".join(found[0])},
            "use a listed stack (docs/compatibility.md)",
        )
    return Schedule(list(found[0]["total_lengths"]), [[list(data["partition"])] for data in found], scheduled=False)


# -- trainer ---------------------------------------------------------------------------------------------------------


def process_rollout_data(
    original: Callable[..., Any], args: Any, rollout_data_ref: Sequence[Any], dp_rank: int, dp_size: int
) -> Any:
    rollout_data = original(args, rollout_data_ref, dp_rank, dp_size)
    fetch = _fetcher(getattr(rollout_data_ref[dp_rank], "shared", None))
    current().hook.receive_train_data(args=args, rollout_data=rollout_data, rank=_rank(dp_rank), fetch=fetch)
    return rollout_data


def _fetcher(reference: Any) -> Callable[[Sequence[str]], list[Any]]:
    def fetch(names: Sequence[str]) -> list[Any]:
        import ray

        shared: Mapping[str, Any] = {} if reference is None else ray.get(reference)
        if missing := [name for name in names if name not in shared]:
            raise PluginError(
                "data that a rank asks for was not shared with it",
                {"asked for": ", ".join(missing[:4]), "shared": ", ".join(list(shared)[:4]) or "nothing"},
                "the driver and the trainers must agree on their parallel sizes",
            )
        values: list[Any] = ray.get([shared[name] for name in names])
        return values

    return fetch


def _rank(data: int) -> Rank:
    from megatron.core import mpu

    return Rank(data, mpu.get_context_parallel_rank(), mpu.get_tensor_model_parallel_rank())


SLIME = "https://github.com/THUDM/slime/blob/v0.3.1/slime"


def _schedule(signature: str) -> Patch:
    return Patch(
        id="slime.shared-data.schedule",
        target="slime.utils.dp_schedule:build_dp_schedule",
        wrap=build_dp_schedule,
        signature=signature,
        roles=frozenset({"rollout_manager"}),
        reason="slime keeps the schedule of a rollout to itself",
        upstream=f"{SLIME}/utils/dp_schedule.py",
        retire_when="slime has a hook where it splits the training data",
    )


_RECEIVE = Patch(
    id="slime.shared-data.receive",
    target="slime.utils.data:process_rollout_data",
    wrap=process_rollout_data,
    signature="(args, rollout_data_ref, dp_rank, dp_size)",
    roles=frozenset({"trainer"}),
    reason="slime gives every rank of a data-parallel group the group's whole data",
    upstream=f"{SLIME}/utils/data.py",
    retire_when="slime lets a rank fetch its own part",
)
_BUILD = "slime.utils.dp_schedule:build_dp_schedule"
_BY_GROUP = "(args, train_parallel_config, total_lengths, *, global_batch_size, group_indices)"
SEAMS = (
    Seam(
        name="shared training data",
        hooks=("share_train_data", "receive_train_data"),
        patches=(
            _schedule("(args, train_parallel_config, total_lengths, *, global_batch_size, rollout_indices)"),
            _RECEIVE,
        ),
        variants=(
            Variant("slime v0.3.0", (_schedule(_BY_GROUP), _RECEIVE), has=(has_parameter(_BUILD, "group_indices"),)),
            Variant(
                "slime before v0.3.0",  # its trainers schedule
                (_RECEIVE,),
                has=(has_parameter("slime.ray.rollout:RolloutManager._split_train_data_by_dp", "dp_size"),),
                lacks=(has_attribute("slime.utils.dp_schedule"),),
            ),
        ),
    ),
)

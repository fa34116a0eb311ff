"""slime's training loop: the model, the data, the passes, the microbatches, the metrics of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.errors import UpstreamError
from miles_plugins.linears import offer
from miles_plugins.microbatch import announced_pass, begin_microbatch
from miles_plugins.packing import Packing
from miles_plugins.patches.seam import Seam, Variant
from miles_plugins.patching import Patch, has_parameter

if TYPE_CHECKING:
    import torch

SLIME = "https://github.com/THUDM/slime/blob/v0.3.1/slime/backends/megatron_utils"

_building: ContextVar[tuple[Any, str] | None] = ContextVar("building", default=None)
_pass_now: ContextVar[tuple[Any, list[Any]] | None] = ContextVar("pass", default=None)  # args, data iterators


# -- the model -------------------------------------------------------------------------------------------------------


def remember_role(original: Callable[..., Any], args: Any, role: str = "actor") -> Any:
    """Megatron's `get_model` does not say whose model it builds; slime's function around it does."""
    token = _building.set((args, role))
    try:
        return original(args, role)
    finally:
        _building.reset(token)


def get_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    model = original(*args, **kwargs)
    if building := _building.get():
        slime_args, role = building
        current().hook.model_built(args=slime_args, model=model, role=role)
        offer(current().plugins, slime_args, model, role)
    return model


# -- the data --------------------------------------------------------------------------------------------------------


def fill_routing_replay(
    original: Callable[..., Any], self: Any, data_iterator: Any, num_microbatches: Any, rollout_data: Any
) -> Any:
    if current().hook.take_routed_experts(args=self.args, rollout_data=rollout_data):
        return None
    return original(self, data_iterator, num_microbatches, rollout_data)


# -- the passes ------------------------------------------------------------------------------------------------------


@contextmanager
def _pass(args: Any, stage: str, model: Sequence[Any], iterators: Sequence[Any]) -> Iterator[None]:
    token = _pass_now.set((args, list(iterators)))
    try:
        with announced_pass(current().hook, args, stage, model):
            yield
    finally:
        _pass_now.reset(token)


def forward_only(
    original: Callable[..., Any],
    f: Callable[..., Any],
    args: Any,
    model: Sequence[Any],
    data_iterator: Sequence[Any],
    *rest: Any,
    store_prefix: str = "",
    **kwargs: Any,
) -> Any:
    stage = "values" if f.__name__ == "get_values" else f"{store_prefix}log_prob"
    with _pass(args, stage, model, data_iterator):
        return original(f, args, model, data_iterator, *rest, store_prefix=store_prefix, **kwargs)


def train_one_step(
    original: Callable[..., Any],
    args: Any,
    rollout_id: int,
    step_id: int,
    data_iterator: Sequence[Any],
    model: Sequence[Any],
    *rest: Any,
    **kwargs: Any,
) -> Any:
    with _pass(args, "train", model, data_iterator):
        loss_dict, grad_norm = original(args, rollout_id, step_id, data_iterator, model, *rest, **kwargs)
    for metrics in current().hook.step_metrics(args=args):
        loss_dict.update(metrics)  # slime logs what the last pipeline stage returns, as train/<name>
    return loss_dict, grad_norm


def get_batch(original: Callable[..., Any], data_iterator: Any, keys: Sequence[str], *rest: Any, **kwargs: Any) -> Any:
    now = _pass_now.get()
    if now is None:  # not in a pass: somebody looks at a batch
        return original(data_iterator, keys, *rest, **kwargs)
    args, iterators = now
    hook = current().hook
    wanted = [key for keys_of_one in hook.microbatch_keys(args=args) for key in keys_of_one]
    batch = original(data_iterator, [*keys, *(key for key in wanted if key not in keys)], *rest, **kwargs)
    stream = token_positions(args, batch)
    positions = Packing.of(args).local(stream, _tensor_rank())
    begin_microbatch(hook, args, batch, positions, _chunk(data_iterator, iterators), stream)
    return batch


def _chunk(data_iterator: Any, iterators: Sequence[Any]) -> int:
    """Which virtual pipeline stage runs: slime has one iterator for each, and Megatron's schedule hands them over."""
    for chunk, iterator in enumerate(iterators):
        if iterator is data_iterator:
            return chunk
    raise UpstreamError(
        "slime draws a microbatch from an iterator that is none of its pass",
        {"expected": f"one of {len(iterators)} iterators, one a virtual pipeline stage", "found": repr(data_iterator)},
        "use a listed stack (docs/compatibility.md)",
    )


def _tensor_rank() -> int:
    from megatron.core import mpu

    rank: int = mpu.get_tensor_model_parallel_rank()
    return rank


def token_positions(args: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Where the tokens of this rank's packed stream come from, proved to be slime's own layout.

    Returns:
        [padded length] int64 on the tokens' device: position in the samples' concatenation, -1 for padding.

    Raises:
        UpstreamError: slime lays out these samples in another way, or other tokens than theirs.
    """
    import torch
    from megatron.core import mpu

    samples = batch["unconcat_tokens"]
    stream = torch.cat(samples)
    lengths = [sample.numel() for sample in samples]
    packing = Packing.of(args)
    positions = packing.positions(lengths, mpu.get_context_parallel_rank()).to(stream.device)
    # slime pads with token 0. Samples that repeat themselves could hide a shift, so positions are cut as well.
    expected = torch.where(positions >= 0, stream[positions], 0)
    found = batch["tokens"].reshape(-1)
    if not torch.equal(expected, found) or not _cut_alike(packing, lengths, positions):
        raise UpstreamError(
            "this slime lays out a microbatch in a way that the plugins do not know",
            {
                "expected": f"{expected.numel()} tokens beginning {expected[:8].tolist()}",
                "found": f"{found.numel()} tokens beginning {found[:8].tolist()}",
                "layout": packing,
            },
            "use a listed stack (docs/compatibility.md)",
        )
    return positions


def _cut_alike(packing: Packing, lengths: Sequence[int], positions: torch.Tensor) -> bool:
    """Whether slime's own function cuts positions as it is thought to; it has one for samples cut by themselves."""
    if packing.all_gather or packing.context_parallel == 1:
        return True
    import torch
    from slime.backends.megatron_utils.cp_utils import slice_with_cp

    each = torch.arange(sum(lengths)).split(list(lengths))
    cut = torch.cat([slice_with_cp(sample, -1) for sample in each])
    return torch.equal(cut, positions[: len(cut)].cpu()) and bool((positions[len(cut) :] == -1).all())


_TRAINER = frozenset({"trainer"})
_MODEL, _DATA = "slime.backends.megatron_utils.model", "slime.backends.megatron_utils.data"


def _passes(forward_only_signature: str, train_signature: str, batch_signature: str) -> tuple[Patch, ...]:
    return (
        Patch(
            id="slime.pass.forward-only",
            target=f"{_MODEL}:forward_only",
            wrap=forward_only,
            signature=f"(f, args, model, data_iterator, num_microbatches, store_prefix=''{forward_only_signature})",
            roles=_TRAINER,
            reason="slime's before-log-prob hook has no end, and none at all on an exception",
            upstream=f"{SLIME}/model.py",
            retire_when="slime has paired hooks around a pass",
        ),
        Patch(
            id="slime.pass.train",
            target=f"{_MODEL}:train_one_step",
            wrap=train_one_step,
            signature="(args, rollout_id, step_id, data_iterator, model, optimizer, opt_param_scheduler, "
            f"num_microbatches{train_signature})",
            roles=_TRAINER,
            reason="slime's before-train-step hook has no end, and a step's metrics cannot be extended",
            upstream=f"{SLIME}/model.py",
            retire_when="slime has paired hooks around a step",
        ),
        Patch(
            id="slime.microbatch.begins",
            target=f"{_DATA}:get_batch",
            wrap=get_batch,
            signature=f"(data_iterator, keys, pad_multiplier=128{batch_signature})",
            roles=_TRAINER,
            reason="slime asks for a fixed list of fields and tells nobody which microbatch runs",
            upstream=f"{SLIME}/data.py",
            retire_when="slime passes extra fields through to the microbatch",
        ),
    )


_TOP_P = ", use_rollout_top_p_replay=False"
_SCHEDULED = ", step_global_batch_size, microbatch_pbar=None"
_FORMAT, _GATHER = ", qkv_format='thd'", ", allgather_cp=False"
_HAS_FORMAT = has_parameter(f"{_DATA}:get_batch", "qkv_format")
_HAS_GATHER = has_parameter(f"{_DATA}:get_batch", "allgather_cp")
_HAS_SCHEDULE = has_parameter(f"{_MODEL}:train_one_step", "step_global_batch_size")

SEAMS = (
    Seam(
        name="model",
        hooks=("model_built", "forward_weight", "forward_linear", "weigh_expert_outputs"),
        patches=(
            Patch(
                id="slime.model.role",
                target="slime.backends.megatron_utils.model:setup_model_and_optimizer",
                wrap=remember_role,
                signature="(args, role='actor')",
                roles=_TRAINER,
                reason="Megatron's get_model is not told the role of the model",
                upstream=f"{SLIME}/model.py",
                retire_when="slime has a hook after building the model",
            ),
            Patch(
                id="megatron.model.built",
                target="megatron.training.training:get_model",
                wrap=get_model,
                roles=_TRAINER,
                reason="slime has no hook between the model and its optimizer",
                upstream="https://github.com/NVIDIA/Megatron-LM (megatron/training/training.py)",
                retire_when="slime has a hook after building the model",
            ),
        ),
    ),
    Seam(
        name="routing data",
        hooks=("take_routed_experts",),
        patches=(
            Patch(
                id="slime.trainer.routed-experts",
                target="slime.backends.megatron_utils.actor:MegatronTrainRayActor.fill_routing_replay",
                wrap=fill_routing_replay,
                signature="(self, data_iterator, num_microbatches, rollout_data)",
                roles=_TRAINER,
                reason="slime's queues belong to routers that only its patched Megatron registers",
                upstream=f"{SLIME}/actor.py",
                retire_when="slime replays by microbatch on stock Megatron",
            ),
        ),
    ),
    Seam(
        name="passes",
        hooks=("pass_begins", "pass_ends", "microbatch_keys", "microbatch_begins", "step_metrics"),
        patches=_passes(_TOP_P, _SCHEDULED, _GATHER),
        variants=(
            Variant(
                "slime v0.3.0",
                _passes("", _SCHEDULED, _FORMAT + _GATHER),
                has=(_HAS_FORMAT, _HAS_GATHER, _HAS_SCHEDULE),
            ),
            Variant(
                "slime v0.2.3 and v0.2.4",
                _passes("", "", _FORMAT + _GATHER),
                has=(_HAS_FORMAT, _HAS_GATHER),
                lacks=(_HAS_SCHEDULE,),
            ),
            Variant("slime v0.2.2", _passes("", "", _FORMAT), has=(_HAS_FORMAT,), lacks=(_HAS_GATHER, _HAS_SCHEDULE)),
        ),
    ),
)

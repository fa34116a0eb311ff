"""SGLang's record of expert routing (hook: take_routed_experts, for who replays it must be able to trust it).

SGLang writes each router's choice into a buffer on the device and copies it, after each forward pass, into a host
buffer with a row for each slot of the KV cache, from which a finished request's rows are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles_plugins import attestation
from miles_plugins.activation import current
from miles_plugins.compat import sglang_routing
from miles_plugins.errors import PluginError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch, has_attribute

if TYPE_CHECKING:
    import torch

DRAFT = -1  # in place of the layer of a draft model's router, whose choice is nobody's record


@dataclass(frozen=True)
class RoutingRecord:
    """What the scheduler of an engine records of each token.

    Attributes:
        layers: global indices of the MoE layers.
        topk: experts a token and layer.
        experts: experts that a router chooses from; None if neither the model nor its config tells.
        dtype: of one expert id: `uint8` or `int16`; `int32` where no plugin encodes the record.
        bytes_per_token: of what leaves the scheduler, and of the host buffer.
        host_bytes: of the host buffer, in this process.
    """

    layers: tuple[int, ...]
    topk: int
    experts: int | None
    dtype: str
    bytes_per_token: int
    host_bytes: int


def capturer() -> RoutingRecord | None:
    """What this scheduler process records; None when it records nothing."""
    found = sglang_routing.capturer_of_this_process()
    if found is None:
        return None
    rows, host = found.device_cache, found.host_cache.buffer
    if not isinstance(rows, Rows):
        raise PluginError(
            "SGLang records routing, but not through this layer",
            {"expected": Rows.__name__, "found": type(rows).__name__},
            "the patches of the seam `routing record` came after the model was loaded; report this with the log",
        )
    return RoutingRecord(
        layers=rows.plan.layers,
        topk=host.shape[2],
        experts=rows.plan.experts,
        dtype=str(host.dtype).removeprefix("torch."),
        bytes_per_token=host.shape[1] * host.shape[2] * host.element_size(),
        host_bytes=host.numel() * host.element_size(),
    )


# -- the scheduler, while it loads the model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a loaded model can have recorded."""

    model: str
    layers: tuple[int, ...]
    experts: int | None


class Rows:
    """Where the routers of one forward pass leave what they chose, in place of SGLang's own device cache.

    In a CUDA graph `capture` is one copy into a fixed row of a fixed buffer.
    """

    def __init__(self, buffer: torch.Tensor, plan: Plan, row_of_layer: Mapping[int, int]) -> None:
        self.buffer = buffer  # [tokens of a pass, rows, topk and what SGLang appends to it]
        self.plan = plan
        self.row_of_layer = dict(row_of_layer)

    def capture(self, layer_id: int | None, topk_ids: torch.Tensor) -> None:
        """Keep what the router of a layer chose for the tokens of this pass."""
        row = self.row_of_layer.get(layer_id)  # type: ignore[arg-type]
        if row is None:
            if layer_id == DRAFT:
                return
            raise PluginError(
                f"the routing of {self.plan.model} cannot be recorded: a router is in no layer known to have one",
                {"its layer_id": str(layer_id), "MoE layers": list(self.plan.layers)},
                "SGLang would write a choice without layer_id into every layer; use an SGLang that passes it on",
            )
        tokens, chosen = topk_ids.shape
        if tokens > self.buffer.shape[0] or chosen != self.buffer.shape[2]:
            raise PluginError(
                "a forward pass does not fit into SGLang's record of routing",
                {
                    "tokens": f"{tokens}, room for {self.buffer.shape[0]}",
                    "experts a token": f"{chosen}, room for {self.buffer.shape[2]}",
                },
                "raise --sglang-chunked-prefill-size, by which SGLang measures it, or --sglang-max-running-requests; "
                "-1 is not measured",
            )
        self.buffer[:tokens, row].copy_(topk_ids)

    capture_fwd_routed_experts = capture  # its name in 0.5.9


_plan: Plan | None = None  # of the model whose capturer is being made
_switched_off = False


def switched_off() -> bool:
    """Whether this server was told not to record: in --sglang-config, for a frozen model beside the trained one."""
    return _switched_off


def plan_of_this_model() -> Plan | None:
    """The plan of the model whose capturer is being made; None where none is."""
    return _plan


def record_the_target(original: Callable[..., None], self: Any) -> None:
    """Make the capturer, of the target model only: a draft model runs in the same process and after it."""
    global _plan, _switched_off
    argument = sglang_routing.final_arguments(self.server_args)
    if not argument("enable_return_routed_experts"):
        _switched_off = True
        original(self)
        return
    if self.is_draft_worker:
        _opt_out(self.model)
        return
    with _reported():
        _plan = plan = _make_plan(self, argument)
        try:
            original(self)
        finally:
            _plan = None
        made = sglang_routing.capturer_of_this_process()
        if made is not None and not isinstance(made.device_cache, Rows):
            made.device_cache = Rows(made.device_cache.buffer, plan, {layer: layer for layer in plan.layers})


def _opt_out(draft: Any) -> None:
    for router in sglang_routing.routers(draft).values():
        if hasattr(router.topk_config, "allow_routed_experts_capture"):
            router.topk_config.allow_routed_experts_capture = False
        else:
            router.layer_id = DRAFT


def _make_plan(runner: Any, argument: Callable[[str], Any]) -> Plan:
    model = type(runner.model).__name__
    problems = sglang_routing.unrecordable(argument)
    if problems:
        raise PluginError(
            "SGLang cannot record routing under these arguments of its server",
            {f"--sglang-{name.replace('_', '-')}": reason for name, reason in problems.items()},
            "leave them out, also in --sglang-config",
        )
    routers = sglang_routing.routers(runner.model)
    layers = [router.layer_id for router in routers.values()]
    nameless = [name for name, router in routers.items() if router.layer_id is None]
    if not routers or nameless or len(set(layers)) < len(layers):
        raise PluginError(
            f"the routing of {model} cannot be recorded: SGLang cannot tell its layers apart",
            {
                "routers": f"{len(routers)}, in {len(set(layers) - {None})} layers",
                "without layer_id": f"{len(nameless)}, such as {nameless[0]}" if nameless else None,
            },
            "this model needs an SGLang in which each MoE layer has one TopK with its layer_id; for a frozen model in "
            "--sglang-config set enable_return_routed_experts: false in its overrides",
        )
    kernels = {name: sglang_routing.unrecorded_choice(router, runner.device) for name, router in routers.items()}
    inside = [f"{name}: {kernel}" for name, kernel in kernels.items() if kernel is not None]
    if inside:
        raise PluginError(
            f"the routing of {model} cannot be recorded: the MoE kernel chooses the experts and does not tell",
            {"layers": f"{len(inside)} of {len(routers)}", "such as": inside[0]},
            "set --sglang-moe-runner-backend to one that is given the chosen experts, such as triton",
        )
    config = runner.model_config.hf_text_config
    return Plan(model, tuple(sorted(layers)), sglang_routing.experts_a_layer(runner.model, config))


@contextmanager
def _reported() -> Iterator[None]:
    """An error of ours reaches the user, who otherwise reads that the server died."""
    try:
        yield
    except PluginError as error:
        attestation.write_child_report(current().run, error)
        raise


# -- the scheduler, while it runs ------------------------------------------------------------------------------------


def draft_unrecorded(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """A draft's forward pass copies nothing over the rows of the target's tokens, which have the same slots."""
    if not self.is_draft_worker:
        return original(self, *args, **kwargs)
    with sglang_routing.no_capturer():
        return original(self, *args, **kwargs)


def own_copy(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """The slice of one forward pass, kept apart from the buffer that the next one writes into."""
    part = original(self, *args, **kwargs)
    return part if sglang_routing.copies_before_reuse(self) else part.clone()


def keep_rows_with_their_request(original: Callable[..., Any], self: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
    """Requests that did not ask take a place in the list as well: it is read by the request's number."""
    silent = [req for req in reqs if not req.return_routed_experts]
    if len(silent) == len(reqs):
        return original(self, reqs, *args, **kwargs)
    gathered = [req.routed_experts for req in silent]
    for req in silent:
        req.return_routed_experts, req.routed_experts = True, None
    try:
        return original(self, reqs, *args, **kwargs)
    finally:
        for req, experts in zip(silent, gathered, strict=True):
            req.return_routed_experts, req.routed_experts = False, experts


RUNNER = "sglang.srt.model_executor.model_runner"
SOURCE = "https://github.com/sgl-project/sglang/blob"
SCHEDULER = frozenset({"sglang_scheduler"})

SEAMS = (
    Seam(
        name="routing record",
        hooks=("take_routed_experts", "encode_routed_experts"),
        patches=(
            Patch(
                id="sglang.routing.target-only",
                target=f"{RUNNER}:ModelRunner.init_routed_experts_capturer",
                wrap=record_the_target,
                signature="(self)",
                needs=(has_attribute("sglang.srt.layers.moe.topk:TopK"),),
                roles=SCHEDULER,
                reason="without a word SGLang records a router that has no layer_id in all layers, until 0.5.12 a "
                "draft model instead of the target, and under some arguments nothing or another token's routing",
                upstream=f"{SOURCE}/v0.5.15.post1/python/sglang/srt/model_executor/model_runner.py",
                retire_when="SGLang refuses what it cannot record",
            ),
            Patch(
                id="sglang.routing.draft-forward",
                target=f"{RUNNER}:ModelRunner.forward",
                wrap=draft_unrecorded,
                superseded_when=has_attribute(f"{sglang_routing.MOVED_TO}:disable_routed_experts_capture_for_draft"),
                roles=SCHEDULER,
                reason="until 0.5.12 a draft's forward pass writes into the record of the target's tokens",
                upstream=f"{SOURCE}/v0.5.12.post1/python/sglang/srt/model_executor/model_runner.py",
                retire_when="SGLang 0.5.12 is no longer supported",
            ),
            Patch(
                id="sglang.routing.own-copy",
                target=f"{RUNNER}:RoutedExpertsCapturer._get_local_slice",
                wrap=own_copy,
                superseded_when=has_attribute(f"{sglang_routing.MOVED_FROM}:RoutedExpertsCapturer"),
                roles=SCHEDULER,
                reason="under overlap scheduling a view is copied to the host while the next forward writes to it; "
                "0.5.9 waits for the copy, 0.5.23 clones",
                upstream=f"{SOURCE}/v0.5.15.post1/python/sglang/srt/state_capturer/base.py",
                retire_when="SGLang clones it itself (0.5.23 does)",
            ),
            Patch(
                id="sglang.routing.mixed-batch",
                target="sglang.srt.managers.scheduler:Scheduler.stream_output_generation",
                wrap=keep_rows_with_their_request,
                signature="(self, reqs, return_logprob, skip_req=None, is_idle_batch=False)",
                inherited=True,  # of a mixin that is Scheduler's only
                superseded_when=has_attribute(
                    "sglang.srt.managers.scheduler_components.output_streamer:_GenerationStreamAccumulator.routed_experts"
                ),
                roles=SCHEDULER,
                reason="until 0.5.12 the list has no place for requests that did not ask, and is read as if it had",
                upstream=f"{SOURCE}/v0.5.12.post1/python/sglang/srt/managers/scheduler_output_processor_mixin.py",
                retire_when="SGLang 0.5.12 is no longer supported",
            ),
        ),
    ),
)

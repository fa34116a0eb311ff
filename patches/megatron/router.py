"""Let plugins choose the experts of one MoE router (hook: select_experts).

Megatron-LM since db6b895c69 hands `router.router_replay` the whole top-k decision; its own RouterReplay holds one
target a layer, which does not fit several microbatches in flight. An object of ours with the same method asks the
plugins. Older Megatrons (0.14, 0.15, slime's pin before v0.3.0) are taught to ask that object at the same place with
the same arguments, so that everything else is the same for all.

slime's and miles' images have a Megatron with their own replay in it, around the same decision. It stays off and passes
the decision on; should it be on, the run ends: two would decide.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any

from miles_plugins.activation import current
from miles_plugins.errors import PatchError
from miles_plugins.patches.seam import Seam
from miles_plugins.patching import Patch, has_parameter

if TYPE_CHECKING:
    import torch

    TopK = tuple[torch.Tensor, torch.Tensor]
    """Probabilities and indices, [tokens, topk] each."""

ROUTER = "megatron.core.transformer.moe.router"
UTILS = "megatron.core.transformer.moe.moe_utils"

# What a patched Megatron imports for its own replay -> whose it is.
IMAGES = {
    "slime.utils.routing_replay": "slime's image",
    "miles.utils.routing_replay": "miles' image",
    "miles.utils.replay_base": "miles' image",
}


class ExpertSelector:
    """Stands where Megatron expects a RouterReplay."""

    def __init__(self, router: Any) -> None:
        self._router = router

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., TopK],
    ) -> TopK:
        def choose() -> TopK:
            return default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)

        chosen = current().hook.select_experts(router=self._router, scores=scores, topk=topk, choose=choose)
        return choose() if chosen is None else chosen


def attach_selector(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if getattr(self, "router_replay", None) is not None:
        raise _two_decide("Megatron's own --moe-enable-routing-replay", "leave that flag out")
    if getattr(self, "routing_replay", None) is not None:  # where both images keep a router's queue while theirs is on
        raise _two_decide("the replay of this Megatron's image", "leave --use-routing-replay out")
    self.router_replay = ExpertSelector(self)


def _two_decide(other: str, advice: str) -> PatchError:
    return PatchError("two features want to decide the routing of a router", {"other": other}, advice)


# -- Megatrons that do not ask ---------------------------------------------------------------------------------------
#
# TopKRouter.routing calls topk_routing_with_score_function, whose closure compute_topk calls one of two leaves,
# group_limited_topk or torch.topk. The first knows the router; the closure cannot be reached; the leaves decide. But
# group_limited_topk masks the scores and then calls torch.topk itself: that is no place to ask, since experts outside
# of the groups have lost their scores there. Nor is any other torch.topk: dropping tokens and the auxiliary loss call
# it too.

_of_router: ContextVar[Any] = ContextVar("of_router", default=None)  # `router_replay` of the router that routes
_to_ask: ContextVar[Any] = ContextVar("to_ask", default=None)  # the object that the next leaf shall ask


def remember_router(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    with _set(_of_router, getattr(self, "router_replay", None)):
        return original(self, *args, **kwargs)


def ask_for_topk(original: Callable[..., Any], *args: Any, router_replay: Any = None, **kwargs: Any) -> Any:
    """Newer Megatrons are given `router_replay`; here it is that of the router which routes."""
    asked = _of_router.get() if router_replay is None else router_replay
    if asked is None:
        return original(*args, **kwargs)
    with _set(_of_router, None), _set(_to_ask, asked):
        return original(*args, **kwargs)


def ask_for_limited_topk(
    original: Callable[..., TopK],
    scores: torch.Tensor,
    topk: int,
    num_tokens: int,
    num_experts: int,
    num_groups: int,
    group_topk: int,
) -> TopK:
    def naturally(scores: torch.Tensor, topk: int, num_groups: int, group_topk: int) -> TopK:
        return original(scores, topk, num_tokens, num_experts, num_groups, group_topk)

    return _ask(scores, topk, num_groups, group_topk, naturally)


def _ask(
    scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, naturally: Callable[..., TopK]
) -> TopK:
    asked = _to_ask.get()
    with _set(_to_ask, None):  # whatever top-k follows from the answer is not a decision of the router
        if asked is None:
            return naturally(scores, topk, num_groups=num_groups, group_topk=group_topk)
        answer: TopK = asked.get_replay_topk(scores, topk, num_groups, group_topk, naturally)
        return answer


class AskingTorch(ModuleType):
    """torch as Megatron's moe_utils sees it, where the closure calls `torch.topk`."""

    def __init__(self, torch: ModuleType) -> None:
        super().__init__(torch.__name__, torch.__doc__)
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def topk(self, input: torch.Tensor, k: int, *rest: Any, **named: Any) -> TopK:
        def naturally(scores: torch.Tensor, topk: int, num_groups: None, group_topk: None) -> TopK:
            found: TopK = self._torch.topk(scores, topk, *rest, **named)
            return found

        return _ask(input, k, None, None, naturally)


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


# -- that it works ---------------------------------------------------------------------------------------------------


def probe_selector() -> str | None:
    """Megatron's routing follows the object that it asks, and its routers ask theirs.

    Returns:
        Whose replay is in this Megatron already.
    """
    import torch

    note = _other_replay()
    logits = torch.tensor([[6.5, 1.0, 2.0, 0.0, 7.0, 6.0, 4.0, 3.0]])
    # What it would never choose, unlikely and outside of the group, comes out; and what it would is known.
    for groups, natural in (({}, [0, 4]), ({"num_groups": 4, "group_topk": 1}, [4, 5])):
        for pre_softmax in (False, True):
            decided = _Decided([3, 1])
            probs, routing_map = _routing_function()(
                logits, 2, use_pre_softmax=pre_softmax, **groups, router_replay=decided
            )
            expected = logits.softmax(dim=1)[0, [3, 1]] if pre_softmax else logits[0, [3, 1]].softmax(dim=0)
            if (
                decided.natural != natural
                or routing_map[0].nonzero().flatten().tolist() != [1, 3]
                or not torch.allclose(probs[0, [3, 1]], expected)
            ):
                raise PatchError(
                    "Megatron's routing does not follow the object it is given",
                    {
                        "expected": f"experts 3, 1 with probabilities {expected.tolist()}, instead of {natural}",
                        "found": f"probabilities {probs[0].tolist()}, instead of {decided.natural}",
                        "routing": f"{'softmax first' if pre_softmax else 'softmax last'} {groups or ''}",
                    },
                    "this Megatron routes on another path; see docs/compatibility.md",
                )
    _require_that_routers_ask()
    return note


class _Decided:
    """Decides as it was told, with the current scores; and keeps what would have been chosen."""

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts
        self.natural: list[int] | None = None

    def get_replay_topk(
        self, scores: Any, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Callable[..., Any]
    ) -> Any:
        import torch

        _, natural = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        self.natural = sorted(natural[0].tolist())
        indices = torch.tensor([self.experts])
        return scores.gather(1, indices), indices


class _Asked(Exception):
    """A router asked."""


class _Raising:
    def get_replay_topk(self, *args: Any) -> Any:
        raise _Asked


class _Nothing:
    """A configuration that asks for nothing."""

    num_moe_experts = 4

    def __getattr__(self, name: str) -> None:
        return None


def _routing_function() -> Callable[..., Any]:
    from megatron.core.transformer.moe import router

    function: Callable[..., Any] = router.topk_routing_with_score_function
    return function


def _require_that_routers_ask() -> None:
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    class Bare(TopKRouter):  # type: ignore[misc]
        """Made without Megatron's constructors: they import, and Megatron may be half imported still."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.config, self.topk, self.score_function = _Nothing(), 2, "softmax"
            self.router_replay = _Raising()

        def __getattr__(self, name: str) -> Any:
            return None

    try:
        Bare().routing(torch.zeros(1, 1, _Nothing.num_moe_experts))
    except _Asked:
        return
    raise PatchError(
        "Megatron's routers do not ask the object that they hold",
        {"router": f"{ROUTER}:TopKRouter.routing", "expected": "a call of router.router_replay.get_replay_topk"},
        "this Megatron routes on another path; see docs/compatibility.md",
    )


def _other_replay() -> str | None:
    """Whose replay is written into this Megatron already; None if it has none. Raises PatchError if that is on."""
    from megatron.core.transformer.moe.router import TopKRouter

    codes = [inspect.unwrap(function).__code__ for function in (_routing_function(), TopKRouter.__init__)]
    found = [module for module in IMAGES if any(module in code.co_names for code in codes)]
    if not found:
        return None
    where = f"{IMAGES[found[0]]} ({found[0]})"
    if os.environ.get("ENABLE_ROUTING_REPLAY") == "1":
        raise _two_decide(
            f"the replay of {where}: ENABLE_ROUTING_REPLAY=1 is in the environment",
            "unset it, and leave --use-routing-replay out",
        )
    return f"Megatron has the replay of {where} already; it is off, and passes the decision on"


# -- patches ---------------------------------------------------------------------------------------------------------

_TRAINER = frozenset({"trainer"})


def _taught(name: str, target: str, reason: str, **how: Any) -> Patch:
    return Patch(
        id=f"megatron.router.{name}",
        target=target,
        superseded_when=has_parameter(f"{UTILS}:topk_routing_with_score_function", "router_replay"),
        roles=_TRAINER,
        reason=reason,
        upstream="https://github.com/NVIDIA/Megatron-LM/commit/db6b895c69",
        retire_when="no supported Megatron is older than 0.16",
        **how,
    )


SEAMS = (
    Seam(
        name="expert selection",
        hooks=("select_experts",),
        patches=(
            Patch(
                id="megatron.router.select-experts",
                target=f"{ROUTER}:TopKRouter.__init__",
                wrap=attach_selector,
                roles=_TRAINER,
                reason="stock Megatron replays one target a layer, not one a microbatch",
                upstream="https://github.com/NVIDIA/Megatron-LM (megatron/core/transformer/moe/router_replay.py)",
                retire_when="RouterReplay takes a target a microbatch",
                probe=probe_selector,
            ),
            _taught(
                "remember-router",
                f"{ROUTER}:TopKRouter.routing",
                "before 0.16 Megatron's routing function does not know its router",
                wrap=remember_router,
                signature="(self, logits)",
            ),
            _taught(
                "ask",
                f"{ROUTER}:topk_routing_with_score_function",
                "before 0.16 Megatron asks nobody for the top-k",
                wrap=ask_for_topk,
                signature="(logits, topk, use_pre_softmax=False, num_groups=None, group_topk=None, "
                "scaling_factor=None, score_function='softmax', expert_bias=None, fused=False)",
            ),
            _taught(
                "ask-in-groups",
                f"{UTILS}:group_limited_topk",
                "before 0.16 Megatron asks nobody for the top-k; in groups it hides the scores of the others first",
                wrap=ask_for_limited_topk,
                signature="(scores, topk, num_tokens, num_experts, num_groups, group_topk)",
            ),
            _taught(
                "ask-without-groups",
                f"{UTILS}:torch",
                "before 0.16 Megatron asks nobody for the top-k; without groups its closure calls torch's",
                replace_with=AskingTorch,
            ),
        ),
    ),
)

"""One `/generate` request in SGLang's shape, checked: what is not understood is refused, not ignored."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from miles_plugins.errors import ArgumentError

GREEDY_BELOW = 1e-6  # temperature; SGLang's own limit


@dataclass(slots=True)
class GenerateRequest:
    """The part of SGLang's GenerateReqInput that is understood: one prompt, or a batch as a list of them."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_routed_experts: bool | None = False
    rid: str | list[str] | None = None
    stream: bool | None = False


@dataclass(frozen=True)
class Sampling:
    """The checked sampling parameters of one prompt; the defaults are SGLang's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 128
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    spaces_between_special_tokens: bool = True
    sampling_seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def refusal(problem: str, found: object = None, expected: object = None, next: str | None = None) -> ArgumentError:
    facts = {"found": None if found is None else str(found)[:200], "expected": expected}
    return ArgumentError(f"embedded engine: {problem}", facts, next)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _is_number(v) and 0 <= v < math.inf, "0 (greedy) or more"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "above 0, at most 1"),
    "top_k": (lambda v: is_int(v) and (v == -1 or 1 <= v < 1 << 31), "-1 (off), or 1 or more"),
    "max_new_tokens": (lambda v: is_int(v) and v >= 0, "an integer, 0 or more"),
    "stop": (lambda v: v == [], "nothing: stop strings are not supported here, only stop_token_ids"),
    "stop_token_ids": (lambda v: isinstance(v, list) and all(is_int(i) and 0 <= i < 1 << 31 for i in v), "token ids"),
    "ignore_eos": _FLAG,
    "skip_special_tokens": _FLAG,
    "no_stop_trim": _FLAG,
    "spaces_between_special_tokens": _FLAG,
    "sampling_seed": (lambda v: is_int(v) and 0 <= v < 1 << 63, "an integer, 0 or more"),
    "n": (lambda v: v == 1, "1: for more answers to a prompt, send it more than once in a batch"),
    "custom_params": (lambda v: v == {}, "nothing: top-p token replay needs slime's patched SGLang"),
}


def checked_sampling(params: Any) -> Sampling:
    """Check one prompt's `sampling_params`; None means the default, as in SGLang."""
    if not isinstance(params, Mapping):
        raise refusal("sampling_params is not of the right kind", params, "an object, or a list with one a prompt")
    refuse_unknown("sampling parameter", params, set(_PARAMETERS))
    given = {name: value for name, value in params.items() if value is not None or name == "max_new_tokens"}
    for name, value in given.items():
        fits, expected = _PARAMETERS[name]
        if not fits(value):
            raise refusal(f"the sampling parameter {name} cannot have this value", repr(value), expected)
    return Sampling(**{name: value for name, value in given.items() if name not in ("n", "stop", "custom_params")})


def refuse_unknown(kind: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := [str(name) for name in given if name not in known]:
        raise refusal(f"unknown {kind}: {listed(unknown)}", expected=", ".join(sorted(known)), next="leave it out")


def refuse_unsupported(request: GenerateRequest) -> None:
    allowed: dict[str, tuple[Any, ...]] = {
        "return_logprob": (None, False, True),
        "return_routed_experts": (None, False, True),
        "logprob_start_len": (None, -1),
        "top_logprobs_num": (None, 0),
        "stream": (None, False),
    }
    for name, values in allowed.items():
        if repr(getattr(request, name)) not in map(repr, values):  # by repr: 1 is not True
            raise refusal(
                f"{name} cannot have this value", repr(getattr(request, name)), " or ".join(map(repr, values))
            )


def one_each(params: Any, prompts: int) -> Sequence[Any]:
    each = params if isinstance(params, list) else [params] * prompts
    if len(each) != prompts:
        raise refusal("a list of sampling_params has another length than the batch", len(each), prompts)
    return each


def request_ids(rid: Any, prompts: int, single: bool) -> list[str]:
    if rid is None or isinstance(rid, str):
        name = uuid.uuid4().hex if rid is None else rid
        return [name] if single else [f"{name}_{number}" for number in range(prompts)]
    if not isinstance(rid, list) or len(rid) != prompts or len(set(map(str, rid))) != prompts:
        raise refusal("rid is not of the right kind", rid, "a string, or a list of different ones, one a prompt")
    return [str(name) for name in rid]


def listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

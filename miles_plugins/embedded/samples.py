"""Prompts, samples and rewards: from a file of prompts to the training data of one rollout."""

from __future__ import annotations

import asyncio
import base64
import enum
import importlib
import inspect
import json
import math
import random
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import ArgumentError
from miles_plugins.spec_rl.accept import slimes

if TYPE_CHECKING:
    import torch

    from miles_plugins.embedded.engine import Answer


class Status(enum.Enum):
    """How a sample ended, by slime's names."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"


@dataclass
class SpecInfo:
    """What speculative decoding did for a sample: slime's `Sample.SpecInfo`."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        return self.spec_accept_token_num / self.spec_draft_token_num if self.spec_draft_token_num else 0.0

    @property
    def spec_accept_length(self) -> float:
        return self.completion_token_num / self.spec_verify_ct if self.spec_verify_ct else 0.0

    def add(self, counts: Mapping[str, Any]) -> None:
        """Count one response, by the names that slime reads."""
        self.spec_accept_token_num += counts.get("spec_accept_token_num", 0)
        self.spec_draft_token_num += counts.get("spec_draft_token_num", 0)
        self.spec_verify_ct += counts.get("spec_verify_ct", 0)
        self.completion_token_num += counts.get("completion_tokens", 0)


@dataclass
class Sample:
    """One answer to one prompt, with the fields of slime's `Sample` that this host fills.

    Attributes:
        tokens: prompt and response.
        rollout_log_probs: one a response token, of the engine.
        rollout_routed_experts: [tokens - 1, layers, topk] int32, of the engine; or what a plugin made of it.
        recorded: the same as the engine recorded it; the host measures by it whatever a plugin does.
    """

    group_index: int
    index: int
    prompt: str
    label: str | None
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    reward: float = 0.0
    loss_mask: list[int] | None = None
    status: Status = Status.COMPLETED
    rollout_log_probs: list[float] = field(default_factory=list)
    rollout_routed_experts: Any = None
    recorded: torch.Tensor | None = None
    remove_sample: bool = False
    weight_versions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    spec_info: SpecInfo = field(default_factory=SpecInfo)


class Prompts:
    """The prompts of `--prompt-data`: which ones belong to a rollout depends on its number and the seed alone."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._rows = _read(Path(args.prompt_data), args.input_key, args.label_key)

    def of(self, rollout: int) -> list[Sample]:
        """The samples of one rollout, without answers: `n_samples_per_prompt` in a row for each prompt."""
        batch, each = self._args.rollout_batch_size, self._args.n_samples_per_prompt
        samples = []
        for group in range(rollout * batch, (rollout + 1) * batch):
            epoch, position = divmod(group, len(self._rows))
            prompt, label = self._rows[self._order(epoch)[position]]
            samples += [Sample(group, group * each + copy, prompt, label) for copy in range(each)]
        return samples

    def check_lengths(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Raises ArgumentError for the first prompt that, with a whole response, is longer than the model allows."""
        args = self._args
        for row, (prompt, _) in enumerate(self._rows, 1):
            length = len(encode(prompt))
            if length + args.rollout_max_response_len > args.max_position_embeddings:
                raise ArgumentError(
                    f"prompt {row} and its response are longer than the model allows",
                    {
                        "prompt": f"{length} tokens: {prompt[:40]!r}",
                        "response": f"up to {args.rollout_max_response_len} (--rollout-max-response-len)",
                        "model": f"{args.max_position_embeddings} (max_position_embeddings of its config.json)",
                        "in": args.prompt_data,
                    },
                    "shorten the prompt, or lower --rollout-max-response-len",
                )

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._rows)))
        if self._args.rollout_shuffle:
            random.Random(f"{self._args.rollout_seed} {epoch}").shuffle(order)
        return order


def _read(file: Path, input_key: str, label_key: str | None) -> list[tuple[str, str | None]]:
    where = {"in": file}
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("the prompts cannot be read", {**where, "error": error}, "check --prompt-data") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((row[input_key], row[label_key] if label_key else None))
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"line {number} of the prompts is not one",
                {**where, "found": line[:80], "expected": _expected(input_key, label_key), "error": repr(error)},
                "correct the line, or --input-key and --label-key",
            ) from error
        if not isinstance(rows[-1][0], str) or not rows[-1][0]:
            raise ArgumentError(f"the prompt in line {number} is no text", {**where, "found": rows[-1][0]})
    if not rows:
        raise ArgumentError("there are no prompts", where, "give a file with one JSON object a line")
    return rows


def _expected(input_key: str, label_key: str | None) -> str:
    label = f', "{label_key}": "…"' if label_key else ""
    return f'{{"{input_key}": "…"{label}}} as JSON'


def fill(args: Namespace, sample: Sample, prompt: Sequence[int], answer: Answer, hook: Any) -> None:
    """Take one answer of `/generate` over into the sample (hook: receive_response)."""
    import torch

    info = answer["meta_info"]
    sample.tokens = [*prompt, *(token for _, token, _ in info["output_token_logprobs"])]
    sample.rollout_log_probs = [log_prob for log_prob, _, _ in info["output_token_logprobs"]]
    sample.response, sample.response_length = answer["text"], len(sample.rollout_log_probs)
    sample.status = Status.TRUNCATED if info["finish_reason"]["type"] == "length" else Status.COMPLETED
    sample.recorded = answer.routing
    hook.receive_response(args=args, sample=sample, meta_info=info)
    if args.sglang_speculative_algorithm:
        counts = hook.speculation_counts(meta_info=info)
        sample.spec_info.add(slimes(info) if counts is None else {**info, **counts})
    sample.weight_versions = [info["weight_version"]]
    if "routed_experts" in info:
        ids = torch.frombuffer(bytearray(base64.b64decode(info["routed_experts"])), dtype=torch.int32)
        sample.rollout_routed_experts = ids.reshape(-1, args.num_layers, args.moe_router_topk)


def load_reward(path: str) -> Callable[..., Any]:
    """The function of `--custom-rm-path MODULE.FUNCTION`: `async def reward(args, sample, **kwargs) -> float`."""
    module, _, name = path.rpartition(".")
    try:
        reward: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            f"--custom-rm-path {path} cannot be imported",
            {"error": error},
            "give it as module.function, of a module in this folder or on PYTHONPATH",
        ) from error
    if not inspect.iscoroutinefunction(reward):
        raise ArgumentError(
            f"--custom-rm-path {path} is no async function",
            {"found": type(reward).__name__, "expected": "async def reward(args, sample, **kwargs) -> float"},
            "slime awaits it, and so does this host",
        )
    return reward


def give_rewards(args: Namespace, samples: Sequence[Sample], reward: Callable[..., Any]) -> None:
    """Ask the reward function for every sample, all at once as slime does."""

    async def ask_for(sample: Sample) -> Any:
        try:
            return await reward(args, sample)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ArgumentError(
                f"the reward function {args.custom_rm_path} failed",
                {
                    "error": f"{type(error).__name__}: {error}",
                    "at": f"{where.filename}:{where.lineno}: {where.line}",
                    "sample": f"{sample.index}, response {sample.response[:60]!r}",
                },
            ) from error

    async def ask() -> list[Any]:
        return await asyncio.gather(*map(ask_for, samples))

    for sample, value in zip(samples, asyncio.run(ask()), strict=True):
        try:
            sample.reward = float(value)
        except (TypeError, ValueError):
            sample.reward = math.nan
        if not math.isfinite(sample.reward):
            raise ArgumentError(
                "the reward function gave something that is no finite number",
                {"function": args.custom_rm_path, "found": repr(value), "sample": sample.index},
            )


def group_advantages(args: Namespace, rewards: Sequence[float]) -> list[float]:
    """Each reward less its group's mean, over the group's standard deviation (GRPO).

    Shao et al., "DeepSeekMath", arXiv:2402.03300, section 4.1.2. A group of equal rewards gets zeros.
    """
    import torch

    groups = torch.tensor(rewards, dtype=torch.float32).reshape(-1, args.n_samples_per_prompt)
    centred = groups - groups.mean(dim=1, keepdim=True)
    if args.grpo_std_normalization:
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-6)
    advantages: list[float] = centred.flatten().tolist()
    return advantages


def to_train_data(args: Namespace, samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples of one rollout as slime's training data: a field to one value a sample."""
    raw = [sample.reward for sample in samples]
    train_data: dict[str, Any] = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "rewards": group_advantages(args, raw),
        "raw_reward": raw,
        "truncated": [int(sample.status is Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "loss_masks": [_loss_mask(sample) for sample in samples],
        "rollout_log_probs": [sample.rollout_log_probs for sample in samples],
    }
    if args.use_rollout_routing_replay:
        train_data["rollout_routed_experts"] = [sample.rollout_routed_experts for sample in samples]
    return train_data


def _loss_mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return sample.loss_mask or [1] * sample.response_length

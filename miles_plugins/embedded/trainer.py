"""GRPO on one policy in one process: passes over packed microbatches, the clipped loss, the optimizer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from miles_plugins.embedded.loss import grpo_loss
from miles_plugins.embedded.routing_meter import RoutingMeter
from miles_plugins.errors import PluginError
from miles_plugins.microbatch import announced_pass, begin_microbatch
from miles_plugins.packing import Packing, Rank, Schedule

if TYPE_CHECKING:
    import torch

PAD_TOKEN = 0
TRAINED_ON = (
    *("tokens", "total_lengths", "response_lengths", "loss_masks", "advantages"),
    *("rollout_log_probs", "log_probs", "ref_log_probs"),
)


class Trainer:
    """The policy with its optimizer: bfloat16 weights for computing, float32 ones for updating."""

    def __init__(self, args: Namespace, hook: Any, policy: torch.nn.Module) -> None:
        import torch

        self._args, self._hook, self.policy = args, hook, policy
        self.model = [policy]
        self._parameters = list(policy.parameters())
        self._device = self._parameters[0].device
        self.main_weights = [parameter.detach().float().clone() for parameter in self._parameters]
        pairs = zip(self._parameters, self.main_weights, strict=True)
        self._trained = [pair for pair in pairs if pair[0].requires_grad]  # with the parameter that each weight is of
        self.optimizer = torch.optim.AdamW(
            _groups([weight for _, weight in self._trained], args.weight_decay),
            lr=args.lr,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_eps,
        )
        self._reference = [weight.clone() for weight in self.main_weights] if args.use_kl_loss else None
        self.meter = RoutingMeter(policy, args)

    # -- what a rollout brings ----------------------------------------------------------------------------------------

    def receive(self, train_data: Mapping[str, Any]) -> dict[str, Any]:
        """The training data (see `samples.to_train_data`) as tensors on the policy's device."""
        import torch

        data = dict(train_data)
        data["tokens"] = [torch.tensor(tokens, device=self._device) for tokens in data["tokens"]]
        data["total_lengths"] = [len(tokens) for tokens in data["tokens"]]
        for name, dtype in (("loss_masks", torch.int), ("rollout_log_probs", torch.float32)):
            data[name] = [torch.tensor(values, dtype=dtype, device=self._device) for values in data[name]]
        data["micro_batch_indices"] = [samples for step in self._steps(data) for samples in step]
        self._share(data)
        if self._args.use_rollout_routing_replay:
            taken = self._hook.take_routed_experts(args=self._args, rollout_data=data)
            if not taken:
                raise PluginError("no plugin took the routing that --use-rollout-routing-replay asks to replay")
        return data

    def _steps(self, data: Mapping[str, Any]) -> list[list[range]]:
        """For each optimizer step, `global_batch_size` samples each, the samples of its microbatches."""
        total, size = len(data["tokens"]), self._args.micro_batch_size
        each = self._args.global_batch_size
        steps = [range(begin, begin + each) for begin in range(0, total, each)]
        return [[step[begin : begin + size] for begin in range(0, each, size)] for step in steps]

    def _share(self, data: dict[str, Any]) -> None:
        """What slime does through Ray: large data goes from rollout to trainer beside the training data."""
        schedule = Schedule(data["total_lengths"], [data["micro_batch_indices"]])
        shared: dict[str, Any] = {}
        for of_plugin in self._hook.share_train_data(args=self._args, schedule=schedule):
            shared |= of_plugin[0]
        self._hook.receive_train_data(
            args=self._args, rollout_data=data, rank=Rank(), fetch=lambda names: [shared[name] for name in names]
        )

    # -- passes -------------------------------------------------------------------------------------------------------

    def prepare(self, data: dict[str, Any]) -> None:
        """Fill `ref_log_probs` under --use-kl-loss, `log_probs` and `advantages`: [response length] for each sample.

        With one optimizer step a rollout the step's own forward pass gives `log_probs`, as in slime.
        """
        import torch

        if self._reference is not None:
            with self._weights(self._reference):
                data["ref_log_probs"] = self._log_probs(data, "ref_log_prob")
        if len(data["tokens"]) > self._args.global_batch_size:
            data["log_probs"] = self._log_probs(data, "log_prob")
        data["advantages"] = [
            torch.full_like(log_probs, reward)
            for log_probs, reward in zip(data["rollout_log_probs"], data["rewards"], strict=True)
        ]

    def _log_probs(self, data: Mapping[str, Any], stage: str) -> list[torch.Tensor]:
        import torch

        found: list[torch.Tensor] = []
        with torch.no_grad(), announced_pass(self._hook, self._args, stage, self.model):
            for batch in self._microbatches(data, data["micro_batch_indices"]):
                log_probs, _ = self._forward(batch)
                found += log_probs.split(batch["response_lengths"])
        return found

    def train(self, data: Mapping[str, Any]) -> Iterator[dict[str, float]]:
        """Optimizer steps, `global_batch_size` samples each: the metrics of every one, when it is done."""
        for step in self._steps(data):
            yield self._step(data, step)

    def _step(self, data: Mapping[str, Any], microbatches: Sequence[Sequence[int]]) -> dict[str, float]:
        import torch

        for _, weight in self._trained:
            weight.grad = torch.zeros_like(weight)
        self._scale_draft_loss(1 / len(microbatches))
        sums: dict[str, float] = {}
        differences: list[torch.Tensor] = []
        with announced_pass(self._hook, self._args, "train", self.model), self.meter:
            for batch in self._microbatches(data, microbatches):
                log_probs, entropy = self._forward(batch)
                found = log_probs.detach().split(batch["response_lengths"])
                self._hook.training_log_probs(args=self._args, batch=batch, log_probs=found)
                batch.setdefault("log_probs", found)
                loss, metrics = grpo_loss(self._args, log_probs, entropy, batch)
                loss.backward()
                pairs = zip(batch["log_probs"], batch["rollout_log_probs"], strict=True)
                differences += [(trainers - engines).abs() for trainers, engines in pairs]
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                for parameter, weight in self._trained:
                    if parameter.grad is not None:  # an expert that no token chose has none
                        weight.grad += parameter.grad
                        parameter.grad = None
            norm, *others = self._clip()
            if not all(each.isfinite() for each in (norm, *others)):
                raise PluginError(
                    "the gradient is not finite; the weights were left as they are",
                    {
                        "gradient norm": float(norm),
                        "of parameters clipped apart": ", ".join(f"{float(each):g}" for each in others),
                        **{name: f"{value:g}" for name, value in sums.items()},
                    },
                    "lower --lr or --clip-grad, and go on from the last checkpoint",
                )
            self.optimizer.step()
            self.copy_to_policy(self.main_weights)
        metrics = {**sums, "grad_norm": float(norm), **self.meter.shares(), **_summed_up(differences)}
        metrics |= self._draft_loss(len(microbatches))
        for plugin_metrics in self._hook.step_metrics(args=self._args):
            metrics.update({name: _mean(value) for name, value in plugin_metrics.items()})
        return metrics

    def _clip(self) -> list[torch.Tensor]:
        """Clip the gradients; the norm of the policy's, and of each other group's.

        Parameters with an attribute `grad_norm_group` are clipped by a norm of their own, as in Megatron's main.
        """
        import torch

        groups: dict[str | None, list[torch.Tensor]] = {None: []}
        for parameter, weight in self._trained:
            groups.setdefault(getattr(parameter, "grad_norm_group", None), []).append(weight)
        most = self._args.clip_grad or float("inf")
        return [torch.nn.utils.clip_grad_norm_(weights, most) for weights in groups.values()]

    def _scale_draft_loss(self, scale: float) -> None:
        """Megatron adds the gradient of each microbatch's mean to what comes back: they shall be averaged."""
        if self._args.mtp_num_layers:
            import torch
            from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

            MTPLossAutoScaler.set_loss_scale(torch.tensor(scale, device=self._device))

    def _draft_loss(self, microbatches: int) -> dict[str, float]:
        """`mtp_loss`, the mean over the step's microbatches, before --mtp-loss-scaling-factor; {} without one."""
        if not self._args.mtp_num_layers:
            return {}
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

        losses = MTPLossLoggingHelper.tracker.pop("values", None)
        return {} if losses is None else {"mtp_loss": float(losses.mean()) / microbatches}

    # -- microbatches -------------------------------------------------------------------------------------------------

    def _microbatches(self, data: Mapping[str, Any], microbatches: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        wanted = [key for keys in self._hook.microbatch_keys(args=self._args) for key in keys]
        fields = dict.fromkeys([*(name for name in TRAINED_ON if name in data), *wanted])
        for chosen in microbatches:
            self.meter.next = chosen
            yield {name: [data[name][index] for index in chosen] if name in data else None for name in fields}

    def _forward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy of every response token, float32, [the samples' response lengths together]."""
        import torch

        samples = batch["tokens"]
        lengths = batch["total_lengths"]
        total = sum(lengths)
        packing = Packing.of(self._args)
        positions = packing.positions(lengths).to(self._device)
        padding = len(positions) - total
        bounds = torch.tensor([0, *lengths, *([padding] if padding else [])], device=self._device).cumsum(0)
        batch |= {
            "unconcat_tokens": samples,
            "tokens": torch.nn.functional.pad(torch.cat(samples), (0, padding), value=PAD_TOKEN)[None],
            "packed_seq_params": _packed(bounds),
        }
        begin_microbatch(self._hook, self._args, batch, positions)
        self.meter.microbatch(positions)

        output = self.policy(batch["tokens"], None, None, packed_seq_params=batch["packed_seq_params"])
        ends = torch.tensor(lengths).cumsum(0).tolist()
        responses = batch["response_lengths"]
        rows = torch.cat([torch.arange(end - n - 1, end - 1) for end, n in zip(ends, responses, strict=True)])
        rows = rows.to(self._device)  # the row before a token predicts it
        every = (output[0, rows].float() / self._args.rollout_temperature).log_softmax(dim=-1)
        log_probs = every.gather(1, batch["tokens"][0, rows + 1][:, None])[:, 0]
        with nullcontext() if self._args.entropy_coef else torch.no_grad():
            entropy = -(every.exp() * every).sum(dim=-1)
        return log_probs, entropy

    # -- weights ------------------------------------------------------------------------------------------------------

    def copy_to_policy(self, weights: Sequence[torch.Tensor]) -> None:
        """Give the policy these weights, float32, rounded to its own dtype."""
        import torch

        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)

    @contextmanager
    def _weights(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        self.copy_to_policy(weights)
        try:
            yield
        finally:
            self.copy_to_policy(self.main_weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on from exactly here."""
        return {
            "main_weights": self.main_weights,
            "optimizer": self.optimizer.state_dict(),
            "reference": self._reference,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        for weight, saved in zip(self.main_weights, state["main_weights"], strict=True):
            weight.copy_(saved)
        groups = [{**group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({name: given[name] for name in ("lr", "betas", "eps", "weight_decay")})  # as the flags say now
        if self._reference is not None and state["reference"] is not None:
            self._reference = [saved.to(self._device) for saved in state["reference"]]
        self.copy_to_policy(self.main_weights)


def _packed(bounds: torch.Tensor) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    longest = int(bounds.diff().max())
    bounds = bounds.int()
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def _groups(weights: Sequence[torch.Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, the scales of norms do not, as in Megatron."""
    matrices, vectors = [w for w in weights if w.dim() > 1], [w for w in weights if w.dim() == 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _mean(value: Any) -> float:
    import torch

    return float(torch.as_tensor(value, dtype=torch.float64).mean())


def _summed_up(differences: Sequence[torch.Tensor]) -> dict[str, float]:
    """How far the trainer's log-probabilities were from the engine's, before the update: [response length] a sample.

    The mean is slime's: over the samples, of each one's mean over its tokens. p99 and maximum are over tokens.
    """
    import torch

    every = torch.cat(list(differences))
    name = "train_rollout_logprob_abs_diff"
    return {
        name: float(torch.stack([sample.mean() for sample in differences]).mean()),
        f"{name}_p99": float(every.quantile(0.99)),
        f"{name}_max": float(every.max()),
    }

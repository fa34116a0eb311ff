"""One rank: runs the cases that the test sends it, one after another, and answers with what its routers really did.

python worker.py RANK FILE_DESCRIPTOR [slime]
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import slime_like
import slimes_own
import tiny_gpt
import torch

from miles_plugins.activation import Activation, activate
from miles_plugins.errors import PluginError
from miles_plugins.microbatch import current_microbatch
from miles_plugins.packing import Rank, Schedule
from miles_plugins.patches.seam import EMBEDDED_ON_CPU, Host
from miles_plugins.patches.slime import training
from miles_plugins.patches.torch.cpu import device_mode
from miles_plugins.r3_replay import plugin as r3
from miles_plugins.r3_replay.trace import moe_layers

TIMEOUT = timedelta(seconds=200)  # of a collective: a rank that waits for one that raised gives up
PAD = 0


def activate_here() -> Activation:
    """The patches of slime's trainer and those that let Megatron run on the CPU."""
    modules = ("miles_plugins.patches.slime.training", *EMBEDDED_ON_CPU.modules)
    return activate(["r3"], "trainer", environment={}, host=Host("test", modules, EMBEDDED_ON_CPU.always))


def lend_transformer_engine() -> None:
    """The names of it that Megatron's checkpoints without output take for granted, all of them about FP8."""
    from megatron.core.tensor_parallel import random

    if not random.HAVE_TE:
        random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False)
        random.activation_recompute_forward = random.fp8_autocast = lambda **kwargs: nullcontext()


class Boom(Exception):
    """What goes wrong in a step."""


# -- what routers do -------------------------------------------------------------------------------------------------


class Observer:
    """Writes down what each router chooses for which tokens, whoever asked it to."""

    def __init__(self) -> None:
        self.stage = ""
        self.rollout = 0
        self.calls: list[dict[str, Any]] = []
        self.fail_at = 0  # the number, from 1, of the call of this stage that raises

    def watch(self, model: Sequence[Any], stages: Sequence[Sequence[int]], whose: str = "actor") -> None:
        """`stages`: the global layers that each chunk of this rank holds, as the test says."""
        from megatron.core.transformer.moe.router import TopKRouter

        for chunk, layers in zip(model, stages, strict=True):
            for name, module in chunk.named_modules():
                if isinstance(module, TopKRouter):
                    parts = name.split(".")
                    if "mtp" in parts:
                        module.register_forward_hook(self._hook(None, "draft"))
                    else:
                        module.register_forward_hook(self._hook(layers[int(parts[parts.index("layers") + 1])], whose))

    def _hook(self, layer: int | None, whose: str) -> Any:
        def observe(router: Any, inputs: tuple[Any, ...], outputs: tuple[Any, Any]) -> None:
            hidden, routing_map = inputs[0].detach().reshape(-1, tiny_gpt.HIDDEN), outputs[1]
            with torch.no_grad():
                logits = torch.nn.functional.linear(hidden.float(), router.weight.float())
            natural = torch.zeros_like(routing_map).scatter(1, logits.topk(router.topk, dim=1).indices, True)
            call = {
                "rollout": self.rollout,
                "stage": self.stage,
                "whose": whose,
                "layer": layer,
                "tokens": [] if whose == "draft" else tiny_gpt.read_code(hidden),
                "experts": [row.nonzero().flatten().tolist() for row in routing_map],
                "natural": (routing_map == natural).all(dim=1).tolist(),
            }
            self.calls.append(call)
            if sum(each["stage"] == self.stage for each in self.calls) == self.fail_at:
                self.fail_at = 0
                raise Boom

        return observe


# -- one rank of one case --------------------------------------------------------------------------------------------


@contextmanager
def process_groups(layout: dict[str, Any], store: str, rank: int) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=layout["world"], timeout=TIMEOUT
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout["tensor"],
            pipeline_model_parallel_size=layout["pipeline"],
            virtual_pipeline_model_parallel_size=layout["virtual"],
            context_parallel_size=layout["context"],
            expert_model_parallel_size=layout["expert"],
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(7)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # a model keeps its groups, and each group of gloo has threads that poll


class Optimizer:
    """Plain gradient descent on what Megatron's buffers hold; big steps, so that routers change their minds."""

    def __init__(self, model: Sequence[Any], rate: float) -> None:
        self._model, self._rate = model, rate
        self.gradients: list[dict[str, list[float]]] = []
        self.param_groups: list[Any] = []
        self.fails = False

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def zero_grad(self) -> None: ...

    def step(self) -> tuple[bool, float, None]:
        from megatron.core import mpu

        if self.fails:
            self.fails = False
            raise Boom
        found = {}
        for number, chunk in enumerate(self._model):
            for name, parameter in chunk.named_parameters():
                if name.endswith("router.weight"):
                    found[f"{number}.{name}"] = parameter.main_grad.flatten().tolist()
                with torch.no_grad():
                    parameter -= self._rate * parameter.main_grad
            tiny_gpt.write_code(chunk, mpu.get_tensor_model_parallel_rank())
        self.gradients.append(found)
        return True, 1.0, None


class Case:
    def __init__(self, case: dict[str, Any], activation: Activation, rank: int) -> None:
        from megatron.core import mpu

        self.case, self.hook, self.rank = case, activation.hook, rank
        layout = self.layout = case["layout"]
        self.args = self._arguments()
        self.observer = Observer()
        self.results: dict[str, Any] = {"metrics": [], "losses": [], "raised": [], "place": self._place()}
        torch.manual_seed(11)  # weights: the same on every rank that holds a part of the same layer
        self.model = tiny_gpt.build(layout, case["model"], twice=case.get("built") == "twice")
        own = mpu.get_pipeline_model_parallel_rank()
        stages = [case["stages"][own + layout["pipeline"] * stage] for stage in range(layout["virtual"] or 1)]
        self.observer.watch(self.model, stages)
        self.other: list[Any] | None = None
        self.optimizer = Optimizer(self.model, case.get("rate", 1.0))

    @staticmethod
    def _place() -> dict[str, int]:
        from megatron.core import mpu

        return {
            "data": mpu.get_data_parallel_rank(),
            "pipeline": mpu.get_pipeline_model_parallel_rank(),
            "context": mpu.get_context_parallel_rank(),
            "tensor": mpu.get_tensor_model_parallel_rank(),
        }

    def _arguments(self) -> Namespace:
        case, layout = self.case, self.layout
        return Namespace(
            num_layers=case["model"]["num_layers"],
            moe_layer_freq=case["model"].get("moe_layer_freq", 1),
            moe_router_topk=case["model"]["moe_router_topk"],
            num_experts=case["model"]["num_moe_experts"],
            moe_router_fusion=False,
            moe_router_load_balancing_type="none",
            moe_expert_capacity_factor=None,
            use_rollout_routing_replay=True,
            use_routing_replay=True,
            r3_earlier_rows="keep",
            r3_missing=case.get("missing", "fail"),
            r3_measure_only=case.get("measure_only", False),
            context_parallel_size=layout["context"],
            tensor_model_parallel_size=layout["tensor"],
            pipeline_model_parallel_size=layout["pipeline"],
            sequence_parallel=layout["sequence"],
            data_pad_size_multiplier=layout["pad"],
            allgather_cp=layout["all_gather"],
            loss=self._loss,
        )

    # -- the rollout's data -------------------------------------------------------------------------------------------

    def receive(self, number: int = 0) -> None:
        """A rollout's samples go the way that slime takes them, up to this trainer's shard."""
        from megatron.core import mpu

        rollout = self.case["rollouts"][number]
        self.observer.rollout = number
        samples = [self._sample(index, rollout) for index in range(len(rollout["tokens"]))]
        self.hook.receive_samples(args=self.args, samples=samples)
        train_data: dict[str, Any] = {
            "tokens": rollout["tokens"],
            "loss_masks": [[0 if sample.remove_sample else 1] for sample in samples],
        }
        self.hook.collect_train_data(args=self.args, samples=samples, train_data=train_data)
        schedule = Schedule([len(tokens) for tokens in rollout["tokens"]], rollout["microbatches"])
        (shared,) = self.hook.share_train_data(args=self.args, schedule=schedule)
        data_rank = mpu.get_data_parallel_rank()
        mine = list(itertools.chain.from_iterable(rollout["microbatches"][data_rank]))
        numbers = iter(range(len(mine)))
        indices = [[next(numbers) for _ in samples] for samples in rollout["microbatches"][data_rank]]
        data = {name: [values[index] for index in mine] for name, values in train_data.items()}
        data["tokens"] = [torch.tensor(tokens) for tokens in data["tokens"]]
        data["total_lengths"] = [len(tokens) for tokens in data["tokens"]]
        data["response_lengths"] = [max(length - 1, 0) for length in data["total_lengths"]]
        data["loss_masks"] = [torch.ones(length) for length in data["response_lengths"]]
        data["micro_batch_indices"] = indices
        asked: list[str] = []

        def fetch(names: Sequence[str]) -> list[Any]:
            asked.extend(names)
            return [shared[data_rank][name] for name in names]

        rank = Rank(data_rank, mpu.get_context_parallel_rank(), mpu.get_tensor_model_parallel_rank())
        self.hook.receive_train_data(args=self.args, rollout_data=data, rank=rank, fetch=fetch)
        self.results["asked"] = [name for name in asked if name != r3.LAYOUT]
        self.results["shared"] = sorted(set(shared[data_rank]) - {r3.LAYOUT})
        self.data = data
        self.steps = rollout["steps"]
        self.iterators = self._iterators(data)

    def _sample(self, index: int, rollout: dict[str, Any]) -> SimpleNamespace:
        """What slime knows of a sample whose engine sent this routing; tokens behind it are a tool's answer."""
        tokens, trace = rollout["tokens"][index], rollout["traces"][index]
        sample = SimpleNamespace(
            index=index,
            tokens=tokens,
            rollout_routed_experts=None,
            weight_versions=["1"],
            remove_sample=False,
            loss_mask=None,
        )
        if trace is not None:
            layers = len(moe_layers(self.args.num_layers, self.args.moe_layer_freq))
            experts = torch.tensor(trace, dtype=torch.uint8).reshape(len(trace), layers, self.args.moe_router_topk)
            sent = {"routed_experts": self.hook.encode_routed_experts(experts=experts), "weight_version": "1"}
            sample.tokens = tokens[: len(trace) + 1]
            self.hook.receive_response(args=self.args, sample=sample, meta_info=sent)
            sample.tokens, sample.loss_mask = tokens, [1] * len(trace) + [0] * (len(tokens) - 1 - len(trace))
        return sample

    def _iterators(self, data: dict[str, Any]) -> list[Any]:
        return [slime_like.DataIterator(data, data["micro_batch_indices"]) for _ in range(self.layout["virtual"] or 1)]

    # -- passes -------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        role = self.case.get("role", "actor")
        self.hook.model_built(args=self.args, model=self.model, role=role)
        for step in self.case["script"]:
            name, *arguments = step if isinstance(step, list) else [step]
            getattr(self, name)(*arguments)
            assert current_microbatch() is None
        self.results["evidence"] = self.hook.probe(role="trainer")
        return {**self.results, "calls": self.observer.calls, "gradients": self.optimizer.gradients}

    def raises(self, name: str, *arguments: Any) -> None:
        """Something of the script that goes wrong."""
        try:
            getattr(self, name)(*arguments)
        except (Boom, PluginError) as error:
            self.results["raised"].append([type(error).__name__, str(error)])
        else:
            raise AssertionError(f"{name} did not raise")

    def fail(self, where: str, pipeline: int | None = None, call: int = 0) -> None:
        """The next step fails: in the router whose turn it is at this `call`, or in the optimizer."""
        if pipeline in (None, self.results["place"]["pipeline"]):
            self.observer.fail_at, self.optimizer.fails = call, where == "optimizer"

    def bypass(self, pipeline: int) -> None:
        """The last router of a stage decides without asking, like one of a kind that nobody knew of."""
        if pipeline == self.results["place"]["pipeline"]:
            routers = [module for module in self.model[-1].modules() if hasattr(module, "router_replay")]
            routers[-1].router_replay = None

    def build_another(self) -> None:
        """Another model in this process, which is not the actor's."""
        self.other = tiny_gpt.build(self.layout, self.case["model"])
        self.observer.watch(self.other, self.case["stages"], "another")
        self.hook.model_built(args=self.args, model=self.other, role="critic")

    def forward(self, prefix: str) -> None:
        """A pass without gradient: `` is slime's log_prob, `ref_` its ref_log_prob."""
        self.observer.stage = f"{prefix}log_prob"
        found = self._forward_only(prefix)
        self.results["losses"] += [float(each["loss"]) for each in found]

    def values(self) -> None:
        """The critic's pass without gradient."""
        self.observer.stage = "values"
        self._forward_only("", get_values)

    def _forward_only(self, prefix: str, f: Any = None) -> list[dict[str, torch.Tensor]]:
        return training.forward_only(
            *(slime_like.forward_only, f or get_loss, self.args, self.model, self.iterators, self.steps),
            store_prefix=prefix,
        )

    def train(self) -> None:
        """Every optimizer step of the rollout."""
        for iterator in self.iterators:
            iterator.reset()
        for number in range(len(self.steps)):
            self.step(number)

    def step(self, number: int) -> None:
        self.observer.stage = f"train {number}"
        found, _ = training.train_one_step(
            slime_like.train_one_step,
            *(self.args, 0, number, self.iterators, self.model, self.optimizer, None, self.steps[number], 1),
        )
        self.results["losses"] += found.pop("losses")
        self.results["metrics"].append(found)

    def _loss(
        self, args: Namespace, batch: dict[str, Any], output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if self.other is not None:
            with torch.no_grad():
                self.other[0](batch["tokens"], None, None, packed_seq_params=batch["packed_seq_params"])
        loss = output.float().pow(2).mean()
        return loss, {"loss": loss.detach().clone()}  # Megatron divides it in place


def get_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What a pass without gradient collects."""
    return torch.zeros(()), {"loss": output.float().pow(2).mean()}


def get_values(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Likewise; slime tells the critic's pass by this name."""
    return get_loss(output)


class SlimesCase(Case):
    """With slime's own loop."""

    def _arguments(self) -> Namespace:
        return slimes_own.arguments(super()._arguments())

    def _iterators(self, data: dict[str, Any]) -> list[Any]:
        return slimes_own.iterators(data)

    def _forward_only(self, prefix: str, f: Any = None) -> list[Any]:
        slimes_own.forward_only(self, prefix)
        return []

    def train(self) -> None:
        slimes_own.train(self)  # which logs on one rank


# -- this process ----------------------------------------------------------------------------------------------------


def run(kind: type[Case], case: dict[str, Any], activation: Activation, rank: int) -> dict[str, Any] | None:
    if rank >= case["layout"]["world"]:
        return None
    r3._replay = r3._shard = None
    r3._metrics.clear()
    r3._shares.clear()
    with process_groups(case["layout"], case["store"], rank):
        running = kind(case, activation, rank)
        try:
            return running.run()
        finally:
            # Its wrapper and the hooks of its gradients hold each other where Python does not see it.
            for chunk in (*running.model, *(running.other or ())):
                vars(chunk).clear()


def main() -> None:
    rank, descriptor, kind = int(sys.argv[1]), int(sys.argv[2]), SlimesCase if "slime" in sys.argv else Case
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    activation = activate_here()
    lend_transformer_engine()
    connection = Connection(descriptor)
    with device_mode(), suppress(EOFError):  # the test is gone
        while True:
            case = connection.recv()
            try:
                connection.send(("done", run(kind, case, activation, rank)))
            except BaseException:
                connection.send(("failed", f"rank {rank}, pid {os.getpid()}\n{traceback.format_exc()}"))


if __name__ == "__main__":
    main()

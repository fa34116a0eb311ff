"""One run of the embedded host: engine and policy of the same weights, rollouts, training, weight sync.

The hooks are called at the moments at which slime's patches call them, in the order in which slime gets there.
"""

from __future__ import annotations

import time
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_plugins import attestation, linears, weights
from miles_plugins.activation import Activation
from miles_plugins.embedded import checkpoint, random_state
from miles_plugins.embedded.engine import Answer, RolloutEngine, ServerArgs
from miles_plugins.embedded.hugging_face import read_tensors, require_plain, save_hugging_face
from miles_plugins.embedded.policy import SHAPE, build_policy, load_weights, named_batches
from miles_plugins.embedded.recorder import Recorder
from miles_plugins.embedded.results import ROLLOUT_OF_TRAIN_STEP, ROLLOUT_STEP, TRAIN_STEP, RolloutResult
from miles_plugins.embedded.samples import Prompts, Sample, Status, fill, give_rewards, load_reward, to_train_data
from miles_plugins.embedded.trainer import Trainer
from miles_plugins.errors import ArgumentError, AttestationError, PluginError
from miles_plugins.patches.sglang.draft import told
from miles_plugins.spec_rl.accept import slimes_metrics

if TYPE_CHECKING:
    import torch

ROLES = ("driver", "rollout_manager", "trainer")  # what this one process is to the plugins, in slime's words
PATIENCE = 3  # rollouts that may pass before the first one that anything can be learnt from


class EmbeddedRun:
    """Everything that lives as long as one run."""

    def __init__(self, args: Namespace, activation: Activation, device: torch.device) -> None:
        """Load what `args.hf_checkpoint` holds into engine and policy, let plugins probe both, and compare.

        Raises:
            PluginError: a plugin or a patch does not work here; the run must not begin.
            ArgumentError: a mistake in what the user gave.
        """
        self.args, self._activation, self._hook = args, activation, activation.hook
        if not activation.plugins.implement("receive_weights"):
            require_plain(args.hf_checkpoint)
        self._prompts = Prompts(args)
        self._reward = load_reward(args.custom_rm_path)
        self._server_args = ServerArgs(
            model_path=str(args.hf_checkpoint),
            device=str(device),
            dtype="bfloat16",
            random_seed=args.rollout_seed,
            enable_return_routed_experts=True,  # also without r3: routing differences are measured in every run
            speculative_algorithm=args.sglang_speculative_algorithm,
            speculative_num_steps=args.sglang_speculative_num_steps,
            speculative_eagle_topk=args.sglang_speculative_eagle_topk,
            speculative_num_draft_tokens=args.sglang_speculative_num_draft_tokens,
            speculative_draft_model_path=_text(args.sglang_speculative_draft_model_path),
        )
        algorithm = args.sglang_speculative_algorithm
        trained = self._hook.draft_is_trained(args=args, algorithm=algorithm) if algorithm else None
        with told(trained):
            self.engine = RolloutEngine(
                args.hf_checkpoint,
                self._server_args,
                lambda server_args, request: self._hook.receive_engine_request(
                    server_args=server_args, request=request
                ),
                lambda experts: self._hook.encode_routed_experts(experts=experts),
                self._received,
                lambda model: self._hook.engine_model_built(server_args=self._server_args, model=model),
                draft_is_trained=bool(trained),
            )
        self._prompts.check_lengths(self._encode)
        with self.engine.serve() as url:  # plugins probe over HTTP, as they probe SGLang
            self._hook.rollout_ready(args=args, router_url=url, engine_urls=[url])
        policy = build_policy(args, device)
        self._hook.model_built(args=args, model=[policy], role="actor")  # before any weights, as in slime
        linears.offer(activation.plugins, args, [policy], "actor")
        load_weights(args, policy, self._checkpoint(), args.hf_checkpoint)
        self.trainer = Trainer(args, self._hook, policy)
        resumed = self._resume() if args.load else None
        self.first_rollout: int = checkpoint.describe(args.load)["rollouts"] if args.load else 0
        self.send_weights(self.first_rollout)
        self.reports = self._attest()
        if resumed is not None:
            random_state.restore(resumed["random"])  # last: what comes before draws too

    # -- before the first rollout -------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        return {
            "shape": {
                **{name: getattr(self.args, name) for name in SHAPE},
                "mtp_num_layers": self.args.mtp_num_layers,
                "enable_mtp_training": self.args.enable_mtp_training or None,
            },
            "plugins": {plugin.name: plugin.version for plugin in self._activation.plugins},
            "digest": self._activation.plugins.digest,
            "run": self.args.run_id,
        }

    def _received(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """What the plugins make of weights that arrive at the engine."""
        return weights.receive(self._activation.plugins, self._server_args, named_tensors)

    def _checkpoint(self) -> dict[str, torch.Tensor]:
        """The policy's first weights: what the engine makes of the same files."""
        return dict(self._received(read_tensors(self.args.hf_checkpoint).items()))

    def _resume(self) -> dict[str, Any]:
        state = checkpoint.load(self.args.load, self.identity, other_plugins=self.args.load_with_other_plugins)
        self.trainer.restore(state)
        return state

    def _attest(self) -> list[dict[str, Any]]:
        """One report for each role that this process plays, held to the same rules as slime's processes."""
        reports = []
        for self._activation.role in ROLES:
            self._activation.probes.clear()
            reports.append(self._activation.report())
        plugins = self._activation.plugins
        problems = attestation.problems(
            reports, plugins.digest, dict.fromkeys(ROLES, 1), {plugin.name: plugin.sides for plugin in plugins}
        )
        if problems:
            raise AttestationError(
                "the plugins are not what they should be, so training does not begin",
                {str(number): problem for number, problem in enumerate(problems, 1)},
            )
        return reports

    # -- rollout by rollout -------------------------------------------------------------------------------------------

    def rollouts(self, recorder: Recorder, phase: Any) -> Iterator[RolloutResult]:
        """Generate, train, sync and save, rollout by rollout; `phase` is told what is going on.

        Raises:
            ArgumentError: nothing can be learnt from the rewards, or something cannot be written.
        """
        learnt = self.first_rollout > 0
        for rollout in range(self.first_rollout, self.args.num_rollout):
            phase("generating")
            begun = time.perf_counter()
            samples = self.generate(rollout)
            metrics = _rollout_metrics(self.args, rollout, samples, time.perf_counter() - begun)
            if self.args.sglang_speculative_algorithm:  # as slime does
                metrics |= {f"rollout/{name}": value for name, value in slimes_metrics(samples).items()}
            for added in self._hook.rollout_metrics(args=self.args, samples=samples):
                metrics |= {f"rollout/{name}": value for name, value in added.items()}
            self._log(recorder, metrics, ROLLOUT_STEP)
            self._hook.receive_samples(args=self.args, samples=samples)
            train_data = to_train_data(self.args, samples)
            self._hook.collect_train_data(args=self.args, samples=samples, train_data=train_data)
            learnt = learnt or metrics["rollout/zero_variance_groups"] < 1
            if not learnt and rollout + 1 >= min(PATIENCE, self.args.num_rollout):
                raise _nothing_to_learn(self.args, rollout + 1, samples)

            phase("training")
            self.trainer.meter.traces = _traces(samples, train_data)
            steps = list(self._train(rollout, train_data))
            for step in steps:
                self._log(recorder, step, TRAIN_STEP)
            phase("sending weights")
            self.send_weights(rollout + 1)
            self._save(rollout + 1)
            yield RolloutResult.from_metrics(rollout, metrics, steps)

    def _encode(self, prompt: str) -> list[int]:
        tokens: list[int] = self.engine.tokenizer.encode(prompt, add_special_tokens=False)
        return tokens

    def generate(self, rollout: int) -> list[Sample]:
        """The samples of one rollout, with answers and rewards."""
        args = self.args
        samples = self._prompts.of(rollout)
        prompts = [self._encode(sample.prompt) for sample in samples]
        common = {"max_new_tokens": args.rollout_max_response_len, "temperature": args.rollout_temperature}
        answers = self.engine.generate(
            {
                "input_ids": prompts,
                # Seeded one by one: a resumed run, or another batch size, draws the same.
                "sampling_params": [{**common, "sampling_seed": _seed(args.rollout_seed, s.index)} for s in samples],
                "return_logprob": True,
                "return_routed_experts": True,
            }
        )
        for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
            assert isinstance(answer, Answer)
            fill(args, sample, prompt, answer, self._hook)
        give_rewards(args, samples, self._reward)
        return samples

    def _train(self, rollout: int, train_data: Mapping[str, Any]) -> Iterator[dict[str, float]]:
        begun = time.perf_counter()
        data = self.trainer.receive(train_data)
        self.trainer.prepare(data)
        steps = len(data["tokens"]) // self.args.global_batch_size
        for number, metrics in enumerate(self.trainer.train(data)):
            now = time.perf_counter()
            named = {f"train/{name}": value for name, value in metrics.items()}
            yield {
                TRAIN_STEP: rollout * steps + number,
                ROLLOUT_OF_TRAIN_STEP: rollout,
                "train/seconds": now - begun,
                **named,
            }
            begun = now

    def send_weights(self, rollouts: int) -> None:
        """Give the engine the policy's weights after so many rollouts, by Hugging Face names and past the plugins."""
        batches = named_batches(self.args, self.trainer.policy)
        exported = (weights.export(self._activation.plugins, self.args, batch) for batch in batches)
        received: Counter[str] = Counter()

        def sent() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in (pair for batch in exported for pair in batch):
                received[name] += 1
                yield name, tensor

        # Versions begin at 1, as in slime: what the engine loaded by itself is no version of the trainer's.
        self.engine.update_weights(sent(), str(rollouts + 1))
        self._hook.after_weight_update(server_args=self._server_args, received=received)

    def _save(self, rollouts: int) -> None:
        args = self.args
        last = rollouts == args.num_rollout
        if args.save_hf and last:
            tensors = (pair for batch in named_batches(args, self.trainer.policy) for pair in batch)
            save_hugging_face(args.hf_checkpoint, args.save_hf, dict(tensors))
        if args.save and (last or (args.save_interval and rollouts % args.save_interval == 0)):
            checkpoint.save(
                args.save, rollouts, self.identity, {**self.trainer.state(), "random": random_state.capture()}
            )

    def _log(self, recorder: Recorder, metrics: Mapping[str, float], step_key: str) -> None:
        recorder.log(metrics, step_key)
        self._hook.metrics_logged(args=self.args, metrics=metrics, step_key=step_key)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _seed(seed: int, index: int) -> int:
    return zlib.crc32(f"{seed} {index}".encode())


def _rollout_metrics(args: Namespace, rollout: int, samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    rewards = [sample.reward for sample in samples]
    each = args.n_samples_per_prompt
    groups = [rewards[begin : begin + each] for begin in range(0, len(rewards), each)]
    return {
        ROLLOUT_STEP: rollout,
        "rollout/raw_reward": sum(rewards) / len(rewards),
        "rollout/zero_variance_groups": sum(min(group) == max(group) for group in groups) / len(groups),
        "rollout/truncated_ratio": sum(sample.status is Status.TRUNCATED for sample in samples) / len(samples),
        "rollout/response_lengths": sum(sample.response_length for sample in samples) / len(samples),
        "rollout/tokens": sum(len(sample.tokens) for sample in samples),
        "rollout/seconds": seconds,
    }


def _traces(samples: Sequence[Sample], train_data: Mapping[str, Any]) -> list[torch.Tensor]:
    """Each sample's routing in the rollout, to measure by.

    Raises:
        PluginError: the training data is not of these samples any more, so that one would be measured by another's.
    """
    if train_data["tokens"] != [sample.tokens for sample in samples]:
        raise PluginError(
            "a plugin changed or reordered the samples in collect_train_data",
            {"expected": f"the tokens of the rollout's {len(samples)} samples, in their order"},
            "the embedded host measures routing by them; change other fields, or use slime",
        )
    return [sample.recorded for sample in samples if sample.recorded is not None]


def _nothing_to_learn(args: Namespace, rollouts: int, samples: Sequence[Sample]) -> ArgumentError:
    found = sorted({sample.reward for sample in samples})
    return ArgumentError(
        f"nothing can be learnt: in {rollouts} rollouts every group's samples were rewarded alike",
        {
            "rewards": ", ".join(f"{reward:g}" for reward in found[:5]),
            "reward function": args.custom_rm_path,
            "one response": repr(samples[0].response[:60]),
        },
        "give a reward that tells samples of one prompt apart, or prompts that the model sometimes gets right",
    )

"""Every hook, in one file: the contract between upstream and plugins.

A plugin implements a hook by defining a function of that name, marked `@hookimpl`, with only the arguments it needs.
Each docstring says when the hook is called, in which process, and with what. Processes are:

* `driver`: the process that runs `train.py`;
* `rollout_manager`: slime's `RolloutManager` Ray actor;
* `engine`: slime's `SGLangEngine` Ray actor, the parent of one SGLang server;
* `sglang_server`, `sglang_scheduler`, `sglang_detokenizer`: the processes of that server;
* `trainer`: slime's `MegatronTrainRayActor`, one a rank.

`args` is slime's own argument namespace. Under `slime-train --embedded` one process is the driver, the rollout manager,
the engine and the trainer; `args` then has slime's names as far as that host has them.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import torch

    from miles_plugins.finding import Finding
    from miles_plugins.gathering import Encoding
    from miles_plugins.linears import Linear
    from miles_plugins.microbatch import Microbatch
    from miles_plugins.packing import Rank, Schedule
    from miles_plugins.spec_rl.draft_loss import Targets

PROJECT = "miles_plugins"
ROLES = (
    "driver",
    "rollout_manager",
    "engine",
    "trainer",
    "sglang_server",
    "sglang_scheduler",
    "sglang_detokenizer",
)
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# -- miles-plugins doctor --------------------------------------------------------------------------------------------


@hookspec
def doctor() -> Sequence[Finding]:  # type: ignore[empty-body]
    """`miles-plugins doctor --plugins NAME` looks at the environment (in its own process, before any run): add checks.

    There are no arguments: no run, no flags, nothing of upstream imported. Return one `Finding(check, status, found,
    next)` for each thing looked at: `status` is `ok`, `note` or `problem`; `found` says what is there; `next` says what
    to do, for a problem always and for ok never. Read files and metadata, start nothing. An exception is shown as a
    problem.
    """


# -- the driver ------------------------------------------------------------------------------------------------------


@hookspec
def default_flags(flags: Sequence[str]) -> Sequence[str]:  # type: ignore[empty-body]
    """Flags to put in front of the user's own, before slime parses them (driver).

    `flags` is the user's command line. argparse takes the last value of a flag, so what the user says wins.
    """


@hookspec
def register_arguments(parser: ArgumentParser) -> None:
    """slime's parser is being built (driver): add the plugin's flags, which carry the plugin's name as a prefix.

    `parser` is an argument group titled with the plugin's name.
    """


@hookspec
def configure(args: Namespace) -> None:
    """slime has parsed and validated its own arguments (driver): derive, check, refuse.

    Raise `ArgumentError` to refuse. Nothing has been started yet: no Ray worker, no GPU.
    """


@hookspec
def process_environment(role: str) -> Mapping[str, str]:  # type: ignore[empty-body]
    """Environment variables for the processes of one role, before they start (driver).

    `role` is `driver` (at once), `worker` (every Ray worker of the job) or `trainer` (in addition). What the user's
    environment already says stays.
    """


@hookspec
def tiny_model_shape() -> Mapping[str, int]:  # type: ignore[empty-body]
    """A tiny random model is about to be made to try the plugins on (`miles-plugins rehearse`; driver): its shape.

    Return what the plugin needs of it, by the names that `write_tiny_model` has: `{"draft_layers": 1}`.
    """


@hookspec
def rehearsal_flags(checkpoint: Path) -> Sequence[str]:  # type: ignore[empty-body]
    """`miles-plugins rehearse` is about to start slime (driver): flags by which the plugin has something to do.

    For what a plugin by itself leaves to the user's flags (`default_flags` are there as well). `checkpoint` is what
    --hf-checkpoint will be. The user's own flags come after them, and win.
    """


@hookspec(firstresult=True)
def prepare_tiny_model(folder: Path) -> Path | None:
    """A tiny random model was made to try the plugins on (`miles-plugins rehearse`, `slime-train --embedded`; driver).

    `folder` is its Hugging Face checkpoint, bfloat16. A plugin that trains on another kind of checkpoint makes one of
    it, beside it, and returns that folder: it becomes `--hf-checkpoint`. Nothing of upstream is
    imported then.
    """


# -- rollout ---------------------------------------------------------------------------------------------------------


@hookspec
def receive_engine_request(server_args: Any, request: Any) -> None:
    """One `/generate` request reached the SGLang server (sglang_server), before it is tokenized.

    `request` is SGLang's `GenerateReqInput`, of one prompt or of a batch; change it in place.
    """


@hookspec
def engine_model_built(server_args: Any, model: torch.nn.Module) -> None:
    """A model of the engine was built (sglang_scheduler, each rank); its weights come later.

    `model` is SGLang's (the embedded host's: transformers'). Frozen models beside the trained one, and drafts, come
    here too. `server_args` is SGLang's.
    """


@hookspec
def receive_weights(
    server_args: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]] | None:
    """Weights are about to be loaded into a model of the engine (sglang_scheduler, each rank).

    From the checkpoint when the engine starts, and in every weight update, there a part at a time. `named_tensors` has
    names of the checkpoint; it can be read once. Return what shall be loaded in its place, lazily if you can; None
    leaves it. Each plugin is given what the one before returned. `server_args` is SGLang's. Frozen models that slime
    serves beside the trained one, and draft models, come here too.
    """


@hookspec
def after_weight_update(server_args: Any, received: Mapping[str, int]) -> None:
    """All weights of one update have come (sglang_scheduler, each rank); generation has not resumed yet.

    `received` is how often each name came in this update, as the trainer sent it. A name that came to some ranks only
    (divided experts) is in it on every rank. Raise `PluginError` where something is missing: the engine then stays
    paused, and the run ends.
    """


@hookspec(firstresult=True)
def draft_is_trained(args: Namespace, algorithm: str) -> bool | None:
    """A server that drafts (speculative decoding) is about to start (engine): is its draft among what is trained?

    `algorithm` is the server's own, such as EAGLE: --sglang-config may change it for a group of engines.
    True: the draft loads the tensors of each weight update with the target, and an update that leaves a part of it as
    it was fails. False: updates pass it by. None leaves it to SGLang, whose releases differ. A plugin with this hook
    needs `after_weight_update` as well: without it nobody says where an update ends.
    """


@hookspec(firstresult=True)
def encode_routed_experts(experts: torch.Tensor) -> str | None:
    """The recorded routing of one finished request leaves the SGLang server (sglang_detokenizer).

    With --skip-tokenizer-init no request passes the detokenizer; the server asks then (sglang_server).

    `experts` is [tokens, MoE layers, topk] on the CPU, uint8 up to 256 experts and int16 above; layers without experts
    are not in it. Return what `meta_info["routed_experts"]` of the response shall be; None leaves it to the next
    plugin, at last to SGLang's own base64 of int32.
    """


@hookspec
def receive_response(args: Namespace, sample: Any, meta_info: dict[str, Any]) -> None:
    """slime is about to take over `meta_info` of one response, or of a part of one (rollout_manager).

    `sample` is slime's `Sample`; the response's tokens are in it already. Take out of `meta_info`, in place, what slime
    shall not see. On slime before v0.3.1 it is called when slime has read the response, with a copy of `meta_info`:
    `routed_experts` alone was withheld from slime, and changes reach nobody.
    """


@hookspec(firstresult=True)
def speculation_counts(meta_info: Mapping[str, Any]) -> Mapping[str, int] | None:
    """slime is about to count what speculative decoding did for one response, or a part of one (rollout_manager).

    Return the names it reads, with what is true of `meta_info`: `spec_accept_token_num`, `spec_draft_token_num`,
    `spec_verify_ct`, `completion_tokens`. None leaves `meta_info` as it is.
    """


@hookspec
def rollout_ready(args: Namespace, router_url: str, engine_urls: Sequence[str]) -> None:
    """Every SGLang server is up and registered (rollout_manager), before the first rollout: probe what you rely on.

    Where slime has restarted engines (--use-fault-tolerance) it is called again, with the URLs of these alone, before
    the next rollout or evaluation. Raise to stop the run.
    """


@hookspec
def rollout_metrics(args: Namespace, samples: Sequence[Any]) -> Mapping[str, float]:  # type: ignore[empty-body]
    """A rollout ended (rollout_manager): numbers for slime's own tracking, logged as `rollout/<name>`.

    `samples` are slime's `Sample`s that will be trained on.
    """


@hookspec
def receive_samples(args: Namespace, samples: Sequence[Any]) -> None:
    """The samples of one rollout are about to become training data (rollout_manager): check or change them in place.

    A sample with `remove_sample = True` is masked out by slime: it stays in the batch and adds nothing to the loss.
    """


@hookspec
def collect_train_data(args: Namespace, samples: Sequence[Any], train_data: dict[str, Any]) -> None:
    """slime converted the samples of one rollout to training data (rollout_manager): check or change it in place.

    `samples` are slime's `Sample`s; `train_data` maps a field to one value a sample, in the same order.
    """


@hookspec
def share_train_data(args: Namespace, schedule: Schedule) -> Sequence[Mapping[str, Any]]:  # type: ignore[empty-body]
    """slime decided which rank trains on which samples, in which microbatches (rollout_manager).

    Return large data by name, for each data-parallel rank: each value goes into Ray's object store by itself, and only
    the processes that fetch it in `receive_train_data` receive it. numpy arrays arrive without a copy, read-only.
    """


# -- training --------------------------------------------------------------------------------------------------------


@hookspec
def model_built(args: Namespace, model: Sequence[Any], role: str) -> None:
    """The Megatron modules exist, before the optimizer is built (trainer).

    `model` holds one module a virtual pipeline stage, wrapped for data parallelism (not so in the embedded host, where
    nothing is parallel). Its weights are not loaded yet. `role` is `actor` or `critic`.
    """


@hookspec
def forward_weight(
    args: Namespace, role: str, linear: Linear
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] | None:
    """A linear layer exists (trainer), right after `model_built`: which weights shall its forward pass compute with?

    Called once for each layer; the experts of one layer may be one `Linear` or many (see `miles_plugins.Linear`).
    Return None to leave it, or a function that is called in each forward pass with its weights, [N, K] each, detached,
    and returns as many tensors of the same shapes, dtype and device: the layer computes with these, and the gradient
    reaches the weights as if they had been used (straight through). It is an error when two plugins want one layer.
    """


@hookspec
def forward_linear(
    args: Namespace, role: str, linear: Linear
) -> Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[int]], torch.Tensor] | None:
    """A linear layer exists (trainer), right after `model_built`: what shall its forward pass compute?

    As `forward_weight`, for the whole product: return None to leave it, or a function of (x, weights, rows), called in
    each forward pass. x is [M, K], detached, in the layer's dtype, gathered over sequence-parallel ranks; `weights` are
    [N, K] each, this rank's; `rows[i]` rows of x, in order, belong to `weights[i]`. It returns [M, N] of x's dtype, to
    which a bias is added. Gradients are those of x @ weight.T (straight through). It is an error when two plugins want
    one layer, through this hook or `forward_weight`.
    """


@hookspec
def weigh_expert_outputs(args: Namespace, role: str) -> bool | None:
    """The experts of a model exist (trainer), right after `model_built`: shall their outputs be weighed?

    Return True to have the router's probabilities multiplied with what the second linear layer of each expert gives, as
    SGLang does. Megatron multiplies them with what that layer gets, where they change its quantization.
    """


@hookspec
def receive_train_data(
    args: Namespace, rollout_data: dict[str, Any], rank: Rank, fetch: Callable[[Sequence[str]], list[Any]]
) -> None:
    """The trainer holds its shard of a rollout (trainer), before its first pass.

    `rollout_data` is the shard: one value a local sample in most fields, and `micro_batch_indices`, the local samples
    of each microbatch. `rank` is where this process stands. `fetch(names)` gives what `share_train_data` returned
    under these names, of any plugin.
    """


@hookspec(firstresult=True)
def take_routed_experts(args: Namespace, rollout_data: dict[str, Any]) -> bool | None:
    """slime is about to queue the recorded routing for replay (trainer).

    `rollout_data` is the trainer's shard of the rollout: one value a local sample in most fields. Return True to replay
    it yourself; slime's own queues then stay empty.
    """


@hookspec
def pass_begins(args: Namespace, stage: str, model: Sequence[Any]) -> None:
    """A pass over all microbatches begins (trainer).

    `stage` is `log_prob`, `ref_log_prob`, `teacher_log_prob`, `values` or `train` (one optimizer step). With one step a
    rollout slime leaves `log_prob` out: the step's own forward pass gives the same.
    """


@hookspec
def pass_ends(args: Namespace, stage: str, model: Sequence[Any], error: BaseException | None) -> None:
    """The pass ended (trainer); always paired with `pass_begins`, also when it raised `error`."""


@hookspec
def microbatch_keys(args: Namespace) -> Sequence[str]:  # type: ignore[empty-body]
    """Fields of `rollout_data` that the plugin wants in every microbatch (trainer), beside slime's own."""


@hookspec
def microbatch_begins(args: Namespace, microbatch: Microbatch) -> None:
    """The forward pass of one microbatch is about to run (trainer).

    `microbatch.batch` is slime's: `unconcat_tokens` holds the samples' token tensors [length] int64, `tokens` the
    packed [1, padded length]. Keep what belongs to it in `microbatch.values`; `current_microbatch()` finds it again,
    also while its activations are recomputed.
    """


@hookspec(firstresult=True)
def select_experts(
    router: torch.nn.Module,
    scores: torch.Tensor,
    topk: int,
    choose: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One MoE router decides (trainer); return None to leave the choice to the next plugin, at last to Megatron.

    `scores` is [tokens, experts], floating point, with gradient; `choose()` gives Megatron's own choice. Return
    `(probabilities [tokens, topk], indices [tokens, topk] int64)`; the probabilities carry the gradient.
    """


@hookspec
def training_log_probs(args: Namespace, batch: Mapping[str, Any], log_probs: Sequence[torch.Tensor]) -> None:
    """The training forward pass of one microbatch gave each response token its log-probability (trainer).

    Once a microbatch of an optimizer step, on the last pipeline stage, before the loss masks, clips or corrects
    anything; not in other passes, not when the backward pass recomputes the loss, and not with a loss that needs no
    log-probabilities (a critic's). Change nothing in place, and use no collectives.

    `log_probs` holds one detached float32 tensor a sample: its response tokens on this rank. `batch` is slime's
    microbatch: `rollout_log_probs` are the engine's, of the same tokens in the same order (absent or None where the
    rollout has none); `loss_masks`, `unconcat_tokens`, `total_lengths` and `response_lengths` are those of whole
    samples. With context parallelism a rank has the part of a response that `discrepancy.response_part` gives, with
    --allgather-cp too. Tensor-parallel ranks have the same. `Discrepancy.add_microbatch` takes it as it comes.
    """


@hookspec(firstresult=True)
def take_weight_quantization(args: Namespace, quantization: Mapping[str, Any]) -> bool | None:
    """slime is about to quantize weights for the engine (trainer): `quantization` is `--hf-checkpoint`'s format.

    Return True to do that yourself: `export_weights` then gets the weights as they are trained.
    """


@hookspec(firstresult=True)
def encode_for_gathering(
    args: Namespace, name: str, shape: tuple[int, int], dtype: torch.dtype, dim: int | None
) -> Encoding | None:
    """A parameter is about to be gathered from its ranks for a weight update (trainer, on each rank that has a part).

    `name` is Megatron's, as `decoder.layers.3.mlp.experts.linear_fc1.weight12`, with global numbers; `shape` [N, K] is
    of this rank's part, and `dim` says along which dimension it is one, None for a whole parameter. Return how it shall
    travel in place of itself (see `miles_plugins.Encoding`), the same on every rank; None leaves it. Not called for
    deltas on disk, which are gathered as they are.
    """


@hookspec(firstresult=True)
def decode_gathered(
    args: Namespace,
    name: str,
    gathered: torch.Tensor,
    convert: Callable[[torch.Tensor], Sequence[tuple[str, torch.Tensor]]],
) -> Sequence[tuple[str, torch.Tensor]] | None:
    """What `encode_for_gathering` encoded has come together (trainer, on the ranks that send).

    `gathered` is uint8, joined as the parameter would have been. Return the engine's names and tensors of it, which
    then go through `export_weights`. `convert(tensor)` is slime's own conversion of this parameter, for any tensor of
    its shape [N, K]: it picks the rows of each of the checkpoint's tensors.
    """


@hookspec
def export_weights(
    args: Namespace, named_tensors: Sequence[tuple[str, torch.Tensor]]
) -> Sequence[tuple[str, torch.Tensor]] | None:
    """Weights leave the trainer for the rollout engine (trainer), a batch at a time.

    `named_tensors` is what one Megatron parameter became: Hugging Face checkpoint names with full (gathered) tensors on
    the trainer's device, already quantized if `--hf-checkpoint` is, unless `take_weight_quantization`.
    Return the whole batch as the engine shall receive it: other values or dtypes, further tensors such as scales; None
    leaves it. Each plugin is given what the one before returned. Return new, contiguous tensors: those given may be the
    very parameters that are trained, and changing them is an error.

    Called on the ranks that send: every rank with `--colocate`, over nccl one a pipeline stage, to disk one a node. So
    use no collectives, and let the same weights give the same result on each. MLA's `q_a_proj` and `kv_a_proj_with_mqa`
    come as one batch.

    Covered is every way of slime's: colocated, nccl, disk, disk deltas; and `--save-hf`, which writes what the engine
    would receive, beside the unchanged config.json of `--hf-checkpoint`. Not covered is what an engine loads when it
    starts: the first sync replaces that before the first rollout. Only with `--update-weight-mode delta` the first sync
    sends nothing; and there names, shapes and dtypes must stay those of `--hf-checkpoint`. Frozen models beside the
    trained one are never sent.
    """


@hookspec
def step_metrics(args: Namespace) -> Mapping[str, float]:  # type: ignore[empty-body]
    """An optimizer step ended (trainer, every rank): numbers for slime's own tracking, logged as `train/<name>`.

    slime logs those of one rank: reduce over ranks in `pass_ends`.
    """


@hookspec
def metrics_logged(args: Namespace, metrics: Mapping[str, Any], step_key: str) -> None:
    """slime logged a set of metrics (driver, rollout_manager or trainer). `metrics[step_key]` is the step."""


@hookspec(firstresult=True)
def draft_targets(model: torch.nn.Module, microbatch: Microbatch) -> Targets | None:
    """A model with a draft (--mtp-num-layers) computes its output in training mode (trainer): what does that learn?

    Called in the forward pass of a microbatch, with gradients, on the last pipeline stage; not where activations are
    recomputed. `model` is Megatron's GPTModel, the actor's or another's; `microbatch` the one that runs. Return
    `miles_plugins.spec_rl.draft_loss.Targets` of its packed stream. None leaves the draft out: it is not computed then,
    as it never is in passes without gradient. Either way the model's output and gradients are those that it would have
    without a draft. The loss is scaled by --mtp-loss-scaling-factor, and reaches the draft's own parameters only.
    """


# -- every process ---------------------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def choose_device() -> str | None:
    """Where upstream computes (every process): `cpu` lets it run without an accelerator. The default is a GPU."""


@hookspec
def probe(role: str) -> str | None:
    """Show that the plugin really works in this process, once it is set up (every process).

    Return the evidence, one line; None where the plugin has nothing to show. Raise `PluginError` if it does not work.
    """

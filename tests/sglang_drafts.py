"""What a release of SGLang does with its draft in a weight update, in a process of its own: sglang_drafts.py WHEEL.

PYTHONPATH holds this repository. It prints JSON: scenario -> what was found. SGLang's own schedulers, weight updaters,
workers, runners, checkers and loaders act, under our real patches. What stands in: the models, of a few parameters,
which note what they are given; a broadcast that gives ones; `sgl_kernel`, which has no CPU build.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import MagicMock

HIDDEN = 4
SHARED = ("model.embed.weight", "lm_head.weight")
OWN = ("mtp.0.fc.weight", "mtp.0.norm.weight", "mtp.1.fc.weight", "mtp.1.norm.weight")
TRAINED = (*SHARED, "model.layers.0.weight", *OWN)  # what a trainer with a draft sends
WITHOUT_DRAFT = TRAINED[: -len(OWN)]
KINDS = ("eagle v1", "eagle v2", "multi-layer v2", "standalone v2", "dflash", "ngram", "none")
WAYS = ("tensor", "distributed", "flattened", "disk")
run = SimpleNamespace(events=[], broadcasts=0)


def sglang(name: str) -> Any:
    return importlib.import_module(f"sglang.srt.{name}")


def exists(name: str) -> bool:
    try:
        return find_spec(f"sglang.srt.{name}") is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


# -- models that note what they are given ------------------------------------------------------------------------------


class Packed:
    """A quantised layer's method, as far as an update calls it."""

    def __init__(self, model: str) -> None:
        self.model = model

    def restore_weights_before_loading(self, layer: Any) -> None:
        run.events.append([self.model, "restored"])

    def process_weights_after_loading(self, layer: Any) -> None:
        run.events.append([self.model, "processed"])


def model_classes() -> tuple[type, type]:
    import torch

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        """Names of the checkpoint -> its parameters; it passes over others, as SGLang's models do."""

        def __init__(self, label: str, parameters: dict[str, Sequence[int]]) -> None:
            super().__init__()
            self.label = label
            self.names = {}
            for name, shape in parameters.items():
                attribute = name.replace(".", "_")
                self.register_parameter(attribute, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
                self.names[name] = attribute
            self.packed = torch.nn.Linear(1, 1, bias=False)
            self.packed.quant_method = Packed(label)
            self.unfinished = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # no checkpoint has it

        def load_weights(self, weights: Any) -> None:
            load = sglang("model_loader.weight_utils").default_weight_loader
            given = list(weights)
            run.events.append([self.label, [name for name, _ in given]])
            for name, tensor in given:
                if name in self.names:
                    load(getattr(self, self.names[name]), tensor)

        def values(self) -> dict[str, list[float]]:
            return {name: sorted(set(getattr(self, each).flatten().tolist())) for name, each in self.names.items()}

    class Target(Model):
        def __init__(self, **kwargs: Any) -> None:
            shapes = dict.fromkeys(WITHOUT_DRAFT, (HIDDEN, HIDDEN))
            super().__init__("target", shapes)

    class Draft(Model):
        def __init__(self, draft_model_idx: int | None = None, **kwargs: Any) -> None:
            own = {f"mtp.{layer}.{name}.weight": None for layer in (0, 1) for name in ("fc", "norm")}
            if draft_model_idx is not None:
                own = {name: None for name in own if name.startswith(f"mtp.{draft_model_idx}.")}
            wide = 2 * HIDDEN + run.wider
            shapes = {name: (HIDDEN, wide) if "fc" in name else (HIDDEN,) for name in own}
            label = "draft" if draft_model_idx is None else f"draft {draft_model_idx}"
            super().__init__(label, {**dict.fromkeys(SHARED, (HIDDEN, HIDDEN)), **shapes})

    return Target, Draft


def shape_of(name: str) -> list[int]:
    return [HIDDEN, 2 * HIDDEN] if "fc" in name else [HIDDEN] if "norm" in name else [HIDDEN, HIDDEN]


def checkpoint(names: Sequence[str], value: float) -> list[tuple[str, Any]]:
    import torch

    return [(name, torch.full(shape_of(name), value)) for name in names]


# -- an engine ---------------------------------------------------------------------------------------------------------


class Engine:
    """SGLang's scheduler with a target and a draft worker, after both have read their checkpoints."""

    def __init__(self, kind: str) -> None:
        from miles_plugins.patches.sglang import weights

        weights._scheduler = SimpleNamespace(server_args=None)  # as while SGLang builds its models
        self.target = self.runner(0)
        self.drafts: list[Any] = []
        target_worker = self.worker(sglang("managers.tp_worker").TpModelWorker, [self.target])
        self.target_worker = target_worker
        self.draft_worker = getattr(self, kind.replace(" ", "_").replace("-", "_"))()
        for runner in self.drafts:  # as set_embed_and_head
            for name in SHARED:
                setattr(
                    runner.model, runner.model.names[name], getattr(self.target.model, self.target.model.names[name])
                )
        self.flushes = 0
        self.scheduler, self.updater = self.schedule()
        weights._scheduler = self.scheduler
        run.events.clear()
        run.broadcasts = 0

    def runner(self, number: int | None, draft: bool = False) -> Any:
        """A ModelRunner, its model built by SGLang's loader."""
        loader = sglang("model_loader.loader")
        kind = run.draft_class if draft else run.target_class
        config = SimpleNamespace(hf_config=SimpleNamespace(), is_draft_model=draft)
        with (
            mock.patch.object(loader, "get_model_architecture", return_value=(kind, "")),
            mock.patch.object(loader, "resolve_shared_experts_config", return_value=None, create=True),
            mock.patch.object(loader, "get_model", create=True),
            mock.patch.object(loader, "check_stage_producers", create=True),
        ):
            model = loader._initialize_model(config, SimpleNamespace(draft_model_idx=number if draft else None))
        model.load_weights(checkpoint(TRAINED if draft and not run.wider else WITHOUT_DRAFT, 1.0))
        runner = object.__new__(sglang("model_executor.model_runner").ModelRunner)
        group = {"group": None}
        vars(runner).update(model=model, device="cpu", tp_rank=0, gpu_id=0, is_draft_worker=draft)
        vars(runner).update(server_args=SimpleNamespace(custom_weight_loader=[]), _model_update_group=group)
        checker = object.__new__(sglang("utils.weight_checker").WeightChecker)
        vars(checker).update(_model_runner=runner, _get_model=lambda: model)
        runner._weight_checker = checker
        if exists("model_executor.model_runner_components.weight_updater"):
            updater = sglang("model_executor.model_runner_components.weight_updater")
            runner.weight_updater = updater.WeightUpdater(
                tp_rank=0,
                device="cpu",
                gpu_id=0,
                model_config=config,
                custom_weight_loaders={},
                get_model=lambda: model,
                update_model_fields=lambda **_: None,
                recapture_cuda_graph=lambda: None,
                get_model_runner=lambda: runner,
                _model_update_group=group,
            )
        else:
            runner.update_weights_from_disk = lambda *args, **kwargs: self.read(model, *args, **kwargs)
        return runner

    @staticmethod
    def read(model: Any, path: str, load_format: str | None, **kwargs: Any) -> tuple[bool, str]:
        """In place of reading files: what the folder would hold."""
        model.load_weights(checkpoint(json.loads(Path(path, "names").read_text()), 2.0))
        return True, "read"

    @staticmethod
    def worker(kind: Any, runners: Sequence[Any], draft: bool = False) -> Any:
        worker = object.__new__(kind)
        vars(worker).update(_model_runner=runners[0], model_runner_list=list(runners), tp_rank=0, is_draft_worker=draft)
        return worker

    # Workers as their constructors leave them.

    def eagle_v1(self) -> Any:
        self.drafts = [self.runner(None, draft=True)]
        worker = self.worker(sglang("speculative.eagle_worker").EAGLEWorker, self.drafts, draft=True)
        worker.target_worker = self.target_worker
        return worker

    def second_generation(self, outer: Any, inner: Any, runners: list[Any], **more: Any) -> Any:
        self.drafts = runners
        draft, worker = object.__new__(inner), object.__new__(outer)
        of_draft = self.worker(sglang("managers.tp_worker").TpModelWorker, runners, draft=True)
        vars(draft).update(draft_worker=of_draft, draft_runner=runners[0], **more)
        vars(worker).update(_draft_worker=draft, _target_worker=self.target_worker, tp_rank=0, speculative_num_steps=2)
        return worker

    def eagle_v2(self) -> Any:
        module = sglang("speculative.eagle_worker_v2")
        return self.second_generation(module.EAGLEWorkerV2, module.EagleDraftWorker, [self.runner(None, draft=True)])

    def standalone_v2(self) -> Any:
        module = sglang("speculative.standalone_worker_v2")
        return self.second_generation(
            module.StandaloneWorkerV2, module.StandaloneDraftWorker, [self.runner(None, draft=True)]
        )

    def multi_layer_v2(self) -> Any:
        module = sglang("speculative.multi_layer_eagle_worker_v2")
        runners = [self.runner(number, draft=True) for number in (0, 1)]
        return self.second_generation(
            module.MultiLayerEagleWorkerV2, module.MultiLayerEagleDraftWorker, runners, draft_runner_list=runners
        )

    def dflash(self) -> Any:
        self.drafts = [self.runner(None, draft=True)]
        of_draft = self.worker(sglang("managers.tp_worker").TpModelWorker, self.drafts, draft=True)
        if exists("speculative.dflash_worker"):
            worker = object.__new__(sglang("speculative.dflash_worker").DFlashWorker)
            vars(worker).update(target_worker=self.target_worker, draft_worker=of_draft)
        else:
            worker = object.__new__(sglang("speculative.dflash_worker_v2").DFlashWorkerV2)
            of_draft.draft_runner = self.drafts[0]
            vars(worker).update(_target_worker=self.target_worker, _draft_worker=of_draft)
        vars(worker).update(draft_model_runner=self.drafts[0], model_runner=self.target, tp_rank=0)
        return worker

    def ngram(self) -> Any:
        worker = object.__new__(sglang("speculative.ngram_worker").NGRAMWorker)
        vars(worker).update(target_worker=self.target_worker, _target_worker=self.target_worker, tp_rank=0)
        vars(worker).update({"model_runner": self.target})
        return worker

    def none(self) -> Any:
        return None

    def flush(self, *args: Any, **kwargs: Any) -> bool:
        self.flushes += 1
        return True

    def schedule(self) -> tuple[Any, Any]:
        """A scheduler, and what updates its weights: itself, or a part of it."""
        scheduler = object.__new__(sglang("managers.scheduler").Scheduler)
        common = {"tp_worker": self.target_worker, "draft_worker": self.draft_worker, "flush_cache": self.flush}
        vars(scheduler).update(**common, tp_cpu_group=None, server_args=SimpleNamespace())
        if not exists("managers.scheduler_components.weight_updater"):
            return scheduler, scheduler
        module = sglang("managers.scheduler_components.weight_updater")
        known = module.SchedulerWeightUpdaterManager.__dataclass_fields__
        later = MagicMock(name="scheduler")
        more = {"tp_cpu_group": None, "memory_saver_adapter": None, "is_fully_idle": lambda: True, "scheduler": later}
        given = {name: value for name, value in {**common, **more}.items() if name in known and known[name].init}
        updater = module.SchedulerWeightUpdaterManager(**given)
        return scheduler, updater

    # Requests, as slime sends them.

    def update(self, way: str, names: Sequence[str], value: float = 2.0) -> bool:
        import torch

        structs = sglang("managers.io_struct")
        bucket = sglang("weight_sync.tensor_bucket").FlattenedTensorBucket
        if way == "tensor":
            bucketed = bucket(named_tensors=checkpoint(names, value))
            payload = {"flattened_tensor": bucketed.get_flattened_tensor(), "metadata": bucketed.get_metadata()}
            request = structs.UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=["handles"], load_format="flattened_bucket", flush_cache=True
            )
            serializer = sglang("utils").MultiprocessingSerializer  # of handles to a GPU's memory
            with mock.patch.object(serializer, "deserialize", return_value=payload):
                answer = self.updater.update_weights_from_tensor(request)
        elif way == "disk":
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "names").write_text(json.dumps(names))
                request = structs.UpdateWeightFromDiskReqInput(model_path=folder)
                if exists("model_executor.model_runner_components.weight_updater"):
                    self.patch_reading()
                answer = self.updater.update_weights_from_disk(request)
        else:
            request = structs.UpdateWeightsFromDistributedReqInput(
                names=list(names),
                dtypes=["float32"] * len(names),
                shapes=[shape_of(name) for name in names],
                group_name="group",
                load_format="flattened_bucket" if way == "flattened" else None,
                flush_cache=True,
            )

            def broadcast(tensor: Any, **kwargs: Any) -> Any:
                run.broadcasts += 1
                tensor.view(torch.float32).fill_(value)  # a bucket is of bytes
                return SimpleNamespace(wait=lambda: None)

            with mock.patch.object(torch.distributed, "broadcast", broadcast):
                answer = self.updater.update_weights_from_distributed(request)
        return bool(answer.success)

    def patch_reading(self) -> None:
        updater = sglang("model_executor.model_runner_components.weight_updater").WeightUpdater
        updater.update_weights_from_disk = lambda self, *args, **kwargs: Engine.read(self.get_model(), *args, **kwargs)

    def say(self, action: str) -> str:
        """What slime's engine actor says at the beginning and the end; the complaint, if any."""
        structs = sglang("managers.io_struct")
        sessions = hasattr(structs, "BeginWeightUpdateReqInput")
        from miles_plugins.compat.sglang_weights import BEGIN, END

        if sessions and action == BEGIN:
            self.updater.begin_weight_update(structs.BeginWeightUpdateReqInput())
        answer = self.updater.check_weights(structs.CheckWeightsReqInput(action=action))
        if sessions and action == END and answer.success:
            self.updater.end_weight_update(structs.EndWeightUpdateReqInput())
        return "" if answer.success else answer.message

    def whole(self, way: str, names: Sequence[str]) -> dict[str, Any]:
        """One update in two parts, from pause to continue."""
        from miles_plugins.compat.sglang_weights import BEGIN, END

        half = len(names) // 2
        parts = [names] if way == "disk" else [names[:half], names[half:]]
        complaint = self.say(BEGIN)
        succeeded = [self.update(way, part) for part in parts if not complaint]
        complaint = complaint or self.say(END)
        return {
            "events": list(run.events),
            "succeeded": succeeded,
            "complaint": complaint,
            "flushes": self.flushes,
            "broadcasts": run.broadcasts,
            "values": {each.label: each.values() for each in self.models()},
            "judged": list(run.judged),
        }

    def models(self) -> list[Any]:
        return [self.target.model, *(runner.model for runner in self.drafts)]


@contextmanager
def role(name: str | None) -> Iterator[None]:
    """What the engine's actor says of the draft."""
    from miles_plugins.patches.sglang.draft import DRAFT

    os.environ.pop(DRAFT, None)
    if name:
        os.environ[DRAFT] = name
    try:
        yield
    finally:
        os.environ.pop(DRAFT, None)


def attempted(function: Callable[[], Any]) -> Any:
    run.events.clear()
    run.judged.clear()
    run.wider = 0
    try:
        return function()
    except Exception:
        return {"raised": traceback.format_exc()}


def here(kind: str) -> bool:
    """Whether this release has such a worker, and can import it."""
    modules = {
        "eagle v1": ("speculative.eagle_worker",),
        "dflash": ("speculative.dflash_worker", "speculative.dflash_worker_v2"),
    }
    return kind not in modules or any(map(exists, modules[kind]))


def one(kind: str, way: str, said: str | None, names: Sequence[str] = TRAINED) -> Any:
    with role(said):
        return Engine(kind).whole(way, names)


def another_shape(way: str) -> Any:
    run.wider = 1
    return one("eagle v2", way, "trained")


def a_way_past_us() -> Any:
    """An update that reaches the target as SGLang by itself would bring it there."""
    from miles_plugins.compat.sglang_weights import BEGIN, END
    from miles_plugins.patches.sglang import draft

    with role("trained"):
        engine = Engine("eagle v2")
        engine.say(BEGIN)
        with mock.patch.object(draft, "role", return_value=None):
            target = engine.target.model
            target.load_weights(checkpoint(TRAINED, 2.0))
        return engine.say(END)


# -- forward equivalence of the input projections ----------------------------------------------------------------------


class Projected(Exception):
    """Carries what the projection gave."""


def projection_of(family: str, weight: Any, embedding: Any, hidden: Any) -> Any:
    """What SGLang's model feeds its draft layer with: its own forward, with norms that double and treble."""

    def project(x: Any) -> Any:
        raise Projected(x @ weight.T)

    stand_in = MagicMock(name=family)
    batch = MagicMock(name="ForwardBatch")
    batch.spec_info.hidden_states = hidden.clone()
    batch.forward_mode.is_idle.return_value = False
    batch.forward_mode.is_extend.return_value = False
    batch.contains_mm_inputs.return_value = False
    ids, positions = run.torch.arange(len(hidden)), run.torch.arange(1, len(hidden) + 1)
    batch.mm_input_embeds = None
    stand_in.embed_tokens = stand_in.model.embed_tokens = stand_in.embed_input_ids = lambda *_: embedding.clone()
    double, treble = (lambda x: 2 * x), (lambda x: 3 * x)
    stand_in.rot_weight = None
    names = {
        "mimo": ("token_layernorm", "hidden_layernorm", "input_proj"),
        "deepseek": ("enorm", "hnorm", "eh_proj"),
        "glm4_moe": ("enorm", "hnorm", "eh_proj"),
        "qwen3_next": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
        "qwen3_5": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc"),
    }
    for name, value in zip(names[family], (double, treble, project), strict=True):
        setattr(stand_in, name, value)
    classes = {
        "mimo": ("models.mimo_mtp", "MiMoMultiTokenPredictorLayer"),
        "deepseek": ("models.deepseek_nextn", "DeepseekModelNextN"),
        "glm4_moe": ("models.glm4_moe_nextn", "Glm4MoeModelNextN"),
        "qwen3_next": ("models.qwen3_next_mtp", "Qwen3NextForCausalLMMTP"),
        "qwen3_5": ("models.qwen3_5_mtp", "Qwen3_5ForCausalLMMTP"),
    }
    module, name = classes[family]
    try:
        getattr(sglang(module), name).forward(stand_in, ids, positions, batch)
    except Projected as found:
        return found.args[0].tolist()
    raise AssertionError("its projection was not reached")


def projection(family: str) -> Any:
    return projection_of(family, *inputs())


def inputs() -> tuple[Any, Any, Any]:
    """The projection's weight in a checkpoint, embeddings and hidden states: small whole numbers, exact in float32."""
    import torch

    generator = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Any:
        return torch.randint(-4, 5, shape, generator=generator).float()

    return numbers(HIDDEN, 2 * HIDDEN), numbers(3, HIDDEN), numbers(3, HIDDEN)


FAMILIES = ("mimo", "deepseek", "glm4_moe", "qwen3_next", "qwen3_5")


# -- all of it ---------------------------------------------------------------------------------------------------------


def main(wheel: str) -> None:
    logging.disable(logging.CRITICAL)
    sys.path.insert(0, wheel)
    from tests.test_sglang_routing import NoKernels

    if find_spec("sgl_kernel") is None:
        sys.meta_path.insert(0, NoKernels())  # type: ignore[arg-type]
    import torch

    from miles_plugins import activation, hookimpl
    from miles_plugins.manager import Installed, Plugin, Plugins
    from miles_plugins.patches.seam import patch_set

    run.torch, run.wider, run.judged = torch, 0, []
    module = types.ModuleType("recorder")
    module.__file__ = ""

    def after_weight_update(received: Any) -> None:
        run.judged.append(len(received))

    hooks = {
        "draft_is_trained": lambda: None,
        "after_weight_update": after_weight_update,
        "choose_device": lambda: "cpu",
    }
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    plugins = Plugins([Plugin(Installed("recorder", "recorder", "1.0", None), module)])
    activation._current = activation.Activation(plugins, "sglang_child", "lab")
    wanted = ("drafts at the engine", "weights at the engine", "torchvision operators")
    patches = patch_set(seam for seam in activation._current.seams if seam.name in wanted)
    patches.arm()
    sglang("managers.scheduler")
    sglang("model_loader.loader")
    torch.distributed.barrier = lambda *args, **kwargs: None
    torch.distributed.get_world_size = lambda *args, **kwargs: 1
    parallel = MagicMock(name="parallel")
    parallel.tp_rank = 0
    settings = MagicMock(name="model settings")
    settings.weight_cache_mode = "off"
    for name in (
        *("managers.scheduler_components.weight_updater", "managers.tp_worker"),
        "model_executor.model_runner_components.weight_updater",
    ):
        if exists(name):
            each = sglang(name)
            for attribute, value in (("get_parallel", parallel), ("get_model", settings)):
                if hasattr(each, attribute):
                    setattr(each, attribute, lambda value=value: value)
    run.target_class, run.draft_class = model_classes()
    found: dict[str, Any] = {}
    for kind in filter(here, KINDS):
        for way in WAYS:
            for said in ("trained", "frozen", None):
                found[f"{kind}, {way}, {said}"] = attempted(lambda k=kind, w=way, s=said: one(k, w, s))
    for way in WAYS:
        found[f"no draft layers, {way}"] = attempted(lambda w=way: one("eagle v2", w, "trained", WITHOUT_DRAFT))
        found[f"half a layer, {way}"] = attempted(lambda w=way: one("eagle v2", w, "trained", TRAINED[:-1]))
    found["another shape"] = attempted(lambda: another_shape("distributed"))
    found["past us"] = attempted(a_way_past_us)
    for family in FAMILIES:
        found[f"projection of {family}"] = attempted(lambda f=family: projection(f))
    found["patches"] = {record.patch.id: [record.state.value, record.detail] for record in patches.records()}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

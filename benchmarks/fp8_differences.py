"""How far trainer and rollout are apart under FP8, in each configuration: `python -m benchmarks.fp8_differences`.

Same implementation: one Megatron model computes the same tokens twice, as the rollout (the checkpoint's codes, through
the plugin's engine) and as the trainer. Nothing is different but what a row names, so a difference is what that costs;
the trainer uses the rollout's experts, as with `--plugins r3`, and the last columns say what happens without: the mean
difference, and how many of the (token, layer) pairs have another set of experts. Every token is one that the rollout
would have sampled there, which makes k3 an estimate of KL(rollout || trainer).

Two implementations: the embedded host (Megatron's policy, transformers' engine) trains with r3. FP8 enlarges what two
implementations differ by, for a value close to the middle between two codes becomes the one or the other, 6 to 12 %
apart: the floor is what bfloat16 gives, not zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from miles_plugins import Linear, products
from miles_plugins.console import read_metrics, steps_of, table
from miles_plugins.cpu_rehearsal.tiny_model import write_tiny_model
from miles_plugins.discrepancy import Discrepancy
from miles_plugins.embedded import arguments, command
from miles_plugins.embedded.hugging_face import read_tensors
from miles_plugins.embedded.policy import build_policy, hugging_face_names, join, load_weights, shape_of
from miles_plugins.embedded.trainer import _packed
from miles_plugins.fp8_unified import blockwise, chosen, product
from miles_plugins.fp8_unified.aligned import AlignedLinear, rows_of_checkpoint
from miles_plugins.fp8_unified.blockwise import Format, Quantised, dequantise, quantise_weight
from miles_plugins.fp8_unified.checkpoint import WEIGHT
from miles_plugins.fp8_unified.converter import convert_to_fp8
from miles_plugins.fp8_unified.engine import Products, multiply_in_fp8
from miles_plugins.linears import expert_groups, linear_layers
from miles_plugins.manager import Plugins
from miles_plugins.places import Place, place, require_all

FP32, POW2 = Format(), Format(scale="power_of_two")
Compute = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[int]], torch.Tensor]

# -- what breaks a rule (miles_plugins/fp8_unified/rules): a weight of the checkpoint, otherwise quantised -------------


def trainer_blocks(weight: torch.Tensor) -> Quantised:
    """fp8.trainer-blocks: the blocks of a shard whose first row is in the middle of one of the checkpoint's blocks.

    The scales are those of MISALIGNED.
    """
    codes, scale_inv = quantise_weight(torch.nn.functional.pad(weight, (0, 0, 64, 0)), FP32)
    return Quantised(codes[64:], scale_inv.repeat_interleave(2, 0)[1 : 1 + -(-len(weight) // 64)])


MISALIGNED = Format((64, 128))


def loaded_scales(weight: torch.Tensor) -> Quantised:
    """fp8.loaded-scales: a checkpoint with fp32 scales, quantised a second time by SGLang on Blackwell."""
    return blockwise.requantise_power_of_two(quantise_weight(weight, FP32), POW2).quantised


def slimes_sync(weight: torch.Tensor) -> Quantised:
    """slime's weight update: x * (1 / (amax / 448)). With divisions rounded correctly, which Triton's there are not."""
    tiles, scale = _slimes(weight, 1e-10)
    return _cut(weight, tiles * (torch.ones_like(scale) / scale), scale)


def slimes_converter(weight: torch.Tensor) -> Quantised:
    """slime's tools/convert_hf_to_fp8.py: x / (amax / 448)."""
    tiles, scale = _slimes(weight, 1e-12)
    return _cut(weight, tiles / scale, scale)


def _slimes(weight: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % 128, 0, -n % 128))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=least)
    return tiles, amax / torch.full_like(amax, blockwise.LARGEST)


def _cut(weight: torch.Tensor, scaled: torch.Tensor, scale: torch.Tensor) -> Quantised:
    values = scaled.clamp(-blockwise.LARGEST, blockwise.LARGEST).flatten(2).flatten(0, 1)
    return Quantised(values[: len(weight), : weight.shape[1]].to(torch.float8_e4m3fn), scale[:, 0, :, 0])


# -- the two sides ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One linear layer of the model, with the checkpoint's tensors of it: [n, K] bfloat16 each, by name."""

    args: Namespace
    linear: Linear
    tensors: Mapping[str, torch.Tensor]

    def by_tensor(self, multiply: Callable[[torch.Tensor, str], torch.Tensor]) -> Compute:
        """Compute `multiply(x, name)` for each of them, and put the outputs in Megatron's order."""

        def compute(x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
            outputs = [multiply(x, name).t() for name in self.tensors]
            return join(self.args, f"{self.linear.name}.weight", outputs).t().contiguous()

        return compute

    def with_codes(self, quantise: Callable[[torch.Tensor], Quantised], format: Format) -> Compute:
        """The engine's product with whatever codes."""
        codes = {name: quantise(tensor) for name, tensor in self.tensors.items()}
        return self.by_tensor(lambda x, name: product.linear(x, [codes[name]], [len(x)], format))


@dataclass(frozen=True)
class Side:
    """How one side computes: `compute` of a layer, and where the router's probabilities are multiplied in.

    Attributes:
        before: into the input of the experts' second layer, as Megatron does by itself; else its output.
    """

    compute: Callable[[Layer], Compute]
    before: bool = False


def engine(layer: Layer, format: Format) -> Compute:
    """The rollout's: the engine's model has the checkpoint's codes, dequantised, and torch hands over its products."""
    modules = torch.nn.ModuleDict()
    for name, tensor in layer.tensors.items():
        modules[name.replace(".", "/")] = module = torch.nn.Linear(*reversed(tensor.shape), bias=False)
        module.weight = torch.nn.Parameter(dequantise(quantise_weight(tensor, format), format).bfloat16(), False)
    multiply_in_fp8(modules, lambda name: True, format, Products())
    return layer.by_tensor(lambda x, name: modules[name.replace(".", "/")](x))


def aligned(layer: Layer, format: Format) -> Compute:
    """The trainer's, under --fp8-train aligned."""
    return AlignedLinear(layer.linear, format, *rows_of_checkpoint(layer.args, layer.linear), in_pass=lambda: "train")


def plain(layer: Layer) -> Compute:
    """The trainer's, under --fp8-train off."""
    return lambda x, weights, rows: x @ weights[0].t()


def exact_sums(layer: Layer) -> Compute:
    """bfloat16, but summed in float64: another kernel."""
    return lambda x, weights, rows: (x.double() @ weights[0].double().t()).bfloat16()


def weights_alone(layer: Layer) -> Compute:
    """The rollout's weights, but no activations in FP8: quantisation-aware training."""
    values = {name: blockwise.fake_quantise_weight(tensor, FP32) for name, tensor in layer.tensors.items()}
    return layer.by_tensor(lambda x, name: x @ values[name].t())


def recipe(layer: Layer) -> Compute:
    """fp8.recipe: Megatron's `tensorwise`, one scale for a weight and one for its input."""
    codes = {name: blockwise.per_tensor(tensor) for name, tensor in layer.tensors.items()}

    def multiply(x: torch.Tensor, name: str) -> torch.Tensor:
        one, weight, blocks = blockwise.per_tensor(x), codes[name], -(-x.shape[1] // 128)
        spread = Quantised(weight.codes, weight.scale_inv.expand(-(-len(weight.codes) // 128), blocks))
        return product.multiply(Quantised(one.codes, one.scale_inv.expand(len(x), blocks)), spread, FP32)

    return layer.by_tensor(multiply)


def other_sums(layer: Layer) -> Compute:
    """The rollout's codes and scales, but sums in float32 and in another order: another kernel."""
    values = {name: dequantise(quantise_weight(tensor, FP32), FP32) for name, tensor in layer.tensors.items()}

    def multiply(x: torch.Tensor, name: str) -> torch.Tensor:
        return (dequantise(blockwise.quantise_rows(x, FP32), (1, 128)) @ values[name].t()).bfloat16()

    return layer.by_tensor(multiply)


BF16 = Side(plain)
FP8, FP8_POW2 = Side(lambda layer: engine(layer, FP32)), Side(lambda layer: engine(layer, POW2))
UNIFIED, UNIFIED_POW2 = Side(lambda layer: aligned(layer, FP32)), Side(lambda layer: aligned(layer, POW2))


@dataclass(frozen=True)
class Configuration:
    """A row: both sides, and the rule that is broken."""

    name: str
    rule: str
    rollout: Side
    trainer: Side


ALONE = "bfloat16 trainer (--fp8-train off)"
"""The row that the others are compared with: nothing was done about FP8."""
CONFIGURATIONS = (
    Configuration("bfloat16 on both sides", "", BF16, BF16),
    Configuration("bfloat16, summed in float64", "", BF16, Side(exact_sums)),
    Configuration("bfloat16, probabilities before fc2", "", BF16, Side(plain, before=True)),
    Configuration("unified", "", FP8, UNIFIED),
    Configuration("unified, powers of two", "", FP8_POW2, UNIFIED_POW2),
    Configuration(ALONE, "", FP8, Side(plain, before=True)),
    Configuration("FP8 weights alone in the trainer", "", FP8, Side(weights_alone)),
    Configuration("powers of two in the trainer alone", "fp8.scale-kind", FP8, UNIFIED_POW2),
    Configuration("probabilities before fc2", "fp8.router-probabilities", FP8, Side(UNIFIED.compute, before=True)),
    Configuration(
        "probabilities before fc2, powers of two",
        "fp8.router-probabilities",
        FP8_POW2,
        Side(UNIFIED_POW2.compute, before=True),
    ),
    Configuration(
        "blocks that begin 64 rows later",
        "fp8.trainer-blocks",
        FP8,
        Side(lambda layer: layer.with_codes(trainer_blocks, MISALIGNED)),
    ),
    Configuration("one scale a tensor in the trainer", "fp8.recipe", FP8, Side(recipe)),
    Configuration(
        "quantised twice by the engine",
        "fp8.loaded-scales",
        Side(lambda layer: layer.with_codes(loaded_scales, POW2)),
        UNIFIED_POW2,
    ),
    Configuration("the same codes, summed in float32", "", FP8, Side(other_sums)),
    Configuration(
        "weights by slime's weight update", "", Side(lambda layer: layer.with_codes(slimes_sync, FP32)), UNIFIED
    ),
    Configuration(
        "weights by slime's converter", "", Side(lambda layer: layer.with_codes(slimes_converter, FP32)), UNIFIED
    ),
)

# -- one model, which computes as either side -------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    hidden: int = 512
    layers: int = 4
    experts: int = 8
    topk: int = 2
    samples: int = 16
    length: int = 64


QUICK = Sizes(hidden=256, layers=2, samples=8, length=48)


class Routing:
    """Stands where one of Megatron's routers asks for its top-k, as r3's does (patches/megatron/router.py)."""

    def __init__(self) -> None:
        self.chosen: torch.Tensor | None = None
        self.replayed: torch.Tensor | None = None

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: Any, group_topk: Any, default_compute_topk: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.replayed is not None:
            return scores.gather(1, self.replayed), self.replayed
        probabilities, self.chosen = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        assert self.chosen is not None
        return probabilities, self.chosen


def _spread(folder: Path, seed: int) -> None:
    """Multiply each matrix of a checkpoint with another number, so that the scales have all kinds of mantissas."""
    generator = torch.Generator().manual_seed(seed)
    tensors = read_tensors(folder)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = (tensor.float() * 2 ** (torch.rand((), generator=generator) - 0.5)).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Model:
    """A tiny Qwen3-MoE, of which the layers that its FP8 checkpoint has quantised compute as one of the sides."""

    def __init__(self, args: Namespace, folder: Path, seed: int, sizes: Sizes) -> None:
        write_tiny_model(
            folder,
            seed=seed,
            layers=sizes.layers,
            hidden_size=sizes.hidden,
            experts=sizes.experts,
            topk=sizes.topk,
            initializer_range=0.8 * sizes.hidden**-0.5,  # so that layers matter to the output, as in a trained model
        )
        _spread(folder, seed)
        shape = shape_of(json.loads((folder / "config.json").read_text()), folder)
        args = Namespace(**{**vars(args), **shape, "hf_checkpoint": folder})
        self._policy = build_policy(args, torch.device("cpu"))
        tensors = read_tensors(folder)
        load_weights(args, self._policy, tensors, folder)
        convert_to_fp8(folder, fp8 := folder.with_name(folder.name + "-fp8"))
        quantised = chosen.read(fp8)
        self._layers: list[Layer] = []
        self._computes: dict[str, Compute] = {}
        self._used: set[str] = set()
        places: Counter[Place] = Counter()
        for linear in linear_layers([self._policy]):
            where = place(linear)
            if where is not None and quantised.has(linear):
                names = hugging_face_names(f"{linear.name}.weight")
                assert {name.removesuffix(WEIGHT) for name in names} <= quantised.modules
                self._layers.append(Layer(args, linear, {name: tensors[name] for name in names}))
                products.attach(linear, self._as_now(linear.name), "fp8_differences")
                places[where] += 1
        require_all([self._policy], quantised.places, places)
        self._experts = list(expert_groups([self._policy]))
        self._before = [experts.forward for experts in self._experts]
        for experts in self._experts:
            products.weigh_outputs(experts)
        self._after = [experts.forward for experts in self._experts]
        self._routings: list[Routing] = []
        for module in self._policy.modules():
            if hasattr(module, "router_replay"):
                module.router_replay = Routing()
                self._routings.append(module.router_replay)
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, args.vocab_size, (sizes.samples, sizes.length), generator=generator)

    def _as_now(self, name: str) -> Compute:
        def compute(x: torch.Tensor, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
            self._used.add(name)
            return self._computes[name](x, weights, rows)

        return compute

    def log_probs(self, side: Side, replayed: Sequence[torch.Tensor] | None = None) -> Evaluation:
        """Of every token that could come next, after each token: [tokens, vocabulary]."""
        self._computes = {layer.linear.name: side.compute(layer) for layer in self._layers}
        self._used.clear()
        for experts, forward in zip(self._experts, self._before if side.before else self._after, strict=True):
            experts.forward = forward
        for number, routing in enumerate(self._routings):
            routing.replayed = None if replayed is None else replayed[number]
        samples, length = self.tokens.shape
        bounds = torch.arange(samples + 1) * length
        output = self._policy(self.tokens.reshape(1, -1), None, None, packed_seq_params=_packed(bounds))
        assert self._used == self._computes.keys()
        experts = [routing.chosen for routing in self._routings if routing.chosen is not None]
        return Evaluation(output[0].float().log_softmax(dim=-1), experts)


@dataclass(frozen=True)
class Evaluation:
    log_probs: torch.Tensor
    experts: list[torch.Tensor]  # [tokens, topk] for each layer


@dataclass(frozen=True)
class Row:
    """What was measured of one configuration, in nats.

    Attributes:
        equal: whether all log-probabilities are the same bits.
        mean, p99, maximum, k3: with the rollout's experts.
        own_mean: the mean difference where the trainer's routers choose.
        experts_differ: how many of the (token, layer) pairs then have another set of experts.
    """

    name: str
    rule: str
    equal: bool
    mean: float
    p99: float
    maximum: float
    k3: float
    own_mean: float
    experts_differ: float


def same_implementation(args: Namespace, seed: int, sizes: Sizes) -> list[Row]:
    """Every configuration, of one model."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Model(args, Path(folder) / "model", seed, sizes)
        rollouts: dict[Side, Evaluation] = {}
        for each in CONFIGURATIONS:
            if each.rollout not in rollouts:
                rollouts[each.rollout] = model.log_probs(each.rollout)
            rollout = rollouts[each.rollout]
            replayed = model.log_probs(each.trainer, rollout.experts)
            rows.append(_row(each, seed, rollout, replayed, model.log_probs(each.trainer)))
    return rows


def _row(of: Configuration, seed: int, rollout: Evaluation, replayed: Evaluation, own: Evaluation) -> Row:
    generator = torch.Generator().manual_seed(seed)
    sampled = rollout.log_probs.exp().multinomial(1, generator=generator)
    of_rollout = rollout.log_probs.gather(1, sampled)[:, 0]
    results = []
    for trainer in (replayed, own):
        difference = Discrepancy()
        difference.add(trainer.log_probs.gather(1, sampled)[:, 0], of_rollout, torch.ones(len(sampled)))
        results.append(difference.result())
    pairs = zip(rollout.experts, own.experts, strict=True)
    differ = torch.cat([(one.sort().values != other.sort().values).any(dim=1) for one, other in pairs])
    first, second = results
    return Row(
        of.name,
        of.rule,
        torch.equal(rollout.log_probs, replayed.log_probs),
        *(first.mean, first.p99, first.maximum, first.k3),
        second.mean,
        float(differ.double().mean()),
    )


@contextmanager
def megatron(threads: int = 1) -> Iterator[Namespace]:
    """Megatron in this process, with the patches of the embedded host, which stay; gives its arguments."""
    args = arguments.parse([f"--threads={threads}"], Plugins.named([]))
    arguments.complete(args)
    _, device = command._activate(Plugins.named(["fp8"]), args)  # for Megatron's local layers to ask for products
    with command._megatron(args, device):
        yield args


def means(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """Over models."""
    numbers = [field.name for field in fields(Row) if field.name not in ("name", "rule", "equal")]
    return [
        Row(
            rows[0].name,
            rows[0].rule,
            all(row.equal for row in rows),
            **{name: statistics.mean(getattr(row, name) for row in rows) for name in numbers},
        )
        for rows in zip(*tables, strict=True)
    ]


# -- two implementations ----------------------------------------------------------------------------------------------

HOST = ("--hidden-size", "256", "--num-experts", "8", "--moe-router-topk", "2", "--num-layers", "3")
METRICS, SKIPPED = "metrics.jsonl", 3
NAME = "train/train_rollout_logprob_abs_diff"
ARMS = {
    "bfloat16 on both sides (the floor)": ("--plugins", "r3"),
    "FP8 rollout, --fp8-train off": ("--plugins", "r3,fp8", "--fp8-train", "off"),
    "FP8 rollout, --plugins r3,fp8": ("--plugins", "r3,fp8"),
}


def two_implementations(rollouts: int, seed: int) -> dict[str, dict[str, float]]:
    """Of each arm the mean over rollouts of the mean, 99th percentile and maximum difference of a rollout's tokens."""
    found = {}
    with tempfile.TemporaryDirectory() as parent:
        for number, (name, flags) in enumerate(ARMS.items()):
            folder = Path(parent) / str(number)
            program = [sys.executable, "-m", "miles_plugins.entrypoints.slime_train", "--embedded", *HOST, *flags]
            program += ["--run-folder", str(folder), "--num-rollout", str(rollouts), "--seed", str(seed), "--json"]
            done = subprocess.run(program, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            steps = steps_of(read_metrics(folder / METRICS), "train/step")
            kept = [step for number, step in steps.items() if number >= SKIPPED]
            ends = {"mean": "", "p99": "_p99", "maximum": "_max"}
            found[name] = {each: statistics.mean(step[NAME + end] for step in kept) for each, end in ends.items()}
    return found


# -- both tables ------------------------------------------------------------------------------------------------------


def show(console: Console, rows: Sequence[Row], title: str) -> None:
    alone = next(row.mean for row in rows if row.name == ALONE)
    columns = ["configuration", "rule", "mean", "relative", "p99", "max", "k3", "mean, own experts", "differ"]
    cells = []
    for row in rows:
        found = [f"{row.mean:.5f}", f"{row.mean / alone:.2f}", f"{row.p99:.4f}", f"{row.maximum:.4f}", f"{row.k3:.1e}"]
        own = [f"{row.own_mean:.5f}", f"{100 * row.experts_differ:.2f} %"]
        rule = row.rule.removeprefix("fp8.")
        cells.append([row.name, rule, *(["exactly 0", "0", "0", "0", "0"] if row.equal else found), *own])
    console.print(table(title, columns, cells))


def main() -> None:
    """Print both tables, or the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="small models, and the first table alone")
    parser.add_argument("--seeds", type=int, default=3, help="models of each table (default: 3)")
    parser.add_argument("--rollouts", type=int, default=8, help=f"of the second, {SKIPPED} left out (default: 8)")
    given = parser.parse_args()
    with megatron() as args:
        sizes = QUICK if given.quick else Sizes()
        tables = [same_implementation(args, seed, sizes) for seed in range(given.seeds)]
    arms = [] if given.quick else [two_implementations(given.rollouts, seed) for seed in range(given.seeds)]
    if given.json:
        print(json.dumps({"same": [[asdict(row) for row in rows] for rows in tables], "two": arms}))
        return
    console = Console(width=140)
    title = f"one implementation, {given.seeds} models: |log-prob of trainer - rollout|"
    show(console, means(tables), title)
    console.print(f"relative: to the mean of the {ALONE}\n")
    if arms:
        measured = ("mean", "p99", "maximum")
        over = {name: [statistics.mean(found[name][each] for found in arms) for each in measured] for name in ARMS}
        rows = [[name, *(f"{value:.5f}" for value in values)] for name, values in over.items()]
        title = f"two implementations, {given.seeds} models: {given.rollouts} rollouts of the embedded host, with r3"
        console.print(table(title, ["configuration", "mean", "p99", "max"], rows))
        console.print("FP8 enlarges what two implementations differ by: bfloat16 is the floor, not zero.")


if __name__ == "__main__":
    main()

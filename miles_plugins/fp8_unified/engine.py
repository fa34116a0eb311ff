"""A rollout engine without FP8 kernels of its own, computing as one that has them.

SGLang on the CPU and the embedded host's transformers model are built with bfloat16 weights. Those that the checkpoint
has in FP8 become an `Fp8Weight`: torch itself hands every `linear(x, weight)` to it, whatever module asks. The
dequantised values that it holds give the received codes and scales back when they are quantised again: the largest
weight of a tile has the code 448, so that bfloat16 keeps the tile's amax, and no other value moves by more than 2**-9
of itself, where codes are 2**-4 apart. Powers of two, whose largest code may be anything from 224 on, can come back as
half the scale and twice the codes: the same values, which give the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from miles_plugins.errors import UpstreamError
from miles_plugins.fp8_unified import product
from miles_plugins.fp8_unified.blockwise import Format, Quantised
from miles_plugins.fp8_unified.quantised import quantise_weights

if TYPE_CHECKING:
    import torch

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that SGLang makes of several of the checkpoint's."""
STACKED = {  # all experts in one parameter, [experts, N, K]
    "w13_weight": ("gate_proj", "up_proj"),  # SGLang's
    "w2_weight": ("down_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),  # transformers'
    "down_proj": ("down_proj",),
}
_version = 0  # of the weights: what was quantised of an earlier one is forgotten


def weights_changed() -> None:
    """New weights are coming, or have come."""
    global _version
    _version += 1


class Products:
    """The weights of this process's models that multiply in FP8, and how often each did."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}  # name of the parameter -> products

    def __len__(self) -> int:
        return len(self.of)

    @property
    def unused(self) -> list[str]:
        return [name for name, times in self.of.items() if not times]


_MULTIPLY = frozenset(
    (
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "addmm",
        "einsum",
        "grouped_mm",
        "_grouped_mm",
        "t",
        "transpose",
    )
)
"""What a model may do to a weight in place of `linear`, which would multiply with its plain values unseen."""


def multiply_in_fp8(model: torch.nn.Module, is_fp8: Callable[[str], bool], format: Format, count: Products) -> None:
    """Let a model multiply in FP8 with the weights of modules that `is_fp8` says by the checkpoint's name."""
    use_linear = getattr(model, "set_experts_implementation", None)
    if use_linear is not None:
        use_linear("eager")  # transformers' other ones multiply all experts at once, past `linear`
    for path, module, name, parts in list(_weights(model)):
        if not is_fp8(parts[0]):
            continue
        old = module._parameters[name]
        assert old is not None
        sizes = getattr(module, "output_partition_sizes", None) or [old.shape[-2] // len(parts)] * len(parts)
        full_name = f"{path}.{name}"
        module._parameters[name] = _class().of(old, full_name, sizes, format, count)
        count.of[full_name] = 0


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, list[str]]]:
    """Each parameter that may be a linear layer's: path and module, its name in it, the checkpoint's modules of it."""
    for path, module in model.named_modules():
        above, _, last = path.rpartition(".")
        for name, parameter in module.named_parameters(recurse=False):
            if name in STACKED and parameter.dim() == 3:
                yield path, module, name, [f"{path}.0.{part}" for part in STACKED[name]]
            elif name == "weight" and parameter.dim() == 2:
                yield path, module, name, [f"{above}.{part}" for part in FUSED.get(last, (last,))]


_weight_class: Any = None


def _class() -> Any:
    """The parameter's class; made at first use, for this module is read where torch is not."""
    global _weight_class
    if _weight_class is None:
        import torch

        class Fp8Weight(torch.nn.Parameter):  # type: ignore[misc]
            """A weight [N, K], or [experts, N, K] of which one is picked before it is multiplied with.

            To everything else than `linear` it is its own plain tensor: loaders write into it as into any other.
            """

            _name: str
            _sizes: Sequence[int]
            _format: Format
            _count: Products
            _kept: tuple[int, list[Quantised]] | None
            _experts: dict[int, Any]

            @classmethod
            def of(
                cls, old: torch.Tensor, name: str, sizes: Sequence[int], format: Format, count: Products
            ) -> Fp8Weight:
                new: Fp8Weight = torch.Tensor._make_subclass(cls, old.detach(), False)
                new.__dict__.update(old.__dict__)  # SGLang's loaders are attributes of the parameter
                new._name, new._sizes, new._format, new._count = name, list(sizes), format, count
                new._kept, new._experts = None, {}
                return new

            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                with torch._C.DisableTorchFunctionSubclass():
                    if func is torch.nn.functional.linear:
                        return _linear(*args, **(kwargs or {}))
                    if func is torch.Tensor.__getitem__ and isinstance(args[0], cls) and args[0].dim() == 3:
                        index = args[1]
                        if isinstance(index, int) or getattr(index, "ndim", 1) == 0:
                            return args[0]._expert(int(index))
                    if getattr(func, "__name__", "") in _MULTIPLY:
                        name = next(each._name for each in args if isinstance(each, cls))
                        raise _unseen(name, func.__name__)
                    return func(*args, **(kwargs or {}))

            def _expert(self, index: int) -> Fp8Weight:
                if index not in self._experts:
                    plain = self.detach()[index]
                    self._experts[index] = type(self).of(plain, self._name, self._sizes, self._format, self._count)
                expert: Fp8Weight = self._experts[index]
                return expert

            def multiplied(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
                self._count.of[self._name] += 1
                if self._kept is None or self._kept[0] != _version:
                    parts = self.detach().split(list(self._sizes))
                    self._kept = _version, [quantise_weights([part], self._format)[0] for part in parts]
                flat = x.reshape(-1, x.shape[-1])
                of_parts = [product.linear(flat, [part], [len(flat)], self._format) for part in self._kept[1]]
                result = torch.cat(of_parts, dim=1)
                result = result.view(*x.shape[:-1], result.shape[-1])
                return result if bias is None else result + bias

        def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            """torch's signature."""
            if isinstance(weight, Fp8Weight):
                return weight.multiplied(input, bias)
            return torch.nn.functional.linear(input, weight, bias)

        _weight_class = Fp8Weight
    return _weight_class


def _unseen(name: str, operator: str) -> UpstreamError:
    return UpstreamError(
        f"the engine's model multiplies with {name} in a way that FP8 weights do not see",
        {"found": f"torch's {operator}", "expected": "linear(x, weight)"},
        "report this, with the model's name",
    )

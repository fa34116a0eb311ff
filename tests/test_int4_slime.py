"""slime's own packer and its converter, symmetric, make of the same weights what the grid `stock` makes of them.

Both call an extension that is compiled with CUDA; a few lines of torch stand in for it here, in the arithmetic of its
source: slime/backends/megatron_utils/kernels/int4_qat/fake_int4_quant_cuda.cu.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from miles_plugins.checkpoints import read_json  # noqa: E402
from miles_plugins.int4_qat.checkpoint import packed_modules, read_format  # noqa: E402
from miles_plugins.int4_qat.converter import convert_to_int4  # noqa: E402
from miles_plugins.int4_qat.grid import SEVENTH, Grid, pack, quantise  # noqa: E402
from tests.checkpoint_folders import equal, load, write  # noqa: E402
from tests.wheels import unpacked_commit  # noqa: E402

pytestmark = pytest.mark.upstream

PACKER = "slime/backends/megatron_utils/megatron_to_hf/processors/quantizer_compressed_tensors.py"
CONVERTER = "tools/convert_hf_to_int4_direct.py"
EXPERT = "model.layers.0.mlp.experts.0."


def fake_int4_quant_cuda(weight: Any, block: tuple[int, int], symmetric: bool) -> tuple[Any, Any, Any]:
    """Codes and scales in the weight's dtype: `rintf(val / scale)`, `scale = fmaxf(max * (1.0f / 7.0f), 1e-5f)`."""
    assert symmetric
    groups = weight.float().unflatten(-1, (-1, block[1]))
    scale = (groups.abs().amax(-1) * torch.tensor(SEVENTH)).clamp(min=1e-5)
    codes = (groups / scale.unsqueeze(-1)).round()
    return codes.flatten(-2).to(weight.dtype), scale.to(weight.dtype), torch.zeros_like(scale)


@pytest.fixture
def slime(monkeypatch: pytest.MonkeyPatch) -> Path:
    """v0.3.1, with the stand-in."""
    extension = ModuleType("fake_int4_quant_cuda")
    vars(extension)["fake_int4_quant_cuda"] = fake_int4_quant_cuda
    monkeypatch.setitem(sys.modules, "fake_int4_quant_cuda", extension)
    return unpacked_commit(("SLIME_HOME", "~/slime", "v0.3.1"))


def run(file: Path) -> dict[str, Any]:
    """What a file of slime's defines, on the CPU."""
    source = file.read_text(encoding="utf-8")
    assert 'device="cuda"' in source
    names: dict[str, Any] = {"__name__": "slimes"}
    exec(compile(source.replace('device="cuda"', 'device="cpu"'), str(file), "exec"), names)
    return names


def kinds() -> dict[str, Any]:
    """Weights [64, 256] of every sort that a scale of bfloat16 can have, without NaN and infinity."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 256, generator=generator)
    bits = torch.randint(-(2**15), 2**15, (64, 256), generator=generator).to(torch.int16).view(torch.bfloat16)
    return {
        "usual": (normal * 0.02).bfloat16(),
        "ties": (torch.randint(-14, 15, (64, 256), generator=generator) / 14).bfloat16(),
        "tiny": (normal * 2.0**-18).bfloat16(),  # scales at their least
        "zeros": torch.zeros(64, 256).bfloat16(),
        "bits": torch.where(bits.abs() < 2.0**120, bits, 1),
    }


@pytest.mark.parametrize("size", [32, 64, 128])
def test_slimes_packer_packs_the_same(slime: Path, size: int) -> None:
    weights = {"group_size": size, "symmetric": True, "num_bits": 4}
    config = {"config_groups": {"group_0": {"weights": weights}}, "ignore": ["lm_head", "re:.*norm.*"]}
    given = [(f"{EXPERT}{kind}.weight", weight) for kind, weight in kinds().items()]
    others = [("lm_head.weight", torch.ones(2, 256)), ("model.norm.weight", torch.ones(256))]
    theirs = run(slime / PACKER)["quantize_params_compressed_tensors"]([*given, *others], config)
    found = dict(theirs)
    assert len(found) == 3 * len(given) + len(others)
    for name, weight in given:
        codes, scale = quantise(weight, Grid(size))
        assert equal(found[f"{name}_packed"], pack(codes)), name
        assert equal(found[f"{name}_scale"], scale), name
        assert found[f"{name}_shape"].tolist() == [64, 256]


def test_slimes_converter_makes_the_same_checkpoint(slime: Path, tmp_path: Path) -> None:
    chosen = kinds()
    tensors = {f"{EXPERT}gate_proj.weight": chosen["usual"], f"{EXPERT}down_proj.weight": chosen["bits"]}
    tensors |= {"lm_head.weight": torch.ones(8, 256).bfloat16(), "model.layers.0.mlp.gate.weight": torch.ones(2, 256)}
    write(tmp_path / "bf16", {"model.safetensors": tensors})
    ignore = ["lm_head", "model.layers.0.mlp.gate."]
    run(slime / CONVERTER)["convert_int4"](str(tmp_path / "bf16"), str(tmp_path / "theirs"), 32, True, ignore, 1)
    convert_to_int4(tmp_path / "bf16", tmp_path / "ours", Grid(32))
    theirs, ours = load(tmp_path / "theirs"), load(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert packed_modules(tmp_path / "theirs") == packed_modules(tmp_path / "ours")
    for name, tensor in ours.items():
        shape = name.endswith("_shape")  # int32 of slime, int64 of compressed-tensors
        assert torch.equal(theirs[name], tensor) if shape else equal(theirs[name], tensor), name
    configs = [read_json(tmp_path / side / "config.json") for side in ("theirs", "ours")]
    assert len({read_format(config).group_size for config in configs}) == 1

"""`miles-plugins memory CONFIG`: what a model's rollout weights take in bf16, INT4 and FP8, in all and on each GPU.

Reads config.json only: neither weights nor a GPU are needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from miles_plugins.checkpoints import text_config
from miles_plugins.console import number, table
from miles_plugins.entrypoints.patch_table import print_with
from miles_plugins.errors import PluginError
from miles_plugins.int4_qat.memory import (
    BF16,
    FP8,
    MODULES,
    MTP,
    Component,
    Format,
    Layout,
    components,
    int4,
    stage_bytes,
    weight_bytes,
)

ONLY_ROLLOUT = (
    "These are the rollout engine's weights only: neither its KV cache and activations, nor the trainer, whose "
    "weights, gradients and optimizer state INT4 does not reduce. 1 GB is 1e9 bytes."
)
size = click.IntRange(min=1)


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--int4", "with_int4", is_flag=True, help="Compare INT4 with bf16.")
@click.option("--group-size", type=size, help="Of INT4: 128 (the default), 64 or 32.")
@click.option("--modules", metavar="NAME[,NAME…]", help=f"In INT4: {', '.join(MODULES)}. By default experts only.")
@click.option("--fp8", "with_fp8", is_flag=True, help="Compare blockwise FP8 with bf16.")
@click.option("--tp", type=size, help="Tensor parallel GPUs of the engine: also show what each GPU holds.")
@click.option("--pp", type=size, help="Pipeline stages of the engine.")
@click.option("--ep", type=size, help="Expert parallel GPUs, inside tp.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes.")
def memory(
    config: Path,
    with_int4: bool,
    group_size: int | None,
    modules: str | None,
    with_fp8: bool,
    tp: int | None,
    pp: int | None,
    ep: int | None,
    as_json: bool,
) -> None:
    """What a model's rollout weights take, by component and on each GPU. CONFIG: a model's folder, or its config.json.

    Without --int4 or --fp8, both are compared with bf16; a format that does not fit is then left open.
    """
    try:
        chosen = int4(group_size or 128, modules.split(",") if modules is not None else ("experts",))
        asked = ["int4"] * (with_int4 or group_size is not None or modules is not None) + ["fp8"] * with_fp8
        formats = [BF16, *(each for each in (chosen, FP8) if not asked or each.name in asked)]
        layout = Layout(tp or 1, pp or 1, ep or 1) if tp or pp or ep else None
        facts = account(read_config(config), formats, layout, strict=bool(asked))
    except PluginError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        print_with(lambda console: _show(console, facts))


def read_config(place: Path) -> dict[str, Any]:
    """Raises PluginError unless it is a folder with a config.json, or such a file."""
    file = place / "config.json" if place.is_dir() else place
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        facts = {"file": file, "error": f"{type(error).__name__}: {error}"}
        raise PluginError("no model's config can be read", facts, "name its folder, or its config.json") from error
    if not isinstance(found, dict):
        raise PluginError("this is no model's config", {"file": file, "expected": "an object with model_type"})
    return found


def account(
    config: Mapping[str, Any], formats: Sequence[Format], layout: Layout | None = None, *, strict: bool = True
) -> dict[str, Any]:
    """Everything that the command shows; `--json` prints it as it is.

    Keys:
        model_type: Of the language model.
        formats: Name -> {"components" that are quantised, "group_size" of int4}.
        components: A component each: {"name", "parameters", "bytes": {format: bytes}}; of a format that does not fit,
            as everywhere here, None.
        total: The same of all, without MTP layers.
        per_gpu: None without a layout; else {"tp", "pp", "ep", "gpus", "stages": {format: [bytes of one GPU of each
            pipeline stage]}}.
        refused: Format -> why it does not fit. Unless `strict`; then it is raised.
        notes: Sentences on what these figures mean.

    Raises:
        PluginError: the model is unknown, the layout impossible, or (`strict`) a format does not fit.
    """
    found = components(config)
    counted = [each for each in found if each.name != MTP]
    refused: dict[str, str] = {}
    sizes: dict[str, list[int]] = {}
    stages: dict[str, list[int] | None] = {}
    for format in formats:
        try:
            sizes[format.name] = [weight_bytes(each, format) for each in found]
            stages[format.name] = stage_bytes(found, format, layout) if layout else None
        except PluginError as error:
            if strict or format == BF16:
                raise
            refused[format.name] = str(error)
            stages[format.name] = None
    names = [format.name for format in formats]

    def row(name: str, some: Sequence[Component]) -> dict[str, Any]:
        bytes = {
            key: sum(size for each, size in zip(found, sizes[key], strict=True) if each in some)
            if key in sizes
            else None
            for key in names
        }
        return {"name": name, "parameters": sum(each.parameters for each in some), "bytes": bytes}

    return {
        "model_type": text_config(config)["model_type"],
        "formats": {format.name: _described(format) for format in formats},
        "components": [row(each.name, [each]) for each in found],
        "total": row("total", counted),
        "per_gpu": layout
        and {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep, "gpus": layout.gpus, "stages": stages},
        "refused": refused,
        "notes": [*_notes(config, counted, formats), ONLY_ROLLOUT],
    }


def _described(format: Format) -> dict[str, Any]:
    described: dict[str, Any] = {"components": sorted(format.components)}
    return described | ({"group_size": format.group_size} if format.name == "int4" else {})


def _notes(config: Mapping[str, Any], counted: Sequence[Component], formats: Sequence[Format]) -> list[str]:
    notes = []
    present = {each.name for each in counted}
    chosen = next((format for format in formats if format.name == "int4"), None)
    if chosen and not chosen.components & present:
        other = "experts" if MODULES["experts"] in present else "mlp,attention"
        absent = " or ".join(name for name in MODULES.values() if name in chosen.components)
        bf16 = sum(weight_bytes(each, BF16) for each in counted)
        try:
            less = sum(weight_bytes(each, int4(chosen.group_size, other.split(","))) for each in counted)
            gives = f"gives {_gb(less)} GB, {bf16 / less:.2f}x smaller than bf16"
        except PluginError as error:
            gives = f"does not fit: {error.message}"
        dense = "the model is dense and has" if MODULES["experts"] not in present else "the model has"
        notes.append(
            f"INT4 gains nothing here: {dense} no {absent}. `--modules {other}` {gives}; but SGLang cannot take new "
            "INT4 weights for linear layers while it runs, so that is for serving, not for RL."
        )
    if text_config(config) is not config:
        notes.append("Only the language model is counted: what sees or hears beside it is not.")
    return notes


# -- what is shown ----------------------------------------------------------------------------------------------------


def _gb(bytes: int | None) -> str:
    return number(None if bytes is None else bytes / 1e9, ",.1f")


def _show(console: Console, facts: dict[str, Any]) -> None:
    names, total = list(facts["formats"]), facts["total"]
    rows = [_cells(row, names, total["parameters"]) for row in facts["components"] if row["name"] != MTP]
    ratios = [total["bytes"][name] and f"{total['bytes']['bf16'] / total['bytes'][name]:.2f}x" for name in names]
    rows += [_cells(total, names, total["parameters"]), ["smaller by", "", "", *(ratio or "–" for ratio in ratios)]]
    for row in facts["components"]:
        if row["name"] == MTP:
            rows.append([f"{MTP}, not in the total", *_cells(row, names, total["parameters"])[1:]])
    columns = ["component", "parameters", "share", *(f"{name} GB" for name in names)]
    shown = table(f"rollout weights, {facts['model_type']}", columns, rows, numbers=True)
    shown.columns[0].justify = "left"
    console.print(shown)
    if "int4" in names:
        about = facts["formats"]["int4"]
        console.print(Text(f"int4: {', '.join(about['components'])} in groups of {about['group_size']}; the rest bf16"))
    if facts["per_gpu"]:
        _show_gpus(console, facts["per_gpu"])
    for name, why in facts["refused"].items():
        console.print(Text(f"{name} does not fit: {why}"))
    for note in facts["notes"]:
        console.print(Text(note))


def _cells(row: Mapping[str, Any], names: Sequence[str], all_parameters: int) -> list[str]:
    share = "" if row["name"] == MTP else f"{row['parameters'] / all_parameters:.1%}"
    return [row["name"], _count(row["parameters"]), share, *(_gb(row["bytes"][name]) for name in names)]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.2f} M"


def _show_gpus(console: Console, about: Mapping[str, Any]) -> None:
    """Of the fullest stage, which is not the same one in every format."""
    parts = []
    for name, stages in about["stages"].items():
        full = f" (stage {stages.index(max(stages)) + 1})" if stages and len(stages) > 1 else ""
        parts.append(f"{name} {_gb(stages and max(stages))}{' GB' if stages else ''}{full}")
    where = f"tp {about['tp']}, pp {about['pp']}, ep {about['ep']}"
    console.print(Text(f"fullest of {about['gpus']} GPUs ({where}): {', '.join(parts)}"))

"""`eventlens bench adapters DATA`: what adapters and their router cost in a training step.

In: a folder of `eventlens data build`, a recipe, settings. Out: one CSV line per arm in --out, and a table. The arms:
  none             the model without adapters, on rows that mix image-level and region-level groups
  task, mixture    the same rows with an adapter per task, and with LION's mixture
  mixture_pure     the mixture on rows of one level each, made of the same groups
Decision: all arms share one model, whose adapters are put in and taken out, and are interleaved round by round; a ratio
is the median over rounds of the times of one round. Adapters start as the identity, so before anything is timed every
arm must give the losses of the model without them, and a mixed row must call no module more often than a pure one.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventlens_ds.errors import DataError, UserError

if TYPE_CHECKING:
    from torch import nn

    from eventlens_ds.config.run_config import RunConfig
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.data.records import Batch
    from eventlens_ds.model.region_vlm import RegionVLM

ARMS: dict[str, tuple[str, str, str]] = {
    "none": ("", "mixed", ""),
    "task": ("task", "mixed", "none"),
    "mixture": ("mixture", "mixed", "none"),
    "mixture_pure": ("mixture", "pure", "mixture"),
}
"""Arm -> router, kind of rows, and the arm that its time is divided by."""

TOLERANCE = 1e-4
"""Largest difference of a mean log-probability between arms, float32; 30 times that in bf16."""

COLUMNS = (
    "arm", "ms_p25", "ms_p50", "ms_p75", "against", "ratio_p25", "ratio_p50", "ratio_p75", "repeats", "rows", "groups",
    "tokens", "images", "forwards_per_row", "max_difference", "preset", "width", "layers", "vision_layers",
    "image_size", "bottleneck", "trained", "attention", "kernels", "dtype", "recompute", "device", "threads", "cores",
    "python", "torch", "transformers", "commit", "changed", "date",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    from eventlens_ds.bench.train import _machine
    from eventlens_ds.train import door

    parser = door.Parser(prog="eventlens bench adapters", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of `eventlens data build`")
    parser.add_argument("--config", default="base", metavar="RECIPE", help="recipe of the model (default base)")
    parser.add_argument("--split", default="train")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="layers of the language model (0: all)")
    parser.add_argument("--vision-layers", type=int, default=0, metavar="N", help="layers of the tower (0: all)")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows per level (default 1)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds of all arms (default 9)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, metavar="CSV", help="file to append to")
    args, settings = parser.parse_known_args(door.join_settings(argv))
    door.refuse_near_options(settings, parser)
    for name, least in (("layers", 0), ("vision_layers", 0), ("rows", 1), ("repeats", 2), ("threads", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder")
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    lines = measure(setting(args, settings), args.rows, args.repeats)
    facts = _machine()
    lines = [{**facts, **line, "device": line["device"] or facts["device"]} for line in lines]
    if args.out:
        append(args.out, lines)
    print(table(lines))
    return 0


@dataclass
class Setting:
    """What all arms share. `adapters` has the layers of every router; "" has none."""

    config: RunConfig
    model: RegionVLM
    data: RunData
    adapters: dict[str, nn.ModuleList]
    device: str
    trained: tuple[str, ...]

    def use(self, router: str) -> None:
        self.model.adapters = self.adapters[router]


def setting(args: argparse.Namespace, settings: Sequence[str]) -> Setting:
    """The model of the recipe, cut to the layers asked for, with adapters of both routers. Raises UserError for fewer
    layers than the recipe reads."""
    import torch

    from eventlens_ds.config.load import load
    from eventlens_ds.data.loader import RunData
    from eventlens_ds.model.adapters import new_adapters
    from eventlens_ds.model.region_vlm import RegionVLM
    from eventlens_ds.runtime.build_model import describe, model_dtype, tokenizer_path

    config = load(args.config, settings)
    if not config.model.adapters.bottleneck:
        raise UserError("model.adapters.bottleneck 0: there is no adapter to measure")
    architecture, tokenizer, spec = describe(config, dry=True)
    text, vision = architecture.text_config, architecture.vision_config
    text.num_hidden_layers = args.layers or text.num_hidden_layers
    vision.num_hidden_layers = args.vision_layers or vision.num_hidden_layers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.train.seed)
    architecture.adapters["bottleneck"], bottleneck = 0, architecture.adapters["bottleneck"]
    model = RegionVLM._from_config(architecture, dtype=model_dtype(config))
    tasks = config.data.tasks or config.model.adapters.tasks
    made: dict[str, nn.ModuleList] = {"": torch.nn.ModuleList()}
    for router in dict.fromkeys(arm[0] for arm in ARMS.values() if arm[0]):
        shape = {**architecture.adapters, "bottleneck": bottleneck, "router": router}
        layers = [new_adapters(shape, tasks, text.hidden_size) for _ in range(text.num_hidden_layers)]
        for layer in layers:
            layer.reset_parameters()
        made[router] = torch.nn.ModuleList(layers).to(device, model_dtype(config))
        made[router].requires_grad_("adapters" in config.stage.train)
        model.adapters = made[router]
        model.choose_kernels(config.model.kernels)
    model.adapters = made[""]
    data = RunData(
        [str(args.data)],
        args.split,
        config=config.data,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path(config),
        spec=spec,
        tasks=tasks,
    )
    trained = _stage(model, config, tasks)
    return Setting(config, model.to(device).train(), data, made, device, trained)


def _stage(model: RegionVLM, config: RunConfig, tasks: Sequence[str]) -> tuple[str, ...]:
    """Parts that learn: those of the recipe; adapters, which this model lacks as yet, are named last."""
    from eventlens_ds.model.stages import apply_stage

    parts = [part for part in config.stage.train if part != "adapters"]
    apply_stage(model, parts, tasks)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable()
    return (*parts, *(["adapters"] if "adapters" in config.stage.train else []))


def make_rows(data: RunData, rows: int) -> dict[str, list[Batch]]:
    """2 * `rows` rows of pure levels, and as many that mix the same groups half and half.

    Raises DataError when the folder has too few groups of a level, or groups too long to halve a row."""
    from eventlens_ds.data.records import TASKS
    from eventlens_ds.model.adapters import LEVELS, level_of

    groups = data.groups[0]
    pure: dict[str, list[list[tuple[int, int]]]] = {level: [] for level in LEVELS}
    for level, packed in pure.items():
        room = 0
        for number, (task, length) in enumerate(zip(groups.task.tolist(), groups.lengths.tolist())):
            if level_of(TASKS[task]) != level:
                continue
            if length > room:
                if len(packed) == rows:
                    break
                packed.append([])
                room = data.config.row_tokens
            packed[-1].append((0, number))
            room -= length
        if len(packed) < rows:
            raise DataError(f"bench adapters: the data fills {len(packed)} rows of {level} groups, {rows} are needed")
        if min(map(len, packed)) < 2:
            raise DataError(f"bench adapters: one {level} group fills a row; raise data.row_tokens to halve rows")
    mixed: list[list[tuple[int, int]]] = []
    for one, two in zip(*(pure[level] for level in LEVELS)):
        mixed += [[*one[::2], *two[::2]], [*one[1::2], *two[1::2]]]
    kinds = {"pure": [row for packed in pure.values() for row in packed], "mixed": mixed}
    return {kind: [data.batch(row, seed) for seed, row in enumerate(members)] for kind, members in kinds.items()}


def measure(given: Setting, rows: int, repeats: int) -> list[dict[str, Any]]:
    """One dict of COLUMNS per arm, without the facts of the machine.

    Raises DataError when arms differ in a loss, or when a mixed row needs another pass through any module."""
    import torch

    batches = {k: [b.to(given.device) for b in made] for k, made in make_rows(given.data, rows).items()}
    forwards, losses = {}, {}
    for arm, (router, kind, _) in ARMS.items():
        given.use(router)
        with torch.no_grad(), counted(given.model) as calls:
            losses[arm] = torch.tensor([float(given.model(b, 1).double().sum()) for b in batches[kind]])
        forwards[arm] = max(calls.values()) / len(batches[kind])
        step(given, batches[kind])  # warm-up
    targets = sum(b.target_ids.numel() for b in batches["mixed"])
    difference = max(abs(float(one.sum() - losses["none"].sum())) for one in losses.values()) / targets
    if difference > TOLERANCE * (1 if given.config.train.dtype == "fp32" else 30):
        raise DataError(
            f"bench adapters: arms differ by {difference:.2g} in a mean log-probability; nothing is reported"
        )
    if forwards["mixture"] != forwards["mixture_pure"]:
        raise DataError(
            f"bench adapters: a mixed row runs a module {forwards['mixture']:g} times, a pure row "
            f"{forwards['mixture_pure']:g} times; nothing is reported"
        )
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for round_ in range(repeats):
        order = [*ARMS][round_ % len(ARMS) :] + [*ARMS][: round_ % len(ARMS)]
        for arm in order:
            router, kind, _ = ARMS[arm]
            given.use(router)
            taken[arm].append(step(given, batches[kind]))
    shared = facts(given, batches["mixed"])
    return [
        {
            "arm": arm,
            **_quantiles("ms", taken[arm], 1),
            "against": against,
            **_quantiles("ratio", [a / b for a, b in zip(taken[arm], taken[against or arm])], 3),
            "repeats": repeats,
            "forwards_per_row": f"{forwards[arm]:g}",
            "max_difference": f"{difference:.1e}",
            **shared,
        }
        for arm, (_, _, against) in ARMS.items()
    ]


class counted:  # noqa: N801 - used as a function
    """Context manager: forward calls of every module of the model, by name."""

    def __init__(self, model: RegionVLM) -> None:
        self.model = model

    def __enter__(self) -> Counter[str]:
        calls: Counter[str] = Counter()
        self.handles = [
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
            for name, module in self.model.named_modules()
        ]
        return calls

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def step(given: Setting, rows: Sequence[Batch]) -> float:
    """Milliseconds of forward and backward over rows, gradients summed, without an optimizer."""
    import torch

    wait = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    given.model.zero_grad(set_to_none=True)
    wait()
    started = time.perf_counter()
    for row in rows:
        (-given.model(row, 1).mean()).backward()
    wait()
    return 1000 * (time.perf_counter() - started)


def facts(given: Setting, rows: Sequence[Batch]) -> dict[str, Any]:
    """What the arms had in common: rows, shape and settings."""
    import torch

    from eventlens_ds.ops import dispatch

    config, architecture = given.config, given.model.config
    return {
        "rows": len(rows),
        "groups": sum(int((row.parents < 0).sum()) for row in rows),
        "tokens": sum(row.real_tokens for row in rows),
        "images": sum(int(row.pixel_values.shape[0]) for row in rows),
        "preset": config.model.preset,
        "width": architecture.text_config.hidden_size,
        "layers": architecture.text_config.num_hidden_layers,
        "vision_layers": architecture.vision_config.num_hidden_layers,
        "image_size": architecture.vision_config.image_size,
        "bottleneck": config.model.adapters.bottleneck,
        "trained": " ".join(given.trained),
        "attention": architecture.text_config._attn_implementation,
        "kernels": "; ".join(f"{op}: {choice.split(' ')[0]}" for op, choice in dispatch.decisions().items()),
        "dtype": config.train.dtype,
        "recompute": "yes" if config.train.activation_checkpointing else "no",
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "",
        "threads": torch.get_num_threads(),
    }


def _quantiles(name: str, values: Sequence[float], digits: int) -> dict[str, str]:
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return {f"{name}_p{q}": f"{value:.{digits}f}" for q, value in zip((25, 50, 75), cuts)}


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines to a CSV. Raises UserError for a file with other columns."""
    new = not path.exists()
    if not new and path.read_text(encoding="utf-8").partition("\n")[0].strip() != ",".join(COLUMNS):
        raise UserError(f"--out {path}: has other columns than this benchmark; name another file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows(lines)


def table(lines: Sequence[dict[str, Any]]) -> str:
    return "\n".join(_lines(lines))


def _lines(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    first = lines[0]
    yield (
        f"{first['preset']} shape of width {first['width']}, {first['layers']} layers, tower of "
        f"{first['vision_layers']} layers at {first['image_size']} px; {first['tokens']} tokens in {first['rows']} rows"
    )
    for line in lines:
        against = f"{line['ratio_p50']} ({line['ratio_p25']}-{line['ratio_p75']}) of {line['against']}"
        yield (
            f"{line['arm']:<14}{line['ms_p50']:>10} ms ({line['ms_p25']}-{line['ms_p75']})  "
            f"{against if line['against'] else 'the baseline':<34}{line['forwards_per_row']} forwards a row"
        )

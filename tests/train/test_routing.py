"""Adapter telemetry: shares, entropy and gate values against numbers written out here, the collapse warning, and two
ranks under ZeRO-3 whose gates are partitioned.

In: layers with gates set by hand, rows of the small world. Out: `Routing`s, log lines, pictures, RUN/log.jsonl of a
short run. Decision: the ranks hold rows of different tasks, so a number that only one rank knew would be wrong; the
file is the job of its ranks too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eventlens_ds.data.records import TASKS
from eventlens_ds.model.adapters import LEVELS, AdapterMixture, TaskAdapters, Usage
from eventlens_ds.runtime.failures import leave
from eventlens_ds.train import routing as telemetry
from eventlens_ds.train.heat_map import DARK, PAPER, heat_map
from eventlens_ds.train.metrics import StepMetrics
from eventlens_ds.train.routing import CollapseWatch, Routing, RoutingProbe
from tests.small_world import SmallRun, small_config, small_engine, small_run

ROOT = Path(__file__).parents[2]
STEPS = 4


def row(**tokens: int) -> Any:
    """A row of so many tokens by task, and three of padding."""
    ids = [TASKS.index(task) for task, count in tokens.items() for _ in range(count)]
    return SimpleNamespace(task_ids=torch.tensor([*ids, *ids[-1:] * 3], dtype=torch.int64), real_tokens=len(ids))


def mixture(region: tuple[float, float], image: tuple[float, float], width: int = 4) -> AdapterMixture:
    """Gates of constant size for each level, one channel of the first negated: mass counts sizes, the mean does not."""
    layer = AdapterMixture(width, 2)
    layer.reset_parameters()
    with torch.no_grad():
        for level, values in zip(LEVELS, (region, image)):
            getattr(layer, f"gate_{level}").copy_(torch.tensor(values)[:, None].expand(2, width))
        layer.gate_region_level[0, 0] *= -1
    return layer


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(layers)


def test_a_mixture_is_shared_out_by_the_size_of_its_gates() -> None:
    probe = RoutingProbe(Model(mixture((1.0, 0.0), (0.0, 2.0)), mixture((3.0, 1.0), (0.5, 0.5))))
    found = probe.read([row(rec=30, caption=5), row(caption=5)])
    assert found is not None and found.tokens == {"caption": 10, "rec": 30}
    assert found.by_task["rec"] == [[1.0, 0.0], [0.75, 0.25]] and found.by_task["caption"] == [[0.0, 1.0], [0.5, 0.5]]
    assert found.usage == [[0.75, 0.25], [(22.5 + 5) / 40, (7.5 + 5) / 40]]
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert found.entropy == pytest.approx([0.0, (30 * mixed + 10 * math.log(2)) / 40], abs=1e-6)
    assert found.gate_mean["region_level"] == [[0.5, 0.0], [1.5, 1.0]]
    assert found.gate_std["region_level"][1] == pytest.approx([math.sqrt((9 + 3 * 9) / 4 - 1.5**2), 0.0], abs=1e-6)
    assert found.gate_mean["image_level"] == [[0.0, 2.0], [0.5, 0.5]]


def test_a_task_router_counts_tokens_and_has_one_row() -> None:
    layer = lambda: TaskAdapters(("caption", "event"), 4, 2)  # noqa: E731
    found = RoutingProbe(Model(layer(), layer())).read([row(caption=1, event=3, rec=6)])
    assert found is not None and found.layers == ["all"] and found.usage == [[0.25, 0.75]]
    assert found.by_task == {"caption": [[1.0, 0.0]], "event": [[0.0, 1.0]], "rec": [[0.0, 0.0]]}
    assert found.entropy == [0.0] and not found.gate_mean


def test_no_adapters_no_tokens_and_gates_of_zero() -> None:
    assert RoutingProbe(Model()).read([row(rec=1)]) is None
    for layer, tokens in ((mixture((1.0, 0.0), (0.0, 1.0)), {}), (mixture((0.0, 0.0), (0.0, 0.0)), {"rec": 4})):
        found = RoutingProbe(Model(layer)).read([row(**tokens)])
        assert found is not None and found.usage == [] and found.entropy == []
        assert not any("usage" in tag for tag in found.scalars())


def test_a_router_that_counts_tokens_itself_is_asked_for_its_count() -> None:
    """The contract for routers that look at tokens: `watch` before the forward, `usage` returns what was counted."""

    class Counting(TaskAdapters):
        by_layer = True
        calls: list[bool] = []  # noqa: RUF012

        def watch(self, on: bool) -> None:
            self.calls.append(on)

        def usage(self, task_tokens: torch.Tensor) -> Any:
            mass = torch.zeros(len(TASKS), 2, dtype=torch.float64)
            mass[TASKS.index("rec")] = torch.tensor([1.0, 3.0])
            return Usage(mass, mass.sum(1) * 0.5)

    probe = RoutingProbe(Model(*(Counting(("caption", "event"), 4, 2) for _ in range(2))))
    probe.watch(True)
    found = probe.read([row(rec=4)])
    assert found is not None and found.usage == [[0.25, 0.75]] * 2 and found.entropy == [0.5, 0.5]
    assert Counting.calls == [True, True]


def routed(share: float, layers: int = 2) -> Routing:
    usage = [[share, 1 - share]] + [[0.5, 0.5]] * (layers - 1)
    return Routing(list(LEVELS), [str(i) for i in range(layers)], {"rec": 1}, usage, {"rec": usage}, [0.1] * layers)


def test_a_collapse_is_one_line_in_as_many_steps(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(trained=2, share=0.9, steps=5)
    with caplog.at_level(logging.WARNING):
        said = [step for step in range(1, 21) if watch.add(step, routed(0.99 if step > 3 else 0.5))]
    assert said == [8, 13, 18]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3 and "step 8: router collapse in 1 of 2 layers: adapter region_level takes 99.0 %" in lines[0]
    assert "layer 0 over the last 5 logged steps, though 2 adapters are trained" in lines[0]


@pytest.mark.parametrize(("trained", "share"), [(1, 0.99), (2, 0.9), (0, 0.99)])
def test_no_line_for_one_trained_adapter_or_a_share_below(trained: int, share: float) -> None:
    watch = CollapseWatch(trained, share=0.95, steps=2)
    assert not any(watch.add(step, routed(share)) for step in range(10))


def test_trained_adapters_are_counted() -> None:
    layer = mixture((1.0, 0.0), (0.0, 1.0))
    assert RoutingProbe(Model(layer)).trained == 2
    layer.image_level_up.requires_grad_(False)
    assert RoutingProbe(Model(layer)).trained == 1


def test_the_heat_map_is_dark_where_the_share_is() -> None:
    by_task = {"rec": [[1.0, 0.0], [0.0, 1.0]], "caption": [[0.0, 1.0], [float("nan"), 0.0]]}
    picture = heat_map(Routing(list(LEVELS), ["0", "1"], {"rec": 1, "caption": 1}, [], by_task, []))
    count = lambda color: int((picture == color).all(-1).sum())  # noqa: E731
    assert count(DARK) > 500 and count(PAPER) > 1000 and count((0, 0, 0)) > 300
    ten = [[0.5, 0.5]] * 100
    assert heat_map(Routing(list(LEVELS), [str(i) for i in range(100)], {}, [], {"rec": ten}, [])).shape[0] < 900
    with pytest.raises(ValueError, match="no task"):
        heat_map(Routing(list(LEVELS), ["0"], {}, [], {}, []))


def test_odd_gates_do_not_break_a_log_line() -> None:
    found = replace(routed(0.5), gate_mean={"region_level": [[float("nan"), 1.0]]})
    line = StepMetrics(1, 1.0, {}, 1.0, 1.0, 1.0, 1, 1, 0, 1.0, 0.0, None, 1, "", asdict(found)).to_json()
    parsed = json.loads(line)
    assert parsed["routing"]["gate_mean"] == {"region_level": [[None, 1.0]]}
    assert parsed["nonfinite"] == ["routing.gate_mean.region_level.0.0"]


def lion_run(data: Path, run: Path) -> SmallRun:
    from tests.model.test_lion import lion_config

    config = lion_config(data)
    settings = asdict(small_config(data, run, rows_per_step=2, steps=STEPS, log_every=2).train)
    made = replace(config, train=type(config.train)(**settings), io=replace(config.io, run=str(run), tensorboard=True))
    return small_run(data, replace(made, stage=replace(made.stage, train=("adapters", "router"))))


def whole_gates(module: Any) -> dict[str, list[list[float]]]:
    """By level and layer the mean of every gate, gathered one by one."""
    import deepspeed

    out: dict[str, list[list[float]]] = {level: [] for level in LEVELS}
    for layer in module.adapters:
        for level in LEVELS:
            gate = getattr(layer, f"gate_{level}")
            with deepspeed.zero.GatheredParameters([gate]):
                out[level].append(gate.detach().double().mean(1).tolist())
    return out


def job_train(run: SmallRun, world: Any, trainable: Any) -> dict[str, Any]:
    """The training loop itself; log.jsonl and event files by rank 0."""
    from eventlens_ds.train import loop, state
    from eventlens_ds.train.metrics import RunLog
    from eventlens_ds.train.preempt import StopFlag
    from eventlens_ds.train.skipped import SkippedLog
    from eventlens_ds.train.tensorboard import Board

    target = Path(run.config.io.run)
    writers = None
    if world.rank == 0:
        target.mkdir()
        written = RunLog(target / "log.jsonl", first_step=1), Board(target / "tensorboard")
        writers = loop.Writers(*written, lambda *_: 0.0, SkippedLog(target), lambda: None)  # type: ignore[arg-type]
    plan = run.data.plan(seed=0, rows_per_step=run.config.train.rows_per_step)
    with StopFlag() as stop:
        loop.train(
            trainable, run.data, plan, run.config, world, state.TrainState("p", "c"), stop, writers, lambda _: False
        )
    if writers is not None:
        writers.close()
    return whole_gates(trainable.engine.module)


def job_unequal_rows(run: SmallRun, world: Any, trainable: Any) -> dict[str, Any]:
    """A row of another level on each rank; then the gates read as they lie, in shards (negative control)."""
    from eventlens_ds.runtime.collectives import Recorder

    probe = RoutingProbe(trainable.engine.module)
    batch = run.batch(run.groups_of("caption" if world.rank else "event")[:1])
    with Recorder(trainable.engine.module, strict=True) as recorder:
        found = probe.read([batch], world.device)
        recorder.check()
    assert found is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(telemetry, "gathered", lambda *_, **__: contextlib.nullcontext())
        try:
            sharded = probe.read([batch], world.device)
            error = "" if sharded == found else "other numbers"
        except (IndexError, RuntimeError) as raised:
            error = str(raised)
    return {"found": asdict(found), "tokens": batch.real_tokens, "not_gathered": error}


def main(folder: Path) -> None:
    from eventlens_ds.runtime.distributed import start, stop

    world = start(threads=1, timeout_minutes=1)
    run = lion_run(Path(json.loads((folder / "case.json").read_text())), folder / "run")
    trainable = small_engine(run, world, folder)
    out = {"unequal": job_unequal_rows(run, world, trainable), "gates": job_train(run, world, trainable)}
    (folder / f"{world.rank}.json").write_text(json.dumps(out))
    stop()


@pytest.fixture(scope="module")
def outs(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    from eventlens_ds.runtime.local_ranks import spawn

    folder = tmp_path_factory.mktemp("routing")
    (folder / "case.json").write_text(json.dumps(str(world_folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
        assert spawn(2, [str(folder)], module="tests.train.test_routing") == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder / "run"


@pytest.mark.P5
def test_partitioned_gates_are_read_whole_and_rows_of_all_ranks_count(
    outs: tuple[list[dict[str, Any]], Path],
) -> None:
    one, two = (out["unequal"] for out in outs[0])
    assert one["found"] | {"gate_mean": 0, "gate_std": 0} == two["found"] | {"gate_mean": 0, "gate_std": 0}
    assert one["found"]["tokens"] == {"caption": two["tokens"], "event": one["tokens"]}
    share = one["tokens"] / (one["tokens"] + two["tokens"])
    assert one["found"]["usage"] == [pytest.approx([share, 1 - share], abs=1e-6)] * 2
    assert one["not_gathered"] and two["not_gathered"]


def test_logged_steps_alone_carry_the_gates_of_the_model(outs: tuple[list[dict[str, Any]], Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gates, run = outs[0][0]["gates"], outs[1]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, STEPS]
    assert all(line["routing"]["adapters"] == list(LEVELS) for line in lines)
    last = lines[-1]["routing"]
    for level in LEVELS:
        for logged, held in zip(last["gate_mean"][level], gates[level], strict=True):
            assert logged == pytest.approx(held, abs=1e-5)
    assert last["gate_mean"] != lines[0]["routing"]["gate_mean"]  # the router learns
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    assert [e.step for e in reader.Images("router/by_task")] == [1, 2, STEPS]
    assert [e.step for e in reader.Scalars("router_layers/gate/region_level/image_level/1")] == [1, 2, STEPS]


if __name__ == "__main__":
    leave(lambda: main(Path(sys.argv[1])))

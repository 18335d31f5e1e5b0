"""`eventlens prove resume`: kills a run at random times until it has been killed N times, and compares it with one
that nobody disturbed.

In: a recipe, settings, a number of kills. Out: a table and OUT/resume.json; exit code 3 when a row differs. Stages:
  1. data       an embedded world, when data.train is empty
  2. reference  the run from begin to end; how long it takes
  3. victims    the same command; SIGKILL to the launcher, a rank or a loader worker at a uniformly random time of the
                reference's duration, then the same command again; a finished victim is followed by the next one
  4. compare    ledger of samples, bits of losses and gradient norms, sha256 of every trained tensor and of its moments,
                points of TensorBoard, lists of skipped samples
Decision: black box. Everything is started by the command a user types and compared by the files it leaves.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError, UserError
from eventlens_ds.launch import sabotage
from eventlens_ds.runtime.local_ranks import before_exec

TARGETS = ("launcher", "rank", "worker")
MARK = ".eventlens-proof"
"""File in a folder that proofs may empty."""
WORLD = {"images": 60, "val_images": 12, "image_size": 64}
"""Size of the embedded world that is drawn when no data are named."""


@dataclass
class Victim:
    """One run that was killed. kills: [target, seconds after its start, step it had reached] each."""

    run: Path
    kills: list[list[Any]] = field(default_factory=list)
    attempts: int = 0


@dataclass(frozen=True)
class Proof:
    """What is run: the command of every run is the same but for its folder."""

    recipe: str
    settings: tuple[str, ...]
    out: Path
    ranks: int
    without: str = ""

    def command(self, run: Path, data: Sequence[Path]) -> list[str]:
        where = [f"--data.train=[{','.join(map(str, data))}]", f"--io.run={run}"]
        train = ["--ranks", str(self.ranks), "--config", self.recipe, *self.settings, *where]
        if self.without:
            return [sys.executable, "-m", sabotage.MODULE, *train]
        return [sys.executable, "-m", "eventlens_ds", "train", *train]

    def start(self, run: Path, data: Sequence[Path]) -> subprocess.Popen[bytes]:
        """The command in the background, output in RUN.log; it dies with us."""
        env = {**os.environ, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
        if self.without:
            env[sabotage.VARIABLE] = json.dumps({"without": self.without})
        with open(f"{run}.log", "ab") as log:
            arm = before_exec(os.getpid())
            command = self.command(run, data)
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=arm)


def children(pid: int) -> list[int]:
    """Child processes, as Linux tells them."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _target(kind: str, launcher: int, draw: random.Random) -> tuple[str, int]:
    """(what is killed, its process id): the launcher where there is no rank or worker yet."""
    ranks = children(launcher)
    workers = [child for rank in ranks for child in children(rank)]
    found = {"rank": ranks, "worker": workers}.get(kind, [])
    return (kind, draw.choice(found)) if found else ("launcher", launcher)


def claim(out: Path) -> None:
    """Make OUT, or take one that an earlier proof made: what it holds is replaced. UserError for any other folder with
    something in it."""
    mark = out / MARK
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds files that no proof left there; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def data_of(proof: Proof) -> list[Path]:
    """Folders of data.train, or an embedded world drawn into OUT/world."""
    from eventlens_ds.config import load

    config = load.load(proof.recipe, list(proof.settings))
    if config.data.train:
        return [Path(folder) for folder in config.data.train]
    world = proof.out / "world"
    if not (world / "dataset.json").exists():
        from eventlens_ds.data import build
        from eventlens_ds.data.sources import combined

        size = WORLD["image_size"]
        source = combined.draw_world(
            proof.out / "world-raw",
            seed=0,
            num_images=WORLD["images"],
            image_size=size,
            val_images=WORLD["val_images"],
        )
        build.build(source, world, arguments={"seed": 0, "num_images": WORLD["images"], "image_size": size})
    return [world]


def reference(proof: Proof, data: Sequence[Path]) -> float:
    """Run OUT/reference to its end; how many seconds it took. DataError when it fails by itself."""
    run = proof.out / "reference"
    shutil.rmtree(run, ignore_errors=True)
    started = time.monotonic()
    code = proof.start(run, data).wait()
    if code:
        raise DataError(f"{run}: the undisturbed run ended with exit code {code}; see {run}.log")
    return time.monotonic() - started


def kill(proof: Proof, data: Sequence[Path], kills: int, seconds: float, seed: int, say: Callable[[str], None]) -> list:
    """Victims that were killed `kills` times in all, each brought to its end."""
    victims: list[Victim] = []
    draw, left = random.Random(seed), kills
    while left:
        victim = Victim(proof.out / f"victim-{len(victims)}")
        shutil.rmtree(victim.run, ignore_errors=True)
        victims.append(victim)
        code = None
        while code is None:
            victim.attempts += 1
            process = proof.start(victim.run, data)
            code = _disturb(process, victim, draw, seconds, say) if left else process.wait()
            if code is not None:
                break
            left -= 1
        if code:
            raise DataError(
                f"{victim.run}: attempt {victim.attempts} ended with exit code {code}; see {victim.run}.log"
            )
    return victims


def _disturb(
    process: subprocess.Popen[bytes], victim: Victim, draw: random.Random, seconds: float, say: Callable[[str], None]
) -> int | None:
    """Kill a part of a run at a random time: None, or the exit code of one that had ended before."""
    kind, after = draw.choice(TARGETS), draw.uniform(0, seconds)
    try:
        return process.wait(after)
    except subprocess.TimeoutExpired:
        pass
    what, pid = _target(kind, process.pid, draw)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return process.wait()
    code = process.wait()
    if code == 0:  # a worker whose work was done
        return 0
    step = max((row["step"] for row in _log(victim.run)), default=0)
    victim.kills.append([what, round(after, 2), step])
    say(f"{victim.run.name}: killed {what} after {after:.1f} s, at step {step}")
    return None


def _log(run: Path) -> list[dict[str, Any]]:
    from eventlens_ds.train.metrics import read_log

    return read_log(run / "log.jsonl") if (run / "log.jsonl").exists() else []


def facts(run: Path, ranks: int) -> dict[str, Any]:
    """What two runs are compared by."""
    from eventlens_ds.runtime.checkpoint import digests, resolve
    from eventlens_ds.train import ledger

    found = resolve(run)
    rows = [(r["step"], r["loss"].hex(), r["grad_norm"].hex(), r["sample_hash"]) for r in _log(run)]
    ledgers = [sorted(ledger.effective(run / f"ledger-rank{rank}.jsonl").items()) for rank in range(ranks)]
    skipped = run / "skipped.jsonl"
    hashes = digests(found) if found else {}
    moments = {name: digest for name, digest in hashes.items() if " exp_avg" in name}
    return {
        "ledger": ledgers,
        "losses": rows,
        "parameters": {name: digest for name, digest in hashes.items() if name not in moments},
        "moments": moments,
        "tensorboard": points(run / "tensorboard"),
        "skipped": skipped.read_text() if skipped.exists() else "",
    }


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them, without what depends on time and memory."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # It warns of every restart, and restarts are what is proved here.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if not tag.startswith(("perf/", "data/wait"))]
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in tags}


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, bool]:
    """Kind of fact -> whether it is the same. No fact at all is no proof."""
    same = {name: bool(wanted[name] or name == "skipped") and found[name] == wanted[name] for name in wanted}
    doubled = any(len({step for step, _ in values}) != len(values) for values in found["tensorboard"].values())
    same["tensorboard"] = (found["tensorboard"] == wanted["tensorboard"]) and not doubled
    return same


def resume(proof: Proof, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole proof; its result as written to OUT/resume.json."""
    if kills < 1:
        raise UserError(f"--kills {kills}: must be at least 1")
    claim(proof.out)
    began = time.monotonic()
    data = data_of(proof)
    seconds = reference(proof, data)
    say(f"reference: {seconds:.1f} s")
    wanted = facts(proof.out / "reference", proof.ranks)
    rows = []
    for victim in kill(proof, data, kills, seconds, seed, say):
        same = compare(wanted, facts(victim.run, proof.ranks))
        rows.append({"run": victim.run.name, "attempts": victim.attempts, "kills": victim.kills, "same": same})
    result = {
        "recipe": proof.recipe,
        "ranks": proof.ranks,
        "without": proof.without,
        "seed": seed,
        "kills": sum(len(row["kills"]) for row in rows),
        "reference_seconds": round(seconds, 1),
        "seconds": round(time.monotonic() - began, 1),
        "steps": len(wanted["losses"]),
        "samples": sum(len(ids) for ledger in wanted["ledger"] for _, ids in ledger),
        "tensors": len(wanted["parameters"]) + len(wanted["moments"]),
        "runs": rows,
        "identical": all(all(row["same"].values()) for row in rows),
    }
    (proof.out / "resume.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    kinds = list(result["runs"][0]["same"])
    lines = [f"{'run':<12} {'kills':>5} {'attempts':>8}  " + "  ".join(f"{kind:>11}" for kind in kinds)]
    for row in result["runs"]:
        marks = "  ".join(f"{'identical' if row['same'][kind] else 'DIFFERS':>11}" for kind in kinds)
        lines.append(f"{row['run']:<12} {len(row['kills']):>5} {row['attempts']:>8}  {marks}")
    told = [f"{what} {after:g}s/step {step}" for row in result["runs"] for what, after, step in row["kills"]]
    counts = f"{result['steps']} steps, {result['samples']} samples, {result['tensors']} tensors"
    took = f"{result['kills']} kills in {result['seconds']:.0f} s (undisturbed: {result['reference_seconds']:.0f} s)"
    without = f", without {result['without']}" if result["without"] else ""
    lines += ["", f"killed: {', '.join(told)}", f"{took}, {result['ranks']} ranks, {counts}{without}"]
    return "\n".join(lines)

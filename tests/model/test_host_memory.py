"""Host memory of four ranks that load a published model under ZeRO-3: at most 1.3 copies of its weights (slow).

In: a random language model of 370 MB in shards. Out: the highest sum over ranks of PSS (shared pages counted once)
above what each process held before, from construction to the last tensor. Run as a program on every rank.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from eventlens_ds.runtime.failures import leave

RANKS = 4
LIMIT = 1.3
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 8}


def pss() -> int:
    """Proportional set size of this process in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in /proc/self/smaps_rollup")


class Watch:
    """PSS of this process above its value on entry: [seconds, bytes] every 10 ms while it is open."""

    def __enter__(self) -> Watch:
        self.before = pss()
        self.samples: list[tuple[float, int]] = []
        self.open = True
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def _run(self) -> None:
        while self.open:
            self.samples.append((time.monotonic(), pss() - self.before))
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        self.open = False
        self.thread.join()


def highest_sum(ranks: list[list[tuple[float, int]]]) -> int:
    """The highest sum over ranks at one time; a rank's value holds until its next sample."""
    changes = sorted((at, rank, value) for rank, samples in enumerate(ranks) for at, value in samples)
    now, highest = [0] * len(ranks), 0
    for _, rank, value in changes:
        now[rank] = value
        highest = max(highest, sum(now))
    return highest


def _job(folder: Path, whole: bool) -> None:
    import deepspeed  # noqa: F401 - part of what a process holds anyway
    import peft  # noqa: F401

    from eventlens_ds.model.folders import load_folders
    from eventlens_ds.model.weights import gathered
    from eventlens_ds.runtime.build_model import describe, new_model
    from eventlens_ds.runtime.distributed import agree, start, stop
    from tests.model import tiny_folders as tiny

    world = start(threads=1, timeout_minutes=3.0)
    tiny.loaded({"shrink": True}, 3)
    config = tiny.run_config({"model": {"language_path": str(folder)}})
    architecture, _, _ = describe(config, dry=True)
    agree("the start", 0)
    with Watch() as watch:
        model = new_model(config, architecture, tiny.settings(0 if whole else 3))
        load_folders(model, config.model)
    agree("the end", 0)
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    with gathered([model.language_model.lm_head.weight], modifier_rank=None):
        first = model.language_model.lm_head.weight.flatten()[:4].tolist()
    found = {"samples": watch.samples, "weights": size, "first": first}
    (folder / f"rank{world.rank}-{int(whole)}.json").write_text(json.dumps(found))
    stop()


def copies(folder: Path, whole: bool) -> float:
    """Peak host memory of all ranks, in copies of the weights."""
    from eventlens_ds.runtime.local_ranks import spawn

    assert spawn(RANKS, [str(folder), *(["whole"] if whole else [])], module="tests.model.test_host_memory") == 0
    ranks = [json.loads((folder / f"rank{rank}-{int(whole)}.json").read_text()) for rank in range(RANKS)]
    assert all(rank["first"] == ranks[0]["first"] for rank in ranks)
    found = highest_sum([rank["samples"] for rank in ranks]) / ranks[0]["weights"]
    print(f"{RANKS} ranks, whole={whole}: {found:.2f} copies of {ranks[0]['weights'] >> 20} MiB")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_node_holds_one_copy_whatever_the_ranks(tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.model import tiny_folders as tiny

    config = LlamaConfig(vocab_size=8000, **SIZES)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if kind == "bin":
        tiny.save_bin(model, tmp_path, shards=2)
    else:
        model.save_pretrained(tmp_path, max_shard_size="200MB")
    tiny.with_tokenizer(tmp_path)
    del model
    assert copies(tmp_path, whole=False) <= LIMIT
    if kind == "safetensors":
        # The control: the same measurement sees one copy per rank where nothing is partitioned.
        assert copies(tmp_path, whole=True) > 3


if __name__ == "__main__":
    leave(lambda: _job(Path(sys.argv[1]), len(sys.argv) > 2))

"""The preview page: it shows every token of the batch, boxes as they are pooled, and no markup that data brings."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eventlens_ds.data import build, preview
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.records import TASKS
from eventlens_ds.data.sources import combined
from eventlens_ds.errors import UserError
from tests.data.conftest import paint_vcr
from tests.small_world import SmallRun, small_config, small_run

ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "span", "section", "div", "b", "wbr"),
    *("svg", "image", "rect", "text", "table", "tr", "td"),
}


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text inside each class of span."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.spans: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "span":
            self._open.append(found.get("class", ""))
            self.spans.append((found.get("class", ""), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            kind, text = self.spans[-1]
            self.spans[-1] = (kind, text + data)

    def all(self, tag: str) -> Iterator[dict[str, str]]:
        return (found for name, found in self.elements if name == tag)


def shown(data: RunData, out: Path, number: int = 4) -> Page:
    return Page(preview.preview(data, out, number=number))


@pytest.mark.P4
@pytest.mark.parametrize("layout", ["tree", "flat"])
def test_every_token_of_the_batch_is_shown(small: SmallRun, world_folder: Path, tmp_path: Path, layout: str) -> None:
    run = small_run(world_folder, layout=layout, tasks=TASKS)
    held = [task for task in TASKS if task != "lcl"]
    chosen = preview._spread(run.data, len(held))
    assert {TASKS[int(run.data.groups[t].task[g])] for t, g in chosen} == set(held)
    page = shown(run.data, tmp_path / "page.html", number=len(held))
    batches = [run.batch([member]) for member in chosen]
    # The legend shows one span of each kind.
    tokens = [span for span in page.spans if span[0].startswith("tok")][4:]
    chips = [text for kind, text in page.spans if kind == "chip"][1:]
    assert len(tokens) == sum(int((b.image_slots < 0).sum()) for b in batches)
    assert sum(int(text.split("\N{MULTIPLICATION SIGN}")[1]) for text in chips) == sum(
        int((b.image_slots >= 0).sum()) for b in batches
    )
    assert sum("mention" in kind for kind, _ in tokens) == sum(int((b.region_slots >= 0).sum()) for b in batches)
    supervised = sum("lm" in kind.split() or "choice" in kind.split() for kind, _ in tokens)
    assert supervised == sum(b.target_ids.numel() for b in batches)
    labels = sum(kind == "label" for kind, _ in page.spans) - 1
    assert labels == sum(int((b.choice_labels >= 0).sum()) for b in batches) > 0


@pytest.mark.P1
@pytest.mark.P6
def test_boxes_are_those_regions_are_pooled_from(small: SmallRun, tmp_path: Path) -> None:
    page = shown(small.data, tmp_path / "page.html", number=1)
    (member,) = preview._spread(small.data, 1)
    batch = small.batch([member])
    scale = preview.SHOWN_WIDTH / small.spec.vision.image_size
    drawn = [[float(r[k]) for k in ("x", "y", "width", "height")] for r in page.all("rect")][::2]
    boxes = batch.boxes.numpy() * scale
    expected = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    np.testing.assert_allclose(drawn, expected, atol=0.06)
    (picture,) = page.all("image")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["href"].split(",")[1]))), np.float32) / 255
    mean, std = (np.asarray(v, np.float32) for v in (small.spec.vision.mean, small.spec.vision.std))
    np.testing.assert_allclose((pixels - mean) / std, batch.pixel_values[0].numpy().transpose(1, 2, 0), atol=0.01)


@pytest.mark.P11
def test_data_cannot_write_markup(tmp_path: Path) -> None:
    root = paint_vcr(tmp_path / "source", images=4, splits=("train",))
    evil = "</span><script>alert(1)</script><img src=http://x/y onerror=alert(2)>&lt;"
    path = root / "vcr" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["question"] = [evil, "why?"]
        row["answer_choices"][0] = [evil]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build.build(combined.open_source("vcr", root), tmp_path / "built")
    run = small_run(tmp_path / "built", small_config(tmp_path / "built"), row_tokens=2048)
    page = shown(run.data, tmp_path / "page.html", number=2)
    assert {tag for tag, _ in page.elements} <= ALLOWED
    raw = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "alert" in re.sub(r"<[^>]*>", "", raw), "the words themselves are shown, token by token"
    links = [value for _, found in page.elements for key, value in found.items() if key in ("href", "src")]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert not any(key.startswith("on") for _, found in page.elements for key in found)
    assert "default-src 'none'" in raw


@pytest.mark.P11
def test_without_escaping_markup_would_get_through(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_token_text", lambda data, token: "<script>")
    assert "script" not in {tag for tag, _ in shown(small.data, tmp_path / "a.html", 1).elements}
    monkeypatch.setattr(preview, "escape", lambda text: text)
    assert "script" in {tag for tag, _ in shown(small.data, tmp_path / "b.html", 1).elements}


def test_a_picture_that_cannot_be_decoded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = paint_vcr(tmp_path / "source", images=3)
    build.build(combined.open_source("vcr", root), tmp_path / "built")
    run = small_run(tmp_path / "built")
    whole = run.data.shards[0].image_bytes
    monkeypatch.setattr(run.data.shards[0], "image_bytes", lambda image: whole(image)[:200])
    page = shown(run.data, tmp_path / "page.html", number=1)
    kinds = {kind for kind, _ in page.spans[4:]}
    assert "weight 0" in page.text and any("unweighted" in kind for kind in kinds)
    assert not any("choice" in kind.split() for kind in kinds)


def test_targets_that_are_not_the_leaf_are_refused(small: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    (member,) = preview._spread(small.data, 1)
    batch = small.batch([member])
    preview._marks(batch, ["x"] * len(batch.boxes))
    batch.target_ids = batch.target_ids.roll(1)
    with pytest.raises(ValueError, match="the targets of leaf 0 are not its tokens"):
        preview._marks(batch, ["x"] * len(batch.boxes))


def test_a_page_that_cannot_be_written_is_one_line(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        preview.preview(small.data, tmp_path, number=1)


@pytest.mark.P12
def test_real_photographs(shared: Path, tmp_path: Path) -> None:
    build.build(combined.open_source("vcr", shared / "data" / "photos"), tmp_path / "built")
    config = small_config(tmp_path / "built")
    object.__setattr__(config.data, "split", "val")
    page = shown(small_run(tmp_path / "built", config).data, tmp_path / "page.html", number=3)
    assert sum(1 for _ in page.all("image")) == 3
    assert "person1" in page.text

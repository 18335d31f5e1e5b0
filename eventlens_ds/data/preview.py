"""One HTML page of what the model gets: picture, boxes, and every token of the segment tree of some groups.

In: `RunData` of a folder, as training makes it. Out: a self-contained page (pictures as data URLs, no scripts, nothing
loaded from elsewhere). Decision: the page is drawn from the collated `Batch`, never from the strings behind it, so a
wrong slot, box, adapter or label shows up here as it reaches the model. Everything from the data is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eventlens_ds.data.boxes import problem
from eventlens_ds.data.loader import RunData
from eventlens_ds.data.panel import PALETTE
from eventlens_ds.data.prompts import region_name, render
from eventlens_ds.data.records import TASKS, Batch, Box, Group
from eventlens_ds.data.shards import replacing

SHOWN_WIDTH = 440
"""Pixels a picture takes on the page."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:24px;color:#1a1a1a;background:#fff}
h1{font-size:22px;margin:0 0 4px}h2{font-size:17px;margin:0 0 8px}
section{border-top:2px solid #ccc;padding:18px 0}
.two{display:flex;gap:24px;align-items:flex-start;flex-wrap:wrap}.two>div{flex:1 1 560px;min-width:0}
svg{flex:0 0 auto;border:1px solid #999}
.seg{border-left:3px solid #bbb;padding:2px 0 2px 10px;margin:4px 0}
.head{font-size:12px;color:#666}.head b{color:#1a1a1a}
.tok{font-family:ui-monospace,monospace;border-radius:3px;padding:1px 1px;border-bottom:3px solid transparent;
 white-space:pre-wrap;box-shadow:inset 0 0 0 1px #e4e4e4}
.lm{background:#cdeed5}.choice{background:#d4e3fb}.unweighted{background:#eee;color:#777}
.mention{color:#fff}.linked{border-bottom-color:currentColor}
.chip{background:#333;color:#fff;border-radius:10px;padding:1px 8px;font-size:13px}
.label{background:#147832;color:#fff;border-radius:3px;padding:0 6px;font-size:12px}
.bad{color:#b91e1e}table{border-collapse:collapse;font-size:13px}td,th{padding:1px 10px 1px 0;text-align:left}
"""
_BREAK = "<wbr>"
_BLANK = "\N{MIDDLE DOT}"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def preview(data: RunData, out: Path, *, number: int) -> Path:
    """Write the page of `number` groups, spread over the tasks and over the split, and return `out`.

    Raises DataError for a damaged shard, UserError when the page cannot be written.
    """
    chosen = _spread(data, number)
    parts = [_section(data, table, group) for table, group in chosen]
    names = ", ".join(shards.folder.name for shards in data.shards)
    spec = data.spec
    about = (
        f"{len(chosen)} of {sum(map(len, data.groups))} groups; split {data.split}; layout {data.config.layout}; "
        f"linking {spec.linking}; {spec.vision.image_size} px, {spec.vision.tokens} visual tokens per image; "
        f"rows of {data.config.row_tokens} tokens"
    )
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(names)}: what the model sees</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(names)}: what the model sees</h1><p>{escape(about)}</p>"
        f"{_legend(spec.vision.tokens)}{''.join(parts)}</body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(page.encode())
    return out


def _legend(visual_tokens: int) -> str:
    return (
        '<p><span class="tok lm">LM loss</span> <span class="tok choice">scored as a candidate</span> '
        '<span class="tok unweighted">shown, weight 0</span> '
        f'<span class="tok mention" style="background:rgb{PALETTE[0]}">mention</span> in the colour of its box, above '
        f'the colour of its loss &middot; <span class="chip">&lt;image&gt; &times;{visual_tokens}</span> visual tokens '
        f'&middot; <span class="label">label</span> the right candidate &middot; a dot is a blank</p>'
    )


def _spread(data: RunData, number: int) -> list[tuple[int, int]]:
    """(table, group) of about equally many groups of every task, at even distances."""
    by_task: dict[int, list[tuple[int, int]]] = {}
    for table, groups in enumerate(data.groups):
        for group, task in enumerate(groups.task.tolist()):
            by_task.setdefault(task, []).append((table, group))
    chosen: list[tuple[int, int]] = []
    left = number
    for done, task in enumerate(sorted(by_task, key=lambda t: len(by_task[t]))):
        found = by_task[task]
        take = min(len(found), -(-left // (len(by_task) - done)))
        # Shifted from task to task, so that the page does not show the same few pictures again and again.
        chosen += [found[(i * len(by_task) + done) * len(found) // (take * len(by_task))] for i in range(take)]
        left -= take
    return sorted(chosen, key=lambda c: (int(data.groups[c[0]].task[c[1]]), c))


@dataclass(frozen=True)
class _Marks:
    """What the batch says about its tokens and segments.

    leaf int[S]: leaf of each segment or -1; kind: css class of every leaf; label: leaves that are the right candidate;
    names: one per region of the batch.
    """

    leaf: list[int]
    kind: list[str]
    labels: set[int]
    names: list[str]


def _section(data: RunData, table: int, number: int) -> str:
    group = data.group(table, number)
    batch = data.batch([(table, number)], 0)
    names = [
        region_name(image.regions[box].name, box)
        for image, boxes in zip(group.images, render(group, data.spec.style).regions)
        for box in boxes
    ]
    marks = _marks(batch, names)
    planned = int(data.groups[table].lengths[number])
    tree = "".join(_segment(data, batch, marks, s) for s in range(len(batch.parents)) if batch.parents[s] < 0)
    pictures = "".join(_picture(data, batch, group, m, names) for m in range(batch.pixel_values.shape[0]))
    skipped = "".join(f'<p class="bad">weight 0: {escape(i)}: {escape(why)}</p>' for i, why in batch.skipped)
    return (
        f"<section><h2>{escape(group.task)} &middot; {escape(group.images[0].img_fn)}</h2>{skipped}"
        f'<div class="two"><div style="flex:0 0 {SHOWN_WIDTH}px">{pictures}{_facts(batch, marks, planned)}</div>'
        f"<div>{tree}</div></div></section>"
    )


def _marks(batch: Batch, names: Sequence[str]) -> _Marks:
    """Which segment is which leaf, found from the tree and checked against the targets token by token."""
    parents = set(batch.parents.tolist())
    leaf_of = []
    count = 0
    for segment in range(len(batch.parents)):
        start, end = batch.bounds[segment].tolist()
        found = torch.equal(batch.target_ids[batch.target_leaf == count], batch.input_ids[0, start:end])
        # An answer inside an episode is a leaf that the next question hangs on.
        is_leaf = batch.parents[segment] >= 0 and (segment not in parents or found)
        leaf_of.append(count if is_leaf else -1)
        if is_leaf:
            if not found:
                raise ValueError(f"group of {batch.sample_ids[:1]}: the targets of leaf {count} are not its tokens")
            count += 1
    kind = ["lm" if weight else "unweighted" for weight in batch.leaf_weight.tolist()]
    labels = set()
    for leaves, label, weight in zip(
        batch.choice_leaves.tolist(), batch.choice_labels.tolist(), batch.choice_weight.tolist()
    ):
        for place, leaf in enumerate(leaves):
            kind[leaf] = "choice" if weight else "unweighted"
            labels |= {leaf} if place == label else set()
    return _Marks(leaf_of, kind, labels, list(names))


def _segment(data: RunData, batch: Batch, marks: _Marks, segment: int) -> str:
    """A segment with its children inside."""
    start, end = batch.bounds[segment].tolist()
    leaf = marks.leaf[segment]
    kind = marks.kind[leaf] if leaf >= 0 else ""
    adapters = ", ".join(TASKS[t] for t in sorted(set(batch.task_ids[start:end].tolist())))
    head = f"segment {segment} &middot; {end - start} tokens"
    if end > start:
        first, last = (int(batch.position_ids[0, i]) for i in (start, end - 1))
        head += f" at positions {first} to {last}"
    head += f" &middot; adapter <b>{escape(adapters)}</b>"
    if leaf >= 0:
        sample = batch.sample_ids[int(batch.leaf_sample[leaf])]
        head += f" &middot; leaf {leaf} of {escape(sample)}"
    mark = ' <span class="label">label</span>' if leaf in marks.labels else ""
    children = "".join(
        _segment(data, batch, marks, child) for child in (batch.parents == segment).nonzero()[:, 0].tolist()
    )
    tokens = "".join(_tokens(data, batch, marks, start, end, kind))
    return f'<div class="seg"><div class="head">{head}{mark}</div>{tokens}{children}</div>'


def _tokens(data: RunData, batch: Batch, marks: _Marks, start: int, end: int, kind: str) -> Iterator[str]:
    at = start
    while at < end:
        stop = at
        while stop < end and batch.image_slots[stop] >= 0:
            stop += 1
        if stop > at:
            yield f'<span class="chip">&lt;image&gt; &times;{stop - at}</span> '
            at = stop
            continue
        region = int(batch.region_slots[at])
        classes, style, title = f"tok {kind}", "", f"position {int(batch.position_ids[0, at])}"
        text = _token_text(data, int(batch.input_ids[0, at]))
        if region >= 0:
            classes += " mention"
            style = f' style="background:rgb{PALETTE[region % len(PALETTE)]};{_line(kind)}"'
            title += f", region {region}: {marks.names[region]}"
            if data.spec.linking == "insert":
                text = f"[{marks.names[region]}]"
        # A long line may break at a blank only, and blanks are shown as dots.
        gap = _BREAK if text.startswith(_BLANK) else ""
        yield f'{gap}<span class="{classes}"{style} title="{escape(title)}">{escape(text)}</span>'
        at += 1


def _line(kind: str) -> str:
    colors = {"lm": "#2fae57", "choice": "#4a86e8", "unweighted": "#bbb"}
    return f"border-bottom-color:{colors[kind]}" if kind in colors else ""


def _token_text(data: RunData, token: int) -> str:
    """A token as text with visible blanks; one that is only a part of a character by its name in the vocabulary."""
    text = data.tokenizer.hf.decode([token])
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        text = str(data.tokenizer.hf.convert_ids_to_tokens(token))
    return text.replace(" ", _BLANK).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")


def _picture(data: RunData, batch: Batch, group: Group, m: int, names: Sequence[str]) -> str:
    """The pixels the tower gets, with the boxes that regions are pooled from."""
    vision = data.spec.vision
    planes = batch.pixel_values[m].numpy() * np.reshape(vision.std, (3, 1, 1)) + np.reshape(vision.mean, (3, 1, 1))
    pixels = np.round(np.clip(planes, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    height, width = pixels.shape[:2]
    scale = SHOWN_WIDTH / width
    first, last = batch.box_offsets[m : m + 2].tolist()
    corners = [[v * scale for v in box] for box in batch.boxes[first:last].tolist()]
    drawn = "".join(_outline(i, box) for i, box in enumerate(corners, first))
    # Names after all outlines, so that no line crosses one.
    taken: list[tuple[float, float, float]] = []
    drawn += "".join(_name(i, box, names[i], height * scale, taken) for i, box in enumerate(corners, first))
    image = group.images[m]
    return (
        f'<svg width="{SHOWN_WIDTH}" height="{height * scale:.0f}" role="img">'
        f'<image href="{url}" width="{SHOWN_WIDTH}" height="{height * scale:.0f}" style="image-rendering:pixelated"/>'
        f"{drawn}</svg><div class=head>{escape(image.key)} &middot; {image.width} x {image.height} px, "
        f"seen as {width} x {height}</div>"
    )


def _outline(region: int, corners: Sequence[float]) -> str:
    x1, y1, x2, y2 = corners
    where = f'x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" fill="none"'
    color = f"rgb{PALETTE[region % len(PALETTE)]}"
    return f'<rect {where} stroke="#fff" stroke-width="5"/><rect {where} stroke="{color}" stroke-width="2.5"/>'


def _name(
    region: int, corners: Sequence[float], name: str, height: float, taken: list[tuple[float, float, float]]
) -> str:
    """The name above its box, or at the next free height above or below. taken: (left, right, base line) of names."""
    width = 8.0 * len(name)
    x = min(max(0.0, corners[0]), SHOWN_WIDTH - width)
    wanted = max(13.0, corners[1] - 4)
    heights = sorted((13.0 + 7 * i for i in range(int((height - 13) / 7))), key=lambda y: abs(y - wanted))
    free = (
        y for y in heights if not any(x < right and left < x + width and abs(y - b) < 14 for left, right, b in taken)
    )
    y = next(free, wanted)
    taken.append((x, x + width, y))
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="13" font-weight="bold" fill="rgb{PALETTE[region % len(PALETTE)]}" '
        f'stroke="#fff" stroke-width="3.5" paint-order="stroke">{escape(name)}</text>'
    )


def _facts(batch: Batch, marks: _Marks, planned: int) -> str:
    """Counts: tokens planned and encoded, losses, and how often every region is named."""
    named = torch.bincount(batch.region_slots[batch.region_slots >= 0], minlength=len(marks.names)).tolist()
    size = float(batch.pixel_values.shape[-1])
    rows = []
    for i, (name, count) in enumerate(zip(marks.names, named)):
        color = f"rgb{PALETTE[i % len(PALETTE)]}"
        box = Box(*batch.boxes[i].tolist())
        wrong = problem(box, size, size)
        where = ", ".join(f"{v:.1f}" for v in box)
        note = f' <span class="bad">{escape(wrong)}</span>' if wrong else "" if count else " (no token names it)"
        rows.append(
            f'<tr><td style="color:{color}"><b>{escape(name)}</b></td><td>slot {i}</td><td>{count} tokens{note}</td>'
            f"<td>{where}</td></tr>"
        )
    losses = {kind: 0 for kind in ("lm", "choice", "unweighted")}
    for leaf, count in enumerate(torch.bincount(batch.target_leaf, minlength=len(marks.kind)).tolist()):
        losses[marks.kind[leaf]] += count
    counted = ", ".join(f"{n} {kind}" for kind, n in losses.items() if n) or "none"
    slots = int((batch.image_slots >= 0).sum())
    return (
        f"<p>tokens: <b>{planned}</b> planned (a tree), <b>{batch.real_tokens}</b> encoded; {slots} image slots; "
        f"{int((batch.region_slots >= 0).sum())} region slots; targets: {counted}</p><table>{''.join(rows)}</table>"
    )

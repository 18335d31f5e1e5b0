"""The heat map of a router: which share of a task's tokens each adapter takes, layer by layer.

In: a `Routing`. Out: an RGB picture, rows are layers from the first downwards, columns are (task, adapter).
Decision: the scale is fixed at 0 to 1, so pictures of two steps or two runs can be laid side by side; what no adapter
takes stays white.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eventlens_ds.train.routing import Routing

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CELL_W, GAP, MARGIN = 46, 10, 12
TALLEST = 640
"""Pixels that the rows of layers take at most."""
INK, PAPER = (25, 25, 25), (255, 255, 255)
DARK = (8, 64, 129)
"""Colour of a share of 1."""


def heat_map(routing: Routing) -> np.ndarray:
    """uint8 [H, W, 3]. Shares that are not finite are drawn black. Raises ValueError without a task."""
    if not routing.by_task:
        raise ValueError("no task has tokens in this step")
    shares = {task: np.asarray(rows, dtype=np.float64) for task, rows in routing.by_task.items()}
    layers, adapters = len(routing.layers), len(routing.adapters)
    cell_h = max(6, min(24, TALLEST // layers))
    font = ImageFont.load_default(13)
    left = MARGIN + max(round(font.getlength(_label(name))) for name in routing.layers) + 8
    below = max(round(font.getlength(name)) for name in routing.adapters) + 8
    block = adapters * CELL_W
    title = f"share of a task's tokens by adapter (scale 0 to 1); router entropy {_entropy(routing)}"
    width = max(left + len(shares) * (block + GAP) + MARGIN, MARGIN * 2 + round(font.getlength(title)))
    top = MARGIN + 44
    page = Image.new("RGB", (width, top + layers * cell_h + below + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN - 4), title, INK, font)
    for number, (task, values) in enumerate(shares.items()):
        x = left + number * (block + GAP)
        pen.text((x, MARGIN + 20), _fitted(task, font, block), INK, font)
        for row in range(layers):
            for column in range(adapters):
                _cell(pen, (x + column * CELL_W, top + row * cell_h), cell_h, float(values[row, column]))
        for column, name in enumerate(routing.adapters):
            _upright(page, (x + column * CELL_W, top + layers * cell_h + 4), name, font)
    every = -(-16 // cell_h)
    for row, name in enumerate(routing.layers):
        if row % every == 0:
            pen.text((MARGIN, top + row * cell_h + (cell_h - 16) // 2), _label(name), INK, font)
    return np.asarray(page).copy()


def _cell(pen: ImageDraw.ImageDraw, corner: tuple[int, int], height: int, share: float) -> None:
    x, y = corner
    known = bool(np.isfinite(share))
    mixed = tuple(round(p + (d - p) * min(max(share, 0.0), 1.0)) if known else 0 for p, d in zip(PAPER, DARK))
    pen.rectangle((x, y, x + CELL_W - 2, y + height - 2), mixed, (205, 205, 205))
    if height >= 16:
        ink = PAPER if share > 0.5 or not known else INK
        pen.text((x + 8, y + (height - 16) // 2), f"{share:.2f}", ink, ImageFont.load_default(12))


def _upright(page: Image.Image, corner: tuple[int, int], text: str, font: Font) -> None:
    """A name written upwards below its column."""
    strip = Image.new("RGB", (round(font.getlength(text)) + 2, 18), PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, INK, font)
    page.paste(strip.rotate(90, expand=True), (corner[0] + (CELL_W - 18) // 2, corner[1]))


def _label(layer: str) -> str:
    return "all layers" if layer == "all" else f"layer {layer}"


def _fitted(text: str, font: Font, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text


def _entropy(routing: Routing) -> str:
    return f"{sum(routing.entropy) / len(routing.entropy):.3f} nats" if routing.entropy else "unknown"

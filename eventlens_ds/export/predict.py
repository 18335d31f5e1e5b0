"""`eventlens predict OUT IMAGE`: ask an exported model about one image with named boxes.

In: a folder of `eventlens export`, an image, boxes in its pixels, and a question (with or without choices) or the wish
for events. Out: text, and a PNG of boxes, question, answer or before / intent / after. Decision: the folder is loaded
by the Auto classes as any user would, and the prompt is built by its processor, which is the one of training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from eventlens_ds.data import panel, transforms
from eventlens_ds.data.prompts import region_name
from eventlens_ds.data.records import Group, RegionRef, Tokens
from eventlens_ds.data.shards import replacing
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval.generate import continue_row, region_mentions
from eventlens_ds.model.attention import choose_form
from eventlens_ds.model.objective import leaf_scores
from eventlens_ds.model.processing import image_record, parse_mentions, picture_size

log = logging.getLogger(__name__)

NEW_TOKENS = 24
"""Longest generated text."""

NamedBox = tuple[str, tuple[float, float, float, float]]


def main(
    model: Path,
    image: Path,
    *,
    boxes: Sequence[NamedBox] = (),
    png: Path | None = None,
    question: str | None = None,
    choices: Sequence[str] = (),
    events: bool = False,
    tags: Sequence[str] | None = None,
) -> str:
    """The answer as text. boxes: (class name, xyxy in pixels as displayed); texts mention them as [1] or person1.

    With choices their scores (mean log-likelihood per token), the best marked; without, a greedy answer; with events
    place, event, intent, before and after, each generated given the ones before. tags: of the image, the surest first,
    for a model with a soft prompt. Raises UserError for what does not
    fit, DataError for a folder or image that cannot be read.
    """
    if bool(question) == events:
        raise UserError("give either a question or events")
    if events and choices:
        raise UserError("choices belong to a question, not to events")
    for text in (question or "", *choices):
        parse_mentions(text, [name for name, _ in boxes])
    if tags is not None and not tags:
        raise UserError("--tags: names no tag; leave it out to ask without tags")
    asked = Asked(model, image, boxes, tags or ())
    if events:
        told = asked.events()
        notes = [(name, told[name]) for name in ("place", "event", "before", "intent", "after")]
        text = "\n".join(f"{name + ':':8}{body}" for name, body in notes)
        drawn: dict[str, Any] = {"notes": notes}
    elif choices:
        scores = asked.scores(question or "", choices)
        best = max(range(len(scores)), key=scores.__getitem__)
        shown = [asked.shown(choice) for choice in choices]
        text = "\n".join(f"{'>' if i == best else ' '} {s:8.3f}  {t}" for i, (s, t) in enumerate(zip(scores, shown)))
        drawn = {"question": asked.shown(question or ""), "choices": shown, "scores": scores, "prediction": best}
    else:
        text = asked.answer(question or "")
        drawn = {"question": asked.shown(question or ""), "notes": [("answer", text)]}
    if png is not None:
        _write_png(png, asked.panel(**drawn))
    return text


class Asked:
    """A loaded model with one image and its boxes."""

    def __init__(self, model: Path, image: Path, boxes: Sequence[NamedBox], tags: Sequence[str] = ()) -> None:
        self.image = image
        self.names = [name for name, _ in boxes]
        self.boxes = [corners for _, corners in boxes]
        # What the user can get wrong is found before the weights are read.
        size = picture_size(image)
        image_record(size, self.boxes, self.names)
        self.pixels = _pixels(image, size if boxes else None)
        self.device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
        self.model, self.processor = load(model, self.device)
        self.tags = tuple(tags)
        if tags and self.processor.tag_tokens < 0:
            raise UserError(
                f"--tags: {model} was trained without a soft prompt (model.soft_prompt), tags do not reach it"
            )
        if left := self.processor.tags_left_out(self.tags):
            log.warning("%d of %d tags do not fit data.tag_tokens %d", left, len(tags), self.processor.tag_tokens)

    def scores(self, question: str, choices: Sequence[str]) -> list[float]:
        """Mean log-likelihood per token of every choice."""
        group = self._group(question=question, choices=choices)
        batch = self.processor.encode(group, self.image).to(self.device)
        with torch.no_grad():
            return [float(s) for s in leaf_scores(self.model(batch), batch)]

    def answer(self, question: str) -> str:
        return self._continue(self._group(question=question))

    def events(self) -> dict[str, str]:
        """Place and event of the image, then intent, before and after given both."""
        subject = self._subject()
        told = {
            "place": self._continue(self._group(relation="place")),
            "event": self._continue(self._group(relation="event", event=subject)),
        }
        event = parse_mentions(told["event"], self.names, strict=False)
        if self.processor.event_context == "subject" and not any(isinstance(t, RegionRef) for t in event):
            event = (*subject, *event)
        place = parse_mentions(told["place"], self.names, strict=False)
        for relation in ("intent", "before", "after"):
            told[relation] = self._continue(self._group(relation=relation, event=event, place=place))
        return told

    def shown(self, text: str) -> str:
        """A text with its mentions as the prompt names them: "[1]" becomes "person1"."""
        tokens = parse_mentions(text, self.names)
        return "".join(region_name(self.names[t.box], t.box) if isinstance(t, RegionRef) else t for t in tokens)

    def panel(self, **what: Any) -> np.ndarray:
        """The picture with its boxes above what was asked and answered; see data/panel.py."""
        names = [region_name(name, box) for box, name in enumerate(self.names)]
        return panel.draw(self.pixels, np.asarray(self.boxes, np.float64).reshape(-1, 4), names, **what)

    def _subject(self) -> Tokens:
        """Who the events are about: the first person, or the first box."""
        if not self.names:
            return ()
        return (RegionRef(0, self.names.index("person") if "person" in self.names else 0),)

    def _group(self, **what: Any) -> Group:
        return self.processor.group(self.image, self.boxes, self.names, tags=self.tags, **what)

    def _continue(self, group: Group) -> str:
        forward: Callable[..., Any] = self.model
        ((text,),) = continue_row(
            forward,
            self.processor.encode(group, self.image),
            self.processor.pieces,
            region_mentions([group], self.processor.pieces, self.processor.spec.style),
            linking=self.processor.spec.linking,
            device=self.device,
            max_new_tokens=NEW_TOKENS,
        )
        return text


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """Model in evaluation mode and processor of an exported folder. Raises DataError when it is none or is damaged."""
    from transformers import AutoConfig, AutoModel, AutoProcessor
    from transformers.utils import logging as transformers_logging

    import eventlens_ds.model  # noqa: F401 - registers the classes
    from eventlens_ds.model.configuration import RegionVLMConfig
    from eventlens_ds.model.peft_folder import RegionVLMPeftConfig

    transformers_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: holds no config.json; make it with `eventlens export RUN {folder}`")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not isinstance(config, RegionVLMConfig | RegionVLMPeftConfig):
            raise DataError(f"{folder}: a {config.model_type}, not a folder of `eventlens export`")
        model, report = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except DataError:
        raise
    except Exception as error:  # transformers, safetensors and json each raise their own kinds
        raise DataError(
            f"{folder}: cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None
    # transformers fills what is missing with fresh random values and only warns.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise DataError(f"{folder}: {what.replace('_', ' ')}: {min(map(str, report[what]))} ({len(report[what])})")
    form = choose_form("auto", device, model.dtype, encoder_decoder=model.config.encoder_decoder)
    model.config.text_config._attn_implementation = form
    return model.to(device).eval(), processor


def _pixels(image: Path, frame: tuple[int, int] | None) -> np.ndarray:
    """RGB uint8 [H, W, 3] in the frame the boxes are drawn on."""
    try:
        return np.asarray(transforms.decode_image(image.read_bytes(), frame=frame))
    except DataError as error:
        raise DataError(f"{image}: {error}") from None


def _write_png(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        Image.fromarray(picture).save(file, "PNG")

"""Predict: mentions and boxes as users write them, one answer whatever the door, pictures, errors in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eventlens_ds.data import panel
from eventlens_ds.data.prompts import RELATION_QUESTIONS, render, text_of
from eventlens_ds.data.records import RegionRef
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.export import predict
from eventlens_ds.model.objective import leaf_scores
from eventlens_ds.model.processing import parse_mentions

NAMES = ["person", "dog", "person"]
BOXES = [("person", (4.0, 4.0, 30.0, 60.0)), ("dog", (40.0, 30.0, 80.0, 62.0)), ("person", (50.0, 2.0, 90.0, 40.0))]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def asked(exported: Path, picture: Path) -> predict.Asked:
    return predict.Asked(exported, picture, BOXES)


@pytest.mark.P2
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Why is [1] near dog2?", ("Why is ", RegionRef(0, 0), " near ", RegionRef(0, 1), "?")),
        ("[ 3 ] waits", (RegionRef(0, 2), " waits")),
        ("person3's dog2", (RegionRef(0, 2), "'s ", RegionRef(0, 1))),
        ("mp3 at 10, room 2, persona1", ("mp3 at 10, room 2, persona1",)),
        ("", ()),
    ],
)
def test_mentions_become_references(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_mentions(text, NAMES) == expected


@pytest.mark.P2
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[0]", "names box 0, there are 3"),
        ("see [4]", "names box 4"),
        ("person2", "box 2 is a dog"),
        ("dog9", "names box 9"),
    ],
)
def test_a_mention_that_names_no_box_is_an_error_of_the_user_only(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_mentions(text, NAMES)
    assert parse_mentions(text, NAMES, strict=False) == (text,)


@pytest.mark.P6
def test_scores_are_those_of_the_model_and_the_best_is_marked(
    exported: Path, picture: Path, asked: predict.Asked
) -> None:
    choices = ["[1] sits", "dog2 eats", "person3 leaves", "it rains"]
    text = predict.main(exported, picture, boxes=BOXES, question="What is [1] doing?", choices=choices)
    lines = text.splitlines()
    batch = asked.processor(picture, [b for _, b in BOXES], NAMES, question="What is person1 doing?", choices=choices)
    with torch.no_grad():
        expected = leaf_scores(asked.model(batch), batch)
    assert [float(re.split(r"\s+", line[1:].strip())[0]) for line in lines] == [round(float(s), 3) for s in expected]
    assert [line[0] for line in lines].index(">") == int(expected.argmax())
    assert [line.split("  ")[-1] for line in lines][:3] == ["person1 sits", "dog2 eats", "person3 leaves"]
    moved = [(name, (x1 + 5, y1, x2 + 5, y2)) for name, (x1, y1, x2, y2) in BOXES]
    assert predict.main(exported, picture, boxes=moved, question="What is [1] doing?", choices=choices) != text


def test_events_are_asked_in_turn_each_given_the_ones_before(
    asked: predict.Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def answered(self: predict.Asked, group: Any) -> str:
        prompts.append(text_of(render(group, asked.processor.spec.style).samples[0].stem))
        return {1: "in the park", 2: "person3 runs from dog2"}.get(len(prompts), "later")

    monkeypatch.setattr(predict.Asked, "_continue", answered)
    told = asked.events()
    assert list(told) == ["place", "event", "intent", "before", "after"]
    assert prompts[0].startswith(RELATION_QUESTIONS["place"][0])
    for prompt in prompts[2:]:
        assert "Event: person3 runs from dog2" in prompt and "Place: in the park" in prompt


def test_answer_and_events_are_generated_and_drawn(exported: Path, picture: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, what in (("answer", {"question": "Why is [1] here?"}), ("events", {"events": True})):
        png = tmp_path / "new" / f"{name}.png"
        text = predict.main(exported, picture, boxes=BOXES, png=png, **what)  # type: ignore[arg-type]
        drawn[name] = np.asarray(Image.open(png))
        assert text == predict.main(exported, picture, boxes=BOXES, **what)  # type: ignore[arg-type]
        for color in panel.PALETTE[:3]:
            assert (drawn[name] == color).all(-1).sum() > 50
    assert drawn["events"].shape[0] > drawn["answer"].shape[0]
    assert [line.split(":")[0] for line in text.splitlines()] == ["place", "event", "before", "intent", "after"]


@pytest.mark.P1
def test_boxes_refer_to_the_picture_as_it_is_displayed(exported: Path, tmp_path: Path) -> None:
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:, 40:] = 255
    stored = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    box = [("person", (60.0, 5.0, 78.0, 35.0))]
    a, b = (predict.Asked(exported, tmp_path / name, box) for name in ("turned.png", "upright.png"))
    assert np.array_equal(a.pixels, b.pixels)
    first, second = (x.processor.encode(x._group(question="who?"), x.image) for x in (a, b))
    assert torch.equal(first.boxes, second.boxes)
    torch.testing.assert_close(first.pixel_values, second.pixel_values)


def test_what_the_user_got_wrong_is_one_line(exported: Path, picture: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = UserError, image: Path = picture, **what: Any) -> None:
        with pytest.raises(kind, match=match) as caught:
            predict.main(exported, image, **{"question": "why?", **what})
        assert "\n" not in str(caught.value)

    refused("box 1 .*outside the image, 96x64", boxes=[("person", (200.0, 0.0, 210.0, 9.0))])
    refused("must be one word of letters", boxes=[("per son", (1.0, 0.0, 10.0, 9.0))])
    refused("names box 1, there are 0", question="who is [1]?")
    refused("either a question or events", events=True)
    refused("choices belong to a question", question=None, events=True, choices=["a"])
    refused("No such file", image=tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    refused("text.jpg: cannot be decoded", DataError, tmp_path / "text.jpg")
    with pytest.raises(DataError, match="make it with `eventlens export"):
        predict.main(tmp_path, picture, question="why?")


@pytest.mark.P9
def test_a_folder_without_a_tensor_is_refused(exported: Path, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.startswith("projector"))
    save_file({n: t for n, t in tensors.items() if n != name}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=f"missing keys: {name}"):
        predict.main(broken, picture, question="why?")
    (broken / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(DataError, match="a llama, not a folder of `eventlens export`"):
        predict.main(broken, picture, question="why?")
    (broken / "config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        predict.main(broken, picture, question="why?")


def test_tags_of_a_model_without_a_soft_prompt_are_refused(exported: Path, picture: Path) -> None:
    with pytest.raises(UserError, match="--tags: .* was trained without a soft prompt"):
        predict.main(exported, picture, question="Why?", tags=["dog"])
    with pytest.raises(UserError, match="--tags: names no tag"):
        predict.main(exported, picture, question="Why?", tags=[])

"""The embedded world on disk: a data set in the formats of VCR, VisualCOMET and regions/, made from a seed.

In: a seed, a number of pictures and a size. Out: images/<movie>/<name>.jpg with its metadata .json,
vcr/<split>.jsonl, visualcomet/<split>_annots.json, regions/{captions,rec,vqa,vsr,tags}.jsonl, regions/pope/ and
scenes.jsonl (the scene graph of every picture, which the readers ignore and the oracle reads).

Decision: the real readers read it, so nothing here may know how they work; a result on it is a diagnostic of this
project and is never reported as VCR.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from eventlens_ds.data.sources import world_regions, world_text
from eventlens_ds.data.sources.world_draw import draw, outline, scene_parts
from eventlens_ds.data.sources.world_scene import Person, Scene, Thing, sample_scene
from eventlens_ds.errors import UserError

PER_MOVIE = 50
MIN_SIZE, MAX_SIZE = 64, 448


def image_name(scene: Scene) -> str:
    """Path below images/, shaped like VCR's: '@' and several dots in the file name."""
    second = scene.index % 3600
    start, stop = (f"00.{s // 60:02d}.{s % 60:02d}" for s in (second, second + 3))
    movie = f"world_{scene.split}_{scene.index // PER_MOVIE:04d}"
    return f"{movie}/{movie}_{start}.240-{stop}.160@{scene.index % PER_MOVIE}.jpg"


def metadata(scene: Scene, size: int) -> tuple[Any, dict[str, Any]]:
    """The drawn picture (PIL) and VCR's metadata: boxes with score, segms, names, width, height."""
    drawing = draw(scene, size)
    rng = scene.rng("scores")
    boxes = [[round(v, 4) for v in box] + [round(float(rng.uniform(0.7, 1.0)), 6)] for box in drawing.boxes]
    segms = [
        [[[min(max(round(x), 0), size), min(max(round(y), 0), size)] for x, y in polygon] for polygon in polygons]
        for polygons in drawing.polygons
    ]
    return drawing.image, {"boxes": boxes, "segms": segms, "names": scene.names, "width": size, "height": size}


def vcr_line(scene: Scene, question: world_text.Question, numbers: tuple[int, int, int]) -> dict[str, Any]:
    """One line of vcr/<split>.jsonl; numbers = (picture, question of the picture, line).

    All 23 keys of VCR and two of ours, "which_person" and "held_out", by which a result can be split.
    """
    image, number, line = numbers
    img_fn = image_name(scene)
    row: dict[str, Any] = {
        "movie": img_fn.split("/")[0],
        "objects": scene.names,
        "interesting_scores": [1, 0],
        "answer_likelihood": "likely",
        "img_fn": img_fn,
        "metadata_fn": img_fn[: -len(".jpg")] + ".json",
        "question_orig": world_text.original(question.question),
        "question": question.question,
        "img_id": f"{scene.split}-{image}",
        "question_number": number,
        "annot_id": f"{scene.split}-{line}",
        "match_fold": f"{scene.split}-0",
        "match_index": line,
        "which_person": question.which_person,
        "held_out": question.held_out,
    }
    parts = (
        ("answer", question.answers, question.answer_label),
        ("rationale", question.rationales, question.rationale_label),
    )
    for kind, choices, label in parts:
        rest = iter(range(1, len(choices)))
        row[f"{kind}_orig"] = world_text.original(choices[label])
        row[f"{kind}_choices"] = choices
        row[f"{kind}_label"] = label
        row[f"{kind}_match_iter"] = [0 if i == label else next(rest) for i in range(len(choices))]
        row[f"{kind}_sources"] = [line if i == label else -1 for i in range(len(choices))]
    return row


def event_lines(scene: Scene) -> list[dict[str, Any]]:
    """The rows of visualcomet/<split>_annots.json for one picture."""
    img_fn = image_name(scene)
    head = {"img_fn": img_fn, "movie": img_fn.split("/")[0], "metadata_fn": img_fn[: -len(".jpg")] + ".json"}
    return [{**head, **row} for row in world_text.event_rows(scene)]


def scene_line(scene: Scene, asked: Sequence[world_text.Question], first: int) -> dict[str, Any]:
    """The line of scenes.jsonl: the scene graph and, per question, what kind it is; first = line of question 0."""
    flags = [
        {
            "annot_id": f"{scene.split}-{first + i}",
            "kind": question.kind,
            "rationale_kind": question.rationale_kind,
            "person": question.person,
            "which_person": question.which_person,
            "held_out": question.held_out,
        }
        for i, question in enumerate(asked)
    ]
    return {"img_fn": image_name(scene), **asdict(scene), "questions": flags}


def scene_from_line(line: Mapping[str, Any]) -> Scene:
    """Inverse of `scene_line`, without the questions."""
    people = tuple(Person(**person) for person in line["people"])
    things = tuple(Thing(**thing) for thing in line["things"])
    return Scene(line["seed"], line["split"], line["index"], line["place"], people, things)


def oracle(row: Mapping[str, Any], line: Mapping[str, Any]) -> tuple[int, int]:
    """Answer a VCR line from its scene graph: (answer, rationale), each the first candidate that is true.

    Reads candidates only, never labels; -1 when no candidate is true.
    """
    true = world_text.true_sentences(scene_from_line(line))
    picks = []
    for kind in ("answer", "rationale"):
        hits = [i for i, c in enumerate(row[f"{kind}_choices"]) if world_text.sentence_key(c) in true]
        picks.append(hits[0] if hits else -1)
    return picks[0], picks[1]


def sample_rows(
    seed: int, split: str, num_images: int, questions_per_image: int = 4
) -> Iterable[tuple[Scene, list[dict[str, Any]], dict[str, Any]]]:
    """Scenes of a split with their VCR lines and scene line, in file order, without drawing anything."""
    line = 0
    for index in range(num_images):
        scene = sample_scene(seed, split, index)
        asked = world_text.questions(scene, questions_per_image)
        rows = [vcr_line(scene, question, (index, i, line + i)) for i, question in enumerate(asked)]
        yield scene, rows, scene_line(scene, asked, line)
        line += len(asked)


def _write_picture(index: int, *, out: Path, seed: int, split: str, size: int) -> None:
    scene = sample_scene(seed, split, index)
    image, meta = metadata(scene, size)
    path = out / "images" / image_name(scene)
    image.save(path, quality=95, subsampling=0)
    path.with_name(path.name[: -len(".jpg")] + ".json").write_text(json.dumps(meta))


def _write_pictures(out: Path, seed: int, split: str, count: int, size: int, workers: int) -> None:
    for movie in range((count + PER_MOVIE - 1) // PER_MOVIE):
        (out / "images" / f"world_{split}_{movie:04d}").mkdir(parents=True, exist_ok=True)
    job = partial(_write_picture, out=out, seed=seed, split=split, size=size)
    if workers <= 1:
        for index in range(count):
            job(index)
        return
    with ProcessPoolExecutor(workers) as pool:
        for _ in pool.map(job, range(count), chunksize=32):
            pass


def _write_regions(out: Path, seed: int, counts: Mapping[str, int], size: int) -> None:
    """The files of regions/ but the captions; counts = pictures per split. The files come from all splits, in order."""
    folder = out / "regions"
    (folder / "pope").mkdir(parents=True, exist_ok=True)
    asked: dict[str, list[dict[str, Any]]] = {setting: [] for setting in world_regions.POPE_SETTINGS}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in ("rec", "vqa", "vsr", "tags")
        }
        for split, count in counts.items():
            scenes = [sample_scene(seed, split, index) for index in range(count)]
            objects = world_regions.ObjectCounts(scenes)
            for scene in scenes:
                name = image_name(scene)
                rows = {
                    "rec": world_regions.expressions(scene, outline(scene, scene_parts(scene), size)[0], size),
                    "vqa": world_regions.questions(scene),
                    "vsr": world_regions.statements(scene),
                    "tags": ({"tags": world_regions.tags(scene)},),
                }
                for file, made in rows.items():
                    files[file].writelines(json.dumps({"img_path": name, **row}) + "\n" for row in made)
                for setting, kept in asked.items():
                    kept += [{"image": name, **row} for row in world_regions.pope(scene, objects, setting)]
    for setting, kept in asked.items():
        text = "".join(json.dumps({"question_id": i, **row}) + "\n" for i, row in enumerate(kept, start=1))
        (folder / "pope" / f"world_pope_{setting}.json").write_text(text)


def render_world(
    out: Path,
    *,
    seed: int,
    num_images: int,
    image_size: int = 96,
    splits: Sequence[str] = ("train", "val"),
    val_images: int | None = None,
    questions_per_image: int = 4,
    workers: int = 1,
) -> None:
    """Write a world below `out`: `num_images` pictures in "train", `val_images` (a fifth by default) in other splits.

    The files are a function of the arguments alone, `workers` excepted: scene i of a split is the same whatever the
    number of pictures or processes. Only "train" is free of the held-out combinations. `image_size` in pixels,
    64-448. Raises UserError for sizes and counts out of range.
    """
    if not MIN_SIZE <= image_size <= MAX_SIZE:
        raise UserError(f"image_size {image_size}: the embedded world is drawn at {MIN_SIZE} to {MAX_SIZE} pixels")
    other = max(1, num_images // 5) if val_images is None else val_images
    if num_images < 1 or other < 1 or questions_per_image < 1:
        raise UserError(f"world of {num_images} + {other} pictures, {questions_per_image} questions: all must be >= 1")
    for folder in ("images", "vcr", "visualcomet", "regions"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with open(out / "regions" / "captions.jsonl", "w") as captions, open(out / "scenes.jsonl", "w") as scenes:
        for split in splits:
            count = num_images if split == "train" else other
            events: list[dict[str, Any]] = []
            with open(out / "vcr" / f"{split}.jsonl", "w") as lines:
                for scene, rows, graph in sample_rows(seed, split, count, questions_per_image):
                    lines.writelines(json.dumps(row) + "\n" for row in rows)
                    scenes.write(json.dumps(graph) + "\n")
                    for caption in world_text.captions(scene):
                        captions.write(json.dumps({"img_path": image_name(scene), "caption": caption}) + "\n")
                    events += event_lines(scene)
            (out / "visualcomet" / f"{split}_annots.json").write_text(json.dumps(events, indent=1))
            _write_pictures(out, seed, split, count, image_size, workers)
    _write_regions(out, seed, {s: num_images if s == "train" else other for s in splits}, image_size)

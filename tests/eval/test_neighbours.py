"""Mined neighbours: the similarity formula, both rules, the seeded split, and the released file as input and output.

In: hand-made features, a tiny CLIP folder, creatures on disk. Out: rows. Decision: the CLIP folder is a real one of
transformers with weights of a seed, read from disk like a published one.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from eventlens_ds.data.sources import lcl
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.eval import neighbours
from eventlens_ds.eval.neighbours import ImageClass, pick, ranked, similarity


def unit(rows: list[list[float]]) -> np.ndarray:
    made = np.asarray(rows, np.float64)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_the_similarity_is_the_released_formula():
    images, texts = unit([[1, 0], [1, 1], [0, 1]]), unit([[1, 0.2], [0, 1], [1, 1]])
    found = similarity(images, texts)
    for i in range(3):
        for j in range(3):
            tt, it, ti, ii = texts[i] @ texts[j], images[i] @ texts[j], texts[i] @ images[j], images[i] @ images[j]
            assert found[i, j] == pytest.approx(0.5 * tt + 0.8 * (it + ti) + 0.5 * ii)
    assert np.allclose(similarity(images, None), 0.5 * images @ images.T)
    assert ranked(found).shape == (3, 2) and all(i not in row for i, row in enumerate(ranked(found)))


def test_nearest_and_bins():
    order, rng = np.arange(1, 900), np.random.default_rng(0)
    assert pick(order, 36, "nearest", rng) == list(range(1, 37))
    bins = pick(order, 36, "bins", rng)
    # The released code cuts the sorted list, the class itself first, into pieces of 25 and takes one of each.
    assert len(bins) == 36 and [value // 25 for value in bins] == list(range(36)) and 0 not in bins
    assert sum(value < 50 for value in bins) == 2, "two of 36 are near"
    assert pick(np.asarray([4, 2]), 36, "nearest", rng) == [4, 2]
    assert math.ceil(5 / 2) == 3 and len(pick(np.asarray([1, 2, 3, 4]), 2, "bins", rng)) == 2


def test_the_split_of_classes_is_seeded():
    classes = [ImageClass(str(i), f"c{i}", ["a.png"]) for i in range(40)]
    train, test = neighbours.split_classes(classes, 10, 3)
    assert len(train) == 30 and len(test) == 10 and not {c.id for c in train} & {c.id for c in test}
    assert neighbours.split_classes(classes, 10, 3) == (train, test) != neighbours.split_classes(classes, 10, 4)
    for count in (3, 40, 38 + 1):
        with pytest.raises(UserError, match=f"--test-classes {count} of 40"):
            neighbours.split_classes(classes, count, 0)


def test_pairs_are_the_most_alike_first():
    classes = [ImageClass(str(i), f"c{i}", ["a", "b", "c"]) for i in range(4)]
    scores = np.asarray([[9, 1, 5, 2], [1, 9, 3, 4], [5, 3, 9, 0], [2, 4, 0, 9]], np.float64)
    rows = neighbours.pair_rows(classes, scores, 2)
    assert [row["class_name"] for row in rows] == ["c0", "c2", "c1", "c3"]
    assert rows[0]["context_samples"] == ["a", "b"] and rows[0]["test_samples"] == ["c"]
    with pytest.raises(DataError, match="3 images, 3 are shown"):
        neighbours.pair_rows(classes, scores, 3)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of width 32 with weights of a seed, beside the embedded tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    from tests.small_world import embedded_tokenizer

    tokenizer = embedded_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos, "bos_token_id": 1},
        vision_config={**shape, "image_size": 48, "patch_size": 12},
        projection_dim=16,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    tokenizer.hf.save_pretrained(folder)
    return folder


def mine(creatures: Path, out: Path, **asked) -> dict:
    raw = creatures.with_name(creatures.name + "-raw")
    return neighbours.main(raw / "lcl" / "train_pairs.jsonl", raw / "images", out, **{"per_class": 4, **asked})


def test_mined_files_are_in_the_released_form_and_seeded(creatures: Path, clip_folder: Path, tmp_path: Path):
    out = tmp_path / "mined" / "pairs.jsonl"
    done = mine(creatures, out, clip=str(clip_folder), count=5, test_classes=4, context=8)
    rows, held_out = lcl.read_rows(out), lcl.read_rows(tmp_path / "mined" / "pairs_test.jsonl")
    assert done["classes"] == len(rows) == 8 and done["test_classes"] == len(held_out) == 4 and done["unreadable"] == 0
    assert all(len(row["neighbors"]) == 5 for row in rows) and "context_samples" in held_out[0]
    inside = {row["class_id"] for row in rows}
    for row in rows:
        assert row["class_id"] not in {entry[0] for entry in row["neighbors"]} <= inside
    again = tmp_path / "again.jsonl"
    mine(creatures, again, clip=str(clip_folder), count=5, test_classes=4, context=8)
    assert again.read_bytes() == out.read_bytes()
    mine(creatures, again, clip=str(clip_folder), count=5, test_classes=4, context=8, seed=1)
    assert again.read_bytes() != out.read_bytes()


def test_features_are_means_of_raw_features_and_the_bare_name(creatures: Path, clip_folder: Path):
    from PIL import Image

    from eventlens_ds.data.transforms import CLIP_MEAN, CLIP_STD, normalise_pixels
    from eventlens_ds.eval.encoders import Clip

    raw = creatures.with_name(creatures.name + "-raw")
    rows = lcl.read_rows(raw / "lcl" / "train_pairs.jsonl")
    classes = [ImageClass(row["class_id"], row["class_name"], row["samples"]) for row in rows[:3]]
    encoder = Clip(str(clip_folder))
    images, texts, skipped = neighbours.features(classes, raw / "images", encoder, 100, 0)
    assert skipped == [] and texts is not None
    for at, one in enumerate(classes):
        pixels = [
            normalise_pixels(np.asarray(Image.open(raw / "images" / name).convert("RGB")), CLIP_MEAN, CLIP_STD)
            for name in one.samples
        ]
        ids = torch.tensor([encoder.tokenizer(one.name)["input_ids"]])
        with torch.no_grad():
            pooled = encoder.model.vision_model(torch.from_numpy(np.stack(pixels))).pooler_output
            mean = encoder.model.visual_projection(pooled).double().mean(0).numpy()
            text = encoder.model.text_projection(encoder.model.text_model(ids).pooler_output).double().numpy()[0]
        assert np.allclose(images[at], mean / np.linalg.norm(mean), atol=1e-5)
        assert np.allclose(texts[at], text / np.linalg.norm(text), atol=1e-5)


def test_refusals(creatures: Path, clip_folder: Path, tmp_path: Path):
    out = tmp_path / "p.jsonl"
    for asked, problem in (
        ({}, "name one encoder: --clip DIR or --run RUN"),
        ({"clip": str(clip_folder), "rule": "far"}, "--rule far: unknown"),
        ({"clip": str(tmp_path)}, "no config.json there"),
        ({"clip": str(clip_folder), "count": 0}, "--number 0"),
    ):
        with pytest.raises(UserError, match=problem):
            mine(creatures, out, **asked)
    for text, problem in (('["1", "a", []]', "has no images"), ('["1", "a"]', "wants"), ("{", "broken JSON")):
        (tmp_path / "c.jsonl").write_text(f'["0", "z", ["a.png"]]\n{text}\n')
        with pytest.raises(DataError, match=f"c.jsonl:2: .*{problem}"):
            neighbours.read_classes(tmp_path / "c.jsonl")


def test_unreadable_images_are_counted(creatures: Path, clip_folder: Path, tmp_path: Path):
    raw = creatures.with_name(creatures.name + "-raw")
    rows = lcl.read_rows(raw / "lcl" / "train_pairs.jsonl")[:3]
    rows[0]["samples"] = ["gone.png", *rows[0]["samples"][:2]]
    lcl.write_rows(tmp_path / "c.jsonl", rows)
    done = neighbours.main(tmp_path / "c.jsonl", raw / "images", tmp_path / "p.jsonl", clip=str(clip_folder))
    assert done["unreadable"] == 1
    rows[0]["samples"] = ["gone.png"]
    lcl.write_rows(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        neighbours.main(tmp_path / "c.jsonl", raw / "images", tmp_path / "p.jsonl", clip=str(clip_folder))

"""Visual Genome: regions as expressions in pixels, with and without image_data.json, held-out COCO pictures, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eventlens_ds.data.lint import lint
from eventlens_ds.data.sources import samples
from eventlens_ds.data.sources.vg import RegionDescriptionSource
from eventlens_ds.errors import DataError, UserError
from tests.data.conftest import paint
from tests.data.test_expressions import hold_out


def region(number: int, phrase: str, box: tuple[int, int, int, int] = (2, 1, 4, 5), image: int = 1) -> dict[str, Any]:
    x, y, width, height = box
    place = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": number, "image_id": image, "phrase": phrase, **place}


def write(root: Path, *images: Any) -> Path:
    path = root / "region_descriptions.json"
    path.write_text("[" + ",\n".join(json.dumps(image) for image in images) + "]")
    return path


def describe(root: Path, **coco: Any) -> None:
    """image_data.json for the pictures 1 and 2; coco: p1=..., p2=..."""
    rows = [
        {"image_id": n, "width": 20, "height": 10, "url": f"https://x/rak248/{d}/{n}.jpg", "coco_id": coco.get(f"p{n}")}
        for n, d in ((1, "VG_100K_2"), (2, "VG_100K"))
    ]
    (root / "image_data.json").write_text(json.dumps(rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    one = {"id": 1, "regions": [region(11, "a  dog"), region(12, "a cat", (0, 0, 9, 9)), region(13, "the dog")]}
    write(tmp_path, one, {"id": 2, "regions": [region(21, "a man", image=2)]}, {"id": 3, "regions": []})
    return paint(tmp_path, "VG_100K_2/1.jpg", "VG_100K/2.jpg")


@pytest.mark.P1
@pytest.mark.parametrize("with_data", [True, False])
def test_samples(root: Path, with_data: bool) -> None:
    if with_data:
        describe(root)
    first, second = RegionDescriptionSource(root).images("train")
    assert (first.image.img_fn, second.image.img_fn) == ("VG_100K_2/1.jpg", "VG_100K/2.jpg")
    assert [r["box"] for r in first.records] == [[2, 1, 6, 6], [0, 0, 9, 9]]
    made = samples(first.records[0], first.image)
    assert [s.id.split("#")[1] for s in made] == ["vg-11/rec", "vg-13/rec", "vg-11/reg"]
    assert made[0].targets == (("[0.100,0.100,0.300,0.600]",),) and made[2].targets == (("a dog",), ("the dog",))
    assert lint(RegionDescriptionSource(root), "train") == []


def test_unusable_boxes_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    regions = [region(11, "x", (0, 0, 0, 4)), region(12, "y", (30, 0, 4, 4)), region(13, "fine")]
    write(root, {"id": 1, "regions": regions})
    (item,) = RegionDescriptionSource(root).images("train")
    assert len(item.records) == 1 and "2 regions left out: box outside the image 1, box zero area 1" in caplog.text
    assert [f.code for f in lint(RegionDescriptionSource(root), "train")] == ["box", "box"]


def test_pictures_that_refcoco_holds_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    describe(root, p1=7)
    assert len(list(RegionDescriptionSource(root).images("train"))) == 2, "control: nothing is held out without refs"
    assert "nothing is checked" in caplog.text
    hold_out(root, 7)
    assert [item.image.img_fn for item in RegionDescriptionSource(root).images("train")] == ["VG_100K/2.jpg"]
    assert "3 regions left out: held out by refcoco/unc/testA 3" in caplog.text
    (root / "image_data.json").unlink()
    with pytest.raises(UserError, match="image_data.json: not there"):
        RegionDescriptionSource(root)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": 2, "regions": [{"region_id": 5, "x": 1, "y": 1, "width": 1, "height": 1}]}, "region 5: no 'phrase'"),
        ({"id": 2, "regions": [{"region_id": 5, "phrase": "x", "x": 1}]}, "region 5: no 'y'"),
        ({"id": 2, "regions": [region(5, "x") | {"x": "1"}]}, "a box wants four numbers"),
        ({"id": 2, "regions": [region(5, "x") | {"region_id": None}]}, "'region_id' wants an integer"),
        ({"id": 2, "regions": [3]}, "a region wants an object"),
        ({"id": 2}, "'id' and 'regions' want"),
        ({"id": 77, "regions": [region(5, "x")]}, "no image"),
        (3, "expected a JSON object"),
    ],
)
def test_faults_name_file_and_line(root: Path, bad: Any, message: str) -> None:
    path = write(root, {"id": 1, "regions": [region(11, "fine")]}, bad)
    with pytest.raises(DataError, match=f"{path}:2: .*{message}"):
        list(RegionDescriptionSource(root).images("train"))
    assert {f.where for f in lint(RegionDescriptionSource(root), "train")} == {f"{path}:2"}


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vg; expected .*region_descriptions.json"):
        RegionDescriptionSource(tmp_path)

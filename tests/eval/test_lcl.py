"""Metrics of episodes: the two-way likelihood and the released substring rule, on rows written out by hand.

In: rows. Out: accuracies and intervals. Decision: the released rule's oddities (case, containment) are pinned, because
published numbers were made with them.
"""

from __future__ import annotations

import pytest

from eventlens_ds.errors import DataError
from eventlens_ds.eval import language_lines, lcl
from eventlens_ds.eval.lcl import released


def row(scores, label=0, shots=2, pair="a/b", **more):
    made = {"id": "q", "task": "lcl", "shots": shots, "names": ["a", "b"], "scores": scores, "label": label}
    return {**made, "pair": pair, "image": "i", **more}


def test_two_way_accuracy_by_shots():
    rows = [row([-1.0, -2.0]), row([-1.0, -2.0], label=1), row([-1.0, -1.0]), row([-3.0, -2.0], label=1, shots=0)]
    found = lcl.score(rows)
    assert list(found["shots"]) == ["0", "2"] and found["n"] == 3 and found["chance"] == 0.5
    assert found["shots"]["2"]["accuracy"] == 0.5, "one right, one wrong, a tie counts one half"
    assert found["shots"]["0"]["accuracy"] == 1.0 and found["shots"]["0"]["interval"] == [None, None], "one pair"


def test_a_model_that_prefers_a_name_scores_chance():
    rows = [row([-1.0, -5.0], label=i % 2, pair=f"p{i // 2}") for i in range(40)]
    found = lcl.score(rows)["shots"]["2"]
    assert found["accuracy"] == 0.5 and found["interval"] == [0.5, 0.5] and found["pairs"] == 20


def test_intervals_are_over_pairs_of_classes():
    sure = [row([-1.0, -2.0], label=0, pair=f"p{i}") for i in range(10) for _ in range(10)]
    wrong = [row([-2.0, -1.0], label=0, pair=f"w{i}") for i in range(10) for _ in range(10)]
    low, high = lcl.score([*sure, *wrong])["shots"]["2"]["interval"]
    assert high - low > 0.35, "200 queries of 20 pairs are 20 pairs; as single queries it would be 0.14"


@pytest.mark.parametrize(
    ("answer", "name", "other", "hit"),
    [
        ('there is "wug" in the image.', "wug", "dax", True),
        ('there is "wug" and "dax" in the image.', "wug", "dax", False),
        ('there is "dax" in the image.', "wug", "dax", False),
        ('there is "octopus vacuum" in the image.', "octopus vacuum", "octopus", True),
        ('there is "octopus vacuum" in the image.', "octopus", "octopus vacuum", True),
        ('there is "Mushroom House" in the image.', "Mushroom House", "house", False),
        ("", "wug", "dax", False),
    ],
)
def test_the_released_rule(answer, name, other, hit):
    assert released(answer, name, other) == hit


def test_case_is_an_option():
    answer = 'there is "Mushroom House" in the image.'
    assert not released(answer, "Mushroom House", "castle"), "the target is lowered, the answer is not"
    assert released(answer, "Mushroom House", "castle", any_case=True)
    rows = [row([-1.0, -2.0], names=["Wug", "Dax"], answer='there is "Wug" in the image.'), row([-1.0, -2.0])]
    found = lcl.score(rows)["shots"]["2"]
    assert (found["answered"], found["released"], found["released_any_case"]) == (1, 0.0, 1.0)
    lines = {name: (value, n) for name, value, _, n in language_lines.lines("lcl", lcl.score(rows))}
    assert lines == {"2 shots": (1.0, 2), "2 shots released": (0.0, 1), "2 shots released_any_case": (1.0, 1)}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shots": -1}, "'shots' wants"),
        ({"names": ["a"]}, "'names' wants two"),
        ({"scores": [1.0, float("nan")]}, "finite"),
        ({"label": 2}, "'label' wants 0 or 1"),
    ],
)
def test_bad_rows_are_named(change, problem):
    with pytest.raises(DataError, match=f"q: .*{problem}"):
        lcl.score([row([-1.0, -2.0]) | change])

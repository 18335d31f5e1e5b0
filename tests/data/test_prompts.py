"""Prompts: mentions stay structured until here, and are linked afterwards (P2); pieces join to readable text (P4).

In: samples written by hand and those of the small world. Out: pieces, their regions, their text. Decision: the wording
itself is tested once, as a whole line per task; everything else is about structure.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from eventlens_ds.data.prompts import MAX_LISTED_REGIONS, Piece, PromptStyle, mentions, render, text_of
from eventlens_ds.data.records import Box, Group, ImageRecord, Region, RegionRef, Sample
from tests.small_world import SmallRun

SUBJECT = PromptStyle(list_objects=False, event_context="subject")


def image(*names: str) -> ImageRecord:
    regions = tuple(Region(name, Box(0, 0, 4, 4)) for name in names)
    return ImageRecord("key", "a.jpg", 8, 8, regions)


def question(*text: str | RegionRef, task: str = "vcr_answer", number: int = 0) -> Sample:
    turns = [("question", text)]
    if task == "vcr_rationale":
        turns.append(("answer", (RegionRef(0, 0), " waits")))
    candidates = ((RegionRef(0, 0), " waits"), ("no",))
    return Sample(f"s{number}", "test", task, ("key",), tuple(turns), candidates=candidates, label=0)


def event(relation: str) -> Sample:
    turns = [("relation", (relation,))]
    if relation not in ("event", "place"):
        turns += [("event", (RegionRef(0, 1), " runs")), ("place", ("a park",))]
    target = (RegionRef(0, 1), " runs") if relation == "event" else ("to win",)
    return Sample("e", "test", "event", ("key",), tuple(turns), targets=(target,))


def stem_of(sample: Sample, style: PromptStyle = PromptStyle()) -> str:  # noqa: B008 - immutable
    return text_of(render(Group(sample.task, (image("person", "person", "dog"),), (sample,)), style).samples[0].stem)


@pytest.mark.P2
def test_a_mention_is_printed_from_one_and_linked_from_zero() -> None:
    group = Group("vcr_answer", (image("person", "dog"),), (question("why is ", RegionRef(0, 1), " here?"),))
    made = render(group)
    assert [(p.text, p.region) for p in made.samples[0].stem] == [
        (" why is", -1),
        (" dog2", 1),
        (" here?", -1),
        (" Answer:", -1),
    ]
    assert text_of(made.prefix) == "<image>Objects: person1 dog2" and made.regions == ((0, 1),)
    assert [p.region for p in made.prefix] == [-1, -1, 0, 1]


@pytest.mark.P2
def test_a_name_in_plain_text_is_not_a_mention() -> None:
    """Negative control: what was flattened to a string too early cannot be linked any more."""
    flattened = question("why is dog2 here?")
    made = render(Group("vcr_answer", (image("person", "dog"),), (flattened,)))
    assert text_of(made.samples[0].stem) == "why is dog2 here? Answer:" and made.samples[0].stem[0].region == -1


def test_wording_of_every_task() -> None:
    asked = ("who is ", RegionRef(0, 0), "?")
    assert stem_of(question(*asked)) == "who is person1? Answer:"
    assert stem_of(question(*asked, task="vcr_rationale")) == "who is person1? Answer: person1 waits Why?"
    assert stem_of(event("place")) == "Where is this? Answer:"
    assert stem_of(event("intent")) == "Event: person2 runs Place: a park What is the intent? Answer:"
    assert stem_of(event("intent"), SUBJECT) == "What does person2 want? Answer:"
    assert stem_of(event("event"), SUBJECT) == "What is person2 doing? Answer:"
    caption = Sample("c", "test", "caption", ("key",), (), targets=(("a picture",),))
    assert stem_of(caption) == "Describe the picture. Answer:"
    for task, role, text, asked_as in (
        ("rec", "expression", "the red car", "Can you locate the red car and let me know its coordinates? Answer:"),
        ("reg", "box", "[0.100,0.200,0.300,0.400]", "Describe the region [0.100,0.200,0.300,0.400]. Answer:"),
        ("vqa", "question", "what is it?", "what is it? Answer:"),
        ("pope", "question", "Is there a dog?", "Is there a dog? Answer:"),
        ("vsr", "statement", "A dog is left of a cat.", "A dog is left of a cat. Is this true? Answer:"),
    ):
        assert stem_of(Sample("r", "test", task, ("key",), ((role, (text,)),), targets=(("x",),))) == asked_as
    with pytest.raises(ValueError, match="no prompt for task 'unheard'"):
        stem_of(replace(caption, task="unheard"))


def test_a_mentioned_region_is_used_however_many_there_are() -> None:
    many = image(*["person"] * (MAX_LISTED_REGIONS + 10))
    last = MAX_LISTED_REGIONS + 9
    group = Group("vcr_answer", (many,), (question("who is ", RegionRef(0, last), "?"),))
    assert render(group).regions == ((*range(MAX_LISTED_REGIONS), last),)
    assert render(group, PromptStyle(list_objects=False)).regions == ((0, last),)
    stem = render(group).samples[0].stem
    assert stem[1] == Piece(f" person{last + 1}", MAX_LISTED_REGIONS)


def test_regions_of_a_second_image_are_counted_on() -> None:
    two = (image("person", "dog"), image("cat", "person"))
    made = render(Group("vcr_answer", two, (question("is ", RegionRef(1, 0), " ", RegionRef(1, 1), "?"),)))
    assert [p.region for p in made.samples[0].stem if p.region >= 0] == [2, 3]
    assert [p.image for p in made.prefix if p.image >= 0] == [0, 1]


@pytest.mark.P2
@pytest.mark.parametrize("style", [PromptStyle(), SUBJECT])
def test_every_mention_of_the_world_becomes_one_linked_piece(small: SmallRun, style: PromptStyle) -> None:
    for number in range(len(small.data.groups[0])):
        group = small.data.group(0, number)
        made = render(group, style)
        slots = [(m, box) for m, boxes in enumerate(made.regions) for box in boxes]
        for sample, text in zip(group.samples, made.samples):
            pieces = [p for part in (text.stem, *text.leaves) for p in part]
            assert all(p.text and not p.text.endswith(" ") and "  " not in p.text for p in pieces)
            linked = {slots[p.region] for p in pieces if p.region >= 0}
            answers = {
                (t.image, t.box)
                for part in sample.targets or sample.candidates
                for t in part
                if isinstance(t, RegionRef)
            }
            assert answers <= linked <= {(ref.image, ref.box) for ref in mentions(sample)}
            for leaf, target in zip(text.leaves, sample.targets or sample.candidates):
                assert text_of(leaf).count("  ") == 0 and len(text_of(leaf)) > 0 and len(target) > 0

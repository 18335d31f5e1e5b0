"""The words of an episode, byte for byte as the released code renders them.

In: small samples. Out: prompts as text, and as tokens. Decision: the expected text is written out from the rendering
that the authors show in their issue 11, with `<image>` where visual tokens stand.
"""

from __future__ import annotations

import json

import pytest

from eventlens_ds.data import episode_text
from eventlens_ds.data.episodes import Episode, sample_of
from eventlens_ds.data.prompts import PromptStyle, render, text_of
from eventlens_ds.data.records import Group, ImageRecord
from eventlens_ds.errors import UserError

HEAD = (
    "You should find the causal relationship between the examples I am going to show you. "
    "And use that to answer to the [FINAL QUESTION]."
)
SHOWN = ' USER: [BEGIN EXAMPLE] What is in the image <image>? ASSISTANT: there is "{}" in the image. [END EXAMPLE]'
ASKED = "[FINAL QUESTION]:  USER: Based on the previous examples, what is in the image <image>? ASSISTANT:"


def group(labels: tuple[str, ...], names: tuple[str, str] = ("ice cream", "wug"), candidates: bool = False) -> Group:
    images = tuple(range(len(labels) + 1))
    episode = Episode("e", (0,) * len(labels), labels, names, images, 1, episode_text.QUERY)
    return Group("lcl", (ImageRecord("k", "k", 4, 4, ()),) * len(images), (sample_of(episode, candidates),))


def whole(made: Group, form: str = "released") -> str:
    rendered = render(made, PromptStyle(episode=form))  # type: ignore[arg-type]
    (sample,) = rendered.samples
    parts = [*rendered.prefix, *sample.stem, *sample.leaves[0]]
    marks = {"bos": "<s>", "eos": "</s>"}
    return "".join("<image>" if p.image >= 0 else marks[p.mark.value] if p.mark else p.text for p in parts)


def test_the_released_form_byte_for_byte():
    shown = [SHOWN.format(name) for name in ("ice cream", "wug", "ice cream")]
    expected = f'{HEAD}{shown[0]}</s><s>{shown[1]}<s>{shown[2]}<s>{ASKED} there is "wug" in the image.'
    assert whole(group(("ice cream", "wug", "ice cream"))) == expected


def test_without_demonstrations_the_final_turn_stands_alone():
    assert whole(group(())) == f'{ASKED} there is "wug" in the image.'


def test_the_plain_form():
    expected = (
        ' What is in the image <image>? there is "a" in the image.'
        ' Based on the previous examples, what is in the image <image>? there is "wug" in the image.'
    )
    assert whole(group(("a",)), "plain") == expected


def test_candidates_are_the_answers_with_either_name():
    rendered = render(group(("a",), candidates=True))
    leaves = [text_of(leaf) for leaf in rendered.samples[0].leaves]
    assert leaves == ['there is "ice cream" in the image.', 'there is "wug" in the image.']


@pytest.mark.P6
def test_every_image_stands_once_and_in_the_order_of_the_turns():
    rendered = render(group(("a", "b", "c")))
    found = [p.image for p in (*rendered.prefix, *rendered.samples[0].stem) if p.image >= 0]
    assert found == [0, 1, 2, 3]


def test_samples_with_other_contexts_share_no_group():
    one, other = group(("a",)), group(("b",))
    with pytest.raises(ValueError, match="2 contexts for one prefix"):
        render(Group("lcl", one.images, (*one.samples, *other.samples)))


def test_questions_from_a_file(tmp_path):
    path = tmp_path / "ICL.json"
    path.write_text(json.dumps(["What is in <image>?", "Guess <image>."]))
    assert episode_text.queries(str(path)) == ("What is in <image>?", "Guess <image>.")
    assert episode_text.queries("") == ("Based on the previous examples, what is in the image <image>?",)
    for text, problem in (
        ('["no image"]', "question 0 has 0 <image>"),
        ("{}", "wants a JSON list"),
        ("[", "Expecting"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=problem):
            episode_text.queries(str(path))

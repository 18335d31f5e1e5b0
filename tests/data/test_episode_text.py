"""The words of an episode, byte for byte as the released code renders them.

In: small samples. Out: prompts as text, and as tokens. Decision: the expected text is written out from the rendering
that the authors show in their issue 11, with `<image>` where visual tokens stand.
"""

from __future__ import annotations

import json

import pytest

from eventlens_ds.data import episode_text
from eventlens_ds.data.episode_text import ChatWords
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


def whole(made: Group, form: str = "released", chat: ChatWords | None = None) -> str:
    rendered = render(made, PromptStyle(episode=form, chat=chat))  # type: ignore[arg-type]
    (sample,) = rendered.samples
    parts = [*rendered.prefix, *sample.stem, *sample.leaves[0]]
    return "".join("<image>" if p.image >= 0 else p.mark.token if p.mark else p.text for p in parts)


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


def test_the_short_form():
    assert whole(group(("a", "b")), "short") == "<image>a.<image>b.<image>wug."


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


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer():
    """The embedded tokenizer with a chat template whose marks are special tokens."""
    from eventlens_ds.data.tokenizer import PieceTokenizer, build_embedded

    made = build_embedded()
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]}, replace_extra_special_tokens=False)
    made.chat_template = TEMPLATE
    return PieceTokenizer(made)


def test_the_chat_form_is_the_template_of_the_tokenizer(chat_tokenizer):
    words = episode_text.chat_words(chat_tokenizer.hf, "here")
    turns = [
        {"role": "user", "content": f"{HEAD} What is in the image <image>?"},
        {"role": "assistant", "content": 'there is "a" in the image.'},
        {"role": "user", "content": "What is in the image <image>?"},
        {"role": "assistant", "content": 'there is "wug" in the image.'},
        {"role": "user", "content": episode_text.QUERY},
    ]
    rendered = chat_tokenizer.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = rendered.removeprefix("<s>") + 'there is "wug" in the image.'
    assert whole(group(("a", "wug")), "chat", words) == expected


def test_marks_of_a_template_are_special_tokens_and_lengths_count_them(chat_tokenizer):
    import numpy as np

    from eventlens_ds.data.encode import EncodeSpec, VisionSpec, encode, pieces_length
    from eventlens_ds.data.transforms import Resized

    words = episode_text.chat_words(chat_tokenizer.hf, "here")
    style = PromptStyle(episode="chat", chat=words)
    spec = EncodeSpec(VisionSpec(4, 1, (0.0,) * 3, (1.0,) * 3), "none", style)
    blank = Resized(np.zeros((3, 4, 4), np.float32), np.zeros((0, 4), np.float32), {})
    made = encode(group(("a", "wug")), chat_tokenizer, spec, lambda _: blank)
    ids = made.input_ids.tolist()
    mark = chat_tokenizer.hf.convert_tokens_to_ids("<|turn|>")
    assert ids[0] == chat_tokenizer.bos and ids.count(chat_tokenizer.bos) == 1 and ids.count(mark) == 6
    rendered = render(group(("a", "wug")), style)
    parts = (rendered.prefix, rendered.samples[0].stem, rendered.samples[0].leaves[0])
    assert sum(pieces_length(part, chat_tokenizer, spec) for part in parts) + 2 == len(ids)


def test_a_tokenizer_without_a_template_is_refused():
    from tests.small_world import embedded_tokenizer

    with pytest.raises(UserError, match="form chat: here has no chat template; use released or plain"):
        episode_text.chat_words(embedded_tokenizer().hf, "here")

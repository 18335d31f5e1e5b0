"""The answer normalisation of VQA's released evaluation: punctuation, number words, articles, contractions.

In: an answer as written. Out: the form in which answers are compared.
Decision: the rules of the released Python evaluation (Antol et al. 2015, GT-Vision-Lab/VQA, commit c4e6a0e) are kept
with their quirks, because a number is only comparable with them: "none" is 0, "somebody'd" loses its apostrophe,
contractions with a capital I never match, and at most 32 full stops go (the release passes a flag where `re.sub` takes
a count).
"""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")

_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32
_COMMA = re.compile(r"\d,\d")

_PAIRS = """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
    she's:she's shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've
    somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll
    somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll
    someones:someone's somethingd:something'd somethingd've:something'd've something'dve:something'd've
    somethingll:something'll thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're
    theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've
    twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're
    whats:what's whatve:what've whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've
    who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't
    wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
    y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _PAIRS.split())
"""Words as they are without their apostrophe (or with one of two) -> the written contraction."""


def normalise(answer: str) -> str:
    """The compared form of an answer: line breaks to blanks, then punctuation, then words in lower case."""
    return words(punctuation(answer.replace("\n", " ").replace("\t", " ").strip()))


def punctuation(text: str) -> str:
    """Text without the marks of PUNCTUATION and without full stops that no digit follows.

    A mark with a blank beside it is removed, one between letters becomes a blank ("red/blue"); where a comma stands
    between two digits ("1,000") every mark is removed.
    """
    out = text
    thousands = _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside or thousands else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def words(text: str) -> str:
    """Lower-case words with number words up to ten as digits, without articles, with their apostrophes put back."""
    kept = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in ARTICLES)

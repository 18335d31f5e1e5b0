"""Caption metrics from rows: CIDEr, BLEU-1 to 4, ROUGE-L and METEOR, beside the most frequent caption as a floor.

In: rows {"id", "image", "caption": generated text, "references": [texts]}, one per image; those with "task": "reg" say
one region of their image each, and an image may have several. "floor" in every row is the constant caption to compare
with. Out: plain dicts of fractions (papers print them times 100; CIDEr is 0..10).
Decision: tokens, CIDEr, ROUGE-L, METEOR and intervals are the functions of eval/events.py; only BLEU-1, 3 and 4 are
added, by the same package. The floor has no METEOR, whose start costs more than all the rest. SPICE is not computed:
its scorer fetches 385 MB at first use (P12); scores that embed words need vectors that are not ours to ship.
Protocol: Chen et al. 2015 (COCO captions); with `java`, tokens and METEOR are those of the released scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.eval import events

OVERLAP = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider")
METRICS = (*OVERLAP, "meteor")
ORDERS = 4
NOT_COMPUTED = {
    "spice": "its scorer downloads Stanford CoreNLP at first use",
    "embeddings": "needs word or sentence vectors that are not shipped",
}

Row = Mapping[str, Any]


def score(
    rows: Iterable[Row], *, train: Sequence[str] | None = None, java: bool | None = None, seed: int = 0
) -> dict[str, Any]:
    """The metrics of the generated captions, and under "floor" those of one caption given to every image.

    `train` are the captions the floor is chosen from; without them it is what the rows name as "floor", else chosen
    from the references of these rows, which makes it a stronger floor. `java` None uses PTB tokens and METEOR when
    `java` is on PATH; "tokenizer" says which. Further keys: "n", "blind" (rows without a reference that has a word),
    "empty" (captions without a word; they score 0), "distinct" (different captions / n), "intervals" (cider and
    rouge_l, over images) and "reasons" for values that are None. Raises DataError naming a row with missing or wrong
    keys, or a repeated id or image, or when rows name different floors.
    """
    checked = _checked(rows)
    kept = [row for row in checked if row["references"]]
    words = [events.tokenize_python(row["caption"]) for row in kept]
    result: dict[str, Any] = {"n": len(kept), "blind": len(checked) - len(kept), "empty": sum(not w for w in words)}
    result |= {"intervals": {}, "reasons": {}, **dict.fromkeys((*METRICS, "distinct", "tokenizer", "floor"))}
    if not kept:
        result["reasons"]["all"] = "no caption has references"
        return result
    result["distinct"] = len(set(words)) / len(words)
    constant, origin = _floor(checked, train)
    pairs = [{"hypothesis": row["caption"], "references": row["references"]} for row in kept]
    floor = [{**pair, "hypothesis": constant} for pair in pairs] if constant is not None else []
    # One call for both, because starting Java costs more than tokenizing.
    references, texts, result["tokenizer"] = events.tokenized(pairs + floor, java)
    gold = {i: references[i] for i in range(len(kept))}
    said = {i: texts[i] for i in range(len(kept))}
    images = [str(row["image"]) for row in kept]
    result |= _overlap(gold, said, images, seed, result["intervals"])
    result["meteor"], reason = events.meteor(gold, said, java)
    if reason:
        result["reasons"]["meteor"] = reason
    if constant is None:
        result["reasons"]["floor"] = "no caption to choose a floor from"
        return result
    result["floor"] = {"caption": constant, "from": origin}
    result["floor"] |= _overlap(gold, {i: texts[len(kept) + i] for i in gold}, images, seed, {})
    return result


def _floor(rows: Sequence[Row], train: Sequence[str] | None) -> tuple[str | None, str]:
    """The constant caption, and whether it is from training texts or from the references of the rows."""
    if train is not None:
        return most_frequent(train), "train"
    named = {row.get("floor") for row in rows}
    if len(named) > 1:
        raise DataError(f"rows name different floors: {' and '.join(sorted(ascii(n)[:40] for n in named)[:2])}")
    (constant,) = named
    if constant is not None:
        return str(constant), "train"
    return most_frequent(r for row in rows for r in row["references"]), "references"


def most_frequent(captions: Iterable[str]) -> str | None:
    """The caption written most often, compared by its Python tokens; of equally frequent ones the first in order of
    their tokens, so the order of rows does not matter. None when no caption has a word."""
    forms: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for caption in captions:
        if form := events.tokenize_python(caption):
            counts[form] += 1
            forms[form] = min(caption, forms.get(form, caption))
    return forms[min(counts, key=lambda form: (-counts[form], form))] if counts else None


def _overlap(
    gold: dict[int, list[str]], said: dict[int, list[str]], images: Sequence[str], seed: int, intervals: dict[str, Any]
) -> dict[str, float]:
    """The values of OVERLAP. BLEU is over the corpus with the closest reference length, as in the released scripts."""
    from pycocoevalcap.bleu.bleu import Bleu

    found = events.overlap(gold, said, images, seed, intervals)
    bleu, _ = Bleu(ORDERS).compute_score(gold, said, verbose=0)
    values = {f"bleu{n}": float(value) for n, value in enumerate(bleu, start=1)}
    return values | {name: found[name] for name in ("rouge_l", "cider")}


def _checked(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows with only those references that have a word. Raises DataError as `score`."""
    out: list[dict[str, Any]] = []
    seen: dict[str, set[str]] = {"id": set(), "image": set()}
    for row in rows:
        name = str(row.get("id", "row without id"))
        if lacking := [k for k in ("id", "image", "caption", "references") if k not in row]:
            raise DataError(f"{name}: key {lacking[0]} is missing")
        references = row["references"]
        if not isinstance(row["caption"], str):
            raise DataError(f"{name}: 'caption' wants a string, got {type(row['caption']).__name__}")
        if not isinstance(references, (list, tuple)) or not all(isinstance(r, str) for r in references):
            raise DataError(f"{name}: 'references' wants a list of strings, got {ascii(references)[:60]}")
        for key, known in seen.items():
            if key == "image" and row.get("task") == "reg":
                continue
            # Two captions of one image would weigh it twice, and their references would belong together.
            if str(row[key]) in known:
                raise DataError(f"{name}: a second row with {key} {ascii(str(row[key]))[:80]}")
            known.add(str(row[key]))
        out.append({**row, "references": [r for r in references if events.tokenize_python(r)]})
    return out

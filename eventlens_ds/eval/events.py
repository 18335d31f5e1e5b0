"""VisualCOMET metrics from rows: text overlap, Unique and Novel of generations, Acc@50 of ranked candidates.

In: generation rows {"id", "image", "event", "relation", "references": [texts], "generations": [texts], "novel":
[bool per generation] or absent}; ranking rows {"id", "image", "event", "relation", "candidates_gold": [texts],
"candidates_other": [texts], "scores": [mean log-likelihood per token, gold candidates first]}. Out: plain dicts of
fractions (papers print them times 100; CIDEr is 0..10).
Decision: the scorers are pycocoevalcap's. PTB tokens and METEOR need `java`; without it a documented Python tokenizer
stands in and its results say so. Unique and Novel always use the Python tokenizer, so Java does not change them.
Protocol: Park et al. 2020 and its released scripts; where we differ, the function says it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eventlens_ds.errors import DataError
from eventlens_ds.eval.intervals import bootstrap_mean

log = logging.getLogger(__name__)

NO_JAVA = "java is not on PATH"
CANDIDATES = 50
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""PTB's names of brackets. They stay in the text: pycocoevalcap drops only their upper-case forms."""
_CLITIC = re.compile(r"(?<=\w)(n't|'s|'re|'ve|'ll|'d|'m)(?=\W|$)")
_TOKEN = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|(?:[a-z]\.){2,}|\d+(?:[.,/:]\d+)*|\w+(?:[-/]\w+)*|[^\w\s]")
_DROPPED = frozenset(["'", "`", '"', ".", "?", "!", ",", ":", "-", ";"])
_PERSON = re.compile(r"(?:person)?\d+")

Row = Mapping[str, Any]


def tokenize(texts: Sequence[str], *, java: bool | None = None) -> tuple[list[str], str]:
    """Lower-cased tokens joined by blanks, without punctuation, and the tokenizer's name ("ptb" or "python").

    `java` None uses PTB when `java` is on PATH. The PTB jar inside pycocoevalcap is called through a pipe and not by
    that package's wrapper, which writes into site-packages. Raises DataError when Java fails or loses a line.
    """
    if java is None:
        java = shutil.which("java") is not None
    if not java:
        return [tokenize_python(t) for t in texts], "python"
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    command = ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    feed = "".join(" ".join(t.split()) + "\n" for t in texts)
    done = subprocess.run(command, cwd=folder, input=feed.encode(), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(texts):
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise DataError(f"PTB tokenizer: {len(lines)} lines for {len(texts)} texts, exit {done.returncode}: {last}")
    return [" ".join(w for w in line.split() if w not in ptbtokenizer.PUNCTUATIONS) for line in lines], "ptb"


def tokenize_python(text: str) -> str:
    """PTB's rules that matter for captions: lower case, clitics split ("is n't", "dog 's"), hyphens and numbers kept
    whole, punctuation dropped. Unlike PTB it has no list of abbreviations ("st." loses its dot) or contractions
    ("cannot" stays one word)."""
    split = _CLITIC.sub(r" \1", text.lower().replace("\u2019", "'"))
    return " ".join(BRACKETS.get(w, w) for w in _TOKEN.findall(split) if w not in _DROPPED)


def same_people(text: str) -> str:
    """The form compared by Unique and Novel: Python tokens, every person id mapped to 1, be it written "3" as in the
    source files or "person3" as in prompts."""
    return " ".join("1" if _PERSON.fullmatch(w) else w for w in tokenize_python(text).split())


def mark_novel(generations: Sequence[str], train: frozenset[str]) -> list[bool]:
    """For each generation whether it is absent from `train` (texts of `same_people`); stored in the row as "novel".

    The released script tokenizes generations but not training texts, so a final dot makes a copy look novel; here
    both sides pass through `same_people`.
    """
    return [same_people(g) not in train for g in generations]


def score_generations(rows: Iterable[Row], *, java: bool | None = None, seed: int = 0) -> dict[str, Any]:
    """bleu2, meteor, cider, rouge_l, unique, novel over all hypotheses, and how they were computed.

    Every generation is one hypothesis against all references of its (event, relation). Rows without references
    (blind) are counted in "blind". A value that could not be computed is None and "reasons" says why. "intervals"
    resample images and exist for the means over hypotheses: cider (document frequencies held fixed) and rouge_l.
    """
    pairs, blind = _hypotheses(rows)
    result: dict[str, Any] = {"n": len(pairs), "blind": blind, "reasons": {}, "intervals": {}}
    result |= dict.fromkeys(("bleu2", "meteor", "cider", "rouge_l", "unique", "novel", "tokenizer"))
    if not pairs:
        result["reasons"]["all"] = "no generation has references"
        return result
    forms = [same_people(p["hypothesis"]) for p in pairs]
    result["unique"] = len(set(forms)) / len(forms)
    if all(p["novel"] is not None for p in pairs):
        result["novel"] = sum(p["novel"] for p in pairs) / len(pairs)
    else:
        result["reasons"]["novel"] = "rows carry no novel marks"
    references, hypotheses, result["tokenizer"] = tokenized(pairs, java)
    result |= overlap(references, hypotheses, [p["image"] for p in pairs], seed, result["intervals"])
    result["meteor"], reason = meteor(references, hypotheses, java)
    if reason:
        result["reasons"]["meteor"] = reason
    return result


def candidate_pool(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Distinct inferences as (tokenized form, text), in the order of their forms; made once per data set."""
    forms: dict[str, str] = {}
    for text in texts:
        form = tokenize_python(text)
        forms[form] = min(text, forms.get(form, text))
    return tuple(sorted(forms.items()))


def draw_candidates(
    gold: Sequence[str], pool: Sequence[tuple[str, str]], *, seed: int, key: str, total: int = CANDIDATES
) -> list[str]:
    """Other inferences that complete `gold` to `total` candidates, drawn from a `candidate_pool`.

    A pure function of its arguments: `key` names the (image, event, relation). Texts equal to a gold one and repeats
    are left out, because no ranking could be right about them [ours; the released script draws lines by index].
    Fewer come back when the pool is too small. Raises DataError when `gold` is empty.
    """
    if not gold:
        raise DataError(f"{key}: no gold inference to rank")
    taken = {tokenize_python(g) for g in gold}
    wanted = max(0, total - len(gold))
    rng = random.Random(int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big"))
    drawn = rng.sample(pool, min(len(pool), wanted + len(taken)))
    return [text for form, text in drawn if form not in taken][:wanted]


def score_ranking(rows: Iterable[Row], *, seed: int = 0) -> dict[str, Any]:
    """Acc@50: share of gold inferences among the |gold| most likely candidates, mean over (image, event, relation).

    Most likely is lowest per-token perplexity, i.e. highest mean log-likelihood. Candidates tied at the cut count by
    the expectation over random orders, so a constant model scores |gold| / total. "chance" is that value; "short"
    counts rows with fewer than 50 candidates, "repeated" rows of an (image, event, relation) already counted.
    """
    recalls: list[float] = []
    chances: list[float] = []
    images: list[str] = []
    seen: set[tuple[str, str, str]] = set()
    result: dict[str, Any] = {"acc50": None, "chance": None, "n": 0, "short": 0, "repeated": 0, "interval": None}
    for row in rows:
        gold, scores = _ranking_row(row)
        key = (row["image"], row["event"], row["relation"])
        if key in seen:
            result["repeated"] += 1
            continue
        seen.add(key)
        recalls.append(recall_at_gold(gold, scores))
        chances.append(gold / len(scores))
        images.append(row["image"])
        result["short"] += len(scores) < CANDIDATES
    if recalls:
        interval = bootstrap_mean(recalls, images, seed=seed)
        result |= {"acc50": interval.estimate, "n": interval.n, "interval": interval.as_list()}
        result["chance"] = sum(chances) / len(chances)
    return result


def recall_at_gold(gold: int, scores: Sequence[float]) -> float:
    """Share of the first `gold` entries of `scores` among its `gold` highest, ties by expectation."""
    cut = sorted(scores, reverse=True)[gold - 1]
    above = sum(s > cut for s in scores)
    tied = sum(s == cut for s in scores)
    sure = sum(s > cut for s in scores[:gold])
    return (sure + (gold - above) * sum(s == cut for s in scores[:gold]) / tied) / gold


def _ranking_row(row: Row) -> tuple[int, Sequence[float]]:
    name = row.get("id", "row without id")
    keys = ("image", "event", "relation", "candidates_gold", "candidates_other", "scores")
    if lacking := [k for k in keys if k not in row]:
        raise DataError(f"{name}: key {lacking[0]} is missing")
    gold, total = len(row["candidates_gold"]), len(row["candidates_gold"]) + len(row["candidates_other"])
    if gold == 0 or len(row["scores"]) != total:
        raise DataError(f"{name}: {len(row['scores'])} scores for {gold} gold and {total - gold} other candidates")
    if not all(math.isfinite(s) for s in row["scores"]):
        raise DataError(f"{name}: a score is not finite")
    return gold, row["scores"]


def _hypotheses(rows: Iterable[Row]) -> tuple[list[dict[str, Any]], int]:
    pairs: list[dict[str, Any]] = []
    blind = 0
    for row in rows:
        name = row.get("id", "row without id")
        if lacking := [k for k in ("image", "relation", "references", "generations") if k not in row]:
            raise DataError(f"{name}: key {lacking[0]} is missing")
        references = [r for r in row["references"] if tokenize_python(r)]
        if not references:
            blind += 1
            continue
        novel = row.get("novel") or [None] * len(row["generations"])
        if len(novel) != len(row["generations"]):
            raise DataError(f"{name}: {len(novel)} novel marks for {len(row['generations'])} generations")
        for text, mark in zip(row["generations"], novel, strict=True):
            pairs.append({"hypothesis": text, "references": references, "image": row["image"], "novel": mark})
    return pairs, blind


def tokenized(
    pairs: Sequence[Mapping[str, Any]], java: bool | None
) -> tuple[dict[int, list[str]], dict[int, list[str]], str]:
    """References and hypotheses by hypothesis number, tokenized in one call (starting Java costs more than it does)."""
    texts = sorted({p["hypothesis"] for p in pairs} | {r for p in pairs for r in p["references"]})
    tokens, name = tokenize(texts, java=java)
    form = dict(zip(texts, tokens, strict=True))
    references = {i: [form[r] for r in p["references"]] for i, p in enumerate(pairs)}
    return references, {i: [form[p["hypothesis"]]] for i, p in enumerate(pairs)}, name


def overlap(
    references: dict[int, list[str]],
    hypotheses: dict[int, list[str]],
    images: Sequence[str],
    seed: int,
    intervals: dict[str, Any],
) -> dict[str, float]:
    """bleu2, cider and rouge_l; intervals of the last two over images are put into `intervals`."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(2).compute_score(references, hypotheses, verbose=0)
    cider, each_cider = Cider().compute_score(references, hypotheses)
    rouge, each_rouge = Rouge().compute_score(references, hypotheses)
    for name, each in (("cider", each_cider), ("rouge_l", each_rouge)):
        intervals[name] = bootstrap_mean(list(each), images, seed=seed).as_list()
    return {"bleu2": float(bleu[1]), "cider": float(cider), "rouge_l": float(rouge)}


def meteor(
    references: dict[int, list[str]], hypotheses: dict[int, list[str]], java: bool | None
) -> tuple[float | None, str]:
    """METEOR 1.5 and "", or None and the reason."""
    if java is False:
        return None, "java was switched off"
    if shutil.which("java") is None:
        return None, NO_JAVA
    from pycocoevalcap.meteor.meteor import Meteor

    # "|||" separates the fields of METEOR's protocol and would shift every later answer.
    clean = {i: [r.replace("|||", " ") for r in refs] for i, refs in references.items()}
    try:
        value, _ = Meteor().compute_score(clean, hypotheses)
    except (OSError, ValueError) as error:
        log.warning("METEOR failed: %s", error)
        return None, f"METEOR failed: {error}"
    return float(value), ""

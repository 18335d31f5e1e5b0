"""The conditions under which episodes (task lcl) are scored.

In: a name. Out: what it does to an episode and to its batch:
  none             the episode as it is
  blank_demos      demonstration images are grey
  shuffle_labels   the names on the demonstrations trade places at random
  released_splice  only the query image is embedded, as in the released code
  correct_P        P percent of the names stay, the others become the other class's (paper: 100 to 0)
  place_W          demonstrations of the right class stand first, middle or last
Decision: all conditions ask the same queries over the same demonstrations, so differences are paired.
"""

from __future__ import annotations

from typing import NamedTuple

from eventlens_ds.data.controls import Control
from eventlens_ds.data.listed_episodes import PLACES, Ablation
from eventlens_ds.errors import UserError

SHOTS = (0, 1, 2, 4, 8)
CONDITIONS = ("none", "blank_demos", "shuffle_labels", "released_splice")


class Condition(NamedTuple):
    """What a condition does to an episode and to its batch."""

    name: str
    ablation: Ablation = Ablation()
    control: Control = "none"


def condition(name: str) -> Condition:
    """A condition by its name. Raises UserError naming those there are."""
    kind, _, value = name.partition("_")
    if name == "none":
        return Condition(name)
    if name in ("blank_demos", "released_splice"):
        return Condition(name, control=name)  # type: ignore[arg-type]
    if name == "shuffle_labels":
        return Condition(name, Ablation(shuffle=True))
    if kind == "correct" and value.isdigit() and int(value) <= 100:
        return Condition(name, Ablation(correctness=int(value) / 100))
    if kind == "place" and value in PLACES[1:]:
        return Condition(name, Ablation(place=value))  # type: ignore[arg-type]
    known = f"{', '.join(CONDITIONS)}, correct_0 .. correct_100, place_first, place_middle, place_last"
    raise UserError(f"--episodes {name}: unknown; there are: {known}")

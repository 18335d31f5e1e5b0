"""The random number generators of one process as plain tensors.

In: the state of Python's, numpy's, torch's CPU and every visible GPU's generator. Out: named tensors that
safetensors can hold, and back. DeepSpeed saves none of this, and a resumed run with dropout differs at its first
step without it. Decision: numbers only, no pickled state objects.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def seed(number: int) -> None:
    """Start Python's and numpy's generators from a number. torch's are seeded where they are used, by row."""
    random.seed(number)
    np.random.seed(number % 2**32)


def capture() -> dict[str, torch.Tensor]:
    """State of all generators of this process."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict) and legacy["bit_generator"] == "MT19937", "numpy's global generator was replaced"
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        "numpy_position": torch.tensor([legacy["state"]["pos"], legacy["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, torch.Tensor]) -> None:
    """Put every generator into a captured state; a GPU state is ignored where there is no GPU."""
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": state["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": state["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

"""A RegionVLM with initial weights that depend on the seed and on nothing else.

In: a RegionVLMConfig, dtype, seed, and DeepSpeed's settings when the model is to be partitioned. Out: the model.
Decision: construction draws nothing. Afterwards every module is initialised by the rules of its own class, from a
generator seeded by (seed, module name), in float32 on the CPU. So a run starts from the same bits under every ZeRO
stage, world size and device, and bf16 starts from the rounded fp32 weights; parts that come from files cost nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations.deepspeed import prevent_arange_dtype_change

from eventlens_ds.config.run_config import LoraConfig
from eventlens_ds.errors import UserError
from eventlens_ds.model import lora, mimetic
from eventlens_ds.model.configuration import RegionVLMConfig
from eventlens_ds.model.region_vlm import RegionVLM
from eventlens_ds.model.weights import gathered, rank_and_size

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""


def new_model(
    architecture: RegionVLMConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    zero3: dict[str, Any] | None = None,
    lora_config: LoraConfig | None = None,
    from_files: Sequence[str] = (),
) -> RegionVLM:
    """The model of a configuration, LoRA included. A collective with `zero3`, DeepSpeed's settings of stage 3.

    from_files: prefixes of parameters that will be loaded; they hold no values yet. Raises UserError for a language
    model whose layers the adapters do not fit, and for LoRA targets it does not have.
    """
    with _blocks_returned() if zero3 is not None else contextlib.nullcontext():
        model = _undrawn(architecture, dtype, zero3)
        if lora_config is not None and lora_config.rank:
            lora.inject(model.language_model, lora_config, seed)
        draw(model, seed, skip=from_files)
        if architecture.word_spread:
            _spread_words(model, architecture.word_spread / architecture.text_config.initializer_range)
        if architecture.qk_correlation:
            mimetic.correlate(model.language_model, architecture.qk_correlation)
    return model


def _spread_words(model: RegionVLM, factor: float) -> None:
    """Multiply the word embeddings, which are drawn. A collective under ZeRO-3."""
    words = cast(nn.Parameter, model.language_model.get_input_embeddings().weight)
    with torch.no_grad(), gathered([words]):
        # Partitioned parameters take rank 0's values.
        if not hasattr(words, "ds_id") or rank_and_size()[0] == 0:
            words.mul_(factor)


def _undrawn(architecture: RegionVLMConfig, dtype: torch.dtype, zero3: dict[str, Any] | None) -> RegionVLM:
    """The model with whatever its memory held."""
    architecture.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with contextlib.ExitStack() as stack:
            # Constructors draw a few tensors all the same, for nothing.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(init.no_init_weights())
            if zero3 is not None:
                # zero.Init changes the dtype of torch.arange, and with it the rotary frequencies.
                stack.enter_context(prevent_arange_dtype_change())
                stack.enter_context(_partitioning(zero3))
            model = RegionVLM(architecture)
            model.tie_weights()
            return model
    except ValueError as error:
        raise UserError(f"model.language_path: {error}") from error
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _blocks_returned() -> Iterator[None]:
    """Inside, memory that is freed goes back to the system (glibc on Linux; elsewhere nothing happens).

    A whole parameter lives for a moment between partitions that stay; from its heap glibc cannot return such a hole.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:
        # The largest values that glibc's own adjustment reaches: activations are served from the heap again.
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def _partitioning(settings: dict[str, Any]) -> Any:
    """DeepSpeed's zero.Init without its broadcast of every new parameter.

    Nothing has been drawn yet, so there is nothing to send; and pages of a parameter that no rank touches are never
    resident, while a broadcast would hold the largest parameter once per rank.
    """
    import deepspeed

    class Partitioning(deepspeed.zero.Init):
        def _zero_init_param(self, param: nn.Parameter) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    return Partitioning(config_dict_or_path=settings)


def draw(model: PreTrainedModel, seed: int, skip: Sequence[str] = ()) -> None:
    """Initial values of every parameter that is not below a prefix in `skip` and not of LoRA. A collective under
    ZeRO-3. Raises UserError for a parameter that no `_init_weights` knows."""
    pending: set[str] = set()
    names = {id(p): name for name, p in model.named_parameters()}
    seen: set[int] = set()
    with torch.no_grad():
        for name, module, owner in _children_first(model, "", model):
            if f"{name}.".startswith(tuple(skip)) or ".lora_" in f".{name}":
                continue
            own = _touched(module)
            with gathered(own):
                # Partitioned parameters take rank 0's values.
                if not any(hasattr(p, "ds_id") for p in own) or rank_and_size()[0] == 0:
                    _draw_module(module, owner, own, seen, _seed_of(seed, name.replace(".base_layer", "")))
                    pending -= {names[id(p)] for p in own}
                    pending |= {names[id(p)] for p in own if p.isnan().any()}
            seen |= {id(p) for p in own}
    if pending:
        raise UserError(f"parameter {min(pending)} has no initial value in transformers; load it from a folder")


def _children_first(module: nn.Module, name: str, owner: PreTrainedModel) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, model whose rules it follows), in transformers' order: a parent may correct its children."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name, owner)
    yield name, module, owner


def _touched(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that `_init_weights(module)` may write: its own and those of its children."""
    found = dict.fromkeys(module.parameters(recurse=False))
    for name, child in module.named_children():
        if not isinstance(child, PreTrainedModel) and not name.startswith("lora_"):
            found.update(dict.fromkeys(child.parameters(recurse=False)))
    return list(found)


def _draw_module(
    module: nn.Module, owner: PreTrainedModel, parameters: list[nn.Parameter], seen: set[int], seed: int
) -> None:
    """Run the rules of `owner` on one module, on float32 CPU stand-ins; not-a-number marks what nobody has drawn."""
    kept = [p.data for p in parameters]
    for p in parameters:
        stand_in = torch.empty(p.shape, dtype=torch.float32, device="cpu")
        p.data = stand_in.copy_(p) if id(p) in seen else stand_in.fill_(float("nan"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        owner._init_weights(module)
    for p, whole in zip(parameters, kept):
        whole.copy_(p.data)
        p.data = whole


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")

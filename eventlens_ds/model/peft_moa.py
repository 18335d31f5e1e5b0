"""MoA, the mixture of adapters, as a PEFT type: `peft.get_peft_model(model, MoAConfig(...))` and PEFT's folder format.

In: a causal LM of transformers with pre-norm decoder layers (Llama, Qwen2, Mistral), whole or partitioned by ZeRO-3.
Out: the same model with every decoder layer replaced by a `MoALayer`; adapter_config.json and adapter_model.safetensors
that `PeftModel.from_pretrained` loads in any process which imported `eventlens_ds.model`.
Decision: the adapters are those of model/adapters.py under names that differ by a prefix, so a RegionVLM's are loaded
here and back. Which task a row has is an argument of the forward, `moa_task_ids`: it reaches the layers as a keyword,
so checkpointing recomputes with the tasks of its own forward (P7). PEFT's adapter_names, which is routing by adapter
and refused in training, and its task_ids, which its causal LM drops, are not used.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.config.run_config import AdapterConfig
from eventlens_ds.data.records import TASKS
from eventlens_ds.errors import DataError, UserError
from eventlens_ds.model.adapters import Adapters, new_adapters, run_decoder_layer
from eventlens_ds.model.weights import full_shape, gathered, rank_and_size

NAME = "MOA"
ADAPTER = "adapter_model.safetensors"
TARGETS = r"(.*\.)?layers\.\d+"
"""Modules that are replaced: the decoder layers of a causal LM."""

_problem = "not registered"
"""Why PEFT does not know the type; empty: it does."""


@dataclass
class MoAConfig(PeftConfig):
    """Settings of a mixture of adapters; names and meaning are those of config.AdapterConfig.

    target_modules: regular expression of the names of the decoder layers that get adapters. tasks: under router task,
    those with an adapter. Raises UserError for a value that cannot be meant, and where PEFT does not know the type.
    """

    bottleneck: int = 64
    router: str = "task"
    tasks: list[str] | None = None
    experts: int = 4
    top_k: int = 2
    renormalise: bool = True
    source: str = "normed"
    dropout: float = 0.0
    target_modules: str = TARGETS

    def __post_init__(self) -> None:
        super().__post_init__()
        if _problem:
            raise UserError(f"MoAConfig: peft {peft.__version__} has no type {NAME}: {_problem}")
        self.peft_type = PeftType[NAME]
        self.tasks = list(AdapterConfig().tasks if self.tasks is None else self.tasks)
        if strange := [task for task in self.tasks if task not in TASKS]:
            raise UserError(f"MoAConfig: unknown task {strange[0]}; known: {', '.join(TASKS)}")
        for name, known in (("router", ("task", "mixture", "topk")), ("source", ("normed", "residual"))):
            if getattr(self, name) not in known:
                raise UserError(f"MoAConfig: {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.bottleneck < 1:
            raise UserError(f"MoAConfig: bottleneck {self.bottleneck}: must be at least 1")
        if self.router == "topk" and not 1 <= self.top_k <= self.experts:
            raise UserError(f"MoAConfig: top_k {self.top_k} of {self.experts} experts")

    def settings(self) -> dict[str, Any]:
        """What model.adapters.new_adapters reads."""
        names = ("bottleneck", "router", "experts", "top_k", "renormalise", "dropout")
        return {name: getattr(self, name) for name in names}


def task_ids(tasks: Sequence[str]) -> torch.Tensor:
    """`moa_task_ids` int64[B] of rows with these tasks. Raises UserError for an unknown one."""
    if strange := [task for task in tasks if task not in TASKS]:
        raise UserError(f"moa_task_ids: unknown task {strange[0]}; known: {', '.join(TASKS)}")
    return torch.tensor([TASKS.index(task) for task in tasks])


class MoALayer(GradientCheckpointingLayer, BaseTunerLayer):
    """A decoder layer of transformers with adapters beside its FFN; the layer itself is `base_layer`."""

    adapter_layer_names = ("moa_adapters",)

    def __init__(self, layer: Any, adapter_name: str, config: MoAConfig) -> None:
        super().__init__()
        self.base_layer = layer
        self.moa_adapters = nn.ModuleDict()
        self.sources: dict[str, str] = {}
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: MoAConfig) -> None:
        """Another set of adapters, with its start values, partitioned where the layer is."""
        reference = next(self.base_layer.parameters())
        norm: Any = self.base_layer.input_layernorm
        width = full_shape(norm.weight)[0]
        made = new_adapters(config.settings(), config.tasks or (), width)
        made.reset_parameters()
        meta = next(made.parameters()).is_meta  # with PEFT's low_cpu_mem_usage
        self.moa_adapters[adapter_name] = made.to(device=None if meta else reference.device, dtype=reference.dtype)
        self.sources[adapter_name] = config.source
        if hasattr(reference, "ds_id"):
            # Rank 0's values are sent to all.
            reference.convert_to_zero_parameters(param_list=list(made.parameters()))  # type: ignore[attr-defined]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        moa_task_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As the layer; moa_task_ids int64[B], or [B, T] for tasks within a row, index records.TASKS (-1: none)."""
        normed, residual, out = run_decoder_layer(self.base_layer, hidden_states, attention_mask, kwargs)
        active = [name for name in self.active_adapters if name in self.moa_adapters]
        if self.disable_adapters or not active:
            return out
        if len(active) > 1:
            raise UserError(f"MoA: {' and '.join(active)} are both active; call set_adapter with one of them")
        adapters: Adapters = self.moa_adapters[active[0]]  # type: ignore[assignment]
        read = normed if self.sources[active[0]] == "normed" else residual
        return adapters(read, out, _per_token(moa_task_ids, adapters, hidden_states))


def _per_token(ids: torch.Tensor | None, adapters: Adapters, hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Task ids int64[B * T]."""
    rows, length = hidden_BTD.shape[:2]
    if ids is None:
        if adapters.by_task:
            raise UserError("MoA: which task? pass moa_task_ids, one id a row (eventlens_ds.model.peft_moa.task_ids)")
        ids = torch.full((rows,), -1, device=hidden_BTD.device)
    if tuple(ids.shape) not in ((rows,), (rows, length)):
        raise UserError(f"moa_task_ids: {list(ids.shape)} for {rows} rows of {length} tokens")
    if ids.device.type == "cpu" and ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(TASKS):
        raise UserError(f"moa_task_ids: {int(ids.min())} to {int(ids.max())}; tasks are 0 to {len(TASKS) - 1}, -1 none")
    ids = ids.to(hidden_BTD.device)
    return (ids if ids.ndim == 2 else ids[:, None].expand(rows, length)).reshape(-1)


class MoAModel(BaseTuner):
    """What `get_peft_model` puts between the PeftModel and the model; created by PEFT alone."""

    prefix = "moa_"
    tuner_layer_cls = MoALayer
    target_module_mapping: dict[str, list[str]] = {}
    _generating = threading.Lock()

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **_unused: Any,
    ) -> None:
        assert isinstance(peft_config, MoAConfig)
        if isinstance(target, MoALayer):
            target.add(adapter_name, peft_config)
            return
        try:
            layer = MoALayer(target, adapter_name, peft_config)
        except (AttributeError, StopIteration):
            raise UserError(
                f"MoAConfig: {current_key} ({type(target).__name__}) is no pre-norm decoder layer"
            ) from None
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Both ways: PEFT's own would give a layer a weight of its own, which a decoder layer has not."""
        setattr(parent, child_name, new_module)

    def _enable_peft_forward_hooks(self, *_args: Any, **kwargs: Any) -> Any:
        """Called by PeftModel around a forward and around generate."""
        import contextlib

        if kwargs.get("adapter_names") is not None:
            raise UserError("MoA: adapter_names does not route; pass moa_task_ids, one id a row")
        return contextlib.nullcontext()

    def generate(self, *args: Any, moa_task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The model's generate, with the task of every prompt (int64[B]).

        transformers refuses keywords it does not know, so they join at each forward; one generation at a time. There
        is no backward that could come later.
        """
        if moa_task_ids is None:
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]
        prompts = moa_task_ids

        def join(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            tokens = given[0] if given else named.get("input_ids")
            tokens = named["inputs_embeds"] if tokens is None else tokens
            # Beams and returned sequences of a prompt stand side by side.
            named["moa_task_ids"] = prompts.repeat_interleave(tokens.shape[0] // prompts.shape[0])
            return given, named

        with self._generating:
            handle = self.model.register_forward_pre_hook(join, with_kwargs=True)
            try:
                return self.model.generate(*args, **kwargs)  # type: ignore[operator]
            finally:
                handle.remove()


def register() -> str:
    """Make PEFT know the type; returns '' or why it cannot. Importing eventlens_ds.model calls it."""
    global _problem
    if _problem == "not registered":
        try:
            _extend(PeftType, NAME)
            register_peft_method(name=NAME.lower(), config_cls=MoAConfig, model_cls=MoAModel, prefix=MoAModel.prefix)
            _problem = ""
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _problem = f"{type(error).__name__}: {error}"
    return _problem


def _extend(kind: Any, name: str) -> None:
    """Add a member to a (str, Enum) class. ValueError when it has one of that name or does not take it."""
    if name in kind.__members__:
        raise ValueError(f"another package has added {name}")
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(kind._member_names_)
    type.__setattr__(kind, name, member)
    kind._member_map_[name] = kind._value2member_map_[name] = member
    kind._member_names_.append(name)
    if kind(name) is not member or kind[name] is not member or member not in list(kind):
        raise ValueError("its enumeration of types does not take another member")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' tensors by their names in `model`, whole and on the CPU. A collective under ZeRO-3."""
    found = {}
    for name, parameter in model.named_parameters():
        if f".{MoAModel.prefix}adapters." in f".{name}":
            with gathered([parameter], modifier_rank=None):
                found[name] = parameter.detach().cpu().clone().contiguous()
            assert tuple(found[name].shape) == full_shape(parameter), f"{name} was not gathered"
    return found


def save_gathered(model: PeftModel, folder: str | Path) -> None:
    """`model.save_pretrained(folder)` for a model of ZeRO-3, whose own would write empty tensors; a collective, and
    rank 0 writes. Raises DataError there when the file does not read back as what was gathered."""
    whole = state(model)
    if rank_and_size()[0]:
        return
    model.save_pretrained(str(folder), state_dict=whole)
    for adapter_name in model.peft_config:
        at = Path(folder) / ("" if adapter_name == "default" else adapter_name) / ADAPTER
        mark = f".moa_adapters.{adapter_name}."
        own = {name.replace(mark, ".moa_adapters."): t for name, t in whole.items() if mark in name}
        written = load_file(at)
        if set(written) != set(own) or not all(torch.equal(written[name], own[name]) for name in own):
            raise DataError(f"{at}: does not read back as what was written")

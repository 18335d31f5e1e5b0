"""Bottleneck adapters beside every FFN, the two ways of choosing among them, and the decoder layer that calls them.

T tokens, D model width, r bottleneck, E adapters, t the task of a token (P7).
  A_e(u) = s_e * (up_e relu(down_e u + b_e) + c_e),  u = norm x ("normed") or x ("residual", as LION)
  task     y = x + FFN(norm x) + A_t(u)                         one adapter per task
  mixture  y = x + FFN(norm x) + sum_e G_e^l(t) (.) A_e(u)      LION: e, l in {region level, image level}
Decision: the routing of a forward is an immutable object passed as an argument through the layers. Activation
checkpointing binds it to the forward that recomputes, so two forwards may be open at once. All adapters are
parameters of one module and stacked at call time, so every rank gathers the same parameters (P5) and one adapter
can be frozen while another trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.data.records import REGION_TASKS, TASKS
from eventlens_ds.ops.moa import AdapterStack, Gates, TaskOneHot, TaskVectors, moa

FIELDS = ("down", "down_bias", "up", "up_bias", "scale")

LEVELS = ("region_level", "image_level")
"""Adapters of a mixture, in LION's order; its kinds of task have the same names."""


class Usage(NamedTuple):
    """What the tokens of one rank chose among E adapters, as sums that ranks can add.

    mass float64[tasks, E]: tokens of each task, shared out over the adapters they take; a token that passes by all
    adapters counts nowhere. entropy float64[tasks]: the entropy of a token's choice in nats, summed over tokens."""

    mass: torch.Tensor
    entropy: torch.Tensor


class Adapters(nn.Module):
    """Bottleneck adapters with names; parameters are called <name>_down, <name>_up, ... `backend` of the op (None:
    chosen per device) is set by RegionVLM.choose_kernels. Subclasses say which adapter a token takes, and `usage` of
    it for telemetry; `by_layer` is False where every layer chooses alike."""

    by_layer = True

    def __init__(self, names: Sequence[str], width: int, bottleneck: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.names = tuple(names)
        self.backend: str | None = None
        self.dropout = nn.Dropout(dropout)
        shapes = {
            "down": (bottleneck, width),
            "down_bias": (bottleneck,),
            "up": (width, bottleneck),
            "up_bias": (width,),
            # One element and not a scalar: ZeRO-3 cannot partition a tensor without dimensions.
            "scale": (1,),
        }
        for adapter in self.names:
            for name, shape in shapes.items():
                self.register_parameter(f"{adapter}_{name}", nn.Parameter(torch.empty(shape)))

    def reset_parameters(self) -> None:
        """LION's start: down Kaiming-uniform (a = sqrt 5), up and biases zero, scale one."""
        for adapter in self.names:
            init.kaiming_uniform_(getattr(self, f"{adapter}_down"), a=math.sqrt(5))
            for name in ("down_bias", "up", "up_bias"):
                init.zeros_(getattr(self, f"{adapter}_{name}"))
            init.ones_(getattr(self, f"{adapter}_scale"))

    def gates(self, task_ids_T: torch.Tensor) -> Gates:
        """The gate of every token from its task id (index into records.TASKS)."""
        raise NotImplementedError

    def watch(self, on: bool) -> None:
        """Count the choices of forwards from here on, for `usage`. Nothing to count where the task decides alone."""

    def usage(self, task_tokens: torch.Tensor) -> Usage:
        """What tokens, float64[tasks] by task, chose. Under ZeRO-3 call it with `usage_parameters` gathered.

        A router that looks at tokens returns instead what it counted since `watch(True)`."""
        shares = self.shares().to(task_tokens.device)
        mass = task_tokens[:, None] * shares
        return Usage(mass, task_tokens * torch.special.entr(shares).sum(1))

    def usage_parameters(self) -> list[nn.Parameter]:
        """The parameters that `usage` reads."""
        return []

    def shares(self) -> torch.Tensor:
        """float64[tasks, E]: the share that each adapter has in a token of each task; zeros where none has."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, residual: torch.Tensor, task_ids_T: torch.Tensor) -> torch.Tensor:
        """x, residual [..., T, D] -> residual + what the adapters of each token's task add."""
        down, down_bias, up, up_bias, scale = (
            torch.stack([getattr(self, f"{adapter}_{name}") for adapter in self.names]) for name in FIELDS
        )
        stack = AdapterStack(down, down_bias, up, up_bias, scale[:, 0])
        gates = self.gates(task_ids_T)
        return moa(self.dropout(x), residual, stack, gates, activation="relu", backend=self.backend)


class TaskAdapters(Adapters):
    """One adapter per task of `names`; a token of any other task passes by them all."""

    by_layer = False

    def shares(self) -> torch.Tensor:
        return torch.tensor([[float(task == name) for name in self.names] for task in TASKS], dtype=torch.float64)

    def gates(self, task_ids_T: torch.Tensor) -> TaskOneHot:
        return TaskOneHot(_lookup(task_ids_T, [self.names.index(t) if t in self.names else -1 for t in TASKS]))


class AdapterMixture(Adapters):
    """LION's mixture: an adapter for region-level and one for image-level tasks, and per level a gate vector for
    each. gate_<level> [2, D] has the adapters in the order of LEVELS and starts one-hot [released code]."""

    def __init__(self, width: int, bottleneck: int, dropout: float = 0.0) -> None:
        super().__init__(LEVELS, width, bottleneck, dropout)
        for level in LEVELS:
            self.register_parameter(f"gate_{level}", nn.Parameter(torch.empty(len(LEVELS), width)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for index, level in enumerate(LEVELS):
            gate = getattr(self, f"gate_{level}")
            init.zeros_(gate)
            init.ones_(gate[index])

    def gates(self, task_ids_T: torch.Tensor) -> TaskVectors:
        levels = _lookup(task_ids_T, [LEVELS.index(level_of(task)) for task in TASKS])
        return TaskVectors(torch.stack([getattr(self, f"gate_{level}") for level in LEVELS]), levels)

    def usage_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, f"gate_{level}") for level in LEVELS]

    def gate_values(self) -> dict[str, torch.Tensor]:
        """By level float64[E, 2]: mean and standard deviation over the channels of each adapter's gate."""
        gates = [gate.detach().double() for gate in self.usage_parameters()]
        return {level: torch.stack([g.mean(1), g.std(1, correction=0)], 1) for level, g in zip(LEVELS, gates)}

    def shares(self) -> torch.Tensor:
        """By the mean |gate| of each adapter: gates have no fixed sum."""
        size = torch.stack([gate.detach().double().abs().mean(1) for gate in self.usage_parameters()])
        by_level = size / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        return by_level[[LEVELS.index(level_of(task)) for task in TASKS]]


def level_of(task: str) -> str:
    """LION's kind of a task: region_level or image_level."""
    return "region_level" if task in REGION_TASKS else "image_level"


def new_adapters(config: dict[str, Any], tasks: Sequence[str], width: int) -> Adapters:
    """The adapters of one layer. config: bottleneck, dropout and router (see config.AdapterConfig)."""
    if config["router"] == "mixture":
        return AdapterMixture(width, config["bottleneck"], config["dropout"])
    return TaskAdapters(tasks, width, config["bottleneck"], config["dropout"])


def _lookup(ids_T: torch.Tensor, table: Sequence[int]) -> torch.Tensor:
    """table[ids]. The table is written by comparisons: copying it to a GPU would wait for the GPU."""
    found = torch.full_like(ids_T, -1)
    for index, value in enumerate(table):
        if value >= 0:
            found = torch.where(ids_T == index, value, found)
    return found


@dataclass(frozen=True)
class Routing:
    """Which adapter every token takes in one forward, and where the adapters are."""

    layers: nn.ModuleList
    task_ids: torch.Tensor

    def __call__(self, layer: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.layers[layer](x, residual, self.task_ids)


class AdaptedDecoderLayer(GradientCheckpointingLayer):
    """A pre-norm decoder layer of transformers (Llama, Qwen2, Mistral) with a place for adapters at its FFN.

    It takes over the submodules of `layer` under their own names, so checkpoints of the language model fit.
    """

    def __init__(self, layer: Any, index: int, source: str) -> None:
        super().__init__()
        self.index, self.source = index, source
        self.self_attn = layer.self_attn
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        routing: Routing | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        residual = hidden_states + attended
        normed = self.post_attention_layernorm(residual)
        out = residual + self.mlp(normed)
        if routing is not None:
            out = routing(self.index, normed if self.source == "normed" else residual, out)
        return out


def adapt_layers(language_model: Any, source: str) -> None:
    """Replace the decoder layers of a causal LM. Raises ValueError for a layer of another structure."""
    layers = language_model.model.layers
    needed = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    for i, layer in enumerate(layers):
        names = {name for name, _ in layer.named_children()}
        if names != set(needed):
            raise ValueError(f"{type(layer).__name__}: has {sorted(names)}, adapters need {list(needed)}")
        layers[i] = AdaptedDecoderLayer(layer, i, source)

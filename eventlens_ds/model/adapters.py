"""Bottleneck adapters beside every FFN, the three ways of choosing among them, and the decoder layer that calls them.

T tokens, D model width, r bottleneck, E adapters, t the task of a token (P7).
  A_e(u) = s_e * (up_e relu(down_e u + b_e) + c_e),  u = norm x ("normed") or x ("residual", as LION)
  task     y = x + FFN(norm x) + A_t(u)                         one adapter per task
  mixture  y = x + FFN(norm x) + sum_e G_e^l(t) (.) A_e(u)      LION: e, l in {region level, image level}
  topk     y = x + FFN(norm x) + sum_{e in top k of W u} p_e A_e(u)    p: softmax of W u, over the k or over all
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
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from eventlens_ds.data.records import REGION_TASKS, TASKS
from eventlens_ds.ops.moa import AdapterStack, Gates, TaskOneHot, TaskVectors, TopKRouter, moa
from eventlens_ds.ops.moa.reference import top_k_mask

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
    it for telemetry. by_layer: False where every layer chooses alike; by_task: whether the task of a token decides."""

    by_layer = True
    by_task = True

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
        return self.mix(x, residual, self.gates(task_ids_T))

    def mix(self, x: torch.Tensor, residual: torch.Tensor, gates: Gates) -> torch.Tensor:
        """residual + the adapters, weighted by the gate of each token."""
        down, down_bias, up, up_bias, scale = (
            torch.stack([getattr(self, f"{adapter}_{name}") for adapter in self.names]) for name in FIELDS
        )
        stack = AdapterStack(down, down_bias, up, up_bias, scale[:, 0])
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


class TokenRouter(Adapters):
    """`experts` adapters of which every token takes k by its own features; its task plays no part.

    gate_weight [E, D] starts normal (std 0.02): from zero, all tokens would take the same k by their index.
    """

    by_task = False

    def __init__(
        self, width: int, bottleneck: int, experts: int, k: int, *, renormalise: bool, dropout: float = 0.0
    ) -> None:
        super().__init__([f"expert_{e}" for e in range(experts)], width, bottleneck, dropout)
        self.k, self.renormalise = k, renormalise
        self.gate_weight = nn.Parameter(torch.empty(experts, width))
        self._counted: Usage | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.gate_weight, std=0.02)

    def watch(self, on: bool) -> None:
        self._counted = Usage(*(torch.zeros(len(TASKS), *n).double() for n in ((len(self.names),), ()))) if on else None

    def _count(self, logits_TE: torch.Tensor, task_ids_T: torch.Tensor) -> None:
        """Add the tokens of a forward, each shared out over its k adapters by their probability."""
        assert self._counted is not None
        chances = logits_TE.softmax(-1)
        taken = chances * top_k_mask(logits_TE, self.k)
        tasks = F.one_hot(task_ids_T.flatten().clamp(min=0), len(TASKS)).double() * (task_ids_T.flatten() >= 0)[:, None]
        self._counted.mass.add_((tasks.T @ (taken / taken.sum(-1, keepdim=True)).double()).cpu())
        self._counted.entropy.add_((tasks.T @ torch.special.entr(chances).sum(-1).double()).cpu())

    def usage(self, task_tokens: torch.Tensor) -> Usage:
        """What the forwards since `watch(True)` chose, as shares of `task_tokens`: a forward that activation
        checkpointing repeats is counted twice."""
        if self._counted is None:
            raise RuntimeError("usage of a token router before watch(True)")
        mass, entropy = (part.to(task_tokens.device) for part in self._counted)
        seen = task_tokens / mass.sum(1).clamp(min=1.0)
        return Usage(mass * seen[:, None], entropy * seen)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """float32[T, E] for x [..., D]: in bfloat16 the choice between near-equal experts would flip."""
        with torch.autocast(x.device.type, enabled=False):
            return (x.float() @ self.gate_weight.float().T).flatten(0, -2)

    def forward(  # type: ignore[override]  # with `members` it returns the balance too
        self, x: torch.Tensor, residual: torch.Tensor, task_ids_T: torch.Tensor, members_GT: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As Adapters.forward; with `members_GT`, see `group_balance`, also the balance. The balance is returned and
        not kept: ZeRO-3 gathers the router's weight again for a backward through what a module returned."""
        logits = self.logits(x)
        if self._counted is not None:
            self._count(logits.detach(), task_ids_T)
        out = self.mix(x, residual, TopKRouter(logits, self.k, self.renormalise))
        return out if members_GT is None else (out, group_balance(logits, self.k, members_GT))


def group_balance(logits_TE: torch.Tensor, k: int, members_GT: torch.Tensor) -> torch.Tensor:
    """sum_g n_g B_g, float32[]: tokens n_g of a group times its load-balance loss B_g (ops.moa.load_balance_loss).

    members_GT float[G, T]: 1 where token t counts in group g. A group is never split over rows, so unlike the loss of
    a whole row this sum does not depend on which groups share one (P8).
    """
    selected = top_k_mask(logits_TE, k).to(logits_TE.dtype)
    tokens = members_GT.sum(1).clamp(min=1.0)[:, None]
    return logits_TE.shape[-1] / k * ((members_GT @ selected) * (members_GT @ logits_TE.softmax(-1)) / tokens).sum()


def level_of(task: str) -> str:
    """LION's kind of a task: region_level or image_level."""
    return "region_level" if task in REGION_TASKS else "image_level"


def new_adapters(config: dict[str, Any], tasks: Sequence[str], width: int) -> Adapters:
    """The adapters of one layer. config: bottleneck, dropout and router (see config.AdapterConfig)."""
    if config["router"] == "mixture":
        return AdapterMixture(width, config["bottleneck"], config["dropout"])
    if config["router"] == "topk":
        return TokenRouter(
            width,
            config["bottleneck"],
            config["experts"],
            config["top_k"],
            renormalise=config["renormalise"],
            dropout=config["dropout"],
        )
    return TaskAdapters(tasks, width, config["bottleneck"], config["dropout"])


def _lookup(ids_T: torch.Tensor, table: Sequence[int]) -> torch.Tensor:
    """table[ids]. The table is written by comparisons: copying it to a GPU would wait for the GPU."""
    found = torch.full_like(ids_T, -1)
    for index, value in enumerate(table):
        if value >= 0:
            found = torch.where(ids_T == index, value, found)
    return found


class Balance:
    """The load-balance losses of one forward: each layer's term, taken once.

    A decoder layer of transformers returns hidden states alone, so terms leave it by this object. They hang on the
    graph of the first pass, also inside a (non-reentrant) checkpoint; what recomputation hands in again is dropped.
    """

    def __init__(self, members_GT: torch.Tensor) -> None:
        self.members_GT = members_GT
        self._terms: dict[int, torch.Tensor] = {}

    def add(self, layer: int, term: torch.Tensor) -> None:
        self._terms.setdefault(layer, term)

    def mean(self) -> torch.Tensor:
        """float32[], mean over layers of `group_balance`."""
        return torch.stack(list(self._terms.values())).mean()


@dataclass(frozen=True)
class Routing:
    """Which adapter every token takes in one forward, and where the adapters are. balance: where a TokenRouter puts
    its load-balance loss; None: it is not wanted."""

    layers: nn.ModuleList
    task_ids: torch.Tensor
    balance: Balance | None = None

    def __call__(self, layer: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if self.balance is None:
            return self.layers[layer](x, residual, self.task_ids)
        out, term = self.layers[layer](x, residual, self.task_ids, self.balance.members_GT)
        self.balance.add(layer, term)
        return out


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
        normed, residual, out = run_decoder_layer(self, hidden_states, attention_mask, kwargs)
        if routing is not None:
            out = routing(self.index, normed if self.source == "normed" else residual, out)
        return out


def run_decoder_layer(
    layer: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input of the FFN, residual stream before it, output) of a pre-norm decoder layer; kwargs go to its attention."""
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
    )
    residual = hidden_states + attended
    normed = layer.post_attention_layernorm(residual)
    return normed, residual, residual + layer.mlp(normed)


def adapt_layers(language_model: Any, source: str) -> None:
    """Replace the decoder layers of a causal LM. Raises ValueError for a layer of another structure."""
    layers = language_model.model.layers
    needed = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    for i, layer in enumerate(layers):
        names = {name for name, _ in layer.named_children()}
        if names != set(needed):
            raise ValueError(f"{type(layer).__name__}: has {sorted(names)}, adapters need {list(needed)}")
        layers[i] = AdaptedDecoderLayer(layer, i, source)

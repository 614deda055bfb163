"""Gradients of a velocity on a GPU, from CUDA graphs: `recompute.differentiate` for a backbone in eval mode.

With compiled blocks the processor takes longer to launch a velocity that runs again in backward(), and its gradient,
than a GPU to run them. `GradientGraphs` captures both as one graph when a shape has come more than PATIENCE times, in a
solve of many steps or in many solves; what the largest needs stays reserved.

What is captured is the velocity of a `StandIn`: a copy of the backbone whose weights are cast once in a backward(), to
what autocast would make of them in every layer, and whose layers add the gradients of their weights to sums in float32
(weight_gradients.py). The sums are for all velocities of a solve, and reach autograd once.

All compute what `differentiate` does, to rounding (tests/f5/speed).
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_mel.f5.backbones.dit import DiTBlock
from rlhf_mel.f5.layers import FeedForward, SelfAttention
from rlhf_mel.f5.speed.weight_gradients import (
    SUMMED,
    SummingAttention,
    SummingBlock,
    SummingFeedForward,
    SummingLinear,
    add_and_free,
)
from rlhf_mel.flow.lora import lora_layers
from rlhf_mel.flow.recompute import Rerun, Weights, differentiate
from rlhf_mel.modules import modules_of, weights_of

GRAPHS_BYTES = 2**30
"""What graphs' inputs and outputs may take; then shapes not used for longest go. The rest they share, a pool of it."""


PATIENCE = 8
"""Gradients of a shape before it is captured: its memory is reserved from then on."""


class KeptGraphs:
    """Graphs by what they were captured for; those not used for longest go when there are too many. One memory pool."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        self._pool: Any = None

    @property
    def pool(self) -> Any:
        """Handle of the memory that the graphs share."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return self._pool

    def get(self, key: Any) -> Any:
        """The graph of `key`, now the last used; None without one."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def keep(self, key: Any, graph: Any) -> Any:
        """Keep `graph`, which says its `bytes`, and drop others until it fits. Returns it."""
        while self._graphs and sum(kept.bytes for kept in self._graphs.values()) + graph.bytes > GRAPHS_BYTES:
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        return graph

    def drop(self, outdated: Callable[[Any], bool]) -> None:
        """Drop the graphs whose keys are outdated."""
        for key in [key for key in self._graphs if outdated(key)]:
            del self._graphs[key]


class GradientGraphs:
    """Gradients of one backbone, from graphs; see the top of this file.

    Args:
        change: what is done to a stand-in when it is made (its blocks compiled).
    """

    def __init__(self, change: Callable[[nn.Module], None]) -> None:
        self._change = change
        self._weights: Any = None
        self._reset(nn.Module(), ())

    def _reset(self, backbone: nn.Module, parameters: Iterable[Tensor]) -> None:
        self._sums = Sums(backbone, parameters)
        self._graphs = KeptGraphs()
        self._uses: Counter[Any] = Counter()
        self._stand_ins: dict[Any, StandIn] = {}
        self._touched: set[int] = set()
        self._adapted: list[Any] = []
        self._borrower: Weights | None = None

    def __call__(
        self,
        backbone: nn.Module,
        of: Callable[[nn.Module], Callable[..., Tensor]],
        run: Rerun,
        leaves: Sequence[Any],
        weights: Weights,
        cotangent: Tensor,
        cast: Callable[[torch.dtype | None], Mapping[str, Tensor]],
    ) -> Sequence[Tensor | None]:
        """Arguments and value of `differentiate`, and these:

        Args:
            of: `of(backbone)` is run's function computed by any backbone.
            cast: weights of the backbone, by name, that are there in a dtype already: a stand-in uses that memory.
        """
        if cotangent.device.type != "cuda" or cotangent.dtype == torch.float64:
            return differentiate(run, leaves, weights, cotangent)
        weights.begin()
        if not (self._borrower is weights and weights.lender is self):
            self._follow(backbone, weights)
            self._lend_to(weights)
        stand_in = self._stand_in(backbone, run.autocast.dtype, cast)
        # the first step's x has no gradient, and would be a signature of its own
        asked, leaves = leaves[0].requires_grad, [leaves[0].detach().requires_grad_(), *leaves[1:]]
        key = stand_in, run.autocast, *map(_signature, leaves)
        gradient = self._graphs.get(key)
        if gradient is None:
            gradient = partial(stand_in.differentiate, replace(run, function=of(stand_in.backbone)))
            self._uses[key] += 1
            if self._uses[key] > PATIENCE:
                del self._uses[key]
                gradient = self._graphs.keep(key, _GradientGraph(gradient, leaves, cotangent, self._graphs.pool))
        gradients: Sequence[Tensor | None] = gradient(leaves, cotangent)
        self._touched |= stand_in.touched
        return gradients if asked else gradients[1:]

    def _follow(self, backbone: nn.Module, weights: Weights) -> None:
        """Drop all if the weights are no longer where the graphs read them."""
        now = [(weight.data_ptr(), weight.requires_grad) for weight in weights_of(backbone)]
        if self._weights == now:
            return
        if self._borrower is not None and self._borrower.lender is self:
            self.hand_over(self._borrower)
        self._reset(backbone, weights.parameters)
        self._weights, self._adapted = now, lora_layers(backbone)

    def _lend_to(self, weights: Weights) -> None:
        if self._borrower is not None and self._borrower.lender is self:
            self.hand_over(self._borrower)
        torch._foreach_zero_(list(self._sums.by_id.values()))
        self._touched = set()
        for stand_in in self._stand_ins.values():
            stand_in.follow()
        self._borrower, weights.lender = weights, self

    def _stand_in(self, backbone: nn.Module, dtype: torch.dtype | None, cast: Callable[..., Any]) -> StandIn:
        key = dtype, *((layer.disable_adapters, layer.merged, *layer.active_adapters) for layer in self._adapted)
        if key not in self._stand_ins:
            self._stand_ins[key] = StandIn(backbone, dtype, self._sums, cast(dtype))
            self._change(self._stand_ins[key].backbone)
        return self._stand_ins[key]

    def hand_over(self, weights: Weights) -> None:
        """Add what is summed here to the sums of `weights`, which borrowed it."""
        weights.lender, self._borrower = None, None
        ids = map(id, weights.parameters)
        weights.add([self._sums.by_id[key].clone() if key in self._touched else None for key in ids])


def _signature(leaf: Any) -> Any:
    """What a graph is captured for; a leaf that is no tensor is part of it."""
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


class Sums:
    """Zeros like weights, for their gradients: those of queries, keys and values are parts of one tensor."""

    def __init__(self, backbone: nn.Module, weights: Iterable[Tensor]) -> None:
        self.by_id = {id(weight): torch.zeros_like(weight) for weight in weights}
        self.joined: dict[int, Tensor] = {}
        """By id of the weight of queries."""
        for module in modules_of(backbone):
            for parts in _projections(module):
                if all(id(part) in self.by_id for part in parts):
                    whole = torch.cat([self.by_id[id(part)] for part in parts])
                    self.joined[id(parts[0])] = whole
                    self.by_id.update(zip(map(id, parts), whole.chunk(3), strict=True))


def _projections(module: nn.Module) -> list[list[Tensor]]:
    """The weights, and the biases, of queries, keys and values, where nothing is done with them but to turn them."""
    plain = type(module) is SelfAttention and module.q_norm is None and module.k_norm is None
    layers: Any = [module.to_q, module.to_k, module.to_v] if plain else []
    if not layers or any(type(layer) is not nn.Linear for layer in layers):
        return []
    return [[layer.weight for layer in layers], [layer.bias for layer in layers]]


class StandIn:
    """A copy of a backbone that adds the gradients of its weights to `sums`.

    Args:
        dtype: what linear layers and convolutions are cast to, None to leave them; all else, and what needs no cast, is
            the backbone's own memory.
        cast: weights that are there in `dtype`, by name.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dtype: torch.dtype | None,
        sums: Sums,
        cast: Mapping[str, Tensor],
    ) -> None:
        self.backbone: Any = copy.deepcopy(backbone)
        self.touched: set[int] = set()
        """Ids of the backbone's weights that have had a gradient."""
        self._ids: dict[int, list[int]] = {}
        self._leaves: list[Tensor] = []
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, original in backbone.named_modules():
            layer: Any = self.backbone.get_submodule(name)
            for key, weight in _own_weights(original).items():
                layer._parameters[key].data = weight.detach()
                if isinstance(original, nn.Linear | nn.Conv1d) and weight.dtype == torch.float32 and dtype is not None:
                    layer._parameters[key].data = cast.get(f"{name}.{key}", weight).detach().to(dtype)
                pairs.append((layer._parameters[key], weight))
            self._sum_up(layer, original, sums)
        for name, original in backbone.named_modules():
            layer = self.backbone.get_submodule(name)
            if _projections(original) and id(original.to_q.weight) in sums.joined:
                self._join(layer, original, sums)
            elif type(original) is FeedForward:
                SummingFeedForward.change(layer)
            elif type(original) is DiTBlock:
                SummingBlock.change(layer)
        self._copies = [
            (copied.detach(), weight.detach()) for copied, weight in pairs if copied.data_ptr() != weight.data_ptr()
        ]

    def _sum_up(self, layer: Any, original: nn.Module, sums: Sums) -> None:
        """Gradients of the layer's own weights go to their sums."""
        weights = _own_weights(original)
        totals = {name: sums.by_id[id(weight)] for name, weight in weights.items() if id(weight) in sums.by_id}
        self._leaves += [layer._parameters[name] for name in totals]
        if type(layer) is nn.Linear and totals and len(totals) == len(weights):
            SummingLinear.change(layer, totals["weight"], totals.get("bias"))
            self._ids[totals["weight"].data_ptr()] = [id(weight) for weight in weights.values()]
            return
        for name, total in totals.items():
            layer._parameters[name].register_post_accumulate_grad_hook(partial(add_and_free, total))
            self._ids[total.data_ptr()] = [id(weights[name])]

    def _join(self, attention: Any, original: Any, sums: Sums) -> None:
        """Fused QKV projection."""
        weights, biases = _projections(original)
        of_weight, of_bias = sums.joined[id(weights[0])], sums.joined[id(biases[0])]
        SummingAttention.change(attention, of_weight, of_bias)
        self._leaves += [attention.weight, attention.bias]
        self._ids[of_weight.data_ptr()] = list(map(id, [*weights, *biases]))

    def follow(self) -> None:
        """Cast the backbone's weights anew."""
        if self._copies:
            torch._foreach_copy_([copied for copied, _ in self._copies], [weight for _, weight in self._copies])

    def differentiate(self, run: Rerun, leaves: Sequence[Any], cotangent: Tensor) -> Sequence[Tensor | None]:
        """Gradients of <run(leaves), cotangent> for the leaves that have one; `run` computes with the stand-in."""
        SUMMED.clear()
        with torch.enable_grad():
            v = run(leaves)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(v, cotangent, inputs=[*wanted, *self._leaves])
        self.touched.update(key for total in SUMMED for key in self._ids[total])
        gradients = [leaf.grad for leaf in wanted]
        for leaf in wanted:
            leaf.grad = None
        return gradients


def _own_weights(layer: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in layer._parameters.items() if weight is not None}


class _GradientGraph:
    """A gradient as one CUDA graph, captured for leaves like these after it has run at some."""

    def __init__(
        self, gradient: Callable[..., Sequence[Tensor | None]], leaves: Sequence[Any], cotangent: Tensor, pool: Any
    ) -> None:
        self._leaves = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        self._cotangent = cotangent.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._gradients = gradient(self._leaves, self._cotangent)
        held = [*self._leaves, self._cotangent, *self._gradients]
        self.bytes = sum(value.nbytes for value in held if isinstance(value, Tensor))

    def __call__(self, leaves: Sequence[Any], cotangent: Tensor) -> Sequence[Tensor | None]:
        with torch.no_grad():
            for static, value in zip((*self._leaves, self._cotangent), (*leaves, cotangent), strict=True):
                if isinstance(static, Tensor):
                    static.copy_(value)
        self._graph.replay()
        return [None if value is None else value.clone() for value in self._gradients]

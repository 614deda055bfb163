"""Speed on a GPU: repeated blocks compiled, and velocities, or their gradients, replayed as one CUDA graph each.

`compile_blocks` compiles one block of the backbone, and the others reuse its code (regional compilation, as diffusers'
`compile_repeated_blocks`): seconds where the whole model takes minutes. The first shape is compiled as it is, the
second makes lengths symbolic, and no further one compiles anything.

`FastVelocity` is what `CFM.velocity` calls where there are no gradients. Its `Twin` holds the weights in the dtype that
autocast would cast them to, cast once a solve and not once a step, with LoRA merged, and out of reach of whoever
exchanges the policy's own. A shape is captured as a CUDA graph when it first comes, which costs about three velocities;
the rest of the solve waits for no launch. Nothing is padded: each shape has its own graph.

`GradientGraphs` does the same for a velocity that runs again in backward() and its gradient: with compiled blocks
the processor takes longer to launch them than a GPU to run them. Here, too, weights are cast once, and each gradient of
one is added to a float32 sum and freed where it arises. A graph is captured when a shape has come more than PATIENCE
times, in a solve of many steps or in many solves; what the largest needs stays reserved.

All compute what the plain backbone computes, to rounding (tests/test_fast.py).
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from rlhf_mel.nn import ConvPositionEmbedding, FeedForward, Rope, SelfAttention, modules_of, weights_of
from rlhf_mel.policy import lora_layers
from rlhf_mel.solvers import Rerun, Weights, differentiate

GRAPHS_BYTES = 2**30
"""What graphs' inputs and outputs may take; then shapes not used for longest go. The rest they share, a pool of it."""

PATIENCE = 8
"""Gradients of a shape before it is captured: its memory is reserved from then on."""

RECOMPILE_LIMIT = 64
"""Variants of a block that PyTorch may compile before it gives up: gradients, dtype, lengths, LoRA, autocast."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Rope]
"""x, known mel, text embedding, time, mask, rotary angles: of a backbone's `velocity`."""


def compile_blocks(backbone: nn.Module) -> None:
    """Compile the repeated blocks of `backbone` in place; the state_dict stays.

    Where they have gradients, kernels are chosen by timing: for sums over frames, whose number is then unknown, the
    compiler's own choice takes three times as long.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    trained = any(weight.requires_grad for weight in backbone.parameters())
    for part in _compiled_parts(backbone):
        part.compile(options={"max_autotune_pointwise": trained})


def _compiled_parts(backbone: nn.Module) -> Iterator[nn.Module]:
    for blocks in backbone.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:  # a layer of UNetT is a list of its parts
                yield from (part for part in block if part is not None) if isinstance(block, nn.ModuleList) else [block]


class FastVelocity:
    """`backbone.velocity` without gradients, for a backbone in eval mode; see the top of this file.

    cuda_graphs: False for a backbone that cannot be captured, since it waits for the device.
    """

    def __init__(self, *, compiled: bool = True, cuda_graphs: bool = True) -> None:
        self._options = {"compiled": compiled, "cuda_graphs": cuda_graphs}
        self.gradients = GradientGraphs() if cuda_graphs else None
        self._twins: dict[Any, Twin] = {}
        self._graphs = _Kept()
        self._text: Callable[[], Tensor | None] = lambda: None
        self._adapted: list[Any] = []

    def __call__(
        self, backbone: nn.Module, x: Tensor, known: Tensor, text: Tensor, t: Tensor, mask: Tensor | None, rope: Rope
    ) -> Tensor:
        """Velocity [B, T, M] in the twin's dtype; arguments as of the backbone's own `velocity`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        inputs = (x.to(dtype), known.to(dtype), text.to(dtype), t, mask, rope)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            twin = self._twin(backbone, dtype, text)
            if device == "cuda" and self._options["cuda_graphs"]:
                return self._graph(twin, inputs)(inputs)
            return twin.velocity(inputs)

    def _twin(self, backbone: nn.Module, dtype: torch.dtype, text: Tensor) -> Twin:
        """The twin in `dtype` with the weights that the backbone has now; another one where LoRA is switched off."""
        if self._text() is not text:
            self._adapted, self._text = lora_layers(backbone), weakref.ref(text)
        key = dtype, *((layer.disable_adapters, layer.merged) for layer in self._adapted)
        twin = self._twins.get(key)
        if twin is None or not twin.is_of(backbone, text):
            self._graphs.drop(lambda known: known[0] is twin)
            twin = self._twins[key] = Twin(backbone, dtype, compiled=self._options["compiled"])
        twin.follow(text)
        return twin

    def _graph(self, twin: Twin, inputs: Inputs) -> _Graph:
        key = (twin, *(None if value is None else value.shape for value in tree_leaves(inputs)))
        return self._graphs.get(key) or self._graphs.keep(key, _Graph(twin.velocity, inputs, self._graphs.pool))

    def __deepcopy__(self, memo: dict[int, Any]) -> FastVelocity:
        """For the copy of a policy: the same options; its twins and graphs are made when they are needed."""
        return FastVelocity(**self._options)

    def __reduce__(self) -> Any:
        return _with_options, (self._options,)


def _with_options(options: dict[str, bool]) -> FastVelocity:
    return FastVelocity(**options)


class Twin:
    """A frozen copy of a backbone in `dtype`, LoRA merged into its weights, that follows the original's."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype, *, compiled: bool) -> None:
        self._backbone = backbone
        self._structure = _structure(backbone)
        self._adapted = _named_lora_layers(backbone)
        self._weights = list(backbone.parameters())
        twin: Any = copy.deepcopy(backbone)
        for name in self._adapted:
            twin.set_submodule(name, twin.get_submodule(name).get_base_layer())
        self._twin = twin.to(dtype).eval().requires_grad_(False)
        for module in list(twin.modules()):
            if type(module) in FASTER:
                FASTER[type(module)].change(module)
        self._packed: list[Any] = [module for module in twin.modules() if isinstance(module, _PackedConvolutions)]
        self._plain = [(weight, self._original(name)) for name, weight in twin.named_parameters()]
        if compiled:
            compile_blocks(twin)
        self._seen: Any = None
        self._text: Callable[[], Tensor | None] = lambda: None

    def _original(self, name: str) -> Tensor | Callable[[], Tensor]:
        """What the weight `name` of the twin follows: a weight, or what merges LoRA into one."""
        owner, _, own = name.rpartition(".")
        layer = self._adapted.get(owner)
        if layer is None:
            return self._backbone.get_parameter(name)
        return lambda: merged_weight(layer) if own == "weight" else getattr(layer.get_base_layer(), own)

    def is_of(self, backbone: nn.Module, text: Tensor) -> bool:
        """Whether it still mirrors this backbone: looked up once a solve, `text` being made once a solve."""
        if self._text() is text:
            return self._backbone is backbone
        return self._backbone is backbone and self._structure == _structure(backbone)

    def velocity(self, inputs: Inputs) -> Tensor:
        *values, mask, rope = inputs
        return self._twin.velocity(*values, mask=mask, rope=rope)

    def follow(self, text: Tensor) -> None:
        """Copy the original's weights, in the first velocity of a solve, and where they are exchanged between two.

        Not only where a weight's version says so: fused optimizers and writing to `.data` leave it as it was.
        """
        seen = [(weight.data_ptr(), weight._version) for weight in self._weights]
        if self._text() is text and seen == self._seen:
            return
        originals = [original if isinstance(original, Tensor) else original() for _, original in self._plain]
        torch._foreach_copy_([weight for weight, _ in self._plain], originals)
        for module in self._packed:
            module.pack()
        self._seen, self._text = seen, weakref.ref(text)


def _named_lora_layers(backbone: nn.Module) -> dict[str, Any]:
    adapted = {id(layer) for layer in lora_layers(backbone)}
    return {name: module for name, module in backbone.named_modules() if id(module) in adapted}


def _structure(backbone: nn.Module) -> Any:
    """What makes a twin useless when it changes: the parameters by identity, and their device."""
    return [(id(weight), weight.device) for weight in weights_of(backbone)]


def merged_weight(layer: Any) -> Tensor:
    """The weight of a peft layer with its active adapters merged into it, if they are enabled."""
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if any(adapter in layer.lora_variant for adapter in adapters):  # DoRA and its like: more than a sum
        merged = copy.deepcopy(layer)
        merged.merge()
        return merged.get_base_layer().weight
    return sum((layer.get_delta_weight(adapter) for adapter in adapters), start=weight)


class _FusedProjections(SelfAttention):
    """Queries, keys and values by one product; the weights are parts of one."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def change(module: SelfAttention) -> None:
        for name in ("weight", "bias"):
            parts = [getattr(projection, name) for projection in (module.to_q, module.to_k, module.to_v)]
            whole = torch.cat([part.detach() for part in parts])
            for part, own in zip(parts, whole.chunk(3), strict=True):
                part.data = own
            module.register_buffer(name, whole, persistent=False)
        module.__class__ = _FusedProjections

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, self.weight, self.bias).chunk(3, dim=-1)


class _FusedGELU(FeedForward):
    """GELU in the product before it."""

    @staticmethod
    def change(module: FeedForward) -> None:
        module.__class__ = _FusedGELU

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.ff
        (linear, _), _, project_out = layers
        return project_out(linear_gelu(x, linear.weight, linear.bias))


class _PackedConvolutions(ConvPositionEmbedding):
    """Weights laid out for the kernel once a solve."""

    @staticmethod
    def change(module: ConvPositionEmbedding) -> None:
        weight = next(module.parameters())
        if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
            return
        from rlhf_mel import kernels

        convolutions = [layer for layer in module.conv1d if isinstance(layer, nn.Conv1d)]
        if all(map(kernels.takes, convolutions)):
            for convolution in convolutions:
                convolution.register_buffer("packed", kernels.packed(convolution.weight), persistent=False)
            module.__class__ = _PackedConvolutions

    def pack(self) -> None:
        layers: Any = self.conv1d
        for convolution in (layer for layer in layers if isinstance(layer, nn.Conv1d)):
            buffer: Any = convolution.packed
            buffer.copy_(convolution.weight.permute(2, 1, 0))

    def convolve(self, convolution: Any, x: Tensor) -> Tensor:
        from rlhf_mel import kernels

        return kernels.convolved(x, convolution.packed, convolution.bias)


@torch.library.custom_op(
    "rlhf_mel::linear_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor"
)
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), by tanh. An operator of its own, for the compiler would take product and GELU apart."""
    if x.is_cuda:
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)  # there by tanh
        return flat.view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


FASTER: Mapping[type[nn.Module], Any] = {
    SelfAttention: _FusedProjections,
    FeedForward: _FusedGELU,
    ConvPositionEmbedding: _PackedConvolutions,
}
"""What layers of a twin become."""


class _Kept:
    """Graphs by what they were captured for; those not used for longest go when there are too many. One memory pool."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Any, Any] = OrderedDict()
        self._pool: Any = None

    @property
    def pool(self) -> Any:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return self._pool

    def get(self, key: Any) -> Any:
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def keep(self, key: Any, graph: Any) -> Any:
        while self._graphs and sum(kept.bytes for kept in self._graphs.values()) + graph.bytes > GRAPHS_BYTES:
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        return graph

    def drop(self, outdated: Callable[[Any], bool]) -> None:
        for key in [key for key in self._graphs if outdated(key)]:
            del self._graphs[key]


class _Graph:
    """A function of tensors as one CUDA graph, captured at `inputs` and replayed at others of their shapes.

    Whatever the function reads must be among the inputs, or live as long as the graph.
    """

    def __init__(self, function: Callable[[Inputs], Tensor], inputs: Inputs, pool: Any) -> None:
        self._inputs: Any = tree_map(lambda value: None if value is None else value.clone(), inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets cuBLAS and cuDNN allocate what they keep
            function(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(self._inputs)
        self.bytes = sum(value.nbytes for value in tree_leaves((self._inputs, self._output)) if value is not None)

    def __call__(self, inputs: Inputs) -> Tensor:
        for static, value in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            if value is not None:
                static.copy_(value)
        self._graph.replay()
        return self._output.clone()  # another graph of the pool may write there


class GradientGraphs:
    """`solvers.differentiate` of one backbone in eval mode, from graphs; see the top of this file."""

    def __init__(self) -> None:
        self._graphs = _Kept()
        self._uses: Counter[Any] = Counter()
        self._weights: Any = None
        self._sums: dict[int, Tensor] = {}
        self._touched: set[int] = set()
        self._casts: dict[torch.dtype, _Casts] = {}
        self._borrower: Weights | None = None
        self._adapted: list[Any] = []

    def __call__(
        self, backbone: nn.Module, run: Rerun, leaves: Sequence[Any], weights: Weights, cotangent: Tensor
    ) -> Sequence[Tensor | None]:
        """Arguments and value of `differentiate`."""
        if cotangent.device.type != "cuda":
            return differentiate(run, leaves, weights, cotangent)
        weights.begin()
        if not (self._borrower is weights and weights.lender is self):
            self._follow(backbone, weights)
            self._lend_to(weights)
        casts = self._cast(backbone, run.autocast.dtype)
        # the first step's x has no gradient, and would be a signature of its own
        asked, leaves = leaves[0].requires_grad, [leaves[0].detach().requires_grad_(), *leaves[1:]]
        key = run.autocast, *map(_signature, leaves), *map(_adapter_state, self._adapted)
        gradient: Any = self._graphs.get(key)
        if gradient is None:
            gradient = SummedGradient(backbone, run, self._sums, casts)
            self._uses[key] += 1
            if self._uses[key] > PATIENCE:
                del self._uses[key]
                gradient = self._graphs.keep(key, _GradientGraph(gradient, leaves, cotangent, self._graphs.pool))
        found = gradient(leaves, cotangent)
        self._touched |= gradient.touched
        return found if asked else found[1:]

    def _follow(self, backbone: nn.Module, weights: Weights) -> None:
        """Drop all if the weights are no longer where the graphs read them."""
        now = [(weight.data_ptr(), weight.requires_grad) for weight in weights_of(backbone)]
        if self._weights == now:
            return
        if self._borrower is not None and self._borrower.lender is self:
            self.hand_over(self._borrower)
        self._graphs, self._uses, self._casts, self._weights = _Kept(), Counter(), {}, now
        self._adapted = lora_layers(backbone)
        self._sums = {id(weight): torch.zeros_like(weight) for weight in weights.parameters}

    def _lend_to(self, weights: Weights) -> None:
        if self._borrower is not None and self._borrower.lender is self:
            self.hand_over(self._borrower)
        torch._foreach_zero_(list(self._sums.values()))
        self._touched = set()
        for casts in self._casts.values():
            casts.refresh()
        self._borrower, weights.lender = weights, self

    def _cast(self, backbone: nn.Module, dtype: torch.dtype | None) -> Mapping[int, Tensor]:
        """What autocast to `dtype` makes of the weights, by id of the weight."""
        if dtype is None:
            return {}
        if dtype not in self._casts:
            self._casts[dtype] = _Casts(backbone, dtype)
        return self._casts[dtype].by_id

    def hand_over(self, weights: Weights) -> None:
        """Add what is summed here to the sums of `weights`, which borrowed it."""
        weights.lender, self._borrower = None, None
        ids = map(id, weights.parameters)
        weights.add([self._sums[key].clone() if key in self._touched else None for key in ids])


def _signature(leaf: Any) -> Any:
    """What a graph is captured for; a leaf that is no tensor is part of it."""
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _adapter_state(layer: Any) -> Any:
    return layer.disable_adapters, layer.merged, *layer.active_adapters


class _Casts:
    """Weights that autocast would cast in every layer, cast once."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        layers = [module for module in modules_of(backbone) if isinstance(module, nn.Linear | nn.Conv1d)]
        weights = {id(weight): weight.detach() for layer in layers for weight in layer.parameters(recurse=False)}
        self._originals = {key: weight for key, weight in weights.items() if weight.dtype == torch.float32}
        self.by_id = {key: weight.to(dtype) for key, weight in self._originals.items()}

    def refresh(self) -> None:
        torch._foreach_copy_(list(self.by_id.values()), list(self._originals.values()))


class _Run(nn.Module):
    """A function that computes with a backbone, as a module, whose weights `functional_call` can exchange."""

    def __init__(self, backbone: nn.Module, run: Callable[[Sequence[Any]], Tensor]) -> None:
        super().__init__()
        self.backbone, self.run = backbone, run

    def forward(self, leaves: Sequence[Any]) -> Tensor:
        return self.run(leaves)


class SummedGradient:
    """`differentiate` that adds the gradients of weights to `sums`, each where it arises; sums and casts by id.

    It computes with leaves of its own in the place of weights, casts or the same memory. Autograd lets the gradient of
    a weight wait for the stream on which it first met the weight: the one that all else runs on, which must not wait
    while another is captured.
    """

    def __init__(
        self,
        backbone: nn.Module,
        run: Callable[[Sequence[Any]], Tensor],
        sums: Mapping[int, Tensor],
        casts: Mapping[int, Tensor],
    ) -> None:
        self._run = _Run(backbone, run)
        self._exchanged: dict[str, Tensor] = {}
        self._trained: list[Tensor] = []
        self.touched: set[int] = set()
        for name, weight in backbone.named_parameters():
            key = id(weight)
            if key in sums or key in casts:
                leaf = nn.Parameter(casts.get(key, weight).detach(), requires_grad=key in sums)
                self._exchanged[f"backbone.{name}"] = leaf
            if key in sums:
                leaf.register_post_accumulate_grad_hook(partial(self._add, key, sums[key]))
                self._trained.append(leaf)

    def _add(self, key: int, total: Tensor, leaf: Any) -> None:
        if leaf.is_cuda and leaf.dtype != total.dtype:
            from rlhf_mel import kernels

            kernels.add_(total, leaf.grad.contiguous())
        else:
            total.add_(leaf.grad)
        leaf.grad = None
        self.touched.add(key)

    def __call__(self, leaves: Sequence[Any], cotangent: Tensor) -> Sequence[Tensor | None]:
        """Gradients of <run(leaves), cotangent> by the leaves that have one."""
        with torch.enable_grad():
            v = functional_call(self._run, self._exchanged, (leaves,), strict=False)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(v, cotangent, inputs=[*wanted, *self._trained])
        found = [leaf.grad for leaf in wanted]
        for leaf in wanted:
            leaf.grad = None
        return found


class _GradientGraph:
    """A gradient as one CUDA graph, captured for leaves like these after it has run at some."""

    def __init__(self, gradient: SummedGradient, leaves: Sequence[Any], cotangent: Tensor, pool: Any) -> None:
        self._leaves = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        self._cotangent = cotangent.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._found = gradient(self._leaves, self._cotangent)
        self.touched = gradient.touched
        held = [*self._leaves, self._cotangent, *self._found]
        self.bytes = sum(value.nbytes for value in held if isinstance(value, Tensor))

    def __call__(self, leaves: Sequence[Any], cotangent: Tensor) -> Sequence[Tensor | None]:
        with torch.no_grad():
            for static, value in zip((*self._leaves, self._cotangent), (*leaves, cotangent), strict=True):
                if isinstance(static, Tensor):
                    static.copy_(value)
        self._graph.replay()
        return [None if value is None else value.clone() for value in self._found]

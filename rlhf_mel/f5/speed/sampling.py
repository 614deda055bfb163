"""Speed on a GPU: repeated blocks compiled, and a velocity replayed as one CUDA graph; gradients are in gradients.py.

`compile_blocks` compiles one block of the backbone, and the others reuse its code (regional compilation, as diffusers'
`compile_repeated_blocks`): seconds where the whole model takes minutes. The first shape is compiled as it is, the
second makes lengths symbolic, and no further one compiles anything.

`FastVelocity` is what `CFM.velocity` calls where there are no gradients. Its `Twin` holds the weights in the dtype that
autocast would cast them to, cast once a solve and not once a step, with LoRA merged, and out of reach of whoever
exchanges the policy's own. A shape is captured as a CUDA graph when it first comes, which costs about three velocities;
the rest of the solve waits for no launch. Nothing is padded: each shape has its own graph.

All compute what the plain backbone computes, to rounding (tests/f5/speed).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from rlhf_mel.f5.layers import ConvPositionEmbedding, FeedForward, Rope, SelfAttention
from rlhf_mel.f5.speed.gradients import GradientGraphs, KeptGraphs
from rlhf_mel.f5.speed.weight_gradients import join_projections
from rlhf_mel.flow.lora import lora_layers
from rlhf_mel.flow.recompute import Rerun, Weights, differentiate
from rlhf_mel.modules import weights_of

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

    Args:
        cuda_graphs: False for a backbone that cannot be captured, since it waits for the device.
    """

    def __init__(self, *, compiled: bool = True, cuda_graphs: bool = True) -> None:
        self._options = {"compiled": compiled, "cuda_graphs": cuda_graphs}
        self._gradients = GradientGraphs(compile_blocks if compiled else lambda backbone: None) if cuda_graphs else None
        self._twins: dict[Any, Twin] = {}
        self._graphs = KeptGraphs()
        self._text: Callable[[], Tensor | None] = lambda: None
        self._adapted: list[Any] = []

    @property
    def has_gradients(self) -> bool:
        """Whether gradients are captured too."""
        return self._gradients is not None

    def __call__(
        self,
        backbone: nn.Module,
        x: Float[Tensor, "b n m"],
        known: Float[Tensor, "b n m"],
        text: Float[Tensor, "b _ d"],
        t: Float[Tensor, " ..."],
        mask: Bool[Tensor, "b n"] | None,
        rope: Rope,
    ) -> Float[Tensor, "b n m"]:
        """Velocity in the twin's dtype; arguments as of the backbone's own `velocity`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        inputs = (x.to(dtype), known.to(dtype), text.to(dtype), t, mask, rope)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            twin = self._twin(backbone, dtype, text)
            if device == "cuda" and self._options["cuda_graphs"]:
                return self._graph(twin, inputs)(inputs)
            return twin.velocity(inputs)

    def differentiate(
        self, backbone: nn.Module, of: Callable[..., Any], run: Rerun, leaves: Any, weights: Weights, cotangent: Tensor
    ) -> Sequence[Tensor | None]:
        """`recompute.differentiate`, by graphs if there are any; `of` as of GradientGraphs."""
        if self._gradients is None:
            return differentiate(run, leaves, weights, cotangent)
        return self._gradients(backbone, of, run, leaves, weights, cotangent, self._cast)

    def _cast(self, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
        """The backbone's weights in `dtype`, by name, where a twin has them as they are: without LoRA."""
        twin = self._twins.get((dtype,))
        return {} if twin is None else twin.weights

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
        graph: _Graph | None = self._graphs.get(key)
        if graph is None:
            graph = _Graph(twin.velocity, inputs, self._graphs.pool)
            self._graphs.keep(key, graph)
        return graph

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
        self.weights = dict(twin.named_parameters())
        self._plain = [(weight, self._original(name)) for name, weight in self.weights.items()]
        if compiled:
            compile_blocks(twin)
        self._seen: Any = None
        self._text: Callable[[], Tensor | None] = lambda: None

    def _original(self, name: str) -> Tensor | Callable[[], Tensor]:
        """What the weight `name` of the twin follows: a weight, or what merges LoRA into one."""
        owner, _, key = name.rpartition(".")
        layer = self._adapted.get(owner)
        if layer is None:
            return self._backbone.get_parameter(name)
        return lambda: merged_weight(layer) if key == "weight" else getattr(layer.get_base_layer(), key)

    def is_of(self, backbone: nn.Module, text: Tensor) -> bool:
        """Whether it still mirrors this backbone: looked up once a solve, `text` being made once a solve."""
        if self._text() is text:
            return self._backbone is backbone
        return self._backbone is backbone and self._structure == _structure(backbone)

    def velocity(self, inputs: Inputs) -> Float[Tensor, "b n m"]:
        """The backbone's velocity by these weights."""
        *values, mask, rope = inputs
        velocity: Tensor = self._twin.velocity(*values, mask=mask, rope=rope)
        return velocity

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


def merged_weight(layer: Any) -> Float[Tensor, "o i"]:
    """The weight of a peft layer with its active adapters merged into it, if they are enabled."""
    weight: Tensor = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged:
        return weight
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if any(adapter in layer.lora_variant for adapter in adapters):  # DoRA and its like: more than a sum
        merged = copy.deepcopy(layer)
        merged.merge()
        merged_with_variant: Tensor = merged.get_base_layer().weight
        return merged_with_variant
    deltas: Iterator[Tensor] = (layer.get_delta_weight(adapter) for adapter in adapters)
    return sum(deltas, start=weight)


class _FusedProjections(SelfAttention):
    """Fused QKV projection; the weights are parts of one."""

    weight: Tensor
    bias: Tensor

    @staticmethod
    def change(module: SelfAttention) -> None:
        join_projections(module)
        module.__class__ = _FusedProjections

    @override
    def project(self, x: Tensor) -> Sequence[Tensor]:
        return F.linear(x, self.weight, self.bias).chunk(3, dim=-1)


class _FusedGELU(FeedForward):
    """GELU in the product before it."""

    @staticmethod
    def change(module: FeedForward) -> None:
        module.__class__ = _FusedGELU

    @override
    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.ff
        (linear, _), _, project_out = layers
        out: Tensor = project_out(linear_gelu(x, linear.weight, linear.bias))
        return out


class _PackedConvolutions(ConvPositionEmbedding):
    """Weights laid out for the kernel once a solve."""

    @staticmethod
    def change(module: ConvPositionEmbedding) -> None:
        weight = next(module.parameters())
        if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16):
            return
        from rlhf_mel.f5 import kernels

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

    @override
    def convolve(self, convolution: Any, x: Tensor) -> Tensor:
        from rlhf_mel.f5 import kernels

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
"""Fast replacement for each layer type."""


class _Graph:
    """A function of tensors as one CUDA graph, captured at `inputs` and replayed at others of their shapes.

    Whatever the function reads must be among the inputs, or live as long as the graph.
    """

    def __init__(self, function: Callable[[Inputs], Tensor], inputs: Inputs, pool: Any) -> None:
        self._inputs: Any = tree_map(lambda value: None if value is None else value.clone(), inputs)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # PyTorch's constructor has no types
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

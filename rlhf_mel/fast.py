"""Speed on a GPU: repeated blocks compiled, and a velocity without gradients replayed as one CUDA graph.

`compile_blocks` compiles one block of the backbone, and the others reuse its code (regional compilation, as diffusers'
`compile_repeated_blocks`): seconds where the whole model takes minutes. The first shape is compiled as it is, the
second makes lengths symbolic, and no further one compiles anything.

`FastVelocity` is what `CFM.velocity` calls where there are no gradients. Its `Twin` holds the weights in the dtype that
autocast would cast them to, cast once a solve and not once a step, with LoRA merged, and out of reach of whoever
exchanges the policy's own. A shape is captured as a CUDA graph when it first comes, which costs about three velocities;
the rest of the solve waits for no launch. Nothing is padded: each shape has its own graph.

Both compute what the plain backbone computes, to rounding (tests/test_fast.py).
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_mel.nn import ConvPositionEmbedding, FeedForward, SelfAttention
from rlhf_mel.policy import lora_layers

GRAPHS_KEPT = 64
"""Shapes whose graphs are kept, those used last; all share one pool of memory."""

RECOMPILE_LIMIT = 64
"""Variants of a block that PyTorch may compile before it gives up: gradients, dtype, lengths, LoRA, autocast."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""x, known mel, text embedding, time, mask: of a backbone's `velocity`."""


def compile_blocks(backbone: nn.Module) -> None:
    """Compile the repeated blocks of `backbone` in place; the state_dict stays."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for part in _compiled_parts(backbone):
        part.compile()


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
        self._twins: dict[Any, Twin] = {}
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: Any = None
        self._text: Callable[[], Tensor | None] = lambda: None
        self._adapted: list[Any] = []

    def __call__(
        self, backbone: nn.Module, x: Tensor, known: Tensor, text: Tensor, t: Tensor, mask: Tensor | None, rope: Any
    ) -> Tensor:
        """Velocity [B, T, M] in the twin's dtype; arguments as of the backbone's own `velocity`."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        inputs = (x.to(dtype), known.to(dtype), text.to(dtype), t, mask)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            twin = self._twin(backbone, dtype, text)
            if device == "cuda" and self._options["cuda_graphs"]:
                return self._graph(twin, inputs, rope)(inputs)
            return twin.velocity(inputs, rope)

    def _twin(self, backbone: nn.Module, dtype: torch.dtype, text: Tensor) -> Twin:
        """The twin in `dtype` with the weights that the backbone has now; another one where LoRA is switched off."""
        if self._text() is not text:
            self._adapted, self._text = lora_layers(backbone), weakref.ref(text)
        key = dtype, *((layer.disable_adapters, layer.merged) for layer in self._adapted)
        twin = self._twins.get(key)
        if twin is None or not twin.is_of(backbone, text):
            for outdated in [known for known in self._graphs if known[0] is twin]:
                del self._graphs[outdated]
            twin = self._twins[key] = Twin(backbone, dtype, compiled=self._options["compiled"])
        twin.follow(text)
        return twin

    def _graph(self, twin: Twin, inputs: Inputs, rope: Any) -> _Graph:
        key = (twin, *(None if value is None else value.shape for value in inputs))
        graph = self._graphs.pop(key, None)
        if graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = _Graph(lambda static: twin.velocity(static, rope), inputs, self._pool)
            while len(self._graphs) >= GRAPHS_KEPT:
                self._graphs.popitem(last=False)
        self._graphs[key] = graph
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
        self._plain = [(weight, self._original(name)) for name, weight in twin.named_parameters()]
        self._derived = [module for module in twin.modules() if isinstance(module, _BlockedConvolutions)]
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

    def velocity(self, inputs: Inputs, rope: Any) -> Tensor:
        *values, mask = inputs
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
        for module in self._derived:
            module.follow()
        self._seen, self._text = seen, weakref.ref(text)


def _named_lora_layers(backbone: nn.Module) -> dict[str, Any]:
    adapted = {id(layer) for layer in lora_layers(backbone)}
    return {name: module for name, module in backbone.named_modules() if id(module) in adapted}


def _structure(backbone: nn.Module) -> Any:
    """What makes a twin useless when it changes: the parameters by identity, and their device."""
    return [(id(weight), weight.device) for weight in backbone.parameters()]


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
        project_in, _, project_out = self.ff
        return project_out(linear_gelu(x, project_in[0].weight, project_in[0].bias))


@torch.library.custom_op("rlhf_mel::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b), by tanh. An operator of its own, for the compiler would take product and GELU apart."""
    if x.is_cuda:
        flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)  # there by tanh
        return flat.view(*x.shape[:-1], -1)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _BlockedConvolutions(ConvPositionEmbedding):
    """Convolution over time as products of matrices: of BLOCK frames at once, with the kernel's Toeplitz matrices.

    cuDNN takes the groups one after another, and 4 to 10 times as long.
    """

    BLOCK = 16

    @staticmethod
    def change(module: ConvPositionEmbedding) -> None:
        module.__class__ = _BlockedConvolutions
        for name, convolution in module._convolutions():
            module.register_buffer(name, toeplitz(convolution, _BlockedConvolutions.BLOCK), persistent=False)

    def _convolutions(self) -> Iterator[tuple[str, nn.Conv1d]]:
        for index in (0, 2):
            yield f"toeplitz_{index}", self.conv1d[index]

    def follow(self) -> None:
        """To be called when the weights have changed."""
        for name, convolution in self._convolutions():
            getattr(self, name).copy_(toeplitz(convolution, self.BLOCK))

    def convolve(self, convolution: nn.Conv1d, x: Tensor) -> Tensor:
        (name,) = (name for name, own in self._convolutions() if own is convolution)
        return blocked_convolution(convolution, getattr(self, name), x)


def toeplitz(convolution: nn.Conv1d, block: int) -> Tensor:
    """[groups, parts, block * channels in, block * channels out] of a group: what frames do to frames.

    `block` frames out read block + kernel - 1 frames in: so many `parts` of `block` frames.
    """
    groups, (kernel,) = convolution.groups, convolution.kernel_size
    weight = convolution.weight.detach().unflatten(0, (groups, -1))  # [groups, out, in, kernel]
    parts = -(-(block + kernel - 1) // block)
    frames = torch.arange(parts * block, device=weight.device)
    tap = frames.unsqueeze(1) - torch.arange(block, device=weight.device)
    spread = weight[..., tap.clamp(0, kernel - 1)] * ((tap >= 0) & (tap < kernel))  # [groups, out, in, frame, frame]
    matrices = spread.permute(0, 3, 2, 4, 1).unflatten(1, (parts, block))
    return matrices.reshape(groups, parts, block * weight.shape[2], block * weight.shape[1])


def blocked_convolution(convolution: nn.Conv1d, matrices: Tensor, x: Tensor) -> Tensor:
    """`convolution` over the frames of x [B, T, D], by its `toeplitz` matrices."""
    batch, frames, dim = x.shape
    groups, parts, size, _ = matrices.shape
    block = size // (dim // groups)
    (before,) = convolution.padding
    blocks = -(-frames // block) + parts - 1  # of an item: then none reaches into the next
    padded = F.pad(x, (0, 0, before, blocks * block - frames - before)).view(batch * blocks, block, groups, -1)
    rows = padded.permute(2, 0, 1, 3).reshape(groups, batch * blocks, size)
    count = batch * blocks - (parts - 1)
    out = torch.bmm(rows[:, :count], matrices[:, 0])
    for part in range(1, parts):
        out = torch.baddbmm(out, rows[:, part : part + count], matrices[:, part])
    out = F.pad(out, (0, 0, 0, parts - 1)).view(groups, batch, blocks, block, -1)
    return out.permute(1, 2, 3, 0, 4).reshape(batch, blocks * block, dim)[:, :frames] + convolution.bias


FASTER: Mapping[type[nn.Module], Any] = {
    SelfAttention: _FusedProjections,
    FeedForward: _FusedGELU,
    ConvPositionEmbedding: _BlockedConvolutions,
}
"""What layers of a twin become."""


class _Graph:
    """A function of tensors as one CUDA graph, captured at `inputs` and replayed at others of their shapes."""

    def __init__(self, function: Callable[[Inputs], Tensor], inputs: Inputs, pool: Any) -> None:
        self._inputs: Any = tuple(None if value is None else value.clone() for value in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets cuBLAS and cuDNN allocate what they keep
            function(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = function(self._inputs)

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensor:
        for static, value in zip(self._inputs, inputs, strict=True):
            if value is not None:
                static.copy_(value)
        self._graph.replay()
        return self._output.clone()  # another graph of the pool may write there

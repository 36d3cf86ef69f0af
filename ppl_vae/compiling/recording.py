"""A function of tensors as a graph of tensor operations, recorded while it runs; refused where a graph would lie."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.util
import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_vae import precision
from ppl_vae.compiling.rewriting import rewrite

Outputs = tuple[Tensor, ...]

# Ways in which Python learns the value of a tensor; a graph would hold on to the value of one day.
_READING_METHODS = ("tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__")
_READERS = {getattr(Tensor, name): name for name in _READING_METHODS}
_ATEN = torch.ops.aten
_READING_OPERATIONS = (
    _ATEN._local_scalar_dense.default,
    _ATEN.is_nonzero.default,
    _ATEN.equal.default,
    _ATEN.allclose.default,
)


class NotCompiled(Exception):
    """Why a function cannot be one graph, in words that go on from "because"."""


@dataclass(frozen=True)
class Recording:
    """A function as a graph.

    Attributes:
        graph: takes the inputs, then what was lifted; holds no tensors itself.
        inputs: of the run that was recorded.
        lifted: every tensor that the function reached by itself: parameters, buffers, constants. They are these very
            tensors, so that the graph sees what becomes of them, and writes to them.
        outputs: of that run.
        written: what it made of the state.
    """

    graph: GraphModule
    inputs: tuple[Tensor, ...]
    lifted: list[Tensor]
    outputs: Outputs
    written: list[Tensor]

    @property
    def is_rounded(self) -> bool:
        """Whether some of it is computed to fewer digits than float32 has, as under `torch.autocast`."""
        values = tree_leaves([node.meta.get("val") for node in self.graph.graph.nodes])
        return any(isinstance(value, Tensor) and value.dtype in precision.FEWER_DIGITS for value in values)

    @property
    def text(self) -> str:
        """Everything about the graph: two with the same text compute the same of the same tensors."""
        return f"{self.graph.code}\n{[_described(t) for t in (*self.inputs, *self.lifted)]}"


def recorded(function: Callable[..., Outputs], inputs: tuple[Tensor, ...], state: Sequence[Tensor] = ()) -> Recording:
    """Records `function` on some inputs. Pyro's own checks are off, and its warnings of NaN.

    Random numbers, and the state, are afterwards what they were.

    Raises:
        NotCompiled: when the function reads values, when its shapes depend on them, or when it changes a tensor that
            was there before and does not belong to the state.
    """
    with set_back(inputs, state):
        return _record(function, inputs, state)


def verify(
    function: Callable[..., Outputs], inputs: tuple[Tensor, ...], recording: Recording, state: Sequence[Tensor] = ()
) -> None:
    """Records once more, on the rows of the inputs in reverse order, which must give the same graph.

    Raises:
        NotCompiled: when it does not, or when it holds other numbers.
    """
    again = recorded(function, tuple(map(_reversed, inputs)), state)
    if recording.text != again.text:
        raise NotCompiled("it does not do the same in every run: something in it depends on values, or keeps count")
    for one, other in zip(recording.lifted, again.lifted, strict=True):
        if one is not other and not torch.equal(one, other):
            raise NotCompiled("it makes tensors of numbers that are not torch's, and of other numbers in every run")


def _record(function: Callable[..., Outputs], inputs: tuple[Tensor, ...], state: Sequence[Tensor]) -> Recording:
    outputs: list[Outputs] = []

    def watched(*args: Tensor) -> Outputs:
        with _Values(state), _Reads():
            found = tuple(function(*args))
        outputs.append(tuple(t.detach() for t in found))
        return found

    # The test for NaN that Pyro warns after would read a value, as would a distribution that was made while checks were
    # on, a PyroSample's, say. Without a context each operation makes one of its own, which takes a third of the time.
    with (
        tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))),
        pyro.validation_enabled(False),
        mock.patch.object(pyro.util, "torch_isnan", return_value=False),
        mock.patch.object(torch.distributions.Distribution, "_validate_sample", return_value=None),
    ):
        graph = make_fx(watched)(*inputs)
    written = copies(state)
    lifted = _lift(graph)
    _check_memory(state, (*inputs, *lifted))
    _own_outputs(graph, outputs[0])
    rewrite(graph)
    graph.recompile()
    return Recording(graph, inputs, lifted, outputs[0], written)


class _Reads(TorchFunctionMode):
    """Refuses a program that reads the value of a tensor, but for `item`, which stays a tensor as long as it can."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.item and args[0].is_floating_point():
            return args[0].detach().reshape(())  # Pyro's ELBOs add up their losses as numbers
        if func in _READERS:
            raise NotCompiled(_read_by(_READERS[func]))
        return func(*args, **(kwargs or {}))


class _Values(TorchDispatchMode):
    """Refuses a read that reaches torch by another way, in a shape too, and a write to a tensor that was there before.

    A graph cannot say what becomes of such a tensor afterwards, unless it belongs to the state. The write is refused
    before it is done, so that the eager run that follows finds what it would have found.
    """

    def __init__(self, state: Sequence[Tensor]) -> None:
        super().__init__()
        # References keep an address from being given to another storage.
        self.made = {_storage(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in state}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING_OPERATIONS:
            raise NotCompiled(_read_by(func.overloadpacket.__name__))
        if torch.Tag.dynamic_output_shape in func.tags and not _is_plain_indexing(func, args):
            # At once, for whoever wants but the length of such a tensor leaves no trace in the graph.
            name = func.overloadpacket.__name__
            raise NotCompiled(f"the shape of a tensor in it depends on values ({name})")
        if not all(_storage(tensor) in self.made for tensor in _written(func, args)):
            raise NotCompiled(
                "it changes a tensor that it did not make, as a batch normalisation in training mode does"
            )
        found = func(*args, **(kwargs or {}))
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(found):
            if _storage(tensor) not in given or func is _ATEN.lift_fresh.default:
                self.made[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return found


def _is_plain_indexing(func: Any, args: tuple[Any, ...]) -> bool:
    return func is _ATEN.index.Tensor and all(i.dtype not in (torch.bool, torch.uint8) for i in _tensors(args[1]))


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among the arguments that an operation writes to."""
    if func is _ATEN.native_batch_norm.default and args[5]:  # whose schema does not say so
        return _tensors(args[3:5])
    arguments = zip(func._schema.arguments, args, strict=False)
    return _tensors([value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write])


def _tensors(of: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _read_by(name: str) -> str:
    """The sentence about a read, with the line of the innermost program that is none of torch's."""
    own = (str(Path(torch.__file__).parent), __file__)
    place = next(frame for frame in reversed(traceback.extract_stack()) if not frame.filename.startswith(own))
    file = Path(place.filename).name
    return f"it reads the value of a tensor ({name.strip('_')}) in {place.name} ({file}, line {place.lineno})"


def _lift(graph: GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that a graph holds, and gives them in that order."""
    places: dict[int, Node] = {}
    lifted: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):
            raise NotCompiled("it has a graph within a graph, as functional loops and branches do")
        if id(tensor) not in places:
            with graph.graph.inserting_after(last):
                last = places[id(tensor)] = graph.graph.placeholder(f"lifted_{len(lifted)}")
            last.meta["val"] = tensor.detach().to("meta")  # what it is like, for the graph holds no tensors
            lifted.append(tensor)
        node.replace_all_uses_with(places[id(tensor)])
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    for name in [name for name, _ in (*graph.named_parameters(), *graph.named_buffers())]:
        delattr(graph, name)
    return lifted


def _check_memory(state: Sequence[Tensor], reached: Sequence[Tensor]) -> None:
    """Refuses a write to memory that is reached in two ways: the compiler would order one without knowing the other."""
    written = {id(tensor) for tensor in state}
    places = [_storage(t) for t in (*state, *(t for t in reached if id(t) not in written))]
    if state and any(places.count(_storage(tensor)) > 1 for tensor in state):
        raise NotCompiled("it writes to memory that it reaches in two ways")


def _own_outputs(graph: GraphModule, outputs: Outputs) -> None:
    """Copies an output that lies in the memory of an input, of another output or of itself: who gets it may write."""
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    origins: list[Node] = []
    found: list[Node] = []
    for node, tensor in zip(output.args[0], outputs, strict=True):
        origin = _origin(node)
        if origin.op == "placeholder" or origin in origins or torch._debug_has_internal_overlap(tensor):
            with graph.graph.inserting_before(output):
                node = graph.graph.call_function(
                    _ATEN.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
        origins.append(origin)
        found.append(node)
    output.args = (tuple(found),)


def _origin(node: Any) -> Any:
    """The node that made the memory in which the value of `node` lies."""
    while is_view(node):
        node = node.args[0]
    return node


def is_view(node: Any) -> bool:
    """Whether its value lies in the memory of another's."""
    if node.target is operator.getitem:
        return is_view(node.args[0])
    return _is_operation(node) and any(result.alias_info is not None for result in node.target._schema.returns)


def _is_operation(node: Any) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


@contextmanager
def set_back(inputs: tuple[Tensor, ...], state: Sequence[Tensor]) -> Iterator[None]:
    """Torch's random numbers and the state are set back afterwards.

    Python's random numbers and NumPy's go on, which must make no difference.
    """
    devices = {x.device for x in inputs if x.is_cuda}
    before = copies(state)
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, before, strict=True):
                    tensor.copy_(value)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values that they have now."""
    return [tensor.detach().clone() for tensor in tensors]


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def _reversed(tensor: Tensor) -> Tensor:
    """Its rows in reverse order, in the same layout; as it is where that cannot be."""
    flipped = tensor.flip(0) if tensor.dim() else tensor
    return flipped if flipped.stride() == tensor.stride() else tensor

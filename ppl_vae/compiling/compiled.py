"""A function over a pair, run as one compiled graph; as it is, with a reason, where that cannot be."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pyro.util
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ppl_vae.compiling.ordering import WritesEarly
from ppl_vae.compiling.recording import (
    NotCompiled,
    Outputs,
    Recording,
    copies,
    recorded,
    set_back,
    verify,
)

# A graph costs seconds, an eager run milliseconds: only shapes that keep coming are worth one.
PATIENCE = 100
MOST_SHAPES = 8
# Compiled and eager differ by the order in which numbers are added; anything else would be another function.
TOLERANCE = 1e-3
ROUNDED_TOLERANCE = 1e-2  # where a number in between has the 8 bits of bfloat16

# Programs by the text of their graph, the newest last: what is compiled depends on what was recorded and on nothing
# else, so that a program that was edited is another one, whatever it is called.
_PROGRAMS: OrderedDict[str, Callable[..., Outputs]] = OrderedDict()
MOST_PROGRAMS = 64
# Of those that were verified, the code of what they ran, and what they reached by themselves; single numbers as they
# are, which distributions make anew in each run. The same code of the same tensors need not be looked into again.
_VERIFIED: dict[str, tuple[list[Any], list[ref[Tensor] | Tensor]]] = {}


class Compiled:
    """`function(*tensors)`, compiled for the shapes that come first, and for others that keep coming.

    The first run of a shape records the function under Pyro's handlers to one graph, compiles it, runs the graph with
    the same random numbers, and compares the two. Parameters and buffers are inputs of the graph, by identity: it sees
    what becomes of them, and names in state dicts stay as they are. Random numbers are torch's own, those of an eager
    run with the same seed.

    Where this cannot be (the function reads values, changes buffers, is not the same in every run, or there is no
    compiler), the result is None, with one warning that names the cause: then it is for the caller to run eagerly.

    Args:
        function: from tensors to tensors; what else it uses, it reaches by itself. Gradients are part of it: the graph
            runs without them.
        what: it is, for the warning: "the training step".
        verified: whether the same was recorded before of other tensors, so that a graph that is known can be trusted.
        state: gives the tensors that the function may write to. It must be their values that count, and not which
            tensors they are.
        programs: that the function runs, where a later call is to trust what was verified of the same code. An edited
            program is other code.

    Attributes:
        cause: why it is not compiled, or None.

    Example:
        >>> size = Compiled(lambda x: (x if x.sum() > 0 else -x,), what="the size")
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     size(torch.ones(2)) is None      # a graph of this run would be wrong for −1
        True
        >>> len(said), size.cause.split(" in ")[0]
        (1, 'it reads the value of a tensor (bool)')
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        *,
        what: str,
        verified: bool = False,
        state: Callable[[], Sequence[Tensor]] = tuple,
        programs: Sequence[Any] = (),
    ) -> None:
        self.function, self.what, self.verified, self.state = function, what, verified, state
        self.code = [_code(program) for program in programs]
        self.cause: str | None = None
        self._runs: dict[Any, Callable[..., Outputs]] = {}
        self._seen: Counter[Any] = Counter()

    def __call__(self, *inputs: Tensor) -> Outputs | None:
        if self.cause is not None:
            return None
        rounded = _rounded_to(inputs[0].device.type)
        kind = (torch.get_num_threads(), rounded, *((x.shape, x.stride(), x.dtype, x.device) for x in inputs))
        if kind not in self._runs and not self._compile(kind, inputs):
            return None
        with torch.no_grad() if rounded is None else _as_recorded(inputs):
            return self._runs[kind](*inputs)

    def give_up(self, cause: str) -> None:
        """Runs eagerly from now on, and says why."""
        self.cause = cause
        warnings.warn(
            f"{self.what[0].upper()}{self.what[1:]} is not compiled, because {cause}. It runs eagerly, to the same "
            "results. Change that, or leave out compile=True.",
            stacklevel=2,
        )

    def _compile(self, kind: Any, inputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a graph for this kind of inputs now."""
        self._seen[kind] += 1
        if self._runs and self._seen[kind] < PATIENCE:
            if len(self._seen) > MOST_SHAPES:
                self.give_up(f"its arguments come in more than {MOST_SHAPES} shapes")
            return False
        state = pyro.util.get_rng_state()  # of Python and NumPy too, of which the runs below may have taken some
        try:
            self._runs[kind] = _run(self.function, inputs, self.state(), self.verified, self.code)
        except NotCompiled as reason:
            self.give_up(str(reason))
            return False
        finally:
            pyro.util.set_rng_state(state)
        return True


def _run(
    function: Callable[..., Outputs],
    inputs: tuple[Tensor, ...],
    state: Sequence[Tensor],
    verified: bool,
    code: list[Any],
) -> Callable[..., Outputs]:
    """The function as a compiled graph with the tensors that it reaches by itself."""
    try:
        recording = recorded(function, inputs, state)
        verified = _is_known(recording, code) or (verified and _key(recording) in _PROGRAMS)
        if not verified:
            verify(function, inputs, recording, state)
    except NotCompiled:
        raise
    except Exception as error:  # what a program may raise when it is recorded has no common type
        raise NotCompiled(f"recording it failed ({_first_line(error)})") from error
    program, lifted = _program(recording, state), recording.lifted

    def run(*inputs: Tensor) -> Outputs:
        return program(*inputs, *lifted)

    tolerance = ROUNDED_TOLERANCE if recording.is_rounded else TOLERANCE
    if not verified and not _close(_found(run, inputs, state), (*recording.outputs, *recording.written), tolerance):
        raise NotCompiled(
            "its graph gives other numbers than the program, as when random numbers are set back inside of it, or "
            "are a Bernoulli's in float64"
        )
    _VERIFIED[_key(recording)] = code, [ref(tensor) if tensor.numel() > 1 else tensor for tensor in lifted]
    return run


def _is_known(recording: Recording, code: list[Any]) -> bool:
    """Whether this very graph, of this code and of these very tensors, was verified before, and is compiled."""
    if not code or _key(recording) not in _PROGRAMS or _key(recording) not in _VERIFIED:
        return False
    known, reached = _VERIFIED[_key(recording)]
    return known == code and all(
        torch.equal(one, tensor) if isinstance(one, Tensor) else one() is tensor
        for one, tensor in zip(reached, recording.lifted, strict=True)
    )


def _code(program: Any) -> Any:
    """What a program does, of a module or of a method too; something that equals nothing where that cannot be seen."""
    program = getattr(program, "forward", program)
    return getattr(getattr(program, "__func__", program), "__code__", object())


def _found(run: Callable[..., Outputs], inputs: tuple[Tensor, ...], state: Sequence[Tensor]) -> Outputs:
    """What it gives, and what it makes of the state."""
    with _as_recorded(inputs), set_back(inputs, state):
        return (*run(*inputs), *copies(state))


def _key(recording: Recording) -> str:
    return f"{torch.get_num_threads()} {torch.get_default_dtype()} {recording.text}"


def _program(recording: Recording, state: Sequence[Tensor]) -> Callable[..., Outputs]:
    key, inputs = _key(recording), recording.inputs
    if key not in _PROGRAMS:
        # Random numbers as eager torch draws them; as many threads as torch has, not as the machine; the vector
        # instructions that the processor says it has, without ten seconds of compiling to see whether they run.
        options: dict[str, Any] = {
            "fallback_random": True,
            "cpp.vec_isa_ok": True,
            "cpp.threads": torch.get_num_threads(),
            "emulate_precision_casts": recording.is_rounded,  # rounds where eager torch does
        }
        if state:
            options |= {"post_grad_custom_post_pass": WritesEarly(), "reorder_for_locality": False}
        if inputs[0].is_cuda:
            options["triton.cudagraphs"] = True
        try:
            with _as_recorded(inputs), set_back(inputs, state):
                # The compiler behind torch.compile; what comes before it there has been done, and would cost half a
                # millisecond in every call.
                program = torch._inductor.compile(
                    recording.graph, _as_shapes([*inputs, *recording.lifted]), options=options
                )
                program(*inputs, *recording.lifted)
        except Exception as error:  # the compiler's own, of many types
            raise NotCompiled(f"the compiler refused it ({_first_line(error)})") from error
        _PROGRAMS[key] = program
        if len(_PROGRAMS) > MOST_PROGRAMS:
            oldest, _ = _PROGRAMS.popitem(last=False)
            _VERIFIED.pop(oldest, None)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key]


def _rounded_to(device: str) -> torch.dtype | None:
    """What `torch.autocast` has products of matrices rounded to there."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def _as_recorded(inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Gradients are operations of the graph already, and so is what autocast rounds."""
    with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        yield


def _as_shapes(tensors: list[Tensor]) -> list[Any]:
    """Tensors without values, in the form in which the compiler finds on the disk what it has compiled before."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]


def _close(found: Outputs, expected: Outputs, tolerance: float) -> bool:
    """Equal to rounding, which is that of the largest of them: a gradient may be what is left of large numbers."""
    pairs = [
        (one.double().nan_to_num(), other.double().nan_to_num()) for one, other in zip(found, expected, strict=True)
    ]
    rounding = 1e-3 * tolerance * max((float(other.norm()) for _, other in pairs), default=0.0)
    return all((one - other).norm() <= tolerance * other.norm() + rounding for one, other in pairs)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(". ")

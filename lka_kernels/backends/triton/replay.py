"""Operator calls remembered as what they launch, so that a like call does nothing else.

To plan a call and to bind and specialise some 40 arguments of every launch takes the host longer
than many a kernel takes the GPU. All of it follows from the call's key: dtypes, shapes, strides,
devices and alignments of its tensors, its other arguments, the precision switch and ``tiles``.
The first call with a key runs as it is written and is watched; the recipe made of it holds

- tensors to allocate, those of its results and its workspaces,
- what torch computed on the way, such as weights in another order, to be computed again,
- compiled kernels with their arguments, pointers as (tensor, bytes behind its first element),

in this order or mixed, as they ran. A call with the same key follows the recipe with its own
tensors. Wherever something is not as expected, calls run as they are written: a tensor whose origin
was not seen, values that steered the plan, a kernel that Triton did not return, hooks of a
profiler, tuning.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lka_kernels import tiles
from lka_kernels.backends.triton.launch import Launch, run_one

try:
    from triton import knobs
    from triton.runtime.jit import JITFunction

    _TRITONS_RUN = JITFunction.run
except (ImportError, AttributeError):  # a Triton with other internals: nothing is remembered
    knobs = None

_MOST_RECIPES = 1024
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_VALUES = frozenset((type(None), bool, int, float, str))
_SEQUENCES = frozenset((list, tuple, torch.Size))
# What Triton specialises pointers on; torch's allocators align to more.
_ALIGNMENT = 16

# Kinds of steps.
_LAUNCH, _ALLOCATE, _COMPUTE, _VIEW, _CHANGE, _DROP = range(6)
# The place of the stream among the arguments of ``CompiledKernel.run``.
_STREAM = 3

_aten = torch.ops.aten
_ALLOCATIONS = (
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
)
_STEERED_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class CompiledLauncher:
    """Launches compiled kernels on CUDA devices as the last lines of ``JITFunction.run`` do."""

    def serves(self, t: Tensor) -> bool:
        """Whether kernels take ``t``."""
        return t.is_cuda

    def ready(self) -> bool:
        """Whether nobody wants to know of launches, or has them compiled for debugging."""
        if knobs is None:
            return False
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return not (
            getattr(enter, "calls", enter)
            or getattr(leave, "calls", leave)
            or runtime.debug
            or getattr(runtime, "add_stages_inspection_hook", None)
            or knobs.compilation.instrumentation_mode
            or JITFunction.run is not _TRITONS_RUN
        )

    def prepare(self, launch: Launch, compiled) -> tuple[Callable, list] | None:
        """What launches ``compiled``, and its first arguments; those of the kernel come behind.

        ``compiled`` is what running ``launch`` returned. None where it cannot be launched so.
        """
        if not isinstance(compiled.function, int):
            return None
        first = [launch.programs, 1, 1, None, compiled.function, compiled.packed_metadata]
        # No metadata and no hooks, which are for each other.
        return compiled.run, [*first, None, None, None]

    def current_device(self) -> int:
        """The index of the device on which kernels are launched."""
        return torch._C._cuda_getDevice()

    def stream(self, device: int) -> int:
        """The handle of the current stream."""
        return torch._C._cuda_getCurrentRawStream(device)


class Recipe(NamedTuple):
    """What a call does.

    ``steps`` are tuples whose first element is their kind. Each that allocates, computes or views
    makes one tensor more, counted on from the call's own tensors. ``results`` are numbers of
    tensors: one, or a sequence of the type that the call returns. ``kept`` are objects that
    launches need alive.
    """

    steps: tuple[tuple, ...]
    results: int | list | tuple
    device: int
    kept: tuple


class _Memory:
    """Recipes by key, None for a call that has none, made with these ``tiles``."""

    def __init__(self, of_tiles: tuple):
        self.of_tiles = of_tiles
        self.recipes: dict[tuple, Recipe | None] = {}

    def remember(self, key: tuple, recipe: Recipe | None) -> None:
        if len(self.recipes) >= _MOST_RECIPES:
            self.recipes.clear()
        self.recipes[key] = recipe


class _State:
    memory = _Memory(())
    launcher = CompiledLauncher()


class _Local(threading.local):
    recorder = None


_LOCAL = _Local()
_UNKNOWN = object()


def forget_all() -> None:
    """Start afresh: for whoever changes what plans follow, names of ``tiles`` excepted."""
    _State.memory = _Memory(())


def recorder() -> Recorder | None:
    """What watches the call that this thread runs, if one is watched."""
    return _LOCAL.recorder


def remembered(name: str, *switches) -> Callable[[Callable], Callable]:
    """Decorator of an operator, which takes tensors and plain values and returns fresh tensors.

    Args:
        name: tells the operator from others.
        switches: ``torch.backends.cudnn.conv``, ``torch.backends.cuda.matmul`` or both, those that
            ``dot_precision`` is asked about.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments, **keywords):
            launcher = _State.launcher
            if (
                keywords
                or _LOCAL.recorder is not None
                or not launcher.ready()
                or os.environ.get("LKA_TRITON_TUNE") == "1"
            ):
                return function(*arguments, **keywords)
            found = _key(name, switches, arguments, launcher)
            if found is None:
                return function(*arguments)
            key, tensors, pointers = found
            memory = _memory()
            try:
                recipe = memory.recipes.get(key, _UNKNOWN)
            except TypeError:  # a list in a list
                return function(*arguments)
            if recipe is None:
                return function(*arguments)
            if recipe is _UNKNOWN:
                return _record(function, arguments, memory, key, tensors, launcher)
            try:
                result = _follow_on_device(recipe, tensors, pointers, launcher)
            except torch.OutOfMemoryError:
                result = None  # as it is written, torch may find what it lacks
            except Exception:
                memory.remember(key, None)
                result = None
            if result is not None:
                return result
            # Kernels only write what the call allocates, so that it can be begun again. An error of
            # its own it meets again. What was allocated so far must not be in its way.
            tensors.clear()
            return function(*arguments)

        return call

    return decorate


def _memory() -> _Memory:
    """The recipes made with ``tiles`` as it is now: measurements and tests replace its names."""
    of_tiles = tuple(vars(tiles).values())
    memory = _State.memory
    if memory.of_tiles != of_tiles:
        memory = _State.memory = _Memory(of_tiles)
    return memory


def _key(name: str, switches: tuple, arguments: tuple, launcher) -> tuple[tuple, list, list] | None:
    """All that the plan and Triton look at; the tensors and their pointers; None without such."""
    # The types too: 1 equals 1.0, but Triton passes them on as different ones.
    kinds = tuple(map(type, arguments))
    found = [name, kinds]
    tensors, pointers = [], []
    try:
        for value, kind in zip(arguments, kinds, strict=True):
            if kind in _PLAIN:
                pointer = value.data_ptr()
                alignment = pointer % _ALIGNMENT
                found.append(
                    (value.dtype, value.shape, value.stride(), value.get_device(), alignment)
                )
                tensors.append(value)
                pointers.append(pointer)
            elif kind in _VALUES:
                found.append(value)
            elif kind in _SEQUENCES:
                found.append(tuple(value))
            else:
                return None
        if not tensors or not all(map(launcher.serves, tensors)):
            return None
    except RuntimeError:  # without strides or memory
        return None
    if tensors[0].dtype is torch.float32:
        for switch in switches:
            found.append(switch.fp32_precision)
    return tuple(found), tensors, pointers


def _follow_on_device(recipe: Recipe, tensors: list, pointers: list, launcher):
    if recipe.device < 0 or launcher.current_device() == recipe.device:
        return _follow(recipe, tensors, pointers, launcher.stream(recipe.device))
    with torch.cuda.device(recipe.device):
        return _follow(recipe, tensors, pointers, launcher.stream(recipe.device))


def _follow(recipe: Recipe, tensors: list, pointers: list, stream: int):
    """The call's results; None where they must be computed as it is written."""
    for step in recipe.steps:
        kind = step[0]
        if kind == _LAUNCH:
            _, launch, arguments, places, hooks = step
            if hooks:
                return None
            arguments = arguments.copy()
            arguments[_STREAM] = stream
            for place, tensor, offset in places:
                arguments[place] = pointers[tensor] + offset
            launch(*arguments)
            continue
        if kind == _DROP:
            values = t = None
            for number in step[1]:
                tensors[number] = None
            continue
        if kind == _ALLOCATE:
            _, size, strides, dtype, device = step
            t = torch.empty_strided(size, strides, dtype=dtype, device=device)
        else:
            _, operator, values, places, keywords = step
            values = values.copy()
            for place, tensor in places:
                values[place] = tensors[tensor]
            t = operator(*values, **keywords)
            if kind == _CHANGE:
                continue
        pointer = t.data_ptr()
        if kind != _VIEW and pointer % _ALIGNMENT:
            return None
        tensors.append(t)
        pointers.append(pointer)
    results = recipe.results
    if type(results) is int:
        return tensors[results]
    return type(results)([tensors[number] for number in results])


def _record(function, arguments, memory, key, tensors, launcher):
    """Run a call as it is written, and remember what it did."""
    if not all(map(_is_plain, arguments)):
        return function(*arguments)
    watch = Recorder(tensors, launcher)
    inputs = iter(watch.inputs)
    watched = [next(inputs).tensor if type(value) in _PLAIN else value for value in arguments]
    _LOCAL.recorder = watch
    error = None
    try:
        with watch:
            result = function(*watched)
    except Exception as found:
        error = type(found)
    finally:
        _LOCAL.recorder = None
    if error is None:
        memory.remember(key, watch.recipe(result))
        return result
    # If it was not for the watching, which also takes memory, the error comes again.
    del watch, watched, inputs
    result = function(*arguments)
    if not issubclass(error, torch.OutOfMemoryError):
        memory.remember(key, None)
    return result


def _is_plain(value) -> bool:
    """Whether a key may hold ``value``.

    Not a sequence of tensors, which would be kept alive, nor a NaN, with which no key is found.
    """
    if type(value) is float:
        return value == value
    return type(value) not in _SEQUENCES or all(type(element) in _VALUES for element in value)


class _Node:
    """A tensor that was seen, and the one whose memory it is in: itself unless it is a view."""

    def __init__(self, tensor: Tensor, root: _Node | None, is_input: bool = False):
        self.tensor = tensor
        # Not itself: a cycle would keep the tensor until Python looks for cycles.
        self._root = root
        self.is_input = is_input

    @property
    def root(self) -> _Node:
        return self if self._root is None else self._root

    def offset(self, t: Tensor) -> int:
        """Bytes from this tensor's first element to that of ``t``, in the same memory."""
        return _begin(t) - _begin(self.tensor)


class _NotRepeatableError(Exception):
    """Something that a recipe has no step for."""


class Recorder(TorchDispatchMode):
    """Watches what a call allocates, computes and launches.

    It keeps every tensor alive meanwhile, as memory and names of dead ones are used again. Two
    arguments may share memory, or be one tensor, where those of a later call do not: each has a
    tensor object of its own here.
    """

    def __init__(self, tensors: list[Tensor], launcher):
        super().__init__()
        self._launcher = launcher
        self._nodes: dict[int, _Node] = {}
        self._by_memory: dict[int, list[_Node]] = {}
        # (_LAUNCH, launch, arguments, places with roots, hooks), (_ALLOCATE, node), or
        # (other kind, node, operator, arguments, places with nodes, keywords).
        self._steps: list[tuple] = []
        self._kept: list = []
        self._kept_until_done: list[Tensor] = []
        self._repeatable = True
        self._launching = False
        self._device = tensors[0].get_device()
        self.inputs = [self._add(t.detach(), None, is_input=True) for t in tensors]

    def run(self, launch: Launch) -> None:
        """Run a launch of the call."""
        self._launching = True
        try:
            compiled = run_one(launch)
        finally:
            self._launching = False
        self._try(self._saw_launch, launch, compiled)

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = operator(*arguments, **keywords)
        # What Triton, or its interpreter, does for a launch is no part of the call.
        if not self._launching:
            self._try(self._saw, operator, arguments, keywords, result)
        return result

    def _try(self, saw: Callable, *arguments) -> None:
        if not self._repeatable:
            return
        try:
            saw(*arguments)
        except Exception:  # the call itself must not fail for the sake of later ones
            self._repeatable = False

    def _saw_launch(self, launch: Launch, compiled) -> None:
        prepared = self._launcher.prepare(launch, compiled)
        if prepared is None:
            raise _NotRepeatableError
        function, arguments = prepared
        first = len(arguments)
        names = launch.kernel.arg_names[len(launch.arguments) :]
        if len(names) != len(launch.constants):
            raise _NotRepeatableError
        arguments += launch.arguments
        arguments += [launch.constants[name] for name in names]
        places = []
        for place, value in enumerate(arguments[first:], first):
            if isinstance(value, Tensor):
                root = self._root(value)
                places.append((place, root, root.offset(value)))
                arguments[place] = None
        hooks = getattr(launch.kernel, "pre_run_hooks", ())
        self._steps.append((_LAUNCH, function, arguments, places, hooks))
        self._kept.append(compiled)

    def _saw(self, operator, arguments, keywords, result) -> None:
        if operator.overloadpacket in _ALLOCATIONS:
            self._steps.append((_ALLOCATE, self._add(result, None)))
            return
        if not isinstance(result, Tensor) or any(t in operator.tags for t in _STEERED_BY_VALUES):
            raise _NotRepeatableError
        if any(map(_holds_tensor, keywords.values())):
            raise _NotRepeatableError
        values, places = list(arguments), []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                places.append((place, self._find(value)))
                values[place] = None
            elif _holds_tensor(value):
                raise _NotRepeatableError
        if operator._schema.is_mutable:
            if result is not arguments[0] or places[0][1].root.is_input:
                raise _NotRepeatableError
            kind, node = _CHANGE, None
        elif id(result) in self._nodes:
            return
        elif operator is _aten.detach.default and not places[0][1].root.is_input:
            # torch makes a second object of what it has allocated, as this one holds the first.
            self._nodes[id(result)] = places[0][1]
            self._kept_until_done.append(result)
            return
        else:
            roots = {n.root for _, n in places if _memory_of(n.tensor) == _memory_of(result)}
            if len(roots) > 1:
                raise _NotRepeatableError
            kind, root = (_VIEW, roots.pop()) if roots else (_COMPUTE, None)
            node = self._add(result, root)
        self._steps.append((kind, node, operator, values, places, keywords))

    def _add(self, tensor: Tensor, root: _Node | None, is_input: bool = False) -> _Node:
        node = _Node(tensor, root, is_input)
        if root is None and not is_input and tensor.data_ptr() % _ALIGNMENT:
            raise _NotRepeatableError
        self._nodes[id(tensor)] = node
        self._by_memory.setdefault(_memory_of(tensor), []).append(node)
        return node

    def _find(self, t: Tensor) -> _Node:
        """The node of ``t``.

        Where autograd is at work it hands out its own objects for views: those are known by memory,
        shape and strides.
        """
        node = self._nodes.get(id(t))
        if node is not None:
            return node
        self._root(t)
        for node in self._by_memory[_memory_of(t)]:
            if _layout(node.tensor) == _layout(t):
                return node
        raise _NotRepeatableError

    def _root(self, t: Tensor) -> _Node:
        node = self._nodes.get(id(t))
        if node is not None:
            return node.root
        roots = {node.root for node in self._by_memory.get(_memory_of(t), ())}
        if len(roots) != 1:
            raise _NotRepeatableError
        return roots.pop()

    def recipe(self, result) -> Recipe | None:
        """What the call did that its launches and its ``result`` need, or None."""
        if not self._repeatable:
            return None
        try:
            results = [result] if isinstance(result, Tensor) else result
            nodes = [self._find(t) for t in results]
        except Exception:  # not a tensor, or none of this call
            return None
        if any(node.root.is_input for node in nodes):
            return None
        try:
            steps, numbers = self._needed(nodes)
        except Exception:  # the result is there, whatever was not understood of it
            return None
        if isinstance(result, Tensor):
            results = numbers[nodes[0]]
        elif type(result) in (list, tuple):
            results = type(result)(numbers[node] for node in nodes)
        else:
            return None
        return Recipe(steps, results, self._device, tuple(self._kept))

    def _needed(self, results: list[_Node]) -> tuple[tuple[tuple, ...], dict[_Node, int]]:
        kept, needed = [], set(results)
        for step in reversed(self._steps):
            if step[0] not in (_LAUNCH, _CHANGE) and step[1] not in needed:
                continue
            needed.update(_used(step))
            kept.append(step)
        kept.reverse()
        numbers = {node: number for number, node in enumerate(self.inputs)}
        last = {node: i for i, step in enumerate(kept) for node in _used(step)}
        steps = []
        for i, (kind, node, *others) in enumerate(kept):
            # Memory goes back to torch before more is asked for, as when names of it end.
            done = [n for n, end in last.items() if end < i and n not in results]
            done = [n for n in done if not n.root.is_input]
            if done and kind in (_ALLOCATE, _COMPUTE):
                steps.append((_DROP, tuple(numbers[n] for n in done)))
                for n in done:
                    del last[n]
            if kind == _LAUNCH:
                arguments, places, hooks = others
                places = tuple((place, numbers[root], offset) for place, root, offset in places)
                steps.append((kind, node, arguments, places, hooks))
                continue
            if kind == _ALLOCATE:
                t = node.tensor
                steps.append((kind, tuple(t.shape), t.stride(), t.dtype, t.device))
            else:
                operator, values, places, keywords = others
                places = tuple((place, numbers[n]) for place, n in places)
                steps.append((kind, operator, values, places, keywords))
            if node is not None:
                numbers[node] = len(numbers)
        return tuple(steps), numbers


def _used(step: tuple) -> list[_Node]:
    """The nodes of which a recorded step needs the tensor or the pointer."""
    if step[0] == _LAUNCH:
        return [root for _, root, _ in step[3]]
    return [] if step[0] == _ALLOCATE else [node for _, node in step[4]]


def _memory_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _begin(t: Tensor) -> int:
    return t.storage_offset() * t.element_size()


def _layout(t: Tensor) -> tuple:
    return t.dtype, t.shape, t.stride(), t.storage_offset()


def _holds_tensor(value) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(map(_holds_tensor, value))
    )

"""Remembered calls of Triton operators: what a recipe does is what the call does as it is written.

Without a GPU, kernels are launched from a recipe by Triton's interpreter on tensors made of the
recipe's integers, and what JITFunction.run hands to a launcher is compared in a process of its own.
"""

import ctypes
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from adapter_cases import DEFINED, check_backend
from cases import lay_out

from lka_kernels import available_backends, tiles
from lka_kernels.backends.triton import device_type

DEVICE = device_type()
STATUS = available_backends()["triton"]
pytestmark = [pytest.mark.skipif(STATUS != "ready", reason=STATUS)]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)
on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")

# Name: batch, channels, map, kernel, padding (top, left, bottom, right), dilation, layout.
CALLS = {
    "same": ((2, 3, 5, 6), (3, 3), (1, 1, 1, 1), (1, 1), "contiguous"),
    "channels_last": ((2, 3, 5, 6), (3, 3), (1, 1, 1, 1), (1, 1), "channels_last"),
    "vectors": ((1, 2, 6, 16), (5, 5), (2, 2, 2, 2), (1, 1), "contiguous"),
    "dilated": ((2, 2, 8, 7), (3, 4), (2, 3, 2, 3), (2, 3), "transposed"),
    "larger_than_map": ((1, 2, 4, 5), (11, 13), (5, 6, 5, 6), (1, 1), "contiguous"),
    "tall": ((1, 2, 12, 3), (17, 3), (8, 1, 8, 1), (1, 1), "channels_last"),
    "sliced": ((2, 2, 6, 5), (4, 2), (1, 0, 2, 1), (1, 1), "sliced"),
    "empty": ((0, 2, 5, 5), (3, 3), (1, 1, 1, 1), (1, 1), "contiguous"),
}
FORMS = ("auto", "direct", "gemm")


class InterpretingLauncher:
    """Stands for compiled kernels: makes tensors of pointers and interprets the kernel."""

    def __init__(self):
        self.launched = 0

    def serves(self, t):
        return t.is_cpu

    def ready(self):
        return True

    def current_device(self):
        return -1

    def stream(self, device):
        return 7

    def prepare(self, launch, compiled):
        assert compiled is None
        described = [
            (t.dtype, extent(t)) if isinstance(t, torch.Tensor) else None for t in launch.arguments
        ]
        kernel, names = launch.kernel, launch.kernel.arg_names

        def run(programs, one, another, stream, function, metadata, data, enter, leave, *arguments):
            assert (one, another, stream, data, enter, leave) == (1, 1, 7, None, None, None)
            assert len(arguments) == len(names)
            self.launched += 1
            values = [
                value if described_as is None else tensor_at(value, *described_as)
                for value, described_as in zip(
                    arguments, described + [None] * (len(names) - len(described)), strict=True
                )
            ]
            kernel[(programs,)](**dict(zip(names, values, strict=True)))

        return run, [launch.programs, 1, 1, None, 0, (), None, None, None]


def extent(t) -> int:
    """Bytes from the first element of ``t`` to the end of its last."""
    if t.numel() == 0:
        return 0
    steps = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return (steps + 1) * t.element_size()


def tensor_at(pointer: int, dtype, size: int):
    assert type(pointer) is int
    if size == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=dtype)


@pytest.fixture
def replay():
    from lka_kernels.backends.triton import replay

    replay.forget_all()
    yield replay
    replay.forget_all()


@pytest.fixture
def launcher(replay, monkeypatch):
    """What launches from recipes here: the interpreter, or Triton's own launcher."""
    found = replay.CompiledLauncher() if DEVICE == "cuda" else InterpretingLauncher()
    monkeypatch.setattr(replay._State, "launcher", found)
    return found


def recipes(replay) -> list:
    return list(replay._State.memory.recipes.values())


def launches(recipe, replay) -> int:
    return [step[0] for step in recipe.steps].count(replay._LAUNCH)


class Arguments:
    """The tensors of one call, other ones for every seed."""

    def __init__(self, name, dtype, seed=0):
        shape, self.kernel, self.padding, self.dilation, layout = CALLS[name]
        generator = torch.Generator().manual_seed(seed)
        self.channels_last = layout == "channels_last"
        self.size = list(shape[2:])
        reach = [self.dilation[i] * (self.kernel[i] - 1) for i in (0, 1)]
        size = [self.size[i] + self.padding[i] + self.padding[2 + i] - reach[i] for i in (0, 1)]
        self.input = lay_out(shape, layout, dtype, generator).to(DEVICE)
        self.grad_output = lay_out((*shape[:2], *size), layout, dtype, generator).to(DEVICE)
        weight = torch.randn(shape[1], 1, *self.kernel, generator=generator)
        self.weight = weight.to(DEVICE, dtype)
        self.bias = torch.randn(shape[1], generator=generator).to(DEVICE, dtype)

    def call(self, operator: str, form: str, functions=None) -> tuple:
        """Results of an operator, or of what ``functions`` makes of it."""
        from lka_kernels.backends.triton import depthwise

        geometry = (1, 1), self.padding, self.dilation
        arguments = {
            "forward": (self.input, self.weight, self.bias, *geometry, self.channels_last),
            "backward_input": (
                self.grad_output, self.weight, self.size, *geometry, self.channels_last
            ),
            "backward_weight": (self.grad_output, self.input, list(self.kernel), *geometry),
        }[operator]  # fmt: skip
        function = getattr(depthwise, operator)
        if functions is not None:
            function = functions(function)
        result = function(*arguments, form)
        return result if isinstance(result, tuple) else (result,)


def as_written(function):
    return function.__wrapped__


def bits(results) -> list:
    return [(r.dtype, r.shape, r.stride(), r.flatten().view(torch.uint8).tolist()) for r in results]


OPERATORS = ("forward", "backward_input", "backward_weight")


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("direct", torch.float32), ("gemm", torch.float16), ("auto", torch.float16)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_recipe_gives_what_the_call_gives(operator, name, form, dtype, replay, launcher):
    calls = [Arguments(name, dtype, seed) for seed in range(3 if DEVICE == "cuda" else 2)]
    expected = [bits(a.call(operator, form, as_written)) for a in calls]
    found = [bits(a.call(operator, form)) for a in calls]
    assert found == expected
    (recipe,) = recipes(replay)
    assert recipe is not None
    if DEVICE == "cpu":
        assert launcher.launched == launches(recipe, replay)
        assert (launcher.launched > 0) == (name != "empty")


def test_channels_last_weights_are_reordered_anew(replay, launcher):
    a = Arguments("channels_last", torch.float32)
    a.call("forward", "direct")
    (recipe,) = recipes(replay)
    kinds = [step[0] for step in recipe.steps]
    assert kinds == [replay._ALLOCATE, replay._VIEW, replay._COMPUTE, replay._LAUNCH]
    a.weight += 1
    found = a.call("forward", "direct")
    assert bits(found) == bits(a.call("forward", "direct", as_written))


def test_maps_moved_to_planes(replay, launcher, monkeypatch):
    monkeypatch.setattr(tiles, "correlation_moves", lambda *a: True)
    monkeypatch.setattr(tiles, "weight_moves", lambda *a: True)
    for operator in OPERATORS:
        calls = [Arguments("channels_last", torch.float16, seed) for seed in range(2)]
        expected = [bits(a.call(operator, "auto", as_written)) for a in calls]
        assert [bits(a.call(operator, "auto")) for a in calls] == expected
    counts = [
        [step[0] for step in recipe.steps].count(replay._LAUNCH) for recipe in recipes(replay)
    ]
    assert counts == [3, 3, 4]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["same", "channels_last", "dilated"])
def test_transforms(operator, name, replay, launcher):
    """Steps of torch between launches, on what they leave."""
    from lka_kernels.backends.triton import fft

    def on_fft(function):
        return lambda *arguments: getattr(fft, operator)(*arguments[:-1])

    def written(function):
        return lambda *arguments: getattr(fft, operator).__wrapped__(*arguments[:-1])

    calls = [Arguments(name, torch.float32, seed) for seed in range(2)]
    expected = [bits(a.call(operator, "", written)) for a in calls]
    assert [bits(a.call(operator, "", on_fft)) for a in calls] == expected
    (recipe,) = recipes(replay)
    assert launches(recipe, replay) == 4
    assert [step[0] for step in recipe.steps].count(replay._DROP) >= 2


def test_memory_is_given_back_on_the_way(replay, launcher, monkeypatch):
    alive, most = [], []
    strided = torch.empty_strided

    def counted(*arguments, **keywords):
        t = strided(*arguments, **keywords)
        alive.append(weakref.ref(t))
        most.append(sum(ref() is not None for ref in alive))
        return t

    @replay.remembered("one after the other")
    def operator(x):
        for _ in range(5):
            x = torch.empty_like(x).copy_(x)
        return x

    x = torch.randn(3, device=DEVICE)
    operator(x)
    monkeypatch.setattr(torch, "empty_strided", counted)
    assert torch.equal(operator(x), x)
    assert len(most) == 5
    assert max(most) == 2


def test_a_call_that_lacks_memory_is_begun_again(replay, launcher, monkeypatch):
    refusals = []

    def operator(x):
        if replay.recorder() is not None and len(refusals) < 2:
            refusals.append(replay.recorder())
            raise torch.OutOfMemoryError
        return torch.empty_like(x)

    call = replay.remembered("large")(operator)
    x = torch.randn(3, device=DEVICE)
    for _ in range(2):
        assert call(x).shape == x.shape
        assert recipes(replay) == []
    call(x)
    assert None not in recipes(replay)

    def refuses(*arguments, **keywords):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty_strided", refuses)
    assert call(x).shape == x.shape
    assert None not in recipes(replay)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("case", [DEFINED[i] for i in (0, 2, 3, 5, 7)], ids=str)
def test_adapter(case, apart, replay, launcher, monkeypatch):
    from lka_kernels.backends.triton import adapter

    choose = tiles.adapter_tiles
    changes = {"convolve_apart": apart, "weights_apart": apart}
    monkeypatch.setattr(tiles, "adapter_tiles", lambda *a, **k: choose(*a, **k)._replace(**changes))
    if apart:
        monkeypatch.setattr(tiles, "one_launch_tiles", lambda *a: None)
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    for name in ("forward", "backward"):
        watched = replay.remembered(f"adapter {name}", *switches)(getattr(adapter, name))
        monkeypatch.setattr(adapter, name, watched)
    for _ in range(2):
        check_backend(case, torch.float32, "triton", DEVICE)
    assert len(recipes(replay)) >= 2
    assert None not in recipes(replay)
    if DEVICE == "cpu":
        assert launcher.launched == sum(launches(recipe, replay) for recipe in recipes(replay))


def test_arguments_that_share_memory(replay, launcher):
    """One tensor for two arguments while it is watched; two later, and the other way round."""
    one, other = (Arguments("same", torch.float32, seed) for seed in (0, 1))
    for first, second in ((one.input, one.input), (one.input, other.input), (one.input,) * 2):
        one.grad_output, a = first, one
        a.input = second
        found = bits(a.call("backward_weight", "direct"))
        assert found == bits(a.call("backward_weight", "direct", as_written))
    (recipe,) = recipes(replay)
    assert recipe is not None


def misaligned(t):
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].view(t.shape).copy_(t)


CHANGES = {
    "alignment": lambda a: setattr(a, "weight", misaligned(a.weight)),
    "strides": lambda a: setattr(a, "input", a.input.contiguous(memory_format=torch.channels_last)),
    "no bias": lambda a: setattr(a, "bias", None),
    "format of the result": lambda a: setattr(a, "channels_last", True),
    "padding": lambda a: setattr(a, "padding", (1, 1, 0, 1)),
    "dtype": lambda a: [
        setattr(a, name, getattr(a, name).half()) for name in ("input", "weight", "bias")
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_another_key(change, replay, launcher):
    a = Arguments("same", torch.float32)
    a.call("forward", "auto")
    CHANGES[change](a)
    a.call("forward", "auto")
    assert len(recipes(replay)) == 2
    found = bits(a.call("forward", "auto"))
    assert found == bits(a.call("forward", "auto", as_written))
    assert len(recipes(replay)) == 2
    assert None not in recipes(replay)


def test_the_switch_and_the_type_of_a_number_are_of_the_key(replay, launcher):
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    a = Arguments("same", torch.float32)
    try:
        for precision in ("ieee", "tf32"):
            switch.fp32_precision = precision
            a.call("forward", "auto")
    finally:
        switch.fp32_precision = before
    assert len(recipes(replay)) == 2

    @replay.remembered("scaled")
    def scaled(x, factor):
        return torch.empty_like(x)

    scaled(a.input, float("nan"))
    scaled(a.input, 1)
    scaled(a.input, 1.0)
    assert len(recipes(replay)) == 4


def test_replaced_tiles_are_followed(replay, launcher, monkeypatch):
    a = Arguments("channels_last", torch.float16)
    a.call("forward", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "correlation_moves", lambda *a: True)
        a.call("forward", "auto")
        (recipe,) = recipes(replay)
        assert launches(recipe, replay) == 3
    a.call("forward", "auto")
    (recipe,) = recipes(replay)
    assert launches(recipe, replay) == 1


def test_no_tensor_is_kept_alive(replay, launcher):
    check_that_no_tensor_is_kept(replay, gc.collect)  # with what is made once, as modules
    replay.forget_all()
    gc.disable()  # nor kept until Python looks for cycles
    try:
        check_that_no_tensor_is_kept(replay, None)
    finally:
        gc.enable()


def check_that_no_tensor_is_kept(replay, look_for_cycles):
    a = Arguments("channels_last", torch.float32)
    results = [a.call(operator, form) for operator in OPERATORS for form in FORMS]
    watched = [a.input, a.weight, a.bias, a.grad_output, *(r for found in results for r in found)]
    alive = [weakref.ref(t) for t in watched]
    if look_for_cycles is not None or DEVICE == "cuda":  # Triton's interpreter has such of its own
        alive += [weakref.ref(t.untyped_storage()) for t in watched]
    del a, results, watched
    if look_for_cycles is not None:
        look_for_cycles()
    assert [ref for ref in alive if ref() is not None] == []
    assert len(recipes(replay)) == 9
    assert None not in recipes(replay)
    x = torch.randn(1, 2, 3, 3, device=DEVICE)
    listed = replay.remembered("listed")(lambda t, others: torch.empty_like(t))
    listed(x, [x])
    assert len(recipes(replay)) == 9


def steered(x):
    return torch.empty(int(x.sum()) + 1, device=x.device)


def of_unknown_origin(x):
    return torch.empty_like(x), _UNKNOWN_ORIGIN.to(x.device)


def of_untold_size(x):
    return x.nonzero() + 0


def changes_its_argument(x):
    x.add_(1)
    return torch.empty_like(x)


def returns_its_argument(x):
    return x.view(-1)


def several_from_one_step(x):
    return tuple(x.sort())


_UNKNOWN_ORIGIN = torch.zeros(3)
NOT_REPEATABLE = [
    steered,
    of_unknown_origin,
    of_untold_size,
    changes_its_argument,
    returns_its_argument,
    several_from_one_step,
]


@pytest.mark.parametrize("function", NOT_REPEATABLE, ids=lambda f: f.__name__)
def test_what_cannot_be_done_again_is_not_remembered(function, replay, launcher):
    operator = replay.remembered(function.__name__)(function)
    for seed in range(3):
        x = torch.full((2, 2), float(seed), device=DEVICE)
        expected = function(x.clone())
        found = operator(x)
        for result, other in zip(
            found if isinstance(found, tuple) else (found,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            assert result.shape == other.shape
    assert recipes(replay) == [None]


def test_steps_of_torch_are_done_again(replay, launcher):
    """Also those that change what the call allocated, and views as results; the rest is left."""

    @replay.remembered("steps")
    def operator(x, y):
        torch.empty(1000, device=x.device)
        x.exp()
        room = x.new_empty((4, 3))
        room.zero_()
        room[1:3].copy_(x.t().contiguous() * y)
        return room[1:], room

    for _ in range(3):
        x, y = torch.randn(3, 2, device=DEVICE), torch.randn(2, 3, device=DEVICE)
        tail, room = operator(x, y)
        assert torch.equal(tail[:2], x.t() * y)
        assert torch.equal(room[[0, 3]], torch.zeros(2, 3, device=DEVICE))
        assert tail.data_ptr() == room[1:].data_ptr()
    (recipe,) = recipes(replay)
    assert [step[0] for step in recipe.steps].count(replay._ALLOCATE) == 1
    assert not any(step[1] is torch.ops.aten.exp.default for step in recipe.steps)


def test_errors_are_the_calls_own(replay, launcher):
    @replay.remembered("refuses")
    def refuses(x):
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            refuses(torch.zeros(1, device=DEVICE))
    assert recipes(replay) == []
    assert replay.recorder() is None


def test_a_launcher_that_fails_is_not_asked_again(replay, launcher, monkeypatch):
    a = Arguments("same", torch.float32)
    expected = bits(a.call("forward", "direct"))
    (key,) = replay._State.memory.recipes
    recipe = replay._State.memory.recipes[key]

    def fails(*arguments):
        raise TypeError("other arguments")

    steps = tuple((s[0], fails, *s[2:]) if s[0] == replay._LAUNCH else s for s in recipe.steps)
    replay._State.memory.recipes[key] = recipe._replace(steps=steps)
    assert bits(a.call("forward", "direct")) == expected
    assert recipes(replay) == [None]
    assert bits(a.call("forward", "direct")) == expected


def test_tuned_and_watched_calls_run_as_they_are_written(replay, launcher, monkeypatch):
    a = Arguments("same", torch.float32)
    monkeypatch.setattr(launcher, "ready", lambda: False)
    a.call("forward", "direct")
    monkeypatch.undo()
    monkeypatch.setattr(replay._State, "launcher", launcher)
    with monkeypatch.context() as patch:
        patch.setenv("LKA_TRITON_TUNE", "1")
        patch.setattr("lka_kernels.backends.triton.run.tuned", lambda launch, device: launch)
        a.call("forward", "direct")
    assert recipes(replay) == []


def test_hooks_of_profilers(replay, monkeypatch):
    from triton import knobs

    ready = replay.CompiledLauncher().ready
    assert ready()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        assert not ready()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        assert not ready()
    hooks = knobs.runtime.launch_exit_hook
    hooks.add(print)
    assert not ready()
    hooks.remove(print)
    assert ready()


def test_other_tensors_are_left_alone(replay, launcher):
    class Own(torch.Tensor):
        pass

    operator = replay.remembered("other")(lambda x: x.clone())
    operator(torch.zeros(2, device="meta"))
    operator(torch.zeros(2, device=DEVICE).as_subclass(Own))
    operator(torch.zeros(2, 2, device=DEVICE).to_sparse())
    assert recipes(replay) == []


def test_the_memory_is_bounded(replay, launcher, monkeypatch):
    monkeypatch.setattr(replay, "_MOST_RECIPES", 4)
    operator = replay.remembered("sized")(lambda x, n: x.new_empty((n,)))
    x = torch.zeros(1, device=DEVICE)
    for n in range(11):
        assert operator(x, n).shape == (n,)
        assert 1 <= len(recipes(replay)) <= 4


def test_parameters_below_autograd_and_above(replay, launcher):
    a = Arguments("channels_last", torch.float32)
    a.weight = torch.nn.Parameter(a.weight)
    expected = bits(a.call("forward", "direct", as_written))
    for _ in range(3):
        assert bits(a.call("forward", "direct")) == expected
    with torch.inference_mode():
        assert bits(a.call("forward", "direct")) == expected
    assert None not in recipes(replay)


# Compares, with a driver that only notes what it is asked to launch, what JITFunction.run passes on
# with what a recipe does.
_NOTED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget

noted = []

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        noted.append(arguments)

class Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), 123456789, 32, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

class Driver:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

triton.runtime.driver.set_active(Driver())
sys.path[:0] = sys.argv[1:]
from lka_kernels.backends.triton import replay

class Launching(replay.CompiledLauncher):
    def serves(self, t):
        return t.is_cpu

    def current_device(self):
        return -1

    def stream(self, device):
        return 7

replay._State.launcher = Launching()
from lka_kernels.backends.triton import depthwise

def compare(function, *arguments):
    noted.clear()
    function(*arguments)
    written = noted[:]
    noted.clear()
    function(*arguments)
    assert len(noted) == len(written) > 0, (len(noted), len(written))
    bases = {t.untyped_storage().data_ptr(): t.untyped_storage().data_ptr()
             for t in arguments if isinstance(t, torch.Tensor)}
    for ours, tritons in zip(noted, written, strict=True):
        assert ours[:6] == tritons[:6], (ours[:6], tritons[:6])
        assert ours[6:9] == (None, None, None)  # metadata for hooks, and two of these
        for our, theirs in zip(ours[9:], tritons[9:], strict=True):
            if isinstance(theirs, torch.Tensor):
                assert type(our) is int
                base = our - theirs.storage_offset() * theirs.element_size()
                assert bases.setdefault(theirs.untyped_storage().data_ptr(), base) == base
            else:
                assert type(our) is type(theirs) and our == theirs, (our, theirs)
    assert None not in replay._State.memory.recipes.values()
    print(function.__name__, len(written))

geometry = ((1, 1), (3, 3, 3, 3), (1, 1))
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 16, 14, 14).half().contiguous(memory_format=layout)
    w, b = torch.randn(16, 1, 7, 7).half(), torch.randn(16).half()
    last = layout is torch.channels_last
    for form in ("direct", "gemm"):
        compare(depthwise.forward, x, w, b, *geometry, last, form)
        compare(depthwise.backward_input, x, w, [14, 14], *geometry, last, form)
        compare(depthwise.backward_weight, x, x.clone(), [7, 7], *geometry, form)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the launches themselves are tested")
def test_the_launcher_gets_what_triton_passes():
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _NOTED, *sys.path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 12


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["direct", "gemm"])
@pytest.mark.parametrize("name", ["same", "channels_last", "vectors", "larger_than_map", "tall"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_in_a_graph(operator, name, form, dtype, replay, launcher):
    """Captured from a recipe, and replayed on other values."""
    first, second = (Arguments(name, dtype, seed) for seed in (0, 1))
    for _ in range(2):
        first.call(operator, form)
    assert None not in recipes(replay)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first.call(operator, form)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = first.call(operator, form)
    for tensor in ("input", "weight", "bias", "grad_output"):
        getattr(first, tensor).copy_(getattr(second, tensor))
    graph.replay()
    torch.cuda.synchronize()
    assert bits(results) == bits(second.call(operator, form, as_written))
    assert None not in recipes(replay)


@on_gpu
def test_on_another_stream(replay, launcher):
    """Launches go where torch's current stream is, behind what was there."""
    shape = (8, 64, 56, 56)
    x, w = torch.randn(shape, device="cuda"), torch.randn(64, 1, 7, 7, device="cuda")
    from lka_kernels.backends.triton import depthwise

    arguments = (w, None, (1, 1), (3, 3, 3, 3), (1, 1), False, "auto")
    depthwise.forward(x, *arguments)
    expected = depthwise.forward.__wrapped__(2 * x, *arguments)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        y = depthwise.forward(x.mul_(2), *arguments)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_extents_of_the_stub():
    assert extent(torch.empty(4, 6)[1:3, ::2]) == 4 * (6 + 4 + 1)
    assert extent(torch.empty(4, 0)) == 0

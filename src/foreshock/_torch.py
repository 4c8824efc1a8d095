"""Every private torch API that foreshock touches, each with the version it was checked on."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint

# Raised through a forward pass by non-reentrant activation checkpointing, to end a recomputation early. Checked on 2.13.
STOP_RECOMPUTATION = torch.utils.checkpoint._StopRecomputationError


def synthetic_source(name: str) -> Any:
    """A Dynamo source for an input that foreshock adds itself. Checked on 2.13."""
    from torch._dynamo.source import SyntheticLocalSource

    return SyntheticLocalSource(name)


def graph_module(root: torch.nn.Module, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A `GraphModule` that writes its Python code only if it is asked to run. Checked on 2.13."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        made: torch.fx.GraphModule = _make_graph_module(root, graph)
        return made


def fake_mode_of(values: list[Any]) -> Any:
    """The fake tensor mode in which Dynamo recorded ``values``: not the one backends compile in. Checked on 2.13."""
    from torch._subclasses.fake_tensor import FakeTensor

    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def is_rehearsal(args: Sequence[Any]) -> bool:
    """Whether a compiled graph is called with fake tensors, as where Dynamo splits a graph by DDP's buckets. Checked on 2.13."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(next((arg for arg in args if isinstance(arg, torch.Tensor)), None), FakeTensor)


@contextlib.contextmanager
def evaluating(values: list[Any]) -> Iterator[None]:
    """Run torch code on fake tensors as Dynamo does, also where sizes are symbolic. Checked on 2.13."""
    from torch._dispatch.python import enable_python_dispatcher

    with fake_mode_of(values), enable_python_dispatcher():
        yield


def to_fake(context: Any, values: list[Any]) -> list[Any]:
    """``values`` as static fakes of the mode that backends compile in: they hold no memory. Checked on 2.13."""
    mode = context.fake_mode
    return [mode.from_tensor(v, static_shapes=True) if isinstance(v, torch.Tensor) else v for v in values]


def current_context() -> Any:
    """The tracing context of the capture under way, or None. Checked on 2.13."""
    from torch._guards import TracingContext

    return TracingContext.try_get()


@contextlib.contextmanager
def resumed(context: Any) -> Iterator[None]:
    """Compile later what was captured under ``context``, as if still there. Checked on 2.13."""
    from torch._guards import tracing

    with tracing(context):
        yield


def compiling() -> Any:
    """The lock under which Dynamo compiles, for what is compiled outside of a capture. Checked on 2.13."""
    from torch._dynamo.convert_frame import compile_lock

    return compile_lock


def compile_fx(options: dict[str, Any] | None, mode: str | None) -> Callable[[Any, Any], Any]:
    """Inductor with the ``mode`` and ``options`` of `torch.compile`. Checked on 2.13."""
    from torch import _TorchCompileInductorWrapper

    wrapper: Callable[[Any, Any], Any] = _TorchCompileInductorWrapper(mode, options, None)
    return wrapper


def lookup_backend(name: str) -> Callable[..., Any]:
    """A registered Dynamo backend. Checked on 2.13."""
    from torch._dynamo import lookup_backend as lookup

    found: Callable[..., Any] = lookup(name)
    return found


def break_records() -> Sequence[Any]:
    """Every graph break of this process, oldest first: ``reason``, ``user_stack``. Dynamo's own list. Checked on 2.13."""
    from torch._dynamo.utils import graph_break_reasons

    return graph_break_reasons


def compilation_records() -> Sequence[Any]:
    """The last 64 compilations, oldest first, those that Dynamo gave up included: ``compile_id`` (frame/recompilation),
    ``co_name``, ``co_filename``, ``co_firstlineno``, ``fail_type``, ``fail_reason`` and more. Checked on 2.13."""
    from torch._dynamo.utils import get_compilation_metrics

    return get_compilation_metrics()


def root_module() -> str:
    """The class of the module whose function is being captured, "" if it is of none. Read off Dynamo's own call of the backend:
    the graph does not tell. Checked on 2.13."""
    frame = inspect.currentframe()
    while frame is not None:
        translator = getattr(frame.f_locals.get("self"), "root_tx", None)
        if translator is not None:
            values = translator.f_locals.values()
            args = [
                one for value in values for one in (value if isinstance(value, tuple) else (value,))
            ]  # a decorator's *args
            held = [one for one in args if isinstance(one, torch.nn.Module)]
            return _class_name(held[0]) if held else ""
        frame = frame.f_back
    return ""


def _class_name(module: torch.nn.Module) -> str:
    """The class that the user wrote: `fully_shard` puts one of its own, ``FSDP<name>``, before it. Checked on 2.13."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = type(module).__mro__
    return kinds[2 if fsdp is not None and fsdp.FSDPModule in kinds[:2] else 0].__name__


class Gathered(NamedTuple):
    """A parameter that FSDP2 makes whole for a call. ``name`` is its path from the outermost module that `fully_shard` was given,
    "" before the first forward pass; ``rank`` of ``ranks`` is this process's place among those that hold it between them; ``mesh``:
    all ranks that it is laid out over, also by tensor parallelism."""

    whole: torch.Tensor
    sharded: torch.Tensor
    module: torch.nn.Module
    own_name: str
    name: str
    rank: int
    ranks: int
    mesh: tuple[int, ...]


def gathered_parameters() -> Iterator[Gathered]:
    """Every parameter that FSDP2 (`fully_shard`) has made whole so far, whichever model it is of. Checked on 2.13."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state: Any = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (held for group in groups if group is not None for held in group.fsdp_params):
            if hasattr(held, "_unsharded_param"):  # it has been gathered once
                mesh, info = held.mesh_info.mesh, held._module_info
                rank = 0
                for at, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
                    rank = rank * size + at
                name = held._param_fqn or ""
                whole, part = held._unsharded_param, held.sharded_param
                every = tuple(part.device_mesh.mesh.flatten().tolist())
                yield Gathered(whole, part, info.module, info.param_name, name, rank, mesh.size(), every)


def place_in_group(group: Any) -> tuple[int, int] | None:
    """This process's rank in the process group that a graph knows by name, and the size of that. None for one that is not known.
    Checked on 2.13."""
    from torch.distributed import distributed_c10d

    resolve: Any = getattr(distributed_c10d, "_resolve_process_group", None)
    try:
        found: Any = resolve(group) if isinstance(group, str) else group
        return found.rank(), found.size()
    except Exception:
        return None


def is_skipped(filename: str) -> bool:
    """Whether Dynamo leaves functions of a file to eager unless they are called from compiled code. Checked on 2.13."""
    from torch._dynamo.trace_rules import check_file

    return bool(check_file(filename, is_inlined_call=False).skipped)


@contextlib.contextmanager
def constants_allowed() -> Iterator[None]:
    """Let a capture on the meta device meet tensors made while tracing: there they are not made fake. Checked on 2.13."""
    from torch._subclasses.fake_tensor import fake_tensor_tls

    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of ``module`` go through `torch.compile`, or through what `stand_in` put there. Checked on 2.13."""
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def stand_in(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Let ``call`` answer the calls of ``module`` where its ``compile`` would put a compiled one; None takes it away. It is neither
    copied nor pickled with the module. Checked on 2.13."""
    module._compiled_call_impl = call


def plain_call(module: torch.nn.Module) -> Callable[..., Any]:
    """What ``compile`` of ``module`` compiles: a call with its hooks, and with nothing that stands in. Checked on 2.13."""
    call: Callable[..., Any] = module._call_impl
    return call


def on_optimizer_step(hook: Callable[..., None]) -> Any:
    """Call ``hook(optimizer, args, kwargs)`` after every step of every optimizer; returns a handle with ``remove()``."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    return register_optimizer_step_post_hook(hook)


def before_optimizer_step(hook: Callable[..., None]) -> Any:
    """Call ``hook(optimizer, args, kwargs)`` before every step of every optimizer; returns a handle with ``remove()``."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    return register_optimizer_step_pre_hook(hook)


def job_store() -> Any:
    """A connection of its own to the key-value store that `torch.distributed` was initialised with, under the prefix
    "foreshock": a question waits 30 s at most, and for nobody else's. Raises what the store raises. Checked on 2.13."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    shared: Any = PrefixStore("foreshock", _get_default_store())
    store = shared.clone()  # torch's annotations lack it
    store.set_timeout(timedelta(seconds=30))
    return store


def allow(group: Any, seconds: float) -> None:
    """Let what goes through ``group``, on gloo, take so long from now on. Checked on 2.13."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    _set_pg_timeout(timedelta(seconds=seconds), group)


def in_backward() -> bool:
    """Whether this thread is inside a backward pass. Checked on 2.13."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_capturing() -> bool:
    """Whether this thread's CUDA stream is being captured into a graph: `torch.cuda.graph` around a training step, say. Where CUDA
    was never used this is a look at a flag."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    """The state of the default generators that a graph on ``device`` may draw from."""
    return (
        (torch.get_rng_state(), torch.cuda.get_rng_state(device)) if device.type == "cuda" else (torch.get_rng_state(),)
    )


def restore_random_state(device: torch.device, state: tuple[torch.Tensor, ...]) -> None:
    """Undo what was drawn since `random_state`."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


class CompileCaches(NamedTuple):
    """Where compiled code is kept, and whether graphs of inductor and of AOTAutograd are looked up there."""

    folder: str
    graphs: bool
    autograd: bool


def compile_caches() -> CompileCaches:
    """Where this process keeps what it compiles. Checked on 2.13."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    return CompileCaches(folder, bool(inductor.fx_graph_cache), bool(functorch.enable_autograd_cache))

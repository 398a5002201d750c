"""A GPU that is not there: tensors that say they are on `cuda:N`, compute on the CPU, and keep a
GPU's rules. With it a whole training or extraction runs through the code for GPUs anywhere, and
must give what the CPU gives.

    with PretendGPU() as gpu:
        train(config)          # device="cuda"
    gpu.blocking               # what made the CPU wait for the GPU

What is kept of the real one: operands on two devices are refused (a scalar may stay on the CPU);
only CPU memory is pinned; a copy from pinned memory, if it is asked not to block, ends at the next
synchronisation and not before. So memory that is used again too early is found here: such a copy to
the GPU must find its source unchanged when it ends, such a copy to the CPU shows nonsense until
then. What is not kept: streams (there is one), speed, the kernels' own rounding, autocast.

To autograd these are tensors of the `meta` device, whose backward pass runs in the calling thread:
that of `cuda` needs a driver.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

PRODUCT = Path(__file__).parent.parent / "pipeline"
aten = torch.ops.aten
MAY_MIX = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default}  # of two devices
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class OnGPU(Tensor):
    """`inner`, a CPU tensor, seen as one on the GPU."""

    inner: Tensor
    gpu: PretendGPU
    is_cuda, is_cpu, is_meta = True, False, False
    device = property(lambda self: self.gpu.device)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: PretendGPU) -> OnGPU:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
        )
        self.inner, self.gpu = inner, gpu
        gpu._count(inner)
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.inner!r})"

    @property
    def data(self) -> OnGPU:
        return OnGPU(self.inner, self.gpu)

    @data.setter
    def data(self, other: OnGPU) -> None:
        self.inner = other.inner

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        _each(tensors.append, (args, kwargs))
        gpu = next(value.gpu for value in tensors if isinstance(value, OnGPU))
        return gpu._run(func, args, kwargs, tensors)


class PretendGPU(TorchFunctionMode):
    """The last of `number` + 1 GPUs, with `memory` bytes, as a context manager; the current one is
    the first, as in a fresh process. `peak` is the most of its memory that was used."""

    def __init__(self, memory: int = 2**34, *, number: int = 0) -> None:
        super().__init__()
        self.device = torch.device("cuda", number)
        self.memory, self.used, self.peak = memory, 0, 0
        self.blocking: list[str] = []
        self._sizes: dict[int, int] = {}  # address of an allocation → its bytes
        self._pinned: set[int] = set()
        self._ending: list[Callable[[], None]] = []  # copies under way

    def __enter__(self) -> Self:
        self._patches = ExitStack()
        cuda = torch.cuda
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: self.device.index + 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *_: "pretended",
            "get_device_capability": lambda *_: (9, 0),
            "mem_get_info": lambda *_: (self.memory - self.used, self.memory),
            "memory_allocated": lambda *_: self.used,
            "max_memory_allocated": lambda *_: self.peak,
            "reset_peak_memory_stats": lambda *_: setattr(self, "peak", self.used),
            "empty_cache": lambda: None,
            "synchronize": lambda *_: self.synchronize("synchronize"),
            "current_stream": lambda device="cuda:0": _Stream(self, torch.device(device)),
            "Event": lambda *_, **__: _Event(self),
        }.items():
            self._patches.enter_context(mock.patch.object(cuda, name, value))
        # a wrapper of an inference tensor cannot be a view
        self._patches.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        self._patches.enter_context(_Scalars(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def synchronize(self, why: str | None) -> None:
        """All copies end; `why` is noted as a wait, None is the end of an event."""
        ending, self._ending = self._ending, []
        for end in ending:
            end()
        if why is not None:
            self.blocking.append(f"{why} {_caller()}")

    # --- what the functions of torch are given -----------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, args, kwargs)
        if kwargs.pop("pin_memory", False):
            if any(isinstance(value, OnGPU) for value in args):
                raise RuntimeError("cannot pin: only dense CPU tensors can be pinned")
            return self._pin(func(*args, **kwargs))
        if func is Tensor.tolist and isinstance(args[0], OnGPU):
            self.synchronize("tolist")
            return args[0].inner.tolist()
        if func is Tensor.pin_memory:
            return self._pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self._is_pinned(args[0])
        if _is_gpu(kwargs.get("device")) and isinstance(args[0] if args else None, OnGPU):
            del kwargs["device"]  # its own; older releases of torch would look for a driver
        elif _is_gpu(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):
                self.synchronize("copy of a list")
            return OnGPU(func(*args, **{**kwargs, "device": "cpu"}), self)
        return func(*args, **kwargs)

    def _to(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        values: Tensor = args[0]
        if func is not Tensor.to:
            args = (values, torch.device("cpu" if func is Tensor.cpu else "cuda"))
        if len(args) > 1 and isinstance(args[1], Tensor):
            args = (values, args[1].device, args[1].dtype, *args[2:])
        kwargs.pop("copy", None)
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
        there = isinstance(values, OnGPU)
        if device is not None and _is_gpu(device) != there:
            if there:
                out = torch.empty_like(values.inner)  # type: ignore[attr-defined]
                self._copy(out, values, non_blocking)
            else:
                out = OnGPU(torch.empty_like(values), self)
                self._copy(out, values, non_blocking)
            values = out.requires_grad_(values.requires_grad) if out.is_leaf else out
        return values if dtype is None else Tensor.to(values, dtype)

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    # --- what the GPU does -------------------------------------------------------------------

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        if func is aten.copy_.default:
            self._copy(args[0], args[1], bool(kwargs.get("non_blocking", (*args, False)[2])))
            return args[0]
        if func is aten._to_copy.default and _is_cpu(kwargs.get("device")):
            return self._to(Tensor.to, args, {"device": "cpu"})
        on_cpu = [tensor for tensor in tensors if not isinstance(tensor, OnGPU) and tensor.ndim]
        if on_cpu and func not in MAY_MIX:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and cpu! ({func})"
            )
        masked = func is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if func in WAITS or on_cpu or masked:
            self.synchronize(str(func))
        device = kwargs.pop("device", None)
        inner_args, inner_kwargs = _each(lambda t: getattr(t, "inner", t), (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if _is_cpu(device):
            return out
        out = _each(lambda tensor: OnGPU(tensor, self), out)
        if _shares(func):  # a view, or a change in place
            return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    def _copy(self, to: Tensor, values: Tensor, non_blocking: bool) -> None:
        if isinstance(to, OnGPU) == isinstance(values, OnGPU):
            to.inner.copy_(values.inner)  # type: ignore[attr-defined]
            return
        host = values if isinstance(to, OnGPU) else to
        if not (non_blocking and self._is_pinned(host)):
            if host.ndim or not isinstance(to, OnGPU):
                self.synchronize("copy")
            (to.inner if isinstance(to, OnGPU) else to).copy_(
                values.inner if isinstance(values, OnGPU) else values
            )
            return
        if isinstance(to, OnGPU):
            before = values.detach().clone()
            to.inner.copy_(before)
            source, caller = values.detach(), _caller()

            def unchanged() -> None:
                if not _same_bits(source, before):
                    raise AssertionError(f"memory was used again before its copy ended: {caller}")

            self._ending.append(unchanged)
            return
        truth = values.inner.clone()  # type: ignore[attr-defined]
        _spoil(to)
        self._ending.append(lambda: to.copy_(truth))

    def _count(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._sizes:
            return
        if self.used + size > self.memory:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes. GPU 0 has a total capacity "
                f"of {self.memory} bytes of which {self.memory - self.used} bytes is free."
            )
        self._sizes[address] = size
        self.used += size
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.used -= self._sizes.pop(address)


class _Scalars(TorchDispatchMode):
    """Tensors that torch makes by itself, such as `0` in a backward formula: to it, on `meta`."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and device.type == "meta" and OnGPU not in types:
            if func is aten._to_copy.default and args[0].ndim:  # as `new_tensor` does
                self.gpu.synchronize("copy of a list")
            return OnGPU(func(*args, **{**kwargs, "device": torch.device("cpu")}), self.gpu)
        return func(*args, **kwargs)


class _Event:
    """A point in the GPU's work; waiting for it is what the code should do."""

    def __init__(self, gpu: PretendGPU) -> None:
        self.gpu, self.before = gpu, 0

    def record(self, stream: _Stream | None = None) -> None:
        stream = stream or torch.cuda.current_stream()  # type: ignore[assignment]
        mine = stream is not None and stream.device == self.gpu.device
        self._mine = list(self.gpu._ending) if mine else []

    def synchronize(self) -> None:
        mine, gpu = self._mine, self.gpu
        gpu._ending = [end for end in gpu._ending if end not in mine]
        for end in mine:
            end()
        self._mine = []


class _Stream:
    def __init__(self, gpu: PretendGPU, device: torch.device) -> None:
        self.gpu, self.device = gpu, device

    def synchronize(self) -> None:
        self.gpu.synchronize("stream")


def _each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of every tensor in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)([_each(function, part) for part in value])
    if isinstance(value, dict):
        return {name: _each(function, part) for name, part in value.items()}
    return value


@functools.cache
def _shares(func: Any) -> bool:
    schema = func._schema
    return any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _spoil(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 77)


def _caller() -> str:
    """The line of the product that asked."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.parent == PRODUCT or file.parent.parent == PRODUCT:
            return f"{file.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"

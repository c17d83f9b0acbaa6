"""How an operator is registered, and how it is called.

Every operator is one of ``torch.library``, so that compilers, exporters, fake tensors and dispatch modes see it whole.
Where none of them looks on, a call passes the dispatcher by: it would cost as much again as a small kernel. Either way
the same body runs under the same autograd formula::

    @operator()
    def scale(x: Tensor, factor: float, backend: str) -> Tensor: ...      # the body: no gradients, plain tensors

    @scale.register_fake
    def _(x: Tensor, *_: Any) -> Tensor: ...                              # shapes and dtypes of the result

    @scale.register_formula("scale")
    class _Formula(Formula):
        @staticmethod
        def forward(ctx, run, x, factor, backend):                       # run: the body, or the operator below autograd
            ctx.factor = factor
            return run(x, factor, backend)

        @staticmethod
        def backward(ctx, grad):                                          # None for `run`, then one an argument
            return None, grad * ctx.factor, None, None

Arguments are positional and flat, since schemas are; the body bundles them at once (:mod:`repdeg_fast.contracts`).

A number in a compiled graph is a constant of it. One that has changed (an annealed temperature) the compiler knows as a
tensor, if it comes to an operator through arithmetic with one; so each operator that takes floats has an overload
``varying`` with those of them that change as 0-dimensional tensors on the CPU, where reading one stalls no stream. Fake
functions and formulas see a :class:`Varying` in such a place and may only hand it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "repdeg_fast"  # of the operators in torch.ops
_library = torch.library.Library(NAMESPACE, "DEF")
_OLD_VMAP = torch._C._dispatch_key_parse("VmapMode")  # autograd.grad(is_grads_batched=True), jacobian(vectorize=True)
_PLAIN = frozenset((Tensor, torch.nn.Parameter, NoneType, bool, int, float, str, list, torch.dtype))


class Formula(torch.autograd.Function):
    """An operator's derivative. ``forward(ctx, run, *arguments)`` calls ``run(*arguments)`` and saves what
    ``backward`` needs."""

    public_name: ClassVar[str]  # of the function that a message about a missing derivative names

    @classmethod
    def named(cls, public_name: str) -> type[Formula]:
        def no_tangent(*_: Any) -> NoReturn:
            _raise_missing(public_name, "forward-mode derivative")

        return type(public_name, (cls,), {"public_name": public_name, "jvp": staticmethod(no_tangent)})


class Varying(NamedTuple):
    """A float argument that a compiled graph makes anew at each call."""

    tensor: Tensor  # (), float64, on the CPU


class Operator(Generic[P, R]):
    """One operator: its body with a schema, a fake function and, where it has one, a formula."""

    def __init__(self, body: Callable[P, R], mutates: tuple[str, ...]) -> None:
        self.name, self._body = body.__name__, body
        self._formula: type[Formula] | None = None
        self._apply: Callable[..., Any] = self._run_without_gradients
        schema = torch.library.infer_schema(body, mutates_args=mutates)
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._floats = tuple(i for i, a in enumerate(self.overload._schema.arguments) if "float" in str(a.type))
        if self._floats:
            self._define_varying(schema)

    def __call__(self, *arguments: P.args, **_: P.kwargs) -> R:
        if _watched() or not _PLAIN.issuperset(map(type, arguments)) or _first_tensor(arguments).is_meta:
            return self._through_dispatcher(arguments)
        found: R = self._apply(self._run, *arguments) if is_grad_enabled() else self._run(*arguments)
        return found

    def _through_dispatcher(self, arguments: Sequence[Any]) -> R:
        numbers, varying = list(arguments), [_varying(arguments[i]) for i in self._floats]
        if all(tensor is None for tensor in varying):
            return cast(R, self.overload(*arguments))
        for place, tensor in zip(self._floats, varying, strict=True):
            numbers[place] = arguments[place] if tensor is None else 0.0
        return cast(R, self.varying(*numbers, varying))

    def _define_varying(self, schema: str) -> None:
        """The overload in which ``Tensor?[] varying`` has what stands for floats; None where they are themselves."""
        # what a CUDA graph has captured would keep the value that a tensor on the CPU had then
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
        name = f"{self.name}.varying"
        _library.define(name + schema.replace(") ->", ", Tensor?[] varying) ->"), tags=tags)
        _library.impl(name, self._run_varying, "CompositeExplicitAutograd")
        self.varying = getattr(getattr(torch.ops, NAMESPACE), self.name).varying

    def _joined(self, arguments: Sequence[Any], read: Callable[[Tensor], Any] = Varying) -> list[Any]:
        """Those of ``varying`` as the body, the formula and the fake function have them."""
        *joined, varying = arguments
        for place, tensor in zip(self._floats, varying, strict=True):
            joined[place] = joined[place] if tensor is None else read(tensor)
        return joined

    def register_fake(self, fake: Callable[..., R]) -> None:
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        if self._floats:
            varying = lambda *arguments: fake(*self._joined(arguments))  # noqa: E731
            torch.library.register_fake(f"{NAMESPACE}::{self.name}.varying", varying, lib=_library)

    def register_formula(self, public_name: str) -> Callable[[type[Formula]], None]:
        """``public_name``: of the function that users call."""

        def register(formula: type[Formula]) -> None:
            self._formula = formula.named(public_name)
            # Function.apply looks at signatures first, for the function transforms that are not at work in a plain call
            self._apply = super(torch.autograd.Function, self._formula).apply  # type: ignore[misc]
            _library.impl(self.name, self._differentiable, "Autograd")
            if self._floats:
                varying = lambda *arguments: self._differentiable(*self._joined(arguments))  # noqa: E731
                _library.impl(f"{self.name}.varying", varying, "Autograd")

        return register

    def forbid_second_derivative(self, public_name: str) -> None:
        """For the operator of a backward pass: differentiating through it is an error that says what to do."""

        @self.register_formula(public_name)
        class _NoDerivative(Formula):
            @staticmethod
            def forward(ctx: Any, run: Callable[..., Any], *arguments: Any) -> Any:
                return run(*arguments)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> NoReturn:
                _raise_missing(public_name, "second derivative")

    def _run(self, *arguments: Any) -> R:
        first = _first_tensor(arguments)
        if first.is_cuda:
            with torch.cuda.device(first.device):  # kernels are launched on the current device
                return self._body(*arguments)  # type: ignore[call-arg]
        return self._body(*arguments)  # type: ignore[call-arg]

    def _run_varying(self, *arguments: Any) -> R:
        return self._run(*self._joined(arguments, Tensor.item))

    def _run_without_gradients(self, run: Callable[..., R], *arguments: Any) -> R:
        """Of an operator without a formula."""
        with torch.no_grad():
            return run(*arguments)

    def _differentiable(self, *arguments: Any) -> R:
        """The Autograd key: the formula around the operator's other keys."""
        if not torch._C._are_functorch_transforms_active():
            return cast(R, self._apply(self._below_autograd, *arguments))
        from torch._functorch.autograd_function import enable_single_level_autograd_function

        # this is for the innermost transform alone: those around it come below, and need what forward() switches off
        modes = is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        with enable_single_level_autograd_function():
            return cast(R, self._apply(partial(self._below_level, modes), *arguments))

    def _below_level(self, modes: tuple[bool, bool], *arguments: Any) -> R:
        gradients, tangents = modes
        with torch.set_grad_enabled(gradients), forward_ad._set_fwd_grad_enabled(tangents):
            return self._below_autograd(*arguments)

    def _below_autograd(self, *arguments: Any) -> R:
        with torch._C._AutoDispatchBelowAutograd():
            return self._through_dispatcher(arguments)


def operator(mutates: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make a body, whose name and annotations are the schema, an operator. ``mutates``: arguments it writes."""
    return lambda body: Operator(body, mutates)


def wants_gradient(tensor: Tensor | None) -> bool:
    """Whether a gradient of ``tensor`` may be asked for. Under vmap only what it wraps would tell, and a compiler does
    not tell under func.grad: then yes."""
    if tensor is None or not torch.is_grad_enabled():
        return False
    return tensor.requires_grad or torch._C._are_functorch_transforms_active()


def is_constant(number: float) -> bool:
    """Whether a compiled graph is for this value alone; without a compiler nothing is."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # a second, at import

    return has_static_value(number)


def _varying(number: float | Varying | None) -> Tensor | None:
    """What the compiler can go on from in place of one that is no constant to it."""
    if isinstance(number, Varying):
        return number.tensor
    if number is None or is_constant(number):
        return None
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def _watched() -> bool:
    """Whether something that must see whole operators looks on."""
    return (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _many_gradients()
    )


def may_scale_in_place() -> bool:
    """Whether a backward pass may write into gradients that the forward pass has made: it is for one gradient, and not
    itself to be differentiated (create_graph), whose result must carry the error about second derivatives."""
    return not torch.is_grad_enabled() and not _many_gradients()


def _many_gradients() -> bool:
    return torch._C._dispatch_tls_is_dispatch_key_included(_OLD_VMAP)


def _first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    return arguments[0] if arguments[0] is not None else next(a for a in arguments if isinstance(a, Tensor))


def _raise_missing(name: str, derivative: str) -> NoReturn:
    raise RuntimeError(
        f"{name} has no {derivative} in its fused form, only plain gradients (backward, torch.autograd.grad); where you"
        f" need it, write the term with the formula in repdeg_fast.reference, which PyTorch differentiates in any way"
    )

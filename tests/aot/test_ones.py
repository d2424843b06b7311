"""Triton makes a constant of an argument that is 1, and constants have no methods: kernels compile with that too."""

import pytest

from hsv_kernels.backends import interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from hsv_kernels.ops.triton_utils import Configuration
from tests.aot.shipped import shipped

TARGET = GPUTarget("cuda", 90, 32)


def translate(configuration: Configuration, ones: list[str]) -> None:
    """The part of compilation that types matter to, with the arguments `ones` equal to 1."""
    kernel, signature = configuration.kernel, dict(configuration.signature)
    constexprs = dict(configuration.constexprs) | dict.fromkeys(ones, 1)
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constexprs else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
    )
    backend, context = make_backend(TARGET), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": configuration.num_warps, "num_stages": configuration.num_stages})
    source.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def forms() -> dict[str, Configuration]:
    """One configuration of each kernel and of each of its forms, sizes of tiles apart."""
    found = {}
    for (operation, *_), (_, configuration) in shipped().items():
        form = [f"{k}={v}" for k, v in configuration.constexprs.items() if isinstance(v, bool)]
        found.setdefault(" ".join([operation, configuration.kernel.__name__, *form]), configuration)
    return found


@pytest.mark.parametrize("configuration", [pytest.param(c, id=name) for name, c in forms().items()])
def test_arguments_may_be_one(configuration: Configuration) -> None:
    integers = [name for name, kind in configuration.signature.items() if kind in ("i32", "i64")]
    for ones in [*([name] for name in integers), integers]:
        try:
            translate(configuration, ones)
        except Exception as error:
            pytest.fail(f"with {', '.join(ones)} = 1: {error.__cause__ or error}")

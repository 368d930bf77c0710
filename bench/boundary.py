"""What torch's boundary around the multi-adapter linear costs the host: one call with gradients, forward and backward.

    python -m bench.boundary [--calls 2000]

The kernels are left out: every side calls the same function, which makes the outputs' empty tensors, with the same 18 arguments.
So what differs is the way through torch. Sides alternate in one process; microseconds, median of 15 rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch.autograd import Function

from kloss.kernels import make_segments, multi_lora
from kloss.kernels.segments import with_work

ROUNDS = 15
library = torch.library.Library("kloss_boundary", "DEF")


def forward(*args):
    """The op without its kernels."""
    return multi_lora._fake_forward(*args)


def backward(*args):
    """The gradients' op without its kernels."""
    return multi_lora._fake_backward(*args)


def function_over(forward_op: Callable, backward_op: Callable) -> type[Function]:
    """`multi_lora._MultiLora` over other ops."""

    class Over(Function):
        @staticmethod
        def forward(ctx, *args):
            y, s, keys = forward_op(*args)
            x, weight, bias, lora_a, lora_b, scaling, *lists, p, _, _, _, slices, exact = args
            ctx.save_for_backward(x, weight, lora_a, lora_b, scaling, s, keys, *lists, p)
            ctx.slices, ctx.exact = slices, exact
            ctx.mark_non_differentiable(s, keys)
            ctx.set_materialize_grads(False)
            return y, s, keys

        @staticmethod
        def backward(ctx, dy, _ds, _dkeys):
            need_x, _, _, need_a, need_b = ctx.needs_input_grad[:5]
            dx, d_a, d_b = backward_op(dy, *ctx.saved_tensors, ctx.slices, ctx.exact, need_x, need_a, need_b)
            return dx, None, None, d_a, d_b, *(None,) * 13

    return Over


@cache  # an operator is defined once in a process
def sides() -> dict[str, Callable]:
    """Name -> the op behind that boundary."""
    library.define(f"plain({multi_lora._SCHEMA}) -> (Tensor, Tensor, Tensor)")
    library.define(f"plain_backward({multi_lora._BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)")
    library.impl("plain", forward, "CPU")
    library.impl("plain_backward", backward, "CPU")
    ops = torch.ops.kloss_boundary
    below = function_over(lambda *args: _below_autograd(ops.plain, args), lambda *args: ops.plain_backward(*args))
    library.impl("plain", below.apply, "Autograd")

    def custom(name: str) -> list:
        schemas = {"": (forward, multi_lora._SCHEMA), "_backward": (backward, multi_lora._BACKWARD_SCHEMA)}
        return [
            torch.library.custom_op(
                f"kloss_boundary::{name}{tail}", function, mutates_args=(), schema=f"({schema}) -> (Tensor, Tensor, Tensor)"
            )
            for tail, (function, schema) in schemas.items()
        ]

    registered = custom("registered")
    registered[0].register_autograd(function_over(*registered).backward, setup_context=_save)
    return {
        "the function alone, no operator": function_over(forward, backward).apply,
        "define and impl, a function on Autograd (kloss)": ops.plain,
        "custom_op inside a function": function_over(*custom("wrapped")).apply,
        "custom_op with register_autograd": registered[0],
    }


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _save(ctx, inputs, output):
    x, weight, bias, lora_a, lora_b, scaling, *lists, p, _, _, _, slices, exact = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, scaling, *output[1:], *lists, p)
    ctx.slices, ctx.exact = slices, exact
    ctx.set_materialize_grads(False)


def arguments() -> tuple:
    """A small problem with dropout; x, A and B require gradients."""
    part = with_work(make_segments(torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 2))
    x, lora_a, lora_b = (torch.randn(*shape, requires_grad=True) for shape in ((8, 16), (2, 4, 16), (2, 16, 4)))
    random = torch.full((2,), 0.1), torch.zeros(2, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    return (
        x,
        torch.randn(16, 16),
        torch.randn(16),
        lora_a,
        lora_b,
        torch.ones(2),
        part.order,
        *part.work,
        None,
        *random,
        3,
        1,
        False,
    )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.boundary", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="of each side in a round")
    asked, args, found = parser.parse_args(given), arguments(), sides()
    dy, leaves, times = torch.ones(8, 16), (args[0], args[3], args[4]), {name: ([], []) for name in found}
    for _ in range(ROUNDS):
        for name, op in found.items():
            began = time.perf_counter()
            outputs = [op(*args)[0] for _ in range(asked.calls)]
            between = time.perf_counter()
            for y in outputs:
                torch.autograd.grad(y, leaves, dy)
            ended = time.perf_counter()
            times[name][0].append((between - began) / asked.calls * 1e6)
            times[name][1].append((ended - between) / asked.calls * 1e6)
    print(f"{'µs of the host a call, torch ' + torch.__version__:50} forward  backward")
    for name, (there, back) in times.items():
        print(f"{name:50} {statistics.median(there):7.1f}  {statistics.median(back):8.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Attention by every kernel that this device has: is the one that `auto` takes the fastest?

python benchmarks/attention.py                            a minute on two CPU cores
python benchmarks/attention.py --contexts 1024 --heads 12 --rows 64    GPT-2 124M's on a GPU

Forward and backward pass of the attention of one layer, as the model calls it (q, k and v are views of one
product), for each context and type. On a GPU `sdpa` is torch's own choice among FlashAttention,
memory-efficient and cuDNN's attention, which stand beside it one by one. The bar: `auto` within 15 % of
the fastest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from common import Row, finish, in_turn, parser
from snakegpt.model import Attention, Shape, choose_kernel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
PASSES = 10  # of a measurement, which is their median


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 512, 1024])
    made.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--channels", type=int, default=64, help="of a head")
    made.add_argument("--rows", type=int, default=8)
    args = made.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.types:
        for context in args.contexts:
            dtype = getattr(torch, name)
            shape = Shape(64, 1, args.heads, args.heads * args.channels, context, bias=False)
            chosen = choose_kernel(device, dtype, context)
            made_rows = args.rows, dtype, device
            sides = {side: passes(shape, side, *made_rows) for side in ("sdpa", "math")}
            if device == "cuda":
                sides |= {
                    b: passes(shape, b, *made_rows) for b in BACKENDS if runs(shape, b, *made_rows)
                }
            found = in_turn(args.rounds, **sides)
            ms = {side: statistics.median(values) * 1e3 for side, values in found.items()}
            ratio = ms[chosen] / min(ms.values())
            what = f"{name}, {context:,} tokens: {chosen}"
            rows.append(Row(what, "ms", ms, ratio, "at most 1.15 x", ratio <= 1.15))
    finish(rows, as_json=args.json)


def passes(
    shape: Shape, side: str, rows: int, dtype: torch.dtype, device: str
) -> Callable[[], float]:
    """What measures a side: seconds of a forward and a backward pass."""
    attention = Attention(shape, "math" if side == "math" else "sdpa")
    size = (rows, shape.context, 3, shape.heads, shape.channels // shape.heads)
    qkv = torch.randn(size, device=device, dtype=dtype, requires_grad=True)

    def one() -> None:
        backend = sdpa_kernel(BACKENDS[side]) if side in BACKENDS else nullcontext()
        with backend:
            found: Tensor = attention.attend(*qkv.permute(2, 0, 3, 1, 4), None)
            found.backward(torch.ones_like(found))
        qkv.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    def measure() -> float:
        one()
        seconds = []
        for _ in range(PASSES):
            started = time.perf_counter()
            one()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    return measure


def runs(shape: Shape, side: str, rows: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a backend takes this shape and type here."""
    try:
        passes(shape, side, rows, dtype, device)()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()

"""Attention alone: the gist mask in every kernel that runs here, against what others pay for the same tokens.

    python -m benchmarks.attention [--contexts 512,2048,8192] [--dtype bfloat16] [--json FILE]

One context of C tokens with 16 gists, and 4 queries of 64 tokens that read them; 8 heads, 4 of keys and values, of 64
dimensions (on a GPU 32, 8 and 128, and contexts of 2,048, 8,192 and 32,768). Peers: a dense mask in PyTorch's fused attention;
causal attention over the same tokens, which is what one would pay with no gist mask at all; softmax written out ("eager"); and
a padded row per query with its context repeated, under a dense mask. A visible pair is a query and a key that it sees; time per
visible pair is what a kernel without masked work keeps, whatever the mask. A way that runs out of memory is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention_masks import BACKENDS, GistLayout, Segment, dense_mask, gist_attention, why_not
from benchmarks.measure import machine, median_ratio, paired, parser, write_json

GISTS, QUERIES, QUERY = 16, 4, 64
CPU, GPU = {"heads": 8, "kv_heads": 4, "dim": 64}, {"heads": 32, "kv_heads": 8, "dim": 128}
LABELS = {"gist": "gist mask, ours", "causal": "no gist mask, plain causal", "dense": "dense gist mask, SDPA"}
LABELS |= {"eager": "dense gist mask, softmax written out", "padded": "a padded row per query, dense mask"}
EAGER_BYTES = 4 * 2**30  # scores in float32 of more than that are not computed


def few_shot(context: int) -> GistLayout:
    """A context with its gists, and queries that read them."""
    return GistLayout([Segment(context + GISTS, gists=GISTS), *[Segment(QUERY, reads=(0,))] * QUERIES])


def visible_pairs(layout: GistLayout) -> int:
    """Pairs of a query row and a key row that it sees."""
    return sum(s.tokens * (s.tokens + 1) // 2 + s.tokens * layout.width(i) for i, s in enumerate(layout.segments))


def random_states(layout: GistLayout, sizes: dict, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q (1, H, T, D), k and v (1, N, T, D), as a model hands them over: heads of one row next to each other."""
    numbers = torch.Generator(device).manual_seed(0)
    heads = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
    shapes = [(1, layout.tokens, n, sizes["dim"]) for n in heads]
    states = [torch.randn(shape, generator=numbers, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in states]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores, softmax in float32, weighted values: every one of T x T."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's attention under a dense mask; on a GPU heads are repeated, as its kernels for masks know no groups."""
    if q.is_cuda:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def padded_rows(x: Tensor, layout: GistLayout) -> Tensor:
    """A row (n, heads, context + query, D) for each of n queries: the context's rows again, and its own."""
    context, *queries = x.split([segment.tokens for segment in layout.segments], 2)
    return torch.cat([torch.cat([context, query], 2) for query in queries])


def ways(layout: GistLayout, states: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute this layout, and causal attention beside it; all give (1, H, T, D) or its last rows."""
    q, k, v = states
    device, dtype, dim = q.device, q.dtype, q.shape[3]
    mask = dense_mask(layout)
    one_row = dense_mask(GistLayout([layout.segments[0], layout.segments[1]]))
    found: dict[str, Callable[[], Tensor]] = {}
    for name in BACKENDS:
        if name != "dense" and why_not(name, device, dtype, dim) is None:
            found[f"gist {name}"] = partial(gist_attention, q, k, v, layout, backend=name)
            if name != "flex":
                whole = GistLayout([Segment(layout.tokens)])
                found[f"causal {name}"] = partial(gist_attention, q, k, v, whole, backend=name)
    found["dense mask"] = partial(masked, q, k, v, mask)
    if 4 * q.shape[1] * layout.tokens**2 <= EAGER_BYTES:
        found["eager"] = partial(eager, q, k, v, mask)
    found["padded rows"] = lambda: masked(*(padded_rows(x, layout) for x in states), one_row)
    return found


def largest_difference(name: str, output: Tensor, expected: Tensor) -> float | None:
    """Between a way's output and softmax over visible keys in float32; a causal one computes something else."""
    if name.startswith("causal"):
        return None
    if name == "padded rows":  # each row ends in its query
        output, expected = torch.cat(list(output[:, :, -QUERY:]), 1)[None], expected[:, :, -QUERIES * QUERY :]
    return (output.float() - expected).abs().max().item()


def forward(way: Callable[[], Tensor], states: list[Tensor]) -> Tensor:
    """Its output alone."""
    with torch.no_grad():
        return way()


def forward_and_backward(way: Callable[[], Tensor], states: list[Tensor]) -> Tensor:
    """Its output, after the gradients of q, k and v."""
    output = way()
    torch.autograd.grad(output, states, output)
    return output


def measure(context: int, sizes: dict, device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """Seconds of every way at one size, forward alone and with backward, in paired rounds."""
    layout = few_shot(context).to(device)
    states = random_states(layout, sizes, device, dtype)
    found, differences = ways(layout, states), {}
    expected = forward(partial(masked, *(x.detach().float() for x in states), dense_mask(layout)), states)
    for name, way in list(found.items()):
        try:
            differences[name] = largest_difference(name, forward_and_backward(way, states), expected)
        except torch.OutOfMemoryError:
            del found[name]
    seconds = {
        step.__name__: paired({name: partial(step, way, states) for name, way in found.items()}, rounds)
        for step in (forward, forward_and_backward)
    }
    whole = GistLayout([Segment(layout.tokens)])
    pairs = {name: visible_pairs(whole if name.startswith("causal") else layout) for name in found}
    return {"tokens": layout.tokens, "visible_pairs": pairs, "differences": differences, "seconds": seconds}


def main() -> None:
    """Measure, print a table, write the figures."""
    options = parser(__doc__, rounds=5)
    options.add_argument("--contexts", help="tokens of context, with commas between")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    arguments = options.parse_args()
    on_gpu = torch.cuda.is_available()
    device, sizes = torch.device("cuda" if on_gpu else "cpu"), GPU if on_gpu else CPU
    dtype = arguments.dtype or ("bfloat16" if on_gpu else "float32")
    contexts = arguments.contexts or ("2048,8192,32768" if on_gpu else "512,2048,8192")
    figures: dict = {"dtype": dtype, "sizes": sizes, "contexts": {}}
    print(
        f"{QUERIES} queries of {QUERY} tokens read {GISTS} gists; {sizes}; {dtype}; medians of {arguments.rounds}; {machine()}"
    )
    for context in map(int, contexts.split(",")):
        found = measure(context, sizes, device, getattr(torch, dtype), arguments.rounds)
        figures["contexts"][context] = found
        report(context, found, sizes)
    write_json(arguments.json, figures)


def report(context: int, found: dict, sizes: dict) -> None:
    """Print one size: milliseconds, how many times those of the fastest gist mask, nanoseconds per pair, and the difference."""
    one, two = found["seconds"]["forward"], found["seconds"]["forward_and_backward"]
    gist = min((name for name in two if name.startswith("gist")), key=lambda name: statistics.median(two[name]))
    print(f"\ncontext of {context:,} tokens, {found['tokens']:,} in all; ratios to {gist}")
    print(f"{'':14}    fwd ms  ratio  fwd+bwd ms  ratio        pairs  ns/pair   GFLOP/s    error")
    for name in two:
        ratios = [median_ratio(times[name], times[gist]) for times in (one, two)]
        first, both = (statistics.median(times[name]) for times in (one, two))
        pairs, error = found["visible_pairs"][name], found["differences"][name]
        # Two products forward, scores and values; five backward: the scores once more, and four gradients.
        flops = 14 * sizes["heads"] * sizes["dim"] * pairs
        print(
            f"{name:14} {1e3 * first:9.2f} {ratios[0]:6.2f} {1e3 * both:11.2f} {ratios[1]:6.2f} {pairs:12,} "
            f"{1e9 * both / pairs:8.2f} {flops / both / 1e9:9.1f} {'' if error is None else f'{error:.1e}':>8}"
        )


def draw(figures: dict, path: Path) -> None:
    """Time forward and backward over context lengths, and time per visible pair, from the figures of a JSON file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    contexts = sorted(map(int, figures["contexts"]))
    names = list(dict.fromkeys(name for c in contexts for name in figures["contexts"][str(c)]["visible_pairs"]))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time, rate = figure.subplots(1, 2)
    for name in names:
        points = [(c, found) for c in contexts if name in (found := figures["contexts"][str(c)])["visible_pairs"]]
        seconds = [statistics.median(found["seconds"]["forward_and_backward"][name]) for _, found in points]
        pairs = [found["visible_pairs"][name] for _, found in points]
        style = {"linewidth": 2.5, "zorder": 3} if name.startswith("gist") else {"linewidth": 1.2, "linestyle": "--"}
        label = LABELS.get(name.split()[0], name) + (f" ({name.split()[1]})" if name.split()[0] in ("gist", "causal") else "")
        time.plot([c for c, _ in points], [1e3 * s for s in seconds], marker="o", markersize=4, label=label, **style)
        rate.plot([c for c, _ in points], [1e9 * s / n for s, n in zip(seconds, pairs)], marker="o", markersize=4, **style)
    time.set(ylabel="milliseconds, forward and backward", title="one layer's attention")
    rate.set(ylabel="nanoseconds per visible pair", title="cost of what a row really sees")
    for axis in (time, rate):
        axis.set(xscale="log", yscale="log", xlabel="tokens of context")
        axis.set_xticks(contexts, [f"{c:,}" for c in contexts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rate.yaxis.set_major_formatter(ScalarFormatter())
    where = figures["machine"]["gpu"] or f"a CPU ({figures['machine']['threads']} threads)"
    sizes = figures["sizes"]
    heads = f"{sizes['heads']} heads, {sizes['kv_heads']} of keys and values, of {sizes['dim']}"
    figure.suptitle(
        f"A context, its {GISTS} gists, {QUERIES} queries of {QUERY} tokens; {heads}; {figures['dtype']} on {where}",
        fontsize=10,
    )
    time.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

"""The fewest layers to keep in float32 so that a variant stays within the user's limits.

Every node is ranked by the error that it adds: that of its output less the largest of its inputs, both against the
float32 model. The nodes at the top are then kept, as many as bisection finds necessary, and those that turn out to be
needless are let go. Each trial is a variant that is made, run in ONNX Runtime and measured over all images; activations
are compared a chunk of tensors at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx

from engines import ort
from engines.runtime import BuildRequest
from export.errors import CheckFailed
from pipeline import divergence, verify
from pipeline.build import Limits

Make = Callable[[Path, tuple[str, ...]], None]
IMAGES_AT_ONCE = 8


def search(source: Path, make: Make, images: Mapping[str, np.ndarray], limits: Limits, target: Path,
           progress: Callable[[str], None]) -> tuple[str, ...]:
    """Names of the nodes to keep, none if the whole variant is within `limits`; that variant is left at `target`.

    Raises CheckFailed if no choice is within them.
    """
    truth, made = outputs(source, images), list[tuple[str, ...]]()

    def trial(keep: tuple[str, ...]) -> tuple[float, float]:
        make(target, keep)
        made.append(keep)
        found = outputs(target, images)
        rows = [verify.compare(name, len(truth[name]), found[name], truth[name]) for name in truth]
        error, agreement = max(r.relative_l2 for r in rows), min(r.top1 for r in rows)
        progress(f"{len(keep)} layers kept: relative L2 {error:.2e}, top-1 agreement {agreement:.1%}")
        return error, agreement

    first = trial(())
    if limits.holds(*first):
        return ()
    ranked = rank(source, target, images)
    low, high = 0, len(ranked)  # `low` kept layers are too few; `high` are enough, once they were tried
    if not limits.holds(*trial(ranked)):
        raise CheckFailed("precision search", f"relative L2 {first[0]:.2e}, top-1 agreement {first[1]:.1%}",
                          "the limits asked for", "they do not hold with every layer in float32 either")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if limits.holds(*trial(ranked[:middle])) else (middle, high)
    kept = _without_needless(ranked[:high], lambda keep: limits.holds(*trial(keep)))
    if made[-1] != kept:
        make(target, kept)
    return kept


def _without_needless(kept: tuple[str, ...], enough: Callable[[tuple[str, ...]], bool]) -> tuple[str, ...]:
    """`kept` without what can go, halves first, then quarters (Zeller's delta debugging).

    It goes down to a sixteenth, or to single layers where there are few: a trial takes seconds.
    """
    size, smallest = len(kept) // 2, max(1, len(kept) // 16)
    while size >= smallest:
        start = 0
        while start < len(kept):
            fewer = kept[:start] + kept[start + size:]
            if fewer and enough(fewer):
                kept = fewer
            else:
                start += size
        size //= 2
    return kept


def outputs(model: Path, images: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of `model` in ONNX Runtime on the CPU, for all images, a few at a time where the batch is open."""
    count = len(next(iter(images.values())))
    with ort.load(BuildRequest(model, "onnxruntime"), model) as engine:
        fixed = engine.inputs[0].shape[0]
        step = fixed or IMAGES_AT_ONCE
        parts = [engine.run({n: a[i:i + step] for n, a in images.items()}) for i in range(0, count - (count % step
                 if fixed else 0), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rank(source: Path, variant: Path, images: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Node names by the error that each adds in `variant`, the largest first."""
    errors = dict(divergence.errors(source, BuildRequest(variant, "onnxruntime"), images))
    nodes = onnx.load(source).graph.node
    computed = {o for n in nodes for o in n.output}
    for node in reversed(nodes):  # what was merged into its reader has that one's error: a Conv before its Relu
        behind = max((errors[o] for o in node.output if o in errors), default=0.0)
        errors |= {i: behind for i in node.input if i in computed and i not in errors}
    added = {node.name: max(errors.get(o, 0.0) for o in node.output)
             - max((errors[i] for i in node.input if i in errors), default=0.0) for node in nodes if node.name}
    return tuple(sorted(added, key=lambda name: -added[name]))

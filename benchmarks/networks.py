"""The README's table of networks: parameters and GFLOPs counted on the exported graph of each.

    python -m benchmarks.networks
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from export import catalog
from pipeline.export import ExportRequest, export


def main() -> None:
    print("| network | input | classes | parameters (million) | GFLOPs | nodes | file (MB) |")
    print("|---|---|---|---|---|---|---|")
    for name, spec in catalog.NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            result = export(ExportRequest(name, Path(folder), checks=False))
            path = result.folder / "model.onnx"
            import keras
            import onnx

            nodes, size = len(onnx.load(path).graph.node), path.stat().st_size / 1e6
        keras.backend.clear_session()
        cost = result.manifest["cost"]
        classes = spec.classes or f"{spec.options['embedding'].default} (embedding)"
        print(f"| {name} | {'x'.join(map(str, spec.size))} | {classes} | {cost['parameters'] / 1e6:.2f} | "
              f"{cost['gflops']:.2f} | {nodes} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()

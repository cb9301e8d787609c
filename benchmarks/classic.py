"""The classic convnet benchmark with today's engines: six networks, forward, batch 32, 100 steps.

    python -m benchmarks.classic [--networks alexnet,vgg_16,...] [--batch 32] [--steps 100]

TensorFlow, ONNX Runtime fp32 and int8 take turns in one run for each network; the runs, with every sample, are in the
result file. `alexnet_no_lrn` is alexnet without its two normalisations.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.common import described, save
from engines.runtime import Profile
from pipeline import analysis
from pipeline import benchmark as benchmark_stage
from pipeline import build as build_stage
from pipeline.export import ExportRequest, export

NETWORKS = ("alexnet", "alexnet_no_lrn", "inception_resnet_v1", "inception_v3", "resnet_v2_152", "vgg_16")
ENGINES = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("tensorflow", "fp32"))


def measured(name: str, folder: Path, batch: int, steps: int) -> benchmark_stage.Result:
    without = name.endswith("_no_lrn")
    model = str(export(ExportRequest(name.removesuffix("_no_lrn"), folder, name, saved_model=True,
                                     options={"lrn": "false"} if without else {})).folder)
    for runtime, precision in ENGINES:
        build_stage.build(build_stage.Request(model, folder, (runtime,), (precision,),
                                              profiles=(Profile(batch, batch, batch),)))
    return benchmark_stage.benchmark(benchmark_stage.Request(model, folder, batches=(batch,), steps=steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/classic.json"))
    asked = parser.parse_args()
    result = described("classic") | {"runs": []}
    for name in asked.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(name, Path(folder), asked.batch, asked.steps)
            result["runs"].append(json.loads(found.path.read_text("utf-8")))
        for row in analysis.rows(found.run):
            ratio = "" if row.speedup is None else f", {row.speedup.ratio:.2f} times TensorFlow ({row.speedup.verdict})"
            print(f"{name:20s} {row.series.runtime:12s} {row.series.precision:5s} "
                  f"{row.summary.median.value / 1e9:.3f} s, {row.images_per_second:.1f} images/s{ratio}", flush=True)
        save(asked.out, result)


if __name__ == "__main__":
    main()

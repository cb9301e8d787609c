"""Triton's ONNX Runtime backend for machines without a GPU, as a Python-based backend.

`serve` copies this file as `backends/onnxruntime/model.py`: it then serves models whose configuration says
`backend: "onnxruntime"`, unchanged. It runs in the server's stub process, in an environment of its own, and imports
nothing of enginesmith.

https://github.com/triton-inference-server/backend/blob/main/docs/python_based_backends.md
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

# what the C++ backend reads too, and what it sets by it
INTEGERS = {"intra_op_thread_count": "intra_op_num_threads", "inter_op_thread_count": "inter_op_num_threads"}

TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_FP16": "tensor(float16)", "TYPE_FP64": "tensor(double)",
         "TYPE_STRING": "tensor(string)", "TYPE_BOOL": "tensor(bool)"} | {
    f"TYPE_{sign.upper()}INT{bits}": f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class TritonPythonModel:
    """One instance of a model. Triton gives it the requests of a dynamic batch together."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        return auto_complete_model_config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or "model.onnx"
        path = os.path.join(args["model_repository"], args["model_version"], file)
        try:
            self.session = onnxruntime.InferenceSession(path, options(config), providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a C++ exception type for each status code
            raise pb_utils.TritonModelException(f"{path}: {error}") from error
        self.inputs = [one["name"] for one in config["input"]]
        self.outputs = [one["name"] for one in config["output"]]
        self.batched = config["max_batch_size"] > 0
        for kind, there in (("input", self.session.get_inputs()), ("output", self.session.get_outputs())):
            reason = difference(kind, config[kind], {one.name: one for one in there}, self.batched)
            if reason:
                raise pb_utils.TritonModelException(f"{path}: {reason}")

    def execute(self, requests):
        """A response for each request: a request that cannot be served does not fail the others of its batch."""
        feeds = [feed(request, self.inputs) for request in requests]
        wrong = [refusal(one) for one in feeds]
        good = [i for i, reason in enumerate(wrong) if reason is None]
        responses = [None if reason is None else pb_utils.InferenceResponse(error=reason) for reason in wrong]
        try:
            for i, outputs in zip(good, self.run([feeds[i] for i in good])):
                asked = requests[i].requested_output_names()
                responses[i] = pb_utils.InferenceResponse(
                    [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in asked])
        except Exception as error:
            failed = pb_utils.TritonError(f"inference failed: {error}", pb_utils.TritonError.INTERNAL)
            responses = [response or pb_utils.InferenceResponse(error=failed) for response in responses]
        return responses

    def run(self, feeds):
        """The outputs of each of `feeds`; the rows of all go through the network together."""
        if not feeds:
            return []
        if not self.batched:
            return [dict(zip(self.outputs, self.session.run(self.outputs, one))) for one in feeds]
        together = feeds[0] if len(feeds) == 1 else {
            name: np.concatenate([one[name] for one in feeds]) for name in self.inputs}
        found = self.session.run(self.outputs, together)
        ends = np.cumsum([len(one[self.inputs[0]]) for one in feeds])[:-1]
        parts = [np.split(array, ends) for array in found]
        return [dict(zip(self.outputs, arrays)) for arrays in zip(*parts)]


def options(config):
    made = onnxruntime.SessionOptions()
    made.log_severity_level = 3
    for name, value in config.get("parameters", {}).items():
        if name in INTEGERS:
            setattr(made, INTEGERS[name], int(value["string_value"]))
    return made


def difference(kind, configured, there, batched):
    """How the tensors of the model differ from the configured ones, which alone Triton checks requests by; or None."""
    if kind == "input" and len(configured) != len(there):
        return f"the model has the inputs {sorted(there)}, the configuration {[one['name'] for one in configured]}"
    for one in configured:
        found = there.get(one["name"])
        if found is None:
            return f"the model has no {kind} '{one['name']}', but {sorted(there)}"
        if TYPES.get(one["data_type"], found.type) != found.type:
            return f"{kind} '{one['name']}' is {found.type} in the model, {one['data_type']} in the configuration"
        dims = ([-1] if batched else []) + [int(n) for n in (one.get("reshape") or {}).get("shape", one["dims"])]
        if len(dims) != len(found.shape) or any(
                isinstance(n, int) and m not in (-1, n) for n, m in zip(found.shape, dims)):
            return f"{kind} '{one['name']}' has the shape {found.shape} in the model, {dims} in the configuration"
    return None


def feed(request, names):
    return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}


def refusal(arrays):
    """Triton has checked names, types and shapes; what is not a number it lets through."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return pb_utils.TritonError(f"input '{name}' has values that are not finite",
                                        pb_utils.TritonError.INVALID_ARG)
    return None

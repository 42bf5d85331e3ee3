"""Opens ONNX files in ONNX Runtime: the one place where the package makes a session."""

import re
from pathlib import Path
from typing import Any

from evenkeel.errors import ConfigurationError

__all__ = ["external_files", "open_session", "simplify_file"]


def open_session(file: Path, threads: int = 1) -> Any:
    """Opens the model in `file` on the CPU; gives an `onnxruntime.InferenceSession`.

    ONNX Runtime would send usage data to its maker; `evenkeel/__init__.py` turns that off before it is imported.

    Args:
        file: ONNX. Weights in files of their own are read from beside it, whatever the working directory is.
        threads: that one pass may use.

    Raises:
        ConfigurationError: it is not an ONNX model that can be run, or its weights are not beside it.
    """
    if threads < 1:
        raise ConfigurationError(f"threads must be 1 or more, found {threads}")
    import onnxruntime  # here, since a worker that runs a Python callable does without

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what goes wrong is raised, and then said once
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # workers share the machine's cores
    try:
        # From the path: for a model given as bytes, weights are looked for in the working directory.
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common base
        raise ConfigurationError(
            f"{file} is not an ONNX model that can be run: {error}{_missing_weights(file)}"
        ) from error


def simplify_file(file: Path) -> None:
    """Rewrites the model in `file` as ONNX Runtime would before a run, as far as its operators stay ONNX's own.

    Constants are folded; paddings, norms and factors are joined with the convolutions beside them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    options.log_severity_level = 4  # it warns of constants that are of no use any more, one by one
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def external_files(content: bytes) -> list[str]:
    """Names the files beside the model that hold its weights.

    Found by the bytes of an entry with key `location`, since reading the graph would need the package onnx.
    """
    found = set()
    # A length is one byte below 128, two up to 16,383: the lower seven bits first.
    for match in re.finditer(rb"\x0a\x08location\x12([\x80-\xff]?)([\x01-\x7f])", content):
        size = (match[1][0] & 0x7F) + (match[2][0] << 7) if match[1] else match[2][0]
        found.add(content[match.end() : match.end() + size].decode("utf-8", "replace"))
    return sorted(name for name in found if name.isprintable())


def _missing_weights(file: Path) -> str:
    try:
        missing = [name for name in external_files(file.read_bytes()) if not (file.parent / name).is_file()]
    except OSError:
        return ""
    return f"; its weights are in {', '.join(missing)}, which is not beside it" if missing else ""

"""Says of a model what the protocol's extensions for statistics and configuration ask, as JSON has it.

Triton's perf_analyzer and clients read both; what a gateway does not measure apart is 0 there, not a guess.
"""

import time
from typing import Any

from evenkeel.serving.front.served import ServedModel
from evenkeel.serving.gateway.gateway import Gateway
from evenkeel.serving.gateway.histogram import Histogram, total

__all__ = ["model_configuration", "model_statistics"]

_NONE = Histogram()
_SUCCESS = 200


def model_statistics(model: ServedModel) -> dict[str, Any]:
    """Gives an element of `model_stats`.

    Success and failure are requests, from the first byte to the answer. Queue and computation are tasks of workers, of
    which a request may have several, so that their counts may be larger.
    """
    statuses = model.times.by_status
    succeeded = statuses.get(_SUCCESS, _NONE)
    failed = total(times for status, times in statuses.items() if status != _SUCCESS)
    items = executions = 0
    queue = infer = _NONE
    if isinstance(model.gateway, Gateway):
        stats = model.gateway.stats
        items = sum(stats.sources.values())
        queue, infer = stats.queue_times, total((stats.service_times, stats.pass_times))
        executions = infer.count
    last_s = model.times.last_s
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round((time.time() - (time.monotonic() - last_s)) * 1e3) if last_s else 0,
        "inference_count": items,
        "execution_count": executions,
        "inference_stats": {
            "success": _duration(succeeded),
            "fail": _duration(failed),
            "queue": _duration(queue),
            "compute_input": _duration(_NONE),
            "compute_infer": _duration(infer),
            "compute_output": _duration(_NONE),
            "cache_hit": _duration(_NONE),
            "cache_miss": _duration(_NONE),
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


def model_configuration(model: ServedModel) -> dict[str, Any]:
    """Gives what Triton calls a model's configuration, as far as it means anything here."""
    card = model.card
    configuration: dict[str, Any] = {
        "name": model.name,
        "platform": "evenkeel",
        "backend": "evenkeel",
        "version_policy": {"specific": {"versions": [model.version]}},
        "max_batch_size": model.gateway.max_items,
        "input": [
            {"name": card.input_name, "data_type": f"TYPE_{card.datatype}", "dims": list(card.input_shape)},
        ],
        "output": [
            {"name": name, "data_type": _data_type(datatype), **_dims(len(card.classes) if name == "scores" else None)}
            for name, datatype in model.outputs.items()
        ],
        "model_transaction_policy": {"decoupled": False},
    }
    if isinstance(model.gateway, Gateway):
        policy = model.gateway.policy
        count = len(model.gateway.replicas.all)
        configuration["instance_group"] = [{"name": "replicas", "kind": "KIND_CPU", "count": count}]
        configuration["parameters"] = {
            "policy": {"string_value": policy.name},
            "backups": {"string_value": str(len(model.gateway.backups))},
            "deadline_s": {"string_value": f"{policy.deadline_s:g}"},
        }
    return configuration


def _duration(times: Histogram) -> dict[str, int]:
    return {"count": times.count, "ns": round(times.sum_s * 1e9)}


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _dims(columns: int | None) -> dict[str, Any]:
    """Gives the shape of an output without the batch axis; one value for each item has no other axis."""
    return {"dims": [1], "reshape": {"shape": []}} if columns is None else {"dims": [columns]}

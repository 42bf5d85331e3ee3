"""Lists the messages of the protocol's gRPC service, but for those of inference, as tables for `protobuf`.

Names and numbers are those of the published service definition, with Triton's extensions. A dict as the REST form has
it is written by its table as it is: names that the table does not know are left out.
"""

from evenkeel.oip.protobuf import MessageTable

__all__ = [
    "CONFIG",
    "HEALTH",
    "INDEX",
    "INDEX_REQUEST",
    "LIVE",
    "MODEL_METADATA",
    "MODEL_REQUEST",
    "READY",
    "REPOSITORY_REQUEST",
    "SERVER_METADATA",
    "SERVICE",
    "STATISTICS",
]

SERVICE = "inference.GRPCInferenceService"

LIVE: MessageTable = {1: ("live", "bool")}
READY: MessageTable = {1: ("ready", "bool")}
HEALTH: MessageTable = {1: ("status", "int32")}  # grpc.health.v1: 1 is serving, 2 is not
MODEL_REQUEST: MessageTable = {1: ("name", "string"), 2: ("version", "string")}
SERVER_METADATA: MessageTable = {1: ("name", "string"), 2: ("version", "string"), 3: ("extensions", ["string"])}

_TENSOR: MessageTable = {1: ("name", "string"), 2: ("datatype", "string"), 3: ("shape", ["int64"])}
MODEL_METADATA: MessageTable = {
    1: ("name", "string"),
    2: ("versions", ["string"]),
    3: ("platform", "string"),
    4: ("inputs", [_TENSOR]),
    5: ("outputs", [_TENSOR]),
    1001: ("digest", "string"),  # of our own; others skip it
}

_DURATION: MessageTable = {1: ("count", "uint64"), 2: ("ns", "uint64")}
_STATISTICS: MessageTable = {
    1: ("name", "string"),
    2: ("version", "string"),
    3: ("last_inference", "uint64"),
    4: ("inference_count", "uint64"),
    5: ("execution_count", "uint64"),
    6: (
        "inference_stats",
        {
            1: ("success", _DURATION),
            2: ("fail", _DURATION),
            3: ("queue", _DURATION),
            4: ("compute_input", _DURATION),
            5: ("compute_infer", _DURATION),
            6: ("compute_output", _DURATION),
            7: ("cache_hit", _DURATION),
            8: ("cache_miss", _DURATION),
        },
    ),
}
STATISTICS: MessageTable = {1: ("model_stats", [_STATISTICS])}

_DATA_TYPES = (
    "TYPE_INVALID",
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_UINT16",
    "TYPE_UINT32",
    "TYPE_UINT64",
    "TYPE_INT8",
    "TYPE_INT16",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_STRING",
    "TYPE_BF16",
)
_KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
_RESHAPE: MessageTable = {1: ("shape", ["int64"])}
CONFIG: MessageTable = {
    1: (
        "config",
        {
            1: ("name", "string"),
            2: ("platform", "string"),
            3: ("version_policy", {3: ("specific", {1: ("versions", ["int64"])})}),
            4: ("max_batch_size", "int32"),
            5: ("input", [{1: ("name", "string"), 2: ("data_type", _DATA_TYPES), 4: ("dims", ["int64"])}]),
            6: (
                "output",
                [
                    {
                        1: ("name", "string"),
                        2: ("data_type", _DATA_TYPES),
                        3: ("dims", ["int64"]),
                        5: ("reshape", _RESHAPE),
                    }
                ],
            ),
            7: ("instance_group", [{1: ("name", "string"), 2: ("count", "int32"), 4: ("kind", _KINDS)}]),
            14: ("parameters", {"map": {1: ("string_value", "string")}}),
            17: ("backend", "string"),
            19: ("model_transaction_policy", {1: ("decoupled", "bool")}),
        },
    )
}

INDEX_REQUEST: MessageTable = {1: ("repository_name", "string"), 2: ("ready", "bool")}
INDEX: MessageTable = {
    1: (
        "models",
        [{1: ("name", "string"), 2: ("version", "string"), 3: ("state", "string"), 4: ("reason", "string")}],
    )
}
REPOSITORY_REQUEST: MessageTable = {
    1: ("repository_name", "string"),
    2: ("model_name", "string"),
    3: ("parameters", {"map": {}}),
}

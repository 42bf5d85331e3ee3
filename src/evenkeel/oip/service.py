"""Lists the messages of the protocol's gRPC service, but for those of inference, as tables for `protobuf`.

Names and numbers are those of the published service definition, with Triton's extensions. A dict as the REST form has
it is written by its table as it is: names that the table does not know are left out.
"""

from evenkeel.oip.protobuf import MessageTable

__all__ = [
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

INDEX_REQUEST: MessageTable = {1: ("repository_name", "string"), 2: ("ready", "bool")}
INDEX: MessageTable = {
    1: (
        "models",
        [{1: ("name", "string"), 2: ("version", "string"), 3: ("state", "string"), 4: ("reason", "string")}],
    )
}
REPOSITORY_REQUEST: MessageTable = {1: ("repository_name", "string"), 2: ("model_name", "string")}

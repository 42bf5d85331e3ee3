"""Ray Serve with the trivial model: raw bytes in, raw bytes out, over HTTP and gRPC.

Arguments: the two ports, and `direct` if they are the replica's own, given to it by the environment.
"""

import socket
import sys
import time

import grpc
import numpy as np
import ray
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from trivial_model import make


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
class Model:
    def __init__(self):
        self.model = make()

    async def __call__(self, request: Request) -> Response:
        return Response(self._scores(await request.body()), media_type="application/octet-stream")

    async def Classify(self, message: BytesValue) -> BytesValue:
        return BytesValue(value=self._scores(message.value))

    def _scores(self, image: bytes) -> bytes:
        return self.model(np.frombuffer(image, np.float32).reshape(1, 3, 32, 32)).tobytes()


def add_classifier(servicer, server):
    """What a compiler of protocols would write for a service with one method from BytesValue to BytesValue."""
    method = grpc.unary_unary_rpc_method_handler(
        servicer.Classify,
        request_deserializer=BytesValue.FromString,
        response_serializer=BytesValue.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peers.Classifier", {"Classify": method}),))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


if __name__ == "__main__":
    # Ray starts its proxies even where nobody asks them; they must not take the replica's ports.
    direct = "direct" in sys.argv[3:]
    http_port, grpc_port = (free_port(), free_port()) if direct else map(int, sys.argv[1:3])
    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(
        http_options={"host": "127.0.0.1", "port": http_port},
        grpc_options={"port": grpc_port, "grpc_servicer_functions": ["ray_server.add_classifier"]},
        logging_config={"enable_access_log": False},
    )
    serve.run(Model.bind())
    while True:
        time.sleep(3600)

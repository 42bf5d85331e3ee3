"""Ray Serve with the trivial model: raw bytes in, raw bytes out. Argument: port."""

import sys
import time

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from trivial_model import make


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
class Model:
    def __init__(self):
        self.model = make()

    async def __call__(self, request: Request) -> Response:
        rows = np.frombuffer(await request.body(), np.float32).reshape(1, 3, 32, 32)
        return Response(self.model(rows).tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(
        http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config={"enable_access_log": False}
    )
    serve.run(Model.bind())
    while True:
        time.sleep(3600)

"""LitServe with the trivial model. Arguments: port, one for gRPC, and `fast` for its ZeroMQ queue."""

import base64
import sys

import litserve
import numpy as np
from trivial_model import make


class Api(litserve.LitAPI):
    def setup(self, device):
        self.model = make()

    def decode_request(self, request):  # LitServe looks for this name
        return np.frombuffer(base64.b64decode(request["data"]), np.float32).reshape(1, 3, 32, 32)

    def predict(self, inputs):
        return self.model(inputs)

    def encode_response(self, output):
        return {"scores": output[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(), accelerator="cpu", workers_per_device=1, timeout=30, fast_queue="fast" in sys.argv[3:]
    )
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False, generate_client_file=False
    )

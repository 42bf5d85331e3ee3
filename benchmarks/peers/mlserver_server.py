"""MLServer with the trivial model, over the Open Inference Protocol. Arguments: ports, number of parallel workers."""

import asyncio
import sys

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from trivial_model import make


class Model(MLModel):
    async def load(self) -> bool:
        self.model = make()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        scores = self.model(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", scores)])


async def main() -> None:
    settings = Settings(
        host="127.0.0.1",
        http_port=int(sys.argv[1]),
        grpc_port=int(sys.argv[2]),  # it cannot be left out
        metrics_endpoint=None,
        parallel_workers=int(sys.argv[3]),
        debug=False,
    )
    server = MLServer(settings)
    await server.start([ModelSettings(name="trivial", implementation="mlserver_server.Model")])


if __name__ == "__main__":
    asyncio.run(main())

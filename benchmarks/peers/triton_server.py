"""Triton with the trivial model, through nvidia-pytriton. Arguments: ports for HTTP and gRPC."""

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from trivial_model import CLASSES, make

if __name__ == "__main__":
    http_port, grpc_port = map(int, sys.argv[1:3])
    model = make()

    @batch
    def infer(images):
        return [model(images)]

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=http_port,
        grpc_address="127.0.0.1",
        grpc_port=grpc_port,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="trivial",
            infer_func=infer,
            inputs=[Tensor(name="images", dtype=np.float32, shape=(3, 32, 32))],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(CLASSES,))],
            config=ModelConfig(max_batch_size=16, batching=True),
            strict=False,
        )
        triton.serve()

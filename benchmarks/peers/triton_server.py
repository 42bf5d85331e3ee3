"""Triton with the trivial model, through nvidia-pytriton. Argument: port."""

import sys

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from trivial_model import CLASSES, make

if __name__ == "__main__":
    port = int(sys.argv[1])
    model = make()

    @batch
    def infer(images):
        return [model(images)]

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        allow_grpc=False,
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

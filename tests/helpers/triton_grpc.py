"""tritonclient's gRPC side, which may be loaded beside kserve's.

Both register messages of the same names; tritonclient's are put into a pool of their own.
"""

from unittest import mock

from google.protobuf import descriptor_pool

_POOL = descriptor_pool.DescriptorPool()

with mock.patch.object(descriptor_pool, "Default", return_value=_POOL):
    import tritonclient.grpc as triton_grpc
    import tritonclient.grpc.aio as triton_grpc_aio
    from tritonclient.grpc import service_pb2

__all__ = ["service_pb2", "triton_grpc", "triton_grpc_aio"]

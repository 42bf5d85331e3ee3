"""What a hook reads of a bucket."""

import pytest
import torch
from torch import Tensor, nn

import evenkeel
from evenkeel.errors import ConfigurationError
from evenkeel.reducers.ranks.thread_collectives import thread_collectives
from evenkeel.training.hook.buckets import as_gradient_of, gradient_views
from training_helpers import Bucket, Model, gradients_of


def complex_bucket(offset: int = 0) -> tuple[Bucket, list[Tensor]]:
    """As DDP makes it: the buffer holds twice the numbers that its own views name, and these lie at wrong places."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.complex64)) for shape in ((3, 4), (), (2, 0), (5, 1))]
    true = [torch.randn(parameter.shape, dtype=torch.complex64) for parameter in parameters]
    pairs = torch.cat([torch.view_as_real(each).flatten() for each in true])
    buffer = torch.cat([torch.zeros(offset), pairs])[offset:]
    views, begin = [], offset
    for parameter in parameters:
        views.append(buffer.as_strided(parameter.shape, parameter.stride(), begin))
        begin += parameter.numel()
    return Bucket(0, True, parameters, buffer, views), true


@pytest.mark.parametrize("offset", [0, 6])
def test_views_of_complex_parameters_hold_all_their_numbers(offset: int) -> None:
    bucket, true = complex_bucket(offset)
    views = gradient_views(bucket)
    assert sum(view.numel() for view in views) == bucket.flat.numel()
    for parameter, view, expected in zip(bucket.members, views, true, strict=True):
        assert torch.equal(as_gradient_of(parameter, view), expected)
    views[0].fill_(7)
    assert torch.equal(bucket.flat[:24], torch.full((24,), 7.0))


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_bucket_with_numbers_that_no_parameter_has_is_refused(pipelined: bool) -> None:
    (ranks,) = thread_collectives(1)
    state = evenkeel.HookState(None, reducer=evenkeel.Sharded(ranks))
    (bucket,) = Model([(3, 2), (4,)]).buckets(gradients_of(0, 0, [(3, 2), (4,)]), [[0, 1]])
    bucket.flat = torch.cat([bucket.flat, torch.ones(1)])
    with pytest.raises(ConfigurationError, match=r"a bucket of 11 numbers holds gradients of 10, .* torch\.float32"):
        (evenkeel.PipeSGD(state) if pipelined else state).average(bucket)

"""evenkeel keeps distributed machine learning on an even keel: the public names of both wings.

Each name is loaded on first use: what trains brings torch, which serving does without. Fakes and the virtual clock for
your own tests stand in `evenkeel.testing`.
"""

import os as _os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from evenkeel.errors import MissingExtraError as _MissingExtraError
from evenkeel.version import __version__ as __version__

# ONNX Runtime (1.31, Linux) sends usage data to its maker unless this stands in the environment when it is imported.
# Here, since every module of ours, in every child process too, is imported after this one. Say 0 yourself to allow it.
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from evenkeel.coding.answers.berrut import Berrut as Berrut
    from evenkeel.coding.answers.boxes import BoxCollage as BoxCollage
    from evenkeel.coding.answers.cheap import Cheap as Cheap
    from evenkeel.coding.answers.collage import Collage as Collage
    from evenkeel.coding.answers.elastic import Elastic as Elastic
    from evenkeel.coding.answers.parity import (
        ConcatEncoder as ConcatEncoder,
        Parity as Parity,
        SumEncoder as SumEncoder,
    )
    from evenkeel.coding.answers.replicate import Replicate as Replicate
    from evenkeel.coding.answers.scores import ScoreForm as ScoreForm
    from evenkeel.coding.answers.tiles import Pixels as Pixels
    from evenkeel.coding.code import Answer as Answer, Code as Code, Task as Task
    from evenkeel.coding.sum_code import SumCode as SumCode
    from evenkeel.coding.sums.error_feedback import ErrorFeedback as ErrorFeedback
    from evenkeel.coding.sums.fixed_point import FixedPoint as FixedPoint
    from evenkeel.coding.sums.gradiveq import GradiVeQ as GradiVeQ
    from evenkeel.coding.sums.low_rank import LowRank as LowRank
    from evenkeel.coding.sums.thc import THC as THC
    from evenkeel.errors import (
        BackendError as BackendError,
        BackendLostError as BackendLostError,
        CodeError as CodeError,
        ConfigurationError as ConfigurationError,
        DeadlineError as DeadlineError,
        EvenkeelError as EvenkeelError,
        LabError as LabError,
        MissingExtraError as MissingExtraError,
        OverloadedError as OverloadedError,
        ProtocolError as ProtocolError,
        ReducerError as ReducerError,
        RequestError as RequestError,
        SlowRequestError as SlowRequestError,
        TooLargeError as TooLargeError,
        UnknownModelError as UnknownModelError,
        UnreadableImageError as UnreadableImageError,
        UnsupportedError as UnsupportedError,
    )
    from evenkeel.reducers.process_group import ProcessGroup as ProcessGroup
    from evenkeel.reducers.sharded import Sharded as Sharded
    from evenkeel.reducers.switch import SwitchReducer as SwitchReducer
    from evenkeel.serving.gateway.gateway import Gateway as Gateway
    from evenkeel.serving.gateway.policy import Policy as Policy
    from evenkeel.serving.simulate import Fleet as Fleet, simulate as simulate
    from evenkeel.training.coded.estimators import (
        CodedLinearSVC as CodedLinearSVC,
        CodedLogisticRegression as CodedLogisticRegression,
        CodedRidge as CodedRidge,
    )
    from evenkeel.training.coded.tcp_link import TcpDevices as TcpDevices
    from evenkeel.training.hook.ddp_hook import comm_hook as comm_hook
    from evenkeel.training.hook.hook_state import HookState as HookState
    from evenkeel.training.hook.pipe_sgd import PipeSGD as PipeSGD
    from evenkeel.training.hook.registering import register as register
    from evenkeel.training.hook.skipping import named as named
    from evenkeel.training.plan.advice import recommend as recommend
    from evenkeel.training.plan.code_costs import bf16 as bf16
    from evenkeel.training.plan.measure import measure_link as measure_link, measure_step as measure_step
    from evenkeel.training.plan.measure_code import measure_code as measure_code
    from evenkeel.training.plan.timing import predict as predict

# Module -> the public names that it holds. `test_public_names` sees that the imports above, for type checkers, agree.
_HOMES = {
    "evenkeel.coding.answers.berrut": ("Berrut",),
    "evenkeel.coding.answers.boxes": ("BoxCollage",),
    "evenkeel.coding.answers.cheap": ("Cheap",),
    "evenkeel.coding.answers.collage": ("Collage",),
    "evenkeel.coding.answers.elastic": ("Elastic",),
    "evenkeel.coding.answers.parity": (
        "ConcatEncoder",
        "Parity",
        "SumEncoder",
    ),
    "evenkeel.coding.answers.replicate": ("Replicate",),
    "evenkeel.coding.answers.scores": ("ScoreForm",),
    "evenkeel.coding.answers.tiles": ("Pixels",),
    "evenkeel.coding.code": (
        "Answer",
        "Code",
        "Task",
    ),
    "evenkeel.coding.sum_code": ("SumCode",),
    "evenkeel.coding.sums.error_feedback": ("ErrorFeedback",),
    "evenkeel.coding.sums.fixed_point": ("FixedPoint",),
    "evenkeel.coding.sums.gradiveq": ("GradiVeQ",),
    "evenkeel.coding.sums.low_rank": ("LowRank",),
    "evenkeel.coding.sums.thc": ("THC",),
    "evenkeel.errors": (
        "BackendError",
        "BackendLostError",
        "CodeError",
        "ConfigurationError",
        "DeadlineError",
        "EvenkeelError",
        "LabError",
        "MissingExtraError",
        "OverloadedError",
        "ProtocolError",
        "ReducerError",
        "RequestError",
        "SlowRequestError",
        "TooLargeError",
        "UnknownModelError",
        "UnreadableImageError",
        "UnsupportedError",
    ),
    "evenkeel.reducers.process_group": ("ProcessGroup",),
    "evenkeel.reducers.sharded": ("Sharded",),
    "evenkeel.reducers.switch": ("SwitchReducer",),
    "evenkeel.serving.gateway.gateway": ("Gateway",),
    "evenkeel.serving.gateway.policy": ("Policy",),
    "evenkeel.serving.simulate": (
        "Fleet",
        "simulate",
    ),
    "evenkeel.training.coded.estimators": (
        "CodedLinearSVC",
        "CodedLogisticRegression",
        "CodedRidge",
    ),
    "evenkeel.training.coded.tcp_link": ("TcpDevices",),
    "evenkeel.training.hook.ddp_hook": ("comm_hook",),
    "evenkeel.training.hook.hook_state": ("HookState",),
    "evenkeel.training.hook.pipe_sgd": ("PipeSGD",),
    "evenkeel.training.hook.registering": ("register",),
    "evenkeel.training.hook.skipping": ("named",),
    "evenkeel.training.plan.advice": ("recommend",),
    "evenkeel.training.plan.code_costs": ("bf16",),
    "evenkeel.training.plan.measure": (
        "measure_link",
        "measure_step",
    ),
    "evenkeel.training.plan.measure_code": ("measure_code",),
    "evenkeel.training.plan.timing": ("predict",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOME_OF[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise _MissingExtraError("PyTorch", "train") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])

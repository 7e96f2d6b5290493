"""Every value that a named option can have, and what a resumed run may change: the only lists (imports no torch).

Each list stands here once, as a `Literal` for annotations and the command line, and as a tuple of its names for checks.
Data sets are in `twolevel.data.registry`, networks in `twolevel.models.registry`: one line each, with where it is.
"""

from typing import Literal, get_args

# Convolutions; `twolevel.nn.factory` builds them.
Conv = Literal["sc", "gc", "gc2l", "bgc", "shuffle", "flgc", "dgconv", "dgc", "lgc"]
CONVS: tuple[str, ...] = get_args(Conv)
UNGROUPED = ("sc", "dgconv")  # groups is 1 unless given

# gc2l: the order of its operations, and the kernels that compute them.
Schedule = Literal["auto", "overlapped", "fused", "dense"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Kernels = Literal["auto", "grouped", "products", "depthwise", "native", "triton"]
KERNELS: tuple[str, ...] = get_args(Kernels)

# Batch norm with or without ReLU: the kernels that compute it in training.
Normaliser = Literal["auto", "torch", "native", "triton"]
NORMALISERS: tuple[str, ...] = get_args(Normaliser)

# dgc: whose channels are compared with each other at test time; the norm of its lasso.
Threshold = Literal["head", "global"]
THRESHOLDS: tuple[str, ...] = get_args(Threshold)
LassoForm = Literal["paper", "public"]

# How the ranks that data_parallel leaves share a network; those of them that split its layers.
Parallel = Literal["group", "channel", "fsdp", "naive", "gpipe", "1f1b"]
PARALLELS: tuple[str, ...] = get_args(Parallel)
PIPELINES = ("naive", "gpipe", "1f1b")
MICROBATCHED = ("gpipe", "1f1b")

# The mesh: data_parallel x group_parallel, or what the ranks that came can make. With parallel=group they split the
# networks of these convolutions.
MeshShape = Literal["given", "auto"]
SPLIT_BY_GROUP = ("gc", "gc2l", "bgc")

# What carries representatives (gc2l) and means (bgc) between ranks.
Carrier = Literal["auto", "group", "mpi"]
CARRIERS: tuple[str, ...] = get_args(Carrier)

Device = Literal["auto", "cpu", "cuda"]
DEVICES: tuple[str, ...] = get_args(Device)

# bf16 is autocast; of a plan and of what ranks exchange there is no float64.
Precision = Literal["float32", "bf16", "float64"]
PlanPrecision = Literal["float32", "bf16"]

LRSchedule = Literal["multistep", "cosine", "linear"]

# Where the settings of an optimiser come from that are not given; its rule for weights; how images are mirrored.
RecipeName = Literal["paper", "fast"]
Update = Literal["momentum", "nesterov", "muon"]
Flip = Literal["random", "alternating"]

# What is computed again in backward instead of being stored; convolutions whose forward changes nothing of their own.
Recompute = Literal["none", "blocks"]
RECOMPUTED = ("sc", "gc", "gc2l", "bgc", "shuffle", "flgc")

# What a run does where a loss or a gradient is not finite.
OnNotFinite = Literal["stop", "skip", "back"]

# What shows the records of a run beside its own files; several of them, or none.
TrackerName = Literal["tensorboard", "mlflow", "wandb", "trackio", "none"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)

# Which weights of a run: as trained, or their exponential moving average.
WeightsOf = Literal["model", "ema"]

# Files with a whole network, and the suffix of each: twolevel's own, a program of torch.export, and ONNX.
ExportFormat = Literal["safetensors", "torch", "onnx"]
EXPORT_SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}

# Metadata of a setting's dataclass field: what a run that goes on from a checkpoint may do to it. Without metadata it
# may change the setting with a warning.
FIXED = {"on_resume": "fixed"}  # the state in the checkpoint would mean something else
FREE = {"on_resume": "free"}  # changes nothing of the run, or only rounding
STARTING = {"on_resume": "starting"}  # how a run is started, not what it is: no run's record holds it

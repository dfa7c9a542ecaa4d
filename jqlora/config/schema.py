"""What a run is: frozen dataclasses, the only list of settings there is.

YAML files and ``key=value`` overrides fill them (:mod:`jqlora.config.reading`), the command line
prints them, a run directory keeps them. The string under each field is its documentation. Values
that contradict each other are refused here, so that a config that exists can be run.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from jqlora.config.kinds import STRICT, Count, NonNegative, Positive, PositiveFloat, Share
from jqlora.config.methods import LoRAConfig, MethodConfig
from jqlora.config.task import check_data, check_head
from jqlora.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How the frozen base is stored in 4 or 8 bits."""

    __pydantic_config__ = STRICT

    scheme: Literal["nf4", "fp4", "int8"] = "nf4"
    """The levels: 16 of normal-float (QLoRA's) or of float, or 8-bit integers."""
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """How many weights share one scale."""
    double_quant: bool = True
    """Store the scales as 8-bit codes as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    __pydantic_config__ = STRICT

    source: str
    """A hub id, a local Hugging Face directory, a .gguf file, or ``package:NAME``."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the computation and of unquantized weights; auto is float32 on CPUs, else bfloat16."""
    quantize: QuantizeConfig | None = None
    """Store the linear layers as codes; null keeps them whole."""
    remat: Literal["none", "dots", "full", "offload"] = "dots"
    """What the backward pass recomputes: ``dots`` all but products and cuDNN's
    attention, ``full`` whole layers, ``offload`` too, from inputs in host memory."""
    cache: str = "auto"
    """Where 4-bit codes and compiled programs are kept for the next start: a directory, ``auto``
    ($JQLORA_CACHE, or ~/.cache/jqlora), or ``off``."""
    attention: Literal["auto", "xla", "cudnn", "blockwise"] = "auto"
    """Which implementation of attention; ``auto`` is cuDNN's on a GPU and by blocks on a CPU where
    they can serve, else XLA's, with all scores in memory."""
    task: (
        Literal["causal-lm", "sequence-classification", "question-answering", "seq2seq-lm"] | None
    ) = None
    """What the model's head is for; null is what ``data.task`` needs, or text without one."""
    num_labels: Positive | None = None
    """Outputs of a classifier; null is as many as ``data.task`` has labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learnt, and what is kept from it to measure by."""

    __pydantic_config__ = STRICT

    train: str | tuple[str, ...]
    """File, pattern, folder, ``package:NAME/FILE``, ``datasets:NAME``, or a list of them."""
    task: str | None = None
    """What the rows mean and are scored by: sst2, squad, ... (``jqlora.tasks``); null is text."""
    validation: str | tuple[str, ...] | dict[str, str] | None = None
    """Rows of the task to be scored on; of several by their names (``matched: ...``)."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, where the task has none."""
    stride: Count = 128
    """Tokens that windows of a long text share, in question answering."""
    prefix: str = ""
    """What a model that writes reads before each text, such as ``"summarize: "``."""
    target_length: Positive = 128
    """Tokens that it writes at most; beside ``length``, which bounds what it reads."""
    heldout: str | tuple[str, ...] | None = None
    """Records never trained on, whose loss is reported."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of ``heldout``: the share of ``train`` to hold out, whole questions at a time."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Of what is held out, the order of rows and the numbers of a fresh head; null is
    ``train.seed``."""
    general: str | tuple[str, ...] | None = None
    """Records of general knowledge, to see whether training damages it."""
    length: Positive = 512
    """Tokens in a row of a batch."""
    packing: bool | None = None
    """Several records in a row, each attending only to itself; null is yes but for a task."""
    train_on: Literal["completion", "all"] = "completion"
    """Learn the answers, or every token."""
    too_long: Literal["error", "truncate", "split"] = "error"
    """What becomes of a record longer than ``length``."""
    template: str = "auto"
    """``auto``, ``chat``, ``alpaca``, ``plain``, or a .jinja file with a chat template."""

    def __post_init__(self) -> None:
        if self.heldout is not None and self.heldout_share is not None:
            raise ConfigError("data.heldout and data.heldout_share exclude each other: keep one")
        check_data(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, and how often to look."""

    __pydantic_config__ = STRICT

    steps: Positive | None = None
    """Updates to make; either this or ``epochs``."""
    epochs: PositiveFloat | None = None
    """Passes over the data; may be a fraction."""
    batch_size: Positive = 8
    """Rows in one update, all micro-batches together."""
    accumulate: Positive = 1
    """Micro-batches that an update is cut into, to save memory."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Count = 0
    """Updates over which the learning rate rises from zero."""
    optimizer: Literal[
        "adamw", "adamw16bit", "adamw8bit", "lion", "lion16bit", "lion8bit", "sgd", "adafactor"
    ] = "adamw"
    """The rule of the update; ``16bit`` and ``8bit`` store moments in half or a quarter of the
    bytes."""
    betas: tuple[Share, Share] | None = None
    """Decay rates of the moments; null is AdamW's (0.9, 0.999) or Lion's (0.9, 0.99)."""
    offload: Literal["none", "auto", "all"] = "none"
    """Moments in host memory: all, or with ``auto`` those that the device has no room for."""
    lora_plus_ratio: PositiveFloat | None = None
    """LoRA+: how many times faster the second factor learns than the first."""
    freeze_a: bool = False
    """LoRA-FA: leave the first factor as it starts, and keep no moments for it."""
    weight_decay: NonNegative = 0.0
    """Decoupled decay; biases, norms and AdaLoRA's singular values are spared."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; null leaves them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapters' start and dropout, and of the data where ``data.seed`` is null."""
    log_every: Positive = 1
    """Steps between rows of metrics.jsonl."""
    eval_every: Count = 0
    """Steps between held-out evaluations; 0 is only before and after."""
    save_every: Count = 100
    """Steps between checkpoints; 0 is only at the end."""
    keep: Positive = 2
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        if self.betas is not None and self.optimizer in ("sgd", "adafactor"):
            raise ConfigError(f"train.betas: {self.optimizer} has none; leave it null")
        if self.offload != "none" and self.optimizer in ("sgd", "adafactor"):
            raise ConfigError(
                f"train.offload={self.offload}: {self.optimizer} has no moments to move; it goes "
                "with adamw and lion, also in 8 bits"
            )
        if (self.steps is None) == (self.epochs is None):
            given = "neither" if self.steps is None else "both"
            raise ConfigError(f"give either train.steps or train.epochs, not {given}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"train.accumulate={self.accumulate} does not divide "
                f"train.batch_size={self.batch_size}"
            )
        if self.steps is not None and self.warmup >= self.steps:
            raise ConfigError(
                f"train.warmup={self.warmup} must be below train.steps={self.steps}, "
                "or the run ends before its peak learning rate"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Answers generated before and after training, for the report."""

    __pydantic_config__ = STRICT

    prompts: tuple[str, ...] = ()
    """Questions to ask the model, greedily decoded."""
    max_new_tokens: Positive = 48
    """Longest answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the run is kept."""

    __pydantic_config__ = STRICT

    directory: str
    """The run directory: metrics, checkpoints, adapter, plots, report."""
    overwrite: bool = False
    """Delete an earlier run that is in the way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that ``jqlora train`` needs to know."""

    __pydantic_config__ = STRICT

    model: ModelConfig
    """The base model."""
    method: MethodConfig = dataclasses.field(default_factory=LoRAConfig)
    """What is trained."""
    data: DataConfig
    """What it is trained on."""
    train: TrainConfig
    """How it is trained."""
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    """Answers for the report."""
    output: OutputConfig
    """Where the run is kept."""

    @property
    def data_seed(self) -> int:
        """What the data are ordered and split by, and a fresh head is drawn by."""
        return self.train.seed if self.data.seed is None else self.data.seed

    def __post_init__(self) -> None:
        factors = self.train.freeze_a or self.train.lora_plus_ratio is not None
        if factors and not isinstance(self.method, LoRAConfig):
            raise ConfigError(
                "train.freeze_a and train.lora_plus_ratio are for the factors of method.name=lora, "
                f"which {self.method.name} has not"
            )
        check_head(self)

"""The records of a run, encoded: what is trained on, and what is measured on."""

import dataclasses
from collections.abc import Sequence

from jqlora.config import RunConfig
from jqlora.data import (
    Example,
    Loader,
    Message,
    Record,
    encode_all,
    hold_out,
    make_loader,
    read_records,
    shared_questions,
)
from jqlora.errors import ConfigError, DataError
from jqlora.run import choices
from jqlora.train.evaluate import Measured


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run reads.

    ``loader`` yields the training batches and ``evaluations`` are what is measured, by name;
    ``prompts`` are the config's questions, ``checks`` the general records that say what an answer
    must contain.
    """

    loader: Loader
    evaluations: dict[str, Measured]
    messages: list[str]
    prompts: list[Record] = dataclasses.field(default_factory=list)
    checks: list[Record] = dataclasses.field(default_factory=list)


def read_records_of(config: RunConfig, tokenizer) -> RunData:
    """Read, split, encode and lay out the config's records.

    Raises SourceError and DataError as ``jqlora.data`` does, ConfigError where the warm-up is
    longer than the epochs.
    """
    records = read_records(config.data.train)
    measured: dict[str, Sequence[Record]] = {}
    if config.data.heldout_share is not None:
        records, measured["heldout"] = hold_out(
            records, config.data.heldout_share, seed=config.data_seed
        )
    elif config.data.heldout is not None:
        measured["heldout"] = read_records(config.data.heldout)
    if config.data.general is not None:
        measured["general"] = read_records(config.data.general)

    examples, report = _encode(config, records, tokenizer)
    messages = [f"training: {line}" for line in report.lines()]
    loader = make_loader(
        examples,
        length=config.data.length,
        batch_size=config.train.batch_size,
        packing=_packing(config),
        seed=config.data_seed,
        epochs=config.train.epochs,
        steps=config.train.steps,
    )
    check_warmup(config, loader)
    messages.append(
        f"training: {loader.total_steps} steps of {config.train.batch_size} rows of "
        f"{config.data.length} tokens, {100 * loader.rows.fill:.0f} % full; "
        f"{loader.steps_per_epoch} steps an epoch"
    )
    evaluations = {}
    for name, kept in measured.items():
        examples, report = _encode(config, kept, tokenizer)
        messages += [f"{name}: {line}" for line in report.lines()]
        evaluations[name] = evaluation_of(config, examples)
        if shared := shared_questions(records, kept):
            messages.append(
                f"{name}: {len(shared)} of {len(kept)} records ask what training asks too, so "
                f"their loss measures memory: {', '.join(shared[:3])}"
            )
    prompts = [prompt_like(records[0], prompt) for prompt in config.sample.prompts]
    checks = [record for record in measured.get("general", ()) if record.expect]
    return RunData(loader, evaluations, messages, prompts, checks)


def evaluation_of(config: RunConfig, examples: Sequence[Example]) -> Measured:
    """All examples once, in batches of the size of one micro-batch."""
    batches = make_loader(
        examples,
        length=config.data.length,
        batch_size=config.train.batch_size // config.train.accumulate,
        packing=_packing(config),
        epochs=1,
        shuffle=False,
    )
    return Measured(list(batches))


def check_warmup(config: RunConfig, loader: Loader) -> None:
    """Raise ConfigError where the warm-up is longer than the epochs."""
    if config.train.warmup >= loader.total_steps:
        raise ConfigError(
            f"train.warmup={config.train.warmup} must be below the {loader.total_steps} steps that "
            f"train.epochs={config.train.epochs} makes"
        )


def prompt_like(record: Record, prompt: str) -> Record:
    """A record that asks ``prompt`` in the form that the training records have."""
    origin = f"sample.prompts {prompt!r}"
    if record.kind == "messages":
        messages = (Message(role="user", content=prompt),)
        return Record(kind="messages", origin=origin, messages=messages)
    if record.kind == "text":
        return Record(kind="text", origin=origin, text=prompt)
    return Record(kind=record.kind, origin=origin, prompt=prompt)


def check_length(config: RunConfig, model) -> None:
    """Raise DataError where rows are longer than the positions that the model knows."""
    longest = model.config.longest
    if config.data.length > longest:
        raise DataError(
            f"data.length={config.data.length} exceeds the {longest} positions of "
            f"{config.model.source}: set data.length to at most {longest}"
        )


def _packing(config: RunConfig) -> bool:
    return config.data.packing is not False


def _encode(config: RunConfig, records: Sequence[Record], tokenizer):
    return encode_all(
        records,
        tokenizer,
        max_length=config.data.length,
        train_on=config.data.train_on,
        template=choices.template(config),
        too_long=config.data.too_long,
    )

"""Configs: what is accepted, what is refused and in which words, and that none of ours is stale."""

import ast
import dataclasses
import inspect
import shlex
from pathlib import Path

import pytest

from jqlora import optim
from jqlora.config import (
    AdaLoRAConfig,
    RunConfig,
    dump_config,
    known_keys,
    methods,
    read_config,
    schema,
)
from jqlora.errors import ConfigError
from jqlora.methods import AdaLoRA, LoRA

CONFIGS = Path(__file__).parent.parent / "configs"
BASE = """
model: {source: somewhere}
data: {train: a.jsonl}
train: {steps: 10, lr: 1e-4}
output: {directory: runs/x}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_the_smallest_config_fills_the_rest_with_defaults(base):
    config = read_config([base])
    assert config.train.lr == 1e-4  # YAML 1.1 would call this a string
    assert config.method.targets == "all-linear"
    assert config.model.quantize is None


ACCEPTED = {
    "train.lr=2e-4": lambda c: c.train.lr == 2e-4,
    "train.lr=1": lambda c: c.train.lr == 1,
    "train.max_grad_norm=null": lambda c: c.train.max_grad_norm is None,
    "model.quantize.scheme=fp4": lambda c: c.model.quantize.scheme == "fp4",
    "model.quantize={}": lambda c: c.model.quantize.block == 64,
    "method.targets=[q_proj, v_proj]": lambda c: c.method.targets == ("q_proj", "v_proj"),
    "method.rank_pattern={q_proj: 4}": lambda c: c.method.rank_pattern == {"q_proj": 4},
    "method.layers_to_transform=[0, 2]": lambda c: c.method.layers_to_transform == (0, 2),
    "data.train=[a.jsonl, b.csv]": lambda c: c.data.train == ("a.jsonl", "b.csv"),
    "sample.prompts=['no', on]": lambda c: c.sample.prompts == ("no", "on"),
    "output.directory=2024-01-01": lambda c: c.output.directory == "2024-01-01",
    "train.betas=[0.9, 0.95]": lambda c: c.train.betas == (0.9, 0.95),
    "train.optimizer=lion8bit": lambda c: c.train.optimizer == "lion8bit",
    "train.offload=auto": lambda c: c.train.offload == "auto",
    "train.lora_plus_ratio=16": lambda c: c.train.lora_plus_ratio == 16,
}


@pytest.mark.parametrize(("override", "holds"), ACCEPTED.items(), ids=ACCEPTED.keys())
def test_an_override_sets_its_value(override, holds, base):
    assert holds(read_config([base], [override]))


def test_a_section_of_another_name_replaces_the_one_below(base, tmp_path):
    lora = ["method.rank=4", "method.alpha=2"]
    config = read_config([base], [*lora, "method.name=adalora", "method.init_rank=6"])
    assert config.method == AdaLoRAConfig(init_rank=6)
    assert read_config([base], [*lora, "method.name=lora"]).method.rank == 4
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "resolved.yaml"]) == config
    with pytest.raises(
        ConfigError, match=r"method.rank is not a setting; nearest: method.init_rank"
    ):
        read_config([base], ["method.name=adalora", "method.rank=4"])


REFUSED = {
    "train.lrr=1": ["train.lrr", "not a setting", "train.lr"],
    "lr=1": ["lr", "not a setting", "train.lr"],
    "optimizer.lr=1": ["optimizer", "not a setting", "train"],
    "method.ranks=1": ["method.ranks", "method.rank"],
    "train.lr=fast": ["train.lr='fast'", "valid number", "command line"],
    "train.lr='1'": ["train.lr='1'", "valid number"],
    "train.lr=-1": ["train.lr=-1", "greater than 0"],
    "train.lr=.nan": ["train.lr", "finite"],
    "train.steps=2.5": ["train.steps=2.5", "valid integer"],
    "train.steps=true": ["train.steps=True", "valid integer"],
    "train.steps=null": ["neither"],
    "train.epochs=1": ["train.steps or train.epochs", "both"],
    "train.warmup=10": ["train.warmup=10", "train.steps=10"],
    "train.accumulate=3": ["train.accumulate=3", "train.batch_size=8"],
    "train.betas=[0.9]": ["train.betas=[0.9]", "too few"],
    "train.optimiser=lion": ["train.optimiser", "not a setting", "train.optimizer"],
    "train.optimizer=adam8": ["train.optimizer='adam8'", "'adamw8bit'"],
    "train={optimizer: sgd, betas: [0.9, 0.9]}": ["train.betas", "sgd"],
    "train={optimizer: adafactor, offload: all}": ["train.offload=all", "adafactor"],
    "train.lora_plus_ratio=0": ["train.lora_plus_ratio=0", "greater than 0"],
    "train=3": ["train", "section", "3"],
    "model.quantize=nf4": ["model.quantize", "section", "'nf4'"],
    "model.quantize.scheme=int4": ["model.quantize.scheme='int4'", "'nf4', 'fp4' or 'int8'"],
    "model.quantize.block=65": ["model.quantize.block=65", "64"],
    "model.source=null": ["model.source=None", "valid string"],
    "method.targets=[q_proj, 3]": ["method.targets=['q_proj', 3]", "valid string"],
    "method.name=dora": ["method.name='dora'", "'lora'"],
    "method.dropout=1": ["method.dropout=1", "less than 1"],
    "data.heldout=b.jsonl data.heldout_share=0.1": ["data.heldout", "data.heldout_share"],
    "train.lr": ["train.lr", "section.key=value"],
    "train..lr=1": ["train..lr", "section.key=value"],
    "train.lr=[1": ["train.lr=[1", "expected"],
}


@pytest.mark.parametrize("setting", ["train.freeze_a=true", "train.lora_plus_ratio=4"])
def test_settings_of_loras_factors_are_refused_for_other_methods(setting, base):
    with pytest.raises(ConfigError, match="adalora"):
        read_config([base], [setting, "method.name=adalora"])


@pytest.mark.parametrize(("override", "words"), REFUSED.items(), ids=REFUSED.keys())
def test_a_bad_setting_is_named_with_what_is_accepted(override, words, base):
    with pytest.raises(ConfigError) as error:
        read_config([base], shlex.split(override) if " data" in override else [override])
    assert all(word in str(error.value) for word in words), str(error.value)


FILES = {
    "": ["base.yaml", "empty"],
    "- a": ["base.yaml", "list"],
    "model: [": ["base.yaml:1", "expected"],
    "train: {steps: 1}\ntrain: {steps: 2}": ["base.yaml:2", "'train' is given twice"],
    "train: {steps: 1, steps: 2}": ["'steps' is given twice"],
    BASE + "sampel: {}": ["base.yaml: sampel", "sample"],
    BASE.replace("source", "sorce"): ["base.yaml: model.sorce", "model.source is missing"],
    BASE.replace("a.jsonl", "5"): ["base.yaml: data.train=5"],
}


@pytest.mark.parametrize(("text", "words"), FILES.items(), ids=range(len(FILES)))
def test_a_bad_file_is_named_with_the_key_or_line(text, words, base):
    base.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_config([base])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read_config([tmp_path / "none.yaml"])


def test_later_files_override_earlier_ones_key_by_key(base, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("train: {lr: 3e-4, seed: 7}")
    config = read_config([base, over], ["train.seed=8"])
    assert (config.train.steps, config.train.lr, config.train.seed) == (10, 3e-4, 8)


def test_an_error_names_the_file_that_the_value_came_from(base, tmp_path):
    over = tmp_path / "over.yaml"
    over.write_text("train: {lr: soon}")
    with pytest.raises(ConfigError, match=r"over\.yaml: train\.lr='soon'"):
        read_config([base, over])


def test_a_resolved_config_reads_back_equal(base, tmp_path):
    config = read_config([base], ["model.quantize.scheme=fp4", "method.rank_pattern={q_proj: 4}"])
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert read_config([tmp_path / "resolved.yaml"]) == config


def test_the_settings_of_lora_are_those_of_the_spec():
    ours = {f.name: f.default for f in dataclasses.fields(schema.LoRAConfig)}
    theirs = {f.name: f.default for f in dataclasses.fields(LoRA)}
    # which method, and what jq.init is told
    assert (ours.pop("name"), ours.pop("dtype")) == ("lora", "float32")
    assert ours.keys() == theirs.keys()
    simple = [name for name in ours if not name.endswith("_pattern")]
    assert {name: ours[name] for name in simple} == {name: theirs[name] for name in simple}


def test_adalora_is_by_default_what_the_spec_and_the_optimizer_are():
    defaults = {f.name: f.default for f in dataclasses.fields(AdaLoRA)}
    optimizer = inspect.signature(optim.adalora).parameters
    defaults |= {n: p.default for n, p in optimizer.items() if p.default is not p.empty}
    ours = AdaLoRAConfig()
    # a pattern is what training leaves, and where state lives is train.offload's to say
    assert defaults.keys() - vars(ours).keys() == {"rank_pattern", "offload"}
    for name, value in vars(ours).items():
        if name in defaults:
            assert value == defaults[name], name


def test_every_setting_has_a_line_of_documentation():
    sources = inspect.getsource(schema), inspect.getsource(methods)
    for node in [node for source in sources for node in ast.parse(source).body]:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(after, ast.Expr) and isinstance(
                        after.value, ast.Constant
                    )
                    assert documented, f"{node.name}.{ast.unparse(field.target)}"


def test_known_keys_are_dotted_and_complete():
    keys = known_keys()
    assert "model.quantize.block" in keys
    assert {key.split(".")[0] for key in keys} == {f.name for f in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_begins_with_its_command_and_can_be_read(path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    first = path.read_text().splitlines()[0]
    name = str(path.relative_to(CONFIGS.parent))
    assert first.startswith("# jqlora train "), first
    words = shlex.split(first.removeprefix("# jqlora train "))
    assert name in words
    files = [word for word in words if "=" not in word]
    read_config(files, [word for word in words if "=" in word])

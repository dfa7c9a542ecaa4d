"""Grids of configs: which members there are, what they are called, and what cannot vary."""

import pytest

from jqlora.config.grid import can_vary, expand
from jqlora.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {source: here}\n"
        "data: {train: a.jsonl}\n"
        "train: {steps: 9, lr: 1.0e-3}\n"
        "output: {directory: out}\n"
    )
    return path


def test_every_combination_is_a_member_and_the_last_key_changes_fastest(config):
    grid = expand([config], ["train.steps=5"], ["train.lr=1e-4,2e-4", "method.rank=8,16"])
    assert list(grid.members) == [
        "lr-0.0001_rank-8",
        "lr-0.0001_rank-16",
        "lr-0.0002_rank-8",
        "lr-0.0002_rank-16",
    ]
    last = grid.members["lr-0.0002_rank-16"]
    assert (last.train.lr, last.method.rank, last.train.steps) == (2e-4, 16, 5)
    assert grid.values["lr-0.0001_rank-16"] == {"train.lr": 1e-4, "method.rank": 16}
    assert grid.base == grid.members["lr-0.0001_rank-8"]


def test_values_are_yaml_and_names_are_fit_for_directories(config):
    words = ["method.targets=all-linear,[q_proj,v_proj],.*/x", "train.betas=null,[0.9,0.99]"]
    grid = expand([config], [], words)
    assert list(grid.members)[1:4] == [
        "targets-all-linear_betas-0.9+0.99",
        "targets-q-proj+v-proj_betas-null",
        "targets-q-proj+v-proj_betas-0.9+0.99",
    ]
    member = grid.members["targets-q-proj+v-proj_betas-0.9+0.99"]
    assert (member.method.targets, member.train.betas) == (("q_proj", "v_proj"), (0.9, 0.99))
    assert not any(set(name) & set("/ ,*=") for name in grid.members)


def test_methods_may_differ_from_member_to_member(config):
    grid = expand([config], [], ["method.name=lora,adalora"])
    assert [member.method.name for member in grid.members.values()] == ["lora", "adalora"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.batch_size=4,8"], r"train\.batch_size cannot differ.*method\.rank.*train\.lr"),
        (["model.source=a,b"], r"model\.source cannot differ"),
        (["method.modules_to_save=[a],[b]"], "cannot differ"),
        (["train.learning_rate=1e-4"], r"not a setting; nearest: .*train\."),
        (["train.lr"], "KEY=VALUE,VALUE"),
        (["train.lr="], "KEY=VALUE,VALUE"),
        (["train.lr=[1e-4"], "not YAML"),
        (["train.lr=1e-4,slow"], r"train\.lr='slow'"),
        (["train.lr=1e-4,1e-4"], "lr-0.0001 is there twice"),
        (["train.lr=1e-4", "train.lr=2e-4"], "varied twice"),
        ([], "nothing varies"),
    ],
)
def test_what_is_no_grid_is_refused_with_the_ways_out(config, words, message):
    with pytest.raises(ConfigError, match=message):
        expand([config], [], words)


@pytest.mark.parametrize(
    ("overrides", "words", "message"),
    [
        (["data.heldout_share=0.5"], ["train.seed=0,1"], "losses do not compare"),
        (["data.task=sst2"], ["train.seed=0,1"], "draws a head"),
    ],
)
def test_data_that_members_cannot_share_are_refused_without_a_seed_of_their_own(
    config, overrides, words, message
):
    with pytest.raises(ConfigError, match=message + r".*data\.seed"):
        expand([config], overrides, words)
    members = expand([config], [*overrides, "data.seed=5"], words).members.values()
    assert [(one.train.seed, one.data_seed) for one in members] == [(0, 5), (1, 5)]


def test_the_command_says_what_can_vary():
    from jqlora.cli import sweep

    described = " ".join(sweep.__doc__.split())
    for key in can_vary():
        assert key.startswith("method.") or key.removeprefix("train.") in described

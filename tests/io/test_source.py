"""What a user writes leads to the files of one model, or to a sentence that says why not."""

import sys

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jqlora.errors import SourceError
from jqlora.io import hub
from jqlora.io.source import resolve


def model_in(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that must not be imported."""
    root = tmp_path / "site" / "toy_weights"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_a_directory_and_a_gguf_file_are_found_where_they_are(tmp_path):
    folder = model_in(tmp_path / "model")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    assert resolve(str(folder)).kind == "hf-dir"
    assert resolve(gguf).kind == "gguf"
    assert resolve(resolve(str(folder))) == resolve(str(folder))


def test_a_directory_with_one_gguf_is_that_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"")
    assert resolve(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"several models: a\.gguf, b\.gguf"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["notes.txt"], r"neither config\.json nor a \.gguf file\): found notes\.txt"),
        ([], r"found nothing"),
        (["config.json"], r"has a config\.json but no weights: found config\.json"),
    ],
)
def test_a_directory_without_a_model_says_what_it_holds(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(SourceError, match=message):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "absent.gguf", "a b", ""])
def test_what_looks_like_a_path_and_is_absent_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "download_model", lambda label: pytest.fail("asked the hub"))
    with pytest.raises(SourceError, match=r"no file or directory|not a \.gguf|holds no model"):
        resolve(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"give the directory that holds config\.json"):
        resolve(tmp_path / "model.safetensors")


def test_a_package_is_searched_without_being_imported(package):
    model_in(package / "data" / "tiny")
    assert resolve("package:toy_weights").path == package / "data" / "tiny"
    assert resolve("package:toy-weights/data/tiny").path == package / "data" / "tiny"
    assert "toy_weights" not in sys.modules


def test_a_package_of_several_models_asks_which(package):
    model_in(package / "one")
    (package / "two.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"two\.gguf, one; add one of them"):
        resolve("package:toy_weights")
    assert resolve("package:toy_weights/two.gguf").kind == "gguf"


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("package:toy_weights", r"carries no model: found __init__\.py"),
        ("package:toy_weights/absent", r"no 'absent' in .*: found __init__\.py"),
        ("package:no_such_package", r"no package 'no_such_package' is installed"),
        ("package:a.b", r"is not the name of a package"),
    ],
)
def test_a_package_without_the_model_says_so(package, label, message):
    with pytest.raises(SourceError, match=message):
        resolve(label)


def test_a_hub_id_offline_and_uncached_is_one_sentence_about_what_else_to_give():
    with pytest.raises(SourceError, match=r"not in the hub's cache.*package:NAME"):
        resolve("nobody/no-such-model")
    with pytest.raises(SourceError, match="not in the hub's cache"):
        resolve("nobody/no-such-model/file.gguf")


class FakeHub:
    """Stands for the network: a repository with these files."""

    def __init__(self, files):
        self.files = files

    def model_info(self, repository, revision=None, timeout=None):
        siblings = [type("File", (), {"rfilename": name}) for name in self.files]
        return type("Info", (), {"siblings": siblings, "sha": "abc"})


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "x.gguf"], "model*.safetensors"),
        (["pytorch_model-00001-of-00002.bin", "onnx/model.safetensors"], "pytorch_model*.bin"),
        (["a.Q4.gguf"], "a.Q4.gguf"),
    ],
)
def test_only_one_form_of_the_weights_is_downloaded(tmp_path, monkeypatch, files, weights):
    model_in(tmp_path / "snapshot")
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "HfApi", lambda: FakeHub(files))
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve("org/name@v1").path == tmp_path / "snapshot"
    assert asked["repository"] == "org/name"
    assert asked["revision"] == "abc"
    patterns = " ".join(asked["allow_patterns"])
    assert weights in patterns
    assert sum(kind in patterns for kind in (".safetensors", ".bin", ".gguf")) == 1


def test_a_repository_of_many_ggufs_asks_which(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: FakeHub(["a.gguf", "b.gguf"]))
    with pytest.raises(SourceError, match=r"several GGUF files: a\.gguf, b\.gguf; give one"):
        resolve("org/name")


def test_without_a_network_the_cache_serves(tmp_path, monkeypatch):
    model_in(tmp_path / "snapshot")

    def snapshot_download(repository, *, revision, local_files_only):
        if repository != "org/cached":
            raise LocalEntryNotFoundError("absent")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert resolve("org/cached").path == tmp_path / "snapshot"

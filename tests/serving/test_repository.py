"""A broken repository is reported before Triton starts: the file, and what to do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from covae_serving.errors import ServingError
from covae_serving.repository import read_repository


@pytest.fixture
def repository(toy_repository: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(toy_repository, tmp_path / "repository"))


def served(repository: Path, *names: str, operations: tuple[str, ...] = ()) -> list[str]:
    return [model.model_name for model in read_repository(repository, names, operations)]


def test_no_names_mean_every_operation_of_every_model(repository, write_toy):
    write_toy(repository, "second", ["decode"])

    assert served(repository) == ["second_decode", "toy_decode", "toy_sample", "toy_score"]


def test_names_and_operations_choose_a_part(repository, write_toy):
    write_toy(repository, "second", ["decode"])

    assert served(repository, "toy") == ["toy_decode", "toy_sample", "toy_score"]
    assert served(repository, operations=("decode",)) == ["second_decode", "toy_decode"]
    assert served(repository, "second", "toy", operations=("sample", "decode")) == [
        "second_decode",
        "toy_decode",
        "toy_sample",
    ]


def test_a_broken_model_that_is_not_served_does_no_harm(repository, write_toy):
    (repository / "toy_decode" / "config.pbtxt").unlink()

    assert served(repository, operations=("sample",)) == ["toy_sample"]


def test_folders_of_other_triton_models_are_left_alone(repository):
    (repository / "ensemble").mkdir()
    (repository / "notes.txt").write_text("")

    assert served(repository) == ["toy_decode", "toy_sample", "toy_score"]


@pytest.mark.parametrize(
    ("names", "operations", "message"),
    [
        (["mnist"], [], "no model named 'mnist'; it has toy"),
        ([], ["paint"], "'paint' is not one; choose from decode, encode, sample, draw, condition, score"),
        (["toy"], ["encode"], r"no model of \['toy'\] has any operation of \['encode'\]"),
    ],
)
def test_an_unknown_name_or_operation_is_answered_with_the_known_ones(repository, names, operations, message):
    with pytest.raises(ServingError, match=message):
        read_repository(repository, names, operations)


def test_a_missing_or_empty_repository_says_how_to_make_one(tmp_path):
    with pytest.raises(ServingError, match="absent: no such folder; `covae export` makes one"):
        read_repository(tmp_path / "absent")
    with pytest.raises(ServingError, match="no models in this folder; export one"):
        read_repository(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.pbtxt").unlink(), r"toy_decode/config\.pbtxt: no such file; export"),
        (lambda folder: (folder / "config.pbtxt").write_text("name: ["), r"config\.pbtxt: cannot be read as a model"),
        (lambda folder: (folder / "config.pbtxt").write_bytes(b"\xff"), r"config\.pbtxt: cannot be read as a model"),
        (lambda folder: (folder / "config.pbtxt").write_text('name: "other"'), r"config\.pbtxt: name is 'other'"),
        (lambda folder: shutil.rmtree(folder / "1"), r"toy_decode: no version folder .*toy_decode/1\); export"),
        (lambda folder: (folder / "1" / "model.onnx").unlink(), r"toy_decode/1/model\.onnx: no such file; export"),
        (lambda folder: (folder / "1" / "model.onnx").write_bytes(b""), r"model\.onnx: the file is empty; export"),
    ],
)
def test_a_broken_model_names_its_file_and_the_next_step(repository, break_it, message):
    break_it(repository / "toy_decode")

    with pytest.raises(ServingError, match=message):
        read_repository(repository)


def test_another_backend_is_refused(tmp_path, write_toy):
    write_toy(tmp_path, change=lambda config: setattr(config, "backend", "python"))

    with pytest.raises(ServingError, match="backend is 'python', not 'onnxruntime'"):
        read_repository(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/tmp/evil.tar.gz" } }',
            "the parameter EXECUTION_ENV",
        ),
        ('parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }', "the parameter FORCE_CPU"),
        ('model_repository_agents { agents { name: "checksum" } }', "found model_repository_agents"),
        ('model_operations { op_library_filename: "evil.so" }', "found model_operations"),
        ('ensemble_scheduling { step { model_name: "x" model_version: -1 } }', "ensemble_scheduling"),
        ('runtime: "evil.so"', "found runtime"),
        ('platform: "tensorflow_savedmodel"', "found platform"),
        (
            'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" '
            'parameters { key: "trt_extra_plugin_lib_paths" value: "evil.so" } } } }',
            "the accelerator's parameter trt_extra_plugin_lib_paths",
        ),
        ('default_model_filename: "../other.onnx"', "default_model_filename is '../other.onnx'"),
        (
            'parameters { key: "session.model_external_initializers_file_folder_path" value { string_value: "/etc" } }',
            "the parameter session.model_external_initializers_file_folder_path",
        ),
        (
            'parameters { key: "session.collect_node_memory_stats_to_file" value { string_value: "/tmp/evil" } }',
            "the parameter session.collect_node_memory_stats_to_file",
        ),
    ],
)
def test_a_configuration_that_would_have_triton_run_something_else_is_refused(line, message, repository):
    path = repository / "toy_decode" / "config.pbtxt"
    text = "\n".join(old for old in path.read_text().splitlines() if not old.startswith("default_model_filename"))
    path.write_text(f"{text}\n{line}\n")
    with pytest.raises(ServingError, match=message):
        served(repository)


@pytest.mark.parametrize("name", ["model.py", "libtriton_evil.so", "model.onnx.data"])
def test_a_version_with_other_files_is_refused(name, repository):
    (repository / "toy_sample" / "1" / name).write_text("")
    with pytest.raises(ServingError, match=rf"1/{name}: a version holds model\.onnx, weights-\*\.bin and config"):
        served(repository)


@pytest.mark.parametrize("kind", ["link", "device", "folder", "pipe"])
def test_weights_that_are_no_file_of_the_version_are_refused(kind, repository, tmp_path):
    place, other = repository / "toy_sample" / "1" / "weights-000.bin", tmp_path / "private"
    other.write_bytes(b"private")
    made = {
        "link": lambda: place.symlink_to(other),
        "device": lambda: place.symlink_to("/dev/zero"),
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
    }
    made[kind]()
    with pytest.raises(ServingError, match=r"weights-000\.bin: expected a file of weights in the version's own folder"):
        served(repository)


def test_weights_may_be_links_within_their_version_as_kubernetes_mounts_have_them(repository):
    version = repository / "toy_sample" / "1"
    (version / "..2026").mkdir()
    (version / "..2026" / "weights-000.bin").write_bytes(b"weights")
    (version / "weights-000.bin").symlink_to("..2026/weights-000.bin")
    named = 'parameters { key: "weights_sha256" value { string_value: "{\\"weights-000.bin\\": \\"\\"}" } }'
    config = repository / "toy_sample" / "config.pbtxt"
    config.write_text(f"{config.read_text()}\n{named}\n")
    assert "toy_sample" in served(repository)
    (version / "..2026" / "weights-000.bin").unlink()
    with pytest.raises(ServingError, match=r"weights-000\.bin: expected a file of weights"):
        served(repository)


@pytest.mark.parametrize("name", ["$(touch owned)", "a b", "modèle", "-x", "x" * 129])
def test_a_name_that_a_shell_would_read_is_refused(name, repository):
    (repository / "toy_decode").rename(repository / f"{name}_decode")
    with pytest.raises(ServingError, match=r"the model's name is .*; expected letters, digits"):
        served(repository)


def test_an_operation_of_the_release_that_is_missing_is_told(write_release_of_toy, tmp_path):
    repository = write_release_of_toy(tmp_path, 1)
    shutil.rmtree(repository / "toy_decode")
    with pytest.raises(ServingError, match=r"toy_decode/1/config\.pbtxt: no such file"):
        served(repository)
    assert served(repository, operations=("sample",)) == ["toy_sample"]


def test_another_models_damaged_release_does_no_harm(write_release_of_toy, write_toy, tmp_path):
    repository = write_toy(write_release_of_toy(tmp_path, 1), "other", ["decode"])
    (repository / "other.json").write_text("damaged")
    assert served(repository, "toy") == ["toy_decode", "toy_sample"]
    with pytest.raises(ServingError, match=r"other\.json: no model's release can be read"):
        served(repository)


def test_operations_of_different_exports_without_a_release_are_refused(write_toy, tmp_path):
    def other(config):
        config.parameters["model_digest"].string_value = f'"{config.name}"'

    with pytest.raises(ServingError, match="toy_sample: it is of another export than toy_decode"):
        served(write_toy(tmp_path, change=other))

"""Publishing: five entries of one version or nothing at all; what is there is never changed."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import numpy_helper
from tritonclient.grpc import model_config_pb2 as pb

from covae_core.contract import ModelSpec, served_name
from covae_core.errors import InvalidArgument
from covae_core.operations import OPERATIONS
from covae_core.release import Release, read_release, weights_files, write_release
from covae_export.conversion import convert
from covae_export.errors import ExportError
from covae_export.exporting import Deployment, export_run, find_leftovers
from covae_export.graphs import build_graph, describe
from covae_export.triton_config import build_config, to_text
from covae_export.verification import refuse_unacceptable, verify
from covae_train.errors import CheckpointError
from covae_train.families import make_config
from covae_train.run import load_run
from covae_train.training import Trainer

from .conftest import EVERY, SCORE_SAMPLES, TINY

FAMILIES = ["sos-vae", "beta-vae"]


def snapshot(folder):
    """Every file below a folder, hidden ones too, with the hash of its bytes; empty folders count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def read_config(path):
    return text_format.Parse(path.read_text(), pb.ModelConfig())


@pytest.fixture
def converted(runs, tmp_path):
    """`sample` of a run as an ONNX file, with the model and its spec."""
    run = runs["sos-vae"]
    spec = describe(run, SCORE_SAMPLES, 3)
    path = tmp_path / "model.onnx"
    convert(build_graph(OPERATIONS["encode"], run.model, spec), path)
    return run.model, spec, path


def edit_weight(path, change):
    """Change the first initializer of a file that is a convolution's weight."""
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    array = change(numpy_helper.to_array(weight).copy())
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


def test_a_faithful_graph_is_accepted(converted):
    refuse_unacceptable(verify(converted[0], converted[1], OPERATIONS["encode"], converted[2]))


def test_a_weight_that_changed_is_found_and_told_with_the_outputs_errors(converted):
    model, spec, path = converted
    edit_weight(path, lambda weight: weight * 1.01)
    with pytest.raises(ExportError, match=r"nothing was published: encode\.latent_mean: .*, allowed 0\.0001; encode"):
        refuse_unacceptable(verify(model, spec, OPERATIONS["encode"], path))


def test_an_output_that_is_nan_is_refused(converted):
    model, spec, path = converted
    edit_weight(path, lambda weight: weight * float("nan"))
    with pytest.raises(ExportError, match=r"encode\.latent_mean: nan, allowed 0\.0001"):
        refuse_unacceptable(verify(model, spec, OPERATIONS["encode"], path))


def test_a_file_that_is_no_graph_is_refused(converted):
    model, spec, path = converted
    path.write_bytes(b"no graph")
    with pytest.raises(ExportError, match="encode: ONNX Runtime cannot run the exported graph"):
        verify(model, spec, OPERATIONS["encode"], path)


class OverTheBatch(torch.nn.Module):
    """An encoder that looks at the other rows, as a batch normalisation in training mode would."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder(images - 0.1 * images.mean(dim=0, keepdim=True))


def test_a_model_whose_rows_depend_on_each_other_is_refused_and_the_repository_stays(run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    run.model.encoder = OverTheBatch(run.model.encoder)
    (tmp_path / "other_encode" / "1").mkdir(parents=True)
    (tmp_path / "other_encode" / "config.pbtxt").write_text('name: "other_encode"')
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="encode: latent_mean of a row differs between batches of 3 and 17"):
        export_run(run, tmp_path, operations=["encode"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".hidden", "-dash", "a b", "a/b", "../up", "a\n", "ä", "_x"])
def test_a_bad_name_is_refused_before_anything_is_written(name, run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    if name == "":
        run = type(run)(tmp_path / "bad name", run.config, run.model, run.state, run.digest)
    with pytest.raises(InvalidArgument, match=r"name: found .*; expected letters, digits, '\.', '_' and '-'"):
        export_run(run, tmp_path / "repository", name)
    assert not (tmp_path / "repository").exists()


def test_a_file_in_the_repositorys_place_is_told(runs, tmp_path):
    (tmp_path / "repository").write_text("in the way")
    with pytest.raises(ExportError, match="repository: cannot be a model repository"):
        export_run(runs["beta-vae"], tmp_path / "repository")


def test_a_run_in_its_mean_only_phase_cannot_be_exported(digits, tmp_path):
    trainer = Trainer(make_config(family="beta-vae", **TINY), digits, tmp_path / "run")
    trainer.save()
    with pytest.raises(CheckpointError, match="still in its phase 'mean'"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("operation", EVERY)
def test_a_configuration_parses_back_and_describes_the_model(operation, family, runs):
    spec = describe(runs[family], SCORE_SAMPLES, 3)
    digests = {"model.onnx": "ab" * 32, "weights-000.bin": "cd" * 32}
    built = build_config(
        "toy", spec, OPERATIONS[operation], 5, digests, max_batch_size=7, instances=3, instance_kind="gpu", threads=2
    )
    config = text_format.Parse(to_text(built), pb.ModelConfig())
    assert config == built
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert ModelSpec.from_parameters(parameters) == spec
    assert (parameters["operation"], parameters["intra_op_thread_count"]) == (operation, "2")
    assert (list(config.version_policy.specific.versions), parameters["graph_sha256"]) == ([5], "ab" * 32)
    assert json.loads(parameters["weights_sha256"]) == {"weights-000.bin": "cd" * 32}
    assert (config.name, config.backend, config.max_batch_size) == (f"toy_{operation}", "onnxruntime", 7)
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, pb.ModelInstanceGroup.KIND_GPU)
    entry = OPERATIONS[operation]
    for tensors, found in ((entry.inputs(spec), config.input), (entry.outputs(spec), config.output)):
        wanted = [(tensor.name, f"TYPE_{tensor.dtype}", tensor.shape) for tensor in tensors]
        assert [(t.name, pb.DataType.Name(t.data_type), tuple(t.dims)) for t in found] == wanted
    (warm_up,) = config.model_warmup
    assert warm_up.batch_size == 1
    assert {name: tuple(tensor.dims) for name, tensor in warm_up.inputs.items()} == {
        tensor.name: tensor.shape for tensor in OPERATIONS[operation].inputs(spec)
    }
    assert all(tensor.zero_data for tensor in warm_up.inputs.values())
    assert config.HasField("dynamic_batching")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_spec_is_read_off_the_model(family, runs):
    run = runs[family]
    spec = describe(run, SCORE_SAMPLES, 3)
    assert (spec.family, spec.image_shape, spec.latents) == (family, (8, 8, 1), {"latent": (5,)})
    factor = {"mean": (1, 8, 8), "factor": (3, 1, 8, 8), "variance": (1, 1, 1)}
    assert spec.density_parameters == (factor if family == "sos-vae" else {"mean": (1, 8, 8), "variance": (1, 8, 8)})
    assert (spec.score_samples, spec.draw_samples) == (SCORE_SAMPLES, 3)
    assert spec.run_id == family
    content = [(run.folder / name).read_bytes() for name in ("config.json", "checkpoint.safetensors")]
    assert spec.run_digest == hashlib.sha256(b"\0".join(content)).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_for_each_operation_of_one_version_are_published_and_nothing_else(family, repository):
    entries = [served_name(family, operation) for operation in EVERY]
    assert all(entry in snapshot(repository) for entry in entries)
    folders = {path.name for path in repository.iterdir() if path.is_dir()}
    assert folders == {served_name(f, op) for f in FAMILIES for op in EVERY}
    assert {path.name for path in repository.iterdir()} - folders == {f"{f}.json" for f in FAMILIES}
    release = read_release(repository, family)
    assert (release.version, release.operations) == (1, EVERY)
    for entry in entries:
        weights = weights_files(repository / entry / "1")
        files = {"1", "1/model.onnx", *(f"1/{path.name}" for path in weights), "1/config.pbtxt", "config.pbtxt"}
        assert weights
        assert set(snapshot(repository / entry)) == files
        content = (repository / entry / "1" / "config.pbtxt").read_bytes()
        assert content == (repository / entry / "config.pbtxt").read_bytes()
        config = read_config(repository / entry / "config.pbtxt")
        assert (config.name, ModelSpec.from_config(config).model_digest) == (entry, release.model_digest)
        files = (repository / entry / "1" / "model.onnx", *weights)
        graph, *others = (hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
        assert config.parameters["graph_sha256"].string_value == graph
        named = dict(zip((path.name for path in weights), others, strict=True))
        assert json.loads(config.parameters["weights_sha256"].string_value) == named
    # The decoder's weights are one file.
    (decoders, *_), scorers = (
        weights_files(repository / served_name(family, name) / "1") for name in ("decode", "score")
    )
    assert any(decoders.samefile(path) for path in scorers)


@pytest.mark.slow
def test_the_deployment_is_written_into_every_configuration(repository):
    for path in repository.glob("*/config.pbtxt"):
        config = read_config(path)
        assert (config.max_batch_size, config.instance_group[0].count) == (32, 2)
        assert json.loads(config.parameters["score_samples"].string_value) == SCORE_SAMPLES


@pytest.mark.slow
def test_a_second_export_is_version_2_beside_an_unchanged_version_1(runs, repository, tmp_path):
    copied, chosen = tmp_path / "repository", ("encode", "score")
    for entry in (*(served_name("beta-vae", operation) for operation in chosen), "sos-vae_encode"):
        shutil.copytree(repository / entry, copied / entry)
    write_release(copied, "beta-vae", Release(1, chosen, "of the first"))
    before, seen = snapshot(copied), []
    deployment = Deployment(max_batch_size=5)
    second = export_run(
        runs["beta-vae"],
        copied,
        operations=chosen[::-1],
        score_samples=3,
        deployment=deployment,
        on_operation=seen.append,
    )
    after = snapshot(copied)
    assert second.version == 2
    assert [operation.name for operation in seen] == list(chosen)
    entries = {operation: served_name("beta-vae", operation) for operation in chosen}
    configs = {"beta-vae.json", *(f"{entry}/config.pbtxt" for entry in entries.values())}
    assert all(after[path] == content for path, content in before.items() if path not in configs)
    added = {f"{entry}/2{file}" for entry in entries.values() for file in ("", "/model.onnx", "/config.pbtxt")}
    added |= {
        str(path.relative_to(copied)) for entry in entries.values() for path in weights_files(copied / entry / "2")
    }
    assert set(after) - set(before) == added
    for operation, entry in entries.items():
        config = read_config(copied / entry / "config.pbtxt")
        wanted = 5 if operation != "score" else config.max_batch_size
        assert (config.max_batch_size, list(config.version_policy.specific.versions)) == (wanted, [2])
        spec = ModelSpec.from_config(config)
        assert (spec.score_samples, spec.operations) == (3, chosen)
    assert {item.operation.name for item in second.disagreements} == set(chosen)
    assert read_release(copied, "beta-vae") == Release(2, chosen, spec.model_digest)
    assert all(item.acceptable for item in second.disagreements)


def test_a_name_with_operations_that_the_model_cannot_do_is_refused(runs, tmp_path):
    (tmp_path / served_name("shared", "decode")).mkdir()
    run = runs["beta-vae"]
    assert find_leftovers(tmp_path, "shared", describe(run, 4, 3)) == []
    without_latents = replace(describe(run, 4, 3), operations=("sample", "draw", "score"))
    assert find_leftovers(tmp_path, "shared", without_latents) == [served_name("shared", "decode")]


def test_operations_that_a_model_has_not_or_that_would_stay_behind_are_refused(runs, tmp_path):
    with pytest.raises(InvalidArgument, match="--operations: found 'paint'; expected some of decode, encode, sample"):
        export_run(runs["beta-vae"], tmp_path, operations=["sample", "paint"])
    (tmp_path / served_name("beta-vae", "decode")).mkdir()
    with pytest.raises(InvalidArgument, match="has beta-vae_decode, which this export of encode, sample would leave"):
        export_run(runs["beta-vae"], tmp_path, operations=["sample", "encode"])
    assert [path.name for path in tmp_path.iterdir()] == ["beta-vae_decode"]


class WrongWhenExported(torch.nn.Module):
    """A branch for export that computes something else: what verification is there to find."""

    def __init__(self, mean):
        super().__init__()
        self.mean = mean

    def forward(self, features):
        return self.mean(features) + (0.02 if torch.compiler.is_exporting() else 0.0)


@pytest.mark.slow
def test_graphs_that_disagree_with_torch_leave_the_repository_as_it_was(run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    run.model.head.mean = WrongWhenExported(run.model.head.mean)
    entry = tmp_path / served_name("toy", "decode")
    (entry / "1").mkdir(parents=True)
    (entry / "1" / "model.onnx").write_bytes(b"an earlier version")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"nothing was published: decode\.mean: .*score\.log_weight: "):
        export_run(run, tmp_path, "toy", operations=["decode", "score"], jobs=1)
    assert snapshot(tmp_path) == before


class Dies(torch.nn.Module):
    """Ends the process that exports it, as the system does where memory runs out."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def forward(self, features):
        if torch.compiler.is_exporting():
            self.mark.touch()
            os._exit(1)
        return features[:, :1]


def test_a_process_that_dies_is_told_and_nothing_is_published(run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    run.model.head.mean = Dies(tmp_path / "mark")
    with pytest.raises(ExportError, match=r"a process died while it exported an operation.* try --jobs 1"):
        export_run(run, tmp_path / "repository", "toy", operations=["sample", "decode"], jobs=2)
    assert (tmp_path / "mark").exists()
    assert list((tmp_path / "repository").iterdir()) == []


class Unreadable(torch.nn.Module):
    """One that another process cannot make again, as what a notebook defines."""

    def __reduce__(self):
        return (eval, ("no_such_name",))


def test_a_model_that_no_process_can_be_given_is_told_and_nothing_is_published(run_folders, tmp_path):
    run = load_run(run_folders["beta-vae"])
    run.model.brighter = lambda images: images + 1
    with pytest.raises(ExportError, match=r"cannot be sent to other processes: .*lambda.* try --jobs 1"):
        export_run(run, tmp_path, "toy", operations=["sample", "decode"], jobs=2)
    run.model.brighter = Unreadable()
    with pytest.raises(ExportError, match=r"cannot be read in another process: .*no_such_name.* try --jobs 1"):
        export_run(run, tmp_path, "toy", operations=["sample", "decode"], jobs=2)
    assert list(tmp_path.iterdir()) == []


# No process of an export may be a fork of the exporting one, whose threads would be cut off at whatever they were at.
EXPORTING = """
import os, signal, sys
from pathlib import Path
from covae_core.signals import terminated_as_interrupted
from covae_export.exporting import export_run
from covae_train.run import load_run

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would not hear it
{guard}:
    os.register_at_fork(after_in_child=lambda: os._exit(1))
    with terminated_as_interrupted():
        export_run(load_run(Path(sys.argv[1])), Path(sys.argv[2]), "toy", operations=["sample", "score"], jobs=2)
"""


@pytest.fixture
def exporting(run_folders, tmp_path):
    """Starts a process group of its own that exports into `tmp_path / "repository"`, two operations at a time; in its
    folder are files of modules' names."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("torch", "numpy", "random", "socket", "selectors"):
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the current folder')")
    (tmp_path / "script").mkdir()
    processes = []

    def start(guard='if __name__ == "__main__"'):
        script = tmp_path / "script" / "exporting.py"
        script.write_text(EXPORTING.format(guard=guard))
        words = [sys.executable, str(script), str(run_folders["sos-vae"]), str(tmp_path / "repository")]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(words, cwd=folder, stderr=pipe, text=True, start_new_session=True))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.slow
def test_no_process_of_an_export_is_a_fork_of_the_exporting_one(exporting, tmp_path):
    process = exporting()
    assert process.communicate(timeout=300) == (None, "")
    assert process.returncode == 0
    assert read_release(tmp_path / "repository", "toy").operations == ("sample", "score")


@pytest.mark.slow
def test_a_script_that_every_process_would_begin_again_is_told(exporting):
    process = exporting(guard="if True")
    words = process.communicate(timeout=300)[1]
    assert "if __name__ == '__main__':" in words  # Python's own
    assert words.splitlines()[-1].startswith("covae_export.errors.ExportError: a process died")
    assert not there_is(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_ended_ends_its_processes_with_it(number, exporting, tmp_path):
    def at_work():
        return list((tmp_path / "repository").glob(".staging-*/*"))

    process = exporting()
    until = time.monotonic() + 120
    while time.monotonic() < until and len(at_work()) < 2:
        time.sleep(0.05)
    assert len(at_work()) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    words = process.communicate(timeout=20)[1]
    assert not there_is(process.pid)
    if number != signal.SIGKILL:
        assert at_work() == []
        assert words.count("Traceback") == 1  # the script's own
        assert "leaked" not in words  # as Python says of what nobody gave back


def there_is(group):
    """Whether a process of a group lives, some seconds later too."""

    def lives():
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state != "Z":
                    return True
        return False

    until = time.monotonic() + 20
    while time.monotonic() < until and lives():
        time.sleep(0.05)
    return lives()

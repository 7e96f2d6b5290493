"""`twolevel export` in every format: what it writes, says and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import command, run

import twolevel.models
from twolevel.models import files
from twolevel.models.exporting import onnx_graph

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WORDS = (
    "train --model wrn-10-1 --conv gc2l --groups 4 --data sample --batch-size 8 --max-steps 2 --ema-decay 0.5"
)
CREATE = {"name": "wrn-10-1", "conv": "gc2l", "groups": 4, "num_classes": 10}


@pytest.fixture(scope="module")
def shared(pool, tmp_path_factory) -> Path:
    """A run of four ranks, each with one of the groups."""
    output = tmp_path_factory.mktemp("runs") / "shared"
    run(pool, *WORDS.split(), "--output", output, ranks=4)
    return output


@pytest.fixture(scope="module")
def whole(shared, tmp_path_factory) -> Path:
    """What was exported of it, for `twolevel.models.load`."""
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    assert command("export", shared, file).code == 0
    return file


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def outputs(file: Path, x: torch.Tensor) -> torch.Tensor:
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(x)
    with torch.no_grad():
        return twolevel.models.load(file).eval()(x)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Float32, ten layers: sums of some hundred products in another order."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_a_checkpoint_of_four_ranks_is_exported_as_the_whole_network(shared, whole, tmp_path, capfd, suffix):
    file = tmp_path / f"model.{suffix}"
    done = command("export", shared, file)
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()
    assert first.startswith(f"{file}: wrn-10-1 from {shared}")
    assert second.startswith(f"{file}: checked, the largest difference from the network is ")
    assert capfd.readouterr() == ("", "")  # nor of an exporter, which may write to the process's own streams
    for batch in (1, 3):
        close(outputs(file, images(batch)), outputs(whole, images(batch)))


def test_moving_averages_are_exported_where_they_are_asked_for(shared, whole, tmp_path):
    averaged = tmp_path / "ema.safetensors"
    for file in (averaged, tmp_path / "ema.pt2"):
        assert command("export", shared, file, "--weights", "ema").code == 0
    x = images(3)
    close(outputs(tmp_path / "ema.pt2", x), outputs(averaged, x))
    assert not torch.allclose(outputs(averaged, x), outputs(whole, x), rtol=0, atol=1e-3)


def test_an_exported_safetensors_file_is_exported_further(whole, tmp_path):
    assert command("export", whole, tmp_path / "model", "--format", "torch").code == 0
    x = images(3)
    close(torch.export.load((tmp_path / "model").open("rb")).module()(x), outputs(whole, x))
    line = command("export", whole, tmp_path / "again.safetensors").err
    assert "is an exported file already" in line


def test_exporters_say_nothing_in_a_process_of_their_own(whole, tmp_path):
    """Where their loggers and warnings are as a user has them."""
    words = ["-W", "always", "-m", "twolevel", "export", str(whole), str(tmp_path / "model.onnx")]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.h5", [], "the suffix '.h5' of model.h5 names no format; use .safetensors, .pt2, .onnx, or say format="),
        ("model", [], "the suffix '' of model names no format"),
        ("model.onnx", ["--format", "torch"], "format=torch is not that of model.onnx; use a name that ends in .pt2"),
        ("model.pt2", ["--format", "safetensors"], "format=safetensors is not that of model.pt2"),
        ("model.pt2", ["--format", "tflite"], "'tflite'"),
        ("there.onnx", [], "there.onnx exists already; remove it or name another file"),
        ("nowhere/model.pt2", [], "cannot write nowhere/model.pt2: there is no folder nowhere"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_in_one_line(
    whole, tmp_path, monkeypatch, name, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("there.onnx").write_text("kept")
    done = command("export", whole, name, *options)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert message in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"] and Path(
        "there.onnx"
    ).read_text() == "kept"


def test_a_file_that_does_not_say_what_its_images_are_is_refused(tmp_path):
    model = twolevel.models.create(**CREATE)
    files.save(tmp_path / "model.safetensors", model.state_dict(), CREATE, {})
    line = command("export", tmp_path / "model.safetensors", tmp_path / "model.pt2").err
    assert "does not say what it was trained on; use twolevel.models.export" in line


def test_weights_that_are_not_finite_are_named_and_leave_no_file(whole, tmp_path):
    options, data, tensors = files.read(whole)
    tensors["classifier.weight"][0, 0] = torch.nan
    files.save(tmp_path / "model.safetensors", tensors, options, data)
    done = command("export", tmp_path / "model.safetensors", tmp_path / "model.pt2")
    assert done.code == 2 and "outputs for random images are not finite" in done.err
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_exporter_the_extra_is_named(whole, tmp_path, missing, hidden):
    hidden(missing)
    done = command("export", whole, tmp_path / "model.onnx")
    assert done.code == 2
    assert done.err == f"twolevel export: format=onnx needs {missing}; pip install twolevel[onnx]\n"


def test_without_onnxruntime_a_file_is_written_and_said_to_be_unchecked(whole, tmp_path, hidden):
    hidden("onnxruntime")
    done = command("export", whole, tmp_path / "model.onnx")
    assert (done.code, done.err) == (0, "")
    assert "not checked, as onnxruntime is not installed (pip install twolevel[onnx])" in done.out
    assert (tmp_path / "model.onnx").is_file()


@pytest.fixture
def hidden(monkeypatch):
    """Takes the name of a module that is not to be found."""
    find = onnx_graph.importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(onnx_graph.importlib.util, "find_spec", lambda n: None if n == name else find(n))

    return hide


def test_a_program_of_torch_runs_where_there_is_no_twolevel(whole, tmp_path):
    file = tmp_path / "model.pt2"
    assert command("export", whole, file).code == 0
    torch.save(images(3), tmp_path / "images")
    script = (
        "import sys; sys.modules['twolevel'] = None  # importing it is an error\n"
        "import json, torch\n"
        "run = torch.export.load('model.pt2').module()\n"
        "print(json.dumps(run(torch.load('images')).tolist()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    close(torch.tensor(json.loads(done.stdout)), outputs(whole, images(3)))


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_no_path_of_this_machine_is_in_a_file(whole, tmp_path, name):
    assert command("export", whole, tmp_path / name).code == 0
    content = (tmp_path / name).read_bytes()
    for path in (str(Path(__file__).parents[2]), str(Path(torch.__file__).parent)):
        assert path.encode() not in content

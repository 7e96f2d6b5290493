"""Every kind of convolution trains, alone and as replicas."""

import pytest
import torch
from command import records, run
from safetensors.torch import load_file

import twolevel.models
from twolevel.nn import DynamicGroupConv2d, LearnedGroupConv2d, for_inference
from twolevel.settings import CONVS

KINDS = {
    "sc": [],
    "gc": ["--groups", 4],
    "gc2l": ["--groups", 4],
    "bgc": ["--groups", 4],
    "shuffle": ["--groups", 4],
    "flgc": ["--groups", 4],
    "dgconv": ["--complexity-divisor", 4],
    "dgc": ["--groups", 4, "--lasso", 1e-4],
    "lgc": ["--groups", 4, "--group-lasso", 1e-4],
}

assert set(KINDS) == set(CONVS)


@pytest.mark.parametrize("conv", KINDS)
def test_a_few_hundred_steps_bring_the_loss_down(pool, tmp_path, conv):
    words = "--model wrn-10-1 --data sample --batch-size 20 --epochs 2 --learning-rate 0.05 --log-steps 50"
    options = [*words.split(), "--lr-schedule", "cosine", "--conv", conv, *KINDS[conv]]
    run(pool, "train", *options, "--output", tmp_path / "run", timeout=300)
    epochs = records(tmp_path / "run", "epoch")
    # 2.30 is chance; two hundred steps of 20 images bring the slowest of them (DGC, which prunes meanwhile) below 2.2.
    assert epochs[-1]["train_loss"] < 2.2
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"] - 0.05


@pytest.mark.parametrize("conv", KINDS)
def test_two_replicas_learn_what_one_process_learns_of_the_joined_batch(pool, tiny, tmp_path, conv):
    options = [*tiny, "--conv", conv, *KINDS[conv]]
    if not KINDS[conv] or "--groups" not in KINDS[conv]:
        options += ["--groups", 1]
    run(pool, "train", *options, "--output", tmp_path / "one")
    mesh = ["--data-parallel", 2, "--sync-batch-norm"]
    run(pool, "train", *options, *mesh, "--output", tmp_path / "two", ranks=2)
    one, two = ([r["loss"] for r in records(tmp_path / name, "step")] for name in ("one", "two"))
    # float64; sums over replicas are added in another order.
    assert one == pytest.approx(two, rel=1e-9)


@pytest.mark.parametrize("conv", ["gc", "bgc"])  # of gc2l test_resume.py has more
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_four_ranks_goes_on_and_is_exported_on_fewer(pool, tiny, tmp_path, conv, ranks):
    options, files = [*tiny, "--conv", conv, "--ema-decay", 0.9], []
    run(pool, "train", *options, "--output", tmp_path / "whole")
    run(pool, "train", *options, "--output", tmp_path / "parts", "--max-steps", 4, ranks=4)
    run(pool, "train", *options, "--output", tmp_path / "parts", "--resume", ranks=ranks)
    for name in ("whole", "parts"):
        files.append(tmp_path / f"{name}.safetensors")
        run(pool, "export", tmp_path / name, files[-1])
    whole, parts = ([r["loss"] for r in records(tmp_path / n, "step")] for n in ("whole", "parts"))
    # float64; sums over ranks are added in another order, and steps amplify the rounding of those before them.
    assert parts == pytest.approx(whole, rel=1e-10)
    torch.testing.assert_close(load_file(files[1]), load_file(files[0]), rtol=1e-10, atol=1e-10)


def test_a_bound_on_saliencies_is_in_the_run_its_export_and_the_inference_form(pool, tiny, tmp_path):
    output, file = tmp_path / "run", tmp_path / "whole.safetensors"
    options = [*tiny, "--conv", "dgc", "--learning-rate", 0.01]
    run(pool, "train", *options, "--output", tmp_path / "free")
    run(pool, "train", *options, "--saliency-bound", 0.5, "--output", output)
    free, bounded = ([r["loss"] for r in records(o, "step")] for o in (tmp_path / "free", output))
    assert free[0] != bounded[0]
    run(pool, "export", output, file)
    (outcome,) = run(pool, "evaluate", output, "--precision", "float64")
    assert f"test loss {records(output, 'epoch')[-1]['test_loss']:.4f} " in outcome.out
    model = twolevel.models.load(file).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DynamicGroupConv2d)}
    assert len(layers) > 1
    assert {layer.saliency_bound for layer in layers.values()} == {0.5}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        wanted = model(images)
        for name, layer in layers.items():
            model.set_submodule(name, layer.to_inference())
        # float64; the kept channels are added up in another order.
        torch.testing.assert_close(model(images), wanted, rtol=1e-9, atol=1e-9)


def test_a_condensed_network_is_recorded_exported_and_prepared_for_inference(pool, tiny, tmp_path):
    output, file = tmp_path / "run", tmp_path / "whole.safetensors"
    run(
        pool,
        "train",
        *tiny,
        "--conv",
        "lgc",
        "--condensation",
        2,
        "--learning-rate",
        0.01,
        "--output",
        output,
    )
    run(pool, "export", output, file)
    model = twolevel.models.load(file).eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LearnedGroupConv2d)}
    assert len(layers) > 1
    kept = {name: [layer.in_channels // 2] * 4 for name, layer in layers.items()}
    assert records(output, "epoch")[-1]["lgc_kept"] == kept
    assert {name: layer.kept.sum(1).tolist() for name, layer in layers.items()} == kept
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        # float64; the kept inputs are added up in another order.
        torch.testing.assert_close(for_inference(model)(images), model(images), rtol=1e-9, atol=1e-9)


def test_progress_gates_and_kept_inputs_are_in_the_checkpoint(pool, tiny, tmp_path):
    for conv in ("dgc", "dgconv", "lgc"):
        options = [*tiny, "--conv", conv, *KINDS[conv], *(["--groups", 1] if conv == "dgconv" else [])]
        run(pool, "train", *options, "--output", tmp_path / f"{conv}-whole")
        run(pool, "train", *options, "--output", tmp_path / conv, "--max-steps", 4)
        run(pool, "train", *options, "--output", tmp_path / conv, "--resume")
        whole, resumed = ([r["loss"] for r in records(tmp_path / n, "step")] for n in (f"{conv}-whole", conv))
        assert whole == resumed

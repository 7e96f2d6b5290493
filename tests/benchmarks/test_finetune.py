"""Fine-tuning from nearest weights against starting anew, on the sample."""

import json

from benchmarks import finetune


def test_every_peer_is_trained_once_from_what_it_is_said_to_start(tmp_path, capfd):
    words = "--model wrn-10-1 --data sample --dense-epochs 1 --epochs 1 --seeds 0".split()
    places = [
        "--data-root",
        str(tmp_path),
        "--folder",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path / "found.json"),
    ]
    finetune.main([*words, *places])
    found = json.loads((tmp_path / "found.json").read_text())
    assert {peer: len(errors["0"]) for peer, errors in found["errors"].items()} == {
        "dense": 1,
        "nearest": 1,
        "anew": 1,
    }
    difference = found["errors"]["anew"]["0"][0] - found["errors"]["nearest"]["0"][0]
    assert found["difference"] == {"mean": difference, "deviation": None}
    assert str(tmp_path) not in (tmp_path / "found.json").read_text()
    said = capfd.readouterr().out
    assert said.count("started from") == 1 and said.count("epoch 1/1") == 3

    finetune.main([*words, *places])
    assert "epoch 1/1" not in capfd.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["errors"] == found["errors"]


def test_the_table_has_means_over_seeds_and_the_spread_of_the_last():
    errors = {"nearest": {0: [30.0, 20.0], 1: [32.0, 22.0]}, "anew": {0: [40.0, 30.0], 1: [40.0, 34.0]}}
    rows = [line.split() for line in finetune.table(errors).splitlines()]
    assert rows[1] == ["nearest", "2", "31.00", "21.00", "+-", "1.41"]
    assert rows[2] == ["anew", "2", "40.00", "32.00", "+-", "2.83"]

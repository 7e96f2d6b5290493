"""Kernels are counted as they are compiled: what machine code says, for which layers, with what sums."""

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import kernels, layers, offline, report
from benchmarks.offline import Compiled, Instruction
from twolevel.errors import UserError
from twolevel.ops.kernels.triton import Config
from twolevel.ops.kernels.triton.launches import Launch

compiles = pytest.mark.skipif(offline.unavailable() is not None, reason=str(offline.unavailable()))
# A loop of two steps, of tiles of 64 x 16 x 16 by 4 warps, in another loop; then one more step.
LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000e700000000800 */
        /*0010*/              @!P0 LDG.E.U16 R99, desc[UR24][R90.64] ;         /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R21], desc[UR24][R88.64], P0 ;
        /*0030*/                   LDG.E R3, desc[UR24][R90.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/              @UP1 BRA 0x10 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00b0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*00c0*/                   STL.64 [R1], R2 ;
        /*00d0*/                   LDL R2, [R1+0x4] ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def made(listing: str = LISTING, steps: int = 9, config: tuple[int, ...] = (64, 16, 16, 4, 3)) -> Compiled:
    launch = Launch("gather_product", 8, steps, Config(*config), {}, {})
    return Compiled(launch, 90, 40, 20 << 10, offline.instructions(listing))


def test_the_main_loop_is_the_innermost_with_products():
    loop = made().main_loop()
    assert [one.address for one in loop] == [*range(0x20, 0x90, 0x10)]
    counts = made().counts()
    assert counts["loop"] == {"instructions": 7, "products": 4, "steps": 2, "loads": {16: 1, 4: 1}}
    assert counts["loads"] == {16: 1, 4: 1, 2: 1}
    assert counts["products"] == ["HMMA.16816.F32.BF16"]
    assert counts["instructions"] == 15  # without the NOP after the end


def test_instructions_of_the_loop_are_issued_once_for_every_two_of_its_steps():
    # 8 instructions outside. One of nine steps is outside too: eight in four turns.
    assert made().issued() == 8 + 4 * 7
    assert made(LISTING.replace("BRA", "BRX")).issued() == 15


def test_spills_are_bytes_to_and_from_local_memory():
    assert made().spilled_bytes == 8 + 4


def test_products_of_four_warps_count_for_each_of_them():
    assert Instruction(0, "HGMMA.64x128x16.F32.BF16", "").macs == 64 * 128 * 16 // 4
    assert Instruction(0, "HMMA.1688.F32.TF32", "").macs == 16 * 8 * 8
    assert Instruction(0, "FFMA", "").macs == 0


def test_a_processor_holds_what_its_scarcest_resource_allows():
    # 65536 / (40 registers * 128 threads) = 12; 228 KiB / 21 KiB = 10; 64 warps / 4 = 16
    assert made().programs_per_processor == 10
    assert made()._replace(shared_bytes=0).programs_per_processor == 12
    # 41 registers are 6 blocks of 256 for a warp: 65536 / (1536 * 4)
    assert made()._replace(shared_bytes=0, registers=41).programs_per_processor == 10
    assert made()._replace(shared_bytes=0, registers=16).programs_per_processor == 16


def test_kernels_of_a_layer_are_those_of_every_schedule():
    shape = layers.Shape(64, 64, 3, 1, 8)
    one = [*kernels.Network.named("wrn-10-1/4").kernels(shape, 2, torch.bfloat16, 90)]
    assert [kernel.operation for kernel in one] == [
        "forward, restriction",
        "forward, coarse",
        "restriction",
        "input gradient",
        "weight gradient",
        "input gradient of restriction",
        "weight gradient of restriction",
    ]
    rank = [*kernels.Network.named("wrn-10-1/4/2").kernels(shape, 2, torch.bfloat16, 90)]
    assert [kernel.operation for kernel in rank][1] == "forward"
    assert {kernel.problem.groups for kernel in one} == {4}
    assert {kernel.problem.groups for kernel in rank} == {2}
    assert {kernel.problem.inputs for kernel in rank} == {32}
    strided = kernels.Network.named("wrn-10-1/4").kernels(
        layers.Shape(64, 64, 3, 2, 8), 2, torch.bfloat16, 90
    )
    taps = [kernel.operation for kernel in strided if kernel.operation.startswith("input gradient,")]
    assert taps == [f"input gradient, {taps} taps" for taps in ("1x1", "1x2", "2x1", "2x2")]


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-10-1/four", "wrn-10-1/0", "wrn-10-1/4/2/2"])
def test_networks_are_named_with_their_groups(name):
    with pytest.raises(UserError, match=f"--networks {name} is not MODEL/GROUPS"):
        kernels.Network.named(name)


def test_ranks_share_the_groups():
    with pytest.raises(UserError, match="--networks wrn-10-1/4/3: 3 ranks cannot share 4 groups"):
        kernels.Network.named("wrn-10-1/4/3")


def test_a_target_without_facts_is_refused():
    with pytest.raises(UserError, match="unknown target '75'"):
        kernels.Settings(targets=(75,))


def test_a_card_that_is_there_is_the_target_unless_offline_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert kernels.Settings().targets == (80,)
    assert kernels.Settings(offline=True).targets == offline.TARGETS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"nothing is known of compute capability 7.5 here; use --offline"):
        kernels.Settings()


def test_where_nothing_can_be_compiled_it_is_skipped_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(offline, "unavailable", lambda: "no ptxas")
    command.main(["kernels", "--offline", "--output", str(tmp_path / "found.json")])
    assert capsys.readouterr().out == "skipped kernels: no ptxas\n"
    assert not [*tmp_path.iterdir()]


@compiles
def test_every_kernel_is_written_with_its_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(layers, "shapes", lambda name: {layers.Shape(64, 64, 1, 1, 8): 2})
    output = tmp_path / "found.json"
    argv = ["--offline", "--networks", "wrn-10-1/4", "--targets", "80", "--batch", "8"]
    command.main(["kernels", *argv, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["machine"].keys() >= {"triton", "ptxas", "torch"}
    found = result["kernels"]
    assert len(found) == 7
    for kernel in found:
        assert (kernel["network"], kernel["target"], kernel["layer"]) == (
            "wrn-10-1 G=4",
            80,
            "64-64 k1 s1 8x8",
        )
        assert 0 < kernel["registers"] <= 255
        assert kernel["instructions"] > 0 and kernel["loads"]
    total = sum(2 * kernel["programs"] * kernel["config"][3] * kernel["issued"] for kernel in found)
    assert result["issued"] == {"wrn-10-1 G=4, sm_80": total}
    table = output.with_suffix(".txt").read_text()
    assert all(kernel["operation"] in table for kernel in found)
    assert kernels.Settings(offline=True).output == report.RESULTS / "kernels-offline.json"

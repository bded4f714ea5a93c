"""What execution settings resolve to, and what they cannot."""

from __future__ import annotations

import pytest
import torch
from snakegpt import distributed
from snakegpt.distributed import (
    choose_device,
    choose_micro_rows,
    choose_precision,
    choose_ranks,
    choose_slices,
    choose_strategy,
)
from snakegpt.errors import UserError


@pytest.mark.parametrize(
    ("rows", "threads", "ranks"),
    [(12, 1, 1), (12, 2, 1), (12, 9, 2), (7, 8, 1), (64, 64, 8), (1, 8, 1)],
)
def test_cpu_ranks_divide_the_rows_and_fit_the_threads(rows, threads, ranks):
    assert choose_ranks("auto", device="cpu", rows=rows, threads=threads) == ranks


def test_one_rank_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_ranks("auto", device="cuda", rows=512, threads=2) == 8
    assert choose_ranks("auto", device="cuda", rows=12, threads=2) == 6
    with pytest.raises(UserError, match="has 8 CUDA devices"):
        choose_ranks(16, device="cuda", rows=512, threads=2)


def test_several_ranks_do_not_share_one_mps_device():
    assert choose_ranks("auto", device="mps", rows=12, threads=16) == 1
    with pytest.raises(UserError, match=r"ranks = 2, but there is one mps(.|\n)*to 1 or auto"):
        choose_ranks(2, device="mps", rows=12, threads=16)


def test_ranks_that_do_not_divide_the_rows_are_refused_with_those_that_do():
    with pytest.raises(UserError, match=r"ranks = 5 does not divide the 12 rows(.|\n)*4 and 6"):
        choose_ranks(5, device="cpu", rows=12, threads=8)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match=r"device = cuda(.|\n)*available: cpu"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_follows_the_processor(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_precision("auto", "cpu") == dtype
    assert choose_precision("float32", "cpu") == torch.float32
    assert choose_precision("bfloat16", "cpu") == torch.bfloat16


def test_micro_batches_divide_the_share_and_respect_memory():
    small = {"device": "cpu", "context": 64, "vocabulary": 65, "width": 512}
    assert choose_micro_rows("auto", share=12, **small) == 12
    large = {"device": "cpu", "context": 1024, "vocabulary": 50304, "width": 12 * 768}
    assert choose_micro_rows("auto", share=512, **large) == 1
    middle = {"device": "cpu", "context": 128, "vocabulary": 50304, "width": 512}
    assert choose_micro_rows("auto", share=16, **middle) == 4
    assert choose_micro_rows(3, share=12, **small) == 3
    with pytest.raises(UserError, match=r"rows_per_rank = 5(.|\n)*4 and 6"):
        choose_micro_rows(5, share=12, **small)


def test_one_process_is_a_group_of_one():
    with distributed.joined("cpu") as group:
        assert (group.rank, group.ranks, group.leads) == (0, 1, True)
        assert group.sum(torch.tensor([2.0])).item() == 2.0


def test_the_first_strategy_whose_share_fits_half_a_gpu_is_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    gpus = {"device": "cuda", "ranks": 8}
    assert choose_strategy("auto", n_parameters=124_000_000, **gpus) == "ddp"
    assert choose_strategy("auto", n_parameters=4_000_000_000, **gpus) == "zero1"  # 64 GB; 36 GB
    assert choose_strategy("auto", n_parameters=5_000_000_000, **gpus) == "fsdp"
    assert choose_strategy("zero1", n_parameters=1, **gpus) == "zero1"
    assert choose_strategy("auto", device="cpu", ranks=8, n_parameters=10**12) == "ddp"


def test_slices_stay_inside_a_node_where_it_holds_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80e9, 80e9))
    nodes = {"ranks": 32, "local_ranks": 8, "device": "cuda"}
    assert choose_slices(7_000_000_000, **nodes) == 8  # 14 GB each
    assert choose_slices(22_000_000_000, **nodes) == 32  # 44 GB are more than half
    assert choose_slices(22_000_000_000, ranks=4, local_ranks=2, device="cpu") == 2

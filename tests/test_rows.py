"""Streamed rows: exact up to a rank, and beyond it the best approximation, up to what is lost."""

import gc
import io
import tempfile

import pytest
import torch
from models import decaying_rows, frozen, gather, kept, randn

from laplace_llm.errors import StateError
from laplace_llm.rows import LowRankGGN

EXACT = {"rtol": 1e-8, "atol": 1e-10}
SIZES = [8, 10, 6]
P = sum(SIZES)
CPU = torch.device("cpu")
PLACES = pytest.mark.parametrize("place", [None, "cpu", "disk"])


def trace_norm(matrix):
    return torch.linalg.eigvalsh(matrix).abs().sum()


@PLACES
@pytest.mark.parametrize(("n", "max_rank"), [(0, 8), (1, 8), (8, 8), (1, 1), (50, None)])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_exact_up_to_the_rank(n, max_rank, batch, place):
    rows = decaying_rows(n, P)
    ggn = gather(rows, SIZES, max_rank, batch, place)
    torch.testing.assert_close(kept(ggn), rows.T @ rows, **EXACT)
    torch.testing.assert_close(ggn.gram(), rows @ rows.T, **EXACT)
    per_tensor = [part @ part.T for part in rows.split(SIZES, 1)]
    torch.testing.assert_close(ggn.grams(), torch.stack(per_tensor), **EXACT)
    assert ggn.rank == n
    assert ggn.lost_trace == 0


@pytest.mark.parametrize("max_rank", [1, 8, 16])
def test_one_truncation_is_the_best_approximation_of_its_rank(max_rank):
    rows = decaying_rows(max_rank + max(max_rank // 4, 1), P)  # what waits for one truncation
    ggn = gather(rows, SIZES, max_rank)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    best = (vectors[:, -max_rank:] * values[-max_rank:]) @ vectors[:, -max_rank:].T
    torch.testing.assert_close(kept(ggn), best, **EXACT)
    torch.testing.assert_close(ggn.lost_trace, values[:-max_rank].sum(), **EXACT)
    assert ggn.rank == max_rank


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 7, 60])
@pytest.mark.parametrize("max_rank", [1, 3, 8, 20])
def test_trace_is_what_is_kept_and_what_is_lost(max_rank, batch, dtype):
    rows = decaying_rows(60, P).to(dtype)
    ggn = gather(rows, SIZES, max_rank, batch)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    whole = rows.double().square().sum()
    torch.testing.assert_close(ggn.trace, whole, rtol=rtol, atol=0)
    torch.testing.assert_close(kept(ggn).trace() + ggn.lost_trace, whole, rtol=rtol, atol=0)
    assert ggn.lost_trace > 0


@pytest.mark.parametrize("max_rank", [1, 3, 8, 20])
def test_order_and_batch_size_change_no_more_than_was_lost(max_rank):
    rows = decaying_rows(60, P, 2)
    whole = rows.T @ rows
    results = [gather(r, SIZES, max_rank, b) for r in (rows, rows.flip(0)) for b in (1, 7, 60)]
    for ggn in results:
        missing = whole - kept(ggn)
        assert torch.linalg.eigvalsh(missing)[0] > -1e-12 * whole.trace()  # only ever lost
        torch.testing.assert_close(missing.trace(), ggn.lost_trace, **EXACT)
        for other in results:
            lost = ggn.lost_trace + other.lost_trace
            assert trace_norm(kept(ggn) - kept(other)) <= lost * (1 + 1e-9)


@pytest.mark.parametrize("max_rank", [1, 2, 3, 8, 20, None])
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_memory_is_bounded_and_seldom_allocated(batch, max_rank):
    ggn, buffers = LowRankGGN(SIZES, max_rank, torch.float64, CPU), []
    for part in randn(200, P).split(batch):
        ggn.add(part)
        if not any(ggn.store._buffer is buffer for buffer in buffers):
            buffers.append(ggn.store._buffer)
    sizes = [len(buffer) for buffer in buffers]
    assert max(sizes) <= (300 if max_rank is None else max(1.25 * max_rank, max_rank + 1))
    assert len(sizes) <= 12  # half as many again every time, not at every batch


@pytest.mark.parametrize("max_rank", [None, 60, 3, 8])
def test_merging_halves(max_rank):
    rows = decaying_rows(60, P)
    whole = gather(rows, SIZES, max_rank)
    left, right = gather(rows[:20], SIZES, max_rank, 7), gather(rows[20:], SIZES, max_rank, 7)
    before = frozen(right.state())
    left.merge(right)
    assert frozen(right.state()) == before
    torch.testing.assert_close(left.trace, whole.trace)
    torch.testing.assert_close(kept(left).trace() + left.lost_trace, whole.trace)
    lost = left.lost_trace + whole.lost_trace
    assert left.rank == whole.rank
    assert bool(lost > 0) == (max_rank in (3, 8))
    assert trace_norm(kept(left) - kept(whole)) <= lost * (1 + 1e-9) + 1e-10


@pytest.mark.parametrize("max_rank", [None, 8])
def test_all_places_give_the_same_bits(max_rank):
    rows = decaying_rows(60, P)
    results = [gather(rows, SIZES, max_rank, 7, place) for place in (None, "cpu", "disk")]
    for ggn in results:
        ggn.merge(gather(decaying_rows(20, P), SIZES, max_rank, 3, "disk"))
    states = [frozen(ggn.state()) for ggn in results]
    assert states[0] == states[1] == states[2]


def test_the_file_is_gone_with_the_object(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ggn = gather(decaying_rows(60, P), SIZES, None, 7, "disk")
    (file,) = tmp_path.rglob("rows")
    assert file.stat().st_size >= 60 * P * 8
    state = ggn.state()
    del ggn
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert state["rows"].shape == (60, P)


@PLACES
@pytest.mark.parametrize("max_rank", [None, 8, 4])
def test_state_round_trip(max_rank, place):
    ggn = gather(decaying_rows(30, P), SIZES, 8, 7)
    file = io.BytesIO()
    torch.save(ggn.state(), file)
    assert file.tell() < 8 * P * 8 + 3000  # the rows that are kept and no more
    file.seek(0)
    state = torch.load(file, weights_only=True)
    loaded = LowRankGGN(SIZES, max_rank, torch.float64, CPU, place).load(state)
    loaded.truncate()
    torch.testing.assert_close(kept(loaded).trace() + loaded.lost_trace, ggn.trace)
    if max_rank == 4:
        assert loaded.rank == 4
        difference = trace_norm(kept(loaded) - kept(ggn))
        torch.testing.assert_close(difference, loaded.lost_trace - ggn.lost_trace)
    else:
        assert frozen(loaded.state()) == frozen(ggn.state())
    for source, contents in ((loaded, state), (loaded, loaded.state())):
        before = frozen(contents)
        source.add(decaying_rows(9, P))
        assert frozen(contents) == before


@pytest.mark.parametrize("rows", [None, torch.zeros(3, P + 1), torch.zeros(P)])
def test_state_of_other_weights_is_refused(rows):
    ggn = gather(decaying_rows(5, P), SIZES)
    with pytest.raises(StateError, match=f"rows of {P} weights"):
        ggn.load({**ggn.state(), "rows": rows})

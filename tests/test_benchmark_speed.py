"""The speed benchmark: what it runs, counts and writes; never how long anything takes."""

import json
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from laplace_llm.benchmark import __main__ as benchmark
from laplace_llm.benchmark.speed import command, measure, operations, peers, presets, report, row
from laplace_llm.benchmark.speed.accounting import LiveBytes, account
from laplace_llm.benchmark.speed.four_bit import four_bit
from laplace_llm.benchmark.speed.operations import Operation, Row
from laplace_llm.benchmark.speed.presets import Preset, Problem, Workload

TINY = Workload.of("tiny", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(TINY)


def named(name: str, rows: list[Row] = operations.ROWS) -> Row:
    return next(row for row in rows if row.name == name)


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def _few_rows(monkeypatch):
    """Leave one operation by us and one peer, each in its own process, and add one that fails."""
    broken = Row("broken", "broken", lambda problem: Operation(lambda: None))
    monkeypatch.setattr(operations, "ROWS", [broken, named("fit")])
    monkeypatch.setattr(command, "NAMES", ["broken", "fit"])
    monkeypatch.setattr(peers, "ROWS", [named("fit", peers.ROWS)])
    run_row = command.run_row

    def run(r: Row, workload: Workload, options: Any) -> dict[str, Any]:
        if r is not broken:
            return run_row(r, workload, options)
        request = {"name": "unknown", "who": "", "workload": asdict(workload)}
        return {"name": r.name, "title": r.title, "who": r.who, **row.run(request)}

    monkeypatch.setattr(command, "run_row", run)


@pytest.mark.usefixtures("_few_rows")
@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--peers", "--rows", "broken", "fit"]
    arguments += ["--repeats", "3", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["speed", *arguments])
    assert exit_.value.code == 1  # as a row of ours failed; the others ran all the same
    output = capsys.readouterr()
    content = json.loads((tmp_path / "speed.json").read_text())
    broken, ours, theirs = content["rows"]
    assert [r["who"] for r in content["rows"]] == [*["laplace_llm"] * 2, peers.CURVLINOPS]
    assert broken["error"].startswith("StopIteration")
    for result in (ours, theirs):
        assert len(result["raw_seconds"]) == len(result["raw_floor_seconds"]) == 3
        assert result["floor"] == "forward + 2 backward"
        assert result["floor_ratio"] > 0
        assert 0 < result["before_bytes"] <= result["peak_bytes"]
    assert theirs["times_ours"] == pytest.approx(theirs["floor_ratio"] / ours["floor_ratio"])
    assert content["workload"] == asdict(TINY)
    assert content["threads"] == 1
    assert {"torch", "laplace-torch", "python"} <= set(content["versions"])
    assert content["command"].startswith("python -m laplace_llm.benchmark speed --preset tiny")
    table = [line for line in output.out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert "StopIteration" in table[2]
    assert content["command"] in output.out
    assert "[3/3] exact fit, per batch, laplace-torch, curvlinops ... done" in output.err


def test_rows_of_an_operation_stand_together():
    rows = command.plan(["fit", "qmc"], with_peers=True, meta=False)
    assert [(r.name, r.who) for r in rows] == [
        ("fit", "laplace_llm"),
        ("fit", peers.CURVLINOPS),
        ("fit", peers.ASDL),
        ("qmc", "laplace_llm"),
    ]


def test_every_peers_row_is_one_of_ours():
    assert {r.name for r in peers.ROWS} < {r.name for r in operations.ROWS}
    assert len({(r.name, r.who) for r in [*operations.ROWS, *peers.ROWS]}) == len(
        [*operations.ROWS, *peers.ROWS]
    )


def test_unknown_rows_and_numbers_are_refused(capsys):
    for arguments in (["--rows", "nothing"], ["--batch", "0"], ["--preset", "gpt-5"]):
        with pytest.raises(SystemExit):
            command.parse(arguments)
    assert "at least 1" in capsys.readouterr().err


# Rows that fail -----------------------------------------------------------------------------------


def test_an_error_is_a_result():
    request = {
        "name": "forward",
        "who": "torch",
        "workload": {**asdict(TINY), "choices": 1000},
        "repeats": 1,
        "budget": 1,
        "threads": 1,
    }
    result = row.run(request)
    assert result["error"].startswith("ValueError: Expected --choices of at most 64")
    assert "Traceback" in result["traceback"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_is_named(error):
    assert row.describe(error) == "out of memory"


def test_other_errors_are_quoted():
    assert row.describe(RuntimeError("a\nb")) == "RuntimeError: a b"


def test_a_killed_process_was_out_of_memory():
    assert command.ended(-9, "") == "out of memory (killed by the system)"
    assert command.ended(3, "one\ntwo\n\n") == "ended with 3: two"


def test_a_row_that_takes_too_long_is_given_up():
    options = command.parse(["--limit", "0.01", "--preset", "tiny", "--threads", "1"])
    result = command.run_row(named("forward"), TINY, options)
    assert result["error"] == "not done after 0.01 s"


# Floors -------------------------------------------------------------------------------------------

FLOORS = {
    "fit": (1, 2),
    "fit-mc": (1, 1),
    "probit": (1, 3),
    "qmc": (1, 3),
    "mc": (1, 3),
    "diagonal": (1, 3),
    "nn": (10, 0),
}
TWO_CHOICES = {"fit-2": (1, 1), "qmc-2": (1, 1)}


def count(problem: Problem, monkeypatch: Any, run: Any) -> tuple[int, int]:
    """Return how many forward and backward passes a call makes."""
    calls = {"forward": 0, "backward": 0}
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["backward"] += 1
        return grad(*args, **kwargs)

    def forward(*_: Any) -> None:
        calls["forward"] += 1

    handle = problem.head.register_forward_hook(forward)
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        run()
    handle.remove()
    return calls["forward"], calls["backward"]


@pytest.mark.parametrize(("name", "expected"), FLOORS.items())
def test_floors(problem, monkeypatch, name, expected):
    operation = named(name).set_up(problem)
    assert operation.floor is not None
    assert count(problem, monkeypatch, operation.floor) == expected


@pytest.mark.parametrize(("name", "expected"), TWO_CHOICES.items())
def test_floors_of_two_choices(monkeypatch, name, expected):
    assert named(name).choices == 2
    problem = Problem(Workload.of("tiny", "cpu", choices=2))
    operation = named(name).set_up(problem)
    assert operation.floor is not None
    assert operation.floor_name == "forward + 1 backward"
    assert count(problem, monkeypatch, operation.floor) == expected


@pytest.mark.parametrize("name", ["fit", "fit-mc", "probit", "nn"])
def test_peers_have_the_same_floors(monkeypatch, name):
    problem = Problem(TINY)
    operation = named(name, peers.rows("ASDL", peers.AsdlGGN)).set_up(problem)
    assert operation.floor is not None
    assert count(problem, monkeypatch, operation.floor) == FLOORS[name]


# Operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step", "grid", "loo", "marglik", "eigen", "construct"])
def test_other_operations_run(name):
    operation = named(name).set_up(Problem(TINY))
    operation.run()
    if name == "grid":
        assert operation.floor is not None
        operation.floor()


@pytest.mark.filterwarnings("ignore:By default .link_approx. is")
@pytest.mark.parametrize("name", ["grid", "marglik", "eigen", "construct"])
def test_other_operations_of_peers_run(name):
    operation = named(name, peers.ROWS).set_up(Problem(TINY))
    operation.run()
    assert operation.times == (100 if name == "grid" else 1)


@pytest.mark.parametrize("layerwise", [False, True])
def test_val_grad_descends_from_its_pass(monkeypatch, layerwise):
    monkeypatch.setattr(operations, "TUNING_QUESTIONS", 8)
    name = "val-grad-layerwise" if layerwise else "val-grad"
    problem = Problem(TINY)
    operation = named(name).set_up(problem)
    assert count(problem, monkeypatch, lambda: None) == (0, 0)
    assert operation.run().shape == (len(problem.parameters) if layerwise else 1,)


def test_lora_b_is_not_zero_and_nothing_else_is_trained(problem):
    named_ = {n: p for n, p in problem.head.named_parameters() if p.requires_grad}
    assert len(named_) == 8
    assert all("lora_" in name and bool((p != 0).any()) for name, p in named_.items())


def test_the_batch_is_the_loaders_first(problem):
    first, second = problem.loader(2)
    assert torch.equal(first["input_ids"], problem.batch["input_ids"])
    assert not torch.equal(second["input_ids"], first["input_ids"])
    assert first["input_ids"].shape == (TINY.batch, TINY.tokens)


def test_options_go_before_the_preset():
    work = Workload.of("llama2-7b", "meta", batch=2, tokens=None)
    assert (work.batch, work.tokens, work.choices, work.rank) == (2, 300, 4, 8)


# Measuring ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_a_call_allocates():
    size = 64 * 2**20
    peak = measure.peak_memory(lambda: torch.ones(size // 4), CPU)
    assert peak.peak - peak.before > 0.9 * size
    assert measure.peak_memory(lambda: None, CPU).peak < peak.peak


def test_a_call_and_its_floor_take_turns():
    order: list[str] = []
    timing = measure.timings(
        lambda: order.append("call"), lambda: order.append("floor"), CPU, repeats=2, budget=60
    )
    assert order == ["floor", "call", "floor", "floor", "call"]
    assert (len(timing.seconds), len(timing.floor)) == (2, 2)


def test_a_spent_budget_leaves_one_repeat():
    timing = measure.timings(lambda: None, None, CPU, repeats=5, budget=0)
    assert (len(timing.seconds), len(timing.floor)) == (1, 0)


# Accounting ---------------------------------------------------------------------------------------


def test_live_bytes_by_hand():
    with LiveBytes() as live:
        a = torch.zeros(10, 10, device="meta")  # 400
        view = a.view(100)[:50]
        assert live.current == 400
        b = a @ a  # 400
        assert (live.current, live.peak) == (800, 800)
        del b
        assert (live.current, live.peak) == (400, 800)
        del a
        assert live.current == 400  # the view holds it
        del view
        assert live.current == 0
        live.reset()
        torch.zeros(25, device="meta")
        assert (live.current, live.peak, live.largest) == (0, 100, 100)


def test_account_of_a_layer_by_hand():
    with LiveBytes() as live:
        layer = nn.Linear(8, 4, bias=False, device="meta")  # 128
        x = torch.zeros(2, 8, device="meta")  # 64
        needs = account(lambda: torch.relu(layer(x)), live)
    # Two results of 2 x 4 numbers at once; relu keeps its own for the backward pass.
    assert (needs.before, needs.peak, needs.kept, needs.largest) == (192, 192 + 64, 32, 32)


def test_checks_of_values_pass():
    with LiveBytes():
        x = torch.zeros(3, 4, device="meta")
        assert bool(x.isfinite().all())
        assert not bool((x < 0).any())
        assert x[:, x[0] > 0].shape == (3, 4)
        assert x.cpu().is_meta


def accounted(
    name: str, preset: str = "tiny", rows: list[Row] = operations.ROWS, **given: Any
) -> dict[str, Any]:
    return row.accounted(named(name, rows), Workload.of(preset, "meta", **given))


def test_the_models_bytes():
    parameters = sum(p.numel() for p in Problem(TINY).head.parameters())
    buffers = sum(b.numel() for b in Problem(TINY).head.buffers())
    model = accounted("graph")["model_bytes"]
    assert model == 4 * (parameters + buffers)


@pytest.mark.slow
@pytest.mark.parametrize("name", [r.name for r in operations.ROWS if r.on_meta])
def test_rows_run_on_meta(name):
    result = accounted(name)
    assert result["model_bytes"] <= result["before_bytes"] <= result["peak_bytes"]
    assert 0 < result["largest_bytes"] <= result["peak_bytes"] - result["before_bytes"]


ASDL = [r for r in peers.ROWS if r.who == peers.ASDL]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ASDL backend is used")
@pytest.mark.filterwarnings("ignore:There is a performance drop because")
@pytest.mark.parametrize("name", [r.name for r in ASDL if r.on_meta])
def test_peers_rows_run_on_meta(name):
    result = accounted(name, rows=ASDL)
    assert result["model_bytes"] <= result["before_bytes"] < result["peak_bytes"]


def test_curvlinops_does_not_run_on_meta():
    assert not any(r.on_meta for r in peers.ROWS if r.who == peers.CURVLINOPS)
    with pytest.raises(NotImplementedError):
        accounted("fit", rows=peers.rows("", peers.CurvlinopsGGN))


def test_a_peer_keeps_dense_factors_and_eigenvectors():
    problem = Problem(TINY)
    sides = [side for p in problem.parameters for side in p.shape]
    mean = sum(p.numel() for p in problem.parameters)
    posterior = 4 * (sum(2 * side**2 + side for side in sides) + mean)
    kept = accounted("construct", rows=ASDL)["kept_bytes"]
    # Besides, a prior precision for each tensor and a few scalars.
    assert posterior <= kept <= posterior + 4 * (len(problem.parameters) + 16)


def test_no_side_is_squared(monkeypatch):
    """Nothing of d x d numbers is allocated where a side is sketched; the peer's factors are."""
    wide = {**presets.PRESETS["tiny"].config, "hidden_size": 2048, "num_hidden_layers": 1}
    wide |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    preset = Preset(wide, torch.float32, ("q_proj",), 4, 2, 5, 3)
    monkeypatch.setitem(presets.PRESETS, "wide", preset)
    square = 4 * 2048**2
    result = accounted("construct", "wide")
    assert result["largest_bytes"] <= square / 4
    assert result["kept_bytes"] >= 2 * 4 * 2048 * 128
    theirs = accounted("construct", "wide", ASDL)
    assert theirs["largest_bytes"] == square
    assert theirs["kept_bytes"] > 4 * square


@pytest.mark.slow
def test_the_accounting_through_the_command(monkeypatch, tmp_path, capsys):
    def in_this_process(r: Row, workload: Workload, options: Any) -> dict[str, Any]:
        return {"name": r.name, "title": r.title, "who": r.who, **row.accounted(r, workload)}

    monkeypatch.setattr(command, "run_row", in_this_process)
    arguments = ["--preset", "tiny", "--device", "meta", "--peers", "--out", str(tmp_path)]
    command.main([*arguments, "--rows", "step", "fit", "grid", "construct", "--targets", "v_proj"])
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = content["rows"]
    assert [(r["name"], r["who"]) for r in rows] == [
        ("step", "torch"),
        ("fit", "laplace_llm"),
        ("fit", peers.ASDL),
        ("construct", "laplace_llm"),
        ("construct", peers.ASDL),
    ]
    assert rows[1]["step_ratio"] == pytest.approx(rows[1]["peak_bytes"] / rows[0]["peak_bytes"])
    assert content["workload"]["targets"] == ["v_proj"]
    output = capsys.readouterr().out
    assert "largest allocation" in output
    assert "LoRA r=3 on v_proj, batch" in output


# A base in 4 bits ---------------------------------------------------------------------------------

NF4 = presets.PRESETS["tiny"]._replace(dtype=torch.bfloat16, four_bit=True)


@pytest.fixture
def bitsandbytes(monkeypatch) -> Any:
    """Return the package, which the preset "nf4" needs."""
    monkeypatch.setitem(presets.PRESETS, "nf4", NF4)
    return pytest.importorskip("bitsandbytes")


def tensors_of(layer: Any) -> dict[str, torch.Tensor]:
    """Return all that bitsandbytes stores for a weight."""
    state = layer.weight.quant_state
    return {
        "values": layer.weight.data,
        "scales": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "scales of scales": state.state2.absmax,
        "code of scales": state.state2.code,
    }


@pytest.mark.parametrize("shape", [(64, 16), (160, 640)])
def test_a_layer_is_the_one_that_bitsandbytes_makes(bitsandbytes, shape):
    linear = nn.Linear(*shape, bias=False, dtype=torch.bfloat16)
    theirs = bitsandbytes.nn.Linear4bit(*shape, bias=False, quant_type="nf4")
    theirs.weight = bitsandbytes.nn.Params4bit(linear.weight.detach(), quant_type="nf4")
    theirs = theirs.to("cpu")  # quantises
    ours = four_bit(linear, bitsandbytes)
    for key, tensor in tensors_of(theirs).items():
        assert torch.equal(tensors_of(ours)[key], tensor), key
    assert not ours.weight.requires_grad
    x = torch.randn(3, shape[0], dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(*(torch.autograd.grad(layer(x).sum(), x)[0] for layer in (ours, theirs)))


@pytest.mark.parametrize("shape", [(64, 16), (160, 640)])
def test_a_layer_without_values_takes_the_bytes_of_one_with_values(bitsandbytes, shape):
    real = four_bit(nn.Linear(*shape, bias=False, dtype=torch.bfloat16), bitsandbytes)
    size = sum(tensor.nbytes for tensor in tensors_of(real).values())
    with LiveBytes() as live:
        linear = nn.Linear(*shape, bias=False, dtype=torch.bfloat16, device="meta")
        layer = four_bit(linear, bitsandbytes)
        del linear
        assert live.current == size
    assert all(tensor.is_meta for tensor in tensors_of(layer).values())


def test_weights_are_restored_in_forward_and_again_in_backward(bitsandbytes):
    out, in_ = 640, 320
    weight = 2 * out * in_
    with LiveBytes() as live:
        layer = four_bit(nn.Linear(in_, out, False, device="meta", dtype=torch.bfloat16),
                         bitsandbytes)  # fmt: skip
        x = torch.zeros(2, in_, device="meta", dtype=torch.bfloat16, requires_grad=True)
        forward = account(lambda: layer(x), live)
        y = layer(x)
        backward = account(lambda: torch.autograd.grad(y, x, torch.ones_like(y)), live)
    assert forward.peak - forward.before == weight + 2 * 2 * out
    assert forward.kept == 2 * 2 * out  # the restored weight is not kept for the backward pass
    assert weight < backward.peak - backward.before < 1.2 * weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_all_but_embeddings_norms_and_the_output_layer_are_in_4_bits(bitsandbytes, device):
    from peft.tuners.lora.bnb import Linear4bit

    head = Problem(Workload.of("nf4", device)).head
    stored = {name: p.dtype for name, p in head.named_parameters() if "lora_" not in name}
    whole = {name for name, dtype in stored.items() if dtype is not torch.uint8}
    assert len(stored) - len(whole) == 2 * 7  # layers of 4 attention and 3 MLP matrices each
    assert all("embed" in name or "norm" in name or "choice_layer" in name for name in whole)
    adapted = [m for m in head.modules() if isinstance(m, Linear4bit)]
    assert len(adapted) == 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "fit", "qmc", "construct"])
def test_rows_run_on_a_base_in_4_bits(bitsandbytes, name):
    named(name).set_up(Problem(Workload.of("nf4", "cpu"))).run()
    result = accounted(name, "nf4")
    assert result["model_bytes"] <= result["before_bytes"] < result["peak_bytes"]


def test_4_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "nf4", NF4)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        Problem(Workload.of("nf4", "meta"))


def test_the_presets_have_their_models_sizes():
    published = {"smollm2-135m": 134_515_008, "llama2-7b": 6_738_415_616,
                 "qwen2.5-32b": 32_763_876_352}  # fmt: skip
    for name, size in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(presets.config(name))
        assert sum(p.numel() for p in model.parameters()) == size


# The report ---------------------------------------------------------------------------------------


def test_cells_of_the_timed_table():
    common = {"title": "t", "before_bytes": 0, "extrapolated_times": 1, "repeats": 5,
              "asked_repeats": 5, "libraries_bytes": 500_000_000}  # fmt: skip
    results = [
        {**common, "name": "step", "who": "torch", "seconds": 1.0, "peak_bytes": 1_500_000_000},
        {**common, "name": "grid", "who": "laplace_llm", "seconds": 3.0, "floor": "f",
         "floor_seconds": 2.0, "floor_ratio": 1.4, "peak_bytes": 2_000_000_000},
        {**common, "name": "grid", "who": "peer", "seconds": 600.0, "extrapolated_times": 100,
         "repeats": 1, "peak_bytes": 20_500_000_000},
        {"name": "mc", "title": "t", "who": "peer", "error": "out of memory"},
    ]  # fmt: skip
    report.compare(results)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.timed_table(results).splitlines()
    ]
    assert cells[2] == ["t", "torch", "1 s", "", "", "", "1.00 GB", ""]
    assert cells[3] == ["t", "laplace_llm", "3 s", "f: 2 s", "1.40", "", "1.50 GB", "1.50"]
    assert cells[4] == [
        "t", "peer", "600 s (100 x one value) (1 repeats)", "", "", "200", "20.00 GB", "20",
    ]  # fmt: skip
    assert cells[5] == ["t", "peer", "out of memory", *[""] * 5]

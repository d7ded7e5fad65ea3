"""The calibration benchmark's framework: the plan, its runs, results, metrics and report."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import LLAMA_SHAPE, letter_batch, letter_head, tiny_llama, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import laplace_llm
from laplace_llm import letter_prompt, question_prompt
from laplace_llm.benchmark.calibration import command, method, metrics, tasks, training
from laplace_llm.benchmark.calibration.bootstrap import Difference, paired_bootstrap
from laplace_llm.benchmark.calibration.costs import Meter
from laplace_llm.benchmark.calibration.method import (
    Method,
    NotApplicable,
    Prediction,
    register,
    registered,
)
from laplace_llm.benchmark.calibration.methods.laplace_lora import (
    DEFAULT,
    DEFAULT_VALIDATED,
    mutual_information,
)
from laplace_llm.benchmark.calibration.methods.point import fit_temperature
from laplace_llm.benchmark.calibration.plan import Options, select_methods, select_tasks
from laplace_llm.benchmark.calibration.problem import Problem
from laplace_llm.benchmark.calibration.report import in_short
from laplace_llm.benchmark.calibration.results import Key, Results, Run
from laplace_llm.benchmark.calibration.summary import rows
from laplace_llm.benchmark.calibration.tables import cells, overview_table, verdict
from laplace_llm.benchmark.calibration.tasks import (
    Recipe,
    load_rows,
    questions,
    register_recipe,
    registered_recipes,
)
from laplace_llm.benchmark.models import load_model
from laplace_llm.errors import DataError, OptionError
from laplace_llm.moments import Moments
from laplace_llm.tasks import Task, Template, load_task, register_task
from laplace_llm.tasks import registry as tasks_registry

EXAMPLE = Path(__file__).parent.parent / "examples" / "add_a_method.py"
FEW = ["MAP", "temperature", "Laplace-LoRA kron, loo", "Laplace-LoRA diag, gridsearch"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a tiny model and the data of three tasks."""
    folder = tmp_path_factory.mktemp("calibration")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rng, things = random.Random(0), {"sky": 0, "sea": 0, "grass": 1, "snow": 2}
    for task, n in (("trec", 60), ("openbookqa", 60), ("arc-easy", 20)):
        for split in ("train", "test"):
            rows = []
            for _ in range(n):
                thing = rng.choice(list(things))
                answer = things[thing] if rng.random() < 0.8 else rng.randrange(3)
                question = f"what colour is the {thing} ?"
                choices = ["blue", "green", "white"]
                rows.append({"question": question, "choices": choices, "answer": answer})
            path = folder / f"{task}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def registry(monkeypatch):
    """Methods registered in a test are gone after it."""
    monkeypatch.setattr(method, "_REGISTRY", dict(method._REGISTRY))


def options(place, out, *more):
    fixed = ["--model", place / "model", "--data-dir", place, "--out", out, "--device", "cpu"]
    sizes = ["--train", 28, "--val", 12, "--test", 16, "--rank", 2, "--seeds", 0]
    return [str(option) for option in [*fixed, *sizes, *more]]


def run(place, out, *more):
    command.main(options(place, out, *more))
    return Results(out / "results.jsonl").read()


# The whole command --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_end_to_end(place, tmp_path, capsys):
    runs = run(
        place, tmp_path, "--tasks", "trec", "--seeds", 0, 1, "--methods", *FEW, "--save-predictions"
    )  # fmt: skip
    assert {key.protocol for key in runs if key.method == "MAP"} == {"held out", "all data"}
    assert not any(key.protocol == "all data" for key in runs if runs[key].tuned)
    assert all(r.status == "ok" for r in runs.values()), [r.traceback for r in runs.values()]
    for r in runs.values():
        own = r.tests["trec"]
        assert len(own["questions"]["nll"]) == 16
        nll = sum(own["questions"]["nll"]) / 16
        assert own["metrics"]["NLL"] == pytest.approx(nll, rel=1e-4)
        assert len(own["questions"]["probabilities"][0]) == 3
        assert r.costs["predict_ms"] > 0
        assert ("mutual_information" in own["questions"]) == (r.group == "LoRA Laplace")
    report = (tmp_path / "report.md").read_text()
    for text in ("calibration --model", "**", "± ", "against MAP", "Costs", "torch "):
        assert text in report
    for name in ("reliability", "risk-coverage", "cost"):
        for ending in ("png", "svg"):
            assert (tmp_path / f"trec.{name}.{ending}").stat().st_size > 1000
    # Everything is done: a second run trains and evaluates nothing, and writes the same.
    lines = (tmp_path / "results.jsonl").read_text()
    again = run(
        place, tmp_path, "--tasks", "trec", "--seeds", 0, 1, "--methods", *FEW, "--save-predictions"
    )  # fmt: skip
    assert (tmp_path / "results.jsonl").read_text() == lines
    assert again.keys() == runs.keys()
    (tmp_path / "report.md").unlink()
    command.main(["--report-only", "--out", str(tmp_path)])
    assert (tmp_path / "report.md").read_text().splitlines()[:6] == report.splitlines()[:6]
    # A smaller plan has a smaller report, whatever else is in the file.
    run(place, tmp_path, "--tasks", "trec", "--methods", "MAP")
    assert "temperature scaling" not in (tmp_path / "report.md").read_text()
    assert "Laplace-LoRA kron, loo" in capsys.readouterr().out


def test_other_methods_rows_failures_and_other_test_sets(place, tmp_path, registry):
    @register
    class Fails(Method):
        name, group = "always fails", "LoRA"

        def fit(self, problem):
            raise RuntimeError("of no | use")

        def predict(self, batch):
            raise NotImplementedError

    @register
    class Lacks(Fails):
        name, requires = "lacks a package", {"no_such_module_anywhere": "no-such-package>=1"}

    @register
    class OnFeatures(Fails):
        name, group = "on features", "last layer"

        def fit(self, problem):
            problem.features("train")

    @register
    class Logits(Fails):
        name = "logits, not probabilities"

        def fit(self, problem):
            self.head = problem.head

        def predict(self, batch):
            return self.head(batch).detach()

    chosen = ("always", "lacks", "on features", "logits,", "kron, loo, mc")
    runs = run(place, tmp_path, "--tasks", "openbookqa", "--no-all-data", "--methods", *chosen)
    by_name = {key.method: r for key, r in runs.items()}
    assert by_name["always fails"].status == "failed"
    assert "in fit" in by_name["always fails"].traceback
    assert by_name["lacks a package"].reason == 'pip install "no-such-package>=1"'
    assert by_name["on features"].status == "not applicable"
    assert "does not end in a linear layer" in by_name["on features"].reason
    assert "probabilities" in by_name["logits, not probabilities"].reason
    assert list(by_name["MAP"].tests) == ["openbookqa", "arc-easy"]
    assert "mmlu-law" in by_name["MAP"].absent
    assert (
        "mutual_information" in by_name["Laplace-LoRA kron, loo, mc"].tests["arc-easy"]["questions"]
    )
    report = (tmp_path / "report.md").read_text()
    for text in (
        "RuntimeError: of no \\| use",
        "no-such-package",
        "Out of distribution: arc-easy",
        "AUROC, mutual information",
    ):
        assert text in report


@pytest.mark.slow
def test_goes_on_after_a_kill(place, tmp_path, registry):
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import os, time\n"
        "from laplace_llm.benchmark.calibration.method import register\n"
        "from laplace_llm.benchmark.calibration.methods.point import MAP\n"
        "@register\n"
        "class Slow(MAP):\n"
        "    name = 'slow'\n"
        "    def fit(self, problem):\n"
        "        super().fit(problem)\n"
        "        time.sleep(float(os.environ.get('SLOW', 0)))\n"
    )
    out = tmp_path / "out"
    chosen = ["--tasks", "trec", "--methods", "slow", "temperature", "--plugin", plugin]
    arguments = ["-m", "laplace_llm.benchmark", "calibration", *options(place, out, *chosen)]
    child = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "SLOW": "600"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = out / "results.jsonl"
    for _ in range(6000):  # MAP and temperature scaling are done, then it is slow
        if path.exists() and path.read_bytes().count(b"\n") == 2:
            break
        assert child.poll() is None
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = path.read_text()
    path.write_text(before + before[: len(before) // 4])  # killed while it wrote
    adapters = {file: file.stat().st_mtime_ns for file in out.rglob("adapter.safetensors")}
    assert len(adapters) == 1
    runs = run(place, out, *chosen)
    assert path.read_text().startswith(before)
    assert all(r.status == "ok" for r in runs.values())
    assert Key("trec", 0, "held out", "slow") in runs
    assert all(file.stat().st_mtime_ns == when for file, when in adapters.items())
    # What a read adapter says is what the trained one said.
    first, slow = (runs["trec", 0, "held out", name].tests for name in ("MAP", "slow"))
    assert first == slow


def test_the_example_of_a_method(place, tmp_path, registry):
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    runs = run(
        place, tmp_path, "--plugin", EXAMPLE, "--tasks", "trec", "--no-all-data",
        "--methods", "vector",
    )  # fmt: skip
    (scaled,) = (r for key, r in runs.items() if key.method == "vector scaling")
    assert scaled.status == "ok", scaled.traceback
    assert scaled.costs["extra_parameters"] == 6


def test_a_task_without_data_is_rows_of_failures(place, tmp_path):
    runs = run(place, tmp_path, "--tasks", "sst2", "--no-all-data", "--methods", "MAP")
    (only,) = runs.values()
    assert only.status == "failed"
    assert "--data-dir" in only.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nothing"], "Expected --tasks"),
        (["--tasks", "trec", "--methods", "nothing like it"], "Expected --methods"),
        (["--plugin", "nowhere.py"], "Expected --plugin"),
        (["--report-only", "--out", "nowhere"], "Expected runs"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_list(capsys):
    command.main(["--list"])
    assert "temperature scaling" in capsys.readouterr().out


# Laplace-LoRA's methods ---------------------------------------------------------------------------


def tiny_problem(planned=frozenset(), folder=None, head=None):
    def never(**_):
        raise AssertionError

    train, val = ([letter_batch(5, seed=s) for s in seeds] for seeds in ((0, 1, 2), (3, 4)))
    head = head or letter_head(tiny_llama(dtype=torch.float32))
    return Problem("tiny", 0, head, 3, train, val, never, [], planned=planned, folder=folder)


@pytest.mark.parametrize("rule", ["loo", "gridsearch", "val_grad", "marglik"])
def test_rules_are_those_of_the_public_call(rule):
    name = f"Laplace-LoRA kron, {rule}"
    planned = frozenset({name, "Laplace-LoRA diag, gridsearch", "Laplace-LoRA kron, loo, probit"})
    # In double precision: in single, two ways through the same numbers descend 0.3 % apart.
    problem = tiny_problem(planned, head=letter_head(tiny_llama()))
    ours = registered()[name]()
    ours.fit(problem)
    la = laplace_llm.Laplace(problem.head)
    la.fit(problem.train)
    loader = None if rule in ("loo", "marglik") else problem.val
    la.optimize_prior_precision(method=rule, val_loader=loader)
    expected = la.prior_precision.item()
    assert float(ours.posteriors.chosen(ours.choice)) == pytest.approx(expected, rel=1e-3)
    batch = letter_batch(4, seed=9)
    torch.testing.assert_close(ours.predict(batch).probabilities, la(batch), rtol=1e-4, atol=1e-5)


def test_every_variant_predicts_from_one_pass():
    names = [name for name, cls in registered().items() if cls.group == "LoRA Laplace"]
    problem, batch = tiny_problem(frozenset(names)), letter_batch(4, seed=9)
    calls = []
    problem.head.register_forward_hook(lambda *_: calls.append(1))
    probs = {}
    for name in names:
        ours = registered()[name]()
        try:
            ours.fit(problem)
        except NotApplicable:
            continue
        probs[name] = ours.predict(batch)
        before = len(calls)
        ours.predict(batch)
        assert len(calls) == before
        assert ours.extra_parameters > 0
    assert len(probs) > 15
    samples = probs.pop("Laplace-LoRA kron, loo, mc")
    assert samples.shape == (100, 4, 3)
    full = probs["Laplace-LoRA full, loo"].probabilities
    lowrank = probs["Laplace-LoRA lowrank, loo"].probabilities
    torch.testing.assert_close(lowrank, full, rtol=1e-3, atol=1e-4)


def test_one_variants_failure_is_its_own(monkeypatch):
    from laplace_llm import DiagLoraLaplace

    def fail(*_, **__):
        raise RuntimeError("no diagonal")

    monkeypatch.setattr(DiagLoraLaplace, "fit", fail)
    names = ("Laplace-LoRA kron, gridsearch", "Laplace-LoRA diag, gridsearch")
    problem = tiny_problem(frozenset(names))
    kron, diag = (registered()[name]() for name in names)
    kron.fit(problem)
    assert kron.predict(letter_batch(4)).probabilities.shape == (4, 3)
    with pytest.raises(RuntimeError, match="no diagonal"):
        diag.fit(problem)


def test_a_new_structure_has_methods_without_a_list():
    for structure in laplace_llm.structures.STRUCTURES:
        name = structure._key[1]
        assert f"Laplace-LoRA {name}, loo" in registered()
        assert f"Laplace-LoRA {name}, gridsearch" in registered()


def run_of(method, nll, group, tuned=False, single_model=True, task="one", n=40):
    """Return a run whose questions have this NLL, give or take a little."""
    questions = {"nll": [nll + 0.01 * (k % 5 - 2) for k in range(n)]}
    metrics = {"NLL": nll, "ECE": nll / 10, "accuracy": 0.8}
    tests = {task: {"metrics": metrics, "questions": questions}}
    return Run(task, 0, "held out", method, group, tuned, single_model, {}, tests=tests)


def test_defaults_are_held_against_methods_of_like_means():
    runs = [
        run_of("MAP", 1.0, "point"),
        run_of("temperature scaling", 0.5, "point", tuned=True),
        run_of("a last layer", 0.8, "last layer"),
        run_of("an ensemble", 0.1, "LoRA", single_model=False),
        run_of(DEFAULT, 0.7, "LoRA Laplace"),
        run_of(DEFAULT_VALIDATED, 0.6, "LoRA Laplace", tuned=True),
    ]
    plain, validated = in_short(runs, "one")
    assert f"**{DEFAULT} wins against a last layer**" in plain
    assert "without validation questions: NLL 0.700 against 0.800" in plain
    assert f"**{DEFAULT_VALIDATED} loses against temperature scaling**" in validated
    assert "target met" in plain.split("accuracy")[1]


def test_overview_has_every_method_of_every_task():
    runs = [
        run_of("MAP", 1.0, "point"),
        run_of("last", 0.8, "last layer"),
        run_of("MAP", 2.0, "point", task="two"),
        run_of("temperature", 1.5, "point", tuned=True, task="two"),
    ]
    lines = overview_table({task: rows(runs, task) for task in ("one", "two")}).splitlines()
    assert lines[0] == "| method | one, NLL | one, ECE | two, NLL | two, ECE |"
    assert lines[2:] == [
        "| MAP ° | 1.000 | 0.100 | 2.000 | 0.200 |",
        "| temperature |  |  | **1.500** | **0.150** |",
        "| last ° | **0.800** | **0.080** |  |  |",
    ]


def test_overview_of_a_task_that_failed_altogether():
    runs = [run_of("MAP", 1.0, "point")]
    lines = overview_table({task: rows(runs, task) for task in ("one", "two")}).splitlines()
    assert lines[2] == "| MAP ° | **1.000** | **0.100** |  |  |"


def test_the_best_is_one_of_those_with_all_seeds():
    column = {"whole": [0.5, 0.7], "lucky": [0.1], "worse": [0.9, 0.9]}
    texts = cells(column, ".3f", higher=False)
    assert texts["whole"].startswith("**0.600")
    assert texts["lucky"] == "0.100"


def test_other_data_and_exact_rates_make_other_runs(tmp_path):
    options = Options(
        ("trec",), (), (0,), "model", tmp_path, "cpu", 4, 2, 2, 8, ("q_proj",), tmp_path
    )
    task = Recipe("trec", lr=1 / 3000)
    settings = options.settings(task)
    other = replace(options, data_dir=tmp_path / "other")
    assert other.settings(task) != settings
    results = Results(tmp_path / "results.jsonl")
    run = Run("trec", 0, "held out", "MAP", "point", False, True, settings)
    results.append(run)
    assert results.done({"trec": settings}) == {run.key}
    assert not results.done({"trec": other.settings(task)})


def test_mutual_information_against_sampling():
    mean = torch.tensor([[0.5, -0.2, 0.1], [3.0, 0.0, -1.0]])
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.7, 0], [0.1, 0.2, 0.3]])
    covariance = (root @ root.T).expand(2, 3, 3)
    found = mutual_information(Moments(mean, covariance))
    probs = torch.softmax(mean + torch.randn(200_000, 1, 3) @ root.T, -1)
    entropies = torch.special.entr(probs).sum(-1).mean(0)
    expected = torch.special.entr(probs.mean(0)).sum(-1) - entropies
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-3)


def test_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / 2.5, -1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.15)
    certain = torch.eye(3)[labels] * 5
    assert math.isfinite(fit_temperature(certain, labels))


# What methods are given ---------------------------------------------------------------------------


def test_shared_work_is_charged_to_each_user():
    problem = tiny_problem()

    def slow():
        time.sleep(0.05)
        return problem.share("inner", lambda: time.sleep(0.05))

    problem.share("outer", slow)
    assert problem.charged == 0
    seconds = {key: shared.cost.seconds for key, shared in problem.shared.items()}
    assert seconds["inner"] >= 0.05
    assert seconds["outer"] >= seconds["inner"] + 0.05
    problem.share("inner", slow)
    assert problem.charged == seconds["inner"]
    problem.charged = 0.0
    problem.share("other", lambda: problem.share("inner", slow))
    assert problem.charged == seconds["inner"]
    # Whoever uses the other one is spared the inner one, too.
    assert problem.shared["other"].cost.seconds >= seconds["inner"]
    problem.charged = 0.0
    with problem.aside() as cost:
        time.sleep(0.05)
        problem.share("outer", slow)
    assert cost.seconds >= 0.05
    assert problem.charged == -cost.seconds


class Counted(Meter):
    """A meter whose allocator is a number."""

    now = most = 0

    def take(self, size):
        self.now += size
        self.most = max(self.most, self.now)

    def _memory(self):
        return self.now

    def _peak(self):
        return self.most

    def _reset(self):
        self.most = self.now


def test_memory_of_nested_work():
    meter = Counted(torch.device("cpu"))
    meter.take(1000)
    with meter.measure() as outer:
        meter.take(50)
        with meter.measure() as inner:
            meter.take(20)
            meter.take(-20)
        meter.take(-50)
        with meter.measure() as little:
            meter.take(3)
    assert (outer.memory, inner.memory, little.memory) == (70, 20, 3)


def test_hidden_memory_is_nobodys():
    meter = Counted(torch.device("cpu"))
    with meter.measure() as outer:
        meter.take(5)
        with meter.hidden():
            meter.take(500)
            with meter.measure() as within:
                meter.take(30)
                meter.take(-30)
            meter.take(-400)  # the rest is kept for others
        meter.take(2)
    assert (outer.memory, within.memory) == (7, 30)


def test_features(tmp_path):
    problem = tiny_problem(folder=tmp_path)
    features, labels = problem.features("train")
    logits = torch.cat([problem.head(batch) for batch in problem.train])
    torch.testing.assert_close(problem.head.choice_layer(features), logits)
    assert len(labels) == len(features) == 15
    again = tiny_problem(folder=tmp_path, head=problem.head)
    torch.testing.assert_close(again.features("train")[0], features)
    assert again.charged > 0  # what reading them has spared
    batch = problem.val[0]
    torch.testing.assert_close(problem.batch_features(batch), problem.features("val")[0][:5])


def test_adapters_share_the_base_and_come_back(place, tmp_path):
    model, tokenizer = load_model(str(place / "model"))
    model.requires_grad_(False)
    rows = load_rows("trec", "train", place)[:12]
    task = Recipe("trec", "words", "Question : {question}", epochs=2)
    trainer = training.Trainer(model, tokenizer, task, rows, 2, ["q_proj"], "cpu", 4)
    seen = []
    first = trainer.train(0, on_step=lambda head, step, n: seen.append((step, n)))
    assert seen == [(step, 6) for step in range(1, 7)]
    path = tmp_path / "adapter.safetensors"
    kept, read = trainer.cached(path, 0), trainer.cached(path, 0)
    assert (kept.trained, read.trained) == (True, False)
    assert len(read.checkpoints) == 2
    batch = trainer.batches(rows)[0]
    for adapter in (kept, read):
        torch.testing.assert_close(adapter.head(batch), first.head(batch))
    other = trainer.train(1, dropout=0.5)
    assert not torch.equal(other.head(batch), first.head(batch))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    weights = [head.model.get_base_model().lm_head.weight for head in (first.head, other.head)]
    assert weights[0].data_ptr() == weights[1].data_ptr()


# Tasks --------------------------------------------------------------------------------------------


def test_questions_of_a_seed(place):
    task = select_tasks(["trec"])[0]
    first, second = (questions(task, seed, 30, 10, 16, place) for seed in (0, 1))
    assert (len(first.train), len(first.val), len(first.test)) == (20, 10, 16)
    assert first.test == second.test
    assert first.train != second.train
    with pytest.raises(DataError, match="at least 100 training"):
        questions(task, 0, 100, 10, 16, place)
    with pytest.raises(DataError, match="0 < --val < --train"):
        questions(task, 0, 30, 30, 16, place)


def test_own_questions_and_own_tasks(monkeypatch):
    monkeypatch.setattr(tasks, "_RECIPES", dict(tasks._RECIPES))
    assert len(load_rows("general", "test", None)) > 100
    register_recipe(Recipe("mine", "letters"))
    assert select_tasks(["mine"])[0].head == "letters"
    with pytest.raises(DataError, match=r"mine\.test\.jsonl"):
        load_rows("mine", "test", None)


def test_a_registered_task_needs_no_recipe(monkeypatch):
    monkeypatch.setattr(tasks_registry, "_TASKS", dict(tasks_registry._TASKS))
    row = {"question": "q", "choices": ["no", "yes"], "answer": 1}
    register_task(Task("mine", lambda split: [row], Template("{question} :"), ("no", "yes")))
    (recipe,) = select_tasks(["mine"])
    assert recipe == Recipe("mine", "words", "{question} :")
    assert load_rows("mine", "train", None) == [row]
    register_task(Task("lettered", lambda split: [row]))
    assert select_tasks(["lettered"])[0].ask is letter_prompt


def test_how_the_papers_tasks_are_asked():
    recipes = registered_recipes()
    assert (recipes["boolq"].head, recipes["winogrande-m"].head) == ("words", "letters")
    assert recipes["arc-easy"].ask is question_prompt
    assert replace(recipes["arc-easy"], head="letters").ask is load_task("arc-easy").prompt
    assert "mmlu-law" not in recipes  # no training questions


def test_published_results_are_found_again():
    """The settings of the tasks in README's table are what they were."""
    trec = Recipe("trec", "words", "Question: {question}\nThe answer is a", 8, 5e-4)
    sst2 = Recipe("sst2", "words", "Review: {question}\nSentiment:", 6, 5e-4)
    easy = Recipe("arc-easy", "scored", None, 2, 5e-4, "mean")
    others = ("arc-easy", "arc-challenge", "mmlu-cs", "mmlu-engineering", "mmlu-health", "mmlu-law")
    openbook = Recipe("openbookqa", "scored", None, 6, 1e-3, "sum", others)
    expected = [trec, sst2, easy, openbook]
    assert select_tasks(["trec", "sst2", "arc-easy", "openbookqa"]) == expected


def test_rows_that_did_not_come_are_not_asked_for_again(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "_absent", {})
    datasets = SimpleNamespace(load_dataset=lambda *_, **__: asked.append(1) or 1 / 0)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    for name in ("arc-easy", "arc-challenge"):  # of one data set
        with pytest.raises(DataError, match=rf"ZeroDivisionError.*{name}\.test\.jsonl"):
            load_rows(name, "test", None)
    assert len(asked) == 1


def test_selecting_methods():
    assert list(select_methods(["TEMPERATURE"])) == ["MAP", "temperature scaling"]
    assert "Laplace-LoRA diag, loo" in select_methods(["*diag, loo"])
    assert "Laplace-LoRA kron MC, loo" not in select_methods([], quick=True)
    assert {cls.group for cls in select_methods(["point"]).values()} == {"point"}
    with pytest.raises(OptionError, match="parts of names"):
        select_methods(["no such thing"])


# Results ------------------------------------------------------------------------------------------


def test_results_are_read_back(tmp_path):
    results, settings = Results(tmp_path / "r.jsonl"), {"t": {"train": 1}}
    blank = ("t", 0, "held out", "m", "point", False, True, {"train": 1})
    results.append(Run(*blank, status="failed", reason="r"))
    assert results.done(settings) == set()
    with results.path.open("a") as file:
        file.write('{"task": "t", "se')
    results.append(Run(*blank, costs={"fit_seconds": 1 / 3}))
    (run_,) = results.read(settings).values()
    assert run_.costs == {"fit_seconds": 0.333333}
    assert results.done(settings) == {Key("t", 0, "held out", "m")}
    assert results.done({"t": {"train": 2}}) == set()


# Metrics ------------------------------------------------------------------------------------------


@pytest.fixture
def answers():
    generator = torch.Generator().manual_seed(0)
    probs = torch.softmax(1.5 * torch.randn(200, 4, generator=generator, dtype=torch.double), -1)
    labels = torch.multinomial(probs.sqrt(), 1, generator=generator)[:, 0]
    return probs, labels


def test_choices_that_are_not_there_change_no_metric(answers):
    probs, labels = answers
    wider = torch.cat([probs, torch.zeros(200, 2).double()], 1)
    found, expected = metrics.metrics(wider, labels), metrics.metrics(probs, labels)
    assert found == pytest.approx(expected, nan_ok=True)
    for name, values in metrics.uncertainty(wider).items():
        torch.testing.assert_close(values, metrics.uncertainty(probs)[name])


def test_metrics_by_their_definitions(answers):
    probs, labels = answers
    n = len(labels)
    confidence, answer = probs.max(1)
    correct = [float(a == y) for a, y in zip(answer, labels, strict=True)]
    found = metrics.metrics(probs, labels)
    assert list(found) == list(metrics.METRICS)
    assert found["accuracy"] == pytest.approx(sum(correct) / n)
    nll = -sum(math.log(probs[i, y]) for i, y in enumerate(labels)) / n
    assert found["NLL"] == pytest.approx(nll)
    brier = sum(
        sum((float(probs[i, c]) - (c == int(y))) ** 2 for c in range(4))
        for i, y in enumerate(labels)
    )
    assert found["Brier"] == pytest.approx(brier / n)
    ece = 0.0
    for b in range(15):
        inside = [i for i in range(n) if b / 15 < confidence[i] <= (b + 1) / 15]
        ece += abs(sum(correct[i] - float(confidence[i]) for i in inside)) / n
    assert found["ECE"] == pytest.approx(ece, abs=1e-6)
    order = sorted(range(n), key=lambda i: float(confidence[i]))
    sizes = [len(part) for part in torch.tensor_split(torch.arange(n), 15)]
    bounds = [sum(sizes[:b]) for b in range(16)]
    adaptive = sum(
        abs(sum(correct[i] - float(confidence[i]) for i in order[low:high]))
        for low, high in pairwise(bounds)
    )
    assert found["adaptive ECE"] == pytest.approx(adaptive / n)
    order.reverse()
    risks = [sum(1 - correct[i] for i in order[:k]) / k for k in range(1, n + 1)]
    assert found["AURC"] == pytest.approx(sum(risks) / n)


def test_ties_are_answered_in_any_order():
    confidence = torch.full((4,), 0.5)
    areas = {
        round(metrics.aurc(confidence, torch.tensor(correct).double()), 9)
        for correct in ([1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0])
    }
    assert areas == {0.5}


def test_smooth_ece():
    pytest.importorskip("relplot")
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(3000, generator=generator, dtype=torch.double)
    correct = (torch.rand(3000, generator=generator) < confidence).double()
    assert metrics.smooth_ece(confidence, correct) < 0.03
    wrong = (torch.rand(3000, generator=generator) < confidence - 0.2).double()
    assert metrics.smooth_ece(confidence.clamp_min(0.2), wrong) > 0.1


def test_ood_auroc_counts_pairs(answers):
    scores = answers[0][:, 0] * 3 - 1
    inside, outside = scores[:120], scores[100:].round(decimals=1)
    pairs = [(float(o > i) + 0.5 * float(o == i)) for i in inside for o in outside]
    assert metrics.ood_auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    falling = metrics.ood_auroc(inside, outside, falling=True)
    assert falling == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-5)


def test_bootstrap_intervals_cover():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        second = torch.randn(1, 80, generator=generator)
        first = second + 0.3 + torch.randn(1, 80, generator=generator)
        found = paired_bootstrap(first, second, 500)
        covered += found.low < 0.3 < found.high
    assert 88 <= covered <= 100
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)
    same = paired_bootstrap(first, first)
    assert same == Difference(0, 0, 0)
    assert same.verdict == "tie"


def test_wins_and_losses_are_as_bold():
    assert verdict(Difference(-0.2, -0.3, -0.1)).startswith("**-0.200 wins**")
    assert verdict(Difference(0.2, 0.1, 0.3)).startswith("**+0.200 loses**")
    assert verdict(Difference(0.2, -0.1, 0.3)).startswith("+0.200 tie")
    column = cells({"a": [0.2], "b": [0.2002], "c": [], "d": [0.5]}, ".3f", False)
    assert column == {"a": "**0.200**", "b": "**0.200**", "c": "", "d": "0.500"}


def test_predictions_may_be_samples():
    from laplace_llm.benchmark.calibration.evaluation import predictions

    samples = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])

    class Sampled:
        def predict(self, batch):
            return samples

    class Told:
        def predict(self, batch):
            return Prediction(samples.mean(0), torch.tensor([0.25]))

    batches = [{"labels": torch.tensor([0])}]
    found = predictions(Sampled(), batches)
    torch.testing.assert_close(found.probs, torch.tensor([[0.75, 0.25]]).double())
    total = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(found.mutual_information) == pytest.approx(total - math.log(2) / 2)
    assert float(predictions(Told(), batches).mutual_information) == 0.25

"""Errors injected at each stage of each public call: the model and the posterior stay as they were.

A table over calls and stages. `REACHES` says which stages a call passes through; a stage that is
not in it must not be passed, and one that is must raise.
"""

import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from models import (
    HAS_ELLA,
    contents,
    frozen,
    letter_batch,
    mlp_batch,
    snapshot,
    tiny_mlp,
    tiny_tokenizer,
    used_model,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

import laplace_llm
from laplace_llm import (
    LaplaceLLMError,
    MultipleChoiceCollator,
    StreamingEF,
    StreamingGGN,
    files,
    from_pretrained,
    shared_moments_grid,
)
from laplace_llm.hooks import Tap
from laplace_llm.tensors import LoraTensor

NN = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
MC = {"link_approx": "mc", "n_samples": 3}
GRID = {"method": "gridsearch", "grid_size": 3}
VALUES = torch.tensor([0.5, 5.0])
SINCE_03 = pytest.mark.skipif(not HAS_ELLA, reason="needs laplace-torch 0.3")


class Boom(Exception):
    """Raised by no library."""


class Fault:
    """A place that counts how often it is passed, and raises an error from some time on."""

    def __init__(self) -> None:
        self.passed, self.at, self.error = 0, None, Boom

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.passed += 1
        if self.at is not None and self.passed >= self.at:
            raise self.error("bomb")

    def arm(self, at: int, error: type[BaseException] = Boom) -> None:
        self.passed, self.at, self.error = 0, at, error

    def disarm(self) -> None:
        self.passed, self.at = 0, None

    def before(self, function: Callable) -> Callable:
        """Return the function with this place before it."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self()
            return function(*args, **kwargs)

        return wrapped


class Tokenised:
    """A loader without a seed: a `DataLoader` draws one from the global random state."""

    def __init__(self, rows: list[dict[str, Any]], collate: Callable) -> None:
        self.rows, self.collate = rows, collate

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.rows), 2):
            yield self.collate(self.rows[start : start + 2])


class Scene:
    """A model in the midst of training, with a fault at one stage, and what calls are made with."""

    def __init__(self, stage: str, monkeypatch: Any, structure: str = "kron", *more: str) -> None:
        self.fault, self.structure = Fault(), structure
        self.model = used_model()
        self.collate = MultipleChoiceCollator(tiny_tokenizer())
        self.loss: Callable = scored
        for each in (stage, *more):
            STAGES[each](self, monkeypatch)
        self.la = self.posterior()
        self.la.fit([letter_batch(4)])
        self.folder = mkdtemp()
        weakref.finalize(self, shutil.rmtree, self.folder)
        self.saved = self.new_folder()
        self.la.save_pretrained(self.saved)

    def new_folder(self) -> str:
        return mkdtemp(dir=self.folder)

    def posterior(self, **kwargs: Any) -> Any:
        kwargs = {"prior_precision": 3.0, **kwargs}
        return Laplace(self.model, "classification", "lora", self.structure, **kwargs)

    def loader(self) -> "Tokenised":
        """Return batches that a tokenizer makes."""
        rows = [
            {"question": f"what is {word} ?", "choices": ["red", "blue", "green"], "answer": i % 3}
            for i, word in enumerate(["sky", "sea", "grass", "snow", "white"])
        ]
        return Tokenised(rows, self.collate)

    def state(self) -> Any:
        return snapshot(self.model), contents(self.la), frozen(vars_of(self.la))


def vars_of(la: Any) -> dict[str, Any]:
    """Return a posterior's attributes: numbers and tensors as they are, others by identity."""
    return {
        key: value if isinstance(value, (int, float, str, Tensor, tuple)) else id(value)
        for key, value in vars(la).items()
    }


def scored(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -probabilities.gather(1, labels[:, None]).log().mean()


class Score(Metric):
    """The same as a metric, which fails in its updates or when it is computed."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault
        self.add_state("total", torch.zeros(()))

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        self.fault()
        self.total += scored(probabilities, labels).to(self.total)

    def compute(self) -> Tensor:
        self.fault()
        return self.total


# The stages ---------------------------------------------------------------------------------------


def layer(scene: Scene) -> nn.Module:
    return scene.model.model.get_base_model().model.layers[1]


def in_tokeniser(scene: Scene, patch: Any) -> None:
    scene.collate = scene.fault.before(scene.collate)


def in_forward(scene: Scene, patch: Any) -> None:
    layer(scene).mlp.register_forward_pre_hook(scene.fault)


def in_users_hook(scene: Scene, patch: Any) -> None:
    """Hooks of the user's on the very modules that ours are on."""
    lora = layer(scene).self_attn.v_proj.lora_B["default"]
    lora.register_forward_pre_hook(scene.fault)
    lora.register_forward_hook(scene.fault)


def in_our_hook(scene: Scene, patch: Any) -> None:
    patch.setattr(LoraTensor, "captured", scene.fault.before(LoraTensor.captured))


def in_our_batch_hook(scene: Scene, patch: Any) -> None:
    patch.setattr(type(scene.model), "prepare", scene.fault.before(type(scene.model).prepare))


def in_backward(scene: Scene, patch: Any) -> None:
    def plant(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(scene.fault)

    layer(scene).mlp.register_forward_hook(plant)


def in_our_gradient_hook(scene: Scene, patch: Any) -> None:
    patch.setattr(Tap, "gradient", scene.fault.before(Tap.gradient))


def in_eigendecomposition(scene: Scene, patch: Any) -> None:
    patch.setattr(torch.linalg, "eigh", scene.fault.before(torch.linalg.eigh))


def in_cholesky(scene: Scene, patch: Any) -> None:
    for name in ("cholesky", "cholesky_ex"):
        patch.setattr(torch.linalg, name, scene.fault.before(getattr(torch.linalg, name)))


def in_metric(scene: Scene, patch: Any) -> None:
    scene.loss = scene.fault.before(scored)


def in_torchmetric(scene: Scene, patch: Any) -> None:
    scene.loss = Score(scene.fault)


def in_optimizer(scene: Scene, patch: Any) -> None:
    patch.setattr(torch.optim.Adam, "step", scene.fault.before(torch.optim.Adam.step))


def in_sampling(scene: Scene, patch: Any) -> None:
    patch.setattr(torch, "randn", scene.fault.before(torch.randn))


def in_writing(scene: Scene, patch: Any) -> None:
    patch.setattr(files, "save_file", scene.fault.before(files.save_file))


def in_renaming(scene: Scene, patch: Any) -> None:
    patch.setattr("os.replace", scene.fault.before(os.replace))


def in_reading(scene: Scene, patch: Any) -> None:
    patch.setattr(files, "safe_open", scene.fault.before(files.safe_open))


def in_hashing(scene: Scene, patch: Any) -> None:
    patch.setattr("hashlib.sha256", scene.fault.before(hashlib.sha256))


STAGES: dict[str, Callable[[Scene, Any], None]] = {
    "tokeniser": in_tokeniser,
    "forward": in_forward,
    "users hook": in_users_hook,
    "our hook": in_our_hook,
    "our batch hook": in_our_batch_hook,
    "backward": in_backward,
    "our gradient hook": in_our_gradient_hook,
    "eigendecomposition": in_eigendecomposition,
    "cholesky": in_cholesky,
    "metric": in_metric,
    "torchmetric": in_torchmetric,
    "optimizer": in_optimizer,
    "sampling": in_sampling,
    "writing": in_writing,
    "renaming": in_renaming,
    "reading": in_reading,
    "hashing": in_hashing,
}

# The calls ----------------------------------------------------------------------------------------


def tune(scene: Scene, **kwargs: Any) -> None:
    if kwargs.get("method") in ("gridsearch", "val_grad"):
        kwargs = {"val_loader": scene.loader(), "loss": scene.loss, **kwargs}
    else:
        kwargs = {"train_loader": scene.loader(), **kwargs}
    scene.la.optimize_prior_precision(grid_size=3, n_steps=3, **kwargs)


BATCH = letter_batch(3, seed=5)
CALLS: dict[str, Callable[[Scene], Any]] = {
    "construct": lambda s: s.posterior(),
    "fit": lambda s: s.la.fit(s.loader()),
    "fit more": lambda s: s.la.fit(s.loader(), override=False),
    "loo": lambda s: tune(s, method="loo"),
    "grid glm": lambda s: tune(s, method="gridsearch"),
    "grid mc": lambda s: tune(s, method="gridsearch", **MC),
    "grid nn": lambda s: tune(s, method="gridsearch", **NN),
    "val_grad": lambda s: tune(s, method="val_grad"),
    "marglik": lambda s: tune(s, method="marglik"),
    "linear mode": lambda s: tune(s, method="marglik", evidence="linear_mode"),
    "qmc": lambda s: s.la(BATCH),
    "mc": lambda s: s.la(BATCH, **MC),
    "probit": lambda s: s.la(BATCH, link_approx="probit"),
    "nn": lambda s: s.la(BATCH, **NN),
    "predictive samples": lambda s: s.la.predictive_samples(BATCH, n_samples=2),
    "predictive samples nn": lambda s: s.la.predictive_samples(BATCH, "nn", n_samples=2),
    "functional samples": lambda s: s.la.functional_samples(BATCH, n_samples=2),
    "sample": lambda s: s.la.sample(2),
    "moments grid": lambda s: s.la.moments_grid(BATCH, VALUES),
    "shared moments grid": lambda s: shared_moments_grid([s.la, s.la], BATCH, VALUES),
    "evidence": lambda s: s.la.log_marginal_likelihood(torch.tensor([2.0])),
    "state": lambda s: s.la.state_dict(),
    "load state": lambda s: s.la.load_state_dict(s.la.state_dict()),
    "fit with checkpoints": lambda s: s.la.fit(
        s.loader(), checkpoint_dir=s.new_folder(), checkpoint_every=1
    ),
    "save": lambda s: s.la.save_pretrained(s.new_folder()),
    "load": lambda s: from_pretrained(s.model, s.saved),
}
DRAWS = {"mc", "nn", "predictive samples", "predictive samples nn", "functional samples", "sample"}

FORWARD = {"forward", "users hook"}
TAPPED = FORWARD | {"our hook", "our batch hook", "backward", "our gradient hook"}
SAMPLED = FORWARD | {"sampling"}
SCORES = {"metric", "torchmetric"}
REACHES: dict[str, set[str]] = {
    "construct": set(),
    "fit": TAPPED | {"tokeniser", "eigendecomposition"},
    "fit more": TAPPED | {"tokeniser", "eigendecomposition"},
    "loo": TAPPED | {"tokeniser", "eigendecomposition", "cholesky"},
    "grid glm": TAPPED | SCORES | {"tokeniser", "cholesky"},
    "grid mc": TAPPED | SCORES | {"tokeniser", "cholesky", "sampling"},
    "grid nn": SAMPLED | SCORES | {"tokeniser"},
    "val_grad": TAPPED | {"metric", "tokeniser", "cholesky", "optimizer"},
    "marglik": TAPPED | {"optimizer", "cholesky"},
    "linear mode": TAPPED | {"tokeniser", "cholesky", "eigendecomposition"},
    "qmc": TAPPED | {"cholesky"},
    "mc": TAPPED | {"cholesky", "sampling"},
    "probit": TAPPED,
    "nn": SAMPLED,
    "predictive samples": TAPPED | {"cholesky", "sampling"},
    "predictive samples nn": SAMPLED,
    "functional samples": TAPPED | {"cholesky", "sampling"},
    "sample": {"sampling"},
    "moments grid": TAPPED,
    "shared moments grid": TAPPED,
    "evidence": set(),
    "state": set(),
    "load state": {"eigendecomposition"},
    "fit with checkpoints": TAPPED
    | {"tokeniser", "eigendecomposition", "writing", "renaming", "hashing"},
    "save": {"writing", "renaming", "hashing"},
    "load": {"reading", "hashing", "eigendecomposition"},
}
DENSE = {"eigendecomposition"}  # of P x P: what needs its inverse decomposes it the first time
# The calls that are not the same for all structures, and what they reach there.
OTHERS: dict[str, dict[str, set[str]]] = {
    structure: {
        call: (REACHES[call] - ({"eigendecomposition"} if structure in ("diag", "full") else set()))
        | (DENSE if structure == "full" and call in inverts else set())
        for call in ("fit", "fit more", "marglik", "qmc", "nn", "moments grid", "load state")
    }
    for structure in ("ekfac", "lowrank", "diag", "full", "gp")
    for inverts in [("marglik", "qmc", "nn", "moments grid")]
}
WHERE = ("tokeniser", "eigendecomposition", "cholesky", "our gradient hook")
TABLE = [("kron", call, stage) for call, stages in REACHES.items() for stage in sorted(stages)]
TABLE += [
    (structure, call, stage)
    for structure, calls in OTHERS.items()
    for call, stages in calls.items()
    for stage in WHERE
    if stage in stages
]
# The other calls pass these stages in the code that these calls do.
TYPICAL = {"fit", "fit with checkpoints", "loo", "grid glm", "marglik", "qmc", "nn"}
ERRORS = (RuntimeError, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("structure", "call", "stage"),
    [
        pytest.param(
            *row,
            marks=[pytest.mark.slow] * (row[1] not in TYPICAL and row[2] in TAPPED - {"forward"}),
        )
        for row in TABLE
    ],
)
def test_after_an_error_everything_is_as_it_was(structure, call, stage, monkeypatch):
    """Half-way and at the last moment, by errors of every kind, and the call works afterwards."""
    scene = Scene(stage, monkeypatch, structure)
    attributes = dict(vars(scene.la))
    scene.fault.disarm()
    CALLS[call](scene)
    passes = scene.fault.passed
    vars(scene.la).clear()
    vars(scene.la).update(attributes)
    before = scene.state()
    for number, error in enumerate(ERRORS):
        vars(scene.la).update(attributes)  # without what was computed for the comparison
        random = torch.get_rng_state()
        scene.fault.arm((passes + 1) // 2 if number else passes, error)
        # A decomposition may be tried again, and then fails with an error of ours.
        with pytest.raises((error, LaplaceLLMError)):
            CALLS[call](scene)
        scene.fault.disarm()
        assert call in DRAWS or torch.equal(torch.get_rng_state(), random)
        assert scene.state() == before, error
    vars(scene.la).update(attributes)
    scene.fault.disarm()
    CALLS[call](scene)
    assert scene.fault.passed == passes
    assert snapshot(scene.model) == before[0]


@pytest.mark.parametrize("call", CALLS)
def test_stages_that_are_not_in_the_table_are_not_passed(call, monkeypatch):
    """Else the table would be incomplete."""
    # `val_grad` refuses a metric, which has no gradient.
    refused = {"torchmetric"} if call == "val_grad" else set()
    first, *more = sorted(STAGES.keys() - REACHES[call] - refused)
    scene = Scene(first, monkeypatch, "kron", *more)
    scene.fault.disarm()
    CALLS[call](scene)
    assert scene.fault.passed == 0


@pytest.mark.parametrize("call", CALLS)
def test_the_global_random_state_is_used_by_draws_alone(call, monkeypatch):
    scene = Scene("forward", monkeypatch)
    before = torch.get_rng_state()
    CALLS[call](scene)
    assert torch.equal(torch.get_rng_state(), before) == (call not in DRAWS)


# Construction -------------------------------------------------------------------------------------


def failing(error: type[BaseException]) -> type:
    """Return a backend that cannot be built."""

    class Failing(StreamingGGN):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            raise error("bomb")

    return Failing


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("structure", ["kron", "ekfac", "lowrank", "diag", "full", "gp"])
def test_an_error_in_construction(structure, error):
    model = used_model()
    before = snapshot(model)
    with pytest.raises(error, match="bomb"):
        Laplace(model, "classification", "lora", structure, backend=failing(error))
    assert snapshot(model) == before


# The parent's backends and function-space methods -------------------------------------------------


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize(
    "backend", [StreamingEF, CurvlinopsGGN, pytest.param(AsdlGGN, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "stage", ["forward", pytest.param("users hook", marks=pytest.mark.slow), "backward"]
)
def test_an_error_inside_any_backend(stage, backend, structure, monkeypatch):
    scene = Scene(stage, monkeypatch, structure)
    batches = [letter_batch(3, seed=1), letter_batch(2, seed=2)] * 2
    for at, error in enumerate(ERRORS, start=1):
        la = scene.posterior(backend=backend)
        before = snapshot(scene.model)
        scene.fault.arm(at, error)
        with pytest.raises(error, match="bomb"):
            la.fit(batches)
        scene.fault.disarm()
        assert snapshot(scene.model) == before
    la.fit(batches)
    expected = scene.posterior(backend=backend)
    expected.fit(batches)
    assert contents(la) == contents(expected)


@SINCE_03
@pytest.mark.parametrize("method", ["nystrom", "variational"])
@pytest.mark.parametrize("stage", ["loader", "forward", "backward", "eigh", "optimizer"])
def test_an_error_inside_a_function_space_method(stage, method, monkeypatch):
    fault, model = Fault(), tiny_mlp()
    module = model.base_model.model.first
    if stage == "forward":
        module.register_forward_pre_hook(fault)
    elif stage == "backward":
        module.register_forward_hook(
            lambda m, args, output: output.requires_grad and output.register_hook(fault) and None
        )
    elif stage == "eigh":
        monkeypatch.setattr(torch.linalg, "eigh", fault.before(torch.linalg.eigh))
    elif stage == "optimizer":
        monkeypatch.setattr(torch.optim.Adam, "step", fault.before(torch.optim.Adam.step))
    options = {
        "nystrom": {"subsample_size": 6, "n_eigenvalues": 4},
        "variational": {"inducing_locations": "random", "num_inducing": 4},
    }[method]
    la = laplace_llm.Laplace(
        model, "classification", "lora", "gp", functional_approximation=method, **options
    )
    data = TensorDataset(*mlp_batch(9))
    collate = torch.utils.data.default_collate
    train = DataLoader(data, 4, collate_fn=fault.before(collate) if stage == "loader" else collate)
    fit = {"nystrom": {}, "variational": {"iterations": 3}}[method]
    la.fit(train, **fit)
    passes, x = fault.passed, mlp_batch(3, seed=1)[0]
    assert (passes == 0) == ((stage, method) in {("eigh", "variational"), ("optimizer", "nystrom")})
    fault.disarm()
    before = snapshot(model), frozen(la(x)), frozen(vars_of(la))
    for error in ERRORS if passes else ():
        fault.arm(passes, error)
        with pytest.raises((error, LaplaceLLMError)):
            la.fit(train, **fit)
        fault.disarm()
        assert (snapshot(model), frozen(la(x)), frozen(vars_of(la))) == before
    if stage in ("forward", "backward"):
        fault.arm(1)
        with pytest.raises(Boom):
            la(x)
        fault.disarm()
        assert (snapshot(model), frozen(la(x)), frozen(vars_of(la))) == before

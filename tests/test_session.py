"""What goes on around a call: other threads, other posteriors, autocast and inference mode."""

import copy
import gc
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from models import (
    HEADS,
    frozen,
    letter_batch,
    letter_head,
    mlp_batch,
    snapshot,
    tiny_bert_classifier,
    tiny_llama,
    tiny_mlp,
    used_model,
)
from peft import LoraConfig
from torch import Tensor, nn

from laplace_llm import Laplace, MultipleChoiceHead, shared_moments_grid
from laplace_llm import locks as locks_module
from laplace_llm.errors import AdapterError
from laplace_llm.kernel import training_space
from laplace_llm.locks import Locks
from laplace_llm.session import borrowed, ordinary

STRUCTURES = ("kron", "ekfac", "lowrank", "diag", "full", "gp")
MC = {"link_approx": "mc", "n_samples": 3}
NN = {"pred_type": "nn", **MC}
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def fitted(model: nn.Module, structure: str = "kron", seed: int = 0, **kwargs: Any) -> Any:
    la = Laplace(model, "classification", "lora", structure, prior_precision=3.0, **kwargs)
    la.fit([letter_batch(4, seed=seed)])
    return la


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Return the results of calls that are made by as many threads, all started together."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(timeout=60)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(run, c) for c in calls]]


# Threads ------------------------------------------------------------------------------------------

PREDICTIONS: dict[str, Callable[[Any, int], Any]] = {
    "qmc": lambda la, i: la(letter_batch(3, seed=i)),
    "probit": lambda la, i: la(letter_batch(2, seed=i), link_approx="probit"),
    "mc": lambda la, i: la(letter_batch(3, seed=i), **MC, generator=generator(i)),
    "nn": lambda la, i: la(letter_batch(3, seed=i), **NN, generator=generator(i)),
    "grid": lambda la, i: la.moments_grid(letter_batch(3, seed=i), torch.tensor([1.0, 10.0**i])),
    "shared": lambda la, i: shared_moments_grid([la], letter_batch(2, seed=i), torch.ones(1)),
    "sample": lambda la, i: la.sample(2, generator(i)),
    "evidence": lambda la, i: la.log_marginal_likelihood(torch.tensor([1.0 + i])).detach(),
    "prior": lambda la, i: la.prior_precision,
}


@each_structure
def test_many_threads_get_what_one_would(structure):
    model = used_model()
    la, before = fitted(model, structure), snapshot(model)
    jobs = [(name, i) for i in range(3) for name in PREDICTIONS]

    def run(name: str, i: int) -> Any:
        # Setting the prior for an evidence is what it does, in the parent too.
        own = la if name != "evidence" else reference
        return PREDICTIONS[name](own, i)

    reference = fitted(used_model(), structure)
    expected = [frozen(run(*job)) for job in jobs]
    reference.prior_precision = 3.0
    found = at_once([lambda job=job: run(*job) for job in jobs])
    assert [frozen(result) for result in found] == expected
    assert snapshot(model) == before


def test_predictions_beside_a_fit_are_of_before_or_after():
    model = used_model()
    la = fitted(model)
    again = [letter_batch(3, seed=s) for s in range(1, 5)]
    old = frozen(la(letter_batch(3)))
    other = fitted(used_model())
    other.fit(again)
    new = frozen(other(letter_batch(3)))
    _, *found = at_once([lambda: la.fit(again), *[lambda: la(letter_batch(3))] * 6])
    assert {str(frozen(result)) for result in found} <= {str(old), str(new)}
    assert frozen(la(letter_batch(3))) == new


@pytest.mark.parametrize("kwargs", [{}, NN], ids=["glm", "nn"])
def test_predictions_beside_a_grid_search_never_see_a_trial_value(kwargs):
    la = fitted(used_model())
    old = frozen(la(letter_batch(3)))

    def search(posterior: Any) -> None:
        posterior.optimize_prior_precision(
            method="gridsearch", val_loader=[letter_batch(3, seed=1)], grid_size=8, **kwargs
        )

    def predict() -> list[Any]:
        return [(float(la.prior_precision), frozen(la(letter_batch(3)))) for _ in range(4)]

    torch.manual_seed(0)
    _, *found = at_once([lambda: search(la), predict, predict])
    new = frozen(la(letter_batch(3)))
    chosen = float(la.prior_precision)
    for prior, prediction in itertools.chain(*found):
        assert prior in (3.0, chosen)
        assert prediction in (old, new)


def test_a_fit_beside_sampled_weights_of_another_posterior():
    """`nn` swaps weights: neither a fit nor a construction may read them."""
    model = used_model()
    la = fitted(model)
    expected = frozen(fitted(model, "diag", seed=1).state_dict())

    def predict() -> None:
        for i in range(10):
            la(letter_batch(3), **NN, generator=generator(i))

    def fit() -> Any:
        return [frozen(fitted(model, "diag", seed=1).state_dict()) for _ in range(5)]

    _, found, more = at_once([predict, fit, fit])
    assert all(state == expected for state in found + more)


def test_an_error_in_one_thread_does_not_hold_up_the_others():
    model = used_model()
    la = fitted(model)
    expected = frozen(la(letter_batch(3)))
    before = snapshot(model)

    def fail() -> None:
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error):
                la.fit(broken(error))

    results = at_once([fail, lambda: la(letter_batch(3)), fail, lambda: la(letter_batch(3))])
    assert [frozen(result) for result in results[1::2]] == [expected] * 2
    assert snapshot(model) == before


def broken(error: type[BaseException]) -> Any:
    yield letter_batch(2)
    raise error


def test_compiled_models_in_two_threads_leave_the_process_as_it_was():
    heads = [letter_head(torch.compile(tiny_llama(seed=seed))) for seed in (0, 1)]
    posteriors = [fitted(head) for head in heads]
    expected = [frozen(la(letter_batch(3))) for la in posteriors]
    found = at_once([lambda la=la: [la(letter_batch(3)) for _ in range(4)] for la in posteriors])
    assert [[frozen(r) for r in results] for results in found] == [[e] * 4 for e in expected]
    assert torch._dynamo.eval_frame._stance.stance == "default"


# Locks --------------------------------------------------------------------------------------------


def test_models_with_weights_in_common_share_a_lock():
    base = tiny_llama()
    one, other = letter_head(base), MultipleChoiceHead(base, (3, 4))
    locks = Locks()
    assert locks.of(one) == locks.of(other) == locks.of(base) == locks.of(base.base_model.model)
    assert len(locks.of(one)) == 1
    assert locks.of(letter_head()) != locks.of(one)


def test_a_model_made_of_used_ones_has_the_locks_of_all():
    parts = [tiny_mlp(), tiny_mlp()]
    locks = Locks()
    found = sorted({lock.number for part in reversed(parts) for lock in locks.of(part)})
    assert [lock.number for lock in locks.of(nn.ModuleList(parts))] == found == [0, 1]
    assert locks.of(nn.Identity()) != locks.of(nn.Identity())


def test_models_are_not_kept_alive():
    locks = Locks()
    model = tiny_mlp()
    locks.of(model)
    del model
    gc.collect()
    assert len(locks._of_model) == len(locks._of_weight) == 0


def test_other_models_are_not_waited_for():
    first, second = tiny_mlp(), tiny_mlp()
    with borrowed(first, []), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: snapshot(second) and borrowed(second, []).__enter__()).result(
            timeout=30
        )


def test_a_thread_waits_for_a_borrowed_model_and_its_head():
    base = tiny_llama()
    la = fitted(letter_head(base))
    with ThreadPoolExecutor(1) as pool:
        with borrowed(base, []):
            future = pool.submit(lambda: la(letter_batch(2)))
            with pytest.raises(TimeoutError):
                future.result(timeout=0.3)
        assert future.result(timeout=30).shape == (2, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    la = fitted(head := letter_head())
    borrowing, done = threading.Event(), threading.Event()

    def borrow() -> None:
        with borrowed(head, []):
            borrowing.set()
            done.wait(timeout=60)

    thread = threading.Thread(target=borrow)
    thread.start()
    borrowing.wait(timeout=60)
    child = os.fork()
    if child == 0:  # without pytest's cleaning up
        signal.alarm(20)  # instead of waiting for ever
        os._exit(0 if torch.isfinite(la(letter_batch(2))).all() else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


def test_posteriors_can_be_copied_and_pickled():
    la = fitted(letter_head())
    expected = frozen(la(letter_batch(2)))
    for other in (copy.deepcopy(la), pickle.loads(pickle.dumps(la))):
        assert frozen(other(letter_batch(2))) == expected
    assert locks_module._locks.of(copy.deepcopy(la).model) != locks_module._locks.of(la.model)


# Two posteriors on one model ----------------------------------------------------------------------


def two_structures(separate: bool) -> list[Any]:
    models = [letter_head(tiny_llama(lora_dropout=0.3)) for _ in range(2 if separate else 1)]
    return [(models[0], {}), (models[-1], {"structure": "lowrank"})]


def two_adapters(separate: bool) -> list[Any]:
    def make() -> nn.Module:
        model = tiny_llama()
        torch.manual_seed(5)
        model.add_adapter(
            "other", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
        )
        model.base_model.set_adapter(["default", "other"])
        return letter_head(model.double())

    models = [make() for _ in range(2 if separate else 1)]
    return [(models[0], {"adapter": "default"}), (models[-1], {"adapter": "other"})]


def two_heads(separate: bool) -> list[Any]:
    models = [tiny_llama() for _ in range(2 if separate else 1)]
    return [(letter_head(models[0]), {}), (MultipleChoiceHead(models[-1], (7, 9, 3)), {})]


def two_parts(separate: bool) -> list[Any]:
    models = [tiny_bert_classifier() for _ in range(2 if separate else 1)]
    return [(models[0], {}), (models[-1], {"tensors": "B", "structure": "diag"})]


PAIRS = {f.__name__: f for f in (two_structures, two_adapters, two_heads, two_parts)}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_posteriors_on_one_model_are_as_if_alone(pair):
    results = []
    for separate in (True, False):
        found = PAIRS[pair](separate)
        before = [snapshot(model) for model, _ in found]
        las = [fitted(model, **kwargs) for model, kwargs in found]
        outcome = []
        # Interleaved: each is used between any two uses of the other.
        for step in range(6):
            for index, la in enumerate(las):
                batches = [letter_batch(3, seed=10 * step + index)]
                if step == 1:
                    la.fit(batches, override=False)
                elif step == 2:
                    la.optimize_prior_precision(val_loader=batches, grid_size=3)
                elif step == 3:
                    la.optimize_prior_precision()
                kwargs = NN if step == 4 else {}
                random = generator(step) if step == 4 else None
                outcome.append(la(batches[0], generator=random, **kwargs))
        assert [snapshot(model) for model, _ in found] == before
        results.append(frozen(outcome))
    assert results[0] == results[1]


# Autocast -----------------------------------------------------------------------------------------

USES: dict[str, Callable[[Any], Any]] = {
    "fit": lambda la: la.fit([letter_batch(3, seed=1)]),
    "fit more": lambda la: la.fit([letter_batch(3, seed=1)], override=False),
    "loo": lambda la: la.optimize_prior_precision(grid_size=5),
    "grid": lambda la: la.optimize_prior_precision(
        val_loader=[letter_batch(3, seed=1)], grid_size=5
    ),
    "val_grad": lambda la: la.optimize_prior_precision(
        method="val_grad", val_loader=[letter_batch(3, seed=1)], n_steps=3
    ),
    "marglik": lambda la: la.optimize_prior_precision(method="marglik", n_steps=5),
    "linear mode": lambda la: la.optimize_prior_precision(
        method="marglik", evidence="linear_mode", grid_size=5
    ),
    "qmc": lambda la: la(letter_batch(3)),
    "probit": lambda la: la(letter_batch(3), link_approx="probit"),
    "nn": lambda la: la(letter_batch(3), **NN, generator=generator(0)),
    "samples": lambda la: la.functional_samples(
        letter_batch(3), n_samples=2, generator=generator(0)
    ),
    "sample": lambda la: la.sample(2, generator(0)),
    "grid of moments": lambda la: la.moments_grid(letter_batch(3), torch.tensor([1.0, 4.0])),
    "evidence": lambda la: la.log_marginal_likelihood().detach(),
    "precision": lambda la: la.log_det_posterior_precision,
    "load": lambda la: la.load_state_dict(la.state_dict()),
}
CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
each_context = pytest.mark.parametrize("context", CONTEXTS)


def outcome(la: Any, result: Any) -> Any:
    """Return what a use returned, and left."""
    state = la.state_dict()
    return frozen([result, state["H"], state["mean"], state["loss"], la.prior_precision])


@each_structure
@each_context
def test_a_use_inside_a_context_equals_one_outside(context, structure):
    """In single precision, as autocast leaves double precision alone."""
    results = []
    for inside in (False, True):
        model = letter_head(tiny_llama(torch.float32))
        before = snapshot(model)
        found = []
        for use in USES.values():
            with CONTEXTS[context]() if inside else torch.enable_grad():
                la = fitted(model, structure)  # constructed and fitted there too
                result = use(la)
                found.append(outcome(la, result))
        assert snapshot(model) == before
        results.append(found)
    for name, outside, inside in zip(USES, *results, strict=True):
        assert outside == inside, name


def test_autocast_would_make_a_difference():
    """Else the test above could not fail."""
    model = letter_head(tiny_llama(torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        inside = model(letter_batch(3))
    with torch.no_grad():
        assert float((model(letter_batch(3)) - inside).abs().max()) > 1e-3


def test_a_context_around_a_call_is_there_again_after_it():
    la = fitted(letter_head(tiny_llama(torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        la(letter_batch(2))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    with torch.inference_mode():
        la(letter_batch(2))
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert not la(letter_batch(2)).requires_grad
        assert not torch.is_grad_enabled()


# Inference mode -----------------------------------------------------------------------------------


def tensors_in(value: Any, seen: set[int]) -> list[Tensor]:
    """Return all tensors that are reachable from an object of ours."""
    if id(value) in seen or isinstance(value, nn.Module):
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


@each_structure
def test_nothing_made_in_inference_mode_is_kept(structure):
    model = letter_head()
    with torch.inference_mode():
        la = Laplace(model, hessian_structure=structure, prior_precision=torch.tensor(2.0))
        la.fit([letter_batch(4)])
        la.prior_precision = torch.full((1,), 3.0, dtype=torch.float64)
        la.load_state_dict({k: clone(v) for k, v in la.state_dict().items()})
        la.fit([letter_batch(4)])
        la(letter_batch(2))
        la.sample(2)
        la.log_marginal_likelihood()
    found = tensors_in(la, set())
    assert len(found) > 5
    assert not any(tensor.is_inference() for tensor in found)
    # All of it takes part in gradients.
    la.optimize_prior_precision(method="marglik", n_steps=2)
    la.enable_backprop = True
    assert la(letter_batch(2)).isfinite().all()


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def test_inputs_made_in_inference_mode():
    """Of floating point, which the first layer keeps for its backward pass."""
    model, make = HEADS["mlp"]()
    expected = Laplace(model)
    expected.fit([make(5)])
    with torch.inference_mode():
        x, y = make(5)
    la = Laplace(model)
    la.fit([(x, y)])
    la.optimize_prior_precision(method="val_grad", val_loader=[(x, y)], n_steps=2)
    expected.optimize_prior_precision(method="val_grad", val_loader=[make(5)], n_steps=2)
    assert torch.equal(la(x), expected(mlp_batch(5)[0]))
    assert training_space(la, iter([(x, y)])).kernel.isfinite().all()


def test_ordinary_values_are_passed_on_as_they_are():
    batch = letter_batch(2)
    assert ordinary(batch) is batch
    assert ordinary([batch, "x"])[0] is batch
    with torch.inference_mode():
        made = letter_batch(2)
    copied = ordinary({"inner": [made, 1]})
    assert not any(tensor.is_inference() for tensor in tensors_in(copied, set()))
    assert frozen(copied) == frozen({"inner": [made, 1]})
    assert made["input_ids"].is_inference()  # the caller's batch is not written to


@pytest.mark.parametrize("made", ["model", "adapter"])
def test_weights_made_in_inference_mode_are_refused(made):
    if made == "model":
        with torch.inference_mode():
            model = tiny_mlp()
    else:
        model = tiny_mlp()
        with torch.inference_mode():
            weight = model.base_model.model.second.lora_B["default"].weight
            model.base_model.model.second.lora_B["default"].weight = nn.Parameter(weight.clone())
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"weight' was made under torch.inference_mode\(\)"):
        Laplace(model)
    assert snapshot(model) == before
